package optcache

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/coredns/coredns/core/dnsserver"
	"github.com/coredns/coredns/plugin"
	"github.com/coredns/coredns/plugin/pkg/response"
	"github.com/coredns/coredns/plugin/pkg/transport"

	"github.com/miekg/dns"

	"github.com/optcache/optcache/plugin/control"
	"github.com/optcache/optcache/plugin/control/api"
	"github.com/optcache/optcache/plugin/fastpath"
	"github.com/optcache/optcache/plugin/level2"
	"github.com/optcache/optcache/plugin/pkg/admit"
	"github.com/optcache/optcache/plugin/pkg/chain"
	"github.com/optcache/optcache/plugin/pkg/flushed"
	"github.com/optcache/optcache/plugin/pkg/record"
	"github.com/optcache/optcache/plugin/pkg/zones"
)

// This file asks questions of operators through the server's chain, and watches what becomes of them. The code that decides
// says so to the watch in the request's context.

const (
	// askTimeout is how long an operator's question waits for its reply. Clients wait as long.
	askTimeout = 5 * time.Second

	// maxAsks bounds the questions that are in chains, among them those whose time is over.
	maxAsks = 64
)

// asks has as many as there are questions of operators in chains.
var asks = make(chan struct{}, maxAsks)

// watching is how many questions are being watched. A hit looks for a watch only if it is not 0.
var watching atomic.Int32

// watch notes what becomes of one question. Its methods do nothing where the watch is nil. It is safe for concurrent use: the
// fetch for a stale entry may go on in another goroutine.
type watch struct {
	mu      sync.Mutex // guards what follows
	at      *Optcache  // the instance that the question has come to; nil: none
	key     record.Key // of the answer
	outcome string
	why     string
	tier    string
	age     int64
	ttl     uint32
	verdict *verdict // on the response that has come
	way     way
	isSent  bool // way is set
}

// verdict is what was decided on a response.
type verdict struct {
	kind response.Type
	rule admit.Rule // admit.Keeps: it is kept
	life admit.Lifetime
}

type watchKey struct{}

// watchOf returns the watch of a request, or nil. Look-ups that plugins make for the request have none.
func watchOf(ctx context.Context) *watch {
	if watching.Load() == 0 {
		return nil
	}
	w, _ := ctx.Value(watchKey{}).(*watch)
	if depth, _ := ctx.Value(dnsserver.LoopKey{}).(int); depth > 0 {
		return nil
	}
	return w
}

