//go:build linux

package main

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"testing"
	"time"
)

// labUnitEntries are units of all kinds, and what is not there.
const labUnitEntries = `
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
`

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
	l.configure(u, labUnitEntries)
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

// labNoise is nothing that git could make smaller.
func labNoise(size int) string {
	b := make([]byte, size)
	for i := range b {
		b[i] = byte(rand.Uint32())
	}
	return string(b)
}

// What is wrong with a unit, or with the disk, is said as what it is; what heals, heals.
func TestLabTroubleHasItsName(t *testing.T) {
	l, u := newBareLab(t), newLabUpstream(t)
	killed := func(signal string) string { return "sh -c 'kill -" + signal + " $$$$'\n" }
	const sleeps = "ExecStart=sleep infinity\n"
	l.unit("crash.service", "[Service]\nExecStart="+killed("SEGV"))
	l.unit("before.service", "[Service]\n"+sleeps+"ExecStartPre="+killed("ABRT"))
	l.unit("reload.service", "[Service]\n"+sleeps+"ExecReload=test -e /run/well\nExecReload="+killed("BUS"))
	l.unit("stays.service", "[Unit]\nRefuseManualStop=yes\n[Service]\n"+sleeps+"ExecReload=true\n")
	l.unit("program.service", "[Service]\nExecStart=/nonesuch\n")
	l.unit("full.service", "[Service]\n"+sleeps+"ExecReload=true\n")
	l.run("mkdir", "-p", "/srv/small", "/var/lib/gitopper")
	l.run("mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", "/srv/small")
	l.run("mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", "/var/lib/gitopper")

	config := "settle = \"100ms\"\nfallback = false\n"
	for _, s := range []string{"crash", "before", "reload", "stays", "program", "full"} {
		action := "reload"
		switch s {
		case "stays":
			action = "restart"
		case "full":
			action += "\"\nmount = \"/srv/small"
		}
		config += fmt.Sprintf("[[services]]\nmachine = \"lab\"\nservice = %q\naction = \"%s\"\n", s, action)
		config += fmt.Sprintf("dirs = [ { local = \"/srv/%s\", link = %[1]q } ]\n", s)
	}
	first := u.commit(map[string]string{"crash/conf": "1\n", "before/conf": "1\n", "reload/conf": "1\n",
		"stays/conf": "1\n", "program/conf": "1\n", "full/conf": "1\n"})
	l.configure(u, config)
	l.start()
	l.waitState("crash", "BROKEN", "main process killed by SIGSEGV")
	l.waitState("before", "BROKEN", "code=killed, status=6/ABRT")
	l.waitState("program", "BROKEN", "status 203", "/nonesuch", "No such file or directory")
	l.waitCommit("reload", first)
	l.waitCommit("full", first)
	l.waitCommit("stays", first)
	u.commit(map[string]string{"reload/conf": "2\n", "stays/conf": "2\n"})
	l.waitState("stays", "BROKEN", `stays.service can't be stopped: use action = "reload"`)
	l.waitState("reload", "BROKEN", "status=1/FAILURE")
	l.run("touch", "/run/well")
	l.waitState("reload", "BROKEN", "code=killed, status=7/BUS")

	// The file system of the checkouts, then that of the clones.
	second := u.commit(map[string]string{"full/blob": labNoise(2 << 20)})
	l.waitState("full", "DIFF", "no space left on device", "make room there")
	l.run("mount", "-o", "remount,size=100m", "/srv/small")
	l.waitCommit("full", second)
	third := u.commit(map[string]string{"full/blob": labNoise(20 << 20)})
	l.waitState("full", "DIFF", "more than half of what is free on the disk of the clones: make room there")
	l.run("mount", "-o", "remount,size=100m", "/var/lib/gitopper")
	if _, stderr, err := l.ssh("/do/pull full"); err != nil {
		t.Error(err, stderr)
	}
	l.waitCommit("full", third)
}

