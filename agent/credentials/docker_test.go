package credentials

import (
	"encoding/base64"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func b64(s string) string { return base64.StdEncoding.EncodeToString([]byte(s)) }

func TestDockerConfig(t *testing.T) {
	cases := []struct {
		name, file, image, want string
	}{
		{"auth", `{"auths":{"reg.test":{"auth":"` + b64("ann:se:cret") + `"}}}`, "reg.test/team/app", "ann:se:cret"},
		{"auth without padding", `{"auths":{"reg.test":{"auth":"` + strings.TrimRight(b64("ann:secret1"), "=") + `"}}}`, "reg.test/app", "ann:secret1"},
		{"user and password", `{"auths":{"reg.test":{"username":"ann","password":"x","email":"a@b"}}}`, "reg.test/app", "ann:x"},
		{"identity token", `{"auths":{"x.azurecr.io":{"auth":"` + b64("00000000-0000-0000-0000-000000000000:") + `","identitytoken":"idt"}}}`, "x.azurecr.io/app", "<identity>:idt"},
		{"registry token", `{"auths":{"reg.test":{"registrytoken":"rt"}}}`, "reg.test/app", "<registry>:rt"},
		{"other host", `{"auths":{"reg.test":{"username":"ann","password":"x"}}}`, "other.test/app", ""},
		{"port", `{"auths":{"reg.test:5000":{"username":"ann","password":"x"}}}`, "reg.test/app", ""},
		{"longest key first", `{"auths":{"quay.io":{"username":"all","password":"1"},"quay.io/org":{"username":"org","password":"2"},"quay.io/org/app":{"username":"app","password":"3"}}}`,
			"quay.io/org/app", "app:3 org:2 all:1"},
		{"prefix key for another", `{"auths":{"quay.io":{"username":"all","password":"1"},"quay.io/org":{"username":"org","password":"2"}}}`, "quay.io/other/app", "all:1"},
		{"Docker Hub's key", `{"auths":{"https://index.docker.io/v1/":{"username":"ann","password":"x"}}}`, "docker.io/library/nginx", "ann:x"},
		{"Docker Hub as podman writes it", `{"auths":{"docker.io/acme":{"username":"ann","password":"x"}}}`, "registry-1.docker.io/acme/app", "ann:x"},
		{"key with scheme", `{"auths":{"https://reg.test/v2/":{"username":"ann","password":"x"}}}`, "reg.test/app", "ann:x"},
		{"one registry under two keys", `{"auths":{"docker.io":{"username":"bob","password":"y"},"https://index.docker.io/v1/":{"username":"ann","password":"x"}}}`, "docker.io/acme/app", "ann:x bob:y"},
		{"pattern", `{"auths":{"*.azurecr.io":{"username":"ann","password":"x"}}}`, "acme.azurecr.io/app", "ann:x"},
		{"emptied by a helper", `{"auths":{"reg.test":{}}}`, "reg.test/app", ""},
		{"nothing", `{}`, "reg.test/app", ""},
		{"other settings", `{"psFormat":"x","HttpHeaders":{"a":"b"},"auths":null}`, "reg.test/app", ""},
	}
	for _, tc := range cases {
		t.Run(tc.name, func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "config.json")
			write(t, file, tc.file)
			if got := find(t, newKeychain(t, Options{}), Request{File: file, Names: []string{tc.image}}); got != tc.want {
				t.Errorf("found %q, want %q", got, tc.want)
			}
		})
	}
}

// TestNames holds that several names are looked up in order, and that nothing is
// given twice.
func TestNames(t *testing.T) {
	file := filepath.Join(t.TempDir(), "config.json")
	write(t, file, `{"auths":{"harbor.test/hub":{"username":"mirror","password":"1"},"docker.io":{"username":"hub","password":"2"},"harbor.test":{"username":"hub","password":"2"}}}`)
	got := find(t, newKeychain(t, Options{}), Request{File: file, Names: []string{"harbor.test/hub/library/nginx", "docker.io/library/nginx"}})
	if got != "mirror:1 hub:2" {
		t.Errorf("found %q", got)
	}
}

func TestDockerConfigProblems(t *testing.T) {
	for name, tc := range map[string]struct{ file, want string }{
		"JSON":        {`{"auths":{"a":{"password":"hunter2"`, "at byte 35"},
		"auth":        {`{"auths":{"u:hunter2@reg.test":{"auth":"hunter2!"}}}`, `"reg.test" is malformed`},
		"no colon":    {`{"auths":{"reg.test":{"auth":"` + b64("hunter2") + `"}}}`, `"reg.test" is malformed`},
		"wrong type":  {`{"auths":"hunter2"}`, "auths is of a wrong type"},
		"wrong value": {`{"credsStore":42}`, "credsStore is of a wrong type"},
		"too large":   {`{"a":"` + strings.Repeat("hunter2", maxFile/7) + `"}`, "larger than 4 MiB"},
		"no object":   {`["hunter2"]`, "the whole is of a wrong type"},
	} {
		t.Run(name, func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "config.json")
			write(t, file, tc.file)
			_, err := newKeychain(t, Options{}).Find(t.Context(), Request{File: file, Names: []string{"reg.test/app"}})
			checked := CheckFile(file)
			for _, err := range []error{err, checked} {
				if err == nil || !strings.Contains(err.Error(), tc.want) || !strings.Contains(err.Error(), file) || strings.Contains(err.Error(), "hunter2") {
					t.Errorf("%v, want %q", err, tc.want)
				}
			}
		})
	}
	if _, err := newKeychain(t, Options{}).Find(t.Context(), Request{File: "/no/such/file", Names: []string{"reg.test/app"}}); err == nil || !strings.Contains(err.Error(), "/no/such/file") {
		t.Errorf("no file: %v", err)
	}
}

