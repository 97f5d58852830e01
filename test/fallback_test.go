package test

import (
	"strings"
	"testing"

	"github.com/miekg/dns"
)

// use_optimized_cache false: the built-in cache answers, counts under its own name, and the
// options that it lacks are named.
func TestBuiltInCacheTakesOver(t *testing.T) {
	t.Parallel()
	u := newUpstream(t)
	s := start(t, block("dns", u.addr, "prometheus 127.0.0.1:${metrics}", `optcache 60 {
		success 5000
		prefetch 10
		hot_cache_percentage 20
		use_optimized_cache false
	}`))
	for range 3 {
		m := ask(t, overUDP(s.addr("dns")), query("www.example.org.", dns.TypeA))
		if n := ttl(t, m); n > 60 || n < 50 {
			t.Errorf("TTL %d", n)
		}
	}
	if n := u.count("www.example.org.", dns.TypeA); n != 1 {
		t.Errorf("upstream was asked %d times", n)
	}
	if n := sum(t, s.addr("metrics"), "coredns_cache_hits_total"); n != 2 {
		t.Errorf("coredns_cache_hits_total is %v", n)
	}
	if n := sum(t, s.addr("metrics"), "coredns_optcache_requests_total"); n != 0 {
		t.Errorf("coredns_optcache_requests_total is %v", n)
	}
	if out := s.out.String(); !strings.Contains(out, "hot_cache_percentage") {
		t.Errorf("no warning: %s", out)
	}
}
