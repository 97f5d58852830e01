package control

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// Options are the words of a `control` line: control ADDRESS [token FILE] [tls CERT KEY].
type Options struct {
	Address   string // unix:///path or HOST:PORT
	TokenFile string // empty: none
	CertFile  string // empty: no TLS
	KeyFile   string
}

// unixScheme begins the address of a unix socket.
const unixScheme = "unix://"

// Check returns what is wrong with the options. It reads the files that they name. It does not say whether the address
// can be listened on: Listen does.
func (o *Options) Check() error {
	if (o.CertFile == "") != (o.KeyFile == "") {
		return errors.New("tls: two files are needed, CERT and KEY")
	}
	var err error
	if path, ok := o.socket(); ok {
		err = o.checkSocket(path)
	} else {
		err = o.checkHostPort()
	}
	if err != nil {
		return err
	}
	if o.TokenFile != "" {
		if _, err := loadToken([]string{o.TokenFile}); err != nil {
			return err
		}
	}
	if o.CertFile != "" {
		if _, err := loadCertificate([]string{o.CertFile, o.KeyFile}); err != nil {
			return err
		}
	}
	return nil
}

// socket returns the path of a unix socket.
func (o *Options) socket() (path string, ok bool) {
	path, ok = strings.CutPrefix(o.Address, unixScheme)
	return path, ok
}

func (o *Options) checkSocket(path string) error {
	if !filepath.IsAbs(path) || strings.ContainsRune(path, 0) || filepath.Clean(path) != path {
		return fmt.Errorf("%q: an absolute path is expected, as in unix:///run/optcache/control.sock", o.Address)
	}
	if len(path) > maxSocketPath {
		return fmt.Errorf("%q: the path has %d bytes; a socket's may have %d", o.Address, len(path), maxSocketPath)
	}
	if o.CertFile != "" {
		return fmt.Errorf("tls: %q is a unix socket, which takes no TLS", o.Address)
	}
	folder := filepath.Dir(path)
	dir, err := os.Stat(folder)
	if errors.Is(err, fs.ErrNotExist) { // listenUnix makes it
		folder = filepath.Dir(folder)
		dir, err = os.Stat(folder)
	}
	if err != nil {
		return fmt.Errorf("%q: the socket's directory: %w", o.Address, err)
	}
	if !dir.IsDir() {
		return fmt.Errorf("%q: %s is no directory", o.Address, folder)
	}
	return checkSocketFile(path)
}

// checkSocketFile returns an error if there is something at path that is no socket.
func checkSocketFile(path string) error {
	at, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return fmt.Errorf("%q: %w", unixScheme+path, err)
	case at.Mode().Type() != fs.ModeSocket:
		return fmt.Errorf("%q: there is a file that is no socket", unixScheme+path)
	}
	return nil
}

func (o *Options) checkHostPort() error {
	host, port, err := net.SplitHostPort(o.Address)
	if err != nil || strings.Contains(o.Address, "/") {
		return fmt.Errorf("%q: the address is HOST:PORT or unix:///path", o.Address)
	}
	if _, err := strconv.ParseUint(port, 10, 16); err != nil {
		return fmt.Errorf("%q: %q is no port", o.Address, port)
	}
	if o.TokenFile == "" && !isLoopback(host) {
		return fmt.Errorf("%q: without a token, only a loopback address is allowed: 127.0.0.1, [::1] or localhost", o.Address)
	}
	return nil
}

// isLoopback reports whether a host, by name or address, is this machine for itself.
func isLoopback(host string) bool {
	if strings.EqualFold(host, "localhost") {
		return true
	}
	ip, err := netip.ParseAddr(host)
	return err == nil && ip.Unmap().IsLoopback()
}

// id is the same for options that name the same address.
func (o *Options) id() string {
	if _, ok := o.socket(); ok {
		return o.Address
	}
	return strings.ToLower(o.Address)
}
