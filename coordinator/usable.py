"""Which released version of a model may be used: only one whose entry is final, until then the one that was used before.

A version entered while this coordinator follows the ledger is final with the size of the tree that holds it. Of those
that were there at its start a validator's receipt tells: on an idle ledger nobody says again what is final.
"""

from __future__ import annotations

import asyncio

import structlog

from bmoe.ledger.rules.fold import Applied
from bmoe.ledger.rules.receipt_release import verify_model
from bmoe.ledger.rules.releases import ENDED
from bmoe.ledger.rules.state import State
from bmoe.ledger.rules.trust import Trust
from bmoe.protocol.errors import BmoeError, UnavailableError
from bmoe.protocol.messages import ModelRelease
from coordinator.finality import Finality
from coordinator.receipts import Receipts

log = structlog.get_logger("releases")
WAIT_S = 2.0
AGAIN_S = 0.5
Key = tuple[str, int]


class Usable:
    """`assurance` is "final", or "committed": whatever the ledger has entered may be used."""

    def __init__(self, state: State, finality: Finality, assurance: str) -> None:
        self._state, self._finality, self._all = state, finality, assurance == "committed"
        self._entered: dict[Key, int] = {}
        self._proven: set[Key] = set()
        self._used: dict[str, ModelRelease] = {}

    def on_applied(self, applied: Applied) -> None:
        """Note below which size of the tree a version was entered."""
        for event in applied.events:
            if event.kind == "model" and event.facts["version"]:
                self._entered.setdefault((event.facts["model"], event.facts["version"]), self._state.size)

    def get(self, model: str) -> ModelRelease | None:
        """The version to use now; None for a model that is not released. Raises UnavailableError where none is final."""
        wanted = self._state.models.get(model)
        if wanted is None or self.final(wanted):
            if wanted is None:
                self._used.pop(model, None)
            else:
                self._used[model] = wanted
            return wanted
        before = self._used.get(model)
        if before is None or (model, before.version) in self._state.withdrawn_versions:
            raise UnavailableError(f"{model} version {wanted.version} is entered, but not final yet: try again")
        return before

    def final(self, version: ModelRelease) -> bool:
        """Whether a version's entry is final, as far as is known here."""
        key = (version.model, version.version)
        if self._all or key in self._proven:
            return True
        entered = self._entered.get(key)
        if entered is None or entered > self._finality.final_size:
            return False
        self._proven.add(key)
        return True

    async def wait(self, model: str) -> None:
        """Give a version that was just entered a moment to become final; whether it did, `get` tells."""
        wanted = self._state.models.get(model)
        if wanted is None or model in self._used or self.final(wanted):
            return
        try:
            await self._finality.until(lambda: self.final(wanted), WAIT_S)
        except asyncio.TimeoutError:
            pass

    def _concerned(self) -> list[ModelRelease]:
        going = {(r.model, r.version) for r in self._state.rollouts.values() if r.stage not in ENDED}
        versions = self._state.versions
        return [*self._state.models.values(), *(versions[key] for key in sorted(going) if key in versions)]

    async def prove(self, receipts: Receipts, trust: Trust) -> None:
        """Ask for receipts of what was in use or rolled out before this start, until each is proven final.

        On an idle ledger no validator says again what it cosigned.
        """
        while missing := [version for version in self._concerned() if not self.final(version)]:
            for version in missing:
                try:
                    verify_model(await receipts.of_model(version.model, version.version), trust)
                except BmoeError as error:
                    log.info("release_not_final", model=version.model, version=version.version, reason=str(error))
                else:
                    self._proven.add((version.model, version.version))
            await self._finality.tell()
            await asyncio.sleep(AGAIN_S)
