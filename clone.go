package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
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

// tidy removes what a killed git, or a killed heal, left behind, once.
func (u *upstream) tidy(ctx context.Context) error {
	if u.used {
		return nil
	}
	old, fresh := u.dir+".old", u.dir+".new"
	if !lexists(u.dir) && lexists(old) { // killed between two renames
		if err := os.Rename(old, u.dir); err != nil {
			return err
		}
	}
	for _, name := range []string{old, fresh} {
		if err := removeTree(ctx, name); err != nil {
			return err
		}
	}
	for _, pattern := range []string{"/fetch/*.lock", "/fetch/shallow*", "/fetch/*.new", "/read/*.lock"} {
		names, _ := filepath.Glob(u.dir + pattern)
		for _, name := range names {
			if err := os.RemoveAll(name); err != nil {
				return err
			}
		}
	}
	u.used = true
	return u.inObjects("pack", func(root *os.Root, name string) {
		if strings.HasPrefix(name, "tmp_") {
			_ = root.Remove("pack/" + name)
		}
	})
}

// inObjects calls do for names in a directory of the user's below objects, of which there may be none, or
// very many.
func (u *upstream) inObjects(name string, do func(root *os.Root, name string)) error {
	root, err := os.OpenRoot(u.objectsDir())
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	defer root.Close()
	d, err := root.OpenFile(name, os.O_RDONLY|syscall.O_DIRECTORY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil // git says what is wrong with it
	}
	defer d.Close()
	names, _ := d.Readdirnames(treeEntries)
	for _, name := range names {
		do(root, name)
	}
	return nil
}

// canFilter finds out whether upstream leaves out contents at a fetch, and hands out single objects later,
// from what it says of itself: fetch=shallow filter (protocol 2), or a list behind the first ref (protocol
// 0). A web server that knows nothing of git says nothing.
func (u *upstream) canFilter(ctx context.Context, a account) (bool, error) {
	r, w, err := os.Pipe()
	if err != nil {
		return false, err
	}
	defer r.Close()
	cmd := u.reach(a, "", "ls-remote", "-q", "origin", "refs/heads/none")
	cmd.Env = append(cmd.Env, "GIT_TRACE_PACKET=3")
	cmd.ExtraFiles = []*os.File{w}

	words := make(chan string, 1)
	go func() {
		start, _ := io.ReadAll(io.LimitReader(r, 64<<10))
		words <- string(start)
		_, _ = io.Copy(io.Discard, r)
	}()
	_, err = runGit(ctx, "ls-remote "+redact(u.url), cmd, lookLimit)
	_ = errors.Join(w.Close(), r.SetReadDeadline(time.Now().Add(time.Second)))
	for line := range strings.Lines(<-words) {
		_, two, _ := strings.Cut(line, "< fetch=")
		_, zero, _ := strings.Cut(line, `\0`)
		single := two != "" || strings.Contains(zero, "allow-any-sha1-in-want")
		said := strings.Fields(two + " " + zero)
		if single && slices.Contains(said, "filter") {
			return true, err
		}
	}
	return false, err
}

// probe returns an error if a tip that should be in the clone is not, or a commit that it descends from, without which
// git can't fetch: it costs two gits.
func (u *upstream) probe(ctx context.Context) error {
	o, err := u.open(ctx)
	if err != nil {
		return nil
	}
	defer o.close()
	args := []string{"rev-list", "--quiet"}
	for branch := range u.looks {
		tip := u.looked(branch).tip
		if tip == "" {
			continue
		}
		args = append(args, tip)
		w := o.walk(tip)
		err := w.root()
		if err == nil {
			_, err = w.entries(w.top)
		}
		if errors.Is(err, errNoCommit) {
			err = damaged{err}
		}
		if errors.As(err, &damaged{}) {
			return err
		}
	}

	if len(args) == 2 {
		return nil
	}
	a, err := u.account(ctx)
	if err == nil {
		_, err = runGit(ctx, "rev-list", u.reader(a, args...), fetchLimit)
	}
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) && exit.Exited() {
		return damaged{err}
	}
	return nil
}

