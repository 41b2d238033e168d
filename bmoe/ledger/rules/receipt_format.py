"""The receipt's text: a C2SP tlog-proof whose `extra` carries the leaf and everything needed to judge it offline.

`extra` is deterministic CBOR that nothing authenticates by itself; `receipt.py` ties every byte of it to a signature or
to the tree. Parsing is strict: one spelling, caps, and nothing that is not asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bmoe.ledger.rules.checkpoint import MAX_SIGNATURES, Checkpoint, Note
from bmoe.ledger.rules.entries import MAX_LEAF_BYTES, MAX_STATEMENT_BYTES
from bmoe.ledger.rules.merkle import MAX_PATH, MAX_SIZE
from bmoe.ledger.rules.tlog_proof import format_proof, parse_proof
from bmoe.protocol.encoding import decode, encode
from bmoe.protocol.errors import ProofError
from bmoe.protocol.schema import is_digest

FORMAT = 1
MAX_EXTRA_BYTES = 720 * 1024
MAX_OPENINGS_BYTES = 256 * 1024
MAX_ITEMS = 4096


@dataclass(frozen=True)
class Support:
    """A leaf that the receipt's own leaf rests on: a verdict of an answer, with its index and inclusion path."""

    leaf: bytes
    index: int
    path: tuple[bytes, ...]


@dataclass(frozen=True)
class Evidence:
    """What `extra` holds: the leaf, its supports, the registrar's statements, and what opens commitments.

    `members`, `releases` and `models` are signed statements; `openings` is empty or holds every opening that the
    verdicts and the answer name, each once, in order of digest.
    """

    leaf: bytes
    supports: tuple[Support, ...] = ()
    members: tuple[bytes, ...] = ()
    releases: tuple[bytes, ...] = ()
    models: tuple[bytes, ...] = ()
    openings: tuple[bytes, ...] = ()


@dataclass(frozen=True)
class Receipt:
    """A parsed receipt, of which nothing is verified yet."""

    evidence: Evidence
    index: int
    path: tuple[bytes, ...]
    note: Note
    checkpoint: Checkpoint


def format_receipt(evidence: Evidence, index: int, path: Sequence[bytes], note_text: str) -> str:
    """The receipt as text; raises ProofError when it would be larger than what a reader accepts."""
    extra = encode(
        {
            0: FORMAT,
            1: evidence.leaf,
            2: tuple((s.leaf, s.index, tuple(s.path)) for s in evidence.supports),
            3: evidence.members,
            4: evidence.releases,
            5: evidence.models,
            6: evidence.openings,
        }
    )
    if len(extra) > MAX_EXTRA_BYTES:
        raise ProofError(f"the evidence of this receipt takes {len(extra)} bytes, at most {MAX_EXTRA_BYTES} fit in one")
    return format_proof(index, path, note_text, extra)


def parse_receipt(text: str | bytes) -> Receipt:
    """The receipt of at most 1 MiB, well formed but not verified; raises ProofError or EncodingError."""
    proof = parse_proof(text)
    if proof.extra is None:
        raise ProofError("the proof carries no extra data, so it is not a receipt of this system")
    return Receipt(_evidence(proof.extra), proof.index, proof.path, proof.note, proof.checkpoint)


def merge_receipts(texts: Sequence[str | bytes]) -> str:
    """One receipt with the cosignatures of several, which must be of one leaf under one checkpoint.

    Validators keep openings for different times, so the richest evidence is taken. Nothing is verified here.
    """
    receipts = [parse_receipt(text) for text in texts]
    if not receipts:
        raise ProofError("there is no receipt to merge")
    best = max(receipts, key=lambda r: len(r.evidence.openings))
    lines: dict[tuple[str, bytes], Any] = {}
    for receipt in receipts:
        same = (best.index, best.path, best.note.text, best.evidence.leaf)
        if (receipt.index, receipt.path, receipt.note.text, receipt.evidence.leaf) != same:
            raise ProofError("receipts of different leaves or checkpoints cannot be merged")
        for signature in receipt.note.signatures:
            lines.setdefault((signature.name, signature.key_id), signature)
    note = Note(best.note.text, tuple(lines[key] for key in sorted(lines))[:MAX_SIGNATURES])
    return format_receipt(best.evidence, best.index, best.path, note.format())


def _evidence(extra: bytes) -> Evidence:
    values = decode(extra, MAX_EXTRA_BYTES)
    if type(values) is not dict or set(values) != set(range(7)) or type(values[0]) is not int or values[0] != FORMAT:
        raise ProofError(f"the receipt's extra data is not in format {FORMAT}, the one read here")
    leaf = values[1]
    if type(leaf) is not bytes or len(leaf) > MAX_LEAF_BYTES:
        raise ProofError(f"the receipt's leaf must be at most {MAX_LEAF_BYTES} bytes")
    supports = tuple(_support(item) for item in _array(values[2], "supports"))
    statements = [_blobs(values[key], name, limit) for key, name, limit in _STATEMENTS]
    return Evidence(leaf, supports, *statements)


_STATEMENTS = (
    (3, "members", MAX_STATEMENT_BYTES),
    (4, "releases", MAX_STATEMENT_BYTES),
    (5, "models", MAX_LEAF_BYTES),
    (6, "openings", MAX_OPENINGS_BYTES),
)


def _support(value: Any) -> Support:
    if type(value) is not tuple or len(value) != 3:
        raise ProofError("a support must be [leaf, index, path]")
    leaf, index, path = value
    if type(leaf) is not bytes or len(leaf) > MAX_LEAF_BYTES or type(index) is not int or not 0 <= index <= MAX_SIZE:
        raise ProofError("a support must have a leaf and its index")
    if type(path) is not tuple or len(path) > MAX_PATH or not all(is_digest(sibling) for sibling in path):
        raise ProofError("a support's path must be 32-byte hashes")
    return Support(leaf, index, path)


def _array(value: Any, name: str) -> tuple[Any, ...]:
    if type(value) is not tuple or len(value) > MAX_ITEMS:
        raise ProofError(f"the receipt's {name} must be an array of at most {MAX_ITEMS} items")
    return value


def _blobs(value: Any, name: str, limit: int) -> tuple[bytes, ...]:
    items = _array(value, name)
    if not all(type(item) is bytes and len(item) <= limit for item in items):
        raise ProofError(f"the receipt's {name} must be byte strings of at most {limit} bytes")
    return items
