package optcache

import (
	"bytes"
	"context"
	"fmt"
	"net/netip"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/miekg/dns"

	"github.com/optcache/optcache/plugin/control"
	"github.com/optcache/optcache/plugin/pkg/subnet"
)

// scoped is how many prefixes an ecs scoped in tests has for a name.
func scoped(o options, most int) options {
	o.ecs = ecsOptions{ecsScoped, most}
	o.coalesce = coalesceOptions{waiters: 1000, wait: 2 * time.Second}
	return o
}

// from is a question for name from a client with that subnet; "": without one.
func from(name, prefix string) *dns.Msg {
	r := asking(name, dns.TypeA)
	if prefix == "" {
		return r
	}
	p := netip.MustParsePrefix(prefix)
	s := &dns.EDNS0_SUBNET{Code: dns.EDNS0SUBNET, Family: 1, SourceNetmask: uint8(p.Bits()), Address: p.Masked().Addr().AsSlice()}
	if p.Addr().Is6() {
		s.Family = 2
	}
	r.SetEdns0(1232, false)
	r.IsEdns0().Option = append(r.IsEdns0().Option, s)
	return r
}

// geo is an upstream whose answers depend on the client's subnet. The first label of a name says how: sN answers with SCOPE N, none
// without the option, nx denies with SCOPE 24, ttl0 with TTL 0. Each answer has another address, and a text that says how many
// questions there were. Its address begins with the two first bytes of the client's subnet.
type geo struct {
	upstream
}

func newGeo() *geo {
	g := new(geo)
	g.script(0, func(_ context.Context, w dns.ResponseWriter, r *dns.Msg) (int, error) {
		return 0, w.WriteMsg(geoAnswer(r))
	})
	return g
}

func geoAnswer(r *dns.Msg) *dns.Msg {
	m := new(dns.Msg).SetReply(r)
	how, _, _ := strings.Cut(r.Question[0].Name, ".")
	addr := [4]byte{9, 9, 9, 9}
	var asked *dns.EDNS0_SUBNET
	if opt := r.IsEdns0(); opt != nil {
		for _, o := range opt.Option {
			if s, ok := o.(*dns.EDNS0_SUBNET); ok {
				asked = s
			}
		}
		m.SetEdns0(1232, opt.Do())
	}
	if asked != nil {
		scope := 24
		if n, ok := strings.CutPrefix(how, "s"); ok {
			scope, _ = strconv.Atoi(n)
		}
		if how != "none" {
			s := *asked
			if s.SourceScope = uint8(scope); s.SourceNetmask == 0 {
				s.SourceScope = 0
			}
			m.IsEdns0().Option = append(m.IsEdns0().Option, &s)
		}
		copy(addr[:], asked.Address.To4())
		if v6 := asked.Address.To16(); asked.Family == 2 {
			addr = [4]byte(v6[4:8])
		}
	}
	if how == "nx" {
		m.Rcode = dns.RcodeNameError
		m.Ns = parsed("example.org. 60 IN SOA a. b. 1 2 3 4 60")
		return m
	}
	ttl := 60
	if how == "ttl0" {
		ttl = 0
	}
	m.Answer = parsed(fmt.Sprintf("%s %d IN A %d.%d.%d.%d", r.Question[0].Name, ttl, addr[0], addr[1], addr[2], addr[3]))
	return m
}

// scopeIn returns the client subnet of a reply as text: address, SOURCE and SCOPE; "" if there is none.
func scopeIn(m *dns.Msg) string {
	var all []string
	if opt := m.IsEdns0(); opt != nil {
		for _, o := range opt.Option {
			if s, ok := o.(*dns.EDNS0_SUBNET); ok {
				all = append(all, s.String())
			}
		}
	}
	return strings.Join(all, " ")
}

