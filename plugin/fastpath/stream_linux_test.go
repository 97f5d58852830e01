package fastpath

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/coredns/coredns/core/dnsserver"
	"github.com/coredns/coredns/plugin"
	"github.com/coredns/coredns/plugin/pkg/transport"

	"github.com/miekg/dns"
	"golang.org/x/sys/unix"
)

// These tests have clients of all kinds ask a CoreDNS server whose connections the fast path takes over. The chain is one
// handler, whose answers are known by the name that is asked for: hit… is a hit, slow… waits until it is let go, many… has
// several messages, and so on.

func init() { tick, lingerTime = 50*time.Millisecond, 200*time.Millisecond }

// streamServer is a server of CoreDNS, by TCP or TLS.
type streamServer struct {
	*dnsserver.Server
	t       *testing.T
	addr    string // of the socket
	tls     *tls.Config
	letGo   chan struct{} // closed: slow… get their answers
	closes  chan struct{} // closed: late-close… close their connections
	waiting atomic.Int64  // slow… under way
	number  int           // of the generation
	over    atomic.Bool
	states  atomic.Int64 // requests with the state of a TLS connection
}

// ServeDNS, Name: the chain.
func (s *streamServer) Name() string { return "chain" }
func (s *streamServer) ServeDNS(ctx context.Context, w dns.ResponseWriter, r *dns.Msg) (int, error) {
	if !BySlowPath(ctx) {
		done, err := Take(s.Server, w, s.number, s.service)
		if err != nil {
			s.t.Error(err)
		}
		if done != nil {
			defer done()
		}
	}
	if c, ok := w.(dns.ConnectionStater); ok && c.ConnectionState() != nil && c.ConnectionState().HandshakeComplete {
		s.states.Add(1)
	}
	name, n := r.Question[0].Name, 1
	switch {
	case strings.HasPrefix(name, "slow"):
		s.waiting.Add(1)
		<-s.letGo
		s.waiting.Add(-1)
	case strings.HasPrefix(name, "many"):
		n = 5
	case strings.HasPrefix(name, "large"):
		m := answerTo(r)
		for range 250 {
			m.Answer = append(m.Answer, &dns.TXT{Hdr: dns.RR_Header{Name: name, Rrtype: dns.TypeTXT, Class: dns.ClassINET}, Txt: []string{strings.Repeat("x", 200)}})
		}
		return 0, w.WriteMsg(m)
	case strings.HasPrefix(name, "late-close"):
		<-s.closes
		return 0, w.Close()
	case strings.HasPrefix(name, "close"):
		return 0, w.Close()
	case strings.HasPrefix(name, "hijack"):
		w.Hijack()
		w.WriteMsg(answerTo(r))
		return 0, w.Close()
	}
	for range n {
		w.WriteMsg(answerTo(r))
	}
	return 0, nil
}

func answerTo(r *dns.Msg) *dns.Msg {
	m := new(dns.Msg).SetReply(r)
	m.Answer = []dns.RR{&dns.A{Hdr: dns.RR_Header{Name: r.Question[0].Name, Rrtype: dns.TypeA, Class: dns.ClassINET}, A: net.IPv4(192, 0, 2, 1)}}
	return m
}

// service answers hit….
func (s *streamServer) service() (Service, error) { return hits{s}, nil }

type hits struct{ of *streamServer }

func (h hits) NewAnswerer() Answerer { return h }
func (hits) Workers() int            { return 1 }
func (h hits) Generation() int       { return h.of.number }
func (h hits) Over() bool            { return h.of.over.Load() }
func (hits) Asked() bool             { return true }
func (hits) Sent()                   {}
func (h hits) Answer(b Batch) {
	for i := range b.Len() {
		r := new(dns.Msg)
		if !b.Stream() || !b.Client(i).Addr().Is4() {
			panic("it is no stream by IPv4")
		}
		if r.Unpack(b.Packet(i)) != nil || len(r.Question) != 1 || !strings.HasPrefix(r.Question[0].Name, "hit") {
			b.Pass(i, Miss)
			continue
		}
		p, err := answerTo(r).Pack()
		if err != nil {
			panic(err)
		}
		b.Reply(i, p)
	}
}

var certificate = sync.OnceValue(func() *tls.Config {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		panic(err)
	}
	of := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}}
	der, err := x509.CreateCertificate(rand.Reader, of, of, &key.PublicKey, key)
	if err != nil {
		panic(err)
	}
	return &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}}
})

