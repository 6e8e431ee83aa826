//go:build linux

package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// fleet is a world with many services on its upstream.
type fleet struct {
	*world
	all  []*Service
	ids  unitNames
	runs func() []string // of git, since it was last called
}

// newFleet makes n services, each with a link and a local of its own, of which none has had a pass.
func newFleet(t testing.TB, n int) *fleet {
	t.Helper()
	f := &fleet{world: newWorld(t)}
	var files []string
	for i := range n {
		files = append(files, fmt.Sprintf("svc%03d/etc/app.conf", i), fmt.Sprintf("one of %d\n", i))
	}
	f.commit(files...)
	f.rise(n)
	return f
}

// rise gives the upstream and n services a new life, as a new process would.
func (f *fleet) rise(n int) {
	f.t.Helper()
	f.up = newUpstream(f.dir+"/state", f.spec.upstream, f.spec.user)
	f.all, f.ids = nil, unitNames{}
	for i := range n {
		sp, name := f.spec, fmt.Sprintf("svc%03d", i)
		sp.service = name + ".service"
		sp.dirs = []dir{{local: f.dir + "/local/" + name, link: name + "/etc"}}
		f.all = append(f.all, newService(sp, f.dir+"/state", f.up, time.Hour, f.stop))
	}
}

// round is one of the host's: a look at upstream, one at the units as watchUnits has it, and a pass each.
func (f *fleet) round() error {
	err := f.up.lookNow(context.Background(), false)
	f.lookAtUnits()
	for _, s := range f.all {
		s.pass(context.Background())
	}
	return err
}

func (f *fleet) lookAtUnits() {
	f.t.Helper()
	var names []string
	for _, s := range f.all {
		names = append(names, s.service)
	}
	units, err := lookUnits(context.Background(), f.ids, names...)
	if err != nil {
		f.t.Fatal(err)
	}
	for i, s := range f.all {
		s.unit.Store(&units[i])
	}
}

// okRound is a round after which all are OK, and show what the commit has for them.
func (f *fleet) okRound() {
	f.t.Helper()
	if err := f.round(); err != nil {
		f.t.Fatal(err)
	}
	for i, s := range f.all {
		if st := s.Status(); st.State != "OK" || st.Commit != f.head() {
			f.t.Fatalf("%s: %s %.8s %s", s.service, st.State, st.Commit, st.Info)
		}
		name := fmt.Sprintf("svc%03d", i)
		f.shows("local/"+name+"/app.conf", f.read("work/"+name+"/etc/app.conf"))
	}
}

// asked returns and forgets what systemctl was called for, reading or not.
func (f *fleet) asked() []string {
	data, _ := os.ReadFile(f.fake + "/asked")
	os.Remove(f.fake + "/asked")
	return strings.Fields(string(data))
}

// written lists all below a directory with inodes, sizes and times.
func (f *fleet) written(dir string) map[string]string {
	f.t.Helper()
	out, err := exec.Command("find", f.dir+"/"+dir, "-printf", "%P\t%i %s %T@ %C@\n").CombinedOutput()
	if err != nil {
		f.t.Fatalf("%v: %s", err, out)
	}
	all := map[string]string{}
	for line := range strings.Lines(string(out)) {
		name, is, _ := strings.Cut(line, "\t")
		all[name] = is
	}
	return all
}

// changed returns the names whose entries differ.
func changed(before, after map[string]string) (names []string) {
	for name, is := range after {
		if before[name] != is {
			names = append(names, name)
		}
	}
	for name := range before {
		if after[name] == "" {
			names = append(names, name)
		}
	}
	return names
}

// moves returns a function that tells what was renamed into a directory, in order. See inotify(7): equal events that
// follow each other are one, so those of the names from which it was renamed are asked for too, and left out.
func (f *fleet) moves(dir string) func() []string {
	f.t.Helper()
	fd, err := syscall.InotifyInit1(syscall.IN_NONBLOCK | syscall.IN_CLOEXEC)
	if err == nil {
		_, err = syscall.InotifyAddWatch(fd, f.dir+"/"+dir, syscall.IN_MOVE)
	}
	if err != nil {
		f.t.Fatal(err)
	}
	return func() (names []string) {
		defer syscall.Close(fd)
		for buf := make([]byte, 64<<10); ; {
			n, err := syscall.Read(fd, buf)
			if err != nil || n <= 0 {
				return names
			}
			for rest := buf[:n]; len(rest) > 0; {
				size := binary.NativeEndian.Uint32(rest[12:])
				name := strings.TrimRight(string(rest[syscall.SizeofInotifyEvent:][:size]), "\x00")
				if filepath.Ext(name) != ".new" {
					names = append(names, name)
				}
				rest = rest[syscall.SizeofInotifyEvent+size:]
			}
		}
	}
}

