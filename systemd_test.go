package main

import (
	"context"
	"net"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"
)

func TestParseUnits(t *testing.T) {
	units, err := parseUnits(`Id=nginx.service
LoadState=loaded
ActiveState=active
SubState=running
Type=forking
Result=success
NRestarts=0
Job=12 /org/freedesktop/systemd1/job/12

Id=backup.service
LoadState=loaded
ActiveState=inactive
TriggeredBy=backup.timer backup.path
`)
	if err != nil || len(units) != 2 {
		t.Fatalf("%v, %v", units, err)
	}
	if u := units[0]; u.ID != "nginx.service" || !u.up() || u.Type != "forking" || !strings.HasPrefix(u.Job, "12 ") {
		t.Errorf("%+v", u)
	}
	if u := units[1]; len(u.TriggeredBy) != 2 || u.up() {
		t.Errorf("%+v", u)
	}
	if _, err := parseUnits("Failed to connect to bus"); err == nil {
		t.Error("nonsense was accepted")
	}
}

func TestUnitIsUp(t *testing.T) {
	for _, tc := range []struct {
		name string
		u    unit
		up   bool
		verb string // for action reload
	}{
		{"active", unit{ActiveState: "active", Type: "simple"}, true, "reload"},
		{"reloading", unit{ActiveState: "reloading"}, true, "reload"},
		{"inactive", unit{ActiveState: "inactive", Type: "simple", Result: "success"}, false, "start"},
		{"failed", unit{ActiveState: "failed"}, false, "start"},
		{"crash loop", unit{ActiveState: "activating", SubState: "auto-restart"}, false, "start"},
		{"oneshot that ended well", unit{ActiveState: "inactive", Type: "oneshot", Result: "success"}, true, "start"},
		{"oneshot that failed", unit{ActiveState: "failed", Type: "oneshot", Result: "exit-code"}, false, "start"},
		{"oneshot that remains", unit{ActiveState: "active", Type: "oneshot"}, true, "restart"},
		{"socket activated", unit{ActiveState: "inactive", Type: "simple", triggered: true}, true, "start"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if tc.u.up() != tc.up {
				t.Errorf("up: %v, want %v", !tc.up, tc.up)
			}
			if got := verbFor(&tc.u, "reload"); got != tc.verb {
				t.Errorf("verb %q, want %q", got, tc.verb)
			}
		})
	}
	if verb := verbFor(&unit{Type: "oneshot", ActiveState: "active"}, "kill"); verb != "restart" {
		t.Errorf("a oneshot is told by %s", verb)
	}
	stopped := unit{ActiveState: "inactive"}
	if !stopped.well("stop") || stopped.well("reload") || verbFor(&stopped, "stop") != "stop" {
		t.Error("a unit that is to be stopped is well when it is down")
	}
}

func TestTemplateIsEnabledAndFailedIsReset(t *testing.T) {
	w := newWorld(t)
	w.spec.service, w.spec.action = "svc@1.service", "restart"
	w.write("fake/svc@1.service", "failed")
	w.restart()
	w.reconcile()
	if got, want := strings.ReplaceAll(w.calls(), " svc@1.service", ""), "enable, reset-failed, start"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
	if st := w.s.Status(); st.State != "OK" {
		t.Errorf("%+v", st)
	}
}

// TestTriggeredUnits: what a socket starts while it settles did not crash, and a job that failed waits for its timer.
func TestTriggeredUnits(t *testing.T) {
	w := newWorld(t)
	ctx := context.Background()
	w.write("fake/svc.service", "inactive\nTriggeredBy=svc.socket\nInvocationID=")
	time.AfterFunc(time.Second, func() {
		w.write("fake/svc.service", "active\nTriggeredBy=svc.socket\nInvocationID=1")
	})
	if _, err := settle(ctx, "svc.service", "reload", 2500*time.Millisecond); err != nil {
		t.Error(err)
	}
	time.AfterFunc(time.Second, func() {
		w.write("fake/svc.service", "active\nTriggeredBy=svc.socket\nInvocationID=2")
	})
	if _, err := settle(ctx, "svc.service", "reload", 2500*time.Millisecond); err == nil || !strings.Contains(err.Error(), "restarted by systemd") {
		t.Errorf("a restart is not seen: %v", err)
	}
	w.write("fake/svc.service", "inactive")
	time.AfterFunc(300*time.Millisecond, func() { w.write("fake/svc.service", "active") })
	if _, err := settle(ctx, "svc.service", "kill", 0); err != nil {
		t.Errorf("what is killed may come back: %v", err)
	}
	w.write("fake/svc.service", "failed\nTriggeredBy=svc.timer")
	if verb, err := tell(ctx, "svc.service", "restart", false, func(string) {}); err != nil || verb != "" || w.calls() != "reset-failed" {
		t.Errorf("told by %q, %v", verb, err)
	}
}

func TestUnitDirectory(t *testing.T) {
	for local, want := range map[string]bool{
		"/etc/systemd/system": true, "/etc/systemd/system/x.service": true, "/etc/systemd": true, "/usr/lib/systemd/system/a.d": true,
		"/etc/systemd/systemd": false, "/etc/prometheus": false, "": false,
	} {
		if got := inUnitDir(local); got != want {
			t.Errorf("inUnitDir(%q) = %v", local, got)
		}
	}
}

func TestNotify(t *testing.T) {
	for _, name := range []string{t.TempDir() + "/notify", "@gitopper-test-notify"} {
		l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: name, Net: "unixgram"})
		if err != nil {
			t.Fatal(err)
		}
		notify(name, "READY=1")
		buf := make([]byte, 100)
		if n, err := l.Read(buf); err != nil || string(buf[:n]) != "READY=1" {
			t.Errorf("%s: %q, %v", name, buf[:n], err)
		}
		l.Close()
	}
	notify("", "READY=1") // without systemd
}

func TestUnitFile(t *testing.T) {
	file := t.TempDir() + "/gitopper.service"
	if err := os.WriteFile(file, []byte(unitFile("/bin/true")), 0o644); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("systemd-analyze", "verify", file).CombinedOutput(); err != nil || len(out) > 0 {
		t.Errorf("systemd-analyze verify: %v: %s", err, out)
	}
	golden(t, "gitopper.service", unitFile("/usr/local/bin/gitopper"))
	if got := unitFile("/opt/my tools/100%/gitopper"); !strings.Contains(got, `ExecStart="/opt/my tools/100%%/gitopper" -r`) {
		t.Error(got)
	}
}
