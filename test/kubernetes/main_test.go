package kubernetes

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// This file starts the test three times. Outside, it makes what the node needs: a folder, images, control groups. Then it starts
// itself as the first process of new namespaces of mounts, processes and network, which starts it once more in there. All of the
// cluster is in these namespaces, so it ends with their first process, and that one ends with the test outside, however that ends.

const (
	roleVariable = "OPTCACHE_KUBERNETES_ROLE"
	dirVariable  = "OPTCACHE_KUBERNETES_DIR"
	roleFirst    = "first"
	roleNode     = "node"

	groups = "/sys/fs/cgroup"
	// The process ID of the test outside follows both.
	groupPrefix = "optcache-test-"
	dirPrefix   = "optcache-kubernetes-"
)

// why is the reason that there is no cluster here, or empty.
var why string

// needsNode skips a test where there is no cluster.
func needsNode(t *testing.T) {
	t.Helper()
	if why != "" {
		t.Skip(why)
	}
}

func TestMain(m *testing.M) {
	switch os.Getenv(roleVariable) {
	case roleFirst:
		os.Exit(first())
	case roleNode:
		os.Exit(inside(m))
	}
	os.Exit(outside(m))
}

// tools are commands, or files, and the packages of Debian that have them.
var tools = [][2]string{
	{"containerd", "containerd"}, {"runc", "runc"}, {"/usr/lib/cni/bridge", "containernetworking-plugins"}, {"nft", "nftables"},
	{"iptables", "iptables"}, {"conntrack", "conntrack"}, {"buildah", "buildah"}, {"setcap", "libcap2-bin"}, {"busybox", "busybox-static"},
	{"musl-gcc", "musl-tools"}, {"gcc", "gcc"}, {"/usr/include/stdio.h", "libc6-dev"}, {"ip", "iproute2"}, {"openssl", "openssl"},
}

// install installs what is missing of the tools.
func install() error {
	var packages []string
	for _, tool := range tools {
		_, err := os.Stat(tool[0])
		if !filepath.IsAbs(tool[0]) {
			_, err = exec.LookPath(tool[0])
		}
		if err != nil {
			packages = append(packages, tool[1])
		}
	}
	if len(packages) == 0 {
		return nil
	}
	if _, err := exec.LookPath("apt-get"); err != nil {
		return fmt.Errorf("these packages are missing: %s", strings.Join(packages, " "))
	}
	fmt.Println("installs", strings.Join(packages, " "))
	if err := run("apt-get", "update", "-qq"); err != nil {
		return err
	}
	os.Setenv("DEBIAN_FRONTEND", "noninteractive")
	return run("apt-get", append([]string{"install", "-y", "-qq", "--no-install-recommends"}, packages...)...)
}

// run runs a command. Its error has what the command said.
func run(name string, args ...string) error {
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		return fmt.Errorf("%s %s: %w\n%s", name, strings.Join(args, " "), err, out)
	}
	return nil
}

func runAll(commands ...string) error {
	for _, c := range commands {
		words := strings.Fields(c)
		if err := run(words[0], words[1:]...); err != nil {
			return err
		}
	}
	return nil
}

// outside is the test as `go test` starts it.
func outside(m *testing.M) int {
	os.Setenv("PATH", os.Getenv("PATH")+":/usr/sbin:/sbin")
	if why = missing(); why != "" {
		return m.Run()
	}
	sweepDirs()
	dir, err := os.MkdirTemp("", fmt.Sprint(dirPrefix, os.Getpid(), "-"))
	if err != nil {
		fmt.Println(err)
		return 1
	}
	n := newNode(dir)
	remove := func() {
		if err := n.remove(); err != nil {
			fmt.Println("what the node leaves:", err)
		}
	}
	defer remove()
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT)
	started := make(chan *os.Process, 1)
	go func() {
		fmt.Println(<-signals)
		signal.Reset() // a second one ends this at once
		select {
		case p := <-started:
			p.Kill()
		default:
			remove()
			os.Exit(1)
		}
	}()
	said, err := downloadOperator()
	if err != nil {
		err = fmt.Errorf("%s: %w\n%s", prometheusOperator, err, said)
	}
	if err := errors.Join(err, n.makeGroups(), n.makeImages()); err != nil {
		fmt.Println(err)
		return 1
	}
	return n.enter(started)
}

