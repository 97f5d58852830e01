package test

import (
	"cmp"
	"fmt"
	"hash/fnv"
	"math/rand/v2"
	"net"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/miekg/dns"
)

// This file is the soak: a server between clients that ask for all kinds of names and upstreams that
// fail in all kinds of ways. What a name's answer is, is in the name, so that each answer can be checked.
// A failure is no wrong answer while an upstream fails; an answer that is another name's always is.

const (
	// soakVar is for how long, in all; what `make soak` sets.
	soakVar = "OPTCACHE_SOAK"

	soakShort   = 15 * time.Second
	soakClients = 32
	soakPopular = 300 // names that are asked for again and again

	// soakStale is RESPONSE_TTL in the Corefiles below, in seconds: a stale answer may show it.
	soakStale = 7

	// soakAftermath is for how long after a fault a failure may still be seen: it may be cached, and a
	// query may have waited for it.
	soakAftermath = 12 * time.Second

	// soakExtra is by how much, in bytes, the process may grow beside its cache: queries under way.
	soakExtra = 48 << 20
)

func TestSoak(t *testing.T) {
	total, given := fromEnv(t, soakVar, soakShort, time.ParseDuration)
	if !given && testing.Short() {
		t.Skip("takes seconds")
	}
	for name, cache := range map[string]string{
		"verify": `optcache {
			prefetch 2 1m 50%
			serve_stale 1h verify 200ms 7s 1s
			max_memory 16MB
		}`,
		"immediate": `optcache {
			serve_stale 1h immediate 7s 1s
			serve_stale_policy prefer_positive
			servfail 1s
			max_memory 16MB
		}
		loadbalance`,
		"no stale": `optcache {
			prefetch 1 1m 90%
			coalesce 10 500ms
			max_memory 16MB
		}`,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			soak(t, name, cache, total)
		})
	}
}

// soaking is one run.
type soaking struct {
	seed   uint64
	server *server
	ups    []*faulty
	stop   atomic.Bool

	mu      sync.Mutex     // guards what follows
	answers map[string]int // by kind
	wrong   []string       // the first of them
	wrongs  int
}

func soak(t *testing.T, name, cache string, total time.Duration) {
	x := &soaking{seed: rand.Uint64(), answers: map[string]int{}}
	t.Logf("seed %d", x.seed)
	var addrs []string
	for i := range 3 {
		u := newFaulty(t, x.seed+uint64(i))
		x.ups = append(x.ups, u)
		addrs = append(addrs, u.addr)
	}
	x.server = start(t, block("dns", strings.Join(addrs, " ")+" {\n\t\tpolicy random\n\t}", "prometheus 127.0.0.1:${metrics}", cache))
	s := x.server
	metrics := s.addr("metrics")
	for range 5 { // so that what a first query brings into being is there
		ask(t, overUDP(s.addr("dns")), query("a-0-5.example.org.", dns.TypeA))
	}
	pid := s.cmd.Process.Pid
	idle, goroutines := resident(t, pid, "VmRSS"), sum(t, metrics, "go_goroutines")
	largest, stopSampling := sample(t, pid)
	peak := goroutines

	var work sync.WaitGroup
	faultsEnd := make(chan struct{})
	for i, u := range x.ups {
		work.Go(func() { u.misbehave(faultsEnd, total, i) })
	}
	var load sync.WaitGroup
	for i := range soakClients {
		load.Go(func() { x.client(i) })
	}
	for end := time.Now().Add(total); time.Now().Before(end); time.Sleep(500 * time.Millisecond) {
		peak = max(peak, sum(t, metrics, "go_goroutines"))
	}
	close(faultsEnd)
	work.Wait()
	x.stop.Store(true)
	load.Wait()
	stopSampling()

	// Everything is as it was before.
	eventually(t, func() error {
		if n := sum(t, metrics, "go_goroutines"); n > goroutines+10 {
			return fmt.Errorf("%v goroutines, %v before", n, goroutines)
		}
		return nil
	})
	for n := range 60 {
		name, qtype := soakNameOf(n)
		eventually(t, func() error { return x.healed(name, qtype) })
	}
	const mib = 1 << 20
	allowed := idle + 16*mib + soakExtra
	if n := largest.Load(); n > allowed {
		t.Errorf("resident memory reached %d MiB, allowed are %d", n/mib, allowed/mib)
	}
	for _, w := range x.wrong {
		t.Error(w)
	}
	if x.wrongs > 0 {
		t.Errorf("%d wrong answers", x.wrongs)
	}
	if n := sum(t, metrics, "coredns_panics_total"); n != 0 {
		t.Errorf("%v panics", n)
	}
	count := func(metric string) float64 { return sum(t, metrics, "coredns_optcache_"+metric) }
	must := []string{"hits_total", "misses_total", "coalesced_total"}
	if strings.Contains(cache, "serve_stale") {
		must = append(must, "served_stale_total")
	}
	if strings.Contains(cache, "prefetch") {
		must = append(must, "prefetch_total")
	}
	for _, metric := range must {
		if count(metric) == 0 {
			t.Errorf("%s is 0: that was no soak", metric)
		}
	}
	for _, kind := range []string{"answer", "NXDOMAIN", "NODATA"} {
		if x.answers[kind] == 0 {
			t.Errorf("no %s among the answers", kind)
		}
	}
	t.Logf("%s, %v: answers %v, wrong %d", name, total, x.answers, x.wrongs)
	for i, u := range x.ups {
		t.Logf("upstream %d was asked, by its behaviour: %v", i, u.report())
	}
	t.Logf("hits %v, misses %v, coalesced %v, let go %v, prefetched %v, stale %v, evicted %v",
		count("hits_total"), count("misses_total"), count("coalesced_total"), count("coalesce_let_go_total"),
		count("prefetch_total"), count("served_stale_total"), count("evictions_total"))
	t.Logf("resident: %d MiB idle, %d at the most, allowed %d; goroutines: %v, %v at the most, %v in the end",
		idle/mib, largest.Load()/mib, allowed/mib, goroutines, peak, sum(t, metrics, "go_goroutines"))
}

