//go:build linux

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
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

// objectsDir is the directory of the clone's objects, for info/alternates.
func (u *upstream) objectsDir() string { return u.dir + "/objects" }

func (u *upstream) tipFile(branch string) string { return u.dir + "/fetch/refs/tips/" + digest(branch) }

// readRef returns the id in a ref's file, "" where there is none.
func readRef(name string) string {
	data, err := os.ReadFile(name)
	id := strings.TrimSpace(string(data))
	if err != nil || !isHash(id) {
		return ""
	}
	return id
}

// tidy removes what a killed git, or a killed heal, left behind.
func (u *upstream) tidy(ctx context.Context) error {
	old := u.dir + ".old"
	if !lexists(u.dir) && lexists(old) { // killed between two renames
		if err := os.Rename(old, u.dir); err != nil {
			return err
		}
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

	u.mu.Lock() // for keep writes there
	defer u.mu.Unlock()
	for _, pattern := range []string{"/fetch/*.lock", "/fetch/shallow*", "/fetch/*.new", "/read/*.lock"} {
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

// canFilter finds out whether upstream leaves out contents at a fetch, and hands out single objects later,
// from what it says of itself: fetch=shallow filter (protocol 2), or a list behind the first ref (protocol
// 0). A web server that knows nothing of git says nothing.
func (u *upstream) canFilter(ctx context.Context, a account) (bool, error) {
	f, err := os.CreateTemp("", "gitopper")
	if err != nil {
		return false, err
	}
	defer f.Close()
	defer os.Remove(f.Name())
	cmd := u.reach(a, "", "ls-remote", "-q", "origin", "refs/heads/none")
	cmd.Env = append(cmd.Env, "GIT_TRACE_PACKET=3")
	cmd.ExtraFiles = []*os.File{f}
	_, err = u.online(ctx, a, "ls-remote", cmd, lookLimit, maxObject)
	start, _ := io.ReadAll(io.NewSectionReader(f, 0, 64<<10))
	return offers.Match(start), err
}

var offers = regexp.MustCompile(`< fetch=(.* )?filter\s` +
	`|\\0.*allow-any-sha1-in-want.* filter\s|\\0(.* )?filter .*allow-any-sha1-in-want`)

// probe returns an error if a tip that should be in the clone is not, or a commit that it descends from,
// without which git can't fetch.
func (u *upstream) probe(ctx context.Context, a account) error {
	args := []string{"rev-list", "--quiet"}
	for _, l := range u.looks {
		if l.tip != "" {
			args = append(args, l.tip)
		}
	}
	if len(args) == 2 {
		return nil
	}
	_, err := runGit(ctx, "rev-list", u.reader(a, args...), fetchLimit)
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) && exit.Exited() {
		return damaged{err}
	}
	if crashed(err) {
		return damaged{err}
	}
	return nil
}

// crashed says that git was ended by what it read: it maps packs, and one that was cut off is a SIGBUS or
// worse.
func crashed(err error) bool {
	exit := (*exec.ExitError)(nil)
	if !errors.As(err, &exit) {
		return false
	}
	status, _ := exit.Sys().(syscall.WaitStatus)
	return slices.Contains([]syscall.Signal{syscall.SIGSEGV, syscall.SIGBUS, syscall.SIGABRT}, status.Signal())
}

// hashDigits is the length of upstream's ids, 40 where it named none.
func hashDigits(remote map[string]string) int {
	for _, id := range remote {
		return len(id)
	}
	return 40
}

const skeletonHead = "ref: refs/heads/none\n"

// part is a directory or a file of a clone: what it is to be.
type part struct {
	name     string // below the clone's directory
	mode     os.FileMode
	uid, gid int
	text     string // of a file
}

// parts returns all of a clone that root makes, in order, for ids of so many digits. The config for the
// network says that objects may be missing, if it is filtered; see git-partial-clone(7).
func parts(user account, digits int, filtered bool) (list []part) {
	config := "[core]\n\trepositoryformatversion = 1\n\tbare = true\n[extensions]\n"
	if digits == 64 {
		config += "\tobjectFormat = sha256\n"
	}
	network := config
	if filtered {
		network += "\tpartialClone = origin\n" +
			"[remote \"origin\"]\n\tpromisor = true\n\tpartialclonefilter = blob:none\n"
	}

	const open, plain = os.ModeDir | 0o755, 0o644
	uid, gid := os.Geteuid(), os.Getegid()
	for _, name := range []string{"", "/fetch", "/fetch/refs", "/fetch/refs/tips", "/read", "/read/refs"} {
		list = append(list, part{name, open, uid, gid, ""})
	}
	return append(list, part{"/objects", os.ModeDir | 0o700, user.uid, user.gid, ""},
		part{"/fetch/HEAD", plain, uid, gid, skeletonHead}, part{"/fetch/config", plain, uid, gid, network},
		part{"/read/HEAD", plain, uid, gid, skeletonHead}, part{"/read/config", plain, uid, gid, config})
}

// skeleton makes an empty clone.
func (u *upstream) skeleton(ctx context.Context, a account, digits int, filtered bool) error {
	parent := filepath.Dir(u.dir)
	if err := os.MkdirAll(parent, 0o711); err != nil {
		return err
	}
	err := errors.Join(os.Chmod(parent, 0o711), removeTree(ctx, u.dir)) // 0711 whatever the umask
	for _, p := range parts(a, digits, filtered) {
		name := u.dir + p.name
		switch {
		case err != nil:
			return err
		case p.mode.IsDir():
			err = errors.Join(os.Mkdir(name, 0o700), os.Chmod(name, p.mode), os.Lchown(name, p.uid, p.gid))
		default:
			err = u.write(p.name, p.text)
		}
	}
	return err
}

// write replaces a file of a skeleton, which the user's git can read.
func (u *upstream) write(name, text string) error {
	f, err := os.CreateTemp(u.dir+"/fetch", "*.new") // beside the refs, or git would take it for one
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	_, err = f.WriteString(text)
	if err := errors.Join(err, f.Chmod(0o644), f.Sync(), f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), u.dir+name)
}

// filtered says whether the clone leaves out contents until they are asked for.
func (u *upstream) filtered() bool {
	data, _ := os.ReadFile(u.dir + "/fetch/config")
	return bytes.Contains(data, []byte("promisor"))
}

// sound returns an error unless all parts of the clone are there as we made them for ids of so many digits.
func (u *upstream) sound(a account, digits int) error {
	for _, p := range parts(a, digits, u.filtered()) {
		name, text := u.dir+p.name, ""
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
		if (part{p.name, fi.Mode() &^ os.ModeSetgid, uid, p.gid, text}) != p {
			return damaged{fmt.Errorf("%s is not as we made it: %v of user %d", name, fi.Mode(), uid)}
		}
	}
	packed, err := os.ReadFile(u.dir + "/fetch/packed-refs")
	if err == nil && string(packed) != packedHead+strings.Join(ranLines(string(packed)), "") {
		return damaged{fmt.Errorf("%s/fetch/packed-refs is not as we wrote it", u.dir)}
	}
	return nil
}

// clone fetches all anew beside the clone that is there, if any, which serves until the new one is complete
// and takes its place. Commits that ran are lost where upstream has them no more.
func (u *upstream) clone(ctx context.Context, a account, remote map[string]string, why error, again bool) (
	err error) {
	if len(remote) == 0 {
		return nil // each branch is told to be missing
	}
	first := !lexists(u.dir)
	digits := hashDigits(remote)
	filtered := false
	full := errors.Is(why, errRefused) || u.sound(a, digits) == nil && !u.filtered()
	if !full {
		if filtered, err = u.canFilter(ctx, a); err != nil {
			return err
		}
	}

	next := newUpstream("", u.url, u.user)
	next.dir, next.patience, next.spent = u.dir+".new", u.patience, u.spent
	next.acct.Store(&a)
	if err := next.skeleton(ctx, a, digits, filtered); err != nil {
		return err
	}
	for _, t := range u.tracked {
		next.track(t.branch, t.dirs, nil)
	}
	err = next.update(ctx, a, remote, again)
	u.spent = next.spent
	if filtered && errors.Is(err, errRefused) {
		return u.clone(ctx, a, remote, err, again)
	}
	if errors.As(err, &damaged{}) {
		u.healed = time.Now() // upstream itself may be
	}
	if packed, err := os.ReadFile(u.dir + "/fetch/packed-refs"); err == nil {
		whole := packedHead + strings.Join(ranLines(string(packed)), "")
		_ = next.write("/fetch/packed-refs", whole) // of what is not there, git takes no notice
	}
	if err == nil {
		err = u.replace(next)
	}
	if err != nil {
		_ = removeTree(ctx, next.dir)
		if first {
			return err
		}
		return fmt.Errorf("%w; it is to be made anew because %w", err, why)
	}

	if !first {
		u.healed = time.Now()
		slog.Warn(fmt.Sprintf("%s: cloned anew", redact(u.url)), "reason", why)
	}
	return u.tidy(ctx)
}

// replace puts a complete clone in our clone's place.
func (u *upstream) replace(next *upstream) error {
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
	for branch, l := range next.looks {
		old := u.looks[branch]
		old.tip = l.tip
		u.looks[branch] = old
	}
	u.tips, u.hurt = next.tips, next.hurt
	return syncDir(filepath.Dir(u.dir))
}

const packedHead = "# pack-refs with: peeled fully-peeled sorted \n"

// ranLines returns those lines of packed-refs that are as keep writes them.
func ranLines(text string) (lines []string) {
	for line := range strings.Lines(text) { // 606eb576... refs/ran/606eb576...
		id, ref, _ := strings.Cut(line, " ")
		if isHash(id) && ref == "refs/ran/"+id+"\n" {
			lines = append(lines, line)
		}
	}
	return lines
}

// keep makes the clone keep the commits that ran for a service, whatever becomes of upstream's branches.
func (u *upstream) keep(service string, commits []string) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.ran[service] = commits
	name := u.dir + "/fetch/packed-refs"
	old, err := os.ReadFile(name)
	if err != nil && !lexists(u.dir+"/fetch") {
		return nil // nothing to keep yet
	}

	lines := []string{}
	if len(u.ran) < len(u.tracked) { // not all have said theirs since we started
		lines = ranLines(string(old))
	}
	for _, list := range u.ran {
		for _, c := range list {
			lines = append(lines, c+" refs/ran/"+c+"\n")
		}
	}
	slices.Sort(lines)
	text := packedHead + strings.Join(slices.Compact(lines), "")
	if text == string(old) || len(lines) == 0 {
		return nil
	}
	return u.write("/fetch/packed-refs", text)
}

