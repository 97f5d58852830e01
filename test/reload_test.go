package test

import (
	"bufio"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/miekg/dns"

	"github.com/optcache/optcache/test/child"
)

// What the log says in the end of a reload.
const (
	reloaded = "[INFO] Reloading complete"
	refused  = "[ERROR] SIGUSR1:"
)

// signal sends a signal to the server.
func (s *server) signal(sig os.Signal) {
	s.t.Helper()
	if err := s.cmd.Process.Signal(sig); err != nil {
		s.t.Fatal(err)
	}
}

// terminate asks the server to end, and waits until it has.
func (s *server) terminate() {
	s.t.Helper()
	s.stopped = true
	s.signal(syscall.SIGTERM)
	select {
	case <-s.exited:
	case <-time.After(patience):
		s.t.Fatal("does not end")
	}
}

// reload has the server read its Corefile again, and waits until the log says how that went.
func (s *server) reload(outcome string) {
	s.t.Helper()
	before := strings.Count(s.out.String(), outcome)
	s.signal(syscall.SIGUSR1)
	eventually(s.t, func() error {
		if strings.Count(s.out.String(), outcome) == before {
			return fmt.Errorf("no %q in the log", outcome)
		}
		return nil
	})
}

// steady asks one question after the other until stop, and returns when it has the first answer.
// Each question must be answered, at the first attempt.
func steady(t *testing.T, s *server, q *dns.Msg) (stop func() (answered int64)) {
	t.Helper()
	var wg sync.WaitGroup
	var answered atomic.Int64
	done := make(chan struct{})
	end := sync.OnceFunc(func() {
		close(done)
		wg.Wait()
	})
	t.Cleanup(end) // a test that fails early does not stop it, and nothing may use t after that
	send := overUDP(s.addr("dns"))
	wg.Go(func() {
		for {
			select {
			case <-done:
				return
			default:
			}
			m := q.Copy()
			m.Id = dns.Id()
			reply, _, err := send(m)
			if err == nil {
				err = isReply(reply, m)
			}
			if err != nil || len(reply.Answer) == 0 {
				t.Errorf("after %d answers: %v, %v", answered.Load(), err, reply)
				return
			}
			answered.Add(1)
		}
	})
	eventually(t, func() error {
		if answered.Load() == 0 && !t.Failed() {
			return fmt.Errorf("no answer to %s", q.Question[0].Name)
		}
		return nil
	})
	return func() int64 {
		end()
		return answered.Load()
	}
}

// A reload takes over the Corefile's changes, loses no query, and gives back what the instance
// before it held.
func TestReload(t *testing.T) {
	t.Parallel()
	if _, err := os.Stat("/proc/self/maps"); err != nil {
		t.Skip("memory is read from /proc")
	}
	u := newUpstream(t)
	corefile := func(ttl int) string {
		// Large enough that one instance too many shows.
		return block("dns", u.addr, "prometheus 127.0.0.1:${metrics}", fmt.Sprintf("optcache %d {\n\tsuccess 200000\n}", ttl))
	}
	// Without frequent collections the heap's own growth hides what is looked for.
	s := start(t, corefile(300), "GOGC=20")
	send := overUDP(s.addr("dns"))
	round := func(i int) {
		s.write(corefile(300 - i))
		s.reload(reloaded)
		if got := ttl(t, ask(t, send, query(fmt.Sprintf("after-%d.example.org.", i), dns.TypeA))); got != uint32(300-i) {
			t.Errorf("after reload %d an answer has TTL %d", i, got)
		}
		askHosts(t, s, 200)
	}

	stop := steady(t, s, query("www.example.org.", dns.TypeA))
	const warmUp, rounds = 3, 10
	for i := range warmUp {
		round(1 + i)
	}
	limit := sum(t, s.addr("metrics"), "coredns_optcache_memory_limit_bytes")
	before := readMemory(t, s)
	for i := range rounds {
		round(1 + warmUp + i)
	}
	t.Logf("%d queries were answered during %d reloads", stop(), warmUp+rounds)
	// The old instance's memory goes when its last request has gone.
	collected(t, s, func() error {
		after := readMemory(t, s)
		switch {
		case after.mappings > before.mappings+rounds:
			return fmt.Errorf("%d mappings before %d reloads, %d after", before.mappings, rounds, after.mappings)
		case after.virtual > before.virtual+int(limit):
			return fmt.Errorf("%d bytes mapped before %d reloads, %d after", before.virtual, rounds, after.virtual)
		case after.resident > before.resident+before.resident/2:
			return fmt.Errorf("%d bytes resident before %d reloads, %d after", before.resident, rounds, after.resident)
		}
		return nil
	})
	if n := sum(t, s.addr("metrics"), "coredns_optcache_requests_total"); n == 0 {
		t.Error("the counters are gone after reloads")
	}
}

