//go:build linux

package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unicode"
	"unsafe"
)

// localLimit bounds programs that need no network and have no limit of their own.
const localLimit = time.Minute

// stopping is how our end is told to what works: soft is done when no new step may be begun, and ends what
// only waits; hard is done ten seconds later, for steps that must not be cut in two.
type stopping struct{ soft, hard context.Context }

// program is a program to be run, and what bounds it.
type program struct {
	name  string // for errors and the log
	cmd   *exec.Cmd
	limit time.Duration  // of its run
	end   syscall.Signal // what its process group gets at the limit, or when the context is done; 0: SIGKILL

	memory, fileSize uint64 // RLIMIT_DATA and RLIMIT_FSIZE in bytes; 0: as ours
	oomScoreAdj      int    // 0: as ours
	private          bool   // its words may quote what only those who may write should read, see quote
}

// sacrifice is the oomScoreAdj of those that are killed first when memory is short.
const sacrifice = 1000

// execute runs a program to its end and returns its standard output, unless cmd.Stdout takes that. It is the
// only way in which programs are run: without a shell, in the C locale, in a session of its own. When ctx is
// done or the limit has passed, its process group gets the end signal; after SIGKILL nothing is waited for,
// while a program that was only asked to end is waited for as long as it takes. What it leaves behind in its
// group is killed. The error holds its last words, or names the limit.
func execute(ctx context.Context, p program) ([]byte, error) {
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("%s: %w", p.name, err)
	}

	var stdout bytes.Buffer
	words := &tail{}
	switch to := p.cmd.Stdout.(type) {
	case nil:
		p.cmd.Stdout = &bounded{to: &stdout}
	case *tail:
		words = to
	}
	if p.cmd.Stderr == nil {
		p.cmd.Stderr = words
	}
	if p.cmd.Env == nil {
		p.cmd.Env = os.Environ()
	}
	p.cmd.Env = append(p.cmd.Env, "LC_ALL=C")
	if p.cmd.SysProcAttr == nil {
		p.cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	p.cmd.SysProcAttr.Setsid = true // and so no terminal, into which a user's program could type
	// A daemon that the program leaves behind may hold the pipes open: it is not waited for.
	p.cmd.WaitDelay = 3 * time.Second
	if p.end == 0 {
		p.end = syscall.SIGKILL
	}

	start := time.Now()
	err := p.cmd.Start()
	if err == nil {
		p.bound()
		err = p.wait(ctx)
	}
	if err != nil {
		if w := words.last(); w != "" && p.private {
			err = fmt.Errorf("%w%s", err, quote(": "+w))
		} else if w != "" {
			err = fmt.Errorf("%w: %s", err, w)
		}
		err = fmt.Errorf("%s: %w", p.name, err)
	}

	uid := os.Getuid()
	if c := p.cmd.SysProcAttr.Credential; c != nil {
		uid = int(c.Uid)
	}
	slog.Debug(fmt.Sprintf("run %q", p.cmd.Args), "dir", p.cmd.Dir, "uid", uid,
		"took", time.Since(start).Round(time.Millisecond), "error", err)
	return stdout.Bytes(), err
}

// batch lets callers share runs of do, of which there is one at a time. A run serves all who came before it
// began, and nobody who came later: no answer is older than its question.
type batch[T any] struct {
	do   func(ctx context.Context, names []string) ([]T, error) // answers in the order of the names
	busy sync.Mutex                                             // held by the run under way
	many int                                                    // callers of the run before; guarded by busy
	mu   sync.Mutex                                             // guards next, and what callers change in it
	next *batchRun[T]                                           // gathers callers until it begins
}

// gathering is how long a run waits for more callers where the run before had several.
const gathering = 50 * time.Millisecond

// batchRun is one run of a batch.
type batchRun[T any] struct {
	names   []string
	waiting int                // callers that have not left
	end     context.CancelFunc // ends do, when all have
	done    chan struct{}      // closed when what follows is there
	answers []T
	err     error
}

