// Command larder is a node-level image cache for Kubernetes: a proxy on the
// loopback address that serves image blobs to containerd and CRI-O from this
// node's disk, then from other nodes, and only then from the registry.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"

	"github.com/larder-cache/larder/agent"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// Exit codes.
const (
	exitFailed = 1 // the command could not do, or found something wrong
	exitUsage  = 2 // flags, arguments or configuration that make no sense
)

func main() {
	os.Exit(run(untilSignal(), os.Args[1:], os.Stdout, os.Stderr))
}

// untilSignal returns a context that ends with the first signal to stop. A second
// one ends the process at once, unless it is SIGHUP: a terminal that is closed may
// send it twice, once by the kernel and once by the shell.
func untilSignal() context.Context {
	asked, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	ctx := asked
	if !signal.Ignored(syscall.SIGHUP) { // as nohup has it
		ctx, _ = signal.NotifyContext(asked, syscall.SIGHUP)
	}
	go func() {
		<-ctx.Done()
		stop()
	}()
	return ctx
}

// outliveReader is for commands that would leave something behind: a program ends at
// once when it writes to standard output or error and nobody reads that any more, as
// in `larder agent 2>&1 | tee log` on Ctrl-C, or when journald is started anew.
func outliveReader() { signal.Notify(make(chan os.Signal, 1), syscall.SIGPIPE) }

// run executes one command line and returns its exit code. Errors go to stderr, a line
// each, with "larder: " before it; ctx ends the command.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	root, out := newRoot(), &output{w: stdout}
	root.SetArgs(args)
	root.SetOut(out)
	if _, ok := terminal(stdout); ok { // which is drawn on as such
		root.SetOut(stdout)
	}
	root.SetErr(stderr)
	ownCommands(root)
	err := root.ExecuteContext(ctx)
	if lost := out.err.Load(); lost != nil && (err == nil || errors.Is(err, errFindings)) {
		err = *lost
	}
	switch {
	case err == nil:
		return 0
	case errors.Is(err, errFindings):
		return exitFailed
	}
	fmt.Fprintln(stderr, "larder: "+strings.ReplaceAll(err.Error(), "\n", "\nlarder: "))
	if errors.As(err, new(usageError)) {
		return exitUsage
	}
	return exitFailed
}

// output keeps why standard output could not be written: whoever is to read a table finds
// half of it, and must not be told that all went well.
type output struct {
	w   io.Writer
	err atomic.Pointer[error]
}

func (o *output) Write(b []byte) (int, error) {
	n, err := o.w.Write(b)
	if err != nil && !errors.Is(err, syscall.EPIPE) { // see outliveReader
		o.err.CompareAndSwap(nil, &err)
	}
	return n, err
}

// errFindings ends a command that worked and has printed what is wrong.
var errFindings = errors.New("findings")

// usageError marks what the user has to write differently.
type usageError struct{ error }

func (e usageError) Unwrap() error { return e.error }

func newRoot() *cobra.Command {
	root := &cobra.Command{
		Use:   "larder",
		Short: "A node-level image cache for Kubernetes",
		Long: `Larder caches container images on every node of a cluster. The agent serves
containerd and CRI-O on the loopback address: from this node's disk, then from
other nodes, and only then from the registry.`,
		SilenceUsage:  true,
		SilenceErrors: true,
		Version:       versionText(build()),
	}
	root.SetVersionTemplate("{{.Version}}\n")
	root.SetFlagErrorFunc(flagError)
	for _, group := range []struct {
		title    string
		commands []*cobra.Command
	}{
		{"Try it:", []*cobra.Command{newDemo()}},
		{"Run it on a node:", []*cobra.Command{newKeygen(), newAgent(), newHosts()}},
		{"Look at a node:", []*cobra.Command{newDoctor(), newStatus(), newExplain()}},
		{"Choose what is cached:", []*cobra.Command{newWarm(), newPin(), newUnpin(), newForget(), newExport(), newImport()}},
	} {
		root.AddGroup(&cobra.Group{ID: group.title, Title: group.title})
		for _, cmd := range group.commands {
			cmd.GroupID = group.title
			root.AddCommand(cmd)
		}
	}
	root.AddCommand(newVersion())
	for _, cmd := range root.Commands() {
		markUsage(cmd)
	}
	asGroup(root)
	return root
}

// asGroup makes a command that only has others: by itself it prints its help,
// and what it does not know is a usage error.
func asGroup(group *cobra.Command) {
	group.RunE = func(cmd *cobra.Command, _ []string) error { return cmd.Help() }
	group.Args = func(cmd *cobra.Command, args []string) error {
		if len(args) == 0 {
			return nil
		}
		var names []string
		for _, sub := range cmd.Commands() {
			names = append(names, sub.Name())
		}
		if near := agent.Nearest(args[0], names); near != "" {
			return usageError{fmt.Errorf("unknown command %q; did you mean %s %s?", args[0], cmd.CommandPath(), near)}
		}
		return usageError{fmt.Errorf("unknown command %q; see %s --help", args[0], cmd.CommandPath())}
	}
}

// ownCommands makes cobra's completion and help commands ones of ours: an unknown shell or
// command is a usage error, and not a help text that a shell would be given to read. Completion
// is made here because it writes to the output that root has when it is made.
func ownCommands(root *cobra.Command) {
	root.InitDefaultCompletionCmd()
	root.InitDefaultHelpCmd()
	for _, cmd := range root.Commands() {
		switch cmd.Name() {
		case "completion":
			asGroup(cmd)
			markUsage(cmd)
		case "help":
			cmd.Args = helpArgs
			markUsage(cmd)
		}
	}
}

// helpArgs refuses what is no command.
func helpArgs(help *cobra.Command, args []string) error {
	cmd, unknown, err := help.Root().Find(args)
	switch {
	case err != nil:
		return err
	case cmd.HasSubCommands():
		return cmd.Args(cmd, unknown)
	}
	return cobra.NoArgs(cmd, unknown)
}

// flagError names the flag that an unknown one may have meant.
func flagError(cmd *cobra.Command, err error) error {
	unknown, ok := errors.AsType[*pflag.NotExistError](err)
	if !ok {
		return usageError{fmt.Errorf("%w; see %s --help", err, cmd.CommandPath())}
	}
	var names []string
	cmd.Flags().VisitAll(func(f *pflag.Flag) { names = append(names, f.Name) })
	if near := agent.Nearest(unknown.GetSpecifiedName(), names); near != "" {
		return usageError{fmt.Errorf("%w; did you mean --%s?", err, near)}
	}
	return usageError{fmt.Errorf("%w; see %s --help", err, cmd.CommandPath())}
}

// markUsage makes wrong arguments usage errors, as wrong flags are.
func markUsage(cmd *cobra.Command) {
	if check := cmd.Args; check != nil {
		cmd.Args = func(cmd *cobra.Command, args []string) error {
			err := check(cmd, args)
			if err == nil || errors.As(err, new(usageError)) { // which says what to do
				return err
			}
			isBool := func(arg string) bool { return arg == "true" || arg == "false" }
			if i := slices.IndexFunc(args, isBool); i >= 0 {
				return usageError{fmt.Errorf("%w; a switch takes its value with =, as in --peer.enabled=%s", err, args[i])}
			}
			return usageError{fmt.Errorf("%w; see %s --help", err, cmd.CommandPath())}
		}
	}
	for _, sub := range cmd.Commands() {
		markUsage(sub)
	}
}
