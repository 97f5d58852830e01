//go:build linux

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// The tests of this file run on a node of their own: the test starts itself again in a new network namespace. nft and iptables show
// what is there, and take it away, as people do.

const insideVariable = "NODELOCAL_SETUP_TEST"

// why is the reason that there is no node here, or empty.
var why string

func TestMain(m *testing.M) {
	os.Setenv("PATH", os.Getenv("PATH")+":/usr/sbin:/sbin")
	if os.Getenv(insideVariable) != "" {
		lo, err := netlink.LinkByName("lo")
		if err == nil {
			err = netlink.LinkSetUp(lo)
		}
		if err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		os.Exit(m.Run())
	}
	if why = missing(); why != "" {
		os.Exit(m.Run())
	}
	c := exec.Command("/proc/self/exe", os.Args[1:]...)
	c.Env = append(os.Environ(), insideVariable+"=1")
	c.Stdin, c.Stdout, c.Stderr = os.Stdin, os.Stdout, os.Stderr
	c.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	runtime.LockOSThread() // with which the child would end
	c.Run()
	code := c.ProcessState.ExitCode()
	if code < 0 { // it has not begun, or a signal has ended it
		code = 1
	}
	os.Exit(code)
}

func missing() string {
	if os.Getuid() != 0 {
		return "only root may make a network namespace"
	}
	for _, tool := range []string{"nft", "iptables", "ip6tables"} {
		if _, err := exec.LookPath(tool); err != nil {
			return tool + " is missing: apt-get install nftables iptables"
		}
	}
	probe := exec.Command("true")
	probe.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
	if err := probe.Run(); err != nil {
		return "no network namespaces here: " + err.Error()
	}
	return ""
}

func needsNode(t *testing.T) {
	t.Helper()
	if why != "" {
		t.Skip(why)
	}
}

// command runs a command, and returns what it prints.
func command(t *testing.T, line string) string {
	t.Helper()
	words := strings.Fields(line)
	out, err := exec.Command(words[0], words[1:]...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", line, err, out)
	}
	return string(out)
}

// eventually waits until something is true, for as long as a repair may take.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(time.Minute); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if ok() {
			return
		}
	}
	t.Fatalf("not within a minute: %s", what)
}

