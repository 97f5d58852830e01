package optcache

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/coredns/coredns/core/dnsserver"
	"github.com/coredns/coredns/plugin"
	"github.com/coredns/coredns/plugin/metrics"
	"github.com/coredns/coredns/plugin/pkg/edns"
	"github.com/coredns/coredns/plugin/pkg/response"
	"github.com/coredns/coredns/request"

	"github.com/miekg/dns"

	"github.com/optcache/optcache/plugin/pkg/admit"
)

// traffic makes up questions and responses.
type traffic struct {
	*rand.Rand
	serial int
}

func newTraffic(seed uint64) *traffic {
	return &traffic{Rand: rand.New(rand.NewPCG(seed, 0x6f707463))}
}

func (g *traffic) one(in int) bool { return g.IntN(in) == 0 }

// name returns a name in presentation format, nearly always one that was not returned before.
func (g *traffic) name() string {
	g.serial++
	switch g.IntN(24) {
	case 0:
		return "."
	case 1:
		return string(rune('a'+g.IntN(26))) + "."
	case 2: // 255 octets
		tail := fmt.Sprintf("%d.", g.serial)
		l := strings.Repeat("x", 63) + "."
		return l + l + l + strings.Repeat("y", 63-1-len(tail)-1) + "." + tail
	case 3, 4: // any octets
		var wire []byte
		for range 1 + g.IntN(4) {
			n := 1 + g.IntN(12)
			wire = append(wire, byte(n))
			for range n {
				wire = append(wire, byte(g.IntN(256)))
			}
		}
		wire = append(wire, fmt.Sprintf("\x03%03d\x00", g.serial%1000)...)
		name, _, err := dns.UnpackDomainName(wire, 0)
		if err != nil {
			panic(err)
		}
		return name
	case 5:
		return fmt.Sprintf(`a\.b\\c\"%d.example.ORG.`, g.serial)
	default:
		return g.respelled(fmt.Sprintf("host-%d.sub.example.org.", g.serial))
	}
}

// respelled changes the case of letters, as clients do that use 0x20.
func (g *traffic) respelled(name string) string {
	b := []byte(name)
	for i, c := range b {
		if ('a' <= c && c <= 'z' || 'A' <= c && c <= 'Z') && g.one(2) {
			b[i] ^= 0x20
		}
	}
	return string(b)
}

// templates has records of many types, to be given another owner and TTL.
var templates = parsed(
	"x. 1 IN A 192.0.2.1", "x. 1 IN AAAA 2001:db8::1", "x. 1 IN MX 10 mail.example.org.",
	`x. 1 IN TXT "v=spf1 -all" "second string"`, "x. 1 IN SRV 1 2 443 srv.example.org.",
	"x. 1 IN NS ns.example.org.", "x. 1 IN PTR ptr.example.org.",
	"x. 1 IN HTTPS 1 . alpn=h2,h3 ipv4hint=192.0.2.1,192.0.2.2 ipv6hint=2001:db8::1",
	"x. 1 IN HTTPS 0 pool.svc.example.org.", `x. 1 IN SVCB 16 svc.example.org. mandatory=alpn,port alpn=h2 port=53 ech="dGVzdA==" key65333=ex1 dohpath=/q{?dns}`,
	"x. 1 IN SOA ns.example.org. hostmaster.example.org. 1 7200 3600 1209600 2147483647",
	"x. 1 IN NSEC next.example.org. A MX RRSIG NSEC TYPE1234",
	"x. 1 IN NSEC3 1 1 12 aabbccdd 2vptu5timamqttgl4luu9kg21e0aor3s A RRSIG",
	"x. 1 IN DS 60485 5 1 2BB183AF5F22588179A53B0A98631FAD1A292118",
	`x. 1 IN CAA 0 issue "ca.example.net"`, `x. 1 IN HINFO "CPU" "OS"`,
	`x. 1 IN NAPTR 100 10 "U" "E2U+sip" "!^.*$!sip:info@example.com!" .`,
	"x. 1 IN LOC 52 22 23.000 N 4 53 32.000 E -2.00m 0.00m 10000m 10m",
	`x. 1 IN TYPE65280 \# 5 0102030405`, `x. 1 IN TYPE65281 \# 0`,
	"x. 1 IN TLSA 3 1 1 d2abde240d7cd3ee6b4b28c54df034b97983a1d16e8a410e4561cb106618e971",
	`x. 1 IN URI 10 1 "https://example.org/"`, "x. 1 IN DNAME other.example.net.",
	"x. 1 IN SSHFP 2 1 123456789abcdef67890123456789abcdef67890", "x. 1 IN APL 1:192.0.2.0/24 !2:2001:db8::/32",
	"x. 1 IN CSYNC 66 3 A NS AAAA", "x. 1 IN RP mbox.example.org. txt.example.org.", "x. 1 IN EUI48 00-00-5e-00-53-2a",
	"x. 1 IN CNAME target.example.net.", "x. 1 IN IPSECKEY 10 1 2 192.0.2.38 AQNRU3mG7TVTO2BkR47usntb102uFJtugbo6BSGvgqt4AQ==",
	"x. 1 IN DNSKEY 256 3 5 AQPSKmynfzW4kyBv015MUG2DeIQ3Cbl+BBZH4b/0PY1kxkmvHjcZc8nokfzj31GajIQKY+5CptLr3buXA10hWqTkF7H6RfoRqXQeogmMHfpftf6z",
	"x. 1 IN RRSIG A 8 2 3600 20380119031407 19990101000000 12051 example.org. lAaEzB5teQLLKyDenatmyhca7blLRg9DoGNrhe3NReBZN5C5/pMQk8Jcu25hv2fW23/SLm5IC2zaDpp2Fzgm6Jf7e90/yLcwQPuE7JjS55WMF+HELEh7Z6AEb+Iq4BWmNhUz6gPxD4d9eRMs7EAzk13o1NYi5/JhfL6IlaYyqkc=",
	"x. 1 IN RRSIG A 8 2 3600 20370201000000 19990101000000 12051 example.org. lAaEzB5teQLLKyDenatmyhca7blLRg9DoGNrhe3NReBZ",
)

