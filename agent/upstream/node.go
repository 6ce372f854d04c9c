package upstream

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
)

// CredentialRequest asks for this node's own credentials.
type CredentialRequest struct {
	// Registry is the host of the [[registry]] table.
	Registry string
	// Names are what to look credentials up by, host[:port]/repository, best
	// first: as the endpoint names the repository, and as images do. Docker Hub's
	// host is docker.io.
	Names []string
	// Refresh says that the registry accepted none of those given so far:
	// what is remembered may be out of date.
	Refresh bool
}

// errLookup wraps what Config.Credentials returned.
var errLookup = errors.New("find this node's credential")

const (
	// maxCredentials bounds what one request tries. Kubelet's number is the
	// pod's secrets and the node's plugins; more than a few are a mistake.
	maxCredentials = 8
	// refusalMemory is how long a refused credential is tried after the others, and
	// how long a 404 is believed from one that was accepted: long enough that the
	// blobs of one pull do not each find out again.
	refusalMemory = 5 * time.Minute
)

// usesNode says whether q is to carry a credential of this node.
func (c *Client) usesNode(ep *endpoint, t Target, q request) bool {
	return c.cfg.Credentials != nil && t.Authorization == "" && !t.Anonymous && !q.bare && q.at == nil && ep.reg.NodeAuth(t.Repository)
}

// sendNode asks ep with this node's credentials, as kubelet pulls: one after the
// other, the most specific first, until one is accepted. If one was refused, they are
// looked up afresh, for a password may have changed, and the last try is without any:
// a wrong credential must not keep a public repository from us. If the repository
// lately opened without one, that is tried before a credential that was refused:
// services lock accounts after a few wrong passwords, and a pull is dozens of
// requests. GitLab and Harbor answer 404 to a credential that does not see the
// project: that is the answer only if none of the others sees it.
func (c *Client) sendNode(ctx context.Context, ep *endpoint, t Target, q request) (*answer, error) {
	n := nodeTry{c: c, ep: ep, t: t, q: q, without: c.session(ep, t, authn.AuthConfig{})}
	for _, refresh := range []bool{false, true} {
		if answer, settled, err := n.all(ctx, refresh); settled {
			return answer, err
		}
		if n.missing != nil && (refresh || n.refusal == nil) {
			return nil, cmp.Or(n.unknown(), n.missing)
		}
	}
	if !slices.Contains(n.tried, n.without) {
		if answer, err := n.one(ctx, n.without); !refused(err) {
			return answer, err
		}
	}
	return nil, n.verdict()
}

// nodeTry is one request while it is tried with one credential after the other.
type nodeTry struct {
	c       *Client
	ep      *endpoint
	t       Target
	q       request
	without *session // of no credential
	tried   []*session
	lookup  error  // why credentials may be missing
	refusal *Error // of the first credential
	closed  *Error // the refusal without one
	missing error  // the first 404
	blind   []*session
}

// all tries every credential that was not tried yet, until the answer is
// settled: by anything but a refusal, or the 404 of a credential that may just
// not see the repository.
func (n *nodeTry) all(ctx context.Context, refresh bool) (answer *answer, settled bool, err error) {
	for _, s := range n.sessions(ctx, refresh) {
		if slices.Contains(n.tried, s) {
			continue
		}
		n.tried = append(n.tried, s)
		answer, err := n.one(ctx, s)
		switch {
		case IsNotFound(err) && !s.sees():
			n.missing, n.blind = cmp.Or(n.missing, err), append(n.blind, s)
		case !refused(err):
			return answer, true, err
		}
	}
	return nil, false, nil
}

func (n *nodeTry) one(ctx context.Context, s *session) (*answer, error) {
	answer, err := n.c.sendAs(ctx, n.ep, n.t, n.q, s)
	switch {
	case err == nil:
		s.noteRefusal(false)
		for _, other := range n.blind { // so that this one comes first next time
			other.noteRefusal(true)
		}
	case refused(err) && s == n.without:
		n.closed = err.(*Error)
		s.noteRefusal(true)
	case refused(err):
		if n.refusal == nil {
			n.refusal = err.(*Error)
		}
		if s.noteRefusal(true) {
			n.c.log.Warn("the registry refuses a credential of this node", "registry", n.t.Registry, "repository", n.t.Repository, "upstream", n.ep.addr.host, "err", err)
		}
	}
	return answer, err
}

// sessions are those of the credentials for t, with the lately refused ones last,
// and before these the session without a credential if it opened something lately.
func (n *nodeTry) sessions(ctx context.Context, refresh bool) []*session {
	names := n.ep.names(n.t.Repository)
	list, err := n.c.cfg.Credentials(ctx, CredentialRequest{Registry: n.ep.reg.Host, Names: names, Refresh: refresh})
	n.lookup = err
	var first, last []*session
	for _, credential := range list[:min(len(list), maxCredentials)] {
		switch s := n.c.session(n.ep, n.t, credential); {
		case credential == (authn.AuthConfig{}): // tried at the end
		case s.wasRefused():
			last = append(last, s)
		default:
			first = append(first, s)
		}
	}
	if n.without.sees() {
		first = append(first, n.without)
	}
	return append(first, last...)
}

// unknown is the error if a credential could not be looked up: nobody knows what it
// would have opened.
func (n *nodeTry) unknown() error {
	if n.lookup == nil {
		return nil
	}
	return n.c.describe(fmt.Errorf("%w: %w", errLookup, n.lookup), n.ep, n.t, n.q)
}

// verdict is the error once everything was refused: that of the first
// credential, with the challenge that a client without one gets.
func (n *nodeTry) verdict() error {
	if err := n.unknown(); err != nil {
		return err
	}
	if n.refusal == nil {
		return n.closed
	}
	out := *n.refusal
	if n.closed.Status == http.StatusUnauthorized {
		out.Status, out.Challenge = n.closed.Status, n.closed.Challenge
	}
	return &out
}

// names are the names under which a credential for repository may be filed. The
// registry's own name is one of them only if this endpoint may see the
// registry's credentials.
func (ep *endpoint) names(repository string) []string {
	names := []string{CanonicalHost(ep.addr.host) + "/" + ep.addr.prefix + repository}
	if own := ep.reg.Host + "/" + repository; own != names[0] && ep.trustedWith() {
		names = append(names, own)
	}
	return names
}

// refused says whether err is the refusal, by an endpoint or its token
// service, of the credential that was sent, or of none.
func refused(err error) bool {
	e, ok := errors.AsType[*Error](err)
	return ok && e.refused
}

// noteRefusal keeps whether the credential was refused, and says whether that
// is news.
func (s *session) noteRefusal(refused bool) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	was := time.Since(s.refusedAt) < refusalMemory
	if refused {
		s.refusedAt, s.openedAt = time.Now(), time.Time{}
	} else {
		s.refusedAt, s.openedAt = time.Time{}, time.Now()
	}
	return refused && !was
}

// sees says whether the credential opened something in the repository lately: then
// what it does not find is not there.
func (s *session) sees() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return time.Since(s.openedAt) < refusalMemory
}

func (s *session) wasRefused() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return time.Since(s.refusedAt) < refusalMemory
}
