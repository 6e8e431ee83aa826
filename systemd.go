//go:build linux

package main

import (
	"cmp"
	"context"
	_ "embed"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
	"unsafe"
)

const actionLimit = 5 * time.Minute

// Systemd is one for the whole host: what several services want of it at the same time, it is asked once.
var (
	looks   = batch[unit]{do: showUnits}
	reloads = batch[struct{}]{do: func(ctx context.Context, names []string) ([]struct{}, error) {
		_, err := systemctl(ctx, localLimit, "daemon-reload")
		return make([]struct{}, len(names)), err
	}}
)

// unit is what systemd knows of a unit, in the words of systemctl show: values by their property. One that
// lookUnits found active has no more than its Id and states.
type unit struct {
	is        map[string]string
	triggered bool      // one of its TriggeredBy is active
	at        time.Time // when systemd was asked
}

const shownProperties = "Id,LoadState,LoadError,ActiveState,SubState,Result,Type,NeedDaemonReload," +
	"CanReload,CanStop,InvocationID,NRestarts,MainPID,ExecMainCode,ExecMainStatus,Job,TriggeredBy," +
	"UnitFileState," + leftInactive

// leftInactive is when the unit last began to start, in microseconds; 0: not in this boot. It may have read
// its files from then on, and not only when it became active.
const leftInactive = "InactiveExitTimestampMonotonic"

// unitNames remembers by which name systemd knows a unit of the config, which may be an alias or lack the
// suffix: systemctl list-units takes no other. It belongs to the one goroutine that asks for all units.
type unitNames map[string]string

// lookUnits asks systemd for the state of units, in the order of the names: one list-units for those that are
// active, and one show for the others and for those whose canonical name is not known yet.
func lookUnits(ctx context.Context, ids unitNames, names ...string) ([]unit, error) {
	// What triggers the units that are down is found in the same answer.
	patterns := append(slices.Sorted(maps.Values(ids)), "*.socket", "*.timer", "*.path", "*.automount")
	active, err := listActive(ctx, patterns)
	if err != nil {
		return nil, err
	}
	isActive := func(id string) bool { return active[id].is != nil }
	others := slices.DeleteFunc(slices.Clone(names), func(name string) bool { return isActive(ids[name]) })
	shown, err := show(ctx, others...)
	if err != nil {
		return nil, err
	}

	var units []unit
	for _, name := range names {
		u := active[ids[name]]
		if u.is == nil {
			u, shown = shown[0], shown[1:]
			u.triggered = slices.ContainsFunc(u.triggers(), isActive)
			ids[name] = u.is["Id"]
		}
		units = append(units, u)
	}
	return units, nil
}

// showUnit asks systemd for all that unit holds of one unit, together with what others ask at the same time.
func showUnit(ctx context.Context, name string) (unit, error) {
	u, alone, err := looks.ask(ctx, name)
	isForAll := errors.Is(err, errShutdown)
	if err == nil || alone || isForAll {
		return u, err
	}
	units, err := showUnits(ctx, []string{name}) // it may be another unit that can't be shown
	if err != nil {
		return unit{}, err
	}
	return units[0], nil
}

// showUnits is showUnit for units in one go. A second one finds out what triggers those that are down.
func showUnits(ctx context.Context, names []string) ([]unit, error) {
	units, err := show(ctx, names...)
	if err != nil {
		return nil, err
	}
	var triggers []string
	for _, u := range units {
		triggers = append(triggers, u.triggers()...)
	}
	shown, err := show(ctx, triggers...)
	isActive := func(id string) bool {
		return slices.ContainsFunc(shown, func(t unit) bool { return t.is["Id"] == id && t.running() })
	}
	for i, u := range units {
		units[i].triggered = slices.ContainsFunc(u.triggers(), isActive)
	}
	return units, err
}

// listActive returns the active units that match one of the patterns, by name.
func listActive(ctx context.Context, patterns []string) (map[string]unit, error) {
	now := time.Now()
	args := []string{"list-units", "--full", "--plain", "--no-legend", "--state=active", "--"}
	out, err := systemctl(ctx, localLimit, append(args, patterns...)...)
	return parseActive(string(out), now), err
}

// parseActive reads lines of name, load, active and sub state, job, if any, and description.
//
//	dbus.socket loaded active listening D-Bus System Message Bus Socket
func parseActive(out string, now time.Time) map[string]unit {
	active := map[string]unit{}
	for line := range strings.Lines(out) {
		if f := strings.Fields(line); len(f) >= 4 {
			is := map[string]string{"Id": f[0], "LoadState": f[1], "ActiveState": f[2], "SubState": f[3]}
			active[f[0]] = unit{is: is, at: now}
		}
	}
	return active
}

