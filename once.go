//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
)

// lookAtAll looks at upstreams side by side, and again where that failed: alone it is no trouble yet.
func lookAtAll(ctx context.Context, upstreams []*upstream) {
	var looks sync.WaitGroup
	for _, u := range upstreams {
		looks.Go(func() {
			if u.lookNow(ctx, false) != nil {
				_ = u.lookNow(ctx, false)
			}
		})
	}
	looks.Wait()
}

// onePass is --once: every service is looked at and brought to what it should be, side by side.
func (a *agent) onePass(services []*Service, upstreams []*upstream, stdout io.Writer) error {
	ctx := a.stop.soft
	lookAtAll(ctx, upstreams)

	var passes sync.WaitGroup
	for _, s := range services {
		passes.Go(func() { s.pass(ctx) })
	}
	passes.Wait()
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}

	var err error
	if a.wrong.Load() != nil { // the last right one did its work; the pass may have brought a right one
		_, err = a.load()
	}

	for _, s := range services {
		st := s.Status()
		line := fmt.Sprintf("%s %.8s %s %s", s.service, st.Commit, st.State, st.Info)
		fmt.Fprintln(stdout, strings.TrimSpace(line))
		if !slices.Contains([]state{stateOK, stateFreeze}, st.state) {
			err = errors.New("not all services are OK")
		}
	}
	return err
}

// plan is what a dry run found to be done: a line for each thing that a pass would change on the host.
//
// A dry run is a pass that is done up to the point where it has compared, with copies of what the state
// directory remembers. From there on it tells what it would do, and acts as if that had been done.
type plan struct{ lines []string }

func (p *plan) add(format string, args ...any) {
	line := redact(oneLine(fmt.Sprintf(format, args...)))
	if !slices.Contains(p.lines[max(0, len(p.lines)-1):], line) { // what is in the way of many is told once
		p.lines = append(p.lines, line)
	}
}

// dryRun prints what one pass over all services would do. It is an ending with status 3 if that is anything.
func dryRun(ctx context.Context, o options, stdout, stderr io.Writer) error {
	logs := io.Discard // what is wrong is told at the end
	if o.level == slog.LevelDebug {
		logs = stderr
	}
	setLogger(logs, o.level)
	scratch, err := os.MkdirTemp("", "gitopper")
	if err != nil {
		return err
	}
	defer removeTree(context.WithoutCancel(ctx), scratch)
	if err := borrow(o.stateDir, scratch); err != nil {
		return fmt.Errorf("copy what %s remembers: %w", o.stateDir, err)
	}

	a := &agent{options: o, stop: stopping{ctx, ctx}}
	c, err := a.configToBe(ctx, scratch)
	if err != nil {
		return err
	}
	for _, w := range c.warnings(o) {
		fmt.Fprintf(stderr, "gitopper: %s\n", w)
	}

	p, err := a.plan(ctx, c, scratch)
	for _, line := range p.lines {
		fmt.Fprintln(stdout, line)
	}
	switch {
	case ctx.Err() != nil:
		return errors.New("ended before all was compared")
	case err == nil && len(p.lines) > 0:
		return ending{"something is to be done", 3}
	}
	return err
}

// borrow fills an empty directory with copies of what a state directory remembers, and clones that find their
// objects in those that are there. Users pass through it to theirs, as through the other one.
func borrow(stateDir, scratch string) error {
	err := os.Chmod(scratch, 0o711)
	for name, mode := range map[string]os.FileMode{"/services": 0o700, "/upstreams": 0o711} {
		err = errors.Join(err, os.Mkdir(scratch+name, mode))
	}

	records, _ := filepath.Glob(recordFile(stateDir, "*"))
	manifests, _ := filepath.Glob(manifestFile(stateDir, "*"))
	for _, name := range slices.Concat(records, manifests) {
		text, readErr := os.ReadFile(name)
		to := scratch + "/services/" + filepath.Base(name)
		err = errors.Join(err, readErr, os.WriteFile(to, text, 0o600))
	}

	clones, _ := filepath.Glob(stateDir + "/upstreams/*/objects")
	for _, objects := range clones {
		id := filepath.Base(filepath.Dir(objects))
		err = errors.Join(err, borrowClone(objects, scratch+"/upstreams/"+id))
	}
	return err
}

