package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/optcache/optcache/plugin/control/client"
)

// This file has what the commands share: the flags that lead to a server, the forms of output, errors and exit codes.

const (
	defaultAddress = "unix:///run/optcache/control.sock"
	helpWidth      = 80          // columns
	defaultTimeout = time.Minute // of one request; a snapshot of gigabytes takes tens of seconds

	addressVariable = "OPTCACHE_CONTROL"
	tokenVariable   = "OPTCACHE_TOKEN_FILE"
)

// The exit codes.
const (
	exitDone = iota
	exitFailed
	exitUsage
	exitNoConnection
	exitNotFound
)

// exitCodes and variables are shown by the help and the man page.
var (
	exitCodes = []struct{ code, meaning string }{
		{"0", "The command is done."},
		{"1", "The server refused or failed, or the question was answered with no."},
		{"2", "The command line, or a file that it names, is wrong."},
		{"3", "There was no connection to the server."},
		{"4", "lookup found nothing."},
	}
	variables = []struct{ name, meaning string }{
		{addressVariable, "The address, where --server is not given."},
		{tokenVariable, "The file of the token, where --token-file is not given."},
	}
)

// exitError is an error that has an exit code.
type exitError struct {
	code int
	err  error
}

func (e *exitError) Error() string { return e.err.Error() }
func (e *exitError) Unwrap() error { return e.err }

// wrongUsage is an error of the command line.
func wrongUsage(format string, args ...any) error {
	return &exitError{exitUsage, fmt.Errorf(format, args...)}
}

// run is the program, but for the machine it runs on. It returns the exit code.
func run(ctx context.Context, sys system, args []string) int {
	root := newRoot(sys)
	root.SetArgs(args)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return exitDone
	}
	fmt.Fprintf(sys.stderr, "optcachectl: %s\n", printable(strings.TrimSpace(err.Error())))
	if e, ok := errors.AsType[*exitError](err); ok {
		return e.code
	}
	return exitUsage // cobra's own errors, before a command runs
}

// globals are the flags of every command.
type globals struct {
	system
	address   string
	tokenFile string
	caFile    string
	timeout   time.Duration
}

func newRoot(sys system) *cobra.Command {
	g := &globals{system: sys}
	root := &cobra.Command{
		Use:   "optcachectl",
		Short: "look into the cache of a running CoreDNS with optcache, and flush it",
		Long:  rootHelp(),
		Example: `  optcachectl status --watch
  optcachectl lookup www.example.org AAAA
  optcachectl flush example.org --subtree
  optcachectl list example.org --subtree -o json | jq -r .name
  kubectl -n kube-system exec deployment/coredns -- optcachectl status`,
		Version:            toolVersion(),
		Args:               cobra.NoArgs,
		SilenceErrors:      true,
		SilenceUsage:       true,
		DisableSuggestions: true, // they are several lines
		RunE: func(*cobra.Command, []string) error {
			return wrongUsage("a command is missing; optcachectl --help shows them")
		},
	}
	root.SetIn(sys.stdin)
	root.SetOut(sys.stdout)
	root.SetErr(sys.stderr)
	flags := root.PersistentFlags()
	flags.SortFlags = false
	flags.StringVarP(&g.address, "server", "s", "", "ask the control interface at `ADDRESS`: unix:///PATH, HOST:PORT, or a URL (default "+defaultAddress+")")
	flags.StringVar(&g.tokenFile, "token-file", "", "send the token that is in `FILE`")
	flags.StringVar(&g.caFile, "ca", "", "trust the certificates in `FILE` instead of the system's")
	flags.DurationVar(&g.timeout, "timeout", defaultTimeout, "wait for each answer of the server, or the next piece of a dump, for this `DURATION` at the most")
	root.AddCommand(newStatus(g), newLookup(g), newList(g), newTop(g), newHot(g), newClimb(g), newFlush(g), newSnapshot(g), newAlive(g), newExplain(g),
		newDump(g), newLoad(g), newWarm(g), newMan())
	root.InitDefaultHelpCmd()
	root.InitDefaultCompletionCmd()
	return root
}

const rootIntro = `optcachectl asks a running CoreDNS what its optcache blocks hold, and removes answers. It talks to the control interface, which an
optcache block of the Corefile turns on. An answer that was flushed does not come back: neither from the hot tier, nor by a request that was
under way, nor from a snapshot or a reload.`

// rootHelp is the long help of the command without arguments.
func rootHelp() string {
	var b strings.Builder
	b.WriteString(wrap(rootIntro, helpWidth))
	b.WriteString("\n\nEnvironment:\n")
	for _, v := range variables {
		fmt.Fprintf(&b, "  %-20s %s\n", v.name, v.meaning)
	}
	b.WriteString("\nExit codes:\n")
	for _, c := range exitCodes {
		fmt.Fprintf(&b, "  %s  %s\n", c.code, c.meaning)
	}
	return strings.TrimSuffix(b.String(), "\n")
}

