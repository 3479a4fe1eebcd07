"""Runs a worker from start to shutdown. wiring.py builds its parts."""

import asyncio
import contextlib
import gc
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from uuid import UUID, uuid4

import psutil
import tenacity

from service import announce, config, machine, processes, programs
from service.announce import AddressError
from service.clock import SystemClock
from service.config import Settings, process_name
from service.db import heartbeats, watchdogs
from service.db.availability import DATABASE_ERRORS, AvailabilityLog, DatabaseUnfitError
from service.db.chunks import host_of
from service.db.connection import migrate
from service.db.heartbeats import Phase
from service.rpc import access
from service.rpc import server as rpc_server
from service.rpc.health import NOT_SERVING, SERVING
from service.rpc.services import BATCH_SERVICE
from service.telemetry import logs, metrics, tracing
from service.worker import wiring
from service.worker.engine import cause
from service.worker.engine.cause import Cause
from service.worker.engine.failure_log import chain
from service.worker.engine.protocol import EngineDeadError, EngineStartError
from service.worker.engine.thread import EngineThread
from service.worker.heart import IdentityTakenError
from service.worker.metrics import WorkerCollector
from service.worker.offer import Offer
from service.worker.runner import Runner
from service.worker.servicer import WorkerServicer
from service.worker.state import WorkerState
from service.worker.wiring import Parts
from vllm_batch.v1 import batch_service_pb2_grpc

# How long an earlier process of this worker may take, after its drain or lease, to free the port and the name.
ENDING_TIMEOUT_S = 30.0
PORT_RETRY_S = 0.2
# For steps of the shutdown that may hang without harm.
CLOSE_TIMEOUT_S = 5.0
# What to do about a refused start.
ADVICE = {
    AddressError: announce.ADVICE,
    IdentityTakenError: "Give each host a name of its own, or stop the other process.",
}

HELP = """\
Settings are read from the environment and from .env; conf/example.env lists them all. The main ones:
  BATCH_MODEL        model folder or Hugging Face name; the tiny built-in model by default
  BATCH_ENGINE_ARGS  flags for vLLM, such as "--max-model-len 8192 --tensor-parallel-size 2"
  BATCH_WORKER_PORT  port of the API (50052)
  BATCH_HOME         where state, sockets and logs are kept (var/)
  DATABASE_URL       Postgres; the embedded one under BATCH_HOME by default

supervisord starts workers (scripts/start-all.sh) and the watchdog restarts them. The log is JSON lines on stderr.
Exit status: 0 stopped as asked, 1 the start failed (event "start_failed": cause and advice), 2 invalid settings.
"""

log = logs.get("worker")


async def work(settings: Settings) -> int:
    """Runs a worker from start to shutdown. Returns the exit status."""
    stopping = asyncio.create_task(processes.told_to_end().wait())
    incarnation = uuid4()
    _introduce(settings, incarnation)
    parts = wiring.build(settings, incarnation)
    collector = WorkerCollector(parts.state, parts.runner, parts.engine)
    metrics.serve(settings.metrics_host, settings.worker_metrics_port, collector)
    opening = asyncio.create_task(_serve(settings, parts.servicer))
    try:
        if not await _until(stopping, opening):
            opening.cancel()
            parts.thread.stop(CLOSE_TIMEOUT_S)
            return 0
    except RuntimeError as error:
        parts.thread.stop(CLOSE_TIMEOUT_S)
        return _start_failed(cause.explain(chain(error)), error)
    server = opening.result()
    parts.state.subscribe(lambda phase: _show_health(server, phase))
    try:
        await _run_until_stopped(settings, parts, stopping)
        return 0
    except EngineStartError as error:
        parts.state.failed(error.cause)
        return _start_failed(error.cause, error)
    except (DatabaseUnfitError, IdentityTakenError, AddressError) as error:
        why = Cause.of(str(error), ADVICE.get(type(error), ""))
        parts.state.failed(why)
        return _start_failed(why, error)
    finally:
        await _end(parts, server)


def _introduce(settings: Settings, incarnation: UUID) -> None:
    """Adds worker id and incarnation to logs, traces and the engine's environment."""
    identity = {"worker_id": settings.worker_id, "incarnation": str(incarnation)}
    logs.identify(**identity)
    tracing.configure("worker", settings.otlp_endpoint, identity)
    # The engine's processes inherit it, which identifies them as ours when we are gone.
    os.environ["BATCH_INCARNATION"] = str(incarnation)


