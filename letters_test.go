package optcache

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/coredns/coredns/plugin"

	"github.com/optcache/optcache/plugin/fastpath"
	"github.com/optcache/optcache/plugin/pkg/chain"

	"github.com/miekg/dns"
)

// Clients compare names with the letters they have sent: as a nonce (0x20), or because they know no better. Each
// owner name that is the qname has this client's letters, whatever the first client or the upstream had.

const lettersName = "a.example.org."

// checkLetters checks that the question and so many owner names of a reply are name, with its letters.
func checkLetters(t *testing.T, what string, m *dns.Msg, name string, owners int) {
	t.Helper()
	if len(m.Question) != 1 || m.Question[0].Name != name {
		t.Errorf("%s: the question is %v, want %s", what, m.Question, name)
	}
	found := 0
	for _, section := range [][]dns.RR{m.Answer, m.Ns, m.Extra} {
		for _, rr := range section {
			if h := rr.Header(); strings.EqualFold(h.Name, name) {
				found++
				if h.Name != name {
					t.Errorf("%s: %s got the owner %s", what, name, h.Name)
				}
			}
		}
	}
	if found != owners {
		t.Errorf("%s: %d records of %s, want %d", what, found, name, owners)
	}
}

var spellings = []string{"A.eXaMpLe.ORG.", lettersName, "a.Example.Org.", "A.EXAMPLE.ORG."}

func TestOwnersHaveTheClientsLetters(t *testing.T) {
	large := positive()
	for i := range 3000 { // over 64 KiB when it is not compressed
		large.Answer = append(large.Answer, parsed(fmt.Sprintf("a.EXAMPLE.org. 300 IN A 10.0.%d.%d", i>>8, i&0xff))...)
	}
	tests := []struct {
		name   string
		res    *dns.Msg
		owners int
	}{
		{"addresses", positive("a.example.org. 300 IN A 192.0.2.1", "A.EXAMPLE.ORG. 300 IN A 192.0.2.2"), 2},
		{"a chain", positive("a.exaMPLE.org. 300 IN CNAME B.example.org.", "B.example.org. 300 IN A 192.0.2.1"), 1},
		{"signatures", positive("a.example.org. 300 IN A 192.0.2.1",
			"a.example.org. 300 IN RRSIG A 8 3 300 20380119031407 19990101000000 12051 example.org. lAaEzB5teQLLKyDenatmyhca7blLRg9DoGNrhe3NReBZ"), 2},
		{"NODATA at a zone's apex", negative(dns.RcodeSuccess, "A.example.org. 300 IN SOA ns.example.org. host.example.org. 1 2 3 4 300"), 1},
		{"NXDOMAIN", negative(dns.RcodeNameError, "Example.ORG. 300 IN SOA ns.example.org. host.example.org. 1 2 3 4 300"), 0},
		{"data in the additional section", &dns.Msg{MsgHdr: dns.MsgHdr{Response: true}, Extra: parsed("a.example.ORG. 300 IN SRV 0 0 53 .")}, 1},
		{"stored compressed", large, 3000},
	}
	for _, tc := range tests {
		for _, front := range []string{"", "rewrite"} {
			inBubble(t, tc.name+" "+front, func(t *testing.T) {
				o := stockOptions()
				o.stale.upTo = time.Hour
				o.coalesce = coalesceOptions{waiters: 10, wait: 2 * time.Second}
				up := &scripted{response: tc.res}
				var before []plugin.Handler
				if front != "" { // hits go as messages
					before = append(before, named{name: front})
				}
				h := startNamed(t, t.Name(), o, up, before...)
				ctx := serverContext(t)
				for _, age := range []time.Duration{0, 0, 10 * time.Minute} { // missed, hit, stale
					time.Sleep(age)
					for _, name := range spellings {
						w, _, _ := ask(ctx, h, asking(name, dns.TypeA), tcp4Client)
						checkLetters(t, fmt.Sprintf("after %v", age), unpacked(t, w.only(t)), name, tc.owners)
						synctest.Wait()
					}
				}
			})
		}
	}
}

