"""What an operator wants of a rollout: which agents first, how many next, when, and what stops it. Pure."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from typing import Any

from bmoe.protocol.errors import InputError
from coordinator.rollout.health import Limits

DAY_MIN = 24 * 60
# An entry of the ledger has 16 KiB; a wave that is larger is not spelled out there whole.
WAVE_NAMES, WAVE_BYTES = 1024, 15_000
SELECTORS = ("name", "board", "owner", "label")
_WINDOW = re.compile(r"([01]\d|2[0-3]):([0-5]\d)-([01]\d|2[0-3]):([0-5]\d)")


@dataclass(frozen=True)
class Agent:
    """What the waves look at of one agent. `holds` says that the version is installed there, `refused` why it is not.

    `label` is the free text that its enrolment token carried (`bmoe token create --batch`).
    """

    name: str
    board: str = ""
    owner: str = ""
    label: str = ""
    online: bool = True
    fit: bool = True
    holds: bool = False
    refused: str = ""


@dataclass(frozen=True)
class Plan:
    """How a version is brought to the fleet. Times in seconds.

    `canary` is a number of agents, or selectors such as "board:Raspberry Pi 5", "label:lab", "owner:alice",
    "name:edge-01" that agents of the first wave meet, any of them. `windows` are times of day, UTC, outside of which no
    wave begins and no agent is told to install; a rollback waits for none. A wave is watched for `soak_s` in which its
    agents hold the version.
    """

    canary: tuple[str, ...] = ()
    canary_count: int = 1
    share: float = 0.25
    windows: tuple[str, ...] = ()
    soak_s: float = 60.0
    install_s: float = 900.0
    over: str = "auto"
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        """Raises InputError naming what cannot be."""
        for selector in self.canary:
            kind, colon, value = selector.partition(":")
            if kind not in SELECTORS or not colon or not value:
                raise InputError(
                    f"agents are selected by {', '.join(SELECTORS)} and a value (board:rpi5), found {selector!r}"
                )
        for window in self.windows:
            if not _WINDOW.fullmatch(window):
                raise InputError(f"an update window is spelled 22:00-04:30 (UTC), found {window!r}")
        if not (1 <= self.canary_count <= 1024 and 0 < self.share <= 1):
            raise InputError("expected at least one canary, and a share above 0 and at most 1")
        if not (0 <= self.soak_s <= 30 * 86_400 and 1 <= self.install_s <= 30 * 86_400):
            raise InputError("soak_s must be 0 to 30 days, install_s one second to 30 days")
        if self.over not in ("auto", "https"):
            raise InputError(f"releases go over auto (Flower where it is, else HTTPS) or https, found {self.over!r}")

    def to_json(self) -> dict[str, Any]:
        """Plain values, for `parse_plan`."""
        return asdict(self)


def parse_plan(given: Mapping[str, Any]) -> Plan:
    """A plan of plain values, what is not given at its default. Raises InputError for unknown keys and wrong types."""
    return _typed(Plan, {**given, "limits": _typed(Limits, given.get("limits") or {})})


def _typed(cls: type[Any], given: Mapping[str, Any]) -> Any:
    known = {f.name: f for f in fields(cls)}
    if not isinstance(given, Mapping) or (strange := sorted(set(given) - set(known))):
        what = "limits" if cls is Limits else "plan"
        found = ", ".join(map(str, strange))[:80] if isinstance(given, Mapping) else repr(given)[:80]
        raise InputError(f"a rollout's {what} may have {', '.join(known)}; found {found}")
    values = {}
    for name, value in given.items():
        expected = str(known[name].type)
        if expected == "float" and type(value) is int:
            value = float(value)
        if expected.startswith("tuple"):
            fits = isinstance(value, list | tuple) and all(type(v) is str and len(v) <= 200 for v in value)
            value = tuple(value) if fits else value
        else:
            fits = type(value).__name__ == expected and (expected != "float" or math.isfinite(value))
        if not fits:
            raise InputError(f"{name} must be {expected}, found {str(value)[:80]!r}")
        values[name] = value
    return cls(**values)


def meets(agent: Agent, selectors: Iterable[str]) -> bool:
    """Whether an agent meets one of the selectors. A board is named by any part of what it says it is."""
    for selector in selectors:
        kind, _, value = selector.partition(":")
        if kind == "board" and value.casefold() in agent.board.casefold():
            return True
        if kind != "board" and getattr(agent, kind) == value:
            return True
    return False


def open_now(windows: tuple[str, ...], time_s: float) -> bool:
    """Whether a wave may begin at a time (seconds since 1970): always without windows; one may run past midnight."""
    now = datetime.fromtimestamp(time_s, UTC)
    minute = 60 * now.hour + now.minute
    for window in windows:
        found = _WINDOW.fullmatch(window)
        assert found is not None
        hours = [int(group) for group in found.groups()]
        begin, end = 60 * hours[0] + hours[1], 60 * hours[2] + hours[3]
        if (minute - begin) % DAY_MIN < ((end - begin) % DAY_MIN or DAY_MIN):
            return True
    return not windows


def first_wave(plan: Plan, agents: Iterable[Agent]) -> list[str]:
    """The canaries: fit agents that are online, those that meet the selectors, or as many as were asked for."""
    fit = sorted((a for a in agents if a.fit and a.online), key=lambda a: a.name)
    chosen = [a for a in fit if meets(a, plan.canary)] if plan.canary else fit
    return _fitting([a.name for a in chosen[: None if plan.canary else plan.canary_count]])


def second_wave(plan: Plan, wave: Iterable[str], agents: Iterable[Agent]) -> list[str]:
    """The wave grown to the plan's share of the fit agents, those online first; never smaller than it was."""
    fit = sorted((a for a in agents if a.fit), key=lambda a: (not a.online, a.name))
    before = list(wave)
    more = [a.name for a in fit if a.name not in set(before)]
    return _fitting(before + more[: max(0, math.ceil(plan.share * len(fit)) - len(before))])


def check_met(plan: Plan, agents: Iterable[Agent]) -> None:
    """Raise InputError for a selector that no agent in service meets, online or not: its canaries would never come."""
    fit = [agent for agent in agents if agent.fit]
    for selector in plan.canary:
        if not any(meets(agent, (selector,)) for agent in fit):
            kind = selector.partition(":")[0]
            there = ", ".join(sorted({getattr(agent, kind) for agent in fit} - {""})) or "none"
            raise InputError(f"no agent in service meets {selector!r}; of {kind} there are: {there[:200]}")


def _fitting(names: list[str]) -> list[str]:
    """As many of the names as an entry has room for."""
    room, count = WAVE_BYTES, 0
    for name in names[:WAVE_NAMES]:
        room -= len(name) + 2
        if room < 0:
            break
        count += 1
    return names[:count]
