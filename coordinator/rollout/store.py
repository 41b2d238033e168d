"""Plans on disk, with what the ledger does not say of a rollout. Without them it goes on with a plan of defaults."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import structlog

from bmoe.ledger.rules.entries import Rollout
from bmoe.protocol.errors import InputError
from bmoe.protocol.files import write_durably
from coordinator.rollout.machine import UNDER_WAY, Progress
from coordinator.rollout.plan import Plan, parse_plan

log = structlog.get_logger("rollout")
KEPT = 64


class Plans:
    """The plan and progress of each rollout by its id; small, and written whole."""

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
            return Plan()

    def progress(self, entry: Rollout, time_s: float) -> Progress:
        """Where a rollout stands: stage, wave and reason as the ledger has them, the rest as kept here."""
        kept = self._kept(entry.rollout, "progress")
        known = Progress(stage=entry.stage, wave=tuple(entry.wave), reason=entry.reason, since=time_s)
        if kept.get("stage") != entry.stage or kept.get("wave") != list(entry.wave):
            return known
        before = kept.get("before")
        numbers = [kept.get(name) for name in ("since", "held")]
        if before not in UNDER_WAY or not all(isinstance(number, int | float) for number in numbers):
            return known
        return replace(known, before=before, since=float(numbers[0] or 0), held=float(numbers[1] or 0))

    def _kept(self, rollout: bytes, what: str) -> dict[str, Any]:
        found = self._rows.get(rollout.hex(), {}).get(what)
        return found if isinstance(found, dict) else {}

    def put(self, rollout: bytes, plan: Plan, progress: Progress) -> None:
        """Keep both, durably."""
        row = {"plan": plan.to_json(), "progress": {**asdict(progress), "wave": list(progress.wave)}}
        self._rows[rollout.hex()] = json.loads(json.dumps(row))
        while len(self._rows) > KEPT:
            del self._rows[next(iter(self._rows))]
        write_durably(self._path, json.dumps(self._rows).encode(), mode=0o600)
