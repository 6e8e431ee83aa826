//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"strings"
	"testing"
	"time"
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

// Daemons of Debian as they come, each of which takes its config in its own way: a firewall that must never
// be down, two that reload, one that can't, and one that is no unit.
func TestLabDaemons(t *testing.T) {
	l, u := newBareLab(t), newLabUpstream(t)
	l.firewall()
	l.unit("once.service", "[Service]\nType=oneshot\nRemainAfterExit=yes\n"+
		"ExecStart=/bin/sh -c 'cat /srv/once/conf >>/run/once'\n")
	web, dns := labPort(), labPort()
	// Its package starts it before there is any other config.
	l.write("/etc/unbound/unbound.conf.d/port.conf", fmt.Sprintf("server:\n port: %d\n", dns))
	// The firewall is gitopper's to install.
	l.run("sh", "-c", "DEBIAN_FRONTEND=noninteractive "+
		"apt-get install -qq -y --no-install-recommends haproxy unbound dns-root-data cron sudo")
	l.run("useradd", "--system", "deputy")
	commit := func(version int) string {
		t.Helper()
		return u.commit(map[string]string{
			"nft/nftables.conf": fmt.Sprintf("table inet lab {\n"+
				" set blocked { type ipv4_addr; elements = { 192.0.2.%d } }\n"+
				" chain input { type filter hook input priority 0; ip saddr @blocked drop; }\n}\n", version),
			"cron/probe": fmt.Sprintf("# version %d\n@yearly root true\n", version),
			"haproxy/haproxy.cfg": fmt.Sprintf("defaults\n mode http\n timeout client 5s\n"+
				" timeout server 5s\n timeout connect 5s\nfrontend lab\n bind 127.0.0.1:%d\n"+
				" http-request return status 200 content-type text/plain string v%d\n", web, version),
			"unbound/lab.conf": fmt.Sprintf("server:\n local-data: \"web.lab. A 192.0.2.%d\"\n", version),
			"sudo/ops":         fmt.Sprintf("deputy ALL = NOPASSWD: /bin/echo v%d\n", version),
			"once/conf":        fmt.Sprintln(version),
		})
	}
	config := `
settle = "100ms"
[[services]]
machine = "lab"
service = "nftables"
package = "nftables"
action = "reload"
check = [ "nft", "-c", "-f", "/etc/nftables.conf" ]
dirs = [ { local = "/etc/nftables.conf", link = "nft/nftables.conf", file = true } ]
[[services]]
machine = "lab"
service = "cron"
action = "reload"
dirs = [ { local = "/etc/cron.d/probe", link = "cron/probe", file = true } ]
[[services]]
machine = "lab"
service = "haproxy"
action = "reload"
check = [ "haproxy", "-c", "-f", "/etc/haproxy/haproxy.cfg" ]
dirs = [ { local = "/etc/haproxy/haproxy.cfg", link = "haproxy/haproxy.cfg", file = true } ]
[[services]]
machine = "lab"
service = "unbound"
action = "reload"
check = [ "unbound-checkconf" ]
dirs = [ { local = "/etc/unbound/unbound.conf.d/lab.conf", link = "unbound/lab.conf", file = true } ]
[[services]]
machine = "lab"
service = "sudoers"
check = [ "visudo", "-c" ]
dirs = [ { local = "/etc/sudoers.d/ops", link = "sudo/ops", file = true, mode = "0440" } ]
[[services]]
machine = "lab"
service = "once"
action = "reload"
dirs = [ { local = "/srv/once", link = "once" } ]
`
	resolver := net.Resolver{PreferGo: true, Dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "udp", fmt.Sprint("127.0.0.1:", dns))
	}}
	serve := func(version int) {
		t.Helper()
		waitServed(t, web, fmt.Sprint("v", version))
		labWait(t, time.Minute, fmt.Sprint("unbound serves version ", version), func() error {
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			got, err := resolver.LookupHost(ctx, "web.lab.")
			if err == nil && strings.Join(got, " ") != fmt.Sprint("192.0.2.", version) {
				err = fmt.Errorf("%q", got)
			}
			return err
		})
		if got := l.run("setpriv", "--reuid=deputy", "--clear-groups", "sudo", "-n", "echo",
			fmt.Sprint("v", version)); got != fmt.Sprint("v", version) {
			t.Errorf("sudo: %q", got)
		}
	}

	first := commit(1)
	l.configure(u, config)
	l.start()
	const hint = `cron.service can't be reloaded: use action = "restart"`
	l.waitState("cron", "BROKEN", hint)
	all := []string{"nftables", "haproxy", "unbound", "sudoers", "once"}
	for _, s := range all {
		l.waitCommit(s, first)
	}
	serve(1)

	l.run("nsenter", "--net=/run/firewall", "nft", "add", "element", "inet", "lab", "blocked",
		"{ 192.0.2.99 }")
	l.run("systemctl", "start", "guard")
	labWait(t, time.Minute, "the guard looks", func() error { return l.guarded(1) })
	before := map[string]string{}
	for _, s := range []string{"haproxy", "unbound", "cron"} {
		before[s] = l.show(s, "MainPID")
	}
	second := commit(2)
	for _, s := range all {
		l.waitCommit(s, second)
	}
	serve(2)
	l.waitState("cron", "BROKEN", hint)
	looks := l.lines("/run/guard.looks")
	labWait(t, time.Minute, "the guard looks again", func() error { return l.guarded(looks + 20) })
	rules := l.run("nsenter", "--net=/run/firewall", "nft", "list", "set", "inet", "lab", "blocked")
	for _, address := range []string{"192.0.2.1,", "192.0.2.2,", "192.0.2.99 "} {
		if !strings.Contains(rules, address) {
			t.Errorf("the set has no %s: %s", address, rules)
		}
	}
	for s, pid := range before {
		if now := l.show(s, "MainPID"); now != pid {
			t.Errorf("a reload made process %s of %s from %s", now, s, pid)
		}
	}
	l.waitFile("/run/once", "1\n2\n")

	// Each one's own check keeps out what it would not take.
	u.commit(map[string]string{"nft/nftables.conf": "table inet lab { chain input { drop everything; } }\n",
		"haproxy/haproxy.cfg": "frontend lab\n bind nowhere\n", "unbound/lab.conf": "server:\n nonsense\n",
		"sudo/ops": "deputy may do all\n"})
	l.waitState("nftables", "DIFF", "syntax error")
	l.waitState("haproxy", "DIFF", "haproxy.cfg:2] : 'bind' :")
	l.waitState("unbound", "DIFF", "unknown keyword")
	l.waitState("sudoers", "DIFF", "syntax error")
	serve(2)

	l.configure(u, strings.Replace(config, `action = "reload"
dirs = [ { local = "/etc/cron.d`, `action = "restart"
dirs = [ { local = "/etc/cron.d`, 1))
	l.run("systemctl", "restart", "gitopper")
	l.waitState("cron", "OK")
	if now := l.show("cron", "MainPID"); now == before["cron"] {
		t.Error("cron was not restarted")
	}
	if err := l.guarded(0); err != nil {
		t.Error(err)
	}
}

