//go:build linux

package main

import (
	"cmp"
	"context"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// world is an upstream, a host directory, and one service between them.
type world struct {
	t    testing.TB
	dir  string // everything lies below
	bare string // the upstream's repository
	work string // where commits are made
	fake string // the systemd that isn't one
	spec spec
	stop stopping
	up   *upstream
	s    *Service
}

// newWorld makes an upstream with a first commit and a service whose links etc (a directory) and one.conf (a
// file) are mounted at local/etc and local/one.conf.
func newWorld(t testing.TB) *world {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	tmp, ctx := t.TempDir(), context.Background()
	w := &world{
		t: t, dir: tmp, bare: tmp + "/up.git", work: tmp + "/work", fake: tmp + "/fake", stop: stopping{ctx, ctx},
		spec: spec{
			upstream: "file://" + tmp + "/up.git", branch: "main", mount: tmp + "/mount", machine: "m",
			service: "svc.service", action: "reload", fallback: true,
			dirs: []dir{
				{local: tmp + "/local/etc", link: "etc"},
				{local: tmp + "/local/one.conf", link: "one.conf", kind: aFile},
			},
		},
	}
	t.Cleanup(w.unmountAll)
	w.installFakes()

	w.makeUpstream()
	w.commit("etc/app.conf", "one\n", "etc/sub/deep", "deep\n", "one.conf", "single\n", "other/file", "x\n")
	w.restart()
	return w
}

// okWorld is a new world whose service is OK on its first commit.
func okWorld(t testing.TB) *world {
	t.Helper()
	w := newWorld(t)
	w.reconcile()
	w.want("OK", "", "one\n", "reload")
	return w
}

// makeUpstream makes the upstream's repository, and one to commit in, with the same objects: so a push is but
// a ref that is written.
func (w *world) makeUpstream(options ...string) {
	w.t.Helper()
	initial := append([]string{"init", "-q", "--template=", "-b", "main"}, options...)
	w.git(w.dir, append(initial, "--bare", w.bare)...)
	w.git(w.dir, append(initial, w.work)...)
	w.addTo("up.git/config", "[uploadpack]\nallowFilter = true\nallowAnySHA1InWant = true\n")
	w.addTo("work/.git/config", "[gc]\nauto = 0\n[maintenance]\nauto = false\n"+
		"[remote \"origin\"]\nurl = "+w.bare+"\nfetch = +refs/heads/*:refs/remotes/origin/*\n")

	objects := w.work + "/.git/objects"
	err := os.RemoveAll(objects)
	if err := cmp.Or(err, os.Symlink(w.bare+"/objects", objects)); err != nil {
		w.t.Fatal(err)
	}
}

// installFakes puts the systemd that isn't one on the path.
func (w *world) installFakes() {
	w.t.Helper()
	for _, d := range []string{w.fake, w.dir + "/bin"} {
		if err := os.Mkdir(d, 0o755); err != nil {
			w.t.Fatal(err)
		}
	}
	linkFakes(w.t, w.dir+"/bin", "systemctl", "journalctl")
	w.t.Setenv("PATH", w.dir+"/bin:"+os.Getenv("PATH"))
	w.t.Setenv("FAKE", w.fake)
	w.t.Setenv("GIT_CONFIG_GLOBAL", "/dev/null")
}

func (w *world) unmountAll() {
	mounts, _ := readMountinfo()
	for _, m := range slices.Backward(mounts) {
		if strings.HasPrefix(m.point, w.dir+"/") {
			syscall.Unmount(m.point, syscall.MNT_DETACH)
		}
	}
}

// restart gives the upstream and the service a new life, as a new process would.
func (w *world) restart() {
	w.t.Helper()
	w.up = newUpstream(w.dir+"/state", w.spec.upstream, w.spec.user)
	w.s = newService(w.spec, w.dir+"/state", w.up, time.Hour, w.stop)
}

// boot is a restart that mounts what is there first, as a start does.
func (w *world) boot() {
	w.t.Helper()
	w.restart()
	mountFirst(context.Background(), []*Service{w.s})
}

// reconcile looks at upstream and has one pass done.
func (w *world) reconcile() {
	w.t.Helper()
	_ = w.up.lookNow(context.Background(), false)
	w.s.pass(context.Background())
}

// live restarts the service and has its loop run until the test ends, or end is called.
func (w *world) live() (end func()) {
	w.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	w.stop = stopping{ctx, context.Background()}
	w.restart()
	s := w.s
	go s.run()
	end = func() { cancel(); <-s.ended }
	w.t.Cleanup(end)
	return end
}

// killAt has a pass done that dies at the nth step of that name, and gives the service a new life.
func (w *world) killAt(step string, n int) {
	w.t.Helper()
	_ = w.up.lookNow(context.Background(), false)
	died, s := false, w.s
	s.step = func(name string) {
		if strings.HasPrefix(name, step) {
			n--
		}
		if n == 0 {
			died = true
			runtime.Goexit()
		}
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		s.pass(context.Background())
	}()
	<-ended
	if !died {
		w.t.Fatalf("no step %q: %+v", step, *s.Status())
	}
	w.restart()
}

// op has an operation of an operator's carried out.
func (w *world) op(verb, hash string) error {
	return w.s.operate(context.Background(), op{verb: verb, hash: hash, who: "me"})
}

func (w *world) git(dir string, args ...string) string {
	w.t.Helper()
	cmd := exec.Command("git", args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "GIT_AUTHOR_NAME=a", "GIT_AUTHOR_EMAIL=a@b",
		"GIT_COMMITTER_NAME=a", "GIT_COMMITTER_EMAIL=a@b")
	out, err := cmd.CombinedOutput()
	if err != nil {
		w.t.Fatalf("git %v: %v: %s", args, err, out)
	}
	return strings.TrimSpace(string(out))
}

// fastImport makes commits in a bare repository. See git-fast-import(1).
func fastImport(t testing.TB, repository, commits string) {
	t.Helper()
	cmd := exec.Command("git", "fast-import", "--quiet")
	cmd.Dir, cmd.Stdin = repository, strings.NewReader(commits)
	// Else glibc gives memory back and gets it anew for each file, which takes ten times as long as all else.
	cmd.Env = append(os.Environ(), "MALLOC_TRIM_THRESHOLD_=1000000000")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("git fast-import: %v: %s", err, out)
	}
}

