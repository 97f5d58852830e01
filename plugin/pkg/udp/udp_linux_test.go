package udp

import (
	"errors"
	"fmt"
	"maps"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/miekg/dns"

	"github.com/optcache/optcache/test/freeport"
)

// query is a plain query with an ID.
func query(tb testing.TB, id uint16) []byte {
	tb.Helper()
	m := new(dns.Msg).SetQuestion("www.example.org.", dns.TypeA)
	m.Id = id
	b, err := m.Pack()
	if err != nil {
		tb.Fatal(err)
	}
	return b
}

// echo answers every packet with itself, from a worker's loop, and reports how many there were.
func echo(s *Socket, mark byte) (n int) {
	b := NewBatch(8)
	for {
		got, err := b.Receive(s)
		if err != nil {
			if !errors.Is(err, net.ErrClosed) {
				panic(err)
			}
			return n
		}
		n += got
		for i := range got {
			p := b.Packet(i)
			if len(p) > 3 {
				p[3] = mark
			}
			if len(p) > 0 {
				b.Reply(i, p)
			}
		}
		b.Send(s)
	}
}

// foreign opens a socket as CoreDNS does. It echoes on the socket with a mark of its own.
func foreign(t *testing.T, addr string, mark byte) *net.UDPConn {
	t.Helper()
	c, err := listen(addr)
	if err != nil {
		t.Skipf("%s: %v", addr, err)
	}
	t.Cleanup(func() { c.Close() })
	go func() {
		buf := make([]byte, 2048)
		for {
			n, from, err := c.ReadFrom(buf)
			if err != nil {
				return
			}
			if n > 3 {
				buf[3] = mark
			}
			c.WriteTo(buf[:n], from)
		}
	}()
	return c
}

// group opens sockets that get all queries.
func group(t *testing.T, addr string, n int) *Group {
	t.Helper()
	g := NewGroup(addr)
	for range n {
		if _, err := g.Add(); err != nil {
			t.Fatal(err)
		}
	}
	if err := g.Steer(n, ByQuery); err != nil {
		t.Fatal(err)
	}
	return g
}

// ask sends a packet from a new socket and returns the mark of the socket that answered.
func ask(to *net.UDPAddr, packet []byte) (byte, error) {
	c, err := net.DialUDP("udp", nil, to)
	if err != nil {
		return 0, err
	}
	defer c.Close()
	if _, err := c.Write(packet); err != nil {
		return 0, err
	}
	c.SetReadDeadline(time.Now().Add(5 * time.Second))
	buf := make([]byte, 2048)
	n, err := c.Read(buf)
	if err != nil || n < 4 {
		return 0, err
	}
	return buf[3], nil
}

// exchange is an ask that does not fail.
func exchange(t *testing.T, to *net.UDPAddr, packet []byte) byte {
	t.Helper()
	mark, err := ask(to, packet)
	if err != nil {
		t.Fatal(err)
	}
	return mark
}

// load sends queries and other packets from several sockets until the test ends. The test fails if a packet gets no
// answer. wait returns when there have been n more answers.
func load(t *testing.T, to *net.UDPAddr) (wait func(n int)) {
	const senders = 4
	answers := make(chan struct{}, 1<<20) // large enough that senders never block while no test waits
	var stop atomic.Bool
	var wg sync.WaitGroup
	for sender := range senders {
		packets := [][]byte{query(t, uint16(sender)), query(t, uint16(sender+1))}
		packets[1][2] = dns.OpcodeNotify << 3
		wg.Go(func() {
			for i := 0; !stop.Load(); i++ {
				if _, err := ask(to, packets[i%len(packets)]); err != nil {
					t.Errorf("lost: %v", err)
				}
				answers <- struct{}{}
			}
		})
	}
	t.Cleanup(func() {
		stop.Store(true)
		wg.Wait()
	})
	return func(n int) {
		for range len(answers) + n {
			<-answers
		}
	}
}

