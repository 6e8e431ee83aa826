//go:build linux

package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// index returns a git index of a commit for the .git for people: all files of shown, and what lies beside the
// links, marked as not checked out.
func (u *upstream) index(ctx context.Context, commit string, dirs []dir, shown tree) ([]byte, error) {
	if u.git.Load() == 0 {
		version, err := gitVersion(ctx)
		if err != nil {
			return nil, err
		}
		u.git.Store(int32(version))
	}

	o, err := u.open(ctx)
	if err != nil {
		return nil, err
	}
	defer o.close()

	w := &walker{o: o, commit: commit}
	c, err := o.commit(commit)
	if err != nil {
		return nil, err
	}

	isOld := u.git.Load() < 2032 // and does not know directories in an index
	beside, err := w.beside(nil, entry{"40000", "", c.top}, dirs, isOld)
	if err != nil {
		return nil, err
	}
	return indexText(shown, beside, len(commit))
}

// beside appends what lies in a directory and is not shown at the links of dirs, with whole paths for names:
// directories that no link is in are one entry each, with a slash at its end, or else, if they are to be
// whole, all of their files.
func (w *walker) beside(all []entry, in entry, dirs []dir, whole bool) ([]entry, error) {
	list, err := w.list(in.id)
	if err != nil {
		return nil, err
	}

	for _, e := range list {
		if !isFileName(e.name) {
			return nil, fmt.Errorf("commit %.8s: %q is not a path that may be checked out", w.commit, e.name)
		}

		if in.name != "" {
			e.name = in.name + "/" + e.name
		}
		e.mode = strings.TrimLeft(e.mode, "0") // as very old trees have it
		isShown := func(d dir) bool { return within(e.name, d.link) }
		leadsOn := func(d dir) bool { return within(d.link, e.name) }
		isDirectory := e.mode == "40000"
		w.entries++
		isBomb := w.entries > 4*treeEntries || strings.Count(e.name, "/") > treeDepth
		if isBomb { // looked for before it is entered
			return nil, fmt.Errorf("commit %.8s: too many files beside the links, or too deep", w.commit)
		}

		switch {
		case slices.ContainsFunc(dirs, isShown):
		case isDirectory && (whole || slices.ContainsFunc(dirs, leadsOn)):
			all, err = w.beside(all, e, dirs, whole)
		case isDirectory:
			e.name += "/"
			all = append(all, e)
		default:
			all = append(all, e)
		}
		if err != nil {
			return nil, err
		}
	}
	return all, nil
}

// isFileName says whether git would check out a name of a tree.
func isFileName(name string) bool {
	isOdd := slices.Contains([]string{"", ".", ".."}, name) || strings.EqualFold(name, ".git")
	return !isOdd && !strings.Contains(name, "/")
}

// indexText writes an index as in gitformat-index(5), of version 3: entries without what lstat(2) says, so
// that git looks at the files itself, and whole directories as in a sparse index. Submodules are not checked
// out, for git would run itself in them.
func indexText(shown tree, beside []entry, digits int) ([]byte, error) {
	all := slices.Clone(beside)
	for p, b := range shown {
		all = append(all, entry{b.mode, p, b.id})
	}
	slices.SortFunc(all, func(a, b entry) int { return strings.Compare(a.name, b.name) })

	const extended, skipWorktree = 0x4000, 0x4000
	b := make([]byte, 0, 160*len(all))
	number := func(v uint32) { b = binary.BigEndian.AppendUint32(b, v) }

	b = append(b, "DIRC"...)
	number(3)
	number(uint32(len(all)))

	hasDirectories := false
	for _, e := range all {
		start := len(b)
		mode, err := strconv.ParseUint(e.mode, 8, 32)
		if err != nil {
			return nil, err
		}

		_, isShown := shown[e.name]
		flags := uint32(extended|min(len(e.name), 0xfff))<<16 | skipWorktree
		if isShown && e.mode != "160000" {
			flags &^= skipWorktree
		}

		b = append(b, make([]byte, 24)...) // times, device and inode
		number(uint32(indexMode(mode)))
		b = append(b, make([]byte, 12)...) // owner, group and size
		if b, err = hex.AppendDecode(b, []byte(e.id)); err != nil {
			return nil, err
		}
		number(flags)
		b = append(b, e.name...)
		b = append(b, make([]byte, 8-(len(b)-start)%8)...)
		if e.mode == "40000" {
			hasDirectories = true
		}
	}

	if hasDirectories {
		b = append(b, "sdir\x00\x00\x00\x00"...)
	}
	h := newHash(digits)
	h.Write(b)
	return h.Sum(b), nil
}

// isWholeIndex says whether an index was written to its end, where its hash is.
func isWholeIndex(index []byte, digits int) bool {
	h := newHash(digits)
	end := len(index) - h.Size()
	if end < 0 {
		return false
	}
	h.Write(index[:end])
	return bytes.Equal(index[end:], h.Sum(nil))
}

// indexMode is the mode that git's index has for one of a tree, which may be any number.
func indexMode(mode uint64) uint64 {
	const kinds, regular, link, directory, module = 0o170000, 0o100000, 0o120000, 0o040000, 0o160000
	switch kind := mode & kinds; kind {
	case regular:
		return regular | 0o644 | mode&0o100 | mode&0o100>>3 | mode&0o100>>6
	case link, directory:
		return kind
	}
	return module
}
