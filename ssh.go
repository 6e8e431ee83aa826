//go:build linux

package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/ed25519"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/crypto/ssh"
)

// sshServer is the SSH interface: who may ask what.
type sshServer struct {
	config   *ssh.ServerConfig
	machines []string
	actual   string
	services []*Service
	do       func(*Service, context.Context, op) error // (*Service).do
	patience patience
	tasks    sync.WaitGroup // connections, sessions, commands
	keys     keyring

	mu       sync.Mutex // guards what follows, and some fields of each connection
	conns    []*sshConn // in the order in which they came, or were authenticated
	nextLog  time.Time
	unlogged int
}

// patience is how long we wait for a client: from accept to authenticated, without a command, and for it to
// take what we send; for all to end as well.
type patience struct{ handshake, idle, answer time.Duration }

// newSSHServer loads the host key, or makes it if it is not there and makeKey says so (once, in the state
// directory). machines are those of the config, in its order; actual is this host.
func newSSHServer(hostKeyFile string, makeKey bool, keys []key, machines []string, actual string,
	services []*Service) (*sshServer, error) {
	host, err := hostKey(hostKeyFile, makeKey)
	if err != nil {
		return nil, fmt.Errorf("host key %s: %w; make one with: ssh-keygen -t ed25519 -N '' -f FILE, "+
			"and say --hostkey FILE", hostKeyFile, err)
	}

	s := &sshServer{
		machines: machines, actual: actual, services: services, do: (*Service).do,
		patience: patience{10 * time.Second, time.Minute, 10 * time.Second},
	}
	for _, k := range keys {
		known, err := parseKeys(k.text)
		if err != nil {
			return nil, fmt.Errorf("keys %s: %w", k.path, err)
		}
		s.keys.files = append(s.keys.files, &keyFile{key: k, known: known})
	}
	s.keys.ok()

	s.config = &ssh.ServerConfig{
		ServerVersion: "SSH-2.0-gitopper", MaxAuthTries: 6, PublicKeyCallback: s.keys.authorize,
		PublicKeyAuthAlgorithms: ssh.SupportedAlgorithms().PublicKeyAuths,
	}

	// x/crypto's defaults but for SHA-1 and classic Diffie-Hellman, of which a stranger makes us compute ten
	// times as much.
	s.config.KeyExchanges = []string{ssh.KeyExchangeMLKEM768X25519, ssh.KeyExchangeCurve25519,
		ssh.KeyExchangeECDHP256, ssh.KeyExchangeECDHP384}
	s.config.MACs = []string{ssh.HMACSHA256ETM, ssh.HMACSHA512ETM, ssh.HMACSHA256, ssh.HMACSHA512}

	s.config.AddHostKey(host)
	slog.Info(fmt.Sprintf("ssh: host key %s %s", hostKeyFile, ssh.FingerprintSHA256(host.PublicKey())))
	return s, nil
}

// exec runs a command: its steps are lines on stderr, its answer is one line of JSON on stdout, or the last
// line on stderr.
func (s *sshServer) exec(ctx context.Context, c *sshConn, ch ssh.Channel, payload []byte) {
	lines, shown := make(chan string, 64), make(chan bool)
	go func() {
		defer close(shown)
		for l := range lines {
			fmt.Fprintln(ch.Stderr(), l)
		}
	}()
	answer, err := s.run(ctx, c, payload, func(line string) {
		select {
		case lines <- printable(unmark(line), 1000):
		default: // a slow client misses some, the service does not wait
		}
	})

	// A client that takes nothing would keep us for ever: a channel's window knows no deadline.
	defer time.AfterFunc(s.patience.answer, func() { c.Close() }).Stop()
	close(lines) // there are no steps after the answer
	<-shown
	if text, ok := answer.(string); ok {
		_, _ = io.WriteString(ch, text)
	} else if answer != nil {
		enc := json.NewEncoder(ch)
		enc.SetEscapeHTML(false)
		_ = enc.Encode(answer)
	}

	var exit struct{ Status uint32 } // RFC 4254 section 6.10
	if err != nil {
		fmt.Fprintln(ch.Stderr(), errorLine(err, c.who.rights))
		exit.Status = 1
	}
	_, _ = ch.SendRequest("exit-status", false, ssh.Marshal(exit))
	_ = ch.Close()
}

