// Package page has tests of the control interface's web page, in a browser: Debian's chromium, driven by chromedp. It is a module of
// its own, because the plugin needs neither.
package page

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"image"
	"image/color"
	"image/draw"
	"image/png"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/chromedp/chromedp"
	"github.com/chromedp/chromedp/kb"
)

// shown are numbers of the page and the series that they agree with.
var shown = map[string]string{
	"#total-requests":                "requests_total",
	"#total-misses":                  "misses_total",
	"#total-served_stale":            "served_stale_total",
	"#total-evictions":               "evictions_total",
	`[id="total-hits.hot"]`:          `tier_hits_total{tier="hot"}`,
	`[id="total-hits.protected"]`:    `tier_hits_total{tier="protected"}`,
	`[id="total-hits.probationary"]`: `tier_hits_total{tier="probationary"}`,
	`[id="total-sent.fastpath"]`:     `sent_total{way="fastpath"}`,
	`[id="total-sent.bytes"]`:        `sent_total{way="bytes"}`,
	"#tile-entries":                  "entries",
}

// One server and one browser are for all tests, because both take their time to start.
func TestPage(t *testing.T) {
	chrome := chromium(t)
	s := start(t, "", "")
	if _, err := s.ask(nasty + ".example.org."); err != nil {
		t.Fatal(err)
	}
	t.Run("numbers", func(t *testing.T) { testNumbers(t, s, open(t, chrome, s.url, 1200, 900, false)) })
	t.Run("flush", func(t *testing.T) { testFlush(t, s, open(t, chrome, s.url, 1200, 900, false)) })
	t.Run("list", func(t *testing.T) { testList(t, open(t, chrome, s.url, 1200, 900, false)) })
	t.Run("keyboard", func(t *testing.T) { testKeyboard(t, s, open(t, chrome, s.url, 1200, 900, false)) })
	t.Run("reload", func(t *testing.T) { testReload(t, s, open(t, chrome, s.url, 1200, 900, false)) })
	t.Run("light", func(t *testing.T) { testReading(t, open(t, chrome, s.url, 1200, 900, false)) })
	t.Run("dark, on a telephone", func(t *testing.T) { testReading(t, open(t, chrome, s.url, 360, 740, true)) })
	t.Run("top", func(t *testing.T) { testTop(t, s, open(t, chrome, s.url, 1200, 900, false)) })
	t.Run("shared", func(t *testing.T) { testShared(t, chrome) })
	t.Run("token", func(t *testing.T) { testToken(t, chrome) })
}

// Under load, a number of the page lies between what /metrics says before and after. Without load, both are the same.
func testNumbers(t *testing.T, s *server, b *tab) {
	b.wantText("#state", "Live")
	stop, answers := s.load()
	defer stop()
	eventually(t, "answers come", func() error {
		if n := answers.Load(); n < 2000 {
			return fmt.Errorf("%d", n)
		}
		return nil
	})
	before := s.scrape()
	// An event of after the scrape has come when there have been two.
	eval[bool](b, `new Promise(done => { let n = 0; const o = new MutationObserver(() => { if (++n === 3) { o.disconnect(); done(true); } });
		o.observe(document.getElementById('total-requests'), {childList: true, characterData: true, subtree: true}); })`)
	of := make(map[string]float64)
	for at := range shown {
		of[at] = b.number(at)
	}
	after := s.scrape()
	for at, series := range shown {
		if of[at] < before[series] || of[at] > after[series] {
			t.Errorf("%s is %v, and %s was %v, then %v", at, of[at], series, before[series], after[series])
		}
	}
	if before["requests_total"] == after["requests_total"] || of[`[id="total-sent.fastpath"]`] == 0 {
		t.Error("there is no load")
	}
	if rate := b.text("#tile-queries"); rate == "0/s" || rate == "–/s" {
		t.Errorf("queries: %s", rate)
	}
	stop()
	eventually(t, "the numbers are the same", func() error {
		at := s.scrape()
		for selector, series := range shown {
			if n := b.number(selector); n != at[series] {
				return fmt.Errorf("%s is %v, and %s is %v", selector, n, series, at[series])
			}
		}
		return nil
	})
	// The charts say the same: what they have last is of now, and the shares of batches add up.
	wantSame := func(chart, label string, want float64) {
		t.Helper()
		got := b.number(fmt.Sprintf(`[aria-labelledby="chart-%s"] [data-series="%s"]`, chart, label))
		if got != want {
			t.Errorf("%s, %s: %v, and %v is expected", chart, label, got, want)
		}
	}
	at := s.scrape()
	wantSame("classes", "denial", at[`entries{type="denial"}`])
	wantSame("flights", "requests that wait for one", at["coalesce_waiting"])
	if text := b.text(`[aria-labelledby="chart-batches"] .legend`); !strings.Contains(text, "≤ 1 ") {
		t.Errorf("batches: %q", text)
	}
	if text := b.text(`[aria-labelledby="chart-upstream"] .legend`); !strings.Contains(text, " ms ") {
		t.Errorf("time of upstream answers: %q", text)
	}
	const answered = `miss_duration_seconds_count{outcome="answered"}`
	if n := eval[float64](b, `fetch('/v1/status').then(r => r.json()).then(s => Object.values(s.blocks[0].miss_times).reduce((a, b) => a + b))`); n != at[answered] {
		t.Errorf("%v times, and %v in the metrics", n, at[answered])
	}
	if pictures := eval[int](b, "document.querySelectorAll('.plot canvas').length"); pictures < 7 {
		t.Errorf("%d pictures", pictures)
	}
	b.wantNoFaults()
}

