// Package page has the web page of the control interface. Its files are in the folder files as they are sent: plain HTML, CSS and
// JavaScript modules, which no build makes. The page loads nothing from elsewhere.
//
// The charts are drawn by uPlot (https://github.com/leeoniya/uPlot), which is in files/vendor as npm has it, with its licence.
package page

import (
	"embed"
	"io/fs"
	"path"
)

//go:embed files
var files embed.FS

// Policy is the page's Content-Security-Policy. Scripts and styles are the page's own files. With trusted types required and none
// allowed, no script can make markup of text: names come from the network.
const Policy = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; " +
	"frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"

// types are the media types of files by their extension. A file of another extension is not served.
var types = map[string]string{
	".html": "text/html; charset=utf-8",
	".css":  "text/css; charset=utf-8",
	".js":   "text/javascript; charset=utf-8",
	".svg":  "image/svg+xml",
}

// File is one file of the page. Nobody may change its body.
type File struct {
	Type string // media type
	Body []byte
}

// Files are the page's files by their path in URLs. "/" is the page itself, the others begin with "/page/".
var Files = load()

func load() map[string]File {
	all := make(map[string]File)
	err := fs.WalkDir(files, "files", func(at string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || types[path.Ext(at)] == "" {
			return err
		}
		body, err := files.ReadFile(at)
		url := "/page/" + at[len("files/"):]
		if url == "/page/index.html" {
			url = "/"
		}
		all[url] = File{types[path.Ext(at)], body}
		return err
	})
	if err != nil {
		panic(err) // the program has been built wrong
	}
	return all
}
