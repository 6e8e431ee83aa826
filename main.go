// Gitopper brings GitOps to plain Linux hosts. For each service in its config it
//
//  1. installs the service's package if it is missing (pkg.go),
//  2. keeps a sparse Git checkout of what the service needs (git.go),
//  3. decides which commit should run, and refuses one that must not (state.go),
//  4. keeps and undoes local edits (state.go),
//  5. makes the files live and bind-mounts them to where the service reads them (git.go, mount.go),
//  6. tells the unit (systemd.go), and
//  7. watches it settle, or goes back to the last good commit (state.go).
//
// Reading order: run in this file, then Service.run, then Service.reconcile, which does the above in that order.
package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log"
	"log/slog"
	"maps"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path"
	"path/filepath"
	"regexp"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"gitopper/ctl"

	"github.com/BurntSushi/toml"
)

func main() {
	os.Exit(run(os.Args, os.Stdout, os.Stderr))
}

const usage = `usage: gitopper [OPTION]... -c CONFIG           the daemon
       gitopper --check -c CONFIG               read the config, print every mistake, and exit
       gitopper ctl [OPTION]... COMMAND...      the client; see gitopper ctl --help
       gitopper --help | --version | --unit     unit: a systemd unit for this binary

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

// options are what the command line asks for.
type options struct {
	names                              []string // to answer to, the hostname first
	config, ssh, metric, hostkey       string
	debug, restart, root, once         bool
	interval                           time.Duration
	check, unit, version, help         bool
	upstream, directory, branch, mount string
	pull                               bool
	stateDir                           string
}

func parseOptions(args []string) (o options, err error) {
	fl := flag.NewFlagSet("gitopper", flag.ContinueOnError)
	fl.SetOutput(io.Discard)
	host, err := os.Hostname()
	if err != nil {
		return o, err
	}
	o.names = []string{host}
	fl.Func("hosts", "", func(v string) error {
		for h := range strings.SplitSeq(v, ",") {
			if h = strings.TrimSpace(h); h != "" && !slices.Contains(o.names, h) {
				o.names = append(o.names, h)
			}
		}
		return nil
	})
	fl.StringVar(&o.config, "config", "", "")
	fl.StringVar(&o.ssh, "ssh", ":2222", "")
	fl.StringVar(&o.metric, "metric", ":9222", "")
	fl.StringVar(&o.hostkey, "hostkey", "", "")
	fl.BoolVar(&o.debug, "debug", false, "")
	fl.BoolVar(&o.restart, "restart", false, "")
	fl.BoolVar(&o.root, "root", true, "")
	fl.BoolVar(&o.once, "once", false, "")
	fl.DurationVar(&o.interval, "duration", 5*time.Minute, "")
	fl.BoolVar(&o.check, "check", false, "")
	fl.BoolVar(&o.unit, "unit", false, "")
	fl.BoolVar(&o.version, "version", false, "")
	fl.BoolVar(&o.help, "help", false, "")
	fl.StringVar(&o.upstream, "upstream", "", "")
	fl.StringVar(&o.directory, "directory", "gitopper", "")
	fl.StringVar(&o.branch, "branch", "main", "")
	fl.StringVar(&o.mount, "mount", "", "")
	fl.BoolVar(&o.pull, "pull", false, "")
	for short, long := range map[string]string{"h": "hosts", "c": "config", "s": "ssh", "m": "metric", "k": "hostkey", "d": "debug", "r": "restart",
		"o": "root", "t": "duration", "U": "upstream", "D": "directory", "B": "branch", "M": "mount", "P": "pull"} {
		fl.Var(fl.Lookup(long).Value, short, "")
	}
	if err := fl.Parse(args); err != nil {
		return o, fmt.Errorf("%w: see gitopper --help", err)
	}
	switch {
	case o.help, o.version, o.unit:
	case fl.NArg() > 0:
		err = fmt.Errorf("unexpected argument %q: see gitopper --help", fl.Arg(0))
	case o.config == "":
		err = errors.New("no config file: give one with -c; see gitopper --help")
	case o.interval <= 0:
		err = fmt.Errorf("-t %v: must be more than 0", o.interval)
	case (o.upstream == "") != (o.mount == ""):
		err = errors.New("bootstrapping needs both -U, the repository, and -M, the directory for its checkout")
	case o.upstream != "" && path.IsAbs(o.config):
		err = fmt.Errorf("-c %s: with -U it must be relative to the directory %s of the repository", o.config, o.directory)
	case o.upstream == "" && o.pull:
		err = errors.New("-P goes with -U")
	}
	// systemd makes and names the state directory. Several could be listed; ours is the first.
	o.stateDir, _, _ = strings.Cut(os.Getenv("STATE_DIRECTORY"), ":")
	if o.stateDir == "" {
		o.stateDir = "/var/lib/gitopper"
	}
	if o.upstream == "" && o.config != "" {
		o.config, _ = filepath.Abs(o.config)
	}
	return o, err
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
	if base := filepath.Base(args[0]); base == "gitopperctl" {
		return ctl.Main(ctx, args[1:], stdout, stderr)
	} else if len(args) > 1 && args[1] == "ctl" {
		return ctl.Main(ctx, args[2:], stdout, stderr)
	}
	syscall.Umask(0o022)
	o, err := parseOptions(args[1:])
	switch {
	case err != nil:
	case o.help:
		_, err = io.WriteString(stdout, usage)
	case o.version:
		version, goVersion := buildInfo()
		_, err = fmt.Fprintf(stdout, "gitopper %s %s\n", version, goVersion)
	case o.unit:
		var exe string
		if exe, err = os.Executable(); err == nil {
			_, err = io.WriteString(stdout, unitFile(exe))
		}
	case o.check:
		c, cerr := loadConfig(o, os.ReadFile)
		if err = cerr; err == nil && len(c.services) == 0 {
			fmt.Fprintf(stderr, "gitopper: %s: no entry for this machine (%s)\n", o.config, strings.Join(o.names, ", "))
		}
	default:
		setLogger(stderr, o.debug)
		err = daemon(ctx, o, stdout)
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
	for line := range strings.SplitSeq(redact(err.Error()), "\n") {
		fmt.Fprintf(stderr, "gitopper: %s\n", line)
	}
	return 1
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
	services atomic.Pointer[[]*Service]
	configOK atomic.Bool
	server   atomic.Pointer[sshServer]
	notify   string        // socket of systemd's, empty without
	watchdog time.Duration // systemd wants a word that often; 0: never
	started  time.Time
}

// daemon runs until ctx is done or, with --once, through one pass. Ports and the state directory are taken before anything
// on the host is touched; every existing checkout is mounted before systemd is told that we are ready, and nothing is
// looked at or acted on before that.
func daemon(ctx context.Context, o options, stdout io.Writer) error {
	if o.root && os.Geteuid() != 0 {
		return errors.New("must be run as root (or with --root=false, for debugging)")
	}
	a := &agent{options: o, notify: os.Getenv("NOTIFY_SOCKET"), started: time.Now()}
	microseconds, _ := strconv.ParseInt(os.Getenv("WATCHDOG_USEC"), 10, 64)
	a.watchdog = time.Duration(microseconds) * time.Microsecond
	for _, k := range []string{"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"} {
		os.Unsetenv(k) // not for the programs that we run
	}
	if os.Getenv("GOMEMLIMIT") == "" {
		debug.SetMemoryLimit(48 << 20) // a goal for the garbage collector, whatever strangers send us
	}
	a.services.Store(&[]*Service{})
	a.configOK.Store(true)
	var c *config // with -U it is not here yet
	var err error
	if o.upstream == "" {
		if c, err = loadConfig(o, os.ReadFile); err != nil {
			return err
		}
		if len(c.services) == 0 {
			slog.Warn(fmt.Sprintf("%s: no entry for this machine (%s): nothing to do", o.config, strings.Join(o.names, ", ")))
			notify(a.notify, "READY=1") // or systemd takes the end for a failed start
			return nil
		}
	}
	unlock, err := lock(o.stateDir)
	if err != nil {
		return err
	}
	defer unlock()
	var sshListener, metricListener net.Listener
	for _, l := range []struct {
		name, addr string
		to         *net.Listener
	}{{"--ssh", o.ssh, &sshListener}, {"--metric", o.metric, &metricListener}} {
		if l.addr == "" || o.once {
			continue
		}
		if *l.to, err = net.Listen("tcp", l.addr); err != nil {
			return fmt.Errorf("%s: %w: give another address, or end what has this one", l.name, err)
		}
		defer (*l.to).Close()
	}
	if err := gitVersion(ctx, false); err != nil {
		return err
	}
	if privateNamespace() {
		slog.Warn("we run in a mount namespace of our own: mounts may not reach the host and its units (remove PrivateTmp=, ProtectSystem= and the like from the unit)")
	}
	ctx, end := context.WithCancelCause(ctx)
	// Steps that must not be cut in two get ten more seconds when we are to end.
	hard, kill := context.WithCancel(context.WithoutCancel(ctx))
	defer kill()
	context.AfterFunc(ctx, func() {
		notify(a.notify, "STOPPING=1")
		time.AfterFunc(10*time.Second, kill)
	})
	ctx = context.WithValue(ctx, hardKey{}, hard)
	var wg sync.WaitGroup
	if metricListener != nil {
		wg.Go(func() {
			serveMetrics(ctx, metricListener, func() []*Service { return *a.services.Load() }, a.configRight, a.started)
		})
	}
	if a.watchdog > 0 {
		wg.Go(func() {
			for tick := time.Tick(a.watchdog / 3); ctx.Err() == nil; {
				select {
				case <-ctx.Done():
				case <-tick:
					if len(healthy(*a.services.Load())) == 0 {
						notify(a.notify, "WATCHDOG=1")
					}
				}
			}
		})
	}
	defer wg.Wait()
	defer end(nil) // an error below ends what is started by then
	services, c, err := a.assemble(ctx, c)
	if err != nil {
		return err
	}
	return a.live(ctx, end, c, services, sshListener, stdout)
}

// live mounts what is checked out, says that we are ready, and lets the services live until ctx is done or the config changes.
func (a *agent) live(ctx context.Context, end context.CancelCauseFunc, c *config, services []*Service, sshListener net.Listener, stdout io.Writer) error {
	startCounters(services)
	a.services.Store(&services)
	if len(c.services) > 0 {
		a.retire(services)
	} else {
		slog.Warn(fmt.Sprintf("%s: no entry for this machine (%s): nothing is unmounted", a.configPath(), strings.Join(a.names, ", ")))
	}
	a.mountFirst(ctx, services)
	var server *sshServer
	var err error
	if sshListener != nil {
		hostKey := cmp.Or(a.hostkey, filepath.Join(a.stateDir, "ssh_host_ed25519_key"))
		if server, err = newSSHServer(hostKey, a.hostkey == "", c.keys, c.machines, a.names[0], services); err != nil {
			return err
		}
		a.server.Store(server)
	}
	version, goVersion := buildInfo()
	slog.Info(fmt.Sprintf("gitopper %s (%s) manages %d services of %s", version, goVersion, len(services), a.config), "interval", a.interval, "ssh", a.ssh, "metric", a.metric)
	notify(a.notify, "READY=1\nSTATUS="+summary(services))
	if a.once {
		return onePass(ctx, services, stdout)
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	if server != nil {
		wg.Go(func() { server.serve(ctx, sshListener) })
	}
	for _, group := range byUpstream(services) {
		wg.Go(func() { watchUpstream(ctx, group, a.interval) })
	}
	wg.Go(func() { watchUnits(ctx, services, a.interval) })
	for _, s := range services {
		wg.Go(func() { s.run(ctx) })
	}
	wg.Go(func() { a.watch(ctx, end, c.text, services) })
	<-ctx.Done()
	slog.Info(fmt.Sprintf("ending: %v", context.Cause(ctx)))
	return context.Cause(ctx)
}

// assemble makes the services of the config: c, or with -U the one in our own checkout, which is then a service as well.
func (a *agent) assemble(ctx context.Context, c *config) ([]*Service, *config, error) {
	var services []*Service
	if a.upstream != "" {
		own := newService(a.ownSpec(), a.stateDir, a.interval)
		own.signers = own.rec.Signers
		own.gate = func(read func(string) ([]byte, error)) error {
			_, err := loadConfig(a.options, read)
			return err
		}
		services = append(services, own)
		var err error
		if c, err = a.bootstrap(ctx, own); err != nil {
			return nil, nil, err
		}
		// Remembered, for with -P the next start looks at upstream before there is a config.
		own.signers, own.rec.Signers = c.signers, c.signers
		if err := own.save(); err != nil {
			return nil, nil, err
		}
	}
	if slices.ContainsFunc(c.services, func(s spec) bool { return s.signers != "" }) {
		if err := signersUsable(ctx); err != nil {
			return nil, nil, err
		}
	}
	for _, sp := range c.services {
		services = append(services, newService(sp, a.stateDir, a.interval))
	}
	return services, c, nil
}

// configRight says whether neither the config nor a key file, on disk or upstream, is newer than what runs because it is wrong.
func (a *agent) configRight() bool {
	for _, s := range *a.services.Load() {
		if s.Status().Refused == "config" {
			return false
		}
	}
	server := a.server.Load()
	return a.configOK.Load() && (server == nil || server.keysOK())
}

// hardKey is the context key of the context that ends later than ours, see finish.
type hardKey struct{}

// finish returns a context for what must not be cut in two: it outlasts an operator's interruption, and our own end by ten seconds.
func finish(ctx context.Context) context.Context {
	if hard, ok := ctx.Value(hardKey{}).(context.Context); ok {
		return hard
	}
	return context.WithoutCancel(ctx)
}

// lock makes us the only gitopper on a state directory, until the returned function is called or we end, however.
func lock(dir string) (func(), error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("state directory: %w", err)
	}
	name := filepath.Join(dir, "lock")
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("state directory: %w", err)
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		pid, _ := io.ReadAll(io.LimitReader(f, 20))
		f.Close()
		return nil, fmt.Errorf("another gitopper, pid %s, works with %s: end that one first", strings.TrimSpace(string(pid)), dir)
	}
	err = f.Truncate(0)
	if err == nil {
		_, err = f.WriteAt(fmt.Appendln(nil, os.Getpid()), 0)
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("state directory: %w", err)
	}
	return func() { f.Close() }, nil
}

// ownSpec is the service gitopper of a bootstrap: the directory of the repository that holds our config.
func (a *agent) ownSpec() spec {
	return spec{upstream: a.upstream, branch: a.branch, mount: a.mount, machine: a.names[0], service: "gitopper",
		dirs: []dir{{link: path.Clean(a.directory)}}, fallback: true}
}

// bootstrap gets hold of our own config: from the checkout if it is right there (unless -P asks for more), else from
// upstream, as often as it takes.
func (a *agent) bootstrap(ctx context.Context, own *Service) (*config, error) {
	if errs := own.spec.validate(a.stateDir); len(errs) > 0 {
		return nil, fmt.Errorf("bootstrap: %w", errors.Join(errs...))
	}
	defer a.configOK.Store(true)
	var wait time.Duration
	for first := true; ; first = false {
		if !first || !own.repo.exists() || a.pull {
			_ = lookAt(ctx, []*Service{own})
			own.pass(ctx)
		}
		c, err := loadConfig(a.options, os.ReadFile)
		if err == nil {
			return c, nil
		}
		if own.err != nil {
			err = own.err
		}
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		if first && own.repo.exists() && !a.pull {
			continue // the config in the checkout is wrong: perhaps upstream has a better one by now
		}
		if a.once {
			return nil, err
		}
		slog.Error(fmt.Sprintf("gitopper: waiting for a right config: %s", oneLine(err.Error())))
		if a.configOK.Store(false); len(*a.services.Load()) == 0 {
			startCounters([]*Service{own})
			a.services.Store(&[]*Service{own})
			notify(a.notify, "READY=1\nSTATUS=waiting for a right config")
		}
		wait = min(max(2*wait, 5*time.Second), a.interval)
		select {
		case <-ctx.Done():
		case <-time.After(wait):
		}
	}
}

// signersUsable says whether the programs here can verify SSH signatures: git 2.34 and OpenSSH 8.2.
func signersUsable(ctx context.Context) error {
	if err := gitVersion(ctx, true); err != nil {
		return fmt.Errorf("signers: %w", err)
	}
	var out bytes.Buffer // OpenSSH_9.2p1 Debian-2+deb12u3, OpenSSL 3.0.14
	cmd := exec.Command("ssh", "-V")
	cmd.Stdout, cmd.Stderr = &out, &out
	_, err := execute(ctx, "ssh -V", cmd, localLimit, syscall.SIGKILL)
	var major, minor int
	if _, serr := fmt.Sscanf(out.String(), "OpenSSH_%d.%d", &major, &minor); err != nil || serr == nil && (major < 8 || major == 8 && minor < 2) {
		return fmt.Errorf("signers: OpenSSH 8.2 or newer is needed for ssh-keygen: ssh -V says %q", oneLine(out.String()))
	}
	return nil
}

// mountFirst mounts what is checked out already, without network and without systemd, so that units ordered after us start
// on their files. What can't be mounted is reported by the first pass.
func (a *agent) mountFirst(ctx context.Context, services []*Service) {
	for _, s := range services { // one may have a local now that was another's
		if err := s.sweep(); err != nil {
			slog.Warn(fmt.Sprintf("%s: %v", s.service, err))
		}
	}
	for _, s := range services {
		if s.rec.Live == "" && !s.legacy || !s.repo.exists() || len(s.check) > 0 && s.rec.Shape != s.repo.shape() {
			continue // the last: what other dirs show is to be checked first
		}
		acct, err := lookupAccount(ctx, s.user)
		if s.repo.acct = acct; err == nil {
			err = s.mountAll()
		}
		if err != nil {
			slog.Warn(fmt.Sprintf("%s: not mounted yet: %s", s.service, oneLine(err.Error())))
		}
	}
}

// retire takes away the mounts of services that have left the config. Checkout and record stay for their return.
func (a *agent) retire(services []*Service) {
	files, _ := filepath.Glob(recordFile(a.stateDir, "*"))
	for _, f := range files {
		name := strings.TrimSuffix(filepath.Base(f), ".json")
		if slices.ContainsFunc(services, func(s *Service) bool { return s.service == name }) {
			continue
		}
		rec, data, err := readRecord(f)
		if err != nil {
			slog.Error(fmt.Sprintf("%s: left the config, but its record can't be read, and its mounts stay: %v", name, err))
			continue
		}
		if len(rec.Mounts) == 0 && len(rec.Made) == 0 {
			continue
		}
		s := &Service{spec: spec{service: name}, stateDir: a.stateDir, rec: rec, saved: data}
		s.rec.Told = ""
		if err := s.sweep(); err != nil {
			slog.Error(fmt.Sprintf("%s: left the config: %v", name, err))
			continue
		}
		slog.Info(fmt.Sprintf("%s: left the config: its mounts are gone, its unit is not called, its checkout stays", name))
	}
}

// onePass is --once: every service is looked at and brought to what it should be, side by side.
func onePass(ctx context.Context, services []*Service, stdout io.Writer) error {
	var wg sync.WaitGroup
	for _, group := range byUpstream(services) {
		wg.Go(func() {
			_ = lookAt(ctx, group)
			var passes sync.WaitGroup
			for _, s := range group {
				passes.Go(func() { s.pass(ctx) })
			}
			passes.Wait()
		})
	}
	wg.Wait()
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	var err error
	for _, s := range services {
		st := *s.Status()
		if l := s.looked.Load(); st.state == stateOK && l != nil && l.err != nil {
			st.State, st.Info, st.state = "DIFF", oneLine(l.err.Error()), stateDiff // there is no second look that could tell
		}
		fmt.Fprintln(stdout, strings.TrimSpace(fmt.Sprintf("%s %.8s %s %s", s.service, st.Commit, st.State, st.Info)))
		if st.state != stateOK && st.state != stateFreeze {
			err = errNotAll
		}
	}
	return err
}

// byUpstream groups services that one look serves: of one upstream, asked as one user.
func byUpstream(services []*Service) [][]*Service {
	groups := map[[2]string][]*Service{}
	for _, s := range services {
		k := [2]string{s.upstream, s.user}
		groups[k] = append(groups[k], s)
	}
	return slices.Collect(maps.Values(groups))
}

// watch keeps systemd's status line, and notices a changed config: with -r a right one ends us, a wrong one is reported
// and the running one stays.
func (a *agent) watch(ctx context.Context, end context.CancelCauseFunc, running []byte, services []*Service) {
	tick := time.Tick(2 * time.Second)
	seen, status, said := running, "", ""
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick:
		}
		if s := summary(services); s != status {
			status = s
			notify(a.notify, "STATUS="+s)
		}
		text, err := os.ReadFile(a.configPath())
		if err == nil && bytes.Equal(text, seen) && a.configOK.Load() {
			continue
		}
		if seen = text; err == nil { // a wrong one may come right by a key file
			_, err = loadConfig(a.options, os.ReadFile)
		}
		a.configOK.Store(err == nil)
		if err == nil && said != "" {
			slog.Info("the config is right again")
			said = ""
		}
		switch {
		case err != nil && err.Error() == said:
		case err != nil:
			said = err.Error()
			slog.Error(fmt.Sprintf("the new config is wrong, the running one stays: %s", oneLine(err.Error())))
		case bytes.Equal(text, running):
		case a.restart:
			end(ending{"the config has changed", 2})
			return
		default:
			slog.Warn("the config has changed: restart gitopper to use it (or run it with -r)")
		}
	}
}

// summary counts services by state and names those in trouble, for systemd's status line.
func summary(services []*Service) string {
	n, bad := map[string]int{}, ""
	for _, s := range services {
		st := s.Status()
		if n[st.State]++; st.state >= stateBroken {
			bad += " " + st.Service
		}
	}
	text := fmt.Sprintf("%d ok, %d frozen, %d in trouble", n["OK"], n["FREEZE"]+n["ROLLBACK"], n["BROKEN"]+n["DIFF"])
	if bad != "" {
		text += ":" + bad
	}
	return text
}

// config is a validated config file with all defaults merged in; nobody writes it after loading.
type config struct {
	text     []byte
	machines []string // of every entry, in the file's order
	keys     []key
	signers  string // of [global]: for our own config
	services []spec // the entries for this machine
}

// key is one entry of [global] keys.
type key struct {
	path string // absolute
	ro   bool
}

// spec is one validated entry of the config, defaults merged in.
type spec struct {
	upstream, branch, mount, machine, service, user, pkg, action string
	dirs                                                         []dir
	check                                                        []string
	fallback                                                     bool
	settle                                                       time.Duration
	signers                                                      string
}

// dir says where a path of the repository is to be seen.
type dir struct {
	local string // absolute; empty: only checked out
	link  string // relative to the repository's top
	file  bool
}

func (o *options) configPath() string {
	if o.upstream == "" {
		return o.config
	}
	return filepath.Join(o.mount, "gitopper", o.directory, o.config)
}

var (
	unitName    = regexp.MustCompile(`^[A-Za-z0-9:_\\@][A-Za-z0-9:_.\\@-]*$`)
	accountName = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_.-]*\$?$`)
	packageName = regexp.MustCompile(`^[A-Za-z0-9@][A-Za-z0-9@+._:/-]*$`)
	actions     = []string{"", "start", "restart", "reload", "try-restart", "reload-or-restart", "try-reload-or-restart", "stop", "kill"}
)