// hashDigits is the length of upstream's ids, 40 where it named none.
func hashDigits(remote map[string]string) int {
	for _, id := range remote {
		return len(id)
	}
	return 40
}

// skeletonConfig is the config of a skeleton. The one for the network says that objects may be missing,
// unless all are to be fetched; see git-partial-clone(7).
func skeletonConfig(digits int, filtered bool) string {
	config := "[core]\n\trepositoryformatversion = 1\n\tbare = true\n[extensions]\n"
	if digits == 64 {
		config += "\tobjectFormat = sha256\n"
	}
	if filtered {
		config += "\tpartialClone = origin\n" +
			"[remote \"origin\"]\n\tpromisor = true\n\tpartialclonefilter = blob:none\n"
	}
	return config
}

// skeletonDirs are the directories of a clone that are root's, outer ones first.
func skeletonDirs() []string {
	return []string{"", "/fetch", "/fetch/refs", "/fetch/refs/tips", "/read", "/read/refs"}
}

const skeletonHead = "ref: refs/heads/none\n"

// skeleton makes an empty clone.
func (u *upstream) skeleton(ctx context.Context, a account, digits int, filtered bool) error {
	parent := filepath.Dir(u.dir)
	if err := os.MkdirAll(parent, 0o711); err != nil {
		return err
	}
	err := errors.Join(os.Chmod(parent, 0o711), removeTree(ctx, u.dir)) // 0711 whatever the umask
	for _, name := range append(skeletonDirs(), "/objects") {
		if err == nil {
			err = errors.Join(os.Mkdir(u.dir+name, 0o755), os.Chmod(u.dir+name, 0o755))
		}
	}
	if err != nil {
		return err
	}
	for name, text := range map[string]string{
		"fetch/HEAD": skeletonHead, "fetch/config": skeletonConfig(digits, filtered),
		"read/HEAD": skeletonHead, "read/config": skeletonConfig(digits, false),
	} {
		if err := u.write(name, text); err != nil {
			return err
		}
	}
	return errors.Join(os.Chmod(u.objectsDir(), 0o700), os.Lchown(u.objectsDir(), a.uid, a.gid))
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
	return os.Rename(f.Name(), u.dir+"/"+name)
}

// filtered says whether the clone leaves out contents until they are asked for.
func (u *upstream) filtered() bool {
	data, _ := os.ReadFile(u.dir + "/fetch/config")
	return bytes.Contains(data, []byte("promisor"))
}

// errNoClone says that nothing was cloned yet.
var errNoClone = errors.New("there is no clone")

