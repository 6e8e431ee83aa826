// Gitopper brings GitOps to plain Linux hosts. For each service in its config it
//
//  1. installs the service's package if it is missing (pkg.go),
//  2. looks at upstream, and fetches what moved into a bare clone that all services of an upstream share (git.go),
//  3. reads from it, by their hashes, the files that a commit shows the service: a tree (git.go),
//  4. decides which commit should run, and refuses one that must not (service.go, check.go),
//  5. compares that tree with the disk and with the manifest of what it put there, makes the difference live path by
//     path, and keeps local edits (files.go),
//  6. bind-mounts files and directories to where the service reads them (mount.go),
//  7. tells the unit, and watches it settle (systemd.go), or goes back to the last good commit (service.go), and
//  8. says how it went (state.go), to operators (ssh.go) and to a monitoring system (metrics.go).
//
// Reading order: run in this file, then Service.run, then Service.reconcile in service.go, which does the above in that
// order; then files.go, which is how a file on the host changes.
package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"path"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"gitopper/ctl"
)

func main() {
	os.Exit(run(os.Args, os.Stdout, os.Stderr))
}

const usage = `usage: gitopper [OPTION]... -c CONFIG           the daemon
       gitopper --check -c CONFIG               read the config, print every mistake, and exit
       gitopper ctl [OPTION]... COMMAND...      the client; see gitopper ctl --help
       gitopper --help | --version
       gitopper --unit [OPTION]...              print a systemd unit that runs this binary with these options

  -h, --hosts LIST      names (comma-separated, may be repeated) to answer to; the hostname is always added
  -c, --config FILE     config file, mandatory
  -s, --ssh ADDR        address of the SSH interface (default ":2222"); empty turns it off
  -m, --metric ADDR     address of the HTTP interface (default ":9222"); empty turns it off
  -k, --hostkey FILE    private host key of the SSH interface (default: made once, in the state directory)
  -d, --debug           log every command that is run
  -r, --restart         when the config changed, end with status 2 so that systemd starts us anew
  -o, --root            insist on root (default true)
  -t, --duration D      time between looks at upstream, plus a random part of up to half of it (default 5m)
      --once            one pass over all services, a line for each, then end: 0 if all are OK or FREEZE, else 1
      --check           read the config, print every mistake, and exit

bootstrapping, with the config in a repository:
  -U, --upstream URL    repository to take the config from
  -D, --directory DIR   directory in that repository (default "gitopper")
  -B, --branch NAME     branch (default "main")
  -M, --mount DIR       where the checkout goes: DIR/gitopper; -c is then relative to the checked out directory
  -P, --pull            bring an existing checkout up to date before reading the config

Exit status: 0 normal end, 1 error, 2 SIGHUP seen or, with -r, a new config.
`

// mode is what the program is to do: the name of the option that asks for it; empty is the daemon.
type mode string

const (
	onceMode    mode = "once"
	checkMode   mode = "check"
	unitMode    mode = "unit"
	versionMode mode = "version"
	helpMode    mode = "help"
)

// options are what the command line asks for.
type options struct {
	mode                               mode
	names                              []string // to answer to, the hostname first
	config, ssh, metric, hostkey       string
	interval                           time.Duration
	debug, restart, root               bool
	upstream, directory, branch, mount string
	pull                               bool
	given                              []string // for --unit: the other options, as words of a command line
	stateDir                           string
}

// configPath is where the config file lies: with -U below our own checkout.
func (o *options) configPath() string {
	if o.upstream == "" {
		return o.config
	}
	return filepath.Join(o.mount, "gitopper", o.directory, o.config)
}

// ownSpec is the service gitopper of a bootstrap: the directory of the repository that holds our config. It is root's.
func (o *options) ownSpec() spec {
	return spec{
		upstream: o.upstream, branch: o.branch, mount: filepath.Clean(o.mount), machine: o.names[0], service: "gitopper",
		dirs: []dir{{link: path.Clean(o.directory)}}, fallback: true,
	}
}

