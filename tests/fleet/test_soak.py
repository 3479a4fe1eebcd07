"""Cut off for a while is not dead: in a busy fleet nobody takes over from a worker that lives.

`FLEET_SOAK=<minutes>` runs longer; `FLEET_SOAK_SEED=...` repeats an order of events.
"""

import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable

import psutil
import pytest

from service import processes
from service.processes import Mark
from tests.fleet.test_lost_hosts import check_each_answered_once, replaced, submit
from tests.support.fleet import Fleet, Host, fleet
from tests.support.pauses import last, pause
from tests.support.waiting import until

LASTS_S = 60 * float(os.environ.get("FLEET_SOAK", 10))
REQUESTS = 1_000
# As long as others reach it, or Postgres hears from it, a worker keeps its leases of 60 s.
LONGEST_CUT_S = 40.0
# Nobody may conclude from a heartbeat or two that are missing, even where no line is left.
LONGEST_SILENCE_S = 7.0
# A watchdog would restart a worker that is paused for longer.
WORKER_PAUSE_S = 3.0
# How long a fleet may need until each host has beaten and accepts new work again.
BACK_S = 60.0


class Trouble:
    """What a healthy host has to withstand. Each lasts for a random time, and is over when the method returns."""

    def __init__(self, made: Fleet, dice: random.Random) -> None:
        self.made = made
        self.dice = dice

    def cut_off_from_postgres(self) -> None:
        host = self._host()
        self._cut([host], lambda: host.cut_off(self.made.postgres), LONGEST_CUT_S)

    def cut_off_from_others(self) -> None:
        host = self._host()
        others = [other for other in self.made.hosts if other is not host]
        self._cut([host], lambda: host.cut_off(*others), LONGEST_CUT_S)

    def cut_off_from_everything(self) -> None:
        host = self._host()
        self._cut([host], host.cut_off, LONGEST_SILENCE_S)

    def all_cut_off_from_postgres(self) -> None:
        def cut() -> None:
            for host in self.made.hosts:
                host.cut_off(self.made.postgres)

        self._cut(self.made.hosts, cut, LONGEST_CUT_S)

    def first_from_others_then_from_postgres(self) -> None:
        """Its line to one other host stays whole."""
        host = self._host()
        one, _ = self.dice.sample([other for other in self.made.hosts if other is not host], 2)
        self._cut([host], lambda: host.cut_off(one), LONGEST_CUT_S / 2, heals=False)
        self._cut([host], lambda: host.cut_off(self.made.postgres), LONGEST_CUT_S / 2)

    def pause_worker(self) -> None:
        pause([psutil.Process(self._host().worker_pid)], self.dice, WORKER_PAUSE_S)

    def pause_gateways(self) -> None:
        leaders = [psutil.Process(host.full.pid("gateway")) for host in self.made.hosts if host.full]
        pause(leaders, self.dice, LONGEST_SILENCE_S)

    def pause_a_host(self) -> None:
        pause(processes.marked(Mark(self._host().home)), self.dice, LONGEST_SILENCE_S)

    def pause_postgres(self) -> None:
        leader = psutil.Process(self.made.postgres.process.pid)
        pause([leader, *leader.children(recursive=True)], self.dice, LONGEST_CUT_S)

    def restart_postgres(self) -> None:
        self.made.postgres.stop()
        last(self.dice, LONGEST_CUT_S)
        self.made.postgres.start()

    def end_connections(self) -> None:
        self.made.sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name ~ '^vllm-batch'")

    def kill_gateway(self) -> None:
        host = self._host()
        assert host.full
        psutil.Process(host.full.pid("gateway")).kill()

    def kill_watchdog(self) -> None:
        host = self._host()
        assert host.full
        psutil.Process(host.full.pid("watchdog")).kill()

    def _host(self) -> Host:
        return self.dice.choice(self.made.hosts)

    def _cut(self, hosts: list[Host], cut: Callable[[], None], longest_s: float, *, heals: bool = True) -> None:
        cut()
        last(self.dice, longest_s)
        for host in hosts if heals else ():
            host.heal()


KINDS: list[Callable[[Trouble], None]] = [
    value for name, value in vars(Trouble).items() if callable(value) and not name.startswith("_")
]


@pytest.mark.thorough
@pytest.mark.timeout(LASTS_S + 900)
def test_nobody_who_lives_is_taken_for_lost() -> None:
    """Whatever happens to lines, Postgres and processes for less than a lease, no other worker takes over, no watchdog
    restarts a worker, and each request has one result."""
    seed = int(os.environ.get("FLEET_SOAK_SEED", random.SystemRandom().randrange(1_000_000)))
    dice = random.Random(seed)
    sys.stdout.write(f"\nFLEET_SOAK_SEED={seed}, {LASTS_S:.0f} s\n")
    batches: list[str] = []
    struck: Counter[str] = Counter()
    with fleet(4) as made:
        if not made.can_cut:
            pytest.skip("lines between hosts can be cut only where network namespaces can be made")
        made.supervise_all(simulated_request_s=1, simulated_window=8)
        pids = {host.name: host.worker_pid for host in made.hosts}
        trouble = Trouble(made, dice)

        def keep_busy() -> None:
            waiting = "SELECT coalesce(sum(total - completed), 0) FROM batches"
            if made.sql(waiting)[0][0] < REQUESTS:
                batches.append(submit(dice.choice(made.hosts), REQUESTS))

        def all_beat(since: object) -> bool:
            beating = "SELECT count(*) FROM heartbeats WHERE phase = 'ready' AND last_seen > %s"
            return bool(made.sql(beating, since)[0][0] == len(made.hosts))

        ends_s = time.monotonic() + LASTS_S
        while time.monotonic() < ends_s:
            for kind in dice.sample(KINDS, len(KINDS)):
                keep_busy()
                kind(trouble)
                struck[kind.__name__] += 1
                [(over,)] = made.sql("SELECT clock_timestamp()")
                until(lambda over=over: all_beat(over), f"all to beat after {kind.__name__}", BACK_S)  # type: ignore[misc]
                made.wait_until_accepting()
                assert not replaced(*made.hosts), (seed, kind.__name__, replaced(*made.hosts))
                if time.monotonic() > ends_s:
                    break
        for batch in batches:
            check_each_answered_once(made.hosts[0], batch, REQUESTS)
        assert not replaced(*made.hosts)
        assert {host.name: host.worker_pid for host in made.hosts} == pids
        restarts = "SELECT worker_id, verdict, reason FROM recovery_events WHERE kind IN ('restart', 'gave_up')"
        of_workers = [row for row in made.sql(restarts) if row[0].endswith(":worker")]
        assert not of_workers, (seed, of_workers)
        lost = "SELECT worker_id, kind, reason FROM recovery_events WHERE kind IN ('host_lost', 'watchdog_lost')"
        told = made.sql(lost)
    sys.stdout.write(f"{len(batches)} batches of {REQUESTS}; {dict(struck)}\nreported as lost: {told}\n")
