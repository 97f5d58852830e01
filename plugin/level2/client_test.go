package level2

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/optcache/optcache/test/redis"
)

// replica is a client with a log, and with what it has flushed.
type replica struct {
	*Client
	mu      sync.Mutex // guards the rest
	lines   []string
	flushes []Flush
}

// join starts a replica of the group at a server. change may be nil.
func join(t testing.TB, s *redis.Server, change func(*Options)) *replica {
	t.Helper()
	servers, err := ParseServers([]string{s.URL()})
	if err != nil {
		t.Fatal(err)
	}
	r := new(replica)
	log := func(format string, args ...any) {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.lines = append(r.lines, fmt.Sprintf(format, args...))
	}
	o := Options{
		Servers: servers, Timeout: time.Second, Prefix: "optcache", Wait: 2 * time.Second, Infof: log, Warningf: log,
		Flushed: func(f Flush, _ time.Duration) {
			r.mu.Lock()
			defer r.mu.Unlock()
			r.flushes = append(r.flushes, f)
		},
	}
	if change != nil {
		change(&o)
	}
	r.Client = New(o, sealerOf(t, secretA), NewCounts())
	r.Start()
	t.Cleanup(r.Close)
	return r
}

func (r *replica) log() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return strings.Join(r.lines, "\n")
}

// until waits until a condition holds.
func until(t testing.TB, what string, holds func() bool) {
	t.Helper()
	for end := time.Now().Add(time.Minute); !holds(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not in time: %s", what)
		}
	}
}

func (r *replica) ready(t testing.TB) *replica {
	t.Helper()
	until(t, "the second level is asked", func() bool { return !r.Away() })
	return r
}

// has puts an answer with a TTL in seconds, and waits until it is written.
func (r *replica) has(t testing.TB, q Question, ttl uint32) {
	t.Helper()
	before := r.Written[Written].Load()
	now := time.Now()
	r.Put(q, Answer{Kind: Success, TTL: ttl, Message: []byte("message of " + string(q.Name))}, now, now)
	until(t, "the answer is written; the log has "+r.log(), func() bool { return r.Written[Written].Load() > before })
}

func (r *replica) get(q Question) (*Answer, time.Duration, Outcome) {
	return r.Ask(context.Background(), &q, Need{})
}

func named(name string) Question { return Question{Name: []byte(name), Type: 1, Class: 1} }

func TestOneReplicaGetsWhatAnotherHasPut(t *testing.T) {
	server := redis.Start(t)
	a, b := join(t, server, nil).ready(t), join(t, server, nil).ready(t)
	if _, _, how := b.get(example); how != Miss {
		t.Fatalf("an empty server: %s", OutcomeNames[how])
	}
	a.has(t, example, 300)
	answer, age, how := b.get(example)
	if how != Hit || string(answer.Message) != "message of "+string(example.Name) || answer.TTL != 300 || age < 0 || age > 5*time.Second {
		t.Fatalf("%s: %+v, %v old", OutcomeNames[how], answer, age)
	}
	q := example
	q.DO = true
	if _, _, how := b.get(q); how != Miss {
		t.Errorf("another question: %s", OutcomeNames[how])
	}
	// The server knows no name, and forgets the answer when its life ends.
	keys := server.Do("keys", "*")
	if strings.Contains(keys, "example") || !strings.Contains(keys, "optcache:{") {
		t.Errorf("keys: %s", keys)
	}
	for key := range strings.FieldsSeq(keys) {
		if strings.Contains(key, "{group}") {
			continue
		}
		if ttl := server.Do("pttl", key); len(ttl) != 6 || ttl > "300000" {
			t.Errorf("%s has %s ms left", key, ttl)
		}
	}
}

