//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

func TestServiceFirstCommit(t *testing.T) {
	w := newWorld(t)
	if st := w.s.Status(); st.State != "DIFF" || st.Info != "first checkout under way" {
		t.Errorf("before the first pass: %+v", st)
	}
	w.reconcile()
	w.want("OK", "", "one\n", "reload")
	w.clean()
	w.shows("local/one.conf", "single\n")
	if lexists(w.s.files.dir + "/other") {
		t.Error("other/ is on disk")
	}
}

func TestServiceIdleRound(t *testing.T) {
	w := okWorld(t)
	before := *w.s.Status()
	w.wantRuns(1, w.reconcile)
	w.want("OK", "", "one\n", "")
	if st := w.s.Status(); !st.Change.Equal(before.Change) {
		t.Error("an idle round changed the time of change")
	}
	w.restart()
	w.reconcile()
	w.want("OK", "", "one\n", "")
	if st := w.s.Status(); !st.Change.Equal(before.Change) {
		t.Error("a restart changed the time of change")
	}
}

func TestServiceCommitElsewhere(t *testing.T) {
	w := okWorld(t)
	h := w.commit("other/file", "y\n", "etcetera", "z\n")
	w.reconcile()
	w.want("OK", "", "one\n", "")
	w.runs(h)
	if !w.s.Status().InSync {
		t.Error("not in sync")
	}
}

func TestServiceCommit(t *testing.T) {
	w := okWorld(t)
	w.commit("etc/app.conf", "two\n", "one.conf", "single2\n", "etc/sub/deep", "")
	w.reconcile()
	w.want("OK", "", "two\n", "reload")
	w.clean()
	w.shows("local/one.conf", "single2\n")
	if lexists(w.dir + "/local/etc/sub") {
		t.Error("an emptied directory stayed")
	}
	w.restart()
	w.reconcile()
	w.want("OK", "", "two\n", "")
}

func TestServiceForcedPush(t *testing.T) {
	w := okWorld(t)
	first := w.head()
	w.commit("etc/app.conf", "two\n")
	w.reconcile()
	w.want("OK", "", "two\n", "reload")
	w.back(first)
	w.commit("etc/app.conf", "three\n")
	w.reconcile()
	w.want("OK", "", "three\n", "reload")
	w.clean()
}

func TestServiceFirstLookFails(t *testing.T) {
	w := newWorld(t)
	w.upstreamGoes()
	w.reconcile()
	none := "error: open " + w.dir + "/local/etc/app.conf: no such file or directory"
	w.want("DIFF", "git ls-remote", none, "")
	if info := w.s.Status().Info; !strings.Contains(info, "exit status 128") {
		t.Errorf("git's status is lost: %s", info)
	}
	w.upstreamComes()
	w.reconcile()
	w.want("OK", "", "one\n", "reload")
}

func TestServiceLookFails(t *testing.T) {
	w := okWorld(t)
	w.upstreamGoes()
	w.reconcile()
	w.want("OK", "", "one\n", "")
	w.reconcile()
	w.want("DIFF", "git ls-remote", "one\n", "")
	w.restart()
	w.reconcile()
	w.reconcile()
	w.want("DIFF", "git ls-remote", "one\n", "")
	w.upstreamComes()
	w.reconcile()
	w.want("OK", "", "one\n", "")
}

func TestServiceBranchIsGone(t *testing.T) {
	w := okWorld(t)
	w.git(w.bare, "branch", "-m", "main", "gone")
	w.reconcile()
	w.reconcile()
	w.want("DIFF", `branch "main"`, "one\n", "")
	w.git(w.bare, "branch", "-m", "gone", "main")
	w.reconcile()
	w.want("OK", "", "one\n", "")
}

