package chain

import (
	"bytes"
	"fmt"
	"net"
	"net/netip"
	"regexp"
	"slices"
	"strings"

	"github.com/coredns/coredns/plugin/acl"
	"github.com/coredns/coredns/plugin/dns64"
	"github.com/coredns/coredns/plugin/log"
	"github.com/coredns/coredns/plugin/pkg/response"
	"github.com/coredns/coredns/plugin/rewrite"
	"github.com/coredns/coredns/plugin/tsig"

	"github.com/infobloxopen/go-trees/iptree"
	"github.com/miekg/dns"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/optcache/optcache/plugin/pkg/wire"
	"github.com/optcache/optcache/plugin/pkg/zones"
)

// This file asks the rules of outer plugins about single queries. A query that a plugin acts on goes the slow path, so that the
// plugin itself does what it has to do. All others may pass it by.

// Asked is a plain query, as far as outer plugins decide by it. A worker uses one again for each packet.
type Asked struct {
	Packet []byte // the query as it has come
	Name   []byte // qname in wire format and lower case
	Qtype  uint16
	DO     bool
	TCP    bool           // it came by TCP or TLS
	Client netip.AddrPort // without a zone; an IPv4 address has 4 bytes
	Local  net.Addr       // that plugins see of the server

	text []byte // of Name; empty until somebody needs it
	key  []byte // memory of View.Takes
}

// Set makes a the query q. It keeps the bytes that q points to, and reuses its own memory.
func (a *Asked) Set(q Asked) {
	q.text, q.key = a.text[:0], a.key
	*a = q
}

// Text returns the qname in presentation format and lower case, as request.Request.Name does. It is valid until Set is called.
func (a *Asked) Text() []byte {
	if len(a.text) == 0 {
		a.text = wire.AppendText(a.text, a.Name)
	}
	return a.text
}

// acts reports whether an outer plugin acts on a query.
type acts func(*Asked) bool

// plainZones returns a set of zones. It fails for zones with a backslash: CoreDNS compares the text of names, in which one name
// can be written in several ways.
func plainZones(names []string) (zones.Set, error) {
	for _, name := range names {
		if strings.Contains(name, "\\") {
			return zones.Set{}, fmt.Errorf("the zone %q has a backslash", name)
		}
	}
	return zones.NewSet(names), nil
}

// aclPolicy and aclRule have the fields of the types policy and rule of the plugin acl.
type (
	aclPolicy struct {
		action int
		qtypes map[uint16]struct{}
		filter *iptree.Tree
	}
	aclRule struct {
		zones    []string
		policies []aclPolicy
	}
)

// aclAllow is actionAllow of the plugin acl. All other actions keep the query from the next plugin.
const aclAllow = 1

// aclActs returns whether an acl does not allow a query.
func aclActs(h acl.ACL) (acts, error) {
	type policy struct {
		aclPolicy
		nets nets
	}
	type rule struct {
		zones    zones.Set
		policies []policy
	}
	read, ok := unexported[[]aclRule](&h, "Rules")
	if !ok {
		return nil, fmt.Errorf("this version of acl does not say what its rules are")
	}
	var rules []rule
	for _, r := range read {
		set, err := plainZones(r.zones)
		if err != nil {
			return nil, err
		}
		out := rule{zones: set}
		for _, p := range r.policies {
			out.policies = append(out.policies, policy{p, netsOf(p.filter)})
		}
		rules = append(rules, out)
	}
	return func(a *Asked) bool {
		for i := range rules {
			if !rules[i].zones.Contains(a.Name) {
				continue
			}
			for k := range rules[i].policies {
				p := &rules[i].policies[k]
				_, all := p.qtypes[dns.TypeNone]
				_, this := p.qtypes[a.Qtype]
				if (all || this) && p.nets.contain(a.Client.Addr()) {
					return p.action != aclAllow
				}
			}
		}
		return false
	}, nil
}

// AllowedBy returns the counter of the plugin acl for queries that it allows, on a server and in a view.
func AllowedBy(server, view string) prometheus.Counter {
	return acl.RequestAllowCount.WithLabelValues(server, view)
}

// nets is a set of addresses, as ranges that do not overlap, in order.
type nets []struct{ from, to netip.Addr }

// netsOf returns the networks of a tree.
func netsOf(tree *iptree.Tree) (all nets) {
	for pair := range tree.Enumerate() {
		from, ok := netip.AddrFromSlice(pair.Key.IP)
		ones, _ := pair.Key.Mask.Size()
		if !ok {
			continue
		}
		last := from.AsSlice()
		for bit := ones; bit < 8*len(last); bit++ {
			last[bit/8] |= 0x80 >> (bit % 8)
		}
		to, _ := netip.AddrFromSlice(last)
		all = append(all, struct{ from, to netip.Addr }{from, to})
	}
	slices.SortFunc(all, func(a, b struct{ from, to netip.Addr }) int { return a.from.Compare(b.from) })
	merged := all[:0]
	for _, r := range all {
		if n := len(merged); n > 0 && !merged[n-1].to.Less(r.from) { // networks are in one another, or apart
			if merged[n-1].to.Less(r.to) {
				merged[n-1].to = r.to
			}
			continue
		}
		merged = append(merged, r)
	}
	return merged
}

func (n nets) contain(a netip.Addr) bool {
	_, found := slices.BinarySearchFunc(n, a, func(r struct{ from, to netip.Addr }, a netip.Addr) int {
		switch {
		case r.to.Less(a):
			return -1
		case a.Less(r.from):
			return 1
		}
		return 0
	})
	return found
}

