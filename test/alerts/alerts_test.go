package alerts

import (
	"encoding/json"
	"log/slog"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/model/rulefmt"
	"github.com/prometheus/prometheus/promql/parser"
	"github.com/prometheus/prometheus/promql/promqltest"
)

// files are where the chart keeps what it gives to Prometheus and Grafana.
const files = "../../deploy/chart/files"

// readAlerts reads the rules as Prometheus does.
func readAlerts(t *testing.T) map[string]rulefmt.Rule {
	t.Helper()
	groups, errs := rulefmt.ParseFile(files+"/alerts.yaml", false, model.UTF8Validation, parser.NewParser(parser.Options{}), slog.New(slog.DiscardHandler))
	if len(errs) > 0 {
		t.Fatal(errs)
	}
	out := map[string]rulefmt.Rule{}
	for _, g := range groups.Groups {
		for _, r := range g.Rules {
			out[r.Alert] = r
		}
	}
	return out
}

// TestAlerts evaluates each alert's expression with Prometheus' own engine, two
// hours after the series begin: where it must hold, and where it must not.
func TestAlerts(t *testing.T) {
	const gib = "1073741824"
	tests := map[string]struct{ fires, quiet []string }{ // each a load script, a point a minute
		"LarderAgentDown": {
			fires: []string{
				`up{job="larder",instance="n1"} 0x120`, `up{job="monitoring/larder",instance="n1"} 1x60 0x60`,
				// Another name, and a node of two; then all.
				`up{job="cache-peers",instance="n1"} 1x60 0x60
				larder_peer_members{job="cache-peers",instance="n1"} 2x60
				larder_peer_members{job="cache-peers",instance="n2"} 2x120`,
				`up{job="cache-peers",instance="n1"} 1x90 0x30
				larder_peer_members{job="cache-peers",instance="n1"} 2x90`,
			},
			quiet: []string{
				`up{job="larder",instance="n1"} 1x120`,
				`up{job="node-exporter",instance="n1"} 0x120
				larder_peer_members{job="cache-peers",instance="n1"} 2x120`,
			},
		},
		"LarderUpstreamUnreachable": {
			fires: []string{
				`larder_upstream_requests_total{job="l",registry="docker.io",code="error"} 0+6x120`,
				`larder_upstream_requests_total{job="l",registry="docker.io",code="503"} 0+6x120
				larder_upstream_requests_total{job="l",registry="docker.io",code="200"} 0+1x120`,
			},
			quiet: []string{
				`larder_upstream_requests_total{job="l",registry="docker.io",code="404"} 0+6x120`,
				`larder_upstream_requests_total{job="l",registry="docker.io",code="error"} 0+1x120
				larder_upstream_requests_total{job="l",registry="docker.io",code="200"} 0+6x120`,
				`larder_upstream_requests_total{job="l",registry="docker.io",code="error"} 0+6x60 360x60`,
			},
		},
		"LarderRateLimitBudgetLow": {
			fires: []string{
				`larder_upstream_ratelimit_remaining{job="l",registry="docker.io",instance="n1"} 9x120
				larder_upstream_ratelimit_limit{job="l",registry="docker.io",instance="n1"} 100x120
				larder_upstream_requests_total{job="l",registry="docker.io",code="200"} 0+1x120`,
				`larder_upstream_requests_total{job="l",registry="quay.io",code="429"} 0x110 1 2 3 4 5 6 7 8 9 10`,
			},
			quiet: []string{
				`larder_upstream_ratelimit_remaining{job="l",registry="docker.io",instance="n1"} 11x120
				larder_upstream_ratelimit_limit{job="l",registry="docker.io",instance="n1"} 100x120
				larder_upstream_requests_total{job="l",registry="docker.io",code="200"} 0+1x120`,
				// Nobody has asked for long: what it said last is old news.
				`larder_upstream_ratelimit_remaining{job="l",registry="docker.io",instance="n1"} 9x120
				larder_upstream_ratelimit_limit{job="l",registry="docker.io",instance="n1"} 100x120
				larder_upstream_requests_total{job="l",registry="docker.io",code="200"} 7x120`,
			},
		},
		"LarderHitRatioDrop": {
			fires: []string{
				`larder_served_bytes_total{job="l",source="disk"} 0+` + gib + `x120
				larder_fetched_bytes_total{job="l",from="upstream"} 0x60 0+` + gib + `x60`,
			},
			quiet: []string{
				`larder_served_bytes_total{job="l",source="disk"} 0+` + gib + `x120
				larder_fetched_bytes_total{job="l",from="upstream"} 0+` + gib + `x120`, // it is always so
				`larder_served_bytes_total{job="l",source="disk"} 0+1000000x120
				larder_fetched_bytes_total{job="l",from="upstream"} 0x60 0+1000000x60`, // of little
				`larder_served_bytes_total{job="l",source="disk"} 0+` + gib + `x120
				larder_fetched_bytes_total{job="l",from="peer"} 0x60 0+` + gib + `x60`, // from peers
				`larder_served_bytes_total{job="l",source="disk"} 0+` + gib + `x120
				larder_fetched_bytes_total{job="l",from="upstream"} 0x60 0+8` + gib + `x60`, // warmed, many times what runtimes pull
			},
		},
		"LarderCacheNearLimit": {
			fires: []string{
				`larder_cache_bytes{job="l",instance="n1"} 96x120
				larder_cache_limit_bytes{job="l",instance="n1"} 100x120
				larder_cache_evictions_total{job="l",instance="n1",reason="max_bytes"} 0+1x120`,
			},
			quiet: []string{
				`larder_cache_bytes{job="l",instance="n1"} 96x120
				larder_cache_limit_bytes{job="l",instance="n1"} 100x120
				larder_cache_evictions_total{job="l",instance="n1",reason="max_bytes"} 5x120`, // full and at rest
				`larder_cache_bytes{job="l",instance="n1"} 50x120
				larder_cache_limit_bytes{job="l",instance="n1"} 100x120
				larder_cache_evictions_total{job="l",instance="n1",reason="lost"} 0+1x120`,
				`larder_cache_bytes{job="l",instance="n1"} 96x120
				larder_cache_limit_bytes{job="l",instance="n1"} 0x120
				larder_cache_evictions_total{job="l",instance="n1",reason="min_free"} 0+1x120`, // no limit
			},
		},
		"LarderServingStaleTags": {
			fires: []string{`larder_tag_stale_served_total{job="l",instance="n1"} 0+1x120`},
			quiet: []string{`larder_tag_stale_served_total{job="l",instance="n1"} 9x120`},
		},
		"LarderPinMissing": {
			fires: []string{`larder_pins{job="l",instance="n1",state="missing"} 2x120`},
			quiet: []string{`larder_pins{job="l",instance="n1",state="missing"} 0x120
				larder_pins{job="l",instance="n1",state="stale"} 2x120`},
		},
		"LarderConfigDrift": {
			// Two programs that insist, every five minutes.
			fires: []string{`larder_hosts_drift_repaired_total{job="l",instance="n1",runtime="containerd"} 0x79 1x5 2x5 3x5 4x5 5x5 6x5 7x5 8x5`},
			quiet: []string{
				`larder_hosts_drift_repaired_total{job="l",instance="n1",runtime="containerd"} 0x100 1 1x20`,
				// k3s, restarted once, writes its six files anew.
				`larder_hosts_drift_repaired_total{job="l",instance="n1",runtime="containerd"} 0x100 6 6x20`,
				// A tool that does so every half hour costs seconds.
				`larder_hosts_drift_repaired_total{job="l",instance="n1",runtime="containerd"} 0x30 6x30 12x30 18x30`,
			},
		},
		"LarderMembersMissing": {
			fires: []string{
				`larder_peer_members{job="l",instance="n1"} 1x120
				larder_peer_members{job="l",instance="n2"} 2x120
				larder_peer_members{job="l",instance="n3"} 3x120`,
			},
			quiet: []string{
				`larder_peer_members{job="l",instance="n1"} 2x120
				larder_peer_members{job="l",instance="n2"} 2x120
				larder_peer_members{job="other",instance="n3"} 1x120`,
				// Without peers.
				`larder_peer_members{job="l",instance="n1"} 0x120
				larder_peer_members{job="l",instance="n2"} 0x120`,
				`larder_peer_members{job="l",instance="n1"} 0x120
				larder_peer_members{job="l",instance="n2"} 1x120`,
			},
		},
		"LarderNotKeeping": {
			fires: []string{`larder_unkept_total{job="l",instance="n1"} 0+1x120`},
			quiet: []string{
				`larder_unkept_total{job="l",instance="n1"} 7x120`,
				`larder_unkept_total{job="l",instance="n1"} 0x100 3x20`, // one image that is too large
			},
		},
		"LarderAuditIncomplete": {
			fires: []string{`larder_audit_lines_lost_total{job="l",instance="n1"} 0x110 1x10`},
			quiet: []string{`larder_audit_lines_lost_total{job="l",instance="n1"} 3x120`},
		},
		"LarderCorruptionFound": {
			fires: []string{
				`larder_cache_corruptions_total{job="l",instance="n1"} 0x110 1x10`,
				`larder_peer_bans_total{job="l",instance="n1",reason="digest"} 0x110 1x10`,
			},
			quiet: []string{
				`larder_cache_corruptions_total{job="l",instance="n1"} 3x120
				larder_peer_bans_total{job="l",instance="n1",reason="slow"} 0+1x120`,
			},
		},
	}
	rules := readAlerts(t)
	for name := range rules {
		if _, ok := tests[name]; !ok {
			t.Errorf("%s is not tested", name)
		}
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			r := rules[name]
			for i, load := range tt.fires {
				if evaluate(t, load, r.Expr) == 0 {
					t.Errorf("fires[%d] does not", i)
				}
			}
			for i, load := range tt.quiet {
				if n := evaluate(t, load, r.Expr); n > 0 {
					t.Errorf("quiet[%d] fires for %d series", i, n)
				}
			}
			if !slices.Contains([]string{"info", "warning", "critical"}, r.Labels["severity"]) || r.Annotations["summary"] == "" || r.Annotations["description"] == "" {
				t.Errorf("labels %v, annotations %v", r.Labels, r.Annotations)
			}
		})
	}
}