// TestServiceLinksAreJudged has commits whose links can't be shown: they are refused, and cost nothing more.
func TestServiceLinksAreJudged(t *testing.T) {
	for _, tc := range []struct {
		name, info string
		spoil      func(w *world)
	}{
		{"missing", `link "etc" is missing`, func(w *world) { os.RemoveAll(w.work + "/etc") }},
		{"file instead of directory", `link "etc" is a file, not a directory: say file = true`, func(w *world) {
			os.RemoveAll(w.work + "/etc")
			w.write("work/etc", "x")
		}},
		{"directory instead of file", `link "one.conf" is a directory, not a file`, func(w *world) {
			os.Remove(w.work + "/one.conf")
			w.write("work/one.conf/x", "x")
		}},
		{"symbolic link", `link "etc": etc is a symbolic link`, func(w *world) {
			os.RemoveAll(w.work + "/etc")
			os.Symlink("/root", w.work+"/etc")
		}},
		{"file is a symbolic link", `link "one.conf": one.conf is a symbolic link`, func(w *world) {
			os.Remove(w.work + "/one.conf")
			os.Symlink("/etc/shadow", w.work+"/one.conf")
		}},
		{"submodule", `link "etc": etc is a submodule`, func(w *world) {
			os.RemoveAll(w.work + "/etc")
			w.submodule("etc")
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w := okWorld(t)
			good := w.head()
			tc.spoil(w)
			w.push()
			w.reconcile()
			w.want("DIFF", tc.info, "one\n", "")
			w.runs(good)
			w.wantRuns(1, w.reconcile)
			w.want("DIFF", tc.info, "one\n", "")
			w.restart()
			w.reconcile()
			w.want("DIFF", tc.info, "one\n", "")
			w.back(good)
			w.commit("etc/app.conf", "fixed\n")
			w.reconcile()
			w.want("OK", "", "fixed\n", "reload")
			w.clean()
		})
	}
}

// submodule makes a path of the next commit a submodule.
func (w *world) submodule(path string) {
	w.t.Helper()
	w.git(w.work, "rm", "-rq", "--cached", "--ignore-unmatch", path)
	w.git(w.work, "update-index", "--add", "--cacheinfo", "160000,"+w.head()+","+path)
	if err := os.MkdirAll(w.work+"/"+path, 0o755); err != nil {
		w.t.Fatal(err)
	}
}

// badCommit is a service whose unit fails on files that say "bad", and which has just met such a commit.
func badCommit(t *testing.T) (w *world, bad string) {
	w = okWorld(t)
	w.write("fake/reads", w.dir+"/local/etc/app.conf")
	good := w.head()
	bad = w.commit("etc/app.conf", "bad\n")
	w.reconcile()
	info := fmt.Sprintf("commit %.8s taken back, %.8s runs; with %.8s: systemctl reload", bad, good, bad)
	w.want("BROKEN", info, "one\n", "reload, reload")
	w.runs(good)
	return w, bad
}

func TestServiceTakesBack(t *testing.T) {
	w, _ := badCommit(t)
	w.reconcile()
	w.want("BROKEN", "taken back", "one\n", "")
	w.restart()
	w.reconcile()
	w.want("BROKEN", "taken back", "one\n", "")
}

func TestServiceRefusesByContent(t *testing.T) {
	w, _ := badCommit(t)
	good := w.s.Status().Commit
	w.commit("other/file", "elsewhere\n")
	w.reconcile()
	w.want("BROKEN", "taken back", "one\n", "")
	w.runs(good)
	w.commit("etc/app.conf", "fixed\n")
	w.reconcile()
	w.want("OK", "", "fixed\n", "reload")
}

func TestServicePullTriesWhatWasTakenBack(t *testing.T) {
	w, _ := badCommit(t)
	if err := w.op("pull", ""); !errorSays(err, "is BROKEN: commit") {
		t.Errorf("pull: %v", err)
	}
	w.want("BROKEN", "taken back", "one\n", "reload, reload")
	os.Remove(w.fake + "/reads")
	if err := w.op("pull", ""); err != nil {
		t.Error(err)
	}
	w.want("OK", "", "bad\n", "reload")
}

