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
// stays then, and where there is none, it is made without what is wrong.
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
	k, readErr := readKubeDNS(s.kubeDNS, s.addresses)
	text, err := of.render(k)
	if err = errors.Join(readErr, err); err != nil {
		if len(old) > 0 {
			err = fmt.Errorf("%s stays as it is: %w", s.corefile, err)
			if s.once { // CoreDNS is to start
				log.Print(err)
				return nil
			}
			return err
		}
		if text == "" {
			return err
		}
		log.Printf("%s is without what is wrong in the ConfigMap kube-dns: %v", s.corefile, err)
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

// readKubeDNS reads the keys of the ConfigMap kube-dns, which the kubelet puts into files. There may be none. What is wrong is told in
// the error, and left out: a domain, or a key.
func readKubeDNS(dir string, cache []netip.Addr) (k kubeDNS, err error) {
	wrong := func(key, format string, args ...any) {
		err = errors.Join(err, fmt.Errorf("%s: "+format, append([]any{filepath.Join(dir, key)}, args...)...))
	}
	read := func(key string, into any) {
		text, err := os.ReadFile(filepath.Join(dir, key))
		if errors.Is(err, fs.ErrNotExist) || err == nil && len(bytes.TrimSpace(text)) == 0 {
			return
		}
		if err == nil {
			err = json.Unmarshal(text, into)
		}
		if err != nil {
			wrong(key, "%w", err)
		}
	}
	var upstream json.RawMessage // so that what is wrong in one list is not in another
	var stubs map[string]json.RawMessage
	read(keyUpstream, &upstream)
	read(keyStubs, &stubs)
	if upstream != nil {
		var serversErr error
		if k.upstream, serversErr = servers(upstream, cache); serversErr != nil {
			wrong(keyUpstream, "%w", serversErr)
		}
	}
	k.stubs = make(map[string][]string)
	seen := make(map[string]bool)
	for _, domain := range slices.Sorted(maps.Keys(stubs)) { // in the same order each time, so that the same error is the same
		clean := strings.ToLower(strings.TrimSuffix(domain, "."))
		of, serversErr := servers(stubs[domain], cache)
		switch {
		case !isDomain(clean):
			wrong(keyStubs, "%q is no domain", domain)
		case seen[clean]:
			wrong(keyStubs, "%q stands twice", clean)
			delete(k.stubs, clean)
		case serversErr != nil:
			wrong(keyStubs, "%q: %w", domain, serversErr)
		case len(of) == 0:
			wrong(keyStubs, "%q has no servers", domain)
		default:
			k.stubs[clean] = of
		}
		seen[clean] = true
	}
	return k, err
}

// servers reads a list of addresses for CoreDNS's forward: IP, or IP:port. One that is the cache is wrong: it would ask itself, and
// CoreDNS's loop would end it on each node.
func servers(text []byte, cache []netip.Addr) (clean []string, err error) {
	var all []string
	if err := json.Unmarshal(text, &all); err != nil {
		return nil, err
	}
	if len(all) > mostServers {
		return nil, fmt.Errorf("%d servers, at most %d", len(all), mostServers)
	}
	for _, text := range all {
		text = strings.TrimSpace(text)
		at, ok := serverAt(text)
		if !ok || !zoneOK.MatchString(at.Addr().Zone()) || at.Port() == 0 { // a zone may have any characters for package netip
			return nil, fmt.Errorf("%q is neither an IP address nor one with a port", text)
		}
		if at.Port() == port && slices.Contains(cache, at.Addr().Unmap()) {
			return nil, fmt.Errorf("%q is the cache itself", text)
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

// render returns the base with what its places stand for. What it has no place for is told in the error, and left out. Without a text,
// the base itself is wrong.
func (b template) render(k kubeDNS) (string, error) {
	file, base, upstream := b.file, b.text, b.upstream
	if strings.Contains(base, placeCluster) && net.ParseIP(upstream) == nil {
		return "", fmt.Errorf("%s has %s, and %s is %q: no address of a service", file, placeCluster, b.variable, upstream)
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
	var wrong error
	others := "/etc/resolv.conf"
	if len(k.upstream) > 0 {
		if others = strings.Join(k.upstream, " "); !strings.Contains(base, placeUpstream) {
			wrong = fmt.Errorf("%s has no %s for the upstreamNameservers of the ConfigMap kube-dns", file, placeUpstream)
		}
	}
	if len(k.stubs) > 0 && templates == 0 {
		wrong = errors.Join(wrong, fmt.Errorf("%s has no block for %s, and the ConfigMap kube-dns has stubDomains", file, placeDomain))
	}
	domains := slices.DeleteFunc(slices.Sorted(maps.Keys(k.stubs)), func(domain string) bool {
		if served[domain] {
			wrong = errors.Join(wrong, fmt.Errorf("the ConfigMap kube-dns has %q in %s, for which %s has a block", domain, keyStubs, file))
		}
		return served[domain]
	})
	var text strings.Builder
	for _, part := range blocks {
		if !strings.Contains(part.head, placeDomain) {
			text.WriteString(part.text)
			continue
		}
		for _, domain := range domains {
			text.WriteString(strings.NewReplacer(placeDomain, domain, placeServers, strings.Join(k.stubs[domain], " ")).Replace(part.text))
		}
	}
	var local []string
	for _, a := range b.addresses {
		local = append(local, a.String())
	}
	return strings.NewReplacer(placeLocal, strings.Join(local, " "), placeCluster, upstream, placeUpstream, others).Replace(text.String()), wrong
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