// commit makes a commit of name, content pairs (content "" removes), pushes it, and returns its hash.
func (w *world) commit(pairs ...string) string {
	w.t.Helper()
	for i := 0; i+1 < len(pairs); i += 2 {
		if pairs[i+1] != "" {
			w.write("work/"+pairs[i], pairs[i+1])
		} else if err := os.RemoveAll(filepath.Join(w.work, pairs[i])); err != nil {
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
	hash := w.head()
	if !isHash(hash) {
		w.t.Fatal(hash)
	}
	w.write("up.git/refs/heads/main.lock", hash+"\n")
	if err := os.Rename(w.bare+"/refs/heads/main.lock", w.bare+"/refs/heads/main"); err != nil {
		w.t.Fatal(err)
	}
	return hash
}

// head is the commit that the work directory is at.
func (w *world) head() string {
	ref := strings.TrimPrefix(w.read("work/.git/HEAD"), "ref: ")
	return strings.TrimSpace(w.read("work/.git/" + strings.TrimSpace(ref)))
}

// back takes the work directory back to an older commit; the next push is forced.
func (w *world) back(to string) { w.git(w.work, "reset", "-q", "--hard", to) }

// upstreamGoes and upstreamComes take the upstream's repository away and bring it back.
func (w *world) upstreamGoes() {
	w.t.Helper()
	if err := os.Rename(w.bare, w.bare+".away"); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) upstreamComes() {
	w.t.Helper()
	if err := os.Rename(w.bare+".away", w.bare); err != nil {
		w.t.Fatal(err)
	}
}

// recordsGo and recordsCome make it impossible to write records and manifests, and possible again.
func (w *world) recordsGo() {
	w.t.Helper()
	if err := os.Rename(w.dir+"/state/services", w.dir+"/state/services.away"); err != nil {
		w.t.Fatal(err)
	}
	w.write("state/services", "in the way")
}

func (w *world) recordsCome() {
	w.t.Helper()
	err := os.Remove(w.dir + "/state/services")
	if err = cmp.Or(err, os.Rename(w.dir+"/state/services.away", w.dir+"/state/services")); err != nil {
		w.t.Fatal(err)
	}
}

// calls returns and forgets what was asked of systemd.
func (w *world) calls() string {
	data, _ := os.ReadFile(w.fake + "/calls")
	os.Remove(w.fake + "/calls")
	text := strings.ReplaceAll(strings.TrimSpace(string(data)), " "+w.spec.service, "")
	return strings.ReplaceAll(text, "\n", ", ")
}

func (w *world) write(name, text string) {
	w.t.Helper()
	file := filepath.Join(w.dir, name)
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		w.t.Fatal(err)
	}
	if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
		w.t.Fatal(err)
	}
}

// addTo adds text to a file.
func (w *world) addTo(name, text string) { w.write(name, w.read(name)+text) }

func (w *world) read(name string) string {
	data, err := os.ReadFile(filepath.Join(w.dir, name))
	if err != nil {
		return "error: " + err.Error()
	}
	return string(data)
}

// shows fails if a file does not hold text.
func (w *world) shows(name, text string) {
	w.t.Helper()
	if got := w.read(name); got != text {
		w.t.Errorf("%s: %.100q, want %.100q", name, got, text)
	}
}

