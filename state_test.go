package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// fakeSystemctl is a systemd with units that run from the start. Calls that change something are logged in dir/calls.
// A file dir/fail-VERB makes a verb fail; a unit whose dir/reads file says "bad" falls over when it is started, and its
// reload fails.
func fakeSystemctl(dir string, args []string) int {
	var words []string
	for _, a := range args {
		if !strings.HasPrefix(a, "-") {
			words = append(words, a)
		}
	}
	if words[0] == "show" {
		for _, u := range words[2:] {
			state := "active"
			if s, err := os.ReadFile(filepath.Join(dir, u)); err == nil {
				state = string(s)
			}
			fmt.Printf("Id=%s\nLoadState=loaded\nActiveState=%s\nSubState=x\nResult=success\nType=simple\nNeedDaemonReload=no\nNRestarts=0\nMainPID=0\n\n", u, state)
		}
		return 0
	}
	if words[0] == "is-enabled" {
		fmt.Println("disabled")
		return 1
	}
	f, err := os.OpenFile(filepath.Join(dir, "calls"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return 9
	}
	fmt.Fprintln(f, strings.Join(words, " "))
	f.Close()
	unit := words[len(words)-1]
	if _, err := os.Stat(filepath.Join(dir, "fail-"+words[0])); err == nil {
		fmt.Fprintln(os.Stderr, "Job for", unit, "failed.")
		return 1
	}
	bad := false
	if reads, err := os.ReadFile(filepath.Join(dir, "reads")); err == nil {
		data, _ := os.ReadFile(string(reads))
		bad = strings.Contains(string(data), "bad")
	}
	switch words[0] {
	case "start", "restart", "reload":
		state := "active"
		if bad && words[0] != "reload" {
			state = "failed"
		}
		os.WriteFile(filepath.Join(dir, unit), []byte(state), 0o644)
		if bad {
			fmt.Fprintln(os.Stderr, "Job for", unit, "failed because of bad.")
			return 1
		}
	case "stop":
		os.WriteFile(filepath.Join(dir, unit), []byte("inactive"), 0o644)
	}
	return 0
}

// world is an upstream, a host directory, and one service between them.
type world struct {
	t    testing.TB
	dir  string // everything lies below
	up   string // bare repository
	work string // where commits are made
	fake string // the systemd that isn't one
	spec spec
	s    *Service
}

// newWorld makes an upstream with a first commit and a service whose links etc (a directory) and one.conf (a file) are
// mounted at local/etc and local/one.conf.
func newWorld(t testing.TB) *world {
	t.Helper()
	tmp := t.TempDir()
	w := &world{t: t, dir: tmp, up: tmp + "/up.git", work: tmp + "/work", fake: tmp + "/fake"}
	for _, d := range []string{w.fake, tmp + "/bin"} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, p := range []string{"systemctl", "journalctl"} {
		exe, err := os.Executable()
		if err == nil {
			err = os.Symlink(exe, tmp+"/bin/"+p)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("PATH", tmp+"/bin:"+os.Getenv("PATH"))
	t.Setenv("FAKE", w.fake)
	t.Setenv("GIT_CONFIG_GLOBAL", "/dev/null")
	w.git(tmp, "init", "-q", "--bare", "-b", "main", w.up)
	w.git(w.up, "config", "uploadpack.allowFilter", "true")
	w.git(w.up, "config", "uploadpack.allowAnySHA1InWant", "true")
	w.git(tmp, "init", "-q", "-b", "main", w.work)
	w.git(w.work, "remote", "add", "origin", w.up)
	w.commit("etc/app.conf", "one\n", "etc/sub/deep", "deep\n", "one.conf", "single\n", "other/file", "x\n")
	w.spec = spec{upstream: "file://" + w.up, branch: "main", mount: tmp + "/mount", machine: "m", service: "svc.service", action: "reload", fallback: true,
		dirs: []dir{{local: tmp + "/local/etc", link: "etc"}, {local: tmp + "/local/one.conf", link: "one.conf", file: true}}}
	w.restart()
	t.Cleanup(func() {
		mounts, _ := readMountinfo()
		for _, m := range slices.Backward(mounts) {
			if strings.HasPrefix(m.point, tmp+"/") {
				syscall.Unmount(m.point, syscall.MNT_DETACH)
			}
		}
	})
	return w
}

// look looks at upstream and wakes the service, as watchUpstream does.
func (w *world) look(ctx context.Context) {
	_ = lookAt(ctx, []*Service{w.s})
	w.s.nudge()
}

// restart gives the service a new life, as a new process would.
func (w *world) restart() {
	w.t.Helper()
	w.s = newService(w.spec, w.dir+"/state", time.Hour)
}

func (w *world) git(dir string, args ...string) string {
	w.t.Helper()
	cmd := exec.Command("git", args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "GIT_AUTHOR_NAME=a", "GIT_AUTHOR_EMAIL=a@b", "GIT_COMMITTER_NAME=a", "GIT_COMMITTER_EMAIL=a@b")
	out, err := cmd.CombinedOutput()
	if err != nil {
		w.t.Fatalf("git %v: %v: %s", args, err, out)
	}
	return strings.TrimSpace(string(out))
}

// commit makes a commit of name, content pairs (content "" removes), pushes it, and returns its hash.
func (w *world) commit(pairs ...string) string {
	w.t.Helper()
	for i := 0; i+1 < len(pairs); i += 2 {
		file := filepath.Join(w.work, pairs[i])
		if pairs[i+1] == "" {
			if err := os.RemoveAll(file); err != nil {
				w.t.Fatal(err)
			}
			continue
		}
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			w.t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte(pairs[i+1]), 0o644); err != nil {
			w.t.Fatal(err)
		}
	}
	return w.push()
}

// push commits what lies in the work directory.
func (w *world) push() string {
	w.t.Helper()
	w.git(w.work, "add", "-A")
	w.git(w.work, "commit", "-q", "--allow-empty", "-m", "c")
	w.git(w.work, "push", "-q", "-f", "origin", "HEAD:main")
	return w.git(w.work, "rev-parse", "HEAD")
}

// reconcile looks at upstream and has one pass done.
func (w *world) reconcile() {
	w.t.Helper()
	_ = lookAt(context.Background(), []*Service{w.s})
	w.s.pass(context.Background())
}

// calls returns and forgets what was asked of systemd.
func (w *world) calls() string {
	data, _ := os.ReadFile(w.fake + "/calls")
	os.Remove(w.fake + "/calls")
	return strings.ReplaceAll(strings.TrimSpace(strings.ReplaceAll(string(data), " svc.service", "")), "\n", ", ")
}

func (w *world) write(name, text string) {
	w.t.Helper()
	if err := os.MkdirAll(filepath.Dir(filepath.Join(w.dir, name)), 0o755); err != nil {
		w.t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(w.dir, name), []byte(text), 0o644); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) read(name string) string {
	data, err := os.ReadFile(filepath.Join(w.dir, name))
	if err != nil {
		return "error: " + err.Error()
	}
	return string(data)
}

// want compares the service's state and info, what the locals show, and what systemd was asked for.
func (w *world) want(state, info, app, calls string) {
	w.t.Helper()
	st := w.s.Status()
	if st.State != state || !strings.Contains(st.Info, info) || info == "" && st.Info != "" {
		w.t.Errorf("state %s %q, want %s %q", st.State, st.Info, state, info)
	}
	if got := w.read("local/etc/app.conf"); got != app {
		w.t.Errorf("local/etc/app.conf: %q, want %q", got, app)
	}
	if got := w.calls(); got != calls {
		w.t.Errorf("systemctl %q, want %q", got, calls)
	}
	for _, d := range w.spec.dirs {
		if d.local != "" && state == "OK" && !shows(w.s.repo.dir, d.link, d.local) {
			w.t.Errorf("%s does not show %s", d.local, d.link)
		}
	}
}

// clean fails if git finds anything to complain about in the checkout.
func (w *world) clean() {
	w.t.Helper()
	if out := w.git(w.s.repo.dir, "status", "--porcelain"); out != "" {
		w.t.Errorf("git status: %s", out)
	}
}

func gitRuns() float64 {
	count.mu.Lock()
	defer count.mu.Unlock()
	return count.sums["gitopper_machine_git_ops_total"][""]
}

func TestCommitReachesUnit(t *testing.T) {
	w := newWorld(t)
	if st := w.s.Status(); st.State != "DIFF" || st.Info != "first checkout under way" {
		t.Errorf("before the first pass: %+v", st)
	}
	w.reconcile()
	w.want("OK", "", "one\n", "reload")
	w.clean()
	if got := w.read("local/one.conf"); got != "single\n" {
		t.Errorf("one.conf: %q", got)
	}
	if _, err := os.Stat(w.s.repo.dir + "/other"); err == nil {
		t.Error("other/ is on disk")
	}
	before, status := gitRuns(), *w.s.Status()
	w.reconcile()
	w.want("OK", "", "one\n", "")
	if n := gitRuns() - before; n != 1 {
		t.Errorf("an idle round ran git %v times", n)
	}
	if st := w.s.Status(); !st.Change.Equal(status.Change) {
		t.Error("an idle round changed the time of change")
	}
	h := w.commit("other/file", "y\n", "etcetera", "z\n")
	w.reconcile()
	w.want("OK", "", "one\n", "")
	if w.s.Status().Commit != h || !w.s.Status().InSync {
		t.Error("a commit elsewhere did not move the hash")
	}
	w.commit("etc/app.conf", "two\n", "one.conf", "single2\n", "etc/sub/deep", "")
	w.reconcile()
	w.want("OK", "", "two\n", "reload")
	w.clean()
	if got := w.read("local/one.conf"); got != "single2\n" {
		t.Errorf("one.conf: %q", got)
	}
	if _, err := os.Stat(w.dir + "/local/etc/sub"); err == nil {
		t.Error("an emptied directory stayed")
	}
	w.restart()
	w.reconcile()
	w.want("OK", "", "two\n", "")
	w.git(w.work, "reset", "-q", "--hard", "HEAD~2")
	w.commit("etc/app.conf", "three\n")
	w.reconcile()
	w.want("OK", "", "three\n", "reload")
	w.clean()
}

func TestUpstreamTrouble(t *testing.T) {
	w := newWorld(t)
	os.Rename(w.up, w.up+".away")
	w.reconcile()
	w.want("DIFF", "git ls-remote file://"+w.up+": exit status 128", "error: open "+w.dir+"/local/etc/app.conf: no such file or directory", "")
	os.Rename(w.up+".away", w.up)
	w.reconcile()
	w.want("OK", "", "one\n", "reload")
	os.Rename(w.up, w.up+".away")
	w.reconcile()
	w.want("OK", "", "one\n", "")
	w.reconcile()
	w.want("DIFF", "git ls-remote", "one\n", "")
	w.restart()
	w.reconcile()
	w.reconcile()
	w.want("DIFF", "git ls-remote", "one\n", "")
	os.Rename(w.up+".away", w.up)
	w.git(w.up, "branch", "-m", "main", "gone")
	w.reconcile()
	w.want("DIFF", `branch "main" does not exist in file://`, "one\n", "")
	w.git(w.up, "branch", "-m", "gone", "main")
	w.reconcile()
	w.want("OK", "", "one\n", "")
}

func TestLinksAreJudged(t *testing.T) {
	for _, tc := range []struct {
		name, info string
		spoil      func(w *world)
	}{
		{"missing", `link "etc" is missing`, func(w *world) { os.RemoveAll(w.work + "/etc") }},
		{"file instead of directory", `link "etc" is a file, not a directory: say file = true`, func(w *world) { os.RemoveAll(w.work + "/etc"); w.write("work/etc", "x") }},
		{"directory instead of file", `link "one.conf" is a directory, not a file`, func(w *world) {
			os.Remove(w.work + "/one.conf")
			os.Mkdir(w.work+"/one.conf", 0o755)
			w.write("work/one.conf/x", "x")
		}},
		{"symbolic link", `link "etc": etc is a symbolic link`, func(w *world) { os.RemoveAll(w.work + "/etc"); os.Symlink("/root", w.work+"/etc") }},
		{"file is a symbolic link", `link "one.conf": one.conf is a symbolic link`, func(w *world) { os.Remove(w.work + "/one.conf"); os.Symlink("/etc/shadow", w.work+"/one.conf") }},
		{"submodule", `link "etc": etc is a submodule`, func(w *world) {
			os.RemoveAll(w.work + "/etc")
			w.git(w.work, "rm", "-rq", "--cached", "etc")
			w.git(w.work, "update-index", "--add", "--cacheinfo", "160000,"+w.git(w.work, "rev-parse", "HEAD")+",etc")
			os.Mkdir(w.work+"/etc", 0o755)
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w := newWorld(t)
			w.reconcile()
			w.calls()
			good := w.s.Status().Commit
			tc.spoil(w)
			w.push()
			w.reconcile()
			w.want("DIFF", tc.info, "one\n", "")
			if w.s.Status().Commit != good {
				t.Error("the refused commit is shown as running")
			}
			before := gitRuns()
			w.reconcile()
			w.want("DIFF", tc.info, "one\n", "")
			if n := gitRuns() - before; n != 1 {
				t.Errorf("a round with a refused commit ran git %v times", n)
			}
			w.restart()
			w.reconcile()
			w.want("DIFF", tc.info, "one\n", "")
			w.git(w.work, "reset", "-q", "--hard", "HEAD~1")
			w.commit("etc/app.conf", "fixed\n")
			w.reconcile()
			w.want("OK", "", "fixed\n", "reload")
			w.clean()
		})
	}
}

func TestLocalEdits(t *testing.T) {
	w := newWorld(t)
	w.reconcile()
	w.calls()
	w.write("local/etc/app.conf", "edited\n")
	w.write("local/etc/mine", "untracked\n")
	w.reconcile()
	w.want("OK", "", "one\n", "reload")
	patches, _ := filepath.Glob(w.dir + "/state/patches/svc.service/*.patch")
	if len(patches) != 1 {
		t.Fatalf("patches: %v", patches)
	}
	if p, _ := os.ReadFile(patches[0]); !strings.Contains(string(p), "+edited") {
		t.Errorf("patch: %s", p)
	}
	if got := w.read("local/etc/mine"); got != "untracked\n" {
		t.Errorf("mine: %q", got)
	}
	// Not twice within an interval, and then again.
	os.Remove(w.dir + "/local/etc/sub/deep")
	w.reconcile()
	w.want("OK", "", "one\n", "")
	if got := w.read("local/etc/sub/deep"); got == "deep\n" {
		t.Error("an edit was undone twice within the interval")
	}
	w.s.rec.DriftUndone = time.Now().Add(-2 * time.Hour)
	w.reconcile()
	w.want("OK", "", "one\n", "reload")
	if got := w.read("local/etc/sub/deep"); got != "deep\n" {
		t.Errorf("deep: %q", got)
	}
	// Neither can they be hidden.
	w.s.rec.DriftUndone = time.Time{}
	w.git(w.s.repo.dir, "update-index", "--assume-unchanged", "etc/app.conf")
	w.git(w.s.repo.dir, "update-index", "--skip-worktree", "etc/sub/deep")
	w.write("local/etc/app.conf", "hidden\n")
	w.write("local/etc/sub/deep", "hidden\n")
	w.reconcile()
	w.want("OK", "", "one\n", "reload")
	if got := w.read("local/etc/sub/deep"); got != "deep\n" {
		t.Errorf("deep: %q", got)
	}
	// A pinned service's edits are only reported, and kept by what comes next.
	if err := w.s.operate(context.Background(), op{verb: "freeze", who: "me"}); err != nil {
		t.Fatal(err)
	}
	w.s.rec.DriftUndone = time.Time{}
	w.write("local/etc/app.conf", "emergency\n")
	w.reconcile()
	w.want("FREEZE", "me; edited here: etc/app.conf", "emergency\n", "")
	w.commit("etc/app.conf", "two\n")
	if err := w.s.operate(context.Background(), op{verb: "unfreeze", who: "me"}); err != nil {
		t.Fatal(err)
	}
	w.want("OK", "", "two\n", "reload")
	patches, _ = filepath.Glob(w.dir + "/state/patches/svc.service/*.patch")
	if p, _ := os.ReadFile(patches[len(patches)-1]); !strings.Contains(string(p), "+emergency") {
		t.Errorf("patch: %s", p)
	}
	// An untracked file in a commit's way is renamed; one with the same content is not.
	w.write("local/etc/same", "same\n")
	h := w.commit("etc/mine", "upstream's\n", "etc/same", "same\n")
	w.reconcile()
	w.want("OK", "", "two\n", "reload")
	if got := w.read("local/etc/mine") + w.read("local/etc/mine.before-"+h[:8]); got != "upstream's\nuntracked\n" {
		t.Errorf("mine: %q", got)
	}
	if left, _ := filepath.Glob(w.dir + "/local/etc/same.*"); left != nil {
		t.Errorf("left: %v", left)
	}
	w.write("local/etc/d", "a file\n")
	h = w.commit("etc/d/x", "x\n")
	w.reconcile()
	if got := w.read("local/etc/d/x") + w.read("local/etc/d.before-"+h[:8]); got != "x\na file\n" {
		t.Errorf("d: %q", got)
	}
	w.write("local/etc/d/untracked", "u\n")
	w.commit("etc/d", "", "etc/d2", "x\n")
	w.reconcile()
	h = w.commit("etc/d", "a file now\n")
	w.reconcile()
	if got := w.read("local/etc/d") + w.read("local/etc/d.before-"+h[:8]+"/untracked"); got != "a file now\nu\n" {
		t.Errorf("d: %q", got)
	}
}

// TestHugeEditStays: what can't be kept is not undone.
func TestHugeEditStays(t *testing.T) {
	w := newWorld(t)
	w.reconcile()
	w.calls()
	noise := make([]byte, 70<<20)
	rand.New(rand.NewSource(1)).Read(noise)
	w.write("local/etc/app.conf", string(noise))
	w.commit("etc/sub/deep", "deeper\n")
	w.reconcile()
	if st := w.s.Status(); st.State != "DIFF" || !strings.Contains(st.Info, "keep local edits of etc/app.conf: git diff: more than 64 MiB of output: revert") {
		t.Errorf("%s %s", st.State, st.Info)
	}
	if got := w.read("local/etc/app.conf"); got != string(noise) {
		t.Error("the edit is gone")
	}
	if left, _ := filepath.Glob(w.dir + "/state/patches/svc.service/*"); len(left) > 0 {
		t.Errorf("half a patch: %v", left)
	}
	w.write("local/etc/app.conf", "one\n")
	w.reconcile()
	w.want("OK", "", "one\n", "reload")
}

// TestRandomHistory compares the checkout with an ordinary one after commits that change everything into everything.
func TestRandomHistory(t *testing.T) {
	w := newWorld(t)
	w.spec.dirs[1].local, w.spec.action = "", ""
	w.restart()
	seed := time.Now().UnixNano()
	rng := rand.New(rand.NewSource(seed))
	t.Logf("seed %d", seed)
	names := []string{"etc/a", "etc/x y", "etc/-d", "etc/q*", "etc/é", "etc/d", "etc/d/e", "etc/d/e/f", "etc/d/g", "etc/.gitattributes", "etc/a/b"}
	w.commit(".gitattributes", "* text eol=crlf filter=x ident\n")
	for i := range 60 {
		for range 1 + rng.Intn(4) {
			n := filepath.Join(w.work, names[rng.Intn(len(names))])
			os.RemoveAll(n)
			for p := filepath.Dir(n); p != w.work; p = filepath.Dir(p) {
				if fi, err := os.Lstat(p); err == nil && !fi.IsDir() {
					os.Remove(p)
				}
			}
			os.MkdirAll(filepath.Dir(n), 0o755)
			switch rng.Intn(5) {
			case 0:
			case 1:
				if filepath.Base(n) == ".gitattributes" {
					break // git warns of one that is a link
				}
				os.Symlink([]string{"a", "d", "/nowhere"}[rng.Intn(3)], n)
			case 2:
				os.WriteFile(n, fmt.Appendf(nil, "exec %d\n", rng.Intn(9)), 0o755)
			default:
				text := fmt.Sprintf("%d $Id$\n", rng.Intn(9))
				if filepath.Base(n) == ".gitattributes" {
					text = "* text eol=crlf ident\n"
				}
				os.WriteFile(n, []byte(text), 0o644)
			}
		}
		if out, err := exec.Command("find", w.work+"/etc", "-type", "d", "-empty", "-delete").CombinedOutput(); err != nil { // git has none
			t.Fatalf("%v: %s", err, out)
		}
		w.push()
		w.reconcile()
		if st := w.s.Status(); st.State != "OK" && !strings.Contains(st.Info, "is missing") {
			t.Fatalf("commit %d: %s %s", i, st.State, st.Info)
		}
		w.clean()
		if out, err := exec.Command("diff", "-r", "--no-dereference", w.work+"/etc", w.dir+"/local/etc").CombinedOutput(); err != nil {
			t.Fatalf("commit %d: %s", i, out)
		}
		if n := w.git(w.s.repo.dir, "diff", "--raw", "HEAD"); n != "" {
			t.Fatalf("commit %d: %s", i, n)
		}
	}
}

func TestDamageHeals(t *testing.T) {
	spoil := func(name, text string) func(*world) {
		return func(w *world) {
			if err := os.WriteFile(w.s.repo.dir+"/.git/"+name, []byte(text), 0o644); err != nil {
				w.t.Fatal(err)
			}
		}
	}
	for _, tc := range []struct {
		name  string
		spoil func(w *world)
	}{
		{"index.lock", spoil("index.lock", "")},
		{"HEAD.lock", spoil("HEAD.lock", "")},
		{"ref lock", spoil("refs/remotes/origin/main.lock", "")},
		{"packed-refs.lock", spoil("packed-refs.lock", "")},
		{"config.lock", spoil("config.lock", "")},
		{"empty HEAD", spoil("HEAD", "")},
		{"HEAD on a branch", spoil("HEAD", "ref: refs/heads/nope\n")},
		{"empty remote ref", spoil("refs/remotes/origin/main", "")},
		{"empty index", spoil("index", "")},
		{"garbage index", spoil("index", "DIRC garbage")},
		{"no index", func(w *world) { os.Remove(w.s.repo.dir + "/.git/index") }},
		{"empty config", spoil("config", "")},
		{"garbage config", spoil("config", "[[[")},
		{"no objects", func(w *world) { os.RemoveAll(w.s.repo.dir + "/.git/objects") }},
		{"no packs", func(w *world) {
			packs, _ := filepath.Glob(w.s.repo.dir + "/.git/objects/pack/*")
			for _, p := range packs {
				os.Remove(p)
			}
		}},
		{"no .git", func(w *world) { os.RemoveAll(w.s.repo.dir + "/.git") }},
		{".git is a file", func(w *world) { os.RemoveAll(w.s.repo.dir + "/.git"); spoilFile(w, ".git") }},
		{"no checkout", func(w *world) { os.RemoveAll(w.s.repo.dir) }},
		{"link is gone", func(w *world) { os.RemoveAll(w.s.repo.dir + "/etc") }},
	} {
		for _, restart := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s restart=%v", tc.name, restart), func(t *testing.T) {
				w := newWorld(t)
				w.reconcile()
				w.calls()
				tc.spoil(w)
				if restart {
					w.restart()
				}
				w.commit("etc/app.conf", "two\n")
				for range 3 { // git itself may have to fail once before the damage shows
					w.reconcile()
				}
				calls := w.calls()
				w.want("OK", "", "two\n", "")
				if !strings.HasPrefix(calls, "reload") {
					t.Errorf("calls: %s", calls)
				}
				if tc.name != ".git is a file" {
					w.clean()
				}
				if locks, _ := filepath.Glob(w.s.repo.dir + "/.git/*.lock"); locks != nil && restart {
					t.Errorf("left: %v", locks)
				}
			})
		}
	}
}

