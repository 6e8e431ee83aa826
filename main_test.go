//go:build linux

package main

import (
	"bytes"
	"cmp"
	"errors"
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

// TestMain gives the tests a mount namespace of their own (as root; else a user namespace in which they are
// root), and is the programs that can't run in a test: links on $PATH lead back to this binary.
func TestMain(m *testing.M) {
	switch base := filepath.Base(os.Args[0]); {
	case base == hostileUser:
		os.Exit(beHostile(os.Args[1:]))
	case len(os.Args) > 1 && os.Args[1] == checkChild, os.Getenv("AS_GITOPPER") != "":
		os.Unsetenv("AS_GITOPPER")
		main()
	}
	if os.Getenv(fakeProgram) == "" {
		os.Setenv("GORACE", "atexit_sleep_ms=0") // a second for each of the programs that this binary is
		os.Exit(inNamespace())
	}
	if err := syscall.Mount("", "/", "", syscall.MS_REC|syscall.MS_PRIVATE, ""); err != nil {
		fmt.Fprintln(os.Stderr, "make mounts private:", err)
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// fakeProgram is the environment variable that names the program of testdata/fake. It is one that starts fast:
// under the race detector this binary takes a hundred times as long.
const fakeProgram = "TEST_FAKE"

// linkFakes puts fake programs of these names into dir.
func linkFakes(t testing.TB, dir string, names ...string) {
	t.Helper()
	for _, name := range names {
		if err := os.Symlink(os.Getenv(fakeProgram), filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
}

// inNamespace runs the tests in a mount namespace of their own, and returns their exit status.
func inNamespace() int {
	dir, err := os.MkdirTemp("", "gitopper-fake-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	fake := filepath.Join(dir, "fake")
	if out, err := exec.Command("go", "build", "-o", fake, "./testdata/fake").CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "go build ./testdata/fake: %v\n%s", err, out)
		return 1
	}

	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.Env = append(os.Environ(), fakeProgram+"="+fake)
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	if os.Getuid() != 0 {
		cmd.SysProcAttr.Cloneflags |= syscall.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}}
	}
	err = cmd.Run()
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

const testKey = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIIDYqGwEqRPDqhXcHBiMSwcBCCCtYRoLc6vBpXIJCdNg" +
	" ops@example.org\n"

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

// daemonDir is a directory with a config and a key in conf, and the state directory of the daemon that uses
// them.
type daemonDir struct {
	t    *testing.T
	dir  string
	file string // the config
}

func newDaemonDir(t *testing.T, dir string) daemonDir {
	d := daemonDir{t, dir, dir + "/conf/c.toml"}
	t.Setenv("STATE_DIRECTORY", dir+"/state")
	if err := os.Mkdir(dir+"/conf", 0o755); err != nil {
		t.Fatal(err)
	}
	d.write("k.pub", testKey)
	return d
}

// write replaces a file beside the config, as an editor does.
func (d daemonDir) write(name, text string) {
	d.t.Helper()
	name = d.dir + "/conf/" + name
	err := os.WriteFile(name+".new", []byte(text), 0o644)
	if err = cmp.Or(err, os.Rename(name+".new", name)); err != nil {
		d.t.Fatal(err)
	}
}

// entry is a config with one entry for machine m.
func (d daemonDir) entry(service, lines string) string {
	return fmt.Sprintf("[global]\nmount = %q\nkeys = [{path = 'k.pub'}]\n[[services]]\nmachine = 'm'\n"+
		"service = %q\n%s\n", d.dir+"/mount", service, lines)
}

// daemonWorld is a world whose config is c.toml, with the service svc.
func daemonWorld(t *testing.T) (*world, daemonDir) {
	w := newWorld(t)
	d := newDaemonDir(t, w.dir)
	d.write("c.toml", d.svc(""))
	return w, d
}

// svc is a config for a world's upstream.
func (d daemonDir) svc(lines string) string {
	return d.entry("svc", fmt.Sprintf("upstream = 'file://%[1]s/up.git'\naction = 'reload'\nsettle = '0s'\n"+
		"dirs = [{local = '%[1]s/local/etc', link = 'etc'}]\n%[2]s", d.dir, lines))
}

// running is a daemon in a process of its own.
type running struct {
	t    *testing.T
	cmd  *exec.Cmd
	log  *lockedBuffer
	told *net.UnixConn // what it tells systemd
	http string        // address of its HTTP interface
}

// start starts a daemon for machine m, without SSH.
func start(t *testing.T, args ...string) *running {
	t.Helper()
	r := &running{t: t, log: &lockedBuffer{}, http: freeAddress(t)}
	socket := filepath.Join(t.TempDir(), "notify")
	var err error
	r.told, err = net.ListenUnixgram("unixgram", &net.UnixAddr{Name: socket, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	r.cmd = exec.Command("/proc/self/exe", append([]string{"-s", "", "-m", r.http, "-h", "m"}, args...)...)
	r.cmd.Env = append(os.Environ(), "AS_GITOPPER=1", "NOTIFY_SOCKET="+socket)
	r.cmd.Stderr = r.log
	if err := r.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		r.cmd.Process.Kill()
		_ = r.cmd.Wait()
		r.told.Close()
	})
	return r
}

// freeAddress is one that nobody listens on.
func freeAddress(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// ready waits until it has told systemd that it is ready, which is the first thing that it says.
func (r *running) ready() {
	r.t.Helper()
	buf := make([]byte, 1000)
	r.told.SetReadDeadline(time.Now().Add(20 * time.Second))
	n, err := r.told.Read(buf)
	if err != nil || !strings.HasPrefix(string(buf[:n]), "READY=1") {
		r.t.Fatalf("told systemd %q, %v: %s", buf[:n], err, r.log)
	}
}

// metrics waits until these lines are in its metrics.
func (r *running) metrics(lines ...string) {
	r.t.Helper()
	eventually(r.t, "metrics "+strings.Join(lines, ", "), func() bool {
		resp, err := http.Get("http://" + r.http + "/metrics")
		if err != nil {
			return false
		}
		defer resp.Body.Close()
		body, _ := io.ReadAll(resp.Body)
		return containsLines(string(body), strings.Join(lines, "\n"))
	})
}

// logs waits until this is in its log.
func (r *running) logs(text string) {
	r.t.Helper()
	eventually(r.t, "log: "+text, func() bool { return strings.Contains(r.log.String(), text) })
}

// ends fails if it does not end with status.
func (r *running) ends(status int) {
	r.t.Helper()
	_ = r.cmd.Wait()
	if got := r.cmd.ProcessState.ExitCode(); got != status {
		r.t.Errorf("status %d, want %d: %s", got, status, r.log)
	}
}

// once fails if one pass does not end with status, or prints no such lines.
func once(t *testing.T, status int, want string, args ...string) {
	t.Helper()
	stdout, stderr, got := gitopper(t, append([]string{"--once", "-h", "m"}, args...)...)
	if got != status || !containsLines(stdout+stderr, want) {
		t.Errorf("status %d, want %d\n%s%swant in it:\n%s", got, status, stdout, stderr, want)
	}
}

func TestCommandLine(t *testing.T) {
	d := newDaemonDir(t, t.TempDir())
	good, bad := d.dir+"/conf/good.toml", d.dir+"/conf/bad.toml"
	d.write("good.toml", d.entry("x", "upstream = '/nope'"))
	d.write("bad.toml", "[global]\nkeys = [{path = 'k.pub'}]\n[[services]]\n")
	for _, tc := range []struct {
		name   string
		args   []string
		status int
		stdout string // in it
		stderr string // in it; empty: nothing
	}{
		{"no config", nil, 1, "", "gitopper: no config file: give one with -c; see gitopper --help\n"},
		{"unknown option", []string{"-x"}, 1, "",
			"gitopper: flag provided but not defined: -x: see gitopper --help\n"},
		{"argument", []string{"-c", good, "x"}, 1, "",
			"gitopper: unexpected argument \"x\": see gitopper --help\n"},
		{"no time", []string{"-c", good, "-t", "0"}, 1, "", "gitopper: -t 0s: must be more than 0\n"},
		{"no port", []string{"-c", good, "-s", "x"}, 1, "",
			"gitopper: --ssh: address x: missing port in address: it must be HOST:PORT or :PORT\n"},
		{"no such port", []string{"-c", good, "-m", ":http-"}, 1, "",
			"gitopper: --metric: lookup tcp/http-: "},
		{"half a bootstrap", []string{"-c", "x", "-U", "/u"}, 1, "",
			"bootstrapping needs both -U, the repository, and -M, the directory for its checkout\n"},
		{"bootstrap of a file", []string{"-c", "/x", "-U", "/u", "-M", "/m"}, 1, "",
			"-c \"/x\": with -U it must be a file in the directory gitopper of the repository\n"},
		{"bootstrap from an option", []string{"-c", "x", "-U", "-u", "-M", "/m"}, 1, "",
			`gitopper: bootstrap: upstream "-u": must be a URL or a path`},
		{"pull of nothing", []string{"-c", good, "-P"}, 1, "", "gitopper: -P goes with -U\n"},

		{"check", []string{"--check", "-c", good, "-h", "m"}, 0, "", ""},
		{"check for others", []string{"-check", "-c=" + good, "-h", "a,b", "--hosts", "c"}, 0, "",
			"no entry for this machine"},
		{"check finds all", []string{"--check", "-c", bad}, 1, "",
			"gitopper: " + bad + ": services[0]: upstream \"\": required\n" +
				"gitopper: " + bad + ": services[0]: machine \"\": required\n" +
				"gitopper: " + bad + ": services[0]: mount \"\": required, must be absolute and not /\n" +
				"gitopper: " + bad + ": services[0]: service \"\": required, must be a unit name: "},
		{"start with it", []string{"-c", bad}, 1, "", "services[0]: machine \"\": required\n"},
		{"missing config", []string{"-c", "/nope"}, 1, "",
			"gitopper: config: open /nope: no such file or directory\n"},
		{"once, not for this machine", []string{"-c", good, "--once"}, 0, "", "no entry for this machine"},
		{"once, upstream away", []string{"-c", good, "-h", "m", "--once"}, 1,
			"x  DIFF git ls-remote /nope: exit status 128: ", "gitopper: not all services are OK\n"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			stdout, stderr, status := gitopper(t, tc.args...)
			isSilent := tc.stderr == "" && stderr == ""
			isRight := isSilent || tc.stderr != "" && strings.Contains(stderr, tc.stderr)
			if status != tc.status || !strings.Contains(stdout, tc.stdout) || !isRight {
				t.Errorf("status %d\nstdout %s\nstderr %s\nwant %+v", status, stdout, stderr, tc)
			}
			if lexists(d.dir + "/mount/x/.git") {
				t.Error("it cloned")
			}
		})
	}
}

func TestHelpAndVersion(t *testing.T) {
	help, stderr, status := gitopper(t, "--help")
	golden(t, "help.txt", help)
	if stderr != "" || status != 0 {
		t.Errorf("--help: %d, %s", status, stderr)
	}
	version, stderr, status := gitopper(t, "--version")
	if !regexp.MustCompile(`^gitopper \S+ go1\.\S+\n$`).MatchString(version) || stderr != "" || status != 0 {
		t.Errorf("--version: %q, %d, %s", version, status, stderr)
	}

	// Each option is in the help, under both names and with its default.
	(&options{}).flags().VisitAll(func(f *flag.Flag) {
		name := regexp.MustCompile(`(?m)^ .*-` + f.Name + `\b.*$`)
		line := name.FindString(help)
		isNamed := f.DefValue == "" || f.DefValue == "false" || f.Name == "duration" || f.Name == "t"
		if line == "" || !isNamed && !strings.Contains(line, f.DefValue) {
			t.Errorf("--help: -%s, default %q: %q", f.Name, f.DefValue, line)
		}
	})
}

// --unit names this binary, and the options that are given with it, as this daemon understands them.
func TestUnitOption(t *testing.T) {
	d := newDaemonDir(t, t.TempDir())
	t.Chdir(d.dir + "/conf")
	for _, tc := range []struct {
		name string
		args []string
		want string
	}{
		{"none", nil, " -r -c /etc/gitopper/config.toml"},
		{"paths are made absolute", []string{"-c", "c.toml", "-k", "/k"}, " -c=" + d.file + " -k=/k"},
		{"switches and names", []string{"-h", "a,b", "--debug", "-o=false", "-h", "c", "--once=false"},
			" -debug=true -h=a,b,c -o=false -c /etc/gitopper/config.toml"},
		{"what is empty or odd", []string{"-c", "/a b", "-s", "", "-m", ":1"}, ` "-c=/a b" -m=:1 -s=`},
		{"bootstrap", []string{"-U", "/u", "-M", "/m", "-c", "c.toml"}, " -M=/m -U=/u -c=c.toml"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			unit, stderr, status := gitopper(t, append(tc.args, "--unit")...)
			_, rest, _ := strings.Cut(unit, "\nExecStart=")
			line, _, _ := strings.Cut(rest, "\n")
			if _, got, _ := strings.Cut(line, ".test"); got != tc.want || status != 0 {
				t.Errorf("status %d: %s\ngot  %s\nwant %s", status, stderr, line, tc.want)
			}
			same := "Documentation=man:gitopper(8)\nExecReload=/bin/kill -HUP $MAINPID\nStateDirectoryMode=0711"
			if !containsLines(unit, same) {
				t.Errorf("%s\nwant in it:\n%s", unit, same)
			}
		})
	}
	if _, stderr, status := gitopper(t, "--unit", "-U", "/u", "-M", "/m"); status != 1 {
		t.Errorf("bootstrap without a config: %d: %s", status, stderr)
	}
}

// What this host lacks is no mistake of the config, but is told.
func TestCheckWarnings(t *testing.T) {
	for _, tc := range []struct{ name, lines, want string }{
		{"user", "user = 'no-such-user'", "gitopper: service \"x\": user \"no-such-user\" does not exist"},
		{"user of a package", "user = 'no-such-user'\npackage = 'p'", ""},
		{"group", "dirs = [{link = 'a', group = 'no-such-group'}]",
			"gitopper: service \"x\": group \"no-such-group\""},
		{"group of a package", "package = 'p'\ndirs = [{link = 'a', group = 'no-such-group'}]", ""},
		{"signers", "signers = '/nope'", "gitopper: service \"x\": signers: stat /nope: no such file"},
		{"nothing", "", ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			d := newDaemonDir(t, t.TempDir())
			d.write("c.toml", d.entry("x", "upstream = '/u'\n"+tc.lines))
			_, stderr, status := gitopper(t, "--check", "-h", "m", "-c", d.file)
			isSilent := tc.want == "" && stderr == ""
			if status != 0 || !isSilent && !strings.HasPrefix(stderr, cmp.Or(tc.want, "silence")) {
				t.Errorf("status %d, stderr %q, want 0, %q", status, stderr, tc.want)
			}
			if _, stderr, _ = gitopper(t, "--check", "-h", "other", "-c", d.file); tc.want != "" &&
				strings.Contains(stderr, tc.want) {
				t.Errorf("told for another machine: %s", stderr)
			}
		})
	}

	d := newDaemonDir(t, t.TempDir())
	signers := filepath.Join(t.TempDir(), "signers")
	d.write("c.toml", d.entry("x", "upstream = '/u'\nsigners = '"+signers+"'"))
	if err := errors.Join(os.Chmod(d.file, 0o666), os.WriteFile(signers, nil, 0o644), os.Chmod(signers, 0o666)); err != nil {
		t.Fatal(err)
	}
	_, stderr, status := gitopper(t, "--check", "-h", "m", "-c", d.file)
	for _, name := range []string{"c.toml", "signers"} {
		if status != 0 || !strings.Contains(stderr, name+": it, or its directory, can be written by others") {
			t.Errorf("status %d, stderr %q", status, stderr)
		}
	}
}

func TestSecondInstance(t *testing.T) {
	dir := t.TempDir() + "/state"
	unlock, err := lock(dir)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := lock(dir); !errorSays(err, fmt.Sprintf("pid %d", os.Getpid())) {
		t.Errorf("second lock: %v, want our pid in it", err)
	}
	unlock()

	if err := os.Chmod(dir, 0o750); err != nil {
		t.Fatal(err)
	}
	again, err := lock(dir)
	if err != nil {
		t.Fatal(err)
	}
	again()
	// Whatever it was: users' clones lie below it.
	if fi, err := os.Stat(dir); err != nil || fi.Mode().Perm() != 0o711 {
		t.Errorf("state directory: %v, %v", fi.Mode(), err)
	}
}

// TestREADME holds the README to what the program says: the session is what testdata/demo really prints (in
// the lab, as root), and the options are those of --help.
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
			t.Fatalf("the demo does not print this line of the README's session, or not at its place:\n"+
				"%sit prints:\n%s", line, out)
		}
		printed = rest
	}
}

