//go:build linux

package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// labPages is an entry for an nginx whose main file is mounted as a file, and whose sites as a directory.
const labPages = `
[[services]]
machine = "lab"
service = "nginx"
dirs = [
  { local = "/etc/nginx/nginx.conf", link = "nginx/nginx.conf", file = true },
  { local = "/etc/nginx/conf.d", link = "nginx/conf.d" },
]
`

// nginxConf is nginx's main file, of one version in every line.
func nginxConf(version int) string {
	line := fmt.Sprintf("# version %d\n", version)
	return strings.Repeat(line, 1000) + "worker_processes 1; pid /run/nginx.pid; events {} http { include conf.d/*.conf; } " + line
}

// nginxSite is a site that answers with its version.
func nginxSite(port, version int) string {
	line := fmt.Sprintf("# version %d\n", version)
	return strings.Repeat(line, 1000) + fmt.Sprintf("server { listen 127.0.0.1:%d; location / { return 200 v%d; } } %s", port, version, line)
}

// waitServed waits until a page has this text.
func waitServed(t *testing.T, port int, want string) {
	t.Helper()
	labWait(t, time.Minute, fmt.Sprintf("port %d serves %q", port, want), func() error {
		got, err := labGet(fmt.Sprintf("http://127.0.0.1:%d/", port))
		if err == nil && got != want {
			err = errors.New(got)
		}
		return err
	})
}

// often is how often a lab test tries what may go wrong by chance: all times only where there is time for it.
func often(normally, all int) int {
	if os.Getenv("GITOPPER_TEST_ALL") != "" {
		return all
	}
	return normally
}

// watchFile reads a file of the host in a loop until the returned function is called, which returns how many
// reads there were and the first of those that ok refused. The loop is tight where there is time for that.
func (l *labHost) watchFile(path string, ok func(content string) bool) (stop func() (reads int, bad string)) {
	path = filepath.Join(l.fs.Name(), path)
	done, result := make(chan struct{}), make(chan string, 1)
	reads, pause := 0, time.Duration(often(1, 0))*200*time.Microsecond
	go func() {
		bad := ""
		for ; ; reads++ {
			select {
			case <-done:
				result <- bad
				return
			default:
			}
			time.Sleep(pause)
			b, err := os.ReadFile(path)
			if (err != nil || !ok(string(b))) && bad == "" {
				bad = fmt.Sprintf("%s: read %d: error %v, %d bytes: %.40q ... %.40q", path, reads, err,
					len(b), b, b[max(0, len(b)-40):])
			}
		}
	}()
	return func() (int, string) {
		close(done)
		bad := <-result
		return reads, bad
	}
}

// While one commit after the other goes live, no reader finds a file missing, empty, or made of two commits.
func TestLabReadersFindWholeFiles(t *testing.T) {
	commits := often(100, 400)
	l, u := newLab(t), newLabUpstream(t)
	port := labPort()
	push := func(version int) {
		u.commit(map[string]string{"nginx/nginx.conf": nginxConf(version),
			"nginx/conf.d/site.conf": nginxSite(port, version)})
	}
	push(0)
	l.configure(u, labPages+"action = \"reload\"\nsettle = \"1ms\"\n")
	l.start("-t", "200ms")
	waitServed(t, port, "v0")
	l.waitState("nginx", "OK")

	whole := func(make func(version int) string) func(string) bool {
		return func(got string) bool {
			var version int
			_, err := fmt.Sscanf(got, "# version %d\n", &version)
			return err == nil && got == make(version)
		}
	}
	var last atomic.Int64
	file := l.watchFile("/etc/nginx/nginx.conf", whole(nginxConf))
	dir := l.watchFile("/etc/nginx/conf.d/site.conf", whole(func(version int) string {
		last.Store(int64(version))
		return nginxSite(port, version)
	}))
	for version := 1; version <= commits; version++ {
		push(version)
		labWait(t, time.Minute, fmt.Sprint("version ", version, " is live"), func() error {
			if got := last.Load(); got != int64(version) {
				return fmt.Errorf("version %d", got)
			}
			return nil
		})
	}
	for _, stop := range []func() (int, string){file, dir} {
		reads, bad := stop()
		if bad != "" {
			t.Error(bad)
		}
		t.Logf("%d reads", reads)
		if reads < 100*commits {
			t.Errorf("%d reads are too few to tell", reads)
		}
	}
	waitServed(t, port, fmt.Sprint("v", commits))
	l.waitFile("/etc/nginx/nginx.conf", nginxConf(commits))
}

