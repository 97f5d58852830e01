// Command delay is a TCP proxy that passes bytes on later: `delay LISTEN TARGET DELAY`, as in `delay 127.0.0.1:1 127.0.0.1:2 5ms`.
// Each direction has the delay, and the rate is not bounded. It does what netem does in a kernel that has it.
package main

import (
	"fmt"
	"log"
	"net"
	"os"
	"time"
)

func main() {
	if len(os.Args) != 4 {
		fmt.Fprintln(os.Stderr, "usage: delay LISTEN TARGET DELAY")
		os.Exit(2)
	}
	delay, err := time.ParseDuration(os.Args[3])
	if err != nil {
		log.Fatal(err)
	}
	l, err := net.Listen("tcp", os.Args[1])
	if err != nil {
		log.Fatal(err)
	}
	for {
		from, err := l.Accept()
		if err != nil {
			log.Fatal(err)
		}
		to, err := net.Dial("tcp", os.Args[2])
		if err != nil {
			from.Close()
			continue
		}
		go pass(from, to, delay)
		go pass(to, from, delay)
	}
}

// chunk is what has been read, and when it is due.
type chunk struct {
	bytes []byte
	due   time.Time
}

// pass passes on what comes, until either end closes. Then it closes both.
func pass(from, to net.Conn, delay time.Duration) {
	chunks := make(chan chunk, 1024)
	go func() {
		defer from.Close()
		defer to.Close()
		for c := range chunks {
			time.Sleep(time.Until(c.due))
			if _, err := to.Write(c.bytes); err != nil {
				break
			}
		}
		for range chunks { // the reader does not wait for ever
		}
	}()
	defer close(chunks)
	for {
		b := make([]byte, 16<<10)
		n, err := from.Read(b)
		if n > 0 {
			chunks <- chunk{b[:n], time.Now().Add(delay)}
		}
		if err != nil {
			return
		}
	}
}
