//go:build linux

package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
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
	Service, Commit, State string
	Info                   string    // for keys that may write
	Public                 string    // Info without private words, for everybody
	Change                 time.Time // when State last became another
	Upstream, Branch       string
	InSync                 bool // what runs is upstream's
	OutOfSync              time.Time
	LastLook               time.Time // last successful look at upstream
	Refused                string    // why upstream's newest commit does not run, as refusal.Reason
	waiting
	state state
}

// version is a commit, and an id of what a service's links show in it: two commits with the same content are
// the same to the service.
type version struct{ Commit, Content string }

// told is what the unit last saw, and in which boot of the host.
type told struct {
	version
	Boot string
	Left string `json:",omitempty"` // UnitFileState while it was up; then leftDown, then leftStopped
}

// A unit that two rounds find stopped was stopped by an administrator.
const (
	leftDown    = "down"
	leftStopped = "stopped"
)

// note remembers how the unit is left.
func (t *told) note(u *unit, action string) {
	isDown := slices.Contains([]string{leftDown, leftStopped}, t.Left)
	switch {
	case u.well(action):
		if isDown || u.is["UnitFileState"] != "" { // which a list of units does not tell
			t.Left = u.is["UnitFileState"]
		}
	case !u.stopped():
	case isDown, t.staysDown(u, action):
		t.Left = leftStopped
	default:
		t.Left = leftDown
	}
}

// staysDown says whether an administrator wants the unit down, also after the next boot: it was stopped, or
// it is disabled now that was enabled when it was up.
func (t *told) staysDown(u *unit, action string) bool {
	isOff := t.Left == leftStopped || t.Left == "enabled" && u.is["UnitFileState"] == "disabled"
	return isOff && u.stopped() && !u.well(action)
}

// pin is an operator's wish to stay at a commit.
type pin struct {
	version
	Info  string    // who and why
	Until time.Time // zero: until unfreeze
	Undo  bool      `json:",omitempty"` // a rollback is to undo local edits, which else stay while pinned
}

// refusal is why a commit does not go live, or was taken back. It is an error.
type refusal struct {
	version
	Reason string // link, signers, check, config or fallback
	Info   string // in words; may hold private ones, see quote

	// A digest of what else decided: the same content is judged anew when that has changed.
	Criteria string `json:"Judge"`
}

func (r *refusal) Error() string { return r.Info }

// suspect is a commit that failed on trial. It is refused once the last good commit has settled again. If
// that one fails as well, the suspect is excused: it was not to blame, and gets its try as at first when the
// last good one has settled.
type suspect struct {
	refusal
	Excused bool
}

// brokenError is trouble with package, mount or systemd, as opposed to git.
type brokenError struct{ error }

func (b brokenError) Unwrap() error { return b.error }

// recordError is a brokenError that is not the commit's fault: what is to be remembered can't be written.
type recordError struct{ error }

// outcome is what a pass came to.
type outcome struct {
	refused *refusal // why upstream's newest commit does not run
	err     error    // what else is wrong; a brokenError in it makes the state BROKEN
	edited  []string // local edits that stay, for the service is pinned
}

// trouble is everything that is wrong, nil if nothing is.
func (o *outcome) trouble() error {
	if o.refused == nil {
		return o.err
	}
	return both(o.refused, o.err)
}

// both is an error for two, each of which may be nil.
func both(a, b error) error {
	switch {
	case a == nil:
		return b
	case b == nil:
		return a
	}
	return fmt.Errorf("%w; %w", a, b)
}

// row is what was last said of a service.
type row struct {
	State, Info string
	Since       time.Time // of State
	OutOfSync   time.Time // since when what runs is not upstream's; zero while it is
}

// newest is the newest commit of an upstream's branch that ever went live. Of is a digest of the two, for the
// upstream's URL may hold a password.
type newest struct{ Of, Commit string }

