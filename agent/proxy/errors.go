package proxy

import (
	"context"
	"encoding/json"
	"errors"
	"net"
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
	codeNameUnknown     = "NAME_UNKNOWN"
	codeNameInvalid     = "NAME_INVALID"
	codeDigestInvalid   = "DIGEST_INVALID"
	codeUnsupported     = "UNSUPPORTED"
	codeUnauthorized    = "UNAUTHORIZED"
	codeDenied          = "DENIED"
	codeUnavailable     = "UNAVAILABLE"
)

// apiError is an answer of the pull API that is not a success.
type apiError struct {
	status  int
	code    string
	message string // for the user who reads the runtime's log; no URL, no credential
	// challenge is WWW-Authenticate, for a client that may answer it.
	challenge []string
}

func (e *apiError) Error() string { return e.code + ": " + e.message }

var (
	errBudget        = &apiError{status: http.StatusServiceUnavailable, code: codeUnavailable, message: "no byte arrived within the first-byte budget; the download goes on in the background"}
	errStalled       = &apiError{status: http.StatusServiceUnavailable, code: codeUnavailable, message: "no byte arrived within the stall deadline"}
	errRecent        = &apiError{status: http.StatusServiceUnavailable, code: codeUnavailable, message: "this blob could not be delivered a moment ago; take it from the registry"}
	errUndeliverable = &apiError{status: http.StatusNotFound, code: codeManifestUnknown, message: "not every blob of this manifest can be delivered; take it from the registry"}
	errNoReferrers   = &apiError{status: http.StatusNotFound, code: codeManifestUnknown, message: "the registry has no list of referrers"}
	errNoSignature   = &apiError{status: http.StatusNotFound, code: codeManifestUnknown, message: "no node has signatures of this image, and the registry cannot be asked now"}
	errUnacceptable  = &apiError{status: http.StatusNotFound, code: codeManifestUnknown, message: "the manifest has none of the accepted media types"}
	errStale         = &apiError{status: http.StatusServiceUnavailable, code: codeUnavailable, message: "the registry cannot be asked now"}
	errMethod        = &apiError{status: http.StatusMethodNotAllowed, code: codeUnsupported, message: "larder serves pulls only"}
	errShutdown      = &apiError{status: http.StatusServiceUnavailable, code: codeUnavailable, message: "the agent is stopping"}
)

// statusClientGone is what logs and metrics record for a client that hung up
// before an answer; it is never sent.
const statusClientGone = 499

// toAPIError is the one place where an error becomes an answer. What it must
// never produce, because a runtime would not go on to the registry or would
// hammer us: 429, or anything in 3xx; and 401 or 403 only to a client to whom
// the registry's refusal is relayed, and which was refused itself.
func toAPIError(err error, kind Kind, relay bool) *apiError {
	var api *apiError
	switch {
	case errors.As(err, &api):
		return api
	case relay && upstream.IsUnauthorized(err) && !notOurs(err):
		return refusalOf(err)
	case upstream.IsNotFound(err):
		return &apiError{status: http.StatusNotFound, code: unknownCode(kind), message: "not known to the registry"}
	case upstream.IsUnauthorized(err):
		return &apiError{status: http.StatusNotFound, code: unknownCode(kind), message: "the registry asks for credentials; take it from there"}
	case errors.Is(err, cache.ErrDigestMismatch), errors.Is(err, cache.ErrSizeMismatch):
		return &apiError{status: http.StatusBadGateway, code: codeUnavailable, message: "the registry sent something else than was asked for"}
	case errors.Is(err, context.Canceled):
		return &apiError{status: statusClientGone, code: codeUnavailable, message: "the client went away"}
	case upstream.IsUnavailable(err), errors.Is(err, cache.ErrClosed), errors.Is(err, context.DeadlineExceeded):
		return &apiError{status: http.StatusServiceUnavailable, code: codeUnavailable, message: "the registry cannot be reached now"}
	case errors.Is(err, upstream.ErrRefused): // by this node's configuration: its text names the key
		if dial, ok := errors.AsType[*net.OpError](err); ok { // which adds the address that DNS gave this node
			err = dial.Err
		}
		return &apiError{status: http.StatusBadGateway, code: codeUnavailable, message: err.Error()}
	}
	return &apiError{status: http.StatusBadGateway, code: codeUnavailable, message: "the registry's answer cannot be used"}
}

// refusalOf is the registry's own no, with its challenge.
func refusalOf(err error) *apiError {
	e, ok := errors.AsType[*upstream.Error](err)
	switch {
	case !ok || e.Status == http.StatusForbidden:
		return &apiError{status: http.StatusForbidden, code: codeDenied, message: "the registry refuses this"}
	case len(e.Challenge) == 0:
		return &apiError{status: http.StatusUnauthorized, code: codeUnauthorized, message: "the registry refuses this, and does not say what it wants"}
	}
	return &apiError{status: http.StatusUnauthorized, code: codeUnauthorized, message: "the registry asks for credentials", challenge: e.Challenge}
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
	for _, name := range []string{"Etag", "Accept-Ranges", "Cache-Control", "Content-Range", headerDigest, headerSource} {
		h.Del(name)
	}
	for _, c := range e.challenge {
		h.Add("WWW-Authenticate", c)
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
