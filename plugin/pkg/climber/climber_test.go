package climber

import "testing"

// These tests are about the hill alone, on a curve with a known top.

func TestClimberFindsTheTop(t *testing.T) {
	for _, top := range []float64{20, 250, 500, 800} {
		h := hill{at: FirstWindow, least: LeastWindow, most: MostWindow, step: firstStep}
		for range 200 {
			d := (h.at - top) / 1000
			h.climb(0.6 - d*d)
		}
		if h.at < top-60 || h.at > top+60 {
			t.Errorf("ended at %v, the top is at %v", h.at, top)
		}
	}
}
