"""Signed outputs, kept before they are published, so that no crash makes this device sign a task twice or a number twice.

What a power cut finds: before the commit of `keep`, nothing was published and the task may be computed again; after it,
the same bytes are sent again. A forgotten task is never admitted again: `floor_ms` rises to its deadline first.
SQLite in WAL mode with synchronous=FULL, in one thread; outputs that wait together share one commit.

Cards wear out by what is written: a row is written once and deleted once, is found by a number that only memory knows (an
index would be a further page each commit), and that the broker has it is noted in a small table beside, now and then.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
import sqlite3
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from bmoe.protocol.errors import ConfigError, RefusedError, UnavailableError
from edge_agent.database import open_or_replace
from edge_agent.logs import event

log = logging.getLogger("bmoe.agent")
T = TypeVar("T")

SCHEMA = 2
SEQUENCE_BLOCK = 1000
# The furthest deadline that is admitted; what a lost outbox may have signed is over by then.
AHEAD_MS = 15 * 60 * 1000
_OUTPUT = """
CREATE TABLE output (number INTEGER PRIMARY KEY, task BLOB NOT NULL, deadline_ms INTEGER NOT NULL, message BLOB NOT NULL);
CREATE TABLE reported (number INTEGER PRIMARY KEY);
"""
_TABLES = _OUTPUT + "CREATE TABLE fact (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;"
_FROM_1 = f"""
ALTER TABLE output RENAME TO earlier; {_OUTPUT}
INSERT INTO output SELECT rowid, task, deadline_ms, message FROM earlier;
INSERT INTO reported SELECT rowid FROM earlier WHERE reported;
DROP TABLE earlier;
"""


@dataclass(slots=True)
class Kept:
    """What is remembered in memory of a kept output."""

    number: int
    deadline_ms: int
    size: int
    reported: bool = False


class Outbox:
    """The outputs kept in one file, at most `count` and `size` bytes of them.

    Until `age_ms` after their deadline, those that the broker has until `answered_ms`. Where there is no room, those that
    the broker has go first, and the earliest deadline of them.
    """

    def __init__(self, path: Path, *, count: int, size: int, age_ms: int, answered_ms: int = 120_000) -> None:
        self._path, self._count, self._size = path, count, size
        self._age_ms, self._answered_ms = age_ms, min(age_ms, answered_ms)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="bmoe-outbox")
        self._kept: dict[bytes, Kept] = {}
        # Heaps by deadline. Whatever was reported meanwhile, or is gone, is passed over where it comes up.
        self._by_deadline: list[tuple[int, bytes]] = []
        self._by_deadline_reported: list[tuple[int, bytes]] = []
        self._number = 0
        self._bytes = 0
        self._waiting: dict[bytes, tuple[int, bytes, asyncio.Future[None]]] = {}
        self._marks: list[bytes] = []
        self._flushing: asyncio.Task[None] | None = None
        self._closed = False
        self._damaged = asyncio.Event()
        self.floor_ms = self._floor_on_disk = 0
        try:
            self._pool.submit(self._open).result()
        except (sqlite3.Error, OSError) as error:
            raise ConfigError(f"the outbox {path} cannot be used: {error}") from None

    def next_seq(self) -> int:
        """A number for our next signed message, larger than every one before it, over crashes too.

        Raises UnavailableError when a new block of numbers cannot be made durable, on a full disk.
        """
        if self._seq >= self._reserved:  # rare: a burst without any output
            try:
                self._pool.submit(self._reserve, self._seq + SEQUENCE_BLOCK).result()
            except sqlite3.Error as error:
                raise UnavailableError(f"the outbox takes nothing: {error}") from None
        self._seq += 1
        return self._seq

    def has(self, task: bytes) -> bool:
        """Whether an output for the task is kept, or about to be."""
        return task in self._kept or task in self._waiting

    async def keep(self, task: bytes, deadline_ms: int, message: bytes) -> None:
        """Make a signed output durable: when this returns, it may be published.

        Raises RefusedError if there is one for the task already, UnavailableError if the disk does not take it.
        """
        if self.has(task):
            raise RefusedError(f"an output for task {task.hex()} is signed already")
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[task] = (deadline_ms, message, future)
        self._wake()
        await future

    def mark_reported(self, task: bytes) -> None:
        """Note that the broker has it. Not durable at once: after a crash it is merely sent again."""
        kept = self._kept.get(task)
        if kept is not None and not kept.reported:
            kept.reported = True
            self._marks.append(task)
            heapq.heappush(self._by_deadline_reported, (kept.deadline_ms, task))

    def unreported(self) -> list[bytes]:
        """Tasks whose output the broker has not acknowledged, in the order in which they were kept."""
        return [task for task, kept in self._kept.items() if not kept.reported]

    async def message(self, task: bytes) -> bytes | None:
        """The output message kept for a task. Raises UnavailableError where the disk does not give it."""
        kept = self._kept.get(task)
        try:
            return None if kept is None else await self._in_thread(lambda: self._read(kept.number))
        except sqlite3.Error as error:
            raise UnavailableError(f"the outbox cannot be read: {error}") from None

    async def until_damaged(self) -> None:
        """Wait until the file turns out to be damaged, then raise UnavailableError: only opening it anew puts it aside."""
        await self._damaged.wait()
        raise UnavailableError(f"{self._path} is damaged")

    async def tidy(self, now_ms: int) -> None:
        """Forget what is past its age, and write the marks. Call it now and then."""
        gone = self._evictable(now_ms)
        if gone or self._marks:
            await self._settle(gone, {}, self._taken_marks())

    async def close(self) -> None:
        """Write what waits, then close the file. Doing it again does nothing."""
        if self._closed:
            return
        self._closed = True
        if self._flushing is not None:
            await self._flushing
        if self._marks:
            await self._settle([], {}, self._taken_marks())
        await self._in_thread(self._db.close)
        self._pool.shutdown()

    def _wake(self) -> None:
        if self._flushing is None or self._flushing.done():
            self._flushing = asyncio.ensure_future(self._flush())

    def _taken_marks(self) -> list[bytes]:
        marks, self._marks = self._marks, []
        return [task for task in marks if task in self._kept]

    async def _flush(self) -> None:
        while self._waiting:
            batch = dict(self._waiting)
            error: Exception | None = None
            try:
                await self._settle(self._evictable(0, adding=list(batch.values())), batch)
            except UnavailableError as raised:
                error = raised
            for task, (_, _, future) in batch.items():
                del self._waiting[task]
                if not future.done():
                    future.set_exception(error) if error else future.set_result(None)

    async def _settle(self, gone: list[bytes], batch: dict[bytes, Any], marks: Sequence[bytes] = ()) -> None:
        """One transaction: forget, mark, keep, and reserve numbers. Raises UnavailableError; then nothing changed."""
        floor = max([self.floor_ms, *(self._kept[task].deadline_ms for task in gone)])
        raised = floor if floor > self._floor_on_disk else None
        new = {}
        for task, (deadline_ms, message, _) in batch.items():
            self._number += 1
            new[task] = Kept(self._number, deadline_ms, len(message))
        rows = [(new[task].number, task, deadline_ms, message) for task, (deadline_ms, message, _) in batch.items()]
        reserve = self._seq + SEQUENCE_BLOCK if self._seq + SEQUENCE_BLOCK // 2 > self._reserved else None
        self.floor_ms = floor  # at once: while the commit runs, none of them may be admitted again
        out, noted = ([self._kept[task].number for task in tasks] for tasks in (gone, marks))
        try:
            await self._in_thread(lambda: self._commit(out, noted, rows, raised, reserve))
        except Exception as error:  # of the disk or not: whoever waits must hear of it
            self._marks = [*marks, *self._marks]
            for task in gone:  # taken off its heap, but still there
                self._enqueue(task, self._kept[task])
            raise UnavailableError(f"the outbox takes nothing: {error}") from None
        self._floor_on_disk = max(self._floor_on_disk, floor)
        lost = 0
        for task in gone:
            kept = self._kept.pop(task)
            self._bytes -= kept.size
            lost += not kept.reported
        for task, kept in new.items():
            self._remember(task, kept)
        if lost:
            log.warning(event("outputs_dropped", unreported=lost, kept=len(self._kept)))

    def _evictable(self, now_ms: int, adding: Sequence[tuple[int, bytes, Any]] = ()) -> list[bytes]:
        """Take off the heaps what is too old or must make room."""
        count = len(self._kept) + len(adding)
        size = self._bytes + sum(len(message) for _, message, _ in adding)
        gone = []
        for heap, age_ms in ((self._by_deadline_reported, self._answered_ms), (self._by_deadline, self._age_ms)):
            while heap:
                deadline_ms, task = heap[0]
                kept = self._kept.get(task)
                passed_over = kept is None or (kept.reported and heap is self._by_deadline)
                if not passed_over and count <= self._count and size <= self._size and deadline_ms + age_ms >= now_ms:
                    break
                heapq.heappop(heap)
                if kept is not None and not passed_over:
                    gone.append(task)
                    count, size = count - 1, size - kept.size
        return gone

    def _remember(self, task: bytes, kept: Kept) -> None:
        self._kept[task] = kept
        self._bytes += kept.size
        self._enqueue(task, kept)

    def _enqueue(self, task: bytes, kept: Kept) -> None:
        heapq.heappush(self._by_deadline_reported if kept.reported else self._by_deadline, (kept.deadline_ms, task))

    async def _in_thread(self, work: Callable[[], T]) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, work)
        except sqlite3.DatabaseError as error:
            if type(error) is sqlite3.DatabaseError:  # malformed; its subclasses are a full disk, a lock, our mistakes
                self._damaged.set()
            raise

    # From here on: in the one thread that owns the connection.

    def _open(self) -> None:
        now_ms = time.time_ns() // 1_000_000
        self._db, aside = open_or_replace(self._path, _TABLES, SCHEMA, {1: _FROM_1})
        if aside is not None:
            # Start anew, but admit nothing that the lost file may have answered: two outputs for a task are perjury.
            log.error(event("outbox_damaged", kept_as=aside, refusing_s=AHEAD_MS // 1000))
        facts = dict(self._db.execute("SELECT name, value FROM fact").fetchall())
        # The clock where nothing is known: numbers must not begin again when this file is lost or deleted.
        self._seq = self._reserved = facts.get("seq", now_ms)
        self.floor_ms = max(facts.get("floor_ms", 0), now_ms + AHEAD_MS if aside else 0)
        with self._db:  # noted while its output was being forgotten: the number will be another's
            self._db.execute("DELETE FROM reported WHERE number NOT IN (SELECT number FROM output)")
        self._commit([], [], [], self.floor_ms, self._seq + SEQUENCE_BLOCK)
        self._floor_on_disk = self.floor_ms
        for number, task, deadline_ms, size, reported in self._db.execute(
            "SELECT output.number, task, deadline_ms, length(message), reported.number IS NOT NULL"
            " FROM output LEFT JOIN reported USING (number) ORDER BY number"
        ):
            self._remember(task, Kept(number, deadline_ms, size, bool(reported)))
            self._number = number

    def _reserve(self, limit: int) -> None:
        self._commit([], [], [], None, limit)

    def _read(self, number: int) -> bytes | None:
        row = self._db.execute("SELECT message FROM output WHERE number = ?", (number,)).fetchone()
        return row[0] if row else None

    def _commit(
        self,
        gone: Sequence[int],
        marks: Sequence[int],
        rows: Sequence[tuple[int, bytes, int, bytes]],
        floor: int | None,
        seq: int | None,
    ) -> None:
        with self._db:  # BEGIN .. COMMIT, or ROLLBACK
            self._db.executemany("INSERT OR IGNORE INTO reported VALUES (?)", [(number,) for number in marks])
            self._db.executemany("DELETE FROM output WHERE number = ?", [(number,) for number in gone])
            self._db.executemany("DELETE FROM reported WHERE number = ?", [(number,) for number in gone])
            self._db.executemany("INSERT INTO output VALUES (?, ?, ?, ?)", rows)
            facts = [(name, value) for name, value in (("floor_ms", floor), ("seq", seq)) if value is not None]
            self._db.executemany("INSERT OR REPLACE INTO fact VALUES (?, ?)", facts)
        if seq is not None:
            self._reserved = seq
