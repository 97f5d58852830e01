package chain

import (
	"context"
	"encoding/binary"
	"fmt"
	"hash/maphash"
	"net"
	"net/netip"
	"slices"
	"sync/atomic"

	"github.com/coredns/coredns/core/dnsserver"
	"github.com/coredns/coredns/plugin/view"
	"github.com/coredns/coredns/request"

	"github.com/expr-lang/expr/ast"
	"github.com/expr-lang/expr/vm"
	"github.com/miekg/dns"
)

// This file asks the expressions of the plugin view which queries are for a server block. The plugin itself evaluates them. As they
// cost more than a hit, what they decided is kept, by the parts of the query that they look at.

// viewParts are parts of a query that an expression looks at.
type viewParts uint8

const (
	viewClient viewParts = 1 << iota
	viewPort
	viewName
	viewType
	viewProto
	viewDO
	viewServer
)

// viewFunctions are the functions of expressions that go by a plain query, with the parts that they look at. The class of such a
// query is IN, and its opcode is QUERY.
var viewFunctions = map[string]viewParts{
	"incidr": 0, "class": 0, "opcode": 0,
	"client_ip": viewClient, "port": viewPort, "name": viewName, "type": viewType, "proto": viewProto, "do": viewDO,
	"server_ip": viewServer, "server_port": viewServer,
}

// viewBuiltins are functions of the language that go by their arguments only.
var viewBuiltins = []string{
	"all", "none", "any", "one", "filter", "map", "find", "findIndex", "findLast", "findLastIndex", "count", "len", "abs", "int", "string",
	"trim", "trimPrefix", "trimSuffix", "upper", "lower", "split", "splitAfter", "replace", "repeat", "join", "indexOf", "lastIndexOf",
	"hasPrefix", "hasSuffix", "first", "last", "get", "take", "reverse",
}

// viewKept is how many decisions a View keeps. An expression that goes by names has one for each name.
const viewKept = 4096

// View says which queries are for a server block with the plugin view. It is safe for concurrent use.
type View struct {
	filter dnsserver.FilterFunc
	parts  viewParts
	known  bool // the expressions go by nothing but parts

	seed    maphash.Seed
	decided [viewKept]atomic.Pointer[viewDecision]
}

// viewDecision does not change.
type viewDecision struct {
	key   string // of the parts
	takes bool
}

// ViewOf returns the view of a server block, or nil if it has none. err says why queries alone do not show what is for the block;
// then the view decides nothing.
func ViewOf(cfg *dnsserver.Config) (v *View, err error) {
	if len(cfg.FilterFuncs) == 0 {
		return nil, nil
	}
	v = &View{seed: maphash.MakeSeed()}
	h, ok := cfg.Handler("view").(*view.View)
	if !ok || len(cfg.FilterFuncs) > 1 {
		return v, fmt.Errorf("it does not know the plugin that chooses the queries for the server block")
	}
	programs, ok := unexported[[]*vm.Program](h, "progs")
	if !ok {
		return v, fmt.Errorf("this version of view does not say what its expressions are")
	}
	for _, p := range programs {
		look := viewLook{of: v}
		node := p.Node()
		if ast.Walk(&node, &look); look.strange != "" {
			return v, fmt.Errorf("it cannot tell from a query alone what %s in an expression of view %s is", look.strange, h.ViewName())
		}
	}
	v.filter, v.known = h.Filter, true
	return v, nil
}

// viewLook looks at the parts of an expression.
type viewLook struct {
	of      *View
	strange string // a function that does not go by a plain query
}

// Visit implements ast.Visitor.
func (l *viewLook) Visit(node *ast.Node) {
	switch n := (*node).(type) {
	case *ast.IdentifierNode:
		parts, ok := viewFunctions[n.Value]
		if l.of.parts |= parts; !ok {
			l.strange = n.Value
		}
	case *ast.BuiltinNode:
		if !slices.Contains(viewBuiltins, n.Name) {
			l.strange = n.Name
		}
	}
}

// Takes reports whether a query is for the view's server block, unless a block before it takes the query. known is false if the
// packet does not show that.
func (v *View) Takes(a *Asked) (takes, known bool) {
	// An expression gets the name of the interface, too, on which such a client is.
	if !v.known || v.parts&viewClient != 0 && a.Client.Addr().Is6() && a.Client.Addr().IsLinkLocalUnicast() {
		return false, false
	}
	a.key = v.parts.appendTo(a.key[:0], a)
	at := &v.decided[maphash.Bytes(v.seed, a.key)%viewKept]
	if d := at.Load(); d != nil && d.key == string(a.key) {
		return d.takes, true
	}
	r := new(dns.Msg)
	if r.Unpack(a.Packet) != nil {
		return false, false
	}
	takes = v.filter(context.Background(), &request.Request{Req: r, W: a.writer()})
	at.Store(&viewDecision{string(a.key), takes})
	return takes, true
}

// appendTo appends the parts of a query to b. Queries that differ in one of them differ in what is appended.
func (p viewParts) appendTo(b []byte, a *Asked) []byte {
	if p&viewClient != 0 {
		ip := a.Client.Addr().As16()
		b = append(b, ip[:]...)
	}
	if p&viewPort != 0 {
		b = binary.BigEndian.AppendUint16(b, a.Client.Port())
	}
	if p&viewName != 0 {
		b = append(b, a.Name...)
	}
	if p&viewType != 0 {
		b = binary.BigEndian.AppendUint16(b, a.Qtype)
	}
	if p&viewProto != 0 {
		b = append(b, bit(a.TCP))
	}
	if p&viewDO != 0 {
		b = append(b, bit(a.DO))
	}
	if p&viewServer != 0 {
		var at netip.AddrPort
		switch local := a.Local.(type) {
		case *net.UDPAddr:
			at = local.AddrPort()
		case *net.TCPAddr:
			at = local.AddrPort()
		}
		ip := at.Addr().As16()
		b = binary.BigEndian.AppendUint16(append(append(b, ip[:]...), bit(at.Addr().Is4())), at.Port())
		b = append(b, at.Addr().Zone()...)
	}
	return b
}

func bit(set bool) byte {
	if set {
		return 1
	}
	return 0
}

// writer returns a writer that says where a query comes from, for plugins that only ask that.
func (a *Asked) writer() dns.ResponseWriter {
	w := &origin{local: a.Local, remote: a.remote()}
	return w
}

// remote returns the client's address as CoreDNS's server has it.
func (a *Asked) remote() net.Addr {
	if a.TCP {
		return net.TCPAddrFromAddrPort(a.Client)
	}
	return net.UDPAddrFromAddrPort(a.Client)
}

// origin is a dns.ResponseWriter that takes no reply.
type origin struct {
	dns.ResponseWriter // nil
	local, remote      net.Addr
}

func (o *origin) LocalAddr() net.Addr  { return o.local }
func (o *origin) RemoteAddr() net.Addr { return o.remote }
