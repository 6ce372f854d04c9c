package peer

import (
	"context"
	"errors"
	"net/http"
	"time"

	"github.com/opencontainers/go-digest"
)

// What only one node has is lost with that node. So it asks others to keep it too:
// first the homes, which would be asked for it.

const (
	// keepTime is how long a member may take to fetch what it was asked to keep. If
	// it takes longer, it goes on.
	keepTime = 2 * time.Minute
	// maxIdle bounds what a member says about how long something was not used.
	maxIdle = 10 * 365 * 24 * time.Hour
)

// Copy is what a node asks another one to keep: a blob, or what a tag stands for. No
// client's credential goes with it: the keeper must itself be allowed to read it.
type Copy struct {
	Want
	// Tag, if not "", is asked for instead of a blob, and Stands is what it stood for
	// when the asker last heard of it.
	Tag    string `json:",omitempty"`
	Stands Descriptor
	// Idle is how long ago the asker used it last.
	Idle time.Duration `json:",omitempty"`
}

// Entry is the digest under which the index knows who has it.
func (c Copy) Entry() digest.Digest {
	if c.Tag != "" {
		return c.reference().entry()
	}
	return c.Digest
}

// home decides who is asked to keep it.
func (c Copy) home() (key, error) {
	if c.Tag != "" {
		return c.reference().home(), nil
	}
	return parseKey(c.Digest.String())
}

func (c Copy) reference() Reference {
	return Reference{Registry: c.Registry, Repository: c.Repository, Tag: c.Tag, Node: c.Node}
}

// ErrBusy is a no for now: the node has other things to do, or too many questions.
var ErrBusy = errors.New("peer is busy")

// ErrNobody means that no other member may be asked.
var ErrNobody = errors.New("no other node may be a home")

// Others counts the members beside this one that, by the index, have what c names; with
// ZoneScope, those of this zone.
func (s *Swarm) Others(c Copy) int { return len(s.others(c)) }

func (s *Swarm) others(c Copy) (names []string) {
	k, err := parseKey(c.Entry().String())
	if err != nil {
		return nil
	}
	for _, name := range s.index.holders(prefixOf(k), s.cfg.Zone, maxHolders) {
		if m, live := s.roster.get(name); live && name != s.self.Name && (!s.cfg.ZoneScope || m.Zone == s.cfg.Zone) {
			names = append(names, name)
		}
	}
	return names
}

// Keep asks members, one after the other, to keep what this node has, until as many others have it
// as wanted. It returns how many do then, and why not more: ErrNobody, ctx's error, ErrNotRunning,
// or what the member asked last said. It blocks for up to keepTime for each of at most maxAsked
// members; one that is still fetching by then counts as one that keeps it.
func (s *Swarm) Keep(ctx context.Context, c Copy, wanted int) (others int, err error) {
	ctx, stop, err := s.enter(ctx)
	if err != nil {
		return 0, err
	}
	defer stop()
	home, err := c.home()
	if err != nil {
		return 0, err
	}
	c.Authorization, c.Idle = "", min(max(c.Idle, 0), maxIdle)
	passed := map[string]bool{s.self.Name: true}
	for _, name := range s.others(c) {
		passed[name] = true
		others++
	}
	err = ErrNobody
	for tries := 0; others < wanted && tries < maxAsked; tries++ {
		m := s.roster.homeBut(home, s.cfg.Zone, s.cfg.ZoneScope, passed)
		if m == nil {
			break
		}
		passed[m.Name] = true
		failed := s.askToKeep(ctx, m, c)
		if failed == nil {
			others++
			continue
		}
		if ctx.Err() != nil {
			return others, ctx.Err()
		}
		s.log.Debug("member does not keep a copy", "peer", m.Node, "digest", c.Entry(), "err", failed)
		err = failed
		if missing(failed) { // whoever asks
			break
		}
	}
	if others >= wanted {
		err = nil
	}
	return others, err
}

// missing reports whether upstream no longer has something.
func missing(err error) bool {
	r, ok := errors.AsType[*Refusal](err)
	return ok && r.Status == http.StatusNotFound
}

func (s *Swarm) askToKeep(ctx context.Context, m *Member, c Copy) error {
	kctx, cancel := context.WithTimeout(ctx, keepTime)
	defer cancel()
	_, err := s.askMember(kctx, m, methodKeep, c, new(struct{}))
	if err != nil && kctx.Err() != nil && ctx.Err() == nil {
		return nil
	}
	return err
}

// keeps answers a node that asks this one to keep something.
func (s *Swarm) keeps(ctx context.Context, c Copy) (struct{}, error) {
	if c.Idle < 0 || c.Idle > maxIdle || c.Size < 0 || c.Size > maxBlobSize {
		return struct{}{}, errWire
	}
	if _, err := c.home(); err != nil {
		return struct{}{}, err
	}
	if _, err := parseKey(c.Stands.Digest.String()); c.Tag != "" && err != nil {
		return struct{}{}, err
	}
	c.Authorization = ""
	ctx, cancel := context.WithTimeout(ctx, keepTime)
	defer cancel()
	return struct{}{}, s.cfg.Origin.Keep(ctx, c)
}
