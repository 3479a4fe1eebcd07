"""Writes finished results to Postgres in groups, in the order in which they finished; holds them in an outage."""

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from service.api import messages
from service.db import results
from service.db.availability import AvailabilityLog, DatabaseAwayError, first_line, is_foreign
from service.db.connection import Database
from service.db.results import Result
from service.telemetry import logs
from service.worker.wakeup import IDLE_S

# Maximum number of results per statement, and of characters in their bodies unless a single result has more.
GROUP = 500
GROUP_CHARS = 16 << 20
# Results that a trigger refuses in one round: after so many it probably refuses all.
MAX_PUT_OFF = 10
# Batches of refused results that the heartbeat names, and characters of the cause of each.
MAX_NAMED = 100
MAX_CAUSE = 300

log = logs.get("runner")


@dataclass
class ResultWriter:
    """Holds finished results until they are stored, and then calls `on_stored` with them."""

    database: Database
    incarnation: UUID
    # How long to wait for more results for the same statement.
    group_interval_s: float
    # Of what it writes alone: Postgres may refuse that and answer all else.
    availability: AvailabilityLog
    on_stored: Callable[[Sequence[Result]], None]

    _finished: deque[Result] = field(default_factory=deque)
    # Of those, the ones that a trigger of others has refused, by chunk and index, each with its batch and the cause.
    _waiting: dict[tuple[int, int], tuple[int, str]] = field(default_factory=dict)
    _wake: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def unstored(self) -> int:
        """Number of results that are not stored yet."""
        return len(self._finished)

    @property
    def are_put_off(self) -> bool:
        """True if a trigger of others refuses all that is not stored yet."""
        return all((result.chunk_id, result.index) in self._waiting for result in self._finished)

    @property
    def are_held_up(self) -> bool:
        """True if nothing that is not stored yet can be stored now."""
        return self.availability.is_away or self.are_put_off

    @property
    def refused(self) -> dict[str, Any]:
        """Why results are not stored: the `cause`, or that of each of the `batches`, since what a trigger says may be
        about one of them alone; {} if they are. May be read from any thread.
        """
        if self.availability.is_away:
            return {"cause": self.availability.cause[:MAX_CAUSE]}
        causes = dict(list(self._waiting.values()))
        named = {str(batch_id): causes[batch_id][:MAX_CAUSE] for batch_id in sorted(causes)[:MAX_NAMED]}
        return {"batches": named} if named else {}

    def add(self, result: Result) -> None:
        """Queues a finished result; one that is too large to be stored is replaced by an error."""
        self._finished.append(_storable(result))
        self._wake.set()

    async def follow(self) -> None:
        """Stores results as they arrive, for ever."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            await asyncio.sleep(self.group_interval_s)
            while self._finished:
                await self._write_group()

    async def _write_group(self) -> None:
        group = _first_group(self._finished)
        try:
            await self._write(group)
        except DatabaseAwayError as error:
            if is_foreign(error):
                await self._write_singly(group)
            else:
                await self._wait_for_postgres(error)
        except Exception as error:
            # While not even errors can be stored, once.
            if not self.availability.is_away:
                log.error("result_group_refused", results=len(group), exc_info=error)
            await self._write_singly(group)
        else:
            self._note_stored(group)

    async def _write_singly(self, group: Sequence[Result]) -> None:
        """Stores a refused group one by one, replacing each result that Postgres refuses by an error.

        What a trigger of others does not let through is tried again after all others, so that it holds up none of them.
        """
        put_off = 0
        for result in group:
            try:
                written = await self._write_or_substitute(result)
            except Exception as error:  # noqa: BLE001 - nothing can be stored if even the error is refused
                if not is_foreign(error):
                    await self._wait_for_postgres(error)
                    return
                self._put_off(error)
                put_off += 1
                if put_off == MAX_PUT_OFF:
                    break
            else:
                self._note_stored([written])
        if put_off:
            await asyncio.sleep(IDLE_S)

    def _put_off(self, error: Exception) -> None:
        """Has the first result wait behind all others."""
        result = self._finished.popleft()
        self._finished.append(result)
        cause = first_line(error)
        if not self._waiting:
            log.warning("results_put_off", cause=cause)
        self._waiting[result.chunk_id, result.index] = (result.batch_id, cause)

    async def _write_or_substitute(self, result: Result) -> Result:
        try:
            await self._write([result])
        except DatabaseAwayError:
            raise
        except Exception as error:  # noqa: BLE001 - stored as the result
            result = _error(result, "RESULT_NOT_STORABLE", f"Postgres refused the result: {type(error).__name__}")
            await self._write([result])
        return result

    async def _write(self, group: Sequence[Result]) -> None:
        await self.database.run(results.write, group, self.incarnation)

    def _note_stored(self, group: Sequence[Result]) -> None:
        """Removes the group from the queue and reports it as stored."""
        self.availability.back(unstored=len(self._finished))
        for _ in group:
            stored = self._finished.popleft()
            if self._waiting:
                self._waiting.pop((stored.chunk_id, stored.index), None)
                if not self._waiting:
                    log.info("results_let_through")
        self.on_stored(group)

    async def _wait_for_postgres(self, error: Exception) -> None:
        self.availability.away(error)
        await asyncio.sleep(IDLE_S)


def _first_group(finished: Iterable[Result]) -> list[Result]:
    """The first results, as many as one statement may store."""
    group: list[Result] = []
    chars = 0
    for result in finished:
        chars += len(result.body or "")
        if group and (len(group) == GROUP or chars > GROUP_CHARS):
            break
        group.append(result)
    return group


def _storable(result: Result) -> Result:
    """The result, or an error in its place if its body is larger than can be stored."""
    body = result.body or ""
    # No character has more than four bytes.
    if 4 * len(body) <= results.MAX_BODY_BYTES:
        return result
    size = len(body.encode(errors="replace"))
    if size <= results.MAX_BODY_BYTES:
        return result
    request = messages.request_name(result.batch_id, result.index)
    log.error("result_too_large", request=request, bytes=size, limit=results.MAX_BODY_BYTES)
    message = f"its response has {size} bytes, at most {results.MAX_BODY_BYTES} can be stored"
    return _error(result, "RESULT_TOO_LARGE", message)


def _error(result: Result, code: str, message: str) -> Result:
    """An error in the place of a result."""
    return Result(
        result.chunk_id,
        result.batch_id,
        result.index,
        error_code=code,
        error_message=message,
        custom_id=result.custom_id,
    )
