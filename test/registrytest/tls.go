package registrytest

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"
)

// authority is a private CA that lives as long as its server.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority() (*authority, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("make CA key: %w", err)
	}
	a := &authority{key: key}
	a.cert = certTemplate("registrytest CA")
	a.cert.IsCA, a.cert.BasicConstraintsValid = true, true
	a.cert.KeyUsage = x509.KeyUsageCertSign
	der, err := x509.CreateCertificate(rand.Reader, a.cert, a.cert, key.Public(), key)
	if err != nil {
		return nil, fmt.Errorf("make CA: %w", err)
	}
	a.cert, err = x509.ParseCertificate(der)
	return a, err
}

func certTemplate(name string) *x509.Certificate {
	serial, err := rand.Int(rand.Reader, big.NewInt(1<<62))
	if err != nil {
		panic(err) // crypto/rand does not fail
	}
	return &x509.Certificate{
		SerialNumber: serial,
		Subject:      pkix.Name{CommonName: name},
		NotBefore:    time.Now().Add(-time.Hour),
		NotAfter:     time.Now().Add(24 * time.Hour),
	}
}

// issue makes a certificate for the loopback addresses, localhost and hosts,
// good for either end of a connection.
func (a *authority) issue(name string, hosts []string) (certPEM, keyPEM []byte, err error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, fmt.Errorf("make key: %w", err)
	}
	t := certTemplate(name)
	t.KeyUsage = x509.KeyUsageDigitalSignature
	t.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}
	t.DNSNames = append([]string{"localhost"}, hosts...)
	t.IPAddresses = []net.IP{net.ParseIP(loopback), net.IPv6loopback}
	der, err := x509.CreateCertificate(rand.Reader, t, a.cert, key.Public(), a.key)
	if err != nil {
		return nil, nil, fmt.Errorf("make certificate: %w", err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, nil, fmt.Errorf("encode key: %w", err)
	}
	return encodePEM("CERTIFICATE", der), encodePEM("PRIVATE KEY", pkcs8), nil
}

func encodePEM(kind string, der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
}

func (a *authority) pool() *x509.CertPool {
	pool := x509.NewCertPool()
	pool.AddCert(a.cert)
	return pool
}

func (a *authority) serverConfig(hosts []string, clients tls.ClientAuthType) (*tls.Config, error) {
	certPEM, keyPEM, err := a.issue("registrytest", hosts)
	if err != nil {
		return nil, err
	}
	cert, err := tls.X509KeyPair(certPEM, keyPEM)
	if err != nil {
		return nil, fmt.Errorf("load own certificate: %w", err)
	}
	return &tls.Config{
		Certificates: []tls.Certificate{cert},
		ClientCAs:    a.pool(),
		ClientAuth:   clients,
		NextProtos:   []string{"http/1.1"},
	}, nil
}

// CAFile writes the PEM of the private CA to dir and returns its path.
func (s *Server) CAFile(dir string) (string, error) {
	path := filepath.Join(dir, "ca.crt")
	return path, os.WriteFile(path, encodePEM("CERTIFICATE", s.ca.cert.Raw), 0o644)
}

// ClientCertFiles writes a certificate and key that the server takes from
// clients to dir, and returns their paths.
func (s *Server) ClientCertFiles(dir string) (certFile, keyFile string, err error) {
	certPEM, keyPEM, err := s.ca.issue("registrytest client", nil)
	if err != nil {
		return "", "", err
	}
	certFile, keyFile = filepath.Join(dir, "client.crt"), filepath.Join(dir, "client.key")
	if err := os.WriteFile(certFile, certPEM, 0o644); err != nil {
		return "", "", err
	}
	return certFile, keyFile, os.WriteFile(keyFile, keyPEM, 0o600)
}

// Client is an HTTP client that trusts the server's CA and has a certificate of
// its own for it. It decodes nothing and follows redirects. Close its idle
// connections when done.
func (s *Server) Client() (*http.Client, error) {
	t := &http.Transport{DisableCompression: true}
	if s.ca != nil {
		certPEM, keyPEM, err := s.ca.issue("registrytest client", nil)
		if err != nil {
			return nil, err
		}
		cert, err := tls.X509KeyPair(certPEM, keyPEM)
		if err != nil {
			return nil, fmt.Errorf("load client certificate: %w", err)
		}
		t.TLSClientConfig = &tls.Config{RootCAs: s.ca.pool(), Certificates: []tls.Certificate{cert}}
	}
	return &http.Client{Transport: t}, nil
}
