package optcache

import (
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/miekg/dns"

	"github.com/optcache/optcache/plugin/pkg/admit"
	"github.com/optcache/optcache/plugin/pkg/record"
	"github.com/optcache/optcache/plugin/pkg/zones"
)

// bound is an option ttl for positive answers.
func bound(most, least int, zone string, types ...uint16) admit.TTLs {
	t := admit.TTLs{Selector: admit.Selector{Types: types}, Class: record.Success, Max: seconds(most), Min: seconds(least)}
	if zone != "" {
		name, _ := zones.Wire(zone)
		t.Zones = [][]byte{name}
	}
	return t
}

// kept returns the TTL of the first record of an answer when it comes, and what is left of it after a second.
func kept(t *testing.T, o options, m *dns.Msg, r *dns.Msg) (first, then uint32, asked int) {
	t.Helper()
	u := &scripted{response: m}
	h := startNamed(t, t.Name(), o, u)
	clock := clocked(h)
	ctx := contextOf(t, "dns://:53")
	ttl := func() uint32 {
		m := answer(t, ctx, h, r)
		for _, section := range [][]dns.RR{m.Answer, m.Ns} {
			if len(section) > 0 {
				return section[0].Header().Ttl
			}
		}
		return 0
	}
	first = ttl()
	clock.advance(time.Second)
	return first, ttl(), u.asked
}

func TestTTLByZoneAndType(t *testing.T) {
	t.Parallel()
	o := stockOptions()
	o.success.maxTTL, o.success.minTTL = time.Hour, 5*time.Second
	for _, c := range []struct {
		name  string
		ttls  []admit.TTLs
		ttl   int
		qtype uint16
		want  uint32
	}{
		{"none", nil, 7200, dns.TypeA, 3600},
		{"above the class's", []admit.TTLs{bound(7000, 0, "example.org.")}, 7200, dns.TypeA, 7000},
		{"least", []admit.TTLs{bound(7000, 60, "example.org.")}, 20, dns.TypeA, 60},
		{"no least", []admit.TTLs{bound(7000, 0, "example.org.")}, 3, dns.TypeA, 3},
		{"another zone", []admit.TTLs{bound(10, 0, "example.net.")}, 7200, dns.TypeA, 3600},
		{"a name with the same end", []admit.TTLs{bound(10, 0, "ample.org.")}, 7200, dns.TypeA, 3600},
		{"all names", []admit.TTLs{bound(10, 0, "")}, 7200, dns.TypeA, 10},
		{"the longest zone wins", []admit.TTLs{bound(30, 0, "host.example.org."), bound(10, 0, "example.org."), bound(20, 0, "")}, 7200, dns.TypeA, 30},
		{"a zone wins over a type", []admit.TTLs{bound(30, 0, "example.org."), bound(10, 0, "", dns.TypeA)}, 7200, dns.TypeA, 30},
		{"a type wins in the zone", []admit.TTLs{bound(10, 0, "example.org.", dns.TypeA), bound(30, 0, "example.org.")}, 7200, dns.TypeA, 10},
		{"another type", []admit.TTLs{bound(10, 0, "example.org.", dns.TypeAAAA), bound(30, 0, "org.")}, 7200, dns.TypeA, 30},
		{"one of two types", []admit.TTLs{bound(10, 0, "", dns.TypeAAAA, dns.TypeA)}, 7200, dns.TypeA, 10},
		{"the last one wins", []admit.TTLs{bound(10, 0, "org."), bound(20, 0, "org.")}, 7200, dns.TypeA, 20},
		{"not for denials", []admit.TTLs{{Class: record.Denial, Max: time.Second}}, 7200, dns.TypeA, 3600},
	} {
		t.Run(c.name, func(t *testing.T) {
			o := o
			o.ttls = c.ttls
			first, then, asked := kept(t, o, positive(fmt.Sprintf("host.example.org. %d IN A 192.0.2.1", c.ttl)), asking("HOST.example.org.", c.qtype))
			if first != c.want || then != c.want-1 || asked != 1 {
				t.Errorf("TTL %d, then %d, want %d; asked %d times", first, then, c.want, asked)
			}
		})
	}
	t.Run("a denial", func(t *testing.T) {
		o := o
		o.ttls = []admit.TTLs{{Class: record.Denial, Max: 7 * time.Second}}
		if first, then, _ := kept(t, o, negative(dns.RcodeNameError, "org. 60 IN SOA a. b. 1 2 3 4 50"), asking("x.org.", dns.TypeA)); first != 7 || then != 6 {
			t.Errorf("TTL %d, then %d", first, then)
		}
	})
}