// The clock of the machine does not count: the server's does, and an answer never seems younger than it is.
func TestAgeIsCountedByTheServersClock(t *testing.T) {
	server := redis.Start(t)
	a, b := join(t, server, nil).ready(t), join(t, server, nil).ready(t)
	begun := time.Now()
	stored := begun.Add(-100 * time.Second)
	a.Put(example, Answer{Kind: Success, TTL: 300, Message: []byte("m")}, stored, stored)
	until(t, "the answer is written", func() bool { return a.Written[Written].Load() > 0 })
	_, age, how := b.get(example)
	if least := time.Since(stored); how != Hit || age < 100*time.Second || age > least+time.Second {
		t.Errorf("%s: %v old, and it is %v", OutcomeNames[how], age, least)
	}
	// What the readers think of the time does not matter where the writer has seen the server's clock an hour ahead.
	was := a.clock.state.Load()
	ahead := *was
	ahead.lower, ahead.upper = was.lower+3_600_000, was.upper+3_600_000
	a.clock.state.Store(&ahead)
	a.has(t, named("\x01a\x00"), 300)
	if _, _, how := b.get(named("\x01a\x00")); how != Refused || b.Refused[RefusedFuture].Load() != 1 {
		t.Errorf("an answer of the future: %s", OutcomeNames[how])
	}
}

func TestExpiredAnswersAreRefused(t *testing.T) {
	server := redis.Start(t)
	a := join(t, server, func(o *Options) { o.Stale = time.Hour }).ready(t)
	stored := time.Now().Add(-299 * time.Second)
	a.Put(example, Answer{Kind: Success, TTL: 300, Message: []byte("m")}, stored, stored)
	until(t, "it is written", func() bool { return a.Written[Written].Load() > 0 })
	until(t, "it has expired", func() bool { _, _, how := a.get(example); return how == Refused })
	if a.Refused[RefusedExpired].Load() == 0 {
		t.Error("it is refused for another reason")
	}
}

// Of replicas that miss at the same time, one asks upstream. The others get what it brings, or ask when nothing comes.
func TestOneOfManyAsksUpstream(t *testing.T) {
	server := redis.Start(t)
	var all []*replica
	for range 5 {
		r := join(t, server, nil).ready(t)
		r.Upstream(2 * time.Second) // the others wait for so long
		all = append(all, r)
	}
	for _, renews := range []bool{false, true} {
		results := make(chan Outcome)
		for _, r := range all {
			go func() {
				_, _, how := r.Ask(t.Context(), &example, Need{Waits: true, Renews: renews, Left: 20 * time.Second})
				if how == Miss { // this one asks
					time.Sleep(50 * time.Millisecond)
					now := time.Now()
					ttl := uint32(20)
					if renews {
						ttl = 300
					}
					r.Put(example, Answer{Kind: Success, TTL: ttl, Message: []byte("m")}, now, now)
				}
				results <- how
			}()
		}
		got := make(map[Outcome]int)
		for range all {
			got[<-results]++
		}
		if got[Miss] != 1 || got[Hit] != 4 {
			t.Errorf("renews %v: %v", renews, got)
		}
		time.Sleep(lockLeast) // the lock ends
		server.Do("eval", "for _, k in ipairs(redis.call('keys', '*l')) do redis.call('del', k) end", "0")
		all[0].has(t, example, 15)
	}
	// The one that has the lock brings nothing.
	q := named("\x01x\x00")
	if _, _, how := all[0].Ask(t.Context(), &q, Need{Waits: true}); how != Miss {
		t.Fatal(OutcomeNames[how])
	}
	if _, _, how := all[1].Ask(t.Context(), &q, Need{Waits: true}); how != Waited {
		t.Errorf("nothing comes: %s", OutcomeNames[how])
	}
}

