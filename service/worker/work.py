"""The life of a worker, from its settings to its end: what it is made of is put together here."""

import argparse
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
from uuid import uuid4

import psutil
import tenacity

from service import access, config, logs, metrics, processes, rpc, tracing
from service.clock import SystemClock
from service.config import Settings, process_name
from service.db.batches import Limits
from service.db.connection import CALL_FACTOR, Database, Unreachable, connect, migrate
from service.db.heartbeats import Beat, Phase
from service.worker import engines
from service.worker.engine import EngineDeadError
from service.worker.engine_thread import EngineThread
from service.worker.heart import Heart
from service.worker.intake import Intake, Offer, Sizes
from service.worker.life import Life
from service.worker.metrics import WorkerCollector
from service.worker.pulse import Pulse
from service.worker.runner import Runner
from service.worker.service import WorkerServicer
from vllm_batch.v1 import batch_service_pb2_grpc

SERVICE = "vllm_batch.v1.BatchService"
# How long an earlier life of this worker may take to end after its drain: to let go of the port and the identity.
ENDING_TIMEOUT_S = 30.0
PORT_RETRY_S = 0.2
# What ends anyway is not waited for longer.
CLOSE_TIMEOUT_S = 5.0

log = logs.get("worker")


async def work(settings: Settings) -> int:
    """The life of a worker. Returns the exit status."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)

    # Apart, so that neither uploads nor readers keep the runner from storing results.
    served = Database(settings.postgres_url, "worker-serve", settings.database_timeout_s)
    running = Database(settings.postgres_url, "worker-run", settings.database_timeout_s, connections=3)
    engine = engines.make(settings)
    thread = EngineThread()
    life = Life(settings.worker_id, uuid4(), lambda _: None)
    identity = {"worker_id": life.worker_id, "incarnation": str(life.incarnation)}
    logs.identify(**identity)
    tracing.configure("worker", settings.otlp_endpoint, identity)
    # Inherited by the engine's processes: that is how they are known to be ours when we are gone.
    os.environ["BATCH_INCARNATION"] = str(life.incarnation)
    runner = Runner(
        engine, running, life.worker_id, life.incarnation, settings.lease_s, settings.result_group_interval_s
    )
    metrics.serve(settings.metrics_host, settings.worker_metrics_port, WorkerCollector(life, runner, engine))
    intake = Intake(
        served,
        Sizes(settings.max_requests_per_batch, settings.max_line_bytes, settings.max_batch_bytes),
        Limits(settings.max_open_batches, settings.max_queued_requests),
    )
    servicer = WorkerServicer(intake, life, lambda: thread.call_soon(runner.work_arrived))
    stopping = asyncio.create_task(stop.wait())
    opening = asyncio.create_task(_serve(settings, servicer))
    if not await _until(stopping, opening):
        opening.cancel()
        thread.stop(CLOSE_TIMEOUT_S)
        return 0
    server = opening.result()

    pulse = Pulse(
        life,
        SystemClock(),
        steps=lambda: engine.steps,
        in_engine=lambda: runner.in_engine,
        prove=lambda: thread.run(runner.prove()),
    )

    def beat() -> Beat:
        return Beat(
            worker_id=life.worker_id,
            incarnation=life.incarnation,
            address=server.address,
            phase=pulse.phase(),
            pid=os.getpid(),
            models=tuple(sorted(life.offer.models)),
            queued=runner.queued,
            detail={"in_engine": runner.in_engine, "steps": engine.steps, "chunks": len(runner.held)},
        )

    heart = Heart(
        connection=connect(settings.postgres_url, f"heart-{life.incarnation}", settings.database_timeout_s),
        life=life,
        interval_s=settings.heartbeat_interval_s,
        lease_s=settings.lease_s,
        timeout_s=CALL_FACTOR * settings.database_timeout_s,
        beat=beat,
        held=lambda: runner.held,
        on_leases_lost=lambda ids: thread.call_soon(lambda: runner.leases_lost(ids)),
        # Another process is this worker now: no more of this one, at once and without a last word.
        on_identity_taken=lambda: os._exit(1),
    )

    def phase_changed(phase: Phase) -> None:
        heart.hurry()
        is_ready = phase is Phase.READY
        asyncio.run_coroutine_threadsafe(_set_health(server, is_ready), loop)

    life.on_change = phase_changed
    pulsing: asyncio.Task[None] | None = None
    try:
        preparing = asyncio.create_task(_prepare_database(served, heart, settings.drain_timeout_s + ENDING_TIMEOUT_S))
        if not await _until(stopping, preparing):
            preparing.cancel()
            return 0
        await asyncio.to_thread(_sweep, settings)
        life.enter(Phase.LOADING)
        with _no_garbage():
            if not await _until(stopping, thread.run(engine.start())):
                return 0
        try:
            # The first steps may take long: they belong to loading, and an engine that fails here never was ready.
            if not await _until(stopping, thread.run(runner.prove())):
                return 0
            if engine.is_dead:
                raise EngineDeadError("the engine died of its first request")
            life.offer = Offer(frozenset(engine.models), engine.urls)
            pulse.begin()
            life.enter(Phase.READY)
            pulsing = asyncio.create_task(pulse.follow())
            run = thread.run(runner.run())
            if await _until(stopping, run):
                return 0
            await _drain(life, runner, thread, run, settings.drain_timeout_s)
        except EngineDeadError:
            # Useless, but alive: the heartbeat goes on and says so, and the watchdog restarts us with evidence kept.
            life.enter(Phase.ENGINE_DEAD)
            await stopping
        return 0
    finally:
        life.enter(Phase.STOPPING)
        if pulsing is not None:
            pulsing.cancel()
        await server.end(grace_s=1)
        await _finish("engine_stop", thread.run(engine.stop()))
        heart.stop(CLOSE_TIMEOUT_S)
        thread.stop(CLOSE_TIMEOUT_S)
        # A load that was broken off, or an engine that does not listen any more.
        left = await asyncio.to_thread(processes.end, _children(), CLOSE_TIMEOUT_S)
        log.info("worker_ended", processes_left=[process.pid for process in left])


async def _serve(settings: Settings, servicer: WorkerServicer) -> rpc.Server:
    """Serves as soon as the port can be had. An earlier life may have it until it has drained: a supervisord that was
    killed is followed by one that starts a worker at once. Raises RuntimeError when that takes too long."""

    def tell(state: tenacity.RetryCallState) -> None:
        if state.attempt_number == 1 and state.outcome is not None:
            log.warning("waiting_for_port", port=settings.worker_port, cause=str(state.outcome.exception()))

    async def serve() -> rpc.Server:
        return await rpc.serve(
            settings,
            settings.worker_port,
            lambda server: batch_service_pb2_grpc.add_BatchServiceServicer_to_server(servicer, server),
            (SERVICE,),
            # Not limited: what comes from many clients comes through one gateway, which counts it for each.
            access.of(settings, SystemClock(), is_limited=False),
            socket=settings.probe_address(process_name()) if settings.probe_sockets else "",
        )

    retrying = tenacity.AsyncRetrying(
        retry=tenacity.retry_if_exception_type(RuntimeError),
        wait=tenacity.wait_fixed(PORT_RETRY_S),
        stop=tenacity.stop_after_delay(settings.drain_timeout_s + ENDING_TIMEOUT_S),
        before_sleep=tell,
        reraise=True,
    )
    return await retrying(serve)


async def _set_health(server: rpc.Server, is_ready: bool) -> None:
    for name in ("", SERVICE):
        await server.set_health(name, is_ready)


async def _prepare_database(database: Database, heart: Heart, timeout_s: float) -> None:
    """Waits for Postgres, brings the schema up to date, and takes the worker's identity, within `timeout_s` of that."""
    is_waiting = False
    while True:
        try:
            await database.run(migrate)
            break
        except Unreachable as error:
            if not is_waiting:
                log.warning("waiting_for_database", cause=str(error).strip())
            is_waiting = True
            await asyncio.sleep(1)
    heart.start()
    if not await asyncio.to_thread(heart.wait_for_lock, timeout_s):
        raise SystemExit(f"another process has been worker {heart.life.worker_id!r} for {timeout_s:.0f} s")


