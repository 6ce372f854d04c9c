package agent

import (
	"bufio"
	"encoding/base64"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/opencontainers/go-digest"
)

// swarm is the one place where package peer meets the rest of the agent: it
// gives the proxy a source, the peers a view of the cache, and the status API
// the members. A nil swarm is a node alone.
type swarm struct{}

// members lists the cluster as this node sees it, nil when alone.
func (s *swarm) members() []Member { return nil }

// holders names the peers that say they have d.
func (s *swarm) holders(digest.Digest) []string { return nil }

// describe is one line for `larder status`.
func (s *swarm) describe(p PeerConfig) string {
	switch {
	case !p.Enabled:
		return "off (peer.enabled = false)"
	case p.Alone():
		return "alone (no peer.key_file and no peer.join)"
	}
	return "alone"
}

const (
	keyLength = 32
	// maxKeys is one more than a roll needs: the new key, the old, and one that a
	// node was forgotten with.
	maxKeys = 3
)

// readKeys reads peer.key_file: a key in base64 on each line, the one to use
// first, then those still accepted while a roll is under way. Errors never
// repeat what is in the file.
func readKeys(path string) ([][]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("cannot be read: %w", errors.Unwrap(err))
	}
	defer f.Close()
	var keys [][]byte
	lines := bufio.NewScanner(f)
	for n := 1; lines.Scan(); n++ {
		line := strings.TrimSpace(lines.Text())
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		key, err := base64.StdEncoding.DecodeString(line)
		if err != nil || len(key) != keyLength {
			return nil, fmt.Errorf("line %d is not %d bytes in base64; write the file with `larder keygen`", n, keyLength)
		}
		keys = append(keys, key)
	}
	switch err := lines.Err(); {
	case err != nil:
		return nil, fmt.Errorf("cannot be read: %w", err)
	case len(keys) == 0:
		return nil, errors.New("holds no key; write one with `larder keygen`")
	case len(keys) > maxKeys:
		return nil, fmt.Errorf("holds more than %d keys; keep the new one, and the old one while it is rolled", maxKeys)
	}
	return keys, nil
}
