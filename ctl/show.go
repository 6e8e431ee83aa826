package ctl

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"sync"
	"text/tabwriter"
	"time"
	"unicode"
)

var (
	machineHeads = []string{"#", "HOST", "MACHINE", "ACTUAL"}
	serviceHeads = []string{"#", "MACHINE", "SERVICE", "HASH", "STATE", "INFO", "SINCE", "COMMITTED"}
	logHeads     = []string{"#", "MACHINE", "HASH", "WHEN", "BY", "OUTCOME"}
)

// parseAnswer returns the cells below the heads, but for a row's number and who answers. What else is in the
// answer was not asked for.
func parseAnswer(answer []byte, heads []string) (rows [][]string, err error) {
	var a struct {
		Machines
		Services
		Log
	}
	err = json.Unmarshal(answer, &a)
	isObject := bytes.HasPrefix(bytes.TrimSpace(answer), []byte("{"))
	if err == nil && !isObject {
		err = errors.New("no object")
	}
	if err != nil {
		return nil, fmt.Errorf("the answer makes no sense (%w): is that gitopper?", err)
	}

	for _, m := range a.Machines.Machines {
		rows = append(rows, []string{m.Machine, m.Actual})
	}
	for _, s := range a.Services.Services {
		if s.Pending > 0 {
			s.Hash += fmt.Sprintf(" +%d", s.Pending)
		}
		rows = append(rows, []string{s.Service, s.Hash, s.State, s.StateInfo, s.Change, s.Committed})
	}
	for _, p := range a.Pending {
		rows = append(rows, []string{fmt.Sprintf("%.8s", p.Hash), p.Date, p.Author, "pending: " + p.Subject})
	}
	if a.More > 0 {
		rows = append(rows, []string{"", "", "", fmt.Sprintf("pending: %d more", a.More)})
	}
	for _, r := range a.Ran {
		rows = append(rows, []string{fmt.Sprintf("%.8s", r.Hash), r.When, r.By, r.Outcome})
	}
	return slices.DeleteFunc(rows, func(row []string) bool { return len(row) != len(heads)-2 }), nil
}

// form is how answers are shown: one after another, or in one table.
type form int

const (
	textForm form = iota
	jsonForm
	wideTable
	narrowTable // cut to what a terminal shows
)

// report is what stdout gets in the end.
type report struct {
	heads []string // of a table
	hosts int      // that are asked: where there are several, each is named
	form  form
	table [][]string
	text  bytes.Buffer
}

// add takes in an answer.
func (r *report) add(q question, answer []byte) error {
	if r.form == textForm {
		if r.hosts > 1 {
			fmt.Fprintf(&r.text, "==> %s <==\n", q.host.name)
		}
		r.text.WriteString(clean(string(answer), "\n\t"))
		return nil
	}

	rows, err := parseAnswer(answer, r.heads)
	switch {
	case err != nil:
		return err
	case r.form == jsonForm:
		r.text.Write(formatJSON(answer, q.host.name, r.hosts))
		return nil
	case r.table == nil:
		r.table = [][]string{slices.Clone(r.heads)}
	}

	for _, cells := range rows {
		number := fmt.Sprint(len(r.table) - 1)
		r.table = append(r.table, append([]string{number, q.host.name}, cells...))
	}
	return nil
}

// print writes all that was added.
func (r *report) print(out io.Writer) error {
	for n, row := range r.table {
		for i := range row {
			row[i] = clean(row[i], "")
		}
		if r.hosts == 1 {
			r.table[n] = slices.Delete(row, 1, 2)
		}
	}

	width := anyNumber
	if r.form == narrowTable {
		width = columns
		cutTable(r.table)
	}

	var aligned strings.Builder
	w := tabwriter.NewWriter(&aligned, 0, 0, 2, ' ', 0)
	for _, row := range r.table {
		fmt.Fprintln(w, strings.Join(row, "\t"))
	}
	w.Flush()
	for line := range strings.Lines(aligned.String()) {
		r.text.WriteString(cut(strings.TrimRight(line, " \n"), width) + "\n")
	}

	_, err := out.Write(r.text.Bytes())
	return err
}

const columns = 100 // of a terminal, whatever it says of itself

// cutTable makes a table narrower: times lose the day of the week, the seconds and the zone, which is UTC,
// and INFO what does not fit.
func cutTable(table [][]string) {
	if len(table) == 0 {
		return
	}

	widths := make([]int, len(table[0]))
	for _, row := range table {
		for i, cell := range row {
			if _, err := time.Parse(time.RFC1123, cell); err == nil {
				row[i] = cell[len("Fri, "):len("Fri, 18 Nov 2022 09:14")]
			}
			widths[i] = max(widths[i], len([]rune(row[i])))
		}
	}

	info, room := slices.Index(table[0], "INFO"), columns
	if info < 0 {
		return
	}
	for i, width := range widths {
		if i != info {
			room -= width + 2
		}
	}
	for _, row := range table {
		row[info] = cut(row[info], max(room, len("INFO")))
	}
}

func cut(s string, most int) string {
	if runes := []rune(s); len(runes) > most {
		return string(runes[:most-1]) + "…"
	}
	return s
}

func isTerminal(w io.Writer) bool {
	file, _ := w.(*os.File)
	info, err := file.Stat() // an error where it is no file
	return err == nil && info.Mode()&os.ModeCharDevice != 0
}

// formatJSON returns the answer for -m: unchanged, or for one of several hosts on one line and with the
// host's name.
func formatJSON(answer []byte, host string, hosts int) []byte {
	if hosts > 1 {
		fields := map[string]json.RawMessage{}
		json.Unmarshal(answer, &fields) // can't fail, the answer has been parsed
		fields["host"], _ = json.Marshal(host)
		answer, _ = json.Marshal(fields)
	}

	// JSON may hold DEL and the C1 controls as they are, which would drive a terminal. The escaped form means
	// the same.
	var b bytes.Buffer
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

// clean makes text from afar safe to show on a terminal, on one line but for the controls in keep.
func clean(s, keep string) string {
	return strings.Map(func(r rune) rune {
		switch {
		case unicode.IsPrint(r), strings.ContainsRune(keep, r):
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
	io.WriteString(l.w, clean(line, "")+"\n")
}
