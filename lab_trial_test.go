//go:build linux

package main

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// Bad commits against real nginx and Prometheus: what is refused before it goes live, and what is taken
// back after.

// pagesOn is a site that answers with a text, and nginx's main file for it.
func pagesOn(port int, text string) map[string]string {
	return map[string]string{
		"nginx/nginx.conf":       "worker_processes 1;\npid /run/nginx.pid;\nevents {}\nhttp {\n\tinclude /etc/nginx/conf.d/*.conf;\n}\n",
		"nginx/conf.d/site.conf": fmt.Sprintf("server {\n\tlisten 127.0.0.1:%d;\n\tlocation / { return 200 %s; }\n}\n", port, text),
	}
}

// served checks that a page has this text right now.
func served(t *testing.T, port int, want string) {
	t.Helper()
	if got, err := labGet(fmt.Sprintf("http://127.0.0.1:%d/", port)); err != nil || got != want {
		t.Errorf("port %d serves %q, %v, want %q", port, got, err, want)
	}
}

// refused is how many commits of a service were refused for this reason.
func (l *labHost) refused(service, reason string) int {
	l.t.Helper()
	return int(l.metric("gitopper_service_refused_total", fmt.Sprintf("service=%q", service),
		fmt.Sprintf("reason=%q", reason)))
}

// actions is how often a unit was acted on.
func (l *labHost) actions(service string) int {
	l.t.Helper()
	return int(l.metric("gitopper_service_actions_total", fmt.Sprintf("service=%q", service)))
}

// What nginx -t refuses is never seen by anybody, and the info has nginx's words; the next commit is live
// at once.
func TestLabTrialSyntaxErrorChangesNothing(t *testing.T) {
	l, u := newLab(t), newLabUpstream(t)
	port := labPort()
	good := pagesOn(port, "one")
	u.commit(good)
	l.configure(u, labPages+`action = "reload"
check = ["nginx", "-t"]
settle = "200ms"
`)
	l.start()
	waitServed(t, port, "one")
	l.waitState("nginx", "OK")
	mounts, actions := l.mounts("/etc/nginx"), l.actions("nginx")

	site := l.watchFile("/etc/nginx/conf.d/site.conf",
		func(content string) bool { return content == good["nginx/conf.d/site.conf"] })
	main := l.watchFile("/etc/nginx/nginx.conf",
		func(content string) bool { return content == good["nginx/nginx.conf"] })
	bad := u.commit(map[string]string{"nginx/conf.d/site.conf": fmt.Sprintf("server {\n\tlsten 127.0.0.1:%d;\n}\n", port)})
	l.waitState("nginx", "DIFF", bad[:8], `unknown directive "lsten"`, "/etc/nginx/conf.d/site.conf:2")
	l.waitRounds(u, 2)
	// In the other of the two links.
	bad = u.commit(map[string]string{"nginx/conf.d/site.conf": good["nginx/conf.d/site.conf"],
		"nginx/nginx.conf": "evnts {}\n"})
	l.waitState("nginx", "DIFF", bad[:8], `unknown directive "evnts"`, "/etc/nginx/nginx.conf:1")
	l.waitRounds(u, 2)
	for _, stop := range []func() (int, string){site, main} {
		if reads, saw := stop(); saw != "" || reads == 0 {
			t.Errorf("%d reads: %s", reads, saw)
		}
	}
	served(t, port, "one")
	if got := l.mounts("/etc/nginx"); !slices.Equal(got, mounts) {
		t.Errorf("PID 1 has mounted %q, had %q", got, mounts)
	}
	if got := l.actions("nginx"); got != actions {
		t.Errorf("%d actions, were %d", got, actions)
	}
	if got := l.refused("nginx", "check"); got != 2 {
		t.Errorf("%d commits refused by check, want 2", got)
	}

	fixed := u.commit(pagesOn(port, "two"))
	waitServed(t, port, "two")
	l.waitCommit("nginx", fixed)
}

