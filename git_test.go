//go:build linux

package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/cgi"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// gitWorld is a repository with one branch, and an upstream of it as one service sees it.
type gitWorld struct {
	t         *testing.T
	dir, work string
	u         *upstream
	etc       []dir
	nudged    int
}

func newGitWorld(t *testing.T, init ...string) *gitWorld {
	w := &gitWorld{t: t, dir: t.TempDir(), etc: []dir{{link: "etc"}}}
	w.work = w.dir + "/src"
	for p := w.work; p != "/"; p = filepath.Dir(p) { // so that nobody can come here
		_ = os.Mkdir(p, 0o755)
		if fi, err := os.Stat(p); err == nil && fi.Mode()&0o005 != 0o005 {
			_ = os.Chmod(p, fi.Mode()|0o005)
		}
	}
	w.git(append([]string{"init", "-q", "-b", "main"}, init...)...)
	w.git("config", "uploadpack.allowFilter", "true")
	w.commit("etc/app.conf", "one\n", "etc/sub/run", "#!\n", "other/x", "x\n")
	w.upstream("file://"+w.work, "")
	return w
}

// upstream makes a new upstream of url, as after a start.
func (w *gitWorld) upstream(url, user string) {
	w.u = newUpstream(w.dir+"/state", url, user)
	w.u.track("main", w.etc, func() { w.nudged++ })
}

func (w *gitWorld) git(args ...string) string {
	w.t.Helper()
	return w.pipe("", args...)
}

func (w *gitWorld) pipe(stdin string, args ...string) string {
	w.t.Helper()
	cmd := exec.Command("/usr/bin/git", args...)
	cmd.Dir, cmd.Stdin = w.work, strings.NewReader(stdin)
	cmd.Env = append(os.Environ(), "GIT_CONFIG_COUNT=1", "GIT_CONFIG_KEY_0=safe.directory", "GIT_CONFIG_VALUE_0=*", "GIT_CONFIG_GLOBAL=/dev/null", "GIT_AUTHOR_NAME=a", "GIT_AUTHOR_EMAIL=a@x",
		"GIT_COMMITTER_NAME=a", "GIT_COMMITTER_EMAIL=a@x")
	out, err := cmd.CombinedOutput()
	if err != nil {
		w.t.Fatalf("git %q: %v: %s", args, err, out)
	}
	return strings.TrimSpace(string(out))
}

// commit writes files, name and text in turn, and commits them.
func (w *gitWorld) commit(files ...string) string {
	w.t.Helper()
	for i := 0; i < len(files); i += 2 {
		name := w.work + "/" + files[i]
		err := errors.Join(os.MkdirAll(filepath.Dir(name), 0o755), os.WriteFile(name, []byte(files[i+1]), 0o644))
		if err != nil {
			w.t.Fatal(err)
		}
	}
	w.git("add", "-A")
	w.git("commit", "-q", "-m", "c")
	return w.git("rev-parse", "HEAD")
}

func (w *gitWorld) look() {
	w.t.Helper()
	if err := w.u.lookNow(w.t.Context(), false); err != nil {
		w.t.Fatal(err)
	}
}

// read returns the text of a path in the branch's tip, as a service would get it.
func (w *gitWorld) read(path string) string {
	w.t.Helper()
	t, err := w.u.tree(w.t.Context(), w.u.looked("main").tip, w.etc)
	if err != nil {
		w.t.Fatal(err)
	}
	text, err := w.blob(t[path].id)
	if err != nil {
		w.t.Fatal(err)
	}
	return text
}

func (w *gitWorld) blob(id string) (string, error) {
	o, err := w.u.open(w.t.Context())
	if err != nil {
		return "", err
	}
	defer o.close()
	var b bytes.Buffer
	_, err = o.blob(id, &b)
	return b.String(), err
}

// counting puts a git before the real one that notes each run, and does first what more says. The result tells the runs since
// it was last called.
func (w *gitWorld) counting(more string) func() []string {
	bin, log := w.t.TempDir(), w.dir+"/runs"
	script := "#!/bin/sh\necho \"$*\" >>" + log + "\n" + more + "\nexec /usr/bin/git \"$@\"\n"
	if err := os.WriteFile(bin+"/git", []byte(script), 0o755); err != nil {
		w.t.Fatal(err)
	}
	w.t.Setenv("PATH", bin+":"+os.Getenv("PATH"))
	return func() []string {
		data, _ := os.ReadFile(log)
		_ = os.Remove(log)
		var runs []string
		for line := range strings.Lines(string(data)) {
			_, verb, _ := strings.Cut(line, "http.lowSpeedTime=20 ")
			runs = append(runs, strings.TrimSpace(verb))
		}
		return runs
	}
}

// backend serves the directory that work lies in by git's own http backend; see judges each request first.
func (w *gitWorld) backend(see func(http.ResponseWriter, *http.Request) bool) http.Handler {
	w.git("config", "http.receivepack", "false")
	backend := &cgi.Handler{
		Path: "/usr/lib/git-core/git-http-backend",
		Env:  []string{"GIT_PROJECT_ROOT=" + w.dir, "GIT_HTTP_EXPORT_ALL=1", "GIT_CONFIG_GLOBAL=/dev/null"},
	}
	return http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		if see(rw, r) {
			backend.Env = append(backend.Env[:3:3], "GIT_PROTOCOL="+r.Header.Get("Git-Protocol"))
			backend.ServeHTTP(rw, r)
		}
	})
}

func (w *gitWorld) serve(see func(http.ResponseWriter, *http.Request) bool) *httptest.Server {
	s := httptest.NewServer(w.backend(see))
	w.t.Cleanup(s.Close)
	return s
}

func TestGitProcesses(t *testing.T) {
	w := newGitWorld(t)
	runs := w.counting("")
	w.commit("etc/big", strings.Repeat("x", 200_000))
	count := func(what string, want int) {
		t.Helper()
		w.look()
		// The cat-file of a moment ago may still be there.
		if r := runs(); len(r) > want || len(r) < want-1 {
			t.Errorf("%s: %d git, want %d: %q", what, len(r), want, r)
		}
	}
	count("first", 5) // ls-remote twice, fetch, walk, fetch
	if w.nudged != 1 {
		t.Errorf("nudged %d times", w.nudged)
	}
	if got := w.read("etc/app.conf"); got != "one\n" {
		t.Errorf("app.conf: %q", got)
	}
	runs()

	before := w.state()
	count("idle", 1)
	if after := w.state(); after != before {
		t.Errorf("an idle look wrote: %s\n%s", before, after)
	}
	content, _ := w.u.content(t.Context(), w.u.looked("main").tip, w.etc)
	w.commit("other/x", "y\n")
	count("nobody's", 3)
	if c, err := w.u.content(t.Context(), w.u.looked("main").tip, w.etc); c != content || err != nil {
		t.Errorf("content %s became %s, %v", content, c, err)
	}
	if w.commit("etc/app.conf", "two\n"); true {
		count("ours", 4)
	}
	got := w.read("etc/app.conf")
	if r := runs(); got != "two\n" || len(r) > 1 {
		t.Errorf("%q by %q", got, r)
	}
	w.upstream("file://"+w.work, "")
	if l := w.u.looked("main"); l.tip == "" {
		t.Error("the tip is forgotten at a restart")
	}
	count("restart", 3)
}

