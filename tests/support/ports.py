"""Ports for servers under test.

They lie outside the ephemeral range: otherwise the kernel could hand a port to another test before the server starts.
"""

import itertools
import os
import socket

# Linux's ephemeral range begins at 32,768. Each of up to eight pytest processes has its own part of the ports below.
_FIRST, _EACH = 10_000, 2_500
_PROCESS = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 8
# Concurrent test runs on the same machine begin elsewhere.
_OFFSETS = itertools.count(os.getpid() * 37)


def free_port() -> int:
    """Returns a free port that this process has not returned recently."""
    for offset in _OFFSETS:
        port = _FIRST + _EACH * _PROCESS + offset % _EACH
        with socket.socket() as one:
            try:
                one.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
    raise AssertionError("unreachable: the offsets are endless")


def free_ports() -> int:
    """Returns the first of ten free ports in a row, a multiple of ten, that this process has not returned recently."""
    while True:
        first = free_port()
        if first % 10 == 0 and [free_port() for _ in range(9)] == list(range(first + 1, first + 10)):
            return first
