// Command pause does nothing until it is told to stop. Pods of the tests run it, and
// so do their sandboxes.
package main

import (
	"context"
	"os/signal"
	"syscall"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	<-ctx.Done()
}
