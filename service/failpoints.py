"""Failpoints: named places at which a test has the process killed, as by a power cut. Armed by BATCH_FAILPOINT."""

import os
import signal

_armed, _, _count = os.environ.get("BATCH_FAILPOINT", "").partition(":")
_left = int(_count or 1)


def hit(name: str) -> None:
    """Kills this process if `BATCH_FAILPOINT` is `name`, or at the N-th time if it is `name:N`."""
    global _left
    if name != _armed:
        return
    _left -= 1
    if _left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