@contextmanager
def _no_garbage() -> Iterator[None]:
    """Loading makes objects by the million, which are there for good: they are not looked through for garbage, neither
    meanwhile nor later."""
    gc.disable()
    try:
        yield
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()


def _sweep(settings: Settings) -> None:
    """Ends what an earlier life of this worker left behind. The watchdog does so before it starts a worker; but a
    supervisord that was killed starts one by itself, beside the engine of the last."""
    name, me = os.environ.get("SUPERVISOR_PROCESS_NAME"), processes.leader(os.getpid())
    if name is None or me is None:
        return
    left = processes.left_over(processes.Mark(settings.home, name), None, me.start_ticks)
    if left:
        log.warning("orphans_swept", pids=[process.pid for process in left])
        processes.end(left, CLOSE_TIMEOUT_S, (signal.SIGKILL,))


async def _until(stopping: "asyncio.Task[bool]", work: "asyncio.Future[Any]") -> bool:
    """Waits for `work` and raises what it raises. False: told to stop first; it goes on."""
    both: set[asyncio.Future[Any]] = {work, stopping}
    await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
    if work.done():
        work.result()
    return work.done()


async def _drain(
    life: Life, runner: Runner, thread: EngineThread, run: "asyncio.Future[None]", timeout_s: float
) -> None:
    """Lets what is in the engine finish within `timeout_s`; the rest goes back to the queue."""
    life.enter(Phase.DRAINING)
    thread.call_soon(runner.drain)
    await asyncio.wait({run}, timeout=timeout_s)
    if not run.done():
        log.warning("drain_timeout", in_engine=runner.in_engine)
        # Not by cancelling `run`, which would be over at once, before the chunks are given back.
        thread.call_soon(runner.abandon)
        await asyncio.wait({run}, timeout=CLOSE_TIMEOUT_S)
    elif run.exception() is not None:
        run.result()


