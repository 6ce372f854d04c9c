package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"

	"github.com/larder-cache/larder/agent"
	"github.com/opencontainers/go-digest"
	"github.com/spf13/cobra"
)

func newExport() *cobra.Command {
	var admin adminFlags
	var platform, output string
	cmd := &cobra.Command{
		Use:   "export IMAGE... -o FILE",
		Short: "Write images to a file that other clusters import",
		Long: `Write images to a file, for nodes that reach no registry: pulled through this
node's agent, as an OCI image layout in a tar, under their full names and with
their own digests. "larder import" reads it, and so do ctr, skopeo and podman.`,
		Example: `  larder export -o bundle.tar nginx:1.29 quay.io/prometheus/prometheus:v3.5.0
  larder export --platform all -o pause.tar registry.k8s.io/pause:3.10
  larder export -o - nginx:1.29 | ssh edge larder import -`,
		Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if output == "" {
				return usageError{errors.New("say where to: -o FILE, or -o - for standard output")}
			}
			images, err := parseImages(args)
			if err != nil {
				return err
			}
			api, err := admin.api()
			if err != nil {
				return err
			}
			puller, err := api.puller(cmd.Context(), platform)
			if err != nil {
				return err
			}
			outliveReader()
			err = export(cmd, puller, images, output)
			if err != nil && cmd.Context().Err() != nil {
				return errors.New("interrupted; nothing was written, and what was fetched is in the cache")
			}
			return err
		},
	}
	admin.bind(cmd)
	cmd.Flags().StringVar(&platform, "platform", "", `os/arch, or "all" (default: this node's)`)
	cmd.Flags().StringVarP(&output, "output", "o", "", `file to write, "-" for standard output`)
	return cmd
}

// parseImages refuses what is no image's name before an agent is asked.
func parseImages(args []string) ([]agent.Image, error) {
	var images []agent.Image
	for _, arg := range args {
		image, err := agent.ParseImage(arg)
		if err != nil {
			return nil, usageError{err}
		}
		images = append(images, image)
	}
	return images, nil
}

// puller pulls through the agent behind the admin API, for whatever runtimes the importing
// cluster has.
func (a adminAPI) puller(ctx context.Context, platform string) (agent.Puller, error) {
	var s agent.Status
	if err := a.get(ctx, "/api/v1/status", &s); err != nil {
		return agent.Puller{}, err
	}
	client := &http.Client{Transport: &http.Transport{Proxy: nil, DisableCompression: true}}
	return agent.Puller{Proxy: "http://" + s.Proxy, Client: client, Platform: platform, Instances: agent.EveryInstance}, nil
}

// export writes to standard output, and shows its progress beside it, or to a file.
func export(cmd *cobra.Command, p agent.Puller, images []agent.Image, output string) error {
	defer p.Client.CloseIdleConnections()
	if output != "-" {
		return writeWhole(output, func(w io.Writer) error { return exportTo(cmd.Context(), p, images, w, cmd.OutOrStdout()) })
	}
	if _, ok := terminal(cmd.OutOrStdout()); ok {
		return usageError{errors.New("an archive is nothing to look at: name a file with -o, or pipe it")}
	}
	return exportTo(cmd.Context(), p, images, cmd.OutOrStdout(), cmd.ErrOrStderr())
}

func exportTo(ctx context.Context, p agent.Puller, images []agent.Image, w, progress io.Writer) error {
	view := newWarmView(progress)
	defer view.close()
	p.Progress = func(d digest.Digest, done, total int64) {
		view.event(agent.WarmEvent{Digest: d, Bytes: done, Total: total})
	}
	var bytes int64
	p.Done = func(one agent.Pulled) {
		bytes += one.Bytes
		view.event(agent.WarmEvent{Kind: one.Kind, Digest: one.Digest, Bytes: one.Bytes, Total: one.Bytes, Source: one.Source})
	}
	if err := p.Export(ctx, images, w); err != nil {
		return err
	}
	view.say("%s, %s of content", agent.CountText(len(images), "image"), size(bytes))
	return nil
}

// writeWhole makes path by write, or leaves what was there: the file gets its name when
// all of it is on the disk.
func writeWhole(path string, write func(io.Writer) error) (err error) {
	partial := filepath.Join(filepath.Dir(path), "."+filepath.Base(path)+"."+rand.Text()[:8])
	f, err := os.OpenFile(partial, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o666) // less umask
	if err != nil {
		return fmt.Errorf("write %s: %w", path, errors.Unwrap(err))
	}
	defer func() {
		if err != nil {
			_ = os.Remove(partial) // fails after the rename, when it is not there
		}
	}()
	if err := write(f); err != nil {
		return errors.Join(err, f.Close())
	}
	err = errors.Join(f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(partial, path)
	}
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return syncDir(filepath.Dir(path))
}

// syncDir makes a rename durable, where the file system can.
func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	_ = d.Sync() // not all file systems of removable disks have it for directories
	return nil
}
