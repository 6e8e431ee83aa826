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
	"path"
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
	return f.syncStaged(ctx, out)
}

// makeStaged makes a directory of the stage as it will be when it goes live.
func (f *files) makeStaged(parent place, name, p string) error {
	if err := syscall.Mkdirat(parent.fd, name, 0o755); err != nil {
		return err
	}
	at := parent.path() + "/" + name
	if !f.isAbove(p) {
		if err := os.Lchown(at, f.acct.uid, f.acct.gid); err != nil {
			return err
		}
	}
	f.staged[p] = noted{blob: blob{mode: modeDir}}
	return nil
}

func (f *files) stageOne(ctx context.Context, out *descent, p string, b blob,
	read func(id string, w io.Writer) (int64, error)) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if b == (blob{}) { // a link
		_, err := out.to(p)
		return err
	}
	dir, err := out.to(path.Dir(p))
	if err != nil {
		return err
	}

	name, at := path.Base(p), dir.path()+"/"+path.Base(p)
	perm, uid, gid := f.attributes(b)
	switch b.mode {
	case "160000":
		err = syscall.Mkdirat(dir.fd, name, 0o755)
	case "120000":
		var to bytes.Buffer
		if _, err = read(b.id, &to); err == nil {
			err = os.Symlink(to.String(), at)
		}
	default:
		err = stageFile(dir, name, perm, func(w io.Writer) error {
			_, err := read(b.id, w)
			return err
		})
	}
	if errors.Is(err, syscall.EEXIST) {
		return fmt.Errorf("the file system takes it for another name of the commit: %w", err)
	}
	if err == nil {
		err = os.Lchown(at, uid, gid)
	}
	if err != nil {
		return err
	}

	st, err := dir.lstat(name)
	n := noted{blob: b}
	n.note(&st)
	n.ctime = 0 // it changes with the rename
	f.staged[p] = n
	return err
}

func stageFile(dir place, name string, perm uint32, fill func(w io.Writer) error) error {
	fd, err := syscall.Openat(dir.fd, name, createNew, 0o600)
	if err != nil {
		return err
	}
	file := os.NewFile(uintptr(fd), name)
	err = fill(file)
	return errors.Join(err, syscall.Fchmod(fd, perm), file.Close())
}

