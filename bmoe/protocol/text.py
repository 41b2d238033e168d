"""Text that may be shown to people as it is, and what is made of text that may not. Standard library only."""

from __future__ import annotations

import re

_UNPLAIN = re.compile("[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ud800-\udfff\ufeff\ufff9-\ufffb]")


def is_plain(value: str) -> bool:
    """Whether a text is free of control characters, line separators, bidirectional overrides and lone surrogates.

    By a list of our own: what Python calls printable depends on its version, and every validator must say the same.
    """
    return (value.isascii() and value.isprintable()) or _UNPLAIN.search(value) is None


def plain(value: object, limit: int = 200) -> str:
    """A text that fits a text field: what may not stand in one is shown as '?', and the rest is cut off."""
    return _UNPLAIN.sub("?", str(value))[:limit]


def escaped(value: str) -> str:
    """A text on one line, with what may not stand in a text field spelled as escapes: for logs."""
    return _UNPLAIN.sub(lambda found: found.group().encode("unicode_escape").decode(), value)
