package main

import (
	"fmt"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"
)

// configFiles is a reader of files that are in memory.
func configFiles(files map[string]string) func(string) ([]byte, error) {
	return func(name string) ([]byte, error) {
		if text, ok := files[name]; ok {
			return []byte(text), nil
		}
		return nil, &os.PathError{Op: "open", Path: name, Err: syscall.ENOENT}
	}
}

func TestLoadConfig(t *testing.T) {
	global := "[global]\nupstream = \"https://example.org/c.git\"\nmount = \"/srv/c\"\nkeys = [{path = \"k.pub\"}]\n"
	entry := func(lines string) string {
		return global + "[[services]]\nmachine = \"m\"\nservice = \"prometheus\"\n" + lines
	}
	pair := func(a, b string) string {
		return entry(a) + "[[services]]\nmachine = \"m2\"\nservice = \"caddy\"\n" + b
	}
	for _, tc := range []struct{ name, text, want string }{
		{"minimal", entry(""), ""},
		{"all options", entry(`branch = "canary/1"
user = "prometheus"
package = "prometheus"
action = "reload"
check = ["promtool", "check"]
fallback = false
settle = "10s"
signers = "/etc/signers"
dirs = [{local = "/etc/prometheus", link = "prom/etc/"}, {link = "a/../b", file = true}]`), ""},
		{"names in capitals", entry("Branch = \"x\"\n"), ""},
		{"no services", global, ""},
		{"same machine by two names", pair("dirs=[{local=\"/etc/x\",link=\"x\"}]\n", "dirs=[{local=\"/etc/x/y\",link=\"y\"}]"), `locals "/etc/x" and "/etc/x/y"`},
		{"syntax", "[global\n", "line 1, column 8: expected"},
		{"syntax at the end", entry("") + "[[services]\n", "line 8, column 12: expected"},
		{"not toml", "\x00", "line 1"},
		{"unknown option", entry("acton = \"reload\""), `services[0] "prometheus": acton: unknown option, expected one of action, branch, check`},
		{"unknown table", entry("[globall]\n"), "top level: globall: unknown option"},
		{"wrong type", entry("branch = 5\ndirs = \"x\"\ncheck = \"nginx -t\""), `"prometheus": branch: must be a string` + "\n" + `"prometheus": check: must be a list of strings` + "\n" + `"prometheus": dirs: must be a list of tables`},
		{"no key", "[global]\n", "keys: at least one"},
		{"key without path", strings.Replace(entry(""), "path", "ro = true, path2", 1), "keys[0]: path2: unknown option"},
		{"missing key file", strings.Replace(entry(""), "k.pub", "/nope", 1), "keys[0]: open /nope: no such file"},
		{"bad key file", strings.Replace(entry(""), "k.pub", "bad.pub", 1), "keys[0]: /etc/gitopper/bad.pub: "},
		{"no upstream", strings.Replace(entry(""), "upstream = \"https://example.org/c.git\"", "", 1), `upstream "": required`},
		{"upstream is an option", entry("upstream = \"--upload-pack=x\""), `upstream "--upload-pack=x": must be a URL`},
		{"upstream is a helper", entry("upstream = \"ext::sh -c x\""), "must not name a transport helper"},
		{"upstream of another kind", entry("upstream = \"ftp://x/y\""), "must be an https, http, ssh, git or file URL"},
		{"upstream is relative", entry("upstream = \"x/y\""), "a path must be absolute"},
		{"upstream with a password", entry("upstream = \"gopher://u:secret@h/y\""), `upstream "gopher://***h/y"`},
		{"scp-like upstream", entry("upstream = \"git@example.org:x/y\""), ""},
		{"branch", entry("branch = \"a..b\""), `branch "a..b": must be a valid branch name`},
		{"branch is an option", entry("branch = \"-x\""), `branch "-x"`},
		{"relative mount", entry("mount = \"x\""), `mount "x": required, must be absolute`},
		{"service with slash", strings.Replace(entry(""), `"prometheus"`, `"a/b"`, 1), `service "a/b": required, must be a unit name`},
		{"service is an option", strings.Replace(entry(""), `"prometheus"`, `"-a"`, 1), `service "-a"`},
		{"no machine", strings.Replace(entry(""), "machine", "#", 1), `machine "": required`},
		{"user", entry("user = \"a b\""), `user "a b": must be an account name`},
		{"package", entry("package = \"-y\""), `package "-y": must be a package name`},
		{"action", entry("action = \"relaod\""), `action "relaod": must be one of start, restart`},
		{"empty check", entry("check = []"), "check: must have at least one word"},
		{"settle", entry("settle = \"6m\""), `"prometheus": settle: must be a duration of at most 5m, such as "3s"`},
		{"settle without unit", entry("settle = 5"), `settle: must be a duration`},
		{"signers", entry("signers = \"x\""), `signers "x": must be absolute`},
		{"local is /", entry(`dirs=[{local="/x/..",link="a"}]`), "must be an absolute path other than /"},
		{"local is relative", entry(`dirs=[{local="etc",link="a"}]`), "must be an absolute path"},
		{"local in mount", entry(`dirs=[{local="/srv/c/x",link="a"}]`), `must not be in, around or equal to mount "/srv/c"`},
		{"local of the system", entry(`dirs=[{local="/etc/",link="a"}]`), `local "/etc/": must not be a directory that a system stands on`},
		{"local around the config", entry(`dirs=[{local="/etc/gitopper",link="a"}]`), `the directory of the config file`},
		{"local in state", entry(`dirs=[{local="/var/lib/gitopper/x",link="a"}]`), `must not be in, around or equal to the state directory`},
		{"locals nest", entry(`dirs=[{local="/a",link="a"},{local="/a/b",link="b"}]`), `locals "/a" and "/a/b": must not be the same or nest`},
		{"link is missing", entry(`dirs=[{local="/a"}]`), "dirs[0].link: required"},
		{"link is absolute", entry(`dirs=[{local="/a",link="/a"}]`), `dirs[0].link "/a": must be relative`},
		{"link leaves", entry(`dirs=[{local="/a",link="a/../../b"}]`), "must be a path inside the repository"},
		{"link is everything", entry(`dirs=[{local="/a",link="."}]`), "must be a path inside the repository"},
		{"link into .git", entry(`dirs=[{local="/a",link="x/.GIT/y"}]`), "must not contain .git"},
		{"service twice", entry("") + "[[services]]\nmachine=\"m\"\nservice=\"prometheus.service\"\n", `service "prometheus": twice on machine "m"`},
		{"service on two machines", entry("") + "[[services]]\nmachine=\"other\"\nservice=\"prometheus\"\n", ""},
		{"checkouts nest", entry("") + "[[services]]\nmachine=\"m\"\nservice=\"x\"\nmount=\"/srv/c/prometheus/etc\"\ndirs=[{link=\"a\"}]\n" + "[[services]]\nmachine=\"m\"\nservice=\"y\"\nmount=\"/srv/c/prometheus/etc/x/a\"\n", `link`},
		{"same checkout", entry("") + "[[services]]\nmachine=\"m2\"\nservice=\"prometheus\"\n", `"prometheus": twice on machine`},
		{"no such host", strings.Replace(entry(""), `machine = "m"`, `machine = "*"`, 1), `machine "*": `},
		{"other machine is checked", entry("") + "[[services]]\nmachine=\"other\"\nservice=\"a/b\"\n", `services[1] "a/b": service "a/b"`},
		{"all at once", entry("action=\"x\"\nbranch=\"..\"\nuser=\"-\""), "branch \"..\": must be a valid branch name\n/etc/gitopper/config.toml: services[0] \"prometheus\": user \"-\": must be an account name\n/etc/gitopper/config.toml: services[0] \"prometheus\": action \"x\""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			o := options{config: "/etc/gitopper/config.toml", names: []string{"m", "m2"}, stateDir: "/var/lib/gitopper"}
			c, err := loadConfig(o, configFiles(map[string]string{o.config: tc.text, "/etc/gitopper/k.pub": testKey, "/etc/gitopper/bad.pub": "ssh-ed25519 AAAA"}))
			if tc.want == "" && err != nil || tc.want != "" && err == nil {
				t.Fatalf("got %v and %v, want an error with %q", c, err, tc.want)
			}
			if err != nil && !strings.Contains(strings.ReplaceAll(err.Error(), "/etc/gitopper/config.toml: services[0] \"prometheus\": check", "\"prometheus\": check"), tc.want) &&
				!containsLines(err.Error(), tc.want) {
				t.Errorf("got:\n%v\nwant in it:\n%s", err, tc.want)
			}
		})
	}
}

