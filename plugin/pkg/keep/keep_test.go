package keep

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/miekg/dns"
)

func TestRead(t *testing.T) {
	for _, c := range []struct {
		text string
		want []Question
		err  string
	}{
		{"", nil, ""},
		{"# nothing\n\n  # here\n", nil, ""},
		{"a.nl\n", []Question{{"a.nl.", dns.TypeA}, {"a.nl.", dns.TypeAAAA}}, ""},
		{"A.nl. mx TXT # mail\nb.nl A\na.nl MX", []Question{{"a.nl.", dns.TypeMX}, {"a.nl.", dns.TypeTXT}, {"b.nl.", dns.TypeA}}, ""},
		{"a.nl\nb..nl", nil, `f:2: "b..nl" is not a domain name`},
		{"a.nl A\n\nb.nl A ADDRESS", nil, `f:3: "ADDRESS" is not a type that can be kept`},
		{"a.nl ANY", nil, `"ANY"`},
		{"a.nl AXFR", nil, `"AXFR"`},
		{strings.Repeat("x", maxLine+1), nil, "f:1: "},
	} {
		got, err := Read(strings.NewReader(c.text), "f")
		if !slices.Equal(got, c.want) || (err == nil) != (c.err == "") || err != nil && !strings.Contains(err.Error(), c.err) {
			t.Errorf("%.40q: %v, %v; want %v, %s", c.text, got, err, c.want, c.err)
		}
	}
	var many strings.Builder
	for i := range Most + 1 {
		fmt.Fprintf(&many, "n%d.nl A\n", i)
	}
	if _, err := Read(strings.NewReader(many.String()), "f"); err == nil || !strings.Contains(err.Error(), "10001") {
		t.Errorf("%d questions: %v", Most+1, err)
	}
}

// notes are what a keeper has asked.
type notes struct {
	mu    sync.Mutex // guards at
	at    map[Question][]time.Duration
	begun time.Time
}

func (n *notes) add(q Question) int {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.at[q] = append(n.at[q], time.Since(n.begun))
	return len(n.at[q])
}

func (n *notes) of(q Question) []time.Duration {
	n.mu.Lock()
	defer n.mu.Unlock()
	return slices.Clone(n.at[q])
}

func TestKeeperAsksBeforeTheAnswerExpires(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := &notes{at: make(map[Question][]time.Duration), begun: time.Now()}
		long, short, failing := Question{"a.", dns.TypeA}, Question{"b.", dns.TypeA}, Question{"c.", dns.TypeA}
		k := &Keeper{List: []Question{long, short, failing}, Ask: func(_ context.Context, q Question) (time.Duration, bool) {
			times := n.add(q)
			switch q {
			case long:
				return 100 * time.Second, true
			case short:
				return 3 * time.Second, true
			}
			return 20 * time.Second, times > 6
		}}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan bool)
		go func() {
			k.Run(ctx)
			close(done)
		}()
		time.Sleep(199500 * time.Millisecond)
		cancel()
		<-done
		in := func(seconds ...int) (all []time.Duration) {
			for _, s := range seconds {
				all = append(all, time.Duration(s)*time.Second)
			}
			return all
		}
		if got, want := n.of(long), in(0, 90, 180); !slices.Equal(got, want) {
			t.Errorf("TTL 100: %v, want %v", got, want)
		}
		if got := n.of(short); len(got) != 100 || got[1] != 2*time.Second {
			t.Errorf("TTL 3: %d times: %v", len(got), got)
		}
		if got, want := n.of(failing), in(0, 5, 15, 35, 75, 135, 195); !slices.Equal(got, want) {
			t.Errorf("failing: %v, want %v", got, want)
		}
	})
}

func TestKeeperReadsItsFileAgain(t *testing.T) {
	path := filepath.Join(t.TempDir(), "names")
	write := func(text string, at time.Duration) {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chtimes(path, time.Time{}, time.Now().Add(at)); err != nil {
			t.Fatal(err)
		}
	}
	synctest.Test(t, func(t *testing.T) {
		n := &notes{at: make(map[Question][]time.Duration), begun: time.Now()}
		var said []string
		k := &Keeper{List: []Question{{"own.", dns.TypeA}}, Path: path,
			Ask: func(_ context.Context, q Question) (time.Duration, bool) {
				n.add(q)
				return 10 * time.Second, true
			},
			Say: func(err error) { said = append(said, fmt.Sprint(err)) },
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan bool)
		go func() {
			k.Run(ctx)
			close(done)
		}()
		time.Sleep(7 * time.Second) // there is no file yet
		write("a. A\nb. A\nown. A\n", time.Second)
		time.Sleep(30 * time.Second)
		write("b. A\nc. BAD\n", 2*time.Second) // the list stays
		time.Sleep(30 * time.Second)
		before := n.of(Question{"a.", dns.TypeA})
		write("b. A\nc. A\n", 3*time.Second)
		time.Sleep(5*time.Second + time.Millisecond)
		after := n.of(Question{"a.", dns.TypeA})
		time.Sleep(60 * time.Second)
		cancel()
		<-done
		if len(before) < 5 || len(n.of(Question{"a.", dns.TypeA})) > len(after) {
			t.Errorf("a: asked %d times while it is there, then %d times, %d in the end", len(before), len(after), len(n.of(Question{"a.", dns.TypeA})))
		}
		for _, name := range []string{"own.", "b.", "c."} {
			if got := n.of(Question{name, dns.TypeA}); len(got) < 6 {
				t.Errorf("%s: asked %d times", name, len(got))
			}
		}
		if len(said) != 4 || !strings.Contains(said[0], "no such file") || said[1] != "<nil>" || !strings.Contains(said[2], `names:2: "BAD"`) || said[3] != "<nil>" {
			t.Errorf("said %q", said)
		}
	})
}

// A file that has too many together with the other questions is named, and not asked for.
func TestKeeperIsBounded(t *testing.T) {
	path := filepath.Join(t.TempDir(), "names")
	if err := os.WriteFile(path, []byte("a. A\nb. A\n0. A\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for own, want := range map[int]int{Most - 2: Most, Most - 1: Most - 1} {
		synctest.Test(t, func(t *testing.T) {
			n := &notes{at: make(map[Question][]time.Duration), begun: time.Now()}
			var said []string
			k := &Keeper{Path: path, Ask: func(_ context.Context, q Question) (time.Duration, bool) {
				n.add(q)
				return time.Hour, true
			}, Say: func(err error) { said = append(said, fmt.Sprint(err)) }}
			for i := range own {
				k.List = append(k.List, Question{fmt.Sprintf("%d.", i), dns.TypeA})
			}
			ctx, cancel := context.WithCancel(t.Context())
			done := make(chan bool)
			go func() {
				k.Run(ctx)
				close(done)
			}()
			time.Sleep(time.Minute)
			cancel()
			<-done
			if len(n.at) != want || len(said) != 1 || (said[0] == "<nil>") != (want == Most) || want < Most && !strings.Contains(said[0], path+": with the others there are 10001 questions") {
				t.Errorf("%d questions beside a file: %d are asked, said %q", own, len(n.at), said)
			}
		})
	}
}