// pack puts what many small fetches brought into one pack, at most once an hour.
func (u *upstream) pack(ctx context.Context) {
	packs, loose := 0, 0
	u.inObjects("pack", func(_ *os.Root, name string) {
		if strings.HasSuffix(name, ".pack") {
			packs++
		}
	})
	// One directory of 256 tells, as in git gc --auto.
	u.inObjects("17", func(*os.Root, string) { loose += 256 })
	if packs <= 50 && loose <= 2000 || time.Since(u.packed) < healEvery {
		return
	}
	a, err := u.account(ctx)
	if err != nil || u.take(ctx) != nil {
		return
	}
	defer func() { <-u.network }()
	u.packed = time.Now()
	args := []string{"repack", "-a", "-d", "-n", "-q"}
	if !u.filtered() {
		args = append(args, "--keep-unreachable") // of a promisor's objects git keeps all
	}
	cmd := gitCommand(a, u.dir+"/fetch", []string{"GIT_OBJECT_DIRECTORY=" + u.objectsDir()}, args...)
	if _, err := runGit(ctx, "repack", cmd, fetchLimit); err != nil && ctx.Err() == nil {
		slog.Warn(fmt.Sprintf("%s: %v", redact(u.url), err))
	}
}

// retireUpstreams removes the clones below stateDir that are of no upstream in keep.
func retireUpstreams(ctx context.Context, stateDir string, keep []*upstream) {
	names, _ := filepath.Glob(filepath.Join(stateDir, "upstreams", "*"))
	for _, name := range names {
		if slices.ContainsFunc(keep, func(u *upstream) bool { return strings.HasPrefix(name, u.dir) }) {
			continue
		}
		if err := removeTree(ctx, name); err != nil && ctx.Err() == nil {
			slog.Warn(fmt.Sprintf("remove a clone that no service uses: %v", err))
		}
	}
}

