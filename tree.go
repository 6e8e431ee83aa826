package main

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"path"
	"slices"
	"strings"
)

// blob is one file, symbolic link or submodule of a tree; the zero blob: nothing there.
type blob struct {
	mode string // "100644", "100755", "120000" (symbolic link) or "160000" (submodule: an empty directory)
	id   string // object id, 40 or 64 hex digits
}

// tree is what a service's links show in a commit: path, relative to the repository's top, -> mode and id.
// Directories follow from the paths, but for a link that is an empty directory, which is not in it.
type tree map[string]blob

// showing is what the links of one service show in a tip, or why they must not (a *refusal).
type showing struct {
	content string
	tree    tree
	err     error
}

// content identifies what the links of dirs show in commit; a *refusal (Reason link) where they can't be
// shown. For the tip of a tracked branch it is known already and costs nothing.
func (u *upstream) content(ctx context.Context, commit string, dirs []dir) (string, error) {
	s, known := u.known(commit, dirs)
	if known && (s.content != "" || s.err != nil) {
		if s.content == "" {
			return "", s.err
		}
		return s.content, nil
	}
	o, err := u.open(ctx)
	if err != nil {
		return "", err
	}
	defer o.close()
	content, _, err := o.walk(commit).content(dirs)
	return content, err
}

// tree returns what the links of dirs show in commit, every id of it computed by us; a *refusal where it
// must not go live. Nobody may change it.
func (u *upstream) tree(ctx context.Context, commit string, dirs []dir) (tree, error) {
	if s, known := u.known(commit, dirs); known {
		return s.tree, s.err
	}
	o, err := u.open(ctx)
	if err != nil {
		return nil, err
	}
	defer o.close()
	_, t, err := o.walk(commit).tree(dirs)
	return t, err
}

func (u *upstream) known(commit string, dirs []dir) (showing, bool) {
	u.mu.Lock()
	defer u.mu.Unlock()
	s, ok := u.tips[commit][linksKey(dirs)]
	return s, ok
}

// linksKey names what of dirs decides what they show.
func linksKey(dirs []dir) string {
	var parts []string
	for _, d := range dirs {
		parts = append(parts, d.link+"\x00"+d.kind.String())
	}
	slices.Sort(parts)
	return digest(slices.Compact(parts)...)
}

// see finds out what each service of a branch is shown of its tip, and adds to ids the blobs of those to
// whom it is not what the tip of before showed. seen is what is known of that commit by another branch of
// the same tip.
func (u *upstream) see(
	ctx context.Context, branch, tip string, seen map[string]showing, ids map[string]bool,
) (map[string]showing, error) {
	u.mu.Lock()
	before := u.tips[u.looks[branch].tip]
	if seen == nil {
		seen = u.tips[tip]
	}
	u.mu.Unlock()
	if seen = maps.Clone(seen); seen == nil {
		seen = map[string]showing{}
	}

	var w *walk
	for _, t := range u.tracked {
		key := linksKey(t.dirs)
		if _, done := seen[key]; done || t.branch != branch {
			continue
		}
		if w == nil || w.o.err != nil { // what one service must not have ends the reading
			o, err := u.open(ctx)
			if err != nil {
				return nil, err
			}
			defer o.close()
			w = o.walk(tip)
		}
		s, err := w.show(t.dirs, before[key])
		if err != nil {
			return nil, err
		}
		if s.content != before[key].content {
			s.tree.blobs(ids)
		}
		seen[key] = s
	}
	return seen, nil
}

// show is tree, but for content that the tip of before had too.
func (w *walk) show(dirs []dir, before showing) (s showing, err error) {
	s.content, _, err = w.content(dirs)
	if err == nil && s.content == before.content && before.err == nil {
		return before, nil
	}
	if err == nil {
		s.content, s.tree, err = w.tree(dirs)
	}
	if r := (*refusal)(nil); errors.As(err, &r) {
		r.Commit = w.commit
		s.err, err = r, nil
	}
	return s, err
}

