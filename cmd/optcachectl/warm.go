package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"github.com/optcache/optcache/plugin/control/api"
	"github.com/optcache/optcache/plugin/control/client"
)

const (
	// maxQuestions bounds what is kept of a list, which is checked to its end before the first question is asked.
	maxQuestions = 2_000_000

	// maxWarmLine is the longest line of a list, in bytes.
	maxWarmLine = 64 << 10

	// maxWarmWord is the longest word: a name of 255 bytes, with four letters for each.
	maxWarmWord = 4 * 255

	// mostShown is how many bad lines are shown.
	mostShown = 20
)

// warmQuestion is a question, and where it comes from.
type warmQuestion struct {
	api.WarmQuestion
	line int // of the list, from 1; 0: the command line
}

// warmList is the questions, in the order in which they are asked. The lines are those of keep_warm's file. They are not read by
// plugin/pkg/keep, which needs messages of DNS, ends at the first bad line and at 10,000 questions, and does not say where a question
// stands; here the server says which words are names and types.
type warmList struct {
	file  string
	types []string // of names that come without; those are A and AAAA if it is empty
	all   []warmQuestion
	bad   []string // what is wrong with the list
	wrong int      // how many words are
}

func newWarm(g *globals) *cobra.Command {
	var (
		list   warmList
		blocks *blockIDs
		out    *form
	)
	cmd := g.command(cobra.Command{
		Use:   "warm [NAME...]",
		Short: "ask for names, so that they are held",
		Long: "Ask for names through the server's chain of plugins, as a client does, so that their answers are held. The names are those of " +
			"the command line, and those of the file of --file, which has lines NAME [TYPE...]; a hash sign begins a comment. A name without " +
			"a type is asked for as A and AAAA, or as --type says.\n\n" +
			"All lines are read before anything is asked: if one is wrong, its number and the word are shown, the exit code is 2, and nothing " +
			"is asked. In the end, or as it comes, it is said how many answers were held already, came, and failed and why; if one has failed, " +
			"the exit code is 1. That a name does not exist is an answer.",
		Example: "  optcachectl warm www.example.org example.org\n  optcachectl warm --type MX example.org\n  optcachectl warm --file names\n" +
			"  optcachectl list -o json | jq -r '[.name, .type] | join(\" \")' | optcachectl -s OTHER warm -f -",
	}, func(ctx context.Context, c *client.Client, args []string) error {
		if err := list.read(g, args); err != nil {
			return err
		}
		if len(list.all) == 0 && list.wrong == 0 {
			return wrongUsage("warm needs a NAME, or a --file with names")
		}
		p := g.startProgress(true)
		defer p.end()
		if err := list.check(ctx, c, *blocks, p); err != nil {
			return err
		}
		var done api.WarmReply
		done.Failures = []api.WarmFailure{}
		err := list.ask(ctx, c, api.WarmRequest{Blocks: *blocks}, p, "asked", func(at int, reply api.WarmReply) error {
			done.There, done.Came, done.Failed = done.There+reply.There, done.Came+reply.Came, done.Failed+reply.Failed
			for i := range reply.Failures {
				reply.Failures[i].At += at
			}
			if out.is == "json" {
				done.Failures = append(done.Failures, reply.Failures...)
				return nil
			}
			return g.print(func(w io.Writer) {
				for _, f := range reply.Failures {
					p.end()
					fmt.Fprintln(w, printable(fmt.Sprintf("%s%s %s: %s", list.where(list.all[f.At].line), f.Name, f.Type, f.Why)))
				}
			})
		})
		p.end()
		asked := len(list.all)
		if cut, ok := errors.AsType[*warmCut](err); ok {
			if err = cut.error; cut.at > 0 {
				err = &exitError{exitFailed, fmt.Errorf("%w; %s of %s are asked", err, number(cut.at), plural(int64(len(list.all)), "question"))}
			}
			asked = cut.at
		}
		if shown := g.printWarmed(done, out.is, asked); shown != nil {
			return shown
		}
		if err == nil && done.Failed > 0 {
			err = &exitError{exitFailed, fmt.Errorf("%s failed", plural(int64(done.Failed), "question"))}
		}
		return err
	})
	f := cmd.Flags()
	f.StringVarP(&list.file, "file", "f", "", "the names in `FILE`, too; -: in stdin")
	f.StringSliceVarP(&list.types, "type", "t", nil, "ask for this `TYPE` where none is given; may be repeated")
	complete(cmd, "type", commonTypes...)
	blocks = blockFlag(cmd)
	out = formFlag(cmd, "table", "json")
	return cmd
}

// printWarmed shows what has become of the questions that were asked.
func (g *globals) printWarmed(done api.WarmReply, form string, asked int) error {
	if form == "json" {
		body, err := json.Marshal(done)
		if err != nil {
			return err
		}
		return g.printJSON(body)
	}
	if asked == 0 {
		return nil
	}
	return g.print(func(w io.Writer) {
		fmt.Fprintf(w, "%s asked: %s held already, %s came, %s failed\n", plural(int64(asked), "question"), number(done.There), number(done.Came), number(done.Failed))
	})
}

