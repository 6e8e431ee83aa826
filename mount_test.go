//go:build linux

package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
)

func TestParseMountinfo(t *testing.T) {
	const info = `22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
30 22 254:0 /srv/c/x\040y/etc /etc/x\134y rw shared:1 - ext4 /dev/vda rw
31 22 254:0 /srv/c/x\040y/one//deleted /etc/one rw shared:1 - ext4 /dev/vda rw
32 22 254:0 /srv/c/x\040yz/etc /etc/other rw shared:1 - ext4 /dev/vda rw
33 31 0:30 / /etc/one rw - tmpfs tmpfs rw
34 22 0:31 /srv/c/x\040y/etc /etc/foreign rw - tmpfs tmpfs rw
35 22 254:0 /srv/c/x\040y/nested/etc /etc/nested rw - ext4 /dev/vda rw
36 22 254:0 /srv/c/x\040y.before.2/etc /etc/two rw - ext4 /dev/vda rw
37 22 254:0 /srv/c/x\040y.new/etc /etc/elsewhere rw - ext4 /dev/vda rw
38 22 254:0 /srv/c/x\040y/.gitopper/publish/two//deleted /etc/two rw - ext4 /dev/vda rw
`
	mounts, err := parseMountinfo(info)
	if err != nil {
		t.Fatal(err)
	}
	table := mountTable{Shown: []shown{
		{"/etc/x\\y", "etc", "/srv/c/x y", aDirectory}, {"/etc/two", "one", "/srv/c/x y", aFile}}}
	var points []string
	for _, m := range table.own(mounts, nil) {
		points = append(points, m.id)
	}
	if got, want := fmt.Sprint(points), `[30 31 36 38]`; got != want {
		t.Errorf("mounts of the service: %s, want %s", got, want)
	}
	if m := visible(mounts, "/etc/one"); m == nil || m.id != "33" {
		t.Errorf("visible at /etc/one: %+v", m)
	}
	if m := visible(mounts, "/nope"); m != nil {
		t.Errorf("visible at /nope: %+v", m)
	}
	if _, err := parseMountinfo("short line\n"); err == nil {
		t.Error("a short line was accepted")
	}
}

func FuzzMountinfo(f *testing.F) {
	f.Add("36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw\n", "/mnt2")
	f.Add("1 2 3 \\04 \\040 x\n", "/")
	f.Fuzz(func(t *testing.T, info, dir string) {
		if mounts, err := parseMountinfo(info); err == nil {
			locate(mounts, filepath.Clean(dir))
			table := mountTable{Shown: []shown{{dir, "l", dir, aFile}}}
			table.own(mounts, nil)
		}
	})
}

// mountWorld is a directory with the checkout of one service in it, and room for locals.
type mountWorld struct {
	*testing.T
	dir, checkout string
	table         mountTable
	saves         int
}

func newMountWorld(t *testing.T) *mountWorld {
	t.Helper()
	// Not below /tmp, which others can write.
	dir, err := os.MkdirTemp("/var/lib", "gitopper-test-")
	if err != nil {
		t.Skipf("needs a directory that only root can write: %v", err)
	}
	w := &mountWorld{T: t, dir: dir, checkout: dir + "/mount/svc"}
	t.Cleanup(func() {
		for range 3 {
			for _, m := range w.mounts() {
				syscall.Unmount(m.point, syscall.MNT_DETACH)
			}
		}
		os.RemoveAll(dir)
	})
	w.write("mount/svc/etc/app.conf", "one\n")
	w.write("mount/svc/other/file", "x\n")
	w.write("mount/svc/one.conf", "single\n")
	return w
}

func (w *mountWorld) write(name, text string) {
	w.Helper()
	name = filepath.Join(w.dir, name)
	err := errors.Join(os.MkdirAll(filepath.Dir(name), 0o755), os.WriteFile(name, []byte(text), 0o644))
	if err != nil {
		w.Fatal(err)
	}
}

func (w *mountWorld) read(name string) string {
	data, _ := os.ReadFile(filepath.Join(w.dir, name))
	return string(data)
}

// must fails the test on an error.
func (w *mountWorld) must(errs ...error) {
	w.Helper()
	if err := errors.Join(errs...); err != nil {
		w.Fatal(err)
	}
}

func (w *mountWorld) save() error { w.saves++; return nil }

func (w *mountWorld) dirAt(local, link string) dir {
	return dir{local: filepath.Join(w.dir, local), link: link, kind: kind(strings.HasSuffix(link, ".conf"))}
}

