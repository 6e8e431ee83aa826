//go:build linux

package main

import (
	"cmp"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// reboot gives the host a new boot id in effect: the unit was told in another one, and no mount is there.
func (w *world) reboot() {
	w.t.Helper()
	w.editRecord(func(r *record) { r.Told.Boot = "another" })
	for _, d := range w.spec.dirs {
		_ = syscall.Unmount(d.local, syscall.MNT_DETACH)
	}
	w.boot()
}

// unit makes the fake systemd's unit what it says: a state, then properties.
func (w *world) unit(text string) {
	w.t.Helper()
	w.write("fake/"+w.spec.service, text)
}

// TestBootAdministratorsWish: a unit that an administrator had stopped stays down after a boot, and is
// reported; what else was down, or was up, is started.
func TestBootAdministratorsWish(t *testing.T) {
	const isUp, isDown = "active\nUnitFileState=", "inactive\nUnitFileState="
	const up, down, enabled = isUp + "disabled", isDown + "disabled", isUp + "enabled"
	const restarts, starts = "activating\nSubState=auto-restart", down + "\nJob=7 /7"
	for _, tc := range []struct {
		name   string
		before []string // what rounds before the boot see
		after  string   // the boot
		stays  bool
	}{
		{"stopped", []string{down, down}, down, true},
		{"stopped long ago", slices.Repeat([]string{down}, 4), down, true},
		{"stopped, still enabled", slices.Repeat([]string{isDown + "enabled"}, 2), isDown + "enabled", true},
		{"seen down once", []string{down}, down, false},
		{"up, and nobody's to start", []string{up}, down, false},
		{"disabled right before", []string{enabled}, down, true},
		{"disabled, seen down once", []string{enabled, down}, down, true},
		{"disabled, seen down", []string{enabled, down, down}, down, true},
		{"enabled, not started", []string{enabled}, isDown + "enabled", false},
		{"crashed", []string{"failed", "failed\nResult=exit-code"}, down, false},
		{"about to restart", []string{restarts, restarts}, down, false},
		{"on its way", []string{starts, starts}, down, false},
		{"stopped, then up", []string{down, down, up}, down, false},
		{"stopped, and starting", []string{down, down}, starts, false},
		{"stopped, and failed", []string{down, down}, "failed\nResult=exit-code", false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w := okWorld(t)
			for _, text := range tc.before {
				w.unit(text)
				w.reconcile()
			}
			w.calls()
			w.unit(tc.after)
			w.reboot()
			w.reconcile()
			if !tc.stays {
				if calls := w.calls(); !strings.HasSuffix(calls, "start") || w.s.Status().State != "OK" {
					t.Errorf("calls: %s, %+v", calls, *w.s.Status())
				}
				return
			}
			const told = "svc.service stays down, for an administrator had stopped it before the boot: " +
				"start it, or do pull"
			w.want("BROKEN", told, "one\n", "")
			w.reconcile()
			w.reboot()
			w.reconcile()
			w.want("BROKEN", told, "one\n", "")
			if err := w.op("pull", ""); err != nil {
				t.Error(err)
			}
			w.want("OK", "", "one\n", "start")
			w.reboot()
			w.unit(down)
			w.reconcile()
			w.want("OK", "", "one\n", "start")
		})
	}
}

// TestBootMasked: what else keeps a stopped unit down is told as that.
func TestBootMasked(t *testing.T) {
	for _, tc := range []struct{ unit, told, calls string }{
		{"inactive\nLoadState=masked\nLoadError=x Unit svc.service is masked.",
			"Unit svc.service is masked.", ""},
		{"inactive\nLoadState=not-found", "does not exist", "daemon-reload"},
	} {
		w := okWorld(t)
		w.unit("inactive")
		w.reconcile()
		w.reconcile()
		w.unit(tc.unit)
		w.reboot()
		w.calls()
		w.reconcile()
		w.want("BROKEN", tc.told, "one\n", tc.calls)
	}
}

// TestBootStoppedThenUp: a unit that is up again, by the list of all, which does not tell whether it is
// enabled, was not stopped.
func TestBootStoppedThenUp(t *testing.T) {
	w := okWorld(t)
	w.unit("active\nUnitFileState=enabled")
	w.reconcile()
	w.unit("inactive\nUnitFileState=disabled")
	w.reboot()
	w.reconcile()
	w.want("BROKEN", "stays down", "one\n", "")

	look := func() {
		t.Helper()
		units, err := lookUnits(t.Context(), unitNames{w.spec.service: w.spec.service}, w.spec.service)
		if err != nil {
			t.Fatal(err)
		}
		w.s.unit.Store(&units[0])
	}
	look() // it is down
	since := sinceBoot() + time.Second
	w.unit(fmt.Sprintf("active\nUnitFileState=disabled\n%s=%d", leftInactive, since.Microseconds()))
	for range 2 {
		w.reconcile()
		w.want("OK", "", "one\n", "")
		look()
	}
	w.unit("inactive\nUnitFileState=disabled")
	w.reboot()
	w.reconcile()
	w.want("OK", "", "one\n", "start")
}

