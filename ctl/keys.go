package ctl

import (
	"bytes"
	"cmp"
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/agent"
	"golang.org/x/crypto/ssh/knownhosts"
)

// keys are what we log in with.
type keys struct {
	signers []ssh.Signer
	notes   []string // what could not be used, and why
}

func (k *keys) tried() string {
	var s []string
	for _, signer := range k.signers {
		s = append(s, fingerprint(signer.PublicKey()))
	}

	if len(s) > 5 {
		s = append(s[:5], fmt.Sprintf("%d more", len(s)-5))
	}
	return "tried " + strings.Join(append(s, k.notes...), ", ")
}

func (k *keys) add(signer ssh.Signer) {
	same := func(s ssh.Signer) bool { return sameKey(s.PublicKey(), signer.PublicKey()) }
	if !slices.ContainsFunc(k.signers, same) {
		k.signers = append(k.signers, signer)
	}
}

// note keeps why a key can't be used, if err says so.
func (k *keys) note(err error) {
	if err == nil {
		return
	}
	text := err.Error()
	if file, ok := errors.AsType[*fs.PathError](err); ok && errors.Is(err, fs.ErrNotExist) {
		text = "no " + file.Path
	}
	k.notes = append(k.notes, text)
}

// inAgent returns what ssh-agent holds.
type inAgent func() ([]ssh.Signer, error)

// findKeys returns the keys in files, or without any those of ssh-agent and the usual files.
func findKeys(ctx context.Context, files []string) (*keys, error) {
	held := sync.OnceValues(func() ([]ssh.Signer, error) { return agentKeys(ctx) })
	k := &keys{}
	areNamed := len(files) > 0
	if !areNamed {
		signers, err := held()
		k.note(err)
		for _, signer := range signers {
			k.add(signer)
		}

		home, err := os.UserHomeDir()
		k.note(err)
		for _, name := range []string{"id_ed25519", "id_ecdsa", "id_rsa"} {
			if home != "" {
				files = append(files, filepath.Join(home, ".ssh", name))
			}
		}
	}

	for _, file := range files {
		signer, err := readKey(file, held)
		switch {
		case err == nil:
			k.add(signer)
		case areNamed:
			return nil, err
		}
		k.note(err)
	}

	if len(k.signers) == 0 {
		return nil, fmt.Errorf("no key to log in with: %s: name one with -i, or make one with ssh-keygen",
			strings.Join(k.notes, ", "))
	}
	return k, nil
}

// readKey returns the private key in file. One that is encrypted, in hardware, or known by its public part
// only, is had from ssh-agent.
func readKey(file string, held inAgent) (ssh.Signer, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	signer, err := ssh.ParsePrivateKey(text)
	if err == nil {
		return signer, nil
	}

	beside, _ := os.ReadFile(file + ".pub")
	public, what := cmp.Or(parsePublic(text), parsePublic(beside)), "is a public key"
	if locked, ok := errors.AsType[*ssh.PassphraseMissingError](err); ok {
		public, what = cmp.Or(locked.PublicKey, public), "is encrypted" // the older formats don't say which
	} else if public == nil {
		return nil, fmt.Errorf("%s: neither a private nor a public key: %w", file, err)
	}

	signers, err := held()
	for _, s := range signers {
		if public != nil && sameKey(s.PublicKey(), public) {
			return s, nil
		}
	}

	way := "ssh-agent does not hold it:"
	if err != nil {
		way = err.Error() + ": start one and"
	}
	return nil, fmt.Errorf("%s %s, and %s ssh-add %s", file, what, way, strings.TrimSuffix(file, ".pub"))
}

// parsePublic returns the public key that text is, or nil.
func parsePublic(text []byte) ssh.PublicKey {
	key, _, _, _, err := ssh.ParseAuthorizedKey(text)
	if err != nil {
		return nil
	}
	return key
}

