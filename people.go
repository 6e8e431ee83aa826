//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
)

// takeDirectory makes the service's directory, root's down to the links. One that is not so (an older
// gitopper's checkout, another user's, something planted) makes place for a new one, into which links that
// are the account's are moved, each by one rename that mounts follow; it is kept whole beside it, and nothing
// of it is opened.
func (f *files) takeDirectory() error {
	top, err := makePlace(f.dir, aDirectory, account{uid: os.Getuid(), gid: os.Getgid()})
	if err != nil {
		return err
	}
	defer top.close()
	parent, err := openSteady(filepath.Dir(f.dir))
	if err != nil {
		return err
	}
	defer parent.close()

	base := filepath.Base(f.dir)
	if !f.isLaidOut(top) {
		if err = f.startAnew(); err == nil {
			err = f.layOutAnew(parent, base, top)
		}
	}
	if _, missing := parent.lstat(base + ".new"); missing == nil {
		if err == nil {
			err = f.takeOver(parent, base)
		}
	}
	if err != nil {
		return fmt.Errorf("lay %s out anew: %w", f.dir, err)
	}
	return nil
}

// startAnew notes that what is live is to be published anew: what a new directory lacks is nobody's edit.
func (f *files) startAnew() error {
	m := f.load()
	if m.live == (version{}) || m.pending() {
		return nil
	}
	f.m = m.begin(m.live, nil)
	return f.m.write(f.manifest)
}

// isFresh says whether a directory is an empty one of root's.
func isFresh(top place) bool {
	names, err := top.names(1)
	return err == nil && len(names) == 0 && top.rootsAlone()
}

// isLaidOut says whether a directory is ours to work in.
func (f *files) isLaidOut(top place) bool {
	if !top.rootsAlone() {
		return false
	}
	ours, err := top.below(ourDir)
	if err != nil {
		return false
	}
	defer ours.close()
	if ours.kind() != syscall.S_IFDIR || !ours.rootsAlone() {
		return false
	}

	at := &descent{top: top}
	defer at.close()
	for _, l := range f.outerLinks() {
		dir, err := at.to(path.Dir(l.link))
		if err != nil {
			continue
		}
		isShared := func(p place) bool { return !p.rootsAlone() }
		st, _ := dir.lstat(path.Base(l.link))
		isLink := isDir(st) && l.kind == aDirectory
		isOthers := isLink && int(st.Uid) != f.acct.uid
		if isOthers || slices.ContainsFunc(at.open, isShared) {
			return false
		}
	}
	return true
}

// outerLinks returns the links that lie in no other link.
func (f *files) outerLinks() []dir {
	return slices.DeleteFunc(slices.Clone(f.dirs), func(d dir) bool {
		return slices.ContainsFunc(f.dirs, func(o dir) bool { return strings.HasPrefix(d.link, o.link+"/") })
	})
}

// layOutAnew makes top, base of parent, the service's: as it is where it is an empty one of root's, else by
// exchange with a new one, base.new, which is the old one from then on.
func (f *files) layOutAnew(parent place, base string, top place) error {
	if isFresh(top) {
		return syscall.Mkdirat(top.fd, ourDir, 0o700)
	}
	name := base + ".new"
	if st, err := parent.lstat(name); err == nil && st.Uid != 0 { // somebody planted it
		if err := f.setAside(parent, name, base); err != nil {
			return err
		}
	}
	err := except(syscall.Mkdirat(parent.fd, name, 0o755), syscall.EEXIST)
	if err != nil {
		return err
	}
	fresh, err := placeAt(parent.fd, name)
	if err != nil {
		return err
	}
	defer fresh.close()
	if !fresh.rootsAlone() {
		return fmt.Errorf("somebody replaced %s", name)
	}
	err = except(syscall.Mkdirat(fresh.fd, ourDir, 0o700), syscall.EEXIST)
	if err != nil {
		return err
	}
	return renameat2(parent, base, parent, name, renameExchange)
}

// takeOver moves the account's links, and checkouts that nest there, from the old directory, base.new of
// parent, to the new one, and lays the rest of it aside. It can be cut short anywhere.
func (f *files) takeOver(parent place, base string) error {
	old, err := placeAt(parent.fd, base+".new")
	if err != nil {
		return err
	}
	defer old.close()
	fresh, err := placeAt(parent.fd, base)
	if err != nil {
		return err
	}
	defer fresh.close()

	for _, l := range f.outerLinks() {
		if err := moveOver(old, fresh, l.link, f.isUsers(l.kind)); err != nil {
			return fmt.Errorf("move %s: %w", l.link, err)
		}
	}
	for _, n := range f.nested {
		if err := moveOver(old, fresh, strings.TrimPrefix(n, f.dir+"/"), isDir); err != nil {
			return fmt.Errorf("move %s: %w", n, err)
		}
	}
	if err := fresh.sync("."); err != nil {
		return err
	}
	return f.setAside(parent, base+".new", base)
}

