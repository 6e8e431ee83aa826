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
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unicode"

	"gitopper/ctl"

	"golang.org/x/crypto/ssh"
)

// route is one command of the SSH interface.
type route struct {
	path     string
	ro       bool // it only looks: ro keys may use it, too
	min, max int  // words after path
	usage    string
	run      func(*sshServer, context.Context, *sshConn, []string, func(string)) (any, error)
}

// sshRoutes is everything that can be asked for.
func sshRoutes() []route {
	return []route{
		{"/list/machine", true, 0, 0, "", (*sshServer).listMachines},
		{"/list/service", true, 0, 1, "[SERVICE]", (*sshServer).listServices},
		{"/do/freeze", false, 1, maxRequest, "SERVICE [DURATION] [REASON...]", (*sshServer).change},
		{"/do/unfreeze", false, 1, 1, "SERVICE", (*sshServer).change},
		{"/do/rollback", false, 2, 2, "SERVICE HASH", (*sshServer).change},
		{"/do/pull", false, 1, 1, "SERVICE", (*sshServer).change},
	}
}

const (
	maxRequest = 4 << 10                   // bytes of a command
	maxReason  = 200                       // bytes
	maxFreeze  = 10 * 365 * 24 * time.Hour // longer is a typing error
)

// sshServer is the SSH interface: who may ask what.
type sshServer struct {
	config    *ssh.ServerConfig
	machines  []string
	actual    string
	services  []*Service
	do        func(*Service, context.Context, op) error // (*Service).do
	handshake time.Duration                             // from accept to authenticated
	idle      time.Duration                             // of a connection without a command
	answer    time.Duration                             // for a client to take what we send, and for everything to end
	start     time.Time
	tasks     sync.WaitGroup // connections, sessions, commands

	keyMu sync.Mutex // guards files
	files []*keyFile

	mu       sync.Mutex           // guards what follows, and some fields of each connection
	open     [2]map[*sshConn]bool // not authenticated, authenticated
	nextLog  time.Time
	unlogged int
}

// newSSHServer loads the host key, or makes it if it is not there and makeKey says so (once, in the state directory), and
// the key files. machines are the config's entries in their order; actual is this host.
func newSSHServer(hostKeyFile string, makeKey bool, keys []key, machines []string, actual string, services []*Service) (*sshServer, error) {
	host, err := hostKey(hostKeyFile, makeKey)
	if err != nil {
		return nil, fmt.Errorf("host key %s: %w; make one with: ssh-keygen -t ed25519 -N '' -f FILE, and say --hostkey FILE", hostKeyFile, err)
	}
	s := &sshServer{
		machines: machines, actual: actual, services: services, do: (*Service).do,
		handshake: 10 * time.Second, idle: time.Minute, answer: 10 * time.Second,
		start: time.Now(), open: [2]map[*sshConn]bool{{}, {}},
	}
	for _, k := range keys {
		f := &keyFile{key: k}
		if err := f.refresh(); err != nil {
			return nil, err
		}
		s.files = append(s.files, f)
	}
	// x/crypto's defaults but for SHA-1 and classic Diffie-Hellman, of which a stranger makes us compute ten times as much.
	s.config = &ssh.ServerConfig{
		ServerVersion: "SSH-2.0-gitopper", MaxAuthTries: 6, PublicKeyCallback: s.authorize,
		PublicKeyAuthAlgorithms: ssh.SupportedAlgorithms().PublicKeyAuths,
	}
	s.config.KeyExchanges = []string{ssh.KeyExchangeMLKEM768X25519, ssh.KeyExchangeCurve25519, ssh.KeyExchangeECDHP256, ssh.KeyExchangeECDHP384}
	s.config.MACs = []string{ssh.HMACSHA256ETM, ssh.HMACSHA512ETM, ssh.HMACSHA256, ssh.HMACSHA512}
	s.config.AddHostKey(host)
	slog.Info(fmt.Sprintf("ssh: host key %s %s", hostKeyFile, ssh.FingerprintSHA256(host.PublicKey())))
	return s, nil
}