// A reload with a shorter TTL for a zone shortens what is kept.
func TestTTLByZoneAndReload(t *testing.T) {
	t.Parallel()
	o := roomFor(stockOptions())
	u := &scripted{response: positive("host.example.org. 600 IN A 192.0.2.1")}
	h := firstOf(t, o, u)
	ctx := contextOf(t, "dns://:53")
	answer(t, ctx, h, asking("host.example.org.", dns.TypeA))
	o.ttls = []admit.TTLs{bound(20, 0, "example.org.")}
	next := nextOf(t, h, o)
	h.stop()
	settled(next)
	if m := answer(t, ctx, next, asking("host.example.org.", dns.TypeA)); u.asked != 1 || m.Answer[0].Header().Ttl > 20 {
		t.Errorf("asked %d times: %v", u.asked, m)
	}
}

// switched is an option stale_for or prefetch_for.
func switched(on bool, zone string, types ...uint16) admit.Switch {
	return admit.Switch{Selector: bound(0, 0, zone, types...).Selector, On: on}
}

// switches are options stale_for or prefetch_for, and whether they leave it on for host.example.org. A.
var switches = []struct {
	name string
	all  []admit.Switch
	on   bool
}{
	{"none", nil, true},
	{"off", []admit.Switch{switched(false, "")}, false},
	{"off for the zone", []admit.Switch{switched(false, "example.org.")}, false},
	{"off for another zone", []admit.Switch{switched(false, "ample.org."), switched(false, "example.net.")}, true},
	{"on for the zone only", []admit.Switch{switched(true, "example.org."), switched(false, "")}, true},
	{"off for a zone in one that is on", []admit.Switch{switched(false, "host.example.org."), switched(true, "example.org.")}, false},
	{"off for the type", []admit.Switch{switched(false, "", dns.TypeA)}, false},
	{"off for another type", []admit.Switch{switched(false, "", dns.TypeAAAA)}, true},
	{"a zone wins over a type", []admit.Switch{switched(true, "org."), switched(false, "", dns.TypeA)}, true},
	{"a type wins in the zone", []admit.Switch{switched(true, "org.", dns.TypeA), switched(false, "org.")}, true},
	{"the last one wins", []admit.Switch{switched(true, "org."), switched(false, "org.")}, false},
}

// Where stale_for is off, an expired answer is not served, however serve_stale is set.
func TestStaleFor(t *testing.T) {
	for name, set := range map[string]func(*staleOptions){
		"immediate": func(*staleOptions) {}, "verify": func(s *staleOptions) { s.verify = true },
		"prefer_positive": func(s *staleOptions) { s.preferPositive = true },
	} {
		for _, c := range switches {
			inBubble(t, name+"/"+c.name, func(t *testing.T) {
				o := stale(set)
				o.staleFor = c.all
				h, up := aged(t, t.Name(), o, 70*time.Second)
				up.fails(0)
				want := oldData
				if !c.on {
					want = "SERVFAIL"
				}
				if got := client(t, h); got.first() != want {
					t.Errorf("got %v, want %s", got, want)
				}
			})
		}
	}
}

// Where stale_for is off, prefer_positive does not hold a denial back.
func TestStaleForAndPreferPositive(t *testing.T) {
	inBubble(t, "", func(t *testing.T) {
		o := stale(func(s *staleOptions) { s.preferPositive = true })
		o.staleFor = []admit.Switch{switched(false, "example.org.")}
		h, up := aged(t, t.Name(), o, 70*time.Second)
		up.responds(0, negative(dns.RcodeNameError, "org. 60 IN SOA a. b. 1 2 3 4 50"))
		for range 2 {
			if got := client(t, h); got.Rcode != dns.RcodeNameError {
				t.Errorf("got %v", got)
			}
		}
		if n := len(up.queries()); n != 1 {
			t.Errorf("%d queries", n)
		}
		if n := h.store.len(record.Success); n != 0 {
			t.Errorf("%d positive answers are left", n)
		}
	})
}

