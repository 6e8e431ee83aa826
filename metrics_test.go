//go:build linux

package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"testing"
	"time"
)

func testServices(t *testing.T) []*Service {
	t.Helper()
	when := time.Unix(1668762892, 500e6)
	a := statusService(Status{Service: "prometheus", Upstream: "https://user:secret@example.org/c.git", Branch: "main",
		Commit: strings.Repeat("12345678", 5), Change: when, InSync: true, LastLook: when,
		waiting: waiting{Committed: when.Add(-time.Hour)}})
	b := statusService(Status{Service: "caddy@1", Upstream: "/u\"\\\n", Branch: "x", Change: when, OutOfSync: when})
	return []*Service{a, b}
}

func TestMetrics(t *testing.T) {
	services := testServices(t)
	startCounters(services)
	var b bytes.Buffer
	writeMetrics(&b, services, true, time.Unix(1668762000, 0))
	text := b.String()
	if strings.Contains(text, "secret") {
		t.Error("the password of an upstream is in it")
	}
	// What depends on the process that asks.
	for _, name := range []string{"process_resident_memory_bytes", "process_cpu_seconds_total", "process_open_fds", "gitopper_machine_git_ops_total", "gitopper_machine_git_errors_total"} {
		text = regexp.MustCompile(`(?m)^`+name+` [0-9.]+$`).ReplaceAllString(text, name+" N")
	}
	text = regexp.MustCompile(`gitopper_build_info{.*}`).ReplaceAllString(text, "gitopper_build_info{...}")
	ofService := regexp.MustCompile(`(?m)^.*service="([^"]*)".*\n`)
	text = ofService.ReplaceAllStringFunc(text, func(line string) string {
		if name := ofService.FindStringSubmatch(line)[1]; name == "caddy@1" || name == "prometheus" {
			return line
		}
		return "" // counted by other tests
	})
	golden(t, "metrics.txt", text)
}

func TestMetricsPleasePromtool(t *testing.T) {
	if _, err := exec.LookPath("promtool"); err != nil {
		t.Skip("promtool is not here: apt-get install prometheus")
	}
	var b bytes.Buffer
	services := testServices(t)
	startCounters(services)
	writeMetrics(&b, services, false, time.Now())
	cmd := exec.Command("promtool", "check", "metrics")
	cmd.Stdin = &b
	if out, err := cmd.CombinedOutput(); err != nil || len(out) > 0 {
		t.Errorf("promtool: %v: %s", err, out)
	}
}

// Each alerting rule fires when it should, and not when it shouldn't: testdata/alerts_test.yml.
func TestAlertsPleasePromtool(t *testing.T) {
	if _, err := exec.LookPath("promtool"); err != nil {
		t.Skip("promtool is not here: apt-get install prometheus")
	}
	rules, stderr, status := gitopper(t, "--alerts")
	if status != 0 || stderr != "" {
		t.Fatalf("--alerts: status %d: %s", status, stderr)
	}
	dir := t.TempDir()
	tests, err1 := os.ReadFile("testdata/alerts_test.yml")
	readme, err2 := os.ReadFile("README.md")
	_, config, _ := strings.Cut(string(readme), "```yaml\nscrape_configs:")
	config, _, _ = strings.Cut(config, "```")
	err := cmp.Or(err1, err2, os.WriteFile(dir+"/alerts.yml", []byte(rules), 0o644),
		os.WriteFile(dir+"/alerts_test.yml", tests, 0o644),
		os.WriteFile(dir+"/prometheus.yml", []byte("rule_files: [ alerts.yml ]\nscrape_configs:"+config), 0o644))
	if err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{"check", "rules", "alerts.yml"}, {"test", "rules", "alerts_test.yml"},
		{"check", "config", "prometheus.yml"}} {
		cmd := exec.Command("promtool", args...)
		cmd.Dir = dir
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("promtool %s: %v: %s", strings.Join(args, " "), err, out)
		}
	}
	for _, m := range regexp.MustCompile(`alert: (\w+)`).FindAllStringSubmatch(rules, -1) {
		fires := "alertname: " + m[1] + "\n        exp_alerts:"
		if !strings.Contains(string(tests), fires) {
			t.Errorf("%s has no test in which it fires", m[1])
		}
	}
}

