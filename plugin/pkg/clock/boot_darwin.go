package clock

import (
	"time"

	"golang.org/x/sys/unix"
)

// sinceBoot returns a time that goes on while the machine sleeps. CLOCK_MONOTONIC does so on this system
// (clock_gettime(3)), and Go's clock does not. ok is false if the system call fails.
func sinceBoot() (t time.Duration, ok bool) {
	var ts unix.Timespec
	if unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts) != nil {
		return 0, false
	}
	return time.Duration(ts.Nano()), true
}
