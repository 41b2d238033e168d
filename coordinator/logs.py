"""Structured logs of the gateway's processes: one event a line on stderr, as JSON or as key=value pairs.

Every line carries `timestamp`, `level`, `event` and `process`. A task, and so its verdict, is always `task`; a request,
and so its answer, is `request`; both in hexadecimal. Nothing secret is handed to a logger, and lines are cut in length.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections import Counter, OrderedDict
from collections.abc import Hashable
from typing import Literal

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

VALUE_MAX = 2000  # characters of one value: what comes from outside must not fill the disk
# How often each documented event was logged, by level: what /metrics shows of it.
counts: Counter[tuple[str, str]] = Counter()


def set_up_logs(process: str, level: str = "info", form: Literal["json", "text"] = "json") -> None:
    """Send structlog and the standard library's logging to stderr. Doing it again replaces what was set."""
    severity = logging.getLevelNamesMapping()[level.upper()]
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    end: list[Processor] = [structlog.processors.format_exc_info, _bounded, _renderer(form)]
    structlog.configure(
        processors=[_count, *shared, *end],
        wrapper_class=structlog.make_filtering_bound_logger(severity),
        logger_factory=lambda *_: _Lines(),
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(process=process)
    formatter = structlog.stdlib.ProcessorFormatter(
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *end],
        foreign_pre_chain=[*shared, structlog.stdlib.add_logger_name],
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    logging.basicConfig(level=max(severity, logging.WARNING), handlers=[handler], force=True)
    # asyncio says of every TLS connection that ends that a return value of a library had no effect.
    logging.getLogger("asyncio").setLevel(logging.ERROR)


class Seldom:
    """Lets a kind of line through once and then at most every ten seconds, so that a flood cannot fill the log."""

    def __init__(self, pause_s: float = 10.0, kinds_max: int = 4096) -> None:
        self._pause_s, self._kinds_max = pause_s, kinds_max
        self._told: OrderedDict[Hashable, tuple[float, int]] = OrderedDict()

    def due(self, kind: Hashable, now: float) -> int:
        """How many of a kind there were since one was told, this one included, if it may be told now; else 0."""
        at, held = self._told.get(kind, (-self._pause_s, 0))
        if now - at < self._pause_s:
            self._told[kind] = at, held + 1
            return 0
        self._told[kind] = now, 0
        self._told.move_to_end(kind)
        while len(self._told) > self._kinds_max:
            self._told.popitem(last=False)
        return held + 1


class _Lines:
    """Writes lines to stderr; on a disk that takes none, a line is lost and nothing else."""

    def _line(self, message: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # ValueError: closed, at the end of the process
            print(message, file=sys.stderr, flush=True)

    msg = log = debug = info = warn = warning = error = exception = critical = fatal = _line


def _renderer(form: str) -> Processor:
    if form == "json":
        return structlog.processors.JSONRenderer()
    logfmt = structlog.processors.LogfmtRenderer(key_order=["timestamp", "level", "event"], drop_missing=True)
    return lambda logger, method, event: logfmt(logger, method, {key: _plain(value) for key, value in event.items()})


def _plain(value: object) -> object:
    """Text that a terminal shows and does not obey: what others sent may hold escape sequences."""
    if not isinstance(value, str) or value.isprintable():
        return value
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in value)


def _count(_: WrappedLogger, method: str, event: EventDict) -> EventDict:
    counts[str(event["event"]), "error" if method == "exception" else method] += 1
    return event


def _bounded(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    long = {key: value for key, value in event.items() if type(value) is str and len(value) > VALUE_MAX}
    for key, value in long.items():
        # Of a stack trace the end says most.
        event[key] = "..." + value[-VALUE_MAX:] if key == "exception" else value[:VALUE_MAX] + "..."
    return event