// isUsers says of what is found at a link whether it is the user's, and of the right kind.
func (f *files) isUsers(k kind) func(syscall.Stat_t) bool {
	mode := map[kind]uint32{aDirectory: syscall.S_IFDIR, aFile: syscall.S_IFREG}[k]
	return func(st syscall.Stat_t) bool {
		return st.Mode&syscall.S_IFMT == mode && int(st.Uid) == f.acct.uid
	}
}

// moveOver moves a path from the old directory to the new one, where it is what fits says; else it stays.
func moveOver(old, fresh place, rel string, fits func(syscall.Stat_t) bool) error {
	from := &descent{top: old}
	defer from.close()
	dir, err := from.to(path.Dir(rel))
	if err != nil {
		return nil // not there
	}
	name := path.Base(rel)
	if st, err := dir.lstat(name); err != nil || !fits(st) {
		return nil
	}

	to := &descent{top: fresh, make: func(parent place, name, _ string) error {
		return syscall.Mkdirat(parent.fd, name, 0o755)
	}}
	defer to.close()
	into, err := to.to(path.Dir(rel))
	if err != nil {
		return err
	}
	err = renameat2(dir, name, into, name, renameNoReplace)
	if err == syscall.EEXIST { // moved before; what lies here was made since
		return nil
	}
	if err != nil {
		return err
	}
	if st, err := into.lstat(name); err != nil || !fits(st) {
		back := renameat2(into, name, dir, name, renameNoReplace)
		return errors.Join(errors.New("somebody replaced it"), err, back)
	}
	return nil
}

// setAside renames what is in our way to base.before, or .before.2 and so on.
func (f *files) setAside(parent place, name, base string) error {
	to := base + ".before"
	for i := 2; i < 10_000; i++ {
		err := renameat2(parent, name, parent, to, renameNoReplace)
		if err == nil {
			slog.Warn(fmt.Sprintf("%s: laid out anew, what was there as %s is kept beside it as %s",
				f.dir, base, to))
		}
		if err != syscall.EEXIST {
			return err
		}
		to = fmt.Sprintf("%s.before.%d", base, i)
	}
	return fmt.Errorf("%s.before.*: %w", f.dir, fs.ErrExist)
}

// lockText is in the lock file that keeps root's git from changing the index, and with it from writing: that
// would be a way for the service's user to be root. A directory that is a link the next moment sends what is
// written anywhere, and a forged tree makes a submodule of a directory of theirs, where git runs what they
// say.
const lockText = "gitopper: root's git does not write here, for files and objects are another user's.\n" +
	"Local edits are in " + editsDir + ". To change the repository, clone it.\n"

// locks returns whether the .git for people in a directory has that lock, and whether it is to have it.
func (f *files) locks(git string) (has, wants bool) {
	return holds(git+"/index.lock", lockText), f.acct.uid != os.Getuid()
}

// isDressed says whether the .git for people is that of commit, and was written to the end: HEAD is last.
func (f *files) isDressed(commit, objects string) bool {
	now := worn{commit: commit}
	for i, name := range wornNames {
		var st syscall.Stat_t
		if err := syscall.Lstat(f.dir+"/.git/"+name, &st); err == nil {
			now.files[i] = stampOf(&st)
		}
	}
	if now == f.worn {
		return true
	}

	if has, wants := f.locks(f.dir + "/.git"); has != wants {
		return false
	}
	for i, right := range []string{commit + "\n", objects + "\n", f.sparse()} {
		if !holds(f.dir+"/.git/"+wornNames[i], right) {
			return false
		}
	}
	isYoung := func(s stamp) bool { return time.Since(time.Unix(0, s.ctime)) < youngest }
	if !slices.ContainsFunc(now.files[:], isYoung) { // else it is read again
		f.worn = now
	}
	return true
}

// wornNames are the files of the .git for people that are looked at in each pass.
var wornNames = [...]string{"HEAD", "objects/info/alternates", "info/sparse-checkout", "index.lock"}

// worn is a .git for people: the commit that it shows, and what lstat(2) said of its wornNames.
type worn struct {
	commit string
	files  [len(wornNames)]stamp
}

// holds says whether a file has that text. Somebody may have put a pipe there, which is none.
func holds(name, text string) bool {
	file, _, err := place{-1}.openFile(name)
	if err != nil {
		return false
	}
	defer file.Close()
	got, err := io.ReadAll(file)
	return err == nil && string(got) == text
}

// dress writes the .git for people: root's git log and git status work in the directory with it. Objects come
// from the upstream's by way of alternates. Nothing is ever decided by it. It uses no network.
func (f *files) dress(ctx context.Context, commit, objects string) error {
	top, err := openOwn(f.dir)
	if err != nil {
		return err
	}
	defer top.close()

	st, _ := top.lstat(".git")
	if isOurs := isDir(st) && int(st.Uid) == os.Getuid(); isOurs {
		if f.fillGit(ctx, top, ".git", commit, objects) == nil {
			return nil
		}
	}

	// Only a whole new one takes its place: what is wrong may be the upstream's objects, whose owner could
	// else make us lay one .git after another aside.
	const fresh = ".git.new"
	err = errors.Join(ctx.Err(), os.RemoveAll(top.path()+"/"+fresh))
	if err == nil {
		err = f.fillGit(ctx, top, fresh, commit, objects)
	}
	if err == nil {
		err = except(f.setAside(top, ".git", ".git"), syscall.ENOENT)
	}
	if err == nil {
		return renameat2(top, fresh, top, ".git", renameNoReplace)
	}
	return errors.Join(err, os.RemoveAll(top.path()+"/"+fresh))
}

