"""Calls to Postgres that may be made twice: if the connection of one breaks, it is made again over another.

Connections break while Postgres is up, too: a pooler is restarted, an administrator ends sessions. Nobody is refused
for that.
"""

from collections.abc import Awaitable, Callable
from typing import TypeVar

from service.db.availability import DatabaseAwayError, is_cut
from service.telemetry import logs

T = TypeVar("T")

log = logs.get("repeating")


async def twice(call: Callable[[bool], Awaitable[T]]) -> T:
    """The outcome of `call(False)`; of `call(True)` if the connection of that broke: it may have been done already.

    Raises what the last of them raises.
    """
    try:
        return await call(False)
    except DatabaseAwayError as error:
        if not is_cut(error):
            raise
        log.info("call_made_again", cause=str(error))
    return await call(True)