// state lists all below the state directory with times and sizes.
func (w *gitWorld) state() string {
	out, err := exec.Command("find", w.dir+"/state", "-printf", "%p %s %T@ %C@\n").CombinedOutput()
	if err != nil {
		w.t.Fatal(string(out))
	}
	return string(out)
}

func TestGitHundredServices(t *testing.T) {
	w := newGitWorld(t)
	var files []string
	for i := range 100 {
		link := fmt.Sprintf("svc%d", i)
		files = append(files, link+"/conf", link)
		w.u.track("main", []dir{{link: link}}, func() {})
	}
	w.commit(files...)
	runs := w.counting("")
	w.look()
	runs()
	w.commit("svc7/conf", "new")
	w.look()
	if r := runs(); len(r) > 4 {
		t.Errorf("%d git: %q", len(r), r)
	}
	tree, err := w.u.tree(t.Context(), w.u.looked("main").tip, []dir{{link: "svc7"}})
	if text, err2 := w.blob(tree["svc7/conf"].id); text != "new" || errors.Join(err, err2) != nil {
		t.Errorf("%q, %v, %v", text, err, err2)
	}
}

func TestGitBranches(t *testing.T) {
	w := newGitWorld(t)
	w.u.track("prod", w.etc, func() {})
	w.u.track("prod/eu", w.etc, func() {})
	w.git("branch", "prod")
	wrong := func(branch string) string {
		_ = w.u.lookNow(t.Context(), false)
		return fmt.Sprint(w.u.looked(branch).err)
	}
	if e := wrong("prod/eu"); e != `upstream has no branch "prod/eu"` || w.u.looked("prod").err != nil {
		t.Errorf("%s, %+v", e, w.u.looked("prod"))
	}
	tip := w.u.looked("prod").tip
	w.git("branch", "-m", "prod", "prod/eu")
	if e := wrong("prod/eu"); e != "<nil>" || w.u.looked("prod/eu").tip != tip {
		t.Errorf("%s, %+v", e, w.u.looked("prod/eu"))
	}
	if l := w.u.looked("prod"); l.err == nil || l.tip != tip || l.misses != 1 {
		t.Errorf("a deleted branch: %+v", l)
	}
	// A forced push.
	w.git("commit", "-q", "--amend", "-m", "other", "--date", "2001-01-01")
	wrong("main")
	if w.u.looked("main").tip != w.git("rev-parse", "HEAD") {
		t.Error("a forced push was not followed")
	}
	w.git("update-ref", "-d", "refs/heads/main")
	w.git("branch", "-D", "prod/eu")
	if e := wrong("main"); e != `upstream has no branch "main"` || w.u.looked("main").tip == "" {
		t.Errorf("%s, %+v", e, w.u.looked("main"))
	}
}

func TestGitSHA256(t *testing.T) {
	w := newGitWorld(t, "--object-format=sha256")
	w.look()
	if got := w.read("etc/app.conf"); got != "one\n" || len(w.u.looked("main").tip) != 64 {
		t.Errorf("%q", got)
	}
	w.commit("etc/app.conf", "two\n")
	w.look()
	if got := w.read("etc/app.conf"); got != "two\n" {
		t.Errorf("%q", got)
	}
}

func TestGitUser(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	w := newGitWorld(t)
	if out, err := exec.Command("chown", "-R", "nobody", w.work).CombinedOutput(); err != nil {
		t.Fatal(string(out))
	}
	w.upstream("file://"+w.work, "nobody")
	w.look()
	if got := w.read("etc/app.conf"); got != "one\n" {
		t.Errorf("%q", got)
	}
	var mine []string
	err := filepath.WalkDir(w.u.dir, func(p string, d os.DirEntry, err error) error {
		if err != nil || p == w.u.objectsDir() {
			return filepath.SkipDir
		}
		if fi, _ := d.Info(); fi.Mode().Perm()&0o022 != 0 {
			mine = append(mine, p)
		}
		return nil
	})
	if err != nil || mine != nil {
		t.Errorf("others can write %q, %v", mine, err)
	}
	w.upstream("file://"+w.work, "nosuchuser")
	if err := w.u.lookNow(t.Context(), false); err == nil || !strings.Contains(err.Error(), `user "nosuchuser" does not exist`) {
		t.Error(err)
	}
}

// TestGitPassword: an upstream with a password works, and the password is in no argument list, file or error.
func TestGitPassword(t *testing.T) {
	w := newGitWorld(t)
	var lists atomic.Value
	s := w.serve(func(rw http.ResponseWriter, r *http.Request) bool {
		names, _ := filepath.Glob("/proc/[0-9]*/cmdline")
		for _, name := range names {
			if data, _ := os.ReadFile(name); bytes.Contains(data, []byte("remote-http")) {
				lists.Store(string(data))
			}
			if data, _ := os.ReadFile(name); bytes.Contains(data, []byte("s3")) && bytes.Contains(data, []byte("cr3t")) {
				t.Errorf("in an argument list: %q", data)
			}
		}
		user, password, _ := r.BasicAuth()
		if user != "me" || password != "s3'!cr3t" {
			rw.Header().Set("WWW-Authenticate", "Basic realm=x")
			rw.WriteHeader(401)
			return false
		}
		return true
	})
	host := strings.TrimPrefix(s.URL, "http://")
	w.upstream("http://me:s3%27!cr3t@"+host+"/src/.git", "")
	w.look()
	if got := w.read("etc/app.conf"); got != "one\n" || lists.Load() == nil {
		t.Errorf("%q, %v", got, lists.Load())
	}
	if out, _ := exec.Command("grep", "-rE", "cr3t|"+host, w.u.dir).Output(); len(out) > 0 {
		t.Errorf("in a file: %s", out)
	}
	w.upstream("http://me:wr0ng@"+host+"/src/.git", "")
	if err := w.u.lookNow(t.Context(), false); err == nil || strings.Contains(err.Error(), "wr0ng") {
		t.Errorf("a wrong password: %v", err)
	}
	err := w.u.lookNow(t.Context(), false)
	if l := w.u.looked("main"); l.misses != 2 || err == nil {
		t.Errorf("%+v, %v", l, err)
	}
}

