//go:build linux

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

const (
	checkLimit  = time.Minute
	checkMemory = 2 << 30 // bytes that a check's program may have for itself
	atCwd       = -100    // AT_FDCWD of openat(2)
)

// view is what a check is to see: every local shows the candidate.
type view struct {
	Checkout string   // the service's directory
	Dirs     []dir    // whose locals show the candidate
	Gone     []string // paths that the candidate takes away
	Argv     []string
}

// checkJob is what a check's child is told on its standard input.
type checkJob struct {
	Scratch string   // an empty directory of ours, on which the child mounts a tmpfs
	Shows   []shown  // what to show where
	Gone    [][]byte // bytes, for JSON spoils names that are not UTF-8
	Argv    []string
}

// runCheck runs v.Argv in a mount and PID namespace of its own, in which every local shows the candidate:
// what is staged over what is live, less what goes, read-only. The locals must be there, see makeTargets.
// Other processes see nothing of it; all that it mounts and starts is gone when it ends. A command that does
// not accept the candidate is a *refusal (Reason check) with its last words, which are private; one that is
// missing, that ran out of time or that was killed is trouble.
func runCheck(ctx context.Context, scratch string, v view) error {
	if err := os.MkdirAll(scratch, 0o700); err != nil {
		return err
	}
	job := checkJob{Scratch: scratch, Shows: wantedShows(v.Checkout, v.Dirs), Argv: v.Argv}
	for _, p := range v.Gone {
		job.Gone = append(job.Gone, []byte(p))
	}
	text, err := json.Marshal(job)
	if err != nil {
		return err
	}

	// The child's end is closed when the command is executed: what comes through it is our own trouble, not
	// the command's.
	trouble, childs, err := os.Pipe()
	if err != nil {
		return err
	}
	defer trouble.Close()

	cmd := exec.Command("/proc/self/exe", checkChild)
	cmd.Dir, cmd.Stdin, cmd.Stdout = "/", bytes.NewReader(text), &tail{}
	cmd.ExtraFiles = []*os.File{childs}
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=/root"}
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWNS | syscall.CLONE_NEWPID,
		Pdeathsig:  syscall.SIGKILL,
	}
	p := program{name: "check " + v.Argv[0], cmd: cmd, limit: checkLimit, sacrifice: true, private: true}
	_, err = execute(ctx, p)
	childs.Close()

	words, _ := io.ReadAll(io.LimitReader(trouble, 4096))
	if err != nil && len(words) > 0 {
		return fmt.Errorf("check: %s", words)
	}
	exit := (*exec.ExitError)(nil)
	if !errors.As(err, &exit) {
		return err
	}
	// SIGKILL is what the kernel ends programs with when memory is short, and shells tell so of theirs: that
	// says nothing of the candidate.
	status, _ := exit.Sys().(syscall.WaitStatus)
	if status.Signal() == syscall.SIGKILL || status.ExitStatus() == 128+int(syscall.SIGKILL) {
		return err
	}
	return &refusal{Reason: "check", Info: err.Error()}
}

// checkChild is the argument with which the binary is run as a check's child; nobody types it.
const checkChild = "check-child"

// runCheckChild is the child's side of runCheck: PID 1 of its namespace, it builds the view and becomes the
// command. It only returns on trouble, which the caller writes to descriptor 3.
func runCheckChild() error {
	syscall.CloseOnExec(3)
	var job checkJob
	if err := json.NewDecoder(os.Stdin).Decode(&job); err != nil {
		return err
	}
	null, err := syscall.Open("/dev/null", syscall.O_RDONLY|syscall.O_CLOEXEC, 0)
	if err == nil {
		err = syscall.Dup3(null, 0, 0)
	}
	if err != nil {
		return err
	}

	if err := job.build(); err != nil {
		return err
	}
	exe, err := exec.LookPath(job.Argv[0])
	if err != nil {
		return fmt.Errorf("%w: the commit waits", err)
	}

	// By ourselves: the bound of a program that was just started would be this child's, too.
	memory := syscall.Rlimit{Cur: checkMemory, Max: checkMemory}
	if err := syscall.Setrlimit(syscall.RLIMIT_DATA, &memory); err != nil {
		return err
	}
	return fmt.Errorf("%s: %w", exe, syscall.Exec(exe, job.Argv, os.Environ()))
}

// build makes every local show the candidate.
func (j *checkJob) build() error {
	const proc = syscall.MS_NOSUID | syscall.MS_NODEV | syscall.MS_NOEXEC
	// First of all, for nothing of ours may reach the host.
	err := mountAt("", "/", "", syscall.MS_REC|syscall.MS_PRIVATE, "")
	if err == nil {
		err = mountAt("proc", "/proc", "proc", proc, "")
	}
	if err == nil {
		err = mountAt("tmpfs", j.Scratch, "tmpfs", syscall.MS_NOSUID, "mode=0700")
	}
	if err == nil {
		err = os.Chdir(j.Scratch) // layers get short names: : and , have a meaning in an overlay's options
	}
	if err != nil {
		return err
	}

	for i, s := range j.Shows {
		if err := j.show(s, strconv.Itoa(i)); err != nil {
			return fmt.Errorf("show the candidate at %s: %w", s.Local, err)
		}
	}
	return os.Chdir("/")
}