// A check of files that name each other by absolute path sees the candidate's, and a check that is changed
// is asked again.
func TestLabTrialCheckSeesCandidate(t *testing.T) {
	l, u := newLab(t), newLabUpstream(t)
	api := l.labPrometheus()
	rules := func(expr string) string {
		return "groups:\n- name: lab\n  rules:\n  - record: lab\n    expr: " + expr + "\n"
	}
	u.commit(map[string]string{
		"prometheus/etc/prometheus.yml":  "global: {external_labels: {rollout: r1}}\nrule_files: [/etc/prometheus/rules/one.yml]\n",
		"prometheus/etc/rules/one.yml":   rules("vector(1)"),
		"prometheus/etc/rules/README.md": "",
	})
	config := func(check string) {
		l.configure(u, `
[[services]]
machine = "lab"
service = "prometheus"
user = "prometheus"
action = "reload"
settle = "200ms"
check = `+check+`
dirs = [ { local = "/etc/prometheus", link = "prometheus/etc" } ]
`)
	}
	config(`["promtool", "check", "config", "/etc/prometheus/prometheus.yml"]`)
	l.start()
	prometheusLoaded(t, api, "rollout: r1")
	l.waitState("prometheus", "OK")

	bad := u.commit(map[string]string{"prometheus/etc/rules/one.yml": rules("vector(")})
	l.waitState("prometheus", "DIFF", bad[:8], "/etc/prometheus/rules/one.yml")
	l.waitFile("/etc/prometheus/rules/one.yml", rules("vector(1)"))

	// What the main file names is in the candidate only, and the bad file is not: it was deleted.
	good := u.commit(map[string]string{
		"prometheus/etc/prometheus.yml": "global: {external_labels: {rollout: r2}}\nrule_files: [/etc/prometheus/rules/two.yml]\n",
		"prometheus/etc/rules/one.yml":  labGone,
		"prometheus/etc/rules/two.yml":  rules("vector(2)"),
	})
	prometheusLoaded(t, api, "rollout: r2")
	l.waitCommit("prometheus", good)
	if got := l.read("/etc/prometheus/rules/one.yml"); got != "" {
		t.Errorf("a deleted file is there: %q", got)
	}

	// What is not in Git, but lies there, belongs to what is judged; what the commit deletes does not.
	u.commit(map[string]string{"prometheus/etc/rules/README.md": "",
		"prometheus/etc/prometheus.yml": "global: {external_labels: {rollout: r3}}\nrule_files: [/etc/prometheus/rules/two.yml]\n"})
	prometheusLoaded(t, api, "rollout: r3")
	l.write("/etc/prometheus/local", "untracked")
	config(`["sh", "-c", "test -e /etc/prometheus/local && ! test -e /etc/prometheus/rules/two.yml && ! touch /etc/prometheus/x; echo 'a \"quoted\" reason'; exit 1"]`)
	l.run("systemctl", "restart", "gitopper")
	bad = u.commit(map[string]string{
		"prometheus/etc/prometheus.yml": "global: {external_labels: {rollout: r4}}\n",
		"prometheus/etc/rules/two.yml":  labGone,
	})
	l.waitState("prometheus", "DIFF", bad[:8], `a "quoted" reason`)
	config(`["sh", "-c", "test -e /etc/prometheus/local && ! test -e /etc/prometheus/rules/two.yml && ! touch /etc/prometheus/x"]`)
	l.run("systemctl", "restart", "gitopper")
	prometheusLoaded(t, api, "rollout: r4")
	l.waitCommit("prometheus", bad)
}

