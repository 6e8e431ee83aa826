package ctl

import (
	"bytes"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/knownhosts"
)

// program runs one of OpenSSH's.
func program(t testing.TB, name string, args ...string) (string, error) {
	t.Helper()
	if _, err := exec.LookPath(name); err != nil {
		t.Skip("needs ", name)
	}
	out, err := exec.CommandContext(t.Context(), name, args...).CombinedOutput()
	return string(out), err
}

func mustRun(t testing.TB, name string, args ...string) string {
	t.Helper()
	out, err := program(t, name, args...)
	if err != nil {
		t.Fatalf("%s %q: %v\n%s", name, args, err, out)
	}
	return out
}

// makeKey has ssh-keygen make file and file.pub.
func makeKey(t testing.TB, file string, args ...string) ssh.PublicKey {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
		t.Fatal(err)
	}
	mustRun(t, "ssh-keygen", append([]string{"-q", "-N", "", "-C", "test", "-f", file}, args...)...)
	return publicKey(t, file+".pub")
}

func publicKey(t testing.TB, file string) ssh.PublicKey {
	t.Helper()
	key, _, _, _, err := ssh.ParseAuthorizedKey([]byte(readFile(t, file)))
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// startAgent starts a real ssh-agent that holds the keys in files.
func startAgent(t testing.TB, files ...string) {
	t.Helper()
	dir, err := os.MkdirTemp("", "a") // a socket's path must be short
	if err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(dir, "s")
	if _, err := exec.LookPath("ssh-agent"); err != nil {
		t.Skip("needs ssh-agent")
	}
	cmd := exec.Command("ssh-agent", "-D", "-a", socket)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait(); os.RemoveAll(dir) })
	if _, err := out.Read(make([]byte, 1)); err != nil { // it speaks when the socket is there
		t.Fatal(err)
	}
	t.Setenv("SSH_AUTH_SOCK", socket)
	for _, f := range files {
		mustRun(t, "ssh-add", "-q", f)
	}
}

