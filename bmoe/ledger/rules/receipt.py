"""What a receipt proves: eight numbered checks over bytes alone, for a reader who trusts only a policy file.

1 parse strictly              5 statements carry the registrar's signature
2 checkpoint and cosignatures 6 outputs are signed by enrolled members and bound to their task
3 the leaf is in the tree     7 openings match commitments, stances are recomputed
4 so are its supports         8 the answer is the combination of its verdicts

What cannot be recomputed from one receipt (an agent's standing at that time) is named in `relied_on`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bmoe.ledger.rules.commitments import commit_rows
from bmoe.ledger.rules.entries import Answer, Rejected, Verdict, parse_entry
from bmoe.ledger.rules.merkle import leaf_hash, verify_inclusion
from bmoe.ledger.rules.outputs import fit_spec, unpack_dims, untold
from bmoe.ledger.rules.receipt_format import Evidence, Receipt, format_receipt, merge_receipts, parse_receipt
from bmoe.ledger.rules.receipt_proof import check_cosignatures, step
from bmoe.ledger.rules.receipt_votes import (
    AuditedVerdict,
    Statements,
    all_outputs,
    check_answer,
    check_signatures,
    check_vote,
)
from bmoe.ledger.rules.trust import Trust
from bmoe.protocol.encoding import read_bstrs
from bmoe.protocol.errors import ProofError
from bmoe.protocol.messages import MAX_TENSORS, H, Member, ModelRelease, Release, Sealed, open_message, tensors_from
from bmoe.protocol.tensors import Tensor

__all__ = ["Audited", "AuditedVerdict", "check_request", "format_receipt", "merge_receipts", "verify_receipt"]


@dataclass(frozen=True)
class Audited:
    """What a receipt proved. `cosigned` are (validator, POSIX seconds); `result` is None unless it is of an answer.

    `recomputed` and `relied_on` say in words what was computed here and what rests on the validators' cosignatures.
    """

    kind: str
    entry: Verdict | Answer
    index: int
    size: int
    root: bytes
    cosigned: tuple[tuple[str, int], ...]
    verdicts: tuple[AuditedVerdict, ...]
    result: tuple[Tensor, ...] | None
    recomputed: tuple[str, ...]
    relied_on: tuple[str, ...]
    release: Release


def verify_receipt(text: str | bytes, trust: Trust) -> Audited:
    """Verify a receipt against a trust policy; raises ProofError naming the step that fails and why."""
    with step(1, "parse"):
        receipt = parse_receipt(text)
        evidence, checkpoint = receipt.evidence, receipt.checkpoint
        entry = _entry(evidence.leaf, trust, (Verdict, Answer))
    with step(2, "checkpoint"):
        cosigned = check_cosignatures(receipt, trust)
    with step(3, "inclusion"):
        verify_inclusion(receipt.index, checkpoint.size, leaf_hash(evidence.leaf), receipt.path, checkpoint.root)
    with step(4, "supports"):
        verdicts = _supports(receipt, entry, trust)
    with step(5, "statements"):
        statements = _statements(evidence, trust, verdicts)
    with step(6, "signatures"):
        signed = [check_signatures(index, verdict, statements) for index, verdict in verdicts]
        _exactly(
            {s.header.author for v in signed for s in all_outputs(v)}, set(statements.members), "members' statements"
        )
    with step(7, "vote"):
        openings = _openings(evidence, entry, [v for _, v in verdicts])
        audited = tuple(check_vote(v, statements, openings) for v in signed)
    with step(8, "answer"):
        result = check_answer(entry, audited, statements, openings)
    kind = "answer" if isinstance(entry, Answer) else "verdict"
    facts = (kind, entry, receipt.index, checkpoint.size, checkpoint.root, cosigned, audited, result)
    release = statements.releases[verdicts[0][1].expert]
    return Audited(*facts, *_scope(entry, audited, result), release)


def check_request(entry: Answer, release: Release, opening: bytes) -> None:
    """Raise ProofError unless `opening` (salt and input tensors, CBOR byte strings) is the request answered.

    `release` is that of an expert of the model, which declares the inputs. Behind the tensors stand, as little-endian
    int64, the dims of each input that has more than one free dim besides its rows.
    """
    with step(9, "request"):
        salt, *parts = read_bstrs(opening, 0, 2 * MAX_TENSORS + 1)
        parts, shapes = parts[: len(release.inputs)], list(parts[len(release.inputs) :])
        specs = [
            (i[0], i[1], unpack_dims(shapes.pop(0)))
            if untold(i, release.batch)
            else fit_spec(i, release.batch, entry.rows, p)
            for i, p in zip(release.inputs, parts, strict=True)
        ]
        if shapes:
            raise ProofError("the opening holds more than the request's salt, tensors and shapes")
        if commit_rows("", salt, tensors_from(specs, parts), entry.rows) != entry.request_root:
            raise ProofError("this request is not the one that the answer commits to")


def _entry(leaf: bytes, trust: Trust, kinds: tuple[type, ...]) -> Verdict | Answer:
    entry = parse_entry(leaf)
    if isinstance(entry, Rejected):
        raise ProofError(f"the leaf says that an entry by {entry.author} was rejected: {entry.reason}")
    if not isinstance(entry, kinds) or not isinstance(entry, (Verdict, Answer)):
        raise ProofError(f"expected a {' or '.join(k.__name__ for k in kinds)}, found {type(entry).__name__}")
    if (entry.ledger, entry.epoch) != (trust.ledger, trust.epoch):
        raise ProofError(
            f"the leaf is of ledger {entry.ledger.hex()}/{entry.epoch}, the policy trusts"
            f" {trust.ledger.hex()}/{trust.epoch}"
        )
    return entry


def _supports(receipt: Receipt, entry: Verdict | Answer, trust: Trust) -> list[tuple[int, Verdict]]:
    """The verdicts that the receipt is about: its own leaf, or those an answer names, in its order."""
    supports = receipt.evidence.supports
    if isinstance(entry, Verdict):
        if supports:
            raise ProofError(f"a verdict rests on no other leaf, {len(supports)} came")
        return [(receipt.index, entry)]
    found = []
    for support in supports:
        verdict = _entry(support.leaf, trust, (Verdict,))
        checkpoint = receipt.checkpoint
        verify_inclusion(support.index, checkpoint.size, leaf_hash(support.leaf), support.path, checkpoint.root)
        if support.index >= receipt.index:
            raise ProofError(f"the verdict at {support.index} was entered after the answer at {receipt.index}")
        assert isinstance(verdict, Verdict)
        found.append((support.index, verdict))
    if any(v.tenant != entry.tenant for _, v in found):
        raise ProofError(f"the answer is of tenant {entry.tenant}, a verdict that it rests on is not")
    if tuple(v.task for _, v in found) != entry.tasks:
        raise ProofError(f"the answer names {len(entry.tasks)} verdicts, the receipt's {len(found)} are not they")
    return found


def _statements(evidence: Evidence, trust: Trust, verdicts: Sequence[tuple[int, Verdict]]) -> Statements:
    members = [_stated(Member, data, trust) for data in evidence.members]
    releases = [_stated(Release, data, trust) for data in evidence.releases]
    models = tuple(_stated(ModelRelease, data, trust) for data in evidence.models)
    by_name = {m.member: m for m in members}
    by_digest = {r.digest: r for r in releases}
    if len(by_name) != len(members) or len(by_digest) != len(releases):
        raise ProofError("a member or a release is stated twice")
    _exactly({v.expert for _, v in verdicts}, set(by_digest), "release statements")
    return Statements(by_name, by_digest, models)


def _stated(cls: type[H], data: bytes, trust: Trust) -> H:
    sealed: Sealed[H] = open_message(cls, data)
    sealed.verify(trust.registrar)
    if sealed.header.ledger != trust.ledger:
        raise ProofError(f"a statement is of ledger {sealed.header.ledger.hex()}, not {trust.ledger.hex()}")
    return sealed.header


def _exactly(needed: set[Any], given: set[Any], what: str) -> None:
    if needed != given:
        raise ProofError(f"the {what} are not exactly those needed: {len(needed - given)} missing, "
                         f"{len(given - needed)} not asked for")  # fmt: skip


def _openings(evidence: Evidence, entry: Verdict | Answer, verdicts: Sequence[Verdict]) -> dict[bytes, bytes]:
    """Openings by digest: either none, or exactly those named."""
    digests = [hashlib.sha256(o).digest() for o in evidence.openings]
    if not digests:
        return {}
    named = {digest for v in verdicts for digest in v.openings}
    if isinstance(entry, Answer):
        named.add(entry.result_opening)
    if digests != sorted(named):
        raise ProofError(f"{len(named)} openings are named, the {len(digests)} given are not exactly they, in order")
    return dict(zip(digests, evidence.openings, strict=True))


def _scope(
    entry: Verdict | Answer, verdicts: Sequence[AuditedVerdict], result: tuple[Tensor, ...] | None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What was recomputed here, and what rests on the validators' word."""
    recomputed = ["every output's signature, and that it is bound to its task, expert, input and rows"]
    relied_on = ["which agents were in service and trusted when the verdict was made, and so whether its policy held",
                 "that no other verdict for the task came first"]  # fmt: skip
    judged = [v for v in verdicts if v.value is not None]
    if judged:
        recomputed.append("every output's value opens its commitment, and its distance gives the stance stated")
    elif any(v.accepted_from for v in verdicts):
        relied_on.append("the outputs' values and stances: this receipt carries no openings")
    if result is not None:
        recomputed.append("the answer is the weighted combination of the accepted values, byte for byte")
    elif isinstance(entry, Answer):
        relied_on.append("the answer's combination: this receipt carries no openings")
    relied_on.append("that the expert computes these values: that takes a re-execution")
    return tuple(recomputed), tuple(relied_on)
