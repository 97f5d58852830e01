package optcache

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/miekg/dns"

	"github.com/optcache/optcache/plugin/control"
	"github.com/optcache/optcache/plugin/level2"
	"github.com/optcache/optcache/plugin/pkg/record"
	"github.com/optcache/optcache/test/redis"
)

// tallying is an upstream that many replicas ask at once. It counts, and answers with what it is told to.
type tallying struct {
	mu       sync.Mutex // guards the rest
	response *dns.Msg
	asked    map[string]int // by name and type
	pause    time.Duration
}

func (u *tallying) Name() string { return "tallying" }

func (u *tallying) ServeDNS(_ context.Context, w dns.ResponseWriter, r *dns.Msg) (int, error) {
	u.mu.Lock()
	if u.asked == nil {
		u.asked = make(map[string]int)
	}
	u.asked[r.Question[0].Name+dns.TypeToString[r.Question[0].Qtype]]++
	m, pause := u.response.Copy(), u.pause
	u.mu.Unlock()
	time.Sleep(pause)
	m.Id, m.Question, m.RecursionDesired, m.CheckingDisabled = r.Id, r.Copy().Question, r.RecursionDesired, r.CheckingDisabled
	for _, rr := range m.Answer {
		rr.Header().Name = r.Question[0].Name
	}
	return m.Rcode, w.WriteMsg(m)
}

func (u *tallying) says(m *dns.Msg) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.response = m
}

func (u *tallying) total() (n int) {
	u.mu.Lock()
	defer u.mu.Unlock()
	for _, each := range u.asked {
		n += each
	}
	return n
}

const sharedSecret = "a secret of the tests, long enough"

// sharing are options with a second level.
func sharing(t testing.TB, server *redis.Server, change func(*options)) options {
	t.Helper()
	o := stockOptions()
	o.coalesce = defaultCoalesce
	servers, err := level2.ParseServers([]string{server.URL()})
	if err != nil {
		t.Fatal(err)
	}
	o.shared.Options = level2.Options{Servers: servers, Timeout: 2 * time.Second, Prefix: "optcache", SecretFile: redis.Secret(t, sharedSecret)}
	if change != nil {
		change(&o)
	}
	return o
}

func eventually(t testing.TB, what string, holds func() bool) {
	t.Helper()
	for end := time.Now().Add(time.Minute); !holds(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not in time: %s", what)
		}
	}
}

// replicas starts n replicas of a group with an upstream in common, and waits until all use the second level.
func replicas(t testing.TB, n int, server *redis.Server, up *tallying, change func(*options)) (all []*Optcache) {
	t.Helper()
	for range n {
		h := startNamed(t, t.Name(), sharing(t, server, change), up)
		all = append(all, h)
	}
	for _, h := range all {
		eventually(t, "the second level is used", func() bool { return !h.second.Away() })
	}
	return all
}

// sharedBy waits until the second level has all that a replica has put there.
func sharedBy(t testing.TB, h *Optcache, n int) {
	t.Helper()
	eventually(t, fmt.Sprintf("%d answers are written", n), func() bool { return h.second.Written[level2.Written].Load() >= uint64(n) })
}

