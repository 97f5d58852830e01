package optcache

import (
	"context"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"

	"github.com/miekg/dns"

	"github.com/optcache/optcache/plugin/fastpath"
	"github.com/optcache/optcache/plugin/pkg/chain"
)

// This file is about RD: what a question without it has brought is for such questions only.

// byRD is an upstream that has one response for questions with RD and another one for those without.
type byRD struct {
	upstream
	with, without *dns.Msg
}

func (u *byRD) ServeDNS(ctx context.Context, w dns.ResponseWriter, r *dns.Msg) (int, error) {
	m := u.without
	if r.RecursionDesired {
		m = u.with
	}
	u.mu.Lock()
	u.asked = append(u.asked, r.Copy())
	takes := u.takes
	u.mu.Unlock()
	time.Sleep(takes)
	if m == nil {
		return dns.RcodeServerFailure, errUpstream
	}
	m = m.Copy()
	m.Id, m.Question, m.RecursionDesired = r.Id, r.Question, r.RecursionDesired
	return m.Rcode, w.WriteMsg(m)
}

// asks counts the queries since the last call by RD.
func (u *byRD) asks() (with, without int) {
	for _, r := range u.queries() {
		if r.RecursionDesired {
			with++
		} else {
			without++
		}
	}
	return with, without
}

// norec is the question of plain, or the one of client, with RD=0.
func norec() *dns.Msg {
	r := asking("host.example.org.", dns.TypeA)
	r.RecursionDesired = false
	return r
}

var notRecursive = map[string]struct {
	response *dns.Msg
	kept     bool // for RD=0
}{
	"answer":               {positive("host.example.org. 60 IN A 192.0.2.9"), true},
	"alias and answer":     {positive("host.example.org. 60 IN CNAME x.example.org.", "x.example.org. 60 IN A 192.0.2.9"), true},
	"NXDOMAIN":             {negative(dns.RcodeNameError, soaRecord), true},
	"NODATA":               {negative(dns.RcodeSuccess, soaRecord), true},
	"NODATA by alias":      {aliasWithSOA(), true},
	"referral":             {negative(dns.RcodeSuccess, "example.org. 60 IN NS ns.example.org."), false},
	"empty":                {negative(dns.RcodeSuccess), false},
	"additional only":      {additionalOnly(), false},
	"alias only":           {positive("host.example.org. 60 IN CNAME x.example.org."), false},
	"NXDOMAIN without SOA": {negative(dns.RcodeNameError), false},
	"SERVFAIL":             {negative(dns.RcodeServerFailure), false},
	"NOTIMP":               {negative(dns.RcodeNotImplemented), false},
	"REFUSED":              {negative(dns.RcodeRefused), false},
	"no response":          {nil, false},
}

func aliasWithSOA() *dns.Msg {
	m := positive("host.example.org. 60 IN CNAME x.example.org.")
	m.Ns = parsed(soaRecord)
	return m
}

func additionalOnly() *dns.Msg {
	m := positive()
	m.Extra = parsed("host.example.org. 60 IN TXT text")
	return m
}

// A question with RD is never answered by what one without has brought, from the cache or while both wait.
func TestWhatRD0BringsIsForRD0(t *testing.T) {
	for name, tc := range notRecursive {
		inBubble(t, name, func(t *testing.T) {
			up := &byRD{with: positive(newRecord), without: tc.response}
			up.takes = time.Second
			o := coalescing(100)
			o.success.minTTL, o.denial.minTTL = time.Minute, time.Minute
			h := startNamed(t, "rd/"+name, o, up)
			ctx := serverContext(t)
			rd := func() *dns.Msg { return asking("host.example.org.", dns.TypeA) }

			var c crowd
			c.add(ctx, h, norec(), &wireWriter{addr: udp4Client})
			synctest.Wait()
			for range 10 {
				c.add(ctx, h, rd(), &wireWriter{addr: udp4Client})
				c.add(ctx, h, norec(), &wireWriter{addr: udp4Client})
			}
			c.wg.Wait()
			for i, m := range c.members {
				if i%2 == 0 {
					if len(m.packets) == 1 && unpacked(t, m.packets[0]).RecursionDesired {
						t.Errorf("client %d: RD", i)
					}
					continue
				}
				if got := (served{Msg: unpacked(t, m.only(t))}); got.first() != newData || !got.RecursionDesired {
					t.Errorf("client %d with RD got %v", i, got)
				}
			}
			if with, without := up.asks(); with != 1 || without == 0 || without > 2 {
				t.Errorf("%d and %d queries", with, without)
			}
			nobodyWaits(t, h)

			// Beside each other in the cache. What RD has brought serves both.
			for range 3 {
				if m := answer(t, ctx, h, rd()); (served{Msg: m}).first() != newData || !m.RecursionDesired {
					t.Errorf("with RD: %v", m)
				}
				if m := answer(t, ctx, h, norec()); (served{Msg: m}).first() != newData || m.RecursionDesired {
					t.Errorf("without RD: %v", m)
				}
			}
			if n := len(up.queries()); n != 0 {
				t.Errorf("%d queries for what is there", n)
			}
		})
		inBubble(t, name+" alone", func(t *testing.T) {
			up := &byRD{with: positive(newRecord), without: tc.response}
			o := stockOptions()
			o.success.minTTL, o.denial.minTTL = time.Minute, time.Minute
			h := startNamed(t, "rd alone/"+name, o, up)
			ctx := serverContext(t)
			for range 3 {
				ask(ctx, h, norec(), udp4Client)
			}
			want := 3
			if tc.kept {
				want = 1
			}
			if _, n := up.asks(); n != want {
				t.Errorf("%d queries, want %d", n, want)
			}
			if got := (served{Msg: answer(t, ctx, h, asking("host.example.org.", dns.TypeA))}); got.first() != newData {
				t.Errorf("with RD: %v", got)
			}
		})
	}
}

