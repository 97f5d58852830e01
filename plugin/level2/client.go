// Package level2 is a second level of the cache that many replicas have in common: a Valkey or Redis server, or several.
//
// A replica asks it before it asks upstream, and waits for a moment only. What comes from upstream is put there, in the
// background. Nothing of what the server says is believed: values are sealed. Without the server, replicas do as they do without
// a second level.
//
// The package knows no messages and no cache. Answers are bytes to it.
package level2

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unicode"

	"github.com/valkey-io/valkey-go"

	"github.com/optcache/optcache/plugin/pkg/histogram"
)

// Options say which second level there is, and what for.
type Options struct {
	Servers      Servers
	Timeout      time.Duration // for how long a miss waits for the second level
	SecretFile   string
	PasswordFile string // "": the URL's password
	Prefix       string // of all keys
	View         string
	ReadOnly     bool
	Resolver     string        // IP:PORT that servers' names are asked of; "": the system's
	TLS          *tls.Config   // of servers with TLS; nil: the system's roots
	Wait         time.Duration // the most that a miss waits for another replica's answer
	Stale        time.Duration // for how long an answer is of use after its life

	// Flushed is called for each flush that another replica has made, so long ago. What was stored before that must be gone when
	// it returns.
	Flushed func(f Flush, ago time.Duration)
	// Hottest returns the questions that are asked for most often here, the first one most, and so many at most. Warm is given the
	// answers that the group asks for most often, with their age, when a replica starts; nil: it needs none.
	Hottest func(most int) []Question
	Warm    func(a *Answer, age time.Duration)
	// Infof and Warningf log.
	Infof, Warningf func(format string, args ...any)
}

const (
	// mostCalls bounds the look-ups under way: those that nobody waits for any more, too.
	mostCalls = 256
	// mostPuts and mostPutBytes bound the answers that wait to be written.
	mostPuts     = 4096
	mostPutBytes = 16 << 20
	mostBatch    = 128
	writers      = 2

	probeLeast, probeMost = 100 * time.Millisecond, 5 * time.Second
	tick                  = time.Second
)

// Outcome is what has become of a question to the second level.
type Outcome uint8

const (
	Hit     Outcome = iota
	Miss            // it has no answer
	Late            // it has not answered in time
	Failed          // it has answered with an error, or is not there
	Refused         // what it has is not believed
	Skipped         // it is not asked: it is known to be away, or too slow, or busy
	Waited          // another replica was waited for, and brought nothing
	Outcomes
)

var OutcomeNames = [Outcomes]string{"hit", "miss", "late", "failed", "refused", "skipped", "waited"}

// What becomes of answers that are put there.
const (
	Written = iota
	Dropped // there was no room to wait, or the second level was away
	Unwritten
	Writes
)

var WriteNames = [Writes]string{"written", "dropped", "failed"}

// Shape is of the time that a look-up takes: seconds of ns, from 61 µs to 1 s.
var Shape = histogram.Shape{Unit: 1e-9, Low: -14, High: 0, Schema: 3, Step: 2}

// Counts are what a client has counted.
type Counts struct {
	Asked   [Outcomes]atomic.Uint64
	Refused [Reasons]atomic.Uint64
	Written [Writes]atomic.Uint64
	Flushes atomic.Uint64 // of other replicas that have been done here
	Warmed  atomic.Uint64 // answers that a warm start has brought
	Time    histogram.Histogram
	Since   time.Time
}

// NewCounts returns counts at zero.
func NewCounts() *Counts { return &Counts{Time: histogram.New(&Shape), Since: time.Now()} }

