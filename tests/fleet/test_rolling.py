"""Hosts are restarted one by one and lose power while a long batch runs and clients use every gateway."""

import hashlib
import json
import os
import random
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest

from tests.fleet.test_lost_hosts import check_each_answered_once, submit
from tests.support.fleet import Fleet, Host, fleet
from tests.support.histories import Call, Seen, violations
from tests.support.waiting import until
from vllm_batch import CallError, Client
from vllm_batch.v1 import batch_service_pb2 as pb

CLIENTS = 4
# Requests of each small batch.
SMALL = 10
# A client's pause between calls.
PACE_S = 0.05
# A host that has lost its power, or a gateway that is restarting, answers so.
AWAY = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED)
# Hosts, requests of the long batch, seconds that one takes, and the most between two hosts.
SIZES = [
    pytest.param(3, 3_000, 1.0, 3, id="short"),
    pytest.param(20, 100_000, 2.0, 10, id="long", marks=pytest.mark.thorough),
]


def body(key: str, number: int) -> str:
    return json.dumps({"model": "tiny", "messages": [{"role": "user", "content": f"{key}: {number}"}]})


def right_answer(key: str, number: int) -> str:
    """What the simulated engine answers: a digest of what it was asked."""
    return hashlib.sha256(body(key, number).encode()).hexdigest()


class User:
    """Makes batches and looks at those of all users, each time through any of the gateways, and notes what it saw."""

    def __init__(self, name: str, made: Fleet, shared: dict[str, str], dice: random.Random) -> None:
        self._name, self._dice, self._shared = name, dice, shared
        self._clients: list[Client] = [host.client() for host in made.hosts]
        self.history: list[Call] = []
        self.unexpected: list[str] = []
        self.refused = 0
        self._made = 0
        # Writes that nobody has answered yet, and when each was first tried.
        self._open: dict[tuple[str, str], float] = {}

    def use(self, stop: threading.Event) -> None:
        """Calls until told to stop, then until nothing is open any more."""
        while not stop.wait(PACE_S):
            for kind, key in [*self._open] or [self._chosen()]:
                self.try_once(kind, key)
        until(self._has_closed, f"{self._name} to get its last answers", 120)
        for client in self._clients:
            client.close()

    def _has_closed(self) -> bool:
        for kind, key in [*self._open]:
            self.try_once(kind, key)
        return not self._open

    def _chosen(self) -> tuple[str, str]:
        kinds = {"create": 4, "get": 50, "list": 3, "result": 35, "cancel": 2, "delete": 3}
        [kind] = self._dice.choices([*kinds], [*kinds.values()])
        if kind == "create" or not self._shared:
            self._made += 1
            return "create", f"{self._name}-{self._made}"
        return kind, "" if kind == "list" else self._dice.choice([*self._shared])

    def try_once(self, kind: str, key: str) -> None:
        """One call. A write without an answer stays open."""
        begin_s = time.monotonic()
        if kind in ("create", "cancel", "delete"):
            begin_s = self._open.setdefault((kind, key), begin_s)
        try:
            noted = getattr(self, f"_{kind}")(self._dice.choice(self._clients), key)
        except CallError as error:
            if error.code in AWAY:
                self.refused += 1
                return
            if error.code is grpc.StatusCode.NOT_FOUND:
                noted = {}
            elif error.code is grpc.StatusCode.FAILED_PRECONDITION and kind in ("cancel", "delete"):
                # It has ended, or has not ended: nothing was changed.
                noted = None
            else:
                self.unexpected.append(f"{kind} of {key}: {error}")
                noted = None
        self._open.pop((kind, key), None)
        if noted is not None:
            self.history.append(Call(kind, begin_s, time.monotonic(), key, **noted))  # type: ignore[arg-type]

    def _create(self, client: Client, key: str) -> dict[str, Any]:
        lines = [
            f'{{"custom_id": "c{number}", "url": "/v1/chat/completions", "body": {body(key, number)}}}'.encode()
            for number in range(SMALL)
        ]
        batch = client.submit_lines(lines, request_id=key)
        self._shared[key] = batch.id
        return {"seen": seen(batch)}

    def _get(self, client: Client, key: str) -> dict[str, Any]:
        return {"seen": seen(client.get(self._shared[key]))}

    def _list(self, client: Client, _: str) -> dict[str, Any]:
        return {"listed": frozenset(batch.id for batch in client.list(limit=100_000))}

    def _result(self, client: Client, key: str) -> dict[str, Any]:
        number = self._dice.randrange(SMALL)
        noted: dict[str, Any] = {"custom_id": f"c{number}"}
        try:
            result = client.result(self._shared[key], f"c{number}")
        except CallError as error:
            if error.code is not grpc.StatusCode.NOT_FOUND:
                raise
            return noted
        if result.WhichOneof("outcome") == "response":
            answer = json.loads(result.response.body_json)["choices"][0]["message"]["content"]
            if answer != right_answer(key, number):
                self.unexpected.append(f"{key}: c{number} has the answer {answer}")
        return noted | {"answer": str(result)}

    def _cancel(self, client: Client, key: str) -> dict[str, Any]:
        return {"seen": seen(client.cancel(self._shared[key]))}

    def _delete(self, client: Client, key: str) -> dict[str, Any]:
        client.delete(self._shared[key])
        return {}


