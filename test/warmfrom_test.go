package test

import (
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/miekg/dns"

	"github.com/optcache/optcache/test/freeport"
)

// A replica that starts takes over what a neighbour has, over TLS, with a token. It has the same Corefile as the neighbour, in which
// its own address comes first: it is not asked for its own dump. What is flushed on it does not come back, although a neighbour has it.
func TestWarmFromNeighbours(t *testing.T) {
	t.Parallel()
	u := newUpstream(t)
	cert, key, trust := certificate(t)
	token := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(token, []byte("hush-hush\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	const names = 50
	addresses := []string{freeport.Address(t, "127.0.0.1"), freeport.Address(t, "127.0.0.1")}
	replica := func(of int) *server {
		return start(t, block("dns", u.addr, "prometheus 127.0.0.1:${metrics}", fmt.Sprintf(`optcache {
		control %s token %s tls %s %s
		warm_from https://%s https://%s token %[2]s ca %[3]s
	}`, addresses[of], token, cert, key, addresses[1], addresses[0])))
	}
	loaded := func(s *server) float64 { return sum(t, s.addr("metrics"), "coredns_optcache_warm_from_loaded_entries") }
	first := replica(0) // nobody has answers: one neighbour is not there, the other is itself
	askHosts(t, first, names)
	second := replica(1)
	eventually(t, func() error {
		if n := loaded(second); n != names {
			return fmt.Errorf("%v answers are taken over", n)
		}
		return nil
	})
	if !second.waitFor("has taken over 50 answers of https://" + addresses[0]) {
		t.Error("the log does not say so")
	}
	before := u.count(hostName(7), dns.TypeA)
	askHosts(t, second, names)
	if n := u.count(hostName(7), dns.TypeA); n != before {
		t.Errorf("the upstream was asked %d times more", n-before)
	}
	if n := loaded(first); n != 0 {
		t.Errorf("the first one has taken over %v answers", n)
	}
	if log := first.out.String() + second.out.String(); strings.Contains(log, "hush-hush") {
		t.Error("the log has the token")
	}
	// Only who has the token gets a dump.
	c := http.Client{Transport: &http.Transport{TLSClientConfig: trust}}
	defer c.CloseIdleConnections()
	res, err := c.Get("https://" + addresses[0] + "/v1/dump")
	if err != nil {
		t.Fatal(err)
	}
	res.Body.Close()
	if res.StatusCode != http.StatusUnauthorized {
		t.Errorf("without a token: %s", res.Status)
	}
}

// A file that is no regular one does not stop the start: it is an error with its place.
func TestFilesThatBlock(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	fifo, secret := filepath.Join(dir, "fifo"), filepath.Join(dir, "secret")
	makeFIFO(t, fifo)
	if err := os.WriteFile(secret, []byte("a secret of the tests"), 0o600); err != nil {
		t.Fatal(err)
	}
	for what, lines := range map[string]string{
		"shared_secret":   "shared valkey://127.0.0.1:1\nshared_secret " + fifo,
		"shared_password": "shared valkey://127.0.0.1:1\nshared_secret " + secret + "\nshared_password " + fifo,
		"shared_tls":      "shared rediss://127.0.0.1:1\nshared_secret " + secret + "\nshared_tls " + fifo,
		"warm_from":       "warm_from https://127.0.0.1:1 token " + fifo,
		"warm_from ca":    "warm_from https://127.0.0.1:1 ca " + fifo,
		"control":         "control 127.0.0.1:${control} token " + fifo,
		"control tls":     "control 127.0.0.1:${control} tls " + fifo + " " + fifo,
	} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			s := launch(t, block("dns", "127.0.0.1:1", "optcache {\n"+lines+"\n}"))
			if !s.waitFor(fifo + " is no regular file") {
				t.Errorf("it says %q", s.out.String())
			}
			option, _, _ := strings.Cut(what, " ")
			if out := s.out.String(); !strings.Contains(out, "Corefile:") || !strings.Contains(out, option) {
				t.Errorf("no place, or no %s: %s", option, out)
			}
			s.stopped = true
			s.kill()
		})
	}
}