// work echoes on all sockets of a group, with the mark 0. wait returns when the group is drained.
func work(g *Group) (wait func()) {
	var wg sync.WaitGroup
	for _, s := range g.Sockets() {
		wg.Go(func() { echo(s, 0) })
	}
	return wg.Wait
}

// place is a host to listen on, and the address by which clients reach it.
type place struct{ listen, ask string }

var places = []place{
	{"127.0.0.1", "127.0.0.1"},
	{"::1", "::1"},
	{"0.0.0.0", "127.0.0.1"},
	{"", "127.0.0.1"},
	{"", "::1"},
	{"::", "::1"},
}

// farPlaces are places with a wildcard address, reached by an address that foreign does not reply from.
var farPlaces = []place{
	{"0.0.0.0", "127.3.2.1"},
	{"", "127.3.2.1"},
}

// everywhere runs a test for each place, on which a foreign socket is open already.
func everywhere(t *testing.T, places []place, test func(t *testing.T, listen string, first *net.UDPConn, to *net.UDPAddr)) {
	for _, p := range places {
		t.Run(p.listen+" "+p.ask, func(t *testing.T) {
			port := freeport.Port(t)
			listen := net.JoinHostPort(p.listen, fmt.Sprint(port))
			test(t, listen, foreign(t, listen, foreignMark), &net.UDPAddr{IP: net.ParseIP(p.ask), Port: port})
		})
	}
}

const foreignMark = 0xff

func TestSupported(t *testing.T) {
	if err := Supported(); err != nil {
		t.Fatal(err)
	}
}

// Queries go to the group, each ID to its socket. All other packets go to the other sockets, and so do queries once
// the group is gone.
func TestKernelSteersByProgram(t *testing.T) {
	for _, foreigners := range []int{1, 2} {
		t.Run(fmt.Sprint(foreigners), func(t *testing.T) {
			first := foreign(t, freeport.Address(t, "127.0.0.1"), foreignMark)
			to := first.LocalAddr().(*net.UDPAddr)
			for range foreigners - 1 {
				foreign(t, to.String(), foreignMark)
			}
			const workers = 3
			g := group(t, to.String(), workers)
			var wg sync.WaitGroup
			for i, s := range g.Sockets() {
				wg.Go(func() { echo(s, byte(i)) })
			}
			for id := range uint16(12) {
				if got := exchange(t, to, query(t, id)); got != byte(id%workers) {
					t.Errorf("ID %d: answered by %d", id, got)
				}
			}
			change := func(at int, to byte) []byte {
				p := query(t, 7)
				p[at] = to
				return p
			}
			for name, packet := range map[string][]byte{
				"response":       change(2, 0x80),
				"NOTIFY":         change(2, dns.OpcodeNotify<<3),
				"UPDATE":         change(2, dns.OpcodeUpdate<<3),
				"no question":    change(5, 0),
				"two questions":  change(5, 2),
				"256 questions":  change(4, 1),
				"answer":         change(7, 1),
				"authority":      change(9, 1),
				"two additional": change(11, 2),
				"short":          query(t, 7)[:11],
			} {
				if got := exchange(t, to, packet); got != foreignMark {
					t.Errorf("%s: answered by %d", name, got)
				}
			}
			if got := exchange(t, to, change(11, 1)); got != 7%workers {
				t.Errorf("one additional record: answered by %d", got)
			}
			if err := g.Drain(); err != nil {
				t.Error(err)
			}
			wg.Wait()
			for id := range uint16(6) {
				if got := exchange(t, to, query(t, id)); got != foreignMark {
					t.Errorf("drained, ID %d: answered by %d", id, got)
				}
			}
			g.Close()
			for id := range uint16(6) {
				if got := exchange(t, to, query(t, id)); got != foreignMark {
					t.Errorf("closed, ID %d: answered by %d", id, got)
				}
			}
		})
	}
}

