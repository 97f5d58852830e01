package page

import (
	"context"
	_ "embed"
	"encoding/json"
	"fmt"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/chromedp/cdproto/emulation"
	"github.com/chromedp/chromedp"
)

//go:embed testdata/axe-4.14.1.min.js
var axe string

// tab is a tab of a browser.
type tab struct {
	*testing.T
	ctx context.Context

	mu     sync.Mutex // guards faults
	faults []string   // what the page or the browser complains about
}

// chromium returns a browser. A machine without one skips the test.
func chromium(t *testing.T) context.Context {
	t.Helper()
	path, err := exec.LookPath("chromium")
	if err != nil {
		t.Skip("there is no chromium: apt-get install chromium")
	}
	ctx, stop := chromedp.NewContext(context.Background(), chromedp.WithAllocatorOptions(chromedp.ExecPath(path), chromedp.NoSandbox))
	t.Cleanup(stop)
	if err := chromedp.Do(ctx); err != nil {
		t.Fatal(err)
	}
	return ctx
}

// open opens a page in a tab of its own. With dark, the browser prefers dark colours.
func open(t *testing.T, in context.Context, url string, width, height int64, dark bool) *tab {
	t.Helper()
	ctx, stop := chromedp.NewContext(in)
	t.Cleanup(stop)
	messages := chromedp.Console(ctx)
	limited, cancel := context.WithTimeout(ctx, 90*time.Second)
	t.Cleanup(cancel)
	b := &tab{T: t, ctx: limited}
	go func() {
		for m, err := range messages {
			if err != nil {
				return
			}
			if m.IsException() || m.Type == chromedp.ConsoleError || m.Type == chromedp.ConsoleWarning {
				b.mu.Lock()
				b.faults = append(b.faults, fmt.Sprintf("%s: %s %s:%d", m.Type, m.Text, m.URL, m.Line))
				b.mu.Unlock()
			}
		}
	}()
	scheme := "light"
	if dark {
		scheme = "dark"
	}
	media := emulation.SetEmulatedMediaParams{Features: []*emulation.MediaFeature{
		{Name: "prefers-color-scheme", Value: scheme}, {Name: "prefers-reduced-motion", Value: "reduce"},
	}}
	b.do(chromedp.EmulateViewport(width, height, func(p *emulation.SetDeviceMetricsOverrideParams, _ *emulation.SetTouchEmulationEnabledParams) {
		p.Mobile = width < 600
	}))
	if _, err := chromedp.Call(b.ctx, emulation.SetEmulatedMedia, media); err != nil {
		t.Fatal(err)
	}
	b.do(chromedp.Navigate(url))
	return b
}

func (b *tab) do(actions ...chromedp.Action[chromedp.Void]) {
	b.Helper()
	if err := chromedp.Do(b.ctx, actions...); err != nil {
		b.Fatal(err)
	}
}

// eval returns the value of an expression, or of the promise that it is.
func eval[T any](b *tab, expression string) T {
	b.Helper()
	value, err := chromedp.Run(b.ctx, chromedp.Evaluate[T](expression, chromedp.EvalAwaitPromise))
	if err != nil {
		b.Fatalf("%.200s: %v", expression, err)
	}
	return value
}

// text is what an element has.
func (b *tab) text(selector string) string {
	b.Helper()
	return eval[string](b, fmt.Sprintf("document.querySelector(%q)?.textContent ?? ''", selector))
}

// number is what an element has as a number.
func (b *tab) number(selector string) float64 {
	b.Helper()
	var n float64
	if err := json.Unmarshal([]byte(strings.ReplaceAll(b.text(selector), ",", "")), &n); err != nil {
		b.Fatalf("%s: %q: %v", selector, b.text(selector), err)
	}
	return n
}

// wantText waits until an element's text has some words.
func (b *tab) wantText(selector, words string) {
	b.Helper()
	eventually(b.T, selector+" has "+words, func() error {
		if text := b.text(selector); !strings.Contains(text, words) {
			return fmt.Errorf("%q", text)
		}
		return nil
	})
}

// click clicks on an element that is shown, as a person would.
func (b *tab) click(selector string) {
	b.Helper()
	b.do(chromedp.ScrollIntoView(chromedp.CSS(selector)), chromedp.Click(chromedp.CSS(selector), chromedp.NodeVisible))
}

// fill types a text into a field.
func (b *tab) fill(selector, text string) {
	b.Helper()
	b.do(chromedp.SetValue(chromedp.CSS(selector), text))
}

// wantNoFaults checks that neither the page nor the browser has complained, but for what has one of these words.
func (b *tab) wantNoFaults(but ...string) {
	b.Helper()
	b.mu.Lock()
	defer b.mu.Unlock()
next:
	for _, fault := range b.faults {
		for _, word := range but {
			if strings.Contains(fault, word) {
				continue next
			}
		}
		b.Error(fault)
	}
}

// wantNoOverflow checks that the page is no wider than the window.
func (b *tab) wantNoOverflow() {
	b.Helper()
	if over := eval[float64](b, "document.documentElement.scrollWidth - innerWidth"); over > 0 {
		b.Errorf("the page is %v px wider than the window: %s", over, eval[string](b, `[...document.querySelectorAll('body *')]
			.filter(e => e.getBoundingClientRect().right > innerWidth && !e.closest('.scroll, .skip, .plot')).map(e => e.tagName + '#' + e.id + '.' + e.className).join(' ')`))
	}
}

// violation is what axe-core finds.
type violation struct {
	ID, Impact, Help string
	Nodes            []struct{ HTML, FailureSummary string }
}

// wantAccessible checks that axe-core finds nothing serious.
func (b *tab) wantAccessible() {
	b.Helper()
	if !eval[bool](b, "Boolean(window.axe)") {
		b.do(chromedp.Evaluate[chromedp.Void](axe))
	}
	for _, v := range eval[[]violation](b, "axe.run({resultTypes: ['violations']}).then(r => r.violations)") {
		if v.Impact == "serious" || v.Impact == "critical" {
			b.Errorf("%s (%s): %s: %v", v.ID, v.Impact, v.Help, v.Nodes)
		} else {
			b.Logf("%s (%s): %s: %v", v.ID, v.Impact, v.Help, v.Nodes)
		}
	}
}
