//go:build linux

package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log"
	"maps"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
)

// This file makes the Corefile: the base, with the cache's addresses and what the ConfigMap kube-dns says. The first three places are
// those of node-cache's manifests.

const (
	placeLocal    = "__PILLAR__LOCAL__DNS__"        // -localip, separated by spaces
	placeCluster  = "__PILLAR__CLUSTER__DNS__"      // the address of the service -upstreamsvc
	placeUpstream = "__PILLAR__UPSTREAM__SERVERS__" // upstreamNameservers; /etc/resolv.conf without
	// A block with this in its key stands once for each stub domain, with the domain and its servers.
	placeDomain  = "__PILLAR__STUB__DOMAIN__"
	placeServers = "__PILLAR__STUB__SERVERS__"

	mostServers = 15 // that CoreDNS's forward takes

	// The ConfigMap's keys.
	keyUpstream = "upstreamNameservers"
	keyStubs    = "stubDomains"
)

// kubeDNS is what the ConfigMap kube-dns says.
type kubeDNS struct {
	upstream []string            // IP or IP:port
	stubs    map[string][]string // by domain, in lower case, without the dot at the end
}

// writeCorefile writes the Corefile if it has changed. What is wrong in the ConfigMap kube-dns is told; the Corefile that is there
// stays then, and where there is none, it is made without.
func (s *setup) writeCorefile() error {
	if s.corefile == "" {
		return nil
	}
	old, err := os.ReadFile(s.corefile)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	base, err := os.ReadFile(s.base)
	if err != nil {
		return err
	}
	of := template{file: s.base, text: string(base), addresses: s.addresses, variable: s.upstreamVar, upstream: os.Getenv(s.upstreamVar)}
	var text string
	k, err := readKubeDNS(s.kubeDNS)
	if err == nil {
		text, err = of.render(k)
	}
	if err != nil {
		if len(old) > 0 {
			err = fmt.Errorf("%s stays as it is: %w", s.corefile, err)
			if s.once { // CoreDNS is to start
				log.Print(err)
				return nil
			}
			return err
		}
		var baseErr error
		if text, baseErr = of.render(kubeDNS{}); baseErr != nil {
			return baseErr
		}
		log.Printf("%s is without what the ConfigMap kube-dns says: %v", s.corefile, err)
	}
	if bytes.Equal(old, []byte(text)) {
		return nil
	}
	if err := replaceFile(s.corefile, text); err != nil {
		return err
	}
	log.Printf("has written %s", s.corefile)
	return nil
}

// replaceFile writes a file so that nobody reads half of it.
func replaceFile(name, text string) error {
	young, err := os.CreateTemp(filepath.Dir(name), "."+filepath.Base(name)+"-")
	if err != nil {
		return err
	}
	_, err = young.WriteString(text)
	err = errors.Join(err, young.Chmod(0o644), young.Close())
	if err == nil {
		err = os.Rename(young.Name(), name)
	}
	if err != nil {
		os.Remove(young.Name())
	}
	return err
}

// readKubeDNS reads the keys of the ConfigMap kube-dns, which the kubelet puts into files. There may be none.
func readKubeDNS(dir string) (k kubeDNS, err error) {
	var stubs map[string][]string
	for key, into := range map[string]any{keyUpstream: &k.upstream, keyStubs: &stubs} {
		name := filepath.Join(dir, key)
		text, readErr := os.ReadFile(name)
		if errors.Is(readErr, fs.ErrNotExist) || readErr == nil && len(bytes.TrimSpace(text)) == 0 {
			continue
		}
		if readErr == nil {
			readErr = json.Unmarshal(text, into)
		}
		if readErr != nil {
			err = errors.Join(err, fmt.Errorf("%s: %w", name, readErr))
		}
	}
	if err != nil {
		return k, err
	}
	if k.upstream, err = servers(filepath.Join(dir, keyUpstream), k.upstream); err != nil {
		return k, err
	}
	k.stubs = make(map[string][]string)
	name := filepath.Join(dir, keyStubs)
	for domain, of := range stubs {
		clean := strings.ToLower(strings.TrimSuffix(domain, "."))
		if !isDomain(clean) {
			return k, fmt.Errorf("%s: %q is no domain", name, domain)
		}
		if _, twice := k.stubs[clean]; twice {
			return k, fmt.Errorf("%s: %q stands twice", name, clean)
		}
		if len(of) == 0 {
			return k, fmt.Errorf("%s: %q has no servers", name, domain)
		}
		if k.stubs[clean], err = servers(name, of); err != nil {
			return k, err
		}
	}
	return k, nil
}

// servers checks addresses for CoreDNS's forward: IP, or IP:port.
func servers(file string, all []string) ([]string, error) {
	if len(all) > mostServers {
		return nil, fmt.Errorf("%s: %d servers, at most %d", file, len(all), mostServers)
	}
	var clean []string
	for _, text := range all {
		text = strings.TrimSpace(text)
		at, ok := serverAt(text)
		if !ok || !zoneOK.MatchString(at.Addr().Zone()) || at.Port() == 0 { // a zone may have any characters for package netip
			return nil, fmt.Errorf("%s: %q is neither an IP address nor one with a port", file, text)
		}
		clean = append(clean, text)
	}
	return clean, nil
}

