package hostsconfig

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
)

// TestDrift changes files under an active configuration in every way a user or
// a tool may, then repairs, then removes.
func TestDrift(t *testing.T) {
	const (
		docker = "certs.d/docker.io/hosts.toml"
		first  = "# first\n[host.\"https://first.x\"]\n"
		second = "# second\n[host.\"https://second.x\"]\n"
	)
	mirror := func(name string) []string {
		return []string{ours, "https://" + name + "/v2 pull,resolve,push", upstreamOf("registry-1.docker.io")}
	}
	tests := []struct {
		name     string
		change   func(t *testing.T, dir string)
		repaired float64
		want     []string // for docker.io
		left     tree     // after Remove; a value "gone" means nothing is there
	}{
		{
			name:   "overwritten in place",
			change: func(t *testing.T, dir string) { write(t, filepath.Join(dir, docker), second) },
			want:   mirror("second.x"), repaired: 1, left: tree{docker: second},
		},
		{
			name: "replaced by rename",
			change: func(t *testing.T, dir string) {
				write(t, filepath.Join(dir, "new"), second)
				must(t, os.Rename(filepath.Join(dir, "new"), filepath.Join(dir, docker)))
			},
			want: mirror("second.x"), repaired: 1, left: tree{docker: second},
		},
		{
			name: "edited around our part",
			change: func(t *testing.T, dir string) {
				data, err := os.ReadFile(filepath.Join(dir, docker))
				must(t, err)
				write(t, filepath.Join(dir, docker), strings.ReplaceAll(string(data), "first", "second"))
			},
			want: mirror("second.x"), repaired: 1, left: tree{docker: second},
		},
		{
			name: "our part edited",
			change: func(t *testing.T, dir string) {
				data, err := os.ReadFile(filepath.Join(dir, docker))
				must(t, err)
				write(t, filepath.Join(dir, docker), strings.Replace(string(data), `"pull", "resolve"`, `"pull"`, 1))
			},
			want: mirror("first.x"), repaired: 1, left: tree{docker: first},
		},
		{
			name:   "put back to the original",
			change: func(t *testing.T, dir string) { write(t, filepath.Join(dir, docker), first) },
			want:   mirror("first.x"), repaired: 1, left: tree{docker: first},
		},
		{
			name:   "deleted",
			change: func(t *testing.T, dir string) { must(t, os.Remove(filepath.Join(dir, docker))) },
			want:   mirror("first.x"), repaired: 1, left: tree{docker: first},
		},
		{
			name:   "directory deleted",
			change: func(t *testing.T, dir string) { must(t, os.RemoveAll(filepath.Join(dir, "certs.d/docker.io"))) },
			want:   []string{ours, upstreamOf("registry-1.docker.io")}, left: tree{"certs.d/docker.io": "gone", "certs.d/_default": "gone"},
		},
		{
			name:   "emptied",
			change: func(t *testing.T, dir string) { write(t, filepath.Join(dir, docker), "") },
			want:   []string{ours, upstreamOf("registry-1.docker.io")}, repaired: 1, left: tree{docker: ""},
		},
		{
			name:   "made malformed",
			change: func(t *testing.T, dir string) { write(t, filepath.Join(dir, docker), "bad") },
			want:   []string{upstreamOf("registry-1.docker.io")}, left: tree{docker: "bad"},
		},
		{
			name:   "our own directory deleted",
			change: func(t *testing.T, dir string) { must(t, os.RemoveAll(filepath.Join(dir, "certs.d/_default"))) },
			want:   mirror("first.x"), repaired: 1, left: tree{docker: first, "certs.d/_default": "gone"},
		},
		{
			name:   "our own file taken over",
			change: func(t *testing.T, dir string) { write(t, filepath.Join(dir, "certs.d/_default/hosts.toml"), second) },
			want:   mirror("first.x"), repaired: 1, left: tree{docker: first, "certs.d/_default/hosts.toml": second},
		},
		{
			name: "a new host directory",
			change: func(t *testing.T, dir string) {
				tree{"certs.d/new.x/hosts.toml": second}.write(t, dir)
			},
			want: mirror("first.x"), left: tree{docker: first, "certs.d/new.x/hosts.toml": second},
		},
		{
			name: "certificates put into our directory",
			change: func(t *testing.T, dir string) {
				tree{"certs.d/_default/ca.crt": string(testCA(t))}.write(t, dir)
			},
			want: mirror("first.x"), left: tree{docker: first, "certs.d/_default/hosts.toml": "gone"},
		},
		{
			name: "the journal deleted",
			change: func(t *testing.T, dir string) {
				must(t, os.RemoveAll(filepath.Join(dir, "certs.d", journalDir)))
			},
			want: mirror("first.x"), left: tree{docker: first, "certs.d/_default/hosts.toml": "gone"},
		},
		{
			name: "a backup deleted",
			change: func(t *testing.T, dir string) {
				backups, err := filepath.Glob(filepath.Join(dir, "certs.d", journalDir, "*.orig"))
				must(t, err)
				for _, b := range backups {
					must(t, os.Remove(b))
				}
			},
			want: mirror("first.x"), left: tree{docker: first},
		},
	}
	for _, repair := range []bool{true, false} {
		for _, tt := range tests {
			t.Run(fmt.Sprintf("%s, repaired %v", tt.name, repair), func(t *testing.T) {
				dir := t.TempDir()
				tree{docker: first}.write(t, dir)
				h := newHosts(t, Options{Containerd: filepath.Join(dir, "certs.d"), Registerer: prometheus.NewRegistry()})
				apply(t, h)
				tt.change(t, dir)
				if repair {
					h.mu.Lock()
					_, err := h.apply(t.Context(), true)
					h.mu.Unlock()
					must(t, err)
					if got := testutil.ToFloat64(h.metrics.repaired.WithLabelValues(containerd)); got != tt.repaired {
						t.Errorf("counted %v repairs, want %v", got, tt.repaired)
					}
					wantHosts(t, filepath.Join(dir, "certs.d"), "docker.io", tt.want...)
				}
				remove(t, h)
				for name, want := range tt.left {
					if _, err := os.Lstat(filepath.Join(dir, name)); want == "gone" {
						if !errors.Is(err, os.ErrNotExist) {
							t.Errorf("%s is still there", name)
						}
						continue
					}
					wantContent(t, filepath.Join(dir, name), want)
				}
				if _, err := os.Lstat(filepath.Join(dir, "certs.d", journalDir)); err == nil {
					t.Error("the journal is still there")
				}
			})
		}
	}
}

