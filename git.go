//go:build linux

package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
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
	healEvery    = time.Hour
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
	p := program{name: "git " + verb, cmd: cmd, limit: limit, memory: gitMemory, sacrifice: true}
	if len(fileSize) > 0 {
		p.fileSize = fileSize[0]
	}
	out, err := execute(ctx, p)

	exit := (*exec.ExitError)(nil)
	answer := errors.As(err, &exit) && exit.ExitCode() == 1 // files differ, no such commit
	if err != nil && ctx.Err() == nil && !answer {
		count.add("gitopper_machine_git_errors_total", "")
	}
	return out, err
}

// gitVersion returns an error if there is no git program, or one older than 2.30.
func gitVersion(ctx context.Context) error {
	cmd := gitCommand(account{uid: os.Getuid()}, "", nil, "--version")
	out, err := runGit(ctx, "--version", cmd, localLimit)
	if err != nil {
		return fmt.Errorf("git is needed, 2.30 or newer: %w", err)
	}
	var major, minor int
	if _, err := fmt.Sscanf(string(out), "git version %d.%d", &major, &minor); err != nil {
		return fmt.Errorf("git --version says %q", strings.TrimSpace(string(out)))
	}
	if major < 2 || major == 2 && minor < 30 {
		return fmt.Errorf("git %d.%d is too old: 2.30 or newer is needed", major, minor)
	}
	return nil
}

// look is the outcome of a look at one branch of an upstream, and of the fetch that followed it.
type look struct {
	tip    string    // the branch's commit, in the clone and walked; "" where none is known
	err    error     // what went wrong in the last look; tip is then of an earlier one
	misses int       // failures in a row
	at     time.Time // of the last success
}

// tracking is a service's interest in a branch.
type tracking struct {
	branch, key string // key: of dirs, see linksKey
	dirs        []dir
	nudge       func()
}

// upstream is one bare clone per url and user, for all services and branches. It lies in dir: fetch and read
// are skeletons of root's (HEAD, config, refs), through which git reaches the network and reads; objects is
// the user's, who runs git.
type upstream struct {
	url, user, dir string
	patience       time.Duration // with git's answer to one question
	tracked        []tracking
	network        chan struct{} // a lock, held by who has put something in: for the network and dir
	poke           chan struct{}
	acct           atomic.Pointer[account] // once found, it stays

	// These belong to whoever holds network.
	healed time.Time
	packed time.Time
	spent  struct { // what ended at a limit on memory or the size of files
		tips string
		at   time.Time
		err  error
	}

	mu    sync.Mutex // for all below
	looks map[string]look
	tips  map[shownAt]showing // what services are shown of the tips
	ran   map[string][]string // by service: what keep was told
	hurt  *error              // damage that was found in this clone; a new one has its own
}

// newUpstream returns the upstream of a url and user, whose clone is below stateDir. Nothing is done yet.
func newUpstream(stateDir, url, user string) *upstream {
	return &upstream{
		url: url, user: user, dir: filepath.Join(stateDir, "upstreams", digest(url, user)),
		patience: 30 * time.Second, network: make(chan struct{}, 1), poke: make(chan struct{}, 1),
		looks: map[string]look{}, tips: map[shownAt]showing{}, ran: map[string][]string{},
		hurt: new(error),
	}
}

