package optcache

import (
	"bytes"
	"context"
	"fmt"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/coredns/coredns/plugin"

	"github.com/miekg/dns"

	"github.com/optcache/optcache/plugin/control"
	"github.com/optcache/optcache/plugin/pkg/record"
)

// This file tests blocks that have their memory together. A server with such blocks is started and reloaded in test/pool_test.go.

// blockUpstream answers each question with the address of its block, and counts.
type blockUpstream struct {
	address string
	asked   atomic.Int64
}

func (*blockUpstream) Name() string { return "block" }

func (u *blockUpstream) ServeDNS(_ context.Context, w dns.ResponseWriter, r *dns.Msg) (int, error) {
	u.asked.Add(1)
	m := new(dns.Msg).SetReply(r)
	if strings.HasPrefix(r.Question[0].Name, "no") {
		m.Rcode = dns.RcodeNameError
		m.Ns = parsed(fmt.Sprintf("example.org. 600 IN SOA ns.example.org. host.example.org. %s 2 3 4 600", strings.ReplaceAll(u.address, ".", "")))
	} else {
		m.Answer = parsed(fmt.Sprintf("%s 600 IN A %s", r.Question[0].Name, u.address))
	}
	return m.Rcode, w.WriteMsg(m)
}

// testBlock is one block of a test's Corefile.
type testBlock struct {
	name string
	options
	up *blockUpstream
}

// membersOf returns members with those names and options. Their upstreams are new.
func membersOf(names string, o options) (all []*testBlock) {
	for i, name := range strings.Split(names, " ") {
		all = append(all, &testBlock{name, o, &blockUpstream{address: fmt.Sprintf("192.0.2.%d", i+1)}})
	}
	return all
}

// corefile starts a generation with these blocks, and stops the instances of before, if there are some.
func corefile(t *testing.T, blocks []*testBlock, before ...*Optcache) (all []*Optcache) {
	t.Helper()
	pools := make(map[string]*poolSpec)
	instances.nextGeneration()
	for _, m := range blocks {
		h := newOptcache(m.options)
		h.Next, h.clock, h.identity = m.up, systemNow, identity{keys: []string{"dns://.:53"}, at: t.Name() + m.name}
		if name := m.pooled.name; name != "" {
			if pools[name] == nil {
				pools[name] = &poolSpec{name: name}
			}
			if err := pools[name].add(h, map[string]string{"pool": "Corefile:1"}, func() bool { return true }); err != nil {
				t.Fatal(err)
			}
		}
		all = append(all, h)
	}
	for _, h := range all {
		if err := h.start(h.identity.at, []plugin.Handler{h}); err != nil {
			t.Fatal(err)
		}
		stopsWith(t, h)
		for h.snapshotter != nil && h.snapshotter.partial.Load() {
			time.Sleep(time.Millisecond)
		}
	}
	for _, h := range before {
		h.stop()
	}
	for _, h := range all {
		settled(h)
	}
	return all
}

// pooledOptions are the options of a block in a pool of that many entries of each class.
func pooledOptions(capacity int) options {
	o := sizedOptions(capacity)
	o.maxMemory = 0
	o.pooled = poolOptions{name: "node", size: 8 << 20}
	if raceEnabled {
		o.pooled.size = 3 << 20
	}
	return o
}

// is asks for names, and reports an error where the answer is not the one of m.
func (m *testBlock) is(t *testing.T, h *Optcache, names []string) {
	t.Helper()
	ctx := serverContext(t)
	for _, name := range names {
		got := answer(t, ctx, h, asking(name, dns.TypeA))
		var data string
		switch {
		case len(got.Answer) == 1:
			data = got.Answer[0].(*dns.A).A.String()
		case len(got.Ns) == 1:
			data = fmt.Sprint(got.Ns[0].(*dns.SOA).Serial)
		}
		if data != m.up.address && data != strings.ReplaceAll(m.up.address, ".", "") {
			t.Fatalf("block %s, %s: %v", m.name, name, got)
		}
	}
}

