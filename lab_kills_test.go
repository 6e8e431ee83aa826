//go:build linux

package main

import (
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// Everything at once, while gitopper and all that it started is killed again and again: commits, rollbacks,
// changes of the config, damage to the clone, and somebody who edits the files.

// stormConfigs are the configs that the storm goes through; what they have in common is always mounted.
var stormConfigs = []struct {
	name, branch string
	more         string            // further dirs of app
	others       string            // further services
	mounts       map[string]string // beside those that are always there: place to link in app's checkout
}{
	{name: "plain", branch: "main"},
	{name: "another link", branch: "main", more: `, { local = "/etc/app/more", link = "more" }`,
		mounts: map[string]string{"/etc/app/more": "app/more"}},
	{name: "another branch", branch: "canary"},
	{name: "another service", branch: "main", others: `
[[services]]
machine = "lab"
service = "other"
action = "reload"
settle = "50ms"
dirs = [ { local = "/etc/app/other", link = "other" } ]
`, mounts: map[string]string{"/etc/app/other": "other/other"}},
}

// storm is a host on which all that happens.
type storm struct {
	*labHost
	u       *labUpstream
	moments *rand.Rand
	version int
	commits []string
	config  int            // of stormConfigs
	asked   sync.WaitGroup // operators who wait for their answer
	editor  *labEditor
}

func newStorm(t *testing.T) *storm {
	t.Helper()
	s := &storm{labHost: newLab(t), u: newLabUpstream(t)}
	s.moments = labMoments(t, 2)
	s.witness("app", "/etc/app/dir/conf", "")
	s.witness("other", "/etc/app/other/conf", "")
	s.push()
	s.setConfig(0)
	s.start("-t", "200ms", "-r")
	s.waitFile("/run/app.seen", stormVersion("version", 1))
	s.editor = &labEditor{root: s.fs.Name(), saved: map[int]bool{}}
	return s
}

// stormVersion is a file of one version in every line.
func stormVersion(word string, version int) string {
	return strings.Repeat(fmt.Sprintf("%s %d\n", word, version), 500)
}

// stormWhole says whether the whole of a content is of one version, for readers. Lines of a word more may
// follow.
func stormWhole(content, more string, words ...string) bool {
	for _, word := range words {
		var version int
		if _, err := fmt.Sscanf(content, word+" %d\n", &version); err != nil {
			continue
		}
		rest, isWhole := strings.CutPrefix(content, stormVersion(word, version))
		for line := range strings.Lines(rest) {
			isWhole = isWhole && more != "" && strings.HasPrefix(line, more)
		}
		return isWhole
	}
	return false
}

// push commits the next version to main; the branch canary is some commits behind.
func (s *storm) push() {
	s.version++
	s.commits = append(s.commits, s.u.commit(map[string]string{
		"app/conf":                           stormVersion("version", s.version),
		"app/file":                           stormVersion("file", s.version),
		fmt.Sprint("app/new/", s.version):    "",
		fmt.Sprint("app/old/", s.version%10): strconv.Itoa(s.version),
		"more/conf":                          stormVersion("more", s.version),
		"other/conf":                         stormVersion("other", s.version/3),
	}))
	if s.version > 1 {
		s.u.run("rm", "-q", fmt.Sprint("app/new/", s.version-1))
	}
	s.u.run("branch", "-f", "canary", s.commits[max(0, s.version-4)])
}

// setConfig replaces the config as an administrator's editor does, so that no half of it is ever read.
func (s *storm) setConfig(i int) {
	s.t.Helper()
	s.config = i
	c := stormConfigs[i]
	const file = "etc/gitopper/config.toml"
	s.write("/"+file+".new", s.configText(s.u, fmt.Sprintf(`
[[services]]
machine = "lab"
service = "app"
branch = %q
action = "reload"
settle = "50ms"
dirs = [
  { local = "/etc/app/dir", link = "app" },
  { local = "/etc/app/file", link = "app/file", file = true }%s
]
%s`, c.branch, c.more, c.others)))
	if err := s.fs.Rename(file+".new", file); err != nil {
		s.t.Fatal(err)
	}
}

// ask has an operator ask for something, whose answer nobody may live to give.
func (s *storm) ask(command string) {
	s.asked.Go(func() { _, _, _ = s.ssh(command) })
}

// step does one thing that the host has to cope with.
func (s *storm) step() {
	recent := s.commits[max(0, len(s.commits)-10):]
	switch n := s.moments.IntN(20); {
	case n < 8:
		s.push()
	case n < 11:
		s.ask("/do/rollback app " + recent[s.moments.IntN(len(recent))])
	case n < 13:
		s.ask("/do/unfreeze app")
	case n < 14:
		s.ask("/do/freeze app")
	case n < 15:
		s.ask("/do/pull app")
	case n < 17:
		s.setConfig(s.moments.IntN(len(stormConfigs)))
	default:
		s.damage()
	}
}

// damage does to the clone what a bad disk or a hasty administrator may do. The daemon may work on the same
// files meanwhile, so that any of it may fail.
func (s *storm) damage() {
	const upstreams = "var/lib/gitopper/upstreams"
	clones, _ := fs.Glob(s.fs.FS(), upstreams+"/*")
	if len(clones) == 0 {
		return
	}
	clone := clones[s.moments.IntN(len(clones))]
	var objects []string
	_ = fs.WalkDir(s.fs.FS(), clone+"/objects", func(p string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			objects = append(objects, p)
		}
		return nil
	})
	if len(objects) == 0 {
		objects = []string{clone + "/HEAD"}
	}
	object := objects[s.moments.IntN(len(objects))]

	switch s.moments.IntN(7) {
	case 0:
		_ = s.fs.RemoveAll(clone)
	case 1:
		_ = s.fs.RemoveAll(clone + "/objects")
	case 2:
		_ = s.fs.RemoveAll(clone + "/refs")
	case 3:
		_ = s.fs.WriteFile(clone+"/config", []byte("[core"), 0o644)
	case 4:
		_ = s.fs.Remove(object)
	case 5:
		if f, err := s.fs.OpenFile(object, os.O_WRONLY, 0); err == nil {
			fi, _ := f.Stat()
			_ = errors.Join(f.Truncate(fi.Size()/2), f.Close())
		}
	case 6:
		if f, err := s.fs.OpenFile(object, os.O_WRONLY, 0); err == nil {
			fi, _ := f.Stat()
			_, _ = f.WriteAt([]byte("damage"), fi.Size()/2)
			f.Close()
		}
	}
}

