package optcache

import (
	"fmt"
	"math"
	"slices"
	"strconv"

	"github.com/optcache/optcache/plugin/pkg/arg"
	"github.com/optcache/optcache/plugin/pkg/record"
)

// This file is about blocks of a Corefile that share their memory: the option pool. It gathers the blocks while the Corefile is
// read, and lays out one pool for all of them when the first one starts. Each block has a store of its own in the pool, and so
// its own answers. Blocks that say same have one store, and so the same answers. The pool itself is in store.go.
//
// A reload uses the pool of before if all its blocks are there, with what their stores depend on, and no other. Otherwise there is
// a new pool, and the answers of each block move there as they move to a new store.

// poolOptions are the options of pool.
type poolOptions struct {
	name string // ""; the block has its memory for itself
	size int64  // bytes for all blocks of the pool; 0: derived from their capacities
	auto bool   // size is only the most, and the capacities may ask for less
	same bool   // the blocks of the pool that say so have the same answers
}

// poolArgs reads NAME [SIZE|N%|auto] [same].
func (b *corefileBlock) poolArgs() error {
	words, err := arg.All(b.Controller, 1, 3)
	if err != nil {
		return err
	}
	p := &b.pooled
	p.name, words = words[0], words[1:]
	if looksLikeNumber(p.name) || p.name == "auto" {
		return b.Errf("pool: the name is missing before %q", p.name)
	}
	if n := len(words); n > 0 && words[n-1] == "same" {
		p.same, words = true, words[:n-1]
	}
	if len(words) > 1 {
		return b.Errf("pool: %q is not same", words[1])
	}
	for _, word := range words {
		b.at["pool SIZE"] = b.here()
		if p.size, p.auto, err = memorySize(b.Controller, "pool SIZE", word); err != nil {
			return err
		}
	}
	return nil
}

// poolSpec is a pool of a Corefile. Blocks are read and started one after the other, so that it needs no lock.
type poolSpec struct {
	name    string
	members []*poolMember
	merged  options // of all members: see add
	checked bool    // the machine has been looked at

	pool   *pool  // once the first member has started
	common *store // of the members that say same, once one of them has started
}

// poolMember is a block of a pool.
type poolMember struct {
	*poolSpec
	o     *Optcache
	at    map[string]string // place of the block, and of each option that it gives
	ready func() bool       // sets the identity of o, and reports whether the block has a server
}

// poolSpecs are the pools of a Corefile, by name.
type poolSpecs map[string]*poolSpec

func (poolSpecs) key() string { return pluginName + " pools" }

// joinPool makes the block that has been read a member of its pool. It returns an error if the block contradicts another one of
// the pool.
func (b *corefileBlock) joinPool(o *Optcache, ready func() bool) error {
	pools, _ := b.Get(poolSpecs{}.key()).(poolSpecs)
	if pools == nil {
		pools = make(poolSpecs)
		b.Set(pools.key(), pools)
	}
	p := pools[o.pooled.name]
	if p == nil {
		p = &poolSpec{name: o.pooled.name}
		pools[p.name] = p
	}
	return p.add(o, b.at, ready)
}

// agreed are the options that all blocks of a pool have alike. A block that does not give one has that of the others.
var agreed = []struct {
	name string
	text func(*options) string
	take func(to, from *options)
}{
	{"pool SIZE", func(o *options) string { return strconv.FormatInt(o.pooled.size, 10) + " bytes" }, func(to, from *options) { to.pooled = from.pooled }},
	{"hot_cache_percentage", func(o *options) string {
		if o.hotPercentage == hotAuto {
			return "auto"
		}
		return strconv.Itoa(o.hotPercentage)
	}, func(to, from *options) { to.hotPercentage = from.hotPercentage }},
	{"hot_cache_promotion_threshold", func(o *options) string { return strconv.Itoa(o.promotionThreshold) }, func(to, from *options) { to.promotionThreshold = from.promotionThreshold }},
	{"cache_line_optimization", func(o *options) string { return strconv.FormatBool(o.lineAligned) }, func(to, from *options) { to.lineAligned = from.lineAligned }},
}

// differs returns the name of an option by which two blocks that say same would not have the same answers, or "".
func (o *options) differs(other *options) string {
	for _, of := range []struct {
		name string
		same bool
	}{
		{pluginName, slices.Equal(o.zones, other.zones)},
		{"success", o.success.same(&other.success)},
		{"denial", o.denial.same(&other.denial)},
		{"servfail", o.servfail == other.servfail && o.servfailMost == other.servfailMost},
		{"serve_stale", o.stale.upTo == other.stale.upTo},
		{"serve_stale_policy", o.stale.preferPositive == other.stale.preferPositive},
		{"nxdomain_cut", o.cut.on == other.cut.on},
		{"ecs", o.ecs == other.ecs},
		{"denial_without_soa", o.withoutSOA == other.withoutSOA},
		{"pool", o.sameAnswers(other)},
	} {
		if !of.same {
			return of.name
		}
	}
	return ""
}

