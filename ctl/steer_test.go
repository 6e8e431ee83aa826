//go:build linux

package ctl

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"unicode/utf8"
)

// services makes a server's answer of so many services with that info.
func services(info string, names ...string) string {
	var rows []Service
	for i, name := range names {
		rows = append(rows, Service{name, "606eb576", "FREEZE", info, "Fri, 18 Nov 2022 09:14:52 UTC", i * 3, "Thu, 17 Nov 2022 08:00:01 UTC"})
	}
	answer, _ := json.Marshal(Services{rows})
	return string(answer) + "\n"
}

// onTerminal runs the client on a terminal, and returns what it shows.
func onTerminal(t *testing.T, args string) []string {
	t.Helper()
	if _, err := exec.LookPath("script"); err != nil {
		t.Skip("needs script")
	}
	cmd := exec.CommandContext(t.Context(), "script", "-qec", os.Args[0], "/dev/null")
	cmd.Env = append(os.Environ(), asClient+"="+args, "SHELL=/bin/sh")
	cmd.Stdin = strings.NewReader("")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return strings.Split(strings.TrimSuffix(string(out), "\r\n"), "\r\n")
}

func TestTerminal(t *testing.T) {
	home(t)
	long := strings.Repeat("éö ü\u001b[2J", 200)
	s := serve(t, "127.0.0.1", func(request string, stdout, _ io.Writer) int {
		names := []string{"prometheus", "wg-quick@wg0", strings.Repeat("x", 60)}
		switch request {
		case "/list/service nginx", "/do/pull nginx":
			names = []string{"nginx"}
		case "/list/log nginx":
			io.WriteString(stdout, `{"ran":[{"hash":"1fe82c0a1234","outcome":"`+strings.Repeat("y", 1000)+`"}]}`)
			return 0
		}
		io.WriteString(stdout, services(long, names...))
		return 0
	}, nil)
	call(t, "list", "service", "@"+s.addr) // it is known now
	for _, tt := range []struct {
		args string
		cut  bool
	}{
		{"list service", true},
		{"list log nginx", true},
		{"list service nginx", false},
		{"do pull nginx", false},
		{"do pull -a", true},
		{"-m list service", false},
	} {
		most := 0
		for _, line := range onTerminal(t, tt.args+" @"+s.addr) {
			most = max(most, utf8.RuneCountInString(line))
			if strings.ContainsRune(line, '\u001b') {
				t.Errorf("%s: %q", tt.args, line)
			}
		}
		if cut := most <= 100; cut != tt.cut {
			t.Errorf("%s: %d columns", tt.args, most)
		}
		if _, stdout, stderr := call(t, append(strings.Fields(tt.args), "@"+s.addr)...); !strings.Contains(stdout, "yyy") && strings.Count(stdout, "éö") < 200 {
			t.Errorf("%s: not whole in a pipe: %s%s", tt.args, stdout, stderr)
		}
	}

	// What fits is shown as it is, but for the times.
	s = serve(t, "127.0.0.1", answers(services("", "prometheus", "nginx")), nil)
	call(t, "list", "service", "@"+s.addr)
	golden(t, "terminal.golden", strings.Join(onTerminal(t, "list service @"+s.addr), "\n")+"\n")
	s = serve(t, "127.0.0.1", answers(services("a reason of some length, until Sat, 19 Nov 2022 09:14:52 UTC", "prometheus", "nginx")), nil)
	call(t, "list", "service", "@"+s.addr)
	golden(t, "terminal-cut.golden", strings.Join(onTerminal(t, "list service @"+s.addr), "\n")+"\n")
}

// A pipe that is closed ends the client without a word of Go's.
func TestClosedPipe(t *testing.T) {
	home(t)
	s := serve(t, "127.0.0.1", answers(services("x", "nginx")), nil)
	call(t, "list", "service", "@"+s.addr)
	cmd := exec.CommandContext(t.Context(), "sh", "-c", `{ "$0"; echo $? >&2; } | :`, os.Args[0])
	cmd.Env = append(os.Environ(), asClient+"=list service @"+s.addr)
	out, _ := cmd.CombinedOutput()
	if text := string(out); strings.Contains(text, "goroutine") || strings.Count(text, "\n") > 1 {
		t.Error(text)
	}
}

