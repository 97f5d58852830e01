package optcache

import (
	"math"
	"math/bits"
	"strconv"
	"time"
	"unsafe"

	"github.com/optcache/optcache/plugin/pkg/backoff"
	"github.com/optcache/optcache/plugin/pkg/climber"
	"github.com/optcache/optcache/plugin/pkg/cut"
	"github.com/optcache/optcache/plugin/pkg/index"
	"github.com/optcache/optcache/plugin/pkg/popularity"
	"github.com/optcache/optcache/plugin/pkg/record"
	"github.com/optcache/optcache/plugin/pkg/subnet"
)

// This file lays out the memory of a store. It decides how many shards there are, and how large each part is, so that all
// of it stays within one bound in bytes. It allocates nothing; that is in store.go.

// sizes is the layout of a pool's memory, and the other options that a store depends on. After a reload the store is
// kept only if both are the same, so sizes must be comparable.
type sizes struct {
	traits
	owners       int // stores
	shards       int
	capacity     [record.Classes]int // entries of a class that there is room for in any case
	asked        [record.Classes]int // entries of a class in the Corefile: more than capacity if memory is short
	granuleWords int                 // unit of allocation: a line, or two words when packed
	pieces       [record.Classes]int // of one shard's region
	buckets      int                 // of one shard's index
	hotSets      int                 // of one shard's hot tier, at most
	autoHot      bool                // the climber finds the hot tier's size
	hotAfter     uint32              // accesses before promotion
	tables       int64               // bytes that all stores have for hints of nxdomain_cut, and for names that have failed
	states       bool                // entries have words beside their record: see package popularity
}

// traits are what one store has of its own. In the sizes of a pool of several stores, only cuts, failures and subnets are set: to what a
// store has that has them.
type traits struct {
	stale          int64 // for how many seconds a record may be served after it has expired
	preferPositive bool
	cuts           int // words of the hints for nxdomain_cut; 0: none
	failures       int // names that have failed; 0: without MAX of servfail
	subnets        int // answers of a name that are for a prefix; 0: without ecs scoped
}

// mostMemory is the most memory that one instance may have, in bytes. An address space of 32 bits has 3 GB or less. During
// a reload both an instance and its successor are in it.
var mostMemory = func() int64 {
	if strconv.IntSize == 32 {
		return 1 << 30
	}
	return math.MaxInt64
}()

const (
	// defaultEntryBytes is the memory for the record of an entry when max_memory is not set. A typical answer takes 128
	// to 256 bytes. Memory that is never touched costs no physical memory.
	defaultEntryBytes = 1 << 10

	// leastEntryBytes is the memory of the smallest useful record, its slot and its share of the policy. When max_memory
	// is small, it bounds the number of entries that index and policy are made for.
	leastEntryBytes = 176

	// entriesPerShard is the number of entries that a shard should have. In smaller shards the policy sees too little
	// traffic. In larger shards writers wait for each other.
	entriesPerShard = 2048
	maxShards       = 256

	// pieceBytes is the size of a piece. The pieces of all shards alternate in the store's memory. Each shard fills its
	// pieces from the lowest one up, and all shards fill at about the same pace. So the used memory is dense and lies on
	// few, huge pages, whatever the bound is. A record cannot be larger than a piece.
	pieceBytes = 128 << 10
	pieceWords = pieceBytes / record.WordBytes

	// leastShardBytes is the least memory that a shard should have. It keeps the number of shards low when memory is small,
	// because shards lend each other no memory, and a record may take only a part of its shard's (maxRecordShare).
	leastShardBytes = 2 << 20

	// regionPieces is the number of pieces that the denials' share of a region should have, if the region has at least
	// eight times as many.
	regionPieces = 2

	// maxRecordShare divides a class's share of the region: one record may take one such part at most.
	maxRecordShare = 4

	packedGranuleWords  = 2
	alignedGranuleWords = record.LineBytes / record.WordBytes

	// allocatorBytes is the memory that an allocator takes for 64 granules, rounded up (see arena.Allocator.Bytes).
	allocatorBytes = 18

	// roundingBytes is the memory that index, hot tier and states take to fill whole pages.
	roundingBytes = 3 * 4096
)

// plan lays out the memory that the options ask for. All of it, with index and bookkeeping, stays within max_memory.
func plan(o *options) sizes {
	z := planFor(o, 1, ones(o.cut.on), ones(o.backsOff()))
	z.traits = z.traitsOf(o)
	return z
}

// traitsOf returns the traits of the store of a block in a pool of these sizes.
func (z *sizes) traitsOf(o *options) (t traits) {
	t.stale = int64(o.stale.upTo / time.Second)
	t.preferPositive = o.stale.preferPositive && t.stale > 0
	t.cuts, t.failures, t.subnets = z.cuts*ones(o.cut.on), z.failures*ones(o.backsOff()), o.ecs.most
	return t
}

// ones returns 1 for true, and 0 for false.
func ones(b bool) int {
	if b {
		return 1
	}
	return 0
}

