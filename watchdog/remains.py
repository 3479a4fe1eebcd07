"""What outlives a worker's processes: its shared memory in /dev/shm, which nobody else frees. Seen while they live."""

import os
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from service import logs, processes
from service.processes import Leader, Mark

FOLDER = Path("/dev/shm")

log = logs.get("remains")


@dataclass(frozen=True)
class Piece:
    """A file of shared memory. Names come again: the inode tells them apart."""

    path: Path
    inode: int


def pieces(maps: str) -> set[Piece]:
    """The shared memory that a process can write, of its /proc/PID/maps.

    Nothing in folders or read only: that may be a model that somebody keeps in memory.
    """
    found = set()
    for line in maps.splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[1].startswith("rw") and fields[1].endswith("s"):
            path = Path(fields[5])
            if path.parent == FOLDER and not path.name.endswith(" (deleted)"):
                found.add(Piece(path, int(fields[4])))
    return found


class Remains:
    """Remembers what the processes with a mark have mapped, and frees it when nobody has it any more."""

    def __init__(self, mark: Mark) -> None:
        # All processes of the present or last life that were seen.
        self.pids: set[int] = set()
        self._mark = mark
        self._pieces: set[Piece] = set()

    def look(self, leader: Leader | None) -> None:
        """Takes note of the processes there are, and of what they hold."""
        found = processes.left_over(self._mark, leader, processes.now_ticks())
        self.pids |= {process.pid for process in found}
        for process in found:
            self._pieces |= pieces(_maps(process.pid) or "")
        self._pieces = {piece for piece in self._pieces if _is_ours(piece)}

    def sweep(self) -> list[str]:
        """Removes what only the dead can have used, once no process of theirs is left. Returns the names."""
        if not (mine := {piece for piece in self._pieces if _is_ours(piece)}):
            return []
        held: set[Piece] = set()
        # Who started us all has nothing of theirs, and may be one that nobody can look into.
        ancestors = {parent.pid for parent in psutil.Process().parents()}
        for pid in psutil.pids():
            maps = _maps(pid)
            if maps is None and pid not in ancestors and _may_hold_ours(pid):
                log.warning("shared_memory_kept", why=f"process {pid} does not say what it holds")
                return []
            held |= pieces(maps or "")
        swept = sorted(mine - held, key=str)
        size = 0
        for piece in swept:
            with suppress(OSError):
                size += piece.path.stat().st_size
                piece.path.unlink()
        self._pieces = mine & held
        if swept:
            log.warning("shared_memory_swept", names=[piece.path.name for piece in swept], bytes=size)
        return [piece.path.name for piece in swept]

    def forget(self) -> None:
        """A new life begins."""
        self.pids.clear()


def _maps(pid: int) -> str | None:
    """None: it may not be read. A process that is gone holds nothing."""
    try:
        return Path(f"/proc/{pid}/maps").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    except OSError:
        return None


def _is_ours(piece: Piece) -> bool:
    """True for a file that is still the same, and that nobody but its owner, who we are, can have opened."""
    with suppress(OSError):
        info = piece.path.lstat()
        is_private = stat.S_ISREG(info.st_mode) and not info.st_mode & (stat.S_IRWXG | stat.S_IRWXO)
        return info.st_ino == piece.inode and info.st_uid == os.geteuid() and is_private
    return False


def _may_hold_ours(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}").stat().st_uid == os.geteuid()
    return False
