package client

import (
	"strings"
	"testing"
)

func TestParseAddress(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]struct{ socket, base string }{
		"unix:///run/optcache/control.sock": {"/run/optcache/control.sock", "http://localhost"},
		"unix:///a b%2Fc":                   {"/a b%2Fc", "http://localhost"},
		"127.0.0.1:8053":                    {"", "http://127.0.0.1:8053"},
		"[::1]:8053":                        {"", "http://[::1]:8053"},
		":8053":                             {"", "http://localhost:8053"},
		"http://localhost:8053/":            {"", "http://localhost:8053"},
		"HTTPS://dns.example.org":           {"", "https://dns.example.org"},
		"https://proxy.example.org/dns/":    {"", "https://proxy.example.org/dns"},
	} {
		a, err := ParseAddress(text)
		if err != nil || a.socket != want.socket || a.base.String() != want.base {
			t.Errorf("%s: %q, %v, %v", text, a.socket, a.base, err)
		}
	}
	for _, text := range []string{"", "localhost", "/run/optcache/control.sock", "unix:/run/a", "unix://", "unix://run/a", "a:b:c", "a:http", "a:0", "a:65536", "a:", "a:1/b", "a b:1",
		"user@host:1", "http://", "https://:443", "http://u:p@a", "http://a?b", "http://a?", "http://a#b", "http://a:x", "ftp://a", "://", "http://[::1"} {
		if a, err := ParseAddress(text); err == nil || !strings.HasPrefix(err.Error(), "address ") {
			t.Errorf("%s: %+v, %v", text, a, err)
		}
	}
}

func FuzzParseAddress(f *testing.F) {
	for _, text := range []string{"unix:///a", "a:1", "http://a/b", "https://[::1]:1", "x"} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		a, err := ParseAddress(text)
		if err != nil {
			return
		}
		if a.base == nil || a.base.Host == "" || a.base.User != nil || a.socket != "" && a.base.Scheme != "http" || a.String() != text {
			t.Errorf("%q: %+v", text, a)
		}
	})
}
