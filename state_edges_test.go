package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

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
	if err == nil {
		err = os.WriteFile(file, data, 0o600)
	}
	if err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) op(verb, hash string) error {
	return w.s.operate(context.Background(), op{verb: verb, hash: hash, who: "me"})
}

// kept says whether a text that an administrator wrote is still somewhere: live, beside it, or in a patch.
func (w *world) kept(text string) {
	w.t.Helper()
	if out, _ := exec.Command("grep", "-rl", text, w.dir+"/mount", w.dir+"/state").Output(); len(out) == 0 {
		w.t.Errorf("%q is lost", text)
	}
}

// mounts returns what is mounted below the world, in order, hidden ones too.
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

// boot mounts what is there, as a start does.
func (w *world) boot() {
	w.restart()
	(&agent{}).mountFirst(context.Background(), []*Service{w.s})
}

// signedUpstream makes a world with signers, and a function that pushes a signed or an unsigned commit.
func signedUpstream(w *world) func(sign bool, pairs ...string) string {
	if out, err := exec.Command("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", w.dir+"/k").CombinedOutput(); err != nil {
		w.t.Fatalf("%v: %s", err, out)
	}
	w.write("signers", "good@x "+w.read("k.pub"))
	w.spec.signers = w.dir + "/signers"
	w.restart()
	return func(sign bool, pairs ...string) string {
		for i := 0; i+1 < len(pairs); i += 2 {
			w.write("work/"+pairs[i], pairs[i+1])
		}
		w.git(w.work, "add", "-A")
		args := []string{"-c", "gpg.format=ssh", "-c", "user.signingkey=" + w.dir + "/k", "commit", "-q", "-m", "c"}
		if sign {
			args = append(args, "-S")
		}
		w.git(w.work, args...)
		w.git(w.work, "push", "-q", "-f", "origin", "HEAD:main")
		return w.git(w.work, "rev-parse", "HEAD")
	}
}

// asNobody makes the user nobody own the upstream, and reach it.
func (w *world) asNobody() {
	w.t.Helper()
	for p := w.dir; p != "/"; p = filepath.Dir(p) {
		if fi, err := os.Stat(p); err == nil && fi.Mode()&0o005 != 0o005 {
			os.Chmod(p, fi.Mode()|0o005)
		}
	}
	if out, err := exec.Command("chown", "-R", "nobody", w.up).CombinedOutput(); err != nil {
		w.t.Fatalf("%v: %s", err, out)
	}
	w.spec.user = "nobody"
}

