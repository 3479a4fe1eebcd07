"""A Postgres with a standby that follows it by streaming replication, and takes over when told to."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import psutil
import psycopg2

from service import embedded_postgres as embedded
from tests.support.servers import PostgresServer
from tests.support.waiting import until

NAME = "follower"
TIMEOUT_S = 60


class Pair:
    """Two servers, of which the second follows the first; `url` names both."""

    def __init__(self, folder: Path) -> None:
        self.first, self.second = (PostgresServer(folder / name) for name in ("a", "b"))
        for server in (self.first, self.second):
            server.homes[0].mkdir()
        hosts = ",".join(f"{server.homes[0]}/run/pg" for server in (self.first, self.second))
        self.url = f"postgresql:///batch?host={hosts}&user=postgres"
        self.first.start()
        self._copy()
        self.second.start()

    def _copy(self) -> None:
        """Makes the second a copy of the first that goes on following it."""
        home, owner = self.second.homes[0], embedded.unprivileged()
        source = f"host={self.first.homes[0]}/run/pg user=postgres application_name={NAME}"
        command = [str(embedded.binaries() / "pg_basebackup"), "-d", source, "-D", str(home / "pgdata"), "-R"]
        subprocess.run([*command, "--checkpoint=fast", "--no-sync"], check=True, timeout=TIMEOUT_S, cwd="/")
        if owner is not None:
            for folder, _, files in os.walk(home / "pgdata"):
                for path in (folder, *(os.path.join(folder, file) for file in files)):
                    os.chown(path, owner.pw_uid, owner.pw_gid)

    def sql(self, server: PostgresServer, statement: str, *values: object) -> list[tuple[Any, ...]]:
        """Runs a statement on one of them. Returns its rows, if any."""
        connection = psycopg2.connect(server.url % "batch", connect_timeout=10)
        try:
            connection.autocommit = True
            with connection.cursor() as cursor:
                cursor.execute(statement, values or None)
                return cursor.fetchall() if cursor.description else []
        finally:
            connection.close()

    def set(self, server: PostgresServer, name: str, value: str) -> None:
        """Changes a setting of one of them, for all its sessions."""
        self.sql(server, f"ALTER SYSTEM SET {name} = '{value}'")
        self.sql(server, "SELECT pg_reload_conf()")

    def wait_for_standby(self) -> None:
        """Makes the first wait for the second at each commit, as far as that asks for it."""
        self.set(self.first, "synchronous_standby_names", NAME)
        synced = "SELECT 1 FROM pg_stat_replication WHERE sync_state = 'sync'"
        until(lambda: self.sql(self.first, synced), "the standby to be a synchronous one")

    def is_replayed(self) -> bool:
        """True once the second has everything that the first has."""
        [position] = self.sql(self.first, "SELECT pg_current_wal_lsn()::text")
        [(is_there,)] = self.sql(self.second, "SELECT pg_last_wal_replay_lsn() >= %s::pg_lsn", *position)
        return bool(is_there)

    def signal_first(self, number: int) -> None:
        """Sends a signal to all processes of the first at once, as if its machine froze or lost power."""
        for process in self.processes():
            # The others end with the first one.
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def processes(self) -> list[psutil.Process]:
        """The processes of the first."""
        assert self.first.process is not None
        leader = psutil.Process(self.first.process.pid)
        return [leader, *leader.children()]

    def promote(self) -> None:
        """The second takes over."""
        # A statement that waited for it would hold up what is still to be replayed, until it is cancelled for that.
        assert self.sql(self.second, "SELECT pg_promote(false)") == [(True,)]
        until(lambda: self.sql(self.second, "SELECT pg_is_in_recovery()") == [(False,)], "the promotion")

    def end(self) -> None:
        """Ends both."""
        for server in (self.first, self.second):
            if server.process is not None and server.process.poll() is None:
                for child in psutil.Process(server.process.pid).children():
                    with suppress(psutil.NoSuchProcess):
                        child.resume()
                server.process.kill()
                server.process.wait(10)


@contextmanager
def pair() -> Iterator[Pair]:
    """Both servers, which end with the block."""
    # Not in pytest's folder: its path is too long for a socket.
    folder = Path(mkdtemp(prefix="vbp-"))
    made = Pair(folder)
    try:
        yield made
    finally:
        made.end()
        shutil.rmtree(folder, ignore_errors=True)
