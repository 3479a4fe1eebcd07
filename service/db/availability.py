"""Availability of Postgres: what each error means, one exception for being away, and a log of outages."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum

import peewee
import psycopg2
import structlog


class Meaning(StrEnum):
    """How to treat an error from Postgres."""

    # It cannot serve now: retry later. Nothing is lost meanwhile, and no request is to blame.
    AWAY = "away"
    # It will never accept this data: report it to the client.
    REFUSED = "refused"
    # The statement is wrong: a bug of ours.
    FAULT = "fault"


# By class, the first two characters of an SQLSTATE. Other classes come from a pooler or an extension rather than from
# Postgres, and we know nothing about them: they count as away.
CLASSES = {
    "00": Meaning.FAULT,  # success
    "01": Meaning.FAULT,  # warning
    "02": Meaning.FAULT,  # no data
    "03": Meaning.FAULT,  # statement not complete
    "08": Meaning.AWAY,  # connection
    "09": Meaning.AWAY,  # a trigger, which is not ours: we have none
    "0A": Meaning.FAULT,  # not supported
    "0B": Meaning.FAULT,  # transaction initiation
    "0F": Meaning.FAULT,  # locator
    "0L": Meaning.AWAY,  # grantor: rights
    "0P": Meaning.AWAY,  # role: rights
    "0Z": Meaning.FAULT,  # diagnostics
    "10": Meaning.FAULT,  # XQuery
    "20": Meaning.FAULT,  # case not found
    "21": Meaning.FAULT,  # cardinality
    "22": Meaning.REFUSED,  # data
    "23": Meaning.REFUSED,  # constraints
    "24": Meaning.FAULT,  # cursor state
    "25": Meaning.FAULT,  # transaction state
    "26": Meaning.FAULT,  # statement name
    "27": Meaning.AWAY,  # a trigger
    "28": Meaning.AWAY,  # authorization
    "2B": Meaning.AWAY,  # privileges that depend on others
    "2D": Meaning.FAULT,  # transaction termination
    "2F": Meaning.AWAY,  # a function, which is not ours
    "34": Meaning.FAULT,  # cursor name
    "38": Meaning.AWAY,  # an external routine
    "39": Meaning.AWAY,  # an external routine
    "3B": Meaning.FAULT,  # savepoint
    "3D": Meaning.AWAY,  # no such database
    "3F": Meaning.AWAY,  # no such schema
    "40": Meaning.AWAY,  # rolled back: serialization, deadlock
    "42": Meaning.FAULT,  # syntax, and access but for what is below
    "44": Meaning.AWAY,  # a view, which is not ours
    "53": Meaning.AWAY,  # memory, disk, connections
    "54": Meaning.REFUSED,  # larger than Postgres can
    "55": Meaning.AWAY,  # locks, objects in use
    "57": Meaning.AWAY,  # shutdown, start, cancelled at its deadline
    "58": Meaning.AWAY,  # input and output
    "72": Meaning.AWAY,  # snapshot too old
    "F0": Meaning.AWAY,  # the server's configuration
    "HV": Meaning.AWAY,  # foreign data
    "P0": Meaning.AWAY,  # raised by a function or trigger
    "XX": Meaning.AWAY,  # a bug or damage of the server
}
READ_ONLY = "25006"
TOO_LARGE = "54000"
# Exceptions to their class.
CODES = {
    READ_ONLY: Meaning.AWAY,  # read-only: a standby, a full disk, a maintenance
    "25P03": Meaning.AWAY,  # the transaction's deadline, idle
    "25P04": Meaning.AWAY,  # the transaction's deadline
    "42501": Meaning.AWAY,  # lacks a right
    "42P01": Meaning.AWAY,  # before the migrations
    "42703": Meaning.AWAY,  # before the migrations
    "42704": Meaning.AWAY,  # in the middle of a restore
    "42883": Meaning.AWAY,  # in the middle of a restore
    "54001": Meaning.AWAY,  # the stack, which max_stack_depth limits: no text of a client's is parsed as nested
}


class DatabaseAwayError(Exception):
    """Postgres does not answer, or lacks the schema or rights that we need. Its text is the cause, on one line."""


class DatabaseUnfitError(DatabaseAwayError):
    """Postgres answers but cannot be used as configured. The text says what an operator has to change."""


# Everything that a call to Postgres may raise, for code that has to continue after any error and retry.
DATABASE_ERRORS = (DatabaseAwayError, psycopg2.Error, peewee.PeeweeException)


def meaning(sqlstate: str) -> Meaning:
    """The meaning of an SQLSTATE."""
    return CODES.get(sqlstate) or CLASSES.get(sqlstate[:2], Meaning.AWAY)


def meaning_of(error: Exception) -> Meaning | None:
    """The meaning of an exception raised by a call to Postgres; None if it does not come from Postgres."""
    if isinstance(error, DatabaseAwayError):
        return Meaning.AWAY
    original = getattr(error, "orig", None) or error
    if not isinstance(original, (psycopg2.Error, peewee.PeeweeException)):
        return None
    sqlstate = getattr(original, "pgcode", None)
    if sqlstate:
        return Meaning.AWAY if _has_no_ids(sqlstate, original) else meaning(sqlstate)
    # Raised by libpq or psycopg2 themselves: about the connection, or about wrong use of their API.
    if isinstance(original, psycopg2.DataError):
        return Meaning.REFUSED
    wrong_use = (psycopg2.ProgrammingError, psycopg2.NotSupportedError, peewee.ProgrammingError)
    return Meaning.FAULT if isinstance(original, wrong_use) else Meaning.AWAY


def _has_no_ids(sqlstate: str, error: Exception) -> bool:
    """True for a server without transaction ids until a VACUUM. The code is that of data which is too large."""
    diag = getattr(error, "diag", None)
    return sqlstate == TOO_LARGE and getattr(diag, "source_file", None) in ("varsup.c", "multixact.c")


def _sqlstate(error: BaseException | None) -> str | None:
    """The SQLSTATE of an error of psycopg2, which peewee may have wrapped."""
    return getattr(getattr(error, "orig", None) or error, "pgcode", None)


def _unwrapped(error: BaseException | None) -> BaseException | None:
    """The error of psycopg2 behind one of peewee or of ours; None for one of ours that has no cause."""
    if isinstance(error, DatabaseAwayError):
        error = error.__cause__
    return getattr(error, "orig", None) or error


def is_away(error: Exception) -> bool:
    """True if the operation should be retried later."""
    return meaning_of(error) is Meaning.AWAY


def is_cut(error: Exception) -> bool:
    """True if the connection broke, or could not be made; False if Postgres was too slow, or refused.

    `error`: of a call that Postgres did not serve.
    """
    if (cause := _unwrapped(error)) is None:
        return False
    sqlstate = _sqlstate(cause)
    # 57P01 and its neighbours: the server ends the session, and says so.
    return sqlstate is None or sqlstate.startswith("57P")


# Raised by what others have made in Postgres: triggers, functions, views. It may be about one row alone.
FOREIGN = ("09", "27", "2F", "38", "39", "44", "P0")


def is_foreign(error: Exception) -> bool:
    """True for an error that a trigger of others raised, or what else they have made: it may be about one row alone.

    `error`: of a call that Postgres did not serve.
    """
    return (_sqlstate(_unwrapped(error)) or "").startswith(FOREIGN)


def is_read_only(error: Exception) -> bool:
    """True for an error of a server that takes no writes: after a failover it may be a standby of another one."""
    return _sqlstate(error) == READ_ONLY


@contextmanager
def database_away() -> Iterator[None]:
    """Raises DatabaseAwayError for whatever the block raises because Postgres is away; all else passes unchanged."""
    try:
        yield
    except DatabaseAwayError:
        raise
    except Exception as error:
        if not is_away(error):
            raise
        raise DatabaseAwayError(_cause(error)) from error


def _cause(error: Exception) -> str:
    """The first that went wrong: what is tried on a broken connection fails because that is broken."""
    first = error
    while meaning_of(error) is not None:
        first, context = error, error.__cause__ or error.__context__
        if not isinstance(context, Exception):
            break
        error = context
    return first_line(first)


def first_line(error: Exception) -> str:
    """The message of an error without its details. libpq's messages about several addresses become one line."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    attempts = [line for line in lines if line.startswith("connection to server")]
    return "; ".join(attempts) if len(attempts) > 1 else lines[0]


