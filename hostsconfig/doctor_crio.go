package hostsconfig

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"path"
	"slices"
	"strings"

	"github.com/pelletier/go-toml/v2"
)

const docsRegistries = "https://github.com/containers/image/blob/main/docs/containers-registries.conf.5.md"

func (d *doctor) checkCRIO() {
	d.checkHome()
	d.checkReload()
	files, ok := d.crioFiles()
	if !ok {
		return
	}
	ours := slices.IndexFunc(files, func(f registriesFile) bool { return path.Base(f.path) == dropInName })
	if ours < 0 {
		if d.opts.Facts.ProxyUp {
			d.add(Finding{
				ID: "crio-drop-in-missing", Severity: Broken, Runtime: crio, Where: path.Join(d.opts.CRIO, dropInName),
				What: "The agent runs, but its drop-in is not there, so CRI-O does not know of it.", Fix: d.fixByWriting(),
			})
		}
		d.checkPrefixes(files, nil)
		return
	}
	if files[ours].marked && !d.opts.Facts.ProxyUp {
		d.add(Finding{
			ID: "leftovers", Severity: Degraded, Runtime: crio, Where: files[ours].path,
			What: "Larder's drop-in is in place, but no agent answers at its address. Pulls work, but each tries the dead mirror first.",
			Fix:  d.hostsCommand("remove") + "    # or start the agent",
		})
	}
	d.checkOverrides(files, ours)
	d.checkImages(files)
	others := slices.Delete(slices.Clone(files), ours, ours+1)
	d.checkPrefixes(others, &files[ours])
}

// crioFiles reads what CRI-O reads. False: a file is broken, and says so.
func (d *doctor) crioFiles() ([]registriesFile, bool) {
	mains, dropIns, err := registriesPaths(d.opts.CRIO, d.node.list)
	if err != nil {
		d.add(Finding{ID: "crio-directory-unreadable", Severity: Broken, Runtime: crio, Where: d.opts.CRIO, What: err.Error() + ".", Fix: "chmod 755 " + d.opts.CRIO})
		return nil, false
	}
	if d.node.exists(mains[0]) {
		mains = mains[:1]
	}
	var files []registriesFile
	ok := true
	for _, name := range slices.Concat(mains, dropIns) {
		data, err := d.node.read(name)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		var f registriesFile
		if err == nil {
			f, err = readRegistries(name, data)
		}
		if err != nil {
			ok = false
			d.add(Finding{
				ID: "crio-malformed", Severity: Broken, Runtime: crio, Where: lineOfError(name, err),
				What: fmt.Sprintf("CRI-O cannot read this file (%v). One such file fails every pull, and CRI-O does not start with it.", err),
				Fix:  fmt.Sprintf("mv %s %s.broken && systemctl reload crio    # or correct it", name, name), Docs: docsRegistries,
			})
			continue
		}
		files = append(files, f)
	}
	return files, ok
}

// checkOverrides finds files behind ours that replace our entries.
func (d *doctor) checkOverrides(files []registriesFile, ours int) {
	for _, f := range files[ours+1:] {
		for _, r := range f.rules {
			prefix := r.str("prefix")
			if !files[ours].names(prefix) {
				continue
			}
			d.add(Finding{
				ID: "crio-overridden", Severity: Degraded, Runtime: crio, Where: f.path,
				What: fmt.Sprintf("This file sorts behind %s and replaces its entry for %q, which is then not mirrored.", dropInName, prefix),
				Fix:  fmt.Sprintf("mv %s %s", f.path, path.Join(path.Dir(f.path), "90-"+strings.TrimLeft(path.Base(f.path), "0123456789-"))), Docs: docsRegistries,
			})
		}
	}
}

// checkImages finds registries that the node pulls from and that have no entry of
// ours: there is no catch-all, and nothing else would tell.
func (d *doctor) checkImages(files []registriesFile) {
	rules, _ := mergeRules(files)
	if !d.opts.Facts.ProxyUp || !slices.Contains(d.opts.Registries, "*") {
		return // a list without "*" says which, and means no other
	}
	left := map[string]bool{}
	for _, image := range d.opts.Facts.CRIOImages {
		host, _, _ := strings.Cut(image, "/")
		inCluster := strings.Contains(host+":", ".svc:") // OpenShift's own, which is private
		if strings.ContainsAny(host, ".:") && !inCluster && matchRule(rules, image) == nil {
			left[host] = true
		}
	}
	for _, host := range slices.Sorted(maps.Keys(left)) {
		d.add(Finding{
			ID: "crio-registry-not-listed", Severity: Degraded, Runtime: crio,
			What: fmt.Sprintf("This node has images of %s, and pulls them straight from there: CRI-O has no entry for every registry, and \"*\" stands for the well-known ones.", host),
			Fix: fmt.Sprintf("[hosts]\nregistries = [\"*\", %[1]s]    # in the chart: config.hosts.registries\n"+
				"[[registry]]    # in the chart: registries; for one with a private address\nhost = %[1]s", tomlString(host)), Docs: docsRegistries,
		})
	}
}

