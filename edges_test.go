//go:build linux

package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// The edges are what went wrong once, where two rare things came together.

// nopeCheck is a check that refuses commits whose app.conf says nope.
func (w *world) nopeCheck() []string {
	return []string{"sh", "-c", "! grep -q nope " + w.dir + "/local/etc/app.conf"}
}

// must fails if an operation was not carried out.
func (w *world) must(verb, hash string) {
	w.t.Helper()
	if err := w.op(verb, hash); err != nil {
		w.t.Errorf("%s: %v", verb, err)
	}
}

// otherDir is a third dir of the service's.
func (w *world) otherDir() dir { return dir{local: w.dir + "/local/other", link: "other"} }

// TestEdgeClockSetBack: what happened in the future holds nothing up.
func TestEdgeClockSetBack(t *testing.T) {
	w := okWorld(t)
	future := time.Now().Add(48 * time.Hour)
	w.editRecord(func(r *record) { r.Row.Since, r.Row.OutOfSync = future, future })
	w.write("mount/svc.service/.gitopper/edits/0007-20990101T000000Z/x", "x")
	w.restart()
	w.write("local/etc/app.conf", "precious\n")
	w.commit("one.conf", "two\n")
	w.reconcile()
	w.want("OK", "", "one\n", "reload")
	w.shows("local/one.conf", "two\n")
	w.kept("etc/app.conf", "precious\n")
}

// TestEdgeKilledThenRefusedTip: killed between publish and the record; meanwhile the next commit is refused.
func TestEdgeKilledThenRefusedTip(t *testing.T) {
	w := okWorld(t)
	w.spec.check = w.nopeCheck()
	w.restart()
	w.reconcile()
	w.calls()
	h := w.commit("etc/app.conf", "two\n")
	w.killAt("reload", 1)
	w.commit("etc/app.conf", "nope\n")
	w.reconcile()
	w.want("DIFF", "check", "two\n", "reload")
	w.runs(h)
}

// TestEdgeKilledInFallback: killed while the last good commit goes live, after which its unit is down.
func TestEdgeKilledInFallback(t *testing.T) {
	for _, step := range []string{"fall back", "reset-failed", "start"} {
		t.Run(step, func(t *testing.T) {
			w := okWorld(t)
			w.spec.action = "restart"
			w.restart()
			w.write("fake/reads", w.dir+"/local/etc/app.conf")
			w.commit("etc/app.conf", "bad\n")
			if step == "fall back" {
				w.killAt(step, 1)
			} else {
				w.reconcile()
				w.untellRecord()
			}
			w.write("fake/svc.service", "failed")
			w.calls()
			w.reconcile()
			w.want("BROKEN", "taken back", "one\n", "reset-failed, start")
		})
	}
}

// untellRecord makes the next life tell the unit anew.
func (w *world) untellRecord() {
	w.t.Helper()
	w.editRecord(func(r *record) { r.Told.Content = "" })
	w.restart()
}

// TestEdgeOtherDirsWhileRefused: what runs is shown as the changed dirs want it, also after a boot.
func TestEdgeOtherDirsWhileRefused(t *testing.T) {
	w := okWorld(t)
	w.spec.check = w.nopeCheck()
	w.restart()
	w.commit("etc/app.conf", "nope\n")
	w.reconcile()
	w.want("DIFF", "check", "one\n", "")
	w.spec.dirs = []dir{w.spec.dirs[0], w.otherDir()}
	w.boot()
	w.reconcile()
	w.want("DIFF", "check", "one\n", "reload")
	w.shows("local/other/file", "x\n")
	if lexists(w.dir + "/local/one.conf") {
		t.Errorf("mounts: %v", w.mounts())
	}
	w.editRecord(func(r *record) { r.Told.Boot = "another" })
	w.unmountAll()
	w.boot()
	w.shows("local/other/file", "x\n")
	w.reconcile()
	w.want("DIFF", "check", "one\n", "reload")
}