// normal replaces what differs between two runs of the demo.
func normal(s string) string {
	for _, r := range [][2]string{
		{`\r`, ""}, {`127\.0\.0\.1:\d+`, "127.0.0.1:PORT"}, {`-p \d+`, "-p PORT"},
		{`\b[0-9a-f]{8}\b`, "HASH"}, {`\w{3}, \d\d \w{3} \d{4} [\d:]{8} UTC`, "TIME"}, {` +`, " "},
	} {
		s = regexp.MustCompile(r[0]).ReplaceAllString(s, r[1])
	}
	return s
}

// bootConfig is the config in the repository of a world whose config is there.
func bootConfig(d daemonDir, lines string) []string {
	return []string{"gitopper/config.toml", d.svc(lines), "gitopper/k.pub", testKey}
}

// TestBootstrap is one pass after another with the config in the repository.
func TestBootstrap(t *testing.T) {
	w, d := daemonWorld(t)
	args := []string{"-U", "file://" + w.bare, "-M", w.dir + "/own", "-c", "config.toml"}
	once(t, 1, `link "gitopper" is missing`, args...)
	w.commit(bootConfig(d, "x = 1")...)
	once(t, 1, `services[0] "svc": x: unknown option`, args...)
	first := w.commit(bootConfig(d, "")...)
	running := fmt.Sprintf("gitopper %.8s OK\nsvc %.8s OK", first, first)
	once(t, 0, running, args...)
	w.shows("local/etc/app.conf", "one\n")

	w.upstreamGoes()
	once(t, 1, "svc "+first[:8]+" DIFF git ls-remote", args...) // it starts with what is there
	once(t, 1, "svc "+first[:8]+" DIFF git ls-remote", append(args, "-P")...)
	w.upstreamComes()
	for _, kept := range []bool{true, false} {
		w.write("own/gitopper/gitopper/config.toml", "[")
		if !kept {
			os.Remove(keptFile(w.dir + "/state"))
		}
		once(t, 0, running, args...)
	}
	second := w.commit(bootConfig(d, "branch = 'main'")...)
	once(t, 0, fmt.Sprintf("gitopper %.8s OK", second), append(args, "-P")...)
}

