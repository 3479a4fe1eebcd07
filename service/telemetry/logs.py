"""Structured logs: one JSON object per line, with the event's stable name under `event`."""

import logging
import random
import sys
from collections.abc import Mapping
from typing import Any

import structlog

# Identifies a call in the logs of every process that serves it: gRPC metadata, sent by the client or generated here.
CALL_ID_HEADER = "x-request-id"
MAX_CALL_ID = 128

# Added to every event of this process.
_identity: dict[str, str] = {}


def configure(process: str, level: str = "INFO") -> None:
    """Writes our events and those of all libraries to stderr as JSON lines, each with the process's name."""
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]

    def add_process(_: object, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
        return {"process": process} | _identity | dict(event)

    structlog.configure(
        processors=[*shared, add_process, structlog.processors.JSONRenderer(default=str)],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level)),
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, structlog.stdlib.add_logger_name],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                add_process,
                structlog.processors.JSONRenderer(default=str),
            ],
        )
    )
    logging.basicConfig(handlers=[handler], level=max(getattr(logging, level), logging.WARNING), force=True)


def identify(**fields: str) -> None:
    """Adds `fields` to every event of this process from now on."""
    _identity.update(fields)


def call_id(metadata: Mapping[str, Any]) -> str:
    """The call's id: the client's, or a new one."""
    given: str = metadata.get(CALL_ID_HEADER, "")
    return given[:MAX_CALL_ID] or f"{random.getrandbits(128):032x}"


def get(name: str) -> structlog.typing.FilteringBoundLogger:
    """A logger whose events carry `name` as their `subject`."""
    logger: structlog.typing.FilteringBoundLogger = structlog.get_logger(subject=name)
    return logger