// counts makes runs tell what git was run for by the product.
func (f *fleet) counts() {
	f.t.Helper()
	all := (&gitWorld{t: f.t.(*testing.T), dir: f.dir}).counting("")
	f.runs = func() []string {
		return slices.DeleteFunc(all(), func(run string) bool { return run == "" }) // the test's own
	}
}

// wantCalls fails if more was called than may be.
func wantCalls(t *testing.T, what string, got []string, most int) {
	t.Helper()
	t.Logf("%s: %d %.40q", what, len(got), got)
	if len(got) > most {
		t.Errorf("%s: %d calls, at most %d: %q", what, len(got), most, got)
	}
}

// TestCountHundredServices counts what 100 services cost: idle, with units that are down, and with commits.
func TestCountHundredServices(t *testing.T) {
	f := newFleet(t, 100)
	f.okRound()
	f.commit("other/file", "y\n") // else the records are as young as the first pass
	f.okRound()
	f.counts()
	f.countIdle(t)
	f.countUnitsDown(t)
	f.countOthers(t)
	f.countOne(t)
	f.countFrozen(t)
}

// countFrozen has commits upstream of services that are frozen: what waits is counted where it is more.
func (f *fleet) countFrozen(t *testing.T) {
	for _, s := range f.all[:3] {
		if err := s.operate(context.Background(), op{verb: "freeze"}); err != nil {
			t.Fatal(err)
		}
	}
	look := func() {
		if err := f.round(); err != nil {
			t.Error(err)
		}
	}
	f.commit("svc000/etc/app.conf", "waits\n", "svc001/etc/app.conf", "waits\n")
	f.runs()
	look()
	wantCalls(t, "a commit that two frozen ones wait with: git", f.runs(), 4+2)
	f.commit("other/file", "more\n")
	f.runs()
	look()
	wantCalls(t, "nobody's commit, while some wait: git", f.runs(), 4)
	for i, want := range []int{1, 1, 0, 0} {
		if got := f.all[i].Status().Pending; got != want {
			t.Errorf("%s: %d pending, want %d", f.all[i].service, got, want)
		}
	}
}

func (f *fleet) countIdle(t *testing.T) {
	state, mount := f.written("state"), f.written("mount")
	f.runs()
	f.asked()
	if err := f.round(); err != nil {
		t.Error(err)
	}
	wantCalls(t, "idle: git", f.runs(), 1)
	wantCalls(t, "idle: systemctl", f.asked(), 1)
	if names := changed(state, f.written("state")); len(names) > 0 {
		t.Errorf("an idle round wrote %q", names)
	}
	if names := changed(mount, f.written("mount")); len(names) > 0 {
		t.Errorf("an idle round wrote %q", names)
	}
}

func (f *fleet) countUnitsDown(t *testing.T) {
	down := []int{7, 70}
	for _, i := range down {
		f.write("fake/"+f.all[i].service, "failed")
	}
	for _, when := range []string{"just now", "for a while"} {
		f.runs()
		f.asked()
		if err := f.round(); err != nil {
			t.Error(err)
		}
		wantCalls(t, "units down "+when+": git", f.runs(), 1)
		wantCalls(t, "units down "+when+": systemctl", f.asked(), 2)
		for _, i := range down {
			if st := f.all[i].Status(); st.State != "BROKEN" {
				t.Errorf("%s: %s %s", st.Service, st.State, st.Info)
			}
		}
	}

	// Trouble is tried again between rounds, and then only a look of its own tells.
	s := f.all[down[0]]
	s.pass(context.Background())
	wantCalls(t, "a try between rounds: systemctl", f.asked(), 1)
	f.write("fake/"+s.service, "active")
	s.pass(context.Background())
	if st := s.Status(); st.State != "OK" {
		t.Errorf("a unit that came back: %s %s", st.State, st.Info)
	}
	f.write("fake/"+f.all[down[1]].service, "active")
	f.okRound()
}

