package optcache

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/coredns/coredns/core/dnsserver"
	"github.com/coredns/coredns/plugin"
	"github.com/coredns/coredns/plugin/test"
	_ "github.com/coredns/coredns/plugin/whoami"

	"github.com/optcache/optcache/plugin/pkg/memlimit"
	"github.com/optcache/optcache/plugin/pkg/record"
)

// This file tests the checks when a server block starts: the place in the chain, the snapshot file, the memory and
// the version.

func TestPlaceInTheChain(t *testing.T) {
	for _, tc := range []struct {
		name     string
		behind   string // the directive that optcache stands directly behind; the order is CoreDNS's otherwise
		handlers string
		last     bool   // nothing stands behind optcache
		err      string // words of the error, or none
		warning  string // words of the warning, or none
	}{
		{"before cache", "acl", "errors optcache forward", false, "", ""},
		{"behind forward", "forward", "errors forward optcache", true, "Testfile:1,forward stands before optcache,plugin.cfg", ""},
		{"behind forward, before others", "forward", "forward optcache whoami", false, "forward stands before optcache", ""},
		{"at the end", "nomad", "hosts kubernetes forward optcache", true, "hosts, kubernetes, forward", ""},
		{"behind grpc", "grpc", "grpc optcache", true, "grpc stands before", ""},
		{"behind whoami", "whoami", "whoami optcache", true, "whoami stands before", ""},
		{"behind erratic", "erratic", "erratic optcache", true, "erratic stands before", ""},
		{"behind hosts, before forward", "hosts", "hosts optcache forward", false, "", "answers of hosts are not cached"},
		{"behind file, before nothing", "file", "file optcache", true, "file stands before", ""},
		{"behind forward, which the block has not", "forward", "errors optcache", false, "", ""},
		{"before nothing", "acl", "errors optcache", true, "", "nothing to cache"},
		{"before acl", "reload", "optcache acl forward", false, "", "acl will not see answers from the cache"},
		{"before metrics and log", "reload", "optcache prometheus log forward", false, "", "prometheus, log will not see"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var order []string
			before := dnsserver.Directives
			t.Cleanup(func() { dnsserver.Directives = before })
			for _, d := range before {
				if d != pluginName {
					order = append(order, d)
				}
				if d == tc.behind {
					order = append(order, pluginName)
				}
			}
			dnsserver.Directives = order
			var handlers []plugin.Handler
			for name := range strings.FieldsSeq(tc.handlers) {
				handlers = append(handlers, named{test.ErrorHandler(), name})
			}
			var next plugin.Handler
			if !tc.last {
				next = test.ErrorHandler()
			}
			b, err := parse(controller("optcache"))
			if err != nil {
				t.Fatal(err)
			}
			wantWords(t, b.checkChain(handlers, next), tc.err)
			if tc.warning == "" {
				wantWarning(t, b, 0, "")
			} else {
				wantWarning(t, b, 1, tc.warning)
			}
		})
	}
}

// wantWords fails the test unless err contains all of words, which are separated by commas. Empty words mean no
// error.
func wantWords(t *testing.T, err error, words string) {
	t.Helper()
	if words == "" {
		if err != nil {
			t.Error(err)
		}
		return
	}
	if err == nil {
		t.Fatal("no error")
	}
	for word := range strings.SplitSeq(words, ",") {
		if !strings.Contains(err.Error(), word) {
			t.Errorf("no %q in: %v", word, err)
		}
	}
}

// A block behind a plugin that answers every query does not start, whether optcache or cache serves it.
func TestBehindWhatAnswersDoesNotStart(t *testing.T) {
	optcacheDirective()
	before := dnsserver.Directives
	t.Cleanup(func() { dnsserver.Directives = before })
	var order []string
	for _, d := range before {
		if d != pluginName {
			order = append(order, d)
		}
	}
	dnsserver.Directives = append(order, pluginName)
	for _, block := range []string{"optcache", "optcache {\nuse_optimized_cache false\n}"} {
		err := startServer(t, ".:0 {\n"+block+"\nwhoami\n}")
		wantWords(t, err, "Testfile:2,whoami stands before optcache")
	}
}

