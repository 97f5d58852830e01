package main

import (
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// newMan is for the Makefile: the man page is made of what --help says.
func newMan() *cobra.Command {
	return &cobra.Command{
		Use:    "man DATE",
		Short:  "write the man page",
		Hidden: true,
		Args:   cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			_, err := io.WriteString(cmd.OutOrStdout(), manPage(cmd.Root(), args[0]))
			if err != nil {
				return &exitError{exitFailed, err}
			}
			return nil
		},
	}
}

// manPage is the page in the language of man(7).
func manPage(root *cobra.Command, date string) string {
	var p roff
	p.line(`.\" Made by "make man" of what optcachectl --help says. Do not edit.`)
	p.line(`.TH "OPTCACHECTL" "1" "%s" "optcache" "optcache"`, date)
	p.line(".SH NAME")
	p.line(`%s \- %s`, escape(root.Name()), escape(root.Short))
	p.line(".SH SYNOPSIS")
	p.line(`\fB%s\fP [\fB\-s\fP \fIADDRESS\fP] \fICOMMAND\fP`, escape(root.Name()))
	p.line(".SH DESCRIPTION")
	p.prose(rootIntro)
	p.line(".SH OPTIONS")
	p.flags(root.PersistentFlags())
	p.line(".SH COMMANDS")
	for _, c := range root.Commands() {
		if c.Hidden || c.Name() == "help" {
			continue
		}
		p.line(`.SS "%s"`, strings.ReplaceAll(escape(c.Use), `"`, `\(dq`))
		if c.Name() == "completion" { // its help is how each shell is set up
			p.prose("Write a script for the completion of a shell: bash, fish, powershell or zsh. \"optcachectl completion SHELL --help\" says how it is loaded.")
			continue
		}
		p.prose(c.Long)
		p.flags(c.LocalFlags())
	}
	p.line(".SH ENVIRONMENT")
	for _, v := range variables {
		p.item(escape(v.name), v.meaning)
	}
	p.line(".SH EXIT STATUS")
	for _, c := range exitCodes {
		p.item(c.code, c.meaning)
	}
	p.line(".SH EXAMPLES")
	p.line(".nf")
	for _, c := range append([]*cobra.Command{root}, root.Commands()...) {
		for example := range strings.SplitSeq(c.Example, "\n") {
			if !c.Hidden && example != "" {
				p.line("%s", escape(example))
			}
		}
	}
	p.line(".fi")
	p.line(".SH SEE ALSO")
	p.line(`\fBcoredns\-optcache\fP(7)`)
	return p.String()
}

// roff writes lines of man(7).
type roff struct{ strings.Builder }

func (p *roff) line(format string, args ...any) {
	fmt.Fprintf(p, format+"\n", args...)
}

// prose writes paragraphs, which have an empty line between them.
func (p *roff) prose(text string) {
	for i, para := range strings.Split(text, "\n\n") {
		if i > 0 {
			p.line(".PP")
		}
		p.line("%s", escape(strings.Join(strings.Fields(para), " ")))
	}
}

// item is a word in bold, and what it means below it.
func (p *roff) item(word, meaning string) {
	p.line(".TP")
	p.line(`\fB%s\fP`, word)
	p.line("%s", escape(meaning))
}

func (p *roff) flags(flags *pflag.FlagSet) {
	flags.VisitAll(func(f *pflag.Flag) {
		if f.Hidden || f.Name == "help" || f.Name == "version" {
			return
		}
		value, meaning := pflag.UnquoteUsage(f)
		name := "--" + f.Name
		if f.Shorthand != "" {
			name = "-" + f.Shorthand + ", " + name
		}
		p.line(".TP")
		if value != "" {
			p.line(`\fB%s\fP \fI%s\fP`, escape(name), escape(value))
		} else {
			p.line(`\fB%s\fP`, escape(name))
		}
		if f.DefValue != "" && f.DefValue != "false" && f.DefValue != "0" && f.DefValue != "[]" {
			meaning += " (default " + f.DefValue + ")"
		}
		p.line("%s", escape(meaning))
	})
}

// escape keeps text from being read as roff.
func escape(s string) string {
	s = strings.NewReplacer(`\`, `\e`, "-", `\-`).Replace(s)
	if strings.HasPrefix(s, ".") || strings.HasPrefix(s, "'") {
		s = `\&` + s
	}
	return s
}
