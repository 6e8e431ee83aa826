//go:build linux

package main

import (
	"context"
	"os/exec"
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
