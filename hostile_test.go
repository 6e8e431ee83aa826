//go:build linux

package main

import (
	"bytes"
	"cmp"
	"compress/zlib"
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"net/http/cgi"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// hostileUser is the name under which the test binary is the hostile user's program.
const hostileUser = "hostile-user"

// Limits of the test: how long it goes on (see GITOPPER_TEST_LONG, a duration), and what a pass may take while git is
// stopped again and again.
const (
	hostileTime = 15 * time.Second
	hostilePass = 60 * time.Second
	mark        = "CANARY" // in every file of root's that must not be read
)

// hostileWorld is a world whose service is attacked by its own user, while a quiet one lives beside it.
type hostileWorld struct {
	*world
	quiet   *world
	log     *lockedBuffer // all that we logged
	canary  map[string]string
	ran     string // a file that exists if a planted program ran
	edits   []string
	said    strings.Builder // all infos
	commits int
	first   string // commit
}

// TestHostileUser: a program that runs as the service's user does what it can to root, beside commits, edits, other
// users, taking over, damage, and an administrator's git.
func TestHostileUser(t *testing.T) {
	limit := hostileTime
	if long, err := time.ParseDuration(os.Getenv("GITOPPER_TEST_LONG")); err == nil {
		limit = long
	}
	w := newHostileWorld(t)
	fds := openFiles()
	end := time.Now().Add(limit)
	stop := w.attack()
	stopQuiet, stopEdits := w.keepQuiet(), w.keepEditing()

	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 1))
	for time.Now().Before(end) && !t.Failed() {
		w.turn(r)
		w.pass()
		if lexists(w.ran) {
			t.Fatalf("a planted program ran: %s", w.read("ran/ran"))
		}
	}
	stop()
	stopEdits()
	stopQuiet()
	w.settle()
	w.judge()
	w.judgeWords()
	w.judgeEdits()
	if now := openFiles(); now > fds+10 {
		t.Errorf("%d open files, %d at the start", now, fds)
	}
	t.Logf("%d commits, %d edits", w.commits, len(w.edits))
}

func newHostileWorld(t *testing.T) *hostileWorld {
	quiet := newWorld(t)
	quiet.spec.service = "quiet.service"
	quiet.restart()
	w := &hostileWorld{world: newWorld(t), quiet: quiet, canary: map[string]string{}, log: &lockedBuffer{}}
	setLogger(w.log, slog.LevelDebug)
	t.Cleanup(func() { setLogger(os.Stderr, slog.LevelInfo) })
	w.asNobody()
	w.run("chown", "-R", "root", w.bare)
	w.spec.upstream = w.serve()
	w.ran = w.dir + "/ran/ran"
	for _, dir := range []string{"/drop", "/ran", "/canary", "/canary/sub"} {
		_ = os.Mkdir(w.dir+dir, 0o755)
	}
	_ = os.Chmod(w.dir+"/ran", 0o1777)
	_ = os.Lchown(w.dir+"/drop", 65534, 65534)
	w.write("evil", "#!/bin/sh\nid >> "+w.ran+"\necho \"$0\" \"$@\" >> "+w.ran+"\n")
	_ = os.Chmod(w.dir+"/evil", 0o755)

	_ = os.Mkdir(w.work+"/etc/mod", 0o755)
	w.git(w.work, "update-index", "--add", "--cacheinfo", "160000,"+strings.Repeat("12", 20)+",etc/mod")
	w.first = w.commit("etc/kept.conf", "commit 0\n")
	w.restart()
	_ = os.Chmod(w.dir+"/state", 0o711)
	w.up.patience = 2 * time.Second
	w.reconcile()
	w.want("OK", "", "one\n", "reload")
	quiet.reconcile()

	for i, name := range []string{
		"canary/app.conf", "canary/deep", "canary/sub/deep", "state/canary", "state/services/canary",
		"mount/svc.service/canary", "mount/svc.service/.gitopper/canary", "drop/one", "drop/two", "drop/three", "drop/four",
	} {
		text := fmt.Sprintf("%s-%d\n", mark, i)
		w.write(name, text)
		_ = os.Chmod(filepath.Join(w.dir, name), 0o600)
		w.canary[w.inode(filepath.Join(w.dir, name))] = text
	}
	return w
}