// A commit that breaks its unit is taken back while upstream is away, and not tried again.
func TestLabTrialBrokenUnitFallsBack(t *testing.T) {
	const settle = 2 * time.Second
	l := newLab(t)
	api := l.labPrometheus()
	port := map[string]int{"restart": labPort(), "reload": labPort()}
	// Three real units, so that three commits can be on trial side by side. The second nginx is Debian's
	// under another name.
	l.run("sh", "-c", `sed 's|/run/nginx.pid|/run/nginx2.pid|g; s|nginx -|nginx -c /etc/nginx2/nginx.conf -|g' /lib/systemd/system/nginx.service >/etc/systemd/system/nginx2.service`)
	l.run("systemctl", "daemon-reload")
	site := func(dir string, port int, text, more string) map[string]string {
		return map[string]string{dir + "/nginx.conf": fmt.Sprintf("pid /run/%s.pid;\nevents {}\nhttp { server { listen 127.0.0.1:%d; location / { return 200 %s; } } }\n%s", dir, port, text, more)}
	}
	prometheus := func(label, more string) map[string]string {
		return map[string]string{"prometheus/prometheus.yml": "global: {external_labels: {rollout: " + label +
			"}}\n" + more}
	}
	serves := func(port int) func() string {
		return func() string {
			got, err := labGet(fmt.Sprintf("http://127.0.0.1:%d/", port))
			if err != nil {
				return err.Error()
			}
			return got
		}
	}
	tests := []struct {
		name, service, action string
		good, bad             map[string]string
		fixed                 map[string]string
		file                  string
		serves                func() string // what the unit is running with
		wantGood, wantFixed   string
	}{
		{
			name: "crashes at start", service: "nginx", action: "restart",
			good: site("nginx", port["restart"], "good", ""), bad: site("nginx", port["restart"], "bad",
				"nonsense;"), fixed: site("nginx", port["restart"], "fixed", ""),
			file: "/etc/nginx/nginx.conf", serves: serves(port["restart"]), wantGood: "good", wantFixed: "fixed",
		},
		{
			name: "reload fails", service: "nginx2", action: "reload",
			good: site("nginx2", port["reload"], "good", ""), bad: site("nginx2", port["reload"], "bad",
				"nonsense;"), fixed: site("nginx2", port["reload"], "fixed", ""),
			file: "/etc/nginx2/nginx.conf", serves: serves(port["reload"]), wantGood: "good", wantFixed: "fixed",
		},
		{
			name: "crash-loops", service: "prometheus", action: "restart",
			good: prometheus("good", ""), bad: prometheus("bad", "nonsense: 1\n"), fixed: prometheus("fixed",
				""),
			file: "/etc/prometheus/prometheus.yml",
			serves: func() string {
				got, err := labGet(api + "/api/v1/status/config")
				for _, label := range []string{"good", "bad", "fixed"} {
					if strings.Contains(got, "rollout: "+label) {
						return label
					}
				}
				return fmt.Sprint(got, err)
			},
			wantGood: "good", wantFixed: "fixed",
		},
	}
	// An upstream for each, as each is stopped at its own time.
	upstreams := map[string]*labUpstream{}
	config := ""
	for _, tt := range tests {
		u := newLabUpstream(t)
		upstreams[tt.service] = u
		u.commit(tt.good)
		config += fmt.Sprintf("[[services]]\nmachine = \"lab\"\nservice = %q\nupstream = %q\naction = %q\nsettle = %q\ndirs = [ { local = %q, link = %q } ]\n",
			tt.service, u.url(), tt.action, settle, filepath.Dir(tt.file), filepath.Base(filepath.Dir(tt.file)))
	}
	l.configure(upstreams["nginx"], config)
	l.start()
	good := map[string]string{}
	for _, tt := range tests {
		l.waitState(tt.service, "OK")
		labWait(t, time.Minute, tt.name+": serves good", func() error {
			if got := tt.serves(); got != tt.wantGood {
				return fmt.Errorf("%s", got)
			}
			return nil
		})
		good[tt.service] = upstreams[tt.service].run("rev-parse", "HEAD")
	}

	for _, tt := range tests {
		u := upstreams[tt.service]
		bad := u.commit(tt.bad)
		l.waitFile(tt.file, tt.bad[strings.TrimPrefix(tt.file, "/etc/")])
		live := time.Now()
		u.stop()
		// Its files are live; now nothing more can be fetched.
		labWait(t, settle+5*time.Second, tt.name+": runs on the last good files", func() error {
			if got := l.read(tt.file); got != tt.good[strings.TrimPrefix(tt.file, "/etc/")] {
				return fmt.Errorf("files: %s", got)
			}
			if got := tt.serves(); got != tt.wantGood {
				return fmt.Errorf("serves: %s", got)
			}
			if got := l.show(tt.service, "ActiveState"); got != "active" {
				return fmt.Errorf("unit is %s", got)
			}
			return nil
		})
		t.Logf("%s: good again after %v", tt.name, time.Since(live).Round(time.Millisecond))
		l.waitState(tt.service, "BROKEN", bad[:8], good[tt.service][:8])
		if got := l.refused(tt.service, "fallback"); got != 1 {
			t.Errorf("%s: %d commits taken back, want 1", tt.name, got)
		}
		// The same content again is not tried, other content is.
		actions := l.actions(tt.service)
		u.commit(map[string]string{"README": "elsewhere"})
		u.start()
		l.waitRounds(u, 3)
		if got := l.actions(tt.service); got != actions {
			t.Errorf("%s: %d actions, were %d: what was taken back is tried again", tt.name, got, actions)
		}
		if got := tt.serves(); got != tt.wantGood {
			t.Errorf("%s: serves %s, want %s", tt.name, got, tt.wantGood)
		}
	}

	// With all of them taken back and upstream away: the next boot is on the good files.
	for _, tt := range tests {
		upstreams[tt.service].stop()
		l.run("systemctl", "enable", tt.service)
	}
	l.run("systemctl", "enable", "gitopper")
	l.reboot()
	for _, tt := range tests {
		labWait(t, time.Minute, tt.name+": serves good after a reboot", func() error {
			if got := tt.serves(); got != tt.wantGood {
				return fmt.Errorf("%s", got)
			}
			return nil
		})
		l.waitState(tt.service, "BROKEN", good[tt.service][:8])
		upstreams[tt.service].start()
		fixed := upstreams[tt.service].commit(tt.fixed)
		l.waitCommit(tt.service, fixed)
		if got := tt.serves(); got != tt.wantFixed {
			t.Errorf("%s: serves %s, want %s", tt.name, got, tt.wantFixed)
		}
	}
}