// ask returns a run's answer to name; alone says that an error is not another name's. When ctx is done it
// returns, and leaves the run to the others.
func (b *batch[T]) ask(ctx context.Context, name string) (answer T, alone bool, err error) {
	b.mu.Lock()
	r := b.next
	if r == nil {
		r = &batchRun[T]{done: make(chan struct{}), end: func() {}}
		b.next = r
		go b.run(context.WithoutCancel(ctx), r)
	}
	i := len(r.names)
	r.names = append(r.names, name)
	r.waiting++
	b.mu.Unlock()

	select {
	case <-r.done:
		if r.err == nil {
			answer = r.answers[i]
		}
		return answer, len(r.names) == 1, r.err
	case <-ctx.Done():
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if r.waiting--; r.waiting == 0 {
		r.end()
	}
	return answer, true, ctx.Err()
}

// run does r, when the run before it has ended and somebody still waits for it.
func (b *batch[T]) run(ctx context.Context, r *batchRun[T]) {
	b.busy.Lock()
	defer b.busy.Unlock()
	defer close(r.done)
	ctx, end := context.WithCancel(ctx)
	defer end()
	if b.many > 1 {
		time.Sleep(gathering)
	}

	b.mu.Lock()
	b.next, r.end = nil, end
	isWanted := r.waiting > 0
	b.many = len(r.names)
	b.mu.Unlock()
	if isWanted {
		r.answers, r.err = b.do(ctx, r.names)
	}
}

// crowd keeps those who do the same at the same time to as many as room has place for, as long as they
// get on.
type crowd struct {
	room chan struct{}
	left atomic.Int64 // how many have left
}

// enter waits for a place, and returns what gives it back. Where ctx is done, nobody has left for a second,
// or after a minute, it does not wait: what hangs must not hold up others, nor may many who are slow.
func (c *crowd) enter(ctx context.Context) (leave func()) {
	before := int64(-1)
	for range 60 {
		now := c.left.Load()
		if now == before {
			break
		}
		before = now
		select {
		case c.room <- struct{}{}:
			return func() {
				c.left.Add(1)
				<-c.room
			}
		case <-time.After(time.Second):
		case <-ctx.Done():
			return func() {}
		}
	}
	return func() {}
}

// exitCode is the status in the error of a program's run, -1 where it has none: it did not run, or a signal
// ended it.
func exitCode(err error) int {
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		return exit.ExitCode()
	}
	return -1
}

// bound sets the limits of a program that was just started. See prlimit(2) and proc_pid_oom_score_adj(5).
func (p *program) bound() {
	pid := p.cmd.Process.Pid
	limits := map[uintptr]uint64{syscall.RLIMIT_DATA: p.memory, syscall.RLIMIT_FSIZE: p.fileSize}
	for resource, most := range limits {
		if most > 0 {
			limit := [2]uint64{most, most}
			at := uintptr(unsafe.Pointer(&limit))
			_, _, _ = syscall.RawSyscall6(syscall.SYS_PRLIMIT64, uintptr(pid), resource, at, 0, 0, 0)
		}
	}
	if p.oomScoreAdj != 0 {
		_ = os.WriteFile(fmt.Sprintf("/proc/%d/oom_score_adj", pid), fmt.Append(nil, p.oomScoreAdj), 0)
	}
}

