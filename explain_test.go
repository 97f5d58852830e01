package optcache

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/coredns/coredns/core/dnsserver"
	"github.com/coredns/coredns/plugin"

	"github.com/miekg/dns"

	"github.com/optcache/optcache/plugin/control"
	"github.com/optcache/optcache/plugin/control/api"
	"github.com/optcache/optcache/plugin/fastpath"
	"github.com/optcache/optcache/test/freeport"
)

// explained asks a question as an operator does.
func explained(t *testing.T, h *Optcache, q control.Question) control.Explanation {
	t.Helper()
	if q.Name == "" {
		q.Name = "host.example.org."
	}
	if q.Type == 0 {
		q.Type = dns.TypeA
	}
	e, err := (controlBlock{h}).Ask(q, true)
	if err != nil {
		t.Fatal(err)
	}
	return e
}

// Each rule by which a response is not kept, and each bound of how long it is kept, is said by the code that decides.
func TestExplainSaysWhy(t *testing.T) {
	truncated := with(positive(aRecord), func(m *dns.Msg) { m.Truncated = true })
	subnet := with(positive(aRecord), func(m *dns.Msg) {
		m.SetEdns0(1232, false)
		m.IsEdns0().Option = []dns.EDNS0{&dns.EDNS0_SUBNET{Code: dns.EDNS0SUBNET, Family: 1, SourceNetmask: 24, SourceScope: 24, Address: []byte{192, 0, 2, 0}}}
	})
	long := positive("host.example.org. 86400 IN A 192.0.2.1")
	soon := time.Now().Add(100 * time.Second).UTC().Format("20060102150405")
	ending := positive("host.example.org. 300 IN A 192.0.2.1", strings.Replace(validSig, "20380101000000", soon, 1))
	var huge []string
	for i := range 300 {
		huge = append(huge, fmt.Sprintf("host.example.org. 300 IN TXT %q", fmt.Sprintf("%d%s", i, strings.Repeat("x", 250))))
	}
	for name, tc := range map[string]struct {
		res    *dns.Msg
		q      control.Question
		change func(*options)
		kind   string
		rule   string // of what is not kept
		bound  string
		ttl    uint32
		why    string
	}{
		"records":          {res: positive(aRecord), kind: "NOERROR", bound: "records", ttl: 300, why: "TTL 300 of the response"},
		"TTL":              {res: long, kind: "NOERROR", bound: "max", ttl: 3600, why: "TTL 86400 of the response, cut to 3600 by the TTL of success"},
		"MINTTL":           {res: positive("host.example.org. 1 IN A 192.0.2.1"), kind: "NOERROR", bound: "min", ttl: 5, why: "TTL 1 of the response, raised to 5 by the MINTTL of success"},
		"no TTL":           {res: positive(), kind: "DELEGATION", bound: "default", ttl: 5, why: "5 s, for it has no TTL of its own"},
		"referral":         {res: negative(dns.RcodeSuccess, "example.org. 60 IN NS ns.example.org."), kind: "DELEGATION", bound: "default", ttl: 5, why: "no TTL of its own"},
		"SOA":              {res: negative(dns.RcodeNameError, soaRecord), kind: "NXDOMAIN", bound: "records", ttl: 300, why: "TTL 300 of the response"},
		"MINIMUM":          {res: negative(dns.RcodeNameError, strings.TrimSuffix(soaRecord, "300")+"60"), kind: "NXDOMAIN", bound: "soa_minimum", ttl: 60, why: "MINIMUM 60 of the SOA"},
		"NODATA":           {res: negative(dns.RcodeSuccess, strings.Replace(soaRecord, "300", "86400", 1)[:len(soaRecord)-1]+"86400"), kind: "NODATA", bound: "max", ttl: 1800, why: "cut to 1800 by the TTL of denial"},
		"SERVFAIL":         {res: negative(dns.RcodeServerFailure), kind: "SERVERERROR", bound: "servfail", ttl: 5, why: "5 s of the option servfail"},
		"signature":        {res: ending, q: control.Question{DO: true}, kind: "NOERROR", bound: "signatures", why: "when a signature expires"},
		"REFUSED":          {res: negative(dns.RcodeRefused), kind: "OTHERERROR", rule: "rcode", why: "its rcode is none of"},
		"no SOA":           {res: negative(dns.RcodeNameError), kind: "NXDOMAIN", rule: "nxdomain_without_soa", why: "NXDOMAIN without SOA"},
		"NXDOMAIN, answer": {res: with(positive(aRecord), func(m *dns.Msg) { m.Rcode = dns.RcodeNameError }), kind: "OTHERERROR", rule: "nxdomain_with_answer", why: "NXDOMAIN with an answer"},
		"chain":            {res: positive(alias("host.example.org.", "www.example.org.")), kind: "INCOMPLETE", rule: "incomplete", why: "does not answer the question"},
		"truncated":        {res: truncated, kind: "NOERROR", rule: "truncated", why: "it is truncated"},
		"expired":          {res: positive(aRecord, expiredSig), q: control.Question{DO: true}, kind: "OTHERERROR", rule: "signature", why: "a signature has expired"},
		"future":           {res: positive(aRecord, strings.NewReplacer("20380101000000", "20391231000000", "19991201000000", "20381231000000").Replace(validSig)), q: control.Question{DO: true}, kind: "OTHERERROR", rule: "signature", why: "not valid yet"},
		"subnet":           {res: subnet, kind: "NOERROR", rule: "subnet", why: "one subnet"},
		"RD=0":             {res: negative(dns.RcodeSuccess, "example.org. 60 IN NS ns.example.org."), q: control.Question{NoRD: true}, kind: "DELEGATION", rule: "no_rd", why: "RD=0"},
		"servfail 0":       {res: negative(dns.RcodeServerFailure), change: func(o *options) { o.servfail = 0 }, kind: "SERVERERROR", rule: "ttl", bound: "servfail", why: "its TTL is 0: 0 s of the option servfail"},
		"MINTTL 0": {res: positive("host.example.org. 0 IN A 192.0.2.1"), change: func(o *options) { o.success.minTTL = 0 }, kind: "NOERROR", rule: "ttl", bound: "records",
			why: "its TTL is 0: TTL 0 of the response"},
		"disable":   {res: positive(aRecord), change: func(o *options) { o.success.except = []string{"example.org."} }, kind: "NOERROR", rule: "disabled", why: "the option disable"},
		"too large": {res: positive(huge...), q: control.Question{Type: dns.TypeTXT, TCP: true}, kind: "NOERROR", rule: "too_large", why: "too large"},
	} {
		t.Run(name, func(t *testing.T) {
			o := stockOptions()
			if tc.change != nil {
				tc.change(&o)
			}
			h := startNamed(t, t.Name(), o, &scripted{response: tc.res})
			e := explained(t, h, tc.q)
			r := e.Response
			if e.Outcome != api.Miss || r == nil {
				t.Fatalf("%+v", e)
			}
			kept := tc.rule == ""
			if r.Kind != tc.kind || r.Kept != kept || r.Rule != tc.rule || r.Bound != tc.bound || tc.ttl > 0 && r.TTL != tc.ttl || !strings.Contains(r.Why, tc.why) {
				t.Errorf("%+v", r)
			}
			if (e.Held != nil) != kept || (e.Way != nil) != kept {
				t.Errorf("kept %t: held %+v, way %+v", kept, e.Held, e.Way)
			}
			if kept && (e.Held.TTL != r.TTL || e.Held.Segment != "window") {
				t.Errorf("held %+v, and response %+v", e.Held, r)
			}
		})
	}
}

