"""Through pgbouncer: session pooling works, the other modes are rejected at start."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from tempfile import mkdtemp

import psycopg2
import pytest

from scripts.doctor import database as doctor
from service import embedded_postgres as embedded
from service.database_url import parse
from service.db.availability import DatabaseUnfitError
from service.db.connection import Database, check_schema
from tests.support.batches import finished, lines
from tests.support.ports import free_port
from tests.support.servers import Stack
from tests.support.waiting import until
from vllm_batch import Client

# A host with everything takes 12.
POOL_SIZE = 12
PROGRAM = shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin")
pytestmark = pytest.mark.skipif(PROGRAM is None, reason="needs pgbouncer (apt-get install pgbouncer)")


@pytest.fixture
def through(database_url: str, request: pytest.FixtureRequest) -> Iterator[str]:
    """The database's URL through a pgbouncer in the pooling mode given by the parameter."""
    given = parse(database_url)
    folder, owner = Path(mkdtemp(prefix="vbt-")), embedded.unprivileged()
    (folder / "users.txt").write_text('"postgres" ""\n')
    (folder / "pgbouncer.ini").write_text(
        f"[databases]\n* = host={given['host']}\n[pgbouncer]\nlisten_port = 6432\nunix_socket_dir = {folder}\n"
        f"auth_type = trust\nauth_file = {folder}/users.txt\npool_mode = {request.param}\n"
        f"default_pool_size = {POOL_SIZE}\nlogfile = {folder}/log\n" + (f"user = {owner.pw_name}\n" if owner else "")
    )
    if owner is not None:
        for path in (folder, *folder.iterdir()):
            os.chown(path, owner.pw_uid, owner.pw_gid)
    process = subprocess.Popen([str(PROGRAM), "-q", str(folder / "pgbouncer.ini")])
    url = f"postgresql:///{given['dbname']}?host={folder}&port=6432&user=postgres"

    def answers() -> bool:
        assert process.poll() is None, (folder / "log").read_text()
        try:
            psycopg2.connect(url).close()
        except psycopg2.OperationalError:
            return False
        return True

    try:
        until(answers, "pgbouncer to accept connections")
        yield url
    finally:
        process.terminate()
        process.wait(10)
        shutil.rmtree(folder)


@pytest.mark.parametrize("through", ["transaction", "statement"], indirect=True)
def test_modes_that_lend_sessions_out_are_refused(through: str, tmp_path: Path) -> None:
    """Under transaction or statement pooling every process fails at start and names the remedy."""
    database = Database(through, "test")
    for _ in range(5):
        with pytest.raises(DatabaseUnfitError, match="use pool_mode=session"):
            database.call(check_schema)
    database.close()
    assert "pool_mode=session" in doctor.judge(doctor.probe(through), "DATABASE_URL").fix
    stack = Stack(through, tmp_path, free_port(), [])
    try:
        for server in (stack.gateway(), stack.worker()):
            until(lambda server=server: server.process.poll() is not None, "the process to end")  # type: ignore[misc]
            assert server.process.returncode == 1
            assert "use pool_mode=session" in str(server.events("start_failed")[0]["cause"])
    finally:
        stack.end()


@pytest.mark.parametrize("through", ["session"], indirect=True)
def test_session_pooling_works(through: str, tmp_path: Path) -> None:
    """Under session pooling a batch runs, statement deadlines apply, and a killed worker's identity is released."""
    stack = Stack(through, tmp_path, free_port(), [])
    try:
        stack.gateway()
        first = stack.worker()
        stack.wait_until_accepting()
        with Client(stack.target) as client:
            batch = client.submit_lines(lines(200))
            assert finished(client, batch.id).counts.completed == 200
        database = Database(through, "test", 7)
        assert database.call(lambda db: db.execute_sql("SHOW statement_timeout").fetchone()) == ("7s",)
        database.close()
        # Once killed, it loses its identity, and its next life gets it.
        first.kill()
        first.start()
        stack.wait_until_accepting()
        until(lambda: len(first.events("identity_locked")) == 2, "the next life to lock the identity")
    finally:
        stack.end()
