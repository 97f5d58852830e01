//go:build unix

package test

import (
	"syscall"
	"testing"
)

// makeFIFO makes a FIFO.
func makeFIFO(t testing.TB, path string) {
	t.Helper()
	if err := syscall.Mkfifo(path, 0o600); err != nil {
		t.Fatal(err)
	}
}
