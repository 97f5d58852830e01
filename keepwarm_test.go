package optcache

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/coredns/coredns/plugin"
	"github.com/miekg/dns"

	"github.com/optcache/optcache/plugin/pkg/keep"
)

// warming returns an instance that keeps www.example.org warm.
func warming(t *testing.T, change func(*options)) (*Optcache, *census) {
	o := stockOptions()
	o.warm.list = []keep.Question{{Name: "www.example.org.", Type: dns.TypeA}}
	change(&o)
	u := new(census)
	return startNamed(t, t.Name(), o, u), u
}

func TestKeepWarm(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h, u := warming(t, func(*options) {})
		defer h.stop()
		time.Sleep(time.Second)
		if n := u.asked.Load(); n != 1 {
			t.Fatalf("asked %d times at the start", n)
		}
		ctx := contextOf(t, "dns://:53")
		for range 200 { // more than three hours: the TTL is 3600
			time.Sleep(time.Minute)
			asked := u.asked.Load()
			answer(t, ctx, h, asking("www.example.org.", dns.TypeA))
			if u.asked.Load() != asked {
				t.Fatal("a client has to wait for the upstream")
			}
		}
		if n := u.asked.Load(); n < 4 || n > 5 {
			t.Errorf("asked %d times in 200 minutes", n)
		}
		if n := count(h, countKeptWarm); int64(n) != u.asked.Load() {
			t.Errorf("%d are counted", n)
		}
		h.stop()
		asked := u.asked.Load()
		time.Sleep(3 * time.Hour)
		if u.asked.Load() != asked {
			t.Error("it asks after the end")
		}
	})
}

// Names that are outside of the block's zones are not asked for, and names of a file are.
func TestKeepWarmFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "names")
	if err := os.WriteFile(path, []byte("a.example.org A\nelsewhere.example.net A\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	synctest.Test(t, func(t *testing.T) {
		h, u := warming(t, func(o *options) { o.zones, o.warm.file = []string{"example.org."}, path })
		defer h.stop()
		time.Sleep(time.Minute)
		if n := u.asked.Load(); n != 2 {
			t.Errorf("asked %d times, want 2", n)
		}
	})
}

// While a name waits after a failure, keep_warm waits as well, and asks soon after the upstream is back.
func TestKeepWarmBacksOff(t *testing.T) {
	for name, fails := range map[string]func(dns.ResponseWriter, *dns.Msg) (int, error){"timeout": nil, "SERVFAIL": says(dns.RcodeServerFailure), "REFUSED": says(dns.RcodeRefused)} {
		for _, names := range []int{1, 100} { // one name fails, and all of the zone
			inBubble(t, fmt.Sprint(name, " ", names), func(t *testing.T) {
				u := &mortal{fails: func(w dns.ResponseWriter, r *dns.Msg) (int, error) {
					switch {
					case strings.Contains(r.Question[0].Name, ".good."):
						return says(dns.RcodeNameError)(w, r)
					case fails == nil:
						return dns.RcodeServerFailure, errUpstream
					}
					return fails(w, r)
				}}
				u.dead.Store(true)
				o := backingOff(5*time.Second, 5*time.Minute)
				for i := range names {
					o.warm.list = append(o.warm.list, keep.Question{Name: fmt.Sprintf("n%d.example.org.", i), Type: dns.TypeA})
				}
				h := startNamed(t, t.Name(), o, u)
				defer h.stop()
				ctx := contextOf(t, "dns://:53")
				good := 0
				wait := func(minutes int) int64 {
					before := u.asked.Load()
					for range minutes {
						if names == 1 {
							good++
							before++
							rcodeOf(t, ctx, h, asking(fmt.Sprintf("n%d.good.example.org.", good), dns.TypeA))
						}
						time.Sleep(time.Minute)
					}
					return u.asked.Load() - before
				}
				first, late := wait(10), wait(20)
				// In the end, one name is asked for every five minutes. While the upstream is gone, one request goes every five seconds.
				if most := int64(map[int]int{1: 5, 100: 20 * 12}[names]); late > most || late < 2 {
					t.Errorf("asked %d times in the first 10 minutes, and %d times in 20 more; want %d at most", first, late, most)
				}
				u.dead.Store(false)
				time.Sleep(7 * time.Minute)
				before := u.asked.Load()
				for i := range names {
					if rcode := rcodeOf(t, ctx, h, asking(fmt.Sprintf("n%d.example.org.", i), dns.TypeA)); rcode != dns.RcodeSuccess {
						t.Errorf("%d: rcode %d", i, rcode)
					}
				}
				if n := u.asked.Load() - before; n > 0 {
					t.Errorf("%d names are not warm", n)
				}
			})
		}
	}
}

// Without a token to spare, names are asked for later.
func TestKeepWarmYields(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h, u := warming(t, func(o *options) {
			o.warm.list = append(o.warm.list, keep.Question{Name: "b.example.org.", Type: dns.TypeA}, keep.Question{Name: "c.example.org.", Type: dns.TypeA})
			o.upstream = upstreamOptions{perSecond: 1, burst: 1}
		})
		defer h.stop()
		time.Sleep(500 * time.Millisecond)
		if n := u.asked.Load(); n != 1 {
			t.Errorf("asked %d times at once, with one token", n)
		}
		time.Sleep(time.Minute)
		if n := u.asked.Load(); n != 3 {
			t.Errorf("asked %d times in a minute", n)
		}
	})
}

// After a reload, what is warm is not asked for, but in its time.
func TestKeepWarmAndReload(t *testing.T) {
	for name, change := range map[string]func(*options){"the same": func(*options) {}, "another size": func(o *options) { o.success.capacity *= 2 }} {
		inBubble(t, name, func(t *testing.T) {
			u := new(census) // TTL 3600
			o := roomFor(stockOptions())
			o.warm.list = []keep.Question{{Name: "www.example.org.", Type: dns.TypeA}}
			start := func() *Optcache {
				h := newOptcache(o)
				h.Next, h.clock, h.identity = u, systemNow, identity{keys: []string{"dns://.:53"}, at: t.Name()}
				if err := h.start(t.Name(), []plugin.Handler{h}); err != nil {
					t.Fatal(err)
				}
				return h
			}
			h := start()
			time.Sleep(time.Minute)
			change(&o)
			instances.nextGeneration()
			next := start()
			h.stop()
			defer next.stop()
			for _, c := range []struct {
				sleep time.Duration
				asked int64
			}{{50 * time.Minute, 1}, {10 * time.Minute, 2}} {
				time.Sleep(c.sleep)
				if n := u.asked.Load(); n != c.asked {
					t.Errorf("asked %d times after %v more, want %d", n, c.sleep, c.asked)
				}
			}
		})
	}
}
