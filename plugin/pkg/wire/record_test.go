package wire

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/miekg/dns"
)

// records has one record of each shape that a stored section can hold.
var records = []string{
	"example.org. 300 IN A 192.0.2.1",
	"example.org. 301 IN AAAA 2001:db8::1",
	"www.example.org. 302 IN CNAME example.org.",
	"example.org. 303 IN MX 10 mail.example.org.",
	`example.org. 304 IN TXT "v=spf1 -all" "" "\000\255"`,
	"example.org. 305 IN SOA ns.example.org. host\\.master.example.org. 1 7200 900 1209600 300",
	"_sip._tcp.example.org. 306 IN SRV 1 2 5060 sip.example.org.",
	"example.org. 307 IN RRSIG A 13 2 300 20300101000000 20200101000000 12345 example.org. c2lnbmF0dXJl",
	"a.example.org. 308 IN NSEC c.example.org. A RRSIG NSEC",
	`example.org. 309 IN HTTPS 1 . alpn="h2" port="8443"`,
	"example.org. 310 IN TYPE65280 \\# 4 DEADBEEF",
	"example.org. 311 IN TYPE65281 \\# 0",
	`a\.b\000\\.example.org. 2147483647 IN NS ns\.1.example.org.`,
	". 0 IN NS a.root-servers.net.",
	strings.Repeat("a.", 127) + " 312 CH TXT long",
}

// packRecord returns the wire form of rr.
func packRecord(t *testing.T, rr dns.RR) []byte {
	t.Helper()
	buf := make([]byte, 4096)
	n, err := dns.PackRR(rr, buf, 0, nil, false)
	if err != nil {
		t.Fatalf("PackRR(%v): %v", rr, err)
	}
	return buf[:n]
}

// packMessage returns the part behind the header that dns packs for a message with these records and no question.
func packMessage(t *testing.T, rrs []dns.RR) []byte {
	t.Helper()
	buf, err := (&dns.Msg{Answer: rrs}).Pack()
	if err != nil {
		t.Fatalf("Pack: %v", err)
	}
	return buf[HeaderLen:]
}

func parse(t *testing.T, text string) dns.RR {
	t.Helper()
	rr, err := dns.NewRR(text)
	if err != nil {
		t.Fatalf("NewRR(%q): %v", text, err)
	}
	return rr
}

func TestTTLOffsetsOfPackedMessages(t *testing.T) {
	t.Parallel()
	rnd := rand.New(rand.NewPCG(9, 10))
	for range 500 {
		var rrs []dns.RR
		for range rnd.IntN(2 * len(records)) {
			rrs = append(rrs, parse(t, records[rnd.IntN(len(records))]))
		}
		body := packMessage(t, rrs)
		offsets, ok := TTLOffsets(nil, body, len(rrs))
		if !ok || len(offsets) != len(rrs) {
			t.Fatalf("TTLOffsets of %v = %v, %v", rrs, offsets, ok)
		}
		for i, off := range offsets {
			if ttl := binary.BigEndian.Uint32(body[off:]); ttl != rrs[i].Header().Ttl {
				t.Fatalf("TTL at %d is %d, want that of %v", off, ttl, rrs[i])
			}
		}

		for i, rr := range rrs {
			rr.Header().Ttl = 77
			binary.BigEndian.PutUint32(body[offsets[i]:], 77)
		}
		if !bytes.Equal(body, packMessage(t, rrs)) {
			t.Fatalf("what is at the offsets is not the TTLs of %v", rrs)
		}
	}
}

func TestTTLOffsetsAppends(t *testing.T) {
	t.Parallel()
	body := packRecord(t, parse(t, records[0]))
	got, ok := TTLOffsets([]uint16{7}, body, 1)
	if want := []uint16{7, 13 + 4}; !ok || !slices.Equal(got, want) {
		t.Errorf("TTLOffsets = %v, %v, want %v", got, ok, want)
	}
	got, ok = TTLOffsets([]uint16{7}, nil, 0)
	if want := []uint16{7}; !ok || !slices.Equal(got, want) {
		t.Errorf("TTLOffsets of no records = %v, %v, want %v", got, ok, want)
	}
}

func TestTTLOffsetsRefuses(t *testing.T) {
	t.Parallel()
	one := packRecord(t, parse(t, "example.org. 300 IN A 192.0.2.1"))
	two := append(bytes.Clone(one), one...)
	opt := &dns.OPT{Hdr: dns.RR_Header{Name: ".", Rrtype: dns.TypeOPT}}
	withOPT := append(bytes.Clone(one), packRecord(t, opt)...)
	compressed := append(bytes.Clone(one), "\xc0\x00\x00\x01\x00\x01\x00\x00\x00\x00\x00\x00"...)
	tooLong := append([]byte("\x00\x00\x63\x00\x01\x00\x00\x00\x00\xff\xff"), make([]byte, 0xFFFF)...)

	tests := []struct {
		behaviour string
		body      []byte
		count     int
	}{
		{"no bytes for a record", nil, 1},
		{"bytes for no record", one, 0},
		{"fewer records than counted", two, 3},
		{"more records than counted", two, 1},
		{"trailing byte", append(bytes.Clone(one), 0), 1},
		{"trailing octet that is a name", append(bytes.Clone(one), 0), 2},
		{"compressed owner", compressed, 2},
		{"OPT record", withOPT, 2},
		{"longer than a message", tooLong, 1},
	}
	for n := range len(one) {
		if _, ok := TTLOffsets(nil, one[:n], 1); ok {
			t.Errorf("TTLOffsets of the first %d of %d octets: ok", n, len(one))
		}
	}
	for _, tc := range tests {
		got, ok := TTLOffsets([]uint16{7}, tc.body, tc.count)
		if ok || !slices.Equal(got, []uint16{7}) {
			t.Errorf("%s: TTLOffsets = %v, %v, want [7], false", tc.behaviour, got, ok)
		}
	}
}