func TestExplainSaysOutcomes(t *testing.T) {
	t.Run("miss and hits", func(t *testing.T) {
		up := &scripted{response: positive(aRecord)}
		h := startNamed(t, t.Name(), stockOptions(), up)
		if e := explained(t, h, control.Question{}); e.Outcome != api.Miss || e.Rcode != "NOERROR" || e.Way.Way != "bytes" && e.Way.Way != "transport" || up.asked != 1 {
			t.Errorf("%+v, way %+v, asked %d", e, e.Way, up.asked)
		}
		e := explained(t, h, control.Question{})
		if e.Outcome != api.Hit || e.Tier != "probationary" || e.TTL == 0 || e.Response != nil || e.Held == nil || up.asked != 1 {
			t.Errorf("%+v", e)
		}
		for range 5 {
			e = explained(t, h, control.Question{})
		}
		if e.Tier != "hot" || !e.Held.Hot {
			t.Errorf("%+v, held %+v", e, e.Held)
		}
		if e := explained(t, h, control.Question{DO: true}); e.Outcome != api.Miss || !e.Held.DO {
			t.Errorf("with DO: %+v, held %+v", e, e.Held)
		}
	})
	t.Run("stale", func(t *testing.T) {
		o := stockOptions()
		o.stale = staleOptions{upTo: time.Hour}
		up := &scripted{response: positive(aRecord)}
		h := startNamed(t, t.Name(), o, up)
		clock := &fakeClock{now: systemNow()}
		h.clock = func() int64 { return clock.now }
		explained(t, h, control.Question{})
		clock.now += 400e9
		up.response = nil
		if e := explained(t, h, control.Question{}); e.Outcome != api.Stale || e.Age != 400 || !e.Held.Stale {
			t.Errorf("%+v", e)
		}
	})
	t.Run("verified", func(t *testing.T) {
		o := stockOptions()
		o.stale = staleOptions{upTo: time.Hour, verify: true}
		up := &scripted{response: positive(aRecord)}
		h := startNamed(t, t.Name(), o, up)
		clock := &fakeClock{now: systemNow()}
		h.clock = func() int64 { return clock.now }
		explained(t, h, control.Question{})
		clock.now += 400e9
		if e := explained(t, h, control.Question{}); e.Outcome != api.Verified || e.Response == nil || !e.Response.Kept {
			t.Errorf("%+v", e)
		}
		clock.now += 400e9
		up.response = negative(dns.RcodeServerFailure)
		if e := explained(t, h, control.Question{}); e.Outcome != api.Stale || e.Response == nil || e.Response.Rule != "stale_preferred" {
			t.Errorf("%+v, response %+v", e, e.Response)
		}
	})
	t.Run("coalesced", func(t *testing.T) {
		open, came := make(chan struct{}), make(chan struct{}, 2)
		h := startNamed(t, t.Name(), stockOptions(), plugin.HandlerFunc(func(_ context.Context, w dns.ResponseWriter, r *dns.Msg) (int, error) {
			came <- struct{}{}
			<-open
			m := new(dns.Msg).SetReply(r)
			m.Answer = parsed(aRecord)
			return 0, w.WriteMsg(m)
		}))
		h.coalesce = defaultCoalesce
		go ask(serverContext(t), h, asking("host.example.org.", dns.TypeA).SetEdns0(1232, false), udp4Client)
		<-came
		go func() {
			for h.flights.Waiting() == 0 {
				time.Sleep(time.Millisecond)
			}
			close(open)
		}()
		if e := explained(t, h, control.Question{}); e.Outcome != api.Coalesced || e.Response == nil || !e.Response.Kept || e.Response.TTL != 300 {
			t.Errorf("%+v, response %+v", e, e.Response)
		}
	})
	t.Run("no response", func(t *testing.T) {
		h := startNamed(t, t.Name(), stockOptions(), &scripted{})
		if e := explained(t, h, control.Question{}); e.Outcome != api.Miss || !strings.Contains(e.Why, errUpstream.Error()) || e.Response.Kind != "SERVERERROR" {
			t.Errorf("%+v", e)
		}
	})
	t.Run("another question", func(t *testing.T) {
		other := positive("www.example.org. 300 IN A 192.0.2.1")
		other.Question = asking("www.example.org.", dns.TypeA).Question
		h := startNamed(t, t.Name(), stockOptions(), &scripted{response: other, verbatim: true})
		if e := explained(t, h, control.Question{}); e.Response == nil || e.Response.Rule != "other_question" || e.Held != nil {
			t.Errorf("%+v, response %+v", e, e.Response)
		}
	})
	t.Run("bytes", func(t *testing.T) {
		h := startNamed(t, t.Name(), stockOptions(), plugin.HandlerFunc(func(_ context.Context, w dns.ResponseWriter, r *dns.Msg) (int, error) {
			b, _ := new(dns.Msg).SetReply(r).Pack()
			_, err := w.Write(b)
			return 0, err
		}))
		if e := explained(t, h, control.Question{}); e.Response != nil || !strings.Contains(e.Why, "bytes") {
			t.Errorf("%+v", e)
		}
	})
	t.Run("flushed meanwhile", func(t *testing.T) {
		up := &scripted{response: positive(aRecord)}
		var h *Optcache
		h = startNamed(t, t.Name(), stockOptions(), plugin.HandlerFunc(func(ctx context.Context, w dns.ResponseWriter, r *dns.Msg) (int, error) {
			if _, err := (controlBlock{h}).Flush(control.Filter{}); err != nil {
				t.Error(err)
			}
			return up.ServeDNS(ctx, w, r)
		}))
		if e := explained(t, h, control.Question{}); e.Response == nil || e.Response.Rule != "no_room" || e.Held != nil {
			t.Errorf("%+v, response %+v", e, e.Response)
		}
	})
	t.Run("synthesized", func(t *testing.T) {
		h := startNamed(t, t.Name(), cutting(false), &tree{})
		explained(t, h, control.Question{Name: "example.org."})
		e := explained(t, h, control.Question{Name: "a.example.org."})
		if e.Outcome != api.Synthesized || e.Rcode != "NXDOMAIN" || e.Held == nil || e.Held.Name != "example.org." {
			t.Errorf("%+v, held %+v", e, e.Held)
		}
	})
	t.Run("lookups of plugins", func(t *testing.T) {
		up := &scripted{response: positive(aRecord)}
		var h *Optcache
		h = startNamed(t, t.Name(), stockOptions(), plugin.HandlerFunc(func(ctx context.Context, w dns.ResponseWriter, r *dns.Msg) (int, error) {
			if r.Question[0].Qtype == dns.TypeA { // looks another name up first, as plugins do that follow a CNAME
				nested := context.WithValue(ctx, dnsserver.LoopKey{}, 1)
				for range 2 {
					h.ServeDNS(nested, &wireWriter{addr: udp4Client}, asking("other.example.org.", dns.TypeAAAA))
				}
			}
			return up.ServeDNS(ctx, w, r)
		}))
		if e := explained(t, h, control.Question{}); e.Outcome != api.Miss || e.Held == nil || e.Held.Name != "host.example.org." {
			t.Errorf("%+v, held %+v", e, e.Held)
		}
	})
	t.Run("zones", func(t *testing.T) {
		o := stockOptions()
		o.zones = []string{"example.net."}
		h := startNamed(t, t.Name(), o, &scripted{response: positive(aRecord)})
		if e := explained(t, h, control.Question{}); e.Outcome != api.Elsewhere || e.Rcode != "" {
			t.Errorf("%+v", e)
		}
	})
	t.Run("bypassed zone", func(t *testing.T) {
		h := startNamed(t, t.Name(), stockOptions(), &scripted{response: positive(aRecord)}, uncached{"example.org."})
		if e := explained(t, h, control.Question{}); e.Outcome != api.Passed || e.Why == "" || e.Held != nil {
			t.Errorf("%+v", e)
		}
	})
	t.Run("plugin", func(t *testing.T) {
		h := startNamed(t, t.Name(), stockOptions(), &scripted{response: positive(aRecord)}, namedPlugin("mangler"))
		if e := explained(t, h, control.Question{}); e.Way == nil || e.Way.Way != "plugin" || e.Way.Why != "the plugin mangler may change the reply" {
			t.Errorf("%+v", e.Way)
		}
	})
	t.Run("panic", func(t *testing.T) {
		h := startNamed(t, t.Name(), stockOptions(), plugin.HandlerFunc(func(context.Context, dns.ResponseWriter, *dns.Msg) (int, error) { panic("x") }))
		if e, err := (controlBlock{h}).Ask(control.Question{Name: "a.", Type: 1}, true); err == nil {
			t.Errorf("%+v", e)
		}
		if watching.Load() != 0 || len(asks) != 0 {
			t.Errorf("%d watches, %d asks are left", watching.Load(), len(asks))
		}
	})
	t.Run("bad", func(t *testing.T) {
		h := startNamed(t, t.Name(), stockOptions(), &scripted{})
		for _, q := range []control.Question{{Name: "a..b.", Type: 1}, {Name: "a.", Type: 1, Client: "x"}} {
			if e, err := (controlBlock{h}).Ask(q, true); err == nil {
				t.Errorf("%+v: %+v", q, e)
			}
		}
	})
}