// soakName returns a name: KIND-NUMBER-TTL.example.org.
func soakName(g *rand.Rand) (name string, qtype uint16) {
	n := int(soakPopular * g.Float64() * g.Float64() * g.Float64())
	if g.IntN(8) == 0 {
		n = soakPopular + g.IntN(1<<30)
	}
	return soakNameOf(n)
}

func soakNameOf(n int) (name string, qtype uint16) {
	kind := []string{"a", "a", "a", "a", "nx", "nd", "cn", "big", "sf"}[n%9]
	qtype = dns.TypeA
	if kind == "big" {
		qtype = dns.TypeTXT
	}
	return fmt.Sprintf("%s-%d-%d.example.org.", kind, n, 1+n%5), qtype
}

// demanded is the answer to a question, as a healthy upstream gives it.
func demanded(q dns.Question, do, cd bool) *dns.Msg {
	name := strings.ToLower(q.Name)
	h := fnv.New32a()
	fmt.Fprint(h, name, q.Qtype, do, cd)
	sum := h.Sum32()
	parts := strings.Split(strings.SplitN(name, ".", 2)[0], "-")
	ttl, _ := strconv.Atoi(parts[2])
	m := new(dns.Msg)
	m.RecursionAvailable, m.AuthenticatedData = true, sum%2 == 0
	header := func(owner string, rrtype uint16) dns.RR_Header {
		return dns.RR_Header{Name: owner, Rrtype: rrtype, Class: dns.ClassINET, Ttl: uint32(ttl)}
	}
	addresses := func(owner string) {
		for i := range 1 + sum%3 {
			m.Answer = append(m.Answer, &dns.A{Hdr: header(owner, dns.TypeA), A: net.IPv4(10, byte(sum>>16), byte(sum>>8), byte(i)).To4()})
		}
	}
	soa := &dns.SOA{Hdr: header("example.org.", dns.TypeSOA), Ns: fmt.Sprintf("s%d.example.org.", sum), Mbox: "h.example.org.", Minttl: 300}
	switch parts[0] {
	case "a":
		addresses(name)
	case "cn":
		target := fmt.Sprintf("t%d.example.org.", sum)
		m.Answer = append(m.Answer, &dns.CNAME{Hdr: header(name, dns.TypeCNAME), Target: target})
		addresses(target)
	case "big":
		for i := range 12 {
			m.Answer = append(m.Answer, &dns.TXT{Hdr: header(name, dns.TypeTXT), Txt: []string{fmt.Sprint(i, " ", sum), strings.Repeat("x", 180)}})
		}
	case "nx":
		m.Rcode = dns.RcodeNameError
		m.Ns = []dns.RR{soa}
	case "nd":
		m.Ns = []dns.RR{soa}
	case "sf":
		m.Rcode = dns.RcodeServerFailure
	}
	return m
}

