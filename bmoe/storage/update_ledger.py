"""What the ledger must say before a board takes a version: its model and every part released, by receipts read offline.

With assurance `committed` the registrar's signed statements do, where a receipt is not to be had yet.
"""

from __future__ import annotations

from dataclasses import dataclass

from bmoe.ledger.rules.receipt_release import Entered, read_statement, verify_model, verify_release
from bmoe.ledger.rules.tlog_proof import MAX_PROOF_BYTES
from bmoe.ledger.rules.trust import Trust
from bmoe.protocol.errors import RefusedError, UnavailableError, UnknownError
from bmoe.protocol.messages import ModelRelease, Release
from bmoe.storage.manifest import Expert, Model
from bmoe.storage.stated import stated_tensors
from bmoe.storage.targets import experts_and_gate, model_receipt_path, release_receipt_path
from bmoe.storage.update_source import Source

STATEMENT_BYTES = 16 * 1024


@dataclass(frozen=True)
class Word:
    """Whose word is taken: the ledger's trust policy, and `final` (receipts alone) or `committed` (statements too)."""

    trust: Trust
    assurance: str = "final"


def check_entered(source: Source, word: Word, model: Model, manifest: bytes) -> dict[str, bytes]:
    """The registrar's sealed release of each part, by SHA-256 in hex.

    `manifest` is the SHA-256 of model.json. Raises ProofError for a receipt that does not verify, RefusedError where the
    ledger says something else, UnknownError or UnavailableError where it says nothing, or nothing final.
    """
    statement = _model(source, word, model)
    experts = tuple(bytes.fromhex(expert.sha256) for expert in model.experts)
    gate = bytes.fromhex(model.gate.sha256) if model.gate else b""
    if (statement.model, statement.version) != (model.name, model.version):
        raise RefusedError(f"the ledger's entry is of {statement.model} {statement.version}")
    if (statement.manifest, statement.experts, statement.gate) != (manifest, experts, gate):
        raise RefusedError(f"the ledger has {model.name} {model.version} with another manifest or other parts")
    return {part.sha256: _part(source, word, model, part) for part in experts_and_gate(model)}


def _model(source: Source, word: Word, model: Model) -> ModelRelease:
    path = model_receipt_path(model.name, model.version)
    try:
        return verify_model(_receipt(source, path), word.trust).statement
    except (UnknownError, UnavailableError) as error:
        return read_statement(_statement(source, word, path, error), ModelRelease, word.trust)


def _part(source: Source, word: Word, model: Model, part: Expert) -> bytes:
    path = release_receipt_path(part.sha256)
    try:
        entered: Entered[Release] = verify_release(_receipt(source, path), word.trust)
        release, sealed = entered.statement, entered.sealed
    except (UnknownError, UnavailableError) as error:
        sealed = _statement(source, word, path, error)
        release = read_statement(sealed, Release, word.trust)
    facts = (release.digest.hex(), release.size, release.opset, release.batch, (release.inputs, release.outputs))
    if facts != (part.sha256, part.bytes, part.opset, part.batch, stated_tensors(part)):
        raise RefusedError(f"the ledger's release of {part.sha256[:16]} is not what the manifest says of {part.file}")
    return sealed


def _receipt(source: Source, path: str) -> bytes:
    try:
        return source.read(path, MAX_PROOF_BYTES)
    except RefusedError as error:
        raise UnknownError(str(error)) from None


def _statement(source: Source, word: Word, path: str, error: Exception) -> bytes:
    """The sealed statement in place of a receipt that is not to be had, where that is enough."""
    if word.assurance != "committed":
        said = (
            "the ledger has no final entry for it" if isinstance(error, UnknownError) else "its entry is not final yet"
        )
        raise type(error)(f"{said}: {error}") from None
    return source.read(path.replace("receipts/", "statements/", 1), STATEMENT_BYTES)
