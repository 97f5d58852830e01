//go:build linux

package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"log"
	"net/netip"
	"slices"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"github.com/google/nftables/xt"
	"golang.org/x/sys/unix"
)

// This file is the rules. Those against connection tracking stand in a table of their own, at the priority "raw": before connection
// tracking, and so before kube-proxy's rules, in nftables and in iptables mode. A packet that is not tracked is not translated:
// one for the service's address reaches the interface that has it.
//
// No table of nftables can allow what another one drops. What a firewall of iptables drops is allowed in its own chains, as
// node-cache does it, in the form in which iptables writes rules.

const port = 53

// way is what a rule is about.
type way int

const (
	requests way = iota // to the cache
	replies             // from the cache
)

// rule is one rule. Its comment says what it does, so that a rule with the same comment is the same rule.
type rule struct {
	chain   *nftables.Chain
	comment string
	exprs   []expr.Any
	first   bool // before those that are there
}

// hooks are the chains of the table.
func hooks(name string) (prerouting, output *nftables.Chain) {
	table := &nftables.Table{Name: name, Family: nftables.TableFamilyINet}
	prerouting = &nftables.Chain{Name: "prerouting", Table: table, Type: nftables.ChainTypeFilter, Hooknum: nftables.ChainHookPrerouting, Priority: nftables.ChainPriorityRaw}
	output = &nftables.Chain{Name: "output", Table: table, Type: nftables.ChainTypeFilter, Hooknum: nftables.ChainHookOutput, Priority: nftables.ChainPriorityRaw}
	return prerouting, output
}

// protocols are those of DNS.
var protocols = []struct {
	name   string
	number byte
}{{"udp", unix.IPPROTO_UDP}, {"tcp", unix.IPPROTO_TCP}}

// untracked returns the rules of the table. Without requests, packets to the cache are tracked, and kube-proxy sends those for a
// service's address to a pod of the service.
func untracked(name string, addresses []netip.Addr, withRequests bool) (rules []rule) {
	prerouting, output := hooks(name)
	for _, a := range addresses {
		for _, p := range protocols {
			add := func(c *nftables.Chain, w way) {
				rules = append(rules, rule{chain: c, comment: comment(w, a, p.name, "not tracked"),
					exprs: slices.Concat(family(a), matchProtocol(p.number), matchAddress(a, w), matchPort(w), []expr.Any{&expr.Notrack{}})})
			}
			if withRequests {
				add(prerouting, requests)
				add(output, requests) // of the node itself
			}
			add(output, replies)
		}
	}
	return rules
}

// allowed returns the rules for iptables' own chains.
func allowed(addresses []netip.Addr) (rules []rule) {
	for _, a := range addresses {
		table := &nftables.Table{Name: "filter", Family: nftables.TableFamilyIPv4}
		if a.Is6() {
			table.Family = nftables.TableFamilyIPv6
		}
		for _, p := range protocols {
			for w, chain := range map[way]string{requests: "INPUT", replies: "OUTPUT"} {
				rules = append(rules, rule{chain: &nftables.Chain{Name: chain, Table: table}, first: true, comment: comment(w, a, p.name, "allowed"),
					exprs: slices.Concat(matchProtocol(p.number), matchAddress(a, w),
						[]expr.Any{xtPort(p.name, w), &expr.Counter{}, &expr.Verdict{Kind: expr.VerdictAccept}})})
			}
		}
	}
	return rules
}

// words are what a comment begins with, after commentPrefix.
var words = map[way]string{requests: "requests to", replies: "replies of"}

// commentPrefix is that of all rules in chains of others.
const commentPrefix = "NodeLocal DNSCache: "

func comment(w way, a netip.Addr, protocol, effect string) string {
	return fmt.Sprintf("%s%s %s by %s %s", commentPrefix, words[w], a, protocol, effect)
}

func family(a netip.Addr) []expr.Any {
	nfproto := byte(unix.NFPROTO_IPV4)
	if a.Is6() {
		nfproto = unix.NFPROTO_IPV6
	}
	return []expr.Any{&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: 1}, equal([]byte{nfproto})}
}

func matchProtocol(number byte) []expr.Any {
	return []expr.Any{&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1}, equal([]byte{number})}
}

// sourceOffset is where a packet of IP has its source, by the size of an address. The destination follows.
var sourceOffset = map[uint32]uint32{4: 12, 16: 8}