// TestServiceUpstreamTakesTheCommitBack: nothing is to be done when upstream is what runs again.
func TestServiceUpstreamTakesTheCommitBack(t *testing.T) {
	w, bad := badCommit(t)
	w.back("HEAD~1")
	w.commit("other/file", "reverted\n")
	w.reconcile()
	w.want("OK", "", "one\n", "")
	w.back(bad)
	w.push()
	w.reconcile()
	w.want("BROKEN", "taken back", "one\n", "")
}

// bothFail is a service whose new commit failed, and whose last good one does so as well.
func bothFail(t *testing.T, text string) (w *world, suspect string) {
	w = okWorld(t)
	w.write("fake/fail-reload", "")
	suspect = w.commit("etc/app.conf", text)
	w.reconcile()
	w.want("BROKEN", "failed, and so does the last good one", "one\n", "reload, reload")
	return w, suspect
}

func TestServiceSuspectIsExcused(t *testing.T) {
	for _, restarts := range []bool{false, true} {
		t.Run(fmt.Sprintf("restarts=%v", restarts), func(t *testing.T) {
			w, suspect := bothFail(t, "fine\n")
			round := func() {
				if restarts {
					w.restart()
				}
				w.reconcile()
			}
			for range 2 { // one action a round
				round()
				w.want("BROKEN", "Job for", "one\n", "reload")
			}
			os.Remove(w.fake + "/fail-reload")
			round() // the last good one settles
			w.shows("local/etc/app.conf", "one\n")
			round()
			w.want("OK", "", "fine\n", "reload, reload")
			w.runs(suspect)
		})
	}
}

func TestServiceExcusedSuspectIsBad(t *testing.T) {
	w, _ := bothFail(t, "bad\n")
	w.write("fake/reads", w.dir+"/local/etc/app.conf")
	os.Remove(w.fake + "/fail-reload")
	w.reconcile() // the last good one settles
	w.shows("local/etc/app.conf", "one\n")
	w.calls()
	w.reconcile() // and the new one gets its try as at first
	w.want("BROKEN", "taken back", "one\n", "reload, reload")
	w.reconcile()
	w.want("BROKEN", "taken back", "one\n", "")
}

// TestServiceEndedWhileLastGoodSettles: a pass that is ended then tells nothing of the last good commit.
func TestServiceEndedWhileLastGoodSettles(t *testing.T) {
	for _, step := range []string{"reload", "settle"} {
		t.Run(step, func(t *testing.T) {
			w := okWorld(t)
			w.spec.settle = 100 * time.Millisecond
			w.restart()
			w.reconcile()
			w.write("fake/reads", w.dir+"/local/etc/app.conf")
			w.commit("etc/app.conf", "bad\n")
			_ = w.up.lookNow(context.Background(), false)
			ctx, end := context.WithCancel(context.Background())
			w.s.step = func(name string) {
				if name == step && w.read("local/etc/app.conf") == "one\n" {
					end()
				}
			}
			w.s.pass(ctx)
			if ctx.Err() == nil {
				t.Fatal("not ended")
			}
			w.calls()

			for range 2 {
				w.restart()
				w.reconcile()
				w.want("BROKEN", "taken back", "one\n", "")
			}
		})
	}
}

// TestServiceSuspectThenAnother: other content is tried at once.
func TestServiceSuspectThenAnother(t *testing.T) {
	w, _ := bothFail(t, "bad\n")
	os.Remove(w.fake + "/fail-reload")
	w.commit("etc/app.conf", "two\n")
	w.reconcile()
	w.want("OK", "", "two\n", "reload")
}

func TestServiceUnitGoesDown(t *testing.T) {
	w := okWorld(t)
	w.write("fake/svc.service", "failed")
	for range 2 { // later trouble changes no files, and is not ours to mend
		w.reconcile()
		w.want("BROKEN", "unit svc.service is failed", "one\n", "")
	}
	if err := w.op("pull", ""); err != nil {
		t.Error(err)
	}
	w.want("OK", "", "one\n", "reset-failed, start")
	w.write("fake/svc.service", "failed")
	w.reconcile()
	w.want("BROKEN", "is failed", "one\n", "")
	w.write("fake/svc.service", "active")
	w.reconcile()
	w.want("OK", "", "one\n", "")
}

