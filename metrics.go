//go:build linux

package main

import (
	"bufio"
	"cmp"
	"context"
	"crypto/sha256"
	_ "embed"
	"encoding/base64"
	"errors"
	"fmt"
	"html"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"gitopper/ctl"
)

// counters are sums by metric name and label set, and the last events. They may be used from everywhere.
type counters struct {
	mu     sync.Mutex
	sums   map[string][]sample // in the order of their labels
	events []event             // the newest last, maxEvents at most
}

// sample is the value of a metric for one label set, "" for none.
type sample struct {
	labels string
	value  float64
}

// event is a change on this host, as everybody may know it.
type event struct{ At, Service, Text string }

const maxEvents = 20

// count holds all counters of the process.
var count = &counters{sums: map[string][]sample{}}

func (c *counters) add(name, labels string) { c.addFloat(name, labels, 1) }

// addFloat adds v to a counter; a v of 0 makes it be there, so that its first increase is seen as one.
func (c *counters) addFloat(name, labels string, v float64) {
	c.mu.Lock()
	defer c.mu.Unlock()

	all := c.sums[name]
	byLabels := func(s sample, labels string) int { return cmp.Compare(s.labels, labels) }
	i, isThere := slices.BinarySearchFunc(all, labels, byLabels)
	if !isThere {
		all = slices.Insert(all, i, sample{labels: labels})
		c.sums[name] = all
	}
	all[i].value += v
}

// note remembers an event for the page, without its private words.
func (c *counters) note(service, text string) {
	c.mu.Lock()
	defer c.mu.Unlock()

	c.events = append(c.events, event{pageTime(time.Now()), service, strings.TrimSpace(redact(public(text)))})
	c.events = slices.Clone(c.events[max(0, len(c.events)-maxEvents):])
}

// lastEvents returns what was noted, the newest first.
func (c *counters) lastEvents() []event {
	c.mu.Lock()
	defer c.mu.Unlock()

	last := slices.Clone(c.events)
	slices.Reverse(last)
	return last
}

// samples returns what a counter stands at.
func (c *counters) samples(name string) []sample {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.sums[name])
}

