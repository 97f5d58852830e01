package admit

import (
	"bytes"
	"slices"
	"time"

	"github.com/miekg/dns"

	"github.com/optcache/optcache/plugin/pkg/record"
	"github.com/optcache/optcache/plugin/pkg/wire"
)

// This file has the options that hold for some zones and types: ttl, stale_for, prefetch_for. Of several that fit a question, those
// of the longest zone count, of these the ones that name the type, and of these the last one.

// Selector says which questions such an option is for.
type Selector struct {
	Zones [][]byte // lower-cased wire names; none: all names
	Types []uint16 // none: all types
}

// TTLs are bounds for the TTLs of some answers, other than those of their class: the option ttl.
type TTLs struct {
	Selector
	Class record.Class
	Max   time.Duration
	Min   time.Duration // 0 to Max
}

// Switch switches something on or off for some questions: the options stale_for and prefetch_for.
type Switch struct {
	Selector
	On bool
}

// Same reports whether both are for the same questions.
func (s *Selector) Same(other *Selector) bool {
	return slices.EqualFunc(s.Zones, other.Zones, bytes.Equal) && slices.Equal(s.Types, other.Types)
}

// bounds returns the least and the most TTL of answers of a class to a question. own reports whether an option ttl says so.
func (r *Rules) bounds(c record.Class, name []byte, qtype uint16) (least, most time.Duration, own bool) {
	least, most = r.MinTTL[c], r.MaxTTL[c]
	best := 0
	for i := range r.TTLs {
		t := &r.TTLs[i]
		if t.Class != c {
			continue
		}
		if fit := t.fit(name, qtype); fit >= best {
			least, most, own, best = t.Min, t.Max, true, fit
		}
	}
	return least, most, own
}

// ServesStale reports whether an answer under k may be served when it has expired, as far as stale_for says.
func (r *Rules) ServesStale(k *record.Key) bool { return isOn(r.StaleFor, k) }

// Prefetches reports whether an answer under k may be refreshed before it expires, as far as prefetch_for says.
func (r *Rules) Prefetches(k *record.Key) bool { return isOn(r.PrefetchFor, k) }

// isOn returns what the switches say of a question. It is on if none fits.
func isOn(all []Switch, k *record.Key) bool {
	on, best := true, 0
	for i := range all {
		if fit := all[i].fit(k.Name(), k.Qtype()); fit >= best {
			on, best = all[i].On, fit
		}
	}
	return on
}

// fit says how closely the selector fits a question: the more, the closer. It is -1 if the selector does not fit.
func (s *Selector) fit(name []byte, qtype uint16) int {
	zone := s.zoneOf(name)
	switch {
	case zone < 0, len(s.Types) > 0 && !slices.Contains(s.Types, qtype):
		return -1
	case len(s.Types) > 0:
		return 2*zone + 1
	}
	return 2 * zone
}

// zoneOf returns the length of the longest of the zones that name is in, 0 if the selector is for all names, and -1 if name is in
// none.
func (s *Selector) zoneOf(name []byte) int {
	if len(s.Zones) == 0 {
		return 0
	}
	longest := -1
	for _, zone := range s.Zones {
		if len(zone) > longest && wire.InZone(name, zone) {
			longest = len(zone)
		}
	}
	return longest
}

// boundsOf is bounds for the question of m.
func (r *Rules) boundsOf(c record.Class, m *dns.Msg) (least, most time.Duration, own bool) {
	if len(r.TTLs) > 0 && len(m.Question) > 0 {
		var name [wire.MaxName]byte
		if n, ok := wire.PackName(name[:], m.Question[0].Name); ok {
			wire.Lower(name[:n], name[:n])
			return r.bounds(c, name[:n], m.Question[0].Qtype)
		}
	}
	return r.MinTTL[c], r.MaxTTL[c], false
}
