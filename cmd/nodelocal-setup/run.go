//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// This file is what happens when: at the start, from then on, and at the end.

const (
	probeInterval = 500 * time.Millisecond // between two questions whether the cache is ready
	probeTimeout  = time.Second
	probeFailures = 3  // in a row, and it is not
	toldFailures  = 40 // in a row, and the log says so, also if it has never been

	watchPause = 100 * time.Millisecond // between two looks that changes of the node cause

	// drainTime is how long replies go out untracked, from addresses that are there, when requests no longer come in: what was
	// asked before is answered.
	drainTime = time.Second

	lockWait   = 10 * time.Second // for one that takes away what is there
	comeWait   = 2 * time.Minute  // for the one that keeps watch after one with -once
	sweepAfter = 10 * time.Minute
)

// run does what the flags say. Without once, that lasts until ctx ends.
func run(ctx context.Context, c config) error {
	sweep(c.sweep, time.Now())
	if err := makeFolders(c.folders, c.uid, c.gid); err != nil { // after sweep: one of an old pod's name may be empty
		return err
	}
	p, err := join(c.lock)
	if err != nil {
		return err
	}
	defer p.leave()
	s := setup{config: c, presence: p, serving: c.ready == ""}
	if c.once {
		return errors.Join(s.sync(), s.writeCorefile())
	}
	s.keep(ctx)
	return s.teardown()
}

// setup is what runs on a node.
type setup struct {
	config
	presence *presence

	serving  bool // the cache does
	failures int  // of probes, in a row; one where nobody listens counts as all that it takes
	alone    bool // at the last look

	trouble string // of the last look
}

// sync looks once whether interface and rules are there, and mends what is missing.
func (s *setup) sync() (err error) {
	alone := s.presence.alone()
	s.alone = alone
	var there []netip.Addr
	if s.setInterface {
		there, err = ensureLink(s.iface, s.addresses, false)
	}
	if s.setRules {
		removed, rulesErr := s.ensureRules(alone)
		if removed && alone {
			time.Sleep(drainTime)
		}
		err = errors.Join(err, rulesErr, ensureAllowed(s.addresses, alone))
	}
	if s.setRules && alone {
		// Once an address is gone from the interface, nobody knows that these rules are to go.
		leftErr := removeLeft(slices.Concat(there, s.addresses))
		alone = leftErr == nil
		if s.once && leftErr != nil { // CoreDNS is to start
			log.Print(leftErr)
		} else {
			err = errors.Join(err, leftErr)
		}
	}
	if s.setInterface && alone && s.presence.alone() { // one may have come while replies went out
		_, linkErr := ensureLink(s.iface, s.addresses, true)
		err = errors.Join(err, linkErr)
	}
	return err
}

// ensureRules gives the table its rules. Of two pods on a node, the one that came last decides which addresses are asked: while the
// cache serves, it removes the rules about requests to other addresses, and the older one does not restore them. So kube-proxy has
// those requests before the older cache ends.
func (s *setup) ensureRules(alone bool) (removed bool, err error) {
	which := own
	switch {
	case alone:
		which = all
	case s.once: // the pod that this one takes the place of may serve
		which = none
	case s.serving && s.presence.younger():
		return false, nil
	case s.serving:
		which = othersRequests
	}
	return ensureRules(s.iface, s.addresses, s.serving, which)
}

// keep looks again and again until ctx ends. Trouble is told when it comes, and when it changes.
func (s *setup) keep(ctx context.Context) {
	var changed <-chan struct{}
	if s.setInterface {
		var err error
		if changed, err = watchLink(s.iface, ctx.Done()); err != nil {
			log.Printf("looks every %v only: %v", s.interval, err)
		}
	}
	look := func() {
		text := ""
		if err := errors.Join(s.sync(), s.writeCorefile()); err != nil {
			text = err.Error()
		}
		if text != "" && text != s.trouble {
			log.Print(text)
		}
		s.trouble = text
	}
	s.probe()
	look()
	looks, probes := time.NewTicker(s.interval), time.NewTicker(probeInterval)
	defer looks.Stop()
	defer probes.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-looks.C:
			look()
		case <-changed:
			look()
			select { // somebody may undo at once what a look does
			case <-ctx.Done():
				return
			case <-time.After(watchPause):
			}
		case <-probes.C:
			// The last look may have left something to one that is gone now.
			if s.probe() || !s.alone && s.presence.alone() {
				look()
			}
		}
	}
}

// client asks anew each time: a connection that stands says nothing about who may take one.
var client = http.Client{Timeout: probeTimeout, Transport: &http.Transport{DisableKeepAlives: true, Proxy: nil}}

// probe asks whether the cache serves, and tells whether that has changed. While one pod takes the place of another, either may answer
// at the URL: so somebody has to listen at each of the addresses, too.
func (s *setup) probe() (changed bool) {
	if s.ready == "" {
		return false
	}
	before := s.serving
	reply, err := client.Get(s.ready)
	if err == nil {
		reply.Body.Close()
		if reply.StatusCode != http.StatusOK {
			err = errors.New(reply.Status)
		}
	}
	bound, boundErr := listeners()
	if boundErr != nil {
		err = boundErr
	} else if silent := s.silent(bound); silent != nil {
		err, s.failures = silent, max(s.failures, probeFailures-1)
	}
	if err == nil {
		s.serving, s.failures = true, 0
	} else if s.failures++; s.failures >= probeFailures {
		s.serving = false
	}
	switch {
	case s.serving && !before:
		log.Print("the cache serves")
	case !s.serving && (before || s.failures == toldFailures):
		log.Printf("the cache does not serve: %v", err)
	}
	return s.serving != before
}

