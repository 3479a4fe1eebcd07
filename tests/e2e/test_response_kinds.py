"""Whatever a handler of vLLM returns or raises becomes the answer that vLLM's HTTP server or batch runner gives."""

import asyncio
import json
import typing
from argparse import Namespace
from collections.abc import AsyncIterator, Callable
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from structlog.testing import capture_logs

from service.config import Settings
from service.worker.engine.protocol import Answer
from service.worker.engine.vllm import ENDPOINTS, VllmEngine, tokens_of
from tests.e2e.refused_bodies import AUDIO
from tests.support import raise_sites
from tests.support.engines import HEADERS
from tests.support.vllm_http import errors_of, unseen

# In one process with what shares the import of vLLM.
pytestmark = [pytest.mark.timeout(900), pytest.mark.xdist_group("vllm")]
CHAT = "/v1/chat/completions"
TRANSCRIPTIONS, TRANSLATIONS = AUDIO
BODY = {"model": "tiny", "messages": [{"role": "user", "content": "x"}]}
SOUND = {"model": "tiny", "file_url": "data:audio/wav;base64,AAAA"}


class Handlers:
    """All of vLLM's serving objects in one, doing what the test tells them."""

    def __init__(self, outcome: Callable[[], Any]) -> None:
        self._outcome = outcome
        self.audio: list[Any] = []

    async def create_chat_completion(self, request: Any, raw_request: Any = None) -> Any:
        return self._outcome()

    async def create_transcription(self, audio: bytes, request: Any, raw_request: Any = None) -> Any:
        self.audio.append((audio, request.file.filename, raw_request and raw_request.headers["x-request-id"]))
        return self._outcome()

    create_translation = create_transcription


def raising(error: BaseException) -> Callable[[], Any]:
    def outcome() -> Any:
        raise error

    return outcome


def bound(handlers: Handlers) -> tuple[VllmEngine, Any]:
    """An engine over these handlers, and the state that vLLM would have."""
    from starlette.datastructures import State

    args = Namespace(log_error_stack=False, allowed_media_domains=None)
    dead = SimpleNamespace(errored=False, is_running=True)
    state = State({"args": args, "engine_client": dead, "server": SimpleNamespace(should_exit=False)})
    for name in ("openai_serving_chat", "openai_serving_transcription", "openai_serving_translation"):
        setattr(state, name, handlers)
    engine = VllmEngine(Settings(home=Path("h")))
    engine._bind(state)
    return engine, state


async def http_answer(state: Any) -> tuple[int, Any]:
    """What vLLM's server answers to a chat request over this state."""
    from fastapi import FastAPI
    from vllm.entrypoints.openai.chat_completion.api_router import attach_router
    from vllm.entrypoints.serve.exception_handling.register import init_exception_handler

    app = FastAPI()
    app.state = state
    attach_router(app)
    init_exception_handler(app)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://vllm", timeout=60) as client:
        response = await client.post(CHAT, json=BODY)
    return response.status_code, response.json()


def run(engine: VllmEngine, url: str, body: Any) -> Answer:
    with capture_logs():
        return asyncio.run(engine.run(url, json.dumps(body), HEADERS))


def kinds_of(error: type[BaseException]) -> list[type[BaseException]]:
    return [error, *(kind for below in error.__subclasses__() for kind in kinds_of(below))]


def test_every_error_of_vllm() -> None:
    """Every error of vLLM but EngineDeadError, and common ones of Python, get the status and body of vLLM's server."""
    import jinja2
    from fastapi import HTTPException
    from vllm.exceptions import VLLMError
    from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

    assert EngineGenerateError in kinds_of(VLLMError)
    errors: list[BaseException] = [HTTPException(422, "no /tmp/a/b"), HTTPException(409, "busy")]
    for kind in kinds_of(VLLMError):
        arguments: tuple[Any, ...]
        for arguments in (("no",), (), ("no", 409), ("no", "such")):
            try:
                errors.append(kind(*arguments))
                break
            except TypeError:
                continue
        else:
            pytest.fail(f"{kind} wants other arguments")
    others = (ValueError, TypeError, OverflowError, NotImplementedError, jinja2.TemplateError, RuntimeError, KeyError)
    errors += [kind("no") for kind in (*others, AssertionError, RecursionError, MemoryError)]
    for error in errors:
        engine, state = bound(Handlers(raising(error)))
        if isinstance(error, EngineDeadError):
            continue
        answer = run(engine, CHAT, BODY)
        assert (answer.status_code, json.loads(answer.body)) == asyncio.run(http_answer(state)), repr(error)
    assert len(errors) > 20


