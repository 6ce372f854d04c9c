package upstream

import (
	"fmt"
	"mime"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

// parseContentRange reads "bytes 0-99/1000" (RFC 9110 14.4) as the half-open
// range [start, end) of total bytes; total is -1 where the sender wrote "*".
func parseContentRange(s string) (start, end, total int64, err error) {
	fail := func() (int64, int64, int64, error) {
		return 0, 0, 0, fmt.Errorf("Content-Range %q is malformed", clip(s, 64))
	}
	unit, rest, ok := strings.Cut(s, " ")
	if !ok || !strings.EqualFold(unit, "bytes") {
		return fail()
	}
	span, whole, ok := strings.Cut(rest, "/")
	first, last, ok2 := strings.Cut(span, "-")
	if !ok || !ok2 {
		return fail()
	}
	total = -1
	if whole != "*" {
		if total, err = parseCount(whole); err != nil {
			return fail()
		}
	}
	start, err = parseCount(first)
	if err != nil {
		return fail()
	}
	end, err = parseCount(last)
	if err != nil || end < start || end == 1<<63-1 || (total >= 0 && end >= total) {
		return fail()
	}
	return start, end + 1, total, nil
}

// parseCount reads a decimal without sign, which ParseInt alone would allow.
func parseCount(s string) (int64, error) {
	n, err := strconv.ParseUint(s, 10, 63)
	return int64(n), err
}

// parseRetryAfter reads both forms of Retry-After (RFC 9110 10.2.3): seconds,
// or a date. What is malformed, zero or past is 0.
func parseRetryAfter(s string, now time.Time) time.Duration {
	s = strings.TrimSpace(s)
	if n, err := parseCount(s); err == nil {
		return time.Duration(min(n, int64(24*time.Hour/time.Second))) * time.Second
	}
	at, err := http.ParseTime(s)
	if err != nil {
		return 0
	}
	return min(max(at.Sub(now), 0), 24*time.Hour)
}

// parseNext finds the rel="next" link (RFC 8288) and returns its query string,
// the only part of it that is ours to follow; "" if there is none.
func parseNext(links []string) string {
	for _, link := range links {
		for link != "" {
			open := strings.IndexByte(link, '<')
			if open < 0 {
				break
			}
			target, rest, ok := strings.Cut(link[open+1:], ">")
			if !ok {
				break
			}
			params, more := cutLink(rest)
			if isNext(params) {
				if u, err := url.Parse(target); err == nil {
					return u.RawQuery
				}
			}
			link = more
		}
	}
	return ""
}

// cutLink splits the parameters of one link from the links after it, at the
// first comma outside quotes.
func cutLink(s string) (params, rest string) {
	quoted := false
	for i := 0; i < len(s); i++ {
		switch {
		case s[i] == '\\' && quoted:
			i++
		case s[i] == '"':
			quoted = !quoted
		case s[i] == ',' && !quoted:
			return s[:i], s[i+1:]
		}
	}
	return s, ""
}

func isNext(params string) bool {
	for _, p := range strings.Split(params, ";") {
		key, value, _ := strings.Cut(p, "=")
		if !strings.EqualFold(strings.TrimSpace(key), "rel") {
			continue
		}
		for _, rel := range strings.Fields(strings.Trim(strings.TrimSpace(value), `"`)) {
			if strings.EqualFold(rel, "next") {
				return true
			}
		}
	}
	return false
}

// challenge is one challenge of WWW-Authenticate (RFC 9110 11.6.1); scheme and
// parameter names are lower case.
type challenge struct {
	scheme string
	params map[string]string
}

// maxChallenges, and maxChallenge bytes of them, bound what a registry can make us
// remember for each repository. Real ones have one or two, of some 200 bytes.
const (
	maxChallenges = 8
	maxChallenge  = 4 << 10
)

// short leaves out the values of WWW-Authenticate that are too long or too
// many to keep.
func short(headers []string) []string {
	var kept []string
	size := 0
	for _, h := range headers {
		if h != "" && len(kept) < maxChallenges && size+len(h) <= maxChallenge {
			kept, size = append(kept, h), size+len(h)
		}
	}
	return kept
}

// parseChallenges reads all challenges of all header lines, also several in
// one line. What cannot be read is skipped.
func parseChallenges(headers []string) []challenge {
	var all []challenge
	for _, h := range headers {
		for _, item := range splitList(clip(h, maxChallenge)) {
			word, rest, spaced := strings.Cut(item, " ")
			if !strings.ContainsRune(word, '=') { // a scheme, maybe with its first parameter
				if len(all) == maxChallenges {
					return all
				}
				all = append(all, challenge{scheme: strings.ToLower(word), params: map[string]string{}})
				if item = strings.TrimSpace(rest); !spaced || item == "" {
					continue
				}
			}
			key, value, ok := strings.Cut(item, "=")
			if ok && len(all) > 0 {
				all[len(all)-1].params[strings.ToLower(strings.TrimSpace(key))] = unquote(strings.TrimSpace(value))
			}
		}
	}
	return all
}

// A challenge as in RFC 9110 11.6.1, without what that allows but no registry sends:
// empty items, and space around "=".
const (
	tokenRE     = "[!#$%&'*+.^_`|~0-9A-Za-z-]+"
	paramRE     = tokenRE + `=(?:` + tokenRE + `|"(?:[^"\\]|\\.)*")`
	challengeRE = tokenRE + `(?: +(?:` + paramRE + `(?: *, *` + paramRE + `)*|[0-9A-Za-z._~+/-]+=*))?`
)

var (
	oneChallenge  = regexp.MustCompile(challengeRE)
	allChallenges = regexp.MustCompile(`^` + challengeRE + `(?: *, *` + challengeRE + `)*$`)
)

// legible reports whether parseChallenges reads headers as any client does: in full, and
// with no realm twice, of which some take the first and some the last.
func legible(headers []string) bool {
	if len(short(headers)) != len(headers) {
		return false
	}
	count := 0
	for _, h := range headers {
		if clip(h, maxChallenge) != h || !allChallenges.MatchString(h) {
			return false
		}
		for _, one := range oneChallenge.FindAllString(h, -1) {
			if count++; strings.Count(strings.ToLower(one), "realm=") > 1 {
				return false
			}
		}
	}
	return count <= maxChallenges
}

// withoutReason drops what RFC 6750 3 adds to the challenge of a refused
// token: a client that reads it there takes its own credential for refused.
func withoutReason(header string) string {
	var out strings.Builder
	glue := ""
	for _, item := range splitList(header) {
		scheme, param, spaced := strings.Cut(item, " ")
		if !spaced || strings.ContainsRune(scheme, '=') {
			scheme, param = "", item
		}
		if scheme != "" {
			out.WriteString(glue + scheme)
			glue = " "
		}
		key, _, _ := strings.Cut(param, "=")
		if slices.Contains([]string{"error", "error_description", "error_uri"}, strings.ToLower(strings.TrimSpace(key))) {
			continue
		}
		out.WriteString(glue + strings.TrimSpace(param))
		glue = ","
	}
	return out.String()
}

// splitList splits at commas outside quotes and drops empty items.
func splitList(s string) []string {
	var items []string
	for s != "" {
		var item string
		item, s = cutLink(s)
		if item = strings.TrimSpace(item); item != "" {
			items = append(items, item)
		}
	}
	return items
}

// unquote undoes an RFC 9110 quoted-string; a token comes back as it is.
func unquote(s string) string {
	if len(s) < 2 || s[0] != '"' || s[len(s)-1] != '"' {
		return s
	}
	s = s[1 : len(s)-1]
	if !strings.ContainsRune(s, '\\') {
		return s
	}
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+1 < len(s) {
			i++
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

// parseRateLimit reads Docker Hub's "100;w=21600".
func parseRateLimit(s string) (n int64, window time.Duration, ok bool) {
	count, param, _ := strings.Cut(s, ";")
	n, err := parseCount(strings.TrimSpace(count))
	if err != nil {
		return 0, 0, false
	}
	if w, found := strings.CutPrefix(strings.TrimSpace(param), "w="); found {
		if seconds, err := parseCount(w); err == nil && seconds < int64(1000*time.Hour/time.Second) {
			window = time.Duration(seconds) * time.Second
		}
	}
	return n, window, true
}

// maxMediaType is the longest there can be, in bytes (RFC 6838, 4.2). They are kept.
const maxMediaType = 255

// mediaType is a Content-Type without its parameters, in lower case; "" if it is
// none.
func mediaType(contentType string) string {
	m := bareType(contentType)
	if len(m) > maxMediaType {
		return ""
	}
	return m
}

func bareType(contentType string) string {
	if m, _, err := mime.ParseMediaType(contentType); err == nil {
		return m
	}
	m, _, _ := strings.Cut(contentType, ";")
	return strings.ToLower(strings.TrimSpace(m))
}

// clip shortens foreign text for a message and drops what is not printable.
func clip(s string, n int) string {
	if len(s) > n {
		s = s[:n]
	}
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) || r == utf8.RuneError {
			return -1
		}
		return r
	}, s)
}
