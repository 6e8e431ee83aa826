//go:build linux

package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

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
		{"/list/log", true, 1, 1, "SERVICE", (*sshServer).listLog},
		{"/list/diff", false, 1, 2, "SERVICE [HASH]", (*sshServer).listDiff},
		{"/do/freeze", false, 1, maxRequest, "SERVICE [DURATION] [REASON...]", (*sshServer).change},
		{"/do/unfreeze", false, 1, 1, "SERVICE", (*sshServer).change},
		{"/do/rollback", false, 2, maxRequest, "SERVICE HASH [REASON...]", (*sshServer).change},
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
	answer    time.Duration                             // to take what we send, and for all to end
	tasks     sync.WaitGroup                            // connections, sessions, commands

	keyMu sync.Mutex // guards files
	files []*keyFile

	mu       sync.Mutex // guards what follows, and some fields of each connection
	conns    []*sshConn // in the order in which they came, or were authenticated
	nextLog  time.Time
	unlogged int
}

// newSSHServer loads the host key, or makes it if it is not there and makeKey says so (once, in the state
// directory), and the key files. machines are the config's entries in their order; actual is this host.
func newSSHServer(hostKeyFile string, makeKey bool, keys []key, machines []string, actual string,
	services []*Service) (*sshServer, error) {
	host, err := hostKey(hostKeyFile, makeKey)
	if err != nil {
		return nil, fmt.Errorf("host key %s: %w; make one with: ssh-keygen -t ed25519 -N '' -f FILE, "+
			"and say --hostkey FILE", hostKeyFile, err)
	}

	s := &sshServer{
		machines: machines, actual: actual, services: services, do: (*Service).do,
		handshake: 10 * time.Second, idle: time.Minute, answer: 10 * time.Second,
	}
	for _, k := range keys {
		f := &keyFile{key: k}
		if known, err := parseKeys(k.text); err == nil {
			f.keys, f.text = known, k.text // for when the file is wrong by now
		}
		if err := f.refresh(); f.keys == nil {
			return nil, err
		}
		s.files = append(s.files, f)
	}

	s.config = &ssh.ServerConfig{
		ServerVersion: "SSH-2.0-gitopper", MaxAuthTries: 6, PublicKeyCallback: s.authorize,
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
	defer time.AfterFunc(s.answer, func() { c.Close() }).Stop()
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
		fmt.Fprintln(ch.Stderr(), errorLine(err, c.who.write))
		exit.Status = 1
	}
	_, _ = ch.SendRequest("exit-status", false, ssh.Marshal(exit))
	_ = ch.Close()
}

func sshError(status, format string, args ...any) error {
	return &opError{status: status, err: fmt.Errorf(format, args...)}
}

// errorLine is how a client sees an error: HTTP status text first, and private words only for who may write.
func errorLine(err error, write bool) string {
	status := "Internal Server Error"
	if oe, ok := errors.AsType[*opError](err); ok {
		status = oe.status
	}
	return printable(status+": "+visitor{write: write}.told(err.Error()), 4000)
}

// parseRequest takes an exec request's payload apart: a string (RFC 4254 section 6.5) of printable words.
func parseRequest(payload []byte) ([]string, error) {
	if len(payload) > maxRequest {
		return nil, sshError("Bad Request", "a command has at most %d bytes", maxRequest)
	}
	var r struct{ Command string }
	if ssh.Unmarshal(payload, &r) != nil {
		r.Command = "" // as for a shell, which has no payload
	}
	if r.Command != printable(r.Command, maxRequest) {
		return nil, sshError("Bad Request", "a command is UTF-8 without control characters")
	}

	words := strings.Fields(r.Command)
	if len(words) == 0 {
		return nil, sshError("Bad Request", "no command, and no shell here; say one, such as /list/service")
	}
	return words, nil
}

// run answers a request, or refuses it with a line in the log.
func (s *sshServer) run(ctx context.Context, c *sshConn, payload []byte, step func(string)) (any, error) {
	c.busy(ctx, 0)
	words, err := parseRequest(payload)
	if err == nil {
		var r route
		if r, err = findRoute(words, c.who); err == nil {
			return r.run(s, ctx, c, words, step)
		}
	}
	slog.Warn(fmt.Sprintf("ssh: %q refused: %s: %s", strings.Join(words, " "), errorLine(err, false), c))
	return nil, err
}

