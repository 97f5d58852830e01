package optcache

import (
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/miekg/dns"

	"github.com/optcache/optcache/plugin/pkg/record"
)

// This file is about what a response that an upstream gives puts an end to, whether it can be kept or not.

const zeroSOA = "example.org. 0 IN SOA ns.example.org. root.example.org. 1 7200 900 1209600 0"

// saysNothing are responses that neither answer nor deny.
var saysNothing = map[string]*dns.Msg{
	"SERVFAIL":         negative(dns.RcodeServerFailure),
	"NOTIMP":           negative(dns.RcodeNotImplemented),
	"REFUSED":          negative(dns.RcodeRefused),
	"FORMERR":          negative(dns.RcodeFormatError),
	"YXDOMAIN":         negative(dns.RcodeYXDomain, soaRecord),
	"NOTAUTH":          negative(dns.RcodeNotAuth, soaRecord),
	"BADVERS":          with(with(negative(dns.RcodeSuccess), withOPT(false)), func(m *dns.Msg) { m.Rcode = dns.RcodeBadVers }),
	"empty":            negative(dns.RcodeSuccess),
	"empty with OPT":   with(negative(dns.RcodeSuccess), withOPT(true)),
	"upward referral":  negative(dns.RcodeSuccess, ". 60 IN NS a.root-servers.net."),
	"referral":         negative(dns.RcodeSuccess, "example.org. 60 IN NS ns.example.org."),
	"CNAME only":       positive(alias("host.example.org.", "t.example.net.")),
	"CNAME of another": with(positive(alias("o.example.org.", "t.example.net.")), func(m *dns.Msg) { m.Authoritative = true }),
	"NXDOMAIN behind the CNAME of another": with(negative(dns.RcodeNameError, soaRecord), func(m *dns.Msg) {
		m.Answer = parsed(alias("o.example.org.", "t.example.net."))
	}),
}

// ends are responses that cannot be kept with MINTTL 0, and answer or deny all the same.
var ends = map[string]*dns.Msg{
	"NXDOMAIN without SOA":                 negative(dns.RcodeNameError),
	"NXDOMAIN, SOA of TTL 0":               negative(dns.RcodeNameError, zeroSOA),
	"NODATA, SOA of TTL 0":                 negative(dns.RcodeSuccess, zeroSOA),
	"address of TTL 0":                     positive("host.example.org. 0 IN A 192.0.2.2"),
	"CNAME-only NODATA":                    with(positive(alias("host.example.org.", "t.example.net.")), func(m *dns.Msg) { m.Ns = parsed(zeroSOA) }),
	"CNAME only, with authority":           with(positive(alias("host.example.org.", "t.example.net.")), func(m *dns.Msg) { m.Authoritative = true }),
	"NXDOMAIN behind a CNAME, without SOA": with(negative(dns.RcodeNameError), func(m *dns.Msg) { m.Answer = parsed(alias("host.example.org.", "t.example.net.")) }),
}

var staleModes = map[string]func(*staleOptions){
	"immediate":           func(*staleOptions) {},
	"verify":              func(s *staleOptions) { s.verify = true },
	"verify with timeout": func(s *staleOptions) { s.verify, s.timeout = true, time.Second },
}

// What says nothing hides neither an answer that lives, nor one that is stale.
func TestWhatSaysNothingReplacesNothing(t *testing.T) {
	for name, m := range saysNothing {
		inBubble(t, "prefetch/"+name, func(t *testing.T) {
			h, up := aged(t, "nothing/"+name, prefetching(1), 40*time.Second)
			up.responds(0, m)
			for range 10 {
				if got := client(t, h); got.first() != oldData {
					t.Fatalf("got %v", got)
				}
				synctest.Wait()
				time.Sleep(time.Second)
			}
		})
		for mode, set := range staleModes {
			inBubble(t, mode+"/"+name, func(t *testing.T) {
				h, up := aged(t, "nothing/"+mode+name, stale(set), 70*time.Second)
				up.responds(0, m)
				for range 5 {
					if got := client(t, h); got.first() != oldData {
						t.Fatalf("got %v", got)
					}
					synctest.Wait()
					time.Sleep(time.Second)
				}
			})
		}
	}
}

