package optcache

import (
	"runtime"
	"slices"

	"github.com/miekg/dns"

	"github.com/optcache/optcache/plugin/pkg/arg"
	"github.com/optcache/optcache/plugin/pkg/index"
	"github.com/optcache/optcache/plugin/pkg/query"
	"github.com/optcache/optcache/plugin/pkg/record"
	"github.com/optcache/optcache/plugin/pkg/subnet"
)

// This file has answers that depend on where the client is (EDNS client subnet, RFC 7871): the option ecs. Such an answer is kept
// under a key of its own, which has the prefix that it is for. Package subnet has the prefixes, and a table that says which ones a
// name has answers for.
//
// Questions without a client subnet take no part in this.

// ecsMode says what becomes of answers that depend on the client's subnet.
type ecsMode uint8

const (
	ecsStrict ecsMode = iota // they are neither shared nor kept
	ecsScoped                // they are kept for the prefix that they are for
	ecsOff                   // they are kept for all, as by cache
)

// ecsOptions are the options of ecs.
type ecsOptions struct {
	mode ecsMode
	most int // with ecsScoped: answers of a name that are for a prefix
}

const (
	defaultSubnets, maxSubnets = 100, 10_000

	// subnetShare divides the entries of a store and its memory for records: answers that are for a prefix may take one such part.
	subnetShare = 4
)

// ecsArgs reads off | strict | scoped [MAX].
func (b *corefileBlock) ecsArgs() error {
	words, err := arg.All(b.Controller, 0, 2)
	if err != nil || len(words) == 0 {
		return err
	}
	b.ecs = ecsOptions{}
	switch words[0] {
	case "off":
		b.ecs.mode = ecsOff
	case "strict":
	case "scoped":
		b.ecs = ecsOptions{ecsScoped, defaultSubnets}
		if len(words) > 1 {
			b.ecs.most, err = arg.Number(b.Controller, "ecs scoped MAX", words[1], 1, maxSubnets)
		}
		return err
	default:
		return b.Errf("ecs: %q is neither off, strict nor scoped", words[0])
	}
	if len(words) > 1 {
		return b.Errf("ecs: unexpected %q after %s", words[1], words[0])
	}
	return nil
}

// asker is what a request says of its client's subnet. It is zero if it says nothing, or if that makes no difference.
type asker struct {
	prefix subnet.Prefix
	option *dns.EDNS0_SUBNET // of the request, which owns it
	state  query.SubnetState
}

// askerOf returns what the request r says of its client's subnet.
func (o *Optcache) askerOf(r *dns.Msg) (a asker) {
	if o.ecs.mode == ecsScoped {
		a.prefix, a.option, a.state = query.SubnetIn(r.IsEdns0())
	}
	return a
}

// lookupSubnet is lookup for a question with a client subnet. The living answer with the longest prefix is served, then one that is
// for all, then what has expired, in that order. What a question without a subnet has brought is for none but such questions:
// nobody has said whom it is for.
func (o *Optcache) lookupSubnet(s *scratch, now int64) bool {
	plain := s.Key
	plain.SetRD(o.store.seed, true)
	var second record.Key // of the best answer that is not good; Len is 0 if there is none
	try := func(k *record.Key) (good bool) {
		if s.Key = *k; !o.search(s, now) || !k.Subnet().Is() && s.Entry.Flags&record.FlagForAll == 0 {
			return false
		}
		if good = s.Entry.Good(now); !good && second.Len == 0 {
			second = s.Key
		}
		return good
	}
	for {
		for _, shape := range o.store.shapes(&plain) {
			if p, ok := s.asker.prefix.In(shape); ok {
				k := plain
				if k.SetSubnet(o.store.seed, p); try(&k) {
					return true
				}
			}
		}
		if try(&plain) {
			return true
		}
		if s.Query.RD() || !plain.RD() {
			break
		}
		plain.SetRD(o.store.seed, false)
	}
	if second.Len > 0 {
		if s.Key = second; o.search(s, now) {
			return true
		}
	}
	s.Key = plain
	return false
}

// reach says which clients a response is for.
type reach struct {
	narrow bool          // not for all
	at     subnet.Prefix // those in a prefix; none: it is not known, or it is for all
	kept   bool          // it may be kept
	flags  record.Flags  // of its record
	scope  uint8         // that the client is told
}

// reachOf returns which clients the response is for.
func (w *writer) reachOf(res *dns.Msg) reach {
	asked := &w.asker.prefix
	switch w.o.ecs.mode {
	case ecsOff:
		if query.Scoped(res) {
			return reach{kept: true, flags: record.FlagOneSubnet}
		}
		return reach{kept: true}
	case ecsStrict:
		narrow := query.Scoped(res)
		return reach{narrow: narrow, kept: !narrow}
	}
	of, scope, state := query.ScopeIn(res)
	switch {
	case state == query.NoSubnet:
		if asked.Is() {
			return reach{kept: true, flags: record.FlagForAll}
		}
		return reach{kept: true}
	case state != query.OneSubnet:
		return reach{narrow: true}
	case !asked.Is():
		return reach{narrow: scope > 0, kept: scope == 0}
	case of != *asked: // RFC 7871 section 7.3: it is of another question
		return reach{narrow: true, scope: scope}
	case asked.Family == subnet.Withheld:
		return reach{narrow: true, at: *asked, kept: true}
	case scope == 0:
		return reach{kept: true, flags: record.FlagForAll}
	}
	at := asked.Answered(scope)
	return reach{narrow: true, at: at, kept: true, scope: at.Scope}
}

