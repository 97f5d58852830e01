package directives

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/coredns/coredns/core/dnsserver"
)

func TestOrderDiffersFromCoreDNSInOneLine(t *testing.T) {
	stock := slices.Clone(dnsserver.Directives)
	ours := WithOptcache(dnsserver.Directives)

	if !slices.Equal(stock, dnsserver.Directives) {
		t.Error("WithOptcache changed CoreDNS's own list")
	}
	checkOneMore(t, ours, stock, "optcache", "cache")
}

func TestOrderWithoutCachePanics(t *testing.T) {
	defer func() {
		if recover() == nil {
			t.Error("want a panic: optcache has no place")
		}
	}()
	WithOptcache([]string{"errors", "forward"})
}

func TestPluginCfgDiffersFromCoreDNSInOneLine(t *testing.T) {
	comment := func(line string) bool { return line == "" || strings.HasPrefix(line, "#") }
	stock := slices.DeleteFunc(lines(t, filepath.Join(coreDNSDir(t), "plugin.cfg")), comment)
	ours := slices.DeleteFunc(lines(t, pluginCfg), comment)
	checkOneMore(t, ours, stock, "optcache:github.com/optcache/optcache", "cache:cache")
}

// A CoreDNS that is built from plugin.cfg.example has the same order of plugins as ours.
func TestPluginCfgHasOurOrder(t *testing.T) {
	var names []string
	for _, line := range lines(t, pluginCfg) {
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		name, _, _ := strings.Cut(line, ":")
		names = append(names, name)
	}
	if ours := WithOptcache(dnsserver.Directives); !slices.Equal(names, ours) {
		t.Errorf("plugin.cfg.example has the order\n%v, want\n%v", names, ours)
	}
}

const pluginCfg = "../../../../plugin.cfg.example"

// checkOneMore fails the test unless ours is stock with one more line, directly before the line before.
func checkOneMore(t *testing.T, ours, stock []string, line, before string) {
	t.Helper()
	i := slices.Index(ours, line)
	if i < 0 || i+1 == len(ours) || ours[i+1] != before {
		t.Fatalf("%q does not stand directly before %q", line, before)
	}
	if without := slices.Delete(slices.Clone(ours), i, i+1); !slices.Equal(without, stock) {
		t.Errorf("without %q:\n%q, want CoreDNS's\n%q", line, without, stock)
	}
}

// coreDNSDir returns the folder of the CoreDNS that go.mod names.
func coreDNSDir(t *testing.T) string {
	t.Helper()
	out, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}", "github.com/coredns/coredns").Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	return strings.TrimSpace(string(out))
}

func lines(t *testing.T, path string) []string {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return strings.Split(string(text), "\n")
}
