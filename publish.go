//go:build linux

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"log/slog"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// stage lays out d.put below stageDir, complete, synced, with owner, group and mode. read copies a blob to a
// writer. Where it fails nothing is left of it, and where it failed for want of space it is not tried again
// before there is more of that.
func (f *files) stage(ctx context.Context, want tree, d diff,
	read func(id string, w io.Writer) (int64, error)) (err error) {
	top, err := openOwn(f.dir)
	if err != nil {
		return err
	}
	defer top.close()

	short, err := f.enough(top, want, d)
	if err != nil {
		return err
	}
	defer func() {
		if err == nil {
			return
		}
		err = errors.Join(err, os.RemoveAll(top.path()+"/"+stageDir))
		if errors.Is(err, syscall.ENOSPC) {
			f.full = short
		}
	}()

	if err := f.probe(top, want); err != nil {
		return err
	}

	f.staged = map[string]noted{}
	at, err := top.below(stageDir)
	if err != nil {
		return err
	}
	defer at.close()
	out := &descent{top: at, make: f.makeStaged}
	defer out.close()
	for _, p := range d.put {
		if err := f.stageOne(ctx, out, p, want[p], read); err != nil {
			return fmt.Errorf("lay out %s/%s: %w", f.dir, p, err)
		}
	}

	// Else a power cut leaves empty files under the names (XFS, ext4 without auto_da_alloc). All is written
	// first, for then most syncs find their work done.
	staged := ownDirs(d.put)
	for _, p := range d.put {
		if n := f.staged[p]; n.kind() == syscall.S_IFREG { // or a link's directory
			staged = append(staged, p)
		}
	}
	if err := out.sync(staged); err != nil {
		return fmt.Errorf("lay out files in %s: %w", f.dir, err)
	}
	return nil
}

// makeStaged makes a directory of the stage as it will be when it goes live.
func (f *files) makeStaged(parent place, name, p string) error {
	if err := syscall.Mkdirat(parent.fd, name, 0o755); err != nil {
		return err
	}
	if f.linkOf(p) == (dir{}) {
		return nil // above the links it stays root's
	}
	return f.attrs(p, blob{}).give(parent.path() + "/" + name)
}

// give gives what is at a path the attributes. See chown(2) and chmod(2), which follow links.
func (a attrs) give(at string) error {
	return errors.Join(os.Chown(at, a.uid, a.gid), syscall.Chmod(at, a.perm))
}

// giveFile is give for a file of ours that is open.
func (a attrs) giveFile(file place) error {
	st, err := file.stat()
	if isGiven := attrsOf(&st) == a; isGiven || err != nil {
		return err
	}
	return errors.Join(syscall.Fchown(file.fd, a.uid, a.gid), syscall.Fchmod(file.fd, a.perm))
}

// stageOne lays out one path; one that has no blob is a link's directory.
func (f *files) stageOne(ctx context.Context, out *descent, p string, b blob,
	read func(id string, w io.Writer) (int64, error)) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if b == (blob{}) {
		_, err := out.to(p)
		return err
	}
	dir, err := out.to(path.Dir(p))
	if err != nil {
		return err
	}

	name, a := path.Base(p), f.attrs(p, b)
	at := dir.path() + "/" + name
	switch b.mode {
	case "160000":
		if err = syscall.Mkdirat(dir.fd, name, 0o700); err == nil {
			err = a.give(at)
		}
	case "120000":
		var to bytes.Buffer
		if _, err = read(b.id, &to); err == nil {
			err = syscall.Symlink(to.String(), at) // whose error does not quote it all
		}
		if err == nil {
			err = os.Lchown(at, a.uid, a.gid)
		}
	default:
		file := place{-1}
		if file.fd, err = syscall.Openat(dir.fd, name, createNew, a.perm); err == nil {
			_, err = read(b.id, file)
			err = errors.Join(err, a.giveFile(file), syscall.Close(file.fd))
		}
	}

	if errors.Is(err, syscall.EEXIST) {
		return fmt.Errorf("the file system takes it for another name of the commit: %w", err)
	}
	if err != nil {
		return err
	}

	st, err := dir.lstat(name)
	n := noted{b, stampOf(&st)}
	n.ctime = 0 // it changes with the rename
	f.staged[p] = n
	return err
}

// dirsOf returns the directories on the way to paths, "." among them.
func dirsOf(paths iter.Seq[string]) map[string]bool {
	dirs := map[string]bool{".": true}
	for p := range paths {
		for p = path.Dir(p); !dirs[p]; p = path.Dir(p) {
			dirs[p] = true
		}
	}
	return dirs
}

