package level2

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/optcache/optcache/plugin/pkg/regular"
)

// This file says what the server of the second level gets to see. Nobody believes it, and it learns no names: keys are keyed
// hashes, values are sealed.

const (
	// sealVersion is the version of keys and values. It is part of both.
	sealVersion  = 2
	nameBytes    = 16 // of a key's hash: 128 bits
	nonceBytes   = 12
	tagBytes     = 16
	minSecret    = 16 // bytes
	mostSecrets  = 2
	mostSecretIn = 4 << 10 // bytes of the file

	// MaxMessage is the largest message that is put into the second level, in bytes.
	MaxMessage = 1<<16 - 1
	maxSealed  = 1 + nonceBytes + tagBytes + headBytes + 255 + 1 + 255 + MaxMessage
)

// Question is what an answer is for.
type Question struct {
	Name        []byte // the qname, in wire format and lower case
	Type, Class uint16
	DO, CD      bool
	Subnet      string // under which the answer is put, as text of the caller's choice, 255 bytes at most; "": none
}

// Kinds of answers. A flush may be of one kind.
const (
	Success uint8 = 1 << iota
	Denial
)

// Answer is an answer as it stands in the second level. Times are in ms on the group's clock.
type Answer struct {
	DO, CD   bool
	Kind     uint8  // Success or Denial
	Asked    int64  // when upstream was asked, or before
	Stored   int64  // when the answer came, or before
	TTL      uint32 // in seconds from Stored
	Subnet   string // whom it is for, as text of the caller's choice; "": it was not said
	Wildcard string // the name of the wildcard that the answer was made from, or ""
	Message  []byte // in wire format, with TTL in its records
}

// expires returns when the answer's life ends, in ms on the group's clock.
func (a *Answer) expires() int64 { return a.Stored + int64(a.TTL)*1000 }

// Reason says why a value of the server is refused.
type Reason uint8

const (
	RefusedVersion   Reason = iota // of another version
	RefusedSealed                  // it does not open: changed, of another key, or of another secret
	RefusedMalformed               // what was sealed is no answer, or none to the question
	RefusedFuture                  // it comes later than now
	RefusedExpired
	RefusedFlushed
	RefusedRules // the block's rules do not allow it
	Reasons
)

var ReasonNames = [Reasons]string{"version", "sealed", "malformed", "future", "expired", "flushed", "rules"}

func (r Reason) Error() string { return "refused: " + ReasonNames[r] }

const (
	flagDO = 1 << iota
	flagCD
)

// headBytes is the length of a value before the name of the wildcard: flags, kind, Asked, Stored, TTL, length of the name. Behind the
// name there are the length of the subnet, the subnet and the message.
const headBytes = 1 + 1 + 8 + 8 + 4 + 1

func (a *Answer) append(b []byte) []byte {
	var flags byte
	if a.DO {
		flags |= flagDO
	}
	if a.CD {
		flags |= flagCD
	}
	b = append(b, flags, a.Kind)
	b = binary.BigEndian.AppendUint64(b, uint64(a.Asked))
	b = binary.BigEndian.AppendUint64(b, uint64(a.Stored))
	b = binary.BigEndian.AppendUint32(b, a.TTL)
	b = append(b, byte(len(a.Wildcard)))
	b = append(b, a.Wildcard...)
	b = append(b, byte(len(a.Subnet)))
	b = append(b, a.Subnet...)
	return append(b, a.Message...)
}

// read fills a from b, which it keeps.
func (a *Answer) read(b []byte) error {
	if len(b) < headBytes || b[0] > flagDO|flagCD || b[1] != Success && b[1] != Denial {
		return RefusedMalformed
	}
	n := headBytes + int(b[headBytes-1])
	if len(b) <= n {
		return RefusedMalformed
	}
	m := n + 1 + int(b[n])
	if len(b) < m {
		return RefusedMalformed
	}
	*a = Answer{
		DO: b[0]&flagDO != 0, CD: b[0]&flagCD != 0, Kind: b[1],
		Asked: int64(binary.BigEndian.Uint64(b[2:])), Stored: int64(binary.BigEndian.Uint64(b[10:])), TTL: binary.BigEndian.Uint32(b[18:]),
		Wildcard: string(b[headBytes:n]), Subnet: string(b[n+1 : m]), Message: b[m:],
	}
	const century = 100 * 365 * 24 * 3600 * 1000 // ms; sums of times do not overflow
	if a.Asked < 0 || a.Stored < a.Asked || a.Stored > 2*century || a.TTL > 1<<31-1 {
		return RefusedMalformed
	}
	return nil
}

// Sealer has the keys of a group, made of its secrets. The first secret seals, all open. It does not change.
type Sealer struct {
	group []byte // what all keys of the group have in common
	of    []secretKeys
}

type secretKeys struct{ names, values []byte }

