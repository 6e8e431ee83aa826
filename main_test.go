package main

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"
)

var update = flag.Bool("update", false, "rewrite golden files")

// TestMain gives the tests a mount namespace of their own (as root; else a user namespace in which they are root), and is
// the programs that can't run in a test: links on $PATH lead back to this binary.
func TestMain(m *testing.M) {
	switch base := filepath.Base(os.Args[0]); {
	case base == "systemctl":
		os.Exit(fakeSystemctl(os.Getenv("FAKE"), os.Args[1:]))
	case base == "journalctl":
		os.Exit(0)
	case os.Getenv("FAKE_PACKAGES") != "" && !strings.HasSuffix(base, ".test"):
		os.Exit(fakePackages(os.Getenv("FAKE_PACKAGES"), base, os.Args[1:]))
	case len(os.Args) > 1 && os.Args[1] == checkChild, os.Getenv("AS_GITOPPER") != "":
		os.Unsetenv("AS_GITOPPER")
		main()
	}
	if os.Getenv("TEST_NAMESPACE") == "" {
		os.Setenv("GORACE", "atexit_sleep_ms=0") // a second for each of the programs that this binary is
		os.Exit(inNamespace())
	}
	if err := syscall.Mount("", "/", "", syscall.MS_REC|syscall.MS_PRIVATE, ""); err != nil {
		fmt.Fprintln(os.Stderr, "make mounts private:", err)
		os.Exit(1)
	}
	os.Exit(m.Run())
}

func inNamespace() int {
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.Env = append(os.Environ(), "TEST_NAMESPACE=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	if os.Getuid() != 0 {
		cmd.SysProcAttr.Cloneflags |= syscall.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}}
	}
	err := cmd.Run()
	if cmd.ProcessState == nil {
		fmt.Fprintln(os.Stderr, "no mount namespace for the tests:", err)
		return 1
	}
	return cmd.ProcessState.ExitCode()
}

// golden compares got with testdata/name, or writes it there with -update.
func golden(t *testing.T, name, got string) {
	t.Helper()
	file := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("%s:\n--- got\n%s\n--- want\n%s", name, got, want)
	}
}

const testKey = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIIDYqGwEqRPDqhXcHBiMSwcBCCCtYRoLc6vBpXIJCdNg ops@example.org\n"

// configFiles is a reader of files that are in memory.
func configFiles(files map[string]string) func(string) ([]byte, error) {
	return func(name string) ([]byte, error) {
		if text, ok := files[name]; ok {
			return []byte(text), nil
		}
		return nil, &os.PathError{Op: "open", Path: name, Err: syscall.ENOENT}
	}
}