// When a flush has been told, no replica gets what was asked before, not even what is written later.
func TestFlushReachesAll(t *testing.T) {
	server := redis.Start(t)
	var all []*replica
	for range 10 {
		all = append(all, join(t, server, nil).ready(t))
	}
	until(t, "all have appeared", func() bool { return server.Do("zcard", "optcache:{group}members") == "10" })
	for what, f := range map[string]Flush{
		"name":    {Name: example.Name, Kinds: Success | Denial},
		"type":    {Name: example.Name, Type: 1, Kinds: Success | Denial},
		"subtree": {Name: []byte("\x03org\x00"), Subtree: true, Kinds: Success | Denial},
		"all":     {Kinds: Success},
	} {
		all[0].has(t, example, 300)
		asked := time.Now()
		if _, _, how := all[9].get(example); how != Hit {
			t.Fatalf("%s: %s before the flush", what, OutcomeNames[how])
		}
		f, err := all[3].Begin(f)
		if err != nil {
			t.Fatal(err)
		}
		told, others, err := all[3].Tell(f)
		if told != 9 || others != 9 || err != nil {
			t.Errorf("%s: %d of %d were told: %v", what, told, others, err)
		}
		// One that knew of nothing writes what it had asked before.
		late := sealerOf(t, secretA)
		_, name := late, late.names(&example, all[0].group.state.Epoch)[0]
		a := sampleAnswer()
		a.Asked, _, _ = all[0].clock.bounds(asked)
		a.Stored, _, _ = all[0].clock.bounds(time.Now())
		server.Do("set", "optcache:{"+name+"}", "") // there is a key
		all[0].conn.Load().Do(t.Context(), all[0].conn.Load().B().Set().Key("optcache:{"+name+"}").Value(string(late.seal(name, a.append(nil)))).Build())
		for i, r := range all {
			if _, _, how := r.get(example); how == Hit {
				t.Errorf("%s: replica %d still gets it", what, i)
			}
		}
		newcomer := join(t, server, nil).ready(t)
		if _, _, how := newcomer.get(example); how == Hit {
			t.Errorf("%s: a newcomer gets it", what)
		}
		newcomer.Close() // nobody waits for it any more
		until(t, "time has passed", func() bool { all[0].has(t, example, 300); _, _, how := all[1].get(example); return how == Hit })
	}
	for i, r := range all {
		r.mu.Lock()
		if n := len(r.flushes); n != 4 && i != 3 || n != 0 && i == 3 {
			t.Errorf("replica %d has done %d flushes", i, n)
		}
		r.mu.Unlock()
	}
}

// A server that does not know RESP3 is as good, with a connection of its own for news.
func TestServerWithoutRESP3(t *testing.T) {
	server := redis.Start(t, "--rename-command", "HELLO", "")
	a, b := join(t, server, nil).ready(t), join(t, server, nil).ready(t)
	a.has(t, example, 300)
	if _, _, how := b.get(example); how != Hit {
		t.Errorf("an answer: %s", OutcomeNames[how])
	}
	f, err := a.Begin(Flush{Name: example.Name, Kinds: Success})
	if err != nil {
		t.Fatal(err)
	}
	if told, others, err := a.Tell(f); told != 1 || others != 1 || err != nil {
		t.Errorf("%d of %d were told: %v", told, others, err)
	}
	if _, _, how := b.get(example); how == Hit {
		t.Error("what has been flushed is still there")
	}
}

// What is lost on the server is lost with its epoch. Flushes are put back by those that know them.
func TestFlushesOutliveTheServer(t *testing.T) {
	server := redis.Start(t)
	a := join(t, server, nil).ready(t)
	f, err := a.Begin(Flush{Name: example.Name, Kinds: Success})
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := a.Tell(f); err != nil {
		t.Fatal(err)
	}
	server.Do("del", "optcache:{group}")
	b := join(t, server, nil).ready(t)
	until(t, "the flush is known to a newcomer", func() bool {
		a.group.due.Store(true)
		a.nudged()
		b.mu.Lock()
		defer b.mu.Unlock()
		return len(b.flushes) == 1
	})
	server.Do("set", "optcache:{group}", "garbage")
	c := join(t, server, nil).ready(t)
	until(t, "all have one epoch again", func() bool {
		for _, r := range []*replica{a, b, c} {
			r.group.due.Store(true)
			r.nudged()
		}
		x, _ := a.group.epochNow()
		y, _ := b.group.epochNow()
		z, _ := c.group.epochNow()
		return x == y && y == z
	})
}

func TestFlushesAreBounded(t *testing.T) {
	var g group
	g.merge(&state{Epoch: 1}, 0)
	for i := range 3 * mostFlushes {
		g.add(Flush{ID: fmt.Sprint(i), At: int64(i), Name: []byte{1, byte(i), byte(i >> 8), 0}, Kinds: Success}, int64(i))
	}
	if len(g.state.Flushes) > mostFlushes {
		t.Errorf("%d are remembered", len(g.state.Flushes))
	}
	for i := range 3 * mostFlushes {
		q := Question{Name: []byte{1, byte(i), byte(i >> 8), 0}}
		if !g.flushed(&q, &Answer{Kind: Success, Asked: int64(i)}) {
			t.Fatalf("flush %d is forgotten", i)
		}
	}
	if news, differs := g.merge(&state{Epoch: 1, Flushes: []Flush{{ID: "5", At: 5, Name: []byte{1, 5, 0, 0}, Kinds: Success}}}, 3*mostFlushes); len(news) != 0 || !differs {
		t.Errorf("a flush that is part of a larger one is new: %v", news)
	}
	var other group
	other.merge(&g.state, 3*mostFlushes)
	if _, differs := g.merge(&other.state, 3*mostFlushes); differs {
		t.Error("two that know the same differ")
	}
}

