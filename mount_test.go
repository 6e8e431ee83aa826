package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
)

func TestParseMountinfo(t *testing.T) {
	const info = `22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
30 22 254:0 /srv/c/x\040y/etc /etc/x\134y rw shared:1 - ext4 /dev/vda rw
31 22 254:0 /srv/c/x\040y/one//deleted /etc/one rw shared:1 - ext4 /dev/vda rw
32 22 254:0 /srv/c/x\040yz /etc/other rw shared:1 - ext4 /dev/vda rw
33 31 0:30 / /etc/one rw - tmpfs tmpfs rw
34 22 0:31 /srv/c/x\040y/etc /etc/foreign rw - tmpfs tmpfs rw
`
	mounts, err := parseMountinfo(info)
	if err != nil {
		t.Fatal(err)
	}
	var points []string
	for _, m := range sourcesBelow(mounts, "/srv/c/x y") {
		points = append(points, m.point)
	}
	if got, want := fmt.Sprint(points), `[/etc/x\y /etc/one]`; got != want {
		t.Errorf("mounts of the checkout: %s, want %s", got, want)
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
		if mounts, err := parseMountinfo(info); err == nil && filepath.IsAbs(dir) {
			sourcesBelow(mounts, filepath.Clean(dir))
		}
	})
}

func TestMountTargets(t *testing.T) {
	for _, tc := range []struct {
		name, local string // below the test's directory
		prepare     func(dir string) error
		file        bool
		err         string
	}{
		{"made", "a/b/c", func(string) error { return nil }, false, ""},
		{"file made", "a/b/c", func(string) error { return nil }, true, ""},
		{"directory there", "a", func(d string) error { return os.Mkdir(d+"/a", 0o700) }, false, ""},
		{"file there", "a", func(d string) error { return os.WriteFile(d+"/a", []byte("x"), 0o600) }, true, ""},
		{"file where a directory should be", "a", func(d string) error { return os.WriteFile(d+"/a", nil, 0o600) }, false, "must both be directories"},
		{"directory where a file should be", "a", func(d string) error { return os.Mkdir(d+"/a", 0o700) }, true, "must both be files"},
		{"link of root's", "l/x", func(d string) error {
			return errors.Join(os.Mkdir(d+"/there", 0o755), os.Symlink("there", d+"/l"))
		}, false, ""},
		{"link in a directory of others", "open/l/x", func(d string) error {
			return errors.Join(os.Mkdir(d+"/open", 0o755), os.Chmod(d+"/open", 0o777), os.Symlink("/", d+"/open/l"))
		}, false, "open/l is a symbolic link below a directory that others than root can write"},
		{"link behind a directory of others", "open/in/l", func(d string) error {
			return errors.Join(os.MkdirAll(d+"/open/in", 0o755), os.Chmod(d+"/open", 0o777), os.Symlink("/", d+"/open/in/l"))
		}, false, "is a symbolic link"},
		{"links with ..", "l/x", func(d string) error {
			return errors.Join(os.MkdirAll(d+"/a/b", 0o755), os.MkdirAll(d+"/a/t", 0o755), os.Symlink("a/b", d+"/s"), os.Symlink("s/../t", d+"/l"))
		}, false, ""},
		{"link in circles", "l/x", func(d string) error { return os.Symlink("l", d+"/l") }, false, "too many levels"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			// Not below /tmp, which others can write.
			dir, err := os.MkdirTemp("/var/lib", "gitopper-test-")
			if err != nil {
				t.Skipf("needs a directory that only root can write: %v", err)
			}
			t.Cleanup(func() {
				syscall.Unmount(filepath.Join(dir, tc.local), syscall.MNT_DETACH|8) // UMOUNT_NOFOLLOW
				os.RemoveAll(dir)
			})
			if err := tc.prepare(dir); err != nil {
				t.Fatal(err)
			}
			src := t.TempDir()
			if err := errors.Join(os.Mkdir(src+"/d", 0o755), os.WriteFile(src+"/f", []byte("f"), 0o644)); err != nil {
				t.Fatal(err)
			}
			root, err := os.OpenRoot(src)
			if err != nil {
				t.Fatal(err)
			}
			defer root.Close()
			d := dir2(filepath.Join(dir, tc.local), tc.file)
			err = bind(root, d, account{uid: os.Getuid(), gid: os.Getgid()}, false)
			if tc.err == "" && err != nil || tc.err != "" && (err == nil || !strings.Contains(err.Error(), tc.err)) {
				t.Fatalf("%v, want %q", err, tc.err)
			}
			if err == nil && !shows(src, d.link, d.local) {
				t.Errorf("%s does not show %s", d.local, d.link)
			}
		})
	}
}

