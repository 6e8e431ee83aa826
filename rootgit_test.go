//go:build linux

package main

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// adminGit is a git command of root's in the checkout.
func (w *world) adminGit(args ...string) (string, error) {
	cmd := exec.Command("git", args...)
	cmd.Dir = w.s.files.dir
	cmd.Env = append(os.Environ(), "HOME=/nonexistent", "GIT_CONFIG_GLOBAL=/dev/null",
		"GIT_AUTHOR_NAME=a", "GIT_AUTHOR_EMAIL=a@b", "GIT_COMMITTER_NAME=a", "GIT_COMMITTER_EMAIL=a@b")
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// nobodys is a world whose service's user is nobody, and a program of his that tells by a file that it ran.
func nobodys(t *testing.T, pairs ...string) (w *world, program string, ran func() bool) {
	w = newWorld(t)
	w.commit(append(pairs, ".gitmodules", "[submodule \"other\"]\n\tpath = other/mod\n\turl = x\n")...)
	w.asNobody()
	w.restart()
	w.reconcile()
	w.want("OK", "", "one\n", "reload")
	mark := w.dir + "/ran/ran"
	_ = os.Mkdir(w.dir+"/ran", 0o755)
	_ = os.Chmod(w.dir+"/ran", 0o1777)
	w.write("evil", "#!/bin/sh\nid >> "+mark+"\n")
	_ = os.Chmod(w.dir+"/evil", 0o755)
	return w, w.dir + "/evil", func() bool { return lexists(mark) }
}

// asThem runs a shell command as nobody.
func (w *world) asThem(script string) string {
	w.t.Helper()
	cmd := exec.Command("sh", "-ec", script)
	cmd.Dir = "/"
	cmd.Env = append(os.Environ(), "HOME=/nonexistent", "GIT_CONFIG_GLOBAL=/dev/null")
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	out, err := cmd.CombinedOutput()
	if err != nil {
		w.t.Fatalf("%s: %v\n%s", script, err, out)
	}
	return strings.TrimSpace(string(out))
}

// TestRootsGitForgedTree: the service's user puts other trees under the ids of HEAD's, where a directory of
// theirs is a submodule that git status is to look into. Root's stash, then status, must not run the program
// that its configuration names.
func TestRootsGitForgedTree(t *testing.T) {
	w, program, ran := nobodys(t)
	objects, files := w.up.objectsDir(), w.s.files.dir
	id := func(rev string) string { return w.git(w.work, "rev-parse", rev) }
	w.asThem(`cd ` + objects + `
git init -q --bare ` + w.dir + `/ran/r
for p in pack/*.pack; do
	mv $p ` + w.dir + `/ran/p
	GIT_OBJECT_DIRECTORY=$PWD GIT_DIR=` + w.dir + `/ran/r git unpack-objects -q < ` + w.dir + `/ran/p
done
rm -f pack/*`)
	raw := func(rev string) string {
		b, err := hex.DecodeString(id(rev))
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	forge := func(rev, kind, text string) {
		name := objects + "/" + id(rev)[:2] + "/" + id(rev)[2:]
		_ = os.Mkdir(filepath.Dir(name), 0o777)
		_ = os.Remove(name)
		(&hostile{}).loose(name, fmt.Sprintf("%s %d\x00%s", kind, len(text), text))
		_ = os.Lchown(name, 65534, 65534)
	}
	forge("HEAD:.gitmodules", "blob", "[submodule \"mod\"]\n\tpath = etc/mod\n\turl = x\n\tignore = none\n")
	forge("HEAD:etc", "tree", "100644 app.conf\x00"+raw("HEAD:etc/app.conf")+
		"160000 mod\x00"+raw("HEAD")+"40000 sub\x00"+raw("HEAD:etc/sub"))
	w.asThem(`cd ` + files + `/etc; git init -q mod; cd mod
git -c user.name=a -c user.email=a@b commit -q --allow-empty -m x; git config core.fsmonitor ` + program + `
echo edited > ../app.conf`)

	for _, words := range []string{
		"stash", "rm -r -q --cached etc", "reset -q --hard", "restore -S -W .", "checkout -q HEAD -- .",
		"status",
	} {
		out, err := w.adminGit(strings.Fields(words)...)
		if ran() {
			t.Fatalf("git %s of root's ran a program of the user's", words)
		}
		if isRead := words == "status"; isRead != (err == nil) {
			t.Errorf("git %s: %v %s", words, err, out)
		}
	}
	out, err := w.adminGit("status", "--porcelain")
	if err != nil || out != " M etc/app.conf\n?? etc/mod/\n" {
		t.Errorf("git status: %v %s", err, out)
	}
}

// TestRootsGitWritesNowhere: what root's git writes in a directory that the service's user exchanges for a
// link all the time does not come to lie where that leads.
func TestRootsGitWritesNowhere(t *testing.T) {
	pairs := []string{}
	for i := range 500 {
		pairs = append(pairs, fmt.Sprintf("etc/many/f%d", i), "x\n")
	}
	w, _, _ := nobodys(t, pairs...)
	victim := w.dir + "/victim"
	err := errors.Join(os.Mkdir(victim, 0o755), os.Symlink(victim, w.s.files.dir+"/etc/link"))
	at, err2 := openPlace(w.s.files.dir + "/etc")
	if err := errors.Join(err, err2); err != nil {
		t.Fatal(err)
	}
	defer at.close()
	ctx, end := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for ctx.Err() == nil {
			_ = renameat2(at, "many", at, "link", renameExchange)
		}
	}()
	for range 3 {
		_, _ = w.adminGit("reset", "-q", "--hard")
		_, _ = w.adminGit("stash")
	}
	end()
	<-ended
	if names, err := os.ReadDir(victim); err != nil || len(names) > 0 {
		t.Errorf("%d files were written elsewhere, %v", len(names), err)
	}
}

// TestRootsGitLock: the lock is put right when it is gone, and where the files are root's own there is none.
func TestRootsGitLock(t *testing.T) {
	w, _, _ := nobodys(t)
	lock := w.s.files.dir + "/.git/index.lock"
	if err := os.Remove(lock); err != nil {
		t.Fatal(err)
	}
	w.reconcile()
	if !lexists(lock) {
		t.Error("the lock was not put right")
	}

	w.spec.user = ""
	w.spec.dirs = w.spec.dirs[1:] // a file, for which the directory is not laid out anew
	w.run("chown", "-R", "root", w.bare)
	w.restart()
	w.reconcile()
	if st := w.s.Status(); st.State != "OK" || lexists(lock) {
		t.Errorf("%s %q, lock: %v", st.State, st.Info, lexists(lock))
	}
	w.write("mount/svc.service/one.conf", "edited\n")
	if out, err := w.adminGit("stash"); err != nil || w.read("mount/svc.service/one.conf") != "single\n" {
		t.Errorf("stash: %v %s, the file has %q", err, out, w.read("mount/svc.service/one.conf"))
	}
}
