package optcache

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/coredns/coredns/plugin"
	"github.com/miekg/dns"

	"github.com/optcache/optcache/plugin/control"
	"github.com/optcache/optcache/plugin/fastpath"
	"github.com/optcache/optcache/plugin/pkg/chain"
	"github.com/optcache/optcache/plugin/pkg/record"
)

// mortal is an upstream that fails while dead is set. Its zones are those of two plugins, one of which never fails.
type mortal struct {
	dead  atomic.Bool
	asked atomic.Int64
	Zones []string // that live all the time
	takes time.Duration
	fails func(w dns.ResponseWriter, r *dns.Msg) (int, error) // how it fails; nil: as a timeout
	good  func(m *dns.Msg)                                    // changes good responses
}

func (*mortal) Name() string { return "mortal" }

func (u *mortal) ServeDNS(_ context.Context, w dns.ResponseWriter, r *dns.Msg) (int, error) {
	u.asked.Add(1)
	if u.dead.Load() && plugin.Zones(u.Zones).Matches(r.Question[0].Name) == "" {
		time.Sleep(u.takes)
		if u.fails == nil {
			return dns.RcodeServerFailure, errors.New("i/o timeout")
		}
		return u.fails(w, r)
	}
	m := new(dns.Msg).SetReply(r)
	m.Answer = parsed(r.Question[0].Name + " 60 IN A 192.0.2.1")
	if r.Question[0].Qtype != dns.TypeA {
		m.Answer, m.Ns = nil, parsed(". 60 IN SOA a. b. 1 2 3 4 60")
	}
	if u.good != nil {
		u.good(m)
	}
	return dns.RcodeSuccess, w.WriteMsg(m)
}

func says(rcode int) func(w dns.ResponseWriter, r *dns.Msg) (int, error) {
	return func(w dns.ResponseWriter, r *dns.Msg) (int, error) {
		return rcode, w.WriteMsg(new(dns.Msg).SetRcode(r, rcode))
	}
}

func backingOff(least, most time.Duration) options {
	o := stockOptions()
	o.zones, o.servfail, o.servfailMost = []string{"."}, least, most
	return o
}

// rcodeOf asks, and returns the rcode that the client gets. Of a failure without a message, the server makes one.
func rcodeOf(t *testing.T, ctx context.Context, h *Optcache, r *dns.Msg) int {
	t.Helper()
	w, rcode, _ := ask(ctx, h, r, tcp4Client)
	if len(w.packets) == 0 {
		return rcode
	}
	return unpacked(t, w.only(t)).Rcode
}

// A name that fails is asked for at times that double, in whatever way it fails. Retries and other types add nothing.
func TestBackOffDoubles(t *testing.T) {
	ways := map[string]func(dns.ResponseWriter, *dns.Msg) (int, error){
		"timeout": nil, "SERVFAIL": says(dns.RcodeServerFailure), "REFUSED": says(dns.RcodeRefused), "FORMERR": says(dns.RcodeFormatError),
		"NOTIMP":            says(dns.RcodeNotImplemented),
		"REFUSED by a code": func(dns.ResponseWriter, *dns.Msg) (int, error) { return dns.RcodeRefused, nil },
	}
	for name, way := range ways {
		inBubble(t, name, func(t *testing.T) {
			u := &mortal{fails: way}
			u.dead.Store(true)
			h := startNamed(t, t.Name(), backingOff(5*time.Second, time.Minute), u)
			ctx := contextOf(t, "dns://:53")
			begun := time.Now()
			var at []int
			for time.Since(begun) < 200*time.Second {
				before := u.asked.Load()
				rcode := rcodeOf(t, ctx, h, asking("host.example.org.", dns.TypeA))
				if again := rcodeOf(t, ctx, h, asking("HOST.example.org.", dns.TypeA)); again != rcode || rcode == dns.RcodeSuccess {
					t.Fatalf("rcode %d, and then %d", rcode, again)
				}
				if n := u.asked.Load() - before; n > 0 {
					at = append(at, int(time.Since(begun)/time.Second))
					if n != 1 {
						t.Fatalf("asked %d times at once", n)
					}
				}
				time.Sleep(time.Second)
			}
			if want := []int{0, 5, 15, 35, 75, 135, 195}; !slices.Equal(at, want) {
				t.Errorf("asked at %v s, want %v", at, want)
			}
		})
	}
}