// The packets for a group's socket that closes by itself go to the other sockets.
func TestClosedSocketLeavesItsPacketsToOthers(t *testing.T) {
	to := foreign(t, freeport.Address(t, "127.0.0.1"), foreignMark).LocalAddr().(*net.UDPAddr)
	g := group(t, to.String(), 1)
	g.Sockets()[0].close()
	if got := exchange(t, to, query(t, 1)); got != foreignMark {
		t.Errorf("answered by %d", got)
	}
}

// Packets that were received before the group is drained are answered.
func TestDrainLosesNothing(t *testing.T) {
	to := foreign(t, freeport.Address(t, "127.0.0.1"), foreignMark).LocalAddr().(*net.UDPAddr)
	g := group(t, to.String(), 1)
	defer g.Close()
	c, err := net.DialUDP("udp", nil, to)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	const packets = 100
	for i := range packets {
		c.Write(query(t, uint16(i)))
	}
	if err := g.Drain(); err != nil {
		t.Fatal(err)
	}
	if n := echo(g.Sockets()[0], 1); n != packets {
		t.Errorf("%d of %d packets", n, packets)
	}
	c.SetReadDeadline(time.Now().Add(5 * time.Second))
	for i := range packets {
		if _, err := c.Read(make([]byte, 512)); err != nil {
			t.Fatalf("reply %d: %v", i, err)
		}
	}
}

func TestDrainWithoutSockets(t *testing.T) {
	g := NewGroup("127.0.0.1:0")
	if err := g.Drain(); err != nil {
		t.Error(err)
	}
	if g.Standing() != Steady {
		t.Error("shifted")
	}
	g.Close()
}

// Groups come and go under load, and each packet gets its answer.
func TestDrainUnderLoadLosesNothing(t *testing.T) {
	everywhere(t, places, func(t *testing.T, listen string, _ *net.UDPConn, to *net.UDPAddr) {
		foreign(t, listen, foreignMark)
		answers := load(t, to)
		for range 5 {
			g := group(t, listen, 3)
			wait := work(g)
			answers(50)
			if got := exchange(t, to, query(t, 1)); got != 0 {
				t.Errorf("answered by %d", got)
			}
			if err := g.Drain(); err != nil {
				t.Error(err)
			}
			for id := range uint16(50) {
				if got := exchange(t, to, query(t, id)); got != foreignMark {
					t.Errorf("drained, ID %d: answered by %d", id, got)
				}
			}
			wait()
			g.Close()
			answers(50)
		}
	})
}

// When the group is gone, the kernel chooses among all foreign sockets, as if the group had never been there.
func TestSocketsOpenedAfterCloseGetPackets(t *testing.T) {
	everywhere(t, places, func(t *testing.T, listen string, _ *net.UDPConn, to *net.UDPAddr) {
		g := group(t, listen, 2)
		wait := work(g)
		if err := g.Drain(); err != nil {
			t.Fatal(err)
		}
		wait()
		g.Close()
		foreign(t, listen, 1)
		foreign(t, listen, 2)
		answeredByAll(t, to, foreignMark, 1, 2)
	})
}

// answeredByAll asks until all marks have answered. It fails if another one answers.
func answeredByAll(t *testing.T, to *net.UDPAddr, marks ...byte) {
	t.Helper()
	seen := make(map[byte]bool)
	for i := 0; i < 1000 && len(seen) < len(marks); i++ {
		mark := exchange(t, to, query(t, 1))
		if !slices.Contains(marks, mark) {
			t.Errorf("answered by %d", mark)
		}
		seen[mark] = true
	}
	if len(seen) < len(marks) {
		t.Errorf("answered by %v only", slices.Collect(maps.Keys(seen)))
	}
}

// Once a foreign socket has closed, the kernel's numbers of the sockets are wrong.
func TestShiftedGroupDrainsWithoutLoss(t *testing.T) {
	everywhere(t, places, func(t *testing.T, listen string, first *net.UDPConn, to *net.UDPAddr) {
		foreign(t, listen, 1)
		foreign(t, listen, 2)
		g := group(t, listen, 2)
		wait := work(g)
		if g.Standing() != Steady {
			t.Error("shifted from the start")
		}
		first.Close()
		if g.Standing() != Shifted {
			t.Error("not shifted")
		}
		answers := load(t, to)
		answers(100)
		if err := g.Drain(); err != nil {
			t.Error(err)
		}
		wait()
		g.Close()
		answers(100)
		answeredByAll(t, to, 1, 2)
	})
}

