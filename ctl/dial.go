package ctl

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/crypto/ssh"
)

const (
	dialLimit   = 10 * time.Second // until logged in; also for a word from ssh-agent
	keysAtOnce  = 6                // sshd and gitopper stop asking after as many
	aliveEvery  = 15 * time.Second
	aliveLimit  = 3 * aliveEvery // a peer that owes a sign of life for so long is gone
	answerLimit = 2 << 20        // bytes: some 10,000 services, and bearable times 500 hosts
)

// host is a host as the operator named it, and its address in one canonical form.
type host struct{ name, addr string }

// parseHost reads @name, @name:port, @address, @[v6] or @[v6]:port. An empty port is 2222.
func parseHost(arg, port string) (host, error) {
	name := strings.TrimPrefix(arg, "@")
	h, p, err := net.SplitHostPort(name)
	if err != nil { // it has no port
		h, p = name, cmp.Or(port, "2222")
	}
	if inner, isBracketed := strings.CutPrefix(h, "["); isBracketed {
		h = strings.TrimSuffix(inner, "]")
		if h == inner {
			h = "" // the other bracket is missing
		}
	}
	h = strings.ToLower(h)

	ip, err := netip.ParseAddr(h)
	isIP := err == nil
	if isIP {
		h = ip.String()
	}

	// Nothing that has a meaning in known_hosts, where the name will be written.
	const good = "abcdefghijklmnopqrstuvwxyz0123456789.-_:%"
	n, err := strconv.ParseUint(p, 10, 16)
	switch {
	case strings.Contains(h, "@"):
		return host{}, fmt.Errorf("host %q: the key says who you are: leave the user name out", arg)
	case h == "", strings.Trim(h, good) != "":
		return host{}, fmt.Errorf("host %q: want @name, @name:port or @[v6]:port", arg)
	case !isIP && strings.Contains(h, ":"):
		return host{}, fmt.Errorf("host %q: %q is no IPv6 address", arg, h)
	case err != nil, n == 0:
		return host{}, fmt.Errorf("host %q: port %q: want a number from 1 to 65535", arg, p)
	}
	return host{name, net.JoinHostPort(h, strconv.FormatUint(n, 10))}, nil
}

// parseHosts returns each host once.
func parseHosts(args []string, port string) (hosts []host, err error) {
	for _, arg := range args {
		h, err := parseHost(arg, port)
		if err != nil {
			return nil, err
		}
		if !slices.ContainsFunc(hosts, func(other host) bool { return other.addr == h.addr }) {
			hosts = append(hosts, h)
		}
	}
	return hosts, nil
}

// client is what all questions have in common.
type client struct {
	way
	known  *knownHosts
	keys   *keys
	user   string
	stderr *lines
}

// question is a command for a host, and what its lines on stderr are labelled with.
type question struct {
	host   host
	label  string // of its errors
	prefix string // of what the host writes; empty: there is no other question
	path   string
	words  []string
}

// each asks all questions, some at a time, and hands the answers to use in the order of the questions. Each
// failure is a line on stderr.
func (c *client) each(ctx context.Context, questions []question, limit time.Duration,
	use func(question, []byte) error) error {
	type outcome struct {
		answer []byte // also of a /do/ that failed
		err    error
	}
	outcomes := make([]chan outcome, len(questions))
	slots := make(chan bool, c.parallel)

	for i, q := range questions {
		outcomes[i] = make(chan outcome, 1)
		go func() {
			slots <- true
			answer, err := c.ask(ctx, q, limit)
			<-slots
			outcomes[i] <- outcome{answer, err}
		}()
	}

	var failed error
	unanswered := 0
	for i, q := range questions {
		o := <-outcomes[i]
		err := o.err
		if err == nil || len(o.answer) > 0 {
			err = cmp.Or(err, use(q, o.answer))
		}
		switch {
		case err == nil:
		case ctx.Err() != nil:
			unanswered++
		default:
			failed = errTold
			c.stderr.print("gitopper ctl: " + q.label + ": " + err.Error())
		}
	}

	if unanswered > 0 {
		return fmt.Errorf("interrupted: no answer from %d of %d hosts; list service shows how things stand",
			unanswered, len(questions))
	}
	return failed
}

// errLost is in every error after which nobody knows what the host has done.
var errLost = errors.New("no answer")

// ask sends the request to the host and returns what it writes to stdout. Its stderr is passed on line by
// line, but for the last line of a request that fails, which is the error. It gives up after limit.
func (c *client) ask(ctx context.Context, q question, limit time.Duration) ([]byte, error) {
	conn, err := c.connect(ctx, q.host)
	if err != nil {
		return nil, err
	}
	defer conn.Close()

	ctx, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf("%w for %v", errLost, limit))
	defer cancel()
	ctx, lost := context.WithCancelCause(ctx)
	defer lost(nil)
	context.AfterFunc(ctx, func() { conn.Close() })
	go keepAlive(ctx, conn, lost)

	answer, err := c.exchange(conn, q)
	if cause := context.Cause(ctx); err != nil && cause != nil {
		err = cause
	}
	if errors.Is(err, errLost) && strings.HasPrefix(q.path, "/do/") {
		err = fmt.Errorf("%w; list service shows what became of it", err)
	}
	return answer, err
}