// evaluate is how many series expr gives, two hours after those of load began.
func evaluate(t *testing.T, load, expr string) int {
	t.Helper()
	var script strings.Builder
	script.WriteString("load 1m\n")
	for line := range strings.Lines(load) {
		script.WriteString("  " + strings.TrimSpace(line) + "\n")
	}
	storage := promqltest.LoadedStorage(t, script.String())
	defer storage.Close()
	engine := promqltest.NewTestEngine(t, false, 5*time.Minute, 1e6)
	q, err := engine.NewInstantQuery(t.Context(), storage, nil, expr, time.Unix(0, 0).Add(2*time.Hour))
	if err != nil {
		t.Fatalf("%v in %s", err, expr)
	}
	defer q.Close()
	result := q.Exec(t.Context())
	vector, err := result.Vector()
	if err != nil {
		t.Fatalf("%v in %s", err, expr)
	}
	return len(vector)
}

// dashboard is the part of Grafana's format that can be wrong here.
type dashboard struct {
	UID        string
	Templating struct{ List []struct{ Name, Query any } }
	Panels     []panel
}

type panel struct {
	ID      int
	Type    string
	Title   string
	GridPos struct{ X, Y, W, H int }
	Targets []struct {
		RefID      string
		Expr       string
		Datasource struct{ UID string }
	}
}