// flags parses flags that must be right.
func flags(t *testing.T, args ...string) config {
	t.Helper()
	c, err := parse(args, os.Stderr)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// begin runs in the background. The function that it returns ends it, and waits.
func begin(t *testing.T, c config) (end func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- run(ctx, c) }()
	var ended atomic.Bool
	end = func() {
		t.Helper()
		if ended.Swap(true) {
			return
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	t.Cleanup(end)
	return end
}

// addressesOf returns the addresses of an interface, or nothing where there is none. Those that the kernel gives do not count.
func addressesOf(name string) (all []string) {
	link, err := net.InterfaceByName(name)
	if err != nil {
		return nil
	}
	addresses, _ := link.Addrs()
	for _, a := range addresses {
		if p := netip.MustParsePrefix(a.String()); !(p.Addr().Is6() && p.Addr().IsLinkLocalUnicast()) {
			all = append(all, a.String())
		}
	}
	slices.Sort(all)
	return all
}

// tableOf returns the rules of the table, without counters and handles, or nothing where there is none.
func tableOf(name string) string {
	out, _ := exec.Command("nft", "list", "table", "inet", name).Output()
	return string(out)
}

func equalLists(got []string, want ...string) bool { return slices.Equal(got, want) }

func TestOnce(t *testing.T) {
	needsNode(t)
	c := flags(t, "-once", "-interfacename", "once0", "-localip", "169.254.20.10,10.96.0.10,fd00::20:10,fd00:96::a")
	t.Cleanup(func() { errors.Join(removeRules("once0"), removeLink("once0")) })
	var tables []string
	for range 2 { // the second changes nothing
		if err := run(t.Context(), c); err != nil {
			t.Fatal(err)
		}
		if got := addressesOf("once0"); !equalLists(got, "10.96.0.10/32", "169.254.20.10/32", "fd00:96::a/128", "fd00::20:10/128") {
			t.Error(got)
		}
		// The node can serve there at once.
		for _, a := range c.addresses {
			l, err := net.Listen("tcp", netip.AddrPortFrom(a, 53).String())
			if err != nil {
				t.Fatal(err)
			}
			l.Close()
		}
		tables = append(tables, command(t, "nft -a list table inet once0"))
	}
	if tables[0] != tables[1] {
		t.Errorf("the second has changed the rules:\n%s\n%s", tables[0], tables[1])
	}
	for _, want := range []string{
		"hook prerouting priority raw", "hook output priority raw",
		`ip daddr 10.96.0.10 udp dport 53 notrack comment "NodeLocal DNSCache: requests to 10.96.0.10 by udp not tracked"`,
		"ip saddr 169.254.20.10 tcp sport 53 notrack", "ip6 daddr fd00:96::a udp dport 53 notrack", "ip6 saddr fd00::20:10 tcp sport 53 notrack",
	} {
		if !strings.Contains(tables[0], want) {
			t.Errorf("no %q in\n%s", want, tables[0])
		}
	}
	if n := strings.Count(tables[0], "notrack"); n != 4*2*3 {
		t.Errorf("%d rules in\n%s", n, tables[0])
	}
	// Fewer addresses: the others go.
	if err := run(t.Context(), flags(t, "-once", "-interfacename", "once0", "-localip", "169.254.20.10")); err != nil {
		t.Fatal(err)
	}
	if got := addressesOf("once0"); !equalLists(got, "169.254.20.10/32") {
		t.Error(got)
	}
	if got := tableOf("once0"); strings.Count(got, "notrack") != 2*3 || strings.Contains(got, "10.96") {
		t.Error(got)
	}
}

// One part without the other.
func TestSetupOfOnePart(t *testing.T) {
	needsNode(t)
	c := flags(t, "-once", "-interfacename", "part0", "-localip", "169.254.20.10", "-setupiptables=false")
	t.Cleanup(func() { errors.Join(removeRules("part0"), removeLink("part0")) })
	if err := run(t.Context(), c); err != nil || len(addressesOf("part0")) != 1 || tableOf("part0") != "" {
		t.Error(err, addressesOf("part0"), tableOf("part0"))
	}
	if err := removeLink("part0"); err != nil {
		t.Fatal(err)
	}
	c = flags(t, "-once", "-interfacename", "part0", "-localip", "169.254.20.10", "-setupinterface=false")
	if err := run(t.Context(), c); err != nil || addressesOf("part0") != nil || tableOf("part0") == "" {
		t.Error(err, addressesOf("part0"), tableOf("part0"))
	}
}

// An interface that another one has made is left as it is, at the start and at the end.
func TestInterfaceOfAnotherKind(t *testing.T) {
	needsNode(t)
	command(t, "ip link add uplink0 type veth peer name uplink1")
	t.Cleanup(func() { command(t, "ip link del uplink0") })
	command(t, "ip addr add 192.0.2.7/24 dev uplink0")
	c := flags(t, "-once", "-interfacename", "uplink0", "-localip", "169.254.20.10", "-setupiptables=false")
	for _, err := range []error{run(t.Context(), c), removeLink("uplink0")} {
		if err == nil || !strings.Contains(err.Error(), "interface uplink0") || !strings.Contains(err.Error(), "of the kind veth") {
			t.Error(err)
		}
	}
	if got := addressesOf("uplink0"); !equalLists(got, "192.0.2.7/24") {
		t.Error(got)
	}
}

// An address that the node cannot have is named, and does not keep it from the others.
func TestAddressThatTheNodeCannotHave(t *testing.T) {
	needsNode(t)
	if _, err := addLink("small0"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { command(t, "ip link del small0") })
	command(t, "ip link set small0 mtu 1000 up") // too small for IPv6
	c := flags(t, "-once", "-interfacename", "small0", "-localip", "fd00::20:10,10.96.0.10", "-setupiptables=false")
	if err := run(t.Context(), c); err == nil || !strings.Contains(err.Error(), "address fd00::20:10 of small0") || strings.Contains(err.Error(), "10.96") {
		t.Error(err)
	}
	if got := addressesOf("small0"); !equalLists(got, "10.96.0.10/32") {
		t.Error(got)
	}
}

// A list that changes while it is read is read again, but not for ever.
func TestListsAreWhole(t *testing.T) {
	times := 0
	all, err := whole(func() (int, error) {
		if times++; times < 3 {
			return 0, netlink.ErrDumpInterrupted
		}
		return times, nil
	})
	if all != 3 || err != nil {
		t.Error(all, err)
	}
	if _, err := whole(func() (int, error) { return 0, netlink.ErrDumpInterrupted }); err == nil {
		t.Error("no end")
	}
}

func TestWhatIsRemovedComesBack(t *testing.T) {
	needsNode(t)
	command(t, "iptables -A INPUT -s 192.0.2.77 -j DROP") // so that there are iptables' chains
	command(t, "ip6tables -A OUTPUT -s 2001:db8::77 -j DROP")
	t.Cleanup(func() { command(t, "nft flush ruleset") })
	end := begin(t, flags(t, "-interfacename", "back0", "-syncinterval", "500ms", "-localip", "169.254.20.10,10.96.0.10,fd00::20:10"))
	count := func() int { return strings.Count(tableOf("back0"), "notrack") }
	input := func() string { return command(t, "iptables -S INPUT") }
	whole := func() bool {
		return equalLists(addressesOf("back0"), "10.96.0.10/32", "169.254.20.10/32", "fd00::20:10/128") && count() == 3*2*3 &&
			strings.Count(input(), "-j ACCEPT") == 4 && strings.Count(command(t, "ip6tables -S OUTPUT"), "-j ACCEPT") == 2
	}
	eventually(t, "all is there", whole)
	// Ours come first, and iptables can read what is there, and write it back.
	if lines := strings.Split(input(), "\n"); !strings.Contains(lines[1], "ACCEPT") || !strings.Contains(lines[5], "192.0.2.77") {
		t.Error(input())
	}
	if !strings.Contains(input(), "-d 169.254.20.10/32 -p udp -m udp --dport 53") {
		t.Error(input())
	}
	command(t, "iptables -A FORWARD -s 192.0.2.78 -j DROP")
	if !whole() {
		t.Error(input())
	}
	for _, remove := range []string{
		"ip addr del 10.96.0.10/32 dev back0", "ip addr del fd00::20:10/128 dev back0", "ip link set back0 down", "ip link del back0",
		"nft flush chain inet back0 output", "nft flush table inet back0", "nft delete table inet back0",
		"iptables -D INPUT 1", "iptables -F INPUT", "nft flush ruleset",
	} {
		command(t, remove)
		if remove == "nft flush ruleset" { // iptables' chains went, too
			command(t, "iptables -A INPUT -s 192.0.2.77 -j DROP")
			command(t, "ip6tables -A OUTPUT -s 2001:db8::77 -j DROP")
		}
		eventually(t, "all is there after "+remove, func() bool {
			link, err := net.InterfaceByName("back0")
			return err == nil && link.Flags&net.FlagUp != 0 && whole()
		})
	}
	end()
	if addressesOf("back0") != nil || tableOf("back0") != "" || strings.Contains(input(), "-j ACCEPT") || !strings.Contains(input(), "192.0.2.77") { // what is not ours stays
		t.Error(addressesOf("back0"), tableOf("back0"), input())
	}
	if _, err := net.InterfaceByName("back0"); err == nil {
		t.Error("the interface is there")
	}
}

// What is left is left, and found.
func TestSkipTeardown(t *testing.T) {
	needsNode(t)
	t.Cleanup(func() { errors.Join(removeRules("skip0"), removeLink("skip0")) })
	end := begin(t, flags(t, "-interfacename", "skip0", "-localip", "169.254.20.10", "-skipteardown"))
	eventually(t, "all is there", func() bool { return tableOf("skip0") != "" })
	end()
	if len(addressesOf("skip0")) != 1 || strings.Count(tableOf("skip0"), "notrack") != 6 {
		t.Error(addressesOf("skip0"), tableOf("skip0"))
	}
	end = begin(t, flags(t, "-interfacename", "skip0", "-localip", "169.254.20.10"))
	end()
	if addressesOf("skip0") != nil || tableOf("skip0") != "" {
		t.Error(addressesOf("skip0"), tableOf("skip0"))
	}
}

// Two run on a node while a pod takes the place of another. Neither takes away what the other has, but for rules about requests to an
// address that the young one does not have; the last one takes all.
func TestTwo(t *testing.T) {
	needsNode(t)
	lock := filepath.Join(t.TempDir(), "lock")
	args := []string{"-interfacename", "two0", "-lock", lock, "-syncinterval", "100ms", "-localip"}
	endOld := begin(t, flags(t, append(args, "169.254.20.10,10.96.0.10")...))
	eventually(t, "the old one has all", func() bool { return strings.Count(tableOf("two0"), "notrack") == 12 })
	endYoung := begin(t, flags(t, append(args, "169.254.20.10,fd00::20:10")...))
	both := func() bool {
		return equalLists(addressesOf("two0"), "10.96.0.10/32", "169.254.20.10/32", "fd00::20:10/128") && strings.Count(tableOf("two0"), "notrack") == 18-4
	}
	eventually(t, "both have all", both)
	before := command(t, "nft -a list table inet two0")
	// An init container of a third one changes nothing for them. Its cache does not serve yet.
	if err := run(t.Context(), flags(t, append(slices.Insert(slices.Clone(args), 0, "-once", "-ready", "http://127.0.0.1:1/"), "169.254.20.10")...)); err != nil {
		t.Fatal(err)
	}
	time.Sleep(300 * time.Millisecond) // some looks of both
	if after := command(t, "nft -a list table inet two0"); after != before || !both() {
		t.Errorf("before:\n%s\nafter:\n%s", before, after)
	}
	endOld()
	neverComes(t, lock) // the third one
	eventually(t, "the young one has what it needs, and no more", func() bool {
		return equalLists(addressesOf("two0"), "169.254.20.10/32", "fd00::20:10/128") && strings.Count(tableOf("two0"), "notrack") == 12
	})
	endYoung()
	if addressesOf("two0") != nil || tableOf("two0") != "" {
		t.Error(addressesOf("two0"), tableOf("two0"))
	}
}

// neverComes makes one that is expected one that should have come long ago.
func neverComes(t *testing.T, lock string) {
	t.Helper()
	past := time.Now().Add(-comeWait)
	if err := os.Chtimes(lock, past, past); err != nil {
		t.Fatal(err)
	}
}

// Between the two containers of a pod that takes the place of another, the old pod's one leaves what the first has made, which is more
// than the old one has. It goes when the second never comes.
func TestOneThatIsThereWhileAnotherComes(t *testing.T) {
	needsNode(t)
	lock := filepath.Join(t.TempDir(), "lock")
	args := []string{"-interfacename", "more0", "-lock", lock, "-syncinterval", "100ms", "-localip"}
	has := func(n int) bool {
		return len(addressesOf("more0")) == n && strings.Count(tableOf("more0"), "notrack") == 6*n
	}
	begin(t, flags(t, append(args, "169.254.20.10")...))
	eventually(t, "the old one has all", func() bool { return has(1) })
	young := append(args, "169.254.20.10,10.96.0.10")
	for range 2 {
		if err := run(t.Context(), flags(t, append(young, "-once")...)); err != nil {
			t.Fatal(err)
		}
		for range 5 { // some looks
			if !has(2) {
				t.Fatalf("%v\n%s", addressesOf("more0"), tableOf("more0"))
			}
			time.Sleep(100 * time.Millisecond)
		}
		neverComes(t, lock)
		eventually(t, "the old one has what it needs, and no more", func() bool { return has(1) })
	}
}

// The one that came last says which addresses have queries, while the other's cache still answers what it has had.
func TestTheLastToComeSaysWhoHasQueries(t *testing.T) {
	needsNode(t)
	lock := filepath.Join(t.TempDir(), "lock")
	args := []string{"-interfacename", "less0", "-lock", lock, "-syncinterval", "100ms", "-localip"}
	has := func(requests, replies int) bool {
		text := tableOf("less0")
		return strings.Count(text, "daddr") == requests && strings.Count(text, "saddr") == replies
	}
	begin(t, flags(t, append(args, "169.254.20.10,10.96.0.10")...))
	eventually(t, "the old one has all", func() bool { return has(8, 4) })
	end := begin(t, flags(t, append(args, "169.254.20.10")...))
	eventually(t, "the address that only the old one has is asked no more", func() bool { return has(4, 4) })
	for range 10 { // some looks
		if !has(4, 4) || len(addressesOf("less0")) != 2 {
			t.Fatalf("%v\n%s", addressesOf("less0"), tableOf("less0"))
		}
		time.Sleep(100 * time.Millisecond)
	}
	end()
	neverComes(t, lock)
	eventually(t, "the old one has all again", func() bool { return has(8, 4) })
}

// One ends after the init container of another pod, and before its other container: that finds the interface, and kube-proxy has the
// queries until its cache is ready.
func TestOneThatEndsWhileAnotherComes(t *testing.T) {
	needsNode(t)
	args := []string{"-interfacename", "come0", "-lock", filepath.Join(t.TempDir(), "lock"), "-localip", "169.254.20.10,10.96.0.10"}
	end := begin(t, flags(t, args...))
	eventually(t, "the old one has all", func() bool { return strings.Count(tableOf("come0"), "notrack") == 12 })
	if err := run(t.Context(), flags(t, append(slices.Clone(args), "-once")...)); err != nil {
		t.Fatal(err)
	}
	end()
	if got := addressesOf("come0"); len(got) != 2 {
		t.Errorf("the interface has %v", got)
	}
	if got := tableOf("come0"); strings.Count(got, "notrack") != 4 || strings.Contains(got, "daddr") {
		t.Errorf("rules:\n%s", got)
	}
	end = begin(t, flags(t, args...))
	eventually(t, "the young one has all", func() bool { return strings.Count(tableOf("come0"), "notrack") == 12 })
	end()
	if addressesOf("come0") != nil || tableOf("come0") != "" {
		t.Error(addressesOf("come0"), tableOf("come0"))
	}
}

// While one takes away what is there, another one waits.
func TestOneThatComesWaitsForOneThatEnds(t *testing.T) {
	needsNode(t)
	lock := filepath.Join(t.TempDir(), "lock")
	old, err := join(lock)
	if err != nil || !old.alone() || !old.last() {
		t.Fatal(err)
	}
	came := make(chan *presence)
	go func() {
		p, err := join(lock)
		if err != nil {
			t.Error(err)
		}
		came <- p
	}()
	select {
	case <-came:
		t.Fatal("it has not waited")
	case <-time.After(200 * time.Millisecond):
	}
	old.leave()
	young := <-came
	defer young.leave()
	if !young.alone() {
		t.Error("the old one is there")
	}
	// Of two that end at the same time, one is the last.
	other, err := join(lock)
	if err != nil {
		t.Fatal(err)
	}
	defer other.leave()
	if young.last() || !other.last() {
		t.Error("nobody takes away what is there, or both do")
	}
	if _, err := join("/nonexistent/lock"); err == nil {
		t.Error("a folder that is not there")
	}
}

// A node with a pod behind a link, and kube-proxy's rule for a service: requests to its address go to a pod of cluster DNS.

const (
	podIP, gatewayIP   = "10.244.7.2", "10.244.7.1"
	podIP6, gatewayIP6 = "fd00:244::2", "fd00:244::1"
	serviceIP          = "10.96.0.10"
	serviceIP6         = "fd00:96::a"
	endpointIP         = "10.244.0.9"
	endpointIP6        = "fd00:244:9::9"
)

// pod is a network namespace. Work in it is done by a thread of its own.
type pod struct{ work chan func() }

func newPod(t *testing.T) *pod {
	t.Helper()
	p := &pod{work: make(chan func())}
	ready := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		node, err := netns.Get()
		if err == nil {
			_, err = netns.New()
		}
		if err == nil {
			err = connect(node)
		}
		ready <- err
		for f := range p.work {
			f()
		}
	}()
	if err := <-ready; err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { close(p.work); exec.Command("ip", "link", "del", "pod0").Run() })
	for _, a := range []string{gatewayIP + "/24 dev pod0", gatewayIP6 + "/64 dev pod0 nodad", endpointIP + "/32 dev lo", endpointIP6 + "/128 dev lo nodad"} {
		command(t, "ip addr replace "+a)
	}
	command(t, "ip link set pod0 up")
	return p
}

