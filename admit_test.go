package optcache

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/coredns/coredns/plugin"
	"github.com/coredns/coredns/plugin/cache"

	"github.com/miekg/dns"

	"github.com/optcache/optcache/plugin/pkg/record"
)

const (
	soaRecord = "example.org. 300 IN SOA ns.example.org. hostmaster.example.org. 1 7200 3600 1209600 300"
	aRecord   = "host.example.org. 300 IN A 192.0.2.1"

	validSig   = "host.example.org. 300 IN RRSIG A 8 3 300 20380101000000 19991201000000 12051 example.org. lAaEzB5teQLLKyDenatmyhca7blLRg9D"
	expiredSig = "host.example.org. 300 IN RRSIG A 8 3 300 19991215000000 19991201000000 12051 example.org. lAaEzB5teQLLKyDenatmyhca7blLRg9D"
	futureSig  = "host.example.org. 300 IN RRSIG A 8 3 300 20380101000000 20010101000000 12051 example.org. lAaEzB5teQLLKyDenatmyhca7blLRg9D"
)

// with changes a response.
func with(m *dns.Msg, change func(*dns.Msg)) *dns.Msg {
	change(m)
	return m
}

func withOPT(do bool) func(*dns.Msg) { return func(m *dns.Msg) { m.SetEdns0(1232, do) } }

func alias(from, to string) string {
	return fmt.Sprintf("%s 300 IN CNAME %s", from, to)
}

