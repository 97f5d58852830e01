package chain

import (
	"math/rand/v2"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"

	"github.com/coredns/coredns/core/dnsserver"
	_ "github.com/coredns/coredns/plugin/metadata"
	"github.com/coredns/coredns/request"

	"github.com/miekg/dns"

	"github.com/optcache/optcache/plugin/pkg/wire"
)

// viewed returns a server block with a view of these expressions.
func viewed(t *testing.T, expressions ...string) *dnsserver.Config {
	t.Helper()
	cfg, _ := block(t, "view some {\n\texpr "+strings.Join(expressions, "\n\texpr ")+"\n}")
	v := cfg.Handler("view").(dnsserver.Viewer)
	cfg.ViewName, cfg.FilterFuncs = v.ViewName(), []dnsserver.FilterFunc{v.Filter}
	return cfg
}

// viewQuery is a query that an expression may be asked about, as the fast path has it, and as the server has it.
type viewQuery struct {
	asked Asked
	state request.Request
}

// randomQuery returns a query, and the client's address as it is.
func randomQuery(t *testing.T, rng *rand.Rand) (q viewQuery, client netip.Addr) {
	t.Helper()
	client = netip.MustParseAddr(askedClients[rng.IntN(len(askedClients))])
	r := new(dns.Msg).SetQuestion(askedNames[rng.IntN(len(askedNames))], askedTypes[rng.IntN(len(askedTypes))])
	if rng.IntN(2) == 0 {
		r.SetEdns0(1232, rng.IntN(2) == 0)
	}
	p, err := r.Pack()
	if err != nil {
		t.Fatal(err)
	}
	end := wire.SkipName(p, wire.HeaderLen)
	name := make([]byte, end-wire.HeaderLen)
	wire.Lower(name, p[wire.HeaderLen:end])
	read := new(dns.Msg)
	if err := read.Unpack(p); err != nil {
		t.Fatal(err)
	}
	ours := netip.MustParseAddrPort([]string{"192.0.2.53:53", "[2001:db8::53]:5353", "[::]:53"}[rng.IntN(3)])
	from := netip.AddrPortFrom(client, uint16(1024+rng.IntN(3)))
	q.asked = Asked{
		Packet: p, Name: name, Qtype: r.Question[0].Qtype, DO: r.IsEdns0() != nil && r.IsEdns0().Do(), TCP: rng.IntN(2) == 0,
		Client: netip.AddrPortFrom(client.WithZone("").Unmap(), from.Port()),
	}
	w := &origin{}
	if q.asked.TCP {
		w.local, w.remote = net.TCPAddrFromAddrPort(ours), net.TCPAddrFromAddrPort(from)
	} else {
		w.local, w.remote = net.UDPAddrFromAddrPort(ours), net.UDPAddrFromAddrPort(from)
	}
	q.asked.Local, q.state = w.local, request.Request{Req: read, W: w}
	return q, client
}

// A view takes what the plugin's expressions take.
func TestViewsTakeWhatThePluginTakes(t *testing.T) {
	t.Parallel()
	for _, expressions := range [][]string{
		{"true"}, {"1 + 1"}, {"true", "false"},
		{"incidr(client_ip(), '192.0.2.0/24')"},
		{"not incidr(client_ip(), 'fe80::/10')"},
		{"incidr(client_ip(), '192.0.2.0/24') || incidr(client_ip(), '2001:db8::/32')", "type() == 'A'"},
		{"incidr(name(), '192.0.2.0/24')"}, // an error
		{"client_ip() in ['192.0.2.1', '::1', '127.0.0.1']"},
		{"client_ip() == '::ffff:192.0.2.1'"},
		{"name() == 'www.example.org.'"}, {"name() endsWith '.example.org.'"}, {"name() matches '^www[.]'"}, {`name() contains '\\'`}, {"name() == '.'"},
		{"type() in ['A', 'AAAA']"}, {"type() == 'TYPE65280'"}, {"class() == 'IN' && opcode() == 0"},
		{"proto() == 'tcp'"}, {"do()"}, {"port() == '1025'"}, {"int(port()) > 1024 && do()"},
		{"server_ip() == '192.0.2.53'"}, {"server_port() == '53'"}, {"server_ip() + server_port() == '::53'"},
		{"len(split(name(), '.')) > 3"}, {"any(split(name(), '.'), do()) ? type() == 'A' : do() or opcode() == 0"},
		{"name() startsWith 'www' and (client_ip() startsWith '192.0.2.' or proto() == 'udp') and type() != 'TXT'"},
	} {
		cfg := viewed(t, expressions...)
		v, err := ViewOf(cfg)
		if err != nil {
			t.Errorf("%q: %v", expressions, err)
			continue
		}
		rng := rand.New(rand.NewPCG(3, 4))
		taken := 0
		for range 2000 {
			q, client := randomQuery(t, rng)
			want := cfg.FilterFuncs[0](t.Context(), &q.state)
			takes, known := v.Takes(&q.asked)
			if !known && client.Zone() != "" && v.parts&viewClient != 0 {
				continue
			}
			if !known || takes != want {
				t.Fatalf("%q: %v, %v, want %v for %v from %v to %v", expressions, takes, known, want, q.state.Req, q.state.RemoteAddr(), q.state.LocalAddr())
			}
			if takes {
				taken++
			}
		}
		t.Logf("%q takes %d queries", expressions, taken)
	}
}

