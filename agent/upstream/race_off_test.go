//go:build !race

package upstream

// raceEnabled loosens expectations about speed.
const raceEnabled = false
