package udp

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"reflect"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"
)

// receiveBuffer is the size in bytes of a socket's buffer in the kernel that is asked for. What a
// process gets is limited by net.core.rmem_max, unless it has CAP_NET_ADMIN.
const receiveBuffer = 4 << 20

// Steering says by what the kernel chooses among the sockets of a group.
type Steering int

const (
	// ByQuery chooses by the query's ID, which clients draw by chance: all sockets get the same
	// share, whoever asks.
	ByQuery Steering = iota

	// ByCPU chooses by the CPU that has received the packet: socket i gets those of CPU i.
	ByCPU
)

// Group is the sockets that a number of workers have on one address. Its methods are not safe for
// concurrent use; those of its sockets are.
type Group struct {
	addr    string
	sockets []*Socket
	foreign map[uint64]bool // inodes of the sockets of others, which come before
}

// Supported returns nil if the kernel can do what a Group needs. It tries, on a loopback address.
func Supported() error {
	other, err := listen("127.0.0.1:0")
	if err != nil {
		return err
	}
	defer other.Close()
	g := NewGroup(other.LocalAddr().String())
	defer g.Close()
	if _, err := g.Add(); err != nil {
		return err
	}
	return g.Steer(1, ByQuery)
}

// NewGroup returns a group without sockets for an address, in the form that net.ListenPacket takes, on which
// others have been opened by this process, with SO_REUSEPORT.
func NewGroup(addr string) *Group { return &Group{addr: addr} }

// Add opens one more socket. It gets packets when Steer says so.
func (g *Group) Add() (*Socket, error) {
	s, err := open(g.addr)
	if err != nil {
		return nil, err
	}
	g.sockets = append(g.sockets, s)
	if len(g.sockets) > 1 {
		return s, nil
	}
	if g.foreign, err = g.others(); err != nil {
		return nil, err
	}
	if len(g.foreign) == 0 {
		return nil, errors.New("nobody else listens there")
	}
	// Without a program, the kernel would choose among all.
	return s, g.attach(steer(0, len(g.foreign), ByQuery))
}

// others returns the inodes of the UDP sockets that the process has on the group's address, beside the group's. The
// kernel numbers sockets on one address in the order in which they were opened; those of a group come last.
func (g *Group) others() (map[uint64]bool, error) {
	at, err := unix.Getsockname(g.sockets[0].fd)
	if err != nil {
		return nil, err
	}
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return nil, err
	}
	found := make(map[uint64]bool) // two descriptors may be one socket
	for _, entry := range fds {
		fd, err := strconv.Atoi(entry.Name())
		if err != nil {
			continue
		}
		var stat unix.Stat_t
		kind, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TYPE)
		if err != nil || kind != unix.SOCK_DGRAM || unix.Fstat(fd, &stat) != nil {
			continue
		}
		if name, err := unix.Getsockname(fd); err == nil && reflect.DeepEqual(name, at) {
			found[stat.Ino] = true
		}
	}
	for _, s := range g.sockets {
		var stat unix.Stat_t
		if err := unix.Fstat(s.fd, &stat); err != nil {
			return nil, err
		}
		delete(found, stat.Ino)
	}
	return found, nil
}

// Shifted reports whether the sockets of others on the address are not those any more that were there when the group's
// first one was added. The kernel knows sockets by their numbers, and moves the last one into the place of one that
// is closed: packets then go to others than Steer has said, and sockets that were opened since get none. The owner
// should drain and close the group, and open another one. It is false if the system does not say, and for a group
// without sockets; do not ask after Drain.
func (g *Group) Shifted() bool {
	if len(g.sockets) == 0 {
		return false
	}
	now, err := g.others()
	return err == nil && !maps.Equal(now, g.foreign)
}

// Steer makes the kernel give plain queries to the first n sockets, and to the others on the address what is
// none: a query has one question, and no other records but one at the most in the additional section.
func (g *Group) Steer(n int, by Steering) error {
	if err := g.attach(steer(n, len(g.foreign), by)); err != nil {
		return fmt.Errorf("the kernel does not take a program for %s: %w", g.addr, err)
	}
	return nil
}

// Sockets returns the sockets in the order of Steering. They belong to the group.
func (g *Group) Sockets() []*Socket { return g.sockets }

// Drain makes the kernel give all packets from now on to the other sockets. What the group has
// received is still there: Receive returns it, and net.ErrClosed when there is no more. Send and SendTo work up
// to Close. Nobody should open a socket on the address before that: on an IPv4 address, Linux 6.13 and later let it
// join ours, which have left the others, and it alone gets packets then.
func (g *Group) Drain() error {
	if len(g.sockets) == 0 {
		return nil
	}
	err := g.detach()
	for _, s := range g.sockets {
		err = errors.Join(err, s.leave())
	}
	// A packet whose socket the kernel has chosen before may not be there yet. Other CPUs that are at it now have
	// ended when this returns; where it is not supported, the time up to the worker's last look has to do.
	unix.Syscall(unix.SYS_MEMBARRIER, membarrierGlobal, 0, 0)
	for _, s := range g.sockets {
		s.draining.Store(true)
		// If the socket is not connected, the error says so; who waits for a packet is woken up all the same.
		if e := unix.Shutdown(s.fd, unix.SHUT_RD); e != nil && !errors.Is(e, unix.ENOTCONN) {
			err = errors.Join(err, e)
		}
	}
	return err
}

// membarrierGlobal is MEMBARRIER_CMD_GLOBAL.
const membarrierGlobal = 1

// Close closes all sockets, whose workers have ended. SendTo returns net.ErrClosed from now on.
func (g *Group) Close() {
	for _, s := range g.sockets {
		s.close()
	}
	g.sockets = nil
}

// detach takes the program away: the kernel chooses by hash among all sockets that are not connected, those that
// are opened later included.
func (g *Group) detach() error {
	err := unix.SetsockoptInt(g.sockets[0].fd, unix.SOL_SOCKET, unix.SO_DETACH_REUSEPORT_BPF, 0)
	switch {
	case errors.Is(err, unix.ENOENT): // there is none
		return nil
	case errors.Is(err, unix.ENOPROTOOPT): // before Linux 5.3
		return g.attach(steer(0, len(g.foreign), ByQuery))
	}
	return err
}

// attach gives the kernel the program for all sockets on the address.
func (g *Group) attach(program []unix.SockFilter) error {
	return unix.SetsockoptSockFprog(g.sockets[0].fd, unix.SOL_SOCKET, unix.SO_ATTACH_REUSEPORT_CBPF,
		&unix.SockFprog{Len: uint16(len(program)), Filter: &program[0]})
}

// steer returns a classic BPF program that chooses a socket by its number in the order in which they
// were opened: first the foreign ones, then n others. It sees the packet from the DNS header on. If it
// reads past its end, the answer is 0, a foreign one. A number for which there is no socket makes the
// kernel choose by itself, among all.
func steer(n, foreign int, by Steering) []unix.SockFilter {
	const adOffset = 0xfffff000 // SKF_AD_OFF
	const adCPU = 36            // SKF_AD_CPU
	load := func(size uint16, at uint32) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_LD | size | unix.BPF_ABS, K: at}
	}
	op := func(code uint16, k int) unix.SockFilter { return unix.SockFilter{Code: code, K: uint32(k)} }
	// The queries that miss a test jump behind those that pass all of them.
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

// listen opens a socket as CoreDNS does: net decides on address family and dual stack, and all
// sockets on one address have to agree in that.
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
