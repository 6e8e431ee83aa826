//go:build linux

package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha1"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Bounds of what a commit may show at a service's links, of a commit or tree object, and of a walk over
// history.
const (
	treeEntries = 100_000
	treeDepth   = 64
	maxShown    = 2 << 30
	maxObject   = 64 << 20
	maxTree     = 16 << 20
	maxHistory  = 100_000
	maxHead     = 1 << 20 // of a commit, up to its author: 20,000 parents
)

// damaged says that the clone lacks an object that it should have, or has a wrong one in its place.
type damaged struct{ error }

func (d damaged) Unwrap() error { return d.error }

// errMissing says that git has no object of that id.
var errMissing = errors.New("is not in the clone")

// objects reads objects by their ids from one git cat-file --batch, and computes each id itself. It never
// asks upstream (there is no remote in the skeleton that it reads through), sees what a later fetch brings,
// and is for one goroutine.
type objects struct {
	u       *upstream
	hurt    *error // of the clone that it reads
	in, out *os.File
	answers *bufio.Reader
	end     context.CancelFunc
	ended   chan error // how git ended
	left    int64      // bytes of blobs that may still be copied
	err     error      // after which nothing more is read

	trees map[string][]entry // by id: services share those above their links, and a bomb is made of few
	kept  int                // entries in trees
}

// open starts reading objects of the clone as it is, without network. Where the account of the clone's user
// does not exist, or there is no clone, it is an error. When ctx is done, reading ends at once.
func (u *upstream) open(ctx context.Context) (*objects, error) {
	a, err := u.account(ctx)
	if err != nil {
		return nil, err
	}
	if !lexists(u.dir + "/read/config") {
		return nil, fmt.Errorf("there is no clone of %s yet", redact(u.url))
	}

	inRead, in, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	out, outWrite, err := os.Pipe()
	if err != nil {
		return nil, errors.Join(err, inRead.Close(), in.Close())
	}
	cmd := u.reader(a, "cat-file", "--batch")
	cmd.Stdin, cmd.Stdout = inRead, outWrite
	ctx, cancel := context.WithCancel(ctx)
	o := &objects{u: u, in: in, out: out, answers: bufio.NewReaderSize(out, 64<<10), end: cancel}
	o.ended, o.left, o.trees = make(chan error, 1), maxShown, map[string][]entry{}
	u.mu.Lock()
	o.hurt = u.hurt
	u.mu.Unlock()

	// Somebody else's process may hold the pipes open, so that git's end alone does not end a read.
	context.AfterFunc(ctx, func() {
		_, _ = in.Close(), out.Close()
	})
	go func() {
		_, err := runGit(ctx, "cat-file", cmd, fetchLimit)
		_, _ = inRead.Close(), outWrite.Close()
		o.ended <- err
	}()
	return o, nil
}

// close ends git. It may be called twice.
func (o *objects) close() {
	o.end()
	o.err = errors.Join(o.err, os.ErrClosed)
}

