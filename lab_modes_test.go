//go:build linux

package main

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"
)

// TestLabModes: visudo accepts what is at 0440 and nothing else, sudo obeys it, and a key at 0640 is for its
// group alone.
func TestLabModes(t *testing.T) {
	l, u := newBareLab(t), newLabUpstream(t)
	const rule = "daemon ALL=(root) NOPASSWD: /usr/bin/id\n"
	u.commit(map[string]string{"sudoers.d/ops": rule, "tls/key.pem": "secret\n"})
	config := func(mode, group string) {
		l.configure(u, fmt.Sprintf(`
[[services]]
machine = "lab"
service = "sudoers"
package = "sudo"
check = ["visudo", "-c"]
dirs = [ { local = "/etc/sudoers.d", link = "sudoers.d"%s } ]

[[services]]
machine = "lab"
service = "key"
dirs = [ { local = "/etc/tls/key.pem", link = "tls/key.pem", file = true, mode = "0640", group = %q } ]
`, mode, group))
	}
	check := func() string {
		out, _ := l.try("sh", "-c", "gitopper --check -h lab -c /etc/gitopper/config.toml 2>&1")
		return out
	}

	config(`, mode = "6440"`, "a b")
	said := check()
	for _, want := range []string{
		`dirs[0]: mode: must be octal text such as "0440"`, `dirs[0].group "a b": must be a group's name`,
	} {
		if strings.Count(said, want) != 1 {
			t.Errorf("--check says %q, want %q in it once", said, want)
		}
	}
	config("", "keyholders")
	if said := check(); !strings.Contains(said, `group "keyholders" does not exist`) {
		t.Errorf("--check says %q", said)
	}

	l.start("-r")
	l.waitState("sudoers", "DIFF", "check visudo", "0440")
	l.waitState("key", "BROKEN", `group "keyholders" does not exist: create it`)
	l.run("groupadd", "keyholders")
	l.waitState("key", "OK")
	config(`, mode = "0440"`, "keyholders")
	l.waitState("sudoers", "OK")

	l.run("visudo", "-c")
	if got := l.run("stat", "-c", "%a %U:%G", "/etc/sudoers.d/ops"); got != "440 root:root" {
		t.Error(got)
	}
	as := func(user, group string, cmd ...string) (string, error) {
		who := []string{"setpriv", "--reuid", user, "--regid", group, "--clear-groups"}
		return l.try(append(who, cmd...)...)
	}
	if out, err := as("daemon", "daemon", "sudo", "-n", "/usr/bin/id", "-u"); err != nil || out != "0" {
		t.Errorf("sudo: %q, %v", out, err)
	}
	if out, err := as("nobody", "keyholders", "cat", "/etc/tls/key.pem"); err != nil || out != "secret" {
		t.Errorf("the key's group reads %q, %v", out, err)
	}
	if out, err := as("nobody", "nogroup", "cat", "/etc/tls/key.pem"); err == nil {
		t.Errorf("others read %q", out)
	}

	// systemd reads root's file for a unit that may not.
	l.run("sh", "-c", "printf sealed | systemd-creds encrypt --name=sealed - /etc/tls/sealed")
	l.unit("reader.service", `[Service]
Type=oneshot
User=nobody
LoadCredential=key:/etc/tls/key.pem
LoadCredentialEncrypted=sealed:/etc/tls/sealed
StandardOutput=file:/run/reader.seen
ExecStart=cat ${CREDENTIALS_DIRECTORY}/key ${CREDENTIALS_DIRECTORY}/sealed
`)
	l.run("systemctl", "start", "reader")
	if got := l.read("/run/reader.seen"); got != "secret\nsealed" {
		t.Errorf("the unit reads %q", got)
	}

	l.run("chmod", "0644", "/etc/sudoers.d/ops", "/etc/tls/key.pem")
	labWait(t, time.Minute, "the modes are put right", func() error {
		if got := l.run("stat", "-c", "%a", "/etc/sudoers.d/ops", "/etc/tls/key.pem"); got != "440\n640" {
			return errors.New(got)
		}
		return nil
	})
	u.commit(map[string]string{"sudoers.d/ops": "daemon ALL=(root\n"})
	l.waitState("sudoers", "DIFF", "/etc/sudoers.d/ops:1")
	if got := l.read("/etc/sudoers.d/ops"); got != rule {
		t.Errorf("live: %q", got)
	}
}
