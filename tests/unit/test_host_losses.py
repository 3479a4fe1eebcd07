"""When a host counts as there, lost or drained; what is said about it; what runs on it."""

from dataclasses import replace

import pytest
from pydantic import ValidationError

from scripts import status
from scripts.doctor.stack import judge_programs
from service.config import PROGRAMS, Settings
from service.db.hosts import Drain, Host, Program, State
from service.insight.host_messages import host_message
from tests.unit.test_routing import chosen, known, refusal, seen
from vllm_batch.cli import hosts as command
from vllm_batch.v1 import host_service_pb2 as pb

LIMIT_S = 60.0
URL = "postgresql://db/batch"


def program(name: str, age_s: float = 1, is_ended: bool = False, drain: str = "", schema: int = 15) -> Program:
    kind = name.partition("_")[0]
    detail = {"drain": drain} if drain else {}
    return Program(kind, f"h:{name}", "a:1", "ready", ("m",), 3, detail, "1.0", schema, age_s, 100, is_ended)


@pytest.mark.parametrize(
    ("programs", "drain_age_s", "state"),
    [
        ((program("worker"), program("gateway", 500)), None, State.ALIVE),
        ((program("worker", 500), program("gateway", 400)), None, State.LOST),
        ((program("worker", 500), program("gateway", 400, True)), None, State.STOPPED),
        ((program("worker", 300), program("gateway", 400, True)), None, State.LOST),
        ((program("worker", 5, True),), None, State.STOPPED),
        ((program("worker", 500),), 600.0, State.STOPPED),
    ],
)
def test_whether_a_host_is_there(programs: tuple[Program, ...], drain_age_s: float | None, state: State) -> None:
    """One living program is enough; otherwise the program seen last tells whether the host was stopped in order."""
    assert Host("h", programs, "", drain_age_s).state(LIMIT_S) is state


def test_when_a_host_is_drained() -> None:
    """Drained: ordered to, each living worker says so, and no lease is left; a worker that is gone need not say it."""
    workers = (program("worker_0", drain=Drain.DRAINED), program("worker_1", 500), program("gateway"))
    host = Host("h", workers, "", 10)
    assert host.is_drained(LIMIT_S)
    assert not replace(host, held=1).is_drained(LIMIT_S)
    assert not replace(host, drain_age_s=None).is_drained(LIMIT_S)
    assert not replace(host, programs=(program("worker_0", drain=Drain.DRAINING),)).is_drained(LIMIT_S)
    assert not replace(host, programs=(program("worker_0"),)).is_drained(LIMIT_S)


def test_what_is_said_about_a_host() -> None:
    """Supervisord's programs, verdicts and GPUs come from the watchdog; notes say what is wrong, in words."""
    told = {
        "programs": [["postgres", "STOPPED"], ["worker", "RUNNING"]],
        "guards": [
            {"worker_id": "h:worker", "verdict": "VERDICT_CRASHED", "reason": "gone", "budget_left": 2, "gave_up": True}
        ],
        "gpus": [{"name": "L4", "memory_bytes": 24 << 30}] * 2,
    }
    dog = replace(program("watchdog", 300), detail=told)
    host = Host("h", (program("worker", schema=0), dog, program("http", schema=16)), "new disk", 5, 7)
    message = host_message(host, LIMIT_S, 15)
    assert [(one.name, one.state) for one in message.programs] == [
        ("http", ""),
        ("postgres", "STOPPED"),
        ("watchdog", ""),
        ("worker", "RUNNING"),
    ]
    [worker] = message.workers
    assert (worker.verdict, worker.budget_left, worker.gave_up) == ("CRASHED", 2, True)
    told_notes = " ".join(message.notes)
    for part in (
        "watchdog is gone",
        "follows no order to drain",
        "older than this server: worker",
        "newer",
        "gave up",
    ):
        assert part in told_notes
    assert "draining: h holds 3 requests in 7 chunks (new disk)" in told_notes
    assert message.state == pb.HOST_STATE_ALIVE
    assert command._gpus(message.gpus) == "2 × L4"


def test_several_workers_of_a_host_are_named_once() -> None:
    """Of several processes supervisord has the names with their group, the heartbeats without: both are one program."""
    told = {"programs": [["worker:worker_0", "RUNNING"], ["worker:worker_1", "FATAL"]]}
    programs = (program("worker_0"), replace(program("watchdog"), detail=told))
    message = host_message(Host("h", programs), LIMIT_S, 15)
    assert [(one.name, one.state, one.is_alive) for one in message.programs] == [
        ("watchdog", "", True),
        ("worker_0", "RUNNING", True),
        ("worker_1", "FATAL", False),
    ]


def test_a_worker_that_is_not_reached_is_told() -> None:
    """A worker that beats and cannot be called from a gateway, as after its host's address changed, is in the notes;
    not one that may just have ended."""

    def told(age_s: float) -> str:
        worker = replace(program("worker", age_s), address="10.0.0.2:1")
        return " ".join(host_message(Host("h", (worker,)), LIMIT_S, 15, "", {"10.0.0.2:1": "No route to host"}).notes)

    assert "cannot be called from here, at 10.0.0.2:1: No route to host" in told(1)
    assert "No route to host" not in told(30)


def test_a_drained_host_is_not_chosen() -> None:
    """New work goes to hosts that are not drained; with none left the refusal names the way back."""
    drained = [replace(seen(name), is_drained=True) for name in ("a:w", "b:w")]
    assert chosen(known(drained[0], seen("b:w", queued=5))) == ["b:w"]
    why = refusal(known(*drained))
    assert why.reason == "WORKER_OFFLINE"
    assert "`vllm-batch hosts resume a`" in why.message


def made(programs: str, **settings: str) -> Settings:
    return Settings(_env_file=None, programs=programs, **settings)  # type: ignore[call-arg, arg-type]


def test_programs_of_a_host() -> None:
    """BATCH_PROGRAMS names what a host runs, in any order; wrong names, and a host nobody reaches, are refused."""
    assert made("watchdog, worker", database_url=URL).programs == "worker,watchdog"
    assert made(",".join(PROGRAMS)).runs == set(PROGRAMS)
    for wrong, settings in (("gatway", {}), ("", {"database_url": URL}), ("worker,watchdog", {})):
        with pytest.raises(ValidationError):
            made(wrong, **settings)


def test_screens_follow_the_programs() -> None:
    """status.sh asks the gateway, else the one in BATCH_TARGET, else the watchdog; doctor notes an unguarded worker."""
    assert status.arguments(made("gateway,worker"), {})[:3] == ["--target", "127.0.0.1:50051", "status"]
    part = made("worker,watchdog", database_url=URL)
    assert status.arguments(part, {"BATCH_TARGET": "far:1"})[:2] == ["--target", "far:1"]
    assert status.arguments(part, {}) == ["recovery", "--watchdog-target", "127.0.0.1:50053", "status"]
    alone = made("worker", database_url=URL)
    assert status.arguments(alone, {}) == []
    assert judge_programs(part).problem == ""
    assert "nothing restarts the worker" in judge_programs(alone).problem