// Which answers answer whom, and what their SCOPE is. Each row asks first, then second; hit says whether the second one is a hit.
func TestScopedAnswers(t *testing.T) {
	for _, c := range []struct {
		name, first, second string
		hit                 bool
		scope               string // of the second reply
	}{
		{"s24", "10.1.1.0/24", "10.1.1.0/24", true, "10.1.1.0/24/24"},
		{"s24", "10.1.1.0/24", "10.1.2.0/24", false, "10.1.2.0/24/24"},
		{"s16", "10.1.1.0/24", "10.1.2.0/24", true, "10.1.2.0/24/16"},
		{"s16", "10.1.1.0/24", "10.2.1.0/24", false, "10.2.1.0/24/16"},
		{"s16", "10.1.1.0/24", "10.1.2.3/32", true, "10.1.2.3/32/16"},
		{"s24", "10.1.1.0/24", "10.1.0.0/16", false, "10.1.0.0/16/24"}, // less is known of this client
		{"s28", "10.1.1.0/24", "10.1.1.0/24", true, "10.1.1.0/24/28"},
		{"s28", "10.1.1.0/24", "10.1.1.0/28", false, "10.1.1.0/28/28"}, // it may get a better answer
		{"s0", "10.1.1.0/24", "10.9.9.0/24", true, "10.9.9.0/24/0"},
		{"s0", "10.1.1.0/24", "2001:db8::/56", true, "[2001:db8::]/56/0"},
		{"s0", "10.1.1.0/24", "", true, ""},
		{"none", "10.1.1.0/24", "10.9.9.0/24", true, "10.9.9.0/24/0"},
		{"none", "10.1.1.0/24", "", true, ""},
		{"s24", "10.1.1.0/24", "", false, ""},
		{"s24", "", "10.1.1.0/24", false, "10.1.1.0/24/24"}, // nobody has said that it is for this client
		{"s24", "", "", true, ""},
		{"s48", "2001:db8:1:100::/56", "2001:db8:1:200::/56", true, "[2001:db8:1:200::]/56/48"},
		{"s48", "2001:db8:1:100::/56", "2001:db8:2:100::/56", false, "[2001:db8:2:100::]/56/48"},
		{"s8", "32.1.0.0/16", "2001:db8::/56", false, "[2001:db8::]/56/8"},
		{"nx", "10.1.1.0/24", "10.1.1.0/24", true, "10.1.1.0/24/24"},
		{"nx", "10.1.1.0/24", "10.1.2.0/24", false, "10.1.2.0/24/24"},
		// SOURCE 0: the client does not want to say where it is. What it gets is for its like only.
		{"s24", "0.0.0.0/0", "0.0.0.0/0", true, "0.0.0.0/0/0"},
		{"s24", "0.0.0.0/0", "::/0", true, "[::]/0/0"},
		{"s24", "0.0.0.0/0", "10.1.1.0/24", false, "10.1.1.0/24/24"},
		{"s24", "0.0.0.0/0", "", false, ""},
		{"s24", "10.1.1.0/24", "0.0.0.0/0", false, "0.0.0.0/0/0"},
		{"s24", "", "0.0.0.0/0", false, "0.0.0.0/0/0"},
		{"s0", "10.1.1.0/24", "0.0.0.0/0", true, "0.0.0.0/0/0"}, // for all
		{"none", "0.0.0.0/0", "10.1.1.0/24", true, "10.1.1.0/24/0"},
	} {
		t.Run(c.name+" "+strings.NewReplacer("/", "_").Replace(c.first+" "+c.second), func(t *testing.T) {
			up := newGeo()
			h := startNamed(t, t.Name(), scoped(stockOptions(), 100), up)
			ctx := contextOf(t, "dns://:53")
			name := c.name + ".example.org."
			first := answer(t, ctx, h, from(name, c.first))
			up.queries()
			m := answer(t, ctx, h, from(name, c.second))
			if hit := len(up.queries()) == 0; hit != c.hit || scopeIn(m) != c.scope {
				t.Errorf("hit %v, want %v; %q, want %q", hit, c.hit, scopeIn(m), c.scope)
			}
			if c.hit && len(m.Answer) > 0 && m.Answer[0].String() != first.Answer[0].String() {
				t.Errorf("got %v, first was %v", m.Answer, first.Answer)
			}
			if c.second != "" && m.IsEdns0() == nil {
				t.Error("there is no OPT")
			}
			// Whatever came, the first client still has a hit.
			again := answer(t, ctx, h, from(name, c.first))
			if len(up.queries()) != 0 || scopeIn(again) != scopeIn(first) {
				t.Errorf("the first client gets %q, and got %q", scopeIn(again), scopeIn(first))
			}
		})
	}
}

// The answer with the longest prefix is served, and when it has expired the next one.
func TestLongestPrefixFirst(t *testing.T) {
	up := newGeo()
	h := startNamed(t, t.Name(), scoped(stockOptions(), 100), up)
	clock := clocked(h)
	ctx := contextOf(t, "dns://:53")
	say := func(scope uint8, ttl int, data string) {
		up.script(0, func(_ context.Context, w dns.ResponseWriter, r *dns.Msg) (int, error) {
			m := geoAnswer(r)
			m.IsEdns0().Option[0].(*dns.EDNS0_SUBNET).SourceScope = scope
			m.Answer = parsed(fmt.Sprintf("x.example.org. %d IN A %s", ttl, data))
			return 0, w.WriteMsg(m)
		})
	}
	get := func(prefix string) string {
		return served{Msg: answer(t, ctx, h, from("x.example.org.", prefix))}.first()
	}
	say(16, 100, "192.0.2.16")
	get("10.1.1.0/24")
	say(24, 50, "192.0.2.24")
	if got := get("10.2.2.0/24"); got != "192.0.2.24" {
		t.Fatal(got)
	}
	say(8, 200, "192.0.2.8")
	get("10.3.0.0/16")
	say(0, 400, "192.0.2.1")
	get("11.0.0.0/8")
	up.queries()
	for _, step := range []struct {
		after      time.Duration
		one, other string
	}{
		{0, "192.0.2.16", "192.0.2.24"}, {60 * time.Second, "192.0.2.16", "192.0.2.8"}, {60 * time.Second, "192.0.2.8", "192.0.2.8"}, {100 * time.Second, "192.0.2.1", "192.0.2.1"},
	} {
		clock.advance(step.after)
		if one, other := get("10.1.7.0/24"), get("10.2.2.0/24"); one != step.one || other != step.other {
			t.Errorf("got %s and %s, want %s and %s", one, other, step.one, step.other)
		}
	}
	if n := len(up.queries()); n != 0 {
		t.Errorf("%d queries", n)
	}
}

