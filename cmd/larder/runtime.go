package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// runtimeSockets is where the CRI sockets of the known distributions are.
var runtimeSockets = []string{
	"/run/containerd/containerd.sock",
	"/run/k3s/containerd/containerd.sock",
	"/run/k0s/containerd.sock",
	"/var/snap/microk8s/common/run/containerd.sock",
	"/run/crio/crio.sock",
}

// findSockets lists the known sockets that exist below root.
func findSockets(root string) []string {
	var found []string
	for _, s := range runtimeSockets {
		path := filepath.Join(root, s)
		if info, err := os.Stat(path); err == nil && info.Mode()&fs.ModeSocket != 0 {
			found = append(found, path)
		}
	}
	return found
}

// criRuntime is the container runtime behind one CRI socket.
type criRuntime struct {
	socket        string
	name, version string
	conn          *grpc.ClientConn
}

// criTimeout is for calls that do no work.
const criTimeout = 5 * time.Second

// errNoCRI: a containerd whose CRI plugin is not there.
var errNoCRI = errors.New("offers no CRI")

// dialRuntime connects to a CRI socket and asks who is there; errNoCRI is a containerd that no
// kubelet can use. The caller closes what it returns.
func dialRuntime(ctx context.Context, socket string) (*criRuntime, error) {
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, fmt.Errorf("connect to %s: %w", socket, err)
	}
	ctx, cancel := context.WithTimeout(ctx, criTimeout)
	defer cancel()
	v, err := cri.NewRuntimeServiceClient(conn).Version(ctx, &cri.VersionRequest{})
	if status.Code(err) == codes.Unimplemented {
		return nil, errors.Join(fmt.Errorf("%s %w", socket, errNoCRI), conn.Close())
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("ask %s for its version: %w", socket, grpcText(err)), conn.Close())
	}
	return &criRuntime{socket: socket, name: v.RuntimeName, version: v.RuntimeVersion, conn: conn}, nil
}

// pull pulls an image as kubelet does, and removes it again.
func (r *criRuntime) pull(ctx context.Context, image string) error {
	images := cri.NewImageServiceClient(r.conn)
	spec := &cri.ImageSpec{Image: image}
	pulled, err := images.PullImage(ctx, &cri.PullImageRequest{Image: spec})
	if err != nil {
		return fmt.Errorf("pull %s: %w", image, grpcText(err))
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), criTimeout)
	defer cancel()
	for _, ref := range []string{image, pulled.ImageRef} { // CRI-O wants the one, containerd takes both
		if _, err := images.RemoveImage(ctx, &cri.RemoveImageRequest{Image: &cri.ImageSpec{Image: ref}}); err == nil || status.Code(err) == codes.NotFound {
			return nil
		}
	}
	return nil // a canary image of a few hundred bytes stays; image GC takes it
}

// images lists the names of what r has; none if it does not say.
func (r *criRuntime) images(ctx context.Context) []string {
	ctx, cancel := context.WithTimeout(ctx, criTimeout)
	defer cancel()
	list, err := cri.NewImageServiceClient(r.conn).ListImages(ctx, &cri.ListImagesRequest{})
	if err != nil {
		return nil // what is only looked at for more findings
	}
	var out []string
	for _, i := range list.Images {
		out = append(append(out, i.RepoTags...), i.RepoDigests...)
	}
	return out
}

func (r *criRuntime) close() error { return r.conn.Close() }

// grpcText drops gRPC's own preamble, which says nothing to a user.
func grpcText(err error) error {
	if s, ok := status.FromError(err); ok {
		return errors.New(s.Message())
	}
	return err
}
