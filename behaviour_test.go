package optcache

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/coredns/coredns/plugin"

	"github.com/miekg/dns"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/optcache/optcache/plugin/pkg/record"
)

// This file has the tests of what a DNS cache must get right (test/README.md has the list) that
// belong to no part of the code more than to another.

// Every line of the list names tests, and there are such tests.
func TestEveryBehaviourHasATest(t *testing.T) {
	t.Parallel()
	there := make(map[string]bool)
	declared := regexp.MustCompile(`(?m)^func ((?:Test|Fuzz|Benchmark)\w+)\(`)
	err := filepath.WalkDir(".", func(path string, _ os.DirEntry, err error) error {
		if err != nil || !strings.HasSuffix(path, "_test.go") {
			return err
		}
		text, err := os.ReadFile(path)
		for _, m := range declared.FindAllSubmatch(text, -1) {
			there[string(m[1])] = true
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	table, err := os.ReadFile("test/README.md")
	if err != nil {
		t.Fatal(err)
	}
	named := regexp.MustCompile("`((?:Test|Fuzz|Benchmark)\\w+)`")
	rows := 0
	for line := range strings.Lines(string(table)) {
		cells := strings.Split(strings.TrimSpace(line), " | ")
		if len(cells) != 2 || strings.HasPrefix(line, "|--") || !strings.HasPrefix(line, "| ") || strings.Contains(line, "| Test") {
			continue
		}
		rows++
		names := named.FindAllStringSubmatch(cells[1], -1)
		if len(names) == 0 {
			t.Errorf("no test: %s", cells[0])
		}
		for _, n := range names {
			if !there[n[1]] {
				t.Errorf("no such test as %s: %s", n[1], cells[0])
			}
		}
	}
	if rows < 40 {
		t.Errorf("only %d rows", rows)
	}
}

// AA and RA are those of the answer, whoever asks and whoever asked first (#8419).
func TestAAAndRAAreThoseOfTheAnswer(t *testing.T) {
	for bits := range 8 {
		aa, ra, whole := bits&1 != 0, bits&2 != 0, bits&4 != 0
		res := positive(aRecord)
		if !whole {
			res = negative(dns.RcodeNameError, soaRecord)
		}
		res.Authoritative, res.RecursionAvailable = aa, ra
		h := startNamed(t, fmt.Sprintf("flags/%d", bits), stockOptions(), &scripted{response: res})
		for i := range 6 { // from the miss to the hot tier
			r := asking("host.example.org.", dns.TypeA)
			r.RecursionDesired, r.Authoritative, r.RecursionAvailable = i%2 == 0, i%3 == 0, i%2 == 1
			if m := answer(t, serverContext(t), h, r); m.Authoritative != aa || m.RecursionAvailable != ra || m.RecursionDesired != r.RecursionDesired {
				t.Errorf("AA %v, RA %v, reply %d: %v", aa, ra, i, m)
			}
		}
	}
}

// What was validated is kept whoever asked first, and told to those who want to know (#4736, #5191,
// #8214).
func TestADIsForThoseWhoWantToKnow(t *testing.T) {
	plain := func(*dns.Msg) {}
	ad := func(r *dns.Msg) { r.AuthenticatedData = true }
	edns := func(r *dns.Msg) { r.SetEdns0(1232, false) }
	for i, first := range []func(*dns.Msg){plain, ad, edns} {
		res := positive(aRecord)
		res.AuthenticatedData = true
		h := startNamed(t, fmt.Sprintf("ad/%d", i), stockOptions(), &scripted{response: res})
		ask1 := func(change func(*dns.Msg)) bool {
			r := asking("host.example.org.", dns.TypeA)
			change(r)
			return answer(t, serverContext(t), h, r).AuthenticatedData
		}
		ask1(first)
		for range 3 {
			if ask1(plain) || ask1(edns) || !ask1(ad) {
				t.Errorf("first client %d: AD %v for a plain one, %v with EDNS, %v with AD", i, ask1(plain), ask1(edns), ask1(ad))
			}
		}
	}
}

// OPT is between two neighbours: neither the upstream's nor another client's gets to a client
// (#5366, #8514).
func TestOPTIsOfNobodyElse(t *testing.T) {
	res := positive(aRecord)
	res.SetEdns0(4096, true)
	res.IsEdns0().Option = []dns.EDNS0{
		&dns.EDNS0_EDE{InfoCode: dns.ExtendedErrorCodeForgedAnswer, ExtraText: "upstream"},
		&dns.EDNS0_COOKIE{Code: dns.EDNS0COOKIE, Cookie: "24a5ac122334455624a5ac1223344556"},
	}
	h := startNamed(t, t.Name(), stockOptions(), &scripted{response: res})
	for i := range 12 {
		r := asking("host.example.org.", dns.TypeA)
		if i%3 > 0 {
			r.SetEdns0(1232, false)
		}
		if i%3 > 1 {
			r.IsEdns0().Option = []dns.EDNS0{&dns.EDNS0_SUBNET{Code: dns.EDNS0SUBNET, Family: 1, SourceNetmask: 24, Address: net.IPv4(192, 0, 2, 0)}}
		}
		opt := answer(t, serverContext(t), h, r).IsEdns0()
		switch {
		case (opt != nil) != (i%3 > 0):
			t.Errorf("reply %d: OPT %v", i, opt)
		case opt != nil && (len(opt.Option) > 0 || opt.UDPSize() != 1232 || opt.Do()):
			t.Errorf("reply %d: %v", i, opt)
		}
	}
}

// An answer that is too large for the memory is served each time and not kept (CVE-2024-25590).
func TestAnswerTooLargeForTheMemoryIsServedAndNotKept(t *testing.T) {
	o := stockOptions()
	o.maxMemory = 200 << 10
	var records []string
	for i := range 2500 {
		records = append(records, fmt.Sprintf("host.example.org. 300 IN A 10.0.%d.%d", i/256, i%256))
	}
	up := &scripted{response: positive(records...)}
	h := startNamed(t, t.Name(), o, up)
	for i := range 4 {
		if m := answer(t, serverContext(t), h, asking("host.example.org.", dns.TypeA)); len(m.Answer) != len(records) {
			t.Errorf("reply %d has %d records", i, len(m.Answer))
		}
	}
	if up.asked != 4 || h.store.len(record.Success) != 0 {
		t.Errorf("asked %d times, %d entries", up.asked, h.store.len(record.Success))
	}
}

// Names that clients choose would be as many series.
func TestQnamesAreNoMetricLabels(t *testing.T) {
	o := stockOptions()
	o.prefetch = prefetchOptions{amount: 1, gap: time.Minute, percentage: 10}
	o.stale.upTo = time.Hour
	h := startNamed(t, t.Name(), o, addressUpstream)
	series := func() (n int) {
		ch := make(chan prometheus.Metric)
		go func() { collector{}.Collect(ch); close(ch) }()
		for range ch {
			n++
		}
		return n
	}
	ask(serverContext(t), h, asking("first.example.org.", dns.TypeA), udp4Client)
	before := series()
	for i := range 300 {
		for range 3 {
			ask(serverContext(t), h, asking(fmt.Sprintf("h%d.example.org.", i), dns.TypeA+uint16(i%3)), plainClients[i%4])
		}
	}
	if after := series(); after != before {
		t.Errorf("%d series became %d", before, after)
	}
}

// A client that asks again is one more waiter, and the one that it was does not wait longer for it
// (CVE-2026-42534).
func TestRetransmitDoesNotRenewTheWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up := (&slowly{takes: time.Minute}).answers()
		h := startNamed(t, t.Name(), coalescing(100), up)
		var c crowd
		first := asking("host.example.org.", dns.TypeA)
		for range 40 {
			c.add(serverContext(t), h, first.Copy(), &wireWriter{addr: udp4Client})
			time.Sleep(100 * time.Millisecond)
		}
		c.wg.Wait()
		leaders := 0
		for i, m := range c.members {
			switch {
			case m.took >= time.Minute: // it brought the query to the upstream
				leaders++
			case m.took > 4*time.Second || m.rcode != dns.RcodeServerFailure:
				t.Errorf("client %d: rcode %d after %v", i, m.rcode, m.took)
			}
		}
		if leaders != 2 {
			t.Errorf("%d clients waited for the upstream", leaders)
		}
		nobodyWaits(t, h)
	})
}

