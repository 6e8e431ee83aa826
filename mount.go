package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
	"unsafe"
)

// Numbers and flags that the syscall package lacks: open(2), open_tree(2), move_mount(2).
const (
	oPath          = 0x200000
	atEmptyPath    = 0x1000
	sysOpenTree    = 428
	sysMoveMount   = 429
	openTreeClone  = 0x1
	moveMountFds   = 0x4 | 0x40 // both paths empty: from and to are the descriptors themselves
	moveMountBelow = 0x200
)

// openBelow opens name below the directory fd dir as a place (O_PATH), following no symbolic link on the way.
func openBelow(dir int, name string) (int, error) {
	fd, err := syscall.Openat(dir, ".", oPath|syscall.O_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	for _, c := range strings.Split(name, "/") {
		next, err := syscall.Openat(fd, c, oPath|syscall.O_NOFOLLOW|syscall.O_CLOEXEC, 0)
		syscall.Close(fd)
		if err != nil {
			return -1, &fs.PathError{Op: "open", Path: name, Err: err}
		}
		fd = next
	}
	var st syscall.Stat_t
	if err := syscall.Fstat(fd, &st); err != nil || st.Mode&syscall.S_IFMT == syscall.S_IFLNK {
		syscall.Close(fd)
		return -1, &fs.PathError{Op: "open", Path: name, Err: cmp.Or(err, error(syscall.ELOOP))}
	}
	return fd, nil
}

// openTarget opens local, an absolute path, as a place (O_PATH) to mount on. Below the first directory that someone other
// than root can write, no component may be a symbolic link: its owner could send root's mount anywhere. With make, what is
// missing is made: parents belong to root, mode 0755, the last component (a directory, or an empty file) to uid and gid.
func openTarget(local string, file, make bool, uid, gid int) (_ int, err error) {
	fd, err := syscall.Open("/", oPath|syscall.O_DIRECTORY|syscall.O_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	defer func() {
		if err != nil {
			syscall.Close(fd)
			err = &fs.PathError{Op: "mount target", Path: local, Err: err}
		}
	}()
	at, trusted, links := "/", true, 0
	rest := strings.Split(path.Clean(local), "/")
	for len(rest) > 0 {
		c := rest[0]
		if rest = rest[1:]; c == "" || c == "." {
			continue
		}
		var st syscall.Stat_t
		if err := syscall.Fstat(fd, &st); err != nil {
			return -1, err
		}
		trusted = trusted && st.Uid == 0 && st.Mode&0o022 == 0
		next, err := syscall.Openat(fd, c, oPath|syscall.O_NOFOLLOW|syscall.O_CLOEXEC, 0)
		if err == syscall.ENOENT && make {
			if err = makeAt(fd, c, file && len(rest) == 0); err == nil {
				next, err = syscall.Openat(fd, c, oPath|syscall.O_NOFOLLOW|syscall.O_CLOEXEC, 0)
			}
			if err == nil && len(rest) == 0 && (uid != os.Getuid() || gid != os.Getgid()) {
				if err = giveAway(next, file, uid, gid); err != nil {
					syscall.Close(next)
				}
			}
		}
		if err != nil {
			return -1, err
		}
		if err := syscall.Fstat(next, &st); err != nil {
			syscall.Close(next)
			return -1, err
		}
		if st.Mode&syscall.S_IFMT == syscall.S_IFLNK {
			syscall.Close(next)
			to, err := os.Readlink(fdPath(fd) + "/" + c)
			if links++; err == nil && links > 40 {
				err = syscall.ELOOP
			}
			if err == nil && !trusted {
				err = fmt.Errorf("%s is a symbolic link below a directory that others than root can write: name the directory it points to", path.Join(at, c))
			}
			if err != nil {
				return -1, err
			}
			// Everything above is root's alone, so it can't change under our feet.
			rest = append(strings.Split(to, "/"), rest...)
			if path.IsAbs(to) {
				syscall.Close(fd)
				if fd, err = syscall.Open("/", oPath|syscall.O_DIRECTORY|syscall.O_CLOEXEC, 0); err != nil {
					return -1, err
				}
				at = "/"
			}
			continue
		}
		syscall.Close(fd)
		fd, at = next, path.Join(at, c)
	}
	return fd, nil
}

func makeAt(dir int, name string, file bool) error {
	if !file {
		return syscall.Mkdirat(dir, name, 0o755)
	}
	fd, err := syscall.Openat(dir, name, syscall.O_WRONLY|syscall.O_CREAT|syscall.O_EXCL|syscall.O_NOFOLLOW|syscall.O_CLOEXEC, 0o644)
	if err == nil {
		syscall.Close(fd)
	}
	return err
}

// giveAway gives what was just made to uid and gid, unless the owner of its directory has put something else in its place.
func giveAway(fd int, file bool, uid, gid int) error {
	var st syscall.Stat_t
	if err := syscall.Fstat(fd, &st); err != nil {
		return err
	}
	if int(st.Uid) != os.Getuid() || file && (st.Mode&syscall.S_IFMT != syscall.S_IFREG || st.Nlink != 1 || st.Size != 0) || !file && st.Mode&syscall.S_IFMT != syscall.S_IFDIR {
		return errors.New("somebody replaced it while it was made")
	}
	return os.Chown(fdPath(fd), uid, gid) // fchown(2) takes no O_PATH descriptor
}

// fdPath names an open descriptor such that system calls which take a path reach exactly what it holds. See proc_pid_fd(5).
func fdPath(fd int) string { return "/proc/self/fd/" + strconv.Itoa(fd) }

// shows says whether local shows today's link of the checkout dir. It is false for a mount that is missing, stale, foreign
// or covered by another one.
func shows(dir, link, local string) bool {
	a, err1 := os.Lstat(dir + "/" + link)
	b, err2 := os.Stat(local)
	return err1 == nil && err2 == nil && os.SameFile(a, b)
}

// bind makes local show link of the checkout root, by a mount of the link's very descriptor. A mount of ours that shows
// something else is replaced from beneath (Linux 6.5), so that local is never seen without; before that kernel what lies
// beneath shows for an instant.
func bind(root *os.Root, d dir, a account, ours bool) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("mount %q on %s: %w", d.link, d.local, err)
		}
	}()
	top, err := root.Open(".")
	if err != nil {
		return err
	}
	defer top.Close()
	src, err := openBelow(int(top.Fd()), d.link)
	if err != nil {
		return err
	}
	defer syscall.Close(src)
	t, err := openTarget(d.local, d.file, true, a.uid, a.gid)
	if err != nil {
		return err
	}
	defer func() { syscall.Close(t) }()
	var s, l syscall.Stat_t
	if err := errors.Join(syscall.Fstat(src, &s), syscall.Fstat(t, &l)); err != nil {
		return err
	}
	if (l.Mode&syscall.S_IFMT == syscall.S_IFDIR) == d.file || (s.Mode&syscall.S_IFMT == syscall.S_IFDIR) == d.file {
		return fmt.Errorf("they must both be %s: move %s away, or change file", map[bool]string{true: "files", false: "directories"}[d.file], d.local)
	}
	if ours {
		if err := swapBeneath(src, t); !errors.Is(err, syscall.EINVAL) && !errors.Is(err, syscall.ENOSYS) {
			return err
		}
		if err := syscall.Unmount(fdPath(t), syscall.MNT_DETACH); err != nil {
			return err
		}
		syscall.Close(t)
		if t, err = openTarget(d.local, d.file, false, 0, 0); err != nil {
			return err
		}
	}
	return syscall.Mount(fdPath(src), fdPath(t), "", syscall.MS_BIND, "")
}

