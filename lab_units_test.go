//go:build linux

package main

import (
	"os"
	"strings"
	"testing"
)

// Units of all kinds, on a real systemd: one whose own unit file comes from the repository, a template
// instance, a oneshot that a timer starts, one with private mounts, and one that does not exist.
func TestLabUnits(t *testing.T) {
	l, u := newLab(t), newLabUpstream(t)
	hello := func(word string) string {
		return "[Service]\nExecStart=/bin/sh -c 'echo " + word + " >/run/hello; exec sleep infinity'\n"
	}
	l.unit("instance@.service", "[Service]\nExecStart=sleep infinity\nExecReload=cp /srv/instance/conf /run/instance\n[Install]\nWantedBy=multi-user.target\n")
	l.unit("nightly.service", "[Service]\nType=oneshot\nExecStart=touch /run/nightly\n")
	l.unit("nightly.timer", "[Timer]\nOnCalendar=2099-01-01\n")
	l.unit("private.service", "[Service]\nMountFlags=private\nPrivateTmp=yes\nExecStart=sleep infinity\nExecReload=true\n")
	l.run("systemctl", "start", "nightly.timer")
	first := u.commit(map[string]string{"hello/hello.service": hello("one"), "instance/conf": "1\n",
		"nightly/conf": "1\n", "private/conf": "1\n", "private/file": "1\n"})
	l.write("/srv/private.file", "")
	l.run("systemctl", "start", "private")
	l.configure(u, `
[[services]]
machine = "lab"
service = "hello"
action = "restart"
settle = "100ms"
dirs = [ { local = "/etc/systemd/system/hello.service", link = "hello/hello.service", file = true } ]
[[services]]
machine = "lab"
service = "instance@a"
action = "reload"
settle = "100ms"
dirs = [ { local = "/srv/instance", link = "instance" } ]
[[services]]
machine = "lab"
service = "nightly"
action = "restart"
settle = "100ms"
dirs = [ { local = "/srv/nightly", link = "nightly" } ]
[[services]]
machine = "lab"
service = "private"
action = "reload"
settle = "100ms"
dirs = [ { local = "/srv/private.file", link = "private/file", file = true } ]
[[services]]
machine = "lab"
service = "nosuchunit"
action = "reload"
settle = "100ms"
dirs = [ { local = "/srv/nosuch", link = "nightly" } ]
[[services]]
machine = "lab"
service = "nosuchuser"
user = "nosuchuser"
dirs = [ { local = "/srv/user", link = "nightly" } ]
[[services]]
machine = "lab"
service = "nosuchpackage"
package = "no-such-package-anywhere"
dirs = [ { local = "/srv/package", link = "nightly" } ]
`)
	l.start()
	for _, s := range []string{"hello", "instance@a", "nightly"} {
		l.waitCommit(s, first)
		l.waitState(s, "OK")
	}
	l.waitFile("/run/hello", "one\n")
	if got := strings.TrimSpace(l.run("systemctl", "is-enabled", "instance@a")); got != "enabled" {
		t.Errorf("the template instance is %s", got)
	}
	if _, err := l.fs.Stat("run/nightly"); !os.IsNotExist(err) {
		t.Error("the oneshot of a timer was started")
	}
	l.waitState("private", "BROKEN", `unit has private mounts, use action = "restart"`)
	l.waitState("nosuchunit", "BROKEN", "unit nosuchunit.service does not exist")
	l.waitState("nosuchuser", "BROKEN", `user "nosuchuser" does not exist`)
	l.waitState("nosuchpackage", "BROKEN", "no-such-package-anywhere")
	// A new unit file is read, an instance's new file is seen.
	second := u.commit(map[string]string{"hello/hello.service": hello("two"), "instance/conf": "2\n"})
	l.waitCommit("hello", second)
	l.waitFile("/run/hello", "two\n")
	l.waitCommit("instance@a", second)
	l.waitFile("/run/instance", "2\n")
	if got := l.show("hello", "NeedDaemonReload"); got != "no" {
		t.Errorf("NeedDaemonReload=%s", got)
	}
}
