package client

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"path/filepath"
	"strconv"
	"strings"
)

// Address is where a control interface listens.
type Address struct {
	text   string
	socket string   // path of a unix socket, or empty
	base   *url.URL // of the requests
}

// String is the address as it was given.
func (a Address) String() string { return a.text }

// Plain reports whether those between here and the address can read what is said, and change it.
func (a Address) Plain() bool {
	if a.socket != "" || a.base.Scheme == "https" {
		return false
	}
	host := a.base.Hostname()
	ip, err := netip.ParseAddr(host)
	return !strings.EqualFold(host, "localhost") && (err != nil || !ip.Unmap().IsLoopback())
}

// ParseAddress reads an address: unix:///path as in a Corefile, HOST:PORT as there, or an http or https URL.
func ParseAddress(text string) (Address, error) {
	a := Address{text: text}
	fail := func(why string) (Address, error) {
		return Address{}, fmt.Errorf("address %q: %s", text, why)
	}
	if !strings.Contains(text, "://") {
		host, port, err := net.SplitHostPort(text)
		if err != nil || strings.ContainsAny(host, "/?#@ ") {
			return fail("not unix:///PATH, HOST:PORT, or an http or https URL")
		}
		if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
			return fail("the port is not a number from 1 to 65535")
		}
		if host == "" { // all addresses, as a server listens on; this machine, as a client means it
			host = "localhost"
		}
		a.base = &url.URL{Scheme: "http", Host: net.JoinHostPort(host, port)}
		return a, nil
	}
	u, err := url.Parse(text)
	if err != nil {
		var e *url.Error
		if errors.As(err, &e) {
			err = e.Err
		}
		return fail(err.Error())
	}
	switch u.Scheme {
	case "unix":
		// A path is taken as it is written: a socket's name may have a percent sign.
		_, path, _ := strings.Cut(text, "://")
		if !filepath.IsAbs(path) && !strings.HasPrefix(path, "/") {
			return fail("the socket's path is not absolute: unix:///PATH has three slashes")
		}
		a.socket = path
		a.base = &url.URL{Scheme: "http", Host: "localhost"}
		return a, nil
	case "http", "https":
		if u.Hostname() == "" {
			return fail("no host")
		}
		if u.User != nil || u.RawQuery != "" || u.ForceQuery || u.Fragment != "" {
			return fail("a URL has no user, query or fragment here")
		}
		a.base = &url.URL{Scheme: u.Scheme, Host: u.Host, Path: strings.TrimSuffix(u.Path, "/")}
		return a, nil
	}
	return fail("not unix:///PATH, HOST:PORT, or an http or https URL")
}
