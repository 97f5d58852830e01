package keep

import (
	"container/heap"
	"context"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/optcache/optcache/plugin/pkg/regular"
)

const (
	workers = 8 // questions that are asked at once

	// A question is asked again when a tenth of its TTL is left, and a second before its answer expires at the latest.
	leadPart  = 10
	leastLead = time.Second
	leastGap  = time.Second // between two times that a question is asked

	// After a failure, a question is asked again after retryFirst, and later each time, up to retryMost.
	retryFirst, retryMost = 5 * time.Second, time.Minute

	lookEvery = 5 * time.Second // at the file
)

// Keeper asks the questions of a list again and again. Its fields must not change while it runs.
type Keeper struct {
	List []Question
	Path string // of a file with more of them; "": none. It is read when Run begins, and when it changes.

	// Ask asks a question, and returns for how long its answer lives. It is called from several goroutines.
	Ask func(context.Context, Question) (left time.Duration, ok bool)

	// Say is told that the file cannot be read, or has a bad line: the list stays as it is. It is told again, with nil, when the
	// file is good again.
	Say func(error)
}

// due is a question with the time at which it is asked.
type due struct {
	Question
	at    time.Time
	fails int
}

type queue []*due

func (q queue) Len() int           { return len(q) }
func (q queue) Less(i, j int) bool { return q[i].at.Before(q[j].at) }
func (q queue) Swap(i, j int)      { q[i], q[j] = q[j], q[i] }
func (q *queue) Push(x any)        { *q = append(*q, x.(*due)) }
func (q *queue) Pop() any {
	last := len(*q) - 1
	x := (*q)[last]
	*q = (*q)[:last]
	return x
}

// Run asks until ctx ends, and then until the questions under way are answered.
func (k *Keeper) Run(ctx context.Context) {
	var (
		waiting  queue
		all      = k.List                  // the questions now
		wanted   = make(map[Question]bool) // the questions that wait or are asked; false: asked for the last time
		asked    = make(chan *due)
		answered = make(chan *due, workers)
		asking   sync.WaitGroup
	)
	defer asking.Wait()
	defer close(asked)
	for range workers {
		asking.Go(func() {
			for d := range asked {
				left, ok := k.Ask(ctx, d.Question)
				d.at = time.Now().Add(d.next(left, ok))
				select {
				case answered <- d:
				case <-ctx.Done(): // nobody waits for it any more
				}
			}
		})
	}
	add := func(more []Question) {
		for _, q := range more {
			if _, known := wanted[q]; !known {
				heap.Push(&waiting, &due{Question: q, at: time.Now()})
			}
			wanted[q] = true
		}
	}
	add(all)
	file := watched{path: k.Path}
	look := time.NewTimer(0)
	defer look.Stop()
	if k.Path == "" {
		look.Stop()
	}
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		var next *due
		var to chan<- *due
		if len(waiting) > 0 {
			if wait := time.Until(waiting[0].at); wait > 0 {
				timer.Reset(wait)
			} else {
				next, to = waiting[0], asked
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		case to <- next:
			heap.Pop(&waiting)
		case d := <-answered:
			if wanted[d.Question] {
				heap.Push(&waiting, d)
			} else {
				delete(wanted, d.Question)
			}
		case <-look.C:
			look.Reset(lookEvery)
			list, changed, err := file.read()
			if !changed {
				continue
			}
			if n := len(k.List) + len(without(list, k.List)); n > Most { // err is nil
				err = fmt.Errorf("%s: with the others there are %d questions, more than %d", k.Path, n, Most)
			}
			k.Say(err)
			if err != nil {
				continue
			}
			for _, q := range without(all, slices.Concat(k.List, list)) {
				wanted[q] = false
			}
			waiting = slices.DeleteFunc(waiting, func(d *due) bool {
				gone := !wanted[d.Question]
				if gone {
					delete(wanted, d.Question)
				}
				return gone
			})
			heap.Init(&waiting)
			fresh := without(list, all)
			all = slices.Concat(k.List, list)
			add(fresh)
		}
	}
}

// next returns after which time a question is asked again, whose answer lives for left.
func (d *due) next(left time.Duration, ok bool) time.Duration {
	if !ok {
		d.fails++
		return min(retryFirst<<min(d.fails-1, 10), retryMost)
	}
	d.fails = 0
	return max(left-max(left/leadPart, leastLead), leastGap)
}

// watched is a file that is read when it has changed.
type watched struct {
	path   string
	last   fs.FileInfo
	failed string // the last error; ""
}

// maxFile is the largest file, in bytes.
const maxFile = 4 << 20

// read reads the file if it has changed since the last time. changed is also true when the error has.
func (w *watched) read() (all []Question, changed bool, err error) {
	info, err := os.Stat(w.path)
	if err == nil && w.last != nil && os.SameFile(info, w.last) && info.ModTime().Equal(w.last.ModTime()) && info.Size() == w.last.Size() {
		return nil, false, nil
	}
	switch {
	case err != nil:
	case info.Size() > maxFile:
		err = fmt.Errorf("%s: the file has %d bytes, and may have %d", w.path, info.Size(), maxFile)
	default:
		var f *os.File
		if f, _, err = regular.Open(w.path); err == nil {
			all, err = Read(f, w.path)
			f.Close()
			w.last = info
		}
	}
	if err != nil {
		changed = w.failed != err.Error()
		w.failed = err.Error()
		return nil, changed, err
	}
	w.failed = ""
	return all, true, nil
}