// TestBootstrapDaemon: a wrong config upstream is refused, a right one ends the daemon with status 2.
func TestBootstrapDaemon(t *testing.T) {
	w, d := daemonWorld(t)
	r := start(t, "-r", "-t", "100ms", "-U", "file://"+w.bare, "-M", w.dir+"/own", "-c", "config.toml")
	r.ready() // and waits for a config
	r.metrics("gitopper_config_ok 0", `gitopper_service_state{service="gitopper"} 4`)
	w.commit(bootConfig(d, "")...)
	r.metrics("gitopper_config_ok 1", `gitopper_service_in_sync{service="gitopper"} 1`,
		`gitopper_service_state{service="svc"} 0`)
	w.commit(bootConfig(d, "branch = '..'")...)
	r.metrics("gitopper_config_ok 0", `gitopper_service_state{service="gitopper"} 4`,
		`gitopper_service_refused_total{service="gitopper",reason="config"} 1`)
	w.commit(bootConfig(d, "fallback = false")...)
	r.ends(2)
}

// TestNestedCheckouts: in the manual's way of bootstrapping services lie in the checkout of the config.
func TestNestedCheckouts(t *testing.T) {
	w, d := daemonWorld(t)
	nested := strings.ReplaceAll(d.svc(""), w.dir+"/mount", w.dir+"/own/gitopper")
	first := w.commit("gitopper/config.toml", nested, "gitopper/k.pub", testKey)
	args := []string{"-U", "file://" + w.bare, "-M", w.dir + "/own", "-c", "config.toml"}
	for range 2 {
		once(t, 0, fmt.Sprintf("gitopper %.8s OK\nsvc %.8s OK", first, first), args...)
	}
	second := w.commit("etc/app.conf", "two\n", "gitopper/other", "x")
	once(t, 0, fmt.Sprintf("gitopper %.8s OK\nsvc %.8s OK", second, second), args...)
	w.shows("local/etc/app.conf", "two\n")
	w.shows("own/gitopper/svc/etc/app.conf", "two\n")
	w.shows("own/gitopper/gitopper/other", "x")
	if got := w.git(w.dir+"/own/gitopper", "status", "--porcelain"); got != "" && got != "?? svc/" {
		t.Errorf("git status: %s", got)
	}
}

