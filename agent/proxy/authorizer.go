package proxy

import (
	"context"
	"errors"
	"log/slog"
	"net/http"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/larder-cache/larder/agent/cache"
	"github.com/larder-cache/larder/agent/upstream"
)

// decision is the outcome of the question whether a caller may read: the label
// of larder_auth_decisions_total, and a field of the audit log.
type decision string

const (
	decidedPublic     decision = "public"     // anyone may
	decidedNode       decision = "node"       // the node's credentials, for every caller
	decidedGranted    decision = "granted"    // the caller's own credential
	decidedRemembered decision = "remembered" // the registry is down; it let the same credential before
	decidedOffline    decision = "offline"    // the registry is down; offline = "all"
	decidedPinned     decision = "pinned"     // the registry gives it no more; it is pinned here. For that alone
	decidedImported   decision = "imported"   // the registry is down; an operator gave this to everybody
	decidedChallenged decision = "challenged" // no credential came; the registry wants one
	decidedRefused    decision = "refused"    // by the registry, or not of this repository
	decidedUnknown    decision = "unknown"    // the registry is down and nothing is known
	decidedDenied     decision = "denied"     // by allow and deny
)

var decisions = []decision{decidedPublic, decidedNode, decidedGranted, decidedRemembered, decidedOffline, decidedPinned,
	decidedImported, decidedChallenged, decidedRefused, decidedUnknown, decidedDenied}

// allows reports whether the caller may read. No decision yet allows nothing.
func (d decision) allows() bool {
	switch d {
	case decidedPublic, decidedNode, decidedGranted, decidedRemembered, decidedOffline, decidedPinned, decidedImported:
		return true
	}
	return false
}

// access is where one caller stands with one repository.
type access struct {
	// target is what upstream may be asked on the caller's behalf. Its
	// Authorization is in no log, no metric and on no disk (A6).
	target   upstream.Target
	who      caller
	relay    bool // a refusal goes to the client as it came, with its challenge
	decision decision
	said     time.Time // when the registry let him in; zero if that is not known
}

func (a *access) repository() cache.Repository { return repositoryOf(a.target) }

func (a *access) key() verdictKey {
	return verdictKey{a.repository(), a.who}
}

// yes is the decision that a verdict of the registry makes.
func (a *access) yes() decision {
	switch a.who {
	case anyone:
		return decidedPublic
	case theNode:
		return decidedNode
	}
	return decidedGranted
}

// told reports whether the registry itself let the caller in, not an operator's setting
// for outages.
func (a *access) told() bool { return a.decision == a.yes() }

// age is how long ago the registry let the caller in, 0 if that is not known: what was
// public stays so in an outage (A5).
func (a *access) age() time.Duration {
	if a.said.IsZero() {
		return 0
	}
	return time.Since(a.said)
}

// Question is about something in a repository: whether the one who asks may read
// it.
type Question struct {
	Reference string // tag or digest
	Blob      bool   // Reference is a blob's digest, else a manifest's
	Known     bool   // that it belongs to the repository is known already
	Stored    bool   // that it belongs is not enough: the registry has to say that it has it
}

func (q Question) kind() Kind {
	if q.Blob {
		return KindBlob
	}
	return KindManifest
}

// authorizer decides who may read what, by the rules in DESIGN.md. Every
// route with a repository asks it before anything looks at the cache (I6,
// A1).
type authorizer struct {
	upstream *upstream.Client
	swarm    Swarm // nil: a node alone
	cache    *cache.Cache
	meta     *cache.Meta
	log      *slog.Logger
	budget   time.Duration // for a request's headers
	pinned   func(cache.Repository, string) (Pinned, bool)

	secret   *keyed // of this process
	lasting  lasting
	verdicts *recent[verdictKey, verdict]
	members  *recent[member, struct{}]     // belong to their repository
	told     *recent[blobKey, struct{}]    // the registry has said that it has them there (A13)
	asking   counted                       // fills of this node ask for them there now
	willAsk  counted                       // fills that are about to begin will
	silent   *recent[verdictKey, struct{}] // the registry could not be asked a moment ago
	asks     *flights[askKey, struct{}]    // for callers of this node
	homeAsks *flights[askKey, struct{}]    // for other nodes; apart, for the former wait for these
}

