package agent

import (
	"fmt"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/larder-cache/larder/agent/cache"
)

// Key describes one configuration key to documentation.
type Key struct {
	Name    string // "proxy.listen"
	Default string // as a user would write it
	Shown   string // what to say of the default instead, when it is found at run time
	Help    string
}

// Env is the environment variable of the key.
func (k Key) Env() string {
	return envPrefix + strings.NewReplacer(".", "_", "-", "_").Replace(strings.ToUpper(k.Name))
}

const envPrefix = "LARDER_"

// boundKey is a key together with its place in one Config.
type boundKey struct {
	Key
	value reflect.Value
}

// Keys lists every key except the [[registry]] tables, in the order of Config.
func Keys() []Key {
	var c Config
	var out []Key
	for _, k := range keysOf(&c) {
		out = append(out, k.Key)
	}
	return out
}

// keysOf walks the tagged fields of c.
func keysOf(c *Config) []boundKey {
	var out []boundKey
	for table, group := range reflect.ValueOf(c).Elem().Fields() {
		if table.Tag.Get("key") == "" {
			continue
		}
		for f, value := range group.Fields() {
			key := Key{
				Name:    table.Tag.Get("key") + "." + f.Tag.Get("key"),
				Default: f.Tag.Get("default"),
				Shown:   f.Tag.Get("shown"),
				Help:    f.Tag.Get("help"),
			}
			out = append(out, boundKey{key, value})
		}
	}
	return out
}

// kind names the type of a key's value in help and messages.
func (k boundKey) kind() string {
	switch k.value.Interface().(type) {
	case bool:
		return "bool"
	case int:
		return "int"
	case time.Duration:
		return "duration"
	case Size, cache.Limit:
		return "size"
	case []string:
		return "list"
	default:
		return "string"
	}
}

// setText takes a value from a flag, an environment variable or a default.
func (k boundKey) setText(text string) error {
	switch k.value.Interface().(type) {
	case bool:
		b, err := strconv.ParseBool(text)
		if err != nil {
			return fmt.Errorf("want true or false")
		}
		k.value.SetBool(b)
	case int:
		n, err := strconv.Atoi(text)
		if err != nil {
			return fmt.Errorf("want a whole number")
		}
		k.value.SetInt(int64(n))
	case time.Duration:
		d, err := parseDuration(text)
		if err != nil {
			return err
		}
		k.value.SetInt(int64(d))
	case Size:
		s, err := ParseSize(text)
		if err != nil {
			return err
		}
		k.value.SetInt(int64(s))
	case cache.Limit:
		l, err := cache.ParseLimit(text)
		if err != nil {
			return err
		}
		k.value.Set(reflect.ValueOf(l))
	case []string:
		k.value.Set(reflect.ValueOf(splitList(text)))
	default:
		k.value.SetString(text)
	}
	return nil
}

// setTOML takes a value as go-toml decodes it into an empty interface.
func (k boundKey) setTOML(v any) error {
	switch v := v.(type) {
	case string:
		switch k.kind() {
		case "bool", "int":
			return fmt.Errorf("want %s without quotes", k.kind())
		case "list":
			return fmt.Errorf(`want a list, as in ["%s"]`, v)
		}
		return k.setText(v)
	case bool:
		if k.kind() == "bool" {
			k.value.SetBool(v)
			return nil
		}
	case int64:
		return k.setInteger(v)
	case []any:
		return k.setList(v)
	}
	return fmt.Errorf("want a %s", k.kind())
}

func (k boundKey) setInteger(n int64) error {
	switch k.kind() {
	case "int", "size":
		return k.setText(strconv.FormatInt(n, 10))
	case "duration":
		if n == 0 {
			k.value.SetInt(0)
			return nil
		}
		return fmt.Errorf(`want a duration with its unit, as in "%ds"`, n)
	}
	return fmt.Errorf("want a %s", k.kind())
}

func (k boundKey) setList(items []any) error {
	if k.kind() != "list" {
		return fmt.Errorf("want one %s, not a list", k.kind())
	}
	list := make([]string, 0, len(items))
	for _, item := range items {
		s, ok := item.(string)
		if !ok {
			return fmt.Errorf("want a list of strings; %v is none", item)
		}
		list = append(list, s)
	}
	k.value.Set(reflect.ValueOf(list))
	return nil
}

// parseDuration is time.ParseDuration with 0 allowed bare and an error that
// says what to write.
func parseDuration(text string) (time.Duration, error) {
	d, err := time.ParseDuration(text)
	if err != nil {
		return 0, fmt.Errorf("not a duration; write 500ms, 10s or 24h")
	}
	return d, nil
}

// splitList reads a comma-separated list; blanks and empty items go.
func splitList(text string) []string {
	items := strings.Split(text, ",")
	for i := range items {
		items[i] = strings.TrimSpace(items[i])
	}
	return slices.DeleteFunc(items, func(s string) bool { return s == "" })
}

// Nearest returns the candidate that word is most likely a slip of, "" if none
// is close enough.
func Nearest(word string, candidates []string) string {
	near, _ := nearest(word, candidates)
	return near
}

// nearest returns the candidate with the smallest edit distance to word, if
// one is close enough to be what the user meant: three edits away, which is two letters
// swapped and one more, or of a long word a third of it.
func nearest(word string, candidates []string) (string, int) {
	best, bestDistance := "", max(3, len(word)/3)+1
	for _, c := range candidates {
		if d := editDistance(word, c); d < bestDistance {
			best, bestDistance = c, d
		}
	}
	return best, bestDistance
}

// editDistance is Levenshtein's, over bytes: keys are ASCII.
func editDistance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := 1; i <= len(a); i++ {
		diagonal := row[0]
		row[0] = i
		for j := 1; j <= len(b); j++ {
			cost := 1
			if a[i-1] == b[j-1] {
				cost = 0
			}
			diagonal, row[j] = row[j], min(row[j]+1, row[j-1]+1, diagonal+cost)
		}
	}
	return row[len(b)]
}
