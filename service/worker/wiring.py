"""Builds the parts of a worker from its settings. Only the engine's thread runs already; nothing connects yet."""

import asyncio
import os
from dataclasses import dataclass
from uuid import UUID

from service import machine, processes
from service.auth import key_files
from service.clock import SystemClock
from service.config import Settings, process_name
from service.db import sharing
from service.db.chunks import Holder
from service.db.connection import CALL_FACTOR, Database, connect
from service.db.heartbeats import Beat, Phase
from service.db.hosts import Drain
from service.db.limits import Limits
from service.db.sharing import Arrival, Unchecked, Wish
from service.worker.checking import Checking
from service.worker.engine import factory
from service.worker.engine.protocol import Engine
from service.worker.engine.thread import EngineThread
from service.worker.farewell import Farewell
from service.worker.heart import Heart
from service.worker.intake import Intake, Sizes
from service.worker.orders import Orders
from service.worker.pulse import Pulse
from service.worker.runner import Runner
from service.worker.servicer import WorkerServicer
from service.worker.state import WorkerState

# To Postgres, at most, besides the heart's.
CONNECTIONS = 3


@dataclass(frozen=True)
class Parts:
    """The parts of one worker. `engine` and `runner` run in `thread`, `heart` in its own once started."""

    state: WorkerState
    thread: EngineThread
    engine: Engine
    runner: Runner
    pulse: Pulse
    heart: Heart
    # For uploads and reads.
    database: Database
    servicer: WorkerServicer
    checking: Checking
    orders: Orders


def build(settings: Settings, incarnation: UUID) -> Parts:
    """Builds the parts for these settings. Call it in the loop in which all but engine and runner run."""
    loop, clock = asyncio.get_running_loop(), SystemClock()
    timeout_s = settings.database_timeout_s
    # Computed before our defaults are added to vLLM's variables.
    fingerprint = settings.fingerprint
    # The incarnation in the name tells whose session it is: one that is used shows that this life goes on.
    pool = Database(settings.postgres_url, f"worker-{incarnation}", timeout_s, CONNECTIONS, settings.synchronous_commit)
    # Uploads and reads never keep the runner from storing results.
    served, running = pool.apart(CONNECTIONS - 1), pool.apart(CONNECTIONS - 1)
    state = WorkerState(settings.worker_id, incarnation)
    holder = Holder(settings.worker_id, incarnation, settings.lease_s)
    engine, thread = factory.make(settings), EngineThread()
    farewell = Farewell(settings.run_dir / f"{process_name()}.farewell", settings.worker_id)
    runner = Runner(
        engine, running, holder, settings.result_group_interval_s, clock, on_end=lambda: farewell.leave(incarnation)
    )
    pulse = Pulse(
        state,
        clock,
        steps=lambda: engine.steps,
        in_engine=lambda: runner.in_engine,
        prove=lambda: thread.run(runner.prove()),
    )

    address, place = settings.advertised_address(settings.worker_port), machine.settle(settings.home)
    process = processes.leader(os.getpid())
    start_ticks = process.start_ticks if process else 0

    interval_s = settings.heartbeat_interval_s

    def drain() -> dict[str, str]:
        if not state.is_drained:
            return {}
        # A worker that is not ready has taken nothing, or has given it back.
        is_done = runner.rests or state.phase is not Phase.READY
        return {"drain": Drain.DRAINED if is_done else Drain.DRAINING}

    def beat() -> Beat:
        return Beat(
            worker_id=state.worker_id,
            incarnation=state.incarnation,
            address=address,
            phase=pulse.phase(),
            pid=os.getpid(),
            models=tuple(sorted(state.offer.models)),
            queued=runner.queued,
            settings=fingerprint,
            place=place,
            start_ticks=start_ticks,
            detail={
                "interval_s": interval_s,
                "in_engine": runner.in_engine,
                "steps": engine.steps,
                "chunks": len(runner.held),
                "urls": sorted(state.offer.urls),
                **runner.refused,
                **state.failure,
                **drain(),
                # Its host is lost then, not stopped.
                **({"is_orphan": True} if processes.has_lost_parent() else {}),
            },
        )

    def heard(payload: str) -> None:
        match sharing.parse(payload):
            case Wish() as wish:
                thread.call_soon(lambda: runner.wished(wish))
            case Arrival():
                thread.call_soon(runner.work_noticed)
            case Unchecked():
                loop.call_soon_threadsafe(checking.look)

    heart = Heart(
        connection=connect(settings.postgres_url, f"heart-{incarnation}", timeout_s),
        holder=holder,
        interval_s=interval_s,
        timeout_s=CALL_FACTOR * timeout_s,
        beat=beat,
        held=lambda: runner.held,
        on_leases_lost=lambda ids: thread.call_soon(lambda: runner.leases_lost(ids)),
        # Another process is this worker now: exit at once, without another write.
        on_identity_taken=lambda: os._exit(1),
        put_back=farewell.follow,
        on_taken_over=lambda: thread.call_soon(runner.work_arrived),
        on_notice=heard,
    )
    state.subscribe(lambda _: heart.hurry())
    intake = Intake(
        served,
        Sizes(settings.max_requests_per_batch, settings.max_line_bytes, settings.max_batch_bytes),
        Limits(settings.max_open_batches, settings.max_queued_requests, key_files.quotas(settings.tenants_file)),
    )

    def work_arrived() -> None:
        thread.call_soon(runner.work_arrived)

    servicer = WorkerServicer(intake, state, work_arrived)
    checking = Checking(served, intake, holder, state, work_arrived)

    def drain_changed(is_drained: bool) -> None:
        thread.call_soon(lambda: runner.rest(is_drained))
        heart.hurry()

    orders = Orders(served, holder.host, state, settings.heartbeat_interval_s, drain_changed)
    return Parts(state, thread, engine, runner, pulse, heart, served, servicer, checking, orders)
