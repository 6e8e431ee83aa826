//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// fakeSystemd is the directory in which the fake systemctl works (testdata/fake).
type fakeSystemd struct {
	t   *testing.T
	dir string
}

func newFakeSystemd(t *testing.T) *fakeSystemd {
	t.Helper()
	f := &fakeSystemd{t, t.TempDir()}
	bin := t.TempDir()
	linkFakes(t, bin, "systemctl", "journalctl")
	t.Setenv("PATH", bin+":"+os.Getenv("PATH"))
	t.Setenv("FAKE", f.dir)
	return f
}

// set makes a unit what the text says, at once.
func (f *fakeSystemd) set(name, text string) {
	f.t.Helper()
	file := filepath.Join(f.dir, name)
	err := os.WriteFile(file+".new", []byte(text), 0o644)
	if err := errors.Join(err, os.Rename(file+".new", file)); err != nil {
		f.t.Error(err)
	}
}

// wait waits until a log has n lines.
func (f *fakeSystemd) wait(name string, n int) {
	deadline := time.Now().Add(10 * time.Second)
	for time.Now().Before(deadline) {
		data, _ := os.ReadFile(filepath.Join(f.dir, name))
		if strings.Count(string(data), "\n") >= n {
			return
		}
		time.Sleep(time.Millisecond)
	}
	f.t.Errorf("%s has no %d lines", name, n)
}

// read returns the lines of a log as one, and empties it.
func (f *fakeSystemd) read(name string) string {
	data, _ := os.ReadFile(filepath.Join(f.dir, name))
	os.Remove(filepath.Join(f.dir, name))
	return strings.ReplaceAll(strings.TrimSpace(string(data)), "\n", ", ")
}

// errorSays says whether err holds the words; none: whether there is no error.
func errorSays(err error, words string) bool {
	if err == nil || words == "" {
		return err == nil && words == ""
	}
	return strings.Contains(err.Error(), words)
}

func TestUnitParse(t *testing.T) {
	u := parseUnit(`Id=nginx.service
LoadState=loaded
ActiveState=active
SubState=running
Type=forking
Job=12 /org/freedesktop/systemd1/job/12
InactiveExitTimestampMonotonic=1500000
TriggeredBy=nginx.socket nginx.path`)
	if u.is["Id"] != "nginx.service" || !u.up() || u.is["TriggeredBy"] != "nginx.socket nginx.path" {
		t.Errorf("%+v", u)
	}
	if since := u.since(); since != 1500*time.Millisecond {
		t.Error(since)
	}
}

// unitOf is a unit of which systemd says this, separated by commas.
func unitOf(is string) unit {
	u := parseUnit(strings.ReplaceAll(is, ", ", "\n"))
	_, u.triggered = u.is["triggered"]
	return u
}

func TestUnitIsUp(t *testing.T) {
	for _, tc := range []struct {
		name string
		is   string
		up   bool
		verb string // for action reload
	}{
		{"active", "ActiveState=active, CanReload=yes", true, "reload"},
		{"active, without reload", "ActiveState=active, CanReload=no", true, ""},
		{"reloading", "ActiveState=reloading, CanReload=yes", true, "reload"},
		{"inactive", "ActiveState=inactive, Type=simple, Result=success", false, "start"},
		{"failed", "ActiveState=failed", false, "start"},
		{"crash loop", "ActiveState=activating, SubState=auto-restart", false, "start"},
		{"oneshot that ended well", "ActiveState=inactive, Type=oneshot, Result=success", true, "start"},
		{"oneshot that failed", "ActiveState=failed, Type=oneshot, Result=exit-code", false, "start"},
		{"oneshot at work", "ActiveState=activating, Type=oneshot, SubState=start", true, "start"},
		{"oneshot that remains", "ActiveState=active, Type=oneshot", true, "restart"},
		{"oneshot that reloads", "ActiveState=active, Type=oneshot, CanReload=yes", true, "reload"},
		{"socket activated", "ActiveState=inactive, Type=simple, triggered=", true, "start"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			u := unitOf(tc.is)
			if u.up() != tc.up || u.well("restart") != tc.up {
				t.Errorf("up: %v, want %v", !tc.up, tc.up)
			}
			if got, err := verbFor(&u, "reload"); got != tc.verb || (err == nil) != (tc.verb != "") {
				t.Errorf("verb %q, %v, want %q", got, err, tc.verb)
			}
		})
	}
}