// Each response is given to this plugin, both ways, and to the built-in cache. The first reply
// and the reply to the next client must be the same everywhere, and be from the cache or not.
func TestWhatIsKept(t *testing.T) {
	const none = -1
	const host = "host.example.org."
	tests := []struct {
		name   string
		qtype  uint16 // A if zero
		qclass uint16
		res    *dns.Msg
		kept   int  // the class, or none
		ttl    int  // shown, 0: not looked at
		beyond bool // the built-in cache does something else on purpose
	}{
		{name: "address", res: positive(aRecord), kept: int(record.Success), ttl: 300},
		{name: "authenticated", res: with(positive(aRecord), func(m *dns.Msg) { m.AuthenticatedData = true }), kept: int(record.Success)},
		{name: "authoritative", res: with(positive(aRecord), func(m *dns.Msg) { m.Authoritative = true }), kept: int(record.Success)},
		{name: "letters of another case", res: positive("hOST.eXample.ORG. 300 IN A 192.0.2.1"), kept: int(record.Success)},
		{name: "several TTLs", res: positive(aRecord, "host.example.org. 17 IN A 192.0.2.2"), kept: int(record.Success), ttl: 17},
		{name: "TTL in the authority section", res: with(positive(aRecord), func(m *dns.Msg) { m.Ns = parsed("example.org. 20 IN NS ns.example.org.") }), kept: int(record.Success), ttl: 20},
		{name: "TTL in the additional section", res: with(positive(aRecord), func(m *dns.Msg) { m.Extra = parsed("ns.example.org. 21 IN A 192.0.2.2") }), kept: int(record.Success), ttl: 21},
		{name: "TTL zero", res: positive("host.example.org. 0 IN A 192.0.2.1"), kept: int(record.Success), ttl: 5},
		{name: "TTL over the maximum", res: positive("host.example.org. 86400 IN A 192.0.2.1"), kept: int(record.Success), ttl: 3600},
		{name: "TTL of OPT is none", res: with(positive(aRecord), withOPT(false)), kept: int(record.Success), ttl: 300},
		{name: "TTL of 2^31-1", res: positive("host.example.org. 2147483647 IN A 192.0.2.1"), kept: int(record.Success), ttl: 3600},
		{name: "TTL of 2^31", res: positive("host.example.org. 2147483648 IN A 192.0.2.1"), kept: int(record.Success), ttl: 5, beyond: true},
		{name: "TTL of 2^32-1", res: positive("host.example.org. 4294967295 IN A 192.0.2.1"), kept: int(record.Success), ttl: 5, beyond: true},
		{name: "one TTL of 2^31", res: positive(aRecord, "host.example.org. 2147483648 IN A 192.0.2.2"), kept: int(record.Success), ttl: 5, beyond: true},
		{name: "no records", res: positive(), kept: int(record.Success), ttl: 5},
		{name: "no records but OPT", res: with(positive(), withOPT(false)), kept: int(record.Success), ttl: 5},
		{name: "additional section only", res: with(positive(), func(m *dns.Msg) { m.Extra = parsed("host.example.org. 60 IN A 192.0.2.2") }), kept: int(record.Success), ttl: 60},
		{name: "additional section and OPT", res: with(with(positive(), func(m *dns.Msg) { m.Extra = parsed("host.example.org. 60 IN A 192.0.2.2") }), withOPT(true)), kept: int(record.Success), ttl: 60},
		{name: "truncated", res: with(positive(aRecord), func(m *dns.Msg) { m.Truncated = true }), kept: none},
		{name: "truncated NXDOMAIN", res: with(negative(dns.RcodeNameError, soaRecord), func(m *dns.Msg) { m.Truncated = true }), kept: none},
		{name: "truncated SERVFAIL", res: with(negative(dns.RcodeServerFailure), func(m *dns.Msg) { m.Truncated = true }), kept: none},
		{name: "delegation", res: negative(dns.RcodeSuccess, "example.org. 60 IN NS ns.example.org."), kept: int(record.Success), ttl: 5},

		{name: "NXDOMAIN", res: negative(dns.RcodeNameError, soaRecord), kept: int(record.Denial), ttl: 300},
		{name: "NXDOMAIN without SOA", res: negative(dns.RcodeNameError), kept: none},
		{name: "NXDOMAIN with NS only", res: negative(dns.RcodeNameError, "example.org. 60 IN NS ns.example.org."), kept: none},
		{name: "NXDOMAIN with SOA elsewhere", res: with(negative(dns.RcodeNameError), func(m *dns.Msg) { m.Extra = parsed(soaRecord) }), kept: none},
		{name: "NXDOMAIN with an answer", res: with(negative(dns.RcodeNameError, soaRecord), func(m *dns.Msg) { m.Answer = parsed(aRecord) }), kept: none},
		{name: "NXDOMAIN behind a CNAME", res: with(negative(dns.RcodeNameError, soaRecord), func(m *dns.Msg) { m.Answer = parsed(alias(host, "gone.example.org.")) }), kept: int(record.Denial), ttl: 300, beyond: true},
		{name: "NXDOMAIN over the maximum", res: negative(dns.RcodeNameError, strings.Replace(soaRecord, " 300 IN", " 86400 IN", 1)+"000000"), kept: int(record.Denial), ttl: 1800},
		{name: "NODATA", res: negative(dns.RcodeSuccess, soaRecord), kept: int(record.Denial), ttl: 300},
		{name: "NODATA and NS", res: negative(dns.RcodeSuccess, soaRecord, "example.org. 60 IN NS ns.example.org."), kept: int(record.Denial), ttl: 60},
		{name: "MINIMUM under the TTL", res: negative(dns.RcodeNameError, "example.org. 300 IN SOA ns.example.org. h.example.org. 1 7200 3600 1209600 42"), kept: int(record.Denial), ttl: 42, beyond: true},
		{name: "MINIMUM over the TTL", res: negative(dns.RcodeNameError, "example.org. 42 IN SOA ns.example.org. h.example.org. 1 7200 3600 1209600 300"), kept: int(record.Denial), ttl: 42},
		{name: "MINIMUM of zero", res: negative(dns.RcodeSuccess, "example.org. 300 IN SOA ns.example.org. h.example.org. 1 7200 3600 1209600 0"), kept: int(record.Denial), ttl: 5, beyond: true},
		{name: "MINIMUM of 2^31", res: negative(dns.RcodeSuccess, "example.org. 300 IN SOA ns.example.org. h.example.org. 1 7200 3600 1209600 2147483648"), kept: int(record.Denial), ttl: 5, beyond: true},
		{name: "SOA TTL of 2^31", res: negative(dns.RcodeSuccess, "example.org. 2147483648 IN SOA ns.example.org. h.example.org. 1 7200 3600 1209600 300"), kept: int(record.Denial), ttl: 5, beyond: true},
		{name: "MINIMUM of an SOA that was asked for", qtype: dns.TypeSOA, res: positive("host.example.org. 300 IN SOA ns.example.org. h.example.org. 1 7200 3600 1209600 42"), kept: int(record.Success), ttl: 300},
		{name: "MINIMUM behind a positive answer", res: with(positive(aRecord), func(m *dns.Msg) {
			m.Ns = parsed("example.org. 300 IN SOA ns.example.org. h.example.org. 1 7200 3600 1209600 42")
		}), kept: int(record.Success), ttl: 300},

		{name: "SERVFAIL", res: negative(dns.RcodeServerFailure), kept: int(record.Denial)},
		{name: "SERVFAIL with records", res: with(negative(dns.RcodeServerFailure), func(m *dns.Msg) { m.Extra = parsed(aRecord) }), kept: int(record.Denial), ttl: 5},
		{name: "NOTIMP", res: negative(dns.RcodeNotImplemented), kept: int(record.Denial)},
		{name: "FORMERR", res: negative(dns.RcodeFormatError), kept: none},
		{name: "REFUSED", res: negative(dns.RcodeRefused), kept: none},
		{name: "YXDOMAIN", res: negative(dns.RcodeYXDomain, soaRecord), kept: none},
		{name: "rcode 15", res: negative(15, soaRecord), kept: none},
		{name: "REFUSED with an answer", res: with(positive(aRecord), func(m *dns.Msg) { m.Rcode = dns.RcodeRefused }), kept: none},
		{name: "SERVFAIL with an answer", res: with(positive(aRecord), func(m *dns.Msg) { m.Rcode = dns.RcodeServerFailure }), kept: int(record.Denial), ttl: 5},

		{name: "expired signature with DO", res: with(positive(aRecord, expiredSig), withOPT(true)), kept: none},
		{name: "future signature with DO", res: with(positive(aRecord, futureSig), withOPT(true)), kept: none},
		{name: "valid signature with DO", res: with(positive(aRecord, validSig), withOPT(true)), kept: int(record.Success)},
		{name: "expired signature without DO", res: with(positive(aRecord, expiredSig), withOPT(false)), kept: int(record.Success)},
		{name: "expired signature without OPT", res: positive(aRecord, expiredSig), kept: int(record.Success)},
		{name: "expired signature in the authority section", res: with(with(negative(dns.RcodeNameError, soaRecord, expiredSig), func(*dns.Msg) {}), withOPT(true)), kept: none},

		{name: "CNAME to the address", res: positive(alias(host, "t.example.net."), "t.example.net. 300 IN A 192.0.2.1"), kept: int(record.Success)},
		{name: "CNAME in another case", res: positive(alias("HOST.example.org.", "T.example.net."), "t.EXAMPLE.net. 300 IN A 192.0.2.1"), kept: int(record.Success)},
		{name: "CNAME out of order", res: positive("t.example.net. 300 IN A 192.0.2.1", alias(host, "t.example.net.")), kept: int(record.Success)},
		{name: "CNAME twice the same", res: positive(alias(host, "t.example.net."), alias(host, "T.example.net."), "t.example.net. 300 IN A 192.0.2.1"), kept: int(record.Success)},
		{name: "CNAME to MX", qtype: dns.TypeMX, res: positive(alias(host, "t.example.net."), "t.example.net. 300 IN MX 10 m.example.net."), kept: int(record.Success)},
		{name: "CNAME for MX ends early", qtype: dns.TypeMX, res: positive(alias(host, "t.example.net.")), kept: none},
		{name: "CNAME ends early", res: positive(alias(host, "t.example.net."), alias("t.example.net.", "u.example.net.")), kept: none},
		{name: "CNAME ends early with SOA", res: with(positive(alias(host, "t.example.net.")), func(m *dns.Msg) { m.Ns = parsed(soaRecord) }), kept: int(record.Denial), ttl: 300},
		{name: "CNAME ends early, SOA over the maximum", res: with(positive(strings.Replace(alias(host, "t.example.net."), " 300 ", " 86400 ", 1)), func(m *dns.Msg) {
			m.Ns = parsed(strings.Replace(soaRecord, " 300 IN", " 86400 IN", 1) + "000000")
		}), kept: int(record.Denial), ttl: 1800},
		{name: "CNAME ends in another type", res: positive(alias(host, "t.example.net."), "t.example.net. 300 IN AAAA ::1"), kept: none},
		{name: "CNAME and an address elsewhere", res: positive(alias(host, "t.example.net."), "u.example.net. 300 IN A 192.0.2.1"), kept: none},
		{name: "CNAME forks", res: positive(alias(host, "t.example.net."), alias(host, "u.example.net."), "t.example.net. 300 IN A 192.0.2.1"), kept: none},
		{name: "CNAME forks, other order", res: positive(alias(host, "u.example.net."), alias(host, "t.example.net."), "t.example.net. 300 IN A 192.0.2.1"), kept: none},
		{name: "CNAME forks with SOA", res: with(positive(alias(host, "t.example.net."), alias(host, "u.example.net.")), func(m *dns.Msg) { m.Ns = parsed(soaRecord) }), kept: int(record.Denial)},
		{name: "CNAME forks off the chain", res: positive(aRecord, alias("o.example.org.", "t.example.net."), alias("o.example.org.", "u.example.net.")), kept: int(record.Success)},
		{name: "CNAME to itself", res: positive(alias(host, host), aRecord), kept: none},
		{name: "CNAME in a circle", res: positive(alias(host, "t.example.net."), alias("t.example.net.", host), aRecord), kept: none},
		{name: "CNAME in a circle later on", res: positive(alias(host, "t.example.net."), alias("t.example.net.", "u.example.net."), alias("u.example.net.", "t.example.net."), "t.example.net. 300 IN A 192.0.2.1"), kept: none},
		{name: "CNAME and address at one name", res: positive(alias(host, "t.example.net."), aRecord), kept: none},
		{name: "CNAME in class CH", res: positive("host.example.org. 300 CH CNAME t.example.net.", aRecord), kept: int(record.Success)},
		{name: "CNAME asked for", qtype: dns.TypeCNAME, res: positive(alias(host, "t.example.net.")), kept: int(record.Success)},
		{name: "CNAME asked for, two targets", qtype: dns.TypeCNAME, res: positive(alias(host, "t.example.net."), alias(host, "u.example.net.")), kept: none},
		{name: "CNAME asked for, in a circle", qtype: dns.TypeCNAME, res: positive(alias(host, "t.example.net."), alias("t.example.net.", host)), kept: int(record.Success)},
		{name: "CNAME asked for, other owner", qtype: dns.TypeCNAME, res: positive(alias("o.example.org.", "t.example.net.")), kept: none},
		{name: "CNAME asked for, address", qtype: dns.TypeCNAME, res: positive(aRecord), kept: none},
		{name: "ANY with a CNAME", qtype: dns.TypeANY, res: positive(alias(host, "t.example.net.")), kept: int(record.Success)},
		{name: "ANY with another owner", qtype: dns.TypeANY, res: positive("o.example.org. 300 IN A 192.0.2.1"), kept: none},
		{name: "ANY with another class", qtype: dns.TypeANY, res: positive("host.example.org. 300 CH A 192.0.2.1"), kept: none},
		{name: "another owner", res: positive("o.example.org. 300 IN A 192.0.2.1"), kept: none},
		{name: "another type", res: positive("host.example.org. 300 IN AAAA ::1"), kept: none},
		{name: "another class", res: positive("host.example.org. 300 CH A 192.0.2.1"), kept: none},
		{name: "class ANY takes any class", qclass: dns.ClassANY, res: positive(aRecord), kept: int(record.Success)},
		{name: "class CH", qclass: dns.ClassCHAOS, res: positive("host.example.org. 300 CH A 192.0.2.1"), kept: int(record.Success)},
		{name: "class CH, answer IN", qclass: dns.ClassCHAOS, res: positive(aRecord), kept: none},
		{name: "bare DNAME", res: positive("example.org. 300 IN DNAME example.net."), kept: none},
		{name: "DNAME with its CNAME", res: positive("example.org. 300 IN DNAME example.net.", alias(host, "host.example.net."), "host.example.net. 300 IN A 192.0.2.1"), kept: int(record.Success)},
		{name: "unknown type", qtype: 65280, res: positive(`host.example.org. 300 IN TYPE65280 \# 2 c00c`), kept: int(record.Success)},
	}
	for _, tc := range tests {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				tr := newTrio(t, t.Name(), stockOptions())
				tr.script(tc.res, false)
				qtype := tc.qtype
				if qtype == 0 {
					qtype = dns.TypeA
				}
				r := asking(host, qtype)
				if tc.qclass != 0 {
					r.Question[0].Qclass = tc.qclass
				}
				for i := range 3 {
					if tc.beyond {
						for _, h := range tr.chains[:2] {
							ask(tr.ctx, h, r, tcp4Client)
						}
					} else if diff := tr.compare(r, tcp4Client); diff != "" {
						t.Errorf("request %d: %s", i, diff)
					}
				}
				for i, o := range []*Optcache{tr.bytes(), tr.message()} {
					if kept := tr.ups[i].asked == 1; kept != (tc.kept != none) {
						t.Errorf("%s: kept %v", trioNames[i], kept)
					}
					for c := range record.Classes {
						want := int64(0)
						if int(c) == tc.kept {
							want = 1
						}
						if n := o.store.len(c); n != want {
							t.Errorf("%s: %d entries of class %s, want %d", trioNames[i], n, classNames[c], want)
						}
					}
					if tc.ttl == 0 {
						continue
					}
					m := answer(t, tr.ctx, o, r)
					for _, rr := range append(append(m.Answer, m.Ns...), m.Extra...) {
						if rr.Header().Ttl != uint32(tc.ttl) {
							t.Errorf("%s: shows %v, want a TTL of %d", trioNames[i], rr, tc.ttl)
						}
					}
				}
			})
		})
	}
}

