package peer

import (
	"crypto/ed25519"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"math/big"
	"net"
	"time"
)

// keySize is the size of a cluster key.
const keySize = 32

// serverName is what links ask for. The speaker is in the certificate's common
// name; serverName only separates this protocol from others under the same CA.
const serverName = "peer.larder"

// trust is what follows from the cluster keys (I1): a CA for each, one leaf
// under the first, and the gossip keys.
type trust struct {
	leaf   tls.Certificate // this start's, under the first key's CA
	roots  *x509.CertPool  // the CAs of all keys, so that a key can be rolled
	gossip [][]byte        // the first encrypts, all decrypt
}

// newTrust derives a node's credentials. The signing key is fresh with each
// start.
func newTrust(keys [][]byte, name string, signer ed25519.PrivateKey) (*trust, error) {
	t := &trust{roots: x509.NewCertPool()}
	for i, k := range keys {
		if len(k) != keySize {
			return nil, fmt.Errorf("cluster key %d has %d bytes, want %d (see larder keygen)", i+1, len(k), keySize)
		}
		gossip, err := derive(k, "larder gossip 1")
		if err != nil {
			return nil, err
		}
		t.gossip = append(t.gossip, gossip)
		ca, caKey, err := deriveCA(k)
		if err != nil {
			return nil, err
		}
		t.roots.AddCert(ca)
		if i > 0 {
			continue
		}
		if t.leaf, err = issue(ca, caKey, name, signer); err != nil {
			return nil, err
		}
	}
	return t, nil
}

// derive is a key of 32 bytes for one purpose. The number in its name goes up when what is made
// from the key changes.
func derive(key []byte, what string) ([]byte, error) {
	return hkdf.Key(sha256.New, key, nil, what, 32)
}

// Clocks of nodes may be hours apart, so nothing here depends on the time: the
// CA is a function of the key alone, and validity spans decades.
var (
	validFrom = time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC)
	validTo   = time.Date(2200, 1, 1, 0, 0, 0, 0, time.UTC)
)

// deriveCA derives the same CA from the same key on every node: Ed25519
// signatures are deterministic.
func deriveCA(key []byte) (*x509.Certificate, ed25519.PrivateKey, error) {
	seed, err := derive(key, "larder peer ca 1")
	if err != nil {
		return nil, nil, err
	}
	k := ed25519.NewKeyFromSeed(seed)
	id := sha256.Sum256(k.Public().(ed25519.PublicKey))
	tmpl := &x509.Certificate{
		SerialNumber:          big.NewInt(1),
		Subject:               pkix.Name{CommonName: fmt.Sprintf("larder %x", id[:8])},
		NotBefore:             validFrom,
		NotAfter:              validTo,
		IsCA:                  true,
		BasicConstraintsValid: true,
		MaxPathLenZero:        true,
		KeyUsage:              x509.KeyUsageCertSign,
	}
	cert, err := certify(tmpl, tmpl, k.Public(), k)
	return cert, k, err
}

func issue(ca *x509.Certificate, caKey ed25519.PrivateKey, name string, signer ed25519.PrivateKey) (tls.Certificate, error) {
	serial := make([]byte, 16)
	rand.Read(serial)
	tmpl := &x509.Certificate{
		SerialNumber: new(big.Int).SetBytes(serial),
		Subject:      pkix.Name{CommonName: name},
		DNSNames:     []string{serverName},
		NotBefore:    validFrom,
		NotAfter:     validTo,
		KeyUsage:     x509.KeyUsageDigitalSignature,
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	cert, err := certify(tmpl, ca, signer.Public(), caKey)
	if err != nil {
		return tls.Certificate{}, err
	}
	return tls.Certificate{Certificate: [][]byte{cert.Raw}, PrivateKey: signer, Leaf: cert}, nil
}

func certify(tmpl, parent *x509.Certificate, pub any, key ed25519.PrivateKey) (*x509.Certificate, error) {
	der, err := x509.CreateCertificate(rand.Reader, tmpl, parent, pub, key)
	if err != nil {
		return nil, fmt.Errorf("make certificate: %w", err)
	}
	return x509.ParseCertificate(der)
}

// verifyAt is the one moment at which certificates are checked.
var verifyAt = time.Date(2100, 1, 1, 0, 0, 0, 0, time.UTC)

// config is for either side of a link. Tickets are off: they would keep a
// removed key alive.
func (t *trust) config() *tls.Config {
	return &tls.Config{
		MinVersion:             tls.VersionTLS13,
		Certificates:           []tls.Certificate{t.leaf},
		RootCAs:                t.roots,
		ClientCAs:              t.roots,
		ClientAuth:             tls.RequireAndVerifyClientCert,
		ServerName:             serverName,
		NextProtos:             []string{"larder-peer/1"},
		SessionTicketsDisabled: true,
		// Links carry bulk from their first byte; small records would be 90 writes for the first 128 KiB.
		DynamicRecordSizingDisabled: true,
		Time:                        func() time.Time { return verifyAt },
	}
}

var errNotMember = errors.New("certificate names somebody else")

// identity is the name and key in the peer's verified certificate.
func identity(c *tls.Conn) (string, ed25519.PublicKey, error) {
	certs := c.ConnectionState().PeerCertificates
	if len(certs) == 0 {
		return "", nil, errNotMember
	}
	pub, ok := certs[0].PublicKey.(ed25519.PublicKey)
	if !ok || certs[0].Subject.CommonName == "" {
		return "", nil, errNotMember
	}
	return certs[0].Subject.CommonName, pub, nil
}

// loopback reports whether an address (host:port, or an IP address) cannot be
// reached from elsewhere.
func loopback(addr string) bool {
	host, _, err := net.SplitHostPort(addr)
	if err != nil {
		host = addr
	}
	if host == "localhost" {
		return true
	}
	ip := net.ParseIP(host)
	return ip != nil && ip.IsLoopback()
}

// checkKeys refuses a swarm without a key beyond this machine.
func checkKeys(c Config) error {
	if len(c.Keys) > 0 {
		return nil
	}
	for _, a := range []string{c.Gossip, c.Data, c.Advertise} {
		if a != "" && !loopback(a) {
			return fmt.Errorf("peer address %s is not loopback and there is no cluster key: set peer.key_file (larder keygen makes one)", a)
		}
	}
	return nil
}
