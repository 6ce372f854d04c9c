package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"strconv"
	"sync"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// conn is a keep-alive HTTP/1.1 client that costs as little as one can: on a
// small machine it shares the processors with the server it measures.
type conn struct {
	tcp     net.Conn
	stop    func() bool
	r       *bufio.Reader
	request []byte
	buf     []byte
}

func dial(ctx context.Context, addr, path string) (*conn, error) {
	var d net.Dialer
	tcp, err := d.DialContext(ctx, "tcp", addr)
	if err != nil {
		return nil, err
	}
	return &conn{
		tcp:     tcp,
		stop:    context.AfterFunc(ctx, func() { tcp.Close() }), // ends reads
		r:       bufio.NewReaderSize(tcp, 16<<10),
		request: fmt.Appendf(nil, "GET %s HTTP/1.1\r\nHost: %s\r\nAccept: %s, */*\r\n\r\n", path, addr, ocispec.MediaTypeImageManifest),
		buf:     make([]byte, 1<<20),
	}, nil
}

// get does the request once and reads the answer to its end.
func (c *conn) get() (size int64, firstByte time.Duration, err error) {
	start := time.Now()
	if _, err := c.tcp.Write(c.request); err != nil {
		return 0, 0, err
	}
	size, err = c.header(func() { firstByte = time.Since(start) })
	if err != nil {
		return 0, 0, err
	}
	return size, firstByte, c.discard(size)
}

var contentLength = []byte("content-length:")

// header reads up to the body and returns its length.
func (c *conn) header(first func()) (size int64, err error) {
	size = -1
	for n := 0; ; n++ {
		line, err := c.r.ReadSlice('\n')
		if err != nil {
			return 0, err
		}
		if n == 0 {
			first()
			if !bytes.HasPrefix(line, []byte("HTTP/1.1 200 ")) {
				return 0, fmt.Errorf("answered %q", bytes.TrimSpace(line))
			}
		}
		line = bytes.TrimSpace(line)
		if len(line) == 0 {
			break
		}
		if len(line) > len(contentLength) && bytes.EqualFold(line[:len(contentLength)], contentLength) {
			if size, err = strconv.ParseInt(string(bytes.TrimSpace(line[len(contentLength):])), 10, 64); err != nil {
				return 0, err
			}
		}
	}
	if size < 0 {
		return 0, errors.New("answer without Content-Length")
	}
	return size, nil
}

func (c *conn) discard(n int64) error {
	buffered := min(int64(c.r.Buffered()), n)
	if _, err := c.r.Discard(int(buffered)); err != nil {
		return err
	}
	for n -= buffered; n > 0; {
		got, err := c.tcp.Read(c.buf[:min(n, int64(len(c.buf)))])
		if err != nil {
			return fmt.Errorf("%d bytes short: %w", n, err)
		}
		n -= int64(got)
	}
	return nil
}

func (c *conn) close() {
	c.stop()
	c.tcp.Close()
}

// load is what many connections together got.
type load struct {
	requests   int
	bytes      int64
	took       time.Duration
	firstBytes []float64 // seconds
}

// hammer repeats a request on so many connections, until each has done it n
// times or, for n = 0, until the time is over.
func hammer(ctx context.Context, addr, path string, conns, n int, d time.Duration) (load, error) {
	var all load
	var mu sync.Mutex // guards all and failed
	var failed error
	var workers sync.WaitGroup
	start := time.Now()
	for range conns {
		workers.Go(func() {
			one, err := repeat(ctx, addr, path, n, start.Add(d))
			mu.Lock()
			defer mu.Unlock()
			all.requests += one.requests
			all.bytes += one.bytes
			all.firstBytes = append(all.firstBytes, one.firstBytes...)
			failed = cmp.Or(failed, err)
		})
	}
	workers.Wait()
	all.took = time.Since(start)
	if failed != nil {
		return load{}, fmt.Errorf("GET %s%s: %w", addr, path, failed)
	}
	return all, nil
}

func repeat(ctx context.Context, addr, path string, n int, end time.Time) (load, error) {
	var l load
	c, err := dial(ctx, addr, path)
	if err != nil {
		return l, err
	}
	defer c.close()
	for n == 0 && time.Now().Before(end) || l.requests < n {
		size, first, err := c.get()
		if err != nil {
			return l, err
		}
		l.requests++
		l.bytes += size
		l.firstBytes = append(l.firstBytes, first.Seconds())
	}
	return l, nil
}

// readAll fetches a path once on a connection of its own.
func readAll(ctx context.Context, addr, path string) error {
	_, err := hammer(ctx, addr, path, 1, 1, 0)
	return err
}