// missing returns why there can be no cluster here, or an empty text.
func missing() string {
	if os.Getuid() != 0 {
		return "only root may make a node"
	}
	if _, err := os.Stat(filepath.Join(binaries, "kube-apiserver")); err != nil {
		return "Kubernetes is not built: make test-kubernetes"
	}
	if err := install(); err != nil {
		return "what the node needs cannot be installed: " + err.Error()
	}
	probe := exec.Command("true")
	probe.SysProcAttr = &syscall.SysProcAttr{Cloneflags: namespaces}
	if err := probe.Run(); err != nil {
		return "no namespaces here: " + err.Error()
	}
	if !unified() {
		if _, err := os.Stat(filepath.Join(groups, "memory")); err != nil {
			return "no control groups here"
		}
	}
	return ""
}

const namespaces = syscall.CLONE_NEWNS | syscall.CLONE_NEWPID | syscall.CLONE_NEWNET | syscall.CLONE_NEWIPC

// enter starts the first process in its namespaces, says so, and returns the test's exit code.
func (n *node) enter(started chan<- *os.Process) int {
	// The kernel kills the first process when the thread ends that started it.
	runtime.LockOSThread()
	c := exec.Command("/proc/self/exe", os.Args[1:]...)
	c.Env = append(os.Environ(), roleVariable+"="+roleFirst, dirVariable+"="+n.dir)
	c.Stdout, c.Stderr = os.Stdout, os.Stderr
	c.SysProcAttr = &syscall.SysProcAttr{Cloneflags: namespaces, Pdeathsig: syscall.SIGKILL, Setpgid: true}
	if err := c.Start(); err != nil {
		fmt.Println(err)
		return 1
	}
	started <- c.Process
	c.Wait()
	if code := c.ProcessState.ExitCode(); code >= 0 {
		return code
	}
	return 1
}

// first is the first process of the node: it starts the test, and reaps what loses its parent.
func first() int {
	c := exec.Command("/proc/self/exe", os.Args[1:]...)
	c.Env = append(os.Environ(), roleVariable+"="+roleNode)
	c.Stdout, c.Stderr = os.Stdout, os.Stderr
	// /proc is still that of outside, where this process has another number.
	if err := syscall.Mount("", "/", "", syscall.MS_REC|syscall.MS_PRIVATE, ""); err != nil {
		fmt.Println(err)
		return 1
	}
	if err := syscall.Mount("proc", "/proc", "proc", 0, ""); err != nil {
		fmt.Println(err)
		return 1
	}
	if err := c.Start(); err != nil {
		fmt.Println(err)
		return 1
	}
	for {
		var status syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &status, 0, nil)
		switch {
		case errors.Is(err, syscall.EINTR):
		case err != nil:
			fmt.Println(err)
			return 1
		case pid == c.Process.Pid && status.Exited():
			return status.ExitStatus()
		case pid == c.Process.Pid:
			fmt.Println("the test has been killed by", status.Signal())
			return 1
		}
	}
}

// inside is the test in the node's namespaces.
func inside(m *testing.M) int {
	n := newNode(os.Getenv(dirVariable))
	if err := errors.Join(n.joinGroup(), n.start()); err != nil {
		fmt.Println(err)
		n.showLogs()
		return 1
	}
	cluster = n
	code := m.Run()
	if code != 0 {
		n.showLogs()
	}
	return code
}

// unified tells whether control groups are those of version 2, which are one tree. Version 1 has one for each controller.
func unified() bool {
	_, err := os.Stat(filepath.Join(groups, "cgroup.controllers"))
	return err == nil
}