func TestShifted(t *testing.T) {
	for name, change := range map[string]func(addr string, first *net.UDPConn){
		"opened":   func(addr string, _ *net.UDPConn) { foreign(t, addr, 1) },
		"closed":   func(_ string, first *net.UDPConn) { first.Close() },
		"replaced": func(addr string, first *net.UDPConn) { foreign(t, addr, 1); first.Close() },
	} {
		first := foreign(t, freeport.Address(t, "127.0.0.1"), foreignMark)
		addr := first.LocalAddr().String()
		g := group(t, addr, 2)
		twin, err := first.File() // as CoreDNS hands it on to its next instance
		if err != nil {
			t.Fatal(err)
		}
		if g.Standing() != Steady {
			t.Errorf("%s: shifted before", name)
		}
		twin.Close()
		change(addr, first)
		if g.Standing() != Shifted {
			t.Errorf("%s: not shifted", name)
		}
		g.Close()
	}
}

// Replies can be sent until Close, by Send and SendTo. They come from the address that the query went to.
func TestRepliesAfterDrain(t *testing.T) {
	everywhere(t, slices.Concat(places, farPlaces), func(t *testing.T, listen string, _ *net.UDPConn, to *net.UDPAddr) {
		g := group(t, listen, 1)
		s := g.Sockets()[0]
		c, err := net.DialUDP("udp", nil, to)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		c.Write(query(t, 1))
		b := NewBatch(4)
		if n, err := b.Receive(s); n != 1 || err != nil {
			t.Fatal(n, err)
		}
		peer := *b.Peer(0)
		c.Write(query(t, 2)) // is read after Drain
		if err := g.Drain(); err != nil {
			t.Fatal(err)
		}
		b.Reply(0, []byte("batch"))
		b.Send(s)
		if err := s.SendTo([]byte("letter"), &peer); err != nil {
			t.Error(err)
		}
		if n := echo(s, 1); n != 1 {
			t.Errorf("%d packets after Drain", n)
		}
		c.SetReadDeadline(time.Now().Add(5 * time.Second))
		for _, want := range []int{len("batch"), len("letter"), len(query(t, 2))} {
			if n, err := c.Read(make([]byte, 512)); n != want {
				t.Errorf("%d bytes, not %d: %v", n, want, err)
			}
		}
		g.Close()
		if err := s.SendTo([]byte("late"), &peer); !errors.Is(err, net.ErrClosed) {
			t.Errorf("closed: %v", err)
		}
		s.close()
	})
}

// SendTo never writes to another file that gets the descriptor's number while Close runs.
func TestCloseDuringSendTo(t *testing.T) {
	to := foreign(t, freeport.Address(t, "127.0.0.1"), foreignMark).LocalAddr().(*net.UDPAddr)
	g := group(t, to.String(), 1)
	s := g.Sockets()[0]
	c, err := net.DialUDP("udp", nil, to)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.Write(query(t, 1))
	b := NewBatch(1)
	if _, err := b.Receive(s); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	sent := make(chan struct{}, 1)
	for range 4 {
		wg.Go(func() {
			for {
				if err := s.SendTo([]byte("reply"), b.Peer(0)); err != nil {
					if !errors.Is(err, net.ErrClosed) {
						t.Error(err)
					}
					return
				}
				select {
				case sent <- struct{}{}:
				default:
				}
			}
		})
	}
	<-sent
	g.Close()
	wg.Wait()
}