// TestGitServers: servers that can do less work, by a complete clone where that is needed, and with few programs also with a
// git that knows no GIT_NO_LAZY_FETCH.
func TestGitServers(t *testing.T) {
	for _, tc := range []struct {
		name, more string
		filtered   bool
	}{
		{"dumb", "", false},
		{"dumb", "unset GIT_NO_LAZY_FETCH", false},
		{"no filter", "", false},
		{"protocol 0", "", false},
		{"protocol 0, any object", "", true},
		{"refuses", "upload-pack: not our ref 1", true},
		{"refuses", "want 1 not valid", true},
	} {
		t.Run(tc.name+tc.more, func(t *testing.T) {
			w := newGitWorld(t)
			w.git("update-server-info")
			s := httptest.NewServer(http.FileServer(http.Dir(w.dir)))
			defer s.Close()
			if tc.name != "dumb" {
				s = w.serve(func(rw http.ResponseWriter, r *http.Request) bool {
					if strings.HasPrefix(tc.name, "protocol 0") {
						r.Header.Del("Git-Protocol")
					}
					return true
				})
			}
			w.git("config", "uploadpack.allowFilter", strconv.FormatBool(tc.name != "no filter"))
			w.git("config", "uploadpack.allowAnySHA1InWant", strconv.FormatBool(tc.name == "protocol 0, any object"))
			w.upstream(s.URL+"/src/.git", "")
			traces := t.TempDir()
			more := tc.more + "\nexport GIT_TRACE2_EVENT=" + traces
			if tc.name == "refuses" {
				more = "export GIT_TRACE2_EVENT=" + traces +
					`; case "$*" in *"fetch -q"*--stdin*) echo "fatal: remote error: ` + tc.more + `" >&2; exit 128;; esac`
			}
			runs := w.counting(more)
			w.look()
			if w.u.clone.filtered() && tc.name != "refuses" != tc.filtered {
				t.Errorf("filtered: %v", w.u.clone.filtered())
			}
			if got := w.read("etc/app.conf"); got != "one\n" {
				t.Errorf("%q", got)
			}
			w.commit("etc/app.conf", "two\n")
			w.git("update-server-info")
			w.look()
			if got := w.read("etc/app.conf"); got != "two\n" {
				t.Errorf("%q", got)
			}
			if all, _ := os.ReadDir(traces); len(all) == 0 || len(all) > 60 {
				t.Errorf("%d programs for %d of ours: %q", len(all), len(runs()), runs())
			}
		})
	}
}

// countedAnswer counts the bytes that a server answers.
type countedAnswer struct {
	http.ResponseWriter
	bytes *atomic.Int64
}

func (c countedAnswer) Write(b []byte) (int, error) {
	c.bytes.Add(int64(len(b)))
	return c.ResponseWriter.Write(b)
}

// TestGitManyRefs: what a look costs does not grow with upstream's tags and pull requests.
func TestGitManyRefs(t *testing.T) {
	w := newGitWorld(t)
	var sent atomic.Int64
	backend := w.backend(func(http.ResponseWriter, *http.Request) bool { return true })
	s := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		backend.ServeHTTP(countedAnswer{rw, &sent}, r)
	}))
	defer s.Close()
	w.upstream(s.URL+"/src/.git", "")
	w.look()
	look := func() int64 {
		sent.Store(0)
		w.look()
		return sent.Load()
	}

	before := look()
	var refs strings.Builder
	for i := range 500 {
		fmt.Fprintf(&refs, "create refs/pull/%d/head HEAD\ncreate refs/tags/v%[1]d HEAD\n", i)
	}
	w.pipe(refs.String(), "update-ref", "--stdin")
	if after := look(); before == 0 || after != before {
		t.Errorf("a look took %d bytes, and takes %d now", before, after)
	}
	if w.commit("etc/app.conf", "two\n"); true {
		w.look()
	}
	if got := w.read("etc/app.conf"); got != "two\n" {
		t.Errorf("%q", got)
	}
}

// TestGitMovesMeanwhile: the branch is pushed by force between the look and the fetch, to a server that hands
// out tips alone, and to one that has the old commit still.
func TestGitMovesMeanwhile(t *testing.T) {
	for _, protocol := range []string{"0", "2"} {
		w := newGitWorld(t)
		lists := -1000
		s := w.serve(func(_ http.ResponseWriter, r *http.Request) bool {
			if protocol == "0" {
				r.Header.Del("Git-Protocol")
			}
			if strings.HasSuffix(r.URL.Path, "/info/refs") {
				lists++
			}
			if lists == 2 {
				w.git("commit", "-q", "--amend", "-m", "other")
			}
			return true
		})
		w.upstream(s.URL+"/src/.git", "")
		w.look()

		lists = 0
		w.commit("etc/app.conf", "two\n")
		w.look()
		if lists < 2 {
			t.Fatalf("protocol %s: %d lists", protocol, lists)
		}
		w.look()
		if got, tip := w.read("etc/app.conf"), w.u.looked("main").tip; got != "two\n" || tip != w.git("rev-parse", "main") {
			t.Errorf("protocol %s: %q of %s", protocol, got, tip)
		}
	}
}

func TestGitShallowUpstream(t *testing.T) {
	for _, tc := range []struct{ user, filters string }{{"", "true"}, {"", "false"}, {"nobody", "true"}} {
		w := newGitWorld(t)
		w.commit("etc/app.conf", "two\n")
		w.git("clone", "-q", "--bare", "--depth", "1", "file://"+w.work, w.dir+"/shallow.git")
		w.git("-C", w.dir+"/shallow.git", "branch", "canary")
		w.git("-C", w.dir+"/shallow.git", "config", "uploadpack.allowFilter", tc.filters)
		if tc.user != "" {
			_ = exec.Command("chown", "-R", tc.user, w.dir+"/shallow.git").Run()
		}
		w.upstream("file://"+w.dir+"/shallow.git", tc.user)
		w.u.track("canary", w.etc, func() {})
		err := w.u.lookNow(t.Context(), false)
		if err == nil || err.Error() != "upstream is shallow: git fetch --unshallow there" || w.u.looked("main").tip != "" {
			t.Errorf("%v: %v", tc, err)
		}
	}
}

// tree makes a tree object, whatever is in it, from MODE NAME ID in turn.
func (w *gitWorld) tree(entries ...string) string {
	w.t.Helper()
	var b strings.Builder
	for i := 0; i < len(entries); i += 3 {
		var raw []byte
		if _, err := fmt.Sscanf(entries[i+2], "%x", &raw); err != nil {
			w.t.Fatal(err)
		}
		fmt.Fprintf(&b, "%s %s\x00%s", entries[i], entries[i+1], raw)
	}
	return w.pipe(b.String(), "hash-object", "-w", "-t", "tree", "--literally", "--stdin")
}