// ownDirs returns what names the directories on the way to paths themselves: DIR/.
func ownDirs(paths []string) (own []string) {
	for _, p := range slices.Sorted(maps.Keys(dirsOf(slices.Values(paths)))) {
		own = append(own, p+"/.")
	}
	return own
}

// publish makes what is staged live, path by path, each by one rename, and takes away d.gone; what comes out
// waits in publishDir. Cut short anywhere, it is done by the next comparison and publish.
func (f *files) publish(ctx context.Context, v version, want tree, d diff) error {
	top, err := openOwn(f.dir)
	if err != nil {
		return err
	}
	defer top.close()

	// From here on the manifest knows what is staged: nothing of it is ever taken for somebody's own.
	m := f.load().begin(v, f.staged)
	if err := m.write(f.manifest); err != nil {
		return errors.Join(err, os.RemoveAll(top.path()+"/"+stageDir))
	}
	f.m = m

	w, err := f.openPublish(top)
	if err != nil {
		return fmt.Errorf("%s/%s: %w", f.dir, publishDir, err)
	}
	defer w.close()

	for _, step := range []struct {
		what  string
		paths []string
		do    func(string) error
	}{
		{"publish", d.put, w.put}, {"take away", d.gone, w.takeOut}, {"put right", d.modes, w.putRight},
	} {
		for _, p := range step.paths {
			if err := errors.Join(ctx.Err(), step.do(p)); err != nil {
				return fmt.Errorf("%s %s/%s: %w", step.what, f.dir, p, err)
			}
		}
	}

	w.removeEmpty(want)
	w.live.back(0) // what it holds may have been moved away
	changed := ownDirs(slices.Concat(d.put, d.gone))
	if err := errors.Join(w.live.sync(changed), w.out.top.sync(".")); err != nil {
		return fmt.Errorf("%s: %w", f.dir, err)
	}

	f.after = m.end(want)
	return nil
}

// swap is a publish under way.
type swap struct {
	f    *files
	live *descent
	out  *descent        // publishDir
	tops map[string]bool // what went live, with all that is in it
}

// openPublish renames the stage to publishDir, from where alone something goes live: an exchange leaves what
// was live under the staged file's name. The stage is thrown away by whoever finds one; what lies in
// publishDir never is.
func (f *files) openPublish(top place) (*swap, error) {
	// What came out of a publish that was cut short may still be mounted: it waits for finish.
	aside := publishDir + "-" + strconv.FormatInt(time.Now().UnixNano(), 10)
	err := except(renameat2(top, publishDir, top, aside, renameNoReplace), syscall.ENOENT)
	if err == nil {
		err = renameat2(top, stageDir, top, publishDir, renameNoReplace)
	}
	if err == syscall.ENOENT { // nothing was to be staged
		err = syscall.Mkdirat(top.fd, publishDir, 0o700)
	}
	if err == nil {
		err = top.sync(ourDir)
	}
	if err != nil {
		return nil, err
	}

	at, err := top.below(publishDir)
	out := &descent{top: at, make: makePrivate}
	return &swap{f: f, live: &descent{top: top}, out: out, tops: map[string]bool{}}, err
}

func (w *swap) close() {
	w.live.close()
	w.out.close()
	w.out.top.close()
}

// put makes one staged path live. Where its parent directories are missing too, the topmost of them goes with
// all that is in it; where something of another kind is in the way, the two are exchanged, so that the name
// never goes missing.
func (w *swap) put(p string) error {
	for q := p; q != "."; q = path.Dir(q) {
		if w.tops[q] {
			return nil // it went with that
		}
	}

	var err error
	for range 100 { // somebody may make and remove what is in the way
		name := p
		dir, missing := w.live.to(path.Dir(p))
		if notThere(missing) {
			name = w.live.stuck
			if dir, err = w.live.to(path.Dir(name)); err != nil {
				continue
			}
		} else if missing != nil {
			return missing
		}

		staged, err2 := w.out.to(path.Dir(name))
		if err2 != nil {
			return err2
		}

		base := path.Base(name)
		err = syscall.ENOENT
		if isThere := len(w.f.m.known[name]) > 1; isThere { // with what was live
			err = renameat2(staged, base, dir, base, renameExchange)
		}
		if err == syscall.ENOENT {
			err = renameat2(staged, base, dir, base, renameNoReplace)
		}
		if err == syscall.EEXIST && missing != syscall.ENOENT {
			err = renameat2(staged, base, dir, base, renameExchange)
		}
		switch err {
		case nil:
			w.tops[name] = true
			return nil
		case syscall.ENOENT, syscall.EEXIST: // somebody removed or made it just now
			w.live.back(0)
		default:
			return err
		}
	}
	return err
}

