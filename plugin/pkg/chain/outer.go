package chain

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/coredns/coredns/core/dnsserver"
	"github.com/coredns/coredns/plugin"
	"github.com/coredns/coredns/plugin/acl"
	"github.com/coredns/coredns/plugin/bufsize"
	"github.com/coredns/coredns/plugin/dns64"
	"github.com/coredns/coredns/plugin/dnstap"
	"github.com/coredns/coredns/plugin/loadbalance"
	"github.com/coredns/coredns/plugin/log"
	"github.com/coredns/coredns/plugin/metrics"
	"github.com/coredns/coredns/plugin/pkg/edns"
	"github.com/coredns/coredns/plugin/rewrite"
	"github.com/coredns/coredns/plugin/tsig"

	"github.com/optcache/optcache/plugin/pkg/query"
	"github.com/optcache/optcache/plugin/pkg/wire"
)

// This file says what the outer plugins do to a hit. A hit that leaves as bytes goes through the chain as a request, but its
// reply does not go through the writers of the outer plugins (writers.go). A hit in the fast path does not reach the outer
// plugins at all.

// neutral lists the outer plugins that a reply in bytes may bypass, each with the reason. Any other plugin may change the
// messages that its writer gets. Behind such a plugin, each reply is a message.
var neutral = map[string]string{
	"metadata":    "collects before the chain runs, writes nothing",
	"geoip":       "provides metadata, writes nothing",
	"cancel":      "wraps the context only",
	"bufsize":     "changes the request's OPT, which the reply's size is taken from",
	"nsid":        "wraps the writer only for a request with that option, which goes as a message",
	"ready":       "is no part of the chain",
	"health":      "is no part of the chain",
	"prometheus":  "its recorder is told rcode and length, as WriteMsg tells it",
	"log":         "its recorder is told rcode, length and a message with all that it reads",
	"dnstap":      "gets the bytes that were sent, as it would pack them",
	"loadbalance": "is emulated if its policy is round_robin: records change places in the reply's bytes",
	"errors":      "looks at the error only",
	"local":       "answers by itself or passes on",
	"any":         "answers by itself or passes on",
	"chaos":       "answers by itself or passes on",
	"acl":         "answers by itself or passes on",
}

// Outer says what the outer plugins of a server block do to a reply. It does not change.
type Outer struct {
	Changes  bool   // one of them may change it, or is unknown
	Changer  string // the first such plugin, or ""
	Rotates  bool   // loadbalance round_robin: records change places
	Writers  bool   // some have writers, which must be told of it or bypassed: it goes by Writers.Send
	Reads    bool   // log or dnstap reads request and reply when it was sent
	Metadata bool   // the plugin metadata collects what is said of it
	Trace    bool   // the plugin trace collects what is said of it

	recorded string // the plugin next to prometheus, which tells it that it has written the reply (plugin.PluginTracker)
}

// Listens reports whether an outer plugin wants to know what becomes of a request.
func (o *Outer) Listens() bool { return o.Metadata || o.Trace }

// OuterOf returns what the outer plugins of a server block do. handlers are the block's plugins in the order in which they are
// called. cache is the name of the cache, which ends the outer plugins.
func OuterOf(handlers []plugin.Handler, cache string) (o Outer) {
	for i, h := range handlers {
		name := h.Name()
		if name == cache {
			break
		}
		if _, ok := neutral[name]; !ok && !o.Changes {
			o.Changes, o.Changer = true, name
		}
		switch name {
		case "prometheus":
			o.Writers, o.recorded = true, handlers[i+1].Name()
		case "log", "dnstap":
			o.Writers, o.Reads = true, true
		case "loadbalance":
			if l, ok := h.(loadbalance.LoadBalance); (!ok || !shufflesOnly(l)) && !o.Changes {
				o.Changes, o.Changer = true, name
			}
			o.Writers, o.Rotates = true, true
		case "metadata":
			o.Metadata = true
		case "trace":
			o.Trace = true
		}
	}
	return o
}

// bypassable lists the outer plugins that the fast path may bypass for a hit, or emulates, each with the reason. A server block
// with any other outer plugin cannot have a fast path, for that plugin would silently do nothing.
var bypassable = map[string]string{
	"metadata":    "collects for plugins that are on this list, and do not read it, or that see no hit",
	"cancel":      "ends a request that takes long, which a hit does not",
	"bufsize":     "is emulated: the client's buffer is taken as smaller",
	"nsid":        "is for queries with an option that go the slow path",
	"prometheus":  "is emulated: the same series count the same",
	"errors":      "logs errors, and a hit is none",
	"local":       "is emulated: its names go the slow path",
	"any":         "is for queries of type ANY, which go the slow path",
	"chaos":       "is for queries of class CH, which go the slow path",
	"loadbalance": "is emulated if its policy is round_robin: records change places in the reply's bytes",
	"geoip":       "provides metadata, which is not read for a hit",
	"log":         "is told of hits that it may log: they go the slow path",
	"dnstap":      "is told of each hit, with the bytes that came and went",
	"acl":         "is asked for each query: what it does not allow goes the slow path; what it allows is counted",
	"tsig":        "refuses queries that should be signed: they go the slow path, as do those that are signed",
	"dns64":       "looks at responses to queries for AAAA, by clients that it serves: they go the slow path",
	"rewrite":     "changes queries that one of its rules meets: they go the slow path",
}