// swapBeneath puts a mount of src under the topmost mount of dst, then takes that one off.
func swapBeneath(src, dst int) error {
	empty := []byte{0}
	e := uintptr(unsafe.Pointer(&empty[0]))
	mfd, _, errno := syscall.Syscall(sysOpenTree, uintptr(src), e, atEmptyPath|openTreeClone|syscall.O_CLOEXEC)
	if errno != 0 {
		return errno
	}
	defer syscall.Close(int(mfd))
	if _, _, errno := syscall.Syscall6(sysMoveMount, mfd, e, uintptr(dst), e, moveMountFds|moveMountBelow, 0); errno != 0 {
		return errno
	}
	return syscall.Unmount(fdPath(dst), syscall.MNT_DETACH)
}

// unbind takes the topmost mount off local.
func unbind(local string) error {
	t, err := openTarget(local, false, false, 0, 0)
	if err != nil {
		return err
	}
	defer syscall.Close(t)
	return syscall.Unmount(fdPath(t), syscall.MNT_DETACH)
}

// unmake removes what was made to mount on, where it is still empty; it returns what had to stay.
func unmake(made []string) (stay []string) {
	for i := len(made) - 1; i >= 0; i-- {
		dir, err := openTarget(filepath.Dir(made[i]), false, false, 0, 0)
		if err != nil {
			continue // its directory is gone, or no longer root's to walk
		}
		at := fdPath(dir) + "/" + filepath.Base(made[i])
		fi, err := os.Lstat(at)
		switch {
		case err != nil:
		case fi.Mode().IsRegular() && fi.Size() == 0:
			err = os.Remove(at)
		case fi.IsDir():
			inner := func(p string) bool { return strings.HasPrefix(p, made[i]+"/") }
			if err = syscall.Rmdir(at); err == syscall.ENOTEMPTY && !slices.ContainsFunc(stay, inner) {
				err = nil // in use by others by now: theirs
			}
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			stay = append(stay, made[i])
		}
		syscall.Close(dir)
	}
	return stay
}

