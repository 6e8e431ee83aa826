//go:build linux

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"time"
)

// clone is a bare clone on disk, root's but for its objects, which are the user's who runs git. Its config
// knows of no upstream, so that what reads in it never fetches. Nothing in it is ever removed but with all of
// it: what ran here can go live again when upstream has it no more.
type clone struct {
	u   *upstream
	dir string

	// These are guarded by the upstream's mutex, once it has this clone.
	tips  map[string]string  // upstream's branches, by tipRef: commits that are here and were walked
	walks map[walkKey]walked // of the tips, for all services
	hurt  error              // damage that was found, for the next look

	filter string // of fetches after the first, see fetchTips

	spare chan *reader // that were given back
}

// What upstream is asked to leave out, see git-rev-list(1): blobs, or large ones.
const (
	noBlobs    = "--filter=blob:none"
	smallBlobs = "--filter=blob:limit=100k"
)

// damaged says that the clone lacks an object that it should have, or has a wrong one in its place.
type damaged struct{ error }

func (d damaged) Unwrap() error { return d.error }

// errMissing says that git has no object of that id.
var errMissing = errors.New("is not in the clone")

// objectsDir is the directory of the clone's objects, for info/alternates.
func (u *upstream) objectsDir() string { return u.dir + "/objects" }

// tipRef is the ref of a branch's commit in the clone.
func tipRef(branch string) string { return "refs/tips/" + digest(branch) }

// openClone returns the clone in a directory, where there may be none yet.
func openClone(u *upstream, dir string) *clone {
	c := &clone{
		u: u, dir: dir, tips: map[string]string{}, walks: map[walkKey]walked{}, filter: smallBlobs,
		spare: make(chan *reader, 4),
	}

	refs, _ := os.ReadFile(dir + "/packed-refs")
	for line := range strings.Lines(string(refs)) { // 606eb576... refs/tips/54f1cf40...
		id, ref, _ := strings.Cut(strings.TrimSuffix(line, "\n"), " ")
		if isHash(id) {
			c.tips[ref] = id
		}
	}
	return c
}

// refsText is what packed-refs holds of tips.
func refsText(tips map[string]string) string {
	var b strings.Builder
	for _, ref := range slices.Sorted(maps.Keys(tips)) {
		fmt.Fprintf(&b, "%s %s\n", tips[ref], ref)
	}
	return b.String()
}

// damage returns what was found wrong with the clone.
func (c *clone) damage() error {
	c.u.mu.Lock()
	defer c.u.mu.Unlock()
	return c.hurt
}

// noteDamage notes it for the next look, which is soon.
func (c *clone) noteDamage(err error) {
	c.u.mu.Lock()
	c.hurt = err
	c.u.mu.Unlock()
	select {
	case c.u.poke <- struct{}{}:
	default:
	}
}

// forget makes the next look check that all that the tips show is there.
func (c *clone) forget() {
	c.u.mu.Lock()
	defer c.u.mu.Unlock()
	c.walks = map[walkKey]walked{}
}

// git makes a git that works in the clone, and knows of no upstream.
func (c *clone) git(args ...string) *exec.Cmd {
	return gitCommand(*c.u.acct.Load(), c.dir, nil, args...)
}

// tidy removes what a killed git, or a killed heal, left behind.
func (u *upstream) tidy(ctx context.Context) error {
	old := u.dir + ".old"
	if !lexists(u.dir) && lexists(old) { // killed between two renames
		if err := os.Rename(old, u.dir); err != nil {
			return err
		}
		u.mu.Lock()
		u.clone = openClone(u, u.dir)
		u.mu.Unlock()
	}
	for _, name := range []string{old, u.dir + ".new"} {
		if err := removeTree(ctx, name); err != nil { // its user may refill it
			slog.Warn(fmt.Sprintf("%s: a clone of before stays: %v", redact(u.url), err))
		}
	}

	u.inObjects("pack", func(root *os.Root, name string) {
		if strings.HasPrefix(name, "tmp_") {
			_ = root.Remove("pack/" + name)
		}
	})

	for _, pattern := range []string{"/*.lock", "/shallow*", "/*.new"} {
		names, _ := filepath.Glob(u.dir + pattern)
		for _, name := range names {
			if err := os.RemoveAll(name); err != nil {
				return err
			}
		}
	}
	return nil
}