// containsLines says whether every line of want is in text.
func containsLines(text, want string) bool {
	for l := range strings.SplitSeq(want, "\n") {
		if !strings.Contains(text, l) {
			return false
		}
	}
	return true
}

// TestWrongDefaultIsToldOnce: not once for each entry that has it.
func TestWrongDefaultIsToldOnce(t *testing.T) {
	o := options{config: "/c/config.toml", names: []string{"m"}, stateDir: "/var/lib/gitopper"}
	_, err := loadConfig(o, configFiles(map[string]string{"/c/k.pub": testKey, o.config: `[global]
upstream = "/u.git"
mount = "/srv"
branch = ".."
keys = [{path = "k.pub"}]
[[services]]
machine = "m"
service = "a"
[[services]]
machine = "m"
service = "b"
branch = "a..b"
`}))
	want := `/c/config.toml: [global]: branch "..": must be a valid branch name
/c/config.toml: services[1] "b": branch "a..b": must be a valid branch name`
	if err == nil || err.Error() != want {
		t.Errorf("got:\n%v\nwant:\n%s", err, want)
	}
}

func TestLoadConfigMergesDefaults(t *testing.T) {
	o := options{config: "/c/config.toml", names: []string{"m"}, stateDir: "/var/lib/gitopper"}
	c, err := loadConfig(o, configFiles(map[string]string{"/c/k.pub": testKey, o.config: `[global]
upstream = "/u.git"
branch = "b"
mount = "/srv//c/"
user = "u"
action = "reload"
fallback = false
settle = "1s"
signers = "/s"
keys = [{path = "k.pub", ro = true}]
[[services]]
machine = "m"
service = "a"
[[services]]
machine = "m"
service = "b"
action = ""
fallback = true
settle = "0s"
user = ""
`}))
	if err != nil {
		t.Fatal(err)
	}
	a := spec{upstream: "/u.git", branch: "b", mount: "/srv/c", machine: "m", service: "a", user: "u", action: "reload", settle: time.Second, signers: "/s"}
	b := a
	b.service, b.action, b.fallback, b.settle, b.user = "b", "", true, 0, ""
	if got, want := fmt.Sprint(c.services), fmt.Sprint([]spec{a, b}); got != want {
		t.Errorf("got  %v\nwant %v", got, want)
	}
	if got, want := fmt.Sprint(c.keys[0].path, c.keys[0].ro, c.machines), "/c/k.pubtrue [m]"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

func FuzzLoadConfig(f *testing.F) {
	f.Add("[global]\nupstream = \"/u\"\nmount = \"/m\"\nkeys = [{path = \"/k\"}]\n[[services]]\nmachine = \"m\"\nservice = \"s\"\ndirs = [{local = \"/l\", link = \"a/b\"}]\n")
	f.Add("\x7f")
	f.Add("services = 3\n[global]\nkeys = {}\n")
	f.Fuzz(func(t *testing.T, text string) {
		o := options{config: "/c", names: []string{"m"}, stateDir: "/var/lib/gitopper"}
		c, err := loadConfig(o, configFiles(map[string]string{"/c": text, "/k": testKey}))
		if err != nil {
			return
		}
		for _, s := range c.services {
			if again := s; len(again.validate(o.stateDir, o.config)) > 0 || fmt.Sprint(again) != fmt.Sprint(s) {
				t.Errorf("accepted, but not when looked at again: %+v", s)
			}
		}
	})
}
