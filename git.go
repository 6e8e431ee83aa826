package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha1"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"os/user"
	"path"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
	"unsafe"
)

// Time limits of git's work.
const (
	lookLimit  = 30 * time.Second
	fetchLimit = 5 * time.Minute
	cloneLimit = 30 * time.Minute
	localLimit = time.Minute
)

// Names inside a checkout that are ours. All of them lie in or beside .git, where no link may point.
const (
	workDir   = ".git/gitopper"  // what a pass lays out; thrown away at the next
	stageDir  = workDir + "/new" // the candidate's changed files, at their paths
	cloneDir  = ".gitopper-new"  // a clone under way
	brokenGit = ".git.broken"    // the last damaged .git, kept for whoever wants to look
	ranRefs   = "refs/gitopper/ran/"
)

// account is the user that owns a checkout and as whom git runs.
type account struct {
	uid, gid int
	groups   []uint32
	home     string
}

// lookupAccount finds a user by name; the empty name is ourselves. The name service is asked through getent(1) where
// the files alone don't know the user, for a static binary has no other way to LDAP and the like.
func lookupAccount(ctx context.Context, name string) (account, error) {
	if name == "" {
		home := os.Getenv("HOME")
		if u, err := user.Current(); home == "" && err == nil {
			home = u.HomeDir
		}
		return account{uid: os.Getuid(), gid: os.Getgid(), home: home}, nil
	}
	u, err := user.Lookup(name)
	if err != nil {
		out, err := execute(ctx, "getent passwd "+name, exec.Command("getent", "passwd", name), localLimit, syscall.SIGKILL)
		f := strings.Split(strings.TrimSpace(string(out)), ":") // prometheus:x:109:117::/var/lib/prometheus:/usr/sbin/nologin
		if err != nil || len(f) < 7 {
			return account{}, fmt.Errorf("user %q does not exist: create it, or name the package that brings it", name)
		}
		u = &user.User{Username: f[0], Uid: f[2], Gid: f[3], HomeDir: f[5]}
	}
	uid, err1 := strconv.Atoi(u.Uid)
	gid, err2 := strconv.Atoi(u.Gid)
	if err := errors.Join(err1, err2); err != nil {
		return account{}, fmt.Errorf("user %q: %w", name, err)
	}
	a := account{uid: uid, gid: gid, home: u.HomeDir}
	groups, _ := u.GroupIds()
	for _, g := range groups {
		if n, err := strconv.ParseUint(g, 10, 32); err == nil {
			a.groups = append(a.groups, uint32(n))
		}
	}
	return a, nil
}

// gitCommand makes a git that asks nobody, reads no configuration but the checkout's own, runs no hook, and reaches the
// network only if told so: an object that is missing is then an error instead of a fetch. GIT_DIR is always given, or
// git would go looking for a repository in the parents of a checkout whose .git is gone.
func gitCommand(a account, dir string, network bool, args ...string) *exec.Cmd {
	cmd := exec.Command("git", append([]string{
		"-c", "core.hooksPath=/dev/null", "-c", "core.fsmonitor=false", "-c", "core.untrackedCache=false", "-c", "core.askPass=",
		"-c", "core.attributesFile=/dev/null", "-c", "core.autocrlf=false", "-c", "core.fileMode=true", "-c", "core.symlinks=true",
		"-c", "core.sparseCheckout=true", "-c", "core.sparseCheckoutCone=false", "-c", "index.sparse=false",
		"-c", "submodule.recurse=false", "-c", "fetch.recurseSubmodules=no", "-c", "protocol.ext.allow=never", "-c", "transfer.bundleURI=false",
		"-c", "core.protectNTFS=false", "-c", "core.protectHFS=false", "-c", "credential.helper=", "-c", "remote.origin.uploadpack=git-upload-pack",
		"-c", "gc.auto=0", "-c", "maintenance.auto=false", "-c", "http.lowSpeedLimit=1000", "-c", "http.lowSpeedTime=20",
	}, args...)...)
	cmd.Dir = "/proc" // nobody has a repository there
	allow := "none"
	if network {
		allow = "https:http:ssh:git:file"
	}
	cmd.Env = []string{
		"PATH=" + os.Getenv("PATH"), "HOME=" + a.home, "GIT_CONFIG_NOSYSTEM=1", "GIT_CONFIG_GLOBAL=/dev/null", "GIT_ATTR_NOSYSTEM=1",
		"GIT_TERMINAL_PROMPT=0", "GIT_ASKPASS=", "SSH_ASKPASS=", "GIT_ALLOW_PROTOCOL=" + allow, "GIT_LITERAL_PATHSPECS=1",
		"GIT_OPTIONAL_LOCKS=0", "GIT_CEILING_DIRECTORIES=/", "GIT_NO_REPLACE_OBJECTS=1",
		"GIT_SSH_COMMAND=ssh -o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=10 -o ServerAliveCountMax=2",
	}
	for _, k := range []string{"http_proxy", "https_proxy", "ftp_proxy", "all_proxy", "no_proxy", "SSL_CERT_FILE", "SSL_CERT_DIR"} {
		for _, k := range []string{k, strings.ToUpper(k)} {
			if v, ok := os.LookupEnv(k); ok {
				cmd.Env = append(cmd.Env, k+"="+v)
			}
		}
	}
	if dir != "" {
		cmd.Env = append(cmd.Env, "GIT_DIR="+dir+"/.git", "GIT_WORK_TREE="+dir)
	}
	// A git whose gitopper was killed must not go on writing beside its successor's.
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if a.uid != os.Getuid() {
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: uint32(a.uid), Gid: uint32(a.gid), Groups: a.groups}
	}
	return cmd
}

// runGit executes cmd, counts it, and names it after its verb in errors.
func runGit(ctx context.Context, verb string, cmd *exec.Cmd, limit time.Duration) ([]byte, error) {
	count.add("gitopper_machine_git_ops_total", "")
	out, err := execute(ctx, "git "+verb, cmd, limit, syscall.SIGKILL)
	// Status 1 is an answer: files differ, no ancestor, no such commit.
	if exit := (*exec.ExitError)(nil); err != nil && ctx.Err() == nil && !(errors.As(err, &exit) && exit.ExitCode() == 1) {
		count.add("gitopper_machine_git_errors_total", "")
	}
	return out, err
}

