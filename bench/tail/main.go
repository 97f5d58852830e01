// Command tail measures how long single queries take under a fixed rate.
//
//	go run ./bench/tail -server 127.0.0.1:53 -d QUERIES [-net udp|tcp|dot] [-rate 30000] [-time 60s] [-sockets 8] [-empty]
//
// It draws from a file of queries (one a line, name and type, as dnsperf's), sends at times that are
// fixed beforehand, whether or not replies come, and counts each query's latency from the time it
// was to be sent at: what waits because the server, or this program, had no time, waited. It prints
// quantiles, how many queries got no reply within two seconds, and how late the sending itself was:
// that part of the latency is not the server's.
package main

import (
	"bufio"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"io"
	"log"
	"math/rand/v2"
	"net"
	"os"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/miekg/dns"
)

// patience is how long a reply may take. It also bounds the rate: a socket has 65,536 IDs, and one
// must not be used again before that.
const patience = 2 * time.Second

func main() {
	log.SetFlags(0)
	log.SetPrefix("tail: ")
	server := flag.String("server", "", "`address` and port to ask")
	network := flag.String("net", "udp", "`transport`: udp, tcp, or dot, whose certificate is not checked")
	file := flag.String("d", "", "`file` of queries")
	rate := flag.Int("rate", 30_000, "queries per second, of all sockets")
	duration := flag.Duration("time", time.Minute, "how long to send")
	sockets := flag.Int("sockets", 8, "sockets to send from, or connections")
	empty := flag.Bool("empty", false, "a reply need not have an answer")
	flag.Parse()
	if *server == "" || *file == "" || flag.NArg() > 0 || *rate < 1 || *sockets < 1 || *duration <= 0 || dialers[*network] == nil {
		flag.Usage()
		os.Exit(2)
	}
	if perSocket := *rate / *sockets; perSocket > 65536/int(patience/time.Second)/2 {
		log.Fatalf("%d queries per second are too many for %d sockets", *rate, *sockets)
	}
	qs, err := readQueries(*file)
	if err != nil {
		log.Fatal(err)
	}
	r, err := measure(dialers[*network], *server, qs, *rate, *sockets, *duration, *empty)
	if err != nil {
		log.Fatal(err)
	}
	r.print()
}

// dialers open a socket or a connection, by transport.
var dialers = map[string]func(server string) (net.Conn, error){
	"udp": func(server string) (net.Conn, error) { return net.Dial("udp", server) },
	"tcp": func(server string) (net.Conn, error) { return stream(net.Dial("tcp", server)) },
	"dot": func(server string) (net.Conn, error) {
		conn, err := tls.Dial("tcp", server, &tls.Config{InsecureSkipVerify: true})
		return stream(conn, err)
	},
}

// framed is a connection on which each message has its length before it (RFC 1035 section 4.2.2). Read returns one message, and Write
// takes one.
type framed struct {
	net.Conn
	in  *bufio.Reader
	out []byte
}

func stream(conn net.Conn, err error) (net.Conn, error) {
	if err != nil {
		return nil, err
	}
	return &framed{Conn: conn, in: bufio.NewReaderSize(conn, 16<<10), out: make([]byte, 0, 512)}, nil
}

func (f *framed) Read(p []byte) (int, error) {
	var length [2]byte
	if _, err := io.ReadFull(f.in, length[:]); err != nil {
		return 0, err
	}
	return io.ReadFull(f.in, p[:binary.BigEndian.Uint16(length[:])])
}

func (f *framed) Write(p []byte) (int, error) {
	f.out = append(binary.BigEndian.AppendUint16(f.out[:0], uint16(len(p))), p...)
	_, err := f.Conn.Write(f.out)
	return len(p), err
}

// queries are many queries in wire format. It is two slices whatever their number, so that the
// collector has nothing to do here while it is measured how little it has to do elsewhere.
type queries struct {
	wire []byte
	ends []uint32
}

func (q *queries) at(i int) []byte {
	begin := uint32(0)
	if i > 0 {
		begin = q.ends[i-1]
	}
	return q.wire[begin:q.ends[i]]
}

func readQueries(path string) (*queries, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	q := new(queries)
	lines := bufio.NewScanner(f)
	for n := 1; lines.Scan(); n++ {
		name, kind, _ := strings.Cut(lines.Text(), " ")
		qtype, ok := dns.StringToType[kind]
		if !ok {
			return nil, fmt.Errorf("%s:%d: no name and type: %q", path, n, lines.Text())
		}
		b, err := new(dns.Msg).SetQuestion(dns.Fqdn(name), qtype).Pack()
		if err != nil {
			return nil, fmt.Errorf("%s:%d: %w", path, n, err)
		}
		q.wire = append(q.wire, b...)
		q.ends = append(q.ends, uint32(len(q.wire)))
	}
	if err := lines.Err(); err != nil {
		return nil, err
	}
	if len(q.ends) == 0 {
		return nil, fmt.Errorf("%s: no queries", path)
	}
	return q, nil
}

