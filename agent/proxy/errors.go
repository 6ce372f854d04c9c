package proxy

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"strconv"

	"github.com/larder-cache/larder/agent/cache"
	"github.com/larder-cache/larder/agent/upstream"
)

// Error codes of the distribution spec; codeUnavailable is the one that
// registries use beyond it.
const (
	codeBlobUnknown     = "BLOB_UNKNOWN"
	codeManifestUnknown = "MANIFEST_UNKNOWN"
	codeManifestInvalid = "MANIFEST_INVALID"
	codeNameUnknown     = "NAME_UNKNOWN"
	codeNameInvalid     = "NAME_INVALID"
	codeDigestInvalid   = "DIGEST_INVALID"
	codeUnsupported     = "UNSUPPORTED"
	codeUnavailable     = "UNAVAILABLE"
)

// apiError is an answer of the pull API that is not a success.
type apiError struct {
	status  int
	code    string
	message string // for the user who reads the runtime's log; no URL, no credential
}

func (e *apiError) Error() string { return e.code + ": " + e.message }

var (
	errBudget = &apiError{http.StatusServiceUnavailable, codeUnavailable,
		"no byte arrived within the first-byte budget; the download goes on in the background"}
	errStalled = &apiError{http.StatusServiceUnavailable, codeUnavailable, "no byte arrived within the stall deadline"}
	errRecent  = &apiError{http.StatusServiceUnavailable, codeUnavailable,
		"this blob could not be delivered a moment ago; take it from the registry"}
	errUndeliverable = &apiError{http.StatusNotFound, codeManifestUnknown,
		"not every blob of this manifest can be delivered; take it from the registry"}
	errUnacceptable = &apiError{http.StatusNotFound, codeManifestUnknown, "the manifest has none of the accepted media types"}
	errMethod       = &apiError{http.StatusMethodNotAllowed, codeUnsupported, "larder serves pulls only"}
	errShutdown     = &apiError{http.StatusServiceUnavailable, codeUnavailable, "the agent is stopping"}
)

// statusClientGone is what logs and metrics record for a client that hung up
// before an answer; it is never sent.
const statusClientGone = 499

// toAPIError is the one place where an error becomes an answer. What it must
// never produce, because a runtime would not go on to the registry or would
// hammer us (RUNTIMES section A6): 401, 403 and 429, or anything in 3xx.
func toAPIError(err error, kind Kind) *apiError {
	var api *apiError
	switch {
	case errors.As(err, &api):
		return api
	case upstream.IsNotFound(err):
		return &apiError{http.StatusNotFound, unknownCode(kind), "not known to the registry"}
	case upstream.IsUnauthorized(err):
		return &apiError{http.StatusNotFound, unknownCode(kind), "the registry asks for credentials; take it from there"}
	case errors.Is(err, cache.ErrDigestMismatch), errors.Is(err, cache.ErrSizeMismatch):
		return &apiError{http.StatusBadGateway, codeUnavailable, "the registry sent something else than was asked for"}
	case errors.Is(err, context.Canceled):
		return &apiError{statusClientGone, codeUnavailable, "the client went away"}
	case upstream.IsUnavailable(err), errors.Is(err, cache.ErrClosed), errors.Is(err, context.DeadlineExceeded):
		return &apiError{http.StatusServiceUnavailable, codeUnavailable, "the registry cannot be reached now"}
	}
	return &apiError{http.StatusBadGateway, codeUnavailable, "the registry's answer cannot be used"}
}

func unknownCode(kind Kind) string {
	switch kind {
	case KindManifest, KindReferrers:
		return codeManifestUnknown
	case KindBlob:
		return codeBlobUnknown
	}
	return codeNameUnknown
}

// writeError answers with an OCI error body. It undoes the headers that a
// success had prepared.
func writeError(w http.ResponseWriter, e *apiError) {
	h := w.Header()
	for _, name := range []string{"Etag", "Accept-Ranges", "Cache-Control", "Content-Range", "Docker-Content-Digest", headerSource} {
		h.Del(name)
	}
	if e.status == http.StatusMethodNotAllowed {
		h.Set("Allow", "GET, HEAD")
	}
	type item struct {
		Code    string `json:"code"`
		Message string `json:"message"`
	}
	body, err := json.Marshal(map[string][]item{"errors": {{e.code, e.message}}})
	if err != nil { // two strings always marshal
		panic(err)
	}
	h.Set("Content-Type", "application/json")
	h.Set("Content-Length", strconv.Itoa(len(body)))
	w.WriteHeader(e.status)
	_, _ = w.Write(body) // a client that is gone needs no error
}