func parseOptions(args []string) (o options, err error) {
	host, err := os.Hostname()
	if err != nil {
		return o, err
	}
	o.names = []string{host}
	// systemd makes and names the state directory. Several could be listed; ours is the first.
	o.stateDir, _, _ = strings.Cut(os.Getenv("STATE_DIRECTORY"), ":")
	o.stateDir = cmp.Or(o.stateDir, "/var/lib/gitopper")

	fl := o.flags()
	if err := fl.Parse(args); err != nil {
		return o, fmt.Errorf("%w: see gitopper --help", err)
	}
	if fl.NArg() > 0 {
		return o, fmt.Errorf("unexpected argument %q: see gitopper --help", fl.Arg(0))
	}
	for _, file := range []*string{&o.config, &o.hostkey} {
		isOurs := file == &o.config && o.upstream != "" // relative to the checkout
		if *file != "" && !isOurs {
			*file, _ = filepath.Abs(*file)
		}
	}

	fl.Visit(func(f *flag.Flag) {
		word := "--" + f.Name
		if len(f.Name) == 1 {
			word = "-" + f.Name
		}
		value := f.Value.String()
		switch b, ok := f.Value.(interface{ IsBoolFlag() bool }); {
		case f.Name == string(unitMode):
		case !ok || !b.IsBoolFlag():
			o.given = append(o.given, word, value)
		case value == "true":
			o.given = append(o.given, word)
		default:
			o.given = append(o.given, word+"="+value)
		}
	})
	return o, o.judge()
}

// hostList is the flag.Value of --hosts: names after the first one, which is the hostname.
type hostList struct{ names *[]string }

func (h hostList) String() string {
	if h.names == nil {
		return ""
	}
	return strings.Join((*h.names)[1:], ",")
}

func (h hostList) Set(list string) error {
	for name := range strings.SplitSeq(list, ",") {
		if name = strings.TrimSpace(name); name != "" && !slices.Contains(*h.names, name) {
			*h.names = append(*h.names, name)
		}
	}
	return nil
}

// modeFlag is the flag.Value of an option that says what the program is to do.
type modeFlag struct {
	mode mode
	to   *mode
}

func (m modeFlag) IsBoolFlag() bool { return true }
func (m modeFlag) String() string   { return strconv.FormatBool(m.to != nil && *m.to == m.mode) }

func (m modeFlag) Set(value string) error {
	is, err := strconv.ParseBool(value)
	if err != nil || !is {
		return err
	}
	if *m.to != "" && *m.to != m.mode {
		return fmt.Errorf("--%s and --%s don't go together", *m.to, m.mode)
	}
	*m.to = m.mode
	return nil
}

// flags returns the options as flags that set o.
func (o *options) flags() *flag.FlagSet {
	fl := flag.NewFlagSet("gitopper", flag.ContinueOnError)
	fl.SetOutput(io.Discard)
	fl.Var(hostList{&o.names}, "hosts", "")
	fl.StringVar(&o.config, "config", "", "")
	fl.StringVar(&o.ssh, "ssh", ":2222", "")
	fl.StringVar(&o.metric, "metric", ":9222", "")
	fl.StringVar(&o.hostkey, "hostkey", "", "")
	fl.BoolVar(&o.debug, "debug", false, "")
	fl.BoolVar(&o.restart, "restart", false, "")
	fl.BoolVar(&o.root, "root", true, "")
	fl.DurationVar(&o.interval, "duration", 5*time.Minute, "")
	fl.StringVar(&o.upstream, "upstream", "", "")
	fl.StringVar(&o.directory, "directory", "gitopper", "")
	fl.StringVar(&o.branch, "branch", "main", "")
	fl.StringVar(&o.mount, "mount", "", "")
	fl.BoolVar(&o.pull, "pull", false, "")
	for short, long := range map[string]string{
		"h": "hosts", "c": "config", "s": "ssh", "m": "metric", "k": "hostkey", "d": "debug", "r": "restart", "o": "root",
		"t": "duration", "U": "upstream", "D": "directory", "B": "branch", "M": "mount", "P": "pull",
	} {
		fl.Var(fl.Lookup(long).Value, short, "")
	}
	for _, m := range []mode{onceMode, checkMode, unitMode, versionMode, helpMode} {
		fl.Var(modeFlag{m, &o.mode}, string(m), "")
	}
	return fl
}

