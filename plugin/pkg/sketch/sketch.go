// Package sketch estimates how often keys have been asked for lately, in little memory. It does not hold the keys.
package sketch

const (
	// maxCount is where a counter of four bits stops.
	maxCount = 15

	// keysPerLine is how many keys there is a line of counters for: 8 bytes for each key.
	keysPerLine = 8

	// sampleFactor times the number of keys is how many accesses are added before all counters are halved (Einziger,
	// Friedman, Manes: TinyLFU: a highly efficient cache admission policy, 2017).
	sampleFactor = 10

	rows = 4
)

// Sketch is a count-min sketch (Cormode, Muthukrishnan: An improved data stream summary: the count-min sketch and its
// applications, 2005) that ages: from time to time all counters are halved. The four counters of a key lie in one 64-byte
// line. A Sketch is not safe for concurrent use.
type Sketch struct {
	lines  []line
	added  int // accesses since the last halving, and half of those before
	sample int // the value of added at which the counters are halved
}

// line has 128 counters, 16 in each word. A key has one counter in each pair of words.
type line [2 * rows]uint64

// LineBytes is the size of a line.
const LineBytes = 2 * rows * 8

// Lines returns how many lines a sketch for that many keys has.
func Lines(keys int) int { return (max(keys, 1) + keysPerLine - 1) / keysPerLine }

// New returns a sketch for that many keys, 1 or more.
func New(keys int) *Sketch {
	return &Sketch{lines: make([]line, Lines(keys)), sample: max(keys, 1) * sampleFactor}
}

// Memory returns the memory of the sketch's counters. It is for measuring: the caller must not read the counters. The slice
// is always the same.
func (s *Sketch) Memory() []line { return s.lines }

// line returns the line of a key, and the bits that choose the key's counters there.
func (s *Sketch) line(hash uint32) (*line, uint64) {
	h := uint64(hash) * 0x9e3779b97f4a7c15 // 2^64 over the golden ratio
	h ^= h >> 32
	h *= 0x9e3779b97f4a7c15
	return &s.lines[h>>32*uint64(len(s.lines))>>32], h
}

// counter returns the place of a row's counter: the word in the line, and the shift in the word.
func counter(row int, h uint64) (word int, shift uint64) {
	h >>= 5 * row
	return 2*row + int(h&1), (h >> 1 & 15) * 4
}

// Estimate returns how often a key has been added lately, 0 to 15. As long as nothing was halved, it is never too low. hash
// is 32 bits of a good hash of the key.
func (s *Sketch) Estimate(hash uint32) int {
	l, h := s.line(hash)
	least := uint64(maxCount)
	for row := range rows {
		word, shift := counter(row, h)
		least = min(least, l[word]>>shift&maxCount)
	}
	return int(least)
}

// Add counts n accesses to a key, n >= 0.
func (s *Sketch) Add(hash uint32, n int) {
	l, h := s.line(hash)
	for row := range rows {
		word, shift := counter(row, h)
		count := l[word] >> shift & maxCount
		l[word] += min(uint64(n), maxCount-count) << shift
	}
	if s.added += n; s.added >= s.sample {
		s.halve()
	}
}

func (s *Sketch) halve() {
	for i := range s.lines {
		for j, w := range s.lines[i] {
			s.lines[i][j] = w >> 1 & 0x7777777777777777
		}
	}
	s.added /= 2
}
