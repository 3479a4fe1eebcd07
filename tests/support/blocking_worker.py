"""A worker whose event loop SIGUSR1 blocks until SIGUSR2: it beats and keeps its connections, but answers nothing."""

import signal
import sys

from service.worker.lifecycle import main


def block(*_: object) -> None:
    # Signal handlers run in the main thread, which runs the event loop.
    signal.sigwait({signal.SIGUSR2})


if __name__ == "__main__":
    signal.signal(signal.SIGUSR1, block)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
    raise SystemExit(main(sys.argv[1:]))