// rr returns a record of that owner; of that type, unless it is zero.
func (g *traffic) rr(owner string, qtype, class uint16) dns.RR {
	i := g.IntN(len(templates))
	for n := 0; qtype != 0 && templates[i].Header().Rrtype != qtype; n++ {
		if i = (i + 1) % len(templates); n == len(templates) {
			break
		}
	}
	rr := dns.Copy(templates[i])
	h := rr.Header()
	h.Name, h.Class, h.Ttl = owner, class, g.ttl()
	switch rr := rr.(type) {
	case *dns.A:
		rr.A = net.IPv4(10, byte(g.Uint32()), byte(g.Uint32()), byte(g.Uint32()))
	case *dns.MX:
		rr.Mx = g.host()
	case *dns.NS:
		rr.Ns = g.host()
	case *dns.SRV:
		rr.Target = g.host()
	case *dns.RFC3597:
		if h.Rrtype == 65280 && g.one(3) {
			rr.Rdata = strings.Repeat("c0", g.IntN(1400)) // looks like compression pointers
		}
	case *dns.TXT:
		for range g.IntN(4) {
			rr.Txt = append(rr.Txt, strings.Repeat("t", g.IntN(256)))
		}
		if g.one(3) {
			rr.Txt = append(rr.Txt, `\"quoted\" \000\200\255 \\`)
		}
	}
	return rr
}

func (g *traffic) host() string { return g.respelled(fmt.Sprintf("h%d.sub.example.org.", g.IntN(20))) }

func (g *traffic) ttl() uint32 {
	switch g.IntN(10) {
	case 0:
		return 0
	case 1:
		return g.Uint32() >> 1
	}
	return uint32(g.IntN(5000))
}

func (g *traffic) rrs(most int, owner string, class uint16) (rrs []dns.RR) {
	for range g.IntN(most + 1) {
		name := owner
		if g.one(3) {
			name = g.host()
		}
		rrs = append(rrs, g.rr(name, 0, class))
	}
	return rrs
}

var soaTemplate = parsed("example.org. 300 IN SOA ns.example.org. hostmaster.example.org. 1 7200 3600 1209600 2147483647")[0]

func (g *traffic) soa(class uint16) dns.RR {
	rr := dns.Copy(soaTemplate)
	rr.Header().Class, rr.Header().Ttl = class, g.ttl()
	return rr
}

// response returns a response to q as an upstream might give it.
func (g *traffic) response(q dns.Question) *dns.Msg {
	for {
		m := g.anyResponse(q)
		ours := admit.Classify(m, time.Now())
		stock, _ := response.Typify(m, time.Now())
		bare := len(m.Ns)+len(m.Extra) == 0
		// What the built-in cache takes for something else is left out.
		if m.Rcode == dns.RcodeNameError && ours != stock || ours == response.Delegation && ours != stock && !bare {
			continue
		}
		return m
	}
}

