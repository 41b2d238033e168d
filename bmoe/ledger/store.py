"""A validator's replica in SQLite: its Merkle log, what it has promised to sign, and what receipts are made of.

Order of work: `append` in memory; `commit` writes leaves, nodes, frame digests and the roots to be signed in one
transaction; only then is a root signed, and `keep_notes` adds the note. A crash before the commit leaves nothing; one
after it leaves roots without a note, which the restart signs again: the same root, so nothing contradicts.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bmoe.ledger.rules.entries import (
    Answer,
    Entry,
    MemberEntry,
    ModelEntry,
    Rejected,
    ReleaseEntry,
    Verdict,
)
from bmoe.ledger.rules.fold import Applied
from bmoe.ledger.rules.merkle import Frontier, inclusion_proof, leaf_hash
from bmoe.protocol.errors import ConfigError, LedgerError, LedgerForkError
from bmoe.protocol.files import sync_folder
from bmoe.protocol.messages import Member, ModelRelease, Release, open_message

SCHEMA_VERSION = 1
NOTES_KEPT = 4096
OPENINGS_BYTES = 512 * 1024 * 1024
OPENINGS_COUNT = 200_000
PENDING_OPENINGS_BYTES = 32 * 1024 * 1024
REMEDY = "copy the state directory, then move this file away, with its -wal and -shm: it is built anew from the ledger"

_SCHEMA = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE leaves (idx INTEGER PRIMARY KEY, data BLOB NOT NULL);
CREATE TABLE nodes (level INTEGER, idx INTEGER, hash BLOB NOT NULL, PRIMARY KEY (level, idx)) WITHOUT ROWID;
CREATE TABLE frames (position INTEGER PRIMARY KEY, digest BLOB NOT NULL, first INTEGER NOT NULL,
                     count INTEGER NOT NULL, rejected INTEGER NOT NULL);
CREATE TABLE checkpoints (size INTEGER PRIMARY KEY, root BLOB NOT NULL, note TEXT);
CREATE TABLE found (kind TEXT, name BLOB, idx INTEGER NOT NULL, PRIMARY KEY (kind, name)) WITHOUT ROWID;
CREATE TABLE openings (id INTEGER PRIMARY KEY AUTOINCREMENT, digest BLOB NOT NULL UNIQUE, data BLOB NOT NULL);
"""


@dataclass(frozen=True)
class Held:
    """A stream position that the store holds: its leaves, and whether any entry there was rejected."""

    leaves: tuple[bytes, ...]
    rejected: bool


