//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"sync"
	"testing"
	"time"
)

// logged returns what is logged until the test ends.
func logged(t *testing.T) *lockedBuffer {
	log, old := &lockedBuffer{}, slog.Default()
	slog.SetDefault(slog.New(slog.NewTextHandler(log, nil)))
	t.Cleanup(func() { slog.SetDefault(old) })
	return log
}

// wantLines fails unless so many lines of a log hold a text, none of them longer than 4000 bytes.
func wantLines(t *testing.T, log *lockedBuffer, n int, text string) {
	t.Helper()
	got := 0
	for line := range strings.Lines(log.String()) {
		if strings.Contains(line, text) {
			got++
		}
		if len(line) > 4000 {
			t.Errorf("a line of %d bytes: %.200s", len(line), line)
		}
	}
	if got != n {
		t.Errorf("%q is in %d lines, want %d:\n%.5000s", text, got, n, log)
	}
}

// TestFirstStartTogether: many services make the same directories at the same moment, and all get them.
func TestFirstStartTogether(t *testing.T) {
	f := newFleet(t, 8)
	for round := range 300 {
		var makers sync.WaitGroup
		for i := range 8 {
			makers.Go(func() {
				dir := fmt.Sprintf("%s/new/%d/a/b/c/%d", f.dir, round, i)
				p, err := makePlace(dir, aDirectory, account{uid: os.Getuid(), gid: os.Getgid()})
				if err != nil {
					t.Error(err)
				}
				p.close()
			})
		}
		makers.Wait()
	}

	for round := range 5 {
		f.spec.mount = fmt.Sprintf("%s/mount/%d/deep/er", f.dir, round)
		f.rise(8)
		if err := f.up.lookNow(t.Context(), false); err != nil {
			t.Fatal(err)
		}
		var passes sync.WaitGroup
		for i, s := range f.all {
			s.dirs[0].local = fmt.Sprintf("%s/local/%d/deep/er/%d", f.dir, round, i)
			passes.Go(func() { s.pass(context.Background()) })
		}
		passes.Wait()
		for _, s := range f.all {
			if st := s.Status(); st.State != "OK" {
				t.Errorf("%s: %s %s", st.Service, st.State, st.Info)
			}
		}
	}
}

// TestRefusalIsOneLine: whatever refused a commit, one line of the log says so, and none does again.
func TestRefusalIsOneLine(t *testing.T) {
	w := okWorld(t)
	log := logged(t)
	again := func() {
		w.reconcile()
		w.reconcile()
		w.restart()
		w.reconcile()
	}
	link := w.commit("one.conf", "")
	again()
	wantLines(t, log, 1, "commit "+link[:8])

	w.back("HEAD^")
	w.write("fake/reads", w.dir+"/local/etc/app.conf")
	fallback := w.commit("etc/app.conf", "bad\n")
	again()
	wantLines(t, log, 1, "commit "+fallback[:8])

	w.spec.check = []string{"false"}
	w.restart()
	check := w.commit("etc/app.conf", "refused\n")
	again()
	wantLines(t, log, 1, "commit "+check[:8])
}

