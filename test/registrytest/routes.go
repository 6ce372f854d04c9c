package registrytest

import (
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
)

func isDigest(s string) bool { return digest.Digest(s).Validate() == nil }

func (s *Server) newRequest(role Role, r *http.Request) *Request {
	return &Request{
		Role: role, Kind: Other, Method: r.Method, Host: r.Host, Path: r.URL.RequestURI(),
		Header: r.Header.Clone(), RemoteAddr: r.RemoteAddr, Start: time.Now(),
	}
}

// route fills in what a path under /v2/ asks for.
func (e *Request) route(path string) {
	rest, ok := strings.CutPrefix(path, "/v2")
	if !ok {
		return
	}
	if rest == "" || rest == "/" {
		e.Kind = Ping
		return
	}
	rest = strings.TrimPrefix(rest, "/")
	if name, ok := strings.CutSuffix(rest, "/tags/list"); ok {
		e.Kind, e.Repository = Tags, name
		return
	}
	for _, kind := range []struct {
		part string
		kind Kind
	}{{"/manifests/", Manifest}, {"/blobs/", Blob}, {"/referrers/", Referrers}} {
		if i := strings.LastIndex(rest, kind.part); i > 0 {
			e.Kind, e.Repository, e.Reference = kind.kind, rest[:i], rest[i+len(kind.part):]
			return
		}
	}
}

func (s *Server) serveRegistry(w http.ResponseWriter, r *http.Request) {
	e := s.newRequest(Registry, r)
	e.route(r.URL.Path)
	challenge := s.gate.challenge(r, e.Repository)
	if challenge != "" {
		s.serve(e, w, r, func() *answer {
			a := newAnswer(e)
			a.setError(http.StatusUnauthorized, "UNAUTHORIZED", "authentication required")
			a.header.Set("WWW-Authenticate", challenge)
			return a
		})
		return
	}
	s.serve(e, w, r, func() *answer { return s.answer(e, r) })
}

// serve records a request, makes its answer, adds the faults and sends it.
func (s *Server) serve(e *Request, w http.ResponseWriter, r *http.Request, compose func() *answer) {
	s.ledger.begin(e)
	defer s.ledger.end(e)
	a := compose()
	a.delay += time.Duration(s.latency.Load())
	a.header.Set("Docker-Distribution-Api-Version", "registry/2.0")
	a.apply(s.faults.take(e, a.header.Get("WWW-Authenticate") != ""))
	a.send(r.Context(), w, s.ledger)
}

// answer is the honest answer to a request.
func (s *Server) answer(e *Request, r *http.Request) *answer {
	a := newAnswer(e)
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		a.setError(http.StatusMethodNotAllowed, "UNSUPPORTED", "this registry is read-only")
		a.header.Set("Allow", "GET, HEAD")
		return a
	}
	switch e.Kind {
	case Ping:
		a.header.Set("Content-Type", "application/json")
		a.content = Bytes([]byte("{}"))
	case Manifest:
		s.answerManifest(a)
	case Blob:
		s.answerBlob(a, r)
	case Tags:
		s.answerTags(a, r.URL.Query())
	case Referrers:
		s.answerReferrers(a, r.URL.Query().Get("artifactType"))
	default:
		a.setError(http.StatusNotFound, "NOT_FOUND", "no such route")
	}
	return a
}

func (s *Server) answerManifest(a *answer) {
	m, d, ok := s.store.manifest(a.request.Repository, a.request.Reference)
	if !ok && s.opts.NoReferrers {
		m, d, ok = s.fallback(a.request)
	}
	if !ok {
		a.setError(http.StatusNotFound, "MANIFEST_UNKNOWN", "manifest unknown")
		return
	}
	a.header.Set("Content-Type", m.mediaType)
	a.header.Set("Docker-Content-Digest", d.String())
	a.header.Set("Etag", `"`+d.String()+`"`)
	a.content = Bytes(m.body)
}

// fallback is the list of referrers under its tag, if there are any.
func (s *Server) fallback(e *Request) (manifest, digest.Digest, bool) {
	subject, ok := fromFallbackTag(e.Reference)
	if !ok {
		return manifest{}, "", false
	}
	m := s.store.referrers(e.Repository, subject, "")
	return m, digest.FromBytes(m.body), strings.Contains(string(m.body), `"digest"`)
}

func (s *Server) answerBlob(a *answer, r *http.Request) {
	d := digest.Digest(a.request.Reference)
	c, ok := s.store.blob(a.request.Repository, d)
	if !ok {
		a.setError(http.StatusNotFound, "BLOB_UNKNOWN", "blob unknown to registry")
		return
	}
	if s.cdn != nil && a.request.Role == Registry && r.Method == http.MethodGet {
		a.setRedirect(s.localURL(s.cdn) + r.URL.Path + "?signature=" + d.Encoded()[:8])
		return
	}
	a.header.Set("Content-Type", "application/octet-stream")
	a.header.Set("Accept-Ranges", "bytes")
	a.header.Set("Etag", `"`+d.String()+`"`)
	if a.request.Role == Registry {
		a.header.Set("Docker-Content-Digest", d.String())
	}
	a.content = c
	if r.Method == http.MethodGet {
		a.rangeHeader = r.Header.Get("Range")
	}
}

// serveCDN is an object store: it knows blobs by signed URL and no registry
// headers.
func (s *Server) serveCDN(w http.ResponseWriter, r *http.Request) {
	e := s.newRequest(CDN, r)
	e.route(r.URL.Path)
	s.serve(e, w, r, func() *answer {
		a := newAnswer(e)
		switch {
		case r.Header.Get("Authorization") != "":
			a.setError(http.StatusBadRequest, "InvalidArgument", "only one way of authorization is allowed")
		case e.Kind != Blob || r.URL.Query().Get("signature") == "":
			a.setError(http.StatusForbidden, "AccessDenied", "not a signed URL")
		default:
			s.answerBlob(a, r)
		}
		return a
	})
}

func (s *Server) answerTags(a *answer, q url.Values) {
	repo := a.request.Repository
	tags, ok := s.store.tags(repo)
	if !ok {
		a.setError(http.StatusNotFound, "NAME_UNKNOWN", "repository name not known to registry")
		return
	}
	if last := q.Get("last"); last != "" {
		i, found := slices.BinarySearch(tags, last)
		if found {
			i++
		}
		tags = tags[i:]
	}
	if n, err := strconv.Atoi(q.Get("n")); err == nil && n >= 0 && n < len(tags) {
		tags = tags[:n]
		if n > 0 {
			a.header.Set("Link", fmt.Sprintf(`</v2/%s/tags/list?n=%d&last=%s>; rel="next"`, repo, n, url.QueryEscape(tags[n-1])))
		}
	}
	a.header.Set("Content-Type", "application/json")
	a.content = Bytes(mustJSON(map[string]any{"name": repo, "tags": append([]string{}, tags...)}))
}

func (s *Server) answerReferrers(a *answer, artifactType string) {
	d := digest.Digest(a.request.Reference)
	switch {
	case s.opts.NoReferrers:
		a.setError(http.StatusNotFound, "NOT_FOUND", "no such route")
		return
	case d.Validate() != nil:
		a.setError(http.StatusBadRequest, "DIGEST_INVALID", "not a digest")
		return
	}
	m := s.store.referrers(a.request.Repository, d, artifactType)
	a.header.Set("Content-Type", m.mediaType)
	if artifactType != "" {
		a.header.Set("OCI-Filters-Applied", "artifactType")
	}
	a.content = Bytes(m.body)
}
