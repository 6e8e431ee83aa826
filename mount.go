//go:build linux

package main

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"unsafe"
)

// Numbers and flags that the syscall package lacks: open_tree(2), move_mount(2).
const (
	sysOpenTree    = 428
	sysMoveMount   = 429
	openTreeClone  = 0x1
	atEmptyPath    = 0x1000
	moveMountFds   = 0x4 | 0x40 // both paths are empty: from and to are the descriptors themselves
	moveMountBelow = 0x200
)

// mountTable is what a record remembers of mounts.
type mountTable struct {
	Shown []shown  // our mounts; of several entries for one local the last is the wanted one
	Made  []string // what was made to mount on, outer ones first
}

// shown is one mount of ours.
type shown struct {
	Local, Link, Checkout string // Checkout is the service's directory that Link lies in
	Kind                  kind
}

// wantedShows returns the mounts that dirs ask for.
func wantedShows(checkout string, dirs []dir) (all []shown) {
	for _, d := range dirs {
		if d.local != "" {
			all = append(all, shown{d.local, d.link, checkout, d.kind})
		}
	}
	return all
}

// show makes every local of dirs show its link of the checkout; save is called before something is made or
// mounted that the table must remember. Each local is tried, whatever happened to the others.
func (t *mountTable) show(
	service, checkout string, dirs []dir, uid int, save func() error,
) (errs error) {
	if t.areShown(checkout, dirs) {
		return nil
	}
	wants := wantedShows(checkout, dirs)
	for _, w := range wants {
		t.remember(w.Local)
		isSame := func(s shown) bool { return s == w }
		t.Shown = append(slices.DeleteFunc(t.Shown, isSame), w)
	}
	if err := save(); err != nil {
		return err
	}

	for _, w := range wants {
		if !shows(checkout, w.Link, w.Local) {
			if err := t.mount(service, w, uid); err != nil {
				errs = errors.Join(errs, err)
				continue // the mounts of others on the local may still be there
			}
		}
		t.Shown = slices.DeleteFunc(t.Shown, w.replaces)
	}
	return errs
}

// replaces says whether s is another mount on the same local.
func (w shown) replaces(s shown) bool { return s.Local == w.Local && s != w }

// areShown says that every local of dirs shows its link of the checkout, and that the table names just that.
func (t *mountTable) areShown(checkout string, dirs []dir) bool {
	return !slices.ContainsFunc(wantedShows(checkout, dirs), func(w shown) bool {
		isNamed := slices.Contains(t.Shown, w) && !slices.ContainsFunc(t.Shown, w.replaces)
		return !isNamed || !shows(checkout, w.Link, w.Local)
	})
}

// restore makes every mount that the table names again, with nothing but the table: the first thing after a
// boot, before there is a config. A checkout counts only where it is root's, for after a boot anybody may
// have made one in a directory such as /tmp. Where a taking over was cut short, or its new files are not to
// be had yet, the link still lies beside it.
func (t *mountTable) restore(service string) (errs error) {
	for _, w := range slices.Clone(t.Shown) {
		hasLink := func(checkout string) bool { return lexists(checkout + "/" + w.Link) }
		places := append([]string{w.Checkout, w.Checkout + ".new"}, setAsides(w.Checkout)...)
		if i := slices.IndexFunc(places, hasLink); i >= 0 {
			w.Checkout = places[i]
		}

		if shows(w.Checkout, w.Link, w.Local) {
			continue
		}
		t.remember(w.Local)
		errs = errors.Join(errs, t.mount(service, w, os.Getuid()))
	}
	return errs
}

// setAsides returns the directories that were set aside to make place for a checkout, the newest first.
func setAsides(checkout string) (found []string) {
	changed := map[string]int64{}
	entries, _ := os.ReadDir(filepath.Dir(checkout))
	for _, e := range entries {
		if !strings.HasPrefix(e.Name(), filepath.Base(checkout)+".before") {
			continue
		}
		if fi, err := e.Info(); err == nil {
			name := filepath.Join(filepath.Dir(checkout), e.Name())
			changed[name] = fi.Sys().(*syscall.Stat_t).Ctim.Nano()
			found = append(found, name)
		}
	}

	slices.SortFunc(found, func(a, b string) int { return cmp.Compare(changed[b], changed[a]) })
	return found
}

// makeTargets makes an empty directory or file at every local that is missing, so that a check has something
// to mount on.
func (t *mountTable) makeTargets(dirs []dir, a account, save func() error) error {
	wants := wantedShows("", dirs)
	for _, w := range wants {
		t.remember(w.Local)
	}
	if err := save(); err != nil {
		return err
	}

	for _, w := range wants {
		p, err := makePlace(w.Local, w.Kind, a)
		if err != nil {
			return err
		}
		p.close()
	}
	return nil
}

