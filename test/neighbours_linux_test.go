package test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"
)

// Several processes serve one address, as in a rolling update on a host's network: they come and go, in any order, with
// notice and without. No query is lost while they end as they should, and soon all plain queries are on a fast path again.
func TestProcessesShareAnAddress(t *testing.T) {
	t.Parallel()
	u := newUpstream(t)
	corefile := block("dns", u.addr, "prometheus 127.0.0.1:${metrics}", "optcache {\n\t\tfastpath 1\n\t}")
	q := query("www.example.org.", dns.TypeA)
	first := start(t, corefile)
	send := overUDP(first.addr("dns"))
	beside := func() *server {
		return start(t, strings.ReplaceAll(corefile, "${dns}", first.ports["dns"]))
	}
	hits := func(s *server) float64 { return sum(t, s.addr("metrics"), "coredns_optcache_fastpath_hits_total") }

	// fast waits until queries are answered by fast paths only. takes are those that must get some of them.
	slowest := time.Duration(0)
	fast := func(what string, living []*server, takes ...*server) {
		t.Helper()
		const asked = 100
		began := time.Now()
		eventually(t, func() error {
			before := make(map[*server]float64)
			for _, s := range living {
				before[s] = hits(s)
			}
			for range asked {
				m := q.Copy()
				m.Id = dns.Id()
				if reply, _, err := send(m); err != nil || len(reply.Answer) == 0 {
					return fmt.Errorf("%s: %v, %v", what, err, reply)
				}
			}
			time.Sleep(pollEvery) // a worker answers first, and counts then
			by := make(map[*server]float64)
			all := 0.0
			for _, s := range living {
				by[s] = hits(s) - before[s]
				all += by[s]
			}
			if all < asked {
				return fmt.Errorf("%s: %v of %d queries were answered by fast paths", what, all, asked)
			}
			for _, s := range takes {
				if by[s] == 0 {
					return fmt.Errorf("%s: one that should get queries got none", what)
				}
			}
			return nil
		})
		slowest = max(slowest, time.Since(began))
	}

	fast("alone", []*server{first}, first)
	stop := steady(t, first, q)
	second := beside()
	fast("a second one came", []*server{first, second}, second)
	first.terminate()
	fast("the first one went", []*server{second}, second)
	third := beside()
	fast("a third one came", []*server{second, third}, third)
	third.terminate()
	fast("the younger one went", []*server{second}, second)
	third = beside()
	fourth := beside()
	fast("two came", []*server{second, third, fourth}, fourth)
	third.terminate()
	fast("the middle one went", []*server{second, fourth}, fourth)
	second.terminate()
	fast("the oldest one went", []*server{fourth}, fourth)
	t.Logf("%d queries were answered meanwhile; it took %v at the most until all were by fast paths", stop(), slowest)

	// What the kernel had put into the sockets of one that is killed is lost, and nothing else.
	slowest = 0
	kill := func(s *server) {
		s.stopped = true
		s.kill()
	}
	fifth := beside()
	fast("another one came", []*server{fourth, fifth}, fifth)
	kill(fifth)
	fast("the younger one was killed", []*server{fourth}, fourth)
	fifth = beside()
	fast("another one came again", []*server{fourth, fifth}, fifth)
	kill(fourth)
	fast("the older one was killed", []*server{fifth}, fifth)
	t.Logf("after kills, it took %v at the most", slowest)
}