// startStreams starts a server for a test that asks it over proto: dns or tls.
func startStreams(t *testing.T, proto string, change func(*dnsserver.Config)) *streamServer {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &streamServer{t: t, addr: l.Addr().String(), letGo: make(chan struct{}), closes: make(chan struct{})}
	cfg := &dnsserver.Config{Zone: ".", Transport: proto, Plugin: []plugin.Plugin{func(plugin.Handler) plugin.Handler { return s }}}
	if change != nil {
		change(cfg)
	}
	var serve func(net.Listener) error
	if proto == transport.TLS {
		s.tls = &tls.Config{InsecureSkipVerify: true}
		cfg.TLSConfig = certificate()
		server, err := dnsserver.NewServerTLS("tls://"+s.addr, []*dnsserver.Config{cfg})
		if err != nil {
			t.Fatal(err)
		}
		s.Server, serve = server.Server, server.Serve
	} else {
		server, err := dnsserver.NewServer("dns://"+s.addr, []*dnsserver.Config{cfg})
		if err != nil {
			t.Fatal(err)
		}
		s.Server, serve = server, server.Serve
	}
	served := make(chan struct{})
	go func() {
		defer close(served)
		serve(l)
	}()
	t.Cleanup(func() {
		select {
		case <-s.letGo:
		default:
			close(s.letGo)
		}
		s.Stop()
		s.over.Store(true)
		CloseStreams(func(other Service) bool { return other.(hits).of == s })
		<-served
		if n := countersOf(s.Addr).streams.Load(); n != 0 {
			t.Errorf("%d connections are left", n)
		}
		if n := countersOf(s.Addr).panics.Load(); n != 0 {
			t.Errorf("%d panics", n)
		}
	})
	return s
}

// streamClient is a connection to a server.
type streamClient struct {
	net.Conn
	t   *testing.T
	tcp *net.TCPConn
	id  uint16
}

// dial connects, and has the fast path take the connection over by one query.
func (s *streamServer) dial() *streamClient {
	s.t.Helper()
	c := s.connect()
	c.send("first.")
	c.wants("first.")
	return c
}

// connect connects without a query.
func (s *streamServer) connect() *streamClient {
	s.t.Helper()
	return s.connectFrom(net.IPv4(127, 0, 0, 1))
}

func (s *streamServer) connectFrom(ip net.IP) *streamClient {
	s.t.Helper()
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: ip}}
	tcp, err := d.Dial("tcp", s.addr)
	if err != nil {
		s.t.Fatal(err)
	}
	c := &streamClient{Conn: tcp, t: s.t, tcp: tcp.(*net.TCPConn)}
	if s.tls != nil {
		c.Conn = tls.Client(tcp, s.tls)
	}
	s.t.Cleanup(func() { tcp.Close() })
	c.SetDeadline(time.Now().Add(time.Minute))
	return c
}

// queries returns queries with their lengths.
func (c *streamClient) queries(names ...string) (b []byte) {
	for _, name := range names {
		c.id++
		r := new(dns.Msg).SetQuestion(name, dns.TypeA)
		r.Id = c.id
		p, err := r.Pack()
		if err != nil {
			c.t.Fatal(err)
		}
		b = append(binary.BigEndian.AppendUint16(b, uint16(len(p))), p...)
	}
	return b
}

func (c *streamClient) send(names ...string) {
	c.t.Helper()
	if _, err := c.Write(c.queries(names...)); err != nil {
		c.t.Fatal(err)
	}
}

// receive returns the next message.
func (c *streamClient) receive() (*dns.Msg, error) {
	var length [2]byte
	if _, err := io.ReadFull(c, length[:]); err != nil {
		return nil, err
	}
	p := make([]byte, binary.BigEndian.Uint16(length[:]))
	if _, err := io.ReadFull(c, p); err != nil {
		return nil, fmt.Errorf("within a message: %w", err)
	}
	m := new(dns.Msg)
	return m, m.Unpack(p)
}

// wants fails unless the next messages are answers for the names, in this order.
func (c *streamClient) wants(names ...string) {
	c.t.Helper()
	for i, name := range names {
		m, err := c.receive()
		if err != nil {
			c.t.Fatalf("answer %d, to %s: %v", i, name, err)
		}
		if len(m.Answer) == 0 || m.Answer[0].Header().Name != name {
			c.t.Fatalf("answer %d is %v, want one to %s", i, m, name)
		}
	}
}

// wantsEnd fails unless the server closes the connection, with a FIN.
func (c *streamClient) wantsEnd() {
	c.t.Helper()
	if m, err := c.receive(); !errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		c.t.Fatalf("%v, %v, want the end", m, err)
	}
}

func (s *streamServer) wantsWaiting(n int64) {
	s.t.Helper()
	until(s.t, func() error {
		if got := s.waiting.Load(); got != n {
			return fmt.Errorf("%d queries are under way, want %d", got, n)
		}
		return nil
	})
}

func until(t *testing.T, check func() error) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
		err := check()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
}

// overBoth runs a test over TCP and over TLS.
func overBoth(t *testing.T, change func(*dnsserver.Config), test func(*testing.T, *streamServer)) {
	for _, proto := range []string{transport.DNS, transport.TLS} {
		t.Run(proto, func(t *testing.T) { test(t, startStreams(t, proto, change)) })
	}
}

