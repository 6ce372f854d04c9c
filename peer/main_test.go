package peer

import (
	"testing"
	"testing/synctest"

	"go.uber.org/goleak"
)

// TestMain looks for goroutines that nobody ended. memberlist's Shutdown does not
// wait for a probe under way, which ends by itself within 8 s.
func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m, goleak.IgnoreAnyFunction("github.com/hashicorp/memberlist.(*Memberlist).probeNode"))
}

// bubble runs a test on a clock of its own. With -short, which is how the race
// detector runs, it does not: the detector's own runtime crashes in bubbles with
// timers, in a quarter of all runs here (golang/go#78156). Tests with real sockets
// are what it watches.
func bubble(t *testing.T, f func(t *testing.T)) {
	t.Helper()
	if testing.Short() {
		t.Skip("golang/go#78156")
	}
	synctest.Test(t, f)
}