// TestBootStoppedIsNoTrial: a commit that comes later brings the unit up, as ever, and one that was just
// told when the power went has not failed.
func TestBootStoppedIsNoTrial(t *testing.T) {
	w := okWorld(t)
	w.unit("inactive")
	w.reconcile()
	w.reconcile()
	w.commit("etc/app.conf", "two\n")
	w.reboot()
	w.killAt("settle", 1)
	w.calls()
	w.unit("inactive")
	w.reboot()
	w.reconcile()
	w.want("OK", "", "two\n", "start")
}

// TestShutdownJudgesNothing: while the host shuts down a unit that is down is no trouble, and a commit
// whose action can't be done is not to blame.
func TestShutdownJudgesNothing(t *testing.T) {
	w := okWorld(t)
	w.write("fake/shutdown.target", "inactive\nJob=1 /1")
	w.unit("inactive\nUnitFileState=disabled")
	for range 3 {
		w.reconcile()
		w.want("OK", "", "one\n", "")
	}
	w.commit("etc/app.conf", "two\n")
	w.reconcile()
	w.want("OK", "", "two\n", "")
	for _, verb := range []string{"rollback", "unfreeze"} { // which ends the rollback's pin
		err := w.op(verb, w.head())
		if err == nil || !strings.Contains(err.Error(), "the host is shutting down") {
			t.Errorf("%s: %v", verb, err)
		}
	}

	w.unit("inactive\nUnitFileState=disabled")
	w.write("fake/shutdown.target", "inactive")
	w.reboot()
	w.reconcile()
	w.want("OK", "", "two\n", "start")
}

// TestShutdownDuringAction: an action that the shutdown cancels takes no commit back, and cancels no job
// of the shutdown's.
func TestShutdownDuringAction(t *testing.T) {
	w := okWorld(t)
	w.commit("etc/app.conf", "two\n")
	w.write("fake/fail-reload", "")
	w.s.step = func(name string) {
		if name == "reload" {
			w.write("fake/shutdown.target", "inactive\nJob=1 /1")
			w.unit("active\nJob=2 /2")
		}
	}
	w.reconcile()
	w.want("OK", "", "two\n", "reload")
}

// TestRollbackUndoesEditsDespiteTrouble: also when its first pass fails, and we are started anew.
func TestRollbackUndoesEditsDespiteTrouble(t *testing.T) {
	w := okWorld(t)
	first := w.head()
	w.commit("one.conf", "another\n")
	w.reconcile()
	w.write("local/etc/app.conf", "edited\n")
	o := op{verb: "rollback", hash: first, who: "me", step: func(name string) {
		if name == "publish" {
			w.recordsGo()
		}
	}}
	if err := w.s.operate(t.Context(), o); err == nil {
		t.Error("the rollback has no trouble")
	}
	w.shows("local/etc/app.conf", "edited\n")
	w.recordsCome()
	w.restart()
	w.reconcile()
	w.shows("local/etc/app.conf", "one\n")
	w.kept("etc/app.conf", "edited\n")

	// From then on they stay, as ever while pinned.
	w.write("local/etc/app.conf", "emergency\n")
	w.reconcile()
	w.shows("local/etc/app.conf", "emergency\n")
}