func TestUnitVerbs(t *testing.T) {
	for _, tc := range []struct{ kind, state, action, verb string }{
		{"simple", "inactive", "stop", "stop"},
		{"simple", "active", "kill", "kill"},
		{"simple", "active", "reload-or-restart", "reload-or-restart"},
		{"simple", "inactive", "try-restart", "start"},
		{"oneshot", "active", "kill", "restart"},
		{"oneshot", "active", "start", "start"},
		{"oneshot", "active", "try-reload-or-restart", "try-reload-or-restart"},
		{"oneshot", "activating", "restart", "restart"},
	} {
		u := unitOf("Type=" + tc.kind + ", ActiveState=" + tc.state + ", CanReload=no")
		got, err := verbFor(&u, tc.action)
		if got != tc.verb || err != nil {
			t.Errorf("%+v: %q, %v", tc, got, err)
		}
	}
	down := unitOf("ActiveState=inactive")
	if !down.well("stop") || down.well("reload") {
		t.Error("a unit that is to be stopped is well when it is down")
	}
	for action, want := range map[string]string{
		"reload":      `cron.service can't be reloaded: use action = "restart"`,
		"restart":     `cron.service can't be stopped: use action = "reload"`,
		"try-restart": `cron.service can't be stopped: use action = "reload"`,
	} {
		up := unitOf("Id=cron.service, ActiveState=active, CanReload=no, CanStop=no")
		if _, err := verbFor(&up, action); err == nil || err.Error() != want {
			t.Errorf("%v, want %s", err, want)
		}
	}
}

func TestUnitDescription(t *testing.T) {
	for _, tc := range []struct{ want, is string }{
		{"unit a.service does not exist: name the package that brings it, or mend service",
			`LoadState=not-found, LoadError=org.freedesktop.systemd1.NoSuchUnit "Unit a.service not found."`},
		{"unit a.service is failed (failed, exit-code, main process ended with status 9)",
			"ActiveState=failed, SubState=failed, Result=exit-code, ExecMainCode=1, ExecMainStatus=9"},
		{"unit a.service is failed (failed, signal, main process killed by SIGKILL)",
			"ActiveState=failed, SubState=failed, Result=signal, ExecMainCode=2, ExecMainStatus=9"},
		{"unit a.service is failed (failed, core-dump, main process killed by SIGSEGV)",
			"ActiveState=failed, SubState=failed, Result=core-dump, ExecMainCode=3, ExecMainStatus=11"},
		{"unit a.service is failed (failed, main process killed by signal 34)",
			"ActiveState=failed, SubState=failed, ExecMainCode=2, ExecMainStatus=34"},
		{"unit a.service is inactive (dead)",
			"ActiveState=inactive, SubState=dead, Result=success, ExecMainCode=1, ExecMainStatus=0"},
	} {
		u := unitOf("Id=a.service, LoadState=loaded, " + tc.is)
		if got := u.describe(); got != tc.want {
			t.Errorf("got  %s\nwant %s", got, tc.want)
		}
	}
}

