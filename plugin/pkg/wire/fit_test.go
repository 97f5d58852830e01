package wire

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net"
	"strings"
	"testing"

	"github.com/miekg/dns"
)

// fitted holds Fit against the DNS library for the message m without OPT and a limit. It reports whether Fit took the message.
func fitted(t *testing.T, m *dns.Msg, limit int) bool {
	t.Helper()
	m.Compress = false
	packed, err := m.Pack()
	if err != nil || len(packed) > 65535 {
		return false
	}
	if m = new(dns.Msg); m.Unpack(packed) != nil {
		return false
	}
	if again, err := m.Pack(); err != nil || !bytes.Equal(again, packed) {
		return false // the library does not read what it writes
	}
	counts := [3]uint16{uint16(len(m.Answer)), uint16(len(m.Ns)), uint16(len(m.Extra))}
	before := counts
	src := bytes.Clone(packed)
	dst := make([]byte, limit, limit+64)
	n, cut, ok := Fit(dst, packed, &counts, limit)
	if !bytes.Equal(src, packed) {
		t.Fatal("the message has changed")
	}
	if beyond := dst[:limit+64][limit:]; !bytes.Equal(beyond, make([]byte, 64)) {
		t.Fatalf("%x behind the limit", beyond)
	}
	if !ok {
		return false
	}
	got := dst[:n]
	for i, c := range counts {
		binary.BigEndian.PutUint16(got[6+2*i:], c)
	}
	if cut {
		got[2] |= byte(FlagTC >> 8)
	}
	if cut != (counts != before) {
		t.Errorf("cut %v: %v of %v", cut, counts, before)
	}
	if m.Len() > limit {
		m.Truncate(limit)
	}
	m.Compress = true
	want, err := m.Pack()
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Fatalf("limit %d: %v of %v\n%x\nwant\n%x\n%v", limit, counts, before, got, want, m)
	}
	return true
}

// fitRandom makes records of the types that Fit knows.
type fitRandom struct{ *rand.Rand }

func (g fitRandom) octets(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(g.IntN(256))
	}
	return b
}

// name returns a wire name of few different labels, so that names share their ends.
func (g fitRandom) name() (b []byte) {
	for range g.IntN(6) {
		label := []string{"a", "A", "www", "example", "org", "svc", "cluster", "local", `x.y`, "\x00\xff", "_tcp", strings.Repeat("l", 40)}[g.IntN(12)]
		b = append(append(b, byte(len(label))), label...)
	}
	return append(b, 0)
}

func (g fitRandom) strings() (b []byte) {
	for range 1 + g.IntN(3) {
		s := g.octets(g.IntN(40))
		b = append(append(b, byte(len(s))), s...)
	}
	return b
}

func (g fitRandom) rr(t uint16) dns.RR {
	l := layouts[t]
	data := g.octets(int(l.before))
	for range l.names {
		data = append(data, g.name()...)
	}
	switch {
	case t == dns.TypeSVCB || t == dns.TypeHTTPS:
		data = append(data, "\x00\x01\x00\x03\x02h2\x00\x04\x00\x04\xc0\x00\x02\x01"[:g.IntN(2)*15]...)
		if len(data) > 0 && g.IntN(2) == 0 {
			data = append(data, "\xff\x00\x00\x03abc"...)
		}
	case l.rest == exact:
		data = append(data, g.octets(int(l.after))...)
	case l.rest == text:
		data = append(data, g.strings()...)
	case l.rest == bitmap, l.rest == nsec3:
		if l.rest == nsec3 {
			for _, n := range []int{g.IntN(9), g.IntN(24)} {
				data = append(append(data, byte(n)), g.octets(n)...)
			}
		}
		for window := range g.IntN(3) {
			data = append(data, byte(3*window), 2, 0x40, 0x01)
		}
	default:
		data = append(data, g.octets(2+g.IntN(70))...)
	}
	b := binary.BigEndian.AppendUint16(g.name(), t)
	b = append(b, 0, 1, 0, 0, 0, 60)
	b = append(binary.BigEndian.AppendUint16(b, uint16(len(data))), data...)
	rr, _, err := dns.UnpackRR(b, 0)
	if err != nil {
		panic(fmt.Sprintf("%d: %x: %v", t, b, err))
	}
	return rr
}

func (g fitRandom) msg() *dns.Msg {
	m := new(dns.Msg)
	m.Response, m.Id = true, uint16(g.IntN(65536))
	name, _, _ := dns.UnpackDomainName(g.name(), 0)
	m.Question = []dns.Question{{Name: name, Qtype: dns.TypeA, Qclass: dns.ClassINET}}
	for _, section := range []*[]dns.RR{&m.Answer, &m.Ns, &m.Extra} {
		for range g.IntN(1 << g.IntN(6)) {
			*section = append(*section, g.rr(fitTypes[g.IntN(len(fitTypes))]))
		}
	}
	return m
}

var fitTypes = func() (all []uint16) {
	for t, l := range layouts {
		if l.known {
			all = append(all, uint16(t))
		}
	}
	return all
}()

// Fit makes what the DNS library makes, to the octet.
func TestFit(t *testing.T) {
	g := fitRandom{rand.New(rand.NewPCG(1, 2))}
	taken, all := 0, 0
	for range 5000 {
		m := g.msg()
		limits := []int{512, 512 + g.IntN(1200), 1232, 4096, MaxFit}
		if n := m.Len(); n > 512 && n < MaxFit {
			limits = append(limits, n-1, n)
		}
		for _, limit := range limits {
			all++
			if fitted(t, m.Copy(), limit) {
				taken++
			}
		}
	}
	if taken < all*9/10 {
		t.Errorf("%d of %d messages", taken, all)
	}
}

