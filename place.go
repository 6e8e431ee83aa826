package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"unsafe"
)

// Numbers that the syscall package lacks: open(2), renameat2(2), fcntl(2).
const (
	oPath         = 0x200000
	openFollowNot = oPath | syscall.O_NOFOLLOW | syscall.O_CLOEXEC
	readRegular   = syscall.O_RDONLY | syscall.O_NOFOLLOW | syscall.O_NONBLOCK | syscall.O_CLOEXEC
	createNew     = syscall.O_WRONLY | syscall.O_CREAT | syscall.O_EXCL | syscall.O_CLOEXEC // follows no link

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
	p, err := walkPlace(path, nil)
	if err != nil {
		return p, &fs.PathError{Op: "open", Path: path, Err: err}
	}
	return p, nil
}

// openOwn is openPlace for a directory of ours that nobody else can change, or replace by another one.
func openOwn(path string) (place, error) {
	p, err := openPlace(path)
	if err != nil {
		return p, err
	}
	if err = p.standsFast(); err == nil && !p.rootsAlone() {
		err = fmt.Errorf("%s can be changed by others than root", path)
	}
	if err != nil {
		p.close()
		return place{-1}, brokenError{err}
	}
	return p, nil
}

// standsFast is an error where somebody else could put another directory in the place's: it and all above it must be
// root's, and where others can write, the sticky bit must keep them from renaming what is root's.
func (p place) standsFast() error {
	real, err := os.Readlink(p.path())
	at := "/"
	for _, name := range append([]string{""}, pathParts(real)...) {
		if at = filepath.Join(at, name); err == nil {
			err = isOwn(at)
		}
	}
	var a, b syscall.Stat_t
	err = errors.Join(err, syscall.Fstat(p.fd, &a), syscall.Lstat(real, &b))
	if err == nil && (a.Dev != b.Dev || a.Ino != b.Ino) {
		err = fmt.Errorf("%s was replaced just now", real)
	}
	return err
}

// isOwn is an error where others can rename what is root's in a directory.
func isOwn(dir string) error {
	var st syscall.Stat_t
	if err := syscall.Lstat(dir, &st); err != nil {
		return &fs.PathError{Op: "lstat", Path: dir, Err: err}
	}
	isOurs := st.Uid == 0 || int(st.Uid) == os.Getuid()
	isShared := st.Mode&0o022 != 0
	isSticky := st.Mode&syscall.S_ISVTX != 0
	if isOurs && (isSticky || !isShared) {
		return nil
	}
	return fmt.Errorf("%s can be changed by others than root (user %d, mode %04o): "+
		"checkouts can't lie there: chown root and chmod go-w it, or use another mount", dir, st.Uid, st.Mode&0o7777)
}

// makePlace is openPlace that makes what is missing: parents belong to root, mode 0755, the last component (a
// directory, or an empty file) to a, but only in a directory that others can't write: elsewhere it stays
// root's.
func makePlace(path string, k kind, a account) (place, error) {
	p, err := walkPlace(path, func(parent place, name string, last bool) error {
		if last {
			return parent.make(name, k, a)
		}
		return parent.make(name, aDirectory, account{uid: os.Getuid(), gid: os.Getgid()})
	})
	if err != nil {
		return p, &fs.PathError{Op: "make", Path: path, Err: err}
	}
	return p, nil
}

// walkPlace descends from the root directory, component by component; missing, unless nil, makes one that is
// not there.
func walkPlace(to string, missing func(parent place, name string, last bool) error) (p place, err error) {
	if p, err = placeAt(-1, "/"); err != nil {
		return p, err
	}
	defer func() {
		if err != nil {
			p.close()
		}
	}()

	trusted, links := true, 0
	rest := pathParts(to)
	for len(rest) > 0 {
		name := rest[0]
		rest = rest[1:]
		trusted = trusted && p.rootsAlone()

		next, err := placeAt(p.fd, name)
		if missing != nil && err == syscall.ENOENT {
			if err = missing(p, name, len(rest) == 0); err == nil {
				next, err = placeAt(p.fd, name)
			}
		}
		if err != nil {
			return p, err
		}
		if next.kind() != syscall.S_IFLNK {
			p.close()
			p = next
			continue
		}

		next.close()
		at, err := os.Readlink(p.path() + "/" + name)
		if links++; links > 40 {
			err = syscall.ELOOP
		}
		if err == nil && !trusted {
			err = fmt.Errorf("%q is a symbolic link below a directory that others than root can write: "+
				"name the directory it points to", name)
		}
		if err != nil {
			return p, err
		}

		// Everything above is root's alone, so it can't change under our feet.
		rest = append(pathParts(at), rest...)
		if filepath.IsAbs(at) {
			p.close()
			if p, err = placeAt(-1, "/"); err != nil {
				return p, err
			}
		}
	}
	return p, nil
}

// pathParts returns the components of a path.
func pathParts(path string) []string {
	return slices.DeleteFunc(strings.Split(path, "/"), func(c string) bool { return c == "" || c == "." })
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
	return err == nil && st.Uid == 0 && st.Mode&0o022 == 0
}

