// Fake is the programs that can't run in a unit test: systemctl, journalctl and the package managers. Tests
// put links to it on $PATH under those names. It works in the directory that $FAKE or $FAKE_PACKAGES names.
package main

import (
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
)

func main() {
	name := filepath.Base(os.Args[0])
	switch name {
	case "systemctl":
		os.Exit(systemctl(os.Getenv("FAKE"), os.Args[1:]))
	case "journalctl":
		os.Exit(journalctl(os.Getenv("FAKE")))
	}
	os.Exit(packages(os.Getenv("FAKE_PACKAGES"), name, os.Args[1:]))
}

// systemctl is of a systemd with units that run from the start. Calls that change something are logged in
// dir/calls, each call in dir/asked. The file dir/UNIT holds a unit's ActiveState, and other properties in
// lines below. A file dir/fail-VERB makes a verb fail, and show if one of the units is called as it says; a
// unit whose dir/reads file says "bad" falls over when it is started, and its reload fails. daemon-reload
// makes dir/reloaded-UNIT the file of the unit.
func systemctl(dir string, args []string) int {
	isOption := func(a string) bool { return strings.HasPrefix(a, "-") }
	words := slices.DeleteFunc(args, isOption)
	defer appendLine(dir, "asked", words[0])

	switch words[0] {
	case "show":
		bad, err := os.ReadFile(filepath.Join(dir, "fail-show"))
		if err == nil && slices.Contains(words, string(bad)) {
			fmt.Fprintf(os.Stderr, "Failed to get properties of %s\n", bad)
			return 1
		}
		for _, name := range words[2:] {
			fmt.Println(properties(dir, name))
		}
		return 0
	case "list-units":
		listUnits(dir, words[1:])
		return 0
	}
	appendLine(dir, "calls", strings.Join(words, " "))
	return act(dir, words[0], words[len(words)-1])
}

func appendLine(dir, name, line string) {
	f, err := os.OpenFile(filepath.Join(dir, name), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(9)
	}
	defer f.Close()
	fmt.Fprintln(f, line)
}

// activeState is what the file of a unit says, whose first line is its state.
func activeState(dir, name string) string {
	for _, n := range []string{name, name + ".service", strings.TrimSuffix(name, ".service")} {
		if state, err := os.ReadFile(filepath.Join(dir, n)); err == nil {
			return string(state)
		}
	}
	if name == "shutdown.target" {
		return "inactive"
	}
	return "active"
}

// properties is what systemctl show prints of a unit.
func properties(dir, name string) string {
	state := activeState(dir, name)
	if path.Ext(name) == "" {
		name += ".service"
	}
	if strings.Contains(name, "@") {
		state += "\nUnitFileState=disabled"
	}
	return fmt.Sprintf("Id=%s\nLoadState=loaded\nSubState=x\nResult=success\nType=simple\n"+
		"NeedDaemonReload=no\nCanReload=yes\nNRestarts=0\nMainPID=0\nActiveState=%s\n", name, state)
}

// listUnits is systemctl list-units --state=active: it knows units by their Id alone.
func listUnits(dir string, patterns []string) {
	var names []string
	for _, p := range patterns {
		if !strings.Contains(p, "*") {
			names = append(names, p)
		}
		files, _ := filepath.Glob(filepath.Join(dir, p))
		for _, f := range files {
			names = append(names, filepath.Base(f))
		}
	}
	slices.Sort(names)

	for _, name := range slices.Compact(names) {
		is := map[string]string{}
		for line := range strings.Lines(properties(dir, name)) {
			key, value, _ := strings.Cut(strings.TrimSpace(line), "=")
			is[key] = value
		}
		if is["Id"] == name && is["LoadState"] == "loaded" && is["ActiveState"] == "active" {
			fmt.Printf("%-20s loaded active %s a unit of the test's\n", name, is["SubState"])
		}
	}
}

func act(dir, verb, unit string) int {
	if verb == "daemon-reload" {
		files, _ := filepath.Glob(filepath.Join(dir, "reloaded-*"))
		for _, f := range files {
			os.Rename(f, filepath.Join(dir, strings.TrimPrefix(filepath.Base(f), "reloaded-")))
		}
	}
	if _, err := os.Stat(filepath.Join(dir, "fail-"+verb)); err == nil {
		fmt.Fprintln(os.Stderr, "Job for", unit, "failed.")
		return 1
	}
	bad := false
	if reads, err := os.ReadFile(filepath.Join(dir, "reads")); err == nil {
		data, _ := os.ReadFile(string(reads))
		bad = strings.Contains(string(data), "bad")
	}

	switch verb {
	case "start", "restart", "reload":
		state := "active"
		if bad && verb != "reload" {
			state = "failed"
		}
		os.WriteFile(filepath.Join(dir, unit), []byte(state), 0o644)
		if bad {
			fmt.Fprintln(os.Stderr, "Job for", unit, "failed because of bad.")
			return 1
		}
	case "stop":
		os.WriteFile(filepath.Join(dir, unit), []byte("inactive"), 0o644)
	}
	return 0
}

// journalctl prints dir/journal.
func journalctl(dir string) int {
	words, _ := os.ReadFile(filepath.Join(dir, "journal"))
	os.Stdout.Write(words)
	return 0
}

// packages is every package manager: it logs its command line in dir/log (a query as "asked"), installs what
// is asked for, and fails on demand. The package broken has a script that fails.
func packages(dir, program string, args []string) int {
	name := args[len(args)-1]
	installed := filepath.Join(dir, name+".installed")
	line := program + " " + strings.Join(args, " ")

	switch query := program + " " + args[0]; {
	case program == "dpkg-query", program == "rpm", query == "pacman -Q", query == "apk info":
		appendLine(dir, "log", "asked")
		if _, err := os.Stat(installed); err != nil {
			fmt.Fprintln(os.Stderr, "no such package")
			return 1
		}
		fmt.Print("installed")
		return 0
	}
	appendLine(dir, "log", line)
	if strings.Contains(line, "update") {
		os.WriteFile(filepath.Join(dir, "updated"), nil, 0o644)
		return 0
	}

	_, noLists := os.Stat(filepath.Join(dir, "updated"))
	switch {
	case name == "nonesuch", name == "needs-lists" && noLists != nil:
		fmt.Fprintln(os.Stderr, "E: Unable to locate package", name)
		return 100
	case name == "broken":
		fmt.Println("Setting up broken (1.0) ...\nno room for the index")
		fmt.Fprintln(os.Stderr, "dpkg: error processing package broken (--configure):")
		fmt.Println("Errors were encountered while processing:\n broken")
		fmt.Fprintln(os.Stderr, "E: Sub-process /usr/bin/dpkg returned an error code (1)")
		return 100
	}
	os.WriteFile(installed, nil, 0o644)
	if name == "beside-broken" {
		return 100
	}
	return 0
}
