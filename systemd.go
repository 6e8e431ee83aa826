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

// unit is what systemd knows of a unit, in the words of systemctl show. One that lookUnits found active has
// no more than its ID and states.
type unit struct {
	ID, LoadState, LoadError, ActiveState, SubState, Result, Type string
	NeedDaemonReload, CanReload                                   string // yes or no
	InvocationID, NRestarts, MainPID                              string
	ExecMainCode, ExecMainStatus                                  string // see waitid(2); status or signal
	Job                                                           string // number and path; empty: none
	UnitFileState                                                 string // enabled, disabled, static and so on
	TriggeredBy                                                   []string

	triggered bool          // one of TriggeredBy is active
	since     time.Duration // CLOCK_MONOTONIC when it last became active in this boot; 0: it did not
	at        time.Time     // when systemd was asked
}

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

	units := make([]unit, len(names))
	var others []string
	for i, name := range names {
		units[i] = active[ids[name]]
		if units[i].ID == "" {
			others = append(others, name)
		}
	}
	shown, err := show(ctx, others...)
	if err != nil {
		return nil, err
	}

	isActive := func(name string) bool { return active[name].ID != "" }
	for i, name := range names {
		if units[i].ID == "" {
			u := shown[0]
			shown = shown[1:]
			u.triggered = u.down() && slices.ContainsFunc(u.TriggeredBy, isActive)
			units[i], ids[name] = u, u.ID
		}
	}
	return units, nil
}

// showUnit asks systemd for all that unit holds of one unit.
func showUnit(ctx context.Context, name string) (unit, error) {
	units, err := show(ctx, name)
	if err == nil && units[0].down() && len(units[0].TriggeredBy) > 0 {
		units, err = lookUnits(ctx, unitNames{}, name)
	}
	if err != nil {
		return unit{}, err
	}
	return units[0], nil
}

// listActive returns the active units that match one of the patterns, by name. It reads lines of name, load,
// active and sub state, job, if any, and description.
//
//	dbus.socket loaded active listening D-Bus System Message Bus Socket
func listActive(ctx context.Context, patterns []string) (map[string]unit, error) {
	now, active := time.Now(), map[string]unit{}
	args := []string{"list-units", "--full", "--plain", "--no-legend", "--state=active", "--"}
	out, err := systemctl(ctx, localLimit, append(args, patterns...)...)
	for line := range strings.Lines(string(out)) {
		f := strings.Fields(line)
		if len(f) >= 4 && f[2] == "active" {
			active[f[0]] = unit{ID: f[0], LoadState: f[1], ActiveState: f[2], SubState: f[3], at: now}
		}
	}
	return active, err
}

const shownProperties = "Id,LoadState,LoadError,ActiveState,SubState,Result,Type,NeedDaemonReload," +
	"CanReload,InvocationID,NRestarts,MainPID,ExecMainCode,ExecMainStatus,Job,TriggeredBy,UnitFileState," +
	enteredActive

const enteredActive = "ActiveEnterTimestampMonotonic" // in microseconds

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
	whole := !slices.ContainsFunc(units, func(u unit) bool { return u.ID == "" })
	if !whole || len(units) != len(names)+1 {
		return nil, fmt.Errorf("systemctl show: asked for %d units, got %q", len(names), out)
	}
	if shutdown := units[len(names)]; shutdown.running() || shutdown.Job != "" {
		return nil, errShutdown
	}
	return units[:len(names)], nil
}

// parseUnit reads what systemctl show prints of a unit.
//
//	Id=nginx.service
//	ActiveState=active
func parseUnit(block string) unit {
	p := map[string]string{}
	for line := range strings.SplitSeq(block, "\n") {
		key, value, _ := strings.Cut(line, "=")
		p[key] = value
	}
	microseconds, _ := strconv.ParseInt(p[enteredActive], 10, 64)
	return unit{
		ID: p["Id"], LoadState: p["LoadState"], LoadError: p["LoadError"], Type: p["Type"],
		ActiveState: p["ActiveState"], SubState: p["SubState"], Result: p["Result"],
		NeedDaemonReload: p["NeedDaemonReload"], CanReload: p["CanReload"], Job: p["Job"],
		InvocationID: p["InvocationID"], NRestarts: p["NRestarts"], MainPID: p["MainPID"],
		ExecMainCode: p["ExecMainCode"], ExecMainStatus: p["ExecMainStatus"],
		TriggeredBy: strings.Fields(p["TriggeredBy"]), UnitFileState: p["UnitFileState"],
		since: time.Duration(microseconds) * time.Microsecond,
	}
}

