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

// CountText is a number of things whose plural ends in s: 1 member, 2 members.
func CountText(n int, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	return fmt.Sprintf("%d %ss", n, noun)
}

// SizeText is n bytes for people: 512 B, 4.2 MiB; ParseSize may not read it back.
func SizeText(n int64) string {
	if n < 1<<10 {
		return fmt.Sprintf("%d B", n)
	}
	value, unit := float64(n), ""
	for _, unit = range []string{"KiB", "MiB", "GiB", "TiB", "PiB"} {
		value /= 1 << 10
		if value < 1023.95 {
			break
		}
	}
	return fmt.Sprintf("%.1f %s", value, unit)
}