func newAuthorizer(opts Options, b *background) *authorizer {
	a := &authorizer{
		upstream: opts.Upstream, swarm: opts.Swarm, cache: opts.Cache, meta: opts.Cache.Meta(), log: opts.Logger,
		budget: opts.FirstByteBudget, pinned: opts.Pinned,
		secret: newKeyed(newSecret()), lasting: lasting{meta: opts.Cache.Meta()},
		verdicts: newRecent[verdictKey, verdict](maxRemembered),
		members:  newRecent[member, struct{}](maxRemembered),
		told:     newRecent[blobKey, struct{}](maxRemembered),
		silent:   newRecent[verdictKey, struct{}](maxRemembered),
		asks:     newFlights[askKey, struct{}](b), homeAsks: newFlights[askKey, struct{}](b),
	}
	a.lasting.use(opts.VerdictKey)
	return a
}

// fingerprint names a credential; the name survives a restart if there is a key for
// that.
func (a *authorizer) fingerprint(authorization string) string {
	if keys := a.lasting.keys.Load(); keys != nil {
		return keys.fingerprint(authorization)
	}
	return a.secret.fingerprint(authorization)
}

// askKey is a question and who asks it.
type askKey struct {
	verdictKey
	Question
}

// begin finds out where the caller stands, as far as that is known. It asks nobody and
// waits for nothing; an error is final.
func (a *authorizer) begin(r *http.Request, rt *route) (access, error) {
	policy := a.upstream.Policy(rt.registry)
	acc := access{target: upstream.Target{Registry: rt.registry, Repository: rt.repository, Anonymous: true}}
	if !policy.Allows(rt.repository) {
		acc.decision = decidedDenied
		return acc, errDenied
	}
	switch {
	case policy.NodeAuth(rt.repository):
		acc.who, acc.target.Anonymous = theNode, false
	case policy.Auth == "anonymous":
	default:
		acc.relay = !rt.pathEncoded
		if v, ok := a.verdicts.get(acc.key()); ok && v.public() { // nothing that the caller brings matters
			acc.decision = decidedPublic
			return acc, nil
		}
		a.present(&acc, r.Header.Get("Authorization"))
	}
	switch v, ok := a.verdicts.get(acc.key()); {
	case ok && v.decision.allows():
		acc.decision = v.decision
	case ok:
		if stand, in := a.shownPin(acc, rt.reference()); in && rt.content() && !current(r) {
			return stand, nil
		}
		return acc, acc.refuse(rt.kind, v.refusal)
	}
	return acc, nil
}

var errDenied = &apiError{status: http.StatusNotFound, code: codeNameUnknown, message: "this repository is not served here; take it from the registry"}

// present takes the caller's own credential. A client that was asked for one
// and has none may send an empty name and password.
func (a *authorizer) present(acc *access, authorization string) {
	if authorization == "" || authorization == "Basic Og==" {
		return
	}
	acc.who, acc.target.Authorization, acc.target.Anonymous = a.secret.sum(authorization), authorization, false
}

// askedAs returns the caller in whose name a target asks the registry.
func (a *authorizer) askedAs(t upstream.Target) caller {
	switch {
	case t.Anonymous:
		return anyone
	case t.Authorization == "":
		return theNode
	}
	return a.secret.sum(t.Authorization)
}

// permit returns nil once the caller may have d as that kind: the caller may
// read the repository, and d belongs to it.
func (a *authorizer) permit(ctx context.Context, acc *access, kind Kind, d digest.Digest) error {
	known := a.belongs(memberOf(acc.target, kind, d))
	key := keyOf(acc.target, d)
	unproven := a.unproven(key, a.here)
	if acc.decision.allows() && known && !unproven {
		return nil
	}
	return a.ask(ctx, acc, kind, Question{Reference: d.String(), Blob: kind == KindBlob, Known: known, Stored: unproven})
}

