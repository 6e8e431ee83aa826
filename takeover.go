//go:build linux

package main

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
)

// takeDirectory makes the service's directory, root's down to the links. One that is not so (an older
// gitopper's checkout, another user's, something planted) makes place for a new one, into which links that
// are the account's are moved, each by one rename that mounts follow; it is kept whole beside it, and nothing
// of it is opened.
func (f *files) takeDirectory() error {
	top, err := makePlace(f.dir, aDirectory, account{uid: os.Getuid(), gid: os.Getgid()})
	if err != nil {
		return err
	}
	defer top.close()

	parent, err := openSteady(filepath.Dir(f.dir))
	if err != nil {
		return err
	}
	defer parent.close()

	base := filepath.Base(f.dir)
	if !f.isLaidOut(top) {
		err = f.layOutAnew(parent, base, top)
	}
	if err == nil {
		err = except(f.takeOver(parent, base), syscall.ENOENT)
	}
	if err != nil {
		return fmt.Errorf("lay %s out anew: %w", f.dir, err)
	}
	return nil
}

// startAnew notes that what is live is to be published anew: what a new directory lacks is nobody's edit.
func (f *files) startAnew() error {
	m := f.load()
	if m.live == (version{}) || m.pending() {
		return nil
	}
	f.m = m.begin(m.live, nil)
	return f.m.write(f.manifest)
}

// isFresh says whether a directory is an empty one of root's.
func isFresh(top place) bool {
	names, err := top.names(1)
	return err == nil && len(names) == 0 && top.rootsAlone()
}

// isLaidOut says whether a directory is ours to work in.
func (f *files) isLaidOut(top place) bool {
	if !top.rootsAlone() {
		return false
	}

	ours, err := top.below(ourDir)
	if err != nil {
		return false
	}
	defer ours.close()
	if !ours.isRootsDir() {
		return false
	}

	at := &descent{top: top}
	defer at.close()
	for _, l := range f.outerLinks() {
		dir, err := at.to(path.Dir(l.link))
		if err != nil {
			continue
		}
		isShared := func(p place) bool { return !p.rootsAlone() }
		st, _ := dir.lstat(path.Base(l.link))
		isLink := isDir(st) && l.kind == aDirectory
		isOthers := isLink && int(st.Uid) != f.acct.uid
		if isOthers || slices.ContainsFunc(at.open, isShared) {
			return false
		}
	}
	return true
}

// goesOn says whether a directory is worked in as it is, and not laid out anew.
func (f *files) goesOn(top place) bool { return isFresh(top) || f.isLaidOut(top) }

// outerLinks returns the links that lie in no other link.
func (f *files) outerLinks() []dir {
	return slices.DeleteFunc(slices.Clone(f.dirs), func(d dir) bool {
		return slices.ContainsFunc(f.dirs, func(o dir) bool { return strings.HasPrefix(d.link, o.link+"/") })
	})
}

// layOutAnew makes top, base of parent, the service's: as it is where it is an empty one of root's, else by
// exchange with a new one, base.new, which is the old one from then on.
func (f *files) layOutAnew(parent place, base string, top place) error {
	if err := f.startAnew(); err != nil {
		return err
	}
	if isFresh(top) {
		return syscall.Mkdirat(top.fd, ourDir, 0o700)
	}

	name := base + ".new"
	if st, err := parent.lstat(name); err == nil && st.Uid != 0 { // somebody planted it
		if err := f.setAside(parent, name, base); err != nil {
			return err
		}
	}

	fresh, err := makePlace(f.dir+".new", aDirectory, account{uid: os.Getuid(), gid: os.Getgid()})
	if err != nil {
		return err
	}
	defer fresh.close()
	if !fresh.rootsAlone() {
		return fmt.Errorf("somebody replaced %s", name)
	}
	if err := except(syscall.Mkdirat(fresh.fd, ourDir, 0o700), syscall.EEXIST); err != nil {
		return err
	}
	return renameat2(parent, base, parent, name, renameExchange)
}

// takeOver moves the account's links, and checkouts that nest there, from the old directory, base.new of
// parent, to the new one, and lays the rest of it aside; ENOENT where there is none. It can be cut short
// anywhere.
func (f *files) takeOver(parent place, base string) error {
	old, err := placeAt(parent.fd, base+".new")
	if err != nil {
		return err
	}
	defer old.close()

	fresh, err := placeAt(parent.fd, base)
	if err != nil {
		return err
	}
	defer fresh.close()

	for _, l := range f.outerLinks() {
		if err := moveOver(old, fresh, l.link, f.isUsers(l.kind)); err != nil {
			return fmt.Errorf("move %s: %w", l.link, err)
		}
	}
	for _, n := range f.nested {
		if err := moveOver(old, fresh, strings.TrimPrefix(n, f.dir+"/"), isDir); err != nil {
			return fmt.Errorf("move %s: %w", n, err)
		}
	}

	if err := fresh.sync("."); err != nil {
		return err
	}
	return f.setAside(parent, base+".new", base)
}

// isUsers says of what is found at a link whether it is the user's, and of the right kind.
func (f *files) isUsers(k kind) func(syscall.Stat_t) bool {
	mode := map[kind]uint32{aDirectory: syscall.S_IFDIR, aFile: syscall.S_IFREG}[k]
	return func(st syscall.Stat_t) bool {
		return st.Mode&syscall.S_IFMT == mode && int(st.Uid) == f.acct.uid
	}
}

// moveOver moves a path from the old directory to the new one, where it is what fits says; else it stays.
func moveOver(old, fresh place, rel string, fits func(syscall.Stat_t) bool) error {
	from := &descent{top: old}
	defer from.close()
	dir, err := from.to(path.Dir(rel))
	if err != nil {
		return nil // not there
	}

	name := path.Base(rel)
	if st, err := dir.lstat(name); err != nil || !fits(st) {
		return nil
	}

	to := &descent{top: fresh, make: func(parent place, name, _ string) error {
		return syscall.Mkdirat(parent.fd, name, 0o755)
	}}
	defer to.close()
	into, err := to.to(path.Dir(rel))
	if err != nil {
		return err
	}

	err = renameat2(dir, name, into, name, renameNoReplace)
	if err == syscall.EEXIST { // moved before; what lies here was made since
		return nil
	}
	if err != nil {
		return err
	}

	if st, err := into.lstat(name); err != nil || !fits(st) {
		back := renameat2(into, name, dir, name, renameNoReplace)
		return errors.Join(errors.New("somebody replaced it"), err, back)
	}
	return nil
}

// setAside renames what is in our way to base.before, or .before.2 and so on.
func (f *files) setAside(parent place, name, base string) error {
	to := base + ".before"
	for i := 2; i < 10_000; i++ {
		err := renameat2(parent, name, parent, to, renameNoReplace)
		if err == nil {
			slog.Warn(fmt.Sprintf("%s: laid out anew, what was there as %s is kept beside it as %s",
				f.dir, base, to))
		}
		if err != syscall.EEXIST {
			return err
		}
		to = fmt.Sprintf("%s.before.%d", base, i)
	}
	return fmt.Errorf("%s.before.*: %w", f.dir, fs.ErrExist)
}
