package test

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/miekg/dns"
)

// This file is about connections to a server with a fast path: by TCP and TLS, while the server reloads and ends. What
// clients of all kinds do to one connection is in plugin/fastpath.

// streamsCorefile serves TCP and TLS, with a fast path or without.
func streamsCorefile(t testing.TB, upstream, options string) string {
	cert, key, _ := certificate(t)
	secure := fmt.Sprintf("tls %s %s", cert, key)
	cache := "optcache {\n\t\t" + options + "\n\t}"
	return block("dns", upstream, "prometheus 127.0.0.1:${metrics}", cache) + "tls://" + block("tls", upstream, secure, cache)
}

// inEach adds a plugin to each server block of a text.
func inEach(text, plugin string) string {
	return strings.ReplaceAll(text, "\terrors\n", "\terrors\n\t"+plugin+"\n")
}

// inFirst adds a plugin to the first one.
func inFirst(text, plugin string) string {
	return strings.Replace(text, "\terrors\n", "\terrors\n\t"+plugin+"\n", 1)
}

// dialStream opens a connection: proto is dns or tls.
func dialStream(s *server, proto string) (*dns.Conn, error) {
	conn, err := net.DialTimeout("tcp", s.addr(proto), askTimeout)
	if err != nil {
		return nil, err
	}
	conn.SetDeadline(time.Now().Add(patience))
	if proto == "tls" {
		conn = tls.Client(conn, &tls.Config{InsecureSkipVerify: true})
	}
	return &dns.Conn{Conn: conn}, nil
}

// pipeline asks on one connection after the other, several queries at a time, until stop is called. A connection that the server
// closes must end with a FIN; what has no answer then is asked again. stop waits until that many connections, at least, were closed.
func pipeline(t *testing.T, s *server, proto string) (stop func(least int64) (answered, closed int64)) {
	const depth = 8
	var n, ends atomic.Int64
	done := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for round := 0; ; round++ {
			c, err := dialStream(s, proto)
			if err != nil {
				t.Errorf("%s: %v", proto, err)
				return
			}
			before := n.Load()
			err = askSteadily(c, depth, done, &n)
			c.Close()
			if err == nil {
				return
			}
			if n.Load() == before {
				continue // until its first query, the connection is CoreDNS's, which may reset it
			}
			if !errors.Is(err, io.EOF) && !errors.Is(err, syscall.EPIPE) {
				t.Errorf("%s: after %d answers: %v", proto, n.Load(), err)
				return
			}
			ends.Add(1)
		}
	})
	end := sync.OnceFunc(func() {
		close(done)
		wg.Wait()
	})
	t.Cleanup(end)
	return func(least int64) (int64, int64) {
		t.Helper()
		eventually(t, func() error {
			if ends.Load() < least && !t.Failed() {
				return fmt.Errorf("%s: %d connections were closed, want %d", proto, ends.Load(), least)
			}
			return nil
		})
		end()
		return n.Load(), ends.Load()
	}
}

// askSteadily asks on a connection until done is closed. It returns the error of a read.
func askSteadily(c *dns.Conn, depth int, done <-chan struct{}, answered *atomic.Int64) error {
	open := make(map[uint16]string)
	for id := uint16(0); ; id++ {
		select {
		case <-done:
			return nil
		default:
		}
		for len(open) < depth {
			id++
			q := query(fmt.Sprintf("www%d.example.org.", id%50), dns.TypeA)
			q.Id = id
			open[id] = q.Question[0].Name
			if err := c.WriteMsg(q); err != nil {
				break // the read tells why
			}
		}
		m, err := c.ReadMsg()
		if err != nil {
			return err
		}
		if name := open[m.Id]; len(m.Answer) == 0 || m.Question[0].Name != name {
			return fmt.Errorf("%v to the query for %q", m, name)
		}
		delete(open, m.Id)
		answered.Add(1)
	}
}