// What depends on the one who asks is not kept for others.
func TestBackOffKeepsNoOnesOwnFailure(t *testing.T) {
	inBubble(t, "", func(t *testing.T) {
		u := &mortal{fails: says(dns.RcodeFormatError)}
		u.dead.Store(true)
		h := startNamed(t, t.Name(), backingOff(5*time.Second, time.Minute), u)
		ctx := contextOf(t, "dns://:53")
		odd := asking("a.example.org.", dns.TypeA).SetEdns0(1232, false)
		rcodeOf(t, ctx, h, odd) // an upstream that does not know EDNS
		u.fails = says(dns.RcodeRefused)
		option := asking("b.example.org.", dns.TypeA).SetEdns0(1232, false)
		option.IsEdns0().Option = append(option.IsEdns0().Option, &dns.EDNS0_LOCAL{Code: 65001, Data: []byte("x")})
		rcodeOf(t, ctx, h, option)
		noRD := asking("c.example.org.", dns.TypeA)
		noRD.RecursionDesired = false
		rcodeOf(t, ctx, h, noRD)
		u.fails = says(dns.RcodeYXDomain)
		rcodeOf(t, ctx, h, asking("d.example.org.", dns.TypeA))
		u.dead.Store(false)
		for _, name := range []string{"a", "b", "c", "d"} {
			if rcode := rcodeOf(t, ctx, h, asking(name+".example.org.", dns.TypeA)); rcode != dns.RcodeSuccess {
				t.Errorf("%s: rcode %d", name, rcode)
			}
		}

		// An upstream that refuses ANY makes no other type wait.
		u.fails = says(dns.RcodeRefused)
		u.dead.Store(true)
		for range 4 {
			rcodeOf(t, ctx, h, asking("e.example.org.", dns.TypeANY))
			time.Sleep(time.Minute)
			rcodeOf(t, ctx, h, asking("f.example.org.", dns.TypeA)) // so that others succeed meanwhile
			u.dead.Store(false)
			rcodeOf(t, ctx, h, asking("g.example.org.", dns.TypeTXT))
			u.dead.Store(true)
		}
		u.fails = nil
		rcodeOf(t, ctx, h, asking("e.example.org.", dns.TypeA))
		time.Sleep(5 * time.Second)
		u.dead.Store(false)
		if rcode := rcodeOf(t, ctx, h, asking("e.example.org.", dns.TypeA)); rcode != dns.RcodeSuccess {
			t.Errorf("after 5 s: rcode %d", rcode)
		}
	})
}

// Without MAX, all is as before: nothing doubles, and REFUSED is not kept.
func TestNoBackOffByDefault(t *testing.T) {
	inBubble(t, "", func(t *testing.T) {
		u := &mortal{fails: says(dns.RcodeRefused)}
		u.dead.Store(true)
		h := startNamed(t, t.Name(), backingOff(5*time.Second, 5*time.Second), u)
		ctx := contextOf(t, "dns://:53")
		for range 3 {
			rcodeOf(t, ctx, h, asking("a.example.org.", dns.TypeA))
		}
		u.fails = nil
		for range 30 {
			rcodeOf(t, ctx, h, asking("b.example.org.", dns.TypeA))
			time.Sleep(time.Second)
		}
		if n := u.asked.Load(); n != 3+6 || h.upstreams != nil || h.store.failing != nil {
			t.Errorf("asked %d times, want 9", n)
		}
	})
}

// outage asks for 1,000 names once a second each while the upstream is dead for 10 minutes. It returns the questions upstream in
// each minute, and how long after the upstream is back the first client has an answer, and all.
func outage(t *testing.T, o options) (perMinute []int64, first, all time.Duration) {
	u := new(mortal)
	h := startNamed(t, t.Name(), o, u)
	ctx := contextOf(t, "dns://:53")
	names := make([]*dns.Msg, 1000)
	for i := range names {
		names[i] = asking(fmt.Sprintf("n%d.example.org.", i), dns.TypeA)
	}
	u.dead.Store(true)
	for range 10 {
		before := u.asked.Load()
		for range 60 {
			for _, r := range names {
				rcodeOf(t, ctx, h, r)
			}
			time.Sleep(time.Second)
		}
		perMinute = append(perMinute, u.asked.Load()-before)
	}
	u.dead.Store(false)
	back := time.Now()
	for first, all = -1, -1; all < 0; time.Sleep(time.Second) {
		good := 0
		for _, r := range names {
			if rcodeOf(t, ctx, h, r) == dns.RcodeSuccess {
				good++
			}
		}
		if good > 0 && first < 0 {
			first = time.Since(back)
		}
		if good == len(names) {
			all = time.Since(back)
		}
		if time.Since(back) > 10*time.Minute {
			t.Fatalf("%d of %d names after 10 minutes", good, len(names))
		}
	}
	return perMinute, first, all
}

