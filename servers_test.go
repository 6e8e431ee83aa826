//go:build linux

package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"
)

// ownCA writes the certificate of a new authority to a file, and returns a server's certificate by it.
func ownCA(t *testing.T, file string) tls.Certificate {
	t.Helper()
	caKey, err1 := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	key, err2 := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	ca := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: file},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	server := &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "127.0.0.1"},
		NotBefore: ca.NotBefore, NotAfter: ca.NotAfter,
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	if err := errors.Join(err1, err2); err != nil {
		t.Fatal(err)
	}
	caDER, err1 := x509.CreateCertificate(rand.Reader, ca, ca, &caKey.PublicKey, caKey)
	der, err2 := x509.CreateCertificate(rand.Reader, server, ca, &key.PublicKey, caKey)
	text := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: caDER})
	if err := errors.Join(err1, err2, os.WriteFile(file, text, 0o644)); err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// TestGitOwnCA: https with an authority that the system does not know, however the environment names it.
func TestGitOwnCA(t *testing.T) {
	w := newGitWorld(t)
	certs, other := w.dir+"/certs", w.dir+"/other.pem"
	if err := os.Mkdir(certs, 0o755); err != nil {
		t.Fatal(err)
	}
	ca := certs + "/ca.pem"
	cert := ownCA(t, ca)
	ownCA(t, other)
	if out, err := exec.Command("openssl", "rehash", certs).CombinedOutput(); err != nil {
		t.Fatalf("openssl rehash: %v: %s", err, out)
	}
	s := httptest.NewUnstartedServer(w.backend(func(http.ResponseWriter, *http.Request) bool { return true }))
	s.TLS = &tls.Config{Certificates: []tls.Certificate{cert}}
	s.StartTLS()
	defer s.Close()

	const unknown, unread = "name the CA's file in GIT_SSL_CAINFO", "GIT_SSL_CAINFO must name a file"
	for _, tc := range []struct{ name, env, wrong string }{
		{"git's own variable", "GIT_SSL_CAINFO=" + ca, ""},
		{"git's own variable, a directory", "GIT_SSL_CAPATH=" + certs, ""},
		{"everybody's variable", "SSL_CERT_FILE=" + ca, ""},
		{"everybody's variable, a directory", "SSL_CERT_DIR=" + certs, ""},
		{"git's own goes first", "SSL_CERT_FILE=" + other + " GIT_SSL_CAINFO=" + ca, ""},
		{"none", "", unknown},
		{"another", "GIT_SSL_CAINFO=" + other, unknown},
		{"missing", "GIT_SSL_CAINFO=" + w.dir + "/none.pem", unread},
	} {
		t.Run(tc.name, func(t *testing.T) {
			for _, k := range []string{"GIT_SSL_CAINFO", "GIT_SSL_CAPATH", "SSL_CERT_FILE", "SSL_CERT_DIR"} {
				t.Setenv(k, "")
				os.Unsetenv(k)
			}
			for _, setting := range strings.Fields(tc.env) {
				k, v, _ := strings.Cut(setting, "=")
				t.Setenv(k, v)
			}
			w.upstream(s.URL+"/src/.git", "nobody")
			if err := w.u.lookNow(t.Context(), false); !errorSays(err, tc.wrong) {
				t.Errorf("%v, want %q", err, tc.wrong)
			} else if err == nil && w.read("etc/app.conf") != "one\n" {
				t.Error("other contents")
			}
		})
	}
}

