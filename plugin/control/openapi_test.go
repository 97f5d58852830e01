package control

import (
	"encoding/json"
	"maps"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/optcache/optcache/plugin/control/api"
)

// schema is what is read of a JSON schema.
type schema struct {
	Ref        string            `json:"$ref"`
	Type       string            `json:"type"`
	Enum       []string          `json:"enum"`
	AllOf      []schema          `json:"allOf"`
	Required   []string          `json:"required"`
	Properties map[string]schema `json:"properties"`
	Items      *schema           `json:"items"`
	Values     *schema           `json:"additionalProperties"`
	Maximum    int               `json:"maximum"`
	Default    any               `json:"default"`
}

// parameter is what is read of a parameter.
type parameter struct {
	Ref    string `json:"$ref"`
	Name   string `json:"name"`
	In     string `json:"in"`
	Schema schema `json:"schema"`
}

type operation struct {
	Parameters  []parameter     `json:"parameters"`
	RequestBody json.RawMessage `json:"requestBody"`
}

type openAPI struct {
	OpenAPI    string                          `json:"openapi"`
	Paths      map[string]map[string]operation `json:"paths"`
	Components struct {
		Parameters map[string]parameter       `json:"parameters"`
		Schemas    map[string]json.RawMessage `json:"schemas"`
	} `json:"components"`
}

func readDescription(t *testing.T) (d openAPI) {
	t.Helper()
	if err := json.Unmarshal(description, &d); err != nil {
		t.Fatal(err)
	}
	return d
}

// schemaOf returns a schema, with what it refers to, and whether it allows other members.
func (d *openAPI) schemaOf(t *testing.T, s schema) schema {
	t.Helper()
	if name, ok := strings.CutPrefix(s.Ref, "#/components/schemas/"); ok {
		s = d.schemaNamed(t, name)
	}
	for _, part := range s.AllOf {
		part = d.schemaOf(t, part)
		s.Type = part.Type
		s.Required = append(s.Required, part.Required...)
		if s.Properties == nil {
			s.Properties = make(map[string]schema)
		}
		maps.Copy(s.Properties, part.Properties)
	}
	return s
}

func (d *openAPI) schemaNamed(t *testing.T, name string) (s schema) {
	t.Helper()
	text, ok := d.Components.Schemas[name]
	if !ok {
		t.Fatalf("there is no schema %q", name)
	}
	// A request allows no other members, which is a false in place of a schema.
	text = []byte(strings.Replace(string(text), `"additionalProperties": false,`, "", 1))
	if err := json.Unmarshal(text, &s); err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return s
}

func TestDescriptionHasTheRoutes(t *testing.T) {
	t.Parallel()
	d := readDescription(t)
	if !strings.HasPrefix(d.OpenAPI, "3.1.") {
		t.Errorf("OpenAPI %s", d.OpenAPI)
	}
	var described, routed []string
	for path, methods := range d.Paths {
		for method, op := range methods {
			method = strings.ToUpper(method)
			described = append(described, method+" "+path)
			if (op.RequestBody != nil) != (method == "POST") {
				t.Errorf("%s %s: a body is for POST", method, path)
			}
			// The handlers know the path, and each parameter.
			q := request{method: method, target: path, body: "{}", header: mediaOf(path)}
			if w := q.do(t, &fakeBlock{}); w.Code == 404 || w.Code == 405 {
				t.Errorf("%s %s: %d", method, path, w.Code)
			}
			for _, p := range op.Parameters {
				if ref, ok := strings.CutPrefix(p.Ref, "#/components/parameters/"); ok {
					p = d.Components.Parameters[ref]
				}
				if p.In == "header" {
					if p.Name != api.InstanceHeader {
						t.Errorf("%s %s: nobody reads %s", method, path, p.Name)
					}
					continue
				}
				q.target = path + "?" + p.Name
				if w := q.do(t, &fakeBlock{}); p.Name == "" || strings.Contains(w.Body.String(), "unknown parameter") {
					t.Errorf("%s %s: %q: %s", method, path, p.Name, w.Body)
				}
				if p.Name == "limit" && path == "/v1/top" {
					if p.Schema.Maximum != mostTop || p.Schema.Default != float64(defaultTop) {
						t.Errorf("limit: %+v", p.Schema)
					}
				} else if p.Name == "limit" && (p.Schema.Maximum != MaxPage || p.Schema.Default != float64(defaultLimit)) {
					t.Errorf("limit: %+v", p.Schema)
				}
			}
		}
	}
	for _, this := range routes {
		routed = append(routed, this.method+" "+this.path)
	}
	slices.Sort(described)
	slices.Sort(routed)
	if !slices.Equal(described, routed) {
		t.Errorf("described are\n%q, and routed are\n%q", described, routed)
	}
}

