package wire

import (
	"bytes"
	"testing"

	"github.com/miekg/dns"
)

func TestPutHeader(t *testing.T) {
	t.Parallel()
	hdr := func(set func(*dns.MsgHdr)) dns.MsgHdr {
		h := dns.MsgHdr{Id: 0xBEEF}
		set(&h)
		return h
	}
	tests := []struct {
		hdr  dns.MsgHdr
		bits uint16
	}{
		{hdr(func(*dns.MsgHdr) {}), 0},
		{hdr(func(h *dns.MsgHdr) { h.Response = true }), FlagQR},
		{hdr(func(h *dns.MsgHdr) { h.Authoritative = true }), FlagAA},
		{hdr(func(h *dns.MsgHdr) { h.Truncated = true }), FlagTC},
		{hdr(func(h *dns.MsgHdr) { h.RecursionDesired = true }), FlagRD},
		{hdr(func(h *dns.MsgHdr) { h.RecursionAvailable = true }), FlagRA},
		{hdr(func(h *dns.MsgHdr) { h.AuthenticatedData = true }), FlagAD},
		{hdr(func(h *dns.MsgHdr) { h.CheckingDisabled = true }), FlagCD},
		{hdr(func(h *dns.MsgHdr) { h.Rcode = 15 }), 15},
		{hdr(func(h *dns.MsgHdr) { h.Response, h.Rcode = true, dns.RcodeNameError }), FlagQR | dns.RcodeNameError},
	}
	for _, tc := range tests {
		want, err := (&dns.Msg{MsgHdr: tc.hdr}).Pack()
		if err != nil {
			t.Fatalf("Pack(%v): %v", tc.hdr, err)
		}
		got := make([]byte, HeaderLen)
		PutHeader(got, tc.hdr.Id, tc.bits, 0, 0, 0, 0)
		if !bytes.Equal(got, want) {
			t.Errorf("PutHeader of %+v = %x, want %x", tc.hdr, got, want)
		}
	}
}

func TestPutHeaderCounts(t *testing.T) {
	t.Parallel()
	got := bytes.Repeat([]byte{0xAA}, HeaderLen+1)
	PutHeader(got, 0x0102, 0x0304, 0x0506, 0x0708, 0x090A, 0x0B0C)
	if want := "\x01\x02\x03\x04\x05\x06\x07\x08\x09\x0a\x0b\x0c\xaa"; string(got) != want {
		t.Errorf("PutHeader = %x, want %x", got, want)
	}
}