// A reload takes the connections by TCP along. Those by TLS end with a FIN, and so do all when the fast path ends.
func TestStreamsReload(t *testing.T) {
	t.Parallel()
	u := newUpstream(t)
	fast := streamsCorefile(t, u.addr, "fastpath 1")
	s := startFast(t, fast)
	tcp, secure := pipeline(t, s, "dns"), pipeline(t, s, "tls")
	const reloads = 4
	for i := range reloads {
		s.write(fast + strings.Repeat("\n", i+1))
		s.reload(reloaded)
		s.write(strings.Replace(fast, "fastpath 1", "fastpath none", 1))
		s.reload(refused)
	}
	if n, ends := tcp(0); ends > 0 || n == 0 {
		t.Errorf("TCP: %d answers, and %d connections were closed", n, ends)
	}
	if n, ends := secure(0); ends > reloads || n == 0 {
		t.Errorf("TLS: %d answers, and %d connections were closed", n, ends)
	}
	tcp, secure = pipeline(t, s, "dns"), pipeline(t, s, "tls")
	eventually(t, func() error {
		if n := sum(t, s.addr("metrics"), "coredns_optcache_fastpath_streams"); n < 2 {
			return fmt.Errorf("%v connections", n)
		}
		return nil
	})
	s.write(strings.ReplaceAll(fast, "fastpath 1", "fastpath off"))
	s.reload(reloaded)
	for proto, stop := range map[string]func(ends int64) (int64, int64){"TCP": tcp, "TLS": secure} {
		if n, _ := stop(1); n == 0 {
			t.Errorf("%s: no answers", proto)
		}
	}
	eventually(t, func() error {
		if n := sum(t, s.addr("metrics"), "coredns_optcache_fastpath_streams"); n != 0 {
			return fmt.Errorf("%v connections are left", n)
		}
		return nil
	})
}

// openStreams opens a connection by TCP and one by TLS, both served by the fast path.
func openStreams(t *testing.T, s *server) (conns []*dns.Conn) {
	t.Helper()
	for _, proto := range []string{"dns", "tls"} {
		c, err := dialStream(s, proto)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		for range 2 { // the first one is CoreDNS's
			if _, _, err := exchangeOn(c, query("www.example.org.", dns.TypeA), nil); err != nil {
				t.Fatal(err)
			}
		}
		c.SetDeadline(time.Now().Add(patience))
		conns = append(conns, c)
	}
	return conns
}

// When the fast path ends, however it does, what was asked before is answered, and clients get a FIN behind the last answer.
func TestStreamsEnd(t *testing.T) {
	t.Parallel()
	terminate := func(t *testing.T, s *server) {
		s.stopped = true
		s.signal(syscall.SIGTERM)
	}
	for name, c := range map[string]struct {
		edit func(corefile string) string
		end  func(t *testing.T, s *server) // while the server is stopped
	}{
		"SIGTERM":     {nil, terminate},
		"multisocket": {func(text string) string { return inEach(text, "multisocket 3") }, terminate},
		"lameduck":    {func(text string) string { return inFirst(text, "health 127.0.0.1:${health} {\n\t\tlameduck 1s\n\t}") }, terminate},
		"beside another process": {nil, func(t *testing.T, s *server) {
			text := readFile(t, s.conf)
			text = strings.Replace(text, "prometheus 127.0.0.1:"+s.ports["metrics"], "prometheus 127.0.0.1:${metrics}", 1)
			start(t, text)
			terminate(t, s)
		}},
		"reload": {nil, func(t *testing.T, s *server) {
			s.write(strings.ReplaceAll(readFile(t, s.conf), "fastpath 1", "fastpath off"))
			s.signal(syscall.SIGUSR1)
		}},
		"reload without TLS": {nil, func(t *testing.T, s *server) {
			text := readFile(t, s.conf)
			s.write(strings.ReplaceAll(text[:strings.Index(text, "tls://")], "fastpath 1", "fastpath off"))
			s.signal(syscall.SIGUSR1)
		}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			u := newUpstream(t)
			text := streamsCorefile(t, u.addr, "fastpath 1")
			if c.edit != nil {
				text = c.edit(text)
			}
			s := startFast(t, text)
			conns := openStreams(t, s)
			// It cannot read them while it is stopped.
			const queries = 100
			s.signal(syscall.SIGSTOP)
			for i := range queries {
				for _, c := range conns {
					q := query([]string{"www.example.org.", fmt.Sprintf("www%d.example.org.", i)}[i%2], dns.TypeA)
					if err := c.WriteMsg(q); err != nil {
						t.Fatal(err)
					}
				}
			}
			c.end(t, s)
			s.signal(syscall.SIGCONT)
			for _, c := range conns {
				for i := range queries {
					if _, err := c.ReadMsg(); err != nil {
						t.Fatalf("%T: answer %d of %d: %v", c.Conn, i, queries, err)
					}
				}
				if _, err := c.ReadMsg(); !errors.Is(err, io.EOF) {
					t.Errorf("%T: %v, want the end", c.Conn, err)
				}
				c.Close()
			}
			if s.stopped {
				<-s.exited
			}
		})
	}
}