var escapeLabel = strings.NewReplacer(`\`, `\\`, `"`, `\"`, "\n", `\n`)

// labels builds a label set from names and values.
func labels(kv ...string) string {
	var set []byte
	for pair := range slices.Chunk(kv, 2) {
		set = append(append(append(set, ','), pair[0]...), `="`...)
		set = append(append(set, escapeLabel.Replace(pair[1])...), '"')
	}
	return string(set[1:])
}

// startCounters makes every counter of a service present from the start.
func startCounters(services []*Service) {
	count.addFloat("gitopper_machine_git_ops_total", "", 0)
	count.addFloat("gitopper_machine_git_errors_total", "", 0)

	for _, s := range services {
		count.addFloat("gitopper_service_drift_total", labels("service", s.service), 0)
		for _, reason := range []string{"link", "signers", "check", "fallback", "config"} {
			l := labels("service", s.service, "reason", reason)
			count.addFloat("gitopper_service_refused_total", l, 0)
		}
		for _, result := range []string{"ok", "failed"} {
			l := labels("service", s.service, "result", result)
			count.addFloat("gitopper_service_actions_total", l, 0)
			count.addFloat("gitopper_service_action_seconds_total", l, 0)
		}
	}
}

// metric is one family of the exposition: its name, type and help, and for gauges the samples.
type metric struct {
	name, kind, help string
	samples          []sample
}

// writeMetrics writes the Prometheus text format, version 0.0.4.
// See prometheus.io/docs/instrumenting/exposition_formats.
func writeMetrics(w io.Writer, services []*Service, configOK bool, started time.Time) {
	out := bufio.NewWriterSize(w, 32<<10)
	defer out.Flush()
	for _, m := range slices.Concat(serviceMetrics(services), processMetrics(configOK, started)) {
		if m.kind == "counter" && m.samples == nil {
			m.samples = count.samples(m.name)
		}
		fmt.Fprintf(out, "# HELP %s %s\n# TYPE %[1]s %[3]s\n", m.name, m.help, m.kind)
		for _, s := range m.samples {
			line := append(out.AvailableBuffer(), m.name...)
			if s.labels != "" {
				line = append(append(append(line, '{'), s.labels...), '}')
			}
			line = strconv.AppendFloat(append(line, ' '), s.value, 'f', -1, 64)
			_, _ = out.Write(append(line, '\n'))
		}
	}
}

func serviceMetrics(services []*Service) []metric {
	byName := func(a, b *Service) int { return cmp.Compare(a.service, b.service) }
	services = slices.SortedFunc(slices.Values(services), byName)

	info, names := make([]sample, len(services)), make([]string, len(services))
	statuses := make([]*Status, len(services)) // read once, so that all families tell of the same moment
	shown := map[string]string{}               // upstreams without passwords
	for i, s := range services {
		st := s.Status()
		statuses[i], names[i] = st, labels("service", s.service)
		if shown[st.Upstream] == "" {
			shown[st.Upstream] = labels("upstream", redact(st.Upstream))
		}
		what := labels("service", s.service, "hash", st.Commit[:min(8, len(st.Commit))], "branch", st.Branch)
		info[i] = sample{what + "," + shown[st.Upstream], 1}
	}

	each := func(value func(st *Status) float64) []sample {
		samples := make([]sample, len(services))
		for i, st := range statuses {
			samples[i] = sample{names[i], value(st)}
		}
		return samples
	}

	return []metric{
		{"gitopper_service_state", "gauge",
			"State of the service: 0 OK, 1 FREEZE, 2 ROLLBACK, 3 BROKEN, 4 DIFF.",
			each(func(st *Status) float64 { return float64(st.state) })},
		{"gitopper_service_change_time_seconds", "gauge", "When the state last changed, Unix time.",
			each(func(st *Status) float64 { return seconds(st.Change) })},
		{"gitopper_service_info", "gauge", "Which commit of which branch and upstream runs.", info},
		{"gitopper_service_committed_seconds", "gauge",
			"When what runs was committed, Unix time; 0 where it is not known.",
			each(func(st *Status) float64 { return seconds(st.Committed) })},
		{"gitopper_service_in_sync", "gauge", "Whether what runs is upstream's newest commit.",
			each(func(st *Status) float64 { return truth(st.InSync) })},
		{"gitopper_service_out_of_sync_since_seconds", "gauge",
			"Since when it is not, Unix time; 0 while it is.",
			each(func(st *Status) float64 { return seconds(st.OutOfSync) })},
		{"gitopper_service_last_look_seconds", "gauge", "Last successful look at upstream, Unix time.",
			each(func(st *Status) float64 { return seconds(st.LastLook) })},
		{"gitopper_service_drift_total", "counter", "Local edits undone.", nil},
		{"gitopper_service_refused_total", "counter", "Commits refused or taken back.", nil},
		{"gitopper_service_actions_total", "counter", "Actions on the unit.", nil},
		{"gitopper_service_action_seconds_total", "counter", "Time taken by actions on the unit.", nil},
	}
}

func processMetrics(configOK bool, started time.Time) []metric {
	rss, cpu, fds := process()
	version, goVersion := ctl.Version()
	build := labels("version", version, "goversion", goVersion)
	one := func(v float64) []sample { return []sample{{"", v}} }

	return []metric{
		{"gitopper_machine_git_errors_total", "counter", "Runs of git that failed.", nil},
		{"gitopper_machine_git_ops_total", "counter", "Runs of git.", nil},
		{"gitopper_config_ok", "gauge", "0 while a newer config or key file is wrong.", one(truth(configOK))},
		{"gitopper_build_info", "gauge", "Version of gitopper and of Go.", []sample{{build, 1}}},
		{"process_start_time_seconds", "gauge", "Start of the process, Unix time.", one(seconds(started))},
		{"process_resident_memory_bytes", "gauge", "Resident memory.", one(rss)},
		{"process_cpu_seconds_total", "counter", "User and system CPU time.", one(cpu)},
		{"process_open_fds", "gauge", "Open file descriptors.", one(fds)},
	}
}

// seconds is a Unix time; 0 for the zero time.
func seconds(t time.Time) float64 {
	if t.IsZero() {
		return 0
	}
	return float64(t.UnixMilli()) / 1000
}

func truth(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

// process reads what proc_pid_statm(5), getrusage(2) and /proc/self/fd say of us.
func process() (rss, cpu, fds float64) {
	data, _ := os.ReadFile("/proc/self/statm")
	if f := strings.Fields(string(data)); len(f) > 1 { // size resident shared text lib data dt, in pages
		pages, _ := strconv.ParseFloat(f[1], 64)
		rss = pages * float64(os.Getpagesize())
	}

	var ru syscall.Rusage
	if syscall.Getrusage(syscall.RUSAGE_SELF, &ru) == nil {
		cpu = float64(ru.Utime.Nano()+ru.Stime.Nano()) / 1e9
	}

	if d, err := os.ReadDir("/proc/self/fd"); err == nil {
		fds = float64(len(d) - 1) // one of them is for reading this
	}
	return rss, cpu, fds
}

// healthy names the services whose loop does not turn any more, although its limits would have had it turn by
// now.
func healthy(services []*Service) (stuck []string) {
	now := time.Now()
	for _, s := range services {
		if s.stuck(now) {
			stuck = append(stuck, s.service)
		}
	}
	return stuck
}

// monitor is what the HTTP interface tells of this host.
type monitor struct {
	host     string
	services func() []*Service
	configOK func() bool
	summary  func() string
	started  time.Time
}

// serve answers /metrics, /healthz and / on l until ctx is done. Connections are few and short, whoever makes
// them.
func (m monitor) serve(ctx context.Context, l net.Listener) {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /metrics", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
		writeMetrics(w, m.services(), m.configOK(), m.started)
	})
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) {
		if stuck := healthy(m.services()); len(stuck) > 0 {
			http.Error(w, "stuck: "+someOf(stuck), http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(w, "ok")
	})
	mux.HandleFunc("GET /{$}", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/html; charset=utf-8")
		m.writePage(w, time.Now())
	})

	server := &http.Server{
		Handler:     hardened(mux),
		ReadTimeout: 2 * time.Second, WriteTimeout: 10 * time.Second, MaxHeaderBytes: 8 << 10,
		ConnState: closeOldest(64), ErrorLog: slog.NewLogLogger(slog.Default().Handler(), slog.LevelDebug),
	}

	server.SetKeepAlivesEnabled(false)
	defer context.AfterFunc(ctx, func() { _ = server.Close() })()
	if err := server.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		slog.Error(fmt.Sprintf("metrics: %v", err))
	}
}

