package test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"
)

// This file asks: by every transport, and for the metrics.

// askTimeout is how long a client waits for a reply.
const askTimeout = 10 * time.Second

// query makes a question without EDNS and with RD.
func query(name string, qtype uint16) *dns.Msg {
	return new(dns.Msg).SetQuestion(name, qtype)
}

// hostName is the name of one of many hosts, and askHosts asks for the first n of them.
func hostName(i int) string { return fmt.Sprintf("host-%d.example.org.", i) }

func askHosts(t testing.TB, s *server, n int) {
	t.Helper()
	send := overUDP(s.addr("dns"))
	for i := range n {
		ask(t, send, query(hostName(i), dns.TypeA))
	}
}

// edns adds an OPT to a query.
func edns(m *dns.Msg, size uint16, do bool) *dns.Msg { return m.SetEdns0(size, do) }

// exchanger sends one query and returns the reply, and its length on the wire.
type exchanger func(m *dns.Msg) (*dns.Msg, int, error)

func overUDP(addr string) exchanger { return over(&dns.Client{Net: "udp"}, addr) }
func overTCP(addr string) exchanger { return over(&dns.Client{Net: "tcp"}, addr) }

// over sends by a client, each time from a new socket.
func over(c *dns.Client, addr string) exchanger {
	c.Timeout = askTimeout
	return func(m *dns.Msg) (*dns.Msg, int, error) {
		conn, err := c.Dial(addr)
		if err != nil {
			return nil, 0, err
		}
		defer conn.Close()
		return exchangeOn(conn, m, c.TsigSecret)
	}
}

// overOne sends by a client, all on one connection.
func overOne(t testing.TB, c *dns.Client, addr string) exchanger {
	var conn *dns.Conn
	t.Cleanup(func() {
		if conn != nil {
			conn.Close()
		}
	})
	return func(m *dns.Msg) (_ *dns.Msg, _ int, err error) {
		if conn == nil {
			if conn, err = c.Dial(addr); err != nil {
				return nil, 0, err
			}
		}
		return exchangeOn(conn, m, c.TsigSecret)
	}
}

// exchangeOn sends one query on a connection, and waits for the reply.
func exchangeOn(conn *dns.Conn, m *dns.Msg, secrets map[string]string) (*dns.Msg, int, error) {
	conn.UDPSize = dns.MaxMsgSize
	conn.SetDeadline(time.Now().Add(askTimeout))
	b, mac, err := pack(m, secrets)
	if err != nil {
		return nil, 0, err
	}
	if _, err := conn.Write(b); err != nil {
		return nil, 0, err
	}
	if b, err = conn.ReadMsgHeader(nil); err != nil {
		return nil, 0, err
	}
	reply := new(dns.Msg)
	if err := reply.Unpack(b); err != nil {
		return nil, 0, err
	}
	if t := reply.IsTsig(); t != nil && mac != "" {
		if err := dns.TsigVerify(b, secrets[t.Hdr.Name], mac, false); err != nil {
			return nil, 0, err
		}
	}
	return reply, len(b), nil
}

// pack packs a message, and signs it if it has a TSIG.
func pack(m *dns.Msg, secrets map[string]string) (b []byte, mac string, err error) {
	t := m.IsTsig()
	if t == nil {
		b, err = m.Pack()
		return b, "", err
	}
	return dns.TsigGenerate(m.Copy(), secrets[t.Hdr.Name], "", false)
}

// overHTTPS sends as RFC 8484 says.
func overHTTPS(addr string, conf *tls.Config) exchanger {
	client := &http.Client{
		Timeout:   askTimeout,
		Transport: &http.Transport{TLSClientConfig: conf, ForceAttemptHTTP2: true, DisableKeepAlives: true},
	}
	return func(m *dns.Msg) (*dns.Msg, int, error) {
		b, err := m.Pack()
		if err != nil {
			return nil, 0, err
		}
		res, err := client.Post("https://"+addr+"/dns-query", "application/dns-message", bytes.NewReader(b))
		if err != nil {
			return nil, 0, err
		}
		defer res.Body.Close()
		if b, err = io.ReadAll(res.Body); err != nil {
			return nil, 0, err
		}
		if res.StatusCode != http.StatusOK {
			return nil, 0, fmt.Errorf("%s: %s", res.Status, b)
		}
		reply := new(dns.Msg)
		return reply, len(b), reply.Unpack(b)
	}
}

