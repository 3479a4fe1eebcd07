"""A note that a life of this worker ended in order, with its engine alive.

What it held and could not give back, because Postgres was away, the next life puts back into the queue. Without the
note it would count a death for each request that was in the engine.
"""

import contextlib
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

import peewee

from service.db import chunks


@dataclass(frozen=True)
class Farewell:
    """The note of the worker `worker_id`, in a file at `path`."""

    path: Path
    worker_id: str

    def leave(self, life: UUID) -> None:
        """Writes it for this life. Where that fails, deaths are counted that were none."""
        with contextlib.suppress(OSError):
            self.path.write_text(f"{life}\n")

    def follow(self, db: peewee.PostgresqlDatabase) -> int:
        """Puts back what the life that left it held. Only for the process that has the worker's name.

        Returns how many chunks.
        """
        try:
            life = UUID(self.path.read_text().strip())
        except (OSError, ValueError):
            return 0
        return chunks.release_life(db, self.worker_id, life)
