//go:build !linux

// Elsewhere than on Linux gitopper is its client alone, with or without the word ctl.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"

	"gitopper/ctl"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	args := os.Args[1:]
	if len(args) > 0 && args[0] == "ctl" {
		args = args[1:]
	}
	os.Exit(ctl.Main(ctx, args, os.Stdout, os.Stderr))
}
