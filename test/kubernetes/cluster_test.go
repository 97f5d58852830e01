package kubernetes

import (
	"errors"
	"math"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"
)

// Each step begins where the one before has ended.
func TestCluster(t *testing.T) {
	needsNode(t)
	if err := cluster.startNode(); err != nil {
		t.Fatal(err)
	}
	for _, step := range []struct {
		name string
		do   func(*testing.T)
	}{
		{"kubeadm's addon", addon},
		{"NodeLocal DNSCache", nodeLocal},
		{"rollouts of NodeLocal DNSCache", rollNodeLocal},
		{"NodeLocal DNSCache replaces one that runs as root, goes back, and comes again", nodeCache},
		{"NodeLocal DNSCache answers at the cluster IP", atClusterIP},
		{"cluster DNS replaces the addon under load", replaceAddon},
		{"servers beside each other answer the same, and show what changes", besideEachOther},
		{"caches are looked into and flushed", lookIn},
		{"pods look names up", func(t *testing.T) { looksUp(t, "tools") }},
		{"servers end", endServers},
		{"back to the addon and forth under load", backAndForth},
		{"NodeLocal DNSCache leaves the cluster IP", leaveClusterIP},
		{"rollouts of cluster DNS", rollClusterDNS},
		{"other Corefiles", changeCorefiles},
		{"a memory limit that is too small", tooSmallLimit},
		{"without an upstream and without cluster DNS", withoutServers},
		{"kube-proxy in its other mode", otherProxyMode},
		{"NodeLocal DNSCache is removed", removeNodeLocal},
		{"each command of deploy/README.md has been run", commandsAreFollowed},
	} {
		if !t.Run(step.name, step.do) {
			t.FailNow()
		}
	}
}

// addon is where everybody begins: kubeadm's own Deployment, and pods that use it.
func addon(t *testing.T) {
	addCoreDNS(t)
	eventually(t, "there is a service account for pods", time.Minute, func() error {
		return cluster.command("get", "serviceaccount", "default").Run()
	})
	pods, err := os.ReadFile("testdata/pods.yaml")
	if err != nil {
		t.Fatal(err)
	}
	apply(t, string(pods))
	rolledOut(t, "deployment/coredns")
	kubectl(t, "wait", "--for=condition=Ready", "pod", "--all", "--timeout=600s")
}

// names are what the load asks for: of the cluster, beyond it, and what no cache has: a pod's name that nobody has asked for.
var names = []string{"web.default.svc.cluster.local.", "www.example.org.", "#.default.pod.cluster.local."}

// replaceAddon does it while the node's cache has the cluster IP, as deploy/README.md says: pods do not notice how kubeadm's pods end.
func replaceAddon(t *testing.T) {
	l := startLoad(t, "tools", names...)
	follow(t, ownClusterDNS(t), ">coredns.yaml")
	applyClusterDNS(t)
	l.stop(0)
	if replicas := system(t, "get", "deployment/coredns", "-o", "jsonpath={.spec.replicas}"); replicas != "2" {
		t.Errorf("%s replicas", replicas)
	}
}

// podIP returns a pod's address in kube-system.
func podIP(t *testing.T, pod string) string {
	t.Helper()
	return system(t, "get", "pod", pod, "-o", "jsonpath={.status.podIP}")
}

// looksUp has each resolver use the search path, A and AAAA, in a pod.
func looksUp(t *testing.T, pod string) {
	t.Helper()
	want := map[string]string{
		"web": "10.96.7.7", "web.default": "10.96.7.7", "web.default.svc.cluster.local": "10.96.7.7", "kubernetes.default": "10.96.0.1",
		"db": "10.244.9.1 10.244.9.2", "db-0.db": "10.244.9.1", "ext": "192.0.2.10 2001:db8::10", "exti": "10.96.7.7",
		"www.example.org": "192.0.2.10 2001:db8::10", "nosuch": "", "nosuch.example.org": "",
	}
	var asked []string
	for name := range want {
		asked = append(asked, name)
	}
	slices.Sort(asked)
	for _, r := range resolvers {
		seen := 0
		for line := range strings.Lines(kubectl(t, append([]string{"exec", pod, "--", r}, asked...)...)) {
			name, got, _ := strings.Cut(strings.TrimSpace(line), ": ")
			expected, known := want[name]
			if failed := strings.HasPrefix(got, "failed: "); !known || failed != (expected == "") || !failed && got != expected {
				t.Errorf("%s: %s: got %q, want %q", r, name, got, expected)
			}
			seen++
		}
		if seen != len(want) {
			t.Errorf("%s: %d lines", r, seen)
		}
	}
	if got := strings.TrimSpace(kubectl(t, "exec", pod, "--", "wget", "-qO-", "http://web/")); got != "web" {
		t.Errorf("the service answers %q", got)
	}
}

