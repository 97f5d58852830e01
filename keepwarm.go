package optcache

import (
	"context"
	"fmt"
	"io"
	"math"
	"path/filepath"
	"runtime"
	"slices"
	"sync/atomic"
	"time"
	"weak"

	"github.com/coredns/coredns/plugin/metadata"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/miekg/dns"

	"github.com/optcache/optcache/plugin/control"
	"github.com/optcache/optcache/plugin/control/api"
	controlclient "github.com/optcache/optcache/plugin/control/client"
	"github.com/optcache/optcache/plugin/pkg/arg"
	"github.com/optcache/optcache/plugin/pkg/keep"
	"github.com/optcache/optcache/plugin/pkg/regular"
	"github.com/optcache/optcache/plugin/pkg/snapshot"
	"github.com/optcache/optcache/plugin/pkg/zones"
)

// This file has what makes a cache warm that starts empty. The answers that keep_warm names are asked for at the start, and before
// they expire; package keep has the list and the times. Those of a neighbour come with warm_from; package client asks for them.

// warmOptions are the questions of keep_warm.
type warmOptions struct {
	list []keep.Question
	file string // with more of them; "": none
}

func (w *warmOptions) on() bool { return len(w.list) > 0 || w.file != "" }

// warmArgs reads NAME [TYPE...] | file PATH. The option may be given many times, with one file.
func (b *corefileBlock) warmArgs() error {
	words, err := arg.All(b.Controller, 1, 64)
	if err != nil {
		return err
	}
	if words[0] == "file" && len(words) == 2 {
		if b.warm.file != "" {
			return b.Errf("keep_warm file given twice")
		}
		if b.warm.file, err = filepath.Abs(words[1]); err != nil {
			return b.Errf("keep_warm file: %q: %v", words[1], err)
		}
		return nil
	}
	questions, err := keep.Questions(words)
	if err != nil {
		return b.Errf("keep_warm: %v", err)
	}
	b.warnOfZone(words[0], []string{questions[0].Name}, b.zones, "the zones that are cached for")
	if b.warm.list = append(b.warm.list, questions...); len(b.warm.list) > keep.Most {
		return b.Errf("keep_warm: there are more than %d questions", keep.Most)
	}
	return nil
}

// startInterval is how often a block that starts looks whether it serves.
const startInterval = 50 * time.Millisecond

// keepWarm begins to keep the answers warm, for the lifetime of the instance.
func (o *Optcache) keepWarm() (end func()) {
	ctx, end := o.lifetime()
	file, of := o.warm.file, weak.Make(o)
	k := &keep.Keeper{
		List: o.warm.list, Path: file,
		Ask: func(ctx context.Context, q keep.Question) (time.Duration, bool) {
			if o := of.Value(); o != nil {
				return o.askToKeep(ctx, q)
			}
			return 0, false
		},
		Say: func(err error) {
			if err != nil {
				log.Warningf("keep_warm: %v; the names of before are kept", err)
			} else {
				log.Infof("keep_warm: has read %s", file)
			}
		},
	}
	go func() {
		if waitFor(ctx, func() bool { return mayAsk(of) }) {
			k.Run(ctx)
		}
	}()
	return end
}

// lifetime returns a context that ends when end is called, or when the instance is garbage: nothing stops an instance whose start
// has failed.
func (o *Optcache) lifetime() (ctx context.Context, end func()) {
	ctx, cancel := context.WithCancel(context.Background())
	cleanup := runtime.AddCleanup(o, func(cancel context.CancelFunc) { cancel() }, cancel)
	return ctx, func() {
		cleanup.Stop()
		cancel()
	}
}

// waitFor waits until ready returns true. It returns false if ctx ends before.
func waitFor(ctx context.Context, ready func() bool) bool {
	for !ready() {
		select {
		case <-ctx.Done():
			return false
		case <-time.After(startInterval):
		}
	}
	return true
}

// mayAsk reports whether the block serves, so that its chain may be asked.
func mayAsk(of weak.Pointer[Optcache]) bool {
	o := of.Value()
	if o == nil || !o.runs() {
		return false
	}
	_, err := o.entrance()
	return err == nil
}

// warmPart is the part of its TTL, in per cent, beyond which an answer is warm. An answer is asked for when a tenth is left.
const warmPart = 20