// In the time of health's lameduck, connections are served as before, old ones and new ones.
func TestStreamsInLameduck(t *testing.T) {
	t.Parallel()
	u := newUpstream(t)
	s := startFast(t, inFirst(streamsCorefile(t, u.addr, "fastpath 1"), "health 127.0.0.1:${health} {\n\t\tlameduck 10s\n\t}"))
	conns := openStreams(t, s)
	s.stopped = true
	s.signal(syscall.SIGTERM)
	if !s.waitFor("lameduck") {
		t.Fatal("no lameduck")
	}
	for i, c := range append(openStreams(t, s), conns...) {
		for range 10 {
			if _, _, err := exchangeOn(c, query("www.example.org.", dns.TypeA), nil); err != nil {
				t.Fatalf("connection %d: %v", i, err)
			}
		}
		defer func() {
			c.SetDeadline(time.Now().Add(patience))
			if _, err := c.ReadMsg(); !errors.Is(err, io.EOF) {
				t.Errorf("connection %d: %v, want the end", i, err)
			}
		}()
	}
	select {
	case <-s.exited:
		t.Error("it has ended before the lameduck's time")
	default:
	}
}

// Reloads with more and fewer sockets of CoreDNS's keep the connections by TCP, and end those by TLS with a FIN.
func TestStreamsWithMultisocket(t *testing.T) {
	t.Parallel()
	u := newUpstream(t)
	fast := streamsCorefile(t, u.addr, "fastpath 1")
	sockets := func(n int) string { return inEach(fast, fmt.Sprintf("multisocket %d", n)) }
	s := startFast(t, sockets(2))
	tcp, secure := pipeline(t, s, "dns"), pipeline(t, s, "tls")
	numbers := []int{3, 1, 4}
	for _, n := range numbers {
		s.write(sockets(n))
		s.reload(reloaded)
	}
	if n, ends := tcp(0); ends > 0 || n == 0 {
		t.Errorf("TCP: %d answers, and %d connections were closed", n, ends)
	}
	if n, ends := secure(0); ends > int64(len(numbers)) || n == 0 {
		t.Errorf("TLS: %d answers, and %d connections were closed", n, ends)
	}
}

// Two processes on one address each serve the connections that the kernel gives them. When one ends, its clients get a FIN, and
// the other one has all that connect then.
func TestStreamsOfTwoProcesses(t *testing.T) {
	t.Parallel()
	u := newUpstream(t)
	first := startFast(t, inEach(streamsCorefile(t, u.addr, "fastpath 1"), "timeouts {\n\t\tidle 10m\n\t}"))
	second := startFast(t, strings.Replace(readFile(t, first.conf), "prometheus 127.0.0.1:"+first.ports["metrics"], "prometheus 127.0.0.1:${metrics}", 1))
	const pairs = 20
	var conns []*dns.Conn
	for range pairs {
		conns = append(conns, openStreams(t, first)...)
	}
	served := func(s *server) float64 { return sum(t, s.addr("metrics"), "coredns_optcache_fastpath_streams") }
	if a, b := served(first), served(second); a+b != 2*pairs || a == 0 || b == 0 {
		t.Fatalf("%v and %v connections of %d", a, b, 2*pairs)
	}
	left := served(second)
	first.terminate()
	open := 0.0
	for _, c := range conns {
		_, _, err := exchangeOn(c, query("www.example.org.", dns.TypeA), nil)
		switch {
		case err == nil:
			open++
		case !errors.Is(err, io.EOF) && !errors.Is(err, syscall.EPIPE) && !errors.Is(err, syscall.ECONNRESET):
			t.Errorf("%v", err)
		}
	}
	if open != left {
		t.Errorf("%v connections are open, want %v", open, left)
	}
	for range pairs {
		openStreams(t, first) // the addresses of both are the same
	}
	if n := served(second); n != left+2*pairs {
		t.Errorf("%v connections, want %v", n, left+2*pairs)
	}
}

