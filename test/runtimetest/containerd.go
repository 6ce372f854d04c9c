// Package runtimetest pulls images the way container runtimes do, in the test's
// own process: with containerd's own resolver, hosts.toml reader and content
// store, and with a strict model of what CRI-O, podman and skopeo do. Nothing is unpacked. It is not
// a replacement for the tests against real daemons, but thousands of times
// faster, and it tells what was fetched from where.
package runtimetest

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/core/remotes/docker/config"
	"github.com/containerd/containerd/v2/core/transfer"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/semaphore"
)

// Containerd pulls as containerd's CRI plugin does. Its fields may be changed
// between pulls.
type Containerd struct {
	// CertsDir is config_path: one directory with <host>/hosts.toml, or several
	// separated by colons.
	CertsDir string
	// Root is the directory of the content store; it is made if need be.
	Root string
	// Platform is pulled from indexes; default linux/amd64.
	Platform ocispec.Platform
	// ChunkSize, if not 0, fetches layers in parallel ranges of so many bytes
	// (concurrent_layer_fetch_buffer).
	ChunkSize int
	// KeepIngests leaves partial downloads of a failed pull to be resumed by the
	// next. containerd does, until its garbage collection.
	KeepIngests bool
	// Dial, if set, makes the connections: from another network namespace, say.
	Dial func(ctx context.Context, network, addr string) (net.Conn, error)
}

// Auth are the credentials of an image pull, as kubelet passes them.
type Auth struct {
	Username, Password string
	// ServerAddress limits the credentials to one host; kubelet leaves it empty,
	// and then any host that asks gets them.
	ServerAddress string
}

// credentials has the rules of containerd's CRI plugin (ParseAuth).
func (a *Auth) credentials(host string) (string, string, error) {
	if a == nil {
		return "", "", nil
	}
	if a.ServerAddress != "" {
		u, err := url.Parse(a.ServerAddress)
		if err != nil {
			return "", "", fmt.Errorf("parse server address: %w", err)
		}
		if u.Host != host {
			return "", "", nil
		}
	}
	return a.Username, a.Password, nil
}

// Result is what a pull did, also a failed one.
type Result struct {
	// Target is what the reference resolved to.
	Target ocispec.Descriptor
	// Content is the target and everything below it that belongs to the platform,
	// in no order.
	Content []ocispec.Descriptor
	// Bytes is the sum of their sizes, whether they had to be fetched or not.
	Bytes int64
	// Exchanges are the HTTP requests made, in the order of their answers.
	Exchanges []Exchange
}

// Store is the content store that pulls go to.
func (c *Containerd) Store() (content.Store, error) {
	s, err := local.NewStore(c.Root)
	if err != nil {
		return nil, fmt.Errorf("open content store: %w", err)
	}
	return s, nil
}

// Wipe empties the content store, as if the image had been removed and garbage
// collected.
func (c *Containerd) Wipe() error { return os.RemoveAll(c.Root) }

// Pull fetches an image into the store. Content that is there already is not
// fetched again.
func (c *Containerd) Pull(ctx context.Context, ref string, auth *Auth) (Result, error) {
	store, err := c.Store()
	if err != nil {
		return Result{}, err
	}
	ctx = namespaces.WithNamespace(ctx, "k8s.io")
	rec := &recorder{dial: c.Dial}
	defer rec.close()
	p := &pull{store: store}
	err = c.pull(ctx, p, ref, c.resolver(ctx, auth, rec))
	if err != nil && !c.KeepIngests {
		err = errors.Join(err, abortIngests(context.WithoutCancel(ctx), store))
	}
	p.result.Exchanges = rec.take()
	return p.result, err
}

