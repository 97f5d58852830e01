// Command skips reads what "go test -json" prints, and prints what go test prints without -json. It fails when a test was
// skipped that is not in the list of those that may be.
//
//	go test -json ./... | go run ./test/skips test/skips/expected
//
// The tests' own result is go test's: a shell that runs both needs "set -o pipefail".
package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"regexp"
	"strings"
)

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: go test -json ./... | skips FILE")
		os.Exit(2)
	}
	rules, err := readRules(os.Args[1])
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(2)
	}
	unexpected, err := check(os.Stdin, os.Stdout, rules)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(2)
	}
	if len(unexpected) > 0 {
		fmt.Printf("\nskipped, and not expected by %s:\n%s", os.Args[1], strings.Join(unexpected, ""))
		os.Exit(1)
	}
}

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

// check copies events as text, and returns a line for each skipped test that no rule expects. What is no event, such as
// make's own lines, is copied as it is.
func check(in io.Reader, out io.Writer, rules []rule) (unexpected []string, err error) {
	type test struct{ pkg, name string }
	output := make(map[test]string) // of tests that have not ended
	lines := bufio.NewReader(in)
	for {
		line, err := lines.ReadString('\n')
		var e event
		if line != "" && (line[0] != '{' || json.Unmarshal([]byte(line), &e) != nil || e.Action == "") {
			fmt.Fprint(out, line)
		}
		t := test{e.Package, e.Test}
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
			if e.Test == "" { // of its tests, those that have not ended are why
				for other, text := range output {
					if other.pkg == e.Package {
						fmt.Fprint(out, text)
						delete(output, other)
					}
				}
			}
		case "skip":
			if e.Test != "" && !expected(rules, e.Test, output[t]) {
				unexpected = append(unexpected, fmt.Sprintf("%s %s\n%s", e.Package, e.Test, output[t]))
			}
			delete(output, t)
		case "pass":
			delete(output, t)
		}
		if err == io.EOF {
			return unexpected, nil
		}
		if err != nil {
			return unexpected, err
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
