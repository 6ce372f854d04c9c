package proxy

import (
	"net/http"

	"github.com/larder-cache/larder/agent/upstream"
)

// authorizer decides whether a caller may read a repository. Every route with
// a repository asks it before anything else looks at the cache (I6). For now
// all callers are anonymous, and what an anonymous caller gets from upstream
// is what anyone gets from here; the operator's allow and deny globs narrow it.
type authorizer struct {
	policy  func(host string) upstream.Registry
	metrics *metrics
}

var errDenied = &apiError{http.StatusNotFound, codeNameUnknown, "this repository is not served here; take it from the registry"}

// authorize returns what upstream may be asked on the caller's behalf.
func (a *authorizer) authorize(_ *http.Request, rt *route) (upstream.Target, error) {
	if !a.policy(rt.registry).Allows(rt.repository) {
		a.metrics.decisions.WithLabelValues("denied").Inc()
		return upstream.Target{}, errDenied
	}
	a.metrics.decisions.WithLabelValues("anonymous").Inc()
	return upstream.Target{Registry: rt.registry, Repository: rt.repository}, nil
}