// findRoute finds what the first word asks for, if who may ask that, and in so many words.
func findRoute(words []string, who visitor) (route, error) {
	routes := sshRoutes()
	i := slices.IndexFunc(routes, func(r route) bool { return r.path == words[0] })
	if i < 0 {
		return route{}, sshError("Not Found", "no command %q; there are /list/ and /do/", words[0])
	}

	r, n := routes[i], len(words)-1
	if !r.ro && !who.write {
		return route{}, sshError("Unauthorized", "key %s is read-only", who.comment)
	}
	if n < r.min || n > r.max {
		return route{}, sshError("Bad Request", "usage: %s", strings.TrimSpace(r.path+" "+r.usage))
	}
	return r, nil
}

func (s *sshServer) listMachines(context.Context, *sshConn, []string, func(string)) (any, error) {
	answer := ctl.Machines{Machines: []ctl.Machine{}}
	for i, m := range s.machines {
		if slices.Index(s.machines, m) == i { // one with several services has several entries
			answer.Machines = append(answer.Machines, ctl.Machine{Machine: m, Actual: s.actual})
		}
	}
	return answer, nil
}

func (s *sshServer) listServices(_ context.Context, c *sshConn, words []string, _ func(string)) (any, error) {
	services, answer := s.services, ctl.Services{Services: []ctl.Service{}}
	if len(words) > 1 {
		svc, err := s.service(words[1])
		if err != nil {
			return nil, err
		}
		services = []*Service{svc}
	}
	for _, svc := range services {
		st := svc.Status()
		info := st.Public
		if c.who.write {
			info = unmark(st.Info)
		}
		answer.Services = append(answer.Services, ctl.Service{
			Service: st.Service, Hash: fmt.Sprintf("%.8s", st.Commit), State: st.State, StateInfo: info,
			Change: date(st.Change), Pending: st.Pending, Committed: date(st.Committed),
		})
	}
	return answer, nil
}

// service finds a service by its name.
func (s *sshServer) service(name string) (*Service, error) {
	for _, svc := range s.services {
		if svc.Status().Service == name {
			return svc, nil
		}
	}
	return nil, sshError("Not Found", "no service %q on %s", name, s.actual)
}

// listLog tells of what ran, from the record, and of what waits. It runs nothing.
func (s *sshServer) listLog(_ context.Context, c *sshConn, words []string, _ func(string)) (any, error) {
	svc, err := s.service(words[1])
	if err != nil {
		return nil, err
	}
	rec, _, err := readRecord(recordFile(svc.stateDir, words[1]))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}

	st := svc.Status()
	answer := ctl.Log{
		Service: st.Service, Ran: []ctl.Ran{},
		Pending: append([]ctl.Commit{}, st.commits...), More: st.Pending - len(st.commits),
	}
	for _, r := range slices.Backward(rec.Ran[max(0, len(rec.Ran)-ranKept):]) {
		answer.Ran = append(answer.Ran, ctl.Ran{
			Hash: r.Commit, When: date(r.When), By: r.By, Outcome: c.who.told(r.Outcome),
		})
	}
	return answer, nil
}

// listDiff shows what a commit would change. Contents may be secret: it is for keys that may write.
func (s *sshServer) listDiff(ctx context.Context, _ *sshConn, words []string, _ func(string)) (any, error) {
	svc, err := s.service(words[1])
	if err != nil {
		return nil, err
	}
	hash := ""
	if len(words) > 2 {
		if hash, err = parseHash(words[2]); err != nil {
			return nil, err
		}
	}
	text, err := svc.preview(ctx, hash)
	return text, err
}

// date is a time as answers have it, empty where it is not known.
func date(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return t.UTC().Format(time.RFC1123)
}

