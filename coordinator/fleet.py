"""The fleet as the coordinator sees it: standing from the ledger, presence and load from MQTT.

The ledger is the source of truth; the TinyDB file is a view for operators, rebuilt from the ledger at every start.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import structlog
from tinydb import TinyDB
from tinydb.storages import Storage

from bmoe.ledger.rules.standing import Standing
from bmoe.ledger.rules.state import State
from bmoe.protocol.files import write_durably
from bmoe.protocol.messages import Health, Status
from coordinator.route import Eligible

log = structlog.get_logger("fleet")
SUSPICION_S = 60.0
LATENCIES_KEPT = 256
EVIDENCE_A_MINUTE = 10
WARNINGS_A_MINUTE = 20
# Each task in a row that an agent left unanswered counts as so many in hand: silence lowers the load given, no more.
SILENCE_WEIGHT = 8
SILENCE_MAX = 32


class DurableStorage(Storage):
    """TinyDB storage that replaces its file in one step, synced: after a crash the old view or the new one."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> dict[str, dict[str, Any]] | None:
        """The whole content; a damaged view is no loss, for the ledger has it all: it reads as empty."""
        try:
            return json.loads(self._path.read_bytes())
        except (FileNotFoundError, ValueError, RecursionError):
            return None

    def write(self, data: dict[str, dict[str, Any]]) -> None:
        """Replace the content."""
        write_durably(self._path, json.dumps(data, separators=(",", ":"), sort_keys=True).encode(), mode=0o600)


@dataclass
class Presence:
    """What MQTT tells of one agent now."""

    online: bool = False
    seen: float = 0.0
    load: int = 0
    status: Status | None = None
    latest: int = 0
    earlier: int = 0
    health: Health | None = None
    suspected_until: float = 0.0
    silent: int = 0
    latencies: deque[float] = field(default_factory=lambda: deque(maxlen=32))
    kept: deque[float] = field(default_factory=lambda: deque(maxlen=EVIDENCE_A_MINUTE))
    warned: deque[float] = field(default_factory=lambda: deque(maxlen=WARNINGS_A_MINUTE))

    def take(self, status: Status) -> bool:
        """Fold a status in by its author's sequence; False for one that is out of date.

        A last will is signed before its connection is, so its number is smaller than that of the birth which it ends:
        it counts unless it is older than the birth before that one. `latest` and `earlier` are those two.
        """
        newest = self.earlier + 1 if status.state == "lost" else self.latest
        if status.seq < newest:
            return False
        if status.state == "online" and status.seq > self.latest:
            self.earlier = self.latest
        self.latest = max(self.latest, status.seq)
        self.online, self.status = status.state == "online", status
        return True

    def may_warn(self, now: float) -> bool:
        """Whether one more refusal of this agent's is worth a warning: one that floods us must not fill the log."""
        if len(self.warned) == WARNINGS_A_MINUTE and now - self.warned[0] < 60:
            return False
        self.warned.append(now)
        return True

    def may_keep(self, now: float) -> bool:
        """Whether one more refused message of this agent may be kept as evidence: a liar must not fill the disk."""
        if len(self.kept) == EVIDENCE_A_MINUTE and now - self.kept[0] < 60:
            return False
        self.kept.append(now)
        return True


class Fleet:
    """Who may be asked, and how quick they have been."""

    def __init__(self, state: State, view: Path) -> None:
        self._state = state
        self.presence: dict[str, Presence] = {}
        self._latencies: dict[bytes, deque[float]] = {}
        # Experts of a version that is being rolled out: who holds it. All others are anybody's.
        self.holders: dict[bytes, frozenset[str]] = {}
        self._db = TinyDB(view, storage=DurableStorage)

    def of(self, agent: str) -> Presence:
        """The presence of an agent, made when first heard of."""
        return self.presence.setdefault(agent, Presence())

    def eligible(
        self, exclude: Iterable[str], *, standing: tuple[Standing, ...] | None = None, expert: bytes = b""
    ) -> list[Eligible]:
        """Agents online that may take a task: in service and not under suspicion, or of the standings named.

        A task for an expert of a version that is being rolled out is for those alone who hold it.
        """
        now, without, holders = time.monotonic(), set(exclude), self.holders.get(expert)
        found = []
        for agent, presence in self.presence.items():
            if not presence.online or agent in without or (holders is not None and agent not in holders):
                continue
            current = self._state.standing(agent)
            wanted = current.in_service and now >= presence.suspected_until if standing is None else current in standing
            if wanted:
                load = presence.load + SILENCE_WEIGHT * presence.silent
                found.append(Eligible(agent, self._state.members[agent].owner, current, load))
        return found

    def suspect(self, agent: str) -> None:
        """Stop asking an agent for a while, on our own word; its standing moves by the ledger alone."""
        self.of(agent).suspected_until = time.monotonic() + SUSPICION_S

    def unanswered(self, agent: str) -> None:
        """Note that a task closed without an agent's answer."""
        presence = self.of(agent)
        presence.load = max(0, presence.load - 1)
        presence.silent = min(presence.silent + 1, SILENCE_MAX)

    def answered(self, agent: str, expert: bytes, seconds: float) -> None:
        """Note how long an agent took."""
        self.of(agent).latencies.append(seconds)
        self.of(agent).silent = 0
        self._latencies.setdefault(expert, deque(maxlen=LATENCIES_KEPT)).append(seconds)

    def p95(self, expert: bytes) -> float | None:
        """The 95th percentile of recent answers for an expert in seconds, once there are enough to tell."""
        known = self._latencies.get(expert)
        if known is None or len(known) < 20:
            return None
        return sorted(known)[int(0.95 * (len(known) - 1))]

    def table(self) -> list[dict[str, Any]]:
        """One row an agent: ledger facts and presence."""
        return [self._row(name) for name in sorted(self._state.agents)]

    def _row(self, name: str) -> dict[str, Any]:
        record, member, presence = self._state.agents[name], self._state.members[name], self.of(name)
        row: dict[str, Any] = {
            "agent": name,
            "owner": member.owner,
            "standing": record.standing.value,
            "clean": record.clean,
            "refutations": record.refutations,
            "online": presence.online,
            "load": presence.load,
        }
        if presence.status is not None:
            row |= {"board": presence.status.board, "version": presence.status.version}
        if presence.health is not None:
            known = set(presence.health.known)
            names = {8: "cpu_percent", 9: "temperature_mc", 10: "memory_free_mb", 11: "throttled", 12: "queued"}
            row |= {n: getattr(presence.health, n) for k, n in names.items() if k in known}
        return row

    def save_view(self, rows: list[dict[str, Any]]) -> None:
        """Write the operators' view from `table()`; safe in a thread, for it looks at nothing else. May raise OSError."""
        self._db.storage.write({"_default": {str(i + 1): row for i, row in enumerate(rows)}})

    async def keep_view(self) -> None:
        """Write the operators' view every second, for ever. A full disk is borne: the ledger has it all."""
        saved = True
        while True:
            await asyncio.sleep(1)
            rows = self.table()
            try:
                await asyncio.to_thread(self.save_view, rows)
                saved = True
            except OSError as error:
                if saved:
                    log.warning("fleet_view_not_saved", error=str(error))
                saved = False
