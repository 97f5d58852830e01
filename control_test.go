package optcache

import (
	"context"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/coredns/coredns/plugin"

	"github.com/miekg/dns"

	"github.com/optcache/optcache/plugin/control"
)

// filled returns an instance that holds answers of several kinds, and its control block.
func filled(t *testing.T) (*Optcache, controlBlock) {
	t.Helper()
	up := plugin.HandlerFunc(func(_ context.Context, w dns.ResponseWriter, r *dns.Msg) (int, error) {
		m := new(dns.Msg).SetReply(r)
		switch name := r.Question[0].Name; {
		case strings.HasPrefix(name, "no."):
			m.Rcode, m.Ns = dns.RcodeNameError, parsed(soaRecord)
		case strings.HasPrefix(name, "fails."):
			m.Rcode = dns.RcodeServerFailure
		default:
			m.Answer = parsed(fmt.Sprintf("%s 300 IN A 192.0.2.1", name))
			if r.Question[0].Qtype == dns.TypeAAAA {
				m.Answer = parsed(fmt.Sprintf("%s 60 IN AAAA 2001:db8::1", name))
			}
		}
		return 0, w.WriteMsg(m)
	})
	o := roomFor(roomyOptions())
	o.stale.upTo = time.Hour
	h := startNamed(t, t.Name(), o, up)
	ctx := serverContext(t)
	for _, name := range []string{"example.org.", "a.example.org.", "b.a.example.org.", "no.example.org.", "fails.example.org.", "notexample.org.", "example.net."} {
		answer(t, ctx, h, asking(name, dns.TypeA))
		if name == "a.example.org." {
			answer(t, ctx, h, asking(name, dns.TypeAAAA))
			answer(t, ctx, h, asking(name, dns.TypeA).SetEdns0(1232, true))
		}
	}
	return h, controlBlock{h}
}

// listing returns what a filter finds, as words.
func listing(t *testing.T, b controlBlock, f control.Filter) (all []string) {
	t.Helper()
	if f.Limit == 0 {
		f.Limit = 3
	}
	for {
		page, err := b.List(f)
		if err != nil {
			t.Fatal(err)
		}
		if len(page.Answers) > f.Limit {
			t.Fatalf("%d answers in a page of %d", len(page.Answers), f.Limit)
		}
		for _, a := range page.Answers {
			word := a.Name + a.Type
			if a.DO {
				word += "+do"
			}
			all = append(all, word)
		}
		if f.After = page.Next; f.After == "" {
			break
		}
	}
	slices.Sort(all)
	return all
}

func TestFlushTakesWhatItSays(t *testing.T) {
	everything := []string{"a.example.org.A", "a.example.org.A+do", "a.example.org.AAAA", "b.a.example.org.A", "example.net.A", "example.org.A",
		"fails.example.org.A", "no.example.org.A", "notexample.org.A"}
	for name, tc := range map[string]struct {
		filter control.Filter
		gone   []string
	}{
		"name":             {control.Filter{Name: "A.example.org"}, []string{"a.example.org.A", "a.example.org.A+do", "a.example.org.AAAA"}},
		"type":             {control.Filter{Name: "a.example.org.", Type: dns.TypeAAAA}, []string{"a.example.org.AAAA"}},
		"subtree":          {control.Filter{Name: "a.example.org.", Subtree: true}, []string{"a.example.org.A", "a.example.org.A+do", "a.example.org.AAAA", "b.a.example.org.A"}},
		"denials":          {control.Filter{Kinds: []string{"denial"}}, []string{"no.example.org.A"}},
		"failures":         {control.Filter{Kinds: []string{"failure"}}, []string{"fails.example.org.A"}},
		"both":             {control.Filter{Kinds: []string{"denial", "failure"}}, []string{"fails.example.org.A", "no.example.org.A"}},
		"stale":            {control.Filter{Stale: true}, []string{"a.example.org.AAAA", "fails.example.org.A"}},
		"all":              {control.Filter{}, everything},
		"what is not held": {control.Filter{Name: "c.example.org."}, nil},
	} {
		inBubble(t, name, func(t *testing.T) {
			h, b := filled(t)
			time.Sleep(100 * time.Second)
			if got := listing(t, b, control.Filter{}); !slices.Equal(got, everything) {
				t.Fatalf("it holds %v", got)
			}
			if got := listing(t, b, tc.filter); !slices.Equal(got, tc.gone) {
				t.Errorf("the filter lists %v, want %v", got, tc.gone)
			}
			n, err := b.Flush(tc.filter)
			if err != nil || n != len(tc.gone) {
				t.Errorf("%d are gone, want %d; %v", n, len(tc.gone), err)
			}
			want := slices.DeleteFunc(slices.Clone(everything), func(s string) bool { return slices.Contains(tc.gone, s) })
			if got := listing(t, b, control.Filter{}); !slices.Equal(got, want) {
				t.Errorf("it holds %v, want %v", got, want)
			}
			if n := h.store.total(); n != int64(len(want)) {
				t.Errorf("%d entries are counted, want %d", n, len(want))
			}
			if flushes, flushed := count(h, countFlush), count(h, countFlushed); flushes != 1 || flushed != uint64(n) {
				t.Errorf("%d flushes of %d answers are counted, want one of %d", flushes, flushed, n)
			}
		})
	}
}

