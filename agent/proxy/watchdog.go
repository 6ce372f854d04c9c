package proxy

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"time"
)

// Watch says when requests count as unanswered. A runtime that meets a closed
// port goes to the registry at once; one that meets a silent port may wait
// forever. So the port must not outlive the answers.
type Watch struct {
	Interval time.Duration // between two looks; default 1 s
	Timeout  time.Duration // of one probe; default 2 s
	// Slack is how long a request may stay unanswered beyond its own deadline
	// before its connection is closed; default 5 s.
	Slack time.Duration
}

const (
	// wedgedProbes in a row, with no other answer in between, close the port.
	wedgedProbes = 2
	// wedgedRequests that are overdue together do so too: the deadlines that
	// should have ended them do not work any more.
	wedgedRequests = 8
)

// ErrWedged is what Run and Serve return when requests stopped being answered.
var ErrWedged = errors.New("requests are not being answered any more; the port is closed so that runtimes go to the registry")

// watch looks after the port until ctx ends.
func (p *Proxy) watch(ctx context.Context) error {
	failures := 0
	for {
		if sleep(ctx, p.opts.Watch.Interval) != nil {
			return nil
		}
		before := p.answers.Load()
		err := p.probe(ctx)
		switch {
		case ctx.Err() != nil:
			return nil
		case err == nil || p.answers.Load() != before:
			failures = 0
		default:
			failures++
		}
		if overdue := p.dropOverdue(); failures >= wedgedProbes || overdue >= wedgedRequests {
			p.log.Error("requests are not being answered, closing the port; pulls go to the registry", "overdue", overdue, "err", err)
			p.closePort()
			return ErrWedged
		}
	}
}

// probe asks for /v2/ as a runtime would. A closed port that only waits for its last
// bodies must not count as unanswered.
func (p *Proxy) probe(ctx context.Context) error {
	s := p.server.Load()
	if s == nil || s.draining.Load() {
		return nil
	}
	addr, ok := s.listener.Addr().(*net.TCPAddr)
	if !ok {
		return nil
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+loopback(addr)+"/v2/", nil)
	if err != nil {
		return err
	}
	req.Header.Set("User-Agent", OwnUserAgent+"watchdog")
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: p.opts.Watch.Timeout} // and no proxy
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	_ = resp.Body.Close() // was not read
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("probe: status %d", resp.StatusCode)
	}
	return nil
}

// dropOverdue hangs up on requests whose own deadline did not end them, and
// counts them. Only those count that were overdue at the check before too: a
// process that was stopped (a frozen container, a suspended machine) finds all
// requests overdue at once, and their deadlines, which passed meanwhile, have yet
// to do their work.
func (p *Proxy) dropOverdue() int {
	overdue := 0
	for _, x := range p.underWay() {
		if x.answered.Load() || time.Since(x.start) < p.longestWait(x)+p.opts.Watch.Slack {
			continue
		}
		looks := x.overdue.Add(1)
		if looks > 1 {
			overdue++
		}
		if looks == 2 {
			p.log.Warn("a request was not answered by its deadline, hanging up", "duration", time.Since(x.start))
			x.hangUp()
		}
	}
	return overdue
}

func (p *Proxy) longestWait(x *exchange) time.Duration {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.route.kind == KindManifest {
		return p.manifestPatience(x.route.pathEncoded)
	}
	return p.patience(x.route.pathEncoded)
}

// loopback is where a listener can be reached from here.
func loopback(addr *net.TCPAddr) string {
	if !addr.IP.IsUnspecified() {
		return addr.String()
	}
	if addr.IP.To4() != nil {
		return fmt.Sprintf("127.0.0.1:%d", addr.Port)
	}
	return fmt.Sprintf("[::1]:%d", addr.Port)
}