// change has a service do something, and logs what came of it. The answer is the service's row, also where
// what was asked for was carried out, though not with the outcome that was hoped for.
func (s *sshServer) change(ctx context.Context, c *sshConn, words []string, step func(string)) (any, error) {
	err := s.carryOut(ctx, c, words, step)

	what, result := strings.TrimPrefix(words[0], "/do/"), "ok"
	if len(words) > 2 {
		what += fmt.Sprintf(" %q", strings.Join(words[2:], " "))
	}
	if err != nil {
		result = errorLine(err, true)
	}
	slog.Info(fmt.Sprintf("%s: %s by %s: %s", words[1], what, c, result))

	if oe, ok := errors.AsType[*opError](err); ok && oe.done {
		answer, _ := s.listServices(ctx, c, words[:2], nil) // the service is there
		return answer, err
	} else if err != nil {
		return nil, err
	}
	return s.listServices(ctx, c, words[:2], nil)
}

// carryOut does not stop when the client hangs up: what was asked for is done or fails, and the log says
// which.
func (s *sshServer) carryOut(ctx context.Context, c *sshConn, words []string, step func(string)) error {
	svc, err := s.service(words[1])
	if err != nil {
		return err
	}
	o, err := parseOp(words, time.Now())
	if err != nil {
		return err
	}

	o.who, o.step = fmt.Sprintf("%s (%s@%s)", c.who.comment, c.who.user, c.from), step
	c.busy(ctx, 1)
	defer c.busy(ctx, -1)
	return s.do(svc, ctx, o)
}

// parseOp reads the words of a /do/ command, whose number is right.
func parseOp(words []string, now time.Time) (op, error) {
	o, rest := op{verb: strings.TrimPrefix(words[0], "/do/")}, words[2:]
	switch {
	case o.verb == "rollback":
		hash, err := parseHash(rest[0])
		if err != nil {
			return o, err
		}
		o.hash, rest = hash, rest[1:]

	// A number first is meant as a duration, even if it is none: a typing error must not freeze for ever.
	case len(rest) > 0 && strings.IndexAny(strings.TrimLeft(rest[0], "+-."), "0123456789") == 0:
		d, ok := parseDuration(rest[0])
		if !ok {
			return o, sshError("Bad Request", "duration %q: want one word of numbers and s, m, h, d or w, "+
				"such as 90m, 1h30m or 2d, up to ten years; a reason begins with a letter", rest[0])
		}
		o.until, rest = now.Add(d), rest[1:]
	}

	o.reason = strings.Join(rest, " ")
	if len(o.reason) > maxReason {
		return o, sshError("Bad Request", "a reason has at most %d bytes", maxReason)
	}
	first, _, _ := strings.Cut(strings.ToLower(o.reason), " ")
	if o.verb == "freeze" && (first == "until" || first == "for") {
		return o, sshError("Bad Request", "a reason that begins with %q reads like an end: say an end as a "+
			"duration in one word, such as 90m, 1h30m, 2d or 1w, right after the service, and begin the "+
			"reason otherwise", first)
	}
	return o, nil
}

func parseHash(word string) (string, error) {
	hash := strings.ToLower(word)
	if len(hash) < 4 || len(hash) > 64 || strings.Trim(hash, "0123456789abcdef") != "" {
		return "", sshError("Bad Request", "hash %q: want 4 to 64 hex digits", word)
	}
	return hash, nil
}

// parseDuration reads 90m, 1h30m or 2d: time.ParseDuration knows no days, and more than we offer.
func parseDuration(word string) (time.Duration, bool) {
	units := map[byte]time.Duration{
		's': time.Second, 'm': time.Minute, 'h': time.Hour, 'd': 24 * time.Hour, 'w': 7 * 24 * time.Hour}
	var sum time.Duration
	for word != "" {
		digits := len(word) - len(strings.TrimLeft(word, "0123456789"))
		n, err := strconv.ParseInt(word[:digits], 10, 64)
		if err != nil || digits == len(word) {
			return 0, false
		}
		unit, ok := units[word[digits]]
		if !ok || n > int64((maxFreeze-sum)/unit) {
			return 0, false
		}
		sum, word = sum+time.Duration(n)*unit, word[digits+1:]
	}
	return sum, sum > 0
}

