package hostsconfig

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
)

// reloadAfter tells CRI-O of changes that it does not see by itself. A failure
// costs the mirror and no pull, so it is logged alone.
func (h *Hosts) reloadAfter(changes []Change) {
	if !h.opts.ReloadCRIO || !slices.ContainsFunc(changes, func(c Change) bool { return c.ReloadNeeded && c.Action != Skip }) {
		return
	}
	pids, err := crioProcesses(h.proc)
	if err == nil && len(pids) == 0 {
		err = errors.New("no process of it is seen; the agent needs the node's process namespace (hostPID: true)")
	}
	for _, pid := range pids {
		if kerr := syscall.Kill(pid, syscall.SIGHUP); kerr != nil && !errors.Is(kerr, syscall.ESRCH) {
			err = errors.Join(err, fmt.Errorf("SIGHUP to process %d: %w", pid, kerr))
		}
	}
	if err != nil {
		h.log.Warn("CRI-O goes on with the registries it has read; run systemctl reload crio", "err", err)
		return
	}
	h.log.Info("CRI-O was told to read its registries anew", "runtime", crio)
}

// crioProcesses finds CRI-O: named crio, of this process's user (root, on a node),
// and in no process namespace of its own, for SIGHUP ends most other programs. All
// of that is in /proc/PID/status, which unlike /proc/PID/exe is readable without
// the right to trace.
func crioProcesses(proc string) ([]int, error) {
	files, err := filepath.Glob(filepath.Join(proc, "[0-9]*", "status"))
	if err != nil {
		return nil, err
	}
	var pids []int
	for _, name := range files {
		body, err := os.ReadFile(name)
		if err != nil || !isCRIO(body) {
			continue // gone meanwhile, or somebody else
		}
		if pid, err := strconv.Atoi(filepath.Base(filepath.Dir(name))); err == nil {
			pids = append(pids, pid)
		}
	}
	return pids, nil
}

func isCRIO(status []byte) bool {
	field := map[string][]string{}
	for line := range bytes.Lines(status) {
		name, value, _ := strings.Cut(string(line), ":")
		field[name] = strings.Fields(value)
	}
	return slices.Equal(field["Name"], []string{"crio"}) && len(field["NSpid"]) == 1 &&
		len(field["Uid"]) == 4 && field["Uid"][1] == strconv.Itoa(os.Geteuid()) // the effective one
}
