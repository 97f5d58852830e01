package test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"
)

// The first answer comes from upstream and the next ones from memory, over every transport, with
// the TTL counting down. In the hot tier and out of it: what is asked for again and again moves.
func TestSecondAnswerIsFromMemory(t *testing.T) {
	t.Parallel()
	u := newUpstream(t)
	cert, key, trust := certificate(t)
	secure := "tls " + cert + " " + key
	s := start(t, block("dns", u.addr, "optcache")+
		"tls://"+block("tls", u.addr, "optcache", secure)+
		"https://"+block("https", u.addr, "optcache", secure))

	for name, send := range map[string]exchanger{
		"udp": overUDP(s.addr("dns")),
		"tcp": overTCP(s.addr("dns")),
		"dot": over(&dns.Client{Net: "tcp-tls", TLSConfig: trust.Clone()}, s.addr("tls")),
		"doh": overHTTPS(s.addr("https"), trust.Clone()),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			q := query(name+".example.org.", dns.TypeA)
			first := ask(t, send, q)
			if len(first.Answer) != 1 || ttl(t, first) != 300 {
				t.Fatalf("first answer: %v", first)
			}
			last := ttl(t, first)
			eventually(t, func() error {
				q.Id = dns.Id()
				again := ask(t, send, q)
				if len(again.Answer) != 1 || again.Answer[0].(*dns.A).A.String() != "192.0.2.10" {
					t.Fatalf("answer from memory: %v", again)
				}
				now := ttl(t, again)
				if now > last || last-now > 5 {
					t.Fatalf("TTL went from %d to %d", last, now)
				}
				if last = now; now > 298 {
					return fmt.Errorf("TTL is still %d", now)
				}
				return nil
			})
			if n := u.count(q.Question[0].Name, dns.TypeA); n != 1 {
				t.Errorf("upstream was asked %d times", n)
			}
		})
	}
}

// UDP and TCP are one cache: they differ only in how much fits.
func TestTransportsShareAnswers(t *testing.T) {
	t.Parallel()
	u := newUpstream(t)
	s := start(t, block("dns", u.addr, "optcache"))
	q := query("shared.example.org.", dns.TypeA)
	ask(t, overTCP(s.addr("dns")), q)
	ask(t, overUDP(s.addr("dns")), q)
	if n := u.count("shared.example.org.", dns.TypeA); n != 1 {
		t.Errorf("upstream was asked %d times", n)
	}
}

// eachPath runs a test with all queries through the chain, and with hits over UDP by the fast path. cache is the line of the
// cache.
func eachPath(t *testing.T, test func(t *testing.T, cache string)) {
	t.Parallel()
	for _, mode := range []string{"off", "auto"} {
		t.Run("fastpath "+mode, func(t *testing.T) {
			t.Parallel()
			test(t, "optcache {\n\t\tfastpath "+mode+"\n\t}")
		})
	}
}

// DO and CD are parts of the key; EDNS and its size, AD and the letters of the name are not.
func TestWhatIsAskedAnew(t *testing.T) { eachPath(t, testWhatIsAskedAnew) }

func testWhatIsAskedAnew(t *testing.T, cache string) {
	u := newUpstream(t)
	s := start(t, block("dns", u.addr, cache))
	send := overUDP(s.addr("dns"))
	signed := func(change func(*dns.Msg)) *dns.Msg {
		q := query("signed.example.org.", dns.TypeA)
		change(q)
		return q
	}
	steps := []struct {
		name  string
		q     *dns.Msg
		asked int // the upstream, so far
		rrsig bool
		ad    bool
	}{
		{name: "plain", q: signed(func(*dns.Msg) {}), asked: 1},
		{name: "EDNS", q: signed(func(m *dns.Msg) { m.SetEdns0(1232, false) }), asked: 1},
		{name: "no RD", q: signed(func(m *dns.Msg) { m.RecursionDesired = false }), asked: 1},
		{name: "letters", q: signed(func(m *dns.Msg) { m.Question[0].Name = "sIgNeD.eXaMpLe.OrG." }), asked: 1},
		{name: "AD", q: signed(func(m *dns.Msg) { m.AuthenticatedData = true }), asked: 1, ad: true},
		{name: "DO", q: signed(func(m *dns.Msg) { m.SetEdns0(1232, true) }), asked: 2, rrsig: true, ad: true},
		{name: "CD", q: signed(func(m *dns.Msg) { m.CheckingDisabled = true }), asked: 3},
		{name: "DO and CD", q: signed(func(m *dns.Msg) { m.SetEdns0(1232, true).CheckingDisabled = true }), asked: 4, rrsig: true, ad: true},
		{name: "plain again", q: signed(func(*dns.Msg) {}), asked: 4},
	}
	for _, step := range steps {
		for range 5 { // through all tiers
			m := ask(t, send, step.q)
			if rrsig := len(m.Answer) == 2; rrsig != step.rrsig || m.AuthenticatedData != step.ad {
				t.Errorf("%s: RRSIG %v, AD %v: %v", step.name, rrsig, m.AuthenticatedData, m)
			}
			if !m.RecursionAvailable || m.Authoritative {
				t.Errorf("%s: RA and AA are not upstream's: %v", step.name, m)
			}
		}
		if n := u.count("signed.example.org.", dns.TypeA); n != step.asked {
			t.Errorf("%s: upstream was asked %d times, want %d", step.name, n, step.asked)
		}
	}
}

