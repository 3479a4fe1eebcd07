"""vLLM behind its own OpenAI serving layer. The only file that uses vLLM; its internals change, and this fits 0.32."""

import asyncio
import json
import logging
import os
import shlex
from collections.abc import Awaitable, Callable, Mapping, Set
from functools import partial
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pydantic

from service.config import Settings
from service.telemetry import logs
from service.worker.engine import cause, ray_cluster, tiny_model
from service.worker.engine.cause import Cause
from service.worker.engine.failure_log import DEATH_TIMEOUT_S, FailureLog
from service.worker.engine.gpu_holders import gpu_holders
from service.worker.engine.protocol import Answer, EngineDeadError, EngineStartError

# Must be set before vllm is imported, here and in its processes.
DEFAULTS = {
    "VLLM_NO_USAGE_STATS": "1",
    # With gRPC loaded, a forked child hangs.
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "VLLM_LOGGING_LEVEL": "WARNING",
    # Otherwise setproctitle overwrites a process's environment, by which we recognize our processes.
    "SPT_NOENV": "1",
}
# For the tiny model on any machine: little memory, and no downloads. One thread: several wait for each other dozens of
# times a token, which is most of the time for so small a model, and on a busy machine nearly all of it (measured: 3 s
# instead of over a minute for 300 steps).
TINY_DEFAULTS = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
# No compilation, which would take longer than the work. One engine process instead of two, as on one GPU, starts a
# quarter faster. On a CPU, two would communicate by spinning on sched_yield, which on Linux 6.18 with 2 cores kept all
# other processes waiting for seconds.
TINY_ARGS = (
    *("--served-model-name", "tiny", "--enforce-eager", "--max-model-len", str(tiny_model.MAX_TOKENS)),
    *("--distributed-executor-backend", "vllm.v1.executor.uniproc_executor.UniProcExecutor"),
)

# By endpoint: where its handler is in the state that vLLM fills, and its request type.
_OPENAI, _POOLING = "vllm.entrypoints.openai", "vllm.entrypoints.pooling"
_BATCH = "vllm.entrypoints.launchers.run_batch"
_SCORE = ("serving_scores", "__call__", f"{_POOLING}.scoring.protocol:ScoreRequest")
_RERANK = ("serving_scores", "__call__", f"{_POOLING}.scoring.protocol:RerankRequest")
ENDPOINTS = {
    "/v1/chat/completions": (
        "openai_serving_chat",
        "create_chat_completion",
        f"{_OPENAI}.chat_completion.protocol:ChatCompletionRequest",
    ),
    "/v1/completions": (
        "openai_serving_completion",
        "create_completion",
        f"{_OPENAI}.completion.protocol:CompletionRequest",
    ),
    "/v1/responses": ("openai_serving_responses", "create_responses", f"{_OPENAI}.responses.protocol:ResponsesRequest"),
    "/v1/embeddings": ("serving_embedding", "__call__", f"{_POOLING}.embed.protocol:EmbeddingRequest"),
    "/classify": ("serving_classification", "__call__", f"{_POOLING}.classify.protocol:ClassificationRequest"),
    "/pooling": ("serving_pooling", "__call__", f"{_POOLING}.pooling.protocol:PoolingRequest"),
    "/score": _SCORE,
    "/v1/score": _SCORE,
    "/rerank": _RERANK,
    "/v1/rerank": _RERANK,
    "/v2/rerank": _RERANK,
    "/v1/audio/transcriptions": (
        "openai_serving_transcription",
        "create_transcription",
        f"{_BATCH}:BatchTranscriptionRequest",
    ),
    "/v1/audio/translations": (
        "openai_serving_translation",
        "create_translation",
        f"{_BATCH}:BatchTranslationRequest",
    ),
}
# Endpoints whose requests name a file instead of containing it, and whether they translate.
_AUDIO = {"/v1/audio/transcriptions": False, "/v1/audio/translations": True}
# Keeps the engine full while results are stored and the next requests come: measured best at 2 to 4 times.
WINDOW_FACTOR = 2
MAX_WINDOW = 4096

log = logs.get("vllm")


class EngineArgumentError(EngineStartError):
    """BATCH_ENGINE_ARGS contains something that vLLM does not accept."""


