package level2

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash/fnv"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/valkey-io/valkey-go"

	"github.com/optcache/optcache/plugin/pkg/wire"
)

// This file is what the replicas of a group know in common: the epoch, which is part of every key, and what has been flushed.
// One value on the server has both. It is sealed. If it is lost, so is the epoch, and with it all that is on the server.

// Flush says what has been flushed.
type Flush struct {
	ID      string `json:"id"`
	At      int64  `json:"at"`             // in ms on the group's clock: what was asked then or before is gone
	Name    []byte `json:"name,omitempty"` // the qname, in wire format and lower case; nil: any
	Subtree bool   `json:"subtree,omitempty"`
	Type    uint16 `json:"type,omitempty"` // 0: any
	Kinds   uint8  `json:"kinds"`          // of the caller's choice; Success and Denial are looked at here
	Expired bool   `json:"expired,omitempty"`
}

// covers reports whether the flush stands for another one, too.
func (f *Flush) covers(other *Flush) bool {
	return f.ID == other.ID || f.Kinds == allKinds && f.Name == nil && f.Type == 0 && other.At <= f.At
}

// has reports whether the flush removes an answer.
func (f *Flush) has(q *Question, a *Answer) bool {
	switch {
	case a.Asked > f.At || a.Kind&f.Kinds == 0 || f.Type != 0 && f.Type != q.Type || f.Expired && a.expires() > f.At:
		return false
	case f.Name == nil:
		return true
	case f.Subtree:
		return wire.InZone(q.Name, f.Name)
	}
	return string(q.Name) == string(f.Name)
}

// state is what stands on the server.
type state struct {
	Epoch   uint64  `json:"epoch"`
	Flushes []Flush `json:"flushes"` // the oldest first
}

const (
	// mostFlushes bounds the flushes that are remembered one by one. Older ones become one of everything.
	mostFlushes = 256
	allKinds    = 0xff // of the flush that they become
	// flushLife is for how long a flush is remembered. No answer lives longer: its life and the stale window.
	flushLife   = 14 * 24 * time.Hour
	mostState   = 1 << 20
	memberLife  = 5 * time.Second // for how long a replica that says nothing counts as living
	tellWait    = 2 * time.Second // for how long a flush waits for other replicas
	flushedLife = time.Minute     // of the list of replicas that have done a flush
)

// group is the group as this replica knows it.
type group struct {
	due     atomic.Bool  // there may be news
	mu      sync.RWMutex // guards the rest
	known   bool
	state   state     // its flushes have been done here
	spoilt  *uint64   // an epoch whose answers may be of the future
	unheard []unheard // flushes from before the group's clock was known
}

// unheard is a flush that was made here at a moment.
type unheard struct {
	Flush
	at time.Time
}

func (g *group) epochNow() (uint64, bool) {
	g.mu.RLock()
	defer g.mu.RUnlock()
	return g.state.Epoch, g.known
}

// flushed reports whether an answer has been flushed.
func (g *group) flushed(q *Question, a *Answer) bool {
	g.mu.RLock()
	defer g.mu.RUnlock()
	return slices.ContainsFunc(g.state.Flushes, func(f Flush) bool { return f.has(q, a) })
}

// merge takes in what stands on the server; nil: nothing. It returns the flushes that are new here, and whether the server's state
// must be replaced by what is known now. now is in ms on the group's clock.
func (g *group) merge(there *state, now int64) (news []Flush, differs bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	switch {
	case there != nil:
		spoilt := g.spoilt != nil && there.Epoch == *g.spoilt
		if g.known = true; !spoilt {
			g.state.Epoch = there.Epoch
		}
		for _, f := range there.Flushes {
			if now-f.At > flushLife.Milliseconds() || slices.ContainsFunc(g.state.Flushes, func(own Flush) bool { return own.covers(&f) }) {
				continue
			}
			g.state.Flushes = append(g.state.Flushes, f)
			news = append(news, f)
		}
		differs = spoilt || slices.ContainsFunc(g.state.Flushes, func(f Flush) bool {
			return !slices.ContainsFunc(there.Flushes, func(t Flush) bool { return t.ID == f.ID })
		})
	default:
		differs = true // it has been lost: it gets back what is known here
	}
	g.trim(now)
	return news, differs
}