// applyClusterDNS does it as deploy/README.md says.
func applyClusterDNS(t *testing.T) {
	t.Helper()
	follow(t, ownClusterDNS(t), "kubectl diff -k .")
	rolledOut(t, "deployment/coredns")
	if image := imageOf(t, "deployment/coredns"); image != documentedImage {
		t.Errorf("it runs %s", image)
	}
}

func imageOf(t *testing.T, workload string) string {
	t.Helper()
	return system(t, "get", workload, "-o", "jsonpath={.spec.template.spec.containers[0].image}")
}

// before returns a command's option for the revision before the one that runs.
func before(t *testing.T, history string) string {
	t.Helper()
	lines := strings.Split(strings.TrimSpace(history), "\n")
	if len(lines) < 4 { // two of them are the head
		t.Fatalf("no revision before:\n%s", history)
	}
	return "--to-revision=" + strings.Fields(lines[len(lines)-2])[0]
}

// backAndForth goes back in both ways that deploy/README.md has, lets kubeadm upgrade, and comes again.
func backAndForth(t *testing.T) {
	stock, err := kubeadmImage(cluster.bin)
	if err != nil {
		t.Fatal(err)
	}
	if err := kubeadmAddon(); err == nil || !strings.Contains(err.Error(), "version") {
		t.Errorf("kubeadm does not stop at our version, but says: %v", err)
	}
	l := startLoad(t, "tools", names...)
	back := func() {
		t.Helper()
		rolledOut(t, "deployment/coredns")
		if image := imageOf(t, "deployment/coredns"); image != stock {
			t.Errorf("it runs %s", image)
		}
	}
	follow(t, ownClusterDNS(t), "replace -f coredns.yaml")
	back()
	// What `kubeadm upgrade` does with CoreDNS.
	addCoreDNS(t)
	back()
	applyClusterDNS(t)
	const history = "rollout history deployment/coredns"
	follow(t, ".", history, "--to-revision=1", before(t, system(t, strings.Fields(history)...)))
	back()
	applyClusterDNS(t)
	l.stop(0)
	// A drain says what it would delete.
	drain := []string{"drain", nodeName, "--dry-run=server", "--ignore-daemonsets", "--force"}
	if out, err := cluster.command(drain...).CombinedOutput(); err == nil || !strings.Contains(string(out), "kube-system/coredns-") {
		t.Errorf("drain: %v\n%s", err, out)
	}
	kubectl(t, append(drain, "--delete-emptydir-data")...)
}

// lookIn asks the servers and flushes their caches, as deploy/README.md says.
func lookIn(t *testing.T) {
	kept := func(workload string) bool {
		return cluster.command("-n", "kube-system", "exec", workload, "--", "optcachectl", "lookup", "www.example.org", "A").Run() == nil
	}
	for _, c := range []struct{ commands, workload string }{{"exec deployment/coredns", "deployment/coredns"}, {"for label in", "daemonset/node-local-dns"}} {
		eventually(t, c.workload+" has an answer", 30*time.Second, func() error {
			for _, pod := range podsOf(t, "deployment/coredns") {
				ask(t, podIP(t, pod), "www.example.org A", "udp", false)
			}
			ask(t, localDNS, "www.example.org A", "udp", false)
			if !kept(c.workload) {
				return errors.New("it has none")
			}
			return nil
		})
		out := follow(t, ".", c.commands)
		if kept(c.workload) {
			t.Errorf("%s has kept its answer:\n%s", c.workload, out)
		}
	}
}

// nodeCacheManifests are NodeLocal DNSCache as far as a rollout is concerned: it runs as root and names its ports.
const nodeCacheManifests = `apiVersion: v1
kind: ServiceAccount
metadata: {name: node-local-dns, namespace: kube-system}
---
apiVersion: v1
kind: ConfigMap
metadata: {name: node-local-dns, namespace: kube-system}
data:
  Corefile: |
    cluster.local:53 {
        cache 30
        bind %[1]s
        forward . {$KUBE_DNS_UPSTREAM_SERVICE_HOST} {
            force_tcp
        }
    }
    .:53 {
        cache 30
        bind %[1]s
        forward . %[2]s
        prometheus :9253
        health %[1]s:8080
    }
---
apiVersion: apps/v1
kind: DaemonSet
metadata: {name: node-local-dns, namespace: kube-system, labels: {k8s-app: node-local-dns}}
spec:
  updateStrategy: {rollingUpdate: {maxUnavailable: 10%%}}
  selector: {matchLabels: {k8s-app: node-local-dns}}
  template:
    metadata: {labels: {k8s-app: node-local-dns}}
    spec:
      serviceAccountName: node-local-dns
      hostNetwork: true
      dnsPolicy: Default
      initContainers:
      - name: node
        image: %[3]s
        command: [sh, -euc, "ip link set nodelocaldns up || ip link add nodelocaldns type dummy || ip link add nodelocaldns type bridge; ip link set nodelocaldns up; ip addr replace %[1]s/32 dev nodelocaldns"]
        securityContext: {capabilities: {add: [NET_ADMIN]}}
      containers:
      - name: node-cache
        image: %[4]s
        args: ["-conf", "/etc/coredns/Corefile"]
        ports: [{containerPort: 53, protocol: UDP, name: dns}, {containerPort: 53, name: dns-tcp}, {containerPort: 9253, name: metrics}]
        securityContext: {runAsUser: 0}
        volumeMounts: [{name: config-volume, mountPath: /etc/coredns}]
        livenessProbe: {httpGet: {host: %[1]s, path: /health, port: 8080}}
        readinessProbe: {httpGet: {host: %[1]s, path: /health, port: 8080}, periodSeconds: 1}
      volumes:
      - {name: config-volume, configMap: {name: node-local-dns}}
`

