package hostsconfig

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// crioFiles reads the files in force without us, in the order that
// containers-image merges them.
func crioFiles(m *managed, original *file) ([]registriesFile, error) {
	mains, dirs := registriesSources(m.path)
	var out []registriesFile
	for _, path := range mains {
		f, err := readFile(path)
		if err != nil {
			return nil, err
		}
		if f != nil {
			out = append(out, registriesFile{path, f.data})
			break
		}
	}
	dropIns, err := dropInPaths(dirs, os.ReadDir)
	if err != nil {
		return nil, err
	}
	if original != nil {
		dropIns[dropInName] = m.at(dropInName)
	} else {
		delete(dropIns, dropInName)
	}
	for _, name := range slices.Sorted(maps.Keys(dropIns)) {
		if name == dropInName {
			out = append(out, registriesFile{dropIns[name], original.data})
			continue
		}
		f, err := readFile(dropIns[name])
		if err != nil {
			return nil, err
		}
		if f != nil {
			out = append(out, registriesFile{dropIns[name], f.data})
		}
	}
	return out, nil
}

// dropInPaths finds drop-ins by name; a directory earlier in dirs shadows the
// later ones.
func dropInPaths(dirs []string, list func(dir string) ([]fs.DirEntry, error)) (map[string]string, error) {
	out := map[string]string{}
	for _, dir := range slices.Backward(dirs) {
		entries, err := list(dir)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		for _, e := range entries {
			if !e.IsDir() && strings.HasSuffix(e.Name(), ".conf") {
				out[e.Name()] = filepath.Join(dir, e.Name())
			}
		}
	}
	return out, nil
}

func (h *Hosts) renderCRIO(m *managed, original *file) ([]byte, error) {
	files, err := crioFiles(m, original)
	if err != nil {
		return nil, err
	}
	rules, _, err := loadRules(files)
	if err != nil {
		return nil, fmt.Errorf("CRI-O cannot read this either, and fails every pull: %w", err)
	}
	d, err := renderDropIn(rules, h.opts.Registries, h.proxy)
	return d.data, err
}

func (h *Hosts) importCRIO(m *managed, original *file) ([]Imported, error) {
	files, err := crioFiles(m, original)
	if err != nil {
		return nil, err
	}
	rules, origin, err := loadRules(files)
	if err != nil {
		return nil, err
	}
	return importRules(rules, origin, h.proxy, func(host string) certFiles { return registryCerts(m.path, host) }), nil
}

// registryCerts finds the certificates that containers-image uses for a host:
// those of the first directory there is.
func registryCerts(dropInDir, host string) certFiles {
	etc := filepath.Dir(dropInDir)
	for _, dir := range []string{filepath.Join(etc, "certs.d", host), filepath.Join(filepath.Dir(etc), "docker/certs.d", host)} {
		if certs, err := listCerts(dir, dir); err == nil {
			return certs
		}
	}
	return certFiles{}
}
