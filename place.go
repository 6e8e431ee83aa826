//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"unsafe"
)

// Numbers that the syscall package lacks: open(2), openat2(2), renameat2(2), fcntl(2).
const (
	oPath         = 0x200000
	openFollowNot = oPath | syscall.O_NOFOLLOW | syscall.O_CLOEXEC
	readRegular   = syscall.O_RDONLY | syscall.O_NOFOLLOW | syscall.O_NONBLOCK | syscall.O_CLOEXEC
	createNew     = syscall.O_WRONLY | syscall.O_CREAT | syscall.O_EXCL | syscall.O_CLOEXEC // follows no link

	atSymlinkNoFollow = 0x100
	sysOpenat2        = 437
	resolveNoSymlinks = 0x4

	renameNoReplace = 1
	renameExchange  = 2
	fSetLease       = 1024
	fGetLease       = 1025
)

// place is a directory or file opened as a place (O_PATH), such that what is done through it reaches exactly
// that, whatever becomes of its name.
type place struct{ fd int }

// openPlace opens an absolute path. Below the first directory that someone other than root can write no
// component may be a symbolic link: its owner could send root anywhere.
func openPlace(path string) (place, error) {
	return walkPlace(path, func(place) error { return nil }, nil)
}

// openSteady is openPlace for a directory that nobody but root can replace by another one.
func openSteady(path string) (place, error) { return walkPlace(path, place.isSteady, nil) }

// openOwn is openSteady for a directory of ours in which nobody but root can change anything.
func openOwn(path string) (place, error) {
	p, err := openSteady(path)
	if err == nil && !p.rootsAlone() {
		st, _ := p.stat()
		p.close()
		return place{-1}, isShared(path, st)
	}
	return p, err
}

// isSteady is an error where others can rename what is root's in a directory: it must be root's, and where
// others can write, the sticky bit must keep them from that.
func (p place) isSteady() error {
	st, err := p.stat()
	if err != nil {
		return err
	}

	isOpen := st.Mode&0o022 != 0 && st.Mode&syscall.S_ISVTX == 0
	if st.Uid != 0 || isOpen {
		at, _ := os.Readlink(p.path())
		return isShared(at, st)
	}
	return nil
}

func isShared(dir string, st syscall.Stat_t) error {
	return brokenError{fmt.Errorf("%s can be changed by others than root (user %d, mode %04o): "+
		"checkouts can't lie there: chown root and chmod go-w it, or use another mount",
		dir, st.Uid, st.Mode&0o7777)}
}

// makePlace is openPlace that makes what is missing: parents belong to root, mode 0755, the last component (a
// directory, or an empty file) to a, but only in a directory that others can't write: elsewhere it stays
// root's.
func makePlace(path string, k kind, a account) (place, error) {
	missing := func(parent place, name string, last bool) error {
		if last {
			return parent.make(name, k, a)
		}
		return parent.make(name, aDirectory, account{uid: os.Getuid(), gid: os.Getgid()})
	}
	return walkPlace(path, func(place) error { return nil }, missing)
}

// walkPlace descends from the root directory, component by component. check looks at each directory on the
// way, and the place itself; missing, unless nil, makes one that is not there.
func walkPlace(to string, check func(place) error,
	missing func(parent place, name string, last bool) error) (place, error) {
	trusted, links := true, 0
	rest := pathParts(to)
	p, err := placeAt(-1, "/")
	for err == nil {
		if trusted {
			trusted = p.rootsAlone()
		}
		if err = check(p); err != nil || len(rest) == 0 {
			break
		}

		name := rest[0]
		rest = rest[1:]
		var next place
		next, err = placeAt(p.fd, name)
		if makes := missing != nil; makes && err == syscall.ENOENT {
			err = except(missing(p, name, len(rest) == 0), syscall.EEXIST) // made by another service just now
			if err == nil {
				next, err = placeAt(p.fd, name)
			}
		}

		if err == nil && next.kind() == syscall.S_IFLNK {
			next.close()
			var target []string
			if next, target, err = p.follow(name, trusted); links > 40 {
				err = syscall.ELOOP
			}
			rest, links = append(target, rest...), links+1
		}

		p.close()
		p = next
	}
	if err != nil {
		p.close()
		return place{-1}, &fs.PathError{Op: "open", Path: to, Err: err}
	}
	return p, nil
}

