"""What the watchdog records, with Postgres up and away, across its own deaths, using a real file and database."""

from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, cast

import pytest

from service.clock import SystemClock
from service.db import recoveries
from service.db.availability import DatabaseAwayError
from service.db.connection import Database
from service.db.recoveries import Event
from watchdog.policy import Action, Decision, Evidence, Process, State, Step, Verdict
from watchdog.record.audit_log import KEPT_VERDICTS, AuditLog, UnrecordedError
from watchdog.record.journal import Entry, Journal

WORKER = "host:worker"
EVIDENCE = Evidence(1.0, Process(State.EXITED))
CRASHED = Decision(Verdict.CRASHED, Action.RESTART, "gone", 0)


class SetClock(SystemClock):
    """The system clock, set forward by `set_by_s`."""

    set_by_s = 0.0

    def now(self) -> datetime:
        return super().now() + timedelta(seconds=self.set_by_s)


class Host:
    """Postgres as the watchdog reaches it, and the watchdog's home. Each `AuditLog` is one life of a watchdog."""

    def __init__(self, database: Database, home: Path) -> None:
        self._database = database
        self.is_away = False
        self.machine = "here"
        # The statement is executed, but its answer is lost.
        self.is_deaf = False
        self.clock = SetClock()
        self.path = home / "recovery" / "worker.json"

    def record(self) -> AuditLog:
        """The audit log as a watchdog finds it when it starts."""
        record = AuditLog(cast(Database, self), Journal(self.path), WORKER, self.machine, self.clock, "this boot")
        record.sync(not self.is_away)
        return record

    def call(self, *arguments: Any) -> Any:
        if self.is_away:
            raise DatabaseAwayError("no route")
        answer = self._database.call(*arguments)
        if self.is_deaf:
            raise DatabaseAwayError("connection lost")
        return answer

    def listed(self) -> list[Event]:
        return self._database.call(recoveries.list_page, None, None, 1000)[::-1]


@pytest.fixture
def host(database: Database, tmp_path: Path) -> Host:
    """A host whose Postgres can be reached."""
    return Host(database, tmp_path)


def restart(record: AuditLog) -> Event:
    return record.begin(EVIDENCE, CRASHED, {"decide": 0.1})


def ages(record: AuditLog) -> int:
    past = record.history()
    assert past is not None
    return len(past.restart_ages_s)


def test_what_happens_while_postgres_is_away_is_merged_once_with_its_times(host: Host) -> None:
    """A restart recorded while Postgres was away is merged into the audit log once, with its original times."""
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
    """Without Postgres, a new watchdog knows earlier restarts, the open intent and the pause from the journal."""
    record = host.record()
    record.close(restart(record), "failed", {}, None)
    host.is_away = True
    record.sync(False)
    intent = restart(record)
    record.order("paused", "", "new driver", 600)
    successor = host.record()
    past = successor.history()
    assert past is not None
    assert (len(past.restart_ages_s), past.intent, past.pause_reason) == (2, intent, "new driver")
    successor.order("resumed", "", "done", 0)
    successor.order("budget_reset", "", "repaired", 0)
    host.is_away = False
    past = host.record().history()
    assert past is not None
    assert (past.restart_ages_s, past.pause_left_s) == ((), 0)
    assert [event.kind for event in host.listed()] == ["restart", "restart", "paused", "resumed", "budget_reset"]


@pytest.mark.parametrize("is_away", [False, True], ids=["postgres there", "postgres away"])
@pytest.mark.parametrize("set_by_s", [-3 * 3600, -600, 600, 3 * 3600])
def test_a_clock_that_is_set_changes_nothing(host: Host, set_by_s: float, is_away: bool) -> None:
    """Setting the clock changes neither the age of restarts nor the rest of a pause, for this watchdog or the next."""
    record = host.record()
    for _ in range(3):
        record.close(restart(record), "recovered", {}, None)
    record.order("paused", "", "new driver", 1000)
    host.clock.set_by_s = set_by_s
    host.is_away = is_away
    record.sync(not is_away)
    for each in (record, host.record(), host.record()):
        past = each.history()
        assert past is not None
        assert [age < 60 for age in past.restart_ages_s] == [True] * 3
        assert 940 < past.pause_left_s <= 1000
        assert past.pause_end_time is not None
        assert abs((past.pause_end_time - host.clock.now()).total_seconds() - past.pause_left_s) < 5
        # Writes the journal anew.
        each.order("resumed", "", "tried", 0)
        each.order("paused", "", "new driver", 1000)