func (w *mountWorld) show(dirs ...dir) (changed bool, err error) {
	wereShown := w.table.areShown(w.checkout, dirs)
	return !wereShown, w.table.show("svc", w.checkout, dirs, os.Getuid(), w.save)
}

func (w *mountWorld) sweep(dirs ...dir) []string {
	w.Helper()
	gone, err := w.table.sweep("svc", w.checkout, dirs, w.save)
	w.must(err)
	return gone
}

// apply is what a pass does: it wants dirs to be all that is mounted, and nothing to be left for a second
// one.
func (w *mountWorld) apply(dirs ...dir) {
	w.Helper()
	w.sweep(dirs...)
	_, err := w.show(dirs...)
	w.must(err)

	w.saves = 0
	if changed, err := w.show(dirs...); changed || err != nil || w.saves > 0 {
		w.Errorf("a second time: changed %v, %v, %d saves", changed, err, w.saves)
	}
	if got := w.mounts(); len(got) != len(dirs) || len(w.table.Shown) != len(dirs) {
		w.Errorf("%d mounts wanted: %v; %v", len(dirs), got, w.table.Shown)
	}
}

// mounts returns the mounts on or of what lies in the world.
func (w *mountWorld) mounts() (in []mountPoint) {
	mounts, _ := readMountinfo()
	for _, m := range mounts {
		if strings.HasPrefix(m.point, w.dir+"/") {
			in = append(in, m)
		}
	}
	return in
}

// reboot takes all mounts away.
func (w *mountWorld) reboot() {
	w.Helper()
	for _, m := range slices.Backward(w.mounts()) {
		w.must(syscall.Unmount(m.point, syscall.MNT_DETACH))
	}
}

// replace puts a new file in the place of the checkout's, as a publish does: what comes out lies in ours.
func (w *mountWorld) replace(name, text string) {
	w.Helper()
	w.write("mount/svc/"+publishDir+"/"+name, text)
	in, out := filepath.Join(w.checkout, publishDir, name), filepath.Join(w.checkout, name)
	w.must(os.Rename(out, in+".out"), os.Rename(in, out))
}

func TestMountTargets(t *testing.T) {
	sub := func(d string, names ...string) error {
		var err error
		for _, n := range names {
			err = errors.Join(err, os.MkdirAll(d+"/"+n, 0o755))
		}
		return err
	}
	for _, tc := range []struct {
		name, local, link string
		prepare           func(dir string) error
		err               string
	}{
		{"made", "a/b/c", "etc", func(string) error { return nil }, ""},
		{"file made", "a/b/c", "one.conf", func(string) error { return nil }, ""},
		{"directory there", "a", "etc", func(d string) error { return sub(d, "a") }, ""},
		{"file there", "a", "one.conf",
			func(d string) error { return os.WriteFile(d+"/a", []byte("x"), 0o600) }, ""},
		{"file where a directory should be", "a", "etc",
			func(d string) error { return os.WriteFile(d+"/a", nil, 0o600) }, "must both be directories"},
		{"directory where a file should be", "a", "one.conf",
			func(d string) error { return sub(d, "a") }, "must both be files"},
		{"link of root's", "l/x", "etc",
			func(d string) error { return errors.Join(sub(d, "there"), os.Symlink("there", d+"/l")) }, ""},
		{"link in a directory of others", "open/l/x", "etc", func(d string) error {
			return errors.Join(sub(d, "open"), os.Chmod(d+"/open", 0o777), os.Symlink("/", d+"/open/l"))
		}, `"l" is a symbolic link below a directory that others than root can write`},
		{"link behind a directory of others", "open/in/l", "etc", func(d string) error {
			return errors.Join(sub(d, "open/in"), os.Chmod(d+"/open", 0o777), os.Symlink("/", d+"/open/in/l"))
		}, "is a symbolic link"},
		{"links with ..", "l/x", "etc", func(d string) error {
			return errors.Join(sub(d, "a/b", "a/t"), os.Symlink("a/b", d+"/s"), os.Symlink("s/../t", d+"/l"))
		}, ""},
		{"link in circles", "l/x", "etc",
			func(d string) error { return os.Symlink("l", d+"/l") }, "too many levels"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w := newMountWorld(t)
			w.must(tc.prepare(w.dir))
			d := w.dirAt(tc.local, tc.link)
			changed, err := w.show(d)
			if (tc.err == "") != (err == nil) || !strings.Contains(fmt.Sprint(err), tc.err) {
				t.Fatalf("%v, want %q", err, tc.err)
			}
			if tc.err == "" {
				if !changed || !shows(w.checkout, d.link, d.local) {
					t.Errorf("changed %v, and %s does not show %s", changed, d.local, d.link)
				}
				w.apply(d)
			}
			before := len(w.mounts())
			if gone := w.sweep(); len(gone) != before || len(w.mounts()) > 0 {
				t.Errorf("swept %v, left %v", gone, w.mounts())
			}
			if len(w.table.Made) > 0 || tc.name == "made" && lexists(w.dir+"/a") {
				t.Errorf("what was made is still there: %v", w.table.Made)
			}
		})
	}
}

