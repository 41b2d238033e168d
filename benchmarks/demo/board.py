"""What is known while the demonstration runs: filled by its steps, shown by its view, judged at its end."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

OUT_OF_SERVICE = ("quarantined", "revoked")


@dataclass
class Phase:
    """One pass of the client over some windows under one policy."""

    name: str
    policy: str
    total: int = 0
    rows: int = 0
    correct: int = 0
    requests: int = 0
    failed: list[str] = field(default_factory=list)
    latencies_ms: list[float] = field(default_factory=list)
    last_request: str = ""
    began: float = 0.0
    ended: float = 0.0

    @property
    def accuracy(self) -> float | None:
        """Of the rows answered so far."""
        return self.correct / self.rows if self.rows else None

    @property
    def seconds(self) -> float:
        """From the first request's sending to the last answer, or to now."""
        return (self.ended or time.monotonic()) - self.began if self.began else 0.0

    def note(self, line: dict[str, Any]) -> None:
        """Count one line of the client's."""
        if "error" in line:
            self.failed.append(line["error"])
            return
        self.rows += line["rows"]
        self.correct += line["correct"]
        self.requests += 1
        self.latencies_ms.append(line["ms"])
        self.last_request = line["request"]


@dataclass
class Board:
    """Everything that is shown and judged. `say` tells a step or an event, as it happens."""

    seed: int
    attack: str
    liars: tuple[str, ...]
    say: Callable[[str], None] = print
    began: float = field(default_factory=time.monotonic)
    step: str = ""
    step_began: float = 0.0
    times: dict[str, float] = field(default_factory=dict)
    clean: float | None = None
    unverified: Phase = field(default_factory=lambda: Phase("unverified", "single"))
    verified: Phase = field(default_factory=lambda: Phase("verified", "referee"))
    agents: list[dict[str, Any]] = field(default_factory=list)
    statistics: dict[str, Any] = field(default_factory=dict)
    executions_per_task: float = 0.0
    audited: bool = False
    flipped_refused: bool = False
    usage: list[str] = field(default_factory=list)

    def enter(self, step: str) -> None:
        """A step begins; the one before it is timed."""
        now = time.monotonic()
        if self.step:
            self.times[self.step] = round(now - self.step_began, 1)
        self.step, self.step_began = step, now
        if step:
            self.say(step)

    def see(self, agents: list[dict[str, Any]], statistics: dict[str, Any]) -> None:
        """A new look at fleet and gateway; changes of standing are told."""
        before = {row["agent"]: row["standing"] for row in self.agents}
        for row in agents:
            was = before.get(row["agent"])
            if was not in (None, row["standing"]):
                kind = "liar" if row["agent"] in self.liars else "honest"
                self.say(f"{row['agent']} ({kind}): {was} -> {row['standing']}")
        self.agents, self.statistics = agents, statistics

    def out_of_service(self) -> set[str]:
        """Agents in quarantine or revoked."""
        return {row["agent"] for row in self.agents if row["standing"] in OUT_OF_SERVICE}

    def caught(self) -> int:
        """How many of the liars are out of service."""
        return len(self.out_of_service() & set(self.liars))
