package optcache

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/coredns/coredns/plugin"

	"github.com/miekg/dns"

	"github.com/optcache/optcache/plugin/control"
	"github.com/optcache/optcache/plugin/pkg/chain"
	"github.com/optcache/optcache/plugin/pkg/flushed"
)

// topOf returns what comes most often, as words.
func topOf(t *testing.T, h *Optcache, by string) (words []string, top control.Top) {
	t.Helper()
	top, err := controlBlock{h}.Top(by, 10)
	if err != nil {
		t.Fatal(err)
	}
	for _, it := range top.Items {
		words = append(words, fmt.Sprintf("%s%s%s %d", it.Client, it.Name, it.Type, it.Count))
	}
	return words, top
}

// A quiet server counts each hit, each miss and each client, by the chain and by the fast path.
func TestTopIsExactWhereItIsQuiet(t *testing.T) {
	inBubble(t, "", func(t *testing.T) {
		h := startNamed(t, t.Name(), roomyOptions(), addressUpstream)
		h.store.countTop(prefixes{24, 56})
		f := newFast(t, h, "dns://"+t.Name()+":53", chain.Effects{})
		ctx := serverContext(t)
		for i := range 4 {
			r := asking(fmt.Sprintf("host%d.example.org.", i), dns.TypeA)
			for range 1 + 2*i {
				time.Sleep(50 * time.Millisecond)
				ask(ctx, h, r, tcp4Client)
			}
			p, err := r.Pack()
			if err != nil {
				t.Fatal(err)
			}
			for range i {
				time.Sleep(50 * time.Millisecond)
				if _, why := f.ask(p, udp6Client); why != 0 {
					t.Fatal(why)
				}
			}
		}
		hits, top := topOf(t, h, "hits")
		if want := []string{"host3.example.org.A 9", "host2.example.org.A 6", "host1.example.org.A 3"}; !slices.Equal(hits, want) || top.OneIn != 1 || top.Total != 18 || top.Bound != 0 {
			t.Errorf("hits %v, %+v", hits, top)
		}
		misses, _ := topOf(t, h, "misses")
		if slices.Sort(misses); !slices.Equal(misses, []string{"host0.example.org.A 1", "host1.example.org.A 1", "host2.example.org.A 1", "host3.example.org.A 1"}) {
			t.Errorf("misses %v", misses)
		}
		if clients, _ := topOf(t, h, "clients"); !slices.Equal(clients, []string{"192.0.2.0/24 16", "2001:db8::/56 6"}) {
			t.Errorf("clients %v", clients)
		}
	})
}

// A busy server counts samples, which come near the truth, and are few.
func TestTopOfSamples(t *testing.T) {
	h := startNamed(t, t.Name(), roomyOptions(), addressUpstream)
	h.store.countTop(prefixes{32, 128})
	s := newScratch()
	var now int64
	keys := [][]byte{[]byte("\x03one\x00"), []byte("\x03two\x00"), []byte("\x04four\x00")}
	const rounds = 200_000
	samples := 0
	for i := range 7 * rounds {
		// One to two to four, in a row that comes again and again: samples at regular times would take one of them only.
		s.Key.Set(h.store.seed, keys[[]int{0, 1, 1, 2, 2, 2, 2}[i%7]], dns.TypeA, dns.ClassINET, false, false)
		h.store.counted(s, true, now)
		if now += 100; s.sampling.weight != 0 {
			samples++
			h.countClient(s, &net.UDPAddr{IP: net.IPv4(192, 0, 2, byte(i%7))})
		}
	}
	_, top := topOf(t, h, "hits")
	if len(top.Items) != 3 || top.OneIn < 256 || top.OneIn > mostGap || samples > 7*rounds/50 {
		t.Fatalf("%d samples, %+v", samples, top)
	}
	for i, want := range []string{"four.", "two.", "one."} {
		truth := float64(rounds * []int{4, 2, 1}[i])
		it := top.Items[i]
		if off := math.Abs(float64(it.Count) - truth); it.Name != want || off > 6*math.Sqrt(truth*float64(top.OneIn)) {
			t.Errorf("%s: %d, and %v in truth", it.Name, it.Count, truth)
		}
	}
	if _, clients := topOf(t, h, "clients"); clients.Total != top.Total || len(clients.Items) != 7 {
		t.Errorf("%+v", clients)
	}
	// When it is quiet again, soon each is counted.
	for range 12 * mostGap {
		h.store.counted(s, true, now)
		now += int64(time.Second)
	}
	if s.sampling.gap != 1 || s.sampling.pause > s.tally.Requests+2 {
		t.Errorf("%+v", s.sampling)
	}
}