// What strangers, and clients that don't behave, can cost us at most.
const (
	maxConns      = 64       // before, and again after it: git needs most of the usual 1024 descriptors
	maxPerSource  = 48       // before authentication: a flood from one address shuts out no other one
	maxSessions   = 8        // of a connection
	strangerBytes = 64 << 10 // read from a connection before authentication
	knownBytes    = 16 << 20 // and after
)

var errEvicted = errors.New("too many connections")

// rights are what a key may do: who may write may look, too.
type rights int

const (
	mayLook rights = iota + 1
	mayWrite
)

// suffice says whether a key with r may do what needs these rights; what is not said to need any, none may.
func (r rights) suffice(needs rights) bool { return needs > 0 && r >= needs }

// visitor is who authenticated: by which key of which file, and as whom; nobody did where that is zero.
type visitor struct {
	file, comment, user string
	rights              rights
}

func (v visitor) known() bool { return v != visitor{} }

// sshConn is a connection with limits: on bytes, pace and time.
type sshConn struct {
	net.Conn
	s     *sshServer
	from  string       // its address, without the port
	quota atomic.Int64 // bytes that may still be read
	burst int          // bytes read since the last pause
	who   visitor      // set once it is authenticated

	running int         // /do/ commands; guarded by s.mu
	evicted atomic.Bool // to make room for another one
}

// Read pauses every 200 bytes, which are less than 8 packets, so that x/crypto's reader stays behind the one
// that handles them and its queue of 16 never fills. Were it waiting for room there when a handshake fails,
// which any stranger can bring about, it would wait for ever: two goroutines and what they hold, for each
// such connection (seen with x/crypto 0.58).
func (c *sshConn) Read(p []byte) (int, error) {
	const burst = 200
	if c.burst >= burst {
		time.Sleep(time.Millisecond)
		c.burst = 0
	}

	n, err := c.Conn.Read(p[:min(len(p), burst-c.burst)])
	c.burst += n
	if c.quota.Add(-int64(n)) < 0 {
		return 0, errors.New("sent too much")
	}
	return n, err
}

// Write gives the other side time to read.
func (c *sshConn) Write(p []byte) (int, error) {
	_ = c.SetWriteDeadline(time.Now().Add(c.s.patience.answer))
	return c.Conn.Write(p)
}

func (c *sshConn) String() string {
	return fmt.Sprintf("%s (%q) user %q from %s", c.who.file, c.who.comment, c.who.user, c.RemoteAddr())
}

// busy counts a connection's /do/ commands. While there is none it is closed in time: after it idled, or, so
// that an answer still arrives, soon after ctx is done.
func (c *sshConn) busy(ctx context.Context, n int) {
	c.s.mu.Lock()
	defer c.s.mu.Unlock()

	c.running += n
	var deadline time.Time
	switch {
	case c.running > 0: // none
	case ctx.Err() != nil:
		deadline = time.Now().Add(time.Second)
	default:
		deadline = time.Now().Add(c.s.patience.idle)
	}
	_ = c.SetReadDeadline(deadline)
}

// enter puts a connection among those that are not authenticated, or, now knowing who it is, among those that
// are. Where they are too many, or too many of its source are not authenticated, the oldest of them that runs
// no /do/ command goes.
func (s *sshServer) enter(c *sshConn, who visitor) {
	s.mu.Lock()
	defer s.mu.Unlock()

	s.remove(c)
	s.conns, c.who = append(s.conns, c), who

	group := slices.Clone(s.conns)
	group = slices.DeleteFunc(group, func(o *sshConn) bool { return o.who.known() != who.known() })
	source := slices.Clone(group)
	source = slices.DeleteFunc(source, func(o *sshConn) bool { return o.from != c.from })
	if !who.known() && len(source) > maxPerSource {
		group = source
	} else if len(group) <= maxConns {
		return
	}

	// The newcomer is the last of them, and runs none.
	oldest := group[slices.IndexFunc(group, func(o *sshConn) bool { return o.running == 0 })]
	s.remove(oldest)
	oldest.evicted.Store(true)
	_ = oldest.Close()
}