// record is what must outlive a restart and can't be read again: intent, what was said and tried, and for the
// next boot what is mounted where. What is live is not in it: the manifest says that (files.go).
type record struct {
	plain
	Pin     *pin       `json:",omitempty"`
	Suspect *suspect   `json:",omitempty"`
	Refused []refusal  `json:",omitempty"` // the newest last, 20 at most
	Ran     []ran      `json:",omitempty"` // what went live here, the newest last, see lastRan
	Mounts  mountTable // what is mounted where, and what was made for it
}

// plain is what can be compared of a record.
type plain struct {
	Row     row
	Told    told    // without content: the unit must be told
	Good    version // the last one on which the unit settled
	Newest  newest  // for signers
	Signers string  `json:",omitempty"` // bootstrap: those of the config that ran last
}

// lock makes us the only gitopper on a state directory, until the returned function is called or we end,
// however. Users' clones lie below the directory, so they may pass through it; they can't list it.
func lock(dir string) (unlock func(), err error) {
	_ = errors.Join(os.MkdirAll(dir, 0o711), os.Chmod(dir, 0o711)) // what is wrong the next step tells
	name := filepath.Join(dir, "lock")
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o600)
	if errors.Is(err, syscall.EROFS) {
		f, err = os.Open(name)
	}
	if err != nil {
		return nil, fmt.Errorf("state directory: %w", err)
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		pid, _ := io.ReadAll(io.LimitReader(f, 20))
		_ = f.Close()
		return nil, fmt.Errorf("another gitopper, pid %s, works with %s: end that one first",
			bytes.TrimSpace(pid), dir)
	}
	// What can't be written, as on a full disk, keeps no mount from being made.
	if err := f.Truncate(0); err == nil {
		_, _ = f.WriteAt(fmt.Appendln(nil, os.Getpid()), 0)
	}
	return func() { _ = f.Close() }, nil
}

// recordFile is where the record of a service lies, and manifestFile where its manifest does: side by side,
// so that where one can't be written the other can't either.
func recordFile(stateDir, service string) string {
	return filepath.Join(stateDir, "services", service+".json")
}

func manifestFile(stateDir, service string) string {
	return filepath.Join(stateDir, "services", service+".files")
}

// clone returns a copy of the record that shares nothing with it.
func (r *record) clone() *record {
	c := *r
	c.Pin, c.Suspect = cloned(r.Pin), cloned(r.Suspect)
	c.Refused, c.Ran = slices.Clone(r.Refused), slices.Clone(r.Ran)
	c.Mounts = mountTable{slices.Clone(r.Mounts.Shown), slices.Clone(r.Mounts.Made)}
	return &c
}

func cloned[T any](p *T) *T {
	if p == nil {
		return nil
	}
	c := *p
	return &c
}

// equals says whether two records say the same.
func (r *record) equals(o *record) bool {
	isSame := r.plain == o.plain && equal(r.Pin, o.Pin) && equal(r.Suspect, o.Suspect)
	isMounted := slices.Equal(r.Mounts.Shown, o.Mounts.Shown) && slices.Equal(r.Mounts.Made, o.Mounts.Made)
	return isSame && isMounted && slices.Equal(r.Refused, o.Refused) && slices.Equal(r.Ran, o.Ran)
}

// equal says whether two values are the same, or both missing.
func equal[T comparable](a, b *T) bool {
	if a == nil || b == nil {
		return a == b
	}
	return *a == *b
}

// readRecord reads a record. Of one that is to be written anew nothing counts as saved.
func readRecord(file string) (rec record, saved *record, err error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return rec, saved, err
	}
	var is struct{ Row *json.RawMessage } // which the first ones had not, and a Newest of another type
	if err := json.Unmarshal(data, &is); err != nil {
		return rec, saved, err
	}
	if is.Row == nil {
		return firstRecord(data), saved, nil
	}
	if err := json.Unmarshal(data, &rec); err != nil {
		return record{}, nil, err
	}
	return rec, rec.clone(), nil
}

