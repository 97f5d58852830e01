package kubernetes

import (
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// This file is docs/install.md at the API server: its sections about Kubernetes, with their commands as they stand there.

// prometheusOperator has the definitions of the kinds that Prometheus Operator knows. Nothing of it is linked.
const prometheusOperator = "github.com/prometheus-operator/prometheus-operator@v0.85.0"

// downloadOperator returns what `go mod download -json` prints of the module. It is called outside of the node first, which has no way
// to the Go modules.
func downloadOperator() ([]byte, error) {
	download := exec.Command("go", "mod", "download", "-json", prometheusOperator)
	download.Dir = os.TempDir() // of no module
	return download.Output()
}

// installSection returns the blocks of YAML and the commands of a section of docs/install.md.
func installSection(t *testing.T, heading string) (blocks, commands []string) {
	t.Helper()
	document, err := os.ReadFile(filepath.Join(root, "docs/install.md"))
	if err != nil {
		t.Fatal(err)
	}
	_, text, found := strings.Cut(string(document), "\n## "+heading+"\n")
	if !found {
		t.Fatalf("docs/install.md has no section %q", heading)
	}
	text, _, _ = strings.Cut(text, "\n## ")
	for i, part := range strings.Split("\n"+text, "\n~~~") {
		if block, is := strings.CutPrefix(part, " yaml\n"); is && i%2 == 1 {
			blocks = append(blocks, block+"\n")
		}
		for line := range strings.Lines(part) {
			if command, found := strings.CutPrefix(line, "    "); found && i%2 == 0 {
				commands = append(commands, strings.TrimSpace(command))
			}
		}
	}
	return blocks, commands
}

// followIn runs a command of the document in a folder, and returns what it prints. kubectl diff exits with 1 where something differs.
func followIn(t *testing.T, dir, command string) string {
	t.Helper()
	c := exec.Command("sh", "-c", command)
	c.Dir = dir
	c.Env = append(os.Environ(), "PATH="+cluster.bin+":"+os.Getenv("PATH"))
	out, err := c.CombinedOutput()
	var exit *exec.ExitError
	if differs := errors.As(err, &exit) && exit.ExitCode() == 1 && strings.HasPrefix(command, "kubectl diff "); err != nil && !differs {
		t.Fatalf("%s: %v\n%s", command, err, out)
	}
	return string(out)
}

// imagesOf are the images of a workload's containers, init containers included, each once.
func imagesOf(t *testing.T, workload string) string {
	t.Helper()
	images := strings.Fields(system(t, "get", workload, "-o", "jsonpath={.spec.template.spec.initContainers[*].image} {.spec.template.spec.containers[*].image}"))
	slices.Sort(images)
	return strings.Join(slices.Compact(images), " ")
}

// A user has kubeadm's CoreDNS, and follows docs/install.md by kustomize, to upgrade, by Helm, and back. Each container of ours has the
// image of the user's registry. Prometheus Operator's kinds are taken.
func TestInstallDocument(t *testing.T) {
	needsNode(t)
	addCoreDNS(t)
	keepDeployment(t, "install/coredns.yaml")
	const image = "registry.example.org/dns/coredns-optcache"
	runs := func(tag string) {
		t.Helper()
		for _, workload := range workloads {
			if got := imagesOf(t, workload); got != image+":"+tag {
				t.Errorf("%s has the images %s", workload, got)
			}
		}
	}

	blocks, commands := installSection(t, "Kubernetes, by kustomize")
	if len(blocks) != 1 || len(commands) != 2 {
		t.Fatalf("%d kustomizations, commands %q", len(blocks), commands)
	}
	for _, tag := range []string{"1.2.3", "1.2.4"} {
		if err := cluster.write("install/kustomization.yaml", "%s", strings.Replace(blocks[0], "1.2.3", tag, 1)); err != nil {
			t.Fatal(err)
		}
		if tag == "1.2.3" {
			tree, err := filepath.Abs(root)
			if err != nil {
				t.Fatal(err)
			}
			if err := os.Symlink(tree, cluster.in("install/optcache")); err != nil {
				t.Fatal(err)
			}
		}
		for _, c := range commands {
			if out := followIn(t, cluster.in("install"), c); strings.HasPrefix(c, "kubectl diff ") && !strings.Contains(out, image+":"+tag) {
				t.Errorf("%s does not show the image:\n%s", c, out)
			}
		}
		runs(tag)
		if out := followIn(t, cluster.in("install"), commands[0]); out != "" {
			t.Errorf("applied, and there is a difference:\n%s", out)
		}
	}

	blocks, commands = installSection(t, "Kubernetes, by Helm")
	if len(blocks) != 3 || len(commands) != 7 {
		t.Fatalf("%d sets of values, commands %q", len(blocks), commands)
	}
	said, err := downloadOperator()
	var module struct{ Dir string }
	if err := errors.Join(err, json.Unmarshal(said, &module)); err != nil {
		t.Fatalf("%v: %s", err, said)
	}
	for _, kind := range []string{"servicemonitors", "podmonitors", "prometheusrules"} {
		kubectl(t, "apply", "--server-side", "-f", filepath.Join(module.Dir, "example/prometheus-operator-crd/monitoring.coreos.com_"+kind+".yaml"))
		kubectl(t, "wait", "--for=condition=Established", "--timeout=60s", "crd/"+kind+".monitoring.coreos.com")
	}
	if err := errors.Join(cluster.write("install/values.yaml", "%s", blocks[0]), cluster.write("install/hpa.yaml", "%s", blocks[1])); err != nil {
		t.Fatal(err)
	}
	mustHelm(t, "package", filepath.Join(root, "deploy/helm/coredns-optcache"), "--version", "1.2.3", "--app-version", "1.2.3", "--destination", cluster.in("install"))
	// The third is the first rollout from node-cache, and the second follows it.
	for _, c := range []struct{ command, rollingUpdate string }{{commands[0], "10% 0"}, {commands[2], "0 10%"}, {commands[1], "10% 0"}} {
		if c.command == commands[2] {
			createNodeCache(t)
		}
		followIn(t, cluster.in("install"), c.command)
		nothingOfNodeCache(t)
		const fields = "jsonpath={.spec.updateStrategy.rollingUpdate.maxSurge} {.spec.updateStrategy.rollingUpdate.maxUnavailable}"
		if got := system(t, "get", "daemonset/node-local-dns", "-o", fields); got != c.rollingUpdate {
			t.Errorf("%s: the DaemonSet has maxSurge and maxUnavailable %s", c.command, got)
		}
	}
	runs("1.2.3")
	if got := system(t, "get", "service/kube-dns", "-o", "jsonpath={.spec.clusterIP}"); got != clusterDNS {
		t.Errorf("the service has the address %s", got)
	}
	system(t, "get", "servicemonitor/coredns", "poddisruptionbudget/coredns")
	// And what else the section describes.
	followIn(t, cluster.in("install"), commands[0]+" --values hpa.yaml --set prometheus.rules.enabled=true --set prometheus.monitor.kind=PodMonitor")
	system(t, "get", "horizontalpodautoscaler/coredns", "podmonitor/coredns", "prometheusrule/coredns")
	for _, c := range commands[3:] {
		followIn(t, cluster.in("install"), c)
	}
	isKubeadms(t)
	if left := system(t, "get", "horizontalpodautoscalers,poddisruptionbudgets,servicemonitors,podmonitors,prometheusrules,daemonsets", "-o", "name"); strings.TrimSpace(left) != "" {
		t.Errorf("uninstalled, and there is %s", left)
	}
	system(t, append([]string{"delete", "--ignore-not-found", "--timeout=60s"}, keptByHelm...)...)
	if left := ofTheChart(t); len(left) > 0 {
		t.Errorf("deleted, and there is %q", left)
	}
	kubectl(t, "delete", "crd", "servicemonitors.monitoring.coreos.com", "podmonitors.monitoring.coreos.com", "prometheusrules.monitoring.coreos.com")
}
