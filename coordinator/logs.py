"""Structured logs of the gateway's processes: one JSON object a line on stderr, with task and verdict ids."""

from __future__ import annotations

import logging
import sys
from typing import Any

import structlog


def set_up_logs(process: str, level: int = logging.INFO) -> None:
    """Send structlog and the standard library's logging to stderr as JSON lines."""
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    structlog.configure(
        processors=[*shared, structlog.processors.format_exc_info, structlog.processors.JSONRenderer()],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(process=process)
    formatter = structlog.stdlib.ProcessorFormatter(
        processor=structlog.processors.JSONRenderer(), foreign_pre_chain=[*shared, structlog.stdlib.add_logger_name]
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    # asyncio says of every TLS connection that ends that a return value of a library had no effect.
    logging.getLogger("asyncio").setLevel(logging.ERROR)