func write(tb testing.TB, path, text string) {
	tb.Helper()
	must(tb, os.WriteFile(path, []byte(text), 0o640))
}

// TestRace: a file that changes between reading and writing is left to the next pass, which
// takes it up.
func TestRace(t *testing.T) {
	const first, second = "# first\n", "# second\n"
	for name, tt := range map[string]struct {
		change func(path string) error
		want   string
	}{
		"replaced": {func(path string) error { return os.Rename(filepath.Join(filepath.Dir(path), "../new"), path) }, second},
		"edited":   {func(path string) error { return os.WriteFile(path, []byte(second), 0o640) }, second},
		"deleted":  {os.Remove, first},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			path := filepath.Join(dir, "a.x/hosts.toml")
			tree{"a.x/hosts.toml": first, "new": second}.write(t, dir)
			h := newHosts(t, Options{Containerd: dir})
			raced := false
			h.disk.step = func(op, at string) error {
				if op == "rename" && strings.HasSuffix(at, journalName) && !raced && fileHas(path, "first") {
					if backups, _ := filepath.Glob(filepath.Join(dir, journalDir, "*.orig")); len(backups) > 0 {
						raced = true
						return tt.change(path)
					}
				}
				return nil
			}
			if _, err := h.Apply(t.Context()); !errors.Is(err, errRaced) {
				t.Fatalf("Apply: %v, want errRaced", err)
			}
			if fileHas(path, testProxy) {
				t.Error("the file was written all the same")
			}
			apply(t, h)
			if !fileHas(path, strings.TrimSpace(tt.want)) || !fileHas(path, testProxy) {
				t.Error("the file was not taken up")
			}
			remove(t, h)
			wantContent(t, path, tt.want)
		})
	}
}

