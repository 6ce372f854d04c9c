//go:build !linux

package peer

import (
	"context"
	"net"
)

func (tcp) Listen(addr string) (net.Listener, error) { return net.Listen("tcp", addr) }

func (tcp) DialContext(ctx context.Context, addr string) (net.Conn, error) {
	d := net.Dialer{}
	return d.DialContext(ctx, "tcp", addr)
}

func gaveUp(net.Conn) bool { return false }
