//go:build linux

package main

import (
	"cmp"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// Time limits of git's work, and its limit on memory; half of the free space is its limit on the size of
// files.
const (
	lookLimit  = 30 * time.Second
	fetchLimit = 5 * time.Minute
	cloneLimit = 30 * time.Minute // of a whole look, too

	missingLimit = 2 * fetchLimit // of what a service asks for, with the wait for the network
	gitMemory    = 1 << 30
)

// gitCommand makes a git that asks nobody, reads no configuration but that of gitDir, runs no hook, and
// reaches no network (an object that is missing is then an error instead of a fetch), unless extraEnv says
// so. It never goes looking for a repository.
func gitCommand(a account, gitDir string, extraEnv []string, args ...string) *exec.Cmd {
	cmd := exec.Command("git", append([]string{
		"-c", "core.hooksPath=/dev/null", "-c", "core.fsmonitor=false", "-c", "core.untrackedCache=false",
		"-c", "core.askPass=", "-c", "core.attributesFile=/dev/null", "-c", "core.autocrlf=false",
		"-c", "core.fileMode=true", "-c", "core.symlinks=true", "-c", "core.sparseCheckout=true",
		"-c", "core.sparseCheckoutCone=false", "-c", "index.sparse=false", "-c", "submodule.recurse=false",
		"-c", "fetch.recurseSubmodules=no", "-c", "protocol.ext.allow=never",
		"-c", "transfer.bundleURI=false",
		"-c", "core.protectNTFS=false", "-c", "core.protectHFS=false", "-c", "credential.helper=",
		"-c", "remote.origin.uploadpack=git-upload-pack", "-c", "gc.auto=0", "-c", "maintenance.auto=false",
		"-c", "http.lowSpeedLimit=1000", "-c", "http.lowSpeedTime=20",
	}, args...)...)
	cmd.Dir = "/proc" // nobody has a repository there

	ssh := "ssh -o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=10 -o ServerAliveCountMax=2"
	if host := "/etc/ssh/ssh_config"; a.uid != os.Getuid() && lexists(host) {
		ssh += " -F " + host // the user's own could name a program
	} else if a.uid != os.Getuid() {
		ssh += " -F none"
	}
	cmd.Env = []string{
		"PATH=" + os.Getenv("PATH"), "HOME=" + a.home, "GIT_CONFIG_NOSYSTEM=1", "GIT_CONFIG_GLOBAL=/dev/null",
		"GIT_ATTR_NOSYSTEM=1", "GIT_TERMINAL_PROMPT=0", "GIT_ASKPASS=", "SSH_ASKPASS=",
		"GIT_ALLOW_PROTOCOL=none", "GIT_NO_LAZY_FETCH=1", "GIT_LITERAL_PATHSPECS=1",
		"GIT_OPTIONAL_LOCKS=0", "GIT_CEILING_DIRECTORIES=/",
		"GIT_NO_REPLACE_OBJECTS=1", "GIT_SSH_COMMAND=" + ssh,
	}

	for _, k := range strings.Fields("http_proxy https_proxy ftp_proxy all_proxy no_proxy " +
		"HTTP_PROXY HTTPS_PROXY FTP_PROXY ALL_PROXY NO_PROXY SSL_CERT_FILE SSL_CERT_DIR") {
		if v, ok := os.LookupEnv(k); ok {
			cmd.Env = append(cmd.Env, k+"="+v)
		}
	}
	// What git hands to its TLS library, which may know nothing of the names that OpenSSL made common.
	common := map[string]string{"GIT_SSL_CAINFO": "SSL_CERT_FILE", "GIT_SSL_CAPATH": "SSL_CERT_DIR"}
	for k, other := range common {
		if v := cmp.Or(os.Getenv(k), os.Getenv(other)); v != "" {
			cmd.Env = append(cmd.Env, k+"="+v)
		}
	}

	if gitDir != "" {
		cmd.Env = append(cmd.Env, "GIT_DIR="+gitDir)
	}
	cmd.Env = append(cmd.Env, extraEnv...)
	// A git whose gitopper was killed must not go on writing beside its successor's.
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Credential: a.credential()}
	return cmd
}

