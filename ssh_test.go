//go:build linux

package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/ecdh"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"gitopper/ctl"

	"golang.org/x/crypto/ssh"
)

// sshFixture is a server with two services, a rw key (alice) and a ro key (bob).
type sshFixture struct {
	*sshServer
	t       *testing.T
	dir     string
	addr    string
	rw, ro  ssh.Signer
	ops     chan op // what services were asked for
	doing   func(context.Context, op) error
	stop    context.CancelFunc
	stopped chan bool
	log     *lockedBuffer
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// newSSHFixture starts a server; tune may change it before.
func newSSHFixture(t *testing.T, tune func(*sshFixture)) *sshFixture {
	t.Helper()
	f := &sshFixture{t: t, dir: t.TempDir(), ops: make(chan op, 100), stopped: make(chan bool), log: &lockedBuffer{}}
	old := slog.Default()
	slog.SetDefault(slog.New(slog.NewTextHandler(f.log, &slog.HandlerOptions{Level: slog.LevelDebug})))
	t.Cleanup(func() { slog.SetDefault(old) })

	f.rw, f.ro = f.key("rw", "alice@laptop"), f.key("ro", "bob@desk")
	services := []*Service{
		statusService(Status{Service: "prometheus", Commit: "606eb576bfeea4bcb8d6d6e2d5e5b1d7a1e2a3b4", State: "OK",
			Change:  time.Date(2022, 11, 18, 10, 14, 52, 0, time.FixedZone("CET", 3600)),
			waiting: waiting{Pending: 3, Committed: time.Date(2022, 11, 17, 23, 30, 0, 0, time.FixedZone("EST", -5*3600))}}),
		statusService(Status{Service: "node-exporter", State: "DIFF", Public: `git: <no such branch> "m&m" in 1 line`,
			Info: `git: <no such branch> "m&m" in 1 line` + quote(": the check's own words")}),
	}
	s, err := newSSHServer(filepath.Join(f.dir, "host"), true,
		[]key{f.keyOf("rw.pub", mayWrite), f.keyOf("ro.pub", mayLook)}, []string{"here", "there"}, "here.example.org", services)
	if err != nil {
		t.Fatal(err)
	}
	f.sshServer = s
	s.do = func(_ *Service, ctx context.Context, o op) error {
		f.ops <- o
		if f.doing != nil {
			return f.doing(ctx, o)
		}
		return nil
	}
	if tune != nil {
		tune(f)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	f.addr = l.Addr().String()
	ctx, cancel := context.WithCancel(t.Context())
	f.stop = cancel
	go func() { s.serve(ctx, l); close(f.stopped) }()
	t.Cleanup(func() { cancel(); <-f.stopped })
	return f
}

// key makes a key pair in the fixture's directory.
func (f *sshFixture) key(name, comment string) ssh.Signer {
	f.t.Helper()
	_, private, err := ed25519.GenerateKey(nil)
	if err != nil {
		f.t.Fatal(err)
	}
	block, err := ssh.MarshalPrivateKey(private, comment)
	if err != nil {
		f.t.Fatal(err)
	}
	signer, err := ssh.NewSignerFromKey(private)
	if err != nil {
		f.t.Fatal(err)
	}
	f.write(name, string(pem.EncodeToMemory(block)))
	f.write(name+".pub", keyLine(signer, comment))
	return signer
}

// keyOf is a key file as the config has it.
func (f *sshFixture) keyOf(name string, r rights) key {
	file := filepath.Join(f.dir, name)
	text, _ := os.ReadFile(file)
	return key{file, r, text}
}

func keyLine(s ssh.Signer, comment string) string {
	return strings.TrimSpace(string(ssh.MarshalAuthorizedKey(s.PublicKey()))) + " " + comment + "\n"
}

func (f *sshFixture) write(name, text string) {
	f.t.Helper()
	if err := os.WriteFile(filepath.Join(f.dir, name), []byte(text), 0o600); err != nil {
		f.t.Fatal(err)
	}
}

// options are those of the stock client, with the key of that name.
func (f *sshFixture) options(name string, more ...string) []string {
	host, port, _ := net.SplitHostPort(f.addr)
	pub, _, _, _, err := ssh.ParseAuthorizedKey([]byte(f.hostLine()))
	if err != nil {
		f.t.Fatal(err)
	}
	known := fmt.Sprintf("[%s]:%s %s", host, port, ssh.MarshalAuthorizedKey(pub))
	f.write("known_hosts", known)
	return append([]string{"-F", "/dev/null", "-o", "UserKnownHostsFile=" + filepath.Join(f.dir, "known_hosts"), "-o", "StrictHostKeyChecking=yes",
		"-o", "IdentitiesOnly=yes", "-o", "IdentityAgent=none", "-o", "LogLevel=INFO", "-o", "User=ops", "-o", "Port=" + port, "-i", filepath.Join(f.dir, name)}, more...)
}

func (f *sshFixture) hostLine() string {
	data, err := os.ReadFile(filepath.Join(f.dir, "host"))
	if err != nil {
		f.t.Fatal(err)
	}
	s, err := ssh.ParsePrivateKey(data)
	if err != nil {
		f.t.Fatal(err)
	}
	return keyLine(s, "")
}

// stock runs the stock OpenSSH client.
func (f *sshFixture) stock(args ...string) (stdout, stderr string, status int) {
	f.t.Helper()
	ctx, cancel := context.WithTimeout(f.t.Context(), time.Minute)
	defer cancel()
	var out, errs bytes.Buffer
	cmd := exec.CommandContext(ctx, "ssh", args...)
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); cmd.ProcessState == nil || ctx.Err() != nil {
		f.t.Fatalf("ssh %q: %v %v\n%s", args, err, ctx.Err(), errs.String())
	}
	return out.String(), errs.String(), cmd.ProcessState.ExitCode()
}

// dial connects with x/crypto's client.
func (f *sshFixture) dial(keys ...ssh.Signer) (*ssh.Client, error) {
	return ssh.Dial("tcp", f.addr, &ssh.ClientConfig{User: "ops\x1b[1m", Auth: []ssh.AuthMethod{ssh.PublicKeys(keys...)},
		HostKeyCallback: ssh.InsecureIgnoreHostKey(), Timeout: time.Minute})
}

func (f *sshFixture) client(k ssh.Signer) *ssh.Client {
	f.t.Helper()
	c, err := f.dial(k)
	if err != nil {
		f.t.Fatal(err)
	}
	f.t.Cleanup(func() { c.Close() })
	return c
}

// ask runs a command with x/crypto's client.
func (f *sshFixture) ask(c *ssh.Client, command string) (stdout, stderr string, status int) {
	f.t.Helper()
	s, err := c.NewSession()
	if err != nil {
		f.t.Fatal(err)
	}
	defer s.Close()
	var out, errs bytes.Buffer
	s.Stdout, s.Stderr = &out, &errs
	err = s.Run(command)
	if exit, ok := errors.AsType[*ssh.ExitError](err); ok {
		status = exit.ExitStatus()
	} else if err != nil {
		f.t.Fatalf("%q: %v", command, err)
	}
	return out.String(), errs.String(), status
}

// wait waits for a condition.
func (f *sshFixture) wait(what string, cond func() bool) {
	f.t.Helper()
	for end := time.Now().Add(time.Minute); !cond(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			f.t.Fatalf("waited in vain for: %s\n%s", what, f.log)
		}
	}
}

