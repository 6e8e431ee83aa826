//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"time"
)

// Service is one managed service. All fields without an atomic type belong to its goroutine, see run.
type Service struct {
	spec
	shared
	links string // the linksKey of its dirs
	up    *upstream
	files files
	gate  func(read func(string) ([]byte, error)) error // judges a candidate of our own config; else nil

	rec      record
	saved    *record  // what is known to be on disk; nil: nothing
	last     *outcome // of the last pass; nil before the first, and since a rollback was asked for
	packages packageCheck
	facts    facts
	step     func(string) // told of each step

	requests chan request
	poke     chan struct{} // size 1: something is to be looked at
	ended    chan struct{} // closed when run has returned
	status   atomic.Pointer[Status]
	unit     atomic.Pointer[unit] // as seen at the last round
	deadline atomic.Int64         // Unix time by which the step under way should end; 0: idle, or an install
}

// shared is what all services of a process have in common.
type shared struct {
	stateDir string
	interval time.Duration
	stop     stopping
	plan     *plan // of a dry run, which tells what would be done; nil: it is done
}

// facts are what was found out, and is not asked again while nothing fails.
type facts struct {
	ready  bool      // the directory and its owner were looked at, and mounts of earlier configs are gone
	tip    version   // upstream's newest commit that was judged, and was accepted or shows what is live
	seenAt time.Time // when the unit last settled, or was looked at

	waiting waiting       // what upstream has that does not run
	mounted time.Duration // CLOCK_MONOTONIC when all mounts were there; 0: they are not
}

// request is an operation on its way to a service's goroutine; reply has room for the answer.
type request struct {
	op
	reply chan error
}

