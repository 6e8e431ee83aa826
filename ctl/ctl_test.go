package ctl

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/json"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"unicode"
	"unicode/utf8"

	"golang.org/x/crypto/ssh"
)

var update = flag.Bool("update", false, "rewrite the golden files")

// asClient makes the test binary the client, with the variable's words as its arguments.
const asClient = "CTL_TEST_CLIENT"

func TestMain(m *testing.M) {
	if args := os.Getenv(asClient); args != "" {
		os.Exit(Main(context.Background(), strings.Fields(args), os.Stdout, os.Stderr))
	}
	os.Exit(m.Run())
}

// golden compares got with testdata/name.
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
		t.Errorf("%s: got\n%s\nwant\n%s", file, got, want)
	}
}

// handler plays gitopper: what it returns is the exit status.
type handler func(request string, stdout, stderr io.Writer) int

// server is a stand-in for a host.
type server struct {
	addr     string
	config   *ssh.ServerConfig
	handle   handler
	mu       sync.Mutex
	requests []string
	users    []string
	conns    int
}

func newKey(t testing.TB) ssh.Signer {
	t.Helper()
	_, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	signer, err := ssh.NewSignerFromKey(private)
	if err != nil {
		t.Fatal(err)
	}
	return signer
}

// serve starts a stand-in on ip, with these host keys or a new one. It accepts the keys in allowed, or every key.
func serve(t testing.TB, ip string, handle handler, hostKeys []ssh.Signer, allowed ...ssh.PublicKey) *server {
	t.Helper()
	s := &server{handle: handle}
	s.config = &ssh.ServerConfig{PublicKeyCallback: func(_ ssh.ConnMetadata, key ssh.PublicKey) (*ssh.Permissions, error) {
		if len(allowed) > 0 && !slices.ContainsFunc(allowed, func(k ssh.PublicKey) bool { return sameKey(k, key) }) {
			return nil, errors.New("unknown key")
		}
		return nil, nil
	}}
	if len(hostKeys) == 0 {
		hostKeys = []ssh.Signer{newKey(t)}
	}
	for _, k := range hostKeys {
		s.config.AddHostKey(k)
	}
	l, err := net.Listen("tcp", ip+":0")
	if err != nil {
		t.Fatal(err)
	}
	s.addr = l.Addr().String()
	var wg sync.WaitGroup
	t.Cleanup(func() { l.Close(); wg.Wait() })
	wg.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() { s.talk(conn) })
		}
	})
	return s
}

func (s *server) talk(conn net.Conn) {
	defer conn.Close()
	sshConn, chans, reqs, err := ssh.NewServerConn(conn, s.config)
	if err != nil {
		return
	}
	s.mu.Lock()
	s.conns++
	s.users = append(s.users, sshConn.User())
	s.mu.Unlock()
	go ssh.DiscardRequests(reqs)
	for ch := range chans {
		channel, reqs, err := ch.Accept()
		if err != nil {
			return
		}
		for r := range reqs {
			if r.Type != "exec" {
				r.Reply(false, nil)
				continue
			}
			var command struct{ Text string }
			if err := ssh.Unmarshal(r.Payload, &command); err != nil {
				return
			}
			r.Reply(true, nil)
			s.mu.Lock()
			s.requests = append(s.requests, command.Text)
			s.mu.Unlock()
			status := s.handle(command.Text, channel, channel.Stderr())
			if status < 0 {
				return // the connection breaks
			}
			channel.SendRequest("exit-status", false, ssh.Marshal(struct{ Status uint32 }{uint32(status)}))
			channel.Close()
		}
	}
}

func (s *server) asked() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.requests
}

