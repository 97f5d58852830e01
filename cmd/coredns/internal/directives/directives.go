// Package directives puts optcache into CoreDNS's order of plugins. It imports no plugin, so that its test checks the
// order without linking a whole CoreDNS.
package directives

import "slices"

const (
	optcache = "optcache"
	cache    = "cache"
)

// WithOptcache returns a copy of stock with optcache directly before cache. It panics if stock has no cache: then
// optcache has no right place. Only another version of CoreDNS can have such an order.
func WithOptcache(stock []string) []string {
	i := slices.Index(stock, cache)
	if i < 0 {
		panic("directives: CoreDNS has no directive " + cache + " to stand before")
	}
	return slices.Insert(slices.Clone(stock), i, optcache)
}
