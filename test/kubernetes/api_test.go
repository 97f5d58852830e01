package kubernetes

import (
	"bytes"
	"encoding/json"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// This file asks the API server, and needs nothing else of the cluster.

// addCoreDNS makes the objects that kubeadm makes for its own CoreDNS.
func addCoreDNS(t *testing.T) {
	t.Helper()
	if err := kubeadmAddon(); err != nil {
		t.Fatal(err)
	}
}

// kubeadmAddon is what kubeadm does with CoreDNS in `init` and in `upgrade`.
func kubeadmAddon() error {
	version, err := kubernetesVersion(cluster.bin)
	if err != nil {
		return err
	}
	return run(filepath.Join(cluster.bin, "kubeadm"), "init", "phase", "addon", "coredns", "--kubeconfig", cluster.in("admin.conf"),
		"--kubernetes-version", version, "--service-cidr", "10.96.0.0/12")
}

// versions returns the generations of what has some, and the resource versions of all other objects of a kustomization.
func versions(t *testing.T, dir string) string {
	t.Helper()
	var all []string
	for line := range strings.Lines(kubectl(t, "get", "-k", dir, "-o",
		`jsonpath={range .items[*]}{.kind}/{.metadata.name} {.metadata.generation} {.metadata.resourceVersion}{"\n"}{end}`)) {
		// A workload's resource version changes with its status.
		if words := strings.Fields(line); len(words) == 3 && slices.Contains([]string{"Deployment", "DaemonSet"}, strings.Split(words[0], "/")[0]) {
			line = strings.Join(words[:2], " ") + "\n"
		}
		all = append(all, line)
	}
	return strings.Join(all, "")
}

// The API server takes the manifests as they are, over the objects of kubeadm. To apply them a second time changes nothing, and
// nothing differs from what is there, in the way of kubectl and in that of the server.
func TestManifestsAreTaken(t *testing.T) {
	needsNode(t)
	addCoreDNS(t)
	for name := range workloads {
		for _, way := range [][]string{{}, {"--server-side", "--force-conflicts"}} {
			args := slices.Concat([]string{"apply", "--validate=strict", "-k", base(name)}, way)
			kubectl(t, args...)
			before := versions(t, base(name))
			if out := kubectl(t, args...); strings.Contains(out, "Warning") {
				t.Errorf("%s", out)
			}
			if after := versions(t, base(name)); after != before || strings.Count(after, "\n") < 4 {
				t.Errorf("%s is applied again: before\n%safter\n%s", name, before, after)
			}
			if out, err := cluster.command(slices.Concat([]string{"diff", "-k", base(name)}, way)...).CombinedOutput(); err != nil || len(out) > 0 {
				t.Errorf("%s differs: %v\n%s", name, err, out)
			}
		}
	}
}

// Cluster DNS fits the level "restricted" of Pod Security. NodeLocal DNSCache uses the node's network and folders.
func TestPodSecurity(t *testing.T) {
	needsNode(t)
	allowed := map[string][]string{"cluster-dns": {"restricted", "baseline", "privileged"}, "nodelocaldns": {"privileged"}}
	const namespace = "pod-security"
	kubectl(t, "create", "namespace", namespace)
	defer kubectl(t, "delete", "namespace", namespace, "--wait=false")
	kubectl(t, "-n", namespace, "create", "serviceaccount", "default") // by hand, as there are no controllers yet
	for name, workload := range workloads {
		var w struct {
			Spec struct {
				Template struct {
					Spec map[string]any `json:"spec"`
				} `json:"template"`
			} `json:"spec"`
		}
		kubectl(t, "apply", "--validate=strict", "-k", base(name))
		if err := json.Unmarshal([]byte(system(t, "get", workload, "-o", "json")), &w); err != nil {
			t.Fatal(err)
		}
		spec := w.Spec.Template.Spec
		for _, of := range []string{"priorityClassName", "serviceAccountName", "serviceAccount"} { // of kube-system
			delete(spec, of)
		}
		pod, err := json.Marshal(map[string]any{"apiVersion": "v1", "kind": "Pod", "metadata": map[string]string{"name": name, "namespace": namespace}, "spec": spec})
		if err != nil {
			t.Fatal(err)
		}
		for _, level := range []string{"restricted", "baseline", "privileged"} {
			kubectl(t, "label", "--overwrite", "namespace", namespace, "pod-security.kubernetes.io/enforce="+level)
			c := cluster.command("create", "--dry-run=server", "-f", "-")
			c.Stdin = bytes.NewReader(pod)
			out, err := c.CombinedOutput()
			if want := slices.Contains(allowed[name], level); (err == nil) != want || !want && !bytes.Contains(out, []byte("violates PodSecurity")) {
				t.Errorf("%s at level %s: allowed %v\n%s", name, level, err == nil, out)
			}
		}
	}
}

// The objects go, so that what comes next begins anew.
func TestManifestsAreDeleted(t *testing.T) {
	needsNode(t)
	for name := range workloads {
		kubectl(t, "apply", "--validate=strict", "-k", base(name))
		kubectl(t, "delete", "-k", base(name), "--timeout=60s")
	}
	if left := system(t, "get", "deployments,daemonsets,services", "-o", "name"); strings.TrimSpace(left) != "" {
		t.Errorf("%s", left)
	}
}
