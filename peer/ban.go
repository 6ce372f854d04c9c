package peer

import (
	"maps"
	"sync"
	"time"
)

// banReason is a closed set: it is a metric's label.
type banReason string

const (
	banSlow     banReason = "slow"
	banDigest   banReason = "digest"
	banProtocol banReason = "protocol"
)

func (r banReason) lasts() time.Duration {
	if r == banSlow {
		return 30 * time.Second
	}
	return 10 * time.Minute
}

const maxBans = 4096

// bans is whom this node does not link with for a while, by node name: a
// restart does not wash a bad disk clean.
type bans struct {
	m     *metrics
	mu    sync.Mutex // guards until
	until map[string]time.Time
}

func (b *bans) add(node string, why banReason) {
	now := time.Now()
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(b.until) >= maxBans {
		for n, t := range b.until {
			if now.After(t) || len(b.until) >= maxBans {
				delete(b.until, n)
			}
		}
	}
	if t := now.Add(why.lasts()); t.After(b.until[node]) {
		b.until[node] = t
	}
	b.m.bans.WithLabelValues(string(why)).Inc()
}

func (b *bans) has(node string) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	t, ok := b.until[node]
	if ok && time.Now().After(t) {
		delete(b.until, node)
		return false
	}
	return ok
}

func (b *bans) list() map[string]time.Time {
	b.mu.Lock()
	defer b.mu.Unlock()
	now := time.Now()
	out := maps.Clone(b.until)
	maps.DeleteFunc(out, func(_ string, until time.Time) bool { return now.After(until) })
	return out
}
