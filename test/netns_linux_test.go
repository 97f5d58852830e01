package test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/optcache/optcache/test/child"
)

// This file has hosts of its own: network namespaces, joined by a pair of virtual devices. It needs the
// right to make them, and iproute2.

// host is a network namespace.
type host struct {
	t    *testing.T
	name string
}

var hostsSoFar atomic.Int64

// newHost makes a host that is on no net. err says why there are none here.
func newHost(t *testing.T) (h host, err error) {
	t.Helper()
	needs(t, "ip")
	h = host{t, fmt.Sprintf("optcache-%d-%d", os.Getpid(), hostsSoFar.Add(1))} // other tests make hosts at the same time
	if out, err := exec.Command("ip", "netns", "add", h.name).CombinedOutput(); err != nil {
		return h, fmt.Errorf("%w: %s", err, out)
	}
	t.Cleanup(func() {
		exec.Command("ip", "netns", "del", h.name).Run()
		os.RemoveAll(filepath.Join("/etc/netns", h.name))
	})
	return h, nil
}

// newHosts makes two hosts that are joined, with the addresses given.
func newHosts(t *testing.T, addresses [2][]string) (hosts [2]host) {
	t.Helper()
	run := func(args ...string) {
		t.Helper()
		if out, err := exec.Command("ip", args...).CombinedOutput(); err != nil {
			t.Fatalf("ip %s: %v: %s", strings.Join(args, " "), err, out)
		}
	}
	for i := range hosts {
		var err error
		if hosts[i], err = newHost(t); err != nil {
			t.Skipf("no network namespaces here: %v", err)
		}
	}
	run("-n", hosts[0].name, "link", "add", "veth0", "type", "veth", "peer", "name", "veth0", "netns", hosts[1].name)
	for i, h := range hosts {
		for _, dev := range []string{"lo", "veth0"} {
			run("-n", h.name, "link", "set", dev, "up")
		}
		for _, a := range addresses[i] {
			args := []string{"-n", h.name, "address", "add", a, "dev", "veth0"}
			if strings.Contains(a, ":") {
				args = append(args, "nodad")
			}
			run(args...)
		}
	}
	return hosts
}

// command is a command on the host.
func (h host) command(args ...string) *exec.Cmd {
	return exec.CommandContext(h.t.Context(), "ip", append([]string{"netns", "exec", h.name}, args...)...)
}

// output runs a command on the host and returns what it prints.
func (h host) output(args ...string) string {
	h.t.Helper()
	out, err := h.command(args...).CombinedOutput()
	if err != nil {
		h.t.Fatalf("%s: %v: %s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

// resolvConf makes text the host's /etc/resolv.conf, for the commands from now on.
func (h host) resolvConf(text string) {
	h.t.Helper()
	dir := filepath.Join("/etc/netns", h.name)
	err := os.MkdirAll(dir, 0o755)
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, "resolv.conf"), []byte(text), 0o644)
	}
	if err != nil {
		h.t.Fatal(err)
	}
}

// linkLocal returns the host's address on the link.
func (h host) linkLocal() string {
	h.t.Helper()
	var address string
	eventually(h.t, func() error { // the kernel makes sure that nobody else has it
		out := h.output("ip", "-6", "address", "show", "dev", "veth0", "scope", "link", "-tentative")
		m := regexp.MustCompile(`fe80:[0-9a-f:]+`).FindString(out)
		if m == "" {
			return fmt.Errorf("no address on the link: %s", out)
		}
		address = m
		return nil
	})
	return address
}

