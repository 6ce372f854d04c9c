package runtimestore

import (
	"slices"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/opencontainers/go-digest"
)

// TestSources holds what is read out of containerd's labels, and that nothing is told
// twice.
func TestSources(t *testing.T) {
	var told []string
	s := newSources(func(d digest.Digest, registry string) { told = append(told, d.Encoded()[:2]+" "+registry) })
	a, b := digest.FromString("a"), digest.FromString("b")
	walk := func(infos ...content.Info) []string {
		told = nil
		seen := map[digest.Digest]map[string]bool{}
		for _, i := range infos {
			s.take(seen, i)
		}
		s.told = seen
		slices.Sort(told)
		return told
	}
	labelled := func(d digest.Digest, hosts ...string) content.Info {
		i := content.Info{Digest: d, Labels: map[string]string{"containerd.io/gc.root": "now", "containerd.io/uncompressed": "sha256:0"}}
		for _, h := range hosts {
			i.Labels[sourceLabel+h] = "team/app,library/app"
		}
		return i
	}
	of := func(d digest.Digest, host string) string { return d.Encoded()[:2] + " " + host }
	for _, step := range []struct {
		infos []content.Info
		want  []string
	}{
		{[]content.Info{labelled(a), {Digest: b}}, nil},
		{[]content.Info{labelled(a, "docker.io"), labelled(b, "quay.io"), labelled(b, "quay.io")}, []string{of(a, "docker.io"), of(b, "quay.io")}},
		{[]content.Info{labelled(a, "docker.io", ""), labelled(b, "quay.io", "ghcr.io")}, []string{of(b, "ghcr.io")}},
		{[]content.Info{labelled(b, "quay.io", "ghcr.io")}, nil},
		{[]content.Info{labelled(a, "docker.io")}, []string{of(a, "docker.io")}}, // it was gone meanwhile
	} {
		slices.Sort(step.want)
		if got := walk(step.infos...); !slices.Equal(got, step.want) {
			t.Errorf("told %q, want %q", got, step.want)
		}
	}
}