// Client is one replica's way to the second level. Its methods are safe for concurrent use.
type Client struct {
	Options
	*Counts
	id     string
	sealer atomic.Pointer[Sealer]

	conn    atomic.Pointer[connection] // nil: none yet
	breaker breaker                    // of reads; open until the group is known
	writes  writeBreaker
	clock   groupClock
	latency quantile // of look-ups
	usual   quantile // of upstream
	lookups atomic.Uint32
	calls   chan struct{} // has a token for each look-up under way

	puts     chan put
	putBytes atomic.Int64

	group    group
	replaced atomic.Int64  // when a state that did not open was replaced last, in ns of unix time; 0: never
	nudge    chan struct{} // asks the keeper to look after the group now

	listens atomic.Bool           // news of the group are heard
	deaf    atomic.Pointer[error] // why not

	// Of the keeper.
	met, readAt time.Time // when it has last met the group, and read the secrets
	warmed      bool      // a warm start has begun
	begins      bool      // it waits for news to be heard
	foreign     bool      // it has been said that the state is of another secret

	ctx    context.Context
	cancel context.CancelFunc
	ended  sync.WaitGroup

	said struct {
		sync.Mutex           // guards the rest
		why        string    // that it is away; "": it is not
		well       time.Time // since when it has been well again
	}
}

type connection struct{ valkey.Client }

// New returns a client, which goes on counting in counts. It does nothing before Start.
func New(o Options, sealer *Sealer, counts *Counts) *Client {
	c := &Client{Options: o, Counts: counts, calls: make(chan struct{}, mostCalls), puts: make(chan put, mostPuts), nudge: make(chan struct{}, 1)}
	c.id = newID()
	c.sealer.Store(sealer)
	c.latency.part, c.latency.most, c.usual.part = 0.95, o.Timeout*5/4, 0.9
	c.breaker.trip()
	c.readAt = time.Now()
	c.ctx, c.cancel = context.WithCancel(context.Background())
	return c
}

// Start starts the client, once. It connects in the background. Close ends it.
func (c *Client) Start() {
	c.ended.Go(c.keep)
	c.ended.Go(c.listen)
	if !c.ReadOnly {
		for range writers {
			c.ended.Go(c.write)
		}
	}
}

// Close ends the client. What has not been written is lost. It waits for a second at most for what is under way.
func (c *Client) Close() {
	away := c.Away()
	c.cancel()
	c.breaker.trip()
	done := make(chan struct{})
	go func() {
		c.ended.Wait()
		if conn := c.conn.Swap(nil); conn != nil {
			if !away && !c.ReadOnly { // nobody waits for this replica to do a flush
				ctx, cancel := context.WithTimeout(context.Background(), time.Second)
				conn.Do(ctx, conn.B().Zrem().Key(c.groupKey("members")).Member(c.id).Build())
				cancel()
			}
			conn.Close()
		}
		close(done)
	}()
	select {
	case <-done:
	case <-time.After(time.Second):
	}
}

// Away reports whether clients do not wait for the second level now, because it is away or too slow.
func (c *Client) Away() bool { return c.breaker.open.Load() }

// P95 returns what the recent look-ups took but for one in twenty.
func (c *Client) P95() time.Duration { return c.latency.value() }

// Trouble returns why the second level is away, or "".
func (c *Client) Trouble() string {
	c.said.Lock()
	defer c.said.Unlock()
	if !c.Away() {
		return ""
	}
	return c.said.why
}

// failed counts a call that has failed, or is late.
func (c *Client) failed(err error) {
	if c.ctx.Err() == nil && c.breaker.failed(time.Now()) {
		c.fails(err)
		c.nudged() // to look at once whether that lasts
	}
}

// fails notes a failure of the second level. It is logged once, until the second level has been well for a while.
func (c *Client) fails(err error) {
	if c.ctx.Err() != nil {
		return
	}
	why := firstWords(err)
	c.said.Lock()
	defer c.said.Unlock()
	c.said.well = time.Time{}
	if c.said.why == "" {
		c.Warningf("The second level at %s is not asked: %s; upstream is", c.Servers.String(), why)
	}
	c.said.why = why
}

// wellAfter is for how long the second level must be well until further trouble is logged anew.
const wellAfter = 10 * time.Second

