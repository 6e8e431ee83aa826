package main

import (
	"cmp"
	"context"
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

// Service is one managed service. All fields without an atomic type belong to its goroutine, see run.
type Service struct {
	spec
	up       *upstream
	files    files
	stop     stopping
	stateDir string
	interval time.Duration
	gate     func(read func(string) ([]byte, error)) error // judges a candidate of our own config; else nil

	rec      record
	saved    []byte   // what is on disk of rec
	last     *outcome // of the last pass; nil before the first, and since a rollback was asked for
	undo     bool     // an operator wants local edits of a pinned service undone
	packages packageCheck
	facts    facts
	step     func(string) // told of each step

	requests chan request
	poke     chan struct{} // size 1: something is to be looked at
	ended    chan struct{} // closed when run has returned
	status   atomic.Pointer[Status]
	unit     atomic.Pointer[unit] // as seen at the last round
	deadline atomic.Int64         // Unix time by which the step under way should have ended; 0: idle, or an install
}

// facts are what was found out, and is not asked again while nothing fails.
type facts struct {
	ready  bool      // the directory and its owner were looked at, and mounts of earlier configs are gone
	tip    version   // upstream's newest commit that was judged, and was accepted or shows what is live
	toldAt time.Time // when the unit last settled
}

// candidate is a version whose files were compared with the disk, and are staged where the disk lacks them.
type candidate struct {
	version
	want   tree
	diff   diff
	edited []string // local edits that are to stay
}

// op is what an operator asks of a service.
type op struct {
	verb   string       // freeze, unfreeze, rollback or pull
	hash   string       // rollback: 4 to 64 lower case hex digits
	until  time.Time    // freeze: zero is until unfreeze
	reason string       // freeze, rollback
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

// request is an operation on its way to a service's goroutine; reply has room for the answer.
type request struct {
	op
	reply chan error
}

// newService makes a service from its validated config and the record of its earlier life. Nothing is changed on the host,
// but that a record which can't be read is moved aside.
func newService(sp spec, stateDir string, up *upstream, interval time.Duration, stop stopping) *Service {
	s := &Service{
		spec: sp, up: up, stop: stop, stateDir: stateDir, interval: interval,
		files: files{
			dir: filepath.Join(sp.mount, sp.service), manifest: manifestFile(stateDir, sp.service), dirs: sp.dirs,
		},
		step:     func(string) {},
		requests: make(chan request), poke: make(chan struct{}, 1), ended: make(chan struct{}),
	}
	s.loadRecord()
	if of := digest(sp.upstream, sp.branch); s.rec.Newest.Of != of {
		s.rec.Newest = newest{Of: of}
	}
	up.track(sp.branch, sp.dirs, s.nudge)
	s.publishStatus()
	return s
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
			case err := <-r.reply: // both were ready
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
func (s *Service) run() {
	defer close(s.ended)
	var queue []request
	var backoff time.Duration
	// The first look at upstream starts the first pass; where it takes long, the unit is not kept waiting.
	again := time.NewTimer(5 * time.Second)
	for s.stop.soft.Err() == nil { // at the end what is queued is not begun, and its operator is told
		job := s.pass
		if len(queue) > 0 {
			r := queue[0]
			queue = queue[1:]
			job = func(ctx context.Context) { r.reply <- s.operate(ctx, r.op) }
		} else {
			select {
			case <-s.stop.soft.Done():
				return
			case r := <-s.requests:
				queue = append(queue, r)
				continue
			case <-s.poke:
			case <-again.C:
			}
		}

		var done bool
		if queue, done = s.work(job, queue); !done {
			return
		}
		again.Stop()
		var wait time.Duration
		if wait, backoff = s.retry(backoff); wait > 0 {
			again.Reset(wait)
		}
	}
}

// work does one job while it takes in what operators ask for: all but a pull end what the job merely waits for, and go
// before pulls. At our end a job that hangs is left behind; an install is waited for. done says that the job has ended.
func (s *Service) work(job func(context.Context), queue []request) (_ []request, done bool) {
	ctx, end := context.WithCancelCause(s.stop.soft)
	defer end(nil)
	ended := make(chan struct{})
	s.within(localLimit)
	go func() {
		defer close(ended)
		job(ctx)
	}()

	hard := s.stop.hard.Done()
	for {
		select {
		case <-ended:
			s.deadline.Store(0)
			if ctx.Err() != nil {
				s.nudge() // by somebody who may have done nothing else
			}
			return queue, true
		case <-hard:
			if s.deadline.Load() != 0 {
				return queue, false
			}
			hard = nil
		case r := <-s.requests:
			if r.verb == "pull" {
				queue = append(queue, r)
				continue
			}
			end(fmt.Errorf("ended by a %s of %s", r.verb, r.who))
			isPull := func(q request) bool { return q.verb == "pull" }
			i := slices.IndexFunc(queue, isPull)
			if i < 0 {
				i = len(queue)
			}
			queue = slices.Insert(queue, i, r)
		}
	}
}

// within tells the watchdog that the next step has a time limit of its own, and should end by then.
func (s *Service) within(limit time.Duration) {
	s.deadline.Store(time.Now().Add(limit + 5*time.Minute).Unix())
}

// stuck says whether a step takes longer than its limits allow.
func (s *Service) stuck(now time.Time) bool {
	d := s.deadline.Load()
	return d != 0 && now.Unix() > d
}

// retry says when the next pass is due if nothing else asks for one; zero is never.
func (s *Service) retry(backoff time.Duration) (wait, next time.Duration) {
	failed := s.last == nil || s.last.err != nil
	if failed || s.rec.Suspect != nil { // what was refused waits for another commit or an operator
		next = min(max(2*backoff, 5*time.Second), s.interval)
		wait = next
	}
	p := s.rec.Pin
	if p == nil || p.Until.IsZero() {
		return wait, next
	}
	left := time.Until(p.Until)
	if wait == 0 || 0 < left && left < wait {
		wait = max(left, time.Millisecond)
	}
	return wait, next
}

// pass reconciles once and makes the outcome known. A pass that was ended from outside has no outcome.
func (s *Service) pass(ctx context.Context) {
	out := s.reconcile(ctx)
	s.conclude(ctx, out)
}

func (s *Service) conclude(ctx context.Context, out outcome) {
	wasEnded := ctx.Err() != nil
	if !wasEnded {
		s.last, s.undo = &out, false
		s.facts.ready = s.facts.ready && out.err == nil
	}
	s.publishStatus()
	err := s.save()
	if err != nil && !wasEnded && out.err == nil {
		s.last.err = err
		s.publishStatus()
	}
}

// reconcile is one pass between what is wanted (the config, and upstream's commit or the pin) and what is there. It may be
// ended by ctx or killed at any point: the next one goes on from what it finds.
func (s *Service) reconcile(ctx context.Context) (out outcome) {
	if out.err = s.save(); out.err != nil { // where nothing can be remembered, nothing is changed
		return out
	}
	s.endFreeze()
	if out.err = s.ensurePackage(ctx); out.err != nil {
		return out
	}
	if out.err = s.ensureReady(ctx); out.err != nil {
		return out
	}

	c := s.choose(ctx, &out)
	if c == nil {
		return out
	}
	good := s.rec.Good
	err := s.bring(ctx, c, &out)
	switch {
	case err == nil:
		out.err = cmp.Or(out.err, s.acquitOrConvict(c.Content == good.Content, &out))
	case s.onTrial(ctx, c.version, err):
		s.takeBack(ctx, c.version, err, &out)
	case out.err != nil:
		out.err = fmt.Errorf("%w; %w", out.err, err)
	default:
		out.err = err
		s.excuse(&out)
	}
	return out
}

func (s *Service) endFreeze() {
	p := s.rec.Pin
	if p == nil || p.Until.IsZero() || time.Now().Before(p.Until) {
		return
	}
	slog.Info(fmt.Sprintf("%s: freeze has ended: %s", s.service, p.Info))
	s.rec.Pin = nil
}

// ensurePackage sees to it that the package is there.
func (s *Service) ensurePackage(ctx context.Context) error {
	if s.pkg == "" {
		return nil
	}
	// Others' installs may rightly take hours: the watchdog's end of us would be the end of the package manager.
	s.deadline.Store(0)
	installed, err := s.packages.ensure(ctx, s.pkg, s.step)
	s.within(localLimit)
	if installed {
		slog.Info(fmt.Sprintf("%s: installed package %s", s.service, s.pkg))
		s.untell()
	}
	if err != nil {
		return brokenError{err}
	}
	return nil
}

// ensureReady finds the service's user, takes the mounts of earlier configs away, and makes the directory the service's.
func (s *Service) ensureReady(ctx context.Context) error {
	if s.facts.ready && !s.files.pending() {
		return nil
	}
	acct, err := lookupAccount(ctx, s.user)
	if err != nil {
		return brokenError{err}
	}
	s.files.acct = acct
	if err := s.sweep(ctx); err != nil {
		return err
	}

	var known tree
	if s.files.live().Commit == "" && s.rec.Told.Commit != "" {
		known, err = s.up.tree(ctx, s.rec.Told.Commit, s.dirs)
		isRefused := errors.As(err, new(*refusal))
		if err != nil && !isRefused {
			return cmp.Or(s.up.looked(s.branch).err, err)
		}
	}
	s.within(10 * time.Minute)
	if err := s.files.prepare(ctx, known); err != nil {
		return err
	}
	s.facts.ready = true
	return nil
}

// sweep takes away the mounts that earlier configs wanted, and has systemd forget the units that lay in them.
func (s *Service) sweep(ctx context.Context) error {
	gone, err := s.rec.Mounts.sweep(s.service, s.files.dir, s.dirs, s.save)
	if err != nil {
		return brokenError{err}
	}
	if !slices.ContainsFunc(gone, inUnitDir) {
		return nil
	}
	if err := daemonReload(ctx); err != nil {
		return brokenError{err}
	}
	return nil
}

// choose returns the version that should run, judged and laid out, nil if nothing can be done; out says why that is not
// upstream's newest, or what is wrong.
func (s *Service) choose(ctx context.Context, out *outcome) *candidate {
	live := s.files.live()
	want, err := s.wanted(ctx, live, out)
	if err != nil || want.Commit == "" {
		out.err = cmp.Or(err, out.err)
		return nil
	}

	c, err := s.examine(ctx, want, live)
	if err == nil {
		return c
	}
	if f := (*refusal)(nil); errors.As(err, &f) && s.rec.Pin == nil {
		out.refused = s.refuse(want, f)
	} else {
		out.err = cmp.Or(out.err, err)
	}
	rest := s.rest(ctx, live)
	isNoOther := rest.Commit == "" || rest.Commit == want.Commit
	if s.rec.Pin != nil || isNoOther || ctx.Err() != nil {
		return nil
	}
	c, err = s.layOut(ctx, rest) // what runs is looked after meanwhile
	if err != nil {
		out.err = cmp.Or(out.err, err)
		return nil
	}
	return c
}

// wanted says which version should run: the pin's, or upstream's newest unless it is refused already, or a place to stay.
func (s *Service) wanted(ctx context.Context, live version, out *outcome) (version, error) {
	if p := s.rec.Pin; p != nil {
		v, err := s.today(ctx, p.version, live)
		if err == nil {
			p.version = v
		}
		return v, err
	}

	l := s.up.looked(s.branch)
	firstOnTopOfTrouble := s.last == nil && s.rec.Row.State == stateDiff.String()
	counts := l.misses > 1 || live.Commit == "" || firstOnTopOfTrouble
	if l.err != nil && counts {
		out.err = l.err
	}
	rest := s.rest(ctx, live)
	if l.tip == "" {
		if rest.Commit == "" {
			out.err = cmp.Or(out.err, errors.New("upstream was not looked at yet"))
		}
		return rest, nil
	}

	tip, err := s.today(ctx, version{Commit: l.tip}, live)
	if f := (*refusal)(nil); errors.As(err, &f) {
		out.refused = s.refuse(version{Commit: l.tip}, f)
		return rest, nil
	}
	if err != nil {
		out.err = cmp.Or(out.err, err)
		return rest, nil
	}
	if p := s.rec.Suspect; p != nil && p.Content == tip.Content {
		out.refused = &p.refusal
		return rest, nil
	}
	if f := s.refused(tip); f != nil {
		out.refused = f
		return rest, nil
	}
	return tip, nil
}

// today returns v with the content that today's dirs show in it: a *refusal where they can't be shown.
func (s *Service) today(ctx context.Context, v, live version) (version, error) {
	if v.Commit == "" || s.isOfToday(v) {
		return v, nil
	}
	if v.Commit == live.Commit && s.isOfToday(live) {
		return live, nil
	}
	content, err := s.up.content(ctx, v.Commit, s.dirs)
	v.Content = linksKey(s.dirs)[:8] + "-" + content
	return v, err
}

// isOfToday says whether a version's content is that of today's links. Contents begin with a digest of the links.
func (s *Service) isOfToday(v version) bool {
	return strings.HasPrefix(v.Content, linksKey(s.dirs)[:8]+"-")
}

// rest is where to stay when upstream's commit is not to be had: on what runs, unless that itself was taken back.
func (s *Service) rest(ctx context.Context, live version) version {
	tookBack := s.refused(live) != nil || s.rec.Suspect != nil && s.rec.Suspect.Content == live.Content
	if tookBack && s.rec.Good.Commit != "" {
		if good, err := s.today(ctx, s.rec.Good, live); err == nil {
			return good
		}
	}
	v, err := s.today(ctx, live, live)
	if err != nil {
		return version{} // its links are others than those of today, and can't be shown: all stays as it is
	}
	return v
}

// examine looks at a version before anything of it goes live: its signature, and what our own config's gate and the check
// say of it. A *refusal says why it must not. What runs is not examined again, and neither is a pin, which was when it
// was made.
func (s *Service) examine(ctx context.Context, v, live version) (*candidate, error) {
	isNew := s.rec.Pin == nil && v.Commit != s.facts.tip.Commit
	if s.signers != "" && isNew && v.Commit != live.Commit && v.Commit != s.rec.Good.Commit {
		if err := s.verify(ctx, v.Commit, live); err != nil {
			return nil, err
		}
	}
	if v.Content == live.Content {
		s.facts.tip = v
		return s.layOut(ctx, v)
	}
	c, err := s.layOut(ctx, v)
	if err != nil || s.rec.Pin != nil || v == s.rec.Good {
		return c, err
	}
	if err := s.precheck(ctx, c); err != nil {
		return nil, err
	}
	s.facts.tip = v
	return c, nil
}

// verify checks a commit's signature, and that it descends from the newest one that ever went live.
func (s *Service) verify(ctx context.Context, commit string, live version) error {
	s.step("verify signature")
	s.within(fetchLimit)
	older := s.rec.Newest.Commit
	if s.rec.Pin == nil && older != "" && live.Commit != "" && live.Commit != s.rec.Good.Commit {
		older = live.Commit // on trial, and perhaps too new to be in the record
	}
	if older != "" {
		if err := s.up.descends(ctx, commit, older); err != nil {
			return err
		}
	}
	return s.up.verify(ctx, commit, s.signers)
}

// layOut compares a version's files with the disk, and stages those that the disk lacks. Local edits of a pinned service
// are left out, but after a rollback or unfreeze.
func (s *Service) layOut(ctx context.Context, v version) (c *candidate, err error) {
	s.within(fetchLimit + localLimit)
	if s.files.pending() {
		if err := s.files.prepare(ctx, nil); err != nil {
			return nil, err
		}
	}
	c = &candidate{version: v}
	live := s.files.live()
	if v.Content == live.Content && !s.files.pending() {
		c.want = s.files.tree()
	} else if c.want, err = s.up.tree(ctx, v.Commit, s.dirs); err != nil {
		return nil, err
	}
	if c.diff, err = s.files.compare(ctx, c.want); err != nil {
		return nil, err
	}
	if s.rec.Pin != nil && !s.undo {
		c.edited, c.diff.edited = c.diff.edited, nil
		stays := func(p string) bool { return slices.Contains(c.edited, p) }
		c.diff.put = slices.DeleteFunc(c.diff.put, stays)
		c.diff.gone = slices.DeleteFunc(c.diff.gone, stays)
	}
	if len(c.diff.put) == 0 {
		return c, nil
	}

	s.within(missingLimit)
	if err := s.up.fetchMissing(ctx, c.want); err != nil {
		return nil, err
	}
	o, err := s.up.open(ctx)
	if err != nil {
		return nil, err
	}
	defer o.close()
	s.within(fetchLimit)
	return c, s.files.stage(ctx, c.want, c.diff, o.blob)
}

// precheck has our own config's gate and the check judge the candidate. Every local is made first where it is missing, for
// a mount needs a place.
func (s *Service) precheck(ctx context.Context, c *candidate) error {
	if s.gate != nil {
		read := func(name string) ([]byte, error) { return s.readCandidate(c, name) }
		if err := s.gate(read); err != nil {
			return &refusal{Reason: "config", Info: fmt.Sprintf("commit %.8s: %v", c.Commit, err)}
		}
	}
	if len(s.check) == 0 {
		return nil
	}
	if err := s.rec.Mounts.makeTargets(s.dirs, s.files.acct, s.save); err != nil {
		return brokenError{err}
	}
	s.step("check")
	s.within(checkLimit)
	err := runCheck(ctx, filepath.Join(s.stateDir, "check", s.service),
		view{Checkout: s.files.dir, Dirs: s.dirs, Gone: c.diff.gone, Argv: s.check})
	if f := (*refusal)(nil); errors.As(err, &f) {
		f.Info = fmt.Sprintf("commit %.8s: %s", c.Commit, f.Info)
	}
	return err
}

// readCandidate reads a file as it would be if the candidate were live.
func (s *Service) readCandidate(c *candidate, name string) ([]byte, error) {
	rel, err := filepath.Rel(s.files.dir, name)
	if err != nil || strings.HasPrefix(rel, "..") {
		return os.ReadFile(name)
	}
	if slices.Contains(c.diff.gone, rel) {
		return nil, &fs.PathError{Op: "open", Path: name, Err: fs.ErrNotExist}
	}
	top, err := openOwn(s.files.dir)
	if err != nil {
		return nil, err
	}
	defer top.close()
	p, err := top.below(stageDir + "/" + rel)
	if err != nil {
		p, err = top.below(rel)
	}
	if err != nil {
		return nil, err
	}
	defer p.close()
	st, err := p.stat()
	isFile := st.Mode&syscall.S_IFMT == syscall.S_IFREG
	if err != nil || !isFile {
		return nil, cmp.Or(err, fmt.Errorf("%s: not a regular file", name))
	}
	f, err := os.Open(p.path())
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, 1<<20))
}

// bring makes a candidate's files live, shows them at every local, and sees to it that the unit runs on them: the one way,
// whoever wants it. Each step does nothing where nothing is to be done.
func (s *Service) bring(ctx context.Context, c *candidate, out *outcome) error {
	out.edited = c.edited
	if len(out.edited) > 0 && (s.last == nil || !slices.Equal(s.last.edited, out.edited)) {
		slog.Warn(fmt.Sprintf("%s: edited here: %s", s.service, someOf(out.edited)))
	}
	before, changes := s.files.live(), len(c.diff.put)+len(c.diff.gone)
	if changes > 0 || c.Content != before.Content || s.files.pending() {
		if err := s.publish(ctx, c); err != nil {
			return err
		}
	}

	if err := s.showLinks(c.Content); err != nil {
		return brokenError{err}
	}
	if err := s.keepEdits(c); err != nil {
		return err
	}
	if err := s.serve(ctx, c.version); err != nil {
		return err
	}
	commit, objects := s.files.live().Commit, s.up.objectsDir()
	if before.Content != c.Content || !s.files.isDressed(commit, objects) {
		s.within(6 * localLimit)
		if err := s.files.dress(ctx, commit, objects); err != nil {
			slog.Warn(fmt.Sprintf("%s: .git for people: %s", s.service, oneLine(err.Error())))
		}
	}
	return nil
}

// showLinks makes every local show its link. The record forgets first that the unit was told of content, if a mount is to
// change.
func (s *Service) showLinks(content string) error {
	isWrong := func(d dir) bool { return d.local != "" && !shows(s.files.dir, d.link, d.local) }
	if content != "" && s.rec.Told.Content == content && slices.ContainsFunc(s.dirs, isWrong) {
		s.untell()
		if err := s.save(); err != nil {
			return err
		}
	}
	changed, err := s.rec.Mounts.show(s.service, s.files.dir, s.dirs, s.files.acct, s.save)
	if changed {
		s.untell()
	}
	return err
}

// publish makes the staged files live. The record forgets first that the unit was told of them, where it was before.
func (s *Service) publish(ctx context.Context, c *candidate) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if s.rec.Told.Content == c.Content {
		s.untell()
		if err := s.save(); err != nil {
			return err
		}
	}
	s.step("publish")
	s.within(10 * time.Minute)
	before := s.files.live()
	if err := s.files.publish(s.stop.hard, c.version, c.want, c.diff); err != nil {
		s.facts.ready = false
		return err
	}
	if c.Content == before.Content {
		return nil
	}
	slog.Info(fmt.Sprintf("%s: %.8s is live", s.service, c.Commit), "before", fmt.Sprintf("%.8s", before.Commit),
		"files", len(c.diff.put)+len(c.diff.gone))
	if c.Commit == s.up.looked(s.branch).tip {
		s.rec.Newest.Commit = c.Commit
	}
	s.rec.Ran = slices.DeleteFunc(s.rec.Ran, func(v version) bool { return v.Commit == c.Commit })
	s.rec.Ran = append(s.rec.Ran, c.version)
	if n := len(s.rec.Ran); n > 50 {
		s.rec.Ran = slices.Clone(s.rec.Ran[n-50:])
	}
	return nil
}

