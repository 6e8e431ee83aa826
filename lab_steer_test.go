//go:build linux

package main

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"
)

// ctl runs the client on the host, as an operator there would.
func (l *labHost) ctl(args ...string) (string, error) {
	l.t.Helper()
	key, err := os.ReadFile(l.key)
	if err != nil {
		l.t.Fatal(err)
	}
	l.write("/root/operator", string(key))
	l.run("chmod", "600", "/root/operator")
	return l.try(append([]string{"gitopper", "ctl", "-i", "/root/operator", "-p", strconv.Itoa(l.sshPort)},
		args...)...)
}

// A rollback with upstream away is whole when the command returns, and outlives a restart and a reboot.
func TestLabRollbackWithUpstreamAway(t *testing.T) {
	l, u := newLab(t), newLabUpstream(t)
	l.witness("app", "/srv/app/conf", "[Install]\nWantedBy=multi-user.target")
	first := u.commit(map[string]string{"app/conf": "1\n"})
	l.configure(u, `
[[services]]
machine = "lab"
service = "app"
action = "reload"
settle = "200ms"
dirs = [ { local = "/srv/app", link = "app" } ]
`)
	l.start()
	l.waitCommit("app", first)
	l.run("systemctl", "enable", "gitopper", "app")
	second := u.commit(map[string]string{"app/conf": "2\n"})
	l.waitCommit("app", second)
	l.waitState("app", "OK")
	u.stop()
	right := func(when string) {
		t.Helper()
		if got := l.read("/srv/app/conf"); got != "1\n" {
			t.Errorf("%s: the file is %q", when, got)
		}
		if got := l.read("/run/app.seen"); got != "1\n" {
			t.Errorf("%s: the unit saw %q", when, got)
		}
		s, err := l.status("app")
		if err != nil || s.State != "FREEZE" || !strings.HasPrefix(s.StateInfo, "ROLLBACK: "+first[:8]) ||
			s.Hash != first[:8] {
			t.Errorf("%s: %+v, %v", when, s, err)
		}
	}
	if out, err := l.ctl("do", "rollback", "@127.0.0.1", "app", first[:7]); err != nil ||
		!strings.Contains(out, "ROLLBACK: "+first[:8]) {
		t.Fatalf("rollback: %v\n%s", err, out)
	}
	right("when the command returns")
	l.run("systemctl", "restart", "gitopper")
	l.waitState("app", "FREEZE")
	right("after a restart")
	l.reboot()
	l.waitState("app", "FREEZE")
	l.waitFile("/run/app.seen", "1\n")
	right("after a reboot")
	u.start()
	if out, err := l.ctl("do", "unfreeze", "@127.0.0.1", "app"); err != nil ||
		!strings.Contains(out, second[:8]) || !strings.Contains(out, "OK") {
		t.Errorf("unfreeze: %v\n%s", err, out)
	}
	if got := l.read("/srv/app/conf") + l.read("/run/app.seen"); got != "2\n2\n" {
		t.Errorf("after unfreeze: %q", got)
	}

	// What an operator sees of a commit that waits, and every service of the host at once.
	out, err := l.ctl("do", "freeze", "@127.0.0.1", "-a", "1h", "looking", "around")
	if err != nil || !strings.Contains(out, "looking around, until ") {
		t.Errorf("freeze -a: %v\n%s", err, out)
	}
	third := u.commit(map[string]string{"app/conf": "3\n"})
	eventually(t, "one commit waits", func() bool {
		out, err = l.ctl("list", "service", "@127.0.0.1")
		return err == nil && strings.Contains(out, second[:8]+" +1  FREEZE")
	})
	out, err = l.ctl("list", "log", "@127.0.0.1", "app")
	for _, want := range []string{third[:8], "pending: ", second[:8], first[:8], "rollback"} {
		if err != nil || !strings.Contains(out, want) {
			t.Errorf("list log has no %q: %v\n%s", want, err, out)
		}
	}
	out, err = l.ctl("list", "diff", "@127.0.0.1", "app")
	if err != nil || !strings.Contains(out, "\n-2\n+3") {
		t.Errorf("list diff: %v\n%s", err, out)
	}
	out, err = l.ctl("do", "unfreeze", "@127.0.0.1", "-a")
	if err != nil || !strings.Contains(out, third[:8]) {
		t.Errorf("unfreeze -a: %v\n%s", err, out)
	}

	// Usage and unknown things.
	for _, tc := range []struct {
		name, want string
		args       []string
	}{
		{"unknown service", "Not Found: no service \"nope\"", []string{"do", "freeze", "@127.0.0.1", "nope"}},
		{"unknown hash", "Not Found: ", []string{"do", "rollback", "@127.0.0.1", "app", "abcdef12"}},
		{"no hash", "usage", []string{"do", "rollback", "@127.0.0.1", "app"}},
	} {
		if out, err := l.ctl(tc.args...); err == nil || !strings.Contains(out+err.Error(), tc.want) {
			t.Errorf("%s: %v\n%s", tc.name, err, out)
		}
	}
	l.waitState("app", "OK")
}

