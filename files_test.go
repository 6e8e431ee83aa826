//go:build linux

package main

import (
	"bytes"
	"context"
	"crypto/sha1"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// filesBed is a service's directory, and a store of blobs in place of a clone.
type filesBed struct {
	*testing.T
	*files
	blobs map[string]string
}

func newFilesBed(t *testing.T, links ...string) *filesBed {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	tmp := t.TempDir()
	nobody := account{uid: 65534, gid: 65534}
	f := &files{dir: tmp + "/m/svc", manifest: tmp + "/state/svc.manifest", acct: nobody}
	for _, l := range links {
		if name, isFile := strings.CutSuffix(l, "!"); isFile {
			f.dirs = append(f.dirs, dir{link: name, kind: aFile})
		} else {
			f.dirs = append(f.dirs, dir{link: l})
		}
	}
	return &filesBed{t, f, map[string]string{}}
}

// again is a new process.
func (b *filesBed) again() {
	old := b.files
	b.files = &files{dir: old.dir, manifest: old.manifest, acct: old.acct, dirs: old.dirs, nested: old.nested,
		groups: old.groups}
}

// tree makes a tree of "path", "content" pairs; a content may begin with "x:", "l:" or "s:" for other kinds.
func (b *filesBed) tree(pairs ...string) tree {
	t := tree{}
	for i := 0; i < len(pairs); i += 2 {
		mode, content := "100644", pairs[i+1]
		for prefix, m := range map[string]string{"x:": "100755", "l:": "120000", "s:": "160000"} {
			if c, ok := strings.CutPrefix(content, prefix); ok {
				mode, content = m, c
			}
		}
		sum := sha1.Sum([]byte(fmt.Sprintf("blob %d\x00%s", len(content), content)))
		id := hex.EncodeToString(sum[:])
		b.blobs[id] = content
		t[pairs[i]] = blob{mode, id}
	}
	return t
}

func (b *filesBed) read(id string, w io.Writer) (int64, error) {
	n, err := io.WriteString(w, b.blobs[id])
	return int64(n), err
}

// show is a pass's part of files: it returns what was kept.
func (b *filesBed) show(name string, want tree) ([]string, error) {
	ctx := context.Background()
	if err := b.prepare(ctx, nil); err != nil {
		return nil, err
	}
	d, err := b.compare(ctx, want)
	if err != nil {
		return nil, err
	}
	if err := b.stage(ctx, want, d, b.read); err != nil {
		return nil, err
	}
	if err := b.publish(ctx, version{name, "content " + name}, want, d); err != nil {
		return nil, err
	}
	return b.finish(ctx)
}

// must shows want, and sees that all of it is there, that nothing else is to be done, and that nothing was
// kept but kept, paths within a directory of edits.
func (b *filesBed) must(name string, want tree, kept ...string) {
	b.Helper()
	got, err := b.show(name, want)
	if err != nil {
		b.Fatalf("%s: %v", name, err)
	}
	for i := range got {
		rel := strings.TrimPrefix(got[i], b.dir+"/"+editsDir+"/")
		_, got[i], _ = strings.Cut(rel, "/")
	}
	slices.Sort(got)
	if !slices.Equal(got, kept) {
		b.Fatalf("%s: kept %q, want %q", name, got, kept)
	}
	b.right(name, want)
}

func (b *filesBed) right(name string, want tree) {
	b.Helper()
	if b.live() != (version{name, "content " + name}) || b.pending() {
		b.Fatalf("%s: live is %v, pending %v", name, b.live(), b.pending())
	}
	for p, w := range want {
		var st syscall.Stat_t
		at := b.dir + "/" + p
		if err := syscall.Lstat(at, &st); err != nil {
			b.Fatalf("%s: %s: %v", name, p, err)
		}
		content, mode := "", ""
		switch st.Mode & syscall.S_IFMT {
		case syscall.S_IFLNK:
			content, _ = os.Readlink(at)
			mode = "120000"
		case syscall.S_IFDIR:
			mode, content = "160000", b.blobs[w.id]
		case syscall.S_IFREG:
			data, _ := os.ReadFile(at)
			content, mode = string(data), fmt.Sprintf("%o", st.Mode)
		}
		if b.groups != nil { // the test looks by itself
			mode, st.Gid = w.mode, 65534
		}
		if mode != w.mode || content != b.blobs[w.id] || st.Uid != 65534 || st.Gid != 65534 {
			b.Errorf("%s: %q is %s %q of %d:%d", name, p, mode, content, st.Uid, st.Gid)
		}
	}
	fresh := &files{dir: b.dir, manifest: b.manifest, acct: b.acct, dirs: b.dirs, groups: b.groups}
	for _, f := range []*files{b.files, fresh} {
		d, err := f.compare(b.Context(), want)
		if n := len(d.put) + len(d.gone) + len(d.edited) + len(d.alien); err != nil || n > 0 {
			b.Errorf("%s: afterwards %+v %v", name, d, err)
		}
	}
}

func (b *filesBed) write(p, content string) {
	b.Helper()
	if err := os.WriteFile(b.dir+"/"+p, []byte(content), 0o644); err != nil {
		b.Fatal(err)
	}
}

// keptText returns all that was ever kept of a path.
func (b *filesBed) keptText(p string) (all []string) {
	names, _ := filepath.Glob(b.dir + "/" + editsDir + "/*/" + p)
	for _, n := range names {
		if data, err := os.ReadFile(n); err == nil { // a kill may leave an empty directory
			all = append(all, string(data))
		}
	}
	return all
}

func TestFilesPublish(t *testing.T) {
	b := newFilesBed(t, "etc/app", "etc/app/sub", "one.conf!", "empty")
	odd := []string{
		" blank ", `quote"s`, "new\nline", "bad\xff\xfe", "-rf", "Case", "case",
		strings.Repeat("n", 255), "tab\t", `back\slash`,
	}
	one := []string{"one.conf", "1", "etc/app/a", "a", "etc/app/run", "x:#!", "etc/app/l", "l:a/b",
		"etc/app/mod", "s:1",
		"etc/app/d/e/f", "f", "etc/app/sub/x", "x"}
	for _, n := range odd {
		one = append(one, "etc/app/"+n, n)
	}
	b.must("one", b.tree(one...))
	if fi, err := os.Stat(b.dir + "/empty"); err != nil || owner(b, "empty") != 65534 || !fi.IsDir() {
		t.Error("no empty link", err)
	}
	const them = 65534
	owners := map[string]int{"": 0, ourDir: 0, "etc": 0, "etc/app": them, "etc/app/d/e": them, "empty": them}
	for p, uid := range owners {
		if owner(b, p) != uid {
			t.Errorf("%s is %d's", p, owner(b, p))
		}
	}

	// Each kind becomes each other one.
	two := b.tree("one.conf", "2", "etc/app/a/deep/file", "f", "etc/app/run", "#!", "etc/app/l", "file",
		"etc/app/mod", "file",
		"etc/app/d", "l:nowhere", "etc/app/sub/x", "s:2")
	b.must("two", two)
	b.must("three", b.tree("one.conf", "l:2", "etc/app/a", "l:a", "etc/app/l/x", "x", "etc/app/d", "s:1"))
	b.must("four", b.tree("one.conf", "1", "etc/app/a/b", "b", "etc/app/d/x", "x"))
	b.again()
	b.must("one", b.tree(one...))
	b.must("none", tree{"one.conf": b.tree("one.conf", "1")["one.conf"]})
	if names, _ := os.ReadDir(b.dir + "/etc/app"); len(names) != 1 || names[0].Name() != "sub" {
		t.Error("left:", names)
	}
}

func owner(b *filesBed, p string) int {
	fi, err := os.Lstat(path.Join(b.dir, p))
	if err != nil {
		return -1
	}
	return int(fi.Sys().(*syscall.Stat_t).Uid)
}

func TestFilesEdits(t *testing.T) {
	b := newFilesBed(t, "a")
	one := b.tree("a/f", "one", "a/g", "gone", "a/same", "1234", "a/d/x", "x", "a/hard", "h")
	b.must("one", one)

	b.write("a/f", "edited")
	b.write("a/new", "mine")
	b.write("a/same", "4321") // of the same size, at once
	d, err := b.compare(t.Context(), one)
	if fmt.Sprint(d, err) != "{[a/f a/same] [] [a/f a/same] [] []} <nil>" {
		t.Fatal(d, err)
	}
	b.must("one", one, "a/f", "a/same")
	b.must("one", one)

	// Edits of what goes or changes; somebody's own where a commit puts a file; removed files.
	b.write("a/g", "kept too")
	b.write("a/d/own", "own")
	os.Remove(b.dir + "/a/f")
	two := b.tree("a/f", "two", "a/new", "ours", "a/d", "a file", "a/hard", "h")
	b.must("two", two, "a/d/own", "a/g", "a/new")
	if k := b.keptText("a/d/own"); len(k) != 1 || k[0] != "own" {
		t.Error(k)
	}

	// Through a descriptor that is open, and after a hard link was made.
	fd, _ := os.OpenFile(b.dir+"/a/f", os.O_WRONLY|os.O_APPEND, 0)
	defer fd.Close()
	os.Link(b.dir+"/a/hard", b.dir+"/a/other")
	b.write("a/other", "H")
	b.must("three", b.tree("a/f", "three"), "a/f", "a/hard")
	fd.WriteString("!")
	if k := b.keptText("a/f"); !slices.Contains(k, "two!") {
		t.Error(k)
	}

	// Owner and mode alone are put right and are no edits.
	os.Chmod(b.dir+"/a/f", 0o600)
	d, _ = b.compare(t.Context(), b.tree("a/f", "three"))
	if fmt.Sprint(d) != "{[a/f] [] [] [] []}" {
		t.Error(d)
	}
	os.Chown(b.dir+"/a/f", 0, 0)
	b.must("three", b.tree("a/f", "three"))
}

// TestFilesCutBeforeFinish writes through a descriptor (as through a file mount) that a cut publish left.
func TestFilesCutBeforeFinish(t *testing.T) {
	b := newFilesBed(t, "a")
	ctx, one, two := t.Context(), b.tree("a/f", "one", "a/g", "g"), b.tree("a/f", "two", "a/h", "h")
	b.must("one", one)
	d, err := b.compare(ctx, two)
	err = errors.Join(err, b.stage(ctx, two, d, b.read), b.publish(ctx, version{"two", ""}, two, d))
	fd, err2 := os.OpenFile(b.dir+"/"+publishDir+"/a/f", os.O_WRONLY|os.O_APPEND, 0)
	if err := errors.Join(err, err2); err != nil {
		t.Fatal(err)
	}
	defer fd.Close()

	b.again()
	if !b.pending() || b.live().Commit != "one" {
		t.Error("pending", b.pending(), b.live())
	}
	three := b.tree("a/f", "three", "a/g", "g")
	d, err = b.compare(ctx, three)
	if fmt.Sprint(d, err) != "{[a/f a/g] [a/h] [] [] []} <nil>" {
		t.Error(d, err)
	}
	b.must("three", three, "a/f")
	fd.WriteString(" edited")
	if k := b.keptText("a/f"); !slices.Contains(k, "one edited") {
		t.Error(k)
	}
}

// TestFilesFoldedTwice: which names a file system that folds case would take for one.
func TestFilesFoldedTwice(t *testing.T) {
	if p, q := foldedTwice(tree{"a/b": {}, "a/c": {}, "A/C": {}}); p != "A/C" || q != "a/c" {
		t.Errorf("%q, %q", p, q)
	}
	if p, _ := foldedTwice(tree{"a/b": {}, "a/c": {}}); p != "" {
		t.Errorf("%q", p)
	}
}

func TestFilesPlanted(t *testing.T) {
	b := newFilesBed(t, "a", "file!")
	one := b.tree("a/1", "1", "a/2", "2", "a/3", "3", "a/4", "4", "a/d/5", "5", "a/e/6", "6", "file", "f")
	b.must("one", one)
	at := b.dir + "/a/"
	for _, n := range []string{"1", "2", "3", "4", "d", "e"} {
		os.RemoveAll(at + n)
	}
	syscall.Mkfifo(at+"1", 0o666)
	syscall.Mknod(at+"2", syscall.S_IFCHR|0o666, 1<<8|5)
	os.Symlink("/etc/shadow", at+"3")
	os.WriteFile(at+"4", nil, 0o644)
	os.Truncate(at+"4", 15<<40)
	os.Symlink("/etc", at+"d")
	os.WriteFile(b.dir+"/file", nil, 0o644)
	os.Truncate(b.dir+"/file", 1<<40)
	deep := at + "e"
	for range 300 {
		deep += "/d"
	}
	os.MkdirAll(deep, 0o755)

	start := time.Now()
	b.must("one", one, "a/1", "a/2", "a/3", "a/4", "a/d", "file")
	os.RemoveAll(at + "e/6")
	os.Mkdir(at+"e/6", 0o755)
	b.must("two", b.tree("a/e", "a file", "file", "f"), "a/e/d")
	if took := time.Since(start); took > 5*time.Second {
		t.Error("took", took)
	}
	if names, _ := filepath.Glob("/etc/5"); len(names) > 0 {
		t.Error("wrote through a link")
	}
}

func TestFilesManifestLost(t *testing.T) {
	b := newFilesBed(t, "a")
	one := b.tree("a/f", "one", "a/g", "g", "a/l", "l:x")
	for _, torn := range []bool{false, true} {
		b.must("one", one)
		b.write("a/f", "edit")
		b.write("a/own", "own")
		if torn {
			os.Truncate(b.manifest, 100)
		} else {
			os.Remove(b.manifest)
		}
		b.again()
		if b.live() != (version{}) {
			t.Error("live", b.live())
		}
		if err := b.prepare(t.Context(), one); err != nil {
			t.Fatal(err)
		}
		two := b.tree("a/f", "two", "a/l", "l:x")
		d, err := b.compare(t.Context(), two)
		if fmt.Sprint(d, err) != "{[a/f] [a/g] [a/f] [] []} <nil>" {
			t.Error(d, err)
		}
		b.must("two", two, "a/f")
	}
}

// TestFilesKilled kills a process that publishes, at any moment, while somebody saves numbered edits.
func TestFilesKilled(t *testing.T) {
	b := newFilesBed(t, "a", "b/c")
	one := b.tree("a/f", "one", "a/d/x", "x", "a/k", "file", "b/c/1", "1", "a/t", "temp")
	two := b.tree("a/f", "two", "a/d", "x is a file", "a/k/k", "dir", "b/c/2", "2", "a/n/n/n", "new")
	if os.Getenv("FILES_CHILD") != "" {
		b.files.dir, b.files.manifest = os.Getenv("FILES_CHILD"), os.Getenv("FILES_CHILD")+".manifest"
		for {
			for name, tr := range map[string]tree{"one": one, "two": two} {
				if _, err := b.show(name, tr); err != nil {
					fmt.Println(err)
					os.Exit(1)
				}
			}
		}
	}
	b.manifest = b.dir + ".manifest"
	b.must("one", one)

	stop, done, saved := make(chan bool), make(chan bool), 0
	go func() {
		defer close(done)
		for n := 1; ; n++ {
			select {
			case <-stop:
				return
			case <-time.After(2 * time.Millisecond):
			}
			tmp := b.dir + "/a/.edit"
			os.WriteFile(tmp, []byte("edit "+strconv.Itoa(n)), 0o644)
			if os.Rename(tmp, b.dir+"/a/f") == nil {
				saved = n
			}
		}
	}()

	for i := range 30 {
		cmd := exec.Command(os.Args[0], "-test.run=^TestFilesKilled$")
		cmd.Env = append(os.Environ(), "FILES_CHILD="+b.dir)
		var out bytes.Buffer
		cmd.Stdout = &out
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		kill := time.AfterFunc(time.Duration(20+i*7)*time.Millisecond, func() { cmd.Process.Kill() })
		if err := cmd.Wait(); cmd.ProcessState.ExitCode() == 1 {
			t.Fatal(err, out.String())
		}
		kill.Stop()
	}
	close(stop)
	<-done
	b.again()
	if _, err := b.show("two", two); err != nil {
		t.Fatal(err)
	}
	b.right("two", two)
	kept := b.keptText("a/f")
	data, _ := os.ReadFile(b.dir + "/a/f")
	t.Log(saved, "edits,", len(kept), "kept, live:", string(data))
	// An edit that the editor itself replaced is gone, but the last of all must be there.
	if saved < 10 || !slices.Contains(kept, "edit "+strconv.Itoa(saved)) {
		t.Errorf("edit %d is lost", saved)
	}
	for _, p := range []string{"a/k/k", "b/c/2"} {
		if k := b.keptText(p); len(k) > 0 {
			t.Error("ours was kept:", p, k)
		}
	}
	for _, p := range []string{"a/d/x", "a/t", "b/c/1", "a/n/n/n", "a/d", "a/k"} {
		for _, text := range b.keptText(p) {
			t.Error("ours was kept:", p, text)
		}
	}
}

// TestFilesNoEditLost has each numbered edit in a file of its own generation: all are live or kept.
func TestFilesNoEditLost(t *testing.T) {
	b := newFilesBed(t, "a")
	b.must("0", b.tree("a/f", "0"))
	stop, done := make(chan bool), make(chan bool)
	var saved []string
	go func() {
		defer close(done)
		for n := 0; ; n++ {
			select {
			case <-stop:
				return
			default:
			}
			// In place, once: only into what is not an edit already, as an exchange tells.
			text, tmp := fmt.Sprintf("edit %d", n), b.dir+"/a/.edit"
			os.WriteFile(tmp, []byte(text), 0o644)
			top, _ := openPlace(b.dir + "/a")
			err := renameat2(top, ".edit", top, "f", renameExchange)
			was, _ := os.ReadFile(tmp)
			top.close()
			if strings.HasPrefix(string(was), "edit") {
				saved = saved[:len(saved)-1] // we overwrote our own
			}
			if err == nil {
				saved = append(saved, text)
			}
		}
	}()
	for i := 1; i <= 60; i++ {
		if _, err := b.show(strconv.Itoa(i), b.tree("a/f", strconv.Itoa(i))); err != nil {
			t.Fatal(err)
		}
	}
	close(stop)
	<-done
	b.show("end", b.tree("a/f", "end"))
	kept := b.keptText("a/f")
	for _, s := range saved {
		if !slices.Contains(kept, s) {
			t.Errorf("%s of %d is lost", s, len(saved))
		}
	}
	if len(saved) < 5 {
		t.Error("only", len(saved))
	}
}

func TestFilesFull(t *testing.T) {
	for _, opts := range []string{"size=64k", "nr_inodes=25"} {
		t.Run(opts, func(t *testing.T) {
			b := newFilesBed(t, "a")
			mnt := filepath.Dir(b.dir)
			os.MkdirAll(mnt, 0o755)
			if err := syscall.Mount("tmpfs", mnt, "tmpfs", 0, opts); err != nil {
				t.Skip(err)
			}
			defer syscall.Unmount(mnt, 0)
			one := b.tree("a/f", "one")
			b.must("one", one)

			pairs := []string{"a/f", "two"}
			for i := range 40 {
				pairs = append(pairs, fmt.Sprintf("a/%d", i), strings.Repeat("x", 4000))
			}
			two := b.tree(pairs...)
			for range 2 {
				_, err := b.show("two", two)
				if words := fmt.Sprint(err); !strings.Contains(words, "no space left on device") ||
					!strings.Contains(words, b.dir) {
					t.Fatal(err)
				}
				if lexists(b.dir + "/" + stageDir) {
					t.Error("the stage is still there")
				}
				b.right("one", one)
			}
			if _, err := b.show("two", two); err == nil || !strings.Contains(err.Error(), "as before") {
				t.Error("tried again:", err)
			}
			b.must("three", b.tree("a/f", "three"))
			if err := syscall.Mount("", mnt, "", syscall.MS_REMOUNT, "size=1m,nr_inodes=1000"); err != nil {
				t.Fatal(err)
			}
			b.must("two", two)
		})
	}
}

func TestFilesMountBelow(t *testing.T) {
	b := newFilesBed(t, "a")
	one := b.tree("a/d/f", "1", "a/g", "g")
	b.must("one", one)
	if err := syscall.Mount("tmpfs", b.dir+"/a/d", "tmpfs", 0, ""); err != nil {
		t.Skip(err)
	}
	_, err := b.show("two", b.tree("a/d/f", "2", "a/g", "G"))
	var broken brokenError
	if !errors.As(err, &broken) || !strings.Contains(err.Error(), b.dir+"/a/d is a mount point") {
		t.Error(err)
	}
	if data, _ := os.ReadFile(b.dir + "/a/g"); string(data) != "g" {
		t.Error("something went live")
	}
	syscall.Unmount(b.dir+"/a/d", 0)
	b.must("two", b.tree("a/d/f", "2", "a/g", "G"))
}

func TestFilesTakeOver(t *testing.T) {
	b := newFilesBed(t, "a", "x/y", "other", "one!")
	for _, p := range []string{".git", "a", "x/y", "other", "nest/svc"} {
		os.MkdirAll(b.dir+"/"+p, 0o755)
	}
	b.nested = []string{b.dir + "/nest/svc"}
	for _, p := range []string{".git/stash", "a/f", "a/untracked", "x/y/f", "other/f", "one", "nest/svc/f"} {
		b.write(p, p)
	}
	exec.Command("chown", "-R", "65534:65534", b.dir).Run()
	os.Chown(b.dir+"/other", 1, 1)
	local := t.TempDir()
	if err := syscall.Mount(b.dir+"/a", local, "", syscall.MS_BIND, ""); err != nil {
		t.Skip(err)
	}
	defer syscall.Unmount(local, syscall.MNT_DETACH)

	stop, done := make(chan bool), make(chan error, 1)
	go func() {
		for {
			select {
			case <-stop:
				done <- nil
				return
			default:
			}
			for _, p := range []string{"f", "untracked"} {
				if data, err := os.ReadFile(local + "/" + p); err != nil || len(data) == 0 {
					done <- fmt.Errorf("a gap: %v", err)
					return
				}
			}
		}
	}()
	want := b.tree("a/f", "a/f", "x/y/f", "new", "other/f", "other/f", "one", "one")
	if err := b.prepare(t.Context(), want); err != nil {
		t.Fatal(err)
	}
	if err := b.prepare(t.Context(), want); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(b.dir + "/nest/svc/f"); err != nil {
		t.Error(err)
	}
	b.must("new", want, "x/y/f")
	close(stop)
	if err := <-done; err != nil {
		t.Error(err)
	}
	os.WriteFile(local+"/through", nil, 0o644)
	there := []string{"svc/a/through", "svc/a/untracked", "svc.before/.git/stash", "svc.before/other/f"}
	for _, p := range there {
		if !lexists(filepath.Dir(b.dir) + "/" + p) {
			t.Error(p, "is missing")
		}
	}
	if lexists(b.dir+".before.2") || lexists(b.dir+".new") || lexists(b.dir+"/.git") {
		t.Error("leftovers")
	}

	// A changed user: the old one's links stay behind.
	b.acct = account{uid: 1234, gid: 1234}
	b.again()
	if _, err := b.show("user", want); err != nil {
		t.Fatal(err)
	}
	if owner(b, "a") != 1234 || owner(b, "a/f") != 1234 || !lexists(b.dir+".before.2/a/untracked") {
		t.Error("not laid out anew")
	}
}

// TestFilesTakeOverCut leaves each state that a kill can.
func TestFilesTakeOverCut(t *testing.T) {
	for cut := range 5 {
		t.Run(strconv.Itoa(cut), func(t *testing.T) {
			b := newFilesBed(t, "a", "b")
			os.MkdirAll(b.dir+"/.git", 0o755)
			for _, p := range []string{"a", "b"} {
				os.MkdirAll(b.dir+"/"+p, 0o755)
				b.write(p+"/own", p)
			}
			exec.Command("chown", "-R", "65534:65534", b.dir).Run()
			if cut >= 1 {
				os.MkdirAll(b.dir+".new/"+ourDir, 0o755)
			}
			if cut == 2 || cut == 3 { // as an earlier version did it
				os.Rename(b.dir+"/a", b.dir+".new/a")
			}
			if cut >= 3 {
				if cut == 3 {
					os.Rename(b.dir+"/b", b.dir+".new/b")
				}
				os.Rename(b.dir, b.dir+".x")
				os.Rename(b.dir+".new", b.dir)
				os.Rename(b.dir+".x", b.dir+".new")
			}
			b.must("one", b.tree("a/f", "f", "b/f", "f"))
			for _, p := range []string{"/a/own", "/b/own", ".before/.git"} {
				if !lexists(b.dir + p) {
					t.Error(p, "is missing")
				}
			}
		})
	}
}

func TestFilesDress(t *testing.T) {
	b := newFilesBed(t, "a", "sp ace [x]!")
	up := t.TempDir()
	git := func(args ...string) string {
		t.Helper()
		cmd := exec.Command("git", args...)
		cmd.Env = append(os.Environ(), "GIT_CONFIG_GLOBAL=/dev/null", "HOME=/root",
			"GIT_AUTHOR_NAME=x", "GIT_AUTHOR_EMAIL=x", "GIT_COMMITTER_NAME=x", "GIT_COMMITTER_EMAIL=x")
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("git %v: %v\n%s", args, err, out)
		}
		return strings.TrimSpace(string(out))
	}
	git("init", "-q", up)
	os.MkdirAll(up+"/a", 0o755)
	os.MkdirAll(up+"/elsewhere", 0o755)
	for _, p := range []string{"a/f", "sp ace [x]", "elsewhere/big"} {
		os.WriteFile(up+"/"+p, []byte(p), 0o644)
	}
	git("-C", up, "add", ".")
	git("-C", up, "commit", "-qm", "one")
	commit := git("-C", up, "rev-parse", "HEAD")

	want := b.tree("a/f", "a/f", "sp ace [x]", "sp ace [x]")
	b.must("one", want)
	beside := []entry{{"40000", "elsewhere/", git("-C", up, "rev-parse", "HEAD:elsewhere")}}
	index, err := indexText(want, beside, len(commit))
	if err != nil {
		t.Fatal(err)
	}
	dress := func() error { return b.dress(commit, up+"/.git/objects", index) }
	for range 2 {
		if err := dress(); err != nil {
			t.Fatal(err)
		}
		if out := git("-C", b.dir, "status", "--porcelain"); out != "" {
			t.Error(out)
		}
		if out := git("-C", b.dir, "log", "--format=%s"); out != "one" {
			t.Error(out)
		}
	}
	b.write("a/f", "changed")
	if out := git("-C", b.dir, "status", "--porcelain"); out != "M a/f" {
		t.Errorf("%q", out)
	}
	os.Remove(b.dir + "/.git/index.lock")
	git("-C", b.dir, "stash", "-q")
	if err := dress(); err != nil || git("-C", b.dir, "stash", "list") == "" {
		t.Error("the stash is gone", err)
	}
	if got := git("-C", b.dir, "ls-files", "-t"); got != "H a/f\nS elsewhere/big\nH sp ace [x]" {
		t.Error(got)
	}
	os.WriteFile(b.dir+"/.git/index", []byte("broken"), 0o644)
	os.RemoveAll(b.dir + "/.git/refs")
	if err := dress(); err != nil || git("-C", b.dir, "status", "--porcelain") != "" {
		t.Error(err, git("-C", b.dir, "status", "--porcelain"))
	}
}

