"""Whose a worker's name is: decided by proof that the process behind its heartbeat is gone, else by its lease."""

import peewee

from service.db.heartbeats import SeenBeat
from service.machine import Place

# After as many missed beats a machine that was booted again is no copy of one that runs.
SILENT_BEATS = 3


def is_ours(seen: SeenBeat, place: Place) -> bool:
    """True for a heartbeat of this machine since its boot. Versions that did not write where they ran count as ours."""
    theirs = seen.beat.place
    return not theirs.machine or (theirs.machine, theirs.pid_space) == (place.machine, place.pid_space)


def is_free(seen: SeenBeat, place: Place, is_running: bool | None, silence_s: float) -> bool:
    """True when nobody can be behind this heartbeat any more, or its lease on the name is over.

    `is_running`: a process with its pid and start time exists here, which counts where pids mean the same; None if that
    cannot be seen. A machine that was booted again has ended its processes; that it was booted again, and is no copy of
    the one that beats, is shown by a silence of `silence_s`.
    """
    theirs = seen.beat.place
    has_proof = theirs.pid_space and theirs.pid_space == place.pid_space and seen.beat.start_ticks
    if has_proof and is_running is not None:
        return not is_running
    if theirs.machine and theirs.machine == place.machine and seen.age_s >= silence_s:
        return True
    return seen.lease_left_s <= 0


def is_earlier(seen: SeenBeat, place: Place, start_ticks: int, is_running: bool | None) -> bool:
    """True for a heartbeat of a process that ended here in this boot and began before ours did, at `start_ticks`.

    Where ours has had the name since, somebody has restored that heartbeat. Takes what else `is_free` takes.
    """
    theirs = seen.beat
    is_here = theirs.place.pid_space == place.pid_space != ""
    return is_here and is_running is False and 0 < theirs.start_ticks < start_ticks


def taken_by(seen: SeenBeat, place: Place, is_running: bool | None, silence_s: float) -> str:
    """Which other machine has the name of this heartbeat, and where; "" if none has. Takes what `is_free` takes."""
    if is_ours(seen, place) or is_free(seen, place, is_running, silence_s):
        return ""
    beat = seen.beat
    return f"another machine runs as {beat.worker_id}, at {beat.address} (pid {beat.pid})"


def end_sessions(db: peewee.PostgresqlDatabase, name: str) -> int:
    """Ends other sessions whose application_name ends with `name`, where we may. Returns how many.

    Postgres may keep a session, and what it has locked, long after the host at its other end is gone.
    """
    rows = db.execute_sql(
        """
        SELECT pg_terminate_backend(a.pid) FROM pg_stat_activity a JOIN pg_roles r ON r.oid = a.usesysid
        WHERE right(a.application_name, length(%(name)s)) = %(name)s AND a.pid <> pg_backend_pid()
          AND a.datname = current_database() AND pg_has_role(r.oid, 'USAGE')
          AND (NOT r.rolsuper OR current_setting('is_superuser') = 'on')
        """,
        {"name": name},
    )
    return len(rows.fetchall())
