//go:build linux

package main

import (
	"encoding/json"
	"os"
	"reflect"
	"strings"
	"syscall"
	"testing"
	"time"
)

// oldClone makes the checkout that the gitopper of 2022 would have: a cone-mode clone with a stash.
func (w *world) oldClone() (clone string) {
	w.t.Helper()
	clone = w.dir + "/mount/svc.service"
	w.git(w.dir, "clone", "-q", "-b", "main", "--filter=blob:none", "--no-checkout", "--sparse",
		w.spec.upstream, clone)
	w.git(clone, "sparse-checkout", "set", "--cone", "etc")
	w.git(clone, "checkout", "-q", "main")
	w.write("mount/svc.service/etc/app.conf", "stashed\n")
	w.git(clone, "stash", "-q")
	return clone
}

// TestStateTakesOver2022: a host of the gitopper of 2022, one of whose file mounts shows an outdated file.
func TestStateTakesOver2022(t *testing.T) {
	w := newWorld(t)
	clone := w.oldClone()
	w.spec.dirs = []dir{
		{local: w.dir + "/local/etc", link: "etc"},
		{local: w.dir + "/local/file", link: "etc/sub/deep", kind: aFile},
	}
	w.write("local/etc/below", "hidden by the mount\n")
	w.write("local/file", "")
	w.write("mount/svc.service/etc/sub/deep", "stale\n")
	for _, d := range w.spec.dirs {
		if err := syscall.Mount(clone+"/"+d.link, d.local, "", syscall.MS_BIND, ""); err != nil {
			t.Fatal(err)
		}
	}
	os.Remove(clone + "/etc/sub/deep")
	w.git(clone, "checkout", "-q", "--", "etc/sub/deep")
	w.shows("local/file", "stale\n")
	w.write("local/etc/mine", "untracked\n")

	w.restart()
	w.reconcile()
	w.want("OK", "", "one\n", "reload")
	w.shows("local/file", "deep\n")
	w.shows("local/etc/mine", "untracked\n")
	if got := w.git(clone, "status", "--porcelain"); got != "?? etc/mine" {
		t.Errorf("git status: %s", got)
	}
	if got := w.git(clone+".before", "stash", "list"); !strings.Contains(got, "stash@{0}") {
		t.Errorf("stash: %q", got)
	}
	if lexists(clone + "/other") {
		t.Error("other is still on disk")
	}
	if got := w.mounts(); len(got) != 2 {
		t.Errorf("mounts: %v", got)
	}
}

