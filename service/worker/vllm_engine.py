"""vLLM behind its own OpenAI serving layer. The one file that knows vLLM, whose inside moves: 0.32."""

import asyncio
import os
import shlex
from collections.abc import Awaitable, Callable, Mapping, Set
from http import HTTPStatus
from importlib import import_module
from typing import Any

import pydantic

from service import logs
from service.config import Settings
from service.worker import tiny_model
from service.worker.engine import Answer, EngineDeadError

# Must be there before vllm is imported, here and in its processes.
DEFAULTS = {
    "VLLM_NO_USAGE_STATS": "1",
    # With gRPC loaded a forked child hangs.
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "VLLM_LOGGING_LEVEL": "WARNING",
    # setproctitle writes over a process's environment, by which its processes are known to be ours.
    "SPT_NOENV": "1",
}
# For the tiny model, on whatever machine: little memory, no hub, no compilation for the sake of seconds of work.
TINY_DEFAULTS = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
# And one engine process instead of two, as on one GPU: a quarter less to start. On a CPU the two would talk by spinning
# on sched_yield, which on Linux 6.18 with 2 cores kept all other processes waiting for seconds.
TINY_ARGS = (
    *("--served-model-name", "tiny", "--enforce-eager", "--max-model-len", str(tiny_model.MAX_TOKENS)),
    *("--distributed-executor-backend", "vllm.v1.executor.uniproc_executor.UniProcExecutor"),
)

# Where the handler of each endpoint is in the state that vLLM fills, and the type of its request.
_OPENAI, _POOLING = "vllm.entrypoints.openai", "vllm.entrypoints.pooling"
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
}
# Keeps the engine full while results are stored and the next requests come: measured best at 2 to 4 times.
WINDOW_FACTOR = 2
MAX_WINDOW = 4096

log = logs.get("vllm")


class EngineArgumentError(Exception):
    """BATCH_ENGINE_ARGS has something that vLLM does not take."""


class VllmEngine:
    """An `Engine` over AsyncLLM and the handlers of vLLM's OpenAI server."""

    def __init__(self, settings: Settings) -> None:
        self.models: tuple[str, ...] = ()
        self.urls: Set[str] = frozenset()
        self.window = settings.window or 1
        self.steps = 0
        self._settings = settings
        self._client: Any = None
        self._shutdown_timeout_s = 0
        self._handlers: dict[str, Callable[[Any, Any], Awaitable[Any]]] = {}
        self._types: dict[str, pydantic.TypeAdapter[Any]] = {}
        self._create_error_response: Any = None

    @property
    def is_dead(self) -> bool:
        """True once vLLM says so; also known before it says so to anybody who waits."""
        return self._client is not None and bool(self._client.errored)

    async def start(self) -> None:
        """Starts vLLM's processes and loads the model. Raises EngineArgumentError, or what vLLM raises."""
        arguments = self._arguments()
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.entrypoints.launchers.api_server.app_state import init_app_state
        from vllm.entrypoints.serve import create_error_response
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.async_llm import AsyncLLM

        self._create_error_response = create_error_response
        parsed = self._parse(arguments)
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
        log.info("engine_ready", models=self.models, urls=sorted(self.urls), window=self.window)

    async def run(self, url: str, body: str, headers: Mapping[str, str] | None = None) -> Answer:
        """Runs one request through the handler of its endpoint."""
        try:
            request = self._types[url].validate_json(body)
        except (pydantic.ValidationError, RecursionError) as error:
            return self._refusal(error)
        if self.is_dead:
            raise EngineDeadError("the engine is dead")
        try:
            response = await self._handlers[url](request, _http_request(headers))
        except Exception as error:  # noqa: BLE001 - a handler may raise anything; vLLM maps it to its error response
            response = self._create_error_response(error)
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            # Some handlers turn a cancellation into an error response. Whoever cancelled wants no answer.
            raise asyncio.CancelledError
        answer = _answer(response)
        if answer.status_code >= 500:
            # Let the client's monitor take note of a death that a request was told of first.
            await asyncio.sleep(0)
            if self.is_dead or _says_dead(answer.body):
                raise EngineDeadError(answer.body[:500])
        return answer

    async def stop(self) -> None:
        """Ends vLLM's processes."""
        if self._client is not None:
            self._client.shutdown(timeout=self._shutdown_timeout_s)

    def _arguments(self) -> list[str]:
        given = shlex.split(self._settings.engine_args)
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
                raise EngineArgumentError(f"BATCH_ENGINE_ARGS: {message}")

        # The files are run-batch's own affair, but its parser insists on them.
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
        for url, (attribute, method, type_path) in ENDPOINTS.items():
            serving = getattr(state, attribute, None)
            if serving is None:
                continue
            module, name = type_path.split(":")
            self._types[url] = pydantic.TypeAdapter(getattr(import_module(module), name))
            self._handlers[url] = getattr(serving, method)
        self.urls = frozenset(self._handlers)

    def _refusal(self, error: Exception) -> Answer:
        """A body that is not what the endpoint takes, told as vLLM's HTTP server does."""
        field = None
        message = str(error)
        if isinstance(error, pydantic.ValidationError):
            first = error.errors(include_url=False, include_context=False)[0]
            field = ".".join(str(part) for part in first["loc"]) or None
            message = f"{field}: {first['msg']}" if field else first["msg"]
        response = self._create_error_response(
            message, HTTPStatus.BAD_REQUEST.phrase, HTTPStatus.BAD_REQUEST, param=field
        )
        return _answer(response)


def _http_request(headers: Mapping[str, str] | None) -> Any:
    """Headers as the handlers look for them, in the request to vLLM's HTTP server that there is not."""
    if headers is None:
        return None
    from starlette.requests import Request

    return Request({"type": "http", "headers": [(name.encode(), value.encode()) for name, value in headers.items()]})


def _answer(response: Any) -> Answer:
    """Whatever a handler returns, as status and JSON text."""
    if hasattr(response, "body"):
        return Answer(response.status_code, bytes(response.body).decode(), *_tokens_in(response.body))
    error = getattr(response, "error", None)
    status = error.code if error is not None and hasattr(error, "code") and not hasattr(response, "usage") else 200
    usage = getattr(response, "usage", None)
    prompt = getattr(usage, "prompt_tokens", None) or getattr(usage, "input_tokens", None) or 0
    completion = getattr(usage, "completion_tokens", None) or getattr(usage, "output_tokens", None) or 0
    return Answer(int(status), response.model_dump_json(by_alias=True), prompt, completion)


def _tokens_in(body: bytes) -> tuple[int, int]:
    import json

    usage = json.loads(bytes(body)).get("usage") or {}
    return usage.get("prompt_tokens") or 0, usage.get("completion_tokens") or 0


def _says_dead(body: str) -> bool:
    return "EngineDeadError" in body or "EngineCore encountered an issue" in body
