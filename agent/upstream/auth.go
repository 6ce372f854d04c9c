package upstream

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
)

// session is what we know of authenticating to one repository of one endpoint
// with one credential. Forwarded credentials have none: they are sent as they are.
type session struct {
	sessionKey
	scope      string // the repository as token scopes name it: with the endpoint's prefix
	credential authn.AuthConfig
	gate       chan struct{} // one place: whoever holds it talks to the token service

	mu        sync.Mutex // guards all below
	token     string
	refresh   string // given by the token service; better than the password
	issued    time.Time
	expires   time.Time // a little early, so that no request carries a dying token
	raw       []string  // WWW-Authenticate of a 401 to a request without credential
	refusedAt time.Time // when the registry last said no to the credential
	openedAt  time.Time // when it last opened something, if that was later
}

type sessionKey struct {
	ep          *endpoint
	repository  string
	fingerprint string // of the credential
}

const maxSessions = 1024

// session finds or makes the session of t at ep with a credential. One that
// has changed is another session.
func (c *Client) session(ep *endpoint, t Target, credential authn.AuthConfig) *session {
	key := sessionKey{ep, t.Repository, fingerprint(credential)}
	s, _, _ := c.sessions.get(key, func() *session {
		return &session{sessionKey: key, scope: ep.addr.prefix + t.Repository, credential: credential, gate: make(chan struct{}, 1)}
	})
	return s
}

// fingerprint tells credentials apart without keeping them in a key.
func fingerprint(a authn.AuthConfig) string {
	if a == (authn.AuthConfig{}) {
		return ""
	}
	h := sha256.New()
	for _, part := range []string{a.Username, a.Password, a.Auth, a.IdentityToken, a.RegistryToken} {
		fmt.Fprintf(h, "%d:%s", len(part), part)
	}
	return string(h.Sum(nil))
}

// header is the Authorization for the next request, "" for none. Once the
// endpoint has shown how it challenges, the token is fetched beforehand
// instead of provoking a 401 for each repository.
func (s *session) header(ctx context.Context) (string, error) {
	if s.credential.RegistryToken != "" {
		return "Bearer " + s.credential.RegistryToken, nil
	}
	if token, ok := s.current(); ok {
		return "Bearer " + token, nil
	}
	switch ch := s.ep.learned(); ch.scheme {
	case "bearer":
		header, err := s.exchange(ctx, ch, "")
		if errors.Is(err, ErrRefused) { // another repository named the realm; this one may be open
			return "", nil
		}
		return header, err
	case "basic":
		return s.basic(), nil
	}
	return "", nil
}

func (s *session) current() (token string, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.token, s.token != "" && time.Now().Before(s.expires)
}

func (s *session) basic() string {
	if s.credential.Username != "" || s.credential.Password != "" {
		return "Basic " + base64.StdEncoding.EncodeToString([]byte(s.credential.Username+":"+s.credential.Password))
	}
	if s.credential.Auth != "" {
		return "Basic " + s.credential.Auth
	}
	return ""
}

// tokenDoubt is how old a token must be for a 403 or 400 to be blamed on it. A
// repository that is really forbidden costs one token in that time.
const tokenDoubt = 30 * time.Second

// answerable says whether an Authorization other than sent may change a
// status. For a 401 it may. But ECR Public answers 400 to an expired token
// (aws/containers-roadmap#2835) and ghcr 403 to one that it does not know
// (renovatebot/renovate#11446), both without a challenge. Another request may
// have renewed it meanwhile.
func (s *session) answerable(status int, sent string) bool {
	switch status {
	case http.StatusUnauthorized:
		return true
	case http.StatusForbidden, http.StatusBadRequest:
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.token == "" || !strings.HasPrefix(sent, "Bearer ") {
			return false
		}
		return sent != "Bearer "+s.token || time.Since(s.issued) >= tokenDoubt
	}
	return false
}

// answer turns a refusal of a request that carried sent, with these challenges,
// into the Authorization for one more try; "" means that there is none.
func (s *session) answer(ctx context.Context, headers []string, sent string) (string, error) {
	challenges := parseChallenges(headers)
	if sent == "" {
		s.mu.Lock()
		s.raw = short(headers)
		s.mu.Unlock()
	}
	if len(challenges) == 0 && strings.HasPrefix(sent, "Bearer ") {
		challenges = []challenge{s.ep.learned()} // as it challenged before
	}
	for _, ch := range challenges {
		if ch.scheme == "basic" {
			if basic := s.basic(); basic != "" && basic != sent {
				s.ep.learn(ch)
				return basic, nil
			}
		}
		if ch.scheme == "bearer" && s.credential.RegistryToken == "" {
			s.ep.learn(ch)
			return s.exchange(ctx, ch, sent)
		}
	}
	return "", nil
}

