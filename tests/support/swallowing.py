"""A TCP proxy that can swallow packets, like a firewall that has dropped a connection: both ends keep it open and are
told nothing."""

import contextlib
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

TO_SERVER, TO_CLIENT = "to_server", "to_client"
BOTH = (TO_SERVER, TO_CLIENT)
# As gRPC and libpq read it.
Address = tuple[str, int] | str


class Firewall:
    """Forwards connections from `port` on loopback to `server`: host and port, or the path of a Unix socket."""

    def __init__(self, server: Address) -> None:
        self._server = server
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listening.getsockname()[1])
        self._new: frozenset[str] = frozenset()
        self._connections: list[_Connection] = []
        self._lock = threading.Lock()
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self._accepting.start()

    @property
    def forgotten(self) -> int:
        """The number of connections whose packets are swallowed."""
        return sum(bool(connection.swallowed) for connection in self._connections)

    def forget(self, *directions: str, new: bool = False) -> None:
        """Swallows these directions of all present connections for good; with `new` of later ones too, until `mend`."""
        with self._lock:
            for connection in self._connections:
                connection.swallowed |= set(directions)
            self._new = frozenset(directions) if new else frozenset()

    def mend(self) -> None:
        """Forwards new connections again. Old ones stay swallowed."""
        self._new = frozenset()

    def close(self) -> None:
        """Closes everything."""
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self._accepting.join()
        for connection in self._connections:
            connection.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listening.accept()
            except OSError:
                return
            try:
                server = self._connect()
            except OSError:
                client.close()
                continue
            with self._lock:
                self._connections.append(_Connection(client, server, set(self._new)))

    def _connect(self) -> socket.socket:
        if not isinstance(self._server, str):
            return socket.create_connection(self._server)
        server = socket.socket(socket.AF_UNIX)
        server.connect(self._server)
        return server


class _Connection:
    def __init__(self, client: socket.socket, server: socket.socket, swallowed: set[str]) -> None:
        self.swallowed = swallowed
        self._sockets = (client, server)
        for here, there, direction in ((client, server, TO_SERVER), (server, client, TO_CLIENT)):
            threading.Thread(target=self._pass_on, args=(here, there, direction), daemon=True).start()

    def _pass_on(self, here: socket.socket, there: socket.socket, direction: str) -> None:
        with contextlib.suppress(OSError):
            while data := here.recv(65_536):
                if direction not in self.swallowed:
                    there.sendall(data)
        # A FIN is a packet too.
        if direction not in self.swallowed:
            self.close()

    def close(self) -> None:
        for one in self._sockets:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()


@contextmanager
def firewall(server: Address) -> Iterator[Firewall]:
    """Yields a firewall in front of `server` that at first forwards everything."""
    wall = Firewall(server)
    try:
        yield wall
    finally:
        wall.close()
