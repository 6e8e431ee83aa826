package ctl

import (
	"bytes"
	"context"
	"errors"
	"net"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/crypto/ssh"
)

func TestParseHost(t *testing.T) {
	for _, tt := range []struct{ arg, port, name, addr string }{
		{"@web1", "", "web1", "web1:2222"},
		{"@Web1.Example.com", "", "Web1.Example.com", "web1.example.com:2222"},
		{"@web1", "22", "web1", "web1:22"},
		{"@web1:23", "22", "web1:23", "web1:23"},
		{"@web1:0023", "", "web1:0023", "web1:23"},
		{"@10.0.0.1", "", "10.0.0.1", "10.0.0.1:2222"},
		{"@::1", "", "::1", "[::1]:2222"},
		{"@[::1]", "", "[::1]", "[::1]:2222"},
		{"@[::1]:23", "", "[::1]:23", "[::1]:23"},
		{"@0:0::1", "", "0:0::1", "[::1]:2222"},
		{"@fe80::1%eth0", "", "fe80::1%eth0", "[fe80::1%eth0]:2222"},
		{"@", "", "", ""},
		{"@:23", "", "", ""},
		{"@web1:", "", "", ""},
		{"@web1:ssh", "", "", ""},
		{"@web1:-1", "", "", ""},
		{"@web1:65536", "", "", ""},
		{"@web1", "0", "", ""},
		{"@root@web1", "", "", ""},
		{"@a:b:c", "", "", ""},
		{"@[::1]x", "", "", ""},
		{"@a,b", "", "", ""},
		{"@*", "", "", ""},
		{"@a b", "", "", ""},
		{"@|1|a|b", "", "", ""},
		{"@fe80::1%a b", "", "", ""},
	} {
		h, err := parseHost(tt.arg, tt.port)
		if (err != nil) != (tt.addr == "") || err == nil && h != (host{tt.name, tt.addr}) {
			t.Errorf("%s -p %s: got %v, %v", tt.arg, tt.port, h, err)
		}
	}
}

// pipe is a connection inside a synctest bubble. Writes never wait: both ends of ssh write before they read.
func pipe(t *testing.T) (net.Conn, net.Conn) {
	a, b := net.Pipe()
	return async(t, a), async(t, b)
}

type asyncConn struct {
	net.Conn
	queue chan []byte
}

func async(t *testing.T, conn net.Conn) net.Conn {
	a := &asyncConn{conn, make(chan []byte, 1000)}
	go func() {
		for {
			select {
			case p := <-a.queue:
				if _, err := conn.Write(p); err != nil {
					return
				}
			case <-t.Context().Done():
				return
			}
		}
	}()
	return a
}

func (a *asyncConn) Write(p []byte) (int, error) {
	a.queue <- bytes.Clone(p)
	return len(p), nil
}

// RemoteAddr is one that known_hosts can make sense of.
func (a *asyncConn) RemoteAddr() net.Addr {
	return &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 2222}
}

func TestTimeouts(t *testing.T) {
	home(t)
	for _, tt := range []struct {
		name    string
		play    func(conn net.Conn, config *ssh.ServerConfig) // the server's side
		request string
		limit   time.Duration
		want    string
		after   time.Duration
	}{
		{"accepts and says nothing", func(net.Conn, *ssh.ServerConfig) {}, "/list/service", listLimit,
			"no answer for 10s: is that gitopper, on port 2222?", dialLimit},
		{"logs in and does not answer", func(conn net.Conn, config *ssh.ServerConfig) { standstill(conn, config, true) },
			"/list/service", listLimit, "no answer for 30s", listLimit},
		{"works for too long", func(conn net.Conn, config *ssh.ServerConfig) { standstill(conn, config, true) },
			"/do/pull x", doLimit, "no answer for 1h0m0s; list service shows what became of it", doLimit},
		{"loses its power", func(conn net.Conn, config *ssh.ServerConfig) { standstill(conn, config, false) },
			"/do/pull x", doLimit, "no answer: no sign of life for 45s; list service shows what became of it", aliveEvery + aliveLimit},
	} {
		t.Run(tt.name, func(t *testing.T) {
			known, err := openKnownHosts(t.TempDir() + "/known_hosts")
			if err != nil {
				t.Fatal(err)
			}
			config := &ssh.ServerConfig{NoClientAuth: true}
			config.AddHostKey(newKey(t))
			synctest.Test(t, func(t *testing.T) {
				ours, theirs := pipe(t)
				go tt.play(theirs, config)
				var stderr bytes.Buffer
				c := &client{known: known, keys: &keys{}, stderr: &lines{w: &stderr},
					way: way{limit: dialLimit, dial: func(context.Context, string) (net.Conn, error) { return ours, nil }}}
				start := time.Now()
				_, err := c.ask(t.Context(), question{host: host{"h", "h:2222"}, path: tt.request}, tt.limit)
				if err == nil || err.Error() != tt.want {
					t.Errorf("got %v, want %s", err, tt.want)
				}
				if took := time.Since(start); took != tt.after {
					t.Errorf("took %v, want %v", took, tt.after)
				}
				theirs.Close()
				ours.Close()
			})
		})
	}
}

// standstill is a server that accepts a request and then does nothing but, if alive, answer keepalives.
func standstill(conn net.Conn, config *ssh.ServerConfig, alive bool) {
	_, chans, reqs, err := ssh.NewServerConn(conn, config)
	if err != nil {
		return
	}
	if alive {
		go ssh.DiscardRequests(reqs)
	} else {
		go func() {
			for range reqs {
			}
		}()
	}
	for ch := range chans {
		_, reqs, err := ch.Accept()
		if err != nil {
			return
		}
		go func() {
			for r := range reqs {
				r.Reply(true, nil)
			}
		}()
	}
}

func TestDialTimeout(t *testing.T) {
	known, err := openKnownHosts(t.TempDir() + "/known_hosts")
	if err != nil {
		t.Fatal(err)
	}
	synctest.Test(t, func(t *testing.T) {
		c := &client{known: known, keys: &keys{}, way: direct(func(ctx context.Context, _, _ string) (net.Conn, error) {
			<-ctx.Done()
			return nil, errors.New("i/o timeout")
		})}
		_, err := c.ask(t.Context(), question{host: host{"h", "h:2222"}, path: "/list/service"}, listLimit)
		if err == nil || err.Error() != "no answer for 10s: does gitopper listen there, on port 2222?" {
			t.Error(err)
		}
	})
}

// Junk from a peer that isn't gitopper ends in one clear line.
func TestJunk(t *testing.T) {
	home(t)
	for _, junk := range []string{"HTTP/1.1 400 Bad Request\r\n\r\n", "SSH-2.0-x\r\n\x00\x00\x00\x00", "\x00\xff\x1b[2J"} {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		go func() {
			if conn, err := l.Accept(); err == nil {
				conn.Write([]byte(junk))
				conn.Close()
			}
		}()
		status, _, stderr := call(t, "list", "service", "@"+l.Addr().String())
		if status != 1 || strings.Count(stderr, "\n") != 1 || strings.Contains(stderr, "\x1b") {
			t.Errorf("%q: status %d, stderr %q", junk, status, stderr)
		}
		l.Close()
	}
}