func matchAddress(a netip.Addr, w way) []expr.Any {
	size := uint32(a.BitLen() / 8)
	offset := sourceOffset[size]
	if w == requests {
		offset += size
	}
	return []expr.Any{&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: size}, equal(a.AsSlice())}
}

func matchPort(w way) []expr.Any {
	offset := uint32(0) // of the source port
	if w == requests {
		offset = 2
	}
	return []expr.Any{&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: offset, Len: 2},
		equal(binary.BigEndian.AppendUint16(nil, port))}
}

func equal(data []byte) *expr.Cmp { return &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: data} }

// xtPort is iptables' -m udp --dport 53, and the like.
func xtPort(protocol string, w way) *expr.Match {
	all, one := [2]uint16{0, 65535}, [2]uint16{port, port}
	source, destination := all, one
	if w == replies {
		source, destination = one, all
	}
	if protocol == "tcp" {
		return &expr.Match{Name: protocol, Info: &xt.Tcp{SrcPorts: source, DstPorts: destination}}
	}
	return &expr.Match{Name: protocol, Info: &xt.Udp{SrcPorts: source, DstPorts: destination}}
}

// removal says which unwanted rules of the table are removed. Each value includes those before it.
type removal int

const (
	none           removal = iota
	own                    // about requests to its own addresses
	othersRequests         // about requests to other addresses
	all
)

// ensureRules gives the table the rules that it lacks, and takes some away. All of it happens at once. It tells whether it has removed
// any.
func ensureRules(name string, addresses []netip.Addr, withRequests bool, which removal) (removed bool, err error) {
	prerouting, output := hooks(name)
	want, ofOwn := untracked(name, addresses, withRequests), untracked(name, addresses, true)
	remove := func(comment string) bool {
		yes := which == all || which >= own && slices.ContainsFunc(ofOwn, func(r rule) bool { return r.comment == comment }) ||
			which >= othersRequests && strings.HasPrefix(comment, commentPrefix+words[requests])
		removed = removed || yes
		return yes
	}
	c := &nftables.Conn{}
	c.AddTable(prerouting.Table)
	changed := 0
	for _, chain := range []*nftables.Chain{prerouting, output} {
		c.AddChain(chain)
		n, err := changeChain(c, chain, want, remove)
		if err != nil {
			return false, fmt.Errorf("table %s: %w", name, err)
		}
		changed += n
	}
	if changed == 0 {
		return false, nil
	}
	if err := c.Flush(); err != nil {
		return false, fmt.Errorf("table %s: %w", name, err)
	}
	log.Printf("has changed %d rules of the table %s", changed, name)
	return removed, nil
}

// ensureAllowed gives iptables' chains, where there are any, the rules that they lack. With exact, it removes those of its own kind
// that are for other addresses.
func ensureAllowed(addresses []netip.Addr, exact bool) error {
	want := allowed(addresses)
	return changeIptables("filter", "changed", []string{"INPUT", "OUTPUT"}, func(c *nftables.Conn, chain *nftables.Chain) (int, error) {
		return changeChain(c, chain, want, func(comment string) bool { return exact && strings.HasPrefix(comment, commentPrefix) })
	})
}

// removeLeft removes the rules against connection tracking that a node-cache has left in iptables' chains, because it was killed, or
// was told to: they would keep packets from kube-proxy that no cache answers any more.
func removeLeft(addresses []netip.Addr) error {
	return changeIptables("raw", "removed", []string{"PREROUTING", "OUTPUT"}, func(c *nftables.Conn, chain *nftables.Chain) (changes int, err error) {
		there, err := c.GetRules(chain.Table, chain)
		for _, r := range there {
			if err == nil && isUntracked(r.Exprs) && isAboutOne(r.Exprs, addresses) {
				err = c.DelRule(&nftables.Rule{Table: chain.Table, Chain: chain, Handle: r.Handle})
				changes++
			}
		}
		return changes, err
	})
}

// isUntracked tells whether a rule has the effect of iptables' -j NOTRACK, or -j CT --notrack.
func isUntracked(exprs []expr.Any) bool {
	return slices.ContainsFunc(exprs, func(e expr.Any) bool {
		switch e := e.(type) {
		case *expr.Notrack:
			return true
		case *expr.Target:
			info, _ := e.Info.(*xt.Unknown)
			// The target CT has other effects, too: its flags, which come first, say which.
			return e.Name == "NOTRACK" || e.Name == "CT" && info != nil && len(*info) > 1 && binary.NativeEndian.Uint16(*info)&ctNotrack != 0
		}
		return false
	})
}