// oldieScript is a service of before systemd.
const oldieScript = `#!/bin/sh
### BEGIN INIT INFO
# Provides: oldie
# Required-Start:
# Required-Stop:
# Default-Start: 2 3 4 5
# Default-Stop: 0 1 6
### END INIT INFO
echo $1 >>/run/oldie
`

// oldieEntry, dropInEntry and ownEntry are of a sysv script, and of what systemd reads.
const oldieEntry = `
settle = "100ms"
action = "restart"
[[services]]
machine = "lab"
service = "oldie"
dirs = [ { local = "/etc/oldie", link = "oldie" } ]
`

const dropInEntry = `[[services]]
machine = "lab"
service = "app"
dirs = [ { local = "/etc/systemd/system/app.service.d", link = "app" } ]
`

const ownEntry = `[[services]]
machine = "lab"
service = "own"
dirs = [ { local = "/etc/systemd/system/own.service", link = "own/own.service", file = true } ]
`

// waitShow waits until systemd says this of a unit.
func (l *labHost) waitShow(unit, property, want string) {
	l.t.Helper()
	labWait(l.t, time.Minute, fmt.Sprintf("%s of %s is %q", property, unit, want), func() error {
		if got := l.show(unit, property); got != want {
			return errors.New(got)
		}
		return nil
	})
}

// A unit that systemd has not met yet is looked for, and one whose file is no longer mounted is forgotten.
func TestLabUnitFilesComeAndGo(t *testing.T) {
	l, u := newBareLab(t), newLabUpstream(t)
	l.unit("app.service", "[Unit]\nAfter=gitopper.service\n[Service]\nExecStart=sleep infinity\n"+
		"[Install]\nWantedBy=multi-user.target\n")
	first := u.commit(map[string]string{"oldie/conf": "1\n",
		"app/env.conf":    "[Service]\nEnvironment=FROM=git\n",
		"own/own.service": "[Service]\nExecStart=sleep infinity\n"})
	l.write("/etc/init.d/oldie", oldieScript)
	l.run("chmod", "755", "/etc/init.d/oldie")
	l.configure(u, oldieEntry+dropInEntry+ownEntry)
	l.start()
	for _, s := range []string{"oldie", "app", "own"} {
		l.waitCommit(s, first)
	}
	l.waitFile("/run/oldie", "start\n")
	if got := l.show("app", "Environment"); got != "FROM=git" {
		t.Errorf("the drop-in: %q", got)
	}

	// As a package that is purged, and installed anew, both by somebody else.
	l.run("systemctl", "stop", "oldie")
	l.run("mv", "/etc/init.d/oldie", "/root")
	l.run("systemctl", "daemon-reload")
	l.waitState("oldie", "BROKEN", "unit oldie.service does not exist")
	l.run("mv", "/root/oldie", "/etc/init.d")
	l.waitState("oldie", "BROKEN", "unit oldie.service is inactive")
	if _, stderr, err := l.ssh("/do/pull oldie"); err != nil {
		t.Error(err, stderr)
	}
	l.waitCommit("oldie", first)

	// After a reboot, too, at which systemd read its files before there was a mount.
	running := func() error {
		env := l.read("/proc/" + l.show("app", "MainPID") + "/environ")
		if !strings.Contains(env, "FROM=git\x00") {
			return fmt.Errorf("%q", env)
		}
		return nil
	}
	if err := running(); err != nil {
		t.Error(err)
	}
	l.run("systemctl", "enable", "gitopper", "app")
	l.reboot()
	labWait(t, time.Minute, "the unit runs with its drop-in after a reboot", running)
	l.waitCommit("app", first)

	const dropIns = "/etc/systemd/system/app.service.d"
	l.configure(u, oldieEntry+strings.Replace(dropInEntry, dropIns, "", 1)+ownEntry)
	l.run("systemctl", "restart", "gitopper")
	l.waitShow("app", "Environment", "")
	l.configure(u, oldieEntry)
	l.run("systemctl", "restart", "gitopper")
	l.waitShow("own", "LoadState", "not-found")
	if got := l.show("own", "ActiveState"); got != "active" {
		t.Errorf("a unit that left the config is %s", got)
	}
}