func TestControlRefusesBadFilters(t *testing.T) {
	_, b := filled(t)
	for name, f := range map[string]control.Filter{
		`"x..y" is not a domain name`:      {Name: "x..y"},
		"a subtree needs a name":           {Subtree: true},
		`"positive" is no kind of answers`: {Kinds: []string{"positive"}},
	} {
		if _, err := b.Flush(f); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("%+v: %v, want %s", f, err, name)
		}
		f.Limit = 1
		if _, err := b.List(f); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("list %+v: %v, want %s", f, err, name)
		}
	}
	for _, after := range []string{"x", "-1.0.0", "0.0", "99999999999999999999.0.0"} {
		if _, err := b.List(control.Filter{Limit: 1, After: after}); err == nil {
			t.Errorf("cursor %q is taken", after)
		}
	}
	if page, err := b.List(control.Filter{Limit: 1, After: "9.9.9"}); err != nil || len(page.Answers) != 0 {
		t.Errorf("a cursor beyond the end: %v, %v", page, err)
	}
	if err := b.Snapshot(); err == nil || !strings.Contains(err.Error(), "cache_file_path") {
		t.Errorf("a snapshot without a file: %v", err)
	}
}

func TestLookupShowsWhatIsHeld(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, b := filled(t)
		time.Sleep(100 * time.Second)
		for qtype, want := range map[uint16]int{0: 3, dns.TypeA: 2, dns.TypeAAAA: 1, dns.TypeMX: 0} {
			got, err := b.Lookup("A.Example.org", qtype)
			if err != nil || len(got) != want {
				t.Errorf("type %d: %d answers, want %d; %v", qtype, len(got), want, err)
			}
		}
		got, _ := b.Lookup("a.example.org.", dns.TypeAAAA)
		a := got[0]
		if a.TTL != 60 || a.Left != -40 || !a.Stale || a.Kind != "success" || a.Rcode != "NOERROR" || a.Segment != "window" || a.Class != "IN" ||
			time.Since(a.Stored) != 100*time.Second || len(a.Records) != 1 || a.Records[0] != "a.example.org.\t0\tIN\tAAAA\t2001:db8::1" {
			t.Errorf("%+v", a)
		}
		got, _ = b.Lookup("no.example.org.", dns.TypeA)
		if a := got[0]; a.Kind != "denial" || a.Rcode != "NXDOMAIN" || a.Left != 200 || !strings.Contains(a.Records[0], "SOA") {
			t.Errorf("%+v", a)
		}
		st := b.Status()
		if st.Entries["success"] != 7 || st.Misses < 9 || st.Requests != st.Misses || st.Memory == 0 || st.Memory > st.MemoryLimit {
			t.Errorf("%+v", st)
		}
	})
}

