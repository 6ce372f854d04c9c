package hostsconfig

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
)

// crioFiles reads the files in force without us, in the order that
// containers-image merges them. original is what is in the place of ours then.
func crioFiles(m *managed, original *file) ([]registriesFile, error) {
	mains, dropIns, err := registriesPaths(m.path, os.ReadDir)
	if err != nil {
		return nil, err
	}
	var out []registriesFile
	for i, path := range slices.Concat(mains, dropIns) {
		if i < len(mains) && len(out) > 0 {
			continue
		}
		f, err := original, error(nil)
		switch target, _ := filepath.EvalSymlinks(path); {
		case path == m.at(dropInName):
		case target == os.DevNull: // the usual way to mask a file: containers-image reads it as empty
			f = &file{}
		default:
			f, err = readFile(path)
		}
		if err != nil {
			return nil, err
		}
		if f == nil {
			continue
		}
		r, err := readRegistries(path, f.data)
		if err != nil {
			return nil, fmt.Errorf("CRI-O cannot read this either, and fails every pull: %s: %w", path, err)
		}
		out = append(out, r)
	}
	return out, nil
}

func (h *Hosts) renderCRIO(m *managed, original *file) ([]byte, error) {
	files, err := crioFiles(m, original)
	if err != nil {
		return nil, err
	}
	rules, _ := mergeRules(files)
	d, err := renderDropIn(rules, h.opts.Registries, h.proxy)
	return d.data, err
}

func (h *Hosts) importCRIO(m *managed, original *file) ([]Imported, error) {
	files, err := crioFiles(m, original)
	if err != nil {
		return nil, err
	}
	rules, origin := mergeRules(files)
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
