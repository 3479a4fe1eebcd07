"""Checks what a stack needs from this host: settings, ports, home, open files, clock, supervisord."""

import ctypes
import errno
import os
import pwd
import resource
import shutil
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import psutil

from scripts import prerequisites
from scripts.prerequisites import ROOT, Finding, GiB, MiB
from scripts.settings import supervisord_conf
from service import config
from service.config import Settings
from service.embedded_postgres import binaries
from service.processes import Mark, marked, supervisords

# Minimum for a fair-sized batch, the logs and Postgres's WAL.
HOME_BYTES = 2 * GiB
# For Postgres's shared memory segments, of which initdb needs one of 1 MiB.
POSTGRES_SHM_BYTES = 8 * MiB
# Each client is a connection, and each engine thread has a few files.
OPEN_FILES = 4096
# With less supervisord refuses to start.
SUPERVISORD_FILES = 1024
SUPERVISORCTL_TIMEOUT_S = 10.0
# How long the port of a process that is ending may still be taken.
ENDING_S = 5.0
# adjtimex(2)'s return value for an unsynchronized clock.
TIME_ERROR = 5
# This checkout is newer, so a clock that shows an earlier time is wrong.
BUILT = 1_767_225_600


@dataclass(frozen=True)
class Port:
    """The current state of one of our ports. `error`: errno of an attempt to bind it, 0 if it worked."""

    setting: str
    number: int
    error: int = 0
    holder: str = ""
    is_ours: bool = False


@dataclass(frozen=True)
class Folder:
    """The current state of a folder in the home."""

    path: Path
    owner: str
    mode: int
    is_writable: bool
    is_folder: bool = True
    is_read_only: bool = False
    # The target of a dangling link.
    link: str = ""


def load_settings() -> tuple[Settings | None, list[Finding]]:
    """Returns the settings (None if invalid) and the findings about them."""
    settings, judgement = config.examine()
    if settings is not None:
        judgement.wrong += config.wrong_hosts(settings)
        config.leave_out_libpq(settings)
    findings = [judge_settings(judgement.wrong)]
    if judgement.foreign:
        findings.append(
            Finding(
                "variables", problem="; ".join(judgement.foreign), is_blocking=False, fix="unset them, or leave them"
            )
        )
    return None if judgement.wrong else settings, findings


def judge_settings(wrong: Sequence[str]) -> Finding:
    """Lists all problems of the settings on one line."""
    if not wrong:
        return Finding("settings", "complete and consistent")
    return Finding("settings", problem="; ".join(wrong), fix="correct them in .env; conf/example.env lists them all")


def judge_ports(ports: Sequence[Port], host: str) -> Finding:
    """Checks that each port is free or used by this stack."""
    wrong = []
    for port in ports:
        if port.error == errno.EADDRINUSE and not port.is_ours:
            wrong.append(f"{port.setting}={port.number} is in use by {port.holder or 'another process'}")
        elif port.error == errno.EACCES:
            wrong.append(f"{port.setting}={port.number} is reserved for root")
        elif port.error == errno.EADDRNOTAVAIL:
            wrong.append(f"{host} is not an address of this machine")
        elif port.error and not port.is_ours:
            wrong.append(f"{port.setting}={port.number}: {os.strerror(port.error)}")
    if wrong:
        fix = "set other ports in .env, or stop what uses them"
        return Finding("ports", problem="; ".join(dict.fromkeys(wrong)), fix=fix)
    numbers = ", ".join(str(port.number) for port in ports)
    return Finding("ports", f"{numbers}: {'this stack' if any(port.is_ours for port in ports) else 'free'}")


def judge_programs(settings: Settings) -> Finding:
    """Checks that what this host runs makes sense by itself."""
    shown = settings.programs.replace(",", ", ")
    if "worker" in settings.runs and "watchdog" not in settings.runs:
        fix = "add watchdog to BATCH_PROGRAMS"
        return Finding("programs", problem=f"{shown}: nothing restarts the worker", fix=fix, is_blocking=False)
    return Finding("programs", shown)