// createNodeCache deletes the DaemonSet that is there, and makes node-cache's as Kubernetes' documentation says, so that kubectl apply knows nothing of it.
func createNodeCache(t *testing.T) {
	t.Helper()
	stock, err := kubeadmImage(cluster.bin)
	if err != nil {
		t.Fatal(err)
	}
	if err := cluster.write("node-cache.yaml", nodeCacheManifests, localDNS, upstreamIP, toolsImage, stock); err != nil {
		t.Fatal(err)
	}
	kubectl(t, "delete", "--ignore-not-found", "--timeout=60s", "-f", cluster.in("node-cache.yaml"))
	kubectl(t, "create", "-f", cluster.in("node-cache.yaml"))
}

// nothingOfNodeCache reports an error if the DaemonSet still has what only node-cache's has.
func nothingOfNodeCache(t *testing.T) {
	t.Helper()
	const container = ".spec.template.spec.containers[0]"
	left := system(t, "get", workloads["nodelocaldns"], "-o", "jsonpath={"+container+".ports}{"+container+".securityContext.runAsUser}{"+container+".readinessProbe.httpGet}")
	if left != "" {
		t.Errorf("node-cache has left %s", left)
	}
}

// nodeCache follows deploy/README.md from node-cache to ours and back, while pods ask that have cluster DNS as their second server.
func nodeCache(t *testing.T) {
	stock, err := kubeadmImage(cluster.bin)
	if err != nil {
		t.Fatal(err)
	}
	workload := workloads["nodelocaldns"]
	runs := func(image string) {
		t.Helper()
		rolledOut(t, workload)
		if got := imageOf(t, workload); got != image {
			t.Errorf("it runs %s", got)
		}
	}
	// Our last pod takes the interface away, and the stand-in does not make it again.
	system(t, "delete", workload)
	eventually(t, "our pod is gone", time.Minute, func() error {
		if left := system(t, "get", "pods", "-l", "k8s-app="+labels["node-local-dns"], "-o", "name"); left != "" {
			return errors.New(left)
		}
		return nil
	})
	createNodeCache(t)
	runs(stock)
	l := startLoad(t, "tools-both", names...)
	patched := patchedBase(t)
	come := func() {
		t.Helper()
		follow(t, ".", "set-last-applied")
		kubectl(t, "apply", "--validate=strict", "-k", patched)
		runs(ownImage)
		kubectl(t, "apply", "--validate=strict", "-k", base("nodelocaldns"))
		runs(ownImage)
		nothingOfNodeCache(t)
	}
	come()
	looksUp(t, "tools-local")
	// And back.
	kubectl(t, "apply", "--validate=strict", "-k", patched)
	rolledOut(t, workload)
	const history = "rollout history daemonset/node-local-dns"
	follow(t, ".", history, "--to-revision=1", before(t, system(t, strings.Fields(history)...)))
	runs(stock)
	if got := ask(t, localDNS, "www.example.org A", "udp", false); !strings.Contains(got, "192.0.2.10") {
		t.Error(got)
	}
	// A pod's resolver waits before it asks its second server.
	if sum := l.stop(math.MaxInt); sum.failed > 0 {
		t.Errorf("%d lookups have failed", sum.failed)
	}
	// And forth, where node-cache had the cluster IP and could not take its rules away.
	commands := []string{"ip addr add " + clusterDNS + "/32 dev nodelocaldns"}
	for _, ip := range []string{localDNS, clusterDNS} {
		commands = append(commands, "iptables -t raw -A PREROUTING -d "+ip+" -p udp --dport 53 -j NOTRACK", "iptables -t raw -A OUTPUT -s "+ip+" -p udp --sport 53 -j NOTRACK")
	}
	if err := runAll(commands...); err != nil {
		t.Fatal(err)
	}
	come()
	if left, err := exec.Command("iptables", "-t", "raw", "-S").CombinedOutput(); err != nil || strings.Contains(string(left), "/32") {
		t.Errorf("node-cache has left %v\n%s", err, left)
	}
	looksUp(t, "tools")
}

func nodeLocal(t *testing.T) {
	kubectl(t, "apply", "--validate=strict", "-k", base("nodelocaldns"))
	rolledOut(t, "daemonset/node-local-dns")
	looksUp(t, "tools-local")
}
