package proxy

import (
	"net/http"
	"strconv"
	"strings"
)

// span is the bytes of a blob from start on, up to but without end.
type span struct{ start, end int64 }

// spans returns what http.ServeContent will send for r out of a blob of the given size
// and entity tag, in its order; nothing when the answer will carry no byte of the blob
// (HEAD, 304, 412, 416).
func spans(r *http.Request, size int64, etag string) []span {
	h := r.Header
	switch {
	case r.Method == http.MethodHead, size == 0,
		matchesTag(h.Get("If-None-Match"), etag, true),
		h.Get("If-Match") != "" && !matchesTag(h.Get("If-Match"), etag, false):
		return nil
	case h.Get("Range") == "", h.Get("If-Range") != "" && h.Get("If-Range") != etag:
		return []span{{0, size}}
	}
	return parseRanges(h.Get("Range"), size)
}

// firstOffset returns the offset of the first byte of the answer, which must be there
// before the headers go out. ok is false when there is none.
func firstOffset(r *http.Request, size int64, etag string) (off int64, ok bool) {
	sent := spans(r, size, etag)
	if len(sent) == 0 {
		return 0, false
	}
	return sent[0].start, true
}

// endOf returns where the range that holds the byte at off ends in the answer to r; the
// size, if the answer has the whole blob.
func endOf(r *http.Request, size int64, etag string, off int64) int64 {
	for _, s := range spans(r, size, etag) {
		if s.start <= off && off < s.end {
			return s.end
		}
	}
	return size
}

// parseRanges follows the rules of net/http: no byte for a malformed header
// or one without a satisfiable range; ranges that add up to more than the blob
// are ignored.
func parseRanges(header string, size int64) []span {
	specs, isBytes := strings.CutPrefix(header, "bytes=")
	if !isBytes {
		return nil
	}
	var sent []span
	var sum int64
	none := true
	for spec := range strings.SplitSeq(specs, ",") {
		spec = strings.TrimSpace(spec)
		if spec == "" {
			continue
		}
		none = false
		start, length, valid := parseRange(spec, size)
		if !valid {
			return nil
		}
		if length > 0 { // the last zero bytes are a range to net/http, but no byte is sent
			sent = append(sent, span{start, start + length})
			sum += length
		}
	}
	if none || sum > size {
		return []span{{0, size}}
	}
	return sent
}

// namesEnd reports whether there is a Range header each of whose ranges says where it ends:
// "a-b" or "-n", as in lazy pulls. A client that resumes a whole blob, or fetches it in chunks
// as containerd does, asks for "a-".
func namesEnd(header string) bool {
	if header == "" {
		return false
	}
	for spec := range strings.SplitSeq(header, ",") {
		if strings.HasSuffix(strings.TrimSpace(spec), "-") {
			return false
		}
	}
	return true
}

// refuseEmptyRange keeps from net/http the ranges of no bytes that it would answer with
// "bytes 0--1/0" and the like. A last zero bytes is unsatisfiable, as RFC 9110 section
// 14.1.2 has it; any range of an empty blob is ignored, as section 14.2 lets a server do,
// and net/http itself with those that begin at a byte.
func refuseEmptyRange(r *http.Request, size int64) {
	if size == 0 {
		r.Header.Del("Range")
		return
	}
	if n, ok := strings.CutPrefix(r.Header.Get("Range"), "bytes=-"); ok && strings.Trim(n, "0") == "" && n != "" {
		r.Header.Set("Range", "bytes="+strconv.FormatInt(size, 10)+"-")
	}
}

// parseRange reads "a-b", "a-" or "-n" (RFC 9110 section 14.1.2), clamped to
// size. length is -1 for a range that lies beyond the end.
func parseRange(spec string, size int64) (start, length int64, valid bool) {
	first, last, found := strings.Cut(spec, "-")
	first, last = strings.TrimSpace(first), strings.TrimSpace(last)
	if !found {
		return 0, 0, false
	}
	if first == "" {
		n, err := strconv.ParseInt(last, 10, 64)
		if err != nil || n < 0 || last[0] == '-' {
			return 0, 0, false
		}
		n = min(n, size)
		return size - n, n, true
	}
	a, err := strconv.ParseInt(first, 10, 64)
	if err != nil || a < 0 {
		return 0, 0, false
	}
	if a >= size {
		return 0, -1, true
	}
	if last == "" {
		return a, size - a, true
	}
	b, err := strconv.ParseInt(last, 10, 64)
	if err != nil || b < a {
		return 0, 0, false
	}
	return a, min(b, size-1) - a + 1, true
}

// matchesTag reports whether an If-None-Match or If-Match header names etag.
// Blobs have strong tags only.
func matchesTag(header, etag string, weak bool) bool {
	for part := range strings.SplitSeq(header, ",") {
		part = strings.TrimSpace(part)
		if weak {
			part = strings.TrimPrefix(part, "W/")
		}
		if part == etag || part == "*" {
			return true
		}
	}
	return false
}
