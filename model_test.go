//go:build linux

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// model is a world to which things happen by chance, and what must come of them.
type model struct {
	*world
	t      *testing.T
	rnd    *rand.Rand
	ids    int                   // of texts and edits
	shown  map[string]modelFiles // by commit: what the repository has
	order  []string              // all commits
	tip    string                // upstream's, as last seen
	pushed string                // upstream's
	good   string                // the last one on which the unit settled
	pin    string
	edited map[string]bool // paths where a pinned service may have an edit
	edits  map[string]bool // editMarks of edits that must be somewhere
	away   bool
	hurt   bool // the clone, perhaps
	anew   bool // a clone was made anew, which may lack contents of other commits than the tip
	locals int  // which of the configs
	seen   int  // the one of the last look that was no failure
	log    []string
}

// modelFiles is a commit's files by path.
type modelFiles map[string]string

// fuse is a context that ends after it was asked n times whether it has.
type fuse struct {
	context.Context
	end  context.CancelFunc
	left atomic.Int32
}

func newFuse(parent context.Context, n int) *fuse {
	f := &fuse{}
	f.Context, f.end = context.WithCancel(parent)
	f.left.Store(int32(n))
	return f
}

func (f *fuse) Err() error {
	if f.left.Add(-1) < 0 {
		f.end()
	}
	return f.Context.Err()
}

// TestModel has commits, crashes, operators, edits, outages, damage and changes of the config come by chance, and after each
// compares what is there with what should be.
func TestModel(t *testing.T) {
	runs, first := 3, uint64(1) // the same each time, so that a run which fails is the change's
	if os.Getenv("GITOPPER_TEST_LONG") != "" {
		runs, first = 100, uint64(time.Now().UnixNano())
	}
	if s := os.Getenv("GITOPPER_TEST_SEED"); s != "" {
		runs = 1
		if _, err := fmt.Sscan(s, &first); err != nil {
			t.Fatal(err)
		}
	}
	for i := range runs {
		seed := first + uint64(i)
		if !t.Run(fmt.Sprint(i), func(t *testing.T) { runModel(t, seed) }) {
			return
		}
	}
}

func runModel(t *testing.T, seed uint64) {
	m := &model{
		world: newWorld(t), t: t, rnd: rand.New(rand.NewPCG(seed, 0)),
		shown: map[string]modelFiles{}, edited: map[string]bool{}, edits: map[string]bool{},
	}
	for _, who := range []string{"AUTHOR", "COMMITTER"} { // so that hashes, and what is sorted by them, are as the seed says
		t.Setenv("GIT_"+who+"_DATE", "1700000000 +0000")
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("GITOPPER_TEST_SEED=%d:\n%s", seed, strings.Join(m.log, "\n"))
		}
	})
	m.configure()
	m.change("good")
	m.settle()
	for range 40 {
		m.step()
		m.settle()
		if t.Failed() {
			return
		}
	}
}

func (m *model) say(format string, args ...any) {
	m.log = append(m.log, fmt.Sprintf(format, args...))
}

// step has one thing happen, of which a pass may be cut short.
func (m *model) step() {
	all := []func(){
		func() { m.change("good") }, func() { m.change("good") }, func() { m.change("bad") },
		m.elsewhere, m.force, m.edit, m.edit, m.own, m.remove, m.outage, m.damage, m.reconfigure, m.again,
		func() { m.ask("freeze") }, func() { m.ask("unfreeze") }, func() { m.ask("unfreeze") },
		func() { m.ask("rollback") }, func() { m.ask("pull") },
	}
	all[m.rnd.IntN(len(all))]()
	if m.rnd.IntN(3) == 0 {
		m.cut()
	}
}

// some returns a new text, that no other is like.
func (m *model) some(word string) string {
	m.ids++
	return fmt.Sprintf("%s %06d %s\n", word, m.ids, strings.Repeat("x", m.rnd.IntN(40)))
}

// change makes a commit that changes files below the links.
func (m *model) change(word string) {
	if m.away {
		return
	}
	m.write("work/etc/app.conf", m.some(word))
	if m.rnd.IntN(2) == 0 {
		m.write("work/one.conf", m.some("one"))
	}
	name := fmt.Sprintf("work/etc/%c", 'a'+rune(m.rnd.IntN(3)))
	if err := os.RemoveAll(m.dir + "/" + name); err != nil {
		m.t.Fatal(err)
	}
	switch m.rnd.IntN(4) { // a file, a directory, or nothing
	case 0:
		m.write(name, m.some("file"))
	case 1:
		m.write(name+"/b", m.some("below"))
		m.write(name+"/c/d", m.some("deep"))
	}
	m.pushes(word)
}