// TestUnitsLook: units that are active cost one list-units together, the others one show more.
func TestUnitsLook(t *testing.T) {
	f := newFakeSystemd(t)
	names := []string{"a.service", "web", "job.service", "c.service"}
	ids := unitNames{}
	look := func(asked string, up ...bool) {
		t.Helper()
		units, err := lookUnits(context.Background(), ids, names...)
		if err != nil || len(units) != len(names) {
			t.Fatal(units, err)
		}
		for i, u := range units {
			name := strings.TrimSuffix(names[i], ".service") + ".service"
			if u.is["Id"] != name || u.up() != up[i] || u.at.IsZero() {
				t.Errorf("%s: %+v, want up: %v", names[i], u, up[i])
			}
		}
		if got := f.read("asked"); got != asked {
			t.Errorf("asked %q, want %q", got, asked)
		}
	}

	look("list-units, show", true, true, true, true) // names are not known yet
	look("list-units", true, true, true, true)
	f.set("job.service", "inactive\nTriggeredBy=job.timer")
	look("list-units, show", true, true, false, true)
	f.set("job.timer", "active")
	look("list-units, show", true, true, true, true)
	f.set("job.timer", "inactive")
	f.set("a.service", "failed\nResult=signal\nExecMainCode=2\nExecMainStatus=15")
	look("list-units, show", false, true, false, true)
	os.Remove(filepath.Join(f.dir, "a.service"))
	os.Remove(filepath.Join(f.dir, "job.service"))
	look("list-units", true, true, true, true)
}

// TestUnitsShareLooks: those who ask at the same time share a systemctl or two, and each gets its own unit, and none
// another one's error.
func TestUnitsShareLooks(t *testing.T) {
	f := newFakeSystemd(t)
	name := func(i int) string { return fmt.Sprintf("svc%d.service", i) }
	f.set(name(7), "failed")
	f.set(name(8), "inactive\nTriggeredBy=eight.socket")
	f.set(name(9), "inactive\nTriggeredBy=nine.socket nine.timer")
	f.set("eight.socket", "inactive")
	f.set("nine.timer", "active")
	f.set("nine.socket", "failed")
	look := func(i int) {
		u, err := showUnit(t.Context(), name(i))
		isUp := i != 7 && i != 8
		if err != nil || u.is["Id"] != name(i) || u.up() != isUp || u.triggered != (i == 9) {
			t.Errorf("%s: %+v, %v", name(i), u, err)
		}
	}
	together(t, &looks, 100, look)
	if got := f.read("asked"); got != "show, show" {
		t.Errorf("asked %q", got)
	}
	look(9)
	if got := f.read("asked"); got != "show, show" {
		t.Errorf("what triggers one: asked %q", got)
	}

	f.set("fail-show", name(3))
	together(t, &looks, 5, func(i int) {
		if i != 3 {
			look(i)
		} else if _, err := showUnit(t.Context(), name(3)); !errorSays(err, "properties of svc3.service") {
			t.Error(err)
		}
	})
	if got := f.read("asked"); got != "show"+strings.Repeat(", show", 5) {
		t.Errorf("one can't be shown: asked %q", got)
	}
	f.set("fail-show", "nine.timer")
	together(t, &looks, 10, func(i int) {
		if i != 9 {
			look(i)
		} else if _, err := showUnit(t.Context(), name(9)); !errorSays(err, "properties of nine.timer") {
			t.Error(err)
		}
	})

	f.set("fail-show", "")
	f.set("shutdown.target", "inactive\nJob=1")
	together(t, &looks, 10, func(i int) {
		if _, err := showUnit(t.Context(), name(i)); !errors.Is(err, errShutdown) {
			t.Error(err)
		}
	})
}

// TestUnitsShareReload: one daemon-reload is enough for all who want it before it begins.
func TestUnitsShareReload(t *testing.T) {
	f := newFakeSystemd(t)
	together(t, &reloads, 100, func(int) {
		if err := daemonReload(t.Context()); err != nil {
			t.Error(err)
		}
	})
	if got := f.read("calls"); got != "daemon-reload" {
		t.Errorf("%q", got)
	}
	f.set("fail-daemon-reload", "")
	together(t, &reloads, 10, func(int) {
		if err := daemonReload(t.Context()); !errorSays(err, "systemctl daemon-reload: exit status 1") {
			t.Error(err)
		}
	})
	if got := f.read("calls"); got != "daemon-reload" {
		t.Errorf("failed: %q", got)
	}
}

