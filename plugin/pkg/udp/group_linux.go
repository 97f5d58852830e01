package udp

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// This file has groups of sockets: how they are opened, how the kernel chooses among them, and how they are closed
// without loss.

// receiveBuffer is the size in bytes that a socket asks for as its buffer in the kernel. Without CAP_NET_ADMIN, the
// process gets no more than net.core.rmem_max.
const receiveBuffer = 4 << 20

// Steering is how the kernel chooses among the sockets of a group.
type Steering int

const (
	// ByQuery chooses by the query's ID. Clients draw IDs at random, so that all sockets get the same share, even
	// from a single client.
	ByQuery Steering = iota

	// ByCPU chooses by the CPU that has received the packet: socket i gets the packets of CPU i.
	ByCPU
)

// Group is a number of sockets on one address, one for each worker. Of its methods, only SendTo is safe for
// concurrent use.
type Group struct {
	addr   string
	before map[uint64]bool // inodes of all other sockets on the address when the group's first one was added

	mu      sync.RWMutex // guards sockets and standIn against SendTo
	sockets []*Socket
	standIn *Socket // sends after Close, until Release; may be nil
}

// Supported returns nil if the kernel can do what a Group needs. It tries that on a loopback address.
func Supported() error {
	other, err := listen("127.0.0.1:0")
	if err != nil {
		return err
	}
	defer other.Close()
	g := NewGroup(other.LocalAddr().String())
	defer g.Release()
	defer g.Close()
	if _, err := g.Add(); err != nil {
		return err
	}
	if err := g.Steer(1, ByQuery); err != nil {
		return err
	}
	return g.try(other)
}

// try sends packets to a group of one socket, and to the socket other on the same address, and checks that they arrive where they
// should. Some systems accept the options that a group needs, and do nothing.
func (g *Group) try(other *net.UDPConn) error {
	const (
		packets = 8 // of either kind; without steering, all of them arrive where they should by a chance of 2^-16
		limit   = time.Second
	)
	s := g.sockets[0]
	tv := unix.NsecToTimeval(int64(limit))
	if err := unix.SetsockoptTimeval(s.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv); err != nil {
		return err
	}
	other.SetDeadline(time.Now().Add(limit))
	query := make([]byte, 12) // a DNS header; what is in the question does not matter
	query[5] = 1
	strange := make([]byte, 12) // no question
	var clients []net.Conn
	for range packets {
		c, err := net.Dial("udp", other.LocalAddr().String())
		if err != nil {
			return err
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(limit))
		clients = append(clients, c)
		for _, p := range [][]byte{query, strange} {
			if _, err := c.Write(p); err != nil {
				return err
			}
		}
	}
	b := NewBatch(packets)
	for received := 0; received < packets; {
		n, err := b.Receive(s)
		if err != nil {
			return fmt.Errorf("the kernel gives no queries to the socket that the program chooses: %w", err)
		}
		for i := range n {
			if b.Packet(i)[5] != 1 {
				return errors.New("the kernel gives other packets to the socket for queries")
			}
			b.Reply(i, query)
		}
		if b.Send(s); b.Failed > 0 {
			return errors.New("the kernel does not send packets in batches")
		}
		received += n
	}
	for range packets {
		if _, err := other.Read(make([]byte, len(strange))); err != nil {
			return fmt.Errorf("the kernel does not give other packets to the other socket: %w", err)
		}
	}
	for _, c := range clients {
		if _, err := c.Read(make([]byte, len(query))); err != nil {
			return fmt.Errorf("replies do not arrive: %w", err)
		}
	}
	return nil
}

// NewGroup returns a group without sockets. addr has the form that net.ListenPacket takes. This process must have
// opened a socket with SO_REUSEPORT on it.
func NewGroup(addr string) *Group { return &Group{addr: addr} }

// Add opens one more socket. The caller must receive from it from now on: the kernel may choose it at once. If Add
// returns both a socket and an error, the caller should drain the group.
func (g *Group) Add() (*Socket, error) {
	s, err := open(g.addr)
	if err != nil {
		return nil, err
	}
	g.mu.Lock()
	g.sockets = append(g.sockets, s)
	if g.standIn != nil {
		g.standIn.close()
		g.standIn = nil
	}
	g.mu.Unlock()
	if len(g.sockets) > 1 {
		return s, nil
	}
	if g.before, err = g.others(); err == nil && len(g.before) == 0 {
		err = errors.New("nobody else listens there")
	}
	return s, err
}

// others returns the inodes of all sockets on the group's address, of all processes, except the group's own.
func (g *Group) others() (map[uint64]bool, error) {
	found, err := neighbours(g.sockets[0].fd)
	if err != nil {
		return nil, err
	}
	for _, s := range g.sockets {
		inode, err := inodeOf(s.fd)
		if err != nil {
			return nil, err
		}
		delete(found, inode)
	}
	return found, nil
}