func (s *sshServer) remove(c *sshConn) {
	s.conns = slices.DeleteFunc(s.conns, func(o *sshConn) bool { return o == c })
}

// serve answers on l until ctx is done. Commands that run then get what Service.do returns; everything is
// closed, and serve returns, after 10 s at the latest.
func (s *sshServer) serve(ctx context.Context, l net.Listener) {
	defer context.AfterFunc(ctx, func() { _ = l.Close() })()
	for ctx.Err() == nil {
		nc, err := l.Accept()
		if err == nil {
			c := &sshConn{Conn: nc, s: s}
			c.quota.Store(strangerBytes)
			c.from, _, _ = net.SplitHostPort(nc.RemoteAddr().String())
			s.enter(c, visitor{})
			s.tasks.Go(func() { s.handle(ctx, c) })
		} else if ctx.Err() == nil { // EMFILE, ECONNABORTED and such: it may be better soon
			s.log(ctx, slog.LevelInfo, fmt.Sprintf("ssh: %v; trying again", err))
			time.Sleep(100 * time.Millisecond)
		}
	}

	ended := make(chan bool)
	go func() { s.tasks.Wait(); close(ended) }()
	select {
	case <-ended:
	case <-time.After(s.patience.answer):
		s.mu.Lock()
		defer s.mu.Unlock()
		for _, c := range s.conns {
			_ = c.Close()
		}
	}
}

// log logs what strangers cause: one line a second, the others only with --debug.
func (s *sshServer) log(ctx context.Context, level slog.Level, msg string) {
	s.mu.Lock()
	defer s.mu.Unlock()

	if now := time.Now(); now.Before(s.nextLog) {
		s.unlogged++
		level = slog.LevelDebug
	} else {
		if s.unlogged > 0 {
			msg += fmt.Sprintf(" (and %d more since the last such line)", s.unlogged)
		}
		s.unlogged, s.nextLog = 0, now.Add(time.Second)
	}
	slog.Log(ctx, level, msg)
}

// handle serves one connection.
func (s *sshServer) handle(ctx context.Context, c *sshConn) {
	defer func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.remove(c)
		_ = c.Close()
	}()
	defer context.AfterFunc(ctx, func() { c.busy(ctx, 0) })()

	channels, err := s.login(ctx, c)
	if err != nil {
		return // it has been logged
	}

	sessions := make(chan bool, maxSessions)
	for nc := range channels {
		if nc.ChannelType() != "session" {
			_ = nc.Reject(ssh.Prohibited, "only commands are served")
			continue
		}
		select {
		case sessions <- true:
			s.tasks.Go(func() { s.session(ctx, c, nc); <-sessions })
		default:
			_ = nc.Reject(ssh.ResourceShortage, "too many sessions")
		}
	}
	if c.evicted.Load() {
		s.log(ctx, slog.LevelInfo, fmt.Sprintf("ssh: %s: closed: %v", c, errEvicted))
	}
}

// login does the handshake, and finds out who is there.
func (s *sshServer) login(ctx context.Context, c *sshConn) (<-chan ssh.NewChannel, error) {
	_ = c.SetReadDeadline(time.Now().Add(s.patience.handshake))
	config := *s.config
	var refused error // a key: it says more than what the client says when it leaves
	config.AuthLogCallback = func(_ ssh.ConnMetadata, method string, err error) {
		if method == "publickey" && err != nil {
			refused = err
		}
	}

	conn, channels, requests, err := ssh.NewServerConn(c, &config)
	if err != nil {
		level, isLook := slog.LevelInfo, err == io.EOF && c.quota.Load() == strangerBytes
		switch {
		case c.evicted.Load():
			err = errEvicted
		case refused != nil:
			level, err = slog.LevelWarn, refused
		case isLook: // of a monitoring system, whether the port is open
			return nil, err
		}
		why := printable(err.Error(), 300)
		s.log(ctx, level, fmt.Sprintf("ssh: %s: closed before authentication: %s", c.RemoteAddr(), why))
		return nil, err
	}

	who, _ := conn.Permissions.ExtraData[visitor{}].(visitor)
	who.user = printable(conn.User(), 32)
	c.quota.Store(knownBytes)
	s.enter(c, who)
	c.busy(ctx, 0)
	slog.Debug(fmt.Sprintf("ssh: %s connected", c))
	go ssh.DiscardRequests(requests) // forwarding (RFC 4254 section 7.1) and all else is refused
	return channels, nil
}