// connect links the namespace of this thread to the node's.
func connect(node netns.NsHandle) error {
	attrs := netlink.NewLinkAttrs()
	attrs.Name = "eth0"
	if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "pod0", PeerNamespace: netlink.NsFd(node)}); err != nil {
		return err
	}
	link, err := netlink.LinkByName("eth0")
	if err != nil {
		return err
	}
	for _, a := range []string{podIP + "/24", podIP6 + "/64"} {
		address, err := netlink.ParseAddr(a)
		if err != nil {
			return err
		}
		if strings.Contains(a, ":") {
			address.Flags = unix.IFA_F_NODAD
		}
		if err := netlink.AddrAdd(link, address); err != nil {
			return err
		}
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return err
	}
	for _, gateway := range []string{gatewayIP, gatewayIP6} {
		if err := netlink.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Gw: net.ParseIP(gateway)}); err != nil {
			return err
		}
	}
	return nil
}

// askTimeout is how long a pod waits for an answer, on a machine that has other things to do.
const askTimeout = 2 * time.Second

// ask sends something from the pod to port 53, and returns who answers, or the error.
func (p *pod) ask(network, ip string) string {
	answer := make(chan string)
	p.work <- func() {
		d := net.Dialer{Timeout: askTimeout}
		c, err := d.Dial(network, net.JoinHostPort(ip, "53"))
		if err != nil {
			answer <- err.Error()
			return
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(askTimeout))
		buffer := make([]byte, 64)
		_, err = c.Write([]byte("who?"))
		n := 0
		if err == nil {
			n, err = c.Read(buffer)
		}
		if err != nil {
			answer <- err.Error()
			return
		}
		answer <- string(buffer[:n])
	}
	return <-answer
}

