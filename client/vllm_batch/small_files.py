"""Reads the small files that settings name: keys, certificates, tokens. Anything else in their place is refused.

A pipe would keep its reader waiting for somebody who writes, and a device or a huge file would fill memory.
"""

import os
import stat
from pathlib import Path

# Many times what CAs, tokens or tenants take.
MAX_BYTES = 16 << 20

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def kind(path: Path) -> str:
    """What is there: "a folder", "a pipe", "a socket" or "a device"; "" for a file, /dev/null and `<(COMMAND)`.

    Raises OSError if nothing is there.
    """
    found = path.stat()
    if stat.S_ISFIFO(found.st_mode) and found.st_dev == _device_of_pipes():
        # Without a name, as a shell makes it: there is, or was, somebody who writes.
        return ""
    if found.st_rdev and os.path.samestat(found, os.stat(os.devnull)):
        return ""
    return _KINDS.get(stat.S_IFMT(found.st_mode), "")


def _device_of_pipes() -> int:
    ends = os.pipe()
    try:
        return os.fstat(ends[0]).st_dev
    finally:
        for end in ends:
            os.close(end)


def problem(path: Path) -> str:
    """Why it must not be read, as "is a pipe, and must be a file"; "" for a small file. Does not open it.

    Raises OSError if nothing is there.
    """
    if found := kind(path):
        return f"is {found}, and must be a file"
    size = path.stat().st_size
    return f"has {size:,} bytes, and must have at most {MAX_BYTES >> 20} MiB" if size > MAX_BYTES else ""


def check(path: Path) -> None:
    """Raises ValueError unless it is a small file, OSError if nothing is there. For whoever reads it by its path."""
    if found := problem(path):
        raise ValueError(f"{path} {found}")


def read(path: Path) -> bytes:
    """The content of a small file. Raises ValueError for what is no small file, OSError if it cannot be read."""
    check(path)
    with path.open("rb") as file:
        # Files of /proc say that they are empty.
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise ValueError(f"{path} has more than {MAX_BYTES >> 20} MiB")
    return content
