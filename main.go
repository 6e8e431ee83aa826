//go:build linux

// Gitopper brings GitOps to plain Linux hosts. For each service in its config it
//
//  1. installs the service's package if it is missing (pkg.go),
//  2. looks at upstream, and fetches what moved into a bare clone that its services share (git.go, clone.go),
//  3. reads from it, by their hashes, what a commit shows the service: a tree (tree.go),
//  4. decides which commit should run, and refuses one that must not (pass.go, check.go),
//  5. compares that tree with the disk and with the manifest of what it put there (files.go, manifest.go),
//     makes the difference live path by path, and keeps local edits (publish.go),
//  6. bind-mounts files and directories to where the service reads them (mount.go),
//  7. tells the unit, and watches it settle (systemd.go), or goes back to the last good commit (pass.go), and
//  8. says how it went (state.go): to operators (ssh.go, operator.go) and to a monitoring system
//     (metrics.go).
//
// Reading order: run in this file, then Service.run in service.go, then Service.reconcile in pass.go, which
// does the above in that order; then files.go and publish.go, which are how a file on the host changes.
package main

import (
	"cmp"
	"context"
	_ "embed"
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

// run is the program: it does what args ask for, and returns the exit status.
func run(args []string, stdout, stderr io.Writer) int {
	program, first := filepath.Base(args[0]), ""
	if len(args) > 1 {
		first = args[1]
	}
	if first == checkChild {
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
	case program == "gitopperctl":
		return ctl.Main(ctx, args[1:], stdout, stderr)
	case first == "ctl":
		return ctl.Main(ctx, args[2:], stdout, stderr)
	}

	syscall.Umask(0o022)
	o, err := parseOptions(args[1:])
	if err == nil {
		err = o.run(ctx, stdout, stderr)
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

// run does what the options ask for.
func (o options) run(ctx context.Context, stdout, stderr io.Writer) error {
	version, goVersion := ctl.Version()
	text, isText := map[mode]string{
		helpMode: usage, alertsMode: alertRules, dashboardMode: dashboard,
		versionMode: fmt.Sprintf("gitopper %s %s\n", version, goVersion),
	}[o.mode]
	if isText {
		_, err := io.WriteString(stdout, text)
		return err
	}
	if err := o.validate(); err != nil {
		return err
	}

	switch isRoot := os.Geteuid() == 0; {
	case o.mode == unitMode:
		exe, err := os.Executable()
		if err == nil {
			_, err = io.WriteString(stdout, unitFile(exe, o.given))
		}
		return err
	case o.mode == checkMode:
		return o.check(ctx, stderr)
	case o.root && !isRoot:
		return errors.New("must be run as root (or with --root=false, for debugging)")
	case o.mode == dryMode:
		return dryRun(ctx, o, stdout, stderr)
	}
	setLogger(stderr, o.level)
	return daemon(ctx, o, stdout)
}

// ending is why the daemon ends without an error, and with which status.
type ending struct {
	why    string
	status int
}

func (e ending) Error() string { return e.why }

// agent is the running program.
type agent struct {
	options
	stop     stopping
	end      context.CancelCauseFunc // of stop.soft
	tasks    sync.WaitGroup          // all that ends with stop
	services atomic.Pointer[[]*Service]
	server   atomic.Pointer[sshServer]
	right    *config                // the last one that was right; nil: there was none yet
	wrong    atomic.Pointer[string] // what is wrong with the config on disk; nil: nothing
	retried  atomic.Int32           // how many things persist is at that failed
	socket   string                 // of systemd, for words of ours; empty without
}

// daemon runs until ctx is done or, with --once, through one pass.
func daemon(ctx context.Context, o options, stdout io.Writer) error {
	unlock, err := lock(o.stateDir)
	if err != nil {
		return err
	}
	defer unlock()
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(50) // a fifth less memory with a thousand services
	}
	if os.Getenv("GOMEMLIMIT") == "" {
		debug.SetMemoryLimit(48 << 20) // a goal for the garbage collector, whatever strangers send us
	}

	a := &agent{options: o, socket: os.Getenv("NOTIFY_SOCKET")}
	watchdog, _ := strconv.ParseInt(os.Getenv("WATCHDOG_USEC"), 10, 64)
	for _, k := range []string{"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"} {
		os.Unsetenv(k) // not for the programs that we run
	}
	a.services.Store(&[]*Service{})

	a.stop.soft, a.end = context.WithCancelCause(ctx)
	hard, kill := context.WithCancel(context.WithoutCancel(ctx))
	defer kill()
	a.stop.hard = hard
	context.AfterFunc(a.stop.soft, func() {
		notify(a.socket, "STOPPING=1")
		time.AfterFunc(10*time.Second, kill)
	})

	a.tasks.Go(func() { a.feedWatchdog(time.Duration(watchdog) * time.Microsecond / 3) })
	err = a.work(stdout)
	a.end(err) // what was started ends, too, whatever the error
	a.tasks.Wait()
	if err != nil && ctx.Err() != nil {
		err = context.Cause(ctx) // whatever the signal made fail
	}
	return err
}

// work mounts what is on disk, tells systemd that we are ready, and lets the services live until we are to
// end. Nothing is looked at or acted on before all mounts are made.
func (a *agent) work(stdout io.Writer) error {
	started := time.Now()
	a.tasks.Go(func() { a.serveMetrics(started) })
	c, err := a.load()
	if c == nil || a.pull {
		restoreMounts(a.stateDir) // there is no config yet to say which
		if a.upstream != "" {
			c, err = a.bootstrap()
		}
	}
	if c == nil {
		return err
	}

	services, upstreams := a.assemble(c, a.stateDir)
	gone := a.mount(c, services, upstreams)
	for _, w := range c.warnings(a.options) {
		slog.Warn(w)
	}
	version, _ := ctl.Version()
	of := number(len(services), "service") + " of " + a.config
	slog.Info(fmt.Sprintf("gitopper %s manages %s", version, of),
		"interval", a.interval, "ssh", a.ssh, "metric", a.metric)
	notify(a.socket, "READY=1\nSTATUS="+a.summary())
	a.tasks.Go(func() {
		if err := forgetUnits(a.stop.hard, gone); err != nil {
			slog.Warn(err.Error())
		}
	})
	a.tasks.Go(func() { askGit(a.stop.soft, upstreams) })
	if a.mode == onceMode {
		return a.onePass(services, upstreams, stdout)
	}

	ctx := a.stop.soft
	a.tasks.Go(func() { a.serveSSH(c, services) })
	a.tasks.Go(a.watch)
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

// load reads the config. A right one is remembered, also for the next start; of a wrong one what is new to us
// is logged, and the last right one is returned with the error: nil, and not logged, if there never was one.
func (a *agent) load() (*config, error) {
	said := a.wrong.Load()
	c, err := loadConfig(a.options, os.ReadFile)
	if err == nil {
		a.right = c
		if a.wrong.Store(nil); said != nil {
			slog.Info("the config is right again")
		}
		if err := c.keep(a.stateDir); err != nil {
			slog.Error(fmt.Sprintf("keep the config for the next start: %v", err))
		}
		return c, nil
	}

	text := oneLine(err.Error())
	a.wrong.Store(&text)
	if a.right == nil {
		a.right, _ = loadKept(a.options)
	}
	isNews := said == nil || *said != text
	if a.right != nil && isNews {
		slog.Error("the config is wrong, the one that was last right is used: " + text)
	}
	return a.right, err
}

// bootstrap gets our own config from upstream, as often as it takes.
func (a *agent) bootstrap() (c *config, err error) {
	u := newUpstream(a.stateDir, a.upstream, "")
	own := a.newOwn(u, a.stateDir)
	startCounters([]*Service{own})
	a.services.Store(&[]*Service{own})
	err = a.persist(a.interval, func() error {
		lookErr := u.lookNow(a.stop.soft, false)
		own.work(own.pass, nil)
		if c, err = a.load(); c != nil {
			return nil
		}
		if st := own.Status(); lookErr != nil {
			err = lookErr
		} else if st.state >= stateBroken {
			err = errors.New(st.Info)
		}
		notify(a.socket, "READY=1\nSTATUS=waiting for a right config")
		return fmt.Errorf("gitopper: no right config yet: %w", err)
	})
	return c, err
}

// newOwn makes the service gitopper, whose commits must hold a right config.
func (a *agent) newOwn(u *upstream, stateDir string) *Service {
	own := newService(a.ownSpec(), stateDir, u, a.interval, a.stop)
	own.signers = own.rec.Signers // before there is a config, of the one that ran last
	own.gate = func(read func(string) ([]byte, error)) error {
		_, err := loadConfig(a.options, read)
		return err
	}
	return own
}

// mount makes every local show what is on disk, and takes away the mounts and clones of services that left
// the config. A config without an entry for this machine takes nothing away: the machine may have another
// name today. It returns where mounts went.
func (a *agent) mount(c *config, services []*Service, upstreams []*upstream) (gone []string) {
	if privateNamespace() {
		slog.Warn("we run in a mount namespace of our own: mounts may not reach the host and its units " +
			"(remove PrivateTmp=, ProtectSystem= and the like from the unit)")
	}
	if len(c.services) == 0 {
		restoreMounts(a.stateDir)
	} else {
		gone = retireRecords(a.stateDir, services)
		a.tasks.Go(func() { retireUpstreams(a.stop.soft, a.stateDir, upstreams) })
	}
	return append(gone, mountFirst(a.stop.soft, services)...)
}

// watch keeps systemd's status line, and notices a changed config: with -r a right one ends us.
func (a *agent) watch() {
	file, status := a.configPath(), ""
	text := a.right.files[file]
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
		if a.wrong.Load() == nil && !a.right.changed() {
			continue
		}

		c, err := a.load()
		if err != nil || c.files[file] == text { // key files are read anew by those who use them
			continue
		}
		isRoots := !slices.ContainsFunc([]string{file, filepath.Dir(file)}, othersWrite)
		if a.restart && isRoots {
			a.end(ending{"the config has changed", 2})
			return
		}
		text = c.files[file]
		slog.Warn("the config has changed: it is used after a restart " +
			"(at once with -r, if it is root's alone)")
	}
}

// summary counts services and names those in trouble, for systemd's status line.
func (a *agent) summary() string {
	services, bad := *a.services.Load(), []string{}
	for _, s := range services {
		if st := s.Status(); st.state >= stateBroken {
			bad = append(bad, st.Service)
		}
	}
	text := number(len(services), "service")
	if len(services) == 0 {
		text = "no entry for this machine"
	}
	if len(bad) > 0 {
		text += fmt.Sprintf(", %d in trouble: %s", len(bad), someOf(bad))
	}
	if a.wrong.Load() != nil {
		text += "; the config is wrong"
	}
	if a.retried.Load() > 0 {
		text += "; not all can be had yet, see the log"
	}
	return text
}

// configRight says whether neither the config nor a key file, on disk or upstream, is newer than what runs
// because it is wrong.
func (a *agent) configRight() bool {
	for _, s := range *a.services.Load() {
		if s.Status().Refused == "config" {
			return false
		}
	}
	server := a.server.Load()
	return a.wrong.Load() == nil && (server == nil || server.keys.ok())
}

// serveMetrics serves the HTTP interface as soon as its port can be had.
func (a *agent) serveMetrics(started time.Time) {
	if l := a.listen("--metric", a.metric); l != nil {
		services := func() []*Service { return *a.services.Load() }
		m := monitor{a.names[0], services, a.configRight, a.summary, started}
		m.serve(a.stop.soft, l)
	}
}

// serveSSH serves the SSH interface as soon as its host key and its port can be had.
func (a *agent) serveSSH(c *config, services []*Service) {
	if a.ssh == "" {
		return
	}
	hostKey := cmp.Or(a.hostkey, filepath.Join(a.stateDir, "ssh_host_ed25519_key"))
	_ = a.persist(retryPort, func() error {
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
	_ = a.persist(retryPort, func() (err error) {
		if l, err = net.Listen("tcp", addr); err != nil {
			return fmt.Errorf("%s: %w: give another address, or end what has this one; "+
				"it is tried again", option, err)
		}
		return nil
	})
	return l
}

// retryPort is how long we wait at most before we try again to serve an interface.
const retryPort = 3 * time.Second

// persist tries something until it works or we are to end, waits ever longer between two tries, up to most,
// and logs each new error once. With --once there is one try.
func (a *agent) persist(most time.Duration, try func() error) error {
	said := ""
	for wait := min(time.Second, most); a.stop.soft.Err() == nil; wait = min(2*wait, most) {
		err := try()
		if err == nil || a.mode == onceMode {
			return err
		}
		if said == "" {
			a.retried.Add(1)
			defer a.retried.Add(-1)
		}
		if err.Error() != said {
			said = err.Error()
			slog.Error(oneLine(said))
		}
		select {
		case <-a.stop.soft.Done():
		case <-time.After(wait):
		}
	}
	return context.Cause(a.stop.soft)
}

//go:embed testdata/help.txt
var usage string

// mode is what the program is to do: the name of the option that asks for it; empty is the daemon.
type mode string

const (
	onceMode      mode = "once"
	dryMode       mode = "dry-run"
	checkMode     mode = "check"
	unitMode      mode = "unit"
	alertsMode    mode = "alerts"
	dashboardMode mode = "dashboard"
	versionMode   mode = "version"
	helpMode      mode = "help"
)

var modes = []mode{onceMode, dryMode, checkMode, unitMode, alertsMode, dashboardMode, versionMode, helpMode}

// options are what the command line asks for.
type options struct {
	mode                               mode
	hosts                              nameList
	names                              []string // the hostname, then hosts
	config, ssh, metric, hostkey       string
	interval                           time.Duration
	level                              slog.Level // of what is logged
	restart, root, pull                bool
	upstream, directory, branch, mount string
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

// ownSpec is the service gitopper of a bootstrap: the directory of the repository that holds our config. It
// is root's.
func (o *options) ownSpec() spec {
	return spec{
		upstream: o.upstream, branch: o.branch, mount: filepath.Clean(o.mount),
		machine: o.names[0], service: "gitopper",
		dirs: []dir{{link: path.Clean(o.directory)}}, fallback: true,
	}
}

func parseOptions(args []string) (o options, err error) {
	host, err := os.Hostname()
	if err != nil {
		return o, err
	}
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
	if fl.Lookup("debug").Value.String() == "true" {
		o.level = slog.LevelDebug
	}
	o.names = append([]string{host}, o.hosts...)
	o.hostkey = absolute(o.hostkey)
	if o.upstream == "" { // else it is relative to the checkout
		o.config = absolute(o.config)
	}
	fl.Visit(func(f *flag.Flag) {
		if f.Name != "n" && !slices.Contains(modes, mode(f.Name)) {
			o.given = append(o.given, "-"+f.Name+"="+f.Value.String())
		}
	})
	return o, nil
}

// absolute returns a file's absolute name; no name is none.
func absolute(file string) string {
	if abs, err := filepath.Abs(file); file != "" && err == nil {
		return abs
	}
	return file
}

// flags returns the options as flags that set o.
func (o *options) flags() *flag.FlagSet {
	fl := flag.NewFlagSet("gitopper", flag.ContinueOnError)
	fl.SetOutput(io.Discard)
	fl.Var(&o.hosts, "hosts", "")
	fl.StringVar(&o.config, "config", "", "")
	fl.StringVar(&o.ssh, "ssh", ":2222", "")
	fl.StringVar(&o.metric, "metric", ":9222", "")
	fl.StringVar(&o.hostkey, "hostkey", "", "")
	fl.Bool("debug", false, "")
	fl.BoolVar(&o.restart, "restart", false, "")
	fl.BoolVar(&o.root, "root", true, "")
	fl.DurationVar(&o.interval, "duration", 5*time.Minute, "")
	fl.StringVar(&o.upstream, "upstream", "", "")
	fl.StringVar(&o.directory, "directory", "gitopper", "")
	fl.StringVar(&o.branch, "branch", "main", "")
	fl.StringVar(&o.mount, "mount", "", "")
	fl.BoolVar(&o.pull, "pull", false, "")
	for _, m := range modes {
		fl.BoolFunc(string(m), "", func(value string) error {
			is, err := strconv.ParseBool(value)
			if is {
				o.mode = m
			}
			return err
		})
	}
	for short, long := range map[string]string{
		"h": "hosts", "c": "config", "s": "ssh", "m": "metric", "k": "hostkey", "d": "debug",
		"r": "restart", "o": "root", "t": "duration", "n": "dry-run",
		"U": "upstream", "D": "directory", "B": "branch", "M": "mount", "P": "pull",
	} {
		fl.Var(fl.Lookup(long).Value, short, "")
	}
	return fl
}

// nameList is the flag.Value of --hosts.
type nameList []string

func (l *nameList) String() string { return strings.Join(*l, ",") }

func (l *nameList) Set(list string) error {
	for name := range strings.SplitSeq(list, ",") {
		if name = strings.TrimSpace(name); name != "" {
			*l = append(*l, name)
		}
	}
	return nil
}