// mountPoint is one line of /proc/self/mountinfo.
type mountPoint struct{ id, parent, device, root, point string }

// unescapeMount undoes how proc_pid_mountinfo(5) writes space, tab, newline and backslash.
var unescapeMount = strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace

// parseMountinfo reads lines as proc_pid_mountinfo(5) has them:
//
//	36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue
func parseMountinfo(text string) ([]mountPoint, error) {
	var mounts []mountPoint
	for line := range strings.Lines(text) {
		f := strings.Fields(line)
		if len(f) < 6 {
			return nil, fmt.Errorf("mountinfo: unexpected line %q", line)
		}
		mounts = append(mounts, mountPoint{f[0], f[1], f[2], unescapeMount(f[3]), unescapeMount(f[4])})
	}
	return mounts, nil
}

// readMountinfo returns the mounts of our namespace.
func readMountinfo() ([]mountPoint, error) {
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	return parseMountinfo(string(text))
}

// visible returns the topmost mount at point, nil if there is none.
func visible(mounts []mountPoint, point string) *mountPoint {
	covered := map[string]bool{}
	for _, m := range mounts {
		if m.point == point {
			covered[m.parent] = true
		}
	}
	for i, m := range mounts {
		if m.point == point && !covered[m.id] {
			return &mounts[i]
		}
	}
	return nil
}

// sourcesBelow returns the mounts whose source lies in dir, a path on the host: mounts of a checkout, whoever made
// them, also when their file or directory is gone by now.
func sourcesBelow(mounts []mountPoint, dir string) []mountPoint {
	var holder *mountPoint
	at := dir
	for ; ; at = filepath.Dir(at) {
		if holder = visible(mounts, at); holder != nil || at == "/" {
			break
		}
	}
	if holder == nil {
		return nil
	}
	source := path.Join(holder.root, strings.TrimPrefix(dir, at))
	var below []mountPoint
	for _, m := range mounts {
		root := strings.TrimSuffix(m.root, "//deleted")
		if m.device == holder.device && m.id != holder.id && (root == source || strings.HasPrefix(root, source+"/")) {
			below = append(below, m)
		}
	}
	return below
}

// privateNamespace says whether our mounts stay invisible to the host: PID 1 is in another mount namespace. See mount_namespaces(7).
func privateNamespace() bool {
	a, err1 := os.Readlink("/proc/self/ns/mnt")
	b, err2 := os.Readlink("/proc/1/ns/mnt")
	return err1 == nil && err2 == nil && a != b
}

const checkLimit = time.Minute

