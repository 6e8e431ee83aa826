//go:build linux

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/cgi"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"
)

// The tests in this file and in lab_trial_test.go look at gitopper from outside: the binary runs as a
// systemd unit on a throw-away host (testdata/lab), and what it did is read from /proc/1/mountinfo, from
// the units themselves and over their own interfaces, not from its log. They need root, and skip with the
// reason where no lab can boot.

// labShared is what all lab tests of one run use: the directory of the labs, the binary, and a stopped host
// with the packages of Debian that most tests manage, on whose disk the other hosts are built.
var labShared struct {
	mu    sync.Mutex
	users int
	dir   string

	binary, base       sync.Once
	binaryErr, baseErr error
}

// labHost is a throw-away host, up until the end of its test.
type labHost struct {
	t          *testing.T
	name       string
	fs         *os.Root // its file system, through /proc/PID/root: with its mounts, and none of its links leads out
	sshPort    int
	metricPort int
	key        string // private key (on this machine) of the operator that the config written by configure lets in
}

// newLab boots a host that has nginx and prometheus, neither of them enabled, and gitopper in
// /usr/local/bin. The calling test runs in parallel with the other lab tests from there on: they mostly
// wait.
func newLab(t *testing.T) *labHost {
	t.Helper()
	return bootLab(t, "base")
}

// newBareLab boots a host with this machine's packages only.
func newBareLab(t *testing.T) *labHost {
	t.Helper()
	return bootLab(t, "")
}

// newLabs boots several hosts as newLab does.
func newLabs(t *testing.T, n int) (hosts []*labHost) {
	t.Helper()
	hosts = append(hosts, newLab(t))
	for range n - 1 {
		hosts = append(hosts, bootHost(t, "base"))
	}
	return hosts
}

// bootLab boots a host on the disk of this machine, or of the shared base.
func bootLab(t *testing.T, base string) *labHost {
	t.Helper()
	shareLabs(t)
	s := &labShared
	if base != "" {
		if s.base.Do(func() { s.baseErr = makeLabBase(base) }); s.baseErr != nil {
			t.Skip("no lab host: ", s.baseErr)
		}
	}
	return bootHost(t, base)
}

// shareLabs makes what lab tests share, once.
func shareLabs(t *testing.T) {
	t.Helper()
	if testing.Short() {
		t.Skip("a lab host takes a while, and this is -short")
	}
	// In a user namespace everybody may be root, but not of this machine.
	users, _ := os.ReadFile("/proc/self/uid_map")
	if strings.Join(strings.Fields(string(users)), " ") != "0 0 4294967295" || os.Geteuid() != 0 {
		t.Skip("a lab host needs root")
	}
	s := &labShared
	s.mu.Lock()
	if s.users++; s.dir == "" {
		dir, err := os.MkdirTemp("", "gitopper-lab-")
		if err != nil {
			t.Fatal(err)
		}
		s.dir = dir
	}
	s.mu.Unlock()
	t.Cleanup(releaseLab)
	// Only now: each lab test has come here before the first of them goes on, so what they share is made
	// once and the last of them, whichever that is, takes it away.
	t.Parallel()

	s.binary.Do(func() {
		build := exec.Command("go", "build", "-o", filepath.Join(s.dir, "gitopper"), ".")
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := build.CombinedOutput(); err != nil {
			s.binaryErr = fmt.Errorf("go build: %v\n%s", err, out)
		}
	})
	if s.binaryErr != nil {
		t.Fatal(s.binaryErr)
	}
}

