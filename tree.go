//go:build linux

package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"path"
	"slices"
	"strings"
	"time"
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
	content   string
	tree      tree
	err       error
	committed time.Time // of the tip
}

// shownAt is where a showing belongs: a commit, and the linksKey of what is shown of it.
type shownAt struct{ commit, links string }

// content identifies what the links of dirs show in commit; a *refusal (Reason link) where they can't be
// shown. For the tip of a tracked branch it is known already and costs nothing.
func (u *upstream) content(ctx context.Context, commit string, dirs []dir) (string, error) {
	s, err := u.showing(ctx, commit, dirs)
	if err == nil && s.content == "" {
		err = s.err
	}
	return s.content, err
}

// tree returns what the links of dirs show in commit, every id of it computed by us; a *refusal where it
// must not go live. Nobody may change it.
func (u *upstream) tree(ctx context.Context, commit string, dirs []dir) (tree, error) {
	s, err := u.showing(ctx, commit, dirs)
	if err == nil {
		err = s.err
	}
	return s.tree, err
}

// showing looks at commit where it is not known what the links of dirs show in it.
func (u *upstream) showing(ctx context.Context, commit string, dirs []dir) (showing, error) {
	u.mu.Lock()
	s, known := u.tips[shownAt{commit, linksKey(dirs)}]
	u.mu.Unlock()
	if known {
		return s, nil
	}
	o, err := u.open(ctx)
	if err != nil {
		return showing{}, err
	}
	defer o.close()
	return (&walk{o: o, commit: commit}).show(dirs, showing{})
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

// see finds out what services are shown of their branches' tips, and which blobs of it are news: those of
// what a service's tip of before did not show. A tip that upstream named but did not send is no news, and
// becomes that of before again: the next look decides.
func (u *upstream) see(ctx context.Context, a account, tips map[string]string) (
	shown map[shownAt]showing, ids map[string]bool, err error) {
	u.mu.Lock()
	known := u.tips
	u.mu.Unlock()
	shown, ids = map[shownAt]showing{}, map[string]bool{}
	o := (*objects)(nil)

	for _, t := range u.tracked {
		old, at := u.looks[t.branch].tip, shownAt{tips[t.branch], t.key}
		before, hasBefore := known[shownAt{old, t.key}]
		s, ok := known[at]
		if !ok {
			s, ok = shown[at]
		}
		if !ok && at.commit != "" {
			if o == nil || o.err != nil { // what one service must not have ends the reading
				if o, err = u.open(ctx); err != nil {
					return nil, nil, err
				}
				defer o.close()
			}
			w := &walk{o: o, commit: at.commit}
			s, err = w.show(t.dirs, before)
			ok = err == nil
			if errors.Is(err, errMissing) {
				tips[t.branch], at.commit, s, ok = old, old, before, hasBefore
				err = u.probe(ctx, a)
			}
			if err != nil {
				return nil, nil, err
			}
			if s.content != before.content {
				s.tree.blobs(ids)
				w.above.blobs(ids)
			}
		}
		if ok {
			shown[at] = s
		}
	}
	return shown, ids, nil
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
	o       *objects
	commit  string
	at      time.Time // when it was committed
	content string    // of its links, once that is known
	tree    tree
	above   tree // what git status reads in the directories above links
	entries int  // that were added to tree, with directories
}

// refuse makes the refusal of the commit; part says what of it would be the same in another one, where its
// content is not known.
func (w *walk) refuse(part, format string, args ...any) error {
	info := fmt.Sprintf("commit %.8s: ", w.commit) + fmt.Sprintf(format, args...)
	content := cmp.Or(w.content, digest("link", part))
	return &refusal{version: version{w.commit, content}, Reason: "link", Info: info}
}

// list reads a tree.
func (w *walk) list(id string) ([]entry, error) {
	if list, known := w.o.trees[id]; known {
		return list, nil
	}
	data, err := w.o.whole(id, "tree")
	if r := (*refusal)(nil); errors.As(err, &r) {
		return nil, w.refuse(id, "%s", r.Info)
	}
	if errors.Is(err, errMissing) {
		err = damaged{errors.New(err.Error())} // no longer one that upstream may not have sent
		w.o.u.hurts(w.o.hurt, err)
	}
	if err != nil {
		return nil, err
	}
	list, err := parseTree(data, len(id)/2)
	if err != nil {
		return nil, w.refuse(id, "%v", err)
	}
	if w.o.kept += len(list); w.o.kept < 4*treeEntries { // memory is bounded; what is not kept is read again
		w.o.trees[id] = list
	}
	return list, nil
}

// show finds out what the links of dirs show. What lies beneath them is not looked at where it is the same
// as before.
func (w *walk) show(dirs []dir, before showing) (showing, error) {
	links, err := w.links(dirs)
	if err == nil {
		var parts []string
		for _, e := range links {
			parts = append(parts, e.name+"\x00"+e.mode+" "+e.id)
		}
		slices.Sort(parts)
		w.content, w.tree = digest(slices.Compact(parts)...), tree{}
		if w.content == before.content && before.err == nil {
			before.committed = w.at
			return before, nil
		}
	}
	for _, e := range links {
		if err == nil {
			err = w.add(e, 0)
		}
	}
	if err == nil {
		return showing{w.content, w.tree, nil, w.at}, nil
	}
	r := (*refusal)(nil)
	if errors.As(err, &r) {
		r.Commit = w.commit
		return showing{w.content, nil, r, w.at}, nil
	}
	return showing{}, err
}

// links returns the entries that dirs link to; the name of each is its whole path.
func (w *walk) links(dirs []dir) (links []entry, err error) {
	c, err := w.o.commit(w.commit)
	if err != nil {
		return nil, err
	}
	w.at, w.above = c.at, tree{}
	for _, d := range dirs {
		e, err := w.find(c.top, d.link)
		if err != nil {
			return nil, err
		}
		if wrong := wrongLink(d, e); wrong != "" {
			wrong = fmt.Sprintf("link %q%s", d.link, wrong)
			return nil, w.refuse(wrong+linksKey(dirs), "%s", wrong)
		}
		links = append(links, e)
	}
	return links, nil
}

// find returns what there is at a path below the tree top, or the last that there is on the way to it.
func (w *walk) find(top, p string) (entry, error) {
	at := entry{mode: "40000", id: top}
	for name := range strings.SplitSeq(p, "/") {
		if at.mode != "40000" {
			break
		}
		list, err := w.list(at.id)
		if err != nil {
			return at, err
		}
		for _, e := range list {
			isRead := e.name == ".gitattributes" || e.name == ".gitignore"
			if isRead && strings.HasPrefix(e.mode, "100") {
				w.above[path.Join(at.name, e.name)] = blob{e.mode, e.id}
			}
		}
		i := slices.IndexFunc(list, func(e entry) bool { return e.name == name })
		if i < 0 {
			break
		}
		at = entry{list[i].mode, path.Join(at.name, name), list[i].id}
	}
	return at, nil
}

// wrongLink says what is wrong with a link, given what find returned for it; "" where it can be shown.
func wrongLink(d dir, at entry) string {
	isFile := strings.HasPrefix(at.mode, "100")
	switch {
	case at.mode == "120000":
		return fmt.Sprintf(": %s is a symbolic link: link what it points to", at.name)
	case at.mode == "160000":
		return fmt.Sprintf(": %s is a submodule", at.name)
	case at.name != d.link:
		return " is missing: add it to the repository, or take it from dirs"
	case d.kind == aFile && !isFile:
		return " is a directory, not a file: remove file = true"
	case d.kind != aFile && at.mode != "40000":
		return " is a file, not a directory: say file = true"
	}
	return ""
}

// add adds an entry, whose name is its whole path, and all below it to the tree.
func (w *walk) add(e entry, depth int) error {
	w.entries++
	switch name := path.Base(e.name); {
	case w.entries > treeEntries:
		return w.refuse("", "more than %d files and directories below the links", treeEntries)
	case depth > treeDepth:
		return w.refuse("", "more than %d directories in each other below the links", treeDepth)
	case strings.EqualFold(name, ".git"):
		return w.refuse("", "%q is not a path that may be checked out", e.name)
	}
	switch e.mode {
	case "100644", "100755", "120000", "160000":
		w.tree[e.name] = blob{e.mode, e.id}
		return nil
	case "40000":
	default:
		return w.refuse("", "%q has the mode %.20q, which git does not make", e.name, e.mode)
	}

	list, err := w.list(e.id)
	if err != nil {
		return err
	}
	for _, below := range list {
		odd := slices.Contains([]string{"", ".", ".."}, below.name)
		if odd || strings.Contains(below.name, "/") {
			return w.refuse("", "%q is not a path that may be checked out", e.name+"/"+below.name)
		}
		below.name = e.name + "/" + below.name
		if err := w.add(below, depth+1); err != nil {
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
