"""The journal: a worker's events in a local file, available when Postgres is not."""

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from service.db.recoveries import Event
from service.telemetry import logs
from watchdog.record.moment import Moment

log = logs.get("journal")


@dataclass(frozen=True)
class Entry:
    """An event, whether Postgres has this version of it, and when it began (None if read from Postgres)."""

    event: Event
    is_stored: bool
    began: Moment | None = None


class Journal:
    """One small file, readable by its owner alone, replaced atomically."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> list[Entry] | None:
        """Returns the entries, oldest first; None if the file is missing or unreadable."""
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=list[Entry])
        except FileNotFoundError:
            return None
        except (OSError, msgspec.MsgspecError) as error:
            log.error("journal_not_readable", path=str(self._path), cause=str(error))
            return None

    def write(self, entries: list[Entry]) -> None:
        """Replaces the file durably (fsync). Raises OSError."""
        self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        new = self._path.with_suffix(".new")
        with open(new, "wb", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
            file.write(msgspec.json.encode(entries))
            file.flush()
            os.fsync(file.fileno())
        new.replace(self._path)
        folder = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def remove(self) -> None:
        """Deletes the journal: none is better than a stale one."""
        with suppress(OSError):
            self._path.unlink()