// Killed in the middle of a trial or of taking it back, and rebooted in the middle: the unit ends on the
// good files.
func TestLabTrialFallbackSurvivesKills(t *testing.T) {
	kills := often(20, 100)
	l, u := newLab(t), newLabUpstream(t)
	port := labPort()
	pages := func(text, more string) map[string]string {
		files := pagesOn(port, text)
		files["nginx/nginx.conf"] += more
		return files
	}
	good := pages("good", "")
	goodHash := u.commit(good)
	l.configure(u, labPages+"action = \"restart\"\nsettle = \"300ms\"\n")
	l.start("-t", "100ms")
	waitServed(t, port, "good")
	l.waitCommit("nginx", goodHash)
	l.run("systemctl", "enable", "gitopper", "nginx")

	moments := labMoments(t, 1)
	back := func(bad string) {
		t.Helper()
		l.waitState("nginx", "BROKEN", bad[:8], goodHash[:8])
		l.waitFile("/etc/nginx/nginx.conf", good["nginx/nginx.conf"])
		l.waitFile("/etc/nginx/conf.d/site.conf", good["nginx/conf.d/site.conf"])
		// The row may still be that of before the kill: what counts is that the unit ends on the good files.
		waitServed(t, port, "good")
		labWait(t, 10*time.Second, "the unit is active", func() error {
			if got := l.show("nginx", "ActiveState"); got != "active" {
				return fmt.Errorf("it is %s", got)
			}
			return nil
		})
	}
	for i := range kills {
		content := pages(fmt.Sprint("bad", i), "nonsense;\n")
		bad := u.commit(content)
		l.waitFile("/etc/nginx/nginx.conf", content["nginx/nginx.conf"])
		u.stop()
		// Not a wait for anything: between the first file that is live and the end of the fallback.
		time.Sleep(time.Duration(moments.IntN(600)) * time.Millisecond)
		l.kill()
		if i == kills-1 {
			l.reboot()
		}
		// A commit that was killed with may be tried once more, so upstream stays away until it is settled.
		back(bad)
		u.start()
	}
	fixed := u.commit(pages("fixed", ""))
	l.waitCommit("nginx", fixed)
	served(t, port, "fixed")
}

