package test

import (
	"fmt"
	"net"
	"strconv"
	"testing"
	"time"

	"github.com/miekg/dns"
)

// alternationsVar names another number of reloads to TestFastPathOnAndOff than the tests' small one.
const alternationsVar = "OPTCACHE_RELOADS"

// The fast path comes and goes by reloads, while a client asks without pause: each reload ends. CoreDNS's socket is in
// blocking mode for a moment of each reload, and a reader that has called then must come back.
func TestFastPathOnAndOff(t *testing.T) {
	t.Parallel()
	reloads, _ := fromEnv(t, alternationsVar, 40, strconv.Atoi)
	u := newUpstream(t)
	s := start(t, block("dns", u.addr, "optcache {\n\t\tcoalesce off\n\t}"))
	stop := steady(t, s, query("www.example.org.", dns.TypeA))
	slowest := time.Duration(0)
	for i := range reloads {
		s.write(block("dns", u.addr, "optcache {\n\t\t"+[]string{"fastpath 1", "coalesce off"}[i%2]+"\n\t}"))
		began := time.Now()
		s.reload(reloaded)
		slowest = max(slowest, time.Since(began))
	}
	t.Logf("%d queries were answered during %d reloads, of which the slowest took %v", stop(), reloads, slowest)
	s.terminate()
}

// The end of the process waits for no query for ever: those that an upstream does not answer have five seconds.
func TestEndBesideAnUpstreamThatHangs(t *testing.T) {
	t.Parallel()
	silent, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	for _, options := range []string{"coalesce off", "fastpath"} {
		s := start(t, block("dns", silent.LocalAddr().String(), "optcache {\n\t\t"+options+"\n\t}"))
		c, err := net.Dial("udp", s.addr("dns"))
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		for i := range 100 {
			m := query(fmt.Sprintf("hang-%d.example.org.", i), dns.TypeA)
			p, err := m.Pack()
			if err != nil {
				t.Fatal(err)
			}
			c.Write(p)
		}
		s.terminate()
	}
}
