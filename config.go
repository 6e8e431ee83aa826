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
	// mode and group are to come
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
	Local string `toml:"local"`
	Link  string `toml:"link"`
	File  bool   `toml:"file"`
}

func (r *rawService) spec() spec {
	return spec{
		upstream: r.Upstream, branch: r.Branch, mount: r.Mount, machine: r.Machine, service: r.Service, user: r.User,
		pkg: r.Package, action: r.Action, check: r.Check, fallback: r.Fallback, settle: time.Duration(r.Settle),
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

// loadConfig reads and validates the config that o names, and the key files it names, through read. All mistakes are
// returned at once, one a line. Entries for other machines are validated like ours.
func loadConfig(o options, read func(string) ([]byte, error)) (*config, error) {
	file := o.configPath()
	text, err := read(file)
	if err != nil {
		return nil, fmt.Errorf("config: %w", err)
	}
	p := parser{
		c:    &config{files: map[string]string{file: string(text)}},
		file: file, stateDir: o.stateDir, names: o.names, read: read,
	}
	if o.upstream != "" {
		p.entries = []spec{o.ownSpec()}
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
	names    []string // of this machine
	read     func(string) ([]byte, error)
	entries  []spec
	errs     []error
	global   []mistake // what is wrong with the defaults
}

func (p *parser) errorf(format string, args ...any) {
	p.errs = append(p.errs, fmt.Errorf("%s: %w", p.file, fmt.Errorf(format, args...)))
}

func (p *parser) parse(text string) {
	var top toml.Primitive
	var err error
	if p.md, err = toml.Decode(text, &top); err != nil {
		p.errorf("%w", placed(text, err))
		return
	}
	var raw rawConfig
	p.take("top level", top, &raw)

	global := rawGlobal{rawDefaults: rawDefaults{Branch: "main", Fallback: true, Settle: settleTime(3 * time.Second)}}
	wrong := p.take("[global]", raw.Global, &global)
	p.keys(global.Keys, wrong)
	p.c.signers = global.Signers

	sample := rawService{rawDefaults: global.rawDefaults, Machine: "m", Service: "s"} // as if nothing were missing
	sample.Upstream, sample.Mount = cmp.Or(sample.Upstream, "/u"), cmp.Or(sample.Mount, "/m")
	s := sample.spec()
	p.global = s.validate(p.stateDir, p.file)
	p.tell("[global]", p.global, wrong)

	for i, entry := range raw.Services {
		p.service(i, entry, global.rawDefaults)
	}
	p.conflicts()
}

// placed gives a syntax error the line and column of the first character that can't stand where it does; columns count
// characters. The decoder's own line is one too far at the end of a line, and its offset may be that of what it read last.
func placed(text string, err error) error {
	var perr toml.ParseError
	if !errors.As(err, &perr) {
		return err
	}
	at := max(0, min(perr.Position.Start, len(text)))
	end := max(at, min(at+perr.Position.Len, len(text)))
	switch m := perr.Message; {
	case strings.Contains(m, "EOF"), strings.Contains(m, "end of file"), strings.Contains(m, `'\x00' instead`):
		perr.Message = strings.Replace(m, `'\x00' instead`, "end of file", 1)
		at = len(strings.TrimRight(text, "\r\n"))
	case strings.HasSuffix(m, " instead"):
		_, size := utf8.DecodeLastRuneInString(text[at:end])
		at = max(0, end-size)
	}

	before := text[:at]
	line := strings.Count(before, "\n") + 1
	column := utf8.RuneCountInString(before[strings.LastIndexByte(before, '\n')+1:]) + 1
	return fmt.Errorf("line %d, column %d: %s", line, column, perr.Message)
}

// take decodes a table into a struct, option by option, so that each wrong one is told: it returns their names. Names are
// case-insensitive, as they have always been.
func (p *parser) take(where string, from toml.Primitive, to any) (wrong []string) {
	var table map[string]toml.Primitive
	if reflect.ValueOf(from).IsZero() {
		return nil // it was left out
	}
	if p.md.PrimitiveDecode(from, &table) != nil {
		p.errorf("%s: must be a table", where)
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
			p.errorf("%s: %s: unknown option, expected one of %s", where, name, expected)
			continue
		}
		if p.md.PrimitiveDecode(table[name], field) != nil {
			p.errorf("%s: %s: must be %s", where, name, kindOf(field))
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
	case *toml.Primitive:
		return "a table"
	}
	return "a list of tables"
}

// mistake is what is wrong with one option of an entry.
type mistake struct{ option, text string }

// tell reports mistakes, but not of options that were told to be of the wrong type.
func (p *parser) tell(where string, mistakes []mistake, wrong []string) {
	for _, m := range mistakes {
		if !slices.Contains(wrong, m.option) {
			p.errorf("%s: %s", where, m.text)
		}
	}
}

func (p *parser) keys(keys []toml.Primitive, wrong []string) {
	if len(keys) == 0 && !slices.Contains(wrong, "keys") {
		p.errorf("[global]: keys: at least one { path = \"FILE\" } is required, " +
			"a public key that may use the SSH interface")
	}
	for i, entry := range keys {
		where := fmt.Sprintf("[global]: keys[%d]", i)
		var raw rawKey
		wrong := p.take(where, entry, &raw)
		if raw.Path == "" {
			p.tell(where, []mistake{{"path", "path: required"}}, wrong)
			continue
		}

		k := key{path: raw.Path, ro: raw.Ro}
		if !path.IsAbs(k.path) {
			k.path = filepath.Join(filepath.Dir(p.file), k.path)
		}
		var err error
		if k.text, err = p.read(k.path); err != nil {
			p.errorf("%s: %w", where, err)
		} else if _, err := parseKeys(k.text); err != nil {
			p.errorf("%s: %s: %w", where, k.path, err)
		}
		p.c.files[k.path] = string(k.text)
		p.c.keys = append(p.c.keys, k)
	}
}

func (p *parser) service(i int, entry toml.Primitive, defaults rawDefaults) {
	where := fmt.Sprintf("services[%d]", i)
	var named struct{ Service string }
	if p.md.PrimitiveDecode(entry, &named); named.Service != "" {
		where += fmt.Sprintf(" %q", named.Service)
	}
	raw := rawService{rawDefaults: defaults}
	wrong := p.take(where, entry, &raw)
	s := raw.spec()
	for j, entry := range raw.Dirs {
		var d rawDir
		for _, name := range p.take(fmt.Sprintf("%s: dirs[%d]", where, j), entry, &d) {
			wrong = append(wrong, fmt.Sprintf("dirs[%d].%s", j, name))
		}
		s.dirs = append(s.dirs, dir{local: d.Local, link: d.Link, kind: kind(d.File)})
	}

	mistakes := s.validate(p.stateDir, p.file)
	isGlobal := func(m mistake) bool { return slices.Contains(p.global, m) } // said once, not for each entry
	p.tell(where, slices.DeleteFunc(mistakes, isGlobal), wrong)
	if !slices.Contains(p.c.machines, s.machine) {
		p.c.machines = append(p.c.machines, s.machine)
	}
	p.entries = append(p.entries, s)
	if slices.Contains(p.names, s.machine) {
		p.c.services = append(p.c.services, s)
	}
}

var (
	machineName = regexp.MustCompile(`^[\pL\pN_][\pL\pN_.-]*$`)
	unitName    = regexp.MustCompile(`^[A-Za-z0-9:_\\@][A-Za-z0-9:_.\\@-]*$`)
	accountName = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_.-]*\$?$`)
	packageName = regexp.MustCompile(`^[A-Za-z0-9@][A-Za-z0-9@+._:/-]*$`)
	actions     = []string{
		"", "start", "restart", "reload", "try-restart", "reload-or-restart", "try-reload-or-restart", "stop", "kill",
	}
	// What a system stands on: a mount over one of these hides far more than a service's files.
	systemDirs = strings.Fields(`/bin /boot /dev /etc /home /lib /lib32 /lib64 /media /mnt /opt /proc /root /run /sbin
		/srv /sys /tmp /usr /usr/bin /usr/lib /usr/local /usr/sbin /usr/share /var /var/cache /var/lib /var/log /var/run
		/var/spool /var/tmp /etc/systemd /etc/systemd/system /run/systemd /usr/lib/systemd`)
)

// validate judges an entry by itself, and brings its paths to their shortest form.
func (s *spec) validate(stateDir, configFile string) (found []mistake) {
	rule := func(ok bool, option, value, want string) {
		if !ok {
			found = append(found, mistake{option, fmt.Sprintf("%s %q: %s", option, value, want)})
		}
	}
	optional := func(value string, form *regexp.Regexp) bool { return value == "" || form.MatchString(value) }

	if want := validUpstream(s.upstream); want != "" {
		rule(false, "upstream", redact(s.upstream), want)
	}
	rule(validBranch(s.branch), "branch", s.branch, "must be a valid branch name")
	rule(s.machine != "", "machine", s.machine, "required")
	rule(optional(s.machine, machineName), "machine", s.machine, "must be the name of one host")
	mountRight := path.IsAbs(s.mount) && path.Clean(s.mount) != "/" && !hasControl(s.mount)
	rule(mountRight, "mount", s.mount, "required, must be absolute and not /")
	rule(unitName.MatchString(s.service) && len(s.service) <= 200, "service", s.service,
		`required, must be a unit name: letters, digits and :_.@\-, no leading - or .`)
	rule(optional(s.user, accountName), "user", s.user, "must be an account name")
	rule(optional(s.pkg, packageName), "package", s.pkg, "must be a package name")
	if s.check != nil && (len(s.check) == 0 || s.check[0] == "") {
		found = append(found, mistake{"check", "check: must have at least one word"})
	}
	rule(slices.Contains(actions, s.action), "action", s.action, "must be one of "+strings.Join(actions[1:], ", "))
	rule(s.signers == "" || path.IsAbs(s.signers), "signers", s.signers, "must be absolute")

	if path.IsAbs(s.mount) {
		s.mount = path.Clean(s.mount)
	}
	for j := range s.dirs {
		d := &s.dirs[j]
		link, local := fmt.Sprintf("dirs[%d].link", j), fmt.Sprintf("dirs[%d].local", j)
		if d.link == "" {
			found = append(found, mistake{link, link + ": required"})
		} else if want := validLink(d.link); want != "" {
			rule(false, link, d.link, want)
		} else {
			d.link = path.Clean(d.link)
		}
		if want := s.validLocal(d.local, stateDir, configFile); want != "" {
			rule(false, local, d.local, want)
		} else if d.local != "" {
			d.local = path.Clean(d.local)
		}
	}
	return found
}

// validLink says what a link must be, if it is not.
func validLink(link string) string {
	clean := path.Clean(link)
	first, _, _ := strings.Cut(clean, "/")
	isGit := func(c string) bool { return strings.EqualFold(c, ".git") }
	switch {
	case path.IsAbs(link):
		return "must be relative"
	case first == ".", first == "..":
		return "must be a path inside the repository"
	case slices.ContainsFunc(strings.Split(clean, "/"), isGit), first == ourDir:
		return "must not contain .git or start with " + ourDir
	case hasControl(link):
		return "must not contain control characters"
	}
	return ""
}

// validLocal says what a local must be, if it is not.
func (s *spec) validLocal(local, stateDir, configFile string) string {
	clean, configDir := path.Clean(local), path.Dir(configFile)
	hidesConfig := within(configDir, clean)
	besideConfig := within(clean, configDir) && !slices.Contains(systemDirs, configDir) // /etc/gitopper.toml is no harm
	switch {
	case local == "":
		return ""
	case !path.IsAbs(local), clean == "/", hasControl(local):
		return "must be an absolute path other than /"
	case slices.Contains(systemDirs, clean):
		return "must not be a directory that a system stands on: name what the service reads in it"
	case path.IsAbs(s.mount) && nested(clean, path.Clean(s.mount)):
		return fmt.Sprintf("must not be in, around or equal to mount %q", s.mount)
	case nested(clean, stateDir):
		return fmt.Sprintf("must not be in, around or equal to the state directory %q", stateDir)
	case hidesConfig, besideConfig:
		return fmt.Sprintf("must not be in, around or equal to the directory of the config file, %q", configDir)
	}
	return ""
}

// hasControl says whether a text could steer a terminal or end a line.
func hasControl(s string) bool {
	return strings.ContainsFunc(s, func(r rune) bool { return r < ' ' || r == 0x7f })
}

// within says whether one clean absolute path is another or lies in it.
func within(p, top string) bool {
	return p == top || strings.HasPrefix(p, strings.TrimSuffix(top, "/")+"/")
}

// nested says whether one of two clean absolute paths is the other or lies in it.
func nested(a, b string) bool { return within(a, b) || within(b, a) }

// validUpstream says what an upstream must be, if it is not.
func validUpstream(u string) string {
	scheme, _, isURL := strings.Cut(u, "://")
	first, _, _ := strings.Cut(u, "/")
	isPath := !isURL && !strings.Contains(first, ":") // else it is HOST:PATH
	switch {
	case u == "":
		return "required"
	case strings.HasPrefix(u, "-"), hasControl(u):
		return "must be a URL or a path, without a leading - or control characters"
	case isURL && !slices.Contains([]string{"https", "http", "ssh", "git", "file"}, scheme):
		return "must be an https, http, ssh, git or file URL, or a path"
	case !isURL && strings.Contains(u, "::"):
		return "must not name a transport helper"
	case isPath && !path.IsAbs(u):
		return "a path must be absolute"
	}
	return ""
}

// validBranch follows git-check-ref-format(1), --branch.
func validBranch(b string) bool {
	isWord := b == "" || b == "@" || b == "HEAD"
	hasSign := strings.ContainsAny(b, " ~^:?*[\\") || hasControl(b)
	hasPair := strings.Contains(b, "..") || strings.Contains(b, "@{")
	if isWord || hasSign || hasPair || b[0] == '-' || strings.HasSuffix(b, ".") {
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
	machine := func(s *spec) string {
		if slices.Contains(p.names, s.machine) {
			return p.names[0]
		}
		return s.machine
	}
	for i := range p.entries {
		a := &p.entries[i]
		p.fight(fmt.Sprintf("service %q", a.service), a.dirs, a.dirs, true)
		for j := range p.entries[:i] {
			b := &p.entries[j]
			if machine(a) == machine(b) {
				p.rivals(b, a)
			}
		}
	}
}

// rivals tells what two entries for one machine would fight over, the earlier one first.
func (p *parser) rivals(a, b *spec) {
	who := fmt.Sprintf("services %q and %q", a.service, b.service)
	at, bt := a.checkout(), b.checkout()
	switch {
	case strings.TrimSuffix(a.service, ".service") == strings.TrimSuffix(b.service, ".service"):
		p.errorf("service %q: twice on machine %q", a.service, a.machine)
	case at == bt:
		p.errorf("%s: checkouts %s: must not be the same", who, at)
	}
	p.fight(who, a.dirs, b.dirs, false)
	for _, pair := range [][2]*spec{{a, b}, {b, a}} {
		s, other := pair[0], pair[1]
		for _, d := range s.dirs {
			if link := filepath.Join(s.checkout(), d.link); d.link != "" && within(other.checkout(), link) {
				p.errorf("%s: checkout %s of %q: must not be at or below link %s", who, other.checkout(), other.service, link)
			}
			if d.local != "" && nested(d.local, other.checkout()) {
				p.errorf("service %q: local %q: must not be in, around or equal to checkout %q of service %q",
					s.service, d.local, other.checkout(), other.service)
			}
		}
	}
}

// fight tells of locals that are the same or nest: of two lists, or of one, which is then given twice.
func (p *parser) fight(who string, dirs, others []dir, same bool) {
	for k, d := range dirs {
		for l, e := range others {
			bothMounted := d.local != "" && e.local != ""
			isPair := !same || l > k
			if isPair && bothMounted && nested(d.local, e.local) {
				p.errorf("%s: locals %q and %q: must not be the same or nest", who, d.local, e.local)
			}
		}
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

// warnings tells of what is no mistake, but perhaps not what was meant: no entry for this machine, and files of the config
// that others than root can write, or put something else in the place of.
func (c *config) warnings(o options) (found []string) {
	if len(c.services) == 0 {
		found = append(found, fmt.Sprintf("%s: no entry for this machine (%s): mounts of before stay",
			o.configPath(), strings.Join(o.names, ", ")))
	}
	for _, name := range slices.Sorted(maps.Keys(c.files)) {
		if slices.ContainsFunc([]string{name, filepath.Dir(name)}, othersWrite) {
			found = append(found, fmt.Sprintf("%s: it, or its directory, can be written by others than root", name))
		}
	}
	return found
}

// othersWrite says whether others than root can write a file, or names in a directory.
func othersWrite(name string) bool {
	fi, err := os.Stat(name)
	if err != nil || fi.Mode()&os.ModeSticky != 0 {
		return false
	}
	return fi.Mode()&0o022 != 0 || fi.Sys().(*syscall.Stat_t).Uid != 0
}
