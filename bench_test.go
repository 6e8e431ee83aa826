//go:build linux

package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// took is how long f takes.
func took(f func()) time.Duration {
	start := time.Now()
	f()
	return time.Since(start)
}

// BenchmarkIdleRound compares the CPU time of a round in which nothing is to be done (a look at upstream, and
// a pass of each service) with that of a git ls-remote of the same run. The look at all units, which goes on
// beside it, is measured on its own, and without its systemctl, which is this binary here.
func BenchmarkIdleRound(b *testing.B) {
	for _, size := range [][2]int{{1, 1}, {100, 1}, {1000, 1}, {100, 100}} {
		n, files := size[0], size[1]
		b.Run(fmt.Sprintf("services=%d/files=%d", n, files), func(b *testing.B) {
			setLogger(io.Discard, slog.LevelInfo)
			f := newIdleFleet(b, n, files)
			var remote, look, passes, units time.Duration
			for b.Loop() {
				_, others := cpuOf(func() { f.git(f.work, "ls-remote", "-q", f.spec.upstream, "refs/heads/main") })
				remote += others
				all, _ := cpuOf(func() {
					if err := f.up.lookNow(b.Context(), false); err != nil {
						b.Fatal(err)
					}
				})
				look += all
				all, _ = cpuOf(f.passes)
				passes += all
				all, others = cpuOf(f.lookAtUnits)
				units += all - others
			}
			each := func(d time.Duration) float64 { return float64(d.Microseconds()) / float64(b.N) }
			b.ReportMetric(0, "ns/op")
			b.ReportMetric(float64(look+passes)/float64(remote), "round/ls-remote")
			b.ReportMetric(each(remote), "ls-remote-µs")
			b.ReportMetric(each(look), "look-µs")
			b.ReportMetric(each(units), "units-µs")
			b.ReportMetric(each(passes)/float64(n), "µs/pass")
		})
	}
}

// newIdleFleet makes n services of so many files each, for which nothing is to be done.
func newIdleFleet(b *testing.B, n, files int) *fleet {
	f := newFleet(b, n)
	for i := range n * (files - 1) {
		f.write(fmt.Sprintf("work/svc%03d/etc/more/%d", i%n, i), "y\n")
	}
	f.commit("other/file", "y\n")
	for _, s := range f.all { // whose units need not be told one by one: that would take minutes
		s.action = ""
	}
	f.okRound()
	for _, s := range f.all {
		s.action = "reload"
	}
	time.Sleep(youngest)
	f.okRound()
	return f
}

// passes has each service make a pass, as in life, where each has a goroutine.
func (f *fleet) passes() {
	var all sync.WaitGroup
	for _, s := range f.all {
		all.Go(func() { s.work(s.pass, nil) })
	}
	all.Wait()
}

// BenchmarkCommitGoesLive compares the time from a look at a commit until its content can be read at the local with git
// fetch and git reset --hard in an ordinary clone.
func BenchmarkCommitGoesLive(b *testing.B) {
	for _, files := range []int{1, 100} {
		b.Run(fmt.Sprintf("files=%d", files), func(b *testing.B) {
			setLogger(io.Discard, slog.LevelInfo)
			w := newWorld(b)
			w.spec.action = ""
			w.restart()
			w.reconcile()
			w.git(w.dir, "clone", "-q", w.spec.upstream, w.dir+"/clone")
			var gitopper, whole, git time.Duration
			for i := 0; b.Loop(); i++ {
				text := fmt.Sprintf("version %d\n", i)
				pairs := []string{"etc/app.conf", text}
				for j := range files - 1 {
					pairs = append(pairs, fmt.Sprintf("etc/more/%d", j), fmt.Sprintf("%d of %s", j, text))
				}
				w.commit(pairs...)
				git += took(func() {
					w.git(w.dir+"/clone", "fetch", "-q", "origin")
					w.git(w.dir+"/clone", "reset", "-q", "--hard", "origin/main")
				})
				live := w.whenShown("local/etc/app.conf", text)
				start := time.Now()
				whole += took(w.reconcile)
				gitopper += (<-live).Sub(start)
			}
			b.ReportMetric(0, "ns/op")
			b.ReportMetric(float64(gitopper)/float64(git), "live/git")
			b.ReportMetric(gitopper.Seconds()*1000/float64(b.N), "live-ms")
			b.ReportMetric(whole.Seconds()*1000/float64(b.N), "pass-ms")
			b.ReportMetric(git.Seconds()*1000/float64(b.N), "git-ms")
		})
	}
}

