package main

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"slices"
	"time"
)

// The floor is what the same machine and links need at the least: the simplest
// program that copies the image to every node in a chain, each node passing on
// what it gets over one TLS connection, checking it with one SHA-256 and
// writing it to a file. There is no registry, no client, no protocol and
// nothing that could go wrong. Its time and its processor time are what
// Larder's are to be measured by where the machine, and not the links, is the
// limit.

const (
	floorPort  = "5055"
	floorChunk = 64 << 10
)

// floor measures it and prints a line.
func (b *bench) floor(ctx context.Context, s scenario) error {
	l := &lab{bench: b, s: s}
	times, used, err := l.chain(ctx)
	if err = errors.Join(err, l.close()); err != nil {
		return fmt.Errorf("floor: %w", err)
	}
	slices.Sort(times)
	slowest := times[len(times)-1]
	fmt.Printf("  %-8s %9.2f %9.2f %8.2f %8.2f %7s %8s  %12.2f %7s %8s %4.1f %4.1f\n", "floor", slowest, times[len(times)/2],
		slowest/s.bound(), times[len(times)/2]/s.bound(), "", "", used.agents, "", "", used.all, used.idle)
	return nil
}

// chain runs the copiers.
func (l *lab) chain(ctx context.Context) ([]float64, cost, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Minute)
	defer cancel()
	if err := l.mount(ctx); err != nil {
		return nil, cost{}, err
	}
	var err error
	if l.net, err = newNetwork(ctx, fmt.Sprintf("storm%d", os.Getpid())); err != nil {
		return nil, cost{}, err
	}
	var copiers []client
	for host := 0; host <= l.s.nodes; host++ {
		rate := l.s.link
		if host == registryHost {
			rate = l.s.uplink
		}
		if err := l.net.attach(ctx, host, rate); err != nil {
			return nil, cost{}, err
		}
		c, err := l.startCopier(ctx, host)
		if err != nil {
			return nil, cost{}, err
		}
		copiers = append(copiers, c)
	}
	busy, idle := machineTime()
	for _, c := range copiers {
		if _, err := io.WriteString(c.in, "go\n"); err != nil {
			return nil, cost{}, err
		}
	}
	var times []float64
	var used cost
	for _, c := range copiers {
		var report pulled
		if err := errors.Join(json.NewDecoder(c.out).Decode(&report), c.cmd.Wait()); err != nil {
			return nil, cost{}, err
		}
		if report.Err != "" || report.Bytes != l.s.bytes() {
			return nil, cost{}, fmt.Errorf("%d bytes: %s", report.Bytes, report.Err)
		}
		times = append(times, report.Seconds)
		used.agents += report.CPU
	}
	used.all, used.idle = machineTime()
	used.all, used.idle = used.all-busy, used.idle-idle
	return times, used, nil
}

func (l *lab) startCopier(ctx context.Context, host int) (client, error) {
	if err := os.MkdirAll(l.nodeDir(host), 0o755); err != nil {
		return client{}, err
	}
	self, err := os.Executable()
	if err != nil {
		return client{}, err
	}
	args := []string{"copy", "-file", filepath.Join(l.nodeDir(host), "copy"), "-bytes", fmt.Sprint(l.s.bytes())}
	if host != registryHost {
		args = append(args, "-from", net.JoinHostPort(address(host-1), floorPort))
	}
	if host != l.s.nodes {
		args = append(args, "-listen", net.JoinHostPort(address(host), floorPort))
	}
	return startReady(l.net.inside(ctx, host, self, args...))
}

// copyMain is one copier.
func copyMain(_ context.Context, args []string) error {
	flags := flag.NewFlagSet("copy", flag.ContinueOnError)
	from := flags.String("from", "", "address to copy from; empty at the source")
	listen := flags.String("listen", "", "address to pass it on at; empty at the end")
	file := flags.String("file", "", "where to write it")
	size := flags.Int64("bytes", 0, "how many")
	if err := flags.Parse(args); err != nil {
		return err
	}
	c := copier{size: *size}
	config, err := floorConfig()
	if err != nil {
		return err
	}
	if c.file, err = os.Create(*file); err != nil {
		return err
	}
	var listener net.Listener
	if *listen != "" {
		if listener, err = tls.Listen("tcp", *listen, config); err != nil {
			return err
		}
	}
	if err := awaitGo(); err != nil {
		return err
	}
	begin, used := time.Now(), ownTime()
	if *from != "" {
		if c.in, err = tls.Dial("tcp", *from, config); err != nil {
			return err
		}
	}
	if listener != nil {
		if c.out, err = listener.Accept(); err != nil {
			return err
		}
	}
	err = c.run()
	report := pulled{Seconds: time.Since(begin).Seconds(), Bytes: c.done, CPU: (ownTime() - used).Seconds()}
	if err != nil {
		report.Err = err.Error()
	}
	return json.NewEncoder(os.Stdout).Encode(report)
}

// copier copies size bytes from in, or its own, to file and to out.
type copier struct {
	in   io.Reader
	out  net.Conn
	file *os.File
	size int64
	done int64
}

func (c *copier) run() error {
	buf := make([]byte, floorChunk)
	sum := sha256.New()
	for c.done < c.size {
		p := buf[:min(int64(len(buf)), c.size-c.done)]
		if c.in != nil {
			if _, err := io.ReadFull(c.in, p); err != nil {
				return err
			}
			sum.Write(p)
			if _, err := c.file.Write(p); err != nil {
				return err
			}
		}
		if c.out != nil {
			if _, err := c.out.Write(p); err != nil {
				return err
			}
		}
		c.done += int64(len(p))
	}
	if c.out == nil {
		return nil
	}
	return c.out.Close()
}

// floorConfig is for both ends; nobody is checked.
func floorConfig() (*tls.Config, error) {
	public, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(24 * time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, public, private)
	if err != nil {
		return nil, err
	}
	return &tls.Config{
		MinVersion: tls.VersionTLS13, InsecureSkipVerify: true,
		Certificates:                []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: private}},
		DynamicRecordSizingDisabled: true,
	}, nil
}