// askToKeep asks the next plugin a question of keep_warm, and returns for how long the answer is kept now. It does not ask while the
// answer is warm all the same: one of before a reload, of a snapshot, or that a client has brought.
func (o *Optcache) askToKeep(ctx context.Context, q keep.Question) (left time.Duration, ok bool) {
	name, valid := zones.Wire(q.Name)
	if !valid || !o.rules.Serves(name) {
		return time.Hour, true // nothing would be kept
	}
	s := o.pool.Get().(*scratch)
	defer o.release(s)
	kept := func() (left int64, good bool) {
		s.Key.Set(o.store.seed, name, q.Type, dns.ClassINET, false, false)
		now := o.clock()
		if !o.store.search(s, now) || !s.Entry.Good(now) {
			return 0, false
		}
		return s.Entry.Remaining(now), true
	}
	seconds, ok := kept()
	if !ok || seconds <= 2 || 100*seconds <= warmPart*int64(s.Entry.TTL) {
		e, err := o.entrance()
		if err != nil || !o.askFor(metadata.ContextWithMetadata(e.context(ctx)), name, q.Type, false, false, o.serverOf(e.of), countKeptWarm) {
			return 0, false
		}
		seconds, ok = kept()
	}
	return time.Duration(seconds) * time.Second, ok
}

// warmFromOptions are the options of warm_from.
type warmFromOptions struct {
	from              []controlclient.Address // of control interfaces
	tokenFile, caFile string                  // "": none
}

func (w *warmFromOptions) on() bool { return len(w.from) > 0 }

// open returns a way to each neighbour. It reads the files, and asks nobody.
func (w *warmFromOptions) open() (all []*controlclient.Client, err error) {
	for _, at := range w.from {
		c, err := controlclient.New(controlclient.Options{
			Address: at, TokenFile: w.tokenFile, CAFile: w.caFile, Timeout: neighbourPatience, Agent: pluginName, Instance: control.Instance,
			NoToken: "warm_from URL... token FILE names one", MaxAnswer: mostNeighbourWords, Read: regular.Read,
		})
		if err != nil {
			return nil, err
		}
		all = append(all, c)
	}
	return all, nil
}

const (
	mostNeighbours = 64

	neighbourRounds    = 6
	neighbourPause     = time.Second
	neighbourWithin    = 5 * time.Minute
	neighbourPatience  = 10 * time.Second // from one piece of a dump to the next
	mostNeighbourWords = 8 << 20          // bytes of a neighbour's status
)

// warmFromArgs reads URL... [token FILE] [ca FILE].
func (b *corefileBlock) warmFromArgs() error {
	words, err := arg.All(b.Controller, 1, math.MaxInt)
	if err != nil {
		return err
	}
	o := &b.warmFrom
	files := map[string]*string{"token": &o.tokenFile, "ca": &o.caFile}
	for at := len(words) - 2; at > 0 && files[words[at]] != nil; at -= 2 {
		name, word, file := words[at], words[at+1], files[words[at]]
		if *file != "" {
			return b.Errf("warm_from: %s given twice", name)
		}
		if *file, err = filepath.Abs(word); err != nil {
			return b.Errf("warm_from %s: %q: %v", name, word, err)
		}
		words = words[:at]
	}
	if len(words) > mostNeighbours {
		return b.Errf("warm_from: there are more than %d URLs", mostNeighbours)
	}
	for i, word := range words {
		at, err := controlclient.ParseAddress(word)
		if err != nil {
			return b.Errf("warm_from: %v", err)
		}
		if slices.Contains(words[:i], word) {
			return b.Errf("warm_from: %q given twice", word)
		}
		if at.Plain() {
			b.warn("warm_from: %s is without TLS: who is on the way can make up answers, and read the token", word)
		}
		o.from = append(o.from, at)
	}
	return nil
}

// checkWarmFrom returns an error if a file of warm_from cannot be read.
func (b *corefileBlock) checkWarmFrom() error {
	if _, err := b.warmFrom.open(); err != nil {
		return fmt.Errorf("%s - warm_from: %w", b.at["warm_from"], err)
	}
	return nil
}

// neighbours takes a neighbour's answers over, once, where a block starts without any. A nil *neighbours takes none.
type neighbours struct {
	unread atomic.Bool // no neighbour's answers have come yet, and they may
	failed atomic.Int64
	intake
	end func() // ends it; the successor goes on
}

