package main

import (
	"bufio"
	"fmt"
	"html"
	"io"
	"math"
	"os"
	"slices"
	"strconv"
)

// This file draws the results: a panel for each trace, in it a group of bars for each size, in it
// a bar for each policy. The limit is no bar but a dashed line across its group, for it is no
// cache that one could have.

// Measures of the chart, in pixels.
const (
	barWidth    = 27 // of a figure with three digits
	groupGap    = 30
	panelHeight = 210
	panelGap    = 72 // title of the panel below and sizes of the one above
	left        = 58 // figures and name of the axis
	right       = 24
	top         = 100 // title, legend
	bottom      = 46
	legendWidth = 86 // of one name
)

// style has the colours of the bars (Okabe and Ito's, which the colour-blind can tell apart) and
// those of everything else, for a light page and then for a dark one. It does without variables,
// which not every program that draws SVG understands.
const style = `
text { font: 11px system-ui, sans-serif; fill: #24292f }
.page { fill: #ffffff } .axis { fill: #6e7781 } .grid { stroke: #d8dee4 }
.limit { stroke: #24292f; stroke-width: 1.5; stroke-dasharray: 5 3 }
.title { font-size: 16px; font-weight: 600 } .panel { font-size: 13px; font-weight: 600 }
.figure { font-size: 10px } .inside { fill: #000000 } .ours { font-weight: 700 }
.optcache { fill: #d55e00 } .cache { fill: #999999 } .lru { fill: #56b4e9 } .q2 { fill: #3f8fc5 }
.arc { fill: #009e73 } .otter { fill: #cc79a7 } .theine { fill: #e69f00 }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3 } .page { fill: #0d1117 } .axis { fill: #9198a1 } .grid { stroke: #30363d }
.limit { stroke: #e6edf3 } .inside { fill: #000000 }
}
`

// class is the name of a policy as a CSS class, which must not start with a digit.
func class(policy string) string {
	if policy == "2q" {
		return "q2"
	}
	return policy
}

func writeChart(path string, results []result) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	w := bufio.NewWriter(f)
	drawChart(w, results)
	if err := w.Flush(); err != nil {
		f.Close()
		return err
	}
	return f.Close()
}

// distinct returns what of returns for the results, each once, in the order of the results.
func distinct[T comparable](results []result, of func(result) T) (found []T) {
	for _, r := range results {
		if v := of(r); !slices.Contains(found, v) {
			found = append(found, v)
		}
	}
	return found
}