func TestKeys(t *testing.T) {
	const secret = "correct horse"
	for _, tt := range []struct {
		name  string
		setup func(t *testing.T, dir string) (args []string, allowed ssh.PublicKey) // dir is ~/.ssh
		want  string                                                                // what stderr has, DIR for dir; empty: it works
	}{
		{"default ed25519", func(t *testing.T, dir string) ([]string, ssh.PublicKey) {
			return nil, makeKey(t, dir+"/id_ed25519", "-t", "ed25519")
		}, ""},
		{"default ecdsa", func(t *testing.T, dir string) ([]string, ssh.PublicKey) {
			makeKey(t, dir+"/id_ed25519", "-t", "ed25519")
			return nil, makeKey(t, dir+"/id_ecdsa", "-t", "ecdsa")
		}, ""},
		{"default rsa", func(t *testing.T, dir string) ([]string, ssh.PublicKey) {
			return nil, makeKey(t, dir+"/id_rsa", "-t", "rsa", "-b", "2048")
		}, ""},
		{"none at all", func(t *testing.T, dir string) ([]string, ssh.PublicKey) {
			return nil, newKey(t).PublicKey()
		}, "gitopper ctl: no key to log in with: there is no ssh-agent (SSH_AUTH_SOCK is not set), no DIR/id_ed25519, no DIR/id_ecdsa, no DIR/id_rsa: " +
			"name one with -i, or make one with ssh-keygen\n"},
		{"-i", func(t *testing.T, dir string) ([]string, ssh.PublicKey) {
			return []string{"-i", dir + "/mine"}, makeKey(t, dir+"/mine", "-t", "ed25519")
		}, ""},
		{"-i twice", func(t *testing.T, dir string) ([]string, ssh.PublicKey) {
			makeKey(t, dir+"/other", "-t", "ed25519")
			return []string{"-i", dir + "/other", "-i", dir + "/mine"}, makeKey(t, dir+"/mine", "-t", "ed25519", "-m", "PEM")
		}, ""},
		{"-i and nothing else", func(t *testing.T, dir string) ([]string, ssh.PublicKey) {
			makeKey(t, dir+"/mine", "-t", "ed25519")
			return []string{"-i", dir + "/mine"}, makeKey(t, dir+"/id_ed25519", "-t", "ed25519")
		}, ": no key was accepted (tried ed25519 SHA256:"},
		{"-i too often", func(t *testing.T, dir string) (args []string, _ ssh.PublicKey) {
			for i := range 8 { // more than the server lets us try
				file := fmt.Sprint(dir, "/mine", i)
				makeKey(t, file, "-t", "ed25519")
				args = append(args, "-i", file)
			}
			return args, newKey(t).PublicKey()
		}, ", 3 more): add one to the keys in that host's config, or name another with -i\n"},
		{"the eighth", func(t *testing.T, dir string) (args []string, last ssh.PublicKey) {
			for i := range 8 {
				file := fmt.Sprint(dir, "/mine", i)
				last = makeKey(t, file, "-t", "ed25519")
				args = append(args, "-i", file)
			}
			return args, last
		}, ""},
		{"the eighth of the agent's", func(t *testing.T, dir string) (_ []string, last ssh.PublicKey) {
			var files []string
			for i := range 8 {
				files = append(files, fmt.Sprint(dir, "/mine", i))
				last = makeKey(t, files[i], "-t", "ed25519")
			}
			startAgent(t, files...)
			return nil, last
		}, ""},
		{"-i missing", func(t *testing.T, dir string) ([]string, ssh.PublicKey) {
			return []string{"-i", dir + "/mine"}, newKey(t).PublicKey()
		}, "gitopper ctl: open DIR/mine: no such file or directory\n"},
		{"-i junk", func(t *testing.T, dir string) ([]string, ssh.PublicKey) {
			writeFile(t, dir+"/mine", "junk\n")
			return []string{"-i", dir + "/mine"}, newKey(t).PublicKey()
		}, "gitopper ctl: DIR/mine: neither a private nor a public key: ssh: no key found\n"},
		{"encrypted, no agent", func(t *testing.T, dir string) ([]string, ssh.PublicKey) {
			return []string{"-i", dir + "/mine"}, makeKey(t, dir+"/mine", "-t", "ed25519", "-N", secret)
		}, "gitopper ctl: DIR/mine is encrypted, and there is no ssh-agent (SSH_AUTH_SOCK is not set): start one and ssh-add DIR/mine\n"},
		{"encrypted, in the agent", func(t *testing.T, dir string) ([]string, ssh.PublicKey) {
			key := makeKey(t, dir+"/mine", "-t", "ed25519")
			startAgent(t, dir+"/mine")
			mustRun(t, "ssh-keygen", "-q", "-p", "-N", secret, "-f", dir+"/mine")
			os.Remove(dir + "/mine.pub")
			return []string{"-i", dir + "/mine"}, key
		}, ""},
		{"encrypted PEM, in the agent", func(t *testing.T, dir string) ([]string, ssh.PublicKey) {
			key := makeKey(t, dir+"/mine", "-t", "rsa", "-b", "2048", "-m", "PEM")
			startAgent(t, dir+"/mine")
			mustRun(t, "ssh-keygen", "-q", "-p", "-m", "PEM", "-N", secret, "-f", dir+"/mine")
			return []string{"-i", dir + "/mine"}, key
		}, ""},
		{"encrypted, not in the agent", func(t *testing.T, dir string) ([]string, ssh.PublicKey) {
			makeKey(t, dir+"/other", "-t", "ed25519")
			startAgent(t, dir+"/other")
			return []string{"-i", dir + "/mine"}, makeKey(t, dir+"/mine", "-t", "ed25519", "-N", secret)
		}, "gitopper ctl: DIR/mine is encrypted, and ssh-agent does not hold it: ssh-add DIR/mine\n"},
		{"default encrypted, no agent", func(t *testing.T, dir string) ([]string, ssh.PublicKey) {
			return nil, makeKey(t, dir+"/id_ed25519", "-t", "ed25519", "-N", secret)
		}, "DIR/id_ed25519 is encrypted, and there is no ssh-agent"},
		{"default encrypted, another accepted", func(t *testing.T, dir string) ([]string, ssh.PublicKey) {
			makeKey(t, dir+"/id_ed25519", "-t", "ed25519", "-N", secret)
			return nil, makeKey(t, dir+"/id_ecdsa", "-t", "ecdsa")
		}, ""},
		{"default encrypted, another refused", func(t *testing.T, dir string) ([]string, ssh.PublicKey) {
			makeKey(t, dir+"/id_ecdsa", "-t", "ecdsa")
			return nil, makeKey(t, dir+"/id_ed25519", "-t", "ed25519", "-N", secret)
		}, "DIR/id_ed25519 is encrypted, and there is no ssh-agent"},
		{"agent alone", func(t *testing.T, dir string) ([]string, ssh.PublicKey) {
			makeKey(t, dir+"/mine", "-t", "ed25519")
			rsa := makeKey(t, dir+"/other", "-t", "rsa", "-b", "2048")
			startAgent(t, dir+"/mine", dir+"/other")
			return nil, rsa
		}, ""},
		{"agent without the right key", func(t *testing.T, dir string) ([]string, ssh.PublicKey) {
			makeKey(t, dir+"/other", "-t", "ed25519")
			startAgent(t, dir+"/other")
			return nil, makeKey(t, dir+"/id_ed25519", "-t", "ed25519")
		}, ""},
		{"empty agent", func(t *testing.T, dir string) ([]string, ssh.PublicKey) {
			startAgent(t)
			return nil, makeKey(t, dir+"/id_ed25519", "-t", "ed25519")
		}, ""},
		{"empty agent, no file", func(t *testing.T, dir string) ([]string, ssh.PublicKey) {
			startAgent(t)
			return nil, newKey(t).PublicKey()
		}, "gitopper ctl: no key to log in with: ssh-agent holds none, no DIR/id_ed25519, "},
		{"agent is gone", func(t *testing.T, dir string) ([]string, ssh.PublicKey) {
			t.Setenv("SSH_AUTH_SOCK", dir+"/gone")
			return nil, makeKey(t, dir+"/id_ed25519", "-t", "ed25519")
		}, ""},
		{"agent is gone, no file", func(t *testing.T, dir string) ([]string, ssh.PublicKey) {
			t.Setenv("SSH_AUTH_SOCK", dir+"/gone")
			return nil, newKey(t).PublicKey()
		}, "gitopper ctl: no key to log in with: ssh-agent does not answer: dial unix DIR/gone: connect: no such file or directory, no DIR/id_ed25519"},
		{"-i public", func(t *testing.T, dir string) ([]string, ssh.PublicKey) {
			key := makeKey(t, dir+"/mine", "-t", "ed25519")
			makeKey(t, dir+"/other", "-t", "ed25519")
			startAgent(t, dir+"/other", dir+"/mine")
			os.Remove(dir + "/mine")
			return []string{"-i", dir + "/mine.pub"}, key
		}, ""},
		{"-i public, no agent", func(t *testing.T, dir string) ([]string, ssh.PublicKey) {
			return []string{"-i", dir + "/mine.pub"}, makeKey(t, dir+"/mine", "-t", "ed25519")
		}, "gitopper ctl: DIR/mine.pub is a public key, and there is no ssh-agent (SSH_AUTH_SOCK is not set): start one and ssh-add DIR/mine\n"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			home := t.TempDir()
			t.Setenv("HOME", home)
			t.Setenv("SSH_AUTH_SOCK", "")
			dir := filepath.Join(home, ".ssh")
			if err := os.Mkdir(dir, 0o700); err != nil {
				t.Fatal(err)
			}
			args, allowed := tt.setup(t, dir)
			s := serve(t, "127.0.0.1", answers(nginx), nil, allowed)
			status, stdout, stderr := call(t, append(args, "list", "service", "@"+s.addr)...)
			got := quiet(strings.ReplaceAll(stderr, dir, "DIR"))
			if tt.want == "" {
				if status != 0 || got != "" || !strings.Contains(stdout, "nginx") {
					t.Errorf("status %d, stderr %q", status, stderr)
				}
				return
			}
			if status != 1 || !strings.Contains(got, tt.want) || strings.Count(got, "\n") != 1 {
				t.Errorf("status %d, stderr %q, want %q", status, got, tt.want)
			}
		})
	}
}

