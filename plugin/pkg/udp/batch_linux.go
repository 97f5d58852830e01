package udp

import (
	"encoding/binary"
	"errors"
	"net"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	// MaxQuery is the size in bytes to which packets that are received are cut: that of CoreDNS's own
	// server, which says that such a query has the wrong format.
	MaxQuery = 512

	// controlSpace is room for the larger one of IP_PKTINFO and IPV6_PKTINFO.
	controlSpace = 64

	// A reply waits so often, and each time for so many ms, for room in the socket's buffer or in that
	// of the network device.
	sendRetries = 3
	sendTimeout = 5

	// discardPort is one that nobody sends from (RFC 863).
	discardPort = 9

	closedFD = -1
)

// Socket is one UDP socket. Its methods are safe for concurrent use.
type Socket struct {
	// mu guards fd: close waits for SendTo, for somebody else may get the number then. The worker, which
	// has ended when the socket is closed, needs no lock.
	mu sync.RWMutex
	fd int

	local    *net.UDPAddr
	pktinfo  bool // replies must say where they come from: the socket is on a wildcard address
	draining atomic.Bool
}

// open opens a socket of a group, which blocks.
func open(addr string) (*Socket, error) {
	c, err := listen(addr)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, err
	}
	s := &Socket{local: c.LocalAddr().(*net.UDPAddr)}
	s.pktinfo = s.local.IP.IsUnspecified()
	var opErr error
	err = raw.Control(func(fd uintptr) { opErr = s.adopt(int(fd)) })
	if err = errors.Join(err, opErr); err != nil {
		return nil, err
	}
	return s, nil
}

// adopt makes s a copy of a socket of package net, out of reach of its poller.
func (s *Socket) adopt(of int) error {
	fd, err := unix.FcntlInt(uintptr(of), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return err
	}
	// Both are one socket for the kernel, and the other one is about to be closed.
	if err := unix.SetNonblock(fd, false); err != nil {
		unix.Close(fd)
		return err
	}
	if unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, receiveBuffer) != nil {
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, receiveBuffer)
	}
	if s.pktinfo {
		level, option := unix.IPPROTO_IPV6, unix.IPV6_RECVPKTINFO
		if domain, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DOMAIN); err == nil && domain == unix.AF_INET {
			level, option = unix.IPPROTO_IP, unix.IP_PKTINFO
		}
		if err := unix.SetsockoptInt(fd, level, option, 1); err != nil {
			unix.Close(fd)
			return err
		}
	}
	s.fd = fd
	return nil
}

// leave makes the kernel choose other sockets on the address: it does not give to one that is connected what is not
// from its peer. What is sent goes where it says, as before.
func (s *Socket) leave() error {
	to, err := unix.Getsockname(s.fd)
	if err != nil {
		return err
	}
	switch to := to.(type) {
	case *unix.SockaddrInet4:
		to.Port = discardPort
	case *unix.SockaddrInet6:
		to.Port = discardPort
	}
	err = unix.Connect(s.fd, to)
	if to, ok := to.(*unix.SockaddrInet6); ok && err != nil && s.pktinfo { // no IPv6 on the loopback device
		to.Addr = [16]byte{10: 0xff, 0xff, 127, 0, 0, 1}
		return unix.Connect(s.fd, to)
	}
	return err
}

// close may be called twice.
func (s *Socket) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.fd != closedFD {
		unix.Close(s.fd)
		s.fd = closedFD
	}
}

// LocalAddr returns the address that the socket was opened on.
func (s *Socket) LocalAddr() *net.UDPAddr { return s.local }

// Peer is who has sent a packet, and to which of our addresses.
type Peer struct {
	name       [unix.SizeofSockaddrInet6]byte
	control    [controlSpace]byte
	nameLen    uint32
	controlLen int
}

