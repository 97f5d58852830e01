package control

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/optcache/optcache/test/freeport"
)

// A web page reaches no listener without a token, neither from elsewhere nor by a name that it makes resolve to here.
func TestWebPagesAreRefused(t *testing.T) {
	t.Parallel()
	type headers = map[string]string
	for _, c := range []struct {
		header headers
		word   string // of the refusal; empty: none
	}{
		{headers{"Host": "127.0.0.1:8053"}, ""},
		{headers{"Host": "127.1.2.3"}, ""},
		{headers{"Host": "[::1]:8053"}, ""},
		{headers{"Host": "[::1]"}, ""},
		{headers{"Host": "LocalHost:8053"}, ""},
		{headers{"Host": "attacker.example:8053"}, "Host"},
		{headers{"Host": "localhost.attacker.example"}, "Host"},
		{headers{"Host": "127.0.0.1.attacker.example"}, "Host"},
		{headers{"Host": "192.0.2.1:8053"}, "Host"},
		{headers{"Host": "0.0.0.0:8053"}, "Host"},
		{headers{"Host": "[::]:8053"}, "Host"},
		{headers{"Host": "2130706433"}, "Host"},
		{headers{"Host": "localhost:8053:x"}, "Host"},

		{headers{"Host": "localhost:8053", "Origin": "http://localhost:8053"}, ""},
		{headers{"Host": "localhost:8053", "Origin": "http://localhost:3000"}, "Origin"},
		{headers{"Host": "localhost:8053", "Origin": "https://localhost:8053"}, "Origin"},
		{headers{"Host": "localhost:8053", "Origin": "http://127.0.0.1:8053"}, "Origin"},
		{headers{"Host": "localhost:8053", "Origin": "https://attacker.example"}, "Origin"},
		{headers{"Host": "localhost:8053", "Origin": "null"}, "Origin"},
		{headers{"Host": "localhost:8053", "Origin": ""}, "Origin"},

		{headers{"Host": "localhost:8053", "Sec-Fetch-Site": "same-origin"}, ""},
		{headers{"Host": "localhost:8053", "Sec-Fetch-Site": "none"}, ""},
		{headers{"Host": "localhost:8053", "Sec-Fetch-Site": "cross-site"}, "Sec-Fetch-Site"},
		{headers{"Host": "localhost:8053", "Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "no-cors"}, "Sec-Fetch-Site"},
		{headers{"Host": "localhost:8053", "Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}, "Sec-Fetch-Site"},
	} {
		for _, method := range []string{"GET", "POST"} {
			b := &fakeBlock{}
			s := newServer(newHold(Options{Address: "127.0.0.1:8053"}, t, blocksOf(b)))
			q := request{method: method, target: "/v1/status", header: c.header}
			if method == "POST" {
				q.target, q.body = "/v1/flush", `{"all":true}`
			}
			w := q.ask(t, s)
			refused := c.word != ""
			if refused {
				wantProblem(t, w.Code, w.Header(), w.Body.Bytes(), http.StatusForbidden, c.word)
			} else if w.Code != 200 {
				t.Errorf("%s %v: %d %s", method, c.header, w.Code, w.Body)
			}
			if got := len(b.flushed) > 0; got != (method == "POST" && !refused) {
				t.Errorf("%s %v: flushed: %t", method, c.header, got)
			}
		}
	}
}

func TestTokens(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "token")
	writeFile(t, file, "secret\n", 0o600)
	s := newServer(newHold(Options{Address: "192.0.2.1:8053", TokenFile: file}, t, blocksOf(&fakeBlock{})))
	ask := func(authorization string) int {
		t.Helper()
		w := request{target: "/v1/status", header: map[string]string{"Authorization": authorization, "Host": "cache.example"}}.ask(t, s)
		switch w.Code {
		case 401:
			wantProblem(t, w.Code, w.Header(), w.Body.Bytes(), 401, "Bearer")
			if w.Header().Get("WWW-Authenticate") == "" {
				t.Error("no WWW-Authenticate")
			}
		case 503:
			wantProblem(t, w.Code, w.Header(), w.Body.Bytes(), 503, "its log says why")
		}
		return w.Code
	}
	for authorization, want := range map[string]int{
		"Bearer secret": 200, "bearer secret": 200, "Bearer  secret": 200,
		"": 401, "secret": 401, "Bearer": 401, "Bearer ": 401, "Bearer secre": 401, "Bearer secrets": 401, "Bearer SECRET": 401, "Bearer secret\n": 401, "Basic secret": 401,
	} {
		if got := ask(authorization); got != want {
			t.Errorf("%q: %d, not %d", authorization, got, want)
		}
	}
	for _, target := range []string{"/healthz", "/v1/openapi.json", "/nothing"} {
		if w := (request{target: target}).ask(t, s); w.Code != 401 {
			t.Errorf("%s without the token: %d", target, w.Code)
		}
	}
	// Another token of the same size, within the same tick of the file system's clock.
	writeFile(t, file, "public", 0o600)
	if ask("Bearer secret") != 401 || ask("Bearer public") != 200 {
		t.Error("the token has changed, and the old one counts")
	}
	// The file is replaced.
	writeFile(t, file+".new", "third", 0o600)
	if err := os.Rename(file+".new", file); err != nil {
		t.Fatal(err)
	}
	if ask("Bearer public") != 401 || ask("Bearer third") != 200 {
		t.Error("the token has changed, and the old one counts")
	}
	// While there is no token, nobody is let in.
	for what, spoil := range map[string]func(){
		"empty":    func() { writeFile(t, file, "\n", 0o600) },
		"two":      func() { writeFile(t, file, "third\nthird\n", 0o600) },
		"readable": func() { writeFile(t, file, "third", 0o644) },
		"gone":     func() { os.Remove(file) },
	} {
		spoil()
		for _, token := range []string{"third", "", "public"} {
			if got := ask("Bearer " + token); got != 503 {
				t.Errorf("%s: %d for %q", what, got, token)
			}
		}
	}
	writeFile(t, file, "third", 0o600)
	if ask("Bearer third") != 200 {
		t.Error("the file is there again, and its token does not count")
	}
}

// A unix socket with a token needs both: the rights and the token.
func TestTokenOfUnixSocket(t *testing.T) {
	t.Parallel()
	o := atSocket(t)
	o.TokenFile = filepath.Join(t.TempDir(), "token")
	writeFile(t, o.TokenFile, "secret", 0o400)
	listening(t, o, t, &fakeBlock{})
	mustGet(t, clientOf(t, Addrs(t)[0]), "http://x/v1/status", 401)
}

func TestTokenFiles(t *testing.T) {
	t.Parallel()
	if runtime.GOOS == "windows" {
		t.Skip("modes say nothing on Windows")
	}
	dir := t.TempDir()
	file := filepath.Join(dir, "token")
	for _, c := range []struct {
		text string
		mode os.FileMode
		word string
	}{
		{"secret", 0o600, ""}, {"secret\n", 0o400, ""}, {"secret\r\n", 0o600, ""},
		{"", 0o600, "is empty"}, {"\n", 0o600, "is empty"}, {"a\nb", 0o600, "more than one line"}, {"a\n\n", 0o600, "more than one line"}, {"a\rb", 0o600, "more than one line"},
		{"a b", 0o600, "printable"}, {"a\x00", 0o600, "printable"}, {"é", 0o600, "printable"}, {" a", 0o600, "printable"},
		{strings.Repeat("a", maxTokenFile+1), 0o600, "4096"},
		{"secret", 0o640, "0600"}, {"secret", 0o604, "0600"}, {"secret", 0o620, "0600"}, {"secret", 0o666, "0600"},
	} {
		os.Remove(file)
		writeFile(t, file, c.text, c.mode)
		_, err := loadToken([]string{file})
		if c.word == "" && err != nil || c.word != "" && (err == nil || !strings.Contains(err.Error(), c.word) || !strings.HasPrefix(err.Error(), "token: ")) {
			t.Errorf("%q, %#o: %v", c.text, c.mode, err)
		}
		if err != nil && strings.Contains(err.Error(), "secret") {
			t.Errorf("the error shows the token: %v", err)
		}
	}
	for path, word := range map[string]string{dir: "no regular file", filepath.Join(dir, "none"): "no such file"} {
		if _, err := loadToken([]string{path}); err == nil || !strings.Contains(err.Error(), word) {
			t.Errorf("%s: %v", path, err)
		}
	}
}

// A Secret is mounted with files that all may read, behind two links.
func TestMountedSecret(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	mount := func(version, token string, mode os.FileMode) {
		t.Helper()
		if err := os.Mkdir(filepath.Join(dir, version), 0o755); err != nil {
			t.Fatal(err)
		}
		writeFile(t, filepath.Join(dir, version, "token"), token, mode)
		if err := os.Symlink(version, filepath.Join(dir, "..tmp")); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(filepath.Join(dir, "..tmp"), filepath.Join(dir, "..data")); err != nil {
			t.Fatal(err)
		}
	}
	file := filepath.Join(dir, "token")
	if err := os.Symlink("..data/token", file); err != nil {
		t.Fatal(err)
	}
	mount("..1", "one", 0o644)
	h := newHold(Options{Address: "127.0.0.1:1", TokenFile: file}, t, nil)
	one, err := h.token.get()
	if err != nil {
		t.Fatal(err)
	}
	mount("..2", "two", 0o440)
	if two, err := h.token.get(); err != nil || one == two {
		t.Errorf("the Secret has changed: %v", err)
	}
	mount("..3", "three", 0o666)
	if _, err := h.token.get(); err == nil {
		t.Error("a token that others may write")
	}
	// A link of another kind proves nothing.
	other := filepath.Join(dir, "other")
	if err := os.Symlink("..1/token", other); err != nil {
		t.Fatal(err)
	}
	if _, err := loadToken([]string{other}); err == nil {
		t.Error("a token that others may read")
	}
}

// certificate writes a pair of files, and returns what trusts it.
func certificate(t *testing.T, dir string, serial int64) (*x509.CertPool, string, string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(serial), Subject: pkix.Name{CommonName: "control"}, NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true,
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, DNSNames: []string{"localhost"},
	}
	cert, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	certFile, keyFile := filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	writeFile(t, keyFile, string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private})), 0o600)
	writeFile(t, certFile, string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert})), 0o600)
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert}))
	return pool, certFile, keyFile
}