// TestServicePullAfterRestart: a pull right after a restart brings up a unit that is down.
func TestServicePullAfterRestart(t *testing.T) {
	w := okWorld(t)
	w.write("fake/svc.service", "failed")
	w.reconcile()
	w.want("BROKEN", "is failed", "one\n", "")
	w.restart()
	if st := w.s.Status(); st.State != "BROKEN" {
		t.Fatal(st)
	}
	if err := w.op("pull", ""); err != nil {
		t.Error(err)
	}
	w.want("OK", "", "one\n", "reset-failed, start")
}

func TestServiceWithoutFallback(t *testing.T) {
	w := okWorld(t)
	w.write("fake/reads", w.dir+"/local/etc/app.conf")
	w.spec.fallback = false
	w.restart()
	w.commit("etc/app.conf", "bad\n")
	for range 2 { // it stays, and is acted on again
		w.reconcile()
		w.want("BROKEN", "because of bad", "bad\n", "reload")
	}
	w.commit("etc/app.conf", "good\n")
	w.reconcile()
	w.want("OK", "", "good\n", "reload")
}

func TestServiceFirstCommitFails(t *testing.T) {
	w := newWorld(t)
	w.write("fake/reads", w.dir+"/local/etc/app.conf")
	w.commit("etc/app.conf", "bad\n")
	for range 2 {
		w.reconcile()
		w.want("BROKEN", "because of bad", "bad\n", "reload")
	}
}

// TestServiceKilled is killed at each step of a commit on its way, or of its way back; afterwards all is as if not.
func TestServiceKilled(t *testing.T) {
	for _, tc := range []struct {
		text, step string
		n          int
	}{
		{"fine\n", "publish", 1}, {"fine\n", "reload", 1}, {"fine\n", "settle", 1},
		{"bad\n", "publish", 1}, {"bad\n", "reload", 1}, {"bad\n", "fall back", 1},
		{"bad\n", "publish", 2}, {"bad\n", "reload", 2}, {"bad\n", "settle", 1},
	} {
		t.Run(fmt.Sprintf("%.4s at %s %d", tc.text, tc.step, tc.n), func(t *testing.T) {
			w := okWorld(t)
			w.write("fake/reads", w.dir+"/local/etc/app.conf")
			h := w.commit("etc/app.conf", tc.text)
			w.killAt(tc.step, tc.n)
			for range 3 {
				w.reconcile()
			}
			calls := strings.Split(w.calls(), ", ")
			if len(calls) > 4 {
				t.Errorf("too much was asked of systemd: %q", calls)
			}
			if tc.text == "bad\n" {
				w.want("BROKEN", fmt.Sprintf("commit %.8s taken back", h), "one\n", "")
				return
			}
			w.want("OK", "", tc.text, "")
			w.runs(h)
		})
	}
}

// TestServiceSuspectSurvivesKill: killed while the last good commit fails as well: the new one still gets its try.
func TestServiceSuspectSurvivesKill(t *testing.T) {
	w := okWorld(t)
	w.write("fake/fail-reload", "")
	h := w.commit("etc/app.conf", "fine\n")
	w.killAt("reload", 2)
	for range 2 {
		w.reconcile()
	}
	os.Remove(w.fake + "/fail-reload")
	for range 4 {
		w.reconcile()
	}
	w.calls()
	w.want("OK", "", "fine\n", "")
	w.runs(h)
}

// wantStatus fails if err is not an operation's error with that status.
func wantStatus(t *testing.T, err error, status string, done bool) {
	t.Helper()
	oe, ok := errors.AsType[*opError](err)
	if !ok || oe.status != status || oe.done != done {
		t.Errorf("got %#v: %v, want %s, done %v", oe, err, status, done)
	}
}

func TestOperateFreezeOfNothing(t *testing.T) {
	w := newWorld(t)
	wantStatus(t, w.op("freeze", ""), "Conflict", false)
}