// groupDirs are the folders of control groups, in all trees, whose names match a pattern.
func groupDirs(pattern string) []string {
	if !unified() {
		pattern = filepath.Join("*", pattern)
	}
	dirs, _ := filepath.Glob(filepath.Join(groups, pattern))
	return dirs
}

// makeGroups makes the control groups that the kubelet makes those of pods in, and removes those of tests that were killed.
func (n *node) makeGroups() error {
	for _, dir := range groupDirs(groupPrefix + "*") {
		if _, err := os.Stat(filepath.Join("/proc", strings.TrimPrefix(filepath.Base(dir), groupPrefix))); err != nil {
			removeGroup(dir)
		}
	}
	if unified() {
		controllers, err := os.ReadFile(filepath.Join(groups, "cgroup.controllers"))
		if err != nil {
			return err
		}
		all := []byte("+" + strings.Join(strings.Fields(string(controllers)), " +"))
		return errors.Join(
			os.WriteFile(filepath.Join(groups, "cgroup.subtree_control"), all, 0o644),
			os.Mkdir(filepath.Join(groups, n.group), 0o755),
			os.WriteFile(filepath.Join(groups, n.group, "cgroup.subtree_control"), all, 0o644),
			os.WriteFile(filepath.Join(groups, n.group, "cpu.weight"), fmt.Append(nil, 100*share), 0o644),
			os.Mkdir(n.daemons(), 0o755))
	}
	trees, err := filepath.Glob(filepath.Join(groups, "*"))
	if err != nil {
		return err
	}
	for _, tree := range trees {
		if err := os.Mkdir(filepath.Join(tree, n.group), 0o755); err != nil {
			return err
		}
	}
	for _, file := range []string{"cpuset.cpus", "cpuset.mems"} {
		all, err := os.ReadFile(filepath.Join(groups, "cpuset", file))
		if err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(groups, "cpuset", n.group, file), bytes.TrimSpace(all), 0o644); err != nil {
			return err
		}
	}
	return errors.Join(
		os.WriteFile(filepath.Join(groups, "cpu", n.group, "cpu.shares"), fmt.Append(nil, 1024*share), 0o644),
		os.Mkdir(n.daemons(), 0o755))
}

// share is how much of the processors the node gets, where others want some, too: as much as that many of their threads.
const share = 16

// daemons is the control group of everything that is not in a pod.
func (n *node) daemons() string {
	if unified() {
		return filepath.Join(groups, n.group, "node")
	}
	return filepath.Join(groups, "cpu", n.group, "node")
}

// joinGroup has this process be one of the node's, with all that it starts.
func (n *node) joinGroup() error {
	return os.WriteFile(filepath.Join(n.daemons(), "cgroup.procs"), []byte("0"), 0o644)
}

// sweepDirs removes the folders of tests that were killed.
func sweepDirs() {
	dirs, _ := filepath.Glob(filepath.Join(os.TempDir(), dirPrefix+"*"))
	for _, dir := range dirs {
		pid, _, ours := strings.Cut(strings.TrimPrefix(filepath.Base(dir), dirPrefix), "-")
		if _, err := os.Stat(filepath.Join("/proc", pid)); ours && err != nil {
			os.RemoveAll(dir)
		}
	}
}

// removeGroup removes a control group with those in it.
func removeGroup(dir string) error {
	var dirs []string
	filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			dirs = append(dirs, path)
		}
		return nil
	})
	for _, d := range slices.Backward(dirs) {
		// The kernel takes a moment to take out processes that were killed.
		err := os.Remove(d)
		for range 100 {
			if err == nil || errors.Is(err, fs.ErrNotExist) {
				break
			}
			time.Sleep(50 * time.Millisecond)
			err = os.Remove(d)
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// remove removes what the node leaves outside of its namespaces.
func (n *node) remove() (err error) {
	for _, dir := range groupDirs(n.group) {
		err = errors.Join(err, removeGroup(dir))
	}
	return errors.Join(err, os.RemoveAll(n.dir))
}
