// Package cluster has nothing but tests: the bad days of a swarm, with several
// `larder agent` processes, a registry in the test's process, and containerd's
// own client code that pulls through each agent's hosts.toml.
//
// Each day defends the same four things: pulls finish, no wrong byte completes,
// the registry gives no more than two copies (TestCorruptMiddle says why not there),
// and nothing is left behind in an agent. A peer gives wrong bytes
// here because its disk or its registry does; one that breaks the protocol or lies on
// purpose is a rogue, a member in the test's own process that is no agent.
package cluster