func TestEveryService(t *testing.T) {
	home(t)
	host := func(ip string, names ...string) *server {
		return serve(t, ip, func(request string, stdout, stderr io.Writer) int {
			verb, rest, _ := strings.Cut(request, " ")
			service, _, _ := strings.Cut(rest, " ")
			if verb == "/list/service" {
				io.WriteString(stdout, services("", names...))
				return 0
			}
			fmt.Fprintln(stderr, "settle")
			if service == "broken" {
				fmt.Fprintln(stderr, "Conflict: no")
				return 1
			}
			io.WriteString(stdout, services("", service))
			return 0
		}, nil)
	}
	a, b := host("127.0.0.1", "nginx", "broken", "wg-quick@wg0"), host("127.0.0.2", "nginx")
	status, stdout, stderr := call(t, "do", "freeze", "-a", "@"+a.addr, "@"+b.addr, "@127.0.0.3:1", "2h", "all of it")
	if status != 1 {
		t.Errorf("status %d", status)
	}
	for _, want := range []string{"/list/service", "/do/freeze nginx 2h all of it", "/do/freeze broken 2h all of it", "/do/freeze wg-quick@wg0 2h all of it"} {
		if !strings.Contains(strings.Join(a.asked(), "\n")+"\n", want+"\n") {
			t.Errorf("%q was not asked: %q", want, a.asked())
		}
	}
	if got := b.asked(); len(got) != 2 {
		t.Errorf("the other was asked %q", got)
	}
	for _, want := range []string{a.addr + ": nginx: settle\n", "gitopper ctl: " + a.addr + ": broken: Conflict: no\n", "gitopper ctl: 127.0.0.3:1: "} {
		if !strings.Contains(stderr, want) {
			t.Errorf("no %q in %s", want, stderr)
		}
	}
	// A host that is new is new once, however often it is asked.
	if got := strings.Count(stderr, "new host"); got != 2 {
		t.Errorf("%d new hosts:\n%s", got, stderr)
	}
	if got := strings.Count(stdout, "\n"); got != 4 {
		t.Errorf("stdout %s", stdout)
	}

	// Behind -- it is a word like any other.
	call(t, "do", "freeze", "@"+b.addr, "--", "-a", "is", "it")
	if got := b.asked(); len(got) != 3 || got[2] != "/do/freeze -a is it" {
		t.Errorf("asked %q", got)
	}

	status, stdout, stderr = call(t, "do", "pull", "-a", "@"+b.addr)
	if status != 0 || strings.Contains(stdout, "MACHINE") || stderr != "settle\n" {
		t.Errorf("status %d, stdout %s, stderr %s", status, stdout, stderr)
	}
}

func TestLogAndDiff(t *testing.T) {
	home(t)
	const diff = "diff --git a/x b/x\n@@ -1,2 +1,2 @@\n \n-\ta\n+\tb\u001b[31m\r\n"
	const log = `{"service":"nginx","ran":[{"hash":"606eb5761234","when":"Fri, 18 Nov 2022 09:14:52 UTC","by":"upstream","outcome":"ok"},` +
		`{"hash":"1fe82c0a1234","when":"","by":"ann (root@10.0.0.1)","outcome":"` + `BROKEN: it failed\u001b[2J"}],` +
		`"pending":[{"hash":"c0ffee121234","date":"Sat, 19 Nov 2022 01:02:03 UTC","author":"Ann <ann@example.org>","subject":"more workers"}],"more":7}`
	s := serve(t, "127.0.0.1", func(request string, stdout, stderr io.Writer) int {
		switch request {
		case "/list/log nginx":
			io.WriteString(stdout, log)
		case "/list/diff nginx", "/list/diff nginx c0ffee12":
			io.WriteString(stdout, diff)
		default:
			io.WriteString(stderr, "Unauthorized: key ann is read-only\n")
			return 1
		}
		return 0
	}, nil)
	call(t, "list", "service", "@"+s.addr)
	_, stdout, _ := call(t, "list", "log", "@"+s.addr, "nginx")
	golden(t, "log.golden", stdout)
	want := strings.Replace(diff, "\u001b[31m\r", "\ufffd[31m ", 1)
	for _, args := range []string{"list diff nginx", "l diff nginx c0ffee12"} {
		status, stdout, stderr := call(t, append(strings.Fields(args), "@"+s.addr)...)
		if status != 0 || stdout != want || stderr != "" {
			t.Errorf("%s: status %d, stdout %q, stderr %q", args, status, stdout, stderr)
		}
	}
	status, stdout, stderr := call(t, "list", "diff", "@"+s.addr, "wrong")
	if status != 1 || stdout != "" || stderr != "gitopper ctl: "+s.addr+": Unauthorized: key ann is read-only\n" {
		t.Errorf("status %d, stdout %q, stderr %q", status, stdout, stderr)
	}
	other := serve(t, "127.0.0.2", answers("+x\n"), nil)
	if _, stdout, _ := call(t, "list", "diff", "nginx", "@"+s.addr, "@"+other.addr); stdout != "==> "+s.addr+" <==\n"+want+"==> "+other.addr+" <==\n+x\n" {
		t.Errorf("stdout %q", stdout)
	}
}

