"""Plain-text logs in which no peer's text can begin a line of its own or speak to a terminal."""

from __future__ import annotations

import logging
import sys

from bmoe.protocol.text import escaped


class OneLine(logging.Formatter):
    """A formatter that shows control characters instead of obeying them; tracebacks keep their lines."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The record's text, on one line."""
        record.message = escaped(record.message)
        return super().formatMessage(record)


def set_up_plain_logs(level: str, form: str, dates: str | None = None) -> None:
    """Send every logger's lines to standard error, in the given form."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(OneLine(form, dates))
    logging.basicConfig(level=level, handlers=[handler])
