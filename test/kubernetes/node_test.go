package kubernetes

import (
	"crypto/tls"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// This file is the cluster: its processes and how they are set up.

const (
	root     = "../.."
	binaries = root + "/bin/kubernetes" // make test-kubernetes puts them there

	nodeName   = "node1"
	nodeIP     = "172.31.99.2"
	upstreamIP = "172.31.99.3" // a CoreDNS of the node's network: what /etc/resolv.conf of the node names
	clusterDNS = "10.96.0.10"
	localDNS   = "169.254.20.10"

	adminToken   = "admin-token"
	kubeletToken = "kubelet-token"
	proxyToken   = "proxy-token"
)

// proxyMode is kube-proxy's: nftables, or iptables.
var proxyMode = "nftables"

// cluster is the one that runs.
var cluster *node

// node is a cluster of one node, in a folder.
type node struct {
	dir   string // absolute
	bin   string // absolute
	group string // of its control groups

	upstreamServer, proxy *exec.Cmd
	delays                delays
}

func newNode(dir string) *node {
	bin, err := filepath.Abs(binaries)
	if err != nil {
		panic(err)
	}
	if mode := os.Getenv("OPTCACHE_KUBERNETES_PROXY"); mode != "" {
		proxyMode = mode
	}
	pid, set := os.LookupEnv("OPTCACHE_KUBERNETES_GROUP")
	if !set {
		pid = fmt.Sprint(os.Getpid())
		os.Setenv("OPTCACHE_KUBERNETES_GROUP", pid)
	}
	return &node{dir: dir, bin: bin, group: groupPrefix + pid}
}

// in returns a path in the node's folder.
func (n *node) in(parts ...string) string { return filepath.Join(append([]string{n.dir}, parts...)...) }

func (n *node) write(name, format string, args ...any) error {
	if err := os.MkdirAll(filepath.Dir(n.in(name)), 0o755); err != nil {
		return err
	}
	return os.WriteFile(n.in(name), fmt.Appendf(nil, format, args...), 0o644)
}

// begin starts a process that stays. What it says goes to a file.
func (n *node) begin(name, command string, args ...string) (*exec.Cmd, error) {
	log, err := os.OpenFile(n.in("log", name), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	c := exec.Command(command, args...)
	c.Stdout, c.Stderr = log, log
	c.Dir = n.dir
	return c, c.Start()
}

// daemon starts a process that stays until the node ends.
func (n *node) daemon(name, command string, args ...string) error {
	c, err := n.begin(name, command, args...)
	if err == nil {
		go c.Wait()
	}
	return err
}

// end ends a process that begin has started.
func end(c *exec.Cmd) {
	c.Process.Signal(syscall.SIGTERM)
	c.Wait()
}

// showLogs prints the ends of the logs.
func (n *node) showLogs() {
	logs, _ := filepath.Glob(n.in("log", "*"))
	for _, log := range logs {
		text, _ := os.ReadFile(log)
		lines := strings.Split(strings.TrimSpace(string(text)), "\n")
		fmt.Printf("== %s\n%s\n", filepath.Base(log), strings.Join(lines[max(0, len(lines)-15):], "\n"))
	}
}

// within waits until something succeeds. The limit is the time of a machine that does nothing else: what is counted are tries, of
// which each takes longer where the machine is busy, as what they wait for does.
func within(what string, limit time.Duration, try func() error) (err error) {
	const pause = 200 * time.Millisecond
	for range limit / pause {
		if err = try(); err == nil {
			return nil
		}
		time.Sleep(pause)
	}
	return fmt.Errorf("%s: not in %d tries: %w", what, limit/pause, err)
}

// start starts the API server.
func (n *node) start() error {
	os.Setenv("KUBECONFIG", n.in("admin.conf"))
	for _, step := range []func() error{n.mount, n.network, n.apiServer} {
		if err := step(); err != nil {
			return err
		}
	}
	return nil
}

// startNode starts the rest of the cluster, once.
func (n *node) startNode() error {
	if n.proxy != nil {
		return nil
	}
	for _, step := range []func() error{n.controllers, n.upstream, n.workers} {
		if err := step(); err != nil {
			return err
		}
	}
	if err := n.countStrays(); err != nil {
		return err
	}
	go n.delays.take()
	return within("the node is ready", 2*time.Minute, func() error {
		return run(filepath.Join(n.bin, "kubectl"), "wait", "--for=condition=Ready", "--timeout=0", "node/"+nodeName)
	})
}

// mount gives the node folders of its own where its programs write outside of the node's folder, and kernel settings as the
// kubelet wants them, in files: they are the whole machine's.
func (n *node) mount() error {
	for _, dir := range []string{"var", "var-work", "settings", "log", "kubelet", "containerd", "opt", "cni"} {
		if err := os.MkdirAll(n.in(dir), 0o755); err != nil {
			return err
		}
	}
	// Mounts of the kubelet have to reach containers, and stay in the node's namespace.
	err := errors.Join(
		syscall.Mount("", "/", "", syscall.MS_REC|syscall.MS_SHARED, ""),
		syscall.Mount("tmpfs", "/run", "tmpfs", 0, ""),
		syscall.Mount("overlay", "/var", "overlay", 0, fmt.Sprintf("lowerdir=/var,upperdir=%s,workdir=%s", n.in("var"), n.in("var-work"))),
	)
	for name, value := range map[string]string{"vm/overcommit_memory": "1", "vm/panic_on_oom": "0", "kernel/panic": "10", "kernel/panic_on_oops": "1",
		"kernel/keys/root_maxkeys": "1000000", "kernel/keys/root_maxbytes": "25000000"} {
		file := "settings/" + strings.ReplaceAll(name, "/", ".")
		err = errors.Join(err, n.write(file, "%s\n", value))
		err = errors.Join(err, syscall.Mount(n.in(file), "/proc/sys/"+name, "", syscall.MS_BIND, ""))
	}
	return err
}

// network gives the node a link that leads nowhere, so that there is a default route.
func (n *node) network() error {
	err := runAll("ip link set lo up",
		"ip link add node0 type veth peer name node1", "ip link set node0 up", "ip link set node1 up",
		"ip addr add "+nodeIP+"/24 dev node0", "ip addr add "+upstreamIP+"/24 dev node0", "ip route add default dev node0")
	return errors.Join(err, os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0o644))
}

const kubeconfig = `apiVersion: v1
kind: Config
clusters: [{name: c, cluster: {server: "https://%s:6443", certificate-authority: %s}}]
users: [{name: u, user: {token: %s}}]
contexts: [{name: x, context: {cluster: c, user: u}}]
current-context: x
`

func (n *node) apiServer() error {
	for file, token := range map[string]string{"admin.conf": adminToken, "kubelet.conf": kubeletToken, "proxy.conf": proxyToken} {
		if err := n.write(file, kubeconfig, nodeIP, n.in("pki/apiserver.crt"), token); err != nil {
			return err
		}
	}
	if err := n.write("pki/tokens.csv", "%s,admin,admin,\"system:masters\"\n%s,system:node:%s,node,\"system:nodes\"\n%s,system:kube-proxy,proxy\n",
		adminToken, kubeletToken, nodeName, proxyToken); err != nil {
		return err
	}
	if err := run("openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", n.in("pki/sa.key")); err != nil {
		return err
	}
	// go.etcd.io/etcd/server/v3 is the command "server".
	if err := n.daemon("etcd", filepath.Join(n.bin, "server"), "--data-dir", n.in("etcd"), "--unsafe-no-fsync", "--log-level", "warn",
		"--listen-client-urls", "http://127.0.0.1:2379", "--advertise-client-urls", "http://127.0.0.1:2379", "--listen-peer-urls", "http://127.0.0.1:2380"); err != nil {
		return err
	}
	if err := n.daemon("kube-apiserver", filepath.Join(n.bin, "kube-apiserver"), "--etcd-servers", "http://127.0.0.1:2379",
		"--bind-address", "0.0.0.0", "--advertise-address", nodeIP, "--cert-dir", n.in("pki"), "--token-auth-file", n.in("pki/tokens.csv"),
		"--authorization-mode", "Node,RBAC", "--service-cluster-ip-range", "10.96.0.0/12", "--allow-privileged",
		"--service-account-issuer", "https://kubernetes.default.svc.cluster.local",
		"--service-account-key-file", n.in("pki/sa.key"), "--service-account-signing-key-file", n.in("pki/sa.key"),
		"--enable-admission-plugins", "NodeRestriction", "--kubelet-preferred-address-types", "InternalIP"); err != nil {
		return err
	}
	client := http.Client{Timeout: 2 * time.Second, Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}}
	return within("the API server is ready", 3*time.Minute, func() error {
		r, err := http.NewRequest("GET", "https://"+nodeIP+":6443/readyz", nil)
		if err != nil {
			return err
		}
		r.Header.Set("Authorization", "Bearer "+adminToken)
		reply, err := client.Do(r)
		if err != nil {
			return err
		}
		reply.Body.Close()
		if reply.StatusCode != http.StatusOK {
			return errors.New(reply.Status)
		}
		return nil
	})
}