// The blocks of a pool keep their answers apart, have one bound, and whoever is busy gets the room.
func TestPoolIsOneBudgetAndKeepsAnswersApart(t *testing.T) {
	t.Parallel()
	blocks := membersOf("a b c d", pooledOptions(2048))
	all := corefile(t, blocks)
	st := all[0].store
	names := reloadNames(400)
	for i, m := range blocks {
		if all[i].store.pool != st.pool {
			t.Fatal("there are several pools")
		}
		m.is(t, all[i], names)
	}
	for i, m := range blocks {
		asked := m.up.asked.Load()
		m.is(t, all[i], names)
		if n := m.up.asked.Load() - asked; n != 0 {
			t.Errorf("block %s: %d upstream queries", m.name, n)
		}
		if n := all[i].store.total(); n != int64(len(names)) {
			t.Errorf("block %s: %d entries", m.name, n)
		}
	}
	if raceEnabled {
		return
	}
	if bound := st.bound(); bound > 8<<20 {
		t.Errorf("the bound is %d", bound)
	}
	var busy []string
	for i := range 12_000 {
		busy = append(busy, fmt.Sprintf("busy-%d.example.org.", i))
	}
	blocks[1].is(t, all[1], busy)
	if n := all[1].store.len(record.Success); n < 3*2048 {
		t.Errorf("the busy block has %d entries", n)
	}
	checkStore(t, st)
	var sum, bytes int64
	for _, h := range all {
		sum += h.store.total()
		bytes += h.store.bytes(record.Success) + h.store.bytes(record.Denial)
	}
	if used := st.usage(); sum > int64(st.sizes.entries()) || bytes != used.records[0]+used.records[1] {
		t.Errorf("%d entries with %d bytes; the pool has room for %d, and %v bytes", sum, bytes, st.sizes.entries(), used.records)
	}
}

// What an operator asks of a block concerns this block alone.
func TestPoolOfControl(t *testing.T) {
	t.Parallel()
	o := pooledOptions(2048)
	o.cut.on = true
	blocks := membersOf("a b", o)
	all := corefile(t, blocks)
	names := reloadNames(100)
	for i, m := range blocks {
		m.is(t, all[i], names[:50*(i+1)])
	}
	a, b := controlBlock{all[0]}, controlBlock{all[1]}
	for i, c := range []controlBlock{a, b} {
		st := c.mustStatus(t)
		p, ok := st.Pools["node"]
		if n := int64(25 * (i + 1)); !ok || st.Entries["success"] != n || st.Entries["denial"] != n || p.Entries["success"] != 75 || p.Blocks != 2 || p.Same {
			t.Errorf("status %+v", st)
		}
		if st.Memory <= 0 || st.Memory >= p.Memory || p.MemoryLimit != all[0].store.bound() || p.Capacity["success"] != 4096 || st.MemoryLimit != 0 {
			t.Errorf("status %+v", st)
		}
		page, err := c.List(control.Filter{Limit: control.MaxPage})
		if err != nil || len(page.Answers) != 50*(i+1) {
			t.Errorf("%d answers in the list: %v", len(page.Answers), err)
		}
		sorted, err := c.List(control.Filter{Limit: control.MaxPage, Sort: "name", Records: true})
		if err != nil || len(sorted.Answers) != 50*(i+1) {
			t.Errorf("%d answers in order: %v", len(sorted.Answers), err)
		}
		for _, answer := range sorted.Answers {
			if got := strings.Join(answer.Records, " "); !strings.Contains(got, blocks[i].up.address) && !strings.Contains(got, strings.ReplaceAll(blocks[i].up.address, ".", "")) {
				t.Errorf("block %s lists %s", blocks[i].name, got)
			}
		}
		for _, qtype := range []uint16{0, dns.TypeA} {
			if found, err := c.Lookup(names[0], qtype); err != nil || len(found) != 1 {
				t.Errorf("%d answers: %v", len(found), err)
			}
		}
		var dump bytes.Buffer
		if n, err := c.Dump(&dump, false); err != nil || n != 50*(i+1) {
			t.Errorf("a dump of %d answers: %v", n, err)
		}
	}
	if n, err := a.Flush(control.Filter{}); err != nil || n != 50 {
		t.Errorf("%d flushed: %v", n, err)
	}
	if a, b := all[0].store.total(), all[1].store.total(); a != 0 || b != 100 {
		t.Errorf("after the flush of one block: %d and %d entries", a, b)
	}
	asked := blocks[1].up.asked.Load()
	blocks[1].is(t, all[1], []string{"deep.below.no-1.example.org."})
	if blocks[1].up.asked.Load() != asked {
		t.Error("the other block has lost its cut")
	}
	blocks[0].is(t, all[0], []string{"deep.below.no-1.example.org."})
	if blocks[0].up.asked.Load() != 51 {
		t.Error("a flushed denial cuts")
	}
}

