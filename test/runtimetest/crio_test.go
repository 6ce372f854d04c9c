package runtimetest_test

import (
	"testing"

	. "github.com/larder-cache/larder/test/registrytest"
	"github.com/larder-cache/larder/test/runtimetest"
)

// TestCRIOFaults pins the strictness of the model: fallback before a manifest,
// none after.
func TestCRIOFaults(t *testing.T) {
	img := Platforms(layers, true)
	big := Match{Reference: img.Layers[1].Digest.String()}
	manifests := Match{Kind: Manifest}
	for name, tc := range map[string]struct {
		match    Match
		effects  []Effect
		ok       bool
		upstream bool
	}{
		"no fault":             {big, []Effect{Times(1), Delay(0)}, true, false},
		"ping fails":           {Match{Kind: Ping}, []Effect{Status(404)}, true, true},
		"no manifest":          {manifests, []Effect{Status(404)}, true, true},
		"429 twice":            {manifests, []Effect{Times(2), TooManyRequests(1)}, true, false},
		"429 always":           {manifests, []Effect{TooManyRequests(1)}, true, true},
		"no media type":        {manifests, []Effect{Omit("Content-Type")}, true, true},
		"type with parameters": {manifests, []Effect{Header("Content-Type", img.MediaType+"; charset=utf-8"), Times(1)}, true, false},
		"no blob":              {big, []Effect{Status(404)}, false, false},
		"blob 503":             {big, []Effect{Status(503)}, false, false},
		"blob 401":             {big, []Effect{Status(401)}, false, false},
		"cut once":             {big, []Effect{Times(1), CutAfter(1000)}, true, false},
		"reset once":           {big, []Effect{Times(1), ResetAfter(1000)}, true, false},
		"cut twice":            {big, []Effect{Times(2), CutAfter(1000)}, false, false},
		"cut, much progress":   {big, []Effect{Times(2), CutAfter(1 << 20)}, true, false},
		"corrupt":              {big, []Effect{CorruptAt(5)}, false, false},
	} {
		t.Run(name, func(t *testing.T) {
			mirror, upstream := Start(t, Options{}), Start(t, Options{})
			mirror.Put("registry.test/"+repo, img, "v1")
			upstream.Put(repo, img, "v1")
			mirror.Inject(tc.match, tc.effects...)
			c := &runtimetest.CRIO{Sources: []string{mirror.Host() + "/registry.test", upstream.Host()}}
			r, err := c.Pull(t.Context(), repo, "v1")
			if (err == nil) != tc.ok {
				t.Errorf("got %v, want ok %v", err, tc.ok)
			}
			if got := r.From(upstream.Host()) > 0; got != tc.upstream {
				t.Errorf("went upstream: %v, want %v", got, tc.upstream)
			}
			if tc.ok && (r.Target.Digest != img.Digest || len(r.Content) != 5) {
				t.Errorf("got %s and %d parts", r.Target.Digest, len(r.Content))
			}
		})
	}
}

// TestCRIOResumeMustBePartial pins that the rest of a blob is refused unless it
// is exactly that: neither the whole nor another range.
func TestCRIOResumeMustBePartial(t *testing.T) {
	img := OCIImage(layers)
	big := Match{Reference: img.Layers[1].Digest.String()}
	for name, effect := range map[string]Effect{
		"whole":       IgnoreRange(),
		"other range": ShiftRange(1),
		"wrong total": RangeTotal(5),
		"not found":   Status(404),
	} {
		t.Run(name, func(t *testing.T) {
			s := Start(t, Options{})
			s.Put(repo, img, "v1")
			s.Inject(big, Times(1), CutAfter(1000))
			s.Inject(big, Skip(1), effect)
			c := &runtimetest.CRIO{Sources: []string{s.Host()}}
			if _, err := c.Pull(t.Context(), repo, "v1"); err == nil {
				t.Error("the pull succeeded")
			}
		})
	}
}

func TestCRIOOverTLS(t *testing.T) {
	s := Start(t, Options{TLS: true})
	img := OCIImage(layers)
	s.Put(repo, img, "v1")
	c := &runtimetest.CRIO{Sources: []string{s.Host()}}
	if _, err := c.Pull(t.Context(), repo, img.Digest.String()); err != nil {
		t.Error(err)
	}
}
