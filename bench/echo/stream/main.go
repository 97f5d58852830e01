// Command stream is the least that a DNS server in Go can do by TCP and TLS: a goroutine for each connection answers what a read
// has brought with itself, marked as a response, with one write. What it costs is the part of the kernel, of Go, and of
// the cipher.
//
//	go run ./bench/echo/stream 127.0.0.1 PORT [TLSPORT CERT KEY]
//
// It answers over UDP, too, so that who asks whether there is a server finds one.
package main

import (
	"crypto/tls"
	"encoding/binary"
	"log"
	"net"
	"os"
)

func main() {
	if len(os.Args) != 3 && len(os.Args) != 6 {
		log.Fatal("usage: stream ADDRESS PORT [TLSPORT CERT KEY]")
	}
	at := net.JoinHostPort(os.Args[1], os.Args[2])
	pc, err := net.ListenPacket("udp", at)
	if err != nil {
		log.Fatal(err)
	}
	go func() {
		p := make([]byte, 512)
		for {
			if n, from, err := pc.ReadFrom(p); err == nil && n > 2 {
				p[2] |= 0x80
				pc.WriteTo(p[:n], from)
			}
		}
	}()
	if len(os.Args) == 6 {
		pair, err := tls.LoadX509KeyPair(os.Args[4], os.Args[5])
		if err != nil {
			log.Fatal(err)
		}
		l, err := tls.Listen("tcp", net.JoinHostPort(os.Args[1], os.Args[3]), &tls.Config{Certificates: []tls.Certificate{pair}})
		if err != nil {
			log.Fatal(err)
		}
		go serve(l)
	}
	l, err := net.Listen("tcp", at)
	if err != nil {
		log.Fatal(err)
	}
	serve(l)
}

func serve(l net.Listener) {
	for {
		c, err := l.Accept()
		if err != nil {
			log.Fatal(err)
		}
		go echo(c)
	}
}

func echo(c net.Conn) {
	defer c.Close()
	p, kept := make([]byte, 64<<10+2), 0
	for {
		n, err := c.Read(p[kept:])
		if err != nil {
			return
		}
		n += kept
		whole := 0
		for whole+2 <= n && whole+2+int(binary.BigEndian.Uint16(p[whole:])) <= n {
			if size := int(binary.BigEndian.Uint16(p[whole:])); size > 2 {
				p[whole+4] |= 0x80 // QR
			}
			whole += 2 + int(binary.BigEndian.Uint16(p[whole:]))
		}
		if whole > 0 {
			if _, err := c.Write(p[:whole]); err != nil {
				return
			}
		}
		kept = copy(p, p[whole:n])
	}
}