// from is UDP from another address of this machine.
func from(ip, addr string) exchanger {
	return over(&dns.Client{Net: "udp", Dialer: &net.Dialer{LocalAddr: &net.UDPAddr{IP: net.ParseIP(ip)}}}, addr)
}

// ask asks and fails the test when there is no proper reply.
func ask(t testing.TB, send exchanger, m *dns.Msg) *dns.Msg {
	t.Helper()
	reply, _ := askWire(t, send, m)
	return reply
}

// askWire is ask with the reply's length on the wire.
func askWire(t testing.TB, send exchanger, m *dns.Msg) (*dns.Msg, int) {
	t.Helper()
	reply, n, err := send(m)
	if err != nil {
		t.Fatalf("%s: %v", m.Question[0].String(), err)
	}
	if err := isReply(reply, m); err != nil {
		t.Fatal(err)
	}
	return reply, n
}

// isReply checks what every reply must have of its query, the letters of the name included.
func isReply(reply, m *dns.Msg) error {
	switch {
	case reply.Id != m.Id || !reply.Response || reply.Opcode != m.Opcode:
		return fmt.Errorf("not a reply: %v", reply)
	case len(reply.Question) != 1 || reply.Question[0] != m.Question[0]:
		return fmt.Errorf("the reply to %v is to %v", m.Question, reply.Question)
	case reply.RecursionDesired != m.RecursionDesired || reply.CheckingDisabled != m.CheckingDisabled:
		return fmt.Errorf("RD and CD are not those of the query: %v", reply)
	case (reply.IsEdns0() != nil) != (m.IsEdns0() != nil):
		return fmt.Errorf("OPT in the query: %v, in the reply: %v", m.IsEdns0() != nil, reply.IsEdns0() != nil)
	}
	return nil
}

// ttl is the TTL of the first record of a reply.
func ttl(t testing.TB, m *dns.Msg) uint32 {
	t.Helper()
	for _, section := range [][]dns.RR{m.Answer, m.Ns} {
		for _, rr := range section {
			return rr.Header().Ttl
		}
	}
	t.Fatalf("no records: %v", m)
	return 0
}

// sum adds up the samples of a metric that have all of the labels, each as `name="value"`.
func sum(t testing.TB, addr, metric string, labels ...string) float64 {
	t.Helper()
	total := 0.0
	for _, line := range scrape(t, addr) {
		name, rest := line, ""
		if i := strings.IndexAny(line, "{ "); i >= 0 {
			name, rest = line[:i], line[i:]
		}
		if name != metric || !containsAll(rest, labels) {
			continue
		}
		v, err := strconv.ParseFloat(line[strings.LastIndexByte(line, ' ')+1:], 64)
		if err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		total += v
	}
	return total
}

func containsAll(s string, parts []string) bool {
	for _, p := range parts {
		if !strings.Contains(s, p) {
			return false
		}
	}
	return true
}

// scrape returns the lines of /metrics.
func scrape(t testing.TB, addr string) []string {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), askTimeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+addr+"/metrics", nil)
	if err != nil {
		t.Fatal(err)
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err == nil && res.StatusCode != http.StatusOK {
		err = errors.New(res.Status)
	}
	if err != nil {
		t.Fatalf("/metrics: %v", err)
	}
	return strings.Split(string(b), "\n")
}

// certificate makes a certificate for 127.0.0.1 and returns its files, and what a client needs
// to trust it.
func certificate(t testing.TB) (cert, key string, trust *tls.Config) {
	t.Helper()
	check := func(err error) {
		if err != nil {
			t.Helper()
			t.Fatal(err)
		}
	}
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	check(err)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1),
		Subject:      pkix.Name{CommonName: "optcache test"},
		NotBefore:    time.Now().Add(-time.Hour),
		NotAfter:     time.Now().Add(time.Hour),
		IPAddresses:  []net.IP{net.IPv4(127, 0, 0, 1)},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &private.PublicKey, private)
	check(err)
	keyDER, err := x509.MarshalECPrivateKey(private)
	check(err)
	parsed, err := x509.ParseCertificate(der)
	check(err)

	dir := t.TempDir()
	cert, key = filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	check(os.WriteFile(cert, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600))
	check(os.WriteFile(key, pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: keyDER}), 0o600))
	pool := x509.NewCertPool()
	pool.AddCert(parsed)
	return cert, key, &tls.Config{RootCAs: pool}
}
