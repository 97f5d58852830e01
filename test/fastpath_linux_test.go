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
	"syscall"
	"testing"
	"time"

	"github.com/miekg/dns"
)

// This file is about the fast path with real sockets. That its replies are those of the chain is held
// against cache in same_test.go, too, where it says fast.

// fastBlock is a server block with a fast path.
func fastBlock(port, upstream, options string, plugins ...string) string {
	return block(port, upstream, append(plugins, "optcache {\n\t\tfastpath "+options+"\n\t}")...)
}

// startFast is start for a server with a fast path and metrics. Until the workers are there, queries go to
// CoreDNS's own sockets, which is no loss but for who counts what.
func startFast(t testing.TB, corefile string) *server {
	t.Helper()
	s := start(t, corefile)
	waitForWorkers(t, s)
	return s
}

func waitForWorkers(t testing.TB, s *server) {
	t.Helper()
	eventually(t, func() error {
		if sum(t, s.addr("metrics"), "coredns_optcache_fastpath_workers") == 0 {
			return errors.New("the fast path has no workers")
		}
		return nil
	})
}

// fastHits is how many queries the fast path has answered.
func fastHits(t testing.TB, s *server) float64 {
	t.Helper()
	return sum(t, s.addr("metrics"), "coredns_optcache_fastpath_hits_total")
}

// askFast asks for a name until the fast path answers it: CoreDNS does not wait for its servers to begin, and where there are
// several, one may have its workers later than the others. A worker sends first, and counts then.
func askFast(t testing.TB, s *server, port, name string) {
	t.Helper()
	const asked = 4
	ask(t, overUDP(s.addr(port)), query(name, dns.TypeA)) // is a miss, unless it is there
	eventually(t, func() error {
		before := fastHits(t, s)
		for range asked {
			ask(t, overUDP(s.addr(port)), query(name, dns.TypeA))
		}
		time.Sleep(pollEvery)
		if n := fastHits(t, s) - before; n != asked {
			return fmt.Errorf("%s: %d queries, %v fast hits", name, asked, n)
		}
		return nil
	})
}

func TestFastPathAnswersAndCounts(t *testing.T) {
	t.Parallel()
	u := newUpstream(t)
	s := startFast(t, fastBlock("dns", u.addr, "", "prometheus 127.0.0.1:${metrics}"))
	send := overUDP(s.addr("dns"))
	const hits = 20
	for range 1 + hits {
		ask(t, send, query("www.example.org.", dns.TypeA))
	}
	ask(t, send, edns(query("www.example.org.", dns.TypeA), 1232, true)) // another key
	ask(t, overTCP(s.addr("dns")), query("www.example.org.", dns.TypeA))
	chaos := query("version.bind.", dns.TypeTXT)
	chaos.Question[0].Qclass = dns.ClassCHAOS
	ask(t, send, chaos)
	if n := u.count("www.example.org.", dns.TypeA); n != 2 {
		t.Errorf("the upstream was asked %d times", n)
	}
	for metric, want := range map[string]float64{
		"coredns_optcache_fastpath_hits_total":    hits,
		"coredns_optcache_fastpath_packets_total": hits + 3,
		"coredns_optcache_hits_total":             hits + 1,
		"coredns_optcache_misses_total":           3,
		"coredns_dns_requests_total":              hits + 4,
		"coredns_dns_responses_total":             hits + 4,
		"coredns_optcache_fastpath_dropped_total": 0,
		"coredns_optcache_fastpath_panics_total":  0,
	} {
		eventually(t, func() error {
			if n := sum(t, s.addr("metrics"), metric); n != want {
				return fmt.Errorf("%s is %v, want %v", metric, n, want)
			}
			return nil
		})
	}
	if n := sum(t, s.addr("metrics"), "coredns_optcache_fastpath_passed_total", `reason="packet"`); n != 1 {
		t.Errorf("%v packets were passed on as no plain query, want 1", n)
	}
}

