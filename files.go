//go:build linux

package main

import (
	"cmp"
	"context"
	"crypto/sha1"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"maps"
	"os"
	"path"
	"slices"
	"strings"
	"syscall"
	"time"
)

// names in a service's directory that are ours.
const (
	ourDir     = ".gitopper"
	stageDir   = ourDir + "/stage"   // a candidate's changed files, at their paths
	publishDir = ourDir + "/publish" // what is going live, and what came out
	editsDir   = ourDir + "/edits"   // NNNN-TIME/PATH: local edits that were undone
)

// Bounds on what a service's user can make root do.
const (
	maxUnknown = 2 << 30     // bytes read in one comparison of files whose size the manifest does not know
	maxEntries = 100_000     // of a directory that came out of a publish
	youngest   = time.Second // a file that changed within it may change again without another ctime

	editsAge  = 30 * 24 * time.Hour // edits are kept for so long at least,
	editsKept = 20                  // and of older publishes the last ones
)

// files is a service's directory on disk and its manifest. It belongs to the service's goroutine.
type files struct {
	dir      string // mount/service
	manifest string // the manifest's file, in root's state directory
	acct     account
	groups   map[string]int // ids of those that dirs name
	dirs     []dir          // whose links lie in it
	nested   []string       // absolute paths of other services' checkouts that lie in dir

	m       *manifest        // as on disk, with what was learned since; nil: not read yet
	staged  map[string]noted // by stage, for publish
	after   *manifest        // by publish, for finish: what the manifest will be
	cut     bool             // a publish was cut short before the manifest was read
	unknown int64            // bytes of files whose size is not known that may still be read
	full    shortage         // of the last stage that failed for want of space
	git     stamps           // of the .git for people, as the last comparison found it
	worn    worn             // as the .git for people was last found to be right
}

// shortage is what a stage lacked.
type shortage struct {
	what          string // a digest of what was to be staged
	bytes, inodes uint64 // that were free, and not enough
}

// diff is what separates the disk from a wanted tree.
type diff struct {
	put    []string // paths of want that the disk does not have as they should be, and links, sorted
	gone   []string // paths of ours that want does not have, sorted
	edited []string // paths that we put there and somebody changed, sorted
	alien  []string // paths of put where somebody's own is in the way, sorted
	modes  []string // directories of the user's whose mode or group is to be put right, in place
}

// changes returns how many paths are not as they should be.
func (d *diff) changes() int { return len(d.put) + len(d.gone) + len(d.modes) }

// found is what the disk has under a path.
type found int

const (
	missing found = iota
	blocked       // something that is no directory, and not ours, lies above the path
	asWanted
	ours   // what we put there, but not what is wanted now, or with another owner, group or mode
	theirs // anything else
)

// add tells what is to be done about a path. known says that the manifest has it as live.
func (d *diff) add(p string, wanted, known bool, there found) {
	to := func(list *[]string, isOf bool) {
		if isOf {
			*list = append(*list, p)
		}
	}
	if there == asWanted {
		return
	}

	to(&d.put, wanted)
	switch wasLive := wanted && known; there {
	case missing:
		to(&d.edited, wasLive)
	case blocked:
		to(&d.edited, wasLive)
		to(&d.alien, wanted)
	case ours:
		to(&d.gone, !wanted)
	case theirs:
		to(&d.gone, !wanted)
		to(&d.edited, known)
		to(&d.alien, wanted && !known)
	}
}

// compare looks at the disk: what separates it from want. A file that is as the manifest noted it costs one
// lstat(2), any other one is read, if it has the size that the manifest knows.
func (f *files) compare(ctx context.Context, want tree) (diff, error) {
	// Whose the directories above are is asked by stage and publish, before anything is changed.
	top, err := placeAt(-1, f.dir)
	if err != nil {
		return diff{}, fmt.Errorf("%s: %w", f.dir, err)
	}
	defer top.close()
	f.git = gitStamps(top)
	return f.compareAt(ctx, top, want)
}