// gitVersion returns an error if there is no git program, or one older than 2.30 (or 2.34, the first that verifies SSH
// signatures, if signers are in use).
func gitVersion(ctx context.Context, signers bool) error {
	out, err := runGit(ctx, "--version", gitCommand(account{uid: os.Getuid()}, "", false, "--version"), localLimit)
	if err != nil {
		return fmt.Errorf("git is needed, 2.30 or newer: %w", err)
	}
	var major, minor int
	if _, err := fmt.Sscanf(string(out), "git version %d.%d", &major, &minor); err != nil {
		return fmt.Errorf("git --version says %q", strings.TrimSpace(string(out)))
	}
	need := 30
	if signers {
		need = 34
	}
	if major < 2 || major == 2 && minor < need {
		return fmt.Errorf("git %d.%d is too old: 2.%d or newer is needed", major, minor, need)
	}
	return nil
}

// lookUpstream asks an upstream once for the commits of several branches. A branch that isn't there is not in the result.
func lookUpstream(ctx context.Context, a account, upstream string, branches []string) (map[string]string, error) {
	args := []string{"ls-remote", "-q", "--", upstream}
	for _, b := range branches {
		args = append(args, "refs/heads/"+b)
	}
	out, err := runGit(ctx, "ls-remote "+redact(upstream), gitCommand(a, "", true, args...), lookLimit)
	if err != nil {
		if strings.Contains(err.Error(), "dubious ownership") {
			err = fmt.Errorf("%w: give the repository to the user that git runs as, for no git configuration is read here", err)
		}
		return nil, err
	}
	tips := map[string]string{}
	for line := range strings.Lines(string(out)) { // 606eb576...<tab>refs/heads/main
		id, ref, _ := strings.Cut(strings.TrimSpace(line), "\t")
		if b, ok := strings.CutPrefix(ref, "refs/heads/"); ok && isHash(id) && slices.Contains(branches, b) {
			tips[b] = id
		}
	}
	return tips, nil
}

// isHash says whether s is the full id of an object, SHA-1 or SHA-256.
func isHash(s string) bool {
	return (len(s) == 40 || len(s) == 64) && strings.Trim(s, "0123456789abcdef") == ""
}

// repo is a service's checkout: a sparse clone in dir, owned by acct, of which only the links of dirs are on disk.
type repo struct {
	dir, upstream, branch string
	dirs                  []dir
	acct                  account
}

// links returns the paths of interest, cleaned, each once. Where there are none it is a path that no tree has, for git takes
// no path for all of them.
func (r *repo) links() []string {
	if len(r.dirs) == 0 {
		return []string{".git"}
	}
	var l []string
	for _, d := range r.dirs {
		l = append(l, d.link)
	}
	slices.Sort(l)
	return slices.Compact(l)
}

// shape names all that a checkout's configuration depends on.
func (r *repo) shape() string {
	return digest(append([]string{"1", r.upstream, r.branch}, r.links()...)...)
}

// digest is a short name for a list of strings.
func digest(parts ...string) string {
	sum := sha256.Sum256([]byte(strings.Join(parts, "\x00")))
	return hex.EncodeToString(sum[:16])
}

func (r *repo) run(ctx context.Context, limit time.Duration, network bool, stdin []byte, args ...string) ([]byte, error) {
	cmd := gitCommand(r.acct, r.dir, network, args...)
	cmd.Stdin = bytes.NewReader(stdin)
	verb := args[0]
	if network {
		verb = "fetch " + redact(r.upstream)
	}
	return runGit(ctx, verb, cmd, limit)
}

// local runs a git in the checkout that needs no network and gets none.
func (r *repo) local(ctx context.Context, args ...string) ([]byte, error) {
	return r.run(ctx, localLimit, false, nil, args...)
}

// open opens the checkout such that nothing done through it can leave it, whatever links its owner plants there.
func (r *repo) open() (*os.Root, error) {
	fd, err := openTarget(r.dir, false, false, 0, 0)
	if err != nil {
		return nil, err
	}
	defer syscall.Close(fd)
	return os.OpenRoot(fdPath(fd))
}

// exists says whether there is a .git to work with, at first glance.
func (r *repo) exists() bool { return lexists(r.dir + "/.git/HEAD") }

// readSmall reads a file that the checkout's owner may have replaced by anything: a pipe does not block it, and it takes
// no more than a megabyte.
func readSmall(root *os.Root, name string) ([]byte, error) {
	f, err := openRegular(root, name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, 1<<20+1))
	if err == nil && len(data) > 1<<20 {
		err = fmt.Errorf("%s: larger than 1 MiB", name)
	}
	return data, err
}

func openRegular(root *os.Root, name string) (*os.File, error) {
	f, err := root.OpenFile(name, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	if fi, err := f.Stat(); err != nil || !fi.Mode().IsRegular() {
		f.Close()
		return nil, fmt.Errorf("%s: not a regular file", name)
	}
	return f, nil
}

// head returns the commit that .git/HEAD holds, without asking git; "" where it holds a branch, or nothing.
func (r *repo) head() string {
	root, err := r.open()
	if err != nil {
		return ""
	}
	defer root.Close()
	data, _ := readSmall(root, ".git/HEAD")
	if h := strings.TrimSpace(string(data)); isHash(h) {
		return h
	}
	return ""
}

// resolve returns the full id of the commit that rev names in this clone. Nothing is fetched.
func (r *repo) resolve(ctx context.Context, rev string) (string, error) {
	out, err := r.local(ctx, "rev-parse", "-q", "--verify", "--end-of-options", rev+"^{commit}")
	if err != nil {
		return "", err
	}
	id := strings.TrimSpace(string(out))
	if !isHash(id) {
		return "", fmt.Errorf("git rev-parse says %.50q", id)
	}
	return id, nil
}

// prepareDir makes the checkout's directory, or gives an existing one with all in it to the configured user. Of a clone
// that changes hands the configuration is thrown away, for it can name programs, which git would now run as the new
// owner. The top directory changes hands last, so that an interrupted change is seen as not done.
func (r *repo) prepareDir() (moved bool, err error) {
	fd, err := openTarget(r.dir, false, true, r.acct.uid, r.acct.gid)
	if err != nil {
		return false, err
	}
	syscall.Close(fd)
	root, err := r.open()
	if err != nil {
		return false, err
	}
	defer root.Close()
	// The URL in .git/config may hold a password.
	if err := root.Chmod(".git", 0o700); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return false, err
	}
	if fi, err := root.Lstat("."); err != nil || owner(fi) == r.acct.uid {
		return false, err
	}
	if r.exists() {
		if err := root.Lchown(".git", r.acct.uid, r.acct.gid); err != nil { // the old owner is locked out from here on
			return true, err
		}
		for _, name := range []string{"config", "config.worktree", "hooks", "info"} {
			if err := root.RemoveAll(".git/" + name); err != nil {
				return true, err
			}
		}
	}
	return true, r.chown(".")
}

