package helm

import (
	"encoding/json"
	"errors"
	"io"
	"log"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"helm.sh/helm/v3/pkg/chart"
	"helm.sh/helm/v3/pkg/chart/loader"
	"helm.sh/helm/v3/pkg/chartutil"
	"helm.sh/helm/v3/pkg/engine"
	"helm.sh/helm/v3/pkg/lint"
	"helm.sh/helm/v3/pkg/lint/support"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	utilyaml "k8s.io/apimachinery/pkg/util/yaml"
	"k8s.io/client-go/kubernetes/scheme"
	"sigs.k8s.io/yaml"
)

const (
	chartDir  = "../../deploy/helm/coredns-optcache"
	bases     = "../../deploy/kubernetes"
	namespace = "kube-system"
	policy    = "helm.sh/resource-policy"
)

// object is an object as JSON has it.
type object = map[string]any

// at returns what is at a path of keys and indexes below a value, or nil.
func at(v any, path ...any) any {
	for _, p := range path {
		switch p := p.(type) {
		case string:
			m, _ := v.(map[string]any)
			v = m[p]
		case int:
			l, _ := v.([]any)
			if p >= len(l) {
				return nil
			}
			v = l[p]
		}
	}
	return v
}

// load reads the chart, whose links into deploy/ Helm notes each time.
func load(t *testing.T) *chart.Chart {
	t.Helper()
	log.SetOutput(io.Discard)
	c, err := loader.LoadDir(chartDir)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// templates returns what Helm makes of the chart with these values, by template.
func templates(t *testing.T, values string) (map[string]string, error) {
	t.Helper()
	c := load(t)
	var given map[string]any
	if err := yaml.Unmarshal([]byte(values), &given); err != nil {
		t.Fatal(err)
	}
	options := chartutil.ReleaseOptions{Name: "dns", Namespace: namespace, Revision: 1, IsInstall: true}
	all, err := chartutil.ToRenderValues(c, given, options, chartutil.DefaultCapabilities.Copy())
	if err != nil {
		return nil, err
	}
	return engine.Engine{}.Render(c, all)
}

// render returns the objects by kind and name. Unknown fields are errors, but for kinds of Prometheus Operator.
func render(t *testing.T, values string) map[string]object {
	t.Helper()
	all, err := templates(t, values)
	if err != nil {
		t.Fatal(err)
	}
	objects := map[string]object{}
	for name, text := range all {
		if filepath.Ext(name) == ".yaml" {
			decode(t, name, text, objects)
		}
	}
	return objects
}

// decode adds the objects of a stream of YAML documents.
func decode(t *testing.T, name, text string, to map[string]object) {
	t.Helper()
	decoder := serializer.NewCodecFactory(scheme.Scheme, serializer.EnableStrict).UniversalDeserializer()
	docs := utilyaml.NewDocumentDecoder(io.NopCloser(strings.NewReader(text)))
	defer docs.Close()
	for buf := make([]byte, 1<<20); ; {
		n, err := docs.Read(buf)
		if errors.Is(err, io.EOF) {
			return
		}
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		doc := buf[:n]
		var plain any
		if err := yaml.Unmarshal(doc, &plain); err != nil {
			t.Fatalf("%s: %v\n%s", name, err, doc)
		}
		if plain == nil {
			continue
		}
		var o runtime.Object
		if strings.HasPrefix(at(plain, "apiVersion").(string), "monitoring.coreos.com/") {
			u := &unstructured.Unstructured{}
			err = yaml.UnmarshalStrict(doc, &u.Object)
			o = u
		} else {
			o, _, err = decoder.Decode(doc, nil, nil)
		}
		if err != nil {
			t.Fatalf("%s: %v\n%s", name, err, doc)
		}
		m, err := meta.Accessor(o)
		if err != nil {
			t.Fatal(err)
		}
		text, err := json.Marshal(o)
		if err != nil {
			t.Fatal(err)
		}
		var made object
		if err := json.Unmarshal(text, &made); err != nil {
			t.Fatal(err)
		}
		key := at(made, "kind").(string) + "/" + m.GetName()
		if to[key] != nil {
			t.Errorf("%s: %s is there twice", name, key)
		}
		to[key] = made
	}
}

// Without values, the chart has the objects of deploy/kubernetes, but for its labels, and that those of cluster DNS outlive it.
func TestDefaultsAreTheKustomizations(t *testing.T) {
	for role, base := range map[string]string{"clusterDNS": "cluster-dns", "nodeLocalDNS": "nodelocaldns"} {
		t.Run(role, func(t *testing.T) {
			want := map[string]object{}
			files, err := filepath.Glob(filepath.Join(bases, base, "*.yaml"))
			if err != nil || len(files) < 4 {
				t.Fatalf("%v, %v", files, err)
			}
			for _, file := range files {
				if filepath.Base(file) == "kustomization.yaml" {
					continue
				}
				text, err := os.ReadFile(file)
				if err != nil {
					t.Fatal(err)
				}
				decode(t, file, string(text), want)
			}
			got := render(t, "role: "+role)
			for key, o := range got {
				annotations, _ := at(o, "metadata", "annotations").(map[string]any)
				delete(annotations, policy)
				if len(annotations) == 0 {
					delete(o["metadata"].(map[string]any), "annotations")
				}
				labels, _ := at(o, "metadata", "labels").(map[string]any)
				for label := range labels {
					if strings.HasPrefix(label, "app.kubernetes.io/") || label == "helm.sh/chart" {
						delete(labels, label)
					}
				}
				if len(labels) == 0 {
					delete(o["metadata"].(map[string]any), "labels")
				}
				text := mustJSON(t, o)
				text = strings.ReplaceAll(text, `"localhost/coredns-optcache:latest"`, `"coredns-optcache"`)
				if expected := mustJSON(t, want[key]); text != expected {
					t.Errorf("%s is\n%s\nand in deploy/kubernetes\n%s", key, text, expected)
				}
				delete(want, key)
			}
			for key := range want {
				t.Errorf("no %s", key)
			}
		})
	}
}

func mustJSON(t *testing.T, v any) string {
	t.Helper()
	text, err := json.MarshalIndent(v, "", " ")
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// Each value does what it says.
func TestValuesReachTheObjects(t *testing.T) {
	const deployment, daemonset = "Deployment/coredns", "DaemonSet/node-local-dns"
	pod := func(path ...any) []any { return append([]any{"spec", "template", "spec"}, path...) }
	container := func(path ...any) []any { return append(pod("containers", 0), path...) }
	for _, c := range []struct {
		values string
		object string
		path   []any
		want   string // as JSON
	}{
		{"replicaCount: 3", deployment, []any{"spec", "replicas"}, `3`},
		{"replicaCount: 0", deployment, []any{"spec", "replicas"}, `0`},
		{"image: {repository: r.example/d, tag: '1.2'}", deployment, container("image"), `"r.example/d:1.2"`},
		{"image: {digest: 'sha256:" + strings.Repeat("a", 64) + "'}", deployment, container("image"), `"localhost/coredns-optcache@sha256:` + strings.Repeat("a", 64) + `"`},
		{"image: {pullPolicy: Always, pullSecrets: [s]}", deployment, container("imagePullPolicy"), `"Always"`},
		{"image: {pullSecrets: [s]}", deployment, pod("imagePullSecrets"), `[{"name":"s"}]`},
		{"resources: {limits: {memory: 1Gi}}", deployment, container("resources"), `{"limits":{"memory":"1Gi"}}`},
		{"env: [{name: A, value: b}]", deployment, container("env"), `[{"name":"A","value":"b"}]`},
		{"podLabels: {a: b}", deployment, []any{"spec", "template", "metadata", "labels"}, `{"a":"b","k8s-app":"kube-dns"}`},
		{"podAnnotations: {a: b}", deployment, []any{"spec", "template", "metadata", "annotations", "a"}, `"b"`},
		{"priorityClassName: p", deployment, pod("priorityClassName"), `"p"`},
		{"terminationGracePeriodSeconds: 60", deployment, pod("terminationGracePeriodSeconds"), `60`},
		{"rollingUpdate: {maxUnavailable: 0, maxSurge: 25%}", deployment, []any{"spec", "strategy", "rollingUpdate"}, `{"maxSurge":"25%","maxUnavailable":0}`},
		{"{role: nodeLocalDNS, rollingUpdate: {maxUnavailable: 1}}", daemonset, []any{"spec", "updateStrategy", "rollingUpdate"}, `{"maxUnavailable":1}`},
		{"nodeSelector: {a: b}", deployment, pod("nodeSelector"), `{"a":"b"}`},
		{"tolerations: [{operator: Exists}]", deployment, pod("tolerations"), `[{"operator":"Exists"}]`},
		{"affinity: {nodeAffinity: {}}", deployment, pod("affinity"), `{"nodeAffinity":{}}`},
		{"topologySpreadConstraints: [{maxSkew: 1, topologyKey: zone, whenUnsatisfiable: DoNotSchedule}]", deployment, pod("topologySpreadConstraints", 0, "topologyKey"), `"zone"`},
		{"{extraVolumes: [{name: x, emptyDir: {}}], extraVolumeMounts: [{name: x, mountPath: /x}]}", deployment, container("volumeMounts", 3, "mountPath"), `"/x"`},
		{"snapshot: {sizeLimit: 1Gi}", deployment, pod("volumes", 1, "emptyDir", "sizeLimit"), `"1Gi"`},
		{"fullnameOverride: other", "ConfigMap/other-optcache", []any{"kind"}, `"ConfigMap"`},
		{"fullnameOverride: other", "Deployment/other", pod("volumes", 0, "configMap", "name"), `"other-optcache"`},
		{"fullnameOverride: other", "ClusterRoleBinding/system:other", []any{"subjects"}, `[{"kind":"ServiceAccount","name":"other","namespace":"kube-system"}]`},
		{"k8sAppLabelOverride: own", "Service/kube-dns", []any{"spec", "selector"}, `{"k8s-app":"own"}`},
		{"k8sAppLabelOverride: own", deployment, []any{"spec", "selector", "matchLabels"}, `{"k8s-app":"own"}`},
		{"customLabels: {team: dns}", "ServiceAccount/coredns", []any{"metadata", "labels", "team"}, `"dns"`},
		{"customAnnotations: {a: b}", "ConfigMap/coredns-optcache", []any{"metadata", "annotations"}, `{"a":"b","helm.sh/resource-policy":"keep"}`},
		{"{role: nodeLocalDNS, customAnnotations: {a: b}}", "ConfigMap/node-local-dns-optcache", []any{"metadata", "annotations"}, `{"a":"b"}`},
		{"serviceAccount: {name: sa, annotations: {a: b}}", "ServiceAccount/sa", []any{"metadata", "annotations"}, `{"a":"b","helm.sh/resource-policy":"keep"}`},
		{"service: {annotations: {helm.sh/resource-policy: other}}", "Service/kube-dns", []any{"metadata", "annotations", policy}, `"keep"`},
		{"serviceAccount: {name: sa, create: false}", deployment, pod("serviceAccountName"), `"sa"`},
		{"serviceAccount: {create: false}", "ServiceAccount/coredns", nil, `null`},
		{"rbac: {create: false}", "ClusterRole/system:coredns", nil, `null`},
		{"service: {clusterIP: 172.20.0.10}", "Service/kube-dns", []any{"spec", "clusterIP"}, `"172.20.0.10"`},
		{"service: {clusterIP: ''}", "Service/kube-dns", []any{"spec", "clusterIP"}, `null`},
		{"service: {name: dns, annotations: {a: b}}", "Service/dns", []any{"metadata", "annotations", "a"}, `"b"`},
		{"podDisruptionBudget: {maxUnavailable: 1}", "PodDisruptionBudget/coredns", []any{"spec"}, `{"maxUnavailable":1,"selector":{"matchLabels":{"k8s-app":"kube-dns"}}}`},
		{"hpa: {enabled: true, queriesPerSecond: 20000}", "HorizontalPodAutoscaler/coredns", []any{"spec", "metrics", 0, "pods"},
			`{"metric":{"name":"coredns_dns_requests_per_second"},"target":{"averageValue":"20k","type":"AverageValue"}}`},
		{"hpa: {enabled: true, queriesPerSecond: 1}", deployment, []any{"spec", "replicas"}, `null`},
		{"autoscaler: {enabled: true, max: 9}", "ConfigMap/coredns-autoscaler", []any{"data", "linear"},
			`"{\"coresPerReplica\":256,\"includeUnschedulableNodes\":false,\"max\":9,\"min\":2,\"nodesPerReplica\":16,\"preventSinglePointFailure\":true}"`},
		{"autoscaler: {enabled: true}", "Role/coredns-autoscaler", []any{"rules", 0, "resourceNames"}, `["coredns"]`},
		{"autoscaler: {enabled: true}", "ClusterRole/coredns-autoscaler", []any{"metadata", "namespace"}, `null`},
		{"prometheus: {monitor: {enabled: true, interval: 30s, additionalLabels: {release: p}}}", "ServiceMonitor/coredns", []any{"spec", "endpoints"}, `[{"interval":"30s","port":"metrics"}]`},
		{"prometheus: {monitor: {enabled: true, additionalLabels: {release: p}}}", "ServiceMonitor/coredns", []any{"metadata", "labels", "release"}, `"p"`},
		{"prometheus: {monitor: {enabled: true, kind: PodMonitor}}", "PodMonitor/coredns", []any{"spec", "podMetricsEndpoints"}, `[{"port":"metrics"}]`},
		{"{role: nodeLocalDNS, prometheus: {monitor: {enabled: true}}}", "ServiceMonitor/node-local-dns", []any{"spec", "selector"}, `{"matchLabels":{"k8s-app":"node-local-dns"}}`},
		{"prometheus: {rules: {enabled: true}}", "PrometheusRule/coredns", []any{"spec", "groups", 0, "name"}, `"optcache"`},
		{"{role: nodeLocalDNS, nodeLocal: {address: 169.254.25.10}}", daemonset, pod("initContainers", 1, "command", 1), `"-localip=169.254.25.10"`},
		{"{role: nodeLocalDNS, nodeLocal: {clusterIP: '10.96.0.10,fd00::a'}}", daemonset, pod("initContainers", 0, "command", 1), `"-localip=169.254.20.10,10.96.0.10,fd00::a"`},
		{"{role: nodeLocalDNS, nodeLocal: {clusterIP: 10.96.0.10}}", daemonset, pod("initContainers", 1, "command", 1), `"-localip=169.254.20.10,10.96.0.10"`},
		{"{role: nodeLocalDNS, fullnameOverride: other}", "DaemonSet/other", pod("volumes", 0, "configMap", "name"), `"other-optcache"`},
		{"{role: nodeLocalDNS, fullnameOverride: other}", "DaemonSet/other", pod("volumes", 1, "configMap", "name"), `"kube-dns"`},
	} {
		t.Run(c.values, func(t *testing.T) {
			o, there := render(t, c.values)[c.object]
			if !there && c.want != "null" {
				t.Fatalf("no %s", c.object)
			}
			got, err := json.Marshal(at(o, c.path...))
			if err != nil {
				t.Fatal(err)
			}
			if there && c.path == nil || string(got) != c.want {
				t.Errorf("%s %v is %s, not %s", c.object, c.path, got, c.want)
			}
		})
	}
}

// What the chart's values say about the address and the domain is everywhere in what it makes.
func TestAddressAndDomainAreReplaced(t *testing.T) {
	for role, old := range map[string][]string{"clusterDNS": {"cluster.local"}, "nodeLocalDNS": {"cluster.local", "169.254.20.10"}} {
		text := mustJSON(t, render(t, "{role: "+role+", clusterDomain: k8s.example, nodeLocal: {address: 169.254.25.10}}"))
		for _, word := range old {
			if strings.Contains(text, word) {
				t.Errorf("%s: %s is still there", role, word)
			}
		}
		if !strings.Contains(text, "k8s.example") {
			t.Errorf("%s: no k8s.example", role)
		}
	}
}

// servers are written as the official chart does.
func TestServers(t *testing.T) {
	objects := render(t, `
servers:
- zones:
  - zone: .
    scheme: dns://
    use_tcp: true
  port: 5353
  servicePort: 53
  plugins:
  - name: errors
  - name: health
    configBlock: |-
      lameduck 10s
  - name: forward
    parameters: . /etc/resolv.conf
  - name: prometheus
    parameters: 0.0.0.0:9153
- zones:
  - zone: example.org
    scheme: tls://
  port: 853
  plugins:
  - name: optcache
    parameters: 30
extraServers: |
  corp.example:5353 {
      forward . 192.0.2.1
  }
`)
	const want = `dns://.:5353 {
    errors
    health {
        lameduck 10s
    }
    forward . /etc/resolv.conf
    prometheus 0.0.0.0:9153
}

tls://example.org:853 {
    optcache 30
}

corp.example:5353 {
    forward . 192.0.2.1
}
`
	if got := at(objects["ConfigMap/coredns-optcache"], "data", "Corefile"); got != want {
		t.Errorf("the Corefile is\n%s", got)
	}
	service, _ := json.Marshal(at(objects["Service/kube-dns"], "spec", "ports"))
	if want := `[{"name":"udp-5353","port":53,"protocol":"UDP","targetPort":5353},{"name":"tcp-5353","port":53,"protocol":"TCP","targetPort":5353},` +
		`{"name":"tcp-853","port":853,"protocol":"TCP","targetPort":853},{"name":"metrics","port":9153,"protocol":"TCP","targetPort":9153}]`; string(service) != want {
		t.Errorf("the service's ports are %s", service)
	}
	container, _ := json.Marshal(at(objects["Deployment/coredns"], "spec", "template", "spec", "containers", 0, "ports", 0))
	if want := `{"containerPort":5353,"name":"udp-5353","protocol":"UDP"}`; string(container) != want {
		t.Errorf("the container's first port is %s", container)
	}
}

// A wrong value is refused, and the error says where it is.
func TestWrongValuesAreRefused(t *testing.T) {
	for values, want := range map[string]string{
		"role: both":                                                  "/role",
		"replicas: 2":                                                 "'replicas' not allowed",
		"replicaCount: two":                                           "/replicaCount",
		"replicaCount: -1":                                            "/replicaCount",
		"image: {tag: 1.2}":                                           "/image/tag",
		"image: {digest: 'sha256:1'}":                                 "/image/digest",
		"image: {pullPolicy: Sometimes}":                              "/image/pullPolicy",
		"resources: {limits: {memory: 1 GB}}":                         "/resources/limits/memory",
		"resources: {limit: {memory: 1G}}":                            "'limit' not allowed",
		"service: {clusterIP: kube-dns}":                              "/service/clusterIP",
		"nodeLocal: {address: 'fd00::1'}":                             "/nodeLocal/address",
		"servers: [{port: 53, plugins: []}]":                          "/servers/0/plugins",
		"servers: [{port: 99999, plugins: [{name: errors}]}]":         "/servers/0/port",
		"servers: [{port: 53, plugins: [{name: errors, config: x}]}]": "/servers/0/plugins/0",
		"servers: [{port: 53, zones: [{scheme: 'udp://'}], plugins: [{name: errors}]}]":               "/servers/0/zones/0/scheme",
		"podDisruptionBudget: {minAvailable: 1, maxUnavailable: 1}":                                   "/podDisruptionBudget",
		"service: {clusterIP: 10.96.0.300}":                                                           "/service/clusterIP",
		"nodeLocal: {address: 169.254.20.1000}":                                                       "/nodeLocal/address",
		"nodeLocal: {clusterIP: '10.96.0.10,10.96.0.11,::1'}":                                         "/nodeLocal/clusterIP",
		"clusterDomain: cluster..local":                                                               "/clusterDomain",
		"image: {repository: 'registry.example.org/dns optcache'}":                                    "/image/repository",
		"image: {repository: registry.example.org/DNS}":                                               "/image/repository",
		"image: {repository: 'registry.example.org:5000'}":                                            "/image/repository",
		"image: {tag: 'v1:2'}":                                                                        "/image/tag",
		"customLabels: {team: 'of the network'}":                                                      "/customLabels/team",
		"nodeSelector: {disk: true}":                                                                  "/nodeSelector/disk",
		"rollingUpdate: {maxUnavailable: 150%}":                                                       "/rollingUpdate/maxUnavailable",
		"env: [{value: x}]":                                                                           "/env/0",
		"extraVolumes: [{emptyDir: {}}]":                                                              "/extraVolumes/0",
		"extraVolumeMounts: [{name: a}]":                                                              "/extraVolumeMounts/0",
		"topologySpreadConstraints: [{maxSkew: 0, topologyKey: a, whenUnsatisfiable: DoNotSchedule}]": "/topologySpreadConstraints/0/maxSkew",
		"tolerations: [{effect: NoScheduling}]":                                                       "/tolerations/0/effect",
		"priorityClassName: Very High":                                                                "/priorityClassName",
		"servers: {port: 53}":                                                                         "/servers",
		"hpa: {enabled: true, queriesPerSecond: 1, minReplicas: 5, maxReplicas: 3}":                   "hpa.minReplicas",
		"autoscaler: {enabled: true, min: 5, max: 3}":                                                 "autoscaler.min",
		"podLabels: {a: 1}":                                                                           "/podLabels/a",
		"prometheus: {monitor: {enabled: 'yes'}}":                                                     "/prometheus/monitor/enabled",
		"prometheus: {monitor: {interval: 30}}":                                                       "/prometheus/monitor/interval",
		"hpa: {enabled: true}":                                                                        "hpa.queriesPerSecond or hpa.metrics",
		"{hpa: {enabled: true, queriesPerSecond: 1}, replicaCount: 2}":                                "replicaCount",
		"{hpa: {enabled: true, queriesPerSecond: 1}, autoscaler: {enabled: true}}":                    "autoscaler.enabled",
		"{hpa: {enabled: true, queriesPerSecond: 1}, role: nodeLocalDNS}":                             "hpa.enabled",
		"{prometheus: {monitor: {enabled: true, kind: PodMonitor}}, role: nodeLocalDNS}":              "prometheus.monitor.kind",
		"{autoscaler: {enabled: true}, role: nodeLocalDNS}":                                           "autoscaler.enabled",
	} {
		if _, err := templates(t, values); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v; no %s", values, err, want)
		}
	}
}

// Every value of values.yaml is in the schema, and the schema has no other.
func TestSchemaIsTheValues(t *testing.T) {
	c := load(t)
	var schema map[string]any
	if err := json.Unmarshal(c.Schema, &schema); err != nil {
		t.Fatal(err)
	}
	var compare func(path string, values map[string]any, schema map[string]any)
	compare = func(path string, values, schema map[string]any) {
		properties, _ := schema["properties"].(map[string]any)
		if len(values) == 0 || properties == nil {
			return
		}
		for key, v := range values {
			p, there := properties[key].(map[string]any)
			if !there {
				t.Errorf("the schema has no %s%s", path, key)
			}
			if m, ok := v.(map[string]any); ok {
				compare(path+key+".", m, p)
			}
		}
		for key := range properties {
			if _, there := values[key]; !there && path+key != "global" && !strings.HasSuffix(path, "resources.") {
				t.Errorf("values.yaml has no %s%s", path, key)
			}
		}
	}
	compare("", c.Values, schema)
}

func TestLint(t *testing.T) {
	for _, values := range []map[string]any{nil, {"role": "nodeLocalDNS"}} {
		linted := lint.All(chartDir, values, namespace, true)
		for _, m := range linted.Messages {
			if m.Severity > support.InfoSev {
				t.Errorf("%v", m)
			}
		}
	}
}

// The notes name the workload that is there.
func TestNotes(t *testing.T) {
	for values, want := range map[string][]string{
		"{}":                                  {"exec deployment/coredns -c coredns -- optcachectl status", "WARNING: image.repository"},
		"role: nodeLocalDNS":                  {"exec daemonset/node-local-dns -c node-cache -- optcachectl status", "clusterDNS: [169.254.20.10"},
		"service: {name: dns, clusterIP: ''}": {"get service dns"},
		"fullnameOverride: x":                 {"rollout status deployment/x"},
		"servers: [{port: 53, plugins: [{name: errors}]}]": {"made of servers"},
	} {
		all, err := templates(t, values)
		if err != nil {
			t.Fatal(err)
		}
		notes := all["coredns-optcache/templates/NOTES.txt"]
		for _, w := range want {
			if !strings.Contains(notes, w) {
				t.Errorf("%s: no %q in\n%s", values, w, notes)
			}
		}
	}
	all, err := templates(t, "image: {repository: r.example/d}")
	if err != nil || strings.Contains(all["coredns-optcache/templates/NOTES.txt"], "WARNING") {
		t.Errorf("%v: a warning for an image of a registry", err)
	}
}