func TestSubnetsThatARequestMayNotHave(t *testing.T) {
	up := newGeo()
	h := startNamed(t, t.Name(), scoped(stockOptions(), 100), up)
	ctx := contextOf(t, "dns://:53")
	bad := func(change func(*dns.EDNS0_SUBNET)) *dns.Msg {
		r := from("s24.example.org.", "10.1.1.0/24")
		change(r.IsEdns0().Option[0].(*dns.EDNS0_SUBNET))
		return r
	}
	for name, r := range map[string]*dns.Msg{
		"SCOPE":           bad(func(s *dns.EDNS0_SUBNET) { s.SourceScope = 24 }),
		"bits beyond":     bad(func(s *dns.EDNS0_SUBNET) { s.Address = netip.MustParseAddr("10.1.1.1").AsSlice() }),
		"long SOURCE":     bad(func(s *dns.EDNS0_SUBNET) { s.SourceNetmask = 33 }),
		"family":          bad(func(s *dns.EDNS0_SUBNET) { s.Family = 3 }),
		"no address":      bad(func(s *dns.EDNS0_SUBNET) { s.Address = nil }),
		"unreadable":      bad(func(*dns.EDNS0_SUBNET) {}),
		"family 0 and 24": bad(func(s *dns.EDNS0_SUBNET) { s.Family = 0 }),
	} {
		if name == "unreadable" {
			r.IsEdns0().Option[0] = &dns.EDNS0_LOCAL{Code: dns.EDNS0SUBNET, Data: []byte{0}}
		}
		w, rcode, _ := ask(ctx, h, r, tcp4Client)
		if rcode != dns.RcodeFormatError || len(w.packets) != 0 || len(up.queries()) != 0 {
			t.Errorf("%s: rcode %d", name, rcode)
		}
	}
	// Of several, none counts. The upstream decides.
	r := from("s24.example.org.", "10.1.1.0/24")
	r.IsEdns0().Option = append(r.IsEdns0().Option, from("s24.example.org.", "10.2.1.0/24").IsEdns0().Option...)
	for range 2 {
		answer(t, ctx, h, r)
	}
	if n := len(up.queries()); n != 2 || h.store.total() != 0 {
		t.Errorf("%d queries, %d answers kept", n, h.store.total())
	}
}

// What does not fit the question is not kept (RFC 7871 section 7.3).
func TestResponsesOfOtherSubnets(t *testing.T) {
	for name, option := range map[string]dns.EDNS0{
		"another address": subnet4(9, 24), "another address, SCOPE 0": subnet4(9, 0), "another family": subnet6(24),
		"unreadable": &dns.EDNS0_LOCAL{Code: dns.EDNS0SUBNET, Data: []byte{0}},
		"long SCOPE": &dns.EDNS0_SUBNET{Code: dns.EDNS0SUBNET, Family: 1, SourceNetmask: 24, SourceScope: 33, Address: netip.MustParseAddr("10.1.1.0").AsSlice()},
	} {
		t.Run(name, func(t *testing.T) {
			up := new(upstream)
			up.respondWith(0, newRecord, option)
			h := startNamed(t, t.Name(), scoped(stockOptions(), 100), up)
			w, _, _ := ask(contextOf(t, "dns://:53"), h, from("host.example.org.", "10.1.1.0/24"), tcp4Client)
			if len(w.packets) > 1 || h.store.total() != 0 {
				t.Errorf("%d replies, %d answers kept", len(w.packets), h.store.total())
			}
		})
	}
}

