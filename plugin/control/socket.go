package control

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/coredns/coredns/plugin/pkg/reuseport"
)

// dialTimeout is for how long a socket is asked whether there is a server behind it.
const dialTimeout = time.Second

// listen opens what the options name. ours says that this process listens on the same port already, by another spelling
// of its host.
func listen(o Options, ours bool) (net.Listener, error) {
	if path, ok := o.socket(); ok {
		return listenUnix(path)
	}
	return listenTCP(o, ours)
}

// listenTCP shares its port with other listeners of this process, so that a reload may spell the address in another
// way. Another process's port is an error, also if that process would share it: half of the requests would reach the
// wrong cache.
func listenTCP(o Options, ours bool) (net.Listener, error) {
	if !ours {
		l, err := net.Listen("tcp", o.Address)
		if err != nil {
			return nil, inUse(o.Address, err)
		}
		if _, port, _ := net.SplitHostPort(o.Address); port == "0" {
			o.Address = l.Addr().String()
		}
		l.Close()
	}
	l, err := reuseport.Listen("tcp", o.Address)
	if err != nil {
		return nil, inUse(o.Address, err)
	}
	// A name may resolve to anything.
	if at, ok := l.Addr().(*net.TCPAddr); o.TokenFile == "" && (!ok || !at.IP.IsLoopback()) {
		l.Close()
		return nil, fmt.Errorf("%q: without a token, only a loopback address is allowed, and this is %s", o.Address, l.Addr())
	}
	return l, nil
}

func inUse(address string, err error) error {
	if errors.Is(err, syscall.EADDRINUSE) {
		return fmt.Errorf("%q: address in use", address)
	}
	return fmt.Errorf("%q: %w", address, err)
}

// unixListener is a listener that removes its socket, and no other one that has taken its place.
type unixListener struct {
	*net.UnixListener
	path string
	info fs.FileInfo
	once sync.Once
}

// listenUnix listens on a socket that only the server's user may use. It takes the place of a socket that nobody
// listens on. It makes the socket's directory, for that user alone, if nothing above is missing: /run is empty after a boot, and so
// is a volume that a container has there.
func listenUnix(path string) (net.Listener, error) {
	if err := checkSocketFile(path); err != nil {
		return nil, err
	}
	if err := os.Mkdir(filepath.Dir(path), 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, fmt.Errorf("%q: the socket's directory: %w", unixScheme+path, err)
	}
	if err := removeStale(path); err != nil {
		return nil, err
	}
	if dir, err := os.Stat(filepath.Dir(path)); err == nil && dir.Mode().Perm()&0o002 != 0 && dir.Mode()&fs.ModeSticky == 0 {
		log.Warningf("control: %s may be written by every user; who may write it can put another socket in place of the server's", filepath.Dir(path))
	}
	config := net.ListenConfig{Control: privateSocket}
	l, err := config.Listen(context.Background(), "unix", path)
	if err != nil {
		return nil, inUse(unixScheme+path, err)
	}
	u := l.(*net.UnixListener)
	u.SetUnlinkOnClose(false)
	err = os.Chmod(path, 0o600)
	info, statErr := os.Lstat(path)
	if err = errors.Join(err, statErr); err != nil {
		u.Close()
		os.Remove(path)
		return nil, fmt.Errorf("%q: %w", unixScheme+path, err)
	}
	return &unixListener{UnixListener: u, path: path, info: info}, nil
}

// removeStale removes a socket if no process listens on it.
func removeStale(path string) error {
	if _, err := os.Lstat(path); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	c, err := net.DialTimeout("unix", path, dialTimeout)
	if err == nil {
		c.Close()
		return fmt.Errorf("%q: address in use", unixScheme+path)
	}
	if !errors.Is(err, syscall.ECONNREFUSED) {
		return fmt.Errorf("%q: address in use, or not to be asked: %w", unixScheme+path, err)
	}
	if err := os.Remove(path); err != nil {
		return fmt.Errorf("%q: a stale socket: %w", unixScheme+path, err)
	}
	log.Infof("control: %s was a socket that nobody listened on; it is taken over", path)
	return nil
}

func (l *unixListener) Close() error {
	l.once.Do(func() {
		if now, err := os.Lstat(l.path); err == nil && os.SameFile(now, l.info) {
			os.Remove(l.path)
		}
	})
	return l.UnixListener.Close()
}
