package cluster

import (
	"bufio"
	"crypto/ed25519"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"math/big"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/memberlist"
	"github.com/opencontainers/go-digest"
)

// rogue is a member that is no agent: it has the key, gossips as any node does, and
// speaks the protocol of package peer in code of its own, so that it can say what no
// agent would.
type rogue struct {
	c    *cluster
	node string // as agents name it
	name string // this start of it
	ip   string
	port int  // of the first of four, as a node's
	home bool // may be one, by what it tells
	key  ed25519.PrivateKey
	tls  *tls.Config
	// hears is given each frame that an agent sends, by the link's one reader.
	hears func(l *rogueLink, f frame)

	gossip *memberlist.Memberlist
	ln     net.Listener
	tasks  sync.WaitGroup

	mu    sync.Mutex // guards the following
	links map[*rogueLink]bool
	gone  bool
}

// Frames and methods of calls, by the numbers that package peer gives them.
const (
	frameHello   = 1
	framePing    = 2
	frameOpen    = 3
	frameHave    = 4
	frameClose   = 5
	frameRequest = 6
	frameGone    = 9
	frameData    = 11
	frameCall    = 12
	frameReply   = 13

	methodJoin     = 1
	methodPermit   = 2
	methodMay      = 4
	methodSnapshot = 6

	statusOK     = 0
	statusFailed = 1
)

type frame struct {
	kind byte
	body []byte
}

// join makes r, of which node, home and hears are set, a member that all agents see.
func (c *cluster) join(r *rogue) *rogue {
	c.t.Helper()
	var at node
	c.rogues = append(c.rogues, r.node)
	c.joined++
	c.place(&at, 200+c.joined)
	r.c, r.ip, r.port, r.links = c, at.ip, at.port, map[*rogueLink]bool{}
	r.name = fmt.Sprintf("%s~%011x", r.node, time.Now().UnixMilli()&(1<<44-1))
	secret, err := r.identify()
	if err == nil {
		r.ln, err = net.Listen("tcp", net.JoinHostPort(r.ip, strconv.Itoa(r.port+1)))
	}
	if err == nil {
		r.gossip, err = memberlist.Create(r.gossipConfig(secret))
	}
	if err == nil {
		_, err = r.gossip.Join([]string{c.nodes[0].gossip()})
	}
	if err != nil {
		c.t.Fatalf("%s: %v", r.node, err)
	}
	r.tasks.Go(r.accept)
	c.t.Cleanup(r.leave)
	all := append(names(c.nodes), c.rogues...)
	slices.Sort(all)
	c.awaitView(all, names(c.nodes)...)
	return r
}

// identify makes what proves that the rogue has the cluster's key, and returns the
// secret of the gossip.
func (r *rogue) identify() (gossip []byte, err error) {
	text, err := os.ReadFile(r.c.nodes[0].key)
	if err != nil {
		return nil, err
	}
	key, err := base64.StdEncoding.DecodeString(strings.TrimSpace(string(text)))
	if err != nil {
		return nil, err
	}
	seed, err := hkdf.Key(sha256.New, key, nil, "larder peer ca 1", 32)
	if err != nil {
		return nil, err
	}
	leaf, err := r.certificate(ed25519.NewKeyFromSeed(seed))
	if err != nil {
		return nil, err
	}
	r.tls = &tls.Config{
		Certificates: []tls.Certificate{leaf}, NextProtos: []string{"larder-peer/1"},
		InsecureSkipVerify: true, ClientAuth: tls.RequireAnyClientCert, // whoever they are
	}
	return hkdf.Key(sha256.New, key, nil, "larder gossip 1", 32)
}

func (r *rogue) certificate(authority ed25519.PrivateKey) (tls.Certificate, error) {
	pub, key, err := ed25519.GenerateKey(nil)
	if err != nil {
		return tls.Certificate{}, err
	}
	r.key = key
	id := sha256.Sum256(authority.Public().(ed25519.PublicKey))
	from, to := time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC), time.Date(2200, 1, 1, 0, 0, 0, 0, time.UTC)
	parent := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: fmt.Sprintf("larder %x", id[:8])}}
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: r.name}, DNSNames: []string{"peer.larder"},
		NotBefore: from, NotAfter: to, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}, parent, pub, authority)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, err
}

func (r *rogue) gossipConfig(secret []byte) *memberlist.Config {
	c := memberlist.DefaultLANConfig()
	c.Name, c.Label, c.SecretKey, c.EnableCompression = r.name, "larder/1", secret, false
	c.BindAddr, c.AdvertiseAddr, c.BindPort, c.AdvertisePort = r.ip, r.ip, r.port+2, r.port+2
	c.Delegate, c.LogOutput = gossipOf{r}, io.Discard
	return c
}

// gossipOf says what an agent would.
type gossipOf struct{ r *rogue }

func (g gossipOf) NodeMeta(int) []byte {
	head := byte(1 << 4)
	if g.r.home {
		head |= 1
	}
	b := binary.BigEndian.AppendUint16([]byte{head}, uint16(g.r.port+1))
	return append(b, g.r.key.Public().(ed25519.PublicKey)...)
}
func (gossipOf) NotifyMsg([]byte)                {}
func (gossipOf) GetBroadcasts(int, int) [][]byte { return nil }
func (gossipOf) LocalState(bool) []byte          { return nil }
func (gossipOf) MergeRemoteState([]byte, bool)   {}

