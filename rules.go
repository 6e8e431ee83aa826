//go:build linux

package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"unicode"
)

// mistake is what is wrong with one option of an entry.
type mistake struct{ option, text string }

type mistakes []mistake

// unless adds that the value of an option is not what is wanted, if it is not.
func (m *mistakes) unless(ok bool, option, value, want string) {
	if !ok {
		*m = append(*m, mistake{option, fmt.Sprintf("%s %q: %s", option, value, want)})
	}
}

// What values of options look like; those that may be left out may be empty.
var (
	machineName = regexp.MustCompile(`^$|^[\pL\pN_][\pL\pN_.-]*$`)
	unitName    = regexp.MustCompile(`^[A-Za-z0-9:_\\@][A-Za-z0-9:_.\\@-]{0,199}$`)
	accountName = regexp.MustCompile(`^$|^[A-Za-z_][A-Za-z0-9_.-]*\$?$`)
	// git-check-ref-format(1), --branch
	badBranch = regexp.MustCompile(
		`^@?$|^HEAD$|^-|[\x00-\x20\x7f~^:?*\[\\]|\.\.|@\{|(^|/)([./]|$)|\.lock(/|$)|\.$`)

	packageName = regexp.MustCompile(`^$|^[A-Za-z0-9@][A-Za-z0-9@+._:/-]*$`)
	actions     = []string{
		"", "start", "restart", "reload", "try-restart", "reload-or-restart",
		"try-reload-or-restart", "stop", "kill",
	}
	// What a system stands on: a mount over one of these hides far more than a service's files.
	systemDirs = strings.Fields(`
		/bin /boot /dev /etc /home /lib /lib32 /lib64 /media /mnt /opt /proc /root /run /sbin /srv /sys /tmp
		/usr /usr/bin /usr/lib /usr/local /usr/sbin /usr/share
		/var /var/cache /var/lib /var/log /var/run /var/spool /var/tmp
		/etc/systemd /etc/systemd/system /run/systemd /usr/lib/systemd`)
)

// validate looks for mistakes in an entry by itself, and brings its paths to their shortest form.
func (s *spec) validate(stateDir, configFile string) (found mistakes) {
	want := validUpstream(s.upstream)
	found.unless(want == "", "upstream", redact(s.upstream), want)
	found.unless(!badBranch.MatchString(s.branch), "branch", s.branch, "must be a valid branch name")
	found.unless(s.machine != "", "machine", s.machine, "required")
	found.unless(machineName.MatchString(s.machine), "machine", s.machine, "must be the name of one host")
	found.unless(isPath(s.mount), "mount", s.mount, "required, must be absolute and not /")
	found.unless(unitName.MatchString(s.service), "service", s.service,
		`required, must be a unit name: letters, digits and :_.@\-, no leading - or .`)
	found.unless(accountName.MatchString(s.user), "user", s.user, "must be an account name")
	found.unless(packageName.MatchString(s.pkg), "package", s.pkg, "must be a package name")
	isAction := slices.Contains(actions, s.action)
	found.unless(isAction, "action", s.action, "must be one of "+strings.Join(actions[1:], ", "))
	found.unless(path.IsAbs(cmp.Or(s.signers, "/")), "signers", s.signers, "must be absolute")

	hasNoWord := s.check != nil && strings.Join(s.check[:min(1, len(s.check))], "") == ""
	if hasNoWord {
		found = append(found, mistake{"check", "check: must have at least one word"})
	}

	s.mount = clean(s.mount)
	for j := range s.dirs {
		found = append(found, s.validateDir(j, stateDir, configFile)...)
	}
	return found
}

// validateDir is validate for one of the dirs. What is wrong is taken away, so that nothing else is said of
// it.
func (s *spec) validateDir(j int, stateDir, configFile string) (found mistakes) {
	d, before := &s.dirs[j], s.dirs[:j]
	check := func(option string, value *string, want string) {
		name := fmt.Sprintf("dirs[%d].%s", j, option)
		if found.unless(want == "", name, *value, want); want != "" {
			*value = ""
		}
	}

	check("link", &d.link, validLink(d.link))
	check("local", &d.local, s.validLocal(d.local, stateDir, configFile))
	if !accountName.MatchString(d.group) {
		check("group", &d.group, "must be a group's name")
	}

	d.link, d.local = clean(d.link), clean(d.local)
	if slices.ContainsFunc(before, d.differs) {
		check("link", &d.link, "must have the same mode and group wherever it is linked")
	}
	if i := slices.IndexFunc(before, d.clashes); i >= 0 {
		check("local", &d.local, fmt.Sprintf("must not be in, around or equal to local %q", before[i].local))
	}
	return found
}

// clean is the shortest form of a path; no path is none.
func clean(p string) string {
	if p == "" {
		return ""
	}
	return path.Clean(p)
}

// differs says whether two dirs would show the same link with another mode or group.
func (d dir) differs(other dir) bool {
	d.local, other.local = "", ""
	return d.link != "" && d.link == other.link && d != other
}

// clashes says whether two locals are the same or nest.
func (d dir) clashes(other dir) bool {
	bothMounted := d.local != "" && other.local != ""
	return bothMounted && nested(d.local, other.local)
}

