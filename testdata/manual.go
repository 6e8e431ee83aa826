// Manual makes gitopper's manual page out of what --help prints and of the README:
//
//	go run testdata/manual.go VERSION DATE HELP CTL-HELP README.md >gitopper.8
package main

import (
	"bufio"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"
)

// Chapters of the README that are not for the manual: the page has them already, or they are about the
// source.
var leftOut = []string{"Options", "For auditors", "How it is built"}

func main() {
	if len(os.Args) != 6 {
		fmt.Fprintln(os.Stderr, "usage: go run testdata/manual.go VERSION DATE HELP CTL-HELP README.md")
		os.Exit(2)
	}
	var texts []string
	for _, file := range os.Args[3:] {
		text, err := os.ReadFile(file)
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		texts = append(texts, string(text))
	}
	intro, chapters := readme(texts[2])
	help, options, _ := strings.Cut(texts[0], "\n\n")

	m := &manual{Writer: bufio.NewWriter(os.Stdout)}
	defer m.Flush()
	m.line(".TH GITOPPER 8 %q %q %q", os.Args[2], "gitopper "+os.Args[1], "System Administration")
	m.line(".ad l\n.nh") // words such as --dry-run are neither parted nor torn apart
	m.line(".SH NAME\ngitopper \\- %s", escape("GitOps for plain Linux hosts"))
	m.line(".SH SYNOPSIS")
	m.line(".nf")
	for line := range strings.SplitSeq(help, "\n") {
		m.line("%s", escape(strings.TrimSpace(strings.TrimPrefix(line, "usage:"))))
	}
	m.line(".fi")
	m.line(".SH DESCRIPTION")
	m.markdown(intro)
	m.line(".SH OPTIONS")
	m.help(options)
	m.line(".SH CLIENT")
	m.help(texts[1])
	for _, c := range chapters {
		m.line(".SH %s", escape(strings.ToUpper(c.title)))
		m.markdown(c.text)
	}
	m.line(".SH SEE ALSO\n.BR git (1),\n.BR ssh (1),\n.BR ssh\\-keygen (1),\n" +
		".BR systemctl (1),\n.BR systemd.service (5)")
}

type chapter struct {
	title string
	text  []string
}

// readme returns what stands in front of the first chapter, without the session, and the chapters.
func readme(text string) (intro []string, chapters []chapter) {
	isCode := false
	for line := range strings.Lines(text) {
		line = strings.TrimRight(line, "\n")
		if strings.HasPrefix(line, "```") {
			isCode = !isCode
		}
		if title, ok := strings.CutPrefix(line, "## "); ok && !isCode {
			chapters = append(chapters, chapter{title: title})
			continue
		}
		if len(chapters) > 0 {
			c := &chapters[len(chapters)-1]
			c.text = append(c.text, line)
			continue
		}
		isOther := func(start string) bool { return strings.HasPrefix(line, start) }
		notText := []string{"```", "# ", "    ", "What the first one shows"}
		if !isCode && !slices.ContainsFunc(notText, isOther) {
			intro = append(intro, line)
		}
	}
	chapters = slices.DeleteFunc(chapters, func(c chapter) bool { return slices.Contains(leftOut, c.title) })
	return intro, chapters
}

type manual struct{ *bufio.Writer }

func (m *manual) line(format string, args ...any) { fmt.Fprintf(m, format+"\n", args...) }

var (
	option = regexp.MustCompile(`^  ?( *-\S.*?)(?:   *(\S.*))?$`) // "  -h, --hosts LIST      names"
	// "  list machines @HOST...", its text below
	command = regexp.MustCompile(`^  (\S.*)$`)
)

// help shows what --help prints: options and commands with what they mean, and sentences.
func (m *manual) help(text string) {
	for paragraph := range strings.SplitSeq(text, "\n\n") {
		m.line(".PP")
		for line := range strings.Lines(paragraph) {
			line = strings.TrimRight(line, "\n")
			if o := option.FindStringSubmatch(line); o != nil {
				m.line(".TP\n.B %s", escape(strings.TrimSpace(o[1])))
				line = o[2]
			} else if c := command.FindStringSubmatch(line); c != nil {
				m.line(".TP\n.B %s", escape(c[1]))
				line = ""
			}
			if line != "" {
				m.line("%s", escape(strings.TrimSpace(line)))
			}
		}
	}
}

var (
	item   = regexp.MustCompile(`^(-|\d+\.) +(.*)$`)
	rule   = regexp.MustCompile(`^\|[ |:-]+\|$`)
	remark = regexp.MustCompile(`^<!--.*-->$`)
)