// elsewhere makes a commit that changes nothing below the links.
func (m *model) elsewhere() {
	if !m.away {
		m.write("work/other/file", m.some("other"))
		m.pushes("elsewhere")
	}
}

// force takes upstream back to an older commit, and on from there.
func (m *model) force() {
	if !m.away {
		m.say("forced")
		m.back(m.order[m.rnd.IntN(len(m.order))])
		m.change("good")
	}
}

func (m *model) pushes(word string) {
	m.pushed = m.push()
	all := modelFiles{}
	for _, p := range strings.Split(m.git(m.work, "ls-files", "-z"), "\x00") {
		if p != "" {
			all[p] = m.read("work/" + p)
		}
	}
	m.shown[m.pushed] = all
	m.order = append(m.order, m.pushed)
	m.say("commit %s %.8s", word, m.pushed)
}

// configure makes the config what locals says.
func (m *model) configure() {
	etc := dir{local: m.dir + "/local/etc", link: "etc"}
	one := dir{local: m.dir + "/local/one.conf", link: "one.conf", kind: aFile}
	moved := dir{local: m.dir + "/local/moved.conf", link: "one.conf", kind: aFile}
	m.spec.dirs = [][]dir{{etc, one}, {etc}, {etc, moved}, {one, etc}}[m.locals]
	m.write("fake/reads", m.dir+"/local/etc/app.conf")
}

func (m *model) reconfigure() {
	m.locals = m.rnd.IntN(4)
	m.say("config %d", m.locals)
	m.configure()
	m.boot()
}

// again is a restart, or a boot of the host.
func (m *model) again() {
	if m.rnd.IntN(2) == 0 {
		m.say("boot")
		m.unmountAll()
	}
	m.say("restart")
	m.boot()
}

func (m *model) outage() {
	m.away = !m.away
	m.say("away %v", m.away)
	if m.away {
		m.upstreamGoes()
	} else {
		m.upstreamComes()
	}
}

// damage deletes the clone, one of its files, or the half of one.
func (m *model) damage() {
	m.hurt = true
	defer func() { // a clone without it is another one
		if lexists(m.up.dir) {
			_ = os.WriteFile(m.up.dir+"/hurt", nil, 0o600)
		}
	}()
	var all []string
	_ = filepath.WalkDir(m.up.dir, func(p string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			all = append(all, p)
		}
		return nil
	})
	if len(all) == 0 || m.rnd.IntN(3) == 0 {
		m.say("damage: no clone")
		os.RemoveAll(m.up.dir)
		return
	}
	name := all[m.rnd.IntN(len(all))]
	m.say("damage: %s", strings.TrimPrefix(name, m.up.dir))
	os.Chmod(name, 0o644)
	if fi, err := os.Stat(name); err == nil && m.rnd.IntN(2) == 0 {
		os.Truncate(name, fi.Size()/2)
		return
	}
	os.Remove(name)
}

var editMarks = regexp.MustCompile(`E\d{6}`)

// edit has an administrator change a file below a link: in place, or by a rename.
func (m *model) edit() {
	paths := m.paths(m.wanted())
	p := paths[m.rnd.IntN(len(paths))]
	at := m.s.files.dir + "/" + p
	old, err := os.ReadFile(at)
	wasHere := err != nil
	mends := strings.HasPrefix(string(old), "bad")
	if wasHere || mends {
		return
	}
	m.ids++
	mark := fmt.Sprintf("E%06d", m.ids)
	text := string(old) + mark + "\n"
	if m.rnd.IntN(3) == 0 && len(old) > len(mark) {
		text = mark + string(old[len(mark):]) // of the same size
	}
	for _, gone := range editMarks.FindAllString(string(old), -1) {
		if !strings.Contains(text, gone) {
			delete(m.edits, gone)
		}
	}
	if m.rnd.IntN(2) == 0 {
		err = os.WriteFile(at, []byte(text), 0o644)
	} else if err = os.WriteFile(at+"~", []byte(text), 0o644); err == nil {
		err = os.Rename(at+"~", at)
	}
	if err != nil {
		m.t.Fatal(err)
	}
	m.say("edit %s of %s", mark, p)
	m.edits[mark], m.edited[p] = true, true
}

// own has an administrator put a file of his own below a link, where a commit may have one too.
func (m *model) own() {
	m.ids++
	mark := fmt.Sprintf("E%06d", m.ids)
	at := fmt.Sprintf("%s/etc/%c", m.s.files.dir, 'a'+rune(m.rnd.IntN(6)))
	if lexists(at) {
		return
	}
	if err := os.WriteFile(at, []byte(mark), 0o644); err != nil {
		m.t.Fatal(err)
	}
	m.say("own %s %s", mark, filepath.Base(at))
	m.edits[mark] = true
}

