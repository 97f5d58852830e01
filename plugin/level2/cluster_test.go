package level2

import (
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/optcache/optcache/test/redis"
)

// In a cluster, what is on other nodes stays of use when one of those that write is killed, and all is when its replica has taken
// over. Flushes reach all meanwhile.
func TestCluster(t *testing.T) {
	nodes := redis.Cluster(t)
	var urls []string
	for _, n := range nodes {
		urls = append(urls, "valkey+cluster://"+n.Addr())
	}
	servers, err := ParseServers(urls)
	if err != nil {
		t.Fatal(err)
	}
	change := func(o *Options) { o.Servers, o.Timeout = servers, 500*time.Millisecond }
	a, b := join(t, nodes[0], change).ready(t), join(t, nodes[0], change).ready(t)
	const n = 60
	question := func(i int) Question { return named(fmt.Sprintf("\x05c%04d\x00", i)) }
	for i := range n {
		a.has(t, question(i), 300)
	}
	hits := func(r *replica) (n int) {
		for i := range 60 {
			a, _, how := r.get(question(i))
			if how == Hit && string(a.Message) != "message of "+string(question(i).Name) {
				t.Fatalf("%q for %q", a.Message, question(i).Name)
			}
			if how == Hit {
				n++
			}
		}
		return n
	}
	if got := hits(b); got != n {
		t.Fatalf("%d of %d are there", got, n)
	}
	f, err := a.Begin(Flush{Name: question(0).Name, Kinds: Success})
	if err != nil {
		t.Fatal(err)
	}
	if told, others, err := a.Tell(f); told != others || err != nil {
		t.Errorf("%d of %d were told: %v", told, others, err)
	}
	if _, _, how := b.get(question(0)); how == Hit {
		t.Error("what has been flushed is still there")
	}
	// One that writes, and does not have the group's own keys, is killed.
	slot := nodes[0].Do("cluster", "keyslot", b.groupKey(""))
	for _, node := range nodes {
		if line := node.Do("cluster", "nodes"); strings.Contains(line, "myself,master") && !covers(line, slot) {
			node.Stop()
			break
		}
	}
	until(t, "what is on other nodes is of use", func() bool { return !b.Away() && hits(b) >= n/4 })
	for end := time.Now().Add(time.Minute); ; time.Sleep(100 * time.Millisecond) {
		a.Put(question(0), Answer{Kind: Success, TTL: 300, Message: []byte("message of " + string(question(0).Name))}, time.Now(), time.Now())
		if !b.Away() && hits(b) == n {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("the replica has not taken over: %d of %d are there\n%s\n%s", hits(b), n, a.log(), b.log())
		}
	}
}

// covers reports whether the node that says what it knows of the cluster has a slot itself.
func covers(nodes, slot string) bool {
	var want int
	fmt.Sscan(slot, &want)
	for line := range strings.Lines(nodes) {
		if !strings.Contains(line, "myself") {
			continue
		}
		for _, part := range strings.Fields(line)[8:] {
			var from, to int
			if n, _ := fmt.Sscanf(part, "%d-%d", &from, &to); n == 2 && from <= want && want <= to {
				return true
			}
		}
	}
	return false
}

// Sentinels are asked for the server that writes, and when it is gone for the next one.
func TestSentinel(t *testing.T) {
	first := redis.Start(t, "--repl-diskless-sync-delay", "0")
	second := redis.Start(t, "--replicaof", "127.0.0.1", fmt.Sprint(first.Port))
	until(t, "there is a copy", func() bool { return strings.Contains(second.Do("info", "replication"), "master_link_status:up") })
	sentinel := redis.Sentinel(t, "answers", first)
	until(t, "the sentinel knows the copy", func() bool {
		return strings.Contains(sentinel.Do("sentinel", "replicas", "answers"), fmt.Sprint(second.Port))
	})
	servers, err := ParseServers([]string{"valkey+sentinel://" + sentinel.Addr() + "/answers"})
	if err != nil {
		t.Fatal(err)
	}
	change := func(o *Options) { o.Servers = servers }
	a, b := join(t, first, change).ready(t), join(t, first, change).ready(t)
	a.has(t, example, 300)
	if _, _, how := b.get(example); how != Hit {
		t.Fatalf("an answer: %s", OutcomeNames[how])
	}
	if n := sentinel.Do("client", "list"); strings.Count(n, "name=optcache") < 2 {
		t.Errorf("the sentinel's clients: %s", n)
	}
	first.Stop()
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		a.Put(example, Answer{Kind: Success, TTL: 300, Message: []byte("m")}, time.Now(), time.Now())
		if _, _, how := b.get(example); how == Hit {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("the copy has not taken over\n%s\n%s", a.log(), b.log())
		}
	}
}

// A replica that starts takes over what the others are asked for most often, and what is no answer of the group does no harm.
func TestWarmStart(t *testing.T) {
	server := redis.Start(t)
	a := join(t, server, nil).ready(t)
	var hot []Question
	for i := range 300 {
		q := named(fmt.Sprintf("\x05h%04d\x00", i))
		a.has(t, q, 300)
		hot = append(hot, q)
	}
	a.tellHot(a.conn.Load(), hot)
	server.Do("zadd", "optcache:{group}hot", "9999999999999", "rubbish", "9999999999998", strings.Repeat("x", 22))
	server.Do("set", "optcache:{rubbish}", "rubbish")
	var taken atomic.Int32
	b := join(t, server, func(o *Options) {
		o.Warm = func(a *Answer, age time.Duration) {
			if !strings.HasPrefix(string(a.Message), "message of ") || age < 0 || age > time.Minute {
				t.Errorf("%+v, %v old", a, age)
			}
			taken.Add(1)
		}
	})
	until(t, "the hottest are there", func() bool { return taken.Load() == 300 && b.Warmed.Load() == 300 })
	if b.Refused[RefusedVersion].Load() != 1 {
		t.Error("the rubbish is not refused")
	}
	for range 30 {
		a.tellHot(a.conn.Load(), hot)
	}
	if n := server.Do("zcard", "optcache:{group}hot"); n != "302" {
		t.Errorf("the list has %s keys", n)
	}
	// The list is bounded.
	server.Do("eval", fmt.Sprintf("for i = 1, %d do redis.call('zadd', KEYS[1], i, 'k' .. i) end", mostHot+500), "1", "optcache:{group}hot")
	a.tellHot(a.conn.Load(), hot)
	if n := server.Do("zcard", "optcache:{group}hot"); n != fmt.Sprint(mostHot) {
		t.Errorf("the list has %s keys", n)
	}
}

// An answer whose life is over is of use to those that serve stale answers, for as long as they do.
func TestStaleAnswers(t *testing.T) {
	server := redis.Start(t)
	a := join(t, server, func(o *Options) { o.Stale = time.Hour }).ready(t)
	stored := time.Now().Add(-299 * time.Second)
	a.Put(example, Answer{Kind: Success, TTL: 300, Message: []byte("m")}, stored, stored)
	until(t, "it has expired", func() bool {
		answer, age, how := a.Ask(t.Context(), &example, Need{Stale: true})
		return how == Miss && answer != nil && age >= 300*time.Second
	})
	if answer, _, how := a.get(example); answer != nil || how != Refused {
		t.Errorf("to one that does not: %s", OutcomeNames[how])
	}
}
