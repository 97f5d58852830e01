package level2

import (
	"strconv"
	"time"

	"github.com/valkey-io/valkey-go"
)

// This file has the group's hottest answers: each replica says from time to time which ones are asked for most often there, and
// one that starts takes them over.

const (
	mostHot     = 10_000 // keys that the group remembers
	mostOwnHot  = 2_000  // that one replica tells
	hotFirst    = 5 * time.Second
	hotGap      = 30 * time.Second // between two tellings
	hotLife     = 24 * time.Hour   // of the list, if nobody tells any more
	warmBatch   = 128              // answers asked for at once
	warmPause   = 2 * time.Millisecond
	hotAdvance  = 60_000 // ms by which the hottest key of a replica seems to have been told later than the coldest
	mostHotName = 64     // bytes
)

// warm takes the group's hottest answers over, if the replica wants them, and then tells its own again and again. It ends with the
// client.
func (c *Client) warm(conn *connection) {
	if c.Warm != nil {
		c.takeHot(conn)
	}
	for pause := hotFirst; c.Hottest != nil && !c.ReadOnly; pause = hotGap {
		select {
		case <-c.ctx.Done():
			return
		case <-time.After(pause):
		}
		if !c.Away() && !c.writes.paused() {
			c.tellHot(conn, c.Hottest(mostOwnHot))
		}
	}
}

// tellHot tells the group which questions are asked for most often here. The score of a key is when it was told, and a little more
// for those that are hotter. So what nobody tells any more makes room.
func (c *Client) tellHot(conn *connection, questions []Question) {
	epoch, known := c.group.epochNow()
	_, now, ok := c.clock.bounds(time.Now())
	if !known || !ok || len(questions) == 0 {
		return
	}
	s, key := c.sealer.Load(), c.groupKey("hot")
	add := conn.B().Zadd().Key(key).Gt().ScoreMember()
	for i := range questions {
		score := now + int64(hotAdvance*(len(questions)-i)/len(questions))
		add = add.ScoreMember(float64(score), s.names(&questions[i], epoch)[0])
	}
	if err := c.do(conn, add.Build()).Error(); err != nil {
		if _, is := valkey.IsValkeyErr(err); is {
			c.writes.failed(c, err)
		}
		return
	}
	c.do(conn, conn.B().Zremrangebyrank().Key(key).Start(0).Stop(-mostHot-1).Build())
	c.do(conn, conn.B().Pexpire().Key(key).Milliseconds(hotLife.Milliseconds()).Build())
}

// takeHot takes the group's hottest answers over, the hottest first.
func (c *Client) takeHot(conn *connection) {
	names, err := c.do(conn, conn.B().Zrange().Key(c.groupKey("hot")).Min("0").Max(strconv.Itoa(mostHot-1)).Rev().Build()).AsStrSlice()
	if err != nil || len(names) == 0 {
		return
	}
	begun, before := time.Now(), c.Warmed.Load()
	for len(names) > 0 && c.ctx.Err() == nil && !c.Away() {
		n := min(len(names), warmBatch)
		c.takeBatch(conn, names[:n])
		names = names[n:]
		time.Sleep(warmPause)
	}
	c.Infof("Has taken over %d answers that the group asks for most often, in %v", c.Warmed.Load()-before, time.Since(begun).Round(time.Millisecond))
}

func (c *Client) takeBatch(conn *connection, names []string) {
	commands := make([]valkey.Completed, 0, len(names))
	for _, name := range names {
		if len(name) > mostHotName {
			return // it is none of the group's
		}
		commands = append(commands, conn.B().Get().Key(c.key(name)).Build())
	}
	s := c.sealer.Load()
	for i, r := range conn.DoMulti(c.ctx, commands...) {
		value, err := r.AsBytes()
		if err != nil {
			continue
		}
		a, err := s.openAnswer(names[i], value)
		if err != nil {
			c.Refuse(err)
			continue
		}
		if age, err := c.age(a); err == nil {
			c.Warm(a, age+time.Duration(a.Stored-a.Asked)*time.Millisecond) // as if it had come when it was asked for: a flush may be between
			c.Warmed.Add(1)
		}
	}
}
