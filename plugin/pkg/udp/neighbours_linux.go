package udp

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// This file finds sockets that are not a group's own: other sockets of this process, and those of all processes on
// one address.

// waitLimit is how long a read by package net may block in the kernel while its socket is in blocking mode.
const waitLimit = 100 * time.Millisecond

// LimitWaits keeps readers of this process's sockets from blocking without end.
//
// A server hands its sockets on by net.UDPConn.File and net.TCPListener.File, which put a socket into blocking mode
// for a moment. A reader that calls the kernel in that moment blocks until a packet or a connection arrives.
// Deadlines do not wake it, and Close waits for it. With a limit (SO_RCVTIMEO) the call returns, finds the socket in
// non-blocking mode, and package net goes on.
//
// The limit has no effect on a socket in non-blocking mode. A socket in blocking mode is left as it is: it belongs to
// a Group, whose workers block for as long as it takes.
func LimitWaits() error {
	limit := unix.NsecToTimeval(int64(waitLimit))
	return eachSocket(func(fd int, _ uint64) bool {
		if flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0); err != nil || flags&unix.O_NONBLOCK == 0 {
			return true
		}
		if _, err := unix.Getpeername(fd); err == nil { // a connection is never handed on
			return true
		}
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &limit)
		return true
	})
}

// eachSocket calls f with each descriptor of the process that is a socket, and with its inode, until f returns false.
// Two descriptors may be the same socket.
func eachSocket(f func(fd int, inode uint64) (more bool)) error {
	const dir = "/proc/self/fd"
	fds, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, entry := range fds {
		fd, err := strconv.Atoi(entry.Name())
		if err != nil {
			continue
		}
		link, err := os.Readlink(filepath.Join(dir, entry.Name()))
		if err != nil {
			continue
		}
		text, ok := strings.CutPrefix(link, "socket:[")
		if !ok {
			continue
		}
		inode, err := strconv.ParseUint(strings.TrimSuffix(text, "]"), 10, 64)
		if err == nil && !f(fd, inode) {
			break
		}
	}
	return nil
}

// inodeOf returns a socket's inode, which is different from that of every other open socket of the system.
func inodeOf(fd int) (uint64, error) {
	var stat unix.Stat_t
	err := unix.Fstat(fd, &stat)
	return stat.Ino, err
}

// neighbours returns the inodes of all UDP sockets on the address of fd, that one included, of all processes in its
// network namespace.
func neighbours(fd int) (map[uint64]bool, error) {
	own, err := inodeOf(fd)
	if err != nil {
		return nil, err
	}
	domain, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DOMAIN)
	if err != nil {
		return nil, err
	}
	// If the kernel tells in several pieces, it may leave out sockets when others close meanwhile: it finds its place by counting.
	// Some equal readings in a row are taken as right then.
	const tries, enough = 50, 4
	var last map[uint64]bool
	equal := 0
	for range tries {
		sockets, pieces, err := list(fd, domain)
		if err != nil {
			return nil, err
		}
		found := onAddress(sockets, own)
		if equal++; !maps.Equal(found, last) {
			last, equal = found, 1
		}
		if found[own] && (pieces == 1 || equal == enough) {
			return found, nil
		}
	}
	return nil, fmt.Errorf("the kernel does not say what else is on the address of socket %d", own)
}

// row is what the kernel tells of a socket. Two rows of one list have the same address if their sockets have.
type row struct {
	address string
	inode   uint64
}

// refused says that this system's kernel has no dump.
var refused atomic.Bool

// list returns UDP sockets, among which are all on the address of fd, and in how many pieces the kernel has told of them.
func list(fd, domain int) (found []row, pieces int, err error) {
	if !refused.Load() {
		if found, pieces, err = dump(fd, domain); err == nil {
			return found, pieces, nil
		}
		if errors.Is(err, errRefused) {
			refused.Store(true)
		}
	}
	table := "/proc/self/net/udp"
	if domain == unix.AF_INET6 {
		table = "/proc/self/net/udp6"
	}
	text, err := os.ReadFile(table)
	return rows(string(text)), 2, err // a page is a piece
}

// errRefused is an error of dump: the kernel lacks the module for it, or a sandbox does not let it through.
var errRefused = errors.New("the kernel tells of sockets in its table only")