// table is a TOML table whose values are not decoded yet, so that each wrong one can be reported.
type table map[string]toml.Primitive

// loadConfig reads and validates the config that o names, and the key files it names, through read. All mistakes are
// returned at once, one a line. Entries for other machines are validated like ours.
func loadConfig(o options, read func(string) ([]byte, error)) (*config, error) {
	file := o.configPath()
	text, err := read(file)
	if err != nil {
		return nil, fmt.Errorf("config: %w", err)
	}
	p := parser{c: &config{text: text}, file: file, stateDir: o.stateDir, names: o.names, read: read}
	if o.upstream != "" {
		p.entries = []spec{{mount: filepath.Clean(o.mount), service: "gitopper", machine: o.names[0]}}
	}
	p.parse(string(text))
	if err := errors.Join(p.errs...); err != nil {
		return nil, err
	}
	return p.c, nil
}

// parser collects a config and all that is wrong with it.
type parser struct {
	c        *config
	md       toml.MetaData
	file     string
	stateDir string
	names    []string
	read     func(string) ([]byte, error)
	entries  []spec
	errs     []error
	global   []string // what is wrong with the defaults
}

func (p *parser) errorf(format string, args ...any) {
	p.errs = append(p.errs, fmt.Errorf("%s: %w", p.file, fmt.Errorf(format, args...)))
}