func TestFilesPlace(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	tmp := t.TempDir()
	nobody := account{uid: 65534, gid: 65534}
	p, err := makePlace(tmp+"/x/y/z", aFile, nobody)
	if err != nil {
		t.Fatal(err)
	}
	st, _ := p.stat()
	p.close()
	if st.Uid != 65534 || st.Mode != syscall.S_IFREG|0o644 {
		t.Errorf("%o of %d", st.Mode, st.Uid)
	}
	os.Chown(tmp+"/x", 65534, 65534)
	if p, err = makePlace(tmp+"/x/theirs", aDirectory, nobody); err != nil {
		t.Fatal(err)
	}
	if st, _ := p.stat(); st.Uid != 0 {
		t.Error("given away in a directory that others can write")
	}
	p.close()
	os.Symlink("/etc", tmp+"/x/link")
	_, err = openPlace(tmp + "/x/link/passwd")
	if !strings.Contains(fmt.Sprint(err), "symbolic link") {
		t.Error(err)
	}
	top, err := openPlace(tmp)
	if err != nil {
		t.Fatal(err)
	}
	defer top.close()
	if _, err := top.below("x/link"); !errors.Is(err, syscall.ELOOP) {
		t.Error(err)
	}
	if _, err := top.below("x/none"); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
}