// wait waits for a started program, and ends it when ctx is done or its limit has passed.
func (p *program) wait(ctx context.Context) error {
	pid := p.cmd.Process.Pid
	tooLong := fmt.Errorf("took longer than %v and was ended", p.limit)
	limited, cancel := context.WithTimeoutCause(ctx, p.limit, tooLong)
	defer cancel()

	stop := context.AfterFunc(limited, func() {
		_ = syscall.Kill(-pid, p.end)
		if p.end == syscall.SIGKILL {
			_ = p.cmd.Process.Kill() // it may have left its group
		}
	})
	err := p.cmd.Wait()
	stop()
	if p.end == syscall.SIGKILL {
		_ = syscall.Kill(-pid, syscall.SIGKILL) // what it left behind
	}

	if errors.Is(err, exec.ErrWaitDelay) && p.cmd.ProcessState.Success() {
		err = nil
	}
	out, _ := p.cmd.Stdout.(*bounded)
	switch {
	case err == nil:
		return nil
	case out != nil && out.err != nil:
		return out.err // else it would be the broken pipe that this meant for the program
	case ctx.Err() != nil:
		return fmt.Errorf("ended: %w", ctx.Err())
	case limited.Err() != nil:
		return context.Cause(limited)
	}
	return err
}

// tail keeps the last lines that are written to it.
type tail struct{ buf []byte }

func (t *tail) Write(p []byte) (int, error) {
	t.buf = append(t.buf, p...)
	if n := len(t.buf); n > 8192 {
		t.buf = append(t.buf[:0], t.buf[n-4096:]...)
	}
	return len(p), nil
}

// last returns the last few lines that are not blank as one, of a length that fits an info.
func (t *tail) last() string {
	var lines []string
	for line := range strings.Lines(strings.ToValidUTF8(string(t.buf), "?")) {
		if words := strings.Fields(line); len(words) > 0 {
			lines = append(lines, strings.Join(words, " "))
		}
	}
	s := redact(unmark(oneLine(strings.Join(lines[max(0, len(lines)-9):], "\n"))))
	s = advice.ReplaceAllString(s, "")
	return strings.ToValidUTF8(s[max(0, len(s)-800):], "")
}

// advice is what git says of its configuration, which is not read here.
var advice = regexp.MustCompile(
	`; hint: [^;]*|; To add an exception for this directory, call:;\s*git config [^;]*`)

// bounded passes on what is written to it, as long as that is not absurdly much, and keeps the error that it
// meets.
type bounded struct {
	to  io.Writer
	n   int
	err error
}

const maxOutput = 64 << 20

var errTooMuch = errors.New("more than 64 MiB of output")

func (b *bounded) Write(p []byte) (int, error) {
	b.n += len(p)
	if b.n > maxOutput {
		b.err = errTooMuch
		return 0, b.err
	}
	n, err := b.to.Write(p)
	b.err = err
	return n, err
}

// account is a user as whom git runs, and who owns a service's files.
type account struct {
	uid, gid int
	groups   []uint32
	home     string
}

// credential makes a program run as the account; nil where that is ourselves.
func (a account) credential() *syscall.Credential {
	if a.uid == os.Getuid() {
		return nil
	}
	return &syscall.Credential{Uid: uint32(a.uid), Gid: uint32(a.gid), Groups: a.groups}
}

// lookupAccount finds a user by name; the empty name is ourselves. The name service is asked through
// getent(1) where the files alone don't know the user, for a static binary has no other way to LDAP and the
// like.
func lookupAccount(ctx context.Context, name string) (account, error) {
	if name == "" {
		home := os.Getenv("HOME")
		if u, err := user.Current(); home == "" && err == nil {
			home = u.HomeDir
		}
		return account{uid: os.Getuid(), gid: os.Getgid(), home: home}, nil
	}

	u, err := user.Lookup(name)
	if err != nil {
		// prometheus:x:109:117::/var/lib/prometheus:/usr/sbin/nologin
		f := getent(ctx, "passwd", name)
		if len(f) < 7 {
			return account{}, fmt.Errorf("user %q does not exist: create it, "+
				"or name the package that brings it", name)
		}
		u = &user.User{Username: f[0], Uid: f[2], Gid: f[3], HomeDir: f[5]}
	}

	uid, err1 := strconv.Atoi(u.Uid)
	gid, err2 := strconv.Atoi(u.Gid)
	if err := errors.Join(err1, err2); err != nil {
		return account{}, fmt.Errorf("user %q: %w", name, err)
	}
	a := account{uid: uid, gid: gid, home: u.HomeDir}
	groups, _ := u.GroupIds()
	for _, g := range groups {
		if n, err := strconv.ParseUint(g, 10, 32); err == nil {
			a.groups = append(a.groups, uint32(n))
		}
	}
	return a, nil
}