func TestTLS(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	pool, cert, key := certificate(t, dir, 1)
	o := Options{Address: freeport.Address(t, "127.0.0.1"), CertFile: cert, KeyFile: key}
	listening(t, o, t, &fakeBlock{})
	at := Addrs(t)[0].String()
	https := func(pool *x509.CertPool, newest uint16) (*http.Response, error) {
		tr := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool, MaxVersion: newest}, DisableKeepAlives: true}
		r, err := (&http.Client{Transport: tr, Timeout: 10 * time.Second}).Get("https://" + at + "/v1/status")
		if err == nil {
			r.Body.Close()
		}
		return r, err
	}
	if r, err := https(pool, 0); err != nil || r.StatusCode != 200 || r.TLS.PeerCertificates[0].SerialNumber.Int64() != 1 {
		t.Fatalf("%v %v", r, err)
	}
	if _, err := https(pool, tls.VersionTLS12); err != nil {
		t.Error(err)
	}
	if _, err := https(pool, tls.VersionTLS11); err == nil {
		t.Error("TLS 1.1 is spoken")
	}
	if code, _, err := get(http.DefaultClient, "http://"+at+"/v1/status"); err == nil && code != 400 {
		t.Errorf("without TLS: %d", code)
	}
	newer, _, _ := certificate(t, dir, 2)
	if r, err := https(newer, 0); err != nil || r.TLS.PeerCertificates[0].SerialNumber.Int64() != 2 {
		t.Errorf("the certificate has changed: %v", err)
	}
	// A pair that is half written does not end the service.
	writeFile(t, key, "nothing", 0o600)
	if _, err := https(newer, 0); err != nil {
		t.Error(err)
	}
}

