package agent

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"

	"github.com/spf13/pflag"
)

// DefaultConfigFile is read if it exists and no other file is named.
const DefaultConfigFile = "/etc/larder/larder.toml"

// Problem is one thing wrong with the configuration.
type Problem struct {
	Key    string // "proxy.listen", or "" for a file that cannot be read
	Value  string // as given; "" when the key itself is the problem
	From   string // "larder.toml:3", "--proxy.listen", "LARDER_PROXY_LISTEN", "" for a default
	Reason string // what is wrong and what to do
}

func (p *Problem) Error() string {
	var b strings.Builder
	b.WriteString(p.Key)
	if p.Value != "" {
		fmt.Fprintf(&b, " = %q", p.Value)
	}
	if p.From != "" && p.Key != "" {
		fmt.Fprintf(&b, " (%s)", p.From)
	} else if p.From != "" {
		b.WriteString(p.From)
	}
	return b.String() + ": " + p.Reason
}

// Sources are where a configuration comes from, strongest first: flags,
// environment, file; then the defaults.
type Sources struct {
	Flags   *pflag.FlagSet // made by BindFlags; nil = none
	Environ []string       // as os.Environ
	File    string         // "" = LARDER_CONFIG, else DefaultConfigFile if it exists
}

// BindFlags adds a flag to fs for every key of the given tables ("hosts"), of
// all tables if none is given.
func BindFlags(fs *pflag.FlagSet, tables ...string) {
	var c Config
	for _, k := range keysOf(&c) {
		if table, _, _ := strings.Cut(k.Name, "."); len(tables) > 0 && !slices.Contains(tables, table) {
			continue
		}
		help := k.Help
		if k.Shown != "" {
			help += " (default: " + k.Shown + ")"
		}
		f := fs.VarPF(&flagValue{kind: k.kind(), text: k.Default}, k.Name, "", help)
		if k.kind() == "bool" {
			f.NoOptDefVal = "true"
		}
	}
}

// flagValue keeps the text of a flag until Load reads it, so that all problems
// can be reported together.
type flagValue struct {
	kind, text string
	given      bool
}

func (f *flagValue) String() string { return f.text }
func (f *flagValue) Type() string   { return f.kind }

// Set appends to a list that is given more than once and replaces all else.
func (f *flagValue) Set(text string) error {
	if f.given && f.kind == "list" {
		text = f.text + "," + text
	}
	f.text, f.given = text, true
	return nil
}

// Load puts a Config together and validates it. The error joins every
// [Problem] found; the Config then has what could be read, and defaults for the rest.
func Load(s Sources) (Config, error) {
	l := loader{config: Default(), from: map[string]string{}}
	l.keys = keysOf(&l.config)
	l.file(s.File, s.Environ)
	l.environ(s.Environ)
	l.flags(s.Flags)
	l.problems = append(l.problems, l.config.problems(l.from)...)
	return l.config, l.err()
}

// loader gathers values and the problems met on the way.
type loader struct {
	config   Config
	keys     []boundKey
	from     map[string]string // key or "registry[0].host" -> where its value came from
	problems []*Problem
}

func (l *loader) add(p *Problem) { l.problems = append(l.problems, p) }

func (l *loader) err() error {
	errs := make([]error, len(l.problems))
	for i, p := range l.problems {
		errs[i] = p
	}
	return errors.Join(errs...)
}

// set gives k its value by assign, and keeps the former one if that fails.
func (l *loader) set(k boundKey, from, text string, assign func() error) {
	l.from[k.Name] = from
	if err := assign(); err != nil {
		l.add(&Problem{Key: k.Name, Value: text, From: from, Reason: err.Error()})
	}
}

func (l *loader) file(name string, environ []string) {
	explicit := name != ""
	if i := slices.IndexFunc(environ, func(s string) bool { return strings.HasPrefix(s, configEnv+"=") }); !explicit && i >= 0 {
		name = strings.TrimPrefix(environ[i], configEnv+"=")
		explicit = name != ""
	}
	if !explicit {
		name = DefaultConfigFile
	}
	body, err := os.ReadFile(name)
	if errors.Is(err, fs.ErrNotExist) && !explicit {
		return
	}
	if err != nil {
		l.add(&Problem{From: name, Reason: fmt.Sprintf("cannot read the configuration: %v", err)})
		return
	}
	l.toml(name, body)
}

// configEnv names the file where --config does not.
const configEnv = envPrefix + "CONFIG"

// environ applies LARDER_* variables. Unknown ones are ignored, because
// Kubernetes invents some for every Service (LARDER_PORT...), unless they are
// so close to a known one that they must be a typo.
func (l *loader) environ(environ []string) {
	names := make([]string, len(l.keys))
	for i, k := range l.keys {
		names[i] = k.Env()
	}
	for _, entry := range environ {
		name, text, _ := strings.Cut(entry, "=")
		if !strings.HasPrefix(name, envPrefix) || slices.Contains(otherEnv, name) {
			continue
		}
		if i := slices.Index(names, name); i >= 0 {
			l.set(l.keys[i], name, text, func() error { return l.keys[i].setText(text) })
			continue
		}
		if near, distance := nearest(name, names); near != "" && distance <= 2 {
			l.add(&Problem{Key: name, From: "environment", Reason: fmt.Sprintf("unknown variable; did you mean %s?", near)})
		}
	}
}

// otherEnv are variables of ours that are not keys: --config and --admin.
var otherEnv = []string{configEnv, envPrefix + "ADMIN"}

func (l *loader) flags(fs *pflag.FlagSet) {
	if fs == nil {
		return
	}
	for _, k := range l.keys {
		f := fs.Lookup(k.Name)
		if f == nil || !f.Changed {
			continue
		}
		text := f.Value.String()
		l.set(k, "--"+k.Name, text, func() error { return k.setText(text) })
	}
}