// isWell notes that the second level is well.
func (c *Client) isWell() {
	c.said.Lock()
	defer c.said.Unlock()
	switch {
	case c.said.why == "":
	case c.said.well.IsZero():
		c.said.well = time.Now()
	case time.Since(c.said.well) > wellAfter:
		c.said.why = ""
		c.Infof("The second level at %s is asked again", c.Servers.String())
	}
}

var errLate = errors.New("it takes longer than shared_timeout")

// Need is what a question is asked for.
type Need struct {
	Renews bool          // there is an answer already; only a better one is of use
	Left   time.Duration // how long the answer there still lives
	Waits  bool          // if another replica asks upstream, it is waited for
	Stale  bool          // an answer is of use within Options.Stale after its life

	// Subnets are under which the answer may be, the best first; nil: under the question's. Fits reports whether an answer is for the
	// one who asks, by its Subnet; nil: each is.
	Subnets []string
	Fits    func(subnet string) bool
}

// Ask looks for the answer to a question. It waits for Timeout at most, and if another replica is asking upstream, for as long as
// that usually takes. age is how old the answer is at least, from when it was stored; it is never younger than it is. Without a hit,
// there may be an answer whose life is over, as Need.Stale allows.
func (c *Client) Ask(ctx context.Context, q *Question, need Need) (a *Answer, age time.Duration, how Outcome) {
	a, age, how = c.ask(ctx, q, need)
	c.Asked[how].Add(1)
	return a, age, how
}

func (c *Client) ask(ctx context.Context, q *Question, need Need) (*Answer, time.Duration, Outcome) {
	conn := c.conn.Load()
	epoch, known := c.group.epochNow()
	if conn == nil || !known || c.breaker.open.Load() {
		return nil, 0, Skipped
	}
	l := &lookup{c: c, conn: conn, q: q, sealer: c.sealer.Load(), need: need}
	l.names = l.sealer.names(q, epoch)
	if need.Subnets != nil {
		l.names = nil
		for _, subnet := range need.Subnets {
			of := *q
			of.Subnet = subnet
			l.names = append(l.names, l.sealer.names(&of, epoch)...)
		}
	}
	// Where look-ups have become so slow that this one will be late, nobody waits. Some are made all the same, to learn when
	// that is over.
	if c.latency.value() > c.Timeout {
		if c.lookups.Add(1)%sampled == 0 {
			c.call(ctx, time.Time{}, l.get)
		}
		return nil, 0, Skipped
	}
	deadline := time.Now().Add(c.Timeout)
	v, how := c.call(ctx, deadline, l.get)
	var stale *Answer
	var staleAge time.Duration
	if how == Hit {
		how = Miss
		for _, one := range v.values {
			a, age, err := l.judge(one)
			switch {
			case err == nil:
				return a, age, Hit
			case err == errNotBetter, err == errNotFor:
			case err == errStale:
				if stale == nil {
					stale, staleAge = a, age
				}
			default:
				c.Refuse(err)
				how = Refused
			}
		}
	}
	if how != Miss && how != Refused || !need.Waits || c.ReadOnly || c.writes.paused() {
		return stale, staleAge, how
	}
	// It is cold. One replica asks upstream: that which gets the lock.
	if v, locks := c.call(ctx, deadline, l.lock); locks != Hit || v.ours {
		return stale, staleAge, how
	}
	usual := c.usual.value()
	if usual == 0 {
		usual = unknownUsual
	}
	usual = min(usual, c.Wait)
	until := time.Now().Add(usual)
	for step := max(usual/8, time.Millisecond); time.Now().Before(until); {
		select {
		case <-ctx.Done():
			return stale, staleAge, Waited
		case <-time.After(step):
		}
		v, polled := c.call(ctx, time.Now().Add(c.Timeout), l.poll)
		for _, one := range v.values {
			if a, age, err := l.judge(one); err == nil {
				return a, age, Hit
			}
		}
		if polled != Hit && polled != Miss || !v.locked {
			break
		}
	}
	return stale, staleAge, Waited
}

