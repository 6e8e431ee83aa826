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
	path string // absolute
	ro   bool
	text []byte // what the file held when the config was loaded
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

// What follows are the tables of the file as they stand there, over the defaults.

type rawConfig struct {
	Global   toml.Primitive   `toml:"global"`
	Services []toml.Primitive `toml:"services"`
}

type rawDefaults struct {
	Upstream string     `toml:"upstream"`
	Branch   string     `toml:"branch"`
	Mount    string     `toml:"mount"`
	User     string     `toml:"user"`
	Action   string     `toml:"action"`
	Fallback bool       `toml:"fallback"`
	Settle   settleTime `toml:"settle"`
	Signers  string     `toml:"signers"`
}

type rawGlobal struct {
	rawDefaults
	Keys []toml.Primitive `toml:"keys"`
}

type rawKey struct {
	Path string `toml:"path"`
	Ro   bool   `toml:"ro"`
}

type rawService struct {
	rawDefaults
	Machine string           `toml:"machine"`
	Service string           `toml:"service"`
	Package string           `toml:"package"`
	Check   []string         `toml:"check"`
	Dirs    []toml.Primitive `toml:"dirs"`
}

type rawDir struct {
	Local string   `toml:"local"`
	Link  string   `toml:"link"`
	File  bool     `toml:"file"`
	Mode  fileMode `toml:"mode"`
	Group string   `toml:"group"`
}