// errShutdown is why nothing is asked of a unit, and nothing made of its being down.
var errShutdown = errors.New("the host is shutting down")

// show asks systemd for units; the result is in the order of the names. It is errShutdown while the host
// shuts down, which may begin between two answers of systemd's, and is therefore asked for last.
func show(ctx context.Context, names ...string) ([]unit, error) {
	if len(names) == 0 {
		return nil, nil
	}
	now, args := time.Now(), slices.Concat([]string{"show", "-p", shownProperties, "--"}, names)
	out, err := systemctl(ctx, localLimit, append(args, "shutdown.target")...)
	if err != nil {
		return nil, err
	}

	var units []unit
	for block := range strings.SplitSeq(strings.TrimSpace(string(out)), "\n\n") {
		u := parseUnit(block)
		u.at = now
		units = append(units, u)
	}
	isNone := func(u unit) bool { return u.is["Id"] == "" }
	if len(units) != len(names)+1 || slices.ContainsFunc(units, isNone) {
		return nil, fmt.Errorf("systemctl show: asked for %d units, got %q", len(names), out)
	}
	if shutdown := units[len(names)]; shutdown.running() || !shutdown.says("Job", "") {
		return nil, errShutdown
	}
	return units[:len(names)], nil
}

// parseUnit reads what systemctl show prints of a unit.
//
//	Id=nginx.service
//	ActiveState=active
func parseUnit(block string) unit {
	is := map[string]string{}
	for line := range strings.SplitSeq(block, "\n") {
		property, value, _ := strings.Cut(line, "=")
		is[property] = value
	}
	return unit{is: is}
}

// since is CLOCK_MONOTONIC when the unit last began to start in this boot; 0: it did not.
func (u *unit) since() time.Duration {
	microseconds, _ := strconv.ParseInt(u.is[leftInactive], 10, 64)
	return time.Duration(microseconds) * time.Microsecond
}

// says whether systemd says one of these values of a property.
func (u *unit) says(property string, values ...string) bool {
	return slices.Contains(values, u.is[property])
}

// down says whether the unit neither runs nor is on its way to.
func (u *unit) down() bool { return u.says("ActiveState", "inactive", "failed") }

// triggers are the units that would start it, where it is down.
func (u *unit) triggers() []string {
	if !u.down() {
		return nil
	}
	return strings.Fields(u.is["TriggeredBy"])
}

// running says whether the unit is there to be told of changed files.
func (u *unit) running() bool { return u.says("ActiveState", "active", "reloading") }

// stopped says whether the unit was stopped, or ended by itself, without a failure and for now.
func (u *unit) stopped() bool {
	isWell := u.says("LoadState", "loaded") && u.says("Result", "success")
	return isWell && u.says("ActiveState", "inactive") && u.says("Job", "")
}

// up says whether a unit runs as it should: active; or a oneshot that ended well; or waiting to be triggered.
func (u *unit) up() bool {
	oneshot := u.says("Type", "oneshot")
	switch u.is["ActiveState"] {
	case "inactive":
		return u.triggered || oneshot && u.says("Result", "success")
	case "activating":
		return oneshot && !u.says("SubState", "auto-restart") // its timer or socket has it at work
	}
	return u.running()
}

// differs says whether a look at the unit may tell more than the one before: what is not running may count
// twice.
func (u *unit) differs(now *unit) bool {
	if u == nil || now == nil || !now.running() {
		return true
	}
	return !maps.Equal(u.is, now.is)
}

// well is up for a unit that action is done to: one that is to be stopped is well when it is down.
func (u *unit) well(action string) bool {
	if action == "stop" {
		return u.says("ActiveState", "inactive")
	}
	return u.up()
}

// describe gives systemd's words for a unit that isn't well.
func (u *unit) describe() string {
	switch u.is["LoadState"] {
	case "loaded":
	case "not-found":
		return "unit " + u.is["Id"] + " does not exist: name the package that brings it, or mend service"
	default: // org.freedesktop.systemd1.UnitMasked "Unit x is masked."
		_, why, _ := strings.Cut(u.is["LoadError"], " ")
		return fmt.Sprintf("unit %s is %s: %s", u.is["Id"], u.is["LoadState"], why)
	}

	s := fmt.Sprintf("unit %s is %s (%s", u.is["Id"], u.is["ActiveState"], u.is["SubState"])
	if !u.says("Result", "", "success") {
		s += ", " + u.is["Result"]
	}
	switch {
	case u.says("ExecMainCode", "2", "3"): // CLD_KILLED and CLD_DUMPED of waitid(2)
		s += ", main process killed by " + signalName(u.is["ExecMainStatus"])
	case !u.says("ExecMainStatus", "", "0"):
		s += ", main process ended with status " + u.is["ExecMainStatus"]
	}
	return s + ")"
}