// ask lets the registry decide, once for all callers that ask the same now.
// When it cannot be asked, or not soon enough, what is known decides (A5).
func (a *authorizer) ask(ctx context.Context, acc *access, kind Kind, q Question) error {
	patience := a.budget * 4 / 5
	if stand, in := a.standsHere(*acc, q.Reference); in && q.Known { // the rest of the budget is for the bytes
		patience = a.budget * 2 / 5
		if (stand.forOne() || q.Stored) && a.silent.has(acc.key()) {
			*acc = stand
			return nil
		}
	}
	wait, cancel := context.WithTimeoutCause(ctx, patience, errBudget)
	defer cancel()
	asker := *acc
	_, err := a.asks.do(wait, askKey{acc.key(), q}, func(ctx context.Context) (struct{}, error) {
		ctx, cancel := context.WithTimeout(ctx, resolveTimeout)
		defer cancel()
		return struct{}{}, a.find(ctx, asker, q)
	})
	switch {
	case err == nil:
		acc.decision = acc.yes()
		return nil
	case errors.Is(err, ErrImported):
		acc.decision = decidedImported
		return nil
	case ctx.Err() != nil:
		return err
	case upstream.IsNotFound(err), upstream.IsUnauthorized(err):
		stand, in := a.keeps(*acc, q, err)
		if !in {
			return acc.refuse(kind, err)
		}
		*acc = stand
		return nil
	}
	stand, in := a.standsHere(*acc, q.Reference) // now, for somebody may have been told no meanwhile (A4)
	if !in || !q.Known {
		return a.unknown(acc, err)
	}
	if stand.forOne() || q.Stored {
		a.silent.put(acc.key(), struct{}{}, outageLife)
	}
	*acc = stand
	if _, lasts := a.verdicts.get(acc.key()); !lasts && !stand.forOne() {
		a.verdicts.put(acc.key(), verdict{decision: acc.decision}, outageLife)
	}
	return nil
}

// find asks the repository's home, and the registry itself if the home cannot
// say.
func (a *authorizer) find(ctx context.Context, acc access, q Question) error {
	age, err := time.Duration(0), errNobody
	if a.swarm != nil {
		age, err = a.swarm.May(ctx, acc.target, q)
		err = a.believable(acc.target.Registry, err)
	}
	if err != nil && !final(err) {
		age, err = 0, a.askRegistry(ctx, acc.target, q)
	}
	a.learn(&acc, q, age, err)
	return err
}

var errNobody = errors.New("nobody was asked")

// believable drops the answer of another node if its challenge names a token
// service that this node would not trust with its own credentials (A7): a client
// would send its password there.
func (a *authorizer) believable(registry string, err error) error {
	e, ok := errors.AsType[*upstream.Error](err)
	if !ok || len(e.Challenge) == 0 {
		return err
	}
	if bad := a.upstream.CheckChallenge(registry, e.Challenge); bad != nil {
		a.log.Debug("challenge that another node brought is not used", "registry", registry, "err", bad)
		return errNobody
	}
	return err
}

// askRegistry puts the question to the registry.
func (a *authorizer) askRegistry(ctx context.Context, t upstream.Target, q Question) error {
	err := a.patiently(ctx, func() error { return a.askOnce(ctx, t, q) })
	if err == nil {
		a.sayAsked(t, q)
	}
	return a.withChallenge(ctx, t, q.Reference, err)
}

// patiently asks again once a registry that wants to be left alone for a moment may be
// asked: a rate limit is no verdict, and the runtime would run into the same one. A pause
// that ends too late for whoever waits is not waited for.
func (a *authorizer) patiently(ctx context.Context, ask func() error) error {
	wait, cancel := context.WithTimeout(ctx, a.budget*4/5)
	defer cancel()
	for {
		if err := ask(); !pauseFor(wait, err) {
			return err
		}
	}
}

func (a *authorizer) askOnce(ctx context.Context, t upstream.Target, q Question) error {
	if q.Blob {
		_, err := a.upstream.Stat(ctx, t, digest.Digest(q.Reference))
		return err
	}
	_, err := a.upstream.Resolve(ctx, t, q.Reference, acceptAll)
	return err
}

// pauseFor waits as long as a registry with a rate limit asked for. It reports
// false at once if err is no such request, or if ctx would end first.
func pauseFor(ctx context.Context, err error) bool {
	e, ok := errors.AsType[*upstream.Error](err)
	if !ok || e.Status != http.StatusTooManyRequests || e.RetryAfter <= 0 {
		return false
	}
	if deadline, ok := ctx.Deadline(); ok && time.Until(deadline) <= e.RetryAfter {
		return false
	}
	return sleep(ctx, e.RetryAfter) == nil
}

