"""Clocks of boards against our own: who is off by how much, told once, since a wrong clock makes a board refuse its tasks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Report = Callable[..., Any]
OFF_S = 10.0
GATEWAY_DO = "most boards differ alike, so it is this machine's clock: set it; boards refuse tasks until then"
LEDGER_DO = (
    "this machine's clock is behind the time that the ledger has reached: set it; boards refuse tasks until then"
)
AGENT_DO = "set the board's clock; it refuses its tasks until then, as expired or too far ahead"


class Clocks:
    """`skews` are the seconds by which each board's clock was ahead of ours when it last spoke."""

    def __init__(self, report: Report) -> None:
        self.skews: dict[str, float] = {}
        self._report = report
        self._off: set[str] = set()
        self._told = False

    def heard(self, agent: str, time_ms: int, now_ms: int) -> None:
        """A board said what time it is. On the way it lost less than a second, or the link is the trouble."""
        skew = self.skews[agent] = (time_ms - now_ms) / 1000
        if abs(skew) > OFF_S and agent not in self._off:
            self._off.add(agent)
            self._report("agent_clock_off", agent=agent, skew_s=round(skew), do=AGENT_DO)
        elif abs(skew) <= OFF_S and agent in self._off:
            self._off.discard(agent)
            self._report("agent_clock_right", agent=agent, skew_s=round(skew))
        self._judge_ourselves()

    def ledger_says(self, time_ms: int, now_ms: int) -> None:
        """The ledger has reached this time, which a quorum of validators has told: ours cannot be earlier and right."""
        if time_ms - now_ms > OFF_S * 1000:
            self._report("gateway_clock_off", boards=0, skew_s=round((now_ms - time_ms) / 1000), do=LEDGER_DO)

    def _judge_ourselves(self) -> None:
        """Two boards or more, most of them, off by about the same: then we are, and not they."""
        known = sorted(self.skews.values())
        middle = known[len(known) // 2]
        alike = sum(abs(skew - middle) <= OFF_S for skew in known)
        off = abs(middle) > OFF_S and alike >= 2 and 2 * alike > len(known)
        if off and not self._told:
            self._report("gateway_clock_off", boards=alike, skew_s=round(-middle), do=GATEWAY_DO)
        self._told = off