// runGit executes cmd within limits on memory and, unless fileSize is left out, on the size of files; counts
// it, and names it after its verb in errors.
func runGit(ctx context.Context, verb string, cmd *exec.Cmd, limit time.Duration, fileSize ...uint64) (
	[]byte, error) {
	count.add("gitopper_machine_git_ops_total", "")
	p := program{name: "git " + verb, cmd: cmd, limit: limit, memory: gitMemory, oomScoreAdj: sacrifice}
	if len(fileSize) > 0 {
		p.fileSize = fileSize[0]
	}
	out, err := execute(ctx, p)

	isAnswer := exitCode(err) == 1 // files differ, no such commit
	if wentWrong(ctx, err) && !isAnswer {
		count.add("gitopper_machine_git_errors_total", "")
	}
	return out, err
}

// gitVersion returns the version of the git program, 2030 for 2.30; an error if there is none, or an older
// one.
func gitVersion(ctx context.Context) (int, error) {
	cmd := gitCommand(account{uid: os.Getuid()}, "", nil, "--version")
	out, err := runGit(ctx, "--version", cmd, localLimit)
	if err != nil {
		return 0, fmt.Errorf("git is needed, 2.30 or newer: %w", err)
	}
	var major, minor int
	if _, err := fmt.Sscanf(string(out), "git version %d.%d", &major, &minor); err != nil {
		return 0, fmt.Errorf("git --version says %q", strings.TrimSpace(string(out)))
	}
	version := 1000*major + minor
	if version < 2030 {
		return 0, fmt.Errorf("git %d.%d is too old: 2.30 or newer is needed", major, minor)
	}
	return version, nil
}

// askGit asks git for its version, once for all upstreams, and logs what is wrong with it.
func askGit(ctx context.Context, upstreams []*upstream) {
	version, err := gitVersion(ctx)
	if ctx.Err() != nil {
		return
	}
	if err != nil {
		slog.Error(err.Error())
	}
	for _, u := range upstreams {
		u.git.Store(int32(version))
	}
}

// look is the outcome of a look at one branch of an upstream, and of the fetch that followed it.
type look struct {
	ref    string    // see tipRef
	tip    string    // the branch's commit, in the clone and walked; "" where none is known
	err    error     // what went wrong in the last look; tip is then of an earlier one
	misses int       // failures in a row
	at     time.Time // of the last success
}

// tracking is a service's interest in a branch.
type tracking struct {
	branch, links string // links: see linksKey
	dirs          []dir
	nudge         func()
}

// tried is work that costs much, and is done once an hour unless an operator asks: when it was, and what came
// of it.
type tried struct {
	at  time.Time
	err error
}

// upstream is a repository elsewhere, as its user reaches it, and the clone that serves all services and
// branches of it.
type upstream struct {
	url, user, dir string
	patience       time.Duration // with git's answer to one question
	tracked        []tracking
	network        chan struct{} // a lock, held by who has put something in: for the network, dir and tried
	poke           chan struct{}
	acct           atomic.Pointer[account] // once found, it stays
	git            atomic.Int32            // version of the git program, once asked for
	tried          map[string]tried        // by the name of the work
	reads          crowd                   // of services whose files change at the same time

	mu    sync.Mutex // for all below
	looks map[string]look
	clone *clone
}

// newUpstream returns the upstream of a url and user, whose clone is below stateDir. Nothing is done yet.
func newUpstream(stateDir, url, user string) *upstream {
	u := &upstream{
		url: url, user: user, dir: filepath.Join(stateDir, "upstreams", digest(url, user)),
		patience: 30 * time.Second, network: make(chan struct{}, 1), poke: make(chan struct{}, 1),
		tried: map[string]tried{}, looks: map[string]look{}, reads: crowd{room: make(chan struct{}, 4)},
	}
	u.clone = openClone(u, u.dir)
	return u
}