class VllmEngine:
    """An `Engine` over AsyncLLM and the handlers of vLLM's OpenAI server."""

    def __init__(self, settings: Settings) -> None:
        self.models: tuple[str, ...] = ()
        self.urls: Set[str] = frozenset()
        self.window = self.concurrency = settings.window or 1
        self.steps = 0
        self._settings = settings
        self._client: Any = None
        self._shutdown_timeout_s = 0
        self._handlers: dict[str, Callable[[Any, Any], Awaitable[Any]]] = {}
        self._types: dict[str, pydantic.TypeAdapter[Any]] = {}
        # vLLM's error responses, as its HTTP server makes them.
        self._http: Any = None
        self._failure_log: FailureLog | None = None

    @property
    def is_dead(self) -> bool:
        """True once vLLM reports its death, which may be before waiting requests fail."""
        return self._client is not None and bool(self._client.errored)

    async def start(self) -> None:
        """Starts vLLM's processes and loads the model. Raises EngineStartError, from what vLLM raises."""
        self._failure_log = FailureLog(self._settings.model or "", gpu_holders)
        try:
            await self._start()
        except EngineStartError:
            raise
        except Exception as error:
            raise EngineStartError(await self._failure_log.explain(error)) from error
        # Warnings during the start must not explain a later death.
        self._failure_log.clear()

    async def death_cause(self) -> Cause:
        """What the engine's core or its workers raised, or the signal that ended them."""
        assert self._failure_log is not None
        return await self._failure_log.explain(timeout_s=DEATH_TIMEOUT_S)

    async def _start(self) -> None:
        arguments = self._arguments()
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.entrypoints.launchers.api_server.app_state import init_app_state
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.async_llm import AsyncLLM

        parsed = self._parse(arguments)
        if "ray" in (parsed.distributed_executor_backend, parsed.data_parallel_backend):
            # In an hour fewer starts fail than the budget has, also while a host of the cluster is being repaired.
            timeout_s = max(ray_cluster.SWEEP_TIMEOUT_S, self._settings.load_timeout_s / 2)
            await ray_cluster.prepare(self._settings.worker_id, _ray_need(parsed), timeout_s)
        engine_args = AsyncEngineArgs.from_cli_args(parsed)
        context = UsageContext.OPENAI_BATCH_RUNNER
        config = engine_args.create_engine_config(usage_context=context)
        self._client = AsyncLLM.from_vllm_config(
            vllm_config=config,
            usage_context=context,
            enable_log_requests=False,
            aggregate_engine_logging=engine_args.aggregate_engine_logging,
            disable_log_stats=False,
            stat_loggers=[self._stat_logger()],
        )
        self._shutdown_timeout_s = config.shutdown_timeout
        await self._client.reset_mm_cache()
        from starlette.datastructures import State

        state = State()
        await init_app_state(self._client, state, parsed, await self._client.get_supported_tasks())
        self._bind(state)
        serving = state.openai_serving_models
        self.models = tuple(path.name for path in serving.base_model_paths) + tuple(serving.lora_requests)
        if self._settings.window is None:
            self.window = min(MAX_WINDOW, WINDOW_FACTOR * config.scheduler_config.max_num_seqs)
        # Each engine of data parallelism has as many.
        at_once = config.scheduler_config.max_num_seqs * config.parallel_config.data_parallel_size
        self.concurrency = min(self.window, at_once)
        log.info("engine_ready", models=self.models, urls=sorted(self.urls), window=self.window)

    async def run(self, url: str, body: str, headers: Mapping[str, str] | None = None) -> Answer:
        """Runs one request through the handler of its endpoint."""
        if url not in self._handlers:
            return _refused(f"Model does not support endpoint: {url}")
        try:
            request = self._types[url].validate_python(json.loads(body))
        except Exception as error:  # noqa: BLE001 - validators may raise anything; vLLM maps it to its error response
            return await self._error_answer(url, body, error)
        if self.is_dead:
            raise EngineDeadError("the engine is dead")
        try:
            answer = await _answer(request, await self._handlers[url](request, _http_request(headers)))
        except Exception as error:  # noqa: BLE001 - so may handlers
            answer = await self._error_answer(url, body, error)
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            # Some handlers turn a cancellation into an error response. Whoever cancelled wants no answer.
            raise asyncio.CancelledError
        if answer.status_code >= 500:
            # Lets vLLM's own monitor notice a death that a request noticed first.
            await asyncio.sleep(0)
            if self.is_dead or _says_dead(answer.body):
                raise EngineDeadError(answer.body[:500])
        return answer

    async def stop(self) -> None:
        """Ends vLLM's processes."""
        if self._client is not None:
            self._client.shutdown(timeout=self._shutdown_timeout_s)

    def _arguments(self) -> list[str]:
        # Cached tokens in each usage, as OpenAI has them. Flags that are given can turn it off.
        given = ["--enable-prompt-tokens-details", *shlex.split(self._settings.engine_args)]
        defaults = dict(DEFAULTS)
        if self._settings.model is None:
            defaults |= TINY_DEFAULTS
            path = str(tiny_model.ensure(self._settings.home / "models" / "tiny"))
            given = ["--model", path, *TINY_ARGS, *given]
        else:
            given = ["--model", self._settings.model, *given]
        for name, value in defaults.items():
            os.environ.setdefault(name, value)
        return given

    def _parse(self, arguments: list[str]) -> Any:
        from vllm.entrypoints.launchers.run_batch import make_arg_parser
        from vllm.utils.argparse_utils import FlexibleArgumentParser

        class Parser(FlexibleArgumentParser):  # type: ignore[misc]
            def error(self, message: str) -> None:
                # argparse's exception has the values of flags, and some are secrets.
                raise EngineArgumentError(cause.wrong_arguments(message, self._option_string_actions)) from None

        # The file names are not used, but the parser requires them.
        return make_arg_parser(Parser()).parse_args(["-i", "-", "-o", "-", *arguments])

    def _stat_logger(self) -> Any:
        from vllm.v1.metrics.loggers import StatLoggerBase

        engine = self

        class StepCounter(StatLoggerBase):  # type: ignore[misc]
            """Called by vLLM after each step of the engine."""

            def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
                pass

            def record(self, *_: Any, **__: Any) -> None:
                engine.steps += 1

            def log_engine_initialized(self) -> None:
                pass

        return StepCounter

    def _bind(self, state: Any) -> None:
        """Notes handler and request type of each endpoint that the model supports."""
        types = {}
        for url, (attribute, method, type_path) in ENDPOINTS.items():
            serving = getattr(state, attribute, None)
            if serving is None:
                continue
            module, name = type_path.split(":")
            types[url] = getattr(import_module(module), name)
            self._types[url] = pydantic.TypeAdapter(types[url])
            handler = getattr(serving, method)
            if url in _AUDIO:
                handler = _audio_handler(handler, _AUDIO[url], state.args.allowed_media_domains)
            self._handlers[url] = handler
        self.urls = frozenset(self._handlers)
        self._http = _error_app(types, state)

    async def _error_answer(self, url: str, body: str, error: Exception) -> Answer:
        """What vLLM's HTTP server answers to a body that raises this error."""
        text = bytearray()
        status = 0

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": body.encode(), "more_body": False}

        async def send(message: dict[str, Any]) -> None:
            nonlocal status
            status = message.get("status", status)
            text.extend(message.get("body", b""))

        scope = {
            **{"type": "http", "http_version": "1.1", "method": "POST", "path": url, "query_string": b""},
            **{"headers": [(b"content-type", b"application/json")], "state": {"error": error}},
        }
        try:
            await self._http(scope, receive, send)
        except Exception as raised:
            # For an error that is not vLLM's own, the server answers first and raises it then.
            if not text:
                raise
            log.warning("request_failed", url=url, exc_info=raised)
        return Answer(status, text.decode())


