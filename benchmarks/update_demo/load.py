"""The load of the demonstration: clients that never stop asking, and what each answer was worth."""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass, field

import numpy as np

from benchmarks.demo.windows import INPUT, MODEL, OUTPUT, held_out
from bmoe.client import Client
from bmoe.protocol.errors import BmoeError

RECENT = 400


@dataclass
class Seen:
    """One answer: when, how long it took, by which version, how many of its rows were right."""

    at: float
    ms: float
    version: str
    rows: int
    correct: int


@dataclass
class Load:
    """Held-out windows at a steady pace over several connections, until `stop`."""

    url: str
    connections: int
    per_second: float
    rows: int
    seen: list[Seen] = field(default_factory=list)
    failures: deque[str] = field(default_factory=lambda: deque(maxlen=RECENT))
    failed: int = 0

    def start(self) -> None:
        """Begin to ask."""
        self._windows, self._labels = held_out()
        self._stopping = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(i,), daemon=True) for i in range(self.connections)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End; every request that was sent is answered or has failed."""
        self._stopping.set()
        for thread in self._threads:
            thread.join()

    def accuracy(self, version: int) -> float:
        """The share of rows that a version's answers got right; NaN without any."""
        found = [s for s in list(self.seen) if s.version == str(version)]
        rows = sum(s.rows for s in found)
        return sum(s.correct for s in found) / rows if rows else float("nan")

    def served(self, version: int) -> int:
        """How many rows a version has answered."""
        return sum(s.rows for s in list(self.seen) if s.version == str(version))

    def p99_ms(self, since: float, until: float = float("inf")) -> float:
        """The 99th percentile of what clients waited between two times, in ms; NaN without an answer."""
        found = [s.ms for s in list(self.seen) if since <= s.at < until]
        return float(np.percentile(found, 99)) if found else float("nan")

    def _ask(self, index: int) -> None:
        client, dice = Client(self.url), np.random.default_rng(index)
        pause = self.connections / self.per_second
        due = time.monotonic() + pause * dice.random()
        while not self._stopping.wait(max(0.0, due - time.monotonic())):
            due = max(due + pause, time.monotonic() - pause)
            chosen = dice.integers(len(self._labels), size=self.rows)
            began = time.monotonic()
            try:
                answer = client.infer(MODEL, {INPUT: self._windows[chosen]})
            except BmoeError as error:
                self.failed += 1
                self.failures.append(str(error))
                continue
            now = time.monotonic()
            right = int((answer.outputs[OUTPUT].argmax(axis=1) == self._labels[chosen]).sum())
            self.seen.append(Seen(now, 1000 * (now - began), answer.version, self.rows, right))
        client.close()