// borrowClone makes a clone in dir whose objects are those of another one.
func borrowClone(objects, dir string) error {
	fi, err := os.Lstat(objects)
	if err != nil {
		return err
	}
	err = errors.Join(os.Mkdir(dir, 0o755), os.Mkdir(dir+"/refs", 0o755))
	for _, name := range []string{"/HEAD", "/config", "/packed-refs"} {
		text, readErr := os.ReadFile(filepath.Dir(objects) + name)
		if readErr == nil { // else it is damaged, and so is this one
			err = errors.Join(err, os.WriteFile(dir+name, text, 0o644))
		}
	}

	owner := fi.Sys().(*syscall.Stat_t)
	return errors.Join(err, os.Mkdir(dir+"/objects", 0o700), os.Mkdir(dir+"/objects/info", 0o755),
		os.WriteFile(dir+"/objects/info/alternates", []byte(objects+"\n"), 0o644),
		os.Lchown(dir+"/objects", int(owner.Uid), int(owner.Gid)))
}

// configToBe is the config that a start now would use: with -U that may be one that is yet to go live.
func (a *agent) configToBe(ctx context.Context, scratch string) (c *config, err error) {
	c, err = loadConfig(a.options, os.ReadFile)
	isThere := err == nil && !a.pull
	if a.upstream == "" || isThere {
		return c, err
	}

	next := (*config)(nil)
	u := newUpstream(scratch, a.upstream, "")
	own := a.newOwn(u, scratch)
	own.plan = &plan{}
	own.gate = func(read func(string) ([]byte, error)) (err error) {
		next, err = loadConfig(a.options, read)
		return err
	}

	lookAtAll(ctx, []*upstream{u})
	out := own.reconcile(ctx)
	switch {
	case next != nil:
		return next, nil
	case err != nil && out.trouble() != nil:
		return nil, fmt.Errorf("gitopper: no right config: %w", out.trouble())
	}
	return c, err
}

// plan has each service's pass done, as far as it changes nothing. The error holds all trouble.
func (a *agent) plan(ctx context.Context, c *config, scratch string) (p *plan, err error) {
	p = &plan{}
	_, err = gitVersion(ctx)
	mine := *c
	mine.services = slices.Clone(c.services)
	for i := range mine.services {
		mine.services[i].imagine(ctx)
	}

	services, upstreams := a.assemble(&mine, scratch)
	lookAtAll(ctx, upstreams)
	if len(c.services) > 0 {
		for _, s := range retired(scratch, services) {
			s.plan = p
			err = errors.Join(err, s.sweep(ctx))
		}
	}

	for _, s := range services {
		s.plan = p
		out := s.reconcile(ctx)
		if trouble := out.trouble(); trouble != nil {
			err = errors.Join(err, fmt.Errorf("%s: %s", s.service, oneLine(trouble.Error())))
		}
	}
	return p, err
}

// imagine makes ourselves stand in for a user and groups that a package is yet to bring.
func (s *spec) imagine(ctx context.Context) {
	if s.pkg == "" {
		return
	}
	there, err := (&packageCheck{}).has(ctx, s.pkg)
	if err != nil || there {
		return
	}
	if _, err := lookupAccount(ctx, s.user); err != nil {
		s.user = ""
	}

	s.dirs = slices.Clone(s.dirs)
	for i := range s.dirs {
		if _, err := groupIDs(ctx, s.dirs[i:i+1]); err != nil {
			s.dirs[i].group = ""
		}
	}
}

// planPackage stands for the install of a package that is missing.
func (s *Service) planPackage(ctx context.Context) error {
	there, err := s.packages.has(ctx, s.pkg)
	if err != nil {
		return brokenError{err}
	}
	if !there {
		s.plan.add("install %s", s.pkg)
		s.untell()
	}
	return nil
}

