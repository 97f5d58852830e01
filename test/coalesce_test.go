package test

import (
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/miekg/dns"
)

// Ten thousand clients ask for one name that is not cached, behind an upstream that takes 200 ms, of
// optcache and of cache. What they cost the upstream is in the log, and how long they waited. Some
// get no answer on a busy machine, where the buffer of the server's socket runs over; that all of
// them do otherwise, TestCoalescingMakesOneQueryOfConcurrentMisses shows without sockets.
func TestManyClientsOfOneName(t *testing.T) {
	const clients, delay = 10_000, 200 * time.Millisecond
	// Each block is asked for a name of its own: what one block's forward asks again, after a loss, is not counted for another.
	nameIn := func(block string) string { return block + ".example.org." }
	asked := map[string]*atomic.Int32{nameIn("all"): {}, nameIn("default"): {}, nameIn("cache"): {}}
	l, pc := listen(t)
	slow := dns.HandlerFunc(func(w dns.ResponseWriter, r *dns.Msg) {
		if n := asked[r.Question[0].Name]; n != nil {
			n.Add(1)
		}
		time.Sleep(delay)
		w.WriteMsg(answer(r))
	})
	for _, s := range []*dns.Server{{Listener: l, Handler: slow}, {PacketConn: pc, Handler: slow}} {
		go s.ActivateAndServe()
		t.Cleanup(func() { s.Shutdown() })
	}
	up := l.Addr().String()
	s := start(t, block("all", up, "optcache {\n\t\tcoalesce 10000 20s\n\t}")+block("default", up, "optcache")+block("cache", up, "cache"))
	for name, most := range map[string]int{
		"all": 1,
		// 1000 may wait for one query: the next one brings another, unless the answer is there by then.
		"default": clients / 1000,
		"cache":   clients,
	} {
		took := stampede(t, s.addr(name), query(nameIn(name), dns.TypeA), clients)
		slices.Sort(took)
		queries := int(asked[nameIn(name)].Load())
		if len(took) == 0 {
			t.Fatalf("%s: no answers", name)
		}
		t.Logf("%s: %d clients, %d answers, %d queries to the upstream; half of the clients waited %v or less, the last one %v",
			name, clients, len(took), queries, took[len(took)/2].Round(time.Millisecond), took[len(took)-1].Round(time.Millisecond))
		if queries < 1 || queries > most {
			t.Errorf("%s: %d queries, want at most %d", name, queries, most)
		}
	}
}

// stampede sends a query as many clients at once and returns how long each waited for its answer.
func stampede(t *testing.T, addr string, q *dns.Msg, clients int) []time.Duration {
	t.Helper()
	const perSocket = 100
	packet, err := q.Pack()
	if err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex // guards took
	var took []time.Duration
	var wg sync.WaitGroup
	sockets := make([]net.Conn, clients/perSocket)
	const patience = 1500 * time.Millisecond
	sent := make([]time.Time, clients)
	for i := range sockets {
		c, err := net.Dial("udp", addr)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		sockets[i] = c
	}
	var begun sync.RWMutex // guards sent
	for i := range clients {
		// No faster than the server's socket is emptied: its buffer has room for some hundred.
		if i%50 == 0 {
			time.Sleep(time.Millisecond)
		}
		packet[0], packet[1] = byte(i>>8), byte(i)
		begun.Lock()
		sent[i] = time.Now()
		begun.Unlock()
		if _, err := sockets[i%len(sockets)].Write(packet); err != nil {
			t.Fatal(err)
		}
		if i >= len(sockets) {
			continue
		}
		wg.Go(func() {
			buf := make([]byte, dns.MinMsgSize)
			sockets[i].SetReadDeadline(time.Now().Add(patience))
			for range perSocket {
				n, err := sockets[i].Read(buf)
				if err != nil {
					return
				}
				id := int(buf[0])<<8 | int(buf[1])
				begun.RLock()
				d := time.Since(sent[id])
				begun.RUnlock()
				var m dns.Msg
				if err := m.Unpack(buf[:n]); err != nil || len(m.Answer) != 1 {
					continue
				}
				mu.Lock()
				took = append(took, d)
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	return took
}
