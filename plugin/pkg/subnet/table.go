package subnet

import (
	"cmp"
	"slices"
	"sync"
	"sync/atomic"
)

// Table knows the records that are for a prefix: of which name they are, their shapes, and how large they are. It bounds how many a
// name has, how many there are, and how many bytes they have. All methods are safe for concurrent use.
//
// Names and records are known by hashes of 64 bits with a random seed. A record that is gone may still be in the table; it makes
// room for others first.
type Table struct {
	buckets []atomic.Pointer[name] // by the hash of the name; readers follow the lists without a lock

	mu      sync.Mutex // held by writers; it guards what follows, and the entries of names
	hand    *name      // the name that the next record is taken from when there are too many; nil if there is none
	records int
	names   int // that have records
	bytes   int64

	perName  int
	most     int
	maxBytes int64
}

// name is a name that has records.
type name struct {
	hash    uint64
	next    atomic.Pointer[name] // in its bucket
	shapes  atomic.Pointer[[]Shape]
	entries []entry // the oldest first

	before, after *name // in the ring of all names
}

// entry is a record.
type entry struct {
	hash  uint64
	bytes uint32
	shape Shape
}

// entryBytes bounds the memory of a table for each record, its bucket included. A name with one record takes most.
const entryBytes = 144

// Memory returns how many bytes a table of so many records takes at the most.
func Memory(records int) int64 { return int64(records) * entryBytes }

// NewTable returns a table for so many records of a name, records in all, and bytes that these have.
func NewTable(perName, records int, bytes int64) *Table {
	return &Table{buckets: make([]atomic.Pointer[name], buckets(records)), perName: perName, most: max(records, 1), maxBytes: bytes}
}

// Len returns how many records the table has.
func (t *Table) Len() int {
	_, n := t.Lens()
	return n
}

// Lens returns how many names have records, and how many there are.
func (t *Table) Lens() (names, records int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.names, t.records
}

func (t *Table) bucket(hash uint64) *atomic.Pointer[name] {
	return &t.buckets[hash&uint64(len(t.buckets)-1)]
}

// find returns a name, or nil.
func (t *Table) find(hash uint64) *name {
	for n := t.bucket(hash).Load(); n != nil; n = n.next.Load() {
		if n.hash == hash {
			return n
		}
	}
	return nil
}

// Shapes returns the shapes of the records of a name, the longest first. The caller must not change them. Shapes takes no lock, and
// allocates nothing.
func (t *Table) Shapes(of uint64) []Shape {
	if n := t.find(of); n != nil {
		return *n.shapes.Load()
	}
	return nil
}

// aged is how many of the oldest records of a name are looked at when one has to go.
const aged = 8

// Add adds a record of a name, or notes that it is new. It returns the records that have to go for it; the first few, own, go because
// their name has as many as it may have. worth says how much a record is worth: how often it was asked for, or below 0 if it is gone.
// Add calls worth with the table locked.
func (t *Table) Add(of uint64, s Shape, record uint64, bytes int, worth func(record uint64) int) (out []uint64, own int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	n := t.find(of)
	if n != nil {
		if at := slices.IndexFunc(n.entries, func(e entry) bool { return e.hash == record }); at >= 0 {
			t.take(n, at)
		}
		for len(n.entries) >= t.perName {
			out = append(out, t.evict(n, worth))
		}
		own = len(out)
	}
	for t.records > 0 && (t.records >= t.most || t.bytes+int64(bytes) > t.maxBytes) {
		victim := t.hand
		t.hand = victim.after
		out = append(out, t.evict(victim, worth))
	}
	if n == nil || t.find(of) == nil { // new, or without records for a moment
		n = &name{hash: of}
		n.shapes.Store(new([]Shape))
		head := t.bucket(of)
		n.next.Store(head.Load())
		n.entries = append(n.entries, entry{record, uint32(bytes), s})
		n.reshape()
		head.Store(n)
		t.join(n)
	} else {
		n.entries = append(n.entries, entry{record, uint32(bytes), s})
		n.reshape()
	}
	t.records++
	t.bytes += int64(bytes)
	return out, own
}

// evict takes the least worthy of the oldest records of a name out of the table. Those that stay have another round.
func (t *Table) evict(n *name, worth func(uint64) int) (record uint64) {
	oldest := min(aged, len(n.entries))
	least, at := worth(n.entries[0].hash), 0
	for i := 1; i < oldest && least >= 0; i++ {
		if w := worth(n.entries[i].hash); w < least {
			least, at = w, i
		}
	}
	record = n.entries[at].hash
	if least >= 0 {
		var again [aged]entry
		copy(again[:], n.entries[:oldest])
		rest := copy(n.entries, n.entries[oldest:])
		copy(n.entries[rest:], again[:oldest])
		at += rest
	}
	t.take(n, at)
	return record
}

// take takes a record of a name out of the table, and the name with its last one.
func (t *Table) take(n *name, at int) {
	t.records--
	t.bytes -= int64(n.entries[at].bytes)
	n.entries = slices.Delete(n.entries, at, at+1)
	n.reshape()
	if len(n.entries) > 0 {
		return
	}
	t.leave(n)
	link := t.bucket(n.hash)
	for link.Load() != n {
		link = &link.Load().next
	}
	link.Store(n.next.Load())
}

// join puts a name into the ring, where it will be the last that the hand comes to.
func (t *Table) join(n *name) {
	t.names++
	if t.hand == nil {
		t.hand, n.before, n.after = n, n, n
		return
	}
	n.before, n.after = t.hand.before, t.hand
	n.before.after, n.after.before = n, n
}

// leave takes a name out of the ring.
func (t *Table) leave(n *name) {
	t.names--
	if n.after == n {
		t.hand = nil
		return
	}
	n.before.after, n.after.before = n.after, n.before
	if t.hand == n {
		t.hand = n.after
	}
}

// reshape brings the shapes of a name up to date.
func (n *name) reshape() {
	var shapes []Shape
	for _, e := range n.entries {
		if !slices.Contains(shapes, e.shape) {
			shapes = append(shapes, e.shape)
		}
	}
	slices.SortFunc(shapes, func(a, b Shape) int {
		return cmp.Or(cmp.Compare(b.Length, a.Length), cmp.Compare(b.Scope, a.Scope), cmp.Compare(a.Family, b.Family))
	})
	if !slices.Equal(shapes, *n.shapes.Load()) {
		n.shapes.Store(&shapes)
	}
}

// Take adds the records of another table, as far as there is room: those of a store whose records will move. own returns the hash
// that a record will have.
func (t *Table) Take(other *Table, own func(record uint64) uint64) {
	other.mu.Lock()
	defer other.mu.Unlock()
	none := func(uint64) int { return 0 }
	for i := range other.buckets {
		for n := other.buckets[i].Load(); n != nil; n = n.next.Load() {
			for _, e := range n.entries {
				t.Add(n.hash, e.shape, own(e.hash), int(e.bytes), none)
			}
		}
	}
}