// judge finds what does not go together.
func (o *options) judge() error {
	for option, addr := range map[string]string{"--ssh": o.ssh, "--metric": o.metric} {
		if _, port, err := net.SplitHostPort(addr); addr != "" && err != nil {
			return fmt.Errorf("%s: %w: it must be HOST:PORT or :PORT", option, err)
		} else if _, err := net.LookupPort("tcp", port); addr != "" && err != nil {
			return fmt.Errorf("%s: %w", option, err)
		}
	}
	isBootstrap := o.upstream != ""
	needsConfig := o.mode == "" || o.mode == onceMode || o.mode == checkMode
	switch {
	case o.mode == helpMode, o.mode == versionMode:
	case needsConfig && o.config == "":
		return errors.New("no config file: give one with -c; see gitopper --help")
	case o.interval <= 0:
		return fmt.Errorf("-t %v: must be more than 0", o.interval)
	case isBootstrap != (o.mount != ""):
		return errors.New("bootstrapping needs both -U, the repository, and -M, the directory for its checkout")
	case isBootstrap && path.IsAbs(o.config):
		return fmt.Errorf("-c %s: with -U it must be relative to the directory %s of the repository", o.config, o.directory)
	case o.pull && !isBootstrap:
		return errors.New("-P goes with -U")
	}
	return nil
}

// run is the program: it does what args ask for, and returns the exit status.
func run(args []string, stdout, stderr io.Writer) int {
	if len(args) > 1 && args[1] == checkChild {
		err := runCheckChild()
		_, _ = fmt.Fprint(os.NewFile(3, "status"), oneLine(err.Error()))
		return 1
	}

	ctx, stop := context.WithCancelCause(context.Background())
	defer stop(nil)
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	go func() {
		for sig := range signals {
			stop(ending{sig.String(), map[os.Signal]int{syscall.SIGHUP: 2}[sig]})
		}
	}()
	switch {
	case filepath.Base(args[0]) == "gitopperctl":
		return ctl.Main(ctx, args[1:], stdout, stderr)
	case len(args) > 1 && args[1] == "ctl":
		return ctl.Main(ctx, args[2:], stdout, stderr)
	}

	syscall.Umask(0o022)
	o, err := parseOptions(args[1:])
	if err == nil {
		err = o.mode.run(ctx, o, stdout, stderr)
	}
	if err != nil && ctx.Err() != nil {
		err = context.Cause(ctx) // whatever the signal made fail
	}
	if end, ok := errors.AsType[ending](err); ok {
		return end.status
	}
	if err == nil {
		return 0
	}
	for line := range strings.SplitSeq(redact(unmark(err.Error())), "\n") {
		fmt.Fprintf(stderr, "gitopper: %s\n", line)
	}
	return 1
}

func (m mode) run(ctx context.Context, o options, stdout, stderr io.Writer) error {
	var err error
	switch m {
	case helpMode:
		_, err = io.WriteString(stdout, usage)
	case versionMode:
		version, goVersion := buildInfo()
		_, err = fmt.Fprintf(stdout, "gitopper %s %s\n", version, goVersion)
	case unitMode:
		exe, exeErr := os.Executable()
		if exeErr != nil {
			return exeErr
		}
		_, err = io.WriteString(stdout, unitFile(exe, o.given))
	case checkMode:
		c, cerr := loadConfig(o, os.ReadFile)
		if cerr != nil {
			return cerr
		}
		for _, w := range c.warnings(o) {
			fmt.Fprintf(stderr, "gitopper: %s\n", w)
		}
	default:
		setLogger(stderr, o.debug)
		err = daemon(ctx, o, stdout)
	}
	return err
}

