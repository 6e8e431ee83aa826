//go:build linux

package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"image"
	"image/color/palette"
	"image/draw"
	"image/png"
	"io"
	"log/slog"
	"math"
	"net"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// testMonitor is what the HTTP interface tells of services.
func testMonitor(services []*Service) monitor {
	a := &agent{}
	a.services.Store(&services)
	return monitor{"web1", func() []*Service { return services }, a.configRight, a.summary, time.Now()}
}

// testPage is the page of services.
func testPage(t *testing.T, services ...*Service) string {
	t.Helper()
	var page strings.Builder
	testMonitor(services).writePage(&page, time.Now())
	return page.String()
}

func TestPage(t *testing.T) {
	when := time.Date(2026, 11, 18, 10, 14, 52, 0, time.FixedZone("CET", 3600))
	of := func(name string, st state) Status {
		return Status{Service: name, State: st.String(), state: st, Change: when, LastLook: time.Now(),
			Commit: "606eb576bfeea4bcb8d6d6e2d5e5b1d7a1e2a3b4"}
	}
	fine, frozen := of("a", stateOK), of("b", stateFreeze)
	broken, fresh := of("c", stateBroken), of("d", stateDiff)
	frozen.Pending = 3
	broken.Public, broken.Info = "check refused it", "check refused it: password = 1234"
	fresh.Change, fresh.LastLook, fresh.Commit = time.Time{}, time.Time{}, ""
	got := testPage(t,
		statusService(fine), statusService(frozen), statusService(broken), statusService(fresh))

	row := func(name, state, commit, pending, since, look, info string) string {
		return `<tr role="row">
<th role="rowheader" scope="row" class="name">` + name + `</th>
<td role="cell"><span class="state ` + state + `">` + state + `</span></td>
<td role="cell"><code>` + commit + `</code></td>
<td role="cell" data-name="pending">` + pending + `</td>
<td role="cell" data-name="since"><time>` + since + `</time></td>
<td role="cell" data-name="looked">` + look + `</td>
<td role="cell" class="words">` + info + "</td>\n</tr>\n"
	}
	// Trouble comes first.
	want := row("d", "DIFF", "", "", "", "never", "") +
		row("c", "BROKEN", "606eb576", "", "2026-11-18 09:14:52Z", "0 s ago", "check refused it") +
		row("b", "FREEZE", "606eb576", "+3", "2026-11-18 09:14:52Z", "0 s ago", "") +
		row("a", "OK", "606eb576", "", "2026-11-18 09:14:52Z", "0 s ago", "")
	if _, rest, _ := strings.Cut(got, `<tbody role="rowgroup">`+"\n"); !strings.HasPrefix(rest, want) {
		t.Errorf("%s\nwant in it:\n%s", got, want)
	}
	for _, want := range []string{"<title>web1: 4 services, 2 in trouble: c d</title>", "Config: right",
		`<a href="metrics">`, `<a href="healthz">`, `<meta http-equiv="refresh" content="30">`} {
		if !strings.Contains(got, want) {
			t.Errorf("%s is not in it", want)
		}
	}
	if strings.Contains(got, "1234") {
		t.Error("it tells everybody what is private")
	}
	fresh.Refused = "config"
	got = testPage(t, statusService(fresh))
	if !strings.Contains(got, "a newer config or key file is wrong") {
		t.Errorf("with a wrong config upstream: %s", got)
	}
}

// hostileWords are what a user, an author or an upstream may have put into what is shown.
const hostileWords = `</td></table><script>alert(1)</script><img src=x onerror='alert(1)'>"&amp;` +
	"`\x02\x03\u2028"

// Nothing that others wrote is taken for HTML.
func TestPageEscapes(t *testing.T) {
	hostile := statusService(Status{Service: hostileWords, Commit: hostileWords, Public: hostileWords,
		Upstream: hostileWords, Branch: hostileWords, State: "DIFF", state: stateDiff})
	count.note(hostileWords, hostileWords)
	got := testPage(t, hostile)
	if n := strings.Count(got, "&lt;script&gt;"); n < 4 {
		t.Errorf("%d times in it, escaped", n)
	}
	for _, tag := range []string{"<script", "<img", "</td></table>"} {
		if strings.Contains(got, tag) {
			t.Errorf("%s is in it: %s", tag, got)
		}
	}
}

