"""The worker, whose event loop SIGUSR1 blocks until SIGUSR2: it beats, its connections live, and it answers nothing."""

import signal
import sys

from service.worker.work import main


def block(*_: object) -> None:
    # A signal's handler runs in the main thread: the event loop's.
    signal.sigwait({signal.SIGUSR2})


if __name__ == "__main__":
    signal.signal(signal.SIGUSR1, block)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
    raise SystemExit(main(sys.argv[1:]))
