"""What the watchdog writes down, with Postgres there and away, across its own deaths: on a real file and database."""

from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import peewee
import pytest

from service.clock import SystemClock
from service.db import recoveries
from service.db.connection import Database
from service.db.recoveries import Event
from watchdog.journal import Journal
from watchdog.policy import Action, Decision, Evidence, Process, State, Step, Verdict
from watchdog.record import KEPT_VERDICTS, Record, UnrecordedError

WORKER = "host:worker"
EVIDENCE = Evidence(1.0, Process(State.EXITED))
CRASHED = Decision(Verdict.CRASHED, Action.RESTART, "gone", 0)


class Host:
    """Postgres, which may be away for the watchdog, and the watchdog's home. A `Record` is one life of a watchdog."""

    def __init__(self, database: Database, home: Path) -> None:
        self._database = database
        self.is_away = False
        # The statement is made, its answer is not heard.
        self.is_deaf = False
        self.path = home / "recovery" / "worker.json"

    def record(self) -> Record:
        """The record as a watchdog finds it that starts now."""
        record = Record(cast(Database, self), Journal(self.path), WORKER, SystemClock())
        record.sync(not self.is_away)
        return record

    def call(self, *arguments: Any) -> Any:
        if self.is_away:
            raise peewee.OperationalError("no route")
        answer = self._database.call(*arguments)
        if self.is_deaf:
            raise peewee.OperationalError("connection lost")
        return answer

    def listed(self) -> list[Event]:
        return self._database.call(recoveries.list_page, None, None, 1000)[::-1]


@pytest.fixture
def host(database: Database, tmp_path: Path) -> Host:
    """Postgres is there."""
    return Host(database, tmp_path)


def restart(record: Record) -> Event:
    return record.begin(EVIDENCE, CRASHED, {"decide": 0.1})


def ages(record: Record) -> int:
    past = record.past()
    assert past is not None
    return len(past.restart_ages_s)


def test_what_happens_while_postgres_is_away_is_merged_once_with_its_times(host: Host) -> None:
    """A restart that was begun, made and ended without Postgres is in the audit log later as if it had been there."""
    record = host.record()
    host.is_away = True
    record.sync(False)
    intent = restart(record)
    intent = record.advance(intent, Step.LOADING, {"decide": 0.1, "stop": 1.0})
    record.close(intent, "recovered", {"decide": 0.1, "stop": 1.0, "load": 2.0}, None)
    assert host.listed() == []
    host.is_away = False
    record.sync(True)
    record.sync(True)
    host.record()
    (merged,) = host.listed()
    assert (merged.key, merged.start_time, merged.outcome, merged.step) == (
        intent.key,
        intent.start_time,
        "recovered",
        "loading",
    )
    assert list(merged.timings) == ["decide", "stop", "load"]
    assert merged.evidence["process"]["state"] == "EXITED"


def test_watchdog_that_starts_without_postgres_knows_its_budget_and_its_orders(host: Host) -> None:
    """Restarts of before, in Postgres or in the journal alone, count for it; an open one is found; a pause holds."""
    record = host.record()
    record.close(restart(record), "failed", {}, None)
    host.is_away = True
    record.sync(False)
    intent = restart(record)
    record.order("paused", "", "new driver", 600)
    successor = host.record()
    past = successor.past()
    assert past is not None
    assert (len(past.restart_ages_s), past.intent, past.pause_reason) == (2, intent, "new driver")
    successor.order("resumed", "", "done", 0)
    successor.order("budget_reset", "", "repaired", 0)
    host.is_away = False
    past = host.record().past()
    assert past is not None
    assert (past.restart_ages_s, past.pause_left_s) == ((), 0)
    assert [event.kind for event in host.listed()] == ["restart", "restart", "paused", "resumed", "budget_reset"]


def test_watchdog_that_knows_nothing_writes_nothing_down(host: Host) -> None:
    """Without a journal and without Postgres nobody knows what was spent: nothing may be done until it is known."""
    restart(host.record())
    host.path.unlink()
    host.is_away = True
    record = host.record()
    assert record.past() is None
    with pytest.raises(UnrecordedError):
        restart(record)
    with pytest.raises(UnrecordedError):
        record.order("budget_reset", "", "impatient", 0)
    record.add("verdict", CRASHED, EVIDENCE)
    assert not host.path.exists()
    host.is_away = False
    record.sync(True)
    assert ages(record) == 1


def test_journal_that_is_broken_is_none(host: Host) -> None:
    """Half a file, which our own writing cannot leave, is not taken for an empty past."""
    restart(host.record())
    host.path.write_bytes(host.path.read_bytes()[:-20])
    host.is_away = True
    assert host.record().past() is None


def test_answer_that_is_lost_does_not_make_a_second_event(host: Host) -> None:
    """Postgres has it, the watchdog does not know and dies: its successor writes it again, which changes nothing."""
    record = host.record()
    host.is_deaf = True
    intent = restart(record)
    host.is_deaf = False
    assert [event.outcome for event in host.listed()] == ["open"]
    successor = host.record()
    past = successor.past()
    assert past is not None
    assert past.intent is not None
    assert (past.intent.key, len(past.restart_ages_s)) == (intent.key, 1)
    assert len(host.listed()) == 1


def test_journal_is_the_owners_alone(host: Host) -> None:
    """It tells what was observed of a server: nobody else may read or write it."""
    restart(host.record())
    assert oct(host.path.stat().st_mode)[-3:] == "600"
    assert oct(host.path.parent.stat().st_mode)[-3:] == "700"
    assert [path.name for path in host.path.parent.iterdir()] == ["worker.json"]


def test_disk_that_takes_no_journal(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """With Postgres the restart is made, and no old journal is left to be believed; without both it is not."""
    record = host.record()
    restart(record)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Journal, "write", full)
    record.close(restart(record), "failed", {}, None)
    assert not host.path.exists()
    host.is_away = True
    with pytest.raises(UnrecordedError):
        restart(record)
    assert ages(record) == 2
    assert host.record().past() is None


def test_postgres_that_forgot_does_not_give_the_budget_back(host: Host) -> None:
    """What a restored Postgres does not know any more, the journal does."""
    restart(host.record())
    host.call(lambda db: db.execute_sql("DELETE FROM recovery_events"))
    assert ages(host.record()) == 1


def test_journal_stays_small(host: Host) -> None:
    """A health that flaps for hours without Postgres leaves its last changes; what is over and stored is dropped."""
    record = host.record()
    intent = restart(record)
    host.is_away = True
    record.sync(False)
    for number in range(KEPT_VERDICTS + 5):
        record.add("verdict", replace(CRASHED, reason=str(number)), EVIDENCE)
    waiting = Journal(host.path).read() or []
    assert [entry.event.reason for entry in waiting][:2] == ["gone", "5"]
    host.is_away = False
    record.sync(True)
    assert [entry.event.key for entry in Journal(host.path).read() or []] == [intent.key]
    old = intent.start_time - timedelta(seconds=3601)
    Journal(host.path).write(
        [
            replace(entry, event=replace(entry.event, start_time=old, outcome="failed"))
            for entry in Journal(host.path).read() or []
        ]
    )
    host.call(lambda db: db.execute_sql("UPDATE recovery_events SET outcome = 'failed', start_time = %s", (old,)))
    record = host.record()
    record.add("gave_up", CRASHED, EVIDENCE)
    assert [entry.event.kind for entry in Journal(host.path).read() or []] == ["gave_up"]
