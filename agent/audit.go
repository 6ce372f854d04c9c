package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/http"
	"os"
	"sync/atomic"
	"time"

	"github.com/larder-cache/larder/agent/proxy"
	"github.com/prometheus/client_golang/prometheus"
)

const (
	// auditBytes is where the file is rotated, auditKeep how many old ones stay
	// (FILE.1 is the youngest): 320 MiB in all.
	auditBytes = 64 << 20
	auditKeep  = 4
	// auditQueue is how many lines may wait for the disk. A disk that is slower
	// than pulls loses lines, not pulls.
	auditQueue = 4096
)

// auditLog appends one JSON line per pull served or refused.
type auditLog struct {
	path  string
	limit int64
	log   *slog.Logger
	queue chan any
	lost  prometheus.Counter
	full  atomic.Int64 // lines that found the queue full, since the last warning

	// Run's only.
	file *os.File
	size int64
	kept bool // file is one that can be rotated, and no device
	sick bool // the last write failed; warned once
	// due is the size at which to rotate a file that could not be at limit; 0 is none.
	due int64
}

func newAuditLog(path string, log *slog.Logger) *auditLog {
	return &auditLog{
		path: path, limit: auditBytes, log: log, queue: make(chan any, auditQueue),
		lost: prometheus.NewCounter(prometheus.CounterOpts{Name: "larder_audit_lines_lost_total", Help: "Lines that the audit log lacks because its file could not be written, or not in time."}),
	}
}

// record queues one event; it never waits.
func (l *auditLog) record(event any) {
	select {
	case l.queue <- event:
	default:
		l.lost.Inc()
		l.full.Add(1)
	}
}

// Run writes until ctx ends, then writes what is still queued. A file that cannot be
// written is reported at the start, not at the first pull.
func (l *auditLog) Run(ctx context.Context) error {
	l.note(l.open())
	for {
		select {
		case e := <-l.queue:
			l.write(e)
		case <-ctx.Done():
			return l.finish()
		}
	}
}

func (l *auditLog) finish() error {
	for {
		select {
		case e := <-l.queue:
			l.write(e)
		default:
			return l.close()
		}
	}
}

// auditLine is one pull of a manifest or blob that was served, or a question that
// was refused.
type auditLine struct {
	Time       time.Time `json:"time"`
	Kind       string    `json:"kind"` // manifest or blob; tags or referrers if refused
	Method     string    `json:"method"`
	Registry   string    `json:"registry"`
	Repository string    `json:"repository"`
	Reference  string    `json:"reference"` // tag or digest, as asked for
	Source     string    `json:"source"`
	Decision   string    `json:"decision"`         // see larder_auth_decisions_total
	Caller     string    `json:"caller,omitempty"` // fingerprint of the credential that came, never the credential
	Status     int       `json:"status"`
	Bytes      int64     `json:"bytes"`
	Seconds    float64   `json:"seconds"`
	Client     string    `json:"client"`
	UserAgent  string    `json:"user_agent,omitempty"`
	Error      string    `json:"error,omitempty"` // set when the body ended short
}

// audited reports whether an exchange gets a line: content that was served, and
// what was refused. A challenge is not a refusal, since every pull of a private
// image begins with one.
func audited(e proxy.Event) bool {
	if e.Refused() {
		return true
	}
	content := e.Kind == proxy.KindManifest || e.Kind == proxy.KindBlob
	return content && e.Method == http.MethodGet && e.Status < http.StatusMultipleChoices
}

// auditPull records an exchange.
func (a *Agent) auditPull(e proxy.Event) {
	if !audited(e) {
		return
	}
	line := auditLine{
		Time: e.Time, Kind: string(e.Kind), Method: e.Method, Registry: e.Registry, Repository: e.Repository, Reference: e.Reference,
		Source: e.Source, Decision: e.Decision, Caller: e.Caller, Status: e.Status, Bytes: e.Bytes, Seconds: e.Duration.Seconds(), Client: e.Remote, UserAgent: e.UserAgent,
	}
	if e.Err != nil {
		line.Error = e.Err.Error()
	}
	a.audit.record(line)
}

func (l *auditLog) close() error {
	if l.file == nil {
		return nil
	}
	err := l.file.Close()
	l.file = nil
	if err != nil {
		return fmt.Errorf("close %s: %w", l.path, err)
	}
	return nil
}

func (l *auditLog) write(event any) {
	line, err := json.Marshal(event)
	if err == nil {
		err = l.append(append(line, '\n'))
	}
	if err != nil {
		l.lost.Inc()
	}
	if n := l.full.Swap(0); n > 0 {
		l.log.Warn("audit lines lost: the disk is too slow", "lines", n)
	}
	l.note(err)
}

// note logs an error that the line before did not have.
func (l *auditLog) note(err error) {
	if err != nil && !l.sick {
		l.log.Error("audit log cannot be written, and lacks what is served meanwhile", "err", err)
	}
	l.sick = err != nil
}

// append opens the file when it has to, so that a disk that was full or away
// is used again when it is back.
func (l *auditLog) append(line []byte) error {
	if l.file != nil && l.kept && l.size+int64(len(line)) > max(l.limit, l.due) {
		l.turn()
	}
	if l.file == nil {
		if err := l.open(); err != nil {
			return err
		}
	}
	n, err := l.file.Write(line)
	l.size += int64(n)
	if err != nil {
		return errors.Join(fmt.Errorf("write audit line: %w", err), l.close())
	}
	return nil
}

// open also opens for reading, for endLine. A file that is not regular, such as /dev/stdout,
// is written to as it is.
func (l *auditLog) open() error {
	f, err := os.OpenFile(l.path, os.O_CREATE|os.O_APPEND|os.O_RDWR, 0o600)
	if err != nil {
		return fmt.Errorf("open audit file: %w", err)
	}
	info, err := f.Stat()
	if err == nil && info.Mode().IsRegular() {
		err = endLine(f, info.Size())
	}
	if err != nil {
		return errors.Join(fmt.Errorf("open audit file: %w", err), f.Close())
	}
	l.file, l.size, l.kept = f, info.Size(), info.Mode().IsRegular()
	return nil
}

// endLine ends the line that a full disk or a kill cut short.
func endLine(f *os.File, size int64) error {
	last := []byte{'\n'}
	if size > 0 {
		if _, err := f.ReadAt(last, size-1); err != nil {
			return err
		}
	}
	if last[0] == '\n' {
		return nil
	}
	_, err := f.WriteString("\n")
	return err
}

// turn rotates the file. One that cannot be rotated, because it is itself a mount or
// its directory belongs to somebody else, keeps growing, and is tried again after it
// has grown by as much.
func (l *auditLog) turn() {
	err := l.rotate()
	if err == nil {
		l.due = 0
		return
	}
	if l.due == 0 {
		l.log.Error("audit log cannot be rotated, and grows", "err", err)
	}
	l.due = l.size + l.limit
}

func (l *auditLog) rotate() error {
	if err := l.close(); err != nil {
		return err
	}
	for i := auditKeep - 1; i >= 0; i-- {
		if err := os.Rename(l.old(i), l.old(i+1)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("rotate audit file: %w", err)
		}
	}
	return nil
}

// old names the i-th youngest rotated file; 0 is the one being written.
func (l *auditLog) old(i int) string {
	if i == 0 {
		return l.path
	}
	return fmt.Sprintf("%s.%d", l.path, i)
}