// TestEdges has what went wrong once where two rare things came together. Each starts with a service that is OK on "one".
func TestEdges(t *testing.T) {
	check := func(w *world) []string {
		return []string{"sh", "-c", "! grep -q nope " + w.dir + "/local/etc/app.conf"}
	}
	for name, run := range map[string]func(w *world){
		"clock set back: looks count": func(w *world) {
			w.editRecord(func(r *record) { r.LastLook = time.Now().Add(48 * time.Hour) })
			w.restart()
			w.commit("etc/app.conf", "two\n")
			w.reconcile()
			w.want("OK", "", "two\n", "reload")
		},
		"clock set back: edits are undone": func(w *world) {
			w.editRecord(func(r *record) { r.DriftUndone = time.Now().Add(48 * time.Hour) })
			w.restart()
			w.write("local/etc/app.conf", "edit\n")
			w.reconcile()
			w.want("OK", "", "one\n", "reload")
		},
		"clock set back: the new patch stays": func(w *world) {
			d := "state/patches/" + w.spec.service
			for i := range 20 {
				w.write(fmt.Sprintf("%s/20990101T000000.0000000%02dZ.patch", d, i), "x")
			}
			w.write("local/etc/app.conf", "precious\n")
			w.reconcile()
			w.want("OK", "", "one\n", "reload")
			w.kept("precious")
			if e, _ := os.ReadDir(w.dir + "/" + d); len(e) != 20 {
				w.t.Errorf("%d patches", len(e))
			}
		},
		"a record is lost twice": func(w *world) {
			w.write("state/services/svc.service.json", "{")
			w.commit("etc/app.conf", "two\n")
			w.restart()
			w.restart()
			w.reconcile()
			w.want("FREEZE", "state lost", "one\n", "reload")
		},
		"a record is lost, and refs are packed": func(w *world) {
			var b strings.Builder
			for i := range 12000 {
				fmt.Fprintf(&b, "create %s%040x %s\n", ranRefs, i+1, w.s.rec.Live)
			}
			cmd := exec.Command("git", "update-ref", "--stdin")
			cmd.Dir, cmd.Stdin = w.s.repo.dir, strings.NewReader(b.String())
			if out, err := cmd.CombinedOutput(); err != nil {
				w.t.Fatalf("%v: %s", err, out)
			}
			w.git(w.s.repo.dir, "pack-refs", "--all")
			w.write("state/services/svc.service.json", "{")
			w.commit("etc/app.conf", "two\n")
			w.restart()
			w.reconcile()
			w.want("FREEZE", "state lost", "one\n", "reload")
		},
		"killed between HEAD and record, then a refused tip": func(w *world) {
			w.spec.check = check(w)
			old, h := w.s.rec, w.commit("etc/app.conf", "two\n")
			w.restart()
			w.reconcile()
			w.calls()
			w.editRecord(func(r *record) {
				r.Live, r.Content, r.Publishing, r.Told, r.Good, r.GoodContent = old.Live, old.Content, []string{h}, "", old.Good, old.GoodContent
			})
			w.commit("etc/app.conf", "nope\n")
			w.restart()
			w.reconcile()
			w.want("DIFF", "check", "two\n", "reload")
		},
		"killed in a fallback, between HEAD and record": func(w *world) {
			w.write("fake/reads", w.dir+"/local/etc/app.conf")
			good, bad, badContent := w.s.rec, w.commit("etc/app.conf", "bad\n"), ""
			w.s.step = func(st string) {
				if strings.HasPrefix(st, "fall back") {
					badContent = w.s.rec.Content
				}
			}
			w.reconcile()
			w.want("BROKEN", "taken back", "one\n", "reload, reload")
			w.editRecord(func(r *record) {
				r.Live, r.Content, r.Publishing, r.Told = bad, badContent, []string{good.Live}, ""
			})
			w.write("fake/svc.service", "failed")
			w.restart()
			w.reconcile()
			w.want("BROKEN", "taken back", "one\n", "reset-failed, start")
		},
		"other dirs while the tip is refused": func(w *world) {
			w.spec.check = check(w)
			w.restart()
			w.commit("etc/app.conf", "nope\n")
			w.reconcile()
			w.want("DIFF", "check", "one\n", "")
			w.spec.dirs = []dir{w.spec.dirs[0], {local: w.dir + "/local/other", link: "other"}}
			w.boot()
			w.reconcile()
			w.want("DIFF", "check", "one\n", "reload")
			if w.read("local/other/file") != "x\n" || lexists(w.dir+"/local/one.conf") {
				w.t.Errorf("mounts: %v", w.mounts())
			}
			w.editRecord(func(r *record) { r.Boot = "another" })
			w.boot()
			w.reconcile()
			w.want("DIFF", "check", "one\n", "reload")
		},
		"other dirs while pinned are checked": func(w *world) {
			w.op("freeze", "")
			w.spec.dirs = append(w.spec.dirs, dir{local: w.dir + "/local/other", link: "other"})
			w.spec.check = []string{"false"}
			w.boot()
			w.reconcile()
			if st := w.s.Status(); st.State != "DIFF" || w.read("local/other/file") == "x\n" {
				w.t.Errorf("%s %s: refused, and live", st.State, st.Info)
			}
		},
		"another link is checked before it is mounted": func(w *world) {
			w.spec.dirs = []dir{{local: w.dir + "/local/etc", link: "etc/sub"}}
			w.spec.check = []string{"false"}
			w.boot()
			w.reconcile()
			w.want("DIFF", "check", "one\n", "")
		},
		"dirs change, and a link is a directory now": func(w *world) {
			os.Remove(w.work + "/one.conf")
			w.commit("one.conf/in", "x\n")
			w.spec.check = []string{"grep", "-q", "x", w.dir + "/local/one/in"}
			w.spec.dirs = []dir{w.spec.dirs[0], {local: w.dir + "/local/one", link: "one.conf"}}
			w.boot()
			w.reconcile()
			w.want("OK", "", "one\n", "reload")
		},
		"a file where a tracked directory was": func(w *world) {
			os.RemoveAll(w.dir + "/local/etc/sub")
			w.write("local/etc/sub", "precious\n")
			w.reconcile()
			w.kept("precious")
			w.want("OK", "", "one\n", "reload")
			if got := w.read("local/etc/sub/deep"); got != "deep\n" {
				w.t.Errorf("deep: %q", got)
			}
		},
		"a file becomes a submodule, and one again": func(w *world) {
			w.commit("etc/mod", "file\n")
			w.reconcile()
			w.git(w.work, "rm", "-q", "etc/mod")
			w.git(w.work, "update-index", "--add", "--cacheinfo", "160000,"+w.git(w.work, "rev-parse", "HEAD")+",etc/mod")
			os.Mkdir(w.work+"/etc/mod", 0o755)
			w.write("work/etc/zzz", "z\n")
			w.push()
			w.reconcile()
			w.clean()
			if got := w.read("local/etc/zzz"); got != "z\n" {
				w.t.Errorf("zzz: %q", got)
			}
			w.git(w.work, "rm", "-q", "--cached", "etc/mod")
			os.Remove(w.work + "/etc/mod")
			w.commit("etc/mod", "file\n")
			w.reconcile()
			w.clean()
			if got := w.read("local/etc/mod"); got != "file\n" {
				w.t.Errorf("mod: %q", got)
			}
		},
		"edits of what dirs no longer name": func(w *world) {
			w.write("local/one.conf", "precious\n")
			w.spec.dirs = w.spec.dirs[:1]
			w.boot()
			w.reconcile()
			w.want("OK", "", "one\n", "reload")
			w.kept("precious")
		},
		"edits under a pin outlive other dirs and another branch": func(w *world) {
			w.git(w.work, "push", "-q", "origin", "HEAD:canary")
			w.op("freeze", "")
			w.write("local/etc/app.conf", "emergency\n")
			w.reconcile()
			w.spec.branch = "canary"
			w.restart()
			w.reconcile()
			w.want("FREEZE", "edited here", "emergency\n", "")
			w.spec.dirs = append(w.spec.dirs, dir{local: w.dir + "/local/other", link: "other"})
			w.restart()
			w.reconcile()
			w.want("FREEZE", "edited here", "emergency\n", "reload")
		},
		"edits under a pin outlive an unfreeze that failed": func(w *world) {
			w.op("freeze", "")
			w.write("local/etc/app.conf", "emergency\n")
			w.reconcile()
			os.Rename(w.dir+"/state/services", w.dir+"/state/away")
			w.write("state/services", "x")
			if w.op("unfreeze", "") == nil {
				w.t.Error("unfrozen, though it can't be remembered")
			}
			os.Remove(w.dir + "/state/services")
			os.Rename(w.dir+"/state/away", w.dir+"/state/services")
			w.reconcile()
			w.want("FREEZE", "edited here", "emergency\n", "")
			ctx, cancel := context.WithCancel(context.Background())
			w.s.operate(ctx, op{verb: "unfreeze", who: "me", step: func(s string) { cancel() }})
			if err := w.op("freeze", ""); err != nil {
				w.t.Error(err)
			}
			w.want("FREEZE", "edited here", "emergency\n", "")
		},
		"edits are undone once an interval, whatever is pushed elsewhere": func(w *world) {
			for i, edit := range []string{"edit\n", "edit2\n"} {
				w.write("local/etc/app.conf", edit)
				w.reconcile()
				w.want("OK", "", []string{"one\n", "edit2\n"}[i], []string{"reload", ""}[i])
			}
			h := w.commit("other/file", "y\n")
			w.reconcile()
			w.want("OK", "", "edit2\n", "")
			if w.s.rec.Live != h {
				w.t.Errorf("hash %s, want %s", w.s.rec.Live, h)
			}
		},
		"an edit in the middle of a publish": func(w *world) {
			for _, text := range []string{"x", "y"} {
				for i := range 500 {
					w.write(fmt.Sprintf("work/etc/many/%d", i), text)
				}
				w.push()
				if text == "x" {
					w.reconcile()
				}
			}
			w.commit("etc/app.conf", "two\n")
			done := make(chan struct{})
			go func() {
				defer close(done)
				for end := time.Now().Add(20 * time.Second); time.Now().Before(end); time.Sleep(time.Millisecond) {
					if w.read("local/etc/app.conf") == "two\n" {
						w.write("local/etc/app.conf", "precious\n")
						return
					}
				}
			}()
			w.reconcile()
			<-done
			w.s.rec.DriftUndone = time.Time{}
			w.reconcile()
			w.want("OK", "", "two\n", "reload, reload, reload")
			w.kept("precious")
		},
		"what root saved over a user's file": func(w *world) {
			w.asNobody()
			w.restart()
			w.reconcile()
			w.calls()
			os.Remove(w.dir + "/local/etc/app.conf")
			os.WriteFile(w.dir+"/local/etc/app.conf", []byte("precious\n"), 0o600)
			os.Chown(w.dir+"/local/etc/sub", 0, 0)
			os.Chmod(w.dir+"/local/etc/sub", 0o700)
			w.reconcile()
			w.reconcile()
			w.want("OK", "", "one\n", "reload")
			w.kept("precious")
		},
		"another user, while upstream is away": func(w *world) {
			w.op("freeze", "")
			w.asNobody()
			os.Rename(w.up, w.up+".away")
			w.restart()
			w.reconcile()
			w.want("FREEZE", "me", "one\n", "")
		},
		"locals are moved up, down, and change their kind": func(w *world) {
			for _, d := range []dir{{local: "a/b", link: "etc"}, {local: "a", link: "etc"}, {local: "a/b", link: "other"}, {local: "a/b", link: "one.conf", file: true}, {local: "a/b", link: "etc"}} {
				d.local = w.dir + "/local/" + d.local
				w.spec.dirs = []dir{d}
				w.boot()
				w.reconcile()
				if st := w.s.Status(); st.State != "OK" || !shows(w.s.repo.dir, d.link, d.local) || len(w.mounts()) != 1 {
					w.t.Errorf("%v: %s %s: %v", d, st.State, st.Info, w.mounts())
				}
			}
			if got := w.git(w.s.repo.dir, "status", "--porcelain", "--ignored"); got != "" {
				w.t.Errorf("git status: %s", got)
			}
		},
		"another mount while upstream is away, and back": func(w *world) {
			mount, live := w.spec.mount, w.s.rec.Live
			os.Rename(w.up, w.up+".away")
			w.spec.mount = w.dir + "/mount2"
			w.boot()
			w.reconcile()
			w.write("local/etc/app.conf", "precious\n")
			w.spec.mount = mount
			w.boot()
			w.reconcile()
			if w.s.rec.Live != live {
				w.t.Errorf("runs %q, want %s", w.s.rec.Live, live)
			}
			os.Rename(w.up+".away", w.up)
			w.commit("one.conf", "x\n")
			w.reconcile()
			w.kept("precious")
		},
		"edits are kept once, however often a publish fails": func(w *world) {
			d := w.dir + "/state/patches/" + w.spec.service
			w.write("local/etc/app.conf", "precious\n")
			for range 3 {
				if err := w.s.keepPatch(context.Background(), w.s.rec.Live, []string{"etc/app.conf"}); err != nil {
					w.t.Fatal(err)
				}
			}
			if e, _ := os.ReadDir(d); len(e) != 1 {
				w.t.Errorf("%d files", len(e))
			}
			os.RemoveAll(d)
			if err := w.s.keepPatch(context.Background(), w.s.rec.Live, []string{"etc/app.conf"}); err != nil {
				w.t.Fatal(err)
			}
			w.kept("+precious")
			w.write("local/etc/app.conf", "precious, too\n")
			w.reconcile()
			if e, _ := os.ReadDir(d); len(e) != 2 {
				w.t.Errorf("%d files", len(e))
			}
			w.kept("precious, too")
		},
		"no dirs": func(w *world) {
			w.spec.dirs = nil
			w.restart()
			w.reconcile()
			w.commit("etc/app.conf", "two\n")
			w.reconcile()
			if e, _ := filepath.Glob(w.s.repo.dir + "/*"); len(e) != 1 || w.s.Status().State != "OK" {
				w.t.Errorf("%+v %v", *w.s.Status(), e)
			}
		},
		"an origin of somebody's own": func(w *world) {
			w.git(w.dir, "clone", "-q", "--bare", w.up, w.dir+"/other.git")
			w.git(w.s.repo.dir, "remote", "set-url", "origin", w.dir+"/other.git")
			w.commit("etc/app.conf", "two\n")
			w.reconcile()
			w.want("OK", "", "two\n", "reload")
		},
		"an empty HEAD, and upstream away": func(w *world) {
			w.op("freeze", "")
			w.write("mount/svc.service/.git/HEAD", "")
			os.Rename(w.up, w.up+".away")
			w.restart()
			w.reconcile()
			w.want("FREEZE", "me", "one\n", "")
			w.clean()
		},
		"git refuses a path outside the links": func(w *world) {
			mktree := func(entries string) string {
				cmd := exec.Command("git", "mktree")
				cmd.Dir, cmd.Stdin = w.work, strings.NewReader(entries+"\n")
				out, err := cmd.Output()
				if err != nil {
					w.t.Fatal(err)
				}
				return strings.TrimSpace(string(out))
			}
			w.commit("etc/app.conf", "two\n")
			evil := mktree("040000 tree " + w.git(w.work, "rev-parse", "HEAD:etc") + "\t.git")
			top := mktree(w.git(w.work, "ls-tree", "HEAD") + "\n040000 tree " + evil + "\tzz")
			w.git(w.work, "push", "-q", "-f", "origin", w.git(w.work, "commit-tree", "-p", "HEAD~1", "-m", "evil", top)+":main")
			w.reconcile()
			w.want("DIFF", "invalid path 'zz/.git/", "one\n", "")
			w.clean()
			w.git(w.work, "push", "-q", "-f", "origin", "HEAD:main")
			w.reconcile()
			w.want("OK", "", "two\n", "reload")
		},
		"a rollback to an unsigned commit of the same content": func(w *world) {
			commit := signedUpstream(w)
			commit(true, "etc/app.conf", "two\n")
			w.reconcile()
			w.want("OK", "", "two\n", "reload")
			if h := commit(false, "other/file", "evil\n"); w.op("rollback", h) == nil {
				w.t.Error("carried out")
			}
		},
		"a sibling of what a rollback brought": func(w *world) {
			commit := signedUpstream(w)
			first := commit(true, "etc/app.conf", "1\n")
			w.reconcile()
			w.op("freeze", "")
			second := commit(true, "etc/app.conf", "2\n")
			commit(true, "etc/app.conf", "3\n")
			w.reconcile()
			if err := w.op("rollback", second); err != nil {
				w.t.Fatal(err)
			}
			w.git(w.work, "reset", "-q", "--hard", first)
			commit(true, "etc/app.conf", "sibling\n")
			w.calls()
			w.op("unfreeze", "")
			w.want("DIFF", "does not descend from", "2\n", "")
		},
		"the signers file comes right": func(w *world) {
			commit := signedUpstream(w)
			good := w.read("signers")
			w.write("signers", "garbage\n")
			commit(true, "etc/app.conf", "two\n")
			w.reconcile()
			w.want("DIFF", "is not signed by one of", "one\n", "")
			w.write("signers", good)
			w.reconcile()
			w.want("OK", "", "two\n", "reload")
		},
		"a full disk is named": func(w *world) {
			w.write("mount2/x", "")
			if err := syscall.Mount("tmpfs", w.dir+"/mount2", "tmpfs", 0, "size=1m"); err != nil {
				w.t.Fatal(err)
			}
			w.spec.mount = w.dir + "/mount2"
			w.restart()
			w.reconcile()
			w.calls()
			w.commit("etc/app.conf", strings.Repeat("0123456789abcdef", 1<<17))
			w.reconcile()
			w.want("DIFF", "no space left on device", "one\n", "")
		},
		"patches of a unit with a backslash in its name": func(w *world) {
			w.spec.service = `a\x2db.service`
			w.restart()
			w.reconcile()
			d := "state/patches/" + w.spec.service
			for i := range 25 {
				w.write(fmt.Sprintf("%s/20200101T000000.0000000%02dZ.patch", d, i), "x")
			}
			w.write("local/etc/app.conf", "precious\n")
			w.reconcile()
			if e, _ := os.ReadDir(w.dir + "/" + d); len(e) != 20 {
				w.t.Errorf("%d patches", len(e))
			}
		},
		"a first commit that is refused costs nothing later": func(w *world) {
			w.spec.service, w.spec.check, w.spec.dirs = "b.service", []string{"false"}, []dir{{link: "etc"}}
			w.restart()
			w.reconcile()
			before := gitRuns()
			w.reconcile()
			if n := gitRuns() - before; n != 1 {
				w.t.Errorf("an idle round runs git %v times", n)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			w.reconcile()
			w.want("OK", "", "one\n", "reload")
			run(w)
		})
	}
}

