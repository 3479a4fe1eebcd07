"""Checks the files of batches that were made from a file: each under a lease, by one worker at a time."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field

import structlog

from service.api import messages
from service.db import file_batches, files, served
from service.db.availability import DATABASE_ERRORS, AvailabilityLog, Meaning, first_line, is_away, meaning_of
from service.db.batches import Batch
from service.db.chunks import Holder
from service.db.connection import Database
from service.db.creation import Content
from service.db.file_batches import Claim, ClaimLostError
from service.db.heartbeats import Phase
from service.db.limits import FullError, Limits
from service.errors import ApiError
from service.telemetry import logs
from service.worker import wrong_lines
from service.worker.intake import CREATE_TIMEOUT_S, Intake, Rows, file_place, fill
from service.worker.offer import AwayError
from service.worker.state import WorkerState
from service.worker.wakeup import Wakeup

LOOK_INTERVAL_S = 1.0
# A batch for which there is no room, or which could not be checked, is looked at again after this long.
AGAIN_S = 5.0
# Requests of an earlier attempt removed per transaction.
CLEAR_ROWS = 20_000

log = logs.get("checking")


@dataclass(frozen=True)
class _Claimed:
    """A batch that exists, and is given its requests. Another worker may take it at any moment."""

    database: Database
    holder: Holder
    batch_id: int
    limits: Limits

    async def stage(self, rows: bytes) -> None:
        """Raises ClaimLostError too."""
        await self.database.run(file_batches.stage, self.holder, self.batch_id, rows)

    async def create(self, content: Content, rows: bytes, is_staged: bool) -> Batch:
        """Raises ClaimLostError, FullError too."""
        return await self.database.run(
            file_batches.begin, self.holder, self.batch_id, content, rows, CREATE_TIMEOUT_S, self.limits
        )

    async def abandon(self) -> None:
        """Nothing: who checks it next removes it, or the gateway once the batch has ended."""


@dataclass
class Checking:
    """Takes batches to be checked while the worker is ready. `on_stored` is called after each that begins."""

    database: Database
    intake: Intake
    holder: Holder
    state: WorkerState
    on_stored: Callable[[], None]
    _arrival: Wakeup = field(default_factory=Wakeup)
    _availability: AvailabilityLog = field(default_factory=lambda: AvailabilityLog(log))

    async def follow(self) -> None:
        """Checks one batch after another, for ever, but takes none while the host is drained."""
        while True:
            may_take = self.state.phase is Phase.READY and not self.state.is_drained
            if not may_take or not await self._once():
                await self._arrival.wait(LOOK_INTERVAL_S)

    def look(self) -> None:
        """Looks for one at once. Call it in the loop of `follow`."""
        self._arrival.set()

    async def _once(self) -> bool:
        """True: there was one."""
        try:
            claim = await self.database.run(file_batches.claim, self.holder, sorted(self.state.offer.models))
            self._availability.back()
        except DATABASE_ERRORS as error:
            self._availability.away(error)
            return False
        if claim is None:
            return False
        with structlog.contextvars.bound_contextvars(call_id=claim.call_id, batch=messages.batch_name(claim.batch_id)):
            renewing = asyncio.create_task(self._renew(claim))
            try:
                await self._check(claim)
            except asyncio.CancelledError:
                await asyncio.shield(self._release(claim, 0))
                raise
            except ClaimLostError:
                log.info("check_lost")
            except DATABASE_ERRORS as error:
                self._availability.away(error)
                # What is our fault counts as an attempt.
                if is_away(error):
                    await self._release(claim, AGAIN_S)
                else:
                    await self._release(claim, self.holder.lease_s, is_attempt=True)
            finally:
                renewing.cancel()
        return True

    async def _check(self, claim: Claim) -> None:
        """Begins the batch, or ends it as failed. Raises ClaimLostError, or DATABASE_ERRORS to be tried again."""
        if claim.attempts > file_batches.MAX_ATTEMPTS:
            why = f"The file could not be checked: {claim.attempts - 1} attempts ended before they were done."
            return await self._fail(claim, [wrong_lines.one("server_error", why)])
        offer = self.state.offer
        others = await self.database.run(served.read)
        available = offer.endpoints(others)
        # Who is loading has not said yet what it serves: then the lines tell whether it is waited for.
        if claim.endpoint not in available and not others.is_loading:
            why = f"{claim.endpoint!r} is not served; available: {', '.join(sorted(available))}"
            return await self._fail(claim, [wrong_lines.one("invalid_endpoint", why, "endpoint")])
        while await self.database.run(file_batches.clear, self.holder, claim.batch_id, CLEAR_ROWS):
            pass
        # Each line has to name the endpoint that the batch is for.
        wanted = offer.for_endpoint(claim.endpoint, others)
        rows = Rows(claim.batch_id, wanted, self.intake.sizes, file_place, claim.digest)
        destination = _Claimed(self.database, self.holder, claim.batch_id, self.intake.limits)
        try:
            batch = await fill(rows, self._pieces(claim.file_id), destination)
        except AwayError as error:
            log.info("check_waits_for_model", cause=error.message)
            return await self._release(claim, AGAIN_S, sorted(error.models))
        except ApiError as error:
            return await self._fail(claim, wrong_lines.errors_of(error))
        except FullError as error:
            if not error.may_pass:
                return await self._fail(claim, [wrong_lines.one("limit_reached", str(error))])
            log.info("check_waits_for_room", cause=str(error))
            return await self._release(claim, AGAIN_S)
        except (*DATABASE_ERRORS, ClaimLostError) as error:
            if isinstance(error, ClaimLostError) or meaning_of(error) is Meaning.AWAY:
                raise
            why = f"Postgres refuses it: {first_line(error)}"
            log.warning("check_refused_by_database", cause=why)
            return await self._fail(claim, [wrong_lines.one("invalid_file", why)])
        except Exception as error:
            # Whatever is in a file, it must not end the worker; the attempts are counted.
            log.exception("check_failed", cause=repr(error))
            return await self._release(claim, self.holder.lease_s, is_attempt=True)
        log.info("batch_stored", requests=batch.total)
        self.on_stored()

    async def _pieces(self, file_id: int) -> AsyncIterator[bytes]:
        """The file from its beginning, the next piece read while one is worked on."""
        at, size = 0, await self.database.run(files.size, file_id)
        reading = self.database.run(files.read_piece, file_id, at)
        try:
            while piece := await reading:
                at += len(piece)
                reading = self.database.run(files.read_piece, file_id, at)
                yield piece
            if at != size:
                raise ValueError(f"{at} of {size} bytes of file {file_id} are there")
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)

    async def _fail(self, claim: Claim, errors: Sequence[Mapping[str, object]]) -> None:
        await self.database.run(file_batches.fail, self.holder, claim.batch_id, errors)
        log.info("batch_failed", errors=len(errors))

    async def _release(
        self, claim: Claim, wait_s: float, away: Sequence[str] | None = None, *, is_attempt: bool = False
    ) -> None:
        with contextlib.suppress(*DATABASE_ERRORS):
            await self.database.run(
                file_batches.release, self.holder, claim.batch_id, wait_s, away, is_attempt=is_attempt
            )

    async def _renew(self, claim: Claim) -> None:
        while True:
            await asyncio.sleep(self.holder.lease_s / 4)
            with contextlib.suppress(*DATABASE_ERRORS):
                await self.database.run(file_batches.renew, self.holder, claim.batch_id)