func TestLoadConfig(t *testing.T) {
	global := "[global]\nupstream = \"https://example.org/c.git\"\nmount = \"/srv/c\"\nkeys = [{path = \"k.pub\"}]\n"
	entry := func(lines string) string {
		return global + "[[services]]\nmachine = \"m\"\nservice = \"prometheus\"\n" + lines
	}
	pair := func(a, b string) string {
		return entry(a) + "[[services]]\nmachine = \"m2\"\nservice = \"caddy\"\n" + b
	}
	for _, tc := range []struct{ name, text, want string }{
		{"minimal", entry(""), ""},
		{"all options", entry(`branch = "canary/1"
user = "prometheus"
package = "prometheus"
action = "reload"
check = ["promtool", "check"]
fallback = false
settle = "10s"
signers = "/etc/signers"
dirs = [{local = "/etc/prometheus", link = "prom/etc/"}, {link = "a/../b", file = true}]`), ""},
		{"names in capitals", entry("Branch = \"x\"\n"), ""},
		{"no services", global, ""},
		{"same machine by two names", pair("dirs=[{local=\"/etc/x\",link=\"x\"}]\n", "dirs=[{local=\"/etc/x/y\",link=\"y\"}]"), `locals "/etc/x" and "/etc/x/y"`},
		{"syntax", "[global\n", "line 2, column 8: expected"},
		{"not toml", "\x00", "line 1"},
		{"unknown option", entry("acton = \"reload\""), `services[0] "prometheus": acton: unknown option, expected one of action, branch, check`},
		{"unknown table", entry("[globall]\n"), "top level: globall: unknown option"},
		{"wrong type", entry("branch = 5\ndirs = \"x\"\ncheck = \"nginx -t\""), `"prometheus": branch: must be a string` + "\n" + `"prometheus": check: must be a list of strings` + "\n" + `"prometheus": dirs: must be a list of tables`},
		{"no key", "[global]\n", "keys: at least one"},
		{"key without path", strings.Replace(entry(""), "path", "ro = true, path2", 1), "keys[0]: path2: unknown option"},
		{"missing key file", strings.Replace(entry(""), "k.pub", "/nope", 1), "keys[0]: open /nope: no such file"},
		{"bad key file", strings.Replace(entry(""), "k.pub", "bad.pub", 1), "keys[0]: /etc/gitopper/bad.pub: "},
		{"no upstream", strings.Replace(entry(""), "upstream = \"https://example.org/c.git\"", "", 1), `upstream "": required`},
		{"upstream is an option", entry("upstream = \"--upload-pack=x\""), `upstream "--upload-pack=x": must be a URL`},
		{"upstream is a helper", entry("upstream = \"ext::sh -c x\""), "must not name a transport helper"},
		{"upstream of another kind", entry("upstream = \"ftp://x/y\""), "must be an https, http, ssh, git or file URL"},
		{"upstream is relative", entry("upstream = \"x/y\""), "a path must be absolute"},
		{"upstream with a password", entry("upstream = \"gopher://u:secret@h/y\""), `upstream "gopher://***h/y"`},
		{"scp-like upstream", entry("upstream = \"git@example.org:x/y\""), ""},
		{"branch", entry("branch = \"a..b\""), `branch "a..b": must be a valid branch name`},
		{"branch is an option", entry("branch = \"-x\""), `branch "-x"`},
		{"relative mount", entry("mount = \"x\""), `mount "x": required, must be absolute`},
		{"service with slash", strings.Replace(entry(""), `"prometheus"`, `"a/b"`, 1), `service "a/b": required, must be a unit name`},
		{"service is an option", strings.Replace(entry(""), `"prometheus"`, `"-a"`, 1), `service "-a"`},
		{"no machine", strings.Replace(entry(""), "machine", "#", 1), `machine "": required`},
		{"user", entry("user = \"a b\""), `user "a b": must be an account name`},
		{"package", entry("package = \"-y\""), `package "-y": must be a package name`},
		{"action", entry("action = \"relaod\""), `action "relaod": must be one of start, restart`},
		{"empty check", entry("check = []"), "check: must have at least one word"},
		{"settle", entry("settle = \"6m\""), `"prometheus": settle: must be a duration of at most 5m, such as "3s"`},
		{"settle without unit", entry("settle = 5"), `settle: must be a duration`},
		{"signers", entry("signers = \"x\""), `signers "x": must be absolute`},
		{"local is /", entry(`dirs=[{local="/x/..",link="a"}]`), "must be an absolute path other than /"},
		{"local is relative", entry(`dirs=[{local="etc",link="a"}]`), "must be an absolute path"},
		{"local around mount", entry(`dirs=[{local="/srv",link="a"}]`), `must not be in, around or equal to mount "/srv/c"`},
		{"local in state", entry(`dirs=[{local="/var/lib/gitopper/x",link="a"}]`), `must not be in, around or equal to the state directory`},
		{"locals nest", entry(`dirs=[{local="/a",link="a"},{local="/a/b",link="b"}]`), `locals "/a" and "/a/b": must not be the same or nest`},
		{"link is missing", entry(`dirs=[{local="/a"}]`), "dirs[0].link: required"},
		{"link is absolute", entry(`dirs=[{local="/a",link="/a"}]`), `dirs[0].link "/a": must be relative`},
		{"link leaves", entry(`dirs=[{local="/a",link="a/../../b"}]`), "must be a path inside the repository"},
		{"link is everything", entry(`dirs=[{local="/a",link="."}]`), "must be a path inside the repository"},
		{"link into .git", entry(`dirs=[{local="/a",link="x/.GIT/y"}]`), "must not contain .git"},
		{"service twice", entry("") + "[[services]]\nmachine=\"m\"\nservice=\"prometheus.service\"\n", `service "prometheus": twice on machine "m"`},
		{"service on two machines", entry("") + "[[services]]\nmachine=\"other\"\nservice=\"prometheus\"\n", ""},
		{"checkouts nest", entry("") + "[[services]]\nmachine=\"m\"\nservice=\"x\"\nmount=\"/srv/c/prometheus\"\n", `must not be the same or nest`},
		{"other machine is checked", entry("") + "[[services]]\nmachine=\"other\"\nservice=\"a/b\"\n", `services[1] "a/b": service "a/b"`},
		{"all at once", entry("action=\"x\"\nbranch=\"..\"\nuser=\"-\""), "branch \"..\": must be a valid branch name\n/etc/gitopper/config.toml: services[0] \"prometheus\": user \"-\": must be an account name\n/etc/gitopper/config.toml: services[0] \"prometheus\": action \"x\""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			o := options{config: "/etc/gitopper/config.toml", names: []string{"m", "m2"}, stateDir: "/var/lib/gitopper"}
			c, err := loadConfig(o, configFiles(map[string]string{o.config: tc.text, "/etc/gitopper/k.pub": testKey, "/etc/gitopper/bad.pub": "ssh-ed25519 AAAA"}))
			if tc.want == "" && err != nil || tc.want != "" && err == nil {
				t.Fatalf("got %v and %v, want an error with %q", c, err, tc.want)
			}
			if err != nil && !strings.Contains(strings.ReplaceAll(err.Error(), "/etc/gitopper/config.toml: services[0] \"prometheus\": check", "\"prometheus\": check"), tc.want) &&
				!containsLines(err.Error(), tc.want) {
				t.Errorf("got:\n%v\nwant in it:\n%s", err, tc.want)
			}
		})
	}
}

