package test

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// runBinary runs the binary to its end and returns what it printed. It must succeed.
func runBinary(t testing.TB, args ...string) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), bin, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %v\n%s", args, err, out)
	}
	return string(out)
}

// What is wrong in a Corefile is said with its file, line and word, and nothing is served.
func TestWrongCorefiles(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name string
		line string // the third of the Corefile
		want string // in the message, beside file and line
	}{
		{"no number", "success many", `"many"`},
		{"out of range", "hot_cache_percentage 51", `"51"`},
		{"no boolean", "use_optimized_cache maybe", `"maybe"`},
		{"no size", "max_memory lots", `"lots"`},
		{"servfail too long", "servfail 6m", `"6m"`},
		{"no class", "disable everything", `"everything"`},
		{"unknown word", "sucess 1000", `"sucess"`},
		{"unset variable", "hot_cache_percentage {$OPTCACHE_TEST_UNSET}", "hot_cache_percentage"},
		{"in cache's words", "use_optimized_cache false\nsuccess many", `"many"`},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			conf := filepath.Join(t.TempDir(), "Corefile")
			line := "3"
			if strings.Contains(c.line, "\n") {
				line = "4"
			}
			text := ".:0 {\noptcache {\n" + c.line + "\n}\nbind 127.0.0.1\nwhoami\n}\n"
			if err := os.WriteFile(conf, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
			var stderr strings.Builder
			cmd := exec.CommandContext(t.Context(), bin, "-conf", conf)
			cmd.Stderr = &stderr
			err := cmd.Run()
			if _, exited := err.(*exec.ExitError); !exited {
				t.Fatalf("ended with %v", err)
			}
			got := stderr.String()
			if !strings.Contains(got, conf+":"+line) || !strings.Contains(got, c.want) || !strings.Contains(got, "optcache") {
				t.Errorf("stderr has no %s, line %s and %s: %s", conf, line, c.want, got)
			}
		})
	}
}