// syncStaged makes all that is staged outlive a power cut: else that leaves empty files under the names (XFS,
// ext4 without auto_da_alloc). All is written first, for then most syncs find their work done.
func (f *files) syncStaged(ctx context.Context, out *descent) error {
	for _, p := range append([]string{"."}, slices.Sorted(maps.Keys(f.staged))...) {
		mode := f.staged[p].mode
		if mode == "120000" || mode == "160000" {
			continue
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		dir, err := out.to(path.Dir(p))
		if err == nil {
			err = dir.sync(path.Base(p))
		}
		if err != nil {
			return fmt.Errorf("lay out %s/%s: %w", f.dir, p, err)
		}
	}
	return nil
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

	for _, p := range d.put {
		if err := errors.Join(ctx.Err(), w.put(p)); err != nil {
			return fmt.Errorf("publish %s/%s: %w", f.dir, p, err)
		}
	}
	for _, p := range d.gone {
		if err := errors.Join(ctx.Err(), w.takeOut(p)); err != nil {
			return fmt.Errorf("take away %s/%s: %w", f.dir, p, err)
		}
	}
	w.removeEmpty(want)
	if err := w.sync(); err != nil {
		return fmt.Errorf("%s: %w", f.dir, err)
	}

	f.settled = m.settle(v, want, f.staged)
	return nil
}

// swap is a publish under way.
type swap struct {
	f       *files
	live    *descent
	out     *descent // publishDir
	at      place    // the same
	tops    map[string]bool
	changed map[string]bool // live directories
}

// openPublish renames the stage to publishDir, from where alone something goes live.
func (f *files) openPublish(top place) (*swap, error) {
	ours, err := top.below(ourDir)
	if err != nil {
		return nil, err
	}
	defer ours.close()

	// What came out of a publish that was cut short may still be mounted: it waits for clear.
	aside := "publish-" + strconv.FormatInt(time.Now().UnixNano(), 10)
	err = renameat2(ours, "publish", ours, aside, renameNoReplace)
	if err == nil || err == syscall.ENOENT {
		err = renameat2(ours, "stage", ours, "publish", renameNoReplace)
	}
	if err == syscall.ENOENT { // nothing was to be staged
		err = syscall.Mkdirat(ours.fd, "publish", 0o700)
	}
	if err == nil {
		err = top.sync(ourDir)
	}
	if err != nil {
		return nil, err
	}
	at, err := ours.below("publish")
	if err != nil {
		return nil, err
	}
	return &swap{
		f: f, at: at, live: &descent{top: top}, out: &descent{top: at, make: makePrivate},
		tops: map[string]bool{}, changed: map[string]bool{},
	}, nil
}

func (w *swap) close() {
	w.live.close()
	w.out.close()
	w.at.close()
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
		if missing != nil && !notThere(missing) {
			return missing
		}
		if missing != nil {
			name = w.live.stuck
			if dir, err = w.live.to(path.Dir(name)); err != nil {
				continue
			}
		}
		staged, err2 := w.out.to(path.Dir(name))
		if err2 != nil {
			return err2
		}

		base := path.Base(name)
		err = renameat2(staged, base, dir, base, renameNoReplace)
		if err == syscall.EEXIST && missing == syscall.ENOENT {
			w.live.back(0) // somebody made it just now
			continue
		}
		if err == syscall.EEXIST {
			err = renameat2(staged, base, dir, base, renameExchange)
		}
		if err == nil {
			w.tops[name], w.changed[path.Dir(name)] = true, true
			w.live.back(len(pathParts(path.Dir(name))))
			w.out.back(len(pathParts(path.Dir(name))))
			return nil
		}
		if err != syscall.ENOENT {
			return err
		}
		w.live.back(0)
	}
	return err
}

// takeOut renames one live path out.
func (w *swap) takeOut(p string) error {
	dir, err := w.live.to(path.Dir(p))
	var st syscall.Stat_t
	if err == nil {
		st, err = dir.lstat(path.Base(p))
	}
	if notThere(err) || w.tops[p] {
		return nil // it went with a directory above it, or what is there went live just now
	}
	if err != nil {
		return err
	}
	w.changed[path.Dir(p)] = true

	isModule := func(n noted) bool { return n.mode == "160000" }
	if st.Mode&syscall.S_IFMT == syscall.S_IFDIR && slices.ContainsFunc(w.f.m.known[p], isModule) {
		_ = syscall.Rmdir(dir.path() + "/" + path.Base(p)) // unless somebody uses it
		return nil
	}
	out, err := w.out.to(path.Dir(p))
	if err != nil {
		return err
	}
	err = renameat2(dir, path.Base(p), out, path.Base(p), renameNoReplace)
	if err == syscall.ENOENT {
		return nil
	}
	return err
}

// removeEmpty removes the directories that held only what went; a link's own stays, for a mount of a removed
// directory shows nothing for ever.
func (w *swap) removeEmpty(want tree) {
	keep := map[string]bool{".": true}
	for _, l := range w.f.dirs {
		for p := l.link; !keep[p]; p = path.Dir(p) {
			keep[p] = true
		}
	}
	for p := range want {
		for p = path.Dir(p); !keep[p]; p = path.Dir(p) {
			keep[p] = true
		}
	}
	w.live.back(0)
	for _, p := range slices.Backward(w.f.m.paths) {
		for p = path.Dir(p); !keep[p]; p = path.Dir(p) {
			dir, err := w.live.to(path.Dir(p))
			if err != nil || syscall.Rmdir(dir.path()+"/"+path.Base(p)) != nil {
				continue
			}
			w.changed[path.Dir(p)] = true
			delete(w.changed, p)
		}
	}
}

