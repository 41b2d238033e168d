"""The journal: requests accepted and answers promised, on disk before anyone relies on them.

| written              | when                                               | awaited                                      |
| -------------------- | -------------------------------------------------- | -------------------------------------------- |
| `accepted`           | before anything of a request is dispatched         | yes                                          |
| `promised`           | before a client hears of an answer not yet entered | yes                                          |
| `answered`, `failed` | the outcome is known                               | no: found again, or the request is run again |
| `entered`, `replied` | a promise is kept, a reply is sent                 | no: done again without effect                |

A promise is kept with the very entries that it speaks of, so that the next run can enter them: another run's verdicts
would have other ids. What `recover` makes of all this after a crash stands there.
"""

from __future__ import annotations

import asyncio
import hashlib
import sqlite3
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from bmoe.protocol.errors import BmoeError, UnavailableError
from bmoe.storage.group_commit import GroupCommit, Op
from coordinator.jobs import Answered, Request
from coordinator.records import Submission, pack_answered, pack_request

log = structlog.get_logger("journal")
SCHEMA = 1
PENDING_BYTES = 512 * 1024 * 1024  # inputs of requests in work
KEPT_MS = 20 * 60 * 1000
KEPT_ROWS = 100_000
KEPT_BYTES = 256 * 1024 * 1024  # results
TIDY_MS = 1000
TIDY_ROWS = 2000  # at a time, so that nobody waits long for it
REASON_MAX = 500
_TABLES = """
CREATE TABLE request (
    id BLOB NOT NULL UNIQUE,
    tenant TEXT NOT NULL,
    client_id TEXT NOT NULL,
    reply_to TEXT NOT NULL,
    received_ms INTEGER NOT NULL,
    attempts INTEGER NOT NULL,
    inputs BLOB,
    settled_ms INTEGER,
    replied INTEGER NOT NULL,
    reason TEXT NOT NULL,
    size INTEGER NOT NULL,
    outcome BLOB
);
CREATE INDEX request_settled ON request (settled_ms, size) WHERE settled_ms IS NOT NULL;
CREATE INDEX request_client ON request (tenant, client_id) WHERE client_id <> '';
CREATE TABLE promised (id BLOB PRIMARY KEY, entry BLOB NOT NULL);
CREATE TABLE verdict (task BLOB PRIMARY KEY, entry BLOB NOT NULL);
"""
_ACCEPT = "INSERT INTO request VALUES (?, ?, ?, ?, ?, 1, ?, NULL, 0, '', ?, NULL)"
_SETTLE = (
    "UPDATE request SET inputs = NULL, settled_ms = ?, reason = ?, outcome = ?, size = ?"
    " WHERE id = ? AND settled_ms IS NULL"
)
_COLUMNS = "id, tenant, client_id, reply_to, received_ms, attempts, settled_ms, replied, reason, outcome"


@dataclass(frozen=True)
class Row:
    """What the journal knows of a request. `outcome` is there when it is answered, `reason` when it failed."""

    id: bytes
    tenant: str
    client_id: str
    reply_to: str
    received_ms: int
    attempts: int
    settled_ms: int | None
    replied: int
    reason: str
    outcome: bytes | None

    @property
    def status(self) -> str:
        """accepted, answered or failed."""
        if self.settled_ms is None:
            return "accepted"
        return "failed" if self.outcome is None else "answered"