// A connection from before the Corefile asked for TLS is not used on.
func TestTLSBegins(t *testing.T) {
	t.Parallel()
	_, cert, key := certificate(t, t.TempDir(), 1)
	o := Options{Address: freeport.Address(t, "127.0.0.1")}
	listening(t, o, "plain "+t.Name(), &fakeBlock{})
	at := Addrs("plain " + t.Name())[0]
	c := clientOf(t, at)
	mustGet(t, c, "http://127.0.0.1/v1/status", 200)

	servers.mu.Lock()
	for _, s := range servers.byAddress {
		if s.listener.Addr() == at {
			s.now.Store(newHold(Options{Address: o.Address, CertFile: cert, KeyFile: key}, t, blocksOf()))
		}
	}
	servers.mu.Unlock()
	mustGet(t, c, "http://127.0.0.1/v1/status", http.StatusMisdirectedRequest)
}

func TestOptions(t *testing.T) {
	t.Parallel()
	dir := socketDir(t)
	token, file := filepath.Join(dir, "token"), filepath.Join(dir, "file")
	writeFile(t, token, "secret", 0o600)
	writeFile(t, file, "", 0o600)
	_, cert, key := certificate(t, dir, 1)
	for _, c := range []struct {
		o    Options
		word string
	}{
		{Options{Address: "127.0.0.1:8053"}, ""},
		{Options{Address: "127.9.9.9:8053"}, ""},
		{Options{Address: "[::1]:8053"}, ""},
		{Options{Address: "localhost:8053"}, ""},
		{Options{Address: "unix://" + dir + "/c.sock"}, ""},
		{Options{Address: "192.0.2.1:8053", TokenFile: token}, ""},
		{Options{Address: ":8053", TokenFile: token}, ""},
		{Options{Address: "127.0.0.1:8053", CertFile: cert, KeyFile: key}, ""},

		{Options{}, `""`},
		{Options{Address: "8053"}, `"8053"`},
		{Options{Address: "localhost"}, `"localhost"`},
		{Options{Address: "localhost:http"}, `"http" is no port`},
		{Options{Address: "localhost:"}, `"" is no port`},
		{Options{Address: "localhost:65536"}, `"65536" is no port`},
		{Options{Address: "http://localhost:8053"}, "HOST:PORT"},
		{Options{Address: "/run/c.sock"}, "HOST:PORT"},
		{Options{Address: ":8053"}, "without a token"},
		{Options{Address: "0.0.0.0:8053"}, "without a token"},
		{Options{Address: "[::]:8053"}, "without a token"},
		{Options{Address: "192.0.2.1:8053"}, "without a token"},
		{Options{Address: "cache.example:8053"}, "without a token"},
		{Options{Address: "192.0.2.1:8053", CertFile: cert, KeyFile: key}, "without a token"},

		{Options{Address: "unix://c.sock"}, "absolute"},
		{Options{Address: "unix://"}, "absolute"},
		{Options{Address: "unix:///run/../c.sock"}, "absolute"},
		{Options{Address: "unix://" + dir + "/none/at/c.sock"}, "directory"},
		{Options{Address: "unix://" + file + "/c.sock"}, "directory"},
		{Options{Address: "unix://" + file}, "no socket"},
		{Options{Address: "unix://" + dir}, "no socket"},
		{Options{Address: "unix://" + dir + "/" + strings.Repeat("a", 108)}, "bytes"},
		{Options{Address: "unix://" + dir + "/c.sock", CertFile: cert, KeyFile: key}, "tls"},

		{Options{Address: "127.0.0.1:8053", TokenFile: file}, "token"},
		{Options{Address: "127.0.0.1:8053", TokenFile: dir + "/none"}, "token"},
		{Options{Address: "127.0.0.1:8053", CertFile: cert}, "tls"},
		{Options{Address: "127.0.0.1:8053", KeyFile: key}, "tls"},
		{Options{Address: "127.0.0.1:8053", CertFile: key, KeyFile: cert}, "tls"},
		{Options{Address: "127.0.0.1:8053", CertFile: dir + "/none", KeyFile: key}, "none"},
	} {
		err := c.o.Check()
		if c.word == "" && err != nil || c.word != "" && (err == nil || !strings.Contains(err.Error(), c.word) || strings.Contains(err.Error(), "\n")) {
			t.Errorf("%+v: %v", c.o, err)
		}
		if c.word != "" {
			if err := Listen(c.o, t, blocksOf()); err == nil {
				Release(t)
				t.Errorf("%+v: it listens", c.o)
			}
		}
	}
	if at := Addrs(t); at != nil {
		t.Error(fmt.Sprint(at))
	}
}