// TestLinkToOurs: a symlink is the user's, even one to a file that we have a part in,
// and is a symlink again in the end.
func TestLinkToOurs(t *testing.T) {
	dir := t.TempDir()
	tree{"a.x/hosts.toml": "[host.\"https://m.x\"]\n"}.write(t, dir)
	h := newHosts(t, Options{Containerd: dir})
	apply(t, h)
	tree{"b.x/hosts.toml": "-> ../a.x/hosts.toml"}.write(t, dir)
	apply(t, h)
	wantHosts(t, dir, "b.x", ours, "https://m.x/v2 pull,resolve,push", upstreamOf("b.x"))
	for _, im := range newHosts(t, Options{Containerd: dir, ProxyAddr: "127.0.0.1:6060"}).Upstreams() {
		if len(im.Endpoints) != 2 || im.Endpoints[0].Base != "https://m.x/v2" {
			t.Errorf("an agent on another port imports %+v", im)
		}
	}
	remove(t, h)
	wantContent(t, filepath.Join(dir, "b.x/hosts.toml"), "[host.\"https://m.x\"]\n")
	if target, err := os.Readlink(filepath.Join(dir, "b.x/hosts.toml")); err != nil || target != "../a.x/hosts.toml" {
		t.Errorf("the symlink is gone: %q, %v", target, err)
	}
}

// TestLinkLosesItsTarget: a symlink is the user's wherever it leads.
func TestLinkLosesItsTarget(t *testing.T) {
	dir := t.TempDir()
	tree{"certs.d/a.x/hosts.toml": "-> ../../shared.toml", "shared.toml": "[host.\"https://m.x\"]\n"}.write(t, dir)
	certs := filepath.Join(dir, "certs.d")
	h := newHosts(t, Options{Containerd: certs})
	apply(t, h)
	must(t, os.Remove(filepath.Join(dir, "shared.toml")))
	apply(t, h)
	wantHosts(t, certs, "a.x", ours, upstreamOf("a.x"))
	remove(t, h)
	if target, err := os.Readlink(filepath.Join(certs, "a.x/hosts.toml")); err != nil || target != "../../shared.toml" {
		t.Errorf("the symlink is gone: %q, %v", target, err)
	}
}

// TestLinkBehindALink: a relative link in a directory that is a link itself. It was followed
// from the wrong place: the second Apply lost the user's hosts, and a password's mode 0600.
func TestLinkBehindALink(t *testing.T) {
	dir := t.TempDir()
	tree{
		"certs.d/a.x": "-> ../elsewhere/v1/a.x", "elsewhere/v1/a.x/hosts.toml": "-> ../common.toml",
		"elsewhere/v1/common.toml": "[host.\"https://m.x\".header]\na = \"b\"\n",
	}.write(t, dir)
	must(t, os.Chmod(filepath.Join(dir, "elsewhere/v1/common.toml"), 0o600))
	before := snapshot(t, dir)
	certs := filepath.Join(dir, "certs.d")
	h := newHosts(t, Options{Containerd: certs})
	imports := fmt.Sprint(h.Upstreams())
	for range 2 {
		apply(t, h)
		wantHosts(t, certs, "a.x", ours, "https://m.x/v2 pull,resolve,push a=b", upstreamOf("a.x"))
		info, err := os.Stat(filepath.Join(certs, "a.x/hosts.toml"))
		must(t, err)
		if info.Mode() != 0o600 {
			t.Errorf("mode %v, want the target's 0600", info.Mode())
		}
	}
	if got := fmt.Sprint(h.Upstreams()); got != imports {
		t.Errorf("imported %s, before Apply %s", got, imports)
	}
	remove(t, h)
	wantSame(t, "not restored", before, snapshot(t, dir))
}

// TestLinkedLater: a host directory is a link to what is mounted only after the agent's start.
// That was taken for a deleted directory, and the original was thrown away.
func TestLinkedLater(t *testing.T) {
	dir := t.TempDir()
	tree{"certs.d/a.x": "-> ../mnt/a.x", "mnt/a.x/hosts.toml": "host = { \"https://m.x\" = { capabilities = [\"pull\"] } }\n"}.write(t, dir)
	before := snapshot(t, dir)
	for name, registries := range map[string][]string{"by *": {"*"}, "listed": {"a.x"}} {
		t.Run(name, func(t *testing.T) {
			opts := Options{Containerd: filepath.Join(dir, "certs.d"), Registries: registries}
			apply(t, newHosts(t, opts))
			must(t, os.Rename(filepath.Join(dir, "mnt"), filepath.Join(dir, "not-yet")))
			h := newHosts(t, opts)
			if changes := apply(t, h); len(changes) != 1 || changes[0].Action != Skip || !strings.Contains(changes[0].Reason, "../mnt/a.x") {
				t.Errorf("got %+v, want a Skip that names the target", changes)
			}
			if _, err := h.Remove(t.Context()); err == nil {
				t.Error("Remove says that all is restored")
			}
			must(t, os.Rename(filepath.Join(dir, "not-yet"), filepath.Join(dir, "mnt")))
			apply(t, h)
			wantHosts(t, opts.Containerd, "a.x", ours, upstreamOf("a.x"))
			remove(t, h)
			wantSame(t, "not restored", before, snapshot(t, dir))
		})
	}
}

