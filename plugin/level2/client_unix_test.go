//go:build unix

package level2

import (
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/optcache/optcache/test/redis"
)

// A server that hangs costs a few questions the timeout, and further ones nothing. What it was told before it hung does no harm
// when it goes on.
func TestServerThatHangs(t *testing.T) {
	server := redis.Start(t)
	const timeout = 20 * time.Millisecond
	r := join(t, server, func(o *Options) { o.Timeout = timeout }).ready(t)
	r.has(t, example, 2)
	stored := time.Now()
	server.Pause()
	now := time.Now()
	r.Put(named("\x01a\x00"), Answer{Kind: Success, TTL: 1, Message: []byte("m")}, now, now)
	var waited int
	for range 1000 {
		begun := time.Now()
		_, _, how := r.get(example)
		if how == Hit {
			t.Error("it answers")
		}
		if how != Skipped {
			waited++
		}
		if took := time.Since(begun); took > timeout+time.Second { // the machine may be busy
			t.Errorf("a question waits %v", took)
		}
	}
	if waited == 0 || waited > breakAfter+5 {
		t.Errorf("%d of 1000 questions have waited", waited)
	}
	time.Sleep(time.Until(stored.Add(2500 * time.Millisecond)))
	server.Resume()
	r.ready(t)
	for _, q := range []Question{example, named("\x01a\x00")} {
		if _, _, how := r.get(q); how == Hit {
			t.Errorf("%q lives longer than it may", q.Name)
		}
	}
	if n := strings.Count(r.log(), "is not asked"); n != 1 {
		t.Errorf("the log: %s", r.log())
	}
}

// A client that is closed leaves nothing behind, whatever the server does.
func TestCloseEndsAll(t *testing.T) {
	for name, change := range map[string]func(*redis.Server){
		"well": func(*redis.Server) {}, "stopped": (*redis.Server).Stop, "hangs": (*redis.Server).Pause,
	} {
		t.Run(name, func(t *testing.T) {
			server := redis.Start(t)
			before := runtime.NumGoroutine()
			r := join(t, server, nil).ready(t)
			r.has(t, example, 300)
			change(server)
			for range 10 {
				go r.get(example)
			}
			begun := time.Now()
			r.Close()
			if took := time.Since(begun); took > 10*time.Second { // a silent connection is closed after a second
				t.Errorf("it takes %v", took)
			}
			for end := time.Now().Add(30 * time.Second); runtime.NumGoroutine() > before; time.Sleep(10 * time.Millisecond) {
				if time.Now().After(end) {
					all := make([]byte, 1<<20)
					t.Fatalf("there were %d goroutines, and there are\n%s", before, all[:runtime.Stack(all, true)])
				}
			}
			t.Log(time.Since(begun))
		})
	}
}