// serve serves the upstream over http: git looks at the owner of a directory.
func (w *hostileWorld) serve() string {
	s := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		backend := &cgi.Handler{Path: "/usr/lib/git-core/git-http-backend", Env: []string{
			"GIT_PROJECT_ROOT=" + w.dir, "GIT_HTTP_EXPORT_ALL=1", "GIT_CONFIG_GLOBAL=/dev/null",
			"GIT_PROTOCOL=" + r.Header.Get("Git-Protocol"),
		}}
		backend.ServeHTTP(rw, r)
	}))
	w.t.Cleanup(s.Close)
	return s.URL + "/up.git"
}

func (w *hostileWorld) inode(name string) string {
	var st syscall.Stat_t
	if err := syscall.Lstat(name, &st); err != nil {
		w.t.Fatal(err)
	}
	return strconv.FormatUint(st.Ino, 10)
}

func openFiles() int {
	names, _ := os.ReadDir("/proc/self/fd")
	return len(names)
}

// attack starts the hostile user's program, until stop is called.
func (w *hostileWorld) attack() (stop func()) {
	exe, err := os.Executable()
	if err == nil {
		err = exec.Command("cp", exe, w.dir+"/"+hostileUser).Run()
	}
	if err != nil {
		w.t.Fatal(err)
	}
	cmd := exec.Command(w.dir+"/"+hostileUser, w.s.files.dir, w.up.objectsDir(), w.dir)
	cmd.Dir, cmd.Env, cmd.Stdout, cmd.Stderr = "/", []string{"PATH=/usr/bin:/bin"}, os.Stderr, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Credential: &syscall.Credential{Uid: 65534, Gid: 65534}, Pdeathsig: syscall.SIGKILL, Setpgid: true,
	}
	if err := cmd.Start(); err != nil {
		w.t.Fatal(err)
	}
	stop = func() {
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
		_ = cmd.Wait()
	}
	w.t.Cleanup(stop)
	return stop
}

// beside does something again and again until stop is called, or the test ends.
func (w *hostileWorld) beside(f func(n int)) (stop func()) {
	done, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		for n := 0; ; n++ {
			select {
			case <-done:
				return
			case <-time.After(time.Duration(rand.IntN(30)) * time.Millisecond):
			}
			f(n)
		}
	}()
	stop = sync.OnceFunc(func() { close(done); <-ended })
	w.t.Cleanup(stop)
	return stop
}

// keepQuiet has the other service live all the while: what it shows and says must not notice.
func (w *hostileWorld) keepQuiet() (stop func()) {
	return w.beside(func(int) {
		start := time.Now()
		w.quiet.reconcile()
		if st := w.quiet.s.Status(); st.State != "OK" || w.quiet.read("local/etc/app.conf") != "one\n" {
			w.t.Errorf("the service beside it: %s %s", st.State, st.Info)
		}
		if took := time.Since(start); took > hostilePass/3 {
			w.t.Errorf("the service beside it was held up for %v", took)
		}
	})
}

// keepEditing has an administrator save numbered edits all the while, each once the last one is live no more: in place,
// through a descriptor that is held for a moment, or by a rename.
func (w *hostileWorld) keepEditing() (stop func()) {
	name := filepath.Join(w.s.files.dir, "etc/kept.conf")
	return w.beside(func(n int) {
		live, err := os.ReadFile(name)
		text := fmt.Sprintf("edit-%06d\n", len(w.edits))
		isOurs := err == nil && strings.HasPrefix(string(live), "commit")
		if isOurs && saveEdit(name, text, n%2 == 0) == nil {
			w.edits = append(w.edits, text)
		}
	})
}

