package optcache

import (
	"context"
	"fmt"
	"net"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/coredns/coredns/plugin"

	"github.com/coredns/coredns/plugin/pkg/response"

	"github.com/miekg/dns"

	"github.com/optcache/optcache/plugin/fastpath"
	"github.com/optcache/optcache/plugin/pkg/admit"
	"github.com/optcache/optcache/plugin/pkg/chain"
	"github.com/optcache/optcache/plugin/pkg/clock"
	"github.com/optcache/optcache/plugin/pkg/record"
	"github.com/optcache/optcache/plugin/pkg/snapshot"
)

// This file is about what ends an answer, and what must not, where there is more than one place that answers come from:
// two stores while a reload moves them, a snapshot, a refresh that is late, and signatures.

// moving returns an instance of the next generation, in another store. Nothing has moved there yet.
func moving(t *testing.T, h *Optcache, o options) *Optcache {
	t.Helper()
	o.maxMemory *= 2
	next := nextOf(t, h, o)
	next.clock = systemNow
	if next.store == h.store || next.store.from.Load() != h.store {
		t.Fatal("the answers do not move")
	}
	return next
}

// agedToMove is aged for an instance that another one can take the place of.
func agedToMove(t *testing.T, o options, age time.Duration) (*Optcache, *upstream) {
	t.Helper()
	up := new(upstream)
	up.answersWith(0, oldRecord)
	h := firstOf(t, o, up)
	h.clock = systemNow
	if got := client(t, h).first(); got != oldData {
		t.Fatalf("got %s", got)
	}
	up.queries()
	time.Sleep(age)
	return h, up
}

// fastReply asks the fast path for host.example.org. It returns nil when the packet goes the slow path.
func fastReply(t *testing.T, h *Optcache) *dns.Msg {
	t.Helper()
	f := newFast(t, h, "dns://"+t.Name()+":53", chain.Effects{})
	p, err := asking("host.example.org.", dns.TypeA).Pack()
	if err != nil {
		t.Fatal(err)
	}
	reply, why := f.ask(p, udp4Client)
	if why != fastpath.Answered {
		return nil
	}
	return unpacked(t, reply)
}

// A failure in one store does not hide an answer that lives in the other one, in either direction.
func TestFailuresHideNothingWhileAnswersMove(t *testing.T) {
	for _, name := range []string{"SERVFAIL", "NOTIMP", "empty", "referral"} {
		m := saysNothing[name]
		inBubble(t, "answer in the old store/"+name, func(t *testing.T) {
			o := prefetching(1)
			h, up := agedToMove(t, o, 40*time.Second)
			next := moving(t, h, o)
			up.responds(0, m)
			for range 5 {
				if got := client(t, next); got.first() != oldData {
					t.Fatalf("got %v", got)
				}
				synctest.Wait()
			}
			if next.store.total() == 0 {
				t.Fatal("the failure has not been kept")
			}
			next.prefetch.amount = 0 // what is due never is for the fast path
			if m := fastReply(t, next); m != nil && (served{Msg: m}).first() != oldData {
				t.Errorf("by the fast path: %v", m)
			}
			h.stop()
			if got := client(t, settled(next)); got.first() != oldData {
				t.Errorf("after the move: %v", got)
			}
			if m := fastReply(t, next); m == nil || (served{Msg: m}).first() != oldData {
				t.Errorf("after the move, by the fast path: %v", m)
			}
		})
		inBubble(t, "answer in the new store/"+name, func(t *testing.T) {
			o := stockOptions()
			up := new(upstream)
			h := firstOf(t, o, up)
			h.clock = systemNow
			up.responds(0, m)
			client(t, h)
			next := moving(t, h, o)
			up.answersWith(0, oldRecord)
			// The failure is alive, and found by the next generation, too.
			s, _ := next.scratchFor(asking("host.example.org.", dns.TypeA), udp4Client)
			next.store.insert(s, &record.Entry{Stored: next.clock(), TTL: 60, Counts: [3]uint16{1}}, packedBody(t, s, positive(oldRecord)), "", next.clock())
			h.store.to.Store(next.store) // as when the move begins
			if got := client(t, h); got.first() != oldData {
				t.Errorf("to the old generation: %v", got)
			}
			if m := fastReply(t, h); m != nil && (served{Msg: m}).first() != oldData {
				t.Errorf("by the fast path of the old generation: %v", m)
			}
		})
	}
}