// keepEdits deals with what came out of the live files, now that no local shows it any more.
func (s *Service) keepEdits(c *candidate) error {
	kept, err := s.files.clear(s.stop.hard)
	if err != nil {
		return err
	}
	for _, p := range kept {
		if s.files.wasAlien(c.diff, p) {
			slog.Warn(fmt.Sprintf("%s: somebody's own was in the way of a commit, kept as %s", s.service, p))
		}
	}
	isAlien := func(p string) bool { return s.files.wasAlien(c.diff, p) }
	undone := slices.DeleteFunc(kept, isAlien)
	if len(undone) > 0 || len(c.diff.edited) > 0 {
		n := max(len(undone), len(c.diff.edited)) // a file that was removed leaves nothing to keep
		count.addFloat("gitopper_service_drift_total", labels("service", s.service), float64(n))
		slog.Warn(fmt.Sprintf("%s: local edits undone: %s; kept: %s", s.service,
			someOf(c.diff.edited), cmp.Or(someOf(undone), "nothing")))
	}
	return nil
}

// serve tells the unit of what it has not seen, watches it settle, and else looks whether it is still up.
func (s *Service) serve(ctx context.Context, v version) error {
	now := told{v, bootID()}
	wasTold := s.rec.Told.Content == v.Content && s.rec.Told.Boot == now.Boot
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case s.action == "":
		return s.settled(now)
	case !wasTold:
		s.within(actionLimit + localLimit)
		hasUnits := slices.ContainsFunc(s.dirs, func(d dir) bool { return inUnitDir(d.local) })
		verb, err := tell(s.stop.hard, s.service, s.action, hasUnits, s.step)
		if err != nil {
			return brokenError{err}
		}
		slog.Info(fmt.Sprintf("%s: told by %s", s.service, cmp.Or(verb, "none: it is down until it is triggered")),
			"commit", fmt.Sprintf("%.8s", v.Commit))
		s.rec.Told = now
	case s.rec.Good.Content == v.Content:
		return s.stillUp(ctx)
	}

	s.step("settle")
	s.within(s.settle)
	err := s.watch(ctx)
	switch {
	case err == nil:
		return s.settled(now)
	case ctx.Err() == nil:
		s.untell() // not done before it is seen to have worked
	}
	return brokenError{err}
}

