package control

import (
	"errors"
	"fmt"
	"net"
	"slices"
	"sync"
	"time"
)

// servers are the listeners of the process. They do not belong to a generation of the Corefile, so that a reload does
// not end them.
var servers = registry{byAddress: make(map[string]*server), uses: make(map[any]int), every: sampleEvery}

type registry struct {
	mu        sync.Mutex // guards what follows, and the holds of servers
	byAddress map[string]*server
	uses      map[any]int // calls of Listen without their Release

	every time.Duration // from one sample of a listener's history to the next; it does not change
}

// Listen serves blocks at an address. key stands for a generation of the Corefile, and can be compared. blocks returns
// those blocks of the generation that name the address, in an order that does not change; it is called for each request,
// and concurrently.
//
// If there is a listener at the address, of another key, the new key takes it over: requests see its blocks, and its
// token and certificate, from now on. The previous key comes back if the new one is released first. A key that listens
// at one address several times must have the same options each time; the last blocks count.
//
// Each call without an error needs a Release.
func Listen(o Options, key any, blocks func() []Block) error { return servers.listen(o, key, blocks) }

// Release takes back one Listen of a key. The last one lets go of the key's listeners, and a listener that no other key
// has is closed. When Release returns, no request calls the key's blocks any more, but for those that take longer than
// five seconds: their clients are cut off.
func Release(key any) { servers.release(key) }

// Addrs returns where the listeners of a key listen. For port 0, the kernel has chosen the port.
func Addrs(key any) []net.Addr { return servers.addrs(key) }

func (r *registry) listen(o Options, key any, blocks func() []Block) error {
	if blocks == nil {
		return errors.New("control: no blocks")
	}
	if err := o.Check(); err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	s := r.byAddress[o.id()]
	h := newHold(o, key, blocks)
	if s != nil {
		if at := s.held(key); at >= 0 {
			was := s.holds[at]
			if was.opts != o {
				return fmt.Errorf("%q: the address has two lines with different tokens or certificates", o.Address)
			}
			h.token, h.tls, h.gate = was.token, was.tls, was.gate
			s.holds = slices.Delete(s.holds, at, at+1)
		}
		s.holds = append(s.holds, h)
		s.now.Store(h)
	} else {
		l, err := listen(o, r.hasPort(o))
		if err != nil {
			return err
		}
		s = newServer(h)
		s.every = r.every
		r.byAddress[o.id()] = s
		s.start(l)
		log.Infof("control: listening on %s", s.listener.Addr())
		if _, unix := o.socket(); !unix && h.token != nil && h.tls == nil && !isLoopbackAddr(l.Addr()) {
			log.Warningf("control: %s: without tls, the token crosses the network in the clear", o.Address)
		}
	}
	r.uses[key]++
	return nil
}

// hasPort reports whether there is a listener on the port of an address, by another spelling of its host.
func (r *registry) hasPort(o Options) bool {
	_, port, err := net.SplitHostPort(o.Address)
	for _, s := range r.byAddress {
		if _, has, _ := net.SplitHostPort(s.listener.Addr().String()); err == nil && has == port {
			return true
		}
	}
	return false
}

func isLoopbackAddr(a net.Addr) bool {
	host, _, err := net.SplitHostPort(a.String())
	return err == nil && isLoopback(host)
}

func (r *registry) release(key any) {
	var all sync.WaitGroup
	defer all.Wait()
	for _, leave := range r.letGo(key) {
		all.Go(leave)
	}
}

// letGo takes back one use of a key. It returns what waits for the requests of a key that has no more uses. New requests
// do not come to the key's blocks from now on. Addresses that no other key holds are free.
func (r *registry) letGo(key any) (leave []func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.uses[key]--; r.uses[key] > 0 {
		return nil
	}
	delete(r.uses, key)
	for id, s := range r.byAddress {
		at := s.held(key)
		if at < 0 {
			continue
		}
		h := s.holds[at]
		if s.holds = slices.Delete(s.holds, at, at+1); len(s.holds) > 0 {
			s.now.Store(s.holds[len(s.holds)-1])
			leave = append(leave, func() { s.drain(h) })
			continue
		}
		delete(r.byAddress, id)
		s.listener.Close()
		leave = append(leave, s.end)
	}
	return leave
}

func (r *registry) addrs(key any) (all []net.Addr) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, s := range r.byAddress {
		if s.held(key) >= 0 {
			all = append(all, s.listener.Addr())
		}
	}
	return all
}