// The names of signal(7) by number; a few architectures have others.
const signalNames = "0 HUP INT QUIT ILL TRAP ABRT BUS FPE KILL USR1 SEGV USR2 PIPE ALRM TERM STKFLT CHLD " +
	"CONT STOP TSTP TTIN TTOU URG XCPU XFSZ VTALRM PROF WINCH IO PWR SYS"

func signalName(number string) string {
	n, _ := strconv.Atoi(number)
	if names := strings.Fields(signalNames); n < len(names) {
		return "SIG" + names[n]
	}
	return "signal " + number
}

// daemonReload makes systemd read its unit files again, for all who want it at the same time.
func daemonReload(ctx context.Context) error {
	_, _, err := reloads.ask(ctx, "")
	return err
}

// looksHold is how long a look at a unit that runs, or does not, is good for while the unit waits for its
// turn. To ask again for each of a hundred units that one commit changes would take half as long as to tell
// them.
const looksHold = 5 * time.Second

// holds says whether the unit is likely to be still as it was looked at, or its action fails where it is not:
// unlike one that tries, and one on which a job of before would be ended.
func (u *unit) holds(action string) bool {
	age := time.Since(u.at)
	isPlain := u.says("ActiveState", "active", "inactive") && !strings.HasPrefix(action, "try-")
	return age < time.Second || isPlain && age < looksHold
}

// tell makes a unit take notice of changed files: daemon-reload if needed, enable for a template instance,
// reset-failed, then action, or start if it is not up. reload says that something changed at or below a
// directory of units. It returns the verb that systemd was given, none for a unit that waits to be triggered.
// ctx ends only the wait for its turn, hard also what was begun.
func tell(ctx, hard context.Context, name, action string, reload bool, step func(string)) (
	verb string, err error) {
	u, err := loadUnit(hard, name, reload)
	if err != nil {
		return "", err
	}

	defer acting.enter(ctx)()
	if ctx.Err() == nil && !u.holds(action) {
		u, err = loadUnit(hard, name, false)
	}
	if err = cmp.Or(ctx.Err(), err); err != nil {
		return "", err
	}

	if !u.says("LoadState", "loaded") {
		return "", errors.New(u.describe())
	}
	if isDisabled(name, &u) {
		if _, err := systemctl(hard, localLimit, "enable", "--", name); err != nil {
			return "", err
		}
	}
	if u.says("ActiveState", "reloading") { // an action of ours was killed, and the next would wait behind it
		_ = cancelJob(hard, name)
	}
	if u.says("ActiveState", "failed") || u.says("SubState", "auto-restart") {
		if _, err := systemctl(hard, localLimit, "reset-failed", "--", name); err != nil {
			return "", err
		}
	}
	if u.triggered { // down, and what triggers it brings it up
		return "", nil
	}

	verb, err = verbFor(&u, action)
	if err != nil {
		return "", err
	}
	step(verb)
	hasWaited := time.Since(u.at) > time.Second
	err = act(hard, name, u.is["Id"], verb)
	if err == nil || !hasWaited {
		return verb, err
	}
	now, _ := showUnit(hard, name)
	wasStopped := u.running() && now.stopped() // since it was looked at, and not by what failed
	switch {
	case !wasStopped:
		return verb, err
	case now.triggered:
		return "", nil
	}
	return "start", act(hard, name, u.is["Id"], "start")
}

// loadUnit asks systemd for a unit, after a daemon-reload where systemd may not know its files of today.
func loadUnit(ctx context.Context, name string, reload bool) (unit, error) {
	u, err := showUnit(ctx, name)
	// NeedDaemonReload alone doesn't tell: it stays no when the file mounted in place of the loaded one is
	// older, and for a unit that was just installed, or that a generator makes.
	isStale := u.says("NeedDaemonReload", "yes") || !u.says("LoadState", "loaded", "masked")
	if err != nil || !isStale && !reload {
		return u, err
	}
	if err := daemonReload(ctx); err != nil {
		return u, err
	}
	return showUnit(ctx, name)
}

