"""What the watchdog knows of a worker's events, in a file of this host: there also when Postgres is not."""

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from service import logs
from service.db.recoveries import Event

log = logs.get("journal")


@dataclass(frozen=True)
class Entry:
    """An event, and whether Postgres has it as it is here."""

    event: Event
    is_stored: bool


class Journal:
    """One small file, readable for its owner alone, replaced as a whole."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> list[Entry] | None:
        """What was written last, oldest first. None: nobody knows, as the file is not there or cannot be read."""
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=list[Entry])
        except FileNotFoundError:
            return None
        except (OSError, msgspec.MsgspecError) as error:
            log.error("journal_not_readable", path=str(self._path), cause=str(error))
            return None

    def write(self, entries: list[Entry]) -> None:
        """Replaces the file, surely. Raises OSError."""
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
        """Has nobody believe what is there: better no journal than one that is out of date."""
        with suppress(OSError):
            self._path.unlink()
