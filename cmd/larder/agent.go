package main

import (
	"fmt"
	"log/slog"
	"os"
	"runtime/debug"

	"github.com/larder-cache/larder/agent"
	"github.com/spf13/cobra"
)

func newAgent() *cobra.Command {
	var config configFlags
	cmd := &cobra.Command{
		Use:   "agent",
		Short: "Run the node agent until SIGTERM",
		Long: `Run the node agent: serve the pull API on proxy.listen, point the runtimes at
it, and take that back when it stops.

Every key can be set in a file, in the environment (LARDER_PROXY_LISTEN) or by
a flag (--proxy.listen); a flag beats the environment, which beats the file.
[[registry]] tables exist in the file alone.`,
		Example: `  larder agent
  larder agent --config larder.toml --log.level debug
  larder agent --hosts.containerd /etc/containerd/certs.d --runtime.content_dir /var/lib/containerd/io.containerd.content.v1.content`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			outliveReader()
			c, err := config.load(cmd)
			log := newLogger(cmd, c.Log)
			if err != nil {
				agent.RemoveLeftovers(c, log)
				return err
			}
			a, err := agent.New(c, agent.WithLogger(log), agent.WithBuild(build()))
			if err != nil {
				return fmt.Errorf("start: %w", err)
			}
			tuneGC()
			return a.Run(cmd.Context())
		},
	}
	config.bind(cmd)
	return cmd
}

// gcPercent lets the heap grow to five times what is live. That is some MiB:
// blobs go through the page cache, not the heap, and at Go's default of 100 the
// collector runs all the time under many small requests (a third of the
// processor time of a manifest).
const gcPercent = 400

// tuneGC leaves the choice to the user's GOGC. GOMEMLIMIT works as ever.
func tuneGC() {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(gcPercent)
	}
}

// configFlags are --config and a flag for each key.
type configFlags struct{ file string }

// bind adds the flags of the given tables, of all if none is given.
func (f *configFlags) bind(cmd *cobra.Command, tables ...string) {
	cmd.Flags().StringVar(&f.file, "config", "", "configuration file (default: LARDER_CONFIG, else "+agent.DefaultConfigFile+" if it exists)")
	agent.BindFlags(cmd.Flags(), tables...)
	cmd.Flags().SortFlags = false
}

func (f *configFlags) load(cmd *cobra.Command) (agent.Config, error) {
	c, err := agent.Load(agent.Sources{Flags: cmd.Flags(), Environ: os.Environ(), File: f.file})
	if err != nil {
		return c, usageError{fmt.Errorf("the configuration has problems:\n%w", err)}
	}
	return c, nil
}

func newLogger(cmd *cobra.Command, c agent.LogConfig) *slog.Logger {
	var level slog.Level
	if err := level.UnmarshalText([]byte(c.Level)); err != nil {
		level = slog.LevelInfo // Validate admits slog's names only
	}
	opts := &slog.HandlerOptions{Level: level}
	if c.Format == "json" {
		return slog.New(slog.NewJSONHandler(cmd.ErrOrStderr(), opts))
	}
	return slog.New(slog.NewTextHandler(cmd.ErrOrStderr(), opts))
}