// A refresh asks as the entry's key says, whichever request it is that begins it.
func TestRefreshAsksWithTheRDOfTheEntry(t *testing.T) {
	for name, o := range map[string]options{
		"prefetch":            prefetching(1),
		"immediate":           stale(func(*staleOptions) {}),
		"verify":              stale(func(s *staleOptions) { s.verify = true }),
		"verify with timeout": stale(func(s *staleOptions) { s.verify, s.timeout = true, time.Second }),
	} {
		for _, filledWith := range []bool{true, false} {
			inBubble(t, name+map[bool]string{true: "", false: ", filled without RD"}[filledWith], func(t *testing.T) {
				up := &byRD{with: positive(oldRecord), without: negative(dns.RcodeSuccess, "example.org. 60 IN NS ns.example.org.")}
				if !filledWith {
					up.without = positive(oldRecord)
				}
				h := startNamed(t, t.Name(), o, up)
				ctx := serverContext(t)
				first := asking("host.example.org.", dns.TypeA)
				first.RecursionDesired = filledWith
				answer(t, ctx, h, first)
				up.queries()
				if name == "prefetch" {
					time.Sleep(50 * time.Second)
				} else {
					time.Sleep(70 * time.Second)
				}
				up.with = positive(newRecord)
				if m := answer(t, ctx, h, norec()); len(m.Answer) != 1 || m.RecursionDesired {
					t.Errorf("without RD: %v", m)
				}
				synctest.Wait()
				if with, without := up.asks(); filledWith && (with != 1 || without != 0) || !filledWith && (with != 0 || without != 1) {
					t.Errorf("%d queries with RD, %d without", with, without)
				}
				want := newData
				if !filledWith {
					want = oldData
				}
				if m := answer(t, ctx, h, norec()); (served{Msg: m}).first() != want {
					t.Errorf("after the refresh, without RD: %v", m)
				}
				if m := answer(t, ctx, h, asking("host.example.org.", dns.TypeA)); (served{Msg: m}).first() != newData {
					t.Errorf("after the refresh, with RD: %v", m)
				}
			})
		}
	}
}

// Of two that may be served to RD=0, a failure and what is stale give way.
func TestRD0PrefersItsOwnToFailuresAndStale(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up := &byRD{with: negative(dns.RcodeServerFailure), without: positive(newRecord)}
		h := startNamed(t, t.Name(), stale(func(*staleOptions) {}), up)
		f := newFast(t, h, "dns://"+t.Name()+":53", chain.Effects{})
		ctx := serverContext(t)
		answer(t, ctx, h, norec())
		answer(t, ctx, h, asking("host.example.org.", dns.TypeA))
		if got := (served{Msg: answer(t, ctx, h, norec())}); got.first() != newData {
			t.Errorf("beside a failure: %v", got)
		}
		p, err := norec().Pack()
		if err != nil {
			t.Fatal(err)
		}
		reply, why := f.ask(p, udp4Client)
		if got := (served{Msg: new(dns.Msg)}); why != fastpath.Answered || got.Unpack(reply) != nil || got.first() != newData {
			t.Errorf("beside a failure, by the fast path: %v, passed on as %q", got, why)
		}
		time.Sleep(6 * time.Second)
		if got := (served{Msg: answer(t, ctx, h, norec())}); got.first() != newData {
			t.Errorf("beside a stale failure: %v", got)
		}
		time.Sleep(time.Minute)
		up.with = positive(oldRecord)
		answer(t, ctx, h, asking("host.example.org.", dns.TypeA)) // begins a refresh
		synctest.Wait()
		if got := (served{Msg: answer(t, ctx, h, norec())}); got.first() != oldData {
			t.Errorf("when its own is stale: %v", got)
		}
		if got, why := f.ask(p, udp4Client); why != fastpath.Answered || unpacked(t, got).RecursionDesired {
			t.Errorf("the fast path passes on a hit as %q", why)
		}
	})
}

func TestFileKeepsRD(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "answers")
	up := &byRD{with: positive(newRecord), without: positive(oldRecord)}
	h := fromFile(t, path, roomFor(sizedOptions(4096)), up, 5e9)
	ctx := serverContext(t)
	answer(t, ctx, h, norec())
	h.stop()
	up.queries()
	h = fromFile(t, path, roomFor(sizedOptions(4096)), up, 77e9)
	if got := (served{Msg: answer(t, ctx, h, norec())}); got.first() != oldData || len(up.queries()) != 0 {
		t.Errorf("without RD: %v", got)
	}
	if got := (served{Msg: answer(t, ctx, h, asking("host.example.org.", dns.TypeA))}); got.first() != newData || len(up.queries()) != 1 {
		t.Errorf("with RD: %v", got)
	}
}