// labEditor saves numbered edits, whatever else is going on, as two kinds of editors do: one puts a new
// file in the old one's place, the other writes to the file that is there.
type labEditor struct {
	mu    sync.Mutex // held: it makes a pause
	root  string
	n     int
	saved map[int]bool // that must be live or kept: all but those that it replaced itself
	err   error
}

// run edits until stop is closed.
func (e *labEditor) run(stop chan struct{}, moments *rand.Rand) {
	for {
		select {
		case <-stop:
			return
		case <-time.After(time.Duration(moments.Int64N(int64(60 * time.Millisecond)))):
		}
		e.mu.Lock()
		e.n++
		save := e.replace
		if e.n%2 == 0 {
			save = e.add
		}
		err := save()
		if err != nil && e.err == nil {
			e.err = fmt.Errorf("edit %d: %w", e.n, err)
		}
		e.mu.Unlock()
	}
}

// replace exchanges the file that is there and one of ours, and so knows which of its own edits it took away.
func (e *labEditor) replace() error {
	f, err := os.Open(e.root + "/etc/app/dir")
	if err != nil {
		return err
	}
	defer f.Close()
	dir := place{int(f.Fd())}
	mine := dir.path() + "/conf.new"
	if err := os.WriteFile(mine, []byte(stormVersion("edit", e.n)), 0o644); err != nil {
		return err
	}
	if err := renameat2(dir, "conf.new", dir, "conf", renameExchange); err != nil {
		return err
	}
	e.saved[e.n] = true

	out, err := os.ReadFile(mine)
	var was int
	if _, isVersion := fmt.Sscanf(string(out), "edit %d\n", &was); isVersion == nil {
		delete(e.saved, was)
	}
	return errors.Join(err, os.Remove(mine))
}

