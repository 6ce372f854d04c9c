package agent

import (
	"errors"
	"fmt"
	"strings"

	"github.com/larder-cache/larder/agent/cache"
)

// Size is a number of bytes, written as "512KiB", "50GiB" or a plain number.
type Size int64

// ParseSize reads a size as a user writes it.
func ParseSize(text string) (Size, error) {
	limit, err := cache.ParseLimit(text)
	if err != nil || strings.Contains(text, "%") {
		return 0, errors.New("not a size; write bytes as 512KiB, 50GiB or a plain number")
	}
	return Size(limit.Of(0)), nil
}

// String is a form that ParseSize reads back to the same Size.
func (s Size) String() string { return cache.Bytes(int64(s)).String() }

// sizeText is n bytes for people, "4.2 MiB"; ParseSize may not read it back.
func sizeText(n int64) string {
	value, unit := float64(n), "bytes"
	for _, larger := range []string{"KiB", "MiB", "GiB", "TiB"} {
		if value < 1<<10 {
			break
		}
		value, unit = value/(1<<10), larger
	}
	if unit == "bytes" {
		return fmt.Sprintf("%d bytes", n)
	}
	return fmt.Sprintf("%.1f %s", value, unit)
}
