package upstream

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"
)

// refusal turns a response other than 2xx into an *Error.
func (ep *endpoint) refusal(resp *http.Response, s *session, k kind, moved *url.URL) error {
	e := &Error{Status: resp.StatusCode, RetryAfter: parseRetryAfter(resp.Header.Get("Retry-After"), time.Now())}
	e.Code, e.Message = errorCode(drain(resp.Body), carried(resp.Request))
	if moved != nil {
		e.Endpoint = moved.Host
		if k == kindBlob && expired(e.Status) {
			// A CDN's no is about a signed URL, not about the caller or the blob.
			e.Status, e.Err = http.StatusBadGateway, fmt.Errorf("%w: a redirect led to %d", ErrBadAnswer, resp.StatusCode)
		}
		return e // without its challenge: no credential of ours is meant for that host
	}
	e.refused = refuses(e.Status, e.Code, resp.Request)
	if e.Status == http.StatusUnauthorized || e.Status == http.StatusForbidden {
		headers := resp.Header.Values("WWW-Authenticate")
		e.Challenge = short(headers)
		if resp.Request.Header.Get("Authorization") != "" {
			e.Challenge = s.pristine(headers)
		}
	}
	return e
}

// refuses says whether an answer is about the Authorization that req carried,
// or its lack. ECR answers 400 with the code DENIED to a password it cannot
// read; to a HEAD it gives no code.
func refuses(status int, code string, req *http.Request) bool {
	switch status {
	case http.StatusUnauthorized, http.StatusForbidden:
		return true
	case http.StatusBadRequest:
		return req.Header.Get("Authorization") != "" &&
			(code == "DENIED" || code == "UNAUTHORIZED" || code == "" && req.Method == http.MethodHead)
	}
	return false
}

// expired lists what storage services answer to an expired signed URL.
func expired(status int) bool {
	switch status {
	case http.StatusBadRequest, http.StatusUnauthorized, http.StatusForbidden, http.StatusGone:
		return true
	}
	return false
}

// carried lists the secrets that req was sent with.
func carried(req *http.Request) (secrets []string) {
	_, secret, _ := strings.Cut(req.Header.Get("Authorization"), " ")
	_, password, _ := req.BasicAuth()
	return slices.DeleteFunc([]string{secret, password}, func(s string) bool { return s == "" })
}

// errorCode reads the first of a registry's errors (distribution-spec, "Error
// codes"), unless it repeats a secret.
func errorCode(body []byte, secrets []string) (code, message string) {
	var doc struct {
		Errors []struct {
			Code    string `json:"code"`
			Message string `json:"message"`
		} `json:"errors"`
	}
	if json.Unmarshal(body, &doc) != nil || len(doc.Errors) == 0 {
		return "", ""
	}
	first := doc.Errors[0]
	for _, s := range secrets {
		if strings.Contains(first.Code+" "+first.Message, s) {
			return "", ""
		}
	}
	return clip(first.Code, 64), clip(first.Message, 200)
}
