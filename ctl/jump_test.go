//go:build linux

package ctl

import (
	"bytes"
	"fmt"
	"net"
	"os"
	"os/exec"
	osuser "os/user"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// startSSHD starts a real sshd that lets the key in as user, and returns its port.
func startSSHD(t *testing.T, dir, key string, options ...string) (port, user string) {
	t.Helper()
	sshd, err := exec.LookPath("sshd")
	if err != nil {
		t.Skip("needs sshd")
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	_, port, _ = net.SplitHostPort(l.Addr().String())
	l.Close()

	makeKey(t, dir+"/host", "-t", "ed25519")
	config := []string{"Port " + port, "ListenAddress 127.0.0.1", "HostKey " + dir + "/host", "AuthorizedKeysFile " + key + ".pub",
		"StrictModes no", "PidFile none", "PasswordAuthentication no", "KbdInteractiveAuthentication no", "UsePAM no", "Banner " + dir + "/banner"}
	if session := filepath.Join(filepath.Dir(sshd), "../lib/openssh/sshd-session"); exists(session) {
		config = append(config, "SshdSessionPath "+session, "SshdAuthPath "+filepath.Join(filepath.Dir(session), "sshd-auth"))
	}
	writeFile(t, dir+"/banner", "Authorized use only!\nYou have been warned.\n")
	writeFile(t, dir+"/config", strings.Join(append(config, options...), "\n")+"\n")

	me, err := osuser.Current()
	if err != nil {
		t.Fatal(err)
	}
	args := []string{sshd, "-D", "-e", "-f", dir + "/config"}
	if os.Geteuid() == 0 {
		// Root's wants a user and a directory that come with its package. It gets them where nobody else sees them.
		writeFile(t, dir+"/passwd", readFile(t, "/etc/passwd")+"sshd:x:999:65534::/run/sshd:/usr/sbin/nologin\n")
		args = append([]string{"unshare", "--mount", "sh", "-ec", "mount --bind " + dir + "/passwd /etc/passwd; chmod 644 /etc/passwd; " +
			"mount -t tmpfs -o mode=755 none /run; mkdir /run/sshd; exec \"$@\"", "sh"}, args...)
	}
	cmd := exec.Command(args[0], args[1:]...)
	var log bytes.Buffer
	cmd.Stderr = &log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
		if t.Failed() {
			t.Log(log.String())
		}
	})
	for deadline := time.Now().Add(20 * time.Second); ; {
		conn, err := net.Dial("tcp", "127.0.0.1:"+port)
		if err == nil {
			conn.Close()
			return port, me.Username
		}
		if time.Now().After(deadline) {
			t.Fatalf("sshd does not listen: %v\n%s", err, &log)
		}
	}
}

func exists(file string) bool { _, err := os.Stat(file); return err == nil }

// sshWith puts an ssh in front of the real one that reads the operator's configuration from file.
func sshWith(t *testing.T, text string) {
	t.Helper()
	ssh, err := exec.LookPath("ssh")
	if err != nil {
		t.Skip("needs ssh")
	}
	dir := t.TempDir()
	writeFile(t, dir+"/config", text)
	writeFile(t, dir+"/ssh", "#!/bin/sh\nexec "+ssh+" -F "+dir+"/config \"$@\"\n")
	if err := os.Chmod(dir+"/ssh", 0o700); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
}