// watch watches the unit settle on what it was told of.
func (s *Service) watch(ctx context.Context) error {
	u, err := settle(ctx, s.service, s.action, s.settle)
	s.facts.toldAt = time.Now()
	if err != nil || s.action == "restart" {
		return err
	}
	for _, d := range s.dirs {
		if d.local != "" && u.seesOld(d.local) {
			return fmt.Errorf("unit has private mounts, use action = \"restart\": "+
				"its main process does not see the new %s", d.local)
		}
	}
	return nil
}

// stillUp looks whether a unit that settled is up, in what the last round saw where that is recent.
func (s *Service) stillUp(ctx context.Context) error {
	u := s.unit.Load()
	hadTrouble := s.last == nil || s.last.err != nil
	if u == nil || hadTrouble || u.at.Before(s.facts.toldAt) {
		now, err := showUnit(ctx, s.service)
		if err != nil {
			return brokenError{err}
		}
		u = &now
	}
	if !u.well(s.action) {
		return brokenError{errors.New(u.describe())}
	}
	return nil
}

// onTrial says whether trouble with what is live is to be met by the last good version: that one has not settled yet, and
// another one is known that did.
func (s *Service) onTrial(ctx context.Context, v version, err error) bool {
	noFallback := !s.fallback || s.rec.Pin != nil || s.rec.Good.Commit == ""
	noTrouble := !errors.As(err, new(brokenError)) || errors.As(err, new(recordError))
	if noFallback || noTrouble || ctx.Err() != nil {
		return false
	}
	good, err := s.today(ctx, s.rec.Good, s.files.live())
	return err == nil && good.Content != v.Content
}

