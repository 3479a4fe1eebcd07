"""The interface of an engine, implemented by vLLM's adapter and the simulated engine."""

from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Protocol

from service.worker.engine.cause import Cause


class EngineDeadError(Exception):
    """The engine died. Its requests have no result and go back to the queue."""


class EngineStartError(Exception):
    """The engine did not start. `cause` explains why in one line."""

    def __init__(self, cause: Cause) -> None:
        super().__init__(str(cause))
        self.cause = cause


@dataclass(frozen=True)
class Answer:
    """The endpoint's answer: HTTP status and JSON body. 4xx and 5xx are error results.

    The tokens are those of its `usage`: cached ones are part of the prompt's, reasoning ones of the completion's.
    """

    status_code: int
    body: str
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0


class Engine(Protocol):
    """An inference engine behind the OpenAI endpoints.

    Create, start, call and stop it in one event loop; `steps` and `is_dead` may be read from any thread.
    """

    @property
    def models(self) -> tuple[str, ...]:
        """Valid values of `model` in requests, LoRA adapters included. Known once started."""

    @property
    def urls(self) -> Set[str]:
        """Endpoints that it serves, such as `/v1/chat/completions`. Known once started."""

    @property
    def window(self) -> int:
        """How many requests to keep in the engine so that it is never idle: a few times what it runs at once."""

    @property
    def concurrency(self) -> int:
        """How many requests it runs at once, at most `window`; the others in it have not begun."""

    @property
    def steps(self) -> int:
        """Number of engine steps so far: the engine makes progress while it grows."""

    @property
    def is_dead(self) -> bool:
        """True once the engine has failed for good."""

    async def start(self) -> None:
        """Loads the model. Returns when requests can run. Raises EngineStartError."""

    async def run(self, url: str, body: str, headers: Mapping[str, str] | None = None) -> Answer:
        """Runs one request, given as JSON text. Cancelling the call aborts it in the engine.

        `headers` are those that an HTTP client would send: `x-request-id`, `traceparent`.

        A request that the endpoint refuses gets an Answer with a 4xx. Raises EngineDeadError if the engine dies.
        """

    async def death_cause(self) -> Cause:
        """Returns why the engine died. Call once it is dead and before `stop`; may take a few seconds."""

    async def stop(self) -> None:
        """Stops the engine and all its processes."""
