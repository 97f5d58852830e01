package kubernetes

import (
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"
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
		{"cluster DNS and stock answer the same", sameAnswers},
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

// stockPod is CoreDNS as kubeadm sets it up, beside cluster DNS.
const stockPod = `apiVersion: v1
kind: Pod
metadata: {name: stock, namespace: kube-system}
spec:
  serviceAccountName: coredns
  dnsPolicy: Default
  terminationGracePeriodSeconds: 0
  containers:
  - name: coredns
    image: %s
    args: ["-conf", "/etc/coredns/Corefile"]
    readinessProbe: {httpGet: {path: /ready, port: 8181}, periodSeconds: 1}
    volumeMounts: [{name: config-volume, mountPath: /etc/coredns}]
  volumes:
  - {name: config-volume, configMap: {name: coredns}}
`

// podIP returns a pod's address in kube-system.
func podIP(t *testing.T, pod string) string {
	t.Helper()
	return system(t, "get", "pod", pod, "-o", "jsonpath={.status.podIP}")
}

// sameAnswers asks both, and compares all but the TTLs of what the upstream has said, and letters: owner names that are the
// qname have the client's in ours, and the first client's in stock's. NS is not asked for: stock is behind no service here.
func sameAnswers(t *testing.T) {
	stock, err := kubeadmImage(cluster.bin)
	if err != nil {
		t.Fatal(err)
	}
	apply(t, fmt.Sprintf(stockPod, stock))
	system(t, "wait", "--for=condition=Ready", "pod/stock", "--timeout=600s")
	defer system(t, "delete", "pod/stock")
	a, b := podIP(t, "stock"), podIP(t, podsOf(t, "deployment/coredns")[0])
	web := kubectl(t, "get", "pod", "web", "-o", "jsonpath={.status.podIP}")
	questions := []string{
		"web.default.svc.cluster.local A", "web.default.svc.cluster.local AAAA", "web.default.svc.cluster.local ANY",
		"_http._tcp.web.default.svc.cluster.local SRV", "7.7.96.10.in-addr.arpa PTR", "kubernetes.default.svc.cluster.local A",
		"db.default.svc.cluster.local A", "db.default.svc.cluster.local AAAA", "db-0.db.default.svc.cluster.local A", "db-2.db.default.svc.cluster.local A",
		"_pg._tcp.db.default.svc.cluster.local SRV", "1.9.244.10.in-addr.arpa PTR",
		"ext.default.svc.cluster.local A", "ext.default.svc.cluster.local AAAA", "ext.default.svc.cluster.local CNAME", "exti.default.svc.cluster.local A",
		"nosuch.default.svc.cluster.local A", "nosuch.default.svc.cluster.local AAAA", "nosuch.nosuch.svc.cluster.local A", "default.svc.cluster.local A",
		"cluster.local SOA", "dns-version.cluster.local TXT", strings.ReplaceAll(web, ".", "-") + ".default.pod.cluster.local A",
		"www.example.org A", "www.example.org AAAA", "www.example.org MX", "WWW.Example.ORG A", "nosuch.example.org A", "example.org NS", "example.org SOA",
		"web A", "web.default A", "1.2.0.192.in-addr.arpa PTR",
	}
	positive := 0
	for _, q := range questions {
		for _, transport := range []string{"udp", "tcp"} {
			for _, edns := range []bool{false, true} {
				for range 2 { // the second is a hit
					first, second := ask(t, a, q, transport, edns), ask(t, b, q, transport, edns)
					if !strings.EqualFold(first, second) {
						t.Errorf("%s by %s, EDNS %v: stock:\n%s\noptcache:\n%s", q, transport, edns, first, second)
					}
					if strings.Contains(first, "NOERROR") && strings.Contains(first, "answer ") {
						positive++
					}
				}
			}
		}
	}
	if positive < 100 {
		t.Errorf("%d answers have records", positive)
	}
	if got := ask(t, b, "WWW.Example.ORG A", "udp", false); !strings.Contains(got, "WWW.Example.ORG.") {
		t.Errorf("the client's letters: %s", got)
	}
}

// ask returns a reply as text that can be compared. Where the upstream has said some of it, there are no TTLs: the rest of the
// reply has no longer ones.
func ask(t *testing.T, ip, question, transport string, edns bool) string {
	t.Helper()
	name, qtype, _ := strings.Cut(question, " ")
	m := new(dns.Msg).SetQuestion(dns.Fqdn(name), dns.StringToType[qtype])
	if edns {
		m.SetEdns0(1232, true)
	}
	c := dns.Client{Net: transport, Timeout: 5 * time.Second}
	r, _, err := c.Exchange(m, net.JoinHostPort(ip, "53"))
	if err != nil {
		t.Fatalf("%s at %s: %v", question, ip, err)
	}
	lines := []string{fmt.Sprintf("%s aa %v tc %v ra %v ad %v cd %v", dns.RcodeToString[r.Rcode], r.Authoritative, r.Truncated, r.RecursionAvailable, r.AuthenticatedData, r.CheckingDisabled)}
	sections := [][]dns.RR{r.Answer, r.Ns, r.Extra}
	upstream := slices.ContainsFunc(slices.Concat(sections...), func(rr dns.RR) bool {
		return rr.Header().Rrtype != dns.TypeOPT && !strings.HasSuffix(rr.Header().Name, "cluster.local.")
	})
	for i, section := range sections {
		var records []string
		for _, rr := range section {
			if soa, ok := rr.(*dns.SOA); ok && strings.HasSuffix(soa.Hdr.Name, "cluster.local.") {
				soa.Serial = 0 // a time
			}
			if upstream && rr.Header().Rrtype != dns.TypeOPT {
				rr.Header().Ttl = 0
			}
			records = append(records, []string{"answer ", "authority ", "additional "}[i]+rr.String())
		}
		slices.Sort(records)
		lines = append(lines, records...)
	}
	return strings.Join(lines, "\n")
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

// nodeCache follows deploy/README.md from node-cache to ours and back. Pods have no other server meanwhile, so nobody asks.
func nodeCache(t *testing.T) {
	stock, err := kubeadmImage(cluster.bin)
	if err != nil {
		t.Fatal(err)
	}
	apply(t, fmt.Sprintf(nodeCacheManifests, localDNS, upstreamIP, toolsImage, stock))
	workload := workloads["nodelocaldns"]
	rolledOut(t, workload)
	patched := patchedBase(t)
	kubectl(t, "apply", "--validate=strict", "-k", patched)
	rolledOut(t, workload)
	if got := imageOf(t, workload); got != ownImage {
		t.Errorf("it runs %s", got)
	}
	kubectl(t, "apply", "--validate=strict", "-k", base("nodelocaldns"))
	looksUp(t, "tools-local")
	// And back.
	kubectl(t, "apply", "--validate=strict", "-k", patched)
	rolledOut(t, workload)
	const history = "rollout history daemonset/node-local-dns"
	follow(t, ".", history, "--to-revision=1", before(t, system(t, strings.Fields(history)...)))
	rolledOut(t, workload)
	if got := imageOf(t, workload); got != stock {
		t.Errorf("it runs %s", got)
	}
	if got := ask(t, localDNS, "www.example.org A", "udp", false); !strings.Contains(got, "192.0.2.10") {
		t.Error(got)
	}
	// And forth. After an undo, apply alone would leave what only node-cache has.
	follow(t, ".", "rollout status daemonset/node-local-dns")
	rolledOut(t, workload)
	kubectl(t, "apply", "--validate=strict", "-k", base("nodelocaldns"))
	rolledOut(t, workload)
	if got := imageOf(t, workload); got != ownImage {
		t.Errorf("it runs %s", got)
	}
	if left := system(t, "get", workload, "-o", "jsonpath={.spec.template.spec.containers[0].ports}{.spec.template.spec.containers[0].securityContext.runAsUser}"); left != "" {
		t.Errorf("node-cache has left %s", left)
	}
}

func nodeLocal(t *testing.T) {
	kubectl(t, "apply", "--validate=strict", "-k", base("nodelocaldns"))
	rolledOut(t, "daemonset/node-local-dns")
	looksUp(t, "tools-local")
}