func testFlush(t *testing.T, s *server, b *tab) {
	const name = "flushed.example.org."
	if _, err := s.ask(name); err != nil {
		t.Fatal(err)
	}
	b.wantText("#state", "Live")
	b.fill("#name", name)
	b.click("#search button[value=lookup]")
	b.wantText("#found", "1 held for "+name)
	b.wantText("#results", "192.0.2.1")
	b.click("#results tr button")
	b.wantText("#question-text", "Remove the answers for "+name+", of type A, in all blocks?")
	b.click("#no")
	b.wantText("#found", "Nothing is flushed")
	if n := s.held(name); n != 1 {
		t.Fatalf("%d are held after a no", n)
	}
	b.click("#results tr button")
	b.click("#yes")
	b.wantText("#found", "1 flushed")
	if n := s.held(name); n != 0 {
		t.Errorf("%d are held after a yes", n)
	}
	b.click("#search button[value=lookup]")
	b.wantText("#found", "Nothing is held")
	b.fill("#name", "a..b")
	b.click("#search button[value=lookup]")
	b.wantText("#found", `Failed: name: "a..b"`)
	b.wantNoFaults("400")
}

// A list goes on, and a name that looks like markup is text.
func testList(t *testing.T, b *tab) {
	b.wantText("#state", "Live")
	b.fill("#kind", "success")
	b.click("#search button[value=list]")
	b.wantText("#found", "100 listed, and there is more")
	b.click("#more")
	b.wantText("#found", "200 listed, and there is more")
	b.fill("#name", nasty+".example.org.")
	b.click("#search button[value=list]")
	b.wantText("#found", "1 listed")
	b.wantText("#results", "onerror=window.nasty=1")
	if eval[bool](b, "window.nasty === 1 || document.querySelector('#results img') !== null") {
		t.Error("a name is markup")
	}
	b.wantNoFaults()
}

// All can be done with the keyboard.
func testKeyboard(t *testing.T, s *server, b *tab) {
	const name = "typed.example.org."
	if _, err := s.ask(name); err != nil {
		t.Fatal(err)
	}
	b.wantText("#state", "Live")
	b.do(chromedp.KeyEvent(kb.Tab))
	if at := eval[string](b, "document.activeElement.className"); at != "skip" {
		t.Errorf("the first stop is %q", at)
	}
	b.do(chromedp.KeyEvent(kb.Enter))
	tabTo := func(what string) {
		t.Helper()
		for range 60 {
			if eval[bool](b, "document.activeElement.matches("+fmt.Sprintf("%q", what)+")") {
				return
			}
			b.do(chromedp.KeyEvent(kb.Tab))
		}
		t.Fatalf("%s is not reached", what)
	}
	tabTo("#name")
	b.do(chromedp.KeyEvent(name + kb.Enter))
	b.wantText("#found", "1 held for "+name)
	tabTo("#results button")
	b.do(chromedp.KeyEvent(kb.Enter))
	b.wantText("#question-text", name)
	if at := eval[string](b, "document.activeElement.id"); at != "no" {
		t.Errorf("the question begins at %q", at)
	}
	b.do(chromedp.KeyEvent(kb.Escape))
	b.wantText("#found", "Nothing is flushed")
	b.do(chromedp.KeyEvent(kb.Enter))
	tabTo("#yes")
	b.do(chromedp.KeyEvent(kb.Enter))
	b.wantText("#found", "1 flushed")
	if n := s.held(name); n != 0 {
		t.Errorf("%d are held", n)
	}
	b.wantNoFaults()
}

