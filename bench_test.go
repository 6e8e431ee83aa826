//go:build linux

package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
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

// BenchmarkIdleRound compares a round in which nothing is to be done (a look at upstream, and a pass of each service) with
// a git ls-remote of the same run. The look at all units, which goes on beside it, is measured on its own: here its
// systemctl is this binary.
func BenchmarkIdleRound(b *testing.B) {
	for _, n := range []int{1, 100} {
		b.Run(fmt.Sprintf("services=%d", n), func(b *testing.B) {
			setLogger(io.Discard, false)
			f := newFleet(b, n)
			f.okRound()
			f.commit("other/file", "y\n")
			f.okRound()
			var round, units, remote time.Duration
			for b.Loop() {
				remote += took(func() { f.git(f.work, "ls-remote", "-q", f.spec.upstream, "refs/heads/main") })
				round += took(func() {
					if err := f.up.lookNow(b.Context(), false); err != nil {
						b.Fatal(err)
					}
					var passes sync.WaitGroup // as in life, where each service has a goroutine
					for _, s := range f.all {
						passes.Go(func() { s.pass(b.Context()) })
					}
					passes.Wait()
				})
				units += took(f.lookAtUnits)
			}
			b.ReportMetric(0, "ns/op")
			b.ReportMetric(float64(round)/float64(remote), "round/ls-remote")
			b.ReportMetric(round.Seconds()*1000/float64(b.N), "round-ms")
			b.ReportMetric(units.Seconds()*1000/float64(b.N), "systemctl-ms")
		})
	}
}

// BenchmarkCommitGoesLive compares the time from a look at a commit until its content can be read at the local with git
// fetch and git reset --hard in an ordinary clone.
func BenchmarkCommitGoesLive(b *testing.B) {
	for _, files := range []int{1, 100} {
		b.Run(fmt.Sprintf("files=%d", files), func(b *testing.B) {
			setLogger(io.Discard, false)
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
	setLogger(io.Discard, false)
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
	cmd := exec.Command("git", "fast-import", "--quiet")
	cmd.Dir, cmd.Stdin = w.bare, strings.NewReader(in.String())
	if out, err := cmd.CombinedOutput(); err != nil {
		w.t.Fatalf("git fast-import: %v: %s", err, out)
	}
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

// BenchmarkPage is the page of a host with a thousand services, all of which have much to say.
func BenchmarkPage(b *testing.B) {
	var services []*Service
	for i := range 1000 {
		services = append(services, statusService(Status{Service: fmt.Sprint("service", i), Change: time.Now(),
			State: "FREEZE", state: stateFreeze, waiting: waiting{Pending: i}, LastLook: time.Now(),
			Commit: "606eb576bfeea4bcb8d6d6e2d5e5b1d7a1e2a3b4", Public: "operator (root@192.0.2.1): " +
				"looking at a slow page, until Sun, 22 Nov 2026 23:54:06 UTC"}))
	}
	m := testMonitor(services)
	_, before, _ := process()
	for b.Loop() {
		m.page(time.Now())
	}
	_, after, _ := process()
	b.ReportMetric((after-before)*1000/float64(b.N), "cpu-ms")
}