// No query waits for another: hits and misses overtake a query that takes long. TLS state reaches the chain.
func TestStreamAnswersOutOfOrder(t *testing.T) {
	overBoth(t, nil, func(t *testing.T, s *streamServer) {
		c := s.dial()
		c.send("slow1.", "hit1.", "slow2.", "hit2.")
		c.wants("hit1.", "hit2.")
		c.send("miss.")
		c.wants("miss.")
		s.wantsWaiting(2)
		c.send("hit3.", "many.")
		c.wants("hit3.", "many.", "many.", "many.", "many.", "many.")
		close(s.letGo)
		got := make(map[string]bool)
		for range 2 {
			m, err := c.receive()
			if err != nil {
				t.Fatal(err)
			}
			got[m.Question[0].Name] = true
		}
		if !got["slow1."] || !got["slow2."] {
			t.Errorf("answers to %v", got)
		}
		counts := countersOf(s.Addr)
		if hits, misses := counts.streamed[Answered].Load(), counts.streamed[Miss].Load(); hits != 3 || misses != 4 {
			t.Errorf("%d hits and %d misses, want 3 and 4", hits, misses)
		}
		want := int64(0)
		if s.tls != nil {
			want = 5 // first, and those of the slow path
		}
		if n := s.states.Load(); n != want {
			t.Errorf("%d requests had the state of a TLS connection, want %d", n, want)
		}
	})
}

// The first query may take as long as it likes.
func TestStreamIsReadBesideItsFirstQuery(t *testing.T) {
	overBoth(t, nil, func(t *testing.T, s *streamServer) {
		s.dial()
		second := s.connect()
		second.send("slow.", "hit1.")
		second.wants("hit1.")
		close(s.letGo)
		second.wants("slow.")
	})
}

// The first query may take longer than the time to write an answer, and so may an answer with many messages.
func TestStreamFirstAnswerIsLate(t *testing.T) {
	short := func(cfg *dnsserver.Config) { cfg.WriteTimeout = time.Second } // on a busy machine, a write may come late
	overBoth(t, short, func(t *testing.T, s *streamServer) {
		c := s.connect()
		c.send("slow.")
		s.wantsWaiting(1)
		time.Sleep(time.Second + 6*tick)
		close(s.letGo)
		c.wants("slow.")
	})
}

// A query leaves an idle connection at once, whatever the length of its record is.
func TestStreamRecordLengths(t *testing.T) {
	overBoth(t, nil, func(t *testing.T, s *streamServer) {
		c := s.dial()
		for n := firstLen - 2; n <= firstLen+2; n++ {
			time.Sleep(3 * tick) // idle
			p := c.queries("hit" + strings.Repeat("x", n-lengthLen-headerLen-9) + ".")
			if len(p) != n {
				t.Fatalf("a query with %d bytes, want %d", len(p), n)
			}
			c.SetDeadline(time.Now().Add(20 * time.Second))
			if _, err := c.Write(p); err != nil {
				t.Fatal(err)
			}
			if _, err := c.receive(); err != nil {
				t.Fatalf("%d bytes: %v", n, err)
			}
		}
	})
}

// corked keeps what is written until it is let go, and counts the TLS records with data among what it reads.
type corked struct {
	net.Conn
	out     []byte
	on      bool
	in      []byte // less than a record
	records int
}

func (c *corked) Write(p []byte) (int, error) {
	if !c.on {
		return c.Conn.Write(p)
	}
	c.out = append(c.out, p...)
	return len(p), nil
}

func (c *corked) Read(p []byte) (int, error) {
	const header, data = 5, 23 // RFC 8446, section 5.1
	n, err := c.Conn.Read(p)
	for c.in = append(c.in, p[:n]...); len(c.in) >= header; {
		size := header + int(binary.BigEndian.Uint16(c.in[header-2:]))
		if len(c.in) < size {
			break
		}
		if c.in[0] == data {
			c.records++
		}
		c.in = c.in[size:]
	}
	return n, err
}

// Queries that come at the same time, in a record each, are answered together. What is behind them does not keep their answers back.
func TestStreamAnswersRecordsTogether(t *testing.T) {
	s := startStreams(t, transport.TLS, nil)
	c := s.connect()
	cork := &corked{Conn: c.tcp}
	c.Conn = tls.Client(cork, s.tls)
	c.SetDeadline(time.Now().Add(time.Minute))
	c.send("first.")
	c.wants("first.")
	for range 3 * lonely { // the server no longer looks for more each time
		c.send("hit.")
		c.wants("hit.")
	}
	const queries = 6 // what tls reads at once has room for them
	rounds, before := 2*lonely, cork.records
	for range rounds {
		cork.on = true
		var names []string
		for i := range queries {
			names = append(names, fmt.Sprintf("hit%d.", i))
			c.send(names[i])
		}
		whole := len(cork.out)
		c.send("hit.")
		part := whole + (len(cork.out)-whole)/2
		if _, err := c.tcp.Write(cork.out[:part]); err != nil {
			t.Fatal(err)
		}
		c.wants(names...)
		if _, err := c.tcp.Write(cork.out[part:]); err != nil {
			t.Fatal(err)
		}
		c.wants("hit.")
		cork.on, cork.out = false, nil
	}
	if n := cork.records - before; n > rounds*queries/2 {
		t.Errorf("%d records for %d queries, of which %d came at a time", n, rounds*(queries+1), queries)
	}
}