// A page that is open sees a reload: it goes on, and tells of it.
func testReload(t *testing.T, s *server, b *tab) {
	b.wantText("#state", "Live")
	entries := b.number("#tile-entries")
	s.configure("success 5000")
	s.reload()
	b.wantText("#history", "reload")
	b.wantText("#history", "answers kept")
	b.wantText("#more-entries", "of 15,000")
	b.wantText("#state", "Live")
	if n := b.number("#tile-entries"); n == 0 || n > entries {
		t.Errorf("%v entries, after %v", n, entries)
	}
	b.click("#snapshot")
	b.wantText("#snapshot-state", "Written: 1")
	b.wantText("#history", "snapshot")
	b.wantText("#tile-snapshot", "old")
	b.wantNoFaults()
}

// Whoever reads it, on whatever, can read it.
func testReading(t *testing.T, b *tab) {
	b.wantText("#state", "Live")
	b.fill("#name", "example.org")
	b.click("#subtree")
	b.click("#search button[value=list]")
	b.wantText("#found", "100 listed")
	b.click("#charts summary")
	b.wantNoOverflow()
	b.wantAccessible()
	b.click("#search button[value=flush]")
	b.wantText("#question-text", "all names below it")
	b.wantNoOverflow()
	b.wantAccessible()
	b.click("#no")
	b.wantNoFaults()
}

// What the server says comes most often is the first, and a click on it looks it up.
func testTop(t *testing.T, s *server, b *tab) {
	const often = "often.example.org."
	for range 3000 {
		if _, err := s.ask(often); err != nil {
			t.Fatal(err)
		}
	}
	b.wantText("#top tbody tr", often)
	b.click("#top tbody button")
	b.wantText("#found", "1 held for "+often)
	b.fill("#top-by", "misses")
	b.do(chromedp.Evaluate[chromedp.Void]("document.getElementById('top-by').dispatchEvent(new Event('change'))"))
	b.wantText("#top", ".example.org.")
	b.fill("#top-by", "clients")
	b.do(chromedp.Evaluate[chromedp.Void]("document.getElementById('top-by').dispatchEvent(new Event('change'))"))
	b.wantText("#top", "top_clients in the Corefile turns that on")
	b.wantNoFaults("409")
}

// The numbers of the second level are those of the metrics, and the page says when it is away.
func testShared(t *testing.T, chrome context.Context) {
	s, redis := startShared(t)
	b := open(t, chrome, s.url, 360, 740, false)
	b.wantText("#tile-shared", "in use")
	for i := range 20 {
		if _, err := s.ask(fmt.Sprintf("s%d.example.org.", i)); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "the page has the numbers", func() error {
		at := s.scrape()
		for selector, series := range map[string]string{
			`[id="total-shared.writes.written"]`: `shared_writes_total{outcome="written"}`,
			`[id="total-shared.asked.miss"]`:     `shared_requests_total{outcome="miss"}`,
			`[id="total-shared.asked.hit"]`:      `shared_requests_total{outcome="hit"}`,
			`[id="total-shared.flushes"]`:        "shared_flushes_total",
			`[id="total-shared.warmed"]`:         "shared_warmed_total",
		} {
			if n := b.number(selector); n != at[series] {
				return fmt.Errorf("%s is %v, and %s is %v", selector, n, series, at[series])
			}
		}
		if at[`shared_requests_total{outcome="miss"}`] == 0 || at[`shared_writes_total{outcome="written"}`] == 0 {
			return errors.New("it is not used")
		}
		return nil
	})
	b.wantText(`[aria-labelledby="chart-shared"] .legend`, "miss")
	b.wantText("#more-shared", "hits")
	redis.Kill()
	b.wantText("#tile-shared", "away")
	b.wantText("#more-shared", "refused")
	b.wantNoOverflow()
	b.wantAccessible()
	b.wantNoFaults()
}

