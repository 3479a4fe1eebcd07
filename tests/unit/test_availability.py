"""How each Postgres error is treated: one decision for every class."""

import inspect
from types import SimpleNamespace

import peewee
import psycopg2
import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st
from psycopg2 import _psycopg, errorcodes, errors
from structlog.testing import capture_logs

from service.db.availability import (
    CLASSES,
    CODES,
    DATABASE_ERRORS,
    MAX_CAUSES,
    AvailabilityLog,
    DatabaseAwayError,
    DatabaseUnfitError,
    Meaning,
    database_away,
    meaning,
    meaning_of,
)

# psycopg2 never raises the classes for success and warnings.
ALL_CODES = sorted(set(_psycopg.sqlstate_errors))


def test_every_class_is_decided() -> None:
    """Every class of SQLSTATE that psycopg2 knows has an explicit decision."""
    classes = {value for name, value in inspect.getmembers(errorcodes) if name.startswith("CLASS_")}
    assert len(classes) > 35
    assert classes == set(CLASSES)


@pytest.mark.parametrize(
    ("sqlstate", "expected"),
    [
        *((code, Meaning.AWAY) for code in ("08000", "08001", "08006", "08P01", "53100", "53200", "53300", "53400")),
        *((code, Meaning.AWAY) for code in ("57P01", "57P02", "57P03", "57P04", "57014", "58000", "58030", "58P01")),
        *((code, Meaning.AWAY) for code in ("25006", "25P03", "25P04", "40001", "40P01", "55P03", "55000", "55006")),
        *((code, Meaning.AWAY) for code in ("28000", "28P01", "42501", "42P01", "42703", "3D000", "3F000", "0P000")),
        *((code, Meaning.AWAY) for code in ("42704", "42883", "54001")),
        *((code, Meaning.AWAY) for code in ("XX000", "XX001", "XX002", "F0000", "72000", "P0001", "38000", "HV000")),
        *((code, Meaning.REFUSED) for code in ("22021", "22P05", "22003", "23505", "23514", "23502", "54000")),
        *((code, Meaning.FAULT) for code in ("42601", "42804", "42P02", "42P07", "25001", "25P02", "0A000", "26000")),
        *((code, Meaning.AWAY) for code in ("ZZ123", "BD001")),
    ],
)
def test_meaning(sqlstate: str, expected: Meaning) -> None:
    """AWAY is retried, REFUSED goes back to the sender of the data, FAULT is our bug; unknown codes count as AWAY."""
    assert meaning(sqlstate) is expected


class Diagnosed(psycopg2.OperationalError):
    """An error as a server raises it in this file of its source."""

    pgcode = "54000"
    source_file = ""

    @property
    def diag(self) -> "Diagnosed":  # type: ignore[override]
        return self


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("varsup.c", Meaning.AWAY),
        ("multixact.c", Meaning.AWAY),
        ("nbtutils.c", Meaning.REFUSED),
        (None, Meaning.REFUSED),
    ],
)
def test_no_transaction_ids_left(file: str | None, expected: Meaning) -> None:
    """A server that takes no transactions before it is vacuumed is away, although its code is that of large data."""
    error = Diagnosed("die Datenbank nimmt keine Befehle an")
    error.source_file = file  # type: ignore[assignment]
    assert meaning_of(error) is expected


@given(st.from_regex(r"[0-9A-Z]{5}", fullmatch=True))
def test_any_code(sqlstate: str) -> None:
    """Any code has a meaning: its own, that of its class, or AWAY."""
    raised = type("Raised", (psycopg2.DatabaseError,), {"pgcode": sqlstate})("what is wrong")
    expected = CODES.get(sqlstate, CLASSES.get(sqlstate[:2], Meaning.AWAY))
    assert meaning(sqlstate) is meaning_of(raised) is expected
    with pytest.raises(DatabaseAwayError if expected is Meaning.AWAY else type(raised)), database_away():
        raise raised