// sampled is how seldom a look-up is made that nobody waits for.
const sampled = 8

// unknownUsual is for how long another replica is waited for, while it is not known how long upstream takes.
const unknownUsual = 20 * time.Millisecond

var errStale = errors.New("its life is over, and it is of use")

var errNotFor = errors.New("it is for other clients")

var errNotBetter = errors.New("it is no better than the answer that is there")

// judge opens what a look-up has found.
func (l *lookup) judge(v value) (*Answer, time.Duration, error) {
	a, err := l.sealer.openAnswer(v.name, v.bytes)
	if err != nil {
		return nil, 0, err
	}
	if l.need.Fits != nil && !l.need.Fits(a.Subnet) {
		return nil, 0, errNotFor
	}
	if a.DO != l.q.DO || a.CD != l.q.CD {
		return nil, 0, RefusedMalformed
	}
	age, err := l.c.ageOf(a, l.q)
	if err == RefusedExpired && l.need.Stale && age < time.Duration(a.TTL)*time.Second+l.c.Stale {
		return a, age, errStale
	}
	if err == nil && l.need.Renews && time.Duration(a.TTL)*time.Second-age <= l.need.Left+time.Second {
		err = errNotBetter
	}
	if err != nil && l.need.Renews && errors.Is(err, RefusedExpired) {
		err = errNotBetter
	}
	return a, age, err
}

// ageOf returns the age of an answer to a question, or why it is refused.
func (c *Client) ageOf(a *Answer, q *Question) (time.Duration, error) {
	if c.group.flushed(q, a) {
		return 0, RefusedFlushed
	}
	return c.age(a)
}

// age is ageOf for an answer whose question is not known here.
func (c *Client) age(a *Answer) (time.Duration, error) {
	_, upper, ok := c.clock.bounds(time.Now())
	if !ok || a.Stored > upper+futureSlack {
		return 0, RefusedFuture
	}
	age := time.Duration(max(upper-a.Stored, 0)) * time.Millisecond
	if a.expires() <= upper {
		return age, RefusedExpired
	}
	return age, nil
}

// futureSlack is by how many ms an answer may seem to come from the future.
const futureSlack = 1000

// HasFlushed reports whether the group has flushed an answer that was stored at a moment, and has a TTL in seconds.
func (c *Client) HasFlushed(q *Question, kind uint8, stored time.Time, ttl uint32) bool {
	at, _, ok := c.clock.bounds(stored)
	return ok && c.group.flushed(q, &Answer{Kind: kind, Asked: at, Stored: at, TTL: ttl})
}

// Refuse counts an answer that is not believed.
func (c *Client) Refuse(err error) {
	var why Reason
	if errors.As(err, &why) {
		c.Refused[why].Add(1)
	}
}

// Upstream notes how long upstream has taken.
func (c *Client) Upstream(d time.Duration) { c.usual.observe(d) }

// lookup is one look-up of a question.
type lookup struct {
	c      *Client
	conn   *connection
	q      *Question
	sealer *Sealer
	names  []string
	need   Need
}

// found is what a call has found.
type found struct {
	values []value
	locked bool // a replica is asking upstream
	ours   bool // it is this one
}

// value is what stands under a key.
type value struct {
	name  string // of the key
	bytes []byte // sealed
}

// lockTime is for how long a lock stands at least and at most.
const (
	lockLeast = 100 * time.Millisecond
	lockMost  = 2 * time.Second
)

