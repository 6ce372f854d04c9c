package registrytest

import (
	"context"
	"fmt"
	"net/http"
	"slices"
	"sync"
	"time"
)

// Role says which of the server's ports a request came to.
type Role string

// The ports of a Server.
const (
	Registry    Role = "registry"
	CDN         Role = "cdn"
	TokenServer Role = "token"
)

// Kind says what a request asks for.
type Kind string

// The kinds of request.
const (
	Ping      Kind = "ping"
	Manifest  Kind = "manifest"
	Blob      Kind = "blob"
	Tags      Kind = "tags"
	Referrers Kind = "referrers"
	Token     Kind = "token"
	Other     Kind = "other"
)

// Match says which requests are meant. A zero field means any.
type Match struct {
	Role       Role
	Kind       Kind
	Method     string
	Repository string
	Reference  string // tag or digest, as in the URL
	Status     int    // as answered; for counting, faults ignore it
}

func (m Match) matches(r *Request) bool {
	return (m.Role == "" || m.Role == r.Role) &&
		(m.Kind == "" || m.Kind == r.Kind) &&
		(m.Method == "" || m.Method == r.Method) &&
		(m.Repository == "" || m.Repository == r.Repository) &&
		(m.Reference == "" || m.Reference == r.Reference)
}

// Request is one request as the server saw it.
type Request struct {
	Role       Role
	Kind       Kind
	Method     string
	Host       string // as in the Host header
	Path       string // with query
	Repository string
	Reference  string
	Header     http.Header // Authorization and Range among it
	RemoteAddr string
	Start      time.Time

	// Status is 0 until headers are sent, Bytes counts the body so far.
	Status int
	Bytes  int64
	// Done is set once the answer has ended, in whatever way.
	Done bool
}

// keptRequests bounds the list of single requests; the totals go on.
const keptRequests = 1 << 16

type count struct {
	requests int
	bytes    int64
}

// ledger counts requests and bytes.
type ledger struct {
	mu      sync.Mutex // guards everything below
	list    []*Request
	totals  map[Match]*count
	changed chan struct{} // closed and replaced at each change
}

func newLedger() *ledger {
	return &ledger{totals: map[Match]*count{}, changed: make(chan struct{})}
}

func (l *ledger) begin(r *Request) {
	l.update(func() {
		if len(l.list) == keptRequests {
			l.list = slices.Delete(l.list, 0, keptRequests/2)
		}
		l.list = append(l.list, r)
		l.total(r).requests++
	})
}

// status moves a request from "no status yet" to its status.
func (l *ledger) status(r *Request, code int) {
	l.update(func() {
		l.total(r).requests--
		r.Status = code
		l.total(r).requests++
	})
}

func (l *ledger) bytes(r *Request, n int) {
	l.update(func() {
		r.Bytes += int64(n)
		l.total(r).bytes += int64(n)
	})
}

func (l *ledger) end(r *Request) {
	l.update(func() { r.Done = true })
}

func (l *ledger) update(f func()) {
	l.mu.Lock()
	defer l.mu.Unlock()
	f()
	close(l.changed)
	l.changed = make(chan struct{})
}

// total is the sum that r adds to. The caller holds mu.
func (l *ledger) total(r *Request) *count {
	key := Match{r.Role, r.Kind, r.Method, r.Repository, r.Reference, r.Status}
	c := l.totals[key]
	if c == nil {
		c = new(count)
		l.totals[key] = c
	}
	return c
}

// Requests returns the requests that match, oldest first: all of the last
// 32,768 at least.
func (s *Server) Requests(m Match) []Request {
	s.ledger.mu.Lock()
	defer s.ledger.mu.Unlock()
	var out []Request
	for _, r := range s.ledger.list {
		if m.matches(r) && (m.Status == 0 || m.Status == r.Status) {
			out = append(out, *r)
		}
	}
	return out
}

// Count is the number of matching requests since the start or ResetCounts, those
// in progress included. Requests that were answered 401 count too.
func (s *Server) Count(m Match) int {
	n, _ := s.ledger.sum(m)
	return n
}

// Bytes is the number of body bytes written for matching requests.
func (s *Server) Bytes(m Match) int64 {
	_, n := s.ledger.sum(m)
	return n
}

func (l *ledger) sum(m Match) (requests int, bytes int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for key, c := range l.totals {
		r := Request{Role: key.Role, Kind: key.Kind, Method: key.Method, Repository: key.Repository, Reference: key.Reference}
		if m.matches(&r) && (m.Status == 0 || m.Status == key.Status) {
			requests += c.requests
			bytes += c.bytes
		}
	}
	return requests, bytes
}

// Wait returns once at least n requests have matched since the start or
// ResetCounts.
func (s *Server) Wait(ctx context.Context, m Match, n int) error {
	for {
		s.ledger.mu.Lock()
		changed := s.ledger.changed
		s.ledger.mu.Unlock()
		if s.Count(m) >= n {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return fmt.Errorf("wait for %d requests %+v, saw %d: %w", n, m, s.Count(m), ctx.Err())
		}
	}
}

// Seen lists the Authorization headers that came with matching requests, ""
// for none.
func (s *Server) Seen(m Match) []string {
	var out []string
	for _, r := range s.Requests(m) {
		out = append(out, r.Header.Get("Authorization"))
	}
	return out
}

// ResetCounts forgets all requests; those in progress go on counting from 0.
func (s *Server) ResetCounts() {
	s.ledger.update(func() {
		s.ledger.list = nil
		s.ledger.totals = map[Match]*count{}
	})
}
