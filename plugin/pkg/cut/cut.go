// Package cut remembers which names are known not to exist, and which are known to exist. Below a name that does not exist,
// nothing exists (RFC 8020). The package keeps hints only, in a fixed amount of memory: a hint may be lost, may be old, and may
// be another name's. A denial says under which qtype the record lies that denies the name; the caller looks whether that record
// lives.
package cut

import (
	"hash/maphash"
	"math/bits"
	"math/rand/v2"
	"sync/atomic"
)

const (
	ways = 4 // words in a set

	minWords = 1 << 8
	maxWords = 1 << 18
)

// Words returns how many words of 8 bytes a table takes beside that many denials: a power of two.
func Words(denials int) int {
	n := max(min(denials, maxWords/2), minWords/2)
	return 1 << bits.Len(uint(2*n-1))
}

// Table is a set of hints. A word is a hint for one name: the tag of the name, and what is known of it. The words of a name are
// in one set. All methods are safe for concurrent use, take no lock, and allocate nothing.
type Table struct {
	seed  maphash.Seed
	words []atomic.Uint64
	some  atomic.Bool // a denial has been noted
}

// New returns a table of n words, a power of two.
func New(n int) *Table { return &Table{seed: maphash.MakeSeed(), words: make([]atomic.Uint64, n)} }

// Bytes returns the memory of the table.
func (t *Table) Bytes() int64 { return int64(len(t.words)) * 8 }

// A word, from the highest bit: the tag (28 bits), exists, used, denied with DO, denied without DO, the qtype of the denial with
// DO (16 bits), and the one without.
const (
	tagMask    = (1<<28 - 1) << 36
	exists     = 1 << 35
	used       = 1 << 34
	denied     = 1 << 32 // without DO; with DO, one bit higher
	denials    = denied | denied<<1
	qtypeBits  = 16
	qtypesMask = 1<<(2*qtypeBits) - 1
)

// Hint is what is known of a name.
type Hint uint64

// Exists reports whether the name is known to exist. The name may have data or only names below it.
func (h Hint) Exists() bool { return h&exists != 0 }

// Denied returns the qtype of the question whose answer denied the name. ok is false if there was none with that DO bit.
func (h Hint) Denied(do bool) (qtype uint16, ok bool) {
	return uint16(h >> (qtypeBits * index(do))), h&(denied<<index(do)) != 0
}

func index(do bool) uint64 {
	if do {
		return 1
	}
	return 0
}

// Empty reports whether no denial has been noted yet. Then Look is not worth its time.
func (t *Table) Empty() bool { return !t.some.Load() }

// Look returns what is known of name, a lower-cased wire name, in answers to questions with that CD bit.
func (t *Table) Look(name []byte, cd bool) Hint {
	set, tag := t.place(name, cd)
	for i := range set {
		if w := set[i].Load(); w&tagMask == tag {
			return Hint(w)
		}
	}
	return 0
}

// Use notes that the denial of a name has answered a question. Hints that are used stay longer.
func (t *Table) Use(name []byte, cd bool) {
	t.update(name, cd, func(was uint64) uint64 { return was | used }, false)
}

// Deny notes that an answer to a question with that qtype and DO bit has denied name.
func (t *Table) Deny(name []byte, cd, do bool, qtype uint16) {
	at := index(do)
	t.update(name, cd, func(was uint64) uint64 {
		was &^= exists | 0xffff<<(qtypeBits*at)
		return was | denied<<at | uint64(qtype)<<(qtypeBits*at)
	}, true)
	t.some.Store(true)
}

// Exist notes that name exists, and with it all names above it.
func (t *Table) Exist(name []byte, cd bool) {
	for off := 0; off < len(name) && name[off] != 0; off += 1 + int(name[off]) {
		t.update(name[off:], cd, func(was uint64) uint64 { return was&^(denials|qtypesMask) | exists }, true)
	}
}

// place returns the set and the tag of a name.
func (t *Table) place(name []byte, cd bool) (set []atomic.Uint64, tag uint64) {
	h := maphash.Bytes(t.seed, name)
	if cd {
		h = bits.RotateLeft64(h, 17) ^ 0x9e3779b97f4a7c15
	}
	at := h & uint64(len(t.words)-1) &^ (ways - 1)
	if tag = h & tagMask; tag == 0 {
		tag = 1 << 36
	}
	return t.words[at:][:ways], tag
}

// update changes the hint of a name. If there is none and add says so, it makes one, in the place of a word that is empty, or
// not used since the last look at it. An update that is lost to a concurrent one does no harm.
func (t *Table) update(name []byte, cd bool, change func(uint64) uint64, add bool) {
	set, tag := t.place(name, cd)
	victim := -1
	for i := range set {
		w := set[i].Load()
		if w&tagMask == tag {
			if next := change(w); next != w {
				set[i].CompareAndSwap(w, next)
			}
			return
		}
		if w == 0 && victim < 0 {
			victim = i
		}
	}
	if !add {
		return
	}
	start := rand.IntN(ways)
	for i := 0; victim < 0 && i < 2*ways; i++ {
		at := (start + i) % ways
		if w := set[at].Load(); w&used == 0 {
			victim = at
		} else {
			set[at].CompareAndSwap(w, w&^used)
		}
	}
	if victim >= 0 {
		set[victim].Store(change(tag))
	}
}