// compareAt is compare for a directory that was opened.
func (f *files) compareAt(ctx context.Context, top place, want tree) (diff, error) {
	var d diff
	live := &descent{top: top}
	defer live.close()

	m := f.load()
	paths := f.paths(want)
	f.unknown = maxUnknown
	for _, p := range paths {
		if err := ctx.Err(); err != nil {
			return d, err
		}
		b, wanted := want[p]
		there, err := f.findAt(ctx, live, p, b, paths)
		if err != nil {
			return d, fmt.Errorf("%s/%s: %w", f.dir, p, err)
		}
		// In a publish that was cut short nobody knows which of the blobs was live: what is none of them
		// counts as somebody's own then, and is kept as well.
		isLive := len(m.known[p]) > 0 && !m.pending()
		d.add(p, wanted, isLive, there)
	}

	if err := f.compareDirs(live, want, &d); err != nil {
		return d, err
	}
	for _, list := range []*[]string{&d.put, &d.alien} {
		slices.Sort(*list)
		*list = slices.Compact(*list)
	}

	if len(d.put)+len(d.gone) == 0 {
		return d, nil
	}
	return d, f.mountsInTheWay(top, d)
}

// compareDirs adds links that are missing to d.put, and directories with a wrong mode or group to d.modes.
func (f *files) compareDirs(live *descent, want tree, d *diff) error {
	for _, p := range slices.Sorted(maps.Keys(f.directories(want))) {
		in := f.linkOf(p)
		if in == (dir{}) {
			continue // above the links
		}
		at, err := live.to(p)
		var st syscall.Stat_t
		if err == nil {
			st, err = at.stat()
		}

		there, err := f.standing(live, err)
		if err != nil {
			return fmt.Errorf("%s/%s: %w", f.dir, p, err)
		}

		a := f.attrs(p, blob{})
		isUsers := there == asWanted && int(st.Uid) == a.uid // no owner is changed in place
		if isUsers && a != attrsOf(&st) {
			d.modes = append(d.modes, p)
		}
		if in.link == p {
			d.add(p, true, false, there)
		}
	}
	return nil
}

// directories returns what must be a directory for want: links, and what lies above and between them and the
// paths of want.
func (f *files) directories(want tree) map[string]bool {
	all := dirsOf(maps.Keys(want))
	for p, b := range want {
		if b.mode == "160000" {
			all[p] = true
		}
	}

	for _, l := range f.dirs {
		if l.kind == aDirectory {
			maps.Copy(all, dirsOf(slices.Values([]string{l.link + "/."})))
		}
	}
	return all
}

// attrs is whose something is, and what they may do with it.
type attrs struct {
	uid, gid int
	perm     uint32
}

// attrsOf returns the attributes that lstat(2) has.
func attrsOf(st *syscall.Stat_t) attrs { return attrs{int(st.Uid), int(st.Gid), st.Mode & 0o7777} }

// attrs returns the attributes of a path below a link that shows b; zero: of a directory. Directories can be
// entered by whom they can be read.
func (f *files) attrs(p string, b blob) attrs {
	l := f.linkOf(p)
	a := attrs{f.acct.uid, f.acct.gid, uint32(cmp.Or(l.mode, 0o644))}
	if gid, ok := f.groups[l.group]; ok {
		a.gid = gid
	}

	switch b.mode {
	case "100644":
	case "120000":
		a.perm = 0o777 // as all symbolic links
	default:
		a.perm |= a.perm & 0o444 >> 2
	}
	return a
}

// linkOf returns the innermost link that a path is or lies in.
func (f *files) linkOf(p string) (in dir) {
	for _, l := range f.dirs {
		isInner := len(l.link) > len(in.link)
		if isInner && within(p, l.link) {
			in = l
		}
	}
	return in
}

// paths returns all paths of the manifest and of want, sorted.
func (f *files) paths(want tree) []string {
	m := f.load()
	all := slices.Clip(m.paths)
	for p := range want {
		if len(m.known[p]) == 0 {
			all = append(all, p)
		}
	}
	if len(all) > len(m.paths) {
		slices.Sort(all)
	}
	return all
}

