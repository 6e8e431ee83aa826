//go:build linux

package main

import (
	"fmt"
	"path/filepath"
	"reflect"
	"strconv"
	"strings"
	"testing"
	"time"

	"gitopper/ctl"
)

// log returns what /list/log answers to a key.
func (w *world) log(r rights) ctl.Log {
	w.t.Helper()
	s := &sshServer{services: []*Service{w.s}}
	words := []string{"/list/log", "svc.service"}
	answer, err := s.listLog(w.t.Context(), &sshConn{who: visitor{rights: r}}, words, nil)
	if err != nil {
		w.t.Fatal(err)
	}
	return answer.(ctl.Log)
}

// wantRan compares what ran with lines HASH BY|OUTCOME, the newest first, of which the outcome is a
// beginning.
func (w *world) wantRan(want ...string) {
	w.t.Helper()
	var got []string
	log := w.log(mayWrite)
	for i, r := range log.Ran {
		line := fmt.Sprintf("%.8s %s|%s", r.Hash, r.By, r.Outcome)
		if i < len(want) && strings.HasPrefix(line, want[i]) {
			line = want[i]
		}
		got = append(got, line)
		when, err := time.Parse(time.RFC1123, r.When)
		if age := time.Since(when); err != nil || age < -time.Second || age > time.Hour {
			w.t.Errorf("when: %q %v", r.When, err)
		}
	}
	if !reflect.DeepEqual(got, want) {
		w.t.Errorf("ran:\n%s\nwant:\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

// wantPending compares what waits with subjects, the newest first.
func (w *world) wantPending(want ...string) {
	w.t.Helper()
	var got []string
	for _, c := range w.log(mayLook).Pending {
		got = append(got, c.Subject)
	}
	if n := w.s.Status().Pending; n != len(want) || strings.Join(got, "\n") != strings.Join(want, "\n") {
		w.t.Errorf("%d pending: %q, want %q", n, got, want)
	}
}

// say pushes a commit with that subject.
func (w *world) say(subject, name, text string) string {
	w.t.Helper()
	w.write("work/"+name, text)
	w.git(w.work, "add", "-A")
	w.git(w.work, "commit", "-q", "--author=Ann\x1b[31m Other <a@b>", "-m", subject+"\n\nbody\n")
	w.git(w.work, "push", "-q", "-f", "origin", "HEAD:main")
	return w.head()
}

// TestLogRan: what ran, by whom, with which outcome, also when commits come again, and after a restart.
func TestLogRan(t *testing.T) {
	w := okWorld(t)
	first := w.head()
	w.write("fake/reads", w.dir+"/local/etc/app.conf")
	bad := w.commit("etc/app.conf", "bad\n")
	w.reconcile()
	w.commit("other/file", "of nobody's\n")
	w.reconcile()
	second := w.commit("etc/app.conf", "two\n")
	w.reconcile()
	o := op{verb: "rollback", hash: first[:8], who: "ann (ops@::1)", reason: "a test"}
	if err := w.s.operate(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	lines := []string{
		first[:8] + " rollback by ann (ops@::1): a test|OK", second[:8] + " commit|OK",
		first[:8] + " take-back of " + bad[:8] + "|OK", bad[:8] + " commit|taken back: ",
		first[:8] + " commit|OK",
	}
	w.wantRan(lines...)
	w.restart()
	w.reconcile()
	w.wantRan(lines...)
	if log := fmt.Sprint(w.log(mayLook).Ran); strings.Contains(log, "config line 1") {
		t.Errorf("private words: %s", log)
	}
}

// TestLogRanBroken: trouble without a fallback is an outcome, until the unit is well on it.
func TestLogRanBroken(t *testing.T) {
	w := newWorld(t)
	w.write("fake/reads", w.dir+"/local/etc/app.conf")
	bad := w.commit("etc/app.conf", "bad\n")
	w.reconcile()
	w.wantRan(bad[:8] + " commit|BROKEN: ")
	w.write("fake/reads", "")
	w.reconcile()
	w.wantRan(bad[:8] + " commit|OK")
}

// TestPruneRan: the last fifty, and what is needed for the last fifty commits.
func TestPruneRan(t *testing.T) {
	var all []ran
	add := func(commit string) { all = pruneRan(append(all, ran{version: version{Commit: commit}})) }
	for i := range 60 {
		add(fmt.Sprint(i))
	}
	if len(all) != 50 || all[0].Commit != "10" || all[49].Commit != "59" {
		t.Errorf("%d: %v", len(all), all)
	}
	for range 1000 {
		add("x")
		add("y")
	}
	commits := map[string]bool{}
	for _, r := range all {
		commits[r.Commit] = true
	}
	if len(all) != 98 || len(commits) != 50 || all[0].Commit != "12" {
		t.Errorf("%d, %d commits, from %s", len(all), len(commits), all[0].Commit)
	}
}

// TestPending: what upstream has that does not run is counted when it comes, and told without git.
func TestPending(t *testing.T) {
	w := okWorld(t)
	w.wantPending()
	if err := w.op("freeze", ""); err != nil {
		t.Fatal(err)
	}
	first := w.head()
	w.say("two \x1b[31mof\u202e it", "etc/app.conf", "two\n")
	w.say("nobody's", "other/file", "y\n")
	w.reconcile()
	w.wantPending("two  [31mof  it")
	log := w.log(mayLook)
	if c := log.Pending[0]; c.Author != "Ann [31m Other" || c.Hash != w.git(w.work, "rev-parse", "HEAD^") ||
		c.Date != w.date("HEAD^") || log.More != 0 {
		t.Errorf("%+v", log)
	}
	if got := date(w.s.Status().Committed); got != w.date(first) {
		t.Errorf("committed %s, want %s", got, w.date(first))
	}

	w.say("one", "one.conf", "three\n")
	w.reconcile()
	w.wantPending("one", "two  [31mof  it")
	w.say("nobody's", "other/file", "z\n")
	_ = w.up.lookNow(t.Context(), false)
	w.wantRuns(0, func() { w.s.pass(t.Context()) })
	w.restart()
	dateOfFirst := w.date(first)
	w.upstreamGoes()
	w.reconcile()
	w.wantPending("one", "two  [31mof  it")
	if got := date(w.s.Status().Committed); got != dateOfFirst {
		t.Errorf("committed %s, want %s", got, dateOfFirst)
	}
	w.upstreamComes()
	if err := w.op("unfreeze", ""); err != nil {
		t.Fatal(err)
	}
	w.wantPending()
	if got := date(w.s.Status().Committed); got != w.date("HEAD") {
		t.Errorf("committed %s, want %s", got, w.date("HEAD"))
	}
}

// date returns when a commit was made, as answers have it.
func (w *world) date(commit string) string {
	seconds, err := strconv.ParseInt(w.git(w.work, "log", "-1", "--format=%ct", commit), 10, 64)
	if err != nil {
		w.t.Fatal(err)
	}
	return date(time.Unix(seconds, 0))
}

// TestPendingRefused: what is refused waits; where upstream went back, or is another, something does as well.
func TestPendingRefused(t *testing.T) {
	w := okWorld(t)
	w.spec.check = []string{"false"}
	w.restart()
	w.say("refused", "etc/app.conf", "two\n")
	w.reconcile()
	w.wantPending("refused")
	w.spec.check = nil
	w.restart()
	w.reconcile()
	w.wantPending()

	if err := w.op("freeze", ""); err != nil {
		t.Fatal(err)
	}
	w.back("HEAD^")
	w.git(w.work, "push", "-q", "-f", "origin", "HEAD:main")
	w.reconcile()
	if log := w.log(mayWrite); w.s.Status().Pending != 1 || log.More != 1 || len(log.Pending) != 0 {
		t.Errorf("gone back: %d, %+v", w.s.Status().Pending, log)
	}
}

// TestPendingUncounted: where git fails something waits all the same, and is counted when git is well again.
func TestPendingUncounted(t *testing.T) {
	w := okWorld(t)
	if err := w.op("freeze", ""); err != nil {
		t.Fatal(err)
	}
	w.say("two", "etc/app.conf", "two\n")
	w.say("three", "etc/app.conf", "three\n")
	_ = w.up.lookNow(t.Context(), false)
	objects := w.up.objectsDir()
	w.run("mv", objects, objects+".away")
	w.s.pass(t.Context())
	if log := w.log(mayLook); w.s.Status().Pending != 1 || log.More != 1 || len(log.Pending) != 0 {
		t.Errorf("%d, %+v", w.s.Status().Pending, log)
	}
	w.run("mv", objects+".away", objects)
	w.s.pass(t.Context())
	w.wantPending("three", "two")
	w.wantRuns(0, func() { w.s.pass(t.Context()) })
}

// TestPendingMany: thousands are counted, and some told.
func TestPendingMany(t *testing.T) {
	w := okWorld(t)
	if err := w.op("freeze", ""); err != nil {
		t.Fatal(err)
	}
	var commits strings.Builder
	for i := range 3000 {
		fmt.Fprintf(&commits, "commit refs/heads/main\ncommitter A <a@b> %d +0000\ndata 1\nx\n", 1700000000+i)
		if i == 0 {
			commits.WriteString("from " + w.head() + "\n")
		}
		text := fmt.Sprintln(i)
		fmt.Fprintf(&commits, "M 644 inline etc/app.conf\ndata %d\n%s\n", len(text), text)
	}
	fastImport(t, w.bare, commits.String())
	w.reconcile()
	log := w.log(mayLook)
	if n := w.s.Status().Pending; n != 3000 || len(log.Pending) != 50 || log.More != 2950 {
		t.Errorf("%d pending, %d told, %d more", n, len(log.Pending), log.More)
	}
}

// TestDiff: what a commit would change is shown as git diff shows it, of the service's links alone, whatever
// the repository says of that, and so that it can't steer a terminal.
func TestDiff(t *testing.T) {
	w := okWorld(t)
	t.Setenv("TMPDIR", w.dir+"/tmp")
	w.write("tmp/mine", "")
	first := w.head()
	if err := w.op("freeze", ""); err != nil {
		t.Fatal(err)
	}
	w.write("work/etc/.gitattributes", "* -diff\n*.conf diff=html\n")
	w.write("work/etc/big", strings.Repeat("0123456789\n", 20_000)) // not fetched along
	w.write("work/etc/sub/tool", "#!/bin/sh\n")
	w.run("chmod", "+x", w.work+"/etc/sub/tool")
	w.run("ln", "-s", "../../outside", w.work+"/etc/link")
	w.write("work/etc/a \"b\"\n", "odd\n")
	w.run("rm", w.work+"/etc/sub/deep")
	w.commit("etc/app.conf", "two \x1b[31mred\u202e\xff\r\n", "other/file", "elsewhere\n")
	w.reconcile()

	got, err := w.s.preview(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"diff --git a/etc/app.conf b/etc/app.conf\nindex ", "\n-one\n+two \\x1b[31mred\\u202e\ufffd\\r\n",
		"diff --git a/etc/sub/tool b/etc/sub/tool\nnew file mode 100755", "+#!/bin/sh\n", "new file mode 120000", "+../../outside\n",
		`diff --git "a/etc/a \"b\"\n" "b/etc/a \"b\"\n"`,
		"diff --git a/etc/sub/deep b/etc/sub/deep\ndeleted file mode 100644", "-deep\n", "+0123456789\n", "++* -diff\n"[1:],
	} {
		if !strings.Contains(got, want) {
			t.Errorf("no %q", want)
		}
	}
	isHidden := strings.Contains(got, "Binary")
	if isHidden || strings.Contains(got, "elsewhere") || strings.ContainsAny(got, "\x1b\r") {
		t.Errorf("%.3000s", got)
	}
	if t.Failed() {
		t.Logf("%.3000s", got)
	}

	// Of what runs itself there is nothing to show, by whatever name.
	for _, hash := range []string{first, first[:5]} {
		if got, err := w.s.preview(t.Context(), hash); got != "" || err != nil {
			t.Errorf("%s: %q %v", hash, got, err)
		}
	}
	_, err = w.s.preview(t.Context(), "abcdef0123")
	wantStatus(t, err, "Not Found", false)
	w.shows("local/etc/app.conf", "one\n")
	if left, _ := filepath.Glob(w.dir + "/tmp/*"); len(left) > 1 {
		t.Errorf("left behind: %q", left)
	}
}

// TestDiffBounds: of very much the beginning is told, and of too much nothing.
func TestDiffBounds(t *testing.T) {
	w := okWorld(t)
	if err := w.op("freeze", ""); err != nil {
		t.Fatal(err)
	}
	w.commit("etc/app.conf", strings.Repeat("0123456789\n", 100_000))
	w.reconcile()
	got, err := w.s.preview(t.Context(), "")
	if n := len(got); err != nil || n > diffTold+100 || !strings.HasSuffix(got, " bytes in all\n") {
		t.Errorf("%d bytes, %v: ...%q", n, err, got[max(0, n-100):])
	}
	w.commit("etc/app.conf", strings.Repeat("x", diffRead+1))
	w.reconcile()
	if got, err := w.s.preview(t.Context(), ""); !errorSays(err, "32 MiB at most") {
		t.Errorf("%.100q %v", got, err)
	}
	w.commit("etc", "")
	w.reconcile()
	_, err = w.s.preview(t.Context(), "")
	wantStatus(t, err, "Not Acceptable", false)
}

// TestDiffEdits: edits that were kept are named with their sizes, and what is the user's is not looked into.
func TestDiffEdits(t *testing.T) {
	w := okWorld(t)
	w.write("local/etc/app.conf", "edited\x1b[31m\n")
	w.reconcile()
	w.write("local/etc/own/of/theirs", "beside\n")
	w.run("chown", "-R", "nobody", w.s.files.dir+"/etc/own")
	w.commit("etc/own", "a file in its place\n")
	w.reconcile()
	got, err := w.s.preview(t.Context(), "")
	lines := strings.Split(strings.TrimSpace(got), "\n")
	at := "# kept: " + w.s.files.dir + "/" + editsDir + "/000"
	if err != nil || len(lines) != 2 || !strings.HasPrefix(lines[0], at) || !strings.HasPrefix(lines[1], at) {
		t.Fatalf("%q %v", got, err)
	}
	if !strings.HasSuffix(lines[0], "/etc/app.conf, 12 bytes") || !strings.Contains(lines[1], "/own/of, ") {
		t.Errorf("%q", got)
	}

	dir := w.s.files.dir + "/" + editsDir + "/0003-20260101T000000Z"
	for i := range 300 {
		w.write(strings.TrimPrefix(dir, w.dir+"/")+fmt.Sprintf("/etc/\x1b%d", i), "")
	}
	got, _ = w.s.preview(t.Context(), "")
	isCut := strings.HasSuffix(got, "\n# and 202 more\n") && strings.Count(got, "\n") == 101
	if strings.Contains(got, "\x1b") || !isCut {
		t.Errorf("%s", got)
	}
}

// TestDiffOverSSH: as text, for keys that may write.
func TestDiffOverSSH(t *testing.T) {
	w := okWorld(t)
	if err := w.op("freeze", ""); err != nil {
		t.Fatal(err)
	}
	hash := w.commit("etc/app.conf", "two\n")
	w.reconcile()
	f := newSSHFixture(t, func(f *sshFixture) { f.services = append(f.services, w.s) })
	for _, words := range []string{"", " " + strings.ToUpper(hash)} {
		command := "/list/diff svc.service" + words
		out, errs, status := f.ask(f.client(f.rw), command)
		if status != 0 || errs != "" || !strings.HasSuffix(out, "@@ -1 +1 @@\n-one\n+two\n") {
			t.Errorf("%d %q %q", status, out, errs)
		}
	}
	for command, want := range map[string]string{
		"/list/diff svc.service xyz1": "Bad Request: hash \"xyz1\": want 4 to 64 hex digits\n",
		"/list/diff nope":             "Not Found: no service \"nope\" on here.example.org\n",
		"/list/diff":                  "Bad Request: usage: /list/diff SERVICE [HASH]\n",
		"/list/log":                   "Bad Request: usage: /list/log SERVICE\n",
		"/list/log nope":              "Not Found: no service \"nope\" on here.example.org\n",
	} {
		if out, errs, status := f.ask(f.client(f.rw), command); status != 1 || out != "" || errs != want {
			t.Errorf("%s: %d %q %q", command, status, out, errs)
		}
	}
	w.commit("etc/app.conf", strings.Repeat("0123456789\n", 100_000))
	w.reconcile()
	out, errs, status := f.stock(f.options("rw", "127.0.0.1", "/list/diff svc.service")...)
	if status != 0 || len(out) < diffTold-100 || !strings.HasSuffix(out, " bytes in all\n") {
		t.Errorf("much: %d, %d bytes, %q", status, len(out), errs)
	}
	w.back("HEAD^")
	w.git(w.work, "push", "-q", "-f", "origin", "HEAD:main")
	w.reconcile()
	out, errs, status = f.ask(f.client(f.ro), "/list/log svc.service")
	if status != 0 || errs != "" || !strings.Contains(out, `"pending":[{"hash":"`+hash) {
		t.Errorf("%d %q %q", status, out, errs)
	}
}
