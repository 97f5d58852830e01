// Package optcache is a CoreDNS plugin that answers repeated questions from memory.
package optcache

import (
	"context"
	"time"

	"github.com/coredns/coredns/plugin"

	"github.com/miekg/dns"
)

// options is what one optcache block of a Corefile asks for.
type options struct {
	zones []string // normalized origins this instance caches for

	success classOptions // positive answers
	denial  classOptions // NXDOMAIN, NODATA and failures

	servfail time.Duration // how long a failure is cached, 0 to 5m; 0: never
	keepTTL  bool          // show the original TTL instead of the remaining one

	hotPercentage      int   // share of the capacity for the hot tier, 0 to 50
	promotionThreshold int   // accesses before promotion, 1 to 255
	lineAligned        bool  // cache_line_optimization: records start on a 64-byte line
	maxMemory          int64 // bytes over everything the instance holds; 0: derived from the capacities
}

// classOptions bounds one class of answers.
type classOptions struct {
	capacity int           // entries
	maxTTL   time.Duration // cap on the TTL of an answer
	minTTL   time.Duration // floor under it
	except   []string      // normalized zones whose answers of this class are not cached
}

// Optcache is the plugin's handler.
type Optcache struct {
	Next plugin.Handler
	options
}

func newOptcache(o options) *Optcache { return &Optcache{options: o} }

// start allocates the store. It runs once the server block is complete.
func (o *Optcache) start(view string, handlers []plugin.Handler) error { return nil }

// stop releases what start took.
func (o *Optcache) stop() error { return nil }

// Name implements plugin.Handler.
func (o *Optcache) Name() string { return pluginName }

// ServeDNS implements plugin.Handler.
func (o *Optcache) ServeDNS(ctx context.Context, w dns.ResponseWriter, r *dns.Msg) (int, error) {
	return plugin.NextOrFailure(o.Name(), o.Next, ctx, w, r)
}