// Addr returns the address of the sender.
func (p *Peer) Addr() net.UDPAddr {
	switch p.family() {
	case unix.AF_INET:
		return net.UDPAddr{IP: net.IPv4(p.name[4], p.name[5], p.name[6], p.name[7]), Port: p.port()}
	case unix.AF_INET6:
		a := net.UDPAddr{IP: append(net.IP(nil), p.name[8:24]...), Port: p.port()}
		if scope := binary.NativeEndian.Uint32(p.name[24:]); scope != 0 {
			a.Zone = strconv.FormatUint(uint64(scope), 10)
		}
		return a
	}
	return net.UDPAddr{}
}

// IPv4 reports whether the sender has an IPv4 address, on a dual-stack socket, too.
func (p *Peer) IPv4() bool {
	if p.family() == unix.AF_INET {
		return true
	}
	const mapped = "\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\xff\xff"
	return string(p.name[8:20]) == mapped
}

func (p *Peer) family() int { return int(binary.NativeEndian.Uint16(p.name[:])) }
func (p *Peer) port() int   { return int(binary.BigEndian.Uint16(p.name[2:])) }

// answerFrom makes of the control data of a packet that was received that of the reply: it comes from
// where the packet went to. By which interface is the routing's business, except where an address is
// one on a link only.
func (p *Peer) answerFrom() {
	if p.controlLen < unix.SizeofCmsghdr {
		return
	}
	h := (*unix.Cmsghdr)(unsafe.Pointer(&p.control[0]))
	info := p.control[unix.CmsgLen(0):p.controlLen]
	switch {
	case h.Level == unix.IPPROTO_IP && h.Type == unix.IP_PKTINFO && len(info) >= unix.SizeofInet4Pktinfo:
		clear(info[:4]) // interface
	case h.Level == unix.IPPROTO_IPV6 && h.Type == unix.IPV6_PKTINFO && len(info) >= unix.SizeofInet6Pktinfo:
		if linkLocal := info[0] == 0xfe && info[1]&0xc0 == 0x80; !linkLocal {
			clear(info[16:20])
		}
	default:
		p.controlLen = 0
	}
}

// mmsghdr is struct mmsghdr of recvmmsg(2).
type mmsghdr struct {
	hdr unix.Msghdr
	n   uint32
}

// Batch is memory for a number of packets and the replies to them. It belongs to one worker.
type Batch struct {
	packets []byte
	peers   []Peer
	in, out []mmsghdr
	inVec   []unix.Iovec
	outVec  []unix.Iovec
	n       int // received
	replies int

	// Failed counts replies that could not be sent, Truncated packets that were longer than MaxQuery.
	Failed, Truncated uint64
}

// NewBatch returns a batch of up to n packets. It touches all its memory, so that the kernel gives
// it from the NUMA node of the CPU that calls.
func NewBatch(n int) *Batch {
	b := &Batch{
		packets: make([]byte, n*MaxQuery),
		peers:   make([]Peer, n),
		in:      make([]mmsghdr, n), inVec: make([]unix.Iovec, n),
		out: make([]mmsghdr, n), outVec: make([]unix.Iovec, n),
	}
	for i := range b.packets {
		b.packets[i] = 1
	}
	for i := range b.in {
		b.inVec[i].Base = &b.packets[i*MaxQuery]
		b.inVec[i].SetLen(MaxQuery)
		h := &b.in[i].hdr
		h.Name = &b.peers[i].name[0]
		h.Iov = &b.inVec[i]
		h.SetIovlen(1)
		h = &b.out[i].hdr
		h.Iov = &b.outVec[i]
		h.SetIovlen(1)
	}
	b.n = n
	return b
}