func hostKey(file string, makeKey bool) (ssh.Signer, error) {
	data, err := os.ReadFile(file)
	if makeKey && errors.Is(err, fs.ErrNotExist) {
		_, private, _ := ed25519.GenerateKey(nil) // crypto/rand does not fail
		block, merr := ssh.MarshalPrivateKey(private, "gitopper")
		if merr != nil {
			return nil, merr
		}
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
// Anything else is an error that names the line; so are options, lest someone believes that from= or command= holds here.
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
			return nil, fmt.Errorf("line %d: no certificates and no options here: put the plain public key, and use { ro = true } or a firewall", i+1)
		}
		keys = append(keys, authorizedKey{string(pub.Marshal()), cmp.Or(strings.TrimSpace(printable(comment, 100)), ssh.FingerprintSHA256(pub))})
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
	was, keys, data := f.err, f.keys, []byte(nil)
	fi, err := os.Stat(f.path)
	if err == nil && !fi.Mode().IsRegular() {
		err = errors.New("not a regular file")
	}
	if err == nil {
		data, err = os.ReadFile(f.path)
	}
	if err == nil && (f.keys == nil || !bytes.Equal(data, f.text)) {
		keys, err = parseKeys(data)
	}
	if f.err = nil; err != nil {
		f.err = fmt.Errorf("keys %s: %w", f.path, err)
		if f.keys != nil && fmt.Sprint(was) != fmt.Sprint(f.err) {
			slog.Error(fmt.Sprintf("ssh: %v; until it is right the keys it had stay valid", f.err))
		}
		return f.err
	}
	if f.keys != nil && (was != nil || !slices.Equal(keys, f.keys)) {
		slog.Info(fmt.Sprintf("ssh: keys %s: read anew, %d keys", f.path, len(keys)))
	}
	f.keys, f.text = keys, data
	return nil
}

// keysOK says whether every key file can be used as it is now.
func (s *sshServer) keysOK() bool {
	s.keyMu.Lock()
	defer s.keyMu.Unlock()
	ok := true
	for _, f := range s.files {
		ok = f.refresh() == nil && ok
	}
	return ok
}

// authorize gives a key its rights. They are part of what this key authenticates to, whatever other keys the client
// offers before or after (CVE-2024-45337). A key that stands in a ro and in another file is ro.
func (s *sshServer) authorize(m ssh.ConnMetadata, pub ssh.PublicKey) (*ssh.Permissions, error) {
	s.keyMu.Lock()
	defer s.keyMu.Unlock()
	blob := string(pub.Marshal()) // a certificate's is never that of its key
	var found map[string]string
	for _, f := range s.files {
		f.refresh() // logs what is wrong
		i := slices.IndexFunc(f.keys, func(k authorizedKey) bool { return k.blob == blob })
		if i >= 0 && (found == nil || f.ro) {
			found = map[string]string{"file": f.path, "comment": f.keys[i].comment, "write": strconv.FormatBool(!f.ro)}
		}
	}
	if found == nil {
		return nil, fmt.Errorf("user %q: key %s is in no key file", printable(m.User(), 32), ssh.FingerprintSHA256(pub))
	}
	return &ssh.Permissions{Extensions: found}, nil
}

// exec runs a command: its steps are lines on stderr, its answer is one line of JSON on stdout, or the last line on stderr.
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
		case lines <- printable(line, 1000):
		default: // a slow client misses some, the service does not wait
		}
	})
	// A client that takes nothing would keep us for ever: a channel's window knows no deadline.
	defer time.AfterFunc(s.answer, func() { c.Close() }).Stop()
	close(lines) // there are no steps after the answer
	<-shown
	var exit struct{ Status uint32 } // RFC 4254 section 6.10
	if answer != nil {
		enc := json.NewEncoder(ch)
		enc.SetEscapeHTML(false)
		_ = enc.Encode(answer)
	}
	if err != nil {
		fmt.Fprintln(ch.Stderr(), errorLine(err))
		exit.Status = 1
	}
	ch.SendRequest("exit-status", false, ssh.Marshal(exit))
	ch.Close()
}

