package test

import (
	"fmt"
	"net"
	"strings"
	"testing"

	"github.com/miekg/dns"
)

// poolCorefile is a server with two blocks in a pool. Each has an upstream of its own, so that its answers are not those of the
// other, and the options that are given for it.
func poolCorefile(first, second string) string {
	var text strings.Builder
	for i, options := range []string{first, second} {
		fmt.Fprintf(&text, ".:${block%d} {\n\tbind 127.0.0.1\n\terrors\n\tprometheus 127.0.0.1:${metrics}\n\toptcache {\n\t\t%s\n\t}\n"+
			"\ttemplate IN A . {\n\t\tanswer \"{{ .Name }} 3600 IN A 192.0.2.%d\"\n\t}\n}\n", i+1, options, i+1)
	}
	return text.String()
}

// Blocks of a pool have one bound, and each has its own answers, also after a reload that makes the pool anew. A Corefile whose
// blocks contradict each other is refused, with both places.
func TestPool(t *testing.T) {
	t.Parallel()
	const mb = 1 << 20
	s := start(t, poolCorefile("pool node 8MB", "pool node"))
	check := func(name string) {
		t.Helper()
		for i := range 2 {
			m, _, err := overUDP(s.addr(fmt.Sprintf("block%d", i+1)))(query(name, dns.TypeA))
			if err != nil || len(m.Answer) != 1 || !m.Answer[0].(*dns.A).A.Equal(net.IPv4(192, 0, 2, byte(i+1))) {
				t.Fatalf("block %d, %s: %v, %v", i+1, name, m, err)
			}
		}
	}
	metric := func(name string, labels ...string) float64 {
		return sum(t, s.addr("metrics"), "coredns_optcache_"+name, labels...)
	}
	for i := range 50 {
		check(fmt.Sprintf("n%d.example.org.", i))
	}
	bound := metric("pool_memory_limit_bytes", `pool="node"`)
	if bound > 8*mb || bound < 4*mb || metric("memory_limit_bytes") != 0 || metric("pool_memory_bytes") > bound {
		t.Errorf("the pool's bound is %.0f, that of its blocks %.0f", bound, metric("memory_limit_bytes"))
	}
	for i := range 2 {
		server := fmt.Sprintf("block%d", i+1)
		if n := metric("entries", s.ports[server]); n != 50 {
			t.Errorf("%s has %.0f entries", server, n)
		}
		if n := metric("memory_bytes", s.ports[server]); n <= 0 || n >= metric("pool_memory_bytes") {
			t.Errorf("%s has %.0f bytes", server, n)
		}
	}
	s.write(poolCorefile("pool node\n\t\tserve_stale", "pool node 4MB"))
	s.reload(reloaded)
	eventually(t, func() error {
		if n := metric("entries"); n != 100 {
			return fmt.Errorf("%.0f entries after a reload", n)
		}
		return nil
	})
	misses := metric("misses_total")
	for i := range 50 {
		check(fmt.Sprintf("n%d.example.org.", i))
	}
	if n := metric("misses_total") - misses; n != 0 {
		t.Errorf("%.0f misses after a reload", n)
	}
	if n := metric("pool_memory_limit_bytes"); n > 4*mb {
		t.Errorf("the pool's bound is %.0f after a reload", n)
	}
	s.write(poolCorefile("pool node 4MB", "pool node 8MB"))
	s.reload(refused)
	if out := s.out.String(); !strings.Contains(out, s.conf+":17 - pool SIZE: 8388608 bytes contradicts the 4194304 bytes") || !strings.Contains(out, s.conf+":6") {
		t.Errorf("the log does not say what is wrong: %s", out)
	}
	check("n1.example.org.")
}