// Each type is taken, alone and behind others.
func TestFitTypes(t *testing.T) {
	g := fitRandom{rand.New(rand.NewPCG(3, 4))}
	for _, typ := range fitTypes {
		taken := 0
		for range 100 {
			m := new(dns.Msg).SetQuestion("www.example.org.", typ)
			m.Answer = append(m.Answer, g.rr(typ), g.rr(typ), g.rr(dns.TypeCNAME), g.rr(typ))
			if fitted(t, m, 512+g.IntN(100)) {
				taken++
			}
		}
		if taken < 80 {
			t.Errorf("%s: %d of 100", dns.TypeToString[typ], taken)
		}
	}
}

// What Fit does not know it leaves to others.
func TestFitRefuses(t *testing.T) {
	for _, text := range []string{"www.example.org. 60 IN LOC 42 21 54 N 71 06 18 W -24m 30m", "www.example.org. 60 IN TYPE65280 \\# 1 00"} {
		rr, err := dns.NewRR(text)
		if err != nil {
			t.Fatal(err)
		}
		m := new(dns.Msg).SetQuestion("www.example.org.", dns.TypeANY)
		m.Answer = []dns.RR{rr}
		if fitted(t, m, 512) {
			t.Errorf("%s: taken", text)
		}
	}
	m := new(dns.Msg).SetQuestion("www.example.org.", dns.TypeNS)
	for i := range 1000 { // more names than there is room for
		m.Answer = append(m.Answer, &dns.NS{Hdr: dns.RR_Header{Name: "example.org.", Rrtype: dns.TypeNS, Class: 1}, Ns: fmt.Sprintf("ns%d.example.org.", i)})
	}
	if fitted(t, m.Copy(), MaxFit) {
		t.Error("a thousand names")
	}
	if !fitted(t, m.Copy(), 1232) {
		t.Error("a thousand names of which few fit")
	}
	b, _ := m.Pack()
	if _, _, ok := Fit(make([]byte, MaxFit+1), b, &[3]uint16{1000, 0, 0}, MaxFit+1); ok {
		t.Error("a limit above the bound")
	}
	for n := range min(len(b), 600) { // cut off anywhere
		Fit(make([]byte, 512), b[:n], &[3]uint16{1000, 0, 0}, 512)
	}
}

func TestFitAllocatesNothing(t *testing.T) {
	m, dst := fitMessage(40), make([]byte, 1232)
	if n := testing.AllocsPerRun(100, func() { Fit(dst, m, &[3]uint16{40, 0, 0}, 1232) }); n > 0 {
		t.Errorf("%v allocations", n)
	}
}

// fitMessage is a packed answer of n addresses.
func fitMessage(n int) []byte {
	m := new(dns.Msg).SetQuestion("web.default.svc.cluster.local.", dns.TypeA)
	for i := range n {
		m.Answer = append(m.Answer, &dns.A{
			Hdr: dns.RR_Header{Name: m.Question[0].Name, Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: 30}, A: net.IPv4(10, 0, byte(i>>8), byte(i)),
		})
	}
	b, err := m.Pack()
	if err != nil {
		panic(err)
	}
	return b
}

func BenchmarkFit(b *testing.B) {
	for _, n := range []int{20, 60} {
		m, dst := fitMessage(n), make([]byte, 1232)
		b.Run(fmt.Sprintf("addresses-%d", n), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if _, _, ok := Fit(dst, m, &[3]uint16{uint16(n), 0, 0}, len(dst)); !ok {
					b.Fatal("refused")
				}
			}
		})
		b.Run(fmt.Sprintf("addresses-%d-dns", n), func(b *testing.B) { // what Fit replaces
			msg := new(dns.Msg)
			b.ReportAllocs()
			for b.Loop() {
				if err := msg.Unpack(m); err != nil {
					b.Fatal(err)
				}
				msg.Truncate(len(dst))
				msg.Compress = true
				if _, err := msg.Pack(); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// Any message that the DNS library can read and write becomes the same bytes.
func FuzzFit(f *testing.F) {
	g := fitRandom{rand.New(rand.NewPCG(5, 6))}
	for range 50 {
		if b, err := g.msg().Pack(); err == nil {
			f.Add(b, uint16(g.IntN(3000)))
		}
	}
	f.Fuzz(func(t *testing.T, b []byte, limit uint16) {
		size := 512 + int(limit)%(MaxFit-511)
		var counts [3]uint16
		if len(b) >= HeaderLen { // as it comes: must not panic
			for i := range counts {
				counts[i] = binary.BigEndian.Uint16(b[6+2*i:])
			}
			Fit(make([]byte, size), b, &counts, size)
		}
		m := new(dns.Msg)
		if m.Unpack(b) != nil || len(m.Question) != 1 || m.IsTsig() != nil {
			return
		}
		for _, section := range []*[]dns.RR{&m.Answer, &m.Ns, &m.Extra} {
			for i := 0; i < len(*section); i++ {
				if (*section)[i].Header().Rrtype == dns.TypeOPT {
					*section = append((*section)[:i], (*section)[i+1:]...)
					i--
				}
			}
		}
		fitted(t, m, size)
	})
}