// TestKeptConfig: what was last right is used where a start finds something wrong.
func TestKeptConfig(t *testing.T) {
	for _, tc := range []struct{ name, file, text, told string }{
		{"syntax", "c.toml", "[", "c.toml: line 1, column 2: "},
		{"wrong option", "c.toml", "[global]\nkey = 3\n", "c.toml: [global]: key: unknown option"},
		{"no file", "c.toml", "", "c.toml: no such file"},
		{"garbage key file", "k.pub", "garbage", "keys[0]: "},
		{"no key file", "k.pub", "", "k.pub: no such file"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w, d := daemonWorld(t)
			once(t, 0, "svc "+w.head()[:8]+" OK", "-c", d.file)
			os.Remove(w.dir + "/conf/" + tc.file)
			if tc.text != "" {
				d.write(tc.file, tc.text)
			}
			w.unmountAll() // as a boot does
			w.upstreamGoes()
			r := start(t, "-c", d.file)
			r.ready()
			w.shows("local/etc/app.conf", "one\n")
			r.metrics("gitopper_config_ok 0", `gitopper_service_state{service="svc"} 0`)
			r.logs("ERROR the config is wrong, the one that was last right is used: ")
			r.logs(tc.told)
		})
	}
}

// TestKeptConfigMended: with -r a start on what was kept ends when the config is right, and another one.
func TestKeptConfigMended(t *testing.T) {
	w, d := daemonWorld(t)
	once(t, 0, "svc "+w.head()[:8]+" OK", "-c", d.file)
	d.write("k.pub", "garbage")
	r := start(t, "-r", "-c", d.file)
	r.ready()
	d.write("k.pub", testKey)
	r.logs("the config is right again")
	r.metrics("gitopper_config_ok 1") // and it is what runs
	d.write("c.toml", d.svc("fallback = false"))
	r.ends(2)
}