// chown gives what lies below name, and then name itself, to the account. A file with further hard links is left alone:
// it may be somebody else's.
func (r *repo) chown(name string) error {
	root, err := r.open()
	if err != nil {
		return err
	}
	defer root.Close()
	err = fs.WalkDir(root.FS(), name, func(p string, d fs.DirEntry, err error) error {
		if err != nil || p == name {
			return err
		}
		if fi, err := root.Lstat(p); err != nil || !fi.IsDir() && fi.Sys().(*syscall.Stat_t).Nlink > 1 {
			return err
		}
		return root.Lchown(p, r.acct.uid, r.acct.gid)
	})
	if err != nil {
		return fmt.Errorf("change owner of %s: %w", r.dir, err)
	}
	return root.Lchown(name, r.acct.uid, r.acct.gid)
}

// owner is the uid of a file.
func owner(fi fs.FileInfo) int { return int(fi.Sys().(*syscall.Stat_t).Uid) }

// clone makes .git anew beside the old one, which is moved aside only when the new one is complete. No file of the work
// tree is touched, so that mounts go on showing what they show.
func (r *repo) clone(ctx context.Context, keep string) error {
	if _, err := r.prepareDir(); err != nil {
		return err
	}
	root, err := r.open()
	if err != nil {
		return err
	}
	defer root.Close()
	if err := root.RemoveAll(cloneDir); err != nil {
		return err
	}
	tmp := r.dir + "/" + cloneDir
	cmd := gitCommand(r.acct, "", true, "clone", "-q", "--no-local", "--branch", r.branch, "--filter=blob:none", "--no-checkout", "--single-branch", "--no-tags",
		"--template=", "--origin", "origin", "--", r.upstream, tmp)
	if _, err := runGit(ctx, "clone "+redact(r.upstream), cmd, cloneLimit); err != nil {
		root.RemoveAll(cloneDir)
		return err
	}
	fresh := *r
	fresh.dir = tmp
	if err := fresh.configure(ctx, nil); err != nil {
		return err
	}
	// HEAD is what the files are compared with: the commit that ran, if upstream still has it.
	start, err := fresh.resolve(ctx, keep)
	if keep == "" || err != nil {
		if start, err = fresh.resolve(ctx, "refs/remotes/origin/"+r.branch); err != nil {
			return err
		}
	}
	if err := fresh.moveHead(ctx, start, start == keep); err != nil {
		return err
	}
	if _, err := fresh.local(ctx, "read-tree", start); err != nil {
		return err
	}
	if err := fresh.writeFile(root, cloneDir+"/.git/info/exclude", []byte("/"+brokenGit+"/\n")); err != nil {
		return err
	}
	if _, err := root.Lstat(".git"); err == nil {
		if err := root.RemoveAll(brokenGit); err != nil {
			return err
		}
		if err := root.Rename(".git", brokenGit); err != nil {
			return err
		}
	}
	if err := errors.Join(root.Chmod(cloneDir+"/.git", 0o700), root.Rename(cloneDir+"/.git", ".git")); err != nil {
		return err
	}
	return root.RemoveAll(cloneDir)
}

// configure gives a clone our settings, and the sparse paths of dirs on top of those in keep. Content is never converted:
// attributes in the repository can't name a filter or an end of line, for files are used as they stand in the repository.
func (r *repo) configure(ctx context.Context, keep []byte) error {
	for _, kv := range [][2]string{
		{"remote.origin.url", r.upstream}, {"remote.origin.fetch", "+refs/heads/" + r.branch + ":refs/remotes/origin/" + r.branch},
		{"remote.origin.promisor", "true"}, {"remote.origin.partialclonefilter", "blob:none"}, {"core.repositoryformatversion", "1"},
		{"extensions.partialClone", "origin"}, {"core.sparseCheckout", "true"}, {"core.sparseCheckoutCone", "false"}, {"gc.auto", "0"},
	} {
		scope := "--local"
		if strings.HasPrefix(kv[0], "core.sparse") {
			scope = "--worktree" // git sparse-checkout, with which older checkouts were made, writes there
		}
		if _, err := r.local(ctx, "config", scope, "--replace-all", kv[0], kv[1]); err != nil {
			return err
		}
	}
	root, err := r.open()
	if err != nil {
		return err
	}
	defer root.Close()
	if err := r.writeFile(root, ".git/info/attributes", []byte("* -text -ident -filter -working-tree-encoding\n")); err != nil {
		return err
	}
	return r.writeFile(root, ".git/info/sparse-checkout", append(slices.Clip(keep), r.sparse()...))
}