// The figures are in docs/upstream.md. Make them with: go test -run TestDeadUpstream -v .
func TestDeadUpstream(t *testing.T) {
	sums := make(map[string]int64)
	for _, c := range []struct {
		name string
		most time.Duration
	}{{"servfail 5s", 0}, {"servfail 5s 1m", time.Minute}, {"servfail 5s 5m", 5 * time.Minute}} {
		inBubble(t, c.name, func(t *testing.T) {
			o := sizedOptions(4096)
			o.zones, o.servfail, o.servfailMost = []string{"."}, 5*time.Second, c.most
			perMinute, first, all := outage(t, o)
			var words []string
			for _, n := range perMinute {
				words = append(words, fmt.Sprint(n))
				sums[c.name] += n
			}
			t.Logf("%s: questions upstream by minute: %s; first answer %v, all answers %v after it is back", c.name, strings.Join(words, " "), first, all)
			if first > 5*time.Second || all > 5*time.Second {
				t.Errorf("first answer after %v, all after %v", first, all)
			}
		})
	}
	if today, with := sums["servfail 5s"], sums["servfail 5s 5m"]; today != 120_000 || with > today/10 {
		t.Errorf("%d questions today, %d with MAX", today, with)
	}
}

// The upstream of a plugin may be gone while another one answers.
func TestBackOffKnowsTheZonesBehind(t *testing.T) {
	inBubble(t, "", func(t *testing.T) {
		u := &mortal{Zones: []string{"cluster.local."}}
		u.dead.Store(true)
		h := startNamed(t, t.Name(), backingOff(5*time.Second, time.Minute), u)
		ctx := contextOf(t, "dns://:53")
		for i := range 20 {
			rcodeOf(t, ctx, h, asking(fmt.Sprintf("n%d.example.org.", i), dns.TypeA))
			if rcode := rcodeOf(t, ctx, h, asking(fmt.Sprintf("n%d.cluster.local.", i), dns.TypeA)); rcode != dns.RcodeSuccess {
				t.Fatalf("rcode %d", rcode)
			}
		}
		root, _ := h.failingOf(keyOf(h, "a.example.org."), false)
		inner, _ := h.failingOf(keyOf(h, "a.cluster.local."), false)
		if !root.Gone() || inner.Gone() {
			t.Errorf("root %v, cluster.local %v", root.Gone(), inner.Gone())
		}
	})
}

// Stale answers are served while the upstream is gone, and their refreshes wait, too. They go on when it is back.
func TestBackOffAndStale(t *testing.T) {
	for _, verify := range []bool{false, true} {
		for _, recheck := range []time.Duration{0, 20 * time.Second} {
			inBubble(t, fmt.Sprint("verify ", verify, " recheck ", recheck), func(t *testing.T) {
				u := new(mortal)
				o := backingOff(5*time.Second, time.Minute)
				o.stale = staleOptions{upTo: time.Hour, verify: verify, recheck: recheck}
				h := startNamed(t, t.Name(), o, u)
				ctx := contextOf(t, "dns://:53")
				names := make([]*dns.Msg, 20)
				for i := range names {
					names[i] = asking(fmt.Sprintf("n%d.example.org.", i), dns.TypeA)
					rcodeOf(t, ctx, h, names[i])
				}
				time.Sleep(time.Minute)
				u.dead.Store(true)
				asked := u.asked.Load()
				const seconds = 300
				for range seconds {
					for _, r := range names {
						if m := answer(t, ctx, h, r); len(m.Answer) != 1 || m.Answer[0].Header().Ttl != 0 {
							t.Fatalf("not the stale answer: %v", m)
						}
					}
					time.Sleep(time.Second)
				}
				// At first one for each name or so, and then one in 5 s.
				if n := u.asked.Load() - asked; n < 20 || n > 20+seconds/5+20 {
					t.Errorf("asked %d times", n)
				}
				u.dead.Store(false)
				time.Sleep(20 * time.Second) // recheck
				begun := time.Now()
				for fresh := 0; fresh < len(names); time.Sleep(time.Second) {
					fresh = 0
					for _, r := range names {
						if m := answer(t, ctx, h, r); len(m.Answer) == 1 && m.Answer[0].Header().Ttl > 0 {
							fresh++
						}
					}
					if time.Since(begun) > 8*time.Second {
						t.Fatalf("%d are fresh", fresh)
					}
				}
			})
		}
	}
}

