package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"
	"time"

	"github.com/larder-cache/larder/agent"
	"github.com/spf13/cobra"
)

// adminAPI talks to the agent of this node.
type adminAPI struct{ base string }

// adminFlags is the --admin flag of the commands that ask a running agent.
type adminFlags struct {
	admin  string
	listen string // admin.listen, where the command has a --config and has read it
	cmd    *cobra.Command
}

func (f *adminFlags) bind(cmd *cobra.Command) {
	f.cmd = cmd
	cmd.Flags().StringVar(&f.admin, "admin", "", "the agent's admin API (default: LARDER_ADMIN, else admin.listen of the configuration, else http://127.0.0.1:5053)")
}

// api finds the agent: by --admin, LARDER_ADMIN, or the admin.listen of a configuration,
// which need not be right otherwise. It connects to nobody.
func (f *adminFlags) api() (adminAPI, error) {
	base := cmp.Or(f.admin, os.Getenv("LARDER_ADMIN"), f.listen)
	if base == "" {
		c, err := agent.Load(agent.Sources{Environ: os.Environ()})
		base = c.Admin.Listen
		f.note(err, "http://"+base)
	}
	if !strings.Contains(base, "://") {
		base = "http://" + base
	}
	u, err := url.Parse(base)
	if err != nil || u.Host == "" || u.Scheme != "http" {
		return adminAPI{}, usageError{fmt.Errorf("--admin %q: want http://HOST:PORT, such as http://127.0.0.1:5053", base)}
	}
	return adminAPI{base: strings.TrimSuffix(base, "/")}, nil
}

// note tells what keeps admin.listen from being known; about the rest of a configuration
// the agent complains, and not its clients.
func (f *adminFlags) note(err error, asked string) {
	joined, ok := err.(interface{ Unwrap() []error })
	if !ok || os.Getenv("LARDER_ADMIN_LISTEN") != "" { // which beats the file
		return
	}
	for _, one := range joined.Unwrap() {
		if p, ok := errors.AsType[*agent.Problem](one); ok && (p.Key == "" || strings.HasPrefix(p.Key, "admin")) {
			fmt.Fprintf(f.cmd.ErrOrStderr(), "note: %v; so %s is asked (--admin says where the agent is)\n", p, asked)
		}
	}
}

// quick bounds calls that read the agent's memory alone.
const quick = 10 * time.Second

// get reads a JSON answer into v.
func (a adminAPI) get(ctx context.Context, path string, v any) error {
	ctx, cancel := context.WithTimeout(ctx, quick)
	defer cancel()
	resp, err := a.do(ctx, http.MethodGet, path, nil)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if err := json.NewDecoder(resp.Body).Decode(v); err != nil {
		return fmt.Errorf("%s%s: not an answer of a larder agent: %w; say where that is with --admin", a.base, path, err)
	}
	plain(v)
	return nil
}

// do sends a request and turns everything but success into an error.
func (a adminAPI) do(ctx context.Context, method, path string, body any) (*http.Response, error) {
	var payload io.Reader
	if body != nil {
		b, err := json.Marshal(body)
		if err != nil {
			return nil, fmt.Errorf("%s%s: %w", a.base, path, err)
		}
		payload = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, a.base+path, payload)
	if err != nil {
		return nil, fmt.Errorf("%s%s: %w", a.base, path, err)
	}
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	return a.answer(req)
}

// answer sends a request whose answer is to be 200.
func (a adminAPI) answer(req *http.Request) (*http.Response, error) {
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, a.unreachable(err)
	}
	kind := resp.Header.Get("Content-Type")
	if resp.StatusCode == http.StatusOK && !strings.HasPrefix(kind, "text/html") {
		return resp, nil
	}
	defer resp.Body.Close()
	if !strings.HasPrefix(kind, "text/plain") {
		return nil, a.foreign(req, resp)
	}
	text, _ := io.ReadAll(io.LimitReader(resp.Body, 4<<10)) // whatever came before the error is better than nothing
	why := plainText(strings.TrimSpace(string(text)))
	if why == "" || why == "404 page not found" { // Go's own, of a path that the server does not have
		return nil, a.foreign(req, resp)
	}
	return nil, fmt.Errorf("%s (%s answers %s)", why, a.base, resp.Status)
}

// foreign says that what answers is something else, such as the pull API, a proxy in between,
// or an agent of another version.
func (a adminAPI) foreign(req *http.Request, resp *http.Response) error {
	return fmt.Errorf("%s answers %s to %s: not the admin API of an agent of this version; say where that is with --admin", a.base, resp.Status, req.URL.Path)
}

func (a adminAPI) unreachable(err error) error {
	why := err
	if u, ok := errors.AsType[*url.Error](err); ok {
		why = u.Err
	}
	if errors.Is(err, context.Canceled) {
		return why
	}
	if op, ok := errors.AsType[*net.OpError](err); ok {
		why = op.Err
	}
	return &unreachableError{base: a.base, why: why}
}

// unreachableError says that no agent answers.
type unreachableError struct {
	base string
	why  error
}

func (e *unreachableError) Error() string {
	return fmt.Sprintf("cannot reach the agent at %s: %v; is it running? Start it with `larder agent`, or say where it is with --admin", e.base, e.why)
}

func (e *unreachableError) Unwrap() error { return e.why }
