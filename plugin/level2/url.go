package level2

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/valkey-io/valkey-go"

	"github.com/optcache/optcache/plugin/pkg/regular"
)

// This file reads what a Corefile says of the servers.

// Servers are the servers of a second level. Their text, as of String, has no password.
type Servers struct {
	Addresses      []string // HOST:PORT
	Cluster        bool
	Sentinel       string // name of the set that sentinels watch; "" without them
	TLS            bool
	Database       int
	User, password string
}

const defaultPort = "6379"

// schemes are the schemes of URLs. An s at the end of the protocol is TLS.
var schemes = []string{"valkey", "valkeys", "redis", "rediss"}

// ParseServers reads URLs:
//
//	valkey://[USER:PASSWORD@]HOST[:PORT][/DATABASE]
//	valkey+cluster://[USER:PASSWORD@]HOST[:PORT]
//	valkey+sentinel://[USER:PASSWORD@]HOST[:PORT]/SET[/DATABASE]
//
// redis is the same as valkey; valkeys and rediss use TLS. Several URLs are nodes of one cluster, or sentinels of one set. Errors
// show no password.
func ParseServers(urls []string) (s Servers, err error) {
	for i, text := range urls {
		one, err := parseServer(text)
		if err != nil {
			return s, err
		}
		if i == 0 {
			s = one
			continue
		}
		switch {
		case !s.Cluster && s.Sentinel == "":
			return s, fmt.Errorf("%q is a second server: several need valkey+cluster:// or valkey+sentinel://", one.Addresses[0])
		case one.Cluster != s.Cluster || one.Sentinel != s.Sentinel || one.TLS != s.TLS || one.Database != s.Database || one.User != s.User || one.password != s.password:
			return s, fmt.Errorf("%q says something else than the first URL, beside the address", one.Addresses[0])
		}
		s.Addresses = append(s.Addresses, one.Addresses...)
	}
	if len(s.Addresses) == 0 {
		return s, errors.New("there is no URL")
	}
	return s, nil
}

// errUnreadable is instead of errors that show a part of the URL, and with it of the password.
var errUnreadable = errors.New("there is a URL that cannot be read; special letters of a password are written as %XX")

func parseServer(text string) (s Servers, err error) {
	u, err := url.Parse(text)
	if err != nil {
		return s, errUnreadable
	}
	if strings.Contains(u.EscapedPath()+"?"+u.RawQuery+"#"+u.Fragment+u.Opaque, "@") { // the password has a letter that ends the host
		return s, errUnreadable
	}
	shown := u.Scheme + "://" + u.Host + u.EscapedPath()
	protocol, mode, _ := strings.Cut(u.Scheme, "+")
	if !slices.Contains(schemes, protocol) {
		return s, fmt.Errorf("%q: %q is none of valkey, valkeys, redis and rediss", shown, protocol)
	}
	s.TLS = protocol == "valkeys" || protocol == "rediss"
	host, port := u.Hostname(), u.Port()
	if host == "" {
		return s, fmt.Errorf("%q has no host", shown)
	}
	if port == "" {
		if port = defaultPort; mode == "sentinel" {
			port = "26379"
		}
	}
	if n, err := strconv.Atoi(port); err != nil || n < 1 || n > 65535 {
		return s, fmt.Errorf("%q: %q is no port", shown, port)
	}
	s.Addresses = []string{net.JoinHostPort(host, port)}
	if u.User != nil {
		s.User = u.User.Username()
		s.password, _ = u.User.Password()
	}
	if u.RawQuery != "" || u.Fragment != "" {
		return s, fmt.Errorf("%q: nothing may follow the path", shown)
	}
	path := strings.Split(strings.TrimPrefix(u.Path, "/"), "/")
	switch mode {
	case "":
	case "cluster":
		s.Cluster = true
		if u.Path != "" && u.Path != "/" && u.Path != "/0" {
			return s, fmt.Errorf("%q: a cluster has database 0 only", shown)
		}
		return s, nil
	case "sentinel":
		if s.Sentinel = path[0]; s.Sentinel == "" {
			return s, fmt.Errorf("%q: the name of the set that the sentinels watch is missing: /SET", shown)
		}
		path = path[1:]
	default:
		return s, fmt.Errorf("%q: %q is neither cluster nor sentinel", shown, mode)
	}
	if len(path) > 0 && path[0] != "" {
		if s.Database, err = strconv.Atoi(path[0]); err != nil || s.Database < 0 || s.Database > 1<<16 || len(path) > 1 {
			return s, fmt.Errorf("%q: %q is no number of a database", shown, strings.Join(path, "/"))
		}
	}
	return s, nil
}