// serve answers with a name at port 53 of an address, by UDP and TCP. The function that it returns ends that.
func serve(t *testing.T, ip, name string) (end func()) {
	t.Helper()
	u, err := net.ListenPacket("udp", net.JoinHostPort(ip, "53"))
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", net.JoinHostPort(ip, "53"))
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		buffer := make([]byte, 64)
		for {
			_, from, err := u.ReadFrom(buffer)
			if err != nil {
				return
			}
			u.WriteTo([]byte(name), from)
		}
	}()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			c.Read(make([]byte, 64))
			c.Write([]byte(name))
			c.Close()
		}
	}()
	end = func() { u.Close(); l.Close() }
	t.Cleanup(end)
	return end
}

// tracked returns how many connections to or from port 53 of an address the kernel tracks.
func tracked(t *testing.T, ip string) (n int) {
	t.Helper()
	for _, family := range []netlink.InetFamily{unix.AF_INET, unix.AF_INET6} {
		flows, err := netlink.ConntrackTableList(netlink.ConntrackTable, family)
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range flows {
			if f.Forward.DstPort == port && f.Forward.DstIP.Equal(net.ParseIP(ip)) || f.Forward.SrcPort == port && f.Forward.SrcIP.Equal(net.ParseIP(ip)) {
				n++
			}
		}
	}
	return n
}