func TestNoTTLMeansNotKept(t *testing.T) {
	zero := stockOptions()
	zero.success.minTTL, zero.denial.minTTL = 0, 0
	noFailure := stockOptions()
	noFailure.servfail = 0
	short := stockOptions()
	short.servfail = 900 * time.Millisecond
	tests := []struct {
		name string
		o    options
		res  *dns.Msg
		kept bool
	}{
		{"TTL 0", zero, positive("host.example.org. 0 IN A 192.0.2.1"), false},
		{"TTL 1", zero, positive("host.example.org. 1 IN A 192.0.2.1"), true},
		{"one TTL 0", zero, positive(aRecord, "host.example.org. 0 IN A 192.0.2.2"), false},
		{"TTL 2^31", zero, positive("host.example.org. 2147483648 IN A 192.0.2.1"), false},
		{"NXDOMAIN, TTL 0", zero, negative(dns.RcodeNameError, strings.Replace(soaRecord, " 300 IN", " 0 IN", 1)), false},
		{"NXDOMAIN, MINIMUM 0", zero, negative(dns.RcodeNameError, "example.org. 300 IN SOA ns.example.org. h.example.org. 1 2 3 4 0"), false},
		{"servfail 0", noFailure, negative(dns.RcodeServerFailure), false},
		{"servfail 0, positive", noFailure, positive(aRecord), true},
		{"servfail under a second", short, negative(dns.RcodeServerFailure), false},
	}
	for i, tc := range tests {
		t.Run(tc.name, func(t *testing.T) {
			up := &scripted{response: tc.res}
			h := startNamed(t, fmt.Sprintf("nottl/%d", i), tc.o, up)
			for range 2 {
				ask(serverContext(t), h, asking("host.example.org.", dns.TypeA), udp4Client)
			}
			if kept := up.asked == 1; kept != tc.kept {
				t.Errorf("kept %v, want %v", kept, tc.kept)
			}
			if n := count(h, countDrop); n != 0 {
				t.Errorf("%d drops", n)
			}
		})
	}
}