// String returns the servers' addresses, without user and password.
func (s *Servers) String() string {
	kind := "valkey"
	switch {
	case s.Cluster:
		kind = "valkey+cluster"
	case s.Sentinel != "":
		kind = "valkey+sentinel"
	}
	if s.TLS {
		kind = strings.Replace(kind, "valkey", "valkeys", 1)
	}
	return kind + "://" + strings.Join(s.Addresses, ",")
}

// ParseResolver reads the address of a resolver: IP or IP:PORT.
func ParseResolver(text string) (string, error) {
	if ip, err := netip.ParseAddr(text); err == nil {
		return net.JoinHostPort(ip.String(), "53"), nil
	}
	if at, err := netip.ParseAddrPort(text); err == nil && at.Port() != 0 {
		return at.String(), nil
	}
	return "", fmt.Errorf("%q is not IP or IP:PORT", text)
}

const (
	dialTimeout = time.Second
	// callTimeout is for how long a server may be silent before its connection is closed. Clients do not wait for that.
	callTimeout = time.Second
)

// clientOption returns what the library needs. Names of servers are resolved by a resolver of the options, or by the system's.
// Nobody waits for that but the goroutine that connects: a miss is answered by upstream meanwhile, so that a name that this very
// server answers is no deadlock.
func (o *Options) clientOption() valkey.ClientOption {
	s := &o.Servers
	dialer := net.Dialer{Timeout: dialTimeout, KeepAlive: 15 * time.Second}
	if o.Resolver != "" {
		dialer.Resolver = &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
			return (&net.Dialer{Timeout: dialTimeout}).DialContext(ctx, network, o.Resolver)
		}}
	}
	to := valkey.ClientOption{
		InitAddress: slices.Clone(s.Addresses), SelectDB: s.Database, ClientName: "optcache", Dialer: dialer,
		DialCtxFn: dial, DisableCache: true, DisableRetry: true, AlwaysPipelining: true, PipelineMultiplex: -1, BlockingPoolSize: 4,
		ConnWriteTimeout: callTimeout, ReadBufferEachConn: 64 << 10, WriteBufferEachConn: 64 << 10, ShuffleInit: true,
		ForceSingleClient: !s.Cluster, ClusterOption: valkey.ClusterOption{ShardsRefreshInterval: 5 * time.Second, MaxMovedRedirections: 3},
		AuthCredentialsFn: func(valkey.AuthCredentialsContext) (valkey.AuthCredentials, error) {
			password, err := o.passwordNow()
			return valkey.AuthCredentials{Username: s.User, Password: password}, err
		},
	}
	if s.Sentinel != "" { // the library would give the sentinels the same function, and they have other passwords, or none
		to.AuthCredentialsFn = nil
		to.Username = s.User
		to.Password, _ = o.passwordNow()
		to.Sentinel = valkey.SentinelOption{MasterSet: s.Sentinel, Dialer: dialer, ClientName: "optcache", TopologyRefreshInterval: 5 * time.Second}
	}
	if s.TLS {
		to.TLSConfig = &tls.Config{MinVersion: tls.VersionTLS12}
		if o.TLS != nil {
			to.TLSConfig = o.TLS.Clone()
		}
		to.Sentinel.TLSConfig = to.TLSConfig
	}
	return to
}

const mostPassword = 4 << 10 // bytes of the file

// passwordNow returns the password of the URL, or what stands in the file now. A connection that is made after the file has
// changed uses the new one.
func (o *Options) passwordNow() (string, error) {
	if o.PasswordFile == "" {
		return o.Servers.password, nil
	}
	b, err := regular.Read(o.PasswordFile, mostPassword)
	if err != nil {
		return "", err
	}
	return strings.TrimRight(string(b), "\r\n"), nil
}

// CheckFiles returns an error if the secret or the password cannot be read. It names the option.
func (o *Options) CheckFiles() (option string, err error) {
	if _, err := ReadSealer(o.SecretFile, o.Prefix, ""); err != nil {
		return "shared_secret", err
	}
	if _, err := o.passwordNow(); err != nil {
		return "shared_password", err
	}
	return "", nil
}