func spoilFile(w *world, name string) {
	if err := os.WriteFile(filepath.Join(w.s.repo.dir, name), []byte("x"), 0o644); err != nil {
		w.t.Fatal(err)
	}
}

func TestChangedConfig(t *testing.T) {
	w := newWorld(t)
	w.git(w.work, "push", "-q", "origin", "HEAD:refs/heads/canary/1", "HEAD:refs/heads/spare")
	w.reconcile()
	w.calls()
	// Other branch.
	w.spec.branch = "canary/1"
	w.commit("etc/app.conf", "main\n")
	w.restart()
	w.reconcile()
	w.want("OK", "", "one\n", "")
	if got := w.git(w.s.repo.dir, "for-each-ref", "--format=%(refname)", "refs/remotes"); got != "refs/remotes/origin/canary/1" {
		t.Errorf("remote branches: %s", got)
	}
	w.spec.branch = "main"
	w.restart()
	w.reconcile()
	w.want("OK", "", "main\n", "reload")
	// Other paths: one mount goes, one comes, one shows something else.
	old := w.spec.dirs[1].local
	w.spec.dirs = []dir{{local: w.dir + "/local/etc", link: "etc"}, {local: w.dir + "/local/new/deep", link: "other"}}
	w.restart()
	w.reconcile()
	w.want("OK", "", "main\n", "reload")
	w.clean()
	if _, err := os.Lstat(old); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("%s is still there: %v", old, err)
	}
	if _, err := os.Lstat(w.s.repo.dir + "/one.conf"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("one.conf is still on disk: %v", err)
	}
	w.spec.dirs[0].link, w.spec.dirs[1].link = "other", "etc"
	w.restart()
	w.reconcile()
	if got := w.read("local/new/deep/app.conf") + w.read("local/etc/file"); got != "main\nx\n" {
		t.Errorf("swapped links: %q", got)
	}
	if calls := w.calls(); calls != "reload" {
		t.Errorf("calls: %s", calls)
	}
	// A missing link: the old files stay.
	w.spec.dirs[0].link, w.spec.dirs[1].link = "etc", "nope"
	w.restart()
	w.reconcile()
	if st := w.s.Status(); st.State != "DIFF" || !strings.Contains(st.Info, `link "nope" is missing`) {
		t.Errorf("%+v", st)
	}
	// Other mount directory.
	w.spec.dirs[1].link = "other"
	w.spec.mount = w.dir + "/mount2"
	w.restart()
	w.reconcile()
	w.calls()
	w.want("OK", "", "main\n", "")
	// Other upstream, with another history.
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
	// It leaves the config: its mounts go, all else stays.
	(&agent{options: options{stateDir: w.dir + "/state"}}).retire(nil)
	if _, err := os.Lstat(w.dir + "/local"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("local is still there: %v", err)
	}
	if calls := w.calls(); calls != "" {
		t.Errorf("calls: %s", calls)
	}
	w.restart()
	w.reconcile()
	w.want("OK", "", "elsewhere\n", "reload")
}

