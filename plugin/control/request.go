package control

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"io"
	"mime"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/miekg/dns"
)

// This file reads what clients send. It is strict: a word that is not understood is an error, so that a command never
// does more than its client meant.

// parameters returns those of a request's query. Only the repeatable ones may be there more than once.
func parameters(r *http.Request, once, repeatable []string) (url.Values, error) {
	values, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil {
		return nil, badRequest("query", "%v", err)
	}
	for name, all := range values {
		switch {
		case slices.Contains(repeatable, name):
		case !slices.Contains(once, name):
			return nil, badRequest(strconv.Quote(name), "unknown parameter")
		case len(all) > 1:
			return nil, badRequest(name, "is given %d times", len(all))
		}
	}
	return values, nil
}

// flag reads a parameter that is true or false.
func flag(values url.Values, name string) (bool, error) {
	if !values.Has(name) {
		return false, nil
	}
	switch value := values.Get(name); value {
	case "true":
		return true, nil
	case "false":
		return false, nil
	default:
		return false, badRequest(name, "%q is neither true nor false", value)
	}
}

// readBody returns the bytes of a request that changes something. They are JSON, which no form of a web page can send.
func readBody(w http.ResponseWriter, r *http.Request) ([]byte, error) {
	if t, _, err := mime.ParseMediaType(r.Header.Get("Content-Type")); err != nil || t != "application/json" {
		return nil, &problem{Status: http.StatusUnsupportedMediaType, Detail: "Content-Type: application/json is expected"}
	}
	text, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody))
	if tooLarge := (*http.MaxBytesError)(nil); errors.As(err, &tooLarge) {
		return nil, &problem{Status: http.StatusRequestEntityTooLarge, Detail: "body: more than " + strconv.Itoa(maxBody) + " bytes"}
	}
	if err != nil {
		return nil, badRequest("body", "it does not come as a whole")
	}
	http.NewResponseController(w).SetReadDeadline(time.Time{}) // all is read; work may take longer
	return text, nil
}

// decode reads a JSON object into a value. members are those that there may be. Another member, one that is there twice
// or is null, and anything behind the object are errors.
func decode(text []byte, value any, members ...string) error {
	if !utf8.Valid(text) {
		return badRequest("body", "it is not UTF-8")
	}
	if err := checkMembers(text, members); err != nil {
		return err
	}
	d := json.NewDecoder(bytes.NewReader(text))
	d.DisallowUnknownFields()
	if err := d.Decode(value); err != nil {
		if e := (*json.UnmarshalTypeError)(nil); errors.As(err, &e) && e.Field != "" {
			return badRequest(e.Field, "a JSON %s is not what is expected", e.Value)
		}
		return badRequest("body", "%v", err)
	}
	return nil
}

// checkMembers finds what encoding/json lets pass: members twice, in other letters, null, and text behind the object.
func checkMembers(text []byte, members []string) error {
	d := json.NewDecoder(bytes.NewReader(text))
	if t, err := d.Token(); err != nil || t != json.Delim('{') {
		return badRequest("body", "a JSON object is expected")
	}
	var seen []string
	for d.More() {
		t, err := d.Token()
		if err != nil {
			return badRequest("body", "%v", err)
		}
		name, _ := t.(string)
		if !slices.Contains(members, name) {
			return badRequest(strconv.Quote(name), "unknown member")
		}
		if slices.Contains(seen, name) {
			return badRequest(name, "is given twice")
		}
		seen = append(seen, name)
		var value json.RawMessage
		if err := d.Decode(&value); err != nil {
			return badRequest(name, "%v", err)
		}
		if string(value) == "null" {
			return badRequest(name, "is null")
		}
	}
	if _, err := d.Token(); err != nil {
		return badRequest("body", "the JSON object has no end")
	}
	if _, err := d.Token(); err != io.EOF {
		return badRequest("body", "there is something behind the JSON object")
	}
	return nil
}