// Standing says whether the kernel's numbers of a group's sockets are still those that Steer used.
type Standing int

const (
	// Steady means that no socket on the address has been opened or closed since the group's first one was added.
	Steady Standing = iota

	// Followed means that another process has opened sockets since. Their numbers come after the group's, which are
	// unchanged. The other process decides which of its sockets get packets.
	Followed

	// Overtaken means that another process has opened sockets since, and a socket that was there before has been closed.
	// The group's numbers are wrong, and those of the other process are right. If the owner closed its sockets and added
	// new ones, it would make the other's numbers wrong, and the two could go on so without end. So the owner should do
	// that only if queries miss the fast path again and again.
	Overtaken

	// Shifted means that the numbers are wrong. A socket that was there before has been closed, and the kernel has
	// moved another socket into its place. Or this process has opened a socket that Steer does not know. The owner
	// should drain and close the group, and add sockets again.
	Shifted
)

// Standing compares the sockets on the group's address with those that were there at first. It returns Steady if the
// system does not tell, and for a group without sockets. It must not be called between Drain and Close.
func (g *Group) Standing() Standing {
	if len(g.sockets) == 0 {
		return Steady
	}
	now, err := g.others()
	if err != nil {
		return Steady
	}
	standing, later := Steady, Followed
	for inode := range g.before {
		if !now[inode] {
			standing, later = Shifted, Overtaken
		}
		delete(now, inode)
	}
	if len(now) == 0 {
		return standing
	}
	standing = later
	eachSocket(func(_ int, inode uint64) bool {
		if now[inode] {
			standing = Shifted
		}
		return standing != Shifted
	})
	return standing
}

// Steer makes the kernel give plain queries to the first n sockets of the group, and all other packets to the sockets
// that were there before. A plain query has one question, and no records except at most one in the additional
// section. The program holds for all processes on the address, until one of them calls Steer again.
func (g *Group) Steer(n int, by Steering) error {
	if err := g.attach(steer(n, len(g.before), by)); err != nil {
		return fmt.Errorf("the kernel does not take a program for %s: %w", g.addr, err)
	}
	return nil
}

// Sockets returns the sockets in the order of Steering. The slice belongs to the group.
func (g *Group) Sockets() []*Socket { return g.sockets }

// Drain makes the kernel give all packets from now on to the other sockets. Receive returns the packets that the
// group has received already, and then net.ErrClosed. Send and SendTo work as before. Close should follow soon: on an
// IPv4 address, Linux 6.13 and later let a socket that is opened meanwhile join the group's sockets, which are
// connected, and that socket then gets all packets.
func (g *Group) Drain() error { return Drain(g) }

// Drain drains several groups at once. It takes as long as for one group: settleTime at most.
func Drain(groups ...*Group) (err error) {
	left := false
	for _, g := range groups {
		if len(g.sockets) == 0 {
			continue
		}
		left = true
		err = errors.Join(err, g.detach())
		for _, s := range g.sockets {
			err = errors.Join(err, s.leave())
		}
	}
	if left {
		settle()
	}
	for _, g := range groups {
		for _, s := range g.sockets {
			s.draining.Store(true)
			// Shutdown of a socket that is not connected returns an error, but wakes up the worker that waits for a
			// packet all the same.
			if e := unix.Shutdown(s.fd, unix.SHUT_RD); e != nil && !errors.Is(e, unix.ENOTCONN) {
				err = errors.Join(err, e)
			}
		}
	}
	return err
}

const (
	// membarrierGlobal is MEMBARRIER_CMD_GLOBAL.
	membarrierGlobal = 1

	// settleTime is how long settle takes at most. After choosing a socket, the kernel needs some microseconds to put
	// the packet into its queue.
	settleTime = 100 * time.Millisecond
)

// settling is true while a thread is in membarrier.
var settling atomic.Bool

// settle waits for packets whose socket the kernel has chosen, and which are not in its queue yet. membarrier returns
// when all CPUs have passed a point outside the kernel's critical sections. On a loaded machine that takes seconds,
// because it waits for kernel threads. Then, and where there is no membarrier, settleTime must be enough. The workers
// receive meanwhile.
func settle() {
	enough := time.NewTimer(settleTime)
	defer enough.Stop()
	settled := make(chan struct{})
	if settling.CompareAndSwap(false, true) { // at most one thread is blocked in membarrier
		go func() {
			defer settling.Store(false)
			if _, _, errno := unix.Syscall(unix.SYS_MEMBARRIER, membarrierGlobal, 0, 0); errno == 0 {
				close(settled)
			}
		}()
	}
	select {
	case <-settled:
	case <-enough.C:
	}
}

// Close closes all sockets. Their workers must have ended. From now on SendTo uses another socket that this process
// has on the address. Sockets may be added again.
func (g *Group) Close() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if len(g.sockets) == 0 {
		return
	}
	if s, err := borrow(g.sockets[0]); err == nil {
		g.standIn = s
	}
	for _, s := range g.sockets {
		s.close()
	}
	g.sockets = nil
}

