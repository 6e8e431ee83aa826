//go:build linux

package main

import (
	"context"
	"fmt"
	"maps"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
)

// mistake is what is wrong with one option of an entry.
type mistake struct{ option, text string }

var (
	machineName = regexp.MustCompile(`^[\pL\pN_][\pL\pN_.-]*$`)
	unitName    = regexp.MustCompile(`^[A-Za-z0-9:_\\@][A-Za-z0-9:_.\\@-]*$`)
	accountName = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_.-]*\$?$`)
	// git-check-ref-format(1), --branch
	badBranch = regexp.MustCompile(
		`^@?$|^HEAD$|^-|[\x00-\x20\x7f~^:?*\[\\]|\.\.|@\{|(^|/)([./]|$)|\.lock(/|$)|\.$`)

	packageName = regexp.MustCompile(`^[A-Za-z0-9@][A-Za-z0-9@+._:/-]*$`)
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
	rule(!badBranch.MatchString(s.branch), "branch", s.branch, "must be a valid branch name")
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
	isAction := slices.Contains(actions, s.action)
	rule(isAction, "action", s.action, "must be one of "+strings.Join(actions[1:], ", "))
	rule(s.signers == "" || path.IsAbs(s.signers), "signers", s.signers, "must be absolute")

	if path.IsAbs(s.mount) {
		s.mount = path.Clean(s.mount)
	}
	for j := range s.dirs {
		found = append(found, s.validateDir(j, stateDir, configFile)...)
	}
	return found
}

// validateDir is validate for one of the dirs.
func (s *spec) validateDir(j int, stateDir, configFile string) (found []mistake) {
	d := &s.dirs[j]
	judge := func(option string, value *string, want string) {
		name := fmt.Sprintf("dirs[%d].%s", j, option)
		if want != "" {
			found = append(found, mistake{name, fmt.Sprintf("%s %q: %s", name, *value, want)})
		} else if *value != "" {
			*value = path.Clean(*value)
		}
	}
	judge("link", &d.link, validLink(d.link))
	judge("local", &d.local, s.validLocal(d.local, stateDir, configFile))
	if d.group != "" && !accountName.MatchString(d.group) {
		judge("group", &d.group, "must be a group's name")
	}
	isOther := func(o dir) bool {
		hasSame := o.mode == d.mode && o.group == d.group
		return o.link == d.link && !hasSame
	}
	if slices.ContainsFunc(s.dirs[:j], isOther) {
		judge("link", &d.link, "must have the same mode and group wherever it is linked")
	}
	if i := slices.IndexFunc(s.dirs[:j], d.clashes); i >= 0 {
		judge("local", &d.local, fmt.Sprintf("must not be in, around or equal to local %q", s.dirs[i].local))
	}
	return found
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
	case !path.IsAbs(local), clean == "/", hasControl(local):
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
	case at == bt:
		p.errorf("%s: checkouts %s: must not be the same", who, at)
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

// warnings tells of what is no mistake, but perhaps not what was meant: no entry for this machine, and files
// of the config that others than root can write, or put something else in the place of.
func (c *config) warnings(o options) (found []string) {
	if len(c.services) == 0 {
		found = append(found, fmt.Sprintf("%s: no entry for this machine (%s): mounts of before stay",
			o.configPath(), strings.Join(o.names, ", ")))
	}
	for _, name := range slices.Sorted(maps.Keys(c.files)) {
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