// gitConfig is the configuration of the .git for people. A git status would run git in each submodule that it
// finds, with the configuration there: programs of the user's. Modes are those that dirs say.
const gitConfig = `[core]
	repositoryformatversion = 1
	bare = false
	fileMode = false
	sparseCheckout = true
	sparseCheckoutCone = false
[extensions]
	partialClone = origin
	objectFormat = %s
[remote "origin"]
	promisor = true
[gc]
	auto = 0
[protocol]
	allow = never
[diff]
	ignoreSubmodules = all
[sparse]
	expectFilesOutsideOfPatterns = true
`

// fillGit writes all of .git but what people made in it.
func (f *files) fillGit(ctx context.Context, top place, name, commit, objects string) error {
	git := top.path() + "/" + name
	if err := os.MkdirAll(git+"/refs", 0o700); err != nil {
		return err
	}
	format := map[int]string{40: "sha1", 64: "sha256"}[len(commit)]
	for _, file := range [][2]string{
		{"HEAD", skeletonHead},
		{"config", fmt.Sprintf(gitConfig, format)},
		{"objects/info/alternates", objects + "\n"},
		{"info/sparse-checkout", f.sparse()},
		{"info/exclude", f.exclude()},
		{"info/attributes", "* -text -ident -filter -working-tree-encoding\n"},
	} {
		if at := git + "/" + file[0]; !holds(at, file[1]) {
			if err := writeFile(at, []byte(file[1])); err != nil {
				return err
			}
		}
	}
	if err := f.setLock(git); err != nil {
		return err
	}
	if err := f.makeIndex(ctx, git, filepath.Join(f.dir, name), commit); err != nil {
		return err
	}
	return writeFile(git+"/HEAD", []byte(commit+"\n"))
}

// setLock makes the lock of root's git, or takes it away.
func (f *files) setLock(git string) error {
	has, wants := f.locks(git)
	switch {
	case has == wants:
		return nil
	case wants:
		return writeFile(git+"/index.lock", []byte(lockText))
	}
	return os.Remove(git + "/index.lock")
}

// makeIndex makes an index of commit with our own git: it checks paths when it makes an index, not when it
// reads one. The work tree is empty meanwhile: our git reads nothing of the user's but objects, which may be
// forged. git and real both name the .git: by descriptor, and for another process.
func (f *files) makeIndex(ctx context.Context, git, real, commit string) error {
	const work = "/gitopper.new"
	if err := os.RemoveAll(git + work); err != nil {
		return err
	}
	if err := os.MkdirAll(git+work+"/none", 0o700); err != nil {
		return err
	}
	defer os.RemoveAll(git + work)

	links := []string{"ls-files", "-z", "-t", "-s", "--"}
	for _, d := range f.dirs {
		links = append(links, d.link)
	}
	self := account{uid: os.Getuid(), gid: os.Getgid(), home: "/"}
	env := []string{"GIT_WORK_TREE=" + real + work + "/none", "GIT_INDEX_FILE=" + real + work + "/index"}
	list := []byte{}
	for _, args := range [][]string{{"read-tree", commit}, {"read-tree", "-m", "-u", commit}, links} {
		cmd := gitCommand(self, real, env, args...)
		if args[0] == "ls-files" {
			cmd.Dir = real + work + "/none"
		}
		var err error
		if list, err = runGit(ctx, args[0], cmd, localLimit); err != nil {
			return err
		}
	}
	if strings.Contains("\x00"+string(list), "\x00H 160000 ") {
		return errors.New("the clone's objects are not what their ids say: a submodule where there is none")
	}
	return os.Rename(git+work+"/index", git+"/index")
}

// pattern returns what matches exactly a path. See gitignore(5) for the escapes.
func pattern(p string) string {
	return "/" + strings.NewReplacer(`\`, `\\`, `*`, `\*`, `?`, `\?`, `[`, `\[`, ` `, `\ `).Replace(p)
}

// sparse returns the patterns of the links, less their submodules. See git-sparse-checkout(1), non-cone.
func (f *files) sparse() string {
	text := ""
	for _, d := range f.dirs {
		text += pattern(d.link)
		if d.kind == aDirectory {
			text += "/"
		}
		text += "\n"
	}
	m := f.load()
	for _, p := range m.paths {
		if m.known[p][0].mode == "160000" {
			text += "!" + pattern(p) + "\n"
		}
	}
	return text
}

// exclude returns the patterns of what is not the repository's in the directory.
func (f *files) exclude() string {
	text := "/" + ourDir + "/\n/.git.before*\n/.git.new\n"
	for _, n := range f.nested {
		text += pattern(strings.TrimPrefix(n, f.dir+"/")) + "\n"
	}
	return text
}