// A Corefile that is wrong, or that cannot be served, leaves the old one serving from its cache.
func TestFailedReload(t *testing.T) {
	t.Parallel()
	u := newUpstream(t)
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	_, port, _ := net.SplitHostPort(taken.Addr().String())

	good := block("dns", u.addr, "prometheus 127.0.0.1:${metrics}", "optcache {\n\tsuccess 200000\n}")
	s := start(t, good, "GOGC=20")
	stop := steady(t, s, query("www.example.org.", dns.TypeA))
	instance := int(sum(t, s.addr("metrics"), "coredns_optcache_memory_limit_bytes"))
	before := readMemory(t, s)
	for _, bad := range []string{
		strings.ReplaceAll(good, "200000", "plenty"),
		strings.TrimSuffix(good, "}\n"),
	} {
		s.write(bad)
		s.reload(refused)
	}
	// The last step of a start is to listen: by then the new instance has its memory.
	const rounds = 10
	s.write(good + "example.net:" + port + " {\n\tbind 127.0.0.1\n\twhoami\n}\n")
	for range rounds {
		s.reload(refused)
	}
	t.Logf("%d queries were answered during failed reloads", stop())
	if n := u.count("www.example.org.", dns.TypeA); n != 1 {
		t.Errorf("upstream was asked %d times", n)
	}
	if n := sum(t, s.addr("metrics"), "coredns_optcache_entries", `type="success"`); n != 1 {
		t.Errorf("/metrics tells of %v entries", n)
	}
	// The memory of an instance whose start failed goes with a later collection, and the server holds on to the last
	// one or two.
	const held = 3
	collected(t, s, func() error {
		if after := readMemory(t, s); after.virtual > before.virtual+held*instance {
			return fmt.Errorf("%d bytes mapped before %d failed reloads, %d after; an instance takes %d", before.virtual, rounds, after.virtual, instance)
		}
		return nil
	})

	s.write(good)
	s.reload(reloaded)
	ask(t, overUDP(s.addr("dns")), query("www.example.org.", dns.TypeA))
	if n := u.count("www.example.org.", dns.TypeA); n != 1 {
		t.Errorf("after a reload that went well, upstream was asked %d times: the answer was in the cache", n)
	}
}

// SIGTERM while queries run ends the process, and its status says that nothing went wrong.
func TestSIGTERM(t *testing.T) {
	t.Parallel()
	u := newUpstream(t)
	s := start(t, block("dns", u.addr, "optcache"))
	ask(t, overUDP(s.addr("dns")), query("www.example.org.", dns.TypeA))

	// Queries go on coming until the process is gone; some of the last get no answer.
	done := make(chan struct{})
	var wg sync.WaitGroup
	defer wg.Wait()
	defer close(done)
	wg.Go(func() {
		conn, err := dns.Dial("udp", s.addr("dns"))
		if err != nil {
			t.Error(err)
			return
		}
		defer conn.Close()
		for {
			select {
			case <-done:
				return
			default:
			}
			conn.WriteMsg(query("www.example.org.", dns.TypeA))
			conn.SetReadDeadline(time.Now().Add(pollEvery))
			conn.ReadMsg()
		}
	})

	s.terminate()
	if code := s.cmd.ProcessState.ExitCode(); code != 0 {
		t.Errorf("exit status %d", code)
	}
}

