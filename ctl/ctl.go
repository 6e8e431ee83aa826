// Package ctl is gitopper's client: it sends a command to the SSH interface of any number of hosts
// and shows what they answer. It also holds the types of those answers, which the server shares.
//
// Reading order: Main, client.each, client.ask (dial.go), knownHosts.verify (keys.go), show (show.go).
package ctl

import (
	"cmp"
	"context"
	_ "embed"
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
	answer     view
}

var commands = []command{
	{"list ls l", "machines machine m", "/list/machine", "@HOST...", 0, 0, listLimit, machineView},
	{"list ls l", "service services s", "/list/service", "@HOST... [SERVICE]", 0, 1, listLimit, serviceView},
	{"list ls l", "log", "/list/log", "@HOST... SERVICE", 1, 1, listLimit, logView},
	{"list ls l", "diff", "/list/diff", "@HOST... SERVICE [HASH]", 1, 2, listLimit, textView},
	{"do d", "freeze f", "/do/freeze", "@HOST... SERVICE|-a [DURATION] [REASON...]", 1, anyNumber, doLimit,
		serviceView},
	{"do d", "unfreeze u", "/do/unfreeze", "@HOST... SERVICE|-a", 1, 1, doLimit, serviceView},
	{"do d", "rollback r", "/do/rollback", "@HOST... SERVICE HASH [REASON...]", 2, anyNumber, doLimit,
		serviceView},
	{"do d", "pull p", "/do/pull", "@HOST... SERVICE|-a", 1, 1, doLimit, serviceView},
}

const hdrUsage = "usage: gitopper ctl hdr [-p PREFIX] [-l en|nl] FILE\n"

//go:embed help.txt
var help string

//go:embed completion.bash
var completion string

func (c command) usage() string {
	return "usage: gitopper ctl [OPTION]... " + strings.Fields(c.verb)[0] + " " + strings.Fields(c.noun)[0] +
		" " + c.args + "\n"
}

// usageError is a mistake on the command line. Its usage lines are shown above it.
type usageError struct{ text, usage string }

func (e *usageError) Error() string { return e.text }

// errTold ends the program when every failure has had its line already.
var errTold = errors.New("a host failed")

// Main is "gitopper ctl ARGS". It returns the exit status: 0 when every host answered, else 1.
// It ends soon after ctx does.
func Main(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	log := &lines{w: stderr}
	err := run(ctx, args, stdout, log)
	if err == nil {
		return 0
	}
	if wrong, ok := errors.AsType[*usageError](err); ok {
		io.WriteString(stderr, wrong.usage)
	}
	if !errors.Is(err, errTold) {
		log.print("gitopper ctl: " + err.Error())
	}
	return 1
}

// options are the command line, without the command: what was given, and the words left over.
type options struct {
	identities       []string
	port, knownHosts string // port is the comment prefix for hdr
	bastion          string
	language         string
	json             bool
	text             string          // to print, and nothing else
	given            map[string]bool // by name
	hosts, words     []string        // in front of "--"; a word may be -a
	literal          []string        // behind it
}