class Journal:
    """Requests in work and promises not yet kept, in one file; what is settled stays for clients that ask again.

    `pending` and `owed` are what an earlier run left: requests without outcome, promised answers not known to be entered.
    """

    def __init__(self, path: Path) -> None:
        self._file = GroupCommit(path, _TABLES, SCHEMA, self._tidy)
        self._undecided: dict[bytes, Submission] = {}  # verdicts on their way to the ledger, by task
        self._answers: dict[bytes, Submission] = {}  # answers on their way, by request
        self._written: set[bytes] = set()  # tasks whose verdict is in the file
        self._tidied_ms = 0
        self._in_work = dict(self._file.read_now(_pending_sizes))
        self._bytes = sum(self._in_work.values())
        self.pending = frozenset(self._in_work)
        self.owed = frozenset(self._file.read_now(lambda db: [r[0] for r in db.execute("SELECT id FROM promised")]))

    @property
    def held_bytes(self) -> int:
        """Bytes of the inputs of requests in work."""
        return self._bytes

    async def accepted(self, request: Request) -> None:
        """Durable when this returns; raises UnavailableError when there is no room for it."""
        inputs = pack_request(request)
        if self._in_work and self._bytes + len(inputs) > PENDING_BYTES:
            raise UnavailableError(
                f"requests in work hold {self._bytes} bytes, the limit is {PENDING_BYTES}: try again"
            )
        r = request
        self._in_work[r.id] = len(inputs)
        self._bytes += len(inputs)
        row = (r.id, r.tenant, r.client_id, r.reply_to, r.received_ms, inputs, len(inputs))
        try:
            await self._file.write((_ACCEPT, [row]))
        except BmoeError:
            self._forget(r.id)
            raise

    def deciding(
        self, task: bytes, fields: dict[str, Any], openings: Sequence[bytes], done: asyncio.Future[int]
    ) -> None:
        """A verdict is on its way to the ledger: a promise that rests on it must be able to repeat it."""
        self._note(self._undecided, task, fields, openings, done)

    def answering(
        self, request: bytes, fields: dict[str, Any], openings: Sequence[bytes], done: asyncio.Future[int]
    ) -> None:
        """An answer is on its way to the ledger."""
        self._note(self._answers, request, fields, openings, done)

    def _note(
        self,
        table: dict[bytes, Submission],
        key: bytes,
        fields: dict[str, Any],
        openings: Sequence[bytes],
        done: asyncio.Future[int],
    ) -> None:
        table[key] = Submission.of(fields, openings, lambda a: hashlib.sha256(a).digest())
        done.add_done_callback(lambda _: table.pop(key, None))

    async def promised(self, answered: Answered) -> bool:
        """Make a promise last: with this, whatever dies, its answer will be entered. False if the disk refuses.

        Only for an answer that is on its way or entered, and stands on such verdicts: what has failed is not held here.
        """
        request = answered.request
        answer = self._answers.get(request.id)
        ops = [self._settled(request.id, "", pack_answered(answered))]
        if answer is not None:  # else it is on the ledger already
            verdicts = [t for t in answered.tasks if t in self._undecided and t not in self._written]
            rows = [(t, self._undecided[t].to_bytes()) for t in verdicts]
            ops.append(("INSERT OR IGNORE INTO verdict VALUES (?, ?)", rows))
            ops.append(("INSERT OR REPLACE INTO promised VALUES (?, ?)", [(request.id, answer.to_bytes())]))
        try:
            await self._file.write(*ops)
        except UnavailableError as error:
            log.error("promise_not_kept_on_disk", request=request.id.hex(), error=str(error))
            return False
        self._written.update(t for t in answered.tasks if t in self._undecided)
        self._forget(request.id)
        return True

    def entered(self, request: bytes, tasks: Sequence[bytes]) -> None:
        """A promised answer, and with it the verdicts that it rests on, is on the ledger."""
        self._written.difference_update(tasks)
        self._file.write_lazily(
            ("DELETE FROM promised WHERE id = ?", [(request,)]),
            ("DELETE FROM verdict WHERE task = ?", [(t,) for t in tasks]),
        )

    def withdrawn(self, request: bytes, reason: str) -> None:
        """A promise that was kept on disk and not given: a verdict that it stands on cannot be entered."""
        self._file.write_lazily(
            ("DELETE FROM promised WHERE id = ?", [(request,)]),
            ("UPDATE request SET outcome = NULL, reason = ? WHERE id = ?", [(reason[:REASON_MAX], request)]),
        )

    def answered(self, answered: Answered) -> None:
        """The answer is on the ledger."""
        self._settle(answered.request.id, "", pack_answered(answered))

    def failed(self, request: bytes, reason: str) -> None:
        """There will be no answer."""
        self._settle(request, reason[:REASON_MAX] or "unknown", None)

    def replied(self, request: bytes) -> None:
        """The outcome was sent to where `reply_to` says."""
        self._file.write_lazily(("UPDATE request SET replied = 1 WHERE id = ?", [(request,)]))

    async def attempt(self, request: bytes) -> bytes:
        """Count another run, durably; what to run."""
        await self._file.write(("UPDATE request SET attempts = attempts + 1 WHERE id = ?", [(request,)]))
        return await self.inputs(request)

    async def inputs(self, request: bytes) -> bytes:
        """An unsettled request as it was accepted."""
        rows = await self._file.read(
            lambda db: db.execute("SELECT inputs FROM request WHERE id = ?", (request,)).fetchall()
        )
        return bytes(rows[0][0])

    async def row(self, request: bytes) -> Row | None:
        """What is known of a request by its id."""
        rows = await self._rows("id = ?", (request,))
        return rows[0] if rows else None

    async def latest(self, tenant: str, client_id: str, reply_to: str = "") -> Row | None:
        """What is known of a tenant's latest request under an id of the client's own, to be replied to there if given."""
        where = "tenant = ? AND client_id = ? AND client_id <> '' AND ? IN ('', reply_to) ORDER BY rowid DESC LIMIT 1"
        rows = await self._rows(where, (tenant, client_id, reply_to))
        return rows[0] if rows else None

    async def unreplied(self) -> list[Row]:
        """Settled requests whose outcome was not sent, for all that is known, to where it should go."""
        return await self._rows("settled_ms IS NOT NULL AND replied = 0 AND reply_to <> ''", ())

    async def unsettled(self) -> list[Row]:
        """Requests without outcome, the oldest first."""
        return await self._rows("settled_ms IS NULL ORDER BY received_ms", ())

    async def owing(self) -> tuple[dict[bytes, Submission], dict[bytes, Submission]]:
        """Verdicts by task and promised answers by request, of which the ledger may not know yet."""

        def read(db: sqlite3.Connection) -> tuple[dict[bytes, Submission], dict[bytes, Submission]]:
            verdicts, answers = (
                dict(_submissions(table, db.execute(f"SELECT * FROM {table}"))) for table in ("verdict", "promised")
            )
            return verdicts, answers

        return await self._file.read(read)

    async def close(self) -> None:
        """Write what waits and close."""
        await self._file.close()

    async def _rows(self, where: str, values: tuple[Any, ...]) -> list[Row]:
        rows = await self._file.read(
            lambda db: db.execute(f"SELECT {_COLUMNS} FROM request WHERE {where}", values).fetchall()
        )
        return [Row(*row) for row in rows]

    def _settle(self, request: bytes, reason: str, outcome: bytes | None) -> None:
        if request in self._in_work:
            self._forget(request)
            self._file.write_lazily(self._settled(request, reason, outcome))

    def _settled(self, request: bytes, reason: str, outcome: bytes | None) -> Op:
        return _SETTLE, [(_now(), reason, outcome, len(outcome or b"") + len(reason), request)]

    def _forget(self, request: bytes) -> None:
        self._bytes -= self._in_work.pop(request, 0)

    def _tidy(self, db: sqlite3.Connection) -> None:
        """In the writer's thread: forget settled requests past their time or beyond the limits, some at a time."""
        now = _now()
        if now - self._tidied_ms < TIDY_MS:
            return
        self._tidied_ms = now
        count, size = db.execute(
            "SELECT COUNT(*), COALESCE(SUM(size), 0) FROM request WHERE settled_ms IS NOT NULL"
        ).fetchone()
        oldest = "SELECT rowid FROM request WHERE settled_ms <= ? ORDER BY settled_ms LIMIT ?"
        excess = max(count - KEPT_ROWS, count // 4 if size > KEPT_BYTES else 0)
        for until_ms, rows in ((now - KEPT_MS, TIDY_ROWS), (now, min(excess, TIDY_ROWS))):
            db.execute(f"DELETE FROM request WHERE rowid IN ({oldest})", (until_ms, rows))


def _pending_sizes(db: sqlite3.Connection) -> list[tuple[bytes, int]]:
    return db.execute("SELECT id, CAST(size AS INTEGER) FROM request WHERE settled_ms IS NULL").fetchall()


def _submissions(table: str, rows: Iterable[tuple[bytes, bytes]]) -> Iterator[tuple[bytes, Submission]]:
    """The entries in a table; one that is damaged is named in the log, and must not keep the others from theirs."""
    for key, entry in rows:
        try:
            yield key, Submission.from_bytes(entry)
        except (BmoeError, TypeError, ValueError) as error:
            identity = key.hex() if isinstance(key, bytes) else repr(key)
            log.critical("journal_row_damaged", table=table, id=identity, error=str(error))


def _now() -> int:
    return time.time_ns() // 1_000_000
