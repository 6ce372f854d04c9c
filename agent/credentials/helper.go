package credentials

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"time"

	"github.com/docker/docker-credential-helpers/credentials"
	"github.com/google/go-containerregistry/pkg/authn"
)

// helperHold is how long a helper's answer is good: its protocol does not say.
// Helpers of clouds give tokens of an hour and more, one that the registry
// refuses is asked for again at once, and a run costs a tenth of a second.
const helperHold = 5 * time.Minute

const helperPrefix = "docker-credential-"

// tokenUser marks a secret that is an identity token, in Docker's protocol.
const tokenUser = "<token>"

// helperQuestion is `docker-credential-NAME get` for a registry.
func helperQuestion(name, server string) question {
	key := "helper " + name + " " + server
	return question{
		program: helperPrefix + name,
		keys:    []string{key},
		wide:    key,
		ask: func(ctx context.Context) (string, answer, error) {
			auth, err := runHelper(ctx, name, server)
			auths := map[string]authn.AuthConfig{}
			if auth != (authn.AuthConfig{}) {
				auths[server] = auth
			}
			return key, answer{auths: auths, hold: helperHold}, err
		},
	}
}

// runHelper is the zero AuthConfig if the helper knows no credential.
func runHelper(ctx context.Context, name, server string) (authn.AuthConfig, error) {
	if strings.ContainsAny(name, "/\\") {
		return authn.AuthConfig{}, errors.New("want the end of a program's name, docker-credential-NAME, and not a path")
	}
	path, err := exec.LookPath(helperPrefix + name)
	if err != nil {
		return authn.AuthConfig{}, err
	}
	if server == hubName {
		server = hubKey // as docker login files it
	}
	out, err := run(ctx, command{path: path, args: []string{"get"}, env: os.Environ(), stdin: []byte(server)})
	if err != nil {
		if credentials.IsErrCredentialsNotFoundMessage(strings.TrimSpace(string(out))) {
			return authn.AuthConfig{}, nil
		}
		return authn.AuthConfig{}, fmt.Errorf("%w; to see what it says, run `echo %s | %s get` by hand", err, server, helperPrefix+name)
	}
	var c credentials.Credentials
	if json.Unmarshal(out, &c) != nil {
		return authn.AuthConfig{}, fmt.Errorf("what it printed (%d bytes) is no credential", len(out))
	}
	if c.Username == tokenUser {
		return authn.AuthConfig{IdentityToken: c.Secret}, nil
	}
	return authn.AuthConfig{Username: c.Username, Password: c.Secret}, nil
}