// remember notes what has to be made to mount on local: later nobody could tell whose it is.
func (t *mountTable) remember(local string) {
	for p := local; !lexists(p); p = filepath.Dir(p) {
		if !slices.Contains(t.Made, p) {
			t.Made = append(t.Made, p)
		}
	}
	slices.Sort(t.Made)
}

// sweep takes away our mounts that dirs does not want any more, and what was made for them. It returns the
// points that went. One that can't be unmounted holds up no other, and stays in the table.
func (t *mountTable) sweep(
	service, checkout string, dirs []dir, save func() error,
) (gone []string, errs error) {
	wants := wantedShows(checkout, dirs)
	wanted := wantedPoints(wants)
	var stuck []string
	for {
		mounts, err := readMountinfo()
		if err != nil {
			return gone, err
		}

		surplus := slices.DeleteFunc(t.surplus(mounts, wants, wanted), func(m mountPoint) bool {
			return slices.Contains(stuck, m.point)
		})
		if len(surplus) == 0 {
			break
		}
		for _, m := range surplus {
			if err := unbind(m.point); err != nil {
				stuck = append(stuck, m.point)
				errs = errors.Join(errs, fmt.Errorf("unmount %s: %w", m.point, err))
			} else if !slices.Contains(wanted, m.point) {
				gone = append(gone, m.point)
				slog.Info(fmt.Sprintf("%s: unmounted %s, which is no longer in dirs", service, m.point))
			}
		}
	}

	keep := slices.Concat(wanted, stuck)
	isGone := func(s shown) bool { return !slices.Contains(keep, resolve(s.Local)) }
	t.Shown = slices.DeleteFunc(t.Shown, isGone)
	t.Made = unmake(t.Made, wanted)
	return gone, errors.Join(errs, save())
}

// surplus returns those of our mounts that are to be taken away next: the visible ones at points that are not
// wanted, and at the others the upper one of two, for a swap that was cut short left the newer one below it.
// Under somebody else's mount ours can't be reached, and hides nothing.
func (t *mountTable) surplus(mounts []mountPoint, wants []shown, wanted []string) (all []mountPoint) {
	own := t.own(mounts, wants)
	for _, m := range own {
		if *visible(mounts, m.point) != m {
			continue
		}
		isBeneath := func(o mountPoint) bool { return o.id == m.parent && o.point == m.point }
		isWanted := slices.Contains(wanted, m.point)
		if !isWanted || slices.ContainsFunc(own, isBeneath) {
			all = append(all, m)
		}
	}
	return all
}

// wantedPoints returns the locals of wants, and where they lie. One of the wrong kind can only be a mount, or
// what was made for it, from before: it is not among them.
func wantedPoints(wants []shown) (points []string) {
	for _, w := range wants {
		if fi, err := os.Stat(w.Local); err != nil || fi.IsDir() == (w.Kind == aDirectory) {
			points = append(points, w.Local, resolve(w.Local))
		}
	}
	return points
}

// aside is where mounts of a service's own files lie apart from its links: in its directory of ours, when a
// file was exchanged and its mount not yet, and beside its checkout, when that was taken over and renamed.
var aside = regexp.MustCompile(`^(/` + regexp.QuoteMeta(ourDir) + `|\.new|\.before(\.[0-9]+)?)/`)

// own returns those mounts that are ours: their source lies below a link that the table or wants names, or
// they are on a local named there and their source is aside. A checkout of another service's may nest in
// ours.
func (t *mountTable) own(mounts []mountPoint, wants []shown) (own []mountPoint) {
	names := slices.Concat(t.Shown, wants)
	sources := map[string]source{}
	points := map[string]string{}
	for _, n := range names {
		if _, known := sources[n.Checkout]; !known {
			sources[n.Checkout] = locate(mounts, resolve(n.Checkout))
		}
		points[n.Local] = resolve(n.Local)
	}

	for _, m := range mounts {
		mine := func(n shown) bool {
			rest, ok := sources[n.Checkout].below(m)
			switch {
			case !ok:
				return false
			case m.point == points[n.Local] && aside.MatchString(rest):
				return true
			}
			return within(rest, "/"+n.Link)
		}
		if slices.ContainsFunc(names, mine) {
			own = append(own, m)
		}
	}
	return own
}

// owns says whether a mount, nil for none, is one of ours by the table.
func (t *mountTable) owns(mounts []mountPoint, m *mountPoint) bool {
	return m != nil && slices.Contains(t.own(mounts, nil), *m)
}