// hostKey has ssh-keygen make a host key of that type.
func hostKey(t testing.TB, dir, kind string) (ssh.Signer, string) {
	t.Helper()
	file := filepath.Join(dir, "host_"+kind)
	if _, err := os.Stat(file); err != nil {
		makeKey(t, file, "-t", kind)
	}
	signer, err := ssh.ParsePrivateKey([]byte(readFile(t, file)))
	if err != nil {
		t.Fatal(err)
	}
	return signer, file
}

// certify has ssh-keygen sign a host key.
func certify(t testing.TB, ca string, key ssh.Signer, file string, args ...string) ssh.Signer {
	t.Helper()
	mustRun(t, "ssh-keygen", append(append([]string{"-q", "-s", ca, "-h", "-I", "test"}, args...), file+".pub")...)
	signer, err := ssh.NewCertSigner(publicKey(t, file+"-cert.pub").(*ssh.Certificate), key)
	if err != nil {
		t.Fatal(err)
	}
	return signer
}

// list lists a host's services and wants the tail of stderr, PORT for its port and FILE for known_hosts.
func (s *server) list(t *testing.T, want string) {
	t.Helper()
	dir, _ := os.UserHomeDir()
	_, port, _ := net.SplitHostPort(s.addr)
	status, _, stderr := call(t, "list", "service", "@"+s.addr)
	got := strings.NewReplacer(port, "PORT", filepath.Join(dir, ".ssh", "known_hosts"), "FILE").Replace(stderr)
	wantStatus := 1
	if want == "" || strings.HasPrefix(want, "new host, key ") {
		wantStatus = 0
	}
	if want != "" {
		want = "gitopper ctl: 127.0.0.1:PORT: " + want + "\n"
	}
	if got != want || status != wantStatus {
		t.Errorf("status %d, stderr\n%q, want\n%q", status, got, want)
	}
}