func TestSSHRoutes(t *testing.T) {
	// Who adds a route says here whose it is.
	want := map[string]rights{
		"/list/machine": mayLook, "/list/service": mayLook, "/list/log": mayLook, "/list/diff": mayWrite,
		"/do/freeze": mayWrite, "/do/unfreeze": mayWrite, "/do/rollback": mayWrite, "/do/pull": mayWrite,
	}
	f := newSSHFixture(t, nil)
	rw, ro := f.client(f.rw), f.client(f.ro)
	args := map[string]string{"/list/machine": "", "/list/service": "", "/do/rollback": " prometheus 606eb576"}
	for _, r := range sshRoutes() {
		if r.needs != want[r.path] {
			t.Errorf("%s: needs %v, classified here as %v", r.path, r.needs, want[r.path])
		}
		isDiff, isDo := r.path == "/list/diff", strings.HasPrefix(r.path, "/do/")
		isRo := r.needs == mayLook
		if isRo != (!isDo && !isDiff) {
			t.Errorf("%s: needs %v, which does not fit its name", r.path, r.needs)
		}
		command, ok := args[r.path]
		if !ok {
			command = " prometheus"
		}
		out, errs, status := f.ask(rw, r.path+command)
		isAnswer := status == 0 && errs == "" && json.Valid([]byte(out))
		reached := isDiff && errs == "Conflict: upstream's newest commit is not known yet\n"
		if !isAnswer && !reached {
			t.Errorf("rw %s: %d %q %q", r.path, status, out, errs)
		}
		if isDo {
			<-f.ops
		}
		out, errs, status = f.ask(ro, r.path+command)
		if isRo && status != 0 {
			t.Errorf("ro %s: %d %q", r.path, status, errs)
		}
		if !isRo && (status != 1 || out != "" || errs != "Unauthorized: key bob@desk is read-only\n") {
			t.Errorf("ro %s: %d %q %q", r.path, status, out, errs)
		}
		delete(want, r.path)
	}
	if len(want) > 0 {
		t.Errorf("no such routes: %v", want)
	}
	if len(f.ops) > 0 {
		t.Errorf("the ro key reached %+v", <-f.ops)
	}
	if mayWrite.suffice(route{}.needs) {
		t.Error("a key can use a route that nobody classified")
	}
	if log := f.log.String(); !strings.Contains(log, `key bob@desk is read-only`) || !strings.Contains(log, `bob@desk`) || strings.Contains(log, "\x1b") {
		t.Errorf("log:\n%s", log)
	}
}

func TestSSHStockClient(t *testing.T) {
	f := newSSHFixture(t, func(f *sshFixture) {
		f.doing = func(_ context.Context, o op) error {
			o.step("fetch")
			o.step("publish\nreload")
			switch {
			case o.verb == "pull":
				return &opError{status: "Conflict", err: errors.New("prometheus is pinned")}
			case o.verb == "unfreeze":
				return errors.New("git fetch: exit status 128:\nfatal: no route to host")
			}
			return nil
		}
	})
	for _, tt := range []struct {
		name, key, command string
		golden, stderr     string
		status             int
	}{
		{"machines", "ro", "/list/machine", "ssh-machines.json", "", 0},
		{"services", "ro", "/list/service", "ssh-services.json", "", 0},
		{"service", "ro", "/list/service prometheus", "ssh-service.json", "", 0},
		{"spaces", "rw", "  /list/service   prometheus ", "ssh-service.json", "", 0},
		{"unknown service", "ro", "/list/service prom", "", "Not Found: no service \"prom\" on here.example.org\n", 1},
		{"too many words", "ro", "/list/machine x", "", "Bad Request: usage: /list/machine\n", 1},
		{"unknown command", "rw", "/do/freezer prometheus", "", "Not Found: no command \"/do/freezer\"; there are /list/ and /do/\n", 1},
		{"prefix", "rw", "/do", "", "Not Found: no command \"/do\"; there are /list/ and /do/\n", 1},
		{"other case", "rw", "/LIST/machine", "", "Not Found: no command \"/LIST/machine\"; there are /list/ and /do/\n", 1},
		{"shell words", "rw", "sh -c 'id'", "", "Not Found: no command \"sh\"; there are /list/ and /do/\n", 1},
		{"newline", "rw", "/list/machine\nx", "", "Bad Request: a command is UTF-8 without control characters\n", 1},
		{"long", "rw", "/do/freeze prometheus " + strings.Repeat("x", maxRequest), "", "Bad Request: a command has at most 4096 bytes\n", 1},
		{"freeze", "rw", "/do/freeze prometheus 90m deploy  in Zürich", "ssh-service.json", "fetch\npublish reload\n", 0},
		{"rollback", "rw", "/do/rollback prometheus 606EB576b disk is full", "ssh-service.json", "fetch\npublish reload\n", 0},
		{"pull", "rw", "/do/pull prometheus", "", "fetch\npublish reload\nConflict: prometheus is pinned\n", 1},
		{"unfreeze", "rw", "/do/unfreeze prometheus", "", "fetch\npublish reload\nInternal Server Error: git fetch: exit status 128: fatal: no route to host\n", 1},
		{"do unknown service", "rw", "/do/pull grafana", "", "Not Found: no service \"grafana\" on here.example.org\n", 1},
		{"no service", "rw", "/do/pull", "", "Bad Request: usage: /do/pull SERVICE\n", 1},
		{"bad hash", "rw", "/do/rollback prometheus HEAD", "", "Bad Request: hash \"HEAD\": want 4 to 64 hex digits\n", 1},
		{"end as a reason", "rw", "/do/freeze prometheus until 18:00", "", "Bad Request: a reason that begins with \"until\" reads like an end: " +
			"say an end as a duration in one word, such as 90m, 1h30m, 2d or 1w, right after the service, and begin the reason otherwise\n", 1},
		{"ro", "ro", "/do/freeze prometheus", "", "Unauthorized: key bob@desk is read-only\n", 1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			out, errs, status := f.stock(append(f.options(tt.key, "-o", "BatchMode=yes", "127.0.0.1"), tt.command)...)
			if status != tt.status || errs != tt.stderr {
				t.Errorf("status %d, stderr %q\nwant   %d         %q", status, errs, tt.status, tt.stderr)
			}
			if tt.golden != "" {
				golden(t, tt.golden, out)
			} else if out != "" {
				t.Errorf("stdout %q", out)
			}
		})
	}
	o := <-f.ops
	if d := time.Until(o.until); o.verb != "freeze" || o.reason != "deploy in Zürich" || d > 90*time.Minute || d < 80*time.Minute || o.who != "alice@laptop (ops@127.0.0.1)" {
		t.Errorf("freeze: %+v", o)
	}
	if o = <-f.ops; o.verb != "rollback" || o.hash != "606eb576b" || o.reason != "disk is full" {
		t.Errorf("rollback: %+v", o)
	}
	for _, want := range []string{
		`prometheus: freeze "90m deploy in Zürich" by ` + f.dir + `/rw.pub ("alice@laptop") user "ops" from 127.0.0.1:`,
		`prometheus: rollback "606EB576b disk is full" by `,
		`prometheus: pull by ` + f.dir + `/rw.pub ("alice@laptop") user "ops" from 127.0.0.1:`,
		`prometheus: freeze "until 18:00" by `, `: "/do/pull" refused: Bad Request: usage: /do/pull SERVICE: `,
		`: Conflict: prometheus is pinned"`, `: Internal Server Error: git fetch: exit status 128: fatal: no route to host"`, `: ok"`,
		`level=WARN msg="ssh: "/do/freeze prometheus" refused: Unauthorized: key bob@desk is read-only: ` + f.dir + `/ro.pub ("bob@desk") user "ops" from 127.0.0.1:`,
	} {
		if !strings.Contains(strings.ReplaceAll(f.log.String(), `\"`, `"`), want) {
			t.Errorf("the log lacks %s", want)
		}
	}
	// In a pipeline, with something on stdin that nobody reads.
	cmd := exec.Command("sh", "-c", `head -c 5000000 /dev/zero | ssh "$@" | cat`, "sh")
	cmd.Args = append(cmd.Args, f.options("ro", "-o", "BatchMode=yes", "127.0.0.1", "/list/machine")...)
	if out, err := cmd.Output(); err != nil || !json.Valid(out) {
		t.Errorf("pipeline: %v %q", err, out)
	}
	if _, errs, status := f.stock(f.options("host", "-o", "BatchMode=yes", "127.0.0.1", "/list/machine")...); status != 255 || !strings.Contains(errs, "Permission denied (publickey)") {
		t.Errorf("a key that is in no file: %d %q", status, errs)
	}
	f.wait("refused key in the log", func() bool {
		return regexp.MustCompile(`level=WARN msg="ssh: 127[^\n]*is in no key file`).MatchString(f.log.String())
	})
}

