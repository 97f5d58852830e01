// Package resolvers finds upstreams for a Corefile that must start on any machine.
//
// CoreDNS does not start with `forward . /etc/resolv.conf` if that file is missing or empty. If the file names this
// server, forward asks the server itself. A {$VARIABLE} of a Corefile has no default, and stays one word even if it
// holds several addresses. So this package chooses the addresses, and passes each in a variable of its own.
package resolvers

import (
	"bytes"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	clog "github.com/coredns/coredns/plugin/pkg/log"

	"github.com/miekg/dns"

	"github.com/optcache/optcache/plugin/pkg/regular"
)

const (
	// upstreamsVar holds the upstreams, separated by spaces. If the user has set it, it is used as it is.
	upstreamsVar = "OPTCACHE_UPSTREAMS"

	// slotVar and a number from 1 to slots are the names of the variables for a Corefile, with one upstream each.
	// Variables that are left over repeat the first upstream; forward drops duplicates.
	slotVar = "OPTCACHE_UPSTREAM_"

	// slots is the number of nameservers that resolver(5) allows in a resolv.conf (MAXNS).
	slots = 3

	// resolvConfVar names a file to read instead of resolvConf.
	resolvConfVar = "OPTCACHE_RESOLV_CONF"
	resolvConf    = "/etc/resolv.conf"

	// embedded is the address of the server block of ./Corefile that answers for example.org.
	embedded = "127.0.0.1:1054"

	dnsPort = "53"

	// probeTimeout bounds the wait for a resolver on this machine. A working one answers in microseconds from its
	// cache, and otherwise within a round trip.
	probeTimeout = 300 * time.Millisecond
)

// Export sets OPTCACHE_UPSTREAM_1 to _3. It takes the upstreams from OPTCACHE_UPSTREAMS if that is set, or else the
// usable resolvers of /etc/resolv.conf, or else the embedded upstream. It must run before this process serves. Later
// calls change nothing. It returns an error if OPTCACHE_UPSTREAMS has more than three.
func Export() error {
	upstreams := strings.Fields(os.Getenv(upstreamsVar))
	if len(upstreams) == 0 {
		upstreams = system()
		if err := os.Setenv(upstreamsVar, strings.Join(upstreams, " ")); err != nil {
			return err
		}
	}
	if len(upstreams) > slots {
		return fmt.Errorf("%s: %d addresses, at most %d are possible", upstreamsVar, len(upstreams), slots)
	}
	for i := range slots {
		upstream := upstreams[0]
		if i < len(upstreams) {
			upstream = upstreams[i]
		}
		if err := os.Setenv(slotVar+strconv.Itoa(i+1), upstream); err != nil {
			return err
		}
	}
	return nil
}

// system returns the usable resolvers of /etc/resolv.conf, or the embedded upstream if there is none.
func system() []string {
	path := resolvConf
	if p := os.Getenv(resolvConfVar); p != "" {
		path = p
	}
	text, err := regular.Read(path, 1<<20)
	if err != nil {
		text = nil // a missing file is like an empty one
	}
	found := usable(text, ofThisMachine, answers)
	if len(found) == 0 {
		clog.Infof("No usable resolver in %s: a Corefile that asks for {$%s1} gets %s", path, slotVar, embedded)
		return []string{embedded}
	}
	return found
}

// usable returns the first nameservers of a resolv.conf that forward can ask, at most slots. A nameserver on this
// machine may be this very server, or may forward to it. It must answer a probe first. This server does not serve
// yet, so the answer comes from another one.
func usable(text []byte, local func(netip.Addr) bool, answers func(addr string) bool) []string {
	conf, err := dns.ClientConfigFromReader(bytes.NewReader(text))
	if err != nil {
		return nil
	}
	var found []string
	for _, server := range conf.Servers {
		addr, err := netip.ParseAddr(server)
		if err != nil || addr.Zone() != "" {
			continue // forward drops the zone, without which a link-local address is useless
		}
		addr = addr.Unmap()
		if slices.Contains(found, addr.String()) {
			continue
		}
		if local(addr) && !answers(net.JoinHostPort(addr.String(), dnsPort)) {
			continue
		}
		if found = append(found, addr.String()); len(found) == slots {
			break
		}
	}
	return found
}

// ofThisMachine reports whether addr is a loopback address, the unspecified address, which connects to loopback, or
// the address of an interface.
func ofThisMachine(addr netip.Addr) bool {
	if addr.IsLoopback() || addr.IsUnspecified() {
		return true
	}
	nets, err := net.InterfaceAddrs()
	if err != nil {
		return false
	}
	return slices.ContainsFunc(nets, func(n net.Addr) bool {
		prefix, err := netip.ParsePrefix(n.String())
		return err == nil && prefix.Addr().Unmap() == addr
	})
}

// answers reports whether a resolver at addr can resolve the root. A resolver that forwards to a server which is not
// running answers SERVFAIL or REFUSED, or does not answer.
func answers(addr string) bool {
	query := new(dns.Msg).SetQuestion(".", dns.TypeNS)
	client := dns.Client{Timeout: probeTimeout}
	answer, _, err := client.Exchange(query, addr)
	return err == nil && (answer.Rcode == dns.RcodeSuccess || answer.Rcode == dns.RcodeNameError)
}