// findAt says what is live under a path. paths, all of ours and all that are wanted, are sorted.
func (f *files) findAt(
	ctx context.Context, live *descent, p string, want blob, paths []string,
) (found, error) {
	known := f.load().known[p]
	parent, name := path.Split(p)
	dir, err := live.to(parent)
	var st syscall.Stat_t
	if err == nil {
		st, err = dir.lstat(name)
	}

	if there, err := f.standing(live, err); there != asWanted {
		return there, err
	}

	isOurDir := isDir(st) && anyBelow(paths, p)
	switch {
	case isOurDir && want == blob{}:
		return missing, nil // what was a file of ours is a directory of ours by now
	case isOurDir && len(known) == 0:
		return ours, nil // a directory of ours stands where a file is to be
	}

	has, err := f.match(ctx, dir, name, place{-1}, &st, known)
	isLink, wantsLink := has.mode == "120000", want.mode == "120000"
	isModule := isDir(st) && want.mode == "160000"
	switch {
	case err != nil:
		return missing, err
	case isModule:
		return asWanted, nil
	case has == blob{}:
		return theirs, nil
	case has.id != want.id, isLink != wantsLink, attrsOf(&st) != f.attrs(p, want):
		return ours, nil
	}
	return asWanted, nil
}

// standing says what is under a path to which the descent ended with an error: asWanted, as far as that goes,
// where there was none.
func (f *files) standing(live *descent, err error) (found, error) {
	switch {
	case err == nil:
		return asWanted, nil
	case !notThere(err):
		return missing, err
	case err == syscall.ENOENT, len(f.m.known[live.stuck]) > 0:
		return missing, nil
	}
	return blocked, nil
}

// anyBelow says whether one of the sorted paths lies below dir.
func anyBelow(paths []string, dir string) bool {
	i, _ := slices.BinarySearch(paths, dir+"/")
	return i < len(paths) && strings.HasPrefix(paths[i], dir+"/")
}

// match says which of the blobs that we put there a name in a directory still is; zero: none. What it had to
// read for that it notes, unless the file changed a moment ago. file is the name's, place{-1}: not open yet.
func (f *files) match(ctx context.Context, dir place, name string, file place, st *syscall.Stat_t,
	known []noted) (blob, error) {
	if len(known) == 0 {
		return blob{}, nil
	}
	now := stampOf(st)
	if i := slices.IndexFunc(known, func(n noted) bool { return n.stamp == now }); i >= 0 {
		return known[i].blob, nil
	}

	id, err := "", error(nil)
	switch st.Mode & syscall.S_IFMT {
	case syscall.S_IFLNK:
		to := ""
		if to, err = os.Readlink(dir.path() + "/" + name); err == nil {
			id, err = contentID(ctx, strings.NewReader(to), int64(len(to)), known)
		}
	case syscall.S_IFREG:
		if !f.mayRead(st.Size, known) {
			return blob{}, nil
		}
		if isShut := file.fd < 0; isShut {
			file, *st, err = dir.openFile(name)
			defer file.close()
		}
		if err == nil {
			id, err = contentID(ctx, file, st.Size, known)
		}
	}
	if err != nil {
		return blob{}, ctx.Err() // it changes under our eyes
	}

	kind := st.Mode & syscall.S_IFMT
	i := slices.IndexFunc(known, func(n noted) bool {
		isSame := n.id == id || kind == syscall.S_IFDIR
		return isSame && n.kind() == kind
	})
	if i < 0 {
		return blob{}, nil
	}

	known[i].stamp = stampOf(st)
	if time.Since(time.Unix(st.Ctim.Unix())) < youngest {
		known[i].ctime = 0
	}
	return known[i].blob, nil
}

// mayRead says whether a file of that size can be one of known.
func (f *files) mayRead(size int64, known []noted) bool {
	for _, n := range known {
		if n.size == size {
			return true
		}
		if n.size < 0 && size <= f.unknown {
			f.unknown -= size
			return true
		}
	}
	return false
}

