package test

import (
	"bytes"
	"context"
	"fmt"
	"hash/fnv"
	"math/rand/v2"
	"net"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/miekg/dns"
	"github.com/valkey-io/valkey-go"

	"github.com/optcache/optcache/test/redis"
)

const (
	// sharedSoakVar is how many answers are checked; what `make soak-shared` sets.
	sharedSoakVar   = "OPTCACHE_SHARED_SOAK"
	sharedSoakShort = 12_000

	sharedSoakNames = 20_000 // more than the replicas hold, so that they ask the second level
	sharedSoakTTL   = 30
)

// addressOf is the one address of a name.
func addressOf(name string) net.IP {
	h := fnv.New32a()
	h.Write([]byte(strings.ToLower(name)))
	s := h.Sum32()
	return net.IPv4(10, byte(s>>16), byte(s>>8), byte(s)).To4()
}

// Three replicas share a second level that is killed, stopped, emptied, and written to at random: values are changed, exchanged, cut
// off, put under other keys, and made up. Each answer is checked. None is wrong, and none is missing.
func TestSharedSoak(t *testing.T) {
	total, given := fromEnv(t, sharedSoakVar, sharedSoakShort, strconv.Atoi)
	if !given {
		if testing.Short() {
			t.Skip("takes seconds")
		}
		t.Parallel()
	}
	l, pc := listen(t)
	l.Close()
	var asked atomic.Int64
	up := &dns.Server{PacketConn: pc, Handler: dns.HandlerFunc(func(w dns.ResponseWriter, r *dns.Msg) {
		asked.Add(1)
		m := new(dns.Msg).SetReply(r)
		m.RecursionAvailable = true
		name := r.Question[0].Name
		m.Answer = []dns.RR{&dns.A{Hdr: dns.RR_Header{Name: name, Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: sharedSoakTTL}, A: addressOf(name)}}
		w.WriteMsg(m)
	})}
	go up.ActivateAndServe()
	defer up.Shutdown()
	valkey := redis.Start(t, "--maxmemory", "64mb", "--maxmemory-policy", "allkeys-lru")
	secret := redis.Secret(t, "a secret of the tests")
	replicas := make([]*server, 3)
	for i := range replicas {
		replicas[i] = start(t, block("dns", pc.LocalAddr().String(), "prometheus 127.0.0.1:${metrics}", fmt.Sprintf(`optcache {
		success 1024
		fastpath off
		shared %s
		shared_secret %s
		shared_timeout 50ms
	}`, valkey.URL(), secret)))
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var faults sync.WaitGroup
	faults.Go(func() { poison(ctx, valkey.Addr()) })
	faults.Go(func() { disturb(ctx, valkey) })

	var left, wrong, failed atomic.Int64
	left.Store(int64(total))
	var clients sync.WaitGroup
	for i := range 12 {
		clients.Go(func() {
			c := &soakClient{t: t, at: replicas[i%len(replicas)].addr("dns"), random: rand.New(rand.NewPCG(7, uint64(i)))}
			defer c.close()
			for left.Add(-1) >= 0 && wrong.Load() == 0 && failed.Load() < 10 {
				// Names come often, or seldom.
				n := c.random.IntN(sharedSoakNames)
				if c.random.IntN(4) == 0 {
					n = c.random.IntN(500)
				}
				name := fmt.Sprintf("k%d.Example.org.", n)
				switch why, bad := c.ask(name); {
				case bad:
					wrong.Add(1)
					t.Errorf("%s: a wrong answer: %s", name, why)
				case why != "":
					failed.Add(1)
					t.Errorf("%s: %s", name, why)
				}
			}
		})
	}
	clients.Wait()
	cancel()
	faults.Wait()
	valkey.Resume()
	counted := func(metric string, labels ...string) (n float64) {
		for _, r := range replicas {
			n += sum(t, r.addr("metrics"), "coredns_optcache_shared_"+metric, labels...)
		}
		return n
	}
	hits, refused := counted("requests_total", `outcome="hit"`), counted("refused_total")
	t.Logf("%d answers: %d wrong, %d failed; the second level had %.0f and was not believed %.0f times; the upstream was asked %d times",
		total, wrong.Load(), failed.Load(), hits, refused, asked.Load())
	if hits == 0 || refused == 0 {
		t.Errorf("%v hits, %v refused: the second level was not used, or not poisoned", hits, refused)
	}
}

// soakClient asks over one socket.
type soakClient struct {
	t      *testing.T
	at     string
	random *rand.Rand
	conn   *dns.Conn
}

func (c *soakClient) close() {
	if c.conn != nil {
		c.conn.Close()
	}
}

// ask asks for a name, up to five times, as packets may be lost. why is what is wrong with the answer, or why there is none; bad says
// which of these it is.
func (c *soakClient) ask(name string) (why string, bad bool) {
	for range 5 {
		if c.conn == nil {
			var err error
			if c.conn, err = dns.DialTimeout("udp", c.at, askTimeout); err != nil {
				return err.Error(), false
			}
		}
		q := query(name, dns.TypeA)
		q.Id = uint16(c.random.Uint32())
		c.conn.SetDeadline(time.Now().Add(askTimeout))
		err := c.conn.WriteMsg(q)
		var m *dns.Msg
		for err == nil { // an answer to a question of before may come late
			if m, err = c.conn.ReadMsg(); err == nil && m.Id == q.Id {
				break
			}
		}
		if err != nil {
			why = err.Error()
			c.conn.Close()
			c.conn = nil
			continue
		}
		if m.Rcode == dns.RcodeServerFailure {
			return "SERVFAIL", false
		}
		if len(m.Question) != 1 || m.Question[0] != q.Question[0] || m.Rcode != dns.RcodeSuccess || len(m.Answer) != 1 {
			return m.String(), true
		}
		a, ok := m.Answer[0].(*dns.A)
		if !ok || !a.A.Equal(addressOf(name)) || a.Hdr.Ttl > sharedSoakTTL || !strings.EqualFold(a.Hdr.Name, name) {
			return m.String(), true
		}
		return "", false
	}
	return why, false
}

// disturb has the server of the second level killed, stopped and emptied, until ctx ends. In the end it runs.
func disturb(ctx context.Context, s *redis.Server) {
	wait := func(d time.Duration) bool {
		select {
		case <-ctx.Done():
			return false
		case <-time.After(d):
			return true
		}
	}
	for n := 0; wait(time.Second); n++ {
		switch n % 3 {
		case 0:
			s.Do("flushall")
		case 1:
			s.Pause()
			wait(300 * time.Millisecond)
			s.Resume()
		case 2:
			s.Stop()
			wait(200 * time.Millisecond)
			s.Run()
		}
	}
}

// poison writes to the second level at random, until ctx ends.
func poison(ctx context.Context, at string) {
	var c valkey.Client
	defer func() {
		if c != nil {
			c.Close()
		}
	}()
	random := rand.New(rand.NewPCG(1, 2))
	var last []byte // a value of another key
	for ctx.Err() == nil {
		time.Sleep(200 * time.Microsecond)
		if c == nil {
			one, err := valkey.NewClient(valkey.ClientOption{InitAddress: []string{at}, DisableCache: true, ForceSingleClient: true, ConnWriteTimeout: time.Second})
			if err != nil {
				continue
			}
			c = one
		}
		key, err := c.Do(ctx, c.B().Randomkey().Build()).ToString()
		if err != nil || strings.Contains(key, "{group}") { // the group's state has tests of its own
			continue
		}
		value, err := c.Do(ctx, c.B().Get().Key(key).Build()).AsBytes()
		if err != nil {
			continue
		}
		other := bytes.Clone(value)
		switch n := random.IntN(5); {
		case n == 0 && len(other) > 0:
			other[random.IntN(len(other))] ^= 1 << random.IntN(8)
		case n == 1:
			other = other[:random.IntN(len(other)+1)]
		case n == 2 && last != nil:
			other = last
		case n == 3:
			other = make([]byte, random.IntN(300))
			for i := range other {
				other[i] = byte(random.Uint32())
			}
		default:
			other = append(other, 'x')
		}
		last = value
		c.Do(ctx, c.B().Set().Key(key).Value(valkey.BinaryString(other)).PxMilliseconds(30_000).Build())
	}
}
