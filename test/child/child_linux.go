package child

import (
	"os/exec"
	"runtime"
	"sync"
	"syscall"
)

// start has one thread start all processes, and that thread never ends. The signal of PR_SET_PDEATHSIG comes when the thread that
// started a process ends, even if other threads of the same process go on: see prctl(2). Go ends a thread with the goroutine that is
// locked to it.
func start(cmd *exec.Cmd) error {
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = new(syscall.SysProcAttr)
	}
	cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL
	started := make(chan error)
	thread() <- func() { started <- cmd.Start() }
	return <-started
}

// thread returns the channel of a thread that never ends. The thread runs each function that it is sent.
var thread = sync.OnceValue(func() chan<- func() {
	work := make(chan func())
	go func() {
		runtime.LockOSThread()
		for f := range work {
			f()
		}
	}()
	return work
})
