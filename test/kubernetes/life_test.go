package kubernetes

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// This file is what happens to servers that run: other Corefiles, ends, and rollouts.

// rollouts is how many there are of each workload.
func rollouts(t *testing.T) int {
	t.Helper()
	text, set := os.LookupEnv("OPTCACHE_KUBERNETES_ROLLOUTS")
	if !set {
		return 3
	}
	n, err := strconv.Atoi(text)
	if err != nil || n < 1 {
		t.Fatalf("OPTCACHE_KUBERNETES_ROLLOUTS is %q", text)
	}
	return n
}

// configMaps are those of the workloads, and where their servers are asked.
var configMaps = map[string]string{"coredns-optcache": clusterDNS, "node-local-dns-optcache": localDNS}

// changeCorefiles adds a block while pods ask, and takes it away. Servers take it without a restart.
func changeCorefiles(t *testing.T) {
	loads := []*load{startLoad(t, "tools", names...), startLoad(t, "tools-local", names...)}
	before := restarts(t)
	// What node-cache and kube-dns read there becomes blocks, too.
	apply(t, fmt.Sprintf(kubeDNSConfigMap, upstreamIP))
	defer system(t, "delete", "configmap", "kube-dns")
	for name := range configMaps {
		var bind string
		if configMaps[name] == localDNS {
			bind = "bind " + localDNS
		}
		old := system(t, "get", "configmap", name, "-o", "jsonpath={.data.Corefile}")
		patch, err := json.Marshal(map[string]any{"data": map[string]string{"Corefile": old +
			"\nlife.test:53 {\n" + bind + "\ntemplate IN A {\nanswer \"{{ .Name }} 5 IN A 192.0.2.77\"\n}\n}\n"}})
		if err != nil {
			t.Fatal(err)
		}
		system(t, "patch", "configmap", name, "--type=merge", "-p", string(patch))
	}
	for name, ip := range configMaps {
		// Each of the pods behind the address has to have it.
		for range 20 {
			eventually(t, name+" has the new block", 3*time.Minute, func() error {
				if got := ask(t, ip, "x.life.test A", "udp", false); !strings.Contains(got, "192.0.2.77") {
					return fmt.Errorf("%s", got)
				}
				return nil
			})
		}
	}
	eventually(t, "NodeLocal DNSCache has the stub domain", 3*time.Minute, func() error {
		if got := ask(t, localDNS, "x.stub.test A", "udp", false); !strings.Contains(got, "192.0.2.88") {
			return fmt.Errorf("%s", got)
		}
		return nil
	})
	for name, workload := range workloads {
		for _, pod := range podsOf(t, workload) {
			eventually(t, name+": "+pod+" has kept its answers", 30*time.Second, func() error {
				if log := system(t, "logs", pod); !strings.Contains(log, "The reload has kept") {
					return errors.New(log)
				}
				return nil
			})
		}
		kubectl(t, "apply", "--validate=strict", "-k", map[string]string{"cluster-dns": ownClusterDNS(t), "nodelocaldns": base(name)}[name])
	}
	if after := restarts(t); after != before {
		t.Errorf("restarts before: %s, and after: %s", before, after)
	}
	for _, l := range loads {
		l.stop(0)
	}
}

const kubeDNSConfigMap = `apiVersion: v1
kind: ConfigMap
metadata: {name: kube-dns, namespace: kube-system}
data:
  stubDomains: '{"stub.test": ["%[1]s:5353"]}'
  upstreamNameservers: '["%[1]s"]'
`

// restarts are those of all pods.
func restarts(t *testing.T) string {
	t.Helper()
	return system(t, "get", "pods", "-o", `jsonpath={range .items[*]}{.metadata.name}={.status.containerStatuses[*].restartCount} {end}`)
}

// processOf returns the process of a pod's server.
func processOf(t *testing.T, pod string) int {
	t.Helper()
	uid := system(t, "get", "pod", pod, "-o", "jsonpath={.metadata.uid}")
	all, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range all {
		line, _ := os.ReadFile(file)
		group, _ := os.ReadFile(filepath.Join(filepath.Dir(file), "cgroup"))
		if bytes.HasPrefix(line, []byte("/coredns\x00")) && bytes.Contains(group, []byte(uid)) {
			pid, err := strconv.Atoi(filepath.Base(filepath.Dir(file)))
			if err != nil {
				t.Fatal(err)
			}
			return pid
		}
	}
	t.Fatalf("%s has no process", pod)
	return 0
}

func sendSignal(t *testing.T, pid int, signal syscall.Signal) {
	t.Helper()
	if err := syscall.Kill(pid, signal); err != nil {
		t.Fatal(err)
	}
}