// Where stale_for is off, an expired answer that is still there does not hide a kept failure: the upstream is asked once.
func TestStaleForAndFailures(t *testing.T) {
	for name, set := range map[string]func(*staleOptions){
		"immediate": func(*staleOptions) {}, "verify": func(s *staleOptions) { s.verify = true }, "prefer_positive": func(s *staleOptions) { s.preferPositive = true },
	} {
		inBubble(t, name, func(t *testing.T) {
			o := stale(set)
			o.staleFor = []admit.Switch{switched(false, "example.org.")}
			h, up := aged(t, t.Name(), o, 70*time.Second)
			up.fails(0)
			for range 3 {
				if got := client(t, h); got.first() != "SERVFAIL" {
					t.Errorf("got %v", got)
				}
			}
			if n := len(up.queries()); n != 1 {
				t.Errorf("%d queries", n)
			}
		})
	}
}

// Where prefetch_for is off, a popular answer expires.
func TestPrefetchFor(t *testing.T) {
	for _, c := range switches {
		inBubble(t, c.name, func(t *testing.T) {
			o := prefetching(1)
			o.prefetchFor = c.all
			h, up := aged(t, t.Name(), o, 50*time.Second)
			client(t, h)
			synctest.Wait()
			if n := len(up.queries()); (n == 1) != c.on || n > 1 {
				t.Errorf("%d queries, on: %v", n, c.on)
			}
		})
	}
}

// A reload with stale_for off holds for the answers of before, and one with it on again for those that are left.
func TestStaleForAndReload(t *testing.T) {
	t.Parallel()
	o := roomFor(stockOptions())
	o.stale = staleOptions{upTo: time.Hour, preferPositive: true, recheck: time.Minute}
	u := &scripted{response: positive("host.example.org. 60 IN A 192.0.2.1", "host.example.org. 60 IN A 192.0.2.2")}
	h := firstOf(t, o, u)
	ctx := contextOf(t, "dns://:53")
	answer(t, ctx, h, asking("host.example.org.", dns.TypeA))
	clock := &fakeClock{now: 1e15}
	for _, on := range []bool{false, true} {
		o.staleFor = []admit.Switch{switched(on, "example.org.")}
		next := nextOf(t, h, o)
		h.stop()
		settled(next)
		h = next
		h.clock = func() int64 { return clock.now }
		answer(t, ctx, h, asking("host.example.org.", dns.TypeA)) // the first time, the clock has jumped, and it comes anew
		clock.advance(61 * time.Second)
		asked := u.asked
		m := answer(t, ctx, h, asking("host.example.org.", dns.TypeA))
		if stale := m.Answer[0].Header().Ttl == 0; stale != on || !on && u.asked != asked+1 {
			t.Errorf("on %v: asked %d times more: %v", on, u.asked-asked, m)
		}
	}
}

func TestDenialWithoutSOA(t *testing.T) {
	t.Parallel()
	r := asking("x.org.", dns.TypeAAAA)
	servers := negative(dns.RcodeSuccess, "org. 600 IN NS a.")
	for _, c := range []struct {
		name   string
		m      *dns.Msg
		option time.Duration
		most   time.Duration
		kept   time.Duration // 0: it is not kept
	}{
		{"NXDOMAIN", negative(dns.RcodeNameError), 20 * time.Second, time.Hour, 20 * time.Second},
		{"NXDOMAIN, no longer than denials", negative(dns.RcodeNameError), 20 * time.Second, 12 * time.Second, 12 * time.Second},
		{"NXDOMAIN without the option", negative(dns.RcodeNameError), 0, time.Hour, 0},
		{"NXDOMAIN with servers", negative(dns.RcodeNameError, "org. 600 IN NS a."), 20 * time.Second, time.Hour, 20 * time.Second},
		{"NXDOMAIN with SOA", negative(dns.RcodeNameError, "org. 600 IN SOA a. b. 1 2 3 4 300"), 20 * time.Second, time.Hour, 300 * time.Second},
		{"NODATA", negative(dns.RcodeSuccess), 20 * time.Second, time.Hour, 20 * time.Second},
		{"NODATA without the option", negative(dns.RcodeSuccess), 0, time.Hour, 5 * time.Second},
		{"a referral", servers, 20 * time.Second, time.Hour, 5 * time.Second},
	} {
		t.Run(c.name, func(t *testing.T) {
			o := stockOptions()
			o.withoutSOA, o.denial.maxTTL = c.option, c.most
			u := &scripted{response: c.m}
			h := startNamed(t, t.Name(), o, u)
			clock := clocked(h)
			ctx := contextOf(t, "dns://:53")
			answer(t, ctx, h, r)
			for _, step := range []struct {
				after time.Duration
				asked int
			}{{c.kept - time.Second, 1}, {time.Second, 2}} {
				clock.advance(max(step.after, 0))
				if m := answer(t, ctx, h, r); m.Rcode != c.m.Rcode {
					t.Errorf("%v", m)
				}
				if c.kept == 0 {
					step.asked = u.asked
				}
				if u.asked != step.asked {
					t.Errorf("asked %d times after %v, want %d", u.asked, step.after, step.asked)
				}
			}
			if c.kept == 0 && u.asked != 3 {
				t.Errorf("asked %d times, want 3", u.asked)
			}
		})
	}
}