// client asks one query after the other.
func (x *soaking) client(number int) {
	g := rand.New(rand.NewPCG(x.seed, uint64(number)))
	c := &dns.Client{Net: "udp", Timeout: 8 * time.Second}
	if number%8 == 0 {
		c.Net = "tcp"
	}
	for !x.stop.Load() {
		name, qtype := soakName(g)
		b := []byte(name)
		for i := range b { // 0x20
			if b[i] >= 'a' && b[i] <= 'z' && g.IntN(2) == 0 {
				b[i] -= 0x20
			}
		}
		q := query(string(b), qtype)
		q.AuthenticatedData, q.CheckingDisabled = g.IntN(3) == 0, g.IntN(6) == 0
		if size := []uint16{0, 512, 1232, 4096}[g.IntN(4)]; size > 0 {
			q.SetEdns0(size, g.IntN(3) == 0)
		}
		c.UDPSize = 4096
		reply, _, err := c.Exchange(q, x.server.addr("dns"))
		kind, wrong := "none", error(nil)
		if err == nil {
			kind, wrong = x.check(q, reply, c.Net)
		} else if !x.faultsLately() {
			wrong = fmt.Errorf("%s: no answer: %w", q.Question[0].String(), err)
		}
		x.mu.Lock()
		x.answers[kind]++
		if wrong != nil {
			if x.wrongs++; len(x.wrong) < 5 {
				x.wrong = append(x.wrong, fmt.Sprintf("%v\nquery: %v\nreply: %v", wrong, q, reply))
			}
		}
		x.mu.Unlock()
		time.Sleep(time.Duration(g.IntN(4)) * time.Millisecond)
	}
}

// healed asks for a name when nothing has failed for a while: now the answer has to be there, and fresh.
func (x *soaking) healed(name string, qtype uint16) error {
	q := query(name, qtype)
	q.SetEdns0(1232, false)
	reply, _, err := overTCP(x.server.addr("dns"))(q)
	if err != nil {
		return err
	}
	kind, err := x.check(q, reply, "tcp")
	want := demanded(q.Question[0], false, false)
	if err == nil && (kind == "stale" || reply.Rcode != want.Rcode) {
		err = fmt.Errorf("%s: %s", name, kind)
	}
	return err
}

// faultsLately reports whether an upstream may be to blame for a failure.
func (x *soaking) faultsLately() bool {
	return slices.ContainsFunc(x.ups, func(u *faulty) bool {
		return time.Since(time.Unix(0, u.lastFault.Load())) < soakAftermath
	})
}