// packedBody returns the body of m, and leaves its TTL offsets in s.
func packedBody(t *testing.T, s *scratch, m *dns.Msg) []byte {
	t.Helper()
	m.Question = asking("host.example.org.", dns.TypeA).Question
	body, ok := admit.Pack(&s.Buffer, m, new(record.Entry))
	if !ok {
		t.Fatal("not packed")
	}
	return body
}

// News that cannot be kept end the stale answer in each store that it may be in, or come from.
func TestNewsEndTheStaleAnswerWhileAnswersMove(t *testing.T) {
	for name, m := range ends {
		for mode, set := range staleModes {
			o := stale(set)
			o.success.minTTL, o.denial.minTTL = 0, 0
			gone := func(t *testing.T, h *Optcache) {
				t.Helper()
				if got := client(t, h); got.first() != "SERVFAIL" {
					t.Errorf("the old answer is back: %v", got)
				}
				synctest.Wait()
			}
			inBubble(t, "it has not moved/"+mode+"/"+name, func(t *testing.T) {
				h, up := agedToMove(t, o, 70*time.Second)
				next := moving(t, h, o)
				up.responds(0, m)
				client(t, next)
				synctest.Wait()
				up.fails(0)
				gone(t, next)
				h.stop()
				gone(t, settled(next))
			})
			inBubble(t, "it has moved meanwhile/"+mode+"/"+name, func(t *testing.T) {
				h, up := agedToMove(t, o, 70*time.Second)
				up.responds(3*time.Second, m)
				var asked sync.WaitGroup
				asked.Go(func() { ask(serverContext(t), h, asking("host.example.org.", dns.TypeA), udp4Client) })
				time.Sleep(time.Second)
				next := moving(t, h, o)
				h.stop()
				if n := settled(next).store.total(); n != 1 {
					t.Fatalf("%d entries have moved, want 1", n)
				}
				time.Sleep(3 * time.Second)
				asked.Wait()
				synctest.Wait()
				up.fails(0)
				gone(t, next)
			})
		}
	}
}

// snapshotOf returns a record of a snapshot: host.example.org. with the data of oldRecord, or of these records.
func snapshotOf(t *testing.T, age time.Duration, do bool, records ...string) *snapshot.Record {
	t.Helper()
	m := asking("host.example.org.", dns.TypeA)
	m.Response, m.Answer = true, parsed(records...)
	b, err := m.Pack()
	if err != nil {
		t.Fatal(err)
	}
	return &snapshot.Record{Response: b, Stored: time.Now().Add(-age), DO: do, TTL: 60}
}

// What a snapshot has under a key is older than what has come from upstream while it was read, even if that was not kept.
func TestSnapshotBringsNothingBackThatHasEnded(t *testing.T) {
	for name, m := range ends {
		for state, age := range map[string]time.Duration{"alive": 10 * time.Second, "stale": 100 * time.Second} {
			inBubble(t, state+"/"+name, func(t *testing.T) {
				o := stale(func(*staleOptions) {})
				o.success.minTTL, o.denial.minTTL = 0, 0
				up := new(upstream)
				h := startNamed(t, t.Name(), o, up)
				h.store.ended.Store(new(endings)) // as when the reading begins
				up.responds(0, m)
				client(t, h)
				if why := h.admit(newScratch(), new(dns.Msg), snapshotOf(t, age, false, oldRecord), momentOf(h, time.Now()), nil); why != refusedRoom {
					t.Errorf("refused as %q", refusalNames[why])
				}
				up.fails(0)
				if got := client(t, h); got.first() != "SERVFAIL" {
					t.Errorf("the old answer is back: %v", got)
				}
				// An answer that has come since is kept.
				up.answersWith(0, newRecord)
				time.Sleep(10 * time.Second)
				client(t, h)
				synctest.Wait()
				up.fails(0)
				if got := client(t, h); got.first() != newData {
					t.Errorf("a new answer: %v", got)
				}
			})
		}
	}
	// What says nothing ends nothing there, either.
	for name, m := range saysNothing {
		inBubble(t, "says nothing/"+name, func(t *testing.T) {
			up := new(upstream)
			h := startNamed(t, t.Name(), stale(func(*staleOptions) {}), up)
			h.store.ended.Store(new(endings))
			up.responds(0, m)
			client(t, h)
			if why := h.admit(newScratch(), new(dns.Msg), snapshotOf(t, 10*time.Second, false, oldRecord), momentOf(h, time.Now()), nil); why != refusedNot {
				t.Errorf("refused as %q", refusalNames[why])
			}
			if got := client(t, h); got.first() != oldData {
				t.Errorf("got %v", got)
			}
		})
	}
}