// TestEdgeOtherDirsAreChecked: what changed dirs would show does not go live when the check refuses it.
func TestEdgeOtherDirsAreChecked(t *testing.T) {
	for _, pinned := range []bool{false, true} {
		t.Run(fmt.Sprintf("pinned=%v", pinned), func(t *testing.T) {
			w := okWorld(t)
			if pinned {
				w.must("freeze", "")
			}
			w.spec.dirs = append(w.spec.dirs, w.otherDir())
			w.spec.check = []string{"false"}
			w.boot()
			w.reconcile()
			w.want("DIFF", "check", "one\n", "")
			if w.read("local/other/file") == "x\n" {
				t.Error("refused, and live")
			}
		})
	}
}

// TestEdgeOtherLinkIsChecked: before it is mounted.
func TestEdgeOtherLinkIsChecked(t *testing.T) {
	w := okWorld(t)
	w.spec.dirs = []dir{{local: w.dir + "/local/etc", link: "etc/sub"}}
	w.spec.check = []string{"false"}
	w.boot()
	w.reconcile()
	w.want("DIFF", "check", "one\n", "")
}

// TestEdgeLinkIsDirectoryNow: the dirs change, and a file of the old ones is a directory of the new ones.
func TestEdgeLinkIsDirectoryNow(t *testing.T) {
	w := okWorld(t)
	os.Remove(w.work + "/one.conf")
	w.commit("one.conf/in", "x\n")
	w.spec.check = []string{"grep", "-q", "x", w.dir + "/local/one/in"}
	w.spec.dirs = []dir{w.spec.dirs[0], {local: w.dir + "/local/one", link: "one.conf"}}
	w.boot()
	w.reconcile()
	w.want("OK", "", "one\n", "reload")
	w.shows("local/one/in", "x\n")
}

func TestEdgeFileWhereDirectoryWas(t *testing.T) {
	w := okWorld(t)
	os.RemoveAll(w.dir + "/local/etc/sub")
	w.write("local/etc/sub", "precious\n")
	w.reconcile()
	w.want("OK", "", "one\n", "reload")
	w.shows("local/etc/sub/deep", "deep\n")
	w.kept("etc/sub", "precious\n")
}

// TestEdgeSubmodule: a file becomes a submodule, and one again.
func TestEdgeSubmodule(t *testing.T) {
	w := okWorld(t)
	w.commit("etc/mod", "file\n")
	w.reconcile()
	w.git(w.work, "rm", "-q", "etc/mod")
	w.submodule("etc/mod")
	w.commit("etc/zzz", "z\n")
	w.reconcile()
	w.clean()
	w.shows("local/etc/zzz", "z\n")
	w.git(w.work, "rm", "-q", "--cached", "etc/mod")
	os.Remove(w.work + "/etc/mod")
	w.commit("etc/mod", "file\n")
	w.reconcile()
	w.clean()
	w.want("OK", "", "one\n", "reload, reload, reload")
	w.shows("local/etc/mod", "file\n")
}

// TestEdgeEditOfFormerDir: edits of what dirs no longer name are kept.
func TestEdgeEditOfFormerDir(t *testing.T) {
	w := okWorld(t)
	w.write("local/one.conf", "precious\n")
	w.spec.dirs = w.spec.dirs[:1]
	w.boot()
	w.reconcile()
	w.want("OK", "", "one\n", "reload")
	w.kept("one.conf", "precious\n")
}

// TestEdgeEditUnderPinOutlivesConfig: other dirs and another branch undo nothing of a pinned service's.
func TestEdgeEditUnderPinOutlivesConfig(t *testing.T) {
	w := okWorld(t)
	w.git(w.work, "push", "-q", "origin", "HEAD:canary")
	w.must("freeze", "")
	w.write("local/etc/app.conf", "emergency\n")
	w.reconcile()
	w.spec.branch = "canary"
	w.restart()
	w.reconcile()
	w.want("FREEZE", "edited here", "emergency\n", "")
	w.spec.dirs = append(w.spec.dirs, w.otherDir())
	w.restart()
	w.reconcile()
	w.want("FREEZE", "edited here", "emergency\n", "reload")
}