// add adds a member, and checks it against the others.
func (p *poolSpec) add(o *Optcache, at map[string]string, ready func() bool) error {
	m := &poolMember{poolSpec: p, o: o, at: at, ready: ready}
	place := func(of *poolMember, option string) string {
		if at := of.at[option]; at != "" {
			return at
		}
		return of.at["pool"]
	}
	if len(p.members) == 0 {
		p.merged = o.options
		p.merged.maxMemory, p.merged.memoryAuto = 0, false
		p.merged.success.capacity, p.merged.denial.capacity = 0, 0
	}
	for _, of := range agreed {
		if at[of.name] == "" {
			continue
		}
		i := slices.IndexFunc(p.members, func(other *poolMember) bool { return other.at[of.name] != "" })
		if i < 0 {
			of.take(&p.merged, &o.options)
			continue
		}
		if mine, its := of.text(&o.options), of.text(&p.members[i].o.options); mine != its {
			return fmt.Errorf("%s - %s: %s contradicts the %s of another block of pool %q, %s", at[of.name], of.name, mine, its, p.name, p.members[i].at[of.name])
		}
	}
	first := p.alike()
	if o.pooled.same && first != nil {
		if name := o.differs(&first.o.options); name != "" {
			return fmt.Errorf("%s - pool: %s is not as in %s, so that the blocks of pool %q cannot have the same answers", place(m, name), name, place(first, name), p.name)
		}
	}
	if !o.pooled.same || first == nil { // blocks with the same answers have room for them once
		for to, n := range map[*int]int{&p.merged.success.capacity: o.success.capacity, &p.merged.denial.capacity: o.denial.capacity} {
			*to = int(min(int64(*to)+int64(n), math.MaxInt32))
		}
	}
	p.merged.maxMemory, p.merged.memoryAuto = p.merged.pooled.size, p.merged.pooled.auto
	p.merged.prefetch.amount = max(p.merged.prefetch.amount, o.prefetch.amount)
	p.merged.ecs.most = max(p.merged.ecs.most, o.ecs.most)
	p.merged.stale.recheck = max(p.merged.stale.recheck, o.stale.recheck)
	p.members = append(p.members, m)
	if p.owners() > record.Owners {
		return fmt.Errorf("%s - pool: %q has more than %d blocks", at["pool"], p.name, record.Owners)
	}
	o.member = m
	return nil
}

// bounds returns the options that the memory of the instance is laid out for. It does so once for a pool, and then returns nil.
func (o *Optcache) bounds() *options {
	switch {
	case o.member == nil:
		return &o.options
	case o.member.checked:
		return nil
	}
	o.member.checked = true
	return &o.member.merged
}

// alike returns the first member that says same, or nil.
func (p *poolSpec) alike() *poolMember {
	for _, m := range p.members {
		if m.o.pooled.same {
			return m
		}
	}
	return nil
}

// storing yields a member for each store of the pool.
func (p *poolSpec) storing() (all []*poolMember) {
	first := p.alike()
	for _, m := range p.members {
		if !m.o.pooled.same || m == first {
			all = append(all, m)
		}
	}
	return all
}

func (p *poolSpec) owners() int { return len(p.storing()) }

// sizes lays out the memory of the pool.
func (p *poolSpec) sizes() sizes {
	var cuts, failing int
	for _, m := range p.storing() {
		cuts += ones(m.o.cut.on)
		failing += ones(m.o.backsOff())
	}
	return planFor(&p.merged, p.owners(), cuts, failing)
}

// open returns the pool: that of before a reload if nothing has changed that it depends on, or a new one.
func (p *poolSpec) open() (*pool, error) {
	if p.pool != nil {
		return p.pool, nil
	}
	p.members = slices.DeleteFunc(p.members, func(m *poolMember) bool { return !m.ready() })
	z := p.sizes()
	if p.pool = p.kept(z); p.pool != nil {
		return p.pool, nil
	}
	var err error
	if p.pool, err = newPool(z); err == nil {
		p.pool.name = p.name
	}
	return p.pool, err
}

// kept returns the pool of before the reload if it has these sizes, and each store of it is that of a block which goes on using
// it. Otherwise it returns nil.
func (p *poolSpec) kept(z sizes) (kept *pool) {
	of := make(map[*store]*poolMember)
	for m, from := range instances.foreseen(p.members) {
		if from == nil || !from.keepsFor(m.o, p.name, z) {
			return nil
		}
		st := from.store
		if kept == nil {
			kept = st.pool
		}
		other := of[st]
		if st.pool != kept || other != nil && !(other.o.pooled.same && m.o.pooled.same) {
			return nil
		}
		of[st] = m
	}
	if kept == nil || len(of) != p.owners() || len(of) != len(kept.all()) {
		return nil
	}
	return kept
}

// keepsFor reports whether o, in a pool of that name and these sizes, may go on using the store of its predecessor from.
func (from *Optcache) keepsFor(o *Optcache, name string, z sizes) bool {
	st := from.store
	return st.pool.name == name && st.sizes == z && st.traits == z.traitsOf(&o.options) && from.sameAnswers(&o.options)
}