// What is no command has no effect and does not hang.
func TestSSHNothingElse(t *testing.T) {
	f := newSSHFixture(t, nil)
	machines, _, _ := f.stock(f.options("rw", "127.0.0.1", "/list/machine")...)
	target, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer target.Close()
	reached := make(chan bool, 1)
	go func() {
		if c, err := target.Accept(); err == nil {
			reached <- true
			c.Close()
		}
	}()
	for _, tt := range []struct {
		name   string
		args   []string
		stdout string
		stderr string // part of it
		status int
	}{
		{"shell", []string{"-T", "127.0.0.1"}, "", "Bad Request: no command", 1},
		{"shell and pty", []string{"-tt", "127.0.0.1"}, "", "PTY allocation request failed", 255},
		{"pty", []string{"-t", "127.0.0.1", "/list/machine"}, machines, "", 0},
		{"forced pty", []string{"-tt", "127.0.0.1", "/list/machine"}, "", "PTY allocation request failed", 255},
		{"env", []string{"-o", "SetEnv=A=B", "127.0.0.1", "/list/machine"}, machines, "", 0},
		{"X11", []string{"-X", "127.0.0.1", "/list/machine"}, machines, "", 0},
		{"agent", []string{"-A", "127.0.0.1", "/list/machine"}, machines, "", 0},
		{"sftp", []string{"-s", "127.0.0.1", "sftp"}, "", "subsystem request failed", 255},
		{"-R", []string{"-N", "-o", "ExitOnForwardFailure=yes", "-R", "0:" + target.Addr().String(), "127.0.0.1"}, "", "remote port forwarding failed", 255},
		{"-W", []string{"-W", target.Addr().String(), "127.0.0.1"}, "", "administratively prohibited", 255},
		{"tunnel", []string{"-N", "-w", "any", "-o", "ExitOnForwardFailure=yes", "127.0.0.1"}, "", "", 255},
	} {
		t.Run(tt.name, func(t *testing.T) {
			out, errs, status := f.stock(f.options("rw", tt.args...)...)
			if out != tt.stdout || !strings.Contains(errs, tt.stderr) || status != tt.status {
				t.Errorf("%d %q %q, want %d %q %q", status, out, errs, tt.status, tt.stdout, tt.stderr)
			}
		})
	}
	if out, err := exec.Command("sftp", append(f.options("rw", "-b", "/dev/null"), "127.0.0.1")...).CombinedOutput(); err == nil {
		t.Errorf("sftp: %s", out)
	}
	for _, flag := range []string{"-L", "-D"} {
		t.Run(flag, func(t *testing.T) {
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			local := l.Addr().String()
			l.Close()
			forward := local
			if flag == "-L" {
				forward += ":" + target.Addr().String()
			}
			ctx, cancel := context.WithCancel(t.Context())
			cmd := exec.CommandContext(ctx, "ssh", f.options("rw", "-N", flag, forward, "127.0.0.1")...)
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			defer cmd.Wait()
			defer cancel()
			var c net.Conn
			f.wait("ssh listens", func() bool { c, err = net.Dial("tcp", local); return err == nil })
			defer c.Close()
			if flag == "-D" { // SOCKS 5: no authentication; CONNECT to the target
				port := target.Addr().(*net.TCPAddr).Port
				c.Write([]byte{5, 1, 0, 5, 1, 0, 1, 127, 0, 0, 1, byte(port >> 8), byte(port)})
			}
			answer, _ := io.ReadAll(c)
			if flag == "-L" && len(answer) > 0 || len(answer) > 12 || bytes.HasPrefix(answer, []byte{5, 0, 5, 0}) {
				t.Errorf("got through: %q", answer)
			}
		})
	}
	select {
	case <-reached:
		t.Error("something was forwarded")
	default:
	}
	if len(f.ops) > 0 {
		t.Error("something was done")
	}
}

// A client that is none of the stock ones.
func TestSSHAbuse(t *testing.T) {
	f := newSSHFixture(t, nil)
	c := f.client(f.rw)
	for _, typ := range []string{"direct-tcpip", "direct-streamlocal@openssh.com", "forwarded-tcpip", "x11", "auth-agent@openssh.com", "tun@openssh.com", ""} {
		_, _, err := c.OpenChannel(typ, []byte("x"))
		if e, ok := errors.AsType[*ssh.OpenChannelError](err); !ok || e.Reason != ssh.Prohibited {
			t.Errorf("channel %q: %v", typ, err)
		}
	}
	for _, typ := range []string{"tcpip-forward", "cancel-tcpip-forward", "streamlocal-forward@openssh.com", "hostkeys-prove-00@openssh.com", ""} {
		if ok, _, err := c.SendRequest(typ, true, ssh.Marshal(struct {
			Addr string
			Port uint32
		}{"", 0})); ok || err != nil {
			t.Errorf("global request %q: %v %v", typ, ok, err)
		}
	}
	s, requests, err := c.OpenChannel("session", nil)
	if err != nil {
		t.Fatal(err)
	}
	go ssh.DiscardRequests(requests)
	for _, typ := range []string{"pty-req", "env", "x11-req", "auth-agent-req@openssh.com", "window-change", "signal", "xon-xoff", "exit-status", ""} {
		if ok, err := s.SendRequest(typ, true, []byte("junk")); ok || err != nil {
			t.Errorf("request %q: %v %v", typ, ok, err)
		}
	}
	release := make(chan bool)
	f.doing = func(context.Context, op) error { <-release; return nil }
	exec := func(cmd string) []byte { return ssh.Marshal(struct{ C string }{cmd}) }
	if ok, err := s.SendRequest("exec", true, exec("/do/pull prometheus")); !ok || err != nil {
		t.Errorf("exec: %v %v", ok, err)
	}
	<-f.ops
	for _, typ := range []string{"exec", "shell", "subsystem"} {
		if ok, err := s.SendRequest(typ, true, exec("/do/unfreeze prometheus")); ok || err != nil {
			t.Errorf("second %s: %v %v", typ, ok, err)
		}
	}
	close(release)
	if out, err := io.ReadAll(s); err != nil || !json.Valid(out) {
		t.Errorf("%q %v", out, err)
	}
	if len(f.ops) > 0 {
		t.Error("a second command was done")
	}
	s.Close()

	for _, payload := range [][]byte{nil, {0, 0, 0, 9, 'x'}, append(exec("/list/machine"), 0), exec(""), exec("   "), exec("/list/machine\x00"), exec("\xff")} {
		s, requests, err := c.OpenChannel("session", nil)
		if err != nil {
			t.Fatal(err)
		}
		go ssh.DiscardRequests(requests)
		if ok, err := s.SendRequest("exec", true, payload); !ok || err != nil {
			t.Errorf("exec %q: %v %v", payload, ok, err)
		}
		errs, _ := io.ReadAll(s.Stderr())
		out, _ := io.ReadAll(s)
		if len(out) > 0 || !bytes.HasPrefix(errs, []byte("Bad Request: ")) {
			t.Errorf("exec %q: %q %q", payload, out, errs)
		}
		s.Close()
	}

	// Sessions that nobody uses count.
	f.wait("sessions end", func() bool {
		var open []ssh.Channel
		defer func() {
			for _, s := range open {
				s.Close()
			}
		}()
		for {
			s, requests, err := c.OpenChannel("session", nil)
			if e, ok := errors.AsType[*ssh.OpenChannelError](err); ok && e.Reason == ssh.ResourceShortage {
				return len(open) == maxSessions
			} else if err != nil {
				t.Fatal(err)
			}
			go ssh.DiscardRequests(requests)
			open = append(open, s)
		}
	})
}

