package main

import (
	"crypto/rand"
	"encoding/base64"
	"fmt"

	"github.com/spf13/cobra"
)

// keyBytes is the length of a cluster key, from which the gossip key and the
// peers' certificate authority are derived.
const keyBytes = 32

func newKeygen() *cobra.Command {
	return &cobra.Command{
		Use:   "keygen",
		Short: "Print a new cluster key (base64, 32 bytes)",
		Long: `Print a new cluster key: 32 random bytes in base64. Give every node of one
cluster the same key, in the file that peer.key_file names, and nobody else.`,
		Example: `  larder keygen > /etc/larder/cluster.key
  kubectl -n larder create secret generic larder --from-literal=key="$(larder keygen)"`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			key := make([]byte, keyBytes)
			rand.Read(key) // never fails: crypto/rand.Read, since Go 1.24
			_, err := fmt.Fprintln(cmd.OutOrStdout(), base64.StdEncoding.EncodeToString(key))
			return err
		},
	}
}