// TestTakeover starts on what the gitopper of 2022 left: a cone-mode clone on a branch with a stash, and its mounts.
func TestTakeover(t *testing.T) {
	w := newWorld(t)
	w.write("work/README", "r\n")
	w.commit("etc/app.conf", "one\n")
	clone := w.dir + "/mount/svc.service"
	w.git(w.dir, "clone", "-q", "-b", "main", "--filter=blob:none", "--no-checkout", "--sparse", w.spec.upstream, clone)
	w.git(clone, "sparse-checkout", "set", "--cone", "etc")
	w.git(clone, "checkout", "-q", "main")
	os.WriteFile(clone+"/etc/app.conf", []byte("stashed\n"), 0o644)
	w.git(clone, "stash", "-q")
	w.spec.dirs = []dir{{local: w.dir + "/local/etc", link: "etc"}, {local: w.dir + "/local/file", link: "etc/sub/deep", file: true}}
	os.MkdirAll(w.dir+"/local/etc", 0o755)
	w.write("local/file", "")
	w.write("mount/svc.service/etc/sub/deep", "stale\n")
	for _, d := range w.spec.dirs {
		if err := syscall.Mount(clone+"/"+d.link, d.local, "", syscall.MS_BIND, ""); err != nil {
			t.Fatal(err)
		}
	}
	os.Remove(clone + "/etc/sub/deep")
	w.git(clone, "checkout", "-q", "--", "etc/sub/deep")
	if got := w.read("local/file"); got != "stale\n" {
		t.Fatalf("the mount should be stale: %q", got)
	}
	w.restart()
	w.reconcile()
	w.want("OK", "", "one\n", "reload")
	w.clean()
	if got := w.read("local/file"); got != "deep\n" {
		t.Errorf("file: %q", got)
	}
	if got := w.git(clone, "stash", "list"); !strings.Contains(got, "stash@{0}") {
		t.Errorf("stash: %q", got)
	}
	if _, err := os.Stat(clone + "/README"); err == nil {
		t.Error("README is still on disk")
	}
	if n := strings.Count(w.read("../../../proc/self/mountinfo"), w.dir); n > 2 {
		mounts, _ := readMountinfo()
		if own := sourcesBelow(mounts, clone); len(own) != 2 {
			t.Errorf("mounts: %v", own)
		}
	}
}