// After a reload, denials without an SOA live no longer than the option says now.
func TestDenialWithoutSOAAndReload(t *testing.T) {
	t.Parallel()
	withSOA := negative(dns.RcodeNameError, "org. 600 IN SOA a. b. 1 2 3 4 300")
	for i, c := range []struct {
		m    *dns.Msg
		next time.Duration
		want uint32 // TTL; 0: it is gone
	}{
		{negative(dns.RcodeNameError), 10 * time.Second, 10},
		{negative(dns.RcodeNameError), 2 * time.Minute, 60},
		{negative(dns.RcodeNameError), 0, 0},
		{negative(dns.RcodeSuccess), 10 * time.Second, 10},
		{negative(dns.RcodeSuccess), 0, 5},
		{withSOA, 10 * time.Second, 300},
		{withSOA, 0, 300},
	} {
		o := roomFor(stockOptions())
		o.withoutSOA = time.Minute
		h := firstOf(t, o, &scripted{response: c.m})
		answer(t, contextOf(t, "dns://:53"), h, asking("host.example.org.", dns.TypeA))
		o.withoutSOA = c.next
		next := nextOf(t, h, o)
		h.stop()
		all := mustList(t, settled(next))
		if c.want == 0 && len(all) != 0 || c.want > 0 && (len(all) != 1 || all[0].TTL != c.want) {
			t.Errorf("%d: %+v, want TTL %d", i, all, c.want)
		}
		next.stop()
	}
}

// Jitter spreads the TTLs over the part that it may take, and never prolongs one.
func TestJitter(t *testing.T) {
	t.Parallel()
	o := stockOptions()
	o.jitter = 20
	u := &scripted{response: positive("host.example.org. 1000 IN A 192.0.2.1"), verbatim: false}
	h := startNamed(t, t.Name(), o, u)
	clock := clocked(h)
	ctx := contextOf(t, "dns://:53")
	seen := make(map[uint32]int)
	sum := 0
	const n = 2000
	for range n {
		m := answer(t, ctx, h, asking("host.example.org.", dns.TypeA))
		ttl := m.Answer[0].Header().Ttl
		if ttl < 800 || ttl > 1000 {
			t.Fatalf("TTL %d", ttl)
		}
		seen[ttl]++
		sum += int(ttl)
		if again := answer(t, ctx, h, asking("host.example.org.", dns.TypeA)); again.Answer[0].Header().Ttl != ttl {
			t.Fatalf("the first client sees %d, the next one %d", ttl, again.Answer[0].Header().Ttl)
		}
		clock.advance(1001 * time.Second)
	}
	if len(seen) < 150 || sum/n < 890 || sum/n > 910 {
		t.Errorf("%d different TTLs, %d on average", len(seen), sum/n)
	}
	if u.asked != n {
		t.Errorf("asked %d times", u.asked)
	}
	// Nothing is taken off about one in 200: less than a second.
	if got := count(h, countJittered); got > n || got < n*98/100 {
		t.Errorf("%d are counted as shortened, of %d", got, n)
	}
	// A TTL of one second has nothing to lose.
	if l := (admit.Lifetime{TTL: time.Second}).Shortened(0.25); l.TTL != time.Second {
		t.Errorf("of a second, %v is left", l.TTL)
	}
}