// bootHost boots a host, with variables of testdata/lab in more.
func bootHost(t *testing.T, base string, more ...string) *labHost {
	t.Helper()
	l := &labHost{t: t, name: "lab" + strconv.Itoa(labPort()), sshPort: labPort(), metricPort: labPort()}
	args := []string{l.name}
	if base != "" {
		args = append(args, base)
	}
	t.Cleanup(func() {
		if out, err := labScript("down", l.name); err != nil {
			t.Errorf("lab down: %v\n%s", err, out)
		}
	})
	if out, err := labScriptWith(more, "up", args...); err != nil {
		t.Skipf("no lab host: %v\n%s", err, out)
	}
	l.openRoot()
	t.Cleanup(func() {
		if t.Failed() {
			l.dump()
		}
		l.fs.Close()
	})
	binary, err := os.ReadFile(filepath.Join(labShared.dir, "gitopper"))
	if err != nil {
		t.Fatal(err)
	}
	l.write("/usr/local/bin/gitopper", string(binary))
	l.key = filepath.Join(t.TempDir(), "operator")
	labRun(t, "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "operator@lab", "-f", l.key)
	pub, err := os.ReadFile(l.key + ".pub")
	if err != nil {
		t.Fatal(err)
	}
	l.write("/etc/gitopper/operator.pub", string(pub))
	return l
}

// makeLabBase boots the host that others are built on, installs what they manage, and stops it.
func makeLabBase(name string) error {
	if out, err := labScript("up", name); err != nil {
		return fmt.Errorf("%v\n%s", err, out)
	}
	for _, cmd := range []string{
		"DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends nginx-light prometheus openssh-client",
		"systemctl disable --now nginx prometheus",
	} {
		if out, err := labScript("exec", name, "sh", "-c", cmd); err != nil {
			return fmt.Errorf("%s: %v\n%s", cmd, err, out)
		}
	}
	if out, err := labScript("stop", name); err != nil {
		return fmt.Errorf("%v\n%s", err, out)
	}
	return nil
}

func releaseLab() {
	s := &labShared
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.users--; s.users > 0 {
		return
	}
	labScript("down", "base")
	os.RemoveAll(s.dir)
	// For go test -count=2.
	s.dir, s.binary, s.base, s.binaryErr, s.baseErr = "", sync.Once{}, sync.Once{}, nil, nil
}

// labScript runs testdata/lab, whose labs end with this process, however it ends.
func labScript(verb string, args ...string) (string, error) { return labScriptWith(nil, verb, args...) }

func labScriptWith(more []string, verb string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "testdata/lab", append([]string{verb}, args...)...)
	cmd.Env = append(os.Environ(), "LAB_DIR="+labShared.dir, fmt.Sprint("LAB_OWNER=", os.Getpid()))
	cmd.Env = append(cmd.Env, more...)
	cmd.WaitDelay = time.Second
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	if err != nil {
		return stdout.String() + stderr.String(), err
	}
	return stdout.String(), nil
}

// labRun runs a program on this machine and returns its trimmed output.
func labRun(t testing.TB, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(string(out))
}

var labPorts atomic.Int32

// labPort returns a port that is free on this machine, whose network the labs share. It is below those that
// the kernel gives to clients, and never given twice.
func labPort() int {
	for {
		port := 20000 + (os.Getpid()*37+int(labPorts.Add(1)))%12000
		if l, err := net.Listen("tcp", fmt.Sprint("127.0.0.1:", port)); err == nil {
			l.Close()
			return port
		}
	}
}

func (l *labHost) openRoot() {
	l.t.Helper()
	pid, err := labScript("pid", l.name)
	if err != nil {
		l.t.Fatal(err, pid)
	}
	if l.fs, err = os.OpenRoot("/proc/" + strings.TrimSpace(pid) + "/root"); err != nil {
		l.t.Fatal(err)
	}
}

// dump shows what somebody who looks for the cause of a failure wants to see first.
func (l *labHost) dump() {
	for _, cmd := range [][]string{
		{"journalctl", "-u", "gitopper", "-o", "short-monotonic", "-p", "info", "-n", "100", "--no-pager"},
		{"journalctl", "-u", "gitopper", "-o", "short-monotonic", "-n", "30", "--no-pager"}, // with the commands that were run
		{"systemctl", "--failed", "--no-pager", "--no-legend"},
	} {
		out, _ := l.try(cmd...)
		l.t.Logf("%s: %s:\n%s", l.name, strings.Join(cmd, " "), out)
	}
}

