// Command verdict reads what "go test -json" prints, and prints what go test prints without -json. It fails when a test was
// skipped that is not in the list of those that may be.
//
//	go test -json ./... | go run ./test/verdict [-again FILE] [-test TEST] test/verdict/expected
//
// The tests' own result is go test's: a shell that runs both needs "set -o pipefail". For that shell, FILE gets a line "PACKAGE
// TEST" for each test that has failed, if it makes sense to run them once more, each by itself. It does not after a panic, a data
// race, or an unexpected skip, nor where a package has failed and none of its tests has. With TEST, it also fails unless that test has
// passed.
package main

import (
	"bufio"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"os"
	"regexp"
	"strings"
)

func main() {
	again := flag.String("again", "", "the `file` for the tests that may be run once more")
	test := flag.String("test", "", "the `test` that must have passed")
	flag.Usage = func() {
		fmt.Fprintln(os.Stderr, "usage: go test -json ./... | verdict [-again FILE] [-test TEST] EXPECTED")
		flag.PrintDefaults()
	}
	flag.Parse()
	if flag.NArg() != 1 {
		flag.Usage()
		os.Exit(2)
	}
	rules, err := readRules(flag.Arg(0))
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(2)
	}
	v, err := check(os.Stdin, os.Stdout, rules)
	if err == nil && *again != "" {
		err = os.WriteFile(*again, []byte(strings.Join(v.repeatable(), "")), 0o600)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(2)
	}
	if *test != "" && !v.passed[*test] {
		fmt.Printf("\n%s has not passed\n", *test)
		os.Exit(1)
	}
	if len(v.unexpected) > 0 {
		fmt.Printf("\nskipped, and not expected by %s:\n%s", flag.Arg(0), strings.Join(v.unexpected, ""))
		os.Exit(1)
	}
}

// verdict is what the tests have come to.
type verdict struct {
	unexpected []string // a text for each skipped test that no rule expects
	passed     map[string]bool
	failed     []string // a line "PACKAGE TEST" for each test that has failed, without subtests
	final      bool     // there is a failure that is not that of a test alone
}

// repeatable returns the tests that may be run once more.
func (v *verdict) repeatable() []string {
	if v.final || len(v.unexpected) > 0 {
		return nil
	}
	return v.failed
}

// severe is in the output of a failure that no second run makes good.
var severe = regexp.MustCompile(`DATA RACE|race detected|panic: |fatal error: `)

// rule is a test that may be skipped with a message.
type rule struct {
	test, message *regexp.Regexp
	text          string // of test
}

// readRules reads a list. A line has three fields: test, message and why; one that is empty or begins with # has none.
func readRules(path string) (rules []rule, err error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	n := 0
	for line := range strings.Lines(string(b)) {
		n++
		line = strings.TrimSpace(line)
		if line == "" || line[0] == '#' {
			continue
		}
		fields := regexp.MustCompile(` \| `).Split(line, -1)
		if len(fields) != 3 {
			return nil, fmt.Errorf("%s:%d: %d fields, want TEST | MESSAGE | WHY", path, n, len(fields))
		}
		r := rule{text: fields[0]}
		if r.test, err = regexp.Compile("^(?:" + fields[0] + ")$"); err == nil {
			r.message, err = regexp.Compile(fields[1])
		}
		if err != nil {
			return nil, fmt.Errorf("%s:%d: %w", path, n, err)
		}
		rules = append(rules, r)
	}
	return rules, nil
}

// event is a line of go test -json; see "go doc test2json".
type event struct {
	Action, Package, Test, Output string
}

// check copies events as text, and returns what they come to. What is no event, such as make's own lines, is copied as it is.
func check(in io.Reader, out io.Writer, rules []rule) (v verdict, err error) {
	type test struct{ pkg, name string }
	v.passed = make(map[string]bool)
	own := make(map[string]bool)    // packages of which a test has failed
	output := make(map[test]string) // of tests that have not ended
	lines := bufio.NewReader(in)
	for {
		line, err := lines.ReadString('\n')
		var e event
		if line != "" && (line[0] != '{' || json.Unmarshal([]byte(line), &e) != nil || e.Action == "") {
			fmt.Fprint(out, line)
		}
		t := test{e.Package, e.Test}
		v.final = v.final || severe.MatchString(e.Output)
		switch e.Action {
		case "output", "build-output":
			switch {
			case e.Test != "":
				output[t] += e.Output
			case e.Output != "PASS\n":
				fmt.Fprint(out, e.Output)
			}
		case "fail":
			fmt.Fprint(out, output[t])
			delete(output, t)
			switch {
			case e.Test == "":
				v.final = v.final || !own[e.Package]
				delete(own, e.Package)            // it may come again
				for other, text := range output { // of its tests, those that have not ended are why
					if other.pkg == e.Package {
						v.final = true
						fmt.Fprint(out, text)
						delete(output, other)
					}
				}
			case !strings.Contains(e.Test, "/"):
				own[e.Package] = true
				v.failed = append(v.failed, e.Package+" "+e.Test+"\n")
			}
		case "skip":
			if e.Test != "" && !expected(rules, e.Test, output[t]) {
				v.unexpected = append(v.unexpected, fmt.Sprintf("%s %s\n%s", e.Package, e.Test, output[t]))
			}
			delete(output, t)
		case "pass":
			v.passed[e.Test] = true
			delete(output, t)
		}
		if err == io.EOF {
			return v, nil
		}
		if err != nil {
			return v, err
		}
	}
}

func expected(rules []rule, test, message string) bool {
	for _, r := range rules {
		if r.test.MatchString(test) && r.message.MatchString(message) {
			return true
		}
	}
	return false
}