// takeBack makes the last good version live again. What failed is remembered first, so that a crash in between goes on from
// here.
func (s *Service) takeBack(ctx context.Context, v version, cause error, out *outcome) {
	good, err := s.today(ctx, s.rec.Good, s.files.live())
	if err == nil {
		f := refusal{version: v, Judge: s.judge("fallback"), Reason: "fallback", Info: oneLine(fmt.Sprintf(
			"commit %.8s taken back, %.8s runs; with %.8s: %v", v.Commit, good.Commit, v.Commit, cause))}
		s.rec.Suspect, s.rec.Good = &suspect{refusal: f}, good
		s.untell()
		err = s.save()
	}
	if err != nil {
		out.err = err
		return
	}

	out.refused = &s.rec.Suspect.refusal
	s.step(fmt.Sprintf("fall back to %.8s", good.Commit))
	c, err := s.layOut(ctx, good)
	if err == nil {
		err = s.bring(ctx, c, out)
	}
	if err == nil {
		err = s.acquitOrConvict(true, out)
	}
	if out.err = err; err != nil {
		s.excuse(out)
	}
}

// operate carries out what an operator asked for, and answers when it is done.
func (s *Service) operate(ctx context.Context, o op) error {
	if o.step != nil {
		s.step = o.step
		defer func() { s.step = func(string) {} }()
	}
	before, last := s.rec, s.last
	lookErr, err := s.wish(ctx, o)
	if err != nil {
		return err
	}
	if err := s.save(); err != nil {
		s.rec, s.last, s.undo = before, last, false
		return &opError{status: "Internal Server Error", err: err}
	}
	s.publishStatus()

	out := s.reconcile(ctx)
	s.conclude(ctx, out)
	switch {
	case o.verb == "freeze":
		return nil // what else the pass found is not of it
	case ctx.Err() != nil:
		return &opError{status: "Conflict", err: interrupted(ctx), done: true}
	case s.last.trouble() != nil:
		st := s.Status()
		err := fmt.Errorf("%s is %s: %s", s.service, st.State, oneLine(s.last.trouble().Error()))
		return &opError{status: "Internal Server Error", err: err, done: true}
	case lookErr != nil:
		return &opError{status: "Internal Server Error", err: lookErr, done: true}
	}
	return nil
}

