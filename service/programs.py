"""What the command lines of the programs have in common, and the life of one that serves."""

import argparse
import asyncio
import os
import sys
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, NoReturn

import structlog

from service import config, processes
from service.announce import AddressError
from service.config import Settings
from service.db.availability import DatabaseUnfitError
from service.telemetry import logs, tracing


def parser(module: str, description: str, epilog: str) -> argparse.ArgumentParser:
    """The command line of `python -m MODULE`, whose help ends with `epilog` as it is written."""
    return argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def read_settings(arguments: Sequence[str], made: argparse.ArgumentParser) -> Settings | None:
    """The settings of a program whose only option is --check; None if they were to be checked, and are valid.

    Ends the process with status 2 if they are not.
    """
    made.add_argument("--check", action="store_true", help="check the settings and exit: 0 if valid, 2 if not")
    options = made.parse_args(arguments)
    settings = config.load(is_check=options.check)
    return None if options.check else settings


def run(name: str, settings: Settings, serve: Callable[[Settings], Coroutine[Any, Any, int]]) -> NoReturn:
    """Serves until the end, and ends the process with the status that `serve` returns, or 1 if it fails."""
    log = logs.get(name)
    processes.die_with_parent()
    processes.allow_many_files()
    logs.configure(name, settings.log_level)
    tracing.configure(name, settings.otlp_endpoint)
    # Not closed: that would wait for the threads below.
    try:
        status = asyncio.Runner().run(serve(settings))
    except Exception as error:
        log.exception("program_failed", cause=repr(error))
        status = 1
    tracing.close()
    sys.stderr.flush()
    # A statement that still waits for its deadline, or a call in a thread, must not hold up the end.
    os._exit(status)


def has_failed(task: "asyncio.Task[Any]", log: structlog.typing.FilteringBoundLogger) -> bool:
    """True for a task that is over, with its end in the log: for tasks that never end by themselves."""
    if not task.done():
        return False
    error = None if task.cancelled() else task.exception()
    if isinstance(error, DatabaseUnfitError | AddressError):
        log.error("start_failed", cause=str(error))
    else:
        log.error("task_failed", task=task.get_name(), cause=repr(error), exc_info=error)
    return True