func dir2(local string, file bool) dir {
	if file {
		return dir{local: local, link: "f", file: true}
	}
	return dir{local: local, link: "d"}
}

// TestSourceIsNotFollowed: what the owner of a checkout makes a link of is not what root mounts.
func TestSourceIsNotFollowed(t *testing.T) {
	src := t.TempDir()
	if err := errors.Join(os.Symlink("/etc", src+"/d"), os.Symlink("/etc/passwd", src+"/f"), os.Mkdir(src+"/sub", 0o755)); err != nil {
		t.Fatal(err)
	}
	root, err := os.OpenRoot(src)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	for _, file := range []bool{false, true} {
		local := t.TempDir() + "/l"
		if err := bind(root, dir2(local, file), account{uid: os.Getuid(), gid: os.Getgid()}, false); err == nil {
			syscall.Unmount(local, syscall.MNT_DETACH)
			t.Errorf("file=%v: a symbolic link was mounted", file)
		}
	}
}

// TestReadersSeeWholeFiles reads a file mount and a file in a directory mount in tight loops while commits go live.
func TestReadersSeeWholeFiles(t *testing.T) {
	w := newWorld(t)
	w.spec.action = ""
	w.restart()
	text := func(n int) string { return fmt.Sprintf("%d\n%sEND\n", n, strings.Repeat("some words\n", 500)) }
	w.commit("etc/app.conf", text(0), "one.conf", text(0))
	w.reconcile()
	var stop atomic.Bool
	type result struct{ reads, bad int }
	results := make(chan result, 2)
	for _, d := range []string{"local/etc/app.conf", "local/one.conf"} {
		go func() {
			var r result
			for !stop.Load() {
				data, err := os.ReadFile(filepath.Join(w.dir, d))
				if r.reads++; err != nil || !strings.HasSuffix(string(data), "END\n") || strings.Count(string(data), "\n") != 502 {
					r.bad++
				}
			}
			results <- r
		}()
	}
	for i := range 40 {
		w.commit("etc/app.conf", text(i+1), "one.conf", text(i+1))
		w.reconcile()
	}
	stop.Store(true)
	for range 2 {
		if r := <-results; r.bad > 0 || r.reads == 0 {
			t.Errorf("%d of %d reads were bad", r.bad, r.reads)
		} else {
			t.Logf("%d reads", r.reads)
		}
	}
	if got := w.read("local/one.conf"); got != text(40) {
		t.Errorf("last: %.20q", got)
	}
}

