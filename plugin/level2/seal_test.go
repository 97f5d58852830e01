package level2

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

const secretA, secretB = "the first secret of the tests", "the second secret of the tests"

func sealerOf(t testing.TB, lines ...string) *Sealer {
	t.Helper()
	s, err := NewSealer([]byte(strings.Join(lines, "\n")), "optcache", "")
	if err != nil {
		t.Fatal(err)
	}
	return s
}

var example = Question{Name: []byte("\x07example\x03org\x00"), Type: 1, Class: 1}

func sampleAnswer() *Answer {
	return &Answer{Kind: Success, Asked: 1_000_000, Stored: 1_000_020, TTL: 300, Subnet: "10.1.0.0/16", Wildcard: "*.example.org.", Message: []byte("a message")}
}

func TestSealedAnswersComeBack(t *testing.T) {
	s := sealerOf(t, secretA)
	for _, a := range []*Answer{
		sampleAnswer(),
		{Kind: Denial, DO: true, CD: true, Stored: 5, TTL: 1, Message: []byte{}},
	} {
		name := s.names(&example, 7)[0]
		got, err := s.openAnswer(name, s.seal(name, a.append(nil)))
		if err != nil {
			t.Fatal(err)
		}
		if got.DO != a.DO || got.CD != a.CD || got.Kind != a.Kind || got.Asked != a.Asked || got.Stored != a.Stored || got.TTL != a.TTL ||
			got.Wildcard != a.Wildcard || got.Subnet != a.Subnet || !bytes.Equal(got.Message, a.Message) {
			t.Errorf("%+v became %+v", a, got)
		}
	}
}

// Each part of a question, the epoch, the group and the secret make another key.
func TestKeysTellQuestionsApart(t *testing.T) {
	seen := make(map[string]string)
	add := func(what string, s *Sealer, q Question, epoch uint64) {
		t.Helper()
		name := s.names(&q, epoch)[0]
		if other, is := seen[name]; is {
			t.Errorf("%s has the key of %s", what, other)
		}
		seen[name] = what
	}
	s := sealerOf(t, secretA)
	add("example", s, example, 1)
	add("another epoch", s, example, 2)
	for what, change := range map[string]func(*Question){
		"another name": func(q *Question) { q.Name = []byte("\x07example\x03net\x00") }, "a name above": func(q *Question) { q.Name = []byte("\x03org\x00") },
		"another type": func(q *Question) { q.Type = 28 }, "another class": func(q *Question) { q.Class = 3 },
		"DO": func(q *Question) { q.DO = true }, "CD": func(q *Question) { q.CD = true }, "a subnet": func(q *Question) { q.Subnet = "\x00\x01\x18\xc0\x00\x02" },
	} {
		q := example
		change(&q)
		add(what, s, q, 1)
	}
	add("another secret", sealerOf(t, secretB), example, 1)
	for _, group := range [][2]string{{"other", ""}, {"optcache", "view"}, {"optcachev", "iew"}} {
		s, err := NewSealer([]byte(secretA), group[0], group[1])
		if err != nil {
			t.Fatal(err)
		}
		add("group "+group[0]+"/"+group[1], s, example, 1)
	}
	for name := range seen {
		if strings.Contains(name, "example") || len(name) != 22 {
			t.Errorf("key %q", name)
		}
	}
}

