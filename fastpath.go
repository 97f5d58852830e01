package optcache

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"github.com/coredns/caddy"
	"github.com/coredns/coredns/core/dnsserver"
	"github.com/coredns/coredns/plugin"
	"github.com/coredns/coredns/plugin/bufsize"
	"github.com/coredns/coredns/plugin/loadbalance"
	"github.com/coredns/coredns/plugin/metrics"
	"github.com/coredns/coredns/plugin/pkg/edns"
	"github.com/coredns/coredns/plugin/pkg/transport"

	"github.com/miekg/dns"

	"github.com/optcache/optcache/plugin/pkg/wire"
)

// This file is the fast path: it says which server blocks may have one, and which way a query takes.
//
// On an address with a fast path, the plugin has sockets of its own beside CoreDNS's (a lane, see
// lane_linux.go). Its workers answer the hits among the queries that come there (fastquery.go) and hand
// the others to the server that CoreDNS has on that address, through a queue. What CoreDNS would do with a
// query does not change: it is only done elsewhere.

// skippable lists the plugins in front of this one that the fast path may leave out for a hit, or does the
// work of, each with the reason. All others are refused: what they do would silently not be done.
var skippable = map[string]string{
	"metadata":    "collects for plugins that are on this list, and do not read it, or that see no hit",
	"cancel":      "ends a request that takes long, which a hit does not",
	"bufsize":     "is mirrored: the client's buffer is taken as smaller",
	"nsid":        "is for queries with an option that go the long way",
	"prometheus":  "is mirrored: the same series count the same",
	"errors":      "logs errors, and a hit is none",
	"local":       "is mirrored: its names go the long way",
	"any":         "is for queries of type ANY, which go the long way",
	"chaos":       "is for queries of class CH, which go the long way",
	"loadbalance": "is mirrored if its policy is round_robin: records change places in the reply's bytes",
}

// fastOptions say whether there is a fast path.
type fastOptions struct {
	on      bool
	workers int    // 0: one for each CPU that Go uses
	at      string // where the Corefile says so: FILE:LINE
}

// errFast blames the directive.
func (o *fastOptions) err(format string, args ...any) error {
	return plugin.Error(pluginName, fmt.Errorf("%s - fastpath: %s", o.at, fmt.Sprintf(format, args...)))
}

// fastBlock is a server block with a fast path.
type fastBlock struct {
	o       *Optcache
	workers int
	front   mirror
	report  *reportOptions // nil if there is no plugin prometheus
}

// setupFast gives a server block a fast path, as far as that can be done before the server exists.
func setupFast(c *caddy.Controller, o *Optcache) error {
	cfg := dnsserver.GetConfig(c)
	b := &fastBlock{o: o}
	if cfg.UDPDecorateWriterFunc == nil {
		cfg.UDPDecorateWriterFunc = b.serves
	}
	c.OnStartup(func() error {
		if o.store == nil { // it was not started
			return nil
		}
		if err := errors.Join(b.inspect(cfg), b.inspectServers(c.Context())); err != nil {
			return err
		}
		o.block = b
		return nil
	})
	// What else asks for GOMAXPROCS while the next generation is set up, such as multisocket, gets what it would
	// get without workers.
	c.OnRestart(func() error { runtime.GOMAXPROCS(ownProcs()); return nil })
	c.OnRestartFailed(func() error {
		raiseProcs()
		reopenLanes() // it may have failed after its end
		return nil
	})
	// Some reloads forget all hooks, others none.
	if !slices.Contains(caddy.ListPlugins()["event_hooks"], pluginName) {
		caddy.RegisterEventHook(pluginName, func(event caddy.EventName, _ any) error {
			if event == caddy.InstanceStartupEvent { // the last generation's servers have closed their sockets
				reopenLanes()
			}
			return nil
		})
	}
	return nil
}

// ownProcs is GOMAXPROCS as it is without a fast path.
var ownProcs = sync.OnceValue(func() int { return runtime.GOMAXPROCS(0) })

// serves is called by CoreDNS with each server that is about to serve, when nothing can go wrong any more:
// before, a reload that fails must not have changed anything. Of several blocks on one address, one is
// called, for all.
func (b *fastBlock) serves(s *dnsserver.Server) dns.DecorateWriter {
	if err := openLane(s, b); err != nil {
		log.Errorf("%v", b.o.fast.err("%s: %v; all queries go the long way", s.Addr, err))
	}
	return nil
}

