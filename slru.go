package optcache

import "github.com/optcache/optcache/plugin/pkg/sketch"

// This file is the eviction policy: who stays. It is plain code on hashes and counters, without
// locks, clocks or I/O; the shard that owns it (store.go) holds its lock for every call.
//
// Newcomers enter a window, where they stay for a while whatever they are. Who falls out of it
// must win a contest against the victim of the main part: the one that has been asked for more
// often, as a sketch of the recent past estimates it, stays. The main part is a segmented LRU
// (Karedla, Love, Wherry: Caching strategies to improve disk system performance, 1994) of a
// probationary and a protected segment. Together that is W-TinyLFU (Einziger, Friedman, Manes,
// 2017), but for three things:
//
//   - A hit must not move anything, for that would take a lock. It raises a counter, which the
//     policy looks at when something has to go: who has been asked for since gets another round
//     or moves up, the others move down or out, as in CLOCK.
//   - Entries die by themselves. The dead go first, before any contest. But a popular name with a
//     short TTL would lose its standing at every expiry: of a dead entry that was protected, the
//     ghost remembers the hash, and when it comes back it is protected at once.
//   - How large the window should be depends on the traffic; climber.go finds out.

// segment is where a policy node is.
type segment uint8

const (
	free segment = iota
	window
	probationary
	protected
	segments
)

const (
	// protectedShare is the share of the main part that may be protected, per cent.
	protectedShare = 80

	// maxMoves bounds the nodes that are looked at to find one victim. When all of them have
	// been accessed since they were looked at last, the next one goes nevertheless.
	maxMoves = 64

	// sweep is how many nodes are looked at for dead ones at each eviction. At 16, the dead
	// are found about as fast as they die; 8 cost 0.1 points of hit ratio, 32 gave nothing.
	sweep = 16

	// ageing is how many nodes have their accesses taken at each insert, so that counters that
	// stopped at their top start anew, whether or not anything has to go: who is popular now
	// can then get into the hot tier, and who no longer is falls out of it.
	ageing = 2
)

// none is no node.
const none = ^uint32(0)

// node is the policy's view of one entry.
type node struct {
	prev, next uint32 // neighbours in the segment; next is the older one
	slot       uint32 // the entry's slot in the index
	expires    uint32 // second on the store's clock after which the entry is dead
	hash       uint32 // the upper half of the key's hash
	segment    segment
	class      class
	hot        bool // the hot tier has a copy
	touched    bool // has been asked for; ageing found out and took the count
}

// policyBytes is the memory that the policy takes for an entry: the node, its share of the
// sketch and its place in the ghost.
const policyBytes = nodeBytes + 8 + 4

const nodeBytes = 24

// list is a segment of one class: a list from the youngest to the oldest node.
type list struct {
	head, tail uint32
	n          int
}

// ledger is what the policy needs of the entries behind its nodes.
type ledger interface {
	// takeAccessed returns how often the entry has been asked for since the last call, as far
	// as that was counted, and starts to count anew.
	takeAccessed(n *node) int

	// moved tells that the entry has entered its segment from another one.
	moved(n *node, from segment)
}

// slru is the policy of one shard.
type slru struct {
	nodes   []node
	freed   uint32 // list of free nodes, linked by next
	hand    uint32 // node that the sweep looked at last
	ager    uint32 // node that ageing looked at last
	classes [classes]division
	ledger  ledger
	climber *climber
	still   bool // nothing ages: what comes in has been elsewhere, and nobody could ask for it meanwhile
}

// division is what the policy keeps for one class of answers.
type division struct {
	segments [segments]list
	capacity int // entries
	room     int // how many there were when the last victim was looked for: fewer than capacity, if memory is what is full
	sketch   *sketch.Sketch
	ghost    ghost
}

