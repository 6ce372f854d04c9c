// Command bench measures one node side by side with what else could serve the
// same bytes: a real `larder agent` process against nginx, the distribution
// registry (Debian's docker-registry), and pulling straight from the registry.
//
// Whatever is compared runs in the same minutes on the same machine, in turns,
// and medians are compared: the ratios mean something, the absolute numbers are
// the machine's. All traffic is on loopback; the files are in -dir, which should
// be on the disk that a node would use. `make bench` runs it.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"regexp"
	"strings"
	"syscall"

	"github.com/containerd/log"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// settings are the command line.
type settings struct {
	larder, nginx, registry string
	dir, only, profile      string
	rounds                  int
	quick, keep             bool
}

func parse() settings {
	var s settings
	flag.StringVar(&s.larder, "larder", "", "the larder binary (default: build it)")
	flag.StringVar(&s.nginx, "nginx", "nginx", "the nginx binary")
	flag.StringVar(&s.registry, "registry", "docker-registry", "the distribution registry's binary")
	flag.StringVar(&s.dir, "dir", os.TempDir(), "where to put a directory for caches, stores and files")
	flag.StringVar(&s.only, "only", "", "regular expression of the sections to run: "+strings.Join(sectionNames(), ", "))
	flag.StringVar(&s.profile, "profile", "", "write CPU profiles of the agent to this directory")
	flag.IntVar(&s.rounds, "rounds", 7, "turns per comparison, of which medians are taken")
	flag.BoolVar(&s.quick, "quick", false, "a tenth of the bytes and seconds: shows that it works, not how fast")
	flag.BoolVar(&s.keep, "keep", false, "leave the directory with caches and logs")
	flag.Parse()
	return s
}

// section is a group of measurements that share their preparation.
type section struct {
	name string
	run  func(*bench, context.Context) error
}

var sections = []section{
	{"throughput", (*bench).throughput},
	{"requests", (*bench).requests},
	{"firstbyte", (*bench).firstByte},
	{"cold", (*bench).cold},
	{"memory", (*bench).memory},
}

func sectionNames() []string {
	var names []string
	for _, s := range sections {
		names = append(names, s.name)
	}
	return names
}

func run(ctx context.Context) error {
	s := parse()
	if err := log.SetLevel("error"); err != nil { // containerd's code, when it pulls
		return err
	}
	only, err := regexp.Compile(s.only)
	if err != nil {
		return fmt.Errorf("-only: %w", err)
	}
	b, err := newBench(ctx, s)
	if err != nil {
		return err
	}
	defer b.close()
	var errs []error
	for _, sec := range sections {
		if !only.MatchString(sec.name) || ctx.Err() != nil {
			continue
		}
		fmt.Fprintf(os.Stderr, "%s ...\n", sec.name)
		if err := sec.run(b, ctx); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", sec.name, err))
		}
	}
	// What was measured before a failure is worth its line.
	return errors.Join(append(errs, b.table.print(os.Stdout))...)
}