func sshError(status, format string, args ...any) error {
	return &opError{status: status, err: fmt.Errorf(format, args...)}
}

// errorLine is how a client sees an error: HTTP status text first.
func errorLine(err error) string {
	status := "Internal Server Error"
	if oe, ok := errors.AsType[*opError](err); ok {
		status = oe.status
	}
	return printable(status+": "+err.Error(), 4000)
}

// parseRequest takes an exec request's payload apart: a string (RFC 4254 section 6.5) of printable words.
func parseRequest(payload []byte) ([]string, error) {
	var r struct{ Command string }
	if len(payload) > maxRequest {
		return nil, sshError("Bad Request", "a command has at most %d bytes", maxRequest)
	}
	if ssh.Unmarshal(payload, &r) != nil {
		r.Command = "" // as for a shell, which has no payload
	}
	if r.Command != printable(r.Command, maxRequest) {
		return nil, sshError("Bad Request", "a command is UTF-8 without control characters")
	}
	words := strings.Fields(r.Command)
	if len(words) == 0 {
		return nil, sshError("Bad Request", "no command, and there is no shell; say one, such as /list/service")
	}
	return words, nil
}

// printable makes text from outside fit for a line: printable, and no longer than limit bytes.
func printable(text string, limit int) string {
	text = strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return ' '
	}, text)
	return strings.ToValidUTF8(text[:min(limit, len(text))], "")
}

// run finds the route, looks at the key's rights and the number of words, and answers.
func (s *sshServer) run(ctx context.Context, c *sshConn, payload []byte, step func(string)) (any, error) {
	c.busy(ctx, 0)
	words, err := parseRequest(payload)
	if err != nil {
		return nil, err
	}
	for _, r := range sshRoutes() {
		switch n := len(words) - 1; {
		case r.path != words[0]:
			continue
		case !r.ro && !c.write:
			slog.Warn(fmt.Sprintf("ssh: %q refused, read-only key: %s", strings.Join(words, " "), c))
			return nil, sshError("Unauthorized", "key %s is read-only", c.comment)
		case n < r.min || n > r.max:
			return nil, sshError("Bad Request", "usage: %s", strings.TrimSpace(r.path+" "+r.usage))
		}
		return r.run(s, ctx, c, words, step)
	}
	return nil, sshError("Not Found", "no command %q; there are /list/ and /do/", words[0])
}

func (s *sshServer) listMachines(context.Context, *sshConn, []string, func(string)) (any, error) {
	answer := ctl.Machines{Machines: []ctl.Machine{}}
	for _, m := range s.machines {
		answer.Machines = append(answer.Machines, ctl.Machine{Machine: m, Actual: s.actual})
	}
	return answer, nil
}

func (s *sshServer) listServices(_ context.Context, _ *sshConn, words []string, _ func(string)) (any, error) {
	answer := ctl.Services{Services: []ctl.Service{}}
	for _, svc := range s.services {
		st := svc.Status()
		if len(words) > 1 && words[1] != st.Service {
			continue
		}
		change := ""
		if !st.Change.IsZero() {
			change = st.Change.UTC().Format(time.RFC1123)
		}
		answer.Services = append(answer.Services, ctl.Service{
			Service: st.Service, Hash: st.Commit[:min(8, len(st.Commit))], State: st.State, StateInfo: st.Info, Change: change})
	}
	if len(words) > 1 && len(answer.Services) == 0 {
		return nil, sshError("Not Found", "no service %q on %s", words[1], s.actual)
	}
	return answer, nil
}

