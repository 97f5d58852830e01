package optcache

// This file is the eviction policy: who stays. It is plain code on numbers, without locks,
// clocks or I/O; the shard that owns it (store.go) holds its lock for every call.
//
// Each class of answers has a segmented LRU of its own (Karedla, Love, Wherry: Caching
// strategies to improve disk system performance, 1994). Newcomers enter the probationary
// segment; what is asked for again is protected. A hit must not move anything, for that would
// take a lock: it raises a counter that the policy looks at when something has to go. The
// accessed entry at the tail of probation then moves up into the protected segment, the one at
// the tail of the protected segment gets another round; the others move down or out, as in
// CLOCK.

// segment is where a policy node is.
type segment uint8

const (
	free segment = iota
	probationary
	protected
	segments
)

// protectedShare is the share of a class's capacity that may be protected, per cent.
const protectedShare = 80

// maxMoves bounds the nodes that are looked at to find one victim. When all of them have been
// accessed since they were looked at last, the next one goes nevertheless.
const maxMoves = 64

// none is no node.
const none = ^uint32(0)

// node is the policy's view of one entry, 20 bytes.
type node struct {
	prev, next uint32 // neighbours in the segment; next is the older one
	slot       uint32 // the entry's slot in the index
	expires    uint32 // second on the store's clock after which the entry is dead
	segment    segment
	class      class
	hot        bool // the hot tier has a copy
}

const nodeBytes = 20

// list is a segment of one class: a list from the youngest to the oldest node.
type list struct {
	head, tail uint32
	n          int
}

// ledger is what the policy needs of the entries behind its nodes.
type ledger interface {
	// takeAccessed reports whether the entry has been asked for since the last call, and
	// starts to count anew.
	takeAccessed(n *node) bool

	// moved tells that the entry has entered its segment from another one.
	moved(n *node)
}

// slru is the policy of one shard.
type slru struct {
	nodes    []node
	freed    uint32 // list of free nodes, linked by next
	lists    [classes][segments]list
	capacity [classes]int // entries
	ledger   ledger
}

func newSLRU(capacity [classes]int, l ledger) slru {
	p := slru{freed: none, capacity: capacity, ledger: l}
	for c := range p.lists {
		for s := range p.lists[c] {
			p.lists[c][s] = list{head: none, tail: none}
		}
	}
	return p
}

// len returns the number of entries of a class.
func (p *slru) len(c class) int {
	return p.lists[c][probationary].n + p.lists[c][protected].n
}

// full reports whether a class needs a victim before it takes another entry.
func (p *slru) full(c class) bool { return p.len(c) >= p.capacity[c] }

// add makes a node for a new entry. It enters the probationary segment.
func (p *slru) add(c class, slot, expires uint32) uint32 {
	id := p.freed
	if id != none {
		p.freed = p.nodes[id].next
	} else {
		id = uint32(len(p.nodes))
		p.nodes = append(p.nodes, node{})
	}
	p.nodes[id] = node{slot: slot, expires: expires, class: c}
	p.push(id, probationary)
	return id
}

// remove forgets an entry.
func (p *slru) remove(id uint32) {
	p.unlink(id)
	p.nodes[id].next = p.freed
	p.freed = id
}

// protect moves an entry to the young end of the protected segment. What that segment has too
// much is demoted.
func (p *slru) protect(id uint32) {
	p.move(id, protected)
	p.trim(p.nodes[id].class)
}

// move puts an entry at the young end of a segment.
func (p *slru) move(id uint32, to segment) {
	n := &p.nodes[id]
	from := n.segment
	p.unlink(id)
	p.push(id, to)
	if to != from {
		p.ledger.moved(n)
	}
}

// victim returns the entry of a class that should go next, or none when the class is empty.
// now is the current second on the store's clock. The node stays where it is: the caller
// removes it.
func (p *slru) victim(c class, now uint32) uint32 {
	probation := &p.lists[c][probationary]
	for range maxMoves {
		id := probation.tail
		if id == none {
			break
		}
		n := &p.nodes[id]
		if now > n.expires || !p.ledger.takeAccessed(n) {
			return id
		}
		p.protect(id)
	}
	if probation.tail != none {
		return probation.tail
	}
	return p.lists[c][protected].tail
}

// trim demotes from the old end of the protected segment until it is within its share.
func (p *slru) trim(c class) {
	l := &p.lists[c][protected]
	limit := p.capacity[c] * protectedShare / 100
	for moves := 0; l.n > limit; moves++ {
		id := l.tail
		if moves < maxMoves && p.ledger.takeAccessed(&p.nodes[id]) {
			p.move(id, protected)
		} else {
			p.move(id, probationary)
		}
	}
}

func (p *slru) push(id uint32, s segment) {
	n := &p.nodes[id]
	l := &p.lists[n.class][s]
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
	l := &p.lists[n.class][n.segment]
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
