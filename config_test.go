//go:build linux

package main

import (
	"fmt"
	"os"
	"os/exec"
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

const (
	configGlobal = `[global]
upstream = "https://example.org/c.git"
mount = "/srv/c"
keys = [{path = "k.pub"}]
`
	configEntry = configGlobal + `[[services]]
machine = "m"
service = "prometheus"
`
)

// configPair is a config with two entries for this machine, which answers to m and m2.
func configPair(a, b string) string {
	return configEntry + a + "\n[[services]]\nmachine = 'm2'\nservice = 'caddy'\n" + b
}

// configCase is a config, and what is said of it: lines that are all in the error; "" is nothing.
type configCase struct{ name, text, want string }

func (tc configCase) test(t *testing.T) { tc.run(t) }

// run returns what is said.
func (tc configCase) run(t *testing.T) (got string) {
	o := options{config: "/etc/gitopper/config.toml", stateDir: "/var/lib/gitopper"}
	o.names = []string{"m", "m2"}
	files := map[string]string{
		o.config: tc.text, "/etc/gitopper/k.pub": testKey, "/etc/gitopper/bad.pub": "ssh-ed25519 AAAA",
	}
	_, err := loadConfig(o, configFiles(files))
	if err != nil {
		got = strings.ReplaceAll(err.Error(), o.config+": ", "")
	}
	if !containsLines(got, tc.want) || tc.want == "" && got != "" {
		t.Errorf("got:\n%s\nwant in it:\n%s", got, tc.want)
	}
	return got
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

func TestConfigText(t *testing.T) {
	swap := func(old, now string) string { return strings.Replace(configEntry, old, now, 1) }
	for _, tc := range []configCase{
		{"minimal", configEntry, ""},
		{"no services", configGlobal, ""},
		{"names in capitals", configEntry + "Branch = 'x'\n", ""},
		{"all options", configEntry + `branch = "canary/1"
user = "prometheus"
package = "prometheus"
action = "reload"
check = ["promtool", "check"]
fallback = false
settle = "10s"
signers = "/etc/signers"
dirs = [{local = "/etc/prometheus", link = "prom/etc/"}, {link = "a/../b", file = true}]`, ""},

		{"unknown option", configEntry + "acton = 'reload'",
			`services[0] "prometheus": acton: unknown option, expected one of action, branch, check`},
		{"unknown table", configEntry + "[globall]\n", "top level: globall: unknown option"},
		{"no key", "[global]\n", "keys: at least one"},
		{"key without path", swap("path", "ro = true, path2"), "keys[0]: path2: unknown option"},
		{"missing key file", swap("k.pub", "/nope"), "keys[0]: open /nope: no such file"},
		{"bad key file", swap("k.pub", "bad.pub"), "keys[0]: /etc/gitopper/bad.pub: "},
		{"other machine is checked", configEntry + "[[services]]\nmachine='other'\nservice='a/b'\n",
			`services[1] "a/b": service "a/b"`},
		{"all at once", configEntry + "action='x'\nbranch='..'\nuser='-'\nsettle=5\nsigner=''",
			`services[0] "prometheus": branch "..": must be a valid branch name
services[0] "prometheus": user "-": must be an account name
services[0] "prometheus": action "x"
services[0] "prometheus": settle: must be a duration
services[0] "prometheus": signer: unknown option`},
	} {
		t.Run(tc.name, tc.test)
	}
}

// A syntax error is told with the line and column of the first character that can't stand there.
func TestConfigSyntax(t *testing.T) {
	for _, tc := range []configCase{
		{"end of a line", "[global\n", "line 1, column 8: expected '.' or ']'"},
		{"end of the file", "[global", "line 1, column 8: expected '.' or ']' to end table name, " +
			"but got end of file"},
		{"last line", configEntry + "[[services]\n", "line 8, column 12: expected"},
		{"no value", configEntry + "action =\n", "line 8, column 9: expected value"},
		{"no value at the end", configEntry + "action =", "line 8, column 9: unexpected EOF"},
		{"no value, as on Windows", "[global]\r\nmount = \r\n", "line 2, column 9: expected value"},
		{"no quotes", configEntry + "action = reload\n",
			`line 8, column 10: expected value but found "reload"`},
		{"no end of a string", configEntry + "action = 'reload\n", "line 8, column 17: strings cannot"},
		{"no end of the last string", "a = 'ä", "line 1, column 7: unexpected EOF"},
		{"no end of a list", configEntry + "check = ['a'", "line 8, column 13: expected a comma"},
		{"no end of a list of tables", configEntry + "dirs = [\n  {link = 'a'},\n", "line 9, column 16: "},
		{"no comma", configEntry + "dirs = [{local = '/a' link = 'b'}]",
			"line 8, column 23: expected a comma"},
		{"no comma between lines", "a = [\n  'b'\n  'c'\n]\n", "line 3, column 3: expected a comma"},
		{"two on a line", "a = 'é' b = 2\n", "line 1, column 9: expected a top-level item to end"},
		{"no digits", "a = -\n", "line 1, column 6: expected a digit"},
		{"no digits at the end", "a = +", "line 1, column 6: expected a digit but got end of file"},
		{"escape", `a = "\d+"`, `line 1, column 7: invalid escape in string '\d'`},
		{"option twice", "a = 1\na = 2\n", "line 2, column 1: Key 'a' has already been defined"},
		{"control character", "a = 'b\x01c'\n", "line 1, column 7: TOML files cannot contain control"},
		{"not UTF-8", "a = 1\nb = 'c\xff'\n", "line 2, column 7: invalid UTF-8 byte: 0xff"},
		{"not toml", "\x00", "line 1, column 1: "},
	} {
		t.Run(tc.name, tc.test)
	}
}

// A value of the wrong type is told with its line and column, in whichever entry it stands.
func TestConfigWrongType(t *testing.T) {
	for _, tc := range []configCase{
		{"in the first entry", configPair("branch = 5\n", "branch = 'b'"),
			`line 8, column 10: services[0] "prometheus": branch: must be a string`},
		{"in the last", configPair("branch = 'b'", "#branch = 4\n  branch =   5"),
			`line 13, column 14: services[1] "caddy": branch: must be a string`},
		{"list", configEntry + "check = 'nginx -t'",
			`line 8, column 9: services[0] "prometheus": check: must be a list of strings`},
		{"dirs", configEntry + "dirs = 'x'",
			`line 8, column 8: services[0] "prometheus": dirs: must be a list of tables`},
		{"in a dir", configEntry + "dirs = [{link = 'a'}, {link = 'ä', file = 'b'}]",
			`line 8, column 43: services[0] "prometheus": dirs[1]: file: must be true or false`},
		{"in a dir of many lines", configEntry + "dirs = [\n  {link = 'a'},\n  {link = 5},\n]",
			`line 10, column 11: services[0] "prometheus": dirs[1]: link: must be a string`},
		{"no dir", configEntry + "dirs = ['x']",
			`line 8, column 8: services[0] "prometheus": dirs[0]: must be a table`},
		{"settle", configEntry + "settle = '6m'",
			`line 8, column 10: services[0] "prometheus": settle: must be a duration of at most 5m, such`},
		{"settle without unit", configEntry + "settle = 5", `settle: must be a duration`},
		{"in global", strings.Replace(configEntry, `"/srv/c"`, "[]", 1),
			"line 3, column 9: [global]: mount: must be a string"},
		{"in a key", strings.Replace(configEntry, `"k.pub"`, "3", 1),
			"line 4, column 17: [global]: keys[0]: path: must be a string"},
		{"no global", "global = 3\n", "line 1, column 10: [global]: must be a table"},
		{"at the end of the file", configEntry + "fallback =   'no'",
			`line 8, column 14: services[0] "prometheus": fallback: must be true or false`},
		{"behind comments like it", configEntry +
			"# branch = 4\ncheck = ['a, branch = 3'] # , branch = 2\nbranch = 5",
			`line 10, column 10: services[0] "prometheus": branch: must be a string`},
		{"in a dir behind braces", configEntry +
			"dirs = [\n  # {link = 1},\n  {link = '{a}'}, # }\n  {link = 5},\n]",
			`line 11, column 11: services[0] "prometheus": dirs[1]: link: must be a string`},
		{"in a dir of the last entry",
			configPair("dirs = [{link = 'a'}, {link = 'b'}]", "dirs = [{link = 5}]"),
			`line 12, column 17: services[1] "caddy": dirs[0]: link: must be a string`},
		{"in a table of its own", configEntry +
			"[[services.dirs]]\nlink = 'a'\n[[services.dirs]]\nlink = 5\n",
			`line 11, column 8: services[0] "prometheus": dirs[1]: link: must be a string`},
		{"in a list of services", "services = [{machine = 'm', branch = 5}]\n" + configGlobal,
			"line 1, column 38: services[0]: branch: must be a string"},
		{"with [global] last", strings.TrimPrefix(configPair("mount = 3", ""), configGlobal) + configGlobal,
			`line 4, column 9: services[0] "prometheus": mount: must be a string`},
		{"in another case", configEntry + "Branch = 5",
			`line 8, column 10: services[0] "prometheus": Branch: must`},
		{"no services", "services = 3\n" + configGlobal,
			"line 1, column 12: top level: services: must be a list of tables"},
		{"written unusually", configEntry + "\"branch\" = 5",
			`services[0] "prometheus": branch: must be a string`},
	} {
		t.Run(tc.name, tc.test)
	}
}

func TestConfigRules(t *testing.T) {
	entry := func(lines string) string { return configEntry + lines }
	swap := func(old, now string) string { return strings.Replace(configEntry, old, now, 1) }
	for _, tc := range []configCase{
		{"no upstream", entry("upstream = ''"), `upstream "": required`},
		{"upstream is an option", entry("upstream = '--upload-pack=x'"),
			`upstream "--upload-pack=x": must be a URL`},
		{"upstream is a helper", entry("upstream = 'ext::sh -c x'"), "must not name a transport helper"},
		{"upstream of another kind", entry("upstream = 'ftp://x/y'"),
			"must be an https, http, ssh, git or file URL"},
		{"upstream is relative", entry("upstream = 'x/y'"), "a path must be absolute"},
		{"upstream with a password", entry("upstream = 'gopher://u:secret@h/y'"),
			`upstream "gopher://***@h/y"`},
		{"scp-like upstream", entry("upstream = 'git@example.org:x/y'"), ""},
		{"relative mount", entry("mount = 'x'"), `mount "x": required, must be absolute`},
		{"no machine", swap("machine", "#"), `machine "": required`},
		{"no such host", swap(`"m"`, `"*"`), `machine "*": `},
		{"service with slash", swap(`"prometheus"`, `"a/b"`), `service "a/b": required, must be a unit name`},
		{"service is an option", swap(`"prometheus"`, `"-a"`), `service "-a"`},
		{"user", entry("user = 'a b'"), `user "a b": must be an account name`},
		{"package", entry("package = '-y'"), `package "-y": must be a package name`},
		{"action", entry("action = 'relaod'"), `action "relaod": must be one of start, restart`},
		{"empty check", entry("check = []"), "check: must have at least one word"},
		{"signers", entry("signers = 'x'"), `signers "x": must be absolute`},
	} {
		t.Run(tc.name, tc.test)
	}
}

func TestConfigDirs(t *testing.T) {
	dirs := func(list string) string { return configEntry + "dirs = [" + list + "]" }
	for _, tc := range []configCase{
		{"local is /", dirs("{local='/x/..',link='a'}"), "must be an absolute path other than /"},
		{"local is relative", dirs("{local='etc',link='a'}"), "must be an absolute path"},
		{"local in mount", dirs("{local='/srv/c/x',link='a'}"),
			`must not be in, around or equal to mount "/srv/c"`},
		{"local of the system", dirs("{local='/etc/',link='a'}"),
			`local "/etc/": must not be a directory that a system stands on`},
		{"local of systemd", dirs("{local='/etc/systemd/system',link='a'}"), "that a system stands on"},
		{"local around the state", dirs("{local='/var/lib',link='a'}"), "that a system stands on"},
		{"local is the state", dirs("{local='/var/lib/gitopper',link='a'}"), "the state directory"},
		{"local is the config", dirs("{local='/etc/gitopper/config.toml',link='a'}"),
			"the directory of the config file"},
		{"local around the config", dirs("{local='/etc/gitopper',link='a'}"),
			"the directory of the config file"},
		{"local in state", dirs("{local='/var/lib/gitopper/x',link='a'}"),
			"must not be in, around or equal to the state directory"},
		{"locals nest", dirs("{local='/a',link='a'},{local='/a/b',link='b'}"),
			`dirs[1].local "/a/b": must not be in, around or equal to local "/a"`},
		{"locals are neighbours", dirs("{local='/a/b',link='a'},{local='/a/bc',link='b'}"), ""},
		{"only checked out", dirs("{link='a'},{link='b',local=''}"), ""},
		{"link is missing", dirs("{local='/a'}"), `dirs[0].link "": required`},
		{"link is absolute", dirs("{local='/a',link='/a'}"), `dirs[0].link "/a": must be relative`},
		{"link leaves", dirs("{local='/a',link='a/../../b'}"), "must be a path inside the repository"},
		{"link is everything", dirs("{local='/a',link='.'}"), "must be a path inside the repository"},
		{"mode and group", dirs("{link='a',mode='0440',group='ssl-cert'},{link='b',mode='640'},{link='a'," +
			"mode='0440',group='ssl-cert'}"), ""},
		{"mode is a number", dirs("{link='a',mode=440}"),
			`line 8, column 24: services[0] "prometheus": dirs[0]: mode: must be octal text such as "0440"`},
		{"mode is no octal", dirs("{link='a',mode='0480'}"), "dirs[0]: mode: must be octal text"},
		{"mode is symbolic", dirs("{link='a',mode='u=rw'}"), "dirs[0]: mode: must be octal text"},
		{"mode is setuid", dirs("{link='a',mode='4755'}"), "no setuid, setgid or sticky bit"},
		{"mode is for all to write", dirs("{link='a',mode='0666'}"), "not writable by others"},
		{"mode is for all to write in", dirs("{link='a',mode='0673'}"), "not writable by others"},
		{"mode keeps its owner out", dirs("{link='a',mode='0240'}"), "readable by its owner"},
		{"mode is empty", dirs("{link='a',mode=''}"), "dirs[0]: mode: must be octal text"},
		{"group", dirs("{link='a',group='a b'}"), `dirs[0].group "a b": must be a group's name`},
		{"modes of one link", dirs("{link='a',mode='0440'},{local='/a',link='./a/'}"),
			`dirs[1].link "a": must have the same mode and group wherever it is linked`},
		{"groups of one link", dirs("{link='a',group='adm'},{link='a'}"),
			"must have the same mode and group"},
		{"link into .git", dirs("{local='/a',link='x/.GIT/y'}"), "must not contain .git"},
	} {
		t.Run(tc.name, tc.test)
	}
}

// What is a branch's name is what git thinks it is.
func TestConfigBranch(t *testing.T) {
	for _, name := range strings.Fields("main a/b v1.0 a@b ä -x a..b a/ /a a//b .a a/.b a.lock a.lock/b a. " +
		"a~b a^b a:b a?b a* a[b a\\b @ HEAD a@{b a\x7fb lock a.lockb") {
		want := ""
		isRight := exec.Command("git", "check-ref-format", "--branch", name).Run() == nil
		if !isRight || name == "@" { // which it reads as HEAD

			want = "must be a valid branch name"
		}
		t.Run(name, configCase{text: configEntry + fmt.Sprintf("branch = %+q", name), want: want}.test)
	}
}

func TestConfigConflicts(t *testing.T) {
	for _, tc := range []configCase{
		{"service twice", configEntry + "[[services]]\nmachine='m'\nservice='prometheus.service'\n",
			`service "prometheus": twice on machine "m"`},
		{"twice by two names", configEntry + "[[services]]\nmachine='m2'\nservice='prometheus'\n",
			`service "prometheus": twice on machine`},
		{"on two machines", configEntry + "[[services]]\nmachine='other'\nservice='prometheus'\n", ""},
		{"locals nest", configPair("dirs=[{local='/etc/x',link='x'}]", "dirs=[{local='/etc/x/y',link='y'}]"),
			`"prometheus" and "caddy": locals "/etc/x" and "/etc/x/y": must not be the same or nest`},
		{"local in the other's checkout", configPair("dirs=[{local='/c/caddy/x',link='x'}]", "mount='/c'"),
			`service "prometheus": local "/c/caddy/x": must not be in, around or equal to checkout "/c/c`},
		{"checkouts nest", configPair("dirs=[{link='etc'}]", "mount='/srv/c/prometheus/other'"), ""},
		{"checkout is the other's link", configPair("dirs=[{link='caddy'}]", "mount='/srv/c/prometheus'"),
			`/srv/c/prometheus/caddy of "caddy": must not be at or below link /srv/c/prometheus/caddy`},
		{"checkout below the other's", configPair("dirs=[{link='etc'}]", "mount='/srv/c/prometheus/etc/x'"),
			`checkout /srv/c/prometheus/etc/x/caddy of "caddy": must not be at or below link`},
	} {
		t.Run(tc.name, tc.test)
	}
}

// TestConfigWrongDefaultIsToldOnce: not once for each entry that has it.
func TestConfigWrongDefaultIsToldOnce(t *testing.T) {
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

// Each mistake gives one line, whatever follows from it.
func TestConfigOneLineEach(t *testing.T) {
	global := func(line string) string { return strings.Replace(configEntry, "mount = \"/srv/c\"", line, 1) }
	for _, tc := range []configCase{
		{"misspelled option that is required", strings.Replace(configEntry, "machine", "machin", 1),
			`services[0] "prometheus": machin: unknown option, expected one of`},
		{"misspelled link", configEntry + "dirs = [{local = '/a', lnk = 'a'}]",
			"dirs[0]: lnk: unknown option"},
		{"misspelled path of a key", strings.Replace(configEntry, "path", "pth", 1), "keys[0]: pth: unknown"},
		{"wrong type of what entries need", global("mount = []"),
			"line 3, column 9: [global]: mount: must be"},
		{"wrong default", global("mount = 'c'"), `[global]: mount "c": required, must be absolute`},
		{"two entries without names", configGlobal + strings.Repeat("[[services]]\nmachine = 'm'\n", 2),
			"services[0]: service \"\": required\nservices[1]: service \"\": required"},
		{"two entries without machines", configGlobal + strings.Repeat("[[services]]\nservice = 'a'\n", 2),
			"services[0] \"a\": machine \"\": required\nservices[1] \"a\": machine \"\": required"},
		{"entry twice", configEntry + "dirs=[{local='/a',link='a'}]\n[[services]]\nmachine='m'\n" +
			"service='prometheus'\ndirs=[{local='/a',link='a'}]", `"prometheus": twice on machine "m"`},
		{"local of the system around another", configEntry +
			"dirs=[{local='/etc',link='a'},{local='/etc/b',link='b'}]",
			`dirs[0].local "/etc": must not be a directory that a system`},
		{"local / beside another service's",
			configPair("dirs=[{local='/',link='a'}]", "dirs=[{local='/b',link='b'}]"),
			`services[0] "prometheus": dirs[0].local "/": must be an absolute path other than /`},
		{"link that is wrong in two ways", configEntry + "dirs=[{link='/.git'}]",
			`dirs[0].link "/.git": must be relative`},
		{"garbage for an entry", "services = 'x'\n" + configGlobal, "services: must be a list of tables"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got := tc.run(t)
			if strings.Count(got, "\n") != strings.Count(tc.want, "\n") {
				t.Errorf("got:\n%s\nwant no other lines than:\n%s", got, tc.want)
			}
		})
	}
}

func TestConfigDefaults(t *testing.T) {
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
machine = "other"
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
	a := spec{
		upstream: "/u.git", branch: "b", mount: "/srv/c", machine: "m", service: "a", user: "u",
		action: "reload", settle: time.Second, signers: "/s",
	}
	b := a
	b.service, b.action, b.fallback, b.settle, b.user = "b", "", true, 0, ""
	if got, want := fmt.Sprint(c.services), fmt.Sprint([]spec{a, b}); got != want {
		t.Errorf("got  %v\nwant %v", got, want)
	}
	// Each machine once, in the file's order.
	got, want := fmt.Sprint(c.keys[0].path, c.keys[0].rights == mayLook, c.machines), "/c/k.pubtrue [m other]"
	if got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

// A config that was right is there for the next start, with its key files, but not for another config file.
func TestConfigKept(t *testing.T) {
	o := options{config: "/c/config.toml", names: []string{"m"}, stateDir: t.TempDir()}
	if c, err := loadKept(o); err == nil {
		t.Errorf("kept before there was one: %v", c)
	}
	c, err := loadConfig(o, configFiles(map[string]string{"/c/k.pub": testKey, o.config: configEntry}))
	if err == nil {
		err = c.keep(o.stateDir)
	}
	if err != nil {
		t.Fatal(err)
	}
	kept, err := loadKept(o)
	if err != nil {
		t.Fatal(err)
	}
	if got, want := fmt.Sprintf("%+v", kept), fmt.Sprintf("%+v", c); got != want {
		t.Errorf("got %s\nwant %s", got, want)
	}
	if fi, err := os.Stat(keptFile(o.stateDir)); err != nil || fi.Mode() != 0o600 {
		t.Errorf("%v, %v: want it to be root's alone", fi, err)
	}
	o.config = "/other/config.toml"
	if c, err := loadKept(o); err == nil {
		t.Errorf("kept for another file: %v", c)
	}
}

func FuzzLoadConfig(f *testing.F) {
	f.Add(configEntry + "dirs = [{local = '/l', link = 'a/b'}]\n")
	f.Add(configPair("check = 3", "dirs = ['x']\n"))
	f.Add("\x7f")
	f.Add("services = 3\n[global]\nkeys = {}\n")
	f.Fuzz(func(t *testing.T, text string) {
		o := options{config: "/etc/gitopper/c", names: []string{"m"}, stateDir: "/var/lib/gitopper"}
		files := map[string]string{o.config: text, "/etc/gitopper/k.pub": testKey}
		c, err := loadConfig(o, configFiles(files))
		if err != nil {
			return
		}
		for _, s := range c.services {
			again := s
			if len(again.validate(o.stateDir, o.config)) > 0 || fmt.Sprint(again) != fmt.Sprint(s) {
				t.Errorf("accepted, but not when looked at again: %+v", s)
			}
		}
	})
}