// TestLinkMoves: the managed directory is reached by a link, which leads elsewhere after an
// update: MicroK8s' "current" to a copy of all that was there, ours included.
func TestLinkMoves(t *testing.T) {
	const first = "# first\n[host.\"https://first.x\"]\n"
	for name, next := range map[string]func(t *testing.T, dir string){
		"to a copy":            func(t *testing.T, dir string) { must(t, os.CopyFS(dir+"/2", os.DirFS(dir+"/1"))) },
		"to what nobody wrote": func(t *testing.T, dir string) { tree{"2/certs.d/docker.io/hosts.toml": first}.write(t, dir) },
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			tree{"1/certs.d/docker.io/hosts.toml": first, "current": "-> 1"}.write(t, dir)
			before := snapshot(t, filepath.Join(dir, "1"))
			certs := filepath.Join(dir, "current/certs.d")
			h := newHosts(t, Options{Containerd: certs, PollInterval: time.Hour, RemoveOnExit: true})
			stop := runInBackground(t, h)
			next(t, dir)
			must(t, os.Remove(filepath.Join(dir, "current")))
			apply(t, h) // a directory in its place would be in the way of the next link
			must(t, os.Symlink("2", filepath.Join(dir, "current")))
			apply(t, h)
			wantSame(t, "the former directory is not as it was", before, snapshot(t, filepath.Join(dir, "1")))
			wantHosts(t, certs, "docker.io", ours, "https://first.x/v2 pull,resolve,push", upstreamOf("registry-1.docker.io"))
			wantHosts(t, certs, "quay.io", ours, upstreamOf("quay.io"))
			stop()
			if left := snapshot(t, filepath.Join(dir, "2")); len(left) != len(before) {
				t.Errorf("left behind: %v", left)
			}
			wantContent(t, filepath.Join(certs, "docker.io/hosts.toml"), first)
		})
	}
}

// TestLinkAwayAtExit: the agent stops while the link to the managed directory is away.
func TestLinkAwayAtExit(t *testing.T) {
	dir := t.TempDir()
	tree{"1/certs.d/docker.io/hosts.toml": "# first\n", "current": "-> 1"}.write(t, dir)
	before := snapshot(t, filepath.Join(dir, "1"))
	h := newHosts(t, Options{Containerd: filepath.Join(dir, "current/certs.d"), PollInterval: time.Hour, RemoveOnExit: true})
	stop := runInBackground(t, h)
	must(t, os.Remove(filepath.Join(dir, "current")))
	stop()
	wantSame(t, "not restored", before, snapshot(t, filepath.Join(dir, "1")))
}

// TestUnwatchedIsSaidOnce: where inotify has no watch to give (fs.inotify.max_user_watches)
// each pass finds that again, for every directory.
func TestUnwatchedIsSaidOnce(t *testing.T) {
	dir := t.TempDir()
	tree{"certs.d/a.x/": ""}.write(t, dir)
	var logged strings.Builder
	h := newHosts(t, Options{Containerd: filepath.Join(dir, "certs.d"), hiddenRoots: []string{}, Logger: slog.New(slog.NewTextHandler(&logged, nil))})
	w := newWatcher(h)
	must(t, w.fs.Close()) // nothing can be added from now on
	for range 3 {
		w.renew()
	}
	for _, watched := range []string{dir, filepath.Join(dir, "certs.d"), filepath.Join(dir, "certs.d/a.x")} {
		if n := strings.Count(logged.String(), "path="+watched+" "); n != 1 {
			t.Errorf("%s is said to be polled %d times:\n%s", watched, n, logged.String())
		}
	}
}

