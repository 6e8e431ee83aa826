//go:build linux

package main

import (
	"cmp"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

const usage = `usage: gitopper [OPTION]... -c CONFIG           the daemon
       gitopper --check -c CONFIG               read the config, print every mistake, and exit
       gitopper --dry-run -c CONFIG             print what a pass would do, and exit
       gitopper ctl [OPTION]... COMMAND...      the client; see gitopper ctl --help
       gitopper --help | --version
       gitopper --unit [OPTION]...              print a systemd unit that runs this binary with these options
       gitopper --alerts | --dashboard          print Prometheus alerting rules; a Grafana dashboard

  -h, --hosts LIST      names (comma-separated, may be repeated) to answer to; the hostname is always added
  -c, --config FILE     config file, mandatory
  -s, --ssh ADDR        address of the SSH interface (default ":2222"); empty turns it off
  -m, --metric ADDR     address of the HTTP interface (default ":9222"); empty turns it off
  -k, --hostkey FILE    private host key of the SSH interface (default: made once, in the state directory)
  -d, --debug           log every command that is run
  -r, --restart         when the config changed, end with status 2 so that systemd starts us anew
  -o, --root            insist on root (default true)
  -t, --duration D      time between looks at upstream, plus a random part of up to half of it (default 5m)
      --once            one pass over all services, a line for each; status 0 if all are OK or FREEZE, else 1
  -n, --dry-run         print what a pass would do, a line each, and do nothing of it
      --check           read the config, print every mistake, and exit

bootstrapping, with the config in a repository:
  -U, --upstream URL    repository to take the config from
  -D, --directory DIR   directory in that repository (default "gitopper")
  -B, --branch NAME     branch (default "main")
  -M, --mount DIR       where the checkout goes: DIR/gitopper; -c is then relative to directory D in it
  -P, --pull            bring an existing checkout up to date before reading the config

Exit status: 0 normal end, 1 error, 2 SIGHUP seen or, with -r, a new config, 3 something is to be done (-n).
`

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
	fl.BoolVar(&o.debug, "debug", false, "")
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

// judge finds what is wrong with the options, or does not go together.
func (o *options) judge() error {
	isBootstrap := o.upstream != ""
	needsConfig := o.mode != unitMode // which has a default
	switch {
	case o.interval <= 0:
		return fmt.Errorf("-t %v: must be more than 0", o.interval)
	case isBootstrap != (o.mount != ""):
		return errors.New("bootstrapping needs both -U, the repository, and -M, " +
			"the directory for its checkout")
	case isBootstrap && !filepath.IsLocal(o.config):
		return fmt.Errorf("-c %q: with -U it must be a file in the directory %s of the repository",
			o.config, o.directory)
	case needsConfig && o.config == "":
		return errors.New("no config file: give one with -c; see gitopper --help")
	case o.pull && !isBootstrap:
		return errors.New("-P goes with -U")
	}

	if own := o.ownSpec(); isBootstrap {
		if found := own.validate(o.stateDir, o.configPath()); len(found) > 0 {
			return fmt.Errorf("bootstrap: %s", found[0].text)
		}
	}
	for option, addr := range map[string]string{"--ssh": o.ssh, "--metric": o.metric} {
		if err := validAddress(addr); err != nil {
			return fmt.Errorf("%s: %w", option, err)
		}
	}
	return nil
}

// validAddress judges HOST:PORT, as far as it can be before the network is there.
func validAddress(addr string) error {
	if addr == "" {
		return nil
	}
	_, port, err := net.SplitHostPort(addr)
	if err != nil {
		return fmt.Errorf("%w: it must be HOST:PORT or :PORT", err)
	}
	_, err = net.LookupPort("tcp", port)
	return err
}
