package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

const actionLimit = 5 * time.Minute

// unit is what systemd knows of a unit, in the words of systemctl show.
type unit struct {
	ID, LoadState, ActiveState, SubState, Result, Type, NeedDaemonReload string
	InvocationID, MainPID, ExecMainStatus, Job                           string
	LoadError                                                            string
	TriggeredBy                                                          []string
	triggered                                                            bool      // one of TriggeredBy is active
	at                                                                   time.Time // when systemd was asked
}

// reloadLock keeps daemon-reload alone: systemd does it for the whole host.
var reloadLock = make(chan struct{}, 1)

func systemctl(ctx context.Context, limit time.Duration, args ...string) ([]byte, error) {
	name := "systemctl " + args[0]
	if args[0] != "show" {
		name += " " + args[len(args)-1]
	}
	return execute(ctx, name, exec.Command("systemctl", append([]string{"--no-ask-password", "--no-pager"}, args...)...), limit, syscall.SIGKILL)
}

// showUnits asks systemd once for the state of units; the result is in the order of the names.
func showUnits(ctx context.Context, names ...string) ([]unit, error) {
	units, err := show(ctx, names)
	if err != nil {
		return nil, err
	}
	var by []string
	for _, u := range units {
		if u.ActiveState == "inactive" || u.ActiveState == "failed" {
			by = append(by, u.TriggeredBy...)
		}
	}
	if len(by) == 0 {
		return units, nil
	}
	triggers, err := show(ctx, by)
	if err != nil {
		return nil, err
	}
	for i := range units {
		for _, t := range triggers {
			units[i].triggered = units[i].triggered || t.ActiveState == "active" && slices.Contains(units[i].TriggeredBy, t.ID)
		}
	}
	return units, nil
}

func show(ctx context.Context, names []string) ([]unit, error) {
	now := time.Now()
	out, err := systemctl(ctx, localLimit, append([]string{"show", "-p", "Id,LoadState,LoadError,ActiveState,SubState,Result,Type,NeedDaemonReload,InvocationID,MainPID,ExecMainStatus,TriggeredBy,Job", "--"}, names...)...)
	if err != nil {
		return nil, err
	}
	units, err := parseUnits(string(out))
	if err == nil && len(units) != len(names) {
		err = fmt.Errorf("systemctl show: asked for %d units, got %d", len(names), len(units))
	}
	for i := range units {
		units[i].at = now
	}
	return units, err
}

// parseUnits reads what systemctl show prints: KEY=VALUE lines, an empty line between units.
//
//	Id=nginx.service
//	ActiveState=active
func parseUnits(out string) ([]unit, error) {
	var units []unit
	for block := range strings.SplitSeq(strings.TrimSpace(out), "\n\n") {
		var u unit
		fields := map[string]*string{"Id": &u.ID, "LoadState": &u.LoadState, "ActiveState": &u.ActiveState, "SubState": &u.SubState, "Result": &u.Result,
			"Type": &u.Type, "NeedDaemonReload": &u.NeedDaemonReload, "InvocationID": &u.InvocationID, "MainPID": &u.MainPID,
			"ExecMainStatus": &u.ExecMainStatus, "Job": &u.Job, "LoadError": &u.LoadError}
		for line := range strings.SplitSeq(block, "\n") {
			k, v, ok := strings.Cut(line, "=")
			if p := fields[k]; ok && p != nil {
				*p = v
			} else if k == "TriggeredBy" {
				u.TriggeredBy = strings.Fields(v)
			}
		}
		if u.ID == "" {
			return nil, fmt.Errorf("systemctl show: no Id in %q", block)
		}
		units = append(units, u)
	}
	return units, nil
}

// up says whether a unit runs as it should: active; or a oneshot that ended well; or waiting to be triggered.
func (u *unit) up() bool {
	switch u.ActiveState {
	case "active", "reloading":
		return true
	case "activating":
		return u.Type == "oneshot" && u.SubState != "auto-restart" // its timer or socket has it at work
	case "inactive":
		return u.triggered || u.Type == "oneshot" && u.Result == "success"
	}
	return false
}

// well is up for a unit that action is done to: one that is to be stopped is well when it is down.
func (u *unit) well(action string) bool {
	if action == "stop" {
		return u.ActiveState == "inactive"
	}
	return u.up()
}