// kubeProxy are rules of kube-proxy's kind, in both modes.
var kubeProxy = map[string][]string{
	"nftables": {
		"nft add table inet kube-proxy", "nft add chain inet kube-proxy nat { type nat hook prerouting priority dstnat ; }",
		"nft add rule inet kube-proxy nat ip daddr " + serviceIP + " meta l4proto { tcp, udp } th dport 53 dnat ip to " + endpointIP,
		"nft add rule inet kube-proxy nat ip6 daddr " + serviceIP6 + " meta l4proto { tcp, udp } th dport 53 dnat ip6 to " + endpointIP6,
	},
	"iptables": {
		"iptables -t nat -A PREROUTING -d " + serviceIP + " -p udp --dport 53 -j DNAT --to-destination " + endpointIP,
		"iptables -t nat -A PREROUTING -d " + serviceIP + " -p tcp --dport 53 -j DNAT --to-destination " + endpointIP,
		"ip6tables -t nat -A PREROUTING -d " + serviceIP6 + " -p udp --dport 53 -j DNAT --to-destination " + endpointIP6,
		"ip6tables -t nat -A PREROUTING -d " + serviceIP6 + " -p tcp --dport 53 -j DNAT --to-destination " + endpointIP6,
	},
}

// A pod that asks the service gets its answers from the cache while that serves, and from cluster DNS before, in between and after.
// The kernel tracks none of what the cache answers. So it is in both modes of kube-proxy, by IPv4 and IPv6, by UDP and TCP.
func TestServiceBeforeKubeProxy(t *testing.T) {
	needsNode(t)
	for mode, rules := range kubeProxy {
		t.Run(mode, func(t *testing.T) {
			command(t, "nft flush ruleset")
			t.Cleanup(func() { command(t, "nft flush ruleset") })
			p := newPod(t)
			for _, r := range rules {
				command(t, r)
			}
			serve(t, endpointIP, "cluster DNS")
			serve(t, endpointIP6, "cluster DNS")
			everybody := func(who string) bool {
				for _, network := range []string{"udp", "tcp"} {
					for _, ip := range []string{serviceIP, serviceIP6} {
						if got := p.ask(network, ip); got != who {
							t.Logf("%s %s: %s", network, ip, got)
							return false
						}
					}
				}
				return true
			}
			eventually(t, "packets pass", func() bool { return everybody("cluster DNS") })
			if err := netlink.ConntrackTableFlush(netlink.ConntrackTable); err != nil {
				t.Fatal(err)
			}
			if !everybody("cluster DNS") {
				t.Fatal("kube-proxy does not work")
			}
			if n := tracked(t, serviceIP) + tracked(t, serviceIP6); n != 4 {
				t.Fatalf("%d connections are tracked", n)
			}

			const local = "169.254.20.10"
			c := flags(t, "-interfacename", "proxy0", "-localip", strings.Join([]string{local, serviceIP, serviceIP6}, ","), "-ready", "http://"+local+":8181/ready")
			once := c
			once.once = true
			if err := run(t.Context(), once); err != nil {
				t.Fatal(err)
			}
			// The addresses are there, and kube-proxy has the packets.
			if !everybody("cluster DNS") {
				t.Error("before the cache is there")
			}
			end := begin(t, c)
			var cache []func()
			for _, ip := range []string{local, serviceIP, serviceIP6} {
				cache = append(cache, serve(t, ip, "cache"))
			}
			if !everybody("cluster DNS") {
				t.Error("before the cache is ready")
			}
			var ready atomic.Bool
			ready.Store(true)
			l, err := net.Listen("tcp", local+":8181")
			if err != nil {
				t.Fatal(err)
			}
			server := http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if !ready.Load() {
					w.WriteHeader(http.StatusServiceUnavailable)
				}
			})}
			go server.Serve(l)
			t.Cleanup(func() { server.Close() })
			eventually(t, "the cache has the service", func() bool { return p.ask("udp", serviceIP) == "cache" })
			before := tracked(t, serviceIP) + tracked(t, serviceIP6)
			for range 50 {
				if !everybody("cache") {
					t.Fatal("the cache does not have all of the service")
				}
			}
			if got := p.ask("udp", local); got != "cache" {
				t.Error(got)
			}
			if n := tracked(t, local); n != 0 {
				t.Errorf("%d connections of %s are tracked", n, local)
			}
			if after := tracked(t, serviceIP) + tracked(t, serviceIP6); after > before {
				t.Errorf("connections that are tracked: %d before, %d after", before, after)
			}

			// As when a pod without the address takes the place, or one with it is not there yet: something else is ready.
			cache[1]()
			eventually(t, "cluster DNS has the service that nobody serves here", func() bool { return everybody("cluster DNS") })
			cache[1] = serve(t, serviceIP, "cache")
			eventually(t, "the cache has the service", func() bool { return everybody("cache") })

			ready.Store(false)
			eventually(t, "cluster DNS has the service", func() bool { return everybody("cluster DNS") })
			ready.Store(true)
			eventually(t, "the cache has the service again", func() bool { return everybody("cache") })
			end()
			for _, stop := range cache {
				stop()
			}
			if !everybody("cluster DNS") {
				t.Error("at the end")
			}
		})
	}
}

