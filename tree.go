//go:build linux

package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Bounds of what a commit may show at a service's links, and of a commit or tree object.
const (
	treeEntries = 100_000
	treeDepth   = 64
	maxShown    = 2 << 30
	maxObject   = 64 << 20
	maxTree     = 16 << 20
	maxHead     = 1 << 20 // of a commit, up to its author: 20,000 parents
)

// blob is one file, symbolic link or submodule of a tree; the zero blob: nothing there.
type blob struct {
	mode string // "100644", "100755", "120000" (symbolic link) or "160000" (submodule: an empty directory)
	id   string // object id, 40 or 64 hex digits
}

// tree is what a service's links show in a commit: path, relative to the repository's top, -> mode and id.
// Directories follow from the paths, but for a link that is an empty directory, which is not in it.
type tree map[string]blob

// walked is what the links of one service are in a commit, or why it must not go live (a *refusal).
type walked struct {
	content   string
	tree      tree
	err       error
	committed time.Time
}

// walkKey is what was walked: a commit, and the linksKey of what of it.
type walkKey struct{ commit, links string }

// content identifies what the links of dirs show in commit; a *refusal (Reason link) where they can't be
// shown. For the tip of a tracked branch it is known already and costs nothing.
func (u *upstream) content(ctx context.Context, commit string, dirs []dir) (string, error) {
	w, err := u.walk(ctx, commit, dirs)
	if w.content != "" {
		return w.content, nil
	}
	return "", cmp.Or(err, w.err)
}

// tree returns what the links of dirs show in commit, every id of it computed by us; a *refusal where it
// must not go live. Nobody may change it.
func (u *upstream) tree(ctx context.Context, commit string, dirs []dir) (tree, error) {
	w, err := u.walk(ctx, commit, dirs)
	return w.tree, cmp.Or(err, w.err)
}

// walk walks commit where it is not known what the links of dirs are in it.
func (u *upstream) walk(ctx context.Context, commit string, dirs []dir) (walked, error) {
	u.mu.Lock()
	known, ok := u.clone.walks[walkKey{commit, linksKey(dirs)}]
	u.mu.Unlock()
	if ok {
		return known, nil
	}

	o, err := u.open(ctx)
	if err != nil {
		return walked{}, err
	}
	defer o.close()
	return (&walker{o: o, commit: commit}).run(dirs, walked{})
}

// linksKey names what of dirs decides what they show.
func linksKey(dirs []dir) string {
	var parts []string
	for _, d := range dirs {
		parts = append(parts, d.link+"\x00"+d.kind.String())
	}
	return digestSet(parts)
}

// digestSet is a short name for a set of strings.
func digestSet(parts []string) string {
	slices.Sort(parts)
	return digest(slices.Compact(parts)...)
}

// walkTips walks the tips that are news, fetches what is missing of what services are shown of them, and
// makes them known. A tip that upstream named but did not send becomes that of before again: the next look
// decides.
func (c *clone) walkTips(ctx context.Context, remote map[string]string) error {
	tips := maps.Clone(c.tips)
	for branch, tip := range remote {
		tips[tipRef(branch)] = tip
	}
	c.u.mu.Lock()
	walks := maps.Clone(c.walks)
	c.u.mu.Unlock()

	blobs, areNew, err := c.walkNews(ctx, tips, walks)
	if err != nil {
		return err
	}

	lacks := idLines(blobs)
	if mayBeHere := c.leavesOut() != noBlobs || !areNew; mayBeHere {
		lacks, err = c.missing(ctx, blobs)
	}
	if err == nil {
		err = c.fetchBlobs(ctx, lacks)
	}
	if err == nil && !maps.Equal(tips, c.tips) {
		err = replaceFile(c.dir+"/packed-refs", []byte(refsText(tips)), 0o644)
	}
	if err != nil {
		return err
	}

	commits := slices.Collect(maps.Values(tips))
	isOld := func(k walkKey, _ walked) bool { return !slices.Contains(commits, k.commit) }
	maps.DeleteFunc(walks, isOld)

	c.u.mu.Lock()
	defer c.u.mu.Unlock()
	c.tips, c.walks = tips, walks
	return nil
}