// gauge is one of ours, or of the process.
var gauge = regexp.MustCompile(`\b(gitopper|process)_[a-z_]+`)

// Alerts and dashboard speak of no metric that there isn't.
func TestMetricsOfAlertsAndDashboard(t *testing.T) {
	var there bytes.Buffer
	writeMetrics(&there, nil, true, time.Now())
	board, stderr, status := gitopper(t, "--dashboard")
	if status != 0 || stderr != "" {
		t.Fatalf("--dashboard: status %d: %s", status, stderr)
	}
	for _, expr := range append(dashboardQueries(t, board), alertRules) {
		for _, name := range gauge.FindAllString(expr, -1) {
			if !strings.Contains(there.String(), "# TYPE "+name+" ") {
				t.Errorf("there is no %s: %s", name, expr)
			}
		}
	}
}

// dashboardQueries returns what the panels of a dashboard ask Prometheus, and fails where two panels share an
// id or a place.
func dashboardQueries(t *testing.T, text string) (queries []string) {
	t.Helper()
	var board struct {
		Panels []struct {
			ID      int
			Title   string
			GridPos struct{ X, Y, W, H int }
			Targets []struct{ Expr string }
		}
	}
	if err := json.Unmarshal([]byte(text), &board); err != nil {
		t.Fatal(err)
	}
	taken := map[any]string{}
	take := func(place any, title string) {
		if taken[place] != "" {
			t.Errorf("panels %q and %q share %v", taken[place], title, place)
		}
		taken[place] = title
	}
	for _, p := range board.Panels {
		take(p.ID, p.Title)
		for x := range p.GridPos.W {
			for y := range p.GridPos.H {
				take([2]int{p.GridPos.X + x, p.GridPos.Y + y}, p.Title)
			}
		}
		for _, target := range p.Targets {
			queries = append(queries, target.Expr)
		}
	}
	return queries
}

func TestHTTP(t *testing.T) {
	services := testServices(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() {
		testMonitor(services).serve(ctx, l)
		close(ended)
	}()
	get := func(path string) (int, string) {
		t.Helper()
		resp, err := http.Get("http://" + l.Addr().String() + path)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		return resp.StatusCode, resp.Header.Get("Content-Type") + "\n" + string(body)
	}
	for _, tc := range []struct {
		path string
		code int
		want string
	}{
		{"/metrics", 200, "text/plain; version=0.0.4; charset=utf-8\n# HELP gitopper_service_state"},
		{"/healthz", 200, "ok\n"},
		{"/", 200, "text/html; charset=utf-8\n<!DOCTYPE html>"},
		{"/nope", 404, ""},
	} {
		if code, body := get(tc.path); code != tc.code || !strings.Contains(body, tc.want) {
			t.Errorf("%s: %d %s", tc.path, code, body)
		}
	}
	resp, err := http.Get("http://" + l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	for name, want := range map[string]string{
		"Content-Security-Policy": "default-src 'none'; base-uri 'none'; form-action 'none'; " +
			"frame-ancestors 'none'; style-src 'sha256-",
		"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cache-Control": "no-store",
	} {
		if got := resp.Header.Get(name); !strings.HasPrefix(got, want) {
			t.Errorf("%s: %q, want %q", name, got, want)
		}
	}
	// Strangers that hold connections keep nobody out.
	for range 200 {
		c, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
	}
	if code, _ := get("/healthz"); code != 200 {
		t.Errorf("/healthz during a flood: %d", code)
	}
	services[0].deadline.Store(time.Now().Add(-time.Hour).Unix())
	if code, body := get("/healthz"); code != 503 || !strings.Contains(body, "stuck: prometheus") {
		t.Errorf("/healthz with a loop that hangs: %d %s", code, body)
	}
	cancel()
	<-ended
}