// TestDashboard holds that every query is one that Prometheus takes, with the
// variables that the dashboard defines, and that no panel hides another.
func TestDashboard(t *testing.T) {
	body, err := os.ReadFile(files + "/dashboard.json")
	if err != nil {
		t.Fatal(err)
	}
	var d dashboard
	if err := json.Unmarshal(body, &d); err != nil {
		t.Fatal(err)
	}
	if len(d.Panels) < 20 || d.UID == "" {
		t.Fatalf("%d panels", len(d.Panels))
	}
	variables := strings.NewReplacer("$__rate_interval", "5m", "$__range", "1h", "$job", ".*", "$instance", ".*")
	left := regexp.MustCompile(`\$[a-z_]+`)
	ids := map[int]string{}
	cells := map[[2]int]string{}
	for _, p := range d.Panels {
		if ids[p.ID] != "" {
			t.Errorf("%q and %q have the same id", p.Title, ids[p.ID])
		}
		ids[p.ID] = p.Title
		g := p.GridPos
		if g.X < 0 || g.W < 1 || g.H < 1 || g.X+g.W > 24 {
			t.Errorf("%q is outside the grid: %+v", p.Title, g)
		}
		for x := g.X; x < g.X+g.W; x++ {
			for y := g.Y; y < g.Y+g.H; y++ {
				if cells[[2]int{x, y}] != "" {
					t.Fatalf("%q lies on %q", p.Title, cells[[2]int{x, y}])
				}
				cells[[2]int{x, y}] = p.Title
			}
		}
		if (p.Type == "row") != (len(p.Targets) == 0) {
			t.Errorf("%q is a %s with %d queries", p.Title, p.Type, len(p.Targets))
		}
		for _, q := range p.Targets {
			expr := variables.Replace(q.Expr)
			if _, err := parser.NewParser(parser.Options{}).ParseExpr(expr); err != nil || left.MatchString(expr) {
				t.Errorf("%q: %s: %v", p.Title, expr, err)
			}
			if q.Datasource.UID != "${datasource}" {
				t.Errorf("%q asks %s", p.Title, q.Datasource.UID)
			}
		}
	}
}
