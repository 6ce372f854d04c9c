package upstream

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"flag"
	"fmt"
	"io"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"go.uber.org/goleak"
	"golang.org/x/net/http/httpproxy"

	"github.com/larder-cache/larder/agent/cache"
	"github.com/larder-cache/larder/test/registrytest"
)

func TestMain(m *testing.M) {
	flag.Parse()
	if err := flag.Set("test.parallel", "16"); err != nil { // they wait more than they compute
		panic(err)
	}
	goleak.VerifyTestMain(m)
}

// The cache's writer is what Fetch writes to; see also TestFetchIntoCache.
var _ Sink = (*cache.Writer)(nil)

const repo = "library/app"

// newClient is a client of the given registries with short patience.
func newClient(t testing.TB, edit func(*Config), registries ...Registry) *Client {
	t.Helper()
	cfg := Config{
		Registries: registries, Stall: 500 * time.Millisecond, FirstByte: time.Second,
		proxy: &httpproxy.Config{},
	}
	if edit != nil {
		edit(&cfg)
	}
	c, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// clientOf is a client of one registry, called "test", at the given servers.
func clientOf(t testing.TB, servers ...*registrytest.Server) *Client {
	t.Helper()
	return newClient(t, nil, registryOf(servers...))
}

func registryOf(servers ...*registrytest.Server) Registry {
	r := Registry{Host: "test", Auth: "node"} // node: withCredential decides
	for _, s := range servers {
		r.Upstreams = append(r.Upstreams, s.URL())
	}
	return r
}

var target = Target{Registry: "test", Repository: repo}

// memorySink is strict where the cache is: bytes go where a piece's written
// prefix ends or before, never beyond.
type memorySink struct {
	piece   int64
	discard bool // keep no bytes; check is of no use then

	mu     sync.Mutex // guards all below
	size   int64
	data   []byte
	have   []int64 // bytes of each piece's prefix
	wanted int64
	writes int
	fail   error
	at     func(written int64) // called with mu held, after each write
	total  int64
}

func newSink(piece int64) *memorySink { return &memorySink{piece: piece, size: -1} }

func (m *memorySink) SetSize(n int64) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.size >= 0 && m.size != n {
		return fmt.Errorf("size %d after %d", n, m.size)
	}
	if m.size < 0 {
		m.size, m.have = n, make([]int64, (n+m.piece-1)/m.piece)
		if !m.discard {
			m.data = make([]byte, n)
		}
	}
	return nil
}

func (m *memorySink) Size() int64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.size
}

func (m *memorySink) PieceSize() int64 { return m.piece }

func (m *memorySink) Wanted() int64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.wanted
}

func (m *memorySink) length(i int) int64 { return min(m.piece, m.size-int64(i)*m.piece) }

func (m *memorySink) Missing(off int64) (start, end int64, ok bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for i := int(off / m.piece); i < len(m.have); i++ {
		if m.have[i] == m.length(i) {
			continue
		}
		start = max(off, int64(i)*m.piece+m.have[i])
		for end = int64(i+1) * m.piece; i+1 < len(m.have) && m.have[i+1] == 0; i++ {
			end += m.piece
		}
		return start, min(end, m.size), true
	}
	return 0, 0, false
}

func (m *memorySink) WriteAt(p []byte, off int64) (int, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.fail != nil {
		return 0, m.fail
	}
	if m.size < 0 {
		return 0, errors.New("write before SetSize")
	}
	m.writes++
	for n := int64(0); n < int64(len(p)); {
		i := int((off + n) / m.piece)
		if i >= len(m.have) {
			return 0, fmt.Errorf("write at %d past the end %d", off, m.size)
		}
		at := off + n - int64(i)*m.piece
		if at > m.have[i] {
			return 0, fmt.Errorf("write at %d, but piece %d has only %d bytes", off, i, m.have[i])
		}
		k := min(int64(len(p))-n, m.length(i)-at)
		if !m.discard {
			copy(m.data[off+n:], p[n:n+k])
		}
		m.total += k
		m.have[i] = max(m.have[i], at+k)
		n += k
	}
	if m.at != nil {
		m.at(m.total)
	}
	return len(p), nil
}

// fill counts [from, to) as written, from a piece's start or prefix on.
func (m *memorySink) fill(from, to int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for from = max(from, 0); from < min(to, m.size); {
		i := from / m.piece
		m.have[i] = min(to-i*m.piece, m.length(int(i)))
		from = (i + 1) * m.piece
	}
}

// check verifies the sink's content against d.
func (m *memorySink) check(t testing.TB, d digest.Digest) {
	t.Helper()
	if _, _, missing := m.Missing(0); missing || m.size < 0 {
		t.Fatal("the sink is not full")
	}
	if got := fmt.Sprintf("sha256:%x", sha256.Sum256(m.data)); got != d.String() {
		t.Fatalf("the sink has %s, want %s", got, d)
	}
}

// content reads all of a registrytest content.
func content(t testing.TB, c registrytest.Content) []byte {
	t.Helper()
	var b bytes.Buffer
	if _, err := io.Copy(&b, io.NewSectionReader(c, 0, c.Size())); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}
