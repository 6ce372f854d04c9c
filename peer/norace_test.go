//go:build !race

package peer

const slow = 1
