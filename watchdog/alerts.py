"""Alerts through Sentry: one per incident, grouped by cause. Without a DSN nothing is sent."""

from collections.abc import Mapping
from pathlib import Path
from traceback import extract_tb
from typing import Any

from service.config import Settings

SHUTDOWN_TIMEOUT_S = 2.0


class Alerts:
    """Sends Sentry events. Pass only evidence, reasons and timings in `told`: no secrets, no prompts."""

    def __init__(self, settings: Settings) -> None:
        self._client = None
        if not settings.sentry_dsn:
            return
        # Only here: it is a sixth of what a watchdog imports.
        import sentry_sdk

        self._client = sentry_sdk.Client(
            dsn=settings.sentry_dsn.get_secret_value(),
            environment=settings.environment,
            # Send only what `tell` passes: no request bodies, local variables, log lines or arguments.
            default_integrations=False,
            auto_enabling_integrations=False,
            include_local_variables=False,
            max_breadcrumbs=0,
            server_name="",
            shutdown_timeout=SHUTDOWN_TIMEOUT_S,
        )

    def tell(self, kind: str, cause: str, worker_id: str, level: str, message: str, told: Mapping[str, Any]) -> None:
        """Queues one event, grouped by kind and cause (a verdict), without waiting for the network."""
        if self._client is None:
            return
        import sentry_sdk

        with sentry_sdk.new_scope() as scope:
            scope.set_client(self._client)
            scope.fingerprint = [kind, cause]
            scope.set_tag("kind", kind)
            scope.set_tag("cause", cause)
            scope.set_tag("worker_id", worker_id)
            scope.set_context("recovery", dict(told))
            scope.capture_message(message, level=level)  # type: ignore[arg-type]

    def fault(self, where: str, error: Exception) -> None:
        """Reports a bug in the watchdog, without the exception's text, which may contain anything; the log has it."""
        frames = [
            f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in extract_tb(error.__traceback__)
        ]
        name = type(error).__name__
        self.tell("watchdog_error", name, where, "error", f"{where} failed: {name}", {"frames": frames})

    def close(self) -> None:
        """Sends queued events, for at most SHUTDOWN_TIMEOUT_S."""
        if self._client is not None:
            self._client.close(timeout=SHUTDOWN_TIMEOUT_S)
