"""deploy/Containerfile carried out in a folder, and its entry point run there: no container engine is needed.

    THOROUGH=1 scripts/test.sh -s tests/fresh/test_container.py        # about 10 minutes; needs 10 GB

Needs root, debootstrap and the registries.
"""

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import mkdtemp

import psutil
import pytest

from tests.fresh import images
from tests.fresh.images import Image
from tests.fresh.roots import Root
from tests.support.batches import finished, lines
from tests.support.ports import free_ports
from tests.support.servers import PostgresServer
from tests.support.waiting import until
from vllm_batch import Client

pytestmark = [
    pytest.mark.thorough,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for chroot and mounts"),
    pytest.mark.skipif(shutil.which("debootstrap") is None, reason="needs debootstrap"),
]
# A user without a name, in group 0.
SOMEBODY = "23456:0"
PROGRAMS = ("GATEWAY", "WORKER", "WATCHDOG", "HTTP")


@dataclass
class Built:
    """An image, and a Postgres for its containers."""

    root: Root
    image: Image
    postgres: PostgresServer
    folder: Path
    volumes: int = 0

    def volume(self) -> Path:
        """A volume of root's that its group may write to."""
        self.volumes += 1
        home = self.folder / f"volume{self.volumes}"
        home.mkdir()
        home.chmod(0o770)
        return home


@dataclass
class Container:
    """A running one."""

    process: "subprocess.Popen[str]"
    target: str
    home: Path | None
    said: list[str] = field(default_factory=list)

    def first(self) -> psutil.Process:
        """Its process 1."""
        return psutil.Process(self.process.pid).children()[0]


@pytest.fixture(scope="module")
def built() -> Iterator[Built]:
    """The image, made once."""
    folder = Path(mkdtemp(prefix="vllm-batch-image-", dir="/var/tmp"))
    folder.chmod(0o755)
    root = Root(folder / "root")
    server = PostgresServer(folder / "pg")
    try:
        root.install("bookworm", "ca-certificates")
        image = images.build(root, ENGINE="cpu")
        server.start()
        # The container's user is not ours.
        sockets = folder / "pg/run/pg"
        sockets.chmod(0o711)
        (sockets / ".s.PGSQL.5432").chmod(0o777)
        yield Built(root, image, server, folder)
    finally:
        server.stop()
        root.remove()


@contextmanager
def running(built: Built, home: Path | None, **environment: str) -> Iterator[Container]:
    """A container that is killed at the end."""
    first = free_ports()
    given = {f"BATCH_{name}_PORT": str(first + index) for index, name in enumerate(PROGRAMS)}
    given |= {f"BATCH_{name}_METRICS_PORT": "0" for name in PROGRAMS}
    process = images.start(
        *(built.root, built.image, home, given | environment), user=SOMEBODY, shm="64m", shared=built.folder / "pg"
    )
    try:
        yield Container(process, f"127.0.0.1:{first}", home)
    finally:
        # unshare takes all processes along.
        process.kill()
        process.wait(60)


def test_works_without_a_name_and_reaps(built: Built) -> None:
    """As a nameless user, with a read-only root and 64 MB of shared memory, it runs a batch, reaps and stops."""
    url = built.postgres.url % "batch"
    with running(built, built.volume(), DATABASE_URL=url) as container, Client(container.target) as client:
        until(lambda: not client.accepting(), "new work to be accepted", 300)
        assert container.first().uids().real == int(SOMEBODY.split(":")[0])
        assert finished(client, client.submit_lines(lines(5)).id).counts.completed == 5
        orphan = ["nsenter", "--target", str(container.first().pid), "--pid", "--mount", "bash", "-c", "(sleep 0.1 &)"]
        subprocess.run(orphan, check=True, timeout=30)
        first = container.first()
        until(lambda: all(one.status() != psutil.STATUS_ZOMBIE for one in first.children()), "zombies to be reaped", 30)
        first.send_signal(signal.SIGTERM)
        assert container.process.wait(150) == 0


@pytest.mark.parametrize(
    ("has_volume", "message"), [(False, "must be writable for uid 23456"), (True, "set DATABASE_URL")]
)
def test_says_what_is_missing(built: Built, has_volume: bool, message: str) -> None:
    """Without a volume, or without a Postgres for a nameless user, it ends at once and says what to do."""
    with running(built, built.volume() if has_volume else None) as container:
        said, _ = container.process.communicate(timeout=60)
        assert message in said
        assert container.process.returncode == 1


def test_shared_memory_too_small(built: Built) -> None:
    """A real model needs more than 64 MB of shared memory: the cause of the failed start says so."""
    home = built.volume()
    model = "/var/lib/vllm-batch/models/tiny"
    url = built.postgres.url % "batch"
    with running(built, home, DATABASE_URL=url):
        until((home / "models/tiny/model.safetensors").exists, "the tiny model to be made", 300)
    given = {"BATCH_MODEL": model, "BATCH_ENGINE_ARGS": "--enforce-eager", "VLLM_CPU_KVCACHE_SPACE": "1"}
    with running(built, home, DATABASE_URL=url, **given):
        log = home / "log/worker.log"
        until(lambda: "start_failed" in log.read_text(), "the failed start", 300)
        assert "/dev/shm" in log.read_text()
