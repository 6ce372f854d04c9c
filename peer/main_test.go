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

// bubble runs a test on a clock of its own. Under the race detector that needs Go 1.27: the
// detector's own runtime crashes before, in a quarter of all runs here (golang/go#78156).
func bubble(t *testing.T, f func(t *testing.T)) {
	t.Helper()
	synctest.Test(t, f)
}