// One query in many small pieces takes no more work than its length.
func TestStreamManyPieces(t *testing.T) {
	c := new(stream)
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	begun := m.TotalAlloc
	for i := range lengthLen + 65534 {
		b := newBuffer()
		(*b)[readSize] = 0xff
		c.got(b, 1)
		if len(c.rest) != i+1 {
			t.Fatalf("%d bytes after %d pieces", len(c.rest), i+1)
		}
	}
	runtime.ReadMemStats(&m)
	if n := m.TotalAlloc - begun; n > 4<<20 && !raceDetector {
		t.Errorf("%d bytes of memory", n)
	}
}

// The answers to one batch are not all kept before they are sent.
func TestStreamSendsLargeBatchesInParts(t *testing.T) {
	conn := new(recorder)
	l := &streams{counts: new(counters)}
	w := &streamWorker{c: &stream{of: l, conn: conn}}
	for range BatchSize {
		w.Reply(0, make([]byte, 60000))
	}
	w.flush()
	if conn.sent != BatchSize*(lengthLen+60000) || conn.most > outMax+lengthLen+60000 {
		t.Errorf("%d bytes, %d at once", conn.sent, conn.most)
	}
	if n := sending.Load(); n != 0 {
		t.Errorf("%d bytes are being sent", n)
	}
}

// recorder is a connection that takes everything.
type recorder struct {
	net.Conn
	sent, most int
}

func (r *recorder) Write(p []byte) (int, error) {
	r.sent += len(p)
	r.most = max(r.most, len(p))
	return len(p), nil
}

// When too much is being sent, clients that read are served, and others are cut off soon.
func TestStreamsSendTooMuch(t *testing.T) {
	before := sendingMax
	t.Cleanup(func() { sendingMax = before })
	sendingMax = 1
	long := func(cfg *dnsserver.Config) { cfg.WriteTimeout = time.Minute }
	overBoth(t, long, func(t *testing.T, s *streamServer) {
		c := s.dial()
		names := make([]string, 1000)
		for i := range names {
			names[i] = "hit."
		}
		c.tcp.SetReadBuffer(4096)
		for {
			if _, err := c.Write(c.queries(names...)); err != nil {
				if errors.Is(err, os.ErrDeadlineExceeded) {
					t.Error(err)
				}
				break
			}
		}
		if n := countersOf(s.Addr).slowReaders.Load(); n != 1 {
			t.Errorf("%d slow readers", n)
		}
		c = s.dial()
		c.send("hit.")
		c.wants("hit.")
		c.send("miss.")
		c.wants("miss.")
	})
}

// A connection that is never empty looks at the time after each read.
func TestStreamLooksAtTheTime(t *testing.T) {
	l := new(streams)
	l.serves.Store(&streamGeneration{maxQueries: -1})
	c := &stream{of: l}
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fds[0])
	defer unix.Close(fds[1])
	if n, err := unix.Write(fds[1], bytes.Repeat([]byte{0xff}, 2*readSize)); n != 2*readSize { // not yet a message
		t.Fatal(n, err)
	}
	for i, done := range []bool{true, true, false} {
		if got := c.ready(uintptr(fds[0])); got != done || len(c.rest) != min(i+1, 2)*readSize {
			t.Fatalf("read %d: %v, with %d bytes, want %v", i, got, len(c.rest), done)
		}
	}
}

// A client that always asks and reads is never cut off.
func TestStreamSaturated(t *testing.T) {
	short := func(cfg *dnsserver.Config) { cfg.WriteTimeout = 2 * time.Second } // none is that slow, on a busy machine either
	overBoth(t, short, func(t *testing.T, s *streamServer) {
		c := s.dial()
		names := make([]string, 1000)
		for i := range names {
			names[i] = "hit."
		}
		asks := c.queries(names...)
		read := make(chan int64)
		go func() {
			n, _ := io.Copy(io.Discard, c)
			read <- n
		}()
		sent := 0
		for begun := time.Now(); time.Since(begun) < 3*time.Second; sent++ {
			if _, err := c.Write(asks); err != nil {
				t.Fatalf("after %v: %v", time.Since(begun), err)
			}
		}
		if s.tls != nil {
			c.Conn.(*tls.Conn).CloseWrite()
		}
		c.tcp.CloseWrite()
		one, err := answerTo(new(dns.Msg).SetQuestion("hit.", dns.TypeA)).Pack()
		if err != nil {
			t.Fatal(err)
		}
		if got, want := <-read, int64(sent*len(names)*(lengthLen+len(one))); got != want {
			t.Errorf("%d bytes of answers, want %d", got, want)
		}
	})
}

