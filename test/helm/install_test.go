package helm

import (
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"helm.sh/helm/v3/pkg/strvals"
	"sigs.k8s.io/kustomize/api/krusty"
	"sigs.k8s.io/kustomize/kyaml/filesys"
	"sigs.k8s.io/yaml"
)

var (
	fenced      = regexp.MustCompile(`(?ms)^~~~ yaml\n(.*?)^~~~$`)
	helmCommand = regexp.MustCompile(`(?m)^    helm upgrade --install \S+ coredns-optcache-1\.2\.3\.tgz --namespace kube-system (.*) --take-ownership(?: --force)?$`)
)

// section returns a section of docs/install.md, and what stands in its blocks of YAML.
func section(t *testing.T, heading string) (text string, blocks []string) {
	t.Helper()
	document, err := os.ReadFile("../../docs/install.md")
	if err != nil {
		t.Fatal(err)
	}
	_, text, found := strings.Cut(string(document), "\n## "+heading+"\n")
	if !found {
		t.Fatalf("docs/install.md has no section %q", heading)
	}
	text, _, _ = strings.Cut(text, "\n## ")
	for _, block := range fenced.FindAllStringSubmatch(text, -1) {
		blocks = append(blocks, block[1])
	}
	return text, blocks
}

// The kustomization of docs/install.md has all objects of its bases, and each container has the user's image.
func TestInstallByKustomize(t *testing.T) {
	_, blocks := section(t, "Kubernetes, by kustomize")
	if len(blocks) != 1 {
		t.Fatalf("%d kustomizations", len(blocks))
	}
	dir := t.TempDir()
	tree, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(tree, filepath.Join(dir, "optcache")); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "kustomization.yaml"), []byte(blocks[0]), 0o600); err != nil {
		t.Fatal(err)
	}
	result, err := krusty.MakeKustomizer(krusty.MakeDefaultOptions()).Run(filesys.MakeFsOnDisk(), dir)
	if err != nil {
		t.Fatal(err)
	}
	text, err := result.AsYaml()
	if err != nil {
		t.Fatal(err)
	}
	objects := map[string]object{}
	decode(t, "kustomization", string(text), objects)
	for workload, containers := range map[string]int{"Deployment/coredns": 1, "DaemonSet/node-local-dns": 4} {
		spec := at(objects[workload], "spec", "template", "spec")
		init, _ := at(spec, "initContainers").([]any)
		main, _ := at(spec, "containers").([]any)
		all := append(init, main...)
		if len(all) != containers {
			t.Errorf("%s has %d containers", workload, len(all))
		}
		for _, c := range all {
			if image := at(c, "image"); image != "registry.example.org/dns/coredns-optcache:1.2.3" {
				t.Errorf("%s: the image of %v is %v", workload, at(c, "name"), image)
			}
		}
	}
}

// The values and commands of docs/install.md are ones of the chart. Those for the official chart are the chart's, too.
func TestInstallByHelm(t *testing.T) {
	section, blocks := section(t, "Kubernetes, by Helm")
	commands := helmCommand.FindAllStringSubmatch(section, -1)
	if len(blocks) != 3 || len(commands) != 3 || strings.Count(section, "\n    helm upgrade ") != 3 {
		t.Fatalf("%d sets of values, %d commands", len(blocks), len(commands))
	}
	for _, b := range blocks {
		render(t, b)
	}
	for _, c := range commands {
		values := map[string]any{}
		words := strings.Fields(c[1])
		for i := 0; i+1 < len(words); i += 2 {
			switch {
			case words[i] == "--set":
				if err := strvals.ParseInto(words[i+1], values); err != nil {
					t.Error(err)
				}
			case words[i] == "--values" && words[i+1] == "values.yaml":
				var file map[string]any
				if err := yaml.Unmarshal([]byte(blocks[0]), &file); err != nil {
					t.Fatal(err)
				}
				maps.Copy(values, file)
			default:
				t.Errorf("%q in %s", words[i], c[0])
			}
		}
		given, err := yaml.Marshal(values)
		if err != nil {
			t.Fatal(err)
		}
		objects := render(t, string(given))
		workload, want := objects["Deployment/coredns"], "registry.example.org/dns/coredns-optcache:latest"
		if values["role"] != nil {
			workload = objects["DaemonSet/node-local-dns"]
		}
		if image := at(workload, "spec", "template", "spec", "containers", 0, "image"); image != want {
			t.Errorf("%s: the image is %v", c[0], image)
		}
	}
}
