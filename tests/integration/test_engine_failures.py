"""A worker whose engine fails reports the cause in its heartbeat, where everything else reads it."""

import socket

import pytest

from service.db import heartbeats
from service.db.connection import Database
from tests.support.batches import line
from tests.support.servers import Stack
from tests.support.waiting import until
from vllm_batch.client import Client

NO_LIBRARY = "libnuma.so.1: cannot open shared object file: No such file or directory"


def test_failed_start_is_told(stack: Stack, database: Database) -> None:
    """A failed start exits with 1, logs one event, and leaves cause and advice in the last heartbeat."""
    worker = stack.worker(simulated_load_failure=NO_LIBRARY)
    assert worker.process.wait(60) == 1
    (event,) = worker.events("start_failed")
    assert (event["cause"], event["advice"]) == (NO_LIBRARY, "apt-get install libnuma1")
    (seen,) = database.call(heartbeats.read)
    assert seen.beat.phase == "stopping"
    told = {name: seen.beat.detail[name] for name in ("cause", "advice", "cause_key")}
    key = "libnuma.so.N: cannot open shared object file: No such file or directory"
    assert told == {"cause": NO_LIBRARY, "advice": "apt-get install libnuma1", "cause_key": key}
    assert "Traceback" not in worker.log.read_text()


def test_next_life_tells_of_the_failure_until_it_is_ready(stack: Stack, database: Database) -> None:
    """While the next start loads, the heartbeat shows why the last one failed, and no longer once it is ready."""

    def beat_in(phase: str) -> heartbeats.Beat | None:
        beats = [seen.beat for seen in database.call(heartbeats.read)]
        return next((beat for beat in beats if beat.phase == phase), None)

    worker = stack.worker(simulated_load_failure=NO_LIBRARY)
    assert worker.process.wait(60) == 1
    stack.servers.clear()
    stack.worker(simulated_load_s=3)
    loading = until(lambda: beat_in("loading"), "the next life to load")
    assert {"last_cause": NO_LIBRARY, "last_advice": "apt-get install libnuma1"}.items() <= loading.detail.items()
    assert "cause" not in loading.detail
    ready = until(lambda: beat_in("ready"), "the next life to be ready")
    assert not [name for name in ready.detail if "cause" in name]


def test_traceback_is_in_the_log_at_debug(stack: Stack) -> None:
    """At log level DEBUG, the traceback of a failed start is in one event."""
    worker = stack.worker(simulated_load_failure="it broke", log_level="DEBUG")
    assert worker.process.wait(60) == 1
    (event,) = worker.events("start_failed_traceback")
    assert "EngineStartError: it broke" in str(event["exception"])


def test_death_of_the_engine_is_told(serving: Stack, client: Client) -> None:
    """When the engine dies later, the heartbeat reports the cause."""
    database = Database(serving.database_url, "test")

    def dead() -> heartbeats.Beat | None:
        (seen,) = database.call(heartbeats.read)
        return seen.beat if seen.beat.phase == "engine_dead" and "cause" in seen.beat.detail else None

    client.submit_lines([line("killer", vllm_xargs={"simulate": "engine_dead"})])
    beat = until(dead, "the heartbeat to report why the engine died")
    assert beat.detail["cause"] == "simulated-engine was killed by signal 9 (out of memory?)"
    assert "dmesg" in beat.detail["advice"]
    assert beat.detail["cause_key"]
    database.close()


@pytest.mark.thorough
def test_port_in_use_is_told(stack: Stack) -> None:
    """A worker whose port is in use exits, and says how to find the process that uses it."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        worker = stack.run("service.worker", "worker", worker_port=port, drain_timeout_s=0.1)
        assert worker.process.wait(90) == 1
    (event,) = worker.events("start_failed")
    assert f"'sport = :{port}'" in str(event["advice"])
    assert "Traceback" not in worker.log.read_text()