// walkNews adds what services are shown of the tips to walks, and returns which blobs of it their tips of
// before did not show; areNew says that these are known of all.
func (c *clone) walkNews(ctx context.Context, tips map[string]string, walks map[walkKey]walked) (
	blobs map[string]bool, areNew bool, err error) {
	blobs, areNew = map[string]bool{}, true
	o := (*objects)(nil)
	defer func() { o.close() }()
	for _, t := range c.u.tracked {
		ref := tipRef(t.branch)
		key := walkKey{tips[ref], t.links}
		if _, known := walks[key]; known || key.commit == "" {
			continue
		}
		if o == nil || o.err != nil { // what one service must not have ends the reading
			o.close()
			if o, err = c.open(ctx); err != nil {
				return nil, false, err
			}
		}

		before := walks[walkKey{c.tips[ref], t.links}]
		w := &walker{o: o, commit: key.commit}
		found, err := w.run(t.dirs, before)
		if errors.Is(err, errMissing) {
			delete(tips, ref)
			if old := c.tips[ref]; old != "" {
				tips[ref] = old
			}
			if err = c.probe(ctx); err == nil {
				continue
			}
		}
		if err != nil {
			return nil, false, err
		}

		walks[key] = found
		if isFirst := len(c.tips) == 0; !isFirst && before.content == "" {
			areNew = false
		}
		if found.content != before.content {
			found.tree.blobs(blobs)
			w.above.blobs(blobs)
			for _, b := range before.tree {
				delete(blobs, b.id)
			}
		}
	}
	return blobs, areNew, nil
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

// walker walks one commit's trees. It ends with a *refusal (Reason link) where they are not what may go live.
type walker struct {
	walked
	o       *objects
	commit  string
	above   tree // what git status reads in the directories above links
	entries int  // that were added to tree, with directories
}

// refusal makes the refusal of the commit; part says what of it would be the same in another one, where its
// content is not known.
func (w *walker) refusal(part, format string, args ...any) error {
	info := fmt.Sprintf("commit %.8s: ", w.commit) + fmt.Sprintf(format, args...)
	content := cmp.Or(w.content, digest("link", part))
	return &refusal{version: version{w.commit, content}, Reason: "link", Info: info}
}

// list reads a tree.
func (w *walker) list(id string) ([]entry, error) {
	if list, known := w.o.trees[id]; known {
		return list, nil
	}
	data, err := w.o.whole(id, "tree")
	if r, ok := errors.AsType[*refusal](err); ok {
		return nil, w.refusal(id, "%s", r.Info)
	}
	if errors.Is(err, errMissing) {
		err = damaged{errors.New(err.Error())} // no longer one that upstream may not have sent
		w.o.c.noteDamage(err)
	}
	if err != nil {
		return nil, err
	}

	list, err := parseTree(data, len(id)/2)
	if err != nil {
		return nil, w.refusal(id, "%v", err)
	}

	if w.o.kept += len(list); w.o.kept < 4*treeEntries { // memory is bounded; what is not kept is read again
		w.o.trees[id] = list
	}
	return list, nil
}

// run finds out what the links of dirs are. What lies beneath them is not looked at where it is the same as
// before.
func (w *walker) run(dirs []dir, before walked) (walked, error) {
	links, err := w.links(dirs)
	if err == nil {
		var parts []string
		for _, e := range links {
			parts = append(parts, e.name+"\x00"+e.mode+" "+e.id)
		}
		w.content = digestSet(parts)
	}
	isSame := w.content == before.content && before.tree != nil
	if isSame {
		w.tree = before.tree
		return w.walked, nil
	}

	w.tree = tree{}
	for _, e := range links {
		if err == nil {
			err = w.add(e, 0)
		}
	}
	if r, ok := errors.AsType[*refusal](err); ok {
		r.Commit = w.commit
		w.tree, w.err, err = nil, r, nil
	}
	if err != nil {
		return walked{}, err
	}
	return w.walked, nil
}

// links returns the entries that dirs link to; the name of each is its whole path.
func (w *walker) links(dirs []dir) (links []entry, err error) {
	c, err := w.o.commit(w.commit)
	if err != nil {
		return nil, err
	}

	w.committed, w.above = c.at, tree{}
	for _, d := range dirs {
		e, err := w.entryAt(c.top, d.link)
		if err != nil {
			return nil, err
		}
		if wrong := wrongLink(d, e); wrong != "" {
			wrong = fmt.Sprintf("link %q%s", d.link, wrong)
			return nil, w.refusal(wrong+linksKey(dirs), "%s", wrong)
		}
		links = append(links, e)
	}
	return links, nil
}

// entryAt returns what there is at a path below the tree top, or the last that there is on the way to it.
func (w *walker) entryAt(top, p string) (entry, error) {
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
			isRead := slices.Contains([]string{".gitattributes", ".gitignore"}, e.name)
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

// wrongLink says what is wrong with a link, given what entryAt returned for it; "" where it can be shown.
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
func (w *walker) add(e entry, depth int) error {
	w.entries++
	switch {
	case w.entries > treeEntries:
		return w.refusal("", "more than %d files and directories below the links", treeEntries)
	case depth > treeDepth:
		return w.refusal("", "more than %d directories in each other below the links", treeDepth)
	}

	switch e.mode {
	case "100644", "100755", "120000", "160000":
		w.tree[e.name] = blob{e.mode, e.id}
		return nil
	case "40000":
	default:
		return w.refusal("", "%q has the mode %.20q, which git does not make", e.name, e.mode)
	}

	list, err := w.list(e.id)
	if err != nil {
		return err
	}
	for _, below := range list {
		if !isFileName(below.name) {
			return w.refusal("", "%q is not a path that may be checked out", e.name+"/"+below.name)
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

// idsOf returns the ids of the files and symbolic links among paths, in their order.
func (t tree) idsOf(paths []string) (ids []string) {
	for _, p := range paths {
		if b := t[p]; b.id != "" && b.mode != "160000" {
			ids = append(ids, b.id)
		}
	}
	return ids
}

// idLines returns ids as git reads them, a line each; nil for none.
func idLines(ids map[string]bool) (lines []byte) {
	for _, id := range slices.Sorted(maps.Keys(ids)) {
		lines = append(lines, id+"\n"...)
	}
	return lines
}

// commitObject is a commit: its text, the id of its tree, its parents, and when it was made; zero where that
// makes no sense.
type commitObject struct {
	text    []byte
	top     string
	parents []string
	at      time.Time
}

// commit reads a commit. See gitformat-commit-graph(5), git-cat-file(1):
//
//	tree 29ff16c9...
//	parent 606eb576...
//	author Ann <ann@example.org> 1767225600 +0100
//	committer ...
func (o *objects) commit(id string) (c commitObject, err error) {
	if c.text, err = o.whole(id, "commit"); err != nil {
		return c, err
	}

	var ids []string
	if head := commitHead.FindSubmatch(c.text[:min(len(c.text), maxHead)]); head != nil {
		for i, word := range strings.Fields(string(head[1])) {
			if i%2 == 1 {
				ids = append(ids, word)
			}
		}
		// A year of four digits, as RFC 1123 has it, fits 38 bits.
		if seconds, err := strconv.ParseInt(string(head[2]), 10, 38); err == nil {
			c.at = time.Unix(seconds, 0)
		}
	}

	isOdd := func(s string) bool { return len(s) != len(id) }
	if ids == nil || slices.ContainsFunc(ids, isOdd) {
		info := fmt.Sprintf("commit %.8s is malformed: it begins with %.160q", id, c.text)
		return c, &refusal{version: version{id, digest("link", id)}, Reason: "link", Info: info}
	}
	c.top, c.parents = ids[0], ids[1:]
	return c, nil
}

var commitHead = regexp.MustCompile(`^(tree [0-9a-f]+\n(?:parent [0-9a-f]+\n)*)author ` +
	`(?:.*\ncommitter .* (\d+) [-+]\d+\n)?`)

// verify checks that a commit carries an SSH signature by one of the allowed signers, whose key is not in
// the file SIGNERS.revoked, if that exists: on the very bytes that were hashed, as git's gpg-interface.c
// does. It is a *refusal (Reason signers) if not, and another error where that could not be found out.
func (u *upstream) verify(ctx context.Context, commit, signers string) error {
	if _, err := os.Stat(signers); err != nil {
		return fmt.Errorf("signers: %w: put the file there, see ssh-keygen(1), ALLOWED SIGNERS", err)
	}

	o, err := u.open(ctx)
	if err != nil {
		return err
	}
	defer o.close()
	c, err := o.commit(commit)
	if err != nil {
		return err
	}

	payload, signature := splitSignature(string(c.text), len(commit))
	isSSH := strings.HasPrefix(signature, "-----BEGIN SSH SIGNATURE-----")
	switch {
	case signature == "":
		err = errors.New("it carries no signature")
	case !isSSH, len(signature) > 16<<10:
		err = errors.New("it carries another kind of signature")
	default:
		err = verifySSH(ctx, signers, payload, signature, c.at)
	}

	hasRun := strings.HasPrefix(fmt.Sprint(err), "ssh-keygen")
	switch {
	case err == nil:
		return nil
	case errors.Is(err, exec.ErrNotFound), tooOld.MatchString(err.Error()):
		return fmt.Errorf("signers need ssh-keygen of OpenSSH 8.2 or newer, install it "+
			"(Debian: openssh-client): %w", err)
	case hasRun && exitCode(err) <= 0:
		return err // killed, or took too long
	}

	info := fmt.Sprintf("commit %.8s is not signed by one of %s: %v", commit, signers, err)
	return &refusal{version: version{Commit: commit}, Reason: "signers", Info: info}
}

// tooOld is what an ssh-keygen that knows no -Y says.
var tooOld = regexp.MustCompile(`nknown option|illegal option|usage:`)

// splitSignature takes a commit apart into what was signed, and the signature made for its kind of hash.
// Lines of a header after its first begin with a blank.
func splitSignature(commit string, digits int) (payload, signature string) {
	head, message, _ := strings.Cut(commit, "\n\n")
	head += "\n"
	for _, m := range gpgsig.FindAllStringSubmatch(head, -1) {
		if isOfKind := (m[1] == "-sha256") == (digits == 64); isOfKind {
			signature += strings.ReplaceAll(m[2], "\n ", "\n")
		}
	}
	return gpgsigAny.ReplaceAllString(head, "") + "\n" + message, signature
}

var (
	gpgsig    = regexp.MustCompile(`(?m)^gpgsig(|-sha256) (.*\n(?: .*\n)*)`)
	gpgsigAny = regexp.MustCompile(`(?m)^gpgsig.*\n(?: .*\n)*`)
)

// verifySSH asks ssh-keygen(1) whether a signature is by one of the signers. Times are in the host's time
// zone, as those in the signers file.
func verifySSH(ctx context.Context, signers, payload, signature string, when time.Time) error {
	at := "-Overify-time=" + when.Format("20060102150405")
	out, err := sshKeygen(ctx, "find-principals", "", signature, "-f", signers, at)
	if err != nil {
		return err
	}

	args := []string{"-n", "git", "-f", signers, at}
	if revoked := signers + ".revoked"; lexists(revoked) {
		args = append(args, "-r", revoked)
	}

	err = errors.New("no signer was named")
	for who := range strings.SplitSeq(strings.TrimSpace(string(out)), "\n") {
		if _, err = sshKeygen(ctx, "verify", payload, signature, append(args, "-I", who)...); err == nil {
			return nil
		}
	}
	return err
}

// sshKeygen runs ssh-keygen -Y; the signature is handed over by a pipe that it fits in.
func sshKeygen(ctx context.Context, verb, payload, signature string, args ...string) ([]byte, error) {
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer r.Close()

	_, err = io.WriteString(w, signature)
	if err := errors.Join(err, w.Close()); err != nil {
		return nil, err
	}

	cmd := exec.Command("ssh-keygen", append([]string{"-Y", verb, "-s", "/proc/self/fd/3"}, args...)...)
	cmd.Stdin, cmd.ExtraFiles = strings.NewReader(payload), []*os.File{r}
	if verb == "verify" {
		cmd.Stdout = &tail{} // where it says what is wrong
	}
	return execute(ctx, program{name: "ssh-keygen -Y " + verb, cmd: cmd, limit: localLimit})
}
