package page

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
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
)

// binary is CoreDNS with optcache.
var binary string

func TestMain(m *testing.M) { os.Exit(run(m)) }

func run(m *testing.M) int {
	dir, err := os.MkdirTemp("", "page")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	binary = filepath.Join(dir, "coredns")
	build := exec.Command("go", "build", "-buildvcs=false", "-o", binary, "./cmd/coredns")
	build.Dir = "../.."
	if out, err := build.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "%v\n%s", err, out)
		return 1
	}
	return m.Run()
}

// nasty is a label that would run a script in a page that makes markup of it.
const nasty = `<img\ src=x\ onerror=window.nasty=1>`

// upstream answers what the server asks.
func upstream(t *testing.T) string {
	t.Helper()
	c, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &dns.Server{PacketConn: c, Handler: dns.HandlerFunc(func(w dns.ResponseWriter, q *dns.Msg) {
		r := new(dns.Msg).SetReply(q)
		name := q.Question[0].Name
		if strings.HasPrefix(name, "no") {
			r.Rcode = dns.RcodeNameError
			soa, _ := dns.NewRR("example.org. 60 IN SOA ns.example.org. mail.example.org. 1 2 3 4 60")
			r.Ns = append(r.Ns, soa)
		} else {
			r.Answer = append(r.Answer, &dns.A{Hdr: dns.RR_Header{Name: name, Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: 600}, A: net.IPv4(192, 0, 2, 1)})
		}
		time.Sleep(time.Duration(rand.IntN(4000)) * time.Microsecond)
		w.WriteMsg(r)
	})}
	go s.ActivateAndServe()
	t.Cleanup(func() { s.Shutdown() })
	return c.LocalAddr().String()
}

// freePort returns a port that nobody listens on, by UDP or TCP.
func freePort(t *testing.T) string {
	t.Helper()
	for range 100 {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		if c, err := net.ListenPacket("udp", l.Addr().String()); err == nil {
			c.Close()
			_, port, _ := net.SplitHostPort(l.Addr().String())
			return port
		}
	}
	t.Fatal("no port")
	return ""
}

// server is a CoreDNS.
type server struct {
	t                         *testing.T
	dir, corefile, token      string
	dns, metrics, url, health string
	upstream                  string
	process                   *os.Process
}

// start starts a server whose optcache block has some more lines. With token, its control interface wants one.
func start(t *testing.T, token, more string) *server {
	t.Helper()
	s := &server{t: t, dir: t.TempDir(), token: token, upstream: upstream(t)}
	s.corefile = filepath.Join(s.dir, "Corefile")
	s.dns, s.metrics, s.health = "127.0.0.1:"+freePort(t), "127.0.0.1:"+freePort(t), "127.0.0.1:"+freePort(t)
	s.url = "http://" + s.health
	s.configure(more)
	log, err := os.Create(filepath.Join(s.dir, "log"))
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	cmd := exec.Command(binary, "-conf", s.corefile)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	s.process = cmd.Process
	t.Cleanup(func() {
		cmd.Process.Signal(syscall.SIGTERM)
		cmd.Wait()
		if t.Failed() {
			text, _ := os.ReadFile(log.Name())
			t.Logf("%s", text)
		}
	})
	eventually(t, "the server answers", func() error { _, err := s.ask("first.example.org."); return err })
	return s
}

// startShared starts a server with a second level, a real redis-server, and waits until it is used.
func startShared(t *testing.T) (*server, *os.Process) {
	t.Helper()
	dir, port := t.TempDir(), freePort(t)
	redis := exec.Command("redis-server", "--port", port, "--bind", "127.0.0.1", "--dir", dir, "--save", "")
	redis.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := redis.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		redis.Process.Kill()
		redis.Wait()
	})
	secret := filepath.Join(dir, "secret")
	if err := os.WriteFile(secret, []byte("a secret of the tests"), 0o600); err != nil {
		t.Fatal(err)
	}
	s := start(t, "", fmt.Sprintf("shared valkey://127.0.0.1:%s\n        shared_secret %s\n        shared_timeout 500ms", port, secret))
	eventually(t, "the second level is used", func() error {
		if s.scrape()["shared_away"] != 0 {
			return errors.New("it is away")
		}
		return nil
	})
	return s, redis.Process
}