// TestReread changes the file in the ways in which files change.
func TestReread(t *testing.T) {
	config := func(password string) string {
		return `{"auths":{"reg.test":{"username":"ann","password":"` + password + `"}}}`
	}
	// old makes a file look as if it had been there for long: it is then trusted
	// until a stat says otherwise.
	old := func(t *testing.T, path string) {
		at := time.Now().Add(-time.Hour)
		if err := os.Chtimes(path, at, at); err != nil {
			t.Fatal(err)
		}
	}
	t.Run("in place, same size", func(t *testing.T) {
		file := filepath.Join(t.TempDir(), "config.json")
		k, r := newKeychain(t, Options{}), Request{File: file, Names: []string{"reg.test/app"}}
		for _, password := range []string{"one", "two", "six"} { // faster than the clock of a file system
			write(t, file, config(password))
			if got := find(t, k, r); got != "ann:"+password {
				t.Errorf("found %q, want ann:%s", got, password)
			}
		}
	})
	t.Run("replaced", func(t *testing.T) {
		dir := t.TempDir()
		file, next := filepath.Join(dir, "config.json"), filepath.Join(dir, "next")
		k, r := newKeychain(t, Options{}), Request{File: file, Names: []string{"reg.test/app"}}
		write(t, file, config("one"))
		old(t, file)
		find(t, k, r)
		write(t, next, config("two"))
		old(t, next)
		if err := os.Rename(next, file); err != nil {
			t.Fatal(err)
		}
		if got := find(t, k, r); got != "ann:two" {
			t.Errorf("found %q", got)
		}
	})
	t.Run("Kubernetes secret volume", func(t *testing.T) {
		dir := t.TempDir()
		version := func(name, password string) {
			if err := os.Mkdir(filepath.Join(dir, name), 0o755); err != nil {
				t.Fatal(err)
			}
			write(t, filepath.Join(dir, name, "config.json"), config(password))
			old(t, filepath.Join(dir, name, "config.json"))
			link := filepath.Join(dir, "..data_tmp")
			if err := os.Symlink(name, link); err != nil {
				t.Fatal(err)
			}
			if err := os.Rename(link, filepath.Join(dir, "..data")); err != nil {
				t.Fatal(err)
			}
		}
		version("..2026_01", "one")
		file := filepath.Join(dir, "config.json")
		if err := os.Symlink("..data/config.json", file); err != nil {
			t.Fatal(err)
		}
		k, r := newKeychain(t, Options{}), Request{File: file, Names: []string{"reg.test/app"}}
		if got := find(t, k, r); got != "ann:one" {
			t.Errorf("found %q", got)
		}
		version("..2026_02", "two")
		if err := os.RemoveAll(filepath.Join(dir, "..2026_01")); err != nil {
			t.Fatal(err)
		}
		if got := find(t, k, r); got != "ann:two" {
			t.Errorf("after the swap found %q", got)
		}
	})
	t.Run("torn, then whole, then gone", func(t *testing.T) {
		file := filepath.Join(t.TempDir(), "config.json")
		k, r := newKeychain(t, Options{}), Request{File: file, Names: []string{"reg.test/app"}}
		write(t, file, config("one"))
		find(t, k, r)
		for _, settled := range []bool{false, true} {
			write(t, file, config("two")[:30])
			if settled {
				old(t, file)
			}
			for range 2 {
				if got := find(t, k, r); got != "ann:one" {
					t.Errorf("torn: found %q", got)
				}
			}
		}
		write(t, file, config("two"))
		if got := find(t, k, r); got != "ann:two" {
			t.Errorf("whole: found %q", got)
		}
		if err := os.Remove(file); err != nil {
			t.Fatal(err)
		}
		if list, err := k.Find(t.Context(), r); err == nil || len(list) > 0 {
			t.Errorf("gone: %d credentials, %v", len(list), err)
		}
	})
}