// ending is why the daemon ends without an error, and with which status.
type ending struct {
	why    string
	status int
}

func (e ending) Error() string { return e.why }

var errNotAll = errors.New("not all services are OK")

// agent is the running program.
type agent struct {
	options
	stop     stopping
	end      context.CancelCauseFunc // of stop.soft
	tasks    sync.WaitGroup          // all that ends with stop
	services atomic.Pointer[[]*Service]
	server   atomic.Pointer[sshServer]
	configOK atomic.Bool
	said     string        // what was last said of a wrong config
	socket   string        // of systemd, for words of ours; empty without
	watchdog time.Duration // systemd wants a word that often; 0: never
	started  time.Time
}

// daemon runs until ctx is done or, with --once, through one pass.
func daemon(ctx context.Context, o options, stdout io.Writer) error {
	if o.root && os.Geteuid() != 0 {
		return errors.New("must be run as root (or with --root=false, for debugging)")
	}
	unlock, err := lock(o.stateDir)
	if err != nil {
		return err
	}
	defer unlock()
	if os.Getenv("GOMEMLIMIT") == "" {
		debug.SetMemoryLimit(48 << 20) // a goal for the garbage collector, whatever strangers send us
	}

	a := &agent{options: o, socket: os.Getenv("NOTIFY_SOCKET"), started: time.Now()}
	microseconds, _ := strconv.ParseInt(os.Getenv("WATCHDOG_USEC"), 10, 64)
	a.watchdog = time.Duration(microseconds) * time.Microsecond
	for _, k := range []string{"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"} {
		os.Unsetenv(k) // not for the programs that we run
	}
	a.services.Store(&[]*Service{})
	a.configOK.Store(true)

	a.stop.soft, a.end = context.WithCancelCause(ctx)
	hard, kill := context.WithCancel(context.WithoutCancel(ctx))
	defer kill()
	a.stop.hard = hard
	context.AfterFunc(a.stop.soft, func() {
		notify(a.socket, "STOPPING=1")
		time.AfterFunc(10*time.Second, kill)
	})

	err = a.work(stdout)
	a.end(err) // what was started ends, too, whatever the error
	a.tasks.Wait()
	return err
}

// work mounts what is on disk, tells systemd that we are ready, and lets the services live until we are to end. Nothing is
// looked at or acted on before all mounts are made, but where there is no config to say which.
func (a *agent) work(stdout io.Writer) error {
	a.tasks.Go(a.feedWatchdog)
	a.tasks.Go(a.serveMetrics)
	c, err := a.firstConfig()
	if a.upstream != "" && (err != nil || a.pull) {
		c, err = a.bootstrap()
	}
	if err != nil {
		if a.stop.soft.Err() == nil {
			restoreMounts(a.stateDir)
		}
		return err
	}

	services, upstreams := a.assemble(c)
	a.mount(c, services, upstreams)
	for _, w := range c.warnings(a.options) {
		slog.Warn(w)
	}
	if err := gitVersion(a.stop.soft); err != nil {
		slog.Error(err.Error())
	}
	version, goVersion := buildInfo()
	slog.Info(fmt.Sprintf("gitopper %s (%s) manages %d services of %s", version, goVersion, len(services), a.config),
		"interval", a.interval, "ssh", a.ssh, "metric", a.metric)
	notify(a.socket, "READY=1\nSTATUS="+a.summary())
	if a.mode == onceMode {
		return a.onePass(services, upstreams, stdout)
	}

	ctx := a.stop.soft
	a.tasks.Go(func() { a.serveSSH(c, services) })
	a.tasks.Go(func() { a.watch(c) })
	a.tasks.Go(func() { watchUnits(ctx, services, a.interval) })
	for _, u := range upstreams {
		a.tasks.Go(func() { u.run(ctx, a.interval) })
	}
	for _, s := range services {
		a.tasks.Go(s.run)
	}
	<-ctx.Done()
	slog.Info(fmt.Sprintf("ending: %v", context.Cause(ctx)))
	return context.Cause(ctx)
}