// What waits to be written is bounded, whatever has been dropped before.
func TestPutsAreBounded(t *testing.T) {
	c := New(Options{}, sealerOf(t, secretA), NewCounts())
	put := func(n int) {
		for range n {
			c.Put(example, Answer{Kind: Success, TTL: 300, Message: make([]byte, MaxMessage)}, time.Now(), time.Now())
		}
	}
	put(1000) // the second level is away
	if n, dropped := c.putBytes.Load(), c.Written[Dropped].Load(); n != 0 || dropped != 1000 {
		t.Errorf("%d bytes wait, and %d answers were dropped", n, dropped)
	}
	c.conn.Store(new(connection))
	put(1000)
	if n, most := len(c.puts), mostPutBytes/MaxMessage; n > most || n < most*9/10 || c.putBytes.Load() > mostPutBytes {
		t.Errorf("%d answers of %d bytes wait", n, c.putBytes.Load())
	}
}

// A flush that is made before the server has ever been reached reaches the group when it is.
func TestFlushBeforeTheServerIsThere(t *testing.T) {
	server := redis.Start(t)
	b := join(t, server, nil).ready(t)
	b.has(t, example, 300)
	quiet := func(string, ...any) {}
	a := New(Options{Servers: b.Servers, Timeout: time.Second, Prefix: "optcache", Infof: quiet, Warningf: quiet, Flushed: func(Flush, time.Duration) {}},
		sealerOf(t, secretA), NewCounts())
	for i := range mostFlushes + 1 {
		if _, err := a.Begin(Flush{Name: named(fmt.Sprintf("\x05n%04d\x00", i)).Name, Kinds: Success}); err == nil {
			t.Fatal("a flush is told to nobody, and that is no error")
		}
	}
	if _, err := a.Begin(Flush{Name: example.Name, Kinds: Success}); err == nil || len(a.group.unheard) > mostFlushes {
		t.Errorf("%d flushes wait: %v", len(a.group.unheard), err)
	}
	a.Start()
	defer a.Close()
	until(t, "the other has heard of it", func() bool { _, _, how := b.get(example); return how == Refused })
	until(t, "it is there", func() bool { return !a.Away() })
	if _, _, how := a.Ask(t.Context(), &example, Need{}); how == Hit {
		t.Error("what was flushed comes back")
	}
}

// When the server's clock has been set back, what is there would seem younger than it is.
func TestServersClockIsSetBack(t *testing.T) {
	for name, lost := range map[string]bool{"": false, "and the state is lost": true} {
		server := redis.Start(t)
		a, b := join(t, server, nil).ready(t), join(t, server, nil).ready(t)
		a.has(t, example, 300)
		was, _ := a.group.epochNow()
		if lost {
			server.Do("del", "optcache:{group}")
		}
		ahead := *a.clock.state.Load()
		ahead.lower, ahead.upper = ahead.lower+3_600_000, ahead.upper+3_600_000
		a.clock.state.Store(&ahead)
		a.nudged()
		until(t, "another epoch has begun, for all "+name, func() bool {
			x, _ := a.group.epochNow()
			y, _ := b.group.epochNow()
			return x != was && x == y
		})
		for _, r := range []*replica{a, b} {
			if _, _, how := r.get(example); how == Hit {
				t.Errorf("what was there before is still used %s", name)
			}
		}
		if !strings.Contains(a.log(), "set back by") {
			t.Errorf("the log: %s", a.log())
		}
		a.has(t, example, 300)
	}
}

// Where look-ups were late, a replica that nobody asks learns when that is over.
func TestLatenessEnds(t *testing.T) {
	server := redis.Start(t)
	r := join(t, server, nil).ready(t)
	for r.P95() <= r.Timeout {
		r.latency.observe(2 * r.Timeout)
	}
	if _, _, how := r.get(example); how != Skipped {
		t.Errorf("a look-up that will be late: %s", OutcomeNames[how])
	}
	until(t, "it is asked again", func() bool { r.nudged(); return r.P95() <= r.Timeout })
	if _, _, how := r.get(example); how != Miss {
		t.Errorf("when it is over: %s", OutcomeNames[how])
	}
}

