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
	var secret string
	cmd := &cobra.Command{
		Use:   "keygen",
		Short: "Print a new cluster key (base64, 32 bytes)",
		Long: `Print a new cluster key: 32 random bytes in base64. Give every node of one
cluster the same key, in the file that peer.key_file names, and nobody else.

In a pod whose service account may create Secrets, --secret puts the key into a
Secret instead, and leaves one that exists as it is. The Secret belongs to the
service account and is deleted with it.`,
		Example: `  (umask 077 && larder keygen > /etc/larder/key)
  kubectl -n larder create secret generic larder --from-literal=key="$(larder keygen)"`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if secret == "" {
				_, err := fmt.Fprintln(cmd.OutOrStdout(), newKey())
				return err
			}
			p, err := thisPod(serviceAccountDir)
			if err != nil {
				return err
			}
			created, err := p.createSecret(cmd.Context(), secret, newKey())
			if err != nil {
				return fmt.Errorf("create the Secret %s in namespace %s: %w", secret, p.namespace, err)
			}
			outcome := "exists already and is kept"
			if created {
				outcome = "created"
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "Secret %s in namespace %s: %s\n", secret, p.namespace, outcome)
			return err
		},
	}
	cmd.Flags().StringVar(&secret, "secret", "", "create this Secret of the pod's namespace, unless it exists, and print no key")
	return cmd
}

func newKey() string {
	key := make([]byte, keyBytes)
	rand.Read(key) // never fails: crypto/rand.Read, since Go 1.24
	return base64.StdEncoding.EncodeToString(key)
}