// view is what a check child is told on its standard input: what to show where, and what to run then.
type view struct {
	Dir      string // an empty directory of ours, on which the child mounts a tmpfs for its own use
	Checkout string
	Shows    []shown
	Absent   [][]byte // removed paths, relative to Checkout; bytes, for JSON spoils names that are not UTF-8
	Argv     []string
}

type shown struct {
	Local, Link string
	File        bool
}

// runCheck runs v.Argv in a mount and PID namespace of its own, in which every local shows the candidate: what is staged over
// what is live, less what the commit removes, read-only. Other processes see nothing of it; all that it mounts and starts
// is gone when it ends. A command that does not accept the candidate is a *refusal with its last words.
func runCheck(ctx context.Context, scratch string, v view) error {
	if _, err := exec.LookPath(v.Argv[0]); err != nil {
		return fmt.Errorf("check: %w: the commit waits", err)
	}
	if err := os.MkdirAll(scratch, 0o700); err != nil {
		return err
	}
	v.Dir = scratch
	spec, err := json.Marshal(v)
	if err != nil {
		return err
	}
	// The pipe stays empty when the command is executed (close-on-exec): what comes through it is our own trouble, not the command's.
	trouble, status, err := os.Pipe()
	if err != nil {
		return err
	}
	defer trouble.Close()
	cmd := exec.Command("/proc/self/exe", checkChild)
	cmd.Dir, cmd.Stdin, cmd.ExtraFiles = "/", bytes.NewReader(spec), []*os.File{status}
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=/root"}
	last := &tail{}
	cmd.Stdout, cmd.Stderr = last, last
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS | syscall.CLONE_NEWPID, Pdeathsig: syscall.SIGKILL}
	_, err = execute(ctx, "check "+v.Argv[0], cmd, checkLimit, syscall.SIGKILL)
	status.Close()
	if err == nil || ctx.Err() != nil {
		return err
	}
	if msg, _ := io.ReadAll(io.LimitReader(trouble, 4096)); len(msg) > 0 {
		return fmt.Errorf("check: %s", msg)
	}
	return &refusal{Reason: "check", Info: err.Error()}
}

// checkChild is the argument with which the binary is run as a check's child; nobody types it.
const checkChild = "check-child"