// take decodes a table's values into the fields of their names. Names are case-insensitive, as they have always been.
func (p *parser) take(where string, t table, fields map[string]any) {
	for _, k := range slices.Sorted(maps.Keys(t)) {
		dst, ok := fields[strings.ToLower(k)]
		if !ok {
			p.errorf("%s: %s: unknown option, expected one of %s", where, k, strings.Join(slices.Sorted(maps.Keys(fields)), ", "))
			continue
		}
		if err := p.md.PrimitiveDecode(t[k], dst); err != nil {
			p.errorf("%s: %s: must be %s", where, k, kindOf(dst))
		}
	}
}

func kindOf(dst any) string {
	switch dst.(type) {
	case *string:
		return "a string"
	case *bool, **bool:
		return "true or false"
	case *[]string, **[]string:
		return "a list of strings"
	case *table:
		return "a table"
	case *settleTime:
		return `a duration of at most 5m, such as "3s"`
	}
	return "a list of tables"
}

func (p *parser) parse(text string) {
	var top table
	var err error
	if p.md, err = toml.Decode(text, &top); err != nil {
		var perr toml.ParseError
		if errors.As(err, &perr) {
			p.errorf("line %d, column %d: %s", perr.Position.Line, perr.Position.Col, perr.Message)
		} else {
			p.errorf("%w", err)
		}
		return
	}
	var global table
	var services, keys []table
	p.take("top level", top, map[string]any{"global": &global, "services": &services})
	def := spec{branch: "main", fallback: true, settle: 3 * time.Second}
	fields := p.defaults(&def)
	fields["keys"] = &keys
	p.take("[global]", global, fields)
	p.keys(keys)
	p.c.signers = def.signers
	own := def // as an entry that has all that is required
	own.machine, own.service, own.upstream, own.mount = "m", "s", cmp.Or(def.upstream, "/u"), cmp.Or(def.mount, "/m")
	for _, err := range own.validate(p.stateDir) {
		p.errorf("[global]: %w", err)
		p.global = append(p.global, err.Error())
	}
	for i, t := range services {
		p.service(i, t, def)
	}
	p.conflicts()
}

