//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// check runs a script as the check of a world whose dirs are etc and one.conf.
func (w *mountWorld) check(script string, gone ...string) error {
	w.Helper()
	w.write("check.sh", "cd "+w.dir+"/local\n"+script)
	w.must(w.table.makeTargets(w.checkDirs(), account{uid: os.Getuid(), gid: os.Getgid()}, w.save))
	j := w.checkJob("bash", w.dir+"/check.sh")
	j.Gone = []byte(strings.Join(gone, "\x00"))
	return runCheck(context.Background(), j)
}

func (w *mountWorld) checkJob(argv ...string) checkJob {
	return checkJob{Scratch: w.dir + "/scratch", Shows: wantedShows(w.checkout, w.checkDirs()), Argv: argv}
}

func (w *mountWorld) checkDirs() []dir {
	return []dir{w.dirAt("local/etc", "etc"), w.dirAt("local/one", "one.conf"), {link: "other"}}
}

func (w *mountWorld) stage(name, text string) {
	w.Helper()
	w.write("mount/svc/"+stageDir+"/"+name, text)
}

// TestCheckView: the candidate is complete, what is live is not touched, and nothing is left.
func TestCheckView(t *testing.T) {
	w := newMountWorld(t)
	w.must(os.Mkdir(w.checkout+"/"+ourDir, 0o700), os.Chmod(w.checkout+"/etc", 0o750))
	for _, name := range []string{
		"mine", "sub/deep/gone", "was/dir", "was/too", "be", "byuser/a/gone", "byuser/a/mine",
	} {
		w.write("mount/svc/etc/"+name, "live\n")
	}
	w.must(os.Symlink("/", w.checkout+"/etc/evil"))
	w.apply(w.checkDirs()[:2]...)
	w.stage("etc/app.conf", "three\n")
	w.stage("etc/was", "file\n")
	w.stage("etc/be/dir", "new\n")
	w.stage("one.conf", "staged\n")

	err := w.check(`set -e
test "$(cat etc/app.conf etc/mine etc/was etc/be/dir one)" = "$(printf 'three\nlive\nfile\nnew\nstaged')"
test "$(stat -c %a etc)" = 750
test "$(echo $(ls etc etc/byuser/a))" = "etc: app.conf be byuser evil mine was etc/byuser/a: mine"
! echo x 2>/dev/null >etc/app.conf
! rm etc/mine 2>/dev/null
! echo x 2>/dev/null >one
test $$ = 1
! ls /proc/`+fmt.Sprint(os.Getpid())+` 2>/dev/null
touch `+w.dir+`/ran
echo saw it; exit 3`,
		"be", "etc/be", "etc/sub/deep/gone", "etc/was/dir", "etc/was/too", "etc/byuser/a/gone", "etc/nope",
		"etc/evil/etc")
	refused := (*refusal)(nil)
	if !errors.As(err, &refused) || refused.Reason != "check" {
		t.Fatalf("%v", err)
	}
	if got := unmark(refused.Info); got != "check bash: exit status 3: saw it" {
		t.Errorf("%q", got)
	}
	if got := public(refused.Info); got != "check bash: exit status 3" {
		t.Errorf("told to everybody: %q", got)
	}
	if w.read("local/etc/app.conf")+w.read("local/one") != "one\nsingle\n" ||
		!lexists(w.checkout+"/etc/sub/deep/gone") {
		t.Error("the check changed what is live")
	}
	w.apply(w.checkDirs()[:2]...)
}

// TestCheckFirstCommit: nothing is live yet.
func TestCheckFirstCommit(t *testing.T) {
	w := newMountWorld(t)
	w.must(os.RemoveAll(w.checkout))
	w.stage("etc/app.conf", "bad\n")
	w.stage("one.conf", "single\n")
	if err := w.check("grep -q single one || exit 9; ! grep bad etc/app.conf"); err == nil ||
		unmark(err.Error()) != "check bash: exit status 1: bad" {
		t.Errorf("%v", err)
	}
	w.must(os.Remove(w.checkout + "/" + stageDir + "/etc/app.conf"))
	w.must(w.check("test -z \"$(ls etc)\""), os.Remove(w.checkout+"/"+stageDir+"/etc"))
	w.must(w.check("test -z \"$(ls etc)\""))
	w.sweep()
	if lexists(w.dir + "/local") {
		t.Error("what a check needed is still there")
	}
}