// down says whether the unit neither runs nor is on its way to.
func (u *unit) down() bool { return u.ActiveState == "inactive" || u.ActiveState == "failed" }

// running says whether the unit is there to be told of changed files.
func (u *unit) running() bool { return u.ActiveState == "active" || u.ActiveState == "reloading" }

// stopped says whether the unit was stopped, or ended by itself, without a failure and for now.
func (u *unit) stopped() bool {
	isWell := u.Result == "success" && u.Job == ""
	return u.ActiveState == "inactive" && isWell
}

// up says whether a unit runs as it should: active; or a oneshot that ended well; or waiting to be triggered.
func (u *unit) up() bool {
	oneshot := u.Type == "oneshot"
	switch u.ActiveState {
	case "inactive":
		return u.triggered || oneshot && u.Result == "success"
	case "activating":
		return oneshot && u.SubState != "auto-restart" // its timer or socket has it at work
	}
	return u.running()
}

// well is up for a unit that action is done to: one that is to be stopped is well when it is down.
func (u *unit) well(action string) bool {
	if action == "stop" {
		return u.ActiveState == "inactive"
	}
	return u.up()
}

// describe gives systemd's words for a unit that isn't well.
func (u *unit) describe() string {
	switch u.LoadState {
	case "loaded":
	case "not-found":
		return fmt.Sprintf("unit %s does not exist: name the package that brings it, or mend service", u.ID)
	default:
		_, why, _ := strings.Cut(u.LoadError, " ") // org.freedesktop.systemd1.UnitMasked "Unit x is masked."
		return fmt.Sprintf("unit %s is %s: %s", u.ID, u.LoadState, why)
	}

	s := fmt.Sprintf("unit %s is %s (%s", u.ID, u.ActiveState, u.SubState)
	if u.Result != "" && u.Result != "success" {
		s += ", " + u.Result
	}
	switch status := u.ExecMainStatus; {
	case u.ExecMainCode == "2", u.ExecMainCode == "3": // CLD_KILLED and CLD_DUMPED of waitid(2)
		s += ", main process killed by " + signalName(status)
	case status != "" && status != "0":
		s += ", main process ended with status " + status
	}
	return s + ")"
}

// The names of signal(7) by number; a few architectures have others.
const signalNames = "0 HUP INT QUIT ILL TRAP ABRT BUS FPE KILL USR1 SEGV USR2 PIPE ALRM TERM STKFLT CHLD " +
	"CONT STOP TSTP TTIN TTOU URG XCPU XFSZ VTALRM PROF WINCH IO PWR SYS"

func signalName(number string) string {
	for n, name := range strings.Fields(signalNames) {
		if strconv.Itoa(n) == number {
			return "SIG" + name
		}
	}
	return "signal " + number
}

// reloadLock keeps daemon-reload alone: systemd does it for the whole host.
var reloadLock = make(chan struct{}, 1)

// daemonReload makes systemd read its unit files again.
func daemonReload(ctx context.Context) error {
	select {
	case reloadLock <- struct{}{}:
		defer func() { <-reloadLock }()
	case <-ctx.Done():
		return ctx.Err()
	}
	_, err := systemctl(ctx, localLimit, "daemon-reload")
	return err
}

