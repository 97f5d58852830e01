package query

import (
	"net"
	"testing"

	"github.com/miekg/dns"
)

var (
	udp4 = &net.UDPAddr{IP: net.IPv4(192, 0, 2, 1)}
	udp6 = &net.UDPAddr{IP: net.ParseIP("2001:db8::1")}
	tcp  = &net.TCPAddr{IP: net.IPv4(192, 0, 2, 1)}
)

func request(edit func(*dns.Msg)) *dns.Msg {
	m := new(dns.Msg).SetQuestion("www.example.org.", dns.TypeAAAA)
	if edit != nil {
		edit(m)
	}
	return m
}

// A plain query is read from a packet as it is made of the message.
func TestParseAndFromMsgAgree(t *testing.T) {
	for name, edit := range map[string]func(*dns.Msg){
		"plain":  nil,
		"no RD":  func(m *dns.Msg) { m.RecursionDesired = false },
		"CD, AD": func(m *dns.Msg) { m.CheckingDisabled, m.AuthenticatedData = true, true },
		"EDNS":   func(m *dns.Msg) { m.SetEdns0(1232, false) },
		"DO":     func(m *dns.Msg) { m.SetEdns0(4096, true) },
		"cookie": func(m *dns.Msg) {
			m.SetEdns0(1232, false)
			m.IsEdns0().Option = []dns.EDNS0{&dns.EDNS0_COOKIE{Code: dns.EDNS0COOKIE, Cookie: "0102030405060708"}}
		},
	} {
		m := request(edit)
		p, err := m.Pack()
		if err != nil {
			t.Fatal(err)
		}
		var got Query
		qname, ok := got.Parse(p)
		if !ok || string(qname) != "\x03www\x07example\x03org\x00" {
			t.Errorf("%s: qname %q, %v", name, qname, ok)
			continue
		}
		want := FromMsg(m, m.IsEdns0(), udp6)
		got.Bits &= want.Bits // FromMsg has the bits only that replies need
		if got != want {
			t.Errorf("%s: %+v, want %+v", name, got, want)
		}
	}
}

func TestSpaces(t *testing.T) {
	for _, tc := range []struct {
		name         string
		from         net.Addr
		edit         func(*dns.Msg)
		space, plain int
	}{
		{"UDP", udp4, nil, 512, 512},
		{"small buffer", udp4, func(m *dns.Msg) { m.SetEdns0(100, false) }, 512, 512},
		{"large buffer", udp4, func(m *dns.Msg) { m.SetEdns0(4096, false) }, 4096, 1480},
		{"large buffer over IPv6", udp6, func(m *dns.Msg) { m.SetEdns0(4096, false) }, 4096, 1220},
		{"TCP", tcp, func(m *dns.Msg) { m.SetEdns0(512, false) }, 65535, 65535},
	} {
		m := request(tc.edit)
		q := FromMsg(m, m.IsEdns0(), tc.from)
		if q.Space() != tc.space || q.PlainSpace() != tc.plain {
			t.Errorf("%s: %d and %d, want %d and %d", tc.name, q.Space(), q.PlainSpace(), tc.space, tc.plain)
		}
	}
}

func TestSubnets(t *testing.T) {
	subnet := &dns.EDNS0_SUBNET{Code: dns.EDNS0SUBNET, Family: 1, SourceNetmask: 24, Address: net.IPv4(192, 0, 2, 0).To4()}
	m := request(func(m *dns.Msg) {
		m.SetEdns0(1232, false)
		m.IsEdns0().Option = []dns.EDNS0{subnet}
	})
	if SubnetOf(m.IsEdns0()) == "" || SubnetOf(nil) != "" || SubnetOf(request(nil).IsEdns0()) != "" {
		t.Error("a subnet is not seen, or one that is not there")
	}
	if SubnetOf(WithoutSubnet(m).IsEdns0()) != "" || SubnetOf(m.IsEdns0()) == "" {
		t.Error("the copy has the subnet, or the original has not")
	}
	for scope, want := range map[uint8]bool{0: false, 24: true} {
		if subnet.SourceScope = scope; Scoped(m) != want {
			t.Errorf("scope %d: %v", scope, !want)
		}
	}
}