// passed notes that the block does not look for the answer.
func (w *watch) passed(o *Optcache, why string) {
	if w == nil {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.at, w.outcome, w.why = o, api.Passed, why
}

// missed notes that there is no answer under the key.
func (w *watch) missed(o *Optcache, key *record.Key) {
	if w == nil {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.at, w.key, w.outcome = o, *key, api.Miss
}

// found notes that the entry in s is served, or a newer one in its place.
func (w *watch) found(o *Optcache, s *scratch, status string, now int64) {
	if w == nil {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.at, w.key, w.outcome = o, s.Key, status
	w.tier, w.age, w.ttl = tierNames[s.tier], (now-s.Entry.Stored)/1e9, o.shownTTL(&s.Entry, now)
}

// shared notes that the request has got what another one has brought.
func (w *watch) shared(a *shared) {
	if w == nil {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.outcome = api.Coalesced
	if a.failed {
		w.why = "the request that it has waited for has failed"
		return
	}
	v := a.verdict
	w.verdict = &v
}

// second notes what the second level has said to a miss. age is of its answer.
func (w *watch) second(how level2.Outcome, age time.Duration) {
	if w == nil {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if how == level2.Hit {
		w.outcome, w.age = api.Shared, int64(age/time.Second)
		return
	}
	w.why = "the second level has not answered: " + level2.OutcomeNames[how]
}

// came notes what was decided on the response.
func (w *watch) came(v verdict) {
	if w == nil {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.verdict = &v
}

// bytes notes that the response came as bytes.
func (w *watch) bytes() {
	if w == nil {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.why = "the next plugin wrote bytes in place of a message, which are not kept"
}

// returned notes how the next plugin has returned.
func (w *watch) returned(wrote bool, err error) {
	if w == nil {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	switch {
	case err != nil:
		w.why = "the next plugin has failed: " + err.Error()
	case !wrote && w.verdict == nil:
		w.why = "the next plugin has written no response"
	}
}

// sent notes how a hit is sent.
func (w *watch) sent(how way) {
	if w == nil {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.way, w.isSent = how, true
}

// catcher is the writer of a client that an operator plays. It is not safe for concurrent use.
type catcher struct {
	detached
	rcode int // -1: no reply
}

func (c *catcher) WriteMsg(m *dns.Msg) error {
	c.rcode = m.Rcode
	return nil
}

func (c *catcher) Write(b []byte) (int, error) {
	var h dns.Msg
	if err := h.Unpack(b); err != nil {
		return 0, err
	}
	return len(b), c.WriteMsg(&h)
}

// entrance is where questions come in: a server's chain.
type entrance struct {
	of    *dnsserver.Server // nil in tests without one
	serve func(context.Context, dns.ResponseWriter, *dns.Msg)
}

// entrance returns the entrance to the block. One for plain DNS is preferred.
func (o *Optcache) entrance() (e entrance, err error) {
	if o.of == nil {
		return entrance{serve: func(ctx context.Context, w dns.ResponseWriter, r *dns.Msg) { o.ServeDNS(ctx, w, r) }}, nil
	}
	for _, s := range chain.Servers(o.of) {
		served, _ := chain.Zones(s)
		leads := false
		for _, configs := range served {
			leads = leads || slices.ContainsFunc(configs, func(c *dnsserver.Config) bool { return c.Handler(pluginName) == plugin.Handler(o) })
		}
		if leads && (e.of == nil || strings.HasPrefix(s.Addr, transport.DNS+"://")) {
			e = entrance{s, s.ServeDNS}
			if strings.HasPrefix(s.Addr, transport.DNS+"://") {
				break
			}
		}
	}
	if e.of == nil {
		return e, errors.New("the block has no server: it is being started, or this version of CoreDNS does not say which one")
	}
	return e, nil
}

// context returns the context of a request that has come through the entrance.
func (e entrance) context(ctx context.Context) context.Context {
	ctx = context.WithValue(ctx, dnsserver.LoopKey{}, 0)
	if e.of != nil {
		ctx = context.WithValue(ctx, dnsserver.Key{}, e.of)
	}
	return ctx
}

// ask sends a question through an entrance, and waits for the reply. The watch is complete then. reply is -1 without a reply.
func (e entrance) ask(r *dns.Msg, from net.Addr) (w *watch, reply int, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), askTimeout)
	defer cancel()
	select {
	case asks <- struct{}{}:
	case <-ctx.Done():
		return nil, -1, fmt.Errorf("%d questions before it have had no reply yet", maxAsks)
	}
	w = new(watch)
	ctx = e.context(context.WithValue(ctx, watchKey{}, w))
	c := &catcher{detached{noAddr, from}, -1}
	done := make(chan error, 1)
	watching.Add(1)
	go func() {
		var failed error
		defer func() {
			if p := recover(); p != nil {
				log.Errorf("A question of an operator panicked: %v\n%s", p, debug.Stack())
				failed = errors.New("the chain panicked; the log says more")
			}
			watching.Add(-1)
			<-asks
			done <- failed
		}()
		e.serve(ctx, c, r)
	}()
	select {
	case err = <-done:
		return w, c.rcode, err
	case <-ctx.Done():
		return nil, -1, fmt.Errorf("no reply in %v", askTimeout)
	}
}

// Ask implements control.Block.
func (b controlBlock) Ask(q control.Question, whole bool) (ex control.Explanation, err error) {
	o := instances.last(b.o)
	ex = control.Explanation{Name: q.Name, Type: dns.Type(q.Type).String(), DO: q.DO, CD: q.CD, NoRD: q.NoRD, Client: q.Client}
	if ex.Client == "" {
		ex.Client = "127.0.0.1"
	}
	ip, err := netip.ParseAddr(ex.Client)
	if err != nil {
		return ex, fmt.Errorf("%q is not an IP address", ex.Client)
	}
	name, ok := zones.Wire(q.Name)
	if !ok {
		return ex, fmt.Errorf("%q is not a domain name", q.Name)
	}
	if !o.rules.Zones.Contains(name) {
		ex.Outcome, ex.Why = api.Elsewhere, "the name is in no zone of the block"
		return ex, nil
	}
	e, err := o.entrance()
	if err != nil {
		return ex, err
	}
	if e.of != nil {
		ex.Server = e.of.Addr
	}
	var from net.Addr = net.UDPAddrFromAddrPort(netip.AddrPortFrom(ip, 0))
	if q.TCP {
		from = net.TCPAddrFromAddrPort(netip.AddrPortFrom(ip, 0))
	}
	r := new(dns.Msg).SetQuestion(dns.Fqdn(q.Name), q.Type)
	r.RecursionDesired, r.CheckingDisabled = !q.NoRD, q.CD
	r.SetEdns0(clientBuffer, q.DO)

	begun := time.Now()
	w, rcode, err := e.ask(r.Copy(), from)
	ex.Milliseconds = float64(time.Since(begun).Microseconds()) / 1000
	if err != nil {
		return ex, err
	}
	if rcode >= 0 {
		ex.Rcode = dns.RcodeToString[rcode]
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.at != o {
		ex.Outcome, ex.Why = api.Elsewhere, "a plugin before the block has replied, or the server has another block for the name"
		return ex, nil
	}
	ex.Outcome, ex.Why, ex.Tier, ex.Age, ex.TTL = w.outcome, w.why, w.tier, w.age, w.ttl
	if w.verdict != nil {
		ex.Response = w.verdict.words()
	}
	if !whole || w.outcome == api.Passed {
		return ex, nil
	}
	sent := w
	if !w.isSent && ex.Response != nil && ex.Response.Kept {
		// How hits are sent is decided when there is one.
		if again, _, err := e.ask(r.Copy(), from); err == nil && again.at == o {
			sent = again
		}
	}
	if sent.isSent {
		ex.Way = o.wayWords(sent.way)
		if o.block != nil && !q.TCP {
			o.throughFastPath(e, r, ip, ex.Way)
		}
	}
	ex.Held = controlBlock{o}.held(&w.key)
	return ex, nil
}

// clientBuffer is the size in bytes that an operator's question has in its OPT record, as those of most clients do.
const clientBuffer = 1232

// words returns the verdict for operators.
func (v *verdict) words() *control.Response {
	kind, class := v.kind.String(), classNames[admit.ClassOf(v.kind)]
	if v.kind == admit.Incomplete {
		kind = "INCOMPLETE"
	}
	r := &control.Response{Kind: kind, Kept: v.rule == admit.Keeps, Rule: v.rule.String(), Own: uint32(v.life.Own / time.Second)}
	switch {
	case r.Kept:
		r.TTL, r.Bound, r.Why = uint32(v.life.TTL/time.Second), v.life.By.String(), v.life.Says(class)
	case v.rule == admit.ZeroTTL:
		r.Bound, r.Why = v.life.By.String(), v.rule.Says()+": "+v.life.Says(class)
	default:
		r.Why = v.rule.Says()
	}
	return r
}

// wayWhy says what sends hits as messages.
var wayWhy = [ways]string{
	wayTransport: "the transport is not plain DNS over UDP or TCP",
	wayRequest:   "the request has several questions, or records besides one OPT",
	wayEDNS:      "the request has an EDNS option that the reply must repeat",
	waySize:      "the reply must be compressed or truncated to fit",
	wayAnswer:    "the answer cannot be sent as it is stored",
	wayRecorder:  "a plugin before the block has a writer that is not known, and would miss the reply",
	wayVerified:  "the answer had expired, and the next plugin has brought a better one",
}

func (o *Optcache) wayWords(how way) *control.Way {
	switch how {
	case wayBytes:
		return &control.Way{Way: "bytes"}
	case wayPlugin:
		return &control.Way{Way: wayNames[how], Why: "the plugin " + o.outer.Changer + " may change the reply"}
	}
	return &control.Way{Way: wayNames[how], Why: wayWhy[how]}
}

// throughFastPath says whether the fast path would have answered the question.
func (o *Optcache) throughFastPath(e entrance, r *dns.Msg, ip netip.Addr, to *control.Way) {
	if e.of == nil {
		return
	}
	if !fastpath.Serving(e.of.Addr) {
		to.FastPath = "closed"
		return
	}
	packet, err := r.Pack()
	if err != nil {
		return
	}
	all, err := newRoutes(e.of)
	if err != nil {
		return
	}
	f := fastQuery{s: newScratch()}
	why := f.prepare(packet, netip.AddrPortFrom(ip.Unmap(), 0), noAddr, false, all)
	if why == fastpath.Answered {
		why = f.look(o.clock())
	}
	if to.FastPath = why.String(); why == fastpath.Answered {
		*to = control.Way{Way: "fastpath"}
	}
}

// held returns what is held under a key, or nil.
func (b controlBlock) held(key *record.Key) (a *control.Answer) {
	s, f := newScratch(), flushed.Filter{Name: key.Name(), Qtype: key.Qtype(), Kinds: flushed.AllKinds}
	for _, st := range b.o.store.line() {
		own := *key
		own.Rehash(st.seed)
		b.find(s, st, st.shard(own.Hash), &f, 0, true, func(h *heldAnswer) bool {
			if h.key.Equal(&own) {
				found := b.answer(newScratch(), h)
				a = &found
			}
			return true
		})
	}
	return a
}
