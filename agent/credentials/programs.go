package credentials

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"sync"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/prometheus/client_golang/prometheus"
)

const (
	// minHold is the least time an answer is used, also one with cacheDuration 0:
	// kubelet asks once for a pull and uses the answer throughout, and a pull is
	// dozens of requests here.
	minHold = 10 * time.Second
	// failureHold is how long a program that failed is left alone.
	failureHold = 10 * time.Second
	// refreshPause is how old an answer must be to be asked for again because the
	// registry refuses it: where a credential lacks a right, none that is newer
	// has it, and each pull would run the program.
	refreshPause = 15 * time.Second
	// slowRun is how long a program may take until its last answer is used meanwhile: what
	// waits are pulls, with some seconds for all. If it has expired, that costs a request.
	slowRun = 2 * time.Second
	// maxAnswers is far beyond what registries and images of a node come to.
	maxAnswers = 256
)

// answer is what a program said.
type answer struct {
	auths map[string]authn.AuthConfig // by key, see matching
	hold  time.Duration               // how long it is good
	at    time.Time
	err   error // why there is none, or none newer
}

func (a answer) good(refresh bool) bool {
	age := time.Since(a.at)
	return age < a.hold && !(refresh && age >= refreshPause)
}

// question is one for a program.
type question struct {
	program string
	// keys: an answer that is kept under any of them will do. The first is for
	// this question alone.
	keys []string
	// wide groups questions of which only one is asked at a time, while the others
	// wait whether its answer will do for them too.
	wide string
	// ask runs the program; key is what its answer is kept under.
	ask func(context.Context) (key string, a answer, err error)
}

// flight is one run of a program.
type flight struct {
	scope  string // the widest key of questions that wait for it
	began  time.Time
	done   chan struct{}
	answer answer // after done
}

// programs asks programs, each question once at a time, and keeps the answers.
type programs struct {
	log     *slog.Logger
	runs    *prometheus.CounterVec
	ctx     context.Context //nolint:containedctx // the programs' own, which no request ends
	stop    context.CancelFunc
	running sync.WaitGroup

	mu      sync.Mutex // guards all below
	closed  bool
	kept    map[string]answer
	flights map[string]*flight
	narrow  map[string]bool // by program: its last answer was good for one question alone
}

func newPrograms(log *slog.Logger, reg prometheus.Registerer) (*programs, error) {
	p := &programs{log: log, kept: map[string]answer{}, flights: map[string]*flight{}, narrow: map[string]bool{}}
	p.ctx, p.stop = context.WithCancel(context.Background())
	p.runs = prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "larder_credential_program_runs_total",
		Help: "Runs of credential helpers and credential provider plugins, by program and result (ok, failed).",
	}, []string{"program", "result"})
	if reg == nil {
		return p, nil
	}
	return p, reg.Register(p.runs)
}

func (p *programs) close() {
	p.mu.Lock()
	p.closed = true
	p.mu.Unlock()
	p.stop()
	p.running.Wait()
}

var errClosed = errors.New("the agent is stopping")

// errSlow is beside an answer that the program may be about to replace.
var errSlow = fmt.Errorf("it has not ended after %s; what it answered last is used", slowRun)

// ask answers q from what is kept, or runs the program. If that takes long, its last
// answer has to do, unless the registry refuses that.
func (p *programs) ask(ctx context.Context, q question, refresh bool) answer {
	for {
		a, f, mine := p.begin(q, refresh)
		if f == nil {
			return a
		}
		if err := f.wait(ctx, len(a.auths) > 0 && !refresh); err != nil {
			return answer{auths: a.auths, err: err}
		}
		if mine || f.answer.err != nil {
			return f.answer
		}
		refresh = false // whatever came is newer than the question
	}
}

// wait returns nil once the program has ended, errSlow if it takes long and spare says
// that the caller has another answer.
func (f *flight) wait(ctx context.Context, spare bool) error {
	patience := ctx
	if spare {
		var cancel context.CancelFunc
		patience, cancel = context.WithDeadline(ctx, f.began.Add(slowRun))
		defer cancel()
	}
	select {
	case <-f.done:
		return nil
	case <-patience.Done():
		return cmp.Or(ctx.Err(), errSlow)
	}
}

// begin returns a good answer, or the last one and the flight to wait for. mine is true
// if that flight asks q itself, and not a question whose answer may do for q as well.
func (p *programs) begin(q question, refresh bool) (a answer, f *flight, mine bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, key := range q.keys {
		if a, ok := p.kept[key]; ok && a.good(refresh) {
			return a, nil, false
		}
	}
	if p.closed {
		return answer{err: errClosed}, nil, false
	}
	a = p.latest(q.keys)
	f = &flight{done: make(chan struct{}), scope: q.wide, began: time.Now()}
	if p.narrow[q.program] {
		f.scope = q.keys[0]
	}
	for _, key := range []string{q.keys[0], f.scope} {
		if other := p.flights[key]; other != nil {
			return a, other, false
		}
	}
	p.flights[q.keys[0]], p.flights[f.scope] = f, f
	p.running.Go(func() { p.fly(q, f) })
	return a, f, true
}

// fly runs the program and keeps its answer. If it fails, its last one stays.
func (p *programs) fly(q question, f *flight) {
	ctx, cancel := context.WithTimeout(p.ctx, runTimeout)
	defer cancel()
	key, a, err := q.ask(ctx)
	a.at, a.hold = time.Now(), max(a.hold, minHold)
	result := "ok"
	if err != nil {
		key, result = f.scope, "failed"
	}
	if err != nil && p.ctx.Err() == nil { // else it was ended
		p.log.Warn("no credential from a program; trying again in a while", "program", q.program, "err", err)
	}
	p.runs.WithLabelValues(q.program, result).Inc()
	p.mu.Lock()
	if err != nil {
		a = answer{auths: p.latest(q.keys).auths, hold: failureHold, at: a.at, err: err}
	} else {
		p.narrow[q.program] = key == q.keys[0] && key != q.wide
	}
	p.keep(key, a)
	maps.DeleteFunc(p.flights, func(_ string, other *flight) bool { return other == f })
	p.mu.Unlock()
	f.answer = a
	close(f.done)
}

// latest is the newest answer under keys, however old. p.mu is held.
func (p *programs) latest(keys []string) (newest answer) {
	for _, key := range keys {
		if a, ok := p.kept[key]; ok && a.at.After(newest.at) {
			newest = a
		}
	}
	return newest
}

// keep stores an answer and, if there are too many, drops the oldest. p.mu is held.
func (p *programs) keep(key string, a answer) {
	p.kept[key] = a
	if len(p.kept) <= maxAnswers {
		return
	}
	oldest := key
	for k, other := range p.kept {
		if other.at.Before(p.kept[oldest].at) {
			oldest = k
		}
	}
	delete(p.kept, oldest)
}
