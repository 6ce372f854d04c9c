package agent

import (
	"bytes"
	"embed"
	"html/template"
	"net/http"
)

// The page is one HTML file with a script, a style and an icon, as they are:
// nothing is built. The script gets all it shows from /api/v1/events.
//
//go:embed page/page.html page/page.css page/page.js page/icon.svg
var pageFiles embed.FS

var page = template.Must(template.ParseFS(pageFiles, "page/page.html"))

// pagePolicy lets the page load what is beside it and nothing else, and lets no
// script make HTML of text (trusted types): names and errors that others chose
// can only ever be shown.
const pagePolicy = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; " +
	"base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"

// pageRoutes serve the status for people with a browser.
func (a *Agent) pageRoutes(mux *http.ServeMux) {
	mux.HandleFunc("GET /{$}", a.servePage)
	for _, name := range []string{"page.css", "page.js", "icon.svg"} {
		mux.HandleFunc("GET /"+name, func(w http.ResponseWriter, r *http.Request) {
			pageHeaders(w)
			http.ServeFileFS(w, r, pageFiles, "page/"+name)
		})
	}
}

// servePage has the status in it too, for browsers that run no script.
func (a *Agent) servePage(w http.ResponseWriter, _ *http.Request) {
	var out bytes.Buffer
	if err := page.Execute(&out, a.Status()); err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	pageHeaders(w)
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	_, _ = w.Write(out.Bytes()) // a client that is gone needs no error
}

func pageHeaders(w http.ResponseWriter) {
	w.Header().Set("Content-Security-Policy", pagePolicy)
	w.Header().Set("Referrer-Policy", "no-referrer")
	w.Header().Set("Cache-Control", "no-cache") // another version may serve it next
}