// session serves one session: a single exec request, RFC 4254 section 6.5. It ends when the client closes it
// too, so that those which one left open count.
func (s *sshServer) session(ctx context.Context, c *sshConn, nc ssh.NewChannel) {
	ch, requests, err := nc.Accept()
	if err != nil {
		return
	}
	go io.Copy(io.Discard, ch) // else x/crypto keeps 2 MiB for us
	go io.Copy(io.Discard, ch.Stderr())

	used := false
	for r := range requests { // never wait here: it would stop the whole connection, and for ever
		isCommand := slices.Contains([]string{"exec", "shell"}, r.Type) // a shell is told what to say
		if used || !isCommand {
			_ = r.Reply(false, nil)
			continue
		}
		used = true
		_ = r.Reply(true, nil)
		s.tasks.Go(func() { s.exec(ctx, c, ch, r.Payload) })
	}
}

// hostKey reads the private host key, or makes it where it is missing and makeKey says so.
func hostKey(file string, makeKey bool) (ssh.Signer, error) {
	data, err := os.ReadFile(file)
	if makeKey && errors.Is(err, fs.ErrNotExist) {
		_, private, _ := ed25519.GenerateKey(nil)              // crypto/rand does not fail,
		block, _ := ssh.MarshalPrivateKey(private, "gitopper") // and neither does this, for such a key
		data = pem.EncodeToMemory(block)
		err = writeFile(file, data)
	}
	if err != nil {
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

// keyring is the key files, which are read anew when they change.
type keyring struct {
	mu    sync.Mutex
	files []*keyFile
}

// keyFile is a key file as it was when it was last good.
type keyFile struct {
	key
	known []authorizedKey // its text
	err   error           // what is wrong with it now
}

// refresh reads the file again. Where it is wrong its last good keys stay.
func (f *keyFile) refresh() {
	known, text, err := f.known, []byte{}, error(nil)
	if fi, statErr := os.Stat(f.path); statErr == nil && !fi.Mode().IsRegular() { // a pipe would hang us
		err = errors.New("not a regular file")
	} else {
		text, err = os.ReadFile(f.path)
	}
	if err == nil && !bytes.Equal(text, f.text) {
		known, err = parseKeys(text)
	}

	isNews := fmt.Sprint(err) != fmt.Sprint(f.err)
	if err == nil {
		isNews = isNews || !slices.Equal(known, f.known)
		f.known, f.text = known, text
	}
	f.err = err
	said := fmt.Sprintf("ssh: keys %s: ", f.path)
	switch {
	case !isNews:
	case err != nil:
		slog.Error(said + err.Error() + "; until it is right the keys it had stay valid")
	default:
		slog.Info(said + "read anew, " + number(len(known), "key"))
	}
}

// ok reads the key files again, and says whether every one can be used as it is now.
func (r *keyring) ok() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, f := range r.files {
		f.refresh()
	}
	return !slices.ContainsFunc(r.files, func(f *keyFile) bool { return f.err != nil })
}

// authorize gives a key its rights. They are part of what this key authenticates to, whatever other keys the
// client offers before or after (CVE-2024-45337). A key that stands in a ro and in another file is ro.
func (r *keyring) authorize(m ssh.ConnMetadata, pub ssh.PublicKey) (*ssh.Permissions, error) {
	r.ok() // it logs what is wrong
	r.mu.Lock()
	defer r.mu.Unlock()

	blob := string(pub.Marshal()) // a certificate's is never that of its key
	var who visitor
	for _, f := range r.files {
		i := slices.IndexFunc(f.known, func(k authorizedKey) bool { return k.blob == blob })
		if i >= 0 && (!who.known() || f.rights == mayLook) {
			who = visitor{file: f.path, comment: f.known[i].comment, rights: f.rights}
		}
	}

	if !who.known() {
		user, key := printable(m.User(), 32), ssh.FingerprintSHA256(pub)
		return nil, fmt.Errorf("user %q: key %s is in no key file", user, key)
	}
	return &ssh.Permissions{ExtraData: map[any]any{visitor{}: who}}, nil
}
