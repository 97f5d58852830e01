package optcache

import (
	"context"
	"net"
	"testing"
	"testing/synctest"
	"time"

	"github.com/miekg/dns"

	"github.com/optcache/optcache/plugin/pkg/query"
)

// withSubnet is a question with that client subnet; nil: without EDNS.
func withSubnet(subnets ...*dns.EDNS0_SUBNET) *dns.Msg {
	r := asking("host.example.org.", dns.TypeA)
	if len(subnets) > 0 {
		r.SetEdns0(1232, false)
		for _, s := range subnets {
			r.IsEdns0().Option = append(r.IsEdns0().Option, s)
		}
	}
	return r
}

func subnet4(third byte, scope uint8) *dns.EDNS0_SUBNET {
	return &dns.EDNS0_SUBNET{Code: dns.EDNS0SUBNET, Family: 1, SourceNetmask: 24, SourceScope: scope, Address: net.IPv4(10, 1, third, 0)}
}

func subnet6(scope uint8) *dns.EDNS0_SUBNET {
	return &dns.EDNS0_SUBNET{Code: dns.EDNS0SUBNET, Family: 2, SourceNetmask: 56, SourceScope: scope, Address: net.ParseIP("2001:db8::")}
}

// respondWith makes u answer with those options, whatever is asked.
func (u *upstream) respondWith(takes time.Duration, record string, options ...dns.EDNS0) {
	u.script(takes, func(_ context.Context, w dns.ResponseWriter, r *dns.Msg) (int, error) {
		m := new(dns.Msg).SetReply(r)
		m.Answer = parsed(record)
		m.SetEdns0(1232, false)
		m.IsEdns0().Option = options
		return 0, w.WriteMsg(m)
	})
}

func TestSubnetAnswersAreForTheSubnet(t *testing.T) {
	one, two, six := withSubnet(subnet4(1, 0)), withSubnet(subnet4(2, 0)), withSubnet(subnet6(0))
	several := withSubnet(subnet4(1, 0), subnet4(2, 0))
	for name, tc := range map[string]struct {
		options       []dns.EDNS0
		leader, other *dns.Msg
		queries       int // of ten like the leader and ten others that wait
		kept          bool
	}{
		"SCOPE 24, another subnet": {[]dns.EDNS0{subnet4(1, 24)}, one, two, 2, false},
		"SCOPE 24, no subnet":      {[]dns.EDNS0{subnet4(1, 24)}, one, withSubnet(), 11, false},
		"SCOPE 56, IPv6":           {[]dns.EDNS0{subnet6(56)}, six, one, 2, false},
		"unasked for":              {[]dns.EDNS0{subnet4(1, 24)}, withSubnet(), withSubnet(), 20, false},
		"second of two":            {[]dns.EDNS0{subnet4(1, 0), subnet4(1, 16)}, one, two, 2, false},
		"several asked for":        {[]dns.EDNS0{subnet4(1, 24)}, several, one, 2, false},
		"unreadable":               {[]dns.EDNS0{&dns.EDNS0_LOCAL{Code: dns.EDNS0SUBNET, Data: []byte{0}}}, one, two, 2, false},
		"SCOPE 0":                  {[]dns.EDNS0{subnet4(1, 0)}, one, two, 1, true},
		"no option":                {nil, one, withSubnet(), 1, true},
	} {
		inBubble(t, name, func(t *testing.T) {
			up := new(upstream)
			up.respondWith(time.Second, newRecord, tc.options...)
			h := startNamed(t, "ecs/"+name, coalescing(100), up)
			ctx := serverContext(t)
			var c crowd
			c.add(ctx, h, tc.leader.Copy(), &wireWriter{addr: udp4Client})
			synctest.Wait()
			for i := range 19 {
				r := tc.leader
				if i%2 == 0 {
					r = tc.other
				}
				c.add(ctx, h, r.Copy(), &wireWriter{addr: udp4Client})
			}
			c.wg.Wait()
			for i, m := range c.members {
				if got := (served{Msg: unpacked(t, m.only(t))}); got.first() != newData || m.took > 3*time.Second {
					t.Errorf("client %d got %v after %v", i, got, m.took)
				}
			}
			if n := count(h, countCoalesced); n != 19 { // requests, however many they have waited for
				t.Errorf("%d coalesced", n)
			}
			if n := len(up.queries()); n != tc.queries {
				t.Errorf("%d queries, want %d", n, tc.queries)
			}
			answer(t, ctx, h, withSubnet())
			if n := len(up.queries()); (n == 0) != tc.kept {
				t.Errorf("%d queries afterwards, kept %v", n, tc.kept)
			}
			nobodyWaits(t, h)
		})
	}
}

// What comes for one subnet goes to the client that waits for it, and leaves the old answer.
func TestSubnetAnswerLeavesWhatIsKept(t *testing.T) {
	for name, set := range map[string]func(*staleOptions){
		"verify":              func(s *staleOptions) { s.verify = true },
		"verify with timeout": func(s *staleOptions) { s.verify, s.timeout = true, time.Second },
	} {
		inBubble(t, name, func(t *testing.T) {
			h, up := aged(t, "ecs stale/"+name, stale(set), 70*time.Second)
			up.respondWith(100*time.Millisecond, newRecord, subnet4(1, 24))
			if got := (served{Msg: answer(t, serverContext(t), h, withSubnet(subnet4(1, 0)))}); got.first() != newData {
				t.Errorf("who asked got %v", got)
			}
			up.fails(0)
			if got := client(t, h); got.first() != oldData {
				t.Errorf("others get %v", got)
			}
		})
	}
}

// A refresh in the background asks for all. If it brings what is for some, the old answer stays.
func TestRefreshCarriesNoSubnet(t *testing.T) {
	for name, o := range map[string]options{"prefetch": prefetching(1), "immediate": stale(func(*staleOptions) {})} {
		for _, scope := range []uint8{0, 24} {
			inBubble(t, name+string('0'+rune(scope/24)), func(t *testing.T) {
				age := 50 * time.Second
				if name == "immediate" {
					age = 70 * time.Second
				}
				h, up := aged(t, t.Name(), o, age)
				up.respondWith(0, newRecord, subnet4(1, scope))
				answer(t, serverContext(t), h, withSubnet(subnet4(1, 0)))
				synctest.Wait()
				queries := up.queries()
				if len(queries) != 1 || query.SubnetOf(queries[0].IsEdns0()) != "" {
					t.Errorf("asked %v", queries)
				}
				up.fails(0)
				want := oldData
				if scope == 0 {
					want = newData
				}
				if got := client(t, h); got.first() != want {
					t.Errorf("got %v, want %s", got, want)
				}
				synctest.Wait()
				nobodyWaits(t, h)
			})
		}
	}
}