// A failure never hides an answer that may still be served, and a flush of a name makes it new.
func TestBackOffAndFlush(t *testing.T) {
	inBubble(t, "", func(t *testing.T) {
		u := new(mortal)
		u.dead.Store(true)
		h := startNamed(t, t.Name(), backingOff(5*time.Second, 5*time.Minute), u)
		ctx := contextOf(t, "dns://:53")
		r, other := asking("host.example.org.", dns.TypeA), asking("other.example.org.", dns.TypeA)
		fail := func() {
			for range 40 {
				rcodeOf(t, ctx, h, r)
				rcodeOf(t, ctx, h, other)
				time.Sleep(time.Second)
			}
		}
		fail()
		asked := u.asked.Load()
		flush := func(f control.Filter) {
			to, err := filterOf(&f)
			if err != nil {
				t.Fatal(err)
			}
			h.store.flush(newScratch(), to, h.clock)
			h.forgive(&to)
		}
		flush(control.Filter{Name: "host.example.org.", Kinds: []string{"success"}})
		if _, name := h.failingOf(keyOf(h, "host.example.org."), false); !holds(h, "host.example.org.", name) {
			t.Error("a flush of answers has ended a failure's time")
		}
		flush(control.Filter{Name: "host.example.org.", Kinds: []string{"failure"}})
		rcodeOf(t, ctx, h, r)
		if n := u.asked.Load(); n != asked+1 {
			t.Errorf("asked %d times after a flush", n-asked)
		}
		time.Sleep(5 * time.Second)
		before := u.asked.Load()
		rcodeOf(t, ctx, h, other)
		rcodeOf(t, ctx, h, r)
		if n := u.asked.Load(); n != before+1 {
			t.Errorf("asked %d times, want once, for the name that is new", n-before)
		}
		flush(control.Filter{Name: "example.org.", Subtree: true})
		before = u.asked.Load()
		rcodeOf(t, ctx, h, r)
		rcodeOf(t, ctx, h, other)
		if n := u.asked.Load(); n != before+2 {
			t.Errorf("asked %d times after a flush of all", n-before)
		}
	})
}

func keyOf(h *Optcache, name string) *record.Key {
	s, _ := h.scratchFor(asking(name, dns.TypeA), udp4Client)
	return &s.Key
}

func holds(h *Optcache, of string, name uint64) bool {
	zone, _ := h.failingOf(keyOf(h, of), false)
	return zone.Holds(name, h.clock())
}

// A reload keeps what is known of failures: with the store, and with another one.
func TestBackOffAndReload(t *testing.T) {
	t.Parallel()
	u := new(mortal)
	u.dead.Store(true)
	o := roomFor(backingOff(5*time.Second, 5*time.Minute))
	h := firstOf(t, o, u)
	ctx := contextOf(t, "dns://:53")
	for i := range 20 {
		rcodeOf(t, ctx, h, asking(fmt.Sprintf("n%d.example.org.", i), dns.TypeA))
	}
	table := h.store.failing
	for _, change := range []func(){func() {}, func() { o.success.capacity *= 2 }} {
		change()
		next := nextOf(t, h, o)
		h.stop()
		settled(next)
		if next.store.failing != table {
			t.Fatal("the table is another one")
		}
		if zone, _ := next.failingOf(keyOf(next, "a.example.org."), false); !zone.Gone() {
			t.Error("the zone is not gone any more")
		}
		asked := u.asked.Load()
		rcodeOf(t, ctx, next, asking("n1.example.org.", dns.TypeA))
		if u.asked.Load() != asked {
			t.Error("a kept failure is lost")
		}
		h = next
	}
	o.servfailMost = time.Minute
	next := nextOf(t, h, o)
	h.stop()
	settled(next)
	if next.store.failing == table {
		t.Error("a table of another MAX is used")
	}
}

// A kept failure of a zone that is gone takes the slow path when it is its turn, and only then.
func TestBackOffOnTheFastPath(t *testing.T) {
	inBubble(t, "", func(t *testing.T) {
		u := new(mortal)
		u.dead.Store(true)
		h := startNamed(t, t.Name(), backingOff(5*time.Second, time.Minute), u)
		ctx := contextOf(t, "dns://:53")
		ask2 := func() {
			for i := range 20 {
				rcodeOf(t, ctx, h, asking(fmt.Sprintf("n%d.example.org.", i), dns.TypeA))
			}
		}
		for range 16 {
			ask2()
			time.Sleep(time.Second)
		}
		f := newFast(t, h, "dns://:53", chain.Effects{})
		packet := mustPack(t, "n1.example.org.")
		look := func() bool {
			_, why := f.ask(packet, udp4Client)
			return why == fastpath.Answered
		}
		ask2()
		if !look() {
			t.Error("a kept failure does not stand")
		}
		time.Sleep(5 * time.Second)
		if look() {
			t.Error("nobody is let through after 5 s")
		}
		u.dead.Store(false)
		ask2() // one is let through, and so is the whole zone
		time.Sleep(time.Second)
		for i := range 20 {
			if rcode := rcodeOf(t, ctx, h, asking(fmt.Sprintf("n%d.example.org.", i), dns.TypeA)); rcode != dns.RcodeSuccess {
				t.Errorf("n%d: rcode %d", i, rcode)
			}
		}
	})
}