// What is remembered for a snapshot is bounded, and forgotten when the snapshot has been read.
func TestEndingsAreBounded(t *testing.T) {
	var e endings
	for hash := range uint64(maxEndings + 100) {
		e.add(hash<<16, 1) // the bits below have the owner
	}
	if n := len(e.at); n != maxEndings {
		t.Errorf("%d are remembered, want %d", n, maxEndings)
	}
	h := fromFile(t, filepath.Join(t.TempDir(), "answers"), stockOptions(), new(census), 0)
	for h.store.ended.Load() != nil {
		time.Sleep(time.Millisecond)
	}
}

// With prefer_positive, only another answer ends an answer.
func TestPreferPositiveEndsByAnswersOnly(t *testing.T) {
	const cut = "cut off"
	news := map[string]*dns.Msg{cut: with(negative(dns.RcodeNameError), func(m *dns.Msg) { m.Truncated = true })}
	for name, m := range ends {
		news[name] = m
	}
	news["NXDOMAIN behind a CNAME"] = with(negative(dns.RcodeNameError, soaRecord), func(m *dns.Msg) {
		m.Answer = parsed(alias("host.example.org.", "t.example.net."))
	})
	for name, m := range news {
		for mode, set := range staleModes {
			inBubble(t, mode+"/"+name, func(t *testing.T) {
				o := stale(set)
				o.stale.preferPositive = true
				o.success.minTTL, o.denial.minTTL = 0, 0
				h, up := aged(t, "prefer/"+t.Name(), o, 70*time.Second)
				up.responds(0, m)
				client(t, h)
				synctest.Wait()
				up.fails(0)
				want := oldData
				if name == "address of TTL 0" {
					want = "SERVFAIL"
				}
				if got := client(t, h); got.first() != want {
					t.Errorf("got %v, want %s", got, want)
				}
			})
		}
	}
}

// byTransport answers with records to those who ask by TCP, or take 4096 bytes, and cuts off what others get.
func (u *upstream) byTransport(takes time.Duration, records ...string) {
	u.script(takes, func(_ context.Context, w dns.ResponseWriter, r *dns.Msg) (int, error) {
		m := new(dns.Msg).SetReply(r)
		_, tcp := w.RemoteAddr().(*net.TCPAddr)
		if opt := r.IsEdns0(); tcp || opt != nil && opt.UDPSize() >= 4096 {
			if len(records) == 0 {
				return dns.RcodeServerFailure, errUpstream
			}
			m.Answer = parsed(records...)
		} else {
			m.Truncated = true
		}
		return dns.RcodeSuccess, w.WriteMsg(m)
	})
}

// News that are cut off and come late are fetched over TCP for the next clients.
func TestTruncationThatComesLate(t *testing.T) {
	o := stale(func(s *staleOptions) { s.verify, s.timeout, s.recheck = true, time.Second, time.Minute })
	inBubble(t, "TCP has it", func(t *testing.T) {
		h, up := aged(t, t.Name(), o, 70*time.Second)
		up.byTransport(2*time.Second, newRecord)
		if got := client(t, h); got.first() != oldData || got.took != time.Second {
			t.Errorf("got %v after %v", got, got.took)
		}
		time.Sleep(5 * time.Second)
		if n := len(up.queries()); n != 2 {
			t.Errorf("%d queries, want 2", n)
		}
		up.fails(0)
		if got := client(t, h); got.first() != newData {
			t.Errorf("the next client got %v", got)
		}
	})
	inBubble(t, "TCP fails", func(t *testing.T) {
		h, up := aged(t, t.Name(), o, 70*time.Second)
		up.byTransport(2 * time.Second)
		for i, want := range []int{2, 0, 0} {
			if got := client(t, h); got.first() != oldData {
				t.Errorf("got %v", got)
			}
			time.Sleep(5 * time.Second)
			if n := len(up.queries()); n != want {
				t.Errorf("client %d: %d queries, want %d", i, n, want)
			}
		}
	})
	inBubble(t, "to another question", func(t *testing.T) {
		h, up := aged(t, t.Name(), stale(func(s *staleOptions) { s.verify, s.recheck = true, time.Minute }), 70*time.Second)
		up.script(0, func(_ context.Context, w dns.ResponseWriter, r *dns.Msg) (int, error) {
			m := new(dns.Msg).SetReply(r)
			m.Truncated, m.Question[0].Qtype = true, dns.TypeMX
			return dns.RcodeSuccess, w.WriteMsg(m)
		})
		for i, want := range []int{1, 0} {
			if got := client(t, h); got.first() != oldData || got.Truncated {
				t.Errorf("got %v", got)
			}
			if n := len(up.queries()); n != want {
				t.Errorf("client %d: %d queries, want %d", i, n, want)
			}
		}
	})
}