// Where a token is wanted, the page asks for it, and shows nothing without it.
func testToken(t *testing.T, chrome context.Context) {
	s := start(t, "open-sesame", "")
	b := open(t, chrome, s.url, 360, 800, false)
	b.wantText("#state", "wants a token")
	b.wantNoOverflow()
	b.wantAccessible()
	shows := func() bool { return eval[bool](b, "document.getElementById('data').checkVisibility()") }
	b.fill("#token-text", "guess")
	b.click("#token button")
	b.wantText("#state", "wants a token")
	if shows() {
		t.Error("it shows data")
	}
	b.fill("#token-text", s.token)
	b.click("#token button")
	b.wantText("#state", "Live")
	if !shows() {
		t.Error("it shows no data")
	}
	b.do(chromedp.Reload())
	b.wantText("#state", "Live")
	if eval[bool](b, "localStorage.length > 0 || document.cookie !== '' || location.href.includes('sesame')") {
		t.Error("the token is kept for longer than the tab")
	}
	b.wantNoFaults("401")
}

// mostBytes is how large a picture may be.
const mostBytes = 150 << 10

// TestPictures takes the pictures in docs, if OPTCACHE_PICTURES says where they go.
func TestPictures(t *testing.T) {
	dir := os.Getenv("OPTCACHE_PICTURES")
	if dir == "" {
		t.Skip("make pictures")
	}
	chrome := chromium(t)
	s := start(t, "", "")
	light := open(t, chrome, s.url, 1200, 1280, false)
	dark := open(t, chrome, s.url, 1200, 1000, true)
	phone := open(t, chrome, s.url, 390, 844, false)
	light.wantText("#state", "Live")
	stop, _ := s.load()
	defer stop()
	for i, at := range []time.Duration{15, 10, 15} {
		time.Sleep(at * time.Second) // lines need time to get long
		if i == 0 {
			s.reload()
		}
	}
	light.take(filepath.Join(dir, "page-light.png"))
	dark.fill("#name", "w1.example.org")
	dark.click("#search button[value=lookup]")
	dark.wantText("#found", "held for")
	dark.do(chromedp.Evaluate[chromedp.Void]("document.getElementById('search-title').scrollIntoView()"))
	dark.take(filepath.Join(dir, "page-dark.png"))
	phone.take(filepath.Join(dir, "page-phone.png"))
}

// frequent returns the n colours that a picture has most often.
func frequent(p image.Image, n int) (all color.Palette) {
	counts := make(map[color.Color]int)
	for y := range p.Bounds().Dy() {
		for x := range p.Bounds().Dx() {
			counts[p.At(x, y)]++
		}
	}
	for c := range counts {
		all = append(all, c)
	}
	slices.SortFunc(all, func(a, b color.Color) int { return cmp.Compare(counts[b], counts[a]) })
	return all[:min(n, len(all))]
}

// take writes a picture of what the tab shows, with 128 colours.
func (b *tab) take(path string) {
	b.Helper()
	shot, err := chromedp.Run(b.ctx, chromedp.CaptureScreenshot())
	if err != nil {
		b.Fatal(err)
	}
	picture, err := png.Decode(bytes.NewReader(shot))
	if err != nil {
		b.Fatal(err)
	}
	small := image.NewPaletted(picture.Bounds(), frequent(picture, 128))
	draw.Draw(small, small.Bounds(), picture, picture.Bounds().Min, draw.Src)
	var out bytes.Buffer
	if err := (&png.Encoder{CompressionLevel: png.BestCompression}).Encode(&out, small); err != nil {
		b.Fatal(err)
	}
	if out.Len() > mostBytes {
		b.Errorf("%s has %d bytes", path, out.Len())
	}
	if err := os.WriteFile(path, out.Bytes(), 0o644); err != nil {
		b.Fatal(err)
	}
}