// blob copies a blob to w; whatever was copied counts only if there is no error. It is a *refusal if more
// than 2 GiB would have been copied since open, or if the id names something else than a blob. Of an id that
// is missing, the tips are walked anew at the next look.
func (o *objects) blob(id string, w io.Writer) (size int64, err error) {
	size, err = o.copy(id, "blob", o.left, w)
	o.left -= size
	if errors.Is(err, errMissing) {
		o.u.forget()
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
	if errors.Is(err, errMissing) {
		return 0, fmt.Errorf("%s %.12s %w", kind, id, err)
	}
	if err == nil && size > limit {
		err = &refusal{Reason: "link", Info: fmt.Sprintf("%s %.12s: more than %d MiB", kind, id, limit>>20)}
	}
	if err == nil {
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
	until := time.Now().Add(o.u.patience + time.Duration(size>>20)*time.Second)
	_ = errors.Join(o.in.SetWriteDeadline(until), o.out.SetReadDeadline(until))
}

// header asks for an object and reads the first line of the answer: 606eb576... commit 240, or 606eb576...
// missing.
func (o *objects) header(id, kind string) (size int64, err error) {
	if !isHash(id) {
		return 0, fmt.Errorf("%.80q is no object id", id)
	}
	if _, err := io.WriteString(o.in, id+"\n"); err != nil {
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
			err = fmt.Errorf("%w: %w", err, end)
			if exit := (*exec.ExitError)(nil); errors.As(end, &exit) && exit.ExitCode() == 128 {
				err = damaged{err}
			}
		case <-time.After(o.u.patience):
		}
	}
	if errors.As(err, &damaged{}) {
		o.u.hurts(o.hurt, err)
	}
	o.err = err
	o.end()
	return err
}

// newHash returns the hash function whose ids have so many hex digits.
func newHash(digits int) hash.Hash {
	if digits == sha256.Size*2 {
		return sha256.New()
	}
	return sha1.New()
}

// isHash says whether s is the full id of an object, SHA-1 or SHA-256.
func isHash(s string) bool {
	known := len(s) == 40 || len(s) == 64
	return known && strings.Trim(s, "0123456789abcdef") == ""
}

// commitObject is what a commit says: the id of its tree, its parents, and when it was made; zero where that
// makes no sense.
type commitObject struct {
	top     string
	parents []string
	at      time.Time
}

// commit reads a commit. See gitformat-commit-graph(5), git-cat-file(1):
//
//	tree 29ff16c9...
//	parent 606eb576...
//	author Ann <ann@example.org> 1767225600 +0100
//	committer ...
func (o *objects) commit(id string) (c commitObject, err error) {
	data, err := o.whole(id, "commit")
	if err != nil {
		return c, err
	}
	var ids []string
	if head := commitHead.FindSubmatch(data[:min(len(data), maxHead)]); head != nil {
		for i, word := range strings.Fields(string(head[1])) {
			if i%2 == 1 {
				ids = append(ids, word)
			}
		}
		// A year of four digits, as RFC 1123 has it, fits 38 bits.
		if seconds, err := strconv.ParseInt(string(head[2]), 10, 38); err == nil {
			c.at = time.Unix(seconds, 0)
		}
	}
	isOdd := func(s string) bool { return len(s) != len(id) }
	if ids == nil || slices.ContainsFunc(ids, isOdd) {
		info := fmt.Sprintf("commit %.8s is malformed: it begins with %.160q", id, data)
		return c, &refusal{version: version{id, digest("link", id)}, Reason: "link", Info: info}
	}
	c.top, c.parents = ids[0], ids[1:]
	return c, nil
}

var commitHead = regexp.MustCompile(`^(tree [0-9a-f]+\n(?:parent [0-9a-f]+\n)*)author ` +
	`(?:.*\ncommitter .* (\d+) [-+]\d+\n)?`)

// history calls visit with each commit that can be reached from one, that first, until visit returns false
// or 100,000 have been visited. Each is hashed.
func (u *upstream) history(ctx context.Context, from string, visit func(id string) bool) error {
	o, err := u.open(ctx)
	if err != nil {
		return err
	}
	defer o.close()

	seen := map[string]bool{from: true}
	queue := []string{from}
	for len(queue) > 0 {
		id := queue[0]
		queue = queue[1:]
		if !visit(id) {
			return nil
		}
		c, err := o.commit(id)
		if err != nil {
			return err
		}
		for _, p := range c.parents {
			if !seen[p] && len(seen) < maxHistory {
				seen[p] = true
				queue = append(queue, p)
			}
		}
	}
	return nil
}

// find returns the commits that a hash of 4 to 64 digits names, of those that ran here and of the history of
// branch's tip; only of its 100,000 newest, where it is not a whole id.
func (u *upstream) find(ctx context.Context, branch, hash string, ran []string) ([]string, error) {
	var commits []string
	var err error
	note := func(id string) bool {
		if strings.HasPrefix(id, hash) {
			commits = append(commits, id)
		}
		return true
	}
	for _, c := range ran {
		note(c)
	}
	tip := u.looked(branch).tip
	switch {
	case tip == "", slices.Contains(commits, hash):
	case isHash(hash): // no other commit can be made to have this name: git's word is enough
		var isIn bool
		if isIn, err = u.isAncestor(ctx, hash, tip); isIn {
			note(hash)
		}
	default:
		err = u.history(ctx, tip, note)
	}
	slices.Sort(commits)
	return slices.Compact(commits), err
}

// isAncestor asks git whether a commit is in the history of another one; one that is not there is not.
func (u *upstream) isAncestor(ctx context.Context, commit, of string) (bool, error) {
	a, err := u.account(ctx)
	if err != nil {
		return false, err
	}
	cmd := u.reader(a, "merge-base", "--is-ancestor", commit, of)
	_, err = runGit(ctx, "merge-base", cmd, fetchLimit)
	if errors.As(err, new(*exec.ExitError)) && ctx.Err() == nil {
		return false, nil
	}
	return err == nil, err
}

// descends returns nil if commit is older, or descends from it, or older is empty; else a *refusal (Reason
// signers).
func (u *upstream) descends(ctx context.Context, commit, older string) error {
	if older == "" || older == commit {
		return nil
	}
	met := false
	err := u.history(ctx, commit, func(id string) bool {
		met = id == older
		return !met
	})
	if err != nil || met {
		return err
	}
	info := fmt.Sprintf("commit %.8s does not descend from %.8s, which ran here: "+
		"push a signed commit on top of that", commit, older)
	return &refusal{version: version{Commit: commit}, Reason: "signers", Info: info}
}

// verify checks that a commit carries an SSH signature by one of the allowed signers, whose key is not in
// the file SIGNERS.revoked, if that exists: on the very bytes that were hashed, as git's gpg-interface.c
// does. It is a *refusal (Reason signers) if not, and another error where that could not be found out.
func (u *upstream) verify(ctx context.Context, commit, signers string) error {
	if _, err := os.Stat(signers); err != nil {
		return fmt.Errorf("signers: %w", err)
	}
	o, err := u.open(ctx)
	if err != nil {
		return err
	}
	defer o.close()
	data, err := o.whole(commit, "commit")
	if err != nil {
		return err
	}

	payload, signature, when := splitSignature(string(data), len(commit))
	isSSH := strings.HasPrefix(signature, "-----BEGIN SSH SIGNATURE-----")
	switch {
	case signature == "":
		err = errors.New("it carries no signature")
	case !isSSH, len(signature) > 16<<10:
		err = errors.New("it carries another kind of signature")
	default:
		err = verifySSH(ctx, signers, payload, signature, when)
	}
	exit := (*exec.ExitError)(nil)
	judged := errors.As(err, &exit) && exit.ExitCode() > 0
	switch {
	case err == nil:
		return nil
	case tooOld.MatchString(err.Error()):
		return fmt.Errorf("OpenSSH 8.2 or newer is needed for signers: %w", err)
	case strings.HasPrefix(err.Error(), "ssh-keygen") && !judged:
		return err // not there, killed, or took too long
	}
	info := fmt.Sprintf("commit %.8s is not signed by one of %s: %v", commit, signers, err)
	return &refusal{version: version{Commit: commit}, Reason: "signers", Info: info}
}

// tooOld is what an ssh-keygen that knows no -Y says.
var tooOld = regexp.MustCompile(`nknown option|illegal option|usage:`)

// splitSignature takes a commit apart into what was signed, the signature made for its kind of hash, and the
// committer's time. Lines of a header after its first begin with a blank.
func splitSignature(commit string, digits int) (payload, signature string, when time.Time) {
	head, message, _ := strings.Cut(commit, "\n\n")
	head += "\n"
	for _, m := range gpgsig.FindAllStringSubmatch(head, -1) {
		if isOfKind := (m[1] == "-sha256") == (digits == sha256.Size*2); isOfKind {
			signature += strings.ReplaceAll(m[2], "\n ", "\n")
		}
	}
	payload = gpgsigAny.ReplaceAllString(head, "") + "\n" + message
	if m := committer.FindStringSubmatch(head); m != nil {
		seconds, _ := strconv.ParseInt(m[1], 10, 64)
		when = time.Unix(seconds, 0)
	}
	return payload, signature, when
}

var (
	gpgsig    = regexp.MustCompile(`(?m)^gpgsig(|-sha256) (.*\n(?: .*\n)*)`)
	gpgsigAny = regexp.MustCompile(`(?m)^gpgsig.*\n(?: .*\n)*`)
	committer = regexp.MustCompile(`(?m)^committer .* (\d+) [-+]\d+$`)
)

// verifySSH asks ssh-keygen(1) whether a signature is by one of the signers. Times are in the host's time
// zone, as those in the signers file.
func verifySSH(ctx context.Context, signers, payload, signature string, when time.Time) error {
	at := "-Overify-time=" + when.Format("20060102150405")
	out, err := sshKeygen(ctx, "find-principals", "", signature, "-f", signers, at)
	if err != nil {
		return err
	}
	args := []string{"-n", "git", "-f", signers, at}
	if revoked := signers + ".revoked"; lexists(revoked) {
		args = append(args, "-r", revoked)
	}
	err = errors.New("no signer was named")
	for who := range strings.SplitSeq(strings.TrimSpace(string(out)), "\n") {
		if _, err = sshKeygen(ctx, "verify", payload, signature, append(args, "-I", who)...); err == nil {
			return nil
		}
	}
	return err
}

// sshKeygen runs ssh-keygen -Y; the signature is handed over by a pipe that it fits in.
func sshKeygen(ctx context.Context, verb, payload, signature string, args ...string) ([]byte, error) {
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer r.Close()
	_, err = io.WriteString(w, signature)
	if err := errors.Join(err, w.Close()); err != nil {
		return nil, err
	}
	cmd := exec.Command("ssh-keygen", append([]string{"-Y", verb, "-s", "/proc/self/fd/3"}, args...)...)
	cmd.Stdin, cmd.ExtraFiles = strings.NewReader(payload), []*os.File{r}
	words := &tail{}
	if verb == "verify" {
		cmd.Stdout = words // where it says what is wrong
	}
	return execute(ctx, program{name: "ssh-keygen -Y " + verb, cmd: cmd, limit: localLimit})
}