// reboot shuts the host down and boots it again with the same disk.
func (l *labHost) reboot() {
	l.t.Helper()
	l.fs.Close()
	if out, err := labScript("reboot", l.name); err != nil {
		l.t.Fatalf("reboot: %v\n%s", err, out)
	}
	l.openRoot()
}

// try runs a program on the host; its output is what it wrote to stdout, and, if it failed, to stderr.
func (l *labHost) try(cmd ...string) (string, error) {
	out, err := labScript("exec", append([]string{l.name}, cmd...)...)
	return strings.TrimSpace(out), err
}

// run is try for what can't fail.
func (l *labHost) run(cmd ...string) string {
	l.t.Helper()
	out, err := l.try(cmd...)
	if err != nil {
		l.t.Fatalf("%s: %v\n%s", strings.Join(cmd, " "), err, out)
	}
	return out
}

// write writes a file on the host, and the directories above it; what goes to a bin directory is executable.
func (l *labHost) write(path, content string) {
	l.t.Helper()
	path = path[1:]
	mode := os.FileMode(0o644)
	if strings.Contains(path, "bin/") {
		mode = 0o755
	}
	if err := l.fs.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		l.t.Fatal(err)
	}
	if err := l.fs.WriteFile(path, []byte(content), mode); err != nil {
		l.t.Fatal(err)
	}
}

// read returns a file of the host as every process there sees it, and "" if there is none.
func (l *labHost) read(path string) string {
	b, err := l.fs.ReadFile(path[1:])
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err.Error()
	}
	return string(b)
}

// lines counts the lines of a file on the host: units and programs of tests write one for each thing they do.
func (l *labHost) lines(path string) int { return strings.Count(l.read(path), "\n") }

// mounts returns what PID 1 has mounted at a path or below, as "mount point: root in its file system" lines.
func (l *labHost) mounts(path string) []string {
	var found []string
	for line := range strings.Lines(l.read("/proc/1/mountinfo")) {
		// 36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue
		if f := strings.Fields(line); f[4] == path || strings.HasPrefix(f[4], path+"/") {
			found = append(found, f[4]+": "+f[3])
		}
	}
	slices.Sort(found)
	return found
}

// unit makes a systemd unit known, or changes it.
func (l *labHost) unit(name, text string) {
	l.t.Helper()
	l.write("/etc/systemd/system/"+name, text)
	l.run("systemctl", "daemon-reload")
}

// witness makes a service that copies file to /run/NAME.seen when it starts and when it is reloaded, and
// keeps a line for each of these in /run/NAME.calls. More may hold further settings of its [Service].
func (l *labHost) witness(name, file, more string) {
	l.t.Helper()
	l.write("/usr/local/bin/witness", `#!/bin/sh
cp "$3" /run/$1.seen.new && mv /run/$1.seen.new /run/$1.seen || echo missing >/run/$1.seen
echo $2 >>/run/$1.calls
[ $2 = reload ] || exec sleep infinity
`)
	l.unit(name+".service", fmt.Sprintf(`[Service]
ExecStart=/usr/local/bin/witness %[1]s start %[2]s
ExecReload=/usr/local/bin/witness %[1]s reload %[2]s
%[3]s
`, name, file, more))
}

// show returns a property of a unit as systemd has it.
func (l *labHost) show(unit, property string) string {
	l.t.Helper()
	return l.run("systemctl", "show", "--value", "-p", property, unit)
}

const labCheckouts = "/var/lib/gitopper-checkouts"

// configText is a config: body is what follows the keys, upstream and mount of [global]. Entries are for the
// machine "lab".
func (l *labHost) configText(upstream *labUpstream, body string) string {
	return fmt.Sprintf(`[global]
upstream = %q
mount = %q
keys = [ { path = "operator.pub" } ]
%s`, upstream.url(), labCheckouts, body)
}

