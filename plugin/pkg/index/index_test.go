package index

import (
	"math/rand/v2"
	"sync"
	"testing"
)

// These tests are about the index alone, with chosen hashes and with positions that mean nothing.

// find returns the slot of hash that points at pos.
func find(t *Table, hash uint64, pos uint32) (int, bool) {
	var c Cursor
	for {
		slot, s, ok := t.Next(&c, hash)
		if !ok {
			return 0, false
		}
		if s.Pos() == pos {
			return slot, true
		}
	}
}

func TestFindsWhatIsInside(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	const entries = 3000
	table := New(make([]uint64, Buckets(entries)*SlotsPerBucket))
	type entry struct {
		hash uint64
		slot int
	}
	inside := map[uint32]entry{}
	var order []uint32
	for step := range 200_000 {
		if len(order) < entries && rng.IntN(2) == 0 {
			// Few tags and few homes make many collisions.
			hash := rng.Uint64() & 0x0003_0fff_ffff_0000
			pos := uint32(step)
			slot, ok := table.Insert(hash, pos, step&1)
			if !ok {
				t.Fatalf("no room for entry %d", len(order))
			}
			inside[pos] = entry{hash, slot}
			order = append(order, pos)
		} else if len(order) > 0 {
			i := rng.IntN(len(order))
			pos := order[i]
			e := inside[pos]
			slot, ok := find(&table, e.hash, pos)
			if !ok || slot != e.slot {
				t.Fatalf("step %d: position %d: found %v at slot %d, want %d", step, pos, ok, slot, e.slot)
			}
			if class := table.Load(slot).Class(); class != int(pos&1) {
				t.Fatalf("position %d has class %d", pos, class)
			}
			table.Remove(slot, e.hash)
			if _, ok := find(&table, e.hash, pos); ok {
				t.Fatalf("position %d is found after its removal", pos)
			}
			delete(inside, pos)
			order[i] = order[len(order)-1]
			order = order[:len(order)-1]
		}
	}
	for pos, e := range inside {
		if _, ok := find(&table, e.hash, pos); !ok {
			t.Errorf("position %d got lost", pos)
		}
		table.Remove(e.slot, e.hash)
	}
	for i, w := range table.words {
		if w != 0 && Slot(w).overflow() != maxOverflow {
			t.Fatalf("slot %d of an empty table is %#x", i, w)
		}
	}
}

func TestFullTableRefuses(t *testing.T) {
	table := New(make([]uint64, 2*SlotsPerBucket))
	for i := range 2 * SlotsPerBucket {
		if _, ok := table.Insert(uint64(i)<<48, uint32(i), 0); !ok {
			t.Fatalf("no room for slot %d of 16", i)
		}
	}
	if _, ok := table.Insert(99<<48, 99, 0); ok {
		t.Fatal("a full table took one more")
	}
	if _, ok := find(&table, 99<<48, 99); ok {
		t.Fatal("found what is not there")
	}
}

func TestOverflowCountSaturates(t *testing.T) {
	table := New(make([]uint64, 64*SlotsPerBucket))
	var slots []int
	for i := range 300 { // all have one hash, so 292 are displaced past the home bucket
		slot, ok := table.Insert(7<<48, uint32(i), 0)
		if !ok {
			t.Fatal("no room")
		}
		slots = append(slots, slot)
	}
	for i, slot := range slots {
		if i != 299 {
			table.Remove(slot, 7<<48)
		}
	}
	if _, ok := find(&table, 7<<48, 299); !ok {
		t.Fatal("the farthest slot is not found once those before it are gone")
	}
}

func TestCounter(t *testing.T) {
	table := New(make([]uint64, 4*SlotsPerBucket))
	slot, _ := table.Insert(1<<48, 5, 1)
	s := table.Load(slot)
	if !table.Bump(slot, s) || table.Bump(slot, s) {
		t.Fatal("a bump must work once for one view of the slot")
	}
	if got := table.Load(slot); got.Count() != 1 || !got.Same(s) {
		t.Fatalf("count %d", got.Count())
	}
	table.Repoint(slot, 1<<48, 6)
	if got := table.Load(slot); got.Pos() != 6 || got.Count() != 1 || got.Class() != 1 || got.Same(s) {
		t.Fatalf("after Repoint: pos %d count %d class %d", got.Pos(), got.Count(), got.Class())
	}
	table.Mark(slot, true)
	if got := table.Load(slot); !got.Marked() || !got.Same(table.Load(slot)) || got.Count() != 1 {
		t.Fatalf("marked: %v count %d", got.Marked(), got.Count())
	}
	table.Repoint(slot, 1<<48, 6)
	if !table.Load(slot).Marked() {
		t.Fatal("Repoint lost the mark")
	}
	table.Mark(slot, false)
	table.SetCount(slot, MaxCount)
	if got := table.Load(slot); got.Count() != MaxCount || got.Pos() != 6 || got.Class() != 1 {
		t.Fatalf("after SetCount: pos %d count %d class %d", got.Pos(), got.Count(), got.Class())
	}
}

// TestReadersBesideTheWriter is for the race detector, and for what readers rely on: a slot that stays in the table is
// always found.
func TestReadersBesideTheWriter(t *testing.T) {
	const stay, come = 200, 400
	table := New(make([]uint64, Buckets(stay+come)*SlotsPerBucket))
	rng := rand.New(rand.NewPCG(3, 4))
	hashes := make([]uint64, stay)
	for i := range hashes {
		hashes[i] = rng.Uint64()
		table.Insert(hashes[i], uint32(i), 0)
	}
	done := make(chan struct{})
	var wg sync.WaitGroup
	for range 3 {
		wg.Go(func() {
			for i := 0; ; i++ {
				select {
				case <-done:
					return
				default:
				}
				n := i % stay
				slot, ok := find(&table, hashes[n], uint32(n))
				if !ok {
					t.Errorf("position %d not found", n)
					return
				}
				if s := table.Load(slot); s.Count() < 100 {
					table.Bump(slot, s)
				}
			}
		})
	}
	for range 300 {
		var slots [come]int
		var hs [come]uint64
		for i := range slots {
			hs[i] = rng.Uint64()
			slots[i], _ = table.Insert(hs[i], uint32(stay+i), 1)
		}
		for i := range slots {
			table.Remove(slots[i], hs[i])
		}
	}
	close(done)
	wg.Wait()
}

func BenchmarkNext(b *testing.B) {
	const entries = 10_000
	table := New(make([]uint64, Buckets(entries)*SlotsPerBucket))
	rng := rand.New(rand.NewPCG(5, 6))
	hashes := make([]uint64, entries)
	for i := range hashes {
		hashes[i] = rng.Uint64()
		table.Insert(hashes[i], uint32(i), 0)
	}
	for i := 0; b.Loop(); i++ {
		var c Cursor
		if _, _, ok := table.Next(&c, hashes[i%entries]); !ok {
			b.Fatal("not found")
		}
	}
}