// TestEdgeEditUnderPinOutlivesUnfreeze: one that failed, or was ended.
func TestEdgeEditUnderPinOutlivesUnfreeze(t *testing.T) {
	w := okWorld(t)
	w.must("freeze", "")
	w.write("local/etc/app.conf", "emergency\n")
	w.reconcile()
	w.recordsGo()
	wantStatus(t, w.op("unfreeze", ""), "Internal Server Error", false)
	w.recordsCome()
	w.reconcile()
	w.want("FREEZE", "edited here", "emergency\n", "")

	ctx, cancel := context.WithCancel(t.Context())
	w.s.operate(ctx, op{verb: "unfreeze", who: "me", step: func(string) { cancel() }})
	w.must("freeze", "")
	w.want("FREEZE", "edited here", "emergency\n", "")
}

// TestEdgeEditDuringPublish: what somebody saves over a file that just went live is kept, and undone.
func TestEdgeEditDuringPublish(t *testing.T) {
	w := okWorld(t)
	for _, text := range []string{"x", "y"} {
		for i := range 500 {
			w.write(fmt.Sprintf("work/etc/many/%d", i), text)
		}
		w.push()
		if text == "x" {
			w.reconcile()
		}
	}
	w.commit("etc/app.conf", "two\n")
	done := make(chan bool, 1)
	go func() {
		isLive := false
		for end := time.Now().Add(20 * time.Second); !isLive && time.Now().Before(end); {
			isLive = w.read("local/etc/app.conf") == "two\n"
		}
		w.write("local/etc/app.conf", "precious\n")
		done <- isLive
	}()
	w.reconcile()
	if !<-done {
		t.Fatal("nothing went live")
	}
	w.reconcile()
	w.calls()
	w.want("OK", "", "two\n", "")
	w.kept("etc/app.conf", "precious\n")
}

// TestEdgeRootSavesOverUsersFile: what root saved, such that the user can't read it.
func TestEdgeRootSavesOverUsersFile(t *testing.T) {
	w := okWorld(t)
	w.asNobody()
	w.restart()
	w.reconcile()
	w.calls()
	os.Remove(w.dir + "/local/etc/app.conf")
	os.WriteFile(w.dir+"/local/etc/app.conf", []byte("precious\n"), 0o600)
	os.Chown(w.dir+"/local/etc/sub", 0, 0)
	os.Chmod(w.dir+"/local/etc/sub", 0o700)
	w.reconcile()
	w.want("OK", "", "one\n", "reload")
	w.kept("etc/app.conf", "precious\n")
	w.shows("local/etc/sub/deep", "deep\n")
}

// TestEdgeOtherUserWhileAway: the files are laid out anew as soon as that can be.
func TestEdgeOtherUserWhileAway(t *testing.T) {
	w := okWorld(t)
	w.must("freeze", "")
	w.asNobody()
	w.upstreamGoes()
	w.boot()
	w.reconcile()
	w.shows("local/etc/app.conf", "one\n")
	w.upstreamComes()
	w.reconcile()
	w.calls()
	w.want("FREEZE", "me", "one\n", "")
	w.wantOwner(w.s.files.dir+"/etc", w.s.files.acct.uid)
}

// TestEdgeCheckoutLostUnderPin: that is damage, and no edit.
func TestEdgeCheckoutLostUnderPin(t *testing.T) {
	w := okWorld(t)
	w.must("freeze", "")
	if err := os.RemoveAll(w.s.files.dir); err != nil {
		t.Fatal(err)
	}
	w.restart()
	w.reconcile()
	w.want("FREEZE", "me", "one\n", "reload")
}

