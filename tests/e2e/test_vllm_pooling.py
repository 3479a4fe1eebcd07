"""Real vLLM with a model that embeds: embeddings, scores and rankings are those of vLLM's own batch runner."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.engines import Running, check_same, run_batch

pytestmark = pytest.mark.timeout(300)
FLAGS = ("--runner", "pooling", "--convert", "embed")
REQUESTS: list[tuple[str, dict[str, Any]]] = [
    ("/v1/embeddings", {"input": "The quick brown fox"}),
    ("/v1/embeddings", {"input": ["one", "two", "three"], "encoding_format": "float"}),
    ("/v1/embeddings", {"input": "The quick brown fox", "encoding_format": "base64"}),
    ("/v1/embeddings", {"input": "long " * 3000}),
    ("/v1/score", {"text_1": "fox", "text_2": ["dog", "fox"]}),
    ("/v1/rerank", {"query": "fox", "documents": ["a dog", "a fox", "a cat"], "top_n": 2}),
]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Short: the settings hold BATCH_HOME to what a socket's path may have.
    return Path(os.path.relpath(tmp_path_factory.mktemp("h")))


@pytest.fixture(scope="module")
def running(home: Path) -> Iterator[Running]:
    """One engine for the module."""
    running = Running(home, " ".join(FLAGS))
    running.call(running.engine.start(), 200)
    yield running
    running.stop()


def test_same_bodies_as_run_batch(running: Running, home: Path, tmp_path: Path) -> None:
    """vLLM's own batch runner gives the same bodies for the same lines, up to ids and times."""
    theirs = run_batch(home, tmp_path, REQUESTS, *FLAGS)
    assert [their["response"]["status_code"] for their in theirs] == [200, 200, 200, 400, 200, 200]
    check_same(running, theirs, REQUESTS)


def test_what_it_serves(running: Running) -> None:
    """It is offered at the endpoints of an embedding model, and at none that generates."""
    assert {"/v1/embeddings", "/v1/score", "/v1/rerank", "/pooling"} <= running.engine.urls
    assert not {"/v1/chat/completions", "/v1/completions"} & running.engine.urls


def test_tokens_are_counted(running: Running) -> None:
    """The prompt's tokens are in the answer, for the batch's sum."""
    answer = running.run({"input": "The quick brown fox"}, "/v1/embeddings")
    assert (answer.prompt_tokens, answer.completion_tokens) == (json.loads(answer.body)["usage"]["prompt_tokens"], 0)
    assert answer.prompt_tokens > 0
