// Package cluster has nothing but tests: the bad days of a swarm, with several
// `larder agent` processes, a registry in the test's process, and containerd's
// own client code that pulls through each agent's hosts.toml.
//
// Each day defends the same four things: pulls finish, no wrong byte completes,
// the registry gives no more than two copies (TestCorruptMiddle says why not there),
// and nothing is left behind in an agent. Peers that break the protocol are tested in
// package peer, where a test can be one; here a peer gives wrong bytes because its
// disk or its registry does.
package cluster
