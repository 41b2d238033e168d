"""Plans on disk, with what the ledger does not say of a rollout. Without them it goes on with a plan of defaults.

Where a rollout goes next is kept here before it is entered on the ledger: who was killed in between enters it then.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import structlog

from bmoe.ledger.rules.entries import Rollout
from bmoe.protocol.errors import InputError
from bmoe.protocol.files import write_durably
from coordinator.rollout.machine import ENDED, UNDER_WAY, Progress
from coordinator.rollout.plan import Plan, parse_plan

log = structlog.get_logger("rollout")
KEPT = 64


class Plans:
    """The plan and progress of each rollout by its id, and who has said that it holds the version; written whole."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rows: dict[str, dict[str, Any]] = {}
        try:
            rows = json.loads(path.read_bytes())
            self._rows = {str(name): dict(row) for name, row in rows.items()}
        except FileNotFoundError:
            pass
        except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
            log.warning("rollout_plans_unreadable", error=str(error))

    def plan(self, rollout: bytes) -> Plan:
        """The plan of a rollout, or that of defaults."""
        try:
            return parse_plan(self._kept(rollout, "plan"))
        except InputError as error:
            log.warning("rollout_plans_unreadable", error=str(error))
            self._rows[rollout.hex()]["plan"] = {}  # told once: it is asked for each second
            return Plan()

    def progress(self, entry: Rollout) -> Progress:
        """Where a rollout stands: as the ledger has it, or one step ahead where that step was kept and never entered."""
        known = Progress(stage=entry.stage, wave=tuple(entry.wave), reason=entry.reason)
        kept = self._kept(entry.rollout, "progress")
        try:
            before = Progress(
                str(kept["stage"]), tuple(map(str, kept["wave"])), str(kept["reason"]), _seconds(kept["waited"]),
                _seconds(kept["watched"]), str(kept["before"]),
            )  # fmt: skip
        except (LookupError, TypeError, InputError):
            return known
        if before.before not in UNDER_WAY or before.wave[: len(known.wave)] != known.wave:
            return known
        if before.stage == known.stage and before.wave == known.wave:
            return replace(before, reason=known.reason)
        return before if _ahead(before, known) else known

    def holders(self, rollout: bytes) -> list[str]:
        """Who had said that it holds the version."""
        found = self._rows.get(rollout.hex(), {}).get("holders")
        return [name for name in found if isinstance(name, str)] if isinstance(found, list) else []

    def put(self, rollout: bytes, plan: Plan, progress: Progress, holders: Iterable[str] = ()) -> None:
        """Keep it all, durably; may raise OSError. Of the ended ones the oldest go first."""
        values = {**asdict(progress), "wave": list(progress.wave)}
        self._rows.pop(rollout.hex(), None)
        row = {"plan": plan.to_json(), "progress": values, "holders": sorted(holders)}
        self._rows[rollout.hex()] = json.loads(json.dumps(row))
        while len(self._rows) > KEPT:
            ended = (name for name in self._rows if self._stage(name) in ENDED)
            del self._rows[next(ended, next(iter(self._rows)))]
        write_durably(self._path, json.dumps(self._rows).encode(), mode=0o600)

    def _kept(self, rollout: bytes, what: str) -> dict[str, Any]:
        found = self._rows.get(rollout.hex(), {}).get(what)
        return found if isinstance(found, dict) else {}

    def _stage(self, name: str) -> object:
        progress = self._rows[name].get("progress")
        return progress.get("stage") if isinstance(progress, dict) else None


def _ahead(kept: Progress, known: Progress) -> bool:
    """Whether what is kept may follow what is entered. Only a new word of the operator ends a pause."""
    if kept.stage in ENDED:
        return kept.stage != "done" or known.stage == "all"
    if known.stage not in UNDER_WAY:
        return False
    if kept.stage == "paused":
        return True
    if kept.stage not in UNDER_WAY:
        return False
    return UNDER_WAY.index(kept.stage) - UNDER_WAY.index(known.stage) == (1 if known.wave else 0)


def _seconds(value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value) or value < 0:
        raise InputError(f"seconds are a number of at least 0, found {value!r}")
    return float(value)