// endServers ends a server of each workload, as a node does and as a crash does. The container starts again, and has its answers.
func endServers(t *testing.T) {
	for name, workload := range workloads {
		pod := podsOf(t, workload)[0]
		ip := podIP(t, pod)
		if name == "nodelocaldns" {
			ip = localDNS
		}
		for i, signal := range []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL} {
			fresh := freshName()
			if got := ask(t, ip, fresh+" A", "udp", false); !strings.Contains(got, "192.0.2.99") {
				t.Fatal(got)
			}
			if signal == syscall.SIGKILL && name == "nodelocaldns" {
				system(t, "exec", pod, "--", "optcachectl", "snapshot")
			}
			if got := system(t, "get", "pod", pod, "-o", "jsonpath={.status.containerStatuses[0].restartCount}"); got != fmt.Sprint(i) {
				t.Fatalf("%s has been restarted %s times before", pod, got)
			}
			sendSignal(t, processOf(t, pod), signal)
			eventually(t, pod+" is ready again", 2*time.Minute, func() error {
				got := system(t, "get", "pod", pod, "-o", "jsonpath={.status.containerStatuses[0].restartCount} {.status.containerStatuses[0].ready}")
				if got != fmt.Sprint(i+1, " true") {
					return fmt.Errorf("%s", got)
				}
				return nil
			})
			if got := ask(t, ip, "www.example.org A", "udp", false); !strings.Contains(got, "192.0.2.10") {
				t.Errorf("after %v, %s answers %s", signal, pod, got)
			}
			// A crash loses what came after the last snapshot.
			if name == "nodelocaldns" {
				system(t, "exec", pod, "--", "optcachectl", "lookup", fresh, "A")
			} else if log := system(t, "logs", pod); signal == syscall.SIGTERM && !strings.Contains(log, "Has read ") {
				t.Errorf("after %v, %s has read no snapshot:\n%s", signal, pod, log)
			}
		}
	}
}

// freshName is one that nobody has asked for.
func freshName() string { return fmt.Sprintf("n%d.any.example.org", time.Now().UnixNano()) }

// rollClusterDNS replaces the pods of cluster DNS under load, again and again: one, two and three. Pods that ask NodeLocal DNSCache
// notice nothing.
func rollClusterDNS(t *testing.T) {
	const workload = "deployment/coredns"
	l, local := startLoad(t, "tools", names...), startLoad(t, "tools-local", names...)
	ended := 0
	for i := range rollouts(t) {
		system(t, "scale", workload, fmt.Sprint("--replicas=", 1+i%3))
		rolledOut(t, workload)
		system(t, "rollout", "restart", workload)
		rolledOut(t, workload)
		ended += 1 + i%3
	}
	local.stop(0)
	l.stop(ended)
	system(t, "scale", workload, "--replicas=2")
	rolledOut(t, workload)
}

// rollNodeLocal does it with NodeLocal DNSCache, for pods that have no other server. Each new pod has what the old one had.
func rollNodeLocal(t *testing.T) {
	workload := workloads["nodelocaldns"]
	l := startLoad(t, "tools-local", names...)
	for range rollouts(t) {
		old := podsOf(t, workload)
		fresh := freshName()
		if got := ask(t, localDNS, fresh+" A", "udp", false); !strings.Contains(got, "192.0.2.99") {
			t.Fatal(got)
		}
		system(t, "rollout", "restart", workload)
		rolledOut(t, workload)
		young := podsOf(t, workload)
		if len(old) != 1 || len(young) != 1 || slices.Equal(old, young) {
			t.Fatalf("pods before: %v, and after: %v", old, young)
		}
		system(t, "exec", young[0], "--", "optcachectl", "lookup", fresh, "A")
	}
	l.stop(0)
	if left, err := filepath.Glob("/run/optcache/*/control.sock"); err != nil || len(left) != 1 {
		t.Errorf("sockets %v, %v", left, err)
	}
	hangsInRollout(t, workload)
}

// hangsInRollout has the new pod hang once it is ready. The probes tell it from the old one, which stays.
func hangsInRollout(t *testing.T, workload string) {
	old := podsOf(t, workload)[0]
	system(t, "rollout", "restart", workload)
	ready := func(pod string) bool {
		return system(t, "get", "pod", pod, "-o", `jsonpath={.status.conditions[?(@.type=="Ready")].status}`) == "True"
	}
	var young string
	eventually(t, "the new pod is ready", time.Minute, func() error {
		for _, pod := range podsOf(t, workload) {
			if pod != old && ready(pod) {
				young = pod
				return nil
			}
		}
		return errors.New("it is not")
	})
	process := processOf(t, young)
	sendSignal(t, process, syscall.SIGSTOP)
	eventually(t, "the new pod is not ready any more", 40*time.Second, func() error {
		if ready(young) {
			return errors.New("it is")
		}
		return nil
	})
	for range 15 { // longer than it would take to be available
		time.Sleep(time.Second)
		if gone := system(t, "get", "pod", old, "-o", "jsonpath={.metadata.deletionTimestamp}"); gone != "" || !ready(old) {
			t.Fatalf("the old pod, ready %v, ends at %q", ready(old), gone)
		}
	}
	sendSignal(t, process, syscall.SIGCONT)
	rolledOut(t, workload)
}