// The last twenty changes are on the page, the newest first, without private words.
func TestPageEvents(t *testing.T) {
	w := okWorld(t)
	for i := range maxEvents {
		text := fmt.Sprintf("event %d https://ann:secret@example.org", i)
		w.s.event(slog.LevelInfo, text+quote(": secret"))
	}
	w.commit("etc/app.conf", "two\n")
	w.reconcile()
	w.write("local/etc/app.conf", "edited\n")
	w.reconcile()
	if err := w.s.operate(t.Context(), op{verb: "freeze", who: "ann", reason: "a look"}); err != nil {
		t.Fatal(err)
	}

	page := testPage(t)
	_, events, _ := strings.Cut(page, "Last events")
	if strings.Contains(events, "secret") || !strings.Contains(page, "none for this host") {
		t.Error(page)
	}
	cell := regexp.MustCompile(`<td role="cell" class="words">([^<]+)`)
	var got []string
	for _, m := range cell.FindAllStringSubmatch(events, -1) {
		got = append(got, m[1])
	}
	want := []string{"OK -&gt; FREEZE ann: a look", "freeze by ann", "local edits undone", w.head()[:8] + " is live"}
	for i := range maxEvents - len(want) {
		want = append(want, redact(fmt.Sprintf("event %d https://ann:secret@example.org", maxEvents-1-i)))
	}
	if !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
}

var stateColour = regexp.MustCompile(`(?m)^\.([A-Z]+) { background: (#[0-9a-f]{6}); }$`)

// contrast is the contrast ratio of two colours. See WCAG 2.2, "contrast ratio" and "relative luminance".
func contrast(a, b [3]float64) float64 {
	luminance := func(c [3]float64) (sum float64) {
		for i, weight := range []float64{0.2126, 0.7152, 0.0722} {
			v := c[i] / 255
			if v <= 0.04045 {
				v /= 12.92
			} else {
				v = math.Pow((v+0.055)/1.055, 2.4)
			}
			sum += weight * v
		}
		return sum
	}
	la, lb := luminance(a), luminance(b)
	return (max(la, lb) + 0.05) / (min(la, lb) + 0.05)
}

// The states' words can be read on their colours.
func TestPageContrast(t *testing.T) {
	if !strings.Contains(pageText, ".state { border-radius: .25rem; color: #fff;") {
		t.Error("the words are not white")
	}
	var found []string
	for _, m := range stateColour.FindAllStringSubmatch(pageText, -1) {
		var c [3]float64
		found = append(found, m[1])
		for i := range c {
			n, err := strconv.ParseUint(m[2][1+2*i:3+2*i], 16, 8)
			if err != nil {
				t.Fatal(err)
			}
			c[i] = float64(n)
		}
		ratio := contrast(c, [3]float64{255, 255, 255})
		t.Logf("%s: %.1f", m[1], ratio)
		if ratio < 4.5 {
			t.Errorf("%s: contrast %.2f, want 4.5", m[1], ratio)
		}
	}
	if !slices.Equal(found, stateNames) {
		t.Errorf("colours of %q, want those of %q", found, stateNames)
	}
}

// pictured are services in each state, as the pictures in the README show them.
func pictured() []*Service {
	now := time.Now()
	look := now.Add(-40 * time.Second)
	row := func(name string, st state, commit string, since time.Duration, pending int,
		info string) *Service {
		return statusService(Status{Service: name, State: st.String(), state: st, Commit: commit,
			Change: now.Add(-since), LastLook: look, waiting: waiting{Pending: pending}, Public: info})
	}
	const hour, newest = time.Hour, "606eb576bfeea4bc"
	return []*Service{
		row("prometheus", stateOK, newest, 26*hour, 0, ""),
		row("nginx", stateFreeze, "4f0717cce1d5a3b4", 3*hour, 2,
			"operator (ann@192.0.2.7): looking at a slow page, until Thu, 26 Nov 2026 23:54:06 UTC"),
		row("sshd", stateOK, newest, 400*hour, 0, ""),
		row("grafana-server", stateRollback, "3474bda2c0ffee12", 2*time.Second, 0,
			"ROLLBACK: 3474bda2, operator (ann@192.0.2.7)"),
		row("named", stateDiff, newest, 12*time.Minute, 1, "commit efc425ed: check refused it"),
		row("postfix@out", stateBroken, newest, 5*time.Minute, 0,
			"unit postfix@out.service is failed (failed, exit-code, main process ended with status 1)"),
		row("node-exporter", stateOK, newest, 26*hour, 0, ""),
	}
}

// pageWidths are those of a desk and of a telephone, and how much of the page the README shows.
var pageWidths = map[int]int{1280: 720, 400: 900}

