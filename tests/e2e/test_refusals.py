"""Whatever vLLM's HTTP server answers to a body that it rejects, the adapter answers: status, message, parameter."""

import asyncio
import json
from collections.abc import Iterator

import pytest
from structlog.testing import capture_logs

from service.worker.engine.protocol import Answer
from tests.e2e.refused_bodies import GENERATING
from tests.support import raise_sites
from tests.support.engines import CHAT_FLAGS, HEADERS, Running, case_lines
from tests.support.vllm_http import VllmHttp, errors_of, unseen, wrong_fields

# In one process with what shares its engine, or at least the import of vLLM.
pytestmark = [pytest.mark.timeout(900), pytest.mark.xdist_group("vllm")]
CHAT = "/v1/chat/completions"
# Unknown tokens, numbers at the edge of floats, and grammars: some killed earlier versions of vLLM.
KILLERS = ["kill_ids", "kill_grammar"]
VALID = {
    CHAT: {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1},
    "/v1/completions": {"prompt": "x", "max_tokens": 1},
    "/v1/responses": {"input": "x", "max_output_tokens": 1},
}


@pytest.fixture(scope="module")
def http(running: Running) -> VllmHttp:
    """vLLM's own server over that engine."""
    return VllmHttp(running, *CHAT_FLAGS)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    # Printing tracebacks in colour, with all locals, takes seconds.
    with capture_logs():
        yield


def test_every_refusal_is_that_of_the_http_server(running: Running, http: VllmHttp) -> None:
    """For every place where vLLM's validators and sampling parameters reject a body, the answer is that of its server.

    A new place in the installed vLLM fails this test until refused_bodies.py has a body for it.
    """
    from vllm.sampling_params import SamplingParams

    seen = errors_of(running.engine)
    for url, bodies in GENERATING.items():
        for body in bodies:
            http.check_same(url, body)
    sites = raise_sites.in_validators(running.engine._types.values()) | raise_sites.in_class(SamplingParams)
    assert len(sites) > 80
    assert unseen(sites, seen) == []


@pytest.mark.parametrize("url", VALID)
def test_every_field_of_a_wrong_type(running: Running, http: VllmHttp, url: str) -> None:
    """A wrong type in any field of a request is rejected with the answer of vLLM's server."""
    count = 0
    for body in wrong_fields(running, url, VALID[url]):
        assert http.check_same(url, body).status_code in (400, 500)
        count += 1
    assert count > 100


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "7",
        "null",
        '"x"',
        '{"model": "tiny"',
        '{"prompt": "x", "max_tokens": ' + "9" * 5000 + "}",
        '{"prompt": ' + "[" * 100_000 + "]" * 100_000 + "}",
        '{"prompt": "\\ud800", "max_tokens": 1}',
    ],
    ids=["list", "number", "null", "text", "half", "long number", "deep", "surrogate"],
)
def test_no_object_and_no_json(running: Running, http: VllmHttp, text: str) -> None:
    """A body that is not an object, or not JSON, is rejected with the answer of vLLM's server."""
    assert http.check_same("/v1/completions", text).status_code == 400


@pytest.mark.parametrize("name", ["responses", "completions", "nan_values", *KILLERS])
def test_public_reports(http: VllmHttp, name: str) -> None:
    """Requests after public bug reports, which the batch runner may not accept, get the answer of vLLM's server."""
    for url, body in case_lines(name):
        http.check_same(url, body)


@pytest.mark.parametrize("name", KILLERS)
def test_wrong_requests_among_good_ones(running: Running, name: str) -> None:
    """Run at once with requests that killed engines, each request gets the status that it gets alone."""
    requests = case_lines(name)
    alone = [running.run(body, url).status_code for url, body in requests]

    async def all_at_once() -> list[Answer]:
        return await asyncio.gather(*(running.engine.run(url, json.dumps(body), HEADERS) for url, body in requests))

    together = [answer.status_code for answer in running.call(all_at_once())]
    assert together == alone
    assert {200, 400} <= set(together)
    assert not running.engine.is_dead


def test_stream_is_refused(running: Running) -> None:
    """A streaming request, which cannot become a result, is a 400 as from vLLM's batch runner, and runs nothing."""
    for url, body in VALID.items():
        answer = running.run(body | {"stream": True}, url)
        error = json.loads(answer.body)["error"]
        assert (answer.status_code, error["param"]) == (400, "stream")
        assert error["message"] == "Request must not be sent in stream mode"
    assert not running.engine._client.output_processor.has_unfinished_requests()


def test_endpoint_that_the_model_lacks(running: Running) -> None:
    """A request for an endpoint that the model does not support is a 400 with the message of vLLM's batch runner."""
    for url in ("/v1/audio/transcriptions", "/v1/audio/translations", "/v1/embeddings", "/no/such"):
        answer = running.call(running.engine.run(url, '{"file_url": "data:,"}', HEADERS))
        assert answer.status_code == 400
        assert json.loads(answer.body)["error"]["message"] == f"Model does not support endpoint: {url}"