// uncached is a plugin whose zone is not cached.
type uncached struct{ zone string }

func (uncached) Name() string                                                        { return "uncached" }
func (uncached) ServeDNS(context.Context, dns.ResponseWriter, *dns.Msg) (int, error) { return 0, nil }
func (b uncached) CacheBypassZones() []string                                        { return []string{b.zone} }

// namedPlugin is a plugin that is only there.
type namedPlugin string

func (n namedPlugin) Name() string { return string(n) }
func (namedPlugin) ServeDNS(context.Context, dns.ResponseWriter, *dns.Msg) (int, error) {
	return 0, nil
}

// Questions of operators go through the server of a Corefile, and through the plugins before the block.
func TestExplainGoesThroughTheServer(t *testing.T) {
	fast := ""
	if fastpath.Supported() == nil {
		fast = "fastpath 1\n"
	}
	port := freeport.Port(t)
	runCorefile(t, fmt.Sprintf("explain.test:%d {\nbind 127.0.0.1\noptcache {\n"+fast+"}\nwhoami\n}\ntls://x.explain.test:0 explain2.test:0 {\nbind 127.0.0.1\ndns64\noptcache\nwhoami\n}", port))
	block := func(zone string) controlBlock {
		for _, o := range instances.all() {
			if slices.Contains(o.zones, zone) {
				return controlBlock{o}
			}
		}
		t.Fatal(zone)
		return controlBlock{}
	}
	addr := fmt.Sprintf("dns://127.0.0.1:%d", port)
	for end := time.Now().Add(time.Minute); fast != "" && !fastpath.Serving(addr) && time.Now().Before(end); {
		time.Sleep(time.Millisecond) // the server begins to read in a goroutine of its own
	}
	e, err := block("explain.test.").Ask(control.Question{Name: "www.explain.test.", Type: dns.TypeA}, true)
	if err != nil || e.Outcome != api.Miss || e.Response == nil || e.Response.Bound != "min" || !strings.HasPrefix(e.Server, "dns://127.0.0.1:") || e.Way == nil {
		t.Fatalf("%+v, %v", e, err)
	}
	if want := map[bool]string{true: "fastpath", false: "bytes"}[fast != ""]; e.Way.Way != want {
		t.Errorf("%+v, want %s", e.Way, want)
	}
	e, err = block("explain2.test.").Ask(control.Question{Name: "www.explain2.test.", Type: dns.TypeA, Client: "2001:db8::1"}, true)
	if err != nil || e.Way == nil || e.Way.Way != "plugin" || e.Way.Why != "the plugin dns64 may change the reply" || e.Client != "2001:db8::1" {
		t.Errorf("%+v, way %+v, %v", e, e.Way, err)
	}
	if e, err := block("explain2.test.").Ask(control.Question{Name: "www.explain.test.", Type: dns.TypeA}, true); err != nil || e.Outcome != api.Elsewhere {
		t.Errorf("%+v, %v", e, err)
	}
}

