//go:build linux

package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"syscall"
	"time"
)

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

// isDressed says whether the .git for people is that of commit, and was written to the end: HEAD is last. It
// was not synced, and a power cut may have left less of it: so all is looked at where it is new to us.
func (f *files) isDressed(commit, objects string) bool {
	now := worn{commit, f.git}
	if now == f.worn {
		return true
	}

	git := f.dir + "/.git"
	if has, wants := f.locks(git); has != wants {
		return false
	}
	for _, file := range f.gitFiles(commit, objects) {
		if !file.isIn(git) {
			return false
		}
	}
	if !hasIndex(git, commit) || !lexists(git+"/refs") {
		return false
	}

	isYoung := func(s stamp) bool { return time.Since(time.Unix(0, s.ctime)) < youngest }
	if !slices.ContainsFunc(now.files[:], isYoung) { // else it is read again
		f.worn = now
	}
	return true
}

// wornNames are looked at in each pass. The directory changes with the names in it, and git renames files;
// what somebody does to files further below shows at the next start or commit.
var wornNames = [...]string{".git", ".git/HEAD"}

// stamps are those of wornNames; zero: it is not there.
type stamps [len(wornNames)]stamp

// gitStamps returns the stamps of the .git for people in a directory.
func gitStamps(top place) (found stamps) {
	for i, name := range wornNames {
		if st, err := top.lstat(name); err == nil {
			found[i] = stampOf(&st)
		}
	}
	return found
}

// worn is a .git for people: the commit that it shows, and its stamps.
type worn struct {
	commit string
	files  stamps
}

// readText reads a file; a pipe that somebody put there is none.
func readText(name string) ([]byte, error) {
	file, _, err := place{-1}.openFile(name)
	if err != nil {
		return nil, err
	}
	defer file.close()
	return io.ReadAll(file)
}

// holds says whether a file has that text.
func holds(name, text string) bool {
	got, err := readText(name)
	return err == nil && string(got) == text
}

// dress writes the .git for people: root's git log and git status work in the directory with it. Objects come
// from the upstream's by way of alternates. Nothing is ever decided by it.
func (f *files) dress(commit, objects string, index []byte) error {
	top, err := openOwn(f.dir)
	if err != nil {
		return err
	}
	defer top.close()

	st, _ := top.lstat(".git")
	if isOurs := isDir(st) && int(st.Uid) == os.Getuid(); isOurs {
		if f.fillGit(top, ".git", commit, objects, index) == nil {
			return nil
		}
	}

	// Only a whole new one takes its place: what is wrong may be the upstream's objects, whose owner could
	// else make us lay one .git after another aside.
	const fresh = ".git.new"
	err = os.RemoveAll(top.path() + "/" + fresh)
	if err == nil {
		err = f.fillGit(top, fresh, commit, objects, index)
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
// finds, with the configuration there: programs of the user's. Modes are those that dirs say. An index has
// its hash, by which isDressed knows that it is whole, also where root's git has feature.manyFiles.
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
[index]
	skipHash = false
[sparse]
	expectFilesOutsideOfPatterns = true
`

// gitFile is a file of the .git for people, by its name in there.
type gitFile struct{ name, text string }

// isIn says whether the file is in a .git. After our lines of the config may come some of people's.
func (g gitFile) isIn(git string) bool {
	got, err := readText(git + "/" + g.name)
	isWhole := string(got) == g.text
	hasMore := g.name == "config" && strings.HasPrefix(string(got), g.text)
	return err == nil && (isWhole || hasMore)
}

// hasIndex says whether a .git has a whole index.
func hasIndex(git, commit string) bool {
	index, err := readText(git + "/index")
	return err == nil && isWholeIndex(index, len(commit))
}

// gitFiles returns the files of the .git for people but its index; the last is to be written last.
func (f *files) gitFiles(commit, objects string) []gitFile {
	format := map[int]string{40: "sha1", 64: "sha256"}[len(commit)]
	return []gitFile{
		{"config", fmt.Sprintf(gitConfig, format)},
		{"objects/info/alternates", objects + "\n"},
		{"info/sparse-checkout", f.sparse()},
		{"info/exclude", f.exclude()},
		{"info/attributes", "* -text -ident -filter -working-tree-encoding\n"},
		{"HEAD", commit + "\n"},
	}
}

// fillGit writes what is not right in a .git, and leaves what people made in it.
func (f *files) fillGit(top place, name, commit, objects string, index []byte) error {
	git := top.path() + "/" + name
	if err := os.MkdirAll(git+"/refs", 0o700); err != nil {
		return err
	}

	isRight := func(g gitFile) bool { return g.isIn(git) }
	wrong := slices.DeleteFunc(f.gitFiles(commit, objects), isRight)
	// Else people's git may have noted something in the index.
	isOther := slices.ContainsFunc(wrong, func(g gitFile) bool { return g.name != "config" })
	if isOther || !hasIndex(git, commit) {
		wrong = slices.Insert(wrong, 0, gitFile{"HEAD", unbornHead}, gitFile{"index", string(index)})
		if last := wrong[len(wrong)-1]; last.name != "HEAD" {
			wrong = append(wrong, gitFile{"HEAD", commit + "\n"})
		}
	}

	if err := f.setLock(git); err != nil {
		return err
	}
	for _, file := range wrong {
		if err := writeGit(git+"/"+file.name, file.text); err != nil {
			return err
		}
	}
	return nil
}

// writeGit writes a file of the .git for people. isDressed knows what a power cut leaves.
func writeGit(name, text string) error {
	return exchangeFile(name, []byte(text), 0o600, func(*os.File) error { return nil })
}

// setLock makes the lock of root's git, or takes it away.
func (f *files) setLock(git string) error {
	has, wants := f.locks(git)
	switch {
	case has == wants:
		return nil
	case wants:
		return writeGit(git+"/index.lock", lockText)
	}
	return os.Remove(git + "/index.lock")
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