func (n *neighbours) isUnread() bool { return n != nil && n.unread.Load() }

// startNeighbours begins to take a neighbour's answers over, in the background, when it is known that the snapshot has brought none.
// It refers to the instance weakly: nothing stops an instance whose start has failed.
func (o *Optcache) startNeighbours() error {
	clients, err := o.warmFrom.open()
	if err != nil {
		return err
	}
	n, of := new(neighbours), weak.Make(o)
	ctx, end := o.lifetime()
	done := make(chan bool)
	n.end = func() {
		end()
		<-done
	}
	n.unread.Store(true)
	o.store.beginReading()
	st, k := o.store, o.snapshotter
	from := controlclient.Neighbours{
		Clients: clients, Zones: o.zones, View: o.view, Rounds: neighbourRounds, Pause: neighbourPause, Within: neighbourWithin,
		Most: api.MaxLoad, Failed: func(error) { n.failed.Add(1) },
		Begin: func() func(io.Reader) (int, error) {
			at := moment{since: st.first}
			if o := of.Value(); o != nil {
				at.now, at.wall = o.clock(), o.wall() // in this order: see snapshotter.load
			}
			return func(dump io.Reader) (int, error) {
				if o := of.Value(); o != nil {
					return o.takeDump(ctx, n, dump, at)
				}
				return 0, errStopped
			}
		},
	}
	o.neighbours = n
	go func() {
		defer close(done)
		waitFor(ctx, func() bool { return k == nil || !k.partial.Load() })
		if k == nil || k.loaded.Load() == 0 {
			begun := time.Now()
			at, err := from.Take(ctx)
			switch {
			case ctx.Err() != nil:
			case err != nil:
				log.Warningf("warm_from: starts with an empty cache: %v", err)
			default:
				log.Infof("warm_from: has taken over %d answers of %s in %v; %d were not good any more", n.loaded.Load(), at, time.Since(begun).Round(time.Millisecond), n.allRefused())
			}
		}
		if ctx.Err() != nil {
			st.reading.Add(-1) // the endings stay: the successor goes on
			return
		}
		n.unread.Store(false)
		st.endReading()
	}()
	return nil
}

// takeDump admits the answers of a neighbour's dump, which was asked for at a moment. The neighbour's clock is not compared with ours:
// the dump was begun after that moment, and each answer counts as as old as it was at the dump's beginning. What has been flushed here
// since the block started stays away, although the neighbour may not know.
func (o *Optcache) takeDump(ctx context.Context, n *neighbours, dump io.Reader, at moment) (answers int, err error) {
	err = o.admitAll(func(each func(*snapshot.Record) error) error {
		var written time.Time
		_, err := snapshot.ReadFrom(dump, o.limits(), func(h *snapshot.Header) error {
			written = h.Written
			return nil
		}, func(r *snapshot.Record) error {
			if ctx.Err() != nil {
				return errStopped
			}
			answers++
			r.Stored = at.wall.Add(min(r.Stored.Sub(written), 0))
			return each(r)
		})
		return err
	}, at, nil, n.count)
	o.snapshotter.wake()
	return answers, err
}

// neighboursOf returns the last one's of the instances behind a series.
func neighboursOf(all []*Optcache) (n *neighbours) {
	for _, o := range all {
		if o.neighbours != nil {
			n = o.neighbours
		}
	}
	return n
}

var (
	neighbourLoadedDesc   = desc("warm_from_loaded_entries", "The number of elements that were taken over from a neighbour at the start.")
	neighbourRefusedDesc  = desc("warm_from_refused_entries", "The number of elements of a neighbour that were not taken in at the start, by reason.", "reason")
	neighbourFailuresDesc = desc("warm_from_failures", "The count of tries to get a neighbour's elements at the start that have failed.")

	neighbourDescs = []*prometheus.Desc{neighbourLoadedDesc, neighbourRefusedDesc, neighbourFailuresDesc}
)

func (n *neighbours) collect(ch chan<- prometheus.Metric, l labels) {
	if n == nil {
		return
	}
	gauge := func(d *prometheus.Desc, v float64, more ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, l.values(more)...)
	}
	n.intake.collect(neighbourLoadedDesc, neighbourRefusedDesc, gauge)
	gauge(neighbourFailuresDesc, float64(n.failed.Load()))
}
