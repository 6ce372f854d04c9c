package proxy

import (
	"net/http"
	"strconv"
	"strings"
)

// firstOffset returns the offset of the first byte that http.ServeContent will
// send for r out of a blob of the given size and entity tag: the byte that must
// be there before the headers go out. ok is false when the answer will carry no
// byte of the blob (HEAD, 304, 412, 416).
func firstOffset(r *http.Request, size int64, etag string) (off int64, ok bool) {
	h := r.Header
	switch {
	case r.Method == http.MethodHead, size == 0,
		matchesTag(h.Get("If-None-Match"), etag, true),
		h.Get("If-Match") != "" && !matchesTag(h.Get("If-Match"), etag, false):
		return 0, false
	case h.Get("Range") == "", h.Get("If-Range") != "" && h.Get("If-Range") != etag:
		return 0, true
	}
	return firstOfRanges(h.Get("Range"), size)
}

// firstOfRanges follows the rules of net/http: no byte for a malformed header
// or one without a satisfiable range; ranges that add up to more than the blob
// are ignored, and the answer begins at 0.
func firstOfRanges(header string, size int64) (off int64, ok bool) {
	specs, isBytes := strings.CutPrefix(header, "bytes=")
	if !isBytes {
		return 0, false
	}
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
			return 0, false
		}
		if length < 0 {
			continue
		}
		if !ok && length > 0 { // the last zero bytes are a range to net/http, but no byte is sent
			off, ok = start, true
		}
		sum += length
	}
	if none || sum > size {
		return 0, true
	}
	return off, ok
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

// endOf returns where the range that holds the byte at off ends in the answer to r; the
// size, if the answer has the whole blob.
func endOf(r *http.Request, size int64, etag string, off int64) int64 {
	specs, isBytes := strings.CutPrefix(r.Header.Get("Range"), "bytes=")
	if cond := r.Header.Get("If-Range"); !isBytes || cond != "" && cond != etag {
		return size
	}
	end, sum := size, int64(0)
	for spec := range strings.SplitSeq(specs, ",") {
		start, length, valid := parseRange(strings.TrimSpace(spec), size)
		if !valid || length < 0 {
			continue
		}
		if end == size && start <= off && off < start+length {
			end = start + length
		}
		sum += length
	}
	if sum > size {
		return size
	}
	return end
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
