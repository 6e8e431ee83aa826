//go:build linux

package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"time"
)

// serve tells the unit of what it has not seen, watches it settle, and else looks whether it is still up.
func (s *Service) serve(ctx context.Context, v version) error {
	now := told{version: v, Boot: bootID()}
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case s.action == "":
		return s.settled(now)
	}

	isTold, err := s.isTold(ctx, v.Content)
	switch {
	case err != nil:
		return err
	case !isTold:
		s.within(time.Minute + actionLimit + localLimit)
		verb, err := tell(ctx, s.stop.hard, s.service, s.action, s.hasUnits(), s.step)
		if err != nil {
			return err
		}
		verb = cmp.Or(verb, "none: it is down until it is triggered")
		slog.Info(fmt.Sprintf("%s: told by %s", s.service, verb), "commit", fmt.Sprintf("%.8s", v.Commit))
		s.rec.Told = now
	case s.rec.Good.Content == v.Content:
		return s.stillUp(ctx)
	}

	s.step("settle")
	s.within(s.settle)
	err = s.watch(ctx)
	switch {
	case err == nil:
		return s.settled(now)
	case ctx.Err() == nil:
		s.untell() // not done before it is seen to have worked
	}
	return err
}

// hasUnits says whether systemd reads unit files of the service's.
func (s *Service) hasUnits() bool {
	return slices.ContainsFunc(s.dirs, func(d dir) bool { return unitDir.MatchString(d.local) })
}

// isTold says whether the unit has seen content in this boot.
func (s *Service) isTold(ctx context.Context, content string) (bool, error) {
	switch {
	case s.rec.Told.Content != content:
		return false, nil
	case s.rec.Told.Boot == bootID():
		return true, nil
	}
	return s.toldByBoot(ctx)
}

// toldByBoot says whether the unit began to start in this boot after the mounts were made, and so runs on
// what they show. It is an error if an administrator had stopped it before.
func (s *Service) toldByBoot(ctx context.Context) (bool, error) {
	u, err := showUnit(ctx, s.service)
	switch {
	case err != nil:
		return false, err
	case s.rec.Told.staysDown(&u, s.action):
		s.rec.Told.Left = leftStopped
		return false, fmt.Errorf("%s stays down, for an administrator had stopped it before the boot: "+
			"start it, or do pull", u.is["Id"])
	case s.facts.mounted == 0, !u.running(), u.since() <= s.facts.mounted:
		return false, nil
	case s.hasUnits(): // systemd may have read its files before the mounts were made
		return false, nil
	}

	s.rec.Told.Boot = bootID()
	s.unit.Store(&u) // the last round's may be older
	return true, nil
}

// watch watches the unit settle on what it was told of.
func (s *Service) watch(ctx context.Context) error {
	u, err := settle(ctx, s.service, s.action, s.settle)
	s.facts.seenAt, s.rec.Told.Left = time.Now(), u.is["UnitFileState"]
	if err != nil || s.action == "restart" {
		return err
	}

	for _, d := range s.dirs {
		if d.local != "" && u.seesOld(d.local) {
			return fmt.Errorf("unit has private mounts, use action = \"restart\": "+
				"its main process does not see the new %s", d.local)
		}
	}
	return nil
}

// stillUp looks whether a unit that settled is up, in what the last round saw where that is recent. After
// trouble only what was not seen before is.
func (s *Service) stillUp(ctx context.Context) error {
	u := s.unit.Load()
	wasSeen := u == nil || u.at.Before(s.facts.seenAt) || s.hadTrouble() && u.at.Equal(s.facts.seenAt)
	if wasSeen {
		now, err := showUnit(ctx, s.service)
		if err != nil {
			return err
		}
		u = &now
	}

	isMissing := u.down() && u.says("LoadState", "not-found")
	if isMissing && s.plan == nil { // it may have been installed anew
		now, err := loadUnit(ctx, s.service, true)
		if err != nil {
			return err
		}
		u = &now
	}

	s.facts.seenAt = u.at
	s.rec.Told.note(u, s.action)
	if !u.well(s.action) {
		return errors.New(u.describe())
	}
	return nil
}