func newSLRU(capacity [classes]int, l ledger, c *climber) slru {
	p := slru{freed: none, ledger: l, climber: c}
	for i := range p.classes {
		d := &p.classes[i]
		for s := range d.segments {
			d.segments[s] = list{head: none, tail: none}
		}
		d.capacity, d.room = capacity[i], capacity[i]
		d.sketch = sketch.New(d.capacity)
		d.ghost = make(ghost, d.capacity)
	}
	return p
}

// main returns the number of entries outside the window, and entries that of all.
func (d *division) main() int    { return d.segments[probationary].n + d.segments[protected].n }
func (d *division) entries() int { return d.segments[window].n + d.main() }

// full reports whether a class needs a victim before it takes another entry.
func (p *slru) full(c class) bool {
	d := &p.classes[c]
	return d.entries() >= d.capacity
}

// windowSize is how many entries of a class the window should have.
func (p *slru) windowSize(d *division) int {
	return max(d.room*p.climber.windowShare()/1000, 1)
}

// add makes a node for a new entry. It enters the window or, if the ghost knows it, the protected
// segment. moved tells of the latter.
func (p *slru) add(c class, hash uint64, slot, expires uint32) uint32 {
	p.age()
	id := p.freed
	if id != none {
		p.freed = p.nodes[id].next
	} else {
		id = uint32(len(p.nodes))
		p.nodes = append(p.nodes, node{})
	}
	n := &p.nodes[id]
	*n = node{slot: slot, expires: expires, hash: uint32(hash >> 32), class: c}
	d := &p.classes[c]
	d.sketch.Add(n.hash, 1)
	p.push(id, window)
	if d.ghost.take(n.hash) {
		p.protect(id)
	}
	return id
}

// remove forgets an entry.
func (p *slru) remove(id uint32) {
	p.unlink(id)
	p.nodes[id].next = p.freed
	p.freed = id
}

// renew notes that an entry has been asked for and stored again.
func (p *slru) renew(id, expires uint32) {
	p.age()
	n := &p.nodes[id]
	n.expires = expires
	p.classes[n.class].sketch.Add(n.hash, 1)
	p.move(id, n.segment)
}

// protect moves an entry to the young end of the protected segment. What that segment has too
// much is demoted.
func (p *slru) protect(id uint32) {
	p.move(id, protected)
	d := &p.classes[p.nodes[id].class]
	l := &d.segments[protected]
	limit := (max(d.room, d.entries()) - p.windowSize(d)) * protectedShare / 100
	for moves := 0; l.n > max(limit, 1); moves++ {
		tail := l.tail
		if moves < maxMoves && p.accessed(tail) {
			p.move(tail, protected)
		} else {
			p.move(tail, probationary)
		}
	}
}

// victim returns the entry of a class that should go next, or none when the class is empty.
// now is the current second on the store's clock. The node stays where it is: the caller
// removes it.
func (p *slru) victim(c class, now uint32) uint32 {
	if id := p.dead(c, now); id != none {
		return id
	}
	d := &p.classes[c]
	d.room = d.entries()
	size := p.windowSize(d)
	for moves := 0; d.segments[window].n >= size; moves++ {
		id := d.segments[window].tail
		n := &p.nodes[id]
		switch {
		case now > n.expires:
			return id
		case moves < maxMoves && p.accessed(id):
			p.move(id, window)
			continue
		case d.main() < d.room-size:
			p.move(id, probationary)
			continue
		}
		rival := p.mainVictim(d, now)
		if rival == none {
			return id
		}
		r := &p.nodes[rival]
		if now <= r.expires && d.sketch.Estimate(n.hash) <= d.sketch.Estimate(r.hash) {
			return id
		}
		p.move(id, probationary)
		return rival
	}
	if id := p.mainVictim(d, now); id != none {
		return id
	}
	return d.segments[window].tail
}