// TestPutBackWithOtherMode: the file that a user put back is the one to keep,
// not only its bytes.
func TestPutBackWithOtherMode(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "a.x/hosts.toml")
	tree{"a.x/hosts.toml": "# first\n"}.write(t, dir)
	h := newHosts(t, Options{Containerd: dir})
	apply(t, h)
	must(t, os.Remove(path))
	must(t, os.WriteFile(path, []byte("# first\n"), 0o600))
	apply(t, h)
	remove(t, h)
	info, err := os.Stat(path)
	must(t, err)
	if info.Mode().Perm() != 0o600 {
		t.Errorf("restored with mode %v, want the user's latest", info.Mode())
	}
}

// TestGivesBackNoOldFile: what a user writes after the file was looked at is not undone by
// giving back what was there before us.
func TestGivesBackNoOldFile(t *testing.T) {
	dir := t.TempDir()
	tree{"a.x/hosts.toml": "# first\n", "b.x/hosts.toml": "# first\n"}.write(t, dir)
	apply(t, newHosts(t, Options{Containerd: dir, Registries: []string{"a.x", "b.x", "c.x"}}))
	h := newHosts(t, Options{Containerd: dir, Registries: []string{"d.x"}})
	h.disk.step = func(_, path string) error {
		if filepath.Dir(path) == filepath.Join(dir, "a.x") { // all is planned by now
			for _, name := range []string{"b.x", "c.x"} {
				tree{"new": "# second\n"}.write(t, dir)
				must(t, os.Rename(filepath.Join(dir, "new"), filepath.Join(dir, name, hostsName)))
			}
		}
		return nil
	}
	if _, err := h.Apply(t.Context()); !errors.Is(err, errRaced) {
		t.Errorf("Apply said %v, want that files were left alone", err)
	}
	for _, name := range []string{"b.x", "c.x"} {
		wantContent(t, filepath.Join(dir, name, hostsName), "# second\n")
	}
	h.disk.step = nil
	apply(t, h)
	remove(t, h)
	wantContent(t, filepath.Join(dir, "a.x/hosts.toml"), "# first\n")
	wantContent(t, filepath.Join(dir, "b.x/hosts.toml"), "# second\n")
	wantContent(t, filepath.Join(dir, "c.x/hosts.toml"), "# second\n")
}

// TestKeepsWhatItCannotRestore: Remove says which file it cannot give back, and the next one
// still can.
func TestKeepsWhatItCannotRestore(t *testing.T) {
	dir := t.TempDir()
	tree{"certs.d/a.x/hosts.toml": "# first\n"}.write(t, dir)
	path := filepath.Join(dir, "certs.d/a.x/hosts.toml")
	h := newHosts(t, Options{Containerd: filepath.Join(dir, "certs.d")})
	apply(t, h)
	must(t, os.Rename(path, path+".aside"))
	must(t, os.Symlink("nowhere", path))
	if _, err := h.Remove(t.Context()); err == nil || !strings.Contains(err.Error(), path+": cannot be restored") {
		t.Errorf("Remove said %v", err)
	}
	must(t, os.Rename(path+".aside", path))
	remove(t, h)
	wantContent(t, path, "# first\n")
	if _, err := os.Stat(filepath.Join(dir, "certs.d", journalDir)); err == nil {
		t.Error("the journal is still there")
	}
}

// TestJournalDamagedLater: a journal that is damaged while Run is on ended all repairs, and
// our part stayed in the files at exit.
func TestJournalDamagedLater(t *testing.T) {
	const first = "# first\n[host.\"https://m.x\"]\n"
	dir := t.TempDir()
	path := filepath.Join(dir, "a.x/hosts.toml")
	tree{"a.x/hosts.toml": first}.write(t, dir)
	h := newHosts(t, Options{Containerd: dir, RemoveOnExit: true, PollInterval: time.Hour})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- h.Run(ctx) }()
	eventually(t, "applied", func() bool { return h.InPlace() == nil })
	write(t, filepath.Join(dir, journalDir, journalName), "")
	write(t, path, first)
	apply(t, h)
	wantHosts(t, dir, "a.x", ours, "https://m.x/v2 pull,resolve,push", upstreamOf("a.x"))
	write(t, filepath.Join(dir, journalDir, journalName), "")
	cancel()
	if err := <-done; err == nil || !strings.Contains(err.Error(), "originals in it are kept") {
		t.Errorf("Run: %v, want that originals are kept", err)
	}
	wantContent(t, path, first)
	if _, err := os.Stat(filepath.Join(dir, defaultDir, hostsName)); err == nil {
		t.Error("our file in _default is left")
	}
}