func (g *traffic) anyResponse(q dns.Question) *dns.Msg {
	m := new(dns.Msg)
	m.Response = !g.one(60)
	m.Truncated = g.one(40)
	m.Authoritative, m.RecursionAvailable = g.one(3), !g.one(4)
	m.AuthenticatedData, m.Zero, m.Compress = g.one(2), g.one(20), g.one(2)
	m.Question = []dns.Question{q}

	sizes := []int{1, 2, 4, 8, 20, 60}
	most := sizes[g.IntN(len(sizes))]
	switch kind := g.IntN(16); kind {
	default: // an answer, maybe at the end of a chain
		owner := q.Name
		for range g.IntN(3) {
			c := &dns.CNAME{Hdr: dns.RR_Header{Name: owner, Rrtype: dns.TypeCNAME, Class: q.Qclass, Ttl: g.ttl()}, Target: g.host()}
			if strings.EqualFold(c.Target, owner) {
				break
			}
			m.Answer = append(m.Answer, c)
			owner = c.Target
		}
		for range 1 + g.IntN(most) {
			m.Answer = append(m.Answer, g.rr(owner, q.Qtype, q.Qclass))
		}
		if g.one(3) {
			m.Answer = append(m.Answer, g.rr(owner, dns.TypeRRSIG, q.Qclass))
		}
		if g.one(3) {
			m.Ns = g.rrs(most, "example.org.", q.Qclass)
			m.Extra = g.rrs(most, "ns.example.org.", q.Qclass)
		}
	case 0, 1:
		m.Rcode = dns.RcodeNameError
		m.Ns = append(g.rrs(3, "example.org.", q.Qclass), g.soa(q.Qclass))
	case 2, 3:
		m.Ns = append(g.rrs(3, "example.org.", q.Qclass), g.soa(q.Qclass))
	case 4:
		m.Rcode = dns.RcodeServerFailure
		m.Extra = g.rrs(1, q.Name, q.Qclass)
	case 5: // a delegation
		for range 1 + g.IntN(4) {
			m.Ns = append(m.Ns, g.rr("example.org.", dns.TypeNS, q.Qclass))
		}
		m.Extra = g.rrs(most, "ns.example.org.", q.Qclass)
	case 6: // all it has to say is in the additional section
		m.Extra = g.rrs(most, q.Name, q.Qclass)
	case 7:
		m.Rcode = g.IntN(16)
		m.Ns = g.rrs(2, "example.org.", q.Qclass)
	case 8: // anything
		m.Answer = g.rrs(most, q.Name, q.Qclass)
		m.Ns = g.rrs(most, "example.org.", q.Qclass)
		m.Extra = g.rrs(most, q.Name, q.Qclass)
	case 9: // a chain that ends early
		m.Answer = []dns.RR{g.rr(q.Name, dns.TypeCNAME, q.Qclass)}
		if g.one(2) {
			m.Ns = []dns.RR{g.soa(q.Qclass)}
		}
	}
	if g.one(2) {
		o := &dns.OPT{Hdr: dns.RR_Header{Name: ".", Rrtype: dns.TypeOPT}}
		o.SetUDPSize(uint16(g.IntN(65536)))
		if g.one(2) {
			o.SetDo()
		}
		if g.one(3) {
			o.Option = g.options()
		}
		m.Extra = append(m.Extra, o)
	}
	return m
}

func (g *traffic) options() (options []dns.EDNS0) {
	for range 1 + g.IntN(3) {
		switch g.IntN(6) {
		case 0:
			options = append(options, &dns.EDNS0_COOKIE{Code: dns.EDNS0COOKIE, Cookie: "0102030405060708"})
		case 1:
			options = append(options, &dns.EDNS0_NSID{Code: dns.EDNS0NSID})
		case 2:
			options = append(options, &dns.EDNS0_SUBNET{Code: dns.EDNS0SUBNET, Family: 1, SourceNetmask: 24, Address: net.IPv4(192, 0, 2, 0)})
		case 3:
			options = append(options, &dns.EDNS0_PADDING{Padding: make([]byte, g.IntN(100))})
		case 4:
			options = append(options, &dns.EDNS0_LOCAL{Code: 65001, Data: []byte("data")})
		case 5:
			options = append(options, &dns.EDNS0_EDE{InfoCode: 15, ExtraText: "no"})
		}
	}
	return options
}

var bufferSizes = []int{0, 1, 511, 512, 513, 1219, 1220, 1221, 1231, 1232, 1233, 1400, 1479, 1480, 1481, 4095, 4096, 4097, 65535}

// request returns a request for that question from some client.
func (g *traffic) request(q dns.Question) *dns.Msg {
	q.Name = g.respelled(q.Name)
	r := new(dns.Msg)
	r.Id = uint16(g.Uint32())
	r.Question = []dns.Question{q}
	r.RecursionDesired, r.AuthenticatedData, r.CheckingDisabled = !g.one(4), g.one(3), g.one(6)
	r.Zero, r.Authoritative = g.one(8), g.one(20)
	if g.one(3) {
		return r
	}
	o := &dns.OPT{Hdr: dns.RR_Header{Name: ".", Rrtype: dns.TypeOPT}}
	o.SetUDPSize(uint16(bufferSizes[g.IntN(len(bufferSizes))]))
	if g.one(3) {
		o.SetUDPSize(uint16(g.Uint32()))
	}
	if g.one(3) {
		o.SetDo()
	}
	if g.one(4) {
		o.Hdr.Ttl |= g.Uint32() & 0x7fff // Z
	}
	if g.one(12) {
		o.Hdr.Ttl |= g.Uint32() & 0xff000000 // extended rcode
	}
	if g.one(20) {
		o.SetVersion(uint8(g.Uint32()))
	}
	if g.one(3) {
		o.Option = g.options()
	}
	r.Extra = append(r.Extra, o)
	if g.one(30) {
		r.Extra = append(r.Extra, g.rr("extra.example.org.", 0, dns.ClassINET))
	}
	return r
}

var questionTypes = []uint16{dns.TypeA, dns.TypeA, dns.TypeA, dns.TypeAAAA, dns.TypeMX, dns.TypeTXT, dns.TypeSOA, dns.TypeSRV,
	dns.TypeHTTPS, dns.TypeSVCB, dns.TypeCNAME, dns.TypeANY, dns.TypeNS, dns.TypeDS, dns.TypeDNSKEY, dns.TypeRRSIG, dns.TypeNSEC, dns.TypeNAPTR, 65280, 65281}