// The page in a real browser: it fits, its style is let in, its states can be read, and a screen reader finds
// its tables, also where they are no longer laid out as such. What is hostile is text. testdata/test --all
// installs the browser.
func TestPageInChromium(t *testing.T) {
	if os.Getenv("GITOPPER_TEST_ALL") == "" {
		return
	}
	count.events = nil // of other tests
	count.note("grafana-server", "FREEZE -> ROLLBACK ROLLBACK: 3474bda2, operator (ann@192.0.2.7)")
	count.note("postfix@out", "OK -> BROKEN unit postfix@out.service is failed (failed, exit-code)")
	count.note("named", "local edits undone")
	b := startBrowser(t)
	for width, height := range pageWidths {
		t.Run(fmt.Sprint("width=", width), func(t *testing.T) {
			b.open(servedPage(t, pictured()), width, height)
			b.wellShown(t, len(pictured()), width)
			if *update {
				name := fmt.Sprintf("testdata/page-%d.png", width)
				if err := os.WriteFile(name, b.picture(), 0o644); err != nil {
					t.Fatal(err)
				}
			}

			hostile := statusService(Status{Service: hostileWords, State: "DIFF", state: stateDiff,
				Commit: hostileWords, Public: strings.Repeat(hostileWords, 20) + strings.Repeat("x", 5000)})
			b.open(servedPage(t, append(pictured(), hostile)), width, height)
			b.wellShown(t, len(pictured())+1, width)
		})
	}
}

// servedPage returns the address of the page of services.
func servedPage(t *testing.T, services []*Service) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() { testMonitor(services).serve(ctx, l); close(ended) }()
	t.Cleanup(func() { cancel(); <-ended })
	return "http://" + l.Addr().String() + "/"
}

// browser is a Chromium without a window, and a page in it. It is spoken to through two pipes. See
// chromedevtools.github.io/devtools-protocol.
type browser struct {
	t       *testing.T
	to      io.Writer
	from    *bufio.Reader
	id      int
	session string
}

func startBrowser(t *testing.T) *browser {
	t.Helper()
	itsIn, to, err1 := os.Pipe()
	from, itsOut, err2 := os.Pipe()
	if err := errors.Join(err1, err2); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("chromium", "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
		"--no-proxy-server", "--force-color-profile=srgb", "--remote-debugging-pipe",
		"--user-data-dir="+t.TempDir())
	cmd.ExtraFiles = []*os.File{itsIn, itsOut} // its descriptors 3 and 4
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		t.Fatalf("%v: testdata/test --all installs it", err)
	}
	itsIn.Close()
	itsOut.Close()
	t.Cleanup(func() {
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
		_ = cmd.Wait()
		to.Close()
		from.Close()
	})

	b := &browser{t: t, to: to, from: bufio.NewReaderSize(from, 1<<20)}
	var target struct{ TargetID string }
	b.call("Target.createTarget", map[string]any{"url": "about:blank"}, &target)
	var attached struct{ SessionID string }
	b.call("Target.attachToTarget", map[string]any{"targetId": target.TargetID, "flatten": true}, &attached)
	b.session = attached.SessionID
	return b
}

// call has the browser do something, and reads its answer. All messages end with a zero byte.
func (b *browser) call(method string, params map[string]any, answer any) {
	b.t.Helper()
	b.id++
	request := map[string]any{"id": b.id, "method": method, "params": params}
	if b.session != "" {
		request["sessionId"] = b.session
	}
	data, err := json.Marshal(request)
	if err == nil {
		_, err = b.to.Write(append(data, 0))
	}
	for err == nil {
		data, err = b.from.ReadBytes(0)
		var m struct {
			ID            int
			Result, Error json.RawMessage
		}
		if err == nil {
			err = json.Unmarshal(bytes.TrimSuffix(data, []byte{0}), &m)
		}
		if err != nil || m.ID != b.id { // what it tells unasked
			continue
		}
		if m.Error != nil {
			b.t.Fatalf("chromium: %s: %s", method, m.Error)
		}
		if err = json.Unmarshal(m.Result, answer); err == nil {
			return
		}
	}
	b.t.Fatalf("chromium: %s: %v", method, err)
}

// ask evaluates an expression of JavaScript in the page.
func (b *browser) ask(expression string, answer any) {
	b.t.Helper()
	var got struct {
		Result           struct{ Value json.RawMessage }
		ExceptionDetails json.RawMessage
	}
	b.call("Runtime.evaluate", map[string]any{"expression": expression, "returnByValue": true}, &got)
	if got.ExceptionDetails != nil {
		b.t.Fatalf("chromium: %s: %s", expression, got.ExceptionDetails)
	}
	if err := json.Unmarshal(got.Result.Value, answer); err != nil {
		b.t.Fatalf("chromium: %s: %v: %s", expression, err, got.Result.Value)
	}
}

