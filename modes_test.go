//go:build linux

package main

import (
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
)

// has compares whose the paths below a directory are, and their modes, with lines "PATH UID:GID MODE".
func has(t *testing.T, top, want string) {
	t.Helper()
	for line := range strings.SplitSeq(strings.TrimSpace(want), "\n") {
		line = strings.TrimSpace(line)
		p, _, _ := strings.Cut(line, " ")
		var st syscall.Stat_t
		if err := syscall.Lstat(path.Join(top, p), &st); err != nil {
			t.Errorf("%s: %v", p, err)
			continue
		}
		got := fmt.Sprintf("%s %d:%d %04o", p, st.Uid, st.Gid, st.Mode&0o7777)
		if got != line {
			t.Errorf("%s, want %s", got, line)
		}
	}
}

// TestFilesModes: a link's mode and group, and those of a link in it, hold for what is new and for what is
// there, and are put right without an edit being kept or anything of somebody's own being touched.
func TestFilesModes(t *testing.T) {
	b := newFilesBed(t, "top/a", "top/a/in", "key!", "empty")
	one := b.tree("top/a/f", "f", "top/a/d/run", "x:#!", "top/a/l", "l:f", "top/a/mod", "s:1",
		"top/a/in/f", "i", "top/a/in/d/f", "i", "key", "k")
	b.must("one", one)
	const usual = `
		top 0:0 0755
		top/a 65534:65534 0755
		top/a/f 65534:65534 0644
		top/a/d 65534:65534 0755
		top/a/d/run 65534:65534 0755
		top/a/mod 65534:65534 0755
		top/a/in/d/f 65534:65534 0644
		empty 65534:65534 0755`
	has(t, b.dir, usual)
	b.write("top/a/d/own", "own")

	b.groups = map[string]int{"tls": 4711, "one": 1}
	b.dirs[0].mode, b.dirs[0].group = 0o440, "tls"
	b.dirs[1].mode = 0o600
	b.dirs[2].mode, b.dirs[2].group = 0o640, "one"
	b.dirs[3].group = "tls"
	const special = `
		top 0:0 0755
		top/a 65534:4711 0550
		top/a/f 65534:4711 0440
		top/a/d 65534:4711 0550
		top/a/d/run 65534:4711 0550
		top/a/d/own 0:0 0644
		top/a/l 65534:4711 0777
		top/a/mod 65534:4711 0550
		top/a/in 65534:65534 0700
		top/a/in/f 65534:65534 0600
		top/a/in/d 65534:65534 0700
		top/a/in/d/f 65534:65534 0600
		key 65534:1 0640
		empty 65534:4711 0755`
	inode := func() uint64 {
		var st syscall.Stat_t
		syscall.Stat(b.dir+"/top/a/d", &st)
		return st.Ino
	}
	before := inode()
	b.again()
	b.must("one", one)
	has(t, b.dir, special)
	if inode() != before {
		t.Error("a directory was replaced, and with it a mount of it")
	}

	// Drift of each kind.
	for _, drift := range []func() error{
		func() error { return os.Chmod(b.dir+"/key", 0o644) },
		func() error { return os.Chown(b.dir+"/key", 65534, 65534) },
		func() error { return os.Chmod(b.dir+"/top/a/d", 0o2777) },
		func() error { return os.Chown(b.dir+"/top/a", 65534, 0) },
		func() error { return os.Chmod(b.dir+"/top/a/d/run", 0o4555) },
		func() error { return os.Lchown(b.dir+"/top/a/l", 65534, 0) },
	} {
		if err := drift(); err != nil {
			t.Fatal(err)
		}
		if d, err := b.compare(t.Context(), one); err != nil || d.changes() != 1 || len(d.edited) > 0 {
			t.Errorf("drift: %+v, %v", d, err)
		}
		b.must("one", one)
		has(t, b.dir, special)
	}

	// New ones below them; a directory of somebody else's stays theirs.
	os.Mkdir(b.dir+"/top/a/theirs", 0o711)
	b.must("two", b.tree("top/a/f", "2", "top/a/new/deep/f", "2", "top/a/theirs/f", "2", "key", "x:2",
		"top/a/in/f", "i"))
	has(t, b.dir, `
		top/a/f 65534:4711 0440
		top/a/new 65534:4711 0550
		top/a/new/deep 65534:4711 0550
		top/a/new/deep/f 65534:4711 0440
		top/a/theirs 0:0 0711
		top/a/theirs/f 65534:4711 0440
		top/a/d/own 0:0 0644
		key 65534:1 0750`)

	// Back to what is usual.
	for i := range b.dirs {
		b.dirs[i].mode, b.dirs[i].group = 0, ""
	}
	b.must("one", one)
	has(t, b.dir, usual)
}

