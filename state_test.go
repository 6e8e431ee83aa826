//go:build linux

package main

import (
	"errors"
	"fmt"
	"io/fs"
	"math/rand"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestStateEditIsUndone: by the round that finds it, kept whole, counted, and the unit is told.
func TestStateEditIsUndone(t *testing.T) {
	w := okWorld(t)
	label := labels("service", "svc.service")
	before := counted("gitopper_service_drift_total", label)
	for i, edit := range []string{"edited\n", "again\n"} {
		w.write("local/etc/app.conf", edit)
		w.write("local/etc/mine", "untracked\n")
		w.reconcile()
		w.want("OK", "", "one\n", "reload")
		w.shows("local/etc/mine", "untracked\n")
		if n := counted("gitopper_service_drift_total", label) - before; n != float64(i+1) {
			t.Errorf("%v edits counted, want %d", n, i+1)
		}
	}
	w.kept("etc/app.conf", "edited\n", "again\n")
	w.reconcile()
	w.want("OK", "", "one\n", "")
}

// TestStateEditsOfEachKind: what stands where a file of ours should be.
func TestStateEditsOfEachKind(t *testing.T) {
	for name, edit := range map[string]func(w *world, file string) error{
		"removed":        func(_ *world, file string) error { return os.Remove(file) },
		"parent removed": func(_ *world, file string) error { return os.RemoveAll(filepath.Dir(file)) },
		"symbolic link": func(_ *world, file string) error {
			return errors.Join(os.Remove(file), os.Symlink("/etc/passwd", file))
		},
		"pipe": func(_ *world, file string) error {
			return errors.Join(os.Remove(file), syscall.Mkfifo(file, 0o644))
		},
		"directory": func(_ *world, file string) error {
			return errors.Join(os.Remove(file), os.MkdirAll(file+"/in/it", 0o755))
		},
		"mode":            func(_ *world, file string) error { return os.Chmod(file, 0o600) },
		"owner":           func(_ *world, file string) error { return os.Chown(file, 1, 1) },
		"as old, as long": func(_ *world, file string) error { return sameTimes(file, "peed\n") },
		"hidden from git": func(w *world, file string) error {
			w.git(w.s.files.dir, "update-index", "--assume-unchanged", "etc/sub/deep")
			w.git(w.s.files.dir, "update-index", "--skip-worktree", "etc/sub/deep")
			return os.WriteFile(file, []byte("hidden\n"), 0o644)
		},
	} {
		t.Run(name, func(t *testing.T) {
			w := okWorld(t)
			file := w.dir + "/local/etc/sub/deep"
			before, err := os.Stat(file)
			if err != nil {
				t.Fatal(err)
			}
			if err := edit(w, file); err != nil {
				t.Fatal(err)
			}
			w.reconcile()
			w.want("OK", "", "one\n", "reload")
			w.shows("local/etc/sub/deep", "deep\n")
			w.clean()
			after, err := os.Lstat(file)
			if err != nil {
				t.Fatal(err)
			}
			if after.Mode() != before.Mode() || after.Sys().(*syscall.Stat_t).Uid != 0 {
				t.Errorf("%v, want %v", after.Mode(), before.Mode())
			}
		})
	}
}

// sameTimes writes a file in place, and sets its time of change back.
func sameTimes(file, text string) error {
	fi, err := os.Stat(file)
	if err != nil {
		return err
	}
	if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
		return err
	}
	return os.Chtimes(file, fi.ModTime(), fi.ModTime())
}

