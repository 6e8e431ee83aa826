//go:build linux

package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// candidate is a version whose files were compared with the disk, and are staged where the disk lacks them.
type candidate struct {
	version
	want   tree
	diff   diff
	edited []string // local edits that are to stay
}

// reconcile is one pass between what is wanted (the config, and upstream's commit or the pin) and what is
// there. It may be ended by ctx or killed at any point: the next one goes on from what it finds.
func (s *Service) reconcile(ctx context.Context) (out outcome) {
	select {
	case <-s.poke: // for this pass does what it was for
	default:
	}
	if s.saved == nil { // where nothing can be remembered, nothing is changed
		if out.err = s.save(); out.err != nil {
			return out
		}
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
	goodBefore := s.rec.Good // bring may make c the good one
	err := s.bring(ctx, c, &out)
	switch {
	case err == nil:
		out.err = cmp.Or(out.err, s.acquitOrConvict(c.Content == goodBefore.Content, &out))
	case s.onTrial(ctx, c.version, err):
		s.takeBack(ctx, c.version, err, &out)
	default:
		out.err = both(out.err, err)
		s.excuse(&out)
	}
	return out
}

func (s *Service) endFreeze() {
	p := s.rec.Pin
	if !p.ends() || time.Now().Before(p.Until) {
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
	if s.plan != nil {
		return s.planPackage(ctx)
	}
	// Others' installs may rightly take hours: the watchdog's end of us would be the end of the package
	// manager.
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

// ensureReady finds the service's user, takes the mounts of earlier configs away, and makes the directory the
// service's.
func (s *Service) ensureReady(ctx context.Context) error {
	if s.facts.ready && !s.files.pending() {
		return nil
	}
	acct, err := lookupAccount(ctx, s.user)
	if err != nil {
		return brokenError{err}
	}
	s.files.acct = acct
	if s.files.groups, err = groupIDs(ctx, s.dirs); err != nil {
		return brokenError{err}
	}
	if err := s.sweep(ctx); err != nil {
		return err
	}

	var known tree
	if s.files.live().Commit == "" && s.rec.Told.Commit != "" {
		known, err = s.up.tree(ctx, s.rec.Told.Commit, s.dirs)
		l := s.up.looked(s.branch)
		switch {
		case err == nil, errors.As(err, new(*refusal)):
		case errors.Is(err, errMissing) && l.err == nil: // what differs is then kept as somebody's own
		default:
			return cmp.Or(l.err, err)
		}
	}

	s.within(10 * time.Minute)
	if err := s.prepare(ctx, known); err != nil {
		return err
	}
	if live := s.files.live(); live.Commit != "" {
		s.noteRan(live) // a kill may have come before that
	}
	s.facts.ready = true
	return nil
}

// prepare makes the directory the service's.
func (s *Service) prepare(ctx context.Context, known tree) error {
	if s.plan != nil {
		return s.planDirectory(known)
	}
	return s.files.prepare(ctx, known)
}

// sweep takes away the mounts that earlier configs wanted, and has systemd forget the units that lay in them.
func (s *Service) sweep(ctx context.Context) error {
	if s.plan != nil {
		return s.planUnmounts()
	}
	gone, err := s.rec.Mounts.sweep(s.service, s.files.dir, s.dirs, s.save)
	if err == nil {
		err = forgetUnits(ctx, gone)
	}
	if err != nil {
		return brokenError{err}
	}
	return nil
}

// choose returns the version that should run, judged and laid out, nil if nothing can be done; out says why
// that is not upstream's newest, or what is wrong.
func (s *Service) choose(ctx context.Context, out *outcome) *candidate {
	live := s.files.live()
	want, err := s.wanted(ctx, live, out)
	if err != nil || want.Commit == "" {
		out.err = cmp.Or(err, out.err)
		return nil
	}

	c, err := s.examine(ctx, want, live)
	if err == nil {
		if s.rec.Pin != nil {
			s.rec.Pin.version = want
		}
		return c
	}
	if f := (*refusal)(nil); errors.As(err, &f) && s.rec.Pin == nil {
		out.refused = s.refuse(want, f)
	} else {
		out.err = cmp.Or(out.err, err)
	}

	rest := s.rest(ctx, live)
	isNoOther := slices.Contains([]string{"", want.Commit}, rest.Commit)
	if s.rec.Pin != nil || isNoOther || ctx.Err() != nil {
		return nil
	}

	c, err = s.layOut(ctx, rest) // what runs is looked after meanwhile
	showsMore := rest.Commit == live.Commit && rest.Content != live.Content
	if err == nil && showsMore { // as other dirs than before show it, which nobody has examined
		err = s.precheck(ctx, c)
	}
	if err != nil {
		out.err = cmp.Or(out.err, err)
		return nil
	}
	return c
}

// wanted says which version should run: the pin's, or upstream's newest unless it is refused already, or a
// place to stay.
func (s *Service) wanted(ctx context.Context, live version, out *outcome) (version, error) {
	if p := s.rec.Pin; p != nil {
		return s.today(ctx, p.version, live)
	}

	l := s.up.looked(s.branch)
	// One missed look is no news, unless nothing runs yet, or we had trouble before we were started anew.
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
	if f := s.suspected(tip); f != nil {
		out.refused = f
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
	for _, known := range []version{live, s.facts.tip} {
		if v.Commit == known.Commit && s.isOfToday(known) {
			return known, nil
		}
	}
	content, err := s.up.content(ctx, v.Commit, s.dirs)
	v.Content = s.links[:8] + "-" + content
	return v, err
}

// isOfToday says whether a version's content is that of today's links. Contents begin with a digest of the
// links.
func (s *Service) isOfToday(v version) bool {
	return strings.HasPrefix(v.Content, s.links[:8])
}

// suspected returns why a version was taken back, nil if it is not the suspect.
func (s *Service) suspected(v version) *refusal {
	if p := s.rec.Suspect; p != nil && p.Content == v.Content {
		return &p.refusal
	}
	return nil
}

// rest is where to stay when upstream's commit is not to be had: on what runs, unless that itself was taken
// back.
func (s *Service) rest(ctx context.Context, live version) version {
	tookBack := s.refused(live) != nil || s.suspected(live) != nil
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

// examine looks at a version before anything of it goes live: its signature, and what our own config's gate
// and the check say of it. A *refusal says why it must not. What runs is not examined again, and neither is a
// pin, which was when it was made, unless the dirs show something else of it now.
func (s *Service) examine(ctx context.Context, v, live version) (*candidate, error) {
	known := []string{s.facts.tip.Commit, live.Commit, s.rec.Good.Commit}
	isNew := s.rec.Pin == nil && !slices.Contains(known, v.Commit)
	if s.signers != "" && isNew {
		if err := s.verify(ctx, v.Commit, live); err != nil {
			return nil, err
		}
	}
	if v.Content == live.Content {
		s.facts.tip = v
		return s.layOut(ctx, v)
	}

	c, err := s.layOut(ctx, v)
	p := s.rec.Pin
	isKnown := v == s.rec.Good || p != nil && (p.Content == "" || s.isOfToday(p.version))
	if err != nil || isKnown {
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
	isOnTrial := !slices.Contains([]string{"", s.rec.Good.Commit}, live.Commit)
	if s.rec.Pin == nil && older != "" && isOnTrial {
		older = live.Commit // perhaps too new to be in the record
	}
	if older != "" {
		if err := s.up.descends(ctx, commit, older); err != nil {
			return err
		}
	}
	return s.up.verify(ctx, commit, s.signers)
}

// layOut compares a version's files with the disk, and stages those that the disk lacks. Local edits of a
// pinned service are left out, but after a rollback.
func (s *Service) layOut(ctx context.Context, v version) (c *candidate, err error) {
	s.within(fetchLimit + localLimit)
	if s.files.pending() {
		if err := s.prepare(ctx, nil); err != nil {
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

	compare := s.files.compare
	if s.plan != nil {
		compare = s.planCompare
	}
	if c.diff, err = compare(ctx, c.want); err != nil {
		return nil, err
	}
	if s.rec.Pin != nil && !s.rec.Pin.Undo {
		c.edited, c.diff.edited = c.diff.edited, nil
		stays := func(p string) bool { return slices.Contains(c.edited, p) }
		c.diff.put = slices.DeleteFunc(c.diff.put, stays)
		c.diff.gone = slices.DeleteFunc(c.diff.gone, stays)
	}
	if len(c.diff.put) == 0 {
		return c, nil
	}

	s.within(missingLimit)
	if err := s.up.fetchMissing(ctx, c.want); err != nil || s.plan != nil {
		return c, err
	}

	defer s.up.reads.enter(ctx)()
	ids := c.want.idsOf(c.diff.put)
	if len(ids) < 64 { // a git that runs already is quicker
		ids = nil
	}
	o, err := s.up.open(ctx, ids...)
	if err != nil {
		return nil, err
	}
	defer o.close()
	s.within(fetchLimit)
	return c, s.files.stage(ctx, c.want, c.diff, o.blob)
}

// precheck has our own config's gate and the check judge the candidate. Every local is made first where it is
// missing, for a mount needs a place.
func (s *Service) precheck(ctx context.Context, c *candidate) error {
	if s.gate != nil {
		read := func(name string) ([]byte, error) { return s.readCandidate(ctx, c, name) }
		if err := s.gate(read); err != nil {
			return &refusal{Reason: "config", Info: fmt.Sprintf("commit %.8s: %v", c.Commit, err)}
		}
	}

	if len(s.check) == 0 {
		return nil
	}
	if s.plan != nil {
		s.plan.add("check %s", strings.Join(s.check, " "))
		return nil
	}
	if err := s.rec.Mounts.makeTargets(s.dirs, s.files.acct, s.save); err != nil {
		return brokenError{err}
	}

	s.step("check")
	s.within(checkLimit)
	err := runCheck(ctx, checkJob{
		Scratch: filepath.Join(s.stateDir, "check", s.service), Shows: wantedShows(s.files.dir, s.dirs),
		Gone: []byte(strings.Join(c.diff.gone, "\x00")), Argv: s.check})
	if f := (*refusal)(nil); errors.As(err, &f) {
		f.Info = fmt.Sprintf("commit %.8s: %s", c.Commit, f.Info)
	}
	return err
}

// bring makes a candidate's files live, shows them at every local, and sees to it that the unit runs on them:
// the one way, whoever wants it. Each step does nothing where nothing is to be done.
func (s *Service) bring(ctx context.Context, c *candidate, out *outcome) error {
	out.edited = c.edited
	if s.plan != nil {
		return s.planBring(ctx, c)
	}
	before, changes := s.files.live(), c.diff.changes()
	if changes > 0 || c.Content != before.Content || s.files.pending() {
		if err := s.publish(ctx, c); err != nil {
			return err
		}
	}

	if err := s.showLinks(c.Content); err != nil {
		return brokenError{err}
	}
	if s.files.pending() { // something may have come out
		if err := s.keepEdits(c); err != nil {
			return err
		}
	}
	if s.rec.Pin != nil {
		s.rec.Pin.Undo = false // done
	}
	s.noteRan(s.files.live())

	err := s.serve(ctx, c.version)
	isCut := err != nil && ctx.Err() != nil // which says nothing of the unit
	if isCut || errors.Is(err, errShutdown) {
		return err
	}
	isNew := c.Content != before.Content
	if err == nil || !isNew { // what is new and does not run may be taken back first
		s.dress(ctx, c, isNew)
	}
	if err != nil {
		return brokenError{err}
	}
	return nil
}

// dress writes the .git for people, where that is not of what is live.
func (s *Service) dress(ctx context.Context, c *candidate, isNew bool) {
	commit, objects := s.files.live().Commit, s.up.objectsDir()
	if !isNew && s.files.isDressed(commit, objects) {
		return
	}
	s.within(fetchLimit)
	leave := s.up.reads.enter(ctx)
	index, err := s.up.index(ctx, commit, s.dirs, c.want)
	leave()
	if err == nil {
		err = s.files.dress(commit, objects, index)
	}
	if wentWrong(ctx, err) {
		slog.Warn(fmt.Sprintf("%s: .git for people: %s", s.service, oneLine(err.Error())))
	}
}

// showsWrong says whether a local does not show its link.
func (s *Service) showsWrong(d dir) bool {
	return d.local != "" && !shows(s.files.dir, d.link, d.local)
}

// showLinks makes every local show its link. The record forgets first that the unit was told of content in
// this boot, if a mount is to change.
func (s *Service) showLinks(content string) error {
	if s.rec.Mounts.areShown(s.files.dir, s.dirs) {
		return nil
	}
	if slices.ContainsFunc(s.dirs, s.showsWrong) {
		s.facts.mounted = 0
		if s.rec.Told.Boot == bootID() {
			if err := s.retell(content); err != nil {
				return err
			}
		}
	}
	err := s.rec.Mounts.show(s.service, s.files.dir, s.dirs, s.files.acct.uid, s.save)
	if err == nil {
		s.facts.mounted = cmp.Or(s.facts.mounted, sinceBoot())
	}
	return err
}

// publish makes the staged files live. The record forgets first that the unit was told of them, where it was
// before.
func (s *Service) publish(ctx context.Context, c *candidate) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if c.diff.changes() > 0 {
		if err := s.retell(c.Content); err != nil {
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
	if c.Content != before.Content {
		s.event(slog.LevelInfo, fmt.Sprintf("%.8s is live", c.Commit),
			"before", fmt.Sprintf("%.8s", before.Commit), "files", c.diff.changes())
	}
	return nil
}

// keepEdits deals with what came out of the live files, now that no local shows it any more.
func (s *Service) keepEdits(c *candidate) error {
	kept, err := s.files.finish(s.stop.hard)
	if err != nil {
		return err
	}
	isOwn := func(p string) bool { return s.files.wasAlien(c.diff, p) }
	undone := slices.DeleteFunc(slices.Clone(kept), isOwn)
	owns := slices.DeleteFunc(kept, func(p string) bool { return !isOwn(p) })
	if len(owns) > 0 {
		slog.Warn(fmt.Sprintf("%s: somebody's own was in the way of a commit, kept as %s",
			s.service, someOf(owns)))
	}
	if n := max(len(undone), len(c.diff.edited)); n > 0 { // a file that was removed leaves nothing to keep
		count.addFloat("gitopper_service_drift_total", labels("service", s.service), float64(n))
		paths := fmt.Sprintf(": %s; kept: %s", someOf(c.diff.edited), cmp.Or(someOf(undone), "nothing"))
		s.event(slog.LevelWarn, "local edits undone"+quote(paths))
	}
	return nil
}

// onTrial says whether trouble with what is live is to be met by the last good version: that one has not
// settled yet, and another one is known that did.
func (s *Service) onTrial(ctx context.Context, v version, err error) bool {
	switch {
	case !s.fallback, s.rec.Pin != nil, s.rec.Good.Commit == "":
		return false
	case !isOfUnit(err), ctx.Err() != nil: // which says nothing of the commit
		return false
	}
	good, err := s.today(ctx, s.rec.Good, s.files.live())
	return err == nil && good.Content != v.Content
}

// takeBack makes the last good version live again. What failed is remembered first, so that a crash in
// between goes on from here.
func (s *Service) takeBack(ctx context.Context, v version, cause error, out *outcome) {
	good, err := s.today(ctx, s.rec.Good, s.files.live())
	if err == nil {
		info := fmt.Sprintf("commit %.8s taken back, %.8s runs; with %.8s: %v",
			v.Commit, good.Commit, v.Commit, cause)
		f := refusal{version: v, Criteria: s.criteria("fallback"), Reason: "fallback", Info: oneLine(info)}
		s.rec.Suspect, s.rec.Good = &suspect{refusal: f}, good
		s.noteOutcome("taken back: " + oneLine(cause.Error()))
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
