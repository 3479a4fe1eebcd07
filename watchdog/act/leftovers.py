"""Frees shared memory in /dev/shm that a worker's processes leave behind; records it while they live."""

import os
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from service import processes
from service.processes import Leader, Mark
from service.telemetry import logs

FOLDER = Path("/dev/shm")

log = logs.get("leftovers")


@dataclass(frozen=True)
class Piece:
    """A shared memory file. Names are reused, so the inode identifies it."""

    path: Path
    inode: int


def pieces(maps: str) -> set[Piece]:
    """Returns the writable shared memory in the text of /proc/PID/maps.

    Skips subfolders and read-only mappings: those may be a model that somebody keeps in memory.
    """
    found = set()
    for line in maps.splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[1].startswith("rw") and fields[1].endswith("s"):
            path = Path(fields[5])
            if path.parent == FOLDER and not path.name.endswith(" (deleted)"):
                found.add(Piece(path, int(fields[4])))
    return found


class Leftovers:
    """Remembers what the processes with a mark have mapped, and frees it once nobody maps it any more."""

    def __init__(self, mark: Mark) -> None:
        # Every process seen of the current or last incarnation.
        self.pids: set[int] = set()
        self._mark = mark
        self._pieces: set[Piece] = set()

    def look(self, leader: Leader | None) -> None:
        """Records the processes that exist and what they map."""
        found = processes.left_over(self._mark, leader, processes.now_ticks())
        self.pids |= {process.pid for process in found}
        for process in found:
            self._pieces |= pieces(_maps(process.pid) or "")
        self._pieces = {piece for piece in self._pieces if _is_ours(piece)}

    def sweep(self) -> list[str]:
        """Removes the files that no process maps any more. Returns their names. Call once the processes are dead."""
        if not (mine := {piece for piece in self._pieces if _is_ours(piece)}):
            return []
        held: set[Piece] = set()
        # Our ancestors map none of it, and may be unreadable.
        ancestors = {parent.pid for parent in psutil.Process().parents()}
        for pid in psutil.pids():
            maps = _maps(pid)
            if maps is None and pid not in ancestors and _may_hold_ours(pid):
                log.warning("shared_memory_kept", why=f"cannot read the memory maps of process {pid}")
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
        """Forgets the processes: a new incarnation begins."""
        self.pids.clear()


def _maps(pid: int) -> str | None:
    """Reads /proc/PID/maps. None if not permitted, or not answered; "" for a process that is gone."""
    try:
        return processes.answer("maps", pid, Path(f"/proc/{pid}/maps").read_text)
    except (FileNotFoundError, ProcessLookupError):
        return ""
    except OSError:
        return None


def _is_ours(piece: Piece) -> bool:
    """True for the same file as recorded, owned by us and accessible to nobody else."""
    with suppress(OSError):
        info = piece.path.lstat()
        is_private = stat.S_ISREG(info.st_mode) and not info.st_mode & (stat.S_IRWXG | stat.S_IRWXO)
        return info.st_ino == piece.inode and info.st_uid == os.geteuid() and is_private
    return False


def _may_hold_ours(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}").stat().st_uid == os.geteuid()
    return False