func newEpoch() uint64 {
	var b [8]byte
	rand.Read(b[:])
	return binary.BigEndian.Uint64(b[:])
}

func newID() string {
	var b [8]byte
	rand.Read(b[:])
	return hex.EncodeToString(b[:])
}

// trim bounds what is remembered. The caller holds the lock.
func (g *group) trim(now int64) {
	list := g.state.Flushes
	slices.SortStableFunc(list, func(a, b Flush) int { return cmp.Compare(a.At, b.At) })
	for len(list) > 0 && now-list[0].At > flushLife.Milliseconds() {
		list = list[1:]
	}
	for i := len(list) - 1; i > 0; i-- {
		if list[i].Kinds == allKinds { // it covers those before it
			list = list[i:]
			break
		}
	}
	if extra := len(list) - mostFlushes; extra > 0 {
		// The replicas agree on the flush that stands for the older ones: its name is made of the last of them.
		all := Flush{ID: "until " + list[extra].ID, At: list[extra].At, Kinds: allKinds}
		list = slices.Insert(slices.Clone(list[extra+1:]), 0, all)
	}
	g.state.Flushes = list
}

// add notes a flush that is made here.
func (g *group) add(f Flush, now int64) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.state.Flushes = append(g.state.Flushes, f)
	g.trim(now)
}

// spoil gives up the epoch: another one begins, and the group is told at the next meeting.
func (g *group) spoil() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.known {
		was := g.state.Epoch
		g.spoilt, g.state.Epoch = &was, newEpoch()
	}
}

// hear gives the flushes that were made before the group's clock was known their times on it.
func (c *Client) hear() {
	g := &c.group
	g.mu.Lock()
	defer g.mu.Unlock()
	_, now, ok := c.clock.bounds(time.Now())
	if !ok {
		return
	}
	for _, u := range g.unheard {
		_, u.At, _ = c.clock.bounds(u.at)
		g.state.Flushes = append(g.state.Flushes, u.Flush)
	}
	g.unheard = nil
	g.trim(now)
}

// keep notes a flush that is made here while the group's clock is not known. Of too many, the last one is of everything.
func (g *group) keep(f Flush) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if len(g.unheard) >= mostFlushes {
		f = Flush{ID: f.ID, Kinds: allKinds}
		g.unheard = nil
	}
	g.unheard = append(g.unheard, unheard{f, time.Now()})
}

func (g *group) text() []byte {
	g.mu.RLock()
	defer g.mu.RUnlock()
	return g.state.text()
}

func (s *state) text() []byte {
	b, err := json.Marshal(s)
	if err != nil {
		panic(err)
	}
	return b
}

// groupKey returns a key that the group has in common. One node of a cluster has them all, so that its clock is the group's.
func (c *Client) groupKey(what string) string {
	if c.View == "" {
		return c.Prefix + ":{group}" + what
	}
	h := fnv.New64a()
	h.Write([]byte(c.View))
	return c.Prefix + ":{group" + strconv.FormatUint(h.Sum64(), 36) + "}" + what
}

// do makes a call in the background that nobody waits for.
func (c *Client) do(conn *connection, cmd valkey.Completed) valkey.ValkeyResult {
	ctx, cancel := context.WithTimeout(c.ctx, 2*callTimeout)
	defer cancel()
	return conn.Do(ctx, cmd)
}

// keep connects, and then looks after the group, until the client ends.
func (c *Client) keep() {
	pause := probeLeast
	for c.ctx.Err() == nil {
		err := c.lookAfter()
		failed := err != nil
		if c.begins = errors.Is(err, errDeaf); err != nil {
			if c.breaker.trip(); !c.begins {
				c.fails(err)
			}
		} else if c.Away() {
			c.breaker.close()
			if !c.listens.Load() { // news have ended meanwhile
				c.breaker.trip()
			}
			c.latency.bits.Store(0)
		}
		next := tick
		if c.Away() {
			next = pause
			pause = min(2*pause, probeMost)
		} else {
			pause = probeLeast
			c.isWell()
		}
		nudge := c.nudge
		if c.Away() && !c.begins && failed {
			nudge = nil // news wait until it is back
		}
		select {
		case <-c.ctx.Done():
		case <-nudge:
			c.group.due.Store(true)
			time.Sleep(nudgeGap) // many are as one
		case <-time.After(next):
		}
	}
}