// Denials and failures are kept, an answer that says nothing about the name is not.
func TestDenialsAndFailures(t *testing.T) { eachPath(t, testDenialsAndFailures) }

func testDenialsAndFailures(t *testing.T, cache string) {
	u := newUpstream(t)
	s := start(t, block("dns", u.addr, cache))
	send := overUDP(s.addr("dns"))
	for _, c := range []struct {
		name  string
		qtype uint16
		rcode int
		kept  bool
	}{
		{"nx.example.org.", dns.TypeA, dns.RcodeNameError, true},
		{"nodata.example.org.", dns.TypeAAAA, dns.RcodeSuccess, true},
		{"fail.example.org.", dns.TypeA, dns.RcodeServerFailure, true},
		{"refused.example.org.", dns.TypeA, dns.RcodeRefused, false},
	} {
		const times = 4
		for range times {
			m := ask(t, send, query(c.name, c.qtype))
			if m.Rcode != c.rcode || len(m.Answer) != 0 {
				t.Errorf("%s: %v", c.name, m)
			}
		}
		want := times
		if c.kept {
			want = 1
		}
		if n := u.count(c.name, c.qtype); n != want {
			t.Errorf("%s: upstream was asked %d times, want %d", c.name, n, want)
		}
	}
}

// An answer that came by TCP is cut to what a client takes by UDP, and is whole by TCP.
func TestTruncation(t *testing.T) { eachPath(t, testTruncation) }

func testTruncation(t *testing.T, cache string) {
	u := newUpstream(t)
	s := start(t, block("dns", u.addr, cache))
	q := query("big.example.org.", dns.TypeTXT)
	whole := ask(t, overTCP(s.addr("dns")), q)
	if len(whole.Answer) != 16 || whole.Truncated {
		t.Fatalf("over TCP: %d records, TC %v", len(whole.Answer), whole.Truncated)
	}
	for range 4 {
		for _, size := range []uint16{0, 512, 1232, 4096} {
			q, limit := q.Copy(), dns.MinMsgSize
			if size > 0 {
				edns(q, size, false)
				limit = int(size)
			}
			m, n := askWire(t, overUDP(s.addr("dns")), q)
			if n > limit {
				t.Errorf("%d bytes for a client that takes %d", n, limit)
			}
			if m.Truncated != (size != 4096) || m.Truncated == (len(m.Answer) == 16) {
				t.Errorf("size %d: TC %v with %d records", size, m.Truncated, len(m.Answer))
			}
		}
		if again := ask(t, overTCP(s.addr("dns")), q); again.Truncated || len(again.Answer) != 16 {
			t.Errorf("over TCP again: %d records, TC %v", len(again.Answer), again.Truncated)
		}
	}
	if n := u.count("big.example.org.", dns.TypeTXT); n != 1 {
		t.Errorf("upstream was asked %d times", n)
	}
}

