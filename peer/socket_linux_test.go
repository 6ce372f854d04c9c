package peer

import (
	"net"
	"testing"
)

// TestGaveUp: a home sees before the handshake that who dialed did not wait,
// whether or not it said something first.
func TestGaveUp(t *testing.T) {
	listener, err := tcp{}.Listen("127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	for _, said := range []string{"", "hello"} {
		out, err := net.Dial("tcp", listener.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		if _, err := out.Write([]byte(said)); err != nil {
			t.Fatal(err)
		}
		in, err := listener.Accept()
		if err != nil {
			t.Fatal(err)
		}
		if gaveUp(in) {
			t.Errorf("after %q: who waits is given up", said)
		}
		out.Close()
		waitFor(t, func() bool { return gaveUp(in) })
		in.Close()
		if !gaveUp(in) {
			t.Errorf("after %q: a closed connection counts as waiting", said)
		}
	}
}