func (r *rawService) spec() spec {
	return spec{
		upstream: r.Upstream, branch: r.Branch, mount: r.Mount,
		machine: r.Machine, service: r.Service, user: r.User, pkg: r.Package,
		action: r.Action, check: r.Check, fallback: r.Fallback, settle: time.Duration(r.Settle),
		signers: r.Signers,
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
		c:    &config{files: map[string]string{file: string(text)}},
		file: file, text: string(text), stateDir: o.stateDir, names: o.names, read: read,
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
	c        *config
	md       toml.MetaData
	file     string
	text     string
	stateDir string
	names    []string // of this machine
	read     func(string) ([]byte, error)
	entries  []spec
	errs     []error
	global   []mistake // what is wrong with the defaults
}

func (p *parser) errorf(format string, args ...any) {
	p.errs = append(p.errs, fmt.Errorf("%s: %w", p.file, fmt.Errorf(format, args...)))
}

func (p *parser) parse() {
	var top toml.Primitive
	var err error
	if p.md, err = toml.Decode(p.text, &top); err != nil {
		p.errorf("%w", placed(p.text, err))
		return
	}
	var raw rawConfig
	p.take(spot{name: "top level"}, top, &raw)

	defaults := rawDefaults{Branch: "main", Fallback: true, Settle: settleTime(3 * time.Second)}
	global := rawGlobal{rawDefaults: defaults}
	where := spot{"[global]", []step{{`^[ \t]*\[[ \t]*global[ \t]*\]`, nextTable, 0}}}
	wrong := p.take(where, raw.Global, &global)
	p.keys(where, global.Keys, wrong)
	p.c.signers = global.Signers

	// As if nothing were missing.
	sample := rawService{rawDefaults: global.rawDefaults, Machine: "m", Service: "s"}
	sample.Upstream, sample.Mount = cmp.Or(sample.Upstream, "/u"), cmp.Or(sample.Mount, "/m")
	s := sample.spec()
	p.global = s.validate(p.stateDir, p.file)
	p.tell(where.name, p.global, wrong)

	for i, entry := range raw.Services {
		p.service(i, entry, global.rawDefaults)
	}
	p.conflicts()
}

// placed gives a syntax error the line and column of the first character that can't stand where it does;
// columns count characters. The decoder's own line is one too far at the end of a line, and its offset may be
// that of what it read last.
func placed(text string, err error) error {
	var perr toml.ParseError
	if !errors.As(err, &perr) {
		return err
	}
	at := max(0, min(perr.Position.Start, len(text)))
	end := max(at, min(at+perr.Position.Len, len(text)))
	switch m := perr.Message; {
	case strings.Contains(m, "EOF"), strings.Contains(m, "end of file"),
		strings.Contains(m, `'\x00' instead`):
		perr.Message = strings.Replace(m, `'\x00' instead`, "end of file", 1)
		at = len(strings.TrimRight(text, "\r\n"))
	case strings.HasSuffix(m, " instead"):
		_, size := utf8.DecodeLastRuneInString(text[at:end])
		at = max(0, end-size)
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

// spot is a table of the file: how messages call it, and how it is found in the text.
type spot struct {
	name string
	way  []step
}

// step finds the nth match (from 0) of a pattern in what is left of the text, which then begins behind it and
// ends before the next match of until.
type step struct {
	pattern, until string
	n              int
}

const nextTable = `^[ \t]*\[`

// inner is the nth table of a list of tables that is an option of sp.
func (sp spot) inner(option string, n int) spot {
	list, element := step{pattern: `^[ \t]*` + option + `[ \t]*=[ \t]*`}, step{`\{`, `\}`, n}
	return spot{fmt.Sprintf("%s: %s[%d]", sp.name, option, n), slices.Concat(sp.way, []step{list, element})}
}

// find returns the position of a value of the wrong type, for the decoder does not tell it. A file that is
// written in an unusual way (quoted names, dotted tables) has none.
func (p *parser) find(way ...step) string {
	if len(way) == 0 {
		return ""
	}
	text, at := p.text, 0
	for _, s := range way {
		found := regexp.MustCompile("(?im)"+s.pattern).FindAllStringIndex(text[at:], s.n+1)
		if len(found) <= s.n {
			return ""
		}
		at += found[s.n][1]
		if s.until == "" {
			continue
		}
		if end := regexp.MustCompile("(?m)" + s.until).FindStringIndex(text[at:]); end != nil {
			text = text[:at+end[0]]
		}
	}
	return position(text, at)
}

// take decodes a table into a struct, option by option, so that each wrong one is told: it returns their
// names. Names are case-insensitive, as they have always been.
func (p *parser) take(where spot, from toml.Primitive, to any) (wrong []string) {
	var table map[string]toml.Primitive
	if reflect.ValueOf(from).IsZero() {
		return nil // it was left out
	}
	if p.md.PrimitiveDecode(from, &table); table == nil { // the decoder takes other values for no table
		list := where.way[:max(0, len(where.way)-1)]
		p.errorf("%s%s: must be a table", p.find(list...), where.name)
		return nil
	}
	fields := map[string]any{}
	for _, f := range reflect.VisibleFields(reflect.TypeOf(to).Elem()) {
		if name := f.Tag.Get("toml"); name != "" {
			fields[name] = reflect.ValueOf(to).Elem().FieldByIndex(f.Index).Addr().Interface()
		}
	}

	for _, name := range slices.Sorted(maps.Keys(table)) {
		field, ok := fields[strings.ToLower(name)]
		if !ok {
			expected := strings.Join(slices.Sorted(maps.Keys(fields)), ", ")
			p.errorf("%s: %s: unknown option, expected one of %s", where.name, name, expected)
			continue
		}
		if p.md.PrimitiveDecode(table[name], field) != nil {
			option := step{pattern: `(^|,)[ \t]*` + regexp.QuoteMeta(name) + `[ \t]*=[ \t]*`}
			at := p.find(append(slices.Clone(where.way), option)...)
			p.errorf("%s%s: %s: must be %s", at, where.name, name, kindOf(field))
			wrong = append(wrong, strings.ToLower(name))
		}
	}
	return wrong
}

// kindOf says what the value of a raw struct's field must be.
func kindOf(field any) string {
	switch field.(type) {
	case *string:
		return "a string"
	case *bool:
		return "true or false"
	case *[]string:
		return "a list of strings"
	case *settleTime:
		return `a duration of at most 5m, such as "3s"`
	case *fileMode:
		return `octal text such as "0440": readable by its owner, not writable by others, ` +
			"no setuid, setgid or sticky bit"
	case *toml.Primitive:
		return "a table"
	}
	return "a list of tables"
}

// tell reports mistakes, but not of options that were told to be of the wrong type.
func (p *parser) tell(where string, mistakes []mistake, wrong []string) {
	for _, m := range mistakes {
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
		var raw rawKey
		wrong := p.take(where, entry, &raw)
		if raw.Path == "" {
			p.tell(where.name, []mistake{{"path", "path: required"}}, wrong)
			continue
		}

		k := key{path: raw.Path, ro: raw.Ro}
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

func (p *parser) service(i int, entry toml.Primitive, defaults rawDefaults) {
	header := step{`^[ \t]*\[\[[ \t]*services[ \t]*\]\]`, nextTable, i}
	where := spot{fmt.Sprintf("services[%d]", i), []step{header}}
	var named struct{ Service string }
	if p.md.PrimitiveDecode(entry, &named); named.Service != "" {
		where.name += fmt.Sprintf(" %q", named.Service)
	}
	raw := rawService{rawDefaults: defaults}
	wrong := p.take(where, entry, &raw)
	s := raw.spec()
	for j, entry := range raw.Dirs {
		var d rawDir
		for _, name := range p.take(where.inner("dirs", j), entry, &d) {
			wrong = append(wrong, fmt.Sprintf("dirs[%d].%s", j, name))
		}
		s.dirs = append(s.dirs, dir{d.Local, d.Link, kind(d.File), d.Mode, d.Group})
	}

	mistakes := s.validate(p.stateDir, p.file)
	isGlobal := func(m mistake) bool { return slices.Contains(p.global, m) } // said once, not for each entry
	p.tell(where.name, slices.DeleteFunc(mistakes, isGlobal), wrong)
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