// command makes a command that asks a server. Errors of do have the exit code that fits them.
func (g *globals) command(c cobra.Command, do func(context.Context, *client.Client, []string) error) *cobra.Command {
	c.Long = wrap(c.Long, helpWidth)
	c.ValidArgsFunction = completeNameAndType
	c.RunE = func(cmd *cobra.Command, args []string) error {
		asked, err := g.client()
		if err != nil {
			return &exitError{exitUsage, err}
		}
		err = do(cmd.Context(), asked, args)
		if _, coded := errors.AsType[*exitError](err); err == nil || coded {
			return err
		}
		if _, ok := errors.AsType[*client.ConnectError](err); ok {
			return &exitError{exitNoConnection, err}
		}
		return &exitError{exitFailed, err}
	}
	cmd := &c
	cmd.Flags().SortFlags = false
	return cmd
}

// client reads the flags and the environment.
func (g *globals) client() (*client.Client, error) {
	if g.timeout <= 0 {
		return nil, fmt.Errorf("--timeout %v: not above zero", g.timeout)
	}
	address, err := client.ParseAddress(cmp.Or(g.address, g.getenv(addressVariable), defaultAddress))
	if err != nil {
		return nil, err
	}
	return client.New(client.Options{
		Address:   address,
		TokenFile: cmp.Or(g.tokenFile, g.getenv(tokenVariable)),
		CAFile:    g.caFile,
		Timeout:   g.timeout,
		Agent:     "optcachectl/" + toolVersion(),
		NoToken:   "give a token with --token-file",
	})
}

// form is a form of output, one of several.
type form struct {
	is    string
	among []string
}

func (f *form) String() string { return f.is }
func (f *form) Type() string   { return "FORM" }

func (f *form) Set(s string) error {
	if !slices.Contains(f.among, s) {
		return fmt.Errorf("it is one of %s", strings.Join(f.among, ", "))
	}
	f.is = s
	return nil
}

// formFlag adds -o. The first form is the default.
func formFlag(cmd *cobra.Command, among ...string) *form {
	f := &form{among[0], among}
	cmd.Flags().VarP(f, "output", "o", "the form of the output: "+strings.Join(among, ", "))
	complete(cmd, "output", among...)
	return f
}

// blockIDs are the blocks that a command is about; none are all.
type blockIDs []int

func (b *blockIDs) String() string { return "" }
func (b *blockIDs) Type() string   { return "ID" }

func (b *blockIDs) Set(s string) error {
	id, err := strconv.ParseUint(s, 10, 31)
	if err != nil {
		return errors.New("it is the number of a block, as status shows it")
	}
	*b = append(*b, int(id))
	return nil
}

// addTo restricts a GET.
func (b *blockIDs) addTo(query url.Values) {
	for _, id := range *b {
		query.Add("block", strconv.Itoa(id))
	}
}

func blockFlag(cmd *cobra.Command) *blockIDs {
	b := new(blockIDs)
	cmd.Flags().VarP(b, "block", "b", "only the block with this number in status; may be repeated")
	complete(cmd, "block")
	return b
}

// complete says what the shell offers for a flag.
func complete(cmd *cobra.Command, flag string, values ...string) {
	if err := cmd.RegisterFlagCompletionFunc(flag, cobra.FixedCompletions(values, cobra.ShellCompDirectiveNoFileComp)); err != nil {
		panic(err)
	}
}

// commonTypes are offered by the shell. The server knows more.
var commonTypes = []string{"A", "AAAA", "CAA", "CNAME", "DNSKEY", "DS", "HTTPS", "MX", "NAPTR", "NS", "PTR", "SOA", "SRV", "SVCB", "TLSA", "TXT"}

// completeNameAndType offers types behind a name, where a command takes one, and never a file.
func completeNameAndType(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	if len(args) == 1 && strings.Contains(cmd.Use, "[TYPE]") {
		return commonTypes, cobra.ShellCompDirectiveNoFileComp
	}
	return nil, cobra.ShellCompDirectiveNoFileComp
}

// nameAndType reads the arguments NAME [TYPE]. Whether they are a name and a type, the server says.
func nameAndType(args []string) (name, qtype string, err error) {
	if len(args) > 0 {
		if name = args[0]; name == "" {
			return "", "", wrongUsage("NAME is empty; the root is a dot")
		}
	}
	if len(args) > 1 {
		if qtype = strings.ToUpper(args[1]); qtype == "" {
			return "", "", wrongUsage("TYPE is empty")
		}
	}
	return name, qtype, nil
}

// printJSON writes an answer of the server as it is, but indented.
func (g *globals) printJSON(body []byte) error {
	var b bytes.Buffer
	if err := json.Indent(&b, bytes.TrimSpace(body), "", "  "); err != nil {
		return err
	}
	b.WriteByte('\n')
	_, err := g.stdout.Write(b.Bytes())
	return err
}

// print writes what a function writes, at once.
func (g *globals) print(write func(io.Writer)) error {
	w := bufio.NewWriter(g.stdout)
	write(w)
	return w.Flush()
}