func TestGitHostileTrees(t *testing.T) {
	w := newGitWorld(t)
	w.look()
	blob := w.pipe("x", "hash-object", "-w", "--stdin")
	first := w.u.looked("main").tip
	bomb := w.tree("100644", "f", blob)
	for i := range 8 {
		var ten []string
		for j := range 10 {
			ten = append(ten, "40000", fmt.Sprintf("%d%d", i, j), bomb)
		}
		bomb = w.tree(ten...)
	}
	deep := w.tree("100644", "f", blob)
	for range treeDepth {
		deep = w.tree("40000", "d", deep)
	}
	plain := w.tree("100644", "f", blob)
	for _, tc := range []struct {
		name string
		top  []string
		want string // "": it goes live
	}{
		{"..", []string{"40000", "etc", w.tree("40000", "..", plain)}, `"etc/.." is not a path that may be checked out`},
		{".", []string{"40000", "etc", w.tree("100644", ".", blob)}, `"etc/." is not a path that may be checked out`},
		{".git", []string{"40000", "etc", w.tree("40000", "a", w.tree("40000", ".GiT", plain))}, `"etc/a/.GiT" is not a path`},
		{"slash", []string{"40000", "etc", w.tree("100644", "a/b", blob)}, `"etc/a/b" is not a path`},
		{"twice", []string{"40000", "etc", w.tree("100644", "a", blob, "100644", "a-", blob, "40000", "a", plain)}, `has "a" twice`},
		{"order", []string{"40000", "etc", w.tree("100644", "b", blob, "100644", "a", blob)}, `not where it belongs`},
		{"mode", []string{"40000", "etc", w.tree("100664", "a", blob)}, `has the mode "100664"`},
		{"bomb", []string{"40000", "etc", bomb}, "more than 100000 files"},
		{"deep", []string{"40000", "etc", deep}, "more than 64 directories in each other"},
		{"bomb beside", []string{"40000", "etc", plain, "40000", "other", bomb}, ""},
		{"odd mode beside", []string{"40000", "etc", plain, "100664", "other", blob}, ""},
		{"good names", []string{"40000", "etc", w.tree("100644", " ", blob, "100644", "\"\n", blob, "100755", "-x", blob,
			"100644", strings.Repeat("y", 255), blob, "100644", "\xff", blob)}, ""},
		{"submodule", []string{"40000", "etc", w.tree("100644", " ", blob, "160000", "sub", first)}, ""},
		{"link is a symlink", []string{"120000", "etc", blob}, `link "etc": etc is a symbolic link: link what it points to`},
		{"link is a submodule", []string{"160000", "etc", first}, `link "etc": etc is a submodule`},
		{"link is a file", []string{"100644", "etc", blob}, `link "etc" is a file, not a directory: say file = true`},
		{"link is missing", []string{"40000", "etc2", plain}, `link "etc" is missing: add it`},
		{"empty", []string{"40000", "etc", w.tree()}, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w.t = t
			commit := w.git("commit-tree", "-p", first, "-m", tc.name, w.tree(tc.top...))
			w.git("update-ref", "refs/heads/main", commit)
			w.look()
			l := w.u.looked("main")
			_, err := w.u.tree(t.Context(), l.tip, w.etc)
			r := (*refusal)(nil)
			if l.tip != commit {
				t.Fatalf("%+v", l)
			}
			if tc.want == "" && err == nil {
				return
			}
			if !errors.As(err, &r) || tc.want == "" || !strings.Contains(r.Info, tc.want) {
				t.Fatalf("%v, want %q", err, tc.want)
			}
			if r.Commit != commit || r.Content == "" || r.Reason != "link" {
				t.Errorf("%+v", r)
			}
			again := newUpstream(w.dir+"/state", w.u.url, "") // walks itself
			if _, err := again.tree(t.Context(), commit, w.etc); err == nil || err.Error() != r.Info {
				t.Errorf("walked anew: %v", err)
			}
		})
	}
}

func size(name string) int64 {
	fi, err := os.Stat(name)
	if err != nil {
		return 0
	}
	return fi.Size()
}

// TestGitDamagedUpstream: what is wrong there is told in git's words, and is no reason to make a clone anew.
func TestGitDamagedUpstream(t *testing.T) {
	w := newGitWorld(t)
	w.look()
	before, err := os.Stat(w.u.dir)
	w.commit("etc/app.conf", "two\n")
	id := w.git("rev-parse", "HEAD:etc")
	object := filepath.Join(w.git("rev-parse", "--absolute-git-dir"), "objects", id[:2], id[2:])
	text, err2 := os.ReadFile(object)
	if err := errors.Join(err, err2, os.Remove(object), os.WriteFile(object, text[:len(text)/2], 0o644)); err != nil {
		t.Fatal(err)
	}

	for range 3 {
		_ = w.u.lookNow(t.Context(), false)
		if l := w.u.looked("main"); !errorSays(l.err, "is corrupt") || errors.As(l.err, &damaged{}) {
			t.Error(l.err)
		}
	}
	if after, err := os.Stat(w.u.dir); err != nil || !os.SameFile(before, after) {
		t.Error("another clone", err)
	}
}

// garble changes the bytes of an object in the clone's packs.
func (w *gitWorld) garble(id string) error {
	indexes, err := filepath.Glob(w.u.dir + "/objects/pack/*.idx")
	for _, index := range indexes {
		for line := range strings.Lines(w.git("verify-pack", "-v", index)) {
			f := strings.Fields(line) // id, type, size, size in the pack, and where it begins there
			if len(f) < 5 || f[0] != id {
				continue
			}
			size, err1 := strconv.Atoi(f[3])
			at, err2 := strconv.Atoi(f[4])
			name := strings.TrimSuffix(index, "idx") + "pack"
			pack, err3 := os.ReadFile(name)
			if err := errors.Join(err1, err2, err3); err != nil {
				return err
			}
			for i := at + size/4; i < at+size*3/4; i++ {
				pack[i] ^= 0x55
			}
			return errors.Join(os.Remove(name), os.WriteFile(name, pack, 0o644))
		}
	}
	return cmp.Or(err, errors.New("no such object"))
}