// isDisabled says whether the unit is a template's instance that is to be enabled.
func isDisabled(name string, u *unit) bool {
	return strings.Contains(name, "@") && u.says("UnitFileState", "disabled")
}

// verbFor is the systemctl verb that makes u run with today's files: action where that can be done.
func verbFor(u *unit, action string) (string, error) {
	oneshot := u.says("Type", "oneshot")
	restarts := slices.Contains([]string{"restart", "try-restart"}, action)
	switch {
	case action == "stop":
		return action, nil
	case oneshot && action == "restart": // it may be at work on the old files
		return action, nil
	case !u.running():
		return "start", nil
	case restarts && u.says("CanStop", "no"):
		return "", fmt.Errorf(`%s can't be stopped: use action = "reload"`, u.is["Id"])
	case oneshot && action == "kill": // there is no process
		return "restart", nil
	case action != "reload", u.says("CanReload", "yes"): // others than reload know themselves what a unit can
		return action, nil
	case oneshot:
		return "restart", nil
	}
	return "", fmt.Errorf(`%s can't be reloaded: use action = "restart"`, u.is["Id"])
}

// acting is for units that are told at the same time: each systemctl that waits for a job hears of all jobs.
var acting = crowd{room: make(chan struct{}, 4)}

// act gives systemd a verb for a unit and counts it. Where it fails, the unit's last words are in the error.
func act(ctx context.Context, name, id, verb string) error {
	start := time.Now()
	_, err := systemctl(ctx, actionLimit, verb, "--", name)
	result := "ok"
	if err != nil {
		result = "failed"
		err = fmt.Errorf("%w%s", err, lastWords(ctx, id, start))
		err = cmp.Or(cancelJob(ctx, name), err)
	}

	l := labels("service", name, "result", result)
	count.add("gitopper_service_actions_total", l)
	count.addFloat("gitopper_service_action_seconds_total", l, time.Since(start).Seconds())
	return err
}

// cancelJob ends what a systemctl that was ended or failed may have left running in systemd, so that the next
// job does not wait behind it. It is errShutdown where the job is that of the shutdown.
func cancelJob(ctx context.Context, name string) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
	defer cancel()

	u, err := showUnit(ctx, name)
	if errors.Is(err, errShutdown) {
		return err
	}
	if job, _, _ := strings.Cut(u.is["Job"], " "); job != "" {
		_, _ = systemctl(ctx, localLimit, "cancel", job)
	}
	return nil
}

// lastWords returns what the unit's processes last said to the journal since start, and what systemd said of
// their end: private, ready to be put behind an error.
func lastWords(ctx context.Context, id string, start time.Time) string {
	const processExit = "MESSAGE_ID=98e322203f7a4ed290d09fe03c09fe15" // see journalctl --dump-catalog
	since := fmt.Sprintf("--since=@%.6f", float64(start.UnixMicro())/1e6)
	cmd := exec.Command("journalctl", "-q", "--no-pager", "-o", "cat", "-n", "5", since,
		"_SYSTEMD_UNIT="+id, "+", "_PID=1", "UNIT="+id, processExit)
	out, err := execute(ctx, program{name: "journalctl", cmd: cmd, limit: 10 * time.Second})
	words := redact(unmark(oneLine(string(out))))
	if err != nil || words == "" {
		return ""
	}
	return quote(" (journal: " + words + ")")
}

func systemctl(ctx context.Context, limit time.Duration, args ...string) ([]byte, error) {
	name := "systemctl " + args[0]
	if len(args) == 3 { // verb, --, unit
		name += " " + args[2]
	}
	cmd := exec.Command("systemctl", append([]string{"--no-ask-password", "--no-pager"}, args...)...)
	return execute(ctx, program{name: name, cmd: cmd, limit: limit})
}

// settle watches a unit for the time given after an action and returns an error as soon as it is not up, or
// restarts by itself. A unit that is killed may be down, and come back, until the time is over. It looks at
// intervals that grow to a second: restarts between two looks show at the next one.
func settle(ctx context.Context, name, action string, watch time.Duration) (u unit, err error) {
	start, wait := time.Now(), time.Duration(0)
	if action == "kill" {
		watch = max(watch, time.Second) // time to end, and to come back
		wait = watch
	}
	for before := (unit{}); ; before = u {
		select {
		case <-time.After(min(wait, watch-time.Since(start))):
		case <-ctx.Done():
			return u, ctx.Err()
		}
		last := time.Since(start) >= watch
		if u, err = showUnit(ctx, name); err != nil {
			return u, err
		}

		again := u.restartedSince(&before)
		if again {
			u.is["SubState"] += ", restarted by systemd"
		}
		if again || !u.well(action) {
			return u, errors.New(u.describe() + lastWords(ctx, u.is["Id"], start.Add(-time.Second)))
		}
		if last {
			return u, nil
		}
		wait = max(100*time.Millisecond, min(2*wait, time.Second))
	}
}

