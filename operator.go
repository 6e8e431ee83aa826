//go:build linux

package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"gitopper/ctl"

	"golang.org/x/crypto/ssh"
)

// route is one command of the SSH interface.
type route struct {
	path     string
	needs    rights
	min, max int // words after path
	usage    string
	run      func(*sshServer, context.Context, *sshConn, []string, func(string)) (any, error)
}

// sshRoutes is everything that can be asked for.
func sshRoutes() []route {
	return []route{
		{"/list/machine", mayLook, 0, 0, "", (*sshServer).listMachines},
		{"/list/service", mayLook, 0, 1, "[SERVICE]", (*sshServer).listServices},
		{"/list/log", mayLook, 1, 1, "SERVICE", (*sshServer).listLog},
		{"/list/diff", mayWrite, 1, 2, "SERVICE [HASH]", (*sshServer).listDiff},
		{"/do/freeze", mayWrite, 1, maxRequest, "SERVICE [DURATION] [REASON...]", (*sshServer).change},
		{"/do/unfreeze", mayWrite, 1, 1, "SERVICE", (*sshServer).change},
		{"/do/rollback", mayWrite, 2, maxRequest, "SERVICE HASH [REASON...]", (*sshServer).change},
		{"/do/pull", mayWrite, 1, 1, "SERVICE", (*sshServer).change},
	}
}

const (
	maxRequest = 4 << 10                   // bytes of a command
	maxReason  = 200                       // bytes
	maxFreeze  = 10 * 365 * 24 * time.Hour // longer is a typing error
)

// op is what an operator asks of a service.
type op struct {
	verb   string       // freeze, unfreeze, rollback or pull
	hash   string       // rollback: 4 to 64 lower case hex digits
	until  time.Time    // freeze: zero is until unfreeze
	reason string       // freeze, rollback
	who    string       // for the info
	step   func(string) // told of each step
}

// opError is an error with an HTTP status text for the client. done says that the operation was carried out
// all the same.
type opError struct {
	status string
	err    error
	done   bool
}

func (e *opError) Error() string { return e.err.Error() }
func (e *opError) Unwrap() error { return e.err }

// told returns a text as who has these rights may read it.
func (r rights) told(text string) string {
	if r == mayWrite {
		return unmark(text)
	}
	return public(text)
}

func sshError(status, format string, args ...any) error {
	return &opError{status: status, err: fmt.Errorf(format, args...)}
}

// errorLine is how a client sees an error: HTTP status text first, and private words only for who may write.
func errorLine(err error, r rights) string {
	status := "Internal Server Error"
	if oe, ok := errors.AsType[*opError](err); ok {
		status = oe.status
	}
	return printable(status+": "+r.told(err.Error()), 4000)
}

// parseRequest takes an exec request's payload apart: a string (RFC 4254 section 6.5) of printable words.
func parseRequest(payload []byte) ([]string, error) {
	if len(payload) > maxRequest {
		return nil, sshError("Bad Request", "a command has at most %d bytes", maxRequest)
	}
	var r struct{ Command string }
	if ssh.Unmarshal(payload, &r) != nil {
		r.Command = "" // as for a shell, which has no payload
	}
	if r.Command != printable(r.Command, maxRequest) {
		return nil, sshError("Bad Request", "a command is UTF-8 without control characters")
	}

	words := strings.Fields(r.Command)
	if len(words) == 0 {
		return nil, sshError("Bad Request", "no command, and no shell here; say one, such as /list/service")
	}
	return words, nil
}

// run answers a request, or refuses it with a line in the log.
func (s *sshServer) run(ctx context.Context, c *sshConn, payload []byte, step func(string)) (any, error) {
	c.busy(ctx, 0)
	words, err := parseRequest(payload)
	if err == nil {
		var r route
		if r, err = findRoute(words, c.who); err == nil {
			return r.run(s, ctx, c, words, step)
		}
	}
	slog.Warn(fmt.Sprintf("ssh: %q refused: %s: %s", strings.Join(words, " "), errorLine(err, mayLook), c))
	return nil, err
}

