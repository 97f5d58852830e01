package clock

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const timeNamespaceEnv = "OPTCACHE_TEST_TIME_NAMESPACE"

// The two clocks differ only on a machine that has been suspended, or in a time namespace (time_namespaces(7)). The
// test makes a time namespace.
func TestClockIsTheOneThatCountsSuspension(t *testing.T) {
	if os.Getenv(timeNamespaceEnv) != "" {
		var ts unix.Timespec
		if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts); err != nil {
			t.Fatal(err)
		}
		boot, ok := sinceBoot()
		fmt.Println("ahead:", (boot - time.Duration(ts.Nano())).Truncate(time.Hour), ok)
		return
	}
	const asleep = 1000 * time.Hour
	args := []string{"--time", "--boottime", fmt.Sprint(int64(asleep / time.Second)), os.Args[0], "-test.run", "^" + t.Name() + "$"}
	if os.Getuid() != 0 {
		args = append([]string{"--map-root-user"}, args...)
	}
	cmd := exec.Command("unshare", args...)
	cmd.Env = append(os.Environ(), timeNamespaceEnv+"=1")
	out, err := cmd.CombinedOutput()
	if err != nil && !strings.Contains(string(out), "ahead:") {
		t.Skipf("no time namespaces here: %v\n%s", err, out)
	}
	if want := fmt.Sprintf("ahead: %v true\n", asleep); !strings.Contains(string(out), want) {
		t.Errorf("got %q, want %q", out, want)
	}
}