func (g *traffic) question() dns.Question {
	q := dns.Question{Name: g.name(), Qtype: questionTypes[g.IntN(len(questionTypes))], Qclass: dns.ClassINET}
	if g.one(20) {
		q.Qclass = dns.ClassCHAOS
	}
	return q
}

// The three chains see the same requests, upstream answers and times; what they put on the
// wire must be the same. Lines of the specification that go beyond the built-in cache are left
// out here (SOA MINIMUM and TTLs of 2^31 or more), and have tests of their own.
func TestRepliesAreThoseOfCache(t *testing.T) {
	batches, histories := 30, 150
	if testing.Short() || raceEnabled {
		batches = 5
	}
	var sent [ways]uint64
	for batch := range batches {
		synctest.Test(t, func(t *testing.T) {
			g := newTraffic(uint64(batch))
			tr := newTrio(t, fmt.Sprintf("same/%d", batch), roomyOptions())
			for history := range histories {
				q := g.question()
				for step := range 3 + g.IntN(8) {
					if step == 0 || g.one(6) {
						m := g.response(q)
						verbatim := g.one(25)
						if verbatim {
							switch g.IntN(5) {
							case 0:
								m.Question = nil
							case 1:
								m.Question = append(m.Question, m.Question[0])
							case 2:
								m.Question[0].Name = "other.example.org."
							case 3:
								m.Question[0].Qtype++
							case 4:
								m.Question[0].Name = g.respelled(m.Question[0].Name)
							}
						}
						if g.one(25) {
							m = nil
						}
						tr.script(m, verbatim)
					}
					client := plainClients[g.IntN(len(plainClients))]
					if diff := tr.compare(g.request(q), client); diff != "" {
						t.Errorf("batch %d, history %d, step %d:\n%s", batch, history, step, diff)
						return
					}
					waits := []time.Duration{0, 0, 0, 400e6, 999e6, 1e9, 1500e6, 3e9, 60e9, 2000e9}
					time.Sleep(waits[g.IntN(len(waits))])
				}
			}
			for w, n := range sentWays(tr.bytes()) {
				sent[w] += n
			}
			if ws := sentWays(tr.message()); ws[wayBytes] != 0 || ws[wayPlugin] == 0 {
				t.Errorf("behind a plugin that may change replies, hits went %v", ws)
			}
		})
		if t.Failed() {
			return
		}
	}
	t.Logf("hits by way %v: %v", wayNames, sent)
	for _, w := range []way{wayBytes, wayRequest, wayEDNS, waySize} {
		if sent[w] == 0 {
			t.Errorf("no hit was sent %q: the traffic does not reach it", wayNames[w])
		}
	}
}

// filler is a response whose reply without OPT has that many bytes.
func filler(q dns.Question, size int) *dns.Msg {
	m := new(dns.Msg)
	m.Response = true
	m.Question = []dns.Question{q}
	for at := m.Len(); at < size; at = m.Len() {
		rr := &dns.RFC3597{Hdr: dns.RR_Header{Name: q.Name, Rrtype: 65280, Class: dns.ClassINET, Ttl: 300}}
		fixed := dns.Len(rr)
		n := min(size-at-fixed, 200)
		if rest := size - at - fixed - n; rest > 0 && rest < fixed {
			n -= fixed // leave room for one more
		}
		rr.Rdata = strings.Repeat("ab", n)
		m.Answer = append(m.Answer, rr)
	}
	return m
}

func TestBytesAreSentUpToTheSizeThatFits(t *testing.T) { synctest.Test(t, sizesThatFit) }

func sizesThatFit(t *testing.T) {
	o := stockOptions()
	o.maxMemory = 128 << 20 // for answers of 64 KB
	tr := newTrio(t, t.Name(), o)
	serial := 0
	for _, client := range plainClients {
		for _, buffer := range []int{-1, 0, 512, 1219, 1220, 1221, 1232, 1480, 4096, 65535} {
			limit := max(buffer, dns.MinMsgSize)
			switch client {
			case udp4Client:
				limit = min(limit, 1480)
			case udp6Client:
				limit = min(limit, 1220)
			default:
				limit = dns.MaxMsgSize
			}
			for _, at := range []int{512, 1220, 1232, 1480, 4096, 65535, limit} {
				for delta := -1; delta <= 1; delta++ {
					serial++
					q := dns.Question{Name: fmt.Sprintf("s%d.example.org.", serial), Qtype: 65280, Qclass: dns.ClassINET}
					opt := 0
					r := new(dns.Msg)
					r.Question = []dns.Question{q}
					if buffer >= 0 {
						r.SetEdns0(uint16(buffer), false)
						opt = 11
					}
					size := at + delta
					if size-opt > dns.MaxMsgSize {
						continue // can be stored in compressed form only
					}
					m := filler(q, size-opt)
					if m.Len() != size-opt {
						t.Fatalf("filler made %d bytes, want %d", m.Len(), size-opt)
					}
					tr.script(m, false)
					if diff := tr.compare(r, client); diff != "" {
						t.Fatalf("miss, size %d: %.2000s", size, diff)
					}
					before := sentWays(tr.bytes())
					if diff := tr.compare(r, client); diff != "" {
						t.Fatalf("hit, size %d: %.2000s", size, diff)
					}
					want := wayBytes
					if size > limit {
						want = waySize
					}
					after := sentWays(tr.bytes())
					if after[want] != before[want]+1 {
						t.Errorf("%s %v, buffer %d, reply of %d bytes: not sent %q", client.Network(), client, buffer, size, wayNames[want])
					}
				}
			}
		}
	}
}

