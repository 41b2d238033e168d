"""The author of frames against an engine that fails in both flavours: without effect, and after taking effect."""

from __future__ import annotations

import asyncio
from collections import deque
from itertools import chain
from typing import Any, cast

import pytest

from bmoe.ledger.author import FrameAuthor
from bmoe.ledger.rules.entries import MAX_LEAF_BYTES, Answer, Tick, parse_entry
from bmoe.ledger.rules.frames import NO_FRAME, parse_frame
from bmoe.ledger.stream import LedgerStream, StreamMessage
from bmoe.protocol.errors import BmoeError, LedgerError, MessageError, UnavailableError
from bmoe.protocol.keys import Signer

SIGNER, LEDGER, NAME = Signer.from_bytes(bytes([9] * 32)), bytes(16), "validator-1"


class Engine:
    """A stream kept in memory with the engine's rules: expected last position, and message ids that repeat safely.

    `faults` are taken one an append: "lost" (nothing happened), "unacknowledged" (it is on disk), "forgotten" (on disk,
    and the message id forgotten, as after the engine's window for repeats).
    """

    def __init__(self) -> None:
        self.data: list[bytes] = []
        self.ids: dict[str, int] = {}
        self.faults: deque[str] = deque()
        self.gate, self.unacknowledged = asyncio.Event(), asyncio.Event()
        self.gate.set()

    async def append(self, author: str, data: bytes, message_id: str, expected_last: int) -> int:
        await self.gate.wait()
        fault = self.faults.popleft() if self.faults else ""
        if fault == "lost":
            raise UnavailableError("no answer")
        if message_id not in self.ids:
            if expected_last != len(self.data):
                raise LedgerError("another frame came in between")
            self.data.append(data)
            self.ids[message_id] = len(self.data)
        position = self.ids[message_id]
        if fault == "forgotten":
            self.ids.clear()
        if fault:
            self.unacknowledged.set()
            raise UnavailableError("no answer")
        return position

    async def last_of(self, author: str) -> StreamMessage | None:
        return StreamMessage(len(self.data), self.data[-1]) if self.data else None

    def sizes(self) -> list[list[int]]:
        """The ticks in each frame, after checking the whole chain anew: signatures, sequence, previous."""
        previous, found = NO_FRAME, []
        for position, data in enumerate(self.data, 1):
            frame = parse_frame(data)
            frame.sealed.verify(SIGNER.public_key)
            assert (frame.header.seq, frame.header.previous) == (position, previous)
            previous = frame.digest
            found.append([cast(Tick, parse_entry(e)).size for e in frame.entries])
        return found


def _author(engine: Engine) -> FrameAuthor:
    return FrameAuthor(cast(LedgerStream, engine), SIGNER, NAME, LEDGER, 1, clock=lambda: 1_800_000_000_000)


def _tick(size: int) -> tuple[type[Tick], dict[str, Any]]:
    return Tick, {"size": size}


async def test_entries_that_come_while_a_frame_is_under_way_share_the_next() -> None:
    engine = Engine()
    author = _author(engine)
    await author.start()
    engine.gate.clear()
    first = author.submit([_tick(0)])
    await asyncio.sleep(0)
    rest = [author.submit([_tick(i)]) for i in range(1, 300)]
    engine.gate.set()
    positions = await asyncio.gather(first, *rest)
    await author.stop()
    frames = engine.sizes()
    assert list(chain.from_iterable(frames)) == list(range(300)) and len(frames[-2]) == 256 and len(frames) <= 3
    assert [len(f) for f in frames] == [positions.count(p) for p in range(1, len(frames) + 1)]


@pytest.mark.parametrize("fault", ["lost", "unacknowledged", "forgotten"])
async def test_a_frame_whose_acknowledgement_is_lost_stands_on_the_ledger_once(fault: str) -> None:
    engine = Engine()
    author = _author(engine)
    await author.start()
    engine.faults.extend(["", fault])
    assert [await author.enter(_tick(i)) for i in range(3)] == [1, 2, 3]
    await author.stop()
    assert engine.sizes() == [[0], [1], [2]]


async def test_a_restart_goes_on_where_the_ledger_stands_not_where_memory_did() -> None:
    engine = Engine()
    first = _author(engine)
    await first.start()
    await first.enter(_tick(1))
    engine.faults.extend(["unacknowledged"])
    dying = first.submit([_tick(2)])
    await asyncio.wait_for(engine.unacknowledged.wait(), 5)
    await first.stop()
    with pytest.raises(UnavailableError, match="stopped while the entry was being appended"):
        await dying
    second = _author(engine)
    await second.start()
    assert await second.enter(_tick(3)) == 3
    await second.stop()
    assert engine.sizes() == [[1], [2], [3]]


