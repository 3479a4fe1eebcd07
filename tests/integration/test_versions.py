"""Versions on one database: contractions wait for old programs, old programs are refused, two releases work at once."""

import json
import os
import shutil
import signal
import subprocess
import sys
import venv
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from openai import OpenAI

from service.db import schema, server_beats
from service.db.availability import DatabaseAwayError, DatabaseUnfitError
from service.db.connection import Database
from tests.support.batches import count, finished, health, lines, run_sql
from tests.support.fleet import Fleet, Host, fleet
from tests.support.namespaces import own_name
from tests.support.ports import free_port
from tests.support.servers import ROOT, Server, Stack, new_database
from tests.support.waiting import until
from vllm_batch import Client

# None is tagged yet: a commit before the migrations 0027 and 0028. To be renewed with each release.
LAST_RELEASE = "dcbd10bd84f9f7ce7e91740030233087fc7c9a64"
REQUESTS = 3000
QUICK = {"heartbeat_interval_s": 1, "simulated_request_s": 0.1, "simulated_window": 8, "window": 8}
AUDIT = "SELECT kind, verdict FROM recovery_events WHERE kind <> 'verdict'"
UP = """

def up(migrator, db):
    db.execute_sql("{sql}")
"""


def newer(folder: Path, name: str, sql: str, needs: int | None = None) -> None:
    """Adds a migration to the ones that there are."""
    (folder / f"{name}.py").write_text(("" if needs is None else f"NEEDS = {needs}\n") + UP.format(sql=sql))


def columns(database: Database) -> set[str]:
    rows = database.call(
        lambda db: db.execute_sql(
            "SELECT column_name FROM information_schema.columns WHERE table_name = 'servers'"
        ).fetchall()
    )
    return {name for (name,) in rows}


def test_a_contraction_waits_for_old_programs_and_then_refuses_them(database: Database, tmp_path: Path) -> None:
    """Expansions are applied at once, also those after a contraction that waits; the contraction once no older program
    is alive, and then those cannot start."""
    mine, last = tmp_path / "migrations", schema.known()
    shutil.copytree(schema.MIGRATIONS, mine)
    database.call(server_beats.write, "old:gateway", "gateway", "a:1", 1)
    newer(mine, f"{last + 1:04}_more", "ALTER TABLE servers ADD COLUMN more int")
    newer(mine, f"{last + 2:04}_less", "ALTER TABLE servers DROP COLUMN address", last + 1)
    newer(mine, f"{last + 3:04}_most", "ALTER TABLE servers ADD COLUMN most int")
    with pytest.raises(DatabaseAwayError, match="_more is pending"):
        database.call(schema.check, mine)
    assert database.call(schema.migrate, mine) == [f"{last + 1:04}_more", f"{last + 3:04}_most"]
    # What expands is enough to work with, and what knows less still works.
    database.call(schema.check, mine)
    database.call(schema.check)
    assert database.call(schema.migrate) == []
    assert "address" in columns(database)
    database.call(server_beats.end, "old:gateway", "a:1", 1)
    assert database.call(schema.migrate, mine) == [f"{last + 2:04}_less"]
    assert "address" not in columns(database)
    database.call(schema.check, mine)
    for refused in (schema.check, schema.migrate):
        with pytest.raises(DatabaseUnfitError, match=f"{schema.VERSION} is too old .* needs version {last + 1} of it"):
            database.call(refused)


def test_a_program_that_is_too_old_says_so(stack: Stack) -> None:
    """Gateway and worker end when the schema is contracted, and refuse to start again; both say why and what to do."""
    started = [stack.gateway(), stack.worker()]
    stack.wait_until_accepting()
    run_sql(stack, f"UPDATE schema_floor SET oldest = {schema.known() + 1}")
    for server in started:
        until(lambda: server.process.poll() is not None, "it to end")  # noqa: B023
        server.start()
        until(lambda: server.process.poll() is not None, "it to end again")  # noqa: B023
        told = [event for event in server.events("start_failed") if "is too old for this database" in str(event)]
        assert len(told) == 2, server.log.read_text()[-2000:]
        assert all("upgrade this host" in str(event["cause"]) for event in told)


def test_a_schema_in_the_middle_of_a_restore_is_away(database: Database) -> None:
    """While a restore has made the tables and not filled them yet, Postgres is away, for programs that run or start."""
    database.call(lambda db: db.execute_sql("DELETE FROM schema_floor"))
    for refused in (schema.check, schema.migrate, schema.check_version):
        with pytest.raises(DatabaseAwayError, match="is being restored") as caught:
            database.call(refused)
        assert not isinstance(caught.value, DatabaseUnfitError)