func TestHelpers(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	count := "echo >>" + dir + "/runs; "
	program(t, dir, "docker-credential-ecr-login", count+`[ "$1" = get ] && read server || true; echo "{\"ServerURL\":\"$server\",\"Username\":\"AWS\",\"Secret\":\"for $server\"}"`)
	program(t, dir, "docker-credential-acr", count+`echo '{"Username":"<token>","Secret":"idt"}'`)
	program(t, dir, "docker-credential-empty", count+`echo "credentials not found in native keychain"; exit 1`)
	program(t, dir, "docker-credential-broken", count+`echo "no way in with hunter2"; echo hunter2 >&2; exit 1`)
	program(t, dir, "docker-credential-chatty", count+`echo "hunter2"`)
	cases := []struct {
		name, file, image, want, problem string
	}{
		{name: "credHelpers", file: `{"credHelpers":{"1.dkr.ecr.test":"ecr-login"}}`, image: "1.dkr.ecr.test/app", want: "AWS:for 1.dkr.ecr.test"},
		{name: "of another registry", file: `{"credHelpers":{"1.dkr.ecr.test":"ecr-login"}}`, image: "2.dkr.ecr.test/app"},
		{name: "credsStore", file: `{"credsStore":"ecr-login"}`, image: "reg.test:5000/app", want: "AWS:for reg.test:5000"},
		{name: "credHelpers before credsStore", file: `{"credsStore":"broken","credHelpers":{"reg.test":"ecr-login"}}`, image: "reg.test/app", want: "AWS:for reg.test"},
		{name: "Docker Hub", file: `{"credHelpers":{"https://index.docker.io/v1/":"ecr-login"}}`, image: "docker.io/acme/app", want: "AWS:for https://index.docker.io/v1/"},
		{name: "Docker Hub by name", file: `{"credHelpers":{"docker.io":"ecr-login"}}`, image: "docker.io/acme/app", want: "AWS:for https://index.docker.io/v1/"},
		{name: "identity token", file: `{"credHelpers":{"x.azurecr.io":"acr"}}`, image: "x.azurecr.io/app", want: "<identity>:idt"},
		{name: "before the file's own", file: `{"auths":{"reg.test":{"username":"ann","password":"x"}},"credsStore":"ecr-login"}`, image: "reg.test/app", want: "AWS:for reg.test"},
		{name: "before the file's own under another key", file: `{"auths":{"https://reg.test/v2/":{"username":"ann","password":"x"}},"credsStore":"ecr-login"}`, image: "reg.test/app", want: "AWS:for reg.test"},
		{name: "after a longer key", file: `{"auths":{"reg.test/app":{"username":"ann","password":"x"}},"credsStore":"ecr-login"}`, image: "reg.test/app", want: "ann:x AWS:for reg.test"},
		{name: "knows none", file: `{"auths":{"reg.test":{"username":"ann","password":"x"}},"credsStore":"empty"}`, image: "reg.test/app", want: "ann:x"},
		{name: "fails", file: `{"auths":{"reg.test":{"username":"ann","password":"x"}},"credsStore":"broken"}`, image: "reg.test/app", want: "ann:x", problem: "credential helper broken: exit status 1; to see what it says, run `echo reg.test | docker-credential-broken get` by hand"},
		{name: "prints something else", file: `{"credsStore":"chatty"}`, image: "reg.test/app", problem: "(8 bytes) is no credential"},
		{name: "is not there", file: `{"credsStore":"absent"}`, image: "reg.test/app", problem: "docker-credential-absent"},
		{name: "is a path", file: `{"credsStore":"../evil"}`, image: "reg.test/app", problem: "not a path"},
	}
	for _, tc := range cases {
		t.Run(tc.name, func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "config.json")
			write(t, file, tc.file)
			k := newKeychain(t, Options{})
			before := runs(t, dir)
			for range 3 {
				list, err := k.Find(t.Context(), Request{File: file, Names: []string{tc.image}})
				if got := users(list); got != tc.want {
					t.Errorf("found %q, want %q", got, tc.want)
				}
				if (err == nil) != (tc.problem == "") || err != nil && (!strings.Contains(err.Error(), tc.problem) || strings.Contains(err.Error(), "hunter2")) {
					t.Errorf("%v, want %q", err, tc.problem)
				}
			}
			if n := runs(t, dir) - before; n > 1 {
				t.Errorf("%d runs for 3 questions", n)
			}
		})
	}
}

func FuzzDockerConfig(f *testing.F) {
	f.Add([]byte(`{"auths":{"https://index.docker.io/v1/":{"auth":"YTpi"}},"credHelpers":{"a":"b"},"credsStore":"c"}`), "docker.io/library/nginx")
	f.Add([]byte(`{"auths":{"*.io/x":{"identitytoken":"t"},"":{}}}`), "quay.io/x")
	f.Fuzz(func(t *testing.T, body []byte, name string) {
		c, err := parseDockerConfig(body)
		if err != nil {
			return
		}
		name = canonicalName(name)
		_, server := c.helper(name)
		if list := matching(c.auths, name); len(list) > len(c.auths) || strings.Contains(server, "/") {
			t.Errorf("%d of %d credentials, server %q", len(list), len(c.auths), server)
		}
	})
}
