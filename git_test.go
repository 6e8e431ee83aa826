package main

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

func TestSparsePatternsAreExact(t *testing.T) {
	w := newWorld(t)
	names := []string{"a b", "q*", "q?", "[x]", `back\slash`, "#hash", "!bang", "trail ", "é", "sub/etc", "-d"}
	for _, n := range names {
		w.commit(n+"/in", "x\n", n+"2/not", "x\n", "x/"+n+"/not", "x\n")
	}
	w.spec.action, w.spec.dirs = "", nil
	for _, n := range names {
		w.spec.dirs = append(w.spec.dirs, dir{link: n})
	}
	w.restart()
	w.reconcile()
	if st := w.s.Status(); st.State != "OK" {
		t.Fatalf("%+v", st)
	}
	var files []string
	err := filepath.WalkDir(w.s.repo.dir, func(p string, d os.DirEntry, err error) error {
		if d.Name() == ".git" {
			return filepath.SkipDir
		}
		if !d.IsDir() {
			files = append(files, strings.TrimPrefix(p, w.s.repo.dir+"/"))
		}
		return err
	})
	if err != nil || len(files) != len(names) {
		t.Errorf("on disk: %q, %v", files, err)
	}
	w.clean()
	if n := w.git(w.s.repo.dir, "rev-list", "--count", "HEAD"); n != "12" {
		t.Errorf("%s commits of history, want 12", n)
	}
}

func TestGitEnvironment(t *testing.T) {
	t.Setenv("GIT_DIR", "/nope")
	t.Setenv("LD_PRELOAD", "")
	t.Setenv("https_proxy", "http://proxy:1")
	t.Setenv("SSL_CERT_FILE", "/certs")
	cmd := gitCommand(account{uid: os.Getuid(), home: "/home/x"}, "/c", true, "status")
	env := strings.Join(cmd.Env, "\n")
	for _, want := range []string{"HOME=/home/x", "https_proxy=http://proxy:1", "SSL_CERT_FILE=/certs", "GIT_DIR=/c/.git", "GIT_CONFIG_GLOBAL=/dev/null", "GIT_ALLOW_PROTOCOL=https:http:ssh:git:file"} {
		if !strings.Contains(env, want) {
			t.Errorf("%s is not in git's environment", want)
		}
	}
	if strings.Contains(env, "/nope") || strings.Contains(env, "LD_PRELOAD") {
		t.Errorf("our environment leaks: %s", env)
	}
}