// TestFilesModesPlanted: while a directory's mode is put right, the user puts other things in its place.
func TestFilesModesPlanted(t *testing.T) {
	b := newFilesBed(t, "a")
	want := b.tree("a/d/f", "f")
	b.must("one", want)
	victim := t.TempDir()
	if err := os.Chmod(victim, 0o711); err != nil {
		t.Fatal(err)
	}
	for _, plant := range []func(at string) error{
		func(at string) error { return os.Symlink(victim, at) },
		func(at string) error { return os.Rename(victim, at) },
		func(at string) error { return syscall.Mkfifo(at, 0o666) },
	} {
		os.Chmod(b.dir+"/a/d", 0o700)
		d, err := b.compare(t.Context(), want)
		if err != nil || !slices.Equal(d.modes, []string{"a/d"}) {
			t.Fatalf("%+v, %v", d, err)
		}
		if err := os.Rename(b.dir+"/a/d", b.dir+"/a/moved"); err != nil {
			t.Fatal(err)
		}
		if err := plant(b.dir + "/a/d"); err != nil {
			t.Fatal(err)
		}
		if err := b.stage(t.Context(), want, d, b.read); err != nil {
			t.Fatal(err)
		}
		if err := b.publish(t.Context(), version{"one", "content one"}, want, d); err != nil {
			t.Fatal(err)
		}
		if _, err := b.finish(t.Context()); err != nil {
			t.Fatal(err)
		}
		at := victim
		if fi, err := os.Lstat(victim); err != nil || !fi.IsDir() {
			at = b.dir + "/a/d" // where it was moved to
		}
		has(t, at, ". 0:0 0711")
		if err := os.Rename(b.dir+"/a/d", victim); err != nil {
			os.Remove(b.dir + "/a/d")
		}
		if err := os.Rename(b.dir+"/a/moved", b.dir+"/a/d"); err != nil {
			t.Fatal(err)
		}
	}
}

// TestGroup: a group that this host has not is BROKEN with words; another one in the config takes effect on
// what is there, and the unit is told.
func TestGroup(t *testing.T) {
	w := newWorld(t)
	w.spec.dirs[0].group = "no-such-group"
	w.restart()
	w.reconcile()
	const words = `group "no-such-group" does not exist: create it, or name the package that brings it`
	w.want("BROKEN", words, w.read("local/etc/app.conf"), "")

	w.spec.dirs[0].group = ""
	w.restart()
	w.reconcile()
	w.want("OK", "", "one\n", "reload")
	has(t, w.dir+"/local", "etc/sub/deep 0:0 0644")

	w.spec.dirs[0].group, w.spec.dirs[0].mode = "daemon", 0o640
	w.boot()
	w.reconcile()
	w.want("OK", "", "one\n", "reload")
	has(t, w.dir+"/local", `
		etc 0:1 0750
		etc/app.conf 0:1 0640
		etc/sub 0:1 0750
		etc/sub/deep 0:1 0640
		one.conf 0:0 0644`)
	if status := w.git(w.s.files.dir, "status", "--porcelain"); status != "" {
		t.Error("git status:", status)
	}
	w.kept("etc/app.conf")

	w.spec.dirs[0].mode = 0o750 // with x for all files
	w.restart()
	w.reconcile()
	w.want("OK", "", "one\n", "reload")
	has(t, w.dir+"/local", "etc/app.conf 0:1 0750")
	if status := w.git(w.s.files.dir, "status", "--porcelain"); status != "" {
		t.Error("git status:", status)
	}
	w.reconcile()
	w.want("OK", "", "one\n", "")
	if names, _ := filepath.Glob(w.s.files.dir + "/" + editsDir + "/*"); len(names) > 0 {
		t.Error("kept", names)
	}
}
