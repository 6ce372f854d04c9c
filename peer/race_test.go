//go:build race

package peer

// slow is how much longer real time may be than without the race detector: eight nodes in
// one process on two cores, beside other packages' tests.
const slow = 4
