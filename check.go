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
)

// checkJob is what a check is to see and to run. Its child is told so on its standard input.
type checkJob struct {
	Scratch string  // an empty directory of ours, on which the child mounts a tmpfs
	Shows   []shown // what to show where
	Gone    []byte  // paths that the candidate takes away, with NULs between; JSON spoils what is not UTF-8
	Argv    []string
}

// runCheck runs j.Argv in a mount and PID namespace of its own, in which every local shows the candidate:
// what is staged over what is live, less what goes, read-only. The locals must be there, see makeTargets.
// Other processes see nothing of it; all that it mounts and starts is gone when it ends. A command that does
// not accept the candidate is a *refusal (Reason check) with its last words, which are private; one that is
// missing, that ran out of time or that was killed is trouble.
func runCheck(ctx context.Context, j checkJob) error {
	if err := os.MkdirAll(j.Scratch, 0o700); err != nil {
		return err
	}
	text, err := json.Marshal(j)
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
	p := program{
		name: "check " + j.Argv[0], cmd: cmd, limit: checkLimit, oomScoreAdj: sacrifice, private: true,
	}
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
		err = os.Chdir(j.Scratch) // names get short: : and , have a meaning in an overlay's options
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

// show makes one local show the candidate, read-only: for a directory by an overlay of what is staged over
// what is live, in which what goes is then removed, at the cost of what the candidate changes. Sources and
// target are opened anew here, without following links of the owner's. The child's end closes them.
func (j *checkJob) show(s shown, n string) error {
	checkout, err := openPlace(s.Checkout)
	if err != nil {
		return err
	}
	staged, err := checkout.below(stageDir + "/" + s.Link)
	if !isOrLacks(err) {
		return err
	}

	live, _ := checkout.below(s.Link)
	at, err := openPlace(s.Local)
	if err != nil {
		return err
	}

	fileType := map[kind]uint32{aFile: syscall.S_IFREG, aDirectory: syscall.S_IFDIR}[s.Kind]
	isOther := func(p place) bool { return p.kind() != fileType }
	layers := slices.DeleteFunc([]place{staged, live}, isOther)
	switch {
	case s.Kind == aDirectory:
		err = overlay(layers, at, n)
	case len(layers) == 0:
		err = fs.ErrNotExist
	default:
		err = mountAt(layers[0].path(), at.path(), "", syscall.MS_BIND, "")
	}
	if err != nil {
		return err
	}

	over, err := openPlace(s.Local)
	if err == nil {
		err = j.removeGone(over, s.Link)
	}
	if err == nil {
		err = mountAt("", over.path(), "", syscall.MS_BIND|syscall.MS_REMOUNT|syscall.MS_RDONLY, "")
	}
	return err
}

// overlay mounts an overlay of the layers, if any. It has the attributes of the lowest one. See
// Documentation/filesystems/overlayfs.rst of Linux.
func overlay(layers []place, at place, n string) (err error) {
	upper, work, empty := "upper"+n, "work"+n, "empty"+n
	for _, name := range []string{upper, work, empty} {
		err = errors.Join(err, os.Mkdir(name, 0o755))
	}

	options := "upperdir=" + upper + ",workdir=" + work + ",lowerdir="
	for _, layer := range layers {
		st, serr := layer.stat()
		err = errors.Join(err, serr, os.Chown(upper, int(st.Uid), int(st.Gid)))
		err = errors.Join(err, syscall.Chmod(upper, st.Mode&0o7777))
		options += layer.path() + ":"
	}
	if err != nil {
		return err
	}
	return mountAt("overlay", at.path(), "overlay", 0, options+empty) // at least one is needed
}

// removeGone removes what goes from a view of the link, and then the directories that are empty by that:
// inner ones first, each once, for to look whether it is empty costs what there is in it.
func (j *checkJob) removeGone(all place, link string) error {
	goes := map[string]bool{} // false: a directory, if it is empty
	for p := range strings.SplitSeq(string(j.Gone), "\x00") {
		rel, ok := strings.CutPrefix(p, link+"/")
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
		switch err {
		case nil, syscall.ENOENT, syscall.ENOTDIR, syscall.ENOTEMPTY: // somebody's own, or more, may stay
		default:
			return fmt.Errorf("remove %q from the view: %w", rel, err)
		}
	}
	return nil
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
