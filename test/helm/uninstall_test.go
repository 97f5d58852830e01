package helm

import (
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"

	"helm.sh/helm/v3/pkg/action"
	"helm.sh/helm/v3/pkg/chartutil"
	"helm.sh/helm/v3/pkg/kube"
	"helm.sh/helm/v3/pkg/kube/fake"
	"helm.sh/helm/v3/pkg/storage"
	"helm.sh/helm/v3/pkg/storage/driver"
	"sigs.k8s.io/yaml"
)

// cluster notes the manifest that Helm has read last, and has no objects.
type cluster struct {
	fake.PrintingKubeClient
	manifest string
}

func (c *cluster) Build(r io.Reader, _ bool) (kube.ResourceList, error) {
	text, err := io.ReadAll(r)
	c.manifest = string(text)
	return nil, err
}

// What cluster DNS needs outlives the release, whoever has its objects by then. All else goes.
func TestUninstall(t *testing.T) {
	for _, c := range []struct {
		values     string
		kept, gone []string
	}{
		{
			"{podDisruptionBudget: {maxUnavailable: 1}, hpa: {enabled: true, queriesPerSecond: 1}, prometheus: {monitor: {enabled: true}, rules: {enabled: true}}}",
			[]string{"ClusterRole/system:coredns", "ClusterRoleBinding/system:coredns", "ConfigMap/coredns-optcache", "Deployment/coredns", "Service/kube-dns", "ServiceAccount/coredns"},
			[]string{"HorizontalPodAutoscaler/coredns", "PodDisruptionBudget/coredns", "PrometheusRule/coredns", "ServiceMonitor/coredns"},
		},
		{
			"{fullnameOverride: x, service: {name: dns}, serviceAccount: {create: false}, autoscaler: {enabled: true}}",
			[]string{"ClusterRole/system:x", "ClusterRoleBinding/system:x", "ConfigMap/x-optcache", "Deployment/x", "Service/dns"},
			[]string{"ClusterRole/x-autoscaler", "ClusterRoleBinding/x-autoscaler", "ConfigMap/x-autoscaler", "Deployment/x-autoscaler", "Role/x-autoscaler",
				"RoleBinding/x-autoscaler", "ServiceAccount/x-autoscaler"},
		},
		{
			"{role: nodeLocalDNS, prometheus: {monitor: {enabled: true}}}",
			nil,
			[]string{"ConfigMap/node-local-dns-optcache", "DaemonSet/node-local-dns", "Service/kube-dns-upstream", "Service/node-local-dns", "ServiceAccount/node-local-dns",
				"ServiceMonitor/node-local-dns"},
		},
	} {
		t.Run(c.values, func(t *testing.T) {
			var values map[string]any
			if err := yaml.Unmarshal([]byte(c.values), &values); err != nil {
				t.Fatal(err)
			}
			capabilities := chartutil.DefaultCapabilities.Copy()
			capabilities.KubeVersion = chartutil.KubeVersion{Version: "v1.29.0", Major: "1", Minor: "29"}
			client := &cluster{PrintingKubeClient: fake.PrintingKubeClient{Out: io.Discard, LogOutput: io.Discard}}
			helm := &action.Configuration{Releases: storage.Init(driver.NewMemory()), KubeClient: client, Capabilities: capabilities, Log: func(string, ...any) {}}
			install := action.NewInstall(helm)
			install.ReleaseName, install.Namespace, install.TakeOwnership = "dns", namespace, true
			if _, err := install.Run(load(t), values); err != nil {
				t.Fatal(err)
			}
			done, err := action.NewUninstall(helm).Run("dns")
			if err != nil {
				t.Fatal(err)
			}
			var kept, gone []string
			for line := range strings.Lines(done.Info) {
				if kind, name, is := strings.Cut(strings.TrimSpace(line), "] "); is {
					kept = append(kept, strings.TrimPrefix(kind, "[")+"/"+name)
				}
			}
			for text := range strings.SplitSeq(client.manifest, "\n---\n") {
				var o object
				if err := yaml.Unmarshal([]byte(text), &o); err != nil {
					t.Fatal(err)
				}
				if o != nil {
					gone = append(gone, fmt.Sprintf("%v/%v", at(o, "kind"), at(o, "metadata", "name")))
				}
			}
			slices.Sort(kept)
			slices.Sort(gone)
			if !slices.Equal(kept, c.kept) {
				t.Errorf("kept are %q", kept)
			}
			if !slices.Equal(gone, c.gone) {
				t.Errorf("gone are %q", gone)
			}
		})
	}
}