const (
	nudgeGap  = time.Millisecond
	listenGap = 20 * time.Millisecond // between two tries to listen
	meetGap   = 5 * time.Second       // between two looks at the group's state without news
	readGap   = 30 * time.Second      // between two looks at the file of secrets
)

// lookAfter does what must be done from time to time. It returns an error if the second level should not be asked.
func (c *Client) lookAfter() error {
	if c.SecretFile != "" && time.Since(c.readAt) >= readGap {
		c.readAt = time.Now()
		if s, err := ReadSealer(c.SecretFile, c.Prefix, c.View); err != nil {
			c.Warningf("The secret of the second level is the one of before: %v", err)
		} else {
			c.sealer.Store(s)
		}
	}
	conn := c.conn.Load()
	if conn == nil {
		client, err := valkey.NewClient(c.clientOption())
		if err != nil {
			if client != nil {
				client.Close()
			}
			return err
		}
		conn = &connection{client}
		c.conn.Store(conn)
	}
	if !c.listens.Load() {
		if err := c.deaf.Swap(nil); err != nil {
			return *err
		}
		return errDeaf
	}
	// The time tells how the second level does, too. It is read twice where a slow answer may have been bad luck.
	took, err := c.readClock(conn)
	if err == nil && took > c.Timeout {
		took, err = c.readClock(conn)
	}
	if err != nil {
		return err
	}
	if c.latency.value() > c.Timeout { // a replica that is seldom asked would not learn otherwise that this is over
		c.latency.observe(took)
	}
	if c.group.due.Swap(false) || c.Away() || time.Since(c.met) >= meetGap {
		if err := c.meet(conn); err != nil {
			return err
		}
		c.met = time.Now()
	}
	if took > c.Timeout {
		return errLate
	}
	if !c.ReadOnly && !c.writes.paused() {
		c.appear(conn)
	}
	if !c.warmed {
		c.warmed = true
		c.ended.Go(func() { c.warm(conn) })
	}
	return nil
}

// errDeaf says that the group's news cannot be heard yet. What it has flushed would not be known.
var errDeaf = errors.New("it has not been subscribed to yet")

// readClock reads the group's clock.
func (c *Client) readClock(conn *connection) (took time.Duration, err error) {
	cmd := conn.B().Time().Build()
	if conn.Mode() == valkey.ClientModeCluster {
		cmd = conn.B().Eval().Script("return redis.call('TIME')").Numkeys(1).Key(c.groupKey("")).Build()
	}
	asked := time.Now()
	parts, err := c.do(conn, cmd).AsStrSlice()
	answered := time.Now()
	if err != nil {
		return 0, err
	}
	now, err := timeOf(parts)
	if err != nil {
		return 0, err
	}
	if back := c.clock.set(asked, answered, now); back > 0 {
		c.Warningf("The clock of the second level at %s has been set back by %d ms: what it has is not used any more", c.Servers.String(), back)
		c.group.spoil()
		c.group.due.Store(true)
	}
	return answered.Sub(asked), nil
}

// timeOf reads an answer to TIME, seconds and microseconds, in ms. As a time.Duration, no time that it returns is too large.
func timeOf(parts []string) (ms int64, err error) {
	bad := errors.New("its answer to TIME cannot be read")
	if len(parts) != 2 {
		return 0, bad
	}
	s, err1 := strconv.ParseInt(parts[0], 10, 64)
	us, err2 := strconv.ParseInt(parts[1], 10, 64)
	if err1 != nil || err2 != nil || s < 0 || s > 1<<33 || us < 0 || us >= 1e6 {
		return 0, bad
	}
	return s*1000 + us/1000, nil
}

// meet reads the group's state, does what has been flushed, and puts back what is missing there.
func (c *Client) meet(conn *connection) error {
	var err error
	for again, tries := true, 0; again && err == nil && tries < 5; tries++ {
		again, err = c.agree(conn)
	}
	if _, known := c.group.epochNow(); known && err != nil {
		if errors.Is(err, errForeign) { // what is known here holds
			if !c.foreign {
				c.foreign = true
				c.Warningf("The second level at %s: %v", c.Servers.String(), err)
			}
			return nil
		}
		if _, is := valkey.IsValkeyErr(err); is { // it takes no writes
			c.writes.failed(c, err)
			return nil
		}
	}
	return err
}

