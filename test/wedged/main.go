// Command wedged is `larder agent`, except that after SIGUSR1 no request is ever
// answered: the handlers block, while the process and its port live on. The
// end-to-end tests show with it what a runtime makes of such an agent.
package main

import (
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"os/signal"
	"syscall"

	"github.com/larder-cache/larder/agent"
	"github.com/spf13/pflag"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "wedged:", err)
		os.Exit(1)
	}
}

func run() error {
	flags := pflag.NewFlagSet("wedged", pflag.ContinueOnError)
	file := flags.String("config", "", "")
	agent.BindFlags(flags)
	if err := flags.Parse(os.Args[2:]); err != nil { // os.Args[1] is "agent"
		return err
	}
	config, err := agent.Load(agent.Sources{Flags: flags, Environ: os.Environ(), File: *file})
	if err != nil {
		return err
	}
	wedged := make(chan os.Signal, 1)
	signal.Notify(wedged, syscall.SIGUSR1)
	block := make(chan struct{})
	go func() {
		<-wedged
		close(block)
		fmt.Fprintln(os.Stderr, "wedged") // who sent the signal waits for this
	}()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	a, err := agent.New(config, agent.WithLogger(slog.New(slog.NewTextHandler(os.Stderr, nil))),
		agent.WithBefore(func(*http.Request) {
			select {
			case <-block:
				select {} // forever
			default:
			}
		}))
	if err != nil {
		return err
	}
	return a.Run(ctx)
}