func TestStreamByteByByte(t *testing.T) {
	overBoth(t, nil, func(t *testing.T, s *streamServer) {
		c := s.dial()
		for _, b := range c.queries("hit1.", "miss.", "hit2.") {
			if _, err := c.Write([]byte{b}); err != nil {
				t.Fatal(err)
			}
			time.Sleep(10 * time.Microsecond) // so that most arrive alone; any split must do
		}
		c.wants("hit1.")
		got := []string{}
		for range 2 {
			m, err := c.receive()
			if err != nil {
				t.Fatal(err)
			}
			got = append(got, m.Question[0].Name)
		}
		if s := strings.Join(got, " "); s != "miss. hit2." && s != "hit2. miss." {
			t.Errorf("answers to %s", s)
		}
	})
}

// What is no message gets what CoreDNS gives it, and the connection goes on.
func TestStreamWithStrangeLengths(t *testing.T) {
	overBoth(t, nil, func(t *testing.T, s *streamServer) {
		c := s.dial()
		large := new(dns.Msg).SetQuestion("hit.large.", dns.TypeA)
		for range 400 {
			large.Extra = append(large.Extra, &dns.TXT{Hdr: dns.RR_Header{Name: ".", Rrtype: dns.TypeTXT, Class: dns.ClassINET}, Txt: []string{strings.Repeat("x", 150)}})
		}
		p, err := large.Pack()
		if err != nil {
			t.Fatal(err)
		}
		for _, n := range []int{0, 1, 11} {
			c.Write(append(binary.BigEndian.AppendUint16(nil, uint16(n)), make([]byte, n)...))
			c.send(fmt.Sprintf("hit%d.", n))
			c.wants(fmt.Sprintf("hit%d.", n))
		}
		c.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(p))), p...))
		c.wants("hit.large.")
		// Zeros are a message without question, which CoreDNS answers with FORMERR.
		c.Write(append([]byte{0xff, 0xff}, make([]byte, 65535)...))
		m, err := c.receive()
		if err != nil || m.Rcode != dns.RcodeFormatError {
			t.Fatalf("%v, %v", m, err)
		}
		c.send("hit.")
		c.wants("hit.")
	})
}

// A pipeline is answered whole, while the client reads and when it reads only afterwards.
func TestStreamPipeline(t *testing.T) {
	overBoth(t, nil, func(t *testing.T, s *streamServer) {
		const n = 10000
		for _, kind := range []string{"hit", "miss", "both"} {
			c := s.dial()
			names := make([]string, n)
			want := make(map[string]int)
			for i := range names {
				of := kind
				if kind == "both" {
					of = []string{"hit", "miss"}[i%2]
				}
				names[i] = fmt.Sprintf("%s%d.", of, i)
				want[names[i]]++
			}
			sent := make(chan error, 1)
			go func() {
				_, err := c.Write(c.queries(names...))
				sent <- err
			}()
			if kind == "hit" {
				if err := <-sent; err != nil {
					t.Fatal(err)
				}
				c.wants(names...)
				continue
			}
			for range n {
				m, err := c.receive()
				if err != nil {
					t.Fatal(err)
				}
				want[m.Question[0].Name]--
			}
			for name, n := range want {
				if n != 0 {
					t.Errorf("%s: %d answers are missing", name, n)
				}
			}
		}
	})
}

// A client that will ask no more gets all its answers, and then a FIN.
func TestStreamHalfClosed(t *testing.T) {
	overBoth(t, nil, func(t *testing.T, s *streamServer) {
		c := s.dial()
		c.send("hit1.", "slow1.", "slow2.")
		if s.tls != nil {
			c.Conn.(*tls.Conn).CloseWrite()
		}
		c.tcp.CloseWrite()
		c.wants("hit1.")
		s.wantsWaiting(2)
		close(s.letGo)
		for range 2 {
			if m, err := c.receive(); err != nil || !strings.HasPrefix(m.Question[0].Name, "slow") {
				t.Fatalf("%v, %v", m, err)
			}
		}
		c.wantsEnd()
	})
}

// A client that resets its connection leaves nothing behind.
func TestStreamReset(t *testing.T) {
	overBoth(t, nil, func(t *testing.T, s *streamServer) {
		for i := range 50 {
			c := s.dial()
			c.send("slow1.", "hit1.", "hit2.")
			s.wantsWaiting(int64(i + 1))
			c.tcp.SetLinger(0)
			c.tcp.Close()
		}
		close(s.letGo)
		until(t, func() error {
			if n := countersOf(s.Addr).streams.Load(); n != 0 {
				return fmt.Errorf("%d connections are left", n)
			}
			return nil
		})
	})
}

// A client that does not read is cut off. What waits for it is bounded.
func TestStreamSlowReader(t *testing.T) {
	short := func(cfg *dnsserver.Config) { cfg.WriteTimeout = time.Second }
	overBoth(t, short, func(t *testing.T, s *streamServer) {
		for _, name := range []string{"hit.", "large."} {
			c := s.dial()
			c.tcp.SetReadBuffer(4096)
			before := countersOf(s.Addr).slowReaders.Load()
			names := make([]string, 1000)
			for i := range names {
				names[i] = name
			}
			c.SetDeadline(time.Now().Add(30 * time.Second))
			for {
				if _, err := c.Write(c.queries(names...)); err != nil {
					break
				}
			}
			if countersOf(s.Addr).slowReaders.Load() == before {
				t.Errorf("%s: no slow reader is counted", name)
			}
		}
	})
}

