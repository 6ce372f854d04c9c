package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/pprof"
	"net/netip"
	"net/url"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// serveAdmin serves admin.listen and metrics.listen.
func (a *Agent) serveAdmin(ctx context.Context) error {
	servers := map[net.Listener]*http.Server{a.listeners.admin: {Handler: a.adminHandler()}}
	if l := a.listeners.metrics; l != nil {
		servers[l] = newMetricsServer(a.metricsHandler())
	}
	failed := make(chan error, len(servers))
	var wg sync.WaitGroup
	for l, s := range servers {
		s.ReadHeaderTimeout = adminHeaderTimeout
		s.IdleTimeout = time.Minute
		s.ErrorLog = slog.NewLogLogger(a.log.Handler(), slog.LevelDebug)
		s.BaseContext = func(net.Listener) context.Context { return ctx }
		wg.Go(func() { failed <- s.Serve(l) })
	}
	var err error
	select {
	case <-ctx.Done():
	case err = <-failed:
	}
	for _, s := range servers {
		stopServer(s)
	}
	wg.Wait()
	return err
}

// newMetricsServer is for requests from other machines: a client that sends none,
// or does not read the answer, must not hold a connection forever.
func newMetricsServer(h http.Handler) *http.Server {
	return &http.Server{Handler: h, ReadTimeout: metricsTimeout, WriteTimeout: metricsTimeout}
}

const (
	// metricsTimeout is longer than anyone waits for a scrape.
	metricsTimeout = 30 * time.Second
	// adminHeaderTimeout is for a client to say what it wants; bodies have no bound, see
	// clientPatience.
	adminHeaderTimeout = 5 * time.Second
	// adminGrace lets a scrape or a status call under way finish.
	adminGrace = time.Second
)

func stopServer(s *http.Server) {
	ctx, cancel := context.WithTimeout(context.Background(), adminGrace)
	defer cancel()
	if s.Shutdown(ctx) != nil {
		_ = s.Close() // cuts what would not end; nothing is lost
	}
}

// adminHandler is everything on admin.listen.
func (a *Agent) adminHandler() http.Handler {
	mux := http.NewServeMux()
	a.probes(mux)
	mux.HandleFunc("GET /debug/pprof/", pprof.Index)
	mux.HandleFunc("GET /debug/pprof/cmdline", pprof.Cmdline)
	mux.HandleFunc("GET /debug/pprof/profile", pprof.Profile)
	mux.HandleFunc("GET /debug/pprof/symbol", pprof.Symbol)
	mux.HandleFunc("GET /debug/pprof/trace", pprof.Trace)
	mux.HandleFunc("GET /api/v1/status", a.serveStatus)
	mux.HandleFunc("GET /api/v1/explain", a.serveExplain)
	mux.HandleFunc("POST /api/v1/warm", a.serveWarm)
	mux.HandleFunc("GET /api/v1/pins", a.servePins)
	mux.HandleFunc("POST /api/v1/pins", a.servePin)
	mux.HandleFunc("DELETE /api/v1/pins", a.serveUnpin)
	mux.HandleFunc("POST /api/v1/forget", a.serveForget)
	mux.HandleFunc("POST /api/v1/import", a.serveImport)
	mux.HandleFunc("GET /api/v1/canary", a.serveCanary)
	mux.Handle("GET /api/v1/events", a.events)
	a.pageRoutes(mux)
	return localOnly(mux)
}

// metricsHandler is everything on metrics.listen, which others may reach.
func (a *Agent) metricsHandler() http.Handler {
	mux := http.NewServeMux()
	a.probes(mux)
	return mux
}

func (a *Agent) probes(mux *http.ServeMux) {
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	mux.HandleFunc("GET /readyz", a.serveReady)
	mux.Handle("GET /metrics", promhttp.HandlerFor(a.registry, promhttp.HandlerOpts{Registry: a.registry}))
}

