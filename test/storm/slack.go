package main

import (
	"fmt"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// timerSlack is how late timers may be, in nanoseconds. The thread with which Go watches a
// busy process sleeps 20 us at a time, and twenty processes on two cores spent a sixth of
// their processor time on that; a node has one. With Linux's 50 us the storm of cold-20 took
// 10.9, 11.5 and 7.7 s, with this 9.7, 9.6 and 6.4 (turn by turn, on a slow machine).
const timerSlack = 2_000_000

// coarseTimers gives this process, and all that it starts, timerSlack. Threads have it from
// the one that made them, so it begins anew.
func coarseTimers() error {
	slack, err := unix.PrctlRetInt(unix.PR_GET_TIMERSLACK, 0, 0, 0, 0)
	if err != nil || slack >= timerSlack {
		return err
	}
	runtime.LockOSThread()
	if err := unix.Prctl(unix.PR_SET_TIMERSLACK, timerSlack, 0, 0, 0); err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	return fmt.Errorf("start anew: %w", unix.Exec(self, os.Args, os.Environ()))
}
