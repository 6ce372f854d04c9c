package agent

import (
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
)

// pipeListener accepts the one connection that it holds.
type pipeListener struct {
	conns chan net.Conn
	once  sync.Once
}

func (l *pipeListener) Accept() (net.Conn, error) {
	c, ok := <-l.conns
	if !ok {
		return nil, net.ErrClosed
	}
	return c, nil
}

func (l *pipeListener) Close() error {
	l.once.Do(func() { close(l.conns) })
	return nil
}

func (l *pipeListener) Addr() net.Addr { return &net.TCPAddr{} }

// closing tells when the server lets go of a connection.
type closing struct {
	net.Conn
	once sync.Once
	done chan struct{}
}

func (c *closing) Close() error {
	c.once.Do(func() { close(c.done) })
	return c.Conn.Close()
}

// TestMetricsServerLetsGo: metrics.listen is open to other machines. A connection
// that only takes up room ends; if it did not, this would be a deadlock.
func TestMetricsServerLetsGo(t *testing.T) {
	for name, request := range map[string]string{
		"the body never comes":      "GET /metrics HTTP/1.1\r\nHost: node\r\nContent-Length: 10\r\n\r\n",
		"the headers never end":     "GET /metrics HTTP/1.1\r\nHost: node\r\n",
		"the answer is never taken": "GET /metrics HTTP/1.1\r\nHost: node\r\n\r\n",
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				client, far := net.Pipe()
				server := &closing{Conn: far, done: make(chan struct{})}
				l := &pipeListener{conns: make(chan net.Conn, 1)}
				l.conns <- server
				s := newMetricsServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
					_, _ = io.WriteString(w, strings.Repeat("larder_cache_bytes 1\n", 1000))
				}))
				served := make(chan error, 1)
				go func() { served <- s.Serve(l) }()
				if _, err := io.WriteString(client, request); err != nil {
					t.Fatal(err)
				}
				if name != "the answer is never taken" {
					go func() { _, _ = io.Copy(io.Discard, client) }()
				}
				<-server.done
				_ = client.Close()
				_ = s.Close()
				<-served
			})
		})
	}
}