func (p *parser) defaults(s *spec) map[string]any {
	return map[string]any{"upstream": &s.upstream, "branch": &s.branch, "mount": &s.mount, "user": &s.user, "action": &s.action, "fallback": &s.fallback, "signers": &s.signers,
		"settle": (*settleTime)(&s.settle)}
}

// settleTime is a duration as its option gives it: as text with a unit, and not for long.
type settleTime time.Duration

func (t *settleTime) UnmarshalText(text []byte) error {
	d, err := time.ParseDuration(string(text))
	if err == nil && (d < 0 || d > 5*time.Minute) {
		err = errors.New("too long")
	}
	if err == nil {
		*t = settleTime(d)
	}
	return err
}

func (p *parser) keys(keys []table) {
	if len(keys) == 0 {
		p.errorf("[global]: keys: at least one { path = \"FILE\" } is required, a public key that may use the SSH interface")
	}
	for i, t := range keys {
		where := fmt.Sprintf("[global]: keys[%d]", i)
		var k key
		p.take(where, t, map[string]any{"path": &k.path, "ro": &k.ro})
		if k.path == "" {
			p.errorf("%s: path: required", where)
			continue
		}
		if !path.IsAbs(k.path) {
			k.path = filepath.Join(filepath.Dir(p.file), k.path)
		}
		data, err := p.read(k.path)
		if err == nil {
			if _, err = parseKeys(data); err != nil {
				err = fmt.Errorf("%s: %w", k.path, err)
			}
		}
		if err != nil {
			p.errorf("%s: %w", where, err)
		}
		p.c.keys = append(p.c.keys, k)
	}
}

