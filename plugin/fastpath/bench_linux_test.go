package fastpath

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/coredns/coredns/core/dnsserver"
	"github.com/coredns/coredns/plugin"
	"github.com/coredns/coredns/plugin/pkg/transport"

	"github.com/miekg/dns"
	"golang.org/x/sys/unix"
)

// BenchmarkStreams compares what a query costs in a loop and with a goroutine for each connection. The server is a process of its
// own on CPU 0, which sends each query back, and the client is on the others. Each of the connections has a number of queries
// under way, of which some per cent go the slow path. The figures are the CPU time of the server for each query: user and system, as
// the kernel accounts it. The two forms take turns.
func BenchmarkStreams(b *testing.B) {
	for _, size := range []struct{ connections, deep, missed int }{
		{1, 1, 0}, {1, 10, 0}, {10, 10, 0}, {100, 1, 0}, {200, 1, 0}, {200, 10, 0}, {10000, 1, 0}, {10, 10, 5}, {200, 1, 5}, {200, 1, 50},
	} {
		b.Run(fmt.Sprintf("%dx%d,missed=%d%%", size.connections, size.deep, size.missed), func(b *testing.B) {
			var cpu [2][]float64
			for range b.N {
				for i, form := range []string{"loop", "goroutine"} {
					cpu[i] = append(cpu[i], costOf(b, form, size.connections, size.deep, size.missed))
				}
			}
			ratios := make([]float64, b.N)
			for i := range ratios {
				ratios[i] = cpu[0][i] / cpu[1][i]
			}
			b.ReportMetric(0, "ns/op")
			b.ReportMetric(middle(cpu[0]), "loop-µs")
			b.ReportMetric(middle(cpu[1]), "goroutine-µs")
			b.ReportMetric(middle(ratios), "ratio")
		})
	}
}

func middle(of []float64) float64 {
	of = slices.Sorted(slices.Values(of))
	return of[len(of)/2]
}

// formVar has the form of the connections in a process that TestMain makes a server for BenchmarkStreams.
const formVar = "OPTCACHE_STREAMS_FORM"

// echoes sends queries back. It implements Service, Answerer, and plugin.Handler.
type echoes struct{ of **dnsserver.Server }

func (echoes) NewAnswerer() Answerer { return echoes{} }
func (echoes) Workers() int          { return 1 }
func (echoes) Generation() int       { return 0 }
func (echoes) Over() bool            { return false }
func (echoes) Asked() bool           { return true }
func (echoes) Sent()                 {}
func (echoes) Name() string          { return "chain" }
func (echoes) Answer(b Batch) {
	for i := range b.Len() {
		if p := b.Packet(i); len(p) > headerLen+1 && p[headerLen+1] == 'm' { // as in miss
			b.Pass(i, Miss)
		} else {
			b.Reply(i, p)
		}
	}
}
func (e echoes) ServeDNS(ctx context.Context, w dns.ResponseWriter, r *dns.Msg) (int, error) {
	if BySlowPath(ctx) {
		return 0, w.WriteMsg(r)
	}
	done, err := Take(*e.of, w, 0, func() (Service, error) { return echoes{}, nil })
	if err != nil || done == nil {
		panic(fmt.Sprint("the connection is not taken: ", err))
	}
	defer done()
	return 0, w.WriteMsg(r)
}

// serveForm serves until the process is killed. It prints its address.
func serveForm(form string) {
	streamsPerClient = streamsMax // all are of one client
	if tick = time.Second; form == "goroutine" {
		loopsMost = 0
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		panic(err)
	}
	var of *dnsserver.Server
	cfg := &dnsserver.Config{Zone: ".", Transport: transport.DNS, Plugin: []plugin.Plugin{func(plugin.Handler) plugin.Handler { return echoes{&of} }}}
	cfg.IdleTimeout = time.Hour
	s, err := dnsserver.NewServer("dns://"+l.Addr().String(), []*dnsserver.Config{cfg})
	if err != nil {
		panic(err)
	}
	of = s
	fmt.Println(l.Addr())
	panic(s.Serve(l))
}

// costOf returns the CPU time of a server for each query, in µs. missed per cent of the queries go the slow path.
func costOf(b *testing.B, form string, connections, deep, missed int) float64 {
	self, err := os.Executable()
	if err != nil {
		b.Fatal(err)
	}
	server := exec.Command(self)
	server.Env = append(os.Environ(), formVar+"="+form)
	server.Stderr = os.Stderr
	out, err := server.StdoutPipe()
	if err != nil {
		b.Fatal(err)
	}
	pinned(b, 0, func() { err = server.Start() })
	if err != nil {
		b.Fatal(err)
	}
	defer server.Wait()
	defer server.Process.Kill()
	var addr string
	if _, err := fmt.Fscanln(out, &addr); err != nil {
		b.Fatal(err)
	}

	const warm = 40 // queries of each connection before the measurement
	var left atomic.Int64
	measured := min(10000*connections*deep, 100000)
	p, miss := (&streamClient{}).queries("host.example.org."), (&streamClient{}).queries("miss.example.org.")
	var warmed, over sync.WaitGroup
	begin := make(chan struct{})
	for range connections {
		c, err := net.Dial("tcp", addr)
		if err != nil {
			b.Fatal(err)
		}
		defer c.Close()
		warmed.Add(1)
		over.Go(func() {
			answers := make([]byte, deep*len(p))
			asked := 0
			round := func(n int) bool {
				for range n {
					ask := p
					if asked++; asked > warm && (asked*missed)%100 < missed {
						ask = miss
					}
					if _, err := c.Write(ask); err != nil {
						b.Error(err)
						return false
					}
				}
				_, err := io.ReadFull(c, answers[:n*len(p)])
				if err != nil {
					b.Error(err)
				}
				return err == nil
			}
			for range warm {
				if !round(1) {
					break
				}
			}
			warmed.Done()
			<-begin
			for left.Add(-int64(deep)) >= 0 && round(deep) {
			}
		})
	}
	warmed.Wait()
	left.Store(int64(measured))
	before := spent(b, server.Process.Pid)
	close(begin)
	over.Wait()
	return float64((spent(b, server.Process.Pid) - before).Microseconds()) / float64(measured)
}

// pinned calls f on one CPU, if the system allows it: processes that f starts stay there.
func pinned(b *testing.B, cpu int, f func()) {
	var all, one unix.CPUSet
	one.Set(cpu)
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // for good: the thread ends with the goroutine
		if err := cmp.Or(unix.SchedGetaffinity(0, &all), unix.SchedSetaffinity(0, &one)); err != nil {
			b.Log(err)
		}
		f()
	}()
	<-done
}

// spent returns the CPU time of a process.
func spent(b *testing.B, pid int) time.Duration {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		b.Fatal(err)
	}
	fields := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
	var ticks int
	for _, f := range fields[11:13] {
		n, err := strconv.Atoi(f)
		if err != nil {
			b.Fatal(err)
		}
		ticks += n
	}
	return time.Duration(ticks) * 10 * time.Millisecond // USER_HZ is 100
}