// resolve returns where a path leads, also when its end is missing.
func resolve(name string) string {
	for at := name; at != "."; at = filepath.Dir(at) { // "/" is there
		if real, err := filepath.EvalSymlinks(at); err == nil {
			return path.Join(real, strings.TrimPrefix(name, at))
		}
	}
	return name
}

// shows says whether local shows today's link of the checkout. It is false for a mount that is missing,
// stale, foreign or covered by another one.
func shows(checkout, link, local string) bool {
	a, _ := os.Lstat(checkout + "/" + link)
	b, _ := os.Stat(local)
	return os.SameFile(a, b) // false where one is not there
}

// mount makes w's local show its link, by a mount of the link's very descriptor, in place of a mount of ours
// or on top of anybody else's. The checkout must be root's, or belong to the user uid, as those of an older
// gitopper do. What has to be made for the mount belongs to the owner of what it shows.
func (t *mountTable) mount(service string, w shown, uid int) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("mount %q on %s: %w", w.Link, w.Local, err)
		}
	}()

	src, err := w.source(uid)
	if err != nil {
		return err
	}
	defer src.close()

	st, err := src.stat()
	if err != nil {
		return err
	}

	dst, err := makePlace(w.Local, w.Kind, account{uid: int(st.Uid), gid: int(st.Gid)})
	if err != nil {
		return err
	}
	defer dst.close()
	for _, p := range []place{src, dst} {
		if err := fits(p.kind() == syscall.S_IFDIR, w.Kind, w.Local); err != nil {
			return err
		}
	}

	mounts, err := readMountinfo()
	if err != nil {
		return err
	}

	top := visible(mounts, resolve(w.Local))
	if t.owns(mounts, top) {
		err = replaceMount(src, dst, w.Local)
	} else {
		err = syscall.Mount(src.path(), dst.path(), "", syscall.MS_BIND, "")
	}
	if err != nil {
		return err
	}

	if !shows(w.Checkout, w.Link, w.Local) {
		return errors.New("it does not show there after it was mounted: another mount covers it")
	}
	slog.Info(fmt.Sprintf("%s: mounted %s on %s", service, w.Link, w.Local))
	return nil
}

// fits is an error where a link or its local, which is a directory or is not, can't be of that kind.
func fits(isDir bool, k kind, local string) error {
	if isDir == (k == aDirectory) {
		return nil
	}
	many := map[kind]string{aFile: "files", aDirectory: "directories"}[k]
	return fmt.Errorf("they must both be %s: move %s away, or change file", many, local)
}

// source opens the link, following nothing that others than root can have made.
func (w shown) source(uid int) (place, error) {
	top, err := openPlace(w.Checkout)
	if err != nil {
		return place{-1}, err
	}
	defer top.close()

	st, err := top.stat()
	if err != nil {
		return place{-1}, err
	}
	if int(st.Uid) != uid && !top.rootsAlone() {
		return place{-1}, fmt.Errorf("%s belongs to neither root nor the service's user", w.Checkout)
	}
	return top.below(w.Link)
}

// replaceMount swaps the topmost mount of dst, which is at local, for one of src, such that local is never
// seen without; before Linux 6.5, which can't, what lies beneath shows for an instant.
func replaceMount(src, dst place, local string) error {
	err := swapBeneath(src, dst)
	if isOld := slices.Contains([]error{syscall.EINVAL, syscall.ENOSYS}, err); !isOld {
		return err
	}
	if err := syscall.Unmount(dst.path(), syscall.MNT_DETACH); err != nil {
		return err
	}

	beneath, err := openPlace(local)
	if err != nil {
		return err
	}
	defer beneath.close()
	return syscall.Mount(src.path(), beneath.path(), "", syscall.MS_BIND, "")
}

// swapBeneath puts a mount of src under the topmost mount of dst, then takes that one off.
func swapBeneath(src, dst place) error {
	empty := []byte{0}
	e := uintptr(unsafe.Pointer(&empty[0]))
	const clone = atEmptyPath | openTreeClone | syscall.O_CLOEXEC
	mount, _, errno := syscall.Syscall(sysOpenTree, uintptr(src.fd), e, clone)
	if errno != 0 {
		return errno
	}
	defer syscall.Close(int(mount))

	const beneath = moveMountFds | moveMountBelow
	_, _, errno = syscall.Syscall6(sysMoveMount, mount, e, uintptr(dst.fd), e, beneath, 0)
	if errno != 0 {
		return errno
	}
	return syscall.Unmount(dst.path(), syscall.MNT_DETACH)
}

// unbind takes the topmost mount off a point.
func unbind(point string) error {
	p, err := openPlace(point)
	if err != nil {
		return err
	}
	defer p.close()
	return syscall.Unmount(p.path(), syscall.MNT_DETACH)
}

