// Command coredns is CoreDNS with all of its plugins, and with optcache directly before cache.
//
// Flags, Corefile and output are those of CoreDNS. Only -version differs: it shows optcache's version and
// commit in the place of CoreDNS's revision.
package main

import (
	"runtime/debug"

	"github.com/optcache/optcache/plugin/control"

	"github.com/coredns/caddy"
	"github.com/coredns/coredns/core/dnsserver"
	_ "github.com/coredns/coredns/core/plugin" // everything stock CoreDNS carries
	"github.com/coredns/coredns/coremain"

	_ "github.com/optcache/optcache"
	"github.com/optcache/optcache/cmd/coredns/internal/directives"
	"github.com/optcache/optcache/cmd/coredns/internal/resolvers"
	"github.com/optcache/optcache/cmd/coredns/internal/systemd"
)

// version and commit are set by the Makefile: -ldflags "-X main.version=$(git describe …) -X main.commit=$(git rev-parse …)".
var version, commit string

func main() {
	dnsserver.Directives = directives.WithOptcache(dnsserver.Directives)
	coremain.GitCommit = "optcache " + optcacheVersion()
	if commit != "" {
		coremain.GitCommit += ", " + commit
	}

	// This loader loads nothing. CoreDNS calls it when it needs a Corefile, before it replaces {$…} in the Corefile.
	// With -version and -plugins it does not call it, so that these send no queries.
	caddy.RegisterCaddyfileLoader("optcache upstreams", caddy.LoaderFunc(func(string) (caddy.Input, error) {
		return nil, resolvers.Export()
	}))

	systemd.Register()
	control.Version = optcacheVersion()
	coremain.Run()
}

// optcacheVersion returns the version that the Makefile has set. Otherwise it returns what the go command has written
// into the binary: after `go install …@version`, that is the module's version.
func optcacheVersion() string {
	if version != "" {
		return version
	}
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
		return info.Main.Version
	}
	return "(devel)"
}
