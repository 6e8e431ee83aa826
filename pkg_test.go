//go:build linux

package main

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// newFakePackages puts every package manager on the path, and returns the directory in which they work.
func newFakePackages(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	linkFakes(t, dir, "dpkg-query", "apt-get", "rpm", "dnf", "zypper", "pacman", "apk")
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	t.Setenv("FAKE_PACKAGES", dir)
	return dir
}

// packageLog returns what the fake managers were told since it was last read.
func packageLog(dir string) string {
	log, _ := os.ReadFile(filepath.Join(dir, "log"))
	os.Remove(filepath.Join(dir, "log"))
	return strings.TrimSpace(string(log))
}

// fakeDebian is a check by fake managers, whose database is a file of the test's.
func fakeDebian(t *testing.T, dir string) *packageCheck {
	t.Helper()
	m, err := findPackageManager("ID=debian\n")
	if err != nil {
		t.Fatal(err)
	}
	m.database = []string{filepath.Join(dir, "status"), filepath.Join(dir, "nonesuch")}
	return &packageCheck{manager: m}
}

func TestPackageManagers(t *testing.T) {
	const apt = "apt-get install -q -y --no-remove --no-upgrade -o DPkg::Lock::Timeout=600 " +
		"-o Dpkg::Options::=--force-confdef -o Dpkg::Options::=--force-confold -- "
	const lists = "apt-get update -q -o DPkg::Lock::Timeout=600"
	for _, tc := range []struct{ name, osRelease, pkg, log string }{
		{"Debian", "ID=debian\n", "p", apt + "p"},
		{"relative of Ubuntu", "ID=\"linuxmint\"\nID_LIKE=\"ubuntu debian\"\n", "needs-lists",
			apt + "needs-lists\n" + lists + "\n" + apt + "needs-lists"},
		{"Fedora", "NAME=x\nID=fedora\n", "p", "dnf install -y -- p"},
		{"relative of RHEL", "ID=\"rocky\"\nID_LIKE=\"rhel centos fedora\"", "p", "dnf install -y -- p"},
		{"SUSE", "ID=\"opensuse-leap\"\nID_LIKE=\"suse opensuse\"\n", "p",
			"zypper --non-interactive install --no-recommends -- p"},
		{"Arch", "ID=arch\n", "p", "pacman -S --noconfirm --needed -- p"},
		{"Alpine", "ID=alpine\n", "p", "apk add -q --no-interactive --wait 600 p"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			dir := newFakePackages(t)
			m, err := findPackageManager(tc.osRelease)
			if err != nil {
				t.Fatal(err)
			}
			m.database = nil // of this host
			p := packageCheck{manager: m}
			for _, want := range []string{"asked\nasked\n" + tc.log + "\nasked", "asked"} { // then nothing is to be done
				added, err := p.ensure(context.Background(), tc.pkg, func(string) {})
				if first := want != "asked"; err != nil || added != first {
					t.Errorf("added: %v, %v", added, err)
				}
				if log := packageLog(dir); log != want {
					t.Errorf("ran:\n%s\nwant:\n%s", log, want)
				}
			}
		})
	}
	if _, err := findPackageManager("ID=plan9\n"); !errorSays(err, "no package manager known") {
		t.Error(err)
	}
}

// TestPackageReasons: an error names the manager's step to everybody, and the reason to those who may read
// it.
func TestPackageReasons(t *testing.T) {
	dir := newFakePackages(t)
	for pkg, reasons := range map[string][]string{
		"nonesuch": {"E: Unable to locate package nonesuch"},
		"broken":   {"no room for the index", "dpkg: error processing package broken", "returned an error code (1)"},
	} {
		var steps []string
		_, err := fakeDebian(t, dir).ensure(context.Background(), pkg, func(s string) { steps = append(steps, s) })
		if err == nil || len(steps) != 1 || steps[0] != "install "+pkg {
			t.Fatalf("%s: %v after %q", pkg, err, steps)
		}
		if got, want := public(err.Error()), "package "+pkg+": apt-get install: exit status 100"; got != want {
			t.Errorf("%q, want %q", got, want)
		}
		for _, reason := range reasons {
			if !strings.Contains(unmark(err.Error()), reason) {
				t.Errorf("%q does not say %q", unmark(err.Error()), reason)
			}
		}
	}
}

// TestPackageBesideTrouble: what is there after all is no trouble, whatever else the manager met.
func TestPackageBesideTrouble(t *testing.T) {
	dir := newFakePackages(t)
	added, err := fakeDebian(t, dir).ensure(context.Background(), "beside-broken", func(string) {})
	if err != nil || !added {
		t.Errorf("added %v, %v", added, err)
	}
}

// TestPackageRemoved: nobody is asked for a package that was there while the database is as it was then; a
// removal is noticed.
func TestPackageRemoved(t *testing.T) {
	dir := newFakePackages(t)
	p := fakeDebian(t, dir)
	status := p.manager.database[0]
	touch := func(at int64) {
		t.Helper()
		if err := os.WriteFile(status, nil, 0o644); err != nil {
			t.Fatal(err)
		}
		if err := os.Chtimes(status, time.Time{}, time.Unix(at, 0)); err != nil {
			t.Fatal(err)
		}
	}
	ensure := func(wantAdded bool, wantAsked int) {
		t.Helper()
		added, err := p.ensure(context.Background(), "p", func(string) {})
		asked := strings.Count(packageLog(dir), "asked")
		if err != nil || added != wantAdded || asked != wantAsked {
			t.Errorf("added %v, asked %d times, %v", added, asked, err)
		}
	}

	ensure(true, 3)
	ensure(false, 1) // without a database it is asked each time
	touch(1000)
	ensure(false, 1)
	ensure(false, 0)
	touch(2000) // another package's
	ensure(false, 1)
	ensure(false, 0)
	touch(500) // from a backup, without the package
	os.Remove(filepath.Join(dir, "p.installed"))
	ensure(true, 3)
	ensure(false, 0)
}

// TestPackageWaits: who waits for another's install gives up at our end, and has begun nothing.
func TestPackageWaits(t *testing.T) {
	dir := newFakePackages(t)
	packageLock <- struct{}{}
	defer func() { <-packageLock }()
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()

	added, err := fakeDebian(t, dir).ensure(ctx, "p", func(s string) { t.Error(s) })
	if added || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("added %v, %v", added, err)
	}
	if log := packageLog(dir); strings.Contains(log, "install") {
		t.Error(log)
	}
}