// When the last good commit fails as well, nothing flaps; and when the cause is gone, the new commit is
// what runs.
func TestLabTrialLastGoodFailsToo(t *testing.T) {
	l, u := newLab(t), newLabUpstream(t)
	port := labPort()
	u.commit(pagesOn(port, "one"))
	l.write("/etc/systemd/system/nginx.service.d/starts.conf",
		"[Service]\nExecStartPre=sh -c \"echo start >>/run/nginx.starts\"\n")
	l.configure(u, labPages+"action = \"restart\"\nsettle = \"500ms\"\n")
	l.start("-t", "1s")
	waitServed(t, port, "one")
	l.waitState("nginx", "OK")

	// An administrator tries something with the port.
	l.run("systemctl", "stop", "nginx")
	l.waitState("nginx", "BROKEN")
	l.run("systemd-run", "-q", "--unit=thief", "git", "daemon", "--listen=127.0.0.1",
		fmt.Sprint("--port=", port), "--export-all", "--base-path=/srv", "--reuseaddr")
	labWait(t, time.Minute, "the port is taken", func() error {
		_, err := l.try("bash", "-c", fmt.Sprintf("exec 3<>/dev/tcp/127.0.0.1/%d", port))
		return err
	})
	second := u.commit(pagesOn(port, "two"))
	labWait(t, time.Minute, "both were tried", func() error {
		if n := l.lines("/run/nginx.starts"); n < 3 {
			return fmt.Errorf("%d starts", n)
		}
		return nil
	})
	l.waitFile("/etc/nginx/conf.d/site.conf", pagesOn(port, "one")["nginx/conf.d/site.conf"])
	starts, looks := l.lines("/run/nginx.starts"), u.looks.Load()
	l.waitRounds(u, 5)
	starts, looks = l.lines("/run/nginx.starts")-starts, u.looks.Load()-looks
	if int64(starts) > looks+1 {
		t.Errorf("%d starts in %d rounds", starts, looks)
	}
	l.waitFile("/etc/nginx/conf.d/site.conf", pagesOn(port, "one")["nginx/conf.d/site.conf"])

	l.run("systemctl", "stop", "thief")
	waitServed(t, port, "two")
	l.waitCommit("nginx", second)
}