// TestBootWhileFilesAreAway: what was mounted before the boot is mounted again, also where its files are
// to be laid out for another user, or shown at other links, and upstream is away; or where the user is not
// known without a network.
func TestBootWhileFilesAreAway(t *testing.T) {
	t.Run("another user", func(t *testing.T) {
		w := okWorld(t)
		for i, user := range []string{"nobody", "", "nobody"} {
			w.asNobody()
			w.spec.user = user
			w.run("chown", "-R", "0", w.bare)
			w.commit("one.conf", strings.Repeat("single\n", i+2))
			w.run("chown", "-R", cmp.Or(user, "root"), w.bare)
			w.upstreamGoes()
			w.restart()
			retireUpstreams(t.Context(), w.dir+"/state", []*upstream{w.up})
			w.reconcile()
			w.shows("local/etc/app.conf", "one\n")
			for range 2 {
				w.reboot()
				w.shows("local/etc/app.conf", "one\n")
				w.shows("local/one.conf", strings.Repeat("single\n", i+1))
				w.reconcile()
				w.shows("local/etc/app.conf", "one\n")
			}
			w.calls()
			w.upstreamComes()
			w.reconcile()
			w.want("OK", "", "one\n", "reload")
			w.wantOwner(w.s.files.dir+"/etc", w.s.files.acct.uid)
		}
	})
	t.Run("unknown user", func(t *testing.T) {
		w := okWorld(t)
		w.spec.user = "of-the-network"
		w.reboot()
		w.shows("local/etc/app.conf", "one\n")
	})
	t.Run("no name service is asked", func(t *testing.T) {
		w := okWorld(t)
		w.asNobody()
		w.restart()
		w.reconcile()
		w.write("bin/getent", "#!/bin/sh\necho $$ >"+w.dir+"/asked\n")
		w.run("chmod", "+x", w.dir+"/bin/getent")
		w.spec.user = "of-the-network"
		w.reboot()
		w.shows("local/etc/app.conf", "one\n")
		if lexists(w.dir + "/asked") {
			t.Error("the name service was asked")
		}
	})
	t.Run("other links, to be checked", func(t *testing.T) {
		w := okWorld(t)
		w.upstreamGoes()
		w.spec.check = []string{"true"}
		w.spec.dirs = append(w.spec.dirs, dir{local: w.dir + "/local/other", link: "other"})
		w.reboot()
		w.shows("local/etc/app.conf", "one\n")
		w.upstreamComes()
		w.reconcile()
		w.shows("local/other/file", "x\n")
	})
}

// TestSignersCantBeAsked: what the host lacks for signers is told with the way out, and refuses nothing.
func TestSignersCantBeAsked(t *testing.T) {
	for _, tc := range []struct{ name, told, keygen string }{
		{"no file", "no such file or directory: put the file there", ""},
		{"no program", "install it (Debian: openssh-client)", "gone"},
		{"OpenSSH 7.9", "install it (Debian: openssh-client)",
			"#!/bin/sh\necho unknown option -- Y >&2\necho 'usage: ssh-keygen [-q] [-b bits]' >&2\nexit 1\n"},
		{"OpenSSH 8.1", "install it (Debian: openssh-client)",
			"#!/bin/sh\necho 'Unsupported operation for -Y: \"find-principals\"' >&2\n" +
				"echo 'usage: ssh-keygen [-q] [-b bits]' >&2\nexit 1\n"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w := okWorld(t)
			commit := w.signed()
			commit(true, "etc/app.conf", "two\n")
			switch tc.keygen {
			case "":
				if err := os.Remove(w.dir + "/signers"); err != nil {
					t.Fatal(err)
				}
			case "gone": // there is git, and nothing else
				git, err := exec.LookPath("git")
				if err = cmp.Or(err, os.Symlink(git, w.dir+"/bin/git")); err != nil {
					t.Fatal(err)
				}
				t.Setenv("PATH", w.dir+"/bin")
			default:
				w.write("bin/ssh-keygen", tc.keygen)
				w.run("chmod", "+x", w.dir+"/bin/ssh-keygen")
			}
			for range 2 {
				w.reconcile()
				w.want("DIFF", tc.told, "one\n", "")
			}
		})
	}
}

// TestSignersEndNobody: nor does it end the daemon, also with -r, or another service.
func TestSignersEndNobody(t *testing.T) {
	w, d := daemonWorld(t)
	other := fmt.Sprintf("[[services]]\nmachine = 'm'\nservice = 'other'\nupstream = 'file://%[1]s/up.git'\n"+
		"dirs = [{local = '%[1]s/local/other', link = 'other'}]\n", w.dir)
	d.write("c.toml", d.svc("signers = '/nope'\n")+other)
	r := start(t, "-r", "-t", "100ms", "-c", d.file)
	r.ready()
	r.logs("signers: stat /nope: no such file or directory: put the file there")
	r.metrics(`gitopper_service_state{service="svc"} 4`, `gitopper_service_state{service="other"} 0`,
		"gitopper_config_ok 1")
	w.commit("other/file", "new\n")
	eventually(t, "other goes on", func() bool { return w.read("local/other/file") == "new\n" })
	d.write("c.toml", d.svc("")+other)
	r.ends(2)
}