def take_out(commit: str, folder: Path, *paths: str) -> None:
    """Writes these paths as they are in the commit; skips the test if that is not here."""
    try:
        git("rev-parse", "--verify", f"{commit}^{{commit}}")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip(f"the commit {commit} is not here, as in a shallow clone")
    command = ["git", "archive", commit, *paths]
    archive = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=60, check=True)
    subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, timeout=60, check=True)


def git(*arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    ).stdout.strip()


@pytest.fixture(scope="module")
def last_release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout of the last release, set up without a download: its libraries are those of this one."""
    folder = tmp_path_factory.mktemp("last")
    take_out(LAST_RELEASE, folder, "service", "watchdog", "client", "scripts", "conf", "setup.cfg")
    (folder / "scripts" / "setup.sh").write_text("#!/bin/sh\n")
    venv.create(folder / ".venv", symlinks=True)
    [packages] = (folder / ".venv").glob("lib/python*/site-packages")
    libraries = [entry for entry in sys.path if entry.endswith("site-packages")]
    (packages / "these.pth").write_text("\n".join([str(folder / "client"), *libraries]))
    return folder


def upgrade(host: Host, root: Path) -> None:
    """As docs/fleet.md has it, without draining."""
    assert host.full is not None
    stopped = host.full.script("stop-all.sh")
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    host.supervised(root)


def kill_workers(all_hosts: Fleet) -> None:
    """Waits until the watchdogs have healed them."""
    for host in all_hosts.hosts:
        os.kill(host.worker_pid, signal.SIGKILL)
    for host in all_hosts.hosts:
        assert host.full is not None
        until(lambda: host.full.recovered(len(all_hosts.hosts)), "the workers to be back")  # noqa: B023


def use(all_hosts: Fleet) -> None:
    """Each host runs a batch that another has accepted, and OpenAI's door of each shows it."""
    for one, other in (all_hosts.hosts, reversed(all_hosts.hosts)):
        with one.client(patience_s=60) as before, other.client(patience_s=60) as now:
            batch = before.submit_lines(lines(20))
            assert now.wait(batch.id).counts.completed == 20
            assert len({result.custom_id for result in now.results(batch.id)}) == 20
        assert other.full is not None
        with OpenAI(
            base_url=f"http://{other.address}:{other.full.http_port}/v1", api_key="none", max_retries=9
        ) as client:
            assert client.batches.retrieve(batch.id).status == "completed"


def notes(asked: Host, about: Host) -> str:
    with asked.client(patience_s=60) as client:
        return " ".join(note for host in client.hosts(about.name) for note in host.notes)


def complaints(host: Host) -> list[str]:
    """What a log of the host should not have: errors and tracebacks."""
    found = []
    for log in (host.home / "log").glob("*.log"):
        for said in log.read_text().splitlines():
            event = json.loads(said) if said.startswith("{") else {}
            if "Traceback" in said or event.get("level") in ("error", "critical"):
                found.append(f"{host.name}, {log.name}: {said}")
    return found


@pytest.mark.thorough
@pytest.mark.timeout(300)
def test_whole_hosts_are_upgraded_and_returned(last_release: Path) -> None:
    """Whole hosts of the last release are upgraded one by one while clients use both, and one returns to the release:
    each request has one result, and nothing is restarted that was not killed.
    """
    with fleet(2) as made, ThreadPoolExecutor() as pool:
        a, b = made.hosts
        for started in [pool.submit(host.supervised, last_release, **QUICK) for host in made.hosts]:
            started.result()
        made.wait_until_accepting()
        with b.client(patience_s=60) as client:
            long = client.submit_lines(lines(REQUESTS)).id
            streamed = pool.submit(lambda: [result.custom_id for result in client.results(long, follow=True)])
            upgrade(a, ROOT)
            assert "older than this server" in notes(a, b)
            assert "newer than this server" in notes(b, a)
            use(made)
            kill_workers(made)
            upgrade(b, ROOT)
            upgrade(a, last_release)
            use(made)
            assert client.wait(long).counts.completed == REQUESTS
            assert streamed.result(60) == [f"c{number}" for number in range(REQUESTS)]
        kinds = Counter((kind, verdict) for kind, verdict in made.sql(AUDIT))
        assert kinds == {("restart", "CRASHED"): 2}
        assert [line for host in made.hosts for line in complaints(host)] == []


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The code of before the newest release's migrations: the last commit whose programs did not report a version."""
    try:
        first = git("log", "--diff-filter=A", "--format=%H", "--", "service/db/schema.py").splitlines()[-1]
    except (OSError, subprocess.CalledProcessError, IndexError):
        pytest.skip("the history of the earlier version is not here, as in a shallow clone")
    folder = tmp_path_factory.mktemp("release")
    take_out(f"{first}^", folder, "service", "watchdog", "client")
    return folder