def load_extension() -> str:
    """Loads vLLM's compiled extension, as its processes will. Returns the device. Raises ImportError with the cause."""
    import torch
    from vllm.platforms import current_platform

    # vLLM only warns when its extension does not load, and fails much later because of it.
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("vllm")
    logger.addHandler(handler)
    try:
        current_platform.import_kernels()
    finally:
        logger.removeHandler(handler)
    needed = "init_cpu_memory_env" if current_platform.is_cpu() else "rms_norm"
    if not hasattr(torch.ops._C, needed):
        raise ImportError("; ".join(said) or f"{needed} is not in it")
    return str(current_platform.device_name or current_platform.device_type)


def _ray_need(parsed: Any) -> ray_cluster.Need:
    """What vLLM will reserve. Raises EngineStartError where it would fail late, or with data parallelism hang."""
    from vllm.platforms import current_platform

    device = current_platform.ray_device_key
    if not device:
        raise EngineStartError(
            Cause.of(
                f"this build of vLLM cannot use Ray: it is for {current_platform.device_name or 'an unknown device'}",
                "Remove --distributed-executor-backend ray and --data-parallel-backend ray from BATCH_ENGINE_ARGS: Ray"
                " needs GPUs.",
                recurs=True,
            )
        )
    engines = parsed.data_parallel_size
    if parsed.data_parallel_backend != "ray":
        engines = parsed.data_parallel_size_local or engines
    each = parsed.tensor_parallel_size * parsed.pipeline_parallel_size * parsed.prefill_context_parallel_size
    return ray_cluster.Need(device, engines * each, here=current_platform.device_count())


