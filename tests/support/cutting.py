"""A line to the HTTP door that cuts answers: the door has answered, and the client never learns what."""

import select
import socket
import socketserver
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager

CREATE = b"POST /v1/batches "
# How the SDK says that it sends a request for the first time.
FIRST = b"x-stainless-retry-count: 0\r\n"
# Between two cuts, and the least that every answer to a create has. They are cut at any byte, the first one included.
STEP, SHORTEST = 7, 600
TIMEOUT_S = 60
# Closes with a reset instead of an end.
RESET = struct.pack("ii", 1, 0)


class _Line(socketserver.ThreadingTCPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, target: tuple[str, int]) -> None:
        super().__init__(("127.0.0.1", 0), _Connection)
        self.target = target
        self.cuts = 0
        self._creates = 0
        self._lock = threading.Lock()

    @property
    def base_url(self) -> str:
        """What an OpenAI client is given."""
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def place(self) -> int:
        """After how many bytes to cut the next answer."""
        with self._lock:
            self._creates += 1
            return self._creates * STEP % SHORTEST

    def note_cut(self) -> None:
        """Counts it."""
        with self._lock:
            self.cuts += 1


class _Connection(socketserver.BaseRequestHandler):
    server: _Line

    def handle(self) -> None:
        """Passes on what each side sends until one of them ends, or an answer is cut."""
        client: socket.socket = self.request
        with socket.create_connection(self.server.target, TIMEOUT_S) as door:
            left: int | None = None
            while True:
                readable, _, _ = select.select([client, door], [], [], TIMEOUT_S)
                if client in readable:
                    sent = client.recv(1 << 16)
                    if not sent:
                        return
                    if sent.startswith(CREATE) and FIRST in sent:
                        left = self.server.place()
                    door.sendall(sent)
                if door in readable:
                    answer = door.recv(1 << 16)
                    if not answer:
                        return
                    if left is not None and len(answer) > left:
                        client.sendall(answer[:left])
                        self.server.note_cut()
                        if self.server.cuts % 2:
                            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                        return
                    left = None if left is None else left - len(answer)
                    client.sendall(answer)
                if not readable:
                    return


@contextmanager
def cutting(host: str, port: int) -> Iterator[_Line]:
    """Passes everything on to the door, but cuts each answer to a create that the SDK sends for the first time."""
    with _Line((host, port)) as line:
        threading.Thread(target=line.serve_forever, daemon=True).start()
        yield line
        line.shutdown()