// The server measures messages with Msg.Len, which is longer than the packet for strings with
// escapes and for base64 with padding: it compresses and cuts by that length.
func TestRepliesWithRecordsThatTheServerOverestimates(t *testing.T) {
	binary := strings.Repeat(`\200`, 100)
	sig := "lAaEzB5teQLLKyDenatmyhca7blLRg9DoGNrhe3NReBZN5C5/pMQk8Jcu25hv2fW23/SLm5IC2zaDpp2Fzgm6Jf7e90/yLcwQPuE7JjS55WMF+HELEh7Z6AEb+Iq4BWmNhUz6gPxD4d9eRMs7EAzk13o1NYi5/JhfL6IlaYyqkc="
	tests := []struct {
		name   string
		qtype  uint16
		record string
		sizes  []int // of the client's buffer, beside none
	}{
		{"binary TXT", dns.TypeTXT, fmt.Sprintf("x. 300 IN TXT %s %s", binary, binary), []int{512, 600, 850, 1232}},
		{"padded signature", dns.TypeRRSIG, "x. 300 IN RRSIG A 8 2 3600 20380119031407 19990101000000 12051 example.org. " + sig, nil},
	}
	for _, tc := range tests {
		inBubble(t, tc.name, func(t *testing.T) {
			tr := newTrio(t, t.Name(), stockOptions())
			rr := parsed(tc.record)[0]
			rr.Header().Name = "host.example.org."
			m := new(dns.Msg)
			m.Response = true
			m.Answer = []dns.RR{rr}
			if tc.qtype == dns.TypeRRSIG {
				m.Answer = append(m.Answer, dns.Copy(rr), dns.Copy(rr))
			}
			tr.script(m, false)
			sizes := append(tc.sizes, -1)
			if tc.sizes == nil {
				for size := 512; size < 800; size++ {
					sizes = append(sizes, size)
				}
			}
			for _, size := range sizes {
				r := asking("host.example.org.", tc.qtype)
				if size >= 0 {
					r.SetEdns0(uint16(size), false)
				}
				for range 2 {
					if diff := tr.compare(r, udp4Client); diff != "" {
						t.Fatalf("buffer %d: %s", size, diff)
					}
				}
			}
		})
	}
}

// An answer whose plain form is over 64 KiB is stored compressed. Its owners must keep the
// letters that the upstream gave them, whoever asks.
func TestAnswersStoredCompressedAreThoseOfCache(t *testing.T) { synctest.Test(t, storedCompressed) }

func storedCompressed(t *testing.T) {
	tr := newTrio(t, t.Name(), stockOptions())
	owner := strings.Repeat("a123456789.", 20) + "example.org."
	m := new(dns.Msg)
	m.Response = true
	for i := range 600 {
		m.Answer = append(m.Answer, &dns.A{
			Hdr: dns.RR_Header{Name: owner, Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: 300},
			A:   net.IPv4(10, 0, byte(i>>8), byte(i)),
		})
	}
	tr.script(m, false)
	for _, name := range []string{owner, owner, strings.ToUpper(owner), strings.ToLower(owner), "A" + owner[1:]} {
		for _, client := range plainClients {
			for _, size := range []int{-1, 512, 4096} {
				r := asking(name, dns.TypeA)
				if size >= 0 {
					r.SetEdns0(uint16(size), false)
				}
				if diff := tr.compare(r, client); diff != "" {
					t.Fatalf("%.3000s", diff)
				}
			}
		}
	}
	if ws := sentWays(tr.bytes()); ws[wayAnswer] == 0 || ws[wayBytes] != 0 {
		t.Errorf("hits went %v, want all as %q", ws, wayNames[wayAnswer])
	}
}

// plainAddr is an address of a kind that the server does not know.
type plainAddr string

func (a plainAddr) Network() string { return "test" }
func (a plainAddr) String() string  { return string(a) }

// wrappedAddr is an address around another, as the proxy protocol makes them.
type wrappedAddr struct{ net.Addr }

func (a wrappedAddr) Unwrap() net.Addr { return a.Addr }

// testOption is an EDNS option that the tests register as supported.
const testOption = 65099