// TestEdgeLocalsMove up, down, and change their kind.
func TestEdgeLocalsMove(t *testing.T) {
	w := okWorld(t)
	for _, d := range []dir{
		{local: "a/b", link: "etc"}, {local: "a", link: "etc"}, {local: "a/b", link: "other"},
		{local: "a/b", link: "one.conf", kind: aFile}, {local: "a/b", link: "etc"},
	} {
		d.local = w.dir + "/local/" + d.local
		w.spec.dirs = []dir{d}
		w.boot()
		w.reconcile()
		st := w.s.Status()
		if st.State != "OK" || !shows(w.s.files.dir, d.link, d.local) || len(w.mounts()) != 1 {
			t.Errorf("%v: %s %s: %v", d, st.State, st.Info, w.mounts())
		}
	}
	w.clean()
}

// TestEdgeOtherMountAndBack: while upstream is away.
func TestEdgeOtherMountAndBack(t *testing.T) {
	w := okWorld(t)
	mount, h := w.spec.mount, w.head()
	w.upstreamGoes()
	w.spec.mount = w.dir + "/mount2"
	w.boot()
	w.reconcile()
	w.write("local/etc/app.conf", "precious\n")
	w.spec.mount = mount
	w.boot()
	w.reconcile()
	w.runs(h)
	w.upstreamComes()
	w.commit("one.conf", "x\n")
	w.reconcile()
	w.calls()
	w.want("OK", "", "one\n", "")
	w.shows("local/one.conf", "x\n")
	if out, _ := exec.Command("grep", "-rl", "precious", mount, w.dir+"/mount2").Output(); len(out) == 0 {
		t.Error("an edit is lost")
	}
}

// TestEdgeNoDirs: a service that only moves its hash.
func TestEdgeNoDirs(t *testing.T) {
	w := okWorld(t)
	w.spec.dirs = nil
	w.restart()
	w.reconcile()
	h := w.commit("etc/app.conf", "two\n")
	w.reconcile()
	w.runs(h)
	left, _ := filepath.Glob(w.s.files.dir + "/[^.]*")
	if st := w.s.Status(); st.State != "OK" || len(left) > 0 {
		t.Errorf("%+v, left %v", *st, left)
	}
}

// TestEdgeOddNameOutsideLinks is nothing to the service, for nobody checks it out.
func TestEdgeOddNameOutsideLinks(t *testing.T) {
	w := okWorld(t)
	w.commit("etc/app.conf", "two\n")
	evil := w.tree("040000 tree " + w.git(w.work, "rev-parse", "HEAD:etc") + "\t.git")
	top := w.tree(w.git(w.work, "ls-tree", "HEAD") + "\n040000 tree " + evil + "\tzz")
	h := w.git(w.work, "commit-tree", "-p", "HEAD", "-m", "evil", top)
	w.git(w.work, "push", "-q", "-f", "origin", h+":main")
	w.reconcile()
	w.want("OK", "", "two\n", "reload")
	w.runs(h)
}

// TestEdgeOddNames: names that git would not check out are refused before anything of the commit goes live.
func TestEdgeOddNames(t *testing.T) {
	for _, name := range []string{"..", ".git", ".GIT", "."} {
		t.Run(name, func(t *testing.T) {
			w := okWorld(t)
			w.write("blob", "[core]\n\tsshCommand = evil\n")
			blob := w.git(w.work, "hash-object", "-w", w.dir+"/blob")
			file := "100644 blob " + blob + "\t"
			inner := w.tree("040000 tree " + w.tree(file+"config") + "\t.git")
			etc := w.tree(file + "!first\n" + file + "app.conf\n040000 tree " + inner + "\t" + name)
			top := w.tree("040000 tree " + etc + "\tetc\n" + file + "one.conf")
			h := w.git(w.work, "commit-tree", "-p", "HEAD", "-m", "evil", top)
			w.git(w.work, "push", "-q", "-f", "origin", h+":main")
			w.reconcile()
			w.want("DIFF", "is not a path that may be checked out", "one\n", "")
			if strings.Contains(w.read("mount/svc.service/.git/config"), "evil") {
				t.Error(".git/config was changed")
			}
			w.commit("etc/app.conf", "fixed\n")
			w.reconcile()
			w.want("OK", "", "fixed\n", "reload")
		})
	}
}

