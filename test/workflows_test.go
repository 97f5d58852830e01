package test

import (
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"sigs.k8s.io/yaml"
)

// This file checks what .github says about the repository. `make workflows` checks it as GitHub would read it.

var (
	usesLine = regexp.MustCompile(`(?m)^\s*(?:- )?uses:\s*(.*)$`)
	pinned   = regexp.MustCompile(`^[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+$`)
	makeCall = regexp.MustCompile(`\bmake ([a-z0-9-]+)((?: [A-Z]+=\S+)*)`)
	fileName = regexp.MustCompile(`(?:^|\s)((?:\./)?\.?\w[\w.-]*/[\w./-]+)`)
)

// Actions are pinned by digest, and nothing may write unless a job says so. Every target of make that is called is there, every
// variable that is set is read there, and every file is there.
func TestWorkflows(t *testing.T) {
	t.Parallel()
	files, err := filepath.Glob(filepath.Join(root, ".github", "workflows", "*.yml"))
	if err != nil || len(files) < 3 {
		t.Fatalf("workflows: %v, %v", files, err)
	}
	makefile := readFile(t, filepath.Join(root, "Makefile"))
	named := 0
	for _, file := range files {
		name, text := filepath.Base(file), readFile(t, file)
		uses := usesLine.FindAllStringSubmatch(text, -1)
		if len(uses) == 0 {
			t.Errorf("%s uses nothing", name)
		}
		for _, u := range uses {
			if !pinned.MatchString(u[1]) {
				t.Errorf("%s: %s is not pinned by a digest with its version", name, u[1])
			}
		}
		var w struct {
			Permissions map[string]string `json:"permissions"`
			Jobs        map[string]struct {
				Timeout int `json:"timeout-minutes"`
				Steps   []struct {
					Run string `json:"run"`
				} `json:"steps"`
			} `json:"jobs"`
		}
		if err := yaml.Unmarshal([]byte(text), &w); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if len(w.Permissions) != 1 || w.Permissions["contents"] != "read" {
			t.Errorf("%s: permissions %v", name, w.Permissions)
		}
		for job, j := range w.Jobs {
			if j.Timeout == 0 {
				t.Errorf("%s: %s has no timeout", name, job)
			}
			for _, step := range j.Steps {
				for _, m := range makeCall.FindAllStringSubmatch(step.Run, -1) {
					if !strings.Contains(makefile, "\n"+m[1]+":") {
						t.Errorf("%s: no target %s", name, m[1])
					}
					for _, set := range strings.Fields(m[2]) {
						if variable, _, _ := strings.Cut(set, "="); !strings.Contains(makefile, "$("+variable+")") {
							t.Errorf("%s: make %s reads no %s", name, m[1], variable)
						}
					}
				}
				for _, m := range fileName.FindAllStringSubmatch(step.Run, -1) {
					// What is fetched, and what the step makes.
					if strings.HasPrefix(m[1], "github.com/") || strings.HasPrefix(m[1], "bin/") {
						continue
					}
					if _, err := os.Stat(filepath.Join(root, m[1])); err != nil {
						t.Errorf("%s: %v", name, err)
					}
					named++
				}
			}
		}
	}
	if named < 3 {
		t.Errorf("%d files are named: the expression finds too few", named)
	}
}

// Dependabot looks at each module.
func TestDependabotKnowsModules(t *testing.T) {
	t.Parallel()
	var modules []string
	err := filepath.WalkDir(root, func(file string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() && (d.Name() == "bin" || d.Name() == ".git" || d.Name() == "node_modules") {
			return fs.SkipDir
		}
		if err == nil && d.Name() == "go.mod" {
			rel, err := filepath.Rel(root, filepath.Dir(file))
			modules = append(modules, path.Join("/", filepath.ToSlash(rel)))
			return err
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	var config struct {
		Updates []struct {
			Ecosystem   string   `json:"package-ecosystem"`
			Directories []string `json:"directories"`
		} `json:"updates"`
	}
	if err := yaml.Unmarshal([]byte(readFile(t, filepath.Join(root, ".github", "dependabot.yml"))), &config); err != nil {
		t.Fatal(err)
	}
	for _, u := range config.Updates {
		if u.Ecosystem == "gomod" {
			slices.Sort(u.Directories)
			if slices.Sort(modules); !slices.Equal(u.Directories, modules) {
				t.Errorf("modules are %v, and Dependabot looks at %v", modules, u.Directories)
			}
		}
	}
}