// firewall has nftables.service work in a network of its own, for the machine's is shared. The unit guard
// looks in a tight loop whether an address that somebody blocked by hand still is.
func (l *labHost) firewall() {
	l.write("/run/firewall", "")
	l.run("unshare", "--net=/run/firewall", "true")
	l.write("/etc/systemd/system/nftables.service.d/lab.conf",
		"[Service]\nNetworkNamespacePath=/run/firewall\n")
	l.write("/usr/local/bin/guard", `#!/bin/sh
while nft list set inet lab blocked | grep -q 192.0.2.99; do echo >>/run/guard.looks; done
echo "after $(wc -l </run/guard.looks) looks the address was not blocked" >/run/guard.gone
`)
	l.unit("guard.service", "[Service]\nNetworkNamespacePath=/run/firewall\nExecStart=/usr/local/bin/guard\n")
}

// guarded says whether the guard has looked that often, and never in vain.
func (l *labHost) guarded(looks int) error {
	if gone := l.read("/run/guard.gone"); gone != "" {
		return errors.New(gone)
	}
	if n := l.lines("/run/guard.looks"); n < looks {
		return fmt.Errorf("%d looks", n)
	}
	return nil
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
	// Nothing that git could make smaller.
	chance := rand.New(rand.NewPCG(1, 2))
	blob := func(size int) string {
		b := make([]byte, size)
		for i := range b {
			b[i] = byte(chance.Uint32())
		}
		return string(b)
	}

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
	second := u.commit(map[string]string{"full/blob": blob(2 << 20)})
	l.waitState("full", "DIFF", "no space left on device", "make room there")
	l.run("mount", "-o", "remount,size=100m", "/srv/small")
	l.waitCommit("full", second)
	third := u.commit(map[string]string{"full/blob": blob(20 << 20)})
	l.waitState("full", "DIFF", "more than half of what is free on the disk of the clones: make room there")
	l.run("mount", "-o", "remount,size=100m", "/var/lib/gitopper")
	if _, stderr, err := l.ssh("/do/pull full"); err != nil {
		t.Error(err, stderr)
	}
	l.waitCommit("full", third)
}