// containsLines says whether every line of want is in text.
func containsLines(text, want string) bool {
	for l := range strings.SplitSeq(want, "\n") {
		if !strings.Contains(text, l) {
			return false
		}
	}
	return true
}

// TestWrongDefaultIsToldOnce: not once for each entry that has it.
func TestWrongDefaultIsToldOnce(t *testing.T) {
	o := options{config: "/c/config.toml", names: []string{"m"}, stateDir: "/var/lib/gitopper"}
	_, err := loadConfig(o, configFiles(map[string]string{"/c/k.pub": testKey, o.config: `[global]
upstream = "/u.git"
mount = "/srv"
branch = ".."
keys = [{path = "k.pub"}]
[[services]]
machine = "m"
service = "a"
[[services]]
machine = "m"
service = "b"
branch = "a..b"
`}))
	want := `/c/config.toml: [global]: branch "..": must be a valid branch name
/c/config.toml: services[1] "b": branch "a..b": must be a valid branch name`
	if err == nil || err.Error() != want {
		t.Errorf("got:\n%v\nwant:\n%s", err, want)
	}
}

func TestLoadConfigMergesDefaults(t *testing.T) {
	o := options{config: "/c/config.toml", names: []string{"m"}, stateDir: "/var/lib/gitopper"}
	c, err := loadConfig(o, configFiles(map[string]string{"/c/k.pub": testKey, o.config: `[global]
upstream = "/u.git"
branch = "b"
mount = "/srv//c/"
user = "u"
action = "reload"
fallback = false
settle = "1s"
signers = "/s"
keys = [{path = "k.pub", ro = true}]
[[services]]
machine = "m"
service = "a"
[[services]]
machine = "m"
service = "b"
action = ""
fallback = true
settle = "0s"
user = ""
`}))
	if err != nil {
		t.Fatal(err)
	}
	a := spec{upstream: "/u.git", branch: "b", mount: "/srv/c", machine: "m", service: "a", user: "u", action: "reload", settle: time.Second, signers: "/s"}
	b := a
	b.service, b.action, b.fallback, b.settle, b.user = "b", "", true, 0, ""
	if got, want := fmt.Sprint(c.services), fmt.Sprint([]spec{a, b}); got != want {
		t.Errorf("got  %v\nwant %v", got, want)
	}
	if got, want := fmt.Sprint(c.keys, c.machines), "[{/c/k.pub true}] [m m]"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

func FuzzLoadConfig(f *testing.F) {
	f.Add("[global]\nupstream = \"/u\"\nmount = \"/m\"\nkeys = [{path = \"/k\"}]\n[[services]]\nmachine = \"m\"\nservice = \"s\"\ndirs = [{local = \"/l\", link = \"a/b\"}]\n")
	f.Add("services = 3\n[global]\nkeys = {}\n")
	f.Fuzz(func(t *testing.T, text string) {
		o := options{config: "/c", names: []string{"m"}, stateDir: "/var/lib/gitopper"}
		c, err := loadConfig(o, configFiles(map[string]string{"/c": text, "/k": testKey}))
		if err != nil {
			return
		}
		for _, s := range c.services {
			if again := s; len(again.validate(o.stateDir)) > 0 || fmt.Sprint(again) != fmt.Sprint(s) {
				t.Errorf("accepted, but not when looked at again: %+v", s)
			}
		}
	})
}

// gitopper runs the program as its user does, in a process of its own.
func gitopper(t *testing.T, args ...string) (stdout, stderr string, status int) {
	t.Helper()
	cmd := exec.Command("/proc/self/exe", args...)
	cmd.Args[0] = "gitopper"
	cmd.Env = append(os.Environ(), "AS_GITOPPER=1")
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); cmd.ProcessState == nil {
		t.Fatal(err)
	}
	return out.String(), errs.String(), cmd.ProcessState.ExitCode()
}

