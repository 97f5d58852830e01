package test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// binVar names a CoreDNS with optcache to test; without it one is built.
const binVar = "OPTCACHE_BIN"

// bin is the CoreDNS under test, root the repository.
var bin, root string

func TestMain(m *testing.M) { os.Exit(run(m)) }

func run(m *testing.M) int {
	dir, err := os.MkdirTemp("", "optcache-test-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)

	if root, err = filepath.Abs(".."); err == nil {
		bin, err = binary(dir)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return m.Run()
}

// binary returns the path of the CoreDNS to test. It is built with the Makefile's flags, so that
// the go command finds what `make build` compiled.
func binary(dir string) (string, error) {
	if path := os.Getenv(binVar); path != "" {
		if !filepath.IsAbs(path) {
			path = filepath.Join(root, path)
		}
		_, err := os.Stat(path)
		return path, err
	}
	path := filepath.Join(dir, "coredns")
	build := exec.Command("go", "build", "-buildvcs=false", "-trimpath",
		"-ldflags", "-s -w -X main.version=test", "-o", path, "./cmd/coredns")
	build.Dir = root
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return "", fmt.Errorf("go build ./cmd/coredns: %v\n%s", err, out)
	}
	return path, nil
}

// fromEnv returns what an environment variable says, as parse reads it. If the variable is empty, fromEnv returns otherwise, and
// given is false. Targets of the Makefile make tests longer by such variables.
func fromEnv[T any](t testing.TB, variable string, otherwise T, parse func(string) (T, error)) (v T, given bool) {
	t.Helper()
	text := os.Getenv(variable)
	if text == "" {
		return otherwise, false
	}
	v, err := parse(text)
	if err != nil {
		t.Fatalf("%s: %v", variable, err)
	}
	return v, true
}

// needs skips a test where a tool is not installed.
func needs(t *testing.T, tools ...string) {
	t.Helper()
	for _, tool := range tools {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("%s is not installed", tool)
		}
	}
}