// check holds a reply against what its question demands.
func (x *soaking) check(q, reply *dns.Msg, network string) (kind string, wrong error) {
	if err := isReply(reply, q); err != nil {
		return "wrong", err
	}
	opt := q.IsEdns0()
	do := opt != nil && opt.Do()
	want := demanded(q.Question[0], do, q.CheckingDisabled)
	var explained []uint16
	if o := reply.IsEdns0(); o != nil {
		for _, option := range o.Option {
			ede, ok := option.(*dns.EDNS0_EDE)
			if !ok {
				return "wrong", fmt.Errorf("option %v", option)
			}
			explained = append(explained, ede.InfoCode)
		}
	}
	stale := slices.Contains(explained, dns.ExtendedErrorCodeStaleAnswer) || slices.Contains(explained, dns.ExtendedErrorCodeStaleNXDOMAINAnswer)
	switch {
	case reply.Rcode == dns.RcodeServerFailure || reply.Rcode == dns.RcodeFormatError:
		if want.Rcode != reply.Rcode && !x.faultsLately() {
			return "wrong", fmt.Errorf("%s, and no upstream has failed", dns.RcodeToString[reply.Rcode])
		}
		if len(reply.Answer)+len(reply.Ns) > 0 || stale {
			return "wrong", fmt.Errorf("a failure with an answer")
		}
		return dns.RcodeToString[reply.Rcode], nil
	case slices.Contains(explained, dns.ExtendedErrorCodeCachedError):
		return "wrong", fmt.Errorf("explained as a failure, which it is not")
	case reply.Rcode != want.Rcode:
		return "wrong", fmt.Errorf("rcode %d, want %d", reply.Rcode, want.Rcode)
	case reply.Truncated:
		if network == "tcp" {
			return "wrong", fmt.Errorf("cut off over TCP")
		}
		return "truncated", nil
	case reply.AuthenticatedData != (want.AuthenticatedData && (do || q.AuthenticatedData)):
		return "wrong", fmt.Errorf("AD is %v", reply.AuthenticatedData)
	case !reply.RecursionAvailable || reply.Authoritative:
		return "wrong", fmt.Errorf("RA and AA are not the upstream's")
	}
	longest := uint32(5)     // MINTTL
	if stale || opt == nil { // who has no EDNS is not told
		longest = soakStale
	}
	for _, section := range [][2][]dns.RR{{reply.Answer, want.Answer}, {reply.Ns, want.Ns}} {
		if err := sameRecords(section[0], section[1], longest); err != nil {
			return "wrong", err
		}
	}
	switch {
	case stale:
		return "stale", nil
	case reply.Rcode == dns.RcodeNameError:
		return "NXDOMAIN", nil
	case len(reply.Answer) == 0:
		return "NODATA", nil
	}
	return "answer", nil
}

// sameRecords compares records in any order, the letters of their owners aside, and bounds their TTLs.
func sameRecords(got, want []dns.RR, longest uint32) error {
	text := func(rrs []dns.RR, bounded bool) (all []string, err error) {
		for _, rr := range rrs {
			if bounded && rr.Header().Ttl > longest {
				err = fmt.Errorf("a TTL of more than %d: %v", longest, rr)
			}
			rr = dns.Copy(rr)
			rr.Header().Ttl = 0
			all = append(all, strings.ToLower(rr.String()))
		}
		slices.Sort(all)
		return all, err
	}
	a, err := text(got, true)
	b, _ := text(want, false)
	if !slices.Equal(a, b) {
		err = fmt.Errorf("got %v, want %v", a, b)
	}
	return err
}

// faulty is an upstream that fails in turn in all ways there are.
type faulty struct {
	addr      string
	rng       *rand.Rand
	lastFault atomic.Int64 // when it did so, in ns
	behaviour atomic.Int32

	mu      sync.Mutex // guards what follows
	asked   map[string]int
	servers []*dns.Server
}

// Ways to fail.
const (
	healthy = iota
	dead
	hangs
	truncates
	liesInTheQuestion
	liesInTheID
	late
	serverFails
	garbage
	behaviours
)

var behaviourNames = [behaviours]string{"healthy", "dead", "hangs", "truncates", "lies in the question", "lies in the ID", "late", "SERVFAIL", "garbage"}

func newFaulty(t *testing.T, seed uint64) *faulty {
	l, pc := listen(t)
	u := &faulty{addr: l.Addr().String(), rng: rand.New(rand.NewPCG(seed, 1)), asked: map[string]int{}}
	u.serve(l, pc)
	t.Cleanup(u.close)
	return u
}

func (u *faulty) serve(l net.Listener, pc net.PacketConn) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.servers = []*dns.Server{{Listener: l, Handler: u}, {PacketConn: pc, Handler: u}}
	for _, s := range u.servers {
		go s.ActivateAndServe()
	}
}

func (u *faulty) close() {
	u.mu.Lock()
	defer u.mu.Unlock()
	for _, s := range u.servers {
		if s.Listener != nil {
			s.Listener.Close()
		} else {
			s.PacketConn.Close()
		}
	}
	u.servers = nil
}

