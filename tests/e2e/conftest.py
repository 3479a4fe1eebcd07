"""Engines with a chat model, and what they need."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.collector import Collector, collecting
from tests.support.engines import CHAT_FLAGS, Running


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """BATCH_HOME of the engines."""
    # Short, because its length is limited to what a socket's path allows.
    return Path(os.path.relpath(tmp_path_factory.mktemp("h")))


@pytest.fixture(scope="session")
def collector() -> Iterator[Collector]:
    """Receives vLLM's spans."""
    with collecting() as collector:
        yield collector


@pytest.fixture(scope="module")
def running(home: Path, collector: Collector) -> Iterator[Running]:
    """An engine with a chat model, one for each file: its first grammar decides on the backend for all that follow."""
    running = Running(home, " ".join((*CHAT_FLAGS, "--otlp-traces-endpoint", collector.endpoint)))
    running.start()
    yield running
    running.stop()