// The rights are those of the key that authenticated: CVE-2024-45337.
func TestSSHRights(t *testing.T) {
	f := newSSHFixture(t, nil)
	for _, tt := range []struct {
		name       string
		offer, use ssh.Signer
		want       string
	}{
		{"offers rw, is ro", f.rw, f.ro, "Unauthorized: key bob@desk is read-only\n"},
		{"offers ro, is rw", f.ro, f.rw, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c, err := dialRaw(f.addr)
			if err != nil {
				t.Fatal(err, f.log)
			}
			defer c.Close()
			if stderr := c.authAndExec(t, tt.offer, tt.use, "/do/pull prometheus"); stderr != tt.want {
				t.Errorf("%q, want %q", stderr, tt.want)
			}
		})
	}
	// A client with several keys comes in with the first that is in a file.
	stranger := f.key("stranger", "")
	c, err := f.dial(stranger, f.ro, f.rw)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, errs, _ := f.ask(c, "/do/pull prometheus"); !strings.HasPrefix(errs, "Unauthorized") {
		t.Errorf("%q", errs)
	}
	for name, auth := range map[string]ssh.AuthMethod{
		"nothing": nil, "password": ssh.Password("secret"), "stranger": ssh.PublicKeys(stranger), "certificate": ssh.PublicKeys(f.certificate()),
		"keyboard": ssh.KeyboardInteractive(func(string, string, []string, []bool) ([]string, error) { return nil, nil }),
	} {
		config := &ssh.ClientConfig{User: "root", HostKeyCallback: ssh.InsecureIgnoreHostKey()}
		if auth != nil {
			config.Auth = []ssh.AuthMethod{auth}
		}
		if c, err := ssh.Dial("tcp", f.addr, config); err == nil {
			c.Close()
			t.Errorf("%s: came in", name)
		}
	}
}

// certificate is one for the rw key, signed by the rw key.
func (f *sshFixture) certificate() ssh.Signer {
	cert := &ssh.Certificate{Key: f.rw.PublicKey(), CertType: ssh.UserCert, ValidBefore: ssh.CertTimeInfinity}
	if err := cert.SignCert(rand.Reader, f.rw); err != nil {
		f.t.Fatal(err)
	}
	s, err := ssh.NewCertSigner(cert, f.rw)
	if err != nil {
		f.t.Fatal(err)
	}
	return s
}

func TestParseKeys(t *testing.T) {
	f := &sshFixture{t: t, dir: t.TempDir()}
	a, b := f.key("a", "alice"), f.key("b", "")
	f.rw = a
	la, lb := strings.TrimSpace(keyLine(a, "alice@laptop  (work)")), strings.TrimSpace(keyLine(b, ""))
	fb := ssh.FingerprintSHA256(b.PublicKey())
	for _, tt := range []struct {
		name, data string
		want       []string // comments
		err        string   // its beginning
	}{
		{"one", la + "\n", []string{"alice@laptop  (work)"}, ""},
		{"no newline, no comment", lb, []string{fb}, ""},
		{"several", "# team\n\n" + la + "\n  \n\t# more\n" + lb + "\n", []string{"alice@laptop  (work)", fb}, ""},
		{"CRLF", la + "\r\n\r\n" + lb + "\r\n", []string{"alice@laptop  (work)", fb}, ""},
		{"odd comment", lb + " x\x1b[31m\xff\n", []string{"x [31m\ufffd"}, ""},
		{"empty", "", nil, "no public key in it"},
		{"comments only", "# none\n", nil, "no public key in it"},
		{"junk", la + "\nssh-ed25519 AAAA junk\n", nil, "line 2: not a public key: "},
		{"type only", "ssh-ed25519\n", nil, "line 1: not a public key: "},
		{"wrong type", strings.Replace(la, "ssh-ed25519", "ssh-rsa", 1), nil, "line 1: not a public key: "},
		{"options", la + "\n# x\nfrom=\"10.0.0.0/8\" " + lb, nil, "line 3: no certificates and no options here: put the plain public key"},
		{"one-word option", "restrict " + lb, nil, "line 1: no certificates and no options"},
		{"authority", "cert-authority " + lb, nil, "line 1: no certificates and no options"},
		{"marker", "@cert-authority * " + lb, nil, "line 1: "},
		{"certificate", string(ssh.MarshalAuthorizedKey(f.certificate().PublicKey())), nil, "line 1: no certificates"},
		{"private key", "-----BEGIN OPENSSH PRIVATE KEY-----\n", nil, "line 1: not a public key: "},
		{"two keys in a line", la + " " + lb, []string{printable("alice@laptop  (work) "+lb, 100)}, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			keys, err := parseKeys([]byte(tt.data))
			if (err == nil) != (tt.err == "") || err != nil && !strings.HasPrefix(err.Error(), tt.err) {
				t.Fatalf("error %v, want %q", err, tt.err)
			}
			var comments []string
			for _, k := range keys {
				comments = append(comments, k.comment)
			}
			if !reflect.DeepEqual(comments, tt.want) {
				t.Errorf("%q, want %q", comments, tt.want)
			}
		})
	}
}

// Key files are read anew when they change, and a file that is wrong keeps its last good keys.
func TestSSHKeyFiles(t *testing.T) {
	f := newSSHFixture(t, nil)
	carol := f.key("carol", "carol")
	comesIn := func(k ssh.Signer) bool {
		c, err := f.dial(k)
		if err == nil {
			c.Close()
		}
		return err == nil
	}
	check := func(what string, rw, other, ok bool) {
		t.Helper()
		if got := [3]bool{comesIn(f.rw), comesIn(carol), f.sshServer.keys.ok()}; got != [3]bool{rw, other, ok} {
			t.Errorf("%s: alice, carol, ok = %v", what, got)
		}
	}
	alice, both := keyLine(f.rw, "alice"), keyLine(f.rw, "alice")+"# night\n"+keyLine(carol, "carol")
	check("start", true, false, true)
	f.write("rw.pub", both)
	check("added", true, true, true)
	f.write("rw.pub", both+"junk\n")
	check("broken", true, true, false)
	f.write("rw.pub", "")
	check("empty", true, true, false)
	if err := os.Remove(filepath.Join(f.dir, "rw.pub")); err != nil {
		t.Fatal(err)
	}
	check("gone", true, true, false)
	if err := syscall.Mkfifo(filepath.Join(f.dir, "rw.pub"), 0o600); err != nil {
		t.Fatal(err)
	}
	check("fifo", true, true, false)
	f.write("new", strings.Replace(alice, "alice", "al", 1))
	if err := os.Rename(filepath.Join(f.dir, "new"), filepath.Join(f.dir, "rw.pub")); err != nil {
		t.Fatal(err)
	}
	check("replaced", true, false, true)
	// Same size, same mtime.
	for _, k := range []ssh.Signer{carol, f.rw, carol} {
		f.write("rw.pub", keyLine(k, "same"))
		if err := os.Chtimes(filepath.Join(f.dir, "rw.pub"), time.Unix(1, 0), time.Unix(1, 0)); err != nil {
			t.Fatal(err)
		}
		check("same size", k == f.rw, k == carol, true)
	}
	// ro wins, whatever the order of files.
	f.write("ro.pub", keyLine(carol, "carol, ro"))
	for range 2 {
		c := f.client(carol)
		if _, errs, _ := f.ask(c, "/do/pull prometheus"); errs != "Unauthorized: key carol, ro is read-only\n" {
			t.Errorf("%q", errs)
		}
		f.sshServer.keys.mu.Lock()
		swap := f.sshServer.keys.files
		swap[0], swap[1] = swap[1], swap[0]
		f.sshServer.keys.mu.Unlock()
	}
	log := f.log.String()
	for _, want := range []string{"rw.pub: read anew, 2 keys", "rw.pub: line 4: not a public key", "rw.pub: no public key in it", "no such file", "not a regular file", "stay valid"} {
		if !strings.Contains(log, want) {
			t.Errorf("the log lacks %q:\n%s", want, log)
		}
	}
	if n := strings.Count(log, "line 4: not a public key"); n != 1 {
		t.Errorf("logged %d times", n)
	}
}

