package arg

import (
	"math"
	"strings"
	"testing"
	"time"

	"github.com/coredns/caddy"
)

// read calls f with a controller that stands on the first word of a line.
func read[T any](line string, f func(*caddy.Controller) (T, error)) (T, error) {
	c := caddy.NewTestController("dns", line)
	c.Next()
	return f(c)
}

// verify compares what f returns for each line with the value, or with the words of the error, that the test wants.
func verify[T comparable](t *testing.T, f func(*caddy.Controller) (T, error), values map[string]T, failures map[string]string) {
	t.Helper()
	for line, want := range values {
		if got, err := read(line, f); err != nil || got != want {
			t.Errorf("%s: %v, %v; want %v", line, got, err, want)
		}
	}
	for line, want := range failures {
		_, err := read(line, f)
		if err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), ":1 - ") {
			t.Errorf("%s: error %v, want %q with its place", line, err, want)
		}
	}
}

func TestInt(t *testing.T) {
	verify(t, func(c *caddy.Controller) (int, error) { return Int(c, 1, 9) },
		map[string]int{"x 1": 1, "x 9": 9},
		map[string]string{
			"x": "x lacks its value", "x 0": `"0" is not between 1 and 9`, "x 10": "not between", "x 1e1": `"1e1" is not a whole number`,
			"x 99999999999999999999": "not between", "x 1 2": `unexpected "2"`, `x ""`: "environment variable", "x }": "a line of its own",
		})
}

func TestBool(t *testing.T) {
	verify(t, Bool, map[string]bool{"x true": true, "x false": false}, map[string]string{"x yes": `"yes" is neither true nor false`, "x": "lacks"})
}

func TestSwitch(t *testing.T) {
	verify(t, Switch, map[string]bool{"x on": true, "x off": false}, map[string]string{"x true": `"true" is neither on nor off`})
}

func TestSize(t *testing.T) {
	const most = 1 << 40
	verify(t, func(c *caddy.Controller) (int64, error) { return Size(c, 1<<20, most) },
		map[string]int64{"x 0": 0, "x 1MB": 1 << 20, "x 2Mi": 2 << 20, "x 3g": 3 << 30, "x 1048576": 1 << 20, "x 2048KiB": 2 << 20},
		map[string]string{
			"x 1KB": `"1KB" is less than 1MB`, "x 2TB": "is more than", "x MB": `"MB" is not a size`, "x 1.5GB": "not a size", "x -1MB": "not a size",
			"x 9999999999TB": "too large", "x 64 MB": `unexpected "MB"`,
		})
}

func TestDuration(t *testing.T) {
	verify(t, func(c *caddy.Controller) (time.Duration, error) {
		name, word, err := One(c)
		if err != nil {
			return 0, err
		}
		return DurationUpTo(c, name, word, time.Minute)
	}, map[string]time.Duration{"x 0": 0, "x 5s": 5 * time.Second, "x 1m": time.Minute},
		map[string]string{"x 5": `"5" is not a duration such as 5s`, "x 61s": `"61s" is not between 0 and 1m0s`, "x -1s": "not between"})
}

// An open-ended list of words is checked up to its least number of words. The others are left to the caller.
func TestCheckWithoutEnd(t *testing.T) {
	c := caddy.NewTestController("dns", "x")
	c.Next()
	if err := Check(c, "x", []string{"a", ""}, 1, math.MaxInt); err != nil {
		t.Error(err)
	}
	if Check(c, "x", []string{""}, 1, math.MaxInt) == nil {
		t.Error("an empty word passes")
	}
}