func TestKnownHosts(t *testing.T) {
	dir := t.TempDir()
	ed, edFile := hostKey(t, dir, "ed25519")
	ec, _ := hostKey(t, dir, "ecdsa")
	rsa, rsaFile := hostKey(t, dir, "rsa")
	other := newKey(t)
	ca, caFile := hostKey(t, filepath.Join(dir, "ca"), "ed25519")
	cert := certify(t, caFile, ed, edFile, "-n", "127.0.0.1")
	rsaCert := certify(t, caFile, rsa, rsaFile, "-n", "127.0.0.1")
	elsewhere := certify(t, caFile, ed, edFile, "-n", "web1")
	expired := certify(t, caFile, ed, edFile, "-n", "127.0.0.1", "-V", "20200101:20200102")

	line := func(key ssh.Signer) string {
		return strings.TrimSpace(string(ssh.MarshalAuthorizedKey(key.PublicKey())))
	}
	is := func(key ssh.Signer) string { return fingerprint(key.PublicKey()) }
	changed := func(now, n, was string) string {
		return "host key has changed: it is " + now + ", but FILE:" + n + " has " + was + ": someone may be in between; " +
			"if the change is known, run ssh-keygen -R '[127.0.0.1]:PORT' -f 'FILE'"
	}
	const here = "[127.0.0.1]:PORT "
	for _, tt := range []struct {
		name  string
		keys  []ssh.Signer // of the host
		known string
		want  string
	}{
		{"new", []ssh.Signer{ed}, "", "new host, key " + is(ed) + " remembered in FILE"},
		{"new, other hosts known", []ssh.Signer{ed}, "web1 " + line(other) + "\n[127.0.0.1]:1 " + line(other), "new host, key " + is(ed) + " remembered in FILE"},
		{"new, ed25519 is preferred", []ssh.Signer{rsa, ec, ed}, "", "new host, key " + is(ed) + " remembered in FILE"},
		{"known", []ssh.Signer{ed}, "# comment\n\n" + here + line(ed), ""},
		{"known among names", []ssh.Signer{ed}, "web1,[127.0.0.1]:PORT,web2 " + line(ed) + " with a comment\r\n", ""},
		{"known by pattern", []ssh.Signer{ed}, "[127.0.?.*]:PORT " + line(ed), ""},
		{"excluded from pattern", []ssh.Signer{ed}, "[127.0.0.*]:PORT,![127.0.0.1]:PORT " + line(other), "new host, key " + is(ed) + " remembered in FILE"},
		{"changed", []ssh.Signer{ed}, "# comment\n" + here + line(other), changed(is(ed), "2", is(other))},
		{"one of two", []ssh.Signer{ed}, here + line(other) + "\n" + here + line(ed), ""},
		{"changed, several types known", []ssh.Signer{ed}, here + line(rsa) + "\n" + here + line(other), changed(is(ed), "2", is(other))},
		{"of many only ecdsa known", []ssh.Signer{ed, ec, rsa}, here + line(ec), ""},
		{"of many only rsa known", []ssh.Signer{ed, ec, rsa}, here + line(rsa), ""},
		{"of many only ed25519 known", []ssh.Signer{rsa, ec, ed}, here + line(ed), ""},
		{"type has changed", []ssh.Signer{ec}, here + line(ed), changed(is(ec), "1", is(ed))},
		{"known by its sshd", []ssh.Signer{ed}, "127.0.0.1 " + line(ed), ""},
		{"of many only rsa known by its sshd", []ssh.Signer{ed, rsa}, "127.0.0.1 " + line(rsa), ""},
		{"sshd has another", []ssh.Signer{ed}, "127.0.0.1 " + line(other), "new host, key " + is(ed) + " remembered in FILE"},
		{"changed, but sshd has it", []ssh.Signer{ed}, "127.0.0.1 " + line(ed) + "\n" + here + line(other), changed(is(ed), "2", is(other))},
		{"revoked", []ssh.Signer{ed}, "@revoked * " + line(ed) + "\n" + here + line(ed),
			"host key " + is(ed) + " is revoked in FILE:1: ask the host's administrator, and don't go on"},

		{"certificate", []ssh.Signer{cert, ed}, "@cert-authority [127.0.0.1]:PORT " + line(ca), ""},
		{"certificate of one that signs many", []ssh.Signer{ed, ec, rsaCert}, "@cert-authority * " + line(ca), ""},
		{"certificate, and another type known", []ssh.Signer{cert, rsa}, "@cert-authority [127.0.0.1]:PORT " + line(ca) + "\n" + here + line(rsa), ""},
		{"certificate, no authority", []ssh.Signer{cert, ed}, "", "new host, key " + is(ed) + " remembered in FILE"},
		{"certificate, plain key known", []ssh.Signer{cert, ed}, here + line(ed), ""},
		{"certificate of another authority, plain key known", []ssh.Signer{cert}, "@cert-authority [127.0.0.1]:PORT " + line(other) + "\n" + here + line(ed), ""},
		{"certificate of another authority", []ssh.Signer{cert}, "@cert-authority [127.0.0.1]:PORT " + line(other),
			"host certificate is not valid: no authorities for hostname: 127.0.0.1:PORT: have it signed anew, or mend the @cert-authority line"},
		{"certificate for another host", []ssh.Signer{elsewhere}, "@cert-authority * " + line(ca),
			`host certificate is not valid: principal "127.0.0.1" not in the set of valid principals for given certificate: ["web1"]: have it signed anew, or mend the @cert-authority line`},
		{"certificate has expired", []ssh.Signer{expired}, "@cert-authority [127.0.0.1]:PORT " + line(ca),
			"host certificate is not valid: cert has expired: have it signed anew, or mend the @cert-authority line"},
		{"authority is revoked", []ssh.Signer{cert}, "@cert-authority * " + line(ca) + "\n@revoked * " + line(ca),
			"host certificate is not valid: certificate serial 0 revoked: have it signed anew, or mend the @cert-authority line"},
		{"authority, but a plain key", []ssh.Signer{ed}, "\n@cert-authority [127.0.0.1]:PORT " + line(ca),
			"host key " + is(ed) + " has no certificate of the authority in FILE:2: have it signed, or add the key to FILE"},
		{"authority, and a known plain key", []ssh.Signer{ed}, "@cert-authority [127.0.0.1]:PORT " + line(ca) + "\n" + here + line(ed), ""},
		{"authority, and a changed plain key", []ssh.Signer{ed}, "@cert-authority [127.0.0.1]:PORT " + line(ca) + "\n" + here + line(other), changed(is(ed), "2", is(other))},
		{"authority for sshd, and a plain key", []ssh.Signer{ed}, "@cert-authority * " + line(ca), "new host, key " + is(ed) + " remembered in FILE"},
	} {
		for _, hashed := range []bool{false, true} {
			name := tt.name
			if hashed {
				name += ", hashed"
				// ssh-keygen hashes neither patterns nor marked lines, and makes several lines of one with several names.
				if !strings.Contains(tt.known, here) && !strings.Contains(tt.known, "127.0.0.1 ") {
					continue
				}
			}
			t.Run(name, func(t *testing.T) {
				home, _ := home(t)
				s := serve(t, "127.0.0.1", answers(nginx), tt.keys)
				_, port, _ := net.SplitHostPort(s.addr)
				file := filepath.Join(home, ".ssh", "known_hosts")
				text := strings.ReplaceAll(tt.known, "PORT", port)
				writeFile(t, file, text)
				if hashed {
					mustRun(t, "ssh-keygen", "-H", "-f", file)
					os.Remove(file + ".old")
				}
				before := readFile(t, file)
				s.list(t, tt.want)
				if strings.HasPrefix(tt.want, "new host") {
					// OpenSSH finds the line that was added, and what was there is still there.
					if found := mustRun(t, "ssh-keygen", "-F", "[127.0.0.1]:"+port, "-f", file); !strings.Contains(found, "[127.0.0.1]:"+port) {
						t.Error(found)
					}
					if after := readFile(t, file); !strings.HasPrefix(after, before) {
						t.Errorf("was %q, is %q", before, after)
					}
					s.list(t, "")
				} else if after := readFile(t, file); after != before {
					t.Errorf("was %q, is %q", before, after)
				}
				if _, command, ok := strings.Cut(tt.want, "run ssh-keygen "); ok {
					// What we advise helps.
					command = strings.NewReplacer("'", "", "PORT", port, "FILE", file).Replace(command)
					mustRun(t, "ssh-keygen", strings.Fields(command)...)
					if status, _, stderr := call(t, "list", "service", "@"+s.addr); status != 0 && !strings.Contains(tt.known, "@cert-authority [") {
						t.Error(stderr)
					}
				}
			})
		}
	}
}