// findRoute finds what the first word asks for, if who may ask that, and in so many words.
func findRoute(words []string, who visitor) (route, error) {
	routes := sshRoutes()
	i := slices.IndexFunc(routes, func(r route) bool { return r.path == words[0] })
	if i < 0 {
		return route{}, sshError("Not Found", "no command %q; there are /list/ and /do/", words[0])
	}

	r, n := routes[i], len(words)-1
	if !who.rights.suffice(r.needs) {
		return route{}, sshError("Unauthorized", "key %s is read-only", who.comment)
	}
	if n < r.min || n > r.max {
		return route{}, sshError("Bad Request", "usage: %s", strings.TrimSpace(r.path+" "+r.usage))
	}
	return r, nil
}

func (s *sshServer) listMachines(context.Context, *sshConn, []string, func(string)) (any, error) {
	answer := ctl.Machines{Machines: []ctl.Machine{}}
	for _, m := range s.machines {
		answer.Machines = append(answer.Machines, ctl.Machine{Machine: m, Actual: s.actual})
	}
	return answer, nil
}

func (s *sshServer) listServices(_ context.Context, c *sshConn, words []string, _ func(string)) (any, error) {
	services, answer := s.services, ctl.Services{Services: []ctl.Service{}}
	if len(words) > 1 {
		svc, err := s.service(words[1])
		if err != nil {
			return nil, err
		}
		services = []*Service{svc}
	}

	for _, svc := range services {
		st := svc.Status()
		info := st.Public
		if c.who.rights == mayWrite {
			info = unmark(st.Info)
		}
		answer.Services = append(answer.Services, ctl.Service{
			Service: st.Service, Hash: fmt.Sprintf("%.8s", st.Commit), State: st.State, StateInfo: info,
			Change: date(st.Change), Pending: st.Pending, Committed: date(st.Committed),
		})
	}
	return answer, nil
}

// service finds a service by its name.
func (s *sshServer) service(name string) (*Service, error) {
	for _, svc := range s.services {
		if svc.Status().Service == name {
			return svc, nil
		}
	}
	return nil, sshError("Not Found", "no service %q on %s", name, s.actual)
}

// listLog tells of what ran, from the record, and of what waits. It runs nothing.
func (s *sshServer) listLog(_ context.Context, c *sshConn, words []string, _ func(string)) (any, error) {
	svc, err := s.service(words[1])
	if err != nil {
		return nil, err
	}
	rec, _, err := readRecord(recordFile(svc.stateDir, words[1]))
	if !isOrLacks(err) {
		return nil, err
	}

	st := svc.Status()
	answer := ctl.Log{
		Service: st.Service, Ran: []ctl.Ran{},
		Pending: append([]ctl.Commit{}, st.commits...), More: st.Pending - len(st.commits),
	}
	for _, r := range slices.Backward(rec.Ran[max(0, len(rec.Ran)-ranKept):]) {
		answer.Ran = append(answer.Ran, ctl.Ran{
			Hash: r.Commit, When: date(r.When), By: r.By, Outcome: c.who.rights.told(r.Outcome),
		})
	}
	return answer, nil
}

// listDiff shows what a commit would change. Contents may be secret: it is for keys that may write.
func (s *sshServer) listDiff(ctx context.Context, _ *sshConn, words []string, _ func(string)) (any, error) {
	svc, err := s.service(words[1])
	if err != nil {
		return nil, err
	}

	hash := ""
	if len(words) > 2 {
		if hash, err = parseHash(words[2]); err != nil {
			return nil, err
		}
	}

	text, err := svc.preview(ctx, hash)
	return text, err
}

// date is a time as answers have it, empty where it is not known.
func date(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return t.UTC().Format(time.RFC1123)
}

