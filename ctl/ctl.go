// Package ctl is gitopper's client: it sends a command to the SSH interface of any number of hosts
// and shows what they answer. It also holds the types of those answers, which the server shares.
//
// Reading order: Main, client.askAll, client.ask (dial.go), knownHosts.verify (keys.go), show (show.go).
package ctl

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"math"
	"net"
	"os"
	"os/user"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"time"
	"unicode"
)

const (
	anyNumber = math.MaxInt
	parallel  = 32               // hosts that are asked at the same time
	listLimit = 30 * time.Second // a list never waits for anything
	doLimit   = time.Hour        // longer than an install, 30 minutes, and what stands before it in line
)

// command is one thing that can be asked of a host.
type command struct {
	verb, noun string // the word and its short forms
	path       string // of the exec request; the words follow it
	args       string // what the words are, for the usage
	min, max   int    // how many words there may be
	limit      time.Duration
	about      string
}

var commands = []command{
	{"list ls l", "machines machine m", "/list/machine", "@HOST...", 0, 0, listLimit,
		"every machine of the host's config, and the name of the host that answers"},
	{"list ls l", "service services s", "/list/service", "@HOST... [SERVICE]", 0, 1, listLimit,
		"what runs: commit, state, why, and since when"},
	{"do d", "freeze f", "/do/freeze", "@HOST... SERVICE [DURATION] [REASON...]", 1, anyNumber, doLimit,
		"stay at the commit that runs now, for DURATION (30m, 1h30m, 2d, 1w) or until unfreeze"},
	{"do d", "unfreeze u", "/do/unfreeze", "@HOST... SERVICE", 1, 1, doLimit,
		"track upstream again, at once"},
	{"do d", "rollback r", "/do/rollback", "@HOST... SERVICE HASH [REASON...]", 2, anyNumber, doLimit,
		"go back to commit HASH (4 to 64 digits), at once, and stay there until unfreeze"},
	{"do d", "pull p", "/do/pull", "@HOST... SERVICE", 1, 1, doLimit,
		"look at upstream now, and try what was refused"},
}

const hdrArgs = "[-p PREFIX] [-l en|nl] FILE"

const helpTail = `
options, anywhere on the line:
  -i KEY      private key to log in with, or a public one whose private half ssh-agent holds; may be
              repeated; default: ssh-agent, then ~/.ssh/id_ed25519, id_ecdsa and id_rsa
  -p PORT     port of the hosts that name none (2222); for hdr: what starts a comment ('#')
  -k FILE     known_hosts file (~/.ssh/known_hosts; /etc/ssh/ssh_known_hosts is then read as well)
  -m          print the JSON as it came; with several hosts one object a line, with "host" as its first field
  -l LANG     language of hdr, en or nl
  --          what follows is no option and no host: do freeze @web1 nginx 2h -- -m is broken, ask @ann

@HOST is @name, @name:port, @address or @[v6]:port. Hosts are asked side by side; one that fails is a line on
stderr, and the others' answers are shown. A host key seen for the first time is accepted and remembered, a
changed one is refused. Words may be shortened: l or ls, d; m, s; f, u, r, p.

exit status: 0 all went well, 1 anything else
`

// help is what --help prints.
func help() string {
	var b strings.Builder
	b.WriteString("usage: gitopper ctl [OPTION]... COMMAND...\n\ncommands:\n")
	for _, c := range commands {
		fmt.Fprintf(&b, "  %s\n        %s\n", c.line(), c.about)
	}
	b.WriteString("  hdr " + hdrArgs + "\n" +
		"        comment lines for the top of FILE: don't edit here, and the file's web address\n" + helpTail)
	return b.String()
}

// line is the command as it is written in full.
func (c command) line() string {
	return strings.Fields(c.verb)[0] + " " + strings.Fields(c.noun)[0] + " " + c.args
}

func (c command) usage() string { return "usage: gitopper ctl [OPTION]... " + c.line() + "\n" }

// usageError is a mistake on the command line. Its usage lines are shown below it.
type usageError struct{ text, usage string }

func (e *usageError) Error() string { return e.text }

// errTold ends the program when every failure has had its line already.
var errTold = errors.New("a host failed")

