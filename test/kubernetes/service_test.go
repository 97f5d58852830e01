package kubernetes

import (
	"errors"
	"fmt"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// This file is NodeLocal DNSCache at the cluster IP, for pods that know nothing of it.

// tracked returns how many queries to an address the kernel tracks.
func tracked(t *testing.T, ip string) int {
	t.Helper()
	out, err := exec.Command("conntrack", "-L", "--orig-dst", ip).Output()
	if err != nil {
		t.Fatal(err)
	}
	return strings.Count(string(out), "dport=53 ")
}

// hasFromPods tells whether a pod that asks cluster DNS gets its answers from the node's cache.
func hasFromPods(t *testing.T) (bool, error) {
	t.Helper()
	fresh := freshName()
	if out := kubectl(t, "exec", "tools", "--", "lookup-go", fresh); !strings.Contains(out, fresh+": 192.0.2.99") {
		return false, errors.New(out)
	}
	lookup := cluster.command("-n", "kube-system", "exec", podsOf(t, workloads["nodelocaldns"])[0], "-c", "node-cache", "--", "optcachectl", "lookup", fresh, "A")
	out, err := lookup.CombinedOutput()
	if err != nil && lookup.ProcessState.ExitCode() == 4 { // it holds no such answer
		return false, nil
	}
	if err != nil {
		err = fmt.Errorf("%w\n%s", err, out)
	}
	return err == nil, err
}

const shortly = 10 * time.Second

// hasThem waits until it does, or does not.
func hasThem(t *testing.T, want bool, when string, limit time.Duration) {
	t.Helper()
	eventually(t, fmt.Sprintf("the node's cache has the queries of pods: %v %s", want, when), limit, func() error {
		has, err := hasFromPods(t)
		if err == nil && has != want {
			err = fmt.Errorf("%v", has)
		}
		return err
	})
}

// atClusterIP has the cache take the cluster IP, while pods ask there. They do not notice: not when it comes, not when it is replaced,
// nor when it ends or crashes, as cluster DNS answers then.
func atClusterIP(t *testing.T) {
	workload := workloads["nodelocaldns"]
	if has, err := hasFromPods(t); has || err != nil {
		t.Fatal("a pod that knows nothing of the cache asks it", err)
	}
	l := startLoad(t, "tools", names...)
	kubectl(t, "apply", "--validate=strict", "-k", withClusterIP(t))
	rolledOut(t, workload)
	hasThem(t, true, "when it is rolled out", shortly)
	for range min(rollouts(t), 5) { // rollNodeLocal does more
		system(t, "rollout", "restart", workload)
		rolledOut(t, workload)
		if has, err := hasFromPods(t); !has {
			t.Error("after a rollout, the cache does not have the queries of pods", err)
		}
	}
	l.stop(0)
	looksUp(t, "tools")
	if out, err := exec.Command("conntrack", "-D", "--orig-dst", clusterDNS).CombinedOutput(); err != nil {
		t.Logf("%v: %s", err, out) // there may be none
	}
	l = startLoad(t, "tools", names...)
	time.Sleep(3 * time.Second)
	l.stop(0)
	if n := tracked(t, clusterDNS); n != 0 {
		t.Errorf("the kernel tracks %d queries", n)
	}

	// Somebody removes what the node needs.
	for _, damage := range []string{"nft delete table inet nodelocaldns", "ip link del nodelocaldns"} {
		if err := runAll(damage); err != nil {
			t.Fatal(err)
		}
		hasThem(t, true, "after "+damage, shortly)
	}

	pod := podsOf(t, workload)[0]
	if n := system(t, "get", "pod", pod, "-o", "jsonpath={.status.containerStatuses[0].restartCount}{.status.initContainerStatuses[*].restartCount}"); strings.Trim(n, "0 ") != "" {
		t.Errorf("%s has been restarted: %s", pod, n)
	}
	// The server hangs. Queries are lost until that is noticed; then cluster DNS answers.
	process := processOf(t, pod)
	sendSignal(t, process, syscall.SIGSTOP)
	looksUpWithin(t, 15*time.Second)
	looksUp(t, "tools")
	sendSignal(t, process, syscall.SIGCONT)
	hasThem(t, true, "when it hangs no more", shortly)

	// The server crashes, and comes again. A query that is under way is lost, and those until it is noticed.
	sendSignal(t, process, syscall.SIGKILL)
	looksUpWithin(t, 15*time.Second)
	hasThem(t, true, "after a crash", time.Minute)

	// The pod ends, and another one comes: cluster DNS answers meanwhile.
	l = startLoad(t, "tools", names...)
	system(t, "delete", "pod", pod)
	rolledOut(t, workload)
	hasThem(t, true, "of the pod that comes", time.Minute)
	l.stop(0)
	if young := podsOf(t, workload); slices.Contains(young, pod) {
		t.Errorf("%s is still there", pod)
	}
}

// looksUpWithin wants pods to have answers again within a time.
func looksUpWithin(t *testing.T, limit time.Duration) {
	t.Helper()
	eventually(t, "pods have answers", limit, func() error {
		if out := kubectl(t, "exec", "tools", "--", "lookup-go", "web"); !strings.Contains(out, "web: 10.96.7.7") {
			return fmt.Errorf("%s", out)
		}
		return nil
	})
}

// otherProxyMode changes kube-proxy from nftables to iptables, or the other way.
func otherProxyMode(t *testing.T) {
	mode := map[string]string{"nftables": "iptables", "iptables": "nftables"}[proxyMode]
	if err := cluster.startProxy(mode); err != nil {
		t.Fatal(err)
	}
	eventually(t, "kube-proxy has rules in mode "+mode, time.Minute, func() error {
		if mode == "iptables" {
			return exec.Command("iptables", "-t", "nat", "-S", "KUBE-SERVICES").Run()
		}
		return exec.Command("nft", "list", "table", "ip", "kube-proxy").Run()
	})
	kubectl(t, "apply", "--validate=strict", "-k", withClusterIP(t))
	rolledOut(t, workloads["nodelocaldns"])
	hasThem(t, true, "in mode "+mode, shortly)
	looksUp(t, "tools")
	looksUp(t, "tools-local")
	l, local := startLoad(t, "tools", names...), startLoad(t, "tools-local", names...)
	for _, workload := range workloads {
		system(t, "rollout", "restart", workload)
		rolledOut(t, workload)
	}
	l.stop(0)
	local.stop(0)
	if n := tracked(t, localDNS); n != 0 {
		t.Errorf("the kernel tracks %d queries", n)
	}
}

// leaveClusterIP goes back to the manifests without the component: cluster DNS has the queries of pods again.
func leaveClusterIP(t *testing.T) {
	l := startLoad(t, "tools", names...)
	kubectl(t, "apply", "--validate=strict", "-k", base("nodelocaldns"))
	rolledOut(t, workloads["nodelocaldns"])
	hasThem(t, false, "when it has left the cluster IP", shortly)
	l.stop(0)
	before, err := exec.Command("ip", "-o", "addr", "show", "dev", "nodelocaldns").CombinedOutput()
	if err != nil || strings.Contains(string(before), clusterDNS) || !strings.Contains(string(before), localDNS) {
		t.Errorf("%v\n%s", err, before)
	}
}

// removeNodeLocal follows deploy/README.md. The node is as before.
func removeNodeLocal(t *testing.T) {
	l := startLoad(t, "tools", names...)
	follow(t, withClusterIP(t), "kubectl delete -k .")
	eventually(t, "interface and rules are gone", time.Minute, func() error {
		link, linkErr := exec.Command("ip", "link", "show", "nodelocaldns").CombinedOutput()
		table, tableErr := exec.Command("nft", "list", "table", "inet", "nodelocaldns").CombinedOutput()
		if linkErr == nil || tableErr == nil {
			return fmt.Errorf("%s%s", link, table)
		}
		return nil
	})
	time.Sleep(3 * time.Second) // more lookups
	l.stop(0)
	follow(t, ".", "rm -r /var/cache/optcache") // in the node's namespace of mounts
	looksUp(t, "tools")
}