// Whatever a check does: the host and the live files stay as they are, and nothing of it stays.
func TestLabTrialHostileChecks(t *testing.T) {
	l, u := newLab(t), newLabUpstream(t)
	const good, bad = "good\n", "bad\n"
	tests := []struct {
		name   string
		script string
		state  string // of a commit that is judged so
		info   []string
	}{
		// The limit of a minute is part of the contract.
		{name: "hangs", script: "sleep 7771", state: "DIFF", info: []string{"1m"}},
		{name: "hangs-deaf", script: "trap '' TERM; setsid sleep 7772 & while :; do sleep 7773; done",
			state: "DIFF", info: []string{"1m"}},
		{name: "forks", script: "setsid sh -c 'sleep 7774' </dev/null >/dev/null 2>&1 &", state: "OK"},
		{name: "forks-loud", script: "setsid sh -c 'sleep 7775' &", state: "OK"},
		{name: "floods", script: "yes flood | head -c 300M; echo the end >&2; exit 1", state: "DIFF",
			info: []string{"the end"}},
		{name: "deletes", script: "rm -rf /srv/deletes/dir/* /srv/deletes/file; echo x >/srv/deletes/dir/conf; echo x >/srv/deletes/file; echo tried; exit 1", state: "DIFF", info: []string{"tried"}},
		{name: "mounts", script: "mount -t tmpfs tmpfs /opt; mkdir /opt/of-a-check; mount --bind /opt /srv/mounts/dir; exit 1", state: "DIFF"},
	}
	config, files := "", map[string]string{}
	for _, tt := range tests {
		files[tt.name+"/conf"], files[tt.name+"/file"] = good, good
		// The first commit passes.
		l.write("/usr/local/bin/check-"+tt.name,
			fmt.Sprintf("#!/bin/sh\ngrep -q good /srv/%s/dir/conf && exit 0\n%s\n", tt.name, tt.script))
		l.witness(tt.name, "/srv/"+tt.name+"/dir/conf", "")
		config += fmt.Sprintf(`
[[services]]
machine = "lab"
service = %[1]q
action = "reload"
settle = "50ms"
check = [ "check-%[1]s" ]
dirs = [ { local = "/srv/%[1]s/dir", link = "%[1]s" }, { local = "/srv/%[1]s/file", link = "%[1]s/file", file = true } ]
`, tt.name)
	}
	first := u.commit(files)
	l.configure(u, config)
	l.start()
	for _, tt := range tests {
		l.waitCommit(tt.name, first)
	}
	mounts, root := l.read("/proc/1/mountinfo"), l.run("ls", "/opt", "/srv")

	for name := range files {
		files[name] = bad
	}
	second := u.commit(files)
	start := time.Now()
	for _, tt := range tests {
		labWait(t, 2*time.Minute, tt.name+" is judged", func() error {
			s, err := l.status(tt.name)
			if err != nil {
				return err
			}
			if s.State != tt.state {
				return fmt.Errorf("%+v", s)
			}
			want := first
			if tt.state == "OK" {
				want = second
			}
			for _, word := range tt.info {
				if !strings.Contains(s.StateInfo, word) {
					return fmt.Errorf("%+v, without %q", s, word)
				}
			}
			if s.Hash != want[:8] {
				return fmt.Errorf("%+v, want %s", s, want)
			}
			return nil
		})
		want := good
		if tt.state == "OK" {
			want = bad
		}
		for _, file := range []string{"/srv/" + tt.name + "/dir/conf", "/srv/" + tt.name + "/file",
			labCheckouts + "/" + tt.name + "/" + tt.name + "/conf"} {
			l.waitFile(file, want)
		}
		if tt.state != "OK" {
			if got := l.read("/run/" + tt.name + ".calls"); got != "start\n" {
				t.Errorf("%s: calls of the unit: %q", tt.name, got)
			}
		}
	}
	if took := time.Since(start); took > 80*time.Second {
		t.Errorf("the checks took %v, the limit is a minute", took)
	}
	// What ran out of time is tried again, but for a pinned service.
	for _, tt := range tests[:2] {
		if _, stderr, err := l.ssh("/do/freeze " + tt.name); err != nil {
			t.Errorf("freeze %s: %v: %s", tt.name, err, stderr)
		}
	}
	labWait(t, 10*time.Second, "no process of a check is left", func() error {
		if out, err := l.try("pgrep", "-a", "-f", "sleep 777|check-|flood"); err == nil {
			return fmt.Errorf("%s", out)
		}
		return nil
	})
	// File mounts of the accepted commits are new ones: compared by what they show above.
	count := func(mountinfo string) int { return strings.Count(mountinfo, "\n") }
	if now := l.read("/proc/1/mountinfo"); count(now) != count(mounts) {
		t.Errorf("mounts now:\n%s\nbefore:\n%s", now, mounts)
	}
	if now := l.run("ls", "/opt", "/srv"); now != root {
		t.Errorf("host files now %q, before %q", now, root)
	}
	if rss := l.metric("process_resident_memory_bytes"); rss > 128<<20 {
		t.Errorf("%v bytes of memory after a check that printed 300 MB", rss)
	}
}