func TestBastion(t *testing.T) {
	dir, _ := home(t)
	key := filepath.Join(t.TempDir(), "key")
	makeKey(t, key, "-t", "ed25519")
	port, user := startSSHD(t, t.TempDir(), key)
	sshWith(t, fmt.Sprintf("Host jump\n HostName 127.0.0.1\n Port %s\n User %s\nHost wrong\n HostName 127.0.0.1\n Port %s\n User someone\n"+
		"Host down\n HostName 127.0.0.1\n Port 1\nHost *\n IdentityFile %s\n IdentitiesOnly yes\n BatchMode yes\n UserKnownHostsFile %s/jumps\n StrictHostKeyChecking accept-new\n",
		port, user, port, key, dir))

	a, b := serve(t, "127.0.0.1", answers(nginx), nil), serve(t, "127.0.0.2", answers(two), nil)
	status, stdout, stderr := call(t, "-J", "jump", "list", "service", "@"+a.addr, "@"+b.addr)
	if status != 0 || strings.Count(stdout, "\n") != 4 || strings.Count(stderr, ": new host, key ") != 2 {
		t.Errorf("status %d, stdout %s, stderr %s", status, stdout, stderr)
	}
	// More hosts than an sshd lets in at a time.
	args := []string{"-J", "jump", "list", "service"}
	for range 20 {
		args = append(args, "@"+serve(t, "127.0.0.1", answers(nginx), nil).addr)
	}
	if status, stdout, stderr := call(t, args...); status != 0 || strings.Count(stdout, "\n") != 21 {
		t.Errorf("status %d, stdout %s, stderr %s", status, stdout, stderr)
	}
	// The hosts' keys are still ours to check: they are known under their own names.
	if status, _, stderr := call(t, "list", "service", "@"+a.addr, "-J=jump"); status != 0 || stderr != "" {
		t.Errorf("status %d, stderr %s", status, stderr)
	}
	other := serve(t, "127.0.0.1", answers(nginx), nil)
	_, otherPort, _ := net.SplitHostPort(other.addr)
	known := filepath.Join(dir, ".ssh", "known_hosts")
	writeFile(t, known, "[127.0.0.1]:"+otherPort+strings.TrimPrefix(readFile(t, known), strings.Fields(readFile(t, known))[0]))
	if status, _, stderr := call(t, "-J", "jump", "list", "service", "@"+other.addr); status != 1 || !strings.Contains(stderr, "host key has changed") {
		t.Errorf("status %d, stderr %s", status, stderr)
	}

	for _, tt := range []struct{ bastion, host, want string }{
		{"down", a.addr, "bastion down: ssh: connect to host 127.0.0.1 port 1: Connection refused\n"},
		{"none.invalid", a.addr, "bastion none.invalid: ssh: Could not resolve hostname none.invalid: "},
		{"wrong", a.addr, "bastion wrong: You have been warned.; someone@127.0.0.1: Permission denied (publickey).\n"},
		{"jump", "127.0.0.1:1", "bastion jump: channel 0: open failed: connect failed: Connection refused; stdio forwarding failed\n"},
		{"-oProxyCommand=touch " + dir + "/pwned", a.addr, "bastion -oProxyCommand=touch " + dir + "/pwned: "},
		{"", a.addr, "bastion : "},
	} {
		status, stdout, stderr := call(t, "-J", tt.bastion, "list", "service", "@"+tt.host)
		if status != 1 || stdout != "" || !strings.HasPrefix(stderr, "gitopper ctl: "+tt.host+": "+tt.want) || strings.Count(stderr, "\n") != 1 {
			t.Errorf("%s: status %d, stdout %q, stderr %q", tt.bastion, status, stdout, stderr)
		}
	}
	if exists(dir + "/pwned") {
		t.Error("a bastion's name became an option")
	}
	t.Setenv("PATH", dir)
	if _, _, stderr := call(t, "-J", "jump", "list", "service", "@"+a.addr); !strings.Contains(stderr, "-J needs OpenSSH's ssh") {
		t.Error(stderr)
	}
}

// A bastion that does not answer is given up, and so is the child, which is asked to end first: it may stand at a
// prompt, and then has to put the terminal right.
func TestBastionHangs(t *testing.T) {
	dir := t.TempDir()
	writeFile(t, dir+"/ssh", "#!/bin/sh\necho $$ >"+dir+"/pid\ntrap 'echo >"+dir+"/asked; exit 255' INT\nwhile :; do sleep 0.05; done\n")
	if err := os.Chmod(dir+"/ssh", 0o700); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	known, err := openKnownHosts(dir + "/known_hosts")
	if err != nil {
		t.Fatal(err)
	}
	c := &client{known: known, keys: &keys{}, way: through(t.Context(), "jump")}
	c.limit = 500 * time.Millisecond
	_, err = c.ask(t.Context(), question{host: host{"h", "h:2222"}, path: "/list/service"}, listLimit)
	if err == nil || err.Error() != "no answer for 500ms: is that gitopper, on port 2222?" {
		t.Error(err)
	}
	pid := strings.TrimSpace(readFile(t, dir+"/pid"))
	for deadline := time.Now().Add(10 * time.Second); exists("/proc/" + pid); {
		if time.Now().After(deadline) {
			t.Fatal("the child is still there")
		}
	}
	if !exists(dir + "/asked") {
		t.Error("the child was killed at once")
	}
}

// A real sshd stops asking after six keys as well, and then is asked again.
func TestManyKeys(t *testing.T) {
	home(t)
	dir := t.TempDir()
	var args []string
	for i := range 8 {
		file := fmt.Sprint(dir, "/key", i)
		makeKey(t, file, "-t", "ed25519")
		args = append(args, file)
	}
	port, user := startSSHD(t, t.TempDir(), args[7])
	startAgent(t, args...)
	known, err := openKnownHosts(dir + "/known_hosts")
	if err != nil {
		t.Fatal(err)
	}
	ids, err := findKeys(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	var stderr bytes.Buffer
	c := &client{known: known, keys: ids, user: user, stderr: &lines{w: &stderr}, way: direct((&net.Dialer{}).DialContext)}
	conn, err := c.connect(t.Context(), host{"h", "127.0.0.1:" + port})
	if err != nil {
		t.Fatal(err)
	}
	conn.Close()
	if strings.Count(stderr.String(), "new host") != 1 {
		t.Errorf("stderr %s", &stderr)
	}
}