// TestStateTakesOverLater: while upstream is away, the old checkout's mounts stay as they are.
func TestStateTakesOverLater(t *testing.T) {
	w := newWorld(t)
	clone := w.oldClone()
	w.write("local/etc/below", "")
	if err := syscall.Mount(clone+"/etc", w.dir+"/local/etc", "", syscall.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	w.upstreamGoes()
	w.boot()
	w.s.pass(t.Context()) // the first one, while the look still hangs
	for range 2 {
		w.reconcile()
		w.want("DIFF", "git ls-remote", "one\n", "")
	}
	w.upstreamComes()
	w.reconcile()
	w.want("OK", "", "one\n", "reload")
}

// firstRecords makes the host one of the first gitopper that kept records: it runs live, good settled last.
func (w *world) firstRecords(live, good string, more map[string]any) {
	w.t.Helper()
	clone := w.oldClone()
	w.git(clone, "sparse-checkout", "set", "--no-cone", "/etc/", "/one.conf")
	w.git(clone, "checkout", "-q", "--detach", live)
	w.write("local/etc/below", "")
	w.write("local/one.conf", "")
	rec := map[string]any{
		"State": "OK", "Change": time.Now().Add(-time.Hour), "Upstream": w.spec.upstream, "Branch": "main",
		"Tip": live, "Newest": live, "Live": live, "Content": "c", "Told": "c", "Boot": bootID(),
		"Good": good, "GoodContent": "c", "Dirs": []string{clone},
	}
	for _, d := range w.spec.dirs {
		if err := syscall.Mount(clone+"/"+d.link, d.local, "", syscall.MS_BIND, ""); err != nil {
			w.t.Fatal(err)
		}
	}
	for k, v := range more {
		rec[k] = v
	}
	text, err := json.Marshal(rec)
	if err != nil {
		w.t.Fatal(err)
	}
	w.write("state/services/svc.service.json", string(text))
	w.boot()
}

func TestStateTakesOverRecord(t *testing.T) {
	w := newWorld(t)
	w.firstRecords(w.head(), w.head(), map[string]any{"Made": []string{w.dir + "/local/one.conf"}})
	if st := w.s.Status(); st.State != "OK" {
		t.Errorf("before the first pass: %+v", st)
	}
	w.reconcile()
	w.want("OK", "", "one\n", "reload")
	w.clean()
	w.kept("etc/app.conf")
	w.spec.dirs = w.spec.dirs[:1]
	w.restart()
	w.reconcile()
	w.want("OK", "", "one\n", "reload")
	if lexists(w.dir + "/local/one.conf") {
		t.Error("what was made for a mount is still there")
	}
}

func TestStateTakesOverEdit(t *testing.T) {
	w := newWorld(t)
	h := w.head()
	w.firstRecords(h, h, nil)
	w.write("local/etc/app.conf", "edited\n")
	w.reconcile()
	w.want("OK", "", "one\n", "reload")
	w.kept("etc/app.conf", "edited\n")
}

func TestStateTakesOverPin(t *testing.T) {
	w := newWorld(t)
	h := w.head()
	w.commit("etc/app.conf", "two\n")
	pin := map[string]any{"Commit": h, "Info": "me: because"}
	w.firstRecords(h, h, map[string]any{"State": "FREEZE", "Info": "me: because", "Pin": pin})
	w.reconcile()
	w.want("FREEZE", "me: because", "one\n", "reload")
	w.runs(h)
	if err := w.op("unfreeze", ""); err != nil {
		t.Fatal(err)
	}
	w.want("OK", "", "two\n", "reload")
}

// TestStateTakesOverGood: the last good commit of before is what a bad one is taken back to.
func TestStateTakesOverGood(t *testing.T) {
	w := newWorld(t)
	good := w.head()
	w.firstRecords(good, good, nil)
	w.write("fake/reads", w.dir+"/local/etc/app.conf")
	w.commit("etc/app.conf", "bad\n")
	w.reconcile()
	w.want("BROKEN", "taken back", "one\n", "reload, reload")
	w.runs(good)
}

// TestStateTakesOverWhileAway: pinned or not, what was mounted stays so, and is mounted after a boot.
func TestStateTakesOverWhileAway(t *testing.T) {
	w := newWorld(t)
	h := w.head()
	w.firstRecords(h, h, nil)
	w.upstreamGoes()
	w.unmountAll()
	w.boot()
	w.shows("local/etc/app.conf", "one\n")
	w.shows("local/one.conf", "single\n")
	for range 2 {
		w.reconcile()
		w.want("DIFF", "git ls-remote", "one\n", "")
	}
	w.upstreamComes()
	w.reconcile()
	w.want("OK", "", "one\n", "reload")
}

// TestStateRecordLost: the service is pinned to what runs until unfreeze.
func TestStateRecordLost(t *testing.T) {
	w := okWorld(t)
	file := recordFile(w.dir+"/state", "svc.service")
	w.write("state/services/svc.service.json", "{")
	w.commit("etc/app.conf", "two\n")
	w.restart()
	w.restart() // it is not lost twice
	w.reconcile()
	w.want("FREEZE", "state lost", "one\n", "reload")
	if !lexists(file + ".broken") {
		t.Error("the record was not moved aside")
	}
	w.restart()
	w.reconcile()
	w.want("FREEZE", "state lost", "one\n", "")
	if err := w.op("unfreeze", ""); err != nil {
		t.Fatal(err)
	}
	w.want("OK", "", "two\n", "reload")
}

// TestStateRecordLostOfRefused: a lost record does not make a refused first commit what runs.
func TestStateRecordLostOfRefused(t *testing.T) {
	w := newWorld(t)
	w.spec.check = []string{"false"}
	w.restart()
	w.reconcile()
	w.write("state/services/svc.service.json", "{")
	w.restart()
	w.reconcile()
	w.want("DIFF", "check", "error: open "+w.dir+"/local/etc/app.conf: no such file or directory", "")
}

// TestStateRecordUnwritable: nothing is changed then, and an operator is told.
func TestStateRecordUnwritable(t *testing.T) {
	w := okWorld(t)
	w.recordsGo()
	w.commit("etc/app.conf", "two\n")
	w.reconcile()
	w.want("BROKEN", "record: ", "one\n", "")
	wantStatus(t, w.op("freeze", ""), "Internal Server Error", false)
	if w.s.rec.Pin != nil {
		t.Error("frozen all the same")
	}
	w.recordsCome()
	w.reconcile()
	w.want("OK", "", "two\n", "reload")
}

// TestStateRecordTroubleOnTrial: a record that can't be written says nothing against the commit.
func TestStateRecordTroubleOnTrial(t *testing.T) {
	w := okWorld(t)
	h := w.commit("etc/app.conf", "two\n")
	w.s.step = func(step string) {
		if step == "reload" {
			w.recordsGo()
		}
	}
	w.reconcile()
	w.want("BROKEN", "record: ", "two\n", "reload")
	w.s.step = func(string) {}
	w.recordsCome()
	for range 2 {
		w.reconcile()
	}
	w.want("OK", "", "two\n", "")
	w.runs(h)
}

// TestRecordEquals changes each value that a record holds: a copy must differ from it then.
func TestRecordEquals(t *testing.T) {
	var r record
	fill(reflect.ValueOf(&r).Elem())
	n := 0
	eachLeaf(reflect.ValueOf(&r).Elem(), "", func(name string, leaf, zero reflect.Value) {
		c, was := r.clone(), reflect.New(leaf.Type()).Elem()
		was.Set(leaf)
		if !r.equals(c) {
			t.Fatal("a copy differs")
		}
		leaf.Set(zero)
		if r.equals(c) || c.equals(&r) {
			t.Errorf("%s does not count", name)
		}
		leaf.Set(was)
		n++
	})
	if n < 25 {
		t.Errorf("only %d values were looked at", n)
	}
}

// fill makes all that v holds, one element in each slice, none of them zero.
func fill(v reflect.Value) {
	switch v.Kind() {
	case reflect.Pointer:
		v.Set(reflect.New(v.Type().Elem()))
		fill(v.Elem())
	case reflect.Slice:
		v.Set(reflect.MakeSlice(v.Type(), 1, 1))
		fill(v.Index(0))
	case reflect.Struct:
		if v.Type() == reflect.TypeFor[time.Time]() {
			v.Set(reflect.ValueOf(time.Unix(1, 0)))
			return
		}
		for i := range v.NumField() {
			fill(v.Field(i))
		}
	case reflect.String:
		v.SetString("x")
	case reflect.Bool:
		v.SetBool(true)
	default:
		v.SetInt(1)
	}
}

// eachLeaf visits what v holds, with the zero value of each: pointers, slices, and what they lead to.
func eachLeaf(v reflect.Value, name string, visit func(name string, leaf, zero reflect.Value)) {
	isTime := v.Type() == reflect.TypeFor[time.Time]()
	switch isStruct := v.Kind() == reflect.Struct && !isTime; {
	case isStruct:
		for i := range v.NumField() {
			eachLeaf(v.Field(i), name+"."+v.Type().Field(i).Name, visit)
		}
		return
	case v.Kind() == reflect.Pointer:
		eachLeaf(v.Elem(), name, visit)
	case v.Kind() == reflect.Slice:
		eachLeaf(v.Index(0), name+"[0]", visit)
	}
	visit(name, v, reflect.Zero(v.Type()))
}