// rewinder is a dump that can be read twice.
type rewinder struct{ *bytes.Reader }

func (r rewinder) Rewind() { r.Seek(0, io.SeekStart) }

func dumped(t *testing.T, h *Optcache, text bool) []byte {
	t.Helper()
	var b bytes.Buffer
	n, err := (controlBlock{h}).Dump(&b, text)
	if err != nil || int64(n) != h.store.total() {
		t.Fatalf("%d answers of %d: %v", n, h.store.total(), err)
	}
	return b.Bytes()
}

func loadInto(h *Optcache, dump []byte, text bool) (control.Loaded, error) {
	return controlBlock{h}.Load(rewinder{bytes.NewReader(dump)}, text)
}

// shownBy returns what an instance holds, as words that say all but how popular it is.
func shownBy(t *testing.T, h *Optcache) (all []string) {
	t.Helper()
	page, err := (controlBlock{h}).List(control.Filter{Limit: control.MaxPage, Records: true})
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range page.Answers {
		all = append(all, fmt.Sprintf("%s %s do=%t cd=%t no_rd=%t %s %s %d %d %v %q", a.Name, a.Type, a.DO, a.CD, a.NoRD, a.Rcode, a.Kind, a.TTL, a.Left, a.Stored, a.Records))
	}
	slices.Sort(all)
	return all
}