func TestSSHHostKey(t *testing.T) {
	f := &sshFixture{t: t, dir: t.TempDir()}
	f.key("k", "k")
	file := filepath.Join(f.dir, "host")
	start := func(file string, makeKey bool) (*sshServer, error) {
		return newSSHServer(file, makeKey, []key{f.keyOf("k.pub", mayWrite)}, nil, "h", nil)
	}
	if _, err := start(file, false); err == nil || !strings.Contains(err.Error(), file) || !strings.Contains(err.Error(), "ssh-keygen") {
		t.Errorf("missing: %v", err)
	}
	if _, err := start(file, true); err != nil {
		t.Fatal(err)
	}
	first, _ := os.ReadFile(file)
	if fi, err := os.Stat(file); err != nil || fi.Mode() != 0o600 || !bytes.Contains(first, []byte("BEGIN OPENSSH PRIVATE KEY")) {
		t.Errorf("%v %v %s", fi.Mode(), err, first)
	}
	if out, err := exec.Command("ssh-keygen", "-l", "-f", file).CombinedOutput(); err != nil || !bytes.Contains(out, []byte("gitopper (ED25519)")) {
		t.Errorf("ssh-keygen: %v %s", err, out)
	}
	if _, err := start(file, true); err != nil {
		t.Fatal(err)
	}
	if second, _ := os.ReadFile(file); !bytes.Equal(first, second) {
		t.Error("a new key was made")
	}
	if left, _ := filepath.Glob(filepath.Join(f.dir, ".*")); len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
	f.write("junk", "junk")
	if _, err := start(filepath.Join(f.dir, "junk"), true); err == nil || !strings.Contains(err.Error(), "no key found") {
		t.Errorf("junk: %v", err)
	}
	if out, err := exec.Command("ssh-keygen", "-q", "-t", "ed25519", "-N", "secret", "-f", filepath.Join(f.dir, "locked")).CombinedOutput(); err != nil {
		t.Fatalf("%v %s", err, out)
	}
	if _, err := start(filepath.Join(f.dir, "locked"), false); err == nil || !strings.Contains(err.Error(), "passphrase") {
		t.Errorf("passphrase: %v", err)
	}
	if _, err := newSSHServer(file, false, []key{f.keyOf("none", mayWrite)}, nil, "h", nil); err == nil {
		t.Error("a missing key file is no error")
	}
	if out, err := exec.Command("ssh-keygen", "-q", "-t", "rsa", "-b", "2048", "-N", "", "-f", filepath.Join(f.dir, "rsa")).CombinedOutput(); err != nil {
		t.Fatalf("%v %s", err, out)
	}
	if _, err := start(filepath.Join(f.dir, "rsa"), false); err != nil {
		t.Errorf("rsa: %v", err)
	}
}

func TestParseOp(t *testing.T) {
	now := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	for _, tt := range []struct {
		words string
		want  op
		bad   bool
	}{
		{"/do/freeze s", op{}, false},
		{"/do/freeze s 90m", op{until: now.Add(90 * time.Minute)}, false},
		{"/do/freeze s 1s why not", op{until: now.Add(time.Second), reason: "why not"}, false},
		{"/do/freeze s 36h", op{until: now.Add(36 * time.Hour)}, false},
		{"/do/freeze s 2d", op{until: now.Add(48 * time.Hour)}, false},
		{"/do/freeze s 3650d", op{until: now.Add(maxFreeze)}, false},
		{"/do/freeze s disk 90m", op{reason: "disk 90m"}, false},
		{"/do/freeze s - see #5", op{reason: "- see #5"}, false},
		{"/do/freeze s " + strings.Repeat("x", maxReason), op{reason: strings.Repeat("x", maxReason)}, false},
		{"/do/freeze s " + strings.Repeat("x", maxReason+1), op{}, true},
		{"/do/freeze s 3651d", op{}, true},
		{"/do/freeze s 99999999999999999999d", op{}, true},
		{"/do/freeze s 200000000000h", op{}, true},
		{"/do/freeze s 0m", op{}, true},
		{"/do/freeze s -5m", op{}, true},
		{"/do/freeze s +5m", op{}, true},
		{"/do/freeze s 1.5h", op{}, true},
		{"/do/freeze s .5h", op{}, true},
		{"/do/freeze s 1h30m", op{until: now.Add(90 * time.Minute)}, false},
		{"/do/freeze s 1w2d", op{until: now.Add(9 * 24 * time.Hour)}, false},
		{"/do/freeze s 2h forward port", op{until: now.Add(2 * time.Hour), reason: "forward port"}, false},
		{"/do/freeze s 3650d1s", op{}, true},
		{"/do/freeze s 9223372036854775807w", op{}, true},
		{"/do/freeze s 1h30", op{}, true},
		{"/do/freeze s 1hm", op{}, true},
		{"/do/freeze s for 2h", op{}, true},
		{"/do/freeze s Until monday", op{}, true},
		{"/do/freeze s 2h until monday", op{}, true},
		{"/do/rollback s 606e for ann", op{hash: "606e", reason: "for ann"}, false},
		{"/do/rollback s 606e " + strings.Repeat("x", maxReason+1), op{}, true},
		{"/do/freeze s 90", op{}, true},
		{"/do/freeze s 5", op{}, true},
		{"/do/freeze s 90min", op{}, true},
		{"/do/freeze s 90ms", op{}, true},
		{"/do/freeze s 90M", op{}, true},
		{"/do/freeze s 2days", op{}, true},
		{"/do/unfreeze s", op{}, false},
		{"/do/pull s", op{}, false},
		{"/do/rollback s 606e", op{hash: "606e"}, false},
		{"/do/rollback s 606EB57", op{hash: "606eb57"}, false},
		{"/do/rollback s " + strings.Repeat("a", 64), op{hash: strings.Repeat("a", 64)}, false},
		{"/do/rollback s " + strings.Repeat("a", 65), op{}, true},
		{"/do/rollback s 606", op{}, true},
		{"/do/rollback s --output=/etc/passwd", op{}, true},
		{"/do/rollback s 606eb57g", op{}, true},
		{"/do/rollback s HEAD~1", op{}, true},
	} {
		t.Run(tt.words, func(t *testing.T) {
			words := strings.Fields(tt.words)
			tt.want.verb = strings.TrimPrefix(words[0], "/do/")
			got, err := parseOp(words, now)
			if tt.bad {
				if e, ok := errors.AsType[*opError](err); !ok || e.status != "Bad Request" {
					t.Errorf("%+v, error %v", got, err)
				}
			} else if err != nil || !reflect.DeepEqual(got, tt.want) {
				t.Errorf("%+v %v, want %+v", got, err, tt.want)
			}
		})
	}
}