def test_every_kind_of_json() -> None:
    """A model, an error and a JSON response with any content are answered as they are."""
    from fastapi.responses import JSONResponse
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionResponse
    from vllm.entrypoints.serve import create_error_response
    from vllm.entrypoints.serve.engine.protocol import UsageInfo

    usage = UsageInfo(prompt_tokens=3, completion_tokens=4, total_tokens=7)
    completion = ChatCompletionResponse(model="tiny", choices=[], usage=usage)
    for outcome in (completion, create_error_response("no", "Teapot", param="p")):
        engine, state = bound(Handlers(lambda outcome=outcome: outcome))
        answer = run(engine, CHAT, BODY)
        assert (answer.status_code, json.loads(answer.body)) == asyncio.run(http_answer(state))
    engine, _ = bound(Handlers(lambda: completion))
    assert run(engine, CHAT, BODY).completion_tokens == 4
    for content in ({"usage": {"prompt_tokens": 3}}, {"usage": None}, [1], "x", None):
        engine, _ = bound(Handlers(lambda content=content: JSONResponse(content, 201)))
        answer = run(engine, CHAT, BODY)
        assert (answer.status_code, json.loads(answer.body)) == (201, content)
        assert answer.prompt_tokens == (3 if content == {"usage": {"prompt_tokens": 3}} else 0)


def test_tokens_of_either_api() -> None:
    """Cached and reasoning tokens are those of the usage, as chat completions and as responses spell it."""
    chat = {
        "prompt_tokens": 9,
        "completion_tokens": 7,
        "prompt_tokens_details": {"cached_tokens": 8},
        "completion_tokens_details": {"reasoning_tokens": 5},
    }
    responses = {
        "input_tokens": 9,
        "output_tokens": 7,
        "input_tokens_details": {"cached_tokens": 8},
        "output_tokens_details": {"reasoning_tokens": 5},
    }
    assert tokens_of(chat) == tokens_of(responses) == (9, 7, 8, 5)
    assert tokens_of({"prompt_tokens": 9, "completion_tokens": None, "prompt_tokens_details": None}) == (9, 0, 0, 0)
    assert tokens_of(None) == (0, 0, 0, 0)


def test_streams_and_bytes() -> None:
    """A stream or a response that is not JSON becomes a 400 that says so, and the stream is closed."""
    from fastapi.responses import PlainTextResponse, StreamingResponse

    async def stream() -> AsyncIterator[str]:
        yield "data: x"

    streams = [stream()]
    engine, _ = bound(Handlers(lambda: streams[0]))
    answer = run(engine, CHAT, BODY)
    assert (answer.status_code, json.loads(answer.body)["error"]["param"]) == (400, "stream")
    assert streams[0].ag_frame is None
    for response, kind in (
        (StreamingResponse([b"\xff"], media_type="application/octet-stream"), "octet-stream"),
        (PlainTextResponse("x"), "text/plain"),
    ):
        engine, _ = bound(Handlers(lambda response=response: response))
        answer = run(engine, CHAT, BODY)
        assert answer.status_code == 400
        assert kind in json.loads(answer.body)["error"]["message"]


