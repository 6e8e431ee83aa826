//go:build linux

package main

import (
	"fmt"
	"os"
	"strings"
	"testing"
)

// TestRollbackToAnyCommit goes back to commits of the branch's history that never ran here, or did so before
// all that is remembered; also to those that change nothing of the service's, and to those of a merged branch.
func TestRollbackToAnyCommit(t *testing.T) {
	w := newWorld(t)
	type state struct{ commit, text string }
	history := []state{{w.head(), "one\n"}}
	add := func(text string) {
		c := w.commit("etc/app.conf", text, "other/file", fmt.Sprint(len(history)))
		history = append(history, state{c, text})
	}
	add("one\n")
	add("two\n")
	add("two\n")
	w.reconcile()
	side := w.head()
	for i := range 4 {
		add(fmt.Sprintf("v%d\n", i/2))
		w.reconcile()
	}
	w.git(w.work, "checkout", "-q", "-b", "side", side)
	add("side\n")
	w.git(w.work, "checkout", "-q", "-")
	w.git(w.work, "reset", "-q", "--hard", history[len(history)-2].commit)
	w.git(w.work, "merge", "-q", "-s", "ours", "-m", "merge", "side")
	add("last\n")
	w.reconcile()
	w.editRecord(func(r *record) { r.Ran = r.Ran[len(r.Ran)-2:] })
	w.restart()

	for i, want := range history {
		digits := []int{8, 40}[i%2]
		if err := w.op("rollback", want.commit[:digits]); err != nil {
			t.Errorf("to %d: %v", i, err)
		}
		for range 2 {
			w.runs(want.commit)
			w.shows("local/etc/app.conf", want.text)
			w.clean()
			w.restart()
			w.reconcile()
		}
		w.calls()
		w.want("FREEZE", "ROLLBACK: "+want.commit[:8], want.text, "")
	}
}

// TestRollbackToWhatIsLive works also where a kill came before the record knew that it ran, and with neither
// clone nor upstream.
func TestRollbackToWhatIsLive(t *testing.T) {
	w := okWorld(t)
	live := w.commit("etc/app.conf", "two\n")
	w.reconcile()
	w.upstreamGoes()
	w.editRecord(func(r *record) { r.Ran = r.Ran[:1] })
	if err := os.RemoveAll(w.dir + "/state/upstreams"); err != nil {
		t.Fatal(err)
	}
	w.restart()
	w.calls()
	if err := w.op("rollback", live[:8]); err != nil {
		t.Error(err)
	}
	w.want("FREEZE", "ROLLBACK: "+live[:8], "two\n", "")
}

// TestRollbackNames: what an operator's hash does not name is told as what it is, and changes nothing.
func TestRollbackNames(t *testing.T) {
	w := okWorld(t)
	first := map[string]string{}
	twice := ""
	for i := 0; twice == ""; i++ { // until two commits begin alike
		w.git(w.work, "commit", "-q", "--allow-empty", "-m", fmt.Sprint(i))
		c := w.head()
		if first[c[:4]] != "" {
			twice = c[:4]
		}
		first[c[:4]] = c
	}
	w.push()
	w.reconcile()
	w.want("OK", "", "one\n", "")
	stray := w.commit("etc/app.conf", "stray\n")
	w.back(stray + "^")
	w.push()

	says := func(hash, want string) {
		t.Helper()
		err := w.op("rollback", hash)
		status, words, _ := strings.Cut(want, ": ")
		wantStatus(t, err, status, false)
		if !errorSays(err, words) {
			t.Errorf("%v, want %q", err, words)
		}
	}
	says(twice, "Bad Request: more than one commit begins with "+twice+", give more digits: "+twice)
	for _, hash := range []string{"0000000", stray, strings.Repeat("0", 40), strings.Repeat("0", 64)} {
		says(hash, "Not Found: no such commit: "+hash+" is not in the history of main, nor did it run here")
	}
	w.upstreamGoes()
	says("0000000", "Not Found: run here; newer ones are not known: git ls-remote")
	w.run("rm", "-rf", w.up.objectsDir())
	for r := w.up.clone.spareReader(); r != nil; r = w.up.clone.spareReader() {
		r.end() // it has the files open, and would answer for a moment more
	}
	says("0000000", "Internal Server Error: not a git repository")
	w.want("OK", "", "one\n", "")
}

// TestRollbackSHA256 takes all 64 digits.
func TestRollbackSHA256(t *testing.T) {
	w := newWorld(t)
	w.run("rm", "-rf", w.bare, w.work)
	w.makeUpstream("--object-format=sha256")
	first := w.commit("etc/app.conf", "one\n", "one.conf", "single\n")
	w.commit("etc/app.conf", "two\n")
	w.reconcile()
	w.want("OK", "", "two\n", "reload")
	if err := w.op("rollback", first); err != nil || len(first) != 64 {
		t.Error(err)
	}
	w.want("FREEZE", "ROLLBACK: "+first[:8], "one\n", "reload")
	w.wantPending("c")
	got, err := w.s.preview(t.Context(), "")
	if err != nil || !strings.HasSuffix(got, "@@ -1 +1 @@\n-one\n+two\n") {
		t.Errorf("%v: %s", err, got)
	}
}