// Real clients on another host, by IPv4 and IPv6, to each address of a server on all of them, to one on
// single addresses, and to one on a device: each reply comes from where the query went to, and by the fast path.
func TestFastPathBetweenHosts(t *testing.T) {
	t.Parallel()
	needs(t, "dig")
	hosts := newHosts(t, [2][]string{{"10.99.0.1/24", "10.99.0.2/24", "fd99::1/64", "fd99::2/64"}, {"10.99.0.9/24", "fd99::9/64"}})
	server, client := hosts[0], hosts[1]
	linkLocal := server.linkLocal()
	client.linkLocal()
	names := filepath.Join(t.TempDir(), "names")
	if err := os.WriteFile(names, []byte("www.example.org A\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	const answers = "template IN A {\n\tanswer \"{{ .Name }} 300 IN A 192.0.2.1\"\n}\ntemplate IN AAAA {\n\trcode NOERROR\n\tauthority \"example.org. 300 IN SOA ns.example.org. h.example.org. 1 2 3 4 300\"\n}"
	for name, c := range map[string]struct {
		bind string
		to   []string
	}{
		"all":    {"", []string{"10.99.0.1", "10.99.0.2", "fd99::1", "fd99::2", linkLocal + "%veth0"}},
		"single": {"bind 10.99.0.2 fd99::2", []string{"10.99.0.2", "fd99::2"}},
		"device": {"bind veth0", []string{linkLocal + "%veth0", "10.99.0.1", "fd99::1"}},
	} {
		t.Run(name, func(t *testing.T) {
			conf := filepath.Join(t.TempDir(), "Corefile")
			text := fmt.Sprintf(".:53 {\n%s\nerrors\nprometheus 127.0.0.1:9153\noptcache {\n\tfastpath 2\n}\n%s\n}\n", c.bind, answers)
			if err := os.WriteFile(conf, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
			s := &output{}
			cmd := server.command(bin, "-conf", conf)
			cmd.Stdout, cmd.Stderr = s, s
			if err := child.Start(cmd); err != nil {
				t.Fatal(err)
			}
			defer func() {
				cmd.Process.Kill()
				cmd.Wait()
				if out := s.String(); t.Failed() || strings.Contains(out, "panic") {
					t.Errorf("the server's output: %s", out)
				}
			}()
			eventually(t, func() error {
				if !strings.Contains(s.String(), "CoreDNS-") {
					return fmt.Errorf("does not start: %s", s)
				}
				return nil
			})
			for _, to := range c.to {
				for range 3 {
					// dig takes no reply from anywhere else.
					if got := client.output("dig", "+short", "+tries=1", "+time=5", "@"+to, "www.example.org", "A"); got != "192.0.2.1\n" {
						t.Errorf("%s: %s", to, got)
					}
				}
			}
			// The resolver of the C library asks for both kinds of addresses, with one socket.
			client.resolvConf(fmt.Sprintf("nameserver %s\noptions edns0 timeout:5 attempts:1\n", c.to[0]))
			for range 3 {
				if got := client.output("getent", "ahostsv4", "www.example.org"); !strings.HasPrefix(got, "192.0.2.1") {
					t.Errorf("getent: %s", got)
				}
			}
			for _, more := range [][]string{
				{"kdig", "+short", "+timeout=5", "@" + c.to[0], "www.example.org", "A"},
				{"dnsperf", "-s", c.to[0], "-d", names, "-l", "1", "-q", "50"},
			} {
				t.Run(more[0], func(t *testing.T) {
					needs(t, more[0])
					out, err := client.command(more...).CombinedOutput()
					if err != nil || more[0] == "kdig" && string(out) != "192.0.2.1\n" || more[0] == "dnsperf" && !strings.Contains(string(out), "lost:         0 ") {
						t.Errorf("%v: %v: %s", more, err, out)
					}
				})
			}
			counted := regexp.MustCompile(`fastpath_hits_total\{[^}]*\} [1-9]`)
			eventually(t, func() error { // a batch is counted when it has been answered
				got := server.output("bash", "-c", `exec 3<>/dev/tcp/127.0.0.1/9153; printf 'GET /metrics HTTP/1.0\r\n\r\n' >&3; cat <&3`)
				if !counted.MatchString(got) {
					return fmt.Errorf("the fast path answered nothing")
				}
				return nil
			})
		})
	}
}
