package peer

import (
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

// bans is the nodes that were slow with a blob and are not asked for its pieces for a
// while (blob.slow), and those that this node does not link with. It goes by node
// name: a restart does not wash a bad disk clean. A slow node is not cut off: it may
// be the blob's home, and nodes that turned to the next one would send that upstream
// too.
type bans struct {
	m     *metrics
	mu    sync.Mutex // guards until
	until map[string]ban
}

type ban struct {
	time.Time      // its end
	slow      bool // it is no more than that: links go on
}

// add bans a node, or bans it for longer. A node that is slow while it may have no link gets
// none until both bans are over.
func (b *bans) add(node string, why banReason) {
	now := time.Now()
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(b.until) >= maxBans {
		for n, t := range b.until {
			if now.After(t.Time) || len(b.until) >= maxBans {
				delete(b.until, n)
			}
		}
	}
	was := b.until[node]
	if t := now.Add(why.lasts()); t.After(was.Time) {
		b.until[node] = ban{t, why == banSlow && (was.slow || now.After(was.Time))}
	}
	b.m.bans.WithLabelValues(string(why)).Inc()
}

// has reports whether there is to be no link with the node.
func (b *bans) has(node string) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	t := b.until[node]
	return !t.slow && !time.Now().After(t.Time)
}

// list is until when each node is banned, slow ones included.
func (b *bans) list() map[string]time.Time {
	b.mu.Lock()
	defer b.mu.Unlock()
	now := time.Now()
	out := make(map[string]time.Time, len(b.until))
	for node, t := range b.until {
		if now.Before(t.Time) {
			out[node] = t.Time
		}
	}
	return out
}
