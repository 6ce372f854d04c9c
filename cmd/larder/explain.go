package main

import (
	"fmt"
	"io"
	"net/url"
	"strings"
	"time"

	"github.com/larder-cache/larder/agent"
	"github.com/spf13/cobra"
)

func newExplain() *cobra.Command {
	var admin adminFlags
	var platform string
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "explain IMAGE",
		Short: "Show where each blob of an image is or came from",
		Long: `Show, for each blob of an image, where it is now (disk, runtime store, arriving,
a peer, or the registry alone), where this node got it from, when and how many
bytes. The agent's memory is asked, no registry: an image that was never pulled
through this node is not known.`,
		Example: `  larder explain nginx:1.29
  larder explain --platform all quay.io/prometheus/prometheus@sha256:...
  larder explain --json nginx | jq '.parts[] | {digest, where}'`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			api, err := admin.api()
			if err != nil {
				return err
			}
			if _, err := parseImages(args); err != nil {
				return err
			}
			var e agent.Explanation
			q := url.Values{"image": {args[0]}, "platform": {platform}}
			if err := api.get(cmd.Context(), "/api/v1/explain?"+q.Encode(), &e); err != nil {
				return err
			}
			if asJSON {
				return printJSON(cmd.OutOrStdout(), e)
			}
			printExplanation(cmd.OutOrStdout(), e, time.Now())
			return nil
		},
	}
	admin.bind(cmd)
	cmd.Flags().StringVar(&platform, "platform", "", `os/arch, or "all" (default: this node's)`)
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

func printExplanation(w io.Writer, e agent.Explanation, now time.Time) {
	st := newStyle(w)
	fmt.Fprintf(w, "%s\n%s", st.bold(e.Image), e.Digest)
	if !e.Checked.IsZero() {
		fmt.Fprintf(w, ", tag checked %s", ago(e.Checked, now))
	}
	fmt.Fprintf(w, "\n%s of %s on this node\n\n", size(e.Here), size(e.Bytes))
	t := newTable("part", "blob", ">size", "where", "when", "came from")
	for _, p := range e.Parts {
		t.row(partName(p), short(p.Digest.String()), size(p.Size), where(st, p), ago(fetched(p), now), cameFrom(p))
	}
	t.print(w)
}

func partName(p agent.Part) string {
	if p.Platform == "" {
		return p.Kind
	}
	return p.Kind + " " + p.Platform
}

func where(st style, p agent.Part) string {
	switch p.Where {
	case "disk":
		return st.good("disk")
	case "runtime":
		return st.good("runtime store")
	case "arriving":
		return st.warn(fmt.Sprintf("arriving %s", size(p.Present)))
	case "peer":
		shown := p.Holders[:min(len(p.Holders), fewOrigins)]
		line := "peer " + strings.Join(shown, ", ")
		if more := len(p.Holders) - len(shown); more > 0 {
			line += fmt.Sprintf(" and %d more", more)
		}
		return line
	}
	return st.dim("upstream only")
}

func cameFrom(p agent.Part) string {
	if len(p.Origins) == 0 {
		return "-"
	}
	return origins(few(p.Origins))
}

// fewOrigins is how many peers are named as origins or holders of one blob; --json names
// all.
const fewOrigins = 3

// few sums up the peers that gave least. Origins come with most bytes first.
func few(list []agent.Origin) []agent.Origin {
	if len(list) <= fewOrigins+1 {
		return list
	}
	var out []agent.Origin
	var rest agent.Origin
	count := 0
	for _, o := range list {
		if o.Kind != "peer" || len(out) < fewOrigins {
			out = append(out, o)
			continue
		}
		rest.Bytes += o.Bytes
		count++
	}
	if count > 0 {
		rest.Kind = agent.CountText(count, "other peer")
		out = append(out, rest)
	}
	return out
}

// fetched is when the last byte came.
func fetched(p agent.Part) time.Time {
	var last time.Time
	for _, o := range p.Origins {
		if o.When.After(last) {
			last = o.When
		}
	}
	return last
}