// /metrics tells misses, hits by class, tier and way, and what is held.
func TestMetrics(t *testing.T) {
	t.Parallel()
	u := newUpstream(t)
	s := start(t, block("dns", u.addr, "prometheus 127.0.0.1:${metrics}", "optcache {\nfastpath off\n}"))
	send, metrics := overUDP(s.addr("dns")), s.addr("metrics")
	expect := func(want float64, metric string, labels ...string) {
		t.Helper()
		if got := sum(t, metrics, "coredns_optcache_"+metric, labels...); got != want {
			t.Errorf("%s%v is %v, want %v", metric, labels, got, want)
		}
	}
	const hits = 6
	for range 1 + hits {
		ask(t, send, query("www.example.org.", dns.TypeA))
	}
	for range 1 + 1 {
		ask(t, send, query("nx.example.org.", dns.TypeA))
	}

	expect(2, "misses_total")
	expect(hits, "hits_total", `type="success"`)
	expect(1, "hits_total", `type="denial"`)
	expect(2+hits+1, "requests_total", `server="dns://127.0.0.1:`, `zones="."`, `view=""`)
	expect(1, "entries", `type="success"`)
	expect(1, "entries", `type="denial"`)
	expect(hits+1, "tier_hits_total")
	expect(hits+1, "sent_total", `way="bytes"`)
	expect(0, "sent_total", `way="message"`)
	expect(0, "evictions_total")
	expect(0, "drops_total")
	if n := sum(t, metrics, "coredns_optcache_tier_hits_total", `tier="hot"`); n == 0 {
		t.Error("no hit in the hot tier")
	}
	if n := sum(t, metrics, "coredns_optcache_promotions_total", `tier="hot"`); n != 1 {
		t.Errorf("%v promotions into the hot tier", n)
	}
	held, limit := sum(t, metrics, "coredns_optcache_memory_bytes"), sum(t, metrics, "coredns_optcache_memory_limit_bytes")
	if held <= 0 || held > limit {
		t.Errorf("%v bytes of %v", held, limit)
	}
	// The prometheus plugin sees the rcode of hits, however they leave. It counts behind the reply.
	for rcode, want := range map[string]float64{"NOERROR": 1 + hits, "NXDOMAIN": 2} {
		eventually(t, func() error {
			got := sum(t, metrics, "coredns_dns_responses_total", fmt.Sprintf("rcode=%q", rcode))
			if got != want {
				return fmt.Errorf("prometheus counts %v %s, want %v", got, rcode, want)
			}
			return nil
		})
	}
}

// Behind loadbalance, the records of hits change places, and need no message for it.
func TestKubeadmChainRotates(t *testing.T) {
	t.Parallel()
	u := newUpstream(t)
	s := start(t, block("dns", u.addr, "prometheus 127.0.0.1:${metrics}", "loadbalance", "loop", "reload", "optcache 30 {\nfastpath off\n}"))
	send := overUDP(s.addr("dns"))
	orders := map[string]int{}
	const hits = 60 // that one of six records is always the first has a chance of 6⁻⁵⁹
	for range 1 + hits {
		m := ask(t, send, query("many.example.org.", dns.TypeA))
		if len(m.Answer) != 6 || ttl(t, m) > 30 {
			t.Fatalf("%v", m)
		}
		orders[m.Answer[0].String()]++
	}
	if len(orders) < 2 {
		t.Error("the records of hits are not rotated")
	}
	if n := u.count("many.example.org.", dns.TypeA); n != 1 {
		t.Errorf("upstream was asked %d times", n)
	}
	if n := sum(t, s.addr("metrics"), "coredns_optcache_sent_total", `way="bytes"`); n != hits {
		t.Errorf("%v of %d hits went as bytes", n, hits)
	}
}

// The binary says what it is.
func TestVersionAndPlugins(t *testing.T) {
	t.Parallel()
	if out := runBinary(t, "-version"); !strings.Contains(out, "CoreDNS-1.15.0") || !strings.Contains(out, "optcache") {
		t.Errorf("-version prints %q", out)
	}
	if out := runBinary(t, "-plugins"); !strings.Contains(out, "\noptcache\n") || !strings.Contains(out, "\ncache\n") {
		t.Errorf("-plugins prints %q", out)
	}
}

// The plugin loop finds a loop as it does behind the built-in cache: at once, and it ends the server.
func TestLoopIsFound(t *testing.T) {
	t.Parallel()
	s := launch(t, ".:${dns} {\n\tbind 127.0.0.1\n\terrors\n\toptcache\n\tloop\n\tforward . 127.0.0.1:${dns}\n}\n")
	defer s.kill()
	s.stopped = true
	if !s.waitFor("detected for zone") {
		t.Fatalf("no loop is found: %s", s.out)
	}
	select {
	case <-s.exited:
	case <-time.After(patience):
		t.Error("the server goes on")
	}
}
