// Hitratio measures what part of a trace's requests a cache answers, for optcache's own engine and
// for its peers, and prints it as CSV: trace, size in answers, policy, hit ratio in per cent.
//
//	go run ./bench/hitratio [-sizes N,…] [-policies NAME,…] [-runs N] [-restart] [-memory MB,…] [-cut [-namespaces N]] [-svg FILE] TRACE.txt.gz…
//
// What it does is in the module below, peers, which needs libraries that the plugin does not. This
// package builds it and hands over, so that the command above works although the two modules know
// nothing of each other. A go.work would do so too, but takes part in every command in the
// repository: the plugin could no longer be built without the go.mod files of the peers, nor with
// -mod=mod, and could be built with versions that are not its own.
package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
)

const self = "github.com/optcache/optcache/bench/hitratio"

func main() {
	err := run(os.Args[1:])
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		os.Exit(max(exit.ExitCode(), 1)) // it has said why
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "hitratio:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	list := exec.Command("go", "list", "-f", "{{.Dir}}", self)
	list.Stderr = os.Stderr
	dir, err := list.Output()
	if err != nil {
		return err
	}
	tmp, err := os.MkdirTemp("", "hitratio")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	bin := filepath.Join(tmp, "hitratio.exe") // a suffix that Windows wants and others ignore

	build := exec.Command("go", "build", "-C", filepath.Join(strings.TrimSpace(string(dir)), "peers"),
		"-buildvcs=false", "-o", bin, ".")
	build.Env = append(os.Environ(), "GOWORK=off")
	build.Stderr = os.Stderr
	if err := build.Run(); err != nil {
		return err
	}
	// It is run where this was, for the paths in its arguments.
	measure := exec.Command(bin, args...)
	signal.Notify(make(chan os.Signal, 1), os.Interrupt) // which ends it; this is to clean up after it
	measure.Stdout, measure.Stderr = os.Stdout, os.Stderr
	return measure.Run()
}