// reopen listens where it did before.
func (u *faulty) reopen() {
	for {
		l, err := net.Listen("tcp", u.addr)
		if err == nil {
			var pc net.PacketConn
			if pc, err = net.ListenPacket("udp", u.addr); err == nil {
				u.serve(l, pc)
				return
			}
			l.Close()
		}
		time.Sleep(pollEvery)
	}
}

// misbehave goes through all behaviours until end, each for a part of total. Upstreams begin at another
// one each, and are healthy half of the time.
func (u *faulty) misbehave(end chan struct{}, total time.Duration, number int) {
	phase := max(total/(4*behaviours), 300*time.Millisecond)
	for i := 3 * number; ; i++ {
		select {
		case <-end:
		case <-time.After(phase + time.Duration(u.rng.Int64N(int64(phase)))):
		}
		if u.behaviour.Load() == dead {
			u.reopen()
		}
		select {
		case <-end:
			u.become(healthy)
			return
		default:
		}
		next := healthy
		if i%2 == 0 {
			next = 1 + i/2%(behaviours-1)
		}
		u.become(next)
	}
}

func (u *faulty) become(b int) {
	if u.behaviour.Load() != healthy || b != healthy {
		u.lastFault.Store(time.Now().UnixNano())
	}
	u.behaviour.Store(int32(b))
	if b == dead {
		u.close()
	}
}

func (u *faulty) report() string {
	u.mu.Lock()
	defer u.mu.Unlock()
	return fmt.Sprint(u.asked)
}

// ServeDNS implements dns.Handler.
func (u *faulty) ServeDNS(w dns.ResponseWriter, r *dns.Msg) {
	b := int(u.behaviour.Load())
	u.mu.Lock()
	u.asked[behaviourNames[b]]++
	u.mu.Unlock()
	if b != healthy {
		u.lastFault.Store(time.Now().UnixNano())
	}
	q := r.Question[0]
	if !strings.Contains(q.Name, "-") { // the forwarder asks whether we are there
		w.WriteMsg(new(dns.Msg).SetReply(r))
		return
	}
	opt := r.IsEdns0()
	m := demanded(q, opt != nil && opt.Do(), r.CheckingDisabled)
	m.Id, m.Response, m.Question = r.Id, true, r.Question
	m.RecursionDesired, m.CheckingDisabled, m.Compress = r.RecursionDesired, r.CheckingDisabled, true
	if opt != nil {
		m.SetEdns0(1232, opt.Do())
	}
	udp := w.RemoteAddr().Network() == "udp"
	switch b {
	case hangs:
		return
	case truncates:
		if udp {
			m.Truncated, m.Answer = true, nil
		}
	case liesInTheQuestion:
		other := q
		switch rand.IntN(3) {
		case 0:
			other.Name = "a-1-5.example.org."
		case 1:
			other.Qtype++
		case 2:
			m.Question = nil
		}
		if m.Question != nil {
			m.Question = []dns.Question{other}
		}
		m.Answer, m.Ns, m.Rcode = records("a-1-5.example.org. 300 IN A 203.0.113.1"), nil, dns.RcodeSuccess
	case liesInTheID:
		m.Id ^= 0x5555
		m.Answer, m.Ns, m.Rcode = records(q.Name+" 300 IN A 203.0.113.2"), nil, dns.RcodeSuccess
	case late:
		time.Sleep(time.Duration(rand.Int64N(int64(3 * time.Second))))
		u.lastFault.Store(time.Now().UnixNano())
	case serverFails:
		m.Answer, m.Ns, m.Rcode = nil, nil, dns.RcodeServerFailure
	case garbage:
		p := make([]byte, 12+rand.IntN(100))
		for i := range p {
			p[i] = byte(rand.Uint32())
		}
		p[0], p[1], p[2] = byte(r.Id>>8), byte(r.Id), p[2]|0x80
		w.Write(p)
		return
	}
	if udp {
		size := dns.MinMsgSize
		if opt != nil {
			size = cmp.Or(int(opt.UDPSize()), dns.MinMsgSize)
		}
		m.Truncate(max(size, dns.MinMsgSize))
	}
	w.WriteMsg(m)
}
