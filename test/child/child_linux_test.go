package child

import (
	"os/exec"
	"runtime"
	"syscall"
	"testing"
)

// A process outlives the goroutines and the threads of the test that has started it.
func TestStartFromAThreadThatEnds(t *testing.T) {
	for range 20 {
		cmd := exec.Command("cat") // until its input ends
		stdin, err := cmd.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		thread := make(chan int)
		go func() {
			runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
			err = Start(cmd)
			thread <- syscall.Gettid()
		}()
		tid := <-thread
		if err != nil {
			t.Fatal(err)
		}
		// The process's first thread is the one that Go does not end.
		for tid != syscall.Getpid() && syscall.Tgkill(syscall.Getpid(), tid, 0) == nil {
			runtime.Gosched()
		}
		stdin.Close()
		if err := cmd.Wait(); err != nil {
			t.Fatal(err)
		}
	}
}