// TestBadJournal: without a readable journal nothing is deleted, and what can
// be told from the files themselves is put right.
func TestBadJournal(t *testing.T) {
	dir := t.TempDir()
	tree{"certs.d/docker.io/hosts.toml": "# first\n"}.write(t, dir)
	h := newHosts(t, Options{Containerd: filepath.Join(dir, "certs.d")})
	apply(t, h)
	write(t, filepath.Join(dir, "certs.d", journalDir, journalName), "{")
	apply(t, h)
	if _, err := h.Remove(t.Context()); err == nil || !strings.Contains(err.Error(), "originals") {
		t.Errorf("Remove said %v, want a hint at the originals it keeps", err)
	}
	wantContent(t, filepath.Join(dir, "certs.d/docker.io/hosts.toml"), "# first\n")
	if backups, _ := filepath.Glob(filepath.Join(dir, "certs.d", journalDir, "*.orig")); len(backups) == 0 {
		t.Error("the originals were deleted")
	}
}

// TestJournalEscape: a journal is read by root; it must not lead elsewhere.
func TestJournalEscape(t *testing.T) {
	for _, doc := range []string{
		`{"version":1,"files":{"../../etc/passwd":{"ours":["x"]}}}`,
		`{"version":1,"files":{"/etc/passwd":{"ours":["x"]}}}`,
		`{"version":1,"files":{"a/hosts.toml":{"backup":"../../../etc/passwd"}}}`,
		`{"version":1,"files":{},"dirs":["../x"]}`,
		`{"version":1,"files":{},"link_dirs":["/../../x"]}`,
		`{"version":2,"files":{}}`,
	} {
		m := &managed{path: t.TempDir()}
		tree{journalDir + "/" + journalName: doc}.write(t, m.path)
		if err := m.load(); err == nil {
			t.Errorf("accepted %s", doc)
		}
	}
}

func TestTwoAgents(t *testing.T) {
	dir := t.TempDir()
	opts := Options{Containerd: filepath.Join(dir, "certs.d"), PollInterval: time.Hour, RemoveOnExit: true}
	first := newHosts(t, opts)
	stop := runInBackground(t, first)
	opts.ProxyAddr = "127.0.0.1:6060"
	second := newHosts(t, opts)
	for what, err := range map[string]error{
		"Run": second.Run(t.Context()), "Apply": second2(second.Apply(t.Context())), "Remove": second2(second.Remove(t.Context())),
	} {
		if !errors.Is(err, ErrBusy) || !strings.Contains(err.Error(), testProxy) {
			t.Errorf("%s of the second agent: %v, want ErrBusy that names the first", what, err)
		}
	}
	if _, err := second.Plan(t.Context()); err != nil {
		t.Errorf("Plan beside a running agent: %v", err)
	}
	wantHosts(t, opts.Containerd, "quay.io", ours, upstreamOf("quay.io"))
	stop()
	apply(t, second)
	remove(t, second)
}

func second2(_ []Change, err error) error { return err }

// runInBackground starts Run and waits until it has applied. The function it
// returns ends Run.
func runInBackground(t *testing.T, h *Hosts) func() {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- h.Run(ctx) }()
	eventually(t, "applied", func() bool { return h.InPlace() == nil })
	stop := func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	}
	return stop
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.After(20 * time.Second)
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-deadline:
			t.Fatalf("not %s in 20 s", what)
		case <-tick.C:
		}
	}
}

