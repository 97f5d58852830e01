package kubernetes

import (
	"os/exec"
	"path/filepath"
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

// The chart takes the place of kubeadm's objects and of the kustomizations'; it is upgraded, refuses what is wrong, goes back one
// revision, and goes. Helm is the real one, and the API server.
func TestChart(t *testing.T) {
	needsNode(t)
	chart := filepath.Join(root, "deploy/helm/coredns-optcache")
	addCoreDNS(t)
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
	if left := system(t, "get", "deployments,daemonsets,services,roles", "-l", "app.kubernetes.io/name=coredns-optcache", "-o", "name"); strings.TrimSpace(left) != "" {
		t.Errorf("uninstalled, and there is %s", left)
	}
}