// Without the control interface nothing is counted, and hits are told to the climber as ever.
func TestNothingIsCountedWithoutControl(t *testing.T) {
	h := startNamed(t, t.Name(), roomyOptions(), addressUpstream)
	ctx := serverContext(t)
	for range 5 {
		ask(ctx, h, asking("host.example.org.", dns.TypeA), udp4Client)
	}
	if _, err := (controlBlock{h}).Top("hits", 1); !errors.Is(err, control.ErrNotCounted) {
		t.Error(err)
	}
	h.store.countTop(prefixes{})
	if _, err := (controlBlock{h}).Top("clients", 1); !errors.Is(err, control.ErrNotCounted) {
		t.Error(err)
	}
	if _, err := (controlBlock{h}).Top("misses", 1); err != nil {
		t.Error(err)
	}
}

// What has been counted goes on over a reload, into the same store and into another one. A Corefile without control ends it.
func TestTopOutlivesReloads(t *testing.T) {
	o := roomFor(roomyOptions())
	o.control.Address = "unix:///" + t.Name()
	up := new(upstream)
	up.answersWith(0, oldRecord)
	h := firstOf(t, o, up)
	h.store.countTop(prefixes{24, 56})
	client(t, h)
	same := nextOf(t, h, o)
	same.store.countTop(prefixes{24, 56})
	h.stop()
	client(t, same)
	o.maxMemory *= 2
	other := nextOf(t, same, o)
	other.store.countTop(prefixes{16, 56})
	same.stop()
	settled(other)
	client(t, other)
	if misses, _ := topOf(t, other, "misses"); !slices.Equal(misses, []string{"host.example.org.A 1"}) {
		t.Errorf("misses %v", misses)
	}
	if hits, _ := topOf(t, other, "hits"); len(hits) != 1 {
		t.Errorf("hits %v", hits)
	}
	if clients, _ := topOf(t, other, "clients"); len(clients) != 1 || !strings.HasPrefix(clients[0], "192.0.0.0/16 ") {
		t.Errorf("with other prefixes, it starts anew: %v", clients)
	}
	o.control.Address = ""
	last := nextOf(t, other, o)
	other.stop()
	if last.store != other.store || last.store.top.Load() != nil {
		t.Error("it goes on without control")
	}
}

// Many cores at once, and those who look, do not get in each other's way.
func TestTopAtOnce(t *testing.T) {
	h := startNamed(t, t.Name(), roomyOptions(), addressUpstream)
	h.store.countTop(prefixes{24, 56})
	var all sync.WaitGroup
	for c := range 4 {
		all.Go(func() {
			for i := range 500 {
				ask(serverContext(t), h, asking(fmt.Sprintf("host%d.example.org.", (c+i)%50), dns.TypeA), udp4Client)
			}
		})
		all.Go(func() {
			for range 50 {
				for _, by := range []string{"hits", "misses", "clients"} {
					if _, err := (controlBlock{h}).Top(by, 10); err != nil {
						t.Error(err)
					}
				}
				h.store.countTop(prefixes{24, 56})
				controlBlock{h}.Status()
				controlBlock{h}.sorted(newScratch(), new(flushed.Filter), &control.Filter{Sort: "name", Limit: 3})
			}
		})
	}
	all.Wait()
}