func TestRecordTrouble(t *testing.T) {
	w := newWorld(t)
	w.reconcile()
	w.calls()
	file := recordFile(w.dir+"/state", "svc.service")
	if err := os.WriteFile(file, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	w.commit("etc/app.conf", "two\n")
	w.restart()
	w.reconcile()
	w.want("FREEZE", "state lost", "one\n", "reload")
	if _, err := os.Stat(file + ".broken"); err != nil {
		t.Error(err)
	}
	w.restart()
	w.reconcile()
	w.want("FREEZE", "state lost", "one\n", "")
	if err := w.s.operate(context.Background(), op{verb: "unfreeze"}); err != nil {
		t.Fatal(err)
	}
	w.want("OK", "", "two\n", "reload")
	// Where it can't be written nothing is changed.
	os.RemoveAll(w.dir + "/state/services")
	w.write("state/services", "in the way")
	w.commit("etc/app.conf", "three\n")
	w.reconcile()
	w.want("BROKEN", "record: ", "two\n", "")
	var oe *opError
	if err := w.s.operate(context.Background(), op{verb: "freeze"}); !errors.As(err, &oe) || oe.status != "Internal Server Error" || w.s.rec.Pin != nil {
		t.Errorf("freeze: %v, pin %v", err, w.s.rec.Pin)
	}
	os.Remove(w.dir + "/state/services")
	w.reconcile()
	w.want("OK", "", "three\n", "reload")
}

func TestUnitTrouble(t *testing.T) {
	w := newWorld(t)
	w.write("fake/reads", w.dir+"/local/etc/app.conf")
	w.reconcile()
	w.want("OK", "", "one\n", "reload")
	good := w.s.Status().Commit

	// A commit on which the reload fails is taken back, and not tried again.
	bad := w.commit("etc/app.conf", "bad\n")
	w.reconcile()
	w.want("BROKEN", fmt.Sprintf("commit %.8s taken back, %.8s runs; with %.8s: systemctl reload", bad, good, bad), "one\n", "reload, reload")
	w.reconcile()
	w.want("BROKEN", "taken back", "one\n", "")
	w.restart()
	w.reconcile()
	w.want("BROKEN", "taken back", "one\n", "")
	w.commit("other/file", "elsewhere\n")
	w.reconcile()
	w.want("BROKEN", "taken back", "one\n", "")
	if got := w.s.Status().Commit; got != good {
		t.Errorf("runs %s, want %s", got, good)
	}
	if err := w.s.operate(context.Background(), op{verb: "pull"}); err == nil || !strings.Contains(err.Error(), "is BROKEN: commit") {
		t.Errorf("pull: %v", err)
	}
	w.want("BROKEN", "taken back", "one\n", "reload, reload")
	w.commit("etc/app.conf", "fixed\n")
	w.reconcile()
	w.want("OK", "", "fixed\n", "reload")

	// Killed in the middle of taking back: what was remembered first decides.
	w.commit("etc/app.conf", "bad again\n")
	w.write("fake/fail-reload", "")
	w.reconcile()
	w.want("BROKEN", "failed, and so does the last good one", "fixed\n", "reload, reload")
	w.reconcile()
	w.want("BROKEN", "Job for", "fixed\n", "reload")
	os.Remove(w.fake + "/fail-reload")
	w.reconcile() // the good one settles
	w.want("BROKEN", "failed, and so does", "fixed\n", "reload")
	w.reconcile() // the new one is tried once more, fails, and is refused for good
	w.want("BROKEN", "taken back", "fixed\n", "reload, reload")
	w.reconcile()
	w.want("BROKEN", "taken back", "fixed\n", "")

	// Not the commit's fault: it ends on the new one.
	w.write("fake/fail-reload", "")
	h := w.commit("etc/app.conf", "fine\n")
	w.reconcile()
	w.want("BROKEN", "and so does the last good one", "fixed\n", "reload, reload")
	w.restart()
	w.reconcile()
	w.want("BROKEN", "Job for", "fixed\n", "reload")
	os.Remove(w.fake + "/fail-reload")
	w.reconcile()
	w.reconcile()
	w.want("OK", "", "fine\n", "reload, reload")
	if got := w.s.Status().Commit; got != h {
		t.Errorf("runs %s, want %s", got, h)
	}

	// Later trouble changes no files, and is not ours to mend.
	w.write("fake/svc.service", "failed")
	w.reconcile()
	w.want("BROKEN", "unit svc.service is failed", "fine\n", "")
	w.reconcile()
	w.want("BROKEN", "unit svc.service is failed", "fine\n", "")
	if err := w.s.operate(context.Background(), op{verb: "pull"}); err != nil {
		t.Error(err)
	}
	w.want("OK", "", "fine\n", "reset-failed, start")

	// Without fallback a commit that fails stays, and is acted on again.
	w.spec.fallback = false
	w.restart()
	w.commit("etc/app.conf", "bad once more\n")
	w.reconcile()
	w.want("BROKEN", "because of bad", "bad once more\n", "reload")
	w.reconcile()
	w.want("BROKEN", "because of bad", "bad once more\n", "reload")
	w.commit("etc/app.conf", "good\n")
	w.reconcile()
	w.want("OK", "", "good\n", "reload")
}

func TestOperators(t *testing.T) {
	ctx := context.Background()
	w := newWorld(t)
	var oe *opError
	if err := w.s.operate(ctx, op{verb: "freeze"}); !errors.As(err, &oe) || oe.status != "Conflict" {
		t.Errorf("freeze of nothing: %v", err)
	}
	first := w.git(w.work, "rev-parse", "HEAD")
	w.reconcile()
	second := w.commit("etc/app.conf", "two\n")
	w.reconcile()
	third := w.commit("etc/app.conf", "three\n")
	w.commit("etc/app.conf", "four\n")
	w.reconcile()
	w.calls()
	// Back to what ran, with upstream away; short and odd hashes.
	os.Rename(w.up, w.up+".away")
	if err := w.s.operate(ctx, op{verb: "rollback", hash: second[:7], who: "me@there"}); err != nil {
		t.Fatal(err)
	}
	w.want("FREEZE", "ROLLBACK: "+second[:8]+", me@there", "two\n", "reload")
	w.restart()
	w.reconcile()
	w.reconcile()
	w.want("FREEZE", "ROLLBACK: "+second[:8], "two\n", "")
	// One that never ran, but whose files were fetched ahead.
	if err := w.s.operate(ctx, op{verb: "rollback", hash: third, who: "me"}); err != nil {
		t.Fatal(err)
	}
	w.want("FREEZE", "ROLLBACK: "+third[:8], "three\n", "reload")
	w.clean()
	for _, hash := range []string{"abcd", "0123456789012345678901234567890123456789"} {
		if err := w.s.operate(ctx, op{verb: "rollback", hash: hash}); !errors.As(err, &oe) || oe.status != "Not Found" {
			t.Errorf("rollback to %s: %v", hash, err)
		}
	}
	w.want("FREEZE", "ROLLBACK: "+third[:8], "three\n", "")
	if err := w.s.operate(ctx, op{verb: "pull"}); !errors.As(err, &oe) || oe.status != "Conflict" {
		t.Errorf("pull while pinned: %v", err)
	}
	os.Rename(w.up+".away", w.up)
	if err := w.s.operate(ctx, op{verb: "unfreeze"}); err != nil {
		t.Fatal(err)
	}
	w.want("OK", "", "four\n", "reload")
	// After a forced push what ran is still there.
	w.git(w.work, "reset", "-q", "--hard", first)
	w.commit("etc/app.conf", "five\n")
	w.reconcile()
	w.git(w.s.repo.dir, "reflog", "expire", "--expire=now", "--all")
	w.git(w.s.repo.dir, "gc", "-q", "--prune=now")
	os.Rename(w.up, w.up+".away")
	if err := w.s.operate(ctx, op{verb: "rollback", hash: second}); err != nil {
		t.Error(err)
	}
	w.want("FREEZE", "ROLLBACK", "two\n", "reload, reload")
	os.Rename(w.up+".away", w.up)
	// A rollback on which the unit fails keeps the pin and says so.
	w.write("fake/fail-reload", "")
	if err := w.s.operate(ctx, op{verb: "rollback", hash: first}); !errors.As(err, &oe) || !oe.done {
		t.Errorf("rollback that fails: %v", err)
	}
	w.want("BROKEN", "ROLLBACK: "+first[:8], "one\n", "reload")
	os.Remove(w.fake + "/fail-reload")
	w.reconcile()
	w.want("FREEZE", "ROLLBACK: "+first[:8], "one\n", "reload")
	// A freeze that ends by itself.
	if err := w.s.operate(ctx, op{verb: "freeze", who: "me", reason: "because", until: time.Now().Add(time.Hour)}); err != nil {
		t.Fatal(err)
	}
	w.want("FREEZE", "me: because, until ", "one\n", "")
	w.s.rec.Pin.Until = time.Now().Add(-time.Second)
	w.reconcile()
	w.want("OK", "", "five\n", "reload")
}

func TestServiceLoop(t *testing.T) {
	w := newWorld(t)
	ctx, cancel := context.WithCancel(context.Background())
	go w.s.run(ctx)
	w.look(ctx)
	wait := func(what string, ok func(*Status) bool) {
		t.Helper()
		for end := time.Now().Add(20 * time.Second); !ok(w.s.Status()); time.Sleep(5 * time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("%s: %+v", what, w.s.Status())
			}
		}
	}
	wait("first pass", func(st *Status) bool { return st.State == "OK" })
	// An operator ends a unit's long settling, and is served next.
	w.s.do(ctx, op{verb: "freeze", who: "a"})
	h := w.s.Status().Commit
	pulled := make(chan error)
	started := make(chan struct{})
	w.commit("etc/app.conf", "two\n")
	go func() {
		pulled <- w.s.do(ctx, op{verb: "unfreeze", who: "a", step: func(s string) {
			if s == "fetch" {
				close(started)
			}
		}})
	}()
	<-started
	if err := w.s.do(ctx, op{verb: "rollback", hash: h, who: "b"}); err != nil {
		t.Error(err)
	}
	if err := <-pulled; err != nil && !strings.Contains(err.Error(), "ended by a rollback of b") {
		t.Errorf("unfreeze: %v", err)
	}
	wait("rollback", func(st *Status) bool { return st.State == "FREEZE" && st.Commit == h })
	cancel()
	if err := w.s.do(context.Background(), op{verb: "freeze"}); err == nil || !strings.Contains(err.Error(), "stopping") {
		t.Errorf("do after the end: %v", err)
	}
	<-w.s.ended
}