// sync makes the changed names outlive a power cut.
func (w *swap) sync() error {
	w.live.back(0)
	for _, p := range slices.Sorted(maps.Keys(w.changed)) {
		dir, err := w.live.to(p)
		if err != nil {
			continue // somebody moved it away
		}
		if err := dir.sync("."); err != nil {
			return err
		}
	}
	return w.at.sync(".")
}

// clear looks at what came out in a publish, after every local shows its link: what is ours is thrown away,
// all else is kept, unread, below editsDir, and kept says where. Then the manifest of what is live is
// written.
func (f *files) clear(ctx context.Context) (kept []string, err error) {
	top, err := openOwn(f.dir)
	if err != nil {
		return nil, err
	}
	defer top.close()
	ours, err := top.below(ourDir)
	if err != nil {
		return nil, err
	}
	defer ours.close()

	s := &sorter{f: f, ours: ours}
	f.unknown = maxUnknown
	if err := s.all(ctx); err != nil {
		return s.kept, fmt.Errorf("look at what came out of %s: %w", f.dir, err)
	}
	if f.settled != nil {
		if err := f.settled.write(f.manifest); err != nil {
			return s.kept, err
		}
		f.m, f.settled, f.staged = f.settled, nil, nil
	}
	if err := f.prune(ctx, ours); err != nil && ctx.Err() == nil {
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
		if err := s.judge(ctx, lookedAt, any); err != nil {
			return err
		}
	}
	names, err := s.ours.names(maxEntries)
	for _, name := range names {
		if err != nil || !strings.HasPrefix(name, "publish") {
			continue
		}
		var dir place
		if dir, err = s.ours.below(name); err == nil {
			err = s.sort(ctx, dir, "")
			dir.close()
		}
		if err == nil {
			err = syscall.Rmdir(s.ours.path() + "/" + name)
		}
	}
	return err
}

// sort empties a directory that came out. Of directories only those are entered that have paths of ours.
func (s *sorter) sort(ctx context.Context, dir place, at string) error {
	names, err := dir.names(maxEntries)
	if err != nil {
		return err
	}
	for _, name := range names {
		if err := ctx.Err(); err != nil {
			return err
		}
		p := path.Join(at, name)
		st, err := dir.lstat(name)
		switch {
		case err != nil:
		case st.Mode&syscall.S_IFMT == syscall.S_IFDIR:
			err = s.folder(ctx, dir, name, p)
		default:
			// Where nobody else can reach it, for a directory that was live may still be open to somebody.
			if err = renameat2(dir, name, s.ours, lookedAt, 0); err == nil {
				err = s.judge(ctx, p, s.f.m.known[p])
			}
		}
		if err != nil && err != syscall.ENOENT {
			return err
		}
	}
	return nil
}

func (s *sorter) folder(ctx context.Context, parent place, name, p string) error {
	if anyBelow(s.f.m.paths, p) || len(s.f.m.known[p]) > 0 {
		dir, err := parent.below(name)
		if err != nil {
			return err
		}
		err = s.sort(ctx, dir, p)
		dir.close()
		if err == nil {
			err = syscall.Rmdir(parent.path() + "/" + name)
		}
		if err == nil || ctx.Err() != nil {
			return err
		}
	}
	return s.keep(parent, name, p)
}

