"""Signed outputs, kept before they are published, so that no crash makes this device sign a task twice or a number twice.

What a power cut finds: before the commit of `keep`, nothing was published and the task may be computed again; after it,
the same bytes are sent again. A forgotten task is never admitted again: `floor_ms` rises to its deadline first.
SQLite in WAL mode with synchronous=FULL, in one thread; outputs that wait together share one commit.
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

SCHEMA = 1
SEQUENCE_BLOCK = 1000
# The furthest deadline that is admitted; what a lost outbox may have signed is over by then.
AHEAD_MS = 15 * 60 * 1000
_TABLES = """
CREATE TABLE output (task BLOB PRIMARY KEY, deadline_ms INTEGER NOT NULL, reported INTEGER NOT NULL, message BLOB NOT NULL);
CREATE TABLE fact (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
"""


@dataclass(slots=True)
class Kept:
    """What is remembered in memory of a kept output."""

    deadline_ms: int
    size: int
    reported: bool = False


class Outbox:
    """The outputs kept in one file, at most `count` and `size` bytes of them, until `age_ms` after their deadline."""

    def __init__(self, path: Path, *, count: int, size: int, age_ms: int) -> None:
        self._path, self._count, self._size, self._age_ms = path, count, size, age_ms
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="bmoe-outbox")
        self._kept: dict[bytes, Kept] = {}
        self._by_deadline: list[tuple[int, bytes]] = []
        self._bytes = 0
        self._waiting: dict[bytes, tuple[int, bytes, asyncio.Future[None]]] = {}
        self._marks: list[bytes] = []
        self._flushing: asyncio.Task[None] | None = None
        self._closed = False
        self.floor_ms = 0
        try:
            self._pool.submit(self._open).result()
        except (sqlite3.Error, OSError) as error:
            raise ConfigError(f"the outbox {path} cannot be used: {error}") from None

    def next_seq(self) -> int:
        """A number for our next signed message, larger than every one before it, over crashes too.

        Raises UnavailableError when a new block of numbers cannot be made durable, on a full disk.
        """
        if self._seq >= self._reserved:
            try:
                self._pool.submit(
                    self._reserve, self._seq + SEQUENCE_BLOCK
                ).result()  # rare: a burst without any output
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
        if task in self._kept and not self._kept[task].reported:
            self._kept[task].reported = True
            self._marks.append(task)

    def unreported(self, latest_deadline_ms: int) -> list[bytes]:
        """Tasks whose output the broker has not acknowledged and whose deadline is not before `latest_deadline_ms`."""
        return [t for t, kept in self._kept.items() if not kept.reported and kept.deadline_ms >= latest_deadline_ms]

    async def message(self, task: bytes) -> bytes | None:
        """The output message kept for a task."""
        return await self._in_thread(lambda: self._read(task)) if task in self._kept else None

    async def tidy(self, now_ms: int) -> None:
        """Forget what is past its age, and write the marks. Call it now and then."""
        gone = self._evictable(now_ms)
        if gone or self._marks:
            await self._settle(gone, {})

    async def close(self) -> None:
        """Write what waits, then close the file. Doing it again does nothing."""
        if self._closed:
            return
        self._closed = True
        if self._flushing is not None:
            await self._flushing
        if self._marks:
            await self._settle([], {})
        await self._in_thread(self._db.close)
        self._pool.shutdown()

    def _wake(self) -> None:
        if self._flushing is None or self._flushing.done():
            self._flushing = asyncio.ensure_future(self._flush())

    async def _flush(self) -> None:
        while self._waiting:
            batch = dict(self._waiting)
            error: Exception | None = None
            try:
                await self._settle(self._evictable(0, adding=list(batch.values())), batch)
            except UnavailableError as raised:
                error = raised
            for task, (deadline_ms, message, future) in batch.items():
                del self._waiting[task]
                if error is None:
                    self._remember(task, Kept(deadline_ms, len(message)))
                if not future.done():
                    future.set_exception(error) if error else future.set_result(None)

    async def _settle(self, gone: list[bytes], batch: dict[bytes, Any]) -> None:
        """One transaction: forget, mark, keep, and reserve numbers. Raises UnavailableError; then nothing changed."""
        marks, self._marks = self._marks, []
        floor = max([self._kept[task].deadline_ms for task in gone], default=self.floor_ms)
        floor = max(floor, self.floor_ms)
        rows = [(task, deadline_ms, message) for task, (deadline_ms, message, _) in batch.items()]
        reserve = self._seq + SEQUENCE_BLOCK if self._seq + SEQUENCE_BLOCK // 2 > self._reserved else None
        self.floor_ms = floor  # at once: while the commit runs, none of them may be admitted again
        try:
            await self._in_thread(lambda: self._commit(gone, marks, rows, floor, reserve))
        except Exception as error:  # of the disk or not: whoever waits must hear of it
            self._marks = marks + self._marks
            for task in gone:  # taken off the heap, but still there
                heapq.heappush(self._by_deadline, (self._kept[task].deadline_ms, task))
            raise UnavailableError(f"the outbox takes nothing: {error}") from None
        lost = 0
        for task in gone:
            kept = self._kept.pop(task)
            self._bytes -= kept.size
            lost += not kept.reported
        if lost:
            log.warning(event("outputs_dropped", unreported=lost, kept=len(self._kept)))

    def _evictable(self, now_ms: int, adding: Sequence[tuple[int, bytes, Any]] = ()) -> list[bytes]:
        """Take off the heap what is too old or, the earliest deadline first, must make room."""
        count = len(self._kept) + len(adding)
        size = self._bytes + sum(len(message) for _, message, _ in adding)
        gone = []
        while self._by_deadline:
            deadline_ms, task = self._by_deadline[0]
            if count <= self._count and size <= self._size and deadline_ms + self._age_ms >= now_ms:
                break
            heapq.heappop(self._by_deadline)
            gone.append(task)
            count, size = count - 1, size - self._kept[task].size
        return gone

    def _remember(self, task: bytes, kept: Kept) -> None:
        self._kept[task] = kept
        self._bytes += kept.size
        heapq.heappush(self._by_deadline, (kept.deadline_ms, task))

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    # From here on: in the one thread that owns the connection.

    def _open(self) -> None:
        now_ms = time.time_ns() // 1_000_000
        self._db, aside = open_or_replace(self._path, _TABLES, SCHEMA)
        if aside is not None:
            # Start anew, but admit nothing that the lost file may have answered: two outputs for a task are perjury.
            log.error(event("outbox_damaged", kept_as=aside, refusing_s=AHEAD_MS // 1000))
        facts = dict(self._db.execute("SELECT name, value FROM fact").fetchall())
        # The clock where nothing is known: numbers must not begin again when this file is lost or deleted.
        self._seq = self._reserved = facts.get("seq", now_ms)
        self.floor_ms = max(facts.get("floor_ms", 0), now_ms + AHEAD_MS if aside else 0)
        self._commit([], [], [], self.floor_ms, self._seq + SEQUENCE_BLOCK)
        for task, deadline_ms, reported, size in self._db.execute(
            "SELECT task, deadline_ms, reported, length(message) FROM output"
        ):
            self._remember(task, Kept(deadline_ms, size, bool(reported)))

    def _reserve(self, limit: int) -> None:
        self._commit([], [], [], self.floor_ms, limit)

    def _read(self, task: bytes) -> bytes | None:
        row = self._db.execute("SELECT message FROM output WHERE task = ?", (task,)).fetchone()
        return row[0] if row else None

    def _commit(
        self, gone: list[bytes], marks: list[bytes], rows: list[tuple[bytes, int, bytes]], floor: int, seq: int | None
    ) -> None:
        with self._db:  # BEGIN .. COMMIT, or ROLLBACK
            self._db.executemany("DELETE FROM output WHERE task = ?", [(task,) for task in gone])
            self._db.executemany("UPDATE output SET reported = 1 WHERE task = ?", [(task,) for task in marks])
            self._db.executemany("INSERT INTO output VALUES (?, ?, 0, ?)", rows)
            facts = [("floor_ms", floor), *([("seq", seq)] if seq is not None else [])]
            self._db.executemany("INSERT OR REPLACE INTO fact VALUES (?, ?)", facts)
        if seq is not None:
            self._reserved = seq