// withChallenge completes a refusal of "anyone" with the registry's challenge
// to a client without a credential.
func (a *authorizer) withChallenge(ctx context.Context, t upstream.Target, ref string, err error) error {
	e, ok := errors.AsType[*upstream.Error](err)
	if !ok || !t.Anonymous || e.Status != http.StatusUnauthorized || len(e.Challenge) > 0 {
		return err
	}
	challenge, cerr := a.upstream.Challenge(ctx, t, ref)
	if cerr != nil {
		return cerr
	}
	out := *e
	out.Challenge = challenge
	return &out
}

// learn keeps what the registry answered, age ago. Errors that are no answer teach
// nothing (A2).
func (a *authorizer) learn(acc *access, q Question, age time.Duration, err error) {
	switch {
	case errors.Is(err, ErrImported):
		a.meta.SetImported(acc.repository(), q.Reference) // so that this node can tell others
		a.enlistAsked(acc.target, q)
	case err == nil:
		a.accept(acc, age)
		a.enlistAsked(acc.target, q)
		if q.Stored {
			a.sayAsked(acc.target, q)
		}
	case upstream.IsUnauthorized(err):
		a.reject(acc, err)
	}
}

// accept keeps a yes for its life, counted from when the registry said it: passing
// from node to node makes it no younger.
func (a *authorizer) accept(acc *access, age time.Duration) {
	known, _ := a.verdicts.get(acc.key())
	life := max(publicLife-age, 0)
	if acc.who != anyone {
		life = lifeOf(acc.target.Authorization, age)
	}
	a.verdicts.put(acc.key(), verdict{decision: acc.yes(), said: time.Now().Add(-age)}, life)
	switch {
	case known.decision.allows(): // is remembered
	case acc.who == anyone:
		a.meta.SetVerdict(acc.repository(), cache.Anyone)
	case a.upstream.Policy(acc.target.Registry).OfflineMode() == upstream.OfflineRemembered:
		a.lasting.put(acc)
	}
}

// reject keeps a no, and forgets every yes that it revokes (A4).
func (a *authorizer) reject(acc *access, err error) {
	life := refusalLife
	switch acc.who {
	case anyone:
		life = challengeLife
		a.meta.DeleteVerdict(acc.repository(), cache.Anyone)
		a.meta.DeleteImported(acc.repository())
	case theNode:
		life = 0 // the next question may carry a mended credential
	}
	a.lasting.forget(acc)
	no := refusalOf(err)
	a.verdicts.put(acc.key(), verdict{refusal: &upstream.Error{Registry: acc.target.Registry, Repository: acc.target.Repository,
		Op: "authorize", Status: no.status, Challenge: no.challenge}}, life)
	if isBasic(no.challenge) {
		a.meta.SetChallenge(acc.repository(), no.challenge)
	}
}

// refuse answers with the registry's own no, in the form that suits the client (A9).
func (a *access) refuse(kind Kind, err error) error {
	e := toAPIError(err, kind, a.relay)
	switch {
	case upstream.IsNotFound(err) && a.decision.allows(): // he may read, and there is nothing
	case a.who == anyone && len(e.challenge) > 0:
		a.decision = decidedChallenged
	default:
		a.decision = decidedRefused
	}
	return e
}

// conclude takes the registry's answer to a question about a manifest, a yes or a no, as
// the decision. It returns what the client is told.
func (a *access) conclude(err error) error {
	switch {
	case err == nil:
		a.decision = a.yes()
	case upstream.IsUnauthorized(err), upstream.IsNotFound(err):
		return a.refuse(KindManifest, err)
	}
	return err
}

// unknown is the answer while the registry cannot be asked and nothing known lets
// the caller in. It is the error of the question, without a challenge: for most
// challenges a client would need a token that it cannot get now. A Basic challenge
// needs no network to answer, and the password may be a remembered one.
func (a *authorizer) unknown(acc *access, err error) error {
	acc.decision = decidedUnknown
	challenge := a.meta.Challenge(acc.repository())
	if acc.who == anyone && acc.relay && isBasic(challenge) && a.upstream.Policy(acc.target.Registry).OfflineMode() == upstream.OfflineRemembered {
		acc.decision = decidedChallenged
		return refusalOf(&upstream.Error{Status: http.StatusUnauthorized, Challenge: challenge})
	}
	return err
}

// isBasic reports whether a client can answer the challenge by itself.
func isBasic(challenge []string) bool {
	for _, c := range challenge {
		if scheme, _, _ := strings.Cut(c, " "); !strings.EqualFold(scheme, "basic") {
			return false
		}
	}
	return len(challenge) > 0
}