func TestBytesAreSentOnlyWhereNobodyWouldNotice(t *testing.T) {
	edns.SetSupportedOption(testOption)
	withOPT := func(options ...dns.EDNS0) func(*dns.Msg) {
		return func(r *dns.Msg) {
			r.SetEdns0(4096, false)
			r.Extra[0].(*dns.OPT).Option = options
		}
	}
	type test struct {
		name    string
		front   []string
		addr    string // of the server
		group   []*dnsserver.Config
		client  net.Addr
		request func(*dns.Msg)
		answer  *dns.Msg
		want    way
	}
	const record = "host.example.org. 300 IN A 192.0.2.1"
	tests := []test{
		{name: "nothing in front"},
		{name: "TCP", client: tcp4Client},
		{name: "IPv6", client: udp6Client},
		{name: "EDNS", request: withOPT()},
		{name: "DO", request: func(r *dns.Msg) { r.SetEdns0(4096, true) }},
		{name: "cookie", request: withOPT(&dns.EDNS0_COOKIE{Code: dns.EDNS0COOKIE, Cookie: "0102030405060708"})},
		{name: "ECS", request: withOPT(&dns.EDNS0_SUBNET{Code: dns.EDNS0SUBNET, Family: 1, SourceNetmask: 8, Address: net.IPv4(10, 0, 0, 0)})},
		{name: "padding", request: withOPT(&dns.EDNS0_PADDING{Padding: make([]byte, 32)})},
		{name: "unknown option", request: withOPT(&dns.EDNS0_LOCAL{Code: 65098, Data: []byte("x")})},
		{name: "supported option", request: withOPT(&dns.EDNS0_LOCAL{Code: testOption, Data: []byte("x")}), want: wayEDNS},
		{name: "NSID", request: withOPT(&dns.EDNS0_NSID{Code: dns.EDNS0NSID}), want: wayEDNS},
		{name: "NSID behind others", request: withOPT(&dns.EDNS0_PADDING{}, &dns.EDNS0_NSID{Code: dns.EDNS0NSID}), want: wayEDNS},
		{name: "TSIG in the request", request: func(r *dns.Msg) { r.SetTsig("key.", dns.HmacSHA256, 300, 0) }, want: wayRequest},
		{name: "TSIG beside OPT", request: func(r *dns.Msg) {
			r.SetEdns0(4096, false)
			r.SetTsig("key.", dns.HmacSHA256, 300, 0)
		}, want: wayRequest},
		{name: "a record in the request", request: func(r *dns.Msg) { r.Extra = parsed(record) }, want: wayRequest},
		{name: "two OPT", request: func(r *dns.Msg) { r.SetEdns0(512, false).SetEdns0(4096, false) }, want: wayRequest},
		{name: "two questions", request: func(r *dns.Msg) { r.Question = append(r.Question, r.Question[0]) }, want: wayRequest},
		{name: "too large", answer: filler(dns.Question{Name: "host.example.org.", Qtype: dns.TypeA}, 600), want: waySize},
		{name: "TLS", addr: "tls://127.0.0.1:853", client: tcp4Client},
		{name: "HTTPS", addr: "https://127.0.0.1:443", client: tcp4Client, want: wayTransport},
		{name: "HTTPS over QUIC", addr: "https3://127.0.0.1:443", client: udp4Client, want: wayTransport},
		{name: "QUIC", addr: "quic://127.0.0.1:853", client: udp4Client, want: wayTransport},
		{name: "gRPC", addr: "grpc://127.0.0.1:443", client: tcp4Client, want: wayTransport},
		{name: "no server", addr: "-", want: wayTransport},
		{name: "address of another kind", client: plainAddr("192.0.2.7:53"), want: wayTransport},
		{name: "IP address", client: &net.IPAddr{IP: net.IPv4(192, 0, 2, 7)}, want: wayTransport},
		{name: "wrapped address", client: wrappedAddr{udp4Client}, want: wayTransport},
		{name: "decorated server", group: []*dnsserver.Config{
			{Zone: "a."},
			{Zone: "b.", UDPDecorateWriterFunc: func(*dnsserver.Server) dns.DecorateWriter { return nil }},
		}, want: wayTransport},
		{name: "server with blocks", group: []*dnsserver.Config{{Zone: "a."}, {Zone: "b."}}},
		{name: "unknown plugin", front: []string{"example"}, want: wayPlugin},
		{name: "neutral ones and another", front: []string{"errors", "rewrite"}, want: wayPlugin},
		{name: "a plugin behind", front: []string{"errors", pluginName, "rewrite"}},
	}
	for _, name := range []string{"metadata", "geoip", "cancel", "bufsize", "nsid", "errors", "local", "any", "chaos", "acl", "log", "dnstap"} {
		tests = append(tests, test{name: "behind " + name, front: []string{name}})
	}
	for _, name := range []string{"shed", "trace", "rewrite", "header", "loadbalance", "dns64", "tsig", "minimal",
		"autopath", "template", "dnssec", "transfer", "cache", "view", "rrl", "hosts", ""} {
		tests = append(tests, test{name: "behind " + name, front: []string{name}, want: wayPlugin})
	}
	signed := positive(record)
	signed.SetTsig("key.", dns.HmacSHA256, 300, 0)
	tests = append(tests, test{name: "TSIG in the answer", answer: signed, want: wayAnswer})

	for i, tc := range tests {
		t.Run(tc.name, func(t *testing.T) {
			var front []plugin.Handler
			for _, name := range tc.front {
				front = append(front, named{name: name})
			}
			up := &scripted{response: positive(record)}
			if tc.answer != nil {
				up.response = tc.answer
				up.response.Response = true
			}
			if tc.name == "too large" {
				up.response.Answer = append(up.response.Answer, parsed(record)...)
			}
			h := startNamed(t, fmt.Sprintf("way/%d", i), stockOptions(), up, front...)
			ctx := context.Background()
			switch tc.addr {
			case "":
				ctx = contextOf(t, "dns://127.0.0.1:53", tc.group...)
			case "-":
			default:
				ctx = contextOf(t, tc.addr, tc.group...)
			}
			client := tc.client
			if client == nil {
				client = udp4Client
			}
			r := asking("host.example.org.", dns.TypeA)
			if tc.request != nil {
				tc.request(r)
			}
			const hits = 6 // in every tier
			ask(ctx, h, asking("host.example.org.", dns.TypeA).SetEdns0(512, r.IsEdns0() != nil && r.IsEdns0().Do()), client)
			for range hits {
				ask(ctx, h, r, client)
			}
			if up.asked != 1 {
				t.Fatalf("the upstream was asked %d times", up.asked)
			}
			var want [ways]uint64
			want[tc.want] = hits
			if got := sentWays(h); got != want {
				t.Errorf("hits by way %v: %v, want %v", wayNames, got, want)
			}
			w, _, _ := ask(ctx, h, r, client)
			if bytes := tc.want == wayBytes; bytes != (w.msgs == 0) {
				t.Errorf("%d messages were written, want bytes: %v", w.msgs, bytes)
			}
		})
	}
}