// off is as cache: the option makes no difference to what is kept.
func TestSubnetsAreIgnored(t *testing.T) {
	up := newGeo()
	o := prefetching(1)
	o.ecs.mode = ecsOff
	h := startNamed(t, t.Name(), o, up)
	clock := clocked(h)
	ctx := contextOf(t, "dns://:53")
	first := answer(t, ctx, h, from("s24.example.org.", "10.1.1.0/24"))
	for _, prefix := range []string{"10.2.1.0/24", "", "2001:db8::/56", "0.0.0.0/0"} {
		if m := answer(t, ctx, h, from("s24.example.org.", prefix)); m.Answer[0].String() != first.Answer[0].String() || scopeIn(m) != "" {
			t.Errorf("%s gets %v, %q", prefix, m.Answer, scopeIn(m))
		}
	}
	if n := len(up.queries()); n != 1 {
		t.Errorf("%d queries", n)
	}
	clock.advance(45 * time.Second)
	answer(t, ctx, h, from("s24.example.org.", "10.2.1.0/24"))
	for deadline := time.Now().Add(time.Minute); ; {
		if asked := up.queries(); len(asked) > 0 {
			if asked[0].IsEdns0() == nil || len(asked[0].IsEdns0().Option) != 1 {
				t.Errorf("asked %v", asked[0])
			}
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("it was not refreshed")
		}
		time.Sleep(time.Millisecond)
	}
}

// A name has at most MAX prefixes, and those that are asked for stay.
func TestPrefixesOfANameAreBounded(t *testing.T) {
	up := newGeo()
	h := startNamed(t, t.Name(), scoped(stockOptions(), 10), up)
	ctx := contextOf(t, "dns://:53")
	prefix := func(i int) string { return fmt.Sprintf("10.%d.%d.0/24", i/256, i%256) }
	for i := range 5 {
		for range 4 {
			answer(t, ctx, h, from("s24.example.org.", prefix(i)))
		}
	}
	for i := range 300 {
		answer(t, ctx, h, from("s24.example.org.", prefix(100+i)))
		if n := h.store.total(); n > 10 {
			t.Fatalf("%d answers after %d prefixes", n, i)
		}
	}
	answer(t, ctx, h, from("s24.example.net.", prefix(0)))
	answer(t, ctx, h, from("s0.example.org.", prefix(0)))
	if n := h.store.total(); n != 12 || h.store.scopes.Len() != 11 {
		t.Errorf("%d answers, %d prefixes", n, h.store.scopes.Len())
	}
	names, answers := h.store.subnetLens()
	st := controlBlock{h}.Status()
	if s := st.Subnets; names != 2 || answers != 11 || s == nil || s.Names != 2 || s.Answers != 11 || s.Most != 10 || s.Evicted["name"] != 295 || s.Evicted["share"] != 0 || st.Evicted != 295 {
		t.Errorf("%d names, %d answers, status %+v, %d evictions", names, answers, s, st.Evicted)
	}
	up.queries()
	for i := range 5 {
		answer(t, ctx, h, from("s24.example.org.", prefix(i)))
	}
	if n := len(up.queries()); n > 1 {
		t.Errorf("%d of 5 popular prefixes are gone", n)
	}
}

// A prefix may have a denial beside an answer that prefer_positive holds. Both go when the prefix has to.
func TestBothAnswersOfAPrefixGo(t *testing.T) {
	up := newGeo()
	o := scoped(stockOptions(), 1)
	o.stale = staleOptions{upTo: time.Hour, preferPositive: true, recheck: time.Minute, verify: true}
	h := startNamed(t, t.Name(), o, up)
	clock := clocked(h)
	ctx := contextOf(t, "dns://:53")
	answer(t, ctx, h, from("s24.example.org.", "10.1.1.0/24"))
	clock.advance(61 * time.Second)
	up.script(0, func(_ context.Context, w dns.ResponseWriter, r *dns.Msg) (int, error) {
		m := geoAnswer(r)
		m.Rcode, m.Answer, m.Ns = dns.RcodeNameError, nil, parsed("example.org. 60 IN SOA a. b. 1 2 3 4 60")
		return 0, w.WriteMsg(m)
	})
	answer(t, ctx, h, from("s24.example.org.", "10.1.1.0/24"))
	if n := h.store.total(); n != 2 {
		t.Fatalf("%d answers, want one of each kind", n)
	}
	answer(t, ctx, h, from("s24.example.org.", "10.2.1.0/24"))
	if n := h.store.total(); n != 1 {
		t.Errorf("%d answers, at most 1", n)
	}
}