// leave ends everything, once.
func (r *rogue) leave() {
	r.mu.Lock()
	over := r.gone
	r.gone = true
	for l := range r.links {
		l.conn.NetConn().Close()
	}
	r.mu.Unlock()
	if over {
		return
	}
	r.c.rogues = slices.DeleteFunc(r.c.rogues, func(name string) bool { return name == r.node })
	r.ln.Close()
	r.tasks.Wait()
	if err := errors.Join(r.gossip.Leave(time.Second), r.gossip.Shutdown()); err != nil {
		r.c.t.Error(err)
	}
}

// rogueLink is a connection with an agent. Its methods may be called by several
// goroutines; errors mean that the agent has closed it.
type rogueLink struct {
	conn *tls.Conn
	mu   sync.Mutex    // keeps frames whole
	over chan struct{} // closed once the link has ended
}

func (r *rogue) accept() {
	for {
		conn, err := r.ln.Accept()
		if err != nil {
			return
		}
		r.tasks.Go(func() { r.serve(r.link(tls.Server(conn, r.tls))) })
	}
}

// dial links with an agent and says who is there.
func (r *rogue) dial(n *node) (*rogueLink, error) {
	conn, err := net.DialTimeout("tcp", n.addr(n.ip, 1), patience)
	if err != nil {
		return nil, err
	}
	l := r.link(tls.Client(conn, r.tls))
	hello := append([]byte{1, byte(len(r.name))}, r.name...)
	hello = append(hello, 0) // no zone
	if err := l.send(frameHello, hello); err != nil {
		l.close()
		return nil, err
	}
	r.tasks.Go(func() { r.serve(l) })
	return l, nil
}

func (r *rogue) link(conn *tls.Conn) *rogueLink {
	l := &rogueLink{conn: conn, over: make(chan struct{})}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.links[l] = true
	if r.gone {
		l.close()
	}
	return l
}

// serve reads until the link ends, and pings meanwhile: silence is another bad day.
func (r *rogue) serve(l *rogueLink) {
	r.tasks.Go(l.ping)
	defer func() {
		l.close()
		close(l.over)
		r.mu.Lock()
		delete(r.links, l)
		r.mu.Unlock()
	}()
	br := bufio.NewReader(l.conn)
	for {
		var h [4]byte
		if _, err := io.ReadFull(br, h[:]); err != nil {
			return
		}
		f := frame{kind: h[0], body: make([]byte, int(h[1])<<16|int(h[2])<<8|int(h[3]))}
		if _, err := io.ReadFull(br, f.body); err != nil {
			return
		}
		r.hears(l, f)
	}
}

func (l *rogueLink) ping() {
	tick := time.NewTicker(500 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			if l.send(framePing, nil) != nil {
				return
			}
		case <-l.over:
			return
		}
	}
}

func (l *rogueLink) close() { l.conn.NetConn().Close() }

func (l *rogueLink) send(kind byte, body []byte) error {
	return l.write(frameOf(kind, body))
}

// write sends raw bytes.
func (l *rogueLink) write(p []byte) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	_, err := l.conn.Write(p)
	return err
}

func frameOf(kind byte, body []byte) []byte {
	n := len(body)
	return append([]byte{kind, byte(n >> 16), byte(n >> 8), byte(n)}, body...)
}

// openOf is the frame by which a node takes part in a blob of size bytes.
func openOf(d digest.Digest, size, pieceSize int64, have []byte) []byte {
	b := append([]byte(nil), rawOf(d)...)
	b = append(b, 0) // the first attempt
	b = binary.BigEndian.AppendUint64(b, uint64(size))
	b = binary.BigEndian.AppendUint32(b, uint32(pieceSize))
	return append(append(b, 0, 0), have...) // no pass
}

// callOf is a question.
func callOf(id uint32, method byte, body any) []byte {
	return append(append(binary.BigEndian.AppendUint32(nil, id), method, 0), marshal(body)...)
}

func marshal(v any) []byte {
	b, err := json.Marshal(v)
	if err != nil {
		panic(err)
	}
	return b
}

// replyTo is the answer to a question.
func replyTo(question frame, status byte, body any) []byte {
	return append(append(slices.Clone(question.body[:4]), status, 0), marshal(body)...)
}

// rawOf is the digest without its algorithm and without hex.
func rawOf(d digest.Digest) []byte {
	b, err := hex.DecodeString(d.Encoded())
	if err != nil {
		panic(err)
	}
	return b
}

// homeName finds a name whose bearer is a home of a blob, with so many agents before it.
func (c *cluster) homeName(d digest.Digest, before int) string {
	for i := 0; ; i++ {
		// Before "node": of two links the one that the smaller name dialed stays.
		name := "intruder-" + strconv.Itoa(i)
		better := 0
		for _, n := range c.nodes {
			if score(d, n.name) > score(d, name) {
				better++
			}
		}
		if better == before {
			return name
		}
	}
}

// score is the rendezvous hash of a node and a blob.
func score(d digest.Digest, node string) uint64 {
	h := fnv.New64a()
	h.Write([]byte(node))
	return mix(binary.BigEndian.Uint64(rawOf(d)) ^ mix(h.Sum64()))
}

// mix is the finaliser of splitmix64.
func mix(x uint64) uint64 {
	x += 0x9e3779b97f4a7c15
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}
