//go:build linux

package main

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/BurntSushi/toml"
)

// config is a validated config file with all defaults merged in; nobody writes it after loading.
type config struct {
	files    map[string]string // text of the config file and of the key files, by path
	machines []string          // of the entries, each once, in the file's order
	keys     []key
	signers  string // of [global]: for our own config
	services []spec // the entries for this machine
}

// key is one entry of [global] keys.
type key struct {
	path   string // absolute
	rights rights
	text   []byte // what the file held when the config was loaded
}

// spec is one validated entry of the config, defaults merged in; nobody writes it after loading.
type spec struct {
	upstream, branch, mount, machine, service, user, pkg, action string
	dirs                                                         []dir
	check                                                        []string
	fallback                                                     bool
	settle                                                       time.Duration
	signers                                                      string
}

// checkout is the service's directory.
func (s *spec) checkout() string { return filepath.Join(s.mount, s.service) }

// dir says where a path of the repository is to be seen.
type dir struct {
	local string // absolute; empty: only checked out
	link  string // relative to the repository's top, clean
	kind  kind
	mode  fileMode // 0: 0644
	group string   // empty: the user's
}

// kind is what a link and its local are.
type kind bool

const (
	aDirectory kind = false
	aFile      kind = true
)

func (k kind) String() string {
	if k == aFile {
		return "file"
	}
	return "directory"
}

// options returns where the values of an entry's options go, by their names, but for dirs.
func (s *spec) options() map[string]any {
	all := s.defaults()
	all["machine"], all["service"], all["package"], all["check"] = &s.machine, &s.service, &s.pkg, &s.check
	return all
}

func (d *dir) options() map[string]any {
	return map[string]any{
		"local": &d.local, "link": &d.link, "file": (*bool)(&d.kind), "mode": &d.mode, "group": &d.group,
	}
}

// defaults is options for those that [global] has, too.
func (s *spec) defaults() map[string]any {
	return map[string]any{
		"upstream": &s.upstream, "branch": &s.branch, "mount": &s.mount, "user": &s.user, "action": &s.action,
		"fallback": &s.fallback, "settle": (*settleTime)(&s.settle), "signers": &s.signers,
	}
}

// settleTime is a duration as its option gives it: as text with a unit, and not for long.
type settleTime time.Duration

func (t *settleTime) UnmarshalText(text []byte) error {
	d, err := time.ParseDuration(string(text))
	if err == nil && d == d.Abs() && d <= 5*time.Minute {
		*t = settleTime(d)
		return nil
	}
	return errors.New("not a time that is short enough") // the option's name and form are told by take
}

// fileMode is the permission bits of a file that is not executable in git, as its option gives them: as octal
// text, for a number would be read in another base than it looks.
type fileMode uint32

// Whoever may write a file decides what the unit reads; with special bits a commit would give away rights.
var modeText = regexp.MustCompile(`^0?[4-7][0-7][0145]$`)

func (m *fileMode) UnmarshalTOML(value any) error {
	text, _ := value.(string)
	bits, err := strconv.ParseUint(text, 8, 32)
	if err == nil && modeText.MatchString(text) {
		*m = fileMode(bits)
		return nil
	}
	return errors.New("not a mode that files may have") // the option's name and form are told by take
}

// loadConfig reads and validates the config that o names, and the key files it names, through read. All
// mistakes are returned at once, one a line. Entries for other machines are validated like ours.
func loadConfig(o options, read func(string) ([]byte, error)) (*config, error) {
	file := o.configPath()
	text, err := read(file)
	if err != nil {
		return nil, fmt.Errorf("config: %w", err)
	}
	p := parser{
		c:       &config{files: map[string]string{file: string(text)}},
		options: o, file: file, text: string(text), read: read, seen: map[string]int{},
	}
	if o.upstream != "" {
		p.entries = []spec{o.ownSpec()}
	}

	p.parse()
	if err := errors.Join(p.errs...); err != nil {
		return nil, err
	}
	return p.c, nil
}

// parser collects a config and all that is wrong with it.
type parser struct {
	options
	c       *config
	md      toml.MetaData
	file    string
	text    string
	read    func(string) ([]byte, error)
	entries []spec
	errs    []error
	global  mistakes       // what is wrong with the defaults
	seen    map[string]int // by an option's key: in how many tables it was
}

func (p *parser) errorf(format string, args ...any) {
	p.errs = append(p.errs, fmt.Errorf("%s: %w", p.file, fmt.Errorf(format, args...)))
}

func (p *parser) parse() {
	var top, global toml.Primitive
	var services []toml.Primitive
	var err error
	if p.md, err = toml.Decode(p.text, &top); err != nil {
		p.errorf("%w", placed(p.text, err))
		return
	}

	p.take(spot{name: "top level"}, top, map[string]any{"global": &global, "services": &services})
	defaults := spec{branch: "main", fallback: true, settle: 3 * time.Second}
	p.defaults(global, &defaults)
	for i, entry := range services {
		p.service(i, entry, defaults)
	}
	p.conflicts()
}

