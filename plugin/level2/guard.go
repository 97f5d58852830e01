package level2

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strconv"
	"sync"
)

// This file looks at what a server says before the client's library reads it. The library believes its server: it makes as much
// room as a length says, goes as deep as arrays are nested, and ends the process at a reply that nobody has asked for. A server
// that is not what it should be costs its connection, and nothing else.

const (
	mostReplyLine = 64 << 10 // bytes
	mostReply     = 4 << 20  // bytes of one reply
	mostItems     = 1 << 16  // of all arrays of one reply
	mostDepth     = 8        // of arrays in arrays
	keptReply     = 256 << 10
)

// dial connects as the library would, and guards the connection.
func dial(ctx context.Context, to string, dialer *net.Dialer, config *tls.Config) (conn net.Conn, err error) {
	if config != nil {
		conn, err = (&tls.Dialer{NetDialer: dialer, Config: config}).DialContext(ctx, "tcp", to)
	} else {
		conn, err = dialer.DialContext(ctx, "tcp", to)
	}
	if err != nil {
		return nil, err
	}
	return newGuard(conn), nil
}

// guard is a connection whose reader gets whole replies only, within bounds, and no more of them than it has sent commands. One
// goroutine may read while another writes.
type guard struct {
	net.Conn
	in   *bufio.Reader
	out  []byte // the last reply
	rest []byte // what of it has not been read
	err  error  // ends the connection

	mu         sync.Mutex // guards the rest
	asked      []int      // the commands without a reply, the oldest first: how many channels each subscribes to
	channels   int        // of the last one with a reply, that have not been confirmed
	hello3     bool       // RESP3 has been asked for
	subscribes bool
	sent       struct {
		line []byte    // the beginning of a header
		left int       // arguments of the command that have not been sent
		skip int       // bytes that are left of one, with its end
		args [2][]byte // the first ones, without all of their end
		arg  int
	}
}

func newGuard(conn net.Conn) *guard {
	return &guard{Conn: conn, in: bufio.NewReaderSize(conn, mostReplyLine)}
}

// Write implements net.Conn.
func (g *guard) Write(p []byte) (int, error) {
	g.mu.Lock()
	g.note(p)
	g.mu.Unlock()
	return g.Conn.Write(p)
}

// note notes the commands in what the library sends. The caller holds the lock.
func (g *guard) note(p []byte) {
	s := &g.sent
	for len(p) > 0 {
		if s.skip > 0 {
			n := min(s.skip, len(p))
			if s.arg < len(s.args) {
				const most = 16 // longer ones are of no interest
				s.args[s.arg] = append(s.args[s.arg], p[:min(n, max(most-len(s.args[s.arg]), 0))]...)
			}
			p, s.skip = p[n:], s.skip-n
			if s.skip == 0 {
				s.arg++
				if s.left--; s.left == 0 {
					g.begun()
				}
			}
			continue
		}
		end := bytes.IndexByte(p, '\n')
		if end < 0 {
			s.line = append(s.line, p...)
			return
		}
		s.line = append(s.line, p[:end+1]...)
		p = p[end+1:]
		n, _ := strconv.Atoi(string(bytes.TrimSpace(s.line[1:]))) // the library writes it
		if s.line[0] == '*' {
			s.left, s.arg = n, 0
			s.args[0], s.args[1] = s.args[0][:0], s.args[1][:0]
		} else {
			s.skip = n + 2
		}
		s.line = s.line[:0]
	}
}

// begun notes a command that is sent. The caller holds the lock.
func (g *guard) begun() {
	channels := 0
	switch name := string(bytes.TrimSpace(g.sent.args[0])); {
	case name == "SUBSCRIBE":
		channels, g.subscribes = g.sent.arg-1, true
	case name == "HELLO" && string(bytes.TrimSpace(g.sent.args[1])) == "3":
		g.hello3 = true
	}
	g.asked = append(g.asked, channels)
}

// Read implements net.Conn.
func (g *guard) Read(p []byte) (int, error) {
	if len(g.rest) == 0 {
		if g.err == nil {
			g.err = g.reply()
		}
		if g.err != nil {
			return 0, g.err
		}
		g.rest = g.out
	}
	n := copy(p, g.rest)
	g.rest = g.rest[n:]
	return n, nil
}

