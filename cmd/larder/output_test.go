package main

import (
	"strings"
	"testing"
	"time"
)

func TestHumaneNumbers(t *testing.T) {
	for n, want := range map[int64]string{
		-1: "?", 0: "0 B", 1023: "1023 B", 1024: "1.0 KiB", 1 << 20: "1.0 MiB", 1<<20 - 1: "1.0 MiB",
		5<<30 + 300<<20: "5.3 GiB", 1 << 40: "1.0 TiB", 1<<63 - 1: "8192.0 PiB",
	} {
		if got := size(n); got != want {
			t.Errorf("size(%d) = %q, want %q", n, got, want)
		}
	}
	now := time.Now()
	for d, want := range map[time.Duration]string{
		0: "now", 90 * time.Second: "90s ago", 30 * time.Minute: "30m ago", 47 * time.Hour: "47h ago", 72 * time.Hour: "3d ago", -time.Hour: "now",
	} {
		if got := ago(now.Add(-d), now); got != want {
			t.Errorf("ago(%s) = %q, want %q", d, got, want)
		}
	}
	if got := ago(time.Time{}, now); got != "-" {
		t.Errorf("ago(never) = %q", got)
	}
	if got := rate(100e6, time.Second/2) + rate(1, 0); got != "200 MB/s-" {
		t.Errorf("rates %q", got)
	}
}

func TestBar(t *testing.T) {
	for want, in := range map[string][2]int64{
		"[    ]": {0, 100}, "[==  ]": {50, 100}, "[====]": {100, 100},
	} {
		if got := bar(in[0], in[1], 4); got != want {
			t.Errorf("bar(%v) = %q, want %q", in, got, want)
		}
	}
	// More than all, and of an unknown whole.
	if bar(200, 100, 4) != "[====]" || bar(5, -1, 4) != "[    ]" || bar(5, 0, 4) != "[    ]" {
		t.Error("a bar leaves its field")
	}
}

func TestTableAlignsColours(t *testing.T) {
	var out strings.Builder
	table := newTable("name", ">size")
	table.row(style{on: true}.good("ok"), "1")
	table.row("längst", "100")
	table.print(&out)
	want := "name    size\n\x1b[32mok\x1b[0m         1\nlängst   100\n"
	if out.String() != want {
		t.Errorf("%q, want %q", out.String(), want)
	}
}

// TestPlainOutsideTerminals holds that pipes and files get no colours.
func TestPlainOutsideTerminals(t *testing.T) {
	if newStyle(&strings.Builder{}).on {
		t.Error("colours in a pipe")
	}
}

// TestWrap: text is broken where a terminal ends, between words, and nowhere else.
func TestWrap(t *testing.T) {
	const text = "The agent does not answer, so pulls go straight to the registry."
	for width, want := range map[int]string{
		0:  text,
		80: text,
		40: "The agent does not answer, so\n         pulls go straight to the\n         registry.",
		12: "The\n         agent\n         does\n         not\n         answer,\n         so\n         pulls\n         go\n         straight\n         to\n         the\n         registry.",
	} {
		if got := (style{width: width}).wrap(text, 9); got != want {
			t.Errorf("%d columns:\n%s\nwant\n%s", width, got, want)
		}
	}
}