// eventually waits for a condition, with a deadline.
func eventually(t *testing.T, what string, ok func() bool, limit time.Duration) {
	t.Helper()
	for end := time.Now().Add(limit); !ok(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("timeout: %s", what)
		}
	}
}

// TestRefusedCommandDoesNotEndTheTrial: A command that is refused ends the settling of a trial, which must go on all the same.
func TestRefusedCommandDoesNotEndTheTrial(t *testing.T) {
	w := newWorld(t)
	w.spec.settle = 2 * time.Second
	w.restart()
	ctx, cancel := context.WithCancel(context.Background())
	defer func() { cancel(); <-w.s.ended }()
	go w.s.run(ctx)
	w.look(ctx)
	eventually(t, "first", func() bool { return w.s.Status().State == "OK" }, 20*time.Second)
	w.calls()
	w.commit("etc/app.conf", "bad\n", "one.conf", "new\n")
	w.look(ctx)
	eventually(t, "told", func() bool { b, _ := os.ReadFile(w.fake + "/calls"); return len(b) > 0 }, 20*time.Second)
	os.WriteFile(w.fake+"/svc.service", []byte("failed"), 0o644) // the unit dies during settle
	if err := w.s.do(ctx, op{verb: "rollback", hash: "abcdabcd"}); err == nil {
		t.Error("a rollback to an unknown commit was carried out")
	}
	eventually(t, "the pass goes on", func() bool { return w.s.Status().State == "BROKEN" }, 20*time.Second)
}