func TestCommandLine(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) string {
		t.Helper()
		file := filepath.Join(dir, name)
		if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		return file
	}
	t.Setenv("STATE_DIRECTORY", filepath.Join(dir, "state"))
	write("k.pub", testKey)
	good := write("good.toml", "[global]\nupstream = \"/nope\"\nmount = \""+dir+"/mount\"\nkeys = [{path = \"k.pub\"}]\n[[services]]\nmachine = \"nobody\"\nservice = \"x\"\n")
	bad := write("bad.toml", "[global]\nkeys = [{path = \"k.pub\"}]\n[[services]]\n")
	for _, tc := range []struct {
		name           string
		args           []string
		stdout, stderr string
		status         int
	}{
		{"no config", nil, "", "gitopper: no config file: give one with -c; see gitopper --help\n", 1},
		{"unknown option", []string{"-x"}, "", "gitopper: flag provided but not defined: -x: see gitopper --help\n", 1},
		{"argument", []string{"-c", good, "x"}, "", "gitopper: unexpected argument \"x\": see gitopper --help\n", 1},
		{"no time", []string{"-c", good, "-t", "0"}, "", "gitopper: -t 0s: must be more than 0\n", 1},
		{"half a bootstrap", []string{"-c", "x", "-U", "/u"}, "", "gitopper: bootstrapping needs both -U, the repository, and -M, the directory for its checkout\n", 1},
		{"check", []string{"--check", "-c", good, "-h", "nobody"}, "", "", 0},
		{"check for others", []string{"-check", "-c=" + good, "-h", "a,b", "--hosts", "c"}, "", "no entry for this machine", 0},
		{"check finds all", []string{"--check", "-c", bad}, "", `gitopper: ` + bad + `: services[0]: upstream "": required
gitopper: ` + bad + `: services[0]: machine "": required
gitopper: ` + bad + `: services[0]: mount "": required, must be absolute and not /
gitopper: ` + bad + `: services[0]: service "": required, must be a unit name: letters, digits and :_.@\-, no leading - or .
`, 1},
		{"start with it", []string{"-c", bad}, "", "services[0]: machine \"\": required\n", 1},
		{"missing config", []string{"-c", "/nope"}, "", "gitopper: config: open /nope: no such file or directory\n", 1},
		{"not for this machine", []string{"-c", good}, "", "nothing to do", 0},
		{"port in use", []string{"-c", good, "-h", "nobody", "-s", "", "-m", "256.0.0.1:0"}, "", "gitopper: --metric: listen tcp: ", 1},
		{"once, upstream away", []string{"-c", good, "-h", "nobody", "--once"}, "x  DIFF git ls-remote /nope: exit status 128: ", "gitopper: not all services are OK\n", 1},
	} {
		t.Run(tc.name, func(t *testing.T) {
			stdout, stderr, status := gitopper(t, tc.args...)
			if status != tc.status || !strings.Contains(stdout, tc.stdout) || !strings.Contains(stderr, tc.stderr) || tc.stderr == "" && stderr != "" {
				t.Errorf("got status %d\nstdout %s\nstderr %s\nwant %d\nstdout %s\nstderr %s", status, stdout, stderr, tc.status, tc.stdout, tc.stderr)
			}
			if _, err := os.Stat(filepath.Join(dir, "mount/x/.git")); err == nil {
				t.Error("it cloned")
			}
		})
	}
	help, _, _ := gitopper(t, "--help")
	golden(t, "help.txt", help)
	if version, _, status := gitopper(t, "--version"); status != 0 || !strings.HasPrefix(version, "gitopper ") || !strings.Contains(version, " go1.") {
		t.Errorf("--version: %q", version)
	}
}