func (p *parser) service(i int, t table, def spec) {
	s := def
	where := fmt.Sprintf("services[%d]", i)
	var name string
	for k, v := range t {
		if strings.EqualFold(k, "service") && p.md.PrimitiveDecode(v, &name) == nil {
			where += fmt.Sprintf(" %q", name)
		}
	}
	var dirs []table
	var check *[]string
	fields := p.defaults(&s)
	fields["machine"], fields["service"], fields["package"] = &s.machine, &s.service, &s.pkg
	fields["dirs"], fields["check"] = &dirs, &check
	p.take(where, t, fields)
	if check != nil {
		if s.check = *check; len(s.check) == 0 || s.check[0] == "" {
			p.errorf("%s: check: must have at least one word", where)
		}
	}
	for j, t := range dirs {
		d, at := dir{}, fmt.Sprintf("%s: dirs[%d]", where, j)
		p.take(at, t, map[string]any{"local": &d.local, "link": &d.link, "file": &d.file})
		s.dirs = append(s.dirs, d)
	}
	for _, err := range s.validate(p.stateDir) {
		if !slices.Contains(p.global, err.Error()) { // said once, not for each entry
			p.errorf("%s: %w", where, err)
		}
	}
	p.c.machines = append(p.c.machines, s.machine)
	p.entries = append(p.entries, s)
	if slices.Contains(p.names, s.machine) {
		p.c.services = append(p.c.services, s)
	}
}

