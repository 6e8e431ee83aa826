//go:build linux

package main

import (
	"fmt"
	"math/rand"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestEdgeManifestIsLost: files that are as they should be are found to be so, and the unit is not called.
func TestEdgeManifestIsLost(t *testing.T) {
	w := okWorld(t)
	if err := os.Remove(manifestFile(w.dir+"/state", "svc.service")); err != nil {
		t.Fatal(err)
	}
	w.restart()
	w.reconcile()
	w.want("OK", "", "one\n", "")
	w.kept("etc/app.conf")
}

// TestEdgeManifestOfACommitThatIsGone: manifest, clone and the commit that ran are lost, and all comes right.
func TestEdgeManifestOfACommitThatIsGone(t *testing.T) {
	w := okWorld(t)
	first := w.head()
	w.commit("etc/app.conf", "two\n")
	w.reconcile()
	w.want("OK", "", "two\n", "reload")
	w.write("local/etc/app.conf", "precious\n")
	w.back(first)
	w.commit("etc/app.conf", "three\n")
	w.git(w.bare, "gc", "-q", "--prune=now")
	os.Remove(manifestFile(w.dir+"/state", "svc.service"))
	os.RemoveAll(w.up.dir)
	w.restart()
	w.reconcile()
	w.want("OK", "", "three\n", "reload")
	w.isSomewhere("precious")
}

// TestEdgeOtherUserWhilePinned lays the files out anew for the new user, as soon as upstream can be reached.
func TestEdgeOtherUserWhilePinned(t *testing.T) {
	for _, edit := range []string{"one\n", "precious\n"} {
		for _, away := range []bool{false, true} {
			t.Run(fmt.Sprintf("%.3s away=%v", edit, away), func(t *testing.T) {
				w := okWorld(t)
				w.op("freeze", "")
				w.write("local/etc/app.conf", edit)
				w.reconcile()
				w.asNobody()
				if away {
					w.upstreamGoes()
					w.restart()
					w.reconcile()
					w.shows("local/etc/app.conf", edit)
					w.upstreamComes()
				} else {
					w.restart()
				}
				w.reconcile()
				w.calls()
				w.want("FREEZE", "me", "one\n", "")
				w.shows("local/one.conf", "single\n")
				w.wantOwner(w.s.files.dir+"/etc", w.s.files.acct.uid)
				w.isSomewhere(strings.TrimSpace(edit))
			})
		}
	}
}

// TestEdgeOtherDirsOfWhatRuns: what changed dirs would show does not go live when the check refuses it.
func TestEdgeOtherDirsOfWhatRuns(t *testing.T) {
	for name, prepare := range map[string]func(w *world){
		"tracking": func(*world) {},
		"pinned":   func(w *world) { w.op("freeze", "") },
		"while upstream's commit is refused": func(w *world) {
			w.spec.check = w.nopeCheck()
			w.restart()
			w.commit("etc/app.conf", "nope\n")
			w.reconcile()
		},
	} {
		t.Run(name, func(t *testing.T) {
			w := okWorld(t)
			prepare(w)
			w.spec.dirs = append(w.spec.dirs, w.otherDir())
			w.spec.check = []string{"false"}
			w.boot()
			w.reconcile()
			if st := w.s.Status(); st.State != "DIFF" || w.read("local/other/file") == "x\n" {
				t.Errorf("%s %s: refused, and live", st.State, st.Info)
			}
			w.shows("local/etc/app.conf", "one\n")
		})
	}
}

// TestEdgeAttributesElsewhere: git status works where the repository has attributes outside the links.
func TestEdgeAttributesElsewhere(t *testing.T) {
	w := newWorld(t)
	w.commit(".gitattributes", "* text eol=crlf filter=x ident\n")
	w.reconcile()
	w.want("OK", "", "one\n", "reload")
	w.clean()
	w.commit("etc/app.conf", "two\n")
	w.reconcile()
	w.clean()
	w.git(w.s.files.dir, "log", "--oneline")
}

// TestHistoryRandom compares the checkout with an ordinary one after commits that change everything into
// everything.
func TestHistoryRandom(t *testing.T) {
	w := newWorld(t)
	w.spec.dirs[1].local, w.spec.action = "", ""
	w.restart()
	seed := time.Now().UnixNano()
	rng := rand.New(rand.NewSource(seed))
	t.Logf("seed %d", seed)
	names := []string{
		"etc/a", "etc/x y", "etc/-d", "etc/q*", "etc/é", "etc/d", "etc/d/e", "etc/d/e/f", "etc/d/g",
		"etc/.gitattributes", "etc/a/b", "etc/new\nline", "etc/\xff",
	}
	w.commit(".gitattributes", "* text eol=crlf filter=x ident\n")
	for i := range 60 {
		for range 1 + rng.Intn(4) {
			w.becomesAnother(names[rng.Intn(len(names))], rng)
		}
		w.run("find", w.work+"/etc", "-type", "d", "-empty", "-delete") // git has none
		w.push()
		w.reconcile()
		if st := w.s.Status(); st.State != "OK" {
			t.Fatalf("commit %d: %s %s", i, st.State, st.Info)
		}
		w.clean()
		w.run("diff", "-r", "--no-dereference", w.work+"/etc", w.dir+"/local/etc")
		if n := w.git(w.s.files.dir, "diff", "--raw", "HEAD"); n != "" {
			t.Fatalf("commit %d: %s", i, n)
		}
		if t.Failed() {
			t.Fatalf("commit %d", i)
		}
	}
}

// becomesAnother makes a path of the next commit a file, a program, a link, or nothing.
func (w *world) becomesAnother(path string, rng *rand.Rand) {
	w.t.Helper()
	name := filepath.Join(w.work, path)
	os.RemoveAll(name)
	for p := filepath.Dir(name); p != w.work; p = filepath.Dir(p) {
		if fi, err := os.Lstat(p); err == nil && !fi.IsDir() {
			os.Remove(p)
		}
	}
	os.MkdirAll(filepath.Dir(name), 0o755)
	isAttributes := filepath.Base(name) == ".gitattributes"
	text := fmt.Sprintf("%d $Id$\n", rng.Intn(9))
	if isAttributes {
		text = "* text eol=crlf ident\n"
	}
	var err error
	switch kind := rng.Intn(5); {
	case kind == 0:
	case kind == 1 && !isAttributes: // git warns of one that is a link
		err = os.Symlink([]string{"a", "d", "/nowhere"}[rng.Intn(3)], name)
	case kind == 2:
		err = os.WriteFile(name, fmt.Appendf(nil, "exec %d\n", rng.Intn(9)), 0o755)
	default:
		err = os.WriteFile(name, []byte(text), 0o644)
	}
	if err != nil {
		w.t.Fatal(err)
	}
}

// isSomewhere fails if a text that an administrator wrote is neither live nor kept.
func (w *world) isSomewhere(text string) {
	w.t.Helper()
	w.run("grep", "-rlq", text, w.dir+"/mount")
}
