package upstream

import (
	"container/list"
	"sync"
)

// lru is a bounded map: clients choose registries and repositories, so every
// map keyed by them needs a bound.
type lru[K comparable, V any] struct {
	mu    sync.Mutex // guards all below
	max   int
	order *list.List // of entry, newest first
	items map[K]*list.Element
}

type entry[K comparable, V any] struct {
	key   K
	value V
}

func newLRU[K comparable, V any](limit int) *lru[K, V] {
	return &lru[K, V]{max: limit, order: list.New(), items: map[K]*list.Element{}}
}

// get returns the value of key, made by create if there is none. dropped is
// the value that had to go, for the caller to clean up.
func (l *lru[K, V]) get(key K, create func() V) (value V, dropped V, full bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if e, ok := l.items[key]; ok {
		l.order.MoveToFront(e)
		return e.Value.(entry[K, V]).value, dropped, false
	}
	value = create()
	l.items[key] = l.order.PushFront(entry[K, V]{key, value})
	if l.order.Len() > l.max {
		last := l.order.Remove(l.order.Back()).(entry[K, V])
		delete(l.items, last.key)
		return value, last.value, true
	}
	return value, dropped, false
}

func (l *lru[K, V]) values() []V {
	l.mu.Lock()
	defer l.mu.Unlock()
	out := make([]V, 0, l.order.Len())
	for e := l.order.Front(); e != nil; e = e.Next() {
		out = append(out, e.Value.(entry[K, V]).value)
	}
	return out
}