// TestMountMadeForUser: only in root's own directories is what is made given away.
func TestMountMadeForUser(t *testing.T) {
	w := newMountWorld(t)
	const uid = 65534
	w.must(os.Chown(w.checkout+"/etc", uid, uid), os.Chown(w.checkout+"/other", uid, uid),
		os.Mkdir(w.dir+"/open", 0o755), os.Chmod(w.dir+"/open", 0o777))
	dirs := []dir{w.dirAt("new/etc", "etc"), w.dirAt("open/other", "other")}
	w.must(w.table.show("svc", w.checkout, dirs, uid, w.save))
	w.reboot()
	for name, want := range map[string]uint32{"new": 0, "new/etc": uid, "open/other": 0} {
		fi, err := os.Stat(w.dir + "/" + name)
		w.must(err)
		if got := fi.Sys().(*syscall.Stat_t).Uid; got != want {
			t.Errorf("%s belongs to %d, want %d", name, got, want)
		}
	}
}

// TestMountSourceIsNotFollowed: what the owner of a checkout makes a link of is not what root mounts.
func TestMountSourceIsNotFollowed(t *testing.T) {
	w := newMountWorld(t)
	w.must(os.Symlink("/etc", w.checkout+"/d"), os.Symlink("/etc/passwd", w.checkout+"/f.conf"))
	for _, d := range []dir{w.dirAt("d", "d"), w.dirAt("f", "f.conf")} {
		if _, err := w.show(d); err == nil || len(w.mounts()) > 0 {
			t.Errorf("%s: a symbolic link was mounted", d.link)
		}
	}
}

// TestMountChangedConfig: after any changes what is mounted is what the last config wants.
func TestMountChangedConfig(t *testing.T) {
	w := newMountWorld(t)
	etc, other, one := w.dirAt("a", "etc"), w.dirAt("b", "other"), w.dirAt("c", "one.conf")
	w.apply(etc, other, one)
	w.apply(w.dirAt("a", "other"), w.dirAt("b", "etc"), one)
	if got := w.read("a/file") + w.read("b/app.conf"); got != "x\none\n" {
		t.Errorf("swapped links: %q", got)
	}
	w.apply(w.dirAt("a", "one.conf"), w.dirAt("c", "etc")) // other kinds on the same locals
	w.apply(w.dirAt("a", "one.conf"), w.dirAt("c/deep", "etc"))
	w.apply(w.dirAt("c", "other"))

	w.must(os.Mkdir(w.dir+"/mount2", 0o755), os.CopyFS(w.dir+"/mount2/svc", os.DirFS(w.checkout)))
	w.checkout = w.dir + "/mount2/svc"
	w.apply(w.dirAt("c", "other"), etc)

	w.reboot()
	w.must(w.table.restore("svc"))
	w.apply(w.dirAt("c", "other"), etc)
	w.checkout = "" // it leaves the config
	w.apply()
	if lexists(w.dir+"/a") || lexists(w.dir+"/c") {
		t.Error("what was made is still there")
	}
}

// TestMountReplacedFile: a file mount is swapped, also when what it shows has gone to our directory or
// altogether.
func TestMountReplacedFile(t *testing.T) {
	w := newMountWorld(t)
	one := w.dirAt("one", "one.conf")
	w.apply(one)
	for _, name := range []string{"kept", "gone"} {
		w.replace("one.conf", name)
		if name == "gone" {
			w.must(os.RemoveAll(w.checkout + "/" + publishDir))
		}
		changed, err := w.show(one)
		if !changed || err != nil || w.read("one") != name || len(w.mounts()) != 1 {
			t.Errorf("%s: changed %v, %v, %q, %v", name, changed, err, w.read("one"), w.mounts())
		}
	}
	w.apply(one)
}