async def _run_until_stopped(settings: Settings, parts: Parts, stopping: "asyncio.Task[bool]") -> None:
    """Loads the engine and runs batches; returns once told to stop and drained.

    Raises EngineStartError, DatabaseUnfitError, IdentityTakenError, AddressError.
    """
    preparing = asyncio.create_task(_prepare_database(settings, parts))
    if not await _until(stopping, preparing):
        preparing.cancel()
        return
    await asyncio.to_thread(_sweep, settings)
    parts.state.enter(Phase.LOADING)
    with _no_garbage():
        if not await _until(stopping, parts.thread.run(parts.engine.start())):
            return
    try:
        await _work(settings, parts, stopping)
    except EngineDeadError:
        # Stay alive: the heartbeat reports the death, and the watchdog collects evidence before it restarts us.
        parts.state.enter(Phase.ENGINE_DEAD)
        parts.state.failed(await parts.thread.run(parts.engine.death_cause()))
        log.error("engine_death_explained", **parts.state.failure)
        parts.heart.hurry()
        await stopping


async def _work(settings: Settings, parts: Parts, stopping: "asyncio.Task[bool]") -> None:
    """Runs batches on a started engine until told to stop. Raises EngineDeadError, DatabaseUnfitError."""
    state, engine, runner, thread = parts.state, parts.engine, parts.runner, parts.thread
    # The first steps may take long, so they count as loading; an engine that fails here was never ready.
    proof = thread.run(runner.prove())
    if not await _until(stopping, proof):
        # It would take the engine's stop for its death.
        proof.cancel()
        return
    if engine.is_dead:
        raise EngineDeadError("the engine died of its first request")
    state.offer = Offer(frozenset(engine.models), engine.urls)
    # Before the first claim.
    await parts.orders.look()
    parts.pulse.begin()
    state.enter(Phase.READY)
    pulsing = asyncio.create_task(parts.pulse.follow())
    checking = asyncio.create_task(parts.checking.follow())
    ordered = asyncio.create_task(parts.orders.follow())
    try:
        run = thread.run(runner.run())
        if not await _until(stopping, run, pulsing, checking, ordered):
            # What it has begun is another worker's at once.
            checking.cancel()
            await _drain(state, runner, thread, run, settings.drain_timeout_s)
    finally:
        for task in (pulsing, checking, ordered):
            task.cancel()


async def _end(parts: Parts, server: rpc_server.Server) -> None:
    """Stops all parts, and ends any processes that the engine leaves."""
    parts.state.enter(Phase.STOPPING)
    await server.end(grace_s=1)
    await _finish(parts.thread.run(parts.engine.stop()))
    parts.heart.stop(CLOSE_TIMEOUT_S)
    parts.thread.stop(CLOSE_TIMEOUT_S)
    # Left by an interrupted load, or by an engine that no longer responds.
    left = await asyncio.to_thread(processes.end, _children(), CLOSE_TIMEOUT_S)
    log.info("worker_ended", processes_left=[process.pid for process in left])


async def _serve(settings: Settings, servicer: WorkerServicer) -> rpc_server.Server:
    """Starts the server once the port is free. Raises RuntimeError if that takes too long.

    An earlier process may hold the port until it has drained: after supervisord was killed, its successor starts a
    worker at once.
    """

    def tell(state: tenacity.RetryCallState) -> None:
        if state.attempt_number == 1 and state.outcome is not None:
            log.warning("waiting_for_port", port=settings.worker_port, cause=str(state.outcome.exception()))

    async def serve() -> rpc_server.Server:
        return await rpc_server.serve(
            settings,
            settings.worker_port,
            lambda server: batch_service_pb2_grpc.add_BatchServiceServicer_to_server(servicer, server),
            (BATCH_SERVICE,),
            # No rate limit: the gateway, which forwards all clients' calls, limits each of them.
            access.of(settings, SystemClock(), is_limited=False),
            # For the watchdog, to which our address may be lost and a certificate expired while we are well.
            socket=settings.probe_address(process_name()) if config.is_supervised() else "",
        )

    retrying = tenacity.AsyncRetrying(
        retry=tenacity.retry_if_exception_type(RuntimeError),
        wait=tenacity.wait_fixed(PORT_RETRY_S),
        stop=tenacity.stop_after_delay(settings.drain_timeout_s + ENDING_TIMEOUT_S),
        before_sleep=tell,
        reraise=True,
    )
    return await retrying(serve)


def _start_failed(why: Cause, error: Exception) -> int:
    """Logs why the worker ends before it was ready, in one event. Returns the exit status."""
    log.error("start_failed", cause=why.text, advice=why.advice)
    log.debug("start_failed_traceback", exc_info=error)
    return 1


def _show_health(server: rpc_server.Server, phase: Phase) -> None:
    for name in ("", BATCH_SERVICE):
        server.health.set(name, SERVING if phase is Phase.READY else NOT_SERVING)