// inObjects calls do for names in a directory of the user's below objects, of which there may be none, or
// very many. What is wrong with it git says.
func (u *upstream) inObjects(name string, do func(root *os.Root, name string)) {
	root, err := os.OpenRoot(u.objectsDir())
	if err != nil {
		return
	}
	defer root.Close()

	d, err := root.OpenFile(name, os.O_RDONLY|syscall.O_DIRECTORY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if err != nil {
		return
	}
	defer d.Close()

	names, _ := d.Readdirnames(treeEntries)
	for _, name := range names {
		do(root, name)
	}
}

const (
	unbornHead     = "ref: refs/heads/none\n"
	filteredConfig = "[gitopper]\n\tfiltered = true\n" // git knows no such section
)

// part is a directory or a file of a clone: what it is to be.
type part struct {
	name string // below the clone's directory
	mode os.FileMode
	uid  int
	text string // of a file
}

// parts returns all of a clone that root makes, in order, for ids of so many digits.
func (c *clone) parts(digits int, filtered bool) []part {
	config := "[core]\n\trepositoryformatversion = 1\n\tbare = true\n"
	if digits == 64 {
		config += "[extensions]\n\tobjectFormat = sha256\n"
	}
	if filtered {
		config += filteredConfig
	}

	const open, plain = os.ModeDir | 0o755, 0o644
	uid := os.Geteuid()
	return []part{
		{"", open, uid, ""}, {"/refs", open, uid, ""},
		{"/objects", os.ModeDir | 0o700, c.u.acct.Load().uid, ""},
		{"/HEAD", plain, uid, unbornHead}, {"/config", plain, uid, config},
		{"/packed-refs", plain, uid, refsText(c.tips)},
	}
}

// create makes an empty clone.
func (c *clone) create(ctx context.Context, digits int, filtered bool) error {
	parent := filepath.Dir(c.dir)
	if err := os.MkdirAll(parent, 0o711); err != nil {
		return err
	}
	err := errors.Join(os.Chmod(parent, 0o711), removeTree(ctx, c.dir)) // 0711 whatever the umask

	for _, p := range c.parts(digits, filtered) {
		name := c.dir + p.name
		switch {
		case err != nil:
			return err
		case p.mode.IsDir():
			err = errors.Join(os.Mkdir(name, 0o700), os.Chmod(name, p.mode))
		default:
			err = replaceFile(name, []byte(p.text), p.mode)
		}
	}

	a := c.u.acct.Load()
	return errors.Join(err, os.Lchown(c.dir+"/objects", a.uid, a.gid))
}

// filtered says whether the clone leaves out contents until they are asked for.
func (c *clone) filtered() bool {
	config, _ := os.ReadFile(c.dir + "/config")
	return bytes.HasSuffix(config, []byte(filteredConfig))
}

// settings tell git that what a filtered clone lacks is with upstream; see git-partial-clone(7).
func (c *clone) settings() []string {
	if !c.filtered() {
		return nil
	}
	return []string{"-c", "remote.origin.promisor=true", "-c", "remote.origin.partialclonefilter=blob:none"}
}

// sound returns an error unless all parts of the clone are there as we made them for ids of so many digits.
func (c *clone) sound(digits int) error {
	for _, p := range c.parts(digits, c.filtered()) {
		name, text := c.dir+p.name, ""
		fi, err := os.Lstat(name)
		if err == nil && fi.Mode().IsRegular() {
			var data []byte
			data, err = os.ReadFile(name)
			text = string(data)
		}
		if err != nil {
			return damaged{err}
		}

		uid := int(fi.Sys().(*syscall.Stat_t).Uid)
		if (part{p.name, fi.Mode() &^ os.ModeSetgid, uid, text}) != p {
			return damaged{fmt.Errorf("%s is not as we made it: %v of user %d", name, fi.Mode(), uid)}
		}
	}
	return nil
}

// repack puts what many small fetches brought into one pack.
func (u *upstream) repack(ctx context.Context) {
	packs, loose := 0, 0
	u.inObjects("pack", func(_ *os.Root, name string) {
		if strings.HasSuffix(name, ".pack") {
			packs++
		}
	})
	// One directory of 256 tells, as in git gc --auto.
	u.inObjects("17", func(*os.Root, string) { loose += 256 })

	isTidy := packs <= 50 && loose <= 2000
	if isTidy || u.lockNetwork(ctx) != nil {
		return
	}
	defer u.unlockNetwork()

	c, err := u.ready(ctx)
	if _, lately := u.tried["repack"]; lately || err != nil {
		return
	}

	args := append(c.settings(), "repack", "-a", "-d", "-n", "-q")
	if !c.filtered() {
		args = append(args, "--keep-unreachable") // of a promisor's objects git keeps all
	}
	_, err = runGit(ctx, "repack", c.git(args...), fetchLimit)
	u.tried["repack"] = tried{time.Now(), err}
	if wentWrong(ctx, err) {
		slog.Warn(fmt.Sprintf("%s: %v", redact(u.url), err))
	}
}

// probe returns an error if a tip that should be in the clone is not, or a commit that it descends from,
// without which git can't fetch.
func (c *clone) probe(ctx context.Context) error {
	if len(c.tips) == 0 {
		return nil
	}

	args := slices.AppendSeq([]string{"rev-list", "--quiet"}, maps.Values(c.tips))
	_, err := runGit(ctx, "rev-list", c.git(args...), fetchLimit)
	if err = orDamaged(err); errors.As(err, &damaged{}) {
		return err
	}
	return nil
}

// orDamaged returns the error of a git that had nothing to do but to read the clone: damage, where git ended
// by itself.
func orDamaged(err error) error {
	if exitCode(err) == 128 || crashed(err) {
		return damaged{err}
	}
	return err
}

// crashed says that git was ended by what it read: it maps packs, and one that was cut off is a SIGBUS or
// worse.
func crashed(err error) bool {
	exit, ok := errors.AsType[*exec.ExitError](err)
	if !ok {
		return false
	}
	status, _ := exit.Sys().(syscall.WaitStatus)
	crashes := []syscall.Signal{syscall.SIGSEGV, syscall.SIGBUS, syscall.SIGABRT}
	return slices.Contains(crashes, status.Signal())
}

var (
	// errRefused says that a server that can filter does not hand out single objects.
	errRefused = errors.New("upstream refuses single objects")
	// errNoTip says that a server does not hand out a commit that it named as a branch's a moment ago.
	errNoTip = errors.New("upstream refuses that commit")
	refusing = regexp.MustCompile(`unadvertised object|not our ref|want \w+ not valid`) // the last: JGit
	// incomplete is what git says of a damaged pack in the clone, too: it does not replace one that upstream
	// sends again, or tells that they differ.
	incomplete = regexp.MustCompile(
		`did not send all necessary objects|could not fetch \w+ from promisor remote|differ in contents`)
	shallow = regexp.MustCompile(`shallow roots are not allowed|/shallow_`)
	atLimit = regexp.MustCompile(
		`signal 25|[Oo]ut of memory|File too large|Cannot allocate|async thread|invalid index-pack`)
)

// ownWords are git's without what it hands on of upstream's, which may be of damage there.
func ownWords(said []byte) (own []byte) {
	for line := range bytes.Lines(said) {
		if !bytes.HasPrefix(line, []byte("remote: ")) {
			own = append(own, line...)
		}
	}
	return own
}

// fetch runs git fetch, and tells a failure of the network's from damage in the clone.
func (c *clone) fetch(ctx context.Context, limit time.Duration, stdin []byte, args ...string) error {
	var disk syscall.Statfs_t
	if err := syscall.Statfs(c.dir, &disk); err != nil {
		return fmt.Errorf("statfs %s: %w", c.dir, err)
	}
	half := max(1<<20, disk.Bavail*uint64(disk.Bsize)/2)

	fixed := c.settings()
	if stdin != nil {
		fixed = append(fixed, "-c", "fetch.negotiationAlgorithm=noop")
	}
	fixed = append(fixed, "fetch", "-q", "--no-tags", "--no-write-fetch-head", "--recurse-submodules=no")

	cmd := c.u.networkGit(c.dir, append(fixed, args...)...)
	words := &tail{}
	cmd.Stdin, cmd.Stdout = bytes.NewReader(stdin), words // a shallow upstream is only a warning
	_, err := c.u.runNetworkGit(ctx, cmd, "fetch", limit, half)

	// fatal: packed object 606eb57... (stored in /var/lib/gitopper/upstreams/...) is corrupt
	own := ownWords(words.buf)
	isCorrupt := bytes.Contains(own, []byte("(stored in "+c.dir+"/"))
	switch said := words.buf; {
	case shallow.Match(said):
		return errors.New("upstream is shallow: git fetch --unshallow there")
	case err == nil, ctx.Err() != nil:
		return err
	case isCorrupt, incomplete.Match(own), crashed(err):
		return damaged{err}
	case exitCode(err) <= 0, !refusing.Match(own): // what a limit has ended is not refused
	case stdin != nil:
		return damaged{fmt.Errorf("%w: %w", errRefused, err)}
	default:
		return fmt.Errorf("%w: %w", errNoTip, err)
	}
	return errors.Join(err, c.probe(ctx))
}

// fetchTips fetches the branches that moved. Small contents come along, which saves a second request, but not
// with all of history, and not from a server that sends what changed elsewhere as a difference from a content
// that was never here, which git would have to fetch: from then on none come along.
func (c *clone) fetchTips(ctx context.Context, remote map[string]string) error {
	limit, args := fetchLimit, []string{c.leavesOut(), "origin"}
	if len(c.tips) == 0 {
		limit = cloneLimit
	}
	args = slices.DeleteFunc(args, func(a string) bool { return a == "" })

	var ids, refs []string
	for _, branch := range slices.Sorted(maps.Keys(remote)) {
		if remote[branch] != c.tips[tipRef(branch)] {
			ids, refs = append(ids, remote[branch]), append(refs, "refs/heads/"+branch)
		}
	}
	if len(ids) == 0 {
		return nil
	}

	// Where commits are asked for upstream need not list its branches once more. Git takes one that is named
	// twice for two.
	slices.Sort(ids)
	err := c.fetch(ctx, limit, nil, append(args, slices.Compact(ids)...)...)
	if errors.Is(err, errNoTip) { // the branch has moved
		err = c.fetch(ctx, limit, nil, append(args, refs...)...)
	}
	if args[0] == smallBlobs && errors.As(err, &damaged{}) {
		c.filter, args[0] = noBlobs, noBlobs
		err = c.fetch(ctx, limit, nil, append(args, refs...)...)
	}
	return err
}

// leavesOut is what fetchTips asks upstream to leave out; "": nothing.
func (c *clone) leavesOut() string {
	switch {
	case !c.filtered():
		return ""
	case len(c.tips) == 0:
		return noBlobs
	}
	return c.filter
}

// missing asks the clone which blobs it lacks, without network; a line each.
func (c *clone) missing(ctx context.Context, ids map[string]bool) (lacks []byte, err error) {
	if len(ids) == 0 {
		return nil, nil
	}

	cmd := c.git("cat-file", "--batch-check=%(objectname)")
	cmd.Stdin = bytes.NewReader(idLines(ids))
	out, err := runGit(ctx, "cat-file", cmd, fetchLimit)
	if err != nil {
		return nil, orDamaged(err)
	}

	for line := range strings.Lines(string(out)) { // 606eb576..., or 606eb576... missing
		id, is := strings.CutSuffix(line, " missing\n")
		if is && ids[id] {
			lacks = append(lacks, id+"\n"...)
		}
	}
	return lacks, nil
}

// fetchBlobs fetches the blobs that the clone lacks, in one request.
func (c *clone) fetchBlobs(ctx context.Context, lacks []byte) error {
	switch {
	case lacks == nil:
		return nil
	case !c.filtered():
		return damaged{fmt.Errorf("blob %.12s %w", lacks, errMissing)}
	}
	return c.fetch(ctx, fetchLimit, lacks, noBlobs, "--stdin", "origin")
}

// isHash says whether s is the full id of an object, SHA-1 or SHA-256.
func isHash(s string) bool {
	known := slices.Contains([]int{40, 64}, len(s)) // digits
	return known && strings.Trim(s, "0123456789abcdef") == ""
}
