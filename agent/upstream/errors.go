package upstream

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"time"
)

// What an *Error wraps when no answer from the registry explains it.
var (
	// ErrNoContact: contact_upstream = false.
	ErrNoContact = errors.New("contact_upstream is false for this registry")
	// ErrCircuitOpen: the endpoint failed too often lately; it is left alone for a while.
	ErrCircuitOpen = errors.New("left alone after repeated failures")
	// ErrRefused: this client will not talk to that address, realm or redirect.
	ErrRefused = errors.New("refused")
	// ErrBadAnswer: what came back is not what a registry sends: wrong digest,
	// size, range or encoding, too large, a web page.
	ErrBadAnswer = errors.New("not a valid registry answer")
	// ErrStalled: no byte for as long as Config.Stall or Config.FirstByte.
	ErrStalled = errors.New("stalled")
)

// Error is what every method of Client returns. It carries no credential and
// no query string (redirects carry signed ones), so it can be logged.
type Error struct {
	Registry   string // as images name it
	Repository string
	Endpoint   string // host[:port] that was asked, "" if none was
	Op         string // resolve, manifest, stat, fetch, blob, tags, referrers, challenge, token
	Status     int    // HTTP status, 0 if there was none
	Code       string // the registry's own error code, such as MANIFEST_UNKNOWN
	Message    string // the registry's own words, shortened
	RetryAfter time.Duration
	// Challenge is WWW-Authenticate, unchanged but for values too long to keep: from
	// the answer to a client's own credential, else from an unauthenticated 401.
	Challenge []string
	Err       error

	refused bool // by the endpoint or its token service, for want of a good credential
}

func (e *Error) Error() string {
	var b strings.Builder
	b.WriteString(e.Op + " " + e.Registry)
	if e.Repository != "" {
		b.WriteString("/" + e.Repository)
	}
	if e.Endpoint != "" && e.Endpoint != e.Registry {
		b.WriteString(" at " + e.Endpoint)
	}
	if e.Status != 0 {
		fmt.Fprintf(&b, ": %d %s", e.Status, http.StatusText(e.Status))
	}
	if e.Code != "" || e.Message != "" {
		b.WriteString(" (" + strings.Trim(e.Code+": "+e.Message, ": ") + ")")
	}
	if e.Err != nil {
		b.WriteString(": " + redactError(e.Err))
	}
	if e.RetryAfter > 0 {
		fmt.Fprintf(&b, "; retry after %s", e.RetryAfter.Round(time.Second))
	}
	if hint := e.hint(); hint != "" {
		b.WriteString("; " + hint)
	}
	return b.String()
}

func (e *Error) Unwrap() error { return e.Err }

// IsNotFound: the registry says that there is no such thing.
func IsNotFound(err error) bool {
	e, ok := errors.AsType[*Error](err)
	return ok && e.Status == http.StatusNotFound
}

// IsUnauthorized: the registry wants another credential, or none will do.
func IsUnauthorized(err error) bool {
	e, ok := errors.AsType[*Error](err)
	return ok && (e.Status == http.StatusUnauthorized || e.Status == http.StatusForbidden)
}

// IsUnavailable: nobody knows whether the thing exists, so what was last known
// may be served. Network failures, timeouts, 5xx, 429, answers that are not a
// registry's, an open circuit, contact_upstream = false.
func IsUnavailable(err error) bool {
	e, ok := errors.AsType[*Error](err)
	switch {
	case !ok || errors.Is(err, ErrRefused) || errors.Is(err, context.Canceled):
		return false
	case errors.Is(err, ErrBadAnswer):
		return true
	}
	return e.Status == 0 || temporary(e.Status)
}

// temporary lists the statuses that a later try may not meet again.
func temporary(status int) bool {
	return status >= 500 || status == http.StatusTooManyRequests || status == http.StatusRequestTimeout
}

// redactError prints err without the URLs in it.
func redactError(err error) string {
	if u, ok := errors.AsType[*url.Error](err); ok {
		return cmp.Or(strings.ToLower(u.Op), "request") + ": " + redactError(u.Err)
	}
	return err.Error()
}

// redactURL keeps scheme, host and path.
func redactURL(s string) string {
	u, err := url.Parse(s)
	if err != nil {
		return "(unparsable URL)"
	}
	return (&url.URL{Scheme: u.Scheme, Host: u.Host, Path: u.Path}).String()
}

// hint says what an operator can do, if anything.
func (e *Error) hint() string {
	var unknown x509.UnknownAuthorityError
	var wrongName x509.HostnameError
	var invalid x509.CertificateInvalidError
	var plain tls.RecordHeaderError
	switch {
	case errors.As(e.Err, &unknown):
		return fmt.Sprintf("set ca_file for registry %q", e.Registry)
	case errors.As(e.Err, &wrongName):
		return fmt.Sprintf("name %s in upstreams of registry %q as its certificate does", e.Endpoint, e.Registry)
	case errors.As(e.Err, &invalid) && invalid.Reason == x509.Expired:
		return "renew the certificate, or check this node's clock"
	case errors.As(e.Err, &plain), e.Err != nil && strings.Contains(e.Err.Error(), "server gave HTTP response to HTTPS client"):
		return fmt.Sprintf("it speaks plain HTTP: write http://%s in upstreams of registry %q if that is meant", e.Endpoint, e.Registry)
	}
	return ""
}