// A commit elsewhere, on top of a refused one, is not judged again; a fix is live at once; do pull tries
// anyway.
func TestLabTrialElsewhereIsNotTried(t *testing.T) {
	l, u := newLab(t), newLabUpstream(t)
	l.write("/usr/local/bin/judge", "#!/bin/sh\necho judged >>/run/judged\ncat /srv/app/conf\n! grep -q bad /srv/app/conf\n")
	l.witness("app", "/srv/app/conf", "")
	first := u.commit(map[string]string{"app/conf": "good\n"})
	l.configure(u, `
[[services]]
machine = "lab"
service = "app"
action = "reload"
settle = "50ms"
check = [ "judge" ]
dirs = [ { local = "/srv/app", link = "app" } ]
`)
	l.start()
	l.waitCommit("app", first)
	bad := u.commit(map[string]string{"app/conf": "a bad thing\n"})
	l.waitState("app", "DIFF", bad[:8], "a bad thing")
	judged, calls := l.lines("/run/judged"), l.read("/run/app.calls")
	if judged != 2 {
		t.Errorf("two commits were judged %d times", judged)
	}

	u.commit(map[string]string{"README": "elsewhere"})
	l.waitRounds(u, 3)
	l.run("systemctl", "restart", "gitopper")
	l.waitRounds(u, 3)
	l.waitState("app", "DIFF", bad[:8], "a bad thing")
	if got := l.lines("/run/judged"); got != judged {
		t.Errorf("commits elsewhere, or a restart, made the check run %d times more", got-judged)
	}
	if got := l.read("/run/app.calls"); got != calls {
		t.Errorf("calls of the unit: %q, were %q", got, calls)
	}

	// It answers when it is done.
	if _, _, err := l.ssh("/do/pull app"); err != nil {
		t.Logf("do pull of a refused commit: %v", err)
	}
	if got := l.lines("/run/judged"); got != judged+1 {
		t.Errorf("do pull made the check run %d times, want 1", got-judged)
	}
	l.waitState("app", "DIFF", "a bad thing")

	fixed := u.commit(map[string]string{"app/conf": "fine\n"})
	l.waitCommit("app", fixed)
	l.waitFile("/run/app.seen", "fine\n")
}

// A unit that dies after it has settled, or that an administrator stops, is reported; no file is changed
// for it, and nothing is started.
func TestLabTrialLaterTroubleChangesNoFiles(t *testing.T) {
	l, u := newLab(t), newLabUpstream(t)
	l.witness("app", "/srv/app/conf", "")
	u.commit(map[string]string{"app/conf": "1\n"})
	l.configure(u, `
[[services]]
machine = "lab"
service = "app"
action = "reload"
settle = "50ms"
dirs = [ { local = "/srv/app", link = "app" } ]
`)
	l.start()
	l.waitFile("/run/app.seen", "1\n")
	last := u.commit(map[string]string{"app/conf": "2\n"})
	l.waitFile("/run/app.seen", "2\n")
	l.waitCommit("app", last)

	for _, tt := range []struct{ name, how string }{
		{name: "dies", how: "systemctl kill -s KILL app"},
		{name: "is stopped", how: "systemctl stop app"},
	} {
		stat := func() string { return l.run("stat", "-c", "%i %Z", "/srv/app/conf") }
		before, calls := stat(), l.lines("/run/app.calls")
		l.run("sh", "-c", tt.how)
		s := l.waitState("app", "BROKEN")
		if s.Hash != last[:8] {
			t.Errorf("%s: runs %s, want %s", tt.name, s.Hash, last)
		}
		l.waitRounds(u, 3)
		if got := l.read("/srv/app/conf"); got != "2\n" || stat() != before {
			t.Errorf("%s: the file is %q (%s), was (%s)", tt.name, got, stat(), before)
		}
		if got := l.lines("/run/app.calls"); got != calls {
			t.Errorf("%s: the unit was called: %q", tt.name, l.read("/run/app.calls"))
		}
		l.run("systemctl", "start", "app")
		l.waitState("app", "OK")
	}
	if got := l.refused("app", "fallback"); got != 0 {
		t.Errorf("%d commits taken back", got)
	}
}