func TestTTLIsCappedAndRaisedByClass(t *testing.T) {
	o := stockOptions()
	o.success.maxTTL, o.success.minTTL = 100*time.Second, 20*time.Second
	o.denial.maxTTL, o.denial.minTTL = 50*time.Second, 10*time.Second
	for _, tc := range []struct {
		name string
		res  *dns.Msg
		want uint32
	}{
		{"over", positive(aRecord), 100},
		{"within", positive("host.example.org. 60 IN A 192.0.2.1"), 60},
		{"under", positive("host.example.org. 6 IN A 192.0.2.1"), 20},
		{"denial over", negative(dns.RcodeNameError, soaRecord), 50},
		{"denial within", negative(dns.RcodeNameError, strings.Replace(soaRecord, " 300 IN", " 30 IN", 1)), 30},
		{"denial under", negative(dns.RcodeNameError, strings.Replace(soaRecord, " 300 IN", " 3 IN", 1)), 10},
		{"delegation", negative(dns.RcodeSuccess, "example.org. 60 IN NS ns.example.org."), 5},
	} {
		t.Run(tc.name, func(t *testing.T) {
			h := startNamed(t, t.Name(), o, &scripted{response: tc.res})
			clock := clocked(h)
			for _, age := range []uint32{0, 0, 1, 4} {
				clock.advance(time.Duration(age) * time.Second)
				m := answer(t, serverContext(t), h, asking("host.example.org.", dns.TypeA))
				for _, rr := range append(m.Answer, m.Ns...) {
					if age == 0 && rr.Header().Ttl != tc.want {
						t.Errorf("%v, want a TTL of %d", rr, tc.want)
					}
				}
			}
			m := answer(t, serverContext(t), h, asking("host.example.org.", dns.TypeA))
			if tc.name == "delegation" { // it has come anew
				tc.want += 5
			}
			if rr := append(m.Answer, m.Ns...)[0]; rr.Header().Ttl != tc.want-5 {
				t.Errorf("after five seconds: %v, want a TTL of %d", rr, tc.want-5)
			}
		})
	}
}

// BenchmarkWriteLongChain compares the cost of such a response with that in the built-in cache.
func BenchmarkWriteLongChain(b *testing.B) {
	m := new(dns.Msg)
	m.Response = true
	const n = 2000
	for i := range n {
		m.Answer = append(m.Answer, &dns.CNAME{
			Hdr:    dns.RR_Header{Name: fmt.Sprintf("%x.", i), Rrtype: dns.TypeCNAME, Class: dns.ClassINET, Ttl: 300},
			Target: fmt.Sprintf("%x.", (i+1)%n),
		})
	}
	stock := cache.New()
	stock.Next = &scripted{response: m}
	for _, bc := range []struct {
		name string
		h    plugin.Handler
	}{{"optcache", startNamed(b, b.Name(), stockOptions(), &scripted{response: m})}, {"cache", stock}} {
		b.Run(bc.name, func(b *testing.B) {
			for b.Loop() {
				ask(context.Background(), bc.h, asking("0.", dns.TypeA), tcp4Client)
			}
		})
	}
}
