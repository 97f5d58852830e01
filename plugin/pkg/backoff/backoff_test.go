package backoff

import (
	"math/rand/v2"
	"sync"
	"testing"
	"time"
)

const (
	least = 5 * time.Second
	most  = 5 * time.Minute
)

func tableOf(zones ...string) (*Table, []*Zone) {
	t := New(Names(1000), least, most)
	return t, t.Zones(zones)
}

func name(i int) uint64 { return rand.New(rand.NewPCG(uint64(i), 9520)).Uint64() }

func TestFailuresDouble(t *testing.T) {
	_, zones := tableOf(".")
	z, now := zones[0], int64(1e15)
	for i, want := range []time.Duration{5, 10, 20, 40, 80, 160, 300, 300} {
		if i > 0 && i%3 == 0 { // a success of another name, so that the zone is not gone
			z.Succeeded(name(2), 1, now)
		}
		if got := z.Failed(name(1), now); got != want*time.Second {
			t.Fatalf("failure %d is kept for %v, want %v", i, got, want*time.Second)
		}
		// Failures within the hold are of other types, or of clients that ask again at once: they double nothing.
		if got := z.Failed(name(1), now+1e9); got != max(want-1, 5)*time.Second {
			t.Errorf("failure %d, a second later, is kept for %v", i, got)
		}
		if !z.Stands(name(1), now, most, now+1e9) || z.Stands(name(1), now, most, now+int64(want)*1e9) {
			t.Errorf("failure %d does not stand, or for too long", i)
		}
		now += int64(want) * 1e9
	}
	z.Succeeded(name(1), 1, now)
	if z.Stands(name(1), now-5e9, 6*time.Second, now) || !z.Stands(name(1), now-5e9, 5*time.Second, now) {
		t.Error("after a success, only what is kept for the shortest time stands")
	}
	if got := z.Failed(name(1), now); got != least {
		t.Errorf("the first failure after a success is kept for %v", got)
	}
}

// A name that has not failed for long begins anew.
func TestNamesAreForgotten(t *testing.T) {
	table, zones := tableOf(".")
	z, now := zones[0], int64(-1e15) // a clock may begin anywhere
	z.Failed(name(1), now)
	now += int64(least)
	z.Failed(name(1), now)
	if got := z.Failed(name(1), now+int64(10*time.Second+most)); got != least {
		t.Errorf("kept for %v", got)
	}
	now += int64(10*time.Second + most + least)
	if got := z.Failed(name(1), now); got != 2*least {
		t.Errorf("kept for %v", got)
	}
	table.Forget(name(1))
	if got := z.Failed(name(1), now); got != least {
		t.Errorf("after Forget kept for %v", got)
	}
}

func TestZoneGone(t *testing.T) {
	_, zones := tableOf(".", "cluster.local.")
	z, other, now := zones[0], zones[1], int64(1e15)
	for i := range goneAfter {
		if z.Gone() || z.Due(now+1e12) {
			t.Fatalf("gone after %d failures", i)
		}
		if got := z.Failed(name(i), now); got != least {
			t.Errorf("failure %d is kept for %v", i, got)
		}
	}
	if !z.Gone() || other.Gone() {
		t.Fatal("the zone is not gone, or the other one is")
	}
	// The zone's time doubles, and new names get it.
	for i, want := range []time.Duration{10, 20, 40, 80, 160, 300, 300} {
		now = z.until
		if got := z.Failed(name(100+i), now); got != want*time.Second {
			t.Errorf("new name %d is kept for %v, want %v", i, got, want*time.Second)
		}
		if got := z.Failed(name(200+i), now+1e9); got != want*time.Second {
			t.Errorf("another name is kept for %v", got)
		}
	}
	if got := other.Failed(name(500), now); got != least {
		t.Errorf("a name of another zone is kept for %v", got)
	}

	// One request is let through in each 5 s.
	through := 0
	for end := now + int64(time.Minute); now < end; now += int64(100 * time.Millisecond) {
		if z.Due(now) && z.TakeTurn(now) {
			through++
		}
	}
	if through != 12 {
		t.Errorf("%d of a minute are let through, want 12", through)
	}

	// One success ends it, for all names.
	if !z.Stands(name(106), now-6e9, most, now) || !z.Stands(name(777), now-4e9, most, now) || z.Stands(name(777), now-5e9, most, now) {
		t.Error("a failure does not stand")
	}
	z.Succeeded(name(999), 1, now)
	now += 1e9
	if z.Gone() || z.Due(now+1e12) || z.Stands(name(106), now-2e9, most, now) || z.Stands(name(777), now-2e9, most, now) || !z.Stands(name(106), now-2e9, least, now) {
		t.Error("a success has not ended it")
	}
	if got := z.Failed(name(106), now); got != least {
		t.Errorf("kept for %v after the zone is back", got)
	}
	if !other.Holds(name(500), now-int64(58*time.Second)) {
		t.Error("the other zone has been forgotten")
	}
}

