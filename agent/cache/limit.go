package cache

import (
	"fmt"
	"math"
	"strconv"
	"strings"

	"github.com/dustin/go-humanize"
)

// Limit is a number of bytes, or a share of the file system that holds the
// cache. The zero Limit is "none": nothing is limited, nothing kept free.
type Limit struct {
	bytes   int64
	percent float64
}

// Bytes returns a Limit of n bytes.
func Bytes(n int64) Limit { return Limit{bytes: n} }

// Percent returns a Limit of p hundredths of the file system's size.
func Percent(p float64) Limit { return Limit{percent: p} }

// ParseLimit reads "50GiB", "1.5Gi", "500MB", "1048576" or "20%". Units are those of
// Kubernetes quantities and of IEC, in any case; "0" is no limit.
func ParseLimit(s string) (Limit, error) {
	text := strings.TrimSpace(s)
	if share, ok := strings.CutSuffix(text, "%"); ok {
		p, err := parseNumber(share)
		if err != nil || p > 100 {
			return Limit{}, fmt.Errorf("%q is not a share between 0%% and 100%%", s)
		}
		return Percent(p), nil
	}
	n, err := humanize.ParseBytes(text)
	if err != nil || n > math.MaxInt64 || strings.Contains(text, ",") { // which stands for thousands there
		return Limit{}, fmt.Errorf(`%q is not a size: give bytes ("50GiB", "500MB", "1048576") or a share of the file system ("20%%")`, s)
	}
	return Bytes(int64(n)), nil
}

// parseNumber accepts plain decimals only: no sign, exponent, NaN or hex.
func parseNumber(s string) (float64, error) {
	s = strings.TrimSpace(s)
	if strings.Trim(s, "0123456789.") != "" {
		return 0, strconv.ErrSyntax
	}
	return strconv.ParseFloat(s, 64)
}

// Of returns l in bytes on a file system of total bytes.
func (l Limit) Of(total int64) int64 {
	if l.percent > 0 {
		return int64(float64(total) * l.percent / 100)
	}
	return l.bytes
}

// String returns a form that ParseLimit reads back to the same Limit.
func (l Limit) String() string {
	if l.percent > 0 {
		return strconv.FormatFloat(l.percent, 'f', -1, 64) + "%"
	}
	for i, unit := range []string{"TiB", "GiB", "MiB", "KiB"} {
		if f := int64(humanize.TiByte >> (10 * i)); l.bytes >= f && l.bytes%f == 0 {
			return strconv.FormatInt(l.bytes/f, 10) + unit
		}
	}
	return strconv.FormatInt(l.bytes, 10)
}
