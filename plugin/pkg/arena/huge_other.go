//go:build !linux

package arena

import "time"

// readHuge reports false: only Linux says which memory is on huge pages.
func readHuge(time.Time) (hugePages, bool) { return nil, false }
