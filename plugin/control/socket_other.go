//go:build !linux

package control

import (
	"net"
	"syscall"
)

// maxSocketPath is how many bytes the path of a unix socket may have; BSD has the least.
const maxSocketPath = 103

// privateSocket does nothing: the socket gets its mode after it has its name.
func privateSocket(_, _ string, _ syscall.RawConn) error { return nil }

// peerOf says who is at the other end of a connection.
func peerOf(c net.Conn) string {
	if c.RemoteAddr().Network() == "unix" {
		return "unix socket"
	}
	return c.RemoteAddr().String()
}