// A list in an order has the first answers of all, and no cursor.
func TestSortedList(t *testing.T) {
	h := startNamed(t, t.Name(), roomyOptions(), plugin.HandlerFunc(func(_ context.Context, w dns.ResponseWriter, r *dns.Msg) (int, error) {
		m := new(dns.Msg).SetReply(r)
		var n int
		fmt.Sscanf(r.Question[0].Name, "host%d", &n)
		for i := range 1 + n%7 { // the larger, the longer it lives
			m.Answer = append(m.Answer, parsed(fmt.Sprintf("%s %d IN A 192.0.2.%d", r.Question[0].Name, 100+n, i))...)
		}
		return 0, w.WriteMsg(m)
	}))
	now := int64(1e9)
	h.clock, h.wall = func() int64 { return now }, func() time.Time { return time.Unix(0, now) }
	const names = 300
	ctx := serverContext(t)
	for i := range names {
		now += 1e6
		ask(ctx, h, asking(fmt.Sprintf("host%03d.example.org.", (i*7)%names), dns.TypeA), tcp4Client)
	}
	for i := range 5 {
		for range 6 {
			ask(ctx, h, asking(fmt.Sprintf("host%03d.example.org.", i), dns.TypeA), tcp4Client)
		}
	}
	b := controlBlock{h}
	whole, err := b.List(control.Filter{Limit: names})
	if err != nil || len(whole.Answers) != names {
		t.Fatal(len(whole.Answers), err)
	}
	for sort, order := range map[string]func(a, b control.Answer) int{
		"ttl":      func(a, b control.Answer) int { return cmp.Compare(a.Left, b.Left) },
		"age":      func(a, b control.Answer) int { return a.Stored.Compare(b.Stored) },
		"accesses": func(a, b control.Answer) int { return cmp.Compare(b.Hits, a.Hits) },
		"bytes":    func(a, b control.Answer) int { return cmp.Compare(b.Bytes, a.Bytes) },
		"name":     func(a, b control.Answer) int { return cmp.Compare(a.Name, b.Name) },
	} {
		slices.SortStableFunc(whole.Answers, order)
		for _, limit := range []int{1, 5, 100, names, 2 * names} {
			page, err := b.List(control.Filter{Sort: sort, Limit: limit, Records: true})
			slices.SortStableFunc(page.Answers, order)
			if err != nil || len(page.Answers) != min(limit, names) || page.Next != "" {
				t.Fatalf("%s, %d: %d answers, %v", sort, limit, len(page.Answers), err)
			}
			for i, a := range page.Answers {
				if order(a, whole.Answers[i]) != 0 || len(a.Records) == 0 {
					t.Errorf("%s, %d: at %d is %+v, and should be %+v", sort, limit, i, a, whole.Answers[i])
					break
				}
			}
		}
	}
	if page, err := b.List(control.Filter{Sort: "ttl", Name: "host003.example.org.", Limit: 9}); err != nil || len(page.Answers) != 1 || page.Answers[0].Left != 103 {
		t.Errorf("%+v, %v", page, err)
	}
	hot, err := b.List(control.Filter{Sort: "accesses", Hot: true, Limit: names})
	whole, _ = b.List(control.Filter{Limit: names})
	copied := len(slices.DeleteFunc(whole.Answers, func(a control.Answer) bool { return !a.Hot }))
	if err != nil || len(hot.Answers) != copied || copied == 0 { // not all of the five need have room
		t.Fatalf("%d are hot, and %d are listed, %v", copied, len(hot.Answers), err)
	}
	for _, a := range hot.Answers {
		if !a.Hot || a.Hits < 3 {
			t.Errorf("%+v", a)
		}
	}
	if plain := listing(t, b, control.Filter{Hot: true}); len(plain) != copied {
		t.Errorf("hot without an order: %v", plain)
	}
	if _, err := b.List(control.Filter{Sort: "colour", Limit: 1}); err == nil {
		t.Error("an order that is none")
	}
}

