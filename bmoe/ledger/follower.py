"""A follower: folds the stream into a State and tells its events. What coordinator, registrar and validator share."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from bmoe.ledger.ending import end
from bmoe.ledger.rules.fold import Applied, apply_message
from bmoe.ledger.rules.frames import Frame, read_frame
from bmoe.ledger.rules.state import State
from bmoe.ledger.stream import LedgerStream, StreamMessage

Fetch = Callable[[bytes], Awaitable[bytes]]
OnApplied = Callable[[StreamMessage, Applied], None]
Held = Callable[[StreamMessage], "tuple[bytes, ...] | None"]


class Follower:
    """Keeps `state` up with the stream. `position` is that of the last message folded.

    `held` gives the leaves of a position that was folded, and recomputed, in an earlier life; None for a new one.
    `own` tells frames that this very process signed, by digest.
    """

    def __init__(
        self,
        stream: LedgerStream,
        state: State,
        *,
        recompute: bool,
        held: Held | None = None,
        fetch: Fetch | None = None,
        on_applied: OnApplied | None = None,
        own: Callable[[bytes], bool] = lambda digest: False,
        position: int = 0,
    ) -> None:
        self.state, self.position = state, position
        self._stream, self._recompute, self._fetch, self._held = stream, recompute, fetch, held
        self._on_applied, self._own = on_applied, own
        self._moved = asyncio.Condition()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> asyncio.Task[None]:
        """Follow in the background; the task ends only with an error, such as LedgerForkError."""
        self._task = asyncio.create_task(self._run(), name="ledger-follower")
        return self._task

    async def stop(self) -> None:
        """Stop following."""
        await end(self._task)

    async def reached(self, position: int, timeout_s: float | None = None) -> None:
        """Wait until the message at `position` is folded; raises the follower's own error if it has died."""

        async def wait() -> None:
            async with self._moved:
                await self._moved.wait_for(lambda: self.position >= position or self._dead())

        await asyncio.wait_for(wait(), timeout_s)
        if self.position < position and self._task is not None:
            self._task.result()

    async def changed(self, predicate: Callable[[], bool], timeout_s: float | None = None) -> None:
        """Wait until `predicate` holds; it is asked after every message."""

        async def wait() -> None:
            async with self._moved:
                await self._moved.wait_for(lambda: predicate() or self._dead())

        await asyncio.wait_for(wait(), timeout_s)

    async def catch_up(self) -> None:
        """Fold everything that the stream holds now."""
        await self.reached(await self._stream.height())

    def _dead(self) -> bool:
        return self._task is not None and self._task.done()

    async def _run(self) -> None:
        try:
            async for message in self._stream.follow(self.position):
                applied = await self._fold(message)
                self.position = message.position
                if self._on_applied is not None:
                    self._on_applied(message, applied)
                async with self._moved:
                    self._moved.notify_all()
        finally:
            async with self._moved:
                self._moved.notify_all()

    async def _fold(self, message: StreamMessage) -> Applied:
        fetched: dict[bytes, bytes] = {}
        held = self._held(message) if self._held is not None else None
        if held is not None:
            return apply_message(self.state, message.data, recompute=False, held=held)
        frame = read_frame(message.data)
        if self._recompute and self._fetch is not None:
            for digest in frame.missing if isinstance(frame, Frame) else ():
                fetched[digest] = await self._fetch(digest)
        return apply_message(self.state, message.data, fetched, self._recompute, own=self._own, frame=frame)