// What is dumped in either form, and loaded into an empty cache, is what was there: with its age, its bits and its records.
func TestDumpAndLoad(t *testing.T) {
	for _, text := range []bool{false, true} {
		inBubble(t, fmt.Sprintf("text %t", text), func(t *testing.T) {
			h, b := filled(t)
			answer(t, serverContext(t), h, with(asking("c.example.org.", dns.TypeA), func(m *dns.Msg) { m.RecursionDesired, m.CheckingDisabled = false, true }))
			time.Sleep(3*time.Second + 5*time.Millisecond)
			before := shownBy(t, h)
			if len(before) != 10 {
				t.Fatalf("%d: %q", len(before), before)
			}
			dump := dumped(t, h, text)
			o := h.options
			other := startNamed(t, t.Name()+"2", o, h.Next)
			done, err := loadInto(other, dump, text)
			if err != nil || done.Loaded != 10 || len(done.Refused) > 0 {
				t.Errorf("%+v, %v", done, err)
			}
			if got := shownBy(t, other); !slices.Equal(got, before) {
				t.Errorf("loaded are\n%s\nand dumped were\n%s", strings.Join(got, "\n"), strings.Join(before, "\n"))
			}
			// The same again changes nothing: what is held is as new.
			if done, err := loadInto(h, dump, text); err != nil || done.Loaded+done.Refused["room"] != 10 || !slices.Equal(shownBy(t, h), before) {
				t.Errorf("again: %+v, %v", done, err)
			}
			// An operator may bring back what is flushed.
			if _, err := b.Flush(control.Filter{}); err != nil {
				t.Fatal(err)
			}
			if done, err := loadInto(h, dump, text); err != nil || done.Loaded != 10 {
				t.Errorf("after a flush: %+v, %v", done, err)
			}
		})
	}
}