// What off has kept for all, though it is for one subnet, ends when ecs is strict or scoped: by a reload, in a snapshot and in a dump.
func TestAnswersOfOffEndWithIt(t *testing.T) {
	ctx := contextOf(t, "dns://:53")
	names := []string{"s24.example.org.", "s0.example.org.", "none.example.org."}
	hits := func(h *Optcache, up *geo) (hits string) {
		for _, name := range names {
			for _, prefix := range []string{"10.9.9.0/24", ""} {
				up.queries()
				if answer(t, ctx, h, from(name, prefix)); len(up.queries()) == 0 {
					hits += "h"
				} else {
					hits += "-"
				}
			}
		}
		return hits
	}
	for _, c := range []struct {
		to   ecsMode
		want string // "h" for each hit
	}{{ecsOff, "hhhhhh"}, {ecsStrict, "--hhhh"}, {ecsScoped, "---h-h"}} {
		start := func(name string, o options, up *geo) *Optcache {
			h := startNamed(t, name, o, up)
			for deadline := time.Now().Add(time.Minute); h.snapshotter != nil && h.snapshotter.partial.Load(); time.Sleep(time.Millisecond) {
				if time.Now().After(deadline) {
					t.Fatal("the file is not read")
				}
			}
			return h
		}
		up := newGeo()
		o := roomFor(stockOptions())
		o.ecs = ecsOptions{mode: ecsOff}
		to := o
		if to.ecs.mode = c.to; c.to == ecsScoped {
			to.ecs.most = 100
		}
		fill := func(h *Optcache) {
			for _, name := range names {
				answer(t, ctx, h, from(name, "10.1.1.0/24"))
			}
		}
		h := firstOf(t, o, up)
		fill(h)
		next := nextOf(t, h, to)
		h.stop()
		settled(next)
		if got := hits(next, up); got != c.want {
			t.Errorf("%d, after a reload: %s, want %s", c.to, got, c.want)
		}
		next.stop()

		o.file.path = filepath.Join(t.TempDir(), "answers")
		to.file.path = o.file.path
		h = start(t.Name(), o, up)
		fill(h)
		var dump bytes.Buffer
		if n, err := (controlBlock{h}).Dump(&dump, true); err != nil || n != 3 {
			t.Fatalf("%d dumped, %v", n, err)
		}
		h.stop()
		h = start(t.Name(), to, up)
		if got := hits(h, up); got != c.want {
			t.Errorf("%d, after a restart: %s, want %s", c.to, got, c.want)
		}
		h.stop()

		to.file.path = ""
		h = start(t.Name()+" load", to, up)
		if _, err := loadInto(h, dump.Bytes(), true); err != nil {
			t.Fatal(err)
		}
		if got := hits(h, up); got != c.want {
			t.Errorf("%d, after a load: %s, want %s", c.to, got, c.want)
		}
		h.stop()
	}
}

// Answers for prefixes have a quarter of the store. They evict no others beyond that.
func TestPrefixesHaveAShare(t *testing.T) {
	const capacity, plain = 1024, 900
	ctx := contextOf(t, "dns://:53")
	start := func(name string) (h *Optcache, most int, fill func(prefixes int)) {
		h = startNamed(t, t.Name()+name, scoped(sizedOptions(capacity), 10_000), newGeo())
		return h, h.store.prefixes(), func(prefixes int) {
			for i := range prefixes {
				answer(t, ctx, h, from(fmt.Sprintf("s24.n%d.example.org.", i%7), fmt.Sprintf("10.%d.%d.0/24", i/256, i%256)))
			}
		}
	}
	h, most, fill := start("") // has room for all else, and evicts nothing by itself
	fill(most)
	earlier := (controlBlock{h}).Status().Subnets.Evicted["share"]
	fill(most + 300)
	if s := (controlBlock{h}).Status().Subnets; s.Evicted["share"] != earlier+300 || s.Evicted["name"] != 0 || s.Answers != int64(most) || s.Names != 7 {
		t.Errorf("status %+v, %d at most", s, most)
	}

	h, most, fill = start("/beside others")
	for i := range plain {
		answer(t, ctx, h, asking(fmt.Sprintf("plain%d.example.org.", i), dns.TypeA))
	}
	before := h.store.total()
	fill(5000)
	if n := h.store.scopes.Len(); n > most || n < capacity-plain { // they have what was free, at least
		t.Errorf("%d prefixes, at most %d", n, most)
	}
	if left := h.store.total() - int64(h.store.scopes.Len()); left < before-int64(most) {
		t.Errorf("%d of %d answers for all are left", left, before)
	}
}

// Requests with a subnet that miss at once make one query for each subnet, and one for each prefix where that is known.
func TestCoalescingKeepsTheSubnet(t *testing.T) {
	for name, c := range map[string]struct {
		name     string
		prefixes []string
		queries  int
	}{
		"one subnet":           {"s24", []string{"10.1.1.0/24"}, 1},
		"four subnets":         {"s24", []string{"10.1.1.0/24", "10.1.2.0/24", "10.1.3.0/24", "10.1.4.0/24"}, 4},
		"in one prefix":        {"s16", []string{"10.1.1.0/24", "10.1.2.0/24", "10.1.3.0/24", "10.1.4.0/24"}, 1},
		"for all":              {"s0", []string{"10.1.1.0/24", "10.1.2.0/24", "2001:db8::/56"}, 1},
		"without the option":   {"none", []string{"10.1.1.0/24", "10.1.2.0/24"}, 1},
		"and without a subnet": {"s24", []string{"10.1.1.0/24", ""}, 2},
		"and SOURCE 0":         {"s24", []string{"10.1.1.0/24", "0.0.0.0/0"}, 2},
	} {
		inBubble(t, name, func(t *testing.T) {
			up := newGeo()
			up.script(time.Second, up.reply)
			h := startNamed(t, "ecs coalesce/"+name, scoped(stockOptions(), 100), up)
			ctx := serverContext(t)
			var all crowd
			for i := range 40 {
				r := from(c.name+".example.org.", c.prefixes[i%len(c.prefixes)])
				all.add(ctx, h, r, &wireWriter{addr: udp4Client})
			}
			all.wg.Wait()
			for i, m := range all.members {
				prefix := c.prefixes[i%len(c.prefixes)]
				got := unpacked(t, m.only(t))
				want := geoAnswer(from(c.name+".example.org.", prefix))
				if c.queries == len(c.prefixes) && got.Answer[0].String() != want.Answer[0].String() || (scopeIn(got) != "") != (prefix != "") || m.took > 3*time.Second {
					t.Errorf("%s got %v, %q after %v", prefix, got.Answer, scopeIn(got), m.took)
				}
			}
			if n := len(up.queries()); n != c.queries {
				t.Errorf("%d queries, want %d", n, c.queries)
			}
			nobodyWaits(t, h)
		})
	}
}

