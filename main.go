//go:build linux

// Gitopper brings GitOps to plain Linux hosts. For each service in its config it
//
//  1. installs the service's package if it is missing (pkg.go),
//  2. looks at upstream, and fetches what moved into a bare clone that its services share (git.go, clone.go),
//  3. reads from it, by their hashes, what a commit shows the service: a tree (tree.go, objects.go),
//  4. decides which commit should run, and refuses one that must not (pass.go, check.go),
//  5. compares that tree with the disk and with the manifest of what it put there (files.go), makes the
//     difference live path by path, and keeps local edits (publish.go),
//  6. bind-mounts files and directories to where the service reads them (mount.go),
//  7. tells the unit, and watches it settle (systemd.go), or goes back to the last good commit (pass.go), and
//  8. says how it went (state.go): to operators (ssh.go, commands.go) and to a monitoring system
//     (metrics.go).
//
// Reading order: run in this file, then Service.run in service.go, then Service.reconcile in pass.go, which
// does the above in that order; then files.go and publish.go, which are how a file on the host changes.
package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/signal"
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
func (o options) run(ctx context.Context, stdout, stderr io.Writer) (err error) {
	switch o.mode {
	case helpMode:
		_, err = io.WriteString(stdout, usage)
		return err
	case alertsMode:
		_, err = io.WriteString(stdout, alertRules)
		return err
	case dashboardMode:
		_, err = io.WriteString(stdout, dashboard)
		return err
	case versionMode:
		version, goVersion := ctl.Version()
		_, err = fmt.Fprintf(stdout, "gitopper %s %s\n", version, goVersion)
		return err
	}

	if err := o.judge(); err != nil {
		return err
	}
	switch o.mode {
	case unitMode:
		exe, err := os.Executable()
		if err != nil {
			return err
		}
		_, err = io.WriteString(stdout, unitFile(exe, o.given))
		return err
	case checkMode:
		c, err := loadConfig(o, os.ReadFile)
		if err != nil {
			return err
		}
		for _, w := range slices.Concat(c.warnings(o), c.lacks(ctx)) {
			fmt.Fprintf(stderr, "gitopper: %s\n", w)
		}
		return nil
	}
	if o.root && os.Geteuid() != 0 {
		return errors.New("must be run as root (or with --root=false, for debugging)")
	}
	if o.mode == dryMode {
		setLogger(map[bool]io.Writer{true: stderr, false: io.Discard}[o.debug], o.debug)
		return dryRun(ctx, o, stdout, stderr)
	}
	setLogger(stderr, o.debug)
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
	socket   string                 // of systemd, for words of ours; empty without
	watchdog time.Duration          // systemd wants a word that often; 0: never
	started  time.Time
}

// daemon runs until ctx is done or, with --once, through one pass.
func daemon(ctx context.Context, o options, stdout io.Writer) error {
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
	if err != nil && ctx.Err() != nil {
		err = context.Cause(ctx) // whatever the signal made fail
	}
	return err
}

// work mounts what is on disk, tells systemd that we are ready, and lets the services live until we are to
// end. Nothing is looked at or acted on before all mounts are made.
func (a *agent) work(stdout io.Writer) error {
	a.tasks.Go(a.feedWatchdog)
	a.tasks.Go(a.serveMetrics)
	c, err := a.load()
	if c == nil || a.pull {
		restoreMounts(a.stateDir) // there is no config yet to say which
	}
	if a.upstream != "" && (c == nil || a.pull) {
		c, err = a.bootstrap()
	}
	if c == nil {
		return err
	}

	services, upstreams := a.assemble(c, a.stateDir)
	gone := a.mount(c, services, upstreams)
	for _, w := range c.warnings(a.options) {
		slog.Warn(w)
	}
	if err := gitVersion(a.stop.soft); err != nil {
		slog.Error(err.Error())
	}
	version, _ := ctl.Version()
	slog.Info(fmt.Sprintf("gitopper %s manages %d services of %s", version, len(services), a.config),
		"interval", a.interval, "ssh", a.ssh, "metric", a.metric)
	notify(a.socket, "READY=1\nSTATUS="+a.summary())
	a.tasks.Go(func() {
		if err := forgetUnits(a.stop.soft, gone); err != nil {
			slog.Warn(err.Error())
		}
	})
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

// assemble makes the services of the config, and the upstreams that they share.
func (a *agent) assemble(c *config, stateDir string) (services []*Service, upstreams []*upstream) {
	made := map[[2]string]*upstream{}
	get := func(url, user string) *upstream {
		k := [2]string{url, user}
		if made[k] == nil {
			made[k] = newUpstream(stateDir, url, user)
			upstreams = append(upstreams, made[k])
		}
		return made[k]
	}
	if a.upstream != "" {
		own := a.newOwn(get(a.upstream, ""), stateDir)
		own.signers, own.rec.Signers = c.signers, c.signers
		if err := own.save(); err != nil {
			slog.Error(fmt.Sprintf("gitopper: %v", err))
		}
		services = append(services, own)
	}
	for _, sp := range c.services {
		services = append(services, newService(sp, stateDir, get(sp.upstream, sp.user), a.interval, a.stop))
	}
	for _, s := range services {
		for _, other := range services {
			if strings.HasPrefix(other.files.dir, s.files.dir+"/") { // whose mount is our checkout
				s.files.nested = append(s.files.nested, other.files.dir)
			}
		}
	}
	startCounters(services)
	a.services.Store(&services)
	return services, upstreams
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

// lookAtAll looks at upstreams side by side, and again where that failed: alone it is no trouble yet.
func lookAtAll(ctx context.Context, upstreams []*upstream) {
	var looks sync.WaitGroup
	for _, u := range upstreams {
		looks.Go(func() {
			if u.lookNow(ctx, false) != nil {
				_ = u.lookNow(ctx, false)
			}
		})
	}
	looks.Wait()
}

// onePass is --once: every service is looked at and brought to what it should be, side by side.
func (a *agent) onePass(services []*Service, upstreams []*upstream, stdout io.Writer) error {
	ctx := a.stop.soft
	lookAtAll(ctx, upstreams)
	var passes sync.WaitGroup
	for _, s := range services {
		passes.Go(func() { s.pass(ctx) })
	}
	passes.Wait()
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}

	var err error
	for _, s := range services {
		st := s.Status()
		line := fmt.Sprintf("%s %.8s %s %s", s.service, st.Commit, st.State, st.Info)
		fmt.Fprintln(stdout, strings.TrimSpace(line))
		if st.state != stateOK && st.state != stateFreeze {
			err = errors.New("not all services are OK")
		}
	}
	return err
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
		if a.restart {
			a.end(ending{"the config has changed", 2})
			return
		}
		text = c.files[file]
		slog.Warn("the config has changed: it is used after a restart (at once with -r)")
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
	text := fmt.Sprintf("%d services", len(services))
	if len(bad) > 0 {
		text += fmt.Sprintf(", %d in trouble: %s", len(bad), someOf(bad))
	}
	if a.wrong.Load() != nil {
		text += "; the config is wrong"
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
		m := monitor{a.names[0], services, a.configRight, a.summary, a.started}
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