// A message made of a hit belongs to those who get it: neither does the next hit change it, nor
// does changing it change what the next client gets.
func TestMessageOfHitIsNotShared(t *testing.T) {
	g := newTraffic(7)
	up := new(scripted)
	h := startNamed(t, t.Name(), stockOptions(), up, named{name: "rewrite"})
	ctx := serverContext(t)

	var msgs []*dns.Msg
	var packets [][]byte
	for i := range len(templates) {
		name := fmt.Sprintf("t%d.example.org.", i)
		rr := dns.Copy(templates[i])
		rr.Header().Name, rr.Header().Ttl = name, 300
		up.response = positive()
		up.response.Answer = []dns.RR{rr}
		r := asking(name, rr.Header().Rrtype)
		ask(ctx, h, r, tcp4Client)
		keep := &messageKeeper{wireWriter: wireWriter{addr: tcp4Client}}
		if _, err := h.ServeDNS(ctx, keep, r.Copy()); err != nil {
			t.Fatal(err)
		}
		if len(keep.packets) == 1 {
			msgs, packets = append(msgs, keep.msg), append(packets, keep.packets[0])
		}
	}
	if up.asked < len(templates) || len(msgs) < len(templates)-2 {
		t.Fatalf("%d hits of %d answers", len(msgs), len(templates))
	}
	for i, m := range msgs {
		if got, err := m.Pack(); err != nil || string(got) != string(packets[i]) {
			t.Errorf("later hits changed %v (%v)", m, err)
		}
	}
	for i, m := range msgs {
		r := new(dns.Msg)
		r.Id, r.RecursionDesired, r.Question = m.Id, m.RecursionDesired, append([]dns.Question(nil), m.Question...)
		m.Question[0].Name = "changed."
		for _, rr := range m.Answer {
			rr.Header().Name, rr.Header().Ttl = "changed.", g.Uint32()
			switch rr := rr.(type) {
			case *dns.A:
				clear(rr.A)
			case *dns.AAAA:
				clear(rr.AAAA)
			case *dns.TXT:
				clear(rr.Txt)
			}
		}
		clear(m.Answer)
		w, _, _ := ask(ctx, h, r, tcp4Client)
		if string(w.only(t)) != string(packets[i]) {
			t.Errorf("changing a reply changed the next: %v", unpacked(t, packets[i]))
		}
	}
}

// messageKeeper keeps the message itself.
type messageKeeper struct {
	wireWriter
	msg *dns.Msg
}

func (w *messageKeeper) WriteMsg(m *dns.Msg) error {
	w.msg = m
	return w.wireWriter.WriteMsg(m)
}

// addresses is a response with so many addresses of a name.
func addresses(name string, n int) *dns.Msg {
	var records []string
	for i := range n {
		records = append(records, fmt.Sprintf("%s 300 IN A 10.0.%d.%d", name, i>>8, i&255))
	}
	return positive(records...)
}

// measured puts the plugin prometheus in front.
func measured(next plugin.Handler) plugin.Handler {
	m := metrics.New("")
	m.Next = next
	return m
}

