//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"gitopper/ctl"
)

// Bounds of what is remembered of commits that ran, counted of commits that wait, and told of both.
const (
	ranKept     = 50
	waitingMax  = 10_000
	waitingTold = 50
)

// ran is a version that went live here: when, by whom or what, and what came of it, in which words of a
// program are marked (see quote).
type ran struct {
	version
	When    time.Time `json:",omitzero"`
	By      string    `json:",omitempty"`
	Outcome string    `json:",omitempty"`
}

// ran returns the commits that went live here.
func (s *Service) ran() (commits []string) {
	for _, r := range s.rec.Ran {
		commits = append(commits, r.Commit)
	}
	return commits
}

// noteRan remembers what is live among what ran here; also after a kill between the manifest and the record.
func (s *Service) noteRan(live version) {
	n := len(s.rec.Ran)
	if n > 0 && s.rec.Ran[n-1].Commit == live.Commit {
		return
	}
	if live.Commit == s.up.looked(s.branch).tip {
		s.rec.Newest.Commit = live.Commit
	}

	by := "commit"
	p, suspect := s.rec.Pin, s.rec.Suspect
	if p != nil {
		by = "rollback by " + strings.TrimPrefix(p.Info, rollbackInfo(p.Commit))
	} else if suspect != nil && live.Content == s.rec.Good.Content {
		by = fmt.Sprintf("take-back of %.8s", suspect.Commit)
	}
	s.rec.Ran = lastRan(append(s.rec.Ran, ran{live, time.Now(), by, ""}))
}

// rollbackInfo is how the info of a rollback's pin begins.
func rollbackInfo(commit string) string { return fmt.Sprintf("ROLLBACK: %.8s, ", commit) }

// lastRan returns the last 50, and of the last 50 commits the last time that each ran.
func lastRan(all []ran) (kept []ran) {
	seen := map[string]bool{}
	for i, r := range slices.Backward(all) {
		isRecent := len(all)-i <= ranKept
		isLast := !seen[r.Commit] && len(seen) < ranKept
		if isRecent || isLast {
			kept = append(kept, r)
		}
		seen[r.Commit] = true
	}
	slices.Reverse(kept)
	return kept
}

// noteOutcome remembers what came of what went live last, unless that has been well before.
func (s *Service) noteOutcome(text string) {
	n := len(s.rec.Ran)
	if n > 0 && s.rec.Ran[n-1].Outcome != stateOK.String() {
		s.rec.Ran[n-1].Outcome = text
	}
}

// noteTrouble remembers that the unit, or what it needs, is in trouble on what went live last.
func (s *Service) noteTrouble(err error) {
	isUnit := errors.As(err, new(brokenError)) && !errors.As(err, new(recordError))
	if isUnit {
		s.noteOutcome(stateBroken.String() + ": " + oneLine(err.Error()))
	}
}

// waiting is what upstream has that does not run, and when what runs was committed: immutable, and true as
// long as the same runs and upstream's newest commit shows the service the same.
type waiting struct {
	Pending   int       // commits that would change the service
	Committed time.Time // of what runs; zero: not known
	commits   []ctl.Commit
	runs, tip version
}

// tally finds out what waits. It asks git only where what runs or what upstream shows of it has changed, and
// they differ.
func (s *Service) tally(ctx context.Context) {
	runs, old := s.running(), s.facts.waiting
	tip := version{Commit: s.up.looked(s.branch).tip}
	tip, err := s.today(ctx, tip, s.files.live())
	if err != nil {
		tip.Content = tip.Commit // nothing of it can be shown
	}
	now := waiting{runs: runs, tip: tip, Committed: old.Committed}
	if runs.Commit == "" || tip.Commit == "" {
		s.facts.waiting = now
		return
	}

	if runs.Commit != old.runs.Commit || old.Committed.IsZero() {
		shown, _ := s.up.showing(ctx, runs.Commit, s.dirs)
		now.Committed = shown.committed
	}
	switch {
	case tip.Content == runs.Content:
	case tip.Content == old.tip.Content && runs.Content == old.runs.Content:
		now.Pending, now.commits = old.Pending, old.commits
	default:
		s.within(localLimit)
		now.commits, now.Pending, _ = s.up.between(ctx, runs.Commit, tip.Commit, s.dirs)
		now.Pending = max(1, now.Pending) // also where upstream went back, or git fails
	}
	if ctx.Err() == nil {
		s.facts.waiting = now
	}
}

// between counts the commits that a branch has since another commit, and that changed what dirs link to, and
// tells of the newest. It is what git says, which runs as the clone's user: for people only.
func (u *upstream) between(ctx context.Context, from, to string, dirs []dir) (
	list []ctl.Commit, n int, err error) {
	a, err := u.account(ctx)
	if err != nil {
		return nil, 0, err
	}
	args := []string{"log", "--no-show-signature", "--max-count=" + strconv.Itoa(waitingMax),
		"--format=%H%x00%ct%x00%an%x00%s", from + ".." + to, "--"}
	for _, d := range dirs {
		args = append(args, d.link)
	}
	out, err := runGit(ctx, "log", u.reader(a, args...), lookLimit)
	if err != nil {
		return nil, 0, err
	}

	word := func(text string) string { return strings.Clone(redact(printable(text, 200))) }
	for line := range strings.Lines(string(out)) {
		n++
		f := strings.SplitN(strings.TrimSuffix(line, "\n"), "\x00", 4)
		isWhole := len(f) == 4 && isHash(f[0])
		if !isWhole || n > waitingTold {
			continue
		}
		seconds, _ := strconv.ParseInt(f[1], 10, 38)
		list = append(list, ctl.Commit{
			Hash: word(f[0]), Date: date(time.Unix(seconds, 0)), Author: word(f[2]), Subject: word(f[3]),
		})
	}
	return list, n, nil
}