// Those who wait for what is cut off, and can take more, get it whole.
func TestTruncationIsForThoseWhoAskSo(t *testing.T) {
	inBubble(t, "verify", func(t *testing.T) {
		h, up := aged(t, t.Name(), stale(func(s *staleOptions) { s.verify = true }), 70*time.Second)
		up.byTransport(100*time.Millisecond, newRecord)
		clients := map[string]*wireWriter{"UDP": {addr: udp4Client}, "UDP beside": {addr: udp4Client}, "TCP": {addr: tcp4Client}, "4096": {addr: udp4Client}}
		var all sync.WaitGroup
		for _, name := range []string{"UDP", "UDP beside", "TCP", "4096"} {
			r := asking("host.example.org.", dns.TypeA)
			if name == "4096" {
				r.SetEdns0(4096, false)
			}
			all.Go(func() { h.ServeDNS(serverContext(t), clients[name], r) })
			time.Sleep(10 * time.Millisecond)
		}
		all.Wait()
		for name, w := range clients {
			m := unpacked(t, w.only(t))
			if cut := name == "UDP" || name == "UDP beside"; m.Truncated != cut || !cut && (served{Msg: m}).first() != newData {
				t.Errorf("%s: %v", name, m)
			}
		}
		nobodyWaits(t, h)
	})
}

// A refresh in the background asks over TCP. If its response is cut off all the same, the stale answer is served on
// to the end of its window, and not beyond.
func TestImmediateRefreshThatIsCutOff(t *testing.T) {
	inBubble(t, "immediate", func(t *testing.T) {
		h, up := aged(t, t.Name(), stale(func(s *staleOptions) { s.recheck = 10 * time.Second }), 70*time.Second)
		cut := with(positive(), func(m *dns.Msg) { m.Truncated = true })
		up.responds(0, cut)
		for second := range 25 {
			if got := client(t, h); got.first() != oldData || got.Truncated {
				t.Fatalf("got %v", got)
			}
			synctest.Wait()
			want := 0
			if second%10 == 0 {
				want = 1
			}
			if n := len(up.queries()); n != want {
				t.Errorf("second %d: %d queries, want %d", second, n, want)
			}
			time.Sleep(time.Second)
		}
		time.Sleep(time.Hour)
		if got := client(t, h); !got.Truncated {
			t.Errorf("after the window: %v", got)
		}
	})
}

// odd are responses that say nothing of the question.
var odd = map[string]func(*dns.Msg){
	"no response":      func(m *dns.Msg) { m.Response = false },
	"NOTIFY":           func(m *dns.Msg) { m.Opcode = dns.OpcodeNotify },
	"other name":       func(m *dns.Msg) { m.Question[0].Name = "other.example.org." },
	"other type":       func(m *dns.Msg) { m.Question[0].Qtype = dns.TypeAAAA },
	"other class":      func(m *dns.Msg) { m.Question[0].Qclass = dns.ClassCHAOS },
	"no question":      func(m *dns.Msg) { m.Question = nil },
	"two questions":    func(m *dns.Msg) { m.Question = append(m.Question, m.Question[0]) },
	"cut off":          func(m *dns.Msg) { m.Truncated = true },
	"REFUSED with it":  func(m *dns.Msg) { m.Rcode = dns.RcodeRefused },
	"SERVFAIL with it": func(m *dns.Msg) { m.Rcode = dns.RcodeServerFailure },
	"FORMERR with it":  func(m *dns.Msg) { m.Rcode = dns.RcodeFormatError },
	"NOTIMP with it":   func(m *dns.Msg) { m.Rcode = dns.RcodeNotImplemented },
}

