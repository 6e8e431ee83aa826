//go:build linux

package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// TestLabHost holds the lab to what the other tests build on.
func TestLabHost(t *testing.T) {
	l := newBareLab(t)
	u := newLabUpstream(t)
	first := u.commit(map[string]string{"a": "1\n"})
	if got := l.run("git", "ls-remote", u.url(), "main"); !strings.HasPrefix(got, first) ||
		u.looks.Load() != 1 {
		t.Errorf("ls-remote in the lab: %q, %d looks", got, u.looks.Load())
	}
	u.stop()
	if out, err := l.try("git", "ls-remote", u.url()); err == nil {
		t.Errorf("upstream is stopped and answers: %s", out)
	}
	u.start()
	l.run("git", "clone", "-q", "--filter=blob:none", u.url(), "/root/clone")

	l.unit("strict.service", `[Service]
Type=oneshot
PrivateTmp=yes
ProtectSystem=strict
ReadWritePaths=/root
ExecStart=sh -c "touch /tmp/mine && ! touch /etc/mine && cp /proc/sys/kernel/random/boot_id /root"
`)
	l.run("systemctl", "start", "strict")
	boot := l.read("/proc/sys/kernel/random/boot_id")
	if got := l.read("/root/boot_id"); len(got) != 37 || got != boot {
		t.Errorf("boot id in a unit: %q, outside: %q", got, boot)
	}

	pid, _ := labScript("pid", l.name)
	l.reboot()
	if now, _ := labScript("pid", l.name); now == pid {
		t.Errorf("PID 1 after the reboot is the same process, %s", pid)
	}
	if now := l.read("/proc/sys/kernel/random/boot_id"); len(now) != 37 || now == boot {
		t.Errorf("boot id after the reboot: %q, before: %q", now, boot)
	}
	if got := l.read("/root/clone/a"); got != "1\n" {
		t.Errorf("a file after the reboot: %q", got)
	}
	if _, err := l.try("test", "-e", "/tmp/mine"); err == nil {
		t.Error("a unit with PrivateTmp wrote to /tmp")
	}

	gone := exec.Command("testdata/lab", "up", l.name+"x")
	gone.Env = append(os.Environ(), "LAB_DIR="+labShared.dir)
	if err := gone.Start(); err != nil {
		t.Fatal(err)
	}
	holder := filepath.Join(labShared.dir, l.name+"x", "holder")
	labWait(t, time.Minute, "a lab is half up", func() error { _, err := os.Stat(holder); return err })
	gone.Process.Kill()
	gone.Wait()
	if out, err := labScript("down", l.name+"x"); err != nil {
		t.Fatal(err, out)
	}
	if _, err := os.Stat(filepath.Dir(holder)); err == nil {
		t.Error("down left files of a lab whose up was killed")
	}
	labWait(t, 10*time.Second, "a lab's processes are gone after down", func() error {
		groups, err := filepath.Glob("/proc/[0-9]*/cgroup")
		for _, group := range groups {
			if b, _ := os.ReadFile(group); bytes.Contains(b, []byte("/lab-"+l.name+"x-")) {
				return errors.New(group)
			}
		}
		return err
	})
}

// labPrometheus has Prometheus listen on a port of this lab's own.
func (l *labHost) labPrometheus() (api string) {
	l.t.Helper()
	port := labPort()
	l.write("/etc/systemd/system/prometheus.service.d/port.conf", fmt.Sprintf(`[Service]
ExecStart=
ExecStart=/usr/bin/prometheus --web.listen-address=127.0.0.1:%d --storage.tsdb.path=/var/lib/prometheus/metrics2/
`, port))
	l.run("systemctl", "daemon-reload")
	return fmt.Sprintf("http://127.0.0.1:%d", port)
}

// prometheusLoaded waits until the config that Prometheus says it runs with has a text in it, and returns
// when it was loaded.
func prometheusLoaded(t *testing.T, api, text string) (at string) {
	t.Helper()
	labWait(t, 3*time.Minute, "Prometheus runs with "+text, func() error {
		config, err := labGet(api + "/api/v1/status/config")
		if err == nil && !strings.Contains(config, text) {
			err = errors.New(config)
		}
		if err != nil {
			return err
		}
		metrics, err := labGet(api + "/metrics")
		for line := range strings.Lines(metrics) {
			if s, ok := strings.CutPrefix(line,
				"prometheus_config_last_reload_success_timestamp_seconds "); ok {
				at = s
			}
		}
		return err
	})
	return at
}

