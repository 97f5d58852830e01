// Command optcachectl asks a running CoreDNS with optcache what is in its cache, and removes what should not be there. It talks to
// the control interface of the Corefile's optcache blocks.
package main

import (
	"context"
	"io"
	"os"
	"runtime/debug"
	"time"

	"golang.org/x/term"
)

// version is set by the Makefile: -ldflags "-X main.version=$(git describe …)".
var version string

// system is what the program sees and uses of the machine. Tests have another one.
type system struct {
	stdin          io.Reader
	stdout, stderr io.Writer
	getenv         func(string) string
	now            func() time.Time
	every          func(time.Duration) <-chan time.Time // until the program ends

	typed  bool                       // stdin is a terminal
	shown  bool                       // stderr is a terminal
	screen func() (width, height int) // of stdout; 0 if it is no terminal
}

func realSystem() system {
	terminal := func(f *os.File) bool { return term.IsTerminal(int(f.Fd())) }
	return system{
		stdin:  os.Stdin,
		stdout: os.Stdout,
		stderr: os.Stderr,
		getenv: os.Getenv,
		now:    time.Now,
		every:  func(d time.Duration) <-chan time.Time { return time.NewTicker(d).C },
		typed:  terminal(os.Stdin),
		shown:  terminal(os.Stderr),
		screen: func() (int, int) {
			width, height, err := term.GetSize(int(os.Stdout.Fd()))
			if err != nil {
				return 0, 0
			}
			return width, height
		},
	}
}

// No signal is caught but for dump, so that ^C ends the program at once.
func main() {
	os.Exit(run(context.Background(), realSystem(), os.Args[1:]))
}

// toolVersion falls back to what the go command wrote into the binary, which is the module's version after `go install …@version`.
func toolVersion() string {
	if version != "" {
		return version
	}
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
		return info.Main.Version
	}
	return "(devel)"
}