// TestRun watches for real: with notifications, and by polling alone.
func TestRun(t *testing.T) {
	for _, tt := range []struct {
		name string
		poll time.Duration
	}{{"notified", time.Hour}, {"polled", 50 * time.Millisecond}} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			crashTree.write(t, dir)
			before := snapshot(t, dir)
			opts := crashOptions(dir)
			opts.PollInterval, opts.RemoveOnExit = tt.poll, true
			imported := make(chan []Imported, 100)
			opts.OnImport = func(list []Imported) { imported <- list }
			h := newHosts(t, opts)
			stop := runInBackground(t, h)
			if list := <-imported; fmt.Sprint(list) != fmt.Sprint(h.Upstreams()) {
				t.Errorf("OnImport got %v", list)
			}

			docker := filepath.Join(dir, "certs.d/docker.io/hosts.toml")
			must(t, os.Remove(docker))
			eventually(t, "put back", func() bool {
				return containerdHosts(t, opts.Containerd, "docker.io")[0] == ours && fileHas(docker, "m.x")
			})

			write(t, docker, "[host.\"https://n.x\"]\n")
			eventually(t, "taken up", func() bool {
				return containerdHosts(t, opts.Containerd, "docker.io")[0] == ours && fileHas(docker, "n.x")
			})

			tree{"certs.d/new.x/hosts.toml": "server = \"https://s.x\"\n"}.write(t, dir)
			eventually(t, "picked up", func() bool { return containerdHosts(t, opts.Containerd, "new.x")[0] == ours })
			for list := range imported {
				if strings.Contains(fmt.Sprint(list), "new.x") {
					break
				}
			}

			conf := filepath.Join(dir, "containers/registries.conf")
			write(t, conf, "[[registry]]\nlocation = \"added.x\"\n")
			eventually(t, "rendered again", func() bool { return fileHas(filepath.Join(opts.CRIO, dropInName), "added.x") })

			must(t, os.RemoveAll(filepath.Join(dir, "certs.d/new.x")))
			for _, name := range []string{"containers/registries.conf", "certs.d/docker.io/hosts.toml"} {
				must(t, os.Remove(filepath.Join(dir, name)))
				tree{name: crashTree[name]}.write(t, dir)
			}
			stop()
			wantSame(t, "not restored", before, snapshot(t, dir))
			if h.InPlace() == nil {
				t.Error("InPlace after Run has removed everything")
			}
		})
	}
}

func fileHas(path, text string) bool {
	data, err := os.ReadFile(path)
	return err == nil && strings.Contains(string(data), text)
}

// TestRunKeepsOnRequest: without RemoveOnExit the files stay, and Remove finds
// them later.
func TestRunKeepsOnRequest(t *testing.T) {
	dir := t.TempDir()
	h := newHosts(t, Options{Containerd: filepath.Join(dir, "certs.d")})
	runInBackground(t, h)()
	wantHosts(t, filepath.Join(dir, "certs.d"), "quay.io", ours, upstreamOf("quay.io"))
	if changes := remove(t, newHosts(t, Options{Containerd: filepath.Join(dir, "certs.d")})); len(changes) != 1 {
		t.Errorf("removed %+v", changes)
	}
	if _, err := os.Stat(filepath.Join(dir, "certs.d")); err == nil {
		t.Error("the directory we created is still there")
	}
}

// TestFight: a program that insists on its own version gets its way for longer
// and longer, and one that writes twice an hour is repaired at once.
func TestFight(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLimiter()
		repairs := 0
		for range 3600 {
			if _, ok := l.allow("f"); ok {
				repairs++
			}
			<-time.After(time.Second)
		}
		if repairs < 8 || repairs > 25 {
			t.Errorf("%d repairs in an hour of fighting", repairs)
		}
		if wait, ok := l.next(); !ok || wait > maxBackoff {
			t.Errorf("next repair in %v, %v", wait, ok)
		}
		<-time.After(30 * time.Minute)
		for range 10 {
			if _, ok := l.allow("f"); !ok {
				t.Error("a change every 30 minutes had to wait")
			}
			<-time.After(30 * time.Minute)
		}
	})
}

// repair is what Run does when it sees a change.
func repair(t *testing.T, h *Hosts) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	_, err := h.apply(t.Context(), true)
	return err
}

// TestRepairsAreSpaced: a second change at once has to wait, but not for Apply.
func TestRepairsAreSpaced(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "a.x/hosts.toml")
	tree{"a.x/hosts.toml": "# first\n"}.write(t, dir)
	h := newHosts(t, Options{Containerd: dir})
	apply(t, h)
	write(t, path, "# second\n")
	must(t, repair(t, h))
	write(t, path, "# second\n")
	if err := repair(t, h); err == nil || !strings.Contains(err.Error(), "next repair") || fileHas(path, testProxy) {
		t.Errorf("a second repair at once: %v", err)
	}
	if apply(t, h); !fileHas(path, testProxy) {
		t.Error("Apply had to wait")
	}
}