func (b controlBlock) mustStatus(t *testing.T) control.Status { t.Helper(); return b.Status() }

// Over each kind of reload, each block keeps its own answers, and asks for none again.
func TestPoolOverReloads(t *testing.T) {
	base := pooledOptions(2048)
	alone := base
	alone.pooled = poolOptions{}
	alone.maxMemory = 3 << 20
	change := func(f func(*options)) options {
		o := base
		f(&o)
		return o
	}
	for name, tc := range map[string]struct {
		before, after options
		from, to      string // blocks
		same          bool   // the pool stays
	}{
		"nothing changes":  {base, base, "a b c", "a b c", true},
		"another order":    {base, base, "a b c", "c a b", true},
		"what is shown":    {base, change(func(o *options) { o.keepTTL = true }), "a b c", "a b c", true},
		"another size":     {base, change(func(o *options) { o.pooled.size = 2 << 20 }), "a b c", "a b c", false},
		"another name":     {base, change(func(o *options) { o.pooled.name = "other" }), "a b c", "a b c", false},
		"other TTLs":       {base, change(func(o *options) { o.success.maxTTL = 7200e9 }), "a b c", "a b c", false},
		"stale":            {base, change(func(o *options) { o.stale.upTo = 3600e9 }), "a b c", "a b c", false},
		"subnets":          {base, change(func(o *options) { o.ecs = ecsOptions{ecsScoped, 10} }), "a b c", "a b c", false},
		"a block comes":    {base, base, "a b", "a b c", false},
		"a block goes":     {base, base, "a b c", "a c", false},
		"the pool begins":  {alone, base, "a b c", "a b c", false},
		"it is given up":   {base, alone, "a b c", "a b c", false},
		"only one is left": {base, base, "a b c", "b", false},
	} {
		t.Run(name, func(t *testing.T) {
			if raceEnabled && name != "nothing changes" && name != "another size" && name != "a block goes" {
				return // the others take no other locks
			}
			names := reloadNames(200)
			members := make(map[string]*testBlock)
			for _, m := range membersOf("a b c", base) {
				members[m.name] = m
			}
			pick := func(names string, o options) (all []*testBlock) {
				for _, name := range strings.Split(names, " ") {
					m := *members[name]
					m.options = o
					all = append(all, &m)
				}
				return all
			}
			blocks := pick(tc.from, tc.before)
			all := corefile(t, blocks)
			for i, m := range blocks {
				m.is(t, all[i], names)
			}
			last := all[0].store.pool
			asked := make(map[string]int64)
			for _, m := range members {
				asked[m.name] = m.up.asked.Load()
			}
			for round, now := range []struct {
				names string
				options
			}{{tc.to, tc.after}, {tc.to, tc.after}, {tc.from, tc.before}} {
				blocks := pick(now.names, now.options)
				all = corefile(t, blocks, all...)
				if same := all[0].store.pool == last; same != (tc.same || round == 1) && round < 2 && now.pooled.name != "" {
					t.Errorf("round %d: the same pool: %v", round, same)
				}
				last = all[0].store.pool
				for i, m := range blocks {
					if !strings.Contains(tc.from, m.name) {
						continue
					}
					m.is(t, all[i], names)
					if was := asked[m.name]; m.up.asked.Load() != was && (round < 2 || strings.Contains(tc.to, m.name)) {
						t.Errorf("round %d, block %s: %d upstream queries", round, m.name, m.up.asked.Load()-was)
					}
				}
				checkStore(t, all[0].store)
			}
		})
	}
}