// domainName returns a name in one form: fully qualified, in lower case, and with escapes only where they are needed.
func domainName(s string) (string, error) {
	if s == "" {
		return "", badRequest("name", "is empty")
	}
	if len(s) > 4*255 {
		return "", badRequest("name", "it is too long")
	}
	for i, c := range []byte(s) {
		if c >= utf8.RuneSelf {
			return "", badRequest("name", "%q is not ASCII: write an internationalized name as xn--…", s)
		}
		if c < ' ' || c == 0x7f || c == ' ' && (i == 0 || s[i-1] != '\\') {
			return "", badRequest("name", `%q has a space or a control character: write it as \DDD`, s)
		}
	}
	if _, ok := dns.IsDomainName(s); !ok {
		return "", badRequest("name", "%q is no domain name", s)
	}
	var wire [255]byte
	end, err := dns.PackDomainName(dns.Fqdn(s), wire[:], 0, nil, false)
	if err != nil {
		return "", badRequest("name", "%q is no domain name", s)
	}
	s, _, err = dns.UnpackDomainName(wire[:end], 0)
	if err != nil {
		return "", badRequest("name", "it is no domain name")
	}
	return dns.CanonicalName(s), nil
}

// recordType returns a type by its name, or by its number as in TYPE65 (RFC 3597).
func recordType(s string) (uint16, error) {
	if s == "" {
		return 0, badRequest("type", "is empty")
	}
	upper := strings.ToUpper(s)
	t, ok := dns.StringToType[upper]
	if number, is := strings.CutPrefix(upper, "TYPE"); !ok && is {
		n, err := strconv.ParseUint(number, 10, 16)
		t, ok = uint16(n), err == nil
	}
	if !ok || t == dns.TypeNone {
		return 0, badRequest("type", "%q is no type: a name such as AAAA, or a number such as TYPE65, is expected", s)
	}
	return t, nil
}

// kinds are those of Answer.Kind.
var kinds = []string{"success", "denial", "failure"}

// checkKinds returns kinds, each once.
func checkKinds(word string, given []string) ([]string, error) {
	var all []string
	for _, k := range given {
		if !slices.Contains(kinds, k) {
			return nil, badRequest(word, "%q is neither success, denial nor failure", k)
		}
		if !slices.Contains(all, k) {
			all = append(all, k)
		}
	}
	return all, nil
}

// numbered is a block and its number among those of the listener.
type numbered struct {
	id int
	Block
}

// chosen returns the blocks that a request names, in their order; all, if it names none.
func chosen(blocks []Block, word string, ids []int) ([]numbered, error) {
	var all []numbered
	for _, id := range ids {
		if id < 0 || id >= len(blocks) {
			return nil, badRequest(word, "there is no block %d", id)
		}
	}
	for id, b := range blocks {
		if ids == nil || slices.Contains(ids, id) {
			all = append(all, numbered{id, b})
		}
	}
	return all, nil
}

// chosenParameters returns the blocks that the parameters `block` name.
func chosenParameters(blocks []Block, values url.Values) ([]numbered, error) {
	var ids []int
	for _, s := range values["block"] {
		id, err := strconv.ParseUint(s, 10, 31)
		if err != nil {
			return nil, badRequest("block", "%q is no block: the number of one is expected", s)
		}
		ids = append(ids, int(id))
	}
	return chosen(blocks, "block", ids)
}

// A cursor says where the next page of a list begins: in which block, and by that block's own cursor.

func cursorOf(id int, after string) string {
	return base64.RawURLEncoding.EncodeToString([]byte(strconv.Itoa(id) + "." + after))
}

func parseCursor(s string) (id int, after string, err error) {
	text, err := base64.RawURLEncoding.Strict().DecodeString(s)
	if err == nil {
		number, rest, ok := strings.Cut(string(text), ".")
		n, numberErr := strconv.ParseUint(number, 10, 31)
		if ok && numberErr == nil && strconv.FormatUint(n, 10) == number {
			return int(n), rest, nil
		}
	}
	return 0, "", errBadCursor()
}

func errBadCursor() error { return badRequest("after", "it is no cursor of this list") }
