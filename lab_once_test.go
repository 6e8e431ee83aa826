//go:build linux

package main

import (
	"fmt"
	"strings"
	"testing"
)

// dryRun returns what a dry run on the host prints, with its exit status as the last line.
func (l *labHost) dryRun() string {
	l.t.Helper()
	return l.run("sh", "-c", "gitopper -n -h lab -c /etc/gitopper/config.toml; echo $?")
}

// everything is all that a dry run could change on the host.
func (l *labHost) everything() string {
	l.t.Helper()
	return l.run("sh", "-c", "cat /proc/1/mountinfo; ls -A / /root /tmp /var/tmp /var/lib; "+
		"find /etc /srv /var/lib/*gitopper* /var/lib/dpkg /var/lib/nginx "+
		"-printf '%p %i %m %u %g %s %T@ %C@\\n'; true")
}

// TestLabFirstDay is what the README tells to do on a host that has an nginx of its own.
func TestLabFirstDay(t *testing.T) {
	l, u := newLab(t), newLabUpstream(t)
	port := labPort()
	conf := func(text string) string {
		return fmt.Sprintf("pid /run/nginx.pid; events {} http { include conf.d/*.conf; "+
			"server { listen 127.0.0.1:%d; location / { return 200 %q; } } }\n", port, text)
	}
	l.write("/etc/nginx/nginx.conf", conf("the host's"))
	l.run("systemctl", "start", "nginx")
	waitServed(t, port, "the host's")
	first := u.commit(map[string]string{"nginx/nginx.conf": conf("upstream's"), "nginx/conf.d/none.conf": "#\n"})
	l.configure(u, labPages+"action = \"reload\"\nsettle = \"1ms\"\ncheck = [\"nginx\", \"-t\"]\n")

	before := l.everything()
	want := fmt.Sprintf(`check nginx -t
write /etc/nginx/conf.d/none.conf (%.8[1]s)
write /etc/nginx/nginx.conf (%.8[1]s)
mount nginx/nginx.conf on /etc/nginx/nginx.conf, over what is there
mount nginx/conf.d on /etc/nginx/conf.d
reload nginx
3`, first)
	if got := l.dryRun(); got != want {
		t.Errorf("plan:\n%s\nwant:\n%s", got, want)
	}
	if after := l.everything(); after != before {
		for line := range strings.Lines(after) {
			if !strings.Contains(before, line) {
				t.Errorf("the dry run changed %s", line)
			}
		}
	}

	// The host's own comes into the repository, and then it is the same that is served.
	u.commit(map[string]string{"nginx/nginx.conf": l.read("/etc/nginx/nginx.conf")})
	l.run("gitopper", "--once", "-h", "lab", "-c", "/etc/gitopper/config.toml")
	waitServed(t, port, "the host's")
	if got := l.dryRun(); got != "0" {
		t.Errorf("after the pass:\n%s", got)
	}
	u.commit(map[string]string{"nginx/nginx.conf": conf("ours")})
	l.run("gitopper", "--once", "-h", "lab", "-c", "/etc/gitopper/config.toml")
	waitServed(t, port, "ours")

	// What was hidden is back when the service has left the config, which is told before.
	l.configure(u, "[[services]]\nmachine = \"lab\"\nservice = \"other\"\n")
	if got := l.dryRun(); !containsLines(got, "unmount /etc/nginx/nginx.conf\nunmount /etc/nginx/conf.d\n3") {
		t.Errorf("without the service:\n%s", got)
	}
	l.run("gitopper", "--once", "-h", "lab", "-c", "/etc/gitopper/config.toml")
	if got := l.read("/etc/nginx/nginx.conf"); got != conf("the host's") {
		t.Errorf("the host's own file: %s", got)
	}
}