// A firewall of iptables that drops what it does not know lets the cache's packets pass.
func TestFirewall(t *testing.T) {
	needsNode(t)
	command(t, "nft flush ruleset")
	t.Cleanup(func() { command(t, "nft flush ruleset") })
	p := newPod(t)
	for _, tool := range []string{"iptables", "ip6tables"} {
		command(t, tool+" -P INPUT DROP")
		command(t, tool+" -P OUTPUT DROP")
	}
	command(t, "ip6tables -A INPUT -p icmpv6 -j ACCEPT") // neighbours
	command(t, "ip6tables -A OUTPUT -p icmpv6 -j ACCEPT")
	if _, err := ensureLink("fire0", []netip.Addr{netip.MustParseAddr("169.254.20.10"), netip.MustParseAddr("fd00::20:10")}, true); err != nil {
		t.Fatal(err)
	}
	serve(t, "169.254.20.10", "cache")
	serve(t, "fd00::20:10", "cache")
	if got := p.ask("udp", "169.254.20.10"); !strings.Contains(got, "timeout") {
		t.Fatalf("the firewall lets pass: %s", got)
	}
	end := begin(t, flags(t, "-interfacename", "fire0", "-localip", "169.254.20.10,fd00::20:10"))
	for _, ip := range []string{"169.254.20.10", "fd00::20:10"} {
		for _, network := range []string{"udp", "tcp"} {
			eventually(t, network+" to "+ip+" passes", func() bool { return p.ask(network, ip) == "cache" })
		}
	}
	end()
}