// firstConfig returns the config to start with: what is on disk, or where that is wrong the one that was last right.
func (a *agent) firstConfig() (*config, error) {
	c, err := loadConfig(a.options, os.ReadFile)
	a.configOK.Store(err == nil)
	if err == nil {
		a.keep(c)
		return c, nil
	}
	kept, keptErr := loadKept(a.options)
	if keptErr != nil {
		return nil, err
	}
	a.said = err.Error()
	slog.Error(fmt.Sprintf("the config is wrong, the one that was last right is used: %s", oneLine(a.said)))
	return kept, nil
}

// keep remembers a right config for the next start.
func (a *agent) keep(c *config) {
	if err := c.keep(a.stateDir); err != nil {
		slog.Error(fmt.Sprintf("keep the config for the next start: %v", err))
	}
}

// bootstrap gets our own config from upstream, as often as it takes, and makes all mounts of before first.
func (a *agent) bootstrap() (*config, error) {
	sp := a.ownSpec()
	if found := sp.validate(a.stateDir, a.configPath()); len(found) > 0 {
		return nil, fmt.Errorf("bootstrap: %s", found[0].text)
	}
	restoreMounts(a.stateDir)
	ctx := a.stop.soft
	u := newUpstream(a.stateDir, a.upstream, "")
	own := a.newOwn(u)
	for wait := 5 * time.Second; ; wait = min(2*wait, a.interval) {
		lookErr := u.lookNow(ctx, false)
		own.pass(ctx)
		c, err := a.firstConfig()
		if err == nil {
			return c, nil
		}
		if st := own.Status(); lookErr != nil {
			err = lookErr
		} else if st.state >= stateBroken {
			err = errors.New(st.Info)
		}
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		if a.mode == onceMode {
			return nil, err
		}

		slog.Error(fmt.Sprintf("gitopper: waiting for a right config: %s", oneLine(err.Error())))
		if len(*a.services.Load()) == 0 {
			startCounters([]*Service{own})
			a.services.Store(&[]*Service{own})
			notify(a.socket, "READY=1\nSTATUS=waiting for a right config")
		}
		select {
		case <-ctx.Done():
		case <-time.After(wait):
		}
	}
}

// newOwn makes the service gitopper, whose commits must hold a right config.
func (a *agent) newOwn(u *upstream) *Service {
	own := newService(a.ownSpec(), a.stateDir, u, a.interval, a.stop)
	own.signers = own.rec.Signers // before there is a config, of the one that ran last
	own.gate = func(read func(string) ([]byte, error)) error {
		_, err := loadConfig(a.options, read)
		return err
	}
	return own
}

// assemble makes the services of the config, and the upstreams that they share.
func (a *agent) assemble(c *config) (services []*Service, upstreams []*upstream) {
	made := map[[2]string]*upstream{}
	get := func(url, user string) *upstream {
		k := [2]string{url, user}
		if made[k] == nil {
			made[k] = newUpstream(a.stateDir, url, user)
			upstreams = append(upstreams, made[k])
		}
		return made[k]
	}
	if a.upstream != "" {
		own := a.newOwn(get(a.upstream, ""))
		own.signers, own.rec.Signers = c.signers, c.signers
		if err := own.save(); err != nil {
			slog.Error(fmt.Sprintf("gitopper: %v", err))
		}
		services = append(services, own)
	}
	for _, sp := range c.services {
		services = append(services, newService(sp, a.stateDir, get(sp.upstream, sp.user), a.interval, a.stop))
	}
	for _, s := range services {
		s.files.nested = checkoutsIn(s.files.dir, services)
	}
	startCounters(services)
	a.services.Store(&services)
	return services, upstreams
}

