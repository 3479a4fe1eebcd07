"""Ways in which an engine process may fail, for tests of the failure log."""

import logging
import logging.config
import os
import signal
from multiprocessing import get_context


def raise_after_own_configuration() -> None:
    """Fails after configuring logging to discard everything."""
    logging.config.dictConfig({"version": 1, "disable_existing_loggers": True, "root": {"level": "CRITICAL"}})
    raise ValueError("no room")


def log_and_end() -> None:
    """Logs an exception and exits normally."""
    try:
        raise OSError(28, "No space left on device")
    except OSError:
        logging.getLogger("vllm").exception("WorkerProc failed to start.")


def be_killed() -> None:
    """Dies by SIGKILL, as when the kernel runs out of memory."""
    os.kill(os.getpid(), signal.SIGKILL)


def start_one_that_is_killed() -> None:
    """Fails because its child process was killed."""
    process = get_context("spawn").Process(target=be_killed, name="VllmWorker-0")
    process.start()
    process.join()
    raise RuntimeError(
        "WorkerProc initialization failed due to an exception in a background process. See stack trace for root cause."
    )


def flood() -> None:
    """Logs more warnings than the log holds, then fails."""
    for _ in range(3000):
        logging.getLogger("vllm").warning("x" * 1000)
    raise ValueError("after a flood")
