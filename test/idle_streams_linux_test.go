package test

import (
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"regexp"
	"strconv"
	"testing"
	"time"

	"github.com/miekg/dns"
)

// An idle connection by TCP costs at most 4 KB beyond what the kernel has for it. The test prints what connections cost by TCP and
// TLS, with a fast path and without. OPTCACHE_IDLE=10000 is make idle-streams.
func TestIdleStreamsMemory(t *testing.T) {
	t.Parallel()
	const most = 4096
	n, _ := fromEnv(t, "OPTCACHE_IDLE", 1000, strconv.Atoi)
	if n < 1 {
		t.Fatalf("OPTCACHE_IDLE=%d is no number of connections", n)
	}
	u := newUpstream(t)
	for _, options := range []string{"fastpath on 1", "fastpath off"} {
		s := start(t, inFirst(inEach(streamsCorefile(t, u.addr, options), "timeouts {\n\t\tidle 10m\n\t}"), "pprof 127.0.0.1:${pprof}"))
		if options != "fastpath off" {
			waitForWorkers(t, s)
		}
		for _, proto := range []string{"dns", "tls"} {
			openStreams(t, s) // fills what all connections share
			before, resident := liveBytes(t, s), readMemory(t, s).resident
			conns := make([]net.Conn, 0, n)
			for i := range n {
				conns = append(conns, idleStream(t, s, proto, i))
			}
			time.Sleep(3 * time.Second) // until they count as idle
			var live int
			eventually(t, func() error {
				if live = (liveBytes(t, s) - before) / n; options != "fastpath off" && proto == "dns" && live > most {
					return fmt.Errorf("%d bytes for each connection, want at most %d", live, most)
				}
				return nil
			})
			t.Logf("%s, %s: %d connections, %d bytes each; with what the collector has not freed and the kernel has for the process, %d bytes",
				options, proto, n, live, (readMemory(t, s).resident-resident)/n)
			for _, c := range conns {
				c.Close()
			}
		}
	}
}

// idleStream opens the i-th connection, asks on it twice, and leaves it. Connections come from many addresses: one client may have
// 8,192.
func idleStream(t *testing.T, s *server, proto string, i int) net.Conn {
	t.Helper()
	dialer := net.Dialer{Timeout: askTimeout, LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, byte(1+i%8))}}
	conn, err := dialer.Dial("tcp", s.addr(proto))
	if err != nil {
		t.Fatal(err)
	}
	if proto == "tls" {
		conn = tls.Client(conn, &tls.Config{InsecureSkipVerify: true})
	}
	for range 2 {
		if _, _, err := exchangeOn(&dns.Conn{Conn: conn}, query("www.example.org.", dns.TypeA), nil); err != nil {
			t.Fatalf("connection %d: %v", i, err)
		}
	}
	return conn
}

var memStat = regexp.MustCompile(`(?m)^# (HeapAlloc|Stack) = (\d+)`)

// liveBytes returns the bytes of the heap that are in use after a collection, and those of stacks.
func liveBytes(t *testing.T, s *server) (n int) {
	t.Helper()
	heapBytes(t, s) // the first collection leaves what pools have
	return heapBytes(t, s)
}

// heapBytes is liveBytes with what pools have.
func heapBytes(t *testing.T, s *server) (n int) {
	t.Helper()
	res, err := http.Get(fmt.Sprintf("http://%s/debug/pprof/heap?gc=1&debug=1", s.addr("pprof")))
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	text, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	found := memStat.FindAllSubmatch(text, -1)
	if len(found) != 2 {
		t.Fatalf("the profile has no memory: %s", text)
	}
	for _, f := range found {
		bytes, err := strconv.Atoi(string(f[2]))
		if err != nil {
			t.Fatal(err)
		}
		n += bytes
	}
	return n
}