// A zone transfer on a connection of the fast path has the same messages as without one, and other queries are answered beside it.
func TestStreamsTransferZones(t *testing.T) {
	t.Parallel()
	u := newUpstream(t)
	zone := filepath.Join(t.TempDir(), "db.example.net")
	var text strings.Builder
	text.WriteString("@ 300 IN SOA ns hostmaster 7 7200 3600 1209600 300\n@ 300 IN NS ns\nns 300 IN A 192.0.2.53\n")
	for i := range 5000 { // some messages
		fmt.Fprintf(&text, "host-%d 300 IN TXT \"%d %s\"\n", i, i, strings.Repeat("x", 40))
	}
	if err := os.WriteFile(zone, []byte("$ORIGIN example.net.\n"+text.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	transfer := func(t *testing.T, c *dns.Conn, q *dns.Msg) (messages [][]byte) {
		t.Helper()
		q.Id = 7
		if err := c.WriteMsg(q); err != nil {
			t.Fatal(err)
		}
		const beside = 20
		for i := range beside {
			other := query(fmt.Sprintf("www%d.example.org.", i%3), dns.TypeA)
			other.Id = 8
			if err := c.WriteMsg(other); err != nil {
				t.Fatal(err)
			}
		}
		for others, ends := 0, 0; others < beside || ends < 1; {
			b, err := c.ReadMsgHeader(nil)
			if err != nil {
				t.Fatalf("%d messages, %d other answers: %v", len(messages), others, err)
			}
			m := new(dns.Msg)
			if err := m.Unpack(b); err != nil {
				t.Fatal(err)
			}
			if m.Id == 8 {
				others++
				continue
			}
			messages = append(messages, b)
			_, first := m.Answer[0].(*dns.SOA)
			if _, last := m.Answer[len(m.Answer)-1].(*dns.SOA); last && (!first || len(m.Answer) > 1 || q.Question[0].Qtype == dns.TypeIXFR) {
				ends++
			}
		}
		return messages
	}
	seen := make(map[string][][][]byte)
	for _, options := range []string{"fastpath 1", "fastpath off"} {
		s := start(t, inEach(streamsCorefile(t, u.addr, options), "file "+zone+" example.net\n\ttransfer example.net {\n\t\tto *\n\t}"))
		if options == "fastpath 1" {
			waitForWorkers(t, s)
		}
		for _, c := range openStreams(t, s) {
			whole := new(dns.Msg).SetAxfr("example.net.")
			old, same := new(dns.Msg).SetIxfr("example.net.", 6, "ns.example.net.", "h.example.net."), new(dns.Msg).SetIxfr("example.net.", 7, "ns.example.net.", "h.example.net.")
			seen[options] = append(seen[options], transfer(t, c, whole), transfer(t, c, old), transfer(t, c, same))
		}
		if n := sum(t, s.addr("metrics"), "coredns_optcache_fastpath_streams"); (n > 0) != (options == "fastpath 1") {
			t.Errorf("%s: %v connections", options, n)
		}
	}
	ours, theirs := seen["fastpath 1"], seen["fastpath off"]
	if !reflect.DeepEqual(ours, theirs) {
		for i := range ours {
			t.Errorf("transfer %d: %d messages, without a fast path %d", i, len(ours[i]), len(theirs[i]))
		}
	}
	if len(ours[0]) < 3 || len(ours[2]) != 1 {
		t.Errorf("%d messages, and %d for who has the zone", len(ours[0]), len(ours[2]))
	}
}