func saveEdit(name, text string, inPlace bool) error {
	if !inPlace {
		return cmp.Or(os.WriteFile(name+".save", []byte(text), 0o644), os.Rename(name+".save", name))
	}
	f, err := os.OpenFile(name, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	time.Sleep(time.Duration(rand.IntN(700)) * time.Millisecond) // while it is exchanged
	_, err = f.WriteAt([]byte(text), 0)
	return err
}

// turn changes something: a commit, the user, what root has to take over, the clone; or an administrator uses git.
func (w *hostileWorld) turn(r *rand.Rand) {
	switch n := r.IntN(16); {
	case n < 7:
		w.commits++
		text := fmt.Sprintf("commit %d\n", w.commits)
		w.commit("etc/app.conf", text, "etc/kept.conf", text, "one.conf", text)
		if deep := "etc/sub/deep"; n < 2 {
			w.commit("etc/sub", "", "etc/sub", text)
		} else if n < 5 {
			w.commit("etc/sub", "", deep, text)
		}
	case n < 9:
		w.spec.user = map[string]string{"nobody": "daemon", "daemon": "nobody"}[w.spec.user]
		w.again()
	case n == 9:
		w.again()
	case n == 10:
		_ = os.Lchown(w.s.files.dir, 65534, 65534) // as the checkouts of old were
		w.again()
	case n == 11:
		_ = os.Rename(w.up.objectsDir(), w.dir+"/drop/objects"+strconv.Itoa(w.commits))
	case n == 12:
		w.look(true)
	default:
		w.administer(r)
	}
}

// again is a restart.
func (w *hostileWorld) again() {
	w.restart()
	w.up.patience = 2 * time.Second
}

// administer runs a git of root's in the checkout. What hangs it (a pipe of the user's) is the administrator's trouble.
func (w *hostileWorld) administer(r *rand.Rand) {
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Second)
	defer cancel()
	words := [][]string{{"status"}, {"log", "-1"}, {"diff"}, {"stash", "push", "--"}, {"restore", "--"}}[r.IntN(5)]
	if len(words) != 1 && words[0] != "log" { // and not the numbered edits
		words = append(words, "etc/app.conf", "etc/sub", "one.conf")
	}
	cmd := exec.CommandContext(ctx, "git", words...)
	cmd.Dir, cmd.Env = w.s.files.dir, []string{"PATH=/usr/bin:/bin", "HOME=/nonexistent", "GIT_CONFIG_GLOBAL=/dev/null",
		"GIT_AUTHOR_NAME=a", "GIT_AUTHOR_EMAIL=a@b", "GIT_COMMITTER_NAME=a", "GIT_COMMITTER_EMAIL=a@b"}
	_ = cmd.Run()
}

func (w *hostileWorld) look(heal bool) {
	w.bounded("a look", func() { _ = w.up.lookNow(context.Background(), heal) })
}

// pass is a look and a pass of the service.
func (w *hostileWorld) pass() {
	w.look(false)
	w.bounded("a pass", func() { w.s.pass(context.Background()) })
	w.said.WriteString(w.s.Status().Info + "\n")
	w.bounded("a diff", func() {
		text, err := w.s.preview(context.Background(), w.first)
		w.said.WriteString(fmt.Sprintln(text, err))
	})
}

// bounded fails if f takes too long.
func (w *hostileWorld) bounded(what string, f func()) {
	done, start := make(chan struct{}), time.Now()
	go func() {
		defer close(done)
		f()
	}()
	select {
	case <-done:
	case <-time.After(hostilePass):
		w.t.Fatalf("%s hangs", what)
	}
	if took := time.Since(start); took > hostilePass/3 {
		w.t.Logf("%s took %v", what, took)
	}
}