const ctNotrack = 1 // the kernel's XT_CT_NOTRACK

// isAboutOne tells whether a rule is about one of the addresses, as its source or its destination, and about no other one.
func isAboutOne(exprs []expr.Any, addresses []netip.Addr) (yes bool) {
	for i, e := range exprs {
		p, ok := e.(*expr.Payload)
		if !ok || p.Base != expr.PayloadBaseNetworkHeader {
			continue
		}
		if yes || i+1 == len(exprs) {
			return false
		}
		source := sourceOffset[p.Len]
		value, ok := exprs[i+1].(*expr.Cmp) // else, it is a network
		if !ok || value.Op != expr.CmpOpEq || p.Offset != source && p.Offset != source+p.Len {
			return false
		}
		a, ok := netip.AddrFromSlice(value.Data)
		if yes = ok && slices.Contains(addresses, a); !yes {
			return false
		}
	}
	return yes
}

// changeIptables calls change for those of a table's chains that iptables has made. That adds to a transaction, and returns how many
// rules that is about. The log has their number, and says what was done.
func changeIptables(table, done string, chains []string, change func(*nftables.Conn, *nftables.Chain) (changes int, err error)) error {
	for _, family := range []nftables.TableFamily{nftables.TableFamilyIPv4, nftables.TableFamilyIPv6} {
		for _, name := range chains {
			c := &nftables.Conn{}
			chain := &nftables.Chain{Name: name, Table: &nftables.Table{Name: table, Family: family}}
			if there, err := c.ListChain(chain.Table, name); err != nil || there.Hooknum == nil {
				continue // iptables has made none, or it is the one of before nftables
			}
			n, err := change(c, chain)
			if err == nil && n > 0 {
				err = c.Flush()
			}
			if err != nil {
				return fmt.Errorf("iptables' chain %s of the table %s: %w", name, table, err)
			}
			if n > 0 {
				log.Printf("has %s %d rules of iptables' chain %s of the table %s", done, n, name, table)
			}
		}
	}
	return nil
}

// changeChain adds to a transaction what changes a chain so that it has those of the rules that are for it, each once, and none that
// may be removed. It returns how many changes there are.
func changeChain(c *nftables.Conn, chain *nftables.Chain, want []rule, remove func(comment string) bool) (changes int, err error) {
	there, err := (&nftables.Conn{}).GetRules(chain.Table, chain)
	if err != nil && !errors.Is(err, unix.ENOENT) && !strings.Contains(err.Error(), unix.ENOENT.Error()) {
		return 0, err
	}
	have := make(map[string]bool)
	for _, r := range there {
		text, _ := userdata.GetString(r.UserData, userdata.TypeComment)
		wanted := slices.ContainsFunc(want, func(w rule) bool { return isIn(w, chain) && w.comment == text })
		if wanted && !have[text] {
			have[text] = true
		} else if remove(text) {
			if err := c.DelRule(&nftables.Rule{Table: chain.Table, Chain: chain, Handle: r.Handle}); err != nil {
				return 0, err
			}
			changes++
		}
	}
	for _, w := range want {
		if !isIn(w, chain) || have[w.comment] {
			continue
		}
		r := &nftables.Rule{Table: chain.Table, Chain: chain, Exprs: w.exprs, UserData: userdata.AppendString(nil, userdata.TypeComment, w.comment)}
		if w.first {
			c.InsertRule(r)
		} else {
			c.AddRule(r)
		}
		changes++
	}
	return changes, nil
}

func isIn(r rule, chain *nftables.Chain) bool {
	return r.chain.Name == chain.Name && r.chain.Table.Name == chain.Table.Name && r.chain.Table.Family == chain.Table.Family
}

// removeRules removes the table, and the rules from iptables' chains.
func removeRules(name string) error {
	prerouting, _ := hooks(name)
	c := &nftables.Conn{}
	c.AddTable(prerouting.Table) // so that there is one
	c.DelTable(prerouting.Table)
	if err := c.Flush(); err != nil {
		return fmt.Errorf("table %s cannot be removed: %w", name, err)
	}
	return ensureAllowed(nil, true)
}
