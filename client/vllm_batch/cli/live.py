"""Runs the screen of `vllm-batch top`: polls gateway and watchdog, redraws, reads the keys."""

from __future__ import annotations

import os
import select
import sys
import termios
import threading
import time
import tty
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import Generic, TypeVar

from rich.console import Console
from rich.live import Live

from vllm_batch.cli.overview import ask_gateway, ask_watchdog
from vllm_batch.cli.screen import State, render
from vllm_batch.cli.terminal import open_or_fail
from vllm_batch.client import Client

POLL_S = 1.0
REDRAW_S = 0.25
BATCHES_ASKED = 20

T = TypeVar("T")


class Poller(Generic[T]):
    """Asks every second in a thread of its own, so that a server that hangs delays neither keys nor the other one."""

    def __init__(self, ask: Callable[[], T]) -> None:
        self._ask = ask
        self._stop = threading.Event()
        self._fresh: deque[T] = deque(maxlen=1)
        self.answered_s = time.monotonic()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def take(self) -> T | None:
        """The answer that came in since the last call, if any."""
        with suppress(IndexError):
            return self._fresh.popleft()
        return None

    def stop(self) -> None:
        """Asks no more. Does not wait for an answer that is pending."""
        self._stop.set()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self._fresh.append(self._ask())
            except ValueError:
                # The channel was closed in the meantime.
                if self._stop.is_set():
                    return
                raise
            self.answered_s = time.monotonic()
            self._stop.wait(POLL_S)


def run(target: str, watchdog_target: str, console: Console) -> None:
    """Shows the screen until q or Ctrl-C."""
    state = State()
    with Client(target, patience_s=0) as client, open_or_fail(watchdog_target) as channel, _keys() as pressed:
        gateway = Poller(lambda: ask_gateway(client, BATCHES_ASKED))
        watchdog = Poller(lambda: ask_watchdog(channel))
        try:
            with Live(console=console, screen=True, auto_refresh=False, redirect_stderr=False) as live:
                while pressed(REDRAW_S) not in ("q", "Q", "\x04"):
                    now_s = time.monotonic()
                    if (gateway_answer := gateway.take()) is not None:
                        state.take_gateway(gateway_answer, now_s)
                    if (watchdog_answer := watchdog.take()) is not None:
                        state.take_watchdog(watchdog_answer)
                    state.gateway_age_s = now_s - gateway.answered_s
                    state.watchdog_age_s = now_s - watchdog.answered_s
                    live.update(render(state, datetime.now(UTC), console.height), refresh=True)
        except KeyboardInterrupt:
            pass
        finally:
            gateway.stop()
            watchdog.stop()


@contextmanager
def _keys() -> Iterator[Callable[[float], str]]:
    """A function that waits up to so many seconds for a key; empty: none was pressed. Restores the terminal."""
    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)

    def pressed(timeout_s: float) -> str:
        ready, _, _ = select.select([fd], [], [], timeout_s)
        return os.read(fd, 1).decode(errors="replace") or "q" if ready else ""

    try:
        tty.setcbreak(fd)
        yield pressed
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)