func TestReplicasShareAnswers(t *testing.T) {
	server, up := redis.Start(t), new(tallying)
	for name, tc := range map[string]struct {
		request  *dns.Msg
		response *dns.Msg
	}{
		"positive": {asking("a.example.org.", dns.TypeA), positive("a.example.org. 300 IN A 192.0.2.1", "a.example.org. 300 IN A 192.0.2.2")},
		"nxdomain": {asking("no.example.org.", dns.TypeA), negative(dns.RcodeNameError, "example.org. 300 IN SOA ns.example.org. host.example.org. 1 2 3 4 300")},
		"nodata":   {asking("b.example.org.", dns.TypeAAAA), negative(dns.RcodeSuccess, "example.org. 300 IN SOA ns.example.org. host.example.org. 1 2 3 4 300")},
		"with DO":  {asking("do.example.org.", dns.TypeA).SetEdns0(1232, true), positive("do.example.org. 300 IN A 192.0.2.3")},
	} {
		t.Run(name, func(t *testing.T) {
			up.says(tc.response)
			all := replicas(t, 2, server, up, nil)
			before := up.total()
			first := answer(t, t.Context(), all[0], tc.request)
			sharedBy(t, all[0], 1)
			second := answer(t, t.Context(), all[1], tc.request)
			if n := up.total() - before; n != 1 {
				t.Errorf("the upstream was asked %d times", n)
			}
			ttl := func(m *dns.Msg) (least uint32) {
				least = 1 << 31
				for _, rr := range slices.Concat(m.Answer, m.Ns) {
					least = min(least, rr.Header().Ttl)
					rr.Header().Ttl = 0
				}
				return least
			}
			was, is := ttl(first), ttl(second)
			if was != 300 || is > 300 || is < 290 {
				t.Errorf("TTLs %d and %d", was, is)
			}
			if first.Id, second.Id = 0, 0; first.String() != second.String() {
				t.Errorf("%v became %v", first, second)
			}
			// It is in the first level now.
			server.Pause()
			defer server.Resume()
			if third := answer(t, t.Context(), all[1], tc.request); len(third.Answer) != len(second.Answer) || third.Rcode != second.Rcode {
				t.Errorf("from the first level: %v", third)
			}
			if n := up.total() - before; n != 1 {
				t.Errorf("the upstream was asked %d times", n)
			}
		})
	}
}

// An answer lives no longer than upstream said, through however many replicas it goes, and whatever MINTTL says.
func TestSharedAnswersDoNotLiveLonger(t *testing.T) {
	server, up := redis.Start(t), new(tallying)
	up.says(positive("a.example.org. 3 IN A 192.0.2.1"))
	q := asking("a.example.org.", dns.TypeA)
	first := replicas(t, 1, server, up, func(o *options) { o.success.minTTL = 0 })[0]
	answer(t, t.Context(), first, q)
	begun := time.Now()
	sharedBy(t, first, 1)
	for i := range 3 {
		h := replicas(t, 1, server, up, func(o *options) { o.success.minTTL = time.Hour })[0]
		time.Sleep(500 * time.Millisecond)
		age := time.Since(begun) // it is at least as old when it is sent
		m := answer(t, t.Context(), h, q)
		if up.total() == 1 && int(m.Answer[0].Header().Ttl) > 3-int(age.Seconds()) {
			t.Errorf("replica %d shows a TTL of %d, after %v", i, m.Answer[0].Header().Ttl, age)
		}
	}
}

// A second level that hangs costs a few questions its time, and no question its answer.
func TestSecondLevelIsNoHindrance(t *testing.T) {
	up := new(tallying)
	up.says(positive("a.example.org. 300 IN A 192.0.2.1"))
	server := redis.Start(t)
	h := replicas(t, 1, server, up, func(o *options) { o.shared.Timeout = 10 * time.Millisecond })[0]
	server.Pause()
	defer server.Resume()
	for i := range 200 {
		m := answer(t, t.Context(), h, asking(fmt.Sprintf("n%d.example.org.", i), dns.TypeA))
		if len(m.Answer) != 1 {
			t.Fatalf("question %d: %v", i, m)
		}
	}
	if waited := 200 - h.second.Asked[level2.Skipped].Load(); up.total() != 200 || waited > 20 { // five in a row, for 100 ms
		t.Errorf("the upstream was asked %d times, and %d waited", up.total(), waited)
	}
}