// wish notes what the operator wants; lookErr is what was wrong with a look at upstream that it took, which counts as a
// missed look.
func (s *Service) wish(ctx context.Context, o op) (lookErr, err error) {
	r := &s.rec
	switch o.verb {
	case "freeze":
		runs := s.running()
		if runs.Commit == "" {
			return nil, &opError{status: "Conflict", err: errors.New("nothing runs yet: there is no commit to freeze")}
		}
		r.Pin = &pin{version: runs, Info: strings.TrimSuffix(o.who+": "+o.reason, ": "), Until: o.until}
		s.undo = false
	case "unfreeze":
		r.Pin, s.undo = nil, true
		lookErr = s.lookNow(ctx, false)
	case "pull":
		if r.Pin != nil {
			err := fmt.Errorf("pinned (%s): unfreeze it first", r.Pin.Info)
			return nil, &opError{status: "Conflict", err: err}
		}
		r.Refused, r.Suspect = nil, nil
		if s.Status().state == stateBroken {
			s.untell() // a unit that went down is brought up
		}
		lookErr = s.lookNow(ctx, true)
	case "rollback":
		err = s.rollback(ctx, o)
		if ctx.Err() != nil {
			err = &opError{status: "Conflict", err: interrupted(ctx)}
		}
	}
	return lookErr, err
}