// A connected client accepts a reply only from the address that it has sent its query to.
func TestReplyComesFromWhereTheQueryWent(t *testing.T) {
	everywhere(t, slices.Concat(places, farPlaces), func(t *testing.T, listen string, _ *net.UDPConn, to *net.UDPAddr) {
		g := group(t, listen, 1)
		wait := work(g)
		if got := exchange(t, to, query(t, 1)); got != 0 {
			t.Errorf("answered by %d", got)
		}
		g.Drain()
		wait()
		g.Close()
	})
}

func TestPeer(t *testing.T) {
	to := foreign(t, freeport.Address(t, ""), foreignMark).LocalAddr().(*net.UDPAddr)
	g := group(t, fmt.Sprintf(":%d", to.Port), 1)
	defer g.Close()
	for _, ip := range []string{"127.0.0.1", "::1"} {
		c, err := net.DialUDP("udp", nil, &net.UDPAddr{IP: net.ParseIP(ip), Port: to.Port})
		if err != nil {
			t.Skip(err)
		}
		defer c.Close()
		q := append(query(t, 1), make([]byte, 600)...)
		c.Write(q)
		b := NewBatch(4)
		n, err := b.Receive(g.Sockets()[0])
		if n != 1 || err != nil {
			t.Fatal(n, err)
		}
		from, want := b.Peer(0).Addr(), c.LocalAddr().(*net.UDPAddr)
		if !from.IP.Equal(want.IP) || from.Port != want.Port || from.Zone != "" {
			t.Errorf("from %v, want %v", &from, want)
		}
		if v4 := b.Peer(0).AddrPort().Addr().Is4(); v4 != (ip == "127.0.0.1") {
			t.Errorf("%s: IPv4 %v", ip, v4)
		}
		if len(b.Packet(0)) != MaxQuery || b.Truncated != 1 {
			t.Errorf("%d bytes, %d truncated", len(b.Packet(0)), b.Truncated)
		}
		if err := g.Sockets()[0].SendTo([]byte("abcd"), b.Peer(0)); err != nil {
			t.Error(err)
		}
		c.SetReadDeadline(time.Now().Add(5 * time.Second))
		if n, err := c.Read(make([]byte, 10)); n != 4 {
			t.Errorf("%d bytes, %v", n, err)
		}
	}
}

// A reply that cannot be sent does not keep the others back.
func TestSendGoesOnAfterAFailure(t *testing.T) {
	to := foreign(t, freeport.Address(t, "127.0.0.1"), foreignMark).LocalAddr().(*net.UDPAddr)
	g := group(t, to.String(), 1)
	defer g.Close()
	c, err := net.DialUDP("udp", nil, to)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	const packets = 4
	for i := range packets {
		c.Write(query(t, uint16(i)))
	}
	b := NewBatch(8)
	for got := 0; got < packets; {
		n, err := b.Receive(g.Sockets()[0])
		if err != nil {
			t.Fatal(err)
		}
		for i := range n {
			if got++; got == 2 {
				b.Reply(i, make([]byte, 70_000)) // too long for UDP
			} else {
				b.Reply(i, b.Packet(i))
			}
		}
		b.Send(g.Sockets()[0])
	}
	if b.Failed != 1 {
		t.Errorf("%d failed", b.Failed)
	}
	c.SetReadDeadline(time.Now().Add(5 * time.Second))
	for range packets - 1 {
		if _, err := c.Read(make([]byte, 512)); err != nil {
			t.Fatal(err)
		}
	}
}

func TestBatchAllocatesNothing(t *testing.T) {
	to := foreign(t, freeport.Address(t, "127.0.0.1"), foreignMark).LocalAddr().(*net.UDPAddr)
	g := group(t, to.String(), 1)
	defer g.Close()
	c, err := net.DialUDP("udp", nil, to)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	b, q, buf := NewBatch(4), query(t, 1), make([]byte, 512)
	if n := testing.AllocsPerRun(100, func() {
		c.Write(q)
		n, _ := b.Receive(g.Sockets()[0])
		for i := range n {
			b.Reply(i, b.Packet(i))
		}
		b.Send(g.Sockets()[0])
		c.Read(buf)
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}