// countOthers has a commit that changes nothing of any service's.
func (f *fleet) countOthers(t *testing.T) {
	f.commit("other/file", "new\n")
	before := f.written("state/services")
	f.runs()
	f.asked()
	if err := f.round(); err != nil {
		t.Error(err)
	}
	wantCalls(t, "nobody's commit: git", f.runs(), 4)
	wantCalls(t, "nobody's commit: systemctl", f.asked(), 1)
	if names := changed(before, f.written("state/services")); len(names) > 0 {
		t.Errorf("records written: %q", names)
	}
	f.okRound()
}

// countOne has a commit that changes one service's files.
func (f *fleet) countOne(t *testing.T) {
	f.commit("svc042/etc/app.conf", "new\n")
	before, moved := f.written("state/services"), f.moves("state/services")
	var upTo []string
	f.all[42].step = func(name string) {
		if name == "reload" {
			upTo = f.runs()
		}
	}
	f.runs()
	f.asked()
	if err := f.round(); err != nil {
		t.Error(err)
	}
	if len(upTo) == 0 {
		t.Error("no reload")
	}
	wantCalls(t, "one's commit, up to the reload: git", upTo, 5)
	wantCalls(t, "one's commit, after it: git", f.runs(), 3)
	wantCalls(t, "one's commit: systemctl", f.asked(), 4)
	if names := changed(before, f.written("state/services")); len(names) != 3 {
		t.Errorf("changed: %q, want one record, one manifest, and their directory", names)
	}
	wrote := moved()
	isRecord := func(name string) bool { return filepath.Ext(name) == ".json" }
	if n := len(slices.DeleteFunc(slices.Clone(wrote), func(n string) bool { return !isRecord(n) })); n != 1 {
		t.Errorf("%d records written: %q", n, wrote)
	}
	t.Logf("one's commit: written %q", wrote)
	f.okRound()
}

// counter counts what a handler answers.
type counter struct {
	http.ResponseWriter
	bytes *atomic.Int64
}

func (c counter) Write(p []byte) (int, error) {
	n, err := c.ResponseWriter.Write(p)
	c.bytes.Add(int64(n))
	return n, err
}

// overHTTP has the upstream reached through git's own HTTP server; away closes the door.
func (f *fleet) overHTTP(t *testing.T) (bytes *atomic.Int64, away *atomic.Bool) {
	t.Helper()
	bytes, away = &atomic.Int64{}, &atomic.Bool{}
	backend := &gitWorld{t: t, dir: f.dir, work: f.bare}
	s := backend.serve(func(rw http.ResponseWriter, r *http.Request) bool {
		if away.Load() {
			http.Error(rw, "away", http.StatusServiceUnavailable)
		}
		return !away.Load()
	})
	inner := s.Config.Handler
	s.Config.Handler = http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		inner.ServeHTTP(counter{rw, bytes}, r)
	})
	f.spec.upstream = s.URL + "/up.git"
	return bytes, away
}

// age gives the upstream's branch a history of n commits, with 20 services' directories.
func (f *fleet) age(t *testing.T, n int) {
	t.Helper()
	var b strings.Builder
	noise := rand.NewChaCha8([32]byte{7})
	for i := range n {
		text := make([]byte, 300)
		_, _ = noise.Read(text)
		content := fmt.Sprintf("%x", text)
		fmt.Fprintf(&b, "commit refs/heads/main\ncommitter a <a@b> %d +0000\ndata 2\nc\n", 1_700_000_000+i)
		if i == 0 {
			fmt.Fprintf(&b, "from %s\n", f.head())
		}
		fmt.Fprintf(&b, "M 100644 inline svc%03d/etc/file%d\ndata %d\n%s\n", i%20, i/20%3, len(content), content)
		fmt.Fprintf(&b, "M 100644 inline other/%d\ndata %d\n%s\n", i%50, len(content), content)
	}
	fastImport(t, f.work, b.String())
	f.git(f.work, "reset", "-q", "--hard", "main")
	f.git(f.work, "push", "-q", "origin", "main")
}

// disk is what a directory takes, in bytes.
func (f *fleet) disk(t *testing.T, dir string) int64 {
	t.Helper()
	out, err := exec.Command("du", "-sk", f.dir+"/"+dir).Output()
	word, _, _ := strings.Cut(string(out), "\t")
	n, err2 := strconv.ParseInt(word, 10, 64)
	if err := errors.Join(err, err2); err != nil {
		t.Fatal(err)
	}
	return n << 10
}

