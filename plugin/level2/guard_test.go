package level2

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/optcache/optcache/test/freeport"
	"github.com/optcache/optcache/test/redis"
)

// told is a connection on which a server says something, and hears nothing.
type told struct {
	net.Conn
	io.Reader
}

func (c told) Read(p []byte) (int, error)  { return c.Reader.Read(p) }
func (c told) Write(p []byte) (int, error) { return len(p), nil }

const (
	hello     = "*2\r\n$5\r\nHELLO\r\n$1\r\n3\r\n"
	get       = "*2\r\n$3\r\nGET\r\n$1\r\nk\r\n"
	subscribe = "*2\r\n$9\r\nSUBSCRIBE\r\n$1\r\nc\r\n"
)

func TestGuard(t *testing.T) {
	const message, subscribed = "3\r\n$7\r\nmessage\r\n$1\r\nc\r\n$1\r\nx\r\n", "3\r\n$9\r\nsubscribe\r\n$1\r\nc\r\n:1\r\n"
	for name, tc := range map[string]struct {
		sent, said string
		bad        string // the error; "": what is said is passed on whole
	}{
		"kinds":             {get + get + get + get + get + get, "+OK\r\n-ERR x\r\n:-5\r\n$3\r\na\nb\r\n$-1\r\n_\r\n", ""},
		"more kinds":        {get + get + get + get + get, "#t\r\n,1.5\r\n%1\r\n+a\r\n*2\r\n:1\r\n*-1\r\n~1\r\n=5\r\ntxt:x\r\n!3\r\nERR\r\n", ""},
		"news":              {hello + subscribe, "+OK\r\n>" + subscribed + ">" + message + ">" + message, ""},
		"news of RESP2":     {subscribe + get, "*" + subscribed + "*" + message + "*2\r\n$4\r\npong\r\n$0\r\n\r\n", ""},
		"two channels":      {hello + "*3\r\n$9\r\nSUBSCRIBE\r\n$1\r\nc\r\n$1\r\nd\r\n", "+OK\r\n>" + subscribed + ">" + message + ">" + subscribed, ""},
		"a third one":       {hello + "*3\r\n$9\r\nSUBSCRIBE\r\n$1\r\nc\r\n$1\r\nd\r\n", "+OK\r\n>" + subscribed + ">" + subscribed + ">" + subscribed, "not asked"},
		"no subscribing":    {hello + subscribe, "+OK\r\n-NOPERM no\r\n", ""},
		"unasked":           {get, "+OK\r\n+OK\r\n", "not asked"},
		"unasked news":      {get, ">" + message, "not asked"},
		"unasked subscribe": {hello + get, "+OK\r\n>" + subscribed, "not asked"},
		"another push":      {hello + subscribe, "+OK\r\n>2\r\n+invalidate\r\n_\r\n", "not asked"},
		"unsubscribed":      {hello + subscribe, "+OK\r\n>" + subscribed + ">3\r\n$11\r\nunsubscribe\r\n$1\r\nc\r\n:0\r\n", "not asked"},
		"queued":            {hello + subscribe, "+OK\r\n-QUEUED\r\n", "not asked"},
		"negative length":   {get, "$-2\r\n", "malformed"},
		"negative array":    {get, "*-2\r\n", "malformed"},
		"long string":       {get, "$9999999999\r\n", "too large"},
		"long array":        {get, "*70000\r\n", "too large"},
		"arrays in arrays":  {get, strings.Repeat("*1\r\n", 1000), "too large"},
		"many items":        {get, "*60000\r\n" + strings.Repeat("*0\r\n", 59_999) + "*6000\r\n", "too large"},
		"long line":         {get, "+" + strings.Repeat("x", mostReplyLine), "too large"},
		"chunks":            {get, "$?\r\n", "malformed"},
		"attributes":        {get, "|1\r\n+a\r\n+b\r\n", "malformed"},
		"a push in it":      {get, "*1\r\n>1\r\n+a\r\n", "malformed"},
		"HTTP":              {get, "HTTP/1.1 400 Bad Request\r\n", "malformed"},
		"no end":            {get, "$1\r\nabc", "malformed"},
		"no CR":             {get, "+OK\n", "malformed"},
	} {
		// What is sent and said may come in pieces of any length.
		for _, piece := range []int{1, 7, 1 << 20} {
			g := newGuard(told{Reader: strings.NewReader(tc.said)})
			for sent := tc.sent; sent != ""; {
				n := min(piece, len(sent))
				g.Write([]byte(sent[:n]))
				sent = sent[n:]
			}
			got, err := io.ReadAll(g)
			switch {
			case tc.bad == "" && (err != nil || string(got) != tc.said):
				t.Errorf("%s: %q, %v", name, got, err)
			case tc.bad != "" && (err == nil || !strings.Contains(err.Error(), tc.bad)):
				t.Errorf("%s: %v", name, err)
			}
		}
	}
}

