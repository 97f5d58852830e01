package optcache

import (
	"time"

	"github.com/optcache/optcache/plugin/pkg/wire"
)

// Simulation drives a store, the real one with its shards, its policy and its memory, with keys
// and a clock of the caller's. Hit ratios are measured with it; a server has no use for it. It is
// not safe for concurrent use.
type Simulation struct {
	st *store
	s  *scratch
}

// NewSimulation returns a simulation of an optcache block that holds capacity positive answers,
// 1024 or more, with hotPercentage of the capacity in the hot tier and everything else at its
// default.
func NewSimulation(capacity, hotPercentage int) (*Simulation, error) {
	o := options{
		success:       classOptions{capacity: capacity},
		denial:        classOptions{capacity: minCapacity},
		hotPercentage: hotPercentage, promotionThreshold: 3, lineAligned: true,
	}
	st, err := newStore(plan(&o))
	if err != nil {
		return nil, err
	}
	return &Simulation{st: st, s: newScratch()}, nil
}

// Request asks for a key at a time, which never goes back, and reports whether the answer was
// there and alive. If not, it is stored with the TTL, in seconds.
func (x *Simulation) Request(key uint64, ttl uint32, now time.Duration) (hit bool) {
	// The name is the key in hexadecimal, of a kind that lower-casing leaves alone, as one label.
	name := [...]byte{16, 17: 0}
	for i := range 16 {
		name[1+i] = 'a' + byte(key>>(4*i)&15)
	}
	s := x.s
	s.key.set(x.st.seed, name[:], 1, 1, false, false)
	s.body = wire.HeaderLen + len(name) + questionTail
	if x.st.lookup(s, int64(now)) {
		return true
	}
	body := [...]byte{1, 0xff, 0, 0, 1, 0, 1, 0, 0, 0, 0, 0, 4, 192, 0, 2, 1}
	s.ttlAt = append(s.ttlAt[:0], 7)
	e := entry{stored: int64(now), ttl: ttl, counts: [3]uint16{1, 0, 0}}
	x.st.insert(s, &e, body[:], "", int64(now))
	return false
}

// Close gives the memory back.
func (x *Simulation) Close() { x.st.close() }
