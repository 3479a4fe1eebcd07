"""Client of the vLLM batch server: `Client`, `AsyncClient` and the `CallError` that their calls raise.

Channels with TLS and tokens are in `vllm_batch.channel`, output formats in `vllm_batch.output`, the generated stubs in
`vllm_batch.v1`, the command line in `vllm_batch.cli`.
"""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

__all__ = ["DEFAULT_TARGET", "PATIENCE_S", "AsyncClient", "CallError", "Client", "Line", "SubmitOptions"]

if TYPE_CHECKING:
    from vllm_batch.async_client import AsyncClient
    from vllm_batch.channel import DEFAULT_TARGET
    from vllm_batch.client import Client
    from vllm_batch.errors import CallError
    from vllm_batch.retries import PATIENCE_S
    from vllm_batch.uploads import Line, SubmitOptions
else:
    # Imported on first use: every import of the generated messages runs this file, and most of them, the server's too,
    # need neither client, some not even gRPC. Hidden from type checkers, which would accept any name otherwise.
    _MODULES = {
        "AsyncClient": "async_client",
        "CallError": "errors",
        "Client": "client",
        "DEFAULT_TARGET": "channel",
        "Line": "uploads",
        "PATIENCE_S": "retries",
        "SubmitOptions": "uploads",
    }

    def __getattr__(name):
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)

    def __dir__():
        return sorted({*globals(), *__all__})