// Effects are the effects of outer plugins that the fast path emulates.
type Effects struct {
	Rotate      bool   // loadbalance round_robin: records change places
	Space       uint16 // bufsize: the limit in bytes of the client's buffer; 0: none
	Options     bool   // replies repeat options in query.Ignored: queries with options go the slow path
	Local       bool   // local answers its own names: they go the slow path
	LocalPrefix bool   // local answers names that begin with localhost., too
	Counted     bool   // acl counts what it allows; see AllowedBy
	acts        []acts // of acl, tsig, dns64, rewrite
	logs        []logRule
	taps        []*dnstap.Dnstap // in the order in which they are called; see Tap
}

// EffectsOf returns the effects of the outer plugins in the server block cfg. cache is the name of the cache in it. It fails if
// there is an outer plugin that the fast path can neither bypass nor emulate. report is nil if there is no plugin prometheus.
func EffectsOf(cfg *dnsserver.Config, cache string) (e Effects, report *Report, err error) {
	if _, err := ViewOf(cfg); err != nil {
		return e, nil, err
	}
	handlers := cfg.Handlers()
	for i, h := range handlers {
		name := h.Name()
		if name == cache {
			break
		}
		if bypassable[name] == "" {
			return e, nil, fmt.Errorf("it cannot stand behind the plugin %s; those that it can stand behind are: %s",
				name, strings.Join(slices.Sorted(maps.Keys(bypassable)), ", "))
		}
		switch h := h.(type) {
		case loadbalance.LoadBalance:
			if !shufflesOnly(h) {
				return e, nil, fmt.Errorf("it can stand behind the plugin loadbalance only with round_robin and without prefer")
			}
			e.Rotate = true
		case bufsize.Bufsize:
			e.Space = uint16(h.Size)
		case log.Logger:
			e.logs, err = logRules(h)
		case acl.ACL:
			e.Counted = true
			err = e.add(aclActs(h))
		case *tsig.TSIGServer:
			err = e.add(tsigActs(h))
		case *dns64.DNS64:
			err = e.add(dns64Acts(h), nil)
		case rewrite.Rewrite:
			err = e.add(rewriteActs(h))
		case *metrics.Metrics:
			report = &Report{Zones: h.ZoneNames, Plugin: handlers[i+1].Name(), View: cfg.ViewName}
		case *dnstap.Dnstap:
			for ok := true; ok; h, ok = h.Next.(*dnstap.Dnstap) { // a block may have several, and Handlers returns the first one
				if e.taps = append(e.taps, h); strings.Contains(h.ExtraFormat, "{/") {
					err = fmt.Errorf("its extra %q has metadata", h.ExtraFormat)
				}
			}
		}
		if err != nil {
			return e, nil, fmt.Errorf("it cannot stand behind the plugin %s as it is: %w", name, err)
		}
		if name == "local" {
			e.Local, e.LocalPrefix = true, localPrefix(h)
		}
	}
	e.Options = slices.ContainsFunc(query.Ignored[:], edns.SupportedOption) // set by rewrite, in any server block
	return e, report, nil
}

func (e *Effects) add(a acts, err error) error {
	e.acts = append(e.acts, a)
	return err
}

// Answers reports whether an outer plugin answers queries for name. name is in wire format and lower case.
func (e *Effects) Answers(name []byte) bool { return e.Local && isLocal(name, e.LocalPrefix) }

var (
	localhost  = []byte("\x09localhost\x00")
	localZones = [][]byte{localhost, []byte("\x010\x07in-addr\x04arpa\x00"), []byte("\x03127\x07in-addr\x04arpa\x00"), []byte("\x03255\x07in-addr\x04arpa\x00")}
)

// isLocal reports whether the plugin local answers queries for name. prefix says that it takes names that begin with localhost.
func isLocal(name []byte, prefix bool) bool {
	if prefix && len(name) > len(localhost) && string(name[:len(localhost)-1]) == string(localhost[:len(localhost)-1]) {
		return true
	}
	for _, zone := range localZones {
		if wire.InZone(name, zone) {
			return true
		}
	}
	return false
}
