"""What the watchdog repeats beside its guards."""

import threading
from unittest.mock import Mock

from watchdog.__main__ import _repeat


def test_what_changed_is_told_at_once() -> None:
    """A task that can be woken runs again when something has changed, and does not wait for its interval."""
    news, ending, ran = threading.Event(), threading.Event(), []

    def task() -> None:
        ran.append(len(ran))
        if len(ran) == 2:
            ending.set()
        news.set()

    _repeat("heartbeat", task, 1e6, news, ending, Mock())
    assert ran == [0, 1]
