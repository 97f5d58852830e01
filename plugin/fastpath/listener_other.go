//go:build !linux

// This file stands in for listener_linux.go where there are no listeners.

package fastpath

import (
	"errors"

	"github.com/coredns/coredns/core/dnsserver"

	"github.com/miekg/dns"
)

// Supported returns an error.
func Supported() error { return errors.New("it needs Linux") }

// Open does nothing. Whoever wants a fast path has been told by Supported.
func Open(*dnsserver.Server, any, func() (Service, error)) error { return nil }

// Serving returns false.
func Serving(string) bool { return false }

// Close does nothing.
func Close(func(Service) bool) {}

// RealignAll does nothing.
func RealignAll() {}

// Realign does nothing.
func Realign(string) {}

// LimitWaits does nothing.
func LimitWaits(any, bool) error { return nil }

// RaiseProcs does nothing.
func RaiseProcs() {}

// ExpectStreams does nothing.
func ExpectStreams(string, int) {}

// ForgetExpected does nothing.
func ForgetExpected() {}

// OpenStreams does nothing.
func OpenStreams(*dnsserver.Server, int, func() (Service, error)) error { return nil }

// Take takes no connection.
func Take(*dnsserver.Server, dns.ResponseWriter, int, func() (Service, error)) (func(), error) {
	return nil, nil
}

// CloseStreams does nothing.
func CloseStreams(func(Service) bool) {}