// Several blocks on one address: the query goes to the one whose zone matches longest, and those without
// a fast path are served all the same.
func TestFastPathRoutesByZone(t *testing.T) {
	t.Parallel()
	u := newUpstream(t)
	text := fastBlock("dns", u.addr, "2", "prometheus 127.0.0.1:${metrics}") +
		strings.Replace(fastBlock("dns", u.addr, "1", "prometheus 127.0.0.1:${metrics}"), ".:${dns}", "fast.example.org:${dns} example.net:${dns} FAST2.example.org:${dns}", 1) +
		strings.Replace(block("dns", u.addr, "prometheus 127.0.0.1:${metrics}", "optcache {\nfastpath off\n}"), ".:", "slow.example.org:", 1)
	s := startFast(t, text)
	send := overUDP(s.addr("dns"))
	for name, fast := range map[string]bool{
		"www.example.org.": true, "www.fast.example.org.": true, "fast2.example.org.": true, "host.example.net.": true,
		"www.slow.example.org.": false, "slow.example.org.": false, "anslow.example.org.": true,
	} {
		before := fastHits(t, s)
		for range 4 {
			ask(t, send, query(name, dns.TypeA))
		}
		eventually(t, func() error {
			if n := fastHits(t, s) - before; (n == 3) != fast || (n == 0) == fast {
				return fmt.Errorf("%s: %v fast hits", name, n)
			}
			return nil
		})
		if n := u.count(name, dns.TypeA); n != 1 {
			t.Errorf("%s: the upstream was asked %d times", name, n)
		}
	}
	if n := sum(t, s.addr("metrics"), "coredns_optcache_fastpath_workers"); n != 2 {
		t.Errorf("%v workers, want the most that a block asks for", n)
	}
}

// Views on one address: each client gets the answers of its view from the fast path, as from cache.
func TestFastPathRoutesByView(t *testing.T) {
	t.Parallel()
	var upstreams [3]*upstream
	var text string
	options := map[string]string{"optcache": " {\n\t\tede off\n\t\tfastpath on 1\n\t}", "cache": ""}
	for i, view := range []string{"incidr(client_ip(), '127.0.0.2/32')", "name() startsWith 'www' && type() == 'A'", ""} {
		upstreams[i] = newUpstream(t)
		var plugins []string
		if view != "" {
			plugins = append(plugins, fmt.Sprintf("view v%d {\n\texpr %s\n}", i, view))
		}
		for _, name := range both {
			text += block(name, upstreams[i].addr, append(plugins, "prometheus 127.0.0.1:${metrics}", name+options[name])...)
		}
	}
	p := pair{start(t, text), nil}
	waitForWorkers(t, p.server)
	const rounds = 5 // of compare
	for _, c := range []struct {
		client, name string
		view         int
	}{{"127.0.0.2", "www.example.org.", 0}, {"127.0.0.3", "www.example.org.", 1}, {"127.0.0.3", "host.example.org.", 2}} {
		before := fastHits(t, p.server)
		compare(t, p, query(c.name, dns.TypeA), func(addr string) exchanger { return from(c.client, addr) })
		eventually(t, func() error {
			if n := fastHits(t, p.server) - before; n != rounds-1 {
				return fmt.Errorf("%v: %v fast hits", c, n)
			}
			return nil
		})
		if n := upstreams[c.view].count(c.name, dns.TypeA); n != len(both) {
			t.Errorf("%v: the upstream of the view was asked %d times", c, n)
		}
		label := fmt.Sprintf(`view="v%d"`, c.view)
		if c.view == 2 {
			label = `view=""`
		}
		eventually(t, func() error {
			ours := sum(t, p.addr("metrics"), "coredns_dns_requests_total", `server="dns://`+p.addr("optcache")+`"`, label)
			theirs := sum(t, p.addr("metrics"), "coredns_dns_requests_total", `server="dns://`+p.addr("cache")+`"`, label)
			if ours != theirs || ours != rounds {
				return fmt.Errorf("%s: %v requests of optcache, %v of cache", label, ours, theirs)
			}
			return nil
		})
	}
}