func TestSecondInstance(t *testing.T) {
	dir := t.TempDir()
	unlock, err := lock(dir)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := lock(dir); err == nil || !strings.Contains(err.Error(), fmt.Sprintf("pid %d", os.Getpid())) {
		t.Errorf("second lock: %v, want our pid in it", err)
	}
	unlock()
	again, err := lock(dir)
	if err != nil {
		t.Fatal(err)
	}
	again()
}

func TestExecute(t *testing.T) {
	ctx := context.Background()
	dead, cancel := context.WithCancel(ctx)
	cancel()
	for _, tc := range []struct {
		name   string
		ctx    context.Context
		limit  time.Duration
		script string
		out    string
		err    string
	}{
		{"output", ctx, time.Minute, "echo a; echo b >&2", "a\n", ""},
		{"words", ctx, time.Minute, "echo first >&2; echo last >&2; exit 3", "", "job: exit status 3: first; last"},
		{"limit", ctx, 50 * time.Millisecond, "echo waiting >&2; sleep 100 & wait", "", "job: took longer than 50ms and was ended: waiting"},
		{"ended before", dead, time.Minute, "echo a", "", "job: context canceled"},
		{"locale", ctx, time.Minute, "echo $LC_ALL", "C\n", ""},
		{"left behind", ctx, time.Minute, "setsid sleep 100 & echo a", "a\n", ""},
		{"endless output", ctx, time.Minute, "head -c 90000000 /dev/zero", "", "job: more than 64 MiB of output"},
		{"leaves its group", ctx, 200 * time.Millisecond, "exec 2>/dev/null; set -m; sleep 3 & wait", "", "took longer than 200ms"},
		{"much output", ctx, time.Minute, "yes x | head -100000 >&2; exit 1", "", "x; x"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			out, err := execute(tc.ctx, "job", exec.Command("bash", "-c", tc.script), tc.limit, syscall.SIGKILL)
			if string(out) != tc.out && tc.err == "" || (err == nil) != (tc.err == "") || err != nil && (!strings.Contains(err.Error(), tc.err) || len(err.Error()) > 1000) {
				t.Errorf("got %.100q, %v; want %q, %q", out, err, tc.out, tc.err)
			}
		})
	}
}

func TestRedact(t *testing.T) {
	for in, want := range map[string]string{
		"https://user:pass@h/x":                  "https://***h/x",
		"https://user:p@ss@h/x":                  "https://***h/x",
		"https://token@h/x":                      "https://***h/x",
		"ssh://git@h/x git@h:x":                  "ssh://git@h/x git@h:x",
		"fatal: ssh://git:pw@h/x: no":            "fatal: ssh://***h/x: no",
		"unable to look up user:s3cret@h (port)": "unable to look up ***h (port)",
		"a https://x/y and b@c":                  "a https://x/y and b@c",
		"http://u:p@h/ http://u2:p@i/":           "http://***h/ http://***i/",
		"https://h/x?private_token=s3cret&a=b":   "https://h/x?private_token=***&a=b",
	} {
		if got := redact(in); got != want {
			t.Errorf("redact(%q) = %q, want %q", in, got, want)
		}
	}
}

// TestREADME holds the README to what the program says: the session is what testdata/demo really prints (in the lab, as
// root), and the options are those of --help.
func TestREADME(t *testing.T) {
	readme, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	block := func(after string) string {
		_, rest, _ := strings.Cut(string(readme), after)
		_, rest, _ = strings.Cut(rest, "```\n")
		text, _, ok := strings.Cut(rest, "```\n")
		if !ok {
			t.Fatalf("no block after %q", after)
		}
		return text
	}
	if got, want := block("golden: gitopper --help"), usage; got != want {
		t.Errorf("options in the README:\n%s\nwant:\n%s", got, want)
	}
	if os.Getuid() != 0 {
		t.Skip("the demo needs root")
	}
	out, err := exec.Command("testdata/demo").CombinedOutput()
	if err != nil {
		t.Fatalf("testdata/demo: %v\n%s", err, out)
	}
	printed := normal(string(out))
	for line := range strings.Lines(normal(block("session: compared with"))) {
		_, rest, ok := strings.Cut(printed, line)
		if !ok {
			t.Fatalf("the demo does not print this line of the README's session, or not at its place:\n%sit prints:\n%s", line, out)
		}
		printed = rest
	}
}

