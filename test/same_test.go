package test

import (
	"bytes"
	"crypto/tls"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sort"
	"strings"
	"testing"
	"time"

	dnstap "github.com/dnstap/golang-dnstap"
	"github.com/miekg/dns"
)

// This file compares with CoreDNS's own cache: one server block has optcache, another cache, and
// the plugins around it are the same. What a client gets, or a plugin in front sees, has to be
// the same too.

// pair is a server with an optcache and a cache, each behind the same plugins.
type pair struct {
	*server
	upstream *upstream
}

// both are the names of the two ports.
var both = []string{"optcache", "cache"}

// startPair starts a block for either, which also serves TLS, on the port with tls behind its name. The word BOTH in a plugin's line becomes its name. The options are
// those of optcache, which has no fast path unless they say so.
func startPair(t testing.TB, options string, plugins ...string) pair {
	t.Helper()
	if !strings.Contains(options, "fastpath") {
		options += "\n\t\tfastpath off"
	}
	u := newUpstream(t)
	cert, key, _ := certificate(t)
	var text strings.Builder
	for _, name := range both {
		cache := name
		if name == "optcache" {
			cache += " {\n\t\tede off\n\t\t" + options + "\n\t}" // cache explains nothing
		}
		b := block(name, u.addr, append(plugins, cache)...)
		if !slices.Contains(plugins, "shed") { // which is for plain DNS only
			b = strings.Replace(b, "{\n", "tls://.:${"+name+"tls} {\n\ttls "+cert+" "+key+"\n", 1)
		}
		text.WriteString(strings.ReplaceAll(b, "BOTH", name))
	}
	return pair{start(t, text.String()), u}
}

// questions are one of everything that a plugin in front may treat in its own way.
func questions() []*dns.Msg {
	q := func(name string, qtype uint16, change ...func(*dns.Msg)) *dns.Msg {
		m := query(name, qtype)
		for _, c := range change {
			c(m)
		}
		return m
	}
	opt := func(size uint16, do bool) func(*dns.Msg) { return func(m *dns.Msg) { edns(m, size, do) } }
	cd := func(m *dns.Msg) { m.CheckingDisabled = true }
	return []*dns.Msg{
		q("www.example.org.", dns.TypeA),
		q("wWw.ExAmPlE.oRg.", dns.TypeA, opt(1232, false)),
		q("www.example.org.", dns.TypeA, opt(0, false)),
		q("www.example.org.", dns.TypeA, cd),
		q("signed.example.org.", dns.TypeA, opt(4096, true)),
		q("signed.example.org.", dns.TypeA, func(m *dns.Msg) { m.AuthenticatedData = true }),
		q("signed.example.org.", dns.TypeA, func(m *dns.Msg) { m.RecursionDesired = false }),
		q("many.example.org.", dns.TypeA, opt(1232, false)),
		q("alias.example.org.", dns.TypeA),
		q("alias.example.org.", dns.TypeCNAME),
		q("www.example.org.", dns.TypeAAAA),
		q("nx.example.org.", dns.TypeA),
		q("nx.example.org.", dns.TypeA, opt(1232, true)),
		q("fail.example.org.", dns.TypeA),
		q("fail.example.org.", dns.TypeA, opt(1232, false)),
		q("refused.example.org.", dns.TypeA),
		q("big.example.org.", dns.TypeTXT),
		q("big.example.org.", dns.TypeTXT, opt(1232, false)),
		q("big.example.org.", dns.TypeTXT, opt(4096, false)),
		q("www.example.org.", dns.TypeANY),
		q(`a\.b\ c\000.example.org.`, dns.TypeA),
		q(strings.Repeat(strings.Repeat("l", 61)+".", 3)+"example.org.", dns.TypeA),
		q(".", dns.TypeNS),
	}
}