// Blocks that say same have the same answers, also over reloads, and with the others of the pool they have none in common.
func TestPoolSame(t *testing.T) {
	t.Parallel()
	blocks := membersOf("a b c", pooledOptions(2048))
	blocks[0].pooled.same, blocks[2].pooled.same = true, true
	all := corefile(t, blocks)
	names := reloadNames(100)
	blocks[0].is(t, all[0], names)
	blocks[1].is(t, all[1], names)
	same := *blocks[2]
	same.up = blocks[0].up // what it serves is what the other has asked for
	for round := range 3 {
		same.is(t, all[2], names)
		if blocks[2].up.asked.Load() != 0 || blocks[0].up.asked.Load() != 100 || blocks[1].up.asked.Load() != 100 {
			t.Fatalf("round %d: asked %d, %d and %d", round, blocks[0].up.asked.Load(), blocks[1].up.asked.Load(), blocks[2].up.asked.Load())
		}
		if p := (controlBlock{all[2]}).Status().Pools["node"]; p.Blocks != 2 || !p.Same || p.Entries["success"] != 100 || p.Capacity["success"] != 4096 {
			t.Errorf("round %d: %+v", round, p)
		}
		for _, m := range blocks {
			m.pooled.size -= int64(round%2) << 20
		}
		all = corefile(t, blocks, all...)
	}
	// Without the first one, the other keeps the answers.
	all = corefile(t, blocks[1:], all...)
	same.is(t, all[1], names)
	if n := blocks[2].up.asked.Load(); n != 0 {
		t.Errorf("%d upstream queries", n)
	}
}

// Each block's file has its own answers.
func TestPoolSnapshots(t *testing.T) {
	blocks := membersOf("a b", pooledOptions(2048))
	dir := t.TempDir()
	for _, m := range blocks {
		m.file.path = filepath.Join(dir, m.name)
	}
	all := corefile(t, blocks)
	names := reloadNames(100)
	for i, m := range blocks {
		m.is(t, all[i], names)
		if err := all[i].snapshotter.saveNow(all[i]); err != nil {
			t.Fatal(err)
		}
		if n := all[i].snapshotter.entries.Load(); n != 100 {
			t.Errorf("block %s: a snapshot of %d answers", m.name, n)
		}
	}
	for _, h := range all {
		h.stop()
	}
	for _, m := range blocks {
		m.name += " anew" // it has no predecessor
	}
	all = corefile(t, blocks)
	for i, m := range blocks {
		m.is(t, all[i], names)
		if n := m.up.asked.Load(); n != 100 {
			t.Errorf("block %s: %d upstream queries", m.name, n-100)
		}
	}
}

// A pool that is closed holds no memory, whoever still refers to it, and does nobody harm.
func TestClosedPoolGivesItsMemoryBack(t *testing.T) {
	t.Parallel()
	blocks := membersOf("a b", pooledOptions(2048))
	all := corefile(t, blocks)
	names := reloadNames(200)
	for i, m := range blocks {
		m.is(t, all[i], names)
	}
	st := all[0].store
	all[0].stop()
	if st.shards[0].policy.nodes == nil {
		t.Fatal("the other block has lost its memory")
	}
	blocks[1].is(t, all[1], names)
	all[1].stop()
	for i := range st.shards {
		p := &st.shards[i].policy
		if p.nodes != nil || p.classes[record.Success].sketch != nil || p.classes[record.Denial].ghost != nil {
			t.Error("the policy has memory")
		}
	}
	st.remember(1, record.Success)
	if st.usage(); st.total() != 0 {
		t.Errorf("%d entries", st.total())
	}
	blocks[0].is(t, all[0], names[:10]) // requests under way
	controlBlock{all[0]}.mustStatus(t)
}

// Queries of all blocks go on while reloads resize the pool, and nobody gets an answer of another block.
func TestPoolUnderLoad(t *testing.T) {
	blocks := membersOf("a b c", pooledOptions(1024))
	all := corefile(t, blocks)
	names := reloadNames(600)
	var serving [3]atomic.Pointer[Optcache]
	for i := range all {
		serving[i].Store(all[i])
	}
	var over atomic.Bool
	var wg sync.WaitGroup
	for i, m := range blocks {
		own := *m
		wg.Go(func() {
			for !over.Load() && !t.Failed() {
				own.is(t, serving[i].Load(), names)
			}
		})
	}
	for round := range 6 {
		for _, m := range blocks {
			m.pooled.size = int64(2+round%2) << 20
		}
		next := corefile(t, blocks, all...)
		for i := range next {
			serving[i].Store(next[i])
		}
		all = next
	}
	over.Store(true)
	wg.Wait()
	checkStore(t, all[0].store)
}