// threeCommits is a service that ran two commits of its branch, not the third, and now runs the fourth.
func threeCommits(t *testing.T) (w *world, first, second, third string) {
	w = okWorld(t)
	first = w.head()
	second = w.commit("etc/app.conf", "two\n")
	w.reconcile()
	third = w.commit("etc/app.conf", "three\n")
	w.commit("etc/app.conf", "four\n")
	w.reconcile()
	w.calls()
	return w, first, second, third
}

func TestOperateRollbackWhileUpstreamIsAway(t *testing.T) {
	w, _, second, third := threeCommits(t)
	w.upstreamGoes()
	if err := w.op("rollback", second[:7]); err != nil {
		t.Fatal(err)
	}
	w.want("FREEZE", "ROLLBACK: "+second[:8]+", me", "two\n", "reload")
	w.restart()
	w.reconcile()
	w.reconcile()
	w.want("FREEZE", "ROLLBACK: "+second[:8], "two\n", "")
	// One that never ran, but whose files were fetched ahead.
	if err := w.op("rollback", third); err != nil {
		t.Fatal(err)
	}
	w.want("FREEZE", "ROLLBACK: "+third[:8], "three\n", "reload")
	w.clean()
}

func TestOperateRollbackToNothing(t *testing.T) {
	w, _, _, _ := threeCommits(t)
	for _, hash := range []string{"abcd", "0123456789012345678901234567890123456789"} {
		wantStatus(t, w.op("rollback", hash), "Not Found", false)
	}
	w.want("OK", "", "four\n", "")
}

func TestOperatePullWhilePinned(t *testing.T) {
	w, _, _, _ := threeCommits(t)
	if err := w.op("freeze", ""); err != nil {
		t.Fatal(err)
	}
	wantStatus(t, w.op("pull", ""), "Conflict", false)
	w.commit("etc/app.conf", "five\n")
	w.reconcile()
	w.want("FREEZE", "me", "four\n", "")
	if err := w.op("unfreeze", ""); err != nil {
		t.Fatal(err)
	}
	w.want("OK", "", "five\n", "reload")
}

// TestOperateRollbackAfterForcedPush: what ran is still there, whatever git removes that nothing refers to.
func TestOperateRollbackAfterForcedPush(t *testing.T) {
	w, first, second, _ := threeCommits(t)
	w.back(first)
	w.commit("etc/app.conf", "five\n")
	w.reconcile()
	w.want("OK", "", "five\n", "reload")
	w.git(w.s.files.dir, "reflog", "expire", "--expire=now", "--all")
	w.git(w.s.files.dir, "gc", "-q", "--prune=now")
	w.restart()
	w.reconcile()
	w.upstreamGoes()
	if err := w.op("rollback", second); err != nil {
		t.Error(err)
	}
	w.want("FREEZE", "ROLLBACK", "two\n", "reload")
}

// TestOperateRollbackFails keeps the pin and says so when the unit fails.
func TestOperateRollbackFails(t *testing.T) {
	w, first, _, _ := threeCommits(t)
	w.write("fake/fail-reload", "")
	wantStatus(t, w.op("rollback", first), "Internal Server Error", true)
	w.want("BROKEN", "ROLLBACK: "+first[:8], "one\n", "reload")
	os.Remove(w.fake + "/fail-reload")
	w.reconcile()
	w.want("FREEZE", "ROLLBACK: "+first[:8], "one\n", "reload")
}

func TestOperateFreezeEndsByItself(t *testing.T) {
	w, _, _, _ := threeCommits(t)
	o := op{verb: "freeze", who: "me", reason: "because", until: time.Now().Add(time.Hour)}
	if err := w.s.operate(context.Background(), o); err != nil {
		t.Fatal(err)
	}
	w.want("FREEZE", "me: because, until ", "four\n", "")
	w.commit("etc/app.conf", "five\n")
	w.reconcile()
	w.want("FREEZE", "me: because, until ", "four\n", "")
	w.s.rec.Pin.Until = time.Now().Add(-time.Second)
	w.reconcile()
	w.want("OK", "", "five\n", "reload")
}