// agentKeys returns what ssh-agent holds. The keys work until ctx ends.
func agentKeys(ctx context.Context) ([]ssh.Signer, error) {
	socket := os.Getenv("SSH_AUTH_SOCK")
	if socket == "" {
		return nil, errors.New("there is no ssh-agent (SSH_AUTH_SOCK is not set)")
	}

	conn, err := (&net.Dialer{Timeout: dialLimit}).DialContext(ctx, "unix", socket)
	var signers []ssh.Signer
	if err == nil {
		context.AfterFunc(ctx, func() { conn.Close() })
		signers, err = agent.NewClient(&agentConn{conn}).Signers()
	}
	if err != nil {
		return nil, fmt.Errorf("ssh-agent does not answer: %w", err)
	}

	if len(signers) == 0 {
		return nil, errors.New("ssh-agent holds none")
	}
	return signers, nil
}

// agentConn bounds every question to ssh-agent. It is no io.Closer, and so gets them one at a time.
type agentConn struct{ conn net.Conn }

func (a *agentConn) Read(p []byte) (int, error) { return a.conn.Read(p) }

func (a *agentConn) Write(p []byte) (int, error) {
	_ = a.conn.SetDeadline(time.Now().Add(dialLimit)) // fails as the write does
	return a.conn.Write(p)
}

// knownHosts is the known_hosts file that new hosts are added to, and what it and the system's files say.
type knownHosts struct {
	file        string
	check       ssh.HostKeyCallback
	authorities map[string]bool          // the @cert-authority lines, as file:line
	mu          sync.Mutex               // one host at a time
	added       map[string]ssh.PublicKey // by us, since the file was read
}

// hostKeyError is why a host is not believed.
type hostKeyError string

func (e hostKeyError) Error() string { return string(e) }

func notBelieved(format string, args ...any) error { return hostKeyError(fmt.Sprintf(format, args...)) }

// openKnownHosts reads the files. They need not exist; a line that can't be read is an error that names it.
func openKnownHosts(file string, system ...string) (*knownHosts, error) {
	k := &knownHosts{file: file, authorities: map[string]bool{}, added: map[string]ssh.PublicKey{}}

	var files []string
	for _, name := range append([]string{file}, system...) {
		text, err := os.ReadFile(name)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}

		files = append(files, name)
		for i, line := range bytes.Split(text, []byte("\n")) {
			if bytes.HasPrefix(bytes.TrimLeft(line, " \t"), []byte("@cert-authority")) {
				k.authorities[fmt.Sprintf("%s:%d", name, i+1)] = true
			}
		}
	}

	var err error
	if k.check, err = knownhosts.New(files...); err != nil {
		return nil, fmt.Errorf("known hosts: %s: mend or remove that line, or name another file with -k",
			strings.TrimPrefix(err.Error(), "knownhosts: "))
	}
	return k, nil
}

// lookup returns what is known of the address, plain keys and authorities apart, and the address that it is
// known under: as with ssh, what is known of a host's sshd also vouches for a port that nothing is known
// about.
func (k *knownHosts) lookup(addr string) (at string, plain, authorities []knownhosts.KnownKey) {
	// Asked about a key that nobody can have, knownhosts tells which ones it wants instead.
	nobody, _ := ssh.NewPublicKey(make(ed25519.PublicKey, ed25519.PublicKeySize))
	h, _, _ := net.SplitHostPort(addr)

	if key := k.added[addr]; key != nil {
		return addr, []knownhosts.KnownKey{{Key: key, Filename: k.file}}, nil
	}

	for _, at := range []string{addr, net.JoinHostPort(h, "22")} {
		var unknown *knownhosts.KeyError
		if !errors.As(k.check(at, &net.TCPAddr{}, nobody), &unknown) || len(unknown.Want) == 0 {
			continue
		}
		for _, l := range unknown.Want {
			if k.authorities[fmt.Sprintf("%s:%d", l.Filename, l.Line)] {
				authorities = append(authorities, l)
			} else {
				plain = append(plain, l)
			}
		}
		return at, plain, authorities
	}
	return addr, nil, nil
}