// TestRecordTroubleIsNotTheCommits: A record that can't be written while the unit is told says nothing against the commit.
func TestRecordTroubleIsNotTheCommits(t *testing.T) {
	w := newWorld(t)
	w.reconcile()
	w.calls()
	w.commit("etc/app.conf", "two\n")
	// make the state directory unwritable when the unit is told
	w.s.step = func(st string) {
		if st == "reload" {
			os.Rename(w.dir+"/state/services", w.dir+"/state/services.away")
			os.WriteFile(w.dir+"/state/services", []byte("x"), 0o644)
		}
	}
	w.reconcile()
	w.s.step = func(string) {}
	os.Remove(w.dir + "/state/services")
	os.Rename(w.dir+"/state/services.away", w.dir+"/state/services")
	w.reconcile()
	w.reconcile()
	w.want("OK", "", "two\n", "reload")
}

// TestRollbackUndoesEdits: A rollback to the commit that runs undoes the edits of a pinned service.
func TestRollbackUndoesEdits(t *testing.T) {
	w := newWorld(t)
	w.reconcile()
	w.calls()
	ctx := context.Background()
	if err := w.s.operate(ctx, op{verb: "freeze", who: "me"}); err != nil {
		t.Fatal(err)
	}
	w.write("local/etc/app.conf", "emergency\n")
	w.reconcile()
	if err := w.s.operate(ctx, op{verb: "rollback", hash: w.s.rec.Live[:8], who: "me"}); err != nil {
		t.Fatal(err)
	}
	w.want("FREEZE", "ROLLBACK", "one\n", "reload")
}

