package test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/miekg/dns"
)

const (
	// groupVar is how many reloads TestMaxMemoryAuto makes; what `make cgroup` sets.
	groupVar = "OPTCACHE_GROUP_RELOADS"

	groupReloads = 8
	groupLimit   = 200 << 20 // bytes
)

// group is a control group of the memory, version 1 or 2.
type group struct {
	dir         string
	limit, peak string // files
	events      string // the file with oom_kill
}

// newGroup makes a group within the one of the tests. It skips the test where that cannot be done.
func newGroup(t *testing.T, limit int64) group {
	t.Helper()
	own := map[string]string{} // by the names of controllers; "" for version 2
	for line := range strings.Lines(readFile(t, "/proc/self/cgroup")) {
		if f := strings.SplitN(strings.TrimSpace(line), ":", 3); len(f) == 3 {
			for name := range strings.SplitSeq(f[1], ",") {
				own[name] = f[2]
			}
		}
	}
	name := fmt.Sprintf("optcache-%d-%d", os.Getpid(), rand.Uint32())
	g := group{limit: "memory.max", peak: "memory.peak", events: "memory.events"}
	if path, is1 := own["memory"]; is1 {
		g = group{filepath.Join("/sys/fs/cgroup/memory", path, name), "memory.limit_in_bytes", "memory.max_usage_in_bytes", "memory.oom_control"}
	} else {
		// A group with processes cannot divide its memory. The new one stands beside that of the tests.
		g.dir = filepath.Join("/sys/fs/cgroup", filepath.Dir(filepath.Join("/", own[""])), name)
	}
	if err := os.Mkdir(g.dir, 0o755); err != nil {
		t.Skipf("no control groups here: %v", err)
	}
	t.Cleanup(func() {
		eventually(t, func() error { return os.Remove(g.dir) }) // once its last process is gone
	})
	if err := os.WriteFile(filepath.Join(g.dir, g.limit), []byte(strconv.FormatInt(limit, 10)), 0); err != nil {
		t.Skipf("no control groups with memory here: %v", err)
	}
	os.WriteFile(filepath.Join(g.dir, "memory.swap.max"), []byte("0"), 0) // what is swapped out would hide how much there is
	return g
}

// number is a number in one of the group's files: the one after a word, or the only one.
func (g *group) number(t *testing.T, file, word string) int64 {
	t.Helper()
	for line := range strings.Lines(readFile(t, filepath.Join(g.dir, file))) {
		f := strings.Fields(line)
		if n := len(f); n > 0 && (word == "" || f[0] == word) {
			v, err := strconv.ParseInt(f[n-1], 10, 64)
			if err != nil {
				t.Fatal(err)
			}
			return v
		}
	}
	t.Fatalf("%s has no %s", file, word)
	return 0
}

// A server in a control group of 200 MiB, with `max_memory auto` or a pool of that size, is never killed: not under a flood of names
// that fills its cache again and again, while reloads make caches of other sizes.
func TestMaxMemoryAuto(t *testing.T) {
	reloads, given := fromEnv(t, groupVar, groupReloads, strconv.Atoi)
	if !given && testing.Short() {
		t.Skip("takes seconds")
	}
	for name, memory := range map[string][2]string{"max_memory": {"max_memory auto", "max_memory 20%"}, "pool": {"pool node auto", "pool node"}} {
		t.Run(name, func(t *testing.T) { reloadInGroup(t, newGroup(t, groupLimit), memory, reloads) })
	}
}

func reloadInGroup(t *testing.T, g group, memory [2]string, reloads int) {
	const mib = 1 << 20
	u := newSizedUpstream(t)
	launcher := filepath.Join(t.TempDir(), "coredns")
	script := fmt.Sprintf("#!/bin/sh\necho $$ >%s/cgroup.procs || exit\nexec %s \"$@\"\n", g.dir, bin)
	if err := os.WriteFile(launcher, []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	corefile := func(round int) string {
		var text strings.Builder
		for i, port := range []string{"one", "two"} {
			text.WriteString(block(port, u.addr+" {\n\t\tforce_tcp\n\t}", "prometheus 127.0.0.1:${metrics}",
				fmt.Sprintf("optcache {\n\t\tsuccess %d\n\t\tdenial %d\n\t\t%s\n\t}", 300_000+round, 300_000, memory[i])))
		}
		return text.String()
	}
	s := startBy(t, launcher, corefile(0))
	ended, answered := floodUntil(t, s.addr("one"), s.addr("two"))
	for round := range reloads {
		s.write(corefile(1 + round))
		s.reload(reloaded)
		select {
		case <-s.exited:
			t.Fatalf("ended after %d reloads:\n%s", round, s.out)
		case <-time.After(time.Second / 4): // the caches fill
		}
	}
	metrics := s.addr("metrics")
	eventually(t, func() error {
		if sum(t, metrics, "coredns_optcache_evictions_total") == 0 {
			return errors.New("nothing is evicted: this is no flood")
		}
		return nil
	})
	ended()
	var used, bound, evicted float64
	for _, of := range []string{"", "pool_"} {
		if of == "" && strings.HasPrefix(memory[0], "pool") {
			continue
		}
		used += sum(t, metrics, "coredns_optcache_"+of+"memory_bytes")
		bound += sum(t, metrics, "coredns_optcache_"+of+"memory_limit_bytes")
	}
	evicted = sum(t, metrics, "coredns_optcache_evictions_total")
	t.Logf("%d reloads, %d answers of the flood, %.0f evictions; the caches have %.0f of %.0f MiB; the group had %d of %d MiB at the most",
		reloads, answered(), evicted, used/mib, bound/mib, g.number(t, g.peak, "")/mib, groupLimit/mib)
	if n := g.number(t, g.events, "oom_kill"); n != 0 {
		t.Errorf("%d processes were killed", n)
	}
	if bound == 0 || bound > groupLimit/2 {
		t.Errorf("the caches may have %.0f bytes", bound)
	}
	select {
	case <-s.exited:
		t.Errorf("the server has ended:\n%s", s.out)
	default:
	}
}

// floodUntil asks both servers for names that nobody has asked for, until ended is called. Answers may fail while a reload takes a
// connection away.
func floodUntil(t *testing.T, servers ...string) (ended func(), answered func() int64) {
	t.Helper()
	var over atomic.Bool
	var names, answers atomic.Int64
	var clients sync.WaitGroup
	for i := range floodClients {
		clients.Go(func() {
			rng := rand.New(rand.NewPCG(1, uint64(i)))
			var conn *dns.Conn
			for !over.Load() {
				var err error
				if conn == nil {
					if conn, err = dns.DialTimeout("tcp", servers[i%len(servers)], askTimeout); err != nil {
						conn = nil
						time.Sleep(pollEvery)
						continue
					}
				}
				n := names.Add(1)
				kind := "has"
				if n%3 == 0 {
					kind = "nx"
				}
				conn.SetDeadline(time.Now().Add(askTimeout))
				err = conn.WriteMsg(query(fmt.Sprintf("%d.%s.n%d.flood.test.", smallestFlood+rng.IntN(16_000), kind, n), dns.TypeTXT))
				if err == nil {
					_, err = conn.ReadMsgHeader(nil)
				}
				if err != nil {
					conn.Close()
					conn = nil
					continue
				}
				answers.Add(1)
			}
			if conn != nil {
				conn.Close()
			}
		})
	}
	ended = sync.OnceFunc(func() { over.Store(true); clients.Wait() })
	t.Cleanup(ended)
	return ended, answers.Load
}
