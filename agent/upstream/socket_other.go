//go:build !linux

package upstream

import "syscall"

func setOptions(syscall.RawConn) {}

func unread(syscall.RawConn) int { return 0 }