// TestMountReplacedCheckout: a checkout that was taken over is .before, and its mounts with it.
func TestMountReplacedCheckout(t *testing.T) {
	for _, beside := range []string{".before", ".before.12", ".new"} {
		t.Run(beside, func(t *testing.T) {
			w := newMountWorld(t)
			etc, one := w.dirAt("etc", "etc"), w.dirAt("one", "one.conf")
			w.apply(etc, one)
			w.table = mountTable{} // of an older gitopper
			w.must(os.Rename(w.checkout, w.checkout+beside))
			w.must(os.CopyFS(w.checkout, os.DirFS(w.checkout+beside)))
			w.apply(etc, one)
			if !shows(w.checkout, "etc", etc.local) {
				t.Error("shows the old one")
			}
		})
	}
}

// TestMountNestedCheckouts: a mount belongs to the service whose links it shows.
func TestMountNestedCheckouts(t *testing.T) {
	w := newMountWorld(t)
	inner := mountTable{}
	w.write("mount/svc/inner/etc/file", "inner\n")
	d := w.dirAt("inner", "etc")
	err := inner.show("inner", w.checkout+"/inner", []dir{d}, os.Getuid(), w.save)
	w.must(err)
	w.sweep(w.dirAt("etc", "etc"))
	w.sweep()
	if w.read("inner/file") != "inner\n" {
		t.Error("the mount of a checkout that nests in ours was taken away")
	}
}

// TestMountSwapLocals: two services whose locals change hands hide no mount below another.
func TestMountSwapLocals(t *testing.T) {
	w := newMountWorld(t)
	var tables [2]mountTable
	for i := range tables {
		w.must(os.MkdirAll(w.checkout+fmt.Sprintf("/%d/etc", i), 0o755))
		w.must(os.MkdirAll(w.checkout+fmt.Sprintf("/%d/other", i), 0o755))
	}
	for _, locals := range [][2]string{
		{"1", "2"}, {"2", "1"}, {"3", "1"}, {"3", "4"}, {"4", "5"}, {"6", "5"}, {"", "6"},
	} {
		dirs := [2][]dir{}
		n := 0
		for i, l := range locals {
			if l != "" {
				dirs[i] = []dir{w.dirAt("local/"+l, []string{"etc", "other"}[i])}
				n++
			}
		}
		for i := range tables {
			_, err := tables[i].sweep("s", w.checkout+"/"+fmt.Sprint(i), dirs[i], w.save)
			w.must(err)
		}
		for i := range tables {
			checkout := w.checkout + "/" + fmt.Sprint(i)
			err := tables[i].show("s", checkout, dirs[i], os.Getuid(), w.save)
			w.must(err)
		}
		if got := w.mounts(); len(got) != n {
			t.Errorf("%v: mounts %v", locals, got)
		}
	}
}

// TestMountsAreIndependent: one that can't be made holds up no other, at any time.
func TestMountsAreIndependent(t *testing.T) {
	w := newMountWorld(t)
	bad, etc := w.dirAt("bad", "nope"), w.dirAt("etc", "etc")
	if _, err := w.show(bad, etc); !strings.Contains(fmt.Sprint(err), `mount "nope" on `+bad.local) {
		t.Errorf("%v", err)
	}
	if w.read("etc/app.conf") != "one\n" {
		t.Error("not mounted")
	}
	w.reboot()
	if err := w.table.restore("svc"); err == nil || w.read("etc/app.conf") != "one\n" {
		t.Errorf("after a boot: %v, %v", err, w.mounts())
	}
	failing := func() error { return errors.New("disk full") }
	err := w.table.show("svc", w.checkout, []dir{w.dirAt("more", "other")}, 0, failing)
	if err == nil || lexists(w.dir+"/more") {
		t.Errorf("made, though it can't be remembered: %v", err)
	}
}

// TestMountRestore: after a boot the table alone is enough, and only what is root's is believed.
func TestMountRestore(t *testing.T) {
	w := newMountWorld(t)
	w.apply(w.dirAt("a", "etc"), w.dirAt("new/b", "one.conf"))
	w.reboot()
	w.must(os.RemoveAll(w.dir+"/new"), w.table.restore("svc"))
	if got := w.read("a/app.conf") + w.read("new/b"); got != "one\nsingle\n" {
		t.Errorf("%q", got)
	}
	w.reboot()
	w.must(os.Rename(w.checkout, w.checkout+".new"), w.table.restore("svc"))
	if got := w.read("a/app.conf"); got != "one\n" {
		t.Errorf("from .new: %q", got)
	}
	w.must(os.Rename(w.checkout+".new", w.checkout))
	w.apply(w.dirAt("a", "etc"), w.dirAt("new/b", "one.conf"))

	w.reboot()
	w.must(os.Chmod(w.checkout, 0o777))
	w.must(os.Chown(w.checkout, 65534, 65534))
	if err := w.table.restore("svc"); err == nil || len(w.mounts()) > 0 {
		t.Errorf("somebody else's checkout was mounted: %v", err)
	}
}

