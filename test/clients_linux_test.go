package test

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/miekg/dns"

	"github.com/optcache/optcache/test/child"
	"github.com/optcache/optcache/test/freeport"
)

// This file has clients and forwarders that people use, in front of a server with a fast path, over TCP and TLS. Each of them must
// get its answers, and those must come from the fast path.

// cachedHosts is how many names a server for clients has in its cache.
const cachedHosts = 100

// startForClients starts a server that has the answers for cachedHosts names in its cache, and returns the files with its
// certificate.
func startForClients(t *testing.T) (s *server, cert string) {
	t.Helper()
	u := newUpstream(t)
	cert, key, _ := certificate(t)
	text := block("dns", u.addr, "prometheus 127.0.0.1:${metrics}", fmt.Sprintf("tls %s %s", cert, key), "optcache {\n\t\tfastpath 1\n\t}")
	s = startFast(t, strings.Replace(text, "{\n", "tls://.:${tls} {\n", 1))
	askHosts(t, s, cachedHosts)
	for i := range cachedHosts { // as resolvers ask
		for _, cd := range []bool{false, true} {
			q := edns(query(hostName(i), dns.TypeA), 1232, true)
			q.CheckingDisabled = cd
			ask(t, overUDP(s.addr("dns")), q)
		}
	}
	return s, cert
}

// streamHits is how many queries on connections the fast path has answered.
func streamHits(t *testing.T, s *server) float64 {
	t.Helper()
	return sum(t, s.addr("metrics"), "coredns_optcache_fastpath_stream_hits_total")
}

// program returns the path of a program.
func program(t *testing.T, name string) string {
	t.Helper()
	for _, at := range []string{name, "/usr/sbin/" + name, "/usr/lib/systemd/" + name} {
		if path, err := exec.LookPath(at); err == nil {
			return path
		}
	}
	t.Skipf("%s is not installed", name)
	return ""
}

// runProgram starts a command that ends with the test.
func runProgram(t *testing.T, cmd *exec.Cmd) *output {
	t.Helper()
	out := &output{}
	cmd.Stdout, cmd.Stderr = out, out
	if err := child.Start(cmd); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
		if t.Failed() {
			t.Logf("%s: %s", cmd.Path, out)
		}
	})
	return out
}