// remove has an administrator remove a file below a link.
func (m *model) remove() {
	paths := m.paths(m.wanted())
	p := paths[m.rnd.IntN(len(paths))]
	mayStayAway := m.pin != "" || m.hurt || m.anew
	if mayStayAway && !strings.Contains(p, "/sub/") {
		return // without one.conf a local would have nothing to show, and a bad app.conf would be no trouble
	}
	old, _ := os.ReadFile(m.s.files.dir + "/" + p)
	for _, gone := range editMarks.FindAllString(string(old), -1) {
		delete(m.edits, gone)
	}
	m.say("remove %s", p)
	os.Remove(m.s.files.dir + "/" + p)
	m.edited[p] = true
}

// ask is an operator's command.
func (m *model) ask(verb string) {
	hash := ""
	if verb == "rollback" {
		hash = m.order[m.rnd.IntN(len(m.order))]
	}
	before := m.pin
	err := m.op(verb, hash)
	m.say("%s %.8s: %v", verb, hash, err)
	m.pin = ""
	if p := m.s.rec.Pin; p != nil {
		m.pin = p.Commit
	}
	oe, _ := errors.AsType[*opError](err)
	refused := oe != nil && !oe.done
	switch {
	case verb == "freeze" && err != nil:
		m.t.Errorf("freeze: %v", err)
	case verb == "unfreeze" && m.pin != "", verb == "pull" && before == "" && refused:
		m.t.Errorf("%s: pin %.8s, %v", verb, m.pin, err)
	case verb == "rollback" && refused && m.must(hash):
		m.t.Errorf("rollback to %.8s: %v", hash, err)
	case verb == "rollback" && refused && m.pin != before, verb == "rollback" && !refused && m.pin != hash:
		m.t.Errorf("rollback to %.8s, %v: pinned to %.8s, before to %.8s", hash, err, m.pin, before)
	}
	isUndone := !m.away || err == nil // else it may lack the contents, and tells
	if verb != "freeze" && verb != "pull" && !refused && isUndone {
		m.edited = map[string]bool{}
	}
}

// must says whether a rollback to a commit has to work.
func (m *model) must(hash string) bool {
	if m.hurt || m.away {
		return hash == m.s.files.live().Commit && !m.hurt
	}
	return strings.Contains(m.git(m.work, "rev-list", m.pushed), hash)
}

// cut has a pass end in the middle, as a kill does or somebody who is in a hurry.
func (m *model) cut() {
	n := 1 + m.rnd.IntN(80)
	soft, hard := n, 1<<30
	if m.rnd.IntN(2) == 0 {
		soft, hard = hard, n/2
	}
	s, steps := m.s, m.rnd.IntN(9)
	atHard := newFuse(context.Background(), hard)
	atSoft := newFuse(atHard.Context, soft) // as in life, where what ends hard has ended softly
	s.stop.hard = atHard
	s.step = func(name string) {
		if steps--; steps == 0 {
			m.say("killed at %s", name)
			runtime.Goexit()
		}
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = m.up.lookNow(atSoft, false)
		s.pass(atSoft)
	}()
	<-ended
	m.say("cut after %d", n)
	m.boot()
}

// wanted is the commit whose files should be live.
func (m *model) wanted() string {
	switch {
	case m.pin != "":
		return m.pin
	case m.isBad(m.tip) && m.good != "":
		return m.good
	}
	return m.tip
}

func (m *model) isBad(commit string) bool {
	return strings.Contains(m.shown[commit]["etc/app.conf"], "bad")
}

// paths are those of a commit that lie below the links.
func (m *model) paths(commit string) (all []string) {
	for _, p := range slices.Sorted(maps.Keys(m.shown[commit])) {
		below := func(d dir) bool { return p == d.link || strings.HasPrefix(p, d.link+"/") }
		if slices.ContainsFunc(m.spec.dirs, below) {
			all = append(all, p)
		}
	}
	return all
}

// state is what the service must say.
func (m *model) state() string {
	switch {
	case m.pin != "" && m.isBad(m.pin), m.pin == "" && m.isBad(m.tip):
		return "BROKEN"
	case m.pin != "":
		return "FREEZE"
	case m.away:
		return "DIFF"
	}
	return "OK"
}

