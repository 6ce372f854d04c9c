package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/log"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/larder-cache/larder/test/runtimetest"
)

// image is what everybody pulls. The name resolves nowhere: where to go is
// said by hosts.toml alone, as for a registry mirror.
const (
	registryName = "registry.test"
	repository   = "library/app"
	tag          = "1"
)

// pulled is what one client reports.
type pulled struct {
	Seconds float64
	Bytes   int64
	CPU     float64 // seconds, of the pull alone
	Err     string
}

// pullMain pulls once with containerd's code: it says "ready" when it could
// start, waits for a line on standard input, and prints a pulled as JSON.
func pullMain(ctx context.Context, args []string) error {
	flags := flag.NewFlagSet("pull", flag.ContinueOnError)
	certs := flags.String("certs", "", "certs.d directory")
	root := flags.String("root", "", "content store")
	if err := flags.Parse(args); err != nil {
		return err
	}
	// containerd warns of a file system without fs-verity, which tmpfs is.
	if err := log.SetLevel("error"); err != nil {
		return err
	}
	client := &runtimetest.Containerd{CertsDir: *certs, Root: *root}
	if err := awaitGo(); err != nil {
		return err
	}
	begin, used := time.Now(), ownTime()
	result, err := client.Pull(ctx, registryName+"/"+repository+":"+tag, nil)
	report := pulled{Seconds: time.Since(begin).Seconds(), Bytes: result.Bytes, CPU: (ownTime() - used).Seconds()}
	if err != nil {
		report.Err = err.Error()
	}
	return json.NewEncoder(os.Stdout).Encode(report)
}

// awaitGo says that this process is ready and waits for the start.
func awaitGo() error {
	fmt.Println("ready")
	if _, err := bufio.NewReader(os.Stdin).ReadString('\n'); err != nil {
		return fmt.Errorf("wait for the start: %w", err)
	}
	return nil
}

// ownTime is the processor time that this process has used.
func ownTime() time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// pushMain pushes an image of random layers of the given sizes.
func pushMain(ctx context.Context, args []string) error {
	if len(args) != 2 {
		return errors.New("usage: storm push host:port sizes, with commas between")
	}
	var layers []v1.Layer
	for i, text := range strings.Split(args[1], ",") {
		size, err := strconv.ParseInt(text, 10, 64)
		if err != nil {
			return fmt.Errorf("layer size: %w", err)
		}
		content := make([]byte, size)
		_, _ = rand.NewChaCha8([32]byte{byte(i + 1)}).Read(content) // never fails
		layers = append(layers, static.NewLayer(content, types.OCILayer))
	}
	img, err := mutate.AppendLayers(mutate.MediaType(empty.Image, types.OCIManifestSchema1), layers...)
	if err != nil {
		return fmt.Errorf("build image: %w", err)
	}
	ref, err := name.NewTag(args[0]+"/"+repository+":"+tag, name.Insecure)
	if err != nil {
		return err
	}
	return remote.Write(ref, img, remote.WithContext(ctx))
}
