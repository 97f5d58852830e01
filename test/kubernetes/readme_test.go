package kubernetes

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// This file is deploy/README.md: its kustomizations, and its commands, which are run as they stand there.

func readme() string {
	text, err := os.ReadFile(filepath.Join(root, "deploy/README.md"))
	if err != nil {
		panic(err)
	}
	return string(text)
}

// documentedBlocks are the commands: indented lines that follow an empty one, without the indentation.
func documentedBlocks() (blocks []string) {
	for _, paragraph := range regexp.MustCompile(`\n\n+`).Split(readme(), -1) {
		indented := strings.Split(paragraph, "\n")
		for i, line := range indented {
			if !strings.HasPrefix(line, "    ") {
				indented = nil
				break
			}
			indented[i] = strings.TrimPrefix(strings.TrimPrefix(line, "    "), "    ")
		}
		if indented != nil {
			blocks = append(blocks, strings.Join(indented, "\n"))
		}
	}
	return blocks
}

// followed are the blocks that have been run.
var followed = make(map[string]bool)

// documented returns the block that has a text, with the parts replaced that depend on the cluster: old and new, in turn.
func documented(contains string, replaced ...string) (string, error) {
	blocks := slices.DeleteFunc(documentedBlocks(), func(b string) bool { return !strings.Contains(b, contains) })
	if len(blocks) != 1 {
		return "", errors.New("deploy/README.md has not one block of commands with " + contains)
	}
	for i := 0; i < len(replaced); i += 2 {
		if !strings.Contains(blocks[0], replaced[i]) {
			return "", errors.New("deploy/README.md: no " + replaced[i] + " in: " + blocks[0])
		}
	}
	followed[blocks[0]] = true
	return strings.NewReplacer(replaced...).Replace(blocks[0]), nil
}

// follow runs the block that has a text in a folder, and returns what it prints.
func follow(t *testing.T, dir, contains string, replaced ...string) string {
	t.Helper()
	commands, err := documented(contains, replaced...)
	if err != nil {
		t.Fatal(err)
	}
	c := exec.Command("sh", "-c", commands)
	c.Dir = dir
	c.Env = append(os.Environ(), "PATH="+cluster.bin+":"+os.Getenv("PATH"))
	out, err := c.CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", commands, err, out)
	}
	return string(out)
}

// kustomization makes a folder as deploy/README.md has the user make one: the kustomization that has the text, in a folder where
// optcache is this tree. Of a part, such as patches, the rest is that of nodelocaldns.
func kustomization(t *testing.T, contains string) string {
	t.Helper()
	var found []string
	for i, block := range strings.Split(readme(), "~~~") {
		if yaml, is := strings.CutPrefix(block, " yaml\n"); i%2 == 1 && is && strings.Contains(yaml, contains) {
			found = append(found, yaml)
		}
	}
	if len(found) != 1 {
		t.Fatalf("deploy/README.md has %d kustomizations with %s", len(found), contains)
	}
	text := found[0]
	if !strings.Contains(text, "resources:") {
		text = "resources:\n- optcache/deploy/kubernetes/nodelocaldns\n" + text
	}
	if !strings.Contains(text, "kind: Kustomization") {
		text = "apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\n" + text
	}
	dir := strings.Map(func(r rune) rune {
		if strings.ContainsRune("/: \n", r) {
			return '-'
		}
		return r
	}, contains)
	if err := cluster.write(dir+"/kustomization.yaml", "%s", text); err != nil {
		t.Fatal(err)
	}
	tree, err := filepath.Abs(root)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(tree, cluster.in(dir, "optcache")); err != nil && !errors.Is(err, os.ErrExist) {
		t.Fatal(err)
	}
	return cluster.in(dir)
}

// The folders of the user: cluster DNS with an image of the user's own, and nodelocaldns with the cluster IP, and for the rollout
// from or to node-cache.
func ownClusterDNS(t *testing.T) string { return kustomization(t, "newName: "+documentedName) }
func withClusterIP(t *testing.T) string { return kustomization(t, "components/cluster-ip") }
func patchedBase(t *testing.T) string   { return kustomization(t, "patches:") }

// commandsAreFollowed fails where deploy/README.md has commands that no step has run.
func commandsAreFollowed(t *testing.T) {
	// images_test.go runs it outside of the node. The image is the one that cluster DNS has.
	if _, err := documented("make image"); err != nil {
		t.Error(err)
	}
	for _, b := range documentedBlocks() {
		if !followed[b] {
			t.Errorf("no step has run this of deploy/README.md:\n%s", b)
		}
	}
}
