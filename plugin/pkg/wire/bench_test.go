package wire

import (
	"strconv"
	"strings"
	"testing"
)

// name60 has 60 characters, which is not a multiple of eight.
const name60 = "k9xq.cdn-assets-eu-west-1.static.Media-Delivery.example.net."

func BenchmarkPackName(b *testing.B) {
	for _, name := range []string{
		"www.example.org.",
		name60,
		strings.Repeat("abcdefg.", 31),
		`a\.b\032c.example.org.`,
	} {
		b.Run(strconv.Itoa(len(name)), func(b *testing.B) {
			dst := make([]byte, MaxName)
			b.ReportAllocs()
			for b.Loop() {
				if _, ok := PackName(dst, name); !ok {
					b.Fatal(name)
				}
			}
		})
	}
}

func BenchmarkLower(b *testing.B) {
	for _, n := range []int{16, 64, 255} {
		src := []byte(strings.Repeat("Www.eXample.Org", 17)[:n])
		dst := make([]byte, n)
		b.Run("word/"+strconv.Itoa(n), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				Lower(dst, src)
			}
		})
		b.Run("byte/"+strconv.Itoa(n), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				lowerByByte(dst, src)
			}
		})
	}
}

// lowerByByte is the simple loop that Lower must be faster than.
func lowerByByte(dst, src []byte) {
	dst = dst[:len(src)]
	for i, c := range src {
		if 'A' <= c && c <= 'Z' {
			c |= 0x20
		}
		dst[i] = c
	}
}

func BenchmarkInZone(b *testing.B) {
	name := []byte("\x03www\x07example\x03org\x00")
	for _, bc := range []struct{ name, zone string }{
		{"root", "\x00"},
		{"parent", "\x07example\x03org\x00"},
		{"equal", "\x03www\x07example\x03org\x00"},
		{"elsewhere", "\x07example\x03net\x00"},
	} {
		zone := []byte(bc.zone)
		b.Run(bc.name, func(b *testing.B) {
			b.ReportAllocs()
			in := false
			for b.Loop() {
				in = InZone(name, zone)
			}
			if want := bc.name != "elsewhere"; in != want {
				b.Fatalf("InZone = %v, want %v", in, want)
			}
		})
	}
}

func BenchmarkReply(b *testing.B) {
	buf := make([]byte, 512)
	b.ReportAllocs()
	for b.Loop() {
		PutHeader(buf, 4711, FlagQR|FlagRD|FlagRA, 1, 4, 0, 1)
		PutOPT(buf[200:], 1232, FlagDO)
	}
}