// normal replaces what differs between two runs of the demo.
func normal(s string) string {
	for _, r := range [][2]string{{`\r`, ""}, {`127\.0\.0\.1:\d+`, "127.0.0.1:PORT"}, {`-p \d+`, "-p PORT"}, {`\b[0-9a-f]{8}\b`, "HASH"}, {`\w{3}, \d\d \w{3} \d{4} [\d:]{8} UTC`, "TIME"}, {` +`, " "}} {
		s = regexp.MustCompile(r[0]).ReplaceAllString(s, r[1])
	}
	return s
}

// TestBootstrap runs the daemon with its config in the repository.
func TestBootstrap(t *testing.T) {
	w := newWorld(t)
	t.Setenv("STATE_DIRECTORY", w.dir+"/state")
	config := func(extra string) string {
		return "[global]\nkeys = [{path = \"k.pub\"}]\n[[services]]\nmachine = \"m\"\nservice = \"svc\"\naction = \"reload\"\nsettle = \"0s\"\nupstream = \"file://" + w.up + "\"\nmount = \"" + w.dir + "/mount\"\n" +
			"dirs = [{local = \"" + w.dir + "/local/etc\", link = \"etc\"}]\n" + extra
	}
	args := []string{"-U", "file://" + w.up, "-D", "gitopper", "-M", w.dir + "/own", "-c", "config.toml", "-h", "m"}
	once := func(want string, status int) {
		t.Helper()
		stdout, stderr, got := gitopper(t, append(args, "--once")...)
		if got != status || !containsLines(stdout+stderr, want) {
			t.Errorf("status %d, want %d\n%s%swant in it:\n%s", got, status, stdout, stderr, want)
		}
	}
	once(`link "gitopper" is missing`, 1)
	w.commit("gitopper/config.toml", config("x = 1\n"), "gitopper/k.pub", testKey)
	once(`services[0] "svc": x: unknown option`, 1)
	first := w.commit("gitopper/config.toml", config(""))
	once("gitopper "+first[:8]+" OK\nsvc "+first[:8]+" OK", 0)
	if got := w.read("local/etc/app.conf"); got != "one\n" {
		t.Errorf("app.conf: %q", got)
	}
	// Upstream away: it starts with what is there.
	os.Rename(w.up, w.up+".away")
	once("svc "+first[:8]+" DIFF git ls-remote", 1)
	os.Rename(w.up+".away", w.up)
	// A wrong config in the checkout: upstream is looked at first.
	own := w.dir + "/own/gitopper/gitopper/config.toml"
	if err := os.WriteFile(own, []byte("["), 0o644); err != nil {
		t.Fatal(err)
	}
	once("gitopper "+first[:8]+" OK\nsvc "+first[:8]+" OK", 0)

	// As a daemon: a wrong config is refused, a right one ends it with status 2.
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := l.Addr().String()
	l.Close()
	cmd := exec.Command("/proc/self/exe", append(args, "-r", "-t", "100ms", "-s", "", "-m", addr)...)
	cmd.Env = append(os.Environ(), "AS_GITOPPER=1")
	var log tail
	cmd.Stderr = &log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Process.Kill()
	metrics := func(want string) {
		t.Helper()
		body := ""
		for end := time.Now().Add(30 * time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
			resp, err := http.Get("http://" + addr + "/metrics")
			if err != nil {
				continue
			}
			data, _ := io.ReadAll(resp.Body)
			resp.Body.Close()
			if body = string(data); containsLines(body, want) {
				return
			}
		}
		t.Fatalf("metrics lack %q:\n%s\nlog: %s", want, body, log.last())
	}
	metrics(`gitopper_config_ok 1` + "\n" + `gitopper_service_in_sync{service="gitopper"} 1`)
	w.commit("gitopper/config.toml", config("branch = \"..\"\n"))
	metrics(`gitopper_config_ok 0` + "\n" + `gitopper_service_state{service="gitopper"} 4` + "\n" + `gitopper_service_refused_total{service="gitopper",reason="config"} 1`)
	w.commit("gitopper/config.toml", config("fallback = false\n"))
	if err := cmd.Wait(); cmd.ProcessState.ExitCode() != 2 {
		t.Errorf("ended with %v: %s", err, log.last())
	}
}

