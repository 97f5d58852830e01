// Package zones finds the closest zone that a name is in. Names and zones are lower-cased wire names.
package zones

import (
	"slices"

	"github.com/miekg/dns"

	"github.com/optcache/optcache/plugin/pkg/wire"
)

// fewZones is the largest number of zones that a table compares one by one. For so few, that is faster than to look
// up each parent of a name.
const fewZones = 4

// Table is a set of zones, each with a value. Find is safe for concurrent use once no more zones are added.
type Table[T any] struct {
	Entries []Entry[T]
	index   map[string]int // zone to position in Entries; nil up to fewZones zones
}

// Entry is a zone of a Table, with its value.
type Entry[T any] struct {
	zone  []byte // lower-cased wire name
	Value T
}

// Wire returns a zone, in presentation format, as a lower-cased wire name that belongs to the caller. ok is false if
// the zone is not a valid name.
func Wire(zone string) (name []byte, ok bool) {
	var buf [wire.MaxName]byte
	n, ok := wire.PackName(buf[:], dns.Fqdn(zone))
	if !ok {
		return nil, false
	}
	wire.Lower(buf[:n], buf[:n])
	return slices.Clone(buf[:n]), true
}

// Add adds a zone, a lower-cased wire name, with its value. A zone that is there already keeps its value. The table
// keeps zone.
func (t *Table[T]) Add(zone []byte, value T) {
	if t.index != nil {
		if _, known := t.index[string(zone)]; !known {
			t.index[string(zone)] = len(t.Entries)
			t.Entries = append(t.Entries, Entry[T]{zone, value})
		}
		return
	}
	// The longest zones come first, so that the first match is the closest zone.
	at := len(t.Entries)
	for i := range t.Entries {
		switch other := t.Entries[i].zone; {
		case string(other) == string(zone):
			return
		case len(other) < len(zone):
			at = min(at, i)
		}
	}
	t.Entries = slices.Insert(t.Entries, at, Entry[T]{zone, value})
	if len(t.Entries) > fewZones {
		t.index = make(map[string]int)
		for i := range t.Entries {
			t.index[string(t.Entries[i].zone)] = i
		}
	}
}

// Find returns the value of the closest zone that name, a lower-cased wire name, is in. It returns nil if there is
// none.
func (t *Table[T]) Find(name []byte) *T {
	if t.index == nil {
		for i := range t.Entries {
			if wire.InZone(name, t.Entries[i].zone) {
				return &t.Entries[i].Value
			}
		}
		return nil
	}
	for off := 0; off < len(name); off += 1 + int(name[off]) {
		if i, ok := t.index[string(name[off:])]; ok {
			return &t.Entries[i].Value
		}
	}
	return nil
}

// Set is a set of zones.
type Set struct {
	all bool // the root is among them
	Table[struct{}]
}

// NewSet returns the set of zones, in presentation format. It skips those that are not valid names.
func NewSet(zones []string) (z Set) {
	for _, zone := range zones {
		if name, ok := Wire(zone); ok {
			z.Add(name, struct{}{})
			z.all = z.all || len(name) == 1
		}
	}
	return z
}

// Contains reports whether name, a lower-cased wire name, is in one of the zones.
func (z *Set) Contains(name []byte) bool { return z.all || z.Find(name) != nil }