// planUnmounts stands for the sweep of mounts that are not wanted any more.
func (s *Service) planUnmounts() error {
	mounts, err := readMountinfo()
	if err != nil {
		return err
	}

	wants := wantedShows(s.files.dir, s.dirs)
	wanted := wantedPoints(wants)
	for _, m := range s.rec.Mounts.surplus(mounts, wants, wanted) {
		if !slices.Contains(wanted, m.point) {
			s.plan.add("unmount %s", m.point)
		}
	}
	return nil
}

// planDirectory stands for making the service's directory, or laying it out anew.
func (s *Service) planDirectory(known tree) error {
	if s.facts.ready {
		return nil
	}
	top, err := s.asItIs()
	if err != nil {
		return err
	}
	defer top.close()

	if err := s.mayLieThere(); err != nil {
		return err
	}

	_, isNew := top.lstat(ourDir)
	goesOn := s.files.goesOn(top)
	if isNew != nil || !goesOn {
		err = s.files.startAnew()
	}
	if !goesOn {
		s.plan.add("lay out %s anew, what is there is kept as %[1]s.before", s.files.dir)
	}
	s.files.standIn(known)
	return err
}

// mayLieThere is an error where others than root could replace the service's directory.
func (s *Service) mayLieThere() error {
	above := filepath.Dir(s.files.dir)
	for !lexists(above) {
		above = filepath.Dir(above)
	}

	p, err := openSteady(above)
	if err == nil {
		p.close()
	}
	return err
}

// asItIs opens the service's directory, be it ours or not; where there is none, an empty one.
func (s *Service) asItIs() (place, error) {
	top, err := openPlace(s.files.dir)
	if !errors.Is(err, fs.ErrNotExist) {
		return top, err
	}

	const empty = "/empty"
	if err := os.MkdirAll(s.stateDir+empty, 0o700); err != nil {
		return top, err
	}
	return openPlace(s.stateDir + empty)
}

// planCompare compares with the directory as it is. Where that is to be laid out anew, links that would not
// be moved over count as missing.
func (s *Service) planCompare(ctx context.Context, want tree) (d diff, err error) {
	top, err := s.asItIs()
	if err != nil {
		return d, err
	}
	defer top.close()

	d, err = s.files.compareAt(ctx, top, want)
	if err != nil || s.files.goesOn(top) {
		return d, err
	}

	at := &descent{top: top}
	defer at.close()
	for _, l := range s.files.outerLinks() {
		dir, err := at.to(path.Dir(l.link))
		if err != nil {
			continue // it is missing
		}
		if st, err := dir.lstat(path.Base(l.link)); err == nil && !s.files.isUsers(l.kind)(st) {
			d.startAnew(l.link, want)
		}
	}
	return d, nil
}

// startAnew has a link, and all below it, be missing on disk.
func (d *diff) startAnew(link string, want tree) {
	isIn := func(p string) bool { return within(p, link) }
	for _, list := range []*[]string{&d.put, &d.gone, &d.edited, &d.alien, &d.modes} {
		*list = slices.DeleteFunc(*list, isIn)
	}

	d.put = append(d.put, link)
	for p := range want {
		if isIn(p) && p != link {
			d.put = append(d.put, p)
		}
	}
	slices.Sort(d.put)
}

// planBring stands for making a candidate's files live, showing them, and telling the unit.
func (s *Service) planBring(ctx context.Context, c *candidate) error {
	if err := s.planKept(ctx, c); err != nil {
		return err
	}
	isDir := func(p string) bool { return c.want[p] == blob{} } // a link's own
	written := slices.DeleteFunc(slices.Clone(c.diff.put), isDir)
	s.planPaths(fmt.Sprintf("write %%s (%.8s)", c.Commit), written)
	s.planPaths("remove %s", c.diff.gone)
	s.planPaths("set mode and group of %s", c.diff.modes)

	mounts, err := s.planMounts(c.diff.put)
	if err != nil {
		return brokenError{err}
	}
	if mounts+c.diff.changes() > 0 {
		s.untell()
	}

	if s.action == "" {
		return nil
	}
	if err := s.planServe(ctx, c.Content); err != nil {
		return brokenError{err}
	}
	return nil
}

