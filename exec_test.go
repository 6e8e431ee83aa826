//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

func TestExecute(t *testing.T) {
	ctx := context.Background()
	dead, cancel := context.WithCancel(ctx)
	cancel()
	minute := time.Minute
	for _, tc := range []struct {
		name        string
		ctx         context.Context
		limit       time.Duration
		script      string
		out, wanted string // of standard output; in the error, "" is none
	}{
		{"output", ctx, minute, "echo a; echo b >&2", "a\n", ""},
		{"locale", ctx, minute, "echo $LC_ALL", "C\n", ""},
		{"left behind", ctx, minute, "setsid sleep 100 & echo a", "a\n", ""},
		{"words", ctx, minute, "echo first >&2; echo last >&2; exit 3", "",
			"job: exit status 3: first; last"},
		{"limit", ctx, 50 * time.Millisecond, "echo waiting >&2; sleep 100 & wait", "",
			"job: took longer than 50ms and was ended: waiting"},
		{"leaves its group", ctx, 200 * time.Millisecond, "exec 2>/dev/null; set -m; sleep 3 & wait", "",
			"took longer than 200ms"},
		{"ended before", dead, minute, "echo a", "", "job: context canceled"},
		{"endless output", ctx, minute, "head -c 90000000 /dev/zero", "", "job: more than 64 MiB of output"},
		{"many words", ctx, minute, "yes x | head -100000 >&2; exit 1", "", "x; x"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			cmd := exec.Command("bash", "-c", tc.script)
			out, err := execute(tc.ctx, program{name: "job", cmd: cmd, limit: tc.limit})
			switch {
			case !errorSays(err, tc.wanted):
				t.Errorf("error %v, want %q", err, tc.wanted)
			case err != nil && len(err.Error()) > 1000:
				t.Errorf("an error of %d bytes", len(err.Error()))
			case err == nil && string(out) != tc.out:
				t.Errorf("got %.100q, want %q", out, tc.out)
			}
		})
	}
}

func TestRedact(t *testing.T) {
	for in, want := range map[string]string{
		"https://user:pass@h/x":                  "https://***@h/x",
		"https://user:p@ss@h/x":                  "https://***@h/x",
		"https://token@h/x":                      "https://***@h/x",
		"ssh://git@h/x git@h:x":                  "ssh://git@h/x git@h:x",
		"fatal: ssh://git:pw@h/x: no":            "fatal: ssh://***@h/x: no",
		"unable to look up user:s3cret@h (port)": "unable to look up ***@h (port)",
		"https://user:pa ss@h/x":                 "https://***@h/x",
		"'https://user:pa/s@s@h/x'":              "'https://***@h/x'",
		"ssh://user:pa/ss@h/x ssh://u:p@ss@h":    "ssh://***@h/x ssh://***@h",
		"https://***@h/x ssh://***@h:22/x":       "https://***@h/x ssh://***@h:22/x",
		"https://h:8443/a@b/c":                   "https://h:8443/a@b/c",
		"a https://x/y and b@c":                  "a https://x/y and b@c",
		"http://u:p@h/ http://u2:p@i/":           "http://***@h/ http://***@i/",
		"https://h/x?private_token=s3cret&a=b":   "https://h/x?private_token=***&a=b",
	} {
		if got := redact(in); got != want {
			t.Errorf("redact(%q) = %q, want %q", in, got, want)
		}
	}
}

// together has n callers come to a batch while a run is under way, and then lets that end.
func together[T any](t *testing.T, b *batch[T], n int, caller func(i int)) {
	t.Helper()
	b.busy.Lock()
	var callers sync.WaitGroup
	for i := range n {
		callers.Go(func() { caller(i) })
	}
	came := func() int {
		b.mu.Lock()
		defer b.mu.Unlock()
		if b.next == nil {
			return 0
		}
		return b.next.waiting
	}
	for deadline := time.Now().Add(time.Minute); came() < n; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Errorf("%d of %d came", came(), n)
			break
		}
	}
	b.busy.Unlock()
	callers.Wait()
}

