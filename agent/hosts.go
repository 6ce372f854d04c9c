package agent

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"reflect"
	"time"

	"github.com/larder-cache/larder/hostsconfig"
	"github.com/prometheus/client_golang/prometheus"
)

func (a *Agent) openHosts() error {
	h := a.config.Hosts
	if h.Containerd == "" && h.CRIO == "" {
		return nil
	}
	opts := HostsOptions(a.config, a.ProxyAddr(), a.log, a.registry)
	opts.OnImport = a.importsChanged
	hosts, err := hostsconfig.New(opts)
	if err != nil {
		return fmt.Errorf("hosts: %w", err)
	}
	a.hosts, a.imported = hosts, hosts.Upstreams()
	return nil
}

// importsChanged makes the upstreams follow what an operator changed in the
// runtimes' own registry configuration. The hosts' Run calls it, from one
// goroutine, even with what is known since the start.
func (a *Agent) importsChanged(now []hostsconfig.Imported) {
	if reflect.DeepEqual(now, a.imported) {
		return
	}
	a.imported = now
	a.log.Info("the runtimes' own registry configuration has changed; upstreams follow it")
	if err := a.upstream.SetRegistries(mergeImported(a.config.Registries, now, a.log)); err != nil {
		a.log.Error("keeping the former upstreams; restart the agent after mending the runtimes' registry configuration", "err", err)
	}
}

// HostsOptions are what hostsconfig is told by the configuration: also what
// `larder hosts` works with, so that both mean the same files. reg may be nil.
func HostsOptions(c Config, proxyAddr string, log *slog.Logger, reg prometheus.Registerer) hostsconfig.Options {
	return hostsconfig.Options{
		Containerd:   c.Hosts.Containerd,
		CRIO:         c.Hosts.CRIO,
		Contained:    os.Getenv("KUBERNETES_SERVICE_HOST") != "", // every pod has it
		ColonLink:    c.Hosts.ContainerdColonLink,
		ReloadCRIO:   c.Hosts.CRIOReload,
		Registries:   c.Hosts.Registries,
		ProxyAddr:    proxyAddr,
		RemoveOnExit: c.Hosts.RemoveOnExit,
		Logger:       log,
		Registerer:   reg,
	}
}

// hostsRetryMin doubles up to hostsRetryMax: an agent that this one replaces lets go of
// the directory within its drain, and a missing mount is not urgent.
const (
	hostsRetryMin = time.Second
	hostsRetryMax = 30 * time.Second
)

// runHosts keeps the host configuration in place. An error is no reason to
// stop serving: another agent may hold the directory while it is replaced by
// this one, or a mount may come late.
func (a *Agent) runHosts(ctx context.Context) error {
	for retry := hostsRetryMin; ; retry = min(2*retry, hostsRetryMax) {
		err := a.hosts.Run(ctx)
		if ctx.Err() != nil {
			return err
		}
		a.setHostsErr(cmp.Or(err, errHostsEnded))
		a.log.Error("host configuration is not managed; trying again", "err", err, "in", retry)
		if !pause(ctx, retry) {
			return nil
		}
		a.setHostsErr(nil)
	}
}

var errHostsEnded = errors.New("ended unexpectedly")

func (a *Agent) setHostsErr(err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.hostsErr = err
}

func (a *Agent) hostsInPlace() error {
	a.mu.Lock()
	err := a.hostsErr
	a.mu.Unlock()
	if err != nil {
		return err
	}
	return a.hosts.InPlace()
}

// leftoversTimeout bounds the cleanup after a failed start.
const leftoversTimeout = 10 * time.Second

// RemoveLeftovers undoes what a killed agent left in the host's files: they name
// a port on which now nobody, or somebody else, answers. It is for callers that
// do not start an agent with c after all; a failed New has done it already. c
// need not be valid: only the directories count, and one that another agent
// manages is left alone. Failures are logged.
func RemoveLeftovers(c Config, log *slog.Logger) {
	h := c.Hosts
	if !h.RemoveOnExit || h.Containerd == "" && h.CRIO == "" {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), leftoversTimeout)
	defer cancel()
	hosts, err := hostsconfig.New(hostsconfig.Options{
		Containerd: h.Containerd, CRIO: h.CRIO, ReloadCRIO: h.CRIOReload, Logger: log,
		ProxyAddr: Default().Proxy.Listen, // Remove does not look at it
	})
	if err == nil {
		var changes []hostsconfig.Change
		changes, err = hosts.Remove(ctx)
		for _, c := range changes {
			log.Info("took back host configuration of an earlier agent", "path", c.Path, "action", c.Action)
		}
	}
	if err != nil && !errors.Is(err, hostsconfig.ErrBusy) { // busy: another agent serves, and it is the owner
		log.Warn("host configuration of an earlier agent may be left", "err", err)
	}
}

func (a *Agent) hostsStatus() HostsStatus {
	s := HostsStatus{Containerd: a.config.Hosts.Containerd, CRIO: a.config.Hosts.CRIO}
	if a.hosts == nil {
		return s
	}
	s.Registries = a.config.Hosts.Registries
	if err := a.hostsInPlace(); err != nil {
		s.Problem = err.Error()
	}
	s.InPlace = s.Problem == ""
	return s
}
