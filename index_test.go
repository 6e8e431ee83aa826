//go:build linux

package main

import (
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
