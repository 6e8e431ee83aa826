package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
)

// layOut opens the service's directory, root's down to the links. One that is not (an older gitopper's checkout,
// another user's, something planted) makes place for a new one, into which links that are the account's are moved,
// each by one rename that mounts follow; it is kept whole beside it, and nothing of it is opened.
func (f *files) layOut() (place, error) {
	root := account{uid: os.Getuid(), gid: os.Getgid()}
	top, err := makePlace(f.dir, aDirectory, root)
	if err != nil {
		return top, err
	}
	parent, err := openPlace(filepath.Dir(f.dir))
	if err != nil {
		top.close()
		return top, err
	}
	defer parent.close()
	if err := parent.standsFast(); err != nil {
		top.close()
		return top, brokenError{err}
	}
	base := filepath.Base(f.dir)

	if !f.isLaidOut(top) {
		err = f.takeOver(parent, base, top)
		top.close()
		if err != nil {
			return top, fmt.Errorf("lay %s out anew: %w", f.dir, err)
		}
		if top, err = openOwn(f.dir); err != nil {
			return top, err
		}
	}
	// What is called new now is the old one, unless it was never gone on with.
	if _, err := parent.lstat(base + ".new"); err == nil {
		if err := f.setAside(parent, base+".new", base); err != nil {
			top.close()
			return top, err
		}
	}
	return top, nil
}