// In the time that health's lameduck gives to clients, a server that ends serves from its cache as before, and what
// it serves last is in the snapshot.
func TestLameduck(t *testing.T) {
	t.Parallel()
	for name, fast := range map[string]string{"chain": "", "fastpath": "\n\t\tfastpath 1"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			u := newUpstream(t)
			path := filepath.Join(t.TempDir(), "answers")
			s := start(t, block("dns", u.addr, "health 127.0.0.1:${health} {\n\t\tlameduck 10s\n\t}", "optcache {\n\t\tcache_file_path "+path+fast+"\n\t}"))
			send := overUDP(s.addr("dns"))
			ask(t, send, query("www.example.org.", dns.TypeA))
			s.stopped = true
			s.signal(syscall.SIGTERM)
			if !s.waitFor("lameduck") {
				t.Fatal("no lameduck")
			}
			for range 100 {
				ask(t, send, query("www.example.org.", dns.TypeA))
			}
			if n := u.count("www.example.org.", dns.TypeA); n != 1 {
				t.Errorf("the upstream was asked %d times for what is in the cache", n)
			}
			if _, err := os.Stat(path); err == nil {
				t.Error("the snapshot was written before the end")
			}
			<-s.exited
			if _, err := os.Stat(path); err != nil {
				t.Error(err)
			}
		})
	}
}

// collected is eventually, for what only a collection of the server's garbage brings about. It scrapes the server between
// the checks: a server that is idle, or answers from its cache only, makes no garbage, and collects none for two minutes.
func collected(t testing.TB, s *server, check func() error) {
	t.Helper()
	eventually(t, func() error {
		for range 50 {
			sum(t, s.addr("metrics"), "coredns_optcache_entries")
		}
		return check()
	})
}

// memory is what the system says about a process, in bytes.
type memory struct {
	mappings, virtual, resident int
}

func readMemory(t testing.TB, s *server) (m memory) {
	t.Helper()
	dir := filepath.Join("/proc", strconv.Itoa(s.cmd.Process.Pid))
	m.mappings = strings.Count(readFile(t, filepath.Join(dir, "maps")), "\n")
	lines := bufio.NewScanner(strings.NewReader(readFile(t, filepath.Join(dir, "status"))))
	for lines.Scan() {
		var kb int
		if _, err := fmt.Sscanf(lines.Text(), "VmSize: %d kB", &kb); err == nil {
			m.virtual = kb << 10
		}
		if _, err := fmt.Sscanf(lines.Text(), "VmRSS: %d kB", &kb); err == nil {
			m.resident = kb << 10
		}
	}
	if m.mappings == 0 || m.virtual == 0 || m.resident == 0 {
		t.Fatalf("cannot read the memory in %s", dir)
	}
	return m
}

// Reloads lose no answer that is alive: the upstream is asked for none of them again, whatever has changed, and with
// queries all the time.
func TestReloadKeepsAnswers(t *testing.T) {
	t.Parallel()
	u := newUpstream(t)
	corefile := func(options string) string {
		return block("dns", u.addr, "prometheus 127.0.0.1:${metrics}", "optcache {\n\t\t"+options+"\n\t}")
	}
	variants := []string{
		"success 5000", "success 5000", "success 9000 3000", "success 2000", "max_memory 4MB", "cache_line_optimization false",
		"prefetch 5", "serve_stale 1h", "hot_cache_percentage 30", "coalesce off", "fastpath 1",
	}
	const names, rounds = 500, 2
	s := start(t, corefile("success 5000"))
	askHosts(t, s, names)
	stop := steady(t, s, query(hostName(0), dns.TypeA))
	for range rounds {
		for _, options := range variants {
			s.write(corefile(options))
			s.reload(reloaded)
			askHosts(t, s, names)
		}
	}
	stop()
	again := 0
	for i := range names {
		again += u.count(hostName(i), dns.TypeA) - 1
	}
	if again != 0 {
		t.Errorf("the upstream was asked %d times for what was in the cache", again)
	}
	if n := sum(t, s.addr("metrics"), "coredns_optcache_reload_kept_entries"); n != names {
		t.Errorf("the last reload has kept %v answers, want %d", n, names)
	}
}