func TestCheck(t *testing.T) {
	w := newWorld(t)
	w.spec.action = ""
	script := func(text string) { w.write("check.sh", text) }
	w.spec.check = []string{"bash", w.dir + "/check.sh"}
	local := w.dir + "/local"
	script("cat " + local + "/etc/app.conf " + local + "/one.conf; test ! -e " + local + "/etc/gone; ! grep -q bad " + local + "/etc/app.conf")
	w.restart()
	w.commit("etc/app.conf", "bad\n")
	w.reconcile()
	if st := w.s.Status(); st.State != "DIFF" || !strings.Contains(st.Info, "check bash: exit status 1: bad; single") {
		t.Fatalf("first commit: %+v", st)
	}
	if entries, err := os.ReadDir(local + "/etc"); err != nil || len(entries) > 0 {
		t.Errorf("a refused first commit left %v %v", entries, err)
	}
	w.commit("etc/app.conf", "good\n", "etc/gone", "")
	w.reconcile()
	w.want("OK", "", "good\n", "")
	// The candidate is complete: changed, unchanged, removed and untracked files, and all the old ones are live meanwhile.
	w.write("local/etc/mine", "untracked\n")
	script("set -e\nread a < " + local + "/etc/app.conf; test $a = three; test ! -e " + local + "/etc/sub; read m < " + local + "/etc/mine; test $m = untracked\n" +
		"read o < " + local + "/one.conf; test $o = single\n! echo x 2>/dev/null > " + local + "/etc/app.conf; ! rm " + local + "/etc/mine 2>/dev/null; ! echo x 2>/dev/null > " + local + "/one.conf\n" +
		"nsenter -t " + fmt.Sprint(os.Getpid()) + " -m true 2>/dev/null && exit 7\necho saw it; exit 3")
	w.commit("etc/app.conf", "three\n", "etc/sub", "")
	w.reconcile()
	w.want("DIFF", "check bash: exit status 3: saw it", "good\n", "")
	good := w.s.Status().Commit
	// Remembered by content: neither a commit elsewhere nor a new process tries it again; a changed check does.
	script("exit 0")
	w.commit("other/file", "elsewhere\n")
	w.restart()
	w.reconcile()
	w.want("DIFF", "saw it", "good\n", "")
	if got := w.s.Status().Commit; got != good {
		t.Errorf("runs %s, want %s", got, good)
	}
	w.spec.check = append(w.spec.check, "again")
	w.restart()
	w.reconcile()
	w.want("OK", "", "three\n", "")
	// A missing program is no verdict.
	w.spec.check = []string{"/nope/check"}
	w.commit("etc/app.conf", "four\n")
	w.restart()
	w.reconcile()
	w.want("DIFF", "the commit waits", "three\n", "")
	os.MkdirAll(w.dir+"/nope", 0o755)
	w.spec.check = []string{"bash", w.dir + "/check.sh"}
	// What it leaves behind is ended, what it floods is cut.
	script(fmt.Sprintf("setsid sleep 1000.%d & ", os.Getpid()) + "yes flood | head -c 3000000; echo last; exit 1")
	w.restart()
	w.reconcile()
	w.want("DIFF", "flood; last", "three\n", "")
	if left, err := filepath.Glob("/proc/[0-9]*/cmdline"); err == nil {
		for _, f := range left {
			if data, _ := os.ReadFile(f); string(data) == fmt.Sprintf("sleep\x001000.%d\x00", os.Getpid()) {
				t.Errorf("left: %s", f)
			}
		}
	}
	mounts, _ := readMountinfo()
	for _, m := range mounts {
		if strings.Contains(m.point, "/state/check/") {
			t.Errorf("left: %+v", m)
		}
	}
	script("exit 0")
	if err := w.s.operate(context.Background(), op{verb: "pull"}); err != nil {
		t.Error(err)
	}
	w.want("OK", "", "four\n", "")
	// Rollback to what ran is not checked again, to what never ran it is.
	never := w.commit("etc/app.conf", "never\n")
	w.commit("etc/app.conf", "five\n")
	w.reconcile()
	script("echo no; exit 1")
	var oe *opError
	if err := w.s.operate(context.Background(), op{verb: "rollback", hash: never}); !errors.As(err, &oe) || oe.status != "Not Acceptable" {
		t.Errorf("rollback to a commit that the check refuses: %v", err)
	}
	w.want("OK", "", "five\n", "")
	if err := w.s.operate(context.Background(), op{verb: "rollback", hash: good}); err != nil {
		t.Error(err)
	}
	w.want("FREEZE", "ROLLBACK", "good\n", "")
}

// TestCheckFollowsNothing: what the owner of a checkout puts in the place of a staged file is not what the check reads.
func TestCheckFollowsNothing(t *testing.T) {
	dir := t.TempDir()
	stage := dir + "/checkout/" + stageDir
	if err := errors.Join(os.MkdirAll(stage+"/etc", 0o755), os.MkdirAll(dir+"/checkout/etc", 0o755), os.WriteFile(dir+"/secret", []byte("s3cret\n"), 0o600),
		os.WriteFile(dir+"/checkout/one", []byte("old\n"), 0o644), os.WriteFile(dir+"/local", nil, 0o644), os.Symlink(dir+"/secret", stage+"/one")); err != nil {
		t.Fatal(err)
	}
	err := runCheck(context.Background(), dir+"/scratch", view{Checkout: dir + "/checkout", Shows: []shown{{dir + "/local", "one", true}}, Argv: []string{"cat", dir + "/local"}})
	if err == nil || errors.As(err, new(*refusal)) || strings.Contains(err.Error(), "s3cret") {
		t.Errorf("a link in the stage: %v", err)
	}
}

// TestUnmakeFollowsNothing: what was made for a mount is removed, not what somebody put in its place.
func TestUnmakeFollowsNothing(t *testing.T) {
	dir := t.TempDir()
	if err := errors.Join(os.MkdirAll(dir+"/theirs", 0o777), os.Chmod(dir+"/theirs", 0o777), os.Mkdir(dir+"/victim", 0o755), os.WriteFile(dir+"/victim/f", nil, 0o600),
		os.Symlink(dir+"/victim", dir+"/theirs/d"), os.Mkdir(dir+"/mine", 0o755), os.WriteFile(dir+"/mine/f", nil, 0o644), os.WriteFile(dir+"/mine/full", []byte("x"), 0o644)); err != nil {
		t.Fatal(err)
	}
	unmake([]string{dir + "/mine/f", dir + "/mine/full", dir + "/theirs/d/f"})
	for name, want := range map[string]bool{"/mine/f": false, "/mine/full": true, "/victim/f": true} {
		if lexists(dir+name) != want {
			t.Errorf("%s: there %v, want %v", name, !want, want)
		}
	}
}
