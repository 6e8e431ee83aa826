package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"time"
)

const installLimit = 30 * time.Minute

// packageManager is one family of distributions: the IDs of os-release(5) that have it, how to ask for a package, how to
// install one without questions or upgrades, and how to bring its lists up to date where install needs that.
type packageManager struct {
	ids                    []string
	query, install, update []string // the package's name is appended to the first two
	installed              string   // what query must print; empty: its exit status says it
	env                    []string
}

// Managers wait ten minutes for each other's locks where they can be told to.
var packageManagers = []packageManager{
	{
		ids:       []string{"debian", "ubuntu"},
		query:     []string{"dpkg-query", "-W", "-f=${db:Status-Status}\\n", "--"},
		installed: "installed",
		install: []string{"apt-get", "install", "-q", "-y", "--no-remove", "--no-upgrade", "-o", "DPkg::Lock::Timeout=600",
			"-o", "Dpkg::Options::=--force-confdef", "-o", "Dpkg::Options::=--force-confold", "--"},
		update: []string{"apt-get", "update", "-q", "-o", "DPkg::Lock::Timeout=600"},
		env:    []string{"DEBIAN_FRONTEND=noninteractive", "NEEDRESTART_MODE=l"},
	},
	{
		ids:     []string{"fedora", "rhel", "centos"},
		query:   []string{"rpm", "-q", "--"},
		install: []string{"dnf", "install", "-q", "-y", "--"},
	},
	{
		ids:     []string{"suse", "opensuse", "sles", "opensuse-leap", "opensuse-tumbleweed"},
		query:   []string{"rpm", "-q", "--"},
		install: []string{"zypper", "--non-interactive", "install", "--no-recommends", "--"},
		env:     []string{"ZYPP_LOCK_TIMEOUT=600"},
	},
	{
		ids:     []string{"arch", "archlinux"},
		query:   []string{"pacman", "-Q", "--"},
		install: []string{"pacman", "-S", "--noconfirm", "--needed", "--"},
	},
	{
		ids:     []string{"alpine"},
		query:   []string{"apk", "info", "-q", "-e"},
		install: []string{"apk", "add", "-q", "--no-interactive", "--wait", "600"},
		update:  []string{"apk", "update", "-q", "--wait", "600"},
	},
}

// packageLock: a host installs one package at a time.
var packageLock = make(chan struct{}, 1)

// findPackageManager picks the row for the host's os-release(5), by ID and then by ID_LIKE.
func findPackageManager(osRelease io.Reader) (packageManager, error) {
	var ids []string
	sc := bufio.NewScanner(osRelease)
	for sc.Scan() { // ID=ubuntu, ID_LIKE="rhel centos fedora"
		k, v, _ := strings.Cut(sc.Text(), "=")
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
			return m, nil
		}
	}
	return packageManager{}, fmt.Errorf("no package manager known for this system (os-release says %q): install it by hand and remove package from the config", ids)
}

// ensurePackage installs a package if it is missing, and says whether it did. Others wait for the package manager until ctx
// is done; an install under way is finished, and at its time limit only asked to end.
func ensurePackage(ctx context.Context, name string, step func(string)) (installed bool, err error) {
	f, err := os.Open("/etc/os-release")
	if errors.Is(err, os.ErrNotExist) {
		f, err = os.Open("/usr/lib/os-release")
	}
	if err != nil {
		return false, err
	}
	defer f.Close()
	m, err := findPackageManager(f)
	if err != nil {
		return false, fmt.Errorf("package %s: %w", name, err)
	}
	return m.ensure(ctx, name, step)
}

func (m *packageManager) ensure(ctx context.Context, name string, step func(string)) (installed bool, err error) {
	if ok, err := m.has(ctx, name); ok || err != nil {
		return false, err
	}
	select {
	case packageLock <- struct{}{}:
		defer func() { <-packageLock }()
	case <-ctx.Done():
		return false, ctx.Err()
	}
	// While we waited, another service may have brought it.
	if ok, err := m.has(ctx, name); ok || err != nil {
		return false, err
	}
	step("install " + name)
	ctx = context.WithoutCancel(ctx)
	_, err = m.run(ctx, m.install, name)
	if err != nil && m.update != nil {
		// On a fresh host the lists may be missing or outdated.
		if _, uerr := m.run(ctx, m.update); uerr == nil {
			_, err = m.run(ctx, m.install, name)
		}
	}
	if err != nil {
		return false, fmt.Errorf("package %s: %w", name, err)
	}
	if ok, err := m.has(ctx, name); !ok || err != nil {
		return false, errors.Join(fmt.Errorf("package %s: %s said that all is well, but it is not installed", name, m.install[0]), err)
	}
	return true, nil
}

func (m *packageManager) has(ctx context.Context, name string) (bool, error) {
	cmd := exec.Command(m.query[0], append(slices.Clone(m.query[1:]), name)...)
	out, err := execute(ctx, m.query[0], cmd, localLimit, syscall.SIGKILL)
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return false, nil // all of them end with another status for a package they don't have
	}
	return err == nil && (m.installed == "" || slices.Contains(strings.Fields(string(out)), m.installed)), err // a line an architecture
}

func (m *packageManager) run(ctx context.Context, args []string, more ...string) ([]byte, error) {
	cmd := exec.Command(args[0], append(slices.Clone(args[1:]), more...)...)
	cmd.Env = append(os.Environ(), m.env...)
	return execute(ctx, strings.Join(args[:2], " "), cmd, installLimit, syscall.SIGTERM)
}