// Prefetch and stale answers keep the subnet.
func TestRefreshKeepsTheSubnet(t *testing.T) {
	for name, o := range map[string]options{
		"prefetch": prefetching(1), "immediate": stale(func(*staleOptions) {}), "verify": stale(func(s *staleOptions) { s.verify, s.timeout = true, time.Second }),
	} {
		inBubble(t, name, func(t *testing.T) {
			up := newGeo()
			h := startNamed(t, t.Name(), scoped(o, 100), up)
			ctx := serverContext(t)
			one, other := from("s16.example.org.", "10.1.1.0/24"), from("s16.example.org.", "10.2.1.0/24")
			answer(t, ctx, h, one)
			answer(t, ctx, h, other)
			up.queries()
			age := 50 * time.Second
			if name != "prefetch" {
				age = 70 * time.Second
			}
			time.Sleep(age)
			m := answer(t, ctx, h, from("s16.example.org.", "10.1.7.0/24"))
			synctest.Wait()
			asked := up.queries()
			if len(asked) != 1 || asked[0].IsEdns0() == nil || asked[0].IsEdns0().Option[0].(*dns.EDNS0_SUBNET).Address.String() != "10.1.7.0" {
				t.Fatalf("asked %v", asked)
			}
			if scopeIn(m) != "10.1.7.0/24/16" {
				t.Errorf("got %q", scopeIn(m))
			}
			up.fails(0)
			if m := answer(t, ctx, h, one); m.Answer[0].(*dns.A).A.String() != "10.1.7.0" || m.Answer[0].Header().Ttl < 50 {
				t.Errorf("after the refresh: %v", m.Answer)
			}
			if m := answer(t, ctx, h, other); name != "prefetch" && m.Answer[0].Header().Ttl != 0 || m.Answer[0].(*dns.A).A.String() != "10.2.1.0" {
				t.Errorf("the other prefix: %v", m.Answer)
			}
			synctest.Wait()
			nobodyWaits(t, h)
		})
	}
}

// Failures are for all, and hide no answer that is for a prefix.
func TestFailuresAndSubnets(t *testing.T) {
	up := newGeo()
	h := startNamed(t, t.Name(), scoped(stockOptions(), 100), up)
	ctx := contextOf(t, "dns://:53")
	answer(t, ctx, h, from("s24.example.org.", "10.1.1.0/24"))
	up.fails(0)
	ask(ctx, h, from("s24.example.org.", "10.2.1.0/24"), tcp4Client)
	up.queries()
	if m := answer(t, ctx, h, from("s24.example.org.", "10.2.1.0/24")); m.Rcode != dns.RcodeServerFailure {
		t.Errorf("got %v", m)
	}
	if m := answer(t, ctx, h, from("s24.example.org.", "10.1.1.0/24")); m.Rcode != dns.RcodeSuccess || len(up.queries()) != 0 {
		t.Errorf("got %v", m)
	}
}