// localOnly refuses what a web page elsewhere makes a browser on this node
// send: requests under another host name (DNS rebinding) and from another
// origin. Loopback alone does not stop those.
func localOnly(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !isLocalHost(r.Host) {
			http.Error(w, "ask for this API by a loopback address", http.StatusForbidden)
			return
		}
		if o := r.Header.Get("Origin"); o != "" && !sameOrigin(o, r.Host) || fetchedElsewhere(r) {
			http.Error(w, "requests from other origins are refused", http.StatusForbidden)
			return
		}
		w.Header().Set("X-Content-Type-Options", "nosniff")
		w.Header().Set("X-Frame-Options", "DENY")
		next.ServeHTTP(w, r)
	})
}

func isLocalHost(hostPort string) bool {
	host := hostPort
	if h, _, err := net.SplitHostPort(hostPort); err == nil {
		host = h
	}
	if host == "localhost" {
		return true
	}
	addr, err := netip.ParseAddr(strings.Trim(host, "[]"))
	return err == nil && addr.IsLoopback()
}

func sameOrigin(origin, host string) bool {
	u, err := url.Parse(origin)
	return err == nil && u.Scheme == "http" && u.Host == host
}

// fetchedElsewhere reports whether a browser says that a page of another origin makes it send
// the request (W3C, Fetch Metadata): it sends no Origin with a GET for an image or a frame,
// which would be enough to start an hour-long profile. A link to the page here may be followed.
func fetchedElsewhere(r *http.Request) bool {
	switch r.Header.Get("Sec-Fetch-Site") {
	case "", "none", "same-origin":
		return false
	}
	return r.URL.Path != "/" || r.Header.Get("Sec-Fetch-Dest") != "document"
}

func writeJSON(w http.ResponseWriter, status int, v any) {
	body, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_, _ = w.Write(append(body, '\n')) // a client that is gone needs no error
}

// serveReady answers probes: one line per reason, or JSON if the request asks
// for it.
func (a *Agent) serveReady(w http.ResponseWriter, r *http.Request) {
	checks := a.checks()
	status := http.StatusOK
	var reasons strings.Builder
	for _, c := range checks {
		if !c.OK {
			status = http.StatusServiceUnavailable
			fmt.Fprintf(&reasons, "not ready: %s: %s\n", c.Name, c.Reason)
		}
	}
	if strings.Contains(r.Header.Get("Accept"), "application/json") {
		writeJSON(w, status, map[string]any{"ready": status == http.StatusOK, "checks": checks})
		return
	}
	if status == http.StatusOK {
		fmt.Fprintln(w, "ready")
		return
	}
	http.Error(w, strings.TrimSpace(reasons.String()), status)
}

func (a *Agent) serveStatus(w http.ResponseWriter, _ *http.Request) {
	writeJSON(w, http.StatusOK, a.Status())
}

func (a *Agent) serveExplain(w http.ResponseWriter, r *http.Request) {
	q := r.URL.Query()
	image, err := ParseImage(q.Get("image"))
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	e, err := a.Explain(image, q.Get("platform"))
	if err != nil {
		status := http.StatusInternalServerError
		switch _, foreign := errors.AsType[*platformError](err); {
		case foreign || errors.Is(err, errUnknownImage):
			status = http.StatusNotFound
		case errors.Is(err, errNoPlatform):
			status = http.StatusBadRequest
		}
		http.Error(w, err.Error(), status)
		return
	}
	writeJSON(w, http.StatusOK, e)
}

func (a *Agent) serveCanary(w http.ResponseWriter, r *http.Request) {
	nonce := r.URL.Query().Get("nonce")
	if nonce == "" {
		http.Error(w, "want ?nonce=", http.StatusBadRequest)
		return
	}
	seen, ok := a.proxy.Canary(nonce)
	writeJSON(w, http.StatusOK, Canary{Seen: ok, At: seen.Seen, Registry: seen.Registry, UserAgent: seen.UserAgent})
}

func (a *Agent) serveWarm(w http.ResponseWriter, r *http.Request) {
	var req WarmRequest
	images, ok := readImages(w, r, &req, &req.Images)
	if !ok {
		return
	}
	if _, err := parsePlatform(req.Platform); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	w.Header().Set("Content-Type", "application/x-ndjson")
	out := a.newEventStream(w)
	for i, image := range images {
		out.send(a.warm(r.Context(), image, req, req.Images[i], out))
	}
}