// checkPrefixes finds the prefixes that get, or have, no entry of ours.
func (d *doctor) checkPrefixes(others []registriesFile, ours *registriesFile) {
	rules, origin := mergeRules(others)
	rendered, err := renderDropIn(rules, d.opts.Registries, d.proxy)
	if err != nil {
		d.add(Finding{ID: "crio-no-drop-in", Severity: Broken, Runtime: crio, What: err.Error() + ".", Fix: d.hostsCommand("apply") + " --dry-run"})
		return
	}
	for _, prefix := range slices.Sorted(maps.Keys(rendered.left)) {
		d.add(Finding{
			ID: "crio-prefix-not-mirrored", Severity: Note, Runtime: crio, Where: origin[prefix],
			What: fmt.Sprintf("%q gets no mirror: %s.", prefix, rendered.left[prefix]),
		})
	}
	if ours == nil || !d.opts.Facts.ProxyUp {
		return
	}
	for _, prefix := range slices.Sorted(maps.Keys(rules)) {
		if ours.names(prefix) || rendered.left[prefix] != "" || !covers(d.opts.Registries, prefix) {
			continue
		}
		d.add(Finding{
			ID: "crio-more-specific-prefix", Severity: Degraded, Runtime: crio, Where: origin[prefix],
			What: fmt.Sprintf("%q has a rule that the drop-in does not know of yet; the longest prefix wins, so it is not mirrored.", prefix),
			Fix:  d.fixByWriting() + "\nsystemctl reload crio    # once the drop-in has it", Docs: docsRegistries,
		})
	}
}

// checkHome: a configuration in the home directory of CRI-O's user, root, replaces or
// overrides the one in /etc. systemd sets no HOME for it, and containers-image then asks
// the user database.
func (d *doctor) checkHome() {
	for _, name := range []string{"registries.conf", "registries.conf.d"} {
		file := path.Join("/root/.config/containers", name)
		if !d.node.exists(file) {
			continue
		}
		d.add(Finding{
			ID: "crio-home-shadows", Severity: Degraded, Runtime: crio, Where: file,
			What: "CRI-O and podman running with this home directory read it before, and instead of, the file of the same name in /etc/containers.",
			Fix:  fmt.Sprintf("mv %s %s.off    # after moving what is needed to /etc/containers/registries.conf.d", file, file), Docs: docsRegistries,
		})
	}
}

// checkReload: CRI-O reads registries once, unless told otherwise.
func (d *doctor) checkReload() {
	names := []string{"/etc/crio/crio.conf"}
	entries, err := d.node.list("/etc/crio/crio.conf.d")
	if err == nil {
		for _, e := range entries {
			names = append(names, path.Join("/etc/crio/crio.conf.d", e.Name()))
		}
	}
	on, seen := false, false
	for _, name := range names {
		doc, err := d.node.read(name)
		if err != nil {
			continue
		}
		seen = true
		var f struct {
			Crio struct {
				Image struct {
					Reload *bool `toml:"auto_reload_registries"`
				} `toml:"image"`
			} `toml:"crio"`
		}
		if toml.Unmarshal(doc, &f) == nil && f.Crio.Image.Reload != nil {
			on = *f.Crio.Image.Reload
		}
	}
	if on || !seen {
		return
	}
	d.add(Finding{
		ID: "crio-no-auto-reload", Severity: Note, Runtime: crio, Where: "/etc/crio",
		What: "auto_reload_registries is off: CRI-O sees a change of its registries only after SIGHUP.",
		Fix:  "# in /etc/crio/crio.conf.d/50-larder.conf, CRI-O 1.30 or later\n[crio.image]\nauto_reload_registries = true\n# or hosts.crio_reload = true (in the chart: crio.reload), or after each change: systemctl reload crio",
	})
}