// learn keeps how the endpoint challenges, for its other repositories. A scope
// that names no repository ("aws", at ECR Public) is for all of them.
func (ep *endpoint) learn(ch challenge) {
	kept := challenge{scheme: ch.scheme, params: maps.Clone(ch.params)}
	maps.DeleteFunc(kept.params, func(key, value string) bool {
		return !slices.Contains([]string{"realm", "service", "scope"}, key) || strings.HasPrefix(value, "repository:")
	})
	ep.mu.Lock()
	ep.challenge = kept
	ep.mu.Unlock()
}

func (ep *endpoint) learned() challenge {
	ep.mu.Lock()
	defer ep.mu.Unlock()
	return ep.challenge
}

// pristine is the challenge as an unauthenticated client would have got it:
// the one we got, or that of our refused credential without its reason.
func (s *session) pristine(headers []string) []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.raw) > 0 {
		return s.raw
	}
	out := short(headers)
	for i, h := range out {
		out[i] = withoutReason(h)
	}
	return out
}

// challenge writes ch as the endpoint would for this repository.
func (s *session) challenge(ch challenge) string {
	h := fmt.Sprintf("Bearer realm=%q", ch.params["realm"])
	if service, ok := ch.params["service"]; ok {
		h += fmt.Sprintf(",service=%q", service)
	}
	return h + fmt.Sprintf(",scope=%q", cmp.Or(ch.params["scope"], s.pullScope()))
}

func (s *session) pullScope() string { return "repository:" + s.scope + ":pull" }

// CheckChallenge returns nil if a challenge that others say is the registry's
// leads a client's credential nowhere but where this node's own might go: the
// realms that the upstream with the last word may name. A challenge that a client
// may read in another way than this code is refused, for that may be the intent of
// whoever brings it.
func (c *Client) CheckChallenge(registry string, challenge []string) error {
	reg, err := c.lookup(registry)
	if err != nil {
		return fmt.Errorf("check challenge of %s: %w", registry, err)
	}
	if !legible(challenge) {
		return fmt.Errorf("check challenge of %s: %w: it cannot be read in full", registry, ErrRefused)
	}
	for _, ch := range parseChallenges(challenge) {
		if ch.scheme != "bearer" {
			continue
		}
		realm, err := url.Parse(ch.params["realm"])
		if err == nil {
			err = reg.final().checkRealm(realm)
		}
		if err != nil {
			return fmt.Errorf("check challenge of %s: %s", registry, redactError(err))
		}
	}
	return nil
}

// exchange gets a token. stale is the Authorization that was just refused: a
// latecomer finds a newer token and uses that. A caller that gives up while it
// holds the gate leaves the exchange to the next in line.
func (s *session) exchange(ctx context.Context, ch challenge, stale string) (string, error) {
	select {
	case s.gate <- struct{}{}:
		defer func() { <-s.gate }()
	case <-ctx.Done():
		return "", ctx.Err()
	}
	if token, ok := s.current(); ok && "Bearer "+token != stale {
		return "Bearer " + token, nil
	}
	realm, err := url.Parse(ch.params["realm"])
	if err != nil {
		return "", fmt.Errorf("%w: token realm is no URL", ErrBadAnswer)
	}
	if err := s.ep.checkRealm(realm); err != nil {
		return "", err
	}
	account := pauseKey{token: true, credential: s.fingerprint}
	if wait := s.ep.pausedFor(account, time.Now()); wait > 0 {
		return "", &Error{Op: opToken, Endpoint: realm.Host, Status: http.StatusTooManyRequests, RetryAfter: wait, Err: errPaused}
	}
	if wait, ok := s.ep.tokens.allow(time.Now()); !ok {
		return "", &Error{Op: opToken, Endpoint: realm.Host, RetryAfter: wait, Err: ErrCircuitOpen}
	}
	began := time.Now()
	token, err := s.newToken(ctx, realm, ch)
	s.ep.tokens.done(tokenOutcome(ctx, err, time.Since(began)), time.Now())
	if e, ok := errors.AsType[*Error](err); ok && e.Status == http.StatusTooManyRequests {
		s.ep.noteError(err, time.Now())
		s.ep.pause(account, e.RetryAfter, time.Now())
	}
	if err != nil {
		return "", err
	}
	return "Bearer " + s.keep(token), nil
}

// newToken asks the token service, with the refresh token that it gave us, if any.
func (s *session) newToken(ctx context.Context, realm *url.URL, ch challenge) (*transport.Token, error) {
	ctx, cancel := context.WithTimeout(ctx, smallTimeout)
	defer cancel()
	var again time.Duration
	token, err := s.fetchToken(ctx, realm, ch, &again)
	if err != nil && s.dropRefresh() { // it may have expired; the credential has not
		token, err = s.fetchToken(ctx, realm, ch, &again)
	}
	if err != nil {
		err = s.tokenError(realm, ch, err)
		if e, ok := errors.AsType[*Error](err); ok {
			e.RetryAfter = again
		}
		return nil, err
	}
	return token, nil
}

// tokenOutcome is what an exchange says of the token service, which is a
// separate server from the registry and fails by itself.
func tokenOutcome(ctx context.Context, err error, took time.Duration) outcome {
	e, ok := errors.AsType[*Error](err)
	switch {
	case err == nil, ok && e.Status != 0 && e.Status < 500:
		return good
	case errors.Is(ctx.Err(), context.Canceled), ctx.Err() != nil && took < fairTime, errors.Is(err, ErrRefused):
		return neutral
	}
	return failed
}

