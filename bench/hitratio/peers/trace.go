package main

import (
	"bufio"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// This file reads traces. Three formats are known, one request per line and no blank lines:
//
//	time_s key ttl_s bytes
//	time_s key ttl_s
//	key
//
// The first line says which of them a file has. Keys are dense numbers by first appearance, so
// that whatever is kept per key can be an array. Times are seconds, with a fraction or without,
// and never go back.

// request is one line of a trace.
type request struct {
	at  time.Duration
	key uint32
	ttl uint32 // seconds

	above uint32 // of a denial in a search list: the name above that does not exist, from 1 on; 0: none
	bytes uint16 // of the answer, for caches that are bound by memory; 0: an address
}

// expires returns when an answer fetched by the request is no longer good.
func (r request) expires() time.Duration { return r.at + time.Duration(r.ttl)*time.Second }

// trace is a trace in memory, 24 bytes a request. Nobody changes it once it is read.
type trace struct {
	name string
	// timed is false for traces of plain keys. Their clock stands still at 0 and their answers
	// live for a day, so that nothing expires and no policy needs to know the difference.
	timed    bool
	requests []request
	keys     int // distinct; all keys are below
	first    int // the first request that counts
}

// maxBytes is the longest answer: what a message holds beside header and question.
const maxBytes = 65_000

const untimedTTL = 24 * 60 * 60 // seconds

// readTrace reads a gzip'd trace. Errors name the file and, where there is one, the line.
func readTrace(path string) (*trace, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	t, line, err := parseTrace(z)
	if err != nil {
		return nil, fmt.Errorf("%s:%d: %w", path, line, err)
	}
	t.name = strings.TrimSuffix(strings.TrimSuffix(filepath.Base(path), ".gz"), ".txt")
	return t, nil
}

// parseTrace reads the lines of a trace and returns the number of the last one it looked at.
func parseTrace(r io.Reader) (t *trace, line int, err error) {
	t = &trace{}
	lines := bufio.NewScanner(r)
	var last time.Duration
	var columns int
	for lines.Scan() {
		line++
		fields := strings.Fields(lines.Text())
		if line == 1 {
			t.timed = len(fields) == 3 || len(fields) == 4
			columns = len(fields)
		}
		req := request{ttl: untimedTTL}
		switch {
		case t.timed && len(fields) == columns:
			if req.at, err = parseTime(fields[0]); err != nil {
				return nil, line, err
			}
			if req.at < last {
				return nil, line, fmt.Errorf("time %q goes back", fields[0])
			}
			last = req.at
			ttl, err := strconv.ParseUint(fields[2], 10, 32)
			if err != nil {
				return nil, line, fmt.Errorf("bad TTL %q", fields[2])
			}
			req.ttl = uint32(ttl)
			if columns == 4 {
				bytes, err := strconv.ParseUint(fields[3], 10, 16)
				if err != nil || bytes > maxBytes {
					return nil, line, fmt.Errorf("bad number of bytes %q", fields[3])
				}
				req.bytes = uint16(bytes)
			}
			fields = fields[1:]
		case t.timed:
			return nil, line, fmt.Errorf("want %q, got %q", "time key ttl", lines.Text())
		case len(fields) != 1:
			return nil, line, fmt.Errorf("want a key, got %q", lines.Text())
		}
		key, err := strconv.ParseUint(fields[0], 10, 32)
		if err != nil {
			return nil, line, fmt.Errorf("bad key %q", fields[0])
		}
		if key > uint64(t.keys) {
			return nil, line, fmt.Errorf("key %d comes before key %d: keys are numbered by first appearance", key, t.keys)
		}
		if key == uint64(t.keys) {
			t.keys++
		}
		req.key = uint32(key)
		t.requests = append(t.requests, req)
	}
	if err := lines.Err(); err != nil {
		return nil, line + 1, err
	}
	if len(t.requests) == 0 {
		return nil, line, errors.New("no requests")
	}
	return t, line, nil
}

// maxSeconds keeps times and expiries within a time.Duration.
const maxSeconds = math.MaxInt64/1e9 - math.MaxUint32

func parseTime(s string) (time.Duration, error) {
	if n, err := strconv.ParseUint(s, 10, 32); err == nil {
		return time.Duration(n) * time.Second, nil
	}
	f, err := strconv.ParseFloat(s, 64)
	if err != nil || !(f >= 0 && f < maxSeconds) {
		return 0, fmt.Errorf("bad time %q", s)
	}
	return time.Duration(math.Round(f * 1e9)), nil
}