// What cannot be kept ends the stale answer all the same, if it answers or denies.
func TestNewsThatCannotBeKeptEndsTheStaleAnswer(t *testing.T) {
	for name, m := range ends {
		for mode, set := range staleModes {
			inBubble(t, mode+"/"+name, func(t *testing.T) {
				o := stale(set)
				o.success.minTTL, o.denial.minTTL = 0, 0
				h, up := aged(t, "ends/"+mode+name, o, 70*time.Second)
				up.responds(0, m)
				client(t, h)
				synctest.Wait()
				if n := h.store.total(); n != 0 {
					t.Errorf("%d entries", n)
				}
				up.fails(0)
				if got := client(t, h); got.first() != "SERVFAIL" {
					t.Errorf("the old answer is back: %v", got)
				}
			})
		}
	}
}

// NXDOMAIN behind a CNAME is kept as that, for the shortest of the TTLs, and ends what was there.
func TestNXDOMAINBehindACNAME(t *testing.T) {
	m := with(negative(dns.RcodeNameError, soaRecord), func(m *dns.Msg) {
		m.Answer = parsed("example.org. 90 IN DNAME example.net.", "host.example.org. 40 IN CNAME host.example.net.")
	})
	for mode, set := range staleModes {
		inBubble(t, mode, func(t *testing.T) {
			h, up := aged(t, "chain/"+mode, stale(set), 70*time.Second)
			up.responds(0, m)
			client(t, h)
			synctest.Wait()
			up.fails(0)
			if got := client(t, h); got.Rcode != dns.RcodeNameError || len(got.Answer) != 2 || got.Answer[1].Header().Ttl != 40 {
				t.Errorf("got %v", got)
			}
			if n, d := h.store.len(record.Success), h.store.len(record.Denial); n != 0 || d != 1 {
				t.Errorf("%d answers and %d denials", n, d)
			}
		})
	}
}

// With DO, no TTL goes beyond the end of a signature, whatever MINTTL and keepttl say.
func TestSignaturesEndAnswers(t *testing.T) {
	for _, keep := range []bool{false, true} {
		inBubble(t, fmt.Sprint("keepttl ", keep), func(t *testing.T) {
			start := time.Now().UTC()
			sig := fmt.Sprintf("host.example.org. 300 IN RRSIG A 8 3 300 %s %s 12051 example.org. lAaEzB5teQLLKyDenatmyhca7blLRg9D",
				start.Add(20*time.Second).Format("20060102150405"), start.Add(-time.Hour).Format("20060102150405"))
			o := stale(func(s *staleOptions) { s.ttl = 30 * time.Second })
			o.keepTTL, o.success.minTTL = keep, 100*time.Second
			up := new(upstream)
			up.answersWith(0, aRecord, sig)
			h := startNamed(t, t.Name(), o, up)
			r := asking("host.example.org.", dns.TypeA)
			r.SetEdns0(1232, true)
			for range 20 {
				w, _, _ := ask(serverContext(t), h, r, udp4Client)
				left := uint32(20 - time.Since(start)/time.Second)
				if ttl := unpacked(t, w.only(t)).Answer[0].Header().Ttl; ttl > left || !keep && ttl != left {
					t.Errorf("TTL %d, %d s before the end", ttl, left)
				}
				time.Sleep(time.Second)
			}
			if n := len(up.queries()); n != 1 {
				t.Errorf("%d queries, want 1", n)
			}
			up.fails(0)
			if w, _, _ := ask(serverContext(t), h, r, udp4Client); len(w.packets) != 0 {
				t.Error("served beyond the end of its signature")
			}
		})
	}
}

// The news that an answer is too large for UDP reaches who has asked by UDP.
func TestVerifyPassesTruncationOn(t *testing.T) {
	inBubble(t, "tells", func(t *testing.T) {
		h, up := aged(t, t.Name(), stale(func(s *staleOptions) { s.verify, s.recheck = true, time.Minute }), 70*time.Second)
		up.responds(0, with(positive(), func(m *dns.Msg) { m.Truncated = true }))
		if got := client(t, h); !got.Truncated || len(got.Answer) != 0 {
			t.Errorf("by UDP: %v", got)
		}
		up.answersWith(0, newRecord)
		if m := answer(t, serverContext(t), h, asking("host.example.org.", dns.TypeA)); m.Truncated || (served{Msg: m}).first() != newData {
			t.Errorf("by TCP: %v", m)
		}
	})
}