// putRight gives a directory of the user's its mode and group, in place: it holds what is somebody's own, and
// may be mounted. What its owner puts in its place meanwhile does no harm: it is a directory of theirs, too.
func (w *swap) putRight(p string) error {
	dir, err := w.live.to(p)
	if err != nil {
		return except(err, noPath...)
	}
	st, err := dir.stat()
	a := w.f.attrs(p, blob{})
	if isUsers := int(st.Uid) == a.uid; isUsers {
		err = errors.Join(err, a.give(dir.path()))
	}
	return err
}

// takeOut renames one live path out.
func (w *swap) takeOut(p string) error {
	dir, err := w.live.to(path.Dir(p))
	if w.tops[p] {
		return nil // what is there went live just now
	}
	if err != nil {
		return except(err, noPath...) // it went with a directory above it
	}

	base := path.Base(p)
	isModule := func(n noted) bool { return n.mode == "160000" }
	if slices.ContainsFunc(w.f.m.known[p], isModule) {
		if syscall.Rmdir(dir.path()+"/"+base) != syscall.ENOTDIR {
			return nil // it is gone, or somebody uses it
		}
	}

	out, err := w.out.to(path.Dir(p))
	if err == nil {
		err = renameat2(dir, base, out, base, renameNoReplace)
	}
	return except(err, syscall.ENOENT)
}

// removeEmpty removes the directories that held only what went; a link's own stays, for a mount of a removed
// directory shows nothing for ever.
func (w *swap) removeEmpty(want tree) {
	stay, all := w.f.directories(want), slices.Sorted(maps.Keys(dirsOf(slices.Values(w.f.m.paths))))
	for _, p := range slices.Backward(all) {
		if stay[p] {
			continue
		}
		if dir, err := w.live.to(path.Dir(p)); err == nil {
			_ = syscall.Rmdir(dir.path() + "/" + path.Base(p))
		}
	}
}

// finish looks at what came out in a publish, after every local shows its link: what is ours is thrown away,
// all else is kept, unread, below editsDir, and kept says where. Then the manifest of what is live is
// written.
func (f *files) finish(ctx context.Context) (kept []string, err error) {
	ours, err := openOwn(f.dir + "/" + ourDir)
	if err != nil {
		return nil, err
	}
	defer ours.close()

	s := &sorter{f: f, ours: ours}
	f.unknown = maxUnknown
	if err := s.all(ctx); err != nil {
		return s.kept, fmt.Errorf("look at what came out of %s: %w", f.dir, err)
	}
	if f.after != nil {
		if err := f.after.write(f.manifest); err != nil {
			return s.kept, err
		}
		f.m, f.after, f.staged = f.after, nil, nil
	}

	f.cut = false
	if err := f.prune(ctx, ours); wentWrong(ctx, err) {
		slog.Warn(err.Error())
	}
	return s.kept, nil
}

// lookedAt is what ourDir calls the file that is being looked at.
const lookedAt = "looked-at"

// sorter looks through what came out of a publish.
type sorter struct {
	f    *files
	ours place  // ourDir
	into string // the directory of editsDir for what is kept this time
	kept []string
}

func (s *sorter) all(ctx context.Context) error {
	if _, err := s.ours.lstat(lookedAt); err == nil { // we were killed, and don't know what its name was
		any := slices.Concat(slices.Collect(maps.Values(s.f.m.known))...)
		if err := s.discardOrKeep(ctx, lookedAt, any); err != nil {
			return err
		}
	}

	outs, err := filepath.Glob(s.ours.path() + "/publish*")
	for _, out := range outs {
		if err == nil {
			err = s.empty(ctx, s.ours, path.Base(out), "")
		}
	}
	return err
}

// empty removes a directory that came out, after all that is in it. at is where it was live.
func (s *sorter) empty(ctx context.Context, parent place, name, at string) error {
	dir, err := parent.below(name)
	if err != nil {
		return err
	}
	defer dir.close()

	names, err := dir.names(maxEntries)
	if err != nil {
		return err
	}

	for _, n := range names {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := except(s.one(ctx, dir, n, path.Join(at, n)), syscall.ENOENT); err != nil {
			return err
		}
	}
	return syscall.Rmdir(parent.path() + "/" + name)
}