// servesCode tells serves from functions of other plugins in the same place.
var servesCode uintptr

func init() { servesCode = reflect.ValueOf(new(fastBlock).serves).Pointer() }

// decorates reports whether f is what another plugin has put in the place of serves.
func decorates(f func(*dnsserver.Server) dns.DecorateWriter) bool {
	return f != nil && reflect.ValueOf(f).Pointer() != servesCode
}

// sameServer reports whether CoreDNS makes one server of both configs, on some address.
func sameServer(a, b *dnsserver.Config) bool {
	return a.Transport == b.Transport && slices.ContainsFunc(a.ListenHosts, func(host string) bool {
		at := listenAddr(host, a.Port)
		return slices.ContainsFunc(b.ListenHosts, func(other string) bool { return at == listenAddr(other, b.Port) })
	})
}

// listenAddr returns an address as CoreDNS writes it.
func listenAddr(host, port string) string {
	addr, err := net.ResolveTCPAddr("tcp", net.JoinHostPort(host, port))
	if err != nil {
		return ""
	}
	return addr.String()
}

// unexported returns a field of a struct of CoreDNS that is not exported. ok is false where there is none of that name
// and type.
func unexported[T any](of any, name string) (field T, ok bool) {
	f := reflect.Indirect(reflect.ValueOf(of)).FieldByName(name)
	if !f.IsValid() || f.Type() != reflect.TypeFor[T]() || !f.CanAddr() {
		return field, false
	}
	return *(*T)(f.Addr().UnsafePointer()), true
}

// inspect looks at what stands in the server block, once all of it is there, and refuses what the fast path
// would leave out.
func (b *fastBlock) inspect(cfg *dnsserver.Config) error {
	fast := &b.o.fast
	if err := lanesSupported(); err != nil {
		return fast.err("%v", err)
	}
	if len(cfg.FilterFuncs) > 0 || cfg.ViewName != "" {
		return fast.err("it cannot stand beside the plugin view")
	}
	handlers := cfg.Handlers()
	for i, h := range handlers {
		name := h.Name()
		if name == pluginName {
			break
		}
		if skippable[name] == "" {
			return fast.err("it cannot stand behind the plugin %s; those that it can stand behind are: %s",
				name, strings.Join(slices.Sorted(maps.Keys(skippable)), ", "))
		}
		switch h := h.(type) {
		case loadbalance.LoadBalance:
			if !shufflesOnly(h) {
				return fast.err("it can stand behind the plugin loadbalance only with round_robin and without prefer")
			}
			b.front.rotate = true
		case bufsize.Bufsize:
			b.front.space = uint16(h.Size)
		case *metrics.Metrics:
			b.report = &reportOptions{zones: h.ZoneNames, plugin: handlers[i+1].Name()}
		}
		if name == "local" {
			b.front.local, b.front.localPrefix = true, localPrefix(h)
		}
	}
	b.front.options = slices.ContainsFunc(ignored[:], edns.SupportedOption) // a rewrite somewhere may have asked for it
	b.workers = fast.workers
	if b.workers == 0 {
		b.workers = ownProcs()
	}
	return nil
}

// inspectServers looks at what the servers of b's block serve, and at what stands in the other blocks that share them.
func (b *fastBlock) inspectServers(corefile caddy.Context) error {
	fast := &b.o.fast
	all, ok := unexported[[]*dnsserver.Config](corefile, "configs")
	if !ok {
		return fast.err("this version of CoreDNS does not say what is in a Corefile")
	}
	for _, own := range all { // one for each key of the block
		if own.Handler(pluginName) != plugin.Handler(b.o) {
			continue
		}
		if own.Transport != transport.DNS {
			return fast.err("it is for plain DNS, and the server block serves %s://", own.Transport)
		}
		for _, other := range all {
			switch {
			case !sameServer(own, other):
			case other.ProxyProtoConnPolicy != nil:
				return fast.err("it cannot stand beside the plugin proxyproto, which server block %s:%s has on the same address",
					other.Zone, other.Port)
			case decorates(other.UDPDecorateWriterFunc):
				return fast.err("it cannot stand beside a plugin that puts a writer of its own under the server, such as shed, which server block %s:%s has on the same address",
					other.Zone, other.Port)
			}
		}
	}
	return nil
}