// A node-cache that was killed leaves its rules. When its interface is ours, those about the interface's addresses go, before one of
// them does: else nothing would answer the packets that kube-proxy does not get.
func TestWhatNodeCacheHasLeft(t *testing.T) {
	needsNode(t)
	command(t, "nft flush ruleset")
	t.Cleanup(func() { command(t, "nft flush ruleset") })
	p := newPod(t)
	for _, r := range kubeProxy["iptables"] {
		command(t, r)
	}
	serve(t, endpointIP, "cluster DNS")
	serve(t, endpointIP6, "cluster DNS")

	const local, gone = "169.254.20.10", "10.96.0.11"
	if _, err := ensureLink("left0", []netip.Addr{netip.MustParseAddr(local), netip.MustParseAddr(serviceIP), netip.MustParseAddr(serviceIP6)}, true); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { errors.Join(removeRules("left0"), removeLink("left0")) })
	for ip, tool := range map[string]string{local: "iptables", serviceIP: "iptables", gone: "iptables", serviceIP6: "ip6tables"} {
		for _, r := range []string{
			"PREROUTING -p tcp -d %s --dport 53 -j NOTRACK -m comment --comment skip", "PREROUTING -p udp -d %s --dport 53 -j CT --notrack",
			"OUTPUT -p tcp -s %s --sport 53 -j CT --notrack", "OUTPUT -p udp -s %s --sport 53 -j NOTRACK",
			"OUTPUT -p tcp -d %s --dport 8080 -j NOTRACK", "OUTPUT -p tcp -s %s --sport 8080 -j NOTRACK",
		} {
			command(t, tool+" -w -t raw -A "+fmt.Sprintf(r, ip))
		}
	}
	// Rules about something else, or with another effect.
	for _, r := range []string{
		"PREROUTING -d 192.0.2.77 -p udp -j NOTRACK", "PREROUTING -p udp --dport 54 -j NOTRACK",
		"PREROUTING -d " + serviceIP + " -p udp --dport 54 -j CT --zone 7", "PREROUTING -d " + serviceIP + " -p udp -j ACCEPT",
		"OUTPUT ! -s " + serviceIP + " -p udp --sport 54 -j NOTRACK", "OUTPUT -s 10.96.0.0/28 -p udp --sport 54 -j NOTRACK",
		"OUTPUT -s 10.96.0.0/24 -d " + serviceIP + " -j NOTRACK", "OUTPUT -s " + serviceIP + " -d 192.0.2.77 -j NOTRACK",
	} {
		command(t, "iptables -w -t raw -A "+r)
	}
	raw := func() string { return command(t, "iptables -t raw -S") + command(t, "ip6tables -t raw -S") }
	before := raw()
	for _, ip := range []string{serviceIP, serviceIP6} {
		if got := p.ask("udp", ip); got == "cluster DNS" {
			t.Fatal("the rules do nothing")
		}
	}

	lock := filepath.Join(t.TempDir(), "lock")
	other, err := join(lock)
	if err != nil {
		t.Fatal(err)
	}
	// kube-proxy is to have 10.96.0.11, which the interface has no more, and fd00:96::a, at which nobody listens yet.
	c := flags(t, "-once", "-interfacename", "left0", "-lock", lock, "-ready", "http://127.0.0.1:1/", "-localip", strings.Join([]string{local, gone, serviceIP6}, ","))
	if err := run(t.Context(), c); err != nil {
		t.Fatal(err)
	}
	if got := raw(); got != before {
		t.Errorf("beside another one, it has changed\n%s\nto\n%s", before, got)
	}
	other.leave()
	if err := run(t.Context(), c); err != nil {
		t.Fatal(err)
	}
	if got := addressesOf("left0"); slices.Contains(got, serviceIP+"/32") {
		t.Error(got)
	}
	for _, network := range []string{"udp", "tcp"} {
		for _, ip := range []string{serviceIP, serviceIP6} {
			if got := p.ask(network, ip); got != "cluster DNS" {
				t.Errorf("%s %s: %s", network, ip, got)
			}
		}
	}
	var want []string
	for line := range strings.Lines(before) {
		if !strings.Contains(line, "port 53 ") && !strings.Contains(line, "port 8080 ") {
			want = append(want, line)
		}
	}
	if got := raw(); got != strings.Join(want, "") || strings.Count(got, "-A ") != 8 {
		t.Errorf("got\n%s\nwant\n%s", got, strings.Join(want, ""))
	}
}

