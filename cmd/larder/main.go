// Command larder is a node-level image cache for Kubernetes: a proxy on the
// loopback address that serves image blobs to containerd and CRI-O from this
// node's disk, then from other nodes, and only then from the registry.
package main

import (
	"crypto/rand"
	"encoding/base64"
	"fmt"
	"os"

	"github.com/spf13/cobra"
)

func main() {
	if err := newRoot().Execute(); err != nil {
		os.Exit(1)
	}
}

func newRoot() *cobra.Command {
	root := &cobra.Command{
		Use:          "larder",
		Short:        "A node-level image cache for Kubernetes",
		SilenceUsage: true,
	}
	root.AddCommand(newKeygen())
	return root
}

// keyBytes is the length of a cluster key, from which the gossip key and the
// peers' certificate authority are derived.
const keyBytes = 32

func newKeygen() *cobra.Command {
	return &cobra.Command{
		Use:   "keygen",
		Short: "Print a new cluster key (base64, 32 bytes)",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			key := make([]byte, keyBytes)
			rand.Read(key) // never fails: crypto/rand.Read, since Go 1.24
			_, err := fmt.Fprintln(cmd.OutOrStdout(), base64.StdEncoding.EncodeToString(key))
			return err
		},
	}
}