// A value opens under its own key alone, unchanged, in its own version, for its own group.
func TestWhatIsNotOursIsRefused(t *testing.T) {
	s := sealerOf(t, secretA)
	name := s.names(&example, 1)[0]
	value := s.seal(name, sampleAnswer().append(nil))
	if bytes.Contains(value, []byte("message")) || bytes.Contains(value, []byte("example")) {
		t.Error("the value can be read")
	}
	refused := func(what string, want Reason, s *Sealer, name string, value []byte) {
		t.Helper()
		if _, err := s.openAnswer(name, value); !errors.Is(err, want) {
			t.Errorf("%s: %v, and not %v", what, err, want)
		}
	}
	for i := range value {
		changed := bytes.Clone(value)
		changed[i] ^= 0x20
		want := RefusedSealed
		if i == 0 {
			want = RefusedVersion
		}
		refused("changed", want, s, name, changed)
	}
	refused("cut", RefusedSealed, s, name, value[:len(value)-1])
	refused("longer", RefusedSealed, s, name, append(bytes.Clone(value), 0))
	refused("empty", RefusedSealed, s, name, nil)
	refused("of another key", RefusedSealed, s, s.names(&example, 2)[0], value)
	refused("of another secret", RefusedSealed, sealerOf(t, secretB), name, value)
	other, _ := NewSealer([]byte(secretA), "other", "")
	refused("of another group", RefusedSealed, other, name, value)
	refused("too large", RefusedSealed, s, name, append(bytes.Clone(value), make([]byte, maxSealed)...))
	for what, text := range map[string][]byte{
		"short": []byte("short"), "unknown flags": append([]byte{0xff}, sampleAnswer().append(nil)[1:]...),
		"no kind": append([]byte{0, 0}, sampleAnswer().append(nil)[2:]...), "asked after it came": (&Answer{Kind: Success, Asked: 2, Stored: 1}).append(nil),
		"a far future": (&Answer{Kind: Success, Stored: 1 << 62}).append(nil),
	} {
		refused(what, RefusedMalformed, s, name, s.seal(name, text))
	}
}

// With two secrets, the first seals and names, and both open.
func TestSecretsCanBeRotated(t *testing.T) {
	before, both, after := sealerOf(t, secretA), sealerOf(t, secretB, secretA), sealerOf(t, secretB)
	name := before.names(&example, 1)[0]
	value := before.seal(name, sampleAnswer().append(nil))
	names := both.names(&example, 1)
	if len(names) != 2 || names[1] != name || names[0] != after.names(&example, 1)[0] {
		t.Fatalf("keys %v", names)
	}
	if _, err := both.openAnswer(name, value); err != nil {
		t.Errorf("what the second secret has sealed: %v", err)
	}
	value = both.seal(names[0], sampleAnswer().append(nil))
	if _, err := after.openAnswer(names[0], value); err != nil {
		t.Errorf("what the first of two has sealed: %v", err)
	}
}

func TestSecretFiles(t *testing.T) {
	for text, want := range map[string]string{
		"":                    "no secret",
		"# nothing\n\n":       "no secret",
		"short\n":             "line 1: a secret has 16 bytes",
		secretA + "\n\nshort": "line 3: a secret has 16 bytes",
		secretA + "\n" + secretB + "\n" + secretA: "line 3: more than 2 secrets",
		strings.Repeat("x", mostSecretIn+1):       "more than 4096 bytes",
	} {
		path := filepath.Join(t.TempDir(), "secret")
		os.WriteFile(path, []byte(text), 0o600)
		_, err := ReadSealer(path, "p", "")
		if err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), path) {
			t.Errorf("%.40q: %v, and not %q", text, err, want)
		}
		if err != nil && strings.Contains(err.Error(), secretA) {
			t.Errorf("%v shows a secret", err)
		}
	}
	if _, err := ReadSealer(filepath.Join(t.TempDir(), "none"), "p", ""); err == nil {
		t.Error("a file that is not there")
	}
}

func FuzzOpen(f *testing.F) {
	s := sealerOf(f, secretA, secretB)
	name := s.names(&example, 1)[0]
	f.Add(s.seal(name, sampleAnswer().append(nil)))
	f.Add([]byte{sealVersion})
	f.Fuzz(func(t *testing.T, value []byte) {
		a, err := s.openAnswer(name, value)
		if err == nil && len(a.append(nil)) == 0 {
			t.Error("an answer of nothing")
		}
	})
}

// FuzzRead reads what has been opened: whoever has the secret may write anything.
func FuzzRead(f *testing.F) {
	f.Add(sampleAnswer().append(nil))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, text []byte) {
		a := new(Answer)
		if a.read(text) == nil && !bytes.Equal(a.append(nil), text) {
			t.Errorf("%x became %x", text, a.append(nil))
		}
	})
}
