//go:build !linux && !darwin && !windows

package clock

import "time"

// sinceBoot returns false. The system has no clock that goes on while the machine is suspended, or Go's clock is such
// a clock.
func sinceBoot() (t time.Duration, ok bool) { return 0, false }