// A client that reads nothing stops neither the service nor the server.
func TestSSHDeafClient(t *testing.T) {
	f := newSSHFixture(t, func(f *sshFixture) {
		f.patience.answer = 100 * time.Millisecond
		f.doing = func(_ context.Context, o op) error {
			for range 10000 {
				o.step(strings.Repeat("x", 1000))
			}
			return nil
		}
	})
	c, err := dialRaw(f.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.auth(t, nil, f.rw)
	c.exec(t, "/do/pull prometheus", 0) // no window at all
	<-f.ops
	f.wait("outcome in the log", func() bool { return strings.Contains(f.log.String(), ": ok") })
	f.wait("closed", func() bool { return f.count() == 0 })
	if runtime.NumGoroutine() > 1000 {
		t.Error("goroutines")
	}
}

// count is how many connections there are.
func (f *sshFixture) count() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.conns)
}

func TestSSHHangUp(t *testing.T) {
	release := make(chan error)
	f := newSSHFixture(t, func(f *sshFixture) {
		f.doing = func(ctx context.Context, o op) error {
			select {
			case err := <-release:
				return err
			case <-ctx.Done():
				return ctx.Err()
			}
		}
	})
	c := f.client(f.rw)
	s, err := c.NewSession()
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Start("/do/pull prometheus"); err != nil {
		t.Fatal(err)
	}
	<-f.ops
	// list does not wait meanwhile.
	if _, errs, status := f.ask(c, "/list/service"); status != 0 {
		t.Errorf("list: %s", errs)
	}
	c.Close()
	f.wait("gone", func() bool { return f.count() == 0 })
	release <- nil
	f.wait("outcome in the log", func() bool { return strings.Contains(f.log.String(), ": ok") })
}

func TestSSHStop(t *testing.T) {
	f := newSSHFixture(t, func(f *sshFixture) {
		f.doing = func(ctx context.Context, o op) error {
			<-ctx.Done()
			return sshError("Internal Server Error", "gitopper is stopping")
		}
	})
	idle := f.client(f.ro)
	c := f.client(f.rw)
	s, err := c.NewSession()
	if err != nil {
		t.Fatal(err)
	}
	var out, errs bytes.Buffer
	s.Stdout, s.Stderr = &out, &errs
	if err := s.Start("/do/pull prometheus"); err != nil {
		t.Fatal(err)
	}
	<-f.ops
	f.stop()
	if err := s.Wait(); err == nil || errs.String() != "Internal Server Error: gitopper is stopping\n" || out.Len() > 0 {
		t.Errorf("%v %q %q", err, out.String(), errs.String())
	}
	idle.Wait()
	<-f.stopped
	if _, err := net.Dial("tcp", f.addr); err == nil {
		t.Error("still listens")
	}
}

// A service that does not heed its context keeps nobody from stopping.
func TestSSHStopStubborn(t *testing.T) {
	release := make(chan bool)
	f := newSSHFixture(t, func(f *sshFixture) {
		f.patience.answer = 50 * time.Millisecond
		f.doing = func(context.Context, op) error { <-release; return nil }
	})
	s, err := f.client(f.rw).NewSession()
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Start("/do/pull prometheus"); err != nil {
		t.Fatal(err)
	}
	<-f.ops
	f.stop()
	<-f.stopped
	close(release)
}

func TestSSHTimes(t *testing.T) {
	f := newSSHFixture(t, func(f *sshFixture) {
		f.patience.handshake, f.patience.idle = 300*time.Millisecond, 100*time.Millisecond
	})
	c := f.client(f.rw)
	c.Wait() // idle
	for name, text := range map[string]string{"silent": "", "slow": "SSH-2.0-slow\r\n", "no line": "SSH-2.0-", "junk": "GET / HTTP/1.0\r\n\r\n"} {
		c, err := net.Dial("tcp", f.addr)
		if err != nil {
			t.Fatal(err)
		}
		io.WriteString(c, text)
		if _, err := io.Copy(io.Discard, c); err != nil {
			t.Logf("%s: %v", name, err)
		}
		c.Close()
	}
	// A command that works keeps its connection, however long.
	release := make(chan bool)
	f.doing = func(context.Context, op) error { <-release; return nil }
	c = f.client(f.rw)
	s, err := c.NewSession()
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Start("/do/pull prometheus"); err != nil {
		t.Fatal(err)
	}
	<-f.ops
	f.client(f.ro).Wait() // one that idles is gone meanwhile
	close(release)
	if err := s.Wait(); err != nil {
		t.Error(err)
	}
}

func TestSSHJunk(t *testing.T) {
	f := newSSHFixture(t, nil)
	big := strings.Repeat("x", 250) + "\n"
	for name, text := range map[string]string{
		"binary": "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", "no newline": strings.Repeat("y", 300), "lines without end": strings.Repeat(big, 400),
		"packet": "SSH-2.0-x\r\n\xff\xff\xff\xff\x00", "not a kexinit": "SSH-2.0-x\r\n" + string((&rawSSH{}).packet([]byte{5})),
	} {
		c, err := net.Dial("tcp", f.addr)
		if err != nil {
			t.Fatal(err)
		}
		io.WriteString(c, text)
		c.(*net.TCPConn).CloseWrite()
		io.Copy(io.Discard, c)
		c.Close()
		f.wait(name+" in the log", func() bool { return strings.Contains(f.log.String(), c.LocalAddr().String()) })
		if n := strings.Count(f.log.String(), c.LocalAddr().String()); n != 1 {
			t.Errorf("%s: %d log lines", name, n)
		}
	}
	f.wait("all gone", func() bool { return f.count() == 0 })
	// The same after a key exchange: nothing of it stays, though x/crypto's queue is full when it gives up.
	before := runtime.NumGoroutine()
	for range 50 {
		c, err := dialRaw(f.addr)
		if err != nil {
			t.Fatal(err)
		}
		var all []byte
		for range 100 {
			all = append(all, c.packet([]byte{5, 0, 0, 0, 0})...)
		}
		c.Write(all)
		io.Copy(io.Discard, c)
		c.Close()
	}
	f.wait("goroutines ended", func() bool { return runtime.NumGoroutine() <= before+5 })
}

// Who has to go when there are too many.
func TestSSHEnter(t *testing.T) {
	newServer := func() (*sshServer, func(from string, who visitor) *sshConn) {
		s := &sshServer{}
		return s, func(from string, who visitor) *sshConn {
			a, b := net.Pipe()
			t.Cleanup(func() { a.Close(); b.Close() })
			c := &sshConn{Conn: a, s: s, from: from}
			s.enter(c, who)
			return c
		}
	}
	gone := func(cs ...*sshConn) (n int) {
		for _, c := range cs {
			if c.evicted.Load() {
				n++
			}
		}
		return n
	}
	stranger, known := visitor{}, visitor{comment: "ann"}
	t.Run("the oldest", func(t *testing.T) {
		s, add := newServer()
		var all []*sshConn
		for i := range maxConns + 3 {
			all = append(all, add(fmt.Sprint(i%3), stranger))
		}
		if gone(all[:3]...) != 3 || gone(all[3:]...) != 0 || len(s.conns) != maxConns {
			t.Error("not the oldest ones")
		}
	})
	t.Run("of a source that has too many", func(t *testing.T) {
		s, add := newServer()
		operator := add("b", stranger)
		for range 1000 {
			add("a", stranger)
		}
		if gone(operator) != 0 || len(s.conns) != maxPerSource+1 {
			t.Errorf("someone else had to go, %d are left", len(s.conns))
		}
	})
	t.Run("known ones do not count with strangers", func(t *testing.T) {
		s, add := newServer()
		k := add("a", known)
		for range 1000 {
			add("a", stranger)
		}
		if gone(k) != 0 || len(s.conns) != maxPerSource+1 {
			t.Error("a stranger pushed out an authenticated one")
		}
		s.enter(s.conns[5], known)
		if len(s.conns) != maxPerSource+1 {
			t.Error("one that authenticates counts twice")
		}
	})
	t.Run("not those that work", func(t *testing.T) {
		s, add := newServer()
		var working []*sshConn
		for range maxConns {
			c := add("a", known)
			c.running = 1
			working = append(working, c)
		}
		if c := add("a", known); gone(c) != 1 || gone(working...) != 0 || len(s.conns) != maxConns {
			t.Error("the newcomer was let in")
		}
		working[5].running = 0
		if c := add("a", known); gone(c) != 0 || gone(working[5]) != 1 {
			t.Error("the idle one did not make room")
		}
	})
}