// agree is one step of meet. differs says that another is needed, because this one has changed the state or has been too slow.
func (c *Client) agree(conn *connection) (differs bool, err error) {
	raw, err := c.do(conn, conn.B().Get().Key(c.groupKey("")).Build()).AsBytes()
	var there *state
	switch {
	case valkey.IsValkeyNil(err):
	case err != nil:
		return false, err
	default:
		if there = c.openState(raw); there == nil && !c.mayReplace() {
			return false, errForeign
		}
	}
	c.hear()
	_, now, _ := c.clock.bounds(time.Now())
	if _, known := c.group.epochNow(); !known && there == nil {
		// Nothing is known here, so that nothing is lost if another replica is faster.
		if c.ReadOnly {
			return false, errors.New("no replica that writes has been there yet")
		}
		return true, c.replace(conn, raw, (&state{Epoch: newEpoch()}).text())
	}
	news, differs := c.group.merge(there, now)
	for _, f := range news {
		c.Flushed(f, time.Duration(max(now-f.At, 0))*time.Millisecond)
		c.Flushes.Add(1)
		if !c.ReadOnly && now-f.At < flushedLife.Milliseconds() { // somebody may wait for that
			key := c.groupKey("done:" + f.ID)
			c.do(conn, conn.B().Sadd().Key(key).Member(c.id).Build())
			c.do(conn, conn.B().Pexpire().Key(key).Milliseconds(flushedLife.Milliseconds()).Build())
		}
	}
	if !differs || c.ReadOnly {
		return false, nil
	}
	return true, c.replace(conn, raw, c.group.text())
}

// errForeign says that what stands in the place of the group's state is none, again and again.
var errForeign = errors.New("what it has of the group is sealed with another secret: a group with another secret needs another shared_prefix")

// mayReplace reports whether a state that does not open may be replaced: not so often that replicas with different secrets, which
// replace each other's, keep each other busy.
func (c *Client) mayReplace() bool {
	now, last := time.Now().UnixNano(), c.replaced.Load()
	return (last == 0 || now-last >= int64(meetGap)) && c.replaced.CompareAndSwap(last, now)
}

// openState opens what stands on the server; nil: it is none of the group's.
func (c *Client) openState(raw []byte) *state {
	if len(raw) > mostState {
		c.Refuse(RefusedMalformed)
		return nil
	}
	text, err := c.sealer.Load().open("group", raw)
	if err != nil {
		c.Refuse(err)
		return nil
	}
	to := new(state)
	if json.Unmarshal(text, to) != nil {
		c.Refuse(RefusedMalformed)
		return nil
	}
	return to
}

// compareAndSet sets a key if it has a value, or has none and the value is empty.
var compareAndSet = valkey.NewLuaScript(`local v = redis.call('GET', KEYS[1])
if (v or '') == ARGV[1] then redis.call('SET', KEYS[1], ARGV[2]) return 1 end
return 0`)

// replace puts a state in the place of what stands there: was. If another replica has been faster, it does nothing: the next
// meeting merges both.
func (c *Client) replace(conn *connection, was, text []byte) error {
	ctx, cancel := context.WithTimeout(c.ctx, 2*callTimeout)
	defer cancel()
	value := c.sealer.Load().seal("group", text)
	set, err := compareAndSet.Exec(ctx, conn, []string{c.groupKey("")}, []string{string(was), string(value)}).AsInt64()
	if err != nil {
		return err
	}
	c.nudged()
	if set == 0 {
		return nil
	}
	return c.do(conn, conn.B().Publish().Channel(c.groupKey("news")).Message(c.id).Build()).Error()
}

func (c *Client) nudged() {
	select {
	case c.nudge <- struct{}{}:
	default:
	}
}

// appear tells the group that this replica lives.
func (c *Client) appear(conn *connection) {
	_, now, _ := c.clock.bounds(time.Now())
	key := c.groupKey("members")
	c.do(conn, conn.B().Zadd().Key(key).ScoreMember().ScoreMember(float64(now), c.id).Build())
	c.do(conn, conn.B().Zremrangebyscore().Key(key).Min("-inf").Max(strconv.FormatInt(now-4*memberLife.Milliseconds(), 10)).Build())
}

