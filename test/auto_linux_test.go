package test

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/miekg/dns"
	"golang.org/x/sys/unix"
)

// This file is about the fast path that nobody has asked for: where it is on, and why it is not.

// autoBlock is a server block that says nothing of a fast path.
func autoBlock(upstream string, plugins ...string) string {
	return block("dns", upstream, append(plugins, "prometheus 127.0.0.1:${metrics}", "optcache")...)
}

// fallback returns the reason of the metric fastpath_fallback_info, or "".
func fallback(t testing.TB, s *server) string {
	t.Helper()
	for _, reason := range []string{"system", "plugin", "server", "transport", "port", "addresses", "open", "shared"} {
		if sum(t, s.addr("metrics"), "coredns_optcache_fastpath_fallback_info", fmt.Sprintf("reason=%q", reason)) > 0 {
			return reason
		}
	}
	return ""
}

// waitForFallback waits until the metric has the reason, and checks that one line of the log has the words.
func waitForFallback(t testing.TB, s *server, reason string, words ...string) {
	t.Helper()
	eventually(t, func() error {
		if got := fallback(t, s); got != reason {
			return fmt.Errorf("the reason is %q, want %q", got, reason)
		}
		return nil
	})
	lines := 0
	for line := range strings.Lines(s.out.String()) {
		if !strings.Contains(line, "fastpath: ") {
			continue
		}
		lines++
		for _, word := range words {
			if !strings.Contains(line, word) {
				t.Errorf("the line has no %q: %s", word, line)
			}
		}
	}
	if lines != 1 {
		t.Errorf("%d lines in the log", lines)
	}
}

// The Corefiles of a cluster serve by the fast path as they are, with cache replaced by optcache and no word more.
func TestFastPathOnByItself(t *testing.T) {
	t.Parallel()
	for name, blocks := range map[string]int{"Corefile.kubeadm": 1, "Corefile.nodelocaldns": 4} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			u := newUpstream(t)
			text := readFile(t, filepath.Join(root, "examples", name))
			c := local(t, text, u.addr)
			if len(c.blocks) != blocks || strings.Contains(c.text, "fastpath") {
				t.Fatalf("%d blocks:\n%s", len(c.blocks), c.text)
			}
			s := start(t, c.text)
			s.ports["metrics"] = s.ports[c.metrics]
			waitForWorkers(t, s)
			for _, b := range c.blocks {
				askFast(t, s, b.port, b.name)
			}
			if why := fallback(t, s); why != "" || strings.Contains(s.out.String(), "fastpath: ") {
				t.Errorf("it falls back: %q", why)
			}
		})
	}
}

// untold is a plugin that the fast path would pass by.
const untold = "dnstap /tmp/no.sock {\n\textra {/optcache/status}\n}"

// What stands in the way is named in one line of the log and in a metric, and the server serves.
func TestFastPathFallsBack(t *testing.T) {
	t.Parallel()
	cert, key, _ := certificate(t)
	for name, c := range map[string]struct {
		reason string
		words  []string
		edit   func(text string) string
		more   []string // plugins
	}{
		"dnstap":   {"plugin", []string{"dnstap", "metadata"}, nil, []string{untold}},
		"weighted": {"plugin", []string{"loadbalance"}, nil, []string{"loadbalance {\n\tprefer 192.0.2.0/24\n}"}},
		"shed":     {"server", []string{"shed"}, nil, []string{"shed"}},
		"shed beside": {"server", []string{"shed, which server block example.net."}, func(text string) string {
			return text + strings.Replace(block("dns", "127.0.0.1:9", "shed", "optcache {\nfastpath off\n}"), ".:", "example.net:", 1)
		}, nil},
		"many addresses": {"addresses", []string{"17 addresses", "fastpath on 1"}, func(text string) string {
			var all []string
			for i := range 17 {
				all = append(all, fmt.Sprintf("127.0.0.%d", 1+i))
			}
			return strings.Replace(text, "bind 127.0.0.1", "bind "+strings.Join(all, " "), 1)
		}, nil},
		"HTTPS only": {"transport", []string{"plain DNS"}, func(text string) string {
			return strings.Replace(text, ".:", "https://.:", 1)
		}, []string{"tls " + cert + " " + key}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			u := newUpstream(t)
			text := autoBlock(u.addr, c.more...)
			if c.edit != nil {
				text = c.edit(text)
			}
			s := start(t, text)
			waitForFallback(t, s, c.reason, append(c.words, s.conf, "fastpath: off")...)
			if c.reason != "transport" {
				ask(t, overUDP(s.addr("dns")), query("www.example.org.", dns.TypeA))
			}
			if n := sum(t, s.addr("metrics"), "coredns_optcache_fastpath_workers"); n != 0 {
				t.Errorf("%v workers", n)
			}
		})
	}
}

