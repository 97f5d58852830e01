package snapshot

import (
	"bytes"
	"io"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"
)

// This file measures writing and reading.

const benchRecords = 100_000

// BenchmarkWrite writes 100,000 answers to a file. zstd-ratio is its time, divided by the time that the encoder alone
// takes to compress the same bytes without writing them.
func BenchmarkWrite(b *testing.B) {
	records := typical(benchRecords)
	plain := unzip(b, pack(b, testHeader, records))
	path := filepath.Join(b.TempDir(), "cache")
	var stats Stats
	b.ReportAllocs()
	for b.Loop() {
		var err error
		if stats, err = Write(path, testHeader, slices.Values(records)); err != nil {
			b.Fatal(err)
		}
	}
	report(b, stats, len(plain), fastest(b, func() error {
		z, err := zstd.NewWriter(io.Discard, zstd.WithEncoderConcurrency(1), zstd.WithEncoderLevel(level),
			zstd.WithWindowSize(window), zstd.WithLowerEncoderMem(true))
		if err != nil {
			return err
		}
		if _, err := z.Write(plain); err != nil {
			return err
		}
		return z.Close()
	}))
}

// BenchmarkRead reads 100,000 answers from a file. zstd-ratio is its time, divided by the time of the decoder alone.
func BenchmarkRead(b *testing.B) {
	records := typical(benchRecords)
	file := pack(b, testHeader, records)
	plain := unzip(b, file)
	path := filepath.Join(b.TempDir(), "cache")
	if _, err := Write(path, testHeader, slices.Values(records)); err != nil {
		b.Fatal(err)
	}
	var stats Stats
	b.ReportAllocs()
	for b.Loop() {
		var err error
		if stats, err = Read(path, Limits{}, nil, func(*Record) error { return nil }); err != nil {
			b.Fatal(err)
		}
	}
	report(b, stats, len(plain), fastest(b, func() error {
		z, err := zstd.NewReader(bytes.NewReader(file), zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true))
		if err != nil {
			return err
		}
		defer z.Close()
		_, err = io.Copy(io.Discard, z)
		return err
	}))
}

// fastest returns the shortest time that f takes.
func fastest(b *testing.B, f func() error) time.Duration {
	var times []time.Duration
	for range 5 {
		begun := time.Now()
		if err := f(); err != nil {
			b.Fatal(err)
		}
		times = append(times, time.Since(begun))
	}
	return slices.Min(times)
}

func report(b *testing.B, stats Stats, plain int, alone time.Duration) {
	each := b.Elapsed() / time.Duration(b.N)
	b.ReportMetric(float64(each)/float64(alone), "zstd-ratio")
	b.ReportMetric(float64(each.Nanoseconds())/benchRecords, "ns/record")
	b.ReportMetric(float64(stats.Bytes)/benchRecords, "file-B/record")
	b.ReportMetric(float64(plain)/benchRecords, "plain-B/record")
}