// call makes a call, and waits for it until a deadline; zero: not at all. The call goes on when nobody waits any more, so that its
// time is known. It returns Hit, Miss where the call says that there is nothing, Late, Failed or Skipped.
func (c *Client) call(ctx context.Context, deadline time.Time, f func() (found, bool, error)) (found, Outcome) {
	select {
	case c.calls <- struct{}{}:
	default:
		return found{}, Skipped
	}
	type result struct {
		found
		how Outcome
	}
	done := make(chan result, 1)
	begun := time.Now()
	var late atomic.Bool // it has been counted as late
	go func() {
		defer func() { <-c.calls }()
		v, ok, err := f()
		took := time.Since(begun)
		c.latency.observe(took)
		c.Time.Observe(uint64(took))
		switch {
		case err != nil:
			if !late.Load() {
				c.failed(err)
			}
			done <- result{how: Failed}
			return
		case took > c.Timeout:
		default:
			c.breaker.succeeded()
		}
		if !ok {
			done <- result{v, Miss}
			return
		}
		done <- result{v, Hit}
	}()
	if deadline.IsZero() {
		return found{}, Skipped
	}
	timer := time.NewTimer(time.Until(deadline))
	defer timer.Stop()
	select {
	case r := <-done:
		return r.found, r.how
	case <-timer.C:
		late.Store(true)
		c.failed(errLate)
		return found{}, Late
	case <-ctx.Done():
		return found{}, Late
	}
}

// get looks for the value.
func (l *lookup) get() (v found, ok bool, err error) {
	commands := make([]valkey.Completed, len(l.names), len(l.names)+1)
	for i, name := range l.names {
		commands[i] = l.conn.B().Get().Key(l.c.key(name)).Build()
	}
	v.values, err = l.valuesOf(l.conn.DoMulti(l.c.ctx, commands...))
	return v, v.values != nil, err
}

// poll looks for the value, and whether the lock still stands.
func (l *lookup) poll() (v found, ok bool, err error) {
	results := l.conn.DoMulti(l.c.ctx, l.conn.B().Get().Key(l.c.key(l.names[0])).Build(), l.conn.B().Get().Key(l.c.lockKey(l.names[0])).Build())
	v.values, err = l.valuesOf(results[:1])
	v.locked = results[1].Error() == nil
	return v, v.values != nil, err
}

// valuesOf returns the values of results, which are those of names.
func (l *lookup) valuesOf(results []valkey.ValkeyResult) (all []value, err error) {
	for i := range results {
		b, err := results[i].AsBytes()
		if valkey.IsValkeyNil(err) {
			continue
		}
		if err != nil {
			return nil, err
		}
		all = append(all, value{l.names[i], b})
	}
	return all, nil
}

// lock tries to get the lock. It returns false if there can be none.
func (l *lookup) lock() (v found, ok bool, err error) {
	c := l.c
	stands := min(max(2*c.usual.value(), lockLeast), lockMost)
	err = l.conn.Do(c.ctx, l.conn.B().Set().Key(c.lockKey(l.names[0])).Value(c.id).Nx().PxMilliseconds(stands.Milliseconds()).Build()).Error()
	switch {
	case err == nil:
		return found{locked: true, ours: true}, true, nil
	case valkey.IsValkeyNil(err):
		return found{locked: true}, true, nil
	}
	if _, is := valkey.IsValkeyErr(err); is { // read-only, or out of memory
		c.writes.failed(c, err)
		return v, false, nil
	}
	return v, false, err
}

// key returns the server's key of a name. A cluster places it by the part in braces.
func (c *Client) key(name string) string { return c.Prefix + ":{" + name + "}" }

// lockKey returns the key of the lock for a name. In a cluster it is on the same node.
func (c *Client) lockKey(name string) string { return c.key(name) + "l" }

// put is an answer that waits to be written.
type put struct {
	q             Question
	a             Answer
	asked, stored time.Time
}

// size returns how much of mostPutBytes it takes.
func (p *put) size() int64 { return int64(len(p.a.Message) + len(p.q.Name) + 256) }

// Put has an answer written, some time later. asked and stored are when upstream was asked, and when the answer came; the fields
// of a that say so are not set. a and q must not be changed afterwards. It does not wait.
func (c *Client) Put(q Question, a Answer, asked, stored time.Time) {
	if c.ReadOnly {
		return
	}
	if c.conn.Load() == nil || c.writes.paused() || len(a.Message) > MaxMessage || len(a.Wildcard) > 255 || len(a.Subnet) > 255 {
		c.Written[Dropped].Add(1)
		return
	}
	p := put{q, a, asked, stored}
	if c.putBytes.Add(p.size()) <= mostPutBytes {
		select {
		case c.puts <- p:
			return
		default:
		}
	}
	c.putBytes.Add(-p.size())
	c.Written[Dropped].Add(1)
}