// TestNothingRuns: neither hooks, filters nor transport helpers of a repository run anything.
func TestNothingRuns(t *testing.T) {
	w := newWorld(t)
	w.reconcile()
	ran := w.dir + "/ran"
	for _, h := range []string{"post-checkout", "reference-transaction", "post-index-change", "pre-auto-gc"} {
		os.MkdirAll(w.s.repo.dir+"/.git/hooks", 0o755)
		if err := os.WriteFile(w.s.repo.dir+"/.git/hooks/"+h, []byte("#!/bin/sh\ntouch "+ran+"\n"), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	w.git(w.s.repo.dir, "config", "filter.evil.smudge", "touch "+ran)
	w.git(w.s.repo.dir, "config", "filter.evil.clean", "touch "+ran)
	w.git(w.s.repo.dir, "config", "core.fsmonitor", "touch "+ran)
	os.Remove(ran) // w.git is an ordinary one
	w.commit("etc/.gitattributes", "* filter=evil\n", "etc/app.conf", "two\n")
	w.reconcile()
	w.calls()
	w.want("OK", "", "two\n", "")
	if _, err := os.Stat(ran); err == nil {
		t.Error("something of the repository's was run")
	}
	if _, err := lookUpstream(context.Background(), account{uid: os.Getuid()}, "ext::touch "+ran, []string{"main"}); err == nil {
		t.Error("ext:: was accepted")
	}
	if _, err := os.Stat(ran); err == nil {
		t.Error("a transport helper was run")
	}
}

func TestChangedUser(t *testing.T) {
	if os.Getuid() != 0 || exec.Command("id", "nobody").Run() != nil {
		t.Skip("needs root and the user nobody")
	}
	w := newWorld(t)
	w.reconcile()
	w.calls()
	os.Chmod(w.dir, 0o755)
	for p := w.dir; p != "/"; p = filepath.Dir(p) {
		if fi, err := os.Stat(p); err != nil || fi.Mode()&0o001 == 0 {
			os.Chmod(p, fi.Mode()|0o001)
		}
	}
	os.Symlink("/etc/passwd", w.s.repo.dir+"/etc/link")
	passwd, _ := os.Lstat("/etc/passwd")
	w.git(w.up, "config", "http.receivepack", "false")
	w.spec.user, w.spec.upstream = "nobody", w.s.upstream
	w.git(w.s.repo.dir, "config", "planted.program", "x")                                     // by the owner of before: it must not come along
	if out, err := exec.Command("chown", "-R", "nobody", w.up).CombinedOutput(); err != nil { // git serves nobody what is somebody else's
		t.Fatal(string(out))
	}
	w.restart()
	w.reconcile()
	w.want("OK", "", "one\n", "")
	if err := filepath.WalkDir(w.s.repo.dir, func(p string, d os.DirEntry, err error) error {
		if fi, err := d.Info(); err == nil && owner(fi) != w.s.repo.acct.uid {
			t.Errorf("%s belongs to %d", p, owner(fi))
		}
		return err
	}); err != nil {
		t.Error(err)
	}
	if config, err := os.ReadFile(w.s.repo.dir + "/.git/config"); err != nil || strings.Contains(string(config), "planted") {
		t.Errorf("the configuration came along: %s, %v", config, err)
	}
	if after, _ := os.Lstat("/etc/passwd"); owner(after) != owner(passwd) {
		t.Error("a link was followed")
	}
	w.spec.user = "nosuchuser"
	w.restart()
	w.reconcile()
	w.want("BROKEN", `user "nosuchuser" does not exist`, "one\n", "")
}

func TestSigners(t *testing.T) {
	w := newWorld(t)
	keygen := func(name string) string {
		t.Helper()
		if out, err := exec.Command("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", w.dir+"/"+name).CombinedOutput(); err != nil {
			t.Fatalf("ssh-keygen: %s", out)
		}
		pub, err := os.ReadFile(w.dir + "/" + name + ".pub")
		if err != nil {
			t.Fatal(err)
		}
		return strings.TrimSpace(string(pub))
	}
	good, expired, revoked := keygen("good"), keygen("expired"), keygen("revoked")
	keygen("foreign")
	w.write("signers", "good@x namespaces=\"git\" "+good+"\nold@x namespaces=\"git\",valid-before=\"20200101\" "+expired+"\nrevoked@x "+revoked+"\n")
	w.write("signers.revoked", revoked+"\n")
	signed := func(key, text string) string {
		t.Helper()
		w.write("work/etc/app.conf", text)
		w.git(w.work, "add", "-A")
		args := []string{"-c", "gpg.format=ssh", "-c", "user.signingkey=" + w.dir + "/" + key, "commit", "-q", "-m", "c"}
		if key != "" {
			args = append(args, "-S")
		}
		w.git(w.work, args...)
		w.git(w.work, "push", "-q", "-f", "origin", "HEAD:main")
		return w.git(w.work, "rev-parse", "HEAD")
	}
	w.spec.signers = w.dir + "/signers"
	w.restart()
	w.reconcile()
	if st := w.s.Status(); st.State != "DIFF" || !strings.Contains(st.Info, "is not signed by one of") {
		t.Fatalf("unsigned: %+v", st)
	}
	first := signed("good", "one signed\n")
	w.reconcile()
	w.want("OK", "", "one signed\n", "reload")
	for _, key := range []string{"", "foreign", "expired", "revoked"} {
		signed(key, "by "+key+"\n")
		w.reconcile()
		w.want("DIFF", "is not signed by one of", "one signed\n", "")
		before := gitRuns()
		w.reconcile()
		if n := gitRuns() - before; n != 1 {
			t.Errorf("%s: a round with a refused commit ran git %v times", key, n)
		}
	}
	second := signed("good", "two signed\n")
	w.reconcile()
	w.want("OK", "", "two signed\n", "reload")
	// An older signed commit, pushed by force, is a replay; as a rollback it is an operator's wish.
	w.git(w.work, "push", "-q", "-f", "origin", first+":main")
	w.reconcile()
	w.want("DIFF", "does not descend from "+second[:8], "two signed\n", "")
	if err := w.s.operate(context.Background(), op{verb: "rollback", hash: first}); err != nil {
		t.Error(err)
	}
	w.want("FREEZE", "ROLLBACK", "one signed\n", "reload")
	var oe *opError
	never := w.git(w.work, "rev-parse", "HEAD~1")
	w.git(w.work, "push", "-q", "-f", "origin", "HEAD:main")
	if err := w.s.operate(context.Background(), op{verb: "rollback", hash: never}); !errors.As(err, &oe) || oe.status != "Not Acceptable" {
		t.Errorf("rollback to an unsigned commit that never ran: %v", err)
	}
	if err := w.s.operate(context.Background(), op{verb: "unfreeze"}); err != nil {
		t.Error(err)
	}
	w.want("OK", "", "two signed\n", "reload")
	// Another branch starts anew.
	w.git(w.work, "push", "-q", "-f", "origin", first+":refs/heads/canary")
	w.spec.branch = "canary"
	w.restart()
	w.reconcile()
	w.want("OK", "", "one signed\n", "reload")
}

// TestEvilTrees: names that git itself would refuse to check out are refused before anything of the commit goes live.
func TestEvilTrees(t *testing.T) {
	for _, name := range []string{"..", ".git", ".GIT", "."} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			w.reconcile()
			w.calls()
			tree := func(entries string) string {
				t.Helper()
				cmd := exec.Command("git", "mktree")
				cmd.Dir, cmd.Stdin = w.work, strings.NewReader(entries)
				out, err := cmd.Output()
				if err != nil {
					t.Fatal(err)
				}
				return strings.TrimSpace(string(out))
			}
			w.write("blob", "[core]\n\tsshCommand = evil\n")
			blob := w.git(w.work, "hash-object", "-w", w.dir+"/blob")
			inner := tree("040000 tree " + tree("100644 blob "+blob+"\tconfig\n") + "\t.git\n")
			etc := tree("100644 blob " + blob + "\t!first\n100644 blob " + blob + "\tapp.conf\n040000 tree " + inner + "\t" + name + "\n")
			top := tree("040000 tree " + etc + "\tetc\n100644 blob " + blob + "\tone.conf\n")
			commit := w.git(w.work, "commit-tree", "-p", "HEAD", "-m", "evil", top)
			w.git(w.work, "push", "-q", "-f", "origin", commit+":main")
			before, err := os.ReadFile(w.s.repo.dir + "/.git/config")
			if err != nil {
				t.Fatal(err)
			}
			w.reconcile()
			w.want("DIFF", "is not a path that may be checked out", "one\n", "")
			if after, err := os.ReadFile(w.s.repo.dir + "/.git/config"); err != nil || string(after) != string(before) {
				t.Errorf(".git/config was changed: %s, %v", after, err)
			}
			w.commit("etc/app.conf", "fixed\n")
			w.reconcile()
			w.want("OK", "", "fixed\n", "reload")
		})
	}
}

func TestHugeLink(t *testing.T) {
	w := newWorld(t)
	w.reconcile()
	w.calls()
	w.write("blob", strings.Repeat("x", 5000))
	blob := w.git(w.work, "hash-object", "-w", w.dir+"/blob")
	w.git(w.work, "update-index", "--add", "--cacheinfo", "120000,"+blob+",etc/link")
	w.git(w.work, "commit", "-q", "-m", "link")
	w.git(w.work, "push", "-q", "origin", "HEAD:main")
	w.reconcile()
	w.want("DIFF", "File name too long", "one\n", "")
}
