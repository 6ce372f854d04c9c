package main

import (
	"bytes"
	"crypto/sha256"
	"debug/buildinfo"
	"debug/elf"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"runtime/debug"
	"strings"
)

// binary is a program for one platform.
type binary struct {
	os, arch string
	data     []byte
	info     *buildinfo.BuildInfo
}

// readBinary reads a Go program and holds it to what an image from scratch needs:
// no dynamic linker.
func readBinary(path string) (binary, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return binary{}, err
	}
	b := binary{data: data}
	if b.info, err = buildinfo.Read(bytes.NewReader(data)); err != nil {
		return b, fmt.Errorf("%s: %w", path, err)
	}
	b.os, b.arch = setting(b.info, "GOOS"), setting(b.info, "GOARCH")
	program, err := elf.NewFile(bytes.NewReader(data))
	if err != nil {
		return b, fmt.Errorf("%s: %w", path, err)
	}
	for _, p := range program.Progs {
		if p.Type == elf.PT_INTERP {
			return b, fmt.Errorf("%s is linked dynamically; build it with CGO_ENABLED=0", path)
		}
	}
	return b, nil
}

func setting(info *debug.BuildInfo, key string) string {
	for _, s := range info.Settings {
		if s.Key == key {
			return s.Value
		}
	}
	return ""
}

// What follows is the part of CycloneDX 1.5 (cyclonedx.org/docs/1.5/json) that
// the build information of a Go program can fill.

type bom struct {
	Format      string      `json:"bomFormat"`
	SpecVersion string      `json:"specVersion"`
	Version     int         `json:"version"`
	Metadata    bomMetadata `json:"metadata"`
	Components  []component `json:"components"`
}

type bomMetadata struct {
	Component component `json:"component"`
}

type component struct {
	Type    string    `json:"type"`
	Ref     string    `json:"bom-ref"`
	Name    string    `json:"name"`
	Version string    `json:"version"`
	PURL    string    `json:"purl"`
	Hashes  []bomHash `json:"hashes,omitempty"`
}

type bomHash struct {
	Algorithm string `json:"alg"`
	Content   string `json:"content"`
}

// sbom lists the program, the Go release whose library it holds, and every
// module, with the sum of its source as go.sum has it.
func (b binary) sbom(version string) ([]byte, error) {
	main := library(b.info.Main.Path, version, "")
	main.Type = "application"
	sum := sha256.Sum256(b.data)
	main.Hashes = []bomHash{{"SHA-256", hex.EncodeToString(sum[:])}}
	out := bom{Format: "CycloneDX", SpecVersion: "1.5", Version: 1, Metadata: bomMetadata{main}}
	out.Components = append(out.Components, library("std", strings.TrimPrefix(b.info.GoVersion, "go"), ""))
	for _, m := range b.info.Deps {
		if m.Replace != nil {
			m = m.Replace
		}
		out.Components = append(out.Components, library(m.Path, m.Version, m.Sum))
	}
	body, err := json.MarshalIndent(out, "", "  ")
	return append(body, '\n'), err
}

// library describes a module. sum is its h1 sum: the SHA-256 of a list of all
// its files, in base64.
func library(path, version, sum string) component {
	purl := "pkg:golang/" + path + "@" + version
	c := component{Type: "library", Ref: purl, Name: path, Version: version, PURL: purl}
	if raw, err := base64.StdEncoding.DecodeString(strings.TrimPrefix(sum, "h1:")); err == nil && len(raw) == sha256.Size {
		c.Hashes = []bomHash{{"SHA-256", hex.EncodeToString(raw)}}
	}
	return c
}