// What is not shared: failures, what was asked with RD=0, names outside of shared_zones, answers for one subnet, and anything with
// shared_write off.
func TestWhatIsNotShared(t *testing.T) {
	server, up := redis.Start(t), new(tallying)
	for name, tc := range map[string]struct {
		request *dns.Msg
		rcode   int
		change  func(*options)
	}{
		"a failure":        {asking("f.example.org.", dns.TypeA), dns.RcodeServerFailure, nil},
		"RD=0":             {func() *dns.Msg { m := asking("rd.example.org.", dns.TypeA); m.RecursionDesired = false; return m }(), 0, nil},
		"another zone":     {asking("z.example.org.", dns.TypeA), 0, func(o *options) { o.shared.zones = []string{"example.net."} }},
		"for one subnet":   {asking("one.example.org.", dns.TypeA), 0, func(o *options) { o.ecs.mode = ecsOff }},
		"shared_write off": {asking("w.example.org.", dns.TypeA), 0, func(o *options) { o.shared.ReadOnly = true }},
	} {
		t.Run(name, func(t *testing.T) {
			writer := sharing(t, server, nil) // so that there is a group
			w := startNamed(t, t.Name(), writer, up)
			eventually(t, "the second level is used", func() bool { return !w.second.Away() })
			all := replicas(t, 2, server, up, tc.change)
			m := positive("x. 300 IN A 192.0.2.1")
			m.Rcode = tc.rcode
			if all[0].ecs.mode == ecsOff {
				m.SetEdns0(1232, false)
				m.IsEdns0().Option = []dns.EDNS0{subnet4(10, 24)}
			}
			up.says(m)
			before := up.total()
			for _, h := range all {
				answer(t, t.Context(), h, tc.request)
				time.Sleep(20 * time.Millisecond)
			}
			if n := up.total() - before; n != 2 {
				t.Errorf("the upstream was asked %d times", n)
			}
		})
	}
}

// Of replicas that ask for the same at once, one asks upstream.
func TestColdNamesAreAskedOnce(t *testing.T) {
	server, up := redis.Start(t), &tallying{pause: 50 * time.Millisecond}
	up.says(positive("x. 300 IN A 192.0.2.1"))
	all := replicas(t, 5, server, up, nil)
	for _, h := range all {
		h.second.Upstream(2 * time.Second) // the others wait for so long
	}
	for i := range 5 {
		var done sync.WaitGroup
		for _, h := range all {
			done.Go(func() {
				if m := answer(t, t.Context(), h, asking(fmt.Sprintf("cold%d.example.org.", i), dns.TypeA)); len(m.Answer) != 1 {
					t.Errorf("%v", m)
				}
			})
		}
		done.Wait()
	}
	if n := up.total(); n > 7 {
		t.Errorf("five names were asked for %d times", n)
	}
}

// When an answer is refreshed, one replica asks upstream, and the others take what it has got.
func TestPrefetchIsShared(t *testing.T) {
	server, up := redis.Start(t), new(tallying)
	up.says(positive("x. 40 IN A 192.0.2.1")) // from the fifth second on, a request refreshes it
	all := make([]*Optcache, 3)
	for i := range all {
		o := sharing(t, server, func(o *options) {
			o.success.minTTL = 0
			o.prefetch = prefetchOptions{amount: 1, gap: time.Minute, percentage: 90}
		})
		all[i] = startNamed(t, t.Name(), o, up)
	}
	q := asking("hot.example.org.", dns.TypeA)
	for _, h := range all {
		eventually(t, "the second level is used", func() bool { return !h.second.Away() })
		answer(t, t.Context(), h, q)
		sharedBy(t, all[0], 1)
	}
	if n := up.total(); n != 1 {
		t.Fatalf("the upstream was asked %d times", n)
	}
	time.Sleep(4100 * time.Millisecond)
	for _, h := range all {
		key := keyIn(h, "hot.example.org.", dns.TypeA)
		_, before := h.remains(key)
		answer(t, t.Context(), h, q) // starts a refresh
		eventually(t, "the replica has been refreshed", func() bool { _, left := h.remains(key); return left > before })
		sharedBy(t, h, 2) // by the first one
	}
	if n := up.total(); n != 2 {
		t.Errorf("the upstream was asked %d times", n)
	}
}