// configure writes the config, see configText.
func (l *labHost) configure(upstream *labUpstream, body string) {
	l.t.Helper()
	l.write("/etc/gitopper/config.toml", l.configText(upstream, body))
}

// start makes gitopper the unit that it wants to be, with short waits, and starts it: systemctl returns
// when it is READY.
func (l *labHost) start(options ...string) {
	l.t.Helper()
	l.write("/etc/systemd/system/gitopper.service", l.run("/usr/local/bin/gitopper", "--unit")+"\n")
	if !slices.Contains(options, "-t") {
		options = append(options, "-t", "2s")
	}
	l.write("/etc/systemd/system/gitopper.service.d/lab.conf", fmt.Sprintf(`[Unit]
StartLimitIntervalSec=0
[Service]
Restart=always
RestartSec=10ms
ExecStart=
ExecStart=/usr/local/bin/gitopper -d -h lab -c /etc/gitopper/config.toml -s 127.0.0.1:%d -m 127.0.0.1:%d %s
`, l.sshPort, l.metricPort, strings.Join(options, " ")))
	l.run("systemctl", "daemon-reload")
	l.run("systemctl", "start", "gitopper")
}

// metrics returns all samples of /metrics by name and labels, as they are written there.
func (l *labHost) metrics() (map[string]float64, error) {
	text, err := labGet(fmt.Sprintf("http://127.0.0.1:%d/metrics", l.metricPort))
	if err != nil {
		return nil, err
	}
	samples := map[string]float64{}
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		name, value, ok := strings.Cut(line, "} ")
		if ok {
			name += "}"
		} else if name, value, ok = strings.Cut(line, " "); !ok {
			continue
		}
		if v, err := strconv.ParseFloat(value, 64); err == nil {
			samples[name] = v
		}
	}
	return samples, nil
}

// metric returns the sum of all samples of this name that have these labels, each given as name="value".
func (l *labHost) metric(name string, labels ...string) (sum float64) {
	l.t.Helper()
	samples, err := l.metrics()
	if err != nil {
		l.t.Fatal(err)
	}
sample:
	for sample, v := range samples {
		if have, _, _ := strings.Cut(sample, "{"); have != name {
			continue
		}
		for _, label := range labels {
			if !strings.Contains(sample, label) {
				continue sample
			}
		}
		sum += v
	}
	return sum
}

// labStatus is a service as /list/service has it.
type labStatus struct{ Service, Hash, State, StateInfo, Change string }

// ssh runs a command on gitopper's SSH interface, as an operator would.
func (l *labHost) ssh(command string) (stdout, stderr string, err error) {
	l.t.Helper()
	b, err := os.ReadFile(l.key)
	if err != nil {
		l.t.Fatal(err)
	}
	signer, err := ssh.ParsePrivateKey(b)
	if err != nil {
		l.t.Fatal(err)
	}
	client, err := ssh.Dial("tcp", fmt.Sprint("127.0.0.1:", l.sshPort), &ssh.ClientConfig{
		User: "root", Auth: []ssh.AuthMethod{ssh.PublicKeys(signer)}, HostKeyCallback: ssh.InsecureIgnoreHostKey(), Timeout: 10 * time.Second})
	if err != nil {
		return "", "", err
	}
	defer client.Close()
	session, err := client.NewSession()
	if err != nil {
		return "", "", err
	}
	var o, e bytes.Buffer
	session.Stdout, session.Stderr = &o, &e
	err = session.Run(command)
	return o.String(), e.String(), err
}

func (l *labHost) status(service string) (labStatus, error) {
	l.t.Helper()
	stdout, stderr, err := l.ssh("/list/service " + service)
	if err != nil {
		return labStatus{}, fmt.Errorf("/list/service: %w: %s", err, stderr)
	}
	var list struct{ Services []labStatus }
	if err := json.Unmarshal([]byte(stdout), &list); err != nil {
		return labStatus{}, err
	}
	if len(list.Services) != 1 {
		return labStatus{}, fmt.Errorf("%d services", len(list.Services))
	}
	return list.Services[0], nil
}

