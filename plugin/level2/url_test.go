package level2

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestParseServers(t *testing.T) {
	for _, tc := range []struct {
		urls string
		want string // the text, database and user
	}{
		{"valkey://127.0.0.1", "valkey://127.0.0.1:6379 0 "},
		{"redis://me:pw@h:7000/3", "valkey://h:7000 3 me"},
		{"rediss://h", "valkeys://h:6379 0 "},
		{"valkeys://[2001:db8::1]:1", "valkeys://[2001:db8::1]:1 0 "},
		{"valkey+cluster://a:1 valkey+cluster://b:2", "valkey+cluster://a:1,b:2 0 "},
		{"rediss+cluster://a", "valkeys+cluster://a:6379 0 "},
		{"valkey+sentinel://a/set/2 valkey+sentinel://b/set/2", "valkey+sentinel://a:26379,b:26379 2 "},
	} {
		s, err := ParseServers(strings.Fields(tc.urls))
		if err != nil {
			t.Errorf("%s: %v", tc.urls, err)
			continue
		}
		if got := s.String() + " " + string(rune('0'+s.Database)) + " " + s.User; got != tc.want {
			t.Errorf("%s: %q, and not %q", tc.urls, got, tc.want)
		}
	}
	for urls, want := range map[string]string{
		"":                                      "no URL",
		"http://h":                              `"http" is none of`,
		"h:6379":                                `none of`,
		"valkey://":                             "no host",
		"valkey://h:0":                          `"0" is no port`,
		"valkey://h:70000":                      `is no port`,
		"valkey://h/x":                          `"x" is no number`,
		"valkey://h/-1":                         `"-1" is no number`,
		"valkey://h/0/1":                        "no number",
		"valkey://h?db=1":                       "nothing may follow",
		"valkey+ring://h":                       `"ring" is neither`,
		"valkey+cluster://h/2":                  "database 0 only",
		"valkey+sentinel://h":                   "name of the set",
		"valkey://a valkey://b":                 "second server",
		"valkey+cluster://a rediss+cluster://b": "something else",
		"valkey://u:hush%zz@h":                  "cannot be read",
		"valkey://u:hush@h/x":                   "no number",
		"valkey://u:12/hush@h":                  "cannot be read",
		"valkey://u:12?hush@h":                  "cannot be read",
		"valkey://u:12#hush@h":                  "cannot be read",
		"valkey://u:p@12/hush@h":                "cannot be read",
		"valkey:u:hush@h":                       "cannot be read",
	} {
		_, err := ParseServers(strings.Fields(urls))
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, and not %q", urls, err, want)
		}
		if err != nil && strings.Contains(err.Error(), "hush") {
			t.Errorf("%v shows a password", err)
		}
	}
}

func FuzzParseServers(f *testing.F) {
	f.Add("valkey+sentinel://u:p@h:1/set/2")
	f.Fuzz(func(t *testing.T, text string) {
		if s, err := ParseServers([]string{text}); err == nil && len(s.Addresses) != 1 {
			t.Errorf("%q: %v", text, s.Addresses)
		}
	})
}

func TestParseResolver(t *testing.T) {
	for text, want := range map[string]string{"192.0.2.1": "192.0.2.1:53", "192.0.2.1:5353": "192.0.2.1:5353", "2001:db8::1": "[2001:db8::1]:53", "[2001:db8::1]:5": "[2001:db8::1]:5", "h": "", "192.0.2.1:0": "", "": ""} {
		if got, err := ParseResolver(text); got != want || (err == nil) != (want != "") {
			t.Errorf("%q: %q, %v", text, got, err)
		}
	}
}

// A password in a file counts as it is when a connection is made.
func TestPasswordFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "password")
	o := Options{PasswordFile: path}
	for _, want := range []string{"one", "two"} {
		os.WriteFile(path, []byte(want+"\n"), 0o600)
		if got, err := o.passwordNow(); got != want || err != nil {
			t.Errorf("%q, %v", got, err)
		}
	}
}