// What a check or a journal said is told to keys that may write, and to no others.
func TestSSHPrivateWords(t *testing.T) {
	f := newSSHFixture(t, nil)
	f.doing = func(_ context.Context, o op) error {
		o.step("check" + quote(": secret step"))
		return &opError{status: "Conflict", err: errors.New("refused" + quote(": secret error")), done: true}
	}
	out, errs, _ := f.ask(f.client(f.rw), "/do/pull node-exporter")
	if strings.Count(out, "the check's own words") != 1 || errs != "check: secret step\nConflict: refused: secret error\n" {
		t.Errorf("rw: %q %q", out, errs)
	}
	if out, _, _ := f.ask(f.client(f.rw), "/list/service"); !strings.Contains(out, `in 1 line: the check's own words"`) {
		t.Errorf("rw: %q", out)
	}
	if out, _, _ := f.ask(f.client(f.ro), "/list/service"); !strings.Contains(out, `in 1 line"`) || strings.Contains(out, "own words") {
		t.Errorf("ro: %q", out)
	}
	err := fmt.Errorf("refused%s", quote(": secret error"))
	if got := errorLine(err, mayLook); got != "Internal Server Error: refused" {
		t.Errorf("ro: %q", got)
	}
}

// Hundreds of idle connections and slow handshakes, from the operator's own address: the operator is served.
func TestSSHFlood(t *testing.T) {
	f := newSSHFixture(t, nil)
	for i := range 500 {
		c, err := net.Dial("tcp", f.addr)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		switch i % 3 {
		case 1:
			io.WriteString(c, "SSH-2.0-slow\r\n")
		case 2:
			io.WriteString(c, "SSH-2.0-slow\r\n\x00\x00\x03\xfc\x06\x14")
		}
	}
	for range 20 {
		if c, err := dialRaw(f.addr); err == nil {
			defer c.Close()
		}
	}
	if out, errs, status := f.stock(f.options("ro", "-o", "BatchMode=yes", "127.0.0.1", "/list/machine")...); status != 0 || !json.Valid([]byte(out)) {
		t.Fatalf("%d %s", status, errs)
	}
	if n := f.count(); n > maxConns {
		t.Errorf("%d strangers", n)
	}
	// Authenticated ones that idle do not keep others out either.
	for range maxConns + 10 {
		f.client(f.ro)
	}
	if _, errs, status := f.ask(f.client(f.rw), "/list/machine"); status != 0 {
		t.Error(errs)
	}
	if n := strings.Count(regexp.MustCompile("level=(INFO|WARN) msg=\"ssh: 127").ReplaceAllString(f.log.String(), "LINE"), "LINE"); n > 60 {
		t.Errorf("%d log lines", n)
	}
}

// A listener that has no descriptors left for a while.
type shortListener struct {
	net.Listener
	fail int
}

func (l *shortListener) Accept() (net.Conn, error) {
	if l.fail--; l.fail >= 0 {
		return nil, &net.OpError{Op: "accept", Err: os.NewSyscallError("accept4", syscall.EMFILE)}
	}
	return l.Listener.Accept()
}

func TestSSHAcceptFails(t *testing.T) {
	f := newSSHFixture(t, nil)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan bool)
	go func() { f.serve(ctx, &shortListener{l, 3}); close(done) }()
	f.addr = l.Addr().String()
	if _, errs, status := f.ask(f.client(f.ro), "/list/machine"); status != 0 {
		t.Error(errs)
	}
	if !strings.Contains(f.log.String(), "too many open files; trying again") {
		t.Error(f.log)
	}
	cancel()
	<-done
}

func TestSSHManyClients(t *testing.T) {
	f := newSSHFixture(t, nil)
	var wg sync.WaitGroup
	for i := range 40 {
		wg.Go(func() {
			c, err := f.dial([]ssh.Signer{f.rw, f.ro}[i%2])
			if err != nil {
				t.Error(err)
				return
			}
			defer c.Close()
			for _, cmd := range []string{"/list/service", "/do/pull prometheus", "/list/machine"} {
				s, err := c.NewSession()
				if err != nil {
					t.Error(err)
					return
				}
				out, err := s.Output(cmd)
				if want := i%2 == 0 || !strings.HasPrefix(cmd, "/do/"); (err == nil) != want || want != json.Valid(out) {
					t.Errorf("%s: %q %v", cmd, out, err)
				}
			}
		})
	}
	wg.Wait()
	if len(f.ops) != 20 {
		t.Errorf("%d pulls", len(f.ops))
	}
}

func FuzzRequest(f *testing.F) {
	for _, s := range []string{"", " ", "/list/machine", "/do/freeze  prometheus 2d why", "/do/rollback p 606eb576", "/do/freeze p 1h30m", "a\x00b", "\xff", "\u2028", "/do/freeze p -"} {
		f.Add(ssh.Marshal(struct{ C string }{s}))
	}
	f.Fuzz(func(t *testing.T, payload []byte) {
		words, err := parseRequest(payload)
		if err != nil {
			if line := errorLine(err, mayWrite); !strings.HasPrefix(line, "Bad Request: ") || strings.ContainsAny(line, "\r\n") {
				t.Errorf("%q", line)
			}
			return
		}
		joined := strings.Join(words, " ")
		if len(words) == 0 || len(joined) > maxRequest || joined != printable(joined, maxRequest) {
			t.Errorf("%q", words)
		}
		for _, r := range sshRoutes() {
			if n := len(words) - 1; r.path != words[0] || r.needs < mayWrite || n < r.min || n > r.max {
				continue
			}
			o, err := parseOp(words, time.Unix(0, 0))
			if err == nil && (len(o.reason) > maxReason || o.until.After(time.Unix(0, 0).Add(maxFreeze)) || !o.until.IsZero() && !o.until.After(time.Unix(0, 0))) {
				t.Errorf("%+v", o)
			}
		}
	})
}

func FuzzKeys(f *testing.F) {
	const line = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIHT0ZIhLdGzUuBiMpWF1vDkYAYsSnQTXwBGzzVbUOZlw alice@laptop"
	for _, s := range []string{"", line, "# x\r\n\r\n" + line + "\n", "from=\"a b\" " + line, line + "\njunk", "cert-authority,restrict " + line, "\"" + line} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		keys, err := parseKeys(data)
		if (err == nil) != (len(keys) > 0) {
			t.Errorf("%d keys, %v", len(keys), err)
		}
		for _, k := range keys {
			if pub, err := ssh.ParsePublicKey([]byte(k.blob)); err != nil || string(pub.Marshal()) != k.blob || k.comment == "" || k.comment != printable(k.comment, 100) {
				t.Errorf("%q %v", k, err)
			}
		}
		if n := bytes.Count(data, []byte("\n")) + 1; len(keys) > n {
			t.Errorf("%d keys in %d lines", len(keys), n)
		}
	})
}