// entry is one line of a tree object; mode as git writes it there, 40000 for a directory.
type entry struct{ mode, name, id string }

// parseTree reads a tree object: MODE NAME NUL ID, again and again, sorted as if the names of directories
// ended in a slash.
func parseTree(data []byte, size int) ([]entry, error) {
	var list []entry
	seen := map[string]bool{}
	last := ""
	for len(data) > 0 {
		head, rest, ok := bytes.Cut(data, []byte{0})
		mode, name, ok2 := strings.Cut(string(head), " ")
		if !ok || !ok2 || len(rest) < size {
			return nil, errors.New("a tree of it is cut short")
		}
		sorted := name
		if mode == "40000" {
			sorted += "/"
		}
		if seen[name] || sorted <= last {
			return nil, fmt.Errorf("a tree of it has %q twice, or not where it belongs", name)
		}
		seen[name], last = true, sorted
		list = append(list, entry{mode, name, hex.EncodeToString(rest[:size])})
		data = rest[size:]
	}
	return list, nil
}

// walk looks at one commit's trees. It is a *refusal (Reason link) where they are not what may go live.
type walk struct {
	o           *objects
	commit, top string             // top: the id of its root tree
	trees       map[string][]entry // by id; services share those above their links, and a bomb is made of few
	kept        int                // entries in trees
}

func (o *objects) walk(commit string) *walk {
	return &walk{o: o, commit: commit, trees: map[string][]entry{}}
}

// refuse makes the refusal of the commit; content says what of it would be the same in another one.
func (w *walk) refuse(content, format string, args ...any) error {
	info := fmt.Sprintf("commit %.8s: ", w.commit) + fmt.Sprintf(format, args...)
	return &refusal{version: version{w.commit, content}, Reason: "link", Info: info}
}

// entries reads a tree.
func (w *walk) entries(id string) ([]entry, error) {
	if list, known := w.trees[id]; known {
		return list, nil
	}
	data, err := w.o.whole(id, "tree")
	if r := (*refusal)(nil); errors.As(err, &r) {
		return nil, w.refuse(digest("link", id), "%s", r.Info)
	}
	if errors.Is(err, errMissing) {
		err = damaged{err}
		w.o.u.hurts(err, w.o.made)
	}
	if err != nil {
		return nil, err
	}
	list, err := parseTree(data, len(id)/2)
	if err != nil {
		return nil, w.refuse(digest("link", id), "%v", err)
	}
	if w.kept += len(list); w.kept < 4*treeEntries { // memory is bounded, and what is not kept is read again
		w.trees[id] = list
	}
	return list, nil
}

// root reads the commit, if that was not done.
func (w *walk) root() (err error) {
	if w.top == "" {
		w.top, _, err = w.o.commit(w.commit)
	}
	return err
}

// find notes what the commit has at a path and at the directories above it.
func (w *walk) find(p string, found map[string]entry) error {
	id, at := w.top, ""
	for name := range strings.SplitSeq(p, "/") {
		list, err := w.entries(id)
		if err != nil {
			return err
		}
		i := slices.IndexFunc(list, func(e entry) bool { return e.name == name })
		if i < 0 {
			return nil
		}
		at = path.Join(at, name)
		found[at] = list[i]
		if list[i].mode != "40000" {
			return nil
		}
		id = list[i].id
	}
	return nil
}