// TestStateEditUnderPin: it is only reported, and kept and undone by what comes next.
func TestStateEditUnderPin(t *testing.T) {
	for _, verb := range []string{"unfreeze", "rollback"} {
		t.Run(verb, func(t *testing.T) {
			w := okWorld(t)
			h := w.head()
			if err := w.op("freeze", ""); err != nil {
				t.Fatal(err)
			}
			w.write("local/etc/app.conf", "emergency\n")
			for range 2 {
				w.reconcile()
				w.want("FREEZE", "me; edited here: etc/app.conf", "emergency\n", "")
			}
			w.restart()
			w.reconcile()
			w.want("FREEZE", "me; edited here: etc/app.conf", "emergency\n", "")

			state, app := "FREEZE", "one\n"
			if verb == "unfreeze" {
				w.commit("etc/app.conf", "two\n")
				state, app = "OK", "two\n"
			}
			if err := w.op(verb, h[:8]); err != nil {
				t.Fatal(err)
			}
			info := map[string]string{"FREEZE": "ROLLBACK"}[state]
			w.want(state, info, app, "reload")
			w.kept("etc/app.conf", "emergency\n")
		})
	}
}

// TestStateAlienInTheWay: somebody's own file where a commit has one is kept, unless it is the same.
func TestStateAlienInTheWay(t *testing.T) {
	w := okWorld(t)
	w.write("local/etc/mine", "untracked\n")
	w.write("local/etc/same", "same\n")
	w.commit("etc/mine", "upstream's\n", "etc/same", "same\n")
	w.reconcile()
	w.want("OK", "", "one\n", "reload")
	w.shows("local/etc/mine", "upstream's\n")
	w.kept("etc/mine", "untracked\n")
	w.kept("etc/same")
}

func TestStateAlienFileForDirectory(t *testing.T) {
	w := okWorld(t)
	w.write("local/etc/d", "a file\n")
	w.commit("etc/d/x", "x\n")
	w.reconcile()
	w.want("OK", "", "one\n", "reload")
	w.shows("local/etc/d/x", "x\n")
	w.kept("etc/d", "a file\n")
}

func TestStateAlienDirectoryForFile(t *testing.T) {
	w := okWorld(t)
	w.commit("etc/d/x", "x\n")
	w.reconcile()
	w.write("local/etc/d/untracked", "u\n")
	w.commit("etc/d", "", "etc/d2", "x\n")
	w.reconcile()
	w.shows("local/etc/d/untracked", "u\n")
	w.commit("etc/d", "a file now\n")
	w.reconcile()
	w.want("OK", "", "one\n", "reload, reload, reload")
	w.shows("local/etc/d", "a file now\n")
	w.kept("etc/d/untracked", "u\n")
}

// TestStateHugeEdit: what is large is kept whole, too.
func TestStateHugeEdit(t *testing.T) {
	w := okWorld(t)
	noise := make([]byte, 70<<20)
	rand.New(rand.NewSource(1)).Read(noise)
	w.write("local/etc/app.conf", string(noise))
	w.commit("etc/sub/deep", "deeper\n")
	w.reconcile()
	w.want("OK", "", "one\n", "reload")
	w.shows("local/etc/sub/deep", "deeper\n")
	w.kept("etc/app.conf", string(noise))
}

// TestStateManyEdits: more edited files than fit a command line.
func TestStateManyEdits(t *testing.T) {
	w := newWorld(t)
	name := strings.Repeat("n", 200)
	for i := range 12000 {
		w.write(fmt.Sprintf("work/etc/many/%s%d", name, i), "x")
	}
	w.push()
	w.reconcile()
	w.want("OK", "", "one\n", "reload")
	if err := os.RemoveAll(w.dir + "/local/etc/many"); err != nil {
		t.Fatal(err)
	}
	w.reconcile()
	w.want("OK", "", "one\n", "reload")
	w.shows("local/etc/many/"+name+"11999", "x")
}