// runCheckChild is the child's side of runCheck: PID 1 of its namespace, it builds the view and becomes the command.
func runCheckChild() error {
	syscall.CloseOnExec(3)
	var v view
	if err := json.NewDecoder(os.Stdin).Decode(&v); err != nil {
		return err
	}
	null, err := syscall.Open("/dev/null", syscall.O_RDONLY|syscall.O_CLOEXEC, 0)
	if err == nil {
		err = syscall.Dup3(null, 0, 0)
	}
	if err != nil {
		return err
	}
	// Nothing of ours may reach the host.
	if err := syscall.Mount("", "/", "", syscall.MS_REC|syscall.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	if err := syscall.Mount("proc", "/proc", "proc", syscall.MS_NOSUID|syscall.MS_NODEV|syscall.MS_NOEXEC, ""); err != nil {
		return fmt.Errorf("mount /proc: %w", err)
	}
	if err := syscall.Mount("tmpfs", v.Dir, "tmpfs", syscall.MS_NOSUID, "mode=0700"); err != nil {
		return fmt.Errorf("mount tmpfs: %w", err)
	}
	// Relative names in the tmpfs, for the option string of an overlay gives : and , a meaning of their own.
	if err := os.Chdir(v.Dir); err != nil {
		return err
	}
	for i, s := range v.Shows {
		if err := showCandidate(&v, s, strconv.Itoa(i)); err != nil {
			return fmt.Errorf("show the candidate at %s: %w", s.Local, err)
		}
	}
	if err := os.Chdir("/"); err != nil {
		return err
	}
	exe, err := exec.LookPath(v.Argv[0])
	if err != nil {
		return err
	}
	return fmt.Errorf("%s: %w", exe, syscall.Exec(exe, v.Argv, os.Environ()))
}

// showCandidate makes one local show the candidate. A directory is an overlay without an upper layer, so read-only: whiteouts
// (overlayfs.txt: a character device 0/0) over the staged files over the live ones, which costs what the commit changes.
// Sources and target are opened anew here, without following links of the owner's, and used by descriptor.
func showCandidate(v *view, s shown, n string) error {
	t, err := openTarget(s.Local, s.File, false, 0, 0)
	if err != nil {
		return err
	}
	top, err := openTarget(v.Checkout, false, false, 0, 0)
	if err != nil {
		return err
	}
	var layer []int // what is staged, then what is live
	for _, p := range []string{stageDir + "/" + s.Link, s.Link} {
		var st syscall.Stat_t
		if fd, err := openBelow(top, p); err == nil {
			if err := syscall.Fstat(fd, &st); err != nil {
				return err
			}
			if p == s.Link && (st.Mode&syscall.S_IFMT == syscall.S_IFDIR) == s.File {
				continue // what is live is of another kind than what the candidate has there
			}
			layer = append(layer, fd)
		} else if !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	if len(layer) == 0 {
		return fs.ErrNotExist
	}
	if s.File {
		if err := syscall.Mount(fdPath(layer[0]), fdPath(t), "", syscall.MS_BIND, ""); err != nil {
			return err
		}
		if t, err = openTarget(s.Local, true, false, 0, 0); err != nil {
			return err
		}
		return syscall.Mount("", fdPath(t), "", syscall.MS_BIND|syscall.MS_REMOUNT|syscall.MS_RDONLY, "")
	}
	white := "w" + n
	if err := os.Mkdir(white, 0o755); err != nil {
		return err
	}
	staged, live := filepath.Join(v.Checkout, stageDir, s.Link), filepath.Join(v.Checkout, s.Link)
	for _, rel := range vanished(v.Absent, s.Link, staged, live) {
		if err := os.MkdirAll(filepath.Join(white, filepath.Dir(rel)), 0o755); err != nil {
			return err
		}
		if err := syscall.Mknod(filepath.Join(white, rel), syscall.S_IFCHR|0o600, 0); err != nil {
			return err
		}
	}
	layers := white
	for i, fd := range layer {
		l := fmt.Sprintf("l%s.%d", n, i)
		if err := os.Mkdir(l, 0o755); err != nil {
			return err
		}
		if err := syscall.Mount(fdPath(fd), l, "", syscall.MS_BIND, ""); err != nil {
			return err
		}
		layers += ":" + l
	}
	// A merged directory has the attributes of its topmost layer.
	if st, err := os.Stat(fdPath(layer[len(layer)-1])); err == nil {
		if err := errors.Join(os.Chown(white, owner(st), int(st.Sys().(*syscall.Stat_t).Gid)), os.Chmod(white, st.Mode().Perm())); err != nil {
			return err
		}
	}
	return syscall.Mount("overlay", fdPath(t), "overlay", syscall.MS_RDONLY, "lowerdir="+layers)
}

// vanished returns what the candidate does not have any more below a link: removed files, and in place of them the topmost
// directory that they leave empty. What a staged file takes the name of is hidden by that already.
func vanished(absent [][]byte, link, staged, live string) (top []string) {
	gone := map[string]bool{}
	for _, p := range absent {
		rel, ok := strings.CutPrefix(string(p), link+"/")
		if !ok || !validPath(rel) || hidden(staged, rel) {
			continue
		}
		gone[rel] = true
		for dir := filepath.Dir(rel); dir != "." && !lexists(filepath.Join(staged, dir)); dir = filepath.Dir(dir) {
			entries, err := os.ReadDir(filepath.Join(live, dir))
			if err != nil || slices.ContainsFunc(entries, func(e fs.DirEntry) bool { return !gone[filepath.Join(dir, e.Name())] }) {
				break
			}
			gone[dir] = true
		}
	}
	for rel := range gone {
		if !gone[filepath.Dir(rel)] {
			top = append(top, rel)
		}
	}
	return top
}

// hidden says whether a staged file has the place of a directory above rel, or is rel: it hides what is below by itself.
func hidden(staged, rel string) bool {
	for p := rel; p != "."; p = path.Dir(p) {
		if fi, err := os.Lstat(filepath.Join(staged, p)); err == nil && (p == rel || !fi.IsDir()) {
			return true
		}
	}
	return false
}