// dead looks at the next few nodes for a dead one of a class and leaves a ghost of it.
func (p *slru) dead(c class, now uint32) uint32 {
	for range min(sweep, len(p.nodes)) {
		if p.hand++; p.hand >= uint32(len(p.nodes)) {
			p.hand = 0
		}
		n := &p.nodes[p.hand]
		if n.segment == free || n.class != c || now <= n.expires {
			continue
		}
		p.remember(n)
		return p.hand
	}
	return none
}

// remember leaves a ghost of an entry that goes for no fault of its own, if it is in good standing.
func (p *slru) remember(n *node) {
	if n.segment == protected || n.hot {
		p.classes[n.class].ghost.put(n.hash)
	}
}

// mainVictim returns the entry that the main part would give up, or none when it is empty.
func (p *slru) mainVictim(d *division, now uint32) uint32 {
	probation := &d.segments[probationary]
	for range maxMoves {
		id := probation.tail
		if id == none || now > p.nodes[id].expires || !p.accessed(id) {
			break
		}
		p.protect(id)
	}
	if probation.tail != none {
		return probation.tail
	}
	return d.segments[protected].tail
}

// accessed reports whether an entry has been asked for since this was asked last.
func (p *slru) accessed(id uint32) bool {
	n := &p.nodes[id]
	p.take(n)
	touched := n.touched
	n.touched = false
	return touched
}

// age takes the accesses of the next few nodes.
func (p *slru) age() {
	if p.still {
		return
	}
	for range min(ageing, len(p.nodes)) {
		if p.ager++; p.ager >= uint32(len(p.nodes)) {
			p.ager = 0
		}
		if n := &p.nodes[p.ager]; n.segment != free {
			p.take(n)
		}
	}
}

// take lets the sketch know of the accesses to an entry and starts to count anew.
func (p *slru) take(n *node) {
	if count := p.ledger.takeAccessed(n); count > 0 {
		p.classes[n.class].sketch.Add(n.hash, count)
		n.touched = true
	}
}

// move puts an entry at the young end of a segment.
func (p *slru) move(id uint32, to segment) {
	n := &p.nodes[id]
	from := n.segment
	p.unlink(id)
	p.push(id, to)
	if to != from {
		p.ledger.moved(n, from)
	}
}

// order appends the nodes to ids, those that matter least first: of those without a copy in the hot tier the oldest
// ones in the window, then in the probationary and the protected segment; then those with a copy.
func (p *slru) order(ids []uint32) []uint32 {
	for _, hot := range []bool{false, true} {
		for _, s := range [...]segment{window, probationary, protected} {
			for c := range p.classes {
				for id := p.classes[c].segments[s].tail; id != none; id = p.nodes[id].prev {
					if p.nodes[id].hot == hot {
						ids = append(ids, id)
					}
				}
			}
		}
	}
	return ids
}

func (p *slru) push(id uint32, s segment) {
	n := &p.nodes[id]
	l := &p.classes[n.class].segments[s]
	n.segment, n.prev, n.next = s, none, l.head
	if l.head != none {
		p.nodes[l.head].prev = id
	} else {
		l.tail = id
	}
	l.head = id
	l.n++
}

func (p *slru) unlink(id uint32) {
	n := &p.nodes[id]
	l := &p.classes[n.class].segments[n.segment]
	if n.prev != none {
		p.nodes[n.prev].next = n.next
	} else {
		l.head = n.next
	}
	if n.next != none {
		p.nodes[n.next].prev = n.prev
	} else {
		l.tail = n.prev
	}
	l.n--
	n.segment = free
}

// ghost remembers the hashes of entries that died in good standing, as many as the class has
// entries. Two that want the same place displace each other.
type ghost []uint32

func (g ghost) place(hash uint32) *uint32 {
	return &g[uint64(hash)*uint64(len(g))>>32]
}

func (g ghost) put(hash uint32) { *g.place(hash) = hash }

// take reports whether the hash is remembered, and forgets it.
func (g ghost) take(hash uint32) bool {
	p := g.place(hash)
	if *p != hash || hash == 0 {
		return false
	}
	*p = 0
	return true
}