// A dump that is cut off anywhere, or damaged, changes nothing.
func TestLoadOfBadDumps(t *testing.T) {
	h, _ := filled(t)
	empty := startNamed(t, t.Name()+"2", h.options, h.Next)
	g := rand.New(rand.NewPCG(1, 2))
	for _, text := range []bool{false, true} {
		dump := dumped(t, h, text)
		for n := range len(dump) {
			if n > 200 && n < len(dump)-200 && n%7 > 0 || text && n == len(dump)-1 { // the last newline is not needed
				continue
			}
			if done, err := loadInto(empty, dump[:n], text); !errors.Is(err, control.ErrBadDump) || done.Loaded > 0 {
				t.Fatalf("text %t, %d of %d bytes: %+v, %v", text, n, len(dump), done, err)
			}
		}
		if !text {
			for range 200 {
				bad := bytes.Clone(dump)
				bad[g.IntN(len(bad))] ^= byte(1 + g.IntN(255))
				if done, err := loadInto(empty, bad, text); err == nil && !bytes.Equal(bad, dump) || done.Loaded > 0 {
					t.Fatalf("damaged: %+v, %v", done, err)
				}
			}
		}
		if done, err := loadInto(empty, dump, !text); !errors.Is(err, control.ErrBadDump) {
			t.Errorf("taken for the other form: %+v, %v", done, err)
		}
	}
	if n := empty.store.total(); n != 0 {
		t.Errorf("%d answers are loaded", n)
	}
}

