package ctl

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strings"
	"time"
)

// way is how hosts are reached.
type way struct {
	dial     func(ctx context.Context, addr string) (net.Conn, error)
	limit    time.Duration // until logged in
	parallel int           // questions that are asked at the same time
}

// direct goes by dial, a net.Dialer's DialContext.
func direct(dial func(ctx context.Context, network, addr string) (net.Conn, error)) way {
	tcp := func(ctx context.Context, addr string) (net.Conn, error) {
		conn, err := dial(ctx, "tcp", addr)
		if err == nil {
			return conn, nil
		}

		_, port, _ := net.SplitHostPort(addr)
		hint := fmt.Sprintf(": does gitopper listen there, on port %s?", port)
		if _, isName := errors.AsType[*net.DNSError](err); isName {
			hint = ""
		}
		return nil, fmt.Errorf("%w%s", cmp.Or(context.Cause(ctx), err), hint)
	}
	return way{tcp, dialLimit, 32}
}

// jump is a connection through a bastion: a child that runs "ssh -W HOST:PORT BASTION". It ends with ctx, or
// when the connection is closed.
type jump struct {
	net.Conn
	trouble chan error // with the bastion, once the child has ended
}

// through goes through a bastion, which may ask the operator for something. An sshd takes ten strangers at a
// time, and then drops some.
func through(ctx context.Context, bastion string) way {
	ssh := func(_ context.Context, addr string) (net.Conn, error) {
		ours, theirs := net.Pipe()
		j := &jump{ours, make(chan error, 1)}
		ctx, end := context.WithCancel(ctx)
		cmd := exec.CommandContext(ctx, "ssh", "-W", addr, "--", bastion)

		// A prompt puts the terminal right when it is interrupted. What does not end then is killed.
		cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
		cmd.WaitDelay = time.Second
		var said bytes.Buffer
		cmd.Stdout, cmd.Stderr = theirs, &said

		in, _ := cmd.StdinPipe() // can't fail before the start
		if err := cmd.Start(); err != nil {
			end()
			return nil, fmt.Errorf("bastion %s: %w: -J needs OpenSSH's ssh", bastion, err)
		}

		go func() {
			if _, err := io.Copy(in, theirs); err == nil {
				end() // we have closed our end
			}
		}()
		go func() {
			err := cmd.Wait()
			byItself := ctx.Err() == nil
			if err != nil && byItself {
				j.trouble <- fmt.Errorf("bastion %s: %s", bastion, lastWords(said.String()))
			}
			close(j.trouble)
			theirs.Close()
		}()
		return j, nil
	}
	return way{ssh, time.Minute, 8}
}

// lastWords returns the last lines of what ssh said: a banner may stand before them.
func lastWords(said string) string {
	lines := strings.FieldsFunc(said, func(r rune) bool { return strings.ContainsRune("\r\n", r) })
	return cmp.Or(strings.Join(lines[max(0, len(lines)-2):], "; "), "ssh ended without a word")
}
