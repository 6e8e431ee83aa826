//go:build linux

package main

import (
	"bytes"
	"debug/elf"
	"flag"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// formatted has groff look at a manual page, and wants no word of it.
func formatted(t *testing.T, page string) {
	t.Helper()
	if _, err := exec.LookPath("groff"); err != nil {
		t.Skip("needs groff")
	}
	for _, device := range []string{"utf8", "ascii", "ps"} {
		cmd := exec.Command("groff", "-man", "-ww", "-k", "-z", "-T"+device)
		cmd.Stdin = strings.NewReader(page)
		out, err := cmd.CombinedOutput()
		if err != nil || len(out) > 0 {
			t.Errorf("groff -T%s: %v\n%s", device, err, out)
		}
	}
}

// The manual page has every option, config key, metric and command.
func TestManual(t *testing.T) {
	tmp := t.TempDir()
	help, _, _ := gitopper(t, "--help")
	ctlHelp, _, _ := gitopper(t, "ctl", "--help")
	for name, text := range map[string]string{"help": help, "ctl-help": ctlHelp} {
		if err := os.WriteFile(filepath.Join(tmp, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.Command("go", "run", "testdata/manual.go", "v0.1.0", "2026-01-02",
		filepath.Join(tmp, "help"), filepath.Join(tmp, "ctl-help"), "README.md")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%v\n%s", err, &stderr)
	}
	formatted(t, string(out))

	page := strings.NewReplacer(`\-`, "-", `\:`, "", `\fB`, "", `\fR`, "", `\[u2026]`, "…").Replace(string(out))
	var want []string
	new(options).flags().VisitAll(func(f *flag.Flag) {
		want = append(want, strings.Repeat("-", min(2, len(f.Name)))+f.Name)
	})
	var s spec
	var d dir
	for _, table := range []map[string]any{s.options(), d.options()} {
		want = slices.AppendSeq(want, maps.Keys(table))
	}
	want = append(want, "keys", "path", "ro", "dirs")
	metrics, err := os.ReadFile("testdata/metrics.txt")
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range regexp.MustCompile(`(?m)^# TYPE (gitopper_\w+)`).FindAllStringSubmatch(string(metrics), -1) {
		want = append(want, m[1])
	}
	for _, m := range regexp.MustCompile(`(?m)^  (\w+ \w+|hdr|-\w) `).FindAllStringSubmatch(ctlHelp, -1) {
		want = append(want, m[1])
	}
	for _, r := range sshRoutes() {
		want = append(want, r.path)
	}
	if len(want) < 70 {
		t.Errorf("only %d words: %q", len(want), want)
	}
	for _, word := range want {
		if !regexp.MustCompile(`(^|[^\w-])` + regexp.QuoteMeta(word) + `($|[^\w-])`).MatchString(page) {
			t.Errorf("the manual page does not have %q", word)
		}
	}
}

// A release is the same bytes each time, static, and says what it is. It is built twice, for six platforms: that
// is for testdata/test --all.
func TestRelease(t *testing.T) {
	if os.Getenv("GITOPPER_TEST_ALL") == "" {
		return
	}
	t.Parallel()
	var sums []string
	dir := t.TempDir()
	for _, name := range []string{"first", "second"} {
		cmd := exec.Command("testdata/release", "v0.9.1", filepath.Join(dir, name))
		if name == "second" { // from elsewhere, with nothing kept from the first
			cmd.Env = append(os.Environ(), "TMPDIR="+t.TempDir(), "GOCACHE="+t.TempDir())
		}
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		text, err := os.ReadFile(filepath.Join(dir, name, "SHA256SUMS"))
		if err != nil {
			t.Fatal(err)
		}
		sums = append(sums, string(text))
	}
	if sums[0] != sums[1] {
		t.Errorf("two runs differ:\n%s\n%s", sums[0], sums[1])
	}
	if n := strings.Count(sums[0], "\n"); n != 7 {
		t.Errorf("%d files:\n%s", n, sums[0])
	}

	check := exec.Command("sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS")
	check.Dir = filepath.Join(dir, "first")
	if out, err := check.CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
	for _, arch := range []string{"amd64", "arm64", "arm"} {
		file, err := elf.Open(filepath.Join(dir, "first", "gitopper-v0.9.1-linux-"+arch))
		if err != nil {
			t.Fatal(err)
		}
		if libraries, _ := file.ImportedLibraries(); len(libraries) > 0 || file.Section(".interp") != nil {
			t.Errorf("%s is not static: %q", arch, libraries)
		}
		file.Close()
	}
	page, err := os.ReadFile(filepath.Join(dir, "first", "gitopper.8"))
	if err != nil {
		t.Fatal(err)
	}
	formatted(t, string(page))
	if !strings.Contains(string(page), "v0.9.1") {
		t.Error("the manual page does not name the version")
	}

	for args, want := range map[string]string{"": "testdata/release VERSION", "1.2.3": "want v0 or v1", "v0.9.1 " + dir: "is there already"} {
		out, err := exec.Command("testdata/release", strings.Fields(args)...).CombinedOutput()
		if err == nil || !strings.Contains(string(out), want) {
			t.Errorf("release %s: %v, %s", args, err, out)
		}
	}
}
