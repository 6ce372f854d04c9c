package agent

import (
	"context"
	"fmt"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/larder-cache/larder/agent/credentials"
	"github.com/larder-cache/larder/agent/upstream"
)

func (c NodeConfig) options() credentials.Options {
	return credentials.Options{ProviderConfig: c.ImageCredentialProviderConfig, ProviderBinDir: c.ImageCredentialProviderBinDir}
}

func (a *Agent) openCredentials() (*credentials.Keychain, error) {
	o := a.config.Node.options()
	o.Logger, o.Registerer = a.log, a.registry
	k, err := credentials.New(o)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", providerConfigKey, err)
	}
	return k, nil
}

// nodeCredentials is upstream.Config.Credentials.
func (a *Agent) nodeCredentials(ctx context.Context, r upstream.CredentialRequest) ([]authn.AuthConfig, error) {
	return a.credentials.Find(ctx, credentials.Request{
		File:    a.upstream.Policy(r.Registry).CredentialsFile,
		Names:   r.Names,
		Refresh: r.Refresh,
	})
}