def _http_request(headers: Mapping[str, str] | None) -> Any:
    """Wraps headers in the request object that handlers expect; there is no HTTP request."""
    if headers is None:
        return None
    from starlette.requests import Request

    return Request({"type": "http", "headers": [(name.encode(), value.encode()) for name, value in headers.items()]})


def _error_app(types: Mapping[str, Any], state: Any) -> Any:
    """vLLM's HTTP app without its handlers: each request ends with a validation error, or the error passed with it."""
    from fastapi import FastAPI, Request
    from vllm.entrypoints.serve.exception_handling.register import init_exception_handler

    def endpoint(request_type: Any) -> Callable[..., Awaitable[None]]:
        async def fail(request: request_type, http_request: Request) -> None:
            raise http_request.state.error

        return fail

    app = FastAPI()
    app.state.args = state.args
    # vLLM's error handlers look at both, to shut a server down whose engine is dead.
    app.state.engine_client, app.state.server = state.engine_client, SimpleNamespace(should_exit=False)
    init_exception_handler(app)
    for url, request_type in types.items():
        app.post(url, response_model=None)(endpoint(request_type))
    return app


def _audio_handler(handler: Callable[..., Awaitable[Any]], is_translation: bool, domains: Any) -> Any:
    """Fetches the file that the request names, as vLLM's batch runner does."""
    from vllm.entrypoints.launchers.run_batch import make_transcription_wrapper

    with_file = make_transcription_wrapper(is_translation, domains)

    async def run(request: Any, http_request: Any) -> Any:
        return await with_file(partial(handler, raw_request=http_request))(request)

    return run


async def _answer(request: Any, response: Any) -> Answer:
    """Whatever a handler returns, as status and JSON text."""
    from starlette.responses import JSONResponse, Response
    from vllm.entrypoints.serve.engine.protocol import ErrorResponse

    if isinstance(response, JSONResponse):
        return Answer(response.status_code, bytes(response.body).decode(), *_tokens_in(response.body))
    if isinstance(response, ErrorResponse):
        return Answer(response.error.code, response.model_dump_json(by_alias=True))
    if isinstance(response, Response):
        has_format = hasattr(request, "encoding_format")
        return _refused(
            f"Results of a batch are JSON, not {response.media_type}"
            + (": encoding_format must be 'float' or 'base64'" if has_format else ""),
            "encoding_format" if has_format else None,
        )
    if hasattr(response, "aclose"):
        # Not started yet, so none of it is in the engine.
        await response.aclose()
        return _refused("Request must not be sent in stream mode", "stream")
    usage: Any = getattr(getattr(response, "usage", None), "model_dump", dict)()
    return Answer(200, response.model_dump_json(by_alias=True), *tokens_of(usage))


def _refused(message: str, param: str | None = None) -> Answer:
    """A refusal in vLLM's form."""
    from vllm.entrypoints.serve import create_error_response

    response = create_error_response(message, param=param)
    return Answer(response.error.code, response.model_dump_json())


def _tokens_in(body: bytes | memoryview) -> tuple[int, int, int, int]:
    content = json.loads(bytes(body))
    return tokens_of(content.get("usage") if isinstance(content, dict) else None)


def tokens_of(usage: Any) -> tuple[int, int, int, int]:
    """Prompt, completion, cached and reasoning tokens of a `usage`, in the words of either API; 0 for what it lacks."""
    given = usage if isinstance(usage, dict) else {}
    cached = given.get("prompt_tokens_details") or given.get("input_tokens_details") or {}
    reasoning = given.get("completion_tokens_details") or given.get("output_tokens_details") or {}
    return (
        given.get("prompt_tokens") or given.get("input_tokens") or 0,
        given.get("completion_tokens") or given.get("output_tokens") or 0,
        cached.get("cached_tokens") or 0,
        reasoning.get("reasoning_tokens") or 0,
    )


def _says_dead(body: str) -> bool:
    return "EngineDeadError" in body or "EngineCore encountered an issue" in body
