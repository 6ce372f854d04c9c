package agent

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/larder-cache/larder/agent/cache"
	"github.com/larder-cache/larder/agent/proxy"
	"github.com/opencontainers/go-digest"
)

// signaturesInterval is the longest that nobody asks for the signatures of a held version.
const signaturesInterval = 24 * time.Hour

// signatureTag is what cosign calls the signatures of an image. Where a policy demands
// them, CRI-O and podman ask for those of the image that they run, never of its index.
func signatureTag(image digest.Digest) string {
	return strings.Replace(image.String(), ":", "-", 1) + ".sig"
}

// withSignatures are v and the signatures of its images; nil has none. mu is held.
func (v *version) withSignatures() []*version {
	if v == nil {
		return nil
	}
	return slices.AppendSeq([]*version{v}, maps.Values(v.signatures))
}

// unasked reports whether it is time to ask for signatures: at once, then whenever v has
// become twice as old, for a build is often signed after it was pushed. mu is held.
func (v *version) unasked() bool {
	pause := min(max(v.asked.Sub(v.firstAsked), pinInterval), signaturesInterval)
	return v.asked.IsZero() || time.Since(v.asked) >= pause
}

// answered notes that the registry was asked, and all it has is here. mu is held.
func (v *version) answered() {
	v.asked = time.Now()
	if v.firstAsked.IsZero() {
		v.firstAsked = v.asked
	}
}

// sign makes sure that the signatures of p's held version are here: those that are known and,
// if p stands for that version now (current), what else the registry has.
// A refusal is an answer: where a registry refuses what it has not, asking costs the
// repository's verdict. That it cannot say is no error: the next refresh asks again.
func (s *pins) sign(ctx context.Context, p *pin, current bool) error {
	if s.agent.config.Hosts.CRIO == "" { // containerd has no such policy
		return nil
	}
	s.mu.Lock()
	v := p.held
	if v == nil {
		s.mu.Unlock()
		return nil
	}
	known, due := maps.Clone(v.signatures), current && v.unasked()
	s.mu.Unlock()
	var errs []error
	said := due
	for _, d := range v.images {
		tag := signatureTag(d)
		if due {
			switch found, err := s.askForTag(ctx, p, tag); {
			case err == nil && (known[tag] == nil || known[tag].digest != found):
				known[tag] = newVersion(found)
			case err != nil && statusOf(err) != http.StatusNotFound && !refused(statusOf(err)):
				said = false
				s.agent.log.Debug("the registry does not say whether a pinned image is signed", "image", p.name, "err", err)
			}
		}
		if err := s.bringSignatures(ctx, p, tag, known[tag]); err != nil {
			errs = append(errs, s.withTrouble(p, err))
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if said && len(errs) == 0 {
		v.answered()
	}
	return errors.Join(errs...)
}

// askForTag asks what a tag of p's repository stands for, as ask does, by HEAD.
func (s *pins) askForTag(ctx context.Context, p *pin, tag string) (digest.Digest, error) {
	image := p.image
	image.Reference = tag
	puller := s.puller()
	puller.NoStale = s.agent.upstream.Policy(image.Registry).Contact()
	return puller.Resolve(ctx, image)
}

// bringSignatures makes signatures whole, and has p's held version hold them under their
// tag in place of others. There may be none (nil).
func (s *pins) bringSignatures(ctx context.Context, p *pin, tag string, found *version) error {
	if found == nil || found.all && len(s.lacking(p.image, found)) == 0 {
		return nil
	}
	err := s.fetch(ctx, p, found, nil)
	s.mu.Lock()
	defer s.mu.Unlock()
	former := p.held.signatures[tag]
	switch gone := s.images[p.name] != p; {
	case gone, err != nil && found != former:
		s.letGo(found)
	case found != former:
		s.letGo(former)
		p.held.signatures[tag] = found
	}
	if err != nil {
		return fmt.Errorf("its signatures (tag %s) cannot be had, so it does not start without the registry where a policy demands them: %w", tag, err)
	}
	return nil
}

// pinnedSignatures is pinned for a tag that nobody pinned by name. mu is held.
func (s *pins) pinnedSignatures(r cache.Repository, tag string) (found proxy.Pinned, ok bool) {
	if !strings.HasSuffix(tag, ".sig") {
		return found, false
	}
	for _, p := range s.images {
		if p.held == nil || !p.image.in(r) {
			continue
		}
		if of := p.held.signatures[tag]; of != nil {
			found, ok = proxy.Pinned{Digest: of.digest, Manifest: true, Public: found.Public || p.held.public}, true
		}
	}
	return found, ok
}
