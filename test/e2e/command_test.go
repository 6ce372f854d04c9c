package e2e

import "testing"

// TestCommands is an administrator at work beside a real containerd: an image is
// warmed before it is pulled, its origin explained, and host files that a killed
// agent left behind are taken back by hand.
func TestCommands(t *testing.T) {
	t.Parallel()
	r := startRegistry(t, distTLS)
	img := r.push(multiArch, "commands", 111)
	c := startContainerd(t, containerd2)
	host, config := upstreamName(t, c, r)
	before := snapshot(t, c.certs)
	a := startAgent(t, agentOptions{containerd: c, config: config})
	ref := host + "/" + img.repository + ":" + img.tag
	admin := "http://" + a.admin

	if out, code := larder(t, "warm", "--admin", admin, ref); code != 0 {
		t.Fatalf("warm: exit %d: %s", code, out)
	}
	seen := r.during(func() { c.mustPull(ref) })
	if blobs := blobReads(seen); len(blobs) > 0 {
		t.Errorf("after warming, the registry saw %v", blobs)
	}

	out, code := larder(t, "explain", "--admin", admin, "--json", ref)
	explained := decode[struct {
		Bytes int64 `json:"bytes"`
		Here  int64 `json:"bytes_here"`
		Parts []struct {
			Kind string `json:"kind"`
		} `json:"parts"`
	}](t, out)
	kinds := map[string]int{}
	for _, p := range explained.Parts {
		kinds[p.Kind]++
	}
	if code != 0 || explained.Bytes == 0 || explained.Here == 0 || kinds["index"] != 1 || kinds["layer"] < len(ordinarySizes) {
		t.Errorf("explain: exit %d: %s", code, out)
	}

	out, code = larder(t, "status", "--admin", admin, "--json")
	if status := decode[struct{ Ready bool }](t, out); code != 0 || !status.Ready {
		t.Errorf("status: exit %d: %s", code, out)
	}

	hosts := []string{"--hosts.containerd", c.certs, "--proxy.listen", a.proxy}
	a.kill()
	left := snapshot(t, c.certs)
	if _, code := larder(t, append([]string{"hosts", "remove", "--dry-run"}, hosts...)...); code != 0 {
		t.Errorf("hosts remove --dry-run: exit %d", code)
	}
	if snapshot(t, c.certs) != left {
		t.Error("a dry run changed files")
	}
	if _, code := larder(t, append([]string{"hosts", "remove"}, hosts...)...); code != 0 {
		t.Errorf("hosts remove: exit %d", code)
	}
	if after := snapshot(t, c.certs); after != before {
		t.Errorf("certs.d after `larder hosts remove`:\n%s\nwant:\n%s", after, before)
	}
}