func TestServicesJSON(t *testing.T) {
	// Existing clients parse these names.
	data, err := json.Marshal(ctl.Services{Services: []ctl.Service{{}}})
	want := `{"services":[{"service":"","hash":"","state":"","stateinfo":"","change":"","pending":0,"committed":""}]}`
	if err != nil || string(data) != want {
		t.Errorf("%s %v", data, err)
	}
}

// rawSSH is a client that does a key exchange (RFC 4253) and then sends what packets it likes.
type rawSSH struct {
	net.Conn
	r         *bufio.Reader
	session   []byte
	out, in   cipher.AEAD
	outIV, iv []byte
}

func (c *rawSSH) packet(payload []byte) []byte {
	block, clear := 8, 0
	if c.out != nil {
		block, clear = 16, 4
	}
	pad := block - (5+len(payload)-clear)%block
	if pad < 4 {
		pad += block
	}
	p := binary.BigEndian.AppendUint32(nil, uint32(1+len(payload)+pad))
	p = append(append(append(p, byte(pad)), payload...), make([]byte, pad)...)
	if c.out == nil {
		return p
	}
	sealed := c.out.Seal(p[:4:4], c.outIV, p[4:], p[:4])
	binary.BigEndian.PutUint64(c.outIV[4:], binary.BigEndian.Uint64(c.outIV[4:])+1)
	return sealed
}

func (c *rawSSH) send(msg any) { c.Write(c.packet(ssh.Marshal(msg))) }

func (c *rawSSH) read() ([]byte, error) {
	var h [4]byte
	if _, err := io.ReadFull(c.r, h[:]); err != nil {
		return nil, err
	}
	p := make([]byte, binary.BigEndian.Uint32(h[:]))
	if c.in != nil {
		p = append(p, make([]byte, 16)...)
	}
	_, err := io.ReadFull(c.r, p)
	if err == nil && c.in != nil {
		p, err = c.in.Open(p[:0], c.iv, p, h[:])
		binary.BigEndian.PutUint64(c.iv[4:], binary.BigEndian.Uint64(c.iv[4:])+1)
	}
	if err != nil {
		return nil, err
	}
	return p[1 : len(p)-int(p[0])], nil
}

// expect reads up to a packet of one of these types.
func (c *rawSSH) expect(t *testing.T, types ...byte) []byte {
	t.Helper()
	for {
		p, err := c.read()
		if err != nil {
			t.Fatal(err)
		}
		if bytes.IndexByte(types, p[0]) >= 0 {
			return p
		}
	}
}

func dialRaw(addr string) (*rawSSH, error) {
	nc, err := net.Dial("tcp", addr)
	if err != nil {
		return nil, err
	}
	c := &rawSSH{Conn: nc, r: bufio.NewReader(nc)}
	io.WriteString(c, "SSH-2.0-raw\r\n")
	version, err := c.r.ReadString('\n')
	if err != nil {
		return nil, err
	}
	init := ssh.Marshal(struct {
		Cookie                                      [16]byte `sshtype:"20"`
		Kex, Host, C1, C2, M1, M2, Z1, Z2, La1, La2 string
		First                                       bool
		Reserved                                    uint32
	}{Kex: "curve25519-sha256", Host: "ssh-ed25519", C1: "aes128-gcm@openssh.com", C2: "aes128-gcm@openssh.com",
		M1: "hmac-sha2-256", M2: "hmac-sha2-256", Z1: "none", Z2: "none"})
	c.Write(c.packet(init))
	theirs, err := c.read()
	if err != nil {
		return nil, err
	}
	k, err := ecdh.X25519().GenerateKey(rand.Reader)
	if err != nil {
		return nil, err
	}
	c.send(struct {
		Q []byte `sshtype:"30"`
	}{k.PublicKey().Bytes()})
	reply, err := c.read()
	if err != nil {
		return nil, err
	}
	var m struct {
		KS, QS, Sig []byte `sshtype:"31"`
	}
	if err := ssh.Unmarshal(reply, &m); err != nil {
		return nil, err
	}
	pub, err := ecdh.X25519().NewPublicKey(m.QS)
	if err != nil {
		return nil, err
	}
	secret, err := k.ECDH(pub)
	if err != nil {
		return nil, err
	}
	shared := ssh.Marshal(struct{ K *big.Int }{new(big.Int).SetBytes(secret)})
	h := sha256.Sum256(append(ssh.Marshal(struct{ VC, VS, IC, IS, KS, QC, QS []byte }{
		[]byte("SSH-2.0-raw"), []byte(strings.TrimSpace(version)), init, theirs, m.KS, k.PublicKey().Bytes(), m.QS}), shared...))
	c.session = h[:]
	derive := func(x byte) []byte {
		d := sha256.Sum256(bytes.Join([][]byte{shared, h[:], {x}, h[:]}, nil))
		return d[:16]
	}
	if p, err := c.read(); err != nil || p[0] != 21 {
		return nil, fmt.Errorf("no newkeys: %v %v", p, err)
	}
	c.Write(c.packet([]byte{21}))
	aead := func(x byte) cipher.AEAD {
		block, _ := aes.NewCipher(derive(x))
		a, _ := cipher.NewGCM(block)
		return a
	}
	c.out, c.outIV, c.in, c.iv = aead('C'), derive('A')[:12], aead('D'), derive('B')[:12]
	return c, nil
}

// auth offers one key (RFC 4252 section 7) and authenticates with another.
func (c *rawSSH) auth(t *testing.T, offer, use ssh.Signer) {
	t.Helper()
	c.send(struct {
		Service string `sshtype:"5"`
	}{"ssh-userauth"})
	c.expect(t, 6)
	type userauth struct {
		User, Service, Method string `sshtype:"50"`
		Signed                bool
		Algo                  string
		Key                   []byte
		Rest                  []byte `ssh:"rest"`
	}
	ask := func(s ssh.Signer) userauth {
		return userauth{User: "mallory", Service: "ssh-connection", Method: "publickey", Algo: s.PublicKey().Type(), Key: s.PublicKey().Marshal()}
	}
	if offer != nil {
		c.send(ask(offer))
		c.expect(t, 60)
	}
	m := ask(use)
	m.Signed = true
	sig, err := use.Sign(rand.Reader, append(ssh.Marshal(struct{ S []byte }{c.session}), ssh.Marshal(m)...))
	if err != nil {
		t.Fatal(err)
	}
	m.Rest = ssh.Marshal(struct{ S []byte }{ssh.Marshal(sig)})
	c.send(m)
	c.expect(t, 52)
}

// exec opens a session with that window and runs a command in it.
func (c *rawSSH) exec(t *testing.T, command string, window uint32) {
	t.Helper()
	c.send(struct {
		Type               string `sshtype:"90"`
		ID, Window, Packet uint32
	}{"session", 0, window, 1 << 15})
	c.expect(t, 91)
	c.send(struct {
		ID      uint32 `sshtype:"98"`
		Type    string
		Reply   bool
		Command string
	}{0, "exec", false, command})
}

func (c *rawSSH) authAndExec(t *testing.T, offer, use ssh.Signer, command string) (stderr string) {
	t.Helper()
	c.auth(t, offer, use)
	c.exec(t, command, 1<<20)
	for {
		p := c.expect(t, 95, 97)
		if p[0] == 97 {
			return stderr
		}
		var m struct {
			ID, Code uint32 `sshtype:"95"`
			Data     string
		}
		if err := ssh.Unmarshal(p, &m); err != nil {
			t.Fatal(err)
		}
		stderr += m.Data
	}
}

// statusService is a service that does nothing but have a status.
func statusService(st Status) *Service {
	s := &Service{spec: spec{service: st.Service}, up: newUpstream("/none", "file:///none", "")}
	s.status.Store(&st)
	return s
}
