//go:build linux

package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"
)

// objects reads objects by their ids from a git cat-file --batch, and computes each id itself. It never
// asks upstream, sees what a later fetch brings, and is for one goroutine.
type objects struct {
	*reader
	asked []string    // ids that git was given at its start, and did not answer yet
	left  int64       // bytes of blobs that may still be copied
	err   error       // after which nothing more is read
	keep  func() bool // ends the loan: false where its context has ended git; nil: closed
}

// reader is a git cat-file --batch, lent to one after another.
type reader struct {
	c       *clone
	started time.Time
	spareAt time.Time // when it was given back last
	in, out *os.File
	answers *bufio.Reader
	end     context.CancelFunc
	ended   chan error // how git ended

	trees map[string][]entry // by id: services share those above their links, and a bomb is made of few
	kept  int                // entries in trees
}

// How long a reader that was given back waits for the next to ask, how old it may be then, and how many
// entries of trees it keeps meanwhile, which is about 2 MB.
const (
	spareTime    = 2 * time.Second
	spareAge     = time.Minute
	spareEntries = 10_000
)

// open starts reading objects of the clone as it is, without network. Where the account of the clone's user
// does not exist, or there is no clone, it is an error. When ctx is done, reading ends at once. Where ids are
// given they are what will be read, in that order: git goes ahead then, which takes a fraction of the time.
func (u *upstream) open(ctx context.Context, ids ...string) (*objects, error) {
	c, err := u.ready(ctx)
	if err != nil {
		return nil, err
	}
	return c.open(ctx, ids...)
}

func (c *clone) open(ctx context.Context, ids ...string) (*objects, error) {
	o := &objects{asked: ids, left: maxShown}
	if isAhead := len(ids) > 0; !isAhead {
		o.reader = c.spareReader()
	}

	if o.reader == nil {
		var err error
		if o.reader, err = c.start(context.WithoutCancel(ctx), ids); err != nil {
			return nil, err
		}
	}
	o.keep = context.AfterFunc(ctx, o.end)
	return o, nil
}

// spareReader returns a reader that was given back, nil where there is none.
func (c *clone) spareReader() *reader {
	for {
		select {
		case r := <-c.spare:
			hasEnded := len(r.ended) > 0
			if isOld := time.Since(r.started) > spareAge; !hasEnded && !isOld {
				return r
			}
			r.end()
		default:
			return nil
		}
	}
}

// start starts a git.
func (c *clone) start(ctx context.Context, ids []string) (*reader, error) {
	if !lexists(c.dir + "/config") {
		return nil, fmt.Errorf("there is no clone of %s yet", redact(c.u.url))
	}
	inRead, in, err1 := os.Pipe()
	out, outWrite, err2 := os.Pipe()
	if err := errors.Join(err1, err2); err != nil {
		return nil, err // a pipe that nobody refers to closes itself
	}

	cmd := c.git("cat-file", "--batch")
	cmd.Stdin, cmd.Stdout = inRead, outWrite
	if len(ids) > 0 {
		cmd.Args = append(cmd.Args, "--buffer")
		cmd.Stdin = strings.NewReader(strings.Join(ids, "\n") + "\n")
	}

	ctx, cancel := context.WithCancel(ctx)
	r := &reader{
		c: c, started: time.Now(), in: in, out: out, answers: bufio.NewReaderSize(out, 64<<10), end: cancel,
		ended: make(chan error, 1), trees: map[string][]entry{},
	}

	// Somebody else's process may hold the pipes open, so that git's end alone does not end a read.
	context.AfterFunc(ctx, func() {
		_, _ = in.Close(), out.Close()
	})
	go func() {
		_, err := runGit(ctx, "cat-file", cmd, fetchLimit)
		_, _ = inRead.Close(), outWrite.Close()
		r.ended <- err
	}()
	return r, nil
}

// close gives git back to the next who asks for one, or ends it. It may be called twice, and of nil.
func (o *objects) close() {
	if o == nil || o.keep == nil {
		return
	}
	isInStep := o.keep() && o.err == nil
	mayAsk := o.asked == nil && time.Since(o.started) < spareAge

	o.keep, o.err = nil, errors.Join(o.err, os.ErrClosed)
	if isInStep && mayAsk {
		o.c.giveBack(o.reader)
	} else {
		o.end()
	}
}

// giveBack keeps a reader for a while.
func (c *clone) giveBack(r *reader) {
	r.spareAt = time.Now()
	if r.kept > spareEntries {
		r.trees, r.kept = map[string][]entry{}, 0
	}
	c.keepSpare(r)
	time.AfterFunc(spareTime, c.endSpare)
}