def _children() -> list[psutil.Process]:
    """Our processes but Python's resource tracker: that ends after us, and removes the shared memory left then."""
    children = psutil.Process().children(recursive=True)
    return [child for child in children if "resource_tracker" not in " ".join(_command(child))]


def _command(process: psutil.Process) -> list[str]:
    with contextlib.suppress(psutil.Error):
        return process.cmdline()
    return []


async def _finish(what: str, work: "asyncio.Future[None]") -> None:
    """Waits a while for something at the end that may fail or hang without harm."""
    try:
        await asyncio.wait_for(work, 3 * CLOSE_TIMEOUT_S)
    except Exception as error:  # noqa: BLE001 - the process ends anyway, and its supervisor ends the rest
        log.warning(f"{what}_failed", cause=repr(error))


def main(arguments: Sequence[str]) -> int:
    """Checks the settings, then works."""
    parser = argparse.ArgumentParser(prog="python -m service.worker", description=__doc__)
    parser.add_argument("--check", action="store_true", help="check the settings and end")
    options = parser.parse_args(arguments)
    settings = config.load()
    if options.check:
        return 0
    processes.die_with_parent()
    logs.configure("worker", settings.log_level)
    status = asyncio.run(work(settings))
    tracing.close()
    # What a library left behind in threads must not hold up the end.
    if any(not thread.daemon for thread in threading.enumerate() if thread is not threading.main_thread()):
        with contextlib.suppress(OSError):
            sys.stderr.flush()
        os._exit(status)
    return status