// A probe has to fail three times.
func TestProbesThatFail(t *testing.T) {
	var fails atomic.Bool
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if fails.Load() {
			w.WriteHeader(http.StatusServiceUnavailable)
		}
	})}
	go server.Serve(l)
	defer server.Close()
	s := &setup{config: config{ready: "http://" + l.Addr().String() + "/ready"}}
	for i, step := range []struct{ fails, serving, changed bool }{
		{true, false, false}, {false, true, true}, {true, true, false}, {true, true, false}, {false, true, false},
		{true, true, false}, {true, true, false}, {true, false, true}, {true, false, false}, {false, true, true},
	} {
		fails.Store(step.fails)
		if changed := s.probe(); changed != step.changed || s.serving != step.serving {
			t.Errorf("step %d: serving %v, changed %v", i, s.serving, changed)
		}
	}
}

// The log says why a cache that has never served does not, once.
func TestCacheThatNeverServesIsTold(t *testing.T) {
	var out bytes.Buffer
	log.SetOutput(&out)
	defer log.SetOutput(os.Stderr)
	s := &setup{config: config{ready: "http://127.0.0.1:1/ready", addresses: []netip.Addr{netip.MustParseAddr("192.0.2.77")}}}
	for range 2 * toldFailures {
		s.probe()
	}
	if got := out.String(); strings.Count(got, "\n") != 1 || !strings.Contains(got, "the cache does not serve: nobody listens at 192.0.2.77:53") {
		t.Error(got)
	}
}