// one deals with one name, which was live as p. Directories are entered only if they have paths of ours.
func (s *sorter) one(ctx context.Context, dir place, name, p string) error {
	st, err := dir.lstat(name)
	known := s.f.m.known[p]
	switch {
	case err != nil:
		return err
	case !isDir(st):
		// Where nobody else can reach it, for a directory that was live may still be open to somebody.
		if err := renameat2(dir, name, s.ours, lookedAt, 0); err != nil {
			return err
		}
		return s.discardOrKeep(ctx, p, known)
	case len(known) > 0, anyBelow(s.f.m.paths, p):
		if err := s.empty(ctx, dir, name, p); !wentWrong(ctx, err) {
			return err
		}
	}
	return s.keep(dir, name, p)
}

// discardOrKeep throws away what is looked at if it is ours, and keeps it as p if it is not.
func (s *sorter) discardOrKeep(ctx context.Context, p string, known []noted) error {
	if s.f.throwAway(ctx, s.ours, lookedAt, known) {
		return nil
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	return s.keep(s.ours, lookedAt, p)
}

// throwAway removes a file in a directory of root's alone that is one of known, if nobody has it open for
// writing. A read lease tells (fcntl(2), F_SETLEASE): it is refused while somebody can write, and is broken
// by who begins to. On a file system without leases nothing tells.
func (f *files) throwAway(ctx context.Context, dir place, name string, known []noted) bool {
	st, err := dir.lstat(name)
	isWritten := func() bool { return false }
	file := place{-1}
	if st.Mode&syscall.S_IFMT == syscall.S_IFREG {
		if file, st, err = dir.openFile(name); err != nil {
			return false
		}
		defer file.close()
		fd := uintptr(file.fd)
		_, _, refused := syscall.Syscall(syscall.SYS_FCNTL, fd, fSetLease, syscall.F_RDLCK)
		isWritten = func() bool {
			lease, _, _ := syscall.Syscall(syscall.SYS_FCNTL, fd, fGetLease, 0)
			isBroken := refused == 0 && lease != syscall.F_RDLCK
			return refused == syscall.EAGAIN || isBroken
		}
	}

	if isWritten() {
		return false
	}

	was, err2 := f.match(ctx, dir, name, file, &st, known)
	isTheirs := was == blob{} || isWritten()
	if isTheirs || errors.Join(err, err2) != nil {
		return false
	}
	return syscall.Unlink(dir.path()+"/"+name) == nil
}

// keep renames a name of a directory into editsDir, as it is.
func (s *sorter) keep(dir place, name, p string) (err error) {
	for range 3 {
		if s.into == "" {
			s.into = nextEdits(s.ours)
		}

		to := &descent{top: s.ours, make: makePrivate}
		parent, err2 := to.to(path.Join("edits", s.into, path.Dir(p)))
		if err = err2; err == nil {
			err = renameat2(dir, name, parent, path.Base(p), renameNoReplace)
		}
		to.close()
		if err == nil {
			s.kept = append(s.kept, path.Join(s.f.dir, editsDir, s.into, p))
			return nil
		}
		s.into = "" // the name may be taken, by another one
	}
	return fmt.Errorf("keep %s: %w", p, err)
}

// nextEdits names the next directory of editsDir.
func nextEdits(ours place) string {
	last := 0
	names, _ := os.ReadDir(ours.path() + "/edits") // there may be none yet
	for _, entry := range names {
		n := 0
		_, _ = fmt.Sscanf(entry.Name(), "%d-", &n)
		last = max(last, n)
	}
	return fmt.Sprintf("%04d-%s", last+1, time.Now().UTC().Format(editsTime))
}

const editsTime = "20060102T150405Z"

// prune removes edits that were kept long enough.
func (f *files) prune(ctx context.Context, ours place) error {
	names, err := os.ReadDir(ours.path() + "/edits")
	if errors.Is(err, fs.ErrNotExist) {
		return nil // there never were any
	}

	old := slices.DeleteFunc(names, func(entry os.DirEntry) bool {
		_, at, _ := strings.Cut(entry.Name(), "-")
		t, err := time.Parse(editsTime, at)
		return err != nil || time.Since(t) < editsAge
	})

	for _, entry := range old[:max(0, len(old)-editsKept)] {
		if err := removeTree(ctx, path.Join(f.dir, editsDir, entry.Name())); err != nil {
			return err
		}
	}
	return err
}
