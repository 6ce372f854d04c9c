// Package credentials finds this node's own registry credentials where Docker
// and kubelet keep theirs: in a docker config.json, in the credential helpers
// that it names, and from kubelet's credential provider plugins.
//
// What it finds is kept in memory alone, and nothing of it is in an error or a
// log line. That includes whatever a program prints: see Keychain.Find.
package credentials

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/prometheus/client_golang/prometheus"
)

// Options is what New needs. All of it may be empty.
type Options struct {
	// ProviderConfig and ProviderBinDir are kubelet's
	// --image-credential-provider-config (a file, or a directory of them) and
	// --image-credential-provider-bin-dir. Like kubelet, New reads them once.
	ProviderConfig string
	ProviderBinDir string
	Logger         *slog.Logger          // nil = silent
	Registerer     prometheus.Registerer // nil = metrics are for nobody
}

// Request says for what a credential is wanted.
type Request struct {
	// File is a docker config.json to look in before the plugins are asked, ""
	// for none. It is read again when it has changed.
	File string
	// Names are host[:port]/repository, each looked up by itself; credentials for
	// the first come first. Docker Hub's host is docker.io.
	Names []string
	// Refresh asks programs again, because the registry refuses what they
	// answered, unless that was moments ago.
	Refresh bool
}

// Keychain holds credentials. It is safe for concurrent use.
type Keychain struct {
	log       *slog.Logger
	providers []*provider
	programs  *programs

	mu    sync.Mutex // guards files
	files map[string]*dockerFile
}

// New reads the configuration of the plugins and runs none of them. The error
// joins every problem. Who has a Keychain must Close it.
func New(o Options) (*Keychain, error) {
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	k := &Keychain{log: o.Logger, files: map[string]*dockerFile{}}
	var err error
	if k.providers, err = readProviders(o.ProviderConfig, o.ProviderBinDir, o.Logger); err != nil {
		return nil, err
	}
	k.programs, err = newPrograms(o.Logger, o.Registerer)
	return k, err
}

// Close ends the programs under way and waits for them. From then on Find runs none, and
// lists what files and kept answers have.
func (k *Keychain) Close() { k.programs.close() }

// Find lists the credentials for r in the order in which to try them: those of
// the file, then each plugin's, and of each the longest key first, as kubelet
// does. It may return some and an error: what could not be looked up.
//
// ctx bounds the wait and not the programs, whose answer serves others too. A
// program that fails is left alone for a while, and what it answered last stays
// in use. Its output, standard error included, goes nowhere: plugins have
// printed tokens in messages meant to help.
func (k *Keychain) Find(ctx context.Context, r Request) ([]authn.AuthConfig, error) {
	var found []authn.AuthConfig
	var problems []error
	for _, name := range r.Names {
		name = canonicalName(name)
		if r.File != "" {
			list, err := k.inFile(ctx, r, name)
			found, problems = append(found, list...), append(problems, err)
		}
		for _, p := range k.providers {
			list, err := k.fromProvider(ctx, p, name, r.Refresh)
			found, problems = append(found, list...), append(problems, err)
		}
	}
	return distinct(found), errors.Join(problems...)
}

func (k *Keychain) fromProvider(ctx context.Context, p *provider, name string, refresh bool) ([]authn.AuthConfig, error) {
	if !p.serves(name) {
		return nil, nil
	}
	a := k.programs.ask(ctx, p.question(name), refresh)
	return matching(a.auths, name), wrap(a.err, "credential provider %s", p.Name)
}

func (k *Keychain) inFile(ctx context.Context, r Request, name string) ([]authn.AuthConfig, error) {
	config, err := k.file(r.File).load(k.log)
	if err != nil {
		return nil, err
	}
	auths := config.auths
	helper, server := config.helper(name)
	if helper == "" {
		return matching(auths, name), nil
	}
	a := k.programs.ask(ctx, helperQuestion(helper, server), r.Refresh)
	auths = maps.Clone(auths)
	maps.DeleteFunc(auths, func(key string, _ authn.AuthConfig) bool { _, replaced := a.auths[canonicalKey(key)]; return replaced })
	maps.Copy(auths, a.auths)
	return matching(auths, name), wrap(a.err, "credential helper %s", helper)
}

func wrap(err error, format string, args ...any) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf(format+": %w", append(args, err)...)
}

func (k *Keychain) file(path string) *dockerFile {
	k.mu.Lock()
	defer k.mu.Unlock()
	f := k.files[path]
	if f == nil {
		f = &dockerFile{path: path}
		k.files[path] = f
	}
	return f
}

// distinct drops empty credentials and those that are there already.
func distinct(list []authn.AuthConfig) []authn.AuthConfig {
	var out []authn.AuthConfig
	for _, a := range list {
		if a != (authn.AuthConfig{}) && !slices.Contains(out, a) {
			out = append(out, a)
		}
	}
	return out
}