// firstRecord reads what the first gitopper that kept records remembered: the commits are enough, contents
// are found anew.
func firstRecord(data []byte) (rec record) {
	var old struct {
		State, Info       string
		Change, OutOfSync time.Time
		Pin               *struct {
			Commit, Info string
			Until        time.Time
		}
		Live, Good                        string
		Upstream, Branch, Newest, Signers string
		Made                              []string
	}
	if json.Unmarshal(data, &old) != nil {
		return rec
	}
	rec.Row = row{State: old.State, Info: old.Info, Since: old.Change, OutOfSync: old.OutOfSync}
	if old.Pin != nil {
		rec.Pin = &pin{version: version{Commit: old.Pin.Commit}, Info: old.Pin.Info, Until: old.Pin.Until}
	}
	rec.Told.Commit, rec.Good.Commit = old.Live, old.Good
	rec.Newest = newest{digest(old.Upstream, old.Branch), old.Newest}
	rec.Mounts.Made, rec.Signers = old.Made, old.Signers
	return rec
}

// loadRecord reads the service's record. One that can't be read is moved aside, and the service pinned to
// what runs.
func (s *Service) loadRecord() {
	file := recordFile(s.stateDir, s.service)
	rec, saved, err := readRecord(file)
	if isOrLacks(err) {
		s.rec, s.saved = rec, saved
		return
	}

	slog.Error(fmt.Sprintf("%s: record can't be read, pinned to what runs till unfreeze: %v", s.service, err))
	aside := os.Rename
	if live := s.files.live(); live.Commit != "" {
		s.rec.Pin = &pin{version: live, Info: "state lost"}
		aside = os.Link // and then replaced, so that the pin can't be lost
	}
	_ = os.RemoveAll(file + ".broken")
	err = aside(file, file+".broken")
	if err == nil && s.rec.Pin != nil {
		err = s.save()
	}
	if err != nil {
		slog.Error(fmt.Sprintf("%s: %v", s.service, err))
	}
}

// save writes the record if it changed.
func (s *Service) save() error {
	if s.saved != nil && s.rec.equals(s.saved) {
		return nil
	}
	text, err := json.MarshalIndent(&s.rec, "", "\t")
	if err != nil {
		return err
	}
	s.saved = nil
	if err := writeFile(recordFile(s.stateDir, s.service), text); err != nil {
		return unwritten(err)
	}
	s.saved = s.rec.clone()
	return nil
}

// unwritten is what it means that the record or the manifest can't be written; nil for nil.
func unwritten(err error) error {
	if err == nil {
		return nil
	}
	return brokenError{recordError{fmt.Errorf("record: %w: no file is changed until it can be written", err)}}
}

// Status returns what is known of the service now. It never waits.
func (s *Service) Status() *Status { return s.status.Load() }

// running is the version that others are told of: the newest commit known that shows what is live.
func (s *Service) running() version {
	live := s.files.live()
	switch {
	case live.Content == "":
	case s.rec.Pin != nil && s.rec.Pin.Content == live.Content:
		return s.rec.Pin.version
	case s.rec.Pin == nil && s.facts.tip.Content == live.Content:
		return s.facts.tip
	}
	return live
}

// state computes the service's state from the operator's intent and the outcome of the last pass: the one
// place that does.
func (s *Service) state() (state, string) {
	p := s.rec.Pin
	info := ""
	if p != nil {
		info = p.Info
		if !p.Until.IsZero() {
			info += ", until " + p.Until.UTC().Format(time.RFC1123)
		}
	}
	if s.last == nil {
		return s.stateBefore(info)
	}

	err := s.last.trouble()
	tookBack := s.last.refused != nil && s.last.refused.Reason == "fallback"
	isBroken := errors.As(s.last.err, new(brokenError))
	switch {
	case err != nil:
		info = strings.TrimPrefix(info+"; ", "; ") + oneLine(err.Error())
		if tookBack || isBroken {
			return stateBroken, info
		}
		return stateDiff, info
	case p == nil:
		return stateOK, ""
	case len(s.last.edited) > 0:
		info += "; edited here: " + oneLine(someOf(s.last.edited))
	}
	return stateFreeze, info
}