// mountAt is mount(2) with the names in its error.
func mountAt(src, at, fstype string, flags uintptr, options string) error {
	if err := syscall.Mount(src, at, fstype, flags, options); err != nil {
		return fmt.Errorf("mount %s on %s: %w", fstype, at, err)
	}
	return nil
}

// show makes one local show the candidate: for a directory by an overlay of what is staged over what is
// live, in which what goes is then removed, at the cost of what the candidate changes. Sources and target
// are opened anew here, without following links of the owner's. The child's end closes them.
func (j *checkJob) show(s shown, n string) error {
	checkout, err := openPlace(s.Checkout)
	if err != nil {
		return err
	}
	var layers []place
	staged, err := checkout.below(stageDir + "/" + s.Link)
	if err == nil {
		layers = append(layers, staged)
	} else if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	live, err := checkout.below(s.Link)
	if err == nil && (live.kind() == syscall.S_IFDIR) == (s.Kind == aDirectory) {
		layers = append(layers, live)
	}

	if s.Kind == aDirectory {
		merged, err := overlay(layers, n)
		if err != nil {
			return err
		}
		layers = []place{merged}
		if err := j.removeGone(merged, s.Link); err != nil {
			return err
		}
	}
	if len(layers) == 0 {
		return fs.ErrNotExist
	}
	return showReadOnly(layers[0], s.Local)
}

// overlay mounts an overlay of the layers, if any, in the directory where we are. It has the attributes of
// the lowest one. See Documentation/filesystems/overlayfs.rst of Linux.
func overlay(layers []place, n string) (merged place, err error) {
	names := []string{"all" + n, "upper" + n, "work" + n, "empty" + n}
	for i := range layers {
		names = append(names, fmt.Sprintf("layer%s.%d", n, i))
	}
	for _, name := range names {
		err = errors.Join(err, os.Mkdir(name, 0o755))
	}
	for i, layer := range layers {
		err = errors.Join(err, mountAt(layer.path(), names[4+i], "", syscall.MS_BIND, ""))
		st, serr := layer.stat()
		err = errors.Join(err, serr, os.Chown(names[1], int(st.Uid), int(st.Gid)))
		err = errors.Join(err, syscall.Chmod(names[1], st.Mode&0o7777))
	}
	if err != nil {
		return place{-1}, err
	}

	lower := append(names[4:], names[3]) // at least one is needed
	options := "lowerdir=" + strings.Join(lower, ":") + ",upperdir=" + names[1] + ",workdir=" + names[2]
	if err := mountAt("overlay", names[0], "overlay", 0, options); err != nil {
		return place{-1}, err
	}
	return placeAt(atCwd, names[0])
}

// removeGone removes what goes from a view of the link, and then the directories that are empty by that:
// inner ones first, each once, for to look whether it is empty costs what there is in it.
func (j *checkJob) removeGone(all place, link string) error {
	goes := map[string]bool{} // false: a directory, if it is empty
	for _, p := range j.Gone {
		rel, ok := strings.CutPrefix(string(p), link+"/")
		if !ok {
			continue
		}
		goes[rel] = true
		for d := path.Dir(rel); d != "."; d = path.Dir(d) {
			if !goes[d] {
				goes[d] = false
			}
		}
	}

	for _, rel := range slices.Backward(slices.Sorted(maps.Keys(goes))) {
		dir, err := all.below(path.Dir(rel))
		if err != nil {
			continue // what is staged, or somebody's own, has the place of a directory above it
		}
		err = syscall.Rmdir(dir.path() + "/" + path.Base(rel))
		if err == syscall.ENOTDIR && goes[rel] {
			err = syscall.Unlinkat(dir.fd, path.Base(rel))
		}
		dir.close()
		if err != nil && !mayStay(err) {
			return fmt.Errorf("remove %q from the view: %w", rel, err)
		}
	}
	return nil
}

// mayStay says of the outcome of a removal that there is nothing, something else, or more in it.
func mayStay(err error) bool {
	return slices.Contains([]error{syscall.ENOENT, syscall.ENOTDIR, syscall.ENOTEMPTY}, err)
}

// showReadOnly makes a local show src, read-only.
func showReadOnly(src place, local string) error {
	at, err := openPlace(local)
	if err != nil {
		return err
	}
	if err := mountAt(src.path(), at.path(), "", syscall.MS_BIND, ""); err != nil {
		return err
	}
	over, err := openPlace(local)
	if err != nil {
		return err
	}
	return mountAt("", over.path(), "", syscall.MS_BIND|syscall.MS_REMOUNT|syscall.MS_RDONLY, "")
}

// readCandidate reads a file as it would be if the candidate were live.
func (s *Service) readCandidate(ctx context.Context, c *candidate, name string) ([]byte, error) {
	rel, err := filepath.Rel(s.files.dir, name)
	if err != nil {
		return nil, err
	}
	b, isInCommit := c.want[rel]
	switch {
	case slices.Contains(c.diff.gone, rel):
		return nil, &fs.PathError{Op: "open", Path: name, Err: fs.ErrNotExist}
	case !isInCommit:
		return os.ReadFile(name)
	case !strings.HasPrefix(b.mode, "100"):
		return nil, fmt.Errorf("%s: not a regular file", name)
	}

	o, err := s.up.open(ctx)
	if err != nil {
		return nil, err
	}
	defer o.close()
	var text bytes.Buffer
	_, err = o.blob(b.id, &bounded{to: &text})
	return text.Bytes(), err
}