// What is shown names the prefix; a flush of a name reaches all of its prefixes.
func TestSubnetsAreShownAndFlushed(t *testing.T) {
	up := newGeo()
	h := startNamed(t, t.Name(), scoped(stockOptions(), 100), up)
	ctx := contextOf(t, "dns://:53")
	for _, prefix := range []string{"10.1.1.0/24", "10.2.1.0/24", "2001:db8:1:2::/64", "0.0.0.0/0", ""} {
		answer(t, ctx, h, from("s28.example.org.", prefix))
	}
	answer(t, ctx, h, from("s24.example.net.", "10.1.1.0/24"))
	b := controlBlock{h}
	want := map[string]bool{"10.1.1.0/24/28": true, "10.2.1.0/24/28": true, "2001:db0::/28": true, "0/0": true, "": true}
	found, err := b.Lookup("s28.example.org", dns.TypeA)
	if err != nil || len(found) != len(want) {
		t.Errorf("looked up %v, %v", found, err)
	}
	page, err := b.List(control.Filter{Name: "example.org", Subtree: true, Limit: 100, Records: true})
	if err != nil || len(page.Answers) != len(want) {
		t.Errorf("listed %v, %v", page, err)
	}
	for _, a := range append(found, page.Answers...) {
		if !want[a.Subnet] {
			t.Errorf("subnet %q", a.Subnet)
		}
	}
	if n, err := b.Flush(control.Filter{Name: "s28.example.org"}); n != len(want) || err != nil {
		t.Errorf("%d flushed, %v", n, err)
	}
	up.queries()
	answer(t, ctx, h, from("s28.example.org.", "10.1.1.0/24"))
	answer(t, ctx, h, from("s24.example.net.", "10.1.1.0/24"))
	if n := len(up.queries()); n != 1 {
		t.Errorf("%d queries", n)
	}
}

// kinds are answers for prefixes, and how many of them a cache with ecs scoped, or strict, takes in.
func fillSubnets(t *testing.T, ctx context.Context, h *Optcache) (check func(*Optcache, *geo) (hits int)) {
	t.Helper()
	all := [][2]string{{"s24", "10.1.1.0/24"}, {"s16", "10.1.1.0/24"}, {"s28", "10.1.1.0/24"}, {"s48", "2001:db8::/56"}, {"s24", "0.0.0.0/0"}, {"s0", "10.1.1.0/24"}, {"none", "10.1.1.0/24"}, {"nx", "10.7.1.0/24"}}
	for _, q := range all {
		answer(t, ctx, h, from(q[0]+".example.org.", q[1]))
	}
	return func(h *Optcache, up *geo) (hits int) {
		for _, q := range all {
			up.queries()
			m := answer(t, ctx, h, from(q[0]+".example.org.", q[1]))
			if len(up.queries()) == 0 {
				hits++
			}
			if want := geoAnswer(from(q[0]+".example.org.", q[1])); m.Rcode != want.Rcode || h.ecs.mode == ecsScoped && q[0] != "none" && scopeIn(m) != scopeIn(want) {
				t.Errorf("%v: %q, want %q", q, scopeIn(m), scopeIn(want))
			}
		}
		return hits
	}
}

// Reloads keep answers for prefixes, while they move and afterwards, unless ecs is scoped no more.
func TestSubnetsAndReload(t *testing.T) {
	up := newGeo()
	o := roomFor(scoped(stockOptions(), 100))
	h := firstOf(t, o, up)
	ctx := contextOf(t, "dns://:53")
	check := fillSubnets(t, ctx, h)
	if n := check(h, up); n != 8 {
		t.Fatalf("%d hits", n)
	}
	for _, step := range []struct {
		change func()
		hits   int
	}{
		{func() {}, 8},
		{func() { o.success.maxTTL = 50 * time.Second }, 8},
		{func() { o.ecs.most = 200 }, 8},
		{func() { o.ecs = ecsOptions{} }, 2},
		{func() { o.ecs = ecsOptions{ecsScoped, 50} }, 2},
	} {
		step.change()
		next := nextOf(t, h, o)
		h.stop()
		settled(next)
		if n := check(next, up); n != step.hits {
			t.Errorf("%+v: %d hits, want %d", o.ecs, n, step.hits)
		}
		if o.ecs.mode == ecsStrict && next.store.scopes != nil {
			t.Error("strict has prefixes")
		}
		h = next
	}
}

// While answers are in the old store, they are found there.
func TestSubnetsBeforeTheMove(t *testing.T) {
	up := newGeo()
	o := roomFor(scoped(stockOptions(), 100))
	h := firstOf(t, o, up)
	ctx := contextOf(t, "dns://:53")
	check := fillSubnets(t, ctx, h)
	o.success.maxTTL = 55 * time.Second
	next := nextOf(t, h, o) // h has not stopped, so nothing moves
	if n := check(next, up); n != 8 {
		t.Errorf("%d hits", n)
	}
	h.stop()
	settled(next)
	if n := check(next, up); n != 8 {
		t.Errorf("%d hits after the move", n)
	}
}