// A unit that systemd has not met yet is looked for, and one whose file is no longer mounted is forgotten.
func TestLabUnitFilesComeAndGo(t *testing.T) {
	l, u := newBareLab(t), newLabUpstream(t)
	const script = `#!/bin/sh
### BEGIN INIT INFO
# Provides: oldie
# Required-Start:
# Required-Stop:
# Default-Start: 2 3 4 5
# Default-Stop: 0 1 6
### END INIT INFO
echo $1 >>/run/oldie
`
	l.unit("app.service", "[Unit]\nAfter=gitopper.service\n[Service]\nExecStart=sleep infinity\n"+
		"[Install]\nWantedBy=multi-user.target\n")
	first := u.commit(map[string]string{"oldie/conf": "1\n",
		"app/env.conf":    "[Service]\nEnvironment=FROM=git\n",
		"own/own.service": "[Service]\nExecStart=sleep infinity\n"})
	const rest = `
settle = "100ms"
action = "restart"
[[services]]
machine = "lab"
service = "oldie"
dirs = [ { local = "/etc/oldie", link = "oldie" } ]
`
	const app = `[[services]]
machine = "lab"
service = "app"
dirs = [ { local = "/etc/systemd/system/app.service.d", link = "app" } ]
`
	const own = `[[services]]
machine = "lab"
service = "own"
dirs = [ { local = "/etc/systemd/system/own.service", link = "own/own.service", file = true } ]
`
	l.write("/etc/init.d/oldie", script)
	l.run("chmod", "755", "/etc/init.d/oldie")
	l.configure(u, rest+app+own)
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

	l.configure(u, rest+strings.Replace(app, "/etc/systemd/system/app.service.d", "", 1)+own)
	l.run("systemctl", "restart", "gitopper")
	labWait(t, time.Minute, "systemd forgets a drop-in", func() error {
		if got := l.show("app", "Environment"); got != "" {
			return errors.New(got)
		}
		return nil
	})
	l.configure(u, rest)
	l.run("systemctl", "restart", "gitopper")
	labWait(t, time.Minute, "systemd forgets a unit", func() error {
		if got := l.show("own", "LoadState"); got != "not-found" {
			return errors.New(got)
		}
		return nil
	})
	if got := l.show("own", "ActiveState"); got != "active" {
		t.Errorf("a unit that left the config is %s", got)
	}
}