// A package that is not there is installed, its unit runs with the repository's config and with each pushed
// change of it, and is left alone by what is pushed elsewhere.
func TestLabPrometheusRunsWhatIsPushed(t *testing.T) {
	l := newBareLab(t)
	// Somebody's workstation may have it.
	l.run("sh", "-c", "! dpkg -s prometheus || apt-get purge -qq -y prometheus")
	u := newLabUpstream(t)
	api := l.labPrometheus()
	config := func(rollout int) string {
		return fmt.Sprintf("global:\n  external_labels:\n    rollout: r%d\n", rollout)
	}
	u.commit(map[string]string{"prometheus/etc/prometheus.yml": config(1), "README": "elsewhere"})
	l.configure(u, `
[[services]]
machine = "lab"
service = "prometheus"
user = "prometheus"
package = "prometheus"
action = "reload"
dirs = [ { local = "/etc/prometheus", link = "prometheus/etc" } ]
`)
	l.start()
	prometheusLoaded(t, api, "rollout: r1")
	want := []string{"/etc/prometheus: " + labCheckouts + "/prometheus/prometheus/etc"}
	if got := l.mounts("/etc/prometheus"); !slices.Equal(got, want) {
		t.Errorf("PID 1 has mounted %q, want %q", got, want)
	}
	l.waitState("prometheus", "OK")
	checkout := labCheckouts + "/prometheus"
	owners := l.run("stat", "-c", "%U", checkout, checkout+"/.git/HEAD", checkout+"/prometheus/etc",
		"/etc/prometheus/prometheus.yml")
	if owners != "root\nroot\nprometheus\nprometheus" {
		t.Errorf("owners of checkout, .git, link and file: %q", owners)
	}
	process := l.show("prometheus", "MainPID")

	u.commit(map[string]string{"prometheus/etc/prometheus.yml": config(2)})
	loaded := prometheusLoaded(t, api, "rollout: r2")
	// Elsewhere, also where the path begins alike.
	elsewhere := u.commit(map[string]string{"README": "changed", "prometheus/etcetera/x": "x",
		"prometheus/etc.yml": "x"})
	l.waitCommit("prometheus", elsewhere)
	l.waitRounds(u, 2)
	if again := prometheusLoaded(t, api, "rollout: r2"); again != loaded {
		t.Errorf("a push elsewhere reloaded: config of %s, was of %s", again, loaded)
	}
	if now := l.show("prometheus", "MainPID"); now != process {
		t.Errorf("a reload made main process %s from %s", now, process)
	}
	if got := l.mounts("/etc/prometheus"); !slices.Equal(got, want) {
		t.Errorf("PID 1 has mounted %q, want %q", got, want)
	}
}

// wrap has a program of the host append a line with its arguments to /run/NAME.calls each time it is
// started by name: from a directory that comes before the real one's in every $PATH.
func (l *labHost) wrap(name string) {
	l.t.Helper()
	real := l.run("which", name)
	// Whoever runs it may write there.
	l.run("install", "-m", "666", "/dev/null", "/run/"+name+".calls")
	l.write("/usr/local/bin/"+name, fmt.Sprintf("#!/bin/sh\necho \"$*\" >>/run/%s.calls\nexec %s \"$@\"\n",
		name, real))
}

// However many services there are on one upstream, a round in which nothing is new is one git process.
func TestLabIdleRoundIsOneGitProcess(t *testing.T) {
	const services, interval = 50, 2 * time.Second
	l, u := newLab(t), newLabUpstream(t)
	files, config := map[string]string{}, "action = \"reload\"\nsettle = \"10ms\"\n"
	for i := range services {
		name := fmt.Sprint("idle", i)
		files[name+"/conf"] = name
		l.write("/etc/systemd/system/"+name+".service",
			"[Service]\nExecStart=sleep infinity\nExecReload=true\n")
		config += fmt.Sprintf("[[services]]\nmachine = \"lab\"\nservice = %q\ndirs = [ { local = \"/etc/%[1]s\", link = %[1]q } ]\n", name)
	}
	last := u.commit(files)
	l.configure(u, config)
	l.wrap("git")
	l.wrap("systemctl")
	l.start("-t", interval.String())
	for i := range services {
		l.waitCommit(fmt.Sprint("idle", i), last)
	}
	l.waitRounds(u, 2)

	// A look is a git process and a request; between the two they differ for a moment.
	level := func() (gits, looks int64) {
		t.Helper()
		before, excess := int64(l.lines("/run/git.calls"))-u.looks.Load(), int64(0)
		labWait(t, time.Minute, "no look is under way", func() error {
			gits, looks = int64(l.lines("/run/git.calls")), u.looks.Load()
			if excess = gits - looks; excess != before {
				before = excess
				return errors.New("git was just started")
			}
			return nil
		})
		return gits, looks
	}
	l.run("touch", "/run/idle")
	l.run("truncate", "-s", "0", "/run/systemctl.calls")
	gits, looks := level()
	ops := l.metric("gitopper_machine_git_ops_total")
	start := time.Now()
	l.waitRounds(u, 5)
	moreGits, moreLooks := level()
	rounds := moreLooks - looks
	if n := moreGits - gits; n != rounds {
		t.Errorf("%d looks at upstream were %d git processes:\n%s", rounds, n,
			l.run("tail", "-n", "20", "/run/git.calls"))
	}
	if most := int64(time.Since(start)/interval) + 2; rounds > most {
		t.Errorf("%d looks in %v, want at most %d: one for all services", rounds, time.Since(start), most)
	}
	if n := int64(l.metric("gitopper_machine_git_ops_total") - ops); n < rounds-1 || n > rounds+1 {
		t.Errorf("gitopper counted %d git processes in %d looks", n, rounds)
	}
	for line := range strings.Lines(l.read("/run/systemctl.calls")) {
		if !strings.Contains(line, " list-units ") {
			t.Errorf("an idle round ran systemctl %s", line)
		}
	}
	if n, most := l.lines("/run/systemctl.calls"), int(time.Since(start)/interval)+2; n > most {
		t.Errorf("%d times systemctl in %v, want at most %d: one for all services", n, time.Since(start), most)
	}
	if got := l.run("find", "/var/lib/gitopper", labCheckouts, "-newer", "/run/idle"); got != "" {
		t.Errorf("written in idle rounds: %s", got)
	}
}