def judge_home(folders: Sequence[Folder], user: str) -> Finding:
    """Checks that the home belongs to the current user and that its private folders are closed to others."""
    for folder in folders:
        if folder.link:
            problem = f"{folder.path} is a link to nothing ({folder.link})"
            return Finding("home", problem=problem, fix="make that folder, or set BATCH_HOME")
        if folder.owner != user:
            problem = f"{folder.path} belongs to {folder.owner}, but you are {user}"
            return Finding("home", problem=problem, fix=f"run this as {folder.owner}, or set BATCH_HOME")
        if not folder.is_folder:
            return Finding("home", problem=f"{folder.path} is not a folder", fix="move it away, or set BATCH_HOME")
        if folder.is_read_only:
            problem = f"{folder.path} is on a file system that is mounted read-only"
            return Finding("home", problem=problem, fix="set BATCH_HOME to a folder on another, or remount it")
        if not folder.is_writable:
            return Finding("home", problem=f"{folder.path} is not writable", fix=f"chmod u+rwx {folder.path}")
    for folder in folders[1:]:
        if folder.mode & 0o077:
            problem = f"{folder.path} is open to others (mode {folder.mode:04o})"
            return Finding("home", problem=problem, fix=f"chmod 0700 {folder.path}")
    return Finding("home", f"{folders[0].path}, owned by {user}")


def judge_env_file(path: Path, mode: int | None) -> Finding:
    """Checks that `.env`, which may contain passwords, is closed to others."""
    if mode is None:
        return Finding(".env", "none: defaults and environment variables apply")
    if mode & 0o077:
        problem = f"{path} is open to others (mode {mode:04o}) and may contain passwords"
        return Finding(".env", problem=problem, fix=f"chmod 600 {path}", is_blocking=False)
    return Finding(".env", str(path))


def judge_home_disk(free_bytes: int, folder: Path) -> Finding:
    """Checks disk space for batches, results and logs."""
    if free_bytes < HOME_BYTES:
        problem = f"{free_bytes / GiB:.1f} GiB free in {folder}; Postgres stops when the disk is full"
        return Finding("disk", problem=problem, fix=f"free some space (du -sh {folder}/*), or set BATCH_HOME")
    return Finding("disk", f"{free_bytes / GiB:.1f} GiB free in {folder}")


def judge_files(most: int) -> Finding:
    """Checks how many files a process may open: servers raise their soft limit to this hard limit."""
    if 0 <= most < OPEN_FILES:
        is_blocking = most < SUPERVISORD_FILES
        why = f"supervisord needs {SUPERVISORD_FILES}" if is_blocking else "further clients are refused"
        problem = f"a process may open {most} files; {why}"
        fix = "raise `nofile` in /etc/security/limits.conf (in the systemd unit: LimitNOFILE=65536)"
        return Finding("open files", problem=problem, fix=fix, is_blocking=is_blocking)
    return Finding("open files", "unlimited" if most < 0 else f"at most {most}")


def judge_clock(now_s: float, *, is_synchronized: bool) -> Finding:
    """Checks the clock: certificates, completion windows and the audit log depend on it, restarts do not."""
    shown = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now_s))
    if now_s < BUILT:
        return Finding("clock", problem=f"it shows {shown}", fix="timedatectl set-ntp true")
    if not is_synchronized:
        problem = f"{shown}, not synchronized (in a container, the host does that)"
        return Finding("clock", problem=problem, fix="timedatectl set-ntp true", is_blocking=False)
    return Finding("clock", f"{shown}, synchronized")


def judge_supervisord(
    installed: bool, states: Mapping[str, str] | None, socket_exists: bool, home: Path, pid: int = 0
) -> Finding:
    """Checks that supervisord is installed, answers if it runs (as `pid`), and none of its programs is FATAL."""
    if not installed:
        return Finding("supervisord", problem="not installed", fix="scripts/setup.sh")
    if states is None:
        if pid:
            # A second one beside it would start all programs a second time.
            why = "does not answer" if socket_exists else f"has lost its socket, {home / 'run' / 'supervisor.sock'}"
            return Finding("supervisord", problem=f"runs (pid {pid}) and {why}", fix="scripts/stop-all.sh")
        if socket_exists:
            return Finding("supervisord", "not running; the next start replaces the socket left by a crash")
        return Finding("supervisord", "not running")
    failed = sorted(name for name, state in states.items() if state == "FATAL")
    if failed:
        logs = ", ".join(str(home / "log" / f"{name}.log") for name in failed)
        return Finding("supervisord", problem=f"{', '.join(failed)} is FATAL", fix=f"tail -n 50 {logs}")
    return Finding("supervisord", ", ".join(f"{name} {state}" for name, state in states.items()))