// A look-up shows what the upstream is asked now, why, and who waits.
func TestLookupShowsWhatIsUnderWay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		goOn := make(chan bool)
		o := roomyOptions()
		o.coalesce = defaultCoalesce
		h := startNamed(t, t.Name(), o, plugin.HandlerFunc(func(_ context.Context, w dns.ResponseWriter, r *dns.Msg) (int, error) {
			<-goOn
			m := new(dns.Msg).SetReply(r)
			m.Answer = parsed(r.Question[0].Name + " 60 IN A 192.0.2.1")
			return 0, w.WriteMsg(m)
		}))
		b := controlBlock{h}
		for range 4 {
			go ask(serverContext(t), h, asking("host.example.org.", dns.TypeA), udp4Client)
		}
		synctest.Wait()
		time.Sleep(500 * time.Millisecond)
		want := func(n int, name string, qtype uint16) (all []control.UnderWay) {
			t.Helper()
			all, err := b.UnderWay(name, qtype)
			if err != nil || len(all) != n {
				t.Fatalf("%+v, %v", all, err)
			}
			return all
		}
		if u := want(1, "HOST.example.org.", 0)[0]; u.Type != "A" || u.Class != "IN" || u.Reason != "miss" || u.Asking != 1 || u.Waiting != 3 || u.Detached || math.Abs(u.Seconds-0.5) > 0.1 {
			t.Errorf("%+v", u)
		}
		want(0, "host.example.org.", dns.TypeAAAA)
		want(0, "other.example.org.", 0)
		if n := b.Status().Flights; n != 1 {
			t.Errorf("%d flights", n)
		}
		if _, err := b.Flush(control.Filter{Name: "host.example.org."}); err != nil {
			t.Fatal(err)
		}
		if u := want(1, "host.example.org.", dns.TypeA)[0]; !u.Detached {
			t.Errorf("%+v", u)
		}
		close(goOn)
		synctest.Wait()
		want(0, "host.example.org.", 0)
	})
}

// An answer's age says whence it came.
func TestSourceOfAnswers(t *testing.T) {
	o := roomFor(roomyOptions())
	up := new(upstream)
	up.answersWith(0, oldRecord)
	h := firstOf(t, o, up)
	h.clock = systemNow
	h.store.first, h.store.made = h.clock(), h.clock()
	client(t, h)
	source := func(h *Optcache) string {
		t.Helper()
		all, err := controlBlock{h}.Lookup("host.example.org.", 0)
		if err != nil || len(all) != 1 {
			t.Fatal(all, err)
		}
		return all[0].Source
	}
	if got := source(h); got != "upstream" {
		t.Error(got)
	}
	o.maxMemory *= 2
	instances.nextGeneration()
	next := newOptcache(o)
	next.Next, next.identity, next.clock = up, h.identity, systemNow
	if err := next.start(h.identity.at, []plugin.Handler{next}); err != nil {
		t.Fatal(err)
	}
	stopsWith(t, next)
	h.stop()
	if got := source(settled(next)); got != "reload" {
		t.Error(got)
	}
	next.store.first = next.clock()
	if got := source(next); got != "snapshot" {
		t.Error(got)
	}
}

// The status has where the climber stands.
func TestClimberInTheStatus(t *testing.T) {
	o := roomyOptions()
	o.hotPercentage = hotAuto
	h := startNamed(t, t.Name(), o, addressUpstream)
	c := controlBlock{h}.Status().Climber
	if c.Sample != 50_000 || c.Left != c.Sample || c.Window.Share != 0.25 || c.Window.Step != 0.1 || c.Window.Value != nil || c.Hot == nil || c.Hot.Share != 0.1 {
		t.Errorf("%+v", c)
	}
	s := newScratch()
	s.Key.Set(h.store.seed, []byte("\x01x\x00"), dns.TypeA, dns.ClassINET, false, false)
	for range 75_000 {
		h.store.counted(s, true, 0)
	}
	c = controlBlock{h}.Status().Climber
	if c.Window.Value == nil || *c.Window.Value != 1 || c.Left == 0 || c.Left > 30_000 {
		t.Errorf("%+v", c)
	}
}
