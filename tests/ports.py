"""Ports for servers under test.

Not of the range out of which the kernel serves connections and port 0: of that, another test may be given a port
between its choice and the start of the server.
"""

import itertools
import os
import socket

# Linux's range begins at 32,768. Each of up to eight processes of pytest has its own part of what is below.
_FIRST, _EACH = 10_000, 2_500
_PROCESS = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 8
# Another run of the tests on the same machine begins elsewhere.
_OFFSETS = itertools.count(os.getpid() * 37)


def free_port() -> int:
    """A port that nobody listens on, and that this process has not given out lately."""
    for offset in _OFFSETS:
        port = _FIRST + _EACH * _PROCESS + offset % _EACH
        with socket.socket() as one:
            try:
                one.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
    raise AssertionError("there is always another")