// stateBefore is the state while no pass has ended since the start, or since a rollback was asked for.
func (s *Service) stateBefore(pinned string) (state, string) {
	runs := cmp.Or(s.running().Commit, s.rec.Told.Commit) // by a record from before manifests
	onItsWay := s.rec.Pin != nil && s.rec.Pin.Commit != runs
	i := slices.Index(stateNames, s.rec.Row.State)
	switch {
	case onItsWay:
		return stateRollback, pinned
	case i >= 0:
		return state(i), s.rec.Row.Info
	case s.rec.Pin != nil:
		return stateFreeze, pinned
	}
	return stateDiff, "first checkout under way"
}

// publishStatus makes the state known to others, and remembers it with the time of its last change.
func (s *Service) publishStatus() {
	st, info := s.state()
	runs, now := s.running(), time.Now()
	known := s.last != nil || st == stateRollback
	was := s.rec.Row
	if known && (st.String() != was.State || was.Since.IsZero()) {
		s.rec.Row.Since = now
		text := fmt.Sprintf("%s -> %s %s", cmp.Or(was.State, "new"), st, info)
		commit := fmt.Sprintf("%.8s", cmp.Or(runs.Commit, "none"))
		s.event(levelOf(st), strings.TrimSpace(text), "commit", commit)
	} else if known && info != was.Info && info != "" {
		s.event(slog.LevelWarn, fmt.Sprintf("%s %s", st, info))
	}
	if known {
		s.rec.Row.State, s.rec.Row.Info = st.String(), info
	}

	l := s.up.looked(s.branch)
	inSync := runs.Commit != "" && runs.Commit == l.tip
	if inSync {
		s.rec.Row.OutOfSync = time.Time{}
	} else if s.rec.Row.OutOfSync.IsZero() && known {
		s.rec.Row.OutOfSync = now
	}

	refused := ""
	if s.last != nil && s.last.refused != nil {
		refused = s.last.refused.Reason
	}
	s.status.Store(&Status{
		Service: s.service, Commit: runs.Commit, State: st.String(),
		Info: cut(unmark(info), maxInfo), Public: cut(public(info), maxInfo),
		Change: s.rec.Row.Since, Upstream: s.upstream, Branch: s.branch,
		InSync: inSync, OutOfSync: s.rec.Row.OutOfSync, LastLook: l.at, Refused: refused, state: st,
		waiting: s.facts.waiting,
	})
}

// event logs a change of the service, and remembers it for the page without its private words.
func (s *Service) event(level slog.Level, text string, more ...any) {
	slog.Log(context.Background(), level, s.service+": "+text, more...)
	count.note(s.service, text)
}

// levelOf is the level at which a new state is logged.
func levelOf(st state) slog.Level {
	switch st {
	case stateBroken:
		return slog.LevelError
	case stateDiff:
		return slog.LevelWarn
	}
	return slog.LevelInfo
}

// someOf joins the first of a list of names, 10 at most and about 1000 bytes, and tells how many there are if
// that is not all of them.
func someOf(names []string) string {
	n, text := 0, ""
	for n < min(10, len(names)) && len(text) < 1000 {
		text = strings.TrimPrefix(text+" "+names[n], " ")
		n++
	}
	if n < len(names) {
		text += fmt.Sprintf(" and %d more", len(names)-n)
	}
	return text
}

