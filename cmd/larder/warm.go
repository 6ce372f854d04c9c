package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"maps"
	"net/http"

	"github.com/larder-cache/larder/agent"
	"github.com/opencontainers/go-digest"
	"github.com/spf13/cobra"
	"github.com/vbauerster/mpb/v8"
	"github.com/vbauerster/mpb/v8/decor"
)

func newWarm() *cobra.Command {
	var admin adminFlags
	var platform string
	cmd := &cobra.Command{
		Use:   "warm IMAGE...",
		Short: "Fetch images into this node's cache",
		Long: `Fetch images into this node's cache, as a runtime would through the proxy, and
report each blob and where it came from.`,
		Example: `  larder warm nginx:1.29 quay.io/prometheus/prometheus:v3.5.0
  larder warm --platform all registry.k8s.io/pause:3.10`,
		Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			api, err := admin.api()
			if err != nil {
				return err
			}
			if _, err := parseImages(args); err != nil {
				return err
			}
			err = warm(cmd.Context(), api, cmd.OutOrStdout(), agent.WarmRequest{Images: args, Platform: platform})
			if err != nil && cmd.Context().Err() != nil {
				return errWarmInterrupted
			}
			return err
		},
	}
	admin.bind(cmd)
	cmd.Flags().StringVar(&platform, "platform", "", `os/arch, or "all" (default: this node's)`)
	return cmd
}

var errWarmInterrupted = errors.New("interrupted; the agent finishes what it has begun to fetch, and begins nothing more")

// warm has the agent fetch images, and shows how it gets on.
func warm(ctx context.Context, api adminAPI, out io.Writer, req agent.WarmRequest) error {
	resp, err := api.do(ctx, http.MethodPost, "/api/v1/warm", req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	return showWarm(out, resp.Body, len(req.Images))
}

// warmView shows the events of one warm request, or what else moves blobs. event is called
// by one goroutine at a time.
type warmView interface {
	event(agent.WarmEvent)
	say(format string, args ...any) // a line
	close()                         // after the last event, finished or not
}

// newWarmView draws bars on a terminal, and writes lines elsewhere.
func newWarmView(w io.Writer) warmView {
	if width, ok := terminal(w); ok {
		return &warmBars{progress: mpb.New(mpb.WithOutput(w), mpb.WithWidth(min(width, 64))), bars: map[digest.Digest]*mpb.Bar{}}
	}
	return &warmLines{w: w, images: map[string]map[string]int64{}}
}

// showWarm reads events until every image is done.
func showWarm(w io.Writer, events io.Reader, images int) error {
	view := newWarmView(w)
	defer view.close()
	done, failed := 0, 0
	for dec := json.NewDecoder(events); ; {
		var e agent.WarmEvent
		err := dec.Decode(&e)
		if errors.Is(err, io.EOF) && done == images {
			break
		}
		if err != nil {
			return fmt.Errorf("the agent went away with %d of %d images done: %w", done, images, err)
		}
		plain(&e)
		view.event(e)
		if e.Done {
			done++
		}
		if e.Error != "" {
			failed++
		}
	}
	if failed > 0 {
		return fmt.Errorf("%d of %d images could not be fetched and kept", failed, images)
	}
	return nil
}

// warmLines prints one line per blob and image: for pipes and logs.
type warmLines struct {
	w      io.Writer
	images map[string]map[string]int64 // bytes, by image and source
}

func (v *warmLines) event(e agent.WarmEvent) {
	bytes := v.images[e.Image]
	if bytes == nil {
		bytes = map[string]int64{}
		v.images[e.Image] = bytes
	}
	switch {
	case e.Error != "":
		fmt.Fprintf(v.w, "%s: failed: %s\n", e.Image, e.Error)
	case e.Done:
		fmt.Fprintf(v.w, "%s: done: %s\n", e.Image, bySource(bytes))
	case e.Source != "":
		bytes[e.Source] += e.Bytes
		image := ""
		if e.Image != "" {
			image = e.Image + ": "
		}
		fmt.Fprintf(v.w, "%s%s %s %s from %s\n", image, e.Kind, short(e.Digest.String()), size(e.Bytes), e.Source)
	}
}

func (v *warmLines) say(format string, args ...any) { fmt.Fprintf(v.w, format+"\n", args...) }

func (v *warmLines) close() {}

// warmBars draws one bar per blob: for terminals.
type warmBars struct {
	progress *mpb.Progress
	bars     map[digest.Digest]*mpb.Bar
}

func (v *warmBars) event(e agent.WarmEvent) {
	if e.Error != "" {
		fmt.Fprintf(v.progress, "%s: failed: %s\n", e.Image, e.Error)
		return
	}
	if e.Done {
		fmt.Fprintf(v.progress, "%s: done\n", e.Image)
		return
	}
	b := v.bars[e.Digest]
	if b == nil {
		b = v.progress.AddBar(max(e.Total, e.Bytes),
			mpb.PrependDecorators(decor.Name(short(e.Digest.String())+" ")),
			mpb.AppendDecorators(decor.CountersKibiByte("% .1f / % .1f")))
		v.bars[e.Digest] = b
	}
	b.SetCurrent(e.Bytes)
	if e.Source != "" {
		b.SetTotal(e.Bytes, true)
	}
}

func (v *warmBars) say(format string, args ...any) { fmt.Fprintf(v.progress, format+"\n", args...) }

func (v *warmBars) close() { closeBars(v.progress, maps.Values(v.bars)) }

// closeBars takes unfinished bars down; mpb would wait for them forever.
func closeBars(p *mpb.Progress, bars iter.Seq[*mpb.Bar]) {
	for b := range bars {
		if !b.Completed() {
			b.Abort(false)
		}
	}
	p.Wait()
}
