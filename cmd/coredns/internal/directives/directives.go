// Package directives puts optcache into CoreDNS's order of plugins. It imports none of them, so
// its test checks the order without linking a CoreDNS.
package directives

import "slices"

const (
	optcache = "optcache"
	cache    = "cache"
)

// WithOptcache returns stock with optcache inserted directly before cache; stock itself is left
// alone. It panics where stock has no cache: there is no right place then, and only another
// version of CoreDNS can bring that about.
func WithOptcache(stock []string) []string {
	i := slices.Index(stock, cache)
	if i < 0 {
		panic("directives: CoreDNS has no directive " + cache + " to stand before")
	}
	return slices.Insert(slices.Clone(stock), i, optcache)
}