// write writes what waits, in batches, until the client ends.
func (c *Client) write() {
	batch := make([]put, 0, mostBatch)
	for {
		select {
		case <-c.ctx.Done():
			return
		case p := <-c.puts:
			batch = append(batch[:0], p)
		}
	more:
		for len(batch) < mostBatch {
			select {
			case p := <-c.puts:
				batch = append(batch, p)
			default:
				break more
			}
		}
		c.writeBatch(batch)
		for i := range batch {
			c.putBytes.Add(-batch[i].size())
		}
	}
}

func (c *Client) writeBatch(batch []put) {
	conn := c.conn.Load()
	epoch, known := c.group.epochNow()
	if conn == nil || !known || c.writes.paused() {
		c.Written[Dropped].Add(uint64(len(batch)))
		return
	}
	s := c.sealer.Load()
	commands := make([]valkey.Completed, 0, len(batch))
	for i := range batch {
		p := &batch[i]
		asked, _, _ := c.clock.bounds(p.asked)
		stored, _, _ := c.clock.bounds(p.stored)
		_, now, ok := c.clock.bounds(time.Now())
		p.a.Asked, p.a.Stored, p.a.DO, p.a.CD = asked, stored, p.q.DO, p.q.CD
		left := p.a.expires() - now + c.Stale.Milliseconds()
		if !ok || left <= 0 || asked > stored || c.group.flushed(&p.q, &p.a) {
			c.Written[Dropped].Add(1)
			continue
		}
		name := s.names(&p.q, epoch)[0]
		commands = append(commands, conn.B().Set().Key(c.key(name)).Value(valkey.BinaryString(s.seal(name, p.a.append(nil)))).PxMilliseconds(left).Build())
	}
	if len(commands) == 0 {
		return
	}
	for _, r := range conn.DoMulti(c.ctx, commands...) {
		err := r.Error()
		if err == nil {
			c.Written[Written].Add(1)
			c.writes.succeeded()
			continue
		}
		c.Written[Unwritten].Add(1)
		if _, is := valkey.IsValkeyErr(err); is {
			c.writes.failed(c, err)
		} else {
			c.writes.pause()
			c.failed(err)
		}
	}
}

// writeBreaker keeps writes back for a while after the server has refused them: it is read-only, or out of memory.
type writeBreaker struct {
	until  atomic.Int64 // unix time in ns
	streak atomic.Int32
}

const pauseMost = 30 * time.Second

func (b *writeBreaker) paused() bool {
	until := b.until.Load()
	return until != 0 && time.Now().UnixNano() < until
}

func (b *writeBreaker) failed(c *Client, err error) {
	if b.paused() || c.ctx.Err() != nil {
		return
	}
	n := b.streak.Add(1)
	if n == 1 {
		c.Warningf("The second level at %s takes no answers: %v", c.Servers.String(), firstWords(err))
	}
	b.until.Store(time.Now().Add(min(time.Second<<min(n, 5), pauseMost)).UnixNano())
}

// pause keeps writes back for a moment, without a word: the server cannot be reached.
func (b *writeBreaker) pause() { b.until.Store(time.Now().Add(probeLeast).UnixNano()) }

func (b *writeBreaker) succeeded() {
	if b.streak.Load() != 0 {
		b.streak.Store(0)
		b.until.Store(0)
	}
}

// firstWords shortens an error, and leaves out what a server may have put into it that is no text.
func firstWords(err error) string {
	text, _, _ := strings.Cut(err.Error(), "\n")
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return '?'
		}
		return r
	}, fmt.Sprintf("%.200s", text))
}
