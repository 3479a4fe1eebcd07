"""Keeps evidence of a worker before it is restarted: a folder under `BATCH_HOME/crash`, for people to read."""

import json
import shutil
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil

from service import processes
from service.processes import Mark
from service.telemetry import logs
from watchdog.act import commands

KEPT_FOLDERS = 20
LOG_TAIL_BYTES = 256 << 10
# For everything together: a worker waiting for its restart serves nobody.
TIMEOUT_S = 10.0
# Of it, for writing what there is.
WRITE_S = 1.0

log = logs.get("evidence")


def keep(
    home: Path,
    mark: Mark,
    now: datetime,
    event: str,
    told: Mapping[str, Any],
    heartbeat: Mapping[str, Any] | None,
    log_files: Sequence[Path],
) -> Path | None:
    """Writes the folder and returns it; None if it cannot be created, or not in time. Returns after TIMEOUT_S.

    A part that fails, or hangs, contains its error instead. `event` is the restart's event id, or its key while it has
    none; `told` its content; `heartbeat` the worker's row as last read. Covers the processes with `mark`. py-spy dumps
    their stacks from outside, so it works on frozen processes.
    """
    folder = home / "crash" / f"{now:%Y%m%dT%H%M%SZ}-event-{event}"
    kept: list[Path | None] = []

    def run() -> None:
        try:
            kept.append(_write(folder, mark, told, heartbeat, log_files))
        except Exception:
            # A restart needs no evidence.
            log.exception("evidence_not_kept")
            kept.append(None)

    # Disks and processes may hang the thread that reads them, and no deadline ends that.
    thread = threading.Thread(target=run, name="evidence", daemon=True)
    thread.start()
    thread.join(TIMEOUT_S)
    if not kept:
        log.warning("evidence_not_kept", cause=f"not done within {TIMEOUT_S:g} s")
        return None
    return kept[0]


def _write(
    folder: Path, mark: Mark, told: Mapping[str, Any], heartbeat: Mapping[str, Any] | None, log_files: Sequence[Path]
) -> Path | None:
    try:
        # Not with parents=True, which makes the parent accessible to others.
        folder.parent.mkdir(mode=0o700, exist_ok=True)
        folder.mkdir(mode=0o700)
    except OSError as error:
        log.warning("evidence_not_kept", cause=str(error))
        return None
    deadline_s = time.monotonic() + TIMEOUT_S - WRITE_S
    parts: dict[str, Callable[[], str]] = {
        "event.json": lambda: json.dumps(told, indent=2, default=str),
        "heartbeat.json": lambda: json.dumps(heartbeat, indent=2, default=str),
        "memory.txt": _memory,
        "gpu.txt": lambda: _output(["nvidia-smi"], deadline_s) if shutil.which("nvidia-smi") else "",
    }
    for log_file in log_files:
        parts[log_file.name] = lambda file=log_file: _tail(file)  # type: ignore[misc]
    found = processes.marked(mark)
    parts["processes.txt"] = lambda: "".join(_safely(lambda each=each: _describe(each)) for each in found)  # type: ignore[misc]
    for process in found:
        parts[f"stack-{process.pid}.txt"] = lambda pid=process.pid: _stack(pid, deadline_s)  # type: ignore[misc]
    # In parallel: each stack takes a good part of a second.
    threads = ThreadPoolExecutor(4)
    futures = {name: threads.submit(_safely, part) for name, part in parts.items()}
    wait(futures.values(), deadline_s - time.monotonic())
    threads.shutdown(wait=False, cancel_futures=True)
    for name, future in futures.items():
        if text := _text(future):
            with suppress(OSError):
                (folder / name).write_text(text)
    prune(folder)
    log.info("evidence_kept", folder=str(folder), processes=[process.pid for process in found])
    return folder


def prune(latest: Path, kept: int = KEPT_FOLDERS) -> None:
    """Keeps the folder `latest`, whatever its date (the clock may have been set back), and the newest of the others.

    Removes the rest, so that `kept` are left.
    """
    others = sorted(folder for folder in latest.parent.glob("*-event-*") if folder != latest)
    for folder in others[: max(0, len(others) + 1 - kept)]:
        shutil.rmtree(folder, ignore_errors=True)


def _safely(part: Callable[[], str]) -> str:
    try:
        return part()
    except Exception as error:  # noqa: BLE001 - partial evidence is still worth keeping
        return f"{type(error).__name__}: {error}\n"


def _text(future: "Future[str]") -> str:
    return future.result() if future.done() and not future.cancelled() else "not read in time\n"


def _tail(file: Path) -> str:
    with file.open("rb") as given:
        given.seek(max(0, file.stat().st_size - LOG_TAIL_BYTES))
        return given.read().decode(errors="replace")


def _memory() -> str:
    lines = [str(psutil.virtual_memory()), str(psutil.swap_memory()), f"/dev/shm {psutil.disk_usage('/dev/shm')}"]
    return "\n".join(lines) + "\n"


def _describe(process: psutil.Process) -> str:
    with process.oneshot():
        return (
            f"{process.pid} parent {process.ppid()} {process.status()} rss {process.memory_info().rss >> 20} MB"
            f" threads {process.num_threads()} {process.cpu_times()} {' '.join(processes.command(process))[:200]}\n"
        )


def _stack(pid: int, deadline_s: float) -> str:
    # py-spy is beside our Python, which need not be on PATH. Nonblocking: the process may be stopped already.
    return _output(
        [str(Path(sys.executable).with_name("py-spy")), "dump", "--nonblocking", "--pid", str(pid)], deadline_s
    )


def _output(command: list[str], deadline_s: float) -> str:
    done = commands.output(command, max(0.5, deadline_s - time.monotonic()))
    return done.stdout or done.stderr