// A checkout is an ordinary one, of which only the linked paths are on disk, with all history.
func TestLabCheckoutIsSparseWithAllHistory(t *testing.T) {
	l, u := newLab(t), newLabUpstream(t)
	for i := range 20 {
		u.commit(map[string]string{
			"app/dir/sub/conf": fmt.Sprint(i), "app/dir.d/no": fmt.Sprint(i), "app/one.conf": fmt.Sprint(i), "app/other.conf": "no",
			"dir/sub/no": "no", "README": fmt.Sprint(i), "one.conf": "no",
		})
	}
	last := u.run("rev-parse", "HEAD")
	l.run("useradd", "--system", "--create-home", "app")
	l.configure(u, `
[[services]]
machine = "lab"
service = "app"
user = "app"
dirs = [ { local = "/srv/app", link = "app/dir" }, { local = "/srv/one.conf", link = "app/one.conf", file = true } ]
`)
	l.start()
	l.waitCommit("app", last)
	checkout := labCheckouts + "/app"
	if got := l.run("sh", "-c", "cd "+checkout+" && find . -path ./.git -prune -o -path ./.gitopper -prune -o -type f -print | sort"); got != "./app/dir/sub/conf\n./app/one.conf" {
		t.Errorf("on disk: %q", got)
	}
	git := func(args ...string) string {
		t.Helper()
		return l.run(append([]string{"git", "-C", checkout}, args...)...)
	}
	if got, want := git("log", "--format=%H"), u.run("log", "--format=%H"); got != want {
		t.Errorf("git log: %q, want %q", got, want)
	}
	if got := git("status", "--porcelain"); got != "" {
		t.Errorf("git status: %q", got)
	}
	// From the links down all is the user's, and all else is root's.
	if got := l.run("find", checkout+"/app/dir", checkout+"/app/one.conf", "!", "-user", "app"); got != "" {
		t.Errorf("not the user's: %s", got)
	}
	if got := l.run("sh", "-c", "cd "+checkout+" && find . -path ./app/dir -prune -o -path ./app/one.conf -prune -o ! -user root -print"); got != "" {
		t.Errorf("not root's: %s", got)
	}
	if got := l.run("stat", "-c", "%a", checkout+"/.git", checkout+"/.gitopper",
		"/var/lib/gitopper"); got != "700\n700\n711" {
		t.Errorf("modes of .git, .gitopper and the state directory: %q", got)
	}
	if l.read("/srv/app/sub/conf") != "19" || l.read("/srv/one.conf") != "19" {
		t.Errorf("mounted: %q and %q, want 19", l.read("/srv/app/sub/conf"), l.read("/srv/one.conf"))
	}
}

