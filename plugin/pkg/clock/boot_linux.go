package clock

import (
	"time"

	"golang.org/x/sys/unix"
)

// sinceBoot returns the time since the system started, time in suspension included. ok is false if the system call
// fails.
func sinceBoot() (t time.Duration, ok bool) {
	var ts unix.Timespec
	if unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts) != nil {
		return 0, false
	}
	return time.Duration(ts.Nano()), true
}
