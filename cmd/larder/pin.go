package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"time"

	"github.com/larder-cache/larder/agent"
	"github.com/spf13/cobra"
)

func newPin() *cobra.Command {
	var admin adminFlags
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "pin [IMAGE...]",
		Short: "Keep images on this node for good, or list those that are kept",
		Long: `Keep images on this node: fetch them, never evict them, follow their tags, and
serve them also when their registry is down or has deleted them, or, if they were
public, refuses them. What is pinned already is looked at now, and not within ten
minutes.

The pins last over restarts, but not longer than the metadata in the cache
directory; name images in cache.pins to have them on every node that shares the
configuration. Without arguments the pins of this node are listed.`,
		Example: `  larder pin registry.k8s.io/pause:3.10 quay.io/cilium/cilium:v1.18.2
  larder pin
  larder pin --json | jq '.pins[] | select(.error)'`,
		RunE: func(cmd *cobra.Command, args []string) error {
			api, err := admin.api()
			switch {
			case err != nil:
				return err
			case len(args) == 0:
				return listPins(cmd.Context(), api, cmd.OutOrStdout(), asJSON)
			case asJSON:
				return usageError{errors.New("--json is for the list: leave it out, or the images")}
			}
			if _, err := parseImages(args); err != nil {
				return err
			}
			err = pin(cmd.Context(), api, cmd.OutOrStdout(), args)
			if err != nil && cmd.Context().Err() != nil {
				return errPinInterrupted
			}
			return err
		},
	}
	admin.bind(cmd)
	cmd.Flags().BoolVar(&asJSON, "json", false, "print the list as JSON")
	return cmd
}

var errPinInterrupted = errors.New("interrupted; the images are pinned, and the agent goes on fetching them: larder pin lists them, larder unpin takes it back")

func newUnpin() *cobra.Command {
	var admin adminFlags
	cmd := &cobra.Command{
		Use:   "unpin IMAGE...",
		Short: "Let go of images that were pinned on this node",
		Long: `Let go of images that were pinned on this node. They stay in the cache until
their room is needed for others.`,
		Example: `  larder unpin registry.k8s.io/pause:3.10`,
		Args:    cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			api, err := admin.api()
			if err != nil {
				return err
			}
			if _, err := parseImages(args); err != nil {
				return err
			}
			resp, err := api.do(cmd.Context(), http.MethodDelete, "/api/v1/pins?"+url.Values{"image": args}.Encode(), nil)
			if err != nil {
				return err
			}
			defer resp.Body.Close()
			for _, image := range args {
				fmt.Fprintf(cmd.OutOrStdout(), "%s: unpinned\n", image)
			}
			return nil
		},
	}
	admin.bind(cmd)
	return cmd
}

// pin has the agent pin images, and shows how they come.
func pin(ctx context.Context, api adminAPI, out io.Writer, images []string) error {
	resp, err := api.do(ctx, http.MethodPost, "/api/v1/pins", agent.PinRequest{Images: images})
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	return showWarm(out, resp.Body, len(images))
}

func listPins(ctx context.Context, api adminAPI, out io.Writer, asJSON bool) error {
	var list agent.PinList
	if err := api.get(ctx, "/api/v1/pins", &list); err != nil {
		return err
	}
	if asJSON {
		return printJSON(out, list)
	}
	printPins(out, list, time.Now())
	return nil
}

// printPins shows each pin, and below it what is wrong with it.
func printPins(w io.Writer, list agent.PinList, now time.Time) {
	st := newStyle(w)
	if len(list.Pins) == 0 {
		fmt.Fprintln(w, "Nothing is pinned. Pin images with `larder pin IMAGE...`, or name them in cache.pins.")
		return
	}
	t := newTable("image", "state", ">size", "digest", "pinned", "checked", "by")
	for _, p := range list.Pins {
		t.row(p.Image, pinState(st, p.State), pinSize(p), short(p.Digest.String()), ago(p.Since, now), ago(p.Checked, now), p.Source)
	}
	t.print(w)
	for _, p := range list.Pins {
		if p.Error != "" {
			fmt.Fprintf(w, "\n%s: %s; next try %s\n", st.bold(p.Image), p.Error, from(p.Retry, now))
		}
	}
	fmt.Fprintf(w, "\n%s pinned%s\n", size(list.Bytes), atMost(list.Limit))
	if list.Problem != "" {
		fmt.Fprintln(w, st.bad("problem:"), list.Problem)
	}
}

// pinSize is the size of a pin, and how much of it is here if that is not all.
func pinSize(p agent.Pin) string {
	switch {
	case p.Bytes == 0:
		return "-"
	case p.Present < p.Bytes:
		return size(p.Present) + " of " + size(p.Bytes)
	}
	return size(p.Bytes)
}

func pinState(st style, state string) string {
	switch state {
	case agent.PinHeld:
		return st.good(state)
	case agent.PinMissing:
		return st.bad(state)
	}
	return st.warn(state)
}

func atMost(limit int64) string {
	if limit == 0 {
		return ""
	}
	return " of at most " + size(limit)
}

// from is when t will be, seen from now.
func from(t, now time.Time) string {
	d := t.Sub(now)
	if d < time.Second {
		return "now"
	}
	return "in " + d.Round(time.Second).String()
}

// pinsLine sums up the pins for `larder status`.
func pinsLine(st style, p agent.PinsStatus) string {
	line := fmt.Sprintf("%s, %s%s", agent.CountText(p.Images, "image"), size(p.Bytes), atMost(p.Limit))
	for _, state := range []string{agent.PinFetching, agent.PinStale, agent.PinMissing, agent.PinForeign} {
		if n := p.States[state]; n > 0 {
			line += fmt.Sprintf(", %d %s", n, pinState(st, state))
		}
	}
	return line
}

// printPinTrouble shows what keeps pins from being held.
func printPinTrouble(w io.Writer, st style, p agent.PinsStatus) {
	if p.Problem == "" && len(p.Trouble) == 0 {
		return
	}
	fmt.Fprintln(w, "\nPins (larder pin lists all)")
	if p.Problem != "" {
		fmt.Fprintf(w, "  %s %s\n", st.bad("problem:"), st.wrap(p.Problem, 11))
	}
	for _, one := range p.Trouble {
		fmt.Fprintf(w, "  %s  %s\n", pinState(st, one.State), st.wrap(one.Image+": "+one.Error, 4+len(one.State)))
	}
}