// hardened has browsers run, load and guess nothing of what they get, keep no copy of it, and show it in
// nobody else's page.
func hardened(h http.Handler) http.Handler {
	// The page's own style is let through by its hash. See www.w3.org/TR/CSP3.
	_, style, _ := strings.Cut(pageText, "<style>")
	style, _, _ = strings.Cut(style, "</style>")
	sum := sha256.Sum256([]byte(style))
	policy := "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; " +
		"style-src 'sha256-" + base64.StdEncoding.EncodeToString(sum[:]) + "'"

	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Security-Policy", policy)
		w.Header().Set("X-Content-Type-Options", "nosniff")
		w.Header().Set("Referrer-Policy", "no-referrer")
		w.Header().Set("Cache-Control", "no-store")
		h.ServeHTTP(w, r)
	})
}

// alertRules are for Prometheus, dashboard is for Grafana.
var (
	//go:embed testdata/alerts.yml
	alertRules string
	//go:embed testdata/dashboard.json
	dashboard string
)

//go:embed testdata/page.html
var pageText string

// What the page shows of a service, and of an event, in the order of columns: what stands around the cells.
var (
	serviceRow = strings.Split(`<tr role="row">
<th role="rowheader" scope="row" class="name">%s</th>
<td role="cell"><span class="state %s">%s</span></td>
<td role="cell"><code>%s</code></td>
<td role="cell" data-name="pending">%s</td>
<td role="cell" data-name="since"><time>%s</time></td>
<td role="cell" data-name="looked">%s</td>
<td role="cell" class="words">%s</td>
</tr>
`, "%s")
	eventRow = strings.Split(`<tr role="row">
<td role="cell"><time>%s</time></td>
<th role="rowheader" scope="row" class="name">%s</th>
<td role="cell" class="words">%s</td>
</tr>
`, "%s")
	emptyRow = strings.Split(`<tr role="row">
<td role="cell" class="words">%s</td>
</tr>
`, "%s")
)