// follow opens the directory from which a symbolic link leads on, and returns the path from there. Where all
// above it is trusted it can't change under our feet.
func (p place) follow(name string, trusted bool) (place, []string, error) {
	if !trusted {
		return place{-1}, nil, fmt.Errorf("%q is a symbolic link below a directory that others than root "+
			"can write: name the directory it points to", name)
	}

	to, err := os.Readlink(p.path() + "/" + name)
	if err != nil {
		return place{-1}, nil, err
	}
	start := "."
	if filepath.IsAbs(to) {
		start = "/"
	}
	from, err := placeAt(p.fd, start)
	return from, pathParts(to), err
}

// pathParts returns the components of a path.
func pathParts(path string) []string {
	isNone := func(c string) bool { return slices.Contains([]string{"", "."}, c) }
	return slices.DeleteFunc(strings.Split(path, "/"), isNone)
}

// placeAt opens one component, and itself where that is a symbolic link.
func placeAt(dir int, name string) (place, error) {
	fd, err := syscall.Openat(dir, name, openFollowNot, 0)
	return place{fd}, err
}

// make makes an empty directory or file of that name, and gives it to a where nobody else can write in p.
func (p place) make(name string, k kind, a account) error {
	if k == aDirectory {
		if err := syscall.Mkdirat(p.fd, name, 0o755); err != nil {
			return err
		}
	} else {
		fd, err := syscall.Openat(p.fd, name, createNew, 0o644)
		if err != nil {
			return err
		}
		syscall.Close(fd)
	}

	if !p.rootsAlone() {
		return nil
	}
	return os.Lchown(p.path()+"/"+name, a.uid, a.gid)
}

// rootsAlone says that nobody but root can change what is in the directory.
func (p place) rootsAlone() bool {
	st, err := p.stat()
	isRoots := err == nil && st.Uid == 0
	return isRoots && st.Mode&0o022 == 0
}

// isRootsDir says that the place is a directory in which nobody but root can change anything.
func (p place) isRootsDir() bool { return p.kind() == syscall.S_IFDIR && p.rootsAlone() }

// isDir says of what stat(2) found whether it is a directory.
func isDir(st syscall.Stat_t) bool { return st.Mode&syscall.S_IFMT == syscall.S_IFDIR }

// below opens a path below p, following no symbolic link on the way or at its end.
func (p place) below(rel string) (at place, err error) {
	way := &descent{top: p}
	defer way.close()

	dir, err := way.to(path.Dir(rel))
	if err == nil {
		at, err = placeAt(dir.fd, path.Base(rel))
	}
	if err == nil && at.kind() == syscall.S_IFLNK {
		at.close()
		err = syscall.ELOOP
	}
	if err != nil {
		return place{-1}, &fs.PathError{Op: "open", Path: rel, Err: err}
	}
	return at, nil
}

// path names the place such that system calls which take a path reach exactly what it holds. See
// proc_pid_fd(5).
func (p place) path() string { return "/proc/self/fd/" + strconv.Itoa(p.fd) }

func (p place) stat() (st syscall.Stat_t, err error) {
	err = syscall.Fstat(p.fd, &st)
	return st, err
}

// kind returns the type bits of the place's mode, 0 where they can't be had.
func (p place) kind() uint32 {
	st, _ := p.stat()
	return st.Mode & syscall.S_IFMT
}

func (p place) close() { syscall.Close(p.fd) }

// numbers are those of system calls that the syscall package lacks, of asm-generic/unistd.h and the kernel's
// tables; 0: we don't know it.
var numbers = map[string]struct{ renameat2, fstatat, syncfs uintptr }{
	"amd64": {316, 262, 306}, "arm64": {276, 79, 267}, "riscv64": {276, 79, 267}, "loong64": {276, 0, 267},
	"386": {353, 0, 344}, "arm": {382, 0, 373}, "s390x": {347, 0, 338},
	"ppc64": {357, 0, 348}, "ppc64le": {357, 0, 348},
}[runtime.GOARCH]