// tsigActs returns whether a tsig refuses a query because it is not signed. A query that is signed is not plain.
func tsigActs(h *tsig.TSIGServer) (acts, error) {
	types, ok1 := unexported[map[uint16]struct{}](h, "types")
	opcodes, ok2 := unexported[map[int]struct{}](h, "opcodes")
	allTypes, ok3 := unexported[bool](h, "allTypes")
	allOpcodes, ok4 := unexported[bool](h, "allOpcodes")
	if !ok1 || !ok2 || !ok3 || !ok4 {
		return nil, fmt.Errorf("this version of tsig does not say what must be signed")
	}
	set, err := plainZones(h.Zones)
	if err != nil {
		return nil, err
	}
	_, query := opcodes[dns.OpcodeQuery]
	all := allTypes || allOpcodes || query
	return func(a *Asked) bool {
		_, this := types[a.Qtype]
		return (all || this) && set.Contains(a.Name)
	}, nil
}

// dns64Acts returns whether a dns64 looks at the response to a query.
func dns64Acts(h *dns64.DNS64) acts {
	return func(a *Asked) bool { return a.Qtype == dns.TypeAAAA && (h.AllowIPv4 || !a.Client.Addr().Is4()) }
}

// rewriteActs returns whether a rule of a rewrite meets a query. It fails if a rule goes by more than name, type and class.
func rewriteActs(h rewrite.Rewrite) (acts, error) {
	var all []acts
	for _, r := range h.Rules {
		meets, ok := rewriteMeets(r)
		if !ok {
			return nil, fmt.Errorf("only its rules for name, type, class, ttl and rcode can be asked, those for name without metadata")
		}
		all = append(all, meets)
	}
	return func(a *Asked) bool { return slices.ContainsFunc(all, func(meets acts) bool { return meets(a) }) }, nil
}

// rewriteMeets returns whether one rule meets a query.
func rewriteMeets(r rewrite.Rule) (meets acts, ok bool) {
	kind := typeName(r)
	switch kind {
	case "classRule":
		from, ok := unexported[uint16](r, "fromClass")
		return func(*Asked) bool { return from == dns.ClassINET }, ok
	case "typeRule":
		from, ok := unexported[uint16](r, "fromType")
		return func(a *Asked) bool { return a.Qtype == from }, ok
	}
	for suffix, fields := range map[string][5]string{
		"NameRule":  {"from", "prefix", "suffix", "substring", "pattern"},
		"TTLRule":   {"From", "Prefix", "Suffix", "Substring", "Pattern"},
		"RCodeRule": {"From", "Prefix", "Suffix", "Substring", "Pattern"},
	} {
		how, is := strings.CutSuffix(kind, suffix)
		at := slices.Index([]string{"exact", "prefix", "suffix", "substring", "regex"}, how)
		if !is || at < 0 {
			continue
		}
		if how == "regex" {
			pattern, ok := unexported[*regexp.Regexp](r, fields[at])
			return func(a *Asked) bool { return pattern.Match(a.Text()) }, ok
		}
		text, ok := unexported[string](r, fields[at])
		word, test := []byte(text), []func(s, word []byte) bool{bytes.Equal, bytes.HasPrefix, bytes.HasSuffix, bytes.Contains}[at]
		return func(a *Asked) bool { return test(a.Text(), word) }, ok
	}
	return nil, false
}

// Classes is a set of classes of responses, as the plugin log has them.
type Classes uint8

const (
	ClassSuccess Classes = 1 << iota
	ClassDenial
	ClassError
)

// logRule is a rule of the plugin log: it logs responses to queries for names in a zone.
type logRule struct {
	zone    []byte // lower-cased wire name
	classes Classes
}

// logRules returns the rules of a log.
func logRules(h log.Logger) (rules []logRule, err error) {
	for _, r := range h.Rules {
		if strings.Contains(r.NameScope, "\\") {
			return nil, fmt.Errorf("the zone %q has a backslash", r.NameScope)
		}
		zone, ok := zones.Wire(r.NameScope)
		if !ok {
			continue // no name is in it
		}
		out := logRule{zone: zone}
		for class, bit := range map[response.Class]Classes{
			response.All: ClassSuccess | ClassDenial | ClassError, response.Success: ClassSuccess, response.Denial: ClassDenial, response.Error: ClassError,
		} {
			if _, logged := r.Class[class]; logged {
				out.classes |= bit
			}
		}
		rules = append(rules, out)
	}
	return rules, nil
}

// Logged returns the classes of responses that the plugin log logs for name, which is in wire format and lower case.
func (e *Effects) Logged(name []byte) Classes {
	for i := range e.logs { // the first rule counts, and not the closest zone
		if wire.InZone(name, e.logs[i].zone) {
			return e.logs[i].classes
		}
	}
	return 0
}

// ClassesOf returns the classes that a response may have, by its rcode and the number of records in its answer section. The
// rest of the response decides which of them it is. expired says that a signature is not valid any more, and that the client has
// set DO, which makes it an error.
func ClassesOf(rcode, answers int, expired bool) (c Classes) {
	switch {
	case rcode == dns.RcodeSuccess && answers > 0:
		c = ClassSuccess
	case rcode == dns.RcodeSuccess:
		c = ClassSuccess | ClassDenial // NODATA needs an SOA record
	case rcode == dns.RcodeNameError && answers == 0:
		c = ClassDenial
	default:
		c = ClassError
	}
	if expired {
		c |= ClassError
	}
	return c
}

// Acts reports whether an outer plugin acts on a query.
func (e *Effects) Acts(a *Asked) bool {
	return slices.ContainsFunc(e.acts, func(acts acts) bool { return acts(a) })
}

// Watched reports whether Acts or Tap has anything to do.
func (e *Effects) Watched() bool { return len(e.acts) > 0 || e.Tapped() }