async def test_two_processes_with_one_key_cannot_fork_the_chain() -> None:
    engine = Engine()
    one, two = _author(engine), _author(engine)
    overtaken: list[BmoeError] = []
    two.on_overtaken = overtaken.append
    await one.start()
    await two.start()
    await one.enter(_tick(1))
    for _ in range(2):
        with pytest.raises(LedgerError, match="in between"):
            await two.enter(_tick(2))
    assert await one.enter(_tick(3)) == 2
    await asyncio.gather(one.stop(), two.stop())
    assert engine.sizes() == [[1], [3]]
    assert len(overtaken) == 2, "whoever owns it must hear of it: only a new start can help"


def _huge() -> tuple[type[Answer], dict[str, Any]]:
    digest, blob = bytes(32), bytes(MAX_LEAF_BYTES)
    return Answer, {
        "request": bytes(16), "model": "toy", "version": 1, "gate": b"", "request_root": digest, "rows": 4096, "top_k": 2,
        "experts": blob, "weights": blob, "tasks": (), "task_index": blob, "task_rows": blob, "openings": (),
        "outputs": (), "result_root": digest, "result_opening": digest, "tenant": "public",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("bad", "kind"),
    [(_huge(), MessageError), ((Tick, {"bigness": 3}), TypeError), ((Tick, {"size": "\udcff"}), BmoeError)],
)
async def test_one_entry_that_no_frame_can_hold_fails_alone(bad: Any, kind: type[Exception]) -> None:
    """Others wait in the same group: their entries must stand, and the author must live on."""
    engine = Engine()
    author = _author(engine)
    await author.start()
    good = [author.submit([_tick(1)]), author.submit([bad]), author.submit([_tick(2)])]
    results = await asyncio.gather(*good, return_exceptions=True)
    assert results[0] == 1 and isinstance(results[1], kind) and results[2] == 2
    assert await author.enter(_tick(3)) == 3
    await author.stop()
    assert engine.sizes() == [[1], [2], [3]]


async def test_whoever_waits_when_it_stops_is_told_and_so_is_whoever_comes_after() -> None:
    engine = Engine()
    author = _author(engine)
    await author.start()
    engine.gate.clear()
    waiting = [author.submit([_tick(i)]) for i in range(3)]
    await asyncio.sleep(0)
    late = author.submit([_tick(9)])
    await author.stop()
    after = author.submit([_tick(10)])
    for future in (*waiting, late, after):
        with pytest.raises(UnavailableError):
            await future
    assert engine.sizes() == []


async def test_stopping_while_a_spoiled_group_is_written_one_by_one_leaves_nobody_hanging() -> None:
    engine = Engine()
    author = _author(engine)
    await author.start()
    engine.gate.clear()
    group = [author.submit([_tick(1)]), author.submit([_huge()]), author.submit([_tick(2)])]
    for _ in range(3):
        await asyncio.sleep(0)
    await author.stop()
    results = await asyncio.wait_for(asyncio.gather(*group, return_exceptions=True), 2)
    assert all(isinstance(r, BmoeError) for r in results) and engine.sizes() == []


async def test_a_caller_who_gives_up_does_not_disturb_the_chain() -> None:
    engine = Engine()
    author = _author(engine)
    await author.start()
    engine.gate.clear()
    given_up = author.submit([_tick(1)])
    given_up.cancel()
    engine.gate.set()
    assert await author.enter(_tick(2)) >= 1
    await author.stop()
    assert list(chain.from_iterable(engine.sizes())) == [1, 2]


async def test_too_many_waiting_are_refused_and_memory_stays_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bmoe.ledger.author.WAITING_MAX", 3)
    author = _author(Engine())
    futures = [author.submit([_tick(i)]) for i in range(4)]
    with pytest.raises(UnavailableError, match="3 entries wait"):
        await futures[3]
    await author.start()
    await asyncio.gather(*futures[:3])
    await author.stop()


async def test_an_entry_whose_foundation_failed_is_not_entered_either() -> None:
    """An answer without its verdict would be false, and fence its author for ever."""
    engine = Engine()
    author = _author(engine)
    await author.start()
    verdict = author.submit([(Answer, {"request": b"no frame can hold this"})], urgent=False)
    answer = author.submit([_tick(1)], after=[verdict])
    other = author.submit([_tick(2)])
    results = await asyncio.gather(verdict, answer, other, return_exceptions=True)
    assert isinstance(results[0], BmoeError | TypeError)
    assert isinstance(results[1], UnavailableError) and "rests on" in str(results[1])
    assert results[2] == 1 and engine.sizes() == [[2]]
    await author.stop()


async def test_what_nobody_waits_for_goes_along_with_what_somebody_does() -> None:
    engine = Engine()
    author = _author(engine)
    await author.start()
    lazy = author.submit([_tick(1)], urgent=False)
    urgent = author.submit([_tick(2)])
    assert await asyncio.wait_for(asyncio.gather(lazy, urgent), 5) == [1, 1] and engine.sizes() == [[1, 2]]
    assert await asyncio.wait_for(author.submit([_tick(3)], urgent=False), 5) == 2, "and lingers only so long"
    assert author.wrote(parse_frame(engine.data[1]).digest) and not author.wrote(bytes(32))
    await author.stop()
