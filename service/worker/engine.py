"""What the worker wants of an engine. Two implement it: vLLM and the simulated one."""

from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Protocol


class EngineDeadError(Exception):
    """The engine died. No result of any request: what was in it goes back to the queue."""


@dataclass(frozen=True)
class Answer:
    """What the endpoint answered: an HTTP status and a body of JSON text. 4xx and 5xx are error results."""

    status_code: int
    body: str
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Engine(Protocol):
    """An inference engine behind the OpenAI endpoints.

    Lives in one event loop: made, started, called and stopped there; `steps` and `is_dead` may be read from any thread.
    """

    @property
    def models(self) -> tuple[str, ...]:
        """Names that requests may give as `model`, LoRA adapters included. Known once started."""

    @property
    def urls(self) -> Set[str]:
        """Endpoints it answers, as `/v1/chat/completions`. Known once started."""

    @property
    def window(self) -> int:
        """How many requests to keep in it so that it is never idle: a few times what it runs at once."""

    @property
    def steps(self) -> int:
        """Counts the engine's steps: it moves while this grows."""

    @property
    def is_dead(self) -> bool:
        """True once the engine has failed for good."""

    async def start(self) -> None:
        """Loads the model. Returns when requests can run."""

    async def run(self, url: str, body: str, headers: Mapping[str, str] | None = None) -> Answer:
        """Runs one request, given as its JSON text. Cancelling the call aborts it in the engine.

        `headers` are those that an HTTP client would send: `x-request-id`, `traceparent`.

        What the endpoint refuses is an Answer with a 4xx. Raises EngineDeadError when the engine died meanwhile.
        """

    async def stop(self) -> None:
        """Ends the engine and all its processes."""