// Only what a signer has signed, and what is newer than what ever ran, goes live.
func TestLabTrialSigners(t *testing.T) {
	l, u := newLab(t), newLabUpstream(t)
	dir := t.TempDir()
	signers := ""
	sign := map[string][]string{}
	for _, name := range []string{"alice", "bob", "expired", "stranger"} {
		key := filepath.Join(dir, name)
		labRun(t, "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", key)
		pub, err := os.ReadFile(key + ".pub")
		if err != nil {
			t.Fatal(err)
		}
		sign[name] = []string{"-c", "gpg.format=ssh", "-c", "user.signingKey=" + key, "-c",
			"commit.gpgSign=true"}
		switch name {
		case "expired":
			signers += name + `@lab namespaces="git",valid-before="20200101" ` + string(pub)
		case "alice", "bob":
			signers += name + `@lab namespaces="git" ` + string(pub)
		}
	}
	// A PGP key that git on the lab, left to itself, would be content with.
	home := filepath.Join(dir, "gnupg")
	if err := os.Mkdir(home, 0o700); err != nil {
		t.Fatal(err)
	}
	gpg := filepath.Join(dir, "gpg")
	if err := os.WriteFile(gpg, []byte("#!/bin/sh\nexec gpg --homedir "+home+" --batch --quiet \"$@\"\n"),
		0o755); err != nil {
		t.Fatal(err)
	}
	labRun(t, gpg, "--passphrase", "", "--quick-generate-key", "pgp@lab", "ed25519", "sign", "never")
	t.Cleanup(func() { labRun(t, "gpgconf", "--homedir", home, "--kill", "all") })
	l.write("/root/pgp.key", labRun(t, gpg, "--armor", "--export", "pgp@lab"))
	l.run("gpg", "--batch", "--quiet", "--import", "/root/pgp.key")
	sign["pgp"] = []string{"-c", "gpg.program=" + gpg, "-c", "gpg.format=openpgp", "-c",
		"user.signingKey=pgp@lab", "-c", "commit.gpgSign=true"}

	version := 0
	push := func(options []string) (hash, content string) {
		version++
		content = fmt.Sprintln("version", version)
		return u.commit(map[string]string{"app/conf": content}, options...), content
	}
	l.write("/etc/gitopper/signers", signers)
	old, _ := push(sign["alice"])
	l.configure(u, `
signers = "/etc/gitopper/signers"
[[services]]
machine = "lab"
service = "app"
dirs = [ { local = "/srv/app", link = "app" } ]
`)
	l.start()
	l.waitCommit("app", old)
	hash, content := push(sign["bob"])
	l.waitCommit("app", hash)
	l.waitFile("/srv/app/conf", content)

	good := hash
	for _, tt := range []struct {
		name  string
		again int // how often the commit before may be judged once more, as the list is another
		do    func() (hash string)
	}{
		{name: "unsigned", do: func() string { h, _ := push(nil); return h }},
		{name: "signed by a stranger", do: func() string { h, _ := push(sign["stranger"]); return h }},
		{name: "signed with an expired key", do: func() string { h, _ := push(sign["expired"]); return h }},
		{name: "signed with PGP", do: func() string { h, _ := push(sign["pgp"]); return h }},
		{name: "signed by a signer taken off the list", again: 1, do: func() string {
			l.write("/etc/gitopper/signers", slices.Collect(strings.Lines(signers))[0])
			h, _ := push(sign["bob"])
			return h
		}},
		{name: "an older one, signed, force-pushed", do: func() string {
			u.run("reset", "-q", "--hard", old)
			return old
		}},
		{name: "newer but signed beside what ran",
			do: func() string { h, _ := push(sign["alice"]); return h }},
	} {
		before := l.refused("app", "signers")
		bad := tt.do()
		l.waitState("app", "DIFF", bad[:8])
		l.waitRounds(u, 2)
		if got := l.read("/srv/app/conf"); got != content {
			t.Errorf("%s: live is %q, want %q", tt.name, got, content)
		}
		if s, err := l.status("app"); err != nil || s.Hash != good[:8] {
			t.Errorf("%s: %+v, %v, want %s", tt.name, s, err, good)
		}
		if n := l.refused("app", "signers") - before; n < 1 || n > 1+tt.again {
			t.Errorf("%s: refused %d times, want 1", tt.name, n)
		}
	}

	u.run("reset", "-q", "--hard", good)
	push(nil)
	hash, content = push(sign["alice"]) // vouches for the unsigned one below it
	l.waitCommit("app", hash)
	l.waitFile("/srv/app/conf", content)
}