// TestFilesSteady: nobody but root can replace a directory of ours, or one above it.
func TestFilesSteady(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	for _, c := range []struct {
		name        string
		uid         int
		above, mode uint32
		steady, own bool
	}{
		{"root's", 0, 0o755, 0o755, true, true},
		{"sticky above", 0, 0o1777, 0o755, true, true},
		{"open above", 0, 0o777, 0o755, false, false},
		{"another's above", 65534, 0o755, 0o755, false, false},
		{"open itself", 0, 0o755, 0o777, false, false},
		{"sticky itself", 0, 0o755, 0o1777, true, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			above := t.TempDir() + "/above"
			err := errors.Join(os.MkdirAll(above+"/m/svc", 0o755), os.Chown(above, c.uid, 0),
				syscall.Chmod(above, c.above), syscall.Chmod(above+"/m/svc", c.mode))
			if err != nil {
				t.Fatal(err)
			}
			for want, open := range map[*bool]func(string) (place, error){&c.steady: openSteady, &c.own: openOwn} {
				p, err := open(above + "/m/svc")
				if isOpen := err == nil; isOpen != *want || !isOpen && !errors.As(err, new(brokenError)) {
					t.Error(err)
				}
				p.close()
			}
		})
	}
}

func BenchmarkFilesIdle(b *testing.B) {
	nobody := account{uid: 65534, gid: 65534}
	f := &files{dir: b.TempDir() + "/svc", manifest: b.TempDir() + "/m", acct: nobody}
	f.dirs = []dir{{link: "a"}}
	bed := &filesBed{files: f, blobs: map[string]string{}}
	var pairs []string
	for i := range 10_000 {
		pairs = append(pairs, fmt.Sprintf("a/%d/%d", i%100, i), strconv.Itoa(i))
	}
	want := bed.tree(pairs...)
	start := time.Now()
	if _, err := bed.show("x", want); err != nil {
		b.Fatal(err)
	}
	b.Log("first publish took", time.Since(start))
	time.Sleep(youngest)
	bed.compare(b.Context(), want)
	for b.Loop() {
		if d, err := bed.compare(b.Context(), want); err != nil || len(d.put) > 0 {
			b.Fatal(d, err)
		}
	}
}
