package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"slices"
	"strings"
	"time"

	"github.com/larder-cache/larder/agent"
	"github.com/larder-cache/larder/hostsconfig"
	"github.com/spf13/cobra"
)

func newHosts() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "hosts",
		Short: "Write, take back or compare the runtimes' registry configuration",
		Long: `Write, take back or compare the files that point containerd and CRI-O at the
agent. The agent does this by itself while it runs; these commands are for a
look beforehand, and for what a killed agent left behind.`,
		Example: `  larder hosts check --hosts.containerd /etc/containerd/certs.d
  larder hosts apply --hosts.crio /etc/containers/registries.conf.d --dry-run
  larder hosts remove`,
	}
	cmd.AddCommand(newHostsApply(), newHostsRemove(), newHostsCheck())
	asGroup(cmd)
	return cmd
}

// hostsFlags are what the three commands share.
type hostsFlags struct {
	config configFlags
	dryRun bool
	asJSON bool
}

func (f *hostsFlags) bind(cmd *cobra.Command) {
	f.config.bind(cmd, "hosts", "proxy")
	cmd.Flags().BoolVar(&f.dryRun, "dry-run", false, "show what would change and change nothing")
	cmd.Flags().BoolVar(&f.asJSON, "json", false, "print JSON")
}

// open makes the Hosts that the agent would work with.
func (f *hostsFlags) open(cmd *cobra.Command) (*hostsconfig.Hosts, agent.Config, error) {
	c, err := f.config.load(cmd)
	if err != nil {
		return nil, c, err
	}
	if c.Hosts.Containerd == "" && c.Hosts.CRIO == "" {
		return nil, c, usageError{errors.New("no directory to manage: set hosts.containerd (--hosts.containerd /etc/containerd/certs.d) or hosts.crio (--hosts.crio /etc/containers/registries.conf.d)")}
	}
	log := slog.New(slog.NewTextHandler(cmd.ErrOrStderr(), &slog.HandlerOptions{Level: slog.LevelWarn}))
	h, err := hostsconfig.New(agent.HostsOptions(c, c.Proxy.Listen, log, nil))
	if err != nil {
		return nil, c, usageError{err}
	}
	return h, c, nil
}

// finish prints changes, and explains an agent that holds the directory.
func (f *hostsFlags) finish(cmd *cobra.Command, changes []hostsconfig.Change, err error) error {
	if errors.Is(err, hostsconfig.ErrBusy) {
		return fmt.Errorf("%w; while it runs it keeps these files in place by itself", err)
	}
	if f.asJSON {
		if perr := printJSON(cmd.OutOrStdout(), append([]hostsconfig.Change{}, changes...)); perr != nil {
			return errors.Join(err, perr)
		}
		return err
	}
	if err == nil || len(changes) > 0 {
		printChanges(cmd.OutOrStdout(), changes)
	}
	return err
}

func newHostsApply() *cobra.Command {
	var f hostsFlags
	cmd := &cobra.Command{
		Use:   "apply",
		Short: "Point the runtimes at the agent",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			h, c, err := f.open(cmd)
			if err != nil {
				return err
			}
			if f.dryRun {
				changes, err := h.Plan(cmd.Context())
				return f.finish(cmd, changes, err)
			}
			changes, err := h.Apply(cmd.Context())
			if !listening(cmd.Context(), c.Proxy.Listen) {
				fmt.Fprintf(cmd.ErrOrStderr(), "note: nothing listens on %s now; runtimes pull straight from the registry until `larder agent` runs\n", c.Proxy.Listen)
			}
			return f.finish(cmd, changes, err)
		},
	}
	f.bind(cmd)
	return cmd
}

func newHostsRemove() *cobra.Command {
	var f hostsFlags
	cmd := &cobra.Command{
		Use:   "remove",
		Short: "Take back everything, and restore what was there before",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			h, _, err := f.open(cmd)
			if err != nil {
				return err
			}
			remove := h.Remove
			if f.dryRun {
				remove = h.PlanRemove
			}
			changes, err := remove(cmd.Context())
			return f.finish(cmd, changes, err)
		},
	}
	f.bind(cmd)
	return cmd
}

func newHostsCheck() *cobra.Command {
	var f hostsFlags
	cmd := &cobra.Command{
		Use:   "check",
		Short: "Compare the files with what they should be; exit 1 if they differ",
		Long: `Compare the files with what they should be, and write nothing. The exit code is 0
if "larder hosts apply" would change nothing, and 1 if it would, or if the files
cannot be read.

A file that is malformed is reported as "skip", with the reason, and does not
count: Larder leaves it alone, apply would too, and the runtime itself cannot use
it. "larder doctor" finds it, says what to do, and exits 1.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			h, c, err := f.open(cmd)
			if err != nil {
				return err
			}
			changes, err := h.Plan(cmd.Context()) // with --dry-run or without: check writes nothing
			if err := f.finish(cmd, changes, err); err != nil {
				return err
			}
			if !slices.ContainsFunc(changes, wanted) {
				return nil
			}
			for _, proxy := range h.OtherProxies() {
				fmt.Fprintf(cmd.ErrOrStderr(), "note: the entries in place are for an agent at %s, and were compared with those for %s; if the former is where the agent listens, add --proxy.listen %[1]s, or its --config\n", proxy, c.Proxy.Listen)
			}
			return errFindings
		},
	}
	f.bind(cmd)
	return cmd
}

// wanted changes are those that are made; a file left alone is none.
func wanted(c hostsconfig.Change) bool { return c.Action != hostsconfig.Skip }

func printChanges(w io.Writer, changes []hostsconfig.Change) {
	if !slices.ContainsFunc(changes, wanted) {
		fmt.Fprintln(w, "nothing to change")
	}
	st := newStyle(w)
	reload := false
	for _, c := range changes {
		fmt.Fprintf(w, "%s %s\n", st.bold(fmt.Sprintf("%-8s", c.Action)), c.Path)
		if c.Reason != "" {
			fmt.Fprintf(w, "         %s\n", c.Reason)
		}
		for line := range strings.Lines(c.Diff) {
			fmt.Fprintln(w, "    "+diffLine(st, strings.TrimSuffix(line, "\n")))
		}
		reload = reload || c.ReloadNeeded
	}
	if reload {
		fmt.Fprintln(w, "CRI-O reads its files anew on `systemctl reload crio`, or by itself with auto_reload_registries = true.")
	}
}

func diffLine(st style, line string) string {
	switch {
	case strings.HasPrefix(line, "+"):
		return st.good(line)
	case strings.HasPrefix(line, "-"):
		return st.bad(line)
	}
	return line
}

// dialTimeout is plenty on loopback.
const dialTimeout = 2 * time.Second

// listening says whether something accepts connections at addr.
func listening(ctx context.Context, addr string) bool {
	conn, err := (&net.Dialer{Timeout: dialTimeout}).DialContext(ctx, "tcp", addr)
	if err != nil {
		return false
	}
	_ = conn.Close() // nothing was sent
	return true
}