// fetchToken speaks to the token service through go-containerregistry's
// transport, which knows the dialects (Basic, refresh tokens, OAuth's POST). It
// is given the realm's host as the registry: that is the one address its own
// check lets pass, and checkRealm and the dialer have already decided. again
// becomes the answer's Retry-After.
func (s *session) fetchToken(ctx context.Context, realm *url.URL, ch challenge, again *time.Duration) (*transport.Token, error) {
	opts := []name.Option{}
	if realm.Scheme == "http" {
		opts = append(opts, name.Insecure)
	}
	reg, err := name.NewRegistry(realm.Host, opts...)
	if err != nil {
		return nil, fmt.Errorf("%w: token realm: %w", ErrBadAnswer, err)
	}
	auth := authn.Anonymous
	if s.credential != (authn.AuthConfig{}) {
		cred := s.credential
		s.mu.Lock()
		cred.IdentityToken = cmp.Or(s.refresh, cred.IdentityToken)
		s.mu.Unlock()
		auth = authn.FromConfig(cred)
	}
	scopes := []string{s.pullScope()}
	if own := ch.params["scope"]; own != "" && own != scopes[0] {
		scopes = append([]string{own}, scopes...)
	}
	return transport.Exchange(ctx, reg, auth, tokenTripper{s.ep, again}, scopes, &transport.Challenge{
		Scheme: "bearer", Parameters: ch.params, Insecure: realm.Scheme == "http",
	})
}

// tokenTripper carries the requests of a token exchange: same checks, timeouts
// and counters as all others.
type tokenTripper struct {
	ep    *endpoint
	again *time.Duration
}

func (t tokenTripper) RoundTrip(req *http.Request) (*http.Response, error) {
	if err := t.ep.checkRealm(req.URL); err != nil { // a realm may redirect
		return nil, err
	}
	req = req.Clone(req.Context())
	req.Header.Set("User-Agent", t.ep.c.cfg.UserAgent)
	resp, err := t.ep.exchange(req.Context(), req, kindToken, t.ep.c.cfg.FirstByte)
	if err != nil {
		return nil, err
	}
	*t.again = parseRetryAfter(resp.Header.Get("Retry-After"), time.Now())
	// Read here, under a bound in time and size, so that nobody waits on a
	// token service that drips.
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxToken))
	if err != nil {
		return nil, fmt.Errorf("read token: %w", err)
	}
	resp.Body = io.NopCloser(bytes.NewReader(body))
	return resp, nil
}

// opToken is the Op of what a token service did wrong.
const opToken = "token"

// maxToken is go-containerregistry's own bound.
const maxToken = 64 << 10

const (
	tokenLife = 60 * time.Second // the token specification's default
	// A token is not used during the tokenMargin before its end.
	tokenMargin = 20 * time.Second
	// maxKeptToken bounds what a session keeps; registries' tokens have 1 to 5 KB.
	maxKeptToken = 16 << 10
)

func (s *session) keep(t *transport.Token) string {
	life := time.Duration(min(max(t.ExpiresIn, 0), 24*3600)) * time.Second
	if life == 0 {
		life = tokenLife
	}
	token := cmp.Or(t.AccessToken, t.Token)
	if len(token)+len(t.RefreshToken) > maxKeptToken {
		return token
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.token = token
	s.refresh = cmp.Or(t.RefreshToken, s.refresh)
	s.issued = time.Now()
	s.expires = s.issued.Add(life - min(life/4, tokenMargin))
	return s.token
}

func (s *session) dropRefresh() (had bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	had, s.refresh = s.refresh != "", ""
	return had
}

// tokenError says what a failed exchange means for the request behind it: a
// token service that refuses is a registry that refuses. Its words are
// dropped: they may repeat what was sent, or hold half a token.
func (s *session) tokenError(realm *url.URL, ch challenge, err error) error {
	if te, ok := errors.AsType[*transport.Error](err); ok {
		e := &Error{Op: opToken, Endpoint: realm.Host, Status: te.StatusCode}
		if te.StatusCode >= 400 && !temporary(te.StatusCode) {
			e.Status, e.Challenge = http.StatusUnauthorized, s.pristine([]string{s.challenge(ch)})
			e.Err = fmt.Errorf("the token service answered %d", te.StatusCode)
			e.refused = true
		}
		return e
	}
	_, syntax := errors.AsType[*json.SyntaxError](err)
	if net, ok := errors.AsType[*url.Error](err); ok && !syntax {
		return &Error{Op: opToken, Endpoint: realm.Host, Err: net.Err}
	}
	if errors.Is(err, ErrRefused) || errors.Is(err, ErrBadAnswer) || errors.Is(err, context.Canceled) {
		return err
	}
	return &Error{Op: opToken, Endpoint: realm.Host, Err: fmt.Errorf("%w: the token service gave no token", ErrBadAnswer)}
}
