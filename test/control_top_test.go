package test

import (
	"encoding/json"
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	"github.com/miekg/dns"

	"github.com/optcache/optcache/plugin/control/api"
)

// statusOf returns what optcachectl status says of the blocks.
func statusOf(t *testing.T, addr string) []api.BlockStatus {
	t.Helper()
	var status api.StatusReply
	if err := json.Unmarshal([]byte(done(t, addr, "status", "-o", "json")), &status); err != nil {
		t.Fatal(err)
	}
	return status.Blocks
}

// The counts and the ratio of the last minute go on over reloads, of which the generation is the number, however many blocks
// there are.
func TestStatusOverReloads(t *testing.T) {
	t.Parallel()
	u := newUpstream(t)
	addr := "unix://" + filepath.Join(shortDir(t), "control.sock")
	cache := "optcache {\n\t\tcontrol " + addr + "\n\t}"
	s := start(t, block("dns", u.addr, cache)+block("other", u.addr, cache)+block("third", u.addr, cache))
	const names, reloads = 20, 3
	askHosts(t, s, names)
	askHosts(t, s, names)
	eventually(t, func() error { // a worker of the fast path answers first, and counts then
		if n := statusOf(t, addr)[0].Requests; n != 2*names {
			return fmt.Errorf("%d requests are counted, want %d", n, 2*names)
		}
		return nil
	})
	for range reloads {
		s.reload(reloaded)
	}
	after := statusOf(t, addr)
	if b := after[0]; len(after) != 3 || b.Requests != 2*names || b.Misses != names || b.Generation != reloads {
		t.Errorf("after the reloads %+v", b)
	}
	if r := after[0].Recent; len(r) != 1 || r[0].Minutes != 1 || r[0].Seconds <= 0 || r[0].Requests > after[0].Requests {
		t.Errorf("recently: %+v", r)
	}
}

// What comes most often is shown with names and clients, by the chain, over a reload. A list in an order, the hot tier and the
// climber are shown, too.
func TestTop(t *testing.T) {
	t.Parallel()
	u := newUpstream(t)
	addr := "unix://" + filepath.Join(shortDir(t), "control.sock")
	s := start(t, block("dns", u.addr, "optcache {\n\t\tcontrol "+addr+"\n\t\ttop_clients 8 48\n\t}"))
	const names = 10
	askHosts(t, s, names)
	send := overUDP(s.addr("dns"))
	const each = 60 // so many that samples of one in a hundred still add up to between half and twice as many
	for i := range names {
		for range each * i {
			ask(t, send, query(hostName(i), dns.TypeA))
		}
	}
	top := func(by string) api.Top {
		t.Helper()
		var reply api.TopReply
		if err := json.Unmarshal([]byte(done(t, addr, "top", "--"+by, "-n", "100", "-o", "json")), &reply); err != nil || len(reply.Blocks) != 1 {
			t.Fatalf("%s: %+v, %v", by, reply, err)
		}
		return reply.Blocks[0].Top
	}
	check := func() {
		t.Helper()
		// A miss is skipped where another one is just being counted.
		if misses := top("misses"); len(misses.Items)+int(misses.Skipped) != names || misses.Total+misses.Skipped != names {
			t.Errorf("misses %+v", misses)
		}
		const hits = each * names * (names - 1) / 2
		got := top("hits")
		if len(got.Items) == 0 || got.Total < hits/2 || got.Total > 2*hits || got.Items[0].Type != "A" || !strings.HasSuffix(got.Items[0].Name, "example.org.") {
			t.Errorf("hits %+v", got)
		}
		if clients := top("clients"); len(clients.Items) != 1 || clients.Items[0].Client != "127.0.0.0/8" {
			t.Errorf("clients %+v", clients)
		}
	}
	check()
	s.reload(reloaded)
	check()
	if out := done(t, addr, "list", "--sort", "name", "-n", "3", "-o", "json"); strings.Count(out, "\n") != 3 {
		t.Errorf("list --sort name: %s", out)
	}
	if out := done(t, addr, "hot", "-o", "json"); !strings.Contains(out, fmt.Sprintf("%q", hostName(names-1))) {
		t.Errorf("hot: %s", out)
	}
	if out := done(t, addr, "climb"); !strings.Contains(out, "window") {
		t.Errorf("climb: %s", out)
	}
}
