package upstream

import (
	"net/http"
	"reflect"
	"strings"
	"testing"
	"time"
)

func TestParseContentRange(t *testing.T) {
	cases := []struct {
		in                string
		start, end, total int64
		ok                bool
	}{
		{"bytes 0-99/1000", 0, 100, 1000, true},
		{"bytes 999-999/1000", 999, 1000, 1000, true},
		{"bytes 5-9/*", 5, 10, -1, true},
		{"Bytes 0-0/1", 0, 1, 1, true},
		{in: "bytes 0-1000/1000"},
		{in: "bytes 9-5/1000"},
		{in: "bytes -5-9/1000"},
		{in: "bytes +5-9/1000"},
		{in: "bytes */1000"},
		{in: "bytes 0-99"},
		{in: "items 0-99/1000"},
		{in: "bytes 0-9223372036854775807/*"},
		{in: "bytes 0-99/99999999999999999999"},
		{in: ""},
	}
	for _, tc := range cases {
		start, end, total, err := parseContentRange(tc.in)
		if (err == nil) != tc.ok || start != tc.start || end != tc.end || total != tc.total {
			t.Errorf("%q: %d %d %d %v", tc.in, start, end, total, err)
		}
	}
}

func TestParseRetryAfter(t *testing.T) {
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	for in, want := range map[string]time.Duration{
		"":       0,
		"0":      0,
		"120":    2 * time.Minute,
		" 7 ":    7 * time.Second,
		"-5":     0,
		"soon":   0,
		"999999": 24 * time.Hour,
		now.Add(time.Minute).Format(http.TimeFormat):   time.Minute,
		now.Add(-time.Minute).Format(http.TimeFormat):  0,
		now.Add(1000 * time.Hour).Format(time.RFC850):  24 * time.Hour,
		"99999999999999999999999999999999999999999999": 0,
	} {
		if got := parseRetryAfter(in, now); got != want {
			t.Errorf("%q: %v, want %v", in, got, want)
		}
	}
}

func TestParseNext(t *testing.T) {
	cases := []struct {
		name string
		in   []string
		want string
	}{
		{"none", nil, ""},
		{"relative", []string{`</v2/a/tags/list?n=2&last=b>; rel="next"`}, "n=2&last=b"},
		{"absolute", []string{`<https://evil.test/v2/a/tags/list?last=b>; rel=next`}, "last=b"},
		{"second link", []string{`<x?a=1>; rel="prev", <y?a=2>; title="a, b"; rel="last next"`}, "a=2"},
		{"second line", []string{`<x?a=1>; rel=prev`, `<y?a=2>; REL=Next`}, "a=2"},
		{"unclosed", []string{`<x?a=1; rel=next`}, ""},
		{"no rel", []string{`<x?a=1>`}, ""},
	}
	for _, tc := range cases {
		if got := parseNext(tc.in); got != tc.want {
			t.Errorf("%s: %q, want %q", tc.name, got, tc.want)
		}
	}
}

func TestParseChallenges(t *testing.T) {
	type m = map[string]string
	cases := []struct {
		name string
		in   []string
		want []challenge
	}{
		{"none", nil, nil},
		{"bearer", []string{`Bearer realm="https://auth.docker.io/token",service="registry.docker.io",scope="repository:a/b:pull,push"`},
			[]challenge{{"bearer", m{"realm": "https://auth.docker.io/token", "service": "registry.docker.io", "scope": "repository:a/b:pull,push"}}}},
		{"basic", []string{`Basic realm="Registry Realm"`}, []challenge{{"basic", m{"realm": "Registry Realm"}}}},
		{"two in a line", []string{`Negotiate, Basic realm="x, y", Bearer realm=z, service="q\"r"`},
			[]challenge{{"negotiate", m{}}, {"basic", m{"realm": "x, y"}}, {"bearer", m{"realm": "z", "service": `q"r`}}}},
		{"two lines", []string{`Basic realm=a`, `BEARER Realm="b"`}, []challenge{{"basic", m{"realm": "a"}}, {"bearer", m{"realm": "b"}}}},
		{"parameters of nothing", []string{`realm="x"`}, nil},
	}
	for _, tc := range cases {
		if got := parseChallenges(tc.in); !reflect.DeepEqual(got, tc.want) {
			t.Errorf("%s: %v, want %v", tc.name, got, tc.want)
		}
	}
}

