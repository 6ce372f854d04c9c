package peer

import (
	"sync"
	"time"
)

// savings is how much unused budget is kept: blobs look twice in that time whether there
// is more.
const savings = 2 * tendEvery

// budget bounds what this node takes from others, at the one place where a receiver can
// do so without looking slow: what it asks for. Nil bounds nothing.
//
// A piece may be asked for as soon as those before it are paid for, however large it is:
// a rate.Limiter would need a burst of 8 MiB for a piece of that size.
type budget struct {
	rate float64 // bytes per second

	mu   sync.Mutex // guards the following
	paid time.Time  // when all that was asked for will be
}

func newBudget(rate int64) *budget {
	if rate <= 0 {
		return nil
	}
	return &budget{rate: float64(rate)}
}

// take pays for n bytes, unless others are not paid for yet.
func (d *budget) take(n int, now time.Time) bool {
	if d == nil {
		return true
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.paid.After(now) {
		return false
	}
	if saved := now.Add(-savings); d.paid.Before(saved) {
		d.paid = saved
	}
	d.paid = d.paid.Add(d.cost(n))
	return true
}

// giveBack undoes take, for what will not come.
func (d *budget) giveBack(n int) {
	if d == nil {
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.paid = d.paid.Add(-d.cost(n))
}

func (d *budget) cost(n int) time.Duration {
	return time.Duration(float64(n) / d.rate * float64(time.Second))
}