// On a wildcard address, replies come from where the query went to, over IPv4 and IPv6.
func TestFastPathOnAllAddresses(t *testing.T) {
	t.Parallel()
	u := newUpstream(t)
	s := startFast(t, strings.Replace(fastBlock("dns", u.addr, "", "prometheus 127.0.0.1:${metrics}"), "\tbind 127.0.0.1\n", "", 1))
	_, port, _ := net.SplitHostPort(s.addr("dns"))
	before := fastHits(t, s)
	asked := 0
	for _, ip := range []string{"127.0.0.1", "127.1.2.3", "::1"} {
		if c, err := net.ListenPacket("udp", net.JoinHostPort(ip, "0")); err != nil {
			t.Logf("no %s here: %v", ip, err)
			continue
		} else {
			c.Close()
		}
		for range 3 { // from a connected socket, which takes a reply from that address only
			ask(t, overUDP(net.JoinHostPort(ip, port)), query("www.example.org.", dns.TypeA))
			asked++
		}
	}
	eventually(t, func() error {
		if n := fastHits(t, s) - before; n != float64(asked-1) {
			return fmt.Errorf("%v fast hits of %d queries", n, asked)
		}
		return nil
	})
}

// What the fast path cannot stand beside is an error when the server starts, which names it.
func TestFastPathRefuses(t *testing.T) {
	t.Parallel()
	another := "example.org:0 {\nbind 127.0.0.1\n%s\nwhoami\n}\n"
	for name, c := range map[string]struct{ key, plugins, want, more string }{
		"rewrite of options":    {".", "rewrite edns0 local set 0xffee abcd", "rewrite", ""},
		"autopath":              {".", "autopath /dev/null", "autopath", ""},
		"dnstap with metadata":  {".", "dnstap /tmp/no.sock {\n\textra {/optcache/status}\n}", "dnstap", ""},
		"view by metadata":      {".", "view v {\n\texpr metadata('a/b') == 'c'\n}", "metadata in an expression of view v", ""},
		"loadbalance":           {".", "loadbalance {\n\tprefer 192.0.2.0/24\n}", "loadbalance", ""},
		"proxyproto":            {".", "proxyproto", "proxyproto", ""},
		"another protocol":      {"grpc://.", "", "grpc", ""},
		"shed":                  {".", "shed", "shed", ""},
		"shed in another block": {".", "", "shed, which server block example.org.:0", fmt.Sprintf(another, "shed")},
		"shed by another key":   {"example.net:5399 example.com", "", "shed, which server block example.org.:0", fmt.Sprintf(another, "shed")},
		"DoH by another key":    {"example.net:0 https://example.com", "", "https", ""},
		"proxyproto in another": {".", "", "proxyproto, which server block example.org.:0", fmt.Sprintf(another, "proxyproto")},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			conf := filepath.Join(t.TempDir(), "Corefile")
			text := fmt.Sprintf("%s:0 {\noptcache {\nfastpath\n}\nbind 127.0.0.1\n%s\nwhoami\n}\n%s", c.key, c.plugins, c.more)
			if err := os.WriteFile(conf, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
			var out strings.Builder
			cmd := exec.CommandContext(t.Context(), bin, "-conf", conf)
			cmd.Stderr, cmd.Stdout = &out, &out
			err := cmd.Run()
			if _, exited := err.(*exec.ExitError); !exited {
				t.Fatalf("ended with %v", err)
			}
			if got := out.String(); !strings.Contains(got, conf+":3") || !strings.Contains(got, "fastpath") || !strings.Contains(got, c.want) {
				t.Errorf("no word of %s, line 3 and %s: %s", conf, c.want, got)
			}
		})
	}
}

