"""Rejections: what the ledger engine took from us and the rules refused. It is on disk, and has no effect at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import structlog

from bmoe.ledger.rules.entries import Entry, Opened, Rejected, Verdict, parse_entry
from bmoe.ledger.rules.fold import Applied
from bmoe.protocol.errors import BmoeError

log = structlog.get_logger("gateway")
# The kind of the entry refused, the task that it was about, and why.
Handler = Callable[[type[Entry], bytes, str], None]


class Rejections:
    """Looks for them in what is folded, names them in the log, and tells whoever must know of one of `author`'s."""

    def __init__(self, author: str) -> None:
        self._author = author
        self._handler: Handler | None = None

    def tell(self, handler: Handler) -> None:
        """Whom to tell from now on."""
        self._handler = handler

    def on_applied(self, position: int, applied: Applied) -> None:
        """Look at one stream message."""
        facts = [event.facts for event in applied.events if event.kind == "rejected"]
        for one in facts:
            log.error("entry_rejected", position=position, **one)
        if facts and self._handler is not None:
            for kind, task, reason in rejected_of(self._author, applied):
                self._handler(kind, task, reason)


def rejected_of(author: str, applied: Applied) -> Iterator[tuple[type[Entry], bytes, str]]:
    """The tasks of an author's slots and verdicts that one stream message should have entered, and did not."""
    if applied.frame is None or applied.frame.header.author != author:
        return
    for data, entry in zip(applied.frame.entries, applied.entries, strict=True):
        if not isinstance(entry, Rejected):
            continue
        try:
            meant = parse_entry(data)
        except BmoeError:  # none of this version's
            continue
        if isinstance(meant, Opened):
            for task, _, _ in meant.tasks:
                yield Opened, task, entry.reason
        elif isinstance(meant, Verdict) and meant.outcome != "abandoned":  # that one is itself the end of a slot
            yield Verdict, meant.task, entry.reason
