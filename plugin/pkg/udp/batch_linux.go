package udp

import (
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// This file receives and sends packets on one socket. Which packets a socket gets is decided in group_linux.go.

const (
	// MaxQuery is the size in bytes to which received packets are cut. CoreDNS's own server uses the same size, and
	// answers FORMERR to a query that is longer.
	MaxQuery = 512

	// controlSpace is room for the larger one of IP_PKTINFO and IPV6_PKTINFO.
	controlSpace = 64

	// sendRetries is how often a reply waits for room in the buffer of the socket or of the network device.
	// sendTimeout is how long it waits each time, in ms.
	sendRetries = 3
	sendTimeout = 5

	// discardPort is the port of the discard protocol (RFC 863). It is a port from which no packets come.
	discardPort = 9

	closedFD = -1
)

// Socket is one UDP socket of a Group. SendTo is safe for concurrent use, beside the one worker that receives.
type Socket struct {
	// mu guards fd. close waits for SendTo, because the kernel may give the number of a closed descriptor to another
	// file at once. The worker needs no lock: it has ended when the socket is closed.
	mu sync.RWMutex
	fd int

	name     unix.Sockaddr // the socket's own address
	pktinfo  bool          // the socket is on a wildcard address: a reply must name the address that the query went to
	draining atomic.Bool
}

// open opens a socket in blocking mode on addr.
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
	s := &Socket{pktinfo: c.LocalAddr().(*net.UDPAddr).IP.IsUnspecified()}
	var opErr error
	err = raw.Control(func(fd uintptr) { opErr = s.adopt(int(fd)) })
	if err = errors.Join(err, opErr); err != nil {
		return nil, err
	}
	return s, nil
}

// adopt gives s a duplicate descriptor of a socket of package net. The poller of package net does not know the
// duplicate.
func (s *Socket) adopt(of int) error {
	fd, err := unix.FcntlInt(uintptr(of), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return err
	}
	// Both descriptors are one socket in the kernel. Blocking mode does not harm package net, which is about to close
	// its own.
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
	if s.name, err = unix.Getsockname(fd); err != nil {
		unix.Close(fd)
		return err
	}
	s.fd = fd
	return nil
}

// leave connects the socket, so that the kernel chooses other sockets on the address: a connected socket gets packets
// of its peer only. Replies go where they say, as before.
func (s *Socket) leave() error { return leave(s.fd, s.pktinfo) }

// leave is Socket.leave for a descriptor. wildcard says that the socket is on a wildcard address.
func leave(fd int, wildcard bool) error {
	to, err := unix.Getsockname(fd)
	if err != nil {
		return err
	}
	switch to := to.(type) {
	case *unix.SockaddrInet4:
		to.Port = discardPort
	case *unix.SockaddrInet6:
		to.Port = discardPort
	}
	err = unix.Connect(fd, to)
	if to, ok := to.(*unix.SockaddrInet6); ok && err != nil && wildcard { // the loopback device has no IPv6
		to.Addr = [16]byte{10: 0xff, 0xff, 127, 0, 0, 1}
		return unix.Connect(fd, to)
	}
	return err
}

// close closes the socket. It may be called twice.
func (s *Socket) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.fd != closedFD {
		unix.Close(s.fd)
		s.fd = closedFD
	}
}

// Peer is the sender of a packet, and the local address that the packet went to. It is valid until the Batch receives
// again.
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

// AddrPort returns the address of the sender, without a zone. On a dual-stack socket, the kernel maps an IPv4 address into IPv6;
// the result is the IPv4 address all the same.
func (p *Peer) AddrPort() netip.AddrPort {
	var ip netip.Addr
	if p.family() == unix.AF_INET {
		ip = netip.AddrFrom4([4]byte(p.name[4:8]))
	} else {
		ip = netip.AddrFrom16([16]byte(p.name[8:24])).Unmap()
	}
	return netip.AddrPortFrom(ip, uint16(p.port()))
}

