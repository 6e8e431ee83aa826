//go:build unix

package ctl

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/crypto/ssh"
)

func TestManyHosts(t *testing.T) {
	home(t)
	const n = 500
	const perHost = 20
	one := strings.TrimSpace(nginx)
	entry := one[strings.Index(one, "[")+1 : strings.Index(one, "]")]
	answer := `{"services":[` + strings.TrimSuffix(strings.Repeat(entry+",", perHost), ",") + "]}\n"
	key := newKey(t)
	args := []string{"list", "service"}
	var mu sync.Mutex
	open, most := 0, 0
	for i := range n {
		s := serve(t, fmt.Sprintf("127.0.%d.%d", 1+i/250, 1+i%250), func(_ string, stdout, _ io.Writer) int {
			mu.Lock()
			open++
			most = max(most, open)
			mu.Unlock()
			runtime.Gosched()
			io.WriteString(stdout, answer)
			mu.Lock()
			open--
			mu.Unlock()
			return 0
		}, []ssh.Signer{key})
		args = append(args, "@"+s.addr)
	}
	// One is dead, in the middle: its port is closed again.
	l, err := net.Listen("tcp", "127.0.3.1:0")
	if err != nil {
		t.Fatal(err)
	}
	dead := l.Addr().String()
	l.Close()
	args = slices.Insert(args, 250, "@"+dead)

	// In a process of its own, so that its memory can be told from the stand-ins'. A machine that stands still for
	// longer than the connect timeout, as busy ones do, is asked again.
	var status int
	var stdout, stderr string
	for range 3 {
		var out, errs bytes.Buffer
		client := exec.CommandContext(t.Context(), os.Args[0])
		client.Env = append(os.Environ(), asClient+"="+strings.Join(args, " "))
		client.Stdout, client.Stderr = &out, &errs
		if err := client.Run(); err == nil {
			t.Error("status 0")
		}
		status, stdout, stderr = client.ProcessState.ExitCode(), out.String(), errs.String()
		kib := client.ProcessState.SysUsage().(*syscall.Rusage).Maxrss
		t.Logf("%d hosts, %d services: %d MiB", n, n*perHost, kib>>10)
		if kib > 256<<10 { // the race detector takes most of it
			t.Errorf("%d KiB of memory", kib)
		}
		if !strings.Contains(stderr, "no answer for 10s") {
			break
		}
	}
	if status != 1 {
		t.Errorf("status %d", status)
	}
	if got := quiet(stderr); strings.Count(got, "\n") != 1 || !strings.HasPrefix(got, "gitopper ctl: "+dead+": ") || !strings.Contains(got, "refused") {
		t.Errorf("stderr %q", got)
	}
	rows := strings.Split(strings.TrimSpace(stdout), "\n")
	if len(rows) != 1+n*perHost {
		t.Fatalf("%d rows", len(rows))
	}
	// The order is that of the command line.
	hosts := slices.DeleteFunc(args[2:], func(s string) bool { return s == "@"+dead })
	for i, row := range rows[1:] {
		if f := strings.Fields(row); f[0] != fmt.Sprint(i) || "@"+f[1] != hosts[i/perHost] {
			t.Fatalf("row %d is %q", i, row)
		}
	}
	if most > 32 {
		t.Errorf("%d hosts at the same time", most)
	}
	// All of them were remembered, each once, although they were added side by side.
	dir, _ := os.UserHomeDir()
	if got := strings.Count(readFile(t, filepath.Join(dir, ".ssh", "known_hosts")), "\n"); got != n {
		t.Errorf("%d lines in known_hosts", got)
	}
	if _, _, stderr := call(t, args...); stderr != quiet(stderr) {
		t.Error("hosts are new a second time")
	}
}
