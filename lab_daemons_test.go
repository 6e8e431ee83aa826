//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"testing"
	"time"
)

// labDaemons are entries for daemons of Debian as they come, each of which takes its config in its own way: a
// firewall that must never be down, two that reload, one that can't, one that is no unit, and a oneshot.
const labDaemons = `
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

// daemonsHost is a host with these daemons.
type daemonsHost struct {
	*labHost
	upstream *labUpstream
	web, dns int
}

func newDaemonsHost(host *labHost) *daemonsHost {
	l := &daemonsHost{host, newLabUpstream(host.t), labPort(), labPort()}
	l.firewall()
	l.unit("once.service", "[Service]\nType=oneshot\nRemainAfterExit=yes\n"+
		"ExecStart=/bin/sh -c 'cat /srv/once/conf >>/run/once'\n")
	// Its package starts it before there is any other config.
	l.write("/etc/unbound/unbound.conf.d/port.conf", fmt.Sprintf("server:\n port: %d\n", l.dns))
	// The firewall is gitopper's to install.
	l.run("sh", "-c", "DEBIAN_FRONTEND=noninteractive "+
		"apt-get install -qq -y --no-install-recommends haproxy unbound dns-root-data cron sudo")
	l.run("useradd", "--system", "deputy")
	return l
}

// commit has all of them serve a version.
func (l *daemonsHost) commit(version int) string {
	l.t.Helper()
	return l.upstream.commit(map[string]string{
		"nft/nftables.conf": fmt.Sprintf("table inet lab {\n"+
			" set blocked { type ipv4_addr; elements = { 192.0.2.%d } }\n"+
			" chain input { type filter hook input priority 0; ip saddr @blocked drop; }\n}\n", version),
		"cron/probe": fmt.Sprintf("# version %d\n@yearly root true\n", version),
		"haproxy/haproxy.cfg": fmt.Sprintf("defaults\n mode http\n timeout client 5s\n"+
			" timeout server 5s\n timeout connect 5s\nfrontend lab\n bind 127.0.0.1:%d\n"+
			" http-request return status 200 content-type text/plain string v%d\n", l.web, version),
		"unbound/lab.conf": fmt.Sprintf("server:\n local-data: \"web.lab. A 192.0.2.%d\"\n", version),
		"sudo/ops":         fmt.Sprintf("deputy ALL = NOPASSWD: /bin/echo v%d\n", version),
		"once/conf":        fmt.Sprintln(version),
	})
}

// serve waits until they serve the version.
func (l *daemonsHost) serve(version int) {
	l.t.Helper()
	resolver := net.Resolver{PreferGo: true, Dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "udp", fmt.Sprint("127.0.0.1:", l.dns))
	}}
	waitServed(l.t, l.web, fmt.Sprint("v", version))
	labWait(l.t, time.Minute, fmt.Sprint("unbound serves version ", version), func() error {
		ctx, cancel := context.WithTimeout(l.t.Context(), time.Second)
		defer cancel()
		got, err := resolver.LookupHost(ctx, "web.lab.")
		if err == nil && strings.Join(got, " ") != fmt.Sprint("192.0.2.", version) {
			err = fmt.Errorf("%q", got)
		}
		return err
	})
	word := fmt.Sprint("v", version)
	said := l.run("setpriv", "--reuid=deputy", "--clear-groups", "sudo", "-n", "echo", word)
	if said != word {
		l.t.Errorf("sudo: %q", said)
	}
}

func TestLabDaemons(t *testing.T) { daemonsLife(t, newBareLab(t)) }

// daemonsLife has a host's daemons get a commit, another one, and one that their checks refuse.
func daemonsLife(t *testing.T, host *labHost) {
	l := newDaemonsHost(host)
	settled := []string{"nftables", "haproxy", "unbound", "sudoers", "once"}
	deploy := func(version int) {
		t.Helper()
		hash := l.commit(version)
		if version == 1 {
			l.configure(l.upstream, labDaemons)
			l.start()
		}
		for _, s := range settled {
			l.waitCommit(s, hash)
		}
		l.serve(version)
		l.waitState("cron", "BROKEN", `cron.service can't be reloaded: use action = "restart"`)
	}
	deploy(1)
	l.block()
	before := map[string]string{}
	for _, s := range []string{"haproxy", "unbound", "cron"} {
		before[s] = l.show(s, "MainPID")
	}
	deploy(2)
	l.stillBlocked()
	for s, pid := range before {
		if now := l.show(s, "MainPID"); now != pid {
			t.Errorf("a reload made process %s of %s from %s", now, s, pid)
		}
	}
	l.waitFile("/run/once", "1\n2\n")

	// Each one's own check keeps out what it would not take.
	l.upstream.commit(map[string]string{
		"nft/nftables.conf":   "table inet lab { chain input { drop everything; } }\n",
		"haproxy/haproxy.cfg": "frontend lab\n bind nowhere\n", "unbound/lab.conf": "server:\n nonsense\n",
		"sudo/ops": "deputy may do all\n"})
	l.waitState("nftables", "DIFF", "syntax error")
	l.waitState("haproxy", "DIFF", "haproxy.cfg:2] : 'bind' :")
	l.waitState("unbound", "DIFF", "unknown keyword")
	l.waitState("sudoers", "DIFF", "syntax error")
	l.serve(2)

	cron := strings.Index(labDaemons, "service = \"cron\"")
	restarts := strings.Replace(labDaemons[cron:], "reload", "restart", 1)
	l.configure(l.upstream, labDaemons[:cron]+restarts)
	l.run("systemctl", "restart", "gitopper")
	l.waitState("cron", "OK")
	if now := l.show("cron", "MainPID"); now == before["cron"] {
		t.Error("cron was not restarted")
	}
	l.stillBlocked()
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

// block blocks an address by hand, and sets the guard.
func (l *labHost) block() {
	l.t.Helper()
	l.run("nsenter", "--net=/run/firewall", "nft", "add", "element", "inet", "lab", "blocked",
		"{ 192.0.2.99 }")
	l.run("systemctl", "start", "guard")
	l.stillBlocked()
}

// stillBlocked waits until the guard has looked some more, never in vain.
func (l *labHost) stillBlocked() {
	l.t.Helper()
	enough := l.lines("/run/guard.looks") + 20
	labWait(l.t, time.Minute, "the guard looks", func() error {
		if gone := l.read("/run/guard.gone"); gone != "" {
			l.t.Fatal(gone)
		}
		if n := l.lines("/run/guard.looks"); n < enough {
			return errors.New("some more")
		}
		return nil
	})
}
