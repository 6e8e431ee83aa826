//go:build linux

package main

import (
	"fmt"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// everything is all that can be seen of a host below a directory and of its mounts, a line each, but for when
// it was last read.
func everything(t *testing.T, dir string) string {
	t.Helper()
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	text := string(mounts)
	err = filepath.WalkDir(dir, func(p string, _ fs.DirEntry, err error) error {
		var st syscall.Stat_t
		if err == nil {
			err = syscall.Lstat(p, &st)
		}
		st.Atim = syscall.Timespec{}
		text += fmt.Sprintf("%s %+v %v\n", p, st, err) // what lies below a mount may be gone
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return text
}

// dryRuns returns what a dry run prints. It fails if that changes anything, or does not end with status.
func (d daemonDir) dryRuns(status int, args ...string) (stdout, stderr string) {
	d.t.Helper()
	tmp := d.t.TempDir() // of its own, so that all it leaves behind is seen
	d.t.Setenv("TMPDIR", tmp)
	before := everything(d.t, d.dir)
	stdout, stderr, got := gitopper(d.t, append([]string{"-n", "-h", "m", "-c", d.file}, args...)...)
	if got != status {
		d.t.Errorf("dry run: status %d, want %d\n%s%s", got, status, stdout, stderr)
	}
	after := everything(d.t, d.dir)
	for line := range strings.Lines(after) {
		isQuery := strings.Contains(line, "/fake ") || strings.Contains(line, "/fake/asked ")
		if !strings.Contains(before, line) && !isQuery {
			d.t.Errorf("the dry run changed the host, there is now: %s", line)
		}
	}
	if strings.Count(before, "\n") > strings.Count(after, "\n") {
		d.t.Errorf("the dry run took something away:\n%s\nnow:\n%s", before, after)
	}
	if left, err := os.ReadDir(tmp); err != nil || len(left) > 0 {
		d.t.Errorf("left behind: %v, %v", left, err)
	}
	return stdout, stderr
}

// effects is what a real pass did, in a plan's words.
type effects struct {
	w      *world
	before map[string]uint64
	kept   []string
}

const planService = "svc.service"

// watchEffects begins to look at what the passes of a world's service do.
func (w *world) watchEffects() *effects {
	w.calls()
	return &effects{w, w.seen(), w.keptPaths()}
}

// seen returns the inodes of the files in the checkout, and the modes of the directories, whose names end in
// a slash.
func (w *world) seen() map[string]uint64 {
	checkout, inodes := filepath.Join(w.dir, "mount", planService)+"/", map[string]uint64{}
	for _, link := range []string{"etc", "one.conf", "other"} {
		filepath.WalkDir(checkout+link, func(p string, entry fs.DirEntry, err error) error {
			var st syscall.Stat_t
			if err != nil || syscall.Lstat(p, &st) != nil {
				return nil
			}
			p = strings.TrimPrefix(p, checkout)
			if entry.IsDir() {
				inodes[p+"/"] = uint64(st.Mode)
			} else {
				inodes[p] = st.Ino
			}
			return nil
		})
	}
	return inodes
}

// keptPaths returns the paths of all edits that were kept.
func (w *world) keptPaths() (paths []string) {
	edits := filepath.Join(w.dir, "mount", planService, editsDir)
	filepath.WalkDir(edits, func(p string, entry fs.DirEntry, err error) error {
		if err == nil && !entry.IsDir() {
			_, rest, _ := strings.Cut(strings.TrimPrefix(p, edits+"/"), "/")
			paths = append(paths, rest)
		}
		return nil
	})
	return paths
}

// lines returns what was done, from the files and the calls themselves, and of mounts from the log.
func (e *effects) lines(log string) (did []string) {
	after, isAnew := e.w.seen(), strings.Contains(log, ": laid out anew")
	for p, inode := range after {
		isDir := strings.HasSuffix(p, "/")
		if isDir && e.before[p] != 0 && e.before[p] != inode {
			did = append(did, "set "+p)
		} else if !isDir && e.before[p] != inode {
			did = append(did, "write "+p)
		}
	}
	for p := range e.before {
		if after[p] == 0 && !isAnew && !strings.HasSuffix(p, "/") {
			did = append(did, "remove "+p)
		}
	}
	for _, p := range e.w.keptPaths()[len(e.kept):] {
		did = append(did, "keep "+p)
	}
	for line := range strings.Lines(log) {
		for told, verb := range map[string]string{": mounted ": "mount ", ": unmounted ": "unmount "} {
			if _, what, ok := strings.Cut(line, told); ok {
				what, _, _ = strings.Cut(strings.TrimSpace(what), ",")
				did = append(did, verb+what)
			}
		}
	}
	if isAnew {
		did = append(did, "lay out")
	}
	for call := range strings.SplitSeq(e.w.calls(), ", ") {
		if call != "" && call != "daemon-reload" {
			did = append(did, call+" "+planService)
		}
	}
	return sortedLines(did)
}

// sortedLines brings lines into an order. What is kept is not removed as well; a mount may be made at the
// start, and again for what was published.
func sortedLines(lines []string) []string {
	all := slices.Clone(lines)
	lines = slices.DeleteFunc(lines, func(line string) bool {
		p, isRemoved := strings.CutPrefix(line, "remove ")
		return isRemoved && slices.Contains(all, "keep "+p)
	})
	slices.Sort(lines)
	return slices.Compact(lines)
}

// planLines brings a plan to the words of effects: paths as in the repository, and no checks.
func (w *world) planLines(plan string) (todo []string) {
	locals := strings.NewReplacer(w.dir+"/local/new", "etc", w.dir+"/local/etc", "etc",
		w.dir+"/local/one.conf", "one.conf", w.dir+"/local/other", "other",
		filepath.Join(w.dir, "mount", planService)+"/", "")
	for line := range strings.Lines(plan) {
		line = strings.TrimSpace(line)
		switch verb, what, _ := strings.Cut(line, " "); verb {
		case "check":
			continue
		case "lay":
			line = "lay out"
		case "mount":
			line, _, _ = strings.Cut(line, ", over")
		case "set":
			line = verb + " " + locals.Replace(what[strings.LastIndex(what, " ")+1:]) + "/"
		case "write", "remove", "keep":
			what, _, _ = strings.Cut(what, " (")
			what = what[strings.LastIndex(what, " ")+1:]
			line = verb + " " + locals.Replace(what)
		}
		todo = append(todo, line)
	}
	return sortedLines(todo)
}

// planCase is a situation, and what a dry run and the pass after it make of it.
type planCase struct {
	name   string
	lines  string // of the config; DIR is the world's directory
	first  bool   // a first pass has been done
	change func(w *world, d daemonDir)
	plan   string // lines in it; empty: there are none
	wrong  string // the trouble that is told; empty: there is none
}

const (
	planEtc  = "dirs = [{local = 'DIR/local/etc', link = 'etc'}]\n"
	planBoth = "dirs = [{local = 'DIR/local/etc', link = 'etc'}, " +
		"{local = 'DIR/local/one.conf', link = 'one.conf', file = true}]\n"
)

// configure writes the config of a plan's case.
func (d daemonDir) configure(lines string) {
	lines = "upstream = 'file://DIR/up.git'\naction = 'reload'\nsettle = '0s'\n" + lines
	d.write("c.toml", d.entry(planService, strings.ReplaceAll(lines, "DIR", d.dir)))
}

// run fails if what is told is not what a pass right after it does, or if anything is done before.
func (tc planCase) run(t *testing.T) {
	w, d := daemonWorld(t)
	d.configure(tc.lines)
	if tc.first {
		once(t, 0, planService+" "+w.head()[:8]+" OK", "-c", d.file)
	}
	tc.change(w, d)
	status, passed, again := 3, 0, 0
	if tc.plan == "" {
		status = 0
	}
	if tc.wrong != "" {
		status, passed, again = 1, 1, 1
	}
	plan, stderr := d.dryRuns(status)
	want := strings.ReplaceAll(tc.plan, "DIR", w.dir)
	isOdd := tc.plan == "" && plan != "" || tc.wrong == "" && stderr != ""
	if !containsLines(plan, want) || !strings.Contains(stderr, tc.wrong) || isOdd {
		t.Errorf("plan:\n%s%swant in it:\n%s\n%s", plan, stderr, want, tc.wrong)
	}

	e := w.watchEffects()
	_, log, got := gitopper(t, "--once", "-h", "m", "-c", d.file)
	if got != passed {
		t.Errorf("the pass: status %d, want %d: %s", got, passed, log)
	}
	if todo, did := w.planLines(plan), e.lines(log); !slices.Equal(todo, did) {
		t.Errorf("told:\n%s\ndid:\n%s", strings.Join(todo, "\n"), strings.Join(did, "\n"))
	}
	if plan, _ := d.dryRuns(again); plan != "" {
		t.Errorf("to be done after the pass:\n%s", plan)
	}
}

func same(*world, daemonDir) {}

func TestDryRunOfCommits(t *testing.T) {
	for _, tc := range []planCase{
		{"first deploy", planBoth, false, same, "write DIR/local/etc/app.conf (\n" +
			"mount etc on DIR/local/etc\nmount one.conf on DIR/local/one.conf\nreload svc", ""},
		{"on a host with files of its own", planBoth, false, func(w *world, _ daemonDir) {
			w.write("local/etc/app.conf", "the host's")
			w.write("local/one.conf", "the host's")
		}, "mount etc on DIR/local/etc, over what is there\n" +
			"mount one.conf on DIR/local/one.conf, over what is there", ""},
		{"file where a directory is to be", planEtc, false, func(w *world, _ daemonDir) {
			w.write("local/etc", "the host's")
		}, "write DIR/local/etc/app.conf (", "they must both be directories: move "},
		{"nothing", planBoth, true, same, "", ""},
		{"another's commit", planBoth, true, func(w *world, _ daemonDir) {
			w.commit("other/file", "y\n")
		}, "", ""},
		{"commit", planBoth, true, func(w *world, _ daemonDir) {
			w.commit("etc/app.conf", "two\n", "etc/sub", "", "one.conf", "other\n", "etc/new/one", "x")
		}, "remove DIR/local/etc/sub/deep\nmount one.conf on DIR/local/one.conf\nreload svc", ""},
		{"commit that is checked", planEtc + "check = ['true', '-x']\n", true, func(w *world, _ daemonDir) {
			w.commit("etc/app.conf", "two\n")
		}, "check true -x\nwrite DIR/local/etc/app.conf (", ""},
		{"commit without a link", planBoth, true, func(w *world, _ daemonDir) { w.commit("one.conf", "") },
			"", `: link "one.conf" is missing`},
		{"commit that was refused", planEtc + "check = ['grep', 'one', 'DIR/local/etc/app.conf']\n", true,
			func(w *world, d daemonDir) {
				w.commit("etc/app.conf", "two\n")
				once(d.t, 1, "DIFF commit", "-c", d.file)
			}, "", "gitopper: svc.service: commit "},
		{"unsigned commit", planEtc + "signers = 'DIR/signers'\n", false, func(w *world, _ daemonDir) {
			w.write("signers", "me@x "+testKey)
		}, "", "it carries no signature"},
		{"upstream away", planBoth, true, func(w *world, _ daemonDir) {
			w.commit("etc/app.conf", "two\n")
			w.upstreamGoes()
		}, "", "gitopper: svc.service: git ls-remote "},
	} {
		t.Run(tc.name, tc.run)
	}
}

func TestDryRunOfEdits(t *testing.T) {
	for _, tc := range []planCase{
		{"local edit", planBoth, true, func(w *world, _ daemonDir) {
			w.write("local/etc/app.conf", "edited\n")
		}, "keep edit of DIR/local/etc/app.conf\nwrite DIR/local/etc/app.conf (\nreload svc", ""},
		{"file removed here", planBoth, true, func(w *world, _ daemonDir) {
			os.Remove(w.dir + "/local/etc/app.conf")
		}, "write DIR/local/etc/app.conf (", ""},
		{"mode changed here", planBoth, true, func(w *world, _ daemonDir) {
			os.Chmod(w.dir+"/local/etc/app.conf", 0o600)
		}, "write DIR/local/etc/app.conf (", ""},
		{"mode of a directory", planBoth, true, func(w *world, _ daemonDir) {
			os.Chmod(w.dir+"/local/etc/sub", 0o700)
		}, "set mode and group of DIR/local/etc/sub\nreload svc", ""},
		{"another mode in the config", planEtc, true, func(w *world, d daemonDir) {
			d.configure("dirs = [{local = 'DIR/local/etc', link = 'etc', mode = '0640'}]\n")
		}, "set mode and group of DIR/local/etc\nset mode and group of DIR/local/etc/sub\n", ""},
		{"somebody's own in the way", planBoth, true, func(w *world, _ daemonDir) {
			w.write("local/etc/own", "mine\n")
			w.write("local/etc/stays", "mine\n")
			w.commit("etc/own", "theirs\n")
		}, "keep what is in the way as DIR/local/etc/own\nwrite DIR/local/etc/own (", ""},
		{"pinned", planBoth, true, func(w *world, _ daemonDir) {
			w.pinTo(w.head())
			w.write("local/etc/app.conf", "edited\n")
			w.commit("etc/app.conf", "two\n")
		}, "", ""},
		{"pinned to what does not run", planBoth, true, func(w *world, d daemonDir) {
			first := w.head()
			w.commit("etc/app.conf", "two\n")
			once(d.t, 0, "OK", "-c", d.file)
			w.pinTo(first)
		}, "write DIR/local/etc/app.conf (\nreload svc", ""},
	} {
		t.Run(tc.name, tc.run)
	}
}

// pinTo freezes the service.
func (w *world) pinTo(commit string) {
	w.editRecord(func(r *record) { r.Pin = &pin{version: version{Commit: commit}, Info: "me"} })
}

func TestDryRunOfOtherConfigs(t *testing.T) {
	for _, tc := range []planCase{
		{"other dirs", planBoth, true, func(w *world, d daemonDir) {
			d.configure("dirs = [{local = 'DIR/local/other', link = 'other'}, " +
				"{link = 'one.conf', file = true}]")
		}, "unmount DIR/local/etc\nunmount DIR/local/one.conf\nwrite DIR/local/other/file (\n" +
			"mount other on DIR/local/other", ""},
		{"another local", planEtc, true, func(w *world, d daemonDir) {
			d.configure("dirs = [{local = 'DIR/local/new', link = 'etc'}]")
		}, "unmount DIR/local/etc\nmount etc on DIR/local/new", ""},
		{"another branch", planBoth, true, func(w *world, d daemonDir) {
			w.write("work/etc/app.conf", "canary\n")
			w.git(w.work, "commit", "-q", "-a", "-m", "c")
			w.git(w.work, "push", "-q", "origin", "HEAD:canary")
			d.configure(planBoth + "branch = 'canary'\n")
		}, "write DIR/local/etc/app.conf (", ""},
		{"another user", planBoth, true, func(w *world, d daemonDir) {
			w.asNobody()
			d.configure(planBoth + "user = 'nobody'\n")
		}, "lay out DIR/mount/svc.service anew, what is there is kept as DIR/mount/svc.service.before", ""},
		{"no such user", planBoth, false, func(w *world, d daemonDir) {
			d.configure(planBoth + "user = 'no-such-user'\n")
		}, "", `user "no-such-user" does not exist`},
		{"service that left", planEtc, true, func(w *world, d daemonDir) {
			d.write("c.toml", d.entry("other", "upstream = 'file://"+w.bare+"'"))
		}, "unmount DIR/local/etc", ""},
	} {
		t.Run(tc.name, tc.run)
	}
}

func TestDryRunOfAHostThatChanged(t *testing.T) {
	for _, tc := range []planCase{
		{"mount that others can write", planEtc, false, func(w *world, _ daemonDir) {
			if err := os.Mkdir(w.dir+"/mount", 0o755); err == nil {
				os.Chmod(w.dir+"/mount", 0o777)
			}
		}, "", "can be changed by others than root"},
		{"mounts are gone", planBoth, true, func(w *world, _ daemonDir) { w.unmountAll() },
			"mount etc on DIR/local/etc\nmount one.conf on DIR/local/one.conf\nreload svc", ""},
		{"manifest is lost", planBoth, true, func(w *world, _ daemonDir) {
			os.Remove(manifestFile(w.dir+"/state", planService))
		}, "", ""},
		{"manifest and mounts are lost", planEtc, true, func(w *world, _ daemonDir) {
			os.Remove(manifestFile(w.dir+"/state", planService))
			w.unmountAll()
		}, "mount etc on DIR/local/etc\nreload svc.service", ""},
		{"clone is lost", planBoth, true, func(w *world, _ daemonDir) {
			os.RemoveAll(w.dir + "/state/upstreams")
			w.commit("etc/app.conf", "two\n")
		}, "write DIR/local/etc/app.conf (", ""},
		{"clone is damaged", planBoth, true, func(w *world, _ daemonDir) {
			os.Remove(w.dir + "/state/upstreams/" + digest(w.spec.upstream, "") + "/HEAD")
			w.commit("etc/app.conf", "two\n")
		}, "write DIR/local/etc/app.conf (", ""},
		{"checkout is lost", planBoth, true, func(w *world, _ daemonDir) {
			os.RemoveAll(w.dir + "/mount")
		}, "write DIR/local/etc/app.conf (\nmount etc on DIR/local/etc", ""},
		{"unit is down", planEtc, false, func(w *world, _ daemonDir) {
			w.write("fake/svc.service", "inactive")
		}, "start svc.service", ""},
		{"unit went down", planEtc, true, func(w *world, _ daemonDir) {
			w.write("fake/svc.service", "failed")
		}, "", "unit svc.service is failed"},
		{"checkout of the gitopper of 2022", planEtc, false, func(w *world, _ daemonDir) {
			clone := w.oldClone()
			w.write("local/etc/below", "")
			err := syscall.Mount(clone+"/etc", w.dir+"/local/etc", "", syscall.MS_BIND, "")
			if err != nil {
				w.t.Fatal(err)
			}
		}, "lay out DIR/mount/svc.service anew", ""},
	} {
		t.Run(tc.name, tc.run)
	}
}

// TestDryRunBesideADaemon: one that runs is not disturbed, nor are its files.
func TestDryRunBesideADaemon(t *testing.T) {
	w, d := daemonWorld(t)
	r := start(t, "-c", d.file)
	r.ready()
	r.metrics(`gitopper_service_state{service="svc"} 0`)
	second := w.commit("etc/app.conf", "two\n")
	plan, stderr := d.dryRuns(3)
	want := fmt.Sprintf("write %s/local/etc/app.conf (%.8s)\nreload svc\n", w.dir, second)
	if plan != want || stderr != "" {
		t.Errorf("plan:\n%s%swant:\n%s", plan, stderr, want)
	}
	w.shows("local/etc/app.conf", "one\n")
	r.metrics(`gitopper_service_state{service="svc"} 0`)
}

// TestDryRunOfAnInstall: a package that is missing may bring the user.
func TestDryRunOfAnInstall(t *testing.T) {
	w, d := daemonWorld(t)
	packages := newFakePackages(t)
	d.configure("dirs = [{local = 'DIR/local/etc', link = 'etc', group = 'no-such-group'}]\n" +
		"package = 'web'\nuser = 'no-such-user'\n")
	plan, stderr := d.dryRuns(3)
	want := "install web\nwrite " + w.dir + "/local/etc/app.conf ("
	if !strings.HasPrefix(plan, want) || stderr != "" || !strings.Contains(plan, "\nreload svc.service\n") {
		t.Errorf("plan:\n%s%swant:\n%s", plan, stderr, want)
	}
	if log := packageLog(packages); strings.Contains(log, "install") {
		t.Errorf("the package manager was told %s", log)
	}
	w.write("web.installed", "") // and has not
	if err := os.Rename(w.dir+"/web.installed", packages+"/web.installed"); err != nil {
		t.Fatal(err)
	}
	if _, stderr := d.dryRuns(1); !strings.Contains(stderr, `user "no-such-user" does not exist`) {
		t.Errorf("stderr %s", stderr)
	}
}

// TestDryRunOfABootstrap: the config is the one that would be there.
func TestDryRunOfABootstrap(t *testing.T) {
	w, d := daemonWorld(t)
	d.file = "config.toml"
	args := []string{"-U", "file://" + w.bare, "-M", w.dir + "/own"}
	if _, stderr := d.dryRuns(1, args...); !strings.Contains(stderr, `link "gitopper" is missing`) {
		t.Errorf("without a config: %s", stderr)
	}
	w.commit(bootConfig(d, "x = 1")...)
	if _, stderr := d.dryRuns(1, args...); !strings.Contains(stderr, "x: unknown option") {
		t.Errorf("with a wrong config: %s", stderr)
	}
	first := w.commit(bootConfig(d, "")...)
	want := fmt.Sprintf("write %[1]s/own/gitopper/gitopper/config.toml (%.8[2]s)\n"+
		"write %[1]s/own/gitopper/gitopper/k.pub (%.8[2]s)\nwrite %[1]s/local/etc/app.conf (%.8[2]s)\n"+
		"write %[1]s/local/etc/sub/deep (%.8[2]s)\nmount etc on %[1]s/local/etc\nreload svc\n", w.dir, first)
	if plan, stderr := d.dryRuns(3, args...); plan != want || stderr != "" {
		t.Errorf("plan:\n%s%swant:\n%s", plan, stderr, want)
	}
	once(t, 0, "svc "+first[:8]+" OK", append(args, "-c", d.file)...)
	d.dryRuns(0, args...)

	// A new config is used at the next start, and at once with -P.
	moved := bootConfig(d, "")
	moved[1] = strings.ReplaceAll(moved[1], "local/etc", "local/new")
	w.commit(moved...)
	if plan, _ := d.dryRuns(3, args...); strings.Count(plan, "\n") != 1 {
		t.Errorf("a new config:\n%s", plan)
	}
	plan, _ := d.dryRuns(3, append(args, "-P")...)
	if !containsLines(plan, "unmount "+w.dir+"/local/etc\nmount etc on "+w.dir+"/local/new\n") {
		t.Errorf("with -P:\n%s", plan)
	}
}

// TestDryRunBorrows: what the clone has is not fetched again.
func TestDryRunBorrows(t *testing.T) {
	w := newWorld(t)
	random := make([]byte, 4<<20)
	rand.NewChaCha8([32]byte{}).Read(random)
	w.write("work/etc/large", string(random))
	w.push()
	w.asNobody()
	w.restart()
	w.reconcile()
	w.run("chown", "-R", "root", w.bare)
	second := w.commit("etc/app.conf", "two\n")
	w.asNobody()

	scratch := w.dir + "/scratch"
	if err := os.Mkdir(scratch, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := borrow(w.dir+"/state", scratch); err != nil {
		t.Fatal(err)
	}
	u := newUpstream(scratch, w.spec.upstream, w.spec.user)
	u.track(w.spec.branch, w.spec.dirs, func() {})
	if err := u.lookNow(t.Context(), false); err != nil || u.looked("main").tip != second {
		t.Errorf("looked: %+v, %v", u.looked("main"), err)
	}
	if _, err := u.tree(t.Context(), second, w.spec.dirs); err != nil {
		t.Error(err)
	}
	var size int64
	filepath.WalkDir(scratch, func(p string, entry fs.DirEntry, err error) error {
		if fi, serr := os.Lstat(p); serr == nil && err == nil {
			size += fi.Size()
		}
		return nil
	})
	if size > 200_000 {
		t.Errorf("the throw-away clone has %d bytes", size)
	}
}

// TestDryRunOfATemplate: an instance is enabled as well.
func TestDryRunOfATemplate(t *testing.T) {
	w, d := daemonWorld(t)
	d.write("c.toml", strings.ReplaceAll(d.svc(""), `"svc"`, `"svc@a"`))
	plan, _ := d.dryRuns(3)
	if !strings.HasSuffix(plan, "\nenable svc@a\nreload svc@a\n") {
		t.Errorf("plan:\n%s", plan)
	}
	once(t, 0, "svc@a "+w.head()[:8]+" OK", "-c", d.file)
	if calls := w.calls(); calls != "enable svc@a, reload svc@a" {
		t.Errorf("systemctl %s", calls)
	}
}

// TestDryRunOfAnything: what is told is what is done, whatever happened to a host.
func TestDryRunOfAnything(t *testing.T) {
	w, d := daemonWorld(t)
	d.configure(planBoth)
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	n := 0
	text := func() string {
		n++
		return fmt.Sprintf("text %d\n", n)
	}
	some := func(list ...string) string { return list[r.IntN(len(list))] }
	there := func(paths ...string) string { return w.dir + "/mount/svc.service/" + some(paths...) }
	const private = "dirs = [{local = 'DIR/local/etc', link = 'etc', mode = '0640'}]\n"
	changes := map[string]func(){
		"commit": func() {
			w.commit(some("etc/app.conf", "etc/sub/deep", "etc/new/a", "etc/own", "one.conf"), text())
		},
		"less": func() {
			w.commit(some("etc/sub/deep", "etc/new/a", "etc/own"), "")
		},
		"edit": func() {
			name := there("etc/app.conf", "etc/new/a", "etc/new/b", "etc/own", "one.conf")
			w.write(strings.TrimPrefix(name, w.dir+"/"), text())
		},
		"delete":   func() { os.RemoveAll(there("etc/new", "etc/sub/deep", "one.conf")) },
		"mode":     func() { os.Chmod(there("etc/app.conf", "etc/sub", "etc"), 0o711) },
		"symlink":  func() { os.Symlink("/etc", there("etc/new")) },
		"unmount":  w.unmountAll,
		"both":     func() { d.configure(planBoth) },
		"etc":      func() { d.configure(planEtc) },
		"other":    func() { d.configure("dirs = [{local = 'DIR/local/other', link = 'other'}]\n") },
		"private":  func() { d.configure(private) },
		"manifest": func() { os.Remove(manifestFile(w.dir+"/state", planService)) },
		"clone":    func() { os.RemoveAll(w.dir + "/state/upstreams") },
	}
	names := slices.Sorted(maps.Keys(changes))
	for range 12 {
		var did []string
		for range 1 + r.IntN(3) {
			name := some(names...)
			did = append(did, name)
			changes[name]()
		}
		plan, stderr, _ := gitopper(t, "-n", "-h", "m", "-c", d.file)
		e := w.watchEffects()
		_, log, _ := gitopper(t, "--once", "-h", "m", "-c", d.file)
		if todo, done := w.planLines(plan), e.lines(log); !slices.Equal(todo, done) {
			t.Fatalf("after %v told:\n%s\n%sdid:\n%s\n%s", did, strings.Join(todo, "\n"), stderr,
				strings.Join(done, "\n"), log)
		}
	}
}
