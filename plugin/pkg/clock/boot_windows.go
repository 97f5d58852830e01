package clock

import (
	"time"

	"golang.org/x/sys/windows"
)

// sinceBoot returns the time since the system started, sleep and hibernation included. It advances in steps of 10 to
// 16 ms.
func sinceBoot() (t time.Duration, ok bool) { return windows.DurationSinceBoot(), true }