// What was asked for before a flush does not come back after it.
func TestFlushMeansGone(t *testing.T) {
	flushAll := func(t *testing.T, h *Optcache) {
		t.Helper()
		if _, err := (controlBlock{h}).Flush(control.Filter{Name: "host.example.org."}); err != nil {
			t.Fatal(err)
		}
	}
	// news makes the upstream give the new answer and checks that clients get it, and that it is kept.
	news := func(t *testing.T, h *Optcache, up *upstream) {
		t.Helper()
		up.answersWith(0, newRecord)
		for range 3 {
			if got := client(t, h); got.first() != newData {
				t.Errorf("got %v", got)
			}
			synctest.Wait()
			time.Sleep(time.Second)
		}
		up.fails(0)
		if got := client(t, h); got.first() != newData {
			t.Errorf("the new answer is not kept: %v", got)
		}
	}
	for _, first := range []bool{false, true} {
		inBubble(t, fmt.Sprintf("a miss under way that ends first %v", first), func(t *testing.T) {
			up := new(upstream)
			up.answersWith(time.Second, oldRecord)
			h := startNamed(t, t.Name(), coalescing(100), up)
			var c crowd
			for range 3 {
				c.add(serverContext(t), h, asking("host.example.org.", dns.TypeA), &wireWriter{addr: udp4Client})
			}
			synctest.Wait()
			flushAll(t, h)
			up.answersWith(0, newRecord)
			if first {
				c.wg.Wait()
			}
			if got := client(t, h); got.first() != newData || got.took != 0 {
				t.Errorf("got %v after %v", got, got.took)
			}
			c.wg.Wait()
			news(t, h, up)
			nobodyWaits(t, h)
		})
	}
	for mode, set := range staleModes {
		inBubble(t, "a refresh under way, "+mode, func(t *testing.T) {
			h, up := aged(t, t.Name(), stale(set), 70*time.Second)
			up.answersWith(3*time.Second, oldRecord)
			var c crowd
			c.add(serverContext(t), h, asking("host.example.org.", dns.TypeA), &wireWriter{addr: udp4Client})
			synctest.Wait()
			flushAll(t, h)
			news(t, h, up)
			c.wg.Wait()
			time.Sleep(5 * time.Second)
			up.fails(0)
			if got := client(t, h); got.first() != newData {
				t.Errorf("after the refresh: %v", got)
			}
		})
	}
	inBubble(t, "a prefetch under way", func(t *testing.T) {
		h, up := aged(t, t.Name(), prefetching(1), 55*time.Second)
		up.answersWith(3*time.Second, oldRecord)
		client(t, h)
		synctest.Wait()
		flushAll(t, h)
		news(t, h, up)
		time.Sleep(5 * time.Second)
		up.fails(0)
		if got := client(t, h); got.first() != newData {
			t.Errorf("after the prefetch: %v", got)
		}
	})
	for _, before := range []bool{false, true} {
		t.Run(fmt.Sprintf("a reload, before %v", before), func(t *testing.T) {
			o := roomFor(roomyOptions())
			up := new(upstream)
			up.answersWith(0, oldRecord)
			h := firstOf(t, o, up)
			h.clock = systemNow
			client(t, h)
			if before { // the next generation runs already
				next := moving(t, h, o)
				flushAll(t, next)
				h.stop()
				h = settled(next)
			} else {
				flushAll(t, h)
				next := moving(t, h, o)
				h.stop()
				h = settled(next)
			}
			up.answersWith(0, newRecord)
			if got := client(t, h); got.first() != newData {
				t.Errorf("got %v", got)
			}
		})
	}
	for _, written := range []bool{false, true} {
		t.Run(fmt.Sprintf("a snapshot, written anew %v", written), func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "answers")
			up := new(upstream)
			up.answersWith(0, oldRecord)
			start := func() *Optcache { return started(t, inFile(path), up, identity{}) }
			h := start()
			client(t, h)
			h.stop()
			h = start()
			up.fails(0)
			if got := client(t, h); got.first() != oldData {
				t.Fatalf("after a restart: %v", got)
			}
			h.snapshotter.partial.Store(!written) // or no snapshot is written, as if the process were killed
			flushAll(t, h)
			if written {
				h.stop()
			} else { // killed before a snapshot was written
				defer h.stop()
			}
			h = start()
			defer h.stop()
			up.answersWith(0, newRecord)
			if got := client(t, h); got.first() != newData {
				t.Errorf("got %v", got)
			}
		})
	}
}