// groupIDs finds the groups that dirs name, as lookupAccount does a user.
func groupIDs(ctx context.Context, dirs []dir) (map[string]int, error) {
	ids := map[string]int{}
	for _, d := range dirs {
		if _, known := ids[d.group]; known || d.group == "" {
			continue
		}
		g, err := user.LookupGroup(d.group)
		if err != nil {
			// adm:x:4:syslog
			f := getent(ctx, "group", d.group)
			if len(f) < 3 {
				return nil, fmt.Errorf("group %q does not exist: create it, "+
					"or name the package that brings it", d.group)
			}
			g = &user.Group{Gid: f[2]}
		}
		if ids[d.group], err = strconv.Atoi(g.Gid); err != nil {
			return nil, fmt.Errorf("group %q: %w", d.group, err)
		}
	}
	return ids, nil
}

// getent asks the name service for an entry, and returns its fields; none if there is none.
func getent(ctx context.Context, database, name string) []string {
	cmd := exec.Command("getent", database, name)
	out, err := execute(ctx, program{name: "getent " + database + " " + name, cmd: cmd, limit: localLimit})
	if err != nil {
		return nil
	}
	return strings.Split(strings.TrimSpace(string(out)), ":")
}

// removeTree removes a directory in which others can write, if it is there: rm(1) needs few descriptors
// however deep it is, and is ended where somebody refills it faster than it is emptied.
func removeTree(ctx context.Context, name string) error {
	if !lexists(name) {
		return nil
	}
	cmd := exec.Command("rm", "-rf", "--", name)
	_, err := execute(ctx, program{name: "remove " + name, cmd: cmd, limit: localLimit})
	return err
}

// writeFile replaces a file of root's, mode 0600, such that after a crash it is the old one or the new one.
func writeFile(name string, data []byte) error { return replaceFile(name, data, 0o600) }

// replaceFile is writeFile for a file of another mode.
func replaceFile(name string, data []byte, mode os.FileMode) error {
	if err := exchangeFile(name, data, mode, (*os.File).Sync); err != nil {
		return err
	}
	return syncDir(filepath.Dir(name))
}

// exchangeFile replaces a file of root's such that who reads it finds the old one or the new one; after a
// power cut it is what sync makes of it.
func exchangeFile(name string, data []byte, mode os.FileMode, sync func(*os.File) error) error {
	if err := os.MkdirAll(filepath.Dir(name), 0o700); err != nil {
		return err
	}
	f, err := os.OpenFile(name+".new", os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}

	_, err = f.Write(data)
	err = errors.Join(err, f.Chmod(mode), sync(f), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), name)
	}
	if err != nil {
		_ = os.Remove(f.Name())
	}
	return err
}