func TestStreamIdle(t *testing.T) {
	short := func(cfg *dnsserver.Config) { cfg.IdleTimeout = 100 * time.Millisecond }
	overBoth(t, short, func(t *testing.T, s *streamServer) {
		c := s.connect()
		c.send("first.", "slow.") // at once: a busy machine may leave the client alone for longer than the connection may be idle
		c.wants("first.")
		s.wantsWaiting(1)
		time.Sleep(6 * tick) // the time of an answer is not idle
		close(s.letGo)
		c.wants("slow.")
		c.wantsEnd()
		// A query that comes in pieces does not keep a connection open.
		c = s.connect()
		p := c.queries("first.", "hit.")
		first := len(c.queries("first."))
		if _, err := c.Write(p[:first+1]); err != nil {
			t.Fatal(err)
		}
		c.wants("first.")
		for _, b := range p[first+1 : len(p)-1] {
			if _, err := c.Write([]byte{b}); err != nil {
				break
			}
			time.Sleep(tick)
		}
		if m, err := c.receive(); err == nil {
			t.Errorf("an answer to half a query: %v", m)
		}
	})
}

// An idle connection wakes up again, and again.
func TestStreamWakesUp(t *testing.T) {
	overBoth(t, nil, func(t *testing.T, s *streamServer) {
		c := s.dial()
		for range 3 {
			time.Sleep(tick + tick/2)
			c.send("hit.")
			c.wants("hit.")
		}
		time.Sleep(5 * tick) // parked
		c.send("hit1.", "miss.")
		c.wants("hit1.", "miss.")
	})
}

func TestStreamMostQueries(t *testing.T) {
	n := 5
	overBoth(t, func(cfg *dnsserver.Config) { cfg.MaxTCPQueries = &n }, func(t *testing.T, s *streamServer) {
		c := s.dial()
		c.send("hit1.", "slow.", "hit2.", "hit3.", "hit4.", "hit5.")
		c.wants("hit1.", "hit2.", "hit3.")
		close(s.letGo)
		c.wants("slow.")
		c.wantsEnd()
	})
}

// A connection beyond the bounds gets its first answer, and a FIN.
func TestStreamBounds(t *testing.T) {
	defer func(all, each int) { streamsMax, streamsPerClient = all, each }(streamsMax, streamsPerClient)
	for _, of := range []*int{&streamsMax, &streamsPerClient} {
		before := *of
		*of = 2
		overBoth(t, nil, func(t *testing.T, s *streamServer) {
			a, b := s.dial(), s.dial()
			s.dial().wantsEnd()
			if n := countersOf(s.Addr).refused.Load(); n != 1 {
				t.Errorf("%d refused connections are counted", n)
			}
			a.Close()
			until(t, func() error {
				if n := countersOf(s.Addr).streams.Load(); n != 1 {
					return fmt.Errorf("%d connections", n)
				}
				return nil
			})
			c := s.dial()
			for _, c := range []*streamClient{b, c} {
				c.send("hit.")
				c.wants("hit.")
			}
		})
		*of = before
	}
}

// The slow queries of one client do not hold up another client's.
func TestStreamsShareTheSlowPath(t *testing.T) {
	before := slowPerClient
	t.Cleanup(func() { slowPerClient = before })
	slowPerClient = 4
	overBoth(t, nil, func(t *testing.T, s *streamServer) {
		a, b := s.dial(), s.dial()
		for _, c := range []*streamClient{a, b} {
			c.send("slow1.", "slow2.", "slow3.")
		}
		s.wantsWaiting(4)
		c := s.connectFrom(net.IPv4(127, 0, 0, 2))
		c.send("first.", "miss.")
		for range 2 {
			if _, err := c.receive(); err != nil {
				t.Fatal(err)
			}
		}
		if n := s.waiting.Load(); n != 4 {
			t.Errorf("%d queries of one client are under way", n)
		}
		close(s.letGo)
		for _, c := range []*streamClient{a, b} {
			for range 3 {
				if _, err := c.receive(); err != nil {
					t.Fatal(err)
				}
			}
		}
	})
}

// A connection that waits for the slow path ends in time. What is under way by then is answered.
func TestStreamsEndInTime(t *testing.T) {
	slots, grace := slowPerClient, slowGrace
	t.Cleanup(func() { slowPerClient, slowGrace = slots, grace })
	slowPerClient = 1
	for _, answered := range []bool{true, false} {
		if !answered {
			slowGrace = 500 * time.Millisecond
		}
		overBoth(t, nil, func(t *testing.T, s *streamServer) {
			c := s.dial()
			c.send("slow1.", "slow2.", "slow3.")
			s.wantsWaiting(1)
			s.over.Store(true)
			begun := time.Now()
			ended := make(chan struct{})
			go func() {
				defer close(ended)
				CloseStreams(func(other Service) bool { return other.(hits).of == s })
			}()
			if answered {
				close(s.letGo)
				c.wants("slow1.", "slow2.", "slow3.")
				c.wantsEnd()
				c.tcp.Close()
			} else if m, err := c.receive(); err == nil {
				t.Errorf("an answer: %v", m)
			}
			<-ended
			if took := time.Since(begun); took > 10*time.Second {
				t.Errorf("it took %v", took)
			}
		})
	}
}