// describe gives systemd's words for a unit that isn't up.
func (u *unit) describe() string {
	if u.LoadState != "loaded" {
		return fmt.Sprintf("unit %s is %s %s: name the package that brings it, or mend service or the unit", u.ID, u.LoadState, u.LoadError)
	}
	s := fmt.Sprintf("unit %s is %s (%s", u.ID, u.ActiveState, u.SubState)
	if u.Result != "" && u.Result != "success" {
		s += ", " + u.Result
	}
	if u.ExecMainStatus != "" && u.ExecMainStatus != "0" {
		s += ", main process ended with status " + u.ExecMainStatus
	}
	return s + ")"
}

// tell makes a unit take notice of changed files: daemon-reload if needed, enable for a template instance, reset-failed,
// then action, or start if it is not up. reload says that something changed at or below a directory of units. It returns
// the verb that systemd was given, none for a unit that waits to be triggered.
func tell(ctx context.Context, name, action string, reload bool, step func(string)) (verb string, err error) {
	units, err := showUnits(ctx, name)
	if err != nil {
		return "", err
	}
	u := units[0]
	// NeedDaemonReload alone doesn't tell: it stays no when the file mounted in place of the loaded one is older.
	if reload || u.NeedDaemonReload == "yes" {
		select {
		case reloadLock <- struct{}{}:
		case <-ctx.Done():
			return "", ctx.Err()
		}
		_, err := systemctl(ctx, localLimit, "daemon-reload")
		<-reloadLock
		if err != nil {
			return "", err
		}
		if units, err = showUnits(ctx, name); err != nil {
			return "", err
		}
		u = units[0]
	}
	if u.LoadState != "loaded" {
		return "", errors.New(u.describe())
	}
	if strings.Contains(name, "@") {
		// Its exit status only repeats the word.
		if out, _ := systemctl(ctx, localLimit, "is-enabled", "--", name); strings.TrimSpace(string(out)) == "disabled" {
			if _, err := systemctl(ctx, localLimit, "enable", "--", name); err != nil {
				return "", err
			}
		}
	}
	if u.ActiveState == "reloading" { // left by an action of ours that was killed: the next would wait behind it
		cancelJob(ctx, name)
	}
	if u.ActiveState == "failed" || u.SubState == "auto-restart" {
		if _, err := systemctl(ctx, localLimit, "reset-failed", "--", name); err != nil {
			return "", err
		}
	}
	if u.triggered { // down, and what triggers it brings it up
		return "", nil
	}
	verb = verbFor(&u, action)
	step(verb)
	start := time.Now()
	_, err = systemctl(ctx, actionLimit, verb, "--", name)
	result := "ok"
	if err != nil {
		result = "failed"
		err = fmt.Errorf("%w%s", err, lastWords(ctx, u.ID, start))
		cancelJob(ctx, name)
	}
	count.add("gitopper_service_actions_total", labels("service", name, "result", result))
	count.addFloat("gitopper_service_action_seconds_total", labels("service", name, "result", result), time.Since(start).Seconds())
	return verb, err
}

// verbFor is the systemctl verb that makes u run with today's files.
func verbFor(u *unit, action string) string {
	running := u.ActiveState == "active" || u.ActiveState == "reloading"
	switch {
	case action == "stop":
		return action
	case u.Type == "oneshot" && running && action != "start":
		return "restart"
	case !running && (u.Type != "oneshot" || action != "restart"):
		return "start"
	}
	return action
}

// cancelJob ends what a systemctl that was ended or failed may have left running in systemd, so that the next job does
// not wait behind it.
func cancelJob(ctx context.Context, name string) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
	defer cancel()
	if units, err := show(ctx, []string{name}); err == nil && units[0].Job != "" && units[0].Job != "0" {
		job, _, _ := strings.Cut(units[0].Job, " ")
		_, _ = systemctl(ctx, localLimit, "cancel", job)
	}
}

// lastWords returns what the unit's processes last said to the journal since start (in whole seconds), ready to be put behind
// an error. What systemd said of the unit is in its properties.
func lastWords(ctx context.Context, id string, start time.Time) string {
	out, err := execute(ctx, "journalctl", exec.Command("journalctl", "-q", "_SYSTEMD_UNIT="+id, "-n", "4", "-o", "cat", "--no-pager", "--since", "@"+strconv.FormatInt(start.Unix(), 10)), 10*time.Second, syscall.SIGKILL)
	words := oneLine(string(out))
	if err != nil || words == "" {
		return ""
	}
	return " (journal: " + words + ")"
}