// TestOperateRollbackUsesNoNetwork: content on disk goes live without asking anybody; what was never fetched is
// refused while nobody is there to ask, and nothing changes.
func TestOperateRollbackUsesNoNetwork(t *testing.T) {
	w := newWorld(t)
	early := w.commit("etc/app.conf", "early\n")
	w.commit("etc/app.conf", "one\n")
	w.reconcile()
	var hashes []string
	for i := range 30 {
		hashes = append(hashes, w.commit("etc/app.conf", fmt.Sprintf("v%d\n", i)))
	}
	w.reconcile()
	w.calls()

	l, conns := silentServer(t)
	w.up.url = "http://" + l.Addr().String() + "/x"
	if err := w.op("rollback", hashes[20]); err != nil {
		t.Error(err)
	}
	if conns.Load() > 0 {
		t.Error("network was used for content on disk")
	}
	w.want("FREEZE", "ROLLBACK: "+hashes[20][:8], "v20\n", "reload")

	l.Close()
	if oe, ok := errors.AsType[*opError](w.op("rollback", early)); !ok || oe.done {
		t.Errorf("rollback to what is not on disk: %v", oe)
	}
	w.want("FREEZE", "ROLLBACK: "+hashes[20][:8], "v20\n", "")
}

// silentServer takes connections, and never answers.
func silentServer(t *testing.T) (net.Listener, *atomic.Int32) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	conns := &atomic.Int32{}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			conns.Add(1)
			t.Cleanup(func() { c.Close() })
		}
	}()
	return l, conns
}

func TestOperateRollbackOfRefused(t *testing.T) {
	w := newWorld(t)
	w.spec.check = []string{"false"}
	w.restart()
	w.reconcile()
	w.want("DIFF", "check", "error: open "+w.dir+"/local/etc/app.conf: no such file or directory", "")
	wantStatus(t, w.op("rollback", w.head()[:8]), "Not Acceptable", false)
}

// TestServiceLoop has an operator end what another one waits for, and be served next.
func TestServiceLoop(t *testing.T) {
	w := newWorld(t)
	end := w.live()
	_ = w.up.lookNow(context.Background(), false)
	eventually(t, "first pass", func() bool { return w.s.Status().State == "OK" })
	ctx := context.Background()
	w.s.do(ctx, op{verb: "freeze", who: "a"})
	h := w.s.Status().Commit
	w.commit("etc/app.conf", "two\n")
	unfrozen, started := make(chan error, 1), make(chan struct{}, 9)
	go func() {
		unfrozen <- w.s.do(ctx, op{verb: "unfreeze", who: "a", step: func(string) { started <- struct{}{} }})
	}()
	<-started
	if err := w.s.do(ctx, op{verb: "rollback", hash: h, who: "b"}); err != nil {
		t.Error(err)
	}
	if err := <-unfrozen; err != nil && !errorSays(err, "ended by a rollback of b") {
		t.Errorf("unfreeze: %v", err)
	}
	rolledBack := func() bool { st := w.s.Status(); return st.State == "FREEZE" && st.Commit == h }
	eventually(t, "rollback", rolledBack)
	end()
	if err := w.s.do(ctx, op{verb: "freeze"}); !errorSays(err, "stopping") {
		t.Errorf("do after the end: %v", err)
	}
}

// TestServiceLoopGoesOnWithATrial: a command that is refused ends the settling of a trial, which must go on.
func TestServiceLoopGoesOnWithATrial(t *testing.T) {
	w := newWorld(t)
	w.spec.settle = 2 * time.Second
	w.live()
	ctx := context.Background()
	_ = w.up.lookNow(ctx, false)
	eventually(t, "first", func() bool { return w.s.Status().State == "OK" })
	os.Remove(w.fake + "/svc.service")
	w.commit("etc/app.conf", "bad\n", "one.conf", "new\n")
	_ = w.up.lookNow(ctx, false)
	eventually(t, "told", func() bool { return w.read("fake/svc.service") == "active" })
	w.write("fake/svc.service", "failed") // it dies while it is watched
	if err := w.s.do(ctx, op{verb: "rollback", hash: "abcdabcd"}); err == nil {
		t.Error("a rollback to an unknown commit was carried out")
	}
	eventually(t, "the pass goes on", func() bool { return w.s.Status().State == "BROKEN" })
}