// TestPutOffForNothing: a repair that was put off and is not needed any more is waited for
// no longer. Run looked at everything five times a second from then on.
func TestPutOffForNothing(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "a.x/hosts.toml")
	tree{"a.x/hosts.toml": "# first\n"}.write(t, dir)
	h := newHosts(t, Options{Containerd: dir})
	apply(t, h)
	write(t, path, "# second\n")
	must(t, repair(t, h))
	write(t, path, "# third\n")
	if err := repair(t, h); err == nil || h.nextLook() >= h.opts.PollInterval {
		t.Fatalf("a second repair at once was not put off: %v, next look in %v", err, h.nextLook())
	}
	must(t, os.RemoveAll(filepath.Dir(path)))
	must(t, repair(t, h))
	if got := h.nextLook(); got != h.opts.PollInterval {
		t.Errorf("next look in %v, want %v", got, h.opts.PollInterval)
	}
}

// TestLeftAloneIsSaidOnce: a malformed file is in the result of each Apply, and in the log
// once.
func TestLeftAloneIsSaidOnce(t *testing.T) {
	dir := t.TempDir()
	tree{"a.x/hosts.toml": "bad"}.write(t, dir)
	var logged strings.Builder
	h := newHosts(t, Options{Containerd: dir, Registries: []string{"a.x"}, Logger: slog.New(slog.NewTextHandler(&logged, nil))})
	for range 3 {
		if changes := apply(t, h); len(changes) != 1 || changes[0].Action != Skip {
			t.Errorf("got %+v, want a Skip", changes)
		}
	}
	if n := strings.Count(logged.String(), "left alone"); n != 1 {
		t.Errorf("said %d times:\n%s", n, logged.String())
	}
}

func TestErrorsSayWhatToDo(t *testing.T) {
	if os.Geteuid() == 0 {
		// Root may write everywhere: a directory that is a file stands in.
		dir := t.TempDir()
		tree{"certs.d": "a file"}.write(t, dir)
		h := newHosts(t, Options{Containerd: filepath.Join(dir, "certs.d")})
		if _, err := h.Apply(t.Context()); err == nil || !strings.Contains(err.Error(), "hosts.containerd") {
			t.Errorf("got %v, want an error that names the key", err)
		}
		if h.InPlace() == nil {
			t.Error("InPlace after a failed Apply")
		}
		h = newHosts(t, Options{Containerd: filepath.Join(dir, "other"), hiddenRoots: []string{filepath.Join(dir, "certs.d")}})
		if _, err := h.Apply(t.Context()); err == nil {
			t.Error("a further root that cannot be read is no error")
		}
		return
	}
	dir := t.TempDir()
	must(t, os.Chmod(dir, 0o555))
	h := newHosts(t, Options{Containerd: dir})
	if _, err := h.Apply(t.Context()); err == nil || !strings.Contains(err.Error(), "may write") {
		t.Errorf("got %v, want what to do", err)
	}
}

func TestNewRefuses(t *testing.T) {
	for name, opts := range map[string]Options{
		"no proxy":          {},
		"no port":           {ProxyAddr: "127.0.0.1"},
		"host name":         {ProxyAddr: "example.com:5050"},
		"relative":          {ProxyAddr: testProxy, Containerd: "certs.d"},
		"two roots":         {ProxyAddr: testProxy, Containerd: "/a:/b"},
		"path in a name":    {ProxyAddr: testProxy, Registries: []string{"../x"}},
		"default by name":   {ProxyAddr: testProxy, Registries: []string{"_default"}},
		"a repository":      {ProxyAddr: testProxy, Registries: []string{"quay.io/org"}},
		"hidden":            {ProxyAddr: testProxy, Registries: []string{".larder"}},
		"empty name":        {ProxyAddr: testProxy, Registries: []string{""}},
		"control character": {ProxyAddr: testProxy, Registries: []string{"a\nb"}},
	} {
		if _, err := New(opts); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	for in, want := range map[string]string{":5050": "127.0.0.1:5050", "0.0.0.0:5050": "127.0.0.1:5050", "localhost:1": "127.0.0.1:1", "[::1]:2": "[::1]:2", "[::]:3": "127.0.0.1:3"} {
		if got, err := proxyAddr(in); err != nil || got.String() != want {
			t.Errorf("proxyAddr(%q) = %v, %v", in, got, err)
		}
	}
}