// sparse returns the patterns that match exactly the links: anchored, escaped, a slash behind directories.
// See git-sparse-checkout(1), non-cone, and gitignore(5) for the escapes.
func (r *repo) sparse() []byte {
	var b bytes.Buffer
	escape := strings.NewReplacer(`\`, `\\`, `*`, `\*`, `?`, `\?`, `[`, `\[`)
	for _, d := range r.dirs {
		l := escape.Replace(d.link)
		if t := strings.TrimRight(l, " "); t != l {
			l = t + strings.Repeat(`\ `, len(l)-len(t))
		}
		if !d.file {
			l += "/"
		}
		fmt.Fprintf(&b, "/%s\n", l)
	}
	return b.Bytes()
}

// writeFile puts a file of ours into the checkout, complete or not at all.
func (r *repo) writeFile(root *os.Root, name string, data []byte) error {
	if err := root.MkdirAll(path.Dir(name), 0o755); err != nil {
		return err
	}
	if err := root.Lchown(path.Dir(name), r.acct.uid, r.acct.gid); err != nil {
		return err
	}
	tmp := name + ".gitopper"
	root.Remove(tmp)
	f, err := root.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err := errors.Join(err, f.Chown(r.acct.uid, r.acct.gid), f.Sync(), f.Close()); err != nil {
		return err
	}
	return root.Rename(tmp, name)
}

// adopt brings an existing clone to the configured upstream, branch and paths. Paths of before stay on disk until tidy,
// so that mounts never show a hole; the index is made anew, for its skip-worktree bits belong to the old paths.
func (r *repo) adopt(ctx context.Context) error {
	root, err := r.open()
	if err != nil {
		return err
	}
	defer root.Close()
	old, err := readSmall(root, ".git/info/sparse-checkout")
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	// Remote branches of before could stand in the way of the new one's name (release, release/1).
	refs, err := r.local(ctx, "for-each-ref", "--format=option no-deref%0adelete %(refname)", "refs/remotes/origin/")
	if err != nil {
		return err
	}
	if _, err := r.run(ctx, localLimit, false, refs, "update-ref", "--stdin"); err != nil {
		return err
	}
	if err := r.configure(ctx, old); err != nil {
		return err
	}
	return r.rebuildIndex(ctx)
}

// tidy takes away what lies outside the links by now. Files there that were edited stay.
func (r *repo) tidy(ctx context.Context) error {
	root, err := r.open()
	if err != nil {
		return err
	}
	defer root.Close()
	if old, err := readSmall(root, ".git/info/sparse-checkout"); err == nil && bytes.Equal(old, r.sparse()) {
		return nil
	}
	if err := r.writeFile(root, ".git/info/sparse-checkout", r.sparse()); err != nil {
		return err
	}
	_, err = r.local(ctx, "read-tree", "-m", "-u", "HEAD")
	return err
}

// rebuildIndex makes the index anew from HEAD, whatever the old one is (read-tree without -m does not read it); no file is touched.
func (r *repo) rebuildIndex(ctx context.Context) error {
	_, err := r.local(ctx, "read-tree", "HEAD")
	return err
}

// clean removes what a killed git leaves: locks, half fetched packs, a half made clone. To be called only while no git
// of ours can be alive: at start, and after a command of the service's own goroutine failed.
func (r *repo) clean() error {
	root, err := r.open()
	if err != nil {
		return err
	}
	defer root.Close()
	if err := errors.Join(root.RemoveAll(workDir), root.RemoveAll(cloneDir)); err != nil {
		return err
	}
	return fs.WalkDir(root.FS(), ".git", func(p string, d fs.DirEntry, err error) error {
		switch {
		case errors.Is(err, fs.ErrNotExist):
			return nil
		case err != nil:
			return err
		case d.IsDir() && path.Dir(p) == ".git/objects" && len(d.Name()) == 2:
			return fs.SkipDir // loose objects
		case d.IsDir():
			return nil
		case strings.HasPrefix(p, ".git/refs/") && !strings.HasSuffix(p, ".lock"):
			// A ref without content is what a power cut leaves; git refuses to replace it.
			if data, err := readSmall(root, p); err == nil && !strings.HasPrefix(string(data), "ref: ") && !isHash(strings.TrimSpace(string(data))) {
				return root.Remove(p)
			}
			return nil
		case strings.HasSuffix(p, ".lock"), strings.HasPrefix(p, ".git/objects/") && strings.HasPrefix(d.Name(), "tmp_"):
			return root.Remove(p)
		}
		return nil
	})
}

// probe finds damage, without network: errIndex if a new index is all it takes, another error if only a new clone helps.
// Git's exit status does not tell a damaged clone from an upstream that is away (128 for both), so this is asked instead.
func (r *repo) probe(ctx context.Context) error {
	_, err := r.resolve(ctx, "HEAD")
	for _, args := range [][]string{
		append([]string{"rev-list", "--objects", "--no-walk", "--quiet", "--missing=allow-promisor", "HEAD", "--"}, r.links()...),
		{"config", "--local", "--get", "remote.origin.url"},
	} {
		if err == nil {
			_, err = r.local(ctx, args...)
		}
	}
	if err != nil {
		return err
	}
	if _, err := r.local(ctx, "diff-index", "--cached", "--quiet", "HEAD"); err != nil {
		return errIndex
	}
	return nil
}

var errIndex = errors.New("index does not match HEAD")

// fetch brings the branch's history up to date and returns its newest commit. File contents come with prefetch.
func (r *repo) fetch(ctx context.Context) (string, error) {
	ref := "refs/remotes/origin/" + r.branch
	// Whatever somebody made of it in the checkout.
	if _, err := r.local(ctx, "config", "--local", "--replace-all", "remote.origin.url", r.upstream); err != nil {
		return "", err
	}
	_, err := r.run(ctx, fetchLimit, true, nil, "fetch", "-q", "--no-tags", "--no-write-fetch-head", "--recurse-submodules=no", "--filter=blob:none",
		"origin", "+refs/heads/"+r.branch+":"+ref)
	if err != nil {
		return "", err
	}
	return r.resolve(ctx, ref)
}

// prefetch makes sure that every file of commit's links is in the clone, which needs no network if they are. With ahead
// it tries the same for the last 20 versions of them, in one request: going back to one of those then needs no upstream.
func (r *repo) prefetch(ctx context.Context, commit string, ahead bool) error {
	// Git reads the attributes above a file from the index where they are not on disk, though ours override them.
	want := r.links()
	for _, l := range r.links() {
		for l != "." {
			l = path.Dir(l)
			want = append(want, path.Join(l, ".gitattributes"))
		}
	}
	slices.Sort(want)
	want = slices.Compact(want)
	get := func(depth string) error {
		out, err := r.local(ctx, append([]string{"rev-list", "--objects", "--no-object-names", "--missing=print", depth, commit, "--"}, want...)...)
		if err != nil {
			return err
		}
		var missing bytes.Buffer
		for line := range bytes.Lines(out) {
			if line[0] == '?' {
				missing.Write(line[1:])
			}
		}
		if missing.Len() == 0 {
			return nil
		}
		_, err = r.run(ctx, fetchLimit, true, missing.Bytes(), "-c", "fetch.negotiationAlgorithm=noop", "fetch", "-q", "--no-tags", "--no-write-fetch-head",
			"--recurse-submodules=no", "--filter=blob:none", "--stdin", "origin")
		return err
	}
	if ahead && get("-20") == nil || ctx.Err() != nil {
		return ctx.Err()
	}
	return get("--no-walk")
}

// content identifies what the links show in commit: two commits with the same content are the same to the service. A link
// that is missing, of the wrong kind or behind a symbolic link or submodule is a *refusal.
func (r *repo) content(ctx context.Context, commit string) (string, error) {
	out, err := r.local(ctx, append([]string{"ls-tree", "-z", "-t", "--full-tree", commit, "--"}, r.links()...)...)
	if err != nil {
		return "", err
	}
	kind, id := map[string]string{}, map[string]string{}
	for e := range strings.SplitSeq(string(out), "\x00") { // 100644 blob 587be6b4...<tab>a/b/f
		meta, name, _ := strings.Cut(e, "\t")
		if f := strings.Fields(meta); len(f) == 3 {
			kind[name], id[name] = f[0], f[0]+" "+f[2]
		}
	}
	var parts []string
	for _, d := range r.dirs {
		want, k := "040000", kind[d.link]
		if d.file {
			want = "100"
		}
		if !strings.HasPrefix(k, want) {
			return "", &refusal{Reason: "link", Content: digest("link", fmt.Sprint(kind), fmt.Sprint(r.dirs)), Info: fmt.Sprintf("commit %.8s: %s", commit, describeLink(kind, d))}
		}
		parts = append(parts, d.link+"\x00"+id[d.link])
	}
	slices.Sort(parts)
	return digest(slices.Compact(parts)...), nil
}

// describeLink says in words what is wrong with a link, given the modes of it and of the directories above it.
func describeLink(kind map[string]string, d dir) string {
	for p := d.link; p != "."; p = path.Dir(p) {
		switch kind[p] {
		case "120000":
			return fmt.Sprintf("link %q: %s is a symbolic link: link what it points to", d.link, p)
		case "160000":
			return fmt.Sprintf("link %q: %s is a submodule", d.link, p)
		}
	}
	switch k := kind[d.link]; {
	case k == "040000":
		return fmt.Sprintf("link %q is a directory, not a file: remove file = true", d.link)
	case k != "":
		return fmt.Sprintf("link %q is a file, not a directory: say file = true", d.link)
	}
	return fmt.Sprintf("link %q is missing: add it to the repository, or take it from dirs", d.link)
}

// unhide clears the marks with which files can be kept out of git's sight (assume-unchanged, skip-worktree) below the links.
func (r *repo) unhide(ctx context.Context) error {
	names, err := r.local(ctx, append([]string{"ls-files", "-z", "--"}, r.links()...)...)
	for _, mark := range []string{"--no-assume-unchanged", "--no-skip-worktree"} {
		if err == nil {
			_, err = r.run(ctx, localLimit, false, names, "update-index", "-z", mark, "--stdin")
		}
	}
	return err
}

// change is what has to happen to one path so that the work tree shows a commit.
type change struct {
	path, mode, oid string
	status          byte // as in git-diff-index(1): A means that the commit does not have it
}

// diff returns what of the work tree below the links differs from commit. It looks at the files as they are, whoever made
// them so: an older commit, an editor, or a publish that was cut short.
func (r *repo) diff(ctx context.Context, commit string) ([]change, error) {
	if _, err := r.local(ctx, "update-index", "-q", "--refresh"); err != nil {
		var exit *exec.ExitError
		if !errors.As(err, &exit) || exit.ExitCode() != 1 { // 1: some files differ, which is what is asked next
			return nil, err
		}
	}
	out, err := r.local(ctx, append([]string{"diff-index", "-z", "--raw", "--no-renames", "--no-ext-diff", "--no-abbrev", commit, "--"}, r.links()...)...)
	if err != nil {
		return nil, err
	}
	var changes []change
	f := strings.Split(strings.TrimSuffix(string(out), "\x00"), "\x00")
	for i := 0; i+1 < len(f); i += 2 { // :100644 000000 587be6b4... 00000000... D, then the path
		m := strings.Fields(strings.TrimPrefix(f[i], ":"))
		if len(m) != 5 {
			return nil, fmt.Errorf("git diff-index: unexpected %q", f[i])
		}
		if !validPath(f[i+1]) {
			err := fmt.Errorf("commit %.8s: %q is not a path that may be checked out", commit, f[i+1])
			if m[4] == "A" { // of our index, not of the commit
				return nil, errors.Join(errIndex, err)
			}
			return nil, &refusal{Reason: "link", Info: err.Error()}
		}
		changes = append(changes, change{path: f[i+1], mode: m[0], oid: m[2], status: m[4][0]})
	}
	return changes, nil
}

// validPath says whether a path out of a tree or an index stays where it seems to be. Git itself looks at this only when
// it writes an index, which is after the files.
func validPath(p string) bool {
	for c := range strings.SplitSeq(p, "/") {
		if c == "" || c == "." || c == ".." || strings.EqualFold(c, ".git") {
			return false
		}
	}
	return true
}

// leftovers returns the files that a publish of half, which was cut short, added and commit does not have: to be removed,
// where they still are what half made them.
func (r *repo) leftovers(ctx context.Context, half, commit string, known []change) (left []change, err error) {
	out, err := r.local(ctx, append([]string{"diff-tree", "-r", "-z", "--raw", "--no-renames", "--no-abbrev", "--diff-filter=D", half, commit, "--"}, r.links()...)...)
	if err != nil {
		return nil, err
	}
	root, err := r.open()
	if err != nil {
		return nil, err
	}
	defer root.Close()
	seen := paths(known)
	f := strings.Split(strings.TrimSuffix(string(out), "\x00"), "\x00")
	for i := 0; i+1 < len(f); i += 2 {
		m := strings.Fields(strings.TrimPrefix(f[i], ":"))
		c := change{path: f[i+1], status: 'A'}
		if _, found := slices.BinarySearch(seen, c.path); len(m) == 5 && validPath(c.path) && !found {
			if c.mode, c.oid = m[0], m[2]; r.same(root, c) {
				left = append(left, c)
			}
		}
	}
	return left, nil
}

// stage lays the new files of changes out below stageDir, complete, synced, with mode and owner. Git does it, as the
// checkout's owner and from an index of its own, so that a tree which it does not take is refused here, before any file goes live.
func (r *repo) stage(ctx context.Context, commit string, changes []change) error {
	root, err := r.open()
	if err != nil {
		return err
	}
	defer root.Close()
	if err := errors.Join(root.RemoveAll(workDir), root.Mkdir(workDir, 0o755), root.Lchown(workDir, r.acct.uid, r.acct.gid)); err != nil {
		return err
	}
	var names bytes.Buffer
	for _, c := range changes {
		if c.status != 'A' {
			names.WriteString(c.path + "\x00")
		}
	}
	if names.Len() == 0 {
		return nil
	}
	for _, args := range [][]string{{"read-tree", commit}, {"checkout-index", "-z", "--stdin", "--prefix=" + stageDir + "/"}} {
		cmd := gitCommand(r.acct, r.dir, false, args...)
		cmd.Env = append(cmd.Env, "GIT_INDEX_FILE="+r.dir+"/"+workDir+"/index")
		cmd.Stdin = bytes.NewReader(names.Bytes())
		if _, err := runGit(ctx, args[0], cmd, localLimit); err != nil {
			var fs syscall.Statfs_t
			if syscall.Statfs(r.dir, &fs) == nil && fs.Bavail == 0 { // which git does not say
				err = fmt.Errorf("%w: %s: %w", err, r.dir, syscall.ENOSPC)
			}
			return fmt.Errorf("lay out commit's files: %w", err)
		}
	}
	for _, c := range changes {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if c.status == 'A' || !strings.HasPrefix(c.mode, "100") {
			continue
		}
		// Synced before the rename, or a power cut leaves an empty file under the name (XFS, ext4 without auto_da_alloc).
		f, err := openRegular(root, stageDir+"/"+c.path)
		if err == nil {
			err = errors.Join(f.Sync(), f.Close())
		}
		if err != nil {
			return fmt.Errorf("lay out commit's files: %w", err)
		}
	}
	return nil
}

// publish makes the staged changes live and moves HEAD and the index to commit. Each path switches by one rename(2): who
// reads it finds the old file or the new one, never none. A link's own directory is kept even while it is empty, since a
// mount of a removed directory shows nothing for ever. Cut short at any point, the next diff sees what is left to do.
func (r *repo) publish(ctx context.Context, commit string, changes []change) error {
	root, err := r.open()
	if err != nil {
		return err
	}
	defer root.Close()
	var index bytes.Buffer
	put, old := map[string]bool{}, map[string]bool{}
	for _, c := range changes {
		old[c.path] = c.status != 'D'
	}
	for _, c := range changes {
		if c.status == 'A' {
			continue
		}
		if err := r.put(root, c, commit, old); err != nil {
			return fmt.Errorf("publish %s: %w", c.path, err)
		}
		for p := c.path; p != "."; p = path.Dir(p) {
			put[p] = true
		}
		fmt.Fprintf(&index, "%s %s\t%s\x00", c.mode, c.oid, c.path)
	}
	for _, c := range changes {
		if c.status != 'A' {
			continue
		}
		inWay := put[c.path] // a directory of the commit has its name now: --replace takes it from the index
		for p := path.Dir(c.path); p != "." && !inWay; p = path.Dir(p) {
			inWay = put[p] && !isDir(root, p)
		}
		if inWay {
			continue
		}
		if err := root.Remove(c.path); err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, syscall.ENOTDIR) {
			return fmt.Errorf("publish: %w", err)
		}
		for p := path.Dir(c.path); p != "." && !slices.Contains(r.links(), p) && root.Remove(p) == nil; p = path.Dir(p) {
		}
		fmt.Fprintf(&index, "0 %s\t%s\x00", strings.Repeat("0", len(commit)), c.path)
	}
	if index.Len() > 0 {
		if _, err := r.run(ctx, localLimit, false, index.Bytes(), "update-index", "-z", "--add", "--remove", "--replace", "--index-info"); err != nil {
			return err
		}
	}
	// The index has the new files already, so this brings the rest of it to commit, and leaves alone what somebody edited since
	// it was put there. An index that is neither HEAD's nor commit's is what a publish that was cut short leaves.
	if _, err := r.local(ctx, "read-tree", "-m", "-u", "HEAD", commit); err != nil {
		if _, err := r.local(ctx, "read-tree", "--reset", "-u", commit); err != nil {
			return err
		}
	}
	if err := r.moveHead(ctx, commit, true); err != nil {
		return err
	}
	return root.RemoveAll(workDir)
}

// moveHead detaches HEAD at commit. Of a commit that runs here a ref tells so, and keeps it from ever being pruned.
func (r *repo) moveHead(ctx context.Context, commit string, ran bool) error {
	orders := "update HEAD " + commit + "\n"
	if ran {
		orders += "update " + ranRefs + commit + " " + commit + "\n"
	}
	_, err := r.run(ctx, localLimit, false, []byte(orders), "update-ref", "--no-deref", "--stdin")
	return err
}

// ranHere says whether a commit has been live, at first glance: its ref may also be packed away.
func (r *repo) ranHere(commit string) bool {
	root, err := r.open()
	if err != nil {
		return false
	}
	defer root.Close()
	if _, err := root.Lstat(".git/" + ranRefs + commit); err == nil {
		return true
	}
	packed, err := openRegular(root, ".git/packed-refs")
	if err != nil {
		return false
	}
	defer packed.Close()
	for lines := bufio.NewScanner(packed); lines.Scan(); {
		if strings.HasSuffix(lines.Text(), " "+ranRefs+commit) {
			return true
		}
	}
	return false
}

// setHead makes HEAD hold a commit where git itself would not take the clone for one.
func (r *repo) setHead(commit string) error {
	root, err := r.open()
	if err != nil {
		return err
	}
	defer root.Close()
	return r.writeFile(root, ".git/HEAD", []byte(commit+"\n"))
}

// giveBack gives the tracked files below the links, and the directories above them, back to the checkout's owner, who could
// not read what root saved over them.
func (r *repo) giveBack(ctx context.Context) error {
	out, err := r.local(ctx, append([]string{"ls-files", "-z", "--"}, r.links()...)...)
	if err != nil {
		return err
	}
	root, err := r.open()
	if err != nil {
		return err
	}
	defer root.Close()
	seen := map[string]bool{}
	for p := range strings.SplitSeq(string(out), "\x00") {
		for ; p != "." && p != "" && !seen[p]; p = path.Dir(p) {
			seen[p] = true
			fi, err := root.Lstat(p)
			if err != nil || owner(fi) == r.acct.uid || !fi.IsDir() && fi.Sys().(*syscall.Stat_t).Nlink > 1 {
				continue
			}
			if err := root.Lchown(p, r.acct.uid, r.acct.gid); err != nil {
				return err
			}
		}
	}
	return nil
}

func isDir(root *os.Root, name string) bool {
	fi, err := root.Lstat(name)
	return err == nil && fi.IsDir()
}

// put moves one staged path to where it is live. Where its parent directories are missing too, the topmost of them is moved
// with all that is in it; where something of another kind is in the way, the two are exchanged, so that the name never
// goes missing. What git does not know and lay in the way is kept as NAME.before-HASH; old are the paths it does know.
func (r *repo) put(root *os.Root, c change, commit string, old map[string]bool) error {
	if _, err := root.Lstat(stageDir + "/" + c.path); errors.Is(err, fs.ErrNotExist) {
		return nil // went live with a directory above it
	}
	top := ""
	for _, e := range strings.Split(c.path, "/") {
		if top = path.Join(top, e); !isDir(root, top) {
			break
		}
	}
	staged, before := stageDir+"/"+top, freeName(root, top+".before-"+commit[:8])
	live, err := root.Lstat(top)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return root.Rename(staged, top)
	case err != nil:
		return err
	case top == c.path && !live.IsDir() && c.mode != "160000":
		if c.status == 'D' && !r.same(root, c) { // there, but not in the index: somebody's own
			if err := root.Link(top, before); err != nil {
				return err
			}
			r.tellKept(top, before)
		}
		return root.Rename(staged, top)
	case top == c.path && live.IsDir() && c.mode == "160000":
		return nil
	}
	if err := exchange(root, staged, top); err != nil {
		return err
	}
	if !live.IsDir() && old[top] || live.IsDir() && r.allTracked(root, staged, top) {
		return root.RemoveAll(staged)
	}
	r.tellKept(top, before)
	return root.Rename(staged, before)
}

func (r *repo) tellKept(name, as string) {
	slog.Warn(fmt.Sprintf("%s: %s was in the way of a commit, kept as %s", r.dir, name, as))
}

// allTracked says whether all that lies in the directory at staged, which was live at top a moment ago, is in the index.
func (r *repo) allTracked(root *os.Root, staged, top string) bool {
	out, err := r.local(context.Background(), "ls-files", "-z", "--", top)
	if err != nil {
		return false
	}
	tracked := strings.Split(string(out), "\x00")
	return nil == fs.WalkDir(root.FS(), staged, func(p string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() && !slices.Contains(tracked, top+strings.TrimPrefix(p, staged)) {
			err = fs.ErrExist
		}
		return err
	})
}

func freeName(root *os.Root, name string) string {
	free := name
	for i := 2; ; i++ {
		if _, err := root.Lstat(free); errors.Is(err, fs.ErrNotExist) || i > 1000 {
			return free
		}
		free = name + "." + strconv.Itoa(i)
	}
}

// same says whether the live file already is what the change would make of it.
func (r *repo) same(root *os.Root, c change) bool {
	fi, err := root.Lstat(c.path)
	if err != nil {
		return false
	}
	var h hash.Hash = sha1.New()
	if len(c.oid) == 64 {
		h = sha256.New()
	}
	if fi.Mode()&fs.ModeSymlink != 0 {
		t, _ := root.Readlink(c.path)
		fmt.Fprintf(h, "blob %d\x00%s", len(t), t)
		return c.mode == "120000" && hex.EncodeToString(h.Sum(nil)) == c.oid
	}
	if !fi.Mode().IsRegular() || (fi.Mode()&0o100 != 0) != (c.mode == "100755") {
		return false
	}
	f, err := openRegular(root, c.path)
	if err != nil {
		return false
	}
	defer f.Close()
	fmt.Fprintf(h, "blob %d\x00", fi.Size())
	_, err = io.Copy(h, f)
	return err == nil && hex.EncodeToString(h.Sum(nil)) == c.oid
}

// exchange swaps two paths of a root in one step: renameat2(2) with RENAME_EXCHANGE.
func exchange(root *os.Root, a, b string) error {
	da, err := root.Open(path.Dir(a))
	if err != nil {
		return err
	}
	defer da.Close()
	db, err := root.Open(path.Dir(b))
	if err != nil {
		return err
	}
	defer db.Close()
	pa, err := syscall.BytePtrFromString(path.Base(a))
	if err != nil {
		return err
	}
	pb, err := syscall.BytePtrFromString(path.Base(b))
	if err != nil {
		return err
	}
	// The syscall package has no name for it everywhere; linux/arch/*/entry/syscalls and asm-generic/unistd.h have the numbers.
	nr, ok := map[string]uintptr{"amd64": 316, "386": 353, "arm": 382, "ppc64": 357, "ppc64le": 357, "s390x": 347, "arm64": 276, "riscv64": 276, "loong64": 276}[runtime.GOARCH]
	if !ok {
		return &os.LinkError{Op: "renameat2", Old: a, New: b, Err: syscall.ENOSYS}
	}
	if _, _, e := syscall.Syscall6(nr, da.Fd(), uintptr(unsafe.Pointer(pa)), db.Fd(), uintptr(unsafe.Pointer(pb)), 2, 0); e != 0 {
		return &os.LinkError{Op: "renameat2", Old: a, New: b, Err: e}
	}
	return nil
}

// snapshot is what lstat(2) said of every file below the links when they last were right.
type snapshot map[string]syscall.Stat_t

// snap takes a snapshot of the files in the index.
func (r *repo) snap(ctx context.Context) (snapshot, error) {
	out, err := r.local(ctx, append([]string{"ls-files", "-z", "--"}, r.links()...)...)
	if err != nil {
		return nil, err
	}
	s := snapshot{}
	for p := range strings.SplitSeq(strings.TrimSuffix(string(out), "\x00"), "\x00") {
		s[p] = lstat(r.dir + "/" + p)
	}
	return s, nil
}

// holds says whether no file has changed since; it costs one lstat(2) a file and no process.
func (s snapshot) holds(dir string) bool {
	for p, old := range s {
		if lstat(dir+"/"+p) != old {
			return false
		}
	}
	return s != nil
}

func lstat(name string) (st syscall.Stat_t) {
	if syscall.Lstat(name, &st) != nil {
		return syscall.Stat_t{}
	}
	st.Atim, st.Nlink = syscall.Timespec{}, 0
	return st
}

// patch writes what differs between commit and the work tree at paths to w, such that git apply can bring it back.
func (r *repo) patch(ctx context.Context, commit string, paths []string, w io.Writer) error {
	if len(paths) > 500 {
		paths = r.links() // more would not fit a command line
	}
	cmd := gitCommand(r.acct, r.dir, false, append([]string{"diff", "--binary", "--no-ext-diff", "--no-textconv", "--no-renames", commit, "--"}, paths...)...)
	cmd.Stdout = &bounded{to: w} // or a service's user could fill root's disk
	_, err := runGit(ctx, "diff", cmd, localLimit)
	return err
}

// find returns the commit that a hash of 4 to 40 digits names, if it is in the branch's history or ran here, and whether
// it ran here. Nothing is fetched.
func (r *repo) find(ctx context.Context, hash string) (commit string, ran bool, err error) {
	commit, err = r.resolve(ctx, hash)
	if err != nil {
		return "", false, fmt.Errorf("%s names no commit in the checkout, or more than one: give more digits: %w", hash, err)
	}
	if !strings.HasPrefix(commit, hash) {
		return "", false, fmt.Errorf("%s is the name of a branch or tag: give the commit's own hash", hash)
	}
	if _, err := r.resolve(ctx, ranRefs+commit); err == nil {
		return commit, true, nil
	}
	if _, err := r.local(ctx, "merge-base", "--is-ancestor", commit, "refs/remotes/origin/"+r.branch); err != nil {
		return "", false, fmt.Errorf("commit %.8s is not in the history of %s and never ran here", commit, r.branch)
	}
	return commit, false, nil
}

// descends returns an error unless commit is older, or descends from it, or that is empty.
func (r *repo) descends(ctx context.Context, commit, older string) error {
	if older == "" {
		return nil
	}
	_, err := r.local(ctx, "merge-base", "--is-ancestor", older, commit)
	return err
}

// verify checks that commit carries an SSH signature by one of the allowed signers, and descends from newest (unless
// that is empty). Keys in the file signers.revoked, if there is one, sign nothing. Other kinds of signature are given no
// program to be verified with, or a key in somebody's keyring would do.
func (r *repo) verify(ctx context.Context, commit, signers, newest string) error {
	if newest != "" {
		// Any failure refuses: where newest is unknown in this clone (made anew after a forced push) descent can't be shown.
		if err := r.descends(ctx, commit, newest); ctx.Err() != nil {
			return err
		} else if err != nil {
			return &refusal{Reason: "signers", Info: fmt.Sprintf("commit %.8s does not descend from %.8s, which ran here: push a signed commit on top of that (%v)", commit, newest, err)}
		}
	}
	if _, err := os.Stat(signers); err != nil {
		return fmt.Errorf("signers: %w", err)
	}
	none := "/bin/false"
	args := []string{"-c", "gpg.format=ssh", "-c", "gpg.ssh.program=ssh-keygen", "-c", "gpg.ssh.allowedSignersFile=" + signers, "-c", "gpg.minTrustLevel=fully",
		"-c", "gpg.program=" + none, "-c", "gpg.openpgp.program=" + none, "-c", "gpg.x509.program=" + none}
	if revoked := signers + ".revoked"; lexists(revoked) {
		args = append(args, "-c", "gpg.ssh.revocationFile="+revoked)
	}
	cmd := gitCommand(r.acct, r.dir, false, append(args, "verify-commit", "--", commit)...)
	if _, err := runGit(ctx, "verify-commit", cmd, localLimit); err != nil {
		if ctx.Err() != nil {
			return err
		}
		why := err.Error()
		if strings.HasSuffix(why, "exit status 1") {
			why = "it carries no signature" // on which git has no words
		}
		return &refusal{Reason: "signers", Info: fmt.Sprintf("commit %.8s is not signed by one of %s: %s", commit, signers, why)}
	}
	return nil
}

// collect lets git pack what years of small fetches leave behind, when git itself finds it worth it.
func (r *repo) collect(ctx context.Context) error {
	_, err := r.run(ctx, fetchLimit, false, nil, "-c", "gc.auto=2000", "-c", "gc.autoDetach=false", "gc", "--auto", "-q")
	return err
}