// TestGitDamageHeals: whatever becomes of the clone, the next commits come, while running and after a restart.
func TestGitDamageHeals(t *testing.T) {
	spoil := func(name, text string) func(w *gitWorld) error {
		return func(w *gitWorld) error { return os.WriteFile(w.u.dir+name, []byte(text), 0o644) }
	}
	remove := func(pattern string) func(w *gitWorld) error {
		return func(w *gitWorld) error {
			names, err := filepath.Glob(w.u.dir + pattern)
			for _, name := range names {
				err = errors.Join(err, os.RemoveAll(name))
			}
			return err
		}
	}
	for _, tc := range []struct {
		name  string
		spoil func(w *gitWorld) error
	}{
		{"no clone", remove("")},
		{"no objects", remove("/objects")},
		{"no packs", remove("/objects/pack/*")},
		{"no idx", remove("/objects/pack/*.idx")},
		{"no config", remove("/config")},
		{"empty HEAD", spoil("/HEAD", "")},
		{"empty config", spoil("/config", "")},
		{"garbage config", spoil("/config", "[[[")},
		{"empty refs", spoil("/packed-refs", "")},
		{"dangling ref", spoil("/refs/x", strings.Repeat("1", 40)+"\n")},
		{"dangling packed ref", spoil("/packed-refs", strings.Repeat("1", 40)+" "+tipRef("main")+"\n")},
		{"another packed ref", spoil("/packed-refs", strings.Repeat("1", 40)+" refs/ran/x\n")},
		{"torn packed ref", spoil("/packed-refs", strings.Repeat("1", 40)+" refs/ti")},
		{"lock", spoil("/packed-refs.lock", "")},
		{"others can write", func(w *gitWorld) error { return os.Chmod(w.u.dir, 0o777) }},
		{"another's objects", func(w *gitWorld) error { return os.Chown(w.u.objectsDir(), 65534, 65534) }},
		{"history lost", func(w *gitWorld) error {
			before, err := filepath.Glob(w.u.dir + "/objects/*/*")
			w.commit("etc/app.conf", "more\n")
			w.look()
			for _, name := range before {
				err = errors.Join(err, os.Remove(name))
			}
			return err
		}},
		{"torn pack", func(w *gitWorld) error {
			names, err := filepath.Glob(w.u.dir + "/objects/pack/*.pack")
			for _, name := range names {
				err = errors.Join(err, os.Truncate(name, 40))
			}
			return err
		}},
		{"garbled directory", func(w *gitWorld) error { // upstream sends what differs from it
			var many []string
			for i := range 300 {
				many = append(many, fmt.Sprint("etc/", i), fmt.Sprint(i))
			}
			w.commit(many...)
			w.look()
			return w.garble(w.git("rev-parse", "HEAD:etc"))
		}},
		{"torn idx", func(w *gitWorld) error { // git keeps it where the same pack comes again
			names, err := filepath.Glob(w.u.dir + "/objects/pack/*.idx")
			for _, name := range names {
				err = errors.Join(err, os.Chmod(name, 0o644), os.Truncate(name, 40))
			}
			return err
		}},
	} {
		for _, restart := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s restart=%v", tc.name, restart), func(t *testing.T) {
				w := newGitWorld(t)
				w.look()
				if err := tc.spoil(w); err != nil {
					t.Fatal(err)
				}
				if restart {
					w.upstream(w.u.url, "")
				}
				w.commit("etc/app.conf", "two\n")
				for range 3 {
					_ = w.u.lookNow(t.Context(), false)
				}
				if l := w.u.looked("main"); l.err != nil || w.read("etc/app.conf") != "two\n" {
					t.Errorf("%v, %+v", l.err, l)
				}
			})
		}
	}
}

// TestGitCrash: a pack that was cut off can end git by a signal, or in words of a newer git; that is damage like
// any other.
func TestGitCrash(t *testing.T) {
	const crash, newer = "kill -SEGV $$", "echo error: files x and y differ in contents >&2; exit 128" // of git 2.47
	for _, tc := range [][2]string{
		{"*' fetch '*", crash}, {"*--batch", crash}, {"*--batch-check*", crash}, {"*' fetch '*", newer},
	} {
		t.Run(fmt.Sprint(tc), func(t *testing.T) {
			w := newGitWorld(t)
			w.look()
			if err := os.WriteFile(w.u.objectsDir()+"/pack/spoilt", nil, 0o644); err != nil {
				t.Fatal(err)
			}
			w.commit("etc/app.conf", "two\n")
			w.counting(`case "$*" in ` + tc[0] + `) if [ -e "$GIT_DIR/objects/pack/spoilt" ]; then ` + tc[1] + `; fi;; esac`)
			for range 2 {
				_ = w.u.lookNow(t.Context(), false)
			}
			if l := w.u.looked("main"); l.err != nil || w.read("etc/app.conf") != "two\n" {
				t.Errorf("%+v", l)
			}
		})
	}
}

// TestGitHistoryLost: a walk over history that meets a commit which is not there has found damage.
func TestGitHistoryLost(t *testing.T) {
	w := newGitWorld(t)
	first := w.git("rev-parse", "HEAD")
	w.commit("etc/app.conf", "two\n")
	w.look()
	packs, _ := filepath.Glob(w.u.objectsDir() + "/pack/*.pack")
	for _, name := range packs { // each object is a file of its own
		data, err := os.ReadFile(name)
		all, _ := filepath.Glob(strings.TrimSuffix(name, "pack") + "*")
		for _, name := range all {
			err = errors.Join(err, os.Remove(name))
		}
		if err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command("git", "unpack-objects", "-q")
		cmd.Env = append(os.Environ(), "GIT_DIR="+w.u.dir)
		cmd.Stdin = bytes.NewReader(data)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatal(string(out))
		}
	}
	if err := os.Remove(w.u.objectsDir() + "/" + first[:2] + "/" + first[2:]); err != nil {
		t.Fatal(err)
	}
	if c, err := w.u.named(t.Context(), "main", first[:12], nil); !errors.Is(err, errMissing) {
		t.Errorf("%q, %v", c, err)
	}
	w.look()
	if c, err := w.u.named(t.Context(), "main", first[:12], nil); len(c) != 1 || err != nil {
		t.Errorf("%q, %v", c, err)
	}
}

// TestGitChangesElsewhere: a server sends what changed in a large file as a difference from the file of before, also where
// that is none of ours, and was never fetched. That is no damage, and costs one fetch more, once.
func TestGitChangesElsewhere(t *testing.T) {
	w := newGitWorld(t)
	text := ""
	for i := range 300 {
		text += fmt.Sprintf("line %d of many\n", i)
	}
	w.commit("elsewhere/f", text)
	w.look()
	runs := w.counting("")
	for i := range 4 {
		text += "one more\n"
		ours := fmt.Sprintf("version %d\n", i)
		w.commit("elsewhere/f", text, "etc/app.conf", ours)
		w.look()
		if got := w.read("etc/app.conf"); got != ours {
			t.Errorf("%d: %q", i, got)
		}
		fetches := 0
		for _, r := range runs() {
			if strings.Contains(r, "fetch") && !strings.Contains(r, "ls-remote") {
				fetches++
			}
		}
		if want := []int{3, 2, 2, 2}[i]; fetches != want {
			t.Errorf("%d: %d fetches, want %d", i, fetches, want)
		}
	}
	if matches, _ := filepath.Glob(w.u.dir + ".*"); len(matches) > 0 {
		t.Errorf("cloned anew: %q", matches)
	}
}

