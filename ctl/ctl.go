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
	heads      []string // of the table that the answer is; none: it is text
}

var commands = []command{
	{"list ls l", "machines machine m", "/list/machine", "@HOST...", 0, 0, listLimit, machineHeads},
	{"list ls l", "service services s", "/list/service", "@HOST... [SERVICE]", 0, 1, listLimit, serviceHeads},
	{"list ls l", "log", "/list/log", "@HOST... SERVICE", 1, 1, listLimit, logHeads},
	{"list ls l", "diff", "/list/diff", "@HOST... SERVICE [HASH]", 1, 2, listLimit, nil},
	{"do d", "freeze f", "/do/freeze", "@HOST... SERVICE|-a [DURATION] [REASON...]", 1, anyNumber, doLimit,
		serviceHeads},
	{"do d", "unfreeze u", "/do/unfreeze", "@HOST... SERVICE|-a", 1, 1, doLimit, serviceHeads},
	{"do d", "rollback r", "/do/rollback", "@HOST... SERVICE HASH [REASON...]", 2, anyNumber, doLimit,
		serviceHeads},
	{"do d", "pull p", "/do/pull", "@HOST... SERVICE|-a", 1, 1, doLimit, serviceHeads},
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

// takesValue has the options, and whether a value follows.
var takesValue = map[string]bool{"i": true, "p": true, "k": true, "J": true, "l": true, "m": false,
	"h": false, "help": false, "completion": false, "version": false}

// options are the command line, taken apart.
type options struct {
	values  map[string][]string // of each option that was given
	hosts   []string
	words   []string // a word may be -a
	literal []string // the words behind "--"
	wrong   string   // what can't be understood
}

func (o options) has(name string) bool { return o.values[name] != nil }

// value returns an option's last value, or nothing.
func (o options) value(name string) string {
	values := append([]string{""}, o.values[name]...)
	return values[len(values)-1]
}

// parse takes options from wherever they stand.
func parse(args []string) options {
	o := options{values: map[string][]string{}}
	for len(args) > 0 {
		arg := args[0]
		args = args[1:]
		name, value, hasValue := strings.Cut(strings.TrimLeft(arg, "-"), "=")
		needsValue, isKnown := takesValue[name]
		lacksValue := needsValue && !hasValue

		switch {
		case arg == "--":
			o.literal, args = args, nil
		case strings.HasPrefix(arg, "@"):
			o.hosts = append(o.hosts, arg)
		case arg == everyService, arg == "-", !strings.HasPrefix(arg, "-"):
			o.words = append(o.words, arg)
		case !isKnown, hasValue && !needsValue:
			o.wrong = "no such option (a reason with - in front goes behind --): " + arg
		case lacksValue && len(args) == 0:
			o.wrong = "option needs a value: " + arg
		case lacksValue:
			value, args = args[0], args[1:]
			fallthrough
		default:
			o.values[name] = append(o.values[name], value)
		}
	}
	return o
}

func run(ctx context.Context, args []string, stdout io.Writer, stderr *lines) error {
	o := parse(args)
	version, goVersion := Version()
	texts := map[string]string{"h": help, "help": help, "completion": completion,
		"version": "gitopper " + version + " " + goVersion + "\n"}
	for name, text := range texts {
		if o.has(name) {
			_, err := io.WriteString(stdout, text)
			return err
		}
	}
	if slices.Contains(o.words[:min(1, len(o.words))], "hdr") {
		return hdr(ctx, o, stdout)
	}

	cmd, words, err := find(o)
	if err != nil {
		return err
	}
	if wrong := cmd.check(o, words); wrong != "" {
		return &usageError{wrong, cmd.usage()}
	}
	hosts, err := parseHosts(o.hosts, o.value("p"))
	if err != nil {
		return err
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
		questions = append(questions, question{host: h, label: h.name, path: cmd.path, words: words})
	}

	var listErr error
	if o.isForAll() {
		questions, listErr = c.aboutEach(ctx, questions)
	}

	if len(questions) > 1 {
		for i, q := range questions {
			questions[i].prefix = q.label + ": "
		}
	}
	r := &report{heads: cmd.heads, hosts: len(hosts), form: cmd.form(o, words, stdout)}
	err := c.each(ctx, questions, cmd.limit, r.add)
	return cmp.Or(r.print(stdout), err, listErr)
}

// form says how the answers are shown. A terminal cuts tables of many rows; of one service all is shown.
func (c command) form(o options, words []string, stdout io.Writer) form {
	hasManyRows := len(words) == 0 || o.isForAll() || c.path == "/list/log"
	switch {
	case c.heads == nil:
		return textForm
	case o.has("m"):
		return jsonForm
	case hasManyRows && isTerminal(stdout):
		return narrowTable
	}
	return wideTable
}

const everyService = "-a"

// isForAll says whether -a stands in place of SERVICE, behind the two words of the command.
func (o options) isForAll() bool { return slices.Index(o.words, everyService) == 2 }

// aboutEach makes of a question about every service of a host one about each.
func (c *client) aboutEach(ctx context.Context, all []question) (each []question, err error) {
	lists := slices.Clone(all)
	for i := range lists {
		lists[i].path, lists[i].words = "/list/service", nil
	}

	rest := all[0].words[1:]
	err = c.each(ctx, lists, listLimit, func(list question, answer []byte) error {
		rows, err := parseAnswer(answer, serviceHeads)
		for _, row := range rows {
			service := row[0]
			each = append(each, question{host: list.host, label: list.label + ": " + service,
				path: all[0].path, words: append([]string{service}, rest...)})
		}
		return err
	})
	return each, err
}

// check says what is wrong with a command's options and words, if something is.
func (c command) check(o options, words []string) string {
	isText := c.heads == nil
	switch {
	case o.wrong != "":
		return o.wrong
	case o.has("l"):
		return "option -l is for hdr"
	case o.has("m") && isText:
		return "the answer is no JSON: leave -m out"
	case o.isForAll() && !strings.Contains(c.args, everyService):
		return "option -a is for freeze, unfreeze and pull"
	case slices.Contains(o.words[min(3, len(o.words)):], everyService):
		return "option -a stands in place of SERVICE"
	case len(o.hosts) == 0:
		return "no host: name one as @HOST"
	}
	return c.checkWords(words)
}

func (c command) checkWords(words []string) string {
	switch n := len(words); {
	case n < c.min:
		return "no " + []string{"SERVICE", "HASH"}[n]
	case n > c.max:
		return fmt.Sprintf("%q is one word too many", words[c.max])
	}

	for i, w := range words {
		isBad := func(r rune) bool { return unicode.IsControl(r) || r == ' ' }
		if i >= c.min { // it may be a reason
			isBad = unicode.IsControl
		}
		if w == "" || strings.ContainsFunc(w, isBad) {
			return fmt.Sprintf("%q is no word: it is empty, or has blanks or control characters", w)
		}
	}
	return ""
}

// find returns the command that the first two words name, and the words that are its arguments.
func find(o options) (command, []string, error) {
	names := slices.Concat(o.words, []string{"", ""})[:2]
	all, ofVerb := "", ""
	for _, c := range commands {
		isVerb := slices.Contains(strings.Fields(c.verb), names[0])
		isNoun := slices.Contains(strings.Fields(c.noun), names[1])
		if isVerb && isNoun {
			return c, slices.Concat(o.words[2:], o.literal), nil
		}
		all += c.usage()
		if isVerb {
			ofVerb += c.usage()
		}
	}

	asked := strings.TrimSpace(strings.Join(names, " "))
	wrong := cmp.Or(o.wrong, fmt.Sprintf("no such command: %q: see gitopper ctl --help", asked))
	return command{}, nil, &usageError{wrong, cmp.Or(ofVerb, all+hdrUsage)}
}

func newClient(ctx context.Context, o options, stderr *lines) (*client, error) {
	file := o.value("k")
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
	ids, err := findKeys(ctx, o.values["i"])
	if err != nil {
		return nil, err
	}

	c := &client{way: direct((&net.Dialer{}).DialContext), known: known, keys: ids, stderr: stderr}
	if o.has("J") {
		c.way = through(ctx, o.value("J"))
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