func FuzzGuard(f *testing.F) {
	f.Add([]byte("*2\r\n$1\r\na\r\n:1\r\n"))
	f.Add([]byte("%1\r\n+a\r\n_\r\n>3\r\n$7\r\nmessage\r\n+c\r\n+x\r\n"))
	f.Fuzz(func(t *testing.T, said []byte) {
		g := newGuard(told{Reader: bytes.NewReader(said)})
		g.Write([]byte(hello + subscribe + get + get))
		got, _ := io.ReadAll(g)
		if !bytes.HasPrefix(said, got) {
			t.Errorf("%q is passed on as %q", said, got)
		}
	})
}

// A server that is none, or does not mean well, costs its connection. The process goes on, and so does the client.
func TestHostileServers(t *testing.T) {
	const greeting = "%1\r\n$5\r\nproto\r\n:3\r\n+OK\r\n+OK\r\n"
	for name, says := range map[string]string{
		"a negative length": "$-2\r\n",
		"no memory":         "*9223372036854775807\r\n",
		"what nobody asked": greeting + strings.Repeat("+OK\r\n", 100),
		"a push":            greeting + strings.Repeat(">3\r\n+subscribe\r\n+c\r\n:1\r\n", 10),
		"HTTP":              "HTTP/1.1 400 Bad Request\r\n\r\n",
	} {
		t.Run(name, func(t *testing.T) {
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			met := make(chan bool, 100)
			go func() {
				for {
					conn, err := l.Accept()
					if err != nil {
						return
					}
					go func() {
						defer conn.Close()
						conn.Read(make([]byte, 4096))
						conn.Write([]byte(says))
						conn.SetReadDeadline(time.Now().Add(5 * time.Second))
						io.Copy(io.Discard, conn) // until the client ends it
						select {
						case met <- true:
						default:
						}
					}()
				}
			}()
			servers, err := ParseServers([]string{"valkey://" + l.Addr().String()})
			if err != nil {
				t.Fatal(err)
			}
			ignore := func(string, ...any) {}
			c := New(Options{Servers: servers, Timeout: time.Second, Infof: ignore, Warningf: ignore}, sealerOf(t, secretA), NewCounts())
			c.Start()
			defer c.Close()
			for range 2 {
				select {
				case <-met:
				case <-time.After(20 * time.Second):
					t.Fatal("the client does not end the connection")
				}
			}
			if !c.Away() {
				t.Error("the client asks it")
			}
		})
	}
}

// A server with TLS is asked over TLS, and only if its certificate is one that is trusted.
func TestServerWithTLS(t *testing.T) {
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		IsCA: true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &private.PublicKey, private)
	if err != nil {
		t.Fatal(err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	cert, key := filepath.Join(t.TempDir(), "cert.pem"), filepath.Join(t.TempDir(), "key.pem")
	certPEM := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	for path, text := range map[string][]byte{cert: certPEM, key: pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8})} {
		if err := os.WriteFile(path, text, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	port := freeport.Port(t)
	server := redis.Start(t, "--tls-port", fmt.Sprint(port), "--tls-cert-file", cert, "--tls-key-file", key, "--tls-ca-cert-file", cert, "--tls-auth-clients", "no")
	servers, err := ParseServers([]string{fmt.Sprintf("rediss://127.0.0.1:%d", port)})
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(certPEM)
	r := join(t, server, func(o *Options) { o.Servers, o.TLS = servers, &tls.Config{RootCAs: roots} }).ready(t)
	r.has(t, example, 300)
	if _, _, how := r.get(example); how != Hit {
		t.Errorf("an answer: %s", OutcomeNames[how])
	}
	stranger := join(t, server, func(o *Options) { o.Servers = servers })
	until(t, "the certificate is refused", func() bool { return strings.Contains(stranger.log(), "certificate") })
	if !stranger.Away() {
		t.Error("a server with another certificate is asked")
	}
}