// want compares the service's state and info, what the locals show, and what systemd was asked for.
func (w *world) want(state, info, app, calls string) {
	w.t.Helper()
	st := w.s.Status()
	wrongInfo := !strings.Contains(st.Info, info) || info == "" && st.Info != ""
	if st.State != state || wrongInfo {
		w.t.Errorf("state %s %q, want %s %q", st.State, st.Info, state, info)
	}
	w.shows("local/etc/app.conf", app)
	if got := w.calls(); got != calls {
		w.t.Errorf("systemctl %q, want %q", got, calls)
	}
	for _, d := range w.spec.dirs {
		if d.local != "" && state == "OK" && !shows(w.s.files.dir, d.link, d.local) {
			w.t.Errorf("%s does not show %s", d.local, d.link)
		}
	}
}

// runs fails if another commit is said to run.
func (w *world) runs(commit string) {
	w.t.Helper()
	if got := w.s.Status().Commit; got != commit {
		w.t.Errorf("runs %.8s, want %.8s", got, commit)
	}
}

// clean fails if git finds anything to complain about in the checkout.
func (w *world) clean() {
	w.t.Helper()
	if out := w.git(w.s.files.dir, "status", "--porcelain"); out != "" {
		w.t.Errorf("git status: %s", out)
	}
}

// kept fails if the texts are not all the edits of a path that were kept, in the order of their times.
func (w *world) kept(path string, texts ...string) {
	w.t.Helper()
	var got []string
	dirs, _ := os.ReadDir(filepath.Join(w.s.files.dir, editsDir))
	for _, d := range dirs {
		text, err := os.ReadFile(filepath.Join(w.s.files.dir, editsDir, d.Name(), path))
		if err == nil {
			got = append(got, string(text))
		}
	}
	if !slices.Equal(got, texts) {
		w.t.Errorf("kept of %s: %.100q, want %.100q", path, got, texts)
	}
}

// mounts returns what is mounted below local, in order, hidden ones too.
func (w *world) mounts() (points []string) {
	w.t.Helper()
	all, err := readMountinfo()
	if err != nil {
		w.t.Fatal(err)
	}
	for _, m := range all {
		if p, ok := strings.CutPrefix(m.point, w.dir+"/local/"); ok {
			points = append(points, p)
		}
	}
	return points
}

// gitRuns counts the git processes that we started, of whatever test.
func gitRuns() float64 {
	return counted("gitopper_machine_git_ops_total", "")
}

// counted is what a counter stands at.
func counted(name, labels string) float64 {
	for _, s := range count.samples(name) {
		if s.labels == labels {
			return s.value
		}
	}
	return 0
}

// wantRuns fails if f makes us start another number of git processes.
func (w *world) wantRuns(n float64, f func()) {
	w.t.Helper()
	before := gitRuns()
	f()
	if got := gitRuns() - before; got != n {
		w.t.Errorf("git ran %v times, want %v", got, n)
	}
}

// eventually waits for a condition, with a deadline.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("timeout: %s", what)
		}
	}
}

// run runs a program of the test's.
func (w *world) run(name string, args ...string) {
	w.t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		w.t.Fatalf("%s %v: %v: %s", name, args, err, out)
	}
}

// asNobody makes the user nobody own the upstream and the service's files, and reach them.
func (w *world) asNobody() {
	w.t.Helper()
	for p := w.dir; p != "/"; p = filepath.Dir(p) {
		if fi, err := os.Stat(p); err == nil && fi.Mode()&0o005 != 0o005 {
			os.Chmod(p, fi.Mode()|0o005)
		}
	}
	w.run("chown", "-R", "nobody", w.bare)
	w.spec.user = "nobody"
}

// signed gives the service signers, and returns a function that pushes a signed or an unsigned commit.
func (w *world) signed() func(sign bool, pairs ...string) string {
	w.t.Helper()
	w.run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", w.dir+"/k")
	w.write("signers", "good@x "+w.read("k.pub"))
	w.spec.signers = w.dir + "/signers"
	w.restart()
	return func(sign bool, pairs ...string) string {
		for i := 0; i+1 < len(pairs); i += 2 {
			w.write("work/"+pairs[i], pairs[i+1])
		}
		w.git(w.work, "add", "-A")
		args := []string{"-c", "gpg.format=ssh", "-c", "user.signingkey=" + w.dir + "/k"}
		args = append(args, "commit", "-q", "-m", "c")
		if sign {
			args = append(args, "-S")
		}
		w.git(w.work, args...)
		w.git(w.work, "push", "-q", "-f", "origin", "HEAD:main")
		return w.head()
	}
}

// editRecord changes the record on disk, as a crash or another clock would have left it.
func (w *world) editRecord(f func(r *record)) {
	w.t.Helper()
	file := recordFile(w.dir+"/state", w.spec.service)
	r, _, err := readRecord(file)
	if err != nil {
		w.t.Fatal(err)
	}
	f(&r)
	data, err := json.Marshal(&r)
	if err = cmp.Or(err, os.WriteFile(file, data, 0o600)); err != nil {
		w.t.Fatal(err)
	}
}
