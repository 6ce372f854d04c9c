package main

import (
	"cmp"
	"context"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strings"
)

// outcome is one measured storm.
type outcome struct {
	times    []float64 // seconds, sorted
	copies   float64   // bytes that left the registry over the image's size, headers and what was sent again included
	answered float64   // the same of the bodies in its answers
	requests int       // that the registry answered
	cost     cost
	rss      int64 // bytes, the largest agent's peak
}

func (o outcome) slowest() float64 { return o.times[len(o.times)-1] }
func (o outcome) median() float64  { return o.times[len(o.times)/2] }

// compare runs s straight and several times through Larder, prints both and
// reports whether the median run met the goals.
func (b *bench) compare(ctx context.Context, s scenario) (bool, error) {
	fmt.Printf("\n%s: %s; bound %.2f s\n", s.name, s.about, s.bound())
	fmt.Printf("  %-8s %9s %9s %8s %8s %7s %8s %8s  %-39s %8s\n",
		"", "slowest s", "median s", "slow/bnd", "med/bnd", "copies", "answers", "requests", "CPU s: agents clients registry all idle", "peak RSS")
	if !s.seeded && !b.skipDirect { // with the registry down there is nothing to compare with
		direct, err := b.storm(ctx, s, false)
		if err != nil {
			return false, fmt.Errorf("direct: %w", err)
		}
		direct.print("direct", s)
	}
	if b.withFloor {
		if err := b.floor(ctx, s); err != nil {
			return false, err
		}
	}
	var runs []outcome
	for range b.runs {
		o, err := b.storm(ctx, s, true)
		if err != nil {
			return false, fmt.Errorf("larder: %w", err)
		}
		o.print("larder", s)
		runs = append(runs, o)
	}
	return judge(runs, s), nil
}

// judge holds the goals against the run with the median time, and against the
// worst copies and memory of all runs.
func judge(runs []outcome, s scenario) bool {
	slices.SortFunc(runs, func(a, z outcome) int { return cmp.Compare(a.slowest(), z.slowest()) })
	ratio := func(o outcome) float64 { return o.slowest() / s.bound() }
	median := ratio(runs[len(runs)/2])
	copies := slices.MaxFunc(runs, func(a, z outcome) int { return cmp.Compare(a.copies, z.copies) }).copies
	rss := slices.MaxFunc(runs, func(a, z outcome) int { return cmp.Compare(a.rss, z.rss) }).rss
	met := median <= s.goal && copies <= 1.02 && rss <= 96<<20
	fmt.Printf("  slowest %.2f x bound in the median of %d runs (%.2f to %.2f), at most %.3f copies and %d MiB\n",
		median, len(runs), ratio(runs[0]), ratio(runs[len(runs)-1]), copies, rss>>20)
	fmt.Printf("  goal: slowest <= %.2f x bound, copies <= 1.02, RSS <= 96 MiB: %s\n", s.goal, verdict(met))
	return met
}

func verdict(met bool) string {
	if met {
		return "met"
	}
	return "MISSED"
}

func (o outcome) print(label string, s scenario) {
	fmt.Printf("  %-8s %9.2f %9.2f %8.2f %8.2f %7.3f %8.3f %8d  %12.2f %7.2f %8.2f %4.1f %4.1f %4.0f MiB\n", label,
		o.slowest(), o.median(), o.slowest()/s.bound(), o.median()/s.bound(), o.copies, o.answered, o.requests,
		o.cost.agents, o.cost.clients, o.cost.registry, o.cost.all, o.cost.idle, float64(o.rss)/(1<<20))
}

// cost is processor time in seconds. What all has beyond the processes' sum is
// the kernel's work on interrupts, mostly shaping and delivering packets.
type cost struct {
	agents, clients, registry float64
	all, idle                 float64 // of the machine
}

func (c cost) since(before cost) cost {
	return cost{agents: c.agents - before.agents, registry: c.registry - before.registry, clients: c.clients - before.clients,
		all: c.all - before.all, idle: c.idle - before.idle}
}

// used reads what was used so far, clients left out: they tell themselves.
func (l *lab) used() (c cost) {
	for _, agent := range l.agents {
		c.agents += processTime(agent.Process.Pid)
	}
	if l.reg != nil {
		c.registry = processTime(l.reg.Process.Pid)
	}
	c.all, c.idle = machineTime()
	return c
}

const userHz = 100 // what /proc counts in, on every Linux that Go runs on

// processTime reads the user and system time of a live process; 0 if there is
// none.
func processTime(pid int) (seconds float64) {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0
	}
	// The command, in parentheses, may hold spaces; utime is field 14 (proc(5)).
	fields := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
	return (number(fields[11]) + number(fields[12])) / userHz
}

// machineTime sums up the first line of /proc/stat: user, nice, system, idle,
// iowait, irq, softirq, steal.
func machineTime() (busy, idle float64) {
	stat, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0, 0
	}
	line, _, _ := strings.Cut(string(stat), "\n")
	for i, f := range strings.Fields(line)[1:9] {
		if i == 3 || i == 4 {
			idle += number(f) / userHz
		} else {
			busy += number(f) / userHz
		}
	}
	return busy, idle
}

func number(s string) float64 {
	var f float64
	_, _ = fmt.Sscan(s, &f) // the kernel's own
	return f
}

// peakRSS is the most memory that any agent had so far, in bytes.
func (l *lab) peakRSS() (most int64) {
	for _, agent := range l.agents {
		status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", agent.Process.Pid))
		if err != nil {
			continue
		}
		for line := range strings.Lines(string(status)) {
			if value, ok := strings.CutPrefix(line, "VmHWM:"); ok {
				most = max(most, int64(number(strings.Fields(value)[0]))<<10)
			}
		}
	}
	return most
}

// printMachine names what the numbers were measured on.
func (b *bench) printMachine() {
	kernel, _ := os.ReadFile("/proc/sys/kernel/osrelease")
	fmt.Printf("%d CPUs, %s, %s, Linux %s", runtime.NumCPU(), cpuModel(), runtime.Version(), kernel)
	fmt.Println("All nodes share this machine's CPUs; caches and content stores are on one tmpfs; timers may be 2 ms late.")
}

func cpuModel() string {
	text, _ := os.ReadFile("/proc/cpuinfo")
	for line := range strings.Lines(string(text)) {
		if key, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(key) == "model name" {
			return strings.TrimSpace(value)
		}
	}
	return runtime.GOARCH
}
