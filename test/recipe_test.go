package test

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// The README's recipe for CoreDNS's own tree works word for word, from a checkout that is not published. It compiles all
// of CoreDNS, which takes two minutes on two cores: `make test-recipe`.
func TestRecipe(t *testing.T) {
	_, recipe, ok := strings.Cut(readFile(t, filepath.Join(root, "README.md")), "run in CoreDNS's tree:\n\n~~~ sh\n")
	recipe, _, closed := strings.Cut(recipe, "~~~\n")
	const placeholder = "OPTCACHE=/path/to/optcache\n"
	if !ok || !closed || !strings.Contains(recipe, placeholder) {
		t.Fatal("README.md has no recipe")
	}
	if os.Getenv("OPTCACHE_RECIPE") == "" {
		t.Skip("OPTCACHE_RECIPE is not set")
	}
	recipe = strings.Replace(recipe, placeholder, "OPTCACHE='"+root+"'\n", 1)

	list := exec.CommandContext(t.Context(), "go", "list", "-m", "-f", "{{.Dir}}", "github.com/coredns/coredns")
	list.Dir = root
	out, err := list.Output()
	if err != nil {
		t.Fatal(err)
	}
	tree := filepath.Join(t.TempDir(), "coredns")
	run := func(name string, args ...string) string {
		t.Helper()
		cmd := exec.CommandContext(t.Context(), name, args...)
		if name != "cp" && name != "chmod" {
			cmd.Dir = tree
		}
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%s %v: %v\n%s", name, args, err, out)
		}
		return string(out)
	}
	run("cp", "-r", strings.TrimSpace(string(out)), tree)
	run("chmod", "-R", "u+w", tree)
	run("sh", "-ec", recipe)
	if plugins := run("./coredns", "-plugins"); !strings.Contains(plugins, "optcache") {
		t.Errorf("it has no optcache:\n%s", plugins)
	}
	conf := filepath.Join(tree, "Corefile")
	if err := os.WriteFile(conf, []byte(".:0 {\nbind 127.0.0.1\noptcache {\nsuccess many\n}\nforward . 127.0.0.1:1\n}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.CommandContext(t.Context(), filepath.Join(tree, "coredns"), "-conf", conf).CombinedOutput(); err == nil || !strings.Contains(string(out), conf+":4") {
		t.Errorf("a wrong Corefile: %v: %s", err, out)
	}
}
