package main

import (
	"fmt"
	"io"
	"slices"
	"sync"

	"github.com/opencontainers/go-digest"
	"github.com/vbauerster/mpb/v8"
	"github.com/vbauerster/mpb/v8/decor"
)

// demoView shows the pulls of one round as they go.
type demoView interface {
	node(name string) demoNodeView
	// close comes after the last pull, finished or not.
	close()
}

// demoNodeView is one node's part; progress is called from several goroutines.
type demoNodeView interface {
	progress(d digest.Digest, done, total int64)
	done(demoPull)
}

// newDemoView draws bars on terminals and prints a line for each node elsewhere.
func newDemoView(out io.Writer, title string, size int64) demoView {
	if width, ok := terminal(out); ok {
		fmt.Fprintln(out, newStyle(out).bold(title))
		return &demoBars{progress: mpb.New(mpb.WithOutput(out), mpb.WithWidth(min(width, 64))), size: size}
	}
	return &demoLines{out: out, title: title}
}

// demoLines is for pipes and logs.
type demoLines struct {
	mu    sync.Mutex // guards out: nodes finish when they like
	out   io.Writer
	title string
}

func (v *demoLines) node(string) demoNodeView { return v }
func (v *demoLines) close()                   {}

func (v *demoLines) progress(digest.Digest, int64, int64) {}

func (v *demoLines) done(p demoPull) {
	v.mu.Lock()
	defer v.mu.Unlock()
	fmt.Fprintf(v.out, "%s: %s has it after %s\n", v.title, p.node, took(p.took))
}

// demoBars is a bar for each node.
type demoBars struct {
	progress *mpb.Progress
	size     int64
	bars     []*mpb.Bar
}

func (v *demoBars) node(name string) demoNodeView {
	b := v.progress.AddBar(v.size,
		mpb.PrependDecorators(decor.Name(name, decor.WCSyncSpaceR)),
		mpb.AppendDecorators(decor.CountersKibiByte("% .1f / % .1f", decor.WCSyncSpace), decor.Elapsed(decor.ET_STYLE_GO, decor.WCSyncSpace)))
	v.bars = append(v.bars, b)
	return &demoBar{bar: b, last: map[digest.Digest]int64{}}
}

func (v *demoBars) close() { closeBars(v.progress, slices.Values(v.bars)) }

type demoBar struct {
	bar *mpb.Bar

	mu   sync.Mutex // guards last
	last map[digest.Digest]int64
}

func (b *demoBar) progress(d digest.Digest, done, _ int64) {
	b.mu.Lock()
	more := done - b.last[d]
	b.last[d] = done
	b.mu.Unlock()
	b.bar.IncrInt64(more)
}

func (b *demoBar) done(demoPull) { b.bar.SetTotal(-1, true) }