// settle has the service find its peace once the user has.
func (w *hostileWorld) settle() {
	w.spec.user = "nobody"
	w.again()
	text := fmt.Sprintf("commit %d\n", w.commits+1)
	w.commit("etc/app.conf", text, "etc/kept.conf", text)
	for range 10 {
		w.look(true)
		w.pass()
		if w.s.Status().State == "OK" {
			w.shows("local/etc/app.conf", text)
			return
		}
	}
	w.t.Errorf("not well after all: %s", w.s.Status().Info)
}

// find returns the lines that find(1) prints of files below the world's directory.
func (w *hostileWorld) find(args ...string) []string {
	out, err := exec.Command("find", append([]string{w.dir, "-xdev", "-type", "f"}, args...)...).Output()
	if err != nil {
		w.t.Log(err)
	}
	return strings.Split(strings.TrimSpace(string(out)), "\n")
}

// judge fails if a file of root's has another owner, mode or content, or was copied.
func (w *hostileWorld) judge() {
	seen := map[string]bool{}
	for _, line := range w.find("-uid", "0", "-perm", "600", "-size", "-2", "-printf", "%i %p\n") {
		inode, name, _ := strings.Cut(line, " ")
		text, ok := w.canary[inode]
		if got, _ := os.ReadFile(name); ok && string(got) == text {
			seen[inode] = true
		}
	}
	for inode, text := range w.canary {
		if !seen[inode] {
			w.t.Errorf("%q is changed: %q", text, w.find("-inum", inode, "-printf", "%U %m %p\n"))
		}
	}
	for _, line := range w.find("-size", "-64k", "-printf", "%i %p\n") {
		inode, name, _ := strings.Cut(line, " ")
		text, _ := os.ReadFile(name)
		if w.canary[inode] == "" && !strings.HasSuffix(name, hostileUser) && bytes.Contains(text, []byte(mark)) {
			w.t.Errorf("%s holds what only root may read", name)
		}
	}
}

// judgeWords fails if what only root may read was said.
func (w *hostileWorld) judgeWords() {
	for what, text := range map[string]string{"the log": w.log.String(), "an info": w.said.String()} {
		if strings.Contains(text, mark) {
			w.t.Errorf("%s holds what only root may read", what)
		}
	}
	if lexists(w.ran) {
		w.t.Errorf("a planted program ran: %s", w.read("ran/ran"))
	}
}

// judgeEdits fails if an edit is neither live nor kept.
func (w *hostileWorld) judgeEdits() {
	all := map[string]bool{}
	for _, name := range w.find("-name", "kept.conf*") {
		text, _ := os.ReadFile(name)
		all[string(text)] = true
	}
	for _, text := range w.edits {
		if !all[text] {
			w.t.Errorf("%q is lost", text)
		}
	}
}

// hostile is the hostile user's program.
type hostile struct {
	dir, objects, home string
	n                  int
	held               *os.File
}

// beHostile runs until it is killed.
func beHostile(args []string) int {
	h := &hostile{dir: args[0], objects: args[1], home: args[2]}
	syscall.Umask(0)
	for {
		h.n++
		switch rand.IntN(10) {
		case 0, 1, 2, 3:
			h.replace()
		case 4:
			h.swap()
		case 5:
			h.scribble()
		case 6:
			h.signal()
		case 7, 8:
			h.forge()
		default:
			h.lease()
		}
		time.Sleep(time.Duration(rand.IntN(3000)) * time.Microsecond)
	}
}

func pick(names ...string) string { return names[rand.IntN(len(names))] }

// drop is a name in a directory of the user's own.
func (h *hostile) drop() string { return fmt.Sprintf("%s/drop/x%d", h.home, h.n) }

