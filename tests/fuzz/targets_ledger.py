"""Hostile bytes for the ledger's rules: entries, frames, the fold, checkpoints, proofs, receipts, trust files."""

from __future__ import annotations

import base64
import copy
import dataclasses
import functools
import hashlib
import json
from random import Random

from ledger_fixtures import Fleet
from mutate import spoil, spoil_cbor, spoil_json
from target import MEGABYTE, Target, scratch
from targets_wire import golden

from bmoe.ledger import receipts
from bmoe.ledger.rules.checkpoint import parse_checkpoint, parse_note, parse_vkey
from bmoe.ledger.rules.entries import MAX_LEAF_BYTES, Entry, Rejected, parse_entry
from bmoe.ledger.rules.fold import apply_message
from bmoe.ledger.rules.frames import build_frame, parse_frame
from bmoe.ledger.rules.merkle import leaf_hash, merkle_root, row_proof, verify_consistency, verify_inclusion
from bmoe.ledger.rules.receipt import verify_receipt
from bmoe.ledger.rules.receipt_format import Evidence, Receipt, format_receipt, parse_receipt
from bmoe.ledger.rules.tlog_proof import format_proof, parse_proof
from bmoe.ledger.rules.trust import format_trust, parse_anchor, parse_trust
from bmoe.ledger.store import Store
from bmoe.protocol.errors import (
    ConfigError,
    EncodingError,
    EnvelopeError,
    InputError,
    MessageError,
    ProofError,
    UnavailableError,
)
from bmoe.protocol.keys import Signer


@functools.cache
def ledger():  # type: ignore[no-untyped-def]
    """The ledger of the receipts' tests with keys that are the same in every run: one answer, one verdict, a checkpoint."""
    from receipt_ledger import Ledger, answered, decided

    made = Ledger.__new__(Ledger)
    fleet = made.fleet = Fleet(agent_count=3, registrar=_key("registrar"))
    fleet.signers = {name: _key(name) for name in fleet.signers}
    made.store = Store(scratch() / "replica.db", fleet.ledger, fleet.epoch)
    fleet.found()
    made.openings, made.attach = {}, []
    made.request, _ = answered(made)
    made.task, *_ = decided(made, wrong=("agent-2",))
    made.size = made.seal()
    return made


def _key(name: str) -> Signer:
    return Signer.from_bytes(hashlib.sha256(name.encode()).digest())


def _receipts() -> list[bytes]:
    made = ledger()
    kinds = (("answer", made.request), ("verdict", made.task.task))
    return [made.receipt(kind, name, made.size).encode() for kind, name in kinds]


def _entry(data: bytes) -> bytes | None:
    entry = parse_entry(data)
    return None if entry is None else entry.to_bytes()


def _frame(data: bytes) -> bytes:
    return parse_frame(data).sealed.message()


def _fold(data: bytes) -> None:
    """Entries in a frame that is in order: what the rules make of it is a leaf, never an exception, not even a caught one."""
    fleet, data = ledger().fleet, data[:MAX_LEAF_BYTES]
    state = copy.deepcopy(fleet.state)
    try:
        entry = parse_entry(data)
    except InputError:
        entry = None
    author = entry.author if entry is not None and entry.author in fleet.signers else "coordinator"
    chain = fleet.chains.get(author)
    seq, previous = (chain.seq + 1, chain.previous) if chain else (1, bytes(32))
    if entry is not None:
        common = {"ledger": fleet.ledger, "epoch": 1, "author": author, "seq": seq, "time_ms": fleet.now_ms}
        data = dataclasses.replace(entry, **common).to_bytes()
    frame, _ = build_frame(
        fleet.signers[author], ledger=fleet.ledger, epoch=1, author=author, seq=seq, previous=previous,
        time_ms=fleet.now_ms, entries=[data], attachments=ledger().attach,
    )  # fmt: skip
    applied = apply_message(state, frame)
    assert len(applied.leaves) == 1
    leaf = applied.entries[0]
    assert not isinstance(leaf, Rejected) or not leaf.reason.startswith("malformed ("), leaf.reason


def _fold_seeds() -> list[bytes]:
    """Every entry of the ledger, and those of types that are not on it."""
    entries: list[Entry] = []
    for message in ledger().fleet.messages:
        entries += [e for data in parse_frame(message).entries if (e := parse_entry(data)) is not None]
    open_now = [data for data in golden("entry") if not data.startswith(b"rejected")]
    return [entry.to_bytes() for entry in entries] + open_now


def _note(data: bytes) -> bytes:
    note = parse_note(data)
    parse_checkpoint(note.text)
    return note.format().encode()


def _vkey(data: bytes) -> bytes:
    return parse_vkey(data.decode(errors="surrogateescape")).format().encode()


