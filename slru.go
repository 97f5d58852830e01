package optcache

import (
	"github.com/optcache/optcache/plugin/pkg/climber"
	"github.com/optcache/optcache/plugin/pkg/record"
	"github.com/optcache/optcache/plugin/pkg/sketch"
)

// This file is the eviction policy. It decides which entries stay. It is plain code on hashes and counters, without locks,
// clocks or I/O. The shard that owns the policy (shard.go) holds its lock for each call. The policy knows nothing of
// records and their memory.
//
// A new entry enters the window, and stays there for a while. An entry that falls out of the window enters a contest with
// the victim of the main part. The entry that was asked for more often stays; a sketch of the recent past estimates that.
// The main part is a segmented LRU (Karedla, Love, Wherry: Caching strategies to improve disk system performance, 1994)
// with a probationary and a protected segment. All this is W-TinyLFU (Einziger, Friedman, Manes: TinyLFU: a highly
// efficient cache admission policy, 2017), with four differences:
//
//   - A hit moves nothing, because that would take a lock. A hit raises an access count. The policy looks at the count when
//     it needs a victim. An entry that was asked for since the last look gets another round or moves up. The others move
//     down or out. This is as in CLOCK.
//   - Entries die. An entry is dead when it has expired and may no longer be served stale. Dead entries go first, before any
//     contest. A popular name with a short TTL would then lose its segment each time. So a ghost entry keeps the hash of a
//     dead entry that was protected or hot. When an entry with that hash returns, it is protected at once.
//   - The best size of the window depends on the traffic. Package climber finds it.
//   - Heavy entries take the memory of many others, so they have a segment of their own. A heavy entry competes with all
//     entries that it would displace, by how often these were asked for together (after AV in Einziger, Eytan, Friedman,
//     Manes: Lightweight robust size aware cache management, 2022). The shard decides how much memory the segment has.

// segment is the list that a node of the policy is in.
type segment uint8

const (
	free segment = iota
	window
	probationary
	protected
	heavy
	segments
)

const (
	// protectedShare is the share of the main part that may be protected, per cent.
	protectedShare = 80

	// maxMoves bounds the nodes that the policy looks at to find one victim. When all of them have been accessed since the
	// last look, the next node is the victim nevertheless.
	maxMoves = 64

	// sweep is the number of nodes that the policy looks at for a dead entry at each eviction. With 16, dead entries are
	// found about as fast as they die. In measurements, 8 cost 0.1 points of hit ratio, and 32 gained nothing.
	sweep = 16

	// ageing is the number of nodes whose access counts are taken at each insert, even when nothing is evicted. A count
	// that has stopped at its limit then starts anew. So an entry that has become popular can enter the hot tier, and an
	// entry that is no longer popular leaves it.
	ageing = 2

	// heavyLooks is the number of heavy entries that the policy looks at to find a victim for an entry of usual size.
	heavyLooks = 8
)

// none stands for no node, and for no slot of the index.
const none = ^uint32(0)

// node is the policy's view of one entry.
type node struct {
	prev, next uint32 // neighbours in the segment; next is the older one
	slot       uint32 // the entry's slot in the index, or none
	expires    uint32 // second on the store's clock after which the entry is dead
	hash       uint32 // the upper half of the key's hash
	segment    segment
	class      record.Class
	hot        bool // the hot tier has a copy
	touched    bool // an access was taken from the counts since accessed was called last
}

// memoryBytes is the memory that the policy takes for the history of one key, in bytes: a share of the sketch and a ghost
// entry.
const memoryBytes = 8 + ghostBytes

const nodeBytes, ghostBytes = 24, 4

// list is a segment of one class: a list from the youngest to the oldest node.
type list struct {
	head, tail uint32
	n          int
}

// accessCounts is what the policy needs of the entries behind its nodes.
type accessCounts interface {
	// takeAccessed returns the number of requests for the entry since the last call, up to where its count stops, and
	// sets the count to 0.
	takeAccessed(n *node) int

	// moved is called after the entry has entered the segment n.segment from another one.
	moved(n *node, from segment)
}

// slru is the policy of one shard.
type slru struct {
	nodes   []node
	freed   uint32 // first node of the list of free nodes, linked by next
	hand    uint32 // node that the sweep for dead entries looked at last
	ager    uint32 // node that ageing looked at last
	classes [record.Classes]classState
	most    int // entries of both classes together
	counts  accessCounts
	climber *climber.Climber
	frozen  bool // nothing ages: entries of another store or a snapshot move in, and could get no request meanwhile
}

// classState is what the policy keeps for one class of answers.
type classState struct {
	segments [segments]list
	capacity int // entries
	room     int // entries of usual size at the last search for a victim; less than capacity if memory is full first
	sketch   *sketch.Sketch
	ghost    ghost
}

