//go:build linux

package main

import (
	"errors"
	"fmt"
	"log"
	"net"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// This file is the interface and its addresses.

// ensureLink makes the interface where there is none, and gives it the addresses that it lacks. With exact, it takes others away. It
// returns the addresses that it has found there.
func ensureLink(name string, addresses []netip.Addr, exact bool) (have []netip.Addr, err error) {
	link, err := netlink.LinkByName(name)
	if errors.As(err, new(netlink.LinkNotFoundError)) {
		if link, err = addLink(name); err == nil {
			log.Printf("has made the interface %s, a %s", name, link.Type())
		}
	}
	if err == nil {
		err = mayBeOurs(link)
	}
	if err != nil {
		return nil, fmt.Errorf("interface %s: %w", name, err)
	}
	if link.Attrs().Flags&net.FlagUp == 0 {
		if err := netlink.LinkSetUp(link); err != nil {
			return nil, fmt.Errorf("interface %s cannot be set up: %w", name, err)
		}
	}
	there, err := whole(func() ([]netlink.Addr, error) { return netlink.AddrList(link, netlink.FAMILY_ALL) })
	if err != nil {
		return nil, fmt.Errorf("addresses of %s: %w", name, err)
	}
	for _, a := range there {
		ip, _ := netip.AddrFromSlice(a.IP)
		ip = ip.Unmap()
		have = append(have, ip)
		// The kernel gives an interface a link-local address of IPv6.
		if exact && !slices.Contains(addresses, ip) && !(ip.Is6() && ip.IsLinkLocalUnicast()) {
			if err := netlink.AddrDel(link, &a); err != nil {
				return have, fmt.Errorf("address %s of %s cannot be removed: %w", ip, name, err)
			}
			log.Printf("has removed %s from %s", ip, name)
		}
	}
	for _, ip := range addresses { // one that the node cannot have does not keep it from the others
		if slices.Contains(have, ip) {
			continue
		}
		// No other machine has it, so nobody is asked whether one does: the cache may use it at once.
		a := netlink.Addr{IPNet: &net.IPNet{IP: ip.AsSlice(), Mask: net.CIDRMask(ip.BitLen(), ip.BitLen())}}
		if ip.Is6() {
			a.Flags = unix.IFA_F_NODAD
		}
		if addErr := netlink.AddrAdd(link, &a); addErr != nil && !errors.Is(addErr, unix.EEXIST) {
			err = errors.Join(err, fmt.Errorf("address %s of %s: %w", ip, name, addErr))
			continue
		}
		log.Printf("has given %s to %s", ip, name)
	}
	return have, err
}

// mayBeOurs returns an error for an interface of a kind that addLink does not make, such as the node's own one. Nothing of that is
// changed.
func mayBeOurs(link netlink.Link) error {
	if kind := link.Type(); kind != "dummy" && kind != "bridge" {
		return fmt.Errorf("it is of the kind %s, and so somebody else's; write another -interfacename", kind)
	}
	return nil
}

// whole returns what the kernel lists. If that changes while it is listed, it is listed again.
func whole[T any](list func() (T, error)) (all T, err error) {
	for range 10 {
		if all, err = list(); !errors.Is(err, netlink.ErrDumpInterrupted) {
			break
		}
	}
	return all, err
}

// addLink makes a dummy device, or a bridge where the kernel knows none: both hold addresses, and lead nowhere.
func addLink(name string) (netlink.Link, error) {
	attrs := netlink.LinkAttrs{Name: name, TxQLen: -1}
	var link netlink.Link = &netlink.Dummy{LinkAttrs: attrs}
	err := netlink.LinkAdd(link)
	if errors.Is(err, unix.EOPNOTSUPP) {
		link = &netlink.Bridge{LinkAttrs: attrs}
		err = netlink.LinkAdd(link)
	}
	if err != nil && !errors.Is(err, unix.EEXIST) { // another one was faster
		return nil, err
	}
	return netlink.LinkByName(name)
}

// removeLink removes the interface, if there is one that may be ours.
func removeLink(name string) error {
	link, err := netlink.LinkByName(name)
	if errors.As(err, new(netlink.LinkNotFoundError)) {
		return nil
	}
	if err == nil {
		err = mayBeOurs(link)
	}
	if err == nil {
		err = netlink.LinkDel(link)
	}
	if err != nil && !errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("interface %s cannot be removed: %w", name, err)
	}
	return nil
}

// watchLink returns a channel that gets something soon after an interface or an address has changed, until done is closed. It is an
// aid: what the kernel does not tell in time is found at the next look.
func watchLink(name string, done <-chan struct{}) (<-chan struct{}, error) {
	links, addresses := make(chan netlink.LinkUpdate), make(chan netlink.AddrUpdate)
	trouble := func(err error) {
		select {
		case <-done: // which closes the sockets
		default:
			log.Printf("the kernel's messages: %v", err)
		}
	}
	if err := netlink.LinkSubscribeWithOptions(links, done, netlink.LinkSubscribeOptions{ErrorCallback: trouble}); err != nil {
		return nil, err
	}
	if err := netlink.AddrSubscribeWithOptions(addresses, done, netlink.AddrSubscribeOptions{ErrorCallback: trouble}); err != nil {
		return nil, err
	}
	changed := make(chan struct{}, 1)
	go func() {
		var index int // of the interface
		for {
			ours := false
			select {
			case u, open := <-links:
				if !open {
					links = nil // the kernel's socket has failed
				} else if u.Attrs().Name == name {
					index, ours = u.Attrs().Index, true
				}
			case u, open := <-addresses:
				if !open {
					addresses = nil
				}
				ours = open && (index == 0 || u.LinkIndex == index)
			case <-done:
				return
			}
			if ours {
				select {
				case changed <- struct{}{}:
				default:
				}
			}
		}
	}()
	return changed, nil
}
