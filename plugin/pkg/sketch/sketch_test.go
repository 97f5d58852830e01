package sketch

import (
	"math/rand/v2"
	"testing"
	"unsafe"
)

// These tests compare the sketch's estimates with true counts.

func TestNeverBelowTheTruthUntilItForgets(t *testing.T) {
	const keys = 1000
	s := New(keys)
	rng := rand.New(rand.NewPCG(1, 2))
	truth := map[uint32]int{}
	for range keys * sampleFactor / 2 {
		key := uint32(rng.IntN(3000)) * 2654435761
		n := 1 + rng.IntN(2)
		if s.added+n >= s.sample {
			break
		}
		s.Add(key, n)
		truth[key] += n
	}
	tooHigh := 0
	for key, n := range truth {
		got := s.Estimate(key)
		if got < min(n, maxCount) {
			t.Fatalf("key %d: estimate %d, true %d", key, got, n)
		}
		if got > n+2 {
			tooHigh++
		}
	}
	if tooHigh > len(truth)/10 {
		t.Errorf("%d of %d estimates are off by more than two", tooHigh, len(truth))
	}
}

func TestCounterStopsAtItsTop(t *testing.T) {
	s := New(100)
	s.Add(7, 9)
	s.Add(7, 9)
	if got := s.Estimate(7); got != maxCount {
		t.Fatalf("estimate %d", got)
	}
	for key := range uint32(1000) {
		if key != 7 && s.Estimate(key) > maxCount {
			t.Fatal("a counter ran over into its neighbour")
		}
	}
}

func TestHalvesAfterASample(t *testing.T) {
	const keys = 64
	s := New(keys)
	s.Add(1, 12)
	for range keys*sampleFactor - 13 {
		s.Add(2, 1)
	}
	if got := s.Estimate(1); got != 12 {
		t.Fatalf("estimate %d before the sample is over", got)
	}
	s.Add(2, 1)
	if got := s.Estimate(1); got != 6 {
		t.Fatalf("estimate %d after it", got)
	}
}

func TestSizeIsThatOfItsLines(t *testing.T) {
	if unsafe.Sizeof(line{}) != LineBytes {
		t.Fatal("a line is no cache line")
	}
	for keys, lines := range map[int]int{1: 1, 8: 1, 9: 2, 16: 2, 17: 3, 1000: 125} {
		if got := Lines(keys); got != lines {
			t.Errorf("%d keys: %d lines, want %d", keys, got, lines)
		}
	}
}

func BenchmarkAdd(b *testing.B) {
	s := New(10_000)
	for i := 0; b.Loop(); i++ {
		s.Add(uint32(i)*2654435761, 1)
	}
}