// change has a service do something. A client that hangs up does not stop it: it is done or fails, and the log says which.
func (s *sshServer) change(ctx context.Context, c *sshConn, words []string, step func(string)) (answer any, err error) {
	what, result := strings.TrimPrefix(words[0], "/do/"), "ok"
	if len(words) > 2 {
		what += fmt.Sprintf(" %q", strings.Join(words[2:], " "))
	}
	defer func() {
		if err != nil {
			result = errorLine(err)
		}
		slog.Info(fmt.Sprintf("%s: %s by %s: %s", words[1], what, c, result))
	}()
	i := slices.IndexFunc(s.services, func(svc *Service) bool { return svc.Status().Service == words[1] })
	if i < 0 {
		return nil, sshError("Not Found", "no service %q on %s", words[1], s.actual)
	}
	o, err := parseOp(words, time.Now())
	if err != nil {
		return nil, err
	}
	host, _, _ := net.SplitHostPort(c.RemoteAddr().String())
	o.who, o.step = fmt.Sprintf("%s (%s@%s)", c.comment, c.user, host), step
	c.busy(ctx, 1)
	defer c.busy(ctx, -1)
	err = s.do(s.services[i], ctx, o)
	if oe, ok := errors.AsType[*opError](err); err != nil && !(ok && oe.done) {
		return nil, err
	} else if answer, lerr := s.listServices(ctx, c, words[:2], nil); lerr == nil {
		return answer, err // carried out, though not with the outcome that was hoped for
	}
	return nil, err
}

// parseOp reads the words of a /do/ command, whose number is right.
func parseOp(words []string, now time.Time) (op, error) {
	o, rest := op{verb: strings.TrimPrefix(words[0], "/do/")}, words[2:]
	if o.verb == "rollback" {
		o.hash = strings.ToLower(rest[0])
		if len(o.hash) < 4 || len(o.hash) > 40 || strings.Trim(o.hash, "0123456789abcdef") != "" {
			return o, sshError("Bad Request", "hash %q: want 4 to 40 hex digits", rest[0])
		}
		return o, nil
	}
	// A number first is meant as a duration, even if it is none: a typing error must not freeze for ever.
	if len(rest) > 0 && strings.IndexAny(strings.TrimLeft(rest[0], "+-."), "0123456789") == 0 {
		d, ok := parseDuration(rest[0])
		if !ok {
			return o, sshError("Bad Request", "duration %q: want a number and s, m, h or d, such as 90m, up to ten years; a reason begins with a letter", rest[0])
		}
		o.until, rest = now.Add(d), rest[1:]
	}
	if o.reason = strings.Join(rest, " "); len(o.reason) > maxReason {
		return o, sshError("Bad Request", "a reason has at most %d bytes", maxReason)
	}
	return o, nil
}

// parseDuration reads 90m or 2d: time.ParseDuration knows no days, and more than we offer.
func parseDuration(word string) (time.Duration, bool) {
	number, unit, scale := word[:len(word)-1], word[len(word)-1:], time.Duration(1)
	if unit == "d" {
		unit, scale = "h", 24
	}
	if !strings.Contains("smh", unit) || strings.Trim(number, "0123456789") != "" {
		return 0, false
	}
	d, err := time.ParseDuration(number + unit)
	return d * scale, err == nil && d > 0 && d <= maxFreeze/scale
}

// What strangers, and clients that don't behave, can cost us at most.
const (
	maxConns      = 64       // before, and again after authentication: git needs most of the usual 1024 descriptors
	maxSessions   = 8        // of a connection
	strangerBytes = 64 << 10 // read from a connection before authentication
	knownBytes    = 16 << 20 // and after
)

// How far a connection got.
const (
	silent    = iota
	talking   // has sent something
	exchanged // has done a key exchange
	known     // is authenticated
)

// sshConn is a connection with limits: on bytes, pace and time.
type sshConn struct {
	net.Conn
	stage, since, quota atomic.Int64 // how far it got, and when, in ns after the start; bytes that may still be read
	burst               int          // bytes read since the last pause
	s                   *sshServer

	file, comment, user string // who is there, once known
	write               bool

	from    string // the address, then the key; guarded by s.mu, as are:
	running int    // /do/ commands
	why     error  // we closed it
}

func (c *sshConn) reach(stage int64) {
	c.since.Store(int64(time.Since(c.s.start)))
	c.stage.Store(stage)
}