def judge_embedded_postgres(
    error: str, is_root: bool, has_useradd: bool, *, has_account: bool = True, shm_bytes: int | None = None
) -> Finding:
    """Checks that the embedded Postgres can start. `shm_bytes` is free in /dev/shm; None: unknown."""
    if error:
        return Finding("postgres", problem=error, fix="scripts/setup.sh, or set DATABASE_URL")
    if is_root and not has_useradd:
        problem = "useradd is missing: as root, Postgres needs a user of its own"
        return Finding("postgres", problem=problem, packages=("passwd",))
    if not has_account:
        problem = f"user {os.geteuid()} is not in /etc/passwd, which Postgres requires"
        return Finding("postgres", problem=problem, fix="add the user, or set DATABASE_URL")
    if shm_bytes is not None and shm_bytes < POSTGRES_SHM_BYTES:
        problem = f"{shm_bytes // MiB} MiB free in /dev/shm; Postgres needs {POSTGRES_SHM_BYTES // MiB}"
        fix = "in a container, --shm-size=64m or more; else mount -o remount,size=64M /dev/shm (as root)"
        return Finding("postgres", problem=problem, fix=fix)
    return Finding("postgres", "embedded, starts with the stack")


def probe_ports(settings: Settings) -> list[Port]:
    """Tries to bind each port."""
    ours = {process.pid for process in marked(Mark(settings.home))}
    hosts = {"": settings.host, "_METRICS": settings.metrics_host}
    found = []
    for kind, host in hosts.items():
        for program in settings.programs.upper().split(","):
            number = getattr(settings, f"{program}{kind}_PORT".lower())
            if number:
                found.append(_probe_port(f"BATCH_{program}{kind}_PORT", host, number, ours))
    return found


def _probe_port(setting: str, host: str, number: int, ours: Set[int]) -> Port:
    begin_s = time.monotonic()
    while True:
        error = _bind(host, number)
        if not error:
            return Port(setting, number)
        pid = _listener(number)
        # A process that is ending, as after its supervisord was killed, still has the port, and is not found any more.
        if error != errno.EADDRINUSE or pid or time.monotonic() - begin_s > ENDING_S:
            return Port(setting, number, error, _describe(pid), pid in ours)
        time.sleep(0.1)


def _bind(host: str, number: int) -> int:
    """Binds a port, and lets it go. Returns the number of the error, 0 if there was none."""
    try:
        address = socket.getaddrinfo(host.strip("[]"), number, type=socket.SOCK_STREAM)[0]
        with socket.socket(address[0], socket.SOCK_STREAM) as one:
            # As the servers do, so that connections in TIME_WAIT do not matter.
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            one.bind(address[4])
        return 0
    except socket.gaierror:
        return errno.EADDRNOTAVAIL
    except OSError as error:
        return error.errno or errno.EIO


def _listener(port: int) -> int | None:
    try:
        connections = psutil.net_connections("tcp")
    except psutil.Error:
        return None
    found = (c.pid for c in connections if c.status == psutil.CONN_LISTEN and c.laddr and c.laddr.port == port)
    return next((pid for pid in found if pid), None)


def _describe(pid: int | None) -> str:
    try:
        return f"{psutil.Process(pid).name()} (pid {pid})" if pid else ""
    except psutil.Error:
        return f"pid {pid}"


def probe_home(home: Path) -> list[Folder]:
    """Returns the home, or the folder in which it will be created, and its private folders."""
    existing = next(folder for folder in (home, *home.parents) if folder.exists() or folder.is_symlink())
    private = [home / name for name in ("log", "recovery", "crash") if (home / name).is_dir()]
    return [_probe_folder(folder) for folder in (existing, *private)]


