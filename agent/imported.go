package agent

import (
	"cmp"
	"log/slog"
	"reflect"
	"slices"
	"strings"

	"github.com/larder-cache/larder/agent/upstream"
	"github.com/larder-cache/larder/hostsconfig"
)

// mergeImported adds to the configured registries those that the runtimes were
// configured for before us: their mirrors and certificates become our
// upstreams. A configured table wins over what is found, and containerd's
// files win over CRI-O's. What cannot be expressed stays where it was, behind
// the proxy, and is logged.
func mergeImported(configured []upstream.Registry, found []hostsconfig.Imported, log *slog.Logger) []upstream.Registry {
	out := slices.Clone(configured)
	for _, imp := range canonicalFirst(found) {
		host := upstream.CanonicalHost(imp.Registry)
		known := slices.ContainsFunc(out, func(r upstream.Registry) bool { return upstream.CanonicalHost(r.Host) == host })
		if known {
			continue
		}
		r, why := fromImported(imp)
		if why == "" {
			if err := r.Validate(); err != nil {
				why = err.Error()
			}
		}
		if why != "" {
			instead := "Larder asks the registry itself first"
			if replaced(imp) {
				instead = "Larder gives what is cached, and does not ask the registry"
				out = append(out, unasked(host))
			}
			log.Warn("existing registry configuration stays a fallback of the runtime alone: "+instead, "registry", imp.Registry, "file", imp.Path, "reason", why)
			continue
		}
		log.Info("using the runtime's registry configuration as upstream", "registry", r.Host, "file", imp.Path, "upstreams", r.Upstreams)
		out = append(out, r)
	}
	return out
}

// unasked is a registry that is never asked. It is not an operator's word that everybody
// may have what is cached, as contact_upstream = false in a configuration is.
func unasked(host string) upstream.Registry {
	return upstream.Registry{Host: host, ContactUpstream: new(bool), Offline: upstream.OfflineRemembered}
}

// replaced reports whether the runtime would never ask the registry itself for any of
// its images. Then we must not either, though we cannot ask what is in its place.
func replaced(imp hostsconfig.Imported) bool {
	if imp.Prefix != "" || strings.HasPrefix(imp.Registry, "*") {
		return false
	}
	elsewhere := func(e hostsconfig.Endpoint) bool {
		return e.Source && e.Base != "" && e.Base != upstream.DefaultUpstream(upstream.CanonicalHost(imp.Registry))+"/v2"
	}
	return imp.Blocked || slices.ContainsFunc(imp.Endpoints, elsewhere)
}

// canonicalFirst moves the spellings of a registry that a runtime does not look
// up ("index.docker.io", upper case) behind those that it does: one registry can
// have only one table.
func canonicalFirst(found []hostsconfig.Imported) []hostsconfig.Imported {
	var canonical, others []hostsconfig.Imported
	for _, imp := range found {
		if imp.Registry == upstream.CanonicalHost(imp.Registry) {
			canonical = append(canonical, imp)
		} else {
			others = append(others, imp)
		}
	}
	return append(canonical, others...)
}

// fromImported turns what a runtime was told into a [[registry]] table, or
// says why it cannot.
func fromImported(imp hostsconfig.Imported) (upstream.Registry, string) {
	r := upstream.Registry{Host: upstream.CanonicalHost(imp.Registry)}
	if imp.Registry == "*" {
		return r, "it is for every registry; write a [[registry]] table for each that should use it"
	}
	if imp.Prefix != "" {
		return r, "it is for repositories below " + imp.Prefix + " alone"
	}
	if imp.Blocked {
		r = unasked(r.Host)
	}
	for _, e := range imp.Endpoints {
		if !e.Pull || !e.Resolve && !imp.Blocked { // by digest alone: tags could be answered stale
			continue
		}
		if len(e.Header) > 0 {
			return r, "it needs request headers"
		}
		if e.Renames {
			return r, "it rewrites repository names; write a [[registry]] table whose upstreams have the path"
		}
		if why := addEndpoint(&r, e); why != "" {
			return r, why
		}
	}
	if len(r.Upstreams) > 0 {
		r.ContactUpstream, r.Offline = nil, "" // the mirrors may be asked; a blocked registry itself is not among them
	}
	return r, ""
}

// addEndpoint makes an endpoint an upstream of r, or says why it cannot be.
func addEndpoint(r *upstream.Registry, e hostsconfig.Endpoint) string {
	base := e.Base
	if base == "" {
		base = upstream.DefaultUpstream(r.Host)
	}
	if slices.Contains(r.Upstreams, base) {
		return "" // as it was named first
	}
	if e.Base != "" && !slices.Contains(strings.Split(base, "/"), "v2") {
		return "the path of an endpoint is not below v2 (override_path), where upstreams put it"
	}
	trust := upstream.TLS{CAFiles: e.CAFiles, SkipVerify: e.SkipVerify}
	for _, pair := range e.ClientPairs {
		if trust.ClientCertFile != "" && trust.ClientCertFile != pair.Cert {
			return "an endpoint has several client certificates"
		}
		trust.ClientCertFile, trust.ClientKeyFile = pair.Cert, cmp.Or(pair.Key, pair.Cert)
	}
	addUpstream(r, base)
	if !reflect.DeepEqual(trust, upstream.TLS{}) { // theirs alone: what a mirror needs is not for the registry
		if r.TLS == nil {
			r.TLS = map[string]upstream.TLS{}
		}
		r.TLS[base] = trust
	}
	if plain, ok := strings.CutPrefix(base, "https://"); ok && e.AllowHTTP {
		addUpstream(r, "http://"+plain)
	}
	return ""
}

// addUpstream leaves out what is listed already: a mirror that is also the
// server would be asked, and counted, twice.
func addUpstream(r *upstream.Registry, base string) {
	if !slices.Contains(r.Upstreams, base) {
		r.Upstreams = append(r.Upstreams, base)
	}
}
