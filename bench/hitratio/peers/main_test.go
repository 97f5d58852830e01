package main

import (
	"encoding/csv"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func TestCSV(t *testing.T) {
	t.Parallel()
	var out, messages strings.Builder
	missing := filepath.Join(t.TempDir(), "missing.txt.gz")
	err := run([]string{
		"-sizes", "1024,2048", "-policies", "lru,limit", missing,
		writeTrace(t, "a.txt.gz", "0\n1\n0\n"), writeTrace(t, "b.txt.gz", "0 0 30\n1 0 30\n"),
	}, &out, &messages)
	if err != nil {
		t.Fatal(err)
	}
	const want = `trace,size,policy,hit_ratio
a,1024,lru,33.33
a,1024,limit,33.33
a,2048,lru,33.33
a,2048,limit,33.33
b,1024,lru,50.00
b,1024,limit,50.00
b,2048,lru,50.00
b,2048,limit,50.00
`
	if out.String() != want {
		t.Errorf("got\n%s\nwant\n%s", &out, want)
	}
	if got := messages.String(); !strings.Contains(got, "skipped") || !strings.Contains(got, missing) {
		t.Errorf("got message %q, want one that names %s", got, missing)
	}
}

// Answers of 64,000 bytes, 40 of which are more than fits into 1 MB.
func TestBoundByMemory(t *testing.T) {
	t.Parallel()
	var lines strings.Builder
	for i := range 80 {
		fmt.Fprintf(&lines, "%d %d 300 64000\n", i, i%40)
	}
	var out strings.Builder
	if err := run([]string{"-memory", "1,64", writeTrace(t, "a.txt.gz", lines.String())}, &out, io.Discard); err != nil {
		t.Fatal(err)
	}
	var small, large float64
	if _, err := fmt.Sscanf(out.String(), "trace,size,policy,hit_ratio\na,1,optcache,%f\na,64,optcache,%f\n", &small, &large); err != nil {
		t.Fatalf("%v: %s", err, &out)
	}
	if small > 10 || large != 50 {
		t.Errorf("%v and %v %%, want few and 50", small, large)
	}
	if err := run([]string{"-memory", "0", "x"}, io.Discard, io.Discard); err == nil {
		t.Error("a bound of nothing is taken")
	}
}

// Of what was in the cache in the middle of a trace, a restart keeps all.
func TestRestart(t *testing.T) {
	t.Parallel()
	var out strings.Builder
	if err := run([]string{"-sizes", "1024", "-restart", writeTrace(t, "a.txt.gz", "0 0 30\n1 1 30\n2 0 30\n3 1 30\n")}, &out, io.Discard); err != nil {
		t.Fatal(err)
	}
	const want = `trace,size,policy,hit_ratio
a,1024,optcache,100.00
a,1024,optcache-restarted,100.00
a,1024,optcache-emptied,0.00
`
	if out.String() != want {
		t.Errorf("got\n%s\nwant\n%s", &out, want)
	}
}

func TestAllPoliciesAreTheDefault(t *testing.T) {
	t.Parallel()
	var out strings.Builder
	if err := run([]string{"-sizes", "1024", writeTrace(t, "a.txt.gz", "0\n0\n")}, &out, io.Discard); err != nil {
		t.Fatal(err)
	}
	records, err := csv.NewReader(strings.NewReader(out.String())).ReadAll()
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, r := range records[1:] {
		names = append(names, r[2])
		if r[3] != "50.00" {
			t.Errorf("%s: got %s, want 50.00", r[2], r[3])
		}
	}
	want := []string{"optcache", "cache", "lru", "2q", "arc", "otter", "theine", "limit"}
	if !slices.Equal(names, want) {
		t.Errorf("got %v, want %v", names, want)
	}
}

func TestWrongArgumentsAreErrors(t *testing.T) {
	t.Parallel()
	good := writeTrace(t, "a.txt.gz", "0\n")
	bad := writeTrace(t, "b.txt.gz", "0\nx\n")
	for _, tc := range []struct {
		args []string
		word string
	}{
		{nil, "usage"},
		{[]string{"-no-such-flag", good}, "usage"},
		{[]string{"-sizes", "many", good}, "many"},
		{[]string{"-sizes", "1023", good}, "1023"},
		{[]string{"-sizes", "", good}, "bad size"},
		{[]string{"-policies", "lru,fifo", good}, "fifo"},
		{[]string{"-runs", "0", good}, "-runs"},
		{[]string{"-policies", "lru", bad}, bad + ":2:"},
		{[]string{"-policies", "lru", "-svg", filepath.Join(t.TempDir(), "no", "dir.svg"), good}, "dir.svg"},
	} {
		err := run(tc.args, io.Discard, io.Discard)
		if err == nil || !strings.Contains(err.Error(), tc.word) {
			t.Errorf("%v: got error %v, want one with %q", tc.args, err, tc.word)
		}
	}
}

func TestMedian(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		values []int
		want   float64
	}{{[]int{7}, 7}, {[]int{9, 1, 2}, 2}, {[]int{4, 1, 3, 100}, 3.5}} {
		if got := median(tc.values); got != tc.want {
			t.Errorf("%v: got %v, want %v", tc.values, got, tc.want)
		}
	}
}

// A policy that fails is an error of the whole run, not a hit ratio of 0.
func TestFailureOfAPolicyIsReported(t *testing.T) {
	t.Parallel()
	broken := policy{"broken", false, func(*trace, int) (int, error) { return 0, errors.New("no memory") }}
	_, err := measure(parsed(t, "0,0"), []int{minSize}, []policy{broken}, 1)
	if err == nil || !strings.Contains(err.Error(), "broken at 1024: no memory") {
		t.Errorf("got error %v", err)
	}
}

func TestChartIsWellFormed(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "chart.svg")
	args := []string{"-sizes", "1024,2048", "-svg", path, writeTrace(t, "a<&>.txt.gz", "0\n0\n"), writeTrace(t, "b.txt.gz", "0\n1\n")}
	if err := run(args, io.Discard, io.Discard); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	count := map[string]int{}
	var words []string
	for d := xml.NewDecoder(f); ; {
		token, err := d.Token()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		switch token := token.(type) {
		case xml.StartElement:
			count[token.Name.Local]++
			for _, a := range token.Attr {
				if strings.Contains(a.Value, "NaN") || strings.Contains(a.Value, "Inf") {
					t.Errorf("%s has %s=%q", token.Name.Local, a.Name.Local, a.Value)
				}
			}
		case xml.CharData:
			words = append(words, string(token))
		}
	}
	// The page; a bar for each trace, size and policy that is no limit; their colours in the legend.
	bars := len(policies) - 1
	if want := 1 + 2*2*bars + bars; count["rect"] != want {
		t.Errorf("got %d rectangles, want %d", count["rect"], want)
	}
	for _, w := range []string{"a<&>", "b", "1024 answers", "2048 answers", "optcache", "theine", "hits, %"} {
		if !slices.Contains(words, w) {
			t.Errorf("no %q in %q", w, words)
		}
	}
}
