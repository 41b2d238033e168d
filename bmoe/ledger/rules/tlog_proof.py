"""The receipt file: one leaf's index, its inclusion path and the signed checkpoint, as offline-verifiable text.

Source: C2SP tlog-proof v1. The leaf itself travels beside it, or in `extra`, which nothing authenticates.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass

from bmoe.ledger.rules.checkpoint import (
    Checkpoint,
    Note,
    decode_base64,
    decode_text,
    parse_checkpoint,
    parse_decimal,
    parse_note,
)
from bmoe.ledger.rules.merkle import HASH_BYTES, MAX_PATH
from bmoe.protocol.errors import ProofError

MAX_PROOF_BYTES = 1024 * 1024
_FIRST_LINE = "c2sp.org/tlog-proof@v1"


@dataclass(frozen=True)
class TlogProof:
    """A parsed, not yet verified proof; `checkpoint` is what `note` states, `path` 32-byte hashes from the leaf up."""

    extra: bytes | None
    index: int
    path: tuple[bytes, ...]
    note: Note
    checkpoint: Checkpoint


def format_proof(index: int, path: Sequence[bytes], note_text: str, extra: bytes | None = None) -> str:
    """The proof as text, ending in a newline; raises ProofError for what parse_proof would refuse."""
    lines = [_FIRST_LINE]
    if extra is not None:
        lines.append("extra " + base64.b64encode(extra).decode())
    lines.append(f"index {index}")
    lines.extend(base64.b64encode(sibling).decode() for sibling in path)
    text = "\n".join(lines) + "\n\n" + note_text
    parse_proof(text)
    return text


def parse_proof(data: str | bytes) -> TlogProof:
    """The proof of at most 1 MiB, well formed but not verified: verify the note's signatures and the inclusion next."""
    text = decode_text(data, MAX_PROOF_BYTES, "proof")
    head, _, note_text = text.partition("\n\n")
    first, *lines = head.split("\n")
    if first != _FIRST_LINE:
        raise ProofError(f"proof must begin with the line {_FIRST_LINE}, got {first[:60]!a}")
    extra = None
    if lines and lines[0].startswith("extra "):
        extra = decode_base64(lines.pop(0)[len("extra ") :], "extra data of the proof")
    if not lines or not lines[0].startswith("index "):
        came = lines[0][:60] if lines else ""
        raise ProofError(f"proof must state its index next, got {came!a}")
    index = parse_decimal(lines.pop(0)[len("index ") :], "index of the proof")
    path = _parse_path(lines)
    note = parse_note(note_text)
    checkpoint = parse_checkpoint(note.text)
    if index >= checkpoint.size:
        raise ProofError(f"proof is of leaf {index}, but its checkpoint has {checkpoint.size} leaves")
    return TlogProof(extra, index, path, note, checkpoint)


def _parse_path(lines: list[str]) -> tuple[bytes, ...]:
    if len(lines) > MAX_PATH:
        raise ProofError(f"proof has {len(lines)} path hashes, no tree needs more than {MAX_PATH}")
    path = tuple(decode_base64(line, "path hash of the proof") for line in lines)
    for sibling in path:
        if len(sibling) != HASH_BYTES:
            raise ProofError(f"path hash of the proof must be {HASH_BYTES} bytes, got {len(sibling)}")
    return path