// configure writes the Corefile.
func (s *server) configure(more string) {
	s.t.Helper()
	control := "control " + s.health
	if s.token != "" {
		file := filepath.Join(s.dir, "token")
		if err := os.WriteFile(file, []byte(s.token), 0o600); err != nil {
			s.t.Fatal(err)
		}
		control += " token " + file
	}
	_, port, _ := net.SplitHostPort(s.dns)
	text := fmt.Sprintf(`.:%s {
    bind 127.0.0.1
    prometheus %s
    optcache {
        %s
        fastpath 1
        cache_file_path %s 1h
        %s
    }
    forward . %s
}
`, port, s.metrics, control, filepath.Join(s.dir, "answers"), more, s.upstream)
	if err := os.WriteFile(s.corefile, []byte(text), 0o644); err != nil {
		s.t.Fatal(err)
	}
}

// reload makes the server read its Corefile again.
func (s *server) reload() {
	s.t.Helper()
	if err := s.process.Signal(syscall.SIGUSR1); err != nil {
		s.t.Fatal(err)
	}
}

func (s *server) ask(name string) (*dns.Msg, error) {
	r, _, err := (&dns.Client{Timeout: 2 * time.Second}).Exchange(new(dns.Msg).SetQuestion(name, dns.TypeA), s.dns)
	return r, err
}

// load asks for names, the first ones most often, until stop is called. It counts the answers.
func (s *server) load() (stop func(), answers *atomic.Int64) {
	ctx, cancel := context.WithCancel(context.Background())
	var clients sync.WaitGroup
	answers = new(atomic.Int64)
	for i := range 4 {
		clients.Go(func() {
			names := rand.NewZipf(rand.New(rand.NewPCG(1, uint64(i))), 1.2, 3, 4000)
			c, err := dns.Dial("udp", s.dns)
			if err != nil {
				s.t.Error(err)
				return
			}
			defer c.Close()
			for n := 0; ctx.Err() == nil; n++ {
				name := fmt.Sprintf("w%d.example.org.", names.Uint64())
				if n%20 == 0 {
					name = "no" + name
				}
				c.SetDeadline(time.Now().Add(time.Second))
				if c.WriteMsg(new(dns.Msg).SetQuestion(name, dns.TypeA)) != nil {
					continue
				}
				if _, err := c.ReadMsg(); err == nil {
					answers.Add(1)
				}
				time.Sleep(200 * time.Microsecond) // there are two cores, and a browser
			}
		})
	}
	return func() { cancel(); clients.Wait() }, answers
}

// scrape returns the sums of optcache's series, by name, and by name with one label: name{label="value"}.
func (s *server) scrape() map[string]float64 {
	s.t.Helper()
	r, err := http.Get("http://" + s.metrics + "/metrics")
	if err != nil {
		s.t.Fatal(err)
	}
	defer r.Body.Close()
	all := make(map[string]float64)
	for lines := bufio.NewScanner(r.Body); lines.Scan(); {
		series, text, _ := strings.Cut(lines.Text(), "} ")
		value, err := strconv.ParseFloat(text, 64)
		name, labels, ok := strings.Cut(series, "{")
		name, ours := strings.CutPrefix(name, "coredns_optcache_")
		if err != nil || !ok || !ours {
			continue
		}
		all[name] += value
		for _, label := range strings.Split(labels, ",") {
			all[name+"{"+label+"}"] += value
		}
	}
	return all
}

// held returns how many answers are held for a name.
func (s *server) held(name string) int {
	s.t.Helper()
	q, err := http.NewRequest("GET", s.url+"/v1/lookup?name="+name, nil)
	if err != nil {
		s.t.Fatal(err)
	}
	q.Header.Set("Authorization", "Bearer "+s.token)
	r, err := http.DefaultClient.Do(q)
	if err != nil {
		s.t.Fatal(err)
	}
	defer r.Body.Close()
	text, _ := io.ReadAll(r.Body)
	if r.StatusCode != 200 {
		s.t.Fatalf("%d %s", r.StatusCode, text)
	}
	return strings.Count(string(text), `"rcode"`)
}

// eventually calls ok until it returns no error, for a limited time.
func eventually(t *testing.T, what string, ok func() error) {
	t.Helper()
	err := errors.New("never tried")
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		if err = ok(); err == nil {
			return
		}
	}
	t.Fatalf("not within 20 s: %s: %v", what, err)
}