// unmake removes what was made to mount on, where it is still empty, but for what needed lies in; it returns
// what stays ours. What is of another kind, or has content, is somebody's own by now.
func unmake(made, needed []string) (stay []string) {
	for _, name := range slices.Backward(made) {
		inIt := func(p string) bool { return within(p, name) }
		if slices.ContainsFunc(slices.Concat(needed, stay), inIt) {
			stay = append(stay, name)
			continue
		}

		dir, err := openPlace(filepath.Dir(name))
		if err != nil {
			continue // its directory is gone, or no longer root's to walk
		}
		at := dir.path() + "/" + filepath.Base(name)
		st, err := dir.lstat(filepath.Base(name))
		isEmptyFile := st.Mode&syscall.S_IFMT == syscall.S_IFREG && st.Size == 0

		switch {
		case isDir(st):
			err = syscall.Rmdir(at)
		case isEmptyFile:
			err = syscall.Unlink(at)
		}
		dir.close()
		if except(err, syscall.ENOENT, syscall.ENOTEMPTY) != nil {
			stay = append(stay, name)
		}
	}
	slices.Sort(stay)
	return stay
}

// mountPoint is one line of /proc/self/mountinfo.
type mountPoint struct{ id, parent, device, root, point string }

// escapedMount undoes how proc_pid_mountinfo(5) writes space, tab, newline and backslash.
var escapedMount = strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`)

func unescapeMount(name string) string {
	if !strings.Contains(name, `\`) { // which a Replacer looks for at length
		return name
	}
	return escapedMount.Replace(name)
}

// parseMountinfo reads lines as proc_pid_mountinfo(5) has them:
//
//	36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue
func parseMountinfo(text string) ([]mountPoint, error) {
	mounts := make([]mountPoint, 0, strings.Count(text, "\n"))
	for line := range strings.Lines(text) {
		var f [5]string
		rest, isMore := line, true
		for i := range f {
			f[i], rest, isMore = strings.Cut(rest, " ")
		}
		if !isMore {
			return nil, fmt.Errorf("mountinfo: unexpected line %q", line)
		}
		mounts = append(mounts, mountPoint{f[0], f[1], f[2], unescapeMount(f[3]), unescapeMount(f[4])})
	}
	return mounts, nil
}

// readMountinfo returns the mounts of our namespace.
func readMountinfo() ([]mountPoint, error) {
	file, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	defer file.Close()

	var text strings.Builder
	text.Grow(int(mountinfoSize.Load()))
	chunk := make([]byte, 4<<10) // as much as the kernel gives at a time
	for err == nil {
		n := 0
		n, err = file.Read(chunk)
		text.Write(chunk[:n])
	}
	if err != io.EOF {
		return nil, err
	}
	mountinfoSize.Store(int64(text.Len()))
	return parseMountinfo(text.String())
}

// mountinfoSize is that of the last look, for a hundred services look at hundreds of mounts when they start.
var mountinfoSize atomic.Int64

// visible returns the topmost mount at point, nil if there is none. Of several that nothing covers there all
// but the last lie under a mount on a directory above.
func visible(mounts []mountPoint, point string) *mountPoint {
	covered := map[string]bool{}
	for _, m := range mounts {
		if m.point == point {
			covered[m.parent] = true
		}
	}

	for i, m := range slices.Backward(mounts) {
		if m.point == point && !covered[m.id] {
			return &mounts[i]
		}
	}
	return nil
}

// source is where a directory lies: path on a device, seen through the mount holder. The zero source is
// nowhere.
type source struct{ device, path, holder string }

// locate returns where a directory of the host lies, whether it exists or not.
func locate(mounts []mountPoint, dir string) source {
	for at := dir; filepath.IsAbs(at); at = filepath.Dir(at) {
		if m := visible(mounts, at); m != nil {
			return source{m.device, path.Join(m.root, strings.TrimPrefix(dir, at)), m.id}
		}
		if at == "/" {
			break
		}
	}
	return source{}
}

// below returns what follows the source's path in that of what m shows, also when that is deleted by now; ok
// says that it begins with the source's path.
func (s source) below(m mountPoint) (rest string, ok bool) {
	if m.device != s.device || m.id == s.holder {
		return "", false
	}
	return strings.CutPrefix(strings.TrimSuffix(m.root, "//deleted"), s.path)
}

// privateNamespace says whether our mounts stay invisible to the host: PID 1 is in another mount namespace.
// See mount_namespaces(7).
func privateNamespace() bool {
	a, err1 := os.Readlink("/proc/self/ns/mnt")
	b, err2 := os.Readlink("/proc/1/ns/mnt")
	return errors.Join(err1, err2) == nil && a != b
}