// validLink says what a link must be, if it is not.
func validLink(link string) string {
	clean := path.Clean(link)
	first, _, _ := strings.Cut(clean, "/")
	isGit := func(c string) bool { return strings.EqualFold(c, ".git") }
	switch {
	case link == "":
		return "required"
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
	isSystems := slices.Contains(systemDirs, configDir) // /etc/gitopper.toml is no harm
	besideConfig := within(clean, configDir) && !isSystems
	switch {
	case local == "":
		return ""
	case !isPath(local):
		return "must be an absolute path other than /"
	case slices.Contains(systemDirs, clean):
		return "must not be a directory that a system stands on: name what the service reads in it"
	case path.IsAbs(s.mount) && nested(clean, path.Clean(s.mount)):
		return fmt.Sprintf("must not be in, around or equal to mount %q", s.mount)
	case nested(clean, stateDir):
		return fmt.Sprintf("must not be in, around or equal to the state directory %q", stateDir)
	case hidesConfig, besideConfig:
		return fmt.Sprintf("must not be in, around or equal to the directory of the config file, %q",
			configDir)
	}
	return ""
}

// isPath says whether a text is an absolute path other than /.
func isPath(p string) bool { return path.IsAbs(p) && path.Clean(p) != "/" && !hasControl(p) }

// hasControl says whether a text could steer a terminal or end a line.
func hasControl(s string) bool { return strings.ContainsFunc(s, unicode.IsControl) }

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
		if a.machine == "" || a.service == "" {
			continue // which is told
		}
		for j := range p.entries[:i] {
			if b := &p.entries[j]; machine(a) == machine(b) {
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
		return
	case at == bt:
		p.errorf("%s: checkouts %s: must not be the same", who, at)
		return
	}

	for _, d := range a.dirs {
		if i := slices.IndexFunc(b.dirs, d.clashes); i >= 0 {
			p.errorf("%s: locals %q and %q: must not be the same or nest", who, d.local, b.dirs[i].local)
		}
	}

	p.trespass(a, b)
	p.trespass(b, a)
}

// trespass tells where s would hide or change what lies in the checkout of other.
func (p *parser) trespass(s, other *spec) {
	theirs := other.checkout()
	for _, d := range s.dirs {
		if link := filepath.Join(s.checkout(), d.link); d.link != "" && within(theirs, link) {
			p.errorf("services %q and %q: checkout %s of %q: must not be at or below link %s",
				s.service, other.service, theirs, other.service, link)
		}
		if d.local != "" && nested(d.local, theirs) {
			p.errorf("service %q: local %q: must not be in, around or equal to checkout %q of service %q",
				s.service, d.local, theirs, other.service)
		}
	}
}

// check is --check: mistakes of the config are its error, and what is worth a warning is told.
func (o options) check(ctx context.Context, stderr io.Writer) error {
	c, err := loadConfig(o, os.ReadFile)
	if err != nil {
		return err
	}
	for _, w := range slices.Concat(c.warnings(o), c.lacks(ctx)) {
		fmt.Fprintf(stderr, "gitopper: %s\n", w)
	}
	return nil
}

// warnings tells of what is no mistake, but perhaps not what was meant: no entry for this machine, and files
// that others than root can write, or put something else in the place of, and that decide what root does.
func (c *config) warnings(o options) (found []string) {
	if len(c.services) == 0 {
		found = append(found, fmt.Sprintf("%s: no entry for this machine (%s): mounts of before stay",
			o.configPath(), strings.Join(o.names, ", ")))
	}

	names := slices.Collect(maps.Keys(c.files))
	for _, s := range c.services {
		if s.signers != "" {
			names = append(names, s.signers)
		}
	}

	slices.Sort(names)
	for _, name := range slices.Compact(names) {
		if slices.ContainsFunc([]string{name, filepath.Dir(name)}, othersWrite) {
			found = append(found, name+": it, or its directory, can be written by others than root")
		}
	}
	return found
}

// lacks tells what entries need and this host has not, or not yet. It is no mistake of the config.
func (c *config) lacks(ctx context.Context) (found []string) {
	for _, s := range c.services {
		if _, err := lookupAccount(ctx, s.user); err != nil && s.pkg == "" { // a package may bring it
			found = append(found, fmt.Sprintf("service %q: %v", s.service, err))
		}
		if _, err := groupIDs(ctx, s.dirs); err != nil && s.pkg == "" {
			found = append(found, fmt.Sprintf("service %q: %v", s.service, err))
		}
		if _, err := os.Stat(s.signers); err != nil && s.signers != "" {
			found = append(found, fmt.Sprintf("service %q: signers: %v", s.service, err))
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

// validate finds what is wrong with the options, or does not go together.
func (o *options) validate() error {
	if o.interval <= 0 {
		return fmt.Errorf("-t %v: must be more than 0", o.interval)
	}
	if err := o.validateConfig(); err != nil {
		return err
	}
	for option, addr := range map[string]string{"--ssh": o.ssh, "--metric": o.metric} {
		if err := validAddress(addr); err != nil {
			return fmt.Errorf("%s: %w", option, err)
		}
	}
	return nil
}

// validateConfig is validate for what says where the config is.
func (o *options) validateConfig() error {
	isMissing := o.config == "" && o.mode != unitMode // which has a default
	switch {
	case (o.upstream == "") != (o.mount == ""):
		return errors.New("bootstrapping needs both -U, the repository, and -M, " +
			"the directory for its checkout")
	case o.upstream != "":
		return o.validateBootstrap()
	case isMissing:
		return errors.New("no config file: give one with -c; see gitopper --help")
	case o.pull:
		return errors.New("-P goes with -U")
	}
	return nil
}

func (o *options) validateBootstrap() error {
	if !filepath.IsLocal(o.config) {
		return fmt.Errorf("-c %q: with -U it must be a file in the directory %s of the repository",
			o.config, o.directory)
	}

	own := o.ownSpec()
	if found := own.validate(o.stateDir, o.configPath()); len(found) > 0 {
		return fmt.Errorf("bootstrap: %s", found[0].text)
	}
	return nil
}

// validAddress is an error for what is no HOST:PORT, as far as it can be before the network is there.
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