func TestKnownHostsFile(t *testing.T) {
	home, _ := home(t)
	key := newKey(t)
	s := serve(t, "127.0.0.1", answers(nginx), []ssh.Signer{key})

	// Files and directories that are made are private.
	file := filepath.Join(home, "new", "dir", "hosts")
	if status, _, stderr := call(t, "-k", file, "list", "service", "@"+s.addr); status != 0 ||
		stderr != "gitopper ctl: "+s.addr+": new host, key "+fingerprint(key.PublicKey())+" remembered in "+file+"\n" {
		t.Errorf("status %d, stderr %q", status, stderr)
	}
	for name, want := range map[string]os.FileMode{file: 0o600, filepath.Dir(file): os.ModeDir | 0o700} {
		if info, err := os.Stat(name); err != nil || info.Mode() != want {
			t.Errorf("%s: %v, %v", name, info.Mode(), err)
		}
	}
	// A mistake in it is named.
	writeFile(t, file, "\nweb1 ssh-ed25519 junk\n")
	status, _, stderr := call(t, "-k", file, "list", "service", "@"+s.addr)
	if want := "gitopper ctl: known hosts: " + file + ":2: ssh: short read: mend or remove that line, or name another file with -k\n"; status != 1 || stderr != want {
		t.Errorf("status %d, stderr %q", status, stderr)
	}
	if status, _, stderr := call(t, "-k", home, "list", "service", "@"+s.addr); status != 1 || stderr != "gitopper ctl: read "+home+": is a directory\n" {
		t.Errorf("status %d, stderr %q", status, stderr)
	}
	// A host that can't be remembered would be new, and believed, every time.
	status, _, stderr = call(t, "-k", "/proc/none", "list", "service", "@"+s.addr)
	if status != 1 || !strings.HasSuffix(stderr, "but it can't be remembered: open /proc/none: no such file or directory: name another file with -k\n") {
		t.Errorf("status %d, stderr %q", status, stderr)
	}
	t.Setenv("HOME", "")
	if status, _, stderr := call(t, "-k", file+"2", "list", "service", "@"+s.addr); status != 1 || !strings.Contains(stderr, "no key to log in with: there is no ssh-agent (SSH_AUTH_SOCK is not set), $HOME is not defined: ") {
		t.Errorf("status %d, stderr %q", status, stderr)
	}
	if status, _, stderr := call(t, "list", "service", "@"+s.addr); status != 1 || !strings.Contains(stderr, "name a file with -k") {
		t.Errorf("status %d, stderr %q", status, stderr)
	}
}