@pytest.mark.parametrize("sqlstate", ALL_CODES)
def test_as_it_is_raised(sqlstate: str) -> None:
    """Only the code decides, whether psycopg2 or peewee raises it, and AWAY becomes DatabaseAwayError."""

    class Raised(errors.lookup(sqlstate)):  # type: ignore[misc]
        pgcode = sqlstate

    wrapped = peewee.InternalError("what is wrong\nDETAIL: more")
    wrapped.orig = Raised("what is wrong\nDETAIL: more")  # type: ignore[attr-defined]
    for error in (Raised("what is wrong\nDETAIL: more"), wrapped):
        assert meaning_of(error) is meaning(sqlstate)
        assert isinstance(error, DATABASE_ERRORS)
        expected = DatabaseAwayError if meaning(sqlstate) is Meaning.AWAY else type(error)
        with pytest.raises(expected) as caught, database_away():
            raise error
        assert str(caught.value).splitlines()[0] == "what is wrong"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (psycopg2.OperationalError("server closed the connection unexpectedly"), Meaning.AWAY),
        (psycopg2.InterfaceError("connection already closed"), Meaning.AWAY),
        (psycopg2.DatabaseError("error with status PGRES_TUPLES_OK and no message from the libpq"), Meaning.AWAY),
        (peewee.OperationalError("could not connect"), Meaning.AWAY),
        (DatabaseUnfitError("SQL_ASCII"), Meaning.AWAY),
        (psycopg2.DataError("out of range"), Meaning.REFUSED),
        (psycopg2.ProgrammingError("no results to fetch"), Meaning.FAULT),
        (ValueError("ours"), None),
    ],
)
def test_without_a_code(error: Exception, expected: Meaning | None) -> None:
    """Errors without a code, from libpq or the pool, are judged by type; other errors are not Postgres's."""
    assert meaning_of(error) is expected


def test_an_outage_is_logged_with_each_of_its_causes_once() -> None:
    """An outage logs its beginning, each further cause once, however often they alternate, and its end."""
    with capture_logs() as events:
        log = AvailabilityLog(structlog.get_logger())
        for _ in range(3):
            log.away(DatabaseAwayError("terminating connection due to administrator command"))
            log.away(DatabaseAwayError("cannot execute UPDATE in a read-only transaction"))
        log.back()
        log.back()
        log.away(DatabaseAwayError("terminating connection due to administrator command"))
    assert [(event["event"], event.get("cause", "")) for event in events] == [
        ("database_away", "terminating connection due to administrator command"),
        ("database_still_away", "cannot execute UPDATE in a read-only transaction"),
        ("database_back", ""),
        ("database_away", "terminating connection due to administrator command"),
    ]


def test_what_is_refused_while_all_else_is_answered() -> None:
    """An outage lasts until what was refused is done, with its last cause; an answer to something else shows only that
    Postgres does not keep silent."""
    with capture_logs() as events:
        log = AvailabilityLog(structlog.get_logger())
        assert (log.is_away, log.is_silent, log.cause) == (False, False, "")
        for _ in range(3):
            log.away(DatabaseAwayError("permission denied"))
            assert (log.is_away, log.is_silent, log.cause) == (True, True, "permission denied")
            log.answered()
            assert (log.is_away, log.is_silent, log.cause) == (True, False, "permission denied")
        log.back()
        assert (log.is_away, log.is_silent, log.cause) == (False, False, "")
    assert [event["event"] for event in events] == ["database_away", "database_back"]


def test_what_may_be_about_one_row_is_told_to_nobody_else() -> None:
    """What a trigger of others says, and what Postgres says of data, is in the log; the cause has only its type."""
    tried: list[tuple[Exception, str]] = [(errors.CheckViolation("S3 is too long"), "CheckViolation")]
    for name, code in (("RaiseException", "P0001"), ("InsufficientPrivilege", "42501")):
        of_function = SimpleNamespace(context="PL/pgSQL function audit() line 3 at RAISE")
        made = type(name, (psycopg2.DatabaseError,), {"pgcode": code, "diag": of_function})
        raised = DatabaseAwayError("S3 is not audited")
        raised.__cause__ = made("S3 is not audited")
        tried.append((raised, name))
    for error, shown in tried:
        with capture_logs() as events:
            log = AvailabilityLog(structlog.get_logger())
            log.away(error)
        assert log.cause == f"{shown}, with more in the log"
        assert events[0]["cause"] == str(error)


def test_an_outage_logs_a_bounded_number_of_causes() -> None:
    """Causes that never repeat, such as those that name a port, do not fill the log."""
    with capture_logs() as events:
        log = AvailabilityLog(structlog.get_logger())
        for number in range(1000):
            log.away(DatabaseAwayError(f"refused at port {number}"))
    assert len(events) == MAX_CAUSES