// track makes the upstream care for a service's branch and links; nudge is called after each round that the
// service should know of, and must not wait. All calls come before run and the first look.
func (u *upstream) track(branch string, dirs []dir, nudge func()) {
	u.tracked = append(u.tracked, tracking{branch, linksKey(dirs), dirs, nudge})
	u.looks[branch] = look{ref: tipRef(branch)}
}

// run looks at upstream for ever: every interval and up to half of it more, sooner while it can't be
// reached, and when damage was found.
func (u *upstream) run(ctx context.Context, interval time.Duration) {
	var backoff time.Duration
	for {
		wait := interval + rand.N(interval/2+1)
		if err := u.lookNow(ctx, false); err != nil {
			backoff = min(max(2*backoff, 5*time.Second), interval)
			wait = backoff
		} else {
			backoff = 0
			u.repack(ctx)
		}

		select {
		case <-time.After(wait):
		case <-u.poke:
		case <-ctx.Done():
			return
		}
	}
}

// lookNow looks at upstream once, fetches what moved and what of it is missing, and returns what went wrong
// with any branch. asked says that an operator wants it: what was tried within the hour is tried again.
func (u *upstream) lookNow(ctx context.Context, asked bool) error {
	// However slowly git works, whose user may stop it and let it go on: who waits must know for how long.
	limited, cancel := context.WithTimeout(ctx, cloneLimit)
	defer cancel()
	if err := u.lockNetwork(limited); err != nil {
		return err
	}
	defer u.unlockNetwork()

	isDue := func(_ string, t tried) bool { return asked || time.Since(t.at) >= time.Hour }
	maps.DeleteFunc(u.tried, isDue)
	remote, err := u.round(limited)
	if ctx.Err() != nil {
		return ctx.Err()
	}

	errs := []error{err}
	u.mu.Lock()
	for branch, l := range u.looks {
		l.err = err
		if err == nil && remote[branch] == "" {
			l.err = fmt.Errorf("upstream has no branch %q", branch)
			errs = append(errs, l.err)
		}
		l.misses++
		if l.err == nil {
			l.misses, l.at = 0, time.Now()
		}
		u.looks[branch] = l
	}
	u.mu.Unlock()

	for _, t := range u.tracked {
		t.nudge()
	}
	return errors.Join(errs...)
}