// shufflesOnly reports whether all that a loadbalance does is round_robin. It does not say so; the function
// that it calls is known by its name.
func shufflesOnly(h loadbalance.LoadBalance) bool {
	f := reflect.ValueOf(h).FieldByName("shuffle")
	if !f.IsValid() || f.Kind() != reflect.Func || f.IsNil() {
		return false
	}
	return strings.HasSuffix(runtime.FuncForPC(f.Pointer()).Name(), "/loadbalance.randomShuffle")
}

// localPrefix reports whether the plugin local takes names that begin with localhost. as its own. If it
// does not say, it does.
func localPrefix(h plugin.Handler) bool {
	v := reflect.Indirect(reflect.ValueOf(h))
	if v.Kind() != reflect.Struct {
		return true
	}
	f := v.FieldByName("disableLocalhostPrefix")
	return !f.IsValid() || f.Kind() != reflect.Bool || !f.Bool()
}

// routes says, for one address and one generation of the Corefile, which way queries take.
type routes struct {
	of      *fastBlock // one of the generation
	server  *dnsserver.Server
	routes  []route // the most labels first
	workers int
	counts  *laneCounters
	slow    *longWay
}

// newRoutes reads from the server which zones it serves and with what. It keeps that to itself.
func newRoutes(s *dnsserver.Server, b *fastBlock, counts *laneCounters) (*routes, error) {
	r := &routes{of: b, server: s, counts: counts}
	zones, ok := unexported[map[string][]*dnsserver.Config](s, "zones")
	if !ok {
		return nil, fmt.Errorf("this version of CoreDNS does not say which zones a server has")
	}
	for zone, configs := range zones {
		var name [wire.MaxName]byte
		n, ok := wire.PackName(name[:], zone)
		if !ok {
			return nil, fmt.Errorf("%q is not a zone", zone)
		}
		wire.Lower(name[:n], name[:n])
		rt := route{zone: slices.Clone(name[:n])}
		// Several configs are views, which the server chooses from.
		if len(configs) == 1 {
			if o, ok := configs[0].Handler(pluginName).(*Optcache); ok && o.block != nil {
				b := o.block
				rt.o, rt.front, rt.report, rt.server = o, b.front, b.report, o.serverOf(s)
				r.workers = max(r.workers, b.workers)
			}
		}
		r.routes = append(r.routes, rt)
	}
	slices.SortFunc(r.routes, func(a, b route) int {
		if d := len(b.zone) - len(a.zone); d != 0 {
			return d
		}
		return bytes.Compare(a.zone, b.zone)
	})
	for i := range r.routes {
		r.routes[i].index = i
	}
	r.slow = newLongWay(s, counts)
	return r, nil
}

// The long way is bounded: a flood of misses that has to wait for the upstream is dropped, as it would be by
// a socket whose buffer is full.
const (
	// longWayQueue is how many packets wait for the server at the most.
	longWayQueue = 4096

	// longWayAtOnce is how many queries the server works on at the most.
	longWayAtOnce = 16384

	// longWayGrace is for how long a server that is replaced may work on what it has.
	longWayGrace = 5 * time.Second
)

// longWay is CoreDNS's server for what the fast path has not answered. It is a net.PacketConn that a
// dns.Server reads from, as from its socket.
type longWay struct {
	server   *dns.Server
	local    net.Addr
	counts   *laneCounters
	queue    chan *letter
	mu       sync.RWMutex // guards closed
	closed   bool         // no more letters are taken
	stop     chan struct{}
	stopOnce sync.Once
	now      atomic.Int64  // queries that the server works on
	done     chan struct{} // closed when the server has ended
	over     chan struct{} // closed when nobody waits for that any more
}

// letter is a packet on the long way.
type letter struct {
	from   net.UDPAddr // must be the first: see letterOf
	packet []byte
	reply  func([]byte) error
}

// letterOf returns the letter that an address, which plugins need to be a *net.UDPAddr, is part of. The
// server hands it back as it was given to it.
func letterOf(a net.Addr) *letter {
	from, ok := a.(*net.UDPAddr)
	if !ok {
		return nil
	}
	return (*letter)(unsafe.Pointer(from))
}

