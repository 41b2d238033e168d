"""What the receipt of a release proves, offline: that the ledger has it, cosigned by a quorum, signed by the registrar.

Such a receipt carries the leaf and nothing else. That a version was withdrawn later no receipt can tell: for that there
is the repository's metadata, which expires.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic

from bmoe.ledger.rules.entries import ModelEntry, Rejected, ReleaseEntry, parse_entry
from bmoe.ledger.rules.merkle import leaf_hash, verify_inclusion
from bmoe.ledger.rules.receipt_format import Evidence, parse_receipt
from bmoe.ledger.rules.receipt_proof import check_cosignatures, step
from bmoe.ledger.rules.trust import Trust
from bmoe.protocol.errors import ProofError, RefusedError
from bmoe.protocol.messages import H, ModelRelease, Release, Sealed, open_message


@dataclass(frozen=True)
class Entered(Generic[H]):
    """A registrar's statement, its signed bytes, and the place of its entry: index and size of the tree that holds it."""

    statement: H
    sealed: bytes
    index: int
    size: int
    cosigned: tuple[str, ...]


def verify_release(text: str | bytes, trust: Trust) -> Entered[Release]:
    """The release of an expert or a gate that a receipt is of; raises ProofError naming the step that fails and why."""
    return _verify(text, trust, ReleaseEntry, Release)


def verify_model(text: str | bytes, trust: Trust) -> Entered[ModelRelease]:
    """The release of a model's version that a receipt is of; raises as `verify_release` does."""
    return _verify(text, trust, ModelEntry, ModelRelease)


def read_statement(data: bytes, kind: type[H], trust: Trust) -> H:
    """A registrar's statement by itself, without proof that the ledger has it; raises RefusedError or EnvelopeError."""
    sealed: Sealed[H] = open_message(kind, data)
    sealed.verify(trust.registrar)
    if sealed.header.ledger != trust.ledger:
        raise RefusedError(f"the statement is of ledger {sealed.header.ledger.hex()}, not {trust.ledger.hex()}")
    return sealed.header


def _verify(text: str | bytes, trust: Trust, wanted: type, kind: type[H]) -> Entered[H]:
    with step(1, "parse"):
        receipt = parse_receipt(text)
        entry = parse_entry(receipt.evidence.leaf)
        if isinstance(entry, Rejected):
            raise ProofError(f"the ledger rejected this entry of {entry.author}: {entry.reason}")
        if type(entry) is not wanted or not isinstance(entry, (ReleaseEntry, ModelEntry)):
            found = type(entry).__name__ if entry else "an unknown entry"
            raise ProofError(f"expected the receipt of a {wanted.__name__}, found {found}")
        if (entry.ledger, entry.epoch) != (trust.ledger, trust.epoch):
            raise ProofError("the leaf is of another ledger or epoch than the policy trusts")
        if receipt.evidence != Evidence(receipt.evidence.leaf):
            raise ProofError("the receipt of a release carries its leaf and nothing else")
    with step(2, "checkpoint"):
        cosigned = check_cosignatures(receipt, trust)
    with step(3, "inclusion"):
        size, root = receipt.checkpoint.size, receipt.checkpoint.root
        verify_inclusion(receipt.index, size, leaf_hash(receipt.evidence.leaf), receipt.path, root)
    with step(4, "statement"):
        statement = read_statement(entry.statement, kind, trust)
    return Entered(statement, entry.statement, receipt.index, size, tuple(name for name, _ in cosigned))
