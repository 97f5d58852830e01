// Package client speaks the HTTP of a control interface: where it is, who asks, and what comes back. What the requests mean, and how
// answers are shown, is the command's.
package client

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/url"
	"os"
	"strings"
	"time"

	"github.com/optcache/optcache/plugin/control/api"
)

const (
	// dialTimeout bounds connecting, and the TLS handshake after it.
	dialTimeout = 5 * time.Second

	// continueTimeout is how long a long body waits for the server's word that it may come.
	continueTimeout = 5 * time.Second

	// maxBody is the most bytes of one answer. The largest is a page of a list with records.
	maxBody = 256 << 20

	// maxTokenFile is the most bytes of a token's file.
	maxTokenFile = 64 << 10

	// maxCAFile is the most bytes of a file of certificates.
	maxCAFile = 4 << 20

	jsonForm = "application/json"
)

// Options say how to reach a control interface.
type Options struct {
	Address   Address
	TokenFile string        // or empty; it is read for each request
	CAFile    string        // certificates that are trusted instead of the system's, or empty
	Timeout   time.Duration // of one request, with its answer; of a stream, from one piece to the next
	Agent     string        // for the User-Agent, with its version
	NoToken   string        // what to do where the server wants a token, and none is given
	Instance  string        // of a server that asks, as the header api.InstanceHeader; empty: it is not one
	MaxAnswer int64         // bytes of an answer that is no stream; 0: maxBody

	// Read reads a file, of that many bytes at most; nil: whatever kind of file it is.
	Read func(path string, most int64) ([]byte, error)
}

// Client asks a control interface. It is safe for concurrent use.
type Client struct {
	http *http.Client
	Options
}

// New returns a client. It connects when it is first asked for something.
func New(o Options) (*Client, error) {
	dialer := &net.Dialer{Timeout: dialTimeout}
	t := &http.Transport{
		// No proxy of the environment: a token is for the server, and a socket has none.
		DialContext:         dialer.DialContext,
		TLSHandshakeTimeout: dialTimeout,
		// A server that refuses a long body says so before it is sent. While it is sent, what is said may be lost.
		ExpectContinueTimeout: continueTimeout,
		TLSClientConfig:       &tls.Config{MinVersion: tls.VersionTLS12},
	}
	if o.Address.socket != "" {
		t.DialContext = func(ctx context.Context, _, _ string) (net.Conn, error) {
			return dialer.DialContext(ctx, "unix", o.Address.socket)
		}
	}
	if o.CAFile != "" {
		if o.Address.base.Scheme != "https" {
			return nil, fmt.Errorf("a CA is for an https URL, and the address is %s", o.Address)
		}
		pem, err := o.read(o.CAFile, maxCAFile)
		if err != nil {
			return nil, err
		}
		t.TLSClientConfig.RootCAs = x509.NewCertPool()
		if !t.TLSClientConfig.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("%s has no certificate", o.CAFile)
		}
	}
	c := &Client{Options: o, http: &http.Client{
		Transport: t,
		// A token goes to the server that was named, and to no other.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}
	_, err := c.token()
	return c, err
}

// read reads a file, as Options.Read says.
func (o *Options) read(path string, most int64) ([]byte, error) {
	if o.Read != nil {
		return o.Read(path, most)
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, most+1))
	if err == nil && int64(len(b)) > most {
		err = fmt.Errorf("%s has more than %d bytes", path, most)
	}
	return b, err
}

// CloseIdle closes connections that no request uses.
func (c *Client) CloseIdle() { c.http.CloseIdleConnections() }

// token reads the token's file. Secrets are mounted with or without a newline at the end.
func (c *Client) token() (string, error) {
	if c.TokenFile == "" {
		return "", nil
	}
	b, err := c.read(c.TokenFile, maxTokenFile)
	if err != nil {
		return "", err
	}
	token := strings.TrimSpace(string(b))
	bad := func(r rune) bool { return r <= ' ' || r > '~' }
	if token == "" || strings.ContainsFunc(token, bad) {
		return "", fmt.Errorf("%s does not have a token: one word of printable ASCII", c.TokenFile)
	}
	return token, nil
}

// ConnectError says that there was no connection to the server, so that it has not seen the request.
type ConnectError struct {
	Address Address
	Err     error
}

func (e *ConnectError) Error() string {
	return fmt.Sprintf("no connection to %s: %v", e.Address, e.Err)
}

func (e *ConnectError) Unwrap() error { return e.Err }