// renameat2 moves a name of one directory to a name of another one: see renameat2(2) for the flags.
func renameat2(from place, a string, to place, b string, flags uintptr) error {
	if numbers.renameat2 == 0 {
		return syscall.ENOSYS
	}
	pa, err1 := syscall.BytePtrFromString(a)
	pb, err2 := syscall.BytePtrFromString(b)
	if err := errors.Join(err1, err2); err != nil {
		return err
	}

	_, _, e := syscall.Syscall6(numbers.renameat2, uintptr(from.fd), uintptr(unsafe.Pointer(pa)),
		uintptr(to.fd), uintptr(unsafe.Pointer(pb)), flags, 0)
	if e != 0 {
		return e
	}
	return nil
}

// descent walks down from a place to one directory after another; what two of them have in common is opened
// once. Everything on the way is held by descriptor, so that nobody can lead it elsewhere.
type descent struct {
	top   place
	last  string   // path of the last that is open
	names []string // of the directories on the way there, below top
	open  []place  // -1: it was passed by, see jump
	stuck string   // the first component that is missing or no directory, of what was asked for last
	make  func(parent place, name, path string) error
}

// to opens a directory, relative to the top. Its error is ENOENT, ENOTDIR or ELOOP where it is not there, or
// not a directory. The place is good until the next call.
func (d *descent) to(dir string) (place, error) {
	if isThere := dir != "" && dir == d.last; isThere {
		return d.at(), nil
	}

	names := pathParts(dir)
	same := 0
	for same < min(len(names), len(d.names)) && names[same] == d.names[same] {
		same++
	}
	d.back(same)
	same = len(d.names)

	if d.jump(names[same:]) {
		d.last = dir
		return d.at(), nil
	}

	for i, name := range names[same:] {
		path := strings.Join(names[:same+i+1], "/")
		const flags = openFollowNot | syscall.O_DIRECTORY
		fd, err := syscall.Openat(d.at().fd, name, flags, 0)
		if err == syscall.ENOENT && d.make != nil {
			if err = d.make(d.at(), name, path); err == nil {
				fd, err = syscall.Openat(d.at().fd, name, flags, 0)
			}
		}
		if err != nil {
			d.stuck = path
			return d.top, err
		}
		d.names, d.open = append(d.names, name), append(d.open, place{fd})
	}
	d.last = dir
	return d.at(), nil
}

// jump opens a directory some levels down in one go, where the kernel can (openat2(2), since Linux 5.6) and
// nothing is in the way: a round does this for each directory of each service.
func (d *descent) jump(names []string) bool {
	at, err := syscall.BytePtrFromString(strings.Join(names, "/"))
	if err != nil || len(names) < 2 {
		return false
	}

	how := [3]uint64{openFollowNot | syscall.O_DIRECTORY, 0, resolveNoSymlinks}
	fd, _, e := syscall.Syscall6(sysOpenat2, uintptr(d.at().fd), uintptr(unsafe.Pointer(at)),
		uintptr(unsafe.Pointer(&how)), unsafe.Sizeof(how), 0, 0)
	if e != 0 {
		return false
	}

	for range names[1:] {
		d.open = append(d.open, place{-1})
	}
	d.names, d.open = append(d.names, names...), append(d.open, place{int(fd)})
	return true
}

func (d *descent) at() place {
	if len(d.open) == 0 {
		return d.top
	}
	return d.open[len(d.open)-1]
}

// back closes all but the first n directories, and forgets of these the last ones that were passed by.
func (d *descent) back(n int) {
	d.last = ""
	for i, p := range slices.Backward(d.open) {
		isOpen := p.fd >= 0
		if i < n && isOpen {
			return
		}
		if isOpen {
			p.close()
		}
		d.names, d.open = d.names[:i], d.open[:i]
	}
}

func (d *descent) close() { d.back(0) }

// names returns what is in a directory, an error if that is more than limit.
func (p place) names(limit int) ([]string, error) {
	dir, err := os.OpenFile(p.path(), os.O_RDONLY|syscall.O_DIRECTORY, 0) // no pipe, which would hang us
	if err != nil {
		return nil, err
	}
	defer dir.Close()

	names, err := dir.Readdirnames(limit + 1)
	switch {
	case err == io.EOF:
		return nil, nil
	case len(names) > limit:
		err = fmt.Errorf("more than %d entries", limit)
	}
	return names, err
}

// noPath are the errors which mean that there is no such path, or something else in its way.
var noPath = []error{syscall.ENOENT, syscall.ENOTDIR, syscall.ELOOP}

func notThere(err error) bool { return slices.Contains(noPath, err) }

