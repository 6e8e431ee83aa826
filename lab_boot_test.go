//go:build linux

package main

import (
	"fmt"
	"strconv"
	"strings"
	"syscall"
	"testing"
)

// cutPower ends the host from one moment to the next, and boots it again.
func (l *labHost) cutPower() {
	l.t.Helper()
	out, err := labScript("pid", l.name)
	pid, _ := strconv.Atoi(strings.TrimSpace(out))
	if err != nil || pid <= 1 {
		l.t.Fatal(err, out)
	}
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		l.t.Fatal(err)
	}
	l.reboot()
}

// wantCalls fails unless a witness was called for just this in this boot.
func (l *labHost) wantCalls(when, name string, calls ...string) {
	l.t.Helper()
	if got := strings.Fields(l.read("/run/" + name + ".calls")); strings.Join(got, " ") != strings.Join(calls, " ") {
		l.t.Errorf("%s: %s was called for %q, want %q", when, name, got, calls)
	}
}

// TestLabBootAdministratorsWish: after each boot what an administrator had stopped stays down, and all else runs, with no
// call but what it takes. It is not fooled by shutdowns (units that stop before gitopper, long before, and after it), a
// crash and a power cut.
func TestLabBootAdministratorsWish(t *testing.T) {
	l, u := newLab(t), newLabUpstream(t)
	hash := u.commit(map[string]string{"app/conf": "1\n"})
	const after, before, install = "[Unit]\nAfter=gitopper.service\n", "[Unit]\nBefore=gitopper.service\n",
		"[Install]\nWantedBy=multi-user.target\n"
	units := map[string]string{ // how each is ordered, and whether it can be enabled
		"stopped": install, // by an administrator
		"off":     install, // disabled and stopped, right before the shutdown
		"up":      install, // and nobody's to start
		"crashed": "",
		"first":   after,           // stops before gitopper does, which sees it
		"slow":    after,           // and takes its time
		"last":    before,          // stops after gitopper
		"late":    after + install, // boots on our files
		"early":   before + install,
	}
	config := "action = \"reload\"\nsettle = \"50ms\"\n"
	for name, how := range units {
		if name == "slow" {
			how = "ExecStop=sleep 4\n" + how
		}
		l.witness(name, "/srv/"+name+"/conf", how)
		config += fmt.Sprintf("[[services]]\nmachine = \"lab\"\nservice = %q\n"+
			"dirs = [ { local = \"/srv/%[1]s\", link = \"app\" } ]\n", name)
	}
	l.configure(u, config)
	l.start()
	for name := range units {
		l.waitCommit(name, hash)
	}
	l.run("systemctl", "enable", "gitopper", "stopped", "off", "late", "early")
	l.run("systemctl", "restart", "gitopper") // so that it sees what is enabled
	for name := range units {
		l.waitCommit(name, hash)
	}
	l.waitRounds(u, 2)
	l.run("systemctl", "disable", "stopped")
	l.run("systemctl", "stop", "stopped")
	l.run("systemctl", "kill", "-s", "KILL", "crashed")
	for _, name := range []string{"stopped", "crashed"} {
		l.waitState(name, "BROKEN")
	}
	l.waitRounds(u, 4)

	booted := func(when string) {
		t.Helper()
		for _, name := range []string{"stopped", "off"} {
			l.waitState(name, "BROKEN", name+".service stays down, for an administrator had stopped it before the boot")
		}
		for name := range units {
			if name != "stopped" && name != "off" {
				l.waitCommit(name, hash)
			}
		}
		l.waitRounds(u, 3)
		for _, name := range []string{"up", "crashed", "first", "slow", "last", "late"} {
			l.wantCalls(when, name, "start")
		}
		l.wantCalls(when, "early", "start", "reload") // it booted on other files
		l.wantCalls(when, "stopped")
		l.wantCalls(when, "off")
	}
	l.run("systemctl", "disable", "--now", "off")
	l.reboot()
	booted("after a shutdown")
	for _, name := range []string{"first", "slow", "last"} {
		if out, err := l.try("journalctl", "-u", "gitopper", "-q", "-o", "cat", "-g", "^"+name+": .*BROKEN"); err == nil {
			t.Errorf("a shutdown is told as trouble: %s", out)
		}
	}
	l.cutPower()
	booted("after a power cut")

	l.run("systemctl", "start", "stopped")
	if _, stderr, err := l.ssh("/do/pull off"); err != nil {
		t.Errorf("do pull: %v: %s", err, stderr)
	}
	l.waitCommit("stopped", hash)
	l.waitCommit("off", hash)
	l.wantCalls("an administrator starts it", "stopped", "start")
	l.wantCalls("do pull", "off", "start")
	l.cutPower()
	for _, name := range []string{"stopped", "off"} { // up when the power went
		l.waitFile("/run/"+name+".calls", "start\n")
	}
}