// TestGitHints: what other versions than this machine's say of the same.
func TestGitHints(t *testing.T) {
	for said, want := range map[string]string{
		"server certificate verification failed. CAfile: none CRLfile: none":                 "GIT_SSL_CAINFO",
		"server verification failed: certificate signer not trusted. (CAfile: /x)":           "GIT_SSL_CAINFO",
		"SSL certificate problem: unable to get local issuer certificate":                    "GIT_SSL_CAINFO",
		"Problem with the SSL CA cert (path? access rights?)":                                "can read",
		"error setting certificate file: /x":                                                 "can read",
		"Host key for h has changed and you have requested strict checking.":                 "/home/x/.ssh/known_hosts",
		"ED25519 host key for h has changed and you have requested strict checking.":         "if that is meant",
		"Host key verification failed.; fatal: Could not read from remote repository.":       "ssh-keyscan",
		"Received disconnect from h: Too many authentication failures":                       "/home/x/.ssh:",
		"ERROR: Repository not found.; fatal: Could not read from remote repository.":        "no such repository",
		"could not read Password for 'https://me@h': terminal prompts disabled":              "/home/x/.netrc",
		"unable to access 'https://h/': Could not resolve host: h":                           "",
		"detected dubious ownership in repository at '/x'; To add an exception for this dir": "give the repository",
	} {
		if got := hintFor(said, "/home/x"); !strings.Contains(got, want) || (want == "") != (got == "") {
			t.Errorf("%s: %q, want %q", said, got, want)
		}
	}
}

// advised fails unless an error has git's words and our hint, and nothing of what git says to configure.
func advised(t *testing.T, err error, words, hint string) {
	t.Helper()
	switch {
	case err == nil:
		t.Error("no error")
	case !strings.Contains(err.Error(), words) || !strings.Contains(err.Error(), hint):
		t.Errorf("%v\nwant %q and %q", err, words, hint)
	case strings.Contains(err.Error(), "git config") || strings.Contains(err.Error(), "@@@"):
		t.Errorf("%v\nhas advice that does not help here", err)
	}
}

// TestGitWrongLogin: what a server that wants a login gets from .netrc.
func TestGitWrongLogin(t *testing.T) {
	w := newGitWorld(t)
	status := 401
	s := httptest.NewServer(w.backend(func(rw http.ResponseWriter, r *http.Request) bool {
		user, password, _ := r.BasicAuth()
		if user == "me" && password == "right" {
			return true
		}
		rw.Header().Set("WWW-Authenticate", "Basic realm=x")
		rw.WriteHeader(status)
		return false
	}))
	defer s.Close()
	home := t.TempDir()
	t.Setenv("HOME", home)
	look := func(password string) error {
		netrc := "machine 127.0.0.1 login me password " + password + "\n"
		if err := os.WriteFile(home+"/.netrc", []byte(netrc), 0o600); err != nil {
			t.Fatal(err)
		}
		w.upstream(s.URL+"/src/.git", "")
		return w.u.lookNow(t.Context(), false)
	}
	if err := look("right"); err != nil {
		t.Error(err)
	}
	advised(t, look("wrong"), "could not read Username", "the server wants another login: "+
		"look at its line in "+home+"/.netrc")
	w.upstream(strings.Replace(s.URL, "//", "//me:wrong@", 1)+"/src/.git", "")
	advised(t, w.u.lookNow(t.Context(), false), "could not read Username", "the server wants another login")
	status = 403
	advised(t, look("wrong"), "error: 403", "the server wants another login")
	status = 404
	advised(t, look("wrong"), "not found", "there is no such repository, or not for this login")
}

// TestGitOthersRepository: a repository of another owner is told in one line.
func TestGitOthersRepository(t *testing.T) {
	w := newGitWorld(t)
	if out, err := exec.Command("chown", "-R", "nobody", w.work).CombinedOutput(); err != nil {
		t.Fatal(string(out))
	}
	err := w.u.lookNow(t.Context(), false)
	advised(t, err, "dubious ownership", "give the repository to the user that git runs as")
}