// A system that refuses something has no fast path by itself, and one that was asked for is an error. A system that accepts an
// option and does nothing, as some sandboxes do, is found out by a try.
func TestFastPathWhereTheSystemRefuses(t *testing.T) {
	t.Parallel()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	option := func(option int, errno syscall.Errno) string {
		return fmt.Sprintf("%d:%d:%d", unix.SYS_SETSOCKOPT, option, int(errno))
	}
	call := func(call int, errno syscall.Errno) string { return fmt.Sprintf("%d:%d", call, int(errno)) }
	for name, c := range map[string]struct{ refuse, want string }{
		"no program":               {option(unix.SO_ATTACH_REUSEPORT_CBPF, unix.ENOPROTOOPT), "protocol not available"},
		"a seccomp profile":        {option(unix.SO_ATTACH_REUSEPORT_CBPF, unix.EPERM), "operation not permitted"},
		"a program without effect": {option(unix.SO_ATTACH_REUSEPORT_CBPF, 0), "the kernel gives"},
		"no batches received":      {call(unix.SYS_RECVMMSG, unix.ENOSYS), "function not implemented"},
		"no batches sent":          {call(unix.SYS_SENDMMSG, unix.ENOSYS), "in batches"},
		"no larger buffers":        {option(unix.SO_RCVBUFFORCE, unix.EPERM), ""},
		"no way to take it away":   {option(unix.SO_DETACH_REUSEPORT_BPF, unix.ENOPROTOOPT), ""}, // before Linux 5.3
		"no membarrier":            {call(unix.SYS_MEMBARRIER, unix.ENOSYS), ""},
		"no affinity":              {call(unix.SYS_SCHED_SETAFFINITY, unix.EPERM), ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			u := newUpstream(t)
			refuse := refuseVar + "=" + c.refuse + " " + bin
			s := startBy(t, self, autoBlock(u.addr), refuse)
			if c.want == "" {
				waitForWorkers(t, s)
				askFast(t, s, "dns", "www.example.org.")
				s.signal(syscall.SIGTERM)
				s.stopped = true
				<-s.exited
				return
			}
			waitForFallback(t, s, "system", s.conf, "fastpath: off", c.want)
			for range 3 {
				ask(t, overUDP(s.addr("dns")), query("www.example.org.", dns.TypeA))
			}
			if n := u.count("www.example.org.", dns.TypeA); n != 1 {
				t.Errorf("the upstream was asked %d times", n)
			}
			// Asked for, it is an error.
			asked := launchBy(t, self, fastBlock("dns", u.addr, ""), refuse)
			<-asked.exited
			if out := asked.out.String(); !strings.Contains(out, "fastpath") || !strings.Contains(out, c.want) {
				t.Errorf("no word of fastpath and %q: %s", c.want, out)
			}
		})
	}
}

// A reload changes between off, auto and on, and a block that has got a plugin that would be passed by falls back.
func TestFastPathByReload(t *testing.T) {
	t.Parallel()
	u := newUpstream(t)
	mode := func(line string, plugins ...string) string {
		return block("dns", u.addr, append(plugins, "prometheus 127.0.0.1:${metrics}", "optcache {\n"+line+"\n}")...)
	}
	s := start(t, mode("fastpath off"))
	stop := steady(t, s, query("www.example.org.", dns.TypeA))
	for i, c := range []struct {
		text, reason string
		on           bool
	}{
		{mode("fastpath off"), "", false},
		{autoBlock(u.addr), "", true},
		{mode("fastpath auto", untold), "plugin", false},
		{mode("fastpath auto 1"), "", true},
		{mode("fastpath on 2"), "", true},
		{autoBlock(u.addr, untold), "plugin", false},
		{mode("use_optimized_cache false"), "", false},
		{mode("fastpath"), "", true},
		{mode("fastpath off", untold), "", false},
	} {
		if i > 0 {
			s.write(c.text)
			s.reload(reloaded)
		}
		eventually(t, func() error {
			workers := sum(t, s.addr("metrics"), "coredns_optcache_fastpath_workers")
			if got := fallback(t, s); got != c.reason || (workers > 0) != c.on {
				return fmt.Errorf("step %d: %q, and %v workers", i, got, workers)
			}
			return nil
		})
		if before := fastHits(t, s); c.on {
			eventually(t, func() error {
				if fastHits(t, s) == before {
					return fmt.Errorf("step %d: no fast hits", i)
				}
				return nil
			})
		}
	}
	if stop() == 0 {
		t.Error("nobody has asked")
	}
}

// The plugin shed goes on under a server that has a block with optcache, too, whichever of the blocks comes first.
func TestShedBesideOptcache(t *testing.T) {
	t.Parallel()
	u := newUpstream(t)
	shed := block("dns", u.addr, "prometheus 127.0.0.1:${metrics}", "shed")
	for _, cache := range []string{"cache", "optcache", "optcache {\n\t\tfastpath off\n\t}"} {
		other := strings.Replace(block("dns", u.addr, cache), ".:", "example.net:", 1)
		for order, text := range map[string]string{"shed is first": shed + other, "shed is last": other + shed} {
			t.Run(cache+" "+order, func(t *testing.T) {
				t.Parallel()
				s := start(t, text)
				ask(t, overUDP(s.addr("dns")), query("www.example.net.", dns.TypeA))
				ask(t, overUDP(s.addr("dns")), query("www.example.org.", dns.TypeA))
				if !slices.ContainsFunc(scrape(t, s.addr("metrics")), func(line string) bool { return strings.HasPrefix(line, "coredns_shed_dropped_total") }) {
					t.Error("shed is not at work")
				}
			})
		}
	}
}