// What fails for one type alone is known apart from the name. A success ends both.
func TestTyped(t *testing.T) {
	_, zones := tableOf(".")
	z := zones[0]
	z.Failed(Typed(name(1), 255), 1e15)
	z.Failed(Typed(name(1), 1), 1e15)
	if z.Holds(name(1), 1e15) || z.Holds(Typed(name(1), 28), 1e15) {
		t.Error("a failure of one type counts for others")
	}
	z.Failed(name(1), 1e15)
	z.Succeeded(name(1), 1, 1e15)
	if z.Holds(name(1), 1e15) || z.Holds(Typed(name(1), 1), 1e15) || !z.Holds(Typed(name(1), 255), 1e15) {
		t.Error("a success of A ends all but what ANY has failed by itself")
	}
}

// A reload keeps the zones that there were, and forgets the others.
func TestZonesStay(t *testing.T) {
	table, zones := tableOf("a.", "b.")
	for i := range goneAfter {
		zones[0].Failed(name(i), 1e15)
	}
	next := table.Zones([]string{"c.", "a.", "a."})
	if next[1] != zones[0] || next[2] != next[1] || !next[1].Gone() || next[0].Gone() {
		t.Error("the zone's state is lost")
	}
	if again := table.Zones([]string{"b."}); again[0] == zones[1] {
		t.Error("a zone that was left out has stayed")
	}
	table.Zones([]string{"a."})
	table = nil
	all, zones := tableOf("a.")
	for i := range goneAfter {
		zones[0].Failed(name(i), 1e15)
	}
	all.ForgetAll()
	if zones[0].Gone() || zones[0].Holds(name(1), 1e15) || zones[0].Failed(name(1), 1e15) != least {
		t.Error("ForgetAll has left something")
	}
}

// A flood of names takes no more memory, and shortens only the time for which names are kept.
func TestTableIsBounded(t *testing.T) {
	table, zones := tableOf(".")
	z := zones[0]
	for i := range 100_000 {
		z.Succeeded(1, 1, 1e15)
		if got := z.Failed(name(i), 1e15); got != least {
			t.Fatalf("name %d is kept for %v", i, got)
		}
	}
	held := 0
	for i := range 100_000 {
		if z.Holds(name(i), 1e15) {
			held++
		}
	}
	if want := len(table.words); held > want+want/100 || held < want*9/10 {
		t.Errorf("%d names are held by %d words", held, want)
	}
	for _, c := range []struct{ records, want int }{{0, 256}, {1000, 2048}, {1 << 16, 1 << 16}, {1 << 20, 1 << 16}} {
		if got := Names(c.records); got != c.want {
			t.Errorf("%d names for %d records", got, c.records)
		}
	}
	if !table.Is(2048, least, most) || table.Is(2048, least, least) || (*Table)(nil).Is(2048, least, most) {
		t.Error("Is")
	}
}

// Many may use a table at once. Of all that ask at a time, one is let through.
func TestConcurrentUse(t *testing.T) {
	table, zones := tableOf(".")
	z := zones[0]
	var wg sync.WaitGroup
	for g := range 8 {
		wg.Go(func() {
			for i := range 2000 {
				now := int64(1e15) + int64(i)*1e7
				if got := z.Failed(name(i%300), now); got < least || got > most {
					t.Errorf("kept for %v", got)
				}
				z.Stands(name(i%300), now, most, now)
				if g == 0 && i%500 == 499 {
					z.Succeeded(name(i%300), 1, now)
					table.Forget(name(3))
				}
				if i == 1000 {
					table.Zones([]string{"."})
				}
			}
		})
	}
	wg.Wait()
	for i := range goneAfter {
		z.Failed(name(i), 2e15)
	}
	took := make(chan bool, 64)
	for range 64 {
		wg.Go(func() { took <- z.TakeTurn(3e15) })
	}
	wg.Wait()
	close(took)
	n := 0
	for ok := range took {
		if ok {
			n++
		}
	}
	if n != 1 {
		t.Errorf("%d are let through at once", n)
	}
}