// ReadSealer returns the sealer of a group, by its prefix and view, from a file with one secret a line, or two. Blank lines
// and lines that begin with # do not count.
func ReadSealer(path, prefix, view string) (*Sealer, error) {
	text, err := regular.Read(path, mostSecretIn)
	if err != nil {
		return nil, err
	}
	s, err := NewSealer(text, prefix, view)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return s, nil
}

// NewSealer is ReadSealer from a file's text.
func NewSealer(text []byte, prefix, view string) (*Sealer, error) {
	if len(text) > mostSecretIn {
		return nil, fmt.Errorf("more than %d bytes", mostSecretIn)
	}
	s := new(Sealer)
	for _, part := range []string{prefix, view} {
		s.group = binary.BigEndian.AppendUint32(s.group, uint32(len(part)))
		s.group = append(s.group, part...)
	}
	for i, line := range bytes.Split(text, []byte("\n")) {
		line = bytes.TrimSpace(line)
		if len(line) == 0 || line[0] == '#' {
			continue
		}
		if len(line) < minSecret {
			return nil, fmt.Errorf("line %d: a secret has %d bytes or more (openssl rand -base64 32)", i+1, minSecret)
		}
		if len(s.of) == mostSecrets {
			return nil, fmt.Errorf("line %d: more than %d secrets: the first seals, both open", i+1, mostSecrets)
		}
		var k secretKeys
		var err1, err2 error
		k.names, err1 = hkdf.Key(sha256.New, line, nil, fmt.Sprintf("optcache shared v%d names", sealVersion), sha256.Size)
		k.values, err2 = hkdf.Key(sha256.New, line, nil, fmt.Sprintf("optcache shared v%d values", sealVersion), sha256.Size)
		if err := errors.Join(err1, err2); err != nil {
			return nil, err
		}
		s.of = append(s.of, k)
	}
	if len(s.of) == 0 {
		return nil, errors.New("there is no secret in it")
	}
	return s, nil
}

// names returns the keys of a question in an epoch: one for each secret, the one that is written first.
func (s *Sealer) names(q *Question, epoch uint64) (all []string) {
	b := make([]byte, 0, len(s.group)+len(q.Name)+len(q.Subnet)+32)
	b = append(b, sealVersion)
	b = append(b, s.group...)
	b = binary.BigEndian.AppendUint64(b, epoch)
	b = binary.BigEndian.AppendUint16(b, q.Type)
	b = binary.BigEndian.AppendUint16(b, q.Class)
	var flags byte
	if q.DO {
		flags |= flagDO
	}
	if q.CD {
		flags |= flagCD
	}
	b = append(b, flags, byte(len(q.Name)))
	b = append(b, q.Name...)
	b = append(b, q.Subnet...)
	for i := range s.of {
		mac := hmac.New(sha256.New, s.of[i].names)
		mac.Write(b)
		all = append(all, base64.RawURLEncoding.EncodeToString(mac.Sum(nil)[:nameBytes]))
	}
	return all
}

// aead returns the cipher for the value of one key. Each key has a cipher of its own, so that a value is bound to its key, and
// so that random nonces suffice for as many values as there may ever be.
func (k *secretKeys) aead(name string) cipher.AEAD {
	mac := hmac.New(sha256.New, k.values)
	mac.Write([]byte(name))
	block, err := aes.NewCipher(mac.Sum(nil))
	if err != nil {
		panic(err) // the length of the key is right
	}
	aead, err := cipher.NewGCM(block)
	if err != nil {
		panic(err)
	}
	return aead
}

// seal seals text for a key by the first secret.
func (s *Sealer) seal(name string, text []byte) []byte {
	b := make([]byte, 1+nonceBytes, 1+nonceBytes+len(text)+tagBytes)
	b[0] = sealVersion
	rand.Read(b[1:])
	return s.of[0].aead(name).Seal(b, b[1:], text, append(b[:1:1], s.group...))
}

// open opens what seal has made for the key. value is not changed.
func (s *Sealer) open(name string, value []byte) (text []byte, err error) {
	switch {
	case len(value) > 0 && value[0] != sealVersion:
		return nil, RefusedVersion
	case len(value) < 1+nonceBytes+tagBytes:
		return nil, RefusedSealed
	}
	for i := range s.of {
		text, err := s.of[i].aead(name).Open(nil, value[1:1+nonceBytes], value[1+nonceBytes:], append(value[:1:1], s.group...))
		if err == nil {
			return text, nil
		}
	}
	return nil, RefusedSealed
}

// openAnswer opens the value of a key as an answer.
func (s *Sealer) openAnswer(name string, value []byte) (*Answer, error) {
	if len(value) > maxSealed {
		return nil, RefusedSealed
	}
	text, err := s.open(name, value)
	if err != nil {
		return nil, err
	}
	a := new(Answer)
	return a, a.read(text)
}