// TestNoEntryIsNoFailedStart: systemd waits for READY from a unit of Type=notify, also from one that has nothing to do.
func TestNoEntryIsNoFailedStart(t *testing.T) {
	dir := t.TempDir()
	l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: dir + "/notify", Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	for name, text := range map[string]string{"k.pub": testKey, "c.toml": "[global]\nupstream = \"/u\"\nmount = \"/m\"\nkeys = [{path = \"k.pub\"}]\n"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("NOTIFY_SOCKET", dir+"/notify")
	t.Setenv("STATE_DIRECTORY", dir+"/state")
	if _, stderr, status := gitopper(t, "-c", dir+"/c.toml"); status != 0 || !strings.Contains(stderr, "nothing to do") {
		t.Errorf("%d: %s", status, stderr)
	}
	buf := make([]byte, 100)
	l.SetReadDeadline(time.Now().Add(10 * time.Second))
	if n, err := l.Read(buf); err != nil || string(buf[:n]) != "READY=1" {
		t.Errorf("told systemd %q, %v", buf[:n], err)
	}
}

func TestSignals(t *testing.T) {
	w := newWorld(t)
	t.Setenv("STATE_DIRECTORY", w.dir+"/state")
	w.write("k.pub", testKey)
	w.write("c.toml", "[global]\nupstream = \"file://"+w.up+"\"\nmount = \""+w.dir+"/mount\"\nkeys = [{path = \"k.pub\"}]\n[[services]]\nmachine = \"m\"\nservice = \"svc\"\ndirs = [{link = \"etc\"}]\n")
	for sig, status := range map[os.Signal]int{syscall.SIGTERM: 0, syscall.SIGINT: 0, syscall.SIGHUP: 2} {
		l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: w.dir + "/notify-" + sig.String(), Net: "unixgram"})
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		cmd := exec.Command("/proc/self/exe", "-c", w.dir+"/c.toml", "-h", "m", "-s", "", "-m", "")
		cmd.Env = append(os.Environ(), "AS_GITOPPER=1", "NOTIFY_SOCKET="+w.dir+"/notify-"+sig.String())
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		buf := make([]byte, 1000)
		n, err := l.Read(buf)
		if err != nil || !strings.HasPrefix(string(buf[:n]), "READY=1") {
			t.Errorf("%v: first told systemd %q, %v", sig, buf[:n], err)
		}
		if _, stderr, got := gitopper(t, "--once", "-c", w.dir+"/c.toml", "-h", "m"); got != 1 || !strings.Contains(stderr, fmt.Sprintf("another gitopper, pid %d", cmd.Process.Pid)) {
			t.Errorf("a second one: %d, %s", got, stderr)
		}
		cmd.Process.Signal(sig)
		if err := cmd.Wait(); cmd.ProcessState.ExitCode() != status {
			t.Errorf("%v: %v, want status %d", sig, err, status)
		}
	}
}

// TestPrivateNamespaceIsTold: a daemon with PrivateTmp= is not in the mount namespace of PID 1. Here PID 1 is a shell.
func TestPrivateNamespaceIsTold(t *testing.T) {
	dir := t.TempDir()
	for name, text := range map[string]string{"k.pub": testKey, "c.toml": "[global]\nupstream = \"/nope\"\nmount = \"" + dir + "/mount\"\nkeys = [{path = \"k.pub\"}]\n[[services]]\nmachine = \"m\"\nservice = \"x\"\n"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		script string
		told   bool
	}{{`"$@"; exit $?`, false}, {`unshare --mount "$@"; exit $?`, true}} {
		cmd := exec.Command("unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", c.script, "sh", exe, "--once", "-h", "m", "-c", dir+"/c.toml")
		cmd.Env = append(os.Environ(), "AS_GITOPPER=1", "STATE_DIRECTORY="+dir+"/state")
		out, _ := cmd.CombinedOutput() // it fails: there is no such upstream
		if !strings.Contains(string(out), "/nope") {
			t.Errorf("%s: gitopper did not run: %s", c.script, out)
		}
		if told := strings.Contains(string(out), "WARN we run in a mount namespace of our own"); told != c.told {
			t.Errorf("%s: told: %v: %s", c.script, told, out)
		}
	}
}