// settle has rounds done until the state is as it must be, and one more, and then compares all with what it should be.
func (m *model) settle() {
	for i := 0; ; i++ {
		err := m.up.lookNow(context.Background(), true)
		m.s.pass(context.Background())
		if m.away != (err != nil) {
			m.t.Errorf("look: %v", err)
		}
		if err == nil {
			m.tip, m.seen = m.pushed, m.locals
			wasHurt := m.hurt
			m.hurt = m.hurt && lexists(m.up.dir+"/hurt") // else nobody noticed yet
			m.anew = m.anew || wasHurt && !m.hurt
		}
		if i >= 1 && m.s.Status().State == m.state() || i == 6 {
			break
		}
	}
	isThin := m.hurt || m.anew && (m.wanted() != m.tip || m.locals != m.seen)
	isLost := m.anew && !strings.Contains(m.git(m.work, "rev-list", m.pushed), m.wanted()) // a forced push's
	if m.away && isThin || isLost {
		if m.s.Status().State == "FREEZE" && !m.isBad(m.pin) {
			m.good = m.pin
		}
		m.checkEdits() // what can't be read can't be shown
		return
	}
	if m.pin == "" {
		m.edited = map[string]bool{} // which were undone
	}
	if m.pin == "" && !m.isBad(m.tip) {
		m.good = m.tip
	} else if m.pin != "" && !m.isBad(m.pin) {
		m.good = m.pin
	}
	if st := m.s.Status(); st.State != m.state() {
		m.t.Errorf("state %s %q, want %s", st.State, st.Info, m.state())
	}
	m.checkFiles()
	m.checkOurs()
	m.checkEdits()
}

// checkFiles compares the files with the commit's.
func (m *model) checkFiles() {
	commit := m.wanted()
	want := map[string]bool{}
	for _, p := range m.paths(commit) {
		want[p] = true
		text, err := os.ReadFile(m.s.files.dir + "/" + p)
		isEdit := m.edited[p] && (err != nil || editMarks.Match(text))
		if !isEdit && string(text) != m.shown[commit][p] {
			m.t.Errorf("%s of %.8s: %q, %v, want %q", p, commit, text, err, m.shown[commit][p])
		}
	}
	for _, d := range m.spec.dirs {
		_ = filepath.WalkDir(d.local, func(at string, e fs.DirEntry, err error) error {
			p := d.link + strings.TrimPrefix(at, d.local)
			text, _ := os.ReadFile(at)
			isOwn := editMarks.Match(text)
			if err != nil || !e.IsDir() && !want[p] && !isOwn {
				m.t.Errorf("%s should not be there: %q, %v", at, text, err)
			}
			return nil
		})
		isEdit := m.edited[d.link] && d.kind == aFile
		if !isEdit && !shows(m.s.files.dir, d.link, d.local) {
			m.t.Errorf("%s does not show %s", d.local, d.link)
		}
	}
	if got := m.mounts(); len(got) != len(m.spec.dirs) {
		m.t.Errorf("mounts %q", got)
	}
}

// checkOurs compares manifest and record with the commit.
func (m *model) checkOurs() {
	commit := m.wanted()
	mf, err := readManifest(m.s.files.manifest)
	if err != nil {
		m.t.Fatal(err)
	}
	if mf.pending() || m.s.files.pending() {
		m.t.Error("the publish is not finished")
	}
	if paths := m.paths(commit); !slices.Equal(paths, mf.paths) {
		m.t.Errorf("manifest %q, want %q", mf.paths, paths)
	}
	for p, known := range mf.known {
		h := newHash(40)
		fmt.Fprintf(h, "blob %d\x00%s", len(m.shown[commit][p]), m.shown[commit][p])
		if id := fmt.Sprintf("%x", h.Sum(nil)); len(known) != 1 || known[0].id != id {
			m.t.Errorf("manifest: %s is %v, want %s", p, known, id)
		}
	}
	rec, saved, err := readRecord(recordFile(m.dir+"/state", m.spec.service))
	onDisk, _ := json.Marshal(saved)
	known, _ := json.Marshal(m.s.saved)
	if err != nil || !bytes.Equal(onDisk, known) {
		m.t.Errorf("the record is not the service's: %v", err)
	}
	isTold := rec.Told.Content == mf.live.Content
	if fails := m.isBad(commit); isTold == fails {
		m.t.Errorf("told %+v, live %+v, which fails: %v", rec.Told, mf.live, fails)
	}
	mayLack := m.hurt || m.isBad(commit) || m.anew && m.away
	if !mayLack && !m.s.files.isDressed(mf.live.Commit, m.up.objectsDir()) {
		m.t.Error("the .git for people is not of what is live")
	}
}

// checkEdits looks for every edit: it must be live, or kept.
func (m *model) checkEdits() {
	left := maps.Clone(m.edits)
	_ = filepath.WalkDir(m.spec.mount, func(at string, e fs.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() {
			return nil
		}
		text, _ := os.ReadFile(at)
		for _, mark := range editMarks.FindAllString(string(text), -1) {
			delete(left, mark)
		}
		return nil
	})
	if len(left) > 0 {
		m.t.Errorf("edits lost: %q", slices.Sorted(maps.Keys(left)))
	}
}