// The parameters that a handler takes are described.
func TestDescriptionHasTheParameters(t *testing.T) {
	t.Parallel()
	d := readDescription(t)
	for _, this := range routes {
		var known []string
		for _, p := range d.Paths[this.path][strings.ToLower(this.method)].Parameters {
			if ref, ok := strings.CutPrefix(p.Ref, "#/components/parameters/"); ok {
				p = d.Components.Parameters[ref]
			}
			known = append(known, p.Name)
		}
		for _, name := range []string{"name", "subtree", "type", "kind", "kinds", "stale", "records", "limit", "after", "block", "blocks", "all", "minutes", "by", "sort", "hot"} {
			w := request{method: this.method, target: this.path + "?" + name, body: "{}", header: mediaOf(this.path)}.do(t, &fakeBlock{})
			if takes := !strings.Contains(w.Body.String(), "unknown parameter"); takes != slices.Contains(known, name) {
				t.Errorf("%s: %s is taken: %t, and described: %t", this.path, name, takes, !takes)
			}
		}
	}
}

// mediaOf is the header of a request to a path whose body is not JSON.
func mediaOf(path string) map[string]string {
	for _, this := range routes {
		if this.path == path && this.media != nil {
			return map[string]string{"Content-Type": this.media[0]}
		}
	}
	return nil
}

func TestSchemasAreTheTypes(t *testing.T) {
	t.Parallel()
	d := readDescription(t)
	types := map[string]any{
		"StatusAnswer": statusAnswer{}, "BlockStatus": blockStatus{}, "Status": Status{}, "FastPathStatus": FastPathStatus{}, "UpstreamStatus": UpstreamStatus{}, "SubnetStatus": SubnetStatus{}, "SnapshotStatus": SnapshotStatus{}, "PoolStatus": PoolStatus{}, "SharedStatus": SharedStatus{}, "Answer": Answer{},
		"LookupAnswer": lookupAnswer{}, "BlockAnswers": blockAnswers{}, "ListAnswer": listAnswer{}, "ListedAnswer": listedAnswer{},
		"FlushRequest": flushRequest{}, "FlushAnswer": flushAnswer{}, "SnapshotRequest": snapshotRequest{}, "SnapshotAnswer": snapshotAnswer{},
		"Climber": api.Climber{}, "Hill": api.Hill{}, "UnderWay": UnderWay{}, "TopAnswer": api.TopReply{}, "BlockTop": api.BlockTop{}, "Top": Top{}, "TopItem": TopItem{},
		"Problem": problem{}, "Recent": api.Recent{}, "HistoryAnswer": api.HistoryReply{}, "BlockHistory": api.BlockHistory{}, "History": api.History{},
		"ExplainRequest": api.ExplainRequest{}, "ExplainAnswer": api.ExplainReply{}, "BlockExplanation": api.BlockExplanation{},
		"Explanation": api.Explanation{}, "Response": api.Response{}, "Way": api.Way{}, "WarmRequest": api.WarmRequest{}, "WarmQuestion": api.WarmQuestion{},
		"WarmAnswer": api.WarmReply{}, "WarmFailure": api.WarmFailure{}, "LoadAnswer": api.LoadReply{},
	}
	for name := range d.Components.Schemas {
		if _, ok := types[name]; !ok && name != "Kind" {
			t.Errorf("schema %s is of no type", name)
		}
	}
	for name, value := range types {
		d.compare(t, name, d.schemaOf(t, d.schemaNamed(t, name)), reflect.TypeOf(value))
	}
	if got := d.schemaNamed(t, "Kind").Enum; !slices.Equal(got, kinds) {
		t.Errorf("Kind: %q", got)
	}
}

// compare holds a schema against a type of Go.
func (d *openAPI) compare(t *testing.T, at string, s schema, typ reflect.Type) {
	t.Helper()
	if typ.Kind() == reflect.Pointer {
		typ = typ.Elem()
	}
	want := ""
	switch typ.Kind() {
	case reflect.String:
		want = "string"
	case reflect.Bool:
		want = "boolean"
	case reflect.Float64:
		want = "number"
	case reflect.Int, reflect.Int64, reflect.Uint32, reflect.Uint64:
		want = "integer"
	case reflect.Slice:
		want = "array"
	case reflect.Map, reflect.Struct:
		want = "object"
	}
	if typ == reflect.TypeFor[time.Time]() {
		want = "string"
	}
	if s.Type != want {
		t.Errorf("%s: %q is not %s", at, s.Type, want)
		return
	}
	switch {
	case want == "array":
		d.compare(t, at+"[]", d.schemaOf(t, *s.Items), typ.Elem())
	case typ.Kind() == reflect.Map:
		d.compare(t, at+"{}", d.schemaOf(t, *s.Values), typ.Elem())
	case want == "object":
		var fields, required []string
		for _, f := range reflect.VisibleFields(typ) {
			tag := f.Tag.Get("json")
			if f.Anonymous || !f.IsExported() {
				continue
			}
			name, options, _ := strings.Cut(tag, ",")
			fields = append(fields, name)
			if options == "" {
				required = append(required, name)
			}
			if p, ok := s.Properties[name]; ok {
				d.compare(t, at+"."+name, d.schemaOf(t, p), f.Type)
			}
		}
		slices.Sort(fields)
		slices.Sort(required)
		if described := slices.Sorted(maps.Keys(s.Properties)); !slices.Equal(fields, described) {
			t.Errorf("%s: fields are\n%q, and described are\n%q", at, fields, described)
		}
		if described := slices.Sorted(slices.Values(s.Required)); !slices.Equal(required, described) {
			t.Errorf("%s: always there are\n%q, and required are\n%q", at, required, described)
		}
	}
}