// syncDir makes the names in a directory outlive a power cut.
func syncDir(name string) error {
	d, err := os.Open(name)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// lexists says whether there is something of that name, be it a link to nowhere.
func lexists(name string) bool {
	_, err := os.Lstat(name)
	return err == nil
}

// digest is a short name for a list of strings.
func digest(parts ...string) string {
	sum := sha256.Sum256([]byte(strings.Join(parts, "\x00")))
	return hex.EncodeToString(sum[:16])
}

// setLogger makes slog write one line an event from that level on to w: with a priority and no time where the
// journal reads along, which has its own (systemd.exec(5) on JOURNAL_STREAM).
func setLogger(w io.Writer, level slog.Level) {
	head := timeAndLevel
	var st syscall.Stat_t
	if f, ok := w.(*os.File); ok && syscall.Fstat(int(f.Fd()), &st) == nil {
		if os.Getenv("JOURNAL_STREAM") == fmt.Sprintf("%d:%d", st.Dev, st.Ino) {
			head = priority
		}
	}
	slog.SetDefault(slog.New(lineHandler{level, head, log.New(w, "", 0)}))
}

func timeAndLevel(r slog.Record) string {
	return r.Time.Format("2006-01-02T15:04:05.000Z07:00 ") + r.Level.String() + " "
}

// priority is a level as sd-daemon(3) has it: <N>.
func priority(r slog.Record) string {
	n := map[slog.Level]int{slog.LevelDebug: 7, slog.LevelInfo: 6, slog.LevelWarn: 4, slog.LevelError: 3}
	return fmt.Sprintf("<%d>", n[r.Level])
}

// lineHandler is the slog.Handler of setLogger.
type lineHandler struct {
	level slog.Level
	head  func(slog.Record) string
	lines *log.Logger // one Write a line, one at a time
}

func (h lineHandler) Enabled(_ context.Context, l slog.Level) bool { return l >= h.level }
func (h lineHandler) WithGroup(string) slog.Handler                { return h }
func (h lineHandler) WithAttrs([]slog.Attr) slog.Handler           { return h } // nobody here uses With

func (h lineHandler) Handle(_ context.Context, r slog.Record) error {
	var b strings.Builder
	b.WriteString(h.head(r) + r.Message)
	r.Attrs(func(a slog.Attr) bool {
		b.WriteString(" " + a.String())
		return true
	})
	return h.lines.Output(0, cut(oneLine(redact(unmark(b.String()))), maxLine))
}

// Words that are private stand between these in errors, infos and records; no other text holds them.
const (
	markOpen  = "\x02"
	markClose = "\x03"
)

var (
	marks  = strings.NewReplacer(markOpen, "", markClose, "")
	marked = regexp.MustCompile(`(?s)` + markOpen + `.*?` + markClose)
)

// quote marks the words of a program that may quote what not everybody should read: they are told to keys
// that may write, and to the log.
func quote(words string) string { return markOpen + unmark(words) + markClose }

// unmark returns a text with its private words, for those who may read them.
func unmark(text string) string { return marks.Replace(text) }

// public returns a text without its private words.
func public(text string) string { return unmark(marked.ReplaceAllString(text, "")) }

var secrets = []*regexp.Regexp{ // what stands between the groups is kept from others
	regexp.MustCompile(`(https?://)[^/\s]*(@)`),
	regexp.MustCompile(`(\w+://)[^/\s:@]*:[^/]*(@)`),           // with blanks, too
	regexp.MustCompile(`(\w+://)[^/\s:@]*:\d*[^\d/\s@]\S*(@)`), // with slashes: not a port then
	regexp.MustCompile(`()[^\s/:@'"]+:[^\s/@]+(@)`),            // as git quotes the host of a git:// URL
	regexp.MustCompile(`([?&][\w-]*(?:token|key|secret|password)[\w-]*=)[^&\s'"]+()`),
}

// redact takes passwords and tokens out of the URLs in a text.
func redact(s string) string {
	for _, r := range secrets {
		s = r.ReplaceAllString(s, "${1}***${2}")
	}
	return s
}

// oneLine makes a program's words one line of an info or a log, without what could steer a terminal. Marks of
// private words stay.
func oneLine(s string) string {
	lines := strings.FieldsFunc(s, func(r rune) bool { return strings.ContainsRune("\r\n", r) })
	s = strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) || strings.ContainsRune(markOpen+markClose, r) {
			return r
		}
		return ' '
	}, strings.Join(lines, "; "))
	return strings.TrimSpace(strings.ToValidUTF8(s, ""))
}

// maxLine and maxInfo bound a line of log, and what is said of a service.
const (
	maxLine = 8000
	maxInfo = 2000
)

// cut bounds a text, which may end with how much of it was left out.
func cut(text string, most int) string {
	if len(text) <= most {
		return text
	}
	return fmt.Sprintf("%s... and %d bytes more", strings.ToValidUTF8(text[:most], ""), len(text)-most)
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