// tree makes a tree object of lines as git ls-tree prints them.
func (w *world) tree(entries string) string {
	w.t.Helper()
	cmd := exec.Command("git", "mktree")
	cmd.Dir, cmd.Stdin = w.work, strings.NewReader(entries+"\n")
	out, err := cmd.Output()
	if err != nil {
		w.t.Fatal(err)
	}
	return strings.TrimSpace(string(out))
}

// TestEdgeLongLink: a symbolic link longer than the file system takes.
func TestEdgeLongLink(t *testing.T) {
	w := okWorld(t)
	w.write("blob", strings.Repeat("x", 5000))
	blob := w.git(w.work, "hash-object", "-w", w.dir+"/blob")
	w.git(w.work, "update-index", "--add", "--cacheinfo", "120000,"+blob+",etc/link")
	w.git(w.work, "commit", "-q", "-m", "link")
	w.git(w.work, "push", "-q", "origin", "HEAD:main")
	w.reconcile()
	w.want("DIFF", "file name too long", "one\n", "")
}

// TestEdgeNothingRuns: neither hooks nor filters of the checkout run anything.
func TestEdgeNothingRuns(t *testing.T) {
	w := okWorld(t)
	ran := w.dir + "/ran"
	for _, h := range []string{"post-checkout", "reference-transaction", "post-index-change", "pre-auto-gc"} {
		w.write("mount/svc.service/.git/hooks/"+h, "#!/bin/sh\ntouch "+ran+"\n")
		os.Chmod(w.s.files.dir+"/.git/hooks/"+h, 0o755)
	}
	for _, key := range []string{"filter.evil.smudge", "filter.evil.clean", "core.fsmonitor"} {
		w.git(w.s.files.dir, "config", key, "touch "+ran)
	}
	os.Remove(ran) // w.git is an ordinary one
	w.commit("etc/.gitattributes", "* filter=evil\n", "etc/app.conf", "two\n")
	w.reconcile()
	w.want("OK", "", "two\n", "reload")
	if lexists(ran) {
		t.Error("something of the checkout's was run")
	}
}

func TestEdgeFullDisk(t *testing.T) {
	w := okWorld(t)
	w.write("mount2/x", "")
	if err := syscall.Mount("tmpfs", w.dir+"/mount2", "tmpfs", 0, "size=1m,mode=755"); err != nil {
		t.Fatal(err)
	}
	w.spec.mount = w.dir + "/mount2"
	w.restart()
	w.reconcile()
	w.want("OK", "", "one\n", "reload")
	w.commit("etc/app.conf", strings.Repeat("0123456789abcdef", 1<<17))
	for range 2 {
		w.reconcile()
		w.want("DIFF", "no space left on device", "one\n", "")
	}
}

// TestEdgeBackslashInName: a unit's name as systemd-escape makes them.
func TestEdgeBackslashInName(t *testing.T) {
	w := newWorld(t)
	w.spec.service = `a\x2db.service`
	w.restart()
	w.reconcile()
	w.want("OK", "", "one\n", "reload")
	w.write("local/etc/app.conf", "precious\n")
	w.reconcile()
	w.want("OK", "", "one\n", "reload")
	w.kept("etc/app.conf", "precious\n")
	w.restart()
	w.reconcile()
	w.want("OK", "", "one\n", "")
}

// TestEdgeRefusedFirstWithoutLocals costs one look a round.
func TestEdgeRefusedFirstWithoutLocals(t *testing.T) {
	w := newWorld(t)
	w.spec.check, w.spec.dirs = []string{"false"}, []dir{{link: "etc"}}
	w.restart()
	w.reconcile()
	w.wantRuns(1, w.reconcile)
	if st := w.s.Status(); st.State != "DIFF" {
		t.Errorf("%+v", *st)
	}
}
