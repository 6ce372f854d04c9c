package agent

import (
	"bytes"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spf13/pflag"
)

var update = flag.Bool("update", false, "rewrite golden files and the README's configuration table")

// contractDefaults are the keys and defaults users depend on. Keys may be
// added to Config; none of these may change.
var contractDefaults = map[string]string{
	"log.level": "info", "log.format": "text",
	"proxy.listen": "127.0.0.1:5050", "proxy.allow_remote": "false", "proxy.default_registry": "", "proxy.first_byte_budget": "5s",
	"cache.dir": "/var/lib/larder", "cache.max_bytes": "20%", "cache.min_free": "20%", "cache.scrub_interval": "24h", "cache.replicas": "2",
	"upstream.tag_ttl": "10s", "upstream.max_bytes_per_second": "0", "upstream.streams_per_blob": "4",
	"peer.enabled": "true", "peer.name": "", "peer.gossip": ":5052", "peer.data": ":5051", "peer.advertise": "", "peer.join": "",
	"peer.key_file": "", "peer.zone": "", "peer.home": "true", "peer.upstream_scope": "cluster",
	"peer.max_upload_bytes_per_second": "0", "peer.max_download_bytes_per_second": "0", "peer.max_uploads": "64",
	"hosts.containerd": "", "hosts.crio": "", "hosts.crio_reload": "false", "hosts.registries": "*", "hosts.remove_on_exit": "true", "hosts.containerd_colon_link": "false",
	"runtime.containerd_socket": "", "runtime.content_dir": "",
	"admin.listen": "127.0.0.1:5053", "metrics.listen": "", "audit.file": "",
}

func TestDefaultsAreTheContract(t *testing.T) {
	c := Default()
	got := map[string]string{}
	for _, k := range keysOf(&c) {
		got[k.Name] = k.Default
		if text := k.text(); text != k.Default {
			t.Errorf("%s: default %q parses to %q", k.Name, k.Default, text)
		}
		if k.Help == "" || strings.HasSuffix(k.Help, ".") {
			t.Errorf("%s: help %q: want one clause without a full stop", k.Name, k.Help)
		}
	}
	for name, want := range contractDefaults {
		if have, ok := got[name]; !ok || have != want {
			t.Errorf("%s: default %q (known: %v), want %q", name, have, ok, want)
		}
	}
	if err := c.Validate(); err != nil {
		t.Errorf("the defaults are not valid: %v", err)
	}
}

// text is the value as a user would write it on the command line.
func (k boundKey) text() string {
	switch v := k.value.Interface().(type) {
	case []string:
		return strings.Join(v, ",")
	case time.Duration:
		return shortDuration(v)
	default:
		return fmt.Sprint(v)
	}
}

// shortDuration is d without the zero units at its end: 24h, not 24h0m0s.
func shortDuration(d time.Duration) string {
	s := d.String()
	if strings.HasSuffix(s, "m0s") {
		s = strings.TrimSuffix(s, "0s")
	}
	if strings.HasSuffix(s, "h0m") {
		s = strings.TrimSuffix(s, "0m")
	}
	return s
}

func writeFile(t *testing.T, body string) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "larder.toml")
	if err := os.WriteFile(name, []byte(body), 0o600); err != nil {
		t.Fatal(err)
	}
	return name
}

func flags(t *testing.T, args ...string) *pflag.FlagSet {
	t.Helper()
	fs := pflag.NewFlagSet("larder", pflag.ContinueOnError)
	BindFlags(fs)
	if err := fs.Parse(args); err != nil {
		t.Fatal(err)
	}
	return fs
}