// errRefused says that a host takes none of the keys that it was shown.
var errRefused = errors.New("no key was accepted")

// connect returns a connection to a host that has proved to be the one, and that lets us in. A host that
// stops asking is asked again with the next keys.
func (c *client) connect(ctx context.Context, h host) (*ssh.Client, error) {
	rest := c.keys.signers
	for {
		keys := rest[:min(keysAtOnce, len(rest))]
		rest = rest[len(keys):]
		conn, err := c.login(ctx, h, keys)
		if !errors.Is(err, errRefused) {
			return conn, err
		}
		if len(rest) == 0 {
			return nil, fmt.Errorf("%w (%s): add one to the keys in that host's config, or name another "+
				"with -i", err, c.keys.tried())
		}
	}
}

// login is one try with some keys.
func (c *client) login(ctx context.Context, h host, keys []ssh.Signer) (*ssh.Client, error) {
	short, cancel := context.WithTimeoutCause(ctx, c.limit, fmt.Errorf("no answer for %v", c.limit))
	defer cancel()
	conn, err := c.dial(short, h.addr)
	if err != nil {
		return nil, err
	}

	stop := context.AfterFunc(short, func() { conn.Close() })
	sshConn, chans, reqs, err := ssh.NewClientConn(conn, h.addr, &ssh.ClientConfig{
		User:              c.user,
		Auth:              []ssh.AuthMethod{ssh.PublicKeys(slices.Clip(keys)...)},
		HostKeyAlgorithms: c.known.algorithms(h.addr),
		HostKeyCallback: func(addr string, _ net.Addr, key ssh.PublicKey) error {
			notice, err := c.known.verify(addr, key)
			if notice != "" {
				c.stderr.print("gitopper ctl: " + h.name + ": " + notice)
			}
			return err
		},
	})

	// x/crypto has no type for these errors; the second is the host's, and sshd writes it with a capital.
	said := strings.ToLower(fmt.Sprint(err))
	isRefused := strings.Contains(said, "unable to authenticate") ||
		strings.Contains(said, "too many authentication")

	var host hostKeyError
	switch {
	case !stop():
		_, port, _ := net.SplitHostPort(h.addr)
		return nil, fmt.Errorf("%w: is that gitopper, on port %s?", context.Cause(short), port)
	case err == nil:
		return ssh.NewClient(sshConn, chans, reqs), nil
	case errors.As(err, &host):
		return nil, host
	case isRefused:
		return nil, errRefused
	}

	if j, ok := conn.(*jump); ok {
		err = cmp.Or(<-j.trouble, err)
	}
	return nil, err
}

// keepAlive calls lost when the peer does not react any more. A dead peer sends nothing, not even an error,
// and a do command may rightly be silent for half an hour.
func keepAlive(ctx context.Context, conn ssh.Conn, lost context.CancelCauseFunc) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-time.After(aliveEvery):
		}

		dead := time.AfterFunc(aliveLimit, func() {
			lost(fmt.Errorf("%w: no sign of life for %v", errLost, aliveLimit))
		})
		_, _, err := conn.SendRequest("keepalive@openssh.com", true, nil)
		dead.Stop()
		if err != nil {
			return // closed: the exchange has noticed as well, and knows more
		}
	}
}

func (c *client) exchange(conn *ssh.Client, q question) ([]byte, error) {
	session, err := conn.NewSession()
	if err != nil {
		return nil, err
	}
	stdout, _ := session.StdoutPipe() // these two can't fail before the start
	stderr, _ := session.StderrPipe()

	request := strings.Join(slices.Insert(slices.Clone(q.words), 0, q.path), " ")
	if err := session.Start(request); err != nil {
		return nil, err
	}

	verdict := make(chan string, 1)
	go func() { verdict <- c.passOn(q.prefix, stderr) }()
	answer, err := io.ReadAll(io.LimitReader(stdout, answerLimit+1))
	if err == nil && len(answer) > answerLimit {
		return nil, fmt.Errorf("the answer is larger than %d bytes", answerLimit)
	}

	why := <-verdict
	err = cmp.Or(err, session.Wait())
	var exit *ssh.ExitError
	switch {
	case errors.As(err, &exit):
		why = cmp.Or(why, fmt.Sprintf("%s ended with status %d", request, exit.ExitStatus()))
		return answer, errors.New(why)
	case err != nil:
		return nil, fmt.Errorf("%w: connection lost: %w", errLost, err)
	}
	return answer, nil
}

// passOn prints each line as it comes, behind prefix, and returns the last if it is a verdict: an HTTP status
// text and what was wrong.
func (c *client) passOn(prefix string, stderr io.Reader) (verdict string) {
	statuses := []string{"Not Found", "Unauthorized", "Bad Request", "Not Acceptable", "Conflict",
		"Internal Server Error"}
	show := func(line string) { c.stderr.print(prefix + line) }

	scan := bufio.NewScanner(io.LimitReader(stderr, answerLimit))
	for scan.Scan() {
		if verdict != "" {
			show(verdict)
		}
		verdict = ""
		if status, _, _ := strings.Cut(scan.Text(), ":"); slices.Contains(statuses, status) {
			verdict = scan.Text()
		} else {
			show(scan.Text())
		}
	}

	io.Copy(io.Discard, stderr) // else a flood of it would hold up the answer
	return verdict
}