// result is what was measured. Times are in ns.
type result struct {
	sent      int
	latencies []uint32
	late      []uint32 // by how much each query was sent too late
	bad       int      // replies that were no answers
}

func measure(dial func(string) (net.Conn, error), server string, qs *queries, rate, sockets int, duration time.Duration, empty bool) (*result, error) {
	clients := make([]*client, sockets)
	each := int(float64(rate) * duration.Seconds() / float64(sockets))
	for i := range clients {
		conn, err := dial(server)
		if err != nil {
			return nil, err
		}
		defer conn.Close()
		clients[i] = &client{
			conn:      conn,
			interval:  time.Second * time.Duration(sockets) / time.Duration(rate),
			offset:    time.Second * time.Duration(i) / time.Duration(rate),
			latencies: make([]uint32, 0, each),
			late:      make([]uint32, 0, each),
		}
	}
	defer debug.SetGCPercent(debug.SetGCPercent(-1)) // nothing is allocated from here on

	start := time.Now().Add(10 * time.Millisecond)
	errs := make([]error, sockets)
	var sending, receiving sync.WaitGroup
	for i, c := range clients {
		receiving.Go(func() { errs[i] = c.receive(start, empty) })
		sending.Go(func() { c.send(start, qs, each) })
	}
	sending.Wait()
	for _, c := range clients {
		c.conn.SetReadDeadline(time.Now().Add(patience))
	}
	receiving.Wait()

	r := new(result)
	for _, c := range clients {
		r.sent += each
		r.bad += c.bad
		r.latencies = append(r.latencies, c.latencies...)
		r.late = append(r.late, c.late...)
	}
	return r, errors.Join(errs...)
}

// client is one socket or connection, with a goroutine that sends and one that receives.
type client struct {
	conn     net.Conn
	interval time.Duration
	offset   time.Duration // of the first query

	due [1 << 16]atomic.Int64 // by ID, when the query was to be sent, in ns from the start; 0: none

	late      []uint32 // the sender's
	latencies []uint32 // the receiver's, and what follows
	bad       int
}

func (c *client) send(start time.Time, qs *queries, n int) {
	buf := make([]byte, 512)
	for i := range n {
		due := c.offset + time.Duration(i)*c.interval + 1 // never 0
		if wait := due - time.Since(start); wait > 0 {
			time.Sleep(wait)
		}
		b := buf[:copy(buf, qs.at(rand.IntN(len(qs.ends))))]
		binary.BigEndian.PutUint16(b, uint16(i))
		c.due[uint16(i)].Store(int64(due))
		c.late = append(c.late, clamp(time.Since(start)-due))
		c.conn.Write(b) // what is not sent gets no reply, and is lost
	}
}

func (c *client) receive(start time.Time, empty bool) error {
	buf := make([]byte, dns.MaxMsgSize)
	for {
		n, err := c.conn.Read(buf)
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded):
			return nil
		case err != nil:
			return err
		case n < 12:
			c.bad++
			continue
		}
		due := time.Duration(c.due[binary.BigEndian.Uint16(buf)].Swap(0))
		took := time.Since(start) - due
		if due == 0 || took > patience {
			continue // was lost already
		}
		// A reply without an error and, unless it may be empty, with an answer: RFC 1035 section 4.1.1.
		if rcode, answers := buf[3]&0x0f, binary.BigEndian.Uint16(buf[6:]); rcode != 0 || answers == 0 && !empty {
			c.bad++
			continue
		}
		c.latencies = append(c.latencies, clamp(took))
	}
}

func clamp(d time.Duration) uint32 { return uint32(min(max(d, 0), 1<<32-1)) }

func (r *result) print() {
	slices.Sort(r.latencies)
	slices.Sort(r.late)
	for _, q := range []struct {
		name string
		q    float64
	}{{"p50", 0.5}, {"p99", 0.99}, {"p99.9", 0.999}, {"max", 1}} {
		fmt.Printf("%s\t%.3f ms\tsent late by %.3f ms\n", q.name, quantile(r.latencies, q.q), quantile(r.late, q.q))
	}
	fmt.Printf("sent\t%d\nlost\t%d\nbad\t%d\n", r.sent, r.sent-len(r.latencies)-r.bad, r.bad)
}

// quantile returns a quantile, in ms, of sorted times in ns.
func quantile(sorted []uint32, q float64) float64 {
	if len(sorted) == 0 {
		return 0
	}
	i := min(int(q*float64(len(sorted))), len(sorted)-1)
	return float64(sorted[i]) / 1e6
}