// track makes the upstream care for a service's branch and links; nudge is called after each round that the
// service should know of, and must not wait. All calls come before run and the first look.
func (u *upstream) track(branch string, dirs []dir, nudge func()) {
	u.tracked = append(u.tracked, tracking{branch, linksKey(dirs), dirs, nudge})
	u.looks[branch] = look{tip: readRef(u.tipFile(branch))}
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
			u.pack(ctx)
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
// with any branch. heal says that what lately failed for good reason is to be tried again: a damaged clone
// is made anew even if that was done within the hour, a fetch that ended at a limit even if nothing has
// moved.
func (u *upstream) lookNow(ctx context.Context, heal bool) error {
	// However slowly git works, whose user may stop it and let it go on: who waits must know for how long.
	limited, cancel := context.WithTimeout(ctx, cloneLimit)
	defer cancel()
	if err := u.take(limited); err != nil {
		return err
	}
	defer func() { <-u.network }()
	remote, err := u.round(limited, heal)
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

// take waits until the network is ours.
func (u *upstream) take(ctx context.Context) error {
	select {
	case u.network <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// looked returns what is known of a branch; it never waits for the network.
func (u *upstream) looked(branch string) look {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.looks[branch]
}

func (u *upstream) account(ctx context.Context) (account, error) {
	if a := u.acct.Load(); a != nil {
		return *a, nil
	}
	a, err := lookupAccount(ctx, u.user)
	if err == nil {
		u.acct.Store(&a)
	}
	return a, err
}

// hurts notes damage that was found in the clone whose hurt this is, for the next look, which is soon.
func (u *upstream) hurts(hurt *error, err error) {
	u.mu.Lock()
	*hurt = err
	u.mu.Unlock()
	select {
	case u.poke <- struct{}{}:
	default:
	}
}

// forget makes the next look check that all that the tips show is there.
func (u *upstream) forget() {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.tips = map[shownAt]showing{}
}

// round looks, fetches and heals, and returns upstream's tips of the tracked branches.
func (u *upstream) round(ctx context.Context, heal bool) (remote map[string]string, err error) {
	a, err := u.account(ctx)
	if err != nil {
		return nil, err
	}
	if err := u.tidy(ctx); err != nil {
		return nil, err
	}
	if remote, err = u.ask(ctx, a); err != nil {
		return nil, err
	}
	u.mu.Lock()
	why := *u.hurt
	u.mu.Unlock()
	if err := u.sound(a, hashDigits(remote)); err != nil {
		why = err
	}
	if why == nil {
		why = u.update(ctx, a, remote, heal)
		if !errors.As(why, &damaged{}) {
			return remote, why
		}
	}
	recently := time.Since(u.healed) < healEvery
	if recently && !heal && !errors.Is(why, errRefused) {
		at := u.healed.Format("15:04")
		return nil, fmt.Errorf("clone is damaged, and was made anew at %s (do pull tries now): %w", at, why)
	}
	return remote, u.clone(ctx, a, remote, why, heal)
}

// reader makes a git that reads the clone's objects, and knows of no upstream.
func (u *upstream) reader(a account, args ...string) *exec.Cmd {
	return gitCommand(a, u.dir+"/read", []string{"GIT_OBJECT_DIRECTORY=" + u.objectsDir()}, args...)
}

// reach makes a git that may use the network, and knows upstream as origin. gitDir is empty, or the skeleton
// fetch.
func (u *upstream) reach(a account, gitDir string, args ...string) *exec.Cmd {
	env := []string{
		"GIT_ALLOW_PROTOCOL=https:http:ssh:git:file",
		"GIT_CONFIG_PARAMETERS=" + configParameters(u.url),
	}
	if gitDir != "" {
		env = append(env, "GIT_OBJECT_DIRECTORY="+u.objectsDir())
	}
	return gitCommand(a, gitDir, env, args...)
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
	{regexp.MustCompile(`Permission denied \(`),
		"the server accepts none of the keys in ~/.ssh: give it the public one, as a deploy key"},
	{regexp.MustCompile(`Host key for .* has changed`),
		"if that is meant, put the server's new key into ~/.ssh/known_hosts; else somebody is in between"},
	{regexp.MustCompile(`Host key verification failed`),
		"the server's key is not in ~/.ssh/known_hosts: ssh-keyscan, and compare its fingerprint"},
	{regexp.MustCompile(`dubious ownership`), "give the repository to the user that git runs as"},
	{regexp.MustCompile(`certificate verification failed|SSL certificate problem`),
		"name the CA's file in GIT_SSL_CAINFO in our environment, if it is one of your own"},
	{regexp.MustCompile(`Problem with the SSL CA cert|error (setting|reading|adding) .*(cert|trust)`),
		"GIT_SSL_CAINFO must name a file that the user that git runs as can read"},
}

// online runs a git that may use the network. Our hint stands beside its own words.
func (u *upstream) online(ctx context.Context, a account, verb string, cmd *exec.Cmd, limit time.Duration,
	fileSize ...uint64) ([]byte, error) {
	out, err := runGit(ctx, verb+" "+redact(u.url), cmd, limit, fileSize...)
	for _, h := range hints {
		if err != nil && h.words.MatchString(err.Error()) {
			return out, fmt.Errorf("%w: %s", err, strings.ReplaceAll(h.hint, "~", a.home))
		}
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

// ask asks upstream once for the commits of all tracked branches. A branch that isn't there is not in the
// result.
func (u *upstream) ask(ctx context.Context, a account) (map[string]string, error) {
	args := []string{"ls-remote", "-q", "origin"}
	for branch := range u.looks {
		args = append(args, "refs/heads/"+branch)
	}
	slices.Sort(args[3:])
	out, err := u.online(ctx, a, "ls-remote", u.reach(a, "", args...), lookLimit)
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

var (
	// errRefused says that a server that can filter does not hand out single objects.
	errRefused = errors.New("upstream refuses single objects")
	refusing   = regexp.MustCompile(`unadvertised object|not our ref`)
	// incomplete is what git says of a damaged pack in the clone, too: it does not replace one that upstream
	// sends again.
	incomplete = regexp.MustCompile(
		`did not send all necessary objects|could not fetch \w+ from promisor remote`)
	shallow = regexp.MustCompile(`shallow roots are not allowed|/shallow_`)
	atLimit = regexp.MustCompile(
		`signal 25|[Oo]ut of memory|File too large|Cannot allocate|async thread|invalid index-pack`)
)

// fetch runs git fetch with the arguments.
func (u *upstream) fetch(ctx context.Context, a account, limit time.Duration, stdin []byte, args ...string) (
	err error) {
	var disk syscall.Statfs_t
	if err := syscall.Statfs(u.dir, &disk); err != nil {
		return fmt.Errorf("statfs %s: %w", u.dir, err)
	}
	fixed := []string{"fetch", "-q", "--no-tags", "--no-write-fetch-head", "--recurse-submodules=no"}
	args = append(fixed, args...)
	if stdin != nil {
		args = append([]string{"-c", "fetch.negotiationAlgorithm=noop"}, args...)
	}
	cmd := u.reach(a, u.dir+"/fetch", args...)
	words := &tail{}
	cmd.Stdin, cmd.Stdout = bytes.NewReader(stdin), words // a shallow upstream is only a warning
	half := max(1<<20, disk.Bavail*uint64(disk.Bsize)/2)
	_, err = u.online(ctx, a, "fetch", cmd, limit, half)

	switch said := words.buf; {
	case shallow.Match(said):
		return errors.New("upstream is shallow: git fetch --unshallow there")
	case err != nil && incomplete.Match(said), crashed(err):
		return damaged{err}
	case err != nil && stdin != nil && refusing.Match(said):
		return damaged{fmt.Errorf("%w: %w", errRefused, err)}
	}
	return err
}

// update brings the clone to upstream's tips: what moved is fetched, walked, and what of it is missing is
// fetched. Only then are the tips written and known. What ended at a limit does so again, until upstream
// moves or an hour has passed.
func (u *upstream) update(ctx context.Context, a account, remote map[string]string, again bool) error {
	tips := digest(fmt.Sprint(remote))
	if u.spent.tips == tips && time.Since(u.spent.at) < healEvery && !again {
		return u.spent.err
	}
	u.spent.tips = ""
	err := u.fetchTips(ctx, a, remote)
	if err == nil {
		err = u.advance(ctx, a, remote)
	}
	if err != nil && ctx.Err() == nil && atLimit.MatchString(err.Error()) {
		u.spent.tips, u.spent.at, u.spent.err = tips, time.Now(), err
	}
	return err
}

// fetchTips fetches the branches that moved, and tells a failure of the network's from damage in the clone.
func (u *upstream) fetchTips(ctx context.Context, a account, remote map[string]string) error {
	var refs []string
	// Small contents come along, which saves a second request, but not with all of history.
	limit, filter := cloneLimit, "--filter=blob:none"
	for branch, l := range u.looks {
		if l.tip != "" {
			limit, filter = fetchLimit, "--filter=blob:limit=100k"
		}
		if tip := remote[branch]; tip != "" && tip != l.tip {
			refs = append(refs, "refs/heads/"+branch)
		}
	}
	if refs == nil {
		return nil
	}
	slices.Sort(refs)
	args := append([]string{filter, "origin"}, refs...)
	if !u.filtered() {
		args = args[1:]
	}
	err := u.fetch(ctx, a, limit, nil, args...)
	if err == nil || ctx.Err() != nil {
		return err
	}
	return errors.Join(err, u.probe(ctx, a))
}

// advance walks the commits that are news, fetches what is missing of what services are shown of them, and
// makes them known.
func (u *upstream) advance(ctx context.Context, a account, remote map[string]string) error {
	tips := map[string]string{}
	for branch, l := range u.looks {
		tips[branch] = cmp.Or(remote[branch], l.tip)
	}
	shown, ids, err := u.see(ctx, a, tips)
	if err != nil {
		return err
	}
	lacks, err := u.missing(ctx, a, ids)
	if err == nil {
		err = u.bring(ctx, a, lacks)
	}
	if err != nil {
		return err
	}

	for branch, tip := range tips {
		if tip == u.looks[branch].tip {
			continue
		}
		if err := u.write("/fetch/refs/tips/"+digest(branch), tip+"\n"); err != nil {
			return err
		}
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	u.tips = shown
	for branch, l := range u.looks {
		l.tip = tips[branch]
		u.looks[branch] = l
	}
	return nil
}