func TestUnitTemplateIsEnabledAndFailedIsReset(t *testing.T) {
	f := newFakeSystemd(t)
	f.set("svc@1.service", "failed")
	verb, err := tell(t.Context(), t.Context(), "svc@1.service", "restart", false, func(string) {})
	if err != nil || verb != "start" {
		t.Errorf("%q, %v", verb, err)
	}
	want := "enable svc@1.service, reset-failed svc@1.service, start svc@1.service"
	if got := f.read("calls"); got != want {
		t.Errorf("%q, want %q", got, want)
	}
}

// TestUnitDaemonReload: systemd reads its files again where it may not know those of today.
func TestUnitDaemonReload(t *testing.T) {
	for _, tc := range []struct {
		name, before, after, calls, err string
		reload                          bool
	}{
		{name: "known", before: "active", calls: "reload svc.service"},
		{name: "changed", before: "active\nNeedDaemonReload=yes", calls: "daemon-reload, reload svc.service"},
		{name: "in a unit directory", before: "active", reload: true, calls: "daemon-reload, reload svc.service"},
		{name: "a generator's", before: "inactive\nLoadState=not-found", after: "inactive",
			calls: "daemon-reload, start svc.service"},
		{name: "missing", before: "inactive\nLoadState=not-found", calls: "daemon-reload",
			err: "unit svc.service does not exist"},
		{name: "masked", before: "inactive\nLoadState=masked", err: "unit svc.service is masked"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f := newFakeSystemd(t)
			f.set("svc.service", tc.before)
			if tc.after != "" {
				f.set("reloaded-svc.service", tc.after)
			}
			_, err := tell(t.Context(), t.Context(), "svc.service", "reload", tc.reload, func(string) {})
			if !errorSays(err, tc.err) {
				t.Errorf("%v, want %q", err, tc.err)
			}
			if got := f.read("calls"); got != tc.calls {
				t.Errorf("%q, want %q", got, tc.calls)
			}
		})
	}
}

// TestUnitVanishes: one that runs on without its file is left alone; one that is down is looked for before it
// is called missing.
func TestUnitVanishes(t *testing.T) {
	w := okWorld(t)
	w.write("fake/svc.service", "active\nLoadState=not-found")
	w.reconcile()
	w.want("OK", "", "one\n", "")
	w.write("fake/svc.service", "inactive\nLoadState=not-found")
	w.reconcile()
	w.want("BROKEN", "unit svc.service does not exist", "one\n", "daemon-reload")
	w.write("fake/reloaded-svc.service", "inactive\nResult=success")
	w.reconcile()
	w.want("BROKEN", "unit svc.service is inactive", "one\n", "daemon-reload")
}

// TestUnitActionFails: the verb and systemd's words are told to everybody, the journal's to those who may
// read them; a job that is left is cancelled, and counted.
func TestUnitActionFails(t *testing.T) {
	f := newFakeSystemd(t)
	f.set("fail-reload", "")
	f.set("svc.service", "active\nJob=12 /org/freedesktop/systemd1/job/12")
	f.set("journal", "unknown directive secret\nin line 3\n")
	_, err := tell(t.Context(), t.Context(), "svc.service", "reload", false, func(string) {})
	if err == nil {
		t.Fatal("no error")
	}
	told := "systemctl reload svc.service: exit status 1: Job for svc.service failed."
	if got := public(err.Error()); got != told {
		t.Errorf("%q, want %q", got, told)
	}
	if got, want := unmark(err.Error()), told+" (journal: unknown directive secret; in line 3)"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
	if got, want := f.read("calls"), "reload svc.service, cancel 12"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
}