// kill ends gitopper and all that it started, at once, and tells whether there was something to kill.
func (l *labHost) kill() bool {
	l.t.Helper()
	const group = "/sys/fs/cgroup/system.slice/gitopper.service"
	if l.lines(group+"/cgroup.procs") == 0 {
		return false
	}
	f, err := l.fs.OpenFile(group[1:]+"/cgroup.kill", os.O_WRONLY, 0)
	if errors.Is(err, os.ErrNotExist) { // before Linux 5.14, or between two of its lives
		_, err = l.try("systemctl", "kill", "-s", "KILL", "gitopper")
		return err == nil
	}
	if err != nil {
		l.t.Fatal(err)
	}
	defer f.Close()
	_, err = f.WriteString("1")
	return err == nil
}

// Killed with all its children at any moment, as often as it may be, it ends where it should.
func TestLabSurvivesKills(t *testing.T) {
	kills := often(100, 400)
	l, u := newLab(t), newLabUpstream(t)
	l.witness("app", "/etc/app/dir/conf", "")
	version := 0
	push := func() {
		version++
		files := map[string]string{
			"app/conf":                      fmt.Sprintln("version", version),
			"app/file":                      fmt.Sprintln("file", version),
			fmt.Sprint("app/new/", version): "",
		}
		// What a commit that never got to its end has brought must go again with the next one, too.
		if version > 1 {
			files[fmt.Sprint("app/new/", version-1)] = labGone
		}
		u.commit(files)
	}
	push()
	l.configure(u, `
[[services]]
machine = "lab"
service = "app"
action = "reload"
settle = "50ms"
dirs = [ { local = "/etc/app/dir", link = "app" }, { local = "/etc/app/file", link = "app/file", file = true } ]
`)
	l.start("-t", "200ms")
	l.waitFile("/run/app.seen", "version 1\n")

	moments := labMoments(t, 0)
	// What is under way from the start of the daemon to some time after the commit's unit was told is to be
	// met, however slow this machine is today.
	push()
	l.kill()
	start := time.Now()
	l.waitFile("/run/app.seen", fmt.Sprintln("version", version))
	span := min(max(time.Since(start)*3/2, 300*time.Millisecond), 2*time.Second)
	t.Logf("kills within %v of a start", span)
	for killed := 0; killed < kills; {
		push()
		time.Sleep(time.Duration(moments.Int64N(int64(span)))) // not a wait for anything
		if l.kill() {
			killed++
		}
	}
	push()
	last := u.run("rev-parse", "HEAD")
	l.waitCommit("app", last)
	l.waitFile("/run/app.seen", fmt.Sprintln("version", version))
	l.waitFile("/etc/app/dir/conf", fmt.Sprintln("version", version))
	l.waitFile("/etc/app/file", fmt.Sprintln("file", version))
	l.waitRounds(u, 2)

	checkout := labCheckouts + "/app"
	if got := l.run("git", "-C", checkout, "status", "--porcelain"); got != "" {
		t.Errorf("git status: %s", got)
	}
	if got := l.run("git", "-C", checkout, "rev-parse", "HEAD"); got != last {
		t.Errorf("HEAD is %s, want %s", got, last)
	}
	l.run("git", "-C", checkout, "fsck", "--connectivity-only")
	if got := l.run("find", checkout+"/.git", "-name", "*.lock"); got != "" {
		t.Errorf("locks left: %s", got)
	}
	if got, want := l.run("ls", checkout+"/app/new"), u.run("ls-tree", "--name-only",
		"HEAD:app/new"); got != want {
		t.Errorf("files: %q, want %q", got, want)
	}
	want := []string{"/etc/app/dir: " + checkout + "/app", "/etc/app/file: " + checkout + "/app/file"}
	if got := l.mounts("/etc/app"); !slices.Equal(got, want) {
		t.Errorf("PID 1 has mounted %q, want %q", got, want)
	}
}