// A plugin may close the connection, and may take it over to do so.
func TestStreamClosedByAPlugin(t *testing.T) {
	overBoth(t, nil, func(t *testing.T, s *streamServer) {
		c := s.dial()
		c.send("close.")
		if m, err := c.receive(); err == nil {
			t.Errorf("an answer: %v", m)
		}
		c = s.dial()
		c.send("hijack.")
		c.wants("hijack.")
		if m, err := c.receive(); err == nil {
			t.Errorf("an answer: %v", m)
		}
	})
}

// A connection that waits for the slow path ends at once when a plugin closes it.
func TestStreamClosedWhileItWaits(t *testing.T) {
	overBoth(t, nil, func(t *testing.T, s *streamServer) {
		c := s.dial()
		c.send("late-close.")
		names := make([]string, slowMax+1)
		for i := range names {
			names[i] = "slow."
		}
		c.send(names...)
		s.wantsWaiting(slowMax - 1)
		begun := time.Now()
		close(s.closes)
		if m, err := c.receive(); err == nil {
			t.Errorf("an answer: %v", m)
		}
		until(t, func() error {
			if n := countersOf(s.Addr).streams.Load(); n != 0 {
				return fmt.Errorf("%d connections are left", n)
			}
			return nil
		})
		if took := time.Since(begun); took > slowGrace-time.Second {
			t.Errorf("it took %v", took)
		}
	})
}

// What has been asked when the connections must end is answered, and the client gets a FIN, even if it goes on asking.
func TestStreamsEnd(t *testing.T) {
	overBoth(t, nil, func(t *testing.T, s *streamServer) {
		idle, waits, busy := s.dial(), s.dial(), s.dial()
		waits.send("slow.")
		s.wantsWaiting(1)
		busy.send("hit1.", "miss.")
		ended := make(chan struct{})
		s.over.Store(true)
		go func() {
			defer close(ended)
			CloseStreams(func(other Service) bool { return other.(hits).of == s })
		}()
		idle.wantsEnd()
		busy.wants("hit1.", "miss.")
		busy.wantsEnd()
		busy.Write(busy.queries("hit2.")) // into the void
		close(s.letGo)
		waits.wants("slow.")
		waits.wantsEnd()
		idle.tcp.Close()
		waits.tcp.Close()
		busy.tcp.Close()
		<-ended
		// A new connection stays with CoreDNS.
		c := s.dial()
		if n := countersOf(s.Addr).streams.Load(); n != 0 {
			t.Errorf("%d connections", n)
		}
		c.Close()
	})
}

// A plain connection goes on with the next generation.
func TestStreamsReload(t *testing.T) {
	s := startStreams(t, transport.DNS, nil)
	c := s.dial()
	c.send("slow.")
	s.wantsWaiting(1)
	next := &streamServer{Server: s.Server, t: t, addr: s.addr, number: 1, letGo: make(chan struct{})}
	ExpectStreams(s.Addr, 1)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		CloseStreams(func(other Service) bool { return other.(hits).of == s })
	}()
	if err := OpenStreams(next.Server, 1, next.service); err != nil {
		t.Fatal(err)
	}
	close(s.letGo)
	c.wants("slow.")
	<-ended
	c.send("hit.", "miss.")
	c.wants("hit.", "miss.")
	next.over.Store(true)
	CloseStreams(func(other Service) bool { return other.(hits).of == next })
	c.wantsEnd()
}

// In a reload, the old server may still read a connection's first query when the next generation serves already. A plain connection
// goes to that one, and does not end with the old server. One by TLS stays with the old server, whose certificate it has.
func TestStreamOfAServerThatEnds(t *testing.T) {
	overBoth(t, nil, func(t *testing.T, s *streamServer) {
		first := s.dial()
		next := &streamServer{Server: s.Server, t: t, addr: s.addr, number: 1, letGo: make(chan struct{})}
		if err := OpenStreams(next.Server, 1, next.service); err != nil {
			t.Fatal(err)
		}
		c := s.dial()
		s.Stop()
		CloseStreams(func(other Service) bool { return other.(hits).of == s })
		for _, c := range []*streamClient{first, c} {
			if s.tls != nil {
				c.wantsEnd()
				continue
			}
			c.send("hit.", "miss.")
			c.wants("hit.", "miss.")
		}
		next.over.Store(true)
		CloseStreams(func(other Service) bool { return other.(hits).of == next })
		if s.tls == nil {
			c.wantsEnd()
		}
	})
}

