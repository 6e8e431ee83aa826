package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"time"
)

// state is what a service's row says of it; the numbers are those of the metric gitopper_service_state.
type state int

const (
	stateOK       state = iota // everything is running, and upstream is tracked
	stateFreeze                // everything is running, pinned to a commit
	stateRollback              // on its way to a pinned commit
	stateBroken                // package, mount or systemd trouble
	stateDiff                  // the checkout can't be made what it should be
)

var stateNames = []string{"OK", "FREEZE", "ROLLBACK", "BROKEN", "DIFF"}

func (s state) String() string { return stateNames[s] }

// Status is what others may know of a service: an immutable snapshot.
type Status struct {
	Service, Commit, State, Info string
	Change                       time.Time // when State last became another
	Upstream, Branch             string
	InSync                       bool // what runs is upstream's
	OutOfSync                    time.Time
	LastLook                     time.Time // last successful look at upstream
	Refused                      string    // why upstream's newest commit does not run, as refusal.Reason
	state                        state
}

// pin is an operator's wish to stay at a commit.
type pin struct {
	Commit string
	Info   string    // who and why
	Until  time.Time // zero: until unfreeze
}

// refusal is a commit that does not go live, or was taken back, and why. The same content is not tried again by itself.
type refusal struct {
	Commit  string
	Content string // of its links; empty: only this very commit is refused
	Judge   string // what judged it, see Service.judge
	Reason  string // link, signers, check, config or fallback
	Info    string
	Doubt   bool // the last good commit failed as well: try once more when that one runs again
	Closed  bool // it did not: the commit is to blame
}

func (r *refusal) Error() string { return r.Info }

// brokenError is trouble with package, mount or systemd, as opposed to git.
type brokenError struct{ error }

func (b brokenError) Unwrap() error { return b.error }

// recordError is a brokenError that is not the commit's fault: what is to be remembered can't be written.
type recordError struct{ error }

// record is what must outlive a restart. What can be read again from the host is not in it.
type record struct {
	State   string
	Info    string    `json:",omitempty"`
	Change  time.Time // of State
	Pin     *pin      `json:",omitempty"`
	Refused []refusal `json:",omitempty"` // the newest last
	Second  string    `json:",omitempty"` // content that is tried a second time, the last good one having failed too

	Upstream, Branch string   // what Tip and Newest belong to
	Signers          string   `json:",omitempty"` // bootstrap: those of the config that ran last
	Tip              string   `json:",omitempty"` // upstream's commit at the last successful look
	Newest           string   `json:",omitempty"` // newest commit that went live
	Shape            string   `json:",omitempty"` // repo.shape that the checkout was brought to
	Dirs             []string // where the checkout is, and where it was

	Live, Content       string   // the commit whose files are live, and what its links show
	Publishing          []string `json:",omitempty"` // what Live was about to become since it last was whole; the newest last
	Told, Boot          string   `json:",omitempty"` // content that the unit was told of, and in which boot; empty: it must be told
	Good, GoodContent   string   `json:",omitempty"` // the last commit on which the unit settled
	Mounts, Made        []string // our mount points, and what was made for them
	DriftUndone         time.Time
	OutOfSync, LastLook time.Time
}

// look is the outcome of a look at upstream.
type look struct {
	tip    string
	err    error
	misses int // failures in a row
	at     time.Time
}

// op is what an operator asks of a service.
type op struct {
	verb   string       // freeze, unfreeze, rollback or pull
	hash   string       // rollback: 4 to 40 lower case hex digits
	until  time.Time    // freeze: zero is until unfreeze
	reason string       // freeze
	who    string       // for the info
	step   func(string) // told of each step
}

// opError is an error with an HTTP status text for the client. done says that the operation was carried out all the same.
type opError struct {
	status string
	err    error
	done   bool
}

func (e *opError) Error() string { return e.err.Error() }
func (e *opError) Unwrap() error { return e.err }

type request struct {
	op
	reply chan error
}

// Service is one managed service. All fields without an atomic type belong to its goroutine, see run.
type Service struct {
	spec
	repo     repo
	stateDir string
	interval time.Duration
	gate     func(read func(string) ([]byte, error)) error // judges a candidate of our own config; else nil

	rec      record
	saved    []byte // what is on disk of rec
	err      error  // outcome of the last pass
	passed   bool   // a pass has ended since the start
	rolling  bool   // a rollback is being carried out
	packaged bool   // the package was there when last asked
	checked  bool   // the checkout was found undamaged since the start
	swept    bool   // mounts of earlier configs are gone
	snap     snapshot
	edits    string    // edits that were reported and not undone
	cand     candidate // what was laid out and judged, to be published
	toldAt   time.Time
	legacy   bool   // there is a checkout, but no record of it
	force    bool   // an operator wants local edits undone now
	partial  bool   // a pass was begun and has not come to its end
	fetched  bool   // since git last had a chance to pack what fetches leave
	used     *look  // the last one whose outcome was used
	patch    string // name of the last patch of local edits
	patched  []byte // its digest
	step     func(string)

	requests chan request
	poke     chan struct{} // size 1: something is to be looked at
	ended    chan struct{} // closed when run has returned
	status   atomic.Pointer[Status]
	looked   atomic.Pointer[look]
	unit     atomic.Pointer[unit] // as seen at the last round
	busy     atomic.Int64         // since when a pass has been working; 0 is idle
}

// candidate is a commit whose changed files are laid out in the checkout's stage.
type candidate struct {
	commit, content string
	changes         []change
}

// newService makes a service from its validated config and the record of its earlier life. Nothing is changed on the host,
// but that a record which can't be read is moved aside.
func newService(sp spec, stateDir string, interval time.Duration) *Service {
	s := &Service{
		spec: sp, stateDir: stateDir, interval: interval,
		repo:     repo{dir: filepath.Join(sp.mount, sp.service), upstream: sp.upstream, branch: sp.branch, dirs: sp.dirs},
		step:     func(string) {},
		requests: make(chan request), poke: make(chan struct{}, 1), ended: make(chan struct{}),
	}
	rec, data, err := readRecord(recordFile(stateDir, sp.service))
	switch {
	case err == nil:
		s.rec, s.saved = rec, data
		if h := s.repo.head(); len(rec.Publishing) > 0 && h == rec.Publishing[len(rec.Publishing)-1] {
			s.rec.Live = h // killed after the last file, before the record; Content is found anew
			s.rec.Content = ""
		}
	case errors.Is(err, fs.ErrNotExist):
		s.legacy = s.repo.exists() // of an earlier gitopper
	default:
		slog.Error(fmt.Sprintf("%s: record can't be read, pinned to what runs until unfreeze: %v", sp.service, err))
		f := recordFile(stateDir, sp.service)
		aside := os.Rename
		if h := s.repo.head(); h != "" && s.repo.ranHere(h) {
			s.rec.Live = h
			s.rec.Pin = &pin{Commit: s.rec.Live, Info: "state lost"}
			aside = os.Link // and then replaced, so that the pin can't be lost
		}
		_ = os.RemoveAll(f + ".broken")
		if err := aside(f, f+".broken"); err != nil {
			slog.Error(fmt.Sprintf("%s: %v", sp.service, err))
		}
		if s.rec.Pin != nil {
			if err := s.save(); err != nil {
				slog.Error(fmt.Sprintf("%s: %v", sp.service, err))
			}
		}
	}
	if s.rec.Upstream != sp.upstream || s.rec.Branch != sp.branch {
		s.rec.Upstream, s.rec.Branch, s.rec.Tip, s.rec.Newest = sp.upstream, sp.branch, "", ""
	}
	if !slices.Contains(s.rec.Dirs, s.repo.dir) {
		if len(s.rec.Dirs) > 0 { // mount has changed: nothing is checked out at the new place
			s.rec.Live, s.rec.Content, s.rec.Shape = "", "", ""
		}
		s.rec.Dirs = append(s.rec.Dirs, s.repo.dir)
	}
	if h := s.repo.head(); s.rec.Live == "" && h != "" && s.repo.ranHere(h) {
		s.rec.Live = h // mount has changed back
	}
	s.publishStatus()
	return s
}