def test_handlers_return_nothing_else() -> None:
    """The handlers of the installed vLLM declare no other return types than those that this file tests."""
    from fastapi.responses import Response
    from pydantic import BaseModel

    speech = "vllm.entrypoints.speech_to_text"
    serving = {
        "openai_serving_chat": "vllm.entrypoints.openai.chat_completion.serving:OpenAIServingChat",
        "openai_serving_completion": "vllm.entrypoints.openai.completion.serving:OpenAIServingCompletion",
        "openai_serving_responses": "vllm.entrypoints.openai.responses.serving:OpenAIServingResponses",
        "openai_serving_transcription": f"{speech}.transcription.serving:OpenAIServingTranscription",
        "openai_serving_translation": f"{speech}.translation.serving:OpenAIServingTranslation",
        "serving_embedding": "vllm.entrypoints.pooling.embed.serving:ServingEmbedding",
        "serving_classification": "vllm.entrypoints.pooling.classify.serving:ServingClassification",
        "serving_pooling": "vllm.entrypoints.pooling.pooling.serving:ServingPooling",
        "serving_scores": "vllm.entrypoints.pooling.scoring.serving:ServingScores",
    }
    for attribute, method, _ in ENDPOINTS.values():
        module, name = serving[attribute].split(":")
        returned = typing.get_type_hints(getattr(getattr(import_module(module), name), method))["return"]
        for kind in typing.get_args(returned) or (returned,):
            origin = typing.get_origin(kind) or kind
            assert hasattr(origin, "aclose") or issubclass(origin, BaseModel | Response), (attribute, kind)


@pytest.mark.parametrize("url", AUDIO)
def test_audio_as_the_batch_runner(url: str) -> None:
    """A transcription or translation is fetched, run and answered as by vLLM's batch runner."""
    from vllm.entrypoints.launchers import run_batch
    from vllm.entrypoints.serve import create_error_response
    from vllm.entrypoints.speech_to_text.transcription.protocol import TranscriptionResponse, TranscriptionUsageAudio

    text = TranscriptionResponse(text="hello", usage=TranscriptionUsageAudio(seconds=1))
    outcomes = (lambda: text, raising(ValueError("no")), lambda: create_error_response("no", param="language"))
    bodies = (SOUND, SOUND | {"language": "en"}, SOUND | {"file_url": "ftp://x"}, SOUND | {"file_url": "data:x"})
    for outcome in outcomes:
        for body in bodies:
            handlers = Handlers(outcome)
            engine, _ = bound(handlers)
            answer = run(engine, url, body)
            line = run_batch.BatchRequestInput(custom_id="0", method="POST", url=url, body=body)
            theirs = asyncio.run(_run_by_runner(run_batch, line, Handlers(outcome)))
            assert answer.status_code == theirs["response"]["status_code"]
            assert json.loads(answer.body) == (theirs["response"]["body"] or theirs["error"])
            if body["file_url"] == SOUND["file_url"]:
                assert handlers.audio == [(b"\0\0\0", "audio.bin", HEADERS["x-request-id"])]


async def _run_by_runner(run_batch: Any, line: Any, handlers: Handlers) -> Any:
    is_translation = line.url == TRANSLATIONS
    output = await run_batch.handle_endpoint_request(
        line,
        run_batch.BatchProgressTracker(),
        url_matcher=lambda url: True,
        handler_getter=lambda: handlers.create_transcription,
        wrapper_fn=run_batch.make_transcription_wrapper(is_translation),
    )
    return json.loads(output.model_dump_json())


def test_audio_that_is_refused() -> None:
    """For every place where the audio validators reject a body, the answer is a 400 and no handler is called."""
    handlers = Handlers(lambda: None)
    engine, _ = bound(handlers)
    seen = errors_of(engine)
    for url, bodies in AUDIO.items():
        for body in bodies:
            answer = run(engine, url, {"model": "tiny"} | body)
            assert (answer.status_code, json.loads(answer.body)["error"]["code"]) == (400, 400), body
    sites = raise_sites.in_validators(engine._types[url] for url in AUDIO)
    assert len(sites) > 5
    assert unseen(sites, seen) == []
    assert handlers.audio == []
    assert json.loads(run(engine, TRANSCRIPTIONS, SOUND | {"file": "x"}).body)["error"]["param"] == "file"