// Reloads lose no query: with the fast path as before, with more and fewer workers, without and with it
// again, with more and fewer sockets of CoreDNS's own, and with one that fails. Afterwards there are as many sockets and goroutines as before.
func TestFastPathReloads(t *testing.T) {
	t.Parallel()
	u := newUpstream(t)
	good := func(options string) string {
		return fastBlock("dns", u.addr, options, "prometheus 127.0.0.1:${metrics}")
	}
	slow := block("dns", u.addr, "prometheus 127.0.0.1:${metrics}", "optcache {\nfastpath off\n}")
	sockets := func(n int, text string) string { // of CoreDNS's own
		return strings.Replace(text, "errors", fmt.Sprintf("errors\n\tmultisocket %d", n), 1)
	}
	s := startFast(t, good("2"))
	stops := make([]func() int64, 4)
	for i := range stops {
		stops[i] = steady(t, s, query(fmt.Sprintf("www%d.example.org.", i), dns.TypeA))
	}
	idle := 0.0
	variants := []string{
		good("2"), good("3"), good("1"),
		slow, good("2"),
		// With fewer sockets and without the fast path, CoreDNS loses what is in those that it closes.
		sockets(3, good("2")), good("2"), slow, sockets(3, slow), sockets(3, good("2")), sockets(2, good("2")), good("2"),
		strings.Replace(good("2"), "fastpath 2", "fastpath none", 1), // refused
		good("2"),
	}
	rounds := 2
	if testing.Short() {
		rounds = 1
	}
	for round := range rounds {
		for _, text := range variants {
			s.write(text)
			if strings.Contains(text, "none") {
				s.reload(refused)
				continue
			}
			s.reload(reloaded)
		}
		if round == 0 {
			idle = sum(t, s.addr("metrics"), "go_goroutines")
		}
	}
	answered := int64(0)
	for _, stop := range stops {
		answered += stop()
	}
	t.Logf("%d queries were answered during %d reloads", answered, rounds*len(variants))
	waitForWorkers(t, s) // CoreDNS does not wait for its servers to begin
	askFast(t, s, "dns", "www0.example.org.")
	eventually(t, func() error {
		if n := sum(t, s.addr("metrics"), "go_goroutines"); n > idle+10 {
			return fmt.Errorf("%v goroutines, %v before", n, idle)
		}
		if n := sum(t, s.addr("metrics"), "coredns_optcache_fastpath_workers"); n != 2 {
			return fmt.Errorf("%v workers", n)
		}
		if n := len(listening(t, s.cmd.Process.Pid)); n != 5 { // TCP, UDP, two workers, metrics
			return fmt.Errorf("%d sockets", n)
		}
		return nil
	})
}

// The plugin reload reloads in its own way: without a signal.
func TestFastPathWithTheReloadPlugin(t *testing.T) {
	t.Parallel()
	u := newUpstream(t)
	text := fastBlock("dns", u.addr, "2", "prometheus 127.0.0.1:${metrics}", "reload 2s 1s")
	s := startFast(t, text)
	for n := range 3 {
		sockets := fmt.Sprintf("errors\n\tmultisocket %d", 1+n%2)
		s.write(strings.Replace(text, "errors", sockets, 1))
		eventually(t, func() error {
			if got := strings.Count(s.out.String(), "Reloading complete"); got != n+1 {
				return fmt.Errorf("%d of %d reloads", got, n+1)
			}
			return nil
		})
		waitForWorkers(t, s)
		askFast(t, s, "dns", "www.example.org.")
	}
}

