// Command coredns is CoreDNS with everything it carries, plus optcache directly before cache.
//
// Flags, Corefile and output are CoreDNS's own; -version shows optcache's version where CoreDNS
// shows the revision it was built from.
package main

import (
	"runtime/debug"

	"github.com/coredns/caddy"
	"github.com/coredns/coredns/core/dnsserver"
	_ "github.com/coredns/coredns/core/plugin" // everything stock CoreDNS carries
	"github.com/coredns/coredns/coremain"

	_ "github.com/optcache/optcache"
	"github.com/optcache/optcache/cmd/coredns/internal/directives"
	"github.com/optcache/optcache/cmd/coredns/internal/resolvers"
)

// version is set by the Makefile: -ldflags "-X main.version=$(git describe …)".
var version string

func main() {
	dnsserver.Directives = directives.WithOptcache(dnsserver.Directives)
	coremain.GitCommit = "optcache " + optcacheVersion()

	// A loader that loads nothing: it runs once a Corefile is really asked for, so -version and
	// -plugins send no queries, and before its {$…} are replaced.
	caddy.RegisterCaddyfileLoader("optcache upstreams", caddy.LoaderFunc(func(string) (caddy.Input, error) {
		return nil, resolvers.Export()
	}))

	coremain.Run()
}

// optcacheVersion falls back to what the go command wrote into the binary, which is the module's
// version after `go install …@version`.
func optcacheVersion() string {
	if version != "" {
		return version
	}
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
		return info.Main.Version
	}
	return "(devel)"
}