// sshServer serves the world's repository to whoever has the right key, with git's own program, and returns
// its URL. From now on ssh, the real one, has its files in the world's directory.
func (w *gitWorld) ssh(authorized ssh.PublicKey, host ssh.Signer) (url string) {
	w.t.Helper()
	config := &ssh.ServerConfig{
		PublicKeyCallback: func(_ ssh.ConnMetadata, k ssh.PublicKey) (*ssh.Permissions, error) {
			if string(k.Marshal()) == string(authorized.Marshal()) {
				return nil, nil
			}
			return nil, errors.New("another key")
		},
	}
	config.AddHostKey(host)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go w.sshSession(c, config)
		}
	}()
	return "ssh://git@" + l.Addr().String() + w.work
}

// sshSession runs the one command that a client asks for.
func (w *gitWorld) sshSession(c net.Conn, config *ssh.ServerConfig) {
	defer c.Close()
	_, channels, requests, err := ssh.NewServerConn(c, config)
	if err != nil {
		return
	}
	go ssh.DiscardRequests(requests)
	for offer := range channels {
		channel, requests, err := offer.Accept()
		if err != nil {
			return
		}
		for r := range requests {
			isExec := r.Type == "exec"
			_ = r.Reply(isExec, nil)
			if !isExec {
				continue
			}
			cmd := exec.Command("sh", "-c", string(r.Payload[4:]))
			cmd.Stdin, cmd.Stdout = channel, channel
			status := struct{ N uint32 }{0}
			if cmd.Run() != nil {
				status.N = 1
			}
			_, _ = channel.SendRequest("exit-status", false, ssh.Marshal(status))
			_ = channel.Close()
		}
	}
}

// TestGitSSH: what ssh says of keys that don't fit, by a real client.
func TestGitSSH(t *testing.T) {
	w := newGitWorld(t)
	keys := map[string]ssh.Signer{}
	for _, name := range []string{"right", "wrong", "host", "other"} {
		if out, err := exec.Command("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", w.dir+"/"+name).
			CombinedOutput(); err != nil {
			t.Fatal(string(out))
		}
		text, err := os.ReadFile(w.dir + "/" + name)
		if err == nil {
			keys[name], err = ssh.ParsePrivateKey(text)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	url := w.ssh(keys["right"].PublicKey(), keys["host"])
	at := strings.TrimSuffix(strings.TrimPrefix(url, "ssh://git@"), w.work)
	_, port, _ := strings.Cut(at, ":")
	home := os.Getenv("HOME")

	for _, tc := range []struct{ name, key, known, words, hint string }{
		{"all is right", "right", "host", "", ""},
		{"an unknown key", "wrong", "host", "Permission denied (publickey)",
			"the server accepts none of the keys in " + home + "/.ssh"},
		{"a host that is not known yet", "right", "", "Host key verification failed",
			"the server's key is not in " + home + "/.ssh/known_hosts"},
		{"a host key that changed", "right", "other", "has changed",
			"if that is meant, put the server's new key into " + home + "/.ssh/known_hosts"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			known := ""
			if k := keys[tc.known]; k != nil {
				known = "[127.0.0.1]:" + port + " " + string(ssh.MarshalAuthorizedKey(k.PublicKey()))
			}
			script := "#!/bin/sh\nexec /usr/bin/ssh -F none -o IdentitiesOnly=yes -o IdentityAgent=none -i " +
				w.dir + "/" + tc.key + " -o UserKnownHostsFile=" + w.dir + "/known \"$@\"\n"
			bin := t.TempDir()
			err := errors.Join(os.WriteFile(w.dir+"/known", []byte(known), 0o600),
				os.WriteFile(bin+"/ssh", []byte(script), 0o755))
			if err != nil {
				t.Fatal(err)
			}
			t.Setenv("PATH", bin+":"+os.Getenv("PATH"))
			w.upstream(url, "")
			err = w.u.lookNow(t.Context(), false)
			if tc.hint != "" {
				advised(t, err, tc.words, tc.hint)
			} else if err != nil || w.read("etc/app.conf") != "one\n" {
				t.Error(err)
			}
		})
	}
}
