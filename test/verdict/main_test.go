package main

import (
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// events are those of a package with one test that ends as told, with a message.
func events(test, message, action string) string {
	return fmt.Sprintf(`{"Action":"run","Package":"p","Test":"%[1]s"}
{"Action":"output","Package":"p","Test":"%[1]s","Output":"    a_test.go:1: %[2]s\n"}
{"Action":"%[3]s","Package":"p","Test":"%[1]s"}
{"Action":"output","Package":"p","Output":"PASS\n"}
{"Action":"output","Package":"p","Output":"ok  \tp\t0.1s\n"}
{"Action":"pass","Package":"p"}
`, test, message, action)
}

func TestCheck(t *testing.T) {
	t.Parallel()
	list := filepath.Join(t.TempDir(), "list")
	if err := os.WriteFile(list, []byte("# comment\n\nTestA(/.*)? | no (way|luck) | why\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	rules, err := readRules(list)
	if err != nil {
		t.Fatal(err)
	}
	const end = "ok  \tp\t0.1s\n"
	for name, test := range map[string]struct {
		in, out    string
		unexpected int
	}{
		"passed":           {events("TestB", "a log", "pass"), end, 0},
		"failed":           {events("TestB", "what is wrong", "fail"), "    a_test.go:1: what is wrong\n" + end, 0},
		"expected":         {events("TestA", "no luck", "skip"), end, 0},
		"expected subtest": {events("TestA/b", "no way", "skip"), end, 0},
		"other message":    {events("TestA", "no dig", "skip"), end, 1},
		"other test":       {events("TestAB", "no luck", "skip"), end, 1},
		"no tests":         {`{"Action":"output","Package":"p","Output":"?   \tp\t[no test files]` + `\n"}` + "\n" + `{"Action":"skip","Package":"p"}` + "\n", "?   \tp\t[no test files]\n", 0},
		"panic": {`{"Action":"output","Package":"p","Test":"TestB","Output":"panic: x\n"}` + "\n" + `{"Action":"fail","Package":"p"}` + "\n",
			"panic: x\n", 0},
		"build":            {`{"ImportPath":"p","Action":"build-output","Output":"a.go:1: wrong\n"}` + "\n", "a.go:1: wrong\n", 0},
		"make":             {"make: *** [Makefile:1: test] Error 1\n{odd}\n", "make: *** [Makefile:1: test] Error 1\n{odd}\n", 0},
		"without line end": {strings.TrimSuffix(events("TestA", "no dig", "skip"), "\n") + "\nmake: end", end + "make: end", 1},
	} {
		var out strings.Builder
		v, err := check(strings.NewReader(test.in), &out, rules)
		if err != nil || out.String() != test.out || len(v.unexpected) != test.unexpected {
			t.Errorf("%s: %q, want %q; %+v, %v", name, out.String(), test.out, v, err)
		}
	}
}

// Only a test that has failed by itself may be run once more.
func TestRepeatable(t *testing.T) {
	t.Parallel()
	event := func(action, test, output string) string {
		return fmt.Sprintf(`{"Action":%q,"Package":"p","Test":%q,"Output":%q}`+"\n", action, test, output)
	}
	failed := event("output", "TestA", "    a_test.go:1: wrong\n") + event("fail", "TestA/b", "") + event("fail", "TestA", "")
	end := event("fail", "", "")
	for name, test := range map[string]struct {
		in   string
		want string
	}{
		"passed":                      {event("pass", "TestA", "") + event("pass", "", ""), ""},
		"a test":                      {failed + end, "p TestA\n"},
		"two":                         {failed + event("fail", "TestB", "") + end, "p TestA\np TestB\n"},
		"in parallel":                 {failed + event("output", "TestC", "    c\n") + event("pass", "TestC", "") + end, "p TestA\n"},
		"panic":                       {event("output", "TestA", "panic: oh\n") + failed + end, ""},
		"panic of a server":           {event("output", "TestA", "    server_test.go:1: panic: oh\n") + failed + end, ""},
		"data race":                   {event("output", "TestB", "WARNING: DATA RACE\n") + failed + end, ""},
		"data race, told by the test": {event("output", "TestA", "    testing.go:1: race detected during execution of test\n") + failed + end, ""},
		"a test without an end":       {failed + event("output", "TestB", "    b\n") + end, ""},
		"only the package":            {end, ""},
		"only the package, later":     {failed + end + end, ""},
		"a build":                     {failed + end + `{"Action":"fail","Package":"q"}` + "\n", ""},
		"an unexpected skip":          {failed + event("skip", "TestS", "") + end, ""},
	} {
		v, err := check(strings.NewReader(test.in), io.Discard, nil)
		if got := strings.Join(v.repeatable(), ""); err != nil || got != test.want {
			t.Errorf("%s: %q, %v, want %q", name, got, err, test.want)
		}
	}
}

func TestRulesThatAreNone(t *testing.T) {
	t.Parallel()
	for _, line := range []string{"TestA", "TestA | message", "TestA | [ | why", "( | message | why"} {
		path := filepath.Join(t.TempDir(), "list")
		if err := os.WriteFile(path, []byte("# first\n"+line+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := readRules(path); err == nil || !strings.Contains(err.Error(), path+":2:") {
			t.Errorf("%q: %v", line, err)
		}
	}
}

// TestExpectedTestsExist has a list that does not outlive the tests in it.
func TestExpectedTestsExist(t *testing.T) {
	t.Parallel()
	rules, err := readRules("expected")
	if err != nil {
		t.Fatal(err)
	}
	var source strings.Builder
	if err := filepath.WalkDir("../..", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(path, "_test.go") {
			return err
		}
		b, err := os.ReadFile(path)
		source.Write(b)
		return err
	}); err != nil {
		t.Fatal(err)
	}
	for _, r := range rules {
		if name, _, _ := strings.Cut(r.text, "/"); name != "Test.*" && !strings.Contains(source.String(), "func "+name+"(t *testing.T)") {
			t.Errorf("there is no %s", name)
		}
	}
}