// Release closes the socket that SendTo uses after Close. SendTo then returns net.ErrClosed.
func (g *Group) Release() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.standIn != nil {
		g.standIn.close()
		g.standIn = nil
	}
}

// SendTo sends one packet to p by any socket that it finds. It returns net.ErrClosed when there is none.
func (g *Group) SendTo(packet []byte, p *Peer) error {
	g.mu.RLock()
	defer g.mu.RUnlock()
	switch {
	case len(g.sockets) > 0:
		return g.sockets[0].SendTo(packet, p)
	case g.standIn != nil:
		return g.standIn.SendTo(packet, p)
	}
	return net.ErrClosed
}

// detach removes the program. The kernel then chooses by hash among all sockets that are not connected, those that
// are opened later included.
func (g *Group) detach() error {
	err := unix.SetsockoptInt(g.sockets[0].fd, unix.SOL_SOCKET, unix.SO_DETACH_REUSEPORT_BPF, 0)
	switch {
	case errors.Is(err, unix.ENOENT): // there is none
		return nil
	case errors.Is(err, unix.ENOPROTOOPT): // before Linux 5.3
		return g.attach(steer(0, len(g.before), ByQuery))
	}
	return err
}

// attach installs the program for all sockets on the address.
func (g *Group) attach(program []unix.SockFilter) error {
	return unix.SetsockoptSockFprog(g.sockets[0].fd, unix.SOL_SOCKET, unix.SO_ATTACH_REUSEPORT_CBPF,
		&unix.SockFprog{Len: uint16(len(program)), Filter: &program[0]})
}

// steer returns a classic BPF program that chooses a socket by its number, in the order of opening: first the foreign
// ones, then the n of the group. The program sees the packet from the DNS header on. A read past the packet's end
// makes it return 0, which is a foreign socket. For a number without a socket, the kernel chooses by hash among all.
func steer(n, foreign int, by Steering) []unix.SockFilter {
	const adOffset = 0xfffff000 // SKF_AD_OFF
	const adCPU = 36            // SKF_AD_CPU
	load := func(size uint16, at uint32) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_LD | size | unix.BPF_ABS, K: at}
	}
	op := func(code uint16, k int) unix.SockFilter { return unix.SockFilter{Code: code, K: uint32(k)} }
	// A packet that fails a test jumps to the code for foreign sockets.
	var p []unix.SockFilter
	if n > 0 {
		choose := load(unix.BPF_H, 0)
		if by == ByCPU {
			choose = load(unix.BPF_W, adOffset+adCPU)
		}
		ours := []unix.SockFilter{
			choose,
			op(unix.BPF_ALU|unix.BPF_MOD|unix.BPF_K, n),
			op(unix.BPF_ALU|unix.BPF_ADD|unix.BPF_K, foreign),
			op(unix.BPF_RET|unix.BPF_A, 0),
		}
		tests := []struct {
			load, pass unix.SockFilter
			jumpIfTrue bool
		}{
			{load(unix.BPF_B, 2), op(unix.BPF_JMP|unix.BPF_JSET|unix.BPF_K, 0xf8), true}, // QR and opcode are 0
			{load(unix.BPF_H, 4), op(unix.BPF_JMP|unix.BPF_JEQ|unix.BPF_K, 1), false},    // QDCOUNT
			{load(unix.BPF_W, 6), op(unix.BPF_JMP|unix.BPF_JEQ|unix.BPF_K, 0), false},    // ANCOUNT and NSCOUNT
			{load(unix.BPF_H, 10), op(unix.BPF_JMP|unix.BPF_JGT|unix.BPF_K, 1), true},    // ARCOUNT
		}
		for i, t := range tests {
			past := uint8(2*(len(tests)-1-i) + len(ours))
			if t.jumpIfTrue {
				t.pass.Jt = past
			} else {
				t.pass.Jf = past
			}
			p = append(p, t.load, t.pass)
		}
		p = append(p, ours...)
	}
	return append(p,
		load(unix.BPF_H, 0),
		op(unix.BPF_ALU|unix.BPF_MOD|unix.BPF_K, foreign),
		op(unix.BPF_RET|unix.BPF_A, 0))
}

// listen opens a socket as CoreDNS does. Package net decides on the address family and on dual stack, and all sockets
// on an address must agree in these.
func listen(addr string) (*net.UDPConn, error) {
	c := net.ListenConfig{Control: func(_, _ string, raw syscall.RawConn) error {
		var err error
		if e := raw.Control(func(fd uintptr) {
			err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEPORT, 1)
		}); e != nil {
			return e
		}
		return err
	}}
	pc, err := c.ListenPacket(context.Background(), "udp", addr)
	if err != nil {
		return nil, err
	}
	return pc.(*net.UDPConn), nil
}