// Receive waits for packets and returns how many there are, at least 1. The error is net.ErrClosed
// when the socket's group is drained and nothing is left.
func (b *Batch) Receive(s *Socket) (int, error) {
	for i := range b.n { // what the kernel has changed
		h := &b.in[i].hdr
		h.Namelen = uint32(len(b.peers[i].name))
		if s.pktinfo {
			h.Control = &b.peers[i].control[0]
			h.SetControllen(controlSpace)
		}
	}
	b.n, b.replies = 0, 0
	for {
		flags := unix.MSG_WAITFORONE
		n, _, errno := unix.Syscall6(unix.SYS_RECVMMSG, uintptr(s.fd), uintptr(unsafe.Pointer(&b.in[0])),
			uintptr(len(b.in)), uintptr(flags), 0, 0)
		switch {
		case errno == unix.EINTR:
			continue
		case errno != 0:
			b.n = len(b.in)
			return 0, errno
		case s.draining.Load() && int(n) > 0 && b.empty(int(n)):
			b.n = len(b.in)
			return 0, net.ErrClosed
		}
		b.n = int(n)
		break
	}
	for i := range b.n {
		h := &b.in[i].hdr
		p := &b.peers[i]
		p.nameLen, p.controlLen = h.Namelen, 0
		if s.pktinfo {
			p.controlLen = int(h.Controllen)
			p.answerFrom()
		}
		if h.Flags&unix.MSG_TRUNC != 0 {
			b.Truncated++
		}
	}
	return b.n, nil
}

// empty reports whether n packets are none: what a socket that is shut down returns has no sender.
func (b *Batch) empty(n int) bool {
	for i := range n {
		if b.in[i].hdr.Namelen != 0 || b.in[i].n != 0 {
			return false
		}
	}
	return true
}

// Packet returns the i-th packet, up to the next Receive.
func (b *Batch) Packet(i int) []byte { return b.packets[i*MaxQuery:][:b.in[i].n] }

// Peer returns the sender of the i-th packet, up to the next Receive.
func (b *Batch) Peer(i int) *Peer { return &b.peers[i] }

// Reply takes a reply to the i-th packet, at most one for each. Its bytes must not change up to the end
// of Send.
func (b *Batch) Reply(i int, reply []byte) {
	b.outVec[b.replies].Base = &reply[0]
	b.outVec[b.replies].SetLen(len(reply))
	b.peers[i].address(&b.out[b.replies].hdr)
	b.replies++
}

// address makes p the destination of a message.
func (p *Peer) address(h *unix.Msghdr) {
	h.Name, h.Namelen = &p.name[0], p.nameLen
	h.Control = nil
	if p.controlLen > 0 {
		h.Control = &p.control[0]
	}
	h.SetControllen(p.controlLen)
}

// Send sends the replies. One that cannot be sent is counted in Failed, and the others are sent.
func (b *Batch) Send(s *Socket) {
	retries := 0
	for sent := 0; sent < b.replies; {
		n, _, errno := unix.Syscall6(unix.SYS_SENDMMSG, uintptr(s.fd), uintptr(unsafe.Pointer(&b.out[sent])),
			uintptr(b.replies-sent), unix.MSG_DONTWAIT, 0, 0)
		switch {
		case errno == 0:
			sent += int(n)
			retries = 0
		case errno == unix.EINTR || s.waitForRoom(errno, &retries):
		default:
			b.Failed++
			sent++
			retries = 0
		}
	}
	b.replies = 0
}

// SendTo sends one packet. The error is net.ErrClosed when the socket's group is closed.
func (s *Socket) SendTo(packet []byte, p *Peer) error {
	if len(packet) == 0 {
		return nil
	}
	vec := unix.Iovec{Base: &packet[0]}
	vec.SetLen(len(packet))
	h := unix.Msghdr{Iov: &vec}
	h.SetIovlen(1)
	p.address(&h)
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.fd == closedFD {
		return net.ErrClosed
	}
	for retries := 0; ; {
		_, _, errno := unix.Syscall(unix.SYS_SENDMSG, uintptr(s.fd), uintptr(unsafe.Pointer(&h)), unix.MSG_DONTWAIT)
		switch {
		case errno == 0:
			return nil
		case errno == unix.EINTR || s.waitForRoom(errno, &retries):
		default:
			return errno
		}
	}
}

// waitForRoom waits a little if the error says that there is no room for a packet, and reports whether
// it is worth another try.
func (s *Socket) waitForRoom(errno syscall.Errno, retries *int) bool {
	if errno != unix.EAGAIN && errno != unix.ENOBUFS || *retries == sendRetries {
		return false
	}
	*retries++
	unix.Poll([]unix.PollFd{{Fd: int32(s.fd), Events: unix.POLLOUT}}, sendTimeout)
	return true
}