// tell makes a unit take notice of changed files: daemon-reload if needed, enable for a template instance,
// reset-failed, then action, or start if it is not up. reload says that something changed at or below a
// directory of units. It returns the verb that systemd was given, none for a unit that waits to be triggered.
func tell(ctx context.Context, name, action string, reload bool, step func(string)) (verb string, err error) {
	u, err := loadUnit(ctx, name, reload)
	if err != nil {
		return "", err
	}
	if u.LoadState != "loaded" {
		return "", errors.New(u.describe())
	}
	if err := enable(ctx, name); err != nil {
		return "", err
	}
	if u.ActiveState == "reloading" { // an action of ours was killed, and the next would wait behind it
		_ = cancelJob(ctx, name)
	}
	if u.ActiveState == "failed" || u.SubState == "auto-restart" {
		if _, err := systemctl(ctx, localLimit, "reset-failed", "--", name); err != nil {
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
	return verb, act(ctx, name, u.ID, verb)
}

// loadUnit asks systemd for a unit, after a daemon-reload where systemd may not know its files of today.
func loadUnit(ctx context.Context, name string, reload bool) (unit, error) {
	u, err := showUnit(ctx, name)
	// NeedDaemonReload alone doesn't tell: it stays no when the file mounted in place of the loaded one is
	// older, and for a unit that was just installed, or that a generator makes.
	known := u.LoadState == "loaded" || u.LoadState == "masked"
	stale := reload || u.NeedDaemonReload == "yes" || !known
	if err != nil || !stale {
		return u, err
	}
	if err := daemonReload(ctx); err != nil {
		return u, err
	}
	return showUnit(ctx, name)
}

// enable makes an instance of a template start at boot, if nobody decided otherwise.
func enable(ctx context.Context, name string) error {
	if !isDisabled(ctx, name) {
		return nil
	}
	_, err := systemctl(ctx, localLimit, "enable", "--", name)
	return err
}

// isDisabled says whether a template's instance is to be enabled.
func isDisabled(ctx context.Context, name string) bool {
	if !strings.Contains(name, "@") {
		return false
	}
	out, _ := systemctl(ctx, localLimit, "is-enabled", "--", name) // its exit status only repeats the word
	return strings.TrimSpace(string(out)) == "disabled"
}

// verbFor is the systemctl verb that makes u run with today's files: action where that can be done.
func verbFor(u *unit, action string) (string, error) {
	oneshot := u.Type == "oneshot"
	switch {
	case action == "stop":
		return action, nil
	case oneshot && action == "restart": // it may be at work on the old files
		return action, nil
	case !u.running():
		return "start", nil
	case oneshot && action == "kill": // there is no process
		return "restart", nil
	case action != "reload" || u.CanReload == "yes": // others than reload know themselves what a unit can
		return action, nil
	case oneshot:
		return "restart", nil
	}
	return "", fmt.Errorf(`%s can't be reloaded: use action = "restart"`, u.ID)
}

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
	if job, _, _ := strings.Cut(u.Job, " "); job != "" {
		_, _ = systemctl(ctx, localLimit, "cancel", job)
	}
	return nil
}

// lastWords returns what the unit's processes last said to the journal since start (in whole seconds),
// private, ready to be put behind an error. What systemd said of the unit is in its properties.
func lastWords(ctx context.Context, id string, start time.Time) string {
	since := "@" + strconv.FormatInt(start.Unix(), 10)
	args := []string{"-q", "--no-pager", "-o", "cat", "-n", "4", "--since", since, "_SYSTEMD_UNIT=" + id}
	cmd := exec.Command("journalctl", args...)
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
			u.SubState += ", restarted by systemd"
		}
		if again || !u.well(action) {
			return u, errors.New(u.describe() + lastWords(ctx, u.ID, start.Add(-time.Second)))
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
	counted := before.NRestarts != "" && u.NRestarts != before.NRestarts
	// What starts a unit that was down, or a oneshot, is no crash, but a socket or timer.
	ran := before.running() && u.Type != "oneshot"
	return counted || ran && u.InvocationID != before.InvocationID
}

// seesOld says whether the unit's main process, in a mount namespace of its own, does not see the file or
// directory that local shows on the host.
func (u *unit) seesOld(local string) bool {
	host, err1 := os.Stat(local)
	inside, err2 := os.Stat("/proc/" + u.MainPID + "/root" + local) // none where the PID is 0
	return errors.Join(err1, err2) == nil && !os.SameFile(host, inside)
}

// Directories of units, as in systemd.unit(5).
const unitDirs = "/etc/systemd/system /run/systemd/system /usr/local/lib/systemd/system " +
	"/usr/lib/systemd/system /lib/systemd/system"

// inUnitDir says whether local is, is in, or is around a directory of systemd units.
func inUnitDir(local string) bool {
	if local == "" {
		return false
	}
	return slices.ContainsFunc(strings.Fields(unitDirs), func(d string) bool {
		return strings.HasPrefix(local+"/", d+"/") || strings.HasPrefix(d, local+"/")
	})
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
