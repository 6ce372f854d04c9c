package peer

import (
	"testing"

	"go.uber.org/goleak"
)

// TestMain looks for goroutines that nobody ended. memberlist's Shutdown does not
// wait for a probe under way, which ends by itself within 8 s.
func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m, goleak.IgnoreAnyFunction("github.com/hashicorp/memberlist.(*Memberlist).probeNode"))
}