// fillRoom takes every place of those that are told at the same time, until the test ends. Who comes then waits
// for so many seconds, and one more.
func fillRoom(t *testing.T, seconds int) {
	for range cap(acting.room) {
		t.Cleanup(acting.enter(t.Context()))
	}
	go func() {
		for range seconds * 4 {
			time.Sleep(250 * time.Millisecond)
			acting.left.Add(1) // as if one left, and another came
		}
	}()
}

// TestUnitWaitsForItsTurn: what happened to a unit meanwhile is seen, and an end of the wait is no action.
func TestUnitWaitsForItsTurn(t *testing.T) {
	const stopped = "inactive\nResult=success"
	const idle = stopped + "\nTriggeredBy=svc.socket"
	for _, tc := range []struct {
		name, action, first, then string
		seconds                   int
		verb, calls               string
	}{
		{"runs on", "reload", "active", "active", 0, "reload", "reload svc.service"},
		{"was stopped", "reload", "active", stopped, 0, "start", "reload svc.service, start svc.service"},
		{"was stopped, try", "try-restart", "active", stopped, 0, "start", "start svc.service"},
		{"has a socket", "reload", "active", idle, 0, "", "reload svc.service"},
		{"has failed, and come up", "reload", "failed", "active", 0, "reload", "reload svc.service"},
		{"was stopped, long", "reload", "active", stopped, 6, "start", "start svc.service"},
		{"failed, long", "reload", "active", "failed", 6, "start", "reset-failed svc.service, start svc.service"},
		{"has a socket, long", "restart", "active", idle, 6, "", ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f := newFakeSystemd(t)
			f.set("svc.service", tc.first)
			fillRoom(t, tc.seconds)
			go func() {
				f.wait("asked", 1)
				f.set("svc.service", tc.then)
				if tc.then != "active" {
					f.set("fail-reload", "")
				}
			}()
			verb, err := tell(t.Context(), t.Context(), "svc.service", tc.action, false, func(string) {})
			if calls := f.read("calls"); err != nil || verb != tc.verb || calls != tc.calls {
				t.Errorf("told by %q, %v, %q", verb, err, calls)
			}
		})
	}

	t.Run("end", func(t *testing.T) {
		f := newFakeSystemd(t)
		fillRoom(t, 0)
		f.set("svc.service", "failed")
		ctx, end := context.WithCancel(t.Context())
		go func() {
			f.wait("asked", 1)
			end()
		}()
		_, err := tell(ctx, t.Context(), "svc.service", "reload", false, func(string) {})
		if calls := f.read("calls"); !errors.Is(err, context.Canceled) || calls != "" {
			t.Errorf("%v, %q", err, calls)
		}
	})
}

// TestUnitSettles: what a socket starts while it settles did not crash, and a job that failed waits for its
// timer.
func TestUnitSettles(t *testing.T) {
	ctx := context.Background()
	const name, watch = "svc.service", 400 * time.Millisecond
	for _, tc := range []struct{ name, first, then, action, err string }{
		{"well", "active\nInvocationID=1", "active\nInvocationID=1", "reload", ""},
		{"socket", "inactive\nTriggeredBy=svc.socket\nInvocationID=", "active\nTriggeredBy=svc.socket\nInvocationID=1",
			"reload", ""},
		{"restart", "active\nInvocationID=1", "active\nInvocationID=2", "reload", "restarted by systemd"},
		{"restart behind a socket", "inactive\nTriggeredBy=svc.socket", "active\nNRestarts=1", "reload",
			"restarted by systemd"},
		{"crash", "active", "failed\nResult=signal\nExecMainCode=3\nExecMainStatus=6", "restart", "killed by SIGABRT"},
		{"timer", "inactive\nType=oneshot\nInvocationID=1", "active\nType=oneshot\nInvocationID=2", "restart", ""},
		{"kill", "inactive", "active", "kill", ""},
		{"stop", "inactive", "active", "stop", "unit svc.service is active"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f := newFakeSystemd(t)
			f.set("svc.socket", "active")
			f.set(name, tc.first)
			first := 1 // calls of the first look
			if strings.Contains(tc.first, "TriggeredBy") {
				first = 2
			}
			done := make(chan bool)
			go func() {
				defer close(done)
				if tc.action != "kill" { // which is looked at once, at the end
					f.wait("asked", first)
				}
				f.set(name, tc.then)
			}()
			start := time.Now()
			u, err := settle(ctx, name, tc.action, watch)
			<-done
			if took := time.Since(start); err == nil && took < watch {
				t.Errorf("watched for %v", took)
			}
			if !errorSays(err, tc.err) {
				t.Errorf("%v, want %q", err, tc.err)
			}
			if u.is["Id"] != name {
				t.Errorf("%+v", u)
			}
		})
	}

	f := newFakeSystemd(t)
	f.set(name, "failed\nTriggeredBy=svc.timer")
	f.set("svc.timer", "active")
	verb, err := tell(ctx, ctx, name, "restart", false, func(string) {})
	if calls := f.read("calls"); err != nil || verb != "" || calls != "reset-failed svc.service" {
		t.Errorf("told by %q, %v, %q", verb, err, calls)
	}
}