// TestStateDamageHeals: whatever becomes of the checkout and of what we remember of it.
func TestStateDamageHeals(t *testing.T) {
	spoil := func(name, text string) func(*world) {
		return func(w *world) { w.write(name, text) }
	}
	gone := func(name string) func(*world) {
		return func(w *world) { os.RemoveAll(w.dir + "/" + name) }
	}
	const mount, state = "mount/svc.service", "state/services/svc.service"
	for _, tc := range []struct {
		name  string
		spoil func(w *world)
	}{
		{"index.lock", spoil(mount+"/.git/index.lock", "")},
		{"empty HEAD", spoil(mount+"/.git/HEAD", "")},
		{"garbage index", spoil(mount+"/.git/index", "DIRC garbage")},
		{"garbage config", spoil(mount+"/.git/config", "[[[")},
		{"no .git", gone(mount + "/.git")},
		{".git is a file", func(w *world) { gone(mount + "/.git")(w); spoil(mount+"/.git", "x")(w) }},
		{"no .gitopper", gone(mount + "/.gitopper")},
		{".gitopper is a file", func(w *world) {
			gone(mount + "/.gitopper")(w)
			spoil(mount+"/.gitopper", "x")(w)
		}},
		{"a stage in the way", spoil(mount+"/.gitopper/stage", "x")},
		{"no checkout", gone(mount)},
		{"link is gone", gone(mount + "/etc")},
		{"file link is gone", gone(mount + "/one.conf")},
		{"link is a file", func(w *world) { gone(mount + "/etc")(w); spoil(mount+"/etc", "x")(w) }},
		{"no manifest", gone(state + ".files")},
		{"empty manifest", spoil(state+".files", "")},
		{"garbage manifest", spoil(state+".files", "gitopper manifest 1\nlive")},
		{"no record", gone(state + ".json")},
		{"neither record nor manifest", func(w *world) { gone("state/services")(w) }},
		{"no state at all", gone("state")},
	} {
		for _, restart := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s restart=%v", tc.name, restart), func(t *testing.T) {
				w := okWorld(t)
				tc.spoil(w)
				if restart {
					w.restart()
				}
				w.commit("etc/app.conf", "two\n")
				for range 3 { // git itself may have to fail once before the damage shows
					w.reconcile()
				}
				if calls := w.calls(); !strings.HasPrefix(calls, "reload") {
					t.Errorf("calls: %s", calls)
				}
				w.want("OK", "", "two\n", "")
				w.shows("local/one.conf", "single\n")
				w.shows("local/etc/sub/deep", "deep\n")
				if got := w.mounts(); len(got) != 2 {
					t.Errorf("mounts: %v", got)
				}
				w.wantRuns(1, w.reconcile)
				w.want("OK", "", "two\n", "")
			})
		}
	}
}

// TestStatePowerCutLeavesPeoplesGit: what a power cut takes of the .git for people is there after the next start,
// also where the unit does not come up.
func TestStatePowerCutLeavesPeoplesGit(t *testing.T) {
	w := okWorld(t)
	w.commit("etc/app.conf", "two\n") // so that there is an older HEAD
	w.reconcile()
	git := w.s.files.dir + "/.git/"
	for _, name := range []string{"index", "config", "HEAD", "info/exclude", "info/attributes", "info/sparse-checkout"} {
		for _, size := range []int64{0, 30} {
			whole, err := os.ReadFile(git + name)
			if err != nil {
				t.Fatal(err)
			}
			if err := os.Truncate(git+name, min(size, int64(len(whole))-1)); err != nil {
				t.Fatal(err)
			}
			if name == "index" && size > 0 { // as a disk that lost the last of what it was told may have it
				err = os.Truncate(git+name, int64(len(whole)))
			}
			if err != nil {
				t.Fatal(err)
			}
			w.restart()
			w.reconcile()
			got := w.read("mount/svc.service/.git/" + name)
			isIndex := name == "index" // in which git notes what it saw
			if got != string(whole) && !isIndex {
				t.Errorf("%s of %d bytes: now it is %q, was %q", name, size, got, whole)
			}
			w.clean()
		}
	}
	w.want("OK", "", "two\n", "reload")

	w.write("fake/svc.service", "failed")
	os.RemoveAll(git + "refs")
	os.Truncate(git+"config", 0)
	w.restart()
	w.reconcile()
	if got := w.s.Status().State; got != "BROKEN" {
		t.Errorf("the unit is down, and the state is %s", got)
	}
	w.clean()
}