// lockNetwork waits until the network is ours.
func (u *upstream) lockNetwork(ctx context.Context) error {
	select {
	case u.network <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (u *upstream) unlockNetwork() { <-u.network }

// looked returns what is known of a branch; it never waits for the network.
func (u *upstream) looked(branch string) look {
	u.mu.Lock()
	defer u.mu.Unlock()
	l := u.looks[branch]
	l.tip = u.clone.tips[l.ref]
	return l
}

// ready returns the clone, of which git can be run now that its user's account is known.
func (u *upstream) ready(ctx context.Context) (*clone, error) {
	if u.acct.Load() == nil {
		a, err := lookupAccount(ctx, u.user)
		if err != nil {
			return nil, err
		}
		u.acct.Store(&a)
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.clone, nil
}

// round looks, fetches and heals, and returns upstream's tips of the tracked branches.
func (u *upstream) round(ctx context.Context) (remote map[string]string, err error) {
	if err := u.tidy(ctx); err != nil {
		return nil, err
	}
	var filters *bool
	if isFirst := !lexists(u.dir); isFirst {
		filters = new(bool)
	}
	c, err := u.ready(ctx)
	if err == nil {
		remote, err = u.lsRemote(ctx, filters)
	}
	if err != nil || len(remote) == 0 { // each branch is told to be missing
		return nil, err
	}

	if why := cmp.Or(c.sound(digitsOf(remote)), c.damage()); why != nil {
		return remote, u.heal(ctx, remote, filters, why)
	}
	err = u.advance(ctx, c, remote)
	if errors.As(err, &damaged{}) {
		err = u.heal(ctx, remote, filters, err)
	}
	return remote, err
}

// digitsOf is the length of upstream's ids.
func digitsOf(remote map[string]string) (digits int) {
	for _, id := range remote {
		digits = len(id)
	}
	return digits
}

// fetchOf names the work that it is to fetch these tips, see tried.
func fetchOf(remote map[string]string) string { return "fetch " + fmt.Sprint(remote) }

// advance brings a clone to upstream's tips. What ended at a limit would do so again: it is not tried again
// within the hour, unless upstream moves.
func (u *upstream) advance(ctx context.Context, c *clone, remote map[string]string) error {
	work := fetchOf(remote)
	if t, lately := u.tried[work]; lately {
		return t.err
	}
	err := c.fetchTips(ctx, remote)
	if err == nil {
		err = c.walkTips(ctx, remote)
	}
	if !wentWrong(ctx, err) {
		return err
	}
	if atLimit.MatchString(err.Error()) {
		u.tried[work] = tried{time.Now(), err}
	}
	return err
}

// heal makes the clone anew, but not again within the hour. Commits that ran are lost where upstream has them
// no more. filters says whether upstream does, see lsRemote; nil: it was not asked.
func (u *upstream) heal(ctx context.Context, remote map[string]string, filters *bool, why error) (err error) {
	isFirst, isRefused := !lexists(u.dir), errors.Is(why, errRefused)
	if t, lately := u.tried["heal"]; lately && !isRefused {
		at := t.at.Format("15:04")
		if t.err != nil {
			return fmt.Errorf("no clone could be made at %s (do pull tries now): %w", at, t.err)
		}
		return fmt.Errorf("clone is damaged, and was made anew at %s (do pull tries now): %w", at, why)
	}

	// A limit that was met together with damage says nothing of a clone without it.
	if work := fetchOf(remote); errors.As(u.tried[work].err, &damaged{}) {
		delete(u.tried, work)
	}
	if filters == nil {
		filters = new(bool)
		_, err = u.lsRemote(ctx, filters)
	}
	if err == nil {
		err = u.cloneAnew(ctx, remote, *filters && !isRefused)
	}
	isDamaged := errors.As(err, &damaged{}) // upstream itself may be
	hasHealed := err == nil && !isFirst
	if isDamaged || hasHealed {
		u.tried["heal"] = tried{time.Now(), err}
	}
	switch {
	case hasHealed:
		slog.Warn(fmt.Sprintf("%s: cloned anew", redact(u.url)), "reason", why)
	case !isFirst:
		err = fmt.Errorf("%w; it is to be made anew because %w", err, why)
	}
	return err
}

// cloneAnew makes a clone beside the one that is there, if any, which serves until the new one is complete
// and takes its place.
func (u *upstream) cloneAnew(ctx context.Context, remote map[string]string, filtered bool) error {
	next := openClone(u, u.dir+".new")
	err := next.create(ctx, digitsOf(remote), filtered)
	if err == nil {
		err = u.advance(ctx, next, remote)
	}
	if filtered && errors.Is(err, errRefused) {
		return u.cloneAnew(ctx, remote, false)
	}

	if err == nil {
		err = u.replace(next)
	}
	if err != nil {
		_ = removeTree(ctx, next.dir)
		return err
	}
	return u.tidy(ctx)
}

// replace puts a complete clone in our clone's place.
func (u *upstream) replace(next *clone) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	if lexists(u.dir) {
		if err := os.Rename(u.dir, u.dir+".old"); err != nil {
			return err
		}
	}
	if err := os.Rename(next.dir, u.dir); err != nil {
		return err
	}
	next.dir, u.clone = u.dir, next
	for r := next.spareReader(); r != nil; r = next.spareReader() {
		r.end() // it would look for what comes later in the directory of before
	}
	return syncDir(filepath.Dir(u.dir))
}

// fetchMissing makes sure that all blobs of t are in the clone: no network where they are, and no program
// where t is of a tip.
func (u *upstream) fetchMissing(ctx context.Context, t tree) error {
	c, err := u.ready(ctx)
	if err != nil {
		return err
	}
	isOfTip := func(w walked) bool { return maps.Equal(w.tree, t) }
	u.mu.Lock()
	known := slices.ContainsFunc(slices.Collect(maps.Values(c.walks)), isOfTip)
	u.mu.Unlock()
	if known {
		return nil
	}

	ctx, cancel := context.WithTimeout(ctx, missingLimit)
	defer cancel()
	blobs := map[string]bool{}
	t.blobs(blobs)
	lacks, err := c.missing(ctx, blobs)
	if lacks != nil {
		if err = u.lockNetwork(ctx); err != nil {
			return err
		}
		defer u.unlockNetwork()
		err = c.fetchBlobs(ctx, lacks)
	}
	if errors.As(err, &damaged{}) {
		c.noteDamage(err) // the next look mends it
	}
	return err
}

// networkGit makes a git that may use the network, and knows upstream as origin. gitDir may be empty.
func (u *upstream) networkGit(gitDir string, args ...string) *exec.Cmd {
	env := []string{
		"GIT_ALLOW_PROTOCOL=https:http:ssh:git:file",
		"GIT_CONFIG_PARAMETERS=" + configParameters(u.url),
	}
	return gitCommand(*u.acct.Load(), gitDir, env, args...)
}

// hints are our ways out of what git, ssh or curl say; ~ is the home of the user that git runs as.
var hints = []struct {
	words *regexp.Regexp
	hint  string
}{
	{regexp.MustCompile(`could not read (Username|Password)|returned error: 40[13]`),
		"the server wants another login: look at its line in ~/.netrc, or at the URL"},
	{regexp.MustCompile(`repository '.*' not found|Repository not found`),
		"there is no such repository, or not for this login"},
	{regexp.MustCompile(`Permission denied \(|Too many authentication failures`),
		"the server accepts none of the keys in ~/.ssh: give it the public one, as a deploy key"},
	{regexp.MustCompile(`[Hh]ost key for .* has changed`),
		"if that is meant, put the server's new key into ~/.ssh/known_hosts; else somebody is in between"},
	{regexp.MustCompile(`Host key verification failed`),
		"the server's key is not in ~/.ssh/known_hosts: ssh-keyscan, and compare its fingerprint"},
	{regexp.MustCompile(`dubious ownership`), "give the repository to the user that git runs as"},
	{regexp.MustCompile(`(certificate|server) verification failed|SSL certificate problem`),
		"name the CA's file in GIT_SSL_CAINFO in our environment, if it is one of your own"},
	{regexp.MustCompile(`signal 25|File too large`),
		"that would take more than half of what is free on the disk of the clones: make room there"},
	{regexp.MustCompile(`Problem with the SSL CA cert|error (setting|reading|adding) .*(cert|trust)`),
		"GIT_SSL_CAINFO must name a file that the user that git runs as can read"},
}

// hintFor returns the way out of what was said to a user with that home, "" where we know none.
func hintFor(said, home string) string {
	for _, h := range hints {
		if h.words.MatchString(said) {
			return ": " + strings.ReplaceAll(h.hint, "~", home)
		}
	}
	return ""
}

// runNetworkGit runs a git that may use the network. Our hint stands beside its own words.
func (u *upstream) runNetworkGit(ctx context.Context, cmd *exec.Cmd, verb string, limit time.Duration,
	fileSize uint64) ([]byte, error) {
	out, err := runGit(ctx, verb+" "+redact(u.url), cmd, limit, fileSize)
	if err != nil {
		err = fmt.Errorf("%w%s", err, hintFor(err.Error(), u.acct.Load().home))
	}
	return out, err
}

var webURL = regexp.MustCompile(`^(https?://)([^/@:]*:[^/]*)@([^/?#]*)`)

// configParameters is how git -c hands settings on to git's children: 'key=value' 'key=value', which stands
// in no argument list. A password in an http URL becomes a header, or git would put it into its child's
// argument list.
func configParameters(upstream string) string {
	settings := []string{"remote.origin.url=" + upstream}
	if m := webURL.FindStringSubmatch(upstream); m != nil {
		host, login := m[1]+m[3], m[2]
		if plain, err := url.PathUnescape(login); err == nil {
			login = plain
		}
		basic := base64.StdEncoding.EncodeToString([]byte(login))
		settings = []string{
			"remote.origin.url=" + host + strings.TrimPrefix(upstream, m[0]),
			"http." + host + "/.extraHeader=Authorization: Basic " + basic,
		}
	}
	quoted := strings.NewReplacer("'", `'\''`, "!", `'\!'`).Replace(strings.Join(settings, "\x00"))
	return "'" + strings.ReplaceAll(quoted, "\x00", "' '") + "'"
}

// lsRemote asks upstream once for the commits of all tracked branches. A branch that isn't there is not in
// the result. Where filters is not nil it is told whether upstream leaves out contents at a fetch, and hands
// out single objects later, from what it says of itself: fetch=shallow filter (protocol 2), or a list behind
// the first ref (protocol 0). A web server that knows nothing of git says nothing.
func (u *upstream) lsRemote(ctx context.Context, filters *bool) (map[string]string, error) {
	args := []string{"ls-remote", "-q", "--heads", "origin"} // else all tags and pull requests are listed
	for _, branch := range slices.Sorted(maps.Keys(u.looks)) {
		args = append(args, "refs/heads/"+branch)
	}
	cmd := u.networkGit("", args...)
	if filters != nil {
		f, err := os.CreateTemp("", "gitopper")
		if err != nil {
			return nil, err
		}
		defer f.Close()
		defer os.Remove(f.Name())
		cmd.Env = append(cmd.Env, "GIT_TRACE_PACKET=3")
		cmd.ExtraFiles = []*os.File{f}
		defer func() {
			start, _ := io.ReadAll(io.NewSectionReader(f, 0, 64<<10))
			*filters = offers.Match(start)
		}()
	}
	out, err := u.runNetworkGit(ctx, cmd, "ls-remote", lookLimit, maxObject)
	if err != nil {
		return nil, err
	}

	tips := map[string]string{}
	for line := range strings.Lines(string(out)) { // 606eb576...<tab>refs/heads/main
		id, ref, _ := strings.Cut(strings.TrimSpace(line), "\t")
		branch, ok := strings.CutPrefix(ref, "refs/heads/")
		if _, tracked := u.looks[branch]; ok && tracked && isHash(id) {
			tips[branch] = id
		}
	}
	return tips, nil
}

var offers = regexp.MustCompile(`< fetch=(.* )?filter\s` +
	`|\\0.*allow-any-sha1-in-want.* filter\s|\\0(.* )?filter .*allow-any-sha1-in-want`)

// retireUpstreams removes the clones below stateDir that are of no upstream in use.
func retireUpstreams(ctx context.Context, stateDir string, inUse []*upstream) {
	names, _ := filepath.Glob(filepath.Join(stateDir, "upstreams", "*"))
	for _, name := range names {
		if slices.ContainsFunc(inUse, func(u *upstream) bool { return strings.HasPrefix(name, u.dir) }) {
			continue
		}
		if err := removeTree(ctx, name); wentWrong(ctx, err) {
			slog.Warn(fmt.Sprintf("remove a clone that no service uses: %v", err))
		}
	}
}