// criteria names everything but the commit that decides whether it is refused for reason.
func (s *Service) criteria(reason string) string {
	if reason != "signers" {
		return digest(fmt.Sprint(s.check, s.action, s.dirs))
	}
	parts := []string{s.signers}
	for _, f := range []string{s.signers, s.signers + ".revoked"} {
		if fi, err := os.Stat(f); err == nil {
			text, _ := os.ReadFile(f)
			parts = append(parts, string(text), fi.Mode().String())
		}
	}
	return digest(parts...)
}

// refused returns what is remembered against a version, nil if nothing is.
func (s *Service) refused(v version) *refusal {
	for _, f := range slices.Backward(s.rec.Refused) {
		same := v.Content != "" && f.Content == v.Content
		switch f.Reason {
		case "signers":
			same = f.Commit == v.Commit
		case "config": // what decided is our own binary, and files outside the repository: it is judged anew
			same = false
		}
		if same && f.Criteria == s.criteria(f.Reason) {
			return &f
		}
	}
	return nil
}

// refuse remembers that a version does not go live: the one place that does, whatever refused it.
func (s *Service) refuse(v version, f *refusal) *refusal {
	f.Commit, f.Info, f.Criteria = v.Commit, oneLine(f.Info), s.criteria(f.Reason)
	if f.Content = cmp.Or(v.Content, f.Content); f.Reason == "signers" {
		f.Content = ""
	}
	isSame := func(o refusal) bool {
		return o.Content == f.Content && o.Criteria == f.Criteria && o.Reason == f.Reason &&
			(f.Content != "" || o.Commit == f.Commit)
	}
	if i := slices.IndexFunc(s.rec.Refused, isSame); i >= 0 {
		return &s.rec.Refused[i]
	}

	s.rec.Refused = append(s.rec.Refused, *f)
	if n := len(s.rec.Refused); n > 20 {
		s.rec.Refused = slices.Clone(s.rec.Refused[n-20:])
	}
	count.add("gitopper_service_refused_total", labels("service", s.service, "reason", f.Reason))
	return f // it is logged with the state that it leads to
}

// settled remembers that what is live is good.
func (s *Service) settled(now told) error {
	s.noteOutcome(stateOK.String())
	wasTold := s.rec.Told.Content == now.Content && s.rec.Told.Boot == now.Boot
	if !wasTold {
		s.rec.Told = now
	}
	if s.rec.Good.Content != now.Content {
		s.rec.Good = now.version
		isGood := func(f refusal) bool { return f.Content == now.Content }
		s.rec.Refused = slices.DeleteFunc(s.rec.Refused, isGood)
	} else if wasTold {
		return nil
	}
	return s.save()
}

// excuse notes that the last good version fails as well as the suspect, which was not to blame then.
func (s *Service) excuse(out *outcome) {
	p := s.rec.Suspect
	if p == nil || !isOfUnit(out.err) || s.files.live().Content != s.rec.Good.Content {
		return
	}
	if !p.Excused {
		p.Info = strings.Replace(p.Info, " taken back, ", " failed, and so does the last good one, ", 1)
		p.Excused = true
	}
	out.refused = &p.refusal
}

// acquitOrConvict decides on the suspect when what is live has settled: it is refused if that is the last
// good version.
func (s *Service) acquitOrConvict(isGood bool, out *outcome) error {
	p := s.rec.Suspect
	if p == nil {
		return nil
	}
	s.rec.Suspect = nil
	switch {
	case p.Excused:
		s.nudge() // it gets its try
	case isGood:
		out.refused = s.refuse(p.version, &p.refusal)
	}
	return s.save()
}

// retell has the unit told again of content that it saw, or of whatever it saw, where the manifest that knows
// is lost. It is remembered before what it saw changes.
func (s *Service) retell(content string) error {
	sawOther := content != "" && content != s.rec.Told.Content
	if sawOther || s.rec.Told.Content == "" {
		return nil
	}
	s.untell()
	return s.save()
}

// untell has the unit told again. The commit stays: where the manifest is lost, its tree stands in for that.
func (s *Service) untell() { s.rec.Told.Content, s.rec.Told.Boot = "", "" }