def seen(batch: pb.Batch) -> Seen:
    counts = batch.counts
    return Seen(batch.id, pb.BatchState.Name(batch.state), counts.completed, counts.failed, counts.total)


def restart(host: Host) -> None:
    """As an upgrade does it: each program ends in an orderly way and starts again."""
    for name in ("worker", "gateway"):
        host.servers[name].terminate()
        host.servers[name].start()


def lose_power(host: Host, off_s: float) -> None:
    host.lose_power()
    # How long it has no power, not a wait for a condition.
    time.sleep(off_s)
    host.return_power()
    host.start("gateway", "worker")


def check_small(client: Client, batch_id: str) -> None:
    """Unless it was deleted, it has ended, and unless it was cancelled each of its requests has one right result."""
    try:
        ended = client.wait(batch_id)
        results = list(client.results(batch_id))
    except CallError as error:
        if error.code is grpc.StatusCode.NOT_FOUND:
            return
        raise
    counts = ended.counts
    assert len({result.custom_id for result in results}) == len(results) == counts.completed, batch_id
    assert counts.failed == 0, batch_id
    assert ended.state == pb.BATCH_STATE_CANCELLED or counts.completed == SMALL, batch_id


@pytest.mark.timeout(2400)
@pytest.mark.parametrize(("hosts", "requests", "request_s", "most_between_s"), SIZES)
def test_no_client_sees_hosts_come_and_go(hosts: int, requests: int, request_s: float, most_between_s: float) -> None:
    """While each of the hosts restarts or dies, clients of all gateways see what one that never fails would show."""
    seed = int(os.environ.get("FLEET_SEED", random.SystemRandom().randrange(1_000_000)))
    sys.stderr.write(f"FLEET_SEED={seed}\n")
    dice = random.Random(seed)
    with fleet(hosts) as made, ThreadPoolExecutor(CLIENTS) as pool:
        for host in made.hosts:
            host.start(simulated_request_s=request_s, simulated_window=32)
        made.wait_until_accepting()
        batch = submit(made.hosts[0], requests)
        shared: dict[str, str] = {}
        users = [User(f"user{number}", made, shared, random.Random(seed + number)) for number in range(CLIENTS)]
        stop = threading.Event()
        using = [pool.submit(user.use, stop) for user in users]
        began_s = time.monotonic()
        try:
            for number, host in enumerate(dice.sample(made.hosts, hosts)):
                if number % 2:
                    restart(host)
                else:
                    lose_power(host, dice.uniform(1, 15))
                made.wait_until_accepting()
                time.sleep(dice.uniform(0, most_between_s))
        finally:
            stop.set()
        for each in using:
            each.result(300)
        took_s = time.monotonic() - began_s
        check_each_answered_once(made.hosts[-1], batch, requests)
        with made.hosts[0].client(patience_s=60) as client:
            for batch_id in shared.values():
                check_small(client, batch_id)
    history = [call for user in users for call in user.history]
    kinds, refused = Counter(call.kind for call in history), sum(user.refused for user in users)
    sys.stderr.write(
        f"{hosts} hosts in {took_s:.0f} s, {len(history)} calls ({dict(kinds)}), {refused} refused,"
        f" {len(shared)} small batches\n"
    )
    assert not [text for user in users for text in user.unexpected]
    assert violations(history) == []
