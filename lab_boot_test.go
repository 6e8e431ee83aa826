//go:build linux

package main

import (
	"errors"
	"fmt"
	"net"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
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
	if got := strings.Fields(l.read("/run/" + name + ".calls")); !slices.Equal(got, calls) {
		l.t.Errorf("%s: %s was called for %q, want %q", when, name, got, calls)
	}
}

// TestLabBootAdministratorsWish: after each boot what an administrator had stopped stays down, and all
// else runs, with no call but what it takes. It is not fooled by shutdowns (units that stop before
// gitopper, long before, and after it), a crash and a power cut.
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
			l.waitState(name, "BROKEN",
				name+".service stays down, for an administrator had stopped it before the boot")
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
		out, err := l.try("journalctl", "-u", "gitopper", "-q", "-o", "cat", "-g", "^"+name+": .*BROKEN")
		if err == nil {
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

// bootTrouble is what is wrong when the host boots, and how that is told.
type bootTrouble struct {
	name         string
	make, mend   func()
	log, status  string  // in them
	configOK     float64 // the metric
	state, info  string  // of the service, in the end
	noInterfaces bool    // until it is mended
}

// TestLabBootTroubles: whatever is wrong, at boot the mounts of before are there before READY, for a unit
// that knows nothing of gitopper but its name; gitopper stays up, says what is wrong, lets operators in,
// and all is well again when the cause is gone.
func TestLabBootTroubles(t *testing.T) {
	l, u := newLab(t), newLabUpstream(t)
	hash := u.commit(map[string]string{"app/conf": "1\n", "app/file": "file\n"})
	l.witness("late", "/srv/app/conf",
		"[Unit]\nAfter=gitopper.service\n[Install]\nWantedBy=multi-user.target")
	const config = "/etc/gitopper/config.toml"
	l.configure(u, `
[[services]]
machine = "lab"
service = "late"
action = "reload"
settle = "50ms"
dirs = [ { local = "/srv/app", link = "app" }, { local = "/srv/file", link = "app/file", file = true } ]
`)
	right, pub := l.read(config), l.read("/etc/gitopper/operator.pub")
	l.start("-r")
	l.waitCommit("late", hash)
	l.run("systemctl", "enable", "gitopper", "late")
	if order := " " + l.show("gitopper", "After") + " "; strings.Contains(order, "network") ||
		!strings.Contains(order, " local-fs.target ") {
		t.Errorf("gitopper starts after %s", order)
	}

	const kept = "the config is wrong, the one that was last right is used: " + config
	const badConfig = "; the config is wrong"
	var taken []net.Listener
	take := func(ports ...int) {
		for _, port := range ports {
			taken = append(taken, labListen(l.t, port))
		}
	}
	giveBack := func() {
		for _, listener := range taken {
			listener.Close()
		}
		taken = nil
	}
	damage := func() {
		packs := "/var/lib/gitopper/upstreams/*/objects/pack/*.pack"
		l.run("sh", "-c", "for p in "+packs+"; do truncate -s 100 $p; done; ls "+packs)
	}
	goes := func() { // not before the host, whose state would be DIFF when it goes down
		l.run("systemctl", "stop", "gitopper")
		u.stop()
	}
	var looks int64
	troubles := []bootTrouble{
		{name: "garbage key file", make: func() { l.write("/etc/gitopper/operator.pub", "garbage") },
			mend: func() { l.write("/etc/gitopper/operator.pub", pub) },
			log:  kept + ": [global]: keys[0]: ", status: badConfig, state: "OK"},
		{name: "wrong config", make: func() { l.write(config, right+"[") },
			mend: func() { l.write(config, right) },
			log:  kept + ": line ", status: badConfig, state: "OK"},
		{name: "no config", make: func() { l.run("rm", config) }, mend: func() { l.write(config, right) },
			log: "is used: config: open " + config + ": no such file", status: badConfig, state: "OK"},
		{name: "another name",
			make:   func() { l.write(config, strings.ReplaceAll(right, `"lab"`, `"former"`)) },
			mend:   func() { l.write(config, right) },
			log:    config + ": no entry for this machine (" + l.name + ", lab): mounts of before stay",
			status: "no entry for this machine", configOK: 1},
		{name: "taken ports",
			make: func() { l.run("systemctl", "stop", "gitopper"); take(l.sshPort, l.metricPort) },
			mend: giveBack, log: "address already in use",
			status:   "1 service; not all can be had yet, see the log",
			configOK: 1, state: "OK", noInterfaces: true},
		{name: "upstream away", make: goes, mend: u.start, log: "OK -> DIFF git ls-remote",
			status: "1 service, 1 in trouble: late", configOK: 1, state: "DIFF", info: "git ls-remote"},
		{name: "a network that swallows all", make: func() { u.stop(); take(u.port) },
			mend: func() { giveBack(); u.start() },
			log:  "mounted app on /srv/app", status: "1 service", configOK: 1, state: "OK"},
		{name: "damaged clone, upstream away", make: func() { damage(); goes() }, mend: u.start,
			log: "OK -> DIFF git ls-remote", status: "1 service, 1 in trouble: late",
			configOK: 1, state: "DIFF"},
		{name: "damaged clone", make: damage,
			mend: func() { hash = u.commit(map[string]string{"app/file": "new\n"}) },
			log:  "mounted app on /srv/app", status: "1 service", configOK: 1, state: "OK"},
		{name: "first look fails, as rarely as we look",
			make: func() {
				l.run("systemctl", "stop", "gitopper")
				l.run("sed", "-i", "s/-t 2s/-t 5m/", "/etc/systemd/system/gitopper.service.d/lab.conf")
				u.failing.Store(1)
				looks = u.looks.Load()
			},
			mend: func() {
				labWait(u.t, 20*time.Second, "upstream is looked at again", func() error {
					if n := u.looks.Load() - looks; n < 2 {
						return fmt.Errorf("%d looks", n)
					}
					return nil
				})
			},
			log: "mounted app on /srv/app", status: "1 service", configOK: 1, state: "OK",
		},
	}
	for _, trouble := range troubles {
		t.Run(trouble.name, func(t *testing.T) {
			outer := l.t
			l.t, u.t = t, t
			defer func() { l.t, u.t = outer, outer }()
			l.bootInto(trouble)
			trouble.mend()
			if trouble.state == "" { // another config than that which runs: -r starts it anew
				l.waitState("late", "OK")
			}
			l.waitCommit("late", hash)
			labWait(t, time.Minute, "the status line says that all is well", func() error {
				if got := l.show("gitopper", "StatusText"); got != "1 service" {
					return errors.New(got)
				}
				return nil
			})
		})
	}
	out, err := l.try("journalctl", "-b", "-u", "gitopper", "-q", "-o", "cat", "-g", "-> DIFF")
	if err == nil {
		t.Errorf("a first look that failed is told as trouble: %s", out)
	}
}

// bootInto boots into a trouble, and judges what is there and what is said.
func (l *labHost) bootInto(trouble bootTrouble) {
	t := l.t
	t.Helper()
	trouble.make()
	l.fs.Close()
	if out, err := labScript("stop", l.name); err != nil {
		t.Fatal(err, out)
	}
	if out, err := labScript("up", l.name); err != nil {
		t.Fatal(err, out)
	}
	l.openRoot()

	l.waitFile("/run/late.seen", "1\n")
	l.wantCalls(trouble.name, "late", "start")
	want := []string{"/srv/app: " + labCheckouts + "/late/app",
		"/srv/file: " + labCheckouts + "/late/app/file"}
	if got := l.mounts("/srv"); !slices.Equal(got, want) {
		t.Errorf("PID 1 has mounted %q, want %q", got, want)
	}
	labWait(t, time.Minute, "the log says "+trouble.log, func() error {
		_, err := l.try("sh", "-c", "journalctl -b -u gitopper -q -o cat | grep -F '"+trouble.log+"'")
		return err
	})
	labWait(t, time.Minute, "the status line says "+trouble.status, func() error {
		if got := l.show("gitopper", "StatusText"); !strings.Contains(got, trouble.status) {
			return errors.New(got)
		}
		return nil
	})
	if !trouble.noInterfaces {
		labWait(t, time.Minute, fmt.Sprint("gitopper_config_ok ", trouble.configOK), func() error {
			samples, err := l.metrics()
			if got, ok := samples["gitopper_config_ok"]; err == nil && (!ok || got != trouble.configOK) {
				err = fmt.Errorf("%v, given: %v", got, ok)
			}
			return err
		})
		if _, stderr, err := l.ssh("/list/service"); err != nil {
			t.Errorf("an operator asks: %v: %s", err, stderr)
		}
		if trouble.state != "" {
			l.waitState("late", trouble.state, trouble.info)
		}
	}
	if got := l.show("gitopper", "NRestarts") + " " + l.show("gitopper", "ActiveState"); got != "0 active" {
		t.Errorf("restarts and state of gitopper: %s", got)
	}
	l.wantCalls(trouble.name, "late", "start") // told by what it booted on
}