func TestTTLOffsetsReachesTheLastOctet(t *testing.T) {
	t.Parallel()
	filler := []byte("\x00\x00\x63\x00\x01\x00\x00\x00\x00\xff\xe9") // RDATA of 65535 - 2*11 octets
	body := append(filler, make([]byte, 0xFFFF-2*11)...)
	body = append(body, "\x00\x00\x63\x00\x01\x00\x00\x00\x00\x00\x00"...)
	got, ok := TTLOffsets(nil, body, 2)
	if want := []uint16{5, 0xFFFF - 6}; len(body) != 0xFFFF || !ok || !slices.Equal(got, want) {
		t.Errorf("TTLOffsets of %d octets = %v, %v, want %v", len(body), got, ok, want)
	}
}

func TestPutOPT(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		size uint16
		do   bool
	}{{512, false}, {1232, true}, {65535, true}, {0, false}} {
		opt := &dns.OPT{Hdr: dns.RR_Header{Name: ".", Rrtype: dns.TypeOPT}}
		opt.SetUDPSize(tc.size)
		var flags uint16
		if tc.do {
			opt.SetDo()
			flags = FlagDO
		}
		got := bytes.Repeat([]byte{0xAA}, OPTLen+1)
		PutOPT(got, tc.size, flags)
		if want := append(packRecord(t, opt), 0xAA); !bytes.Equal(got, want) {
			t.Errorf("PutOPT(%d, %#x) = %x, want %x", tc.size, flags, got, want)
		}
	}
}

func TestPutOPTWritesAllFlags(t *testing.T) {
	t.Parallel()
	var got [OPTLen]byte
	PutOPT(got[:], 0x1234, 0xABCD)
	if want := "\x00\x00\x29\x12\x34\x00\x00\xab\xcd\x00\x00"; string(got[:]) != want {
		t.Errorf("PutOPT = %x, want %x", got, want)
	}
}

func TestAddEDE(t *testing.T) {
	t.Parallel()
	for _, code := range []uint16{dns.ExtendedErrorCodeStaleAnswer, dns.ExtendedErrorCodeCachedError, 0xffff} {
		opt := &dns.OPT{Hdr: dns.RR_Header{Name: ".", Rrtype: dns.TypeOPT}, Option: []dns.EDNS0{&dns.EDNS0_EDE{InfoCode: code}}}
		opt.SetUDPSize(1232)
		got := bytes.Repeat([]byte{0xAA}, OPTLen+EDELen+1)
		PutOPT(got, 1232, 0)
		AddEDE(got, code)
		if want := append(packRecord(t, opt), 0xAA); !bytes.Equal(got, want) {
			t.Errorf("AddEDE(%d) = %x, want %x", code, got, want)
		}
	}
}

// FuzzTTLOffsets compares TTLOffsets with a loop that reads owner names with dns.UnpackDomainName.
func FuzzTTLOffsets(f *testing.F) {
	f.Fuzz(func(t *testing.T, body []byte, count uint8) {
		// As in checkSkipName, with the fixed fields and RDATA behind each name.
		var want []uint16
		off, wantOK := 0, len(body) <= 0xFFFF
		for range count {
			if !wantOK {
				break
			}
			name, end, err := dns.UnpackDomainName(body, off)
			var plain [MaxName]byte
			n, ok := PackName(plain[:], name)
			if err != nil || !ok || !bytes.Equal(plain[:n], body[off:end]) || end+10 > len(body) ||
				binary.BigEndian.Uint16(body[end:]) == dns.TypeOPT {
				wantOK = false
				break
			}
			want = append(want, uint16(end+4))
			off = end + 10 + int(binary.BigEndian.Uint16(body[end+8:]))
			wantOK = off <= len(body)
		}
		wantOK = wantOK && off == len(body)
		if !wantOK {
			want = nil
		}
		got, ok := TTLOffsets(nil, body, int(count))
		if ok != wantOK || !slices.Equal(got, want) {
			t.Fatalf("TTLOffsets(%x, %d) = %v, %v, want %v, %v", body, count, got, ok, want, wantOK)
		}
		for _, at := range got {
			_ = body[at:][:4] // every TTL lies in body
		}
	})
}

func TestRespellOwners(t *testing.T) {
	name := pack(t, "a.Example.ORG.")
	rrs := []dns.RR{
		parse(t, "A.example.org. 300 IN CNAME a.EXAMPLE.org."), // RDATA stays
		parse(t, "a.example.org. 300 IN A 192.0.2.1"),
		parse(t, "b.example.org. 300 IN A 192.0.2.1"),
		parse(t, "x.A.example.org. 300 IN A 192.0.2.1"),
		parse(t, "example.org. 300 IN A 192.0.2.1"),
		parse(t, "a.example.ORG. 300 IN TXT \"a.example.org.\""),
	}
	body := packMessage(t, rrs)
	whole := bytes.Clone(body)
	RespellOwners(body, len(rrs), name)
	for _, i := range []int{0, 1, 5} {
		rrs[i].Header().Name = "a.Example.ORG."
	}
	if want := packMessage(t, rrs); !bytes.Equal(body, want) {
		t.Errorf("got  %q\nwant %q", body, want)
	}
	for cut := range whole { // never panics, and does not touch what is behind
		part := bytes.Clone(whole)
		RespellOwners(part[:cut:cut], len(rrs), name)
		if !bytes.Equal(part[cut:], whole[cut:]) {
			t.Fatalf("cut at %d: wrote behind it", cut)
		}
	}
}