func TestTimeOf(t *testing.T) {
	if ms, err := timeOf([]string{"1700000000", "999999"}); err != nil || ms != 1_700_000_000_999 {
		t.Errorf("%d, %v", ms, err)
	}
	for _, bad := range [][]string{nil, {"1"}, {"1", "2", "3"}, {"x", "1"}, {"1", ""}, {"-1", "1"}, {"1", "-1"}, {"1", "1000000"}, {"9000000000", "1"}} {
		if ms, err := timeOf(bad); err == nil {
			t.Errorf("%q: %d", bad, ms)
		}
	}
}

// Replicas with different secrets and the same prefix do not share, and do not keep each other busy.
func TestDifferentSecrets(t *testing.T) {
	server := redis.Start(t)
	a := join(t, server, nil).ready(t)
	var said atomic.Int32
	b := New(Options{Servers: a.Servers, Timeout: time.Second, Prefix: "optcache", Infof: func(string, ...any) {}, Flushed: func(Flush, time.Duration) {},
		Warningf: func(format string, args ...any) {
			if strings.Contains(fmt.Sprintf(format, args...), "another shared_prefix") {
				said.Add(1)
			}
		}}, sealerOf(t, secretB), NewCounts())
	b.Start()
	defer b.Close()
	until(t, "the other is there", func() bool { return !b.Away() })
	a.has(t, example, 300)
	if _, _, how := b.Ask(t.Context(), &example, Need{}); how != Miss {
		t.Errorf("an answer with another secret: %s", OutcomeNames[how])
	}
	for range 200 { // each is a reason to look
		a.nudged()
		b.nudged()
		time.Sleep(2 * time.Millisecond)
	}
	_, rest, _ := strings.Cut(server.Do("info", "commandstats"), "cmdstat_publish:calls=")
	if n, _, _ := strings.Cut(rest, ","); len(n) != 1 {
		t.Errorf("the state has been replaced %s times", n)
	}
	if n := said.Load(); n > 1 {
		t.Errorf("it is said %d times", n)
	}
}

// What a server says does not change the log.
func TestFirstWords(t *testing.T) {
	if got := firstWords(errors.New("ERR \x1b[2Jx\ry\nnext")); got != "ERR ?[2Jx?y" {
		t.Errorf("%q", got)
	}
	if got := firstWords(errors.New(strings.Repeat("x", 5000))); len(got) != 200 {
		t.Errorf("%d bytes", len(got))
	}
}

