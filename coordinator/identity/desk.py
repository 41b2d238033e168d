"""The registrar's place at the ledger: what it enters, and what the ledger's follower tells the directory."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from bmoe.ledger.author import FrameAuthor
from bmoe.ledger.follower import Follower
from bmoe.ledger.rules.entries import Entry
from bmoe.ledger.rules.fold import Applied
from bmoe.ledger.rules.state import Event, State
from bmoe.ledger.stream import LedgerStream, StreamMessage
from bmoe.protocol.errors import UnavailableError
from bmoe.protocol.keys import Signer
from coordinator.identity.directory import Directory

PATIENCE_S = 10.0


class LedgerDesk:
    """Enters the registrar's entries and keeps a directory up with the ledger. A LedgerPort of enrolment."""

    def __init__(
        self,
        stream: LedgerStream,
        state: State,
        signer: Signer,
        directory: Directory,
        on_revoked: Callable[[], None],
    ) -> None:
        self.ledger, self.epoch, self.state = state.ledger, state.epoch, state
        self._directory, self._on_revoked = directory, on_revoked
        self._author = FrameAuthor(stream, signer, "registrar", state.ledger, state.epoch)
        # Verdicts are the validators' to recompute; here only members, releases and standings matter.
        self._follower = Follower(stream, state, recompute=False, on_applied=self._on_applied)

    async def open(self) -> asyncio.Task[None]:
        """Catch up with the ledger; returns the following task, which ends only with an error."""
        following = self._follower.start()
        await self._follower.catch_up()
        await self._author.start()
        return following

    @property
    def position(self) -> int:
        """The ledger position folded last."""
        return self._follower.position

    async def enter(self, *kinds: tuple[type[Entry], dict[str, Any]]) -> int:
        """Append entries; returns their position once they are durable and folded into the directory.

        Raises UnavailableError after 10 s; the entry may still follow then, and repeating it does no harm.
        """
        waiting = self._author.submit(kinds)
        try:
            async with asyncio.timeout(PATIENCE_S):
                position = await asyncio.shield(waiting)
                await self._follower.reached(position)
        except TimeoutError:
            raise UnavailableError(f"the ledger has not taken the entry within {PATIENCE_S:g} s: try again") from None
        return position

    async def close(self) -> None:
        """Stop following and entering."""
        await self._author.stop()
        await self._follower.stop()

    def _on_applied(self, message: StreamMessage, applied: Applied) -> None:
        for event in applied.events:
            self._hear(event)

    def _hear(self, event: Event) -> None:
        facts = event.facts
        if event.kind == "member":
            name = facts["member"]
            self._directory.enrolled(self.state.members[name], self.state.statements[name])
        elif event.kind == "revoked":
            self._deny(facts["agent"], facts["reason"])
        elif event.kind == "standing" and facts["after"] == "revoked":
            self._deny(facts["agent"], f"standing revoked: {facts['act']}")

    def _deny(self, name: str, reason: str) -> None:
        if self._directory.revoked(name, reason):
            self._on_revoked()