// Read pauses every 200 bytes, which are less than 8 packets, so that x/crypto's reader stays behind the one that handles them
// and its queue of 16 never fills. Were it waiting for room there when a handshake fails, which any stranger can bring about,
// it would wait for ever: two goroutines and what they hold, for each such connection (seen with x/crypto 0.58).
func (c *sshConn) Read(p []byte) (int, error) {
	const burst = 200
	if c.burst >= burst {
		time.Sleep(time.Millisecond)
		c.burst = 0
	}
	n, err := c.Conn.Read(p[:min(len(p), burst-c.burst)])
	c.burst += n
	if n > 0 && c.stage.Load() == silent {
		c.reach(talking)
	}
	if c.quota.Add(-int64(n)) < 0 {
		return 0, errors.New("sent too much")
	}
	return n, err
}

// Write gives the other side time to read. Before authentication the handshake's deadline holds.
func (c *sshConn) Write(p []byte) (int, error) {
	if c.stage.Load() == known {
		c.SetWriteDeadline(time.Now().Add(c.s.answer))
	}
	return c.Conn.Write(p)
}

func (c *sshConn) String() string {
	return fmt.Sprintf("%s (%q) user %q from %s", c.file, c.comment, c.user, c.RemoteAddr())
}

// evicted says why we closed the connection, if we did.
func (c *sshConn) evicted() error {
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	return c.why
}

// busy counts a connection's /do/ commands. While there is none it is closed in time: after it idled, or, so that an answer
// still arrives, soon after ctx is done.
func (c *sshConn) busy(ctx context.Context, n int) {
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	c.since.Store(int64(time.Since(c.s.start)))
	if c.running += n; c.running > 0 {
		c.SetReadDeadline(time.Time{})
	} else if ctx.Err() != nil {
		c.SetReadDeadline(time.Now().Add(time.Second))
	} else {
		c.SetReadDeadline(time.Now().Add(c.s.idle))
	}
}

// enter puts a connection among those before (0) or after (1) authentication. If they are too many another is closed: not the
// newest, for an operator comes late to a flood, but the one that got no further for the longest time, a stage being worth a
// second; of the source that has most if that is more than a quarter. Someone who needs 0.1 s for a stage is thus pushed out
// only by 640 connections a second that get as far, from the same place. A connection that runs a /do/ command stays.
func (s *sshServer) enter(c *sshConn, group int, from string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.open[0], c)
	s.open[group][c], c.from = true, from
	held := map[string]int{}
	for o := range s.open[group] {
		held[o.from]++
	}
	score := func(o *sshConn) time.Duration {
		since, stage := time.Duration(o.since.Load()), o.stage.Load()
		if stage == silent && time.Since(s.start)-since < 20*time.Millisecond {
			stage = talking // its first words may be on their way
		}
		return since + time.Duration(stage)*time.Second - time.Duration(max(held[o.from], maxConns/4))*time.Hour
	}
	victim := c
	for o := range s.open[group] {
		if o != c && o.running == 0 && (victim == c || score(o) < score(victim)) {
			victim = o
		}
	}
	if len(s.open[group]) > maxConns {
		delete(s.open[group], victim)
		victim.why = errors.New("too many connections")
		victim.Close()
	}
}

// serve answers on l until ctx is done. Commands that run then get what Service.do returns; everything is closed, and serve
// returns, after 10 s at the latest.
func (s *sshServer) serve(ctx context.Context, l net.Listener) {
	defer context.AfterFunc(ctx, func() { l.Close() })()
	for ctx.Err() == nil {
		nc, err := l.Accept()
		if err == nil {
			c := &sshConn{Conn: nc, s: s}
			c.quota.Store(strangerBytes)
			c.reach(silent)
			host, _, _ := net.SplitHostPort(nc.RemoteAddr().String())
			s.enter(c, 0, host)
			s.tasks.Go(func() { s.handle(ctx, c) })
		} else if ctx.Err() == nil { // EMFILE, ECONNABORTED and such: it may be better soon
			s.log(ctx, fmt.Sprintf("ssh: %v; trying again", err))
			time.Sleep(100 * time.Millisecond)
		}
	}
	ended := make(chan bool)
	go func() { s.tasks.Wait(); close(ended) }()
	select {
	case <-ended:
	case <-time.After(s.answer):
		s.mu.Lock()
		defer s.mu.Unlock()
		for _, group := range s.open {
			for c := range group {
				c.Close()
			}
		}
	}
}

