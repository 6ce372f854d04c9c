// Command etcd is the etcd server under its own name: `go install` would call it
// "server", after its directory.
package main

import (
	"os"

	"go.etcd.io/etcd/server/v3/etcdmain"
)

func main() { etcdmain.Main(os.Args) }