// TestStatePeoplesConfigStays: what people configure in a checkout's .git of root's stays, and so does their index.
func TestStatePeoplesConfigStays(t *testing.T) {
	w := okWorld(t)
	dir := w.s.files.dir
	w.write("local/etc/new.conf", "theirs\n")
	w.git(dir, "add", "etc/new.conf")
	w.git(dir, "config", "user.nick", "ann")
	for range 2 {
		w.restart()
		w.reconcile()
	}
	if got := w.git(dir, "config", "user.nick"); strings.TrimSpace(got) != "ann" {
		t.Errorf("user.nick is %q", got)
	}
	if got := w.git(dir, "diff", "--cached", "--name-only"); strings.TrimSpace(got) != "etc/new.conf" {
		t.Errorf("staged: %q", got)
	}
	w.want("OK", "", "one\n", "")
}

// TestStateNoGitDecides: what stands in the checkout's .git is for people, and theirs.
func TestStateNoGitDecides(t *testing.T) {
	w := okWorld(t)
	w.git(w.s.files.dir, "checkout", "-q", "--orphan", "other")
	w.git(w.s.files.dir, "config", "remote.origin.url", "file:///nowhere")
	w.reconcile()
	w.want("OK", "", "one\n", "")
	h := w.commit("etc/app.conf", "two\n")
	w.restart()
	w.reconcile()
	w.want("OK", "", "two\n", "reload")
	w.runs(h)
	w.clean()
}

// TestStatePipeDoesNotBlock: a pipe planted in the checkout blocks nothing.
func TestStatePipeDoesNotBlock(t *testing.T) {
	for _, name := range []string{"/.git/HEAD", "/.git/config", "/etc/app.conf", "/one.conf"} {
		t.Run(name, func(t *testing.T) {
			w := okWorld(t)
			file := w.s.files.dir + name
			if err := os.Remove(file); err != nil {
				t.Fatal(err)
			}
			if err := syscall.Mkfifo(file, 0o644); err != nil {
				t.Fatal(err)
			}
			w.commit("etc/app.conf", "two\n")
			done := make(chan struct{})
			go func() { defer close(done); w.reconcile() }()
			select {
			case <-done:
			case <-time.After(20 * time.Second):
				t.Fatal("the pass hangs")
			}
			w.want("OK", "", "two\n", "reload")
			w.clean()
		})
	}
}

func TestStateOtherBranch(t *testing.T) {
	w := okWorld(t)
	w.git(w.work, "push", "-q", "origin", "HEAD:refs/heads/canary/1")
	canary := w.head()
	w.spec.branch = "canary/1"
	w.commit("etc/app.conf", "main\n")
	w.restart()
	w.reconcile()
	w.want("OK", "", "one\n", "")
	w.runs(canary)
	w.spec.branch = "main"
	w.restart()
	w.reconcile()
	w.want("OK", "", "main\n", "reload")
}

// TestStateOtherDirs: one mount goes, one comes, what is no longer named leaves the disk.
func TestStateOtherDirs(t *testing.T) {
	w := okWorld(t)
	w.spec.dirs = []dir{w.spec.dirs[0], {local: w.dir + "/local/new/deep", link: "other"}}
	w.restart()
	w.reconcile()
	w.want("OK", "", "one\n", "reload")
	w.clean()
	for _, name := range []string{w.dir + "/local/one.conf", w.s.files.dir + "/one.conf"} {
		if lexists(name) {
			t.Errorf("%s is still there", name)
		}
	}

	w.spec.dirs[0].link, w.spec.dirs[1].link = "other", "etc"
	w.restart()
	w.reconcile()
	w.shows("local/new/deep/app.conf", "one\n")
	w.shows("local/etc/file", "x\n")
	if calls := w.calls(); calls != "reload" {
		t.Errorf("calls: %s", calls)
	}
}

// TestStateMissingLink: the old files stay.
func TestStateMissingLink(t *testing.T) {
	w := okWorld(t)
	w.spec.dirs = append(w.spec.dirs, dir{local: w.dir + "/local/nope", link: "nope"})
	w.restart()
	w.reconcile()
	w.want("DIFF", `link "nope" is missing`, "one\n", "")
	w.commit("nope/x", "x\n")
	w.reconcile()
	w.want("OK", "", "one\n", "reload")
}

