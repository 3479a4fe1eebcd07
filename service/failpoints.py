"""Failpoints: named places where a test kills the process, as a power cut would. Armed by BATCH_FAILPOINT."""

import os
import signal

_armed, _, _count = os.environ.get("BATCH_FAILPOINT", "").partition(":")
_left = int(_count or 1)


def hit(name: str) -> None:
    """Kills this process if `BATCH_FAILPOINT` is `name`, or on the Nth hit if it is `name:N`."""
    global _left
    if name != _armed:
        return
    _left -= 1
    if _left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