// Blocks of one pool that contradict each other are refused, with the place of both.
func TestPoolContradictions(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		option string
		change func(*options)
		want   string // "": no contradiction
	}{
		{"pool SIZE", func(o *options) { o.pooled.size = 1 << 20 }, "Corefile:9 - pool SIZE: 1048576 bytes contradicts the"},
		{"hot_cache_percentage", func(o *options) { o.hotPercentage = hotAuto }, "Corefile:9 - hot_cache_percentage: auto contradicts the 10 of another block of pool \"node\", Corefile:3"},
		{"hot_cache_promotion_threshold", func(o *options) { o.promotionThreshold = 9 }, "Corefile:9 - hot_cache_promotion_threshold: 9 contradicts"},
		{"cache_line_optimization", func(o *options) { o.lineAligned = false }, "Corefile:9 - cache_line_optimization: false contradicts the true"},
		{"success", func(o *options) { o.success.maxTTL = 7 * time.Second }, ""},
		{"serve_stale", func(o *options) { o.stale.upTo = time.Hour }, ""},
	} {
		o := pooledOptions(2048)
		p := &poolSpec{name: "node"}
		if err := p.add(newOptcache(o), map[string]string{"pool": "Corefile:2", tc.option: "Corefile:3"}, nil); err != nil {
			t.Fatal(err)
		}
		tc.change(&o)
		err := p.add(newOptcache(o), map[string]string{"pool": "Corefile:8", tc.option: "Corefile:9"}, nil)
		if tc.want == "" {
			if err != nil {
				t.Errorf("%s: %v", tc.option, err)
			}
			continue
		}
		wantWords(t, err, tc.want)
	}
	for option, change := range map[string]func(*options){
		"success":     func(o *options) { o.success.maxTTL = 7 * time.Second },
		"denial":      func(o *options) { o.denial.except = []string{"."} },
		"servfail":    func(o *options) { o.servfail = time.Second },
		"serve_stale": func(o *options) { o.stale.upTo = time.Hour },
		"optcache":    func(o *options) { o.zones = []string{"example.org."} },
	} {
		o := pooledOptions(2048)
		o.pooled.same = true
		p := &poolSpec{name: "node"}
		if err := p.add(newOptcache(o), map[string]string{"pool": "Corefile:2"}, nil); err != nil {
			t.Fatal(err)
		}
		change(&o)
		err := p.add(newOptcache(o), map[string]string{"pool": "Corefile:8", option: "Corefile:9"}, nil)
		wantWords(t, err, "Corefile:9 - pool: "+option+" is not as in Corefile:2,the same answers")
	}
}

// A block that gives no value has that of the others, whichever comes first.
func TestPoolTakesWhatOneBlockSays(t *testing.T) {
	t.Parallel()
	o := pooledOptions(2048)
	o.pooled.size = 0
	p := &poolSpec{name: "node"}
	says := o
	says.pooled.size, says.hotPercentage = 16<<20, 20
	for i, at := range []map[string]string{{"pool": "Corefile:2"}, {"pool": "Corefile:5", "pool SIZE": "Corefile:5", "hot_cache_percentage": "Corefile:6"}, {"pool": "Corefile:9"}} {
		if err := p.add(newOptcache([]options{o, says, o}[i]), at, func() bool { return true }); err != nil {
			t.Fatal(err)
		}
	}
	alone := says
	alone.success.capacity, alone.denial.capacity, alone.maxMemory, alone.pooled = 3*2048, 3*2048, 16<<20, poolOptions{}
	want := plan(&alone)
	want.owners, want.traits = 3, traits{}
	if got := p.sizes(); got.entries() != want.entries() || got.hotSets != want.hotSets || got.shards != want.shards {
		t.Errorf("%+v, want as %+v", got, want)
	}
}