func TestStateOtherMount(t *testing.T) {
	w := okWorld(t)
	w.spec.mount = w.dir + "/mount2"
	w.restart()
	w.reconcile()
	w.want("OK", "", "one\n", "reload")
	w.clean()
}

// TestStateOtherUpstream has another history.
func TestStateOtherUpstream(t *testing.T) {
	w := okWorld(t)
	w.git(w.dir, "init", "-q", "--bare", "-b", "main", w.dir+"/up2.git")
	w.git(w.work, "checkout", "-q", "--orphan", "fresh")
	w.write("work/etc/app.conf", "elsewhere\n")
	w.git(w.work, "add", "-A")
	w.git(w.work, "commit", "-qm", "x")
	w.git(w.work, "push", "-q", w.dir+"/up2.git", "HEAD:main")
	w.spec.upstream = w.dir + "/up2.git"
	w.restart()
	w.reconcile()
	w.want("OK", "", "elsewhere\n", "reload")
	w.runs(w.head())
}

// TestStateLeavesTheConfig: its mounts go, its unit is not called, all else stays for its return.
func TestStateLeavesTheConfig(t *testing.T) {
	w := okWorld(t)
	retireRecords(w.dir+"/state", nil)
	if lexists(w.dir + "/local") {
		t.Error("local is still there")
	}
	if calls := w.calls(); calls != "" {
		t.Errorf("calls: %s", calls)
	}
	w.restart()
	w.reconcile()
	w.want("OK", "", "one\n", "reload")
}

// TestStateNoEntryUnmountsNothing: a host that is no longer in the config keeps its mounts.
func TestStateNoEntryUnmountsNothing(t *testing.T) {
	w := okWorld(t)
	w.write("k.pub", testKey)
	w.write("c.toml", fmt.Sprintf(`[global]
upstream = %q
mount = %q
keys = [{ path = "k.pub" }]
[[services]]
machine = "not-this-one"
service = "svc.service"
`, w.spec.upstream, w.spec.mount))
	t.Setenv("STATE_DIRECTORY", w.dir+"/state")
	for _, booted := range []bool{false, true} {
		if booted {
			w.unmountAll()
		}
		if _, stderr, status := gitopper(t, "--once", "-c", w.dir+"/c.toml"); status != 0 {
			t.Errorf("status %d: %s", status, stderr)
		}
		w.shows("local/etc/app.conf", "one\n")
		w.shows("local/one.conf", "single\n")
	}
}

// TestStateSigners: only signed commits that descend from the newest go live, but for rollbacks.
func TestStateSigners(t *testing.T) {
	w := okWorld(t)
	commit := w.signed()
	first := commit(true, "etc/app.conf", "1\n")
	w.reconcile()
	w.want("OK", "", "1\n", "reload")
	never := commit(false, "etc/app.conf", "unsigned\n")
	w.reconcile()
	w.want("DIFF", "is not signed by one of", "1\n", "")
	w.wantRuns(1, w.reconcile)
	second := commit(true, "etc/app.conf", "2\n")
	w.reconcile()
	w.want("OK", "", "2\n", "reload")

	w.git(w.work, "push", "-q", "-f", "origin", first+":main") // a replay
	w.reconcile()
	w.want("DIFF", "does not descend from "+second[:8], "2\n", "")
	if err := w.op("rollback", first); err != nil {
		t.Error(err)
	}
	w.want("FREEZE", "ROLLBACK", "1\n", "reload")
	w.git(w.work, "push", "-q", "-f", "origin", second+":main")
	wantStatus(t, w.op("rollback", never), "Not Acceptable", false)
	if err := w.op("unfreeze", ""); err != nil {
		t.Error(err)
	}
	w.want("OK", "", "2\n", "reload")
}

