"""One engine with a chat model, for all tests that need one and leave it as it was."""

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


@pytest.fixture(scope="session")
def running(home: Path, collector: Collector) -> Iterator[Running]:
    """An engine with a chat model. The last test of test_vllm_engine.py, which come last, kills it."""
    running = Running(home, " ".join((*CHAT_FLAGS, "--otlp-traces-endpoint", collector.endpoint)))
    running.start()
    yield running
    running.stop()
