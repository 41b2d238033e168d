"""A SQLite file with one writer thread: whatever comes while one transaction is being synced goes together in the next.

So the cost of a disk sync is shared by all who wait, and none of it is paid by the event loop. What a write was awaited
for survives kill -9 and a power cut (WAL, synchronous=FULL).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sqlite3
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from bmoe.protocol.errors import ConfigError, UnavailableError

log = logging.getLogger("bmoe.storage")
# One statement for several rows of values.
Op = tuple[str, Sequence[Sequence[Any]]]
# Statements that stand or fall together, and who awaits them: None where nobody does.
Waiting = tuple[Sequence[Op], "asyncio.Future[None] | None"]
LINGER_S = 0.25
# Of SQLite's errors those that come of what was to be written, not of the disk: they would come again each time.
AT_FAULT = (sqlite3.IntegrityError, sqlite3.ProgrammingError, sqlite3.InterfaceError, sqlite3.DataError)
T = TypeVar("T")


class GroupCommit:
    """The one writer of a SQLite file. Statements of one `write` stand or fall together.

    `tidy` is called within every transaction, in the writer's thread, and may write as well.
    """

    def __init__(self, path: Path, tables: str, schema: int, tidy: Callable[[sqlite3.Connection], None]) -> None:
        self._path, self._tidy = path, tidy
        self._pool = ThreadPoolExecutor(1, path.stem)
        self._waiting: list[Waiting] = []  # in the order in which they came
        self._flushing: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False
        path.parent.mkdir(parents=True, exist_ok=True)
        self._db: sqlite3.Connection = self._pool.submit(_connect, path, tables, schema).result()

    async def write(self, *ops: Op) -> None:
        """Execute statements durably; raises UnavailableError if they are not taken: then nothing changed."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((ops, done))
        self._wake()
        await done

    def write_lazily(self, *ops: Op) -> None:
        """Execute statements with the next transaction, soon; repeated until the disk takes them. Order is kept."""
        self._waiting.append((ops, None))
        if self._timer is None and not self._closed:
            self._timer = asyncio.get_running_loop().call_later(LINGER_S, self._wake)

    async def read(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """What `work` reads, after everything that was written or is about to be."""
        with contextlib.suppress(UnavailableError):  # a disk that takes nothing can still be read
            await self.write()
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, work, self._db)
        except sqlite3.Error as error:
            raise UnavailableError(f"{self._path}: {error}") from error

    def read_now(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """As `read`, before there is an event loop to wait in."""
        return self._pool.submit(work, self._db).result()

    async def close(self) -> None:
        """Write what waits, then close the file."""
        self._closed = True
        if self._waiting:
            self._wake()
        if self._flushing is not None:
            await asyncio.wait([self._flushing])
        if self._timer is not None:
            self._timer.cancel()
        await asyncio.get_running_loop().run_in_executor(self._pool, self._db.close)
        self._pool.shutdown()

    def _wake(self) -> None:
        if self._flushing is None or self._flushing.done():
            self._flushing = asyncio.ensure_future(self._flush())

    async def _flush(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(0)  # so that all who come in this turn of the loop share the transaction
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            waiting, self._waiting = self._waiting, []
            again = await self._write_all(waiting)
            self._waiting = again + self._waiting
            if all(done is None for _, done in self._waiting):
                break
        if self._waiting and self._timer is None and not self._closed:
            self._timer = loop.call_later(LINGER_S, self._wake)

    async def _write_all(self, waiting: Sequence[Waiting]) -> list[Waiting]:
        """One transaction, and word to all who wait for it; what nobody waits for and the disk did not take."""
        error, disk = None, False
        try:
            ops = [op for ops, _ in waiting for op in ops]
            await asyncio.get_running_loop().run_in_executor(self._pool, self._commit, ops)
        except Exception as raised:  # whatever it is: whoever waits must hear of it
            disk = isinstance(raised, (sqlite3.Error, OSError)) and not isinstance(raised, AT_FAULT)
            error = UnavailableError(f"{self._path.name} takes nothing: {str(raised) or type(raised).__name__}")
            if not disk and len(waiting) > 1:  # each alone, so that the one at fault takes no other along
                return [again for one in waiting for again in await self._write_all([one])]
        for _, done in waiting:
            if done is None and error is not None and not disk:
                log.error("not_written file=%s reason=%s", self._path.name, error)
            elif done is not None and not done.done():
                done.set_exception(error) if error else done.set_result(None)
        return [one for one in waiting if one[1] is None] if disk else []

    def _commit(self, ops: Sequence[Op]) -> None:
        """In the writer's thread: one transaction."""
        try:
            self._db.execute("BEGIN IMMEDIATE")
            for sql, rows in ops:
                self._db.executemany(sql, rows)
            self._tidy(self._db)
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise


def _connect(path: Path, tables: str, schema: int) -> sqlite3.Connection:
    """An open, checked file; raises ConfigError for another schema, UnavailableError for what cannot be used."""
    try:
        db = sqlite3.connect(path, isolation_level=None)
        try:
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = FULL")
            db.execute("PRAGMA journal_size_limit = 4194304")
            (version,) = db.execute("PRAGMA user_version").fetchone()
            if version not in (0, schema):
                raise ConfigError(f"{path} is of schema {version}, this program knows {schema}: update it")
            if db.execute("PRAGMA quick_check(1)").fetchone() != ("ok",):
                raise UnavailableError(f"{path} is damaged: move it away to go on without it")
            if version == 0:
                db.executescript(f"BEGIN; {tables} PRAGMA user_version = {schema}; COMMIT;")
        except BaseException:
            db.close()
            raise
    except (sqlite3.Error, OSError) as error:
        raise UnavailableError(f"{path} cannot be used: {error}") from error
    return db