async def _prepare_database(settings: Settings, parts: Parts) -> None:
    """Waits for Postgres, migrates the schema, then takes the worker's name, and compares addresses with other hosts.

    Raises DatabaseUnfitError, IdentityTakenError, AddressError.
    """
    availability = AvailabilityLog(log)
    while True:
        try:
            await parts.database.run(migrate)
            beats, dogs = await parts.database.run(heartbeats.read), await parts.database.run(watchdogs.read)
            availability.back()
            break
        except DATABASE_ERRORS as error:
            if isinstance(error, DatabaseUnfitError):
                raise
            availability.away(error)
            await asyncio.sleep(1)
    for seen in beats:
        if seen.beat.worker_id == parts.state.worker_id:
            parts.state.failed_before(heartbeats.failure(seen.beat))
            if seen.beat.settings == settings.fingerprint:
                # What is about to be served again is not unknown meanwhile.
                parts.state.offer = Offer(frozenset(seen.beat.models), frozenset(seen.beat.detail.get("urls", ())))
    parts.heart.start()
    timeout_s = max(settings.drain_timeout_s, settings.lease_s) + ENDING_TIMEOUT_S
    await asyncio.to_thread(parts.heart.wait_for_identity, timeout_s)
    if why := announce.problem(
        settings.advertised_loopback, host_of(parts.state.worker_id), machine.here(settings.home), beats, dogs
    ):
        raise AddressError(why)


@contextmanager
def _no_garbage() -> Iterator[None]:
    """Keeps the garbage collector off the millions of permanent objects that loading creates, during and after it."""
    gc.disable()
    try:
        yield
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()


def _sweep(settings: Settings) -> None:
    """Ends processes that an earlier worker left behind.

    The watchdog does so before it starts a worker, but a new supervisord after a killed one starts a worker by itself,
    beside the engine of the last.
    """
    name, me = os.environ.get("SUPERVISOR_PROCESS_NAME"), processes.leader(os.getpid())
    if name is None or me is None:
        return
    left = processes.left_over(processes.Mark(settings.home, name), None, me.start_ticks)
    if left:
        log.warning("orphans_swept", pids=[process.pid for process in left])
        processes.end(left, CLOSE_TIMEOUT_S, (signal.SIGKILL,))


async def _until(stopping: "asyncio.Task[bool]", work: "asyncio.Future[Any]", *beside: "asyncio.Task[None]") -> bool:
    """Waits for `work` and raises its exception, or that of a task `beside` it.

    Returns False if told to stop first; `work` goes on.
    """
    all_of_it: set[asyncio.Future[Any]] = {work, stopping, *beside}
    await asyncio.wait(all_of_it, return_when=asyncio.FIRST_COMPLETED)
    for task in (work, *beside):
        if task.done():
            task.result()
    return work.done()


async def _drain(
    state: WorkerState, runner: Runner, thread: EngineThread, run: "asyncio.Future[None]", timeout_s: float
) -> None:
    """Lets requests in the engine finish within `timeout_s`; the rest go back to the queue."""
    state.enter(Phase.DRAINING)
    thread.call_soon(runner.drain)
    await asyncio.wait({run}, timeout=timeout_s)
    if not run.done():
        log.warning("drain_timeout", in_engine=runner.in_engine)
        # Do not cancel `run` itself: it would count as done at once, before its chunks are released.
        thread.call_soon(runner.abandon)
        await asyncio.wait({run}, timeout=CLOSE_TIMEOUT_S)
    elif run.exception() is not None:
        run.result()


def _children() -> list[psutil.Process]:
    """Our child processes but Python's resource tracker: it ends after us and removes leftover shared memory."""
    children = psutil.Process().children(recursive=True)
    return [child for child in children if "resource_tracker" not in " ".join(processes.command(child))]


async def _finish(stop: "asyncio.Future[None]") -> None:
    """Waits up to 3 * CLOSE_TIMEOUT_S for the engine's stop, which may fail or hang without harm."""
    try:
        await asyncio.wait_for(stop, 3 * CLOSE_TIMEOUT_S)
    except Exception as error:  # noqa: BLE001 - the process exits anyway, and supervisord ends the rest
        log.warning("engine_stop_failed", cause=repr(error))


def main(arguments: Sequence[str]) -> int:
    """Runs the command line. Returns the exit status."""
    description = "Runs one worker: loads the model with vLLM, serves the BatchService API and runs batches."
    settings = programs.read_settings(arguments, programs.parser("service.worker", description, HELP))
    if settings is None:
        return 0
    processes.die_with_parent()
    logs.configure("worker", settings.log_level)
    try:
        status = asyncio.run(work(settings))
    except Exception as error:
        # Exit, whatever threads are left: nothing would restart a useless but living process for a long time.
        log.exception("program_failed", cause=repr(error))
        status = 1
    tracing.close()
    # Threads that a library left running must not delay the exit.
    if any(not thread.daemon for thread in threading.enumerate() if thread is not threading.main_thread()):
        with contextlib.suppress(OSError):
            sys.stderr.flush()
        os._exit(status)
    return status