// fetchMissing makes sure that all blobs of t are in the clone: no network where they are, and no program
// where t is of a tip.
func (u *upstream) fetchMissing(ctx context.Context, t tree) error {
	isTips := func(s showing) bool { return maps.Equal(s.tree, t) }
	u.mu.Lock()
	known := slices.ContainsFunc(slices.Collect(maps.Values(u.tips)), isTips)
	u.mu.Unlock()
	if known {
		return nil
	}
	ids := map[string]bool{}
	t.blobs(ids)
	a, err := u.account(ctx)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, missingLimit)
	defer cancel()
	lacks, err := u.missing(ctx, a, ids)
	if err != nil || lacks == nil {
		return err
	}
	if err := u.take(ctx); err != nil {
		return err
	}
	defer func() { <-u.network }()
	err = u.bring(ctx, a, lacks)
	if errors.As(err, &damaged{}) {
		u.hurts(u.hurt, err) // the next look mends it
	}
	return err
}

// missing asks the clone which blobs it lacks, without network; a line each.
func (u *upstream) missing(ctx context.Context, a account, ids map[string]bool) ([]byte, error) {
	if len(ids) == 0 {
		return nil, nil
	}
	cmd := u.reader(a, "cat-file", "--batch-check=%(objectname)")
	cmd.Stdin = strings.NewReader(strings.Join(slices.Sorted(maps.Keys(ids)), "\n") + "\n")
	out, err := runGit(ctx, "cat-file", cmd, fetchLimit)
	if err != nil {
		return nil, err
	}
	var lacks []byte
	for line := range strings.Lines(string(out)) { // 606eb576..., or 606eb576... missing
		id, is := strings.CutSuffix(line, " missing\n")
		if is && ids[id] {
			lacks = append(lacks, id+"\n"...)
		}
	}
	return lacks, nil
}

// bring fetches the blobs that the clone lacks, in one request.
func (u *upstream) bring(ctx context.Context, a account, lacks []byte) error {
	if lacks == nil {
		return nil
	}
	if !u.filtered() {
		return damaged{fmt.Errorf("blob %.12s %w", lacks, errMissing)}
	}
	err := u.fetch(ctx, a, fetchLimit, lacks, "--filter=blob:none", "--stdin", "origin")
	if err == nil || ctx.Err() != nil {
		return err
	}
	return errors.Join(err, u.probe(ctx, a))
}
