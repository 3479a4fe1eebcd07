"""A logits processor that records each request that enters the engine: a line with process and number.

It measures how many requests run again: `"vllm_xargs": {"number": 7}` in a body, `COUNT_FILE` in the environment.
"""

import os
from typing import Any

from vllm.v1.sample.logits_processor import LogitsProcessor


class CountRequests(LogitsProcessor):  # type: ignore[misc]
    """Inspects the requests that enter the engine's batch."""

    def __init__(self, vllm_config: Any, device: Any, is_pin_memory: bool) -> None:
        self._file = os.open(os.environ["COUNT_FILE"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def apply(self, logits: Any) -> Any:
        return logits

    def is_argmax_invariant(self) -> bool:
        return True

    def update_state(self, batch_update: Any) -> None:
        numbers = [(added[1].extra_args or {}).get("number") for added in batch_update.added] if batch_update else []
        text = "".join(f"{os.getpid()} {number}\n" for number in numbers if number is not None)
        if text:
            os.write(self._file, text.encode())