// restartedSince says whether the unit restarted by itself since it was as before (the zero unit: not known).
// One of Type=simple counts as active the moment it is started: a crash loop shows by this alone.
func (u *unit) restartedSince(before *unit) bool {
	counted := !before.says("NRestarts", "", u.is["NRestarts"])
	// What starts a unit that was down, or a oneshot, is no crash, but a socket or timer.
	ran := before.running() && !u.says("Type", "oneshot")
	return counted || ran && !u.says("InvocationID", before.is["InvocationID"], "") // empty: it is down
}

// seesOld says whether the unit's main process, in a mount namespace of its own, does not see the file or
// directory that local shows on the host.
func (u *unit) seesOld(local string) bool {
	host, err1 := os.Stat(local)
	inside, err2 := os.Stat("/proc/" + u.is["MainPID"] + "/root" + local) // none where the PID is 0
	return errors.Join(err1, err2) == nil && !os.SameFile(host, inside)
}

// unitDir matches a directory of units, as in systemd.unit(5), what is in it, and what it is in.
var unitDir = regexp.MustCompile(`^/(etc|run|(usr/(local/)?)?lib)/systemd(/system(/.*)?)?$`)

// forgetUnits has systemd forget the units that lay where mounts were taken away.
func forgetUnits(ctx context.Context, gone []string) error {
	if !slices.ContainsFunc(gone, unitDir.MatchString) {
		return nil
	}
	return daemonReload(ctx)
}

// notify tells systemd of our own state, as sd_notify(3) describes it; without systemd it does nothing.
func notify(socket, state string) {
	c, err := net.Dial("unixgram", socket)
	if err != nil {
		return
	}
	defer c.Close()
	_, _ = c.Write([]byte(state))
}

// feedWatchdog tells systemd so often that all loops turn, as long as they do; where it wants no word, never.
func (a *agent) feedWatchdog(often time.Duration) {
	if often == 0 {
		return
	}
	for tick := time.Tick(often); ; {
		select {
		case <-a.stop.soft.Done():
			return
		case <-tick:
			if len(healthy(*a.services.Load())) == 0 {
				notify(a.socket, "WATCHDOG=1")
			}
		}
	}
}

// sinceBoot is CLOCK_MONOTONIC, by which systemd dates what units do. See clock_gettime(2).
func sinceBoot() time.Duration {
	const monotonic = 1
	var now syscall.Timespec
	_, _, _ = syscall.Syscall(syscall.SYS_CLOCK_GETTIME, monotonic, uintptr(unsafe.Pointer(&now)), 0)
	return time.Duration(now.Nano())
}

// bootID identifies this boot of the host. See random(4).
var bootID = sync.OnceValue(func() string {
	id, _ := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(id))
})

//go:embed testdata/gitopper.service
var unitTemplate string

var (
	execStart    = regexp.MustCompile(`(?m)^ExecStart=.*$`)
	configOption = regexp.MustCompile(`^--?(c|config)(=|$)`)
	plainWord    = regexp.MustCompile(`^[\w@%+=:,./-]+$`)
)

// unitFile returns a systemd unit that runs the binary exe with these options, or those of the template. It
// has none of the sandboxing that gives a unit a mount namespace of its own (systemd.exec(5): "will
// disconnect propagation of mounts"), for our mounts are meant for the host.
func unitFile(exe string, options []string) string {
	if len(options) == 0 {
		options = []string{"-r"}
	}
	if !slices.ContainsFunc(options, configOption.MatchString) {
		options = append(slices.Clone(options), "-c", "/etc/gitopper/config.toml")
	}

	command := unitWord(exe, "$") // the program's own path is not looked through for variables
	for _, o := range options {
		command += " " + unitWord(o, "$$")
	}
	return execStart.ReplaceAllLiteralString(unitTemplate, "ExecStart="+command)
}

// unitWord writes a word of a command line as systemd.service(5) reads it; dollar is what it takes for a $.
func unitWord(word, dollar string) string {
	if !plainWord.MatchString(word) {
		word = strconv.Quote(word)
	}
	return strings.NewReplacer("%", "%%", "$", dollar).Replace(word)
}
