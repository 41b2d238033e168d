"""Ticks and cosignatures: when a validator marks a size, and how it promises, signs and publishes each one marked.

Every validator cosigns every tick, whoever wrote it, so their signatures meet on one root. The order of tickers
rotates with the tree: the first in turn ticks at once, the next only if it stays silent.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable

from nats.errors import Error as NatsError
from nats.js.errors import APIError

from bmoe.ledger.author import FrameAuthor
from bmoe.ledger.rules.checkpoint import Checkpoint, cosign
from bmoe.ledger.rules.entries import Tick
from bmoe.ledger.rules.state import State
from bmoe.ledger.store import Store
from bmoe.ledger.stream import LedgerStream
from bmoe.protocol.errors import BmoeError
from bmoe.protocol.keys import Signer

log = logging.getLogger("bmoe.validator")

CHECKPOINT_SUBJECT = "ledger.checkpoint"
TICK_EVERY_S = 0.2
TURN_S = 0.05
GATHER_S = 0.003
UNPUBLISHED_MAX = 64
REPUBLISHED_AT_START = 8


class Cosigner:
    """Promises, signs, keeps and publishes checkpoints. `signed` is the largest size signed."""

    def __init__(self, name: str, signer: Signer, store: Store, origin: str, stream: LedgerStream) -> None:
        self.signed = store.signed_size() or 0
        self._name, self._signer, self._store, self._origin, self._stream = name, signer, store, origin, stream
        self._due = asyncio.Event()
        self._moved = asyncio.Condition()
        self._unpublished: deque[tuple[int, str]] = deque(maxlen=UNPUBLISHED_MAX)
        self._publish = asyncio.Event()

    def wake(self) -> None:
        """A tick was folded, or memory is full: commit, and sign what was marked."""
        self._due.set()

    async def sign_for_ever(self) -> None:
        """Commit and sign whenever woken; ends only with an error of the store, which must stop the validator."""
        await self._sign(self._store.unsigned())
        self._unpublished.clear()
        self._unpublished.extend(self._store.last_notes(REPUBLISHED_AT_START))
        self._publish.set()
        while True:
            await self._due.wait()
            # Ticks that come together share a transaction, and so one wait for the disk.
            await asyncio.sleep(GATHER_S)
            self._due.clear()
            await self._sign(self._store.commit())

    async def publish_for_ever(self) -> None:
        """Publish each note until the engine has it; only the newest matter when it was away for long."""
        js = self._stream.client.jetstream(timeout=5)
        while True:
            await self._publish.wait()
            self._publish.clear()
            while self._unpublished:
                size, note = self._unpublished[0]
                try:
                    await js.publish(f"{CHECKPOINT_SUBJECT}.{self._name}", note.encode())
                except (NatsError, APIError, OSError, asyncio.TimeoutError) as error:
                    log.warning("checkpoint not published size=%d error=%s", size, error or type(error).__name__)
                    await asyncio.sleep(0.5)
                    continue
                if self._unpublished and self._unpublished[0][0] == size:
                    self._unpublished.popleft()

    async def until(self, predicate: Callable[[], bool], timeout_s: float) -> None:
        """Wait until `predicate` holds; it is asked after every signature. Raises TimeoutError of asyncio."""

        async def wait() -> None:
            async with self._moved:
                await self._moved.wait_for(predicate)

        await asyncio.wait_for(wait(), timeout_s)

    async def _sign(self, roots: list[tuple[int, bytes]]) -> None:
        """Sign roots that are promised on disk already; of a long backlog only the newest, nobody asks for the rest."""
        notes = [(size, self._note(size, root)) for size, root in roots[-UNPUBLISHED_MAX:]]
        if not notes:
            return
        self._store.keep_notes(notes)
        self._unpublished.extend(notes)
        self.signed = notes[-1][0]
        self._publish.set()
        async with self._moved:
            self._moved.notify_all()

    def _note(self, size: int, root: bytes) -> str:
        body = Checkpoint(self._origin, size, root).body()
        return body + "\n" + cosign(body, self._name, self._signer.private_key, int(time.time()))


class Ticker:
    """Writes ticks while the tree grows by anything but ticks."""

    def __init__(self, author: FrameAuthor, state: State) -> None:
        self._author, self._state = author, state
        self._grown = asyncio.Event()
        self._last = 0.0

    def grew(self) -> None:
        """Leaves other than ticks were folded since the last tick."""
        self._grown.set()

    def ticked(self) -> None:
        """A tick was folded: it covers all leaves before it, whoever wrote it."""
        self._grown.clear()

    async def tick_for_ever(self) -> None:
        """Tick in our turn, at most once in TICK_EVERY_S, and only while we are enrolled and not fenced."""
        while True:
            await self._grown.wait()
            await asyncio.sleep(max(self._turn_s(), self._last + TICK_EVERY_S - time.monotonic()))
            if not self._grown.is_set():
                continue
            if not may_write(self._state, self._author.name):
                await asyncio.sleep(TICK_EVERY_S)
                continue
            self._last = time.monotonic()
            try:
                await self._author.enter((Tick, {"size": self._state.size}))
            except BmoeError as error:
                log.warning("tick failed error=%s", error)

    def _turn_s(self) -> float:
        names = sorted(self._state.validators)
        if self._author.name not in names:
            return TICK_EVERY_S
        return (names.index(self._author.name) + self._state.size) % len(names) * TURN_S


def may_write(state: State, name: str) -> bool:
    """Whether frames of this member can be accepted now.

    A frame of a stranger is rejected whole and leaves its author's chain broken for ever: never write one.
    """
    known = state.authors.get(name)
    return name in state.members and not (known and known.fenced)