// TestTwoServicesSwapLocals: no mount stays hidden below another.
func TestTwoServicesSwapLocals(t *testing.T) {
	w := newWorld(t)
	for _, locals := range [][2]string{{"1", "2"}, {"2", "1"}, {"3", "1"}, {"3", "4"}, {"4", "5"}, {"6", "5"}, {"", "6"}} {
		var services []*Service
		for i, l := range locals {
			if l == "" {
				continue
			}
			sp := w.spec
			sp.service, sp.dirs = fmt.Sprintf("s%d.service", i), []dir{{local: w.dir + "/local/" + l, link: []string{"etc", "other"}[i]}}
			services = append(services, newService(sp, w.dir+"/state", time.Hour))
		}
		a := &agent{options: options{stateDir: w.dir + "/state"}}
		a.retire(services)
		a.mountFirst(context.Background(), services)
		if err := lookAt(context.Background(), services); err != nil {
			t.Fatal(err)
		}
		for _, s := range services {
			s.pass(context.Background())
			if d := s.dirs[0]; s.Status().State != "OK" || !shows(s.repo.dir, d.link, d.local) {
				t.Errorf("%v: %+v", locals, *s.Status())
			}
		}
		if got := w.mounts(); len(got) != len(services) {
			t.Errorf("%v: mounts %v", locals, got)
		}
	}
}

