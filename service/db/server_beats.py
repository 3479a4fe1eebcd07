"""The heartbeats of gateways and OpenAI's doors, so that it is known which there are and which version they have."""

import peewee

from service.db import lives
from service.db.models import Server


def write(db: peewee.PostgresqlDatabase, server_id: str, program: str, address: str, pid: int) -> None:
    """Records that it was seen now. Another pid starts a new life."""
    lives.beat(db, Server, server_id, pid, {Server.program: program, Server.address: address})


def end(db: peewee.PostgresqlDatabase, server_id: str, address: str, pid: int) -> None:
    """Records that this life of it was stopped: nobody has to look for it."""
    # In containers that of another machine of this name has the same pid.
    lives.end(db, Server, server_id, pid, Server.address == address)