func TestPrecedence(t *testing.T) {
	file := writeFile(t, "[proxy]\nfirst_byte_budget = \"3s\"\ndefault_registry = \"file.example\"\n[upstream]\nstreams_per_blob = 2\n")
	tests := []struct {
		name    string
		environ []string
		args    []string
		want    time.Duration
	}{
		{name: "file over default", want: 3 * time.Second},
		{name: "environment over file", environ: []string{"LARDER_PROXY_FIRST_BYTE_BUDGET=4s"}, want: 4 * time.Second},
		{name: "flag over environment", environ: []string{"LARDER_PROXY_FIRST_BYTE_BUDGET=4s"}, args: []string{"--proxy.first_byte_budget=6s"}, want: 6 * time.Second},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			c, err := Load(Sources{Flags: flags(t, tt.args...), Environ: tt.environ, File: file})
			if err != nil {
				t.Fatal(err)
			}
			if c.Proxy.FirstByteBudget != tt.want {
				t.Errorf("first_byte_budget = %s, want %s", c.Proxy.FirstByteBudget, tt.want)
			}
			if c.Proxy.DefaultRegistry != "file.example" || c.Upstream.StreamsPerBlob != 2 {
				t.Errorf("the file's other keys are lost: %+v", c)
			}
		})
	}
}

// TestEveryKeyEveryWay sets each key by flag, by variable and by file.
func TestEveryKeyEveryWay(t *testing.T) {
	values := map[string]string{"bool": "false", "int": "7", "duration": "7s", "size": "7MiB", "list": "a.example,b.example", "string": "x"}
	var c Config
	for _, k := range keysOf(&c) {
		t.Run(k.Name, func(t *testing.T) {
			text := values[k.kind()]
			quoted := map[string]string{"bool": text, "int": text, "list": `["a.example", "b.example"]`}[k.kind()]
			if quoted == "" {
				quoted = `"` + text + `"`
			}
			table, leaf, _ := strings.Cut(k.Name, ".")
			ways := map[string]Sources{
				"flag":        {File: os.DevNull, Flags: flags(t, "--"+k.Name+"="+text)},
				"environment": {File: os.DevNull, Environ: []string{k.Env() + "=" + text}},
				"file":        {File: writeFile(t, fmt.Sprintf("[%s]\n%s = %s\n", table, leaf, quoted))},
			}
			for way, sources := range ways {
				got, _ := Load(sources) // "x" is no valid address; what counts is that it arrived
				i := slices.IndexFunc(keysOf(&got), func(g boundKey) bool { return g.Name == k.Name })
				if have := keysOf(&got)[i].text(); have != text {
					t.Errorf("by %s: %q, want %q", way, have, text)
				}
			}
		})
	}
}

func TestRegistryTables(t *testing.T) {
	c, err := Load(Sources{File: writeFile(t, `
[[registry]]
host = "docker.io"
upstreams = ["https://registry-1.docker.io", "http://10.0.0.1:5000/hub"]
tag_ttl = "30s"
contact_upstream = false

[[registry]]
host = "reg.example.com:5000"
max_bytes_per_second = "10MiB"
allow = ["team/**"]
deny = []
`)})
	if err != nil {
		t.Fatal(err)
	}
	if len(c.Registries) != 2 {
		t.Fatalf("%d tables, want 2", len(c.Registries))
	}
	hub, second := c.Registries[0], c.Registries[1]
	if len(hub.Upstreams) != 2 || hub.TTL(0) != 30*time.Second || hub.Contact() {
		t.Errorf("first table: %+v", hub)
	}
	if second.MaxBytesPerSecond != 10<<20 || !reflect.DeepEqual(second.Allow, []string{"team/**"}) || !second.Contact() {
		t.Errorf("second table: %+v", second)
	}
}

