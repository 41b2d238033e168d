"""The agent's log: one line of key=value pairs an event, on standard error."""

from __future__ import annotations

import logging
import sys
from typing import Any


def event(name: str, /, **facts: Any) -> str:
    """The text of one log line. Values with spaces, quotes or control characters are quoted."""
    return " ".join((f"event={name}", *(f"{key}={_shown(value)}" for key, value in facts.items())))


def _shown(value: Any) -> str:
    text = value.hex() if isinstance(value, bytes) else str(value)
    plain = text and text.isprintable() and not any(character in text for character in ' "=')
    return text if plain else '"' + text.replace("\\", "\\\\").replace('"', "'").encode("unicode_escape").decode() + '"'


def set_up(level: str) -> None:
    """Send every logger's lines to standard error. systemd adds the time; elsewhere we do."""
    import os

    stamp = "" if "JOURNAL_STREAM" in os.environ else "time=%(asctime)s.%(msecs)03dZ "
    logging.Formatter.converter = staticmethod(_utc)
    logging.basicConfig(
        level=level.upper(),
        stream=sys.stderr,
        format=f"{stamp}level=%(levelname)s %(message)s",
        datefmt="%Y-%m-%dT%H:%M:%S",
    )


def _utc(seconds: float | None = None) -> Any:
    import time

    return time.gmtime(seconds)
