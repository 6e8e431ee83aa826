//go:build linux

package main

import (
	"fmt"
	"os"
	"strings"
	"testing"
)

// TestIndex compares the index for people with the one that git makes itself: of names and kinds of all sorts, with
// links in each other, for a git that knows sparse indexes and for one that doesn't.
func TestIndex(t *testing.T) {
	for _, format := range []string{"sha1", "sha256"} {
		w := newGitWorld(t, "--object-format="+format)
		w.commit("etc/a b", "1\n", "etc/sub/run", "2\n", "etc/\xff", "3\n", "etc-other/x", "4\n", "etc.conf", "5\n", "top/etc/file", "6\n",
			"top/etc/sub/f", "7\n", "top/one", "8\n", "top/two/deep/x", "9\n", strings.Repeat(strings.Repeat("l", 250)+"/", 10)+"x", "10\n")
		w.git("update-index", "--chmod=+x", "etc/sub/run")
		if err := os.Symlink("nowhere", w.work+"/top/link"); err != nil {
			t.Fatal(err)
		}
		w.git("add", "top/link")
		w.git("update-index", "--add", "--cacheinfo", "160000,"+w.git("rev-parse", "HEAD")+",etc/module")
		w.git("commit", "-q", "-m", "all kinds")
		w.look()
		commit := w.u.looked("main").tip
		dirs := []dir{{link: "etc"}, {link: "top/etc/sub"}, {link: "top/etc/sub/f", kind: aFile}, {link: "top/one", kind: aFile}}
		shown, err := w.u.tree(t.Context(), commit, dirs)
		if err != nil {
			t.Fatal(err)
		}
		for _, version := range []int32{2030, 2039} {
			w.u.git.Store(version)
			index, err := w.u.index(t.Context(), commit, dirs, shown)
			if err != nil {
				t.Fatal(err)
			}
			file := w.dir + "/index"
			if err := os.WriteFile(file, index, 0o600); err != nil {
				t.Fatal(err)
			}
			t.Setenv("GIT_INDEX_FILE", file)
			if got, want := w.git("write-tree"), w.git("rev-parse", "HEAD^{tree}"); got != want {
				t.Errorf("%s, git %d: the index is of tree %s, not %s", format, version, got, want)
			}
			if hasDirectories := strings.Contains(string(index), "sdir"); hasDirectories != (version > 2032) {
				t.Errorf("%s, git %d: directories in the index: %v", format, version, hasDirectories)
			}
			var out []string
			for line := range strings.Lines(w.git("ls-files", "-t") + "\n") {
				if name, ok := strings.CutPrefix(line, "H "); ok {
					out = append(out, strings.TrimSpace(name))
				}
			}
			want := `etc/a b,etc/app.conf,etc/sub/run,"etc/\377",top/etc/sub/f,top/one`
			if got := strings.Join(out, ","); got != want {
				t.Errorf("%s, git %d: checked out: %s", format, version, got)
			}
			os.Unsetenv("GIT_INDEX_FILE")
		}
	}
}

// TestIndexBombs: what is beside the links may be anything; it costs little, and a link's own files are shown all the same.
func TestIndexBombs(t *testing.T) {
	w := newGitWorld(t)
	tree := func(lines ...string) string { return w.pipe(strings.Join(lines, "\n")+"\n", "mktree") }
	empty := w.pipe("", "mktree")
	wide := empty
	for range 10 { // 10^10 directories, and no file
		var lines []string
		for i := range 10 {
			lines = append(lines, fmt.Sprintf("040000 tree %s\t%d", wide, i))
		}
		wide = tree(lines...)
	}
	deep := empty
	for range 200 {
		deep = tree("040000 tree " + deep + "\td")
	}
	etc := w.git("rev-parse", "HEAD:etc")
	for name, bomb := range map[string]string{"wide": wide, "deep": deep} {
		top := tree("040000 tree "+bomb+"\tbomb", "040000 tree "+etc+"\tetc")
		w.git("update-ref", "refs/heads/main", w.git("commit-tree", "-m", name, top))
		w.look()
		commit := w.u.looked("main").tip
		shown, err := w.u.tree(t.Context(), commit, w.etc)
		if err != nil {
			t.Fatal(name, err)
		}
		for version, want := range map[int32]string{2030: "too many files beside the links, or too deep", 2039: ""} {
			w.u.git.Store(version)
			_, err := w.u.index(t.Context(), commit, w.etc, shown)
			if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
				t.Errorf("%s, git %d: %v", name, version, err)
			}
		}
	}
}

// TestIndexModes: an index has the modes that git's would have.
func TestIndexModes(t *testing.T) {
	for mode, want := range map[uint64]uint64{0o100664: 0o100644, 0o100600: 0o100644, 0o100755: 0o100755, 0o100700: 0o100755, 0o120000: 0o120000,
		0o40000: 0o40000, 0o160000: 0o160000, 0o0: 0o160000, 0o140777: 0o160000} {
		if got := indexMode(mode); got != want {
			t.Errorf("%o became %o, want %o", mode, got, want)
		}
	}
}