// interrupted says what ended ctx: another operator, or our own end.
func interrupted(ctx context.Context) error {
	if end, ok := errors.AsType[ending](context.Cause(ctx)); ok {
		return fmt.Errorf("gitopper is stopping: %w", end)
	}
	return context.Cause(ctx)
}

// lookNow looks at upstream at once, and returns what is wrong with it.
func (s *Service) lookNow(ctx context.Context, heal bool) error {
	s.step("fetch")
	s.within(cloneLimit)
	return s.up.lookNow(ctx, heal)
}

// rollback finds out whether the commit can run, changing nothing if it can't, and then pins the service to it.
func (s *Service) rollback(ctx context.Context, o op) error {
	if err := s.ensureReady(ctx); err != nil {
		return &opError{status: "Internal Server Error", err: err}
	}
	ran := s.ran()
	s.within(fetchLimit)
	commit, err := s.up.find(ctx, s.branch, o.hash, ran)
	if err != nil && ctx.Err() == nil && s.lookNow(ctx, false) == nil { // it may be newer than our last look
		commit, err = s.up.find(ctx, s.branch, o.hash, ran)
	}
	if err != nil {
		return &opError{status: "Not Found", err: err}
	}

	live := s.files.live()
	v, err := s.today(ctx, version{Commit: commit}, live)
	ranHere := slices.Contains(ran, commit)
	if err == nil && !ranHere {
		err = s.tryOut(ctx, v, live)
	} else if err == nil && v.Content != live.Content {
		_, err = s.layOut(ctx, v)
	}
	if errors.As(err, new(*refusal)) {
		return &opError{status: "Not Acceptable", err: err}
	}
	if err != nil {
		return &opError{status: "Internal Server Error", err: fmt.Errorf("commit %.8s: %w", commit, err)}
	}

	info := fmt.Sprintf("ROLLBACK: %.8s, %s", commit, o.who)
	s.rec.Pin = &pin{version: v, Info: strings.TrimSuffix(info+": "+o.reason, ": ")}
	s.rec.Refused, s.rec.Suspect, s.last, s.undo = nil, nil, nil, true
	return nil
}

