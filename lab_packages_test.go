//go:build linux

package main

import (
	"fmt"
	"os"
	"strings"
	"testing"
	"time"
)

// packageFamily is a family of distributions, with its own package manager and a repository that the test
// makes: hello has a daemon and its unit; sour says "no licence key" and fails to be installed; bitter is
// there in the end, although its script, or sour's, fails; and big is too big, or not to be had.
type packageFamily struct {
	name, osRelease string
	tools           string // what Debian calls the packages of the package manager
	repository      string // a script that makes and announces the repository; /srv/tree is what hello has
	query, remove   string // the program that is asked, and how an administrator removes hello
	sour, big       string // what is said of these
}

var packageFamilies = []packageFamily{{
	name: "apt", osRelease: "ID=debian\n", query: "dpkg-query", remove: "dpkg --remove hello",
	sour: "sour: no licence key; dpkg: error processing package sour (--configure)",
	big:  "No space left on device",
	repository: `
control='Package: %s\nVersion: 1\nArchitecture: all\nMaintainer: lab <lab@example.org>\nDescription: lab\n'
for p in hello sour bitter big; do mkdir -p $p/DEBIAN; printf "$control" $p >$p/DEBIAN/control; done
cp -r /srv/tree/. hello
printf '#!/bin/sh\necho "sour: no licence key"\nexit 1\n' >sour/DEBIAN/postinst
chmod 755 sour/DEBIAN/postinst
mkdir -p big/opt/big /opt/big
head -c 1000000 /dev/urandom >big/opt/big/blob
mount -t tmpfs -o size=100k tmpfs /opt/big
for p in hello sour bitter big; do
  dpkg-deb --root-owner-group --build $p
  dpkg-deb -f $p.deb
  echo "Filename: ./$p.deb"
  echo "Size: $(stat -c %s $p.deb)"
  echo "SHA256: $(sha256sum <$p.deb | cut -d' ' -f1)"
  echo
done | grep -v ^dpkg-deb: >Packages
rm -rf /etc/apt/sources.list* /var/lib/apt/lists
echo "deb [trusted=yes] file:$PWD ./" >/etc/apt/sources.list`,
}}

// otherFamilies are tried where there is time to install them.
var otherFamilies = []packageFamily{{
	name: "dnf", osRelease: "ID=rocky\nID_LIKE=\"rhel centos fedora\"\n",
	query: "rpm", remove: "rpm -e hello", tools: "dnf rpm createrepo-c",
	repository: rpmRepository + "mkdir -p /etc/yum.repos.d\nmv lab.repo /etc/yum.repos.d\n",
	sour:       "sour: no licence key; error: %prein(sour-1-1.noarch) scriptlet failed",
	big:        "No match for argument: big",
}, {
	name: "zypper", osRelease: "ID=opensuse-leap\nID_LIKE=\"suse opensuse\"\n",
	query: "rpm", remove: "rpm -e hello", tools: "zypper rpm createrepo-c",
	repository: rpmRepository + "mkdir -p /etc/zypp/repos.d\nmv lab.repo /etc/zypp/repos.d\n",
	sour:       "sour: no licence key; error: %prein(sour-1-1.noarch) scriptlet failed",
	big:        "No provider of 'big' found",
}, {
	name: "pacman", osRelease: "ID=arch\n", query: "pacman", remove: "pacman -R --noconfirm hello",
	tools: "pacman-package-manager makepkg fakeroot libarchive-tools binutils",
	sour:  "sour: no licence key; error: command failed to execute correctly",
	big:   "error: target not found: big",
	// The outcome of a package's own script means nothing to pacman, that of a hook does.
	repository: `
useradd --create-home --system builder
for p in hello sour bitter; do
  mkdir $p
  printf 'pkgname=%s\npkgver=1\npkgrel=1\narch=(any)\n' $p >$p/PKGBUILD
  echo 'package() { [[ $pkgname != hello ]] || cp -r /srv/tree/. "$pkgdir"; }' >>$p/PKGBUILD
done
echo 'install=bitter.install' >>bitter/PKGBUILD
echo 'post_install() { echo bitter; false; }' >bitter/bitter.install
mkdir -p /etc/pacman.d/hooks
cat >/etc/pacman.d/hooks/sour.hook <<X
[Trigger]
Type=Package
Operation=Install
Target=sour
[Action]
When=PreTransaction
Exec=/bin/sh -c "echo 'sour: no licence key'; exit 1"
AbortOnFail
X
chown -R builder .
for p in hello sour bitter; do (cd $p; setpriv --reuid=builder --clear-groups makepkg -d); done
repo-add lab.db.tar.gz */*.pkg.tar.*
mv */*.pkg.tar.* .
printf '[options]\nArchitecture = auto\nSigLevel = Never\n' >/etc/pacman.conf
printf '[lab]\nServer = file://%s\n' "$PWD" >>/etc/pacman.conf
pacman -Sy`,
}}