// TestManyNames: thousands of edits are cut in info, log and answer, and their number is told.
func TestManyNames(t *testing.T) {
	w := okWorld(t)
	const n = 1000
	var names []string
	for i := range n {
		names = append(names, fmt.Sprintf("etc/%04d-%s", i, strings.Repeat("x", 200)), "one\n")
	}
	w.commit(names...)
	w.reconcile()
	w.want("OK", "", "one\n", "reload")
	if err := w.op("freeze", ""); err != nil {
		t.Fatal(err)
	}
	edit := func() {
		for i := 0; i < len(names); i += 2 {
			w.write("mount/svc.service/"+names[i], "edited\n")
		}
	}
	log := logged(t)
	edit()
	w.reconcile()
	w.want("FREEZE", " more", "one\n", "")
	wantLines(t, log, 1, "edited here: ")
	wantLines(t, log, 1, "and 995 more")
	if info := w.s.Status().Info; len(info) > 2000 {
		t.Errorf("an info of %d bytes: %.200s", len(info), info)
	}

	if err := w.op("unfreeze", ""); err != nil {
		t.Fatal(err)
	}
	w.want("OK", "", "one\n", "reload")
	wantLines(t, log, 1, "local edits undone")
	got, err := w.s.preview(t.Context(), "")
	if n := strings.Count(got, "\n"); err != nil || n != 101 || !strings.HasSuffix(got, "# and 900 more\n") {
		t.Errorf("%d lines, %v", n, err)
	}

	for i := range n {
		w.write(fmt.Sprintf("mount/svc.service/etc/own/%d", i), "somebody's\n")
	}
	var own []string
	for i := range n {
		own = append(own, fmt.Sprintf("etc/own/%d", i), "a commit's\n")
	}
	w.commit(own...)
	w.reconcile()
	w.want("OK", "", "one\n", "reload")
	wantLines(t, log, 1, "somebody's own was in the way")
}

// TestSomeOf: by number and by length.
func TestSomeOf(t *testing.T) {
	long := strings.Repeat("x", 600)
	for _, tc := range []struct {
		names []string
		want  string
	}{
		{nil, ""},
		{[]string{"a"}, "a"},
		{strings.Fields("1 2 3 4 5 6 7 8 9 10"), "1 2 3 4 5 6 7 8 9 10"},
		{strings.Fields("1 2 3 4 5 6 7 8 9 10 11 12"), "1 2 3 4 5 6 7 8 9 10 and 2 more"},
		{[]string{long, long, "a", "b"}, long + " " + long + " and 2 more"},
	} {
		if got := someOf(tc.names); got != tc.want {
			t.Errorf("%q, want %q", got, tc.want)
		}
	}
}

// TestFreezeWhenPinned: it is answered with OK, whatever the pin of before and the trouble that there is, and
// holds.
func TestFreezeWhenPinned(t *testing.T) {
	w, first, _, _ := threeCommits(t)
	for _, o := range []op{
		{verb: "freeze", who: "ann"},
		{verb: "freeze", who: "bob", reason: "why not", until: time.Now().Add(time.Hour)},
		{verb: "rollback", who: "ann", hash: first},
		{verb: "freeze", who: "cid"},
	} {
		if err := w.s.operate(t.Context(), o); err != nil {
			t.Errorf("%+v: %v", o, err)
		}
	}
	w.want("FREEZE", "cid", "one\n", "reload")
	w.write("fake/fail-reload", "")
	w.upstreamGoes()
	if err := w.op("freeze", ""); err != nil {
		t.Error(err)
	}
	w.runs(first)
}

// TestLongWordsAreCut: thousands of mistakes in one error are cut in info, log and answer, and what is
// private stays so.
func TestLongWordsAreCut(t *testing.T) {
	err := errors.New(strings.Repeat("mistake ", 10_000) + quote(strings.Repeat("private ", 10_000)))
	if got := errorLine(err, mayWrite); len(got) > 4000 {
		t.Errorf("%d bytes", len(got))
	}

	w := okWorld(t)
	log, old := &lockedBuffer{}, slog.Default()
	setLogger(log, slog.LevelInfo)
	defer slog.SetDefault(old)
	for _, text := range []string{err.Error(), quote(strings.Repeat("private ", 10_000))} {
		w.s.last = &outcome{err: errors.New(text)}
		w.s.publishStatus()
		st := w.s.Status()
		isCut := len(st.Info) < maxInfo+50 && strings.Contains(st.Info, " bytes more")
		if !isCut || strings.Contains(st.Public, "private") {
			t.Errorf("%d bytes: %.100s\n%.100s", len(st.Info), st.Info, st.Public)
		}
	}
	if n := len(log.String()); n > 2*(maxLine+100) || strings.Count(log.String(), "\n") != 2 {
		t.Errorf("%d bytes of log: %.300s", n, log)
	}
}