func (n *node) controllers() error {
	return errors.Join(
		n.daemon("kube-controller-manager", filepath.Join(n.bin, "kube-controller-manager"), "--kubeconfig", n.in("admin.conf"),
			"--root-ca-file", n.in("pki/apiserver.crt"), "--service-account-private-key-file", n.in("pki/sa.key"),
			"--use-service-account-credentials", "--leader-elect=false"),
		n.daemon("kube-scheduler", filepath.Join(n.bin, "kube-scheduler"), "--kubeconfig", n.in("admin.conf"), "--leader-elect=false"),
		run(filepath.Join(n.bin, "kubectl"), "--kubeconfig", n.in("admin.conf"), "create", "clusterrolebinding", "optcache-test-proxy",
			"--clusterrole=system:node-proxier", "--user=system:kube-proxy"),
	)
}

// upstream is who knows the rest of the world.
func (n *node) upstream() error {
	err := errors.Join(
		n.write("resolv.conf", "nameserver %s\n", upstreamIP),
		n.write("example.org", "$ORIGIN example.org.\n@ 3600 SOA ns a 1 2 3 4 60\n@ NS ns\nns A 192.0.2.1\nwww 300 A 192.0.2.10\nwww 300 AAAA 2001:db8::10\n*.any 300 A 192.0.2.99\n*.short 1 A 192.0.2.98\n"),
		n.write("upstream.conf", `example.org:53 {
    bind %[1]s
    file %[2]s
    prometheus %[1]s:9153
}
stub.test:5353 {
    bind %[1]s
    template IN A {
        answer "{{ .Name }} 60 IN A 192.0.2.88"
    }
}
.:53 {
    bind %[1]s
    template ANY ANY {
        rcode NXDOMAIN
        authority ". 300 IN SOA a. b. 1 2 3 4 300"
    }
}
`, upstreamIP, n.in("example.org")))
	if err != nil {
		return err
	}
	coredns, err := filepath.Abs(root + "/bin/coredns")
	if err != nil {
		return err
	}
	n.upstreamServer, err = n.begin("upstream", coredns, "-conf", n.in("upstream.conf"))
	return err
}