// TestRefusedFirstCommitNeverRan: A first commit that was refused did not run, so that a rollback to it is judged.
func TestRefusedFirstCommitNeverRan(t *testing.T) {
	w := newWorld(t)
	w.spec.check = []string{"false"}
	w.restart()
	w.reconcile()
	h := w.git(w.work, "rev-parse", "HEAD")
	err := w.s.operate(context.Background(), op{verb: "rollback", hash: h[:8], who: "me"})
	var oe *opError
	if !errors.As(err, &oe) || oe.status != "Not Acceptable" {
		t.Errorf("rollback to a refused commit that never ran: err %v, %+v, live %q", err, *w.s.Status(), w.read("local/etc/app.conf"))
	}
}

// TestRefusedFirstCommitIsNotPinned: A lost record does not make a refused first commit what runs.
func TestRefusedFirstCommitIsNotPinned(t *testing.T) {
	w := newWorld(t)
	w.spec.check = []string{"false"}
	w.restart()
	w.reconcile()
	os.WriteFile(recordFile(w.dir+"/state", "svc.service"), []byte("{"), 0o600)
	w.restart()
	w.reconcile()
	if w.read("local/etc/app.conf") == "one\n" {
		t.Error("the refused commit went live")
	}
}

// TestChangedDirsAreChecked: What changed dirs would show does not go live either when the check refuses it.
func TestChangedDirsAreChecked(t *testing.T) {
	w := newWorld(t)
	w.reconcile()
	w.calls()
	w.spec.dirs = append(w.spec.dirs, dir{local: w.dir + "/local/other", link: "other"})
	w.spec.check = []string{"false"}
	w.restart()
	w.reconcile()
	if w.read("local/other/file") == "x\n" {
		t.Error("refused by check, and live")
	}
}

// TestDoubtSurvivesKill: Killed while the last good commit fails as well: the new one still gets its second try.
func TestDoubtSurvivesKill(t *testing.T) {
	w := newWorld(t)
	w.reconcile()
	w.calls()
	w.write("fake/fail-reload", "")
	h := w.commit("etc/app.conf", "fine\n")
	ctx, cancel := context.WithCancel(context.Background())
	n := 0
	w.s.step = func(st string) {
		if st == "reload" {
			if n++; n == 2 {
				cancel() // SIGTERM/kill while the last good one is told
			}
		}
	}
	w.look(ctx)
	w.s.pass(ctx)
	w.restart()
	for range 2 {
		w.reconcile()
		t.Logf("%+v", *w.s.Status())
	}
	os.Remove(w.fake + "/fail-reload")
	for range 4 {
		w.reconcile()
	}
	if w.s.Status().Commit != h {
		t.Error("never tried a second time")
	}
}

// TestTakeoverWithUpstreamAway: A checkout of an earlier gitopper is used while upstream is away.
func TestTakeoverWithUpstreamAway(t *testing.T) {
	w := newWorld(t)
	clone := w.dir + "/mount/svc.service"
	w.git(w.dir, "clone", "-q", "-b", "main", "--filter=blob:none", "--no-checkout", "--sparse", w.spec.upstream, clone)
	w.git(clone, "sparse-checkout", "set", "--cone", "etc")
	w.git(clone, "checkout", "-q", "main")
	os.Rename(w.up, w.up+".away")
	w.restart()
	w.s.pass(context.Background()) // the 5 s timer, while the look still hangs
	if w.s.Status().State == "OK" && w.s.Status().Commit == "" {
		t.Error("OK with no commit")
	}
	w.reconcile()
	w.reconcile()
	if w.read("local/etc/app.conf") != "one\n" {
		t.Error("legacy checkout is not mounted while upstream is away")
	}
}

// TestLookIsUsedOnce: A commit that came between look and fetch is not fetched again and again.
func TestLookIsUsedOnce(t *testing.T) {
	w := newWorld(t)
	w.reconcile()
	w.calls()
	w.commit("etc/app.conf", "two\n")
	_ = lookAt(context.Background(), []*Service{w.s})
	w.commit("etc/app.conf", "three\n") // between look and fetch
	w.s.pass(context.Background())
	w.want("OK", "", "three\n", "reload")
	before := gitRuns()
	w.s.pass(context.Background())
	if n := gitRuns() - before; n != 0 {
		t.Errorf("idle pass ran git %v times", n)
	}
	if !w.s.Status().InSync {
		t.Error("not in sync")
	}
	os.Rename(w.up, w.up+".away")
	w.s.pass(context.Background())
	if st := w.s.Status(); st.State != "OK" {
		t.Errorf("no look has failed, but %s %s", st.State, st.Info)
	}
}

