"""Parsing a process's memory maps and the list of GPU processes."""

from pathlib import Path

from watchdog.act import gpu
from watchdog.act.leftovers import Piece, pieces

MAPS = """\
55f0a000-55f0b000 r-xp 00000000 08:01 131 /usr/bin/python3.11
7f01a000-7f01b000 rw-s 00000000 00:1a 12 /dev/shm/psm_0badcafe
7f01c000-7f01d000 rw-s 00001000 00:1a 12 /dev/shm/psm_0badcafe
7f01e000-7f01f000 rw-s 00000000 00:1a 13 /dev/shm/sem.a name with spaces
7f020000-7f021000 rw-s 00000000 00:1a 14 /dev/shm/sem.mp-gone (deleted)
7f022000-7f023000 r--s 00000000 00:1a 15 /dev/shm/model.safetensors
7f024000-7f025000 rw-p 00000000 00:1a 16 /dev/shm/private
7f026000-7f027000 rw-s 00000000 00:1a 17 /dev/shm/models/weights.bin
7f028000-7f029000 rw-s 00000000 00:05 18 /dev/zero
7ffc0000-7ffc1000 rw-p 00000000 00:00 0 [stack]
7ffd0000-7ffd1000 rw-p 00000000 00:00 0
"""


def test_shared_memory_that_is_written_is_found() -> None:
    """Only shared, writable mappings directly in /dev/shm are found, not a model that someone keeps there."""
    assert pieces(MAPS) == {
        Piece(Path("/dev/shm/psm_0badcafe"), 12),
        Piece(Path("/dev/shm/sem.a name with spaces"), 13),
    }


def test_pids_that_hold_gpu_memory() -> None:
    """Each pid is listed once, even if its amount is unknown; lines that are not rows are ignored."""
    assert gpu.parse("") == set()
    assert gpu.parse("4711, 10240\n4711, 512\n99, 0\n815, [N/A]\n") == {4711, 815}
    assert gpu.parse("No running processes found\n[Not Supported], [Not Supported]\n") == set()
