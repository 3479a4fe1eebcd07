"""Collects the errors of the engine's own processes; vLLM's front end only learns "see root cause above".

vLLM spawns its processes, and each first imports `spawned.py` (see `service/worker/__main__.py`). There `install()`
wraps the log record factory and the functions through which an exception leaves a process. That catches every warning
and exception under any logging configuration (VLLM_LOGGING_CONFIG_PATH, --log-config-file, VLLM_CONFIGURE_LOGGING=0),
and changes none of it. The alternative, a handler of ours in VLLM_LOGGING_CONFIG_PATH, would replace the user's, and
vLLM refuses to start where the file or the handler's module is missing, as in Ray actors on another host.

Messages go into the worker's anonymous memory (memfd), which its descendants open as `/proc/PID/fd/N`. Writes to it
never wait for a disk, work when the disk is full, and leave nothing behind. Its size is bounded, nothing below WARNING
is written, and failed writes are ignored.

Ray actors and processes that C++ code ends write nothing: then the front end's exception and exit codes must do.
"""

import asyncio
import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterable
from multiprocessing.process import BaseProcess, current_process
from types import TracebackType
from typing import Any

from service.worker.engine import cause
from service.worker.engine.cause import Cause, Failure, Note

# Path that the engine's processes write to; they inherit it.
VARIABLE = "BATCH_FAILURE_LOG"
MAX_BYTES = 1 << 20
MAX_TEXT = 4000
MAX_CHAIN = 6
# How long to wait for the cause after a failed start, and after the engine died.
START_TIMEOUT_S = 5.0
DEATH_TIMEOUT_S = 1.0
POLL_S = 0.05

# What this process writes to; None: no ancestor collects failures.
_out: int | None = None
# Kept because multiprocessing forgets a process once it has been joined.
_started: list[BaseProcess] = []


def install() -> None:
    """Makes this process report its failures, if an ancestor collects them. Call before anything logs."""
    global _out
    path, is_first = os.environ.get(VARIABLE), _out is None
    if path is None:
        return
    try:
        # Kept open: once the worker is gone, the path may lead to another process's file.
        _out = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
    except OSError:
        return
    if is_first:
        _wrap_log_records()
        _wrap_ends()


def _wrap_log_records() -> None:
    make_record = logging.getLogRecordFactory()

    def make_and_note(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make_record(*args, **kwargs)
        # logging.makeLogRecord creates records without a level.
        if (record.levelno or 0) >= logging.WARNING:
            with contextlib.suppress(Exception):
                raised = record.exc_info[1] if record.exc_info else None
                _write(record.levelno, record.getMessage(), raised)
        return record

    logging.setLogRecordFactory(make_and_note)


def _wrap_ends() -> None:
    """Reports exceptions that end this process, and remembers the processes that it starts."""
    hook, run, start = sys.excepthook, BaseProcess.run, BaseProcess.start

    def note_and_print(kind: type[BaseException], raised: BaseException, trace: TracebackType | None) -> None:
        _write(logging.CRITICAL, "uncaught exception", raised)
        hook(kind, raised, trace)

    def run_and_note(process: BaseProcess) -> None:
        try:
            run(process)
        except Exception as error:
            _write(logging.CRITICAL, "uncaught exception", error)
            raise

    def start_and_remember(process: BaseProcess) -> None:
        start(process)
        _started.append(process)

    sys.excepthook = note_and_print
    BaseProcess.run = run_and_note  # type: ignore[method-assign, assignment]
    BaseProcess.start = start_and_remember  # type: ignore[method-assign, assignment]


def chain(raised: BaseException | None) -> tuple[Failure, ...]:
    """Returns an exception and its causes, outermost first."""
    found: list[Failure] = []
    while raised is not None and len(found) < MAX_CHAIN:
        found.append(Failure(type(raised).__name__, _shorten(str(raised))))
        raised = raised.__cause__ or (None if raised.__suppress_context__ else raised.__context__)
    return tuple(found)


def exit_codes() -> dict[str, int]:
    """Returns exit codes of the processes that this one started, by name; -N if signal N killed it."""
    codes = {}
    for process in _started:
        with contextlib.suppress(ValueError):  # closed
            if process.exitcode is not None:
                codes[process.name] = process.exitcode
    return codes


class FailureLog:
    """The failures that engine processes have reported. Make it before they start."""

    def __init__(self, model: str = "", gpu_holders: Callable[[], str] = lambda: "") -> None:
        """`model` is named in causes that concern it; `gpu_holders` tells who holds GPU memory when it ran out."""
        self._model = model
        self._gpu_holders = gpu_holders
        # Never closed: engine processes may write as long as they live.
        self._file = os.memfd_create("batch-failures")
        os.environ[VARIABLE] = f"/proc/{os.getpid()}/fd/{self._file}"
        install()

    def notes(self) -> list[Note]:
        """Returns all notes in the order in which they were written."""
        return [note for line in os.pread(self._file, 2 * MAX_BYTES, 0).splitlines() if (note := _note(line))]

    def clear(self) -> None:
        """Discards all notes so far."""
        os.ftruncate(self._file, 0)

    async def explain(self, raised: BaseException | None = None, timeout_s: float = START_TIMEOUT_S) -> Cause:
        """Returns why the engine failed; `raised` is the front end's exception if it failed to start.

        Waits up to `timeout_s` for messages or exit codes of the engine's processes.
        """
        failures = chain(raised)
        deadline_s = time.monotonic() + timeout_s
        while True:
            known = cause.root(self.notes(), failures, exit_codes())
            if known is not None or time.monotonic() > deadline_s:
                return cause.explain(known or failures, self.notes(), self._model, self._gpu_holders)
            await asyncio.sleep(POLL_S)


def _write(level: int, message: str, raised: BaseException | None) -> None:
    """Appends a line. Never fails or blocks."""
    with contextlib.suppress(Exception):
        line = {
            "pid": os.getpid(),
            "process": current_process().name,
            "level": level,
            "message": _shorten(message),
            "failures": [[failure.type, failure.text] for failure in chain(raised)],
            "exit_codes": exit_codes() if level >= logging.ERROR else {},
        }
        assert _out is not None
        if os.fstat(_out).st_size > MAX_BYTES:
            os.ftruncate(_out, 0)
        os.write(_out, json.dumps(line).encode() + b"\n")


def _note(line: bytes) -> Note | None:
    """Parses a line; None for one that was truncated."""
    try:
        fields = json.loads(line)
    except ValueError:
        return None
    failures: Iterable[list[str]] = fields.pop("failures")
    return Note(**fields, failures=tuple(Failure(*failure) for failure in failures))


def _shorten(text: str) -> str:
    """Cuts the middle out of a long text: a compiler error begins with a long command and ends with what matters."""
    half = MAX_TEXT // 2
    return text if len(text) <= MAX_TEXT else f"{text[:half]} ... {text[-half:]}"