// TestProblems gives one wrong thing each and wants to read what to do.
func TestProblems(t *testing.T) {
	tests := []struct {
		name    string
		file    string
		environ []string
		args    []string
		want    []string // all of these in the message
		more    bool     // than one problem
	}{
		{name: "unknown key", file: "[proxy]\n\nlisten_ = \"127.0.0.1:1\"\n", want: []string{"proxy.listen_", "larder.toml:3", "did you mean proxy.listen?"}},
		{name: "tables for a table", file: "\n[[proxy]]\nlisten = \"127.0.0.1:1\"\n", want: []string{"proxy (", "larder.toml:2", "headed [proxy]"}},
		{name: "value for a table", file: "\nproxy = \"127.0.0.1:1\"\n", want: []string{"proxy (", "larder.toml:2", "headed [proxy]"}},
		{name: "negative tag_ttl", file: "[[registry]]\nhost = \"a.example\"\ntag_ttl = \"-1s\"\n", want: []string{`tag_ttl = "-1s": want 0`}},
		{name: "unknown key far from all", file: "[proxy]\nsomething_else_altogether = 1\n", want: []string{"proxy.something_else_altogether", "larder.toml:2", "unknown key"}},
		{name: "unknown table", file: "[prxy]\nlisten = \"127.0.0.1:1\"\n", want: []string{"prxy", "larder.toml:1", "did you mean proxy?"}},
		{name: "dotted unknown key", file: "cache.maxbytes = 3\n", want: []string{"cache.maxbytes", "larder.toml:1", "cache.max_bytes"}},
		{name: "key at top level", file: "listen = \"127.0.0.1:1\"\n", want: []string{"listen", "unknown key"}},
		{name: "inline table", file: "\nproxy = { listne = 3 }\n", want: []string{"proxy.listne", "larder.toml:2", "proxy.listen"}},
		{name: "unknown registry key", file: "[[registry]]\nhost = \"a.example\"\n[[registry]]\nhost = \"b.example\"\nupstream = [\"https://x\"]\n",
			want: []string{"registry[1].upstream", "larder.toml:5", "did you mean upstreams?"}},
		{name: "registry key of wrong type", file: "[[registry]]\nhost = \"a.example\"\nupstreams = 3\n", want: []string{"registry[0].upstreams", "larder.toml:3", `want a list, as in ["3"]`}},
		{name: "registry switch in quotes", file: "[[registry]]\nhost = \"a.example\"\ncontact_upstream = \"no\"\n", want: []string{"registry[0].contact_upstream", "true or false"}},
		{name: "registry number in quotes", file: "[[registry]]\nhost = \"a.example\"\nmax_connections = \"4\"\n", want: []string{"registry[0].max_connections", "whole number"}},
		{name: "registry string that is none", file: "[[registry]]\nhost = 7\n[[registry]]\nhost = \"b.example\"\nauth = true\n", want: []string{"registry[0].host", "registry[1].auth", "want a string"}, more: true},
		{name: "registry duration", file: "[[registry]]\nhost = \"a.example\"\ntag_ttl = true\n", want: []string{"registry[0].tag_ttl", `"10s"`}},
		{name: "registry duration without unit", file: "[[registry]]\nhost = \"a.example\"\ntag_ttl = \"10\"\n", want: []string{"registry[0].tag_ttl", "10s or 5m"}},
		{name: "registry twice", file: "[[registry]]\nhost = \"a.example\"\n[[registry]]\nhost = \"a.example\"\n", want: []string{"registry[1].host", "larder.toml:4", "merge"}},
		{name: "registry twice by two names", file: "[[registry]]\nhost = \"docker.io\"\n[[registry]]\nhost = \"Index.Docker.io\"\n", want: []string{"registry[1].host", "larder.toml:4", "merge"}},
		{name: "registry as table", file: "[registry]\nhost = \"a.example\"\n", want: []string{"[[registry]]"}},
		{name: "registry by pattern", file: "[[registry]]\nhost = \"*\"\n[[registry]]\nhost = \"*.example\"\n", more: true,
			want: []string{"larder.toml:1", `"*" is a pattern`, "larder.toml:3", `"*.example" is a pattern`, "write each host by its name"}},
		{name: "realm by pattern", file: "[[registry]]\nhost = \"a.example\"\ntoken_realms = [\"*.b.example\"]\n", want: []string{"token_realms", `"*.b.example" is a pattern`}},
		{name: "nothing allowed", file: "[[registry]]\nhost = \"a.example\"\nallow = []\n", want: []string{"larder.toml:1", "leave it out for all", `deny = ["**"]`}},
		{name: "registry with a wrong value", file: "[[registry]]\nhost = \"a.example\"\nauth = \"basic\"\n", want: []string{"larder.toml:1", "relay, node or anonymous"}},
		{name: "registry file missing", file: "[[registry]]\nhost = \"a.example\"\nca_file = \"/nonexistent/ca\"\n", want: []string{"registry[0].ca_file", "larder.toml:3", "no such file"}},
		{name: "ca_file without a certificate", file: "[[registry]]\nhost = \"a.example\"\nca_file = \"/dev/null\"\n", want: []string{"registry[0].ca_file", "larder.toml:3", "no certificate", "PEM"}},
		{name: "client certificate without one", file: "[[registry]]\nhost = \"a.example\"\nclient_key_file = \"/dev/null\"\nclient_cert_file = \"/dev/null\"\n",
			want: []string{"registry[0].client_cert_file", "larder.toml:4", "client_key_file", "failed to find any PEM data"}},
		{name: "syntax", file: "[proxy]\nlisten = \n", want: []string{"larder.toml:2", "not valid TOML"}},
		{name: "quoted number", file: "[upstream]\nstreams_per_blob = \"4\"\n", want: []string{"upstream.streams_per_blob", "larder.toml:2", "without quotes"}},
		{name: "bare duration", file: "[upstream]\ntag_ttl = 10\n", want: []string{"upstream.tag_ttl", `"10s"`}},
		{name: "string for a list", file: "[peer]\njoin = \"a:1\"\n", want: []string{"peer.join", `["a:1"]`}},
		{name: "not a size", args: []string{"--cache.max_bytes=lots"}, want: []string{"cache.max_bytes", "lots", "--cache.max_bytes", "50GiB"}},
		{name: "share where bytes are wanted", args: []string{"--upstream.max_bytes_per_second=5%"}, want: []string{"upstream.max_bytes_per_second", "50GiB"}},
		{name: "slip in a variable", environ: []string{"LARDER_PROXY_LISTN=127.0.0.1:1"}, want: []string{"LARDER_PROXY_LISTN", "LARDER_PROXY_LISTEN"}},
		{name: "proxy off loopback", args: []string{"--proxy.listen=0.0.0.0:5050"}, want: []string{"proxy.listen", "--proxy.listen", "allow_remote"}},
		{name: "proxy on every address", args: []string{"--proxy.listen=:5050"}, want: []string{"proxy.listen", "allow_remote"}},
		{name: "proxy on a name", args: []string{"--proxy.listen=localhost:5050"}, want: []string{"proxy.listen", "IP address"}},
		{name: "admin off loopback", environ: []string{"LARDER_ADMIN_LISTEN=10.0.0.1:5053"}, want: []string{"admin.listen", "LARDER_ADMIN_LISTEN", "metrics.listen"}},
		{name: "port clash", args: []string{"--admin.listen=127.0.0.1:5050"}, want: []string{"admin.listen", "proxy.listen has the same port"}},
		{name: "port clash with every address", args: []string{"--metrics.listen=:5053"}, want: []string{"metrics.listen", "admin.listen has the same port"}},
		{name: "no port to join at", args: []string{"--peer.join=127.0.0.1:99999,127.0.0.2:,127.0.0.3:0,[::1]:5052,::1"}, more: true, want: []string{"127.0.0.1:99999", "127.0.0.2:\" (", "127.0.0.3:0", "want host:port"}},
		{name: "peers without a key", args: []string{"--peer.join=10.0.0.2:5052"}, want: []string{"peer.key_file", "larder keygen"}},
		{name: "peers off loopback without a key", args: []string{"--peer.gossip=0.0.0.0:7777"}, want: []string{"peer.key_file", "larder keygen"}},
		{name: "pieces where nobody looks", args: []string{"--peer.gossip=127.0.0.1:5052", "--peer.data=127.0.0.2:5051"}, want: []string{"peer.data", "127.0.0.1"}},
		{name: "key file missing", args: []string{"--peer.key_file=/nonexistent/key"}, want: []string{"peer.key_file", "no such file"}},
		{name: "key file with no key in it", args: []string{"--peer.key_file=/dev/null"}, want: []string{"peer.key_file", "larder keygen"}},
		{name: "zone too long", args: []string{"--peer.zone=" + strings.Repeat("z", 64)}, want: []string{"peer.zone", "63"}},
		{name: "scope", args: []string{"--peer.upstream_scope=rack"}, want: []string{"peer.upstream_scope", "cluster, zone"}},
		{name: "relative hosts directory", args: []string{"--hosts.containerd=certs.d"}, want: []string{"hosts.containerd", "absolute"}},
		{name: "another name of Docker Hub", args: []string{"--hosts.registries=index.docker.io"}, want: []string{"hosts.registries", "list that"}},
		{name: "hosts registries", args: []string{"--hosts.registries=docker.io,https://quay.io"}, want: []string{"hosts.registries", "https://quay.io"}},
		{name: "budget", args: []string{"--proxy.first_byte_budget=2m"}, want: []string{"proxy.first_byte_budget", "30s"}},
		{name: "no replica at all", args: []string{"--cache.replicas=0"}, want: []string{"cache.replicas", "1 (no copies) to 8"}},
		{name: "file missing", want: []string{"cannot read the configuration", "no-such.toml"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			file := os.DevNull
			if tt.file != "" {
				file = writeFile(t, tt.file)
			}
			if tt.name == "file missing" {
				file = filepath.Join(t.TempDir(), "no-such.toml")
			}
			_, err := Load(Sources{Flags: flags(t, tt.args...), Environ: tt.environ, File: file})
			if err == nil {
				t.Fatal("accepted")
			}
			if n := len(unjoin(err)); n != 1 && !tt.more {
				t.Errorf("%d problems, want 1", n)
			}
			for _, w := range tt.want {
				if !strings.Contains(err.Error(), w) {
					t.Errorf("%q does not say %q", err, w)
				}
			}
		})
	}
}

