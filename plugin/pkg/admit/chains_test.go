package admit

import (
	"fmt"
	"testing"
	"time"

	"github.com/coredns/coredns/plugin/pkg/response"
	"github.com/miekg/dns"
)

// Classification takes bounded time for every response. Each case is the worst of its kind in a message of 64 KiB.
func TestLongChainsAreClassifiedInBoundedTime(t *testing.T) {
	const n = 5000
	name := func(i int) string { return fmt.Sprintf("%x.", i%n) }
	chain := func(next func(i int) int) []dns.RR {
		rrs := make([]dns.RR, n)
		for i := range rrs {
			rrs[i] = &dns.CNAME{Hdr: dns.RR_Header{Name: name(i), Rrtype: dns.TypeCNAME, Class: dns.ClassINET, Ttl: 300}, Target: name(next(i))}
		}
		return rrs
	}
	last := &dns.A{Hdr: dns.RR_Header{Name: "end.", Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: 300}}
	toEnd := chain(func(i int) int { return i + 1 })
	toEnd[n-1].(*dns.CNAME).Target = "end."
	reversed := make([]dns.RR, 0, n)
	for i := range toEnd {
		reversed = append(reversed, toEnd[n-1-i])
	}
	fork := append(chain(func(i int) int { return i + 1 }), chain(func(i int) int { return i + 2 })...)
	tests := []struct {
		name   string
		answer []dns.RR
		want   bool // keepable
	}{
		{"chain", append([]dns.RR{last}, toEnd...), true},
		{"chain backwards", append(reversed, last), true},
		{"chain without end", toEnd, false},
		{"circle", append([]dns.RR{last}, chain(func(i int) int { return i + 1 })...), false},
		{"all to itself", chain(func(i int) int { return i }), false},
		{"all to the first", chain(func(i int) int { return 0 }), false},
		{"forks", fork, false},
		{"letters of another case", append([]dns.RR{last}, append(chain(func(i int) int { return i }), toEnd...)...), false},
	}
	for _, tc := range tests {
		t.Run(tc.name, func(t *testing.T) {
			m := new(dns.Msg).SetQuestion("0.", dns.TypeA)
			m.Answer = tc.answer
			start := time.Now()
			kind := Classify(m, start)
			got := Keepable(m, kind)
			if d := time.Since(start); d > time.Second {
				t.Errorf("took %v", d)
			}
			if got != tc.want {
				t.Errorf("keepable %v as %v, want %v", got, kind, tc.want)
			}
			m.Ns = []dns.RR{&dns.SOA{Hdr: dns.RR_Header{Name: ".", Rrtype: dns.TypeSOA, Class: dns.ClassINET, Ttl: 300}, Minttl: 300}}
			if kind, want := Classify(m, start), response.NoError; !tc.want {
				want = response.NoData
				if kind != want {
					t.Errorf("with SOA: %v, want %v", kind, want)
				}
			}
		})
	}
}