// TestServiceLoopCommandsGoBeforePulls: a freeze waits neither for a pull's look, nor for earlier pulls.
func TestServiceLoopCommandsGoBeforePulls(t *testing.T) {
	w := okWorld(t)
	l, _ := silentServer(t)
	w.live()
	w.up.url = "http://" + l.Addr().String() + "/x"
	ctx := context.Background()
	looking := make(chan bool, 9)
	pull := func() { w.s.do(ctx, op{verb: "pull", step: func(string) { looking <- true }}) }
	go pull()
	<-looking
	for range 2 {
		go pull()
	}
	frozen := make(chan error, 1)
	go func() { frozen <- w.s.do(ctx, op{verb: "freeze", who: "me"}) }()
	select {
	case err := <-frozen:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(20 * time.Second):
		t.Error("the freeze waits for a look")
	}
}

// TestServiceFailingLookIsNotHurried: while there is no checkout, a look that fails is repeated with growing waits.
func TestServiceFailingLookIsNotHurried(t *testing.T) {
	w := newWorld(t)
	w.spec.branch = "nope"
	w.live()
	ctx, cancel := context.WithCancel(context.Background())
	looks := make(chan struct{})
	before := gitRuns()
	go func() { defer close(looks); w.up.run(ctx, time.Hour) }()
	defer func() { cancel(); <-looks }()
	eventually(t, "state", func() bool { return strings.Contains(w.s.Status().Info, `branch "nope"`) })
	time.Sleep(time.Second) // as long as it takes to see a hurry
	if n := gitRuns() - before; n > 2 {
		t.Errorf("git ran %v times", n)
	}
}

// TestServiceOwnEndIsTold: what our end interrupted says so.
func TestServiceOwnEndIsTold(t *testing.T) {
	ctx, end := context.WithCancelCause(context.Background())
	end(ending{"terminated", 0})
	if err := interrupted(ctx); err.Error() != "gitopper is stopping: terminated" {
		t.Error(err)
	}
}

// TestServicePassesWithoutLooks: passes between two looks ask git nothing, and know nothing of a newer commit.
func TestServicePassesWithoutLooks(t *testing.T) {
	w := okWorld(t)
	w.commit("etc/app.conf", "two\n")
	_ = w.up.lookNow(context.Background(), false)
	w.commit("etc/app.conf", "three\n")
	w.s.pass(context.Background())
	w.want("OK", "", "two\n", "reload")
	w.wantRuns(0, func() { w.s.pass(context.Background()) })
	if !w.s.Status().InSync {
		t.Error("not in sync")
	}
	w.upstreamGoes()
	w.s.pass(context.Background())
	w.want("OK", "", "two\n", "")
}

// TestServiceMountsAreIndependent: a dir that can't be mounted keeps no other from it, after a boot.
func TestServiceMountsAreIndependent(t *testing.T) {
	w := okWorld(t)
	for _, d := range w.spec.dirs {
		syscall.Unmount(d.local, syscall.MNT_DETACH)
	}
	w.spec.dirs = append([]dir{{local: w.dir + "/local/other", link: "other"}}, w.spec.dirs...)
	w.boot()
	w.shows("local/etc/app.conf", "one\n")
}

// TestServiceConfigIsJudgedAnew: what our own config's gate refused is asked again, for it depends on more than the commit.
func TestServiceConfigIsJudgedAnew(t *testing.T) {
	w := okWorld(t)
	trouble := errors.New("no such key file")
	w.s.gate = func(func(string) ([]byte, error)) error { return trouble }
	w.commit("etc/app.conf", "two\n")
	w.reconcile()
	w.want("DIFF", "no such key file", "one\n", "")
	w.reconcile()
	w.want("DIFF", "no such key file", "one\n", "")
	trouble = nil
	w.reconcile()
	w.want("OK", "", "two\n", "reload")
}