// log logs what strangers cause: one line a second, the others only with --debug.
func (s *sshServer) log(ctx context.Context, msg string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	level := slog.LevelDebug
	if now := time.Now(); now.Before(s.nextLog) {
		s.unlogged++
	} else {
		if s.unlogged > 0 {
			msg += fmt.Sprintf(" (and %d more since the last such line)", s.unlogged)
		}
		level, s.unlogged, s.nextLog = slog.LevelInfo, 0, now.Add(time.Second)
	}
	slog.Log(ctx, level, msg)
}

// handle serves one connection.
func (s *sshServer) handle(ctx context.Context, c *sshConn) {
	defer func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.open[0], c)
		delete(s.open[1], c)
		c.Close()
	}()
	c.SetDeadline(time.Now().Add(s.handshake))
	config := *s.config
	config.PreAuthConnCallback = func(ssh.ServerPreAuthConn) { c.reach(exchanged) }
	var refused error // a key: it says more than what the client says when it leaves
	config.AuthLogCallback = func(_ ssh.ConnMetadata, method string, err error) {
		if method == "publickey" && err != nil {
			refused = err
		}
	}
	defer context.AfterFunc(ctx, func() { c.busy(ctx, 0) })()
	conn, channels, requests, err := ssh.NewServerConn(c, &config)
	if err != nil {
		msg := fmt.Sprintf("ssh: %s: closed before authentication: %s", c.RemoteAddr(), printable(cmp.Or(c.evicted(), refused, err).Error(), 300))
		if err == io.EOF && c.stage.Load() == silent { // a monitoring system looks whether the port is open
			slog.Debug(msg)
		} else {
			s.log(ctx, msg)
		}
		return
	}
	// The rights are those of the key that authenticated, never of the last one offered.
	ext := conn.Permissions.Extensions
	c.file, c.comment, c.write, c.user = ext["file"], ext["comment"], ext["write"] == "true", printable(conn.User(), 32)
	c.quota.Store(knownBytes)
	c.reach(known)
	s.enter(c, 1, c.file+" "+c.comment)
	c.busy(ctx, 0)
	slog.Debug(fmt.Sprintf("ssh: %s connected", c))
	go ssh.DiscardRequests(requests) // RFC 4254 section 7.1, forwarding, and all else that is asked of a connection: refused
	sessions := make(chan bool, maxSessions)
	for nc := range channels {
		if nc.ChannelType() != "session" {
			nc.Reject(ssh.Prohibited, "only commands are served")
			continue
		}
		select {
		case sessions <- true:
			s.tasks.Go(func() { s.session(ctx, c, nc); <-sessions })
		default:
			nc.Reject(ssh.ResourceShortage, "too many sessions")
		}
	}
	if err := c.evicted(); err != nil {
		s.log(ctx, fmt.Sprintf("ssh: %s: closed: %v", c, err))
	}
}

// session serves one session: a single exec request, RFC 4254 section 6.5. It ends when the client closes it too, so that those
// which one left open count.
func (s *sshServer) session(ctx context.Context, c *sshConn, nc ssh.NewChannel) {
	ch, requests, err := nc.Accept()
	if err != nil {
		return
	}
	go io.Copy(io.Discard, ch) // else x/crypto keeps 2 MiB for us
	go io.Copy(io.Discard, ch.Stderr())
	used := false
	for r := range requests { // never wait here: it would stop the whole connection, and for ever
		switch {
		case !used && r.Type == "exec":
			used = true
			r.Reply(true, nil)
			s.tasks.Go(func() { s.exec(ctx, c, ch, r.Payload) })
		case !used && r.Type == "shell": // the answer to an empty command says what to do instead
			used = true
			r.Reply(true, nil)
			s.tasks.Go(func() { s.exec(ctx, c, ch, nil) })
		case !used && r.Type == "subsystem":
			used = true
			r.Reply(false, nil)
			ch.Close()
		default:
			r.Reply(false, nil)
		}
	}
}
