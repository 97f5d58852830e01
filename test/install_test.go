package test

import (
	"path/filepath"
	"strings"
	"testing"
)

// This file reads docs/install.md for release_linux_test.go, which follows it. What kustomize and Helm say is in test/helm, and what
// an API server says in test/kubernetes.

// installSection returns the lines of a section of docs/install.md. Every section is named here by a test.
func installSection(t *testing.T, heading string) []string {
	t.Helper()
	_, section, found := strings.Cut(readFile(t, filepath.Join(root, "docs", "install.md")), "\n## "+heading+"\n")
	if !found {
		t.Fatalf("docs/install.md has no section %q", heading)
	}
	section, _, _ = strings.Cut(section, "\n## ")
	return strings.Split(section, "\n")
}

// commands returns the commands of a section: its indented lines, but for those of files, between lines of tildes.
func commands(t *testing.T, heading string) (all []string) {
	t.Helper()
	file := false
	for _, line := range installSection(t, heading) {
		if strings.HasPrefix(line, "~~~") {
			file = !file
		}
		if command, found := strings.CutPrefix(line, "    "); found && !file {
			all = append(all, command)
		}
	}
	if len(all) == 0 {
		t.Fatalf("no commands in %q", heading)
	}
	return all
}
