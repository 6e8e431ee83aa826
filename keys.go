//go:build linux

package main

import (
	"bytes"
	"cmp"
	"crypto/ed25519"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/crypto/ssh"
)

// hostKey reads the private host key, or makes it where it is missing and makeKey says so.
func hostKey(file string, makeKey bool) (ssh.Signer, error) {
	data, err := os.ReadFile(file)
	if makeKey && errors.Is(err, fs.ErrNotExist) {
		_, private, _ := ed25519.GenerateKey(nil) // crypto/rand does not fail
		block, err := ssh.MarshalPrivateKey(private, "gitopper")
		if err != nil {
			return nil, err
		}

		data = pem.EncodeToMemory(block)
		if err := writeFile(file, data); err != nil {
			return nil, err
		}
	} else if err != nil {
		return nil, err
	}
	return ssh.ParsePrivateKey(data)
}

// authorizedKey is a public key that may come in.
type authorizedKey struct {
	blob    string // as it goes over the wire, RFC 4253 section 6.6
	comment string // or its fingerprint
}

// parseKeys reads public keys as authorized_keys has them, one a line:
//
//	# the night shift
//	ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAI... alice@laptop
//
// Anything else is an error that names the line; so are options, lest someone believes that from= or command=
// holds here.
func parseKeys(data []byte) ([]authorizedKey, error) {
	var keys []authorizedKey
	for i, line := range bytes.Split(data, []byte("\n")) {
		if line = bytes.TrimSpace(line); len(line) == 0 || line[0] == '#' {
			continue
		}
		pub, comment, options, _, err := ssh.ParseAuthorizedKey(line)
		if err != nil {
			return nil, fmt.Errorf("line %d: not a public key: %w", i+1, err)
		}
		if _, isCert := pub.(*ssh.Certificate); isCert || len(options) > 0 {
			return nil, fmt.Errorf("line %d: no certificates and no options here: put the plain public key, "+
				"and use { ro = true } or a firewall", i+1)
		}

		comment = cmp.Or(strings.TrimSpace(printable(comment, 100)), ssh.FingerprintSHA256(pub))
		keys = append(keys, authorizedKey{string(pub.Marshal()), comment})
	}
	if len(keys) == 0 {
		return nil, errors.New("no public key in it")
	}
	return keys, nil
}

// keyFile is a key file as it was when it was last good.
type keyFile struct {
	key
	keys []authorizedKey
	text []byte // that keys were read from
	err  error  // what is wrong with it now
}

// refresh reads the file again if it changed. If that fails its last good keys stay.
func (f *keyFile) refresh() error {
	before, first := f.err, f.keys == nil
	keys, text, err := f.read()
	if err != nil {
		f.err = fmt.Errorf("keys %s: %w", f.path, err)
		if !first && fmt.Sprint(before) != fmt.Sprint(f.err) {
			slog.Error(fmt.Sprintf("ssh: %v; until it is right the keys it had stay valid", f.err))
		}
		return f.err
	}

	mended := before != nil || !slices.Equal(keys, f.keys)
	if mended && !first {
		slog.Info(fmt.Sprintf("ssh: keys %s: read anew, %d keys", f.path, len(keys)))
	}
	f.keys, f.text, f.err = keys, text, nil
	return nil
}

// read returns the file's keys as they are now; it parses nothing if the text is still the same.
func (f *keyFile) read() ([]authorizedKey, []byte, error) {
	fi, err := os.Stat(f.path)
	if err != nil {
		return nil, nil, err
	}
	if !fi.Mode().IsRegular() {
		return nil, nil, errors.New("not a regular file")
	}
	text, err := os.ReadFile(f.path)
	if err != nil {
		return nil, nil, err
	}

	if f.keys != nil && bytes.Equal(text, f.text) {
		return f.keys, text, nil
	}
	keys, err := parseKeys(text)
	return keys, text, err
}

// keysOK says whether every key file can be used as it is now.
func (s *sshServer) keysOK() bool {
	s.keyMu.Lock()
	defer s.keyMu.Unlock()

	ok := true
	for _, f := range s.files {
		if f.refresh() != nil {
			ok = false
		}
	}
	return ok
}

// authorize gives a key its rights. They are part of what this key authenticates to, whatever other keys the
// client offers before or after (CVE-2024-45337). A key that stands in a ro and in another file is ro.
func (s *sshServer) authorize(m ssh.ConnMetadata, pub ssh.PublicKey) (*ssh.Permissions, error) {
	s.keyMu.Lock()
	defer s.keyMu.Unlock()

	blob := string(pub.Marshal()) // a certificate's is never that of its key
	var found map[string]string
	for _, f := range s.files {
		_ = f.refresh() // logs what is wrong
		i := slices.IndexFunc(f.keys, func(k authorizedKey) bool { return k.blob == blob })
		if i < 0 {
			continue
		}
		if found == nil || f.ro {
			write := strconv.FormatBool(!f.ro)
			found = map[string]string{"file": f.path, "comment": f.keys[i].comment, "write": write}
		}
	}
	if found == nil {
		user, key := printable(m.User(), 32), ssh.FingerprintSHA256(pub)
		return nil, fmt.Errorf("user %q: key %s is in no key file", user, key)
	}
	return &ssh.Permissions{Extensions: found}, nil
}
