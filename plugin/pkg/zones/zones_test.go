package zones

import (
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/coredns/coredns/plugin"

	"github.com/miekg/dns"
)

func TestZoneTable(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 19))
	for _, n := range []int{0, 1, fewZones, fewZones + 1, 200} {
		var zones plugin.Zones
		var table Table[string]
		for range n {
			zone := randomZone(rnd)
			zones = append(zones, zone)
			name, ok := Wire(zone)
			if !ok {
				t.Fatalf("%q is no zone", zone)
			}
			table.Add(name, zone)
			table.Add(name, "another") // the first one stays
		}
		for range 500 {
			qname := randomZone(rnd)
			name, _ := Wire(qname)
			got := ""
			if z := table.Find(name); z != nil {
				got = *z
			}
			if want := zones.Matches(qname); got != want {
				t.Fatalf("of %d zones, %s is in %q, want %q", n, qname, got, want)
			}
		}
	}
}

// randomZone returns one of few names, so that many zones are inside others.
func randomZone(rnd *rand.Rand) string {
	name := "."
	for range rnd.IntN(6) {
		label := string(rune('a' + rnd.IntN(3)))
		if rnd.IntN(4) == 0 {
			label = label + label
		}
		name = dns.Fqdn(label + "." + name)
		if name[len(name)-2:] == ".." {
			name = name[:len(name)-1]
		}
	}
	return name
}

func BenchmarkZones(b *testing.B) {
	for _, n := range []int{1, fewZones, fewZones + 1, 100, 10_000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			var table Table[int]
			for i := range n {
				name, _ := Wire(fmt.Sprintf("zone-%d.example.org.", i))
				table.Add(name, i)
			}
			name, _ := Wire(fmt.Sprintf("www.zone-%d.example.org.", n/2))
			b.ReportAllocs()
			for b.Loop() {
				if table.Find(name) == nil {
					b.Fatal("not found")
				}
			}
		})
	}
}
