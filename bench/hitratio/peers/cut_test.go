package main

import (
	"fmt"
	"io"
	"strings"
	"testing"
)

// lookup is a lookup of an external name with a search list. Its keys begin at first.
func lookup(at, first int) string {
	var b strings.Builder
	for i, ttl := range []int{30, 30, 30, 30, 30, 30, 60, 60, 300, 60} {
		fmt.Fprintf(&b, "%d %d %d\n", at, first+i, ttl)
	}
	return b.String()
}

func TestSearchListsAreFound(t *testing.T) {
	lines := "0 0 30\n0 1 30\n" + lookup(0, 2) + "1 12 60\n1 13 60\n" + lookup(2, 14) + "3 24 30\n"
	tr, _, err := parseTrace(strings.NewReader(lines))
	if err != nil {
		t.Fatal(err)
	}
	if n := markLists(tr, 20); n != 2 {
		t.Fatalf("%d lists", n)
	}
	for i, r := range tr.requests {
		if in := i >= 2 && i < 10 || i >= 14 && i < 22; (r.above > 0) != in {
			t.Errorf("request %d: above %d", i, r.above)
		}
		if i >= 2 && i < 10 && (i%2 == 0) && r.above != tr.requests[i+1].above {
			t.Errorf("A and AAAA of request %d are below different names", i)
		}
	}
	if n := zipf(7); n >= tlds {
		t.Errorf("top-level domain %d", n)
	}
}

// External names that are asked for once are answered from cuts: all but what finds the cuts.
func TestCutAnswersWhatIsAskedForOnce(t *testing.T) {
	var lines strings.Builder
	const lookups = 3000
	for i := range lookups {
		lines.WriteString(lookup(i/200, 10*i))
	}
	var out strings.Builder
	if err := run([]string{"-cut", "-namespaces", "5", "-sizes", "49664", "-runs", "1", writeTrace(t, "k.txt.gz", lines.String())}, &out, io.Discard); err != nil {
		t.Fatal(err)
	}
	var today, probe, spared, limit float64
	if _, err := fmt.Sscanf(strings.NewReplacer("trace,size,policy,hit_ratio\n", "", "k,49664,", "", ",", " ").Replace(out.String()),
		"optcache %f\noptcache-probe %f\noptcache-probe-spared %f\nlimit %f", &today, &probe, &spared, &limit); err != nil {
		t.Fatalf("%v: %s", err, out.String())
	}
	if today != 0 || limit != 0 || probe < 78 || probe > 80 || spared >= probe || spared < 77 {
		t.Errorf("%v today, %v with probe, %v spared, limit %v", today, probe, spared, limit)
	}
	if err := run([]string{"-cut", writeTrace(t, "n.txt.gz", "0 0 30\n0 1 30\n")}, io.Discard, io.Discard); err == nil || !strings.Contains(err.Error(), "no search lists") {
		t.Error(err)
	}
}