// listen waits for news of the group until the client ends. The messages say nothing: each is a reason to look.
func (c *Client) listen() {
	for c.ctx.Err() == nil {
		if conn := c.conn.Load(); conn != nil {
			ctx := valkey.WithOnSubscriptionHook(c.ctx, func(s valkey.PubSubSubscription) {
				c.listens.Store(s.Kind == "subscribe")
				c.nudged()
			})
			err := conn.Receive(ctx, conn.B().Subscribe().Channel(c.groupKey("news")).Build(), func(m valkey.PubSubMessage) {
				if m.Message != c.id {
					c.nudged()
				}
			})
			if c.listens.Swap(false); err != nil && c.ctx.Err() == nil {
				c.deaf.Store(&err)
			}
			c.breaker.trip() // something may be missed from now on
		}
		select {
		case <-c.ctx.Done():
		case <-time.After(listenGap):
		}
	}
}

// Begin notes a flush that is about to be made here: from now on, nothing that was asked before comes from the second level. Tell
// must follow when it has been made.
func (c *Client) Begin(f Flush) (Flush, error) {
	f.ID = newID()
	_, now, ok := c.clock.bounds(time.Now())
	if !ok {
		c.group.keep(f)
		return f, errors.New("the second level has not been reached yet")
	}
	f.At = now
	c.group.add(f, now)
	return f, nil
}

// Tell tells the group of a flush, and waits until the other living replicas have done it, or until it has waited for long enough.
// told of others have. If err says that the server cannot be reached, the group is told when it can.
func (c *Client) Tell(f Flush) (told, others int, err error) {
	conn := c.conn.Load()
	if conn == nil || c.ReadOnly {
		return 0, 0, errors.New("this replica does not write to the second level")
	}
	deadline := time.Now().Add(tellWait)
	for {
		differs, err := c.agree(conn)
		if err != nil {
			return 0, 0, err
		}
		if !differs {
			break
		}
		if time.Now().After(deadline) {
			return 0, 0, errors.New("others change the group's state all the time")
		}
	}
	c.remove(conn, &f)
	for pause := time.Millisecond; ; pause = min(2*pause, 20*time.Millisecond) {
		if told, others, err = c.told(conn, f.ID); err != nil || told >= others || time.Now().After(deadline) {
			return told, others, err
		}
		select {
		case <-c.ctx.Done():
			return told, others, c.ctx.Err()
		case <-time.After(pause):
		}
	}
}

// told returns how many of the other living replicas have done a flush.
func (c *Client) told(conn *connection, id string) (told, others int, err error) {
	_, now, _ := c.clock.bounds(time.Now())
	living, err := c.do(conn, conn.B().Zrangebyscore().Key(c.groupKey("members")).Min(strconv.FormatInt(now-memberLife.Milliseconds(), 10)).Max("+inf").Build()).AsStrSlice()
	if err != nil {
		return 0, 0, err
	}
	done, err := c.do(conn, conn.B().Smembers().Key(c.groupKey("done:"+id)).Build()).AsStrSlice()
	if err != nil {
		return 0, 0, err
	}
	for _, m := range living {
		if m == c.id {
			continue
		}
		if others++; slices.Contains(done, m) {
			told++
		}
	}
	return told, others, nil
}

// remove removes what a flush of one name and type has flushed: its keys are known. What other flushes have flushed stays until
// it expires, and is not believed.
func (c *Client) remove(conn *connection, f *Flush) {
	const classIN = 1
	epoch, known := c.group.epochNow()
	if !known || f.Name == nil || f.Subtree || f.Type == 0 || f.Expired || f.Kinds&(Success|Denial) != Success|Denial {
		return
	}
	s := c.sealer.Load()
	for bits := range 4 {
		q := Question{Name: f.Name, Type: f.Type, Class: classIN, DO: bits&1 != 0, CD: bits&2 != 0}
		for _, name := range s.names(&q, epoch) {
			c.do(conn, conn.B().Del().Key(c.key(name)).Build())
		}
	}
}

// String describes the client for operators.
func (c *Client) String() string { return fmt.Sprintf("%s, group %q", c.Servers.String(), c.Prefix) }