func newLongWay(s *dnsserver.Server, counts *laneCounters) *longWay {
	l := &longWay{
		counts: counts,
		queue:  make(chan *letter, longWayQueue),
		stop:   make(chan struct{}),
		done:   make(chan struct{}),
		over:   make(chan struct{}),
	}
	l.server = &dns.Server{
		PacketConn:     l,
		Net:            "udp",
		TsigSecret:     s.TsigSecret,
		DecorateReader: func(dns.Reader) dns.Reader { return letterReader{l} },
		Handler: dns.HandlerFunc(func(w dns.ResponseWriter, r *dns.Msg) {
			if l.now.Add(1) > longWayAtOnce {
				counts.dropped.Add(1)
			} else {
				ctx := context.WithValue(context.Background(), dnsserver.Key{}, s)
				ctx = context.WithValue(ctx, dnsserver.LoopKey{}, 0)
				s.ServeDNS(ctx, w, r)
			}
			l.now.Add(-1)
		}),
	}
	return l
}

// serve works until shutdown.
func (l *longWay) serve() {
	defer close(l.done)
	if err := l.server.ActivateAndServe(); err != nil && !errors.Is(err, net.ErrClosed) {
		log.Errorf("fastpath: the server behind it has ended: %v", err)
	}
}

// shutdown waits for what is under way, for a limited time. It is called once.
func (l *longWay) shutdown() {
	defer close(l.over)
	ctx, cancel := context.WithTimeout(context.Background(), longWayGrace)
	defer cancel()
	l.mu.Lock()
	l.closed = true
	l.mu.Unlock()
	for len(l.queue) > 0 && ctx.Err() == nil {
		time.Sleep(time.Millisecond)
	}
	l.server.ShutdownContext(ctx)
	l.Close()
	select {
	case <-l.done:
	case <-ctx.Done(): // the server waits for as long as its handlers take
	}
}

// put takes a letter, or drops it when there are too many. It reports false when it is closed.
func (l *longWay) put(m *letter) bool {
	l.mu.RLock()
	defer l.mu.RUnlock()
	if l.closed {
		return false
	}
	select {
	case l.queue <- m:
	default:
		l.counts.dropped.Add(1)
	}
	return true
}

// letterReader implements dns.PacketConnReader.
type letterReader struct{ l *longWay }

func (r letterReader) ReadPacketConn(net.PacketConn, time.Duration) ([]byte, net.Addr, error) {
	select {
	case m := <-r.l.queue:
		return m.packet, &m.from, nil
	case <-r.l.stop:
		return nil, nil, net.ErrClosed
	}
}

func (letterReader) ReadTCP(net.Conn, time.Duration) ([]byte, error) { return nil, net.ErrClosed }

func (letterReader) ReadUDP(*net.UDPConn, time.Duration) ([]byte, *dns.SessionUDP, error) {
	return nil, nil, net.ErrClosed
}

// WriteTo implements net.PacketConn: it sends a reply to where a letter came from.
func (l *longWay) WriteTo(b []byte, to net.Addr) (int, error) {
	m := letterOf(to)
	if m == nil {
		return 0, fmt.Errorf("%s: no query came from there", to)
	}
	if err := m.reply(b); err != nil {
		l.counts.sendErrors.Add(1)
		return 0, err
	}
	return len(b), nil
}

func (l *longWay) ReadFrom([]byte) (int, net.Addr, error) { return 0, nil, net.ErrClosed }
func (l *longWay) LocalAddr() net.Addr                    { return l.local }
func (l *longWay) SetDeadline(t time.Time) error          { return l.SetReadDeadline(t) }
func (l *longWay) SetWriteDeadline(time.Time) error       { return nil }

// SetReadDeadline implements net.PacketConn. The server sets it when it shuts down.
func (l *longWay) SetReadDeadline(t time.Time) error {
	if !t.IsZero() && t.Before(time.Now()) {
		return l.Close()
	}
	return nil
}

// Close implements net.PacketConn. It ends the reading only.
func (l *longWay) Close() error {
	l.stopOnce.Do(func() { close(l.stop) })
	return nil
}
