//go:build linux

package main

import (
	"cmp"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// TestLabDebian has the main job done on hosts of other Debians than this machine: the oldest one that
// gitopper is for (git 2.30, OpenSSH 8.4, systemd 247), and with GITOPPER_TEST_ALL the newest, too, and both
// with all sorts of daemons.
func TestLabDebian(t *testing.T) {
	shareLabs(t)
	roots := cmp.Or(os.Getenv("GITOPPER_TEST_ROOTS"), t.TempDir()) // the first: to stay for the next run
	boot := func(t *testing.T, suite string) *labHost {
		l := bootHost(t, "", "LAB_ROOT="+debianRoot(t, roots+"/"+suite))
		l.run("apt-get", "update", "-qq")
		return l
	}
	t.Run("bullseye", func(t *testing.T) { debianLife(t, boot(t, "bullseye")) })
	if os.Getenv("GITOPPER_TEST_ALL") == "" {
		return
	}
	t.Run("trixie", func(t *testing.T) { debianLife(t, boot(t, "trixie")) })
	for _, suite := range []string{"bullseye", "trixie"} {
		t.Run(suite+" daemons", func(t *testing.T) { daemonsLife(t, boot(t, suite)) })
	}
}

// debianRoot makes a minimal system of a release, in a directory of that name, unless it is there.
func debianRoot(t *testing.T, root string) string {
	t.Helper()
	if lexists(root) {
		return root
	}
	const packages = "systemd,systemd-sysv,dbus,git,openssh-client,ca-certificates,procps,iproute2"
	suite := filepath.Base(root)
	cmd := exec.Command("debootstrap", "--variant=minbase", "--include="+packages, suite, root+".new",
		"http://deb.debian.org/debian")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("debootstrap %s: %v\n%s", suite, err, out)
	}
	if err := os.Rename(root+".new", root); err != nil {
		t.Fatal(err)
	}
	return root
}

// debianLife is a service's life on a host that has nothing of it yet. Its steps build on each other.
func debianLife(t *testing.T, l *labHost) {
	const versions = ". /etc/os-release; echo $PRETTY_NAME; git --version; systemctl --version; ssh -V 2>&1"
	t.Log(l.run("sh", "-c", versions))
	u, port := newLabUpstream(t), labPort()
	site := func(text, more string) map[string]string {
		return map[string]string{"nginx/conf.d/site.conf": fmt.Sprintf(
			"server {\n\tlisten 127.0.0.1:%d;\n\tlocation / { return 200 %s; }\n}\n%s", port, text, more)}
	}
	main := "worker_processes 1;\npid /run/nginx.pid;\nevents {}\n" +
		"http {\n\tinclude /etc/nginx/conf.d/*.conf;\n}\n"
	u.commit(map[string]string{"nginx/nginx.conf": main})
	first := u.commit(site("one", ""))
	l.configure(u, `
[[services]]
machine = "lab"
service = "nginx"
package = "nginx"
action = "reload"
settle = "1s"
check = ["nginx", "-t"]
dirs = [
  { local = "/etc/nginx/nginx.conf", link = "nginx/nginx.conf", file = true },
  { local = "/etc/nginx/conf.d", link = "nginx/conf.d" },
]
`)
	const conf = "/etc/nginx/conf.d/site.conf"
	do := func(command string) {
		t.Helper()
		if _, stderr, err := l.ssh(command); err != nil {
			t.Errorf("%s: %v: %s", command, err, stderr)
		}
	}

	l.start()
	l.waitInstalled("nginx")
	l.waitCommit("nginx", first)
	waitServed(t, port, "one")
	step := func(name string) { t.Log(l.name, name, "ok") }
	step("install and first deploy")

	second := u.commit(site("two", ""))
	l.waitCommit("nginx", second)
	waitServed(t, port, "two")
	step("change")

	bad := u.commit(site("three", "nonsense;\n"))
	l.waitState("nginx", "DIFF", bad[:8], `unknown directive "nonsense"`)
	waitServed(t, port, "two")
	step("check")

	// The check does not know what the unit needs besides.
	l.unit("nginx.service.d/strict.conf", `[Service]
ExecReload=
ExecReload=/bin/sh -c "! grep -q four /etc/nginx/conf.d/site.conf"
ExecReload=/usr/sbin/nginx -s reload
`)
	worse := u.commit(site("four", ""))
	l.waitState("nginx", "BROKEN", worse[:8], second[:8])
	waitServed(t, port, "two")
	step("fallback")

	third := u.commit(site("five", ""))
	l.waitCommit("nginx", third)
	waitServed(t, port, "five")
	do("/do/freeze nginx 1h a look")
	u.commit(site("six", ""))
	l.waitRounds(u, 3)
	waitServed(t, port, "five")
	l.waitState("nginx", "FREEZE", "a look")
	do("/do/unfreeze nginx")
	waitServed(t, port, "six")
	step("freeze")

	l.write(conf, "# somebody's\n")
	l.waitFile(conf, site("six", "")["nginx/conf.d/site.conf"])
	const edits = labCheckouts + "/nginx/.gitopper/edits/*/nginx/conf.d/site.conf"
	if kept := l.run("sh", "-c", "cat "+edits); kept != "# somebody's" {
		t.Errorf("kept: %q", kept)
	}
	step("drift")

	do("/do/rollback nginx " + second[:10])
	waitServed(t, port, "two")
	l.waitState("nginx", "FREEZE", "ROLLBACK: "+second[:8])
	step("rollback")

	l.run("systemctl", "enable", "gitopper", "nginx")
	u.stop()
	l.reboot()
	l.waitState("nginx", "FREEZE", "ROLLBACK: "+second[:8])
	waitServed(t, port, "two")
	want := []string{"/etc/nginx/conf.d: ", "/etc/nginx/nginx.conf: "}
	got := l.mounts("/etc/nginx")
	if !slices.EqualFunc(got, want, strings.HasPrefix) {
		t.Errorf("mounts after the reboot: %q", got)
	}
	if log := l.run("git", "-C", labCheckouts+"/nginx", "log", "--format=%H", "-1"); log != second {
		t.Errorf("git log in the checkout: %s", log)
	}
	step("reboot with upstream away")
	u.start()
	do("/do/unfreeze nginx")
	waitServed(t, port, "six")
}

// waitInstalled waits until a package is installed.
func (l *labHost) waitInstalled(name string) {
	l.t.Helper()
	labWait(l.t, installLimit, name+" is installed", func() error {
		_, err := l.try("sh", "-c", "dpkg -s "+name+" | grep -q '^Status: install ok installed'")
		return err
	})
}
