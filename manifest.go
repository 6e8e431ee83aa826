//go:build linux

package main

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"
)

// noted is what the manifest knows of one path: what we put there, and what lstat(2) said of it then.
type noted struct {
	blob
	stamp
}

// stamp is what lstat(2) says of a file. As long as it stays the same nobody can have changed the file.
type stamp struct {
	size         int64 // -1: not known
	inode        uint64
	mtime, ctime int64 // in ns; ctime 0: it may change again without another ctime, so it has to be read
}

func stampOf(st *syscall.Stat_t) stamp {
	return stamp{st.Size, st.Ino, st.Mtim.Nano(), st.Ctim.Nano()}
}

// kind returns the type bits of a mode that stat(2) has for the blob.
func (n *noted) kind() uint32 {
	switch n.mode {
	case "120000":
		return syscall.S_IFLNK
	case "160000":
		return syscall.S_IFDIR
	}
	return syscall.S_IFREG
}

// manifest is what we put into a service's directory.
type manifest struct {
	live, next version            // next: is being made live, else zero
	known      map[string][]noted // by path; several while next is being made live
	paths      []string           // of known, sorted
	tree       tree               // see files.tree; nil: not asked for yet
}

// newManifest makes a manifest. Where likely are the sorted paths of known nothing is sorted.
func newManifest(live, next version, known map[string][]noted, likely ...string) *manifest {
	isOther := func(p string) bool { return known[p] == nil }
	if len(likely) != len(known) || slices.ContainsFunc(likely, isOther) {
		likely = slices.Sorted(maps.Keys(known))
	}
	return &manifest{live: live, next: next, known: known, paths: likely}
}

// pending says that a publish was begun and not finished.
func (m *manifest) pending() bool { return m.next != version{} }

// begin returns the manifest of a publish of v.
func (m *manifest) begin(v version, staged map[string]noted) *manifest {
	known := maps.Clone(m.known)
	for p, n := range staged {
		same := func(o noted) bool { return o.blob == n.blob }
		known[p] = append(slices.DeleteFunc(slices.Clone(m.known[p]), same), n)
	}
	return newManifest(m.live, v, known, m.paths...)
}

// end returns the manifest after the publish.
func (m *manifest) end(want tree) *manifest {
	known := make(map[string][]noted, len(want))
	for p, b := range want {
		was := m.known[p]
		if isSame := len(was) == 1 && was[0].blob == b; isSame {
			known[p] = slices.Clone(was) // finish notes in it what it looks at
			continue
		}

		n := noted{stamp: stamp{size: -1}}
		for _, k := range was {
			if k.id == b.id {
				n = k // the last one is what was staged
			}
		}
		n.blob = b
		known[p] = []noted{n}
	}
	return newManifest(m.next, version{}, known, m.paths...)
}

// write writes the manifest, one line per path:
//
//	gitopper manifest 1
//	live "606eb576..." "9c1d..."
//	next "" ""
//	100644 587be6b4... 12 4711 1767225600000000000 1767225600000000000 "a/b"
//	end 9f86d081...
func (m *manifest) write(name string) error {
	var b bytes.Buffer
	b.Grow(200 * len(m.paths))
	fmt.Fprintf(&b, "gitopper manifest 1\nlive %q %q\nnext %q %q\n",
		m.live.Commit, m.live.Content, m.next.Commit, m.next.Content)

	var line []byte
	for _, p := range m.paths {
		for _, n := range m.known[p] {
			line = append(append(append(line[:0], n.mode...), ' '), n.id...)
			line = strconv.AppendInt(append(line, ' '), n.size, 10)
			line = strconv.AppendUint(append(line, ' '), n.inode, 10)
			line = strconv.AppendInt(append(line, ' '), n.mtime, 10)
			line = strconv.AppendInt(append(line, ' '), n.ctime, 10)
			b.Write(append(strconv.AppendQuote(append(line, ' '), p), '\n'))
		}
	}

	fmt.Fprintf(&b, "end %s\n", digest(b.String()))
	return unwritten(writeFile(name, b.Bytes()))
}

// readManifest is an error where the manifest is missing, or not whole.
func readManifest(name string) (*manifest, error) {
	text, err := os.ReadFile(name)
	if err != nil {
		return nil, err
	}

	body, end, _ := strings.Cut(string(text), "\nend ")
	if strings.TrimSpace(end) != digest(body+"\n") {
		return nil, fmt.Errorf("%s: not whole", name)
	}

	var live, next version
	_, err = fmt.Sscanf(body, "gitopper manifest 1\nlive %q %q\nnext %q %q",
		&live.Commit, &live.Content, &next.Commit, &next.Content)

	known := map[string][]noted{}
	for i, line := range strings.Split(body, "\n") {
		if err != nil || i < 3 {
			continue
		}
		var n noted
		var p string
		n, p, err = parseNoted(line)
		known[p] = append(known[p], n)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: not a manifest that this gitopper knows: %w", name, err)
	}
	return newManifest(live, next, known), nil
}

// parseNoted reads a path's line.
func parseNoted(line string) (n noted, p string, err error) {
	words := strings.SplitN(line, " ", 7)
	if len(words) < 7 {
		return n, "", fmt.Errorf("%q is cut short", line)
	}

	var errs [5]error
	n.blob = blob{words[0], words[1]}
	n.size, errs[0] = strconv.ParseInt(words[2], 10, 64)
	n.inode, errs[1] = strconv.ParseUint(words[3], 10, 64)
	n.mtime, errs[2] = strconv.ParseInt(words[4], 10, 64)
	n.ctime, errs[3] = strconv.ParseInt(words[5], 10, 64)
	p, errs[4] = strconv.Unquote(words[6])
	return n, p, errors.Join(errs[:]...)
}

// load returns the manifest; one that can't be read is empty.
func (f *files) load() *manifest {
	if f.m == nil {
		var err error
		if f.m, err = readManifest(f.manifest); err != nil {
			f.m = newManifest(version{}, version{}, map[string][]noted{})
		}
		f.cut = lexists(f.dir + "/" + publishDir)
	}
	return f.m
}

// live returns the version whose files are live by the manifest; zero where it is missing or torn.
func (f *files) live() version { return f.load().live }

// pending says that a publish was begun and not finished.
func (f *files) pending() bool {
	return f.load().pending() || f.cut
}