// newService makes a service from its validated config and the record of its earlier life. Nothing is changed
// on the host, but that a record which can't be read is moved aside.
func newService(sp spec, stateDir string, up *upstream, interval time.Duration, stop stopping) *Service {
	s := &Service{
		spec: sp, links: linksKey(sp.dirs), up: up, shared: shared{stateDir, interval, stop, nil},
		files: files{
			dir:      filepath.Join(sp.mount, sp.service),
			manifest: manifestFile(stateDir, sp.service),
			dirs:     sp.dirs,
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

// assemble makes the services of the config, and the upstreams that they share.
func (a *agent) assemble(c *config, stateDir string) (services []*Service, upstreams []*upstream) {
	made := map[[2]string]*upstream{}
	get := func(url, user string) *upstream {
		k := [2]string{url, user}
		if made[k] == nil {
			made[k] = newUpstream(stateDir, url, user)
			upstreams = append(upstreams, made[k])
		}
		return made[k]
	}

	if a.upstream != "" {
		own := a.newOwn(get(a.upstream, ""), stateDir)
		own.signers, own.rec.Signers = c.signers, c.signers
		if err := own.save(); err != nil {
			slog.Error(fmt.Sprintf("gitopper: %v", err))
		}
		services = append(services, own)
	}

	for _, sp := range c.services {
		services = append(services, newService(sp, stateDir, get(sp.upstream, sp.user), a.interval, a.stop))
	}
	for _, s := range services {
		for _, other := range services {
			if strings.HasPrefix(other.files.dir, s.files.dir+"/") { // whose mount is our checkout
				s.files.nested = append(s.files.nested, other.files.dir)
			}
		}
	}

	startCounters(services)
	a.services.Store(&services)
	return services, upstreams
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

// run is the service's life: it waits for a look at upstream, a time to try again or an operator, and has one
// pass or one operation done at a time, in a goroutine of its own so that operators can end one that merely
// waits.
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

// work does one job while it takes in what operators ask for: all but a pull end what the job merely waits
// for, and go before pulls. At our end a job that hangs is left behind; an install is waited for. done says
// that the job has ended.
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

// hadTrouble says whether the last pass failed, or there was none yet.
func (s *Service) hadTrouble() bool { return s.last == nil || s.last.err != nil }

// ends says whether there is a pin, and a time when it ends by itself.
func (p *pin) ends() bool { return p != nil && !p.Until.IsZero() }

// retry says when the next pass is due if nothing else asks for one; zero is never.
func (s *Service) retry(backoff time.Duration) (wait, next time.Duration) {
	if s.hadTrouble() || s.rec.Suspect != nil { // what was refused waits for another commit or an operator
		next = min(max(2*backoff, 5*time.Second), s.interval)
		wait = next
	}

	p := s.rec.Pin
	if !p.ends() {
		return wait, next
	}
	left := time.Until(p.Until)
	if wait == 0 || 0 < left && left < wait {
		wait = max(left, time.Millisecond)
	}
	return wait, next
}

// mountFirst mounts what is on disk already, without network and without systemd, so that units ordered after
// us start on their files. What can't be mounted is reported by the first pass. It returns where mounts of
// earlier configs went.
func mountFirst(ctx context.Context, services []*Service) (gone []string) {
	for _, s := range services { // one may have a local now that was another's
		points, err := s.rec.Mounts.sweep(s.service, s.files.dir, s.dirs, s.save)
		if err != nil {
			slog.Warn(fmt.Sprintf("%s: %v", s.service, err))
		}
		gone = append(gone, points...)
	}

	for _, s := range services {
		if err := s.mountWhatIsThere(ctx); err != nil {
			slog.Warn(fmt.Sprintf("%s: not mounted yet: %s", s.service, oneLine(err.Error())))
		}
	}
	return gone
}

func (s *Service) mountWhatIsThere(ctx context.Context) error {
	live := s.files.live()
	isOther := live.Content != "" && !s.isOfToday(live)
	switch {
	case live.Commit == "" && s.rec.Told.Commit == "":
		return nil // not ours yet
	case isOther && len(s.check) > 0: // what other links show is to be checked first
		return s.rec.Mounts.restore(s.service)
	}

	s.files.acct = account{uid: os.Getuid(), gid: os.Getgid()} // others may be known to the network only
	if s.showLinks(live.Content) == nil {
		return nil
	}
	var err error
	if s.files.acct, err = lookupAccount(ctx, s.user); err == nil { // whose an older gitopper's checkout is
		err = s.showLinks(live.Content)
	}
	if err != nil {
		err = errors.Join(err, s.rec.Mounts.restore(s.service))
	}
	return err
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

// retireRecords takes away the mounts of services that have left the config. Checkout and record stay for
// their return. It returns where the mounts were.
func retireRecords(stateDir string, services []*Service) (gone []string) {
	for _, s := range retired(stateDir, services) {
		s.untell()
		points, err := s.rec.Mounts.sweep(s.service, "", nil, s.save)
		gone = append(gone, points...)
		if err != nil {
			slog.Error(fmt.Sprintf("%s: left the config: %v", s.service, err))
			continue
		}
		slog.Info(s.service + ": left the config: its mounts are gone, its unit is not called, " +
			"its checkout stays")
	}
	return gone
}

// retired returns the services that have left the config, as far as there are mounts of theirs.
func retired(stateDir string, services []*Service) (gone []*Service) {
	names, _ := filepath.Glob(recordFile(stateDir, "*"))
	for _, file := range names {
		name := strings.TrimSuffix(filepath.Base(file), ".json")
		if slices.ContainsFunc(services, func(s *Service) bool { return s.service == name }) {
			continue
		}

		rec, saved, err := readRecord(file)
		if err != nil {
			slog.Error(fmt.Sprintf("%s: left the config, its record is broken, mounts stay: %v", name, err))
			continue
		}
		if len(rec.Mounts.Shown)+len(rec.Mounts.Made) == 0 {
			continue
		}
		s := &Service{spec: spec{service: name}, shared: shared{stateDir: stateDir}, rec: rec, saved: saved}
		gone = append(gone, s)
	}
	return gone
}

// watchUnits asks systemd, as often as the slowest rounds come, for the state of all services' units, in one
// go, and hands each what it found. A service has a pass then if that is news, or if it had none since the
// last time, as where its upstream can't be looked at.
func watchUnits(ctx context.Context, services []*Service, interval time.Duration) {
	var names []string
	var with []*Service
	for _, s := range services {
		if s.action != "" {
			names, with = append(names, s.service), append(with, s)
		}
	}

	ids, before := unitNames{}, make([]*Status, len(with))
	for wait := interval; len(names) > 0; wait = interval + interval/2 {
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return
		}

		units, err := lookUnits(ctx, ids, names...)
		if errors.Is(err, errShutdown) {
			continue
		}

		for i, s := range with {
			var now *unit // where there was an error the service asks for itself, and has it
			if err == nil {
				now = &units[i]
			}
			had, status := before[i], s.Status()
			before[i] = status
			isNews := s.unit.Swap(now).differs(now)
			if status.state >= stateBroken {
				continue // it has a pass anyway, and soon
			}
			if isNews || status == had {
				s.nudge()
			}
		}
	}
}

// pass reconciles once and makes the outcome known.
func (s *Service) pass(ctx context.Context) { _ = s.conclude(ctx, s.reconcile(ctx)) }

// conclude makes a pass's outcome known. One that was ended from outside, by what is returned, has none.
func (s *Service) conclude(ctx context.Context, out outcome) (ended error) {
	switch {
	case ctx.Err() != nil:
		ended = interrupted(ctx)
	case errors.Is(out.err, errShutdown):
		ended = out.err
	default:
		s.last = &out
		if out.err != nil {
			s.facts.ready = false
		}
		s.noteTrouble(out.err)
		s.tally(ctx)
	}

	s.publishStatus()
	if err := s.save(); err != nil && ended == nil && out.err == nil {
		s.last.err = err
		s.publishStatus()
	}
	return ended
}
