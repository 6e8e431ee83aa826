//go:build linux

package main

import (
	"fmt"
	"reflect"
	"strconv"
	"strings"
	"testing"
	"time"

	"gitopper/ctl"
)

// log returns what /list/log answers to a key.
func (w *world) log(write bool) ctl.Log {
	w.t.Helper()
	s := &sshServer{services: []*Service{w.s}}
	words := []string{"/list/log", "svc.service"}
	answer, err := s.listLog(w.t.Context(), &sshConn{who: visitor{write: write}}, words, nil)
	if err != nil {
		w.t.Fatal(err)
	}
	return answer.(ctl.Log)
}

// wantRan compares what ran with lines HASH BY|OUTCOME, the newest first, of which the outcome is a beginning.
func (w *world) wantRan(want ...string) {
	w.t.Helper()
	var got []string
	log := w.log(true)
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
	for _, c := range w.log(false).Pending {
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
	if err := w.s.operate(t.Context(), op{verb: "rollback", hash: first[:8], who: "ann (ops@::1)", reason: "a test"}); err != nil {
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
	if log := fmt.Sprint(w.log(false).Ran); strings.Contains(log, "config line 1") {
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

// TestLastRan: the last fifty, and what is needed for the last fifty commits.
func TestLastRan(t *testing.T) {
	var all []ran
	add := func(commit string) { all = lastRan(append(all, ran{version: version{Commit: commit}})) }
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
	log := w.log(false)
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
	w.upstreamGoes()
	w.reconcile()
	w.wantPending("one", "two  [31mof  it")
	if got := date(w.s.Status().Committed); got != w.date(first) {
		t.Errorf("committed %s, want %s", got, w.date(first))
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
	if log := w.log(true); w.s.Status().Pending != 1 || log.More != 1 || len(log.Pending) != 0 {
		t.Errorf("gone back: %d, %+v", w.s.Status().Pending, log)
	}
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
	w.write("commits", commits.String())
	w.run("sh", "-c", "git -C "+w.bare+" fast-import --quiet <"+w.dir+"/commits")
	w.reconcile()
	log := w.log(false)
	if n := w.s.Status().Pending; n != 3000 || len(log.Pending) != 50 || log.More != 2950 {
		t.Errorf("%d pending, %d told, %d more", n, len(log.Pending), log.More)
	}
}