// planFor lays out the memory of a pool of that many stores. o are the options of all of them together. cuts is how many stores
// have nxdomain_cut, and failing how many have a MAX of servfail.
func planFor(o *options, owners, cuts, failing int) sizes {
	z := sizes{owners: owners, hotAfter: uint32(o.promotionThreshold), granuleWords: packedGranuleWords}
	z.states = o.prefetch.amount > 0 || o.stale.recheck > 0
	if o.lineAligned {
		z.granuleWords = alignedGranuleWords
	}
	z.capacity = [record.Classes]int{o.success.capacity, o.denial.capacity}
	z.asked = z.capacity
	hotPercentage := o.hotPercentage
	if hotPercentage == hotAuto {
		hotPercentage, z.autoHot = climber.AutoHotPercentage, true
	}
	least := int64(leastEntryBytes + hotEntryBytes*hotPercentage/100)
	if z.states {
		least += popularity.WordsPerEntry * record.WordBytes
	}
	bound := o.maxMemory
	if asked := int64(z.entries()) * (defaultEntryBytes + least); bound == 0 || o.memoryAuto && asked < bound {
		bound = asked
	}
	bound = min(bound, mostMemory)
	if most := min(bound/least, math.MaxInt32); int64(z.entries()) > most {
		z.shrink(most, int64(z.entries()))
	}

	for mostShards := maxShards; ; mostShards = max(z.shards/2, 1) {
		z.cuts = cut.Words(z.capacity[record.Denial]) * min(cuts, 1)
		z.failures = backoff.Names(z.capacity[record.Denial]) * min(failing, 1)
		z.subnets = o.ecs.most
		z.tables = int64(cuts)*int64(z.cuts)*record.WordBytes + int64(failing)*backoff.Bytes(z.failures) + int64(owners)*subnet.Memory(z.prefixes())
		shards := min(z.entries()/entriesPerShard, int(bound/leastShardBytes), mostShards)
		z.shards = 1 << (bits.Len(uint(max(shards, 1))) - 1)
		perShard := z.perShard()
		z.buckets = index.Buckets(perShard)
		z.hotSets = (perShard*hotPercentage/100 + hotWays - 1) / hotWays

		// The remaining memory is for records. The classes share it in the ratio of their entries.
		left := bound/int64(z.shards) - z.overhead()
		piece := int64(pieceBytes + z.pieceGranules()/64*allocatorBytes)
		pieces := int(min(left/piece, math.MaxInt32/int64(z.pieceGranules())))
		if pieces < int(record.Classes) && z.entries() > 100 {
			if z.shards == 1 {
				z.shrink(9, 10)
			}
			continue
		}
		z.pieces[record.Denial] = int(int64(pieces) * int64(z.capacity[record.Denial]) / int64(z.entries()))
		z.pieces[record.Denial] = max(z.pieces[record.Denial], min(regionPieces, pieces/8), 1)
		z.pieces[record.Success] = max(pieces-z.pieces[record.Denial], 1)
		return z
	}
}

// entries returns the capacity of both classes together.
func (z *sizes) entries() int { return z.capacity[record.Success] + z.capacity[record.Denial] }

// most returns how many entries a class may have while the other class has fewer than its capacity.
func (z *sizes) most(c record.Class) int { return max(z.capacity[c], min(z.asked[c], z.entries())) }

// perShard returns the most entries that a shard can have.
func (z *sizes) perShard() int { return (z.entries() + z.shards - 1) / z.shards }

// stateWords returns how many words the entries of a shard have in its popularity.Table.
func (z *sizes) stateWords() int {
	if !z.states {
		return 0
	}
	return (z.perShard() + int(record.Classes)) * popularity.WordsPerEntry
}

// shrink multiplies the capacities by a fraction.
func (z *sizes) shrink(numerator, denominator int64) {
	for c := range z.capacity {
		z.capacity[c] = max(int(int64(z.capacity[c])*numerator/denominator), 1)
	}
}

// pieceGranules returns the number of granules in a piece.
func (z *sizes) pieceGranules() int { return pieceWords / z.granuleWords }

// memories returns how many keys the sketches and ghosts of all shards are made for.
func (z *sizes) memories() int64 { return int64(z.most(record.Success)) + int64(z.most(record.Denial)) }

// overhead returns the memory of one shard without its records and its allocator, in bytes.
func (z *sizes) overhead() int64 {
	return int64(z.buckets)*record.LineBytes + int64(z.hotSets)*hotSetBytes + int64(z.stateWords())*record.WordBytes +
		int64(z.perShard())*nodeBytes + z.tables/int64(z.shards) + (z.memories()/int64(z.shards)+1)*memoryBytes + int64(unsafe.Sizeof(shard{})) +
		int64(max(z.owners, 1))*int64(unsafe.Sizeof(holding{})) + roundingBytes
}

// share returns the part of n that shard i gets, 1 or more. The parts add up to n, if n is not less than shards.
func share(n, shards, i int) int {
	part := n / shards
	if i < n%shards {
		part++
	}
	return max(part, 1)
}