func newSLRU(capacity [record.Classes]int, l accessCounts, c *climber.Climber) slru {
	p := slru{freed: none, counts: l, climber: c}
	for i := range p.classes {
		d := &p.classes[i]
		for s := range d.segments {
			d.segments[s] = list{head: none, tail: none}
		}
		d.capacity, d.room = capacity[i], capacity[i]
		p.most += capacity[i]
		d.sketch = sketch.New(d.capacity)
		d.ghost = make(ghost, d.capacity)
	}
	return p
}

// drop empties the policy for good, and gives its memory back. It may be read afterwards, and takes no more entries.
func (p *slru) drop() {
	p.nodes, p.freed = nil, none
	for i := range p.classes {
		d := &p.classes[i]
		d.sketch, d.ghost = nil, nil
		for s := range d.segments {
			d.segments[s] = list{head: none, tail: none}
		}
	}
}

// main returns the number of probationary and protected entries, light the number of all entries of usual size, and
// entries the number of all entries.
func (d *classState) main() int    { return d.segments[probationary].n + d.segments[protected].n }
func (d *classState) light() int   { return d.segments[window].n + d.main() }
func (d *classState) entries() int { return d.light() + d.segments[heavy].n }

// full reports whether a class needs a victim before it takes another entry.
func (p *slru) full(c record.Class) bool {
	d := &p.classes[c]
	return d.entries() >= d.capacity
}

// windowSize returns how many entries of a class the window should have.
func (p *slru) windowSize(d *classState) int {
	return max(d.room*p.climber.WindowShare()/1000, 1)
}

// grow makes room for more nodes, as append would, but never for more nodes than there can be entries.
func (p *slru) grow() {
	most := p.most + int(record.Classes) // each class may have one new entry before the victim goes
	n := len(p.nodes)
	p.nodes = append(make([]node, 0, max(min(n+n/4+64, most), n+1)), p.nodes...)
}