func keyIn(h *Optcache, name string, qtype uint16) *record.Key {
	s, _ := h.scratchFor(asking(name, qtype), noAddr)
	defer h.release(s)
	k := s.Key
	return &k
}

// Flush means gone, for all of a group of ten: in memory, on the server, and under way.
func TestFlushReachesTheGroup(t *testing.T) {
	server, up := redis.Start(t), new(tallying)
	all := replicas(t, 10, server, up, nil)
	eventually(t, "all are known", func() bool { return strings.Contains(server.Do("zcard", server.Do("keys", "*members")), "10") })
	names := []string{"a.example.org.", "b.a.example.org.", "example.net."}
	ask := func(h *Optcache, name string) string {
		return answer(t, t.Context(), h, asking(name, dns.TypeA)).Answer[0].(*dns.A).A.String()
	}
	for round, tc := range []struct {
		filter control.Filter
		gone   []string
	}{
		{control.Filter{Name: "a.example.org."}, names[:1]},
		{control.Filter{Name: "a.example.org.", Type: dns.TypeA}, names[:1]},
		{control.Filter{Name: "example.org.", Subtree: true}, names[:2]},
		{control.Filter{Kinds: []string{"success"}}, names},
		{control.Filter{}, names},
	} {
		before, now := fmt.Sprintf("192.0.2.%d", round), fmt.Sprintf("192.0.2.%d", round+1)
		up.says(positive("x. 300 IN A " + before))
		if round == 0 {
			for _, name := range names {
				ask(all[0], name)
			}
			sharedBy(t, all[0], 3)
		}
		held := make(map[string]string)
		for _, h := range all {
			for _, name := range names {
				held[name] = ask(h, name)
			}
		}
		up.says(positive("x. 300 IN A " + now))
		by := all[round%len(all)]
		if _, err := (controlBlock{by}).Flush(tc.filter); err != nil {
			t.Errorf("%+v: %v", tc.filter, err)
		}
		for i, h := range all {
			for _, name := range names {
				want := held[name]
				if slices.Contains(tc.gone, name) {
					want = now
				}
				if got := ask(h, name); got != want {
					t.Errorf("%+v: replica %d says %s for %s, and not %s", tc.filter, i, got, name, want)
				}
			}
		}
	}
}

// A flush while the second level is away is said to have reached nobody, and reaches the group later.
func TestFlushWithoutTheSecondLevel(t *testing.T) {
	server, up := redis.Start(t), new(tallying)
	up.says(positive("x. 300 IN A 192.0.2.1"))
	all := replicas(t, 2, server, up, nil)
	q := asking("a.example.org.", dns.TypeA)
	for _, h := range all {
		answer(t, t.Context(), h, q)
		sharedBy(t, all[0], 1)
	}
	server.Stop()
	n, err := (controlBlock{all[0]}).Flush(control.Filter{})
	if n != 1 || err == nil || !strings.Contains(err.Error(), "not all of the group") {
		t.Errorf("%d are gone: %v", n, err)
	}
	server.Run()
	eventually(t, "the other has heard of it", func() bool { return all[1].store.total() == 0 })
}

// What another replica has flushed long ago is what was asked before that, and came after it, too. What was asked later stays.
func TestFlushLongAgo(t *testing.T) {
	up := new(tallying)
	up.says(positive("x. 300 IN A 192.0.2.1"))
	h := startNamed(t, "", stockOptions(), up)
	clock := clocked(h)
	for _, name := range []string{"before.example.org.", "during.example.org.", "after.example.org."} {
		answer(t, t.Context(), h, asking(name, dns.TypeA))
		clock.advance(30 * time.Second)
	}
	h.flushedElsewhere(level2.Flush{Kinds: level2.Success}, 62*time.Second) // the second one came 2 s later
	if n := h.store.total(); n != 1 {
		t.Errorf("%d answers are left, and not one", n)
	}
}

