"""Tells from its last heartbeat whether an incarnation failed to start. Pure."""

from service.db.heartbeats import SeenBeat
from watchdog.policy import LOADING_PHASES, FailedStart


def failed_start(seen: SeenBeat, has_ended: bool) -> FailedStart | None:
    """Returns the failed start of the incarnation that wrote this heartbeat; None if it served, or still may.

    `has_ended`: its process is gone. Then it failed even if it gave no cause: the kernel may have killed it.
    """
    beat = seen.beat
    if seen.has_served:
        return None
    told = {name: str(beat.detail.get(name) or "") for name in ("cause", "advice", "cause_key")}
    if told["cause"]:
        key = told["cause_key"] or told["cause"]
        recurs = bool(beat.detail.get("cause_recurs"))
        return FailedStart(str(beat.incarnation), beat.settings, told["cause"], told["advice"], key, recurs)
    if not has_ended or beat.phase not in LOADING_PHASES:
        return None
    cause = f"the process ended while {beat.phase} without giving a cause"
    advice = "See the end of the worker's log; `dmesg` shows whether the kernel killed it because memory ran out."
    return FailedStart(str(beat.incarnation), beat.settings, cause, advice, cause)
