// Package systemd tells systemd how the server is (sd_notify(3)). Where systemd has not started the process, it does nothing.
//
// READY=1 comes when the server listens, and STOPPING=1 when it begins to end. If the unit has WatchdogSec, WATCHDOG=1 comes
// again and again for as long as the server answers. A server that hangs is silent, so systemd ends and starts it anew.
//
// Whether the server answers is asked at its own UDP sockets, by a message without a question. CoreDNS refuses it before any
// plugin sees it: nothing goes upstream, and nothing is logged or counted. An upstream that is gone makes no server silent.
package systemd

import (
	"context"
	"crypto/rand"
	"net"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/coredns/caddy"
	"github.com/coredns/coredns/core/dnsserver"
	clog "github.com/coredns/coredns/plugin/pkg/log"
	"github.com/coreos/go-systemd/v22/daemon"
)

// patience is how long one message waits for its answer. A server that is flooded loses messages, so there are many in the time
// that the watchdog allows.
const patience = 200 * time.Millisecond

// header is the length in bytes of a DNS message without a question (RFC 1035, 4.1.1). The bit QR of a response is in the third.
const (
	header = 12
	qr     = 0x80
)

// Register has systemd told from now on. It is called once, before CoreDNS runs.
func Register() {
	hook := new(service).hear
	caddy.RegisterEventHook(hookName, hook)
	// SIGUSR1 makes caddy forget its hooks. Each reload reads all directives.
	caddy.RegisterParsingCallback("dns", dnsserver.Directives[0], func(caddy.Context) error {
		if !slices.Contains(caddy.ListPlugins()["event_hooks"], hookName) {
			caddy.RegisterEventHook(hookName, hook)
		}
		return nil
	})
}

const hookName = "optcache systemd"

// service is what systemd hears of.
type service struct {
	mu   sync.Mutex // guards stop
	stop func()     // ends the watchdog; nil: there is none yet
}

// hear is called by caddy when an instance has started, also after a reload, and before the process ends.
func (s *service) hear(event caddy.EventName, info any) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	started := event == caddy.InstanceStartupEvent
	if !started && event != caddy.ShutdownEvent {
		return nil
	}
	if s.stop != nil {
		s.stop()
	}
	if !started {
		return notify(daemon.SdNotifyStopping)
	}
	s.stop = startWatchdog(addresses(info.(*caddy.Instance)))
	return notify(daemon.SdNotifyReady)
}

func notify(state string) error {
	_, err := daemon.SdNotify(false, state)
	return err
}

// addresses returns where the servers of an instance listen by UDP, each address once.
func addresses(instance *caddy.Instance) (all []string) {
	for _, s := range instance.Servers() {
		if a, ok := s.LocalAddr().(*net.UDPAddr); ok {
			all = append(all, a.String())
		}
	}
	slices.Sort(all)
	return slices.Compact(all)
}

// startWatchdog starts to ask the servers at these addresses, if systemd wants to know. stop ends that.
func startWatchdog(servers []string) (stop func()) {
	limit, err := daemon.SdWatchdogEnabled(false)
	if err != nil {
		clog.Warningf("No watchdog: %v", err)
	}
	if limit == 0 || os.Getenv("NOTIFY_SOCKET") == "" {
		return func() {}
	}
	ctx, stop := context.WithCancel(context.Background())
	go watch(ctx, limit, servers, answers, func() {
		if err := notify(daemon.SdNotifyWatchdog); err != nil {
			clog.Warningf("systemd does not hear that the server answers: %v", err)
		}
	})
	return stop
}

// watch calls ping several times within limit, until ctx ends. Before each call, it asks all servers. One that has answered before
// is asked until it answers. One that never has does not count: it may not be a server of plain DNS, but one of QUIC.
func watch(ctx context.Context, limit time.Duration, servers []string, answers func(context.Context, string) bool, ping func()) {
	known := make([]bool, len(servers))
	next := time.NewTicker(limit / 4)
	defer next.Stop()
	for {
		var asked sync.WaitGroup
		for i, server := range servers {
			asked.Go(func() {
				for !answers(ctx, server) {
					if !known[i] || ctx.Err() != nil {
						return
					}
				}
				known[i] = true
			})
		}
		asked.Wait()
		if ctx.Err() != nil {
			return
		}
		ping()
		select {
		case <-ctx.Done():
			return
		case <-next.C:
		}
	}
}

// answers reports whether the server at a UDP address answers one message. If it does not, that takes the time of patience.
func answers(ctx context.Context, server string) bool {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	if ask(ctx, server) {
		return true
	}
	<-ctx.Done() // an error may come at once
	return false
}

func ask(ctx context.Context, server string) bool {
	conn, err := new(net.Dialer).DialContext(ctx, "udp", server)
	if err != nil {
		return false
	}
	defer conn.Close()
	end, _ := ctx.Deadline()
	conn.SetDeadline(end)
	question := make([]byte, header)
	rand.Read(question[:2])
	if _, err := conn.Write(question); err != nil {
		return false
	}
	reply := make([]byte, 512)
	for {
		n, err := conn.Read(reply)
		if err != nil {
			return false
		}
		if n >= header && reply[0] == question[0] && reply[1] == question[1] && reply[2]&qr != 0 {
			return true
		}
	}
}