// A replica that starts has what the others are asked for most often before anybody asks for it.
func TestWarmStartFromTheGroup(t *testing.T) {
	server, up := redis.Start(t), new(tallying)
	up.says(positive("x. 300 IN A 192.0.2.1"))
	first := replicas(t, 1, server, up, nil)[0]
	for i := range 50 {
		for range 3 {
			answer(t, t.Context(), first, asking(fmt.Sprintf("w%d.example.org.", i), dns.TypeA))
		}
	}
	sharedBy(t, first, 50)
	if n := len(first.hottest(100)); n != 50 {
		t.Fatalf("%d are hottest", n)
	}
	// What the keeper does from time to time.
	eventually(t, "the hottest are told", func() bool {
		return server.Do("eval", "return redis.call('zcard', (redis.call('keys', '*hot'))[1] or '')", "0") == "50"
	})
	before := first.second.Warmed.Load()
	second := replicas(t, 1, server, up, nil)[0]
	eventually(t, "they are here", func() bool { return second.store.total() == 50 })
	third := replicas(t, 1, server, up, func(o *options) { o.shared.zones = []string{"w1.example.org."} })[0]
	eventually(t, "all were looked at", func() bool { return third.second.Warmed.Load() >= before+100 }) // both count together
	if n := third.store.total(); n != 1 {
		t.Errorf("%d answers were taken over, and one is of the zones", n)
	}
	server.Stop()
	answer(t, t.Context(), second, asking("w7.example.org.", dns.TypeA))
	if n := up.total(); n != 50 {
		t.Errorf("the upstream was asked %d times", n)
	}
}

// A stale answer of the group serves when the upstream is gone.
func TestStaleAnswersAreShared(t *testing.T) {
	server, up := redis.Start(t), new(tallying)
	up.says(positive("x. 1 IN A 192.0.2.1"))
	all := replicas(t, 2, server, up, func(o *options) { o.success.minTTL, o.stale.upTo = 0, time.Hour })
	q := asking("s.example.org.", dns.TypeA)
	answer(t, t.Context(), all[0], q)
	sharedBy(t, all[0], 1)
	time.Sleep(1100 * time.Millisecond)
	bad := new(dns.Msg)
	bad.Response, bad.Rcode = true, dns.RcodeServerFailure
	up.says(bad)
	answer(t, t.Context(), all[1], q)
	if m := answer(t, t.Context(), all[1], q); len(m.Answer) != 1 {
		t.Errorf("%v", m)
	}
}

// An operator who asks what becomes of a question is told that the second level has answered, or why it has not.
func TestExplainKnowsTheSecondLevel(t *testing.T) {
	server, up := redis.Start(t), new(tallying)
	up.says(positive("x. 300 IN A 192.0.2.1"))
	all := replicas(t, 2, server, up, nil)
	explained := func(h *Optcache) (outcome, why string) {
		w := &watch{}
		ctx := context.WithValue(t.Context(), watchKey{}, w)
		watching.Add(1)
		defer watching.Add(-1)
		answer(t, ctx, h, asking("e.example.org.", dns.TypeA))
		return w.outcome, w.why
	}
	if outcome, why := explained(all[0]); outcome != "miss" || !strings.Contains(why, "second level has not answered: miss") {
		t.Errorf("%s: %s", outcome, why)
	}
	sharedBy(t, all[0], 1)
	if outcome, _ := explained(all[1]); outcome != "shared" {
		t.Errorf("%s", outcome)
	}
}

// data returns what a reply says, without TTLs.
func data(m *dns.Msg) (all []string) {
	for _, rr := range slices.Concat(m.Answer, m.Ns) {
		_, of, _ := strings.Cut(rr.String(), "\tIN\t")
		all = append(all, of)
	}
	return all
}