// open shows an address in a window of that size, in CSS pixels.
func (b *browser) open(url string, width, height int) {
	b.t.Helper()
	none := &struct{}{}
	b.call("Emulation.setScrollbarsHidden", map[string]any{"hidden": true}, none)
	b.call("Emulation.setDeviceMetricsOverride", map[string]any{"width": width, "height": height,
		"deviceScaleFactor": 1, "mobile": width < 600}, none)
	b.call("Page.navigate", map[string]any{"url": url}, none)
	eventually(b.t, url+" is shown", func() (shown bool) {
		b.ask(fmt.Sprintf("location.href == %q && document.readyState == 'complete'", url), &shown)
		return shown
	})
}

// wellShown judges the page that is open, of so many services.
func (b *browser) wellShown(t *testing.T, services, width int) {
	t.Helper()
	var page struct {
		Title                         string
		Width, Scripts, Images, Badly int
		States                        []struct{ Word, Text, Back string }
	}
	b.ask(`({
		title: document.title,
		width: document.documentElement.scrollWidth,
		scripts: document.querySelectorAll("script, [onerror]").length,
		images: document.images.length,
		badly: [...document.querySelectorAll("main *")].filter(
			e => e.getBoundingClientRect().right > innerWidth + 1).length,
		states: [...document.querySelectorAll(".state")].map(e => ({word: e.innerText,
			text: getComputedStyle(e).color, back: getComputedStyle(e).backgroundColor})),
	})`, &page)
	if page.Width > width || page.Badly > 0 {
		t.Errorf("%d pixels wide, %d elements beyond the edge: it scrolls sideways", page.Width, page.Badly)
	}
	if page.Scripts+page.Images > 0 || !strings.HasPrefix(page.Title, "web1: ") {
		t.Errorf("%d scripts, %d images, title %q", page.Scripts, page.Images, page.Title)
	}
	if len(page.States) != services {
		t.Fatalf("%d states of %d services", len(page.States), services)
	}
	for _, s := range page.States {
		if ratio := contrast(rgb(t, s.Text), rgb(t, s.Back)); ratio < 4.5 {
			t.Errorf("%s: contrast %.2f of %s on %s, want 4.5", s.Word, ratio, s.Text, s.Back)
		}
	}

	// What a screen reader is told.
	var tree struct {
		Nodes []struct {
			Ignored bool
			Role    struct{ Value string }
			Name    struct{ Value string }
		}
	}
	b.call("Accessibility.getFullAXTree", map[string]any{}, &tree)
	found := map[string]int{}
	for _, n := range tree.Nodes {
		if !n.Ignored {
			found[n.Role.Value]++
			found[n.Role.Value+" "+n.Name.Value]++
		}
	}
	for what, want := range map[string]int{"main": 1, "heading web1": 1,
		"table Services": 1, "table Last events": 1, "columnheader State": 1, "columnheader Info": 1, "link Metrics": 1, "rowheader prometheus": 1,
		"row": services + len(count.lastEvents()) + 2} {
		if found[what] != want {
			t.Errorf("a screen reader finds %d times %q, want %d: %v", found[what], what, want, found)
		}
	}
}

// rgb reads a colour as the browser computes it: rgb(26, 127, 55).
func rgb(t *testing.T, colour string) (c [3]float64) {
	t.Helper()
	if _, err := fmt.Sscanf(colour, "rgb(%g, %g, %g)", &c[0], &c[1], &c[2]); err != nil {
		t.Fatalf("%s: %v", colour, err)
	}
	return c
}

// picture is a PNG of the page that is open, in a few colours.
func (b *browser) picture() []byte {
	b.t.Helper()
	var shot struct{ Data []byte }
	b.call("Page.captureScreenshot", map[string]any{"format": "png"}, &shot)
	full, err := png.Decode(bytes.NewReader(shot.Data))
	if err != nil {
		b.t.Fatal(err)
	}
	small := image.NewPaletted(full.Bounds(), palette.Plan9)
	draw.Draw(small, small.Bounds(), full, image.Point{}, draw.Src)
	var out bytes.Buffer
	if err := (&png.Encoder{CompressionLevel: png.BestCompression}).Encode(&out, small); err != nil {
		b.t.Fatal(err)
	}
	return out.Bytes()
}
