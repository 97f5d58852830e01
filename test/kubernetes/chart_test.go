package kubernetes

import (
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// helm runs Helm in the namespace of the manifests, and returns what it prints and whether it succeeded.
func helm(args ...string) (string, error) {
	out, err := exec.Command(filepath.Join(cluster.bin, "helm"), append(args, "--namespace", "kube-system")...).CombinedOutput()
	return string(out), err
}

func mustHelm(t *testing.T, args ...string) {
	t.Helper()
	if out, err := helm(args...); err != nil {
		t.Fatalf("helm %s: %v\n%s", strings.Join(args, " "), err, out)
	}
}

// keptByHelm are the objects that cluster DNS needs. They stay when the release goes.
var keptByHelm = []string{
	"clusterrole.rbac.authorization.k8s.io/system:coredns", "clusterrolebinding.rbac.authorization.k8s.io/system:coredns",
	"configmap/coredns-optcache", "deployment.apps/coredns", "service/kube-dns", "serviceaccount/coredns",
}

// ofTheChart are the objects that the chart has made, or has taken over, and that have its label.
func ofTheChart(t *testing.T) []string {
	t.Helper()
	const kinds = "deployments,daemonsets,services,serviceaccounts,configmaps,clusterroles,clusterrolebindings,roles,rolebindings," +
		"horizontalpodautoscalers,poddisruptionbudgets"
	return slices.Sorted(slices.Values(strings.Fields(system(t, "get", kinds, "-l", "app.kubernetes.io/name=coredns-optcache", "-o", "name"))))
}

// keepDeployment writes the Deployment that is there into a file, as deploy/README.md has the user do it before the first time.
func keepDeployment(t *testing.T, file string) {
	t.Helper()
	text := slices.DeleteFunc(strings.SplitAfter(system(t, "get", "deployment/coredns", "-o", "yaml"), "\n"), func(line string) bool {
		return strings.HasPrefix(line, "  resourceVersion:")
	})
	if err := cluster.write(file, "%s", strings.Join(text, "")); err != nil {
		t.Fatal(err)
	}
}

// isKubeadms reports an error if the Deployment is not that of kubeadm, or if it has lost what it needs.
func isKubeadms(t *testing.T) {
	t.Helper()
	stock, err := kubeadmImage(cluster.bin)
	if err != nil {
		t.Fatal(err)
	}
	if image := imageOf(t, "deployment/coredns"); image != stock {
		t.Errorf("cluster DNS runs %s", image)
	}
	system(t, "get", "configmap/coredns", "service/kube-dns", "serviceaccount/coredns", "clusterrole/system:coredns", "clusterrolebinding/system:coredns")
}

// The chart takes the place of kubeadm's objects and of the kustomizations'; it is upgraded, refuses what is wrong, goes back one
// revision, and goes. Cluster DNS stays, ours or kubeadm's. Helm is the real one, and the API server.
func TestChart(t *testing.T) {
	needsNode(t)
	chart := filepath.Join(root, "deploy/helm/coredns-optcache")
	addCoreDNS(t)
	keepDeployment(t, "chart/coredns.yaml")
	for base, workload := range workloads {
		role := map[string]string{"cluster-dns": "clusterDNS", "nodelocaldns": "nodeLocalDNS"}[base]
		set := []string{"--set", "role=" + role, "--set", "image.repository=registry.example.org/dns/coredns-optcache"}
		mustHelm(t, append([]string{"lint", "--strict", chart}, set...)...)
		install := append([]string{"upgrade", "--install", base, chart, "--take-ownership"}, set...)
		generation := func() string {
			t.Helper()
			return system(t, "get", workload, "-o", "jsonpath={.metadata.generation} {.spec.template.spec.containers[0].image} {.spec.template.spec.priorityClassName}")
		}
		mustHelm(t, install...)
		first := generation()
		if !strings.Contains(first, " registry.example.org/dns/coredns-optcache:") {
			t.Errorf("%s: %s", base, first)
		}
		mustHelm(t, install...)
		if now := generation(); now != first {
			t.Errorf("%s: the same values changed %s to %s", base, first, now)
		}

		out, err := helm(append(install, "--set", "resources.limit.memory=1Gi")...)
		if err == nil || !strings.Contains(out, "/resources") {
			t.Errorf("%s: a wrong value: %v\n%s", base, err, out)
		}
		if now := generation(); now != first {
			t.Errorf("%s: a wrong value changed %s to %s", base, first, now)
		}

		more := []string{"--set", "priorityClassName=system-node-critical", "--set", "resources.limits.memory=1Gi", "--set", "podAnnotations.a=b"}
		if base == "cluster-dns" {
			more = append(more, "--set", "podDisruptionBudget.maxUnavailable=1", "--set", "hpa.enabled=true", "--set", "hpa.queriesPerSecond=1000")
		} else {
			more = append(more, "--set", "rollingUpdate.maxSurge=1", "--set", "rollingUpdate.maxUnavailable=0")
		}
		mustHelm(t, append(install, more...)...)
		if now := generation(); !strings.HasSuffix(now, " system-node-critical") {
			t.Errorf("%s: upgraded to %s", base, now)
		}
		mustHelm(t, "rollback", base)
		if now := generation(); strings.Fields(now)[2] != strings.Fields(first)[2] {
			t.Errorf("%s: rolled back to %s, and it was %s", base, now, first)
		}
		if left := strings.TrimSpace(system(t, "get", "horizontalpodautoscalers,poddisruptionbudgets", "-o", "name")); left != "" {
			t.Errorf("%s: rolled back, and there is %s", base, left)
		}
	}
	autoscaler := []string{"upgrade", "cluster-dns", chart, "--reuse-values", "--set", "autoscaler.enabled=true"}
	mustHelm(t, autoscaler...)
	system(t, "get", "deployment/coredns-autoscaler", "configmap/coredns-autoscaler", "role/coredns-autoscaler")
	for base := range workloads {
		mustHelm(t, "uninstall", base)
	}
	if left := ofTheChart(t); !slices.Equal(left, keptByHelm) {
		t.Errorf("uninstalled, and there is %q", left)
	}
	for _, name := range keptByHelm {
		if policy := system(t, "get", name, "-o", `jsonpath={.metadata.annotations.helm\.sh/resource-policy}`); policy != "keep" {
			t.Errorf("%s has the policy %q", name, policy)
		}
	}

	// A release of another name takes over what is left. It goes after kubeadm's Deployment has come back.
	mustHelm(t, "upgrade", "--install", "again", chart, "--take-ownership", "--set", "image.repository=registry.example.org/dns/again", "--set", "podDisruptionBudget.maxUnavailable=1")
	if image := imageOf(t, "deployment/coredns"); !strings.HasPrefix(image, "registry.example.org/dns/again:") {
		t.Errorf("installed again, and cluster DNS runs %s", image)
	}
	system(t, "replace", "-f", cluster.in("chart/coredns.yaml"))
	mustHelm(t, "uninstall", "again")
	isKubeadms(t)
	if left := system(t, "get", "poddisruptionbudgets", "-o", "name"); strings.TrimSpace(left) != "" {
		t.Errorf("uninstalled, and there is %s", left)
	}
	system(t, append([]string{"delete", "--timeout=60s"}, keptByHelm...)...)
	if left := ofTheChart(t); len(left) > 0 {
		t.Errorf("deleted, and there is %q", left)
	}
}