// TestBatch: who comes while a run is under way has the next one, together with the others.
func TestBatch(t *testing.T) {
	var runs [][]string
	wrong := errors.New("wrong")
	b := batch[string]{do: func(_ context.Context, names []string) ([]string, error) {
		runs = append(runs, names)
		if slices.Contains(names, "bad") {
			return nil, wrong
		}
		return names, nil
	}}
	if got, alone, err := b.ask(t.Context(), "one"); got != "one" || !alone || err != nil {
		t.Errorf("%q, %v, %v", got, alone, err)
	}
	together(t, &b, 100, func(i int) {
		name := fmt.Sprint(i)
		if got, alone, err := b.ask(t.Context(), name); got != name || alone || err != nil {
			t.Errorf("%s: %q, %v, %v", name, got, alone, err)
		}
	})
	together(t, &b, 2, func(i int) {
		if got, alone, err := b.ask(t.Context(), []string{"good", "bad"}[i]); got != "" || alone || err != wrong {
			t.Errorf("%q, %v, %v", got, alone, err)
		}
	})
	if _, alone, err := b.ask(t.Context(), "bad"); !alone || err != wrong {
		t.Errorf("%v, %v", alone, err)
	}
	if len(runs) != 4 || len(runs[1]) != 100 {
		t.Errorf("%q", runs)
	}
}

// TestBatchGathers: a run after one that several shared waits a moment for more callers, however slow the
// machine is.
func TestBatchGathers(t *testing.T) {
	var asked time.Time
	var waited time.Duration
	b := batch[string]{do: func(_ context.Context, names []string) ([]string, error) {
		waited = time.Since(asked)
		return names, nil
	}}
	ask := func(int) {
		if _, _, err := b.ask(t.Context(), "x"); err != nil {
			t.Error(err)
		}
	}
	together(t, &b, 2, ask)
	asked = time.Now()
	ask(0)
	if waited < gathering {
		t.Errorf("waited %v", waited)
	}
}

// TestBatchIsNeverOld: however callers come, what they get was found out after they came, by one run at a time.
func TestBatchIsNeverOld(t *testing.T) {
	var now, runs, under atomic.Int64
	b := batch[int64]{do: func(_ context.Context, names []string) ([]int64, error) {
		if under.Add(1) != 1 {
			t.Error("two runs at a time")
		}
		defer under.Add(-1)
		runs.Add(1)
		found := now.Load()
		time.Sleep(time.Millisecond)
		return slices.Repeat([]int64{found}, len(names)), nil
	}}
	var callers sync.WaitGroup
	for range 50 {
		callers.Go(func() {
			for range 20 {
				came := now.Add(1)
				if found, _, err := b.ask(t.Context(), ""); found < came || err != nil {
					t.Errorf("came at %d, found at %d, %v", came, found, err)
				}
			}
		})
	}
	callers.Wait()
	if n := runs.Load(); n > 500 {
		t.Errorf("%d runs for 1000 questions", n)
	}
}

// TestBatchIsLeft: a caller that leaves takes nobody along; when all have left, what is under way ends.
func TestBatchIsLeft(t *testing.T) {
	left, leave := context.WithCancel(t.Context())
	b := batch[string]{do: func(ctx context.Context, names []string) ([]string, error) {
		if names[0] == "waits" {
			leave()
			<-ctx.Done()
		}
		return names, ctx.Err()
	}}
	if _, _, err := b.ask(left, "waits"); err != context.Canceled {
		t.Error(err)
	}
	together(t, &b, 3, func(i int) {
		if _, _, err := b.ask(left, "leaves"); err != context.Canceled {
			t.Error(err)
		}
		name := fmt.Sprint(i)
		if got, _, err := b.ask(t.Context(), name); got != name || err != nil {
			t.Errorf("%s: %q, %v", name, got, err)
		}
	})
}

// TestCrowd: no more than there is room for at a time while they get on, and nobody waits for those who hang.
func TestCrowd(t *testing.T) {
	c := crowd{room: make(chan struct{}, 2)}
	var in, most atomic.Int64
	var all sync.WaitGroup
	for range 20 {
		all.Go(func() {
			defer c.enter(t.Context())()
			for now := in.Add(1); now > most.Load(); {
				most.Store(now)
			}
			time.Sleep(10 * time.Millisecond)
			in.Add(-1)
		})
	}
	all.Wait()
	if most.Load() != 2 || len(c.room) != 0 {
		t.Errorf("%d at a time, %d left behind", most.Load(), len(c.room))
	}

	c.enter(t.Context())
	c.enter(t.Context()) // neither leaves
	start := time.Now()
	c.enter(t.Context())()
	if took := time.Since(start); took < time.Second || took > 10*time.Second {
		t.Errorf("behind two that hang: %v", took)
	}
	ended, end := context.WithCancel(t.Context())
	end()
	start = time.Now()
	c.enter(ended)()
	if took := time.Since(start); took > 500*time.Millisecond {
		t.Errorf("after the end: %v", took)
	}
}
