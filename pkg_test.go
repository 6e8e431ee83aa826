package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// fakePackages is every package manager: it logs its command line, installs what is asked for, and fails on demand.
func fakePackages(dir, program string, args []string) int {
	installed := filepath.Join(dir, args[len(args)-1]+".installed")
	_, err := os.Stat(installed)
	line := program + " " + strings.Join(args, " ")
	switch {
	case program == "dpkg-query" && err == nil:
		fmt.Print("installed")
		return 0
	case program == "dpkg-query", program == "rpm", program == "pacman" && args[0] == "-Q", program == "apk" && args[0] == "info":
		if err != nil {
			fmt.Fprintln(os.Stderr, "no such package")
			return 1
		}
		return 0
	}
	f, _ := os.OpenFile(filepath.Join(dir, "log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	fmt.Fprintln(f, line)
	f.Close()
	if strings.Contains(line, "update") {
		os.WriteFile(filepath.Join(dir, "updated"), nil, 0o644)
		return 0
	}
	_, updated := os.Stat(filepath.Join(dir, "updated"))
	if name := args[len(args)-1]; name == "nonesuch" || name == "needs-lists" && updated != nil {
		fmt.Fprintln(os.Stderr, "E: Unable to locate package", name)
		return 100
	}
	os.WriteFile(installed, nil, 0o644)
	return 0
}

func TestPackageManagers(t *testing.T) {
	for _, tc := range []struct{ name, osRelease, pkg, log, err string }{
		{"Debian", "ID=debian\n", "p", "apt-get install -q -y --no-remove --no-upgrade -o DPkg::Lock::Timeout=600 -o Dpkg::Options::=--force-confdef -o Dpkg::Options::=--force-confold -- p", ""},
		{"a relative of Ubuntu", "ID=\"linuxmint\"\nID_LIKE=\"ubuntu debian\"\n", "needs-lists", "apt-get install * -- needs-lists\napt-get update -q -o DPkg::Lock::Timeout=600\napt-get install * -- needs-lists", ""},
		{"Fedora", "NAME=x\nID=fedora\n", "p", "dnf install -q -y -- p", ""},
		{"a relative of RHEL", "ID=\"rocky\"\nID_LIKE=\"rhel centos fedora\"\n", "p", "dnf install -q -y -- p", ""},
		{"SUSE", "ID=\"opensuse-leap\"\nID_LIKE=\"suse opensuse\"\n", "p", "zypper --non-interactive install --no-recommends -- p", ""},
		{"Arch", "ID=arch\n", "p", "pacman -S --noconfirm --needed -- p", ""},
		{"Alpine", "ID=alpine\n", "p", "apk add -q --no-interactive --wait 600 p", ""},
		{"no such package", "ID=debian\n", "nonesuch", "*", "apt-get install: exit status 100: E: Unable to locate package nonesuch"},
		{"unknown system", "ID=plan9\n", "p", "", "no package manager known"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			dir := t.TempDir()
			exe, err := os.Executable()
			if err != nil {
				t.Fatal(err)
			}
			for _, p := range []string{"dpkg-query", "apt-get", "rpm", "dnf", "zypper", "pacman", "apk"} {
				if err := os.Symlink(exe, filepath.Join(dir, p)); err != nil {
					t.Fatal(err)
				}
			}
			t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
			t.Setenv("FAKE_PACKAGES", dir)
			m, err := findPackageManager(strings.NewReader(tc.osRelease))
			steps := 0
			for range 2 { // the second time there is nothing to do
				if err == nil {
					_, err = m.ensure(context.Background(), tc.pkg, func(string) { steps++ })
				}
			}
			log, _ := os.ReadFile(filepath.Join(dir, "log"))
			if !matchLines(tc.log, strings.TrimSpace(string(log))) {
				t.Errorf("ran:\n%swant:\n%s", log, tc.log)
			}
			if tc.err == "" && (err != nil || steps != 1) || tc.err != "" && (err == nil || !strings.Contains(err.Error(), tc.err)) {
				t.Errorf("%v after %d installs, want %q", err, steps, tc.err)
			}
		})
	}
}

// matchLines compares texts; a * in want stands for anything.
func matchLines(want, got string) bool {
	for i, part := range strings.Split(want, "*") {
		at := strings.Index(got, part)
		if at < 0 || i == 0 && at > 0 {
			return false
		}
		got = got[at+len(part):]
	}
	return got == "" || strings.HasSuffix(want, "*")
}
