package test

import (
	"go/parser"
	"go/token"
	"io/fs"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/optcache/optcache"

// floors are the packages from the ground up. A package imports only those of lower floors.
var floors = [][]string{
	{"plugin/control/api", "plugin/control/page", "plugin/pkg/arena", "plugin/pkg/arg", "plugin/pkg/backoff", "plugin/pkg/climber", "plugin/pkg/clock", "plugin/pkg/cut", "plugin/pkg/flight",
		"plugin/pkg/histogram", "plugin/pkg/index", "plugin/pkg/limit",
		"plugin/pkg/memlimit", "plugin/pkg/popularity", "plugin/pkg/regular", "plugin/pkg/sketch", "plugin/pkg/snapshot", "plugin/pkg/subnet", "plugin/pkg/topk", "plugin/pkg/udp", "plugin/pkg/wire"},
	{"plugin/control/client", "plugin/pkg/dumptext", "plugin/pkg/query", "plugin/pkg/record", "plugin/pkg/zones"},
	{"plugin/pkg/admit", "plugin/pkg/chain", "plugin/pkg/flushed", "plugin/pkg/keep", "plugin/pkg/reply"},
	{"plugin/control", "plugin/fastpath", "plugin/level2"},
	{""}, // the plugin
	{"test/freeport", "bench/delay", "bench/echo/stream", "bench/hitratio", "bench/hitratio/peers", "bench/tail", "cmd/coredns", "cmd/coredns/internal/directives", "cmd/coredns/internal/resolvers",
		"cmd/coredns/internal/systemd", "cmd/nodelocal-setup", "cmd/optcachectl", "deploy/sbom"},
}

// mostRootFiles is how many files of Go, without tests, the plugin's own package may have. The questions of operators, which go
// through the chain, have one beside what operators see in the store. So have answers that depend on the client, the second level,
// and blocks that share memory.
const mostRootFiles = 21

// free are what may be imported besides the standard library, by packages that know neither CoreDNS nor messages.
var free = []string{"golang.org/x/sys/", "github.com/klauspost/compress/", "google.golang.org/protobuf/encoding/protowire"}

// withoutDNS are the rooms that know neither CoreDNS nor messages: the engine's files, and packages.
var withoutDNS = []string{"hotcache.go", "shard.go", "slru.go", "store.go", "sizes.go", "simulate.go",
	"plugin/pkg/arena", "plugin/pkg/backoff", "plugin/pkg/climber", "plugin/pkg/clock", "plugin/pkg/cut", "plugin/pkg/flight", "plugin/pkg/flushed", "plugin/pkg/index", "plugin/pkg/memlimit",
	"plugin/pkg/popularity", "plugin/pkg/record", "plugin/pkg/sketch", "plugin/pkg/snapshot", "plugin/pkg/subnet", "plugin/pkg/topk", "plugin/pkg/udp", "plugin/pkg/wire"}

// sourceFile is a file of Go, by its path from the root, and what it imports.
type sourceFile struct {
	path, dir string
	imports   []string
}

// sources returns the files of Go without tests.
func sources(t *testing.T) (all []sourceFile) {
	t.Helper()
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
			return err
		}
		path, err = filepath.Rel(root, path)
		if err != nil {
			return err
		}
		f, err := parser.ParseFile(token.NewFileSet(), filepath.Join(root, path), nil, parser.ImportsOnly)
		if err != nil {
			return err
		}
		s := sourceFile{path: filepath.ToSlash(path), dir: filepath.ToSlash(filepath.Dir(path))}
		if s.dir == "." {
			s.dir = ""
		}
		for _, i := range f.Imports {
			s.imports = append(s.imports, strings.Trim(i.Path.Value, `"`))
		}
		all = append(all, s)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

func floorOf(dir string) int {
	return slices.IndexFunc(floors, func(dirs []string) bool { return slices.Contains(dirs, dir) })
}

func TestImportsRunDown(t *testing.T) {
	for _, f := range sources(t) {
		floor := floorOf(f.dir)
		if floor < 0 {
			if f.dir != "test" && !strings.HasPrefix(f.dir, "test/") {
				t.Errorf("%s: package %q is on no floor", f.path, f.dir)
			}
			continue
		}
		for _, i := range f.imports {
			dir, ours := strings.CutPrefix(i+"/", module+"/")
			if !ours {
				continue
			}
			if to := floorOf(strings.TrimSuffix(dir, "/")); to >= floor && !strings.Contains(i, "/internal/") {
				t.Errorf("%s imports %s, which is on floor %d, from floor %d", f.path, i, to, floor)
			}
		}
	}
}

func TestRootHasFewFiles(t *testing.T) {
	var files []string
	for _, f := range sources(t) {
		if f.dir == "" {
			files = append(files, f.path)
		}
	}
	if len(files) > mostRootFiles {
		t.Errorf("%d files, at most %d: %s", len(files), mostRootFiles, strings.Join(files, " "))
	}
	for _, must := range []string{"setup.go", "hotcache.go", "slru.go"} {
		if !slices.Contains(files, must) {
			t.Errorf("no %s", must)
		}
	}
}

// The engine, and what it stands on, can be read, tested and used without CoreDNS.
func TestEngineKnowsNoDNS(t *testing.T) {
	known := make(map[string]bool)
	for _, f := range sources(t) {
		for _, room := range []string{f.path, f.dir} {
			if !slices.Contains(withoutDNS, room) {
				continue
			}
			known[room] = true
			for _, i := range f.imports {
				standard := !strings.Contains(strings.SplitN(i, "/", 2)[0], ".")
				dir, ours := strings.CutPrefix(i, module+"/")
				if ours && !slices.Contains(withoutDNS, dir) || !ours && !standard && !slices.ContainsFunc(free, func(p string) bool { return strings.HasPrefix(i, p) }) {
					t.Errorf("%s imports %s", f.path, i)
				}
			}
		}
	}
	for _, room := range withoutDNS {
		if !known[room] {
			t.Errorf("there is no %s", room)
		}
	}
}

// One file reaches into what CoreDNS does not export.
func TestReflectionIsInOnePlace(t *testing.T) {
	for _, f := range sources(t) {
		knows := slices.ContainsFunc(f.imports, func(i string) bool { return strings.HasPrefix(i, "github.com/coredns/") })
		if knows && slices.Contains(f.imports, "reflect") && f.path != "plugin/pkg/chain/unexported.go" {
			t.Errorf("%s imports reflect", f.path)
		}
	}
}
