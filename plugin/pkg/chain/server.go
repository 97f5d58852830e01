package chain

import (
	"net"
	"slices"
	"strings"

	"github.com/coredns/coredns/core/dnsserver"
)

// This file says which servers CoreDNS makes of which server blocks, without a server: it follows CoreDNS's rules.

// SameServer reports whether there is an address on which CoreDNS makes one server of both configs.
func SameServer(a, b *dnsserver.Config) bool {
	return a.Transport == b.Transport && slices.ContainsFunc(a.ListenHosts, func(host string) bool {
		at := listenAddr(host, a.Port)
		return slices.ContainsFunc(b.ListenHosts, func(other string) bool { return at == listenAddr(other, b.Port) })
	})
}

// listenAddr returns an address in the form in which CoreDNS compares addresses. It is "" if CoreDNS could not listen on it.
func listenAddr(host, port string) string {
	addr, err := net.ResolveTCPAddr("tcp", net.JoinHostPort(host, port))
	if err != nil {
		return ""
	}
	return addr.String()
}

// ServerAddrs returns the addresses of the servers that CoreDNS makes of a server block, as in dnsserver.Server.Addr, without
// duplicates. keys are the block's keys, such as dns://example.org.:53, and hosts are those that it listens on.
func ServerAddrs(keys, hosts []string) (addrs []string) {
	for _, key := range keys {
		protocol, rest, _ := strings.Cut(key, "://")
		port := rest[strings.LastIndexByte(rest, ':')+1:]
		for _, host := range hosts {
			addr := protocol + "://" + listenAddr(host, port)
			if !slices.Contains(addrs, addr) {
				addrs = append(addrs, addr)
			}
		}
	}
	return addrs
}