// TestNoKeptConfig: without one, too, the mounts are made before the start fails.
func TestNoKeptConfig(t *testing.T) {
	w, d := daemonWorld(t)
	once(t, 0, "svc "+w.head()[:8]+" OK", "-c", d.file)
	w.unmountAll()
	if err := os.Remove(keptFile(w.dir + "/state")); err != nil {
		t.Fatal(err)
	}
	d.write("c.toml", "[")
	r := start(t, "-c", d.file)
	r.ends(1)
	told := "gitopper: " + d.file + ": line 1, column 2: "
	if strings.Count(r.log.String(), told) != 1 {
		t.Errorf("it says %s, want one line %q", r.log, told)
	}
	w.shows("local/etc/app.conf", "one\n")
}

// TestRestartOption: a new config is used by itself with -r, once it is right.
func TestRestartOption(t *testing.T) {
	_, d := daemonWorld(t)
	r := start(t, "-r", "-c", d.file)
	r.ready()
	d.write("c.toml", d.svc("action = 'nothing'"))
	r.logs(`ERROR the config is wrong, the one that was last right is used: `)
	r.metrics("gitopper_config_ok 0", `gitopper_service_state{service="svc"} 0`)
	d.write("c.toml", d.svc("fallback = false"))
	r.ends(2)
	if n := strings.Count(r.log.String(), "the config is wrong"); n != 1 {
		t.Errorf("told %d times: %s", n, r.log)
	}
}

