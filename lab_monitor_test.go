//go:build linux

package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// systemctl reload has gitopper read its config anew, with the unit that it prints for itself: no mount and
// no unit takes notice, and a wrong config ends nothing. The journal of a service is found by its name.
func TestLabReload(t *testing.T) {
	l, u := newLab(t), newLabUpstream(t)
	l.witness("app", "/srv/app/conf", "")
	l.witness("more", "/srv/more/conf", "")
	hash := u.commit(map[string]string{"app/conf": "1\n", "more/conf": "1\n"})
	entry := func(name string) string {
		return fmt.Sprintf(`
[[services]]
machine = "lab"
service = %q
action = "reload"
settle = "100ms"
dirs = [ { local = "/srv/%[1]s", link = %[1]q } ]
`, name)
	}
	l.configure(u, entry("app"))
	l.start()
	// Nothing but what the unit says brings it back.
	dropIn := "/etc/systemd/system/gitopper.service.d/lab.conf"
	own := strings.NewReplacer("Restart=always\n", "", "RestartSec=10ms\n", "").Replace(l.read(dropIn))
	l.write(dropIn, own)
	l.run("systemctl", "daemon-reload")
	l.run("systemctl", "restart", "gitopper")
	l.waitCommit("app", hash)

	reload := func() {
		t.Helper()
		before := l.show("gitopper", "MainPID")
		seen := l.read("/run/app.calls") + strings.Join(l.mounts("/srv/app"), "\n")
		l.run("systemctl", "reload", "gitopper")
		labWait(t, time.Minute, "gitopper is another process", func() error {
			now, state := l.show("gitopper", "MainPID"), l.show("gitopper", "ActiveState")
			if now == "0" || now == before || state != "active" {
				return fmt.Errorf("pid %s, was %s, %s", now, before, state)
			}
			return nil
		})
		l.waitCommit("app", hash)
		l.waitRounds(u, 2)
		if now := l.read("/run/app.calls") + strings.Join(l.mounts("/srv/app"), "\n"); now != seen {
			t.Errorf("the unit and its mounts: %s, were %s", now, seen)
		}
		if got := l.show("gitopper", "Result"); got != "success" {
			t.Errorf("systemd calls the reload %s", got)
		}
	}
	l.configure(u, entry("app")+entry("more"))
	reload()
	l.waitCommit("more", hash)
	l.waitFile("/run/more.seen", "1\n")

	l.configure(u, entry("app")+"[")
	reload()
	l.waitCommit("more", hash)
	if ok := l.metric("gitopper_config_ok"); ok != 0 {
		t.Error("a wrong config is not told")
	}
	l.configure(u, entry("app")+entry("more"))
	reload()

	found := l.run("journalctl", "-u", "gitopper", "-o", "cat", "-g", "^app:")
	if !strings.Contains(found, "app: new -> OK") || strings.Contains(found, "more:") {
		t.Errorf("journalctl -u gitopper -g '^app:' finds %q", found)
	}
}