// A storm of reloads while dnsperf asks loses no query and no answer that is alive: with the fast path and
// without it, when nothing changes and when the answers have to move.
func TestReloadStorm(t *testing.T) {
	t.Parallel()
	const names = 300
	reloads := 100
	if testing.Short() {
		reloads = 10
	}
	for _, c := range []struct{ name, options string }{{"chain", ""}, {"fastpath", "\n\t\tfastpath 2"}} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			u := newUpstream(t)
			corefile := func(capacity int) string {
				return block("dns", u.addr, "prometheus 127.0.0.1:${metrics}", fmt.Sprintf("optcache {\n\t\tsuccess %d%s\n\t}", capacity, c.options))
			}
			s := start(t, corefile(5000))
			askHosts(t, s, names)
			loaded := load(t, s, names)
			i := 0
			for ; i < reloads || !loaded.done(); i++ {
				s.write(corefile(5000 + i/5%2*1000)) // five times the same, then another make
				s.reload(reloaded)
			}
			askHosts(t, s, names)
			askedOnce(t, u, names)
			if n := sum(t, s.addr("metrics"), "coredns_optcache_reload_kept_entries"); n != names {
				t.Errorf("the last reload has kept %v answers, want %d", n, names)
			}
			t.Logf("%d queries, %d reloads", loaded.sent(), i)
		})
	}
}

// Reloads that eight ask for all the time, while others are under way and the last one's answers are still moving, lose no
// query and no answer.
func TestConcurrentReloads(t *testing.T) {
	t.Parallel()
	const names, senders = 100, 8
	u := newUpstream(t)
	corefile := func(capacity int) string {
		return block("dns", u.addr, "prometheus 127.0.0.1:${metrics}", fmt.Sprintf("optcache {\n\t\tsuccess %d\n\t\tfastpath 2\n\t}", capacity))
	}
	s := start(t, corefile(5000))
	askHosts(t, s, names)
	loaded := load(t, s, names)
	var wg sync.WaitGroup
	for sender := range senders {
		wg.Go(func() {
			for i := 0; !loaded.done(); i++ {
				if sender == 0 {
					s.write(corefile(5000 + 1000*(i%2)))
				}
				if err := s.cmd.Process.Signal(syscall.SIGUSR1); err != nil {
					t.Error(err)
				}
				time.Sleep(pollEvery)
			}
		})
	}
	wg.Wait()
	askedOnce(t, u, names)
	t.Logf("%d queries, %d reloads", loaded.sent(), strings.Count(s.out.String(), reloaded))
}

// loading is a dnsperf that asks a server for some seconds.
type loading struct {
	t      *testing.T
	out    output
	exited chan struct{}
}

// load has dnsperf ask for names. It skips the test where there is none.
func load(t *testing.T, s *server, names int) *loading {
	t.Helper()
	needs(t, "dnsperf")
	file := filepath.Join(t.TempDir(), "queries")
	var lines strings.Builder
	for i := range names {
		fmt.Fprintln(&lines, hostName(i), "A")
	}
	if err := os.WriteFile(file, []byte(lines.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	// At a rate that leaves the machine time for everything else, and never more on their way than a socket's buffer has
	// room for: what is lost is not lost for want of that.
	cmd := exec.Command("dnsperf", "-s", "127.0.0.1", "-p", s.ports["dns"], "-d", file, "-c", "4", "-T", "1", "-Q", "3000", "-q", "100", "-t", "20", "-l", "3")
	l := &loading{t: t, exited: make(chan struct{})}
	cmd.Stdout, cmd.Stderr = &l.out, &l.out
	if err := child.Start(cmd); err != nil {
		t.Fatal(err)
	}
	go func() {
		cmd.Wait()
		close(l.exited)
	}()
	return l
}

// done reports whether it has all replies, or has given up waiting for them.
func (l *loading) done() bool {
	select {
	case <-l.exited:
		return true
	default:
		return false
	}
}

// sent returns how many queries there were. It fails the test when one got no answer.
func (l *loading) sent() (sent int) {
	l.t.Helper()
	<-l.exited
	var completed int
	for line := range strings.Lines(l.out.String()) {
		fmt.Sscanf(strings.TrimSpace(line), "Queries sent: %d", &sent)
		fmt.Sscanf(strings.TrimSpace(line), "Queries completed: %d", &completed)
	}
	if sent == 0 || completed != sent || strings.Contains(l.out.String(), "SERVFAIL") {
		l.t.Errorf("of %d queries, %d got a reply:\n%s", sent, completed, &l.out)
	}
	return sent
}