// Later plugins may change what they are given, whoever waits for it.
func TestSharedAnswerIsACopy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up := plugin.HandlerFunc(func(_ context.Context, w dns.ResponseWriter, r *dns.Msg) (int, error) {
			time.Sleep(time.Second)
			m := new(dns.Msg).SetReply(r)
			m.Answer = parsed(aRecord)
			err := w.WriteMsg(m)
			m.Answer[0].(*dns.A).A = net.IPv4bcast
			m.Answer[0].Header().Name = "spoiled."
			return dns.RcodeSuccess, err
		})
		h := startNamed(t, t.Name(), coalescing(100), up)
		var keepers []*messageKeeper
		var c crowd
		for range 20 {
			k := &messageKeeper{wireWriter: wireWriter{addr: tcp4Client}}
			keepers = append(keepers, k)
			c.wg.Go(func() {
				h.ServeDNS(serverContext(t), k, asking("host.example.org.", dns.TypeA))
				k.msg.Answer[0].Header().Name = "spoiled."
			})
		}
		c.wg.Wait()
		for i, k := range keepers {
			m := unpacked(t, k.only(t))
			if a := m.Answer[0].(*dns.A); a.Hdr.Name != "host.example.org." || a.A.String() != "192.0.2.1" {
				t.Errorf("client %d got %v", i, m)
			}
		}
	})
}