// An upstream error changes neither an answer that lives nor one that is stale. What goes with it counts for nothing.
func TestUpstreamErrorsChangeNothing(t *testing.T) {
	modes := map[string]options{"prefetch": prefetching(1)}
	for mode, set := range staleModes {
		modes[mode] = stale(set)
		prefer := stale(set)
		prefer.stale.preferPositive = true
		modes[mode+", prefer_positive"] = prefer
	}
	for mode, o := range modes {
		for _, denies := range []bool{false, true} {
			for name, change := range odd {
				inBubble(t, fmt.Sprintf("%s/%s/%v", mode, name, denies), func(t *testing.T) {
					age := 70 * time.Second
					if mode == "prefetch" {
						age = 40 * time.Second
					}
					h, up := aged(t, t.Name(), o, age)
					up.script(0, func(_ context.Context, w dns.ResponseWriter, r *dns.Msg) (int, error) {
						m := new(dns.Msg).SetReply(r)
						if m.Answer = parsed(newRecord); denies {
							m.Rcode, m.Answer, m.Ns = dns.RcodeNameError, nil, parsed(soaRecord)
						}
						change(m)
						return dns.RcodeSuccess, w.WriteMsg(m)
					})
					for range 3 {
						got := client(t, h)
						if told := name == "cut off" && o.stale.verify; !told && got.first() != oldData {
							t.Fatalf("got %v", got)
						}
						if mode == "prefetch" && got.ttl() > 20 {
							t.Errorf("TTL %d", got.ttl())
						}
						synctest.Wait()
						time.Sleep(time.Second)
					}
					up.fails(0)
					if got := client(t, h); got.first() != oldData {
						t.Errorf("after that: %v", got)
					}
				})
			}
		}
	}
}

// sigUntil is a signature of host.example.org. that ends in so many seconds.
func sigUntil(owner string, seconds int) string {
	now := time.Now().UTC()
	const layout = "20060102150405"
	return fmt.Sprintf("%s 300 IN RRSIG A 8 3 300 %s %s 12051 example.org. lAaEzB5teQLLKyDenatmyhca7blLRg9D",
		owner, now.Add(time.Duration(seconds)*time.Second).Format(layout), now.Add(-time.Hour).Format(layout))
}

// signedClient asks for host.example.org. with DO.
func signedClient(t *testing.T, h *Optcache) *dns.Msg {
	t.Helper()
	r := asking("host.example.org.", dns.TypeA)
	r.SetEdns0(1232, true)
	w, rcode, _ := ask(serverContext(t), h, r, udp4Client)
	if len(w.packets) == 0 {
		return new(dns.Msg).SetRcode(r, rcode)
	}
	return unpacked(t, w.only(t))
}

// The first signature of all sections counts, in answers and denials, whatever MINTTL says.
func TestFirstSignatureCounts(t *testing.T) {
	for name, c := range map[string]struct {
		rcode           int
		answer, ns, add []string
	}{
		"several":               {answer: []string{aRecord, sigUntil("host.example.org.", 0)}},
		"authority":             {answer: []string{aRecord}, ns: []string{"example.org. 300 IN NS ns.example.org.", "example.org."}},
		"additional":            {answer: []string{aRecord}, add: []string{"ns.example.org. 300 IN A 192.0.2.9", "ns.example.org."}},
		"NXDOMAIN":              {rcode: dns.RcodeNameError, ns: []string{soaRecord, "example.org."}},
		"NODATA":                {ns: []string{soaRecord, "example.org."}},
		"CNAME, then NXDOMAIN":  {rcode: dns.RcodeNameError, answer: []string{alias("host.example.org.", "t.example.org."), "host.example.org."}, ns: []string{soaRecord}},
		"CNAME, then no record": {answer: []string{alias("host.example.org.", "t.example.org."), "host.example.org."}, ns: []string{soaRecord}},
	} {
		inBubble(t, name, func(t *testing.T) {
			o := stockOptions()
			o.success.minTTL, o.denial.minTTL = 100*time.Second, 100*time.Second
			m := negative(c.rcode)
			sections := [...]*[]dns.RR{&m.Answer, &m.Ns, &m.Extra}
			for i, rrs := range [][]string{c.answer, c.ns, c.add} {
				for n, rr := range rrs {
					if n == 1 { // signatures by different keys
						owner := dns.Fqdn(parsed(rrs[0])[0].Header().Name)
						*sections[i] = append(*sections[i], parsed(sigUntil(owner, 90), sigUntil(owner, 20), sigUntil(owner, 50))...)
						continue
					}
					*sections[i] = append(*sections[i], parsed(rr)...)
				}
			}
			up := new(upstream)
			up.responds(0, m)
			h := startNamed(t, t.Name(), o, up)
			for second := range 20 {
				got := signedClient(t, h)
				for _, rr := range append(append(got.Answer, got.Ns...), got.Extra...) {
					if ttl := rr.Header().Ttl; rr.Header().Rrtype != dns.TypeOPT && ttl != uint32(20-second) {
						t.Fatalf("second %d: %v", second, rr)
					}
				}
				time.Sleep(time.Second)
			}
			if n := len(up.queries()); n != 1 {
				t.Errorf("%d queries, want 1", n)
			}
			if signedClient(t, h); len(up.queries()) != 1 {
				t.Error("served beyond the end of its signature")
			}
		})
	}
}