var (
	errMalformedReply = errors.New("its reply is malformed")
	errLargeReply     = errors.New("its reply is too large")
	errUnasked        = errors.New("it replies to what was not asked")
)

// reply reads a reply into out.
func (g *guard) reply() error {
	if g.out = g.out[:0]; cap(g.out) > keptReply {
		g.out = nil
	}
	items := 0
	kind, n, err := g.item(0, &items)
	if err != nil {
		return err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	news := kind == '>'
	if g.subscribes && !g.hello3 && n > 0 && (kind == '*' || kind == '%' || kind == '~') { // as RESP2 has it
		news = g.first() != "pong"
	}
	switch {
	case news && n == 3 && g.first() == "message" && g.subscribes:
		return nil
	case news && (n != 3 || g.first() != "subscribe"):
		return errUnasked
	case news && g.channels > 0:
		g.channels--
		return nil
	case len(g.asked) == 0, news && g.asked[0] == 0:
		return errUnasked
	case !news && g.asked[0] > 0 && (kind != '-' || bytes.HasPrefix(g.out, []byte("-QUEUED"))):
		return errUnasked
	}
	g.channels = 0
	if news {
		g.channels = g.asked[0] - 1
	}
	g.asked = slices.Delete(g.asked, 0, 1)
	return nil
}

// first returns the first item of the array in out, if it is a string.
func (g *guard) first() string {
	_, of, _ := bytes.Cut(g.out, []byte("\n"))
	head, text, _ := bytes.Cut(of, []byte("\r\n"))
	switch {
	case len(head) > 0 && head[0] == '+':
		return string(head[1:])
	case len(head) > 0 && head[0] == '$':
		text, _, _ = bytes.Cut(text, []byte("\r\n"))
		return string(text)
	}
	return ""
}

// item appends an item of a reply, and all that is in it, to out. It returns what the item is, and how many others are in it.
func (g *guard) item(depth int, items *int) (kind byte, n int, err error) {
	line, err := g.in.ReadSlice('\n')
	switch {
	case errors.Is(err, bufio.ErrBufferFull):
		return 0, 0, errLargeReply
	case err != nil:
		return 0, 0, err
	case len(line) < 3 || line[len(line)-2] != '\r':
		return 0, 0, errMalformedReply
	}
	kind = line[0]
	text := line[1 : len(line)-2]
	if g.out = append(g.out, line...); len(g.out) > mostReply {
		return 0, 0, errLargeReply
	}
	switch kind {
	case '+', '-', ',', '(':
		return kind, 0, nil
	case '_':
		if len(text) != 0 {
			err = errMalformedReply
		}
		return kind, 0, err
	case '#':
		if len(text) != 1 {
			err = errMalformedReply
		}
		return kind, 0, err
	case ':', '$', '!', '=', '*', '~', '>', '%':
	default:
		return 0, 0, fmt.Errorf("%w: it begins with %q", errMalformedReply, kind)
	}
	number, err := strconv.ParseInt(string(text), 10, 64)
	switch none := kind == '$' || kind == '*'; {
	case err != nil || text[0] == '+':
		return 0, 0, errMalformedReply
	case kind == ':', none && number == -1:
		return kind, 0, nil
	case number < 0, kind == '>' && depth > 0:
		return 0, 0, errMalformedReply
	case number > mostReply:
		return 0, 0, errLargeReply
	}
	n = int(number)
	if kind == '$' || kind == '!' || kind == '=' {
		was := len(g.out)
		if was+n > mostReply {
			return 0, 0, errLargeReply
		}
		g.out = slices.Grow(g.out, n+2)[:was+n+2]
		if _, err := io.ReadFull(g.in, g.out[was:]); err != nil {
			return 0, 0, err
		}
		if !bytes.HasSuffix(g.out, []byte("\r\n")) {
			return 0, 0, errMalformedReply
		}
		return kind, 0, nil
	}
	if kind == '%' {
		n *= 2
	}
	if *items += n; *items > mostItems || depth == mostDepth {
		return 0, 0, errLargeReply
	}
	for range n {
		if _, _, err := g.item(depth+1, items); err != nil {
			return 0, 0, err
		}
	}
	return kind, n, nil
}