// ran returns the commits that went live here.
func (s *Service) ran() (commits []string) {
	for _, v := range s.rec.Ran {
		commits = append(commits, v.Commit)
	}
	return commits
}

// tryOut judges a commit that an operator wants and that never ran here: as upstream's newest, but that it need not descend
// from what ran.
func (s *Service) tryOut(ctx context.Context, v, live version) error {
	if s.signers != "" {
		if err := s.up.verify(ctx, v.Commit, s.signers); err != nil {
			return err
		}
	}
	if v.Content == live.Content {
		return nil
	}
	c, err := s.layOut(ctx, v)
	if err != nil {
		return err
	}
	return s.precheck(ctx, c)
}

// mountFirst mounts what is on disk already, without network and without systemd, so that units ordered after us start on
// their files. What can't be mounted is reported by the first pass.
func mountFirst(ctx context.Context, services []*Service) {
	for _, s := range services { // one may have a local now that was another's
		if _, err := s.rec.Mounts.sweep(s.service, s.files.dir, s.dirs, s.save); err != nil {
			slog.Warn(fmt.Sprintf("%s: %v", s.service, err))
		}
	}
	for _, s := range services {
		if err := s.mountWhatIsThere(ctx); err != nil {
			slog.Warn(fmt.Sprintf("%s: not mounted yet: %s", s.service, oneLine(err.Error())))
		}
	}
}

