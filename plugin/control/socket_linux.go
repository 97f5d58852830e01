package control

import (
	"fmt"
	"net"
	"syscall"

	"golang.org/x/sys/unix"
)

// maxSocketPath is how many bytes the path of a unix socket may have, see unix(7).
const maxSocketPath = 107

// privateSocket gives a socket its mode before it has a name. So there is no moment at which others may connect.
func privateSocket(_, _ string, c syscall.RawConn) error {
	var err error
	if e := c.Control(func(fd uintptr) { err = unix.Fchmod(int(fd), 0o600) }); e != nil {
		return e
	}
	return err
}

// peerOf says who is at the other end of a connection.
func peerOf(c net.Conn) string {
	u, ok := c.(*net.UnixConn)
	if !ok {
		return c.RemoteAddr().String()
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return "unix socket"
	}
	var who *unix.Ucred
	if e := raw.Control(func(fd uintptr) { who, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); e != nil || err != nil {
		return "unix socket"
	}
	return fmt.Sprintf("uid %d pid %d", who.Uid, who.Pid)
}