// validate judges an entry by itself, and brings its paths to their shortest form.
func (s *spec) validate(stateDir string) (errs []error) {
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if err := validUpstream(s.upstream); err != nil {
		bad("upstream %q: %w", redact(s.upstream), err)
	}
	for _, c := range []struct {
		ok                  bool
		option, value, want string
	}{
		{validBranch(s.branch), "branch", s.branch, "must be a valid branch name"},
		{s.machine != "", "machine", s.machine, "required"},
		{path.IsAbs(s.mount) && path.Clean(s.mount) != "/", "mount", s.mount, "required, must be absolute and not /"},
		{unitName.MatchString(s.service) && len(s.service) <= 200, "service", s.service, `required, must be a unit name: letters, digits and :_.@\-, no leading - or .`},
		{s.user == "" || accountName.MatchString(s.user), "user", s.user, "must be an account name"},
		{s.pkg == "" || packageName.MatchString(s.pkg), "package", s.pkg, "must be a package name"},
		{slices.Contains(actions, s.action), "action", s.action, "must be one of " + strings.Join(actions[1:], ", ")},
		{s.signers == "" || path.IsAbs(s.signers), "signers", s.signers, "must be absolute"},
	} {
		if !c.ok {
			bad("%s %q: %s", c.option, c.value, c.want)
		}
	}
	if path.IsAbs(s.mount) {
		s.mount = path.Clean(s.mount)
	}
	for j := range s.dirs {
		d := &s.dirs[j]
		switch clean := path.Clean(d.link); {
		case d.link == "":
			bad("dirs[%d].link: required", j)
		case path.IsAbs(d.link):
			bad("dirs[%d].link %q: must be relative", j, d.link)
		case clean == "." || clean == ".." || strings.HasPrefix(clean, "../"):
			bad("dirs[%d].link %q: must be a path inside the repository", j, d.link)
		case slices.ContainsFunc(strings.Split(clean, "/"), func(c string) bool { return strings.EqualFold(c, ".git") }):
			bad("dirs[%d].link %q: must not contain .git", j, d.link)
		case strings.ContainsFunc(d.link, control):
			bad("dirs[%d].link %q: must not contain control characters", j, d.link)
		default:
			d.link = clean
		}
		if d.local == "" {
			continue
		}
		switch clean := path.Clean(d.local); {
		case !path.IsAbs(d.local) || clean == "/" || strings.ContainsFunc(d.local, control):
			bad("dirs[%d].local %q: must be an absolute path other than /", j, d.local)
		case path.IsAbs(s.mount) && nested(clean, s.mount):
			bad("dirs[%d].local %q: must not be in, around or equal to mount %q", j, d.local, s.mount)
		case nested(clean, stateDir):
			bad("dirs[%d].local %q: must not be in, around or equal to the state directory %q", j, d.local, stateDir)
		default:
			d.local = clean
		}
	}
	return errs
}