// lstat is lstat(2) of a name in a directory that is held.
func (p place) lstat(name string) (st syscall.Stat_t, err error) {
	// The way through /proc takes six times as long, and a round does this for each file of each service.
	if numbers.fstatat == 0 {
		return st, syscall.Lstat(p.path()+"/"+name, &st)
	}

	at, err := syscall.BytePtrFromString(name)
	if err != nil {
		return st, err
	}
	_, _, e := syscall.Syscall6(numbers.fstatat, uintptr(p.fd), uintptr(unsafe.Pointer(at)),
		uintptr(unsafe.Pointer(&st)), atSymlinkNoFollow, 0, 0)
	if e != 0 {
		return st, e
	}
	return st, nil
}

// openFile opens a regular file that others may have replaced by anything, be it a link or a pipe.
func (p place) openFile(name string) (file place, st syscall.Stat_t, err error) {
	fd, err := syscall.Openat(p.fd, name, readRegular, 0)
	if err != nil {
		return place{-1}, st, err
	}

	file = place{fd}
	st, err = file.stat()
	if err == nil && st.Mode&syscall.S_IFMT != syscall.S_IFREG {
		err = syscall.EINVAL
	}
	if err != nil {
		file.close()
		return place{-1}, st, err
	}
	return file, st, nil
}

// Read reads a regular file that was opened for it, without what an *os.File costs.
func (p place) Read(b []byte) (int, error) {
	n, err := syscall.Read(p.fd, b)
	for err == syscall.EINTR {
		n, err = syscall.Read(p.fd, b)
	}
	if n == 0 && err == nil && len(b) > 0 {
		err = io.EOF
	}
	return max(n, 0), err
}

// Write writes to a regular file that was opened for it.
func (p place) Write(b []byte) (done int, err error) {
	for done < len(b) {
		n, err := syscall.Write(p.fd, b[done:])
		if except(err, syscall.EINTR) != nil {
			return done, err
		}
		done += max(n, 0)
	}
	return done, nil
}

// sync syncs a file or directory that nobody else can have put there.
func (p place) sync(name string) error {
	fd, err := syscall.Openat(p.fd, name, readRegular, 0)
	if err != nil {
		return err
	}
	return errors.Join(syscall.Fsync(fd), syscall.Close(fd))
}

// A few files are synced side by side, so that they share what the disk does for them. Where there are many,
// syncfs(2) writes all of them first, with what others have to write as well, in a twentieth of the time.
const (
	syncsAtOnce = 8
	manySyncs   = 64
)

// sync makes paths outlive a power cut. What is not there is left out. That the disk failed to write one is
// told by its own fsync(2), for syncfs tells it only from Linux 5.8 on.
func (d *descent) sync(paths []string) error {
	if isMany := len(paths) > manySyncs; isMany && numbers.syncfs != 0 {
		fd, err := syscall.Openat(d.top.fd, ".", readRegular|syscall.O_DIRECTORY, 0)
		if err != nil {
			return err
		}
		_, _, _ = syscall.Syscall(numbers.syncfs, uintptr(fd), 0, 0)
		syscall.Close(fd)
	}

	results, room := make(chan error, len(paths)), make(chan struct{}, syncsAtOnce)
	for _, p := range paths {
		room <- struct{}{}
		parent, name := path.Split(p)
		dir, err := d.to(parent)
		fd := -1
		if err == nil {
			fd, err = syscall.Openat(dir.fd, name, readRegular, 0)
		}
		if err != nil {
			results <- except(err, noPath...)
			<-room
			continue
		}
		go func() {
			results <- errors.Join(syscall.Fsync(fd), syscall.Close(fd))
			<-room
		}()
	}
	var err error
	for range paths {
		err = errors.Join(err, <-results)
	}
	return err
}

// except returns err, nil where it is one of those that are fine.
func except(err error, fine ...error) error {
	if slices.Contains(fine, err) {
		return nil
	}
	return err
}

// wentWrong says that something failed by itself, and not because ctx has ended.
func wentWrong(ctx context.Context, err error) bool { return err != nil && ctx.Err() == nil }

// isOrLacks says that there is no error but that a file is missing.
func isOrLacks(err error) bool { return err == nil || errors.Is(err, fs.ErrNotExist) }

func makePrivate(parent place, name, _ string) error { return syscall.Mkdirat(parent.fd, name, 0o700) }