// TestNoRestartOption: without -r a new config is told, and so are wrong ones.
func TestNoRestartOption(t *testing.T) {
	_, d := daemonWorld(t)
	r := start(t, "-c", d.file)
	r.ready()
	d.write("c.toml", d.svc("fallback = false"))
	r.logs("WARN the config has changed: it is used after a restart")
	d.write("c.toml", "[")
	r.metrics("gitopper_config_ok 0")
	d.write("k.pub", testKey+"# another\n")
	d.write("c.toml", d.svc("fallback = false"))
	r.metrics("gitopper_config_ok 1")
	r.cmd.Process.Signal(syscall.SIGTERM)
	r.ends(0)
}

// TestNoEntryStaysUp: a daemon without an entry for its host is READY and waits for a config that has one.
func TestNoEntryStaysUp(t *testing.T) {
	d := newDaemonDir(t, t.TempDir())
	d.write("c.toml", "[global]\nkeys = [{path = 'k.pub'}]\n")
	r := start(t, "-r", "-c", d.file)
	r.ready()
	r.logs("no entry for this machine")
	d.write("c.toml", d.entry("x", "upstream = '/u'"))
	r.ends(2)
}

// TestTakenPortKeepsNothingWaiting: a port that is taken is told, and taken as soon as it is free.
func TestTakenPortKeepsNothingWaiting(t *testing.T) {
	w, d := daemonWorld(t)
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := taken.Addr().String()
	r := start(t, "-c", d.file, "-s", addr, "-m", addr)
	r.logs("--metric: listen tcp " + addr)
	r.logs("--ssh: listen tcp " + addr)
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
	_, d := daemonWorld(t)
	for sig, status := range map[os.Signal]int{syscall.SIGTERM: 0, syscall.SIGINT: 0, syscall.SIGHUP: 2} {
		t.Run(sig.String(), func(t *testing.T) {
			r := start(t, "-c", d.file)
			r.ready()
			second := fmt.Sprintf("gitopper: another gitopper, pid %d, works with", r.cmd.Process.Pid)
			once(t, 1, second, "-c", d.file)
			r.cmd.Process.Signal(sig)
			r.ends(status)
		})
	}
}

// TestPrivateNamespaceIsTold: a daemon with PrivateTmp= is not in the mount namespace of PID 1. Here PID 1 is
// a shell.
func TestPrivateNamespaceIsTold(t *testing.T) {
	d := newDaemonDir(t, t.TempDir())
	d.write("c.toml", d.entry("x", "upstream = '/nope'"))
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name, script string
		told         bool
	}{
		{"ours is the host's", `"$@"; exit $?`, false},
		{"ours is private", `unshare --mount "$@"; exit $?`, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			cmd := exec.Command("unshare", "--pid", "--fork", "--kill-child", "--mount-proc",
				"sh", "-c", tc.script, "sh", exe, "--once", "-h", "m", "-c", d.file)
			cmd.Env = append(os.Environ(), "AS_GITOPPER=1")
			out, _ := cmd.CombinedOutput() // it fails: there is no such upstream
			if !strings.Contains(string(out), "/nope") {
				t.Errorf("gitopper did not run: %s", out)
			}
			told := strings.Contains(string(out), "WARN we run in a mount namespace of our own")
			if told != tc.told {
				t.Errorf("told: %v: %s", told, out)
			}
		})
	}
}