// control says whether a character could steer a terminal or end a line.
func control(r rune) bool { return r < ' ' || r == 0x7f }

// nested says whether one of two clean absolute paths is the other or lies in it.
func nested(a, b string) bool {
	return a == b || strings.HasPrefix(a, b+"/") || strings.HasPrefix(b, a+"/")
}

func validUpstream(u string) error {
	scheme, _, isURL := strings.Cut(u, "://")
	switch {
	case u == "":
		return errors.New("required")
	case strings.HasPrefix(u, "-"), strings.ContainsFunc(u, control):
		return errors.New("must be a URL or a path, without a leading - or control characters")
	case isURL && !slices.Contains([]string{"https", "http", "ssh", "git", "file"}, scheme):
		return errors.New("must be an https, http, ssh, git or file URL, or a path")
	case !isURL && strings.Contains(u, "::"):
		return errors.New("must not name a transport helper")
	case !isURL && !path.IsAbs(u) && !strings.Contains(strings.SplitN(u, "/", 2)[0], ":"):
		return errors.New("a path must be absolute")
	}
	return nil
}

// validBranch follows git-check-ref-format(1), --branch.
func validBranch(b string) bool {
	if b == "" || b == "@" || b == "HEAD" || b[0] == '-' || strings.HasSuffix(b, ".") || strings.Contains(b, "..") || strings.Contains(b, "@{") || strings.ContainsAny(b, " ~^:?*[\\") || strings.ContainsFunc(b, control) {
		return false
	}
	for c := range strings.SplitSeq(b, "/") {
		if c == "" || c[0] == '.' || strings.HasSuffix(c, ".lock") {
			return false
		}
	}
	return true
}

// conflicts finds what entries for one machine would fight over. All names of this host are one machine.
func (p *parser) conflicts() {
	machine := func(s spec) string {
		if slices.Contains(p.names, s.machine) {
			return p.names[0]
		}
		return s.machine
	}
	for i, a := range p.entries {
		for j, b := range p.entries {
			if machine(a) != machine(b) {
				continue
			}
			who := fmt.Sprintf("service %q", a.service)
			for _, d := range a.dirs { // a mount of another entry is as untouchable as its own
				if a.mount != b.mount && d.local != "" && path.IsAbs(b.mount) && nested(d.local, b.mount) {
					p.errorf("%s: local %q: must not be in, around or equal to mount %q of service %q", who, d.local, b.mount, b.service)
				}
			}
			if j < i {
				continue // the rest goes for both, and has been said
			}
			if j > i {
				who = fmt.Sprintf("services %q and %q", a.service, b.service)
				at, bt := filepath.Join(a.mount, a.service), filepath.Join(b.mount, b.service)
				if strings.TrimSuffix(a.service, ".service") == strings.TrimSuffix(b.service, ".service") {
					p.errorf("service %q: twice on machine %q", a.service, a.machine)
				} else if nested(at, bt) {
					p.errorf("%s: checkouts %s and %s must not be the same or nest", who, at, bt)
				}
			}
			for k, d := range a.dirs {
				for l, e := range b.dirs {
					if (j > i || l > k) && d.local != "" && e.local != "" && nested(d.local, e.local) {
						p.errorf("%s: locals %q and %q: must not be the same or nest", who, d.local, e.local)
					}
				}
			}
		}
	}
}

// setLogger makes slog write one line an event to w: with a <N> priority and no time where the journal reads along, which
// has its own (sd-daemon(3), systemd.exec(5) on JOURNAL_STREAM).
func setLogger(w io.Writer, debug bool) {
	level := slog.LevelInfo
	if debug {
		level = slog.LevelDebug
	}
	journal := false
	var st syscall.Stat_t
	if f, ok := w.(*os.File); ok && syscall.Fstat(int(f.Fd()), &st) == nil {
		journal = os.Getenv("JOURNAL_STREAM") == fmt.Sprintf("%d:%d", st.Dev, st.Ino)
	}
	slog.SetDefault(slog.New(lineHandler{level, journal, log.New(w, "", 0)}))
}

type lineHandler struct {
	level   slog.Level
	journal bool
	lines   *log.Logger // one Write a line, one at a time
}

func (h lineHandler) Enabled(_ context.Context, l slog.Level) bool { return l >= h.level }
func (h lineHandler) WithGroup(string) slog.Handler                { return h }
func (h lineHandler) WithAttrs([]slog.Attr) slog.Handler           { return h } // nobody here uses With