// home gives the test a home directory with a key in it and no ssh-agent.
func home(t testing.TB) (dir string, key ssh.Signer) {
	t.Helper()
	dir = t.TempDir()
	t.Setenv("HOME", dir)
	t.Setenv("SSH_AUTH_SOCK", "")
	_, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	block, err := ssh.MarshalPrivateKey(private, "test")
	if err != nil {
		t.Fatal(err)
	}
	writeFile(t, filepath.Join(dir, ".ssh", "id_ed25519"), string(pem.EncodeToMemory(block)))
	key, err = ssh.NewSignerFromKey(private)
	if err != nil {
		t.Fatal(err)
	}
	return dir, key
}

func writeFile(t testing.TB, file, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func readFile(t testing.TB, file string) string {
	t.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// call runs the client.
func call(t testing.TB, args ...string) (status int, stdout, stderr string) {
	t.Helper()
	var out, err bytes.Buffer
	status = Main(t.Context(), args, &out, &err)
	return status, out.String(), err.String()
}

// quiet drops the notices of new hosts.
func quiet(stderr string) string {
	var b strings.Builder
	for line := range strings.Lines(stderr) {
		if !strings.Contains(line, ": new host, key ") {
			b.WriteString(line)
		}
	}
	return b.String()
}

const nginx = `{"services":[{"service":"nginx","hash":"606eb576","state":"OK","stateinfo":"","change":"Fri, 18 Nov 2022 09:14:52 UTC"}]}` + "\n"

const two = `{"services":[{"service":"prometheus","hash":"606eb576","state":"OK","stateinfo":"","change":"Fri, 18 Nov 2022 09:14:52 UTC"},` +
	`{"service":"wg-quick@wg0","hash":"1fe82c0a","state":"FREEZE","stateinfo":"ROLLBACK: 1fe82c0a, ann, disk is full","change":"Sat, 19 Nov 2022 01:02:03 UTC"}]}` + "\n"

const machines = `{"machines":[{"machine":"web1","actual":"web1"},{"machine":"grafana.example.com","actual":"web1"}]}` + "\n"

func answers(answer string) handler {
	return func(_ string, stdout, _ io.Writer) int { io.WriteString(stdout, answer); return 0 }
}

func TestHelp(t *testing.T) {
	for _, args := range [][]string{{"--help"}, {"-h"}, {"do", "freeze", "-help"}} {
		status, stdout, stderr := call(t, args...)
		if status != 0 || stderr != "" {
			t.Errorf("%q: status %d, stderr %q", args, status, stderr)
		}
		if stdout != help {
			t.Errorf("%q: got\n%s", args, stdout)
		}
	}
}

// Help and completion have every command and option.
func TestHelpIsWhole(t *testing.T) {
	words := strings.Fields(completion)
	for _, c := range commands {
		line := strings.TrimPrefix(c.usage(), "usage: gitopper ctl [OPTION]...")
		if !strings.Contains(help, "\n "+line) {
			t.Errorf("help does not have %s", line)
		}
		for _, word := range strings.Fields(line)[:2] {
			if !slices.Contains(words, word) {
				t.Errorf("the completion does not have %s", word)
			}
		}
	}
	for name := range takesValue {
		option := strings.Repeat("-", min(2, len(name))) + name
		if option != "-h" && !(strings.Contains(help, "  "+option) || strings.Contains(help, ", "+option)) {
			t.Errorf("help does not have %s", option)
		}
		if option != "-h" && !slices.Contains(words, option) {
			t.Errorf("the completion does not have %s", option)
		}
	}
}

func TestWrongUsage(t *testing.T) {
	home(t)
	var all strings.Builder
	for _, args := range []string{
		"", "frobnicate", "list", "list machines", "list machines @h x", "list frobs @h", "list service", "list service @h a b",
		"do", "do freeze @h", "do unfreeze @h", "do unfreeze @h a b", "do rollback @h a", "do rollback @h", "do rollback a 1234", "do pull @h",
		"do pull @h a|b", "do pull @h a|b c", "do freeze @h a|b", "do freeze @h a x|y\nz", "do freeze @h a -x", "do unfreeze @h a|",
		"list machines @h -p", "list machines @h -p 0", "list machines @h -p x", "list machines @", "list machines @root@h", "list machines @[::1", "list machines @1:2:3:4",
		"list machines @h:99999", "list machines @h -l nl", "list machines @h -m=maybe", "list machines @h -J",
		"list log @h", "list log @h a b", "list log @h -a", "list service @h -a", "list diff @h", "list diff @h a 1234 b", "list diff -m @h a",
		"do freeze -a", "do unfreeze @h -a b", "do rollback @h -a 1234", "do freeze @h a -a", "do rollback @h a 1234 -a", "do -a freeze @h", "do freeze @h a --frob", "--frob", "list --frob",
		"hdr", "hdr a b", "hdr -l fr a", "hdr -m a", "hdr -x a",
	} {
		// Words are apart at blanks, and a | stands for a blank or nothing in a word.
		words := strings.FieldsFunc(args, func(r rune) bool { return r == ' ' })
		for i, w := range words {
			words[i] = strings.ReplaceAll(w, "|", " ")
		}
		status, stdout, stderr := call(t, words...)
		reason := stderr[strings.LastIndex(strings.TrimSuffix(stderr, "\n"), "\n")+1:] // the last line
		if status != 1 || stdout != "" || !strings.HasPrefix(reason, "gitopper ctl: ") {
			t.Errorf("%q: status %d, stdout %q, stderr %q", args, status, stdout, stderr)
		}
		fmt.Fprintf(&all, "$ gitopper ctl %s\n%s\n", strings.ReplaceAll(args, "\n", `\n`), stderr)
	}
	golden(t, "usage.golden", all.String())
}

func TestRequests(t *testing.T) {
	home(t)
	s := serve(t, "127.0.0.1", answers(nginx), nil)
	_, port, _ := net.SplitHostPort(s.addr)
	for _, tt := range []struct{ args, want string }{
		{"list machines @HOST", "/list/machine"},
		{"ls machine @HOST", "/list/machine"},
		{"@HOST l m", "/list/machine"},
		{"-m list service @HOST", "/list/service"},
		{"list -m services @HOST nginx", "/list/service nginx"},
		{"l s nginx @HOST -m", "/list/service nginx"},
		{"l s @127.0.0.1 -p PORT", "/list/service"},
		{"-p=PORT l s @127.0.0.1", "/list/service"},
		{"--p PORT l s @[127.0.0.1]", "/list/service"},
		{"do freeze @HOST nginx", "/do/freeze nginx"},
		{"d f @HOST nginx 2h disk is|full", "/do/freeze nginx 2h disk is full"},
		{"d f @HOST nginx -- 2h -m is broken, ask @ann", "/do/freeze nginx 2h -m is broken, ask @ann"},
		{"d f @HOST -- nginx", "/do/freeze nginx"},
		{"do unfreeze @HOST wg-quick@wg0", "/do/unfreeze wg-quick@wg0"},
		{"d u nginx @HOST", "/do/unfreeze nginx"},
		{"do rollback @HOST nginx 606eb576", "/do/rollback nginx 606eb576"},
		{"d r @HOST nginx 606eb576", "/do/rollback nginx 606eb576"},
		{"do rollback @HOST nginx 606eb576 disk is|full", "/do/rollback nginx 606eb576 disk is full"},
		{"do pull @HOST nginx", "/do/pull nginx"},
		{"d p @HOST nginx @HOST @127.0.0.1 -p PORT", "/do/pull nginx"}, // one host, three times
	} {
		before := len(s.asked())
		words := strings.Fields(strings.NewReplacer("HOST", s.addr, "PORT", port).Replace(tt.args))
		for i, w := range words {
			words[i] = strings.ReplaceAll(w, "|", " ")
		}
		status, _, stderr := call(t, words...)
		if status != 0 {
			t.Errorf("%s: status %d: %s", tt.args, status, stderr)
		}
		if got := s.asked()[before:]; len(got) != 1 || got[0] != tt.want {
			t.Errorf("%s: asked %q, want %q", tt.args, got, tt.want)
		}
	}
}

func TestTables(t *testing.T) {
	home(t)
	hostile := `{"services":[{"service":"a\u001b[2Jb","hash":"` + "\u009b" + `31m","state":"O\tK","stateinfo":"x\ny` + "\u202e" + `z\u0007","change":""},` +
		`{"service":"ok","hash":"1","state":"OK","stateinfo":"naïve ✓","change":"now","new":"field"}]}`
	for _, tt := range []struct {
		name, args string
		answers    []string
	}{
		{"service", "list service", []string{two}},
		{"services", "list service", []string{two, nginx}},
		{"none", "list service", []string{`{"services":[]}`}},
		{"machine", "list machines", []string{machines}},
		{"machines", "list machines", []string{machines, machines}},
		{"do", "do pull nginx", []string{nginx, nginx}},
		{"bare", "list service", []string{"{}", " { \n } "}},
		{"hostile", "list service", []string{hostile}},
	} {
		var hosts []host
		cmd, _, err := find(options{words: strings.Fields(tt.args)})
		if err != nil {
			t.Fatal(err)
		}
		// print shows the answers, as if web1, web2 and so on had given them.
		print := func(f form) string {
			hosts = nil
			r := &report{heads: cmd.heads, hosts: len(tt.answers), form: f}
			for i, a := range tt.answers {
				hosts = append(hosts, host{name: fmt.Sprintf("web%d", i+1)})
				if err := r.add(question{host: hosts[i]}, []byte(a)); err != nil {
					t.Errorf("%s: %v", tt.name, err)
				}
			}
			var stdout bytes.Buffer
			if err := r.print(&stdout); err != nil {
				t.Errorf("%s: %v", tt.name, err)
			}
			return stdout.String()
		}
		golden(t, tt.name+".golden", print(wideTable))
		stdout := print(jsonForm)
		if len(hosts) == 1 && tt.name != "hostile" {
			if want := strings.TrimSpace(tt.answers[0]) + "\n"; stdout != want {
				t.Errorf("%s: -m gave %q, want %q", tt.name, stdout, want)
			}
			continue
		}
		for i, line := range strings.Split(strings.TrimSpace(stdout), "\n") {
			got, want := map[string]any{}, map[string]any{}
			if err := json.Unmarshal([]byte(line), &got); err != nil {
				t.Fatal(err)
			}
			if err := json.Unmarshal([]byte(tt.answers[i]), &want); err != nil {
				t.Fatal(err)
			}
			if len(hosts) > 1 {
				want["host"] = hosts[i].name
			}
			if fmt.Sprint(got) != fmt.Sprint(want) || strings.ContainsAny(line, "\u009b\u202e") {
				t.Errorf("%s: -m gave %q", tt.name, line)
			}
		}
	}
}

func TestFailures(t *testing.T) {
	home(t)
	good := serve(t, "127.0.0.1", answers(nginx), nil)
	// The kernel may give a host the port of one before it: they are one host.
	keys := []ssh.Signer{newKey(t)}
	for _, tt := range []struct {
		name   string
		handle handler
		args   string
		want   string // the lines on stderr, HOST for the host that fails
		table  bool   // its answer is shown nevertheless
	}{
		{"not found", func(_ string, _, stderr io.Writer) int {
			io.WriteString(stderr, "fetch\nNot Found: no service \"x\"\n")
			return 1
		}, "do pull x", "HOST: fetch\ngitopper ctl: HOST: Not Found: no service \"x\"\n", false},
		{"no last newline", func(_ string, _, stderr io.Writer) int { io.WriteString(stderr, "Conflict: it is pinned"); return 1 },
			"do pull x", "gitopper ctl: HOST: Conflict: it is pinned\n", false},
		{"answer and error", func(_ string, stdout, stderr io.Writer) int {
			io.WriteString(stdout, nginx)
			io.WriteString(stderr, "Internal Server Error: the unit failed\n")
			return 1
		}, "do rollback nginx 1234", "gitopper ctl: HOST: Internal Server Error: the unit failed\n", true},
		{"silent", func(string, io.Writer, io.Writer) int { return 3 }, "list service", "gitopper ctl: HOST: /list/service ended with status 3\n", false},
		{"terminal", func(_ string, stdout, stderr io.Writer) int {
			io.WriteString(stderr, "a\x1b]0;x\x07\rb\xff\n")
			io.WriteString(stdout, nginx)
			return 0
		}, "list service", "HOST: a\ufffd]0;x\ufffd b\ufffd\n", true},
		{"verdict in vain", func(_ string, stdout, stderr io.Writer) int {
			io.WriteString(stderr, "Conflict: no\nConflict: settled\ndone\n")
			io.WriteString(stdout, nginx)
			return 0
		}, "list service", "HOST: Conflict: no\nHOST: Conflict: settled\nHOST: done\n", true},
		{"no json", answers("hello\n"), "list service", "gitopper ctl: HOST: the answer makes no sense (invalid character 'h' looking for beginning of value): is that gitopper?\n", false},
		{"null", answers("null"), "list service", "gitopper ctl: HOST: the answer makes no sense (no object): is that gitopper?\n", false},
		{"array", answers("[]"), "list service", "gitopper ctl: HOST: the answer makes no sense", false},
		{"nothing", answers(""), "list service", "gitopper ctl: HOST: the answer makes no sense (unexpected end of JSON input): is that gitopper?\n", false},
		{"too large", answers(strings.Repeat(" ", answerLimit) + nginx), "list service", "gitopper ctl: HOST: the answer is larger than 2097152 bytes\n", false},
		{"breaks", func(string, io.Writer, io.Writer) int { return -1 }, "do pull x",
			"gitopper ctl: HOST: no answer: connection lost: wait: remote command exited without exit status or exit signal; list service shows what became of it\n", false},
		{"flood", func(_ string, stdout, stderr io.Writer) int {
			io.WriteString(stderr, strings.Repeat("x", 3*answerLimit))
			io.WriteString(stdout, nginx)
			return 0
		}, "list service", "", true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			bad := serve(t, "127.0.0.2", tt.handle, keys)
			status, stdout, stderr := call(t, append(strings.Fields(tt.args), "@"+bad.addr, "@"+good.addr)...)
			got := quiet(strings.ReplaceAll(stderr, bad.addr, "HOST"))
			if !strings.HasPrefix(got, tt.want) || strings.HasSuffix(tt.want, "\n") && got != tt.want {
				t.Errorf("stderr %q, want %q", got, tt.want)
			}
			wantStatus := 0
			if strings.Contains(tt.want, "gitopper ctl: ") {
				wantStatus = 1
			}
			if status != wantStatus {
				t.Errorf("status %d, want %d", status, wantStatus)
			}
			if !strings.Contains(stdout, good.addr) || strings.Contains(stdout, bad.addr) != tt.table {
				t.Errorf("stdout %q", stdout)
			}
		})
	}
}

func TestStepsAppearWhileAtWork(t *testing.T) {
	home(t)
	seen := make(chan struct{})
	s := serve(t, "127.0.0.1", func(_ string, stdout, stderr io.Writer) int {
		io.WriteString(stderr, "fetch\n")
		<-seen // goes on only when the step has been shown
		io.WriteString(stderr, "settle\n")
		io.WriteString(stdout, nginx)
		return 0
	}, nil)
	r, w := io.Pipe()
	var stdout bytes.Buffer
	done := make(chan int)
	go func() {
		done <- Main(t.Context(), []string{"do", "pull", "nginx", "@" + s.addr}, &stdout, w)
		w.Close()
	}()
	var lines []string
	for line := range readLines(r) {
		lines = append(lines, line)
		if line == "fetch" {
			close(seen)
		}
		if line == "settle" {
			break
		}
	}
	go io.Copy(io.Discard, r)
	if status := <-done; status != 0 || len(lines) != 3 {
		t.Errorf("status %d, stderr %q", status, lines)
	}
}

func readLines(r io.Reader) func(func(string) bool) {
	return func(yield func(string) bool) {
		var line []byte
		for b := make([]byte, 1); ; {
			if _, err := r.Read(b); err != nil {
				return
			}
			if b[0] != '\n' {
				line = append(line, b[0])
				continue
			}
			if !yield(string(line)) {
				return
			}
			line = nil
		}
	}
}

func TestInterrupt(t *testing.T) {
	home(t)
	ctx, cancel := context.WithCancel(t.Context())
	never := make(chan struct{})
	good := serve(t, "127.0.0.1", answers(nginx), nil)
	stuck := serve(t, "127.0.0.2", func(string, io.Writer, io.Writer) int { cancel(); <-never; return -1 }, nil)
	t.Cleanup(func() { close(never) })
	var stdout, stderr bytes.Buffer
	status := Main(ctx, []string{"do", "pull", "x", "@" + stuck.addr}, &stdout, &stderr)
	if want := "gitopper ctl: interrupted: no answer from 1 of 1 hosts; list service shows how things stand\n"; status != 1 || quiet(stderr.String()) != want || stdout.Len() > 0 {
		t.Errorf("status %d, stdout %q, stderr %q", status, &stdout, &stderr)
	}
	stderr.Reset()
	if status := Main(ctx, []string{"list", "service", "@" + good.addr, "@" + stuck.addr}, &stdout, &stderr); status != 1 {
		t.Errorf("status %d with an ended context", status)
	}
}

func TestBrokenStdout(t *testing.T) {
	home(t)
	s := serve(t, "127.0.0.1", answers(nginx), nil)
	for _, args := range [][]string{{"list", "service"}, {"-m", "list", "service"}} {
		r, w := io.Pipe()
		r.Close()
		var stderr bytes.Buffer
		if status := Main(t.Context(), append(args, "@"+s.addr), w, &stderr); status != 1 {
			t.Errorf("%q: status %d, stderr %q", args, status, &stderr)
		}
	}
}

// Whatever a host answers: what is shown drives no terminal, and fits one.
func FuzzAnswer(f *testing.F) {
	for _, s := range []string{nginx, two, machines, "{}", "null", `{"services":[{"stateinfo":"\u001b[2J\u009b\n\t"}]}`,
		`{"ran":[{"hash":"x","outcome":"` + strings.Repeat("ü", 1000) + `"}],"more":-1}`, `{"host":1,"service":"a\u202eb"}`} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, answer []byte) {
		for _, cmd := range commands {
			for _, shown := range []form{narrowTable, jsonForm} {
				if cmd.heads == nil {
					shown = textForm
				}
				r := &report{heads: cmd.heads, hosts: 2, form: shown}
				for _, name := range []string{"web1", "web2"} {
					if err := r.add(question{host: host{name: name}}, answer); err != nil && shown == textForm {
						t.Fatal(err)
					}
				}
				var out bytes.Buffer
				if err := r.print(&out); err != nil {
					t.Fatal(err)
				}
				for line := range strings.Lines(out.String()) {
					line = strings.TrimSuffix(line, "\n")
					if strings.ContainsFunc(line, func(r rune) bool { return r != '\t' && !unicode.IsPrint(r) && r != unicode.ReplacementChar }) {
						t.Fatalf("%s shows %q", cmd.path, line)
					}
					if shown == narrowTable && utf8.RuneCountInString(line) > columns {
						t.Fatalf("%s shows a line of %d", cmd.path, utf8.RuneCountInString(line))
					}
				}
			}
		}
	})
}