func TestAllProblemsAtOnce(t *testing.T) {
	file := writeFile(t, "[proxy]\nlisten = 5050\nfrist_byte_budget = \"1s\"\n[log]\nlevel = \"loud\"\n")
	_, err := Load(Sources{File: file, Environ: []string{"LARDER_UPSTREAM_STREAMS_PER_BLOB=many"}, Flags: flags(t, "--admin.listen=0.0.0.0:1")})
	if n := len(unjoin(err)); n != 5 {
		t.Fatalf("%d problems, want 5:\n%v", n, err)
	}
}

// testKey is 32 bytes in base64.
const testKey = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="

func keyFile(t *testing.T, body string) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "key")
	if err := os.WriteFile(name, []byte(body), 0o600); err != nil {
		t.Fatal(err)
	}
	return name
}

func TestKeyFiles(t *testing.T) {
	for name, tt := range map[string]struct {
		body, want string
		keys       int
	}{
		"one":       {body: testKey + "\n", keys: 1},
		"two":       {body: testKey + "\n\n" + testKey, keys: 2},
		"empty":     {body: "\n", want: "no key"},
		"words":     {body: "secret\n", want: "line 1"},
		"too short": {body: testKey + "\nAAEC\n", want: "line 2"},
		"too many":  {body: strings.Repeat(testKey+"\n", maxKeys+1), want: "more than"},
	} {
		keys, err := readKeys(keyFile(t, tt.body))
		if tt.want == "" && (err != nil || len(keys) != tt.keys || len(keys[0]) != 32) {
			t.Errorf("%s: %d keys, %v", name, len(keys), err)
		}
		if tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want) || strings.Contains(err.Error(), "secret")) {
			t.Errorf("%s: %v, want %q", name, err, tt.want)
		}
	}
}