// markdown shows what the README uses of it.
func (m *manual) markdown(lines []string) {
	var heads []string // of the table that we are in
	isCode, isText := false, false
	for i := 0; i < len(lines); i++ {
		line := lines[i]
		_, indented := strings.CutPrefix(line, "    ")
		isFence := strings.HasPrefix(line, "```")
		switch {
		case isFence:
			isCode = !isCode
			m.line(map[bool]string{true: ".PP\n.in +4n\n.nf", false: ".fi\n.in"}[isCode])
			isText = false
		case isCode:
			m.line("%s", escape(line))
		case indented && !isText:
			m.line(".PP\n.in +4n\n.nf")
			for ; i < len(lines) && (lines[i] == "" || strings.HasPrefix(lines[i], "    ")); i++ {
				rest := lines[i+1:]
				isLast := len(rest) == 0 || !strings.HasPrefix(rest[0], "    ")
				if lines[i] == "" && isLast {
					break
				}
				m.line("%s", escape(strings.TrimPrefix(lines[i], "    ")))
			}
			i--
			m.line(".fi\n.in")
		case line == "":
			isText, heads = false, nil
		case remark.MatchString(line), rule.MatchString(line), strings.HasPrefix(line, "!["):
		case strings.HasPrefix(line, "### "):
			m.line(".SS %s", inline(strings.TrimPrefix(line, "### ")))
		case strings.HasPrefix(line, "|"):
			cells := cells(line)
			if heads == nil {
				heads = cells
				break
			}
			m.row(heads, cells)
		default:
			if it := item.FindStringSubmatch(line); it != nil {
				label := map[bool]string{true: "\\(bu 2", false: it[1] + " 4"}[it[1] == "-"]
				m.line(".IP %s\n%s", label, inline(it[2]))
			} else {
				if !isText {
					m.line(".PP")
				}
				m.line("%s", inline(strings.TrimSpace(line)))
			}
			isText = true
		}
	}
}

// row is a row of a table: the first cell, and below it the others, after their heads where they have some.
func (m *manual) row(heads, cells []string) {
	m.line(".TP\n%s", inline(cells[0]))
	var rest []string
	for i, cell := range cells[1:] {
		if head := heads[i+1]; cell != "" && head != "" && len(heads) > 2 {
			cell = head + ": " + cell
		}
		if cell != "" {
			rest = append(rest, cell)
		}
	}
	m.line("%s", inline(strings.Join(rest, "; ")))
}

// cells takes a table's row apart; a | in a cell is written \|.
func cells(line string) (cells []string) {
	line = strings.ReplaceAll(strings.Trim(line, "|"), `\|`, "\x00")
	for cell := range strings.SplitSeq(line, "|") {
		cells = append(cells, strings.TrimSpace(strings.ReplaceAll(cell, "\x00", "|")))
	}
	return cells
}

var (
	markup = regexp.MustCompile("`[^`]+`|\\*\\*[^*]+\\*\\*|\\[[^]]+\\]\\([^)]+\\)")
	link   = regexp.MustCompile(`^\[([^]]+)\]\(([^)]+)\)$`)
)

// inline shows `code` and **strong** words in bold, and a [link](address) with its address.
func inline(text string) string {
	var b strings.Builder
	last := 0
	for _, at := range markup.FindAllStringIndex(text, -1) {
		b.WriteString(escape(text[last:at[0]]))
		marked := text[at[0]:at[1]]
		if l := link.FindStringSubmatch(marked); l != nil {
			b.WriteString(escape(l[1] + " (" + l[2] + ")"))
		} else {
			b.WriteString(`\fB` + escape(strings.Trim(marked, "`*")) + `\fR`)
		}
		last = at[1]
	}
	b.WriteString(escape(text[last:]))
	if s := b.String(); !strings.HasPrefix(s, ".") && !strings.HasPrefix(s, "'") {
		return s
	}
	return `\&` + b.String()
}

// escape writes text as roff has it, so that each character is shown as it is.
func escape(text string) string {
	var b strings.Builder
	for i, r := range text {
		switch {
		case r == '\\':
			b.WriteString(`\e`)
		case r == '-':
			b.WriteString(`\-`)
		case r == '\'':
			b.WriteString(`\(aq`)
		case r == '`':
			b.WriteString(`\(ga`)
		case r == '^':
			b.WriteString(`\(ha`)
		case r == '~':
			b.WriteString(`\(ti`)
		case r == ',':
			b.WriteString(`,\:`) // a line may end there
		case r == '.' && i == 0:
			b.WriteString(`\&.`)
		case r > 0x7e:
			fmt.Fprintf(&b, `\[u%04X]`, r)
		default:
			b.WriteRune(r)
		}
	}
	return b.String()
}