// What a prefetch brings lives no longer than its signatures, and what has bad ones is served, but neither kept nor
// counted as news.
func TestSignaturesOfRefreshes(t *testing.T) {
	inBubble(t, "prefetch", func(t *testing.T) {
		o := prefetching(1)
		o.keepTTL = true
		up := new(upstream)
		h := startNamed(t, t.Name(), o, up)
		up.answersWith(0, oldRecord, sigUntil("host.example.org.", 1000))
		signedClient(t, h)
		time.Sleep(40 * time.Second)
		up.answersWith(0, newRecord, sigUntil("host.example.org.", 7))
		signedClient(t, h)
		synctest.Wait()
		up.fails(0)
		for second := range 7 {
			m := signedClient(t, h)
			if (served{Msg: m}).first() != newData || m.Answer[0].Header().Ttl != uint32(7-second) {
				t.Errorf("second %d: %v", second, m)
			}
			synctest.Wait()
			time.Sleep(time.Second)
		}
		if m := signedClient(t, h); len(m.Answer) != 0 {
			t.Errorf("after the end: %v", m)
		}
	})
	for name, sig := range map[string]string{"expired": expiredSig, "future": futureSig} {
		inBubble(t, name, func(t *testing.T) {
			up := new(upstream)
			h := startNamed(t, t.Name(), stockOptions(), up)
			up.answersWith(0, aRecord, sig)
			for range 2 {
				if m := signedClient(t, h); len(m.Answer) != 2 || m.Answer[0].Header().Ttl != 0 {
					t.Errorf("got %v", m)
				}
			}
			if n := len(up.queries()); n != 2 || h.store.total() != 0 {
				t.Errorf("%d queries, %d entries", n, h.store.total())
			}
			client(t, h) // who has not asked for signatures does not look at them
			client(t, h)
			if n := len(up.queries()); n != 1 {
				t.Errorf("%d queries without DO, want 1", n)
			}
		})
		for mode, set := range staleModes {
			inBubble(t, mode+"/"+name, func(t *testing.T) {
				up := new(upstream)
				h := startNamed(t, t.Name(), stale(set), up)
				up.answersWith(0, oldRecord, sigUntil("host.example.org.", 1000))
				signedClient(t, h)
				time.Sleep(70 * time.Second)
				up.answersWith(0, newRecord, sig)
				for range 3 {
					if m := signedClient(t, h); (served{Msg: m}).first() != oldData {
						t.Errorf("got %v", m)
					}
					synctest.Wait()
				}
			})
		}
	}
}

// Signatures end what comes from a snapshot, too, and as what was stored then.
func TestSignaturesEndWhatASnapshotBrings(t *testing.T) {
	for _, keep := range []bool{false, true} {
		inBubble(t, fmt.Sprint("keepttl ", keep), func(t *testing.T) {
			o := stale(func(s *staleOptions) { s.ttl = 30 * time.Second })
			o.keepTTL, o.success.minTTL = keep, 100*time.Second
			up := new(upstream)
			up.fails(0)
			h := startNamed(t, t.Name(), o, up)
			r := snapshotOf(t, 10*time.Second, true, aRecord, sigUntil("host.example.org.", 15))
			r.TTL = 300
			if why := h.admit(newScratch(), new(dns.Msg), r, momentOf(h, time.Now()), nil); why != refusedNot {
				t.Fatalf("refused as %q", refusalNames[why])
			}
			for second := range 15 {
				m := signedClient(t, h)
				if len(m.Answer) != 2 || m.Answer[0].Header().Ttl > uint32(15-second) || !keep && m.Answer[0].Header().Ttl != uint32(15-second) {
					t.Fatalf("second %d: %v", second, m)
				}
				time.Sleep(time.Second)
			}
			if m := signedClient(t, h); len(m.Answer) != 0 {
				t.Errorf("after the end: %v", m)
			}
		})
	}
}

