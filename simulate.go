package optcache

import (
	"encoding/binary"
	"time"

	"github.com/optcache/optcache/plugin/pkg/record"
	"github.com/optcache/optcache/plugin/pkg/wire"
)

// This file drives the engine without a server, to measure hit ratios. It holds no part of the engine: it uses the store
// that a server uses. A server does not use this file.

// Simulation drives a real store, with its shards, its policy and its memory. Keys and time come from the caller. It is not
// safe for concurrent use.
type Simulation struct {
	o   *Optcache
	s   *scratch
	now time.Duration // of the last request

	body [65_000]byte // of an answer
}

// NewSimulation returns a simulation of an optcache block with room for capacity positive answers, 1024 or more. The hot
// tier has hotPercentage of the capacity. All other options have their defaults.
func NewSimulation(capacity, hotPercentage int) (*Simulation, error) {
	return simulate(options{
		success:       classOptions{capacity: capacity},
		denial:        classOptions{capacity: minCapacity},
		hotPercentage: hotPercentage, promotionThreshold: 3, lineAligned: true,
	})
}

// NewBoundSimulation returns a simulation of an optcache block that is bound by max_memory, in bytes, and not by a number
// of answers. All other options have their defaults.
func NewBoundSimulation(maxMemory int64) (*Simulation, error) {
	return simulate(options{
		success:       classOptions{capacity: boundCapacity},
		denial:        classOptions{capacity: boundCapacity},
		hotPercentage: 10, promotionThreshold: 3, lineAligned: true, maxMemory: maxMemory,
	})
}

// NewCutSimulation returns a NewSimulation with nxdomain_cut probe and the default hot tier.
func NewCutSimulation(capacity int) (*Simulation, error) {
	return simulate(options{
		success: classOptions{capacity: capacity}, denial: classOptions{capacity: minCapacity},
		hotPercentage: 10, promotionThreshold: 3, lineAligned: true, cut: cutOptions{on: true, probe: true},
	})
}

// boundCapacity is a number of answers per class for which maxMemory of a NewBoundSimulation is too small.
const boundCapacity = 1_000_000

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
	if o.cut.on {
		x.o.cutter = newCutter(&o, nil)
	}
	return nil
}

// Request asks for a key at now, and reports whether the store has a living answer. If not, Request stores an answer with
// the TTL, in seconds, and a body of that many bytes, 32 to 65,000. 32 bytes is the size of one A record; a smaller number
// counts as 32. now must not go back between requests.
func (x *Simulation) Request(key uint64, ttl uint32, bytes int, now time.Duration) (hit bool) {
	x.now = now
	name := [...]byte{labelLen - 1, labelLen: 0} // one label
	putLabel(name[:], key)
	s, st := x.s, x.o.store
	s.Key.Set(st.seed, name[:], 1, 1, false, false)
	s.Body = wire.HeaderLen + len(name) + wire.QuestionTail
	if st.lookup(s, int64(now)) {
		return true
	}
	const ttlAt, rdataAt = len(name) + 4, len(name) + 10
	const typeNULL, typeA = 10, 1
	body := x.body[:max(bytes, rdataAt+4)]
	copy(body, name[:])
	body[len(name)+1], body[len(name)+3] = typeA, 1 // IN
	if len(body) > rdataAt+4 {
		body[len(name)+1] = typeNULL
	}
	binary.BigEndian.PutUint16(body[rdataAt-2:], uint16(len(body)-rdataAt))
	s.TTLAt = append(s.TTLAt[:0], uint16(ttlAt))
	e := record.Entry{Stored: int64(now), TTL: ttl, Counts: [3]uint16{1, 0, 0}}
	st.insert(s, &e, body, "", int64(now))
	return false
}

// labelLen is the length of a label with a number.
const labelLen = 1 + 16

// putLabel makes a label of a number: in hexadecimal, with the digits a to p, which lower-casing does not change.
func putLabel(b []byte, n uint64) {
	b[0] = labelLen - 1
	for i := range labelLen - 1 {
		b[1+i] = 'a' + byte(n>>(4*i)&15)
	}
}

// RequestBelow is Request for a name that does not exist, below another one that does not exist, in a NewCutSimulation. The answer is
// an NXDOMAIN. answered is true for a hit, and if an NXDOMAIN for the name above answers. Otherwise there may be a probe for that
// name, which brings an NXDOMAIN with the same TTL.
func (x *Simulation) RequestBelow(key, above uint64, ttl uint32, now time.Duration) (answered, probed bool) {
	x.now = now
	name := [...]byte{2 * labelLen: 0}
	putLabel(name[:], key)
	putLabel(name[labelLen:], above)
	s, st, at := x.s, x.o.store, int64(now)
	s.Key.Set(st.seed, name[:], 1, 1, false, false)
	s.Body = wire.HeaderLen + len(name) + wire.QuestionTail
	if st.lookup(s, at) || x.o.findCut(s, at) {
		return true, false
	}
	x.deny(name[:], ttl)
	if upper := name[labelLen:]; !x.o.knows(upper, false, false) && x.o.cutter.limit.AllowN(time.Unix(0, at), 1) {
		x.deny(upper, ttl)
		probed = true
	}
	return false, probed
}

// deny stores an NXDOMAIN for a name. It counts as positive, so that it takes part in the same contest as all answers of a trace.
func (x *Simulation) deny(name []byte, ttl uint32) {
	s := x.s
	s.Key.Set(x.o.store.seed, name, 1, 1, false, false)
	body := x.body[:64] // of an SOA, which nobody reads
	s.TTLAt = append(s.TTLAt[:0], 4)
	e := record.Entry{Stored: int64(x.now), TTL: ttl, Flags: record.NameError, Counts: [3]uint16{0, 1, 0}}
	x.o.store.insert(s, &e, body, "", int64(x.now))
}

// Restart simulates the end of a server and the start of the next one. It writes a snapshot of the answers to path, and
// continues with an empty store that it fills from the snapshot. The simulation's time does not advance meanwhile.
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
	return new(snapshotter).read(x.o, int64(x.now), wall, nil)
}

// Close gives the memory back. The simulation must not be used afterwards.
func (x *Simulation) Close() { x.o.store.close() }
