//go:build linux

package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"time"
)

const installLimit = 30 * time.Minute

// packageManager is one family of distributions: how to ask for a package, how to install one without
// questions or upgrades, and how to bring its lists up to date where install needs that.
type packageManager struct {
	ids                    []string // ID of os-release(5)
	query, install, update []string // the package's name is appended to the first two
	installed              string   // what query must print; empty: its exit status says it
	env                    []string
	database               []string // one of these has a new mtime after each change of what is installed
}

// rpmDatabase is that of SQLite (and what is not yet merged into it), Berkeley DB and ndb. Other files there,
// and the directory, change also when somebody only asks.
var rpmDatabase = []string{"/var/lib/rpm/rpmdb.sqlite", "/var/lib/rpm/rpmdb.sqlite-wal",
	"/var/lib/rpm/Packages", "/var/lib/rpm/Packages.db"}

// Managers wait ten minutes for each other's locks where they can be told to.
var packageManagers = []packageManager{
	{
		ids: []string{"debian", "ubuntu"}, database: []string{"/var/lib/dpkg/status"},
		query:     []string{"dpkg-query", "-W", "-f=${db:Status-Status}\\n", "--"},
		installed: "installed",
		install: []string{"apt-get", "install", "-q", "-y", "--no-remove", "--no-upgrade",
			"-o", "DPkg::Lock::Timeout=600",
			"-o", "Dpkg::Options::=--force-confdef", "-o", "Dpkg::Options::=--force-confold", "--"},
		update: []string{"apt-get", "update", "-q", "-o", "DPkg::Lock::Timeout=600"},
		env:    []string{"DEBIAN_FRONTEND=noninteractive", "NEEDRESTART_MODE=l"},
	},
	{
		ids: []string{"fedora", "rhel", "centos"}, database: rpmDatabase,
		query:   []string{"rpm", "-q", "--"},
		install: []string{"dnf", "install", "-y", "--"}, // -q would keep scripts' words from us
	},
	{
		ids: []string{"suse", "opensuse", "sles"}, database: rpmDatabase,
		query:   []string{"rpm", "-q", "--"},
		install: []string{"zypper", "--non-interactive", "install", "--no-recommends", "--"},
		env:     []string{"ZYPP_LOCK_TIMEOUT=600"},
	},
	{
		ids: []string{"arch", "archlinux"}, database: []string{"/var/lib/pacman/local"},
		query:   []string{"pacman", "-Q", "--"},
		install: []string{"pacman", "-S", "--noconfirm", "--needed", "--"},
	},
	{
		ids: []string{"alpine"}, database: []string{"/lib/apk/db/installed", "/usr/lib/apk/db/installed"},
		query:   []string{"apk", "info", "-q", "-e"},
		install: []string{"apk", "add", "-q", "--no-interactive", "--wait", "600"},
		update:  []string{"apk", "update", "-q", "--wait", "600"},
	},
}

// packageLock: a host installs one package at a time.
var packageLock = make(chan struct{}, 1)

// findPackageManager picks the row for the host's os-release(5), by ID and then by ID_LIKE.
func findPackageManager(osRelease string) (*packageManager, error) {
	var ids []string
	for line := range strings.Lines(osRelease) { // ID=ubuntu, ID_LIKE="rhel centos fedora"
		k, v, _ := strings.Cut(strings.TrimSpace(line), "=")
		switch v = strings.Trim(v, `"'`); k {
		case "ID":
			ids = slices.Insert(ids, 0, v)
		case "ID_LIKE":
			ids = append(ids, strings.Fields(v)...)
		}
	}

	for _, id := range ids {
		for _, m := range packageManagers {
			if !slices.Contains(m.ids, id) {
				continue
			}
			if _, err := exec.LookPath("dnf"); err != nil && m.install[0] == "dnf" {
				m.install = append([]string{"yum"}, m.install[1:]...)
			}
			return &m, nil
		}
	}
	return nil, fmt.Errorf("no package manager known for this system (os-release says %q): "+
		"install it by hand and remove package from the config", ids)
}