// waitState waits until a service has a state and its info has all these words.
func (l *labHost) waitState(service, state string, info ...string) labStatus {
	l.t.Helper()
	var s labStatus
	labWait(l.t, time.Minute, service+" is "+state, func() (err error) {
		if s, err = l.status(service); err != nil {
			return err
		}
		for _, word := range info {
			if !strings.Contains(s.StateInfo, word) {
				return fmt.Errorf("%+v, without %q", s, word)
			}
		}
		if s.State != state {
			return fmt.Errorf("%+v", s)
		}
		return nil
	})
	return s
}

// waitCommit waits until a service is OK and runs this commit.
func (l *labHost) waitCommit(service, hash string) {
	l.t.Helper()
	labWait(l.t, time.Minute, service+" runs "+hash[:8], func() error {
		samples, err := l.metrics()
		if err != nil {
			return err
		}
		state, ok := samples[fmt.Sprintf("gitopper_service_state{service=%q}", service)]
		var info []string
		for sample := range maps.Keys(samples) {
			if strings.HasPrefix(sample, "gitopper_service_info{") &&
				strings.Contains(sample, fmt.Sprintf("service=%q", service)) {
				info = append(info, sample)
			}
		}
		if !ok || state != 0 || len(info) != 1 || !strings.Contains(info[0], `hash="`+hash[:8]+`"`) {
			return fmt.Errorf("state %v (given: %v), %v", state, ok, info)
		}
		return nil
	})
}

// waitFile waits until a file on the host has this content.
func (l *labHost) waitFile(path, want string) {
	l.t.Helper()
	labWait(l.t, time.Minute, fmt.Sprintf("%s has %.60q", path, want), func() error {
		if got := l.read(path); got != want {
			return fmt.Errorf("%.300q", got)
		}
		return nil
	})
}

// waitRounds waits until gitopper has looked at upstream n more times: time enough to do what it should not.
func (l *labHost) waitRounds(u *labUpstream, n int64) {
	l.t.Helper()
	want := u.looks.Load() + n
	labWait(l.t, time.Minute, fmt.Sprint(n, " looks at upstream"), func() error {
		if got := u.looks.Load(); got < want {
			return fmt.Errorf("%d to come", want-got)
		}
		return nil
	})
}

// labWait polls until the condition holds, which says what is missing. To ask may mean to run programs on a host:
// most of the time is left to those that are waited for.
func labWait(t *testing.T, limit time.Duration, what string, condition func() error) {
	t.Helper()
	deadline := time.Now().Add(limit)
	for {
		asked := time.Now()
		err := condition()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("waited %v until %s: %v", limit, what, err)
		}
		time.Sleep(max(20*time.Millisecond, min(3*time.Since(asked), time.Second)))
	}
}

// labListen listens on a port that this process may just have let go: until each program that was started
// meanwhile runs, it holds the port, too.
func labListen(t *testing.T, port int) (l net.Listener) {
	t.Helper()
	labWait(t, 30*time.Second, fmt.Sprint("port ", port, " is free"), func() (err error) {
		l, err = net.Listen("tcp", fmt.Sprint("127.0.0.1:", port))
		return err
	})
	return l
}

func labGet(url string) (string, error) {
	client := http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := client.Get(url)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s: %s", url, resp.Status, b)
	}
	return string(b), err
}

// labMoments is what decides when something happens in a test: by chance, but as before with LAB_SEED.
// Tests differ in their stream.
func labMoments(t *testing.T, stream uint64) *rand.Rand {
	t.Helper()
	seed := uint64(time.Now().UnixNano())
	if s := os.Getenv("LAB_SEED"); s != "" {
		seed, _ = strconv.ParseUint(s, 10, 64)
	}
	t.Logf("for the same moments again: LAB_SEED=%d", seed)
	return rand.New(rand.NewPCG(seed, stream))
}

