package control

import (
	"fmt"
	"net/http"
)

// problem is an error as a client gets it (RFC 9457).
type problem struct {
	Type   string `json:"type"`
	Title  string `json:"title"`
	Status int    `json:"status"`
	Detail string `json:"detail"` // one sentence, which names the word that is wrong

	allow string // the method that there is instead
}

func (p *problem) Error() string { return p.Detail }

// answer returns what is sent.
func (p *problem) answer() *answer {
	p.Type, p.Title = "about:blank", http.StatusText(p.Status)
	a := jsonAnswer(p)
	a.status = p.Status
	a.header.Set("Content-Type", "application/problem+json")
	switch p.Status {
	case http.StatusServiceUnavailable:
		a.header.Set("Retry-After", "1")
	case http.StatusUnauthorized:
		a.header.Set("WWW-Authenticate", `Bearer realm="optcache"`)
	case http.StatusMethodNotAllowed:
		a.header.Set("Allow", p.allow)
	case http.StatusMisdirectedRequest:
		a.header.Set("Connection", "close")
	}
	return a
}

// badRequest says what is wrong with a word of a request.
func badRequest(word, format string, args ...any) *problem {
	return &problem{Status: http.StatusBadRequest, Detail: word + ": " + fmt.Sprintf(format, args...)}
}