// keyAt returns the key of an answer to the question of k that reaches so far.
func (o *Optcache) keyAt(k record.Key, r *reach) record.Key {
	if o.ecs.mode == ecsScoped {
		k.SetSubnet(o.store.seed, r.at)
	}
	return k
}

// flightOf returns what tells the flight of a request with a client subnet from that of others with the same key: an answer to
// others may be for other clients. Where it is not known that answers depend on the subnet, all requests with one wait for the same
// answer, and ask again if it is not for them.
func (o *Optcache) flightOf(w *writer) (t query.Traits) {
	switch {
	case !w.asker.prefix.Is():
	case w.asker.prefix.Family == subnet.Withheld, len(o.store.shapes(&w.key)) > 0:
		t.Subnet = w.traits.Subnet
	default:
		t.Subnet = "any"
	}
	return t
}

// tellScope adds the client subnet to a reply, with the SCOPE of the answer (RFC 7871 section 7.2.2).
func (a *asker) tellScope(m *dns.Msg, scope uint8) {
	if a.option == nil {
		return
	}
	o := *a.option
	o.SourceScope = scope
	opt := m.IsEdns0()
	if opt == nil { // the server copies its options to the reply's own OPT
		opt = &dns.OPT{Hdr: dns.RR_Header{Name: ".", Rrtype: dns.TypeOPT}}
		m.Extra = append(m.Extra, opt)
	}
	opt.Option = append(slices.Clip(opt.Option), &o)
}

// Why an answer that is for a prefix had to go.
const (
	forName  = iota // its name has as many as it may have
	forShare        // all of them together have as much room as they may have
	narrowEvictions
)

var narrowNames = [narrowEvictions]string{"name", "share"}

// newSubnets returns the table of a store's prefixes, or nil.
func (st *store) newSubnets() *subnet.Table {
	if st.subnets == 0 {
		return nil
	}
	return subnet.NewTable(st.subnets, st.prefixes(), st.data.Bytes()/subnetShare)
}

// prefixes returns how many answers may be for a prefix.
func (z *sizes) prefixes() int {
	if z.subnets == 0 {
		return 0
	}
	return max(z.entries()/subnetShare, 1)
}

// subnetLens returns how many names have answers for a prefix, and how many such answers are known. Some may have gone since.
func (st *store) subnetLens() (names, answers int64) {
	if st.scopes == nil {
		return 0, 0
	}
	n, all := st.scopes.Lens()
	return int64(n), int64(all)
}

// shapes returns the shapes of the prefixes that the name of k has answers for.
func (st *store) shapes(k *record.Key) []subnet.Shape {
	if st.scopes == nil {
		return nil
	}
	return st.scopes.Shapes(st.seed.Sum(k.Name()))
}

// reached notes the answer e, which has been inserted under s.Key, if it is for a prefix. The answers that have to go for it go.
// The caller holds no lock of a shard of the store.
func (st *store) reached(s *scratch, e *record.Entry, now int64) {
	p := s.Key.Subnet()
	if !p.Is() || st.scopes == nil {
		return
	}
	sh := st.shard(s.Key.Hash)
	bytes := sh.granules(e.Size) * sh.granule * record.WordBytes
	out, own := st.scopes.Add(st.seed.Sum(s.Key.Name()), p.Shape, s.Key.Hash, bytes, func(hash uint64) int { return st.worth(hash, now) })
	for i, hash := range out {
		why := forName
		if i >= own {
			why = forShare
		}
		sh := st.shard(hash)
		sh.lock(s, now)
		for id, _, ok := sh.byHash(hash); ok; id, _, ok = sh.byHash(hash) { // a key may have several, of different kinds
			sh.ev.evicted[sh.policy.nodes[id].class]++
			s.narrowed[why]++
			sh.drop(id)
		}
		sh.unlock()
	}
	runtime.KeepAlive(st) // see findOrigin
}

// worth says how often the record with that hash was asked for, as far as it is counted. It is -1 if there is none that may be served.
func (st *store) worth(hash uint64, now int64) int {
	defer runtime.KeepAlive(st) // see findOrigin
	sh := st.shard(hash)
	sh.mu.Lock()
	defer sh.mu.Unlock()
	id, e, ok := sh.byHash(hash)
	if !ok || !e.Servable(now, st.stale) {
		return -1
	}
	n := &sh.policy.nodes[id]
	return sh.policy.classes[n.class].sketch.Estimate(n.hash) + int(sh.accesses(id)) // the policy takes counts away, and adds them to the sketch
}

// byHash returns the node and the header of a record with that hash. For the writer only.
func (sh *shard) byHash(hash uint64) (id uint32, e record.Entry, ok bool) {
	if sh.holding(hash).closed {
		return 0, e, false
	}
	var cur index.Cursor
	for {
		slot, _, more := sh.index.Next(&cur, hash)
		if !more {
			return 0, e, false
		}
		if id, e = sh.at(slot); e.Hash == hash {
			return id, e, true
		}
	}
}
