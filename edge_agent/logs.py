"""The agent's log: one event a line on standard error, as key=value pairs or as a JSON object."""

from __future__ import annotations

import logging
import sys
from typing import Any

from bmoe.protocol.oneline import OneLine


class Event(str):
    """The text of one log line, which remembers what it was made of."""

    facts: dict[str, Any]


def event(name: str, /, **facts: Any) -> Event:
    """One log line. In text, values with spaces, quotes or control characters are quoted."""
    made = Event(" ".join((f"event={name}", *(f"{key}={_shown(value)}" for key, value in facts.items()))))
    made.facts = {"event": name, **facts}
    return made


def _shown(value: Any) -> str:
    text = _text(value)
    plain = text and text.isprintable() and not any(character in text for character in ' "=')
    return text if plain else '"' + text.replace("\\", "\\\\").replace('"', "'").encode("unicode_escape").decode() + '"'


class _Json(logging.Formatter):
    """Lines in the form of the gateway's: `timestamp`, `level`, `event` and the facts."""

    def format(self, record: logging.LogRecord) -> str:
        """One record as one line of JSON."""
        import json

        facts = record.msg.facts if isinstance(record.msg, Event) else {"event": record.getMessage()}
        plain = {key: v if type(v) in (int, float, bool) else _text(v) for key, v in facts.items()}
        if record.exc_info:
            plain["exception"] = self.formatException(record.exc_info)
        stamp = self.formatTime(record, "%Y-%m-%dT%H:%M:%S") + f".{int(record.msecs):03d}Z"
        return json.dumps({**plain, "level": record.levelname.lower(), "timestamp": stamp})


def _text(value: Any) -> str:
    return value.hex() if isinstance(value, bytes) else str(value)


def set_up(level: str, form: str = "text") -> None:
    """Send every logger's lines to standard error. systemd adds the time to text; elsewhere we do."""
    import os

    stamp = "" if "JOURNAL_STREAM" in os.environ else "time=%(asctime)s.%(msecs)03dZ "
    lines = OneLine(f"{stamp}level=%(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%S")
    logging.Formatter.converter = staticmethod(_utc)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json() if form == "json" else lines)
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


def _utc(seconds: float | None = None) -> Any:
    import time

    return time.gmtime(seconds)
