package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"sync/atomic"

	"github.com/larder-cache/larder/agent"
	"github.com/spf13/cobra"
)

func newImport() *cobra.Command {
	var admin adminFlags
	var name string
	cmd := &cobra.Command{
		Use:   "import FILE...",
		Short: "Put images from files into the cache, for the whole cluster",
		Long: `Put images from files into this node's cache. Every node of the cluster can then
pull them under their own names, by tag and by digest, from this node and from
each other, also where no registry can be reached. Whoever may ask a node may pull
them as long as their registry cannot be asked; where it can, its word stands.

Files are OCI image layouts in a tar, as "larder export", "ctr image export",
"skopeo copy ... oci-archive:", "podman save --format oci-archive", "docker save"
and "docker buildx build -o type=oci" write them, or what older versions of
"docker save" wrote; also compressed with gzip or zstd. Images of the latter have
no manifest, so their digest is a new one.`,
		Example: `  larder import bundle.tar
  larder import --name registry.example.com/team/app:1.2 app.tar
  zcat bundle.tar.gz | larder import -`,
		Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			api, err := admin.api()
			if err != nil {
				return err
			}
			if _, err := agent.ParseImage(name); name != "" && err != nil {
				return usageError{err}
			}
			if name != "" && len(args) > 1 {
				return usageError{errors.New("--name is for one file with one image")}
			}
			for _, file := range args {
				if err := importFile(cmd, api, file, name); err != nil {
					return fmt.Errorf("%s: %w", file, err)
				}
			}
			return nil
		},
	}
	admin.bind(cmd)
	cmd.Flags().StringVar(&name, "name", "", "the image's full name, for an archive of one image that carries none, or another")
	return cmd
}

// importFile sends one file, - being standard input, and shows what the agent makes of it.
// The length of a pipe is not known, so that the agent cannot refuse it beforehand.
func importFile(cmd *cobra.Command, api adminAPI, file, name string) error {
	in, length := cmd.InOrStdin(), int64(-1)
	if file != "-" {
		f, err := os.Open(file)
		if err != nil {
			return errors.Unwrap(err)
		}
		defer f.Close()
		info, err := f.Stat()
		if err != nil {
			return err
		}
		if info.IsDir() {
			return fmt.Errorf("is a directory; if it is an image layout: tar -C %s -c . | larder import -", file)
		}
		if in = f; info.Mode().IsRegular() {
			length = info.Size()
		}
	}
	archive := &archiveReader{r: in}
	err := api.importArchive(cmd, archive, length, name)
	switch broken := archive.err.Load(); {
	case err == nil:
		return nil
	case cmd.Context().Err() != nil:
		return errors.New("interrupted; nothing of this file was imported")
	case broken != nil:
		return *broken // which the agent's answer is a consequence of
	}
	return err
}

func (a adminAPI) importArchive(cmd *cobra.Command, archive io.Reader, length int64, name string) error {
	ctx, cancel := context.WithCancel(cmd.Context())
	defer cancel() // ends the sending, which the agent may not have taken to its end
	if length < 0 {
		archive = interruptible(ctx, archive)
	}
	events, err := a.send(ctx, "/api/v1/import?name="+url.QueryEscape(name), archive, length)
	if err != nil {
		return err
	}
	defer events.Close()
	return showImport(cmd.OutOrStdout(), events)
}

// interruptible is r as long as ctx lasts. An HTTP client waits for a read of the body that
// is under way, and one of standard input, a pipe or a terminal, may never end. So may the
// goroutine here: the process does.
func interruptible(ctx context.Context, r io.Reader) io.Reader {
	out, in := io.Pipe()
	go func() {
		_, err := io.Copy(in, r)
		in.CloseWithError(err)
	}()
	context.AfterFunc(ctx, func() { out.CloseWithError(ctx.Err()) })
	return out
}

// archiveReader keeps why an archive could not be read to its end: to an HTTP client that
// is one more way in which a request fails.
type archiveReader struct {
	r   io.Reader
	err atomic.Pointer[error] // set by the one who sends
}

func (a *archiveReader) Read(b []byte) (int, error) {
	n, err := a.r.Read(b)
	if err != nil && !errors.Is(err, io.EOF) {
		a.err.Store(&err)
	}
	return n, err
}

// send has the agent read an archive of so many bytes, -1 if unknown, and returns its
// answer, which begins while it reads.
func (a adminAPI) send(ctx context.Context, path string, body io.Reader, length int64) (io.ReadCloser, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, a.base+path, io.NopCloser(body))
	if err != nil {
		return nil, fmt.Errorf("%s%s: %w", a.base, path, err)
	}
	req.ContentLength = length
	req.Header.Set("Content-Type", "application/x-tar")
	// An agent that has no room says so before anything is sent.
	req.Header.Set("Expect", "100-continue")
	resp, err := a.answer(req)
	if err != nil {
		return nil, err
	}
	return resp.Body, nil
}

// showImport reads events until the agent is done.
func showImport(w io.Writer, events io.Reader) error {
	view := newWarmView(w)
	defer view.close()
	for dec := json.NewDecoder(events); ; {
		var e agent.ImportEvent
		if err := dec.Decode(&e); err != nil {
			return fmt.Errorf("the agent went away; nothing may have been imported: %w", err)
		}
		plain(&e)
		switch {
		case e.Done && e.Error != "":
			return errors.New(e.Error)
		case e.Done:
			return nil
		case e.Image != nil:
			view.say("%s", importLine(*e.Image))
		default:
			view.event(importedBlob(e))
		}
	}
}

// importedBlob is the event of a blob as views show those that are fetched.
func importedBlob(e agent.ImportEvent) agent.WarmEvent {
	out := agent.WarmEvent{Kind: "blob", Digest: e.Digest, Bytes: e.Bytes, Total: e.Total}
	if e.Whole {
		out.Source = "the archive"
	}
	if e.There {
		out.Source += ", was here already"
	}
	return out
}

func importLine(i agent.ImportedImage) string {
	name := i.Name
	if name == "" {
		name = short(i.Digest.String())
	}
	if i.Error != "" {
		return fmt.Sprintf("%s: not imported: %s", name, i.Error)
	}
	line := fmt.Sprintf("%s: imported: %s, %s, %s", name, i.Digest, agent.CountText(i.Blobs, "blob"), size(i.Bytes))
	if i.There > 0 {
		line += fmt.Sprintf(", of which %d (%s) were here already", i.There, size(i.BytesThere))
	}
	if n := len(i.Missing); n > 0 {
		line += fmt.Sprintf("; without %s that the archive has not", agent.CountText(n, "platform"))
	}
	return line
}