class Earlier(Stack):
    """A stack that runs the code of another folder."""

    root: Path

    def run(self, module: str, name: str, **settings: object) -> Server:
        """Starts a process of that code."""
        started = Server.start
        root = self.root

        def start(server: Server) -> "subprocess.Popen[bytes]":
            with server.log.open("ab") as log:
                # It has no HTTP door, and takes its settings for misspelled ones.
                known = {name: value for name, value in server._env.items() if not name.startswith("BATCH_HTTP_")}
                env = known | {"PYTHONPATH": f"{root / 'client'}:{root}"}
                server.process = subprocess.Popen(server._arguments, env=env, cwd=root, stdout=log, stderr=log)
            return server.process

        Server.start = start  # type: ignore[method-assign]
        try:
            return super().run(module, name, **settings)
        finally:
            Server.start = started  # type: ignore[method-assign]


@pytest.fixture
def two(release: Path, postgres: str, tmp_path: Path) -> Iterator[tuple[Earlier, Stack]]:
    """Stacks of the earlier version and of this one on one empty database, each on a host of its own."""
    with new_database(postgres, "template1") as url:
        stacks = []
        for kind, name in ((Earlier, "before"), (Stack, "now")):
            (tmp_path / name).mkdir()
            stacks.append(kind(url, tmp_path / name, free_port(), []))
        old, new = stacks
        assert isinstance(old, Earlier)
        old.root = release
        try:
            yield old, new
        finally:
            for stack in stacks:
                stack.end()


def test_two_versions_work_on_one_database(two: tuple[Earlier, Stack]) -> None:
    """Hosts of the earlier release and of this one share queue and batches while one is replaced by the other."""
    old, new = two
    with own_name("before"):
        old.gateway()
        old.worker("worker-old", window=8, simulated_window=8)
    until(lambda: is_serving(old), "the earlier version to accept new work")
    assert count(old, "pg_tables WHERE tablename = 'servers'") == 0
    with Client(old.target) as before, Client(new.target) as now:
        first = before.submit_lines(lines(1500, vllm_xargs={"simulate": 0.1}))
        with own_name("after"):
            new.gateway()
            new.worker("worker-new", window=8, simulated_window=8)
        new.wait_until_accepting()
        second = now.submit_lines(lines(50))
        for client in (before, now):
            assert finished(client, second.id).counts.completed == 50
        assert is_serving(old)
        assert not now.accepting()
        until(lambda: workers_of(new) == {"before:worker-old", "after:worker-new"}, "both to have leases")
        hosts = {host.name: host for host in now.hosts()}
        assert "older than this server" in " ".join(hosts["before"].notes)
        assert not hosts["after"].notes or "older" not in " ".join(hosts["after"].notes)
        # The old host is upgraded: what it held goes on elsewhere.
        third = before.submit_lines(lines(50))
        for server in reversed(old.servers):
            assert server.terminate() == 0
        assert finished(now, first.id).counts.completed == 1500
        assert finished(now, third.id).counts.completed == 50
        assert len({result.custom_id for result in now.results(first.id)}) == 1500
    assert count(new, "(SELECT DISTINCT incarnation FROM results) AS incarnations") == 2
    assert count(new, "chunks WHERE deaths > 0") == 0


def is_serving(stack: Stack) -> bool:
    """True if the gateway's health says so: the earlier version cannot say what it accepts."""
    try:
        return health(stack.target, "vllm_batch.v1.BatchService") == "SERVING"
    except grpc.RpcError:
        return False


def workers_of(stack: Stack) -> set[str]:
    database = Database(stack.database_url, "test")
    try:
        rows = database.call(
            lambda db: db.execute_sql("SELECT DISTINCT worker_id FROM chunks WHERE state = 'leased'").fetchall()
        )
    finally:
        database.close()
    return {name for (name,) in rows}
