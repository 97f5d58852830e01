package test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// resolvConfVar names another file than /etc/resolv.conf to cmd/coredns/internal/resolvers.
const resolvConfVar = "OPTCACHE_RESOLV_CONF"

// `make run` starts, and answers for example.org, whatever /etc/resolv.conf offers.
func TestMakeRunWithoutResolvers(t *testing.T) {
	t.Parallel()
	if !strings.Contains(readFile(t, filepath.Join(root, "cmd/coredns/internal/resolvers/resolvers.go")), resolvConfVar) {
		t.Skipf("the binary does not know %s", resolvConfVar)
	}
	dir := t.TempDir()
	write := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	for name, path := range map[string]string{
		"missing":       filepath.Join(dir, "nowhere"),
		"empty":         write("empty", ""),
		"comments":      write("comments", "# nameserver 192.0.2.1\nsearch example.org\n"),
		"no address":    write("no-address", "nameserver here\n"),
		"points back":   write("back", "nameserver 127.0.0.1\nnameserver ::1\n"),
		"points to any": write("any", "nameserver 0.0.0.0\n"),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := local(t, readFile(t, filepath.Join(root, "Corefile")), "")
			s := start(t, c.text, resolvConfVar+"="+path, "OPTCACHE_UPSTREAMS=")
			if !strings.HasPrefix(name, "points") && !strings.Contains(s.out.String(), "No usable resolver") {
				t.Error("the log does not say that there is no resolver")
			}
			seenFromMemory(t, s, c, localBlock{"p1053", "www.example.org."})
		})
	}
}
