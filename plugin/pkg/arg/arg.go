// Package arg reads the words of a Corefile: numbers, durations, sizes and switches. Its errors name the file, the line
// and the word.
package arg

import (
	"errors"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/coredns/caddy"
)

// All returns the words on the line after the current one, a property's name. There must be lo to hi of them.
func All(c *caddy.Controller, lo, hi int) ([]string, error) {
	name := c.Val()
	words := c.RemainingArgs()
	if c.NextArg() { // RemainingArgs stops short of the line's end at an opening brace only
		return nil, c.Errf("unexpected %q after %s", c.Val(), name)
	}
	return words, Check(c, name, words, lo, hi)
}

// Check returns an error if there are not lo to hi words after name, or if one of them cannot be a value. With hi =
// math.MaxInt it looks at the first lo words only, and leaves the others to the caller.
func Check(c *caddy.Controller, name string, words []string, lo, hi int) error {
	known := words
	if hi == math.MaxInt {
		known = words[:min(lo, len(words))]
	}
	switch {
	case slices.Contains(known, "}"):
		return c.Errf("%s: unexpected \"}\": it goes on a line of its own", name)
	case slices.Contains(known, ""):
		return c.Errf("%s lacks its value: \"\" was given; is an environment variable unset?", name)
	case len(words) < lo:
		return c.Errf("%s lacks its value", name)
	case len(words) > hi:
		return c.Errf("%s: unexpected %q", name, words[hi])
	}
	return nil
}

// One returns the current word, a property's name, and the only word after it.
func One(c *caddy.Controller) (name, word string, err error) {
	name = c.Val()
	words, err := All(c, 1, 1)
	if err != nil {
		return name, "", err
	}
	return name, words[0], nil
}

// Int reads a number from lo to hi.
func Int(c *caddy.Controller, lo, hi int) (int, error) {
	name, word, err := One(c)
	if err != nil {
		return 0, err
	}
	return Number(c, name, word, lo, hi)
}

// Bool reads true or false.
func Bool(c *caddy.Controller) (bool, error) {
	name, word, err := One(c)
	if err != nil {
		return false, err
	}
	if word != "true" && word != "false" {
		return false, c.Errf("%s: %q is neither true nor false", name, word)
	}
	return word == "true", nil
}

// Duration returns word as a duration. what names the value in the error.
func Duration(c *caddy.Controller, what, word string) (time.Duration, error) {
	d, err := time.ParseDuration(word)
	if err != nil {
		return 0, c.Errf("%s: %q is not a duration such as 5s", what, word)
	}
	return d, nil
}

// DurationUpTo returns word as a duration from 0 to hi. what names the value in the error.
func DurationUpTo(c *caddy.Controller, what, word string, hi time.Duration) (time.Duration, error) {
	d, err := Duration(c, what, word)
	if err != nil {
		return 0, err
	}
	if d < 0 || d > hi {
		if hi == math.MaxInt64 {
			return 0, c.Errf("%s: %q is less than 0", what, word)
		}
		return 0, c.Errf("%s: %q is not between 0 and %v", what, word, hi)
	}
	return d, nil
}

// Switch reads on or off.
func Switch(c *caddy.Controller) (bool, error) {
	name, word, err := One(c)
	if err != nil {
		return false, err
	}
	if word != "on" && word != "off" {
		return false, c.Errf("%s: %q is neither on nor off", name, word)
	}
	return word == "on", nil
}

// sizeUnits are units of memory, in bytes. KB means KiB, and so on: memory comes in powers of two.
var sizeUnits = map[string]uint64{
	"": 1, "b": 1,
	"k": 1 << 10, "ki": 1 << 10, "kb": 1 << 10, "kib": 1 << 10,
	"m": 1 << 20, "mi": 1 << 20, "mb": 1 << 20, "mib": 1 << 20,
	"g": 1 << 30, "gi": 1 << 30, "gb": 1 << 30, "gib": 1 << 30,
	"t": 1 << 40, "ti": 1 << 40, "tb": 1 << 40, "tib": 1 << 40,
}

// Size reads an amount of memory, such as 64MB, and returns it in bytes: 0, or lo to hi. lo is 1 MB or more.
func Size(c *caddy.Controller, lo, hi int64) (int64, error) {
	name, word, err := One(c)
	if err != nil {
		return 0, err
	}
	return Amount(c, name, word, lo, hi)
}

// Amount is Size for a word that has been read. name names the value in the error.
func Amount(c *caddy.Controller, name, word string, lo, hi int64) (int64, error) {
	unitAt := len(word) - len(strings.TrimLeft(word, "0123456789"))
	unit, ok := sizeUnits[strings.ToLower(word[unitAt:])]
	n, err := strconv.ParseUint(word[:unitAt], 10, 63)
	switch {
	case !ok || errors.Is(err, strconv.ErrSyntax):
		return 0, c.Errf("%s: %q is not a size such as 64MB", name, word)
	case err != nil || n > math.MaxInt64/unit:
		return 0, c.Errf("%s: %q is too large", name, word)
	case n != 0 && n*unit < uint64(lo):
		return 0, c.Errf("%s: %q is less than %dMB", name, word, lo>>20)
	case int64(n*unit) > hi:
		return 0, c.Errf("%s: %q is more than the %d MB that a process of %d bits may have", name, word, hi>>20, strconv.IntSize)
	}
	return int64(n * unit), nil
}

// Number returns word as a number from lo to hi. what names the value in the error.
func Number(c *caddy.Controller, what, word string, lo, hi int) (int, error) {
	n, err := strconv.Atoi(word)
	if errors.Is(err, strconv.ErrSyntax) {
		return 0, c.Errf("%s: %q is not a whole number", what, word)
	}
	if err != nil || n < lo || n > hi {
		return 0, c.Errf("%s: %q is not between %d and %d", what, word, lo, hi)
	}
	return n, nil
}