func (s *Service) planPaths(words string, paths []string) {
	for _, p := range paths {
		s.plan.add(words, s.seenAt(p))
	}
}

// planMounts stands for making every local show its link, after put went live, and tells how many do not yet.
func (s *Service) planMounts(put []string) (mounts int, err error) {
	for _, d := range s.dirs {
		isNew := slices.Contains(put, d.link)
		if d.local == "" || !isNew && !s.showsWrong(d) {
			continue
		}
		hidden, err := s.hides(d)
		if err != nil {
			return mounts, fmt.Errorf("mount %q on %s: %w", d.link, d.local, err)
		}
		s.plan.add("mount %s on %s%s", d.link, d.local, hidden)
		mounts++
	}
	return mounts, nil
}

// planServe stands for telling the unit of content, if that is news to it.
func (s *Service) planServe(ctx context.Context, content string) error {
	isTold, err := s.isTold(ctx, content)
	switch {
	case err != nil:
		return err
	case isTold:
		return s.stillUp(ctx)
	}
	u, err := showUnit(ctx, s.service)
	if err != nil {
		return err
	}

	mayCome := s.hasUnits() || slices.Contains(s.plan.lines, "install "+s.pkg)
	verb := s.action
	switch isLoaded := u.is["LoadState"] == "loaded"; {
	case u.triggered:
		return nil // what triggers it brings it up
	case isLoaded:
		verb, err = verbFor(&u, s.action)
	case !mayCome:
		err = errors.New(u.describe())
	}
	if err != nil {
		return err
	}

	if isDisabled(s.service, &u) {
		s.plan.add("enable %s", s.service)
	}
	s.plan.add("%s %s", verb, s.service)
	return nil
}

// planKept tells what would be kept: what somebody made or changed, where that is not what the commit has.
func (s *Service) planKept(ctx context.Context, c *candidate) error {
	top, err := s.asItIs()
	if err != nil {
		return err
	}
	defer top.close()
	live := &descent{top: top}
	defer live.close()

	for _, p := range slices.Concat(c.diff.edited, c.diff.alien) {
		words := "keep edit of %s"
		if slices.Contains(c.diff.alien, p) {
			words = "keep what is in the way as %s"
		}
		dir, err := live.to(path.Dir(p))
		if notThere(err) {
			p = live.stuck
			dir, err = live.to(path.Dir(p))
		}
		if err != nil {
			return err
		}

		st, err := dir.lstat(path.Base(p))
		if err != nil {
			continue // nothing is there
		}

		wants := []noted{{c.want[p], stamp{size: -1}}}
		is, err := s.files.match(ctx, dir, path.Base(p), place{-1}, &st, wants)
		if err != nil {
			return err
		}
		if is == (blob{}) {
			s.plan.add(words, s.seenAt(p))
		}
	}
	return nil
}

// seenAt is where a path of the repository is seen on the host: below a local, or in the checkout.
func (s *Service) seenAt(p string) string {
	for _, d := range s.dirs {
		if d.local != "" && within(p, d.link) {
			return d.local + strings.TrimPrefix(p, d.link)
		}
	}
	return filepath.Join(s.files.dir, p)
}

// hides says that a mount would hide what the host has at its local. It is an error where that can't be.
func (s *Service) hides(d dir) (words string, err error) {
	mounts, err := readMountinfo()
	if err != nil {
		return "", err
	}

	t := &s.rec.Mounts
	top := visible(mounts, resolve(d.local))
	isOurs := t.owns(mounts, top)
	fi, missing := os.Stat(d.local)
	switch names, notDir := os.ReadDir(d.local); {
	case isOurs, missing != nil, slices.Contains(t.Made, d.local):
		return "", nil
	case notDir == nil && len(names) == 0:
		return "", nil
	}
	return ", over what is there", fits(fi.IsDir(), d.kind, d.local)
}