func (p *Peer) family() int { return int(binary.NativeEndian.Uint16(p.name[:])) }
func (p *Peer) port() int   { return int(binary.BigEndian.Uint16(p.name[2:])) }

// answerFrom turns the control data of a received packet into that of the reply. The reply comes from the address
// that the packet went to. The interface is left to routing, except for a link-local address, which means nothing
// without it.
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

// Batch is memory for a number of packets and their replies. One worker uses it; it is not safe for concurrent use.
type Batch struct {
	packets []byte
	peers   []Peer
	in, out []mmsghdr
	inVec   []unix.Iovec
	outVec  []unix.Iovec
	n       int   // packets received
	of      []int // the packet that each reply is for
	lost    []int // packets whose replies could not be sent
	replies int

	// Failed counts replies that could not be sent, Truncated packets that were longer than MaxQuery.
	Failed, Truncated uint64
}

// NewBatch returns a batch of up to n packets. It writes to all of its memory, so that the kernel takes the memory
// from the NUMA node of the calling CPU.
func NewBatch(n int) *Batch {
	b := &Batch{
		packets: make([]byte, n*MaxQuery),
		peers:   make([]Peer, n),
		in:      make([]mmsghdr, n), inVec: make([]unix.Iovec, n),
		out: make([]mmsghdr, n), outVec: make([]unix.Iovec, n),
		of: make([]int, n),
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

// Receive waits for packets and returns how many it has got, at least 1. It returns net.ErrClosed when the socket's
// group has been drained and all packets have been received.
func (b *Batch) Receive(s *Socket) (int, error) {
	for i := range b.n { // the kernel has changed these fields
		h := &b.in[i].hdr
		h.Namelen = uint32(len(b.peers[i].name))
		if s.pktinfo {
			h.Control = &b.peers[i].control[0]
			h.SetControllen(controlSpace)
		}
	}
	b.n, b.replies, b.lost = 0, 0, b.lost[:0]
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

// empty reports whether n packets are no packets. A read from a socket that is shut down returns a message without a
// sender.
func (b *Batch) empty(n int) bool {
	for i := range n {
		if b.in[i].hdr.Namelen != 0 || b.in[i].n != 0 {
			return false
		}
	}
	return true
}

// Packet returns the i-th packet. The bytes are valid until the next Receive.
func (b *Batch) Packet(i int) []byte { return b.packets[i*MaxQuery:][:b.in[i].n] }

// Peer returns the sender of the i-th packet. It is valid until the next Receive.
func (b *Batch) Peer(i int) *Peer { return &b.peers[i] }

// Reply adds a reply to the i-th packet, at most one for each packet. The batch keeps reply until Send returns; the
// caller must not change it before.
func (b *Batch) Reply(i int, reply []byte) {
	b.outVec[b.replies].Base = &reply[0]
	b.outVec[b.replies].SetLen(len(reply))
	b.peers[i].address(&b.out[b.replies].hdr)
	b.of[b.replies] = i
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

// Send sends the replies. It counts a reply that cannot be sent in Failed, and goes on with the next one.
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
			b.lost = append(b.lost, b.of[sent])
			sent++
			retries = 0
		}
	}
	b.replies = 0
}

// Lost reports whether the reply to the i-th packet could not be sent. It is valid until the next Receive.
func (b *Batch) Lost(i int) bool { return slices.Contains(b.lost, i) }

// SendTo sends one packet to p. It returns net.ErrClosed when the socket is closed.
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

// waitForRoom waits for up to sendTimeout if errno says that there is no room for a packet. It reports whether the
// caller should try again.
func (s *Socket) waitForRoom(errno syscall.Errno, retries *int) bool {
	if errno != unix.EAGAIN && errno != unix.ENOBUFS || *retries == sendRetries {
		return false
	}
	*retries++
	unix.Poll([]unix.PollFd{{Fd: int32(s.fd), Events: unix.POLLOUT}}, sendTimeout)
	return true
}