// isLaidOut says whether a directory is ours to work in. An empty one of root's is made so.
func (f *files) isLaidOut(top place) bool {
	if !top.rootsAlone() {
		return false
	}
	st, err := top.lstat(ourDir)
	if err != nil {
		names, err := top.names(1)
		if err != nil || len(names) > 0 {
			return false
		}
		return syscall.Mkdirat(top.fd, ourDir, 0o700) == nil
	}
	if st.Uid != uint32(os.Getuid()) || st.Mode&syscall.S_IFMT != syscall.S_IFDIR {
		return false
	}

	at := &descent{top: top}
	defer at.close()
	for _, l := range f.outerLinks() {
		dir, err := at.to(path.Dir(l.link))
		if err != nil {
			continue
		}
		for i := range at.open {
			if !at.open[i].rootsAlone() {
				return false
			}
		}
		st, err := dir.lstat(path.Base(l.link))
		isDir := st.Mode&syscall.S_IFMT == syscall.S_IFDIR
		if err == nil && l.kind == aDirectory && isDir && int(st.Uid) != f.acct.uid {
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

// takeOver makes the directory anew beside old, and exchanges the two. It can be cut short anywhere: an
// unfinished one of root's is gone on with.
func (f *files) takeOver(parent place, base string, old place) error {
	fresh, err := f.freshDir(parent, base)
	if err != nil {
		return err
	}
	defer fresh.close()

	for _, l := range f.outerLinks() {
		if err := f.moveLink(old, fresh, l.link, func(st syscall.Stat_t) bool {
			isDir := st.Mode&syscall.S_IFMT == syscall.S_IFDIR
			isFile := st.Mode&syscall.S_IFMT == syscall.S_IFREG
			right := isDir && l.kind == aDirectory || isFile && l.kind == aFile
			return right && int(st.Uid) == f.acct.uid
		}); err != nil {
			return fmt.Errorf("move %s: %w", l.link, err)
		}
	}
	for _, n := range f.nested {
		rel, err := filepath.Rel(f.dir, n)
		if err != nil || strings.HasPrefix(rel, "..") {
			continue
		}
		if err := f.moveLink(old, fresh, rel, func(st syscall.Stat_t) bool {
			return st.Mode&syscall.S_IFMT == syscall.S_IFDIR
		}); err != nil {
			return fmt.Errorf("move %s: %w", n, err)
		}
	}

	if err := fresh.sync("."); err != nil {
		return err
	}
	if err := renameat2(parent, base, parent, base+".new", renameExchange); err != nil {
		return err
	}
	return f.setAside(parent, base+".new", base)
}

// freshDir opens base.new, made unless it is there and root's.
func (f *files) freshDir(parent place, base string) (place, error) {
	name := base + ".new"
	fresh, err := placeAt(parent.fd, name)
	if err == nil && !fresh.rootsAlone() { // somebody planted it
		fresh.close()
		err = errors.Join(f.setAside(parent, name, base), syscall.ENOENT)
	}
	if errors.Is(err, syscall.ENOENT) {
		if err := syscall.Mkdirat(parent.fd, name, 0o755); err != nil {
			return fresh, err
		}
		fresh, err = placeAt(parent.fd, name)
	}
	if err != nil {
		return fresh, err
	}

	err = syscall.Mkdirat(fresh.fd, ourDir, 0o700)
	if err == syscall.EEXIST {
		err = nil
	}
	if err == nil && !fresh.rootsAlone() {
		err = errors.New("somebody replaced it while it was made")
	}
	if err != nil {
		fresh.close()
	}
	return fresh, err
}

// moveLink moves a path from the old directory to the new one, where it is what fits says; else it stays.
func (f *files) moveLink(old, fresh place, rel string, fits func(syscall.Stat_t) bool) error {
	from := &descent{top: old}
	defer from.close()
	dir, err := from.to(path.Dir(rel))
	if err != nil {
		return nil // not there
	}
	name := path.Base(rel)
	st, err := dir.lstat(name)
	if err != nil || !fits(st) {
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
	if err := renameat2(dir, name, into, name, renameNoReplace); err != nil {
		if err == syscall.EEXIST { // moved before; what lies here was made since
			return nil
		}
		return err
	}
	if st, err = into.lstat(name); err == nil && !fits(st) {
		err = errors.Join(errors.New("somebody replaced it"), renameat2(into, name, dir, name, renameNoReplace))
	}
	return err
}

// setAside renames what is in our way to base.before, or .before.2 and so on.
func (f *files) setAside(parent place, name, base string) error {
	before := base + ".before"
	for i := 1; i < 10_000; i++ {
		to := before
		if i > 1 {
			to = fmt.Sprintf("%s.%d", before, i)
		}
		err := renameat2(parent, name, parent, to, renameNoReplace)
		if err == nil {
			slog.Warn(fmt.Sprintf("%s: laid out anew, what was there as %s is kept beside it as %s", f.dir, base, to))
		}
		if err != syscall.EEXIST {
			return err
		}
	}
	return fmt.Errorf("%s.before.*: %w", f.dir, fs.ErrExist)
}

// isDressed says whether the .git for people is that of commit, and was written to the end: HEAD is last.
func (f *files) isDressed(commit, objects string) bool {
	for name, right := range map[string]string{"HEAD": commit + "\n", "objects/info/alternates": objects + "\n"} {
		text, err := os.ReadFile(f.dir + "/.git/" + name)
		if err != nil || string(text) != right {
			return false
		}
	}
	return true
}

// dress writes the .git for people: root's git log and git status work in the directory with it. Objects come
// from the upstream's by way of alternates. Nothing is ever decided by it. It uses no network.
func (f *files) dress(ctx context.Context, commit, objects string) error {
	top, err := openOwn(f.dir)
	if err != nil {
		return err
	}
	defer top.close()

	st, missing := top.lstat(".git")
	isDir := st.Mode&syscall.S_IFMT == syscall.S_IFDIR
	usable := missing == nil && isDir && st.Uid == uint32(os.Getuid())
	if usable && f.fillGit(ctx, top, ".git", commit, objects) == nil {
		return nil
	}

	// Only a whole new one takes its place: what is wrong may be the upstream's objects, whose owner could else make
	// us lay one .git after another aside.
	const fresh = ".git.new"
	err = errors.Join(ctx.Err(), os.RemoveAll(top.path()+"/"+fresh))
	if err == nil {
		err = f.fillGit(ctx, top, fresh, commit, objects)
	}
	if err == nil && missing == nil {
		err = f.setAside(top, ".git", ".git")
	}
	if err == nil {
		err = renameat2(top, fresh, top, ".git", renameNoReplace)
	}
	if err != nil {
		return errors.Join(err, os.RemoveAll(top.path()+"/"+fresh))
	}
	return nil
}

// fillGit writes all of .git but what people made in it.
func (f *files) fillGit(ctx context.Context, top place, name, commit, objects string) error {
	git := top.path() + "/" + name
	for _, dir := range []string{"", "/refs", "/objects/info", "/info"} {
		if err := os.MkdirAll(git+dir, 0o700); err != nil {
			return err
		}
	}

	config := "[core]\n\trepositoryformatversion = 1\n\tbare = false\n\tsparseCheckout = true\n" +
		"\tsparseCheckoutCone = false\n[extensions]\n\tpartialClone = origin\n"
	if len(commit) == 64 {
		config += "\tobjectFormat = sha256\n"
	}
	config += "[remote \"origin\"]\n\tpromisor = true\n[gc]\n\tauto = 0\n[protocol]\n\tallow = never\n"
	// A git status runs git in each submodule that it finds, with the configuration there: programs of the user's.
	config += "[diff]\n\tignoreSubmodules = all\n[sparse]\n\texpectFilesOutsideOfPatterns = true\n"
	for _, file := range [][2]string{
		{"HEAD", skeletonHead},
		{"config", config},
		{"objects/info/alternates", objects + "\n"},
		{"info/sparse-checkout", f.sparse()},
		{"info/exclude", f.exclude()},
		{"info/attributes", "* -text -ident -filter -working-tree-encoding\n"},
	} {
		at, text := git+"/"+file[0], []byte(file[1])
		if old, err := os.ReadFile(at); err == nil && bytes.Equal(old, text) {
			continue
		}
		if err := os.WriteFile(at, text, 0o600); err != nil {
			return err
		}
	}
	if err := f.makeIndex(ctx, top, name, commit); err != nil {
		return err
	}
	return writeFile(git+"/HEAD", []byte(commit+"\n"))
}

// makeIndex makes an index of commit with our own git: it checks paths when it makes an index, not when it reads
// one. The work tree is empty meanwhile: our git reads nothing of the user's but objects, which may be forged.
func (f *files) makeIndex(ctx context.Context, top place, name, commit string) error {
	git, none, index := top.path()+"/"+name, "gitopper.none", "index.gitopper"
	for _, leftover := range []string{index, index + ".lock", none} {
		if err := os.RemoveAll(git + "/" + leftover); err != nil {
			return err
		}
	}
	if err := os.Mkdir(git+"/"+none, 0o700); err != nil {
		return err
	}
	defer os.Remove(git + "/" + none)

	var list []byte
	links := []string{"ls-files", "-z", "-t", "-s", "--"}
	for _, d := range f.dirs {
		links = append(links, d.link)
	}
	for _, args := range [][]string{{"read-tree", commit}, {"read-tree", "-m", "-u", commit}, links} {
		real := filepath.Join(f.dir, name)
		env := []string{"GIT_WORK_TREE=" + real + "/" + none, "GIT_INDEX_FILE=" + real + "/" + index}
		self := account{uid: os.Getuid(), gid: os.Getgid(), home: "/"}
		cmd := gitCommand(self, real, env, args...)
		if args[0] == "ls-files" {
			cmd.Dir = real + "/" + none
		}
		var err error
		if list, err = runGit(ctx, args[0], cmd, localLimit); err != nil {
			return err
		}
	}
	if strings.HasPrefix(string(list), "H 160000 ") || strings.Contains(string(list), "\x00H 160000 ") {
		return errors.New("the clone's objects are not what their ids say: a submodule where there is none")
	}
	return os.Rename(git+"/"+index, git+"/index")
}

var escapePattern = strings.NewReplacer(`\`, `\\`, `*`, `\*`, `?`, `\?`, `[`, `\[`)

// pattern returns what matches exactly a path. See gitignore(5) for the escapes.
func pattern(p string) string {
	p = escapePattern.Replace(p)
	if t := strings.TrimRight(p, " "); t != p {
		p = t + strings.Repeat(`\ `, len(p)-len(t))
	}
	return "/" + p
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
	for p, b := range f.tree() {
		if b.mode == "160000" {
			text += "!" + pattern(p) + "\n"
		}
	}
	return text
}

// exclude returns the patterns of what is not the repository's in the directory.
func (f *files) exclude() string {
	text := "/" + ourDir + "/\n/.git.before*\n/.git.new\n"
	for _, n := range f.nested {
		if rel, err := filepath.Rel(f.dir, n); err == nil && !strings.HasPrefix(rel, "..") {
			text += pattern(rel) + "\n"
		}
	}
	return text
}