const cniConfig = `{"cniVersion":"0.4.0","name":"pods","plugins":[{"type":"bridge","bridge":"cni0","isGateway":true,"hairpinMode":true,
"ipMasq":false,"ipam":{"type":"host-local","dataDir":"%s","ranges":[[{"subnet":"10.244.0.0/24"}]],"routes":[{"dst":"0.0.0.0/0"}]}}]}
`

const containerdConfig = `version = 2
root = "%[1]s/containerd/root"
state = "%[1]s/containerd/state"
disabled_plugins = ["io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.zfs"]
[grpc]
  address = "%[1]s/containerd/containerd.sock"
[plugins."io.containerd.internal.v1.opt"]
  path = "%[1]s/opt"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "localhost/pause:1"
  restrict_oom_score_adj = true
  disable_apparmor = true
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
      SystemdCgroup = false
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "%[1]s/cni"
`

// The kubelet looks at ConfigMaps more often than it does by itself.
const kubeletConfig = `apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
address: %[2]s
authentication: {anonymous: {enabled: true}, webhook: {enabled: false}}
authorization: {mode: AlwaysAllow}
cgroupDriver: cgroupfs
cgroupRoot: /%[3]s
failCgroupV1: false
failSwapOn: false
clusterDomain: cluster.local
clusterDNS: [%[4]s]
containerRuntimeEndpoint: unix://%[1]s/containerd/containerd.sock
resolvConf: %[1]s/resolv.conf
podLogsDir: %[1]s/podlogs
syncFrequency: 5s
imageGCHighThresholdPercent: 100
imageGCLowThresholdPercent: 99
evictionHard: {memory.available: 100Mi, nodefs.available: 1Gi, imagefs.available: 1Gi}
volumePluginDir: %[1]s/volumeplugins
`

// startProxy starts kube-proxy in a mode: nftables or iptables. It removes what one of another mode has left.
func (n *node) startProxy(mode string) (err error) {
	if n.proxy != nil {
		end(n.proxy)
	}
	if err := n.write("kube-proxy.yaml", proxyConfig, mode, nodeName, n.in("proxy.conf")); err != nil {
		return err
	}
	n.proxy, err = n.begin("kube-proxy", filepath.Join(n.bin, "kube-proxy"), "--config", n.in("kube-proxy.yaml"), "--v", "4")
	return err
}

const proxyConfig = `apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
mode: %s
hostnameOverride: %s
clientConnection: {kubeconfig: %s}
clusterCIDR: 10.244.0.0/16
conntrack: {maxPerCore: 0, min: 0, tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 0s}
`

// workers are containerd, the kubelet and kube-proxy.
func (n *node) workers() error {
	if err := errors.Join(
		n.write("cni/10-bridge.conflist", cniConfig, n.in("ipam")),
		n.write("containerd.toml", containerdConfig, n.dir),
		n.write("kubelet.yaml", kubeletConfig, n.dir, nodeIP, n.group, clusterDNS),
		n.daemon("containerd", "containerd", "--config", n.in("containerd.toml")),
	); err != nil {
		return err
	}
	ctr := func(args ...string) error {
		return run("ctr", append([]string{"-a", n.in("containerd/containerd.sock"), "-n", "k8s.io"}, args...)...)
	}
	if err := within("containerd is ready", time.Minute, func() error { return ctr("version") }); err != nil {
		return err
	}
	archives, err := filepath.Glob(n.in("images/*.tar"))
	if err != nil {
		return err
	}
	for _, a := range archives {
		if err := ctr("images", "import", a); err != nil {
			return err
		}
	}
	return errors.Join(
		n.daemon("kubelet", filepath.Join(n.bin, "kubelet"), "--config", n.in("kubelet.yaml"), "--kubeconfig", n.in("kubelet.conf"),
			"--root-dir", n.in("kubelet"), "--hostname-override", nodeName, "--node-ip", nodeIP, "--cert-dir", n.in("kubelet-pki"), "--v", "2"),
		n.startProxy(proxyMode),
	)
}