// Expressions that go by more than a plain query decide nothing, and the error names what they ask for.
func TestViewsThatGoByMore(t *testing.T) {
	t.Parallel()
	for expression, word := range map[string]string{
		"metadata('a/b') == 'c'": "metadata", "type() == 'A' && (do() || metadata('a/b') == 'c')": "metadata",
		"size() > 100": "size", "id() == 7": "id", "bufsize() > 512": "bufsize", "now().Year() > 2000": "now",
		"'x' in $env": "$env", "let x = name(); x == 'a.'": "x",
	} {
		v, err := ViewOf(viewed(t, "true", expression))
		if err == nil || !strings.Contains(err.Error(), " "+word+" ") || !strings.Contains(err.Error(), "view some") {
			t.Errorf("%s: %v", expression, err)
		}
		q, _ := randomQuery(t, rand.New(rand.NewPCG(1, 1)))
		if _, known := v.Takes(&q.asked); known {
			t.Errorf("%s: decides", expression)
		}
	}
	cfg := viewed(t, "true")
	cfg.FilterFuncs = append(cfg.FilterFuncs, cfg.FilterFuncs[0])
	if _, err := ViewOf(cfg); err == nil {
		t.Error("another plugin chooses, too, and there is no error")
	}
	if v, err := ViewOf(new(dnsserver.Config)); v != nil || err != nil {
		t.Errorf("a block without a view: %v, %v", v, err)
	}
}

// A decision that is kept costs no allocation, many workers may ask at once, and names without end take no memory without end.
func TestViewsKeepDecisions(t *testing.T) {
	v, err := ViewOf(viewed(t, "incidr(client_ip(), '192.0.2.0/24') && name() endsWith 'org.'"))
	if err != nil {
		t.Fatal(err)
	}
	q, _ := randomQuery(t, rand.New(rand.NewPCG(5, 5)))
	q.asked.Client = netip.MustParseAddrPort("192.0.2.1:53")
	v.Takes(&q.asked)
	if n := testing.AllocsPerRun(100, func() { v.Takes(&q.asked) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
	var wg sync.WaitGroup
	for worker := range 4 {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(6, uint64(worker)))
			for range 3 * viewKept {
				q, _ := randomQuery(t, rng)
				q.asked.Client = netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 0, byte(2 + rng.IntN(2)), byte(rng.IntN(256))}), 53)
				want := q.asked.Client.Addr().As4()[2] == 2 && strings.HasSuffix(string(q.asked.Name), "\x03org\x00")
				if takes, known := v.Takes(&q.asked); !known || takes != want {
					t.Errorf("%v, %v for %q from %v", takes, known, q.asked.Name, q.asked.Client)
					return
				}
			}
		})
	}
	wg.Wait()
	kept := 0
	for i := range v.decided {
		if v.decided[i].Load() != nil {
			kept++
		}
	}
	if kept < viewKept/8 || kept > viewKept {
		t.Errorf("%d decisions are kept", kept)
	}
}