func TestPlaceOfSnapshots(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	file := filepath.Join(dir, "answers")
	for _, name := range []string{file, filepath.Join(dir, "plain")} {
		if err := os.WriteFile(name, nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{filepath.Join(dir, "folder")} {
		if err := os.Mkdir(name, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink(filepath.Join(dir, "folder"), filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct{ name, path, err string }{
		{"a file", file, ""},
		{"not there yet", filepath.Join(dir, "new"), ""},
		{"folder that does not exist", filepath.Join(dir, "no", "answers"), "no such file"},
		{"folder that is a file", filepath.Join(dir, "plain", "answers"), "not a directory"},
		{"folder that cannot be written", "/proc/answers", "cannot be written"},
		{"a folder", filepath.Join(dir, "folder"), "is a folder"},
		{"a link to a folder", filepath.Join(dir, "link"), "is a folder"},
		{"a folder, with a slash", filepath.Join(dir, "folder") + "/", "is a folder"},
		{"a device", "/dev/null", "not a regular file"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			b, err := parse(controller(block("keepttl", "cache_file_path "+tc.path)))
			if err != nil {
				t.Fatal(err)
			}
			words := tc.err
			if words != "" {
				words += ",Testfile:3 - cache_file_path," + filepath.Clean(tc.path)
			}
			wantWords(t, b.checkFile(), words)
		})
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 4 {
		t.Errorf("%v is left, %v", left, err)
	}
}

// A memory bound that leaves less room than the capacities ask for, or that is more than the machine has, gives a
// warning with its line.
func TestMemoryIsWarnedOf(t *testing.T) {
	t.Parallel()
	limit, _ := memlimit.Of(os.DirFS("/"))
	for _, tc := range []struct {
		name   string
		lines  string
		blocks int
		line   int // of the last block's warning
		words  string
		needs  int64 // a machine that has a limit
	}{
		{"enough", "max_memory 8MB", 1, 0, "", 0},
		{"derived", "success 20000", 1, 0, "", 0},
		{"too little", "keepttl\nmax_memory 1MB", 1, 3, "max_memory leaves room for about,less than the 20000", 0},
		{"too little for many", "success 1000000\nmax_memory 64MB", 1, 3, "less than the 1010000", 0},
		{"more than there is", fmt.Sprintf("keepttl\nmax_memory %d", limit+limit/2), 1, 3, "max_memory allows,may be killed", 1},
		{"together more than there is", fmt.Sprintf("max_memory %d", limit*2/3), 2, 2, "together with other server blocks", 1},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if tc.needs > 0 && limit == 0 {
				t.Skip("the system does not say how much memory it has")
			}
			if tc.needs > 0 && limit/2 > mostMemory {
				return // max_memory cannot ask for more than this machine has
			}
			c := controller(block(tc.lines))
			b, err := parse(c)
			if err != nil {
				t.Fatal(err)
			}
			z := plan(&b.options)
			records := int64(z.shards) * int64(z.pieces[record.Success]+z.pieces[record.Denial]) * pieceBytes
			bound := int64(z.shards)*z.overhead() + records
			for range tc.blocks {
				b.warnings = nil
				b.checkMemory(&b.options, records, bound)
			}
			wantWarning(t, b, tc.line, tc.words)
		})
	}
}

func TestMemoryErrorNamesItsOption(t *testing.T) {
	t.Parallel()
	for corefile, words := range map[string]string{
		"optcache":                                                 "Testfile:1 - optcache asks",
		block("denial 5000", "success 20000"):                      "Testfile:3 - success asks",
		block("denial 5000"):                                       "Testfile:2 - denial asks",
		block("success 2000", "max_memory 64M"):                    "Testfile:3 - max_memory asks",
		block("success 2000", "max_memory 0"):                      "Testfile:2 - success asks",
		block("keepttl", "denial 2000", "success 5", "success 99"): "Testfile:5 - success asks",
	} {
		b, err := parse(controller(corefile))
		if err != nil {
			t.Fatal(err)
		}
		err = b.errMemory(syscall.ENOMEM)
		wantWords(t, err, words+",ulimit -v")
		if !errors.Is(err, syscall.ENOMEM) {
			t.Errorf("%v lacks its cause", err)
		}
	}
}

func TestOtherVersionsAreRefused(t *testing.T) {
	t.Parallel()
	for version, ok := range map[string]bool{
		"": true, "1.15.0": true, "1.15.0-custom": true, "1.15.0+k8s": true,
		"1.14.4": false, "1.15.1": false, "1.15.01": false, "2.0.0": false,
	} {
		if err := checkVersion(version); (err == nil) != ok {
			t.Errorf("%q: %v", version, err)
		} else if err != nil {
			wantWords(t, err, "CoreDNS "+version+",made for CoreDNS 1.15.0 only")
		}
	}
}