// When the server ends, what it has received is answered.
func TestFastPathAnswersWhatItHasWhenItEnds(t *testing.T) {
	t.Parallel()
	u := newUpstream(t)
	s := start(t, fastBlock("dns", u.addr, ""))
	ask(t, overUDP(s.addr("dns")), query("www.example.org.", dns.TypeA))
	c, err := net.Dial("udp", s.addr("dns"))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	// It cannot read them while it is stopped.
	s.signal(syscall.SIGSTOP)
	const queries = 100
	for id := range queries {
		q := query("www.example.org.", dns.TypeA)
		q.Id = uint16(id)
		p, err := q.Pack()
		if err != nil {
			t.Fatal(err)
		}
		c.Write(p)
	}
	s.stopped = true
	s.signal(syscall.SIGTERM)
	s.signal(syscall.SIGCONT)
	c.SetReadDeadline(time.Now().Add(askTimeout))
	for i := range queries {
		if _, err := c.Read(make([]byte, dns.MinMsgSize)); err != nil {
			t.Fatalf("reply %d of %d: %v", i, queries, err)
		}
	}
	<-s.exited
}

// A flood of misses that wait for the upstream does not keep hits waiting, and what is too much is dropped
// and counted.
func TestFastPathUnderAFloodOfMisses(t *testing.T) {
	t.Parallel()
	const most, flood = 16384 + 4096, 40_000
	hold := make(chan struct{})
	l, pc := listen(t)
	stuck := dns.HandlerFunc(func(w dns.ResponseWriter, r *dns.Msg) {
		if !strings.HasPrefix(r.Question[0].Name, "www.") {
			<-hold
		}
		w.WriteMsg(answer(r))
	})
	for _, s := range []*dns.Server{{Listener: l, Handler: stuck}, {PacketConn: pc, Handler: stuck}} {
		go s.ActivateAndServe()
		t.Cleanup(func() { s.Shutdown() })
	}
	defer close(hold)
	s := startFast(t, fmt.Sprintf(".:${dns} {\n\tbind 127.0.0.1\n\tprometheus 127.0.0.1:${metrics}\n\toptcache {\n\t\tfastpath\n\t\tcoalesce 1000000 1m\n\t}\n\tforward . %s {\n\t\tforce_tcp\n\t}\n}\n", l.Addr()))
	send := overUDP(s.addr("dns"))
	ask(t, send, query("www.example.org.", dns.TypeA))

	// All for one name, so that one of them goes to the upstream and the others wait.
	var clients sync.WaitGroup
	for range 4 {
		clients.Go(func() {
			c, err := net.Dial("udp", s.addr("dns"))
			if err != nil {
				t.Error(err)
				return
			}
			defer c.Close()
			p, err := query("stuck.example.org.", dns.TypeA).Pack()
			if err != nil {
				t.Error(err)
				return
			}
			for i := range flood / 4 {
				c.Write(p)
				if i%32 == 0 {
					time.Sleep(time.Millisecond)
				}
			}
		})
	}
	// The kernel drops what comes while a socket is full, hits among it. A client asks again then.
	worst, again := time.Duration(0), 0
	for range 200 {
		start := time.Now()
		ask(t, func(m *dns.Msg) (*dns.Msg, int, error) {
			reply, n, err := send(m)
			if err != nil {
				again++
				return send(m)
			}
			worst = max(worst, time.Since(start))
			return reply, n, nil
		}, query("www.example.org.", dns.TypeA))
	}
	clients.Wait()
	if again > 10 {
		t.Errorf("%d of 200 hits were lost", again)
	}
	dropped := sum(t, s.addr("metrics"), "coredns_optcache_fastpath_dropped_total")
	received := sum(t, s.addr("metrics"), "coredns_optcache_fastpath_packets_total")
	waiting := sum(t, s.addr("metrics"), "coredns_optcache_coalesce_waiting")
	t.Logf("%v packets, %v requests wait, %v dropped; the slowest hit took %v", received, waiting, dropped, worst)
	if received > most+1000 && dropped == 0 {
		t.Error("nothing was dropped")
	}
	if waiting > most {
		t.Errorf("%v requests wait", waiting)
	}
	ask(t, send, query("www.example.org.", dns.TypeA))
}
