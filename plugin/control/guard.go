package control

import (
	"crypto/sha256"
	"crypto/subtle"
	"crypto/tls"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"strings"

	"github.com/optcache/optcache/plugin/control/page"
)

// hold is what a generation of the Corefile has at a listener: its blocks, and what it asks of clients.
type hold struct {
	key    any
	opts   Options
	blocks func() []Block
	gate   *gate // requests that blocks work on

	token *watched[[sha256.Size]byte] // nil: none
	tls   *tls.Config                 // nil: no TLS
}

func newHold(o Options, key any, blocks func() []Block) *hold {
	h := &hold{key: key, opts: o, blocks: blocks, gate: newGate()}
	if o.TokenFile != "" {
		h.token = &watched[[sha256.Size]byte]{paths: []string{o.TokenFile}, load: loadToken}
	}
	if o.CertFile != "" {
		h.tls = tlsConfig(o.CertFile, o.KeyFile)
	}
	return h
}

// tlsConfig returns a configuration whose certificate is read again when its files change. While they cannot be read,
// the certificate of before is used.
func tlsConfig(cert, key string) *tls.Config {
	pair := &watched[*tls.Certificate]{paths: []string{cert, key}, load: loadCertificate}
	return &tls.Config{
		MinVersion: tls.VersionTLS12,
		NextProtos: []string{"http/1.1"},
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
			c, err := pair.get()
			if err != nil {
				faults.Warningf("control: %v", err)
			}
			if c != nil {
				return c, nil
			}
			return nil, err
		},
	}
}

// admit returns why a request is refused, or nil.
func (h *hold) admit(r *http.Request) *problem {
	if h.tls != nil && r.TLS == nil {
		// The connection is older than the Corefile that asks for TLS.
		return &problem{Status: http.StatusMisdirectedRequest, Detail: "this listener speaks TLS now"}
	}
	if h.token != nil {
		if _, ok := page.Files[r.URL.Path]; ok {
			return nil // a browser sends no token with a link; the page asks for it, and has nothing without it
		}
		return h.admitBearer(r)
	}
	if _, ok := h.opts.socket(); ok {
		return nil // the socket's mode decides which users may ask, and no web page reaches it
	}
	return admitLocal(r)
}

// admitBearer lets those pass that have the token. Tokens are compared by their sums, in constant time, so that neither
// their letters nor their length shows in the time that it takes.
func (h *hold) admitBearer(r *http.Request) *problem {
	want, err := h.token.get()
	if err != nil {
		faults.Errorf("control: nobody is let in: %v", err)
		return &problem{Status: http.StatusServiceUnavailable, Detail: "the server cannot read its token; its log says why"}
	}
	given := r.Header.Values("Authorization")
	if len(given) == 1 {
		scheme, token, _ := strings.Cut(given[0], " ")
		sum := sha256.Sum256([]byte(strings.TrimLeft(token, " ")))
		if strings.EqualFold(scheme, "Bearer") && subtle.ConstantTimeCompare(sum[:], want[:]) == 1 {
			return nil
		}
	}
	return &problem{Status: http.StatusUnauthorized, Detail: "the header Authorization: Bearer with the server's token is needed"}
}

// admitLocal keeps web pages out of a listener without a token. A page of elsewhere names itself in Origin or
// Sec-Fetch-Site. A page whose name was made to resolve to this machine (DNS rebinding) has its own name in Host.
func admitLocal(r *http.Request) *problem {
	host := r.Host
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = h
	}
	if !isLoopback(strings.Trim(host, "[]")) {
		return &problem{Status: http.StatusForbidden, Detail: fmt.Sprintf("Host: %q is not a loopback name or address", r.Host)}
	}
	for _, origin := range r.Header.Values("Origin") {
		from, err := url.Parse(origin)
		if err != nil || from.Scheme != scheme(r) || !strings.EqualFold(from.Host, r.Host) {
			return &problem{Status: http.StatusForbidden, Detail: fmt.Sprintf("Origin: %q is elsewhere", origin)}
		}
	}
	switch site := r.Header.Get("Sec-Fetch-Site"); site {
	case "", "none", "same-origin":
	default:
		// A link on another page to the page here may be followed; nothing else of it comes here.
		if _, isPage := page.Files[r.URL.Path]; !isPage || r.Method != http.MethodGet || r.Header.Get("Sec-Fetch-Mode") != "navigate" {
			return &problem{Status: http.StatusForbidden, Detail: fmt.Sprintf("Sec-Fetch-Site: %q is elsewhere", site)}
		}
	}
	return nil
}

func scheme(r *http.Request) string {
	if r.TLS != nil {
		return "https"
	}
	return "http"
}
