//go:build linux

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"

	"gitopper/ctl"
)

// Bounds of a walk over history, of what is remembered of commits that ran, counted of commits that wait, and
// told of both.
const (
	maxHistory  = 100_000
	ranKept     = 50
	waitingMax  = 10_000
	waitingTold = 50
	diffLimit   = 25 * time.Second
	diffRead    = 32 << 20  // bytes of the files that differ
	diffTold    = 512 << 10 // bytes
	editsTold   = 100
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
func (r *record) ran() (commits []string) {
	for _, v := range r.Ran {
		commits = append(commits, v.Commit)
	}
	return commits
}

// noteRan remembers what is live among what ran here; also after a kill between the manifest and the record.
func (s *Service) noteRan(live version) {
	if s.rec.lastRan().Commit == live.Commit {
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
	s.rec.Ran = pruneRan(append(s.rec.Ran, ran{live, time.Now(), by, ""}))
}

// rollbackInfo is how the info of a rollback's pin begins.
func rollbackInfo(commit string) string { return fmt.Sprintf("ROLLBACK: %.8s, ", commit) }

// lastRan is what went live last, a zero one where nothing did.
func (r *record) lastRan() *ran {
	if n := len(r.Ran); n > 0 {
		return &r.Ran[n-1]
	}
	return &ran{}
}

// pruneRan returns the last 50, and of the last 50 commits the last time that each ran.
func pruneRan(all []ran) (kept []ran) {
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
	if last := s.rec.lastRan(); last.Outcome != stateOK.String() {
		last.Outcome = text
	}
}

// isOfUnit says that trouble is with the unit or what it needs, and not with what we remember.
func isOfUnit(err error) bool {
	return errors.As(err, new(brokenError)) && !errors.As(err, new(recordError))
}

// noteTrouble remembers that the unit, or what it needs, is in trouble on what went live last.
func (s *Service) noteTrouble(err error) {
	if isOfUnit(err) {
		s.noteOutcome(stateBroken.String() + ": " + oneLine(err.Error()))
	}
}

// waiting is what upstream has that does not run, and when what runs was committed. Nobody changes it.
type waiting struct {
	Pending   int       // commits that would change the service
	Committed time.Time // of what runs; zero: not known
	commits   []ctl.Commit

	runs     string    // the commit that Committed is of
	contents [2]string // of what runs and of upstream's newest, when commits were asked for
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

	now := waiting{runs: runs.Commit, contents: [2]string{runs.Content, tip.Content}}
	if runs.Commit == "" || tip.Commit == "" {
		s.facts.waiting = now
		return
	}

	if now.Committed = old.Committed; now.runs != old.runs || now.Committed.IsZero() {
		w, _ := s.up.walk(ctx, runs.Commit, s.dirs)
		now.Committed = w.committed
	}
	switch {
	case tip.Content == runs.Content:
	case now.contents == old.contents:
		now.Pending, now.commits = old.Pending, old.commits
	default:
		s.within(localLimit)
		now.commits, now.Pending, err = s.up.between(ctx, runs.Commit, tip.Commit, s.dirs)
		now.Pending = max(1, now.Pending) // also where upstream went back, or git fails
		if err != nil {
			now.contents = [2]string{} // git is asked again
		}
	}

	if ctx.Err() == nil {
		s.facts.waiting = now
	}
}

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
	for i := 0; i < len(queue); i++ {
		if !visit(queue[i]) {
			return nil
		}
		c, err := o.commit(queue[i])
		if errors.Is(err, errMissing) {
			o.c.noteDamage(damaged{err}) // git has it, where it has what descends from it
		}
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

// named returns the commits that a hash of 4 to 64 digits names, of those that ran here and of the history of
// branch's tip; only of its 100,000 newest, where it is not a whole id.
func (u *upstream) named(ctx context.Context, branch, hash string, ran []string) ([]string, error) {
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
	c, err := u.ready(ctx)
	if err != nil {
		return false, err
	}
	_, err = runGit(ctx, "merge-base", c.git("merge-base", "--is-ancestor", commit, of), fetchLimit)
	if exitCode(err) > 0 {
		return false, nil
	}
	return err == nil, err
}

// between counts the commits that a branch has since another commit, and that changed what dirs link to, and
// tells of the newest. It is what git says, which runs as the clone's user: for people only.
func (u *upstream) between(ctx context.Context, from, to string, dirs []dir) (
	list []ctl.Commit, n int, err error) {
	c, err := u.ready(ctx)
	if err != nil {
		return nil, 0, err
	}

	args := []string{"log", "--no-show-signature", "--max-count=" + strconv.Itoa(waitingMax),
		"--format=%H%x00%ct%x00%an%x00%s", from + ".." + to, "--"}
	for _, d := range dirs {
		args = append(args, d.link)
	}

	out, err := runGit(ctx, "log", c.git(args...), lookLimit)
	if err != nil {
		return nil, 0, err
	}

	word := func(text string) string { return strings.Clone(redact(printable(text, 200))) }
	for line := range strings.Lines(string(out)) {
		if n++; n == waitingMax {
			break
		}
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

// preview shows what a commit, upstream's newest where none is named, would change of what runs, and names
// the local edits that are kept. Everybody may call it; it takes 25 s at most.
func (s *Service) preview(ctx context.Context, hash string) (string, error) {
	limited, cancel := context.WithTimeout(ctx, diffLimit)
	defer cancel()

	to, err := s.up.looked(s.branch).tip, error(nil)
	if hash != "" {
		rec, _, _ := readRecord(recordFile(s.stateDir, s.service)) // without one nothing ran
		to, err = s.find(limited, hash, rec.ran())
	}
	if err == nil && to == "" {
		err = &opError{status: "Conflict", err: errors.New("upstream's newest commit is not known yet")}
	}

	var text []byte
	if err == nil {
		text, err = s.up.diff(limited, s.Status().Commit, to, s.dirs)
	}

	switch {
	case errors.As(err, new(*refusal)):
		err = &opError{status: "Not Acceptable", err: err}
	case err != nil && limited.Err() != nil:
		err = fmt.Errorf("it takes longer than %v, try again: upstream, or another fetch, is slow", diffLimit)
	}
	return escaped(text, diffTold) + keptEdits(s.files.dir), err
}

// diff compares what dirs link to in two commits, of which one may be none, as git diff does. Root's own git
// does that, with contents that root read by their ids, in a directory of root's: what is shown is what the
// ids name, whatever the clone's user or attributes in the repository want to be seen.
func (u *upstream) diff(ctx context.Context, from, to string, dirs []dir) (text []byte, err error) {
	var sides [2]tree
	for i, commit := range []string{from, to} {
		if commit == "" {
			continue
		}
		if sides[i], err = u.tree(ctx, commit, dirs); err != nil {
			return nil, err
		}
	}

	differ := tree{}
	for i, side := range []string{"a/", "b/"} {
		for p, b := range sides[i] {
			if sides[1-i][p] != b {
				differ[side+p] = b
			}
		}
	}
	if len(differ) == 0 {
		return nil, nil
	}
	if err := u.fetchMissing(ctx, differ); err != nil {
		return nil, err
	}

	work, err := os.MkdirTemp("", "gitopper")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(work)
	err = errors.Join(os.Mkdir(work+"/a", 0o700), os.Mkdir(work+"/b", 0o700))
	if err == nil {
		err = u.layBare(ctx, work, differ)
	}
	if err != nil {
		return nil, err
	}

	cmd := gitCommand(account{uid: os.Getuid(), home: "/"}, "", nil,
		"diff", "--no-index", "--no-prefix", "--no-color", "--no-ext-diff", "--no-textconv", "a", "b")
	cmd.Dir = work
	text, err = runGit(ctx, "diff", cmd, diffLimit)
	text = diffHeader.ReplaceAllFunc(text, nameBoth)
	if exitCode(err) == 1 {
		err = nil // they differ
	}
	return text, err
}

var diffHeader = regexp.MustCompile(`(?m)^diff --git .*$`)

// nameBoth names both sides in the header of a file's diff. Git, which sees two directories, says the name of
// a new or removed file twice: diff --git b/etc/f b/etc/f
func nameBoth(header []byte) []byte {
	names, _ := strings.CutPrefix(string(header), "diff --git ")
	name, again := names[:len(names)/2], names[(len(names)+1)/2:]
	if name != again {
		return header
	}

	bare := strings.TrimPrefix(name, `"`)
	quote := name[:len(name)-len(bare)]
	return fmt.Appendf(nil, "diff --git %sa%s %[1]sb%[2]s", quote, bare[1:])
}

// layBare writes the files and symbolic links of a tree below a directory.
func (u *upstream) layBare(ctx context.Context, work string, t tree) error {
	o, err := u.open(ctx)
	if err != nil {
		return err
	}
	defer o.close()
	o.left = diffRead

	for _, p := range slices.Sorted(maps.Keys(t)) {
		at, b := filepath.Join(work, p), t[p]
		if b.mode == "160000" {
			continue // an empty directory, whatever its commit
		}
		var content bytes.Buffer
		_, err := o.blob(b.id, &content)
		if errors.As(err, new(*refusal)) {
			err = fmt.Errorf("%d MiB at most are shown: %w", diffRead>>20, err)
		}
		if err == nil {
			err = os.MkdirAll(filepath.Dir(at), 0o700)
		}

		switch {
		case err != nil:
		case b.mode == "120000":
			err = os.Symlink(content.String(), at)
		case b.mode == "100755":
			err = os.WriteFile(at, content.Bytes(), 0o700)
		default:
			err = os.WriteFile(at, content.Bytes(), 0o600)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// escaped returns a text, less what is too much of it, with all that could steer a terminal or mislead its
// reader as Go writes it in a literal.
func escaped(text []byte, limit int) string {
	var b strings.Builder
	for line := range bytes.Lines(text) {
		if b.Len()+len(line) > limit {
			fmt.Fprintf(&b, "# ... and more: %d bytes in all\n", len(text))
			break
		}
		for _, r := range string(line) {
			isPlain := strings.ContainsRune("\n\t", r) || unicode.IsPrint(r)
			if isPlain {
				b.WriteRune(r)
			} else {
				b.WriteString(strings.Trim(strconv.QuoteRune(r), "'"))
			}
		}
	}
	return b.String()
}

// keptEdits tells, a line each, of the local edits that are kept in a service's directory. What came out in a
// directory of others' is one edit, and is not looked into.
func keptEdits(dir string) string {
	top, err := openOwn(dir)
	if err != nil {
		return "" // nothing is laid out yet
	}
	defer top.close()

	edits, err := top.below(editsDir)
	if err != nil {
		return ""
	}
	defer edits.close()

	var b strings.Builder
	n := 0
	edits.each("", func(p string, size int64) {
		if n++; n <= editsTold {
			fmt.Fprintf(&b, "# kept: %s, %d bytes\n", printable(filepath.Join(dir, editsDir, p), 5000), size)
		}
	})
	if n > editsTold {
		fmt.Fprintf(&b, "# and %d more\n", n-editsTold)
	}
	return b.String()
}

// each tells of what lies in a directory, and in those of root's alone below it.
func (p place) each(at string, tell func(p string, size int64)) {
	names, _ := p.names(maxEntries)
	slices.Sort(names)
	for _, name := range names {
		below, err := placeAt(p.fd, name)
		if err != nil {
			continue // it is gone
		}
		st, _ := below.stat()
		if below.isRootsDir() && strings.Count(at, "/") < treeDepth {
			below.each(path.Join(at, name), tell)
		} else {
			tell(path.Join(at, name), st.Size)
		}
		below.close()
	}
}
