// Package resolvers finds the upstreams for a Corefile that should start on any machine.
//
// `forward . /etc/resolv.conf` refuses to start where that file is missing or empty, and asks
// itself where it points back at the server. And a {$VARIABLE} of a Corefile has no default and
// stays one word, however many addresses it holds. So the addresses are chosen here and handed
// over in one variable each.
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
)

const (
	// upstreamsVar holds the upstreams, separated by spaces. Set by the user it is taken as it is.
	upstreamsVar = "OPTCACHE_UPSTREAMS"

	// slotVar and a number from 1 to slots make the variables a Corefile uses, one upstream each.
	// Those left over repeat the first upstream, which forward drops as a duplicate.
	slotVar = "OPTCACHE_UPSTREAM_"

	// slots is what resolver(5) allows in a resolv.conf (MAXNS).
	slots = 3

	// resolvConfVar names a file to read instead of resolvConf.
	resolvConfVar = "OPTCACHE_RESOLV_CONF"
	resolvConf    = "/etc/resolv.conf"

	// embedded is the server block of ./Corefile that answers for example.org.
	embedded = "127.0.0.1:1054"

	dnsPort = "53"

	// probeTimeout bounds the wait for a resolver on this machine; one that works answers in
	// microseconds from its cache and within a round trip otherwise.
	probeTimeout = 300 * time.Millisecond
)

// Export sets OPTCACHE_UPSTREAM_1 to _3. They come from OPTCACHE_UPSTREAMS or, where the user has
// not set it, from the usable resolvers of /etc/resolv.conf, or else are the embedded upstream.
// It must run before this process serves. Later calls change nothing.
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

// system is what /etc/resolv.conf offers, or the embedded upstream.
func system() []string {
	path := resolvConf
	if p := os.Getenv(resolvConfVar); p != "" {
		path = p
	}
	text, err := os.ReadFile(path)
	if err != nil {
		text = nil // a missing file offers as much as an empty one
	}
	found := usable(text, ofThisMachine, answers)
	if len(found) == 0 {
		clog.Infof("No usable resolver in %s: a Corefile that asks for {$%s1} gets %s", path, slotVar, embedded)
		return []string{embedded}
	}
	return found
}

// usable picks the first slots nameservers of a resolv.conf that forward can ask. One on this
// machine may be this very server, or forward to it: it has to answer first, and since we do not
// serve yet, an answer comes from somebody else.
func usable(text []byte, local func(netip.Addr) bool, answers func(addr string) bool) []string {
	conf, err := dns.ClientConfigFromReader(bytes.NewReader(text))
	if err != nil {
		return nil
	}
	var found []string
	for _, server := range conf.Servers {
		addr, err := netip.ParseAddr(server)
		if err != nil || addr.Zone() != "" {
			continue // forward drops the zone, and without it a link-local address is no address
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

// ofThisMachine is true for loopback, for "any", which connects to loopback, and for the
// addresses of all interfaces.
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

// answers is true if a resolver at addr knows the root. One that forwards to a server that is not
// running can only say SERVFAIL or REFUSED, or nothing.
func answers(addr string) bool {
	query := new(dns.Msg).SetQuestion(".", dns.TypeNS)
	client := dns.Client{Timeout: probeTimeout}
	answer, _, err := client.Exchange(query, addr)
	return err == nil && (answer.Rcode == dns.RcodeSuccess || answer.Rcode == dns.RcodeNameError)
}
