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

// The tests in this file and in lab_trial_test.go look at gitopper from outside: the binary runs as a systemd unit on
// a throw-away host (testdata/lab), and what it did is read from /proc/1/mountinfo, from the units themselves and
// over their own interfaces, not from its log. They need root, and skip with the reason where no lab can boot.

// labShared is what all lab tests of one run use: the directory of the labs, the binary, and a stopped host with the
// packages of Debian that most tests manage, on whose disk the other hosts are built.
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

// newLab boots a host that has nginx and prometheus, neither of them enabled, and gitopper in /usr/local/bin. The
// calling test runs in parallel with the other lab tests from there on: they mostly wait.
func newLab(t *testing.T) *labHost {
	t.Helper()
	return bootLab(t, "base")
}

// newBareLab boots a host with this machine's packages only.
func newBareLab(t *testing.T) *labHost {
	t.Helper()
	return bootLab(t, "")
}

func bootLab(t *testing.T, base string) *labHost {
	t.Helper()
	if testing.Short() {
		t.Skip("a lab host takes a while, and this is -short")
	}
	if os.Geteuid() != 0 {
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
	// Only now: each lab test has come here before the first of them goes on, so what they share is made once and
	// the last of them, whichever that is, takes it away.
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
	if base != "" {
		if s.base.Do(func() { s.baseErr = makeLabBase(base) }); s.baseErr != nil {
			t.Skip("no lab host: ", s.baseErr)
		}
	}

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
	if out, err := labScript("up", args...); err != nil {
		t.Skipf("no lab host: %v\n%s", err, out)
	}
	l.openRoot()
	t.Cleanup(func() {
		if t.Failed() {
			l.dump()
		}
		l.fs.Close()
	})
	binary, err := os.ReadFile(filepath.Join(s.dir, "gitopper"))
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
func labScript(verb string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "testdata/lab", append([]string{verb}, args...)...)
	cmd.Env = append(os.Environ(), "LAB_DIR="+labShared.dir, fmt.Sprint("LAB_OWNER=", os.Getpid()))
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

// labPort returns a port that is free on this machine, whose network the labs share. It is below those that the
// kernel gives to clients, and never given twice.
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

// witness makes a service that copies file to /run/NAME.seen when it starts and when it is reloaded, and keeps a
// line for each of these in /run/NAME.calls. More may hold further settings of its [Service].
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

// configure writes the config: body is what follows the keys, upstream and mount of [global]. Entries are for the
// machine "lab".
func (l *labHost) configure(upstream *labUpstream, body string) {
	l.t.Helper()
	l.write("/etc/gitopper/config.toml", fmt.Sprintf(`[global]
upstream = %q
mount = %q
keys = [ { path = "operator.pub" } ]
%s`, upstream.url(), labCheckouts, body))
}

// start makes gitopper the unit that it wants to be, with short waits, and starts it: systemctl returns when it is READY.
func (l *labHost) start(options ...string) {
	l.t.Helper()
	l.write("/etc/systemd/system/gitopper.service", l.run("/usr/local/bin/gitopper", "--unit")+"\n")
	if !slices.Contains(options, "-t") {
		options = append(options, "-t", "500ms")
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
			if strings.HasPrefix(sample, "gitopper_service_info{") && strings.Contains(sample, fmt.Sprintf("service=%q", service)) {
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

// labWait polls until the condition holds, which says what is missing.
func labWait(t *testing.T, limit time.Duration, what string, condition func() error) {
	t.Helper()
	deadline := time.Now().Add(limit)
	for {
		err := condition()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("waited %v until %s: %v", limit, what, err)
		}
		time.Sleep(20 * time.Millisecond)
	}
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

// labUpstream is a repository on this machine, served to the labs by Git's own smart HTTP.
type labUpstream struct {
	t         *testing.T
	git, tree string
	port      int
	server    *http.Server
	looks     atomic.Int64 // requests for its refs, which every ls-remote and every fetch begins with
}

func newLabUpstream(t *testing.T) *labUpstream {
	t.Helper()
	dir := t.TempDir()
	u := &labUpstream{t: t, git: filepath.Join(dir, "config.git"), tree: filepath.Join(dir, "tree"), port: labPort()}
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
	handler := &cgi.Handler{Path: exec + "/git-http-backend", Env: []string{"GIT_PROJECT_ROOT=" + filepath.Dir(u.git), "GIT_HTTP_EXPORT_ALL=1"}, Stderr: io.Discard}
	u.server = &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.HasSuffix(r.URL.Path, "/info/refs") {
			u.looks.Add(1)
		}
		// net/http/cgi hands on HTTP_GIT_PROTOCOL, which git itself wants under this name.
		h := *handler
		h.Env = append(slices.Clip(h.Env), "GIT_PROTOCOL="+r.Header.Get("Git-Protocol"))
		h.ServeHTTP(w, r)
	})}
	var listener net.Listener
	labWait(u.t, 10*time.Second, "upstream has its port", func() (err error) {
		listener, err = net.Listen("tcp", fmt.Sprint("127.0.0.1:", u.port))
		return err
	})
	go u.server.Serve(listener)
}

// stop ends the server and its connections: upstream is away.
func (u *labUpstream) stop() { u.server.Close() }

// run runs git on the repository.
func (u *labUpstream) run(args ...string) string {
	u.t.Helper()
	cmd := exec.Command("git", args...)
	cmd.Dir = u.tree
	cmd.Env = append(os.Environ(), "GIT_DIR="+u.git, "GIT_WORK_TREE="+u.tree, "GIT_CONFIG_GLOBAL=/dev/null", "GIT_CONFIG_NOSYSTEM=1",
		"GIT_AUTHOR_NAME=lab", "GIT_AUTHOR_EMAIL=lab@example.org", "GIT_COMMITTER_NAME=lab", "GIT_COMMITTER_EMAIL=lab@example.org")
	out, err := cmd.CombinedOutput()
	if err != nil {
		u.t.Fatalf("git %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(string(out))
}

// labGone as a file's content takes the file away.
const labGone = "\x00gone"

// commit writes files, commits them to main (which can then be fetched) and returns the commit's hash. Options are
// git's, for signing.
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
	u.run(append(options, "commit", "-q", "--allow-empty", "-m", strings.Join(slices.Sorted(maps.Keys(files)), " "))...)
	return u.run("rev-parse", "HEAD")
}

// TestLabHost holds the lab to what the other tests build on.
func TestLabHost(t *testing.T) {
	l := newBareLab(t)
	u := newLabUpstream(t)
	first := u.commit(map[string]string{"a": "1\n"})
	if got := l.run("git", "ls-remote", u.url(), "main"); !strings.HasPrefix(got, first) || u.looks.Load() != 1 {
		t.Errorf("ls-remote in the lab: %q, %d looks", got, u.looks.Load())
	}
	u.stop()
	if out, err := l.try("git", "ls-remote", u.url()); err == nil {
		t.Errorf("upstream is stopped and answers: %s", out)
	}
	u.start()
	l.run("git", "clone", "-q", "--filter=blob:none", u.url(), "/root/clone")

	l.unit("strict.service", `[Service]
Type=oneshot
PrivateTmp=yes
ProtectSystem=strict
ReadWritePaths=/root
ExecStart=sh -c "touch /tmp/mine && ! touch /etc/mine && cp /proc/sys/kernel/random/boot_id /root"
`)
	l.run("systemctl", "start", "strict")
	boot := l.read("/proc/sys/kernel/random/boot_id")
	if got := l.read("/root/boot_id"); len(got) != 37 || got != boot {
		t.Errorf("boot id in a unit: %q, outside: %q", got, boot)
	}

	pid, _ := labScript("pid", l.name)
	l.reboot()
	if now, _ := labScript("pid", l.name); now == pid {
		t.Errorf("PID 1 after the reboot is the same process, %s", pid)
	}
	if now := l.read("/proc/sys/kernel/random/boot_id"); len(now) != 37 || now == boot {
		t.Errorf("boot id after the reboot: %q, before: %q", now, boot)
	}
	if got := l.read("/root/clone/a"); got != "1\n" {
		t.Errorf("a file after the reboot: %q", got)
	}
	if _, err := l.try("test", "-e", "/tmp/mine"); err == nil {
		t.Error("a unit with PrivateTmp wrote to /tmp")
	}

	gone := exec.Command("testdata/lab", "up", l.name+"x")
	gone.Env = append(os.Environ(), "LAB_DIR="+labShared.dir)
	if err := gone.Start(); err != nil {
		t.Fatal(err)
	}
	holder := filepath.Join(labShared.dir, l.name+"x", "holder")
	labWait(t, time.Minute, "a lab is half up", func() error { _, err := os.Stat(holder); return err })
	gone.Process.Kill()
	gone.Wait()
	if out, err := labScript("down", l.name+"x"); err != nil {
		t.Fatal(err, out)
	}
	if _, err := os.Stat(filepath.Dir(holder)); err == nil {
		t.Error("down left files of a lab whose up was killed")
	}
	labWait(t, 10*time.Second, "a lab's processes are gone after down", func() error {
		groups, err := filepath.Glob("/proc/[0-9]*/cgroup")
		for _, group := range groups {
			if b, _ := os.ReadFile(group); bytes.Contains(b, []byte("/lab-"+l.name+"x-")) {
				return errors.New(group)
			}
		}
		return err
	})
}

// labPrometheus has Prometheus listen on a port of this lab's own.
func (l *labHost) labPrometheus() (api string) {
	l.t.Helper()
	port := labPort()
	l.write("/etc/systemd/system/prometheus.service.d/port.conf", fmt.Sprintf(`[Service]
ExecStart=
ExecStart=/usr/bin/prometheus --web.listen-address=127.0.0.1:%d --storage.tsdb.path=/var/lib/prometheus/metrics2/
`, port))
	l.run("systemctl", "daemon-reload")
	return fmt.Sprintf("http://127.0.0.1:%d", port)
}

// prometheusLoaded waits until the config that Prometheus says it runs with has a text in it, and returns when it was loaded.
func prometheusLoaded(t *testing.T, api, text string) (at string) {
	t.Helper()
	labWait(t, 3*time.Minute, "Prometheus runs with "+text, func() error {
		config, err := labGet(api + "/api/v1/status/config")
		if err == nil && !strings.Contains(config, text) {
			err = errors.New(config)
		}
		if err != nil {
			return err
		}
		metrics, err := labGet(api + "/metrics")
		for line := range strings.Lines(metrics) {
			if s, ok := strings.CutPrefix(line, "prometheus_config_last_reload_success_timestamp_seconds "); ok {
				at = s
			}
		}
		return err
	})
	return at
}

// A package that is not there is installed, its unit runs with the repository's config and with each pushed change
// of it, and is left alone by what is pushed elsewhere.
func TestLabPrometheusRunsWhatIsPushed(t *testing.T) {
	l := newBareLab(t)
	// Somebody's workstation may have it.
	l.run("sh", "-c", "! dpkg -s prometheus || apt-get purge -qq -y prometheus")
	u := newLabUpstream(t)
	api := l.labPrometheus()
	config := func(rollout int) string {
		return fmt.Sprintf("global:\n  external_labels:\n    rollout: r%d\n", rollout)
	}
	u.commit(map[string]string{"prometheus/etc/prometheus.yml": config(1), "README": "elsewhere"})
	l.configure(u, `
[[services]]
machine = "lab"
service = "prometheus"
user = "prometheus"
package = "prometheus"
action = "reload"
dirs = [ { local = "/etc/prometheus", link = "prometheus/etc" } ]
`)
	l.start()
	prometheusLoaded(t, api, "rollout: r1")
	want := []string{"/etc/prometheus: " + labCheckouts + "/prometheus/prometheus/etc"}
	if got := l.mounts("/etc/prometheus"); !slices.Equal(got, want) {
		t.Errorf("PID 1 has mounted %q, want %q", got, want)
	}
	if got := l.run("stat", "-c", "%U", labCheckouts+"/prometheus", labCheckouts+"/prometheus/.git/HEAD", "/etc/prometheus/prometheus.yml"); got != "prometheus\nprometheus\nprometheus" {
		t.Errorf("owners of checkout, .git and file: %q", got)
	}
	l.waitState("prometheus", "OK")
	process := l.show("prometheus", "MainPID")

	u.commit(map[string]string{"prometheus/etc/prometheus.yml": config(2)})
	loaded := prometheusLoaded(t, api, "rollout: r2")
	// Elsewhere, also where the path begins alike.
	elsewhere := u.commit(map[string]string{"README": "changed", "prometheus/etcetera/x": "x", "prometheus/etc.yml": "x"})
	l.waitCommit("prometheus", elsewhere)
	l.waitRounds(u, 2)
	if again := prometheusLoaded(t, api, "rollout: r2"); again != loaded {
		t.Errorf("a push elsewhere reloaded: config of %s, was of %s", again, loaded)
	}
	if now := l.show("prometheus", "MainPID"); now != process {
		t.Errorf("a reload made main process %s from %s", now, process)
	}
	if got := l.mounts("/etc/prometheus"); !slices.Equal(got, want) {
		t.Errorf("PID 1 has mounted %q, want %q", got, want)
	}
}

// labPages is an entry for an nginx whose main file is mounted as a file, and whose sites as a directory.
const labPages = `
[[services]]
machine = "lab"
service = "nginx"
dirs = [
  { local = "/etc/nginx/nginx.conf", link = "nginx/nginx.conf", file = true },
  { local = "/etc/nginx/conf.d", link = "nginx/conf.d" },
]
`

// nginxConf is nginx's main file, of one version in every line.
func nginxConf(version int) string {
	line := fmt.Sprintf("# version %d\n", version)
	return strings.Repeat(line, 1000) + "worker_processes 1; pid /run/nginx.pid; events {} http { include conf.d/*.conf; } " + line
}

// nginxSite is a site that answers with its version.
func nginxSite(port, version int) string {
	line := fmt.Sprintf("# version %d\n", version)
	return strings.Repeat(line, 1000) + fmt.Sprintf("server { listen 127.0.0.1:%d; location / { return 200 v%d; } } %s", port, version, line)
}

// waitServed waits until a page has this text.
func waitServed(t *testing.T, port int, want string) {
	t.Helper()
	labWait(t, time.Minute, fmt.Sprintf("port %d serves %q", port, want), func() error {
		got, err := labGet(fmt.Sprintf("http://127.0.0.1:%d/", port))
		if err == nil && got != want {
			err = errors.New(got)
		}
		return err
	})
}

// watchFile reads a file of the host in a tight loop until the returned function is called, which returns how many
// reads there were and the first of those that ok refused.
func (l *labHost) watchFile(path string, ok func(content string) bool) (stop func() (reads int, bad string)) {
	path = filepath.Join(l.fs.Name(), path)
	done, result := make(chan struct{}), make(chan string, 1)
	reads := 0
	go func() {
		bad := ""
		for ; ; reads++ {
			select {
			case <-done:
				result <- bad
				return
			default:
			}
			b, err := os.ReadFile(path)
			if (err != nil || !ok(string(b))) && bad == "" {
				bad = fmt.Sprintf("%s: read %d: error %v, %d bytes: %.40q ... %.40q", path, reads, err, len(b), b, b[max(0, len(b)-40):])
			}
		}
	}()
	return func() (int, string) {
		close(done)
		bad := <-result
		return reads, bad
	}
}

// While one commit after the other goes live, no reader finds a file missing, empty, or made of two commits.
func TestLabReadersFindWholeFiles(t *testing.T) {
	const commits = 200
	l, u := newLab(t), newLabUpstream(t)
	port := labPort()
	push := func(version int) {
		u.commit(map[string]string{"nginx/nginx.conf": nginxConf(version), "nginx/conf.d/site.conf": nginxSite(port, version)})
	}
	push(0)
	l.configure(u, labPages+"action = \"reload\"\nsettle = \"1ms\"\n")
	l.start("-t", "50ms")
	waitServed(t, port, "v0")
	l.waitState("nginx", "OK")

	whole := func(make func(version int) string) func(string) bool {
		return func(got string) bool {
			var version int
			_, err := fmt.Sscanf(got, "# version %d\n", &version)
			return err == nil && got == make(version)
		}
	}
	var last atomic.Int64
	file := l.watchFile("/etc/nginx/nginx.conf", whole(nginxConf))
	dir := l.watchFile("/etc/nginx/conf.d/site.conf", whole(func(version int) string {
		last.Store(int64(version))
		return nginxSite(port, version)
	}))
	for version := 1; version <= commits; version++ {
		push(version)
		labWait(t, time.Minute, fmt.Sprint("version ", version, " is live"), func() error {
			if got := last.Load(); got != int64(version) {
				return fmt.Errorf("version %d", got)
			}
			return nil
		})
	}
	for _, stop := range []func() (int, string){file, dir} {
		reads, bad := stop()
		if bad != "" {
			t.Error(bad)
		}
		t.Logf("%d reads", reads)
		if reads < commits {
			t.Errorf("%d reads are too few to tell", reads)
		}
	}
	waitServed(t, port, fmt.Sprint("v", commits))
	l.waitFile("/etc/nginx/nginx.conf", nginxConf(commits))
}

// kill ends gitopper and all that it started, at once, and tells whether there was something to kill.
func (l *labHost) kill() bool {
	l.t.Helper()
	const group = "/sys/fs/cgroup/system.slice/gitopper.service"
	if l.lines(group+"/cgroup.procs") == 0 {
		return false
	}
	f, err := l.fs.OpenFile(group[1:]+"/cgroup.kill", os.O_WRONLY, 0)
	if errors.Is(err, os.ErrNotExist) { // before Linux 5.14, or between two of its lives
		_, err = l.try("systemctl", "kill", "-s", "KILL", "gitopper")
		return err == nil
	}
	if err != nil {
		l.t.Fatal(err)
	}
	defer f.Close()
	_, err = f.WriteString("1")
	return err == nil
}

// Killed with all its children at any moment, as often as it may be, it ends where it should.
func TestLabSurvivesKills(t *testing.T) {
	const kills = 200
	l, u := newLab(t), newLabUpstream(t)
	l.witness("app", "/etc/app/dir/conf", "")
	version := 0
	push := func() {
		version++
		files := map[string]string{
			"app/conf":                      fmt.Sprintln("version", version),
			"app/file":                      fmt.Sprintln("file", version),
			fmt.Sprint("app/new/", version): "",
		}
		// What a commit that never got to its end has brought must go again with the next one, too.
		if version > 1 {
			files[fmt.Sprint("app/new/", version-1)] = labGone
		}
		u.commit(files)
	}
	push()
	l.configure(u, `
[[services]]
machine = "lab"
service = "app"
action = "reload"
settle = "50ms"
dirs = [ { local = "/etc/app/dir", link = "app" }, { local = "/etc/app/file", link = "app/file", file = true } ]
`)
	l.start("-t", "50ms")
	l.waitFile("/run/app.seen", "version 1\n")

	seed := uint64(time.Now().UnixNano())
	if s := os.Getenv("LAB_SEED"); s != "" {
		seed, _ = strconv.ParseUint(s, 10, 64)
	}
	t.Logf("for the same moments again: LAB_SEED=%d", seed)
	moments := rand.New(rand.NewPCG(seed, 0))
	// What is under way from the start of the daemon to some time after the commit's unit was told is to be met, however
	// slow this machine is today.
	push()
	l.kill()
	start := time.Now()
	l.waitFile("/run/app.seen", fmt.Sprintln("version", version))
	span := min(max(time.Since(start)*3/2, 300*time.Millisecond), 2*time.Second)
	t.Logf("kills within %v of a start", span)
	for killed := 0; killed < kills; {
		push()
		time.Sleep(time.Duration(moments.Int64N(int64(span)))) // not a wait for anything
		if l.kill() {
			killed++
		}
	}
	push()
	last := u.run("rev-parse", "HEAD")
	l.waitCommit("app", last)
	l.waitFile("/run/app.seen", fmt.Sprintln("version", version))
	l.waitFile("/etc/app/dir/conf", fmt.Sprintln("version", version))
	l.waitFile("/etc/app/file", fmt.Sprintln("file", version))
	l.waitRounds(u, 2)

	checkout := labCheckouts + "/app"
	if got := l.run("git", "-C", checkout, "status", "--porcelain"); got != "" {
		t.Errorf("git status: %s", got)
	}
	if got := l.run("git", "-C", checkout, "rev-parse", "HEAD"); got != last {
		t.Errorf("HEAD is %s, want %s", got, last)
	}
	l.run("git", "-C", checkout, "fsck", "--connectivity-only")
	if got := l.run("find", checkout+"/.git", "-name", "*.lock"); got != "" {
		t.Errorf("locks left: %s", got)
	}
	if got, want := l.run("ls", checkout+"/app/new"), u.run("ls-tree", "--name-only", "HEAD:app/new"); got != want {
		t.Errorf("files: %q, want %q", got, want)
	}
	want := []string{"/etc/app/dir: " + checkout + "/app", "/etc/app/file: " + checkout + "/app/file"}
	if got := l.mounts("/etc/app"); !slices.Equal(got, want) {
		t.Errorf("PID 1 has mounted %q, want %q", got, want)
	}
}

// wrap has a program of the host append a line with its arguments to /run/NAME.calls each time it is started by
// name: from a directory that comes before the real one's in every $PATH.
func (l *labHost) wrap(name string) {
	l.t.Helper()
	real := l.run("which", name)
	// Whoever runs it may write there.
	l.run("install", "-m", "666", "/dev/null", "/run/"+name+".calls")
	l.write("/usr/local/bin/"+name, fmt.Sprintf("#!/bin/sh\necho \"$*\" >>/run/%s.calls\nexec %s \"$@\"\n", name, real))
}

// However many services there are on one upstream, a round in which nothing is new is one git process.
func TestLabIdleRoundIsOneGitProcess(t *testing.T) {
	const services, interval = 50, 2 * time.Second
	l, u := newLab(t), newLabUpstream(t)
	files, config := map[string]string{}, "action = \"reload\"\nsettle = \"10ms\"\n"
	for i := range services {
		name := fmt.Sprint("idle", i)
		files[name+"/conf"] = name
		l.write("/etc/systemd/system/"+name+".service", "[Service]\nExecStart=sleep infinity\nExecReload=true\n")
		config += fmt.Sprintf("[[services]]\nmachine = \"lab\"\nservice = %q\ndirs = [ { local = \"/etc/%[1]s\", link = %[1]q } ]\n", name)
	}
	last := u.commit(files)
	l.configure(u, config)
	l.wrap("git")
	l.wrap("systemctl")
	l.start("-t", interval.String())
	for i := range services {
		l.waitCommit(fmt.Sprint("idle", i), last)
	}
	l.waitRounds(u, 2)

	// A look is a git process and a request; between the two they differ for a moment.
	level := func() (gits, looks int64) {
		t.Helper()
		before, excess := int64(l.lines("/run/git.calls"))-u.looks.Load(), int64(0)
		labWait(t, time.Minute, "no look is under way", func() error {
			gits, looks = int64(l.lines("/run/git.calls")), u.looks.Load()
			if excess = gits - looks; excess != before {
				before = excess
				return errors.New("git was just started")
			}
			return nil
		})
		return gits, looks
	}
	l.run("truncate", "-s", "0", "/run/systemctl.calls")
	gits, looks := level()
	ops := l.metric("gitopper_machine_git_ops_total")
	start := time.Now()
	l.waitRounds(u, 5)
	moreGits, moreLooks := level()
	rounds := moreLooks - looks
	if n := moreGits - gits; n != rounds {
		t.Errorf("%d looks at upstream were %d git processes:\n%s", rounds, n, l.run("tail", "-n", "20", "/run/git.calls"))
	}
	if most := int64(time.Since(start)/interval) + 2; rounds > most {
		t.Errorf("%d looks in %v, want at most %d: one for all services", rounds, time.Since(start), most)
	}
	if n := int64(l.metric("gitopper_machine_git_ops_total") - ops); n < rounds-1 || n > rounds+1 {
		t.Errorf("gitopper counted %d git processes in %d looks", n, rounds)
	}
	for line := range strings.Lines(l.read("/run/systemctl.calls")) {
		verb := strings.Fields(line)
		if !slices.ContainsFunc(verb, func(v string) bool { return v == "show" || v == "is-enabled" || v == "is-active" }) {
			t.Errorf("an idle round ran systemctl %s", line)
		}
	}
}

// A checkout is an ordinary one, of which only the linked paths are on disk, with all history.
func TestLabCheckoutIsSparseWithAllHistory(t *testing.T) {
	l, u := newLab(t), newLabUpstream(t)
	for i := range 20 {
		u.commit(map[string]string{
			"app/dir/sub/conf": fmt.Sprint(i), "app/dir.d/no": fmt.Sprint(i), "app/one.conf": fmt.Sprint(i), "app/other.conf": "no",
			"dir/sub/no": "no", "README": fmt.Sprint(i), "one.conf": "no",
		})
	}
	last := u.run("rev-parse", "HEAD")
	l.run("useradd", "--system", "--create-home", "app")
	l.configure(u, `
[[services]]
machine = "lab"
service = "app"
user = "app"
dirs = [ { local = "/srv/app", link = "app/dir" }, { local = "/srv/one.conf", link = "app/one.conf", file = true } ]
`)
	l.start()
	l.waitCommit("app", last)
	checkout := labCheckouts + "/app"
	if got := l.run("sh", "-c", "cd "+checkout+" && find . -path ./.git -prune -o -type f -print | sort"); got != "./app/dir/sub/conf\n./app/one.conf" {
		t.Errorf("on disk: %q", got)
	}
	git := func(args ...string) string {
		t.Helper()
		return l.run(append([]string{"runuser", "-u", "app", "--", "git", "-C", checkout}, args...)...)
	}
	if got, want := git("log", "--format=%H"), u.run("log", "--format=%H"); got != want {
		t.Errorf("git log: %q, want %q", got, want)
	}
	if got := git("status", "--porcelain"); got != "" {
		t.Errorf("git status: %q", got)
	}
	if got := l.run("find", checkout, "!", "-user", "app"); got != "" {
		t.Errorf("not the user's: %s", got)
	}
	if l.read("/srv/app/sub/conf") != "19" || l.read("/srv/one.conf") != "19" {
		t.Errorf("mounted: %q and %q, want 19", l.read("/srv/app/sub/conf"), l.read("/srv/one.conf"))
	}
}

// With the unit that gitopper prints for itself, its mounts reach PID 1 and units that have mount namespaces of
// their own, also those made for later commits; promtool and systemd-analyze like what they see.
func TestLabMountsReachPrivateUnits(t *testing.T) {
	l, u := newLab(t), newLabUpstream(t)
	l.unit("strict.service", "[Service]\nPrivateTmp=yes\nProtectSystem=strict\nProtectHome=yes\nExecStart=sleep infinity\nExecReload=true\n")
	l.write("/etc/app/README", "")
	l.run("systemctl", "start", "strict")
	process := l.show("strict", "MainPID")
	l.configure(u, `
[[services]]
machine = "lab"
service = "strict"
action = "reload"
settle = "50ms"
dirs = [ { local = "/etc/app/dir", link = "app" }, { local = "/etc/app/file", link = "app/file", file = true } ]
`)
	for version := range 3 {
		content := fmt.Sprintln("version", version)
		hash := u.commit(map[string]string{"app/conf": content, "app/file": content})
		if version == 0 {
			l.start()
		}
		l.waitCommit("strict", hash)
		for _, file := range []string{"/etc/app/dir/conf", "/etc/app/file"} {
			if got := l.run("cat", "/proc/"+process+"/root"+file) + "\n"; got != content {
				t.Errorf("%d: the unit sees %q in %s, want %q", version, got, file, content)
			}
		}
		want := []string{"/etc/app/dir: " + labCheckouts + "/strict/app", "/etc/app/file: " + labCheckouts + "/strict/app/file"}
		if got := l.mounts("/etc/app"); !slices.Equal(got, want) {
			t.Errorf("%d: PID 1 has mounted %q, want %q", version, got, want)
		}
	}
	if now := l.show("strict", "MainPID"); now != process {
		t.Errorf("reloads made process %s from %s", now, process)
	}

	text, err := labGet(fmt.Sprintf("http://127.0.0.1:%d/metrics", l.metricPort))
	if err != nil {
		t.Fatal(err)
	}
	l.write("/root/metrics", text)
	if out, err := l.try("sh", "-c", "promtool check metrics </root/metrics 2>&1"); err != nil || out != "" {
		t.Errorf("promtool check metrics: %v: %s", err, out)
	}
	if out, err := l.try("sh", "-c", "systemd-analyze verify /etc/systemd/system/gitopper.service 2>&1"); err != nil || out != "" {
		t.Errorf("systemd-analyze verify: %v: %s", err, out)
	}
}

// After a reboot the mounts are there before anything that is ordered after gitopper starts, with upstream away; a
// unit that started on other files is told; a restart of gitopper alone does nothing to anybody.
func TestLabRebootAndRestart(t *testing.T) {
	l, u := newLab(t), newLabUpstream(t)
	// Starts before anything is mounted, and is managed.
	l.witness("early", "/srv/app/conf", "[Unit]\nBefore=gitopper.service\n[Install]\nWantedBy=multi-user.target")
	// Knows nothing of gitopper but its name.
	l.unit("late.service", "[Unit]\nAfter=gitopper.service\n[Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=cp /srv/app/conf /srv/file /run\n[Install]\nWantedBy=multi-user.target\n")
	hash := u.commit(map[string]string{"app/conf": "1\n", "app/file": "file\n"})
	l.configure(u, `
[[services]]
machine = "lab"
service = "early"
action = "reload"
settle = "100ms"
dirs = [ { local = "/srv/app", link = "app" }, { local = "/srv/file", link = "app/file", file = true } ]
`)
	l.start()
	l.waitCommit("early", hash)
	l.run("systemctl", "enable", "gitopper", "early", "late")

	quiet := func(when string) {
		t.Helper()
		seen := func() string {
			return l.read("/run/early.calls") + l.run("systemctl", "show", "early", "-p", "MainPID", "-p", "InvocationID", "-p", "StateChangeTimestampMonotonic")
		}
		l.waitRounds(u, 2)
		before := seen()
		l.run("systemctl", "restart", "gitopper")
		l.waitCommit("early", hash)
		l.waitRounds(u, 3)
		if after := seen(); after != before {
			t.Errorf("%s, a restart of gitopper touched the unit: %s, was: %s", when, after, before)
		}
	}
	quiet("after the first start")

	u.stop()
	l.reboot()
	l.waitFile("/run/conf", "1\n")
	l.waitFile("/run/file", "file\n")
	if got := l.show("late", "Result"); got != "success" {
		t.Errorf("the unit after gitopper: %s", got)
	}
	if first, _, _ := strings.Cut(l.read("/run/early.calls"), "\n"); first != "start" {
		t.Errorf("the unit before gitopper: first call %q", first)
	}
	l.waitFile("/run/early.seen", "1\n")
	want := []string{"/srv/app: " + labCheckouts + "/early/app", "/srv/file: " + labCheckouts + "/early/app/file"}
	if got := l.mounts("/srv"); !slices.Equal(got, want) {
		t.Errorf("PID 1 has mounted %q, want %q", got, want)
	}
	u.start()
	l.waitCommit("early", hash)
	quiet("after the reboot")
}