// fileOf writes a file of a test, and returns its path.
func fileOf(t *testing.T, name, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

// Clients that ask several questions on one connection.
func TestClientsOverStreams(t *testing.T) {
	t.Parallel()
	s, cert := startForClients(t)
	for _, line := range []string{
		"dig @127.0.0.1 -p DNS +tcp +keepopen +short %s",
		"dig @127.0.0.1 -p TLS +tls +keepopen +short %s",
		"kdig @127.0.0.1 -p DNS +tcp +keepopen +short %s",
		"kdig @127.0.0.1 -p TLS +tls +keepopen +short %s",
		"kdig @127.0.0.1 -p TLS +tls-ca=CERT +tls-hostname=127.0.0.1 +keepopen +short %s",
	} {
		args := strings.Fields(strings.NewReplacer("DNS", s.ports["dns"], "TLS", s.ports["tls"], "CERT", cert).Replace(line))
		t.Run(strings.Join(args[:1], " "), func(t *testing.T) {
			needs(t, args[0])
			const asked = 10
			args := args[:len(args)-1]
			for i := range asked {
				args = append(args, hostName(i))
			}
			before := streamHits(t, s)
			out, err := exec.CommandContext(t.Context(), args[0], args[1:]...).CombinedOutput()
			if n := strings.Count(string(out), "192.0.2."); err != nil || n != asked {
				t.Errorf("%s: %v, %d answers\n%s", args, err, n, out)
			}
			eventually(t, func() error { // a batch is counted when it has been answered
				if n := streamHits(t, s) - before; n != asked-1 {
					return fmt.Errorf("%s: %v of %d queries were answered by the fast path", args, n, asked)
				}
				return nil
			})
		})
	}
}

// Servers that forward over connections.
func TestForwardersOverStreams(t *testing.T) {
	t.Parallel()
	s, cert := startForClients(t)
	type forwarder func(t *testing.T, port string) // starts one that listens on the port
	coredns := func(lines string) forwarder {
		return func(t *testing.T, port string) {
			start(t, fmt.Sprintf(".:%s {\n\tbind 127.0.0.1\n\terrors\n\tforward . %s\n}\n", port, lines))
		}
	}
	unbound := func(to, lines string) forwarder {
		return func(t *testing.T, port string) {
			path, dir := program(t, "unbound"), t.TempDir()
			runProgram(t, exec.Command(path, "-d", "-p", "-c", fileOf(t, "unbound.conf", fmt.Sprintf(`server:
    directory: %q
    chroot: ""
    username: ""
    pidfile: ""
    use-syslog: no
    interface: 127.0.0.1@%s
    do-not-query-localhost: no
    module-config: "iterator"
    num-threads: 1
    %s
remote-control:
    control-enable: no
forward-zone:
    name: "."
    forward-addr: 127.0.0.1@%s
    %s
`, dir, port, map[bool]string{true: "tls-cert-bundle: " + cert}[strings.Contains(lines, "tls")], s.ports[to], lines))))
		}
	}
	dnsdist := func(backend string) forwarder {
		return func(t *testing.T, port string) {
			runProgram(t, exec.Command(program(t, "dnsdist"), "--supervised", "--disable-syslog", "-C", fileOf(t, "dnsdist.conf", fmt.Sprintf(`setSecurityPollSuffix("")
setLocal("127.0.0.1:%s")
newServer({%s, checkName="host-0.example.org."})
`, port, backend))))
		}
	}
	tcp, secure := s.addr("dns"), s.addr("tls")
	for name, start := range map[string]forwarder{
		"CoreDNS, TCP": coredns(tcp + " {\n\t\tforce_tcp\n\t}"),
		"CoreDNS, TLS": coredns("tls://" + secure + " {\n\t\ttls " + cert + "\n\t}"),
		"unbound, TCP": unbound("dns", "forward-tcp-upstream: yes"),
		"unbound, TLS": unbound("tls", "forward-tls-upstream: yes"),
		"dnsdist, TCP": dnsdist(fmt.Sprintf("address=%q, tcpOnly=true", tcp)),
		"dnsdist, TLS": dnsdist(fmt.Sprintf("address=%q, tls=\"openssl\", caStore=%q, subjectAddr=\"127.0.0.1\"", secure, cert)),
	} {
		t.Run(name, func(t *testing.T) {
			port := fmt.Sprint(freeport.Port(t))
			start(t, port)
			send := overUDP(net.JoinHostPort("127.0.0.1", port))
			eventually(t, func() error {
				m, _, err := send(query(hostName(0), dns.TypeA))
				if err == nil && len(m.Answer) == 0 {
					err = errors.New(m.String())
				}
				return err
			})
			before := streamHits(t, s)
			var wg sync.WaitGroup
			for i := range 4 { // at the same time, so that some share connections
				wg.Go(func() {
					for k := i; k < cachedHosts; k += 4 {
						if m, _, err := send(query(hostName(k), dns.TypeA)); err != nil || len(m.Answer) != 1 {
							t.Errorf("%s: %v, %v", hostName(k), err, m)
							return
						}
					}
				})
			}
			wg.Wait()
			eventually(t, func() error {
				if n := streamHits(t, s) - before; n < cachedHosts*3/4 {
					return fmt.Errorf("%v of %d queries were answered by the fast path", n, cachedHosts)
				}
				return nil
			})
		})
	}
}

// The resolver of the C library with use-vc, and systemd-resolved with DNS over TLS. Both need port 53 and files in /etc, and so a
// host of their own.
func TestResolversOverStreams(t *testing.T) {
	t.Parallel()
	hosts := newHosts(t, [2][]string{{"10.98.0.1/24"}, {"10.98.0.9/24"}})
	server, client := hosts[0], hosts[1]
	cert, key, _ := certificate(t)
	const answers = "template IN A {\n\tanswer \"{{ .Name }} 300 IN A 192.0.2.1\"\n}\ntemplate IN AAAA {\n\tanswer \"{{ .Name }} 300 IN AAAA 2001:db8::1\"\n}"
	out := runProgram(t, server.command(bin, "-conf", fileOf(t, "Corefile",
		fmt.Sprintf(". tls://. {\nerrors\nprometheus 127.0.0.1:9153\ntls %s %s\noptcache {\n\tfastpath 1\n}\n%s\n}\n", cert, key, answers))))
	eventually(t, func() error {
		if !strings.Contains(out.String(), "CoreDNS-") {
			return errors.New("it does not start")
		}
		return nil
	})
	hits := func(server string) (n float64) {
		got := hosts[0].output("bash", "-c", `exec 3<>/dev/tcp/127.0.0.1/9153; printf 'GET /metrics HTTP/1.0\r\n\r\n' >&3; cat <&3`)
		for line := range strings.Lines(got) {
			if strings.HasPrefix(line, "coredns_optcache_fastpath_stream_hits_total{server=\""+server) {
				fmt.Sscan(line[strings.LastIndexByte(line, ' '):], &n)
			}
		}
		return n
	}
	t.Run("glibc", func(t *testing.T) {
		needs(t, "getent")
		client.resolvConf("nameserver 10.98.0.1\noptions use-vc timeout:5 attempts:1\n")
		defer os.RemoveAll(filepath.Join("/etc/netns", client.name))
		// It asks for both kinds of addresses on one connection.
		const times = 5
		for range times {
			if got := client.output("getent", "ahosts", "www.example.org"); !strings.Contains(got, "192.0.2.1") || !strings.Contains(got, "2001:db8::1") {
				t.Errorf("getent: %s", got)
			}
		}
		eventually(t, func() error {
			if n := hits("dns://"); n < times-1 { // the first time, they are misses
				return fmt.Errorf("%v hits", n)
			}
			return nil
		})
	})
	t.Run("systemd-resolved", func(t *testing.T) {
		needs(t, "dig", "unshare")
		path := program(t, "systemd-resolved")
		conf := fileOf(t, "resolved.conf", "[Resolve]\nDNS=10.98.0.1\nDNSOverTLS=opportunistic\nDNSSEC=no\nLLMNR=no\nMulticastDNS=no\nCache=no\n")
		// It wants a configuration, a user, and a directory in /run. It needs no systemd, and waits for a bus that never comes.
		script := fileOf(t, "start", `set -e
cp -r /etc/systemd "$1"; cp "$2" "$1/systemd/resolved.conf"; cp /etc/passwd "$1"
grep -q ^systemd-resolve: "$1/passwd" || echo 'systemd-resolve:x:65534:65534::/:/bin/false' >>"$1/passwd"
mount --bind "$1/systemd" /etc/systemd; mount --bind "$1/passwd" /etc/passwd
mount -t tmpfs tmpfs /run; mkdir -p /run/systemd/resolve; chown systemd-resolve: /run/systemd/resolve
exec "$3"
`)
		out := runProgram(t, client.command("unshare", "-m", "bash", script, t.TempDir(), conf, path))
		ask := func(name string) string {
			got, _ := client.command("dig", "@127.0.0.53", "+short", "+tries=1", "+time=5", name, "A").CombinedOutput()
			return string(got)
		}
		eventually(t, func() error {
			if got := ask("www.example.org"); got != "192.0.2.1\n" {
				return fmt.Errorf("%s%s", got, out)
			}
			return nil
		})
		before := hits("tls://")
		const times = 10
		for range times {
			if got := ask("www.example.org"); got != "192.0.2.1\n" {
				t.Errorf("it says %s", got)
			}
			time.Sleep(pollEvery)
		}
		eventually(t, func() error {
			if n := hits("tls://") - before; n < times/2 {
				return fmt.Errorf("%v of %d queries were answered by the fast path", n, times)
			}
			return nil
		})
	})
}