// packageCheck sees to it that one service's package is there. The zero value is ready to use.
type packageCheck struct {
	manager *packageManager
	seen    time.Time // of the manager's database when the package was last there; zero: it was not
}

// ensure installs the package name if it is missing, and says whether it did. While the manager's database is
// as when the package was there nobody is asked. It waits for others' installs until ctx is done; an install
// under way is finished, and at its time limit only asked to end. Errors hold private words.
func (p *packageCheck) ensure(ctx context.Context, name string, step func(string)) (added bool, err error) {
	if ok, err := p.has(ctx, name); ok || err != nil {
		return false, err
	}

	select {
	case packageLock <- struct{}{}:
		defer func() { <-packageLock }()
	case <-ctx.Done():
		return false, ctx.Err()
	}
	// While we waited, another service may have brought it.
	if ok, err := p.has(ctx, name); ok || err != nil {
		return false, err
	}

	step("install " + name)
	ctx = context.WithoutCancel(ctx)
	trouble := p.manager.add(ctx, name)
	added, err = p.has(ctx, name)
	switch {
	case !added:
		nothing := fmt.Errorf("%s succeeded, but it is not installed", p.manager.install[0])
		err = fmt.Errorf("package %s: %w", name, cmp.Or(trouble, err, nothing))
	case trouble != nil: // of another package, or of a script on which its manager does not insist
		slog.Warn(fmt.Sprintf("package %s is installed, but: %v", name, trouble))
	}
	return added, err
}

// findManager picks the row for this host, once.
func (p *packageCheck) findManager() error {
	if p.manager != nil {
		return nil
	}

	osRelease, err := os.ReadFile("/etc/os-release")
	if err != nil {
		osRelease, err = os.ReadFile("/usr/lib/os-release")
	}
	if err == nil {
		p.manager, err = findPackageManager(string(osRelease))
	}
	return err
}

// has says whether the package is there.
func (p *packageCheck) has(ctx context.Context, name string) (bool, error) {
	if err := p.findManager(); err != nil {
		return false, fmt.Errorf("package %s: %w", name, err)
	}

	m := p.manager
	now := m.changed() // before the package is asked for, lest a change in between is missed
	if !now.IsZero() && now.Equal(p.seen) {
		return true, nil
	}

	p.seen = time.Time{}
	cmd := exec.Command(m.query[0], append(slices.Clone(m.query[1:]), name)...)
	out, err := execute(ctx, program{name: m.query[0], cmd: cmd, limit: localLimit})
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.Exited() {
		return false, nil // all of them end with another status for a package they don't have
	}

	words := strings.Fields(string(out)) // one an architecture
	there := m.installed == "" || slices.Contains(words, m.installed)
	if err != nil || !there {
		return false, err
	}
	p.seen = now
	return true, nil
}

// changed is when what is installed last changed; zero where that is not known.
func (m *packageManager) changed() time.Time {
	var last time.Time
	for _, name := range m.database {
		if fi, err := os.Stat(name); err == nil && fi.ModTime().After(last) {
			last = fi.ModTime()
		}
	}
	return last
}

// add installs a package. The lists of a fresh host may be missing or outdated: it tries with new ones as
// well.
func (m *packageManager) add(ctx context.Context, name string) error {
	install := append(slices.Clone(m.install), name)
	err := m.run(ctx, install)
	if err != nil && m.update != nil && m.run(ctx, m.update) == nil {
		err = m.run(ctx, install)
	}
	return err
}

func (m *packageManager) run(ctx context.Context, args []string) error {
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Env = append(os.Environ(), m.env...)
	cmd.Stdout = &tail{} // with stderr: packages' own scripts may say on either what is wrong
	p := program{name: strings.Join(args[:2], " "), cmd: cmd, limit: installLimit, private: true}
	p.end = syscall.SIGTERM
	_, err := execute(ctx, p)
	return err
}