// TestOnceWithWrongConfig: the one that was last right does its work, and the status says what is to be
// mended.
func TestOnceWithWrongConfig(t *testing.T) {
	w, d := daemonWorld(t)
	once(t, 0, "svc "+w.head()[:8]+" OK", "-c", d.file)
	d.write("c.toml", "[")
	hash := w.commit("etc/app.conf", "two\n")
	once(t, 1, "svc "+hash[:8]+" OK\ngitopper: "+d.file+": line 1, column 2: ", "-c", d.file)
	w.shows("local/etc/app.conf", "two\n")
}

// TestOthersConfigEndsNobody: a config that others than root can write is told, and is no reason for -r to
// end.
func TestOthersConfigEndsNobody(t *testing.T) {
	w, d := daemonWorld(t)
	r := start(t, "-r", "-c", d.file)
	r.ready()
	if err := os.Chmod(w.dir+"/conf", 0o777); err != nil {
		t.Fatal(err)
	}
	d.write("c.toml", d.svc("fallback = false"))
	r.logs("WARN the config has changed: it is used after a restart (at once with -r, if it is root's alone)")
	if err := os.Chmod(w.dir+"/conf", 0o755); err != nil {
		t.Fatal(err)
	}
	d.write("c.toml", d.svc("fallback = true"))
	r.ends(2)
}

// TestBootUnwritable: where nothing can be written the mounts are made all the same, and it is told.
func TestBootUnwritable(t *testing.T) {
	for _, tc := range []struct {
		name string
		make func(w *world, state string) error
		told string
	}{
		{"read-only", func(_ *world, state string) error {
			return syscall.Mount("", state, "", syscall.MS_REMOUNT|syscall.MS_RDONLY, "")
		}, "read-only file system"},
		{"full", func(w *world, state string) error {
			for size := 1 << 20; size > 0; size /= 2 {
				f, err := os.OpenFile(state+"/filler", os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
				for err == nil {
					_, err = f.Write(make([]byte, size))
				}
				f.Close()
			}
			return nil
		}, "no space left on device"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w, d := daemonWorld(t)
			state := w.dir + "/state"
			err := os.MkdirAll(state, 0o711)
			if err = cmp.Or(err, syscall.Mount("tmpfs", state, "tmpfs", 0, "size=4m,mode=711")); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = syscall.Unmount(state, syscall.MNT_DETACH) })
			once(t, 0, "svc "+w.head()[:8]+" OK", "-c", d.file)
			for _, dir := range w.spec.dirs {
				_ = syscall.Unmount(dir.local, syscall.MNT_DETACH)
			}
			if err := tc.make(w, state); err != nil {
				t.Fatal(err)
			}
			w.commit("etc/app.conf", "two\n")
			r := start(t, "-t", "100ms", "-c", d.file)
			r.ready()
			w.shows("local/etc/app.conf", "one\n")
			r.logs(tc.told)
			err = syscall.Mount("", state, "", syscall.MS_REMOUNT, "size=4m")
			if err = cmp.Or(err, os.RemoveAll(state+"/filler")); err != nil {
				t.Fatal(err)
			}
			r.metrics(`gitopper_service_state{service="svc"} 0`)
			eventually(t, "all is well", func() bool { return w.read("local/etc/app.conf") == "two\n" })
		})
	}
}

// TestBootBootstrapped: a host whose config comes from upstream has its mounts, also where that is away
// and the config in the checkout is spoilt; and mends it when upstream is back.
func TestBootBootstrapped(t *testing.T) {
	for _, tc := range []struct {
		name string
		kept bool
		pull []string
	}{
		{"the last right config is kept", true, nil},
		{"and a pull", true, []string{"-P"}},
		{"no right config is there", false, nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w, d := daemonWorld(t)
			args := []string{"-U", "file://" + w.bare, "-M", w.dir + "/own", "-c", "config.toml"}
			args = append(args, tc.pull...)
			hash := w.commit(bootConfig(d, "")...)
			once(t, 0, fmt.Sprintf("gitopper %.8s OK\nsvc %.8s OK", hash, hash), args...)
			w.unmountAll()
			w.upstreamGoes()
			w.write("own/gitopper/gitopper/config.toml", "[")
			if !tc.kept {
				if err := os.Remove(keptFile(w.dir + "/state")); err != nil {
					t.Fatal(err)
				}
			}
			r := start(t, append(args, "-r", "-t", "100ms")...)
			r.ready()
			w.shows("local/etc/app.conf", "one\n")
			r.metrics("gitopper_config_ok 0")
			w.upstreamComes()
			r.metrics("gitopper_config_ok 1", `gitopper_service_state{service="gitopper"} 0`,
				`gitopper_service_state{service="svc"} 0`)
			w.shows("local/etc/app.conf", "one\n")
		})
	}
}