// TestFailingLookIsNotHurried: before there is a checkout, a look that fails is repeated with a growing wait.
func TestFailingLookIsNotHurried(t *testing.T) {
	w := newWorld(t)
	w.s.branch, w.s.repo.branch = "nope", "nope"
	ctx, cancel := context.WithCancel(context.Background())
	defer func() { cancel(); <-w.s.ended }()
	before := gitRuns()
	go w.s.run(ctx)
	go watchUpstream(ctx, []*Service{w.s}, time.Hour)
	eventually(t, "state", func() bool { return strings.Contains(w.s.Status().Info, `branch "nope" does not exist`) }, 10*time.Second)
	time.Sleep(time.Second) // as long as it takes to see a hurry
	if n := gitRuns() - before; n > 2 {
		t.Errorf("git ran %v times", n)
	}
}

// TestCommandsGoBeforePulls: a freeze waits neither for a pull's look, nor for pulls that came before it.
func TestCommandsGoBeforePulls(t *testing.T) {
	w := newWorld(t)
	w.reconcile()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	w.s.upstream = "http://" + l.Addr().String() + "/x" // takes connections, and never answers
	ctx, cancel := context.WithCancel(context.Background())
	defer func() { cancel(); <-w.s.ended }()
	go w.s.run(ctx)
	looking := make(chan bool, 2)
	pull := func() {
		w.s.do(ctx, op{verb: "pull", step: func(string) { looking <- true }})
	}
	go pull()
	<-looking
	for range 2 {
		go pull()
	}
	frozen := make(chan error)
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

// TestOwnEndIsTold: what our end interrupted says so.
func TestOwnEndIsTold(t *testing.T) {
	ctx, end := context.WithCancelCause(context.Background())
	end(ending{"terminated", 0})
	if err := interrupted(ctx); err.Error() != "gitopper is stopping: terminated" {
		t.Error(err)
	}
}