// labUpstream is a repository on this machine, served to the labs by Git's own smart HTTP.
type labUpstream struct {
	t         *testing.T
	git, tree string
	port      int
	server    *http.Server
	looks     atomic.Int64 // requests for its refs, which every ls-remote and every fetch begins with
	failing   atomic.Int64 // how many of the next ones fail
}

func newLabUpstream(t *testing.T) *labUpstream {
	t.Helper()
	dir := t.TempDir()
	u := &labUpstream{t: t, git: filepath.Join(dir, "config.git"), tree: filepath.Join(dir, "tree"),
		port: labPort()}
	labRun(t, "git", "init", "-q", "--bare", "-b", "main", u.git)
	if err := os.Mkdir(u.tree, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, setting := range []string{"uploadpack.allowFilter", "uploadpack.allowAnySHA1InWant"} {
		u.run("config", setting, "true")
	}
	u.start()
	t.Cleanup(u.stop)
	return u
}

func (u *labUpstream) url() string { return fmt.Sprintf("http://127.0.0.1:%d/config.git", u.port) }

// start serves the repository, at the same address each time.
func (u *labUpstream) start() {
	u.t.Helper()
	exec := labRun(u.t, "git", "--exec-path")
	handler := &cgi.Handler{Path: exec + "/git-http-backend",
		Env: []string{"GIT_PROJECT_ROOT=" + filepath.Dir(u.git), "GIT_HTTP_EXPORT_ALL=1"}, Stderr: io.Discard}
	u.server = &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.HasSuffix(r.URL.Path, "/info/refs") {
			u.looks.Add(1)
			if u.failing.Add(-1) >= 0 {
				http.Error(w, "not now", http.StatusServiceUnavailable)
				return
			}
		}
		// net/http/cgi hands on HTTP_GIT_PROTOCOL, which git itself wants under this name.
		h := *handler
		h.Env = append(slices.Clip(h.Env), "GIT_PROTOCOL="+r.Header.Get("Git-Protocol"))
		h.ServeHTTP(w, r)
	})}
	go u.server.Serve(labListen(u.t, u.port))
}

// stop ends the server and its connections: upstream is away.
func (u *labUpstream) stop() { u.server.Close() }

// run runs git on the repository.
func (u *labUpstream) run(args ...string) string {
	u.t.Helper()
	cmd := exec.Command("git", args...)
	cmd.Dir = u.tree
	cmd.Env = append(os.Environ(), "GIT_DIR="+u.git, "GIT_WORK_TREE="+u.tree, "GIT_CONFIG_GLOBAL=/dev/null",
		"GIT_CONFIG_NOSYSTEM=1",
		"GIT_AUTHOR_NAME=lab", "GIT_AUTHOR_EMAIL=lab@example.org", "GIT_COMMITTER_NAME=lab", "GIT_COMMITTER_EMAIL=lab@example.org")
	out, err := cmd.CombinedOutput()
	if err != nil {
		u.t.Fatalf("git %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(string(out))
}

// labGone as a file's content takes the file away.
const labGone = "\x00gone"

// commit writes files, commits them to main (which can then be fetched) and returns the commit's hash.
// Options are git's, for signing.
func (u *labUpstream) commit(files map[string]string, options ...string) string {
	u.t.Helper()
	for path, content := range files {
		path = filepath.Join(u.tree, path)
		err := os.Remove(path)
		if content != labGone {
			if err = os.MkdirAll(filepath.Dir(path), 0o755); err == nil {
				err = os.WriteFile(path, []byte(content), 0o644)
			}
		}
		if err != nil {
			u.t.Fatal(err)
		}
	}
	u.run("add", "-A")
	u.run(append(options, "commit", "-q", "--allow-empty", "-m",
		strings.Join(slices.Sorted(maps.Keys(files)), " "))...)
	return u.run("rev-parse", "HEAD")
}