// keepSpare keeps a reader where there is room, and else ends it.
func (c *clone) keepSpare(r *reader) {
	select {
	case c.spare <- r:
	default:
		r.end()
	}
}

// endSpare ends the readers that nobody has asked for in a while.
func (c *clone) endSpare() {
	for range cap(c.spare) {
		r := c.spareReader()
		switch {
		case r == nil:
			return
		case time.Since(r.spareAt) < spareTime:
			c.keepSpare(r)
		default:
			r.end()
		}
	}
}

// blob copies a blob to w; whatever was copied counts only if there is no error. It is a *refusal if more
// than 2 GiB would have been copied since open, or if the id names something else than a blob. Of an id that
// is missing, the tips are walked anew at the next look.
func (o *objects) blob(id string, w io.Writer) (size int64, err error) {
	size, err = o.copy(id, "blob", o.left, w)
	o.left -= size
	if errors.Is(err, errMissing) {
		o.c.forget()
	}
	return size, err
}

// whole returns a commit or tree. The entries of a tree take ten times its size in memory.
func (o *objects) whole(id, kind string) ([]byte, error) {
	var b bytes.Buffer
	_, err := o.copy(id, kind, map[string]int64{"commit": maxObject, "tree": maxTree}[kind], &b)
	return b.Bytes(), err
}

// copy asks for one object, and copies it to w while its id is computed.
func (o *objects) copy(id, kind string, limit int64, w io.Writer) (size int64, err error) {
	if o.err != nil {
		return 0, o.err
	}

	o.expect(0)
	size, err = o.header(id, kind)
	switch {
	case errors.Is(err, errMissing):
		return 0, fmt.Errorf("%s %.12s %w", kind, id, err)
	case size > limit:
		err = &refusal{Reason: "link", Info: fmt.Sprintf("%s %.12s: more than %d MiB", kind, id, limit>>20)}
	case err == nil:
		err = o.body(id, kind, size, w)
	}
	if err != nil {
		return size, o.fail(fmt.Errorf("read %s %.12s: %w", kind, id, err))
	}
	return size, nil
}

// body copies what follows the first line of an answer.
func (o *objects) body(id, kind string, size int64, w io.Writer) error {
	o.expect(size)
	h := newHash(len(id))
	fmt.Fprintf(h, "%s %d\x00", kind, size)
	if _, err := io.CopyN(io.MultiWriter(h, w), o.answers, size); err != nil {
		return err
	}
	if end, err := o.answers.ReadByte(); err != nil || end != '\n' {
		return fmt.Errorf("git's answer has no end: %w", err)
	}
	if got := hex.EncodeToString(h.Sum(nil)); got != id {
		return damaged{fmt.Errorf("%s %.12s of the clone is in truth %.12s", kind, id, got)}
	}
	return nil
}

// expect sets the time until which git must have answered with so many bytes: it may be stopped by the user
// whose it is.
func (o *objects) expect(size int64) {
	until := time.Now().Add(o.c.u.patience + time.Duration(size>>20)*time.Second)
	_ = errors.Join(o.in.SetWriteDeadline(until), o.out.SetReadDeadline(until))
}

// header asks for an object and reads the first line of the answer: 606eb576... commit 240, or 606eb576...
// missing.
func (o *objects) header(id, kind string) (size int64, err error) {
	if !isHash(id) {
		return 0, fmt.Errorf("%.80q is no object id", id)
	}

	if isNext := len(o.asked) > 0 && o.asked[0] == id; isNext {
		o.asked = o.asked[1:]
	} else if _, err := io.WriteString(o.in, id+"\n"); err != nil {
		return 0, errors.Join(err, io.EOF) // git ended: its own words say more
	}

	line, err := o.answers.ReadSlice('\n')
	if err != nil {
		return 0, err
	}
	if string(line) == id+" missing\n" {
		return 0, errMissing
	}

	var got, is string
	_, err = fmt.Sscanf(string(line), "%s %s %d\n", &got, &is, &size)
	switch {
	case err != nil, got != id, size < 0:
		return 0, fmt.Errorf("git answers %.80q", line)
	case is != kind:
		return 0, &refusal{Reason: "link", Info: fmt.Sprintf("object %.12s is a %s, not a %s", id, is, kind)}
	}
	return size, nil
}

// fail ends reading for good, for the answers are out of step. Where git ended by itself it found the clone
// damaged.
func (o *objects) fail(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		select {
		case end := <-o.ended:
			err = fmt.Errorf("%w: %w", err, orDamaged(end))
		case <-time.After(o.c.u.patience):
		}
	}

	if errors.As(err, &damaged{}) {
		o.c.noteDamage(err)
	}

	o.err = err
	o.end()
	return err
}
