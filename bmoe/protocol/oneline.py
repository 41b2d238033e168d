"""Plain-text logs in which no peer's text can begin a line of its own or speak to a terminal."""

from __future__ import annotations

import logging

from bmoe.protocol.text import escaped


class OneLine(logging.Formatter):
    """A formatter that shows control characters instead of obeying them; tracebacks keep their lines."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The record's text, on one line."""
        record.message = escaped(record.message)
        return super().formatMessage(record)