// Refusal is an answer of the server that is no success.
type Refusal struct {
	Status int // of HTTP
	Detail string
}

func (e *Refusal) Error() string { return e.Detail }

// Get asks for path, which begins with a slash, and reads the JSON of the answer into reply. It returns the answer's body, too.
func (c *Client) Get(ctx context.Context, path string, query url.Values, reply any) ([]byte, error) {
	return c.ask(ctx, request{method: http.MethodGet, path: path, query: query}, reply)
}

// Alive asks whether the server answers. One that is busy with other requests does, too.
func (c *Client) Alive(ctx context.Context) error {
	p := c.patience(ctx)
	defer p.end()
	resp, err := c.do(p, request{method: http.MethodGet, path: "/healthz", empty: true})
	if err == nil {
		resp.Body.Close()
	}
	return err
}

// Post sends a request as JSON, and reads the JSON of the answer into reply. It returns the answer's body, too.
func (c *Client) Post(ctx context.Context, path string, message, reply any) ([]byte, error) {
	sent, err := json.Marshal(message)
	if err != nil {
		return nil, err
	}
	return c.ask(ctx, request{method: http.MethodPost, path: path, form: jsonForm, body: bytes.NewReader(sent), size: int64(len(sent))}, reply)
}

// Send is Post with a long body, of this media type and of size bytes; -1: size is not known. An error of reading the body is
// returned as it is.
func (c *Client) Send(ctx context.Context, path string, query url.Values, form string, body io.Reader, size int64, reply any) ([]byte, error) {
	return c.ask(ctx, request{method: http.MethodPost, path: path, query: query, form: form, body: body, size: size, long: true}, reply)
}

// Stream copies the answer to a GET, which has this media type, to a writer while it comes. It returns how many bytes have come. If
// the server does not send all, that is an error. An error of writing is returned as it is.
func (c *Client) Stream(ctx context.Context, path string, query url.Values, form string, to io.Writer) (n int64, err error) {
	p := c.patience(ctx)
	defer p.end()
	resp, err := c.do(p, request{method: http.MethodGet, path: path, query: query, accept: form})
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	var cut error
	n, err = io.Copy(to, &watched{from: resp.Body, each: p.more, fail: func(err error) { cut = err }})
	if cut != nil {
		return n, fmt.Errorf("%w; it is cut off after %d bytes", c.failed(p, cut, true), n)
	}
	return n, err
}

// patience ends a request that takes too long.
type patience struct {
	context.Context
	cancel context.CancelCauseFunc
	timer  *time.Timer
	each   time.Duration
}

var errTooLong = errors.New("it takes too long")

func (c *Client) patience(ctx context.Context) *patience {
	p := &patience{each: c.Timeout}
	p.Context, p.cancel = context.WithCancelCause(ctx)
	p.timer = time.AfterFunc(p.each, func() { p.cancel(errTooLong) })
	return p
}

// more is called when something has happened.
func (p *patience) more() { p.timer.Reset(p.each) }

func (p *patience) end() {
	p.timer.Stop()
	p.cancel(nil)
}

// watched says when something is read.
type watched struct {
	from io.Reader
	each func()
	fail func(error) // is told an error of from that is not its end
}

func (w *watched) Read(b []byte) (int, error) {
	n, err := w.from.Read(b)
	if n > 0 {
		w.each()
	}
	if err != nil && err != io.EOF {
		w.fail(err)
	}
	return n, err
}

// request is what is asked. Paths begin with a slash.
type request struct {
	method, path string
	query        url.Values
	accept       string // the media type of the answer; empty: JSON
	form         string // of the body
	body         io.Reader
	size         int64 // of the body, in bytes; -1: it is not known
	long         bool  // the body may take long
	empty        bool  // the answer has no body
}

// ask makes a request whose answer is JSON, and reads it into reply. The body is read to its end before anything is shown, so that a
// slow reader of the output keeps no connection busy.
func (c *Client) ask(ctx context.Context, r request, reply any) ([]byte, error) {
	p := c.patience(ctx)
	defer p.end()
	resp, err := c.do(p, r)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	body, err := c.bodyOf(p, resp)
	if err != nil {
		return nil, err
	}
	if err := json.Unmarshal(body, reply); err != nil {
		return nil, fmt.Errorf("the answer is not understood: %w", err)
	}
	return body, nil
}