// defaults reads [global], and validates its defaults as those of an entry that lacks nothing.
func (p *parser) defaults(global toml.Primitive, s *spec) {
	where := spot{"[global]", "global."}
	var keys []toml.Primitive
	options := s.defaults()
	options["keys"] = &keys
	wrong := p.take(where, global, options)
	p.keys(where, keys, wrong)
	p.c.signers = s.signers

	sample := *s
	sample.machine, sample.service = "m", "s"
	sample.upstream, sample.mount = cmp.Or(s.upstream, "/u"), cmp.Or(s.mount, "/m")
	if slices.Contains(wrong, "upstream") {
		s.upstream = sample.upstream // nothing is missing in the entries
	}
	if slices.Contains(wrong, "mount") {
		s.mount = sample.mount
	}
	p.global = sample.validate(p.stateDir, p.file)
	p.tell(where.name, p.global, wrong)
}

var (
	atEnd  = regexp.MustCompile(`EOF;|end of file|'\\x00'`)
	atRune = regexp.MustCompile(`but got |invalid escape`)
)

// placed gives a syntax error the line and column of the first character that can't stand where it does;
// columns count characters. The decoder tells where what it read begins, and how long that is.
func placed(text string, err error) error {
	var perr toml.ParseError
	if !errors.As(err, &perr) {
		return err
	}

	at := max(0, min(perr.Position.Start, len(text)))
	end := max(at, min(at+perr.Position.Len, len(text)))

	switch m := perr.Message; {
	case atEnd.MatchString(m):
		perr.Message = strings.Replace(m, `'\x00'`, "end of file", 1)
		at = len(strings.TrimRight(text, "\r\n"))
	case atRune.MatchString(m):
		_, size := utf8.DecodeLastRuneInString(text[at:end])
		at = max(0, end-size)
	case strings.Contains(m, "control characters"):
		at += max(0, strings.IndexFunc(text[at:], unicode.IsControl))
	case strings.Contains(m, "UTF-8"):
		at += max(0, strings.IndexRune(text[at:], utf8.RuneError))
	}
	return errors.New(position(text, at) + perr.Message)
}

// position tells line and column of an offset, as the beginning of a message.
func position(text string, at int) string {
	before := text[:at]
	line := strings.Count(before, "\n") + 1
	column := utf8.RuneCountInString(before[strings.LastIndexByte(before, '\n')+1:]) + 1
	return fmt.Sprintf("line %d, column %d: ", line, column)
}

// spot is a table of the file: how messages call it, and its key.
type spot struct{ name, key string }

// inner is the nth table of a list of tables that is an option of sp.
func (sp spot) inner(option string, n int) spot {
	return spot{fmt.Sprintf("%s: %s[%d]", sp.name, option, n), sp.key + option + "."}
}

// quoted is where no names of options stand: strings and comments.
var quoted = regexp.MustCompile(`(?s)""".*?"""|'''.*?'''|"(?:[^"\\\n]|\\.)*"|'[^'\n]*'|#[^\n]*`)

// find returns the position of the value that the nth table of that key (from 1) gives an option, for the
// decoder does not tell it: only which keys there are, in order. One that is written in an unusual way
// (quoted, dotted) has none.
func (p *parser) find(key string, n int) string {
	name := key[strings.LastIndex(key, ".")+1:]
	at, count := -1, 0
	for _, k := range p.md.Keys() {
		if !strings.EqualFold(k[len(k)-1], name) {
			continue
		}
		if strings.EqualFold(k.String(), key) {
			n--
		}
		if n == 0 && at < 0 {
			at = count
		}
		count++
	}

	text := quoted.ReplaceAllStringFunc(p.text, func(s string) string { return strings.Repeat("_", len(s)) })
	option := regexp.MustCompile(`(?im)(^|[{,])[ \t]*` + regexp.QuoteMeta(name) + `[ \t]*=[ \t]*`)
	found := option.FindAllStringIndex(text, -1)

	if at < 0 || len(found) != count {
		return ""
	}
	return position(p.text, found[at][1])
}

// take decodes a table, each option to where fields says, so that each wrong one is told: it returns their
// names. Those of a name that is unknown are all that it may have been meant to be. Names are
// case-insensitive, as they have always been.
func (p *parser) take(where spot, from toml.Primitive, fields map[string]any) (wrong []string) {
	var table map[string]toml.Primitive
	if reflect.ValueOf(from).IsZero() {
		return nil // it was left out
	}
	if p.md.PrimitiveDecode(from, &table); table == nil { // the decoder takes other values for no table
		list := strings.TrimSuffix(where.key, ".")
		p.errorf("%s%s: must be a table", p.find(list, p.seen[list]), where.name)
		return slices.Collect(maps.Keys(fields))
	}

	known := slices.Sorted(maps.Keys(fields))
	for _, name := range slices.Sorted(maps.Keys(table)) {
		key := where.key + strings.ToLower(name)
		p.seen[key]++
		field, ok := fields[strings.ToLower(name)]
		if !ok {
			expected := strings.Join(known, ", ")
			p.errorf("%s: %s: unknown option, expected one of %s", where.name, name, expected)
			wrong = append(wrong, resembling(name, known)...)
			continue
		}

		if p.md.PrimitiveDecode(table[name], field) != nil {
			at, want := p.find(key, p.seen[key]), kinds[fmt.Sprintf("%T", field)]
			p.errorf("%s%s: %s: must be %s", at, where.name, name, want)
			wrong = append(wrong, strings.ToLower(name))
		}
	}
	return wrong
}