// below opens a path below p, following no symbolic link on the way or at its end.
func (p place) below(rel string) (place, error) {
	at, err := placeAt(p.fd, ".")
	if err != nil {
		return at, &fs.PathError{Op: "open", Path: rel, Err: err}
	}
	for _, name := range pathParts(rel) {
		next, err := placeAt(at.fd, name)
		at.close()
		if err == nil && next.kind() == syscall.S_IFLNK {
			next.close()
			err = syscall.ELOOP
		}
		if err != nil {
			return place{-1}, &fs.PathError{Op: "open", Path: rel, Err: err}
		}
		at = next
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

// renameat2 moves a name of one directory to a name of another one: see renameat2(2) for the flags.
func renameat2(from place, a string, to place, b string, flags uintptr) error {
	// The syscall package has no number for it: these are of asm-generic/unistd.h and the kernel's tables.
	number, ok := map[string]uintptr{
		"amd64": 316, "386": 353, "arm": 382, "ppc64": 357, "ppc64le": 357, "s390x": 347,
		"arm64": 276, "riscv64": 276, "loong64": 276,
	}[runtime.GOARCH]
	if !ok {
		return syscall.ENOSYS
	}

	pa, err1 := syscall.BytePtrFromString(a)
	pb, err2 := syscall.BytePtrFromString(b)
	if err := errors.Join(err1, err2); err != nil {
		return err
	}
	_, _, e := syscall.Syscall6(number, uintptr(from.fd), uintptr(unsafe.Pointer(pa)),
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
	names []string // of the directories that are open below top
	open  []place
	dir   string // what was asked for last
	stuck string // the first component of dir that is missing or no directory
	err   error  // why
	make  func(parent place, name, path string) error
}

// to opens a directory, relative to the top. Its error is ENOENT, ENOTDIR or ELOOP where it is not there, or
// not a directory. The place is good until the next call.
func (d *descent) to(dir string) (place, error) {
	if dir != d.dir {
		d.walk(dir)
	}
	if d.err != nil {
		return d.top, d.err
	}
	return d.at(), nil
}

func (d *descent) at() place {
	if len(d.open) == 0 {
		return d.top
	}
	return d.open[len(d.open)-1]
}

func (d *descent) walk(dir string) {
	names := pathParts(dir)
	same := 0
	for same < min(len(names), len(d.names)) && names[same] == d.names[same] {
		same++
	}
	d.back(same)
	d.dir, d.stuck, d.err = dir, "", nil

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
			d.stuck, d.err = path, err
			return
		}
		d.names, d.open = append(d.names, name), append(d.open, place{fd})
	}
}

// back closes all but the first n directories.
func (d *descent) back(n int) {
	for _, p := range d.open[n:] {
		p.close()
	}
	d.names, d.open, d.dir, d.err = d.names[:n], d.open[:n], ".", nil
	if n > 0 {
		d.dir = strings.Join(d.names, "/")
	}
}

func (d *descent) close() { d.back(0) }

// names returns what is in a directory, an error if that is more than limit.
func (p place) names(limit int) ([]string, error) {
	fd, err := syscall.Openat(p.fd, ".", syscall.O_RDONLY|syscall.O_DIRECTORY|syscall.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	dir := os.NewFile(uintptr(fd), "directory")
	defer dir.Close()

	var names []string
	for {
		more, err := dir.Readdirnames(1000)
		names = append(names, more...)
		if err == io.EOF {
			return names, nil
		}
		if err == nil && len(names) > limit {
			err = fmt.Errorf("more than %d entries", limit)
		}
		if err != nil {
			return names, err
		}
	}
}

// notThere says that an error means that there is no such path, or something else in its way.
func notThere(err error) bool {
	return slices.Contains([]error{syscall.ENOENT, syscall.ENOTDIR, syscall.ELOOP}, err)
}

// lstat is lstat(2) of a name in a directory that is held.
func (p place) lstat(name string) (st syscall.Stat_t, err error) {
	err = syscall.Lstat(p.path()+"/"+name, &st)
	return st, err
}

// openFile opens a regular file that others may have replaced by anything, be it a link or a pipe.
func (p place) openFile(name string) (*os.File, syscall.Stat_t, error) {
	var st syscall.Stat_t
	fd, err := syscall.Openat(p.fd, name, readRegular, 0)
	if err != nil {
		return nil, st, err
	}
	err = syscall.Fstat(fd, &st)
	if err == nil && st.Mode&syscall.S_IFMT != syscall.S_IFREG {
		err = syscall.EINVAL
	}
	if err != nil {
		syscall.Close(fd)
		return nil, st, err
	}
	return os.NewFile(uintptr(fd), name), st, nil
}

// sync syncs a file or directory that nobody else can have put there.
func (p place) sync(name string) error {
	fd, err := syscall.Openat(p.fd, name, readRegular, 0)
	if err != nil {
		return err
	}
	defer syscall.Close(fd)
	return syscall.Fsync(fd)
}

func makePrivate(parent place, name, _ string) error { return syscall.Mkdirat(parent.fd, name, 0o700) }