def _proof(data: bytes) -> bytes:
    proof = parse_proof(data)
    return format_proof(proof.index, proof.path, proof.note.format(), proof.extra).encode()


def _receipt(data: bytes) -> None:
    verify_receipt(data, ledger().fleet.trust)
    assert data in _honest_receipts(), "a receipt that nobody issued verifies"


@functools.cache
def _honest_receipts() -> tuple[bytes, ...]:
    """Those issued, and the same without openings: that is a receipt too, and says itself that it proves less."""
    bare = [parse_receipt(data) for data in _receipts()]
    return (*_receipts(), *(_format(dataclasses.replace(r.evidence, openings=()), r) for r in bare))


def _format(evidence: Evidence, receipt: Receipt) -> bytes:
    return format_receipt(evidence, receipt.index, receipt.path, receipt.note.format()).encode()


def _vary_receipt(random: Random, data: bytes) -> bytes:
    proof = parse_proof(data)
    extra = proof.extra or b""
    extra = spoil_cbor(random, extra) if random.random() < 0.7 else spoil(random, extra)
    return data.replace(base64.b64encode(proof.extra or b""), base64.b64encode(extra))


def _inclusion(data: bytes) -> None:
    """Index, size and path out of the bytes: one byte, one byte, then hashes."""
    index, size, path = _numbers(data)
    verify_inclusion(index, size, leaf_hash(b"leaf 3"), path, _root())
    # Of trees of equal depth a path shows the index alone; the size is what validators sign.
    assert index == 3 and 5 <= size <= 8


def _consistency(data: bytes) -> None:
    size1, size2, path = _numbers(data)
    verify_consistency(size1, size2, path, _root(), _root())
    assert size1 == size2 and not path


def _numbers(data: bytes) -> tuple[int, int, list[bytes]]:
    """Two numbers of 9 bytes (so that they may exceed 2^63), and hashes; the last may be short."""
    rest = data[18:]
    path = [rest[at : at + 32] for at in range(0, len(rest), 32)]
    return int.from_bytes(data[:9], "big", signed=True), int.from_bytes(data[9:18], "big", signed=True), path


@functools.cache
def _leaves() -> list[bytes]:
    return [b"leaf %d" % i for i in range(7)]


@functools.cache
def _root() -> bytes:
    return merkle_root(_leaves())


def _merkle_seeds() -> list[bytes]:
    path = b"".join(row_proof(_leaves(), 3))
    return [(3).to_bytes(9, "big") + (7).to_bytes(9, "big") + path, (7).to_bytes(9, "big") * 2]


def _trust(data: bytes) -> None:
    trust = parse_trust(data)
    assert parse_trust(format_trust(trust)) == trust


def _anchor(data: bytes) -> None:
    parse_anchor(data)


def _trust_seeds() -> list[bytes]:
    whole = format_trust(ledger().fleet.trust).encode()
    values = json.loads(whole)
    anchor = {k: v for k, v in values.items() if k not in ("validators", "quorum")}
    return [whole, json.dumps(anchor).encode()]


def _receipt_asked(data: bytes) -> None:
    receipts._parse(data)


def _receipt_reply(data: bytes) -> None:
    receipts.read_reply(data)


MESSAGE = (EncodingError, EnvelopeError, MessageError)
TARGETS = (
    Target("entry", _entry, lambda: golden("entry"), (EncodingError, MessageError), vary=spoil_cbor),
    Target("frame", _frame, lambda: [*golden("frame"), *ledger().fleet.messages[:4]], MESSAGE),
    Target("fold", _fold, _fold_seeds, (), memory=16 * MEGABYTE, vary=spoil_cbor),
    Target("note", _note, lambda: [b"".join(r.split(b"\n\n", 1)[1:]) for r in _receipts()], (ProofError,)),
    Target("verifier-key", _vkey, lambda: [k.format().encode() for k in ledger().fleet.trust.validators], (ProofError,)),
    Target("tlog-proof", _proof, _receipts, (ProofError,)),
    Target("receipt", _receipt, _receipts, (ProofError,), memory=16 * MEGABYTE, vary=_vary_receipt),
    Target("inclusion-proof", _inclusion, _merkle_seeds, (ProofError,)),
    Target("consistency-proof", _consistency, _merkle_seeds, (ProofError,)),
    Target("trust-file", _trust, _trust_seeds, (ConfigError,), vary=spoil_json),
    Target("anchor-file", _anchor, _trust_seeds, (ConfigError,), vary=spoil_json),
    Target("receipt-request", _receipt_asked, lambda: [b'{"task": "%s"}' % (b"0" * 32), b'{"request": "%s", "size": 3}'
           % (b"0" * 32)], (MessageError,), vary=spoil_json),
    Target("receipt-reply", _receipt_reply, lambda: [b'{"error": "no"}', *_receipts()], (InputError, UnavailableError),
           vary=spoil_json),
)  # fmt: skip