// A canary's commit is followed in a real Prometheus that scrapes three hosts: each query of the dashboard
// has an answer there, each alerting rule is evaluated, and that for local edits fires.
func TestLabRollout(t *testing.T) {
	hosts, u := newLabs(t, 3), newLabUpstream(t)
	main, canary, frozen := hosts[0], hosts[1], hosts[2]
	first := u.commit(map[string]string{"app/conf": "1\n"})
	u.run("branch", "canary")
	var targets []string
	for _, l := range hosts {
		l.witness("app", "/srv/app/conf", "")
		branch := map[bool]string{true: "canary", false: "main"}[l == canary]
		l.configure(u, fmt.Sprintf(`
[[services]]
machine = "lab"
service = "app"
branch = %q
action = "reload"
settle = "100ms"
dirs = [ { local = "/srv/app", link = "app" } ]
`, branch))
		l.start()
		targets = append(targets, fmt.Sprintf("\"127.0.0.1:%d\"", l.metricPort))
	}
	for _, l := range hosts {
		l.waitCommit("app", first)
	}

	api := main.labPrometheus()
	main.write("/etc/prometheus/gitopper.yml", main.run("gitopper", "--alerts")+"\n")
	main.write("/etc/prometheus/prometheus.yml", fmt.Sprintf(`
global: { scrape_interval: 1s, evaluation_interval: 1s }
rule_files: [ gitopper.yml ]
scrape_configs:
  - job_name: gitopper
    static_configs: [ { targets: [ %s ] } ]
`, strings.Join(targets, ", ")))
	main.run("systemctl", "start", "prometheus")
	rollout := func(when string, want ...string) {
		t.Helper()
		labWait(t, time.Minute, when+", Prometheus has "+strings.Join(want, ", "), func() error {
			got, err := askPrometheus(api, `count by (hash) (gitopper_service_info{service="app"})`)
			slices.Sort(got)
			slices.Sort(want)
			if err == nil && !slices.Equal(got, want) {
				err = fmt.Errorf("%q", got)
			}
			return err
		})
	}
	of := func(hash string, hosts int) string { return fmt.Sprintf(`{"hash":"%.8s"} %d`, hash, hosts) }
	rollout("at first", of(first, 3))

	u.run("checkout", "-q", "canary")
	second := u.commit(map[string]string{"app/conf": "2\n"})
	rollout("with the canary out", of(first, 2), of(second, 1))
	if _, stderr, err := frozen.ssh("/do/freeze app 1h not this one"); err != nil {
		t.Fatal(err, stderr)
	}
	u.run("checkout", "-q", "main")
	u.run("merge", "-q", "--ff-only", "canary")
	rollout("when it was let go on", of(first, 1), of(second, 2))
	canary.write("/srv/app/conf", "edited\n")
	canary.waitFile("/srv/app/conf", "2\n")
	u.commit(map[string]string{"app/conf": labGone, "README": "no app here"})
	main.waitState("app", "DIFF", `link "app" is missing`)

	for l, want := range map[*labHost]string{
		main: "OK -&gt; DIFF", canary: "local edits undone", frozen: `<span class="state FREEZE">`,
	} {
		page, err := labGet(fmt.Sprintf("http://127.0.0.1:%d/", l.metricPort))
		if err != nil || !strings.Contains(page, want) {
			t.Errorf("the page of %s has no %s: %v: %s", l.name, want, err, page)
		}
	}

	board := main.run("gitopper", "--dashboard")
	variables := strings.NewReplacer("$instance", ".*", "$service", ".*", "$__rate_interval", "10m")
	for _, query := range dashboardQueries(t, board) {
		query = variables.Replace(query)
		labWait(t, time.Minute, "an answer to "+query, func() error {
			got, err := askPrometheus(api, query)
			if err == nil && len(got) == 0 {
				err = errors.New("no data")
			}
			return err
		})
	}
	labWait(t, time.Minute, "the alert for local edits", func() error {
		got, err := askPrometheus(api, `ALERTS{alertname="GitopperDrift", alertstate="firing"}`)
		if err == nil && len(got) != 1 {
			err = fmt.Errorf("%q", got)
		}
		return err
	})
	rules, err := labGet(api + "/api/v1/rules")
	if n := strings.Count(rules, `"health":"ok"`); err != nil || n != strings.Count(alertRules, "alert: ") {
		t.Errorf("%d rules evaluated, %v: %s", n, err, rules)
	}
}

// askPrometheus returns the numbers that a query has now, each as "{labels as JSON} value".
func askPrometheus(api, query string) (samples []string, err error) {
	text, err := labGet(api + "/api/v1/query?query=" + url.QueryEscape(query))
	if err != nil {
		return nil, err
	}
	var answer struct {
		Data struct {
			Result []struct {
				Metric json.RawMessage
				Value  [2]any
			}
		}
	}
	if err := json.Unmarshal([]byte(text), &answer); err != nil {
		return nil, err
	}
	for _, r := range answer.Data.Result {
		value, _ := r.Value[1].(string)
		if n, err := strconv.ParseFloat(value, 64); err == nil && !math.IsNaN(n) {
			samples = append(samples, fmt.Sprintf("%s %s", r.Metric, value))
		}
	}
	return samples, nil
}