// TestCountOneCloneForTwenty compares the bytes and the disk of twenty services with those of one.
func TestCountOneCloneForTwenty(t *testing.T) {
	f := newFleet(t, 20)
	f.age(t, 2000)
	received, _ := f.overHTTP(t)
	bytes, disk := map[int]int64{}, map[int]int64{}
	for _, n := range []int{1, 20} {
		if err := os.RemoveAll(f.dir + "/state"); err != nil {
			t.Fatal(err)
		}
		received.Store(0)
		f.rise(n)
		f.okRound()
		bytes[n], disk[n] = received.Load(), f.disk(t, "state/upstreams")
		if clones, _ := filepath.Glob(f.dir + "/state/upstreams/*"); len(clones) != 1 {
			t.Errorf("%d services: clones %q", n, clones)
		}
	}
	t.Logf("received %d, %d; clone on disk %d, %d; state with 20 %d, checkouts of 20 %d", bytes[1], bytes[20],
		disk[1], disk[20], f.disk(t, "state"), f.disk(t, "mount"))
	if 10*bytes[20] > 12*bytes[1] {
		t.Errorf("20 services receive %d bytes, one %d", bytes[20], bytes[1])
	}
	if 10*disk[20] > 12*disk[1] {
		t.Errorf("the clone of 20 services takes %d bytes, of one %d", disk[20], disk[1])
	}
	if more := f.disk(t, "state") - disk[20]; more > 20*16<<10 {
		t.Errorf("the state directory takes %d bytes beside the clone", more)
	}
	if checkouts := f.disk(t, "mount"); checkouts > 20*128<<10 {
		t.Errorf("20 checkouts take %d bytes", checkouts)
	}
}

// TestCountCloneDeleted has the clone deleted while upstream is away.
func TestCountCloneDeleted(t *testing.T) {
	f := newFleet(t, 5)
	received, away := f.overHTTP(t)
	f.rise(5)
	f.okRound()
	first := received.Swap(0)
	f.asked()
	f.calls()
	f.counts()

	away.Store(true)
	if err := os.RemoveAll(f.up.dir); err != nil {
		t.Fatal(err)
	}
	for look, state := range []string{"OK", "DIFF", "DIFF"} {
		f.round()
		for i, s := range f.all {
			if st := s.Status(); st.State != state || state == "DIFF" && !strings.Contains(st.Info, "ls-remote") {
				t.Errorf("look %d: %s is %s %s", look+1, s.service, st.State, st.Info)
			}
			f.shows(fmt.Sprintf("local/svc%03d/app.conf", i), fmt.Sprintf("one of %d\n", i))
		}
	}
	back := op{verb: "rollback", hash: f.head(), who: "me"}
	if err := f.all[0].operate(context.Background(), back); err != nil {
		t.Errorf("rollback to what is live: %v", err)
	}
	if st := f.all[0].Status(); st.State != "FREEZE" {
		t.Errorf("after the rollback: %s %s", st.State, st.Info)
	}
	if err := f.all[0].operate(context.Background(), op{verb: "unfreeze", who: "me"}); err == nil {
		t.Error("an unfreeze says nothing of an upstream that is away")
	}
	// A new process is no worse off.
	f.rise(5)
	f.round()
	if st := f.all[1].Status(); st.State != "DIFF" {
		t.Errorf("after a restart: %s %s", st.State, st.Info)
	}
	f.shows("local/svc001/app.conf", "one of 1\n")

	received.Store(0)
	f.runs()
	away.Store(false)
	f.okRound()
	healed, all := received.Load(), f.runs()
	fetches := 0
	for _, r := range all {
		if strings.Contains(r, "fetch -q") {
			fetches++
		}
	}
	t.Logf("first %d bytes, healed %d bytes, git %q", first, healed, all)
	if fetches != 2 || 10*healed > 11*first { // history, and the contents
		t.Errorf("%d fetches and %d bytes to heal what had cost %d: %q", fetches, healed, first, all)
	}
	f.runs()
	f.okRound()
	wantCalls(t, "healed: git", f.runs(), 1)
	if calls := f.calls(); calls != "" {
		t.Errorf("systemctl %s", calls)
	}
}