// unlike says in what two replies differ, their order of records aside, or is empty. TTLs count
// down while the test runs. In cache's reply, names that are the qname may have another client's letters; in
// optcache's they may not.
func unlike(ours, theirs *dns.Msg) string {
	const seconds = 3
	text := func(m *dns.Msg) string {
		m = m.Copy()
		m.Id = 0
		for _, section := range []*[]dns.RR{&m.Answer, &m.Ns, &m.Extra} {
			*section = slices.DeleteFunc(*section, func(rr dns.RR) bool { return rr.Header().Rrtype == dns.TypeTSIG })
			for _, rr := range *section {
				if rr.Header().Rrtype != dns.TypeOPT {
					rr.Header().Ttl = 0
				}
			}
			sort.Slice(*section, func(i, k int) bool { return (*section)[i].String() < (*section)[k].String() })
		}
		return m.String()
	}
	theirs = theirs.Copy()
	for _, rr := range slices.Concat(theirs.Answer, theirs.Ns, theirs.Extra) {
		if len(theirs.Question) == 1 && strings.EqualFold(rr.Header().Name, theirs.Question[0].Name) {
			rr.Header().Name = theirs.Question[0].Name
		}
	}
	a, b := text(ours), text(theirs)
	switch {
	case a != b:
		return fmt.Sprintf("optcache:\n%s\ncache:\n%s", a, b)
	case (ours.IsTsig() == nil) != (theirs.IsTsig() == nil):
		return fmt.Sprintf("signed by optcache: %v, by cache: %v", ours.IsTsig() != nil, theirs.IsTsig() != nil)
	}
	for i := range ours.Answer {
		if x, y := int(ours.Answer[i].Header().Ttl), int(theirs.Answer[i].Header().Ttl); x > y+seconds || y > x+seconds {
			return fmt.Sprintf("TTL by optcache: %d, by cache: %d", x, y)
		}
	}
	return ""
}

// compare asks both the same several times, from the miss to the hot tier.
func compare(t *testing.T, p pair, q *dns.Msg, client func(addr string) exchanger) {
	t.Helper()
	compareBy(t, q, func(name string) exchanger { return client(p.addr(name)) })
}

// compareBy is compare with clients by name.
func compareBy(t *testing.T, q *dns.Msg, client func(name string) exchanger) {
	t.Helper()
	for try := range 5 {
		var replies [2]*dns.Msg
		var sizes [2]int
		for i, name := range both {
			m := q.Copy()
			m.Id = dns.Id()
			if t := m.IsTsig(); t != nil {
				t.OrigId = m.Id
			}
			reply, n, err := client(name)(m)
			if err != nil {
				t.Fatalf("%s, try %d at %s: %v", q.Question[0].String(), try, name, err)
			}
			if reply.Id != m.Id {
				t.Fatalf("%s: reply to another query", name)
			}
			replies[i], sizes[i] = reply, n
		}
		if diff := unlike(replies[0], replies[1]); diff != "" {
			t.Fatalf("%s, try %d: %s", q.Question[0].String(), try, diff)
		}
		if sizes[0] != sizes[1] {
			t.Errorf("%s, try %d: %d bytes from optcache, %d from cache", q.Question[0].String(), try, sizes[0], sizes[1])
		}
	}
}