// settle watches a unit for the time given after an action and returns an error as soon as it is not up, or restarts
// by itself. A unit that is killed may be down, and come back, until the time is over.
func settle(ctx context.Context, name, action string, watch time.Duration) (u unit, err error) {
	start, invocation := time.Now(), ""
	if action == "kill" {
		watch = max(watch, time.Second) // time to end, and to come back
	}
	for {
		units, err := showUnits(ctx, name)
		if err != nil {
			return u, err
		}
		u = units[0]
		if action != "kill" || time.Since(start) >= watch { // before that it is meant to end, and to come back
			// A unit of Type=simple counts as active the moment it is started: a crash loop shows as a new invocation.
			again := invocation != "" && u.InvocationID != invocation
			if again {
				u.SubState += ", restarted by systemd"
			}
			if again || !u.well(action) {
				return u, errors.New(u.describe() + lastWords(ctx, u.ID, start.Add(-time.Second)))
			}
			if u.ActiveState != "inactive" && u.Type != "oneshot" { // what starts those is no crash, but a socket or timer
				invocation = u.InvocationID
			}
		}
		left := watch - time.Since(start)
		if left <= 0 {
			return u, nil
		}
		select {
		case <-time.After(min(left, 250*time.Millisecond)):
		case <-ctx.Done():
			return u, ctx.Err()
		}
	}
}

// seesOld says whether the unit's main process, in a mount namespace of its own, does not see the file or directory that
// local shows on the host.
func (u *unit) seesOld(local string) bool {
	if u.MainPID == "" || u.MainPID == "0" {
		return false
	}
	host, err1 := os.Stat(local)
	inside, err2 := os.Stat("/proc/" + u.MainPID + "/root" + local)
	return err1 == nil && err2 == nil && !os.SameFile(host, inside)
}

// inUnitDir says whether local is, is in, or is around a directory of systemd units. See systemd.unit(5).
func inUnitDir(local string) bool {
	return local != "" && slices.ContainsFunc([]string{"/etc/systemd/system", "/run/systemd/system", "/usr/local/lib/systemd/system", "/usr/lib/systemd/system", "/lib/systemd/system"},
		func(d string) bool { return nested(local, d) })
}

// notify tells systemd of our own state, as sd_notify(3) describes it; without systemd it does nothing.
func notify(socket, state string) {
	if socket == "" {
		return
	}
	c, err := net.Dial("unixgram", socket)
	if err != nil {
		return
	}
	defer c.Close()
	_, _ = c.Write([]byte(state))
}

// unitFile returns a systemd unit for the binary exe. It has none of the sandboxing that gives a unit a mount namespace of
// its own (systemd.exec(5): "will disconnect propagation of mounts"), for our mounts are meant for the host.
func unitFile(exe string) string {
	quote := strings.NewReplacer(`%`, `%%`, `\`, `\\`, `"`, `\"`, `$`, `$$`)
	if strings.ContainsAny(exe, " \t'\"\\") {
		exe = `"` + quote.Replace(exe) + `"`
	} else {
		exe = quote.Replace(exe)
	}
	return `[Unit]
Description=GitOps for this host
Documentation=man:git(1) man:systemctl(1)
Wants=network-online.target
After=network-online.target local-fs.target
# A wrong config is looked at again until it is right.
StartLimitIntervalSec=0
# A unit whose files are mounted by gitopper starts on them with: After=gitopper.service

[Service]
Type=notify
ExecStart=` + exe + ` -r -c /etc/gitopper/config.toml
StateDirectory=gitopper
StateDirectoryMode=0700
UMask=0022
# A first checkout of our own config may take its time; all that is done has limits of its own.
TimeoutStartSec=infinity
WatchdogSec=2min
Restart=on-failure
# Status 2 is SIGHUP, or a new config: no failure, and to be started anew.
SuccessExitStatus=2
RestartForceExitStatus=2
RestartSec=2s
# Mounts stay when gitopper stops. A package that is being installed is let finish.
KillMode=mixed
TimeoutStopSec=35min
LimitNOFILE=8192
# Only what needs no mount namespace: with one, mounts would not reach the host.
LockPersonality=yes
RestrictRealtime=yes

[Install]
WantedBy=multi-user.target
`
}

// bootID identifies this boot of the host. See random(4).
func bootID() string {
	id, _ := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(id))
}
