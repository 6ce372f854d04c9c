package main

import (
	"cmp"
	"fmt"
	"io"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/larder-cache/larder/agent"
	"github.com/larder-cache/larder/agent/proxy"
	"github.com/larder-cache/larder/agent/upstream"
	"github.com/larder-cache/larder/hostsconfig"
	"github.com/spf13/cobra"
)

func newStatus() *cobra.Command {
	var admin adminFlags
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show this node: cache, pulls in progress, upstreams, members",
		Example: `  larder status
  larder status --json | jq .cache`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			api, err := admin.api()
			if err != nil {
				return err
			}
			var s agent.Status
			if err := api.get(cmd.Context(), "/api/v1/status", &s); err != nil {
				return err
			}
			if asJSON {
				return printJSON(cmd.OutOrStdout(), s)
			}
			printStatus(cmd.OutOrStdout(), s, time.Now())
			return nil
		},
	}
	admin.bind(cmd)
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

func printStatus(w io.Writer, s agent.Status, now time.Time) {
	st := newStyle(w)
	fmt.Fprintf(w, "%s  larder %s, %s\n", st.bold(s.Node), s.Version, readiness(st, s))
	for _, c := range s.Checks {
		if !c.OK {
			fmt.Fprintf(w, "  %s %s: %s\n", st.bad("not ready:"), c.Name, c.Reason)
		}
	}
	facts := &table{header: []string{"", ""}}
	facts.row("proxy", s.Proxy)
	facts.row("started", ago(s.Started, now))
	facts.row("cache", cacheLine(st, s.Cache))
	if s.Pins.Images > 0 {
		facts.row("pins", pinsLine(st, s.Pins))
	}
	if s.Replicas.Wanted > 1 && len(s.Members) > 1 {
		facts.row("replicas", replicasLine(st, s.Replicas))
	}
	facts.row("served", bySource(s.Served))
	facts.row("fetched", bySource(s.Fetched))
	if s.Uploaded > 0 {
		facts.row("uploaded", size(s.Uploaded)+" to other nodes")
	}
	facts.row("hosts", hostsLine(st, s.Hosts))
	if s.Runtime.ContentDir != "" {
		facts.row("runtime", runtimeLine(st, s.Runtime))
	}
	facts.row("peers", s.Peers)
	facts.printBody(w)
	printFindings(w, st, s.Doctor)
	printPinTrouble(w, st, s.Pins)
	printPulls(w, s.Pulls, now)
	printFills(w, s.Fills, now)
	printRecent(w, st, s.Recent, now)
	printUpstreams(w, st, s, now)
	printMembers(w, st, s.Members, now)
}

func readiness(st style, s agent.Status) string {
	if s.Ready {
		return st.good("ready")
	}
	return st.bad("not ready")
}

func cacheLine(st style, c agent.CacheStatus) string {
	line := size(c.Bytes) + " in " + agent.CountText(c.Blobs, "blob")
	if c.Limit > 0 {
		line += " of at most " + size(c.Limit)
	}
	line = fmt.Sprintf("%s; %s free on %s", line, size(c.Free), c.Dir)
	if c.Problem != "" {
		line += "; " + st.bad(c.Problem)
	}
	return line
}

// replicasLine says what would be lost with this node.
func replicasLine(st style, r agent.ReplicasStatus) string {
	if r.Lacking == 0 {
		return fmt.Sprintf("what is here is on %d nodes or more", r.Wanted)
	}
	line := st.warn(fmt.Sprintf("%d blobs and tags are on fewer than %d nodes", r.Lacking, r.Wanted))
	if r.Stuck > 0 {
		line += fmt.Sprintf(", %d of them private or of an unknown image", r.Stuck)
	}
	if r.Problem != "" {
		line += ": " + r.Problem
	}
	return line
}