// checkoutsIn returns the directories of services that lie in dir, as those do whose mount is another one's checkout.
func checkoutsIn(dir string, services []*Service) (inside []string) {
	for _, s := range services {
		if strings.HasPrefix(s.files.dir, dir+"/") {
			inside = append(inside, s.files.dir)
		}
	}
	return inside
}

// mount makes every local show what is on disk, and takes away the mounts and clones of services that left the config. A
// config without an entry for this machine takes nothing away: the machine may have another name today.
func (a *agent) mount(c *config, services []*Service, upstreams []*upstream) {
	if privateNamespace() {
		slog.Warn("we run in a mount namespace of our own: mounts may not reach the host and its units " +
			"(remove PrivateTmp=, ProtectSystem= and the like from the unit)")
	}
	if len(c.services) == 0 {
		restoreMounts(a.stateDir)
	} else {
		retireRecords(a.stateDir, services)
		a.tasks.Go(func() { retireUpstreams(a.stop.soft, a.stateDir, upstreams) })
	}
	mountFirst(a.stop.soft, services)
}

// onePass is --once: every service is looked at and brought to what it should be, side by side.
func (a *agent) onePass(services []*Service, upstreams []*upstream, stdout io.Writer) error {
	ctx := a.stop.soft
	var looks, passes sync.WaitGroup
	for _, u := range upstreams {
		looks.Go(func() { _ = u.lookNow(ctx, false) })
	}
	looks.Wait()
	for _, s := range services {
		passes.Go(func() { s.pass(ctx) })
	}
	passes.Wait()
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}

	var err error
	for _, s := range services {
		st := *s.Status()
		if l := s.up.looked(s.branch); st.state == stateOK && l.err != nil { // there is no second look that could tell
			st.State, st.Info, st.state = "DIFF", oneLine(unmark(l.err.Error())), stateDiff
		}
		fmt.Fprintln(stdout, strings.TrimSpace(fmt.Sprintf("%s %.8s %s %s", s.service, st.Commit, st.State, st.Info)))
		if st.state != stateOK && st.state != stateFreeze {
			err = errNotAll
		}
	}
	return err
}

// watch keeps systemd's status line, and notices a changed config: with -r a right one ends us, a wrong one is reported
// and the running one stays.
func (a *agent) watch(running *config) {
	path, seen, status := a.configPath(), running, ""
	for tick := time.Tick(2 * time.Second); ; {
		select {
		case <-a.stop.soft.Done():
			return
		case <-tick:
		}
		if s := a.summary(); s != status {
			status = s
			notify(a.socket, "STATUS="+s)
		}
		if a.configOK.Load() && !seen.changed() {
			continue
		}

		c, err := loadConfig(a.options, os.ReadFile)
		a.configOK.Store(err == nil)
		if err != nil {
			if err.Error() != a.said {
				a.said = err.Error()
				slog.Error(fmt.Sprintf("the new config is wrong, the running one stays: %s", oneLine(a.said)))
			}
			continue
		}
		if a.said != "" {
			slog.Info("the config is right again")
			a.said = ""
		}
		a.keep(c)
		isNews := c.files[path] != seen.files[path]
		seen = c
		switch {
		case c.files[path] == running.files[path]: // a change of key files is none of ours
		case a.restart:
			a.end(ending{"the config has changed", 2})
			return
		case isNews:
			slog.Warn("the config has changed: restart gitopper to use it (or run it with -r)")
		}
	}
}