// drawChart writes the chart as SVG. Errors of w are for the caller to find.
func drawChart(w io.Writer, results []result) {
	traces := distinct(results, func(r result) string { return r.trace })
	sizes := distinct(results, func(r result) int { return r.size })
	names := distinct(results, func(r result) string { return r.policy })
	bars := slices.DeleteFunc(slices.Clone(names), func(n string) bool { return n == "limit" })

	group := max(len(bars), 2) * barWidth
	plot := len(sizes)*(group+groupGap) - groupGap
	width := max(left+plot+right, left+len(names)*legendWidth+right)
	height := top + len(traces)*(panelHeight+panelGap) - panelGap + bottom

	fmt.Fprintf(w, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" width="%[1]d" height="%d" role="img">`+"\n", width, height)
	fmt.Fprintln(w, "<title>Hit ratio by trace, size of the cache and policy</title>")
	fmt.Fprintf(w, "<style>%s</style>\n", style)
	fmt.Fprintln(w, `<rect class="page" width="100%" height="100%"/>`)
	text(w, left, 26, "title", "start", "Hit ratio")
	for i, n := range names {
		x := left + i*legendWidth
		if n == "limit" {
			fmt.Fprintf(w, `<line class="limit" x1="%d" x2="%d" y1="46" y2="46"/>`+"\n", x, x+16)
		} else {
			fmt.Fprintf(w, `<rect class="%s" x="%d" y="41" width="10" height="10"/>`+"\n", class(n), x)
		}
		text(w, x+20, 50, emphasis(n), "start", n)
	}
	for i, t := range traces {
		p := panel{w: w, y: top + i*(panelHeight+panelGap), plot: plot}
		p.results = slices.DeleteFunc(slices.Clone(results), func(r result) bool { return r.trace != t })
		p.axes(t)
		for j, size := range sizes {
			p.group(left+j*(group+groupGap), group, size, bars)
		}
	}
	fmt.Fprintln(w, "</svg>")
}

// panel is the part of the chart that is about one trace.
type panel struct {
	w       io.Writer
	results []result
	y       int // top edge
	plot    int // width
	most    float64
}

// height returns where a hit ratio is on the page.
func (p *panel) height(ratio float64) float64 {
	return float64(p.y) + panelHeight*(1-ratio/p.most)
}

// axes draws everything that is there before there is a bar.
func (p *panel) axes(title string) {
	for _, r := range p.results {
		p.most = max(p.most, r.ratio)
	}
	step := 10.0
	if p.most > 60 {
		step = 20
	}
	p.most = max(step*math.Ceil(p.most/step), step)
	text(p.w, left, p.y-14, "panel", "start", title)
	for v := 0.0; v <= p.most; v += step {
		y := p.height(v)
		fmt.Fprintf(p.w, `<line class="grid" x1="%d" x2="%d" y1="%.1f" y2="%.1f"/>`+"\n", left-6, left+p.plot, y, y)
		text(p.w, left-10, int(y)+4, "axis", "end", strconv.Itoa(int(v)))
	}
	middle := p.y + panelHeight/2
	fmt.Fprintf(p.w, `<text class="axis" transform="translate(18 %d) rotate(-90)" text-anchor="middle">hits, %%</text>`+"\n", middle)
}

// group draws the bars of one size, from x on.
func (p *panel) group(x, width, size int, bars []string) {
	foot := p.y + panelHeight
	text(p.w, x+width/2, foot+18, "axis", "middle", strconv.Itoa(size)+" answers")
	for _, r := range p.results {
		if r.size != size {
			continue
		}
		y := p.height(r.ratio)
		if r.policy == "limit" {
			fmt.Fprintf(p.w, `<line class="limit" x1="%d" x2="%d" y1="%.1f" y2="%.1f"><title>limit %.2f</title></line>`+"\n", x-4, x+width+4, y, y, r.ratio)
			text(p.w, x+width/2, int(y)-4, "figure", "middle", "limit "+short(r.ratio))
			continue
		}
		at := x + slices.Index(bars, r.policy)*barWidth
		fmt.Fprintf(p.w, `<rect class="%s" x="%d" y="%.1f" width="%d" height="%.1f"><title>%s %.2f</title></rect>`+"\n",
			class(r.policy), at+2, y, barWidth-4, float64(foot)-y, html.EscapeString(r.policy), r.ratio)
		if r.ratio < p.most/10 { // no room within the bar
			text(p.w, at+barWidth/2, int(y)-3, "figure "+emphasis(r.policy), "middle", short(r.ratio))
		} else {
			text(p.w, at+barWidth/2, int(y)+12, "figure inside "+emphasis(r.policy), "middle", short(r.ratio))
		}
	}
}

// short is a hit ratio in the width of a bar.
func short(ratio float64) string {
	if ratio > 99.95 {
		return "100"
	}
	return strconv.FormatFloat(ratio, 'f', 1, 64)
}

// emphasis is the class of text about a policy.
func emphasis(policy string) string {
	if policy == "optcache" {
		return "ours"
	}
	return ""
}

func text(w io.Writer, x, y int, class, anchor, s string) {
	fmt.Fprintf(w, `<text class="%s" x="%d" y="%d" text-anchor="%s">%s</text>`+"\n", class, x, y, anchor, html.EscapeString(s))
}