func (c *Containerd) resolver(ctx context.Context, auth *Auth, rec *recorder) remotes.Resolver {
	const downloads = 3 // containerd's own
	resolver := docker.NewResolver(docker.ResolverOptions{
		Hosts: oneAtATime(config.ConfigureHosts(ctx, config.HostOptions{
			HostDir:      hostDir(filepath.SplitList(c.CertsDir)),
			Credentials:  auth.credentials,
			UpdateClient: rec.wrap,
		})),
	})
	if r, ok := resolver.(remotes.ResolverWithOptions); ok {
		r.SetOptions(
			transfer.WithConcurrentLayerFetchBuffer(c.ChunkSize),
			transfer.WithMaxConcurrentDownloads(downloads),
			transfer.WithDownloadLimiter(semaphore.NewWeighted(downloads)),
		)
	}
	return resolver
}

// oneAtATime keeps layers that need the same token from racing in containerd
// 2.4.2, whose authorizer looks at the expiry of a token that another request is
// still waiting for. They would wait for it anyway.
func oneAtATime(hosts docker.RegistryHosts) docker.RegistryHosts {
	return func(host string) ([]docker.RegistryHost, error) {
		out, err := hosts(host)
		for i := range out {
			out[i].Authorizer = &serialAuthorizer{Authorizer: out[i].Authorizer}
		}
		return out, err
	}
}

type serialAuthorizer struct {
	mu sync.Mutex // guards Authorizer, fetches of tokens included
	docker.Authorizer
}

func (a *serialAuthorizer) Authorize(ctx context.Context, req *http.Request) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.Authorizer.Authorize(ctx, req)
}

func (a *serialAuthorizer) AddResponses(ctx context.Context, responses []*http.Response) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.Authorizer.AddResponses(ctx, responses)
}

// hostDir takes the first root that has something for the host, as CRI does.
func hostDir(roots []string) func(string) (string, error) {
	return func(host string) (string, error) {
		for _, root := range roots {
			dir, err := config.HostDirFromRoot(root)(host)
			if err == nil || !errdefs.IsNotFound(err) {
				return dir, err
			}
		}
		return "", errdefs.ErrNotFound
	}
}

// pull is one pull under way.
type pull struct {
	store content.Store

	mu     sync.Mutex // guards result
	result Result
}

// pull is what containerd's client does: resolve, then walk down from the
// target.
func (c *Containerd) pull(ctx context.Context, p *pull, ref string, resolver remotes.Resolver) error {
	name, target, err := resolver.Resolve(ctx, ref)
	if err != nil {
		return fmt.Errorf("resolve %s: %w", ref, err)
	}
	p.result.Target = target
	fetcher, err := resolver.Fetcher(ctx, name)
	if err != nil {
		return fmt.Errorf("fetcher for %s: %w", ref, err)
	}
	match := platforms.Only(c.platform())
	children := images.LimitManifests(images.FilterPlatforms(images.ChildrenHandler(p.store), match), match, 1)
	handler := images.Handlers(p.record(), remotes.FetchHandler(p.store, fetcher), children)
	if err := images.Dispatch(ctx, handler, nil, target); err != nil {
		return fmt.Errorf("fetch %s: %w", ref, err)
	}
	return nil
}

func (c *Containerd) platform() ocispec.Platform {
	if c.Platform.OS == "" {
		return ocispec.Platform{OS: "linux", Architecture: "amd64"}
	}
	return c.Platform
}

// record notes what is walked over.
func (p *pull) record() images.HandlerFunc {
	return func(_ context.Context, d ocispec.Descriptor) ([]ocispec.Descriptor, error) {
		p.mu.Lock()
		defer p.mu.Unlock()
		if !slices.ContainsFunc(p.result.Content, func(o ocispec.Descriptor) bool { return o.Digest == d.Digest }) {
			p.result.Content = append(p.result.Content, d)
			p.result.Bytes += d.Size
		}
		return nil, nil
	}
}

func abortIngests(ctx context.Context, store content.Store) error {
	list, err := store.ListStatuses(ctx)
	if err != nil {
		return fmt.Errorf("list ingests: %w", err)
	}
	for _, status := range list {
		if err := store.Abort(ctx, status.Ref); err != nil && !errdefs.IsNotFound(err) {
			return fmt.Errorf("abort %s: %w", status.Ref, err)
		}
	}
	return nil
}