// Several processes add hosts to a file that does not end in a newline.
func TestRememberSideBySide(t *testing.T) {
	file := filepath.Join(t.TempDir(), "hosts")
	key := newKey(t)
	first := strings.TrimSpace(knownhosts.Line([]string{"web0:2222"}, key.PublicKey()))
	writeFile(t, file, first)
	var wg sync.WaitGroup
	for p := range 8 {
		k, err := openKnownHosts(file)
		if err != nil {
			t.Fatal(err)
		}
		for i := range 20 {
			wg.Go(func() {
				if _, err := k.verify(fmt.Sprintf("web%d-%d:2222", p, i), key.PublicKey()); err != nil {
					t.Error(err)
				}
			})
		}
	}
	wg.Wait()
	k, err := openKnownHosts(file)
	if err != nil {
		t.Fatal(err)
	}
	for p := range 8 {
		for i := range 20 {
			if notice, err := k.verify(fmt.Sprintf("web%d-%d:2222", p, i), key.PublicKey()); err != nil || notice != "" {
				t.Fatal(notice, err)
			}
		}
	}
}

// What ssh remembers is known to us, and the other way round.
func TestWithOpenSSH(t *testing.T) {
	home, _ := home(t)
	ed, _ := hostKey(t, home, "ed25519")
	rsa, _ := hostKey(t, home, "rsa")
	s := serve(t, "127.0.0.1", answers(nginx), []ssh.Signer{rsa, ed})
	_, port, _ := net.SplitHostPort(s.addr)
	file := filepath.Join(home, ".ssh", "known_hosts")
	openSSH := func(args ...string) {
		t.Helper()
		out := mustRun(t, "ssh", append([]string{"-F", "none", "-o", "BatchMode=yes", "-o", "LogLevel=ERROR", "-o", "UserKnownHostsFile=" + file,
			"-o", "GlobalKnownHostsFile=none", "-i", home + "/.ssh/id_ed25519", "-p", port}, append(args, "127.0.0.1", "/list/service")...)...)
		if out != nginx {
			t.Errorf("ssh: %q", out)
		}
	}
	openSSH("-o", "StrictHostKeyChecking=accept-new", "-o", "HashKnownHosts=yes", "-o", "HostKeyAlgorithms=rsa-sha2-512")
	if !strings.HasPrefix(readFile(t, file), "|1|") {
		t.Errorf("not hashed: %s", readFile(t, file))
	}
	s.list(t, "")
	os.Remove(file)
	s.list(t, "new host, key "+fingerprint(ed.PublicKey())+" remembered in FILE")
	openSSH("-o", "StrictHostKeyChecking=yes")
}