func (o *options) flags() *flag.FlagSet {
	fs := flag.NewFlagSet("ctl", flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	fs.Func("i", "", func(s string) error { o.identities = append(o.identities, s); return nil })
	fs.StringVar(&o.port, "p", "", "")
	fs.StringVar(&o.knownHosts, "k", "", "")
	fs.StringVar(&o.bastion, "J", "", "")
	fs.StringVar(&o.language, "l", "en", "")
	fs.BoolVar(&o.json, "m", false, "")

	version, goVersion := Version()
	texts := map[string]string{"h": help, "help": help, "completion": completion,
		"version": "gitopper " + version + " " + goVersion + "\n"}
	for name, text := range texts {
		fs.BoolFunc(name, "", func(string) error { o.text = text; return nil })
	}
	return fs
}

// parse takes options from wherever they stand. It hands them to flag one by one, because flag itself stops
// at the first word, and then can't tell a "--" that ends the options from one that is a value (hdr -p --).
func parse(args []string) (options, error) {
	o := options{given: map[string]bool{}}
	fs := o.flags()
	for len(args) > 0 {
		n := 1
		switch name := strings.TrimLeft(args[0], "-"); {
		case args[0] == "--":
			o.literal = args[1:]
			n = len(args)
		case strings.HasPrefix(name, "@"):
			o.hosts = append(o.hosts, args[0])
		case args[0] == name, args[0] == "-", args[0] == everyService:
			o.words = append(o.words, args[0])
		default:
			if len(name) == 1 && strings.Contains("ipkJl", name) {
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
	if o.text != "" {
		_, err = io.WriteString(stdout, o.text)
		return err
	}
	if err != nil {
		return wrongOption(args, err)
	}
	if len(o.words) > 0 && o.words[0] == "hdr" {
		return hdr(ctx, o, stdout)
	}

	hosts, err := parseHosts(o.hosts, o.port)
	if err != nil {
		return err
	}
	cmd, words, err := find(o.words, o.literal)
	if err != nil {
		return err
	}
	if wrong := cmd.check(o, words); wrong != "" {
		return &usageError{wrong, cmd.usage()}
	}

	c, err := newClient(ctx, o, stderr)
	if err != nil {
		return err
	}
	return c.carryOut(ctx, o, cmd, hosts, words, stdout)
}

// carryOut asks all hosts, and shows what they answer.
func (c *client) carryOut(ctx context.Context, o options, cmd command, hosts []host, words []string,
	stdout io.Writer) error {
	var questions []question
	for _, h := range hosts {
		questions = append(questions, question{h, h.name, cmd.path, words})
	}
	var listErr error
	if isForAll(words) {
		questions, listErr = c.aboutEach(ctx, questions)
	}

	c.several = len(questions) > 1
	isOfOne := len(words) > 0 && !isForAll(words)
	r := &report{view: cmd.answer, several: len(hosts) > 1, json: o.json, cut: isTerminal(stdout)}
	if isOfOne && cmd.path != "/list/log" {
		r.cut = false // all is shown
	}
	err := c.each(ctx, questions, cmd.limit, r.add)
	return cmp.Or(r.print(stdout), err, listErr)
}

const everyService = "-a"

func isForAll(words []string) bool { return slices.Index(words, everyService) == 0 }

// aboutEach makes of a question about every service of a host one about each.
func (c *client) aboutEach(ctx context.Context, all []question) (each []question, err error) {
	lists := slices.Clone(all)
	for i := range lists {
		lists[i].path, lists[i].words = "/list/service", nil
	}
	rest := all[0].words[1:]
	err = c.each(ctx, lists, listLimit, func(list question, answer []byte) error {
		rows, err := serviceRows(answer)
		for _, row := range rows {
			service := row[0]
			each = append(each, question{list.host, list.label + ": " + service, all[0].path,
				append([]string{service}, rest...)})
		}
		return err
	})
	return each, err
}

// wrongOption is the error about an option that flag does not like, with the usage of its command.
func wrongOption(args []string, err error) error {
	text := strings.Replace(err.Error(), "flag provided but not defined: ",
		"no such option (a reason with - in front goes behind --): ", 1)
	notWord := func(arg string) bool { return strings.IndexAny(arg, "-@") == 0 }
	words := slices.DeleteFunc(slices.Clone(args), notWord)
	if slices.Contains(words[:min(1, len(words))], "hdr") {
		return &usageError{text, hdrUsage}
	}
	cmd, _, err := find(words, nil)
	if wrong, ok := errors.AsType[*usageError](err); ok {
		return &usageError{text, wrong.usage}
	}
	return &usageError{text, cmd.usage()}
}

// check says what is wrong with a command's options and words, if something is.
func (c command) check(o options, words []string) string {
	isText := c.answer.rows == nil
	switch {
	case o.given["l"]:
		return "option -l is for hdr"
	case o.json && isText:
		return "the answer is no JSON: leave -m out"
	case isForAll(words) && !strings.Contains(c.args, everyService):
		return "option -a is for freeze, unfreeze and pull"
	case slices.Contains(o.words[min(3, len(o.words)):], everyService):
		return "option -a stands in place of SERVICE"
	case len(o.hosts) == 0:
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
	var all, ofVerb strings.Builder
	for _, c := range commands {
		all.WriteString(c.usage())
		if len(words) == 0 || !slices.Contains(strings.Fields(c.verb), words[0]) {
			continue
		}
		if len(words) > 1 && slices.Contains(strings.Fields(c.noun), words[1]) {
			return c, slices.Concat(words[2:], literal), nil
		}
		ofVerb.WriteString(c.usage())
	}

	usage, text := cmp.Or(ofVerb.String(), all.String()+hdrUsage), "no command"
	if len(words) > 0 {
		text = fmt.Sprintf("no such command: %q", strings.Join(words[:min(2, len(words))], " "))
	}
	return command{}, nil, &usageError{text + ": see gitopper ctl --help", usage}
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

	c := &client{way: direct((&net.Dialer{}).DialContext), known: known, keys: ids, stderr: stderr}
	if o.given["J"] {
		c.way = through(ctx, o.bastion)
	}
	c.user = os.Getenv("USER")
	if u, err := user.Current(); err == nil {
		c.user = u.Username
	}
	return c, nil
}

// Version returns the version of the binary, which the go command takes from the module or from git, and that
// of Go.
func Version() (version, goVersion string) {
	if info, ok := debug.ReadBuildInfo(); ok {
		version = info.Main.Version
	}
	return cmp.Or(version, "unknown"), runtime.Version()
}
