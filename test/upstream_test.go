package test

import (
	"fmt"
	"net"
	"strings"
	"sync"
	"testing"

	"github.com/miekg/dns"

	"github.com/optcache/optcache/test/freeport"
)

// upstream is a DNS server on loopback that counts what it is asked. What it answers is in the
// first label of the name: an address for most, and see handle for the others.
type upstream struct {
	addr string

	mu    sync.Mutex
	asked map[dns.Question]int
}

func newUpstream(t testing.TB) *upstream {
	t.Helper()
	u := &upstream{asked: map[dns.Question]int{}}
	l, pc := listen(t)
	u.addr = l.Addr().String()
	for _, s := range []*dns.Server{{Listener: l, Handler: u}, {PacketConn: pc, Handler: u}} {
		// The sockets are open already: what comes before the server runs, waits in them.
		go s.ActivateAndServe()
	}
	t.Cleanup(func() {
		l.Close()
		pc.Close()
	})
	return u
}

// listen opens TCP and UDP on the same port.
func listen(t testing.TB) (net.Listener, net.PacketConn) {
	t.Helper()
	address := freeport.Address(t, "127.0.0.1")
	l, err := net.Listen("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	pc, err := net.ListenPacket("udp", address)
	if err != nil {
		t.Fatal(err)
	}
	return l, pc
}

func listenUnix(t testing.TB, path string) net.Listener {
	t.Helper()
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

// count is how often the upstream was asked for a name and type. Classes are added up.
func (u *upstream) count(name string, qtype uint16) (n int) {
	u.mu.Lock()
	defer u.mu.Unlock()
	for q, times := range u.asked {
		if q.Name == name && q.Qtype == qtype {
			n += times
		}
	}
	return n
}

// askedOnce fails the test unless the upstream was asked once for each of the first n hosts.
func askedOnce(t testing.TB, u *upstream, n int) {
	t.Helper()
	for i := range n {
		if times := u.count(hostName(i), dns.TypeA); times != 1 {
			t.Fatalf("the upstream was asked %d times for %s", times, hostName(i))
		}
	}
}

// ServeDNS implements dns.Handler.
func (u *upstream) ServeDNS(w dns.ResponseWriter, r *dns.Msg) {
	q := r.Question[0]
	q.Name = strings.ToLower(q.Name)
	u.mu.Lock()
	u.asked[q]++
	u.mu.Unlock()
	m := answer(r)
	m.Compress = true
	if opt := r.IsEdns0(); opt != nil {
		m.SetEdns0(4096, opt.Do())
	}
	if w.RemoteAddr().Network() == "udp" {
		size := dns.MinMsgSize
		if opt := r.IsEdns0(); opt != nil {
			size = int(opt.UDPSize())
		}
		m.Truncate(size)
	}
	w.WriteMsg(m)
}

const denialSOA = "example.org. 300 IN SOA ns1.example.org. hostmaster.example.org. 1 7200 3600 1209600 300"

// answer answers by the first label of the name asked for.
func answer(r *dns.Msg) *dns.Msg {
	q := r.Question[0]
	m := new(dns.Msg).SetReply(r)
	m.RecursionAvailable = true
	label, rest, _ := strings.Cut(strings.ToLower(q.Name), ".")
	address := func(owner string, ttl int, last int) string {
		return fmt.Sprintf("%s %d IN A 192.0.2.%d", owner, ttl, last)
	}
	switch {
	case label == "nx" || strings.HasPrefix(rest, "nx."):
		m.Rcode = dns.RcodeNameError
		m.Ns = records(denialSOA)
	case label == "fail":
		m.Rcode = dns.RcodeServerFailure
	case label == "refused":
		m.Rcode = dns.RcodeRefused
	case label == "big" && q.Qtype == dns.TypeTXT:
		for i := range 16 {
			m.Answer = append(m.Answer, records(fmt.Sprintf("%s 300 IN TXT %q", q.Name, fmt.Sprintf("%02d %s", i, strings.Repeat("x", 180))))...)
		}
	case label == "short":
		m.Answer = records(address(q.Name, 1, 10))
	case label == "alias":
		m.Answer = records(q.Name+" 300 IN CNAME target."+rest, address("target."+rest, 300, 10))
	case q.Qtype == dns.TypeA && label == "many":
		for i := range 6 {
			m.Answer = append(m.Answer, records(address(q.Name, 300, i+1))...)
		}
		m.Ns = records("example.org. 300 IN NS ns1.example.org.")
		m.Extra = records(address("ns1.example.org.", 300, 53))
	case q.Qtype == dns.TypeA:
		m.Answer = records(address(q.Name, 300, 10))
	case q.Qtype == dns.TypePTR:
		m.Answer = records(q.Name + " 300 IN PTR host.example.org.")
	default:
		m.Ns = records(denialSOA)
	}
	if label == "signed" {
		m.AuthenticatedData = true
		if opt := r.IsEdns0(); opt != nil && opt.Do() {
			m.Answer = append(m.Answer, records(q.Name+" 300 IN RRSIG A 13 3 300 20370101000000 20250101000000 1 example.org. c2lnbmF0dXJl")...)
		}
	}
	return m
}

func records(lines ...string) (rrs []dns.RR) {
	for _, line := range lines {
		rr, err := dns.NewRR(line)
		if err != nil {
			panic(err)
		}
		rrs = append(rrs, rr)
	}
	return rrs
}