// TestCheckTrouble: what says nothing of the candidate is no refusal.
func TestCheckTrouble(t *testing.T) {
	w := newMountWorld(t)
	w.must(w.check("exit 0"))
	err := w.check("sleep 60 & kill -9 $!; wait $!")
	if err == nil || errors.As(err, new(*refusal)) || !strings.Contains(err.Error(), "exit status 137") {
		t.Errorf("killed: %v", err)
	}
	j := w.checkJob("/nope/check")
	const missing = "/nope/check: no such file or directory: the commit waits"
	err = runCheck(context.Background(), j)
	if errors.As(err, new(*refusal)) || !strings.Contains(fmt.Sprint(err), missing) {
		t.Errorf("missing program: %v", err)
	}

	ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
	defer cancel()
	j.Argv = []string{"sleep", "60"}
	err = runCheck(ctx, j)
	if !errors.Is(err, context.DeadlineExceeded) || errors.As(err, new(*refusal)) {
		t.Errorf("ended: %v", err)
	}
}

// TestCheckLeavesNothing: what it starts is ended, what it floods is cut, what it mounts is gone.
func TestCheckLeavesNothing(t *testing.T) {
	w := newMountWorld(t)
	err := w.check(fmt.Sprintf("setsid sleep 1000.%d & mount -t tmpfs x /mnt; ", os.Getpid()) +
		"yes flood | head -c 3000000; echo last; ulimit -d; cat /proc/self/oom_score_adj; exit 1")
	if err == nil || !strings.Contains(err.Error(), "flood; last; 2097152; 1000"+markClose) {
		t.Errorf("%v", err)
	}
	left, err := filepath.Glob("/proc/[0-9]*/cmdline")
	w.must(err)
	for _, f := range left {
		if data, _ := os.ReadFile(f); string(data) == fmt.Sprintf("sleep\x001000.%d\x00", os.Getpid()) {
			t.Errorf("left: %s", f)
		}
	}
	if got := w.mounts(); len(got) > 0 {
		t.Errorf("left: %v", got)
	}
}

// TestCheckFollowsNothing: what the owner of a checkout puts in the place of a staged file is not what the
// check reads.
func TestCheckFollowsNothing(t *testing.T) {
	w := newMountWorld(t)
	w.write("secret", "s3cret\n")
	w.must(os.MkdirAll(w.checkout+"/"+stageDir, 0o755))
	w.must(os.Symlink(w.dir+"/secret", w.checkout+"/"+stageDir+"/one.conf"))
	err := w.check("cat one; exit 1")
	if err == nil || errors.As(err, new(*refusal)) || strings.Contains(err.Error(), "s3cret") {
		t.Errorf("a link in the stage: %v", err)
	}
}

// TestCheckManyGone: a commit that removes nearly everything costs no more than that.
func TestCheckManyGone(t *testing.T) {
	w := newMountWorld(t)
	w.must(syscall.Mount("tmpfs", w.checkout, "tmpfs", 0, ""))
	w.write("mount/svc/one.conf", "single\n")
	var gone []string
	for i := range 20000 {
		dir, name := fmt.Sprintf("etc/many/%d", i%200), fmt.Sprintf("/%d", i)
		if i < 10000 {
			dir, name = fmt.Sprintf("etc/each/%d", i), "/file"
		}
		w.write("mount/svc/"+dir+name, "")
		if i > 0 {
			gone = append(gone, dir+name)
		}
	}
	start := time.Now()
	w.must(w.check("test $(find etc -type f | wc -l) = 1; test $(find etc | wc -l) = 4", gone...))
	if took := time.Since(start); took > 20*time.Second {
		t.Errorf("took %v", took)
	}
}