// listeners returns the addresses at whose port 53 somebody listens.
func listeners() (bound map[netip.Addr]bool, err error) {
	bound = make(map[netip.Addr]bool)
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		sockets, err := whole(func() ([]*netlink.Socket, error) { return netlink.SocketDiagUDP(family) })
		if err != nil {
			return nil, fmt.Errorf("the kernel does not say who listens at port %d: %w", port, err)
		}
		for _, socket := range sockets {
			if socket.ID.SourcePort == port {
				ip, _ := netip.AddrFromSlice(socket.ID.Source)
				bound[ip.Unmap()] = true
			}
		}
	}
	return bound, nil
}

// silent returns an error where nobody listens at port 53 of an address. To ask there would not do: kube-proxy may send the question
// elsewhere.
func (s *setup) silent(bound map[netip.Addr]bool) error {
	for _, a := range s.addresses {
		if !bound[a] && !bound[netip.IPv6Unspecified()] && !(a.Is4() && bound[netip.IPv4Unspecified()]) {
			return fmt.Errorf("nobody listens at %s", netip.AddrPortFrom(a, port))
		}
	}
	return nil
}

// teardown takes away interface and rules, unless another one on the node needs them.
func (s *setup) teardown() error {
	if s.skipTeardown {
		return nil
	}
	if !s.presence.last() {
		log.Print("leaves interface and rules to another one")
		return nil
	}
	if s.presence.expected() {
		log.Print("leaves the interface to one that comes")
		if !s.setRules {
			return nil
		}
		_, err := ensureRules(s.iface, s.addresses, false, own)
		return err
	}
	var err error
	if s.setRules {
		if s.serving {
			_, err = ensureRules(s.iface, s.addresses, false, all)
			time.Sleep(drainTime)
		}
		err = errors.Join(err, removeRules(s.iface))
	}
	if s.setInterface {
		err = errors.Join(err, removeLink(s.iface))
	}
	if err == nil {
		log.Print("has taken away what it has made")
	}
	return err
}

// presence is a lock on a file of the node, by which those that run there know of each other. Each has it shared; the kernel takes it
// from one that dies. Without a file, this is the only one.
// The file's time says when the last one has come.
type presence struct {
	file *os.File
	came time.Time
}

// join takes the lock. One that ends has it for itself for a moment.
func join(name string) (*presence, error) {
	if name == "" {
		return &presence{}, nil
	}
	file, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	p := &presence{file: file}
	for end := time.Now().Add(lockWait); ; time.Sleep(100 * time.Millisecond) {
		err := p.set(unix.F_RDLCK)
		if err == nil {
			now := time.Now()
			err = os.Chtimes(name, now, now)
			p.came = p.lastCame()
			return p, err
		}
		if !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EACCES) || time.Now().After(end) {
			file.Close()
			return nil, fmt.Errorf("lock %s: %w", name, err)
		}
	}
}

// set changes the lock of the open file. If it cannot, the lock is as before.
func (p *presence) set(kind int16) error {
	return unix.FcntlFlock(p.file.Fd(), unix.F_OFD_SETLK, &unix.Flock_t{Type: kind})
}

// alone tells whether there is no other one now, and none is expected: one that comes needs what its init container has made.
func (p *presence) alone() bool {
	if p.file == nil {
		return true
	}
	other := unix.Flock_t{Type: unix.F_WRLCK}
	err := unix.FcntlFlock(p.file.Fd(), unix.F_OFD_GETLK, &other)
	return err == nil && other.Type == unix.F_UNLCK && !p.expected()
}

// lastCame is when the last one has come, or zero.
func (p *presence) lastCame() time.Time {
	if info, err := p.file.Stat(); err == nil {
		return info.ModTime()
	}
	return time.Time{}
}

// younger tells whether another one has come since.
func (p *presence) younger() bool { return p.file != nil && p.lastCame().After(p.came) }

// expected tells whether another one has come since, and not long ago: the init container of a pod whose second container is about
// to start.
func (p *presence) expected() bool { return p.younger() && time.Since(p.lastCame()) < comeWait }

// last tells whether there is no other one, and lets none come until leave. Of several that end at the same time, it is true for one:
// each gives its lock up first.
func (p *presence) last() bool {
	return p.file == nil || p.set(unix.F_UNLCK) == nil && p.set(unix.F_WRLCK) == nil
}

func (p *presence) leave() {
	if p.file != nil {
		p.file.Close()
	}
}

// makeFolders makes folders for a user. One that is there keeps its mode.
func makeFolders(dirs []string, uid, gid int) error {
	for _, dir := range dirs {
		if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
			return err
		}
		if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
		if err := os.Chown(dir, uid, gid); err != nil {
			return err
		}
	}
	return nil
}

// sweep removes the folders in a folder that are empty and have been for a while: those of pods that have ended.
func sweep(dir string, now time.Time) {
	if dir == "" {
		return
	}
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		log.Print(err)
	}
	for _, e := range entries {
		if info, err := e.Info(); err == nil && e.IsDir() && now.Sub(info.ModTime()) > sweepAfter {
			os.Remove(filepath.Join(dir, e.Name())) // fails unless it is empty
		}
	}
}