// What is flushed while a dump is loaded does not come back.
func TestFlushWhileADumpIsLoaded(t *testing.T) {
	h, _ := filled(t)
	dump := dumped(t, h, false)
	other := startNamed(t, t.Name()+"2", h.options, h.Next)
	r := &flushing{rewinder: rewinder{bytes.NewReader(dump)}, do: func() {
		if _, err := (controlBlock{other}).Flush(control.Filter{Name: "example.org.", Subtree: true}); err != nil {
			t.Error(err)
		}
	}}
	if _, err := (controlBlock{other}).Load(r, false); err != nil {
		t.Fatal(err)
	}
	for _, is := range listing(t, controlBlock{other}, control.Filter{}) {
		if strings.HasSuffix(is, ".example.org.A") || is == "example.org.A" {
			t.Errorf("%s is back", is)
		}
	}
	if got := listing(t, controlBlock{other}, control.Filter{}); len(got) != 2 {
		t.Errorf("%q", got)
	}
}

// flushing calls do between the two times that a dump is read.
type flushing struct {
	rewinder
	do func()
}

func (f *flushing) Rewind() {
	f.rewinder.Rewind()
	f.do()
}

// A dump whose block is gone in the middle does not look whole.
func TestDumpWhileTheBlockEnds(t *testing.T) {
	for _, text := range []bool{false, true} {
		h, _ := filled(t)
		first := true
		h.clock = func() int64 {
			if first {
				first = false
				h.stop()
			}
			return systemNow()
		}
		var b bytes.Buffer
		if _, err := (controlBlock{h}).Dump(&b, text); !errors.Is(err, errReplaced) {
			t.Errorf("text %t: %v", text, err)
		}
		other := startNamed(t, t.Name()+"2", h.options, h.Next)
		if done, err := loadInto(other, b.Bytes(), text); !errors.Is(err, control.ErrBadDump) {
			t.Errorf("text %t: %+v, %v", text, done, err)
		}
		other.stop()
	}
}

// A dump has the format of the file: a start reads it.
func TestDumpIsASnapshot(t *testing.T) {
	h, _ := filled(t)
	path := filepath.Join(t.TempDir(), "answers")
	if err := os.WriteFile(path, dumped(t, h, false), 0o600); err != nil {
		t.Fatal(err)
	}
	o := h.options
	o.file = fileOptions{path: path}
	other := started(t, o, h.Next, identity{})
	if n := other.store.total(); n != h.store.total() {
		t.Errorf("%d answers of %d", n, h.store.total())
	}
}
