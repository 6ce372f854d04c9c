// Package peer is the swarm: nodes of a cluster that pull the same blob fetch it once
// from its registry and give the pieces to each other.
//
// The promise: N nodes that start the same blob together cost the registry one copy of
// each byte, every node finishes close to the physical bound, and no byte is written to
// a node's cache before it matched a digest signed by the blob's home, or by a member
// that the home vouched for. If the swarm cannot deliver, [Swarm.Fetch] fails after at
// most 20 s without bytes or a home's word, and the caller goes to the registry as if
// there were no swarm.
//
// The protocol, its invariants (I1 and up, cited in the code) and the alternatives that
// were measured and rejected are in DESIGN.md.
//
// Do not use it for blobs whose digest is not SHA-256, nor between nodes that do not
// trust each other with every blob: whoever holds the cluster key may read all of them.
package peer