func TestSameAsCacheBehind(t *testing.T) {
	t.Parallel()
	const key, secret = "key.example.org.", "c2VjcmV0IG9mIHRoZSB0ZXN0cw=="
	search := filepath.Join(t.TempDir(), "resolv.conf")
	if err := os.WriteFile(search, []byte("search nx.example.org example.org\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	signed := query("www.example.org.", dns.TypeA)
	signed.SetTsig(key, dns.HmacSHA256, 300, time.Now().Unix())
	signedEDNS := edns(query("many.example.org.", dns.TypeA), 1232, false)
	signedEDNS.SetTsig(key, dns.HmacSHA256, 300, time.Now().Unix())
	nsid := edns(query("www.example.org.", dns.TypeA), 1232, false)
	nsid.IsEdns0().Option = []dns.EDNS0{&dns.EDNS0_NSID{Code: dns.EDNS0NSID}}
	cookie := edns(query("www.example.org.", dns.TypeA), 1232, false)
	cookie.IsEdns0().Option = []dns.EDNS0{&dns.EDNS0_COOKIE{Code: dns.EDNS0COOKIE, Cookie: "24a5ac1223344556"}}
	subnet := edns(query("www.example.org.", dns.TypeA), 1232, false)
	subnet.IsEdns0().Option = []dns.EDNS0{&dns.EDNS0_SUBNET{Code: dns.EDNS0SUBNET, Family: 1, SourceNetmask: 24, Address: []byte{192, 0, 2, 0}}}
	chaos := query("version.bind.", dns.TypeTXT)
	chaos.Question[0].Qclass = dns.ClassCHAOS
	two := query("www.example.org.", dns.TypeA)
	two.Extra = records("www.example.org. 0 IN A 192.0.2.99")

	for _, c := range []struct {
		name    string
		options string
		plugins []string
		also    []*dns.Msg
		secrets map[string]string
	}{
		{name: "nothing", also: []*dns.Msg{nsid, cookie, subnet, two}},
		{name: "neutral", plugins: []string{"metadata", "cancel", "bufsize 1100", "nsid", "prometheus 127.0.0.1:${metrics}", "local", "any", "chaos one two"},
			also: []*dns.Msg{nsid, cookie, subnet, chaos, query("localhost.", dns.TypeA)}},
		{name: "nsid", plugins: []string{"nsid the-server"}, also: []*dns.Msg{nsid}},
		{name: "log", plugins: []string{"log"}},
		{name: "shed", plugins: []string{"shed"}},
		{name: "loadbalance", plugins: []string{"loadbalance"}},
		{name: "rewrite", plugins: []string{"rewrite name suffix .alias.test .example.org answer auto"},
			also: []*dns.Msg{query("www.alias.test.", dns.TypeA), query("alias.alias.test.", dns.TypeA), query("nx.alias.test.", dns.TypeA)}},
		{name: "rewrite ttl", plugins: []string{"rewrite ttl regex (.*) 7-9"}},
		{name: "rewrite edns0", plugins: []string{"rewrite edns0 local set 0xfde8 0x0102"}},
		{name: "header", plugins: []string{"header {\n\tresponse set aa\n\tresponse clear ra\n}"}},
		{name: "minimal", plugins: []string{"minimal"}},
		{name: "dns64", plugins: []string{"dns64 {\n\tprefix 64:ff9b::/96\n\tallow_ipv4\n}"},
			also: []*dns.Msg{query("many.example.org.", dns.TypeAAAA), edns(query("www.example.org.", dns.TypeAAAA), 1232, false)}},
		{name: "autopath", plugins: []string{"autopath example.org " + search},
			also: []*dns.Msg{query("www.nx.example.org.", dns.TypeA), edns(query("many.nx.example.org.", dns.TypeA), 1232, false)}},
		{name: "tsig", plugins: []string{"tsig {\n\tsecret " + key + " " + secret + "\n}"},
			also: []*dns.Msg{signed, signedEDNS}, secrets: map[string]string{key: secret}},
		{name: "kubeadm", plugins: []string{"prometheus 127.0.0.1:${metrics}", "loop", "reload", "loadbalance"}},
		{name: "nothing, fast", options: "fastpath", also: []*dns.Msg{nsid, cookie, subnet, two}},
		{name: "neutral, fast", options: "fastpath 1", plugins: []string{"metadata", "cancel", "bufsize 1100", "nsid", "prometheus 127.0.0.1:${metrics}", "local", "any", "chaos one two"},
			also: []*dns.Msg{nsid, cookie, subnet, chaos, query("localhost.", dns.TypeA), query("x.localhost.", dns.TypeAAAA), query("localhost.example.org.", dns.TypeA)}},
		{name: "log of errors, fast", options: "fastpath on", plugins: []string{"log . {\n\tclass error\n}"}},
		{name: "rules, fast", options: "fastpath on", plugins: []string{"log . {\n\tclass denial error\n}", "acl {\n\tblock type TXT\n\tallow net 127.0.0.0/8\n\tblock\n}",
			"rewrite name suffix .alias.test .example.org answer auto", "rewrite ttl exact signed.example.org 7-9", "dns64 {\n\tprefix 64:ff9b::/96\n}"},
			also: []*dns.Msg{query("www.alias.test.", dns.TypeA), query("many.example.org.", dns.TypeAAAA)}},
		{name: "view, fast", options: "fastpath on", plugins: []string{"view some {\n\texpr incidr(client_ip(), '127.0.0.0/8') && not (name() startsWith 'big' && type() == 'TXT')\n\texpr proto() == 'udp' || do() || server_ip() == '127.0.0.1'\n}"}},
		{name: "tsig, fast", options: "fastpath on", plugins: []string{"tsig {\n\tsecret " + key + " " + secret + "\n\trequire TXT\n}"},
			also: []*dns.Msg{signed, signedEDNS}, secrets: map[string]string{key: secret}},
		{name: "kubeadm, fast", options: "fastpath auto", plugins: []string{"prometheus 127.0.0.1:${metrics}", "loop", "reload", "loadbalance"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			p := startPair(t, c.options, c.plugins...)
			for network, suffix := range map[string]string{"tcp": "", "udp": "", "tcp-tls": "tls"} {
				if p.ports[both[0]+suffix] == "" {
					continue
				}
				client := &dns.Client{Net: network, TsigSecret: c.secrets, TLSConfig: &tls.Config{InsecureSkipVerify: true}}
				// All on one connection, and each on its own, which is the chain's.
				one := make(map[string]exchanger)
				for _, name := range both {
					one[name] = overOne(t, client, p.addr(name+suffix))
				}
				for _, q := range append(questions(), c.also...) {
					compareBy(t, q, func(name string) exchanger { return one[name] })
					if network == "tcp" {
						compareBy(t, q, func(name string) exchanger { return over(client, p.addr(name+suffix)) })
					}
				}
			}
		})
	}
}

// A query that is signed gets an answer that is signed, from memory too.
func TestSignedAnswers(t *testing.T) {
	t.Parallel()
	const key, secret = "key.example.org.", "c2VjcmV0IG9mIHRoZSB0ZXN0cw=="
	u := newUpstream(t)
	s := start(t, block("dns", u.addr, "tsig {\n\tsecret "+key+" "+secret+"\n\trequire all\n}", "optcache"))
	for _, network := range []string{"udp", "tcp"} {
		send := over(&dns.Client{Net: network, TsigSecret: map[string]string{key: secret}}, s.addr("dns"))
		for range 4 {
			q := query("www.example.org.", dns.TypeA)
			q.SetTsig(key, dns.HmacSHA256, 300, time.Now().Unix())
			if m := ask(t, send, q); m.IsTsig() == nil || len(m.Answer) != 1 {
				t.Errorf("%s: not a signed answer: %v", network, m)
			}
			if m := ask(t, send, query("www.example.org.", dns.TypeA)); m.Rcode != dns.RcodeRefused {
				t.Errorf("%s: not signed, and got %v", network, m)
			}
		}
	}
	if n := u.count("www.example.org.", dns.TypeA); n != 1 {
		t.Errorf("upstream was asked %d times", n)
	}
}

// What acl keeps from a client, the cache does not give it.
func TestBlockedClient(t *testing.T) {
	t.Parallel()
	for _, options := range []string{"fastpath off", "fastpath on"} {
		t.Run(options, func(t *testing.T) {
			t.Parallel()
			testBlockedClient(t, options)
		})
	}
}

func testBlockedClient(t *testing.T, options string) {
	p := startPair(t, options, "acl {\n\tblock type A net 127.0.0.2/32\n\tfilter net 127.0.0.3/32\n}")
	for _, name := range both {
		for range 4 {
			q := query("www.example.org.", dns.TypeA)
			if m := ask(t, overUDP(p.addr(name)), q); len(m.Answer) != 1 {
				t.Errorf("%s: a client that may: %v", name, m)
			}
			for ip, rcode := range map[string]int{"127.0.0.2": dns.RcodeRefused, "127.0.0.3": dns.RcodeSuccess} {
				// Not ask: acl adds an OPT to what it says, whether the client knows EDNS or not.
				m, _, err := from(ip, p.addr(name))(q)
				if err != nil || m.Rcode != rcode || len(m.Answer) != 0 {
					t.Errorf("%s: %s got %v, %v", name, ip, m, err)
				}
			}
		}
	}
}

// Log lines of hits say what those of cache say: rcode, flags and size.
func TestSameLogLines(t *testing.T) {
	t.Parallel()
	p := startPair(t, "", `log . "SEEN BOTH {type} {class} {name} {proto} {size} {>do} {>bufsize} {rcode} {>rflags} {rsize}"`)
	qs := questions()
	for _, name := range both {
		for _, q := range qs {
			for range 4 {
				ask(t, overUDP(p.addr(name)), q)
			}
		}
	}
	eventually(t, func() error {
		if n := strings.Count(p.out.String(), "SEEN"); n != 2*4*len(qs) {
			return fmt.Errorf("%d lines", n)
		}
		return nil
	})
	lines := map[string][]string{}
	for line := range strings.Lines(p.out.String()) {
		if _, seen, ok := strings.Cut(line, "SEEN "); ok {
			name, rest, _ := strings.Cut(seen, " ")
			lines[name] = append(lines[name], rest)
		}
	}
	// The line comes after the reply, so that of the next query may come before it.
	for _, of := range lines {
		slices.Sort(of)
	}
	for i, line := range lines["cache"] {
		if ours := lines["optcache"][i]; ours != line {
			t.Errorf("optcache: %scache:    %s", ours, line)
		}
	}
}

// Each client query and response goes to dnstap, and holds what the client got.
func TestSameDnstap(t *testing.T) {
	t.Parallel()
	for _, options := range []string{"fastpath off", "fastpath on"} {
		t.Run(options, func(t *testing.T) {
			t.Parallel()
			testSameDnstap(t, options)
		})
	}
}

func testSameDnstap(t *testing.T, options string) {
	dir := t.TempDir()
	taps := map[string]*tap{}
	for _, name := range both {
		taps[name] = newTap(t, filepath.Join(dir, name))
	}
	p := startPair(t, options, "bufsize 1100", "dnstap unix://"+filepath.Join(dir, "BOTH")+" full")
	qs := questions()
	const times = 3
	for _, name := range both {
		udp, tcp := overUDP(p.addr(name)), overOne(t, &dns.Client{Net: "tcp"}, p.addr(name))
		for i, q := range qs {
			for k := range times {
				for n, send := range []exchanger{udp, tcp} {
					q.Id = uint16(2*(i*times+k) + n)
					ask(t, send, q)
				}
			}
		}
	}
	seen := map[string][]*dnstap.Message{}
	for _, name := range both {
		seen[name] = taps[name].clientMessages(t, 4*times*len(qs))
	}
	for i, theirs := range seen["cache"] {
		ours := seen["optcache"][i]
		if ours.GetType() != theirs.GetType() {
			t.Fatalf("message %d: optcache %v, cache %v", i, ours.GetType(), theirs.GetType())
		}
		if ours.GetSocketProtocol() != theirs.GetSocketProtocol() || ours.GetSocketFamily() != theirs.GetSocketFamily() ||
			!bytes.Equal(ours.QueryAddress, theirs.QueryAddress) || (ours.QueryPort == nil) != (theirs.QueryPort == nil) ||
			(ours.QueryTimeSec == nil) != (theirs.QueryTimeSec == nil) || (ours.ResponseTimeSec == nil) != (theirs.ResponseTimeSec == nil) ||
			!bytes.Equal(ours.QueryMessage, theirs.QueryMessage) {
			t.Fatalf("message %d: optcache %v, cache %v", i, ours, theirs)
		}
		var a, b dns.Msg
		if theirs.GetType() == dnstap.Message_CLIENT_QUERY {
			continue
		}
		if err := a.Unpack(ours.GetResponseMessage()); err != nil {
			t.Fatal(err)
		}
		if err := b.Unpack(theirs.GetResponseMessage()); err != nil {
			t.Fatal(err)
		}
		if diff := unlike(&a, &b); diff != "" {
			t.Errorf("message %d: %s", i, diff)
		}
	}
}

// tap collects what one dnstap plugin sends.
type tap struct {
	messages chan *dnstap.Message
}

func newTap(t testing.TB, path string) *tap {
	t.Helper()
	l := listenUnix(t, path)
	tp := &tap{messages: make(chan *dnstap.Message, 1<<16)}
	go func() {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		defer conn.Close()
		r, err := dnstap.NewReader(conn, &dnstap.ReaderOptions{Bidirectional: true})
		if err != nil {
			return
		}
		for d := dnstap.NewDecoder(r, dns.MaxMsgSize*2); ; {
			m := new(dnstap.Dnstap)
			if d.Decode(m) != nil {
				return
			}
			tp.messages <- m.Message
		}
	}()
	return tp
}

// clientMessages waits for n messages about clients, and returns them in the order of the
// queries. What forward says about its upstream is passed over.
func (tp *tap) clientMessages(t testing.TB, n int) (ms []*dnstap.Message) {
	t.Helper()
	timeout := time.After(patience)
	for len(ms) < n {
		select {
		case m := <-tp.messages:
			if kind := m.GetType(); kind == dnstap.Message_CLIENT_QUERY || kind == dnstap.Message_CLIENT_RESPONSE {
				ms = append(ms, m)
			}
		case <-timeout:
			t.Fatalf("dnstap sent %d of %d messages", len(ms), n)
		}
	}
	order := func(m *dnstap.Message) int {
		b := append(m.GetQueryMessage(), m.GetResponseMessage()...)
		return (int(b[0])<<8|int(b[1]))*2 + int(m.GetType())%2
	}
	sort.SliceStable(ms, func(i, k int) bool { return order(ms[i]) < order(ms[k]) })
	return ms
}
