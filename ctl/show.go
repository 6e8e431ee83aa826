package ctl

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"text/tabwriter"
	"unicode"
)

// show prints the outcomes in the order of the command line.
func show(ctx context.Context, hosts []host, outcomes []chan outcome, cmd command, asJSON bool,
	stdout io.Writer, stderr *lines) error {
	several := len(hosts) > 1
	table := [][]string{cmd.heads(several)}
	answered, unanswered, failed := 0, 0, false

	for i, h := range hosts {
		o := <-outcomes[i]
		rows, err := parseAnswer(cmd, o.answer)
		if err == nil { // a /do/ that failed may have an answer as well
			answered++
			for _, row := range rows {
				if several {
					row = slices.Insert(row, 0, h.name)
				}
				table = append(table, slices.Insert(row, 0, fmt.Sprint(len(table)-1)))
			}
			if asJSON {
				if _, err := stdout.Write(formatJSON(o.answer, h.name, several)); err != nil {
					return err
				}
			}
		}

		switch err = cmp.Or(o.err, err); {
		case err != nil && ctx.Err() != nil:
			unanswered++
		case err != nil:
			failed = true
			stderr.print("gitopper ctl: " + h.name + ": " + err.Error())
		}
	}

	if answered > 0 && !asJSON {
		if err := writeTable(stdout, table); err != nil {
			return err
		}
	}
	if unanswered > 0 {
		return fmt.Errorf("interrupted: no answer from %d of %d hosts; list service shows how things stand",
			unanswered, len(hosts))
	}
	if failed {
		return errTold
	}
	return nil
}

func writeTable(out io.Writer, table [][]string) error {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	for _, row := range table {
		for i := range row {
			row[i] = clean(row[i])
		}
		fmt.Fprintln(w, strings.Join(row, "\t"))
	}
	return w.Flush()
}

func (c command) heads(several bool) []string {
	heads, who := []string{"#", "SERVICE", "HASH", "STATE", "INFO", "SINCE"}, "MACHINE"
	if c.path == "/list/machine" {
		heads, who = []string{"#", "MACHINE", "ACTUAL"}, "HOST"
	}
	if several {
		heads = slices.Insert(heads, 1, who)
	}
	return heads
}

// parseAnswer returns the cells of the table's rows.
func parseAnswer(cmd command, answer []byte) ([][]string, error) {
	var a struct {
		Machines []Machine `json:"machines"`
		Services []Service `json:"services"`
	}
	err := json.Unmarshal(answer, &a)
	if err == nil && !bytes.HasPrefix(bytes.TrimSpace(answer), []byte("{")) {
		err = errors.New("no object")
	}
	if err != nil {
		return nil, fmt.Errorf("the answer makes no sense (%w): is that gitopper?", err)
	}

	var rows [][]string
	if cmd.path == "/list/machine" {
		for _, m := range a.Machines {
			rows = append(rows, []string{m.Machine, m.Actual})
		}
		return rows, nil
	}
	for _, s := range a.Services {
		rows = append(rows, []string{s.Service, s.Hash, s.State, s.StateInfo, s.Change})
	}
	return rows, nil
}

// formatJSON returns the answer for -m: unchanged, or for one of several hosts on one line and with the
// host's name.
func formatJSON(answer []byte, host string, several bool) []byte {
	var b bytes.Buffer
	if several {
		json.Compact(&b, answer) // can't fail, the answer has been parsed
		name, _ := json.Marshal(host)
		rest := b.Bytes()[1:]
		if rest[0] != '}' {
			name = append(name, ',')
		}
		answer = slices.Concat([]byte(`{"host":`), name, rest)
		b.Reset()
	}

	// JSON may hold DEL and the C1 controls as they are, which would drive a terminal. The escaped form means
	// the same.
	for _, r := range string(bytes.TrimRight(answer, "\n")) {
		if r >= 0x7f && r <= 0xffff && !unicode.IsPrint(r) {
			fmt.Fprintf(&b, `\u%04x`, r)
		} else {
			b.WriteRune(r)
		}
	}
	b.WriteByte('\n')
	return b.Bytes()
}

// clean makes text from afar safe to show on a terminal.
func clean(s string) string {
	return strings.Map(func(r rune) rune {
		switch {
		case unicode.IsPrint(r):
			return r
		case unicode.IsSpace(r):
			return ' '
		}
		return unicode.ReplacementChar
	}, s)
}

// lines writes whole lines, each with a single Write, for many goroutines.
type lines struct {
	mu sync.Mutex
	w  io.Writer
}

func (l *lines) print(line string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	io.WriteString(l.w, clean(line)+"\n")
}