// 2,000 idle connections and 200 slow handshakes keep neither an operator out nor a commit back, with 1024
// descriptors.
func TestLabFlood(t *testing.T) {
	l, u := newLab(t), newLabUpstream(t)
	l.witness("app", "/srv/app/conf", "")
	first := u.commit(map[string]string{"app/conf": "1\n"})
	l.configure(u, `
[[services]]
machine = "lab"
service = "app"
action = "reload"
settle = "100ms"
dirs = [ { local = "/srv/app", link = "app" } ]
`)
	l.write("/etc/systemd/system/gitopper.service.d/files.conf", "[Service]\nLimitNOFILE=1024\n")
	l.start()
	l.waitCommit("app", first)
	address := fmt.Sprint("127.0.0.1:", l.sshPort)
	var flood []net.Conn
	defer func() {
		for _, c := range flood {
			c.Close()
		}
	}()
	for i := range 2200 {
		c, err := net.DialTimeout("tcp", address, 5*time.Second)
		if err != nil {
			t.Fatalf("connection %d: %v", i, err)
		}
		flood = append(flood, c)
		if i >= 2000 { // begins, and never goes on
			fmt.Fprintf(c, "SSH-2.0-slow\r\n\x00\x00\x02")
		}
	}
	for range 3 {
		start := time.Now()
		if _, err := l.status("app"); err != nil {
			t.Fatalf("an operator during the flood: %v", err)
		}
		if took := time.Since(start); took > 2*time.Second {
			t.Errorf("an operator waited %v", took)
		}
	}
	second := u.commit(map[string]string{"app/conf": "2\n"})
	l.waitCommit("app", second)
	l.waitFile("/run/app.seen", "2\n")
	if rss := l.metric("process_resident_memory_bytes"); rss > 64<<20 {
		t.Errorf("%.0f MiB of memory", rss/(1<<20))
	} else {
		t.Logf("%.0f MiB of memory, %.0f descriptors", rss/(1<<20), l.metric("process_open_fds"))
	}
}

// The stock client works in a pipeline, and gets nothing but the commands.
func TestLabStockClient(t *testing.T) {
	l, u := newLab(t), newLabUpstream(t)
	hash := u.commit(map[string]string{"app/conf": "1\n"})
	l.configure(u, `
[[services]]
machine = "lab"
service = "app"
dirs = [ { local = "/srv/app", link = "app" } ]
`)
	l.start()
	l.waitCommit("app", hash)
	known := t.TempDir() + "/known"
	client := func(args ...string) (string, error) {
		args = append([]string{"-F", "/dev/null", "-o", "BatchMode=yes", "-o",
			"StrictHostKeyChecking=accept-new", "-o", "LogLevel=ERROR", "-o", "UserKnownHostsFile=" +
				known, "-i", l.key, "-p", strconv.Itoa(l.sshPort), "127.0.0.1"}, args...)
		out, err := exec.Command("ssh", args...).CombinedOutput()
		return string(out), err
	}
	for _, tc := range []struct{ command, want string }{
		{"/list/machine", `{"machines":[{"machine":"lab","actual":"`},
		{"/list/service", `{"services":[{"service":"app","hash":"` + hash[:8] +
			`","state":"OK","stateinfo":"","change":"`},
		{"/list/service app", `"service":"app"`},
		{"/do/freeze app 1h a reason", `"state":"FREEZE","stateinfo":"operator@lab (`},
		{"/do/unfreeze app", `"state":"OK"`},
		{"/do/rollback app " + hash[:5], `"stateinfo":"ROLLBACK: ` + hash[:8]},
		{"/do/unfreeze app", `"state":"OK"`},
		{"/do/pull app", `"state":"OK"`},
	} {
		if out, err := client(tc.command); err != nil || !strings.Contains(out, tc.want) {
			t.Errorf("%s: %v\n%s\nwant %s", tc.command, err, out, tc.want)
		}
	}

	// What waits is seen before it is let in, and what ran afterwards.
	says := func(command, want string) {
		t.Helper()
		eventually(t, command+" says "+want, func() bool {
			out, err := client(command)
			return err == nil && strings.Contains(out, want)
		})
	}
	says("/do/freeze app look at it first", `"state":"FREEZE"`)
	second := u.commit(map[string]string{"app/conf": "2\n"})
	says("/list/service app", `"pending":1`)
	says("/list/log app", `"pending":[{"hash":"`+second)
	says("/list/diff app", "diff --git a/app/conf b/app/conf\nindex d00491f..0cfbf08 100644\n"+
		"--- a/app/conf\n+++ b/app/conf\n@@ -1 +1 @@\n-1\n+2\n")
	says("/do/unfreeze app", `"state":"OK","stateinfo":"",`)
	says("/list/log app", `"by":"commit","outcome":"OK"},{"hash":"`+hash)
	l.waitFile("/srv/app/conf", "2\n")
	for _, command := range []string{"id", "/do/nothing app", "/list/servic", "/bin/sh"} {
		if out, err := client(command); err == nil || strings.Contains(out, "uid=") {
			t.Errorf("%s: %s", command, out)
		}
	}
}
