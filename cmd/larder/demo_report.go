package main

import (
	"cmp"
	"fmt"
	"io"
	"slices"
	"time"
)

// demoReport is what a demo found out.
type demoReport struct {
	spec              demoSpec
	size              int64
	storm, warm, late []demoPull
	// What the registry saw of the storm: bytes of blobs, and requests.
	registryBytes                            int64
	requests, manifestRequests, blobRequests int
}

// bound is the least time in which n nodes can have an image of size bytes,
// whatever they do: the registry has to send each byte once, and what all of
// them need has to leave the registry or a node. (The third bound, the slowest
// download, is not limited here.)
func (s demoSpec) bound(size int64) time.Duration {
	once := float64(size) / float64(s.registryLink)
	all := float64(s.nodes) * float64(size) / (float64(s.registryLink) + float64(s.nodes)*float64(s.nodeLink))
	return seconds(max(once, all))
}

// direct is the least time if every node pulls from the registry.
func (s demoSpec) direct(size int64) time.Duration {
	return seconds(float64(s.nodes) * float64(size) / float64(s.registryLink))
}

func seconds(s float64) time.Duration { return time.Duration(s * float64(time.Second)) }

func (r demoReport) print(w io.Writer) {
	t := newTable("pull", "node", ">from registry", ">from peers", ">from disk", ">time", ">speed")
	add := func(title string, pulls []demoPull) {
		for _, p := range pulls {
			t.row(title, p.node, size(p.upstream), size(p.peer), size(p.disk()), took(p.took), rate(p.bytes, p.took))
		}
	}
	add("cold, all at once", r.storm)
	add("warm, registry stopped", r.warm)
	add("new node, registry stopped", r.late)
	fmt.Fprintln(w)
	t.print(w)

	slowest, median, bound := slowest(r.storm), median(r.storm), r.spec.bound(r.size)
	facts := newTable("", "", "")
	facts.row("copies from the registry", fmt.Sprintf("%.3f", float64(r.registryBytes)/float64(r.size)), fmt.Sprintf("%s sent", size(r.registryBytes)))
	facts.row("requests to the registry", fmt.Sprint(r.requests),
		fmt.Sprintf("%d for tag and manifest, %d for config and layers, %d other", r.manifestRequests, r.blobRequests, r.requests-r.manifestRequests-r.blobRequests))
	facts.row("slowest node", took(slowest), fmt.Sprintf("%.2f x the bound", ratio(slowest, bound)))
	facts.row("median node", took(median), fmt.Sprintf("%.2f x the bound", ratio(median, bound)))
	facts.row("bound", took(bound), "max(F/u_s, N*F/(u_s + sum u_i)): no way of sharing is faster on these links")
	facts.row("each from the registry", took(r.spec.direct(r.size)), "N*F/u_s, at least; computed, not measured")
	fmt.Fprintln(w, "\nThe storm")
	facts.indent = "  "
	facts.printBody(w)
}

func ratio(a, b time.Duration) float64 { return a.Seconds() / b.Seconds() }

// mbit is bytes per second as links are sold.
func mbit(bytesPerSecond int64) string { return fmt.Sprintf("%d Mbit/s", bytesPerSecond*8/1e6) }

func byTime(pulls []demoPull) []demoPull {
	return slices.SortedFunc(slices.Values(pulls), func(a, b demoPull) int { return cmp.Compare(a.took, b.took) })
}

func slowest(pulls []demoPull) time.Duration { return byTime(pulls)[len(pulls)-1].took }
func median(pulls []demoPull) time.Duration  { return byTime(pulls)[len(pulls)/2].took }