// summary counts services by state and names those in trouble, for systemd's status line.
func (a *agent) summary() string {
	n, bad := map[string]int{}, ""
	for _, s := range *a.services.Load() {
		st := s.Status()
		n[st.State]++
		if st.state >= stateBroken {
			bad += " " + st.Service
		}
	}
	text := fmt.Sprintf("%d ok, %d frozen, %d in trouble", n["OK"], n["FREEZE"]+n["ROLLBACK"], n["BROKEN"]+n["DIFF"])
	if bad != "" {
		text += ":" + bad
	}
	if !a.configOK.Load() {
		text += "; the config is wrong"
	}
	return text
}

// configRight says whether neither the config nor a key file, on disk or upstream, is newer than what runs because it is
// wrong.
func (a *agent) configRight() bool {
	for _, s := range *a.services.Load() {
		if s.Status().Refused == "config" {
			return false
		}
	}
	server := a.server.Load()
	return a.configOK.Load() && (server == nil || server.keysOK())
}

// feedWatchdog tells systemd that all loops turn, as long as they do.
func (a *agent) feedWatchdog() {
	if a.watchdog == 0 {
		return
	}
	for tick := time.Tick(a.watchdog / 3); ; {
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

// serveMetrics serves the HTTP interface as soon as its port can be had.
func (a *agent) serveMetrics() {
	if l := a.listen("--metric", a.metric); l != nil {
		services := func() []*Service { return *a.services.Load() }
		serveMetrics(a.stop.soft, l, services, a.configRight, a.started)
	}
}

// serveSSH serves the SSH interface as soon as its host key and its port can be had.
func (a *agent) serveSSH(c *config, services []*Service) {
	if a.ssh == "" {
		return
	}
	hostKey := cmp.Or(a.hostkey, filepath.Join(a.stateDir, "ssh_host_ed25519_key"))
	a.persist(func() error {
		server, err := newSSHServer(hostKey, a.hostkey == "", c.keys, c.machines, a.names[0], services)
		if err == nil {
			a.server.Store(server)
		}
		return err
	})
	if l := a.listen("--ssh", a.ssh); l != nil {
		a.server.Load().serve(a.stop.soft, l)
	}
}

// listen takes a port as soon as it can be had. It returns nil where none is wanted, or when we are to end.
func (a *agent) listen(option, addr string) (l net.Listener) {
	if addr == "" || a.mode == onceMode {
		return nil
	}
	a.persist(func() (err error) {
		if l, err = net.Listen("tcp", addr); err != nil {
			return fmt.Errorf("%s: %w: give another address, or end what has this one; it is tried again", option, err)
		}
		return nil
	})
	return l
}

// persist tries something every few seconds until it works or we are to end, and logs each new error once.
func (a *agent) persist(try func() error) {
	said := ""
	for a.stop.soft.Err() == nil {
		err := try()
		if err == nil {
			return
		}
		if err.Error() != said {
			said = err.Error()
			slog.Error(said)
		}
		select {
		case <-a.stop.soft.Done():
		case <-time.After(3 * time.Second):
		}
	}
}

// lock makes us the only gitopper on a state directory, until the returned function is called or we end, however. Users'
// clones lie below the directory, so they may pass through it; they can't list it.
func lock(dir string) (unlock func(), err error) {
	if err := errors.Join(os.MkdirAll(dir, 0o711), os.Chmod(dir, 0o711)); err != nil {
		return nil, fmt.Errorf("state directory: %w", err)
	}
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("state directory: %w", err)
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		pid, _ := io.ReadAll(io.LimitReader(f, 20))
		_ = f.Close()
		return nil, fmt.Errorf("another gitopper, pid %s, works with %s: end that one first", bytes.TrimSpace(pid), dir)
	}
	err = f.Truncate(0)
	if err == nil {
		_, err = f.WriteAt(fmt.Appendln(nil, os.Getpid()), 0)
	}
	if err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("state directory: %w", err)
	}
	return func() { _ = f.Close() }, nil
}