// An idle connection costs 4 KB at most, beyond what the kernel has.
func TestStreamMemory(t *testing.T) {
	s := startStreams(t, transport.DNS, func(cfg *dnsserver.Config) { cfg.IdleTimeout = time.Minute })
	const n = 1000
	at, err := net.ResolveTCPAddr("tcp", s.addr)
	if err != nil {
		t.Fatal(err)
	}
	used := func() uint64 {
		runtime.GC()
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapAlloc + m.StackInuse
	}
	c := s.dial()
	ask := c.queries("hit.")
	before := used()
	for range n {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(fd)
		if err := unix.Connect(fd, &unix.SockaddrInet4{Port: at.Port, Addr: [4]byte{127, 0, 0, 1}}); err != nil {
			t.Fatal(err)
		}
		for range 2 { // the first is CoreDNS's
			if _, err := unix.Write(fd, ask); err != nil {
				t.Fatal(err)
			}
			var answer [512]byte
			if _, err := unix.Read(fd, answer[:]); err != nil {
				t.Fatal(err)
			}
		}
	}
	until(t, func() error { // when all count as idle
		each := (int64(used()) - int64(before)) / n
		if t.Logf("%d bytes for each idle connection", each); each > 4096 && !raceDetector {
			return fmt.Errorf("%d bytes", each)
		}
		return nil
	})
}

// FuzzStream sends bytes in pieces to a connection that goes to a loop after so many hits, or is in one from the beginning. The answers
// are those to the messages in them.
func FuzzStream(f *testing.F) {
	c := &streamClient{}
	f.Add(c.queries("hit1.", "miss1.", "hit2."), uint8(7), uint8(0))
	f.Add(c.queries("hit1.", "miss1.", "hit2.", "many1.", "miss2."), uint8(40), uint8(17))
	f.Add(c.queries(strings.Split(strings.Repeat("hit.,", 18)+"miss.,large.,hit.", ",")...), uint8(200), uint8(0))
	f.Add([]byte{0, 0, 0, 1, 7, 0xff, 0xff}, uint8(1), uint8(17))
	f.Add(append([]byte{0, 12}, make([]byte, 12)...), uint8(3), uint8(17))
	l := &streams{addr: "dns://fuzz", counts: new(counters), conns: make(map[*stream]struct{})}
	s := &streamServer{addr: "fuzz", letGo: make(chan struct{})}
	server, err := dnsserver.NewServer("dns://fuzz", []*dnsserver.Config{{Zone: ".", Plugin: []plugin.Plugin{func(plugin.Handler) plugin.Handler { return s }}}})
	if err != nil {
		f.Fatal(err)
	}
	g := &streamGeneration{generation: generation{Service: hits{s}}, idle: time.Minute, write: time.Minute, maxQueries: -1}
	g.slow = newSlowPath(server, nil, l.counts)
	go g.slow.serve()
	l.serves.Store(g)
	f.Fuzz(func(t *testing.T, p []byte, piece, before uint8) {
		if bytes.Contains(p, []byte("slow")) || bytes.Contains(p, []byte("close")) || bytes.Contains(p, []byte("hijack")) || len(p) > 4096 {
			return
		}
		want, any := 0, 0
		for q := p; len(q) >= 2 && len(q) >= 2+int(binary.BigEndian.Uint16(q)); q = q[2+binary.BigEndian.Uint16(q):] {
			m := new(dns.Msg)
			if m.Unpack(q[2:][:binary.BigEndian.Uint16(q)]) == nil && !m.Response && len(m.Question) == 1 && m.Opcode == dns.OpcodeQuery {
				want++
			}
			any++
		}
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer ln.Close()
		client, err := net.Dial("tcp", ln.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer client.Close()
		conn, err := ln.Accept()
		if err != nil {
			t.Fatal(err)
		}
		c := &stream{of: l, conn: conn, tcp: conn.(*net.TCPConn), remote: conn.RemoteAddr(), local: conn.LocalAddr(), from: netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), 53), ended: make(chan struct{}), quiet: int(before)}
		c.share = &share{conns: 1, slots: make(chan struct{}, slowPerClient)}
		allStreams.mu.Lock()
		l.conns[c] = struct{}{}
		allStreams.n++
		allStreams.mu.Unlock()
		l.running.Go(c.begin)
		go func() {
			for q := p; len(q) > 0; {
				n := min(len(q), 1+int(piece))
				client.Write(q[:n])
				q = q[n:]
			}
			client.(*net.TCPConn).CloseWrite()
		}()
		client.SetDeadline(time.Now().Add(20 * time.Second))
		got := 0
		sc := &streamClient{Conn: client, t: t}
		for {
			_, err := sc.receive()
			if err != nil {
				if !errors.Is(err, io.EOF) {
					t.Fatal(err)
				}
				break
			}
			got++
		}
		l.running.Wait()
		if got < want || got > 5*any {
			t.Errorf("%d answers, want %d of %d messages", got, want, any)
		}
	})
}