func (h lineHandler) Handle(_ context.Context, r slog.Record) error {
	var b strings.Builder
	if h.journal {
		n := map[slog.Level]int{slog.LevelDebug: 7, slog.LevelInfo: 6, slog.LevelWarn: 4, slog.LevelError: 3}[r.Level]
		fmt.Fprintf(&b, "<%d>", n)
	} else {
		b.WriteString(r.Time.Format("2006-01-02T15:04:05.000Z07:00 ") + r.Level.String() + " ")
	}
	b.WriteString(r.Message)
	r.Attrs(func(a slog.Attr) bool { b.WriteString(" " + a.String()); return true })
	return h.lines.Output(0, oneLine(redact(b.String())))
}

var secrets = []*regexp.Regexp{ // what comes after the group is kept from others
	regexp.MustCompile(`(https?://)[^/\s]*@`),
	regexp.MustCompile(`(\w+://)[^/\s]*:[^/\s]*@`),
	regexp.MustCompile(`()[^\s/:@'"]+:[^\s/@]+@`), // as git quotes the host of a git:// URL
	regexp.MustCompile(`([?&][\w-]*(?:token|key|secret|password)[\w-]*=)[^&\s'"]+`),
}

// redact takes passwords and tokens out of the URLs in a text.
func redact(s string) string {
	for _, r := range secrets {
		s = r.ReplaceAllString(s, "${1}***")
	}
	return s
}

// oneLine makes a program's words one line of an info or a log, without what could steer a terminal.
func oneLine(s string) string {
	s = strings.Join(strings.FieldsFunc(s, func(r rune) bool { return r == '\n' || r == '\r' }), "; ")
	return strings.TrimSpace(printable(s, 1<<20))
}

// tail keeps the last lines that are written to it.
type tail struct{ buf []byte }

func (t *tail) Write(p []byte) (int, error) {
	t.buf = append(t.buf, p...)
	if n := len(t.buf); n > 8192 {
		t.buf = append(t.buf[:0], t.buf[n-4096:]...)
	}
	return len(p), nil
}

// last returns the last few lines as one, of a length that fits an info.
func (t *tail) last() string {
	lines := strings.Split(strings.TrimSpace(strings.ToValidUTF8(string(t.buf), "?")), "\n")
	s := redact(oneLine(strings.Join(lines[max(0, len(lines)-9):], "\n")))
	return strings.ToValidUTF8(s[max(0, len(s)-800):], "")
}

// execute runs a program to its end and returns its standard output, unless cmd.Stdout takes that. It is the only way in
// which programs are run: without a shell, in the C locale, in a process group of its own. When ctx is done or limit has
// passed, the group gets the signal end; after SIGKILL nothing is waited for, while one that was only asked to end is
// waited for as long as it takes. The error holds the program's last words, or names the limit.
func execute(ctx context.Context, name string, cmd *exec.Cmd, limit time.Duration, end syscall.Signal) ([]byte, error) {
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	var stdout bytes.Buffer
	words := &tail{}
	if cmd.Stdout == nil {
		cmd.Stdout = &bounded{to: &stdout}
	} else if t, ok := cmd.Stdout.(*tail); ok {
		words = t
	}
	if cmd.Stderr == nil {
		cmd.Stderr = words
	}
	if cmd.Env == nil {
		cmd.Env = os.Environ()
	}
	cmd.Env = append(cmd.Env, "LC_ALL=C")
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Setsid = true // and so no terminal, into which a user's program could type
	// A daemon that the program leaves behind may hold the pipes open: it is not waited for.
	cmd.WaitDelay = 3 * time.Second
	start := time.Now()
	err := cmd.Start()
	if err == nil {
		limited, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf("took longer than %v and was ended", limit))
		defer cancel()
		stop := context.AfterFunc(limited, func() {
			_ = syscall.Kill(-cmd.Process.Pid, end)
			if end == syscall.SIGKILL {
				_ = cmd.Process.Kill() // it may have left its group
			}
		})
		err = cmd.Wait()
		stop()
		if errors.Is(err, exec.ErrWaitDelay) && cmd.ProcessState.Success() {
			err = nil
		}
		switch b, _ := cmd.Stdout.(*bounded); {
		case err == nil:
		case b != nil && b.err != nil:
			err = b.err // else it would be the broken pipe that this meant for the program
		case ctx.Err() != nil:
			err = fmt.Errorf("ended: %w", ctx.Err())
		case limited.Err() != nil:
			err = context.Cause(limited)
		}
	}
	if err != nil {
		if w := words.last(); w != "" {
			err = fmt.Errorf("%w: %s", err, w)
		}
		err = fmt.Errorf("%s: %w", name, err)
	}
	user := os.Getuid()
	if cmd.SysProcAttr.Credential != nil {
		user = int(cmd.SysProcAttr.Credential.Uid)
	}
	args := cmd.Args
	for len(args) > 2 && args[1] == "-c" { // settings of git's, the same each time
		args = append(args[:1:1], args[3:]...)
	}
	slog.Debug(fmt.Sprintf("run %q", args), "dir", cmd.Dir, "uid", user, "took", time.Since(start).Round(time.Millisecond), "error", err)
	return stdout.Bytes(), err
}

// bounded passes on what is written to it, as long as that is not absurdly much, and keeps the error that it meets.
type bounded struct {
	to  io.Writer
	n   int
	err error
}

const maxOutput = 64 << 20

var errTooMuch = errors.New("more than 64 MiB of output")

func (b *bounded) Write(p []byte) (int, error) {
	if b.n += len(p); b.n > maxOutput {
		b.err = errTooMuch
		return 0, b.err
	}
	n, err := b.to.Write(p)
	b.err = err
	return n, err
}