const configWrong = `<strong>a newer config or key file is wrong,
see the log; the one that was last right is used</strong>`

// pageWriter writes the page, piece by piece.
type pageWriter struct{ *bufio.Writer }

// words writes words, whoever wrote them: none of them is read as HTML.
func (w pageWriter) words(s string) { _, _ = w.WriteString(html.EscapeString(s)) }

// row writes a row of a table, whose cells are words.
func (w pageWriter) row(around []string, cells ...string) {
	for i, part := range around {
		if i > 0 {
			w.words(cells[i-1])
		}
		_, _ = w.WriteString(part)
	}
}

// writePage writes the page for people: what is in trouble comes first. It tells no more of a service than a
// key that may only look would be told.
func (m monitor) writePage(to io.Writer, now time.Time) {
	w := pageWriter{bufio.NewWriterSize(to, 32<<10)}
	defer w.Flush()
	version, _ := ctl.Version()

	config := configWrong
	if m.configOK() {
		config = "right"
	}
	summary := m.summary()

	text, rest, more := strings.Cut(pageText, "{{")
	_, _ = w.WriteString(text)
	for more {
		var name string
		name, rest, _ = strings.Cut(rest, "}}")
		switch name {
		case "host":
			w.words(m.host)
		case "summary":
			w.words(summary)
		case "config":
			_, _ = w.WriteString(config)
		case "version":
			w.words(version)
		case "now":
			w.words(pageTime(now))
		case "services":
			m.writeServices(w, now)
		case "events":
			writeEvents(w)
		}
		text, rest, more = strings.Cut(rest, "{{")
		_, _ = w.WriteString(text)
	}
}

// writeServices writes the rows of the table of services.
func (m monitor) writeServices(w pageWriter, now time.Time) {
	var all []*Status
	for _, s := range m.services() {
		all = append(all, s.Status())
	}

	slices.SortStableFunc(all, func(a, b *Status) int { return cmp.Compare(b.state, a.state) })
	for _, st := range all {
		pending := ""
		if st.Pending > 0 {
			pending = "+" + strconv.Itoa(st.Pending)
		}
		w.row(serviceRow, st.Service, st.State, st.State, fmt.Sprintf("%.8s", st.Commit), pending,
			pageTime(st.Change), age(now, st.LastLook), st.Public)
	}

	if len(all) == 0 {
		w.row(emptyRow, "none for this host, or none yet")
	}
}

// writeEvents writes the rows of the table of events.
func writeEvents(w pageWriter) {
	last := count.lastEvents()
	for _, e := range last {
		w.row(eventRow, e.At, e.Service, e.Text)
	}
	if len(last) == 0 {
		w.row(emptyRow, "none since gitopper was started")
	}
}

// pageTime is a time as people and HTML's <time> read it; nothing for the zero time.
func pageTime(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return t.UTC().Format("2006-01-02 15:04:05Z")
}

// age says how long ago t was, in its largest unit.
func age(now, t time.Time) string {
	if t.IsZero() {
		return "never"
	}

	since := max(0, now.Sub(t))
	hours := int(since.Hours())
	switch {
	case since < time.Minute:
		return fmt.Sprintf("%d s ago", int(since.Seconds()))
	case since < time.Hour:
		return fmt.Sprintf("%d min ago", int(since.Minutes()))
	case hours < 48:
		return fmt.Sprintf("%d h ago", hours)
	}
	return fmt.Sprintf("%d days ago", hours/24)
}

// number is so many of what one of is called.
func number(n int, one string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %ss", n, one)
}

// closeOldest keeps a server at limit connections, so that they can't take git's descriptors: a further one
// takes the place of the oldest, so that they can't keep others out.
func closeOldest(limit int) func(net.Conn, http.ConnState) {
	var mu sync.Mutex
	var open []net.Conn // the oldest first
	return func(c net.Conn, state http.ConnState) {
		mu.Lock()
		defer mu.Unlock()

		switch state {
		case http.StateNew:
			open = append(open, c)
			if len(open) > limit {
				_ = open[0].Close()
				open = open[1:]
			}
		case http.StateClosed:
			open = slices.DeleteFunc(open, func(o net.Conn) bool { return o == c })
		}
	}
}