// With ecs scoped, an answer is shared with the clients that it is for, and with no others.
func TestSharedAnswersForASubnet(t *testing.T) {
	server := redis.Start(t)
	type question struct {
		name, client string
		hit          bool   // the second level has the answer
		scope        string // that the client is told
	}
	for name, all := range map[string][]question{ // each is asked of another replica
		"scope 24": {
			{"s24.example.org.", "10.1.1.0/24", false, "10.1.1.0/24/24"}, {"s24.example.org.", "10.1.1.0/24", true, "10.1.1.0/24/24"},
			{"s24.example.org.", "10.1.2.0/24", false, "10.1.2.0/24/24"}, {"s24.example.org.", "", false, ""},
		},
		"scope 16": {
			{"s16.example.org.", "10.1.1.0/24", false, "10.1.1.0/24/16"}, {"s16.example.org.", "10.1.1.0/24", true, "10.1.1.0/24/16"},
			{"s16.example.org.", "10.2.1.0/24", false, "10.2.1.0/24/16"}, {"s16.example.org.", "10.1.0.0/16", true, "10.1.0.0/16/16"},
		},
		"scope 32": {
			{"s32.example.org.", "10.1.1.0/24", false, "10.1.1.0/24/32"}, {"s32.example.org.", "10.1.1.0/24", true, "10.1.1.0/24/32"},
			{"s32.example.org.", "10.1.1.0/25", false, "10.1.1.0/25/32"},
		},
		"scope 0": {
			{"s0.example.org.", "10.1.1.0/24", false, "10.1.1.0/24/0"}, {"s0.example.org.", "10.2.0.0/16", true, "10.2.0.0/16/0"},
			{"s0.example.org.", "", true, ""}, {"s0.example.org.", "2001:db8::/32", true, "[2001:db8::]/32/0"},
		},
		"without the option": {
			{"none.example.org.", "10.1.1.0/24", false, "10.1.1.0/24/0"}, {"none.example.org.", "10.2.0.0/16", true, "10.2.0.0/16/0"},
		},
		"nobody said whom it is for": {
			{"s24.example.org.", "", false, ""}, {"s24.example.org.", "", true, ""}, {"s24.example.org.", "10.1.1.0/24", false, "10.1.1.0/24/24"},
		},
		"withheld": {
			{"s24.example.org.", "0.0.0.0/0", false, "0.0.0.0/0/0"}, {"s24.example.org.", "0.0.0.0/0", true, "0.0.0.0/0/0"},
			{"s24.example.org.", "10.1.1.0/24", false, "10.1.1.0/24/24"}, {"s24.example.org.", "", false, ""},
		},
		"denial": {
			{"nx.example.org.", "10.1.1.0/24", false, "10.1.1.0/24/24"}, {"nx.example.org.", "10.1.1.0/24", true, "10.1.1.0/24/24"},
			{"nx.example.org.", "10.1.2.0/24", false, "10.1.2.0/24/24"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			server.Do("flushall")
			for i, q := range all {
				up := newGeo()
				h := startNamed(t, t.Name(), sharing(t, server, func(o *options) { *o = scoped(*o, 100) }), up)
				eventually(t, "the second level is used", func() bool { return !h.second.Away() })
				written := h.second.Written[level2.Written].Load() // replicas of a test count together
				if parts := strings.Split(q.scope, "/"); len(parts) == 3 && parts[2] != "0" && parts[1] != parts[2] {
					written++ // it is put under the client's own prefix, too
				}
				first := answer(t, serverContext(t), h, from(q.name, q.client))
				if asked := len(up.queries()); asked > 0 == q.hit || scopeIn(first) != q.scope {
					t.Errorf("question %d, of %q: the upstream was asked %d times, and the client is told %q", i, q.client, asked, scopeIn(first))
				}
				if !q.hit {
					eventually(t, "the answer is written", func() bool { return h.second.Written[level2.Written].Load() > written })
				}
				// It is kept here as if it had come from upstream.
				again := answer(t, serverContext(t), h, from(q.name, q.client))
				if len(up.queries()) > 0 || scopeIn(again) != q.scope || again.Rcode != first.Rcode || fmt.Sprint(data(again)) != fmt.Sprint(data(first)) {
					t.Errorf("question %d, again: the upstream was asked, or the answer is another one: %v", i, again)
				}
				h.second.end()
			}
		})
	}
}