func (s *Service) mountWhatIsThere(ctx context.Context) error {
	live := s.files.live()
	isOther := live.Content != "" && !s.isOfToday(live)
	if isOther && len(s.check) > 0 {
		return nil // what other links show is to be checked first
	}
	if live.Commit == "" && s.rec.Told.Commit == "" {
		return nil // not ours yet
	}
	acct, err := lookupAccount(ctx, s.user)
	if err != nil {
		return err
	}
	s.files.acct = acct
	return s.showLinks(live.Content)
}

// restoreMounts makes the mounts of before again, from the records alone.
func restoreMounts(stateDir string) {
	names, _ := filepath.Glob(recordFile(stateDir, "*"))
	for _, file := range names {
		name := strings.TrimSuffix(filepath.Base(file), ".json")
		rec, _, err := readRecord(file)
		if err == nil {
			err = rec.Mounts.restore(name)
		}
		if err != nil {
			slog.Warn(fmt.Sprintf("%s: not mounted yet: %s", name, oneLine(err.Error())))
		}
	}
}

// retireRecords takes away the mounts of services that have left the config. Checkout and record stay for their return.
func retireRecords(stateDir string, services []*Service) {
	names, _ := filepath.Glob(recordFile(stateDir, "*"))
	for _, file := range names {
		name := strings.TrimSuffix(filepath.Base(file), ".json")
		if slices.ContainsFunc(services, func(s *Service) bool { return s.service == name }) {
			continue
		}
		rec, data, err := readRecord(file)
		if err != nil {
			slog.Error(fmt.Sprintf("%s: left the config, but its record can't be read, and its mounts stay: %v", name, err))
			continue
		}
		if len(rec.Mounts.Shown) == 0 && len(rec.Mounts.Made) == 0 {
			continue
		}
		s := &Service{spec: spec{service: name}, stateDir: stateDir, rec: rec, saved: data}
		s.untell()
		if _, err := s.rec.Mounts.sweep(name, "", nil, s.save); err != nil {
			slog.Error(fmt.Sprintf("%s: left the config: %v", name, err))
			continue
		}
		slog.Info(fmt.Sprintf("%s: left the config: its mounts are gone, its unit is not called, its checkout stays", name))
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
	ids := unitNames{}
	for len(names) > 0 {
		select {
		case <-time.After(interval + rand.N(interval/2+1)):
		case <-ctx.Done():
			return
		}
		units, err := lookUnits(ctx, ids, names...)
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