// add appends a line to the file that is mounted.
func (e *labEditor) add() error {
	f, err := os.OpenFile(e.root+"/etc/app/file", os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(f, "edit %d\n", e.n)
	e.saved[e.n] = true
	return errors.Join(err, f.Close())
}

// editsIn adds the numbers of the edits in a file's content.
func editsIn(content string, to map[int]bool) {
	for line := range strings.Lines(content) {
		if n, err := strconv.Atoi(strings.TrimSpace(strings.TrimPrefix(line, "edit "))); err == nil {
			to[n] = true
		}
	}
}

// settle lets the storm pass, and checks that all is as it should be.
func (s *storm) settle(when string) {
	s.t.Helper()
	s.asked.Wait()
	s.editor.mu.Lock()
	defer s.editor.mu.Unlock()
	c := stormConfigs[s.config]
	want := s.u.run("rev-parse", c.branch)

	s.waitMounts()
	labWait(s.t, time.Minute, when+": unfreeze and pull", func() error {
		// Of damage to a clone that was mended in this hour only a pull gets rid.
		_, _, _ = s.ssh("/do/unfreeze app")
		_, stderr, err := s.ssh("/do/pull app")
		if err != nil {
			return fmt.Errorf("%w: %s", err, stderr)
		}
		return nil
	})
	s.waitMounts()
	s.waitCommit("app", want)
	s.waitFile("/run/app.seen", s.u.run("show", want+":app/conf")+"\n")
	if c.others != "" {
		s.waitCommit("other", want)
		s.waitFile("/run/other.seen", s.u.run("show", want+":other/conf")+"\n")
	}
	s.waitRounds(s.u, 2)

	links := []string{"app"}
	if c.more != "" {
		links = append(links, "more")
	}
	s.checkFiles(when, want, links)
	s.checkManifest(when, want, links)
	s.checkPeople(when, want)
	s.checkEdits(when)
	if s.t.Failed() {
		s.t.FailNow()
	}
}

// waitMounts waits until PID 1 has mounted what the config wants, and nothing else.
func (s *storm) waitMounts() {
	s.t.Helper()
	want := []string{"/etc/app/dir: " + labCheckouts + "/app/app",
		"/etc/app/file: " + labCheckouts + "/app/app/file"}
	for local, link := range stormConfigs[s.config].mounts {
		want = append(want, local+": "+labCheckouts+"/"+link)
	}
	slices.Sort(want)
	labWait(s.t, time.Minute, "the mounts are those of the config with "+stormConfigs[s.config].name,
		func() error {
			if got := s.mounts("/etc/app"); !slices.Equal(got, want) {
				return fmt.Errorf("PID 1 has mounted %q, want %q", got, want)
			}
			return nil
		})
}

// checkFiles compares what is on disk below the links with the commit.
func (s *storm) checkFiles(when, commit string, links []string) {
	s.t.Helper()
	checkout := labCheckouts + "/app"
	for _, link := range links {
		for p := range strings.Lines(s.u.run("ls-tree", "-r", "--name-only", commit, link)) {
			p = strings.TrimSpace(p)
			got, want := strings.TrimSpace(s.read(checkout+"/"+p)), s.u.run("show", commit+":"+p)
			if got != want {
				s.t.Errorf("%s: %s is %.60q, want %.60q", when, p, got, want)
			}
		}
		got := s.run("sh", "-c", "cd "+checkout+" && find "+link+" -type f | LC_ALL=C sort")
		if want := s.u.run("ls-tree", "-r", "--name-only", commit, link); got != want {
			s.t.Errorf("%s: files %q, want %q", when, got, want)
		}
	}
	if got := s.run("ls", checkout+"/.gitopper"); got != "edits" && got != "" {
		s.t.Errorf("%s: left in .gitopper: %q", when, got)
	}
}

// checkManifest compares the manifest with the commit and with the disk, and the record with the manifest.
func (s *storm) checkManifest(when, commit string, links []string) {
	s.t.Helper()
	services := s.fs.Name() + "/var/lib/gitopper/services/"
	m, err := readManifest(services + "app.files")
	if err != nil {
		s.t.Errorf("%s: %v", when, err)
		return
	}
	if m.pending() {
		s.t.Errorf("%s: the manifest has a publish under way: %v", when, m.next)
	}
	var want []string
	for line := range strings.Lines(s.u.run(slices.Concat([]string{"ls-tree", "-r", commit}, links)...)) {
		f := strings.Fields(line) // 100644 blob 587be6b4... app/conf
		p := f[3]
		want = append(want, p)
		known := m.known[p]
		if len(known) != 1 || known[0].id != f[2] || known[0].mode != f[0] {
			s.t.Errorf("%s: %s in the manifest is %v, want %s", when, p, known, line)
			continue
		}
		st, err := os.Stat(s.fs.Name() + labCheckouts + "/app/" + p)
		if err != nil || known[0].size >= 0 && known[0].size != st.Size() {
			s.t.Errorf("%s: %s has size %d in the manifest, %v", when, p, known[0].size, err)
		}
	}
	if slices.Sort(want); !slices.Equal(m.paths, want) {
		s.t.Errorf("%s: the manifest has %q, want %q", when, m.paths, want)
	}

	rec, _, err := readRecord(services + "app.json")
	isTold := rec.Told.Content == m.live.Content && rec.Good.Content == m.live.Content
	hasRan := slices.ContainsFunc(rec.Ran, func(v ran) bool { return v.Commit == m.live.Commit })
	if err != nil || !isTold || !hasRan || rec.Pin != nil || rec.Suspect != nil {
		s.t.Errorf("%s: live is %v, the record has %+v, %v", when, m.live, rec, err)
	}
}

// checkPeople looks at the .git for people: as damage may be where only they would look, git itself may fail.
func (s *storm) checkPeople(when, commit string) {
	s.t.Helper()
	checkout := labCheckouts + "/app"
	head := strings.TrimSpace(s.read(checkout + "/.git/HEAD"))
	if got, want := s.u.run("rev-parse", head+":app"), s.u.run("rev-parse", commit+":app"); got != want {
		s.t.Errorf("%s: HEAD is %.8s, whose files are not those of %.8s", when, head, commit)
	}
	if out, err := s.try("git", "-C", checkout, "status", "--porcelain"); err == nil && out != "" {
		s.t.Errorf("%s: git status: %s", when, out)
	}
}

// checkEdits looks for each edit in what was kept.
func (s *storm) checkEdits(when string) {
	s.t.Helper()
	if s.editor.err != nil {
		s.t.Errorf("%s: %v", when, s.editor.err)
	}
	kept := map[int]bool{}
	editsDir := labCheckouts[1:] + "/app/.gitopper/edits"
	_ = fs.WalkDir(s.fs.FS(), editsDir, func(p string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		content := s.read("/" + p)
		editsIn(content, kept)
		isWhole := stormWhole(content, "", "edit")
		if strings.HasPrefix(content, "file ") { // not by its name, which a kill may have made us forget
			isWhole = stormWhole(content, "edit ", "file")
		}
		if !isWhole || !strings.Contains(content, "edit ") {
			s.t.Errorf("%s: kept as %s: %d bytes, %.40q", when, p, len(content), content)
		}
		return nil
	})
	var lost []int
	for n := range s.editor.saved {
		if !kept[n] {
			lost = append(lost, n)
		}
	}
	if slices.Sort(lost); len(lost) > 0 {
		s.t.Errorf("%s: of %d edits neither live nor kept: %v", when, s.editor.n, lost)
	}
}

// Killed at random moments in all that can go on at once: files, manifest, mounts and unit agree
// afterwards, no reader sees a missing, empty or mixed file, and each edit is live or kept.
func TestLabKills(t *testing.T) {
	kills := often(60, 500)
	s := newStorm(t)
	stop := make(chan struct{})
	var editing sync.WaitGroup
	moments := rand.New(rand.NewPCG(s.moments.Uint64(), 0))
	editing.Go(func() { s.editor.run(stop, moments) })
	endEditing := sync.OnceFunc(func() {
		close(stop)
		editing.Wait()
	})
	dir := s.watchFile("/etc/app/dir/conf", func(got string) bool {
		return stormWhole(got, "", "version",
			"edit")
	})
	file := s.watchFile("/etc/app/file", func(got string) bool { return stormWhole(got, "edit ", "file") })
	t.Cleanup(func() {
		endEditing()
		for _, stop := range []func() (int, string){dir, file} {
			reads, bad := stop()
			if bad != "" {
				t.Error(bad)
			}
			t.Logf("%d reads", reads)
			if reads < 100*kills {
				t.Errorf("%d reads are too few to tell", reads)
			}
		}
	})

	for killed := 0; killed < kills; {
		for range 1 + s.moments.IntN(3) {
			s.step()
		}
		time.Sleep(time.Duration(s.moments.Int64N(int64(600 * time.Millisecond)))) // not a wait for anything
		if !s.kill() {
			continue
		}
		killed++
		if killed == kills || s.moments.IntN(3) == 0 {
			s.settle(fmt.Sprintf("after kill %d", killed))
		}
	}

	endEditing()
	// With a new clone there is no damage that nobody has met: all of it must be whole now.
	if err := s.fs.RemoveAll("var/lib/gitopper/upstreams"); err != nil {
		t.Fatal(err)
	}
	s.settle("with a new clone")
	checkout := labCheckouts + "/app"
	if got := s.run("git", "-C", checkout, "status", "--porcelain"); got != "" {
		t.Errorf("git status: %s", got)
	}
	s.run("git", "-C", checkout, "fsck", "--connectivity-only")
	t.Logf("%d edits, of which %d were not replaced by another one", s.editor.n, len(s.editor.saved))
}
