package main

import (
	"bytes"
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
	case base == hostileUser:
		os.Exit(beHostile(os.Args[1:]))
	case base == "systemctl":
		os.Exit(fakeSystemctl(os.Getenv("FAKE"), os.Args[1:]))
	case base == "journalctl":
		os.Exit(fakeJournalctl(os.Getenv("FAKE")))
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
		{"not for this machine", []string{"-c", good, "--once"}, "", "no entry for this machine", 0},
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
		return "[global]\nkeys = [{path = \"k.pub\"}]\n[[services]]\nmachine = \"m\"\nservice = \"svc\"\naction = \"reload\"\nsettle = \"0s\"\nupstream = \"file://" + w.bare + "\"\nmount = \"" + w.dir + "/mount\"\n" +
			"dirs = [{local = \"" + w.dir + "/local/etc\", link = \"etc\"}]\n" + extra
	}
	args := []string{"-U", "file://" + w.bare, "-D", "gitopper", "-M", w.dir + "/own", "-c", "config.toml", "-h", "m"}
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
	w.upstreamGoes()
	once("svc "+first[:8]+" DIFF git ls-remote", 1)
	w.upstreamComes()
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

// TestNoEntryStaysUp: a daemon without an entry for its host is READY and waits for a config that has one.
func TestNoEntryStaysUp(t *testing.T) {
	dir := t.TempDir()
	l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: dir + "/notify", Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	text := "[global]\nupstream = \"/u\"\nmount = \"/m\"\nkeys = [{path = \"k.pub\"}]\n"
	for name, text := range map[string]string{"k.pub": testKey, "c.toml": text} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.Command("/proc/self/exe", "-r", "-c", dir+"/c.toml", "-h", "m", "-s", "", "-m", "")
	cmd.Env = append(os.Environ(), "AS_GITOPPER=1", "NOTIFY_SOCKET="+dir+"/notify", "STATE_DIRECTORY="+dir+"/state")
	var log tail
	cmd.Stderr = &log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Process.Kill()
	buf := make([]byte, 1000)
	l.SetReadDeadline(time.Now().Add(10 * time.Second))
	if n, err := l.Read(buf); err != nil || !strings.HasPrefix(string(buf[:n]), "READY=1") {
		t.Errorf("told systemd %q, %v", buf[:n], err)
	}
	text += "[[services]]\nmachine = \"m\"\nservice = \"x\"\n"
	if err := os.WriteFile(dir+"/c.toml", []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); cmd.ProcessState.ExitCode() != 2 || !strings.Contains(log.last(), "no entry for this machine") {
		t.Errorf("%v: %s", err, log.last())
	}
}

// TestTakenPortKeepsNothingWaiting: a port that is taken is told, and taken as soon as it is free.
func TestTakenPortKeepsNothingWaiting(t *testing.T) {
	w := newWorld(t)
	w.write("k.pub", testKey)
	w.write("c.toml", "[global]\nupstream = \"file://"+w.bare+"\"\nmount = \""+w.dir+"/mount\"\nkeys = [{path = \"k.pub\"}]\n"+
		"[[services]]\nmachine = \"m\"\nservice = \"svc\"\ndirs = [{link = \"etc\"}]\n")
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := taken.Addr().String()
	cmd := exec.Command("/proc/self/exe", "-c", w.dir+"/c.toml", "-h", "m", "-s", addr, "-m", addr)
	cmd.Env = append(os.Environ(), "AS_GITOPPER=1", "STATE_DIRECTORY="+w.dir+"/state")
	log := &lockedBuffer{}
	cmd.Stderr = log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Process.Kill()
	told := "--metric: listen tcp " + addr
	eventually(t, "port told", func() bool { return strings.Contains(log.String(), told) })
	eventually(t, "first checkout", func() bool { return lexists(w.dir + "/mount/svc/etc/app.conf") })
	taken.Close()
	eventually(t, "port taken", func() bool {
		c, err := net.Dial("tcp", addr)
		if err == nil {
			c.Close()
		}
		return err == nil
	})
}

func TestSignals(t *testing.T) {
	w := newWorld(t)
	t.Setenv("STATE_DIRECTORY", w.dir+"/state")
	w.write("k.pub", testKey)
	w.write("c.toml", "[global]\nupstream = \"file://"+w.bare+"\"\nmount = \""+w.dir+"/mount\"\nkeys = [{path = \"k.pub\"}]\n[[services]]\nmachine = \"m\"\nservice = \"svc\"\ndirs = [{link = \"etc\"}]\n")
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