// TestAccepted holds configurations that must stay valid.
func TestAccepted(t *testing.T) {
	key := keyFile(t, "# rolled in spring\n"+testKey+"\n"+testKey+"\n")
	for name, args := range map[string][]string{
		"remote proxy":          {"--proxy.listen=0.0.0.0:5050", "--proxy.allow_remote"},
		"IPv6 loopback":         {"--proxy.listen=[::1]:5050"},
		"metrics for all":       {"--metrics.listen=:9095"},
		"peers with a key":      {"--peer.join=larder-peers:5052,10.0.0.3", "--peer.key_file=" + key},
		"peers on loopback":     {"--peer.gossip=127.0.0.1:0", "--peer.data=127.0.0.1:0", "--peer.join=127.0.0.2:5052"},
		"peers off":             {"--peer.enabled=false", "--peer.join=10.0.0.2:5052"},
		"every port chosen":     {"--proxy.listen=127.0.0.1:0", "--admin.listen=127.0.0.1:0"},
		"list given twice":      {"--hosts.registries=docker.io", "--hosts.registries=reg.example.com:5000"},
		"same port, other host": {"--proxy.listen=127.0.0.1:5050", "--admin.listen=127.0.0.2:5050"},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := Load(Sources{Flags: flags(t, args...), File: os.DevNull, Environ: []string{"LARDER_PORT=tcp://10.0.0.1:80", "LARDER_SERVICE_HOST=10.0.0.1"}}); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestAlone(t *testing.T) {
	for name, tt := range map[string]struct {
		change func(*PeerConfig)
		want   bool
	}{
		"told nothing": {func(*PeerConfig) {}, true},
		"off":          {func(p *PeerConfig) { p.Enabled, p.Join = false, []string{"a"} }, true},
		"join":         {func(p *PeerConfig) { p.Join = []string{"a"} }, false},
		"key":          {func(p *PeerConfig) { p.KeyFile = "/key" }, false},
		"address":      {func(p *PeerConfig) { p.Gossip = "127.0.0.1:0" }, false},
	} {
		p := Default().Peer
		tt.change(&p)
		if p.Alone() != tt.want {
			t.Errorf("%s: alone = %v, want %v", name, p.Alone(), tt.want)
		}
	}
}

const tableBegin, tableEnd = "<!-- configuration: begin -->", "<!-- configuration: end -->"

// configurationTable is the README's table, from the tags of Config.
func configurationTable() string {
	var b strings.Builder
	b.WriteString("| key | default | meaning |\n|---|---|---|\n")
	var c Config
	for _, k := range keysOf(&c) {
		def := "`" + k.Default + "`"
		switch {
		case k.Shown != "":
			def = k.Shown
		case k.kind() == "list":
			def = "`" + strings.ReplaceAll(fmt.Sprintf("%q", splitList(k.Default)), `" "`, `", "`) + "`"
		case k.Default == "":
			def = "`\"\"`"
		}
		fmt.Fprintf(&b, "| `%s` | %s | %s |\n", k.Name, def, strings.ReplaceAll(k.Help, "|", `\|`))
	}
	return b.String()
}

// TestReadmeTable compares the README with the struct; -update rewrites it.
func TestReadmeTable(t *testing.T) {
	const readme = "../README.md"
	body, err := os.ReadFile(readme)
	if err != nil {
		t.Fatal(err)
	}
	before, rest, ok := bytes.Cut(body, []byte(tableBegin+"\n"))
	have, after, alsoOK := bytes.Cut(rest, []byte(tableEnd))
	if !ok || !alsoOK {
		t.Fatalf("README.md has no %s ... %s", tableBegin, tableEnd)
	}
	want := configurationTable()
	if string(have) == want {
		return
	}
	if !*update {
		t.Fatal("README.md's configuration table is not what Config says; run: go test ./agent -run TestReadmeTable -update")
	}
	out := slices.Concat(before, []byte(tableBegin+"\n"+want+tableEnd), after)
	if err := os.WriteFile(readme, out, 0o644); err != nil {
		t.Fatal(err)
	}
}

// FuzzLoad feeds the file loader foreign bytes: it must not panic, and every
// problem must say where it is and what is wrong.
func FuzzLoad(f *testing.F) {
	f.Add([]byte("[proxy]\nlisten = \"127.0.0.1:1\"\n[[registry]]\nhost = \"a\"\n"))
	f.Add([]byte("proxy = { listen = 3 }\n"))
	f.Add([]byte("registry = [1, {host = 3}]\n[a.b.c]\n"))
	f.Add([]byte("[[registry]]\n[[registry.x]]\n\"\" = 1\n"))
	f.Fuzz(func(t *testing.T, body []byte) {
		l := loader{config: Default(), from: map[string]string{}}
		l.keys = keysOf(&l.config)
		l.toml("f.toml", body)
		for _, p := range l.problems {
			if !strings.HasPrefix(p.From, "f.toml") || p.Reason == "" {
				t.Errorf("%#v names no place or no reason", p)
			}
		}
		if l.err() == nil {
			_ = l.config.Validate()
		}
	})
}