// read reads the command line and the file.
func (l *warmList) read(g *globals, args []string) error {
	for _, name := range args {
		if name == "-" {
			return wrongUsage("-: stdin is read with --file -")
		}
		l.add(0, name, nil)
	}
	if l.file == "" {
		return nil
	}
	from := g.stdin
	if l.file == "-" {
		l.file = "stdin"
	} else {
		f, err := os.Open(l.file)
		if err != nil {
			return &exitError{exitUsage, err}
		}
		defer f.Close()
		from = f
	}
	lines := bufio.NewScanner(from)
	lines.Buffer(nil, maxWarmLine)
	n := 0
	for lines.Scan() {
		n++
		text, _, _ := strings.Cut(lines.Text(), "#")
		if words := strings.Fields(text); len(words) > 0 {
			l.add(n, words[0], words[1:])
		}
		if len(l.all) > maxQuestions {
			return wrongUsage("%s:%d: there are more than %d questions", l.file, n, maxQuestions)
		}
	}
	if err := lines.Err(); err != nil {
		if errors.Is(err, bufio.ErrTooLong) {
			err = fmt.Errorf("the line is longer than %d bytes", maxWarmLine)
		}
		return wrongUsage("%s:%d: %v", l.file, n+1, err)
	}
	return nil
}

// add adds the questions for a name. The server says which words are wrong, but for those that are too long to ask it.
func (l *warmList) add(line int, name string, types []string) {
	if len(types) == 0 {
		types = l.types
	}
	if len(types) == 0 {
		types = []string{"A", "AAAA"}
	}
	if len(name) > maxWarmWord {
		l.isBad(line, fmt.Sprintf("name: %.40q… is too long", name))
		return
	}
	for _, t := range types {
		if t == "" || len(t) > maxWarmWord {
			l.isBad(line, fmt.Sprintf("type: %.40q is no type", t))
			continue
		}
		l.all = append(l.all, warmQuestion{api.WarmQuestion{Name: name, Type: strings.ToUpper(t)}, line})
	}
}

func (l *warmList) isBad(line int, why string) {
	if l.wrong++; l.wrong <= mostShown {
		l.bad = append(l.bad, l.where(line)+why)
	}
}

// where says where a question comes from.
func (l *warmList) where(line int) string {
	if line == 0 {
		return ""
	}
	return fmt.Sprintf("%s:%d: ", l.file, line)
}

// check has the server say which questions are none. It shows them, and returns an error, if there are some.
func (l *warmList) check(ctx context.Context, c *client.Client, blocks []int, p *progress) error {
	var last warmQuestion
	var lastWhy string
	err := l.ask(ctx, c, api.WarmRequest{Check: true, Blocks: blocks}, p, "checked", func(at int, reply api.WarmReply) error {
		for _, f := range reply.Failures {
			q := l.all[at+f.At]
			if q.line != last.line || q.Name != last.Name || f.Why != lastWhy { // a bad name is one mistake, however many types it is asked for
				l.isBad(q.line, f.Why)
			}
			last, lastWhy = q, f.Why
		}
		return nil
	})
	p.end()
	if cut, ok := errors.AsType[*warmCut](err); ok {
		return cut.error
	}
	if l.wrong == 0 {
		return err
	}
	for _, line := range l.bad {
		fmt.Fprintln(p.g.stderr, printable(line))
	}
	return wrongUsage("%s wrong; nothing is asked", plural(int64(l.wrong), "word"))
}

// warmCut is an error in the middle: the questions before at have been answered.
type warmCut struct {
	error
	at int
}

func (e *warmCut) Unwrap() error { return e.error }

// ask asks all questions, as many at once as the server takes. each gets the answer for those that begin at a place in the list.
func (l *warmList) ask(ctx context.Context, c *client.Client, request api.WarmRequest, p *progress, verb string, each func(at int, reply api.WarmReply) error) error {
	for at := 0; at < len(l.all); {
		request.Questions = request.Questions[:0]
		for bytes := 0; at+len(request.Questions) < len(l.all) && len(request.Questions) < api.MaxWarm; {
			q := l.all[at+len(request.Questions)].WarmQuestion
			text, err := json.Marshal(q)
			if err != nil {
				return err
			}
			if bytes += len(text) + 1; bytes > api.MaxRequest-1<<10 && len(request.Questions) > 0 { // the rest of the request is small
				break
			}
			request.Questions = append(request.Questions, q)
		}
		var reply api.WarmReply
		if _, err := c.Post(ctx, "/v1/warm", request, &reply); err != nil {
			return &warmCut{err, at}
		}
		for _, f := range reply.Failures {
			if f.At < 0 || f.At >= len(request.Questions) {
				return &warmCut{fmt.Errorf("the answer is not understood: there is no question %d", f.At), at}
			}
		}
		if err := each(at, reply); err != nil {
			return err
		}
		at += len(request.Questions)
		p.say(func() string {
			return fmt.Sprintf("%s of %s %s", number(at), plural(int64(len(l.all)), "question"), verb)
		})
	}
	return nil
}