// What strangers, and clients that don't behave, can cost us at most.
const (
	maxConns      = 64       // before, and again after it: git needs most of the usual 1024 descriptors
	maxPerSource  = 48       // before authentication: a flood from one address shuts out no other one
	maxSessions   = 8        // of a connection
	strangerBytes = 64 << 10 // read from a connection before authentication
	knownBytes    = 16 << 20 // and after
)

// visitor is who authenticated.
type visitor struct {
	file, comment, user string
	write               bool
}

// told returns a text as a visitor may read it.
func (v visitor) told(text string) string {
	if v.write {
		return unmark(text)
	}
	return public(text)
}

// sshConn is a connection with limits: on bytes, pace and time.
type sshConn struct {
	net.Conn
	s     *sshServer
	from  string       // its address, without the port
	quota atomic.Int64 // bytes that may still be read
	burst int          // bytes read since the last pause
	who   visitor      // set once it is authenticated

	running int   // /do/ commands; guarded by s.mu, as is:
	why     error // we closed it
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
	_ = c.SetWriteDeadline(time.Now().Add(c.s.answer))
	return c.Conn.Write(p)
}

func (c *sshConn) String() string {
	return fmt.Sprintf("%s (%q) user %q from %s", c.who.file, c.who.comment, c.who.user, c.RemoteAddr())
}

// evicted says why we closed the connection, if we did.
func (c *sshConn) evicted() error {
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	return c.why
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
		deadline = time.Now().Add(c.s.idle)
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
	stranger := who == visitor{}
	var group, source []*sshConn
	for _, o := range s.conns {
		if (o.who == visitor{}) != stranger {
			continue
		}
		group = append(group, o)
		if o.from == c.from {
			source = append(source, o)
		}
	}

	if stranger && len(source) > maxPerSource {
		s.evictOldest(source)
	} else if len(group) > maxConns {
		s.evictOldest(group)
	}
}

// evictOldest closes one that runs no command; the newcomer is the last of them, and runs none.
func (s *sshServer) evictOldest(conns []*sshConn) {
	c := conns[slices.IndexFunc(conns, func(c *sshConn) bool { return c.running == 0 })]
	s.remove(c)
	c.why = errors.New("too many connections")
	_ = c.Close()
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
	case <-time.After(s.answer):
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
	if err := c.evicted(); err != nil {
		s.log(ctx, slog.LevelInfo, fmt.Sprintf("ssh: %s: closed: %v", c, err))
	}
}

// login does the handshake, and finds out who is there.
func (s *sshServer) login(ctx context.Context, c *sshConn) (<-chan ssh.NewChannel, error) {
	_ = c.SetReadDeadline(time.Now().Add(s.handshake))
	config := *s.config
	var refused error // a key: it says more than what the client says when it leaves
	config.AuthLogCallback = func(_ ssh.ConnMetadata, method string, err error) {
		if method == "publickey" && err != nil {
			refused = err
		}
	}

	conn, channels, requests, err := ssh.NewServerConn(c, &config)
	if err != nil {
		level, silent := slog.LevelInfo, c.quota.Load() == strangerBytes
		why := printable(cmp.Or(c.evicted(), refused, err).Error(), 300)
		msg := fmt.Sprintf("ssh: %s: closed before authentication: %s", c.RemoteAddr(), why)
		if err == io.EOF && silent { // a monitoring system looks whether the port is open
			slog.Debug(msg)
			return nil, err
		}
		if refused != nil {
			level = slog.LevelWarn
		}
		s.log(ctx, level, msg)
		return nil, err
	}

	// The rights are those of the key that authenticated, never of the last one offered.
	ext := conn.Permissions.Extensions
	c.quota.Store(knownBytes)
	s.enter(c, visitor{ext["file"], ext["comment"], printable(conn.User(), 32), ext["write"] == "true"})
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
		isCommand := r.Type == "exec" || r.Type == "shell" // a shell is told what to say
		if used || !isCommand {
			_ = r.Reply(false, nil)
			continue
		}
		used = true
		_ = r.Reply(true, nil)
		s.tasks.Go(func() { s.exec(ctx, c, ch, r.Payload) })
	}
}
