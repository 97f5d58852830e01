// Package child starts the processes that tests need.
package child

import "os/exec"

// Start is cmd.Start. On Linux, the system also kills the process when this one ends without doing so.
func Start(cmd *exec.Cmd) error { return start(cmd) }
