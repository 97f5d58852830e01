package reply

import (
	"net"
	"testing"

	"github.com/miekg/dns"

	"github.com/optcache/optcache/plugin/pkg/admit"
	"github.com/optcache/optcache/plugin/pkg/query"
	"github.com/optcache/optcache/plugin/pkg/record"
	"github.com/optcache/optcache/plugin/pkg/wire"
)

// stored puts a response through a record and returns the answer that is read from it, for a request.
func stored(t *testing.T, res, r *dns.Msg) *Answer {
	t.Helper()
	a := &Answer{Buffer: record.NewBuffer(), Query: query.FromMsg(r, r.IsEdns0(), &net.UDPAddr{IP: net.IPv4(192, 0, 2, 1)})}
	n, ok := wire.PackName(a.Out[wire.HeaderLen:], r.Question[0].Name)
	if !ok {
		t.Fatal("no name")
	}
	a.Key.Set(record.MakeSeed(0), a.Out[wire.HeaderLen:][:n], a.Query.Qtype, a.Query.Qclass, a.Query.DO(), a.Query.CD())
	a.Body = wire.HeaderLen + n + wire.QuestionTail
	e := record.Entry{TTL: 300, Flags: record.Flags(res.Rcode)}
	body, ok := admit.Pack(&a.Buffer, res, &e)
	if !ok {
		t.Fatal("it cannot be packed")
	}
	a.BuildRecord(&e, body, "")
	a.Entry = record.LoadEntry(a.Words)
	a.CopyAnswer(a.Words)
	return a
}

func response(t *testing.T, r *dns.Msg, records ...string) *dns.Msg {
	t.Helper()
	m := new(dns.Msg).SetReply(r)
	for _, text := range records {
		rr, err := dns.NewRR(text)
		if err != nil {
			t.Fatal(err)
		}
		m.Answer = append(m.Answer, rr)
	}
	return m
}

// Bytes and message say the same, in the letters of the client.
func TestPacketIsTheMessage(t *testing.T) {
	for _, edns := range []bool{false, true} {
		r := new(dns.Msg).SetQuestion("wWw.Example.org.", dns.TypeA)
		if edns {
			r.SetEdns0(1232, true)
		}
		a := stored(t, response(t, r, "www.example.org. 300 IN A 192.0.2.1", "www.example.org. 300 IN A 192.0.2.2"), r)
		want, err := a.Message(r, 17)
		if err != nil {
			t.Fatal(err)
		}
		if edns {
			want.SetEdns0(1232, true)
		}
		packet := a.Packet(17, NoEDE)
		got := new(dns.Msg)
		if err := got.Unpack(packet); err != nil {
			t.Fatal(err)
		}
		if got.String() != want.String() || got.Answer[0].Header().Name != "wWw.Example.org." || got.Answer[0].Header().Ttl != 17 {
			t.Errorf("EDNS %v: bytes\n%v\nmessage\n%v", edns, got, want)
		}
		if n := a.Length(NoEDE); n < len(packet) {
			t.Errorf("EDNS %v: %d bytes, taken for %d", edns, len(packet), n)
		}
	}
}

func TestExplanation(t *testing.T) {
	r := new(dns.Msg).SetQuestion("www.example.org.", dns.TypeA).SetEdns0(1232, false)
	for _, tc := range []struct {
		rcode int
		now   int64
		want  uint16
	}{
		{dns.RcodeSuccess, 0, NoEDE}, {dns.RcodeSuccess, 400e9, StaleEDE}, {dns.RcodeNameError, 400e9, dns.ExtendedErrorCodeStaleNXDOMAINAnswer},
		{dns.RcodeServerFailure, 0, dns.ExtendedErrorCodeCachedError},
	} {
		m := response(t, r)
		m.Rcode = tc.rcode
		a := stored(t, m, r)
		if got := a.Explain(tc.now); got != tc.want {
			t.Errorf("rcode %d at %d: %d, want %d", tc.rcode, tc.now, got, tc.want)
		}
		a.Query.EDNS = false
		if got := a.Explain(tc.now); got != NoEDE {
			t.Errorf("without EDNS: %d", got)
		}
	}
}