// TestGitTornContents: git does not replace a pack that comes again, whatever became of it.
func TestGitTornContents(t *testing.T) {
	w := newGitWorld(t)
	w.commit("etc/app.conf", strings.Repeat("a long story\n", 9))
	w.look()
	names, err := filepath.Glob(w.u.dir + "/objects/pack/*.idx")
	if err != nil || len(names) != 2 {
		t.Fatalf("%q, %v", names, err)
	}
	small := slices.MinFunc(names, func(a, b string) int { return int(size(a) - size(b)) })
	if err := errors.Join(os.Chmod(small, 0o644), os.Truncate(small, 40)); err != nil {
		t.Fatal(err)
	}
	w.upstream(w.u.url, "")
	if err := w.u.lookNow(t.Context(), false); err != nil {
		t.Error(err)
	}
	w.read("etc/app.conf")
}

func TestGitParseTree(t *testing.T) {
	id := strings.Repeat("i", 20)
	for raw, want := range map[string]string{
		"100644 a\x00" + id:                        "<nil>",
		"100644 a.b\x00" + id + "40000 a\x00" + id: "<nil>", // as git sorts
		"100644 \x00" + id:                         "belongs",
		"40000 a\x00" + id + "100644 a.b\x00" + id: "belongs",
		"100644 a\x00" + id[1:]:                    "cut short",
		"100644 a":                                 "cut short",
		"100644\x00" + id:                          "cut short",
	} {
		if _, err := parseTree([]byte(raw), 20); !strings.Contains(fmt.Sprint(err), want) {
			t.Errorf("%q: %v, want %s", raw, err, want)
		}
	}
}