// recordFile is where the record of a service lies.
func recordFile(stateDir, service string) string {
	return filepath.Join(stateDir, "services", service+".json")
}

// readRecord reads a record, and returns the file as it is, too.
func readRecord(file string) (rec record, data []byte, err error) {
	if data, err = os.ReadFile(file); err == nil {
		err = json.Unmarshal(data, &rec)
	}
	return rec, data, err
}

// save writes the record if it changed: to a temporary file, synced and renamed.
func (s *Service) save() error {
	data, err := json.MarshalIndent(&s.rec, "", "\t")
	if err != nil {
		return err
	}
	if bytes.Equal(data, s.saved) {
		return nil
	}
	if err := writeFile(recordFile(s.stateDir, s.service), data); err != nil {
		return brokenError{recordError{fmt.Errorf("record: %w: no file is changed until it can be written", err)}}
	}
	s.saved = data
	return nil
}

// writeFile replaces a file of root's, mode 0600, such that after a crash it is the old one or the new one.
func writeFile(name string, data []byte) error {
	return replaceFile(name, func(w io.Writer) error { _, err := w.Write(data); return err })
}

// replaceFile is writeFile with what fill writes; where that fails the old file stays.
func replaceFile(name string, fill func(io.Writer) error) error {
	if err := os.MkdirAll(filepath.Dir(name), 0o700); err != nil {
		return err
	}
	f, err := os.OpenFile(name+".new", os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	err = fill(f)
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := os.Rename(f.Name(), name); err != nil {
		return err
	}
	d, err := os.Open(filepath.Dir(name))
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// Status returns what is known of the service now. It never waits.
func (s *Service) Status() *Status { return s.status.Load() }

// state computes the service's state from the operator's intent and the outcome of the last pass: the one place that does.
func (s *Service) state() (state, string) {
	var b brokenError
	var r *refusal
	pinned := ""
	if p := s.rec.Pin; p != nil {
		pinned = p.Info
		if !p.Until.IsZero() {
			pinned += ", until " + p.Until.UTC().Format(time.RFC1123)
		}
	}
	switch {
	case s.rolling, s.partial && s.rec.Pin != nil && strings.HasPrefix(pinned, "ROLLBACK"):
		return stateRollback, pinned
	case !s.passed && s.rec.State != "":
		if i := slices.Index(stateNames, s.rec.State); i >= 0 {
			return state(i), s.rec.Info
		}
	case !s.passed && s.rec.State == "" && s.rec.Pin == nil:
		return stateDiff, "first checkout under way"
	case errors.As(s.err, &b), errors.As(s.err, &r) && r.Reason == "fallback":
		return stateBroken, strings.TrimPrefix(pinned+"; ", "; ") + oneLine(s.err.Error())
	case s.err != nil:
		return stateDiff, strings.TrimPrefix(pinned+"; ", "; ") + oneLine(s.err.Error())
	}
	if s.rec.Pin != nil {
		if s.edits != "" {
			pinned += "; edited here: " + s.edits
		}
		return stateFreeze, pinned
	}
	return stateOK, ""
}

// publishStatus makes the state known to others, and remembers it with the time of its last change.
func (s *Service) publishStatus() {
	r, now := &s.rec, time.Now()
	st, info := s.state()
	if st.String() != r.State && (s.passed || s.rolling || r.State == "") {
		r.Change = now
		if s.passed || s.rolling {
			slog.Log(context.Background(), map[state]slog.Level{stateBroken: slog.LevelError, stateDiff: slog.LevelWarn}[st], fmt.Sprintf("%s: %s -> %s %s", s.service, cmp.Or(r.State, "new"), st, info), "commit", fmt.Sprintf("%.8s", r.Live))
		}
	} else if info != r.Info && s.passed && info != "" {
		slog.Warn(fmt.Sprintf("%s: %s %s", s.service, st, info))
	}
	inSync := r.Live != "" && r.Live == r.Tip
	if inSync {
		r.OutOfSync = time.Time{}
	} else if r.OutOfSync.IsZero() {
		r.OutOfSync = now
	}
	if s.passed || s.rolling {
		r.State, r.Info = st.String(), info
	}
	refused := ""
	if f := (*refusal)(nil); errors.As(s.err, &f) {
		refused = f.Reason
	}
	s.status.Store(&Status{Refused: refused, Service: s.service, Commit: r.Live, State: st.String(), Info: info, Change: r.Change, Upstream: r.Upstream, Branch: r.Branch,
		InSync: inSync, OutOfSync: r.OutOfSync, LastLook: r.LastLook, state: st})
}

// nudge makes run look at the world soon; it never blocks, and nudges that come together count once.
func (s *Service) nudge() {
	select {
	case s.poke <- struct{}{}:
	default:
	}
}

// do asks the service's goroutine to carry out o, and waits for its answer.
func (s *Service) do(ctx context.Context, o op) error {
	r := request{o, make(chan error, 1)}
	select {
	case s.requests <- r:
		select {
		case err := <-r.reply:
			return err
		case <-s.ended:
			select {
			case err := <-r.reply: // it came first
				return err
			default:
			}
		}
	case <-s.ended:
	case <-ctx.Done():
	}
	return &opError{status: "Internal Server Error", err: errors.New("gitopper is stopping")}
}

// run is the service's life: it waits for a look at upstream, a time to try again or an operator, and has one pass or one
// operation done at a time, in a goroutine of its own so that operators can end one that merely waits.
func (s *Service) run(ctx context.Context) {
	defer close(s.ended)
	var queue []request
	var backoff time.Duration
	// The first look at upstream starts the first pass; where it takes long, the unit is not kept waiting.
	again := time.NewTimer(5 * time.Second)
	for {
		if ctx.Err() != nil {
			return // what is queued is not begun, and its operator is told
		}
		job := func(ctx context.Context) { s.pass(ctx) }
		if len(queue) > 0 {
			r := queue[0]
			queue = queue[1:]
			job = func(ctx context.Context) { r.reply <- s.operate(ctx, r.op) }
		} else {
			select {
			case <-ctx.Done():
				return
			case r := <-s.requests:
				queue = append(queue, r)
				continue
			case <-s.poke:
			case <-again.C:
			}
		}
		jobCtx, end := context.WithCancelCause(ctx)
		done := make(chan struct{})
		s.busy.Store(time.Now().Unix())
		go func() { defer close(done); job(jobCtx) }()
		for working := true; working; {
			select {
			case <-done:
				working = false
			case r := <-s.requests:
				if i := slices.IndexFunc(queue, func(q request) bool { return q.verb == "pull" }); i >= 0 && r.verb != "pull" {
					queue = slices.Insert(queue, i, r) // pulls can wait
				} else {
					queue = append(queue, r)
				}
				if r.verb != "pull" {
					end(fmt.Errorf("ended by a %s of %s", r.verb, r.who))
				}
			}
		}
		end(nil)
		s.busy.Store(0)
		var wait time.Duration
		if wait, backoff = s.retry(backoff); wait > 0 {
			again.Reset(wait)
		} else {
			again.Stop()
		}
	}
}

// retry says when the next pass is due if nothing else asks for one; zero is never.
func (s *Service) retry(backoff time.Duration) (wait, next time.Duration) {
	r, pure := s.err.(*refusal) // what was refused waits for another commit or an operator
	switch {
	case s.partial: // ended from outside, by somebody who may have done nothing else
		return time.Millisecond, 0
	case s.err != nil && !(pure && !r.Doubt):
		next = min(max(2*backoff, 5*time.Second), s.interval)
		wait = next
	case s.edits != "" && s.rec.Pin == nil:
		wait = min(max(time.Until(s.rec.DriftUndone.Add(s.interval)), time.Second), s.interval)
	}
	if p := s.rec.Pin; p != nil && !p.Until.IsZero() {
		// Once it has passed, what keeps a pass from unpinning has a wait of its own.
		if left := time.Until(p.Until); wait == 0 || left > 0 && left < wait {
			wait = max(left, time.Millisecond)
		}
	}
	return wait, next
}

// pass reconciles once and makes the outcome known. A pass that was ended from outside has no outcome.
func (s *Service) pass(ctx context.Context) {
	err := s.reconcile(ctx)
	s.conclude(ctx, err)
	if s.fetched && s.err == nil && ctx.Err() == nil {
		s.fetched = false
		if err := s.repo.collect(ctx); err != nil {
			slog.Warn(fmt.Sprintf("%s: %s", s.service, oneLine(err.Error())))
		}
	}
}

func (s *Service) conclude(ctx context.Context, err error) {
	s.rolling = false
	if ctx.Err() == nil {
		s.err, s.passed, s.packaged = err, true, s.packaged && err == nil
		s.partial, s.force = false, false
	}
	s.publishStatus()
	if serr := s.save(); serr != nil && s.err == nil && ctx.Err() == nil {
		s.err = serr
		s.publishStatus()
	}
	if s.snap == nil && s.edits == "" && s.err == nil && ctx.Err() == nil {
		_, _ = s.drift(ctx) // after a publish, so that the next round has nothing to ask git for; what it finds is found then
	}
}

// reconcile is one pass between what is wanted (the config, and upstream's commit or the pin) and what is there. It may be
// ended by ctx or killed at any point: the next one goes on from what it finds.
func (s *Service) reconcile(ctx context.Context) error {
	s.partial = true
	if err := s.save(); err != nil { // where nothing can be remembered, nothing is changed
		return err
	}
	if p := s.rec.Pin; p != nil && !p.Until.IsZero() && time.Now().After(p.Until) {
		slog.Info(fmt.Sprintf("%s: freeze has ended: %s", s.service, p.Info))
		s.rec.Pin = nil
	}
	if err := s.preparePackage(ctx); err != nil {
		return brokenError{err}
	}
	if err := s.prepareCheckout(ctx); err != nil {
		return err
	}
	want, verdict := s.choose(ctx)
	if want == "" || ctx.Err() != nil {
		return verdict
	}
	err := s.goLive(ctx, want)
	switch {
	case err == nil:
		return verdict
	case s.fallsBack(ctx, err):
		return s.takeBack(ctx, err)
	case !errors.As(err, new(brokenError)):
		s.checked = false
	default:
		s.doubt(verdict)
	}
	if verdict != nil {
		return fmt.Errorf("%w; %w", verdict, err)
	}
	return err
}

// preparePackage sees to it that the package is there. The answer is remembered until something goes wrong.
func (s *Service) preparePackage(ctx context.Context) error {
	if s.pkg == "" || s.packaged {
		return nil
	}
	// Others' installs may rightly take hours: the watchdog's end of us would be the end of the package manager.
	s.busy.Store(0)
	installed, err := ensurePackage(ctx, s.pkg, s.step)
	s.busy.Store(time.Now().Unix())
	if installed {
		slog.Info(fmt.Sprintf("%s: installed package %s", s.service, s.pkg))
	}
	s.packaged = err == nil
	return err
}

// prepareCheckout makes sure that there is a clone, undamaged, of the configured upstream, branch, paths and owner. When
// nothing has changed since the last pass that costs a few system calls.
func (s *Service) prepareCheckout(ctx context.Context) error {
	r := &s.rec
	if s.checked && s.repo.exists() && lexists(s.repo.dir+"/.git/index") && (r.Live == "" || s.repo.head() == r.Live) && r.Shape == s.repo.shape() {
		return nil
	}
	acct, err := lookupAccount(ctx, s.user)
	if err != nil {
		return brokenError{err}
	}
	s.repo.acct, s.cand = acct, candidate{}
	if !s.repo.exists() {
		switch l := s.looked.Load(); { // a look is quick, and says better what is wrong
		case l == nil:
			return errors.New("upstream was not looked at yet")
		case l.err != nil:
			return l.err
		case lexists(s.repo.dir + "/.git"):
			slog.Warn(fmt.Sprintf("%s: %s/.git has no HEAD, fetching it anew", s.service, s.repo.dir))
		}
		return s.cloneAnew(ctx, "clone")
	}
	moved, err := s.repo.prepareDir()
	if err != nil {
		return err
	}
	if err := s.repo.clean(); err != nil {
		return err
	}
	if r.Live != "" && s.repo.head() == "" { // a branch, or nothing, which is what a power cut leaves
		if err := s.repo.setHead(r.Live); err != nil {
			return err
		}
	}
	if moved {
		r.Shape = "" // its configuration is gone; what can't be configured is found damaged
		_ = s.repo.configure(ctx, nil)
	}
	if err := s.repair(ctx); err != nil {
		return err
	}
	if err := s.repo.giveBack(ctx); err != nil {
		return err
	}
	if s.legacy {
		r.Live, _ = s.repo.resolve(ctx, "HEAD")
		s.legacy = false
	}
	if r.Live != "" && s.repo.head() != r.Live {
		// Somebody else moved HEAD (or an older gitopper had it on a branch): the files are compared with what we know.
		if _, err := s.repo.resolve(ctx, r.Live); err != nil {
			if err := s.forgetLive(ctx); err != nil {
				return err
			}
		} else if err := s.repo.moveHead(ctx, r.Live, true); err != nil {
			return err
		} else if err := s.repo.rebuildIndex(ctx); err != nil {
			return err
		}
		s.snap = nil
	}
	if shape := s.repo.shape(); r.Shape != shape {
		if err := s.keepLeaving(ctx); err != nil {
			return err
		}
		if err := s.repo.adopt(ctx); err != nil {
			return err
		}
		// What the links show is another question now. Told is cleared by what the answer changes.
		r.Shape, r.Content, s.snap = shape, "", nil
		if err := s.save(); err != nil {
			return err
		}
	}
	s.checked = true
	return nil
}

// keepLeaving keeps the local edits of files that dirs no longer name, for they are about to be taken away.
func (s *Service) keepLeaving(ctx context.Context) error {
	if s.rec.Live == "" {
		return nil
	}
	all := s.repo
	all.dirs = []dir{{link: "."}}
	changes, err := all.diff(ctx, s.rec.Live)
	changes = slices.DeleteFunc(changes, func(c change) bool {
		return c.status == 'D' || slices.ContainsFunc(s.repo.links(), func(l string) bool { return l == c.path || strings.HasPrefix(c.path, l+"/") })
	})
	if err != nil && !errors.As(err, new(*refusal)) {
		return err
	}
	return s.keepPatch(ctx, s.rec.Live, paths(changes))
}

// repair heals what the probe finds: a new index where that is enough, else a new .git. If nothing is found but files of
// another owner, those are given back, for the usual harm is an administrator's git run as root.
func (s *Service) repair(ctx context.Context) error {
	err := s.repo.probe(ctx)
	if err != nil && !errors.Is(err, errIndex) && ctx.Err() == nil {
		if err := s.repo.chown(".git"); err != nil {
			return err
		}
		err = s.repo.probe(ctx)
	}
	if err == nil || ctx.Err() != nil {
		return err
	}
	if errors.Is(err, errIndex) {
		s.snap = nil
		return s.repo.rebuildIndex(ctx)
	}
	slog.Warn(fmt.Sprintf("%s: checkout is damaged, fetching it anew: %s", s.service, oneLine(err.Error())))
	return s.cloneAnew(ctx, "heal")
}

func (s *Service) cloneAnew(ctx context.Context, step string) error {
	s.step(step)
	live := s.rec.Live
	if err := s.repo.clone(ctx, live); err != nil {
		return err
	}
	s.rec.Shape, s.snap, s.checked = s.repo.shape(), nil, true
	if err := s.repo.prefetch(ctx, "HEAD", true); err != nil {
		return err
	}
	if live == "" {
		return nil
	}
	if s.repo.head() != live {
		return s.forgetLive(ctx)
	}
	if content, err := s.repo.content(ctx, live); err == nil {
		s.rec.Content = content
	}
	return nil
}

// forgetLive is for a clone that does not have what runs here, nor has upstream. What differs from the clone's commit is kept
// as a patch before that is judged.
func (s *Service) forgetLive(ctx context.Context) error {
	changes, err := s.repo.diff(ctx, "HEAD")
	if err == nil {
		err = s.keepPatch(ctx, "HEAD", paths(changes))
	}
	if err == nil {
		s.rec.Live, s.rec.Content = "", ""
	}
	return err
}

// choose returns the commit that should run, and why it is not upstream's newest if that was refused or is unknown. The
// commit is in the clone, and what of it has to be laid out is laid out and judged.
func (s *Service) choose(ctx context.Context) (want string, verdict error) {
	r := &s.rec
	l := s.looked.Load()
	if l != nil && l.err == nil && l != s.used {
		r.Tip, r.LastLook, s.used = l.tip, l.at, l
	}
	if r.Pin != nil {
		if r.Pin.Commit == r.Live {
			verdict = s.judgeLive(ctx)
		}
		if verdict != nil {
			return "", verdict
		}
		return r.Pin.Commit, nil
	}
	var missed error
	if l != nil && l.err != nil && (l.misses > 1 || r.Live == "" || !s.passed && r.State == stateDiff.String()) {
		missed = l.err // after a start, a first miss on top of DIFF is not the first
	}
	if r.Tip == "" {
		if want = s.rest(); want == "" {
			missed = cmp.Or(missed, errors.New("upstream was not looked at yet"))
		}
		return want, missed
	}
	want, err := s.judgeTip(ctx)
	if err == nil {
		return want, missed
	}
	want = s.rest()
	if !errors.As(err, new(*refusal)) {
		s.checked = false
	} else if want == r.Live && s.judgeLive(ctx) != nil {
		return "", err // all stays as it is
	}
	return want, err
}

// judgeLive judges the commit that runs anew where dirs have changed, and with them what it shows.
func (s *Service) judgeLive(ctx context.Context) error {
	r := &s.rec
	if r.Live == "" || r.Content != "" || len(r.Publishing) > 0 {
		return nil
	}
	content, err := s.repo.content(ctx, r.Live)
	if err == nil {
		err = s.judgeCommit(ctx, r.Live, content, "")
	}
	return err
}

// rest is where to stay when upstream's commit is not to be had: on what runs, unless that itself was taken back.
func (s *Service) rest() string {
	if r := &s.rec; r.Good != "" && s.refused(r.Content, "") != nil {
		return r.Good
	}
	return s.rec.Live
}

// judge names everything but the commit that decides whether it is refused for reason.
func (s *Service) judge(reason string) string {
	if reason == "signers" {
		parts := []string{s.signers}
		for _, f := range []string{s.signers, s.signers + ".revoked"} {
			if fi, err := os.Stat(f); err == nil { // a mode or an owner can keep git from reading it
				text, _ := os.ReadFile(f)
				parts = append(parts, string(text), fi.Mode().String(), fmt.Sprint(owner(fi)))
			}
		}
		return digest(parts...)
	}
	return digest(fmt.Sprint(s.check, s.action, s.dirs))
}

// refused returns what is remembered against a content or a commit, nil if nothing is.
func (s *Service) refused(content, commit string) *refusal {
	for i := len(s.rec.Refused) - 1; i >= 0; i-- {
		f := &s.rec.Refused[i]
		if (content != "" && f.Content == content || commit != "" && f.Commit == commit) && f.Judge == s.judge(f.Reason) {
			return f
		}
	}
	return nil
}

// refuse remembers that commit does not go live: the one place that does, whatever refused it.
func (s *Service) refuse(commit, content string, f *refusal) *refusal {
	f.Commit, f.Info, f.Judge = commit, oneLine(f.Info), s.judge(f.Reason)
	if f.Content == "" && f.Reason != "signers" {
		f.Content = content
	}
	for i := range s.rec.Refused {
		if old := &s.rec.Refused[i]; old.Content == f.Content && old.Judge == f.Judge && old.Reason == f.Reason && (f.Content != "" || old.Commit == commit) {
			old.Commit, old.Info, old.Doubt, old.Closed = f.Commit, f.Info, f.Doubt, f.Closed // the same once more: news to nobody
			return old
		}
	}
	s.rec.Refused = append(s.rec.Refused, *f)
	if n := len(s.rec.Refused); n > 20 {
		s.rec.Refused = slices.Clone(s.rec.Refused[n-20:])
	}
	count.add("gitopper_service_refused_total", labels("service", s.service, "reason", f.Reason))
	slog.Error(fmt.Sprintf("%s: refused (%s): %s", s.service, f.Reason, f.Info), "commit", fmt.Sprintf("%.8s", commit), "running", fmt.Sprintf("%.8s", s.rec.Live))
	return f
}

// judgeTip fetches upstream's newest commit if need be and returns it if it may go live; a *refusal says why not.
func (s *Service) judgeTip(ctx context.Context) (string, error) {
	r := &s.rec
	tip := r.Tip
	if f := s.refused("", tip); f != nil && !s.secondTry(f) {
		return "", f
	}
	if tip == r.Live && r.Content != "" && s.refused(r.Content, "") == nil {
		return tip, nil
	}
	if have, err := s.repo.resolve(ctx, "refs/remotes/origin/"+s.branch); err != nil || have != tip {
		s.step("fetch")
		if tip, err = s.repo.fetch(ctx); err != nil {
			return "", err
		}
		r.Tip, s.fetched = tip, true
	}
	s.cand = candidate{}
	content, err := s.repo.content(ctx, tip)
	if err == nil {
		if f := s.refused(content, ""); f != nil && !s.secondTry(f) {
			f.Commit = tip // so that the next round needs no git to know it
			return "", f
		}
		err = s.judgeCommit(ctx, tip, content, r.Newest)
	}
	if f := (*refusal)(nil); errors.As(err, &f) {
		err = s.refuse(tip, content, f)
		if serr := s.save(); serr != nil {
			return "", serr
		}
	}
	return tip, err
}

// judgeCommit looks at a commit before anything of it goes live: its signature (descending from newest, if that is given),
// and what our own config's gate and the check say of the candidate, which it lays out.
func (s *Service) judgeCommit(ctx context.Context, commit, content, newest string) error {
	s.cand = candidate{}
	if s.signers != "" && commit != s.rec.Live {
		s.step("verify signature")
		if err := s.repo.verify(ctx, commit, s.signers, newest); err != nil {
			return err
		}
	}
	if content == s.rec.Content {
		return nil
	}
	if err := s.layOut(ctx, commit, content); err != nil {
		return err
	}
	if s.gate != nil {
		if err := s.gate(s.readCandidate); err != nil {
			return &refusal{Reason: "config", Info: fmt.Sprintf("commit %.8s: %v", commit, err)}
		}
	}
	if len(s.check) == 0 {
		return nil
	}
	s.step("check")
	return s.precheck(ctx, commit)
}

// layOut fetches what is missing of commit's files and lays out those that differ from the live ones.
func (s *Service) layOut(ctx context.Context, commit, content string) error {
	if err := s.repo.prefetch(ctx, commit, commit == s.rec.Tip); err != nil {
		return err
	}
	changes, err := s.repo.diff(ctx, commit)
	if err != nil {
		return err
	}
	for _, half := range s.rec.Publishing {
		left, err := s.repo.leftovers(ctx, half, commit, changes)
		if err != nil {
			return err
		}
		changes = append(changes, left...)
	}
	s.cand = candidate{commit: commit, content: content, changes: changes}
	if err := s.repo.stage(ctx, commit, changes); err != nil {
		s.cand = candidate{}
		return err
	}
	return nil
}

// precheck has the check judge the candidate. Every local is made first where it is missing, for a mount needs a place.
func (s *Service) precheck(ctx context.Context, commit string) error {
	v := view{Argv: s.check, Checkout: s.repo.dir}
	for _, c := range s.cand.changes {
		if c.status == 'A' {
			v.Absent = append(v.Absent, []byte(c.path))
		}
	}
	for _, d := range s.dirs {
		if d.local == "" {
			continue
		}
		if err := s.remember(d.local); err != nil {
			return err
		}
		t, err := openTarget(d.local, d.file, true, s.repo.acct.uid, s.repo.acct.gid)
		if err != nil {
			return brokenError{err}
		}
		syscall.Close(t)
		v.Shows = append(v.Shows, shown{d.local, d.link, d.file})
	}
	err := runCheck(ctx, filepath.Join(s.stateDir, "check", s.service), v)
	if f := (*refusal)(nil); errors.As(err, &f) {
		f.Info = fmt.Sprintf("commit %.8s: %s", commit, f.Info)
	}
	return err
}

// remember records what is about to be made to mount on, before it is made: later nobody could tell whose it is.
func (s *Service) remember(local string) error {
	r := &s.rec
	for p := local; p != "/" && !lexists(p); p = filepath.Dir(p) {
		if !slices.Contains(r.Made, p) {
			r.Made = append(r.Made, p)
		}
	}
	slices.Sort(r.Made) // outer ones first
	return s.save()
}

// readCandidate reads a file as it would be if the candidate were live.
func (s *Service) readCandidate(name string) ([]byte, error) {
	rel, err := filepath.Rel(s.repo.dir, name)
	if err != nil || strings.HasPrefix(rel, "..") {
		return os.ReadFile(name)
	}
	root, err := s.repo.open()
	if err != nil {
		return nil, err
	}
	defer root.Close()
	for _, c := range s.cand.changes {
		if c.path == rel && c.status == 'A' {
			return nil, &fs.PathError{Op: "open", Path: name, Err: fs.ErrNotExist}
		}
	}
	data, err := readSmall(root, stageDir+"/"+rel)
	if errors.Is(err, fs.ErrNotExist) {
		data, err = readSmall(root, rel)
	}
	return data, err
}

// secondTry says whether what was taken back deserves to be tried once more, and notes that it is being tried: the last good
// commit had failed as well, and runs again by now, so that it was not the commit's fault.
func (s *Service) secondTry(f *refusal) bool {
	r := &s.rec
	if f.Doubt && r.Content == r.GoodContent && r.Told == r.Content && s.err != nil {
		r.Second = f.Content
		f.Doubt = false
	}
	return r.Second != "" && r.Second == f.Content
}

// goLive makes commit's files live, shows them at every local, and sees to it that the unit runs on them. Each of these
// does nothing where nothing is to be done.
func (s *Service) goLive(ctx context.Context, commit string) error {
	if err := s.files(ctx, commit); err != nil {
		return err
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err := s.mountAll(); err != nil {
		return brokenError{err}
	}
	if err := s.repo.tidy(finish(ctx)); err != nil {
		return err
	}
	return s.serve(ctx)
}

// files publishes commit if something else is live, if files were edited here, or if an earlier publish was cut short.
func (s *Service) files(ctx context.Context, commit string) error {
	r := &s.rec
	edited, err := s.drift(ctx)
	if err != nil {
		return err
	}
	edits := oneLine(strings.Join(edited, " "))
	if edits != s.edits && edits != "" {
		slog.Warn(fmt.Sprintf("%s: edited here: %s", s.service, edits))
	}
	s.edits = edits
	ago := time.Since(r.DriftUndone) // less than nothing where the clock was set back
	hold := !s.force && (r.Pin != nil || ago >= 0 && ago < s.interval)
	if commit == r.Live && len(r.Publishing) == 0 && r.Content != "" && (edits == "" || hold) {
		return nil
	}
	if s.cand.commit != commit || len(edited) > 0 {
		content, err := s.repo.content(ctx, commit)
		if err != nil {
			return err
		}
		if err := s.layOut(ctx, commit, content); err != nil {
			return err
		}
	}
	cand := s.cand
	s.cand = candidate{}
	if hold && (commit == r.Live || cand.content == r.Content) { // the commit itself changes none of them: they stay
		cand.changes = slices.DeleteFunc(cand.changes, func(c change) bool { return slices.Contains(edited, c.path) })
		edited = nil
	} else {
		edits = ""
	}
	if err := s.keepPatch(ctx, r.Live, edited); err != nil {
		return err
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	s.step("publish")
	r.Publishing = append(slices.DeleteFunc(r.Publishing, func(c string) bool { return c == commit }), commit)
	if len(cand.changes) > 0 {
		r.Told = ""
	}
	if len(edited) > 0 {
		r.DriftUndone = time.Now()
	}
	if err := s.save(); err != nil {
		return err
	}
	s.checked = false // until it is known to have gone well
	if err := s.repo.publish(finish(ctx), commit, cand.changes); err != nil {
		return err
	}
	if len(edited) > 0 {
		count.addFloat("gitopper_service_drift_total", labels("service", s.service), float64(len(edited)))
		slog.Warn(fmt.Sprintf("%s: local edits undone, kept as a patch in %s: %s", s.service, filepath.Join(s.stateDir, "patches", s.service), strings.Join(edited, " ")))
	}
	if len(cand.changes) > 0 && commit != r.Live {
		slog.Info(fmt.Sprintf("%s: %.8s is live", s.service, commit), "before", fmt.Sprintf("%.8s", r.Live), "files", len(cand.changes))
	}
	r.Live, r.Content, r.Publishing, s.edits, s.checked = commit, cand.content, nil, edits, true
	if commit == r.Tip || s.signers != "" && r.Newest != "" && s.repo.descends(ctx, commit, r.Newest) == nil {
		r.Newest = commit
	}
	s.snap = nil // what was edited in the meantime is found by the next look at them
	return s.save()
}

// drift returns the tracked files that were edited here: that are neither what is live nor what a publish that was cut
// short was making of them.
func (s *Service) drift(ctx context.Context) ([]string, error) {
	r := &s.rec
	if r.Live == "" || s.snap.holds(s.repo.dir) && len(r.Publishing) == 0 {
		return nil, nil
	}
	if err := s.repo.unhide(ctx); err != nil {
		return nil, err
	}
	changes, err := s.repo.diff(ctx, r.Live)
	if err != nil {
		return nil, err
	}
	if r.Content == "" { // other links than before: a file that is missing was never there
		changes = slices.DeleteFunc(changes, func(c change) bool { return c.status == 'D' })
	}
	edited := paths(changes)
	for _, half := range r.Publishing {
		changes, err := s.repo.diff(ctx, half)
		if err != nil {
			return nil, err
		}
		still := paths(changes)
		edited = slices.DeleteFunc(edited, func(p string) bool { _, found := slices.BinarySearch(still, p); return !found })
	}
	if len(edited) == 0 {
		s.snap, err = s.repo.snap(ctx)
	}
	return edited, err
}

// paths returns the paths of changes, sorted.
func paths(changes []change) []string {
	var p []string
	for _, c := range changes {
		p = append(p, c.path)
	}
	slices.Sort(p)
	return p
}

// keepPatch saves local edits of files as a patch against commit; the last 20 of a service are kept. The same once more, which
// a publish that fails time and again brings about, takes no older one's place.
func (s *Service) keepPatch(ctx context.Context, commit string, files []string) error {
	if len(files) == 0 {
		return nil
	}
	dir, sum := filepath.Join(s.stateDir, "patches", s.service), sha256.New()
	name, same := time.Now().UTC().Format("20060102T150405.000000000Z")+".patch", errors.New("kept already")
	err := replaceFile(filepath.Join(dir, name), func(w io.Writer) error {
		err := s.repo.patch(ctx, commit, files, io.MultiWriter(w, sum))
		if err == nil && bytes.Equal(sum.Sum(nil), s.patched) && lexists(filepath.Join(dir, s.patch)) {
			err = same
		}
		return err
	})
	if errors.Is(err, same) {
		return nil
	}
	if err != nil {
		if pe, ok := errors.AsType[*fs.PathError](err); ok {
			err = fmt.Errorf("%s: %w", dir, pe.Err) // without a name that is another at each try
		}
		return fmt.Errorf("keep local edits of %.200s: %w: revert them by hand, or move them away", strings.Join(files, " "), err)
	}
	s.patch, s.patched = name, sum.Sum(nil)
	old, err := os.ReadDir(dir) // by name, so the oldest first, but for a clock that was set back
	old = slices.DeleteFunc(old, func(e fs.DirEntry) bool { return e.Name() == name })
	for ; err == nil && len(old) >= 20; old = old[1:] {
		err = os.Remove(filepath.Join(dir, old[0].Name()))
	}
	return err
}

// mountAll makes every local show its link, and takes away the mounts that earlier configs wanted. It needs neither network
// nor systemd, so that it can be the first thing after boot.
func (s *Service) mountAll() error {
	r := &s.rec
	var errs error
	if !s.swept {
		// First, for a new local may lie in, around or on an old one.
		if errs = s.sweep(); errors.As(errs, new(recordError)) {
			errs = nil // done, and saved by the next that can be
		}
		s.swept = errs == nil
	}
	var wrong []dir
	for _, d := range s.dirs {
		if d.local != "" && !shows(s.repo.dir, d.link, d.local) {
			wrong = append(wrong, d)
		}
	}
	if len(wrong) == 0 {
		return errs
	}
	mounts, err := readMountinfo()
	if err != nil {
		return err
	}
	// Remembered before it is done: a mount or a directory that nobody knows of would stay for ever.
	r.Told = ""
	unknown := false
	for _, d := range wrong {
		if !slices.Contains(r.Mounts, d.local) {
			r.Mounts, unknown = append(r.Mounts, d.local), true
		}
		if !lexists(d.local) {
			if err := s.remember(d.local); err != nil {
				return err
			}
		}
	}
	if err := s.save(); err != nil && unknown {
		return err
	}
	root, err := s.repo.open()
	if err != nil {
		return err
	}
	defer root.Close()
	for _, d := range wrong {
		at := d.local
		if p, err := filepath.EvalSymlinks(d.local); err == nil {
			at = p
		}
		top := visible(mounts, at)
		ours := top != nil && slices.ContainsFunc(s.own(mounts), func(m mountPoint) bool { return m.id == top.id })
		err := bind(root, d, s.repo.acct, ours)
		if err == nil && !shows(s.repo.dir, d.link, d.local) {
			err = fmt.Errorf("%s does not show %q after it was mounted there: another mount covers it", d.local, d.link)
		}
		if errs = errors.Join(errs, err); err == nil {
			slog.Info(fmt.Sprintf("%s: mounted %s on %s", s.service, d.link, d.local))
		}
	}
	return errs
}

// lexists says whether there is something of that name, be it a link to nowhere.
func lexists(name string) bool {
	_, err := os.Lstat(name)
	return err == nil
}

// own returns the mounts whose source lies in this service's checkout, at its place of now or before.
func (s *Service) own(mounts []mountPoint) (own []mountPoint) {
	for _, d := range s.rec.Dirs {
		own = append(own, sourcesBelow(mounts, d)...)
	}
	return own
}

// sweep takes away our mounts that are not wanted, and what was made for them.
func (s *Service) sweep() error {
	wanted := map[string]bool{}
	for _, d := range s.dirs {
		if fi, err := os.Stat(d.local); d.local == "" || err == nil && fi.IsDir() == d.file {
			continue // of the wrong kind, it can only be a mount from before
		}
		wanted[d.local] = true
		if at, err := filepath.EvalSymlinks(d.local); err == nil {
			wanted[at] = true
		}
	}
	for {
		mounts, err := readMountinfo()
		if err != nil {
			return err
		}
		gone := 0
		for _, m := range s.own(mounts) {
			if v := visible(mounts, m.point); wanted[m.point] || v == nil || v.id != m.id {
				continue // under somebody else's mount it can't be reached, and hides nothing
			}
			if err := unbind(m.point); err != nil {
				return fmt.Errorf("unmount %s: %w", m.point, err)
			}
			slog.Info(fmt.Sprintf("%s: unmounted %s, which is no longer in dirs", s.service, m.point))
			gone++
		}
		if gone == 0 {
			break
		}
	}
	var made, keep []string
	for _, p := range s.rec.Made {
		used := false
		for w := range wanted {
			used = used || w == p || strings.HasPrefix(w, p+"/")
		}
		if used {
			keep = append(keep, p)
		} else {
			made = append(made, p)
		}
	}
	s.rec.Made = append(keep, unmake(made)...)
	slices.Sort(s.rec.Made)
	s.rec.Mounts = slices.DeleteFunc(s.rec.Mounts, func(l string) bool { return !wanted[l] })
	return s.save()
}

// serve tells the unit of what it has not seen, watches it settle, and else looks whether it is still up.
func (s *Service) serve(ctx context.Context) error {
	r := &s.rec
	if s.action == "" {
		return s.settled()
	}
	boot := bootID()
	told := r.Told == r.Content && r.Told != "" && r.Boot == boot
	if !told {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		units := slices.ContainsFunc(s.dirs, func(d dir) bool { return inUnitDir(d.local) })
		verb, err := tell(finish(ctx), s.service, s.action, units, s.step)
		if err != nil {
			return brokenError{err}
		}
		slog.Info(fmt.Sprintf("%s: told by %s", s.service, cmp.Or(verb, "none: it is down until it is triggered")), "commit", fmt.Sprintf("%.8s", r.Live))
		r.Told, r.Boot = r.Content, boot
		if err := s.save(); err != nil {
			return err
		}
	}
	if !told || r.GoodContent != r.Content {
		s.step("settle")
		u, err := settle(ctx, s.service, s.action, s.settle)
		s.toldAt = time.Now()
		if err == nil && s.action != "restart" {
			for _, d := range s.dirs {
				if d.local != "" && u.seesOld(d.local) {
					err = fmt.Errorf("unit has private mounts, use action = \"restart\": its main process does not see the new %s", d.local)
				}
			}
		}
		if err != nil {
			if ctx.Err() == nil {
				r.Told = "" // not done before it is seen to have worked
				if serr := s.save(); serr != nil {
					return serr
				}
			}
			return brokenError{err}
		}
		return s.settled()
	}
	u := s.unit.Load()
	if u == nil || s.err != nil || u.at.Before(s.toldAt) {
		units, err := showUnits(ctx, s.service)
		if err != nil {
			return brokenError{err}
		}
		u = &units[0]
	}
	if !u.well(s.action) {
		return brokenError{errors.New(u.describe())}
	}
	return s.settled()
}

// settled remembers that what is live is good.
func (s *Service) settled() error {
	r := &s.rec
	if r.Good != r.Live || r.GoodContent != r.Content {
		r.Good, r.GoodContent, r.Second = r.Live, r.Content, ""
		r.Refused = slices.DeleteFunc(r.Refused, func(f refusal) bool { return f.Content == r.Content })
	}
	for i := range r.Refused {
		r.Refused[i].Closed = r.Refused[i].Closed || !r.Refused[i].Doubt
	}
	r.Told = r.Content
	return s.save()
}

// fallsBack says whether trouble with what is live is to be met by the last good commit: it is on trial, and another one is known.
func (s *Service) fallsBack(ctx context.Context, err error) bool {
	r := &s.rec
	if !s.fallback || r.Pin != nil || ctx.Err() != nil || !errors.As(err, new(brokenError)) || errors.As(err, new(recordError)) || r.Good == "" || r.Good == r.Live || r.Content == r.GoodContent {
		return false
	}
	content, cerr := s.repo.content(ctx, r.Good)
	return cerr == nil && content != r.Content
}

// takeBack makes the last good commit live again. What failed is remembered first, so that a crash in between goes on from
// here.
func (s *Service) takeBack(ctx context.Context, cause error) error {
	r := &s.rec
	second := r.Second == r.Content
	verdict := *s.refuse(r.Live, r.Content, &refusal{Reason: "fallback", Closed: second, Info: fmt.Sprintf("commit %.8s taken back, %.8s runs; with %.8s: %v", r.Live, r.Good, r.Live, cause)})
	r.Second = ""
	if err := s.save(); err != nil {
		return err
	}
	s.step(fmt.Sprintf("fall back to %.8s", r.Good))
	err := s.goLive(ctx, r.Good)
	if err == nil || ctx.Err() != nil {
		return cmp.Or(err, error(&verdict))
	}
	s.doubt(&verdict)
	return brokenError{fmt.Errorf("%w; %w", &verdict, err)}
}

// doubt notes that the last good commit fails as well as the one that was taken back for it, which was perhaps not to blame.
func (s *Service) doubt(verdict error) {
	var v *refusal
	if !errors.As(verdict, &v) || v.Reason != "fallback" {
		return
	}
	if f := s.refused(v.Content, ""); f != nil && !f.Closed && !f.Doubt {
		f.Doubt = true
		f.Info = strings.Replace(f.Info, " taken back, ", " failed, and so does the last good one, ", 1)
		*v = *f
	}
}

// operate carries out what an operator asked for, and answers when it is done.
func (s *Service) operate(ctx context.Context, o op) error {
	if o.step != nil {
		s.step = o.step
		defer func() { s.step = func(string) {} }()
	}
	r := &s.rec
	before := *r
	var lookErr error
	switch o.verb {
	case "freeze":
		if r.Live == "" {
			return &opError{status: "Conflict", err: errors.New("nothing runs yet: there is no commit to freeze")}
		}
		r.Pin, s.force = &pin{Commit: r.Live, Info: strings.TrimSuffix(o.who+": "+o.reason, ": "), Until: o.until}, false
	case "unfreeze":
		r.Pin, s.force = nil, true
		_ = s.lookNow(ctx) // it counts as a missed look
	case "pull":
		if r.Pin != nil {
			return &opError{status: "Conflict", err: fmt.Errorf("pinned (%s): unfreeze it first", r.Pin.Info)}
		}
		r.Refused, r.Second = nil, ""
		if s.Status().state == stateBroken {
			r.Told = "" // a unit that went down is brought up
		}
		lookErr = s.lookNow(ctx)
	case "rollback":
		if err := s.rollback(ctx, o); ctx.Err() != nil {
			return &opError{status: "Conflict", err: interrupted(ctx)}
		} else if err != nil {
			return err
		}
	}
	if err := s.save(); err != nil {
		s.rec, s.rolling, s.force = before, false, false
		return &opError{status: "Internal Server Error", err: err}
	}
	s.publishStatus()
	err := s.reconcile(ctx)
	s.conclude(ctx, err)
	if o.verb == "freeze" {
		return nil // what else the pass found is not of it
	}
	if ctx.Err() != nil {
		return &opError{status: "Conflict", err: interrupted(ctx), done: true}
	}
	if s.err != nil {
		return &opError{status: "Internal Server Error", err: fmt.Errorf("%s is %s: %s", s.service, s.Status().State, oneLine(s.err.Error())), done: true}
	}
	if lookErr != nil {
		return &opError{status: "Internal Server Error", err: lookErr, done: true}
	}
	return nil
}

// interrupted says what ended ctx: another operator, or our own end.
func interrupted(ctx context.Context) error {
	if end, ok := errors.AsType[ending](context.Cause(ctx)); ok {
		return fmt.Errorf("gitopper is stopping: %w", end)
	}
	return context.Cause(ctx)
}

// rollback finds out whether the commit can run, changing nothing if it can't, and then pins the service to it.
func (s *Service) rollback(ctx context.Context, o op) error {
	if err := s.prepareCheckout(ctx); err != nil {
		return &opError{status: "Internal Server Error", err: err}
	}
	commit, ran, err := s.repo.find(ctx, o.hash)
	if err != nil && ctx.Err() == nil {
		// It may be newer than our last fetch.
		if _, ferr := s.repo.fetch(ctx); ferr == nil {
			commit, ran, err = s.repo.find(ctx, o.hash)
		}
	}
	if err != nil {
		return &opError{status: "Not Found", err: err}
	}
	content, err := s.repo.content(ctx, commit)
	if err == nil && (content != s.rec.Content || !ran && s.signers != "") {
		if ran {
			err = s.layOut(ctx, commit, content)
		} else {
			err = s.judgeCommit(ctx, commit, content, "")
		}
	}
	var f *refusal
	if errors.As(err, &f) {
		return &opError{status: "Not Acceptable", err: err}
	}
	if err != nil {
		return &opError{status: "Internal Server Error", err: fmt.Errorf("commit %.8s: %w", commit, err)}
	}
	s.rec.Pin = &pin{Commit: commit, Info: fmt.Sprintf("ROLLBACK: %.8s, %s", commit, o.who)}
	s.rec.Refused, s.rec.Second, s.rolling, s.force = nil, "", true, true
	return nil
}

// lookNow looks at upstream for this service alone, and returns what is wrong with it.
func (s *Service) lookNow(ctx context.Context) error {
	s.step("look")
	return lookAt(ctx, []*Service{s})
}

// lookAt looks once at the upstream that the services share, and hands each what it found. It returns what went wrong.
func lookAt(ctx context.Context, services []*Service) error {
	first, at := services[0], time.Now()
	acct, err := lookupAccount(ctx, first.user)
	var branches []string
	for _, s := range services {
		branches = append(branches, s.branch)
	}
	slices.Sort(branches)
	var tips map[string]string
	if err == nil {
		tips, err = lookUpstream(ctx, acct, first.upstream, slices.Compact(branches))
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	var missing error
	for _, s := range services {
		l, old := &look{tip: tips[s.branch], err: err, at: at}, s.looked.Load()
		if err == nil && l.tip == "" {
			l.err = fmt.Errorf("branch %q does not exist in %s", s.branch, redact(s.upstream))
		}
		if l.err != nil && old != nil {
			l.misses = old.misses
		}
		if l.err != nil {
			l.misses++
			missing = l.err
		}
		if old == nil || old.at.Before(at) {
			s.looked.Store(l)
		}
	}
	return missing
}

// watchUpstream looks at the upstream that the services share, for ever: every interval and up to half of it more, and
// sooner while it can't be reached.
func watchUpstream(ctx context.Context, services []*Service, interval time.Duration) {
	var backoff time.Duration
	for {
		wait := interval + rand.N(interval/2+1)
		if err := lookAt(ctx, services); err != nil {
			backoff = min(max(2*backoff, 5*time.Second), interval)
			wait = backoff
		} else {
			backoff = 0
		}
		for _, s := range services {
			s.nudge()
		}
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return
		}
	}
}

// watchUnits asks systemd every interval for the state of all services' units, in one go, and hands each what it found.
func watchUnits(ctx context.Context, services []*Service, interval time.Duration) {
	var names []string
	var with []*Service
	for _, s := range services {
		if s.action != "" {
			names, with = append(names, s.service), append(with, s)
		}
	}
	for len(names) > 0 {
		select {
		case <-time.After(interval + rand.N(interval/2+1)):
		case <-ctx.Done():
			return
		}
		units, err := showUnits(ctx, names...)
		for i, s := range with {
			if err == nil {
				s.unit.Store(&units[i])
			} else {
				s.unit.Store(nil) // it asks for itself, and has the error
			}
			if s.Status().state < stateBroken { // else it is being tried again anyway
				s.nudge()
			}
		}
	}
}