// change has a service do something, also if the client hangs up, and logs what came of it. The answer is the
// service's row, also where what was asked for was carried out, though not with the outcome that was hoped
// for.
func (s *sshServer) change(ctx context.Context, c *sshConn, words []string, step func(string)) (any, error) {
	svc, err := s.service(words[1])
	o, wrong := parseOp(words, time.Now())
	if err = cmp.Or(err, wrong); err == nil {
		o.who, o.step = fmt.Sprintf("%s (%s@%s)", c.who.comment, c.who.user, c.from), step
		c.busy(ctx, 1)
		err = s.do(svc, ctx, o)
		c.busy(ctx, -1)
	}

	what, result, isDone := o.verb, "ok", true
	if len(words) > 2 {
		what += fmt.Sprintf(" %q", strings.Join(words[2:], " "))
	}
	if err != nil {
		oe, _ := errors.AsType[*opError](err)
		result, isDone = errorLine(err, mayWrite), oe != nil && oe.done
	}
	slog.Info(fmt.Sprintf("%s: %s by %s: %s", words[1], what, c, result))
	if !isDone {
		return nil, err
	}

	answer, _ := s.listServices(ctx, c, words[:2], nil) // the service is there
	return answer, err
}

// parseOp reads the words of a /do/ command, whose number is right.
func parseOp(words []string, now time.Time) (op, error) {
	o, rest := op{verb: strings.TrimPrefix(words[0], "/do/")}, words[2:]
	switch {
	case o.verb == "rollback":
		hash, err := parseHash(rest[0])
		if err != nil {
			return o, err
		}
		o.hash, rest = hash, rest[1:]

	// A number first is meant as a duration, even if it is none: a typing error must not freeze for ever.
	case len(rest) > 0 && strings.IndexAny(strings.TrimLeft(rest[0], "+-."), "0123456789") == 0:
		d := parseDuration(rest[0])
		if d == 0 {
			return o, sshError("Bad Request", "duration %q: want one word of numbers and s, m, h, d or w, "+
				"such as 90m, 1h30m or 2d, up to ten years; a reason begins with a letter", rest[0])
		}
		o.until, rest = now.Add(d), rest[1:]
	}

	o.reason = strings.Join(rest, " ")
	if len(o.reason) > maxReason {
		return o, sshError("Bad Request", "a reason has at most %d bytes", maxReason)
	}

	first, _, _ := strings.Cut(strings.ToLower(o.reason), " ")
	if o.verb == "freeze" && slices.Contains([]string{"until", "for"}, first) {
		return o, sshError("Bad Request", "a reason that begins with %q reads like an end: say an end as a "+
			"duration in one word, such as 90m, 1h30m, 2d or 1w, right after the service, and begin the "+
			"reason otherwise", first)
	}
	return o, nil
}

var isHashPrefix = regexp.MustCompile(`^[0-9a-f]{4,64}$`).MatchString

func parseHash(word string) (string, error) {
	hash := strings.ToLower(word)
	if !isHashPrefix(hash) {
		return "", sshError("Bad Request", "hash %q: want 4 to 64 hex digits", word)
	}
	return hash, nil
}

var (
	isDuration   = regexp.MustCompile(`^(\d{1,9}[smhdw])+$`).MatchString
	durationPart = regexp.MustCompile(`(\d+)(.)`)
)

// parseDuration reads 90m, 1h30m or 2d: time.ParseDuration knows no days, and more than we offer. It is 0
// where that makes no sense.
func parseDuration(word string) time.Duration {
	if !isDuration(word) {
		return 0
	}

	units := map[string]int64{"s": 1, "m": 60, "h": 3600, "d": 24 * 3600, "w": 7 * 24 * 3600}
	seconds := int64(0)
	for _, part := range durationPart.FindAllStringSubmatch(word, -1) {
		n, _ := strconv.ParseInt(part[1], 10, 64)
		seconds += n * units[part[2]]
	}
	if seconds > int64(maxFreeze/time.Second) {
		return 0
	}
	return time.Duration(seconds) * time.Second
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
		s.rec, s.last = before, last
		return &opError{status: "Internal Server Error", err: err}
	}

	count.note(s.service, o.verb+" by "+o.who)
	s.publishStatus()

	ended := s.conclude(ctx, s.reconcile(ctx))
	switch {
	case o.verb == "freeze":
		return nil // what else the pass found is not of it
	case ended != nil:
		return &opError{status: "Conflict", err: ended, done: true}
	case s.last.trouble() != nil:
		st := s.Status()
		err := fmt.Errorf("done, but %s is %s: %s", s.service, st.State, oneLine(s.last.trouble().Error()))
		return &opError{status: "Internal Server Error", err: err, done: true}
	case lookErr != nil:
		return &opError{status: "Internal Server Error", err: lookErr, done: true}
	}
	return nil
}