// Times of signatures are serial numbers of 32 bits: they go on behind 2106.
func TestTimesOfSignaturesWrap(t *testing.T) {
	for _, c := range []struct {
		name                  string
		now                   int64
		inception, expiration uint32
		want                  int64
	}{
		{"before the wrap", 1<<32 - 100, 1<<32 - 200, 100, 200},
		{"at the wrap", 1 << 32, 1<<32 - 200, 100, 100},
		{"behind the wrap", 1<<32 + 50, 1<<32 - 200, 100, 50},
		{"its end", 1<<32 + 100, 1<<32 - 200, 100, 0},
		{"one second later", 1<<32 + 101, 1<<32 - 200, 100, -1},
		{"begins behind the wrap", 1<<32 - 10, 5, 100, -1},
		{"begins now", 1<<32 + 5, 5, 100, 95},
		{"2038", 1<<31 - 10, 1<<31 - 20, 1<<31 + 10, 20},
	} {
		m := positive(aRecord)
		m.Answer = append(m.Answer, &dns.RRSIG{Hdr: dns.RR_Header{Rrtype: dns.TypeRRSIG}, Inception: c.inception, Expiration: c.expiration})
		if got := admit.SignedFor(m, time.Unix(c.now, 0)); got != c.want {
			t.Errorf("%s: good for %d s, want %d", c.name, got, c.want)
		}
	}
}

// What kind of response something is, whether it is news, and for how long it is kept.
func TestKindsOfResponses(t *testing.T) {
	const otherSOA = "example.net. 120 IN SOA ns.example.net. root.example.net. 1 2 3 4 90"
	chain := []string{alias("host.example.org.", "a.example.net."), "a.example.net. 40 IN CNAME b.example.net."}
	dname := []string{"example.org. 80 IN DNAME example.net.", "host.example.org. 80 IN CNAME host.example.net."}
	for _, c := range []struct {
		name          string
		qtype, qclass uint16
		rcode         int
		aa            bool
		answer, ns    []string
		kind          response.Type
		keep, news    bool
		ttl           time.Duration
	}{
		{name: "NXDOMAIN behind a chain, SOA of another zone", rcode: 3, answer: chain, ns: []string{otherSOA}, kind: response.NameError, keep: true, news: true, ttl: 40e9},
		{name: "NXDOMAIN behind a long TTL, MINIMUM is less", rcode: 3, answer: chain[:1], ns: []string{otherSOA}, kind: response.NameError, keep: true, news: true, ttl: 50e9},
		{name: "NXDOMAIN behind a DNAME", rcode: 3, answer: dname, ns: []string{otherSOA}, kind: response.NameError, keep: true, news: true, ttl: 50e9},
		{name: "NXDOMAIN behind a TTL of 1, MINTTL", rcode: 3, answer: []string{"host.example.org. 1 IN CNAME t.example.net."}, ns: []string{soaRecord}, kind: response.NameError, keep: true, news: true, ttl: 7e9},
		{name: "NXDOMAIN, capped", rcode: 3, ns: []string{soaRecord}, kind: response.NameError, keep: true, news: true, ttl: 50e9},
		{name: "NXDOMAIN behind a CNAME that is asked for", qtype: dns.TypeCNAME, rcode: 3, answer: chain[:1], ns: []string{soaRecord}, kind: response.OtherError},
		{name: "NXDOMAIN with an address", rcode: 3, answer: []string{aRecord}, ns: []string{soaRecord}, kind: response.OtherError},
		{name: "NXDOMAIN behind a loop", rcode: 3, answer: []string{alias("host.example.org.", "a.example.net."), alias("a.example.net.", "host.example.org.")}, ns: []string{soaRecord}, kind: response.OtherError},
		{name: "NXDOMAIN behind a fork", rcode: 3, answer: []string{alias("host.example.org.", "a.example.net."), alias("host.example.org.", "b.example.net.")}, ns: []string{soaRecord}, kind: response.OtherError},
		{name: "NODATA behind a chain", answer: chain, ns: []string{otherSOA}, kind: response.NoData, keep: true, news: true, ttl: 40e9},
		{name: "NODATA behind a DNAME", answer: dname, ns: []string{otherSOA}, kind: response.NoData, keep: true, news: true, ttl: 50e9},
		{name: "CNAME only", answer: chain, kind: admit.Incomplete},
		{name: "CNAME only, from the zone's server", aa: true, answer: chain, kind: admit.Incomplete, news: true},
		{name: "DNAME only, from the zone's server", aa: true, answer: dname, kind: admit.Incomplete, news: true},
		{name: "DNAME without CNAME", aa: true, answer: dname[:1], kind: admit.Incomplete},
		{name: "a loop, from the zone's server", aa: true, answer: []string{alias("host.example.org.", "host.example.org.")}, kind: admit.Incomplete},
		{name: "CNAME that is asked for", qtype: dns.TypeCNAME, answer: chain[:1], kind: response.NoError, keep: true, news: true, ttl: 300e9},
		{name: "ANY with a CNAME", qtype: dns.TypeANY, answer: chain[:1], kind: response.NoError, keep: true, news: true, ttl: 300e9},
		{name: "ANY with what is elsewhere", qtype: dns.TypeANY, aa: true, answer: chain[1:], kind: admit.Incomplete},
		{name: "CH for CH", qtype: dns.TypeTXT, qclass: dns.ClassCHAOS, answer: []string{"host.example.org. 30 CH TXT x"}, kind: response.NoError, keep: true, news: true, ttl: 30e9},
		{name: "CH for IN", qtype: dns.TypeTXT, aa: true, answer: []string{"host.example.org. 30 CH TXT x"}, kind: admit.Incomplete},
		{name: "CNAME of class CH for IN", aa: true, answer: []string{"host.example.org. 30 CH CNAME t.example.net."}, kind: admit.Incomplete},
		{name: "NXDOMAIN behind a CNAME of class CH", rcode: 3, answer: []string{"host.example.org. 30 CH CNAME t.example.net."}, ns: []string{soaRecord}, kind: response.OtherError},
		{name: "no records, from the zone's server", aa: true, kind: response.Delegation, keep: true, ttl: 5e9},
	} {
		o := stockOptions()
		o.success.minTTL, o.denial.minTTL, o.denial.maxTTL = 6*time.Second, 7*time.Second, 50*time.Second
		m := with(negative(c.rcode, c.ns...), func(m *dns.Msg) { m.Authoritative, m.Answer = c.aa, parsed(c.answer...) })
		m.SetQuestion("host.example.org.", max(c.qtype, dns.TypeA))
		m.Response, m.Rcode = true, c.rcode
		m.Question[0].Qclass = max(c.qclass, dns.ClassINET)
		kind := admit.Classify(m, time.Unix(1e9, 0))
		if kind != c.kind || admit.Keepable(m, kind) != c.keep || admit.Decisive(m, kind) != c.news {
			t.Errorf("%s: kind %v, kept %v, news %v", c.name, kind, admit.Keepable(m, kind), admit.Decisive(m, kind))
			continue
		}
		if got := newOptcache(o).rules.TTL(m, kind); c.keep && got != c.ttl {
			t.Errorf("%s: kept for %v, want %v", c.name, got, c.ttl)
		}
	}
}

