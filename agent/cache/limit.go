package cache

import (
	"fmt"
	"math"
	"strconv"
	"strings"
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

// units are tried in order, so that "GiB" is not read as "B".
var units = []struct {
	suffix string
	factor float64
}{
	{"KiB", 1 << 10}, {"MiB", 1 << 20}, {"GiB", 1 << 30}, {"TiB", 1 << 40},
	{"Ki", 1 << 10}, {"Mi", 1 << 20}, {"Gi", 1 << 30}, {"Ti", 1 << 40},
	{"kB", 1e3}, {"KB", 1e3}, {"MB", 1e6}, {"GB", 1e9}, {"TB", 1e12},
	{"K", 1e3}, {"M", 1e6}, {"G", 1e9}, {"T", 1e12},
	{"B", 1}, {"", 1},
}

// ParseLimit reads "50GiB", "500MB", "1048576" or "20%". Units are those of
// Kubernetes quantities and of IEC; "0" is no limit.
func ParseLimit(s string) (Limit, error) {
	text := strings.TrimSpace(s)
	if share, ok := strings.CutSuffix(text, "%"); ok {
		p, err := parseNumber(share)
		if err != nil || p > 100 {
			return Limit{}, fmt.Errorf("%q is not a share between 0%% and 100%%", s)
		}
		return Percent(p), nil
	}
	for _, u := range units {
		number, ok := strings.CutSuffix(text, u.suffix)
		if !ok {
			continue
		}
		n, err := parseNumber(number)
		if err != nil || n*u.factor >= math.MaxInt64 {
			break
		}
		return Bytes(int64(n * u.factor)), nil
	}
	return Limit{}, fmt.Errorf(`%q is not a size: give bytes ("50GiB", "500MB", "1048576") or a share of the file system ("20%%")`, s)
}

// parseNumber accepts plain decimals only: no sign, exponent, NaN or hex.
func parseNumber(s string) (float64, error) {
	s = strings.TrimSpace(s)
	if strings.Trim(s, "0123456789.") != "" {
		return 0, strconv.ErrSyntax
	}
	return strconv.ParseFloat(s, 64)
}

// IsZero reports whether l limits nothing.
func (l Limit) IsZero() bool { return l == Limit{} }

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
	for i := 3; i >= 0; i-- {
		if f := int64(units[i].factor); l.bytes >= f && l.bytes%f == 0 {
			return strconv.FormatInt(l.bytes/f, 10) + units[i].suffix
		}
	}
	return strconv.FormatInt(l.bytes, 10)
}

// MarshalText and UnmarshalText let a Limit stand in configuration files.
func (l Limit) MarshalText() ([]byte, error) { return []byte(l.String()), nil }

// UnmarshalText is ParseLimit.
func (l *Limit) UnmarshalText(text []byte) error {
	parsed, err := ParseLimit(string(text))
	if err != nil {
		return err
	}
	*l = parsed
	return nil
}
