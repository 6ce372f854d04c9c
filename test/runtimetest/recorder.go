package runtimetest

import (
	"context"
	"net"
	"net/http"
	"net/url"
	"slices"
	"sync"
)

// Exchange is one HTTP request as the runtime saw it.
type Exchange struct {
	Method, URL string
	Range       string
	Status      int // 0 = no answer
	Header      http.Header
	Err         error
}

// From counts the answers with status 200 or 206 of one host.
func (r Result) From(host string) int {
	n := 0
	for _, e := range r.Exchanges {
		u, err := url.Parse(e.URL)
		if err == nil && u.Host == host && (e.Status == http.StatusOK || e.Status == http.StatusPartialContent) {
			n++
		}
	}
	return n
}

// recorder notes the exchanges of HTTP clients, and closes their connections in
// the end.
type recorder struct {
	dial func(ctx context.Context, network, addr string) (net.Conn, error) // nil: the clients' own

	mu         sync.Mutex // guards everything below
	exchanges  []Exchange
	transports []*http.Transport
}

// wrap puts the recorder into a client. It may be called twice for a client.
func (r *recorder) wrap(client *http.Client) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if t, ok := client.Transport.(*http.Transport); ok {
		if r.dial != nil {
			t.DialContext = r.dial
		}
		r.transports = append(r.transports, t)
		client.Transport = &recording{t, r}
	}
	return nil
}

func (r *recorder) take() []Exchange {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.exchanges)
}

func (r *recorder) close() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, t := range r.transports {
		t.CloseIdleConnections()
	}
}

// recording is a transport that tells its recorder.
type recording struct {
	http.RoundTripper
	recorder *recorder
}

func (t *recording) RoundTrip(req *http.Request) (*http.Response, error) {
	resp, err := t.RoundTripper.RoundTrip(req)
	e := Exchange{Method: req.Method, URL: req.URL.String(), Range: req.Header.Get("Range"), Err: err}
	if resp != nil {
		e.Status, e.Header = resp.StatusCode, resp.Header.Clone()
	}
	t.recorder.mu.Lock()
	defer t.recorder.mu.Unlock()
	t.recorder.exchanges = append(t.recorder.exchanges, e)
	return resp, err
}