// Snapshots keep the prefix. Dumps do so, too, in both forms.
func TestSubnetsAndSnapshots(t *testing.T) {
	ctx := contextOf(t, "dns://:53")
	for _, mode := range []ecsOptions{{ecsScoped, 100}, {}} {
		up := newGeo()
		o := scoped(stockOptions(), 100)
		o.file.path = filepath.Join(t.TempDir(), "answers")
		h := startNamed(t, t.Name(), o, up)
		check := fillSubnets(t, ctx, h)
		h.stop()
		o.ecs = mode
		h = startNamed(t, t.Name(), o, up)
		for deadline := time.Now().Add(time.Minute); h.snapshotter.partial.Load(); time.Sleep(time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatal("the file is not read")
			}
		}
		want, refused := 8, int64(0)
		if mode.mode == ecsStrict {
			want, refused = 2, 6
		}
		if n := h.snapshotter.refused[refusedSubnet].Load(); n != refused {
			t.Errorf("%d refused, want %d", n, refused)
		}
		if n := check(h, up); n != want {
			t.Errorf("%+v: %d hits, want %d", mode, n, want)
		}
		h.stop()
	}
	for _, text := range []bool{false, true} {
		up := newGeo()
		h := startNamed(t, t.Name()+" dump", scoped(stockOptions(), 100), up)
		check := fillSubnets(t, ctx, h)
		var dump bytes.Buffer
		if n, err := (controlBlock{h}).Dump(&dump, text); err != nil || n != 8 {
			t.Fatalf("%d dumped, %v", n, err)
		}
		if text && !strings.Contains(dump.String(), " subnet=10.1.1.0/24/28\n") {
			t.Errorf("no prefix in\n%s", dump.String())
		}
		other := startNamed(t, t.Name()+" load", scoped(stockOptions(), 100), up)
		if done, err := loadInto(other, dump.Bytes(), text); err != nil || done.Loaded != 8 {
			t.Errorf("%+v, %v", done, err)
		}
		if n := check(other, up); n != 8 {
			t.Errorf("text %v: %d hits", text, n)
		}
	}
}

// With RD=0, answers for prefixes are found as others are.
func TestSubnetsAndRD(t *testing.T) {
	up := newGeo()
	h := startNamed(t, t.Name(), scoped(stockOptions(), 100), up)
	ctx := contextOf(t, "dns://:53")
	r := from("s24.example.org.", "10.1.1.0/24")
	r.RecursionDesired = false
	answer(t, ctx, h, r)
	answer(t, ctx, h, r)
	if n := len(up.queries()); n != 1 {
		t.Errorf("%d queries", n)
	}
	r.RecursionDesired = true
	answer(t, ctx, h, r) // not by what RD=0 has brought
	r.RecursionDesired = false
	answer(t, ctx, h, r)
	if n := len(up.queries()); n != 1 {
		t.Errorf("%d queries", n)
	}
}

func FuzzClientSubnet(f *testing.F) {
	f.Add([]byte{0, 1, 24, 0, 10, 1, 1}, []byte{0, 1, 24, 16, 10, 1, 1})
	f.Add([]byte{0, 1, 0, 0}, []byte{0, 1, 0, 0})
	f.Add([]byte{0, 2, 56, 0, 0x20, 1, 0xd, 0xb8, 0, 0, 0}, []byte{0, 2, 56, 48, 0x20, 1, 0xd, 0xb8, 0, 0, 0})
	up := new(upstream)
	h := startNamed(f, f.Name(), scoped(stockOptions(), 3), up)
	ctx := contextOf(f, "dns://:53")
	f.Fuzz(func(t *testing.T, asked, answered []byte) {
		packet := func(m *dns.Msg, option []byte) (*dns.Msg, error) {
			m.SetEdns0(1232, false)
			m.IsEdns0().Option = []dns.EDNS0{&dns.EDNS0_LOCAL{Code: dns.EDNS0SUBNET, Data: option}}
			b, err := m.Pack()
			if err != nil {
				return nil, err
			}
			read := new(dns.Msg)
			return read, read.Unpack(b)
		}
		r, err := packet(asking("host.example.org.", dns.TypeA), asked)
		if err != nil {
			return // the server sends FORMERR
		}
		up.script(0, func(_ context.Context, w dns.ResponseWriter, r *dns.Msg) (int, error) {
			m := new(dns.Msg).SetReply(r)
			m.Answer = parsed(newRecord)
			if read, err := packet(m.Copy(), answered); err == nil {
				m = read
			}
			return 0, w.WriteMsg(m)
		})
		for range 2 {
			if w, _, _ := ask(ctx, h, r.Copy(), tcp4Client); len(w.packets) > 1 {
				t.Fatalf("%d replies", len(w.packets))
			} else if len(w.packets) == 1 && strings.Count(scopeIn(unpacked(t, w.packets[0])), " ") > 0 {
				t.Fatal("two client subnets")
			}
		}
		if h.store.scopes.Len() > 3 {
			t.Fatalf("%d prefixes", h.store.scopes.Len())
		}
		for _, a := range mustList(t, h) {
			if _, ok := subnet.Parse(a.Subnet); !ok && a.Subnet != "" {
				t.Fatalf("subnet %q", a.Subnet)
			}
		}
	})
}

func mustList(t *testing.T, h *Optcache) []control.Answer {
	page, err := (controlBlock{h}).List(control.Filter{Limit: 100})
	if err != nil {
		t.Fatal(err)
	}
	return page.Answers
}