// bySource is "1.0 GiB disk, 3.2 MiB upstream", largest first.
func bySource(bytes map[string]int64) string {
	names := slices.SortedFunc(maps.Keys(bytes), func(a, b string) int {
		return cmp.Or(cmp.Compare(bytes[b], bytes[a]), strings.Compare(a, b))
	})
	var parts []string
	for _, n := range names {
		if bytes[n] > 0 {
			parts = append(parts, size(bytes[n])+" "+n)
		}
	}
	if len(parts) == 0 {
		return "nothing yet"
	}
	return strings.Join(parts, ", ")
}

func runtimeLine(st style, r agent.RuntimeStatus) string {
	if r.Problem != "" {
		return st.bad("cannot be read") + ": " + r.Problem
	}
	return fmt.Sprintf("%s in %s in %s", size(r.Bytes), agent.CountText(r.Blobs, "blob"), r.ContentDir)
}

func hostsLine(st style, h agent.HostsStatus) string {
	var dirs []string
	for _, d := range []string{h.Containerd, h.CRIO} {
		if d != "" {
			dirs = append(dirs, d)
		}
	}
	switch {
	case len(dirs) == 0:
		return "not managed (hosts.containerd and hosts.crio are empty)"
	case h.InPlace:
		return st.good("in place") + ": " + strings.Join(dirs, ", ")
	}
	return st.bad("not in place") + ": " + h.Problem
}

// printPulls shows what runtimes are being sent.
func printPulls(w io.Writer, pulls []proxy.Pull, now time.Time) {
	if len(pulls) == 0 {
		return
	}
	fmt.Fprintln(w, "\nPulls in progress")
	t := newTable("blob", "progress", ">sent", "from", "since", "image")
	t.indent = "  "
	for _, p := range pulls {
		from, amount := p.Source, size(p.Offset)+" of "+size(p.Size)
		if p.Size == 0 {
			from, amount = "-", "waiting"
		}
		t.row(short(cmp.Or(p.Digest.String(), p.Reference)), bar(p.Offset, p.Size, barWidth), amount, from, ago(p.Started, now),
			p.Registry+"/"+p.Repository)
	}
	t.print(w)
}

const barWidth = 10 // columns

// printFills shows what this node fetches.
func printFills(w io.Writer, fills []agent.FillStatus, now time.Time) {
	if len(fills) == 0 {
		return
	}
	fmt.Fprintln(w, "\nBeing fetched")
	t := newTable("blob", "progress", ">here", ">readers", "since", "from")
	t.indent = "  "
	for _, f := range fills {
		t.row(short(f.Digest.String()), bar(f.Present, f.Size, barWidth), size(f.Present)+" of "+size(f.Size),
			strconv.Itoa(f.Readers), ago(f.Started, now), origins(few(f.Origins)))
	}
	t.print(w)
}

// printFindings shows what the agent's own look at the node found; the fixes are
// the doctor's to tell.
func printFindings(w io.Writer, st style, d agent.DoctorStatus) {
	colours := map[hostsconfig.Severity]func(string) string{hostsconfig.Broken: st.bad, hostsconfig.Degraded: st.warn}
	told := false
	for _, f := range d.Findings {
		colour, ok := colours[f.Severity]
		if !ok { // a note
			continue
		}
		if !told {
			fmt.Fprintln(w, "\nFindings (larder doctor has the fixes)")
			told = true
		}
		fmt.Fprintf(w, "  %s  %s\n", colour(fmt.Sprintf("%-7s", f.Severity)), st.wrap(f.What+" "+f.Where, 11))
	}
}

// maxRecent is how many pulls are listed; the rest is in --json.
const maxRecent = 8

// printRecent shows what was pulled last.
func printRecent(w io.Writer, st style, pulls []agent.RecentPull, now time.Time) {
	if len(pulls) == 0 {
		return
	}
	fmt.Fprintln(w, "\nRecent pulls")
	t := newTable("image", ">parts", ">failed", ">took", "ended", "from")
	t.indent = "  "
	for _, p := range pulls[:min(len(pulls), maxRecent)] {
		from, failed := bySource(p.Served), "-"
		if len(p.Served) == 0 {
			from = "-"
		}
		if p.Failed > 0 {
			failed = st.bad(strconv.Itoa(p.Failed))
		}
		t.row(imageName(p), strconv.Itoa(len(p.Parts)), failed, took(p.Ended.Sub(p.Started)), ago(p.Ended, now), from)
		if part, ok := p.Trouble(); ok && p.Failed > 0 {
			t.note("  " + st.wrap(fmt.Sprintf("%s %s: %s", part.Kind, short(part.Reference), part.Error), 4))
		}
	}
	t.print(w)
}

