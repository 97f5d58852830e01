package systemd

import (
	"context"
	"net"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/miekg/dns"
)

// watched is a watchdog of 60 seconds over servers that tests control, by a fake clock.
type watched struct {
	pings atomic.Int32
	stop  func() // returns when it has ended
}

func newWatched(t *testing.T, servers []string, alive func(server string) bool) *watched {
	w := new(watched)
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan struct{})
	w.stop = func() {
		stop()
		<-done
	}
	go func() {
		defer close(done)
		watch(ctx, time.Minute, servers, func(_ context.Context, server string) bool {
			if alive(server) {
				return true
			}
			time.Sleep(patience)
			return false
		}, func() { w.pings.Add(1) })
	}()
	return w
}

// during returns how many pings come while a time passes.
func (w *watched) during(d time.Duration) int {
	synctest.Wait()
	before := w.pings.Load()
	time.Sleep(d)
	synctest.Wait()
	return int(w.pings.Load() - before)
}

// Pings come in time while the server answers, none while it does not, and then again.
func TestPingsStopWhileTheServerIsSilent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var alive atomic.Bool
		alive.Store(true)
		w := newWatched(t, []string{"one", "two"}, func(server string) bool { return alive.Load() || server == "two" })
		defer w.stop()
		if n := w.during(10 * time.Minute); n < 20 {
			t.Errorf("%d pings in ten minutes", n)
		}
		alive.Store(false)
		w.during(time.Minute) // one may be under way
		if n := w.during(10 * time.Minute); n != 0 {
			t.Errorf("%d pings of a silent server", n)
		}
		alive.Store(true)
		if n := w.during(time.Minute); n < 3 {
			t.Errorf("%d pings of a server that answers again", n)
		}
	})
}

// A server that loses nearly all messages, as one that is flooded does, is alive.
func TestFloodedServersAreAlive(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		asked := 0
		w := newWatched(t, []string{"one"}, func(string) bool { asked++; return asked%50 == 1 })
		defer w.stop()
		for range 10 {
			if n := w.during(time.Minute); n < 2 {
				t.Fatalf("%d pings in a minute", n)
			}
		}
	})
}

// What never answers is no server of plain DNS. Without one, there are pings all the same.
func TestOthersDoNotCount(t *testing.T) {
	for _, servers := range [][]string{nil, {"quic"}, {"quic", "dns"}} {
		synctest.Test(t, func(t *testing.T) {
			w := newWatched(t, servers, func(server string) bool { return server == "dns" })
			if n := w.during(time.Minute); n < 3 {
				t.Errorf("%q: %d pings in a minute", servers, n)
			}
			w.stop()
			if n := w.during(time.Hour); n != 0 {
				t.Errorf("%q: %d pings after the end", servers, n)
			}
		})
	}
}

// The message is one that a DNS server refuses by itself.
func TestServersAnswerIt(t *testing.T) {
	t.Parallel()
	conn, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var handled atomic.Int32
	started := make(chan struct{})
	server := &dns.Server{PacketConn: conn, Handler: dns.HandlerFunc(func(dns.ResponseWriter, *dns.Msg) { handled.Add(1) }), NotifyStartedFunc: func() { close(started) }}
	go server.ActivateAndServe()
	<-started
	for tries := 1; !answers(t.Context(), conn.LocalAddr().String()); tries++ { // a busy machine may take longer
		if tries == 100 {
			t.Fatal("no answer")
		}
	}
	server.Shutdown()
	if n := handled.Load(); n != 0 {
		t.Errorf("the handler was asked %d times", n)
	}
}

// Neither a closed port nor a socket that nobody reads is an answer, nor is the answer to another message. That takes its time, so
// that nothing asks in a busy loop.
func TestSilenceIsNoAnswer(t *testing.T) {
	t.Parallel()
	listen := func() net.PacketConn {
		conn, err := net.ListenPacket("udp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		return conn
	}
	deaf, liar := listen(), listen()
	go func() {
		for buf := make([]byte, 512); ; {
			n, from, err := liar.ReadFrom(buf)
			if err != nil {
				return
			}
			liar.WriteTo(buf[:n], from) // no response
			buf[2] |= qr
			liar.WriteTo(buf[:2], from)
			buf[0]++
			liar.WriteTo(buf[:n], from) // to something else
		}
	}()
	for name, server := range map[string]string{"closed": "127.0.0.1:1", "deaf": deaf.LocalAddr().String(), "liar": liar.LocalAddr().String(), "no address": "nonsense"} {
		begun := time.Now()
		if answers(t.Context(), server) {
			t.Errorf("%s: an answer", name)
		}
		if d := time.Since(begun); d < patience {
			t.Errorf("%s: %v", name, d)
		}
	}
}
