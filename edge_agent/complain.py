"""Complaints: what a device does when its output is dropped or misjudged: it asks the validators to compute again.

For every output the task message is kept, within bounds and in memory, until the coordinator's notice settles it.
Pure but for what it remembers; the time is an argument.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass

# What a verdict says of an output that it does not count as right: dissenting, or unusable.
AGAINST_US = ("d", "u", "dissent", "unusable", "invalid")


@dataclass
class Open:
    """An output whose verdict we do not know yet. `reported_in` is the connection in which the broker took it."""

    deadline_ms: int
    root: bytes
    message: bytes
    reported_in: int = 0
    reported_ms: int = 0


@dataclass(frozen=True)
class Claim:
    """A complaint to make: for which task, why, and the task message that came with it."""

    task: bytes
    reason: str
    message: bytes


class Complaints:
    """The outputs that wait for their notice, and which of them to complain about, at most so many a minute."""

    def __init__(self, *, size: int, per_minute: int, wait_ms: int) -> None:
        self._size, self._per_minute, self._wait_ms = size, per_minute, wait_ms
        self._open: OrderedDict[bytes, Open] = OrderedDict()
        self._bytes = 0
        self._made: deque[int] = deque()
        self.suppressed = 0

    def __len__(self) -> int:
        return len(self._open)

    def watch(self, task: bytes, deadline_ms: int, root: bytes, message: bytes) -> None:
        """Remember an output that we signed; the oldest are forgotten when their task messages grow too many."""
        if not self._per_minute or len(message) > self._size:
            return
        self._open[task] = Open(deadline_ms, root, message)
        self._bytes += len(message)
        while self._bytes > self._size:
            self._close(next(iter(self._open)))

    def reported(self, task: bytes, connection: int, now_ms: int) -> None:
        """The broker has acknowledged the output, in the connection of that number (from 1)."""
        if task in self._open:
            self._open[task].reported_in, self._open[task].reported_ms = connection, now_ms

    def judge(self, task: bytes, stance: str, output_root: bytes, now_ms: int) -> Claim | None:
        """A verdict settles its output: a claim if it shows another output as ours, or holds ours to be wrong."""
        known = self._close(task)
        if known is None:
            return None
        wrong = output_root != known.root or stance in AGAINST_US
        return self._claim(task, "misjudged", known, now_ms) if wrong else None

    def overdue(self, connection: int, now_ms: int) -> list[Claim]:
        """Claims for outputs that came in time, on the connection that still stands, and that nobody speaks of.

        What was reported late, or before the connection broke, proves nothing: the notice may have been lost.
        `connection` is the number of the one that stands, 0 for none.
        """
        claims = []
        for task, known in list(self._open.items()):
            if now_ms <= known.deadline_ms + self._wait_ms:
                continue
            self._close(task)
            in_time = 0 < known.reported_ms <= known.deadline_ms
            if in_time and connection and known.reported_in == connection:
                claims.append(self._claim(task, "missing", known, now_ms))
        return [claim for claim in claims if claim is not None]

    def _claim(self, task: bytes, reason: str, known: Open, now_ms: int) -> Claim | None:
        while self._made and not now_ms - 60_000 < self._made[0] <= now_ms:  # or made before the clock was set back
            self._made.popleft()
        if len(self._made) >= self._per_minute:
            self.suppressed += 1
            return None
        self._made.append(now_ms)
        return Claim(task, reason, known.message)

    def _close(self, task: bytes) -> Open | None:
        known = self._open.pop(task, None)
        if known is not None:
            self._bytes -= len(known.message)
        return known