// tooSmallLimit rolls cluster DNS out with a memory limit that kills it. The old pods go on. A pod that is killed while it
// serves takes queries with it, until kube-proxy gives it none any more: how many depends on how busy the machine is.
func tooSmallLimit(t *testing.T) {
	const workload = "deployment/coredns"
	l := startLoad(t, "tools", names...)
	system(t, "patch", workload, "--type=json", "-p", `[{"op": "replace", "path": "/spec/template/spec/containers/0/resources", "value": {"limits": {"memory": "12Mi"}}}]`)
	eventually(t, "a pod is killed for memory", 2*time.Minute, func() error {
		all := system(t, "get", "pods", "-l", "k8s-app=kube-dns", "-o",
			"jsonpath={.items[*].status.containerStatuses[*].lastState.terminated.reason} {.items[*].status.containerStatuses[*].state.terminated.reason}")
		if !strings.Contains(all, "OOMKilled") {
			return fmt.Errorf("%q\n%s", all, system(t, "get", "pods", "-l", "k8s-app=kube-dns"))
		}
		return nil
	})
	system(t, "rollout", "undo", workload)
	rolledOut(t, workload)
	if sum := l.stop(math.MaxInt); sum.failed+sum.lost > sum.all/10 {
		t.Error("the old pods do not go on")
	}
	looksUp(t, "tools")
}

// withoutServers takes away the node's upstream, and then cluster DNS. What a cache has is answered, also when its TTL has run out;
// what it does not have fails; what the others do not need goes on.
func withoutServers(t *testing.T) {
	const web, workload = "web.default.svc.cluster.local A", "deployment/coredns"
	clusterPod := podIP(t, podsOf(t, workload)[0])
	seen := fmt.Sprintf("n%d.short.example.org A", time.Now().UnixNano()) // a TTL of 1 s
	answers := func(ip, question, want string) {
		t.Helper()
		begin := time.Now()
		if got := ask(t, ip, question, "udp", false); !strings.Contains(got, want) {
			t.Errorf("%s answers %s with %s, and not with %s", ip, question, got, want)
		}
		if took := time.Since(begin); took > 2400*time.Millisecond && want != "SERVFAIL" {
			t.Errorf("%s has an answer to %s after %v", ip, question, took)
		}
	}
	for _, ip := range []string{localDNS, clusterPod} {
		answers(ip, seen, "192.0.2.98")
		answers(ip, web, "10.96.7.7")
	}
	end(cluster.upstreamServer)
	time.Sleep(1500 * time.Millisecond) // the TTL
	for _, ip := range []string{localDNS, clusterPod} {
		answers(ip, seen, "192.0.2.98")
		answers(ip, freshName()+" A", "SERVFAIL")
		answers(ip, "kubernetes.default.svc.cluster.local A", "10.96.0.1")
	}
	if err := cluster.upstream(); err != nil {
		t.Fatal(err)
	}
	for _, ip := range []string{localDNS, clusterPod} {
		eventually(t, ip+" has its upstream again", 30*time.Second, func() error {
			if got := ask(t, ip, freshName()+" A", "udp", false); !strings.Contains(got, "192.0.2.99") {
				return errors.New(got)
			}
			return nil
		})
	}

	unknown := func() string { return fmt.Sprintf("n%d.default.svc.cluster.local A", time.Now().UnixNano()) } // to the cache
	replicas := system(t, "get", workload, "-o", "jsonpath={.spec.replicas}")
	answers(localDNS, web, "10.96.7.7")
	asked := time.Now()
	system(t, "scale", workload, "--replicas=0")
	rolledOut(t, workload)
	eventually(t, "cluster DNS is gone", 30*time.Second, func() error {
		if got := ask(t, localDNS, unknown(), "udp", false); !strings.Contains(got, "SERVFAIL") {
			return errors.New(got)
		}
		return nil
	})
	time.Sleep(time.Until(asked.Add(31 * time.Second))) // the TTL of cluster DNS
	answers(localDNS, web, "10.96.7.7")
	answers(localDNS, freshName()+" A", "192.0.2.99")
	system(t, "scale", workload, "--replicas="+replicas)
	rolledOut(t, workload)
	eventually(t, "NodeLocal DNSCache has cluster DNS again", 30*time.Second, func() error {
		if got := ask(t, localDNS, unknown(), "udp", false); !strings.Contains(got, "NXDOMAIN") {
			return errors.New(got)
		}
		return nil
	})
}