def _of_no_row(error: Exception, cause: str) -> str:
    """The cause; only its type where it may be about one row, and quote what is in that."""
    original = _unwrapped(error)
    # A trigger may raise with any code. Postgres says then in which function it was.
    is_of_function = bool(getattr(getattr(original, "diag", None), "context", None))
    if isinstance(error, DatabaseAwayError) and not is_foreign(error) and not is_of_function:
        return cause
    return f"{type(original).__name__}, with more in the log"


# Distinct causes logged in one outage. A cause that names a port or a time would never repeat.
MAX_CAUSES = 10


@dataclass
class AvailabilityLog:
    """Logs `database_away` once for each outage, with its cause, and `database_back` at its end.

    A cause that takes the place of the first, such as a database that is read-only after a restart, is logged as
    `database_still_away`, once. An error other than DatabaseAwayError is logged as `database_refused`, with its
    traceback.
    """

    log: structlog.typing.FilteringBoundLogger
    # Of the last call of `away`, as everybody may read it; "" while it is not away.
    cause: str = ""
    # Nothing was answered since.
    is_silent: bool = False
    _causes: set[str] = field(default_factory=set)

    @property
    def is_away(self) -> bool:
        """True from the first call of `away` until the next of `back`."""
        return bool(self._causes)

    def away(self, error: Exception) -> None:
        """Notes that Postgres is away, or refuses."""
        cause = first_line(error)
        self.cause, self.is_silent = _of_no_row(error, cause), True
        if cause in self._causes or len(self._causes) >= MAX_CAUSES:
            return
        if not isinstance(error, DatabaseAwayError):
            self.log.error("database_refused", cause=cause, exc_info=error)
        elif self.is_away:
            self.log.warning("database_still_away", cause=cause)
        else:
            self.log.warning("database_away", cause=cause)
        self._causes.add(cause)

    def answered(self) -> None:
        """Notes that Postgres did something else: whatever it refuses, it does not keep silent."""
        self.is_silent = False

    def back(self, **fields: object) -> None:
        """Notes that Postgres did what it refused; `fields` go into the event."""
        if self.is_away:
            self.log.info("database_back", **fields)
        self._causes.clear()
        self.cause, self.is_silent = "", False