// Debian's rpm keeps its database elsewhere than those of the others, and nobody brings it a shell.
const rpmRepository = `
mkdir -p /etc/rpm /var/lib/rpm
echo '%_dbpath /var/lib/rpm' >/etc/rpm/macros
for p in hello sour bitter shell; do
  printf 'Name: %s\nVersion: 1\nRelease: 1\nSummary: lab\nLicense: none\nBuildArch: noarch\n' $p >$p.spec
done
echo 'Provides: /bin/sh' >>shell.spec
for p in hello sour bitter shell; do printf '%%description\nlab\n' >>$p.spec; done
printf '%%install\nmkdir -p %%{buildroot}\ncp -r /srv/tree/. %%{buildroot}\n' >>hello.spec
printf '%%pre\necho "sour: no licence key"\nexit 1\n' >>sour.spec
printf '%%post\necho bitter\nexit 1\n' >>bitter.spec
for p in hello sour bitter shell; do
  printf '%%files\n' >>$p.spec
  [ $p != hello ] || printf '/usr/bin/hellod\n/usr/lib/systemd/system/hello.service\n' >>$p.spec
  rpmbuild -bb --quiet --define "_rpmdir $PWD" --define "__spec_install_post %nil" $p.spec
done
createrepo_c -q .
printf '[lab]\nname=lab\nbaseurl=file://%s\ngpgcheck=0\nenabled=1\n' "$PWD" >lab.repo
`

// Each family's package manager, with a real repository: a package is installed, asked for once, and
// installed again when it was removed; one that fails says why, and is in no other's way.
func TestLabPackages(t *testing.T) {
	families := packageFamilies
	if os.Getenv("GITOPPER_TEST_ALL") != "" {
		families = append(otherFamilies, families...)
	}
	l, u := newBareLab(t), newLabUpstream(t)
	l.write("/srv/tree/usr/bin/hellod", "#!/bin/sh\ncp /etc/hello/conf /run/hello\nexec sleep infinity\n")
	l.write("/srv/tree/usr/lib/systemd/system/hello.service",
		"[Service]\nExecStart=/usr/bin/hellod\nExecReload=cp /etc/hello/conf /run/hello\n")
	l.run("chmod", "-R", "a+rX", "/srv")
	u.commit(map[string]string{"hello/conf": "0\n"})
	for _, f := range families {
		if f.tools != "" {
			l.run("sh", "-c", "DEBIAN_FRONTEND=noninteractive "+
				"apt-get install -qq -y --no-install-recommends "+f.tools)
		}
	}
	for i, f := range families {
		l.family(f)
		l.familyInstalls(u, f, fmt.Sprintln(i+1))
		l.familyFails(u, f)
	}
}

const helloEntry = `
settle = "50ms"
[[services]]
machine = "lab"
service = "hello"
package = "hello"
action = "reload"
dirs = [ { local = "/etc/hello", link = "hello" } ]
`

// family makes the host one of a family's.
func (l *labHost) family(f packageFamily) {
	l.t.Helper()
	dir := "/srv/" + f.name
	l.write(dir+"/make", "set -ex\ncd "+dir+f.repository)
	l.run("sh", dir+"/make")
	l.run("rm", "-f", "/usr/local/bin/"+f.query)
	l.wrap(f.query)
	l.write("/etc/os-release", f.osRelease)
}

// familyInstalls tries what is there for the package hello.
func (l *labHost) familyInstalls(u *labUpstream, f packageFamily, version string) {
	l.t.Helper()
	asked := func() int { return strings.Count(l.read("/run/"+f.query+".calls"), "-- hello\n") }
	l.configure(u, helloEntry)
	l.start()
	l.waitState("hello", "OK")
	commit := u.commit(map[string]string{"hello/conf": version})
	l.waitCommit("hello", commit)
	l.waitFile("/run/hello", version)
	process, before := l.show("hello", "MainPID"), asked()
	l.waitRounds(u, 5)
	if n := asked() - before; n > 0 || before == 0 {
		l.t.Errorf("%s: in idle rounds %s was asked %d times, before %d times", f.name, f.query, n, before)
	}

	l.run("sh", "-c", f.remove)
	labWait(l.t, time.Minute, f.name+" has hello again", func() error {
		_, err := l.fs.Stat("usr/bin/hellod")
		return err
	})
	l.waitCommit("hello", commit)
	if now := l.show("hello", "MainPID"); now != process {
		l.t.Errorf("%s: a package that came back made process %s from %s", f.name, now, process)
	}
}

// familyFails tries what is there for packages that are in trouble, and makes place for another family's.
func (l *labHost) familyFails(u *labUpstream, f packageFamily) {
	l.t.Helper()
	config := helloEntry
	for _, name := range []string{"sour", "bitter", "big"} {
		config += fmt.Sprintf("[[services]]\nmachine = \"lab\"\nservice = %q\npackage = %[1]q\n"+
			"dirs = [ { local = \"/etc/%[1]s\", link = \"hello\" } ]\n", name)
	}
	l.configure(u, config)
	l.run("systemctl", "restart", "gitopper")
	l.waitState("sour", "BROKEN", f.sour)
	l.waitState("big", "BROKEN", f.big)
	l.waitState("bitter", "OK")
	l.waitState("hello", "OK")
	l.run("systemctl", "stop", "gitopper", "hello")
	l.run("sh", "-c", f.remove)
}