def _probe_folder(path: Path) -> Folder:
    if path.is_symlink() and not path.exists():
        return Folder(path, "", 0, is_writable=False, link=os.readlink(path))
    status = path.stat()
    try:
        owner = pwd.getpwuid(status.st_uid).pw_name
    except KeyError:
        owner = str(status.st_uid)
    is_read_only = bool(os.statvfs(path).f_flag & os.ST_RDONLY)
    is_writable = os.access(path, os.W_OK | os.X_OK)
    return Folder(path, owner, stat.S_IMODE(status.st_mode), is_writable, path.is_dir(), is_read_only)


def probe_mode(path: Path) -> int | None:
    """Returns a file's mode; None if there is no file."""
    try:
        return stat.S_IMODE(path.stat().st_mode) if path.is_file() else None
    except OSError:
        return None


def probe_clock() -> bool:
    """Returns True if the kernel considers the clock synchronized."""
    libc = ctypes.CDLL(None, use_errno=True)
    # Modes 0: a query. The structure is 208 bytes on 64-bit machines.
    answer = libc.adjtimex(ctypes.create_string_buffer(512))
    return bool(answer not in (-1, TIME_ERROR))


def probe_supervisord(home: Path) -> tuple[bool, dict[str, str] | None, bool, int]:
    """Returns whether it is installed, its programs' states, whether its socket exists, and a pid.

    States are None if it does not answer; the pid is that of one that runs all the same, 0 for none.
    """
    is_installed, states, has_socket = _ask_supervisord(home)
    pid = next((process.pid for process in supervisords(home)), 0) if is_installed and states is None else 0
    return is_installed, states, has_socket, pid


def _ask_supervisord(home: Path) -> tuple[bool, dict[str, str] | None, bool]:
    conf = supervisord_conf(home)
    has_socket = (home / "run" / "supervisor.sock").exists()
    if find_spec("supervisor") is None:
        return False, None, has_socket
    if not has_socket or not conf.exists():
        return True, None, has_socket
    try:
        done = subprocess.run(
            [sys.executable, "-m", "supervisor.supervisorctl", "-c", conf, "status"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=SUPERVISORCTL_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        return True, None, has_socket
    rows = [line.split()[:2] for line in done.stdout.splitlines()]
    states = {row[0]: row[1] for row in rows if len(row) == 2 and row[1].isupper()}
    return True, states or None, has_socket


def probe_embedded_postgres() -> str:
    """Returns why the embedded Postgres cannot start; "" if it can."""
    try:
        binaries()
    except (ImportError, FileNotFoundError) as error:
        return str(error)
    return ""


def quick(settings: Settings) -> list[Finding]:
    """Runs the checks of this file; all are fast."""
    env_file = config.ENV_FILE
    folders = probe_home(settings.home)
    installed, states, has_socket, pid = probe_supervisord(settings.home)
    findings = [
        judge_env_file(env_file, probe_mode(env_file)),
        judge_programs(settings),
        judge_home(folders, _user()),
        judge_home_disk(_free(folders[0]), folders[0].path),
        judge_ports(probe_ports(settings), settings.host),
        judge_files(resource.getrlimit(resource.RLIMIT_NOFILE)[1]),
        judge_clock(time.time(), is_synchronized=probe_clock()),
        judge_supervisord(installed, states, has_socket, settings.home, pid),
    ]
    if settings.database_url is None:
        error = probe_embedded_postgres()
        has_useradd = shutil.which("useradd") is not None or Path("/usr/sbin/useradd").exists()
        findings.append(
            judge_embedded_postgres(
                error,
                os.geteuid() == 0,
                has_useradd,
                has_account=_has_account(os.geteuid()),
                shm_bytes=prerequisites.probe_shm(),
            )
        )
    return findings


def _free(folder: Folder) -> int:
    return shutil.disk_usage(folder.path.parent if folder.link else folder.path).free


def _has_account(user: int) -> bool:
    try:
        pwd.getpwuid(user)
    except KeyError:
        return False
    return True


def _user() -> str:
    return psutil.Process().username()