// add makes a node for a new entry. The entry enters the window or, if it has a ghost entry, the protected segment. In the
// second case add calls moved. expires is a second on the store's clock.
func (p *slru) add(c record.Class, hash uint64, slot, expires uint32) uint32 {
	p.age()
	id := p.freed
	if id != none {
		p.freed = p.nodes[id].next
	} else {
		id = uint32(len(p.nodes))
		if len(p.nodes) == cap(p.nodes) {
			p.grow()
		}
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

// remove frees the node of an entry.
func (p *slru) remove(id uint32) {
	p.unlink(id)
	p.nodes[id].next = p.freed
	p.freed = id
}

// renew is called when an entry has been asked for and gets a new record.
func (p *slru) renew(id, expires uint32) {
	p.age()
	n := &p.nodes[id]
	n.expires = expires
	p.classes[n.class].sketch.Add(n.hash, 1)
	p.move(id, n.segment)
}

// protect moves an entry to the young end of the protected segment. While that segment has too many entries, its oldest one
// gets another round if it was accessed, and is demoted otherwise.
func (p *slru) protect(id uint32) {
	p.move(id, protected)
	d := &p.classes[p.nodes[id].class]
	l := &d.segments[protected]
	limit := (max(d.room, d.light()) - p.windowSize(d)) * protectedShare / 100
	for moves := 0; l.n > max(limit, 1); moves++ {
		tail := l.tail
		if moves < maxMoves && p.accessed(tail) {
			p.move(tail, protected)
		} else {
			p.move(tail, probationary)
		}
	}
}

// victim returns the entry of a class that should go next, or none when the class is empty. now is the current second on the
// store's clock. The caller removes the node.
func (p *slru) victim(c record.Class, now uint32) uint32 {
	if id := p.dead(c, now); id != none {
		return id
	}
	d := &p.classes[c]
	d.room = d.light()
	if d.room == 0 {
		return d.segments[heavy].tail
	}
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

// dead looks at the next few nodes for a dead entry of a class. It returns the first one, or none. It leaves a ghost entry
// if remember does. The caller removes the node.
func (p *slru) dead(c record.Class, now uint32) uint32 {
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

// remember leaves a ghost entry of a dead entry that is protected or hot.
func (p *slru) remember(n *node) {
	if n.segment == protected || n.hot {
		p.classes[n.class].ghost.put(n.hash)
	}
}

// mainVictim returns the entry that the main part would give up, or none when the main part is empty.
func (p *slru) mainVictim(d *classState, now uint32) uint32 {
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

// weigh moves an entry into the heavy segment, or from there to the window, after the size of its record has changed.
func (p *slru) weigh(id uint32, isHeavy bool) {
	switch in := p.nodes[id].segment == heavy; {
	case isHeavy && !in:
		p.move(id, heavy)
	case in && !isHeavy:
		p.move(id, window)
	}
}

// estimate returns how often a key has been asked for lately, including the request under way.
func (p *slru) estimate(c record.Class, hash uint64) int {
	return p.classes[c].sketch.Estimate(uint32(hash>>32)) + 1
}

// refused counts a request for a key whose answer is not admitted.
func (p *slru) refused(c record.Class, hash uint64) { p.classes[c].sketch.Add(uint32(hash>>32), 1) }

// rivals are the heavy entries that another heavy entry would displace.
type rivals struct {
	ids    []uint32
	worth  int // how often all of them together have been asked for
	best   int // how often the one has been asked for that was asked for most
	weight int // the memory of all of them together
}

// yield reports whether the rivals go for an entry with that frequency, the number of requests for it, and that weight, its
// memory. They go in two cases: the entry's frequency reaches the sum of theirs; or it reaches that of each of them, and
// its frequency for its weight reaches theirs. There must be at least one rival.
func (r *rivals) yield(frequency, weight int) bool {
	// The sketch counts up to 15. So with the sum alone, a large number of rivals would never yield.
	return len(r.ids) > 0 && (frequency >= r.worth || frequency >= r.best && frequency*r.weight >= r.worth*weight)
}

// rivals returns the heavy entries that would go so that amount becomes free. weight returns the memory of an entry, in the
// unit of amount. Entries that are dead at now are worth nothing. Living entries that have been asked for since the last
// look get another round, and are no rivals. If the others have less memory than amount, rivals returns none of them.
func (p *slru) rivals(c record.Class, amount int, now uint32, weight func(*node) int) (r rivals) {
	d := &p.classes[c]
	l := &d.segments[heavy]
	id := l.tail
	for range min(l.n, maxMoves) {
		n := &p.nodes[id]
		younger := n.prev
		if dead := now > n.expires; !dead && p.accessed(id) {
			p.move(id, heavy)
		} else {
			r.ids = append(r.ids, id)
			if !dead {
				frequency := d.sketch.Estimate(n.hash)
				r.worth += frequency
				r.best = max(r.best, frequency)
			}
			if r.weight += weight(n); r.weight >= amount {
				return r
			}
		}
		id = younger
	}
	return rivals{}
}

// heavyVictim returns the heavy entry that should go for an entry of usual size, or none. A heavy entry stays if it has been
// accessed since the last look, or if it is asked for more than twice as often as the other entry. rival is the hash of the
// other entry. With a rival of 0 the oldest heavy entry goes in any case.
func (p *slru) heavyVictim(c record.Class, rival uint64, now uint32) uint32 {
	d := &p.classes[c]
	l := &d.segments[heavy]
	for range min(l.n, heavyLooks) {
		id := l.tail
		if rival == 0 || now > p.nodes[id].expires || !p.accessed(id) && d.sketch.Estimate(p.nodes[id].hash) <= 2*p.estimate(c, rival) {
			return id
		}
		p.move(id, heavy)
	}
	return none
}

// accessed reports whether an entry has been asked for since the last call of accessed.
func (p *slru) accessed(id uint32) bool {
	n := &p.nodes[id]
	p.take(n)
	touched := n.touched
	n.touched = false
	return touched
}

// age takes the access counts of the next few nodes.
func (p *slru) age() {
	if p.frozen {
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

// take adds an entry's access count to the sketch, and sets the count to 0.
func (p *slru) take(n *node) {
	if count := p.counts.takeAccessed(n); count > 0 {
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
		p.counts.moved(n, from)
	}
}

// order appends all nodes to ids. The entries that matter least come first. Entries without a copy in the hot tier come
// before entries with one. Within both groups the order is: heavy, window, probationary, protected. Within a segment of a
// class the oldest come first.
func (p *slru) order(ids []uint32) []uint32 {
	for _, hot := range []bool{false, true} {
		for _, s := range [...]segment{heavy, window, probationary, protected} {
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

// ghost holds the ghost entries of a class: the hashes of dead entries that were protected or hot. It has one place for
// each entry that the class may have. Of two hashes with the same place, the later one stays. 0 is an empty place.
type ghost []uint32

func (g ghost) place(hash uint32) *uint32 {
	return &g[uint64(hash)*uint64(len(g))>>32]
}

func (g ghost) put(hash uint32) { *g.place(hash) = hash }

// take removes the ghost entry of a hash, and reports whether there was one.
func (g ghost) take(hash uint32) bool {
	p := g.place(hash)
	if *p != hash || hash == 0 {
		return false
	}
	*p = 0
	return true
}