func TestHitInBytesAllocatesNothing(t *testing.T) {
	long := strings.Repeat(strings.Repeat("l", 62)+".", 4)
	tests := []struct {
		name, qname string
		request     func(*dns.Msg)
		keepTTL     bool
		behind      bool // prometheus and loadbalance
		addresses   int  // in the answer; 0: one
	}{
		{name: "plain", qname: "www.example.org."},
		{name: "EDNS", qname: "www.example.org.", request: func(r *dns.Msg) { r.SetEdns0(1232, true) }},
		{name: "escaped name", qname: `a\.b\000c.example.org.`},
		{name: "long name", qname: long, request: func(r *dns.Msg) { r.SetEdns0(1232, false) }},
		{name: "root", qname: "."},
		{name: "keepttl", qname: "www.example.org.", keepTTL: true},
		{name: "compressed", qname: "www.example.org.", addresses: 25},
		{name: "cut", qname: "www.example.org.", addresses: 100},
		{name: "behind prometheus and loadbalance", qname: "www.example.org.", addresses: 3, behind: true},
		{name: "cut, behind prometheus and loadbalance", qname: "www.example.org.", addresses: 100, behind: true},
		{name: "client subnet", qname: "www.example.org.", request: func(r *dns.Msg) {
			r.SetEdns0(1232, false)
			r.IsEdns0().Option = []dns.EDNS0{&dns.EDNS0_SUBNET{Code: dns.EDNS0SUBNET, Family: 1, SourceNetmask: 24, Address: net.IP{192, 0, 2, 0}}}
		}},
	}
	for _, tc := range tests {
		t.Run(tc.name, func(t *testing.T) {
			o := stockOptions()
			o.keepTTL = tc.keepTTL
			up := plugin.Handler(addressUpstream)
			if tc.addresses > 0 {
				up = &scripted{response: addresses(tc.qname, tc.addresses)}
			}
			var wrap []func(plugin.Handler) plugin.Handler
			if tc.behind {
				wrap = append(wrap, measured, balanced(t))
			}
			front, h := startBehind(t, o, up, wrap...)
			r := asking(tc.qname, dns.TypeA)
			if tc.request != nil {
				tc.request(r)
			}
			ctx := serverContext(t)
			w := newUDPWriter()
			sw := request.NewScrubWriter(r, w)
			var options []dns.EDNS0
			if opt := r.IsEdns0(); opt != nil {
				options = opt.Option
			}
			serve := func() {
				if opt := r.IsEdns0(); opt != nil { // the server takes some away
					opt.Option = options
				}
				if _, err := front.ServeDNS(ctx, sw, r); err != nil {
					t.Error(err)
				}
			}
			for range 10 {
				serve()
			}
			n := testing.AllocsPerRun(200, serve)
			front = plugin.Handler(plugin.HandlerFunc(func(context.Context, dns.ResponseWriter, *dns.Msg) (int, error) { return 0, nil }))
			for _, w := range slices.Backward(wrap) {
				front = w(front)
			}
			if bare := testing.AllocsPerRun(200, serve); n != bare && !raceEnabled { // what the outer plugins allocate
				t.Errorf("%v allocations per hit, %v without the cache", n, bare)
			}
			if ws := sentWays(h); ws[wayBytes] < 200 {
				t.Errorf("hits went %v", ws)
			}
		})
	}
}

// FuzzHit gives the three chains a response and a request made of any bytes.
func FuzzHit(f *testing.F) {
	g := newTraffic(99)
	for i := range 200 {
		q := g.question()
		res, err := g.response(q).Pack()
		if err != nil {
			continue
		}
		req, err := g.request(q).Pack()
		if err != nil {
			continue
		}
		f.Add(res, req, byte(i))
	}
	f.Fuzz(func(t *testing.T, resBytes, reqBytes []byte, client byte) {
		res, req := new(dns.Msg), new(dns.Msg)
		if res.Unpack(resBytes) != nil || req.Unpack(reqBytes) != nil || len(req.Question) != 1 || req.Opcode != dns.OpcodeQuery {
			return
		}
		if req.Question[0].Qtype == dns.TypeAXFR || req.Question[0].Qtype == dns.TypeIXFR || beyondStock(res) {
			return
		}
		synctest.Test(t, func(t *testing.T) {
			tr := newTrio(t, "fuzz", stockOptions())
			for _, verbatim := range []bool{true, false} {
				tr.script(res, verbatim)
				for range 2 {
					if diff := tr.compare(req, plainClients[int(client)%len(plainClients)]); diff != "" {
						t.Fatalf("verbatim %v: %s", verbatim, diff)
					}
					time.Sleep(1500 * time.Millisecond)
				}
			}
		})
	})
}

// beyondStock reports whether m is one of the responses for which the specification wants
// something else than what the built-in cache does.
func beyondStock(m *dns.Msg) bool {
	if m.Opcode != dns.OpcodeQuery {
		return true // cached by the built-in cache
	}
	opts := 0
	for _, section := range [][]dns.RR{m.Answer, m.Ns, m.Extra} {
		for _, rr := range section {
			h := rr.Header()
			if h.Rrtype == dns.TypeOPT {
				opts++
				continue
			}
			if soa, ok := rr.(*dns.SOA); h.Ttl > 1<<31-1 || ok && soa.Minttl < h.Ttl {
				return true
			}
		}
	}
	// Another section or number of OPT is a malformed message (RFC 6891 section 6.1.1).
	return opts > 1 || opts == 1 && m.IsEdns0() == nil
}
