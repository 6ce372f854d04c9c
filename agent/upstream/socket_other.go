//go:build !linux

package upstream

import "syscall"

func setOptions(syscall.RawConn) {}
