"""Waits for conditions with a deadline, instead of sleeping."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def until(look: Callable[[], T], what: str, timeout_s: float = 90.0) -> T:
    """Returns the first truthy value of `look`. Fails after `timeout_s`, naming `what` it waited for."""
    began_s = time.monotonic()
    while True:
        found = look()
        if found:
            return found
        waited_s = time.monotonic() - began_s
        if waited_s > timeout_s:
            raise AssertionError(f"timed out after {timeout_s:.0f} s waiting for {what} (last: {found!r})")
        # Looking takes the time of what is waited for: the longer it takes, the less often.
        time.sleep(min(0.2, max(0.02, 0.05 * waited_s)))
