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

// view is what an answer looks like: the heads of its table, and the cells below them. Without rows it is
// text.
type view struct {
	heads []string
	rows  func(answer []byte) ([][]string, error)
}

var (
	machineView = view{[]string{"MACHINE", "ACTUAL"}, machineRows}
	serviceView = view{[]string{"SERVICE", "HASH", "STATE", "INFO", "SINCE", "COMMITTED"}, serviceRows}
	logView     = view{[]string{"HASH", "WHEN", "BY", "OUTCOME"}, logRows}
	textView    = view{}
)

func machineRows(answer []byte) (rows [][]string, err error) {
	var a Machines
	err = parseAnswer(answer, &a)
	for _, m := range a.Machines {
		rows = append(rows, []string{m.Machine, m.Actual})
	}
	return rows, err
}

func serviceRows(answer []byte) (rows [][]string, err error) {
	var a Services
	err = parseAnswer(answer, &a)
	for _, s := range a.Services {
		if s.Pending > 0 {
			s.Hash += fmt.Sprintf(" +%d", s.Pending)
		}
		rows = append(rows, []string{s.Service, s.Hash, s.State, s.StateInfo, s.Change, s.Committed})
	}
	return rows, err
}

func logRows(answer []byte) (rows [][]string, err error) {
	var a Log
	err = parseAnswer(answer, &a)
	if a.More > 0 {
		rows = append(rows, []string{"", "", "", fmt.Sprintf("pending: %d more", a.More)})
	}
	for _, p := range a.Pending {
		rows = append(rows, []string{fmt.Sprintf("%.8s", p.Hash), p.Date, p.Author, "pending: " + p.Subject})
	}
	for _, r := range a.Ran {
		rows = append(rows, []string{fmt.Sprintf("%.8s", r.Hash), r.When, r.By, r.Outcome})
	}
	return rows, err
}

func parseAnswer(answer []byte, into any) error {
	err := json.Unmarshal(answer, into)
	isObject := bytes.HasPrefix(bytes.TrimSpace(answer), []byte("{"))
	if err == nil && !isObject {
		err = errors.New("no object")
	}
	if err != nil {
		return fmt.Errorf("the answer makes no sense (%w): is that gitopper?", err)
	}
	return nil
}

// report is what stdout gets in the end: a table, or else the answers one after another.
type report struct {
	view
	several bool // hosts: each is named
	json    bool
	cut     bool // to what a terminal shows
	table   [][]string
	text    bytes.Buffer
}

// add takes in an answer.
func (r *report) add(q question, answer []byte) error {
	if r.rows == nil {
		if r.several {
			fmt.Fprintf(&r.text, "==> %s <==\n", q.host.name)
		}
		r.text.WriteString(cleanText(string(answer)))
		return nil
	}

	rows, err := r.rows(answer)
	switch {
	case err != nil:
		return err
	case r.json:
		r.text.Write(formatJSON(answer, q.host.name, r.several))
		return nil
	case r.table == nil:
		r.table = [][]string{r.row(r.heads, "#", "MACHINE")}
		if r.heads[0] == "MACHINE" {
			r.table[0] = r.row(r.heads, "#", "HOST")
		}
	}
	for _, cells := range rows {
		r.table = append(r.table, r.row(cells, fmt.Sprint(len(r.table)-1), q.host.name))
	}
	return nil
}

// row is a row of the table: its number, the host where there are several, and the cells.
func (r *report) row(cells []string, number, host string) []string {
	if r.several {
		return slices.Concat([]string{number, host}, cells)
	}
	return slices.Concat([]string{number}, cells)
}

// print writes all that was added. On a terminal the table is cut.
func (r *report) print(out io.Writer) error {
	for _, row := range r.table {
		for i := range row {
			row[i] = clean(row[i])
		}
	}
	width := anyNumber
	if r.cut {
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
	for i, width := range widths {
		if i != info {
			room -= width + 2
		}
	}
	for _, row := range table {
		if info >= 0 {
			row[info] = cut(row[info], max(room, len("INFO")))
		}
	}
}

func cut(s string, most int) string {
	if runes := []rune(s); len(runes) > most {
		return string(runes[:most-1]) + "…"
	}
	return s
}

func isTerminal(w io.Writer) bool {
	f, isFile := w.(*os.File)
	if !isFile {
		return false
	}
	info, err := f.Stat()
	return err == nil && info.Mode()&os.ModeCharDevice != 0
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

// clean makes text from afar safe to show on a terminal, on one line.
func clean(s string) string { return strings.Map(cleanRune, s) }

func cleanRune(r rune) rune {
	switch {
	case unicode.IsPrint(r):
		return r
	case unicode.IsSpace(r):
		return ' '
	}
	return unicode.ReplacementChar
}

// cleanText is clean for text of several lines.
func cleanText(s string) string {
	return strings.Map(func(r rune) rune {
		if r == '\n' || r == '\t' {
			return r
		}
		return cleanRune(r)
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