// sound returns an error unless the skeletons are there, ours and as we made them for ids of so many digits,
// and the objects are the user's alone.
func (u *upstream) sound(a account, digits int) error {
	if !lexists(u.dir) {
		return errNoClone
	}
	for _, name := range append(skeletonDirs(), "/objects") {
		uid, mode := os.Geteuid(), os.ModeDir|0o755
		if name == "/objects" {
			uid, mode = a.uid, os.ModeDir|0o700
		}
		fi, err := os.Lstat(u.dir + name)
		if err != nil {
			return damaged{err}
		}
		if owner := int(fi.Sys().(*syscall.Stat_t).Uid); fi.Mode()&^os.ModeSetgid != mode || owner != uid {
			return damaged{fmt.Errorf("%s is %v of user %d", u.dir+name, fi.Mode(), owner)}
		}
	}

	head, all := []string{skeletonHead}, skeletonConfig(digits, false)
	for name, right := range map[string][]string{
		"/fetch/HEAD": head, "/fetch/config": {all, skeletonConfig(digits, true)},
		"/read/HEAD": head, "/read/config": {all},
	} {
		data, err := os.ReadFile(u.dir + name)
		if err != nil {
			return damaged{err}
		}
		if !slices.Contains(right, string(data)) {
			return damaged{fmt.Errorf("%s is not as we wrote it", u.dir+name)}
		}
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
	digits := hashDigits(remote)
	filtered := false
	full := errors.Is(why, errRefused) || u.sound(a, digits) == nil && !u.filtered()
	if !full {
		if filtered, err = u.canFilter(ctx, a); err != nil {
			return err
		}
	}

	next := newUpstream("", u.url, u.user)
	next.dir, next.patience, next.tracked, next.spent = u.dir+".new", u.patience, u.tracked, u.spent
	next.acct = &a
	for branch := range u.looks {
		next.looks[branch] = look{}
	}
	if err := removeTree(ctx, u.dir+".old"); err != nil {
		return err
	}
	if err := next.skeleton(ctx, a, digits, filtered); err != nil {
		return err
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
		_ = next.write("fetch/packed-refs", string(packed)) // of what is not there, git takes no notice
	}
	if err == nil {
		err = u.replace(next)
	}
	if err != nil {
		_ = removeTree(ctx, next.dir)
		if errors.Is(why, errNoClone) {
			return err
		}
		return fmt.Errorf("%w; it is to be made anew because %w", err, why)
	}

	if !errors.Is(why, errNoClone) {
		u.healed = time.Now()
		slog.Warn(fmt.Sprintf("%s: cloned anew", redact(u.url)), "reason", why)
	}
	if err := removeTree(ctx, u.dir+".old"); err != nil {
		slog.Warn(fmt.Sprintf("%s: the clone of before stays: %v", redact(u.url), err))
	}
	return nil
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
	u.tips, u.hurt = next.tips, nil
	u.made++
	return syncDir(filepath.Dir(u.dir))
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

	const head = "# pack-refs with: peeled fully-peeled sorted \n"
	lines := map[string]bool{}
	if len(u.ran) < len(u.tracked) { // not all have said theirs since we started
		for line := range strings.Lines(strings.TrimPrefix(string(old), head)) {
			lines[line] = true
		}
	}
	for _, list := range u.ran {
		for _, c := range list {
			lines[c+" refs/ran/"+c+"\n"] = true
		}
	}
	text := head + strings.Join(slices.Sorted(maps.Keys(lines)), "")
	if text == string(old) || len(lines) == 0 {
		return nil
	}
	return u.write("fetch/packed-refs", text)
}

// pack puts what many small fetches brought into one pack, at most once an hour.
func (u *upstream) pack(ctx context.Context) {
	packs, loose := 0, 0
	_ = u.inObjects("pack", func(_ *os.Root, name string) {
		if strings.HasSuffix(name, ".pack") {
			packs++
		}
	})
	// One directory of 256 tells, as in git gc --auto.
	_ = u.inObjects("17", func(*os.Root, string) { loose += 256 })
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
	u.mu.Lock()
	for _, tip := range u.tips {
		for _, s := range tip {
			if maps.Equal(s.tree, t) {
				u.mu.Unlock()
				return nil
			}
		}
	}
	u.mu.Unlock()

	ids := map[string]bool{}
	t.blobs(ids)
	a, err := u.account(ctx)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, missingLimit)
	defer cancel()
	if lacks, err := u.missing(ctx, a, ids); err != nil || lacks == nil {
		return err
	}
	if err := u.take(ctx); err != nil {
		return err
	}
	defer func() { <-u.network }()
	err = u.bring(ctx, a, ids)
	if errors.As(err, &damaged{}) {
		u.hurts(err, u.clones()) // the next look mends it
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

// bring fetches those blobs that are not in the clone, in one request.
func (u *upstream) bring(ctx context.Context, a account, ids map[string]bool) error {
	lacks, err := u.missing(ctx, a, ids)
	if err != nil || lacks == nil {
		return err
	}
	if !u.filtered() {
		return damaged{fmt.Errorf("blob %.12s %w", lacks, errMissing)}
	}
	return u.fetch(ctx, a, fetchLimit, lacks, "--filter=blob:none", "--stdin", "origin")
}