func imageName(p agent.RecentPull) string {
	switch {
	case p.Reference == "":
		return p.Registry + "/" + p.Repository
	case strings.Contains(p.Reference, ":"):
		return p.Registry + "/" + p.Repository + "@" + short(p.Reference)
	}
	return p.Registry + "/" + p.Repository + ":" + p.Reference
}

// origins is "registry docker.io 12.0 MiB, peer node-3 4.0 MiB".
func origins(list []agent.Origin) string {
	var parts []string
	for _, o := range list {
		parts = append(parts, strings.TrimSpace(o.Kind+" "+o.Name)+" "+size(o.Bytes))
	}
	return strings.Join(parts, ", ")
}

func printUpstreams(w io.Writer, st style, s agent.Status, now time.Time) {
	if len(s.Upstreams) == 0 {
		return
	}
	fmt.Fprintln(w, "\nUpstreams")
	t := newTable("registry", "endpoint", "state", "last answer", "latency")
	t.indent = "  "
	for _, u := range s.Upstreams {
		note := u.LastError
		if u.RateLimit != nil {
			note = strings.TrimPrefix(fmt.Sprintf("%s; %d of %d pulls left", note, u.RateLimit.Remaining, u.RateLimit.Limit), "; ")
		}
		latency := "-"
		if u.Latency > 0 {
			latency = u.Latency.Round(time.Millisecond).String()
		}
		t.row(u.Registry, u.Endpoint, state(st, u, now), ago(u.LastOKAt, now), latency)
		if note != "" {
			t.note("  " + st.wrap(note, 4))
		}
	}
	t.print(w)
}

func state(st style, u upstream.Health, now time.Time) string {
	switch u.State {
	case "ok":
		return st.good(u.State)
	case "failing", "unreachable":
		return st.bad(u.State)
	case "open":
		return st.bad("not asked") + ", next try " + from(u.RetryAt, now)
	case "paused":
		return st.warn(u.State) + ", next try " + from(u.RetryAt, now)
	}
	return u.State
}

// maxMembers is how many members are listed: those that this node is linked
// with first. The rest of a large cluster is in --json.
const maxMembers = 32

func printMembers(w io.Writer, st style, members []agent.Member, now time.Time) {
	if len(members) == 0 {
		return
	}
	shown, left := members, 0
	if len(members) > maxMembers {
		shown = slices.Clone(members)
		slices.SortStableFunc(shown, func(a, b agent.Member) int { return cmp.Compare(b.Interest(), a.Interest()) })
		shown, left = shown[:maxMembers], len(members)-maxMembers
	}
	fmt.Fprintln(w, "\nMembers")
	t := newTable("zone", "node", "address", "state", ">sent to", ">received from")
	t.indent = "  "
	for _, m := range shown {
		t.row(memberRow(st, m, now)...)
	}
	t.print(w)
	if left > 0 {
		fmt.Fprintf(w, "  and %d more without a connection to this node; see --json\n", left)
	}
}

func memberRow(st style, m agent.Member, now time.Time) []string {
	name, state, sent, received := m.Name, m.State, "-", "-"
	if m.Linked || m.Sent+m.Received > 0 {
		sent, received = size(m.Sent), size(m.Received)
	}
	switch {
	case m.Self:
		name, state = st.bold(name), "this node"
	case !m.BannedUntil.IsZero():
		state = st.bad(fmt.Sprintf("banned for %s", m.BannedUntil.Sub(now).Round(time.Second)))
	case m.Linked:
		state = st.good("linked")
	case m.State == agent.StateUnreachable:
		state = st.bad(state)
	}
	return []string{cmp.Or(m.Zone, "-"), name, m.Address, state, sent, received}
}