def test_watchdog_that_knows_nothing_writes_nothing_down(host: Host) -> None:
    """Without journal and Postgres the history is unknown, and nothing is recorded until it is known."""
    restart(host.record())
    host.path.unlink()
    host.is_away = True
    record = host.record()
    assert record.history() is None
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
    """A truncated journal counts as missing, not as an empty history."""
    restart(host.record())
    host.path.write_bytes(host.path.read_bytes()[:-20])
    host.is_away = True
    assert host.record().history() is None


def test_answer_that_is_lost_does_not_make_a_second_event(host: Host) -> None:
    """If Postgres stores an event but its answer is lost, the successor writes it again without duplicating it."""
    record = host.record()
    host.is_deaf = True
    intent = restart(record)
    host.is_deaf = False
    assert [event.outcome for event in host.listed()] == ["open"]
    successor = host.record()
    past = successor.history()
    assert past is not None
    assert past.intent is not None
    assert (past.intent.key, len(past.restart_ages_s)) == (intent.key, 1)
    assert len(host.listed()) == 1


def test_journal_is_the_owners_alone(host: Host) -> None:
    """The journal and its folder are accessible to their owner only."""
    restart(host.record())
    assert oct(host.path.stat().st_mode)[-3:] == "600"
    assert oct(host.path.parent.stat().st_mode)[-3:] == "700"
    assert [path.name for path in host.path.parent.iterdir()] == ["worker.json"]


def test_disk_that_takes_no_journal(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the journal cannot be written, restarts are recorded only with Postgres, and no stale journal remains."""
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
    assert host.record().history() is None


def test_postgres_that_forgot_does_not_give_the_budget_back(host: Host) -> None:
    """Restarts missing from a restored Postgres still count, because the journal has them."""
    restart(host.record())
    host.call(lambda db: db.execute_sql("DELETE FROM recovery_events"))
    assert ages(host.record()) == 1


def test_journal_stays_small(host: Host) -> None:
    """The journal keeps the latest verdicts of a long outage, and drops events that are stored and no longer matter."""
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
            replace(entry, event=replace(entry.event, start_time=old, outcome="failed"), began=None)
            for entry in Journal(host.path).read() or []
        ]
    )
    host.call(lambda db: db.execute_sql("UPDATE recovery_events SET outcome = 'failed', start_time = %s", (old,)))
    record = host.record()
    record.add("gave_up", CRASHED, EVIDENCE)
    assert [entry.event.kind for entry in Journal(host.path).read() or []] == ["gave_up"]


def test_the_journal_of_a_copied_home_does_not_count(host: Host) -> None:
    """Restarts of the machine from which this home was copied are not charged to this one, nor continued by it."""
    restart(host.record())
    host.machine = "copy"
    copy = host.record().history()
    assert copy is not None
    assert (copy.restart_ages_s, copy.intent) == ((), None)
    host.machine = "here"
    assert ages(host.record()) == 1


def test_the_journal_of_another_name_does_not_count(host: Host) -> None:
    """Nor are those of the host from which this one was cloned with its machine's id, and then renamed."""
    entries = [replace(entry, event=replace(entry.event, worker_id="template:worker")) for entry in opened(host)]
    host.call(lambda db: db.execute_sql("DELETE FROM recovery_events"))
    Journal(host.path).write(entries)
    clone = host.record().history()
    assert clone is not None
    assert (clone.restart_ages_s, clone.intent) == ((), None)
    assert host.listed() == []


def test_a_home_that_was_rolled_back(host: Host) -> None:
    """A restart that was open when a snapshot of the home was taken, and has long ended, is not open again."""
    record = host.record()
    intent = restart(record)
    snapshot = Journal(host.path).read() or []
    record.close(intent, "recovered", {}, None)
    old = intent.start_time - timedelta(hours=2)
    host.call(lambda db: db.execute_sql("UPDATE recovery_events SET start_time = %s", (old,)))
    Journal(host.path).write(
        [replace(each, event=replace(each.event, start_time=old), began=None) for each in snapshot]
    )
    past = host.record().history()
    assert past is not None
    assert past.intent is None


def opened(host: Host) -> list[Entry]:
    """The journal with an open restart."""
    restart(host.record())
    return Journal(host.path).read() or []