// content identifies what the links of dirs show; what lies beneath them is not looked at.
func (w *walk) content(dirs []dir) (string, map[string]entry, error) {
	found := map[string]entry{}
	if err := w.root(); err != nil {
		return "", nil, err
	}
	for _, d := range dirs {
		if err := w.find(d.link, found); err != nil {
			return "", nil, err
		}
	}

	modes := map[string]string{}
	for p, e := range found {
		modes[p] = strings.Repeat("0", max(0, 6-len(e.mode))) + e.mode
	}
	var parts []string
	for _, d := range dirs {
		want := "040000"
		if d.kind == aFile {
			want = "100"
		}
		if !strings.HasPrefix(modes[d.link], want) {
			judged := digest("link", fmt.Sprint(modes), fmt.Sprint(dirs))
			return "", nil, w.refuse(judged, "%s", describeLink(modes, d))
		}
		parts = append(parts, d.link+"\x00"+modes[d.link]+" "+found[d.link].id)
	}
	slices.Sort(parts)
	return digest(slices.Compact(parts)...), found, nil
}

// describeLink says in words what is wrong with a link, given the modes of it and of the directories above
// it.
func describeLink(modes map[string]string, d dir) string {
	for p := d.link; p != "."; p = path.Dir(p) {
		switch modes[p] {
		case "120000":
			return fmt.Sprintf("link %q: %s is a symbolic link: link what it points to", d.link, p)
		case "160000":
			return fmt.Sprintf("link %q: %s is a submodule", d.link, p)
		}
	}
	switch m := modes[d.link]; {
	case m == "040000":
		return fmt.Sprintf("link %q is a directory, not a file: remove file = true", d.link)
	case m != "":
		return fmt.Sprintf("link %q is a file, not a directory: say file = true", d.link)
	}
	return fmt.Sprintf("link %q is missing: add it to the repository, or take it from dirs", d.link)
}

// tree returns all that the links of dirs show.
func (w *walk) tree(dirs []dir) (content string, t tree, err error) {
	content, found, err := w.content(dirs)
	if err != nil {
		return "", nil, err
	}
	t = tree{}
	entries := 0
	for _, d := range dirs {
		e := found[d.link]
		e.name = d.link
		if err := w.add(t, content, e, 0, &entries); err != nil {
			return content, nil, err
		}
	}
	return content, t, nil
}

// add adds an entry, whose name is its whole path, and all below it to a tree.
func (w *walk) add(t tree, content string, e entry, depth int, entries *int) error {
	*entries++
	switch name := path.Base(e.name); {
	case *entries > treeEntries:
		return w.refuse(content, "more than %d files and directories below the links", treeEntries)
	case depth > treeDepth:
		return w.refuse(content, "more than %d directories in each other below the links", treeDepth)
	case strings.EqualFold(name, ".git"):
		return w.refuse(content, "%q is not a path that may be checked out", e.name)
	}
	switch e.mode {
	case "100644", "100755", "120000", "160000":
		t[e.name] = blob{e.mode, e.id}
		return nil
	case "40000":
	default:
		return w.refuse(content, "%q has the mode %.20q, which git does not make", e.name, e.mode)
	}

	list, err := w.entries(e.id)
	if r := (*refusal)(nil); errors.As(err, &r) {
		r.Content = content
	}
	if err != nil {
		return err
	}
	for _, below := range list {
		odd := slices.Contains([]string{"", ".", ".."}, below.name)
		if odd || strings.Contains(below.name, "/") {
			return w.refuse(content, "%q is not a path that may be checked out", e.name+"/"+below.name)
		}
		below.name = e.name + "/" + below.name
		if err := w.add(t, content, below, depth+1, entries); err != nil {
			return err
		}
	}
	return nil
}

// blobs adds the ids of a tree's files and symbolic links to a set.
func (t tree) blobs(ids map[string]bool) {
	for _, b := range t {
		if b.mode != "160000" {
			ids[b.id] = true
		}
	}
}

// foldedTwice returns two paths that are one where case does not count, "" where there are none.
func foldedTwice(want tree) (string, string) {
	names := map[string]string{}
	for _, p := range slices.Sorted(maps.Keys(want)) {
		folded := strings.ToLower(p)
		if other, ok := names[folded]; ok {
			return other, p
		}
		names[folded] = p
	}
	return "", ""
}