// faults are states of the server in which it is of no use. None may cost more than the timeout, or be logged again and again.
func TestFaults(t *testing.T) {
	const timeout = 20 * time.Millisecond
	ask := func(t *testing.T, r *replica, n int) {
		t.Helper()
		for i := range n {
			begun := time.Now()
			_, _, how := r.get(named(fmt.Sprintf("\x05n%04d\x00", i)))
			if how == Hit {
				t.Errorf("it has an answer")
			}
			if took := time.Since(begun); took > timeout+time.Second { // the machine may be busy
				t.Errorf("question %d waits %v", i, took)
			}
		}
		until(t, "the breaker opens", r.Away) // refused questions are fast: all of them may have come within breakTime
		for range 1000 {
			if _, _, how := r.get(example); how != Skipped {
				t.Fatalf("an open breaker: %s", OutcomeNames[how])
			}
		}
	}
	one := func(t *testing.T, r *replica, want string) {
		t.Helper()
		if n := strings.Count(r.log(), "is not asked"); n != 1 || !strings.Contains(r.log(), want) {
			t.Errorf("the log, without %q once: %s", want, r.log())
		}
	}
	limited := func(o *Options) { o.Timeout = timeout }
	t.Run("stopped", func(t *testing.T) {
		server := redis.Start(t)
		r := join(t, server, limited).ready(t)
		server.Stop()
		ask(t, r, 20)
		until(t, "it is logged", func() bool { return r.log() != "" })
		one(t, r, "")
		server.Run()
		r.ready(t)
		r.has(t, example, 300)
		until(t, "it answers when it is back", func() bool { _, _, how := r.get(example); return how == Hit }) // the machine may be busy
	})
	t.Run("never there", func(t *testing.T) {
		server := redis.Start(t)
		server.Stop()
		r := join(t, server, limited)
		ask(t, r, 5)
		until(t, "it is logged", func() bool { return r.log() != "" })
		one(t, r, "refused")
	})
	t.Run("wrong password", func(t *testing.T) {
		server := redis.Start(t, "--requirepass", "right")
		r := join(t, server, func(o *Options) { o.Timeout, o.Servers.password = timeout, "hush" })
		ask(t, r, 5)
		until(t, "it is logged", func() bool { return r.log() != "" })
		one(t, r, "WRONGPASS")
		if strings.Contains(r.log(), "hush") {
			t.Error("the log shows the password")
		}
	})
	t.Run("read-only", func(t *testing.T) {
		server := redis.Start(t)
		r := join(t, server, func(o *Options) { o.Timeout = time.Second }).ready(t)
		r.has(t, example, 300)
		server.Do("replicaof", "127.0.0.1", "1")
		server.Do("config", "set", "replica-serve-stale-data", "yes")
		for i := range 20 {
			now := time.Now()
			r.Put(named(fmt.Sprintf("\x05r%04d\x00", i)), Answer{Kind: Success, TTL: 300, Message: []byte("m")}, now, now)
		}
		until(t, "writes are refused", func() bool { return r.Written[Unwritten].Load() > 0 })
		if _, _, how := r.get(example); how != Hit || r.Away() {
			t.Errorf("it can be read: %s", OutcomeNames[how])
		}
		if n := strings.Count(r.log(), "takes no answers"); n != 1 {
			t.Errorf("the log: %s", r.log())
		}
	})
	t.Run("out of memory", func(t *testing.T) {
		server := redis.Start(t)
		r := join(t, server, func(o *Options) { o.Timeout = time.Second }).ready(t)
		r.has(t, example, 300)
		server.Do("config", "set", "maxmemory-policy", "noeviction")
		server.Do("config", "set", "maxmemory", "1")
		now := time.Now()
		r.Put(named("\x01o\x00"), Answer{Kind: Success, TTL: 300, Message: []byte("m")}, now, now)
		until(t, "writes are refused", func() bool { return r.Written[Unwritten].Load() > 0 })
		q := named("\x01p\x00")
		if _, _, how := r.Ask(t.Context(), &q, Need{Waits: true}); how != Miss {
			t.Errorf("a question without a lock: %s", OutcomeNames[how])
		}
		if _, _, how := r.get(example); how != Hit || r.Away() {
			t.Errorf("it can be read: %s", OutcomeNames[how])
		}
		if n := strings.Count(r.log(), "takes no answers"); n != 1 {
			t.Errorf("the log: %s", r.log())
		}
	})
	t.Run("flushed", func(t *testing.T) {
		server := redis.Start(t)
		r := join(t, server, func(o *Options) { o.Timeout = time.Second }).ready(t)
		r.has(t, example, 300)
		server.Do("flushall")
		if _, _, how := r.get(example); how != Miss {
			t.Errorf("nothing is there: %s", OutcomeNames[how])
		}
		r.has(t, example, 300)
	})
	t.Run("poisoned", func(t *testing.T) {
		server := redis.Start(t)
		r := join(t, server, func(o *Options) { o.Timeout = time.Second }).ready(t)
		for i := range 50 {
			r.has(t, named(fmt.Sprintf("\x05p%04d\x00", i)), 300)
		}
		server.Do("eval", `local all = redis.call('keys', 'optcache:{*}')
for i, k in ipairs(all) do if redis.call('type', k).ok == 'string' then
  local v = redis.call('get', all[i % #all + 1])
  if i % 3 == 0 or type(v) ~= 'string' then v = 'rubbish' .. i end
  redis.call('set', k, v)
end end return 1`, "0")
		for i := range 50 {
			q := named(fmt.Sprintf("\x05p%04d\x00", i))
			if a, _, how := r.get(q); how == Hit && string(a.Message) != "message of "+string(q.Name) {
				t.Errorf("%q is believed", a.Message)
			}
		}
		if r.Refused[RefusedSealed].Load()+r.Refused[RefusedVersion].Load() == 0 {
			t.Error("nothing is refused")
		}
	})
}