// BenchmarkLargeLink is a link of 10,000 files, of which a commit changes none, one or all, against git fetch and git
// reset --hard in an ordinary clone: until all is live, and the processor time of whole passes with all their programs.
func BenchmarkLargeLink(b *testing.B) {
	setLogger(io.Discard, slog.LevelInfo)
	w := newWorld(b)
	w.spec.action = ""
	w.restart()
	w.commitMany(10_000, "first\n")
	w.reconcile()
	w.git(w.dir, "clone", "-q", w.spec.upstream, w.dir+"/clone")
	n := 0
	for _, files := range []int{0, 1, 10_000} {
		b.Run(fmt.Sprintf("changed=%d", files), func(b *testing.B) {
			var live, pass, passCPU, programs, git, gitCPU time.Duration
			for b.Loop() {
				n++
				text := fmt.Sprintf("version %d\n", n)
				w.commitMany(files, text)
				syscall.Sync() // neither pays for what was written before
				shown := make(<-chan time.Time)
				cpu, _ := cpuOf(func() {
					git += took(func() {
						w.git(w.dir+"/clone", "fetch", "-q", "origin")
						w.git(w.dir+"/clone", "reset", "-q", "--hard", "origin/main")
					})
				})
				gitCPU += cpu
				if files > 0 {
					shown = w.whenShown("local/"+manyName(files-1), fmt.Sprintf("%d\n", files-1)+text)
				}
				syscall.Sync()
				start := time.Now()
				cpu, inPrograms := cpuOf(func() { pass += took(w.reconcile) })
				passCPU, programs = passCPU+cpu, programs+inPrograms
				if files > 0 {
					live += (<-shown).Sub(start)
				}
			}
			report := func(of time.Duration, as string) { b.ReportMetric(of.Seconds()*1000/float64(b.N), as) }
			b.ReportMetric(0, "ns/op")
			b.ReportMetric(float64(live)/float64(git), "live/git")
			b.ReportMetric(float64(passCPU)/float64(gitCPU), "cpu/git")
			report(live, "live-ms")
			report(pass, "pass-ms")
			report(passCPU, "cpu-ms")
			report(programs, "cpu-programs-ms")
			report(git, "git-ms")
			report(gitCPU, "git-cpu-ms")
		})
	}
	b.Run("compare", func(b *testing.B) {
		want := w.s.files.tree()
		time.Sleep(youngest)
		_, _ = w.s.files.compare(b.Context(), want)
		for b.Loop() {
			if d, err := w.s.files.compare(b.Context(), want); err != nil || d.changes() > 0 {
				b.Fatal(d, err)
			}
		}
	})
}

func manyName(i int) string { return fmt.Sprintf("etc/%02d/file%03d.conf", i/100, i) }

// commitMany makes a commit upstream that changes so many files of a large link.
func (w *world) commitMany(files int, text string) {
	w.t.Helper()
	var in strings.Builder
	in.WriteString("commit refs/heads/main\ncommitter a <a@b> 1767225600 +0000\ndata 2\nc\n" +
		"from refs/heads/main^0\n")
	for i := range files {
		text := fmt.Sprintf("%d\n", i) + text
		fmt.Fprintf(&in, "M 100644 inline %s\ndata %d\n%s\n", manyName(i), len(text), text)
	}
	fastImport(w.t, w.bare, in.String())
}

// cpuOf is the processor time that f takes: ours, and that of programs that end in it.
func cpuOf(f func()) (sum, programs time.Duration) {
	used := func(who int) time.Duration {
		var u syscall.Rusage
		_ = syscall.Getrusage(who, &u)
		return time.Duration(u.Utime.Nano() + u.Stime.Nano())
	}
	self, children := used(syscall.RUSAGE_SELF), used(syscall.RUSAGE_CHILDREN)
	f()
	programs = used(syscall.RUSAGE_CHILDREN) - children
	return used(syscall.RUSAGE_SELF) - self + programs, programs
}

// whenShown watches a file until it holds text, and tells when that was.
func (w *world) whenShown(name, text string) <-chan time.Time {
	shown := make(chan time.Time, 1)
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	go func() {
		defer cancel()
		for ctx.Err() == nil {
			if data, err := os.ReadFile(w.dir + "/" + name); err == nil && string(data) == text {
				break
			}
			time.Sleep(50 * time.Microsecond)
		}
		shown <- time.Now()
	}()
	return shown
}

// BenchmarkPage is the page and BenchmarkMetrics the metrics of a host with a thousand services, all of which
// have much to say.
func BenchmarkPage(b *testing.B) {
	benchmarkHTTP(b, func(m monitor) string {
		var text strings.Builder
		text.Grow(2 << 20)
		m.writePage(&text, time.Now())
		return text.String()
	})
}

func BenchmarkMetrics(b *testing.B) {
	benchmarkHTTP(b, func(m monitor) string {
		var text strings.Builder
		text.Grow(2 << 20)
		writeMetrics(&text, m.services(), true, m.started)
		return text.String()
	})
}

func benchmarkHTTP(b *testing.B, text func(monitor) string) {
	var services []*Service
	for i := range 1000 {
		services = append(services, statusService(Status{Service: fmt.Sprint("service", i), Change: time.Now(),
			State: "FREEZE", state: stateFreeze, waiting: waiting{Pending: i}, LastLook: time.Now(),
			Commit: "606eb576bfeea4bcb8d6d6e2d5e5b1d7a1e2a3b4", Public: "operator (root@192.0.2.1): " +
				"looking at a slow page, until Sun, 22 Nov 2026 23:54:06 UTC"}))
	}
	m := testMonitor(services)
	startCounters(services)
	_, before, _ := process()
	for b.Loop() {
		text(m)
	}
	_, after, _ := process()
	b.ReportMetric((after-before)*1000/float64(b.N), "cpu-ms")
	b.ReportMetric(float64(len(text(m)))/1024, "KiB")
}

// BenchmarkParse is what is read of others' text in each round or for each commit: of a thousand each.
func BenchmarkParse(b *testing.B) {
	var object, units, mounts strings.Builder
	for i := range 1000 {
		fmt.Fprintf(&object, "100644 file%04d\x00%20d", i, i)
		fmt.Fprintf(&units, "app%d.service loaded active running Application Number %d\n", i, i)
		fmt.Fprintf(&mounts, "%d 25 254:1 /var/lib/m/app%d/etc /etc/app%d rw,relatime shared:1 - ext4 /dev/x rw\n",
			i, i, i)
	}
	for name, parse := range map[string]func() int{
		"tree":      func() int { list, _ := parseTree([]byte(object.String()), 20); return len(list) },
		"units":     func() int { return len(parseActive(units.String(), time.Time{})) },
		"mountinfo": func() int { list, _ := parseMountinfo(mounts.String()); return len(list) },
	} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if n := parse(); n != 1000 {
					b.Fatal(n)
				}
			}
		})
	}
}