// An upstream may change the letters of the question. The client gets its own back.
func TestQuestionHasTheClientsLetters(t *testing.T) {
	res := positive("a.example.org. 300 IN A 192.0.2.1")
	res.Question = []dns.Question{{Name: lettersName, Qtype: dns.TypeA, Qclass: dns.ClassINET}}
	h := startNamed(t, t.Name(), stockOptions(), &scripted{response: res, verbatim: true})
	for _, name := range spellings {
		w, _, _ := ask(serverContext(t), h, asking(name, dns.TypeA), tcp4Client)
		checkLetters(t, "upstream in lower case", unpacked(t, w.only(t)), name, 1)
	}
}

func TestWaitersGetTheirLetters(t *testing.T) {
	for _, ttl := range []int{300, 0} { // kept, and not
		inBubble(t, fmt.Sprintf("TTL %d", ttl), func(t *testing.T) {
			o := coalescing(10)
			o.success.minTTL = 0
			up := &slowly{takes: time.Second}
			up.reply = func(_ context.Context, _ int, w dns.ResponseWriter, r *dns.Msg) (int, error) {
				m := positive(fmt.Sprintf("%s %d IN A 192.0.2.1", r.Question[0].Name, ttl))
				m.SetReply(r)
				return dns.RcodeSuccess, w.WriteMsg(m)
			}
			h := startNamed(t, t.Name(), o, up)
			var c crowd
			for _, name := range spellings {
				c.add(serverContext(t), h, asking(name, dns.TypeA), &wireWriter{addr: udp4Client})
			}
			c.wg.Wait()
			for i, name := range spellings {
				checkLetters(t, "waiting", unpacked(t, c.members[i].only(t)), name, 1)
			}
			if n := up.asked.Load(); n != 1 {
				t.Errorf("%d queries", n)
			}
		})
	}
}

func TestVerifiedAnswersHaveTheClientsLetters(t *testing.T) {
	for _, ttl := range []int{300, 0} {
		inBubble(t, fmt.Sprintf("TTL %d", ttl), func(t *testing.T) {
			o := stockOptions()
			o.success.minTTL = 0
			o.stale = staleOptions{upTo: time.Hour, verify: true, timeout: time.Second}
			up := &scripted{response: positive("A.example.ORG. 5 IN A 192.0.2.1")}
			h := startNamed(t, t.Name(), o, up)
			for _, name := range spellings {
				w, _, _ := ask(serverContext(t), h, asking(name, dns.TypeA), udp4Client)
				checkLetters(t, "verified", unpacked(t, w.only(t)), name, 1)
				time.Sleep(10 * time.Minute)
				up.response = positive(fmt.Sprintf("A.example.org. %d IN A 192.0.2.1", ttl))
			}
		})
	}
}

func TestFastRepliesHaveTheClientsLetters(t *testing.T) {
	up := &scripted{response: positive("A.example.ORG. 300 IN CNAME a.b.", "a.b. 300 IN A 192.0.2.1", "a.b. 300 IN A 192.0.2.2")}
	h := startNamed(t, t.Name(), stockOptions(), up)
	f := newFast(t, h, "dns://"+t.Name()+":53", chain.Effects{Rotate: true})
	ask(serverContext(t), h, asking("a.EXAMPLE.org.", dns.TypeA), udp4Client)
	for _, name := range spellings {
		p, _ := asking(name, dns.TypeA).Pack()
		reply, why := f.ask(p, udp4Client)
		if why != fastpath.Answered {
			t.Fatalf("passed as %q", why)
		}
		checkLetters(t, "fast path", unpacked(t, reply), name, 1)
	}
}

func BenchmarkHitInOtherLetters(b *testing.B) {
	for _, name := range []string{"www.example.org.", "wWw.eXaMpLe.OrG."} {
		b.Run(name, func(b *testing.B) {
			h := startNamed(b, b.Name(), stockOptions(), addressUpstream)
			ctx, r := serverContext(b), asking(name, dns.TypeA)
			w := newUDPWriter()
			h.ServeDNS(ctx, w, r)
			b.ReportAllocs()
			for b.Loop() {
				h.ServeDNS(ctx, w, r)
			}
		})
	}
}
