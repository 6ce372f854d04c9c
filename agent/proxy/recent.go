package proxy

import (
	"container/list"
	"sync"
	"time"
)

// recent remembers values for a while: at most max of them, the oldest going
// first, and by monotonic time, so that a clock that jumps changes nothing.
type recent[K comparable, V any] struct {
	max int

	mu    sync.Mutex          // guards the fields below
	items map[K]*list.Element // of order
	order *list.List          // of remembered[K, V], oldest first
}

type remembered[K comparable, V any] struct {
	key   K
	value V
	until time.Time
}

func (r remembered[K, V]) holds() bool { return time.Now().Before(r.until) }

func newRecent[K comparable, V any](limit int) *recent[K, V] {
	return &recent[K, V]{max: limit, items: map[K]*list.Element{}, order: list.New()}
}

// put remembers value for ttl.
func (m *recent[K, V]) put(key K, value V, ttl time.Duration) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.set(key, value, ttl)
}

// add is put for a value that replaces none.
func (m *recent[K, V]) add(key K, value V, ttl time.Duration) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if e, ok := m.items[key]; !ok || !e.Value.(remembered[K, V]).holds() {
		m.set(key, value, ttl)
	}
}

// set is called with mu held.
func (m *recent[K, V]) set(key K, value V, ttl time.Duration) {
	m.remove(key)
	m.items[key] = m.order.PushBack(remembered[K, V]{key, value, time.Now().Add(ttl)})
	if len(m.items) > m.max {
		m.remove(m.order.Front().Value.(remembered[K, V]).key)
	}
}

func (m *recent[K, V]) get(key K) (value V, ok bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	e, ok := m.items[key]
	if !ok {
		return value, false
	}
	item := e.Value.(remembered[K, V])
	if !item.holds() {
		m.remove(key)
		return value, false
	}
	return item.value, true
}

func (m *recent[K, V]) has(key K) bool {
	_, ok := m.get(key)
	return ok
}

func (m *recent[K, V]) forget(key K) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.remove(key)
}

func (m *recent[K, V]) clear() {
	m.mu.Lock()
	defer m.mu.Unlock()
	clear(m.items)
	m.order.Init()
}

// remove is called with mu held.
func (m *recent[K, V]) remove(key K) {
	if e, ok := m.items[key]; ok {
		m.order.Remove(e)
		delete(m.items, key)
	}
}
