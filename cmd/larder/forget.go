package main

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"

	"github.com/larder-cache/larder/agent"
	"github.com/spf13/cobra"
)

func newForget() *cobra.Command {
	var admin adminFlags
	var dryRun, asJSON bool
	cmd := &cobra.Command{
		Use:   "forget IMAGE...",
		Short: "Remove images from this node's cache",
		Long: `Remove images from this node's cache: all blobs that no other image in it needs,
the tag, and signatures. Delete an image at its registry first: a pull fetches
again what is still there. For an hour this node keeps no other node's copy of
what it removed; every other node that has a part must forget it within that
time, and a part can be on a node without the manifests that list it, so name
all that is under "parts" in --json.

Pinned images are refused, and so are those on their way, and all while an import
runs. What containerd has in its own store it keeps, and Larder serves it: crictl
rmi removes it. An image that is not here is no error.`,
		Example: `  larder forget --dry-run quay.io/org/app:v1
  larder forget quay.io/org/app:v1 quay.io/org/app@sha256:...
  larder forget --dry-run --json quay.io/org/app:v1 | jq -r '.images[].parts[]'`,
		Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			api, err := admin.api()
			if err != nil {
				return err
			}
			if _, err := parseImages(args); err != nil {
				return err
			}
			resp, err := api.do(cmd.Context(), http.MethodPost, "/api/v1/forget", agent.ForgetRequest{Images: args, DryRun: dryRun})
			if err != nil {
				return err
			}
			defer resp.Body.Close()
			var report agent.ForgetReport
			if err := json.NewDecoder(resp.Body).Decode(&report); err != nil {
				return fmt.Errorf("the agent went away; forget the images again: %w", err)
			}
			plain(&report)
			if asJSON {
				return printJSON(cmd.OutOrStdout(), report)
			}
			printForgotten(cmd.OutOrStdout(), report)
			return nil
		},
	}
	admin.bind(cmd)
	cmd.Flags().BoolVar(&dryRun, "dry-run", false, "say what would be removed, and remove nothing")
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

// printForgotten shows what became of each image, and below it what is still where. A list of
// parts has many of which nothing is here.
func printForgotten(w io.Writer, report agent.ForgetReport) {
	verb, none := "removed", 0
	if report.DryRun {
		verb = "would remove"
	}
	for _, f := range report.Images {
		if f.Blobs+f.Kept+f.Runtime+len(f.Holders) == 0 && len(report.Images) > 1 {
			none++
			continue
		}
		what := "nothing of it is in the cache"
		if f.Blobs+f.Kept > 0 {
			what = fmt.Sprintf("%s %s, %s", verb, agent.CountText(f.Blobs, "blob"), size(f.Bytes))
		}
		fmt.Fprintf(w, "%s: %s\n", f.Image, what)
		if f.Kept > 0 {
			fmt.Fprintf(w, "  stays: %s, %s, also of %s\n", agent.CountText(f.Kept, "blob"), size(f.KeptBytes), some(f.KeptBy))
		}
		if f.Runtime > 0 {
			fmt.Fprintf(w, "  in containerd's own store, and served from there: %s; crictl rmi removes them\n", agent.CountText(f.Runtime, "blob"))
		}
		if len(f.Holders) > 0 {
			fmt.Fprintf(w, "  other nodes have parts of it: %s\n", some(f.Holders))
		}
	}
	if none > 0 {
		fmt.Fprintf(w, "%s: nothing more is in the cache\n", agent.CountText(none, "other"))
	}
}

// some names a few; --json names all.
func some(names []string) string {
	line := strings.Join(names[:min(len(names), fewOrigins)], ", ")
	if more := len(names) - fewOrigins; more > 0 {
		line += fmt.Sprintf(" and %d more", more)
	}
	return line
}
