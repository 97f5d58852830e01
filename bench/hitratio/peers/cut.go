package main

import (
	"errors"

	"github.com/optcache/optcache"
)

// This file is -cut: what nxdomain_cut probe answers of a cluster's trace.
//
// A trace has no names. It shows search lists, though: a lookup of an external name asks for it in three domains of the cluster, whose
// denials live 30 s, then in the domain of the node, 60 s, each for A and AAAA, and then for the name itself. The names above the
// denied ones are made up: each external name has one of tlds top-level domains, drawn with Zipf's weights, and each name in the
// first domain belongs to one of so many namespaces. So there are tlds*(namespaces+3) names that a cut can stand at.

const (
	tlds              = 12
	defaultNamespaces = 20

	listed = 8 // requests of a search list that are denied: four domains, two types
)

var errNoLists = errors.New("-cut: the trace has no search lists: six denials of 30 s, two of 60 s, then the name")

// markLists sets, in the requests of search lists, the name above that does not exist, and returns how many lists there are.
func markLists(t *trace, namespaces uint32) (lists int) {
	end := 0 // of the last list
	for i := 0; i+listed+2 <= len(t.requests); i++ {
		list := t.requests[i:][:listed]
		if i < end || !isList(list) {
			continue
		}
		lists++
		end = i + listed + 2
		tld := zipf(t.requests[i+listed].key)
		namespace := mix(list[0].key) % namespaces
		for j := range list {
			domain := uint32(j / 2) // 0 is that of the namespace
			above := tld*(namespaces+3) + namespaces + domain - 1
			if domain == 0 {
				above = tld*(namespaces+3) + namespace
			}
			list[j].above = above + 1
		}
	}
	return lists
}

func isList(list []request) bool {
	for j, r := range list {
		want := uint32(30)
		if j >= listed-2 {
			want = 60
		}
		if r.ttl != want {
			return false
		}
	}
	return true
}

// mix spreads a key over all numbers.
func mix(key uint32) uint32 {
	x := uint64(key)*0x9e3779b97f4a7c15 + 0x632be59bd9b4e019
	x ^= x >> 29
	x *= 0xbf58476d1ce4e5b9
	return uint32(x >> 32)
}

// zipf returns the top-level domain of a name, 0 to tlds-1: the first has twice the names of the second.
func zipf(key uint32) uint32 {
	const unit = 27720 // a multiple of 1 to tlds
	sum := uint32(0)
	for i := range uint32(tlds) {
		sum += unit / (i + 1)
	}
	at := mix(key) % sum
	for i := range uint32(tlds) {
		if at < unit/(i+1) {
			return i
		}
		at -= unit / (i + 1)
	}
	return tlds - 1
}

// cuts are what -cut prints: the share of requests that are answered here, without the option and with it, and the share that the
// upstream is spared when the probes are taken off.
var cuts = []policy{
	{"optcache", true, online(newOptcache)},
	{"optcache-probe", true, online(newCut)},
	{"optcache-probe-spared", true, spared},
	{"limit", false, limit},
}

// cutEngine is the real one with nxdomain_cut probe.
type cutEngine struct {
	*optcache.Simulation
	probes int
}

func newCut(_ *trace, size int) (driver, error) {
	s, err := optcache.NewCutSimulation(size)
	return &cutEngine{Simulation: s}, err
}

func (c *cutEngine) request(r request) bool {
	if r.above == 0 {
		return engine{c.Simulation}.request(r)
	}
	answered, probed := c.RequestBelow(uint64(r.key), uint64(r.above), r.ttl, r.at)
	if probed {
		c.probes++
	}
	return answered
}

func (c *cutEngine) close() { c.Simulation.Close() }

func spared(t *trace, size int) (int, error) {
	var c *cutEngine
	hits, err := online(func(t *trace, size int) (driver, error) {
		d, err := newCut(t, size)
		c = d.(*cutEngine)
		return d, err
	})(t, size)
	if err != nil {
		return 0, err
	}
	return hits - c.probes, nil
}
