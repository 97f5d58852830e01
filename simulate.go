package optcache

import (
	"time"

	"github.com/optcache/optcache/plugin/pkg/wire"
)

// Simulation drives a store, the real one with its shards, its policy and its memory, with keys
// and a clock of the caller's. Hit ratios are measured with it; a server has no use for it. It is
// not safe for concurrent use.
type Simulation struct {
	o   *Optcache
	s   *scratch
	now time.Duration // of the last request
}

// NewSimulation returns a simulation of an optcache block that holds capacity positive answers,
// 1024 or more, with hotPercentage of the capacity in the hot tier and everything else at its
// default.
func NewSimulation(capacity, hotPercentage int) (*Simulation, error) {
	return simulate(options{
		success:       classOptions{capacity: capacity},
		denial:        classOptions{capacity: minCapacity},
		hotPercentage: hotPercentage, promotionThreshold: 3, lineAligned: true,
	})
}

func simulate(o options) (*Simulation, error) {
	x := &Simulation{s: newScratch()}
	return x, x.open(o)
}

// open gives the simulation an empty store.
func (x *Simulation) open(o options) error {
	o.zones = []string{"."}
	o.success.maxTTL = (1<<31 - 1) * time.Second // the trace says how long answers live
	st, err := newStore(plan(&o))
	if err != nil {
		return err
	}
	x.o = newOptcache(o)
	x.o.store = st
	x.o.clock = func() int64 { return int64(x.now) }
	return nil
}

// Request asks for a key at a time, which never goes back, and reports whether the answer was
// there and alive. If not, it is stored with the TTL, in seconds.
func (x *Simulation) Request(key uint64, ttl uint32, now time.Duration) (hit bool) {
	x.now = now
	// The name is the key in hexadecimal, of a kind that lower-casing leaves alone, as one label.
	name := [...]byte{16, 17: 0}
	for i := range 16 {
		name[1+i] = 'a' + byte(key>>(4*i)&15)
	}
	s, st := x.s, x.o.store
	s.key.set(st.seed, name[:], 1, 1, false, false)
	s.body = wire.HeaderLen + len(name) + questionTail
	if st.lookup(s, int64(now)) {
		return true
	}
	const ttlAt = uint16(len(name) + 4)
	body := [...]byte{len(name) + 1: 1, len(name) + 3: 1, len(name) + 9: 4, 192, 0, 2, 1} // A IN
	copy(body[:], name[:])
	s.ttlAt = append(s.ttlAt[:0], ttlAt)
	e := entry{stored: int64(now), ttl: ttl, counts: [3]uint16{1, 0, 0}}
	st.insert(s, &e, body[:], "", int64(now))
	return false
}

// Restart does what the end of a server and the start of the next one do, in no time: it writes the answers to a
// file, and goes on with what it reads from there.
func (x *Simulation) Restart(path string) error {
	x.o.file.path = path
	wall := time.Unix(0, 0).Add(x.now)
	if _, err := x.o.writeAnswers(wall, nil); err != nil {
		return err
	}
	last := x.o.store
	if err := x.open(x.o.options); err != nil {
		return err
	}
	last.close()
	return new(keeper).read(x.o, int64(x.now), wall)
}

// Close gives the memory back.
func (x *Simulation) Close() { x.o.store.close() }