func (c *Client) bodyOf(p *patience, resp *http.Response) ([]byte, error) {
	most := cmp.Or(c.MaxAnswer, maxBody)
	body, err := io.ReadAll(io.LimitReader(resp.Body, most+1))
	if err != nil {
		return nil, c.failed(p, err, true)
	}
	if int64(len(body)) > most {
		return nil, fmt.Errorf("the answer of %s has more than %d MiB", c.Address, most>>20)
	}
	return body, nil
}

// do makes one request. An answer that is no success, or not of the media type that is expected, is an error.
func (c *Client) do(p *patience, r request) (*http.Response, error) {
	u := *c.Address.base
	u.Path += r.path
	u.RawQuery = r.query.Encode()
	connected := false
	ctx := httptrace.WithClientTrace(p, &httptrace.ClientTrace{
		GetConn: func(string) { connected = false }, // again, if the server has closed an idle connection meanwhile
		GotConn: func(httptrace.GotConnInfo) { connected = true },
	})
	if r.long { // it is read by another goroutine, perhaps until after the answer
		r.body = &watched{from: r.body, each: p.more, fail: p.cancel}
	}
	req, err := http.NewRequestWithContext(ctx, r.method, u.String(), r.body)
	if err != nil {
		return nil, err
	}
	accept := cmp.Or(r.accept, jsonForm)
	req.Header.Set("Accept", accept)
	req.Header.Set("User-Agent", cmp.Or(c.Agent, "optcache"))
	if c.Instance != "" {
		req.Header.Set(api.InstanceHeader, c.Instance)
	}
	if r.body != nil {
		req.Header.Set("Content-Type", r.form)
		req.ContentLength = r.size
	}
	if r.long {
		req.Header.Set("Expect", "100-continue")
	}
	token, err := c.token()
	if err != nil {
		return nil, err
	}
	if token != "" {
		req.Header.Set("Authorization", "Bearer "+token)
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, c.failed(p, err, connected)
	}
	expected := http.StatusOK
	if r.empty {
		expected = http.StatusNoContent
	}
	if resp.StatusCode != expected {
		defer resp.Body.Close()
		body, err := c.bodyOf(p, resp)
		if err != nil {
			return nil, err
		}
		return nil, c.refusal(resp, body)
	}
	if got, _, _ := mime.ParseMediaType(resp.Header.Get("Content-Type")); got != accept && !r.empty {
		resp.Body.Close()
		return nil, fmt.Errorf("%s is no control interface: it answers %q, not %q", c.Address, got, accept)
	}
	return resp, nil
}

// failed makes one sentence of an error of net/http.
func (c *Client) failed(p *patience, err error, connected bool) error {
	cause := context.Cause(p)
	if cause != nil && cause != errTooLong { // the program is to end, or what is sent cannot be read
		return cause
	}
	timeout := cause != nil
	if t, ok := errors.AsType[interface {
		error
		Timeout() bool
	}](err); ok {
		timeout = timeout || t.Timeout()
	}
	if e, ok := errors.AsType[*url.Error](err); ok {
		err = e.Err
	}
	switch {
	case timeout && connected:
		return fmt.Errorf("no answer of %s in %v", c.Address, c.Timeout)
	case timeout:
		return &ConnectError{c.Address, errors.New("timeout")}
	case connected:
		return fmt.Errorf("the connection to %s failed: %w", c.Address, err)
	}
	if e, ok := errors.AsType[*net.OpError](err); ok && e.Op == "dial" && c.Address.socket != "" {
		err = e.Err // the path is in the address
	}
	if e, ok := errors.AsType[*os.SyscallError](err); ok && c.Address.socket != "" {
		err = e.Err
	}
	return &ConnectError{c.Address, err}
}

// refusal reads an answer that is no success. Something else than a control interface sends no problem+json.
func (c *Client) refusal(resp *http.Response, body []byte) error {
	r := &Refusal{Status: resp.StatusCode}
	var p api.Problem
	if form, _, _ := mime.ParseMediaType(resp.Header.Get("Content-Type")); form == "application/problem+json" && json.Unmarshal(body, &p) == nil {
		r.Detail = cmp.Or(p.Detail, p.Title)
	}
	if r.Detail == "" {
		r.Detail = fmt.Sprintf("%s answers %s with %s", c.Address, resp.Request.URL.Path, resp.Status)
	}
	if r.Status == http.StatusUnauthorized && c.TokenFile == "" && c.NoToken != "" {
		r.Detail = strings.TrimSuffix(r.Detail, ".") + "; " + c.NoToken
	}
	return r
}