// TestStateSignersOfBranch: another branch starts anew.
func TestStateSignersOfBranch(t *testing.T) {
	w := okWorld(t)
	commit := w.signed()
	first := commit(true, "etc/app.conf", "1\n")
	commit(true, "etc/app.conf", "2\n")
	w.reconcile()
	w.want("OK", "", "2\n", "reload")
	w.git(w.work, "push", "-q", "-f", "origin", first+":refs/heads/canary")
	w.spec.branch = "canary"
	w.restart()
	w.reconcile()
	w.want("OK", "", "1\n", "reload")
}

// TestStateSignersComeRight: a commit that was refused is judged anew by another signers file.
func TestStateSignersComeRight(t *testing.T) {
	w := okWorld(t)
	commit := w.signed()
	good := w.read("signers")
	w.write("signers", "garbage\n")
	commit(true, "etc/app.conf", "two\n")
	w.reconcile()
	w.want("DIFF", "is not signed by one of", "one\n", "")
	w.write("signers", good)
	w.reconcile()
	w.want("OK", "", "two\n", "reload")
}

// TestStateSignersOfSameContent: a rollback to an unsigned commit is refused, also where it shows what runs.
func TestStateSignersOfSameContent(t *testing.T) {
	w := okWorld(t)
	commit := w.signed()
	commit(true, "etc/app.conf", "two\n")
	w.reconcile()
	w.want("OK", "", "two\n", "reload")
	wantStatus(t, w.op("rollback", commit(false, "other/file", "evil\n")), "Not Acceptable", false)
	w.want("OK", "", "two\n", "")
}

// TestStateSignersSibling: what a rollback brought is the newest that ran, of which the next has to descend.
func TestStateSignersSibling(t *testing.T) {
	w := okWorld(t)
	commit := w.signed()
	first := commit(true, "etc/app.conf", "1\n")
	w.reconcile()
	second := commit(true, "etc/app.conf", "2\n")
	w.reconcile()
	w.want("OK", "", "2\n", "reload, reload")
	if err := w.op("rollback", first); err != nil {
		t.Fatal(err)
	}
	w.back(first)
	commit(true, "etc/app.conf", "sibling\n")
	w.calls()
	if w.op("unfreeze", "") == nil {
		t.Error("carried out")
	}
	w.want("DIFF", "does not descend from "+second[:8], "1\n", "")
}

// TestStateOtherUser: the files are laid out anew, all of them the user's, and nothing of root's comes along.
func TestStateOtherUser(t *testing.T) {
	w := okWorld(t)
	passwd, err := os.Lstat("/etc/passwd")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("/etc/passwd", w.s.files.dir+"/etc/link"); err != nil {
		t.Fatal(err)
	}
	w.git(w.s.files.dir, "config", "planted.program", "x")
	w.asNobody()
	w.restart()
	w.reconcile()
	w.want("OK", "", "one\n", "reload")
	w.clean()
	for _, d := range w.spec.dirs {
		w.wantOwner(w.s.files.dir+"/"+d.link, w.s.files.acct.uid)
	}
	if strings.Contains(w.read("mount/svc.service/.git/config"), "planted") {
		t.Error("the configuration came along")
	}
	if after, err := os.Lstat("/etc/passwd"); err != nil || ownerOf(after) != ownerOf(passwd) {
		t.Error("a link was followed")
	}
}

func ownerOf(fi fs.FileInfo) int { return int(fi.Sys().(*syscall.Stat_t).Uid) }

// wantOwner fails if a path, or something below it, belongs to somebody else.
func (w *world) wantOwner(path string, uid int) {
	w.t.Helper()
	err := filepath.WalkDir(path, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if fi, err := d.Info(); err != nil || ownerOf(fi) != uid {
			w.t.Errorf("%s: owner is not %d: %v", p, uid, err)
		}
		return nil
	})
	if err != nil {
		w.t.Error(err)
	}
}

func TestStateUnknownUser(t *testing.T) {
	w := okWorld(t)
	w.spec.user = "nosuchuser"
	w.restart()
	w.reconcile()
	w.want("BROKEN", `user "nosuchuser" does not exist`, "one\n", "")
}