func TestAnswersAgeWhileTheMachineIsSuspended(t *testing.T) {
	const soa = "example.org. 300 IN SOA ns.example.org. host.example.org. 1 7200 3600 86400 300"
	address := positive("www.example.org. 300 IN A 192.0.2.1")
	stale := stockOptions()
	stale.stale.upTo = time.Hour
	for _, c := range []struct {
		name     string
		options  options
		response *dns.Msg
		night    time.Duration
		asked    int // the upstream, in all
		ttl      uint32
	}{
		{"an answer that lives on", stockOptions(), address, 40 * time.Second, 1, 260},
		{"an answer that dies", stockOptions(), address, 301 * time.Second, 2, 300},
		{"a denial that lives on", stockOptions(), negative(dns.RcodeNameError, soa), 40 * time.Second, 1, 260},
		{"a denial that dies", stockOptions(), negative(dns.RcodeNameError, soa), 301 * time.Second, 2, 300},
		{"a failure that dies", stockOptions(), negative(dns.RcodeServerFailure), 6 * time.Second, 2, 0},
		{"an answer that is stale", stale, address, 30 * time.Minute, 2, 0},
		{"an answer that is too old to be stale", stale, address, 8 * time.Hour, 2, 300},
	} {
		inBubble(t, c.name, func(t *testing.T) {
			begun := time.Now()
			var suspended atomic.Int64
			up := &scripted{response: c.response}
			h := newOptcache(c.options)
			h.Next, h.clock = up, clock.NewTicking(func() int64 { return int64(time.Since(begun)) + suspended.Load() }).Read
			if err := h.start("", []plugin.Handler{h}); err != nil {
				t.Fatal(err)
			}
			defer h.stop()
			ctx := serverContext(t)
			r := asking("www.example.org.", dns.TypeA)
			answer(t, ctx, h, r)
			suspended.Add(int64(c.night))
			time.Sleep(clock.Tick + 1)
			got := answer(t, ctx, h, r)
			synctest.Wait() // for the refresh of a stale answer
			var ttl uint32
			for _, rr := range append(got.Answer, got.Ns...) {
				ttl = rr.Header().Ttl
			}
			if up.asked != c.asked || ttl != c.ttl {
				t.Errorf("the upstream was asked %d times, TTL %d; want %d, %d", up.asked, ttl, c.asked, c.ttl)
			}
		})
	}
}