// Flushes among hits, misses, prefetches and reloads: each answer was asked for after the last flush of its name.
func TestFlushUnderStress(t *testing.T) {
	var asked atomic.Uint64 // of the upstream, and what its answers say
	up := plugin.HandlerFunc(func(_ context.Context, w dns.ResponseWriter, r *dns.Msg) (int, error) {
		n := asked.Add(1)
		time.Sleep(time.Duration(rand.IntN(3000)) * time.Microsecond)
		m := new(dns.Msg).SetReply(r)
		m.Answer = []dns.RR{&dns.TXT{Hdr: dns.RR_Header{Name: r.Question[0].Name, Rrtype: dns.TypeTXT, Class: dns.ClassINET, Ttl: uint32(1 + n%3)}, Txt: []string{fmt.Sprint(n)}}}
		return 0, w.WriteMsg(m)
	})
	o := roomFor(roomyOptions())
	o.success.minTTL = 0
	o.coalesce = defaultCoalesce
	o.prefetch = prefetchOptions{amount: 1, gap: time.Minute, percentage: 90}
	o.stale.upTo = time.Hour
	const names = 6
	nameOf := func(i int) string { return fmt.Sprintf("n%d.sub%d.example.org.", i, i%2) }
	start := func(from *Optcache) *Optcache {
		if from == nil {
			h := newOptcache(o)
			h.Next, h.identity = up, identity{keys: []string{"dns://.:53"}, at: t.Name()}
			if err := h.start(t.Name(), []plugin.Handler{h}); err != nil { // with the real clock
				t.Fatal(err)
			}
			return h
		}
		instances.nextGeneration()
		h := newOptcache(o)
		h.Next, h.identity = up, from.identity
		if err := h.start(t.Name(), []plugin.Handler{h}); err != nil {
			t.Fatal(err)
		}
		return h
	}
	var running atomic.Pointer[Optcache]
	running.Store(start(nil))
	defer func() { running.Load().stop() }()
	var flushes [names]atomic.Uint64 // what the upstream had been asked when the last flush that is over began
	ctx := serverContext(t)
	end := time.Now().Add(time.Second)
	var all sync.WaitGroup
	for range 4 {
		all.Go(func() {
			for time.Now().Before(end) {
				i := rand.IntN(names)
				least := flushes[i].Load()
				w, _, _ := ask(ctx, running.Load(), asking(nameOf(i), dns.TypeTXT), udp4Client)
				if len(w.packets) != 1 {
					continue
				}
				m := new(dns.Msg)
				var n uint64
				if m.Unpack(w.packets[0]) == nil && len(m.Answer) == 1 {
					fmt.Sscan(m.Answer[0].(*dns.TXT).Txt[0], &n)
				}
				if n > 0 && n <= least {
					t.Errorf("%s: answer %d, although %d had been asked when it was flushed", nameOf(i), n, least)
					return
				}
			}
		})
	}
	var mu sync.Mutex // one flush or reload at a time: a flush is of the generation that runs
	for range 2 {
		all.Go(func() {
			for time.Now().Before(end) {
				i := rand.IntN(names)
				f := control.Filter{Name: nameOf(i)}
				if rand.IntN(2) == 0 {
					f = control.Filter{Name: fmt.Sprintf("sub%d.example.org.", i%2), Subtree: true}
				}
				mu.Lock()
				before := asked.Load()
				_, err := controlBlock{running.Load()}.Flush(f)
				if err != nil {
					t.Error(err)
				}
				for k := range names {
					if k == i || f.Subtree && k%2 == i%2 {
						flushes[k].Store(before)
					}
				}
				mu.Unlock()
				time.Sleep(time.Duration(rand.IntN(10)) * time.Millisecond)
			}
		})
	}
	all.Go(func() {
		for n := 0; time.Now().Before(end); n++ {
			time.Sleep(50 * time.Millisecond)
			o.success.capacity = 2048 + n%2*1024 // sometimes the answers move
			mu.Lock()
			last := running.Load()
			next := start(last)
			mu.Unlock()
			time.Sleep(5 * time.Millisecond)
			mu.Lock()
			running.Store(next)
			mu.Unlock()
			time.Sleep(5 * time.Millisecond)
			last.stop()
		}
	})
	all.Wait()
}