// replace puts something else in the place of a file or directory below a link.
func (h *hostile) replace() {
	at := h.dir + "/etc/" + pick("app.conf", "sub", "sub/deep", "new", "sub/new", "sub/.git", ".gitattributes")
	_ = os.Rename(at, h.drop())
	canary := h.home + "/canary"
	switch rand.IntN(14) {
	case 0:
		_ = os.Symlink(canary+pick("", "/sub", "/app.conf", "/deep"), at)
	case 1:
		_ = os.Symlink(pick("/dev/zero", "/etc/shadow", "/", "/proc/self/mem", "."), at)
	case 2:
		_ = syscall.Mkfifo(at, 0o666)
	case 3:
		_ = os.Truncate(h.file(at, "x"), 1<<43)
	case 4:
		h.deep(at, 400)
	case 5:
		_ = syscall.Mknod(at, syscall.S_IFCHR|0o666, 0) // a whiteout needs no right
	case 6:
		_ = syscall.Mknod(at, syscall.S_IFSOCK|0o666, 0)
	case 7:
		_ = os.Rename(h.home+"/drop/"+pick("one", "two", "three", "four"), at)
	case 8:
		_ = os.Link(canary+"/app.conf", at)
	case 9:
		_ = os.Chmod(h.file(at, "#!"+h.home+"/evil\n"), 0o6777)
	case 10:
		h.repository(at)
		h.repository(h.dir + "/etc/mod")
	case 11:
		h.file(at, "* filter=evil diff=evil merge=evil\n")
	case 12:
		_ = os.Mkdir(at, os.FileMode(rand.IntN(0o10000)))
	default:
		h.file(at, "commit 0\n")
	}
}

func (h *hostile) file(name, text string) string {
	_ = os.WriteFile(name, []byte(text), 0o666)
	return name
}

// deep makes directories in each other.
func (h *hostile) deep(at string, n int) {
	_ = os.MkdirAll(at+strings.Repeat("/d", n), 0o777)
}

// repository makes a directory that git takes for a repository whose configuration names programs.
func (h *hostile) repository(at string) {
	git := at + "/.git"
	_ = os.MkdirAll(git+"/objects/info", 0o777)
	_ = os.MkdirAll(git+"/refs/heads", 0o777)
	_ = os.MkdirAll(git+"/hooks", 0o777)
	h.file(git+"/HEAD", "ref: refs/heads/main\n")
	h.file(git+"/refs/heads/main", strings.Repeat("12", 20)+"\n")
	evil := h.home + "/evil"
	h.file(git+"/config", fmt.Sprintf("[core]\n fsmonitor = %s\n pager = %s\n sshCommand = %s\n gitProxy = %s\n"+
		"[filter \"evil\"]\n clean = %s\n smudge = %s\n[diff \"evil\"]\n textconv = %s\n", evil, evil, evil, evil, evil, evil, evil))
	for _, hook := range []string{"post-checkout", "post-index-change", "reference-transaction", "pre-auto-gc"} {
		_ = os.Symlink(evil, git+"/hooks/"+hook)
	}
}

// swap exchanges a directory and a link out of it, again and again.
func (h *hostile) swap() {
	link := h.drop()
	_ = os.Symlink(h.home+"/canary/"+pick("sub", "app.conf", ""), link)
	root := place{-100}
	at := h.dir + "/etc/" + pick("sub", "app.conf", "sub/deep")
	for range 50 {
		_ = renameat2(root, link, root, at, renameExchange)
	}
}

// scribble changes a file that it keeps open, or its mode.
func (h *hostile) scribble() {
	if f, err := os.OpenFile(h.dir+"/"+pick("one.conf", "etc/app.conf"), os.O_WRONLY|syscall.O_NONBLOCK, 0); err == nil {
		_ = f.Truncate(int64(rand.IntN(2) * 9))
		_, _ = f.WriteString("mine\n")
		if h.held != nil {
			_ = h.held.Close()
		}
		h.held = f
	}
	_ = os.Chmod(h.dir+"/etc/app.conf", 0o7777)
}

// lease holds a lease on a live file for a moment, such that who opens it waits.
func (h *hostile) lease() {
	f, err := os.OpenFile(h.dir+"/etc/app.conf", os.O_RDWR|syscall.O_NONBLOCK|syscall.O_NOFOLLOW, 0)
	if err != nil {
		return
	}
	defer f.Close()
	_, _, _ = syscall.Syscall(syscall.SYS_FCNTL, f.Fd(), fSetLease, syscall.F_WRLCK)
	time.Sleep(20 * time.Millisecond)
}