// TestServiceAfterBoot: a unit that began to start after its mounts were made has been told, one that may have read other
// files has not, also where it became active later.
func TestServiceAfterBoot(t *testing.T) {
	for _, tc := range []struct {
		name  string
		since time.Duration // from when the mounts were made
		calls string
	}{
		{"before the mounts", -time.Second, "reload"},
		{"after the mounts", time.Second, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w := okWorld(t)
			w.s.rec.Told.Boot = "another"
			if err := w.s.save(); err != nil {
				t.Fatal(err)
			}
			for _, d := range w.spec.dirs {
				syscall.Unmount(d.local, syscall.MNT_DETACH)
			}
			w.boot()
			since := sinceBoot() + tc.since
			w.write("fake/svc.service", fmt.Sprintf("active\n%s=%d\nActiveEnterTimestampMonotonic=%d",
				leftInactive, since.Microseconds(), (sinceBoot()+time.Minute).Microseconds()))
			w.reconcile()
			w.want("OK", "", "one\n", tc.calls)
			w.restart()
			w.reconcile()
			w.want("OK", "", "one\n", "")
		})
	}
}

// TestServicesSwapLocals: no mount stays hidden below another.
func TestServicesSwapLocals(t *testing.T) {
	w := newWorld(t)
	ctx, links := context.Background(), []string{"etc", "other"}
	for _, locals := range [][]string{{"1", "2"}, {"2", "1"}, {"3", "1"}, {"3", "4"}, {"4", "5"}, {"6", "5"}, {"", "6"}} {
		up := newUpstream(w.dir+"/state", w.spec.upstream, "")
		var services []*Service
		for i, l := range locals {
			sp := w.spec
			sp.service = fmt.Sprintf("s%d.service", i)
			sp.dirs = []dir{{local: w.dir + "/local/" + l, link: links[i]}}
			if l != "" {
				services = append(services, newService(sp, w.dir+"/state", up, time.Hour, w.stop))
			}
		}
		retireRecords(w.dir+"/state", services)
		mountFirst(ctx, services)
		if err := up.lookNow(ctx, false); err != nil {
			t.Fatal(err)
		}
		for _, s := range services {
			s.pass(ctx)
			d := s.dirs[0]
			if s.Status().State != "OK" || !shows(s.files.dir, d.link, d.local) {
				t.Errorf("%v: %+v", locals, *s.Status())
			}
		}
		if got := w.mounts(); len(got) != len(services) {
			t.Errorf("%v: mounts %v", locals, got)
		}
	}
}

// TestServiceRefusedFirstCommit costs one look a round, and leaves no more than an empty local.
func TestServiceRefusedFirstCommit(t *testing.T) {
	w := newWorld(t)
	w.spec.check = []string{"false"}
	w.restart()
	w.reconcile()
	w.wantRuns(1, w.reconcile)
	none := "error: open " + w.dir + "/local/etc/app.conf: no such file or directory"
	w.want("DIFF", "check", none, "")
	if left, _ := filepath.Glob(w.dir + "/local/etc/*"); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

// TestServiceRanDespiteKill: what is live counts as having run, also when we were killed after the manifest was written,
// and before the record was.
func TestServiceRanDespiteKill(t *testing.T) {
	w := okWorld(t)
	commit := w.commit("etc/app.conf", "two\n")
	if err := w.up.lookNow(t.Context(), false); err != nil {
		t.Fatal(err)
	}
	var out outcome
	c := w.s.choose(t.Context(), &out)
	if c == nil {
		t.Fatalf("%+v", out)
	}
	if err := errors.Join(w.s.publish(t.Context(), c), w.s.keepEdits(c)); err != nil {
		t.Fatal(err)
	}

	w.restart()
	w.reconcile()
	if !slices.Contains(w.s.rec.ran(), commit) || w.s.rec.Newest.Commit != commit {
		t.Errorf("ran: %v, newest: %v, want %s", w.s.rec.ran(), w.s.rec.Newest, commit)
	}
}