// serverAt reads an address for CoreDNS's forward. Without a port, it is that of DNS.
func serverAt(text string) (netip.AddrPort, bool) {
	if a, err := netip.ParseAddr(text); err == nil {
		return netip.AddrPortFrom(a, port), true
	}
	at, err := netip.ParseAddrPort(text)
	return at, err == nil
}

// zoneOK is the name of an interface behind an address, or nothing.
var zoneOK = regexp.MustCompile(`^[A-Za-z0-9._-]*$`)

var label = regexp.MustCompile(`^[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?$`)

func isDomain(name string) bool {
	return len(name) < 254 && !slices.ContainsFunc(strings.Split(name, "."), func(l string) bool { return !label.MatchString(l) })
}

// template is the base.
type template struct {
	file, text string
	addresses  []netip.Addr
	variable   string // of the environment, which has
	upstream   string // the service's address
}

// render returns the base with what its places stand for.
func (b template) render(k kubeDNS) (string, error) {
	file, base, upstream := b.file, b.text, b.upstream
	if strings.Contains(base, placeCluster) && net.ParseIP(upstream) == nil {
		return "", fmt.Errorf("%s has %s, and %s is %q: no address of a service", file, placeCluster, b.variable, upstream)
	}
	if err := b.notToItself(keyUpstream, k.upstream); err != nil {
		return "", err
	}
	others := "/etc/resolv.conf"
	if len(k.upstream) > 0 {
		if others = strings.Join(k.upstream, " "); !strings.Contains(base, placeUpstream) {
			return "", fmt.Errorf("%s has no %s for the upstreamNameservers of the ConfigMap kube-dns", file, placeUpstream)
		}
	}
	blocks, err := split(file, base)
	if err != nil {
		return "", err
	}
	served, templates := make(map[string]bool), 0
	for _, part := range blocks {
		if strings.Contains(part.head, placeDomain) {
			templates++
		}
		for _, key := range strings.FieldsFunc(part.head, func(r rune) bool { return r == ' ' || r == '\t' || r == ',' }) {
			zone, _, _ := strings.Cut(strings.TrimPrefix(key, "dns://"), ":")
			served[strings.ToLower(strings.TrimSuffix(zone, "."))] = true
		}
	}
	if len(k.stubs) > 0 && templates == 0 {
		return "", fmt.Errorf("%s has no block for %s, and the ConfigMap kube-dns has stubDomains", file, placeDomain)
	}
	for domain, of := range k.stubs {
		if err := b.notToItself(keyStubs, of); err != nil {
			return "", err
		}
		if served[domain] {
			return "", fmt.Errorf("the ConfigMap kube-dns has the stubDomain %q, for which %s has a block", domain, file)
		}
	}
	var text strings.Builder
	for _, part := range blocks {
		if !strings.Contains(part.head, placeDomain) {
			text.WriteString(part.text)
			continue
		}
		for _, domain := range slices.Sorted(maps.Keys(k.stubs)) {
			text.WriteString(strings.NewReplacer(placeDomain, domain, placeServers, strings.Join(k.stubs[domain], " ")).Replace(part.text))
		}
	}
	var local []string
	for _, a := range b.addresses {
		local = append(local, a.String())
	}
	return strings.NewReplacer(placeLocal, strings.Join(local, " "), placeCluster, upstream, placeUpstream, others).Replace(text.String()), nil
}

// notToItself returns an error if one of the servers that a key of the ConfigMap kube-dns names is the cache. It would ask itself,
// and CoreDNS's loop would end it on each node.
func (b template) notToItself(key string, servers []string) error {
	for _, text := range servers {
		if at, ok := serverAt(text); ok && at.Port() == port && slices.Contains(b.addresses, at.Addr().Unmap()) {
			return fmt.Errorf("the ConfigMap kube-dns has %q in %s, which is the cache itself", text, key)
		}
	}
	return nil
}

// block is a part of a Corefile that ends with a line after which no brace is open: a server block with what stands before it, or
// what stands after the last one.
type block struct {
	text string
	head string // what stands before the first brace: the keys
}

// split splits a Corefile into blocks. Put together, they are the Corefile again.
func split(file, text string) (blocks []block, err error) {
	var b block
	open, number := 0, 0
	for line := range strings.Lines(text) {
		number++
		b.text += line
		words := strings.Fields(line)
		if i := slices.IndexFunc(words, func(w string) bool { return strings.HasPrefix(w, "#") }); i >= 0 {
			words = words[:i]
		}
		for _, word := range words {
			switch {
			case word == "{":
				open++
			case word == "}":
				open--
			case open == 0:
				b.head += word + " "
			}
		}
		if open < 0 {
			return nil, fmt.Errorf("%s:%d: a brace is closed that is not open", file, number)
		}
		if open == 0 && len(words) > 0 && words[len(words)-1] == "}" {
			blocks = append(blocks, b)
			b = block{}
		}
	}
	if open > 0 {
		return nil, fmt.Errorf("%s: at the end, a brace is open", file)
	}
	return append(blocks, b), nil
}