// TestRollbackUsesNoNetwork: Content on disk goes live without asking anybody.
func TestRollbackUsesNoNetwork(t *testing.T) {
	w := newWorld(t)
	var hs []string
	for i := range 30 {
		hs = append(hs, w.commit("etc/app.conf", fmt.Sprintf("v%d\n", i)))
	}
	w.reconcile()
	w.calls()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	var conns atomic.Int32
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			conns.Add(1)
			defer c.Close() // never answered
		}
	}()
	w.git(w.s.repo.dir, "config", "remote.origin.url", "http://"+l.Addr().String()+"/x")
	if err := w.s.operate(context.Background(), op{verb: "rollback", hash: hs[20], who: "me"}); err != nil {
		t.Error(err)
	}
	if conns.Load() > 0 {
		t.Error("network was used for content on disk")
	}
	// What was never fetched is refused while nobody is there to ask, and nothing changes.
	l.Close()
	before := w.read("local/etc/app.conf")
	w.calls()
	var oe *opError
	if err := w.s.operate(context.Background(), op{verb: "rollback", hash: hs[0], who: "me"}); !errors.As(err, &oe) || oe.done {
		t.Errorf("rollback to what is not on disk: %v", err)
	}
	w.want("FREEZE", "ROLLBACK: "+hs[20][:8], before, "")
}

// TestManyEdits: More edited files than fit a command line.
func TestManyEdits(t *testing.T) {
	w := newWorld(t)
	name := strings.Repeat("n", 200)
	os.MkdirAll(w.work+"/etc/many", 0o755)
	for i := range 12000 {
		os.WriteFile(fmt.Sprintf("%s/etc/many/%s%d", w.work, name, i), []byte("x"), 0o644)
	}
	w.push()
	w.reconcile()
	w.calls()
	os.RemoveAll(w.dir + "/local/etc/many")
	w.reconcile()
	w.want("OK", "", "one\n", "reload")
}

// TestPipeDoesNotBlock: A pipe planted in the checkout blocks nothing.
func TestPipeDoesNotBlock(t *testing.T) {
	w := newWorld(t)
	w.reconcile()
	w.calls()
	os.Remove(w.s.repo.dir + "/.git/HEAD")
	if err := syscall.Mkfifo(w.s.repo.dir+"/.git/HEAD", 0o644); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	go func() { w.s.pass(ctx); close(done) }()
	select {
	case <-done:
		t.Logf("%+v", *w.s.Status())
	case <-time.After(8 * time.Second):
		t.Error("the pass hangs in open(2) and can't be ended")
		f, _ := os.OpenFile(w.s.repo.dir+"/.git/HEAD", os.O_WRONLY, 0)
		f.Close()
		time.Sleep(time.Second)
	}
}

// TestMountsAreIndependent: A dir that can not be mounted keeps no other from it.
func TestMountsAreIndependent(t *testing.T) {
	w := newWorld(t)
	w.reconcile()
	w.calls()
	for _, d := range w.spec.dirs {
		syscall.Unmount(d.local, syscall.MNT_DETACH)
	}
	// a config with one more dir, first in the list; after a boot with upstream away
	w.spec.dirs = append([]dir{{local: w.dir + "/local/other", link: "other"}}, w.spec.dirs...)
	w.restart()
	(&agent{}).mountFirst(context.Background(), []*Service{w.s})
	if got := w.read("local/etc/app.conf"); got != "one\n" {
		t.Errorf("not mounted before READY: %q", got)
	}
}

// TestNoEntryUnmountsNothing: A bootstrapped host that is no longer in the config keeps its mounts.
func TestNoEntryUnmountsNothing(t *testing.T) {
	w := newWorld(t)
	w.reconcile()
	w.calls()
	pub := w.dir + "/k.pub"
	exec.Command("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", w.dir+"/k").Run()
	w.commit("gitopper/c.toml", "[global]\nupstream=\""+w.spec.upstream+"\"\nmount=\""+w.dir+"/mount\"\nkeys=[{path=\""+pub+"\"}]\n[[services]]\nmachine=\"m\"\nservice=\"svc.service\"\naction=\"reload\"\ndirs=[{link=\"etc\",local=\""+w.dir+"/local/etc\"},{link=\"one.conf\",local=\""+w.dir+"/local/one.conf\",file=true}]\n")
	o := options{names: []string{"renamed-by-dhcp"}, config: "c.toml", upstream: w.spec.upstream, directory: "gitopper", branch: "main", mount: w.dir + "/boot", stateDir: w.dir + "/state", interval: time.Hour, once: true}
	if err := daemon(context.Background(), o, io.Discard); err != nil {
		t.Error(err)
	}
	if w.read("local/etc/app.conf") != "one\n" {
		t.Error("unmounted")
	}
}

// TestPullAfterRestart: A pull right after a restart brings up a unit that is down.
func TestPullAfterRestart(t *testing.T) {
	w := newWorld(t)
	w.reconcile()
	w.write("fake/svc.service", "failed")
	w.reconcile()
	w.want("BROKEN", "is failed", "one\n", "reload")
	w.restart()
	if w.s.Status().State != "BROKEN" {
		t.Fatal(w.s.Status())
	}
	if err := w.s.operate(context.Background(), op{verb: "pull"}); err != nil {
		t.Error(err)
	}
	w.want("OK", "", "one\n", "reset-failed, start")
}

// BenchmarkIdleRound is a round that finds nothing to do, as a multiple of the one git ls-remote that it can't do without.
func BenchmarkIdleRound(b *testing.B) {
	w := newWorld(b)
	w.spec.action = ""
	w.restart()
	w.reconcile()
	var floor, ours time.Duration
	for b.Loop() {
		start := time.Now()
		w.git(w.dir, "ls-remote", "-q", w.spec.upstream, "refs/heads/main")
		middle := time.Now()
		w.reconcile()
		floor, ours = floor+middle.Sub(start), ours+time.Since(middle)
	}
	b.ReportMetric(float64(ours)/float64(floor), "times-floor")
}

// BenchmarkCommitGoesLive is a commit of two files on its way to the mounts, as a multiple of what an ordinary clone needs for
// git fetch and git reset --hard, which readers can catch half done.
func BenchmarkCommitGoesLive(b *testing.B) {
	w := newWorld(b)
	w.spec.action = ""
	w.restart()
	w.reconcile()
	plain := w.dir + "/plain"
	w.git(w.dir, "clone", "-q", w.spec.upstream, plain)
	var floor, ours time.Duration
	for i := 0; b.Loop(); i++ {
		w.commit("etc/app.conf", fmt.Sprintln(i), "one.conf", fmt.Sprintln(i))
		start := time.Now()
		w.git(plain, "fetch", "-q", "origin", "main")
		w.git(plain, "reset", "-q", "--hard", "FETCH_HEAD")
		middle := time.Now()
		w.reconcile()
		floor, ours = floor+middle.Sub(start), ours+time.Since(middle)
	}
	b.ReportMetric(float64(ours)/float64(floor), "times-floor")
}