// Main is "gitopper ctl ARGS". It returns the exit status: 0 when every host answered, else 1.
// It ends soon after ctx does.
func Main(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	log := &lines{w: stderr}
	err := run(ctx, args, stdout, log)

	var wrong *usageError
	switch {
	case err == nil:
		return 0
	case errors.Is(err, flag.ErrHelp):
		io.WriteString(stdout, help())
		return 0
	case errors.As(err, &wrong):
		log.print("gitopper ctl: " + wrong.text)
		io.WriteString(stderr, wrong.usage)
	case !errors.Is(err, errTold):
		log.print("gitopper ctl: " + err.Error())
	}
	return 1
}

// options are the command line, without the command: what was given, and the words left over.
type options struct {
	identities       []string
	port, knownHosts string // port is the comment prefix for hdr
	language         string
	json             bool
	given            map[string]bool // by name
	words            []string        // in front of "--"
	literal          []string        // behind it
}

// parse takes options from wherever they stand. It hands them to flag one by one, because flag itself stops
// at the first word, and then can't tell a "--" that ends the options from one that is a value (hdr -p --).
func parse(args []string) (options, error) {
	o := options{given: map[string]bool{}}
	fs := flag.NewFlagSet("ctl", flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	fs.Func("i", "", func(s string) error { o.identities = append(o.identities, s); return nil })
	fs.StringVar(&o.port, "p", "", "")
	fs.StringVar(&o.knownHosts, "k", "", "")
	fs.StringVar(&o.language, "l", "en", "")
	fs.BoolVar(&o.json, "m", false, "")

	for len(args) > 0 {
		n := 1
		switch f := fs.Lookup(strings.TrimLeft(args[0], "-")); {
		case args[0] == "--":
			o.literal = args[1:]
			n = len(args)
		case args[0] == "-" || !strings.HasPrefix(args[0], "-"):
			o.words = append(o.words, args[0])
		default:
			if f != nil && f.Name != "m" {
				n = min(2, len(args))
			}
			if err := fs.Parse(args[:n]); err != nil {
				return o, err
			}
		}
		args = args[n:]
	}

	fs.Visit(func(f *flag.Flag) { o.given[f.Name] = true })
	return o, nil
}

func run(ctx context.Context, args []string, stdout io.Writer, stderr *lines) error {
	o, err := parse(args)
	if errors.Is(err, flag.ErrHelp) {
		return err
	}
	if err != nil {
		return wrongOption(args, err)
	}
	if len(o.words) > 0 && o.words[0] == "hdr" {
		return hdr(ctx, o, stdout)
	}

	hosts, words, err := o.hosts()
	if err != nil {
		return err
	}
	cmd, words, err := find(words, o.literal)
	if err != nil {
		return err
	}
	if wrong := cmd.check(o, hosts, words); wrong != "" {
		return &usageError{wrong, cmd.usage()}
	}

	c, err := newClient(ctx, o, stderr)
	if err != nil {
		return err
	}
	c.several = len(hosts) > 1
	request := strings.Join(append([]string{cmd.path}, words...), " ")
	outcomes := c.askAll(ctx, hosts, request, cmd.limit)
	return show(ctx, hosts, outcomes, cmd, o.json, stdout, stderr)
}

// wrongOption is the error about an option that flag does not like, with the usage of its command.
func wrongOption(args []string, err error) error {
	text := strings.Replace(err.Error(), "flag provided but not defined: ",
		"no such option (a reason with - in front goes behind --): ", 1)
	notWord := func(arg string) bool { return strings.IndexAny(arg, "-@") == 0 }
	cmd, _, err := find(slices.DeleteFunc(slices.Clone(args), notWord), nil)
	if wrong, ok := errors.AsType[*usageError](err); ok {
		return &usageError{text, wrong.usage}
	}
	return &usageError{text, cmd.usage()}
}

// hosts returns the hosts among the words, each once, and the other words.
func (o options) hosts() (hosts []host, words []string, err error) {
	for _, w := range o.words {
		if !strings.HasPrefix(w, "@") {
			words = append(words, w)
			continue
		}
		h, err := parseHost(w, o.port)
		if err != nil {
			return nil, nil, err
		}
		if !slices.ContainsFunc(hosts, func(other host) bool { return other.addr == h.addr }) {
			hosts = append(hosts, h)
		}
	}
	return hosts, words, nil
}

// check says what is wrong with a command's options and words, if something is.
func (c command) check(o options, hosts []host, words []string) string {
	switch {
	case o.given["l"]:
		return "option -l is for hdr"
	case len(hosts) == 0:
		return "no host: name one as @HOST"
	case len(words) < c.min && len(words) == 0:
		return "no SERVICE"
	case len(words) < c.min:
		return "no HASH"
	case len(words) > c.max:
		return fmt.Sprintf("%q is one word too many", words[c.max])
	}

	for i, w := range words {
		bad := w == "" || strings.ContainsFunc(w, unicode.IsControl)
		if i < c.min && strings.Contains(w, " ") { // only a reason may have some
			bad = true
		}
		if bad {
			return fmt.Sprintf("%q is no word: it is empty, or has blanks or control characters", w)
		}
	}
	return ""
}

// find returns the command that the first two words name, and the words that are its arguments.
func find(words, literal []string) (command, []string, error) {
	var usage strings.Builder
	for _, c := range commands {
		if len(words) == 0 || !slices.Contains(strings.Fields(c.verb), words[0]) {
			continue
		}
		if len(words) > 1 && slices.Contains(strings.Fields(c.noun), words[1]) {
			return c, slices.Concat(words[2:], literal), nil
		}
		usage.WriteString(c.usage())
	}

	switch {
	case len(words) == 0:
		return command{}, nil, &usageError{"no command", help()}
	case usage.Len() == 0:
		return command{}, nil, &usageError{fmt.Sprintf("no such command: %q", words[0]), help()}
	case len(words) == 1:
		return command{}, nil, &usageError{words[0] + " what?", usage.String()}
	}
	text := fmt.Sprintf("no such command: %q", words[0]+" "+words[1])
	return command{}, nil, &usageError{text, usage.String()}
}

// client is what all hosts have in common.
type client struct {
	dial    func(ctx context.Context, network, addr string) (net.Conn, error)
	known   *knownHosts
	keys    *keys
	user    string
	stderr  *lines
	several bool // lines on stderr say which host they are from
}

func newClient(ctx context.Context, o options, stderr *lines) (*client, error) {
	file := o.knownHosts
	var system []string
	if file == "" {
		home, err := os.UserHomeDir()
		if err != nil {
			return nil, fmt.Errorf("no place for known_hosts: %w: name a file with -k", err)
		}
		file, system = filepath.Join(home, ".ssh", "known_hosts"), []string{"/etc/ssh/ssh_known_hosts"}
	}

	known, err := openKnownHosts(file, system...)
	if err != nil {
		return nil, err
	}
	ids, err := findKeys(ctx, o.identities)
	if err != nil {
		return nil, err
	}

	name := os.Getenv("USER")
	if u, err := user.Current(); err == nil {
		name = u.Username
	}
	dial := (&net.Dialer{}).DialContext
	return &client{dial: dial, known: known, keys: ids, user: name, stderr: stderr}, nil
}

// outcome is what came of asking one host. There may be an answer even if err is set.
type outcome struct {
	answer []byte
	err    error
}

// askAll asks every host, some at a time, and returns at once: host i's outcome is sent on channel i.
func (c *client) askAll(ctx context.Context, hosts []host, req string, limit time.Duration) []chan outcome {
	outcomes := make([]chan outcome, len(hosts))
	slots := make(chan bool, parallel)
	for i, h := range hosts {
		outcomes[i] = make(chan outcome, 1)
		go func() {
			slots <- true
			answer, err := c.ask(ctx, h, req, limit)
			<-slots
			outcomes[i] <- outcome{answer, err}
		}()
	}
	return outcomes
}

// Version returns the version of the binary, which the go command takes from the module or from git, and that
// of Go.
func Version() (version, goVersion string) {
	if info, ok := debug.ReadBuildInfo(); ok {
		version = info.Main.Version
	}
	return cmp.Or(version, "unknown"), runtime.Version()
}
