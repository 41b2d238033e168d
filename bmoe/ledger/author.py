"""An author of frames: chains them, numbers them, and appends them one at a time, durably.

Entries that come while a frame is under way wait and go together in the next one, so that all who wait share the cost
of a frame: a signature, a disk sync, and the work of every replica that reads it. For the sake of that cost, frames
keep a distance, and an entry that nobody waits for lingers until one that somebody does wait for takes it along.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from bmoe.ledger.ending import end
from bmoe.ledger.rules.entries import Entry
from bmoe.ledger.rules.frames import NO_FRAME, build_frame, parse_frame
from bmoe.ledger.rules.state import State
from bmoe.ledger.stream import LedgerStream, message_id
from bmoe.protocol.errors import BmoeError, LedgerError, UnavailableError
from bmoe.protocol.figures import Seconds
from bmoe.protocol.keys import Signer

FRAME_ENTRIES = 256
FRAME_BYTES = 1024 * 1024
WAITING_MAX = 20_000
WRITTEN_KEPT = 64
AGAIN_S = 0.1
SPACING_S = 0.008
LINGER_S = 0.02
E = TypeVar("E", bound=Entry)


@dataclass
class _Waiting:
    """One group of entries that must stand in one frame, who awaits it, and what must be entered before it."""

    kinds: Sequence[tuple[type[Entry], dict[str, Any]]]
    attachments: Sequence[bytes]
    done: asyncio.Future[int]
    after: Sequence[asyncio.Future[int]] = ()
    size: int = field(default=0)

    def bereaved(self) -> BaseException | None:
        """Why it must not be entered any more: an entry that it rests on was not."""
        failed = (f for f in self.after if f.done() and (f.cancelled() or f.exception() is not None))
        first = next(failed, None)
        return None if first is None else UnavailableError("an entry that this one rests on was not entered")


class FrameAuthor:
    """Appends entries in the name of one member. One instance a key: two would fork its chain."""

    def __init__(
        self,
        stream: LedgerStream,
        signer: Signer,
        name: str,
        ledger: bytes,
        epoch: int,
        clock: Callable[[], int] | None = None,
    ) -> None:
        self.name, self.ledger, self.epoch = name, ledger, epoch
        self._stream, self._signer = stream, signer
        self._clock = clock or (lambda: time.time_ns() // 1_000_000)
        self._seq, self._previous, self._position = 0, NO_FRAME, 0
        self._waiting: deque[_Waiting] = deque()
        self._wake = asyncio.Event()
        self._due, self._started, self._asked = 0.0, 0.0, 0.0
        self._task: asyncio.Task[None] | None = None
        self._stopped = False
        self._written: deque[bytes] = deque(maxlen=WRITTEN_KEPT)
        # Called when a frame that we did not know of came in between, such as a late one of a run before: no frame of
        # ours can follow until we have read the ledger anew.
        self.on_overtaken: Callable[[BmoeError], None] | None = None
        self.entries, self.append_s = 0, Seconds()

    @property
    def waiting(self) -> int:
        """Groups of entries that wait for the engine."""
        return len(self._waiting)

    @property
    def stalled_s(self) -> float:
        """For how many seconds the engine has not acknowledged the frame under way; 0 if there is none."""
        return time.monotonic() - self._asked if self._asked else 0.0

    def wrote(self, digest: bytes) -> bool:
        """Whether we signed the frame of that digest a moment ago."""
        return digest in self._written

    async def start(self, state: State | None = None) -> None:
        """Find where our chain stands on the ledger, and begin to append.

        `state`, where the caller has folded the whole stream, says it best: a last frame that the rules refused (before
        we were enrolled, say) is no part of the chain, and what follows it would be refused as well.
        """
        last = await self._stream.last_of(self.name)
        known = state.authors.get(self.name) if state is not None else None
        if last is not None and known is not None:
            self._seq, self._previous, self._position = known.seq, known.previous, last.position
        elif last is not None:
            frame = parse_frame(last.data)
            self._seq, self._previous, self._position = frame.header.seq, frame.digest, last.position
        self._task = asyncio.create_task(self._run(), name=f"author-{self.name}")

    async def stop(self) -> None:
        """Stop appending; entries still waiting fail with UnavailableError."""
        self._stopped = True
        await end(self._task)
        while self._waiting:
            _fail(self._waiting.popleft(), UnavailableError(f"{self.name} stopped before the entry was appended"))

    def submit(
        self,
        kinds: Sequence[tuple[type[Entry], dict[str, Any]]],
        attachments: Sequence[bytes] = (),
        *,
        after: Sequence[asyncio.Future[int]] = (),
        urgent: bool = True,
    ) -> asyncio.Future[int]:
        """Queue entries (type, own fields) that stand together; the future gives their position once durable.

        `after` are futures of this author's earlier entries: if one of them fails, these are not entered either.
        """
        loop = asyncio.get_running_loop()
        done: asyncio.Future[int] = loop.create_future()
        size = 512 * len(kinds) + sum(map(len, attachments))
        waiting = _Waiting(kinds, attachments, done, after, size)
        if self._stopped:
            _fail(waiting, UnavailableError(f"{self.name} has stopped appending"))
            return done
        if len(self._waiting) >= WAITING_MAX:
            _fail(waiting, UnavailableError(f"{WAITING_MAX} entries wait for the ledger engine already"))
            return done
        due = loop.time() + (0.0 if urgent else LINGER_S)
        self._due = min(self._due, due) if self._waiting else due
        self._waiting.append(waiting)
        self._wake.set()
        return done

    async def enter(self, *kinds: tuple[type[Entry], dict[str, Any]], attachments: Sequence[bytes] = ()) -> int:
        """Append entries and return their stream position once the engine has them on disk."""
        return await self.submit(kinds, attachments)

    async def _run(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._waiting:
                await self._until_due()
                group = self._take()
                try:
                    await self._append(group)
                except asyncio.CancelledError:
                    # The whole group, for one that is written one by one has members whose turn has not come.
                    for waiting in group:
                        _fail(waiting, UnavailableError(f"{self.name} stopped while the entry was being appended"))
                    raise

    async def _until_due(self) -> None:
        """Wait for what lingers, but for nothing longer than it may; and for the distance between two frames."""
        loop = asyncio.get_running_loop()
        while (wait_s := max(self._due, self._started + SPACING_S) - loop.time()) > 0:
            self._wake.clear()
            timer = loop.call_later(wait_s, self._wake.set)
            try:
                await self._wake.wait()
            finally:
                timer.cancel()
        self._started = loop.time()

    def _take(self) -> list[_Waiting]:
        group = [self._waiting.popleft()]
        entries, size = len(group[0].kinds), group[0].size
        while self._waiting:
            following = self._waiting[0]
            entries, size = entries + len(following.kinds), size + following.size
            if entries > FRAME_ENTRIES or size > FRAME_BYTES:
                break
            group.append(self._waiting.popleft())
        return group

    async def _append(self, group: Sequence[_Waiting]) -> None:
        """Append a group in one frame, and tell those who wait. Entries that no frame can hold fail alone."""
        standing = []
        for waiting in group:
            if (error := waiting.bereaved()) is not None:
                _fail(waiting, error)
            else:
                standing.append(waiting)
        if not standing:
            return
        group = standing
        try:
            frame, digest = self._build(group)
        except Exception as error:  # whatever a caller's fields made of themselves: the author lives on
            if len(group) == 1:
                _fail(group[0], error)
                return
            await self._append_each(group)
            return
        self._written.append(digest)
        asked = self._asked = time.monotonic()
        try:
            position = await self._append_surely(frame, digest)
        except BmoeError as error:
            for waiting in group:
                _fail(waiting, error)
            if self.on_overtaken is not None:
                self.on_overtaken(error)
            return
        finally:
            self._asked = 0.0
        self.append_s.add(time.monotonic() - asked)
        self.entries += sum(len(waiting.kinds) for waiting in group)
        self._seq, self._previous, self._position = self._seq + 1, digest, position
        for waiting in group:
            if not waiting.done.done():
                waiting.done.set_result(position)

    async def _append_each(self, group: Sequence[_Waiting]) -> None:
        """One frame an entry; whoever has not had a turn when we are stopped is told."""
        waiting = deque(group)
        try:
            while waiting:
                await self._append([waiting.popleft()])
        except asyncio.CancelledError:
            for left in waiting:
                _fail(left, UnavailableError(f"{self.name} stopped before the entry was appended"))
            raise

    def _build(self, group: Sequence[_Waiting]) -> tuple[bytes, bytes]:
        time_ms = self._clock()
        common: dict[str, Any] = {"ledger": self.ledger, "epoch": self.epoch, "author": self.name, "seq": self._seq + 1}
        return build_frame(
            self._signer,
            **common,
            previous=self._previous,
            time_ms=time_ms,
            entries=[kind(**common, time_ms=time_ms, **fields).to_bytes() for w in group for kind, fields in w.kinds],
            attachments=[a for w in group for a in w.attachments],
        )

    async def _append_surely(self, frame: bytes, digest: bytes) -> int:
        """Repeat until acknowledged: an unacknowledged frame may be on disk, so it is never dropped or replaced."""
        while True:
            try:
                return await self._stream.append(self.name, frame, message_id(digest), self._position)
            except UnavailableError:
                await asyncio.sleep(AGAIN_S)
            except LedgerError:
                last = await self._found(digest)
                if last is None:
                    raise
                return last

    async def _found(self, digest: bytes) -> int | None:
        """The position of the frame in doubt, if it is our last one: it was appended and its acknowledgement lost."""
        while True:
            try:
                last = await self._stream.last_of(self.name)
            except UnavailableError:
                await asyncio.sleep(AGAIN_S)
                continue
            return last.position if last is not None and parse_frame(last.data).digest == digest else None


def _fail(waiting: _Waiting, error: BaseException) -> None:
    if not waiting.done.done():
        waiting.done.set_exception(error)
        waiting.done.exception()