// TestUnitSettleEnds: our end is not kept waiting, and a few looks are enough.
func TestUnitSettleEnds(t *testing.T) {
	f := newFakeSystemd(t)
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	_, err := settle(ctx, "svc.service", "reload", time.Minute)
	if err == nil || ctx.Err() == nil {
		t.Errorf("%v", err)
	}
	if n := strings.Count(f.read("asked"), "show"); n < 3 || n > 6 {
		t.Errorf("%d looks in two seconds", n)
	}
}

func TestUnitDirectory(t *testing.T) {
	for local, want := range map[string]bool{
		"/etc/systemd/system": true, "/etc/systemd/system/x.service": true, "/etc/systemd": true,
		"/usr/lib/systemd/system/a.d": true, "/etc/systemd/systemd": false, "/etc/prometheus": false, "": false,
	} {
		if got := unitDir.MatchString(local); got != want {
			t.Errorf("%q: %v", local, got)
		}
	}
}

func TestUnitNotify(t *testing.T) {
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
	golden(t, "gitopper.service", unitFile("/usr/local/bin/gitopper", nil))
	for _, tc := range []struct {
		exe     string
		options []string
		want    string
	}{
		{"/opt/gitopper", []string{"-s", "", "--metric=:9"}, `/opt/gitopper -s "" --metric=:9 -c /etc/gitopper/config.toml`},
		{"/opt/gitopper", []string{"--config=/x", "-d"}, "/opt/gitopper --config=/x -d"},
		{"/opt/my tools/100%/git$opper", []string{"-c", `/a"b $HOME\c`},
			`"/opt/my tools/100%%/git$opper" -c "/a\"b $$HOME\\c"`},
	} {
		got := unitFile(tc.exe, tc.options)
		if !strings.Contains(got, "\nExecStart="+tc.want+"\n") {
			t.Errorf("%s\nwant ExecStart=%s", got, tc.want)
		}
	}
}

// TestUnitFileIsRead: the real systemd finds the unit, and the binary that it names, whatever that is called.
func TestUnitFileIsRead(t *testing.T) {
	if _, err := exec.LookPath("systemd-analyze"); err != nil {
		t.Skip(err)
	}
	dir := t.TempDir()
	file, exe := dir+"/gitopper.service", dir+"/git $opper 100%"
	if err := os.Symlink("/bin/true", exe); err != nil {
		t.Fatal(err)
	}
	for _, e := range []string{"/bin/true", exe} {
		if err := os.WriteFile(file, []byte(unitFile(e, []string{"-h", `a"b $c;`, ";"})), 0o644); err != nil {
			t.Fatal(err)
		}
		if out, err := exec.Command("systemd-analyze", "verify", "--man=no", file).CombinedOutput(); err != nil || len(out) > 0 {
			t.Errorf("systemd-analyze verify: %v: %s", err, out)
		}
	}
}