// wish notes what the operator wants; lookErr is what was wrong with a look at upstream that it took, which
// counts as a missed look.
func (s *Service) wish(ctx context.Context, o op) (lookErr, err error) {
	r := &s.rec
	switch o.verb {
	case "freeze":
		runs := s.running()
		if runs.Commit == "" {
			err := errors.New("nothing runs yet: there is no commit to freeze")
			return nil, &opError{status: "Conflict", err: err}
		}
		r.Pin = &pin{version: runs, Info: strings.TrimSuffix(o.who+": "+o.reason, ": "), Until: o.until}
	case "unfreeze":
		r.Pin = nil // and edits are undone as ever
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

// rollback finds out whether the commit can run, changing nothing if it can't, and then pins the service to
// it.
func (s *Service) rollback(ctx context.Context, o op) error {
	if err := s.ensureReady(ctx); err != nil {
		return &opError{status: "Internal Server Error", err: err}
	}

	commit, err := s.named(ctx, o.hash)
	if err != nil {
		return err
	}

	live := s.files.live()
	v, err := s.today(ctx, version{Commit: commit}, live)
	// One that never ran here is judged as upstream's newest, but that it need not descend.
	isNew := !slices.Contains(s.rec.ran(), commit)
	if err == nil && isNew && s.signers != "" {
		err = s.up.verify(ctx, commit, s.signers)
	}
	if err == nil && v.Content != live.Content {
		var c *candidate
		c, err = s.layOut(ctx, v)
		if err == nil && isNew {
			err = s.precheck(ctx, c)
		}
	}

	if errors.As(err, new(*refusal)) {
		return &opError{status: "Not Acceptable", err: err}
	}
	if err != nil {
		return &opError{status: "Internal Server Error", err: fmt.Errorf("commit %.8s: %w", commit, err)}
	}

	info := rollbackInfo(commit) + o.who
	s.rec.Pin = &pin{version: v, Info: strings.TrimSuffix(info+": "+o.reason, ": "), Undo: true}
	s.rec.Refused, s.rec.Suspect, s.last = nil, nil, nil
	return nil
}

// named returns the commit that an operator's hash names, or an *opError.
func (s *Service) named(ctx context.Context, hash string) (string, error) {
	s.within(fetchLimit)
	commit, err := s.find(ctx, hash, s.rec.ran())
	oe, _ := errors.AsType[*opError](err)
	isUnknown := oe != nil && oe.status == "Not Found"
	if !isUnknown || ctx.Err() != nil {
		return commit, err
	}

	lookErr := s.lookNow(ctx, false) // it may be newer than our last look
	s.within(fetchLimit)
	commit, err = s.find(ctx, hash, s.rec.ran())
	if err != nil && lookErr != nil {
		err = fmt.Errorf("%w; newer ones are not known: %w", err, lookErr)
	}
	return commit, err
}

// find returns the commit that a hash names among those that ran here and in the history that is known of the
// branch, or an *opError. Everybody may call it.
func (s *Service) find(ctx context.Context, hash string, ran []string) (string, error) {
	commits, err := s.up.named(ctx, s.branch, hash, ran)
	switch {
	case err != nil:
		return "", &opError{status: "Internal Server Error", err: err}
	case len(commits) == 0:
		err = fmt.Errorf("no such commit: %s is not in the history of %s, nor did it run here",
			hash, s.branch)
		return "", &opError{status: "Not Found", err: err}
	case len(commits) > 1:
		err = fmt.Errorf("more than one commit begins with %s, give more digits: %s", hash, someOf(commits))
		return "", &opError{status: "Bad Request", err: err}
	}
	return commits[0], nil
}