// contentID computes the id of a blob of size bytes as git does, by the hash of the ids in known. It reads no
// further than size.
func contentID(ctx context.Context, r io.Reader, size int64, known []noted) (string, error) {
	h := newHash(len(known[0].id))
	fmt.Fprintf(h, "blob %d\x00", size)
	for left := size; left > 0; {
		if err := ctx.Err(); err != nil {
			return "", err
		}
		n, err := io.CopyN(h, r, min(left, 1<<20))
		if err != nil {
			return "", err
		}
		left -= n
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

// newHash returns the hash function whose ids have so many hex digits.
func newHash(digits int) hash.Hash {
	if digits == 64 {
		return sha256.New()
	}
	return sha1.New()
}

// mountsInTheWay is an error where somebody mounted something on or around what is to change: files are
// renamed into their places, which can't be done across mounts.
func (f *files) mountsInTheWay(top place, d diff) error {
	here, err := os.Readlink(top.path())
	if err != nil {
		return err
	}

	mounts, err := readMountinfo()
	if err != nil {
		return err
	}

	changes := slices.Concat(d.put, d.gone)
	for _, m := range mounts {
		at, below := strings.CutPrefix(m.point, here+"/")
		if !below {
			continue
		}
		if isHit := func(p string) bool { return nested(p, at) }; slices.ContainsFunc(changes, isHit) {
			return brokenError{fmt.Errorf("%s/%s is a mount point, where files are to change: unmount it",
				f.dir, at)}
		}
	}
	return nil
}

// enough is an error while there is no more space than when staging the same failed for want of it.
func (f *files) enough(top place, want tree, d diff) (shortage, error) {
	parts := []string{}
	for _, p := range d.put {
		parts = append(parts, p, want[p].id)
	}

	var fs syscall.Statfs_t
	if err := syscall.Statfs(top.path(), &fs); err != nil {
		return shortage{}, err
	}
	now := shortage{digest(parts...), fs.Bavail * uint64(fs.Bsize), fs.Ffree}
	if now.what != f.full.what {
		return now, nil
	}

	isMore := func(now, then uint64) bool { return now > then+then/16 }
	hasRoom := isMore(now.bytes, f.full.bytes) || isMore(now.inodes, f.full.inodes)
	if !hasRoom {
		return now, fmt.Errorf("lay out files in %s: %w: as before, make room there", f.dir, syscall.ENOSPC)
	}
	return now, nil
}

// probe makes an empty stage, and tells of a file system that can't do what a publish needs.
func (f *files) probe(top place, want tree) error {
	const probe = ourDir + "/probe"
	for _, name := range []string{stageDir, probe} {
		err := os.RemoveAll(top.path() + "/" + name)
		if err = errors.Join(err, syscall.Mkdirat(top.fd, name, 0o700)); err != nil {
			return fmt.Errorf("%s/%s: %w", f.dir, name, err)
		}
	}

	defer syscall.Rmdir(top.path() + "/" + probe)
	if err := renameat2(top, stageDir, top, probe, renameExchange); err != nil {
		return brokenError{fmt.Errorf("the file system of %s can't exchange two names (renameat2(2), "+
			"RENAME_EXCHANGE): %w: use another mount, on ext4, xfs, btrfs or tmpfs", f.dir, err)}
	}

	if _, err := top.lstat(ourDir + "/PROBE"); err != nil {
		return nil
	}
	if p, q := foldedTwice(want); p != "" { // the file system folds case
		return brokenError{fmt.Errorf("the file system of %s takes %q and %q of the commit for one name",
			f.dir, p, q)}
	}
	return nil
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

// prepare makes the directory, takes over one of an older gitopper or of another user, and throws away what a
// killed pass staged. (What one published waits for finish.) known is what the unit was last told of: it
// stands in for a manifest that was lost.
func (f *files) prepare(ctx context.Context, known tree) error {
	if err := f.takeDirectory(); err != nil {
		return err
	}
	top, err := openOwn(f.dir)
	if err != nil {
		return err
	}
	defer top.close()

	f.standIn(known)
	f.after, f.staged = nil, nil
	return os.RemoveAll(top.path() + "/" + stageDir)
}

// standIn has a tree stand in for a manifest that was lost.
func (f *files) standIn(known tree) {
	m := f.load()
	if m.live != (version{}) || len(m.known) > 0 {
		return
	}

	lost := map[string][]noted{}
	for p, b := range known {
		lost[p] = []noted{{b, stamp{size: -1}}}
	}
	f.m = newManifest(version{}, m.next, lost)
}

// tree returns what is live by the manifest, for when nothing else is being made live. Nobody changes it.
func (f *files) tree() tree {
	m := f.load()
	if m.tree == nil {
		m.tree = make(tree, len(m.known))
		for p, known := range m.known {
			m.tree[p] = known[0].blob
		}
	}
	return m.tree
}

// wasAlien says whether what was kept had been in the way of a commit, and not put there by us.
func (f *files) wasAlien(d diff, kept string) bool {
	rel := strings.SplitN(strings.TrimPrefix(kept, path.Join(f.dir, editsDir)+"/"), "/", 2)
	return len(rel) == 2 && slices.Contains(d.alien, rel[1])
}