// signal kills our gits, or stops them for a while.
func (h *hostile) signal() {
	all, _ := os.ReadDir("/proc")
	for _, p := range all {
		pid, err := strconv.Atoi(p.Name())
		comm, _ := os.ReadFile("/proc/" + p.Name() + "/comm")
		if err != nil || !bytes.HasPrefix(comm, []byte("git")) || !descends(pid, os.Getppid()) {
			continue
		}
		if rand.IntN(3) == 0 {
			_ = syscall.Kill(pid, syscall.SIGKILL)
			continue
		}
		if syscall.Kill(pid, syscall.SIGSTOP) == nil {
			time.Sleep(time.Duration(rand.IntN(100)) * time.Millisecond)
			_ = syscall.Kill(pid, syscall.SIGCONT)
		}
	}
}

// descends says whether ancestor started the process, or what started it: git runs gits. Other tests that run on
// this machine have gits of the same user's.
func descends(pid, ancestor int) bool {
	for range 5 {
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil {
			return false
		}
		// pid (comm) state ppid, see proc_pid_stat(5)
		if _, err := fmt.Sscanf(string(stat[bytes.LastIndexByte(stat, ')')+1:]), " %c %d", new(rune), &pid); err != nil {
			return false
		}
		if pid == ancestor {
			return true
		}
	}
	return false
}

// forge changes the clone: objects of others under their ids, packs that are gone or cut short, what git reads beside them.
func (h *hostile) forge() {
	names, _ := filepath.Glob(h.objects + "/*/*")
	if len(names) == 0 {
		return
	}
	a, b := pick(names...), pick(names...)
	switch rand.IntN(12) {
	case 0:
		_ = os.Rename(a, h.drop())
	case 1:
		data, _ := os.ReadFile(a)
		_ = os.Chmod(b, 0o666)
		h.file(b, string(data))
	case 2:
		_ = os.Chmod(a, 0o666)
		_ = os.Truncate(a, int64(rand.IntN(100)))
	case 3:
		h.file(h.objects+"/pack/tmp_"+strconv.Itoa(h.n), "x")
	case 4:
		_ = syscall.Mkfifo(h.objects+"/pack/pack-"+strings.Repeat("ab", 20)+pick(".idx", ".pack", ".keep"), 0o666)
	case 5:
		_ = os.MkdirAll(h.objects+"/info", 0o777)
		h.file(h.objects+"/info/alternates", pick(h.home+"/canary", h.dir+"/.git/objects", "/")+"\n")
	case 6:
		_ = os.Rename(h.objects+"/info", h.drop())
	case 7:
		h.deep(h.objects+"/"+pick("17", "pack/tmp_d", "info/d"), 300)
	case 8:
		_ = os.Symlink(h.home+"/canary", h.objects+"/"+pick("17", "info", "pack"))
	case 9:
		h.loose(strings.Repeat("0", 38), "tree 4\x00evil")
	default:
		h.tree()
	}
}

// tree puts a tree with a submodule and a way out of it, and a commit of it, in the place of loose objects.
func (h *hostile) tree() {
	loose, _ := filepath.Glob(h.objects + "/[0-9a-f][0-9a-f]/*")
	if len(loose) == 0 {
		return
	}
	body := "160000 sub\x00" + strings.Repeat("A", 20) + "100644 ../evil\x00" + strings.Repeat("B", 20)
	name := pick(loose...)
	_ = os.Remove(name)
	h.loose(name, fmt.Sprintf("tree %d\x00%s", len(body), body))
}

func (h *hostile) loose(name, text string) {
	var b bytes.Buffer
	z := zlib.NewWriter(&b)
	_, _ = z.Write([]byte(text))
	_ = z.Close()
	h.file(name, b.String())
}
