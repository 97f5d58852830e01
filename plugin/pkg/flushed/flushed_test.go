package flushed

import (
	"fmt"
	"testing"

	"github.com/optcache/optcache/plugin/pkg/record"
	"github.com/optcache/optcache/plugin/pkg/wire"
)

var seed = record.MakeSeed(0)

func keyOf(t testing.TB, name string, qtype uint16) *record.Key {
	t.Helper()
	var b [wire.MaxName]byte
	n, ok := wire.PackName(b[:], name)
	if !ok {
		t.Fatalf("%q is no name", name)
	}
	k := new(record.Key)
	k.Set(seed, b[:n], qtype, 1, false, false)
	return k
}

func TestFilter(t *testing.T) {
	success := &record.Entry{TTL: 300}
	denial := &record.Entry{TTL: 300, Flags: record.FlagDenial | 3}
	failure := &record.Entry{TTL: 5, Flags: record.FlagDenial | record.FlagVoid | 2}
	referral := &record.Entry{TTL: 5, Flags: record.FlagVoid}
	example := keyOf(t, "example.org.", 1).Name()
	const now = int64(10e9) // the failure has expired
	for _, tc := range []struct {
		name   string
		filter Filter
		key    *record.Key
		entry  *record.Entry
		want   bool
	}{
		{"all", Filter{Kinds: AllKinds}, keyOf(t, "a.", 1), success, true},
		{"name", Filter{Kinds: AllKinds, Name: example}, keyOf(t, "Example.ORG.", 28), success, true},
		{"another name", Filter{Kinds: AllKinds, Name: example}, keyOf(t, "www.example.org.", 1), success, false},
		{"subtree", Filter{Kinds: AllKinds, Name: example, Subtree: true}, keyOf(t, "www.example.org.", 1), success, true},
		{"its top", Filter{Kinds: AllKinds, Name: example, Subtree: true}, keyOf(t, "example.org.", 1), success, true},
		{"beside a subtree", Filter{Kinds: AllKinds, Name: example, Subtree: true}, keyOf(t, "notexample.org.", 1), success, false},
		{"root", Filter{Kinds: AllKinds, Name: []byte{0}, Subtree: true}, keyOf(t, "a.", 1), success, true},
		{"type", Filter{Kinds: AllKinds, Qtype: 28}, keyOf(t, "a.", 28), success, true},
		{"another type", Filter{Kinds: AllKinds, Qtype: 28}, keyOf(t, "a.", 1), success, false},
		{"denials", Filter{Kinds: Denials}, keyOf(t, "a.", 1), denial, true},
		{"no denial", Filter{Kinds: Denials}, keyOf(t, "a.", 1), success, false},
		{"a failure is no denial", Filter{Kinds: Denials}, keyOf(t, "a.", 1), failure, false},
		{"failures", Filter{Kinds: Failures}, keyOf(t, "a.", 1), failure, true},
		{"a referral is a success", Filter{Kinds: Successes}, keyOf(t, "a.", 1), referral, true},
		{"expired", Filter{Kinds: AllKinds, Expired: true}, keyOf(t, "a.", 1), failure, true},
		{"not expired", Filter{Kinds: AllKinds, Expired: true}, keyOf(t, "a.", 1), denial, false},
	} {
		if got := tc.filter.Has(tc.key, tc.entry, now); got != tc.want {
			t.Errorf("%s: %v", tc.name, got)
		}
	}
}

func TestLog(t *testing.T) {
	l := new(Log)
	e := &record.Entry{TTL: 300}
	k := keyOf(t, "example.org.", 1)
	if l.Has(k, e, 0) || (*Log)(nil).Has(k, e, 0) {
		t.Error("an empty log has something")
	}
	l.Add(Filter{Kinds: AllKinds, Name: k.Name()}, 100)
	for asked, want := range map[int64]bool{99: true, 100: true, 101: false} {
		if got := l.Has(k, e, asked); got != want {
			t.Errorf("asked at %d: %v", asked, got)
		}
	}
	if l.Has(keyOf(t, "example.net.", 1), e, -50) {
		t.Error("it has another name")
	}
}

// When many are remembered, none is forgotten: what is older than the oldest is taken as flushed.
func TestLogIsBounded(t *testing.T) {
	l := new(Log)
	e := &record.Entry{TTL: 300}
	const flushes = 3 * most
	for i := range flushes {
		l.Add(Filter{Kinds: AllKinds, Name: keyOf(t, fmt.Sprintf("n%d.", i), 1).Name()}, int64(i))
	}
	if n := len(l.entries.Load().list); n > most {
		t.Errorf("%d are remembered", n)
	}
	for i := range flushes {
		k := keyOf(t, fmt.Sprintf("n%d.", i), 1)
		if !l.Has(k, e, int64(i)) {
			t.Fatalf("flush %d is forgotten", i)
		}
		if l.Has(k, e, int64(max(i, flushes-most-1)+1)) {
			t.Fatalf("what was asked after flush %d is taken as flushed", i)
		}
	}
	if l.Has(keyOf(t, "other.", 1), e, flushes-most) {
		t.Error("what was asked after the oldest is taken as flushed")
	}
}

func BenchmarkEmptyLog(b *testing.B) {
	l, e, k := new(Log), new(record.Entry), keyOf(b, "example.org.", 1)
	for b.Loop() {
		l.Has(k, e, 1)
	}
}

// What moves needs to know of flushes under way only: the others have been where it comes from.
func TestLogOfWhatMoves(t *testing.T) {
	l := new(Log)
	k, e := keyOf(t, "example.org.", 1), &record.Entry{TTL: 300, Stored: 50}
	over := l.Add(Filter{Kinds: AllKinds}, 100)
	if !l.HasMoving(k, e) || l.HasMoving(k, &record.Entry{TTL: 300, Stored: 101}) {
		t.Error("a flush under way is not of what was there before, or of what came after")
	}
	over()
	if l.HasMoving(k, e) || !l.Has(k, e, 50) {
		t.Error("a flush that is over is of what moves, or not of what was asked before")
	}
	for range 2 * most {
		l.Add(Filter{Kinds: Failures}, 200)()
	}
	if l.HasMoving(k, e) {
		t.Error("many flushes of others are of what moves")
	}
}

// What is read from a snapshot needs to know of the flushes since the reading began.
func TestLogOfWhatIsRead(t *testing.T) {
	l := new(Log)
	k, e := keyOf(t, "example.org.", 1), &record.Entry{TTL: 300, Stored: -50}
	for range 2 * most {
		l.Add(Filter{Kinds: Failures}, 90)()
	}
	l.Add(Filter{Kinds: AllKinds}, 99)()
	if l.HasRead(k, e, 100) {
		t.Error("a flush before the reading is of what is read")
	}
	l.Add(Filter{Kinds: AllKinds, Name: k.Name()}, 100)()
	if !l.HasRead(k, e, 100) || l.HasRead(keyOf(t, "example.net.", 1), e, 100) {
		t.Error("a flush since then is not of its name, or of another one")
	}
}

// What is alive at a flush of the expired stays, although it has expired since.
func TestExpiryIsJudgedByTheFlush(t *testing.T) {
	l := new(Log)
	k, e := keyOf(t, "example.org.", 1), &record.Entry{TTL: 10}
	l.Add(Filter{Kinds: AllKinds, Expired: true}, 5e9)
	if l.Has(k, e, 0) || l.HasMoving(k, e) {
		t.Error("it was alive")
	}
	l.Add(Filter{Kinds: AllKinds, Expired: true}, 15e9)
	if !l.Has(k, e, 0) {
		t.Error("it had expired")
	}
}