// judge throws away what is looked at if it is ours, and keeps it as p if it is not.
func (s *sorter) judge(ctx context.Context, p string, known []noted) error {
	if s.f.throwAway(ctx, s.ours, lookedAt, known) {
		return nil
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	return s.keep(s.ours, lookedAt, p)
}

// throwAway removes a file that is one of known, if nobody has it open for writing. A read lease tells
// (fcntl(2), F_SETLEASE): it is refused while somebody can write, and is broken by who begins to. On a file
// system without leases nothing tells.
func (f *files) throwAway(ctx context.Context, dir place, name string, known []noted) bool {
	st, err := dir.lstat(name)
	kind := st.Mode & syscall.S_IFMT
	is := func(id string) bool {
		return slices.ContainsFunc(known, func(n noted) bool { return n.id == id && n.kind() == kind })
	}
	if err == nil && kind == syscall.S_IFLNK {
		id, err := linkID(dir, name, known)
		return err == nil && is(id) && syscall.Unlink(dir.path()+"/"+name) == nil
	}
	if err != nil || kind != syscall.S_IFREG || !f.mayRead(st.Size, known) {
		return false
	}

	file, st, err := dir.openFile(name)
	if err != nil {
		return false
	}
	defer file.Close()
	_, _, refused := syscall.Syscall(syscall.SYS_FCNTL, file.Fd(), fSetLease, syscall.F_RDLCK)
	if refused == syscall.EAGAIN {
		return false
	}
	id, err := fileID(ctx, file, st.Size, known)
	if err != nil || !is(id) {
		return false
	}
	lease, _, _ := syscall.Syscall(syscall.SYS_FCNTL, file.Fd(), fGetLease, 0)
	broken := refused == 0 && lease != syscall.F_RDLCK // somebody waits to write
	return !broken && syscall.Unlink(dir.path()+"/"+name) == nil
}

// keep renames a name of a directory into editsDir, as it is.
func (s *sorter) keep(dir place, name, p string) error {
	err := error(syscall.EEXIST)
	taken := func() bool { return err == syscall.EEXIST || err == syscall.ENOTDIR } // the name, by another one
	for try := 0; try < 3 && taken(); try++ {
		if s.into == "" || try > 0 {
			if s.into, err = nextEdits(s.ours); err != nil {
				break
			}
		}
		to := &descent{top: s.ours, make: makePrivate}
		var parent place
		if parent, err = to.to(path.Join("edits", s.into, path.Dir(p))); err == nil {
			err = renameat2(dir, name, parent, path.Base(p), renameNoReplace)
		}
		to.close()
	}
	if err != nil {
		return fmt.Errorf("keep %s: %w", p, err)
	}
	s.kept = append(s.kept, path.Join(s.f.dir, editsDir, s.into, p))
	return nil
}

// nextEdits names the next directory of editsDir.
func nextEdits(ours place) (string, error) {
	last := 0
	if edits, err := ours.below("edits"); err == nil {
		names, err := edits.names(maxEntries)
		edits.close()
		if err != nil {
			return "", err
		}
		for _, name := range names {
			number, _, _ := strings.Cut(name, "-")
			n, _ := strconv.Atoi(number)
			last = max(last, n)
		}
	}
	return fmt.Sprintf("%04d-%s", last+1, time.Now().UTC().Format(editsTime)), nil
}

const editsTime = "20060102T150405Z"

// prune removes edits that were kept long enough.
func (f *files) prune(ctx context.Context, ours place) error {
	edits, err := ours.below("edits")
	if err != nil {
		return nil // there never were any
	}
	defer edits.close()
	names, err := edits.names(maxEntries)
	slices.Sort(names)
	old := slices.DeleteFunc(names, func(name string) bool {
		_, at, _ := strings.Cut(name, "-")
		t, err := time.Parse(editsTime, at)
		return err != nil || time.Since(t) < editsAge
	})
	for _, name := range old[:max(0, len(old)-editsKept)] {
		// rm(1) copes with trees of any depth, and can be ended.
		cmd := exec.Command("rm", "-rf", "--", path.Join(f.dir, editsDir, name))
		p := program{name: "remove old edits", cmd: cmd, limit: localLimit}
		if _, err := execute(ctx, p); err != nil {
			return err
		}
	}
	return err
}