class Store:
    """One validator's replica. One process at a time; `position` and `size` are those committed."""

    def __init__(
        self,
        path: Path,
        ledger: bytes,
        epoch: int,
        *,
        openings_bytes: int = OPENINGS_BYTES,
        openings_count: int = OPENINGS_COUNT,
    ) -> None:
        """Open or make the replica; raises ConfigError for another ledger's or version's, LedgerError when damaged."""
        self.path = path
        self._limits = (openings_count, openings_bytes)
        self.size, self.position, self.next_position = 0, 0, 1
        self._frontier, self._kept = Frontier(), (0, 0)
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._errors():
            self._db = sqlite3.connect(path, isolation_level=None, timeout=0.5)
            try:
                self._prepare(ledger, epoch)
                self._load()
            except BaseException:
                self._db.close()
                raise

    def close(self) -> None:
        """Close the file. What was not committed is forgotten and will be folded again."""
        self._db.close()

    def held(self, position: int, data: bytes) -> Held | None:
        """What a replayed position became before, or None for a new one.

        Raises LedgerForkError, with both digests, when the engine now gives other bytes at a position held.
        """
        with self._errors():
            query = "SELECT digest, first, count, rejected FROM frames WHERE position = ?"
            row = self._db.execute(query, (position,)).fetchone()
            if row is None:
                return None
            digest = hashlib.sha256(data).digest()
            if row[0] != digest:
                raise LedgerForkError(
                    f"ledger position {position} changed: it held a message of SHA-256 {row[0].hex()}, "
                    f"the engine now gives {digest.hex()}"
                )
            leaves = self._db.execute(
                "SELECT data FROM leaves WHERE idx >= ? AND idx < ? ORDER BY idx", (row[1], row[1] + row[2])
            )
            return Held(tuple(data for (data,) in leaves), bool(row[3]))

    def append(
        self, position: int, data: bytes, applied: Applied, ticks: Iterable[int], openings: dict[bytes, bytes]
    ) -> None:
        """Take the leaves of the next stream position, in memory; `ticks` are the sizes in them to be cosigned."""
        if position != self.next_position:
            raise LedgerError(f"the replica expects position {self.next_position}, position {position} came")
        first, wanted = self._frontier.size, set(ticks)
        rejected = any(isinstance(entry, Rejected) for entry in applied.entries)
        self._frames.append((position, hashlib.sha256(data).digest(), first, len(applied.leaves), int(rejected)))
        for leaf, entry in zip(applied.leaves, applied.entries, strict=True):
            self._leaves.append((self._frontier.size, leaf))
            for kind, name in index_names(entry):
                self._found.setdefault((kind, name), self._frontier.size)
            self._nodes.extend(self._frontier.append(leaf_hash(leaf)))
            if self._frontier.size in wanted:
                self._roots[self._frontier.size] = self._frontier.root()
        self._openings.update(openings)
        self._pending_bytes += sum(map(len, openings.values()))
        self.next_position += 1

    @property
    def full(self) -> bool:
        """Whether what waits in memory should be committed even without a tick."""
        return len(self._leaves) >= 2048 or self._pending_bytes >= PENDING_OPENINGS_BYTES

    def commit(self) -> list[tuple[int, bytes]]:
        """Write all that waits in one transaction; the (size, root) pairs that may now be signed, smallest first."""
        with self._transaction():
            db = self._db
            db.executemany("INSERT INTO leaves VALUES (?, ?)", self._leaves)
            db.executemany("INSERT INTO nodes VALUES (?, ?, ?)", self._nodes)
            db.executemany("INSERT INTO frames VALUES (?, ?, ?, ?, ?)", self._frames)
            rows = [(kind, name, idx) for (kind, name), idx in self._found.items()]
            db.executemany("INSERT OR IGNORE INTO found VALUES (?, ?, ?)", rows)
            kept = self._write_openings()
            for size, root in self._roots.items():
                self._promise(size, root)
            self._drop_old_notes()
        fresh = sorted(self._roots.items())
        self._kept = kept
        self.size, self.position = self._frontier.size, self.next_position - 1
        self._clear()
        return fresh

    def promise(self, size: int, root: bytes) -> None:
        """Record that `root` will be signed for `size`; raises LedgerForkError when another root was promised for it.

        Sizes only grow: one below the largest promised may be promised again, never for the first time.
        """
        with self._transaction():
            self._promise(size, root)

    def unsigned(self) -> list[tuple[int, bytes]]:
        """Roots above the newest note that were promised and whose note was never kept: a crash came between."""
        query = "SELECT size, root FROM checkpoints WHERE size > ? ORDER BY size"
        return self._db.execute(query, (self.signed_size() or 0,)).fetchall()

    def keep_notes(self, notes: Sequence[tuple[int, str]]) -> None:
        """Keep the signed notes (size, text) of promised sizes."""
        with self._transaction():
            self._db.executemany("UPDATE checkpoints SET note = ? WHERE size = ?", [(n, size) for size, n in notes])

    def last_notes(self, count: int) -> list[tuple[int, str]]:
        """The newest signed notes (size, text), smallest size first."""
        query = "SELECT size, note FROM checkpoints WHERE note IS NOT NULL ORDER BY size DESC LIMIT ?"
        return self._db.execute(query, (count,)).fetchall()[::-1]

    def note(self, size: int) -> str | None:
        """The signed note of exactly this size, if it was signed and is still kept."""
        row = self._db.execute("SELECT note FROM checkpoints WHERE size = ?", (size,)).fetchone()
        return row[0] if row else None

    def signed_size(self) -> int | None:
        """The largest size with a note."""
        return self._db.execute("SELECT MAX(size) FROM checkpoints WHERE note IS NOT NULL").fetchone()[0]

    def leaf(self, idx: int) -> bytes:
        """The leaf at an index, committed or not; raises LedgerError beyond the tree."""
        waiting = idx - self.size
        if 0 <= waiting < len(self._leaves):
            return self._leaves[waiting][1]
        row = self._db.execute("SELECT data FROM leaves WHERE idx = ?", (idx,)).fetchone()
        if row is None:
            raise LedgerError(f"the replica has no leaf {idx}, its size is {self._frontier.size}")
        return row[0]

    def proof(self, idx: int, size: int) -> list[bytes]:
        """The inclusion path of a leaf in the tree of `size` committed leaves."""
        return inclusion_proof(idx, size, self._node)

    def find(self, kind: str, name: bytes) -> int | None:
        """The leaf index of the first entry of a kind (verdict, answer, member, release, model) with that name."""
        waiting = self._found.get((kind, name))
        row = self._db.execute("SELECT idx FROM found WHERE kind = ? AND name = ?", (kind, name)).fetchone()
        return row[0] if row else waiting

    def opening(self, digest: bytes) -> bytes | None:
        """An opening by digest, while it is retained."""
        if digest in self._openings:
            return self._openings[digest]
        row = self._db.execute("SELECT data FROM openings WHERE digest = ?", (digest,)).fetchone()
        return row[0] if row else None

    def next_output_seq(self) -> int:
        """A number for this validator's next signed output: larger than any before, and durable."""
        with self._transaction():
            row = self._db.execute("SELECT value FROM meta WHERE name = 'output_seq'").fetchone()
            value = int(row[0]) + 1 if row else 1
            self._db.execute("INSERT OR REPLACE INTO meta VALUES ('output_seq', ?)", (str(value),))
        return value

    def _prepare(self, ledger: bytes, epoch: int) -> None:
        db = self._db
        for pragma in ("locking_mode = EXCLUSIVE", "journal_mode = WAL", "synchronous = FULL"):
            db.execute(f"PRAGMA {pragma}").fetchone()
        wanted = {"schema": str(SCHEMA_VERSION), "ledger": ledger.hex(), "epoch": str(epoch)}
        db.execute("BEGIN IMMEDIATE")
        fresh = db.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0] == 0
        if fresh:
            for statement in filter(str.strip, _SCHEMA.split(";")):
                db.execute(statement)
            db.executemany("INSERT INTO meta VALUES (?, ?)", wanted.items())
        found = dict(db.execute("SELECT name, value FROM meta").fetchall())
        db.execute("COMMIT")
        sync_folder(self.path.parent)
        for name, value in wanted.items():
            if found.get(name) != value:
                raise ConfigError(f"replica {self.path} has {name} {found.get(name)}, expected {value}: move it away")

    def _load(self) -> None:
        db = self._db
        self.size = db.execute("SELECT COALESCE(MAX(idx) + 1, 0) FROM leaves").fetchone()[0]
        self.position = db.execute("SELECT COALESCE(MAX(position), 0) FROM frames").fetchone()[0]
        self.next_position = self.position + 1
        self._frontier = Frontier.load(self.size, self._node)
        count = "SELECT COUNT(*), COALESCE(SUM(LENGTH(data)), 0) FROM openings"
        self._kept = db.execute(count).fetchone()
        self._clear()

    def _clear(self) -> None:
        self._leaves: list[tuple[int, bytes]] = []
        self._nodes: list[tuple[int, int, bytes]] = []
        self._frames: list[tuple[int, bytes, int, int, int]] = []
        self._found: dict[tuple[str, bytes], int] = {}
        self._openings: dict[bytes, bytes] = {}
        self._roots: dict[int, bytes] = {}
        self._pending_bytes = 0

    def _node(self, level: int, idx: int) -> bytes:
        row = self._db.execute("SELECT hash FROM nodes WHERE level = ? AND idx = ?", (level, idx)).fetchone()
        if row is None:
            raise LedgerError(f"replica {self.path} is damaged: it lacks node {level}/{idx}: {REMEDY}")
        return row[0]

    def _promise(self, size: int, root: bytes) -> None:
        row = self._db.execute("SELECT root FROM checkpoints WHERE size = ?", (size,)).fetchone()
        if row is not None:
            if row[0] != root:
                raise LedgerForkError(
                    f"size {size} was promised with root {row[0].hex()}, and now has {root.hex()}: never sign both"
                )
            return
        last = self._db.execute("SELECT MAX(size) FROM checkpoints").fetchone()[0]
        if last is not None and size < last:
            raise LedgerForkError(f"size {size} comes after size {last} was promised: sizes only grow")
        self._db.execute("INSERT INTO checkpoints VALUES (?, ?, NULL)", (size, root))

    def _drop_old_notes(self) -> None:
        """Forget checkpoints far behind: no size below the last promised is ever promised anew, known or not."""
        query = "SELECT size FROM checkpoints ORDER BY size DESC LIMIT 1 OFFSET ?"
        row = self._db.execute(query, (NOTES_KEPT,)).fetchone()
        if row is not None:
            self._db.execute("DELETE FROM checkpoints WHERE size <= ?", row)

    def _write_openings(self) -> tuple[int, int]:
        """Add openings, then drop the oldest until count and bytes are within their limits; returns both."""
        count, size = self._kept
        for digest, data in self._openings.items():
            query = "INSERT OR IGNORE INTO openings (digest, data) VALUES (?, ?)"
            if self._db.execute(query, (digest, data)).rowcount == 1:
                count, size = count + 1, size + len(data)
        most, heaviest = self._limits
        while count > most or size > heaviest:
            query = "SELECT id, LENGTH(data) FROM openings ORDER BY id LIMIT 1"
            oldest, length = self._db.execute(query).fetchone()
            self._db.execute("DELETE FROM openings WHERE id = ?", (oldest,))
            count, size = count - 1, size - length
        return count, size

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._errors():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            hint = ": another process uses it" if "locked" in str(error) else ""
            raise LedgerError(f"replica {self.path}: {error}{hint}") from error
        except sqlite3.Error as error:
            raise LedgerError(f"replica {self.path} is damaged: {error}: {REMEDY}") from error


def index_names(entry: Entry | None) -> list[tuple[str, bytes]]:
    """Under which (kind, name) a leaf is found again."""
    if isinstance(entry, Verdict):
        return [("verdict", entry.task)]
    if isinstance(entry, Answer):
        return [("answer", entry.request)]
    if isinstance(entry, MemberEntry):
        return [("member", open_message(Member, entry.statement).header.member.encode())]
    if isinstance(entry, ReleaseEntry):
        return [("release", open_message(Release, entry.statement).header.digest)]
    if isinstance(entry, ModelEntry):
        model = open_message(ModelRelease, entry.statement).header
        return [("model", model_name(model.model, model.version))]
    return []


def model_name(model: str, version: int) -> bytes:
    """How a model's version is named in the index."""
    return f"{model} {version}".encode()