// algorithms returns the host key algorithms to ask for, those that can be verified first: left alone, a
// server with several keys shows one that known_hosts may not have, which looks like a changed key
// (golang.org/issue/29286). Certificates are only asked for where an authority is known.
func (k *knownHosts) algorithms(addr string) []string {
	k.mu.Lock()
	defer k.mu.Unlock()

	_, plain, authorities := k.lookup(addr)
	rank := func(algo string) int {
		if isCert(algo) {
			return 0
		}
		if strings.HasPrefix(algo, "rsa-sha2-") {
			algo = ssh.KeyAlgoRSA
		}
		switch {
		case slices.ContainsFunc(plain, func(l knownhosts.KnownKey) bool { return l.Key.Type() == algo }):
			return 1
		case algo == ssh.KeyAlgoED25519:
			return 2 // what ssh remembers of a new host
		}
		return 3
	}

	all := slices.DeleteFunc(ssh.SupportedAlgorithms().HostKeys, func(algo string) bool {
		return isCert(algo) && len(authorities) == 0
	})
	slices.SortStableFunc(all, func(a, b string) int { return cmp.Compare(rank(a), rank(b)) })
	return all
}

// verify says whether key is addr's, and remembers the key of a host that nothing is known about, which gives
// a notice.
func (k *knownHosts) verify(addr string, key ssh.PublicKey) (notice string, err error) {
	k.mu.Lock()
	defer k.mu.Unlock()

	at, plain, authorities := k.lookup(addr)
	err = k.check(at, &net.TCPAddr{}, key)
	if cert, ok := key.(*ssh.Certificate); ok && err != nil {
		if k.check(at, &net.TCPAddr{}, cert.Key) == nil {
			return "", nil // as with ssh, a known key is not worse for a certificate that is no good
		}
		return "", notBelieved("host certificate is not valid: %s: have it signed anew, or mend the "+
			"@cert-authority line", strings.TrimPrefix(err.Error(), "ssh: "))
	}

	var revoked *knownhosts.RevokedError
	isIt := func(l knownhosts.KnownKey) bool { return sameKey(l.Key, key) }
	switch {
	case errors.As(err, &revoked):
		return "", notBelieved("host key %s is revoked in %s:%d: ask the host's administrator, and don't go "+
			"on", fingerprint(key), revoked.Revoked.Filename, revoked.Revoked.Line)
	case err == nil, slices.ContainsFunc(plain, isIt):
		return "", nil
	case at == addr && len(plain) > 0:
		sameType := func(l knownhosts.KnownKey) bool { return l.Key.Type() == key.Type() }
		was := plain[max(0, slices.IndexFunc(plain, sameType))]
		return "", notBelieved("host key has changed: it is %s, but %s:%d has %s: someone may be in "+
			"between; if the change is known, run ssh-keygen -R '%s' -f '%s'", fingerprint(key), was.Filename,
			was.Line, fingerprint(was.Key), knownhosts.Normalize(addr), was.Filename)
	case at == addr && len(authorities) > 0:
		return "", notBelieved("host key %s has no certificate of the authority in %s:%d: have it signed, "+
			"or add the key to %s", fingerprint(key), authorities[0].Filename, authorities[0].Line, k.file)
	}

	if err := k.remember(addr, key); err != nil {
		return "", notBelieved("new host, key %s, but it can't be remembered: %v: name another file with -k",
			fingerprint(key), err)
	}
	k.added[addr] = key
	return fmt.Sprintf("new host, key %s remembered in %s", fingerprint(key), k.file), nil
}

// remember adds a line with a single write, so that other processes can do the same.
func (k *knownHosts) remember(addr string, key ssh.PublicKey) error {
	if err := os.MkdirAll(filepath.Dir(k.file), 0o700); err != nil {
		return err
	}
	f, err := os.OpenFile(k.file, os.O_RDWR|os.O_APPEND|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()

	line := knownhosts.Line([]string{addr}, key) + "\n"
	before, err := io.ReadAll(f)
	if err != nil {
		return err
	}

	if len(before) > 0 && before[len(before)-1] != '\n' {
		line = "\n" + line
	}
	_, err = f.WriteString(line)
	return cmp.Or(err, f.Close())
}

func isCert(algo string) bool { return strings.HasSuffix(algo, "-cert-v01@openssh.com") }

func sameKey(a, b ssh.PublicKey) bool { return bytes.Equal(a.Marshal(), b.Marshal()) }

func fingerprint(key ssh.PublicKey) string {
	return strings.TrimPrefix(key.Type(), "ssh-") + " " + ssh.FingerprintSHA256(key)
}
