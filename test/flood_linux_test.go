package test

import (
	"fmt"
	"math"
	"math/rand/v2"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/miekg/dns"
)

const (
	// floodVar names other bounds to flood than the tests' small one, as 64MB,256MB.
	floodVar = "OPTCACHE_FLOOD"

	// floodTimes is how often a bound is filled: the answers together are that much larger.
	floodTimes = 3

	floodClients = 4

	// floodMargin is by how much resident memory may exceed the bound and what the process had
	// before: messages on their way, and Go's garbage.
	floodMargin = 1.1

	smallestFlood, largestFlood = 60, 60_000 // bytes of an answer
)

// max_memory bounds the whole process under a flood of unique names with answers of all sizes, a
// third of them denials. What it had before is what the same flood takes when nothing of it is cached.
func TestMaxMemoryHoldsUnderFlood(t *testing.T) {
	bounds := "16MB"
	if v := os.Getenv(floodVar); v != "" {
		bounds = v
	} else if testing.Short() {
		t.Skip("takes seconds")
	}
	for _, bound := range strings.Split(bounds, ",") {
		t.Run(bound, func(t *testing.T) { floodBound(t, bound) })
	}
}

func floodBound(t *testing.T, size string) {
	mb, err := strconv.Atoi(strings.TrimSuffix(size, "MB"))
	if err != nil || mb < 1 {
		t.Fatalf("%s is %q, want sizes as 64MB", floodVar, size)
	}
	bound := int64(mb) << 20
	u := newSizedUpstream(t)
	s := start(t, block("dns", u.addr+" {\n\t\tforce_tcp\n\t}", "prometheus 127.0.0.1:${metrics}",
		`optcache kept.test {
		success 1000000
		denial 1000000
		max_memory `+size+`
	}`))
	pid := s.cmd.Process.Pid
	idle := resident(t, pid, "VmRSS")
	flood(t, s.addr("dns"), "not-kept.test.", floodTimes*bound/2)
	before := resident(t, pid, "VmRSS")

	// The system notes the peak itself: no sample can miss it.
	if err := os.WriteFile(fmt.Sprintf("/proc/%d/clear_refs", pid), []byte("5"), 0); err != nil {
		t.Fatal(err)
	}
	samples, stop := sample(t, pid)
	flood(t, s.addr("dns"), "kept.test.", floodTimes*bound)
	stop()
	peak := max(resident(t, pid, "VmHWM"), samples.Load())

	const mib = 1 << 20
	allowed := int64(float64(bound+before) * floodMargin)
	used := int64(sum(t, s.addr("metrics"), "coredns_optcache_memory_bytes"))
	t.Logf("resident, MiB: idle %d, before %d, at the most %d of %d; the cache's own count: %d of %d",
		idle/mib, before/mib, peak/mib, allowed/mib, used/mib, bound/mib)
	if peak > allowed {
		t.Errorf("resident memory reached %d bytes; the bound and what was there before are %d", peak, bound+before)
	}
	if used > bound || used < bound/4 {
		t.Errorf("the cache holds %d bytes of %d", used, bound)
	}
	if sum(t, s.addr("metrics"), "coredns_optcache_evictions_total") == 0 {
		t.Error("nothing was evicted: this was no flood")
	}
}

// resident is a figure of /proc/PID/status in bytes.
func resident(t testing.TB, pid int, name string) int64 {
	t.Helper()
	for _, line := range strings.Split(readFile(t, fmt.Sprintf("/proc/%d/status", pid)), "\n") {
		if f := strings.Fields(line); len(f) == 3 && f[0] == name+":" {
			kb, err := strconv.ParseInt(f[1], 10, 64)
			if err != nil {
				t.Fatal(err)
			}
			return kb << 10
		}
	}
	t.Fatalf("process %d has no %s", pid, name)
	return 0
}

// sample notes the largest resident memory of a process until stop is called.
func sample(t testing.TB, pid int) (largest *atomic.Int64, stop func()) {
	largest = new(atomic.Int64)
	end := make(chan struct{})
	var done sync.WaitGroup
	done.Go(func() {
		tick := time.NewTicker(time.Second / 2)
		defer tick.Stop()
		for {
			largest.Store(max(largest.Load(), resident(t, pid, "VmRSS")))
			select {
			case <-tick.C:
			case <-end:
				return
			}
		}
	})
	return largest, func() { close(end); done.Wait() }
}

// flood asks for unique names in a zone, over TCP, until the answers are that many bytes together.
func flood(t testing.TB, addr, zone string, bytes int64) {
	t.Helper()
	var got atomic.Int64
	var names atomic.Uint64
	var clients sync.WaitGroup
	for i := range floodClients {
		clients.Go(func() {
			rng := rand.New(rand.NewPCG(1, uint64(i)))
			conn, err := dns.DialTimeout("tcp", addr, askTimeout)
			if err != nil {
				t.Error(err)
				return
			}
			defer conn.Close()
			for got.Load() < bytes {
				// As many answers from 60 to 600 bytes as from 6,000 to 60,000.
				size := int(smallestFlood * math.Pow(largestFlood/smallestFlood, rng.Float64()))
				n := names.Add(1)
				kind := "has"
				if n%3 == 0 {
					kind = "nx"
				}
				q := query(fmt.Sprintf("%d.%s.n%d.%s", size, kind, n, zone), dns.TypeTXT)
				conn.SetDeadline(time.Now().Add(patience))
				if err := conn.WriteMsg(q); err != nil {
					t.Error(err)
					return
				}
				b, err := conn.ReadMsgHeader(nil)
				if err != nil {
					t.Error(err)
					return
				}
				if rcode := b[3] & 0x0f; rcode != dns.RcodeSuccess && rcode != dns.RcodeNameError {
					t.Errorf("%s: rcode %d", q.Question[0].Name, rcode)
					return
				}
				got.Add(int64(len(b)))
			}
		})
	}
	clients.Wait()
	if t.Failed() {
		t.FailNow()
	}
}

// sizedUpstream is a DNS server over TCP whose answers are about as long as the first label of the
// name says, in bytes. Names whose second label is nx do not exist.
type sizedUpstream struct{ addr string }

func newSizedUpstream(t testing.TB) *sizedUpstream {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	u := &sizedUpstream{addr: l.Addr().String()}
	go (&dns.Server{Listener: l, Handler: u}).ActivateAndServe()
	t.Cleanup(func() { l.Close() })
	return u
}

// ServeDNS implements dns.Handler.
func (*sizedUpstream) ServeDNS(w dns.ResponseWriter, r *dns.Msg) {
	m := new(dns.Msg).SetReply(r)
	label, rest, _ := strings.Cut(r.Question[0].Name, ".")
	size, _ := strconv.Atoi(label)
	txt := &dns.TXT{Hdr: dns.RR_Header{Name: r.Question[0].Name, Rrtype: dns.TypeTXT, Class: dns.ClassINET, Ttl: 3600}}
	if strings.HasPrefix(rest, "nx.") {
		m.Rcode = dns.RcodeNameError
		m.Ns = records(denialSOA)
		m.Extra = []dns.RR{txt}
	} else {
		m.Answer = []dns.RR{txt}
	}
	m.Compress = true
	for left := max(size-m.Len(), 1); left > 0; left -= 256 {
		txt.Txt = append(txt.Txt, strings.Repeat("x", min(left, 255)))
	}
	w.WriteMsg(m)
}
