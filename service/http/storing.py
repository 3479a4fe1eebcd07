"""Stores what arrives as pieces of a part of a file, each while the next arrives."""

import asyncio
from dataclasses import dataclass, field

from service.api.messages import too_large
from service.db import files
from service.db.connection import Database


@dataclass
class PartWriter:
    """Writes one part of at most `most` bytes; `what` it is called in errors."""

    database: Database
    part_id: int
    most: int
    what: str = "file"
    size: int = 0
    # The first bytes, to see what is in it.
    head: bytes = b""
    _waiting: list[bytes] = field(default_factory=list)
    _waiting_bytes: int = 0
    _storing: asyncio.Future[None] | None = None

    async def add(self, data: bytes) -> None:
        """Raises RESOURCE_EXHAUSTED for a part that is too large, and what storing an earlier piece raised."""
        self.size += len(data)
        if self.size > self.most:
            raise too_large(f"bytes of the {self.what}", self.most, self.size)
        self._waiting.append(data)
        self._waiting_bytes += len(data)
        if self._waiting_bytes >= files.PIECE_BYTES:
            await self._store()

    async def end(self) -> None:
        """Stores the rest."""
        if self._waiting:
            await self._store()
        await self.settle()

    async def settle(self) -> None:
        """Waits for the piece that is being stored. Raises its exception, if any."""
        if self._storing is not None:
            # A thread does the work, and a thread cannot be cancelled.
            await asyncio.shield(self._storing)

    async def _store(self) -> None:
        await self.settle()
        data = b"".join(self._waiting)
        first = self.size - len(data)
        if not first:
            self.head = data
        self._waiting, self._waiting_bytes = [], 0
        self._storing = asyncio.ensure_future(
            self.database.retry_once(
                lambda is_again: self.database.run(files.add_piece, self.part_id, first, data, is_again)
            )
        )