func TestParseRateLimit(t *testing.T) {
	cases := []struct {
		in     string
		n      int64
		window time.Duration
		ok     bool
	}{
		{"100;w=21600", 100, 6 * time.Hour, true},
		{"76", 76, 0, true},
		{"0; w=60", 0, time.Minute, true},
		{"", 0, 0, false},
		{"-1;w=1", 0, 0, false},
		{"5;w=99999999999999999999", 5, 0, true},
	}
	for _, tc := range cases {
		if n, w, ok := parseRateLimit(tc.in); n != tc.n || w != tc.window || ok != tc.ok {
			t.Errorf("%q: %d %v %t", tc.in, n, w, ok)
		}
	}
}

func FuzzParseContentRange(f *testing.F) {
	f.Add("bytes 0-99/1000")
	f.Add("bytes 5-9/*")
	f.Fuzz(func(t *testing.T, s string) {
		start, end, total, err := parseContentRange(s)
		if err == nil && (start < 0 || end <= start || (total >= 0 && end > total)) {
			t.Errorf("%q: [%d, %d) of %d", s, start, end, total)
		}
	})
}

func FuzzParseRetryAfter(f *testing.F) {
	f.Add("120")
	f.Add("Fri, 02 Jan 2026 03:04:05 GMT")
	f.Fuzz(func(t *testing.T, s string) {
		if d := parseRetryAfter(s, time.Unix(1e9, 0)); d < 0 || d > 24*time.Hour {
			t.Errorf("%q: %v", s, d)
		}
	})
}

func FuzzParseNext(f *testing.F) {
	f.Add(`</v2/a/tags/list?n=2&last=b>; rel="next"`)
	f.Fuzz(func(t *testing.T, s string) {
		if next := parseNext([]string{s}); len(next) > len(s) {
			t.Errorf("%q: %q is longer than the header", s, next)
		}
	})
}

func FuzzParseChallenges(f *testing.F) {
	f.Add(`Bearer realm="https://a/token",service="b", Basic realm=x`)
	f.Fuzz(func(t *testing.T, s string) {
		all := parseChallenges([]string{s, s})
		if len(all) > maxChallenges {
			t.Errorf("%q: %d challenges", s, len(all))
		}
		for _, ch := range all {
			if ch.params == nil {
				t.Errorf("%q: no parameters", s)
			}
		}
	})
}

func TestWithoutReason(t *testing.T) {
	for in, want := range map[string]string{
		`Bearer realm="https://a/t",service="a",scope="repository:b:pull",error="invalid_token"`: `Bearer realm="https://a/t",service="a",scope="repository:b:pull"`,
		`Bearer error="insufficient_scope", error_description="a, b", realm="https://a/t"`:       `Bearer realm="https://a/t"`,
		`Basic realm="x, error=1", Bearer realm="https://a/t", error="e", service=a`:             `Basic realm="x, error=1",Bearer realm="https://a/t",service=a`,
		`Negotiate`: `Negotiate`,
		``:          ``,
	} {
		if got := withoutReason(in); got != want {
			t.Errorf("%s: %s, want %s", in, got, want)
		}
	}
}

// TestClip: what a registry says reaches terminals and logs, where it must not move the
// cursor, colour what follows or turn the line around.
func TestClip(t *testing.T) {
	for in, want := range map[string]string{
		"manifest unknown: größer":        "manifest unknown: größer",
		"a\x1b[31mb\r\nc\x7f":             "a[31mbc",
		"a\u009b31mb":                     "a31mb",
		"evil\u202egpj.exe":               "evilgpj.exe",
		"zero\u200bwidth\u2028line\ufeff": "zerowidthline",
		strings.Repeat("x", 39) + "ö":     strings.Repeat("x", 39),
	} {
		if got := clip(in, 40); got != want {
			t.Errorf("%q: %q, want %q", in, got, want)
		}
	}
}
