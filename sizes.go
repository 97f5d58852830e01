package optcache

import (
	"math"
	"math/bits"
	"time"
	"unsafe"

	"github.com/optcache/optcache/plugin/pkg/index"
)

// This file lays out the memory of a store: how many shards, how large each part, so that all of
// it stays within one bound in bytes.

// sizes is how the memory of a store is laid out.
type sizes struct {
	shards       int
	capacity     [classes]int // entries
	granuleWords int          // unit of allocation: a line, or two words when packed
	pieces       [classes]int // of one shard's region
	buckets      int          // of one shard's index
	hotSets      int          // of one shard, at the most
	autoHot      bool         // the hot tier's size is looked for
	hotAfter     uint32       // accesses before promotion
	states       bool         // entries have words beside their record: see state.go

	stale          int64 // for how many seconds a record may be served after it has expired
	preferPositive bool
}

const (
	// defaultEntryBytes is the memory that the default bound allows for an entry. A typical
	// answer takes 128 to 256 bytes; what is never touched costs no physical memory.
	defaultEntryBytes = 1 << 10

	// leastEntryBytes is what the smallest useful record, its slot and the policy take. It
	// bounds the entries that an index is made for when max_memory is small.
	leastEntryBytes = 176

	// entriesPerShard is the size a shard should have. Smaller ones cut the policy's view of
	// the traffic short, larger ones make writers wait for each other.
	entriesPerShard = 2048
	maxShards       = 256

	// pieceBytes is the unit in which the shards' regions take their turns in the arena. Each
	// region fills from its low end, all at about the same pace, so that what is used of the
	// arena is dense and lies on few, huge pages, whatever the bound is. No record is larger
	// than a piece.
	pieceBytes = 128 << 10
	pieceWords = pieceBytes / wordBytes

	// leastShardBytes is the memory that a shard should have at the least. It keeps the shards few
	// when memory is small, for what one class leaves unused in a shard the other cannot have.
	leastShardBytes = 2 << 20

	// regionPieces is the size that a region should have where there are eight times as many.
	regionPieces = 2

	// maxRecordShare is the part of its region that one record may take.
	maxRecordShare = 4

	packedGranuleWords  = 2
	alignedGranuleWords = lineBytes / wordBytes

	// allocatorBytes is what an allocator takes for 64 granules, and a little more.
	allocatorBytes = 18

	// roundingBytes is what index, hot tier and states may take more, to fill whole pages.
	roundingBytes = 3 * 4096
)

// plan lays out the memory that the options ask for. The whole, index and bookkeeping
// included, stays within the bound in bytes.
func plan(o *options) sizes {
	z := sizes{hotAfter: uint32(o.promotionThreshold), granuleWords: packedGranuleWords}
	z.stale = int64(o.stale.upTo / time.Second)
	z.preferPositive = o.stale.preferPositive && z.stale > 0
	z.states = o.prefetch.amount > 0 || o.stale.recheck > 0
	if o.lineAligned {
		z.granuleWords = alignedGranuleWords
	}
	z.capacity = [classes]int{o.success.capacity, o.denial.capacity}
	hotPercentage := o.hotPercentage
	if hotPercentage == hotAuto {
		hotPercentage, z.autoHot = autoHotPercentage, true
	}
	least := int64(leastEntryBytes + hotEntryBytes*hotPercentage/100)
	if z.states {
		least += stateBytes
	}
	bound := o.maxMemory
	if bound == 0 {
		bound = int64(z.entries()) * (defaultEntryBytes + least)
	}
	if most := min(bound/least, math.MaxInt32); int64(z.entries()) > most {
		z.shrink(most, int64(z.entries()))
	}

	for mostShards := maxShards; ; mostShards = max(z.shards/2, 1) {
		shards := min(z.entries()/entriesPerShard, int(bound/leastShardBytes), mostShards)
		z.shards = 1 << (bits.Len(uint(max(shards, 1))) - 1)
		perShard := z.perShard()
		z.buckets = index.Buckets(perShard)
		z.hotSets = (perShard*hotPercentage/100 + hotWays - 1) / hotWays

		// What remains is for the records, shared between the classes as the entries are.
		left := bound/int64(z.shards) - z.overhead()
		piece := int64(pieceBytes + z.pieceGranules()/64*allocatorBytes)
		pieces := int(min(left/piece, math.MaxInt32/int64(z.pieceGranules())))
		if pieces < int(classes) && z.entries() > 100 {
			if z.shards == 1 {
				z.shrink(9, 10)
			}
			continue
		}
		z.pieces[denial] = int(int64(pieces) * int64(z.capacity[denial]) / int64(z.entries()))
		z.pieces[denial] = max(z.pieces[denial], min(regionPieces, pieces/8), 1)
		z.pieces[success] = max(pieces-z.pieces[denial], 1)
		return z
	}
}

// entries is the capacity of both classes.
func (z *sizes) entries() int { return z.capacity[success] + z.capacity[denial] }

// perShard is the most entries that a shard has.
func (z *sizes) perShard() int { return (z.entries() + z.shards - 1) / z.shards }

// stateWords is how many words the entries of a shard have beside their records.
func (z *sizes) stateWords() int {
	if !z.states {
		return 0
	}
	return (z.perShard() + int(classes)) * stateWords
}

// shrink multiplies the capacities by a fraction.
func (z *sizes) shrink(numerator, denominator int64) {
	for c := range z.capacity {
		z.capacity[c] = max(int(int64(z.capacity[c])*numerator/denominator), 1)
	}
}

// pieceGranules is the number of granules in a piece.
func (z *sizes) pieceGranules() int { return pieceWords / z.granuleWords }

// overhead is the memory of one shard without its records, in bytes.
func (z *sizes) overhead() int64 {
	return int64(z.buckets)*lineBytes + int64(z.hotSets)*hotSetBytes + int64(z.stateWords())*wordBytes +
		int64(z.perShard())*policyBytes + int64(unsafe.Sizeof(shard{})) + roundingBytes
}

// share is the part of n that shard i gets; the parts add up to n.
func share(n, shards, i int) int {
	part := n / shards
	if i < n%shards {
		part++
	}
	return max(part, 1)
}