func TestCompletion(t *testing.T) {
	dir, _ := home(t)
	if _, err := exec.LookPath("script"); err != nil {
		t.Skip("needs script")
	}
	writeFile(t, filepath.Join(dir, ".ssh", "known_hosts"), strings.Join([]string{
		"# comment", "[web1]:2222,[10.0.0.1]:2222 ssh-ed25519 x", "db1.example.org ssh-ed25519 x", "[mail]:2200 ssh-ed25519 x",
		"[fe80::1]:2222 ssh-ed25519 x", "|1|hashed|x ssh-ed25519 x", "*.lan ssh-ed25519 x", "@revoked old ssh-ed25519 x", "$(touch${IFS}pwned),`touch${IFS}pwned` ssh-ed25519 x",
	}, "\n")+"\n")
	writeFile(t, filepath.Join(dir, "others"), "other1 ssh-ed25519 x\n")
	_, script, _ := call(t, "--completion")
	// A function in place of the binary shows what words it was given in the end.
	rc := script + "\nPS1='$ '\ngitopper() { [[ $1 != --help ]] || { echo ' --check --config'; return; }; printf '<%s>' \"$@\"; echo; }\ncd " + dir + "\n"
	writeFile(t, filepath.Join(dir, "rc"), rc)

	for typed, want := range map[string]string{
		"gitopper c\t":                              "<ctl>",
		"gitopper --ch\t":                           "<--check>",
		"gitopper -c oth\t":                         "<-c><others>",
		"gitopper ctl li\tserv\t":                   "<ctl><list><service>",
		"gitopper ctl list ma\t":                    "<ctl><list><machines>",
		"gitopper ctl list di\t":                    "<ctl><list><diff>",
		"gitopper ctl list lo\t":                    "<ctl><list><log>",
		"gitopper ctl do fr\t":                      "<ctl><do><freeze>",
		"gitopper ctl d un\t":                       "<ctl><d><unfreeze>",
		"gitopper ctl do ro\t":                      "<ctl><do><rollback>",
		"gitopper ctl do @web1 pu\t":                "<ctl><do><@web1><pull>",
		"gitopper ctl h\t oth\t":                    "<ctl><hdr><others>",
		"gitopper ctl list service @we\t":           "<ctl><list><service><@web1>",
		"gitopper ctl list service @web1 @d\t":      "<ctl><list><service><@web1><@db1.example.org>",
		"gitopper ctl list service @mail:\t":        "<ctl><list><service><@mail:2200>",
		"gitopper ctl list service @[\t":            "<ctl><list><service><@[fe80::1]>",
		"gitopper ctl list service @10\t":           "<ctl><list><service><@10.0.0.1>",
		"gitopper ctl list service @h nginx\t":      "<ctl><list><service><@h><nginx>",
		"gitopper ctl -k others list service @\t":   "<ctl><-k><others><list><service><@other1>",
		"gitopper ctl -k ~/others list service @\t": "<ctl><-k><" + dir + "/others><list><service><@other1>",
		"gitopper ctl -J db\t":                      "<ctl><-J><db1.example.org>",
		"gitopper ctl -i oth\t":                     "<ctl><-i><others>",
		"gitopper ctl --comp\t":                     "<ctl><--completion>",
		"gitopper ctl --vers\t":                     "<ctl><--version>",
		"gitopper ctl hdr -l n\t":                   "<ctl><hdr><-l><nl>",
		"gitopper ctl -m list ser\t":                "<ctl><-m><list><service>",
	} {
		cmd := exec.CommandContext(t.Context(), "script", "-qec", "bash --rcfile "+dir+"/rc -i", "/dev/null")
		cmd.Env = append(os.Environ(), "SHELL=/bin/sh", "TERM=dumb")
		cmd.Stdin = strings.NewReader(typed + "\nexit\n")
		out, err := cmd.CombinedOutput()
		if !strings.Contains(string(out), "\n"+want+"\r\n") {
			t.Errorf("%q gives %q, want %q (%v)", typed, out, want, err)
		}
	}
	if exists(filepath.Join(dir, "pwned")) {
		t.Error("a name in known_hosts was run")
	}
}