// TestGitFalseObjects: what is not what its id says is an error, is never used, and is healed.
func TestGitFalseObjects(t *testing.T) {
	for _, kind := range []string{"commit", "tree", "blob"} {
		t.Run(kind, func(t *testing.T) {
			w := newGitWorld(t)
			w.look()
			tip := w.u.looked("main").tip
			id := map[string]string{"commit": tip, "tree": w.git("rev-parse", tip+":etc"), "blob": w.git("rev-parse", tip+":etc/app.conf")}[kind]
			evil := map[string]string{
				"commit": w.git("commit-tree", "-m", "evil", tip+"^{tree}"), "tree": w.tree(),
				"blob": w.pipe("evil", "hash-object", "-w", "--stdin"),
			}[kind]
			packs, _ := filepath.Glob(w.u.objectsDir() + "/pack/*")
			for _, p := range packs {
				_ = os.Rename(p, w.dir+"/"+filepath.Base(p))
			}
			packs, _ = filepath.Glob(w.dir + "/*.pack")
			for _, p := range packs {
				data, _ := os.ReadFile(p)
				cmd := exec.Command("git", "unpack-objects", "-q")
				cmd.Env = append(os.Environ(), "GIT_DIR="+w.u.dir)
				cmd.Stdin = bytes.NewReader(data)
				if out, err := cmd.CombinedOutput(); err != nil {
					t.Fatal(string(out))
				}
			}
			from := w.work + "/.git/objects/" + evil[:2] + "/" + evil[2:]
			to := w.u.objectsDir() + "/" + id[:2] + "/" + id[2:]
			data, err := os.ReadFile(from)
			if err := errors.Join(err, os.Remove(to), os.WriteFile(to, data, 0o444)); err != nil {
				t.Fatal(err)
			}
			w.u.clone.forget()
			content, err := w.u.tree(t.Context(), tip, w.etc)
			if kind == "blob" && err == nil {
				_, err = w.blob(content["etc/app.conf"].id)
			}
			if !errors.As(err, &damaged{}) || !strings.Contains(err.Error(), kind+" "+id[:12]+" of the clone is in truth") {
				t.Errorf("%v", err)
			}
			w.look()
			if got := w.read("etc/app.conf"); got != "one\n" || w.u.clone.damage() != nil {
				t.Errorf("%q, %v", got, w.u.clone.damage())
			}
			w.u.clone.noteDamage(damaged{errMissing})
			if err := w.u.lookNow(t.Context(), false); err == nil || !strings.Contains(err.Error(), "was made anew at") {
				t.Errorf("healed twice within the hour: %v", err)
			}
			if err := w.u.lookNow(t.Context(), true); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestGitStopped: a git that its user stops, kills or replaces is trouble after a while, and no object.
func TestGitStopped(t *testing.T) {
	for _, tc := range []struct{ name, script, want string }{
		{"stopped", `kill -STOP $$`, "i/o timeout"},
		{"killed", `kill -9 $$`, "signal: killed"},
		{"silent", `exec sleep 100`, "i/o timeout"},
		{"nonsense", `read x; echo "$x blob nine"; exec sleep 100`, "git answers"},
		{"endless line", `exec cat /dev/zero`, "buffer full"},
		{"trickle", `read x; echo "$x blob 9"; while echo -n .; do sleep 0.1; done`, "i/o timeout"},
		{"false", `read x; echo "$x blob 9"; echo 123456789; exit`, "is in truth"},
		{"another", `read x; echo "$x commit 9"; echo 123456789`, "is a commit, not a blob"},
		{"huge", `read x; echo "$x blob 3000000000"; exec cat /dev/zero`, "more than 2048 MiB"},
		{"short", `read x; echo "$x blob 9"; echo 1; exit 128`, "EOF"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w := newGitWorld(t)
			w.look()
			id := w.git("rev-parse", "HEAD:etc/app.conf")
			w.counting(`case "$*" in *--batch) ` + tc.script + `;; esac`)
			w.u.patience = 300 * time.Millisecond
			start := time.Now()
			_, err := w.blob(id)
			if err == nil || !strings.Contains(err.Error(), tc.want) || time.Since(start) > 3*time.Second {
				t.Errorf("%v after %v", err, time.Since(start))
			}
		})
	}
}

func TestGitHistory(t *testing.T) {
	w := newGitWorld(t)
	first := w.git("rev-parse", "HEAD")
	var all []string
	for i := range 20 {
		all = append(all, w.commit("etc/app.conf", fmt.Sprint(i)))
	}
	w.look()
	w.git("commit", "-q", "--amend", "-m", "forced")
	forced := w.git("rev-parse", "HEAD")
	gone := all[19]
	w.look()

	for hash, want := range map[string][]string{
		first: {first}, first[:12]: {first}, all[7][:10]: {all[7]}, gone[:10]: {gone}, forced: {forced}, gone: {gone},
		"0123456789": nil, strings.Repeat("0", 40): nil, all[3][:39] + "g": nil,
	} {
		c, err := w.u.named(t.Context(), "main", hash, []string{gone})
		if err != nil || !slices.Equal(c, want) {
			t.Errorf("find %q: %q, %v, want %q", hash, c, err, want)
		}
	}
	if c, err := w.u.named(t.Context(), "main", "", []string{gone}); len(c) != 22 || err != nil {
		t.Errorf("all: %q, %v", c, err)
	}
	r := (*refusal)(nil)
	for _, tc := range [][2]string{{forced, first}, {forced, forced}, {forced, ""}, {all[3], all[2]}} {
		if err := w.u.descends(t.Context(), tc[0], tc[1]); err != nil {
			t.Errorf("%q: %v", tc, err)
		}
	}
	if err := w.u.descends(t.Context(), forced, gone); !errors.As(err, &r) || !strings.Contains(r.Info, "does not descend from "+gone[:8]+", which ran here") {
		t.Error(err)
	}
	// Back to old contents: one request where they are missing, none where they are there.
	old, err := w.u.tree(t.Context(), all[3], w.etc)
	if err != nil {
		t.Fatal(err)
	}
	runs := w.counting("")
	if err := w.u.fetchMissing(t.Context(), old); err != nil || len(runs()) != 2 {
		t.Errorf("%v", err)
	}
	_ = os.Rename(w.work, w.work+"2")
	if err := w.u.fetchMissing(t.Context(), old); err != nil || len(runs()) != 1 {
		t.Errorf("upstream away: %v", err)
	}
	now, _ := w.u.tree(t.Context(), forced, w.etc)
	if err := w.u.fetchMissing(t.Context(), now); err != nil || len(runs()) != 0 {
		t.Errorf("of the tip: %v", err)
	}
	if text, err := w.blob(old["etc/app.conf"].id); text != "3" || err != nil {
		t.Errorf("%q, %v", text, err)
	}
}

func TestGitSigners(t *testing.T) {
	for _, format := range []string{"sha1", "sha256"} {
		w := newGitWorld(t, "--object-format="+format)
		key := map[string]string{}
		for _, name := range []string{"good", "expired", "revoked", "foreign"} {
			if out, err := exec.Command("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", w.dir+"/"+name).CombinedOutput(); err != nil {
				t.Fatal(string(out))
			}
			pub, _ := os.ReadFile(w.dir + "/" + name + ".pub")
			key[name] = string(pub)
		}
		signers := w.dir + "/signers"
		text := `good@x namespaces="git" ` + key["good"] + `old@x namespaces="git",valid-before="20200101" ` + key["expired"] + "revoked@x " + key["revoked"]
		commits := map[string]string{"": w.git("rev-parse", "HEAD")}
		for name := range key {
			w.git("-c", "gpg.format=ssh", "-c", "user.signingkey="+w.dir+"/"+name, "commit", "-q", "-S", "--allow-empty", "-m", "by "+name+"\n\ngpgsig x")
			commits[name] = w.git("rev-parse", "HEAD")
		}
		raw := w.git("cat-file", "commit", commits["good"])
		commits["tampered"] = w.pipe(strings.Replace(raw, "by good", "by evil", 1)+"\n", "hash-object", "-t", "commit", "-w", "--stdin")
		sig := raw[strings.Index(raw, "gpgsig"):strings.Index(raw, "\n\n")]
		commits["pgp"] = w.pipe(strings.Replace(raw, sig, strings.Fields(sig)[0]+" -----BEGIN PGP SIGNATURE-----\n x", 1), "hash-object", "-t", "commit", "-w", "--stdin")
		w.git("branch", "tampered", commits["tampered"])
		w.git("branch", "pgp", commits["pgp"])
		w.u.track("tampered", nil, func() {})
		w.u.track("pgp", nil, func() {})
		w.look()

		if err := w.u.verify(t.Context(), commits["good"], signers); err == nil || errors.As(err, new(*refusal)) {
			t.Errorf("no signers file: %v", err)
		}
		_ = os.WriteFile(signers, []byte(text), 0o600)
		_ = os.WriteFile(signers+".revoked", []byte(key["revoked"]), 0o600)
		for name, why := range map[string]string{
			"good": "", "": "it carries no signature", "expired": "No principal matched", "revoked": "Could not verify signature", "foreign": "No principal matched",
			"tampered": "incorrect signature", "pgp": "another kind of signature",
		} {
			r := (*refusal)(nil)
			err := w.u.verify(t.Context(), commits[name], signers)
			if name == "good" && err == nil {
				continue
			}
			want := fmt.Sprintf("commit %.8s is not signed by one of %s: ", commits[name], signers)
			if !errors.As(err, &r) || r.Reason != "signers" || !strings.HasPrefix(r.Info, want) || !strings.Contains(r.Info, why) || name == "good" {
				t.Errorf("%s %q: %v, want %q", format, name, err, why)
			}
		}
		_ = os.Remove(signers + ".revoked")
		if err := w.u.verify(t.Context(), commits["revoked"], signers); err != nil {
			t.Errorf("not revoked: %v", err)
		}
		t.Setenv("PATH", filepath.Dir(w.bin("git")))
		if err := w.u.verify(t.Context(), commits["good"], signers); err == nil || errors.As(err, new(*refusal)) {
			t.Errorf("no ssh-keygen: %v", err)
		}
		t.Setenv("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
	}
}

// bin makes a directory in which only one program is, and returns its name there.
func (w *gitWorld) bin(name string) string {
	at := w.t.TempDir() + "/" + name
	if err := os.Symlink("/usr/bin/"+name, at); err != nil {
		w.t.Fatal(err)
	}
	return at
}

// TestGitLeftovers: what a kill left is removed at the next start; a heal that was cut between its renames is put right.
func TestGitLeftovers(t *testing.T) {
	w := newGitWorld(t)
	w.look()
	err := errors.Join(os.WriteFile(w.u.objectsDir()+"/pack/tmp_pack_x", nil, 0o600), os.WriteFile(w.u.dir+"/packed-refs.lock", nil, 0o600),
		os.Mkdir(w.u.dir+".new", 0o755), os.Rename(w.u.dir, w.u.dir+".old"))
	if err != nil {
		t.Fatal(err)
	}
	w.upstream(w.u.url, "")
	w.look()
	if left, _ := exec.Command("sh", "-c", "find "+w.dir+"/state | grep -E 'tmp_|lock|new|old'").Output(); len(left) > 0 {
		t.Errorf("left: %s", left)
	}
	if got := w.read("etc/app.conf"); got != "one\n" {
		t.Errorf("%q", got)
	}
	other := newUpstream(w.dir+"/state", "file:///x", "")
	_ = os.Mkdir(other.dir, 0o755)
	retireUpstreams(t.Context(), w.dir+"/state", []*upstream{w.u})
	if lexists(other.dir) || !lexists(w.u.dir) {
		t.Error("the wrong clone was retired")
	}
}

// TestGitPacks: many small fetches end in one pack, and commits that ran outlive it, which upstream has no more.
func TestGitPacks(t *testing.T) {
	for _, filter := range []string{"true", "false"} {
		w := newGitWorld(t)
		w.git("config", "uploadpack.allowFilter", filter)
		for i := range 120 { // or git does not make a pack of what it fetches
			w.commit("etc/more", fmt.Sprint(i))
		}
		ran := w.commit("etc/app.conf", "ran\n")
		w.look()
		w.git("reset", "-q", "--hard", "HEAD~1")
		w.commit("etc/app.conf", "two\n")
		w.look()
		pack := w.u.objectsDir() + "/pack/"
		packs, _ := filepath.Glob(pack + "*.pack")
		for i := range 51 - len(packs) {
			for _, ext := range []string{".pack", ".idx", ".promisor"} {
				data, err := os.ReadFile(strings.TrimSuffix(packs[0], ".pack") + ext)
				if err == nil {
					_ = os.WriteFile(fmt.Sprintf("%spack-%040d%s", pack, i, ext), data, 0o444)
				}
			}
		}
		w.u.repack(t.Context())
		if packs, _ := filepath.Glob(pack + "*.pack"); len(packs) != 1 {
			t.Errorf("%d packs", len(packs))
		}
		w.upstream(w.u.url, "")
		w.look()
		tree, err := w.u.tree(t.Context(), ran, w.etc)
		if text, err2 := w.blob(tree["etc/app.conf"].id); text != "ran\n" || errors.Join(err, err2) != nil {
			t.Errorf("filter %s: %q, %v, %v", filter, text, err, err2)
		}
	}
}

// TestGitLimits: a fetch that ended at a limit is not repeated until upstream moves, or an operator asks.
func TestGitLimits(t *testing.T) {
	w := newGitWorld(t)
	w.look()
	w.commit("etc/app.conf", "two\n")
	runs := w.counting(`case "$*" in *"fetch -q"*) ulimit -f 0;; esac`)
	for i, want := range []int{3, 1, 1} {
		if err := w.u.lookNow(t.Context(), false); err == nil || len(runs()) != want {
			t.Errorf("%d: %v", i, err)
		}
	}
	if err := w.u.lookNow(t.Context(), true); err == nil || len(runs()) != 3 {
		t.Errorf("%v", err)
	}
}

// TestGitNoNews: what fetch brings counts only if it is what the look named.
func TestGitNoNews(t *testing.T) {
	w := newGitWorld(t)
	w.look()
	tip := w.u.looked("main").tip
	w.commit("etc/app.conf", "two\n")
	w.counting(`case "$*" in *"ls-remote"*) echo "` + strings.Repeat("1", 40) + `	refs/heads/main"; exit;; esac`)
	w.look()
	if l := w.u.looked("main"); l.tip != tip || l.err != nil {
		t.Errorf("%+v", l)
	}
	if got := w.read("etc/app.conf"); got != "one\n" {
		t.Errorf("%q", got)
	}
}

func TestGitEnvironment(t *testing.T) {
	t.Setenv("GIT_DIR", "/nope")
	t.Setenv("https_proxy", "http://proxy:1")
	t.Setenv("SSL_CERT_FILE", "/certs")
	u := newUpstream("/s", "ext::touch /tmp/x", "")
	u.acct.Store(&account{uid: os.Getuid() + 1, home: "/home/x"})
	cmd := u.networkGit(u.dir, "fetch")
	env := strings.Join(cmd.Env, "\n") + "\n"
	for _, want := range []string{
		"HOME=/home/x", "https_proxy=http://proxy:1", "SSL_CERT_FILE=/certs", "GIT_DIR=" + u.dir, "GIT_CONFIG_GLOBAL=/dev/null",
		"GIT_ALLOW_PROTOCOL=https:http:ssh:git:file", "GIT_NO_LAZY_FETCH=1", "ServerAliveCountMax=2 -F /etc/ssh/ssh_config",
	} {
		if !strings.Contains(env, want+"\n") {
			t.Errorf("%s is not in git's environment %s", want, env)
		}
	}
	if strings.Contains(env, "/nope") || strings.Contains(strings.Join(cmd.Args, " "), u.url) {
		t.Errorf("%s %q", env, cmd.Args)
	}
	u.track("main", nil, func() {})
	u.acct.Store(&account{uid: os.Getuid()})
	if _, err := u.lsRemote(t.Context(), nil); err == nil || !strings.Contains(err.Error(), "transport 'ext' not allowed") {
		t.Errorf("ext: %v", err)
	}
	if _, err := gitVersion(t.Context()); err != nil {
		t.Error(err)
	}
}

// Readers that were lent do not stay, whatever the order in which they come back, and one whose caller ended is not lent again.
func TestGitSpareReaders(t *testing.T) {
	w := newGitWorld(t)
	w.look()
	tip := w.u.looked("main").tip
	w.upstream("file://"+w.work, "") // whose clone has lent nothing yet
	c := w.u.clone
	lend := func(ctx context.Context) *objects {
		o, err := w.u.open(ctx)
		if err != nil {
			t.Fatal(err)
		}
		return o
	}
	ctx, end := context.WithCancel(t.Context())
	cut := lend(ctx)
	end()
	for i := 0; cut.err == nil && i < 1000; i++ { // its pipes are closed under its hands
		_, _ = cut.whole(tip, "commit")
		time.Sleep(time.Millisecond)
	}
	cut.close()
	cut.close()

	none := func() {
		for deadline := time.Now().Add(5 * spareTime); len(c.spare) > 0; time.Sleep(50 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("%d readers stay", len(c.spare))
			}
		}
	}
	none()
	one, two := lend(t.Context()), lend(t.Context())
	one.close()
	time.Sleep(spareTime / 4)
	two.close()
	if again := lend(t.Context()); again.reader != one.reader {
		t.Error("another git was started where one was spare")
	} else {
		time.Sleep(spareTime / 4)
		again.close()
	}

	none()
	if len(one.ended)+len(two.ended)+len(cut.ended) < 3 {
		time.Sleep(time.Second)
	}
	for i, r := range []*reader{one.reader, two.reader, cut.reader} {
		if len(r.ended) == 0 {
			t.Errorf("git %d did not end", i)
		}
	}
}