// With the unit that gitopper prints for itself, its mounts reach PID 1 and units that have mount
// namespaces of their own, also those made for later commits; promtool and systemd-analyze like what they
// see.
func TestLabMountsReachPrivateUnits(t *testing.T) {
	l, u := newLab(t), newLabUpstream(t)
	l.unit("strict.service", "[Service]\nPrivateTmp=yes\nProtectSystem=strict\nProtectHome=yes\nExecStart=sleep infinity\nExecReload=true\n")
	l.write("/etc/app/README", "")
	l.run("systemctl", "start", "strict")
	process := l.show("strict", "MainPID")
	l.configure(u, `
[[services]]
machine = "lab"
service = "strict"
action = "reload"
settle = "50ms"
dirs = [ { local = "/etc/app/dir", link = "app" }, { local = "/etc/app/file", link = "app/file", file = true } ]
`)
	for version := range 3 {
		content := fmt.Sprintln("version", version)
		hash := u.commit(map[string]string{"app/conf": content, "app/file": content})
		if version == 0 {
			l.start()
		}
		l.waitCommit("strict", hash)
		for _, file := range []string{"/etc/app/dir/conf", "/etc/app/file"} {
			if got := l.run("cat", "/proc/"+process+"/root"+file) + "\n"; got != content {
				t.Errorf("%d: the unit sees %q in %s, want %q", version, got, file, content)
			}
		}
		want := []string{"/etc/app/dir: " + labCheckouts + "/strict/app",
			"/etc/app/file: " + labCheckouts + "/strict/app/file"}
		if got := l.mounts("/etc/app"); !slices.Equal(got, want) {
			t.Errorf("%d: PID 1 has mounted %q, want %q", version, got, want)
		}
	}
	if now := l.show("strict", "MainPID"); now != process {
		t.Errorf("reloads made process %s from %s", now, process)
	}

	text, err := labGet(fmt.Sprintf("http://127.0.0.1:%d/metrics", l.metricPort))
	if err != nil {
		t.Fatal(err)
	}
	l.write("/root/metrics", text)
	if out, err := l.try("sh", "-c", "promtool check metrics </root/metrics 2>&1"); err != nil || out != "" {
		t.Errorf("promtool check metrics: %v: %s", err, out)
	}
	if out, err := l.try("sh", "-c", "systemd-analyze verify --man=no /etc/systemd/system/gitopper.service 2>&1"); err != nil || out != "" {
		t.Errorf("systemd-analyze verify: %v: %s", err, out)
	}
}

// After a reboot the mounts are there before anything that is ordered after gitopper starts, with upstream
// away; a unit that started on other files is told; a restart of gitopper alone does nothing to anybody.
func TestLabRebootAndRestart(t *testing.T) {
	l, u := newLab(t), newLabUpstream(t)
	// Starts before anything is mounted, and is managed.
	l.witness("early", "/srv/app/conf", "[Unit]\nBefore=gitopper.service\n[Install]\nWantedBy=multi-user.target")
	// Knows nothing of gitopper but its name.
	l.unit("late.service", "[Unit]\nAfter=gitopper.service\n[Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=cp /srv/app/conf /srv/file /run\n[Install]\nWantedBy=multi-user.target\n")
	hash := u.commit(map[string]string{"app/conf": "1\n", "app/file": "file\n"})
	l.configure(u, `
[[services]]
machine = "lab"
service = "early"
action = "reload"
settle = "100ms"
dirs = [ { local = "/srv/app", link = "app" }, { local = "/srv/file", link = "app/file", file = true } ]
`)
	l.start()
	l.waitCommit("early", hash)
	l.run("systemctl", "enable", "gitopper", "early", "late")

	quiet := func(when string) {
		t.Helper()
		seen := func() string {
			return l.read("/run/early.calls") + l.run("systemctl", "show", "early", "-p", "MainPID", "-p",
				"InvocationID", "-p", "StateChangeTimestampMonotonic")
		}
		l.waitRounds(u, 2)
		before := seen()
		l.run("systemctl", "restart", "gitopper")
		l.waitCommit("early", hash)
		l.waitRounds(u, 3)
		if after := seen(); after != before {
			t.Errorf("%s, a restart of gitopper touched the unit: %s, was: %s", when, after, before)
		}
	}
	quiet("after the first start")

	u.stop()
	l.reboot()
	l.waitFile("/run/conf", "1\n")
	l.waitFile("/run/file", "file\n")
	if got := l.show("late", "Result"); got != "success" {
		t.Errorf("the unit after gitopper: %s", got)
	}
	if first, _, _ := strings.Cut(l.read("/run/early.calls"), "\n"); first != "start" {
		t.Errorf("the unit before gitopper: first call %q", first)
	}
	l.waitFile("/run/early.seen", "1\n")
	want := []string{"/srv/app: " + labCheckouts + "/early/app",
		"/srv/file: " + labCheckouts + "/early/app/file"}
	if got := l.mounts("/srv"); !slices.Equal(got, want) {
		t.Errorf("PID 1 has mounted %q, want %q", got, want)
	}
	u.start()
	l.waitCommit("early", hash)
	quiet("after the reboot")
}
