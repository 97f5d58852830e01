package optcache

import (
	"path/filepath"
	"testing"
	"time"
)

// BenchmarkSnapshot writes 200,000 answers to a file, and takes them in again: with all that is done to each, and not
// only the file's part of it, which plugin/pkg/snapshot measures.
func BenchmarkSnapshot(b *testing.B) {
	const answers = 200_000
	x, err := NewSimulation(answers+answers/5, 10)
	if err != nil {
		b.Fatal(err)
	}
	defer x.Close()
	for i := range answers {
		x.Request(uint64(i), 3600, 0, 0)
	}
	x.o.file.path = filepath.Join(b.TempDir(), "answers")
	wall := time.Unix(1e9, 0)
	if _, err := x.o.writeAnswers(wall, nil); err != nil {
		b.Fatal(err)
	}
	perAnswer := func(b *testing.B) {
		b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/answers, "ns/answer")
	}
	b.Run("write", func(b *testing.B) {
		for b.Loop() {
			if stats, err := x.o.writeAnswers(wall, nil); err != nil || stats.Records != answers {
				b.Fatal(stats, err)
			}
		}
		perAnswer(b)
	})
	b.Run("read", func(b *testing.B) {
		for b.Loop() {
			b.StopTimer()
			y, err := simulate(x.o.options)
			if err != nil {
				b.Fatal(err)
			}
			b.StartTimer()
			k := new(snapshotter)
			if err := k.read(y.o, 0, wall, nil); err != nil || k.loaded.Load() != answers {
				b.Fatal(k.loaded.Load(), err)
			}
			b.StopTimer()
			y.Close()
			b.StartTimer()
		}
		perAnswer(b)
	})
}