// Whatever is taken for a host can be remembered and is then known, and only with its key.
func FuzzParseHost(f *testing.F) {
	for _, s := range []string{"@web1", "@web1:22", "@[::1]:2222", "@::1", "@fe80::1%eth0", "@10.0.0.1", "@A.b-c_d", "@|1|x|y", "@a,b", "@!a", "@@a", "@#", "@[a]:1"} {
		f.Add(s, "2222")
	}
	key, other := newKey(f).PublicKey(), newKey(f).PublicKey()
	f.Fuzz(func(t *testing.T, arg, port string) {
		h, err := parseHost(arg, port)
		if err != nil {
			return
		}
		file := filepath.Join(t.TempDir(), "hosts")
		for i := range 2 {
			k, err := openKnownHosts(file)
			if err != nil {
				t.Fatal(err)
			}
			if notice, err := k.verify(h.addr, key); err != nil || (notice == "") != (i == 1) {
				t.Fatalf("%q: %q, %v", h.addr, notice, err)
			}
			if i == 1 {
				if _, err := k.verify(h.addr, other); err == nil {
					t.Fatalf("%q: another key was accepted", h.addr)
				}
			}
		}
	})
}

// A known_hosts file that can be read can still be read after a host was added.
func FuzzKnownHosts(f *testing.F) {
	key := newKey(f).PublicKey()
	line := knownhosts.Line([]string{"web1:2222"}, key)
	for _, s := range []string{"", "\n", "#", line, line + "\n", "@revoked " + line, "@cert-authority " + line, "@cert-authority *,!web1 " + line[strings.Index(line, " ")+1:],
		strings.Replace(line, "[web1]:2222", knownhosts.HashHostname("[web1]:2222"), 1)} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		file := filepath.Join(t.TempDir(), "hosts")
		writeFile(t, file, string(text))
		k, err := openKnownHosts(file)
		if err != nil {
			if !strings.Contains(err.Error(), file) {
				t.Fatalf("%v does not name the file", err)
			}
			return
		}
		if algos := k.algorithms("web1:2222"); !slices.Contains(algos, ssh.KeyAlgoED25519) {
			t.Fatal(algos)
		}
		if _, err := k.verify("web1:2222", key); err != nil {
			return
		}
		if k, err = openKnownHosts(file); err != nil {
			t.Fatal(err)
		}
		if notice, err := k.verify("web1:2222", key); err != nil || notice != "" {
			t.Fatal(notice, err)
		}
		if !bytes.HasPrefix([]byte(readFile(t, file)), text) {
			t.Fatal("what was there is gone")
		}
	})
}