// resembling returns those names that a misspelled one may have been meant to be.
func resembling(name string, names []string) []string {
	return slices.DeleteFunc(slices.Clone(names), func(n string) bool {
		return !strings.EqualFold(n[:1], name[:min(1, len(name))])
	})
}

// kinds says what the value of an option must be, by where it goes.
var kinds = map[string]string{
	"*string": "a string", "*bool": "true or false", "*[]string": "a list of strings",
	"*main.settleTime": `a duration of at most 5m, such as "3s"`,
	"*main.fileMode": `octal text such as "0440": readable by its owner, not writable by others, ` +
		"no setuid, setgid or sticky bit",
	"*toml.Primitive": "a table", "*[]toml.Primitive": "a list of tables",
}

// tell reports mistakes, but not of options that were told to be wrong before.
func (p *parser) tell(where string, found mistakes, wrong []string) {
	for _, m := range found {
		if !slices.Contains(wrong, m.option) {
			p.errorf("%s: %s", where, m.text)
		}
	}
}

func (p *parser) keys(global spot, keys []toml.Primitive, wrong []string) {
	if len(keys) == 0 && !slices.Contains(wrong, "keys") {
		p.errorf("[global]: keys: at least one { path = \"FILE\" } is required, " +
			"a public key that may use the SSH interface")
	}

	for i, entry := range keys {
		where := global.inner("keys", i)
		k, ro := key{rights: mayWrite}, false
		wrong := p.take(where, entry, map[string]any{"path": &k.path, "ro": &ro})
		if ro {
			k.rights = mayLook
		}
		if k.path == "" {
			p.tell(where.name, mistakes{{"path", "path: required"}}, wrong)
			continue
		}
		if !path.IsAbs(k.path) {
			k.path = filepath.Join(filepath.Dir(p.file), k.path)
		}

		var err error
		if k.text, err = p.read(k.path); err != nil {
			p.errorf("%s: %w", where.name, err)
		} else if _, err := parseKeys(k.text); err != nil {
			p.errorf("%s: %s: %w", where.name, k.path, err)
		}
		p.c.files[k.path] = string(k.text)
		p.c.keys = append(p.c.keys, k)
	}
}

func (p *parser) service(i int, entry toml.Primitive, s spec) {
	where := spot{fmt.Sprintf("services[%d]", i), "services."}
	var named struct{ Service string }
	if p.md.PrimitiveDecode(entry, &named); named.Service != "" {
		where.name += fmt.Sprintf(" %q", named.Service)
	}

	var dirs []toml.Primitive
	options := s.options()
	options["dirs"] = &dirs
	wrong := p.take(where, entry, options)
	for j, entry := range dirs {
		var d dir
		for _, name := range p.take(where.inner("dirs", j), entry, d.options()) {
			wrong = append(wrong, fmt.Sprintf("dirs[%d].%s", j, name))
		}
		s.dirs = append(s.dirs, d)
	}

	isGlobal := func(m mistake) bool { return slices.Contains(p.global, m) } // said once, not for each entry
	p.tell(where.name, slices.DeleteFunc(s.validate(p.stateDir, p.file), isGlobal), wrong)
	if !slices.Contains(p.c.machines, s.machine) {
		p.c.machines = append(p.c.machines, s.machine)
	}
	p.entries = append(p.entries, s)
	if slices.Contains(p.names, s.machine) {
		p.c.services = append(p.c.services, s)
	}
}

// keptFile is where the config and key files that were last right are remembered: as JSON, text by path.
func keptFile(stateDir string) string { return filepath.Join(stateDir, "config.json") }

// keep remembers the files of a right config, for a start with a wrong one.
func (c *config) keep(stateDir string) error {
	data, err := json.MarshalIndent(c.files, "", "\t")
	if err != nil {
		return err
	}
	if kept, _ := os.ReadFile(keptFile(stateDir)); bytes.Equal(kept, data) {
		return nil
	}
	return writeFile(keptFile(stateDir), data)
}

// loadKept is loadConfig with the files that were last right, if these are those that o names.
func loadKept(o options) (*config, error) {
	data, err := os.ReadFile(keptFile(o.stateDir))
	if err != nil {
		return nil, err
	}

	var files map[string]string
	if err := json.Unmarshal(data, &files); err != nil {
		return nil, fmt.Errorf("%s: %w", keptFile(o.stateDir), err)
	}

	return loadConfig(o, func(name string) ([]byte, error) {
		text, ok := files[name]
		if !ok {
			return nil, &os.PathError{Op: "open", Path: name, Err: syscall.ENOENT}
		}
		return []byte(text), nil
	})
}

// changed says whether a file of the config on disk is not what was loaded.
func (c *config) changed() bool {
	for name, text := range c.files {
		now, err := os.ReadFile(name)
		if err != nil || string(now) != text {
			return true
		}
	}
	return false
}