// TestMountCutShort: a swap that was killed half way leaves two mounts, of which the lower one is newer.
func TestMountCutShort(t *testing.T) {
	w := newMountWorld(t)
	one := w.dirAt("one", "one.conf")
	w.apply(one)
	w.replace("one.conf", "new")
	w.must(syscall.Mount(one.local, one.local, "", syscall.MS_BIND, ""))
	w.apply(one)
	if w.read("one") != "new" {
		t.Errorf("%q", w.read("one"))
	}
}

// TestMountOfSomebodyElse stays, hidden below ours, which is all that is taken away.
func TestMountOfSomebodyElse(t *testing.T) {
	w := newMountWorld(t)
	w.must(os.Mkdir(w.dir+"/a", 0o755), syscall.Mount("tmpfs", w.dir+"/a", "tmpfs", 0, ""))
	w.write("a/theirs", "theirs\n")
	etc := w.dirAt("a", "etc")
	if _, err := w.show(etc); err != nil || w.read("a/app.conf") != "one\n" {
		t.Errorf("%v", err)
	}
	if gone := w.sweep(); len(gone) != 1 || w.read("a/theirs") != "theirs\n" {
		t.Errorf("%v", gone)
	}
}

// TestMountSymlinkedNames: mountinfo has other names than the config.
func TestMountSymlinkedNames(t *testing.T) {
	w := newMountWorld(t)
	w.must(os.Symlink("mount", w.dir+"/m"), os.Mkdir(w.dir+"/real", 0o755), os.Symlink("real", w.dir+"/l"))
	w.checkout = w.dir + "/m/svc"
	w.apply(w.dirAt("l/etc", "etc"), w.dirAt("l/one", "one.conf"))
	w.replace("one.conf", "two")
	w.apply(w.dirAt("l/etc", "other"), w.dirAt("l/one", "one.conf"))
	w.apply()
}

// TestMountReadersSeeWholeFiles reads a file mount in a tight loop while new files go live.
func TestMountReadersSeeWholeFiles(t *testing.T) {
	w := newMountWorld(t)
	text := func(n int) string { return fmt.Sprintf("%d\n%sEND\n", n, strings.Repeat("some words\n", 500)) }
	w.write("mount/svc/one.conf", text(0))
	one := w.dirAt("one", "one.conf")
	w.apply(one)

	var stop atomic.Bool
	reads, bad := 0, 0
	done := make(chan bool)
	go func() {
		defer close(done)
		for !stop.Load() {
			data, _ := os.ReadFile(one.local)
			reads++
			if !strings.HasSuffix(string(data), "END\n") || strings.Count(string(data), "\n") != 502 {
				bad++
			}
		}
	}()
	for i := range 100 {
		w.replace("one.conf", text(i+1))
		w.apply(one)
	}
	stop.Store(true)
	<-done
	if bad > 0 || reads == 0 || w.read("one") != text(100) {
		t.Errorf("%d of %d reads were bad; last: %.10q", bad, reads, w.read("one"))
	}
}

// TestUnmakeFollowsNothing: what was made for a mount is removed, not what somebody put in its place.
func TestUnmakeFollowsNothing(t *testing.T) {
	w := newMountWorld(t)
	w.write("victim/f", "")
	w.write("mine/f", "")
	w.write("mine/full", "x")
	w.must(os.Mkdir(w.dir+"/theirs", 0o755), os.Chmod(w.dir+"/theirs", 0o777))
	w.must(os.Symlink(w.dir+"/victim", w.dir+"/theirs/d"))
	unmake([]string{w.dir + "/mine/f", w.dir + "/mine/full", w.dir + "/theirs/d/f"}, nil)
	for name, want := range map[string]bool{"/mine/f": false, "/mine/full": true, "/victim/f": true} {
		if lexists(w.dir+name) != want {
			t.Errorf("%s: there %v, want %v", name, !want, want)
		}
	}
}
