package test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/miekg/dns"
)

// What is dumped in either form is there again when it is loaded, after a flush of everything. What is warmed is there before the
// first client asks.
func TestDumpLoadAndWarm(t *testing.T) {
	t.Parallel()
	u := newUpstream(t)
	dir := shortDir(t)
	addr := "unix://" + filepath.Join(dir, "control.sock")
	const names = 50
	s := start(t, block("dns", u.addr, "optcache {\n\t\tcontrol "+addr+"\n\t}"))
	askHosts(t, s, names)
	asked := func(i int) int {
		ask(t, overUDP(s.addr("dns")), query(hostName(i), dns.TypeA))
		return u.count(hostName(i), dns.TypeA)
	}
	for form, args := range map[string][]string{"snapshot": nil, "text": {"--text"}} {
		path := filepath.Join(dir, form)
		if out := done(t, addr, append([]string{"dump", path}, args...)...); !strings.Contains(out, " written to "+path) {
			t.Errorf("dump says %s", out)
		}
		dump, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if got := strings.HasPrefix(string(dump), ";optcache-text/1 "); got != (form == "text") || form == "text" && strings.Count(string(dump), "\n;answer ") != names {
			t.Errorf("%s: %.200q", form, dump)
		}
		done(t, addr, "flush", "--all", "--yes")
		if _, _, code := tool(t, addr, "lookup", hostName(7)); code != 4 {
			t.Fatalf("lookup after a flush: exit %d", code)
		}
		// A dump that is cut off changes nothing.
		half := filepath.Join(dir, "half")
		if err := os.WriteFile(half, dump[:len(dump)/2], 0o600); err != nil {
			t.Fatal(err)
		}
		if _, errs, code := tool(t, addr, "load", half); code != 1 || !strings.Contains(errs, "nothing is changed") {
			t.Errorf("%s: load of a half: exit %d: %s", form, code, errs)
		}
		if _, _, code := tool(t, addr, "lookup", hostName(7)); code != 4 {
			t.Errorf("%s: lookup after a load of a half: exit %d", form, code)
		}
		if out := done(t, addr, "load", path); out != "50 answers loaded\n" {
			t.Errorf("%s: load says %s", form, out)
		}
		if out := done(t, addr, "lookup", hostName(7), "A"); !strings.Contains(out, "192.0.2.") {
			t.Errorf("%s: lookup shows %s", form, out)
		}
		if n := asked(7); n != 1 {
			t.Errorf("%s: the upstream was asked %d times", form, n)
		}
	}

	list := filepath.Join(dir, "names")
	write := func(text string) {
		if err := os.WriteFile(list, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(hostName(0) + " A # is held\n" + hostName(names) + " A AAAA\n")
	if out := done(t, addr, "warm", "-f", list, hostName(names+1), "--type", "A"); out != "4 questions asked: 1 held already, 3 came, 0 failed\n" {
		t.Errorf("warm says %s", out)
	}
	if n, other := asked(names), asked(names+1); n != 1 || other != 1 {
		t.Errorf("the upstream was asked %d and %d times for what was warmed", n, other)
	}
	write(hostName(names+2) + "\na..b\n" + hostName(names+3) + " A ADDRESS\n")
	_, errs, code := tool(t, addr, "warm", "-f", list)
	if code != 2 || !strings.Contains(errs, list+`:2: name: "a..b"`) || !strings.Contains(errs, list+`:3: type: "ADDRESS"`) {
		t.Errorf("warm of a bad list: exit %d: %s", code, errs)
	}
	if n := u.count(hostName(names+2), dns.TypeA); n != 0 {
		t.Errorf("a bad list was asked: %d", n)
	}
}