// dump asks the kernel for the UDP sockets on the port of fd (sock_diag(7)). Sockets that come and go on other ports make no
// difference.
func dump(fd, domain int) (found []row, pieces int, err error) {
	const (
		sockDiagByFamily = 20 // SOCK_DIAG_BY_FAMILY
		requestLen       = 56 // struct inet_diag_req_v2
		messageLen       = 72 // struct inet_diag_msg
		addressAt        = 8  // idiag_src in it
		inodeAt          = 68
		limit            = time.Second
	)
	name, err := unix.Getsockname(fd)
	if err != nil {
		return nil, 0, err
	}
	var port int
	switch name := name.(type) {
	case *unix.SockaddrInet4:
		port = name.Port
	case *unix.SockaddrInet6:
		port = name.Port
	}
	kernel, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, unix.NETLINK_INET_DIAG)
	if err != nil {
		return nil, 0, fmt.Errorf("%w: %w", errRefused, err)
	}
	defer unix.Close(kernel)
	tv := unix.NsecToTimeval(int64(limit))
	if err := unix.SetsockoptTimeval(kernel, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv); err != nil {
		return nil, 0, err
	}
	order := binary.NativeEndian
	ask := order.AppendUint32(nil, unix.SizeofNlMsghdr+requestLen)
	ask = order.AppendUint16(ask, sockDiagByFamily)
	ask = order.AppendUint16(ask, unix.NLM_F_REQUEST|unix.NLM_F_DUMP)
	ask = append(ask, make([]byte, 8)...) // sequence number and sender
	ask = append(ask, byte(domain), unix.IPPROTO_UDP, 0, 0)
	ask = order.AppendUint32(ask, ^uint32(0)) // in whatever state
	ask = binary.BigEndian.AppendUint16(ask, uint16(port))
	ask = append(ask, make([]byte, unix.SizeofNlMsghdr+requestLen-len(ask))...)
	if err := unix.Sendto(kernel, ask, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return nil, 0, fmt.Errorf("%w: %w", errRefused, err)
	}
	for b := make([]byte, 64<<10); ; {
		n, _, err := unix.Recvfrom(kernel, b, 0)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return nil, 0, err
		}
		messages, err := syscall.ParseNetlinkMessage(b[:n])
		if err != nil {
			return nil, 0, err
		}
		before := len(found)
		for _, m := range messages {
			switch end := m.Header.Type == unix.NLMSG_DONE; {
			case m.Header.Flags&unix.NLM_F_DUMP_INTR != 0:
				return nil, 0, errors.New("sockets have changed meanwhile")
			case end || m.Header.Type == unix.NLMSG_ERROR:
				if len(m.Data) < 4 {
					return nil, 0, io.ErrUnexpectedEOF
				}
				if errno := int32(order.Uint32(m.Data)); !end || errno != 0 {
					return nil, 0, fmt.Errorf("%w: %w", errRefused, syscall.Errno(-errno))
				}
				if len(found) > before {
					pieces++
				}
				return found, pieces, nil
			case m.Header.Type != sockDiagByFamily || len(m.Data) < messageLen:
				return nil, 0, fmt.Errorf("a message of type %d with %d bytes", m.Header.Type, len(m.Data))
			case int(binary.BigEndian.Uint16(m.Data[4:])) == port:
				found = append(found, row{string(m.Data[addressAt : addressAt+net.IPv6len]), uint64(order.Uint32(m.Data[inodeAt:]))})
			}
		}
		if len(found) > before {
			pieces++
		}
	}
}

// rows returns what a table of sockets has (proc_net(5)).
func rows(table string) (found []row) {
	const addressAt, inodeAt = 1, 9 // columns
	for line := range strings.Lines(table) {
		columns := strings.Fields(line)
		if len(columns) <= inodeAt {
			continue
		}
		if inode, err := strconv.ParseUint(columns[inodeAt], 10, 64); err == nil { // it is not the heading
			found = append(found, row{columns[addressAt], inode})
		}
	}
	return found
}

// onAddress returns the inodes of the sockets in a list that have the same address as the socket own.
func onAddress(list []row, own uint64) map[uint64]bool {
	found := make(map[uint64]bool)
	at := slices.IndexFunc(list, func(r row) bool { return r.inode == own })
	if at < 0 {
		return found
	}
	for _, r := range list {
		if r.address == list[at].address {
			found[r.inode] = true
		}
	}
	return found
}

// Strangers returns how many sockets other processes have on the group's address.
func (g *Group) Strangers() (int, error) {
	var s *Socket
	switch {
	case len(g.sockets) > 0:
		s = g.sockets[0]
	case g.standIn != nil:
		s = g.standIn
	default:
		return 0, errors.New("the group has no socket")
	}
	all, err := neighbours(s.fd)
	if err != nil {
		return 0, err
	}
	err = eachSocket(func(_ int, inode uint64) bool {
		delete(all, inode)
		return true
	})
	return len(all), err
}

// Retire is for a process that is about to end. It makes the kernel choose only sockets of other processes on the
// group's address, if there are any: packets in the queue of a closed socket are lost. It connects the other sockets
// that this process has on the address; these can still receive what is in their queues. It is called before Drain.
func (g *Group) Retire() error {
	if len(g.sockets) == 0 {
		return nil
	}
	others, err := g.others()
	if err != nil {
		return err
	}
	var own []int
	err = eachSocket(func(fd int, inode uint64) bool {
		if others[inode] {
			own = append(own, fd)
			delete(others, inode)
		}
		return true
	})
	if err != nil || len(others) == 0 {
		return err
	}
	for _, fd := range own {
		err = errors.Join(err, leave(fd, g.sockets[0].pktinfo))
	}
	return err
}

// borrow returns a duplicate of a socket of package net that this process has on the address of as. It is for sending
// only.
func borrow(as *Socket) (*Socket, error) {
	found := closedFD
	err := eachSocket(func(fd int, inode uint64) bool {
		kind, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TYPE)
		if err != nil || kind != unix.SOCK_DGRAM || !isAt(fd, as) {
			return true
		}
		twin, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			return true
		}
		flags, err := unix.FcntlInt(uintptr(twin), unix.F_GETFL, 0)
		is, err2 := inodeOf(twin)
		// The socket may have been closed since, and its descriptor number given to another one.
		if errors.Join(err, err2) != nil || is != inode || flags&unix.O_NONBLOCK == 0 {
			unix.Close(twin)
			return true
		}
		found = twin
		return false
	})
	if err == nil && found == closedFD {
		err = errors.New("nobody else in this process listens there")
	}
	if err != nil {
		return nil, err
	}
	return &Socket{fd: found, name: as.name, pktinfo: as.pktinfo}, nil
}

// isAt reports whether the socket fd has the address that other was opened on.
func isAt(fd int, other *Socket) bool {
	name, err := unix.Getsockname(fd)
	return err == nil && reflect.DeepEqual(name, other.name)
}
